"""A small U-Net in one, two or three dimensions."""

import torch
from torch import Tensor, nn

from esegeta._registry import network
from esegeta.engine import check
from esegeta.zoo.drawn import drawn


class Block(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(self, ndim: int, before: int, after: int) -> None:
        super().__init__()
        self.conv = getattr(nn, f"Conv{ndim}d")(before, after, 3, padding=1)
        self.norm = getattr(nn, f"BatchNorm{ndim}d")(after)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the sizes stay."""
        return self.relu(self.norm(self.conv(x)))


class SmallUNet(nn.Module):
    """One level down and up again, with a skip."""

    def __init__(self, ndim: int, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.encoder = Block(ndim, channels, width)
        self.pool = getattr(nn, f"MaxPool{ndim}d")(2)
        self.bottom = Block(ndim, width, 2 * width)
        self.up = getattr(nn, f"ConvTranspose{ndim}d")(2 * width, width, 2, stride=2)
        self.decoder = Block(ndim, 2 * width, width)
        self.out = getattr(nn, f"Conv{ndim}d")(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, *S)`` to logits ``(N, K, *S)``; the sizes of ``S`` are even."""
        skip = self.encoder(x)
        deep = self.up(self.bottom(self.pool(skip)))
        return self.out(self.decoder(torch.cat([deep, skip], dim=1)))


@network(family="drawn", example={"ndim": 2})
def small_unet(ndim: int, channels: int = 1, classes: int = 2, width: int = 4, key: int = 0) -> nn.Module:
    """Return a U-Net of one level with random weights, in eval mode: real structure at the price of a toy.

    Convolution, batch norm, ReLU, max-pool; transposed convolution; skip. Piecewise linear in its input.
    Names for layer access: ``encoder, pool, bottom, up, decoder, out``; the blocks have ``conv, norm, relu``.

    Args:
        ndim: number of spatial axes, 1 to 3.
        channels: of the input.
        classes: channels of the output.
        width: channels after the first convolution.
        key: the same key gives the same weights; the global random state is not used.

    Returns:
        A float32 module from ``(N, channels, *S)`` to logits ``(N, classes, *S)``; even sizes.

    Example:
        >>> small_unet(3, classes=5)(torch.zeros(1, 1, 4, 6, 8)).shape
        torch.Size([1, 5, 4, 6, 8])

    Reference:
        Ronneberger et al. 2015, U-Net, https://arxiv.org/abs/1505.04597.
    """
    sizes = {"ndim": ndim, "channels": channels, "classes": classes, "width": width}
    for name, value in sizes.items():
        check.positive_count("small_unet", name, value)
    if ndim > 3:
        raise check.refused("small_unet", "ndim to be 1, 2 or 3", str(ndim), "Choose one of them")
    return drawn(lambda: SmallUNet(ndim, channels, classes, width), key)
