"""Where a map lies against a reference mask. In double precision, with their sign: for sizes explain ``eg.absolute``.

Maps are summed over channels. Voxels of equal value have no order, and every number is the mean over all orders.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esegeta._registry import Cost, metric
from esegeta._types import Explain
from esegeta.engine import check
from esegeta.metrics.explanations import attribution, callable_, mask_of, voxelwise
from esegeta.metrics.removal import Measure

Number = Callable[[Tensor, Tensor, Tensor], Tensor]


def _located(where: str, explain: Explain, number: Number) -> Measure:
    """Make the measure of a number of the map, the mask and what counts, as lists of voxels.

    NaN for a mask that is empty or full: where a map lies is no question then.
    """
    callable_(where, explain)

    def measure(x: Tensor, *refs: Tensor, mask: Any = None, key: Any = None, within: Any = None) -> Tensor:
        inside = mask_of(where, mask, x)
        a = voxelwise(attribution(where, explain, x, refs, key))
        counts = torch.ones_like(inside) if within is None else mask_of(where, within, x, "within")
        found = number(a.flatten(), (inside & counts).flatten(), counts.flatten())
        return torch.where((inside & counts).any() & (counts & ~inside).any(), found, torch.nan)

    return measure


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, NaN where there is nothing to divide by."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), torch.nan)


def _groups(a: Tensor, inside: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hits and misses down to each voxel of a falling order, at ends of groups of equal values; the order."""
    falling = torch.where(counts, -a, torch.inf).sort(stable=True)
    hits = inside[falling.indices].to(a.dtype).cumsum(0)
    shown = counts[falling.indices].to(a.dtype).cumsum(0)
    last = torch.searchsorted(falling.values, falling.values, right=True) - 1
    return hits[last], shown[last], last


@metric(
    family="localisation",
    better="higher",
    needs=("mask",),
    paper="Hanley, McNeil 1982, Radiology 143",
    also=("auc",),
    cost=lambda: Cost(),
)
def roc_auc(explain: Explain) -> Measure:
    r"""Return the chance that a voxel of the mask has a larger value than one outside: the area under the ROC curve.

    .. math:: P(a_u > a_v) + \tfrac12 P(a_u = a_v), \qquad u \in M,\ v \notin M

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.

    Returns:
        ``(x, *refs, mask=, key=, within=) -> ()`` in [0, 1]; NaN for an empty or a full mask.

    Example:
        >>> from esegeta.metrics import given
        >>> mask = torch.tensor([True, False, False, True])
        >>> roc_auc(given(torch.tensor([[4.0, 1.0, 2.0, 2.0]])))(torch.zeros(1, 4), mask=mask).item()
        0.875

    Reference:
        Hanley, McNeil 1982, Radiology 143.
    """

    def number(a: Tensor, inside: Tensor, counts: Tensor) -> Tensor:
        rising = torch.where(counts & ~inside, a, torch.inf).sort().values
        below = torch.searchsorted(rising, a, right=False)
        reached = torch.searchsorted(rising, a, right=True)
        outside = (counts & ~inside).sum()
        wins = (below.to(a.dtype) + reached.clamp(max=outside).to(a.dtype)) / 2
        return _over((wins * inside).sum(), (inside.sum() * outside).to(a.dtype))

    return _located("metrics.roc_auc", explain, number)


@metric(
    family="localisation",
    better="higher",
    needs=("mask",),
    paper="definition",
    cost=lambda: Cost(),
)
def max_dice(explain: Explain) -> Measure:
    r"""Return the best Dice coefficient of the mask with what a map has above a threshold.

    .. math:: \max_t \frac{2 |\{a \ge t\} \cap M|}{|\{a \ge t\}| + |M|}

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.

    Returns:
        ``(x, *refs, mask=, key=, within=) -> ()`` in [0, 1]; NaN for an empty or a full mask.

    Example:
        >>> from esegeta.metrics import given
        >>> mask = torch.tensor([True, True, False, False])
        >>> max_dice(given(torch.tensor([[4.0, 1.0, 2.0, 0.0]])))(torch.zeros(1, 4), mask=mask).item()
        0.8
    """

    def number(a: Tensor, inside: Tensor, counts: Tensor) -> Tensor:
        hits, shown, _ = _groups(a, inside, counts)
        size = inside.sum().to(a.dtype)
        return (2 * hits / (shown + size)).amax()

    return _located("metrics.max_dice", explain, number)


def _top(explain: Explain, where: str, k: int | None) -> Measure:
    def number(a: Tensor, inside: Tensor, counts: Tensor) -> Tensor:
        size = inside.sum().to(a.dtype)
        many = size if k is None else torch.minimum(counts.sum().to(a.dtype), a.new_tensor(float(k)))
        falling = torch.where(counts, -a, torch.inf).sort(stable=True).values
        # The value of the last voxel that is taken: all above it are, and a share of those that are equal to it.
        edge = falling[(many.long() - 1).clamp(min=0)]
        above, level = counts & (-a < edge), counts & (-a == edge)
        share = _over(many - above.sum(), level.sum().to(a.dtype))
        found = (above & inside).sum() + share * (level & inside).sum()
        return found / many

    return _located(where, explain, number)


@metric(
    family="localisation",
    better="higher",
    needs=("mask",),
    paper="Arras, Osman, Samek 2022, CLEVR-XAI, Information Fusion 81",
    also=("relevance_rank_accuracy",),
    cost=lambda: Cost(),
)
def relevance_rank(explain: Explain) -> Measure:
    r"""Return which share of the most relevant voxels lies in the mask, as many as the mask has voxels.

    .. math:: |\mathrm{top}_{|M|}(a) \cap M| / |M|

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.

    Returns:
        ``(x, *refs, mask=, key=, within=) -> ()`` in [0, 1]; NaN for an empty or a full mask.

    Example:
        >>> from esegeta.metrics import given
        >>> mask = torch.tensor([True, True, False, False])
        >>> relevance_rank(given(torch.tensor([[4.0, 1.0, 1.0, 0.0]])))(torch.zeros(1, 4), mask=mask).item()
        0.75

    Reference:
        Arras, Osman, Samek 2022, CLEVR-XAI, Information Fusion 81.
    """
    return _top(explain, "metrics.relevance_rank", None)


@metric(
    family="localisation",
    better="higher",
    needs=("mask",),
    paper="Theiner, Mueller-Budack, Ewerth 2022, arXiv:2104.14995",
    also=("topk_intersection",),
    example={"k": 3},
    cost=lambda: Cost(),
)
def top_k_intersection(explain: Explain, *, k: int = 100) -> Measure:
    """Return which share of the k most relevant voxels lies in the mask.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        k: how many voxels.

    Returns:
        ``(x, *refs, mask=, key=, within=) -> ()`` in [0, 1]; NaN for an empty or a full mask.

    Example:
        >>> from esegeta.metrics import given
        >>> mask = torch.tensor([True, False, True])
        >>> top_k_intersection(given(torch.tensor([[4.0, 3.0, 1.0]])), k=2)(torch.zeros(1, 3), mask=mask).item()
        0.5

    Reference:
        Theiner, Mueller-Budack, Ewerth 2022, Interpretable semantic photo geolocation.
    """
    return _top(
        explain, "metrics.top_k_intersection", check.positive_count("metrics.top_k_intersection", "k", k)
    )


@metric(
    family="localisation",
    better="higher",
    needs=("mask",),
    paper="Arras, Osman, Samek 2022, CLEVR-XAI, Information Fusion 81",
    also=("relevance_mass_accuracy",),
    cost=lambda: Cost(),
)
def relevance_mass(explain: Explain) -> Measure:
    r"""Return which share of the positive part of a map lies in the mask.

    .. math:: \sum_{v \in M} a_v^+ / \sum_v a_v^+

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.

    Returns:
        ``(x, *refs, mask=, key=, within=) -> ()`` in [0, 1]; NaN where nothing is positive, or
        for an empty or a full mask.

    Example:
        >>> from esegeta.metrics import given
        >>> mask = torch.tensor([True, False, False])
        >>> relevance_mass(given(torch.tensor([[3.0, 1.0, -5.0]])))(torch.zeros(1, 3), mask=mask).item()
        0.75

    Reference:
        Arras, Osman, Samek 2022, CLEVR-XAI, Information Fusion 81.
    """

    def number(a: Tensor, inside: Tensor, counts: Tensor) -> Tensor:
        positive = a.clamp(min=0)
        return _over((positive * inside).sum(), (positive * counts).sum())

    return _located("metrics.relevance_mass", explain, number)


@metric(
    family="localisation",
    better="",
    needs=("mask",),
    paper="definition",
    cost=lambda: Cost(),
)
def context_share(explain: Explain) -> Measure:
    """Return which share of the size of a map lies outside of the object that is explained.

    In segmentation the object overlaps the mask of its own score by construction: that it lies there says little, and
    what lies elsewhere tells that the network looks around.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.

    Returns:
        ``(x, *refs, mask=, key=, within=) -> ()`` in [0, 1], with the object as mask; NaN for a map
        of zeros, or for an empty or a full mask.

    Example:
        >>> from esegeta.metrics import given
        >>> mask = torch.tensor([True, False, False])
        >>> context_share(given(torch.tensor([[3.0, 1.0, -4.0]])))(torch.zeros(1, 3), mask=mask).item()
        0.625
    """

    def number(a: Tensor, inside: Tensor, counts: Tensor) -> Tensor:
        size = a.abs()
        return _over((size * (counts & ~inside)).sum(), (size * counts).sum())

    return _located("metrics.context_share", explain, number)


def squared_distances(mask: Tensor, spacing: Any = None) -> Tensor:
    """Return the squared distance of every voxel to the nearest one of a mask, in mm^2 with ``spacing``.

    >>> squared_distances(torch.tensor([False, True, False, False])).tolist()
    [1.0, 0.0, 1.0, 4.0]
    """
    lengths = check.spacing("metrics.squared_distances", spacing, mask.ndim).tolist()
    found = torch.where(mask, 0.0, torch.inf).to(torch.float64)
    for axis, (n, step) in enumerate(zip(mask.shape, lengths, strict=True)):
        # The least over one axis after another; a loop over its voxels needs no memory beyond two volumes.
        places = torch.arange(n, dtype=torch.float64, device=mask.device) * step
        best = torch.full_like(found, torch.inf)
        for j in range(n):
            apart = ((places - places[j]) ** 2).reshape([-1 if a == axis else 1 for a in range(mask.ndim)])
            best = torch.minimum(best, found.narrow(axis, j, 1) + apart)
        found = best
    return found


@metric(
    family="localisation",
    better="higher",
    needs=("mask",),
    paper="Zhang et al. 2016, arXiv:1608.00507",
    cost=lambda: Cost(),
)
def pointing_game(explain: Explain, *, tolerance: float = 0.0, spacing: Any = None) -> Measure:
    """Return whether the largest value of a map lies in the mask, or no further from it than a tolerance.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        tolerance: in mm if spacing is given, else in voxels. The paper allows 15 pixels.
        spacing: mm per voxel, one per spatial axis.

    Returns:
        ``(x, *refs, mask=, key=, within=) -> ()``: 1 for a hit, 0 for a miss, of several largest values the share
        that hits; NaN for an empty or a full mask.

    Example:
        >>> from esegeta.metrics import given
        >>> a, mask = torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([False, False, True])
        >>> [pointing_game(given(a), tolerance=t)(torch.zeros(1, 3), mask=mask).item() for t in (0, 1)]
        [0.0, 1.0]

    Reference:
        Zhang, Lin, Brandt, Shen, Sclaroff 2016, Top-down neural attention, arXiv:1608.00507.
    """
    where = "metrics.pointing_game"
    allowed = check.non_negative(where, "tolerance", tolerance)

    callable_(where, explain)

    def measure(x: Tensor, *refs: Tensor, mask: Any = None, key: Any = None, within: Any = None) -> Tensor:
        inside = mask_of(where, mask, x)
        near = (squared_distances(inside, spacing) <= allowed**2 * (1 + 1e-9)) if allowed else inside

        def number(a: Tensor, _: Tensor, counts: Tensor) -> Tensor:
            top = counts & (a == torch.where(counts, a, -torch.inf).amax())
            return _over((top & near.flatten()).sum().to(a.dtype), top.sum().to(a.dtype))

        return _located(where, explain, number)(x, *refs, mask=mask, key=key, within=within)

    return measure


def otsu_threshold(a: Tensor, counts: Tensor) -> Tensor:
    """Return the threshold that parts values into two groups with the least variance within (Otsu).

    >>> otsu_threshold(torch.tensor([0.0, 1.0, 10.0, 11.0]), torch.ones(4, dtype=torch.bool)).item()
    1.0
    """
    rising = torch.where(counts, a, torch.inf).sort().values
    real = torch.isfinite(rising)
    values = torch.where(real, rising, 0.0)
    number = real.to(a.dtype).cumsum(0)
    total, whole = real.sum(), values.sum()
    sums = values.cumsum(0)
    rest = total - number
    means = sums / number.clamp(min=1), (whole - sums) / rest.clamp(min=1)
    between = torch.where(real & (rest > 0), number * rest * (means[0] - means[1]) ** 2, -1.0)
    return rising[between.argmax()]


@metric(
    family="localisation",
    better="higher",
    needs=("mask",),
    paper="definition",
    cost=lambda: Cost(),
)
def iou(explain: Explain) -> Measure:
    """Return the overlap of the mask with what a map has above Otsu's threshold, over their union.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.

    Returns:
        ``(x, *refs, mask=, key=, within=) -> ()`` in [0, 1]; NaN for a constant map, and for an
        empty or a full mask.

    Example:
        >>> from esegeta.metrics import given
        >>> a, mask = torch.tensor([[0.0, 1.0, 9.0, 8.0]]), torch.tensor([False, False, True, False])
        >>> iou(given(a))(torch.zeros(1, 4), mask=mask).item()
        0.5
    """
    return _overlap(
        explain, "metrics.iou", lambda _, shown, inside: ((shown & inside).sum(), (shown | inside).sum())
    )


@metric(
    family="localisation",
    better="higher",
    needs=("mask",),
    paper="Gotkowski et al. 2020, arXiv:2007.00453",
    cost=lambda: Cost(),
)
def ioa(explain: Explain) -> Measure:
    """Return which share of what a map has above Otsu's threshold lies in the mask.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.

    Returns:
        ``(x, *refs, mask=, key=, within=) -> ()`` in [0, 1]; NaN for a constant map, and for an
        empty or a full mask.

    Example:
        >>> from esegeta.metrics import given
        >>> a, mask = torch.tensor([[0.0, 1.0, 9.0, 8.0]]), torch.tensor([True, False, True, False])
        >>> ioa(given(a))(torch.zeros(1, 4), mask=mask).item()
        0.5
    """
    return _overlap(explain, "metrics.ioa", lambda _, shown, inside: ((shown & inside).sum(), shown.sum()))


@metric(
    family="localisation",
    better="higher",
    needs=("mask",),
    paper="Gotkowski et al. 2020, arXiv:2007.00453",
    cost=lambda: Cost(),
)
def weighted_ioa(explain: Explain) -> Measure:
    r"""Return which share of the sum of a map above Otsu's threshold lies in the mask.

    .. math:: \sum_{v \in M,\, a_v > t} (a_v - \min a) / \sum_{a_v > t} (a_v - \min a)

    Values count from the least of the map on, so that the number does not depend on where its zero is.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.

    Returns:
        ``(x, *refs, mask=, key=, within=) -> ()`` in [0, 1]; NaN for a constant map, and for an
        empty or a full mask.

    Example:
        >>> from esegeta.metrics import given
        >>> a, mask = torch.tensor([[0.0, 1.0, 9.0, 6.0]]), torch.tensor([True, False, True, False])
        >>> weighted_ioa(given(a))(torch.zeros(1, 4), mask=mask).item()
        0.6
    """

    def shares(a: Tensor, shown: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        weight = (a - a.amin()) * shown
        return (weight * inside).sum(), weight.sum()

    return _overlap(explain, "metrics.weighted_ioa", shares)


def _overlap(explain: Explain, where: str, shares: Any) -> Measure:
    def number(a: Tensor, inside: Tensor, counts: Tensor) -> Tensor:
        shown = counts & (a > otsu_threshold(a, counts))
        some, whole = shares(a, shown, inside)
        found = _over(some.to(a.dtype), whole.to(a.dtype))
        return torch.where(shown.any(), found, torch.nan)  # of a constant map nothing is above

    return _located(where, explain, number)
