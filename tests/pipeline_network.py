"""A network that configurations of tests name."""

import torch
from torch import nn


def network(channels=1, width=4, axes=3):
    """Two convolutions with weights that nobody drew."""
    conv = getattr(nn, f"Conv{axes}d")
    net = nn.Sequential(conv(channels, width, 3, padding=1), nn.ReLU(), conv(width, 2, 1))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).sin().reshape(p.shape))
        net[2].bias.copy_(torch.tensor([0.0, 0.5]))
    return net.eval()


def weightless():
    """A network that has learnt nothing: one class, no weights."""
    return nn.Sequential(nn.AvgPool3d(3, 1, 1), nn.Softplus()).eval()
