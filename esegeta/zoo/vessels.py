"""Three 3-D U-Nets that segment vessels, trained on drawn ones."""

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn

from esegeta._registry import network
from esegeta.zoo.weights import trained

WIDTHS = (8, 12, 16, 24, 32, 32)


def strided_block(before: int, after: int, stride: int) -> nn.Module:
    """Two times convolution, instance norm, leaky ReLU; the first convolution goes down by its stride."""
    return nn.Sequential(
        OrderedDict(
            conv_a=nn.Conv3d(before, after, 3, stride=stride, padding=1),
            norm_a=nn.InstanceNorm3d(after, affine=True),
            act_a=nn.LeakyReLU(0.01),
            conv_b=nn.Conv3d(after, after, 3, padding=1),
            norm_b=nn.InstanceNorm3d(after, affine=True),
            act_b=nn.LeakyReLU(0.01),
        )
    )


def pooled_block(before: int, after: int) -> nn.Module:
    """Two times convolution, batch norm, ReLU."""
    return nn.Sequential(
        OrderedDict(
            conv_a=nn.Conv3d(before, after, 3, padding=1),
            norm_a=nn.BatchNorm3d(after),
            act_a=nn.ReLU(),
            conv_b=nn.Conv3d(after, after, 3, padding=1),
            norm_b=nn.BatchNorm3d(after),
            act_b=nn.ReLU(),
        )
    )


class VesselUNet(nn.Module):
    """What the three have in common: levels down, levels up with skips, one channel of logits."""

    down: nn.ModuleList
    up: nn.ModuleList
    decoder: nn.ModuleList
    out: nn.Module

    def scales(self, x: Tensor) -> list[Tensor]:
        """Return the activation of each level of the decoder, coarse to fine: each may be supervised."""
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
        skips.pop()
        found = []
        for up, level in zip(self.up, self.decoder, strict=True):
            x = level(torch.cat([up(x), skips.pop()], dim=1))
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``(N, 1, *S)`` from ``(N, 1, *S)``."""
        return self.out(self.scales(x)[-1])


class StridedUNet(VesselUNet):
    """Down five times by strides, up by transposed convolutions."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        finer = list(pairwise(widths))
        self.down = nn.ModuleList(
            [strided_block(1, widths[0], 1), *(strided_block(a, b, 2) for a, b in finer)]
        )
        self.up = nn.ModuleList([nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in reversed(finer)])
        self.decoder = nn.ModuleList([strided_block(2 * a, a, 1) for a, _ in reversed(finer)])
        self.out = nn.Conv3d(widths[0], 1, 1)


class PooledUNet(VesselUNet):
    """Down four times by max-pools, up by interpolation."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS[:-1]) -> None:
        super().__init__()
        finer = list(pairwise(widths))
        self.down = nn.ModuleList(
            [
                pooled_block(1, widths[0]),
                *(
                    nn.Sequential(OrderedDict(pool=nn.MaxPool3d(2), block=pooled_block(a, b)))
                    for a, b in finer
                ),
            ]
        )
        self.up = nn.ModuleList([nn.Upsample(scale_factor=2, mode="trilinear") for _ in finer])
        self.decoder = nn.ModuleList([pooled_block(a + b, a) for a, b in reversed(finer)])
        self.out = nn.Conv3d(widths[0], 1, 1)


@network(family="trained")
def vessel_unet() -> nn.Module:
    r"""Return a trained 3-D U-Net that segments the vessels of ``vessel_phantom``, in eval mode.

    Five levels down by convolutions of stride 2, up by transposed convolutions; instance norm, leaky ReLU.
    The probability of a vessel is :math:`\sigma(\text{logit})`. It is about the architecture of the paper with fewer
    channels, trained on drawn vessels; ``benchmarks/experiments/train_torchesegeta.py`` made its weights, which are
    kept in half precision and loaded as float32.

    Names for layer access: ``down.0`` to ``down.5``, ``up.0`` to ``up.4``, ``decoder.0`` to ``decoder.4``, ``out``;
    blocks have ``conv_a, norm_a, act_a, conv_b, norm_b, act_b``. The deepest decoder is ``decoder.0``.

    Returns:
        A module from ``(N, 1, *S)`` to logits ``(N, 1, *S)``; three axes, sizes that are multiples of 32, of
        64 voxels or more: of 32 one voxel would be left at the bottom, of which there is no instance norm.

    Example:
        >>> vessel_unet().get_submodule("down.5.conv_a")
        Conv3d(32, 32, kernel_size=(3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1))

    Reference:
        Chatterjee et al. 2020, DS6, deformation-aware semi-supervised learning, https://arxiv.org/abs/2006.10802.
    """
    return trained(StridedUNet, "vessel_unet")


@network(family="trained")
def vessel_unet_mss() -> nn.Module:
    """Return the architecture of ``vessel_unet``, trained with supervision at several scales, in eval mode.

    In training three coarser levels of the decoder had outputs of their own, with losses of their own; they are gone.

    Returns:
        A module from ``(N, 1, *S)`` to logits ``(N, 1, *S)``, as ``vessel_unet``.

    Example:
        >>> vessel_unet_mss().get_submodule("up.4")
        ConvTranspose3d(12, 8, kernel_size=(2, 2, 2), stride=(2, 2, 2))

    Reference:
        Chatterjee et al. 2020, DS6, deformation-aware semi-supervised learning, https://arxiv.org/abs/2006.10802.
    """
    return trained(StridedUNet, "vessel_unet_mss")


@network(family="trained")
def vessel_unet_mss_deformation() -> nn.Module:
    """Return a U-Net of max-pools and interpolation, trained at several scales on deformed phantoms, in eval mode.

    Four levels down by max-pools, up by linear interpolation; batch norm, ReLU. Phantom and mask were deformed
    elastically, by another amount at every step of the training.

    Names for layer access: ``down.0`` (a block), ``down.1`` to ``down.4`` (``pool`` and ``block``), ``up.0`` to
    ``up.3``, ``decoder.0`` to ``decoder.3``, ``out``; blocks have ``conv_a, norm_a, act_a, conv_b, norm_b, act_b``.

    Returns:
        A module from ``(N, 1, *S)`` to logits ``(N, 1, *S)``; three axes, sizes that are multiples of 16.

    Example:
        >>> vessel_unet_mss_deformation()(torch.zeros(1, 1, 16, 16, 32)).shape
        torch.Size([1, 1, 16, 16, 32])

    Reference:
        Chatterjee et al. 2020, DS6, deformation-aware semi-supervised learning, https://arxiv.org/abs/2006.10802.
    """
    return trained(PooledUNet, "vessel_unet_mss_deformation")
