"""How alike two maps are."""

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from esegeta._registry import similarity
from esegeta.engine import check
from esegeta.metrics.subsets import correlation, spearman


def _pair(where: str, a: object, b: object) -> tuple[Tensor, Tensor]:
    a = check.floating(where, "a", a)
    b = check.floating(where, "b", b)
    if a.shape != b.shape or not 2 <= a.ndim <= 4:
        expected = "two maps (C,*S) of one shape"
        got = f"{check.describe(a)} and {check.describe(b)}"
        raise check.refused(where, expected, got, "Bring them to one grid first")
    return a.double(), b.double()


@similarity(family="ranks", paper="Spearman 1904", also=("spearman",))
def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's rank correlation of two maps with their signs; NaN where one is constant or has NaN.

    Example:
        >>> a = torch.tensor([[1.0, -2.0, 3.0]])
        >>> rank_correlation(a, -a).item()
        -1.0
    """
    a, b = _pair("metrics.rank_correlation", a, b)
    return spearman(a.flatten(), b.flatten())


@similarity(family="ranks", paper="Adebayo et al. 2018, arXiv:1810.03292")
def absolute_rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's rank correlation of the sizes of two maps; NaN where one is constant or has NaN.

    Example:
        >>> a = torch.tensor([[1.0, -2.0, 3.0]])
        >>> absolute_rank_correlation(a, -a).item()
        1.0
    """
    a, b = _pair("metrics.absolute_rank_correlation", a, b)
    return spearman(a.flatten().abs(), b.flatten().abs())


def _smoothed(f: Tensor, kernel: Tensor) -> Tensor:
    """Weighted means over a window, one axis after another; at the borders over what there is of it."""
    for axis in range(1, f.ndim):
        rows = f.movedim(axis, -1)
        flat = rows.reshape(-1, 1, rows.shape[-1])
        reach = len(kernel) // 2
        weight = conv1d(pad(torch.ones_like(flat[:1]), (reach, reach)), kernel[None, None])
        flat = conv1d(pad(flat, (reach, reach)), kernel[None, None]) / weight
        f = flat.reshape(rows.shape).movedim(-1, axis)
    return f


@similarity(family="structure", paper="Wang, Bovik, Sheikh, Simoncelli 2004, IEEE TIP 13")
def ssim(a: Tensor, b: Tensor) -> Tensor:
    r"""Return the mean structural similarity of two maps, in one to three dimensions.

    .. math:: \frac{(2 \mu_a \mu_b + C_1)(2 \sigma_{ab} + C_2)}
              {(\mu_a^2 + \mu_b^2 + C_1)(\sigma_a^2 + \sigma_b^2 + C_2)}

    in gaussian windows with a standard deviation of 1.5 voxels, cut at 5 voxels; at the borders windows are what
    there is of them. :math:`C_k = (0.01, 0.03)_k^2 L^2` with the range L of both maps together: none is scaled by
    itself, which would change the ranking of methods.

    Args:
        a: a map (C,\*S).
        b: a map of the same shape.

    Returns:
        A number, at most 1; 1 for equal maps.

    Example:
        >>> a = torch.linspace(0, 1, 20)[None]
        >>> ssim(a, a).item()
        1.0

    Reference:
        Wang, Bovik, Sheikh, Simoncelli 2004, Image quality assessment, IEEE TIP 13.
    """
    return similarity_map(*_pair("metrics.ssim", a, b)).mean()


def similarity_map(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity around every voxel, of which ``ssim`` is the mean.

    >>> similarity_map(torch.ones(1, 3), torch.ones(1, 3)).tolist()
    [[1.0, 1.0, 1.0]]
    """
    at = torch.arange(-5, 6, dtype=a.dtype, device=a.device)
    kernel = torch.exp(-(at**2) / (2 * 1.5**2))
    kernel = kernel / kernel.sum()
    together = torch.stack([a, b])
    span = together.amax() - together.amin()
    span = torch.where(span > 0, span, 1)
    one, two = (0.01 * span) ** 2, (0.03 * span) ** 2
    mean_a, mean_b = _smoothed(a, kernel), _smoothed(b, kernel)
    var_a = _smoothed(a * a, kernel) - mean_a**2
    var_b = _smoothed(b * b, kernel) - mean_b**2
    both = _smoothed(a * b, kernel) - mean_a * mean_b
    found = (2 * mean_a * mean_b + one) * (2 * both + two)
    return found / ((mean_a**2 + mean_b**2 + one) * (var_a + var_b + two))


@similarity(family="structure", paper="Adebayo et al. 2018, arXiv:1810.03292", example={"cell": 4})
def hog_correlation(a: Tensor, b: Tensor, *, cell: int = 8, bins: int = 9) -> Tensor:
    r"""Return Pearson's correlation of histograms of oriented gradients of two maps.

    For each cell of the grid, the gradient's length is added up by its direction: in the plane by its angle in half
    turns, in space by the axis or the diagonal (13 directions) that it is nearest to; for a signal up or down.
    Each cell's histogram is divided by its norm.

    Args:
        a: a map (C,\*S); channels are added up.
        b: a map of the same shape.
        cell: side of a cell in voxels.
        bins: of the angle, in the plane.

    Returns:
        A number in [-1, 1]; NaN where one map has no gradient, or values that are not finite.

    Example:
        >>> a = torch.rand(1, 16, 16)
        >>> round(hog_correlation(a, a).item(), 6)
        1.0

    Reference:
        Dalal, Triggs 2005; used by Adebayo et al. 2018, arXiv:1810.03292.
    """
    where = "metrics.hog_correlation"
    a, b = _pair(where, a, b)
    check.positive_count(where, "cell", cell)
    check.positive_count(where, "bins", bins)
    # The direction of what is not known would be dropped, and the rest compared as if it were all.
    known = (a.isfinite() & b.isfinite()).all()
    return torch.where(known, correlation(_hog(a.sum(0), cell, bins), _hog(b.sum(0), cell, bins)), torch.nan)


def _hog(f: Tensor, cell: int, bins: int) -> Tensor:
    grid = [
        torch.gradient(f, dim=axis)[0] if n > 1 else torch.zeros_like(f) for axis, n in enumerate(f.shape)
    ]
    slope = torch.stack(grid)
    length = slope.square().sum(0).sqrt()
    if f.ndim == 1:
        number, count = (slope[0] > 0).long(), 2
    elif f.ndim == 2:
        angle = torch.atan2(slope[0], slope[1]) / torch.pi % 1
        number, count = (angle * bins).long().clamp(max=bins - 1), bins
    else:
        axes = torch.cartesian_prod(*[torch.arange(-1.0, 2.0)] * f.ndim).reshape(-1, f.ndim).to(f)
        axes = axes[len(axes) // 2 + 1 :]  # one of each pair of opposites
        axes = axes / axes.norm(dim=1, keepdim=True)
        number, count = torch.tensordot(axes, slope, 1).abs().argmax(0), len(axes)
    votes = torch.where(torch.arange(count, device=f.device).reshape(-1, *[1] * f.ndim) == number, length, 0)
    for axis, n in enumerate(f.shape, 1):
        whole = -(-n // cell) * cell
        votes = pad(votes, [0, 0] * (votes.ndim - 1 - axis) + [0, whole - n])
        votes = votes.unflatten(axis, (-1, cell)).sum(axis + 1)
    votes = votes.flatten(1)
    norm = votes.square().sum(0).sqrt()
    return (votes / torch.where(norm > 0, norm, 1)).flatten()
