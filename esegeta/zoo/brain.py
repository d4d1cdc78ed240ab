"""A 3-D U-Net that was trained on real heads."""

import torch
from torch import Tensor, nn

from esegeta._registry import network
from esegeta.zoo.volumes import DATA
from esegeta.zoo.weights import read_safetensors

PLACES = {
    "e1a": "encoder.0.conv_a",
    "e1b": "encoder.0.conv_b",
    "e2a": "encoder.1.conv_a",
    "e2b": "encoder.1.conv_b",
    "e3a": "encoder.2.conv_a",
    "e3b": "encoder.2.conv_b",
    "u3": "decoder.0.up",
    "d3": "decoder.0.conv",
    "u2": "decoder.1.up",
    "d2": "decoder.1.conv",
    "u1": "decoder.2.up",
    "d1": "decoder.2.conv",
    "out": "out",
}


class Encoder(nn.Module):
    """One level on the way down: two convolutions; the second's activation is also the skip."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv3d(before, after, 3, padding=1)
        self.relu_a = nn.ReLU()
        self.conv_b = nn.Conv3d(after, after, 3, padding=1)
        self.relu_b = nn.ReLU()
        self.pool = nn.MaxPool3d(2)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what goes down, and what crosses over."""
        skip = self.relu_b(self.conv_b(self.relu_a(self.conv_a(x))))
        return self.dropout(self.pool(skip)), skip


class Decoder(nn.Module):
    """One level on the way up: twice the size, joined with the skip, one convolution."""

    def __init__(self, before: int, skip: int, after: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(before, skip, 3, stride=2, bias=False)
        self.conv = nn.Conv3d(2 * skip, after, 3, padding=1)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Upsample by a transposed convolution; drop its last plane, which is how it was trained."""
        x = torch.cat([self.up(x)[..., :-1, :-1, :-1], skip], dim=1)
        return self.dropout(self.relu(self.conv(x)))


class BrainExtractionUNet(nn.Module):
    """Three levels; the third pooled map is the bottleneck, without a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([Encoder(1, 8), Encoder(8, 16), Encoder(16, 32)])
        self.decoder = nn.ModuleList([Decoder(32, 32, 32), Decoder(32, 16, 16), Decoder(16, 8, 8)])
        self.out = nn.Conv3d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 1, *S)`` to logits ``(N, 1, *S)``; the sizes of ``S`` are multiples of 8."""
        skips = []
        for level in self.encoder:
            x, skip = level(x)
            skips.append(skip)
        for level, skip in zip(self.decoder, reversed(skips), strict=True):
            x = level(x, skip)
        return self.out(x)


@network(family="trained")
def brain_extraction_unet() -> nn.Module:
    r"""Return a trained 3-D U-Net that separates brain from head in T1-weighted MRI, in eval mode.

    The probability of brain is :math:`\sigma(\text{logit})`. The input is a volume divided by its maximum,
    as ``head()`` returns it. The network was trained with its dropout, so drawing it at test time means
    something.

    Names for layer access: ``encoder.0`` to ``encoder.2`` go down, each with ``conv_a``, ``relu_a``,
    ``conv_b``, ``relu_b``, ``pool``, ``dropout``; ``decoder.0`` to ``decoder.2`` come up, each with ``up``,
    ``conv``, ``relu``, ``dropout``; then ``out``. The deepest decoder is ``decoder.0``.

    Returns:
        A module from ``(N, 1, *S)`` to logits ``(N, 1, *S)``; three axes, sizes that are multiples of 8.

    Example:
        >>> net = brain_extraction_unet()
        >>> net(torch.zeros(1, 1, 8, 16, 24)).shape
        torch.Size([1, 1, 8, 16, 24])
        >>> net.get_submodule("encoder.2.conv_a")
        Conv3d(16, 32, kernel_size=(3, 3, 3), stride=(1, 1, 1), padding=(1, 1, 1))

    Reference:
        Ivan Itzcovich, deepbrain 0.1 (2018), https://github.com/iitzco/deepbrain.
    """
    with torch.device("meta"):  # draws no initial weights, so the global random state stays as it is
        net = BrainExtractionUNet()
    weights = read_safetensors(DATA / "brain_extraction_unet3d.safetensors")
    layers = {name: name.rpartition(".") for name in weights}
    named = {f"{PLACES[layer]}.{kind}": weights[name] for name, (layer, _, kind) in layers.items()}
    net.load_state_dict(named, assign=True)
    return net.eval()
