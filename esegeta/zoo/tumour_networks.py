"""Three 2-D networks trained on drawn tumours: with dense blocks, with residual blocks, with neither."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from esegeta._registry import network
from esegeta.zoo.tumours import PARTS, SEQUENCES
from esegeta.zoo.weights import trained

WIDTHS = (12, 20, 32, 48)
GROWTH, LAYERS = 8, 3  # channels that a layer of a dense block adds, and layers of a block
RATE = 0.2  # of the dropout


class DenseBlock(nn.Module):
    """Layers that each see what came before and add a few channels; then all of them are mixed."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    norm=nn.BatchNorm2d(before + n * GROWTH),
                    relu=nn.ReLU(),
                    conv=nn.Conv2d(before + n * GROWTH, GROWTH, 3, padding=1, bias=False),
                    dropout=nn.Dropout(RATE),
                )
            )
            for n in range(LAYERS)
        )
        whole = before + LAYERS * GROWTH
        self.norm = nn.BatchNorm2d(whole)
        self.relu = nn.ReLU()
        self.mix = nn.Conv2d(whole, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the grid."""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return self.mix(self.relu(self.norm(x)))


class ResidualBlock(nn.Module):
    """Two convolutions beside a way that goes past them."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm_a = nn.BatchNorm2d(after)
        self.relu_a = nn.ReLU()
        self.conv_b = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm_b = nn.BatchNorm2d(after)
        self.past = nn.Conv2d(before, after, 1, bias=False)
        self.relu_b = nn.ReLU()
        self.dropout = nn.Dropout(RATE)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the grid."""
        inner = self.norm_b(self.conv_b(self.relu_a(self.norm_a(self.conv_a(x)))))
        return self.dropout(self.relu_b(inner + self.past(x)))


def plain_block(before: int, after: int) -> nn.Module:
    """Two times convolution, batch norm, ReLU; dropout."""
    return nn.Sequential(
        OrderedDict(
            conv_a=nn.Conv2d(before, after, 3, padding=1, bias=False),
            norm_a=nn.BatchNorm2d(after),
            relu_a=nn.ReLU(),
            conv_b=nn.Conv2d(after, after, 3, padding=1, bias=False),
            norm_b=nn.BatchNorm2d(after),
            relu_b=nn.ReLU(),
            dropout=nn.Dropout(RATE),
        )
    )


class TumourNetwork(nn.Module):
    """Three levels down by max-pools and up by interpolation; with skips, or without."""

    def __init__(self, block: Callable[[int, int], nn.Module], *, skips: bool) -> None:
        super().__init__()
        self.skips = skips
        finer = list(pairwise(WIDTHS))
        self.stem = nn.Conv2d(len(SEQUENCES), WIDTHS[0], 3, padding=1)
        self.encoder = nn.ModuleList([block(WIDTHS[0], WIDTHS[0]), *(block(a, b) for a, b in finer)])
        self.pool = nn.ModuleList([nn.MaxPool2d(2) for _ in finer])
        self.up = nn.ModuleList([nn.Upsample(scale_factor=2, mode="bilinear") for _ in finer])
        self.decoder = nn.ModuleList([plain_block(b + a * skips, a) for a, b in reversed(finer)])
        self.out = nn.Conv2d(WIDTHS[0], 1 + len(PARTS), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 4, *S)`` to logits ``(N, 4, *S)``; the sizes of ``S`` are multiples of 8."""
        kept = [self.encoder[0](self.stem(x))]
        for pool, level in zip(self.pool, self.encoder[1:], strict=True):
            kept.append(level(pool(kept[-1])))
        x = kept.pop()
        for up, level in zip(self.up, self.decoder, strict=True):
            beside = kept.pop()
            x = level(torch.cat([up(x), beside], dim=1) if self.skips else up(x))
        return self.out(x)


def dense_unet() -> TumourNetwork:
    """Build the network with dense blocks in its encoder, without weights that mean something."""
    return TumourNetwork(DenseBlock, skips=True)


def residual_unet() -> TumourNetwork:
    """Build the network with residual blocks in its encoder, without weights that mean something."""
    return TumourNetwork(ResidualBlock, skips=True)


def plain_network() -> TumourNetwork:
    """Build the network without skips and residual blocks, without weights that mean something."""
    return TumourNetwork(plain_block, skips=False)


@network(family="trained")
def tumour_dense_unet() -> nn.Module:
    r"""Return a trained 2-D U-Net with dense blocks that segments the tumours of ``tumour_slice``, in eval mode.

    Classes: nothing, core, edema, enhancing, as in the label map; their probabilities are the softmax. It was trained
    with its dropout, so drawing it at test time means something. ``benchmarks/experiments/train_natekar.py`` made its
    weights, which are kept in half precision and loaded as float32.

    Names for layer access: ``stem``; ``encoder.0`` to ``encoder.3``, each with ``layers.0`` to ``layers.2`` (of
    ``norm, relu, conv, dropout``), ``norm, relu, mix``; ``pool.0`` to ``pool.2``; ``up.0`` to ``up.2``,
    ``decoder.0`` to ``decoder.2`` (of ``conv_a, norm_a, relu_a, conv_b, norm_b, relu_b, dropout``),
    ``out``. The deepest decoder is ``decoder.0``.

    Returns:
        A module from ``(N, 4, *S)`` to logits ``(N, 4, *S)``; two axes, sizes that are multiples of 8.

    Example:
        >>> tumour_dense_unet().get_submodule("encoder.2.layers.1.conv")
        Conv2d(28, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)

    Reference:
        Shaikh et al. 2017, Brain tumor segmentation using dense fully convolutional neural network,
        doi:10.1007/978-3-319-75238-9_27.
    """
    return trained(dense_unet, "tumour_dense_unet")


@network(family="trained")
def tumour_residual_unet() -> nn.Module:
    """Return a trained 2-D U-Net with residual blocks that segments the tumours of ``tumour_slice``, in eval mode.

    As ``tumour_dense_unet``, but for the encoder, whose levels have ``conv_a, norm_a, relu_a, conv_b, norm_b, past,
    relu_b, dropout``; ``past`` goes past the two convolutions.

    Returns:
        A module from ``(N, 4, *S)`` to logits ``(N, 4, *S)``; two axes, sizes that are multiples of 8.

    Example:
        >>> tumour_residual_unet().get_submodule("encoder.1.past")
        Conv2d(12, 20, kernel_size=(1, 1), stride=(1, 1), bias=False)

    Reference:
        Kermi, Mahmoudi, Khadir 2018, Deep convolutional neural networks using U-Net for automatic brain tumor
        segmentation in multimodal MRI volumes, doi:10.1007/978-3-030-11726-9_4.
    """
    return trained(residual_unet, "tumour_residual_unet")


@network(family="trained")
def tumour_plain() -> nn.Module:
    """Return a trained 2-D encoder and decoder that segments the tumours of ``tumour_slice``, in eval mode.

    As ``tumour_residual_unet``, but nothing goes past anything: there are no skips and no ``past``, so every layer
    cuts the network in two.

    Returns:
        A module from ``(N, 4, *S)`` to logits ``(N, 4, *S)``; two axes, sizes that are multiples of 8.

    Example:
        >>> tumour_plain().get_submodule("decoder.0.conv_a")
        Conv2d(48, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)

    Reference:
        Natekar, Kori, Krishnamurthi 2020, Demystifying brain tumor segmentation networks,
        doi:10.3389/fncom.2020.00006.
    """
    return trained(plain_network, "tumour_plain")
