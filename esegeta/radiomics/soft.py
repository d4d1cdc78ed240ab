r"""Features that can be differentiated: of soft masks with values in [0, 1], and of intensities in soft bins.

A dream can ascend them, and an attribution can explain them: with ``mask = torch.softmax(model(x), 0)[1]``,
``soft.sphericity(mask)`` is a score of x. For a mask of 0 and 1 the volume and the axes are those of ``features``;
the area is not (see ``area``). All of it composes with ``torch.func``.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta.engine import check
from esegeta.radiomics.levels import offsets

Mask = Float[Tensor, "..."]
Spacing = Sequence[float] | float | None


def _lengths(where: str, mask: Tensor, spacing: Spacing) -> list[float]:
    check.floating(f"radiomics.soft.{where}", "mask", mask)
    if mask.ndim not in (2, 3):
        advice = "Take one class of one example, for example torch.softmax(model(x), 0)[1]"
        expected = "a soft mask with two or three axes"
        raise check.refused(f"radiomics.soft.{where}", expected, check.describe(mask), advice)
    lengths = [1.0 if spacing is None else spacing] if not isinstance(spacing, Sequence) else list(spacing)
    lengths = [float(s) for s in (lengths * mask.ndim if len(lengths) == 1 else lengths)]
    if len(lengths) != mask.ndim or not all(0 < s < math.inf for s in lengths):
        expected = f"spacing of {mask.ndim} finite lengths > 0"
        raise check.refused(f"radiomics.soft.{where}", expected, repr(spacing), "Give mm per voxel")
    return lengths


def volume(mask: Mask, *, spacing: Spacing = None) -> Tensor:
    """Return the volume in mm^3, in the plane the area: the sum of the mask times the size of a voxel.

    >>> volume(torch.full((2, 2), 0.5), spacing=2.0).item()
    8.0
    """
    return mask.sum() * math.prod(_lengths("volume", mask, spacing))


def area(mask: Mask, *, spacing: Spacing = None) -> Tensor:
    r"""Return the area of the surface in mm^2, in the plane the length of the border.

    .. math:: \int |\nabla m| = \int_0^1 \mathrm{area}\{m = t\} \, dt

    which is the mean area of the mask's level sets. The gradient is taken at the corners between voxels, from the
    mean differences along each axis; beyond the image the mask is 0. It is right for masks that rise over two voxels
    or more; of a mask of 0 and 1 the gradient only sees steps along the grid, and the area does not converge.

    >>> grid = torch.arange(-12.0, 13.0)
    >>> disc = torch.sigmoid(8 - torch.hypot(grid[:, None], grid))
    >>> round((area(disc) / (2 * math.pi * 8)).item(), 2)
    1.0
    """
    lengths = _lengths("area", mask, spacing)
    axes = mask.ndim
    padded = torch.nn.functional.pad(mask, [1, 1] * axes)
    squares = torch.zeros((), dtype=mask.dtype, device=mask.device)
    for axis, length in enumerate(lengths):
        difference = padded.diff(dim=axis) / length
        for other in range(axes):
            if other != axis:
                n = difference.shape[other]
                difference = (difference.narrow(other, 0, n - 1) + difference.narrow(other, 1, n - 1)) / 2
        squares = squares + difference**2
    steep = squares > 0
    root = torch.where(steep, squares, 1.0).sqrt()  # the root has no derivative where nothing changes
    return torch.where(steep, root, 0.0).sum() * math.prod(lengths)


def sphericity(mask: Mask, *, spacing: Spacing = None) -> Tensor:
    r"""Return :math:`(36 \pi V^2)^{1/3} / A`, 1 for a ball; in the plane :math:`2 \sqrt{\pi A} / P`, 1 for a disc."""
    _lengths("sphericity", mask, spacing)
    whole, around = volume(mask, spacing=spacing), area(mask, spacing=spacing)
    if mask.ndim == 2:
        return 2 * (math.pi * whole).sqrt() / around
    return (36 * math.pi * whole**2) ** (1 / 3) / around


def variances(mask: Mask, *, spacing: Spacing = None) -> Tensor:
    """Return the variances in mm^2 along the principal axes, the largest first, with the mask as weight."""
    lengths = _lengths("variances", mask, spacing)
    total = mask.sum()
    grids = [
        torch.arange(n, dtype=mask.dtype, device=mask.device) * s
        for n, s in zip(mask.shape, lengths, strict=True)
    ]
    places = torch.meshgrid(*grids, indexing="ij")
    centred = [p - (p * mask).sum() / total for p in places]
    rows = [torch.stack([(a * b * mask).sum() / total for b in centred]) for a in centred]
    return torch.linalg.eigvalsh(torch.stack(rows)).flip(0).clamp(min=0)


def axes(mask: Mask, *, spacing: Spacing = None) -> Tensor:
    """Return the lengths of the principal axes in mm, four standard deviations each, the longest first."""
    return 4 * variances(mask, spacing=spacing).sqrt()


def elongation(mask: Mask, *, spacing: Spacing = None) -> Tensor:
    """Return the second over the first principal axis: 1 is round, 0 a line.

    >>> mask = torch.zeros(5, 9)
    >>> mask[2, 2:7] = 1
    >>> elongation(mask).item()
    0.0
    """
    found = variances(mask, spacing=spacing)
    return (found[1] / found[0]).sqrt()


def flatness(mask: Mask, *, spacing: Spacing = None) -> Tensor:
    """Return the third over the first principal axis of a volume: 1 is round, 0 flat."""
    if mask.ndim != 3:
        advice = "In the plane there is elongation"
        raise check.refused("radiomics.soft.flatness", "three axes", check.describe(mask), advice)
    found = variances(mask, spacing=spacing)
    return (found[2] / found[0]).sqrt()


def mean(image: Mask, mask: Mask) -> Tensor:
    """Return the mean intensity with the mask as weight."""
    return (image * mask).sum() / mask.sum()


def variance(image: Mask, mask: Mask) -> Tensor:
    """Return the variance of the intensities with the mask as weight."""
    return mean((image - mean(image, mask)) ** 2, mask)


def rms(image: Mask, mask: Mask) -> Tensor:
    """Return the root mean square of the intensities with the mask as weight."""
    return mean(image**2, mask).sqrt()


def memberships(image: Mask, centres: Float[Tensor, " bins"]) -> Tensor:
    """Share each intensity between the two bins whose centres it lies between: (bins, *S), adding up to 1.

    Beyond the outermost centres intensities belong to the outermost bin.

    >>> memberships(torch.tensor([0.25, 9.0]), torch.tensor([0.0, 1.0])).tolist()
    [[0.75, 0.0], [0.25, 1.0]]
    """
    step = centres[1] - centres[0]
    place = ((image - centres[0]) / step).clamp(0, len(centres) - 1)
    numbers = torch.arange(len(centres), dtype=image.dtype, device=image.device)
    return (1 - (place[None] - numbers.reshape(-1, *[1] * image.ndim)).abs()).clamp(min=0)


def _entropy(p: Tensor) -> Tensor:
    some = p > 0
    return -torch.where(some, p * torch.where(some, p, 1.0).log2(), 0.0).sum()


def histogram_entropy(image: Mask, mask: Mask, *, centres: Float[Tensor, " bins"]) -> Tensor:
    """Return the entropy in bits of a histogram with soft bins at evenly spaced centres."""
    counts = (memberships(image, centres) * mask).flatten(1).sum(1)
    return _entropy(counts / counts.sum())


def cooccurrence(image: Mask, mask: Mask, *, centres: Float[Tensor, " bins"]) -> Tensor:
    """Return how often two levels lie side by side in any direction, as shares (bins, bins) from soft bins.

    For intensities at centres of bins, and a mask of 0 and 1, it is the matrix of the aggregation ``3D_comb`` (in the
    plane ``2D_comb``).
    """
    shares = memberships(image, centres) * mask
    total = image.new_zeros(len(centres), len(centres))
    for offset in offsets(image.ndim):
        here = tuple(slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, image.shape, strict=True))
        there = tuple(slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, image.shape, strict=True))
        first, second = shares[(slice(None), *here)].flatten(1), shares[(slice(None), *there)].flatten(1)
        total = total + first @ second.T
    total = total + total.T
    return total / total.sum()


def contrast(image: Mask, mask: Mask, *, centres: Float[Tensor, " bins"]) -> Tensor:
    r"""Return the contrast of neighbouring levels, :math:`\sum (i - j)^2 p_{ij}`, from soft bins."""
    p = cooccurrence(image, mask, centres=centres)
    level = torch.arange(len(centres), dtype=p.dtype, device=p.device)
    return ((level[:, None] - level) ** 2 * p).sum()


def homogeneity(image: Mask, mask: Mask, *, centres: Float[Tensor, " bins"]) -> Tensor:
    r"""Return the inverse difference moment, :math:`\sum p_{ij} / (1 + (i - j)^2)`, from soft bins."""
    p = cooccurrence(image, mask, centres=centres)
    level = torch.arange(len(centres), dtype=p.dtype, device=p.device)
    return (p / (1 + (level[:, None] - level) ** 2)).sum()


def joint_entropy(image: Mask, mask: Mask, *, centres: Float[Tensor, " bins"]) -> Tensor:
    """Return the entropy in bits of pairs of neighbouring levels, from soft bins."""
    return _entropy(cooccurrence(image, mask, centres=centres))
