"""Deletion, insertion and their kin: what the score becomes as parts of the image go, in the order of a map."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esegeta import coalitions
from esegeta._registry import Cost, metric
from esegeta._types import Explain, Score
from esegeta.coalitions import Fill, mixed
from esegeta.engine import check, levels
from esegeta.engine.sharing import active, shared
from esegeta.features import Features, Partition, voxels
from esegeta.metrics.curves import Curve, Ranking, area_under, ranking
from esegeta.metrics.explanations import attribution, callable_, mask_of, start

Measure = Callable[..., Any]


def parts_of(where: str, features: Features | None, x: Tensor, within: Tensor | None) -> Partition:
    """Return the parts that are changed, without overlap; outside of ``within`` nothing is."""
    return shared("parts", (features, x, within), lambda: _cut(where, features, x, within))


def _cut(where: str, features: Features | None, x: Tensor, within: Tensor | None) -> Partition:
    found = (voxels() if features is None else features)(x)
    if not isinstance(found, Partition):
        advice = "Use features.grid, labels, supervoxels, channels, voxels or elements"
        raise check.refused(where, "parts that do not overlap", type(found).__name__, advice)
    if within is None:
        return found
    within = mask_of(where, within, x, "within")
    return Partition(torch.where(within[None], found.labels, -1), found.count)


def means(a: Tensor, parts: Partition, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of a map over each part, NaN where it is empty, and the number of elements of each.

    The mean is kept between the extremes of its part: else rounding would part what has equal values.
    """
    labels = parts.labels.expand_as(x)
    inside = (labels >= 0).flatten()
    index = labels.clamp(min=0).flatten()
    empty = a.new_zeros(parts.count)
    # A map of one channel counts once for a voxel, however many channels the image has.
    shared = a if a.shape == x.shape or len(a) == len(x) else (a / len(x)).expand_as(x)
    sizes = empty.index_add(0, index, inside.to(a.dtype))
    flat = shared.flatten()
    sums = empty.index_add(0, index, torch.where(inside, flat, 0.0))
    low = torch.full_like(empty, torch.inf).scatter_reduce(
        0, index, torch.where(inside, flat, torch.inf), "amin"
    )
    high = torch.full_like(empty, -torch.inf).scatter_reduce(
        0, index, torch.where(inside, flat, -torch.inf), "amax"
    )
    mean = torch.minimum(torch.maximum(sums / sizes, low), high)
    return torch.where(sizes > 0, mean, torch.nan), sizes


def along(
    where: str,
    score: Score,
    x: Tensor,
    baseline: Tensor,
    parts: Partition,
    order: Ranking,
    *,
    fill: Fill | None,
    keep_first: bool,
) -> Tensor:
    """Return the score at every stop: the first parts of the order are the only ones kept, or those that are gone."""
    stops = order.nodes
    if fill is None and not levels.depth():
        # One part at a time: what a part does not reach is not computed again. Empty parts come last.
        real = (order.sizes > 0).nonzero().flatten()
        count = len(real)
        if count and torch.equal(stops.unique(), torch.arange(count + 1, device=stops.device)):
            numbers = torch.full_like(order.ranks, -1)
            numbers[real] = torch.arange(count, device=real.device)
            renumbered = torch.where(parts.labels < 0, -1, numbers[parts.labels.clamp(min=0)])
            turned = order.ranks[real] if keep_first else count - 1 - order.ranks[real]
            found = coalitions.walk(
                score, x, baseline, Partition(renumbered, count), turned.argsort(), label=where
            ).double()
            found = torch.cat([found, found.new_full((count + 1 - len(found),), torch.nan)])
            return (found if keep_first else found.flip(0))[stops]

    def keep(stop: Tensor) -> Tensor:
        gone = order.ranks < stop
        return parts.keep((gone if keep_first else ~gone).to(x.dtype))

    def at(some: Tensor) -> Tensor:
        found = coalitions.shown(score, x, baseline, keep, some, label=where, fill=fill or mixed)
        return torch.cat([found, found.new_full((len(some) - len(found),), torch.nan)]).double()

    if levels.depth():
        return at(stops)
    stops, again = stops.unique(return_inverse=True)  # the ends of a large group are evaluated once
    if not active():
        return at(stops)[again]
    # With all of its parts and with none of them, the image is the same for every map.
    values = torch.full(stops.shape, torch.nan, dtype=torch.float64, device=stops.device)
    first, last = stops == 0, stops >= (order.sizes > 0).sum()
    for end, kept in ((first, not keep_first), (last & ~first, keep_first)):
        if end.any():
            at_end = functools.partial(at, stops[end][:1])
            values[end] = shared("end", (score, x, baseline, parts, fill, kept), at_end)
    middle = ~(first | last)
    if middle.any():
        values[middle] = at(stops[middle])
    return values[again]


def curve(
    where: str,
    explain: Explain,
    score: Score,
    *,
    features: Features | None,
    fill: Fill | None,
    steps: int | None,
    keep_first: bool,
    sign: float = 1.0,
    max_share: float = 1.0,
) -> Measure:
    """Make the measure of a curve: parts in the order of sign times the map."""
    callable_(where, explain)
    if steps is not None:
        check.positive_count(where, "steps", steps)

    def measure(x: Tensor, *refs: Tensor, key: Any = None, within: Tensor | None = None) -> Curve:
        a = attribution(where, explain, x, refs, key)
        parts = parts_of(where, features, x, within)
        values, sizes = means(sign * a, parts, x)
        order = ranking(values, sizes, steps, max_share)
        found = along(where, score, x, start(x, refs), parts, order, fill=fill, keep_first=keep_first)
        return Curve(order.fractions, found, area_under(order.fractions, found), order.largest_tie)

    return measure


@metric(
    family="faithfulness",
    better="lower",
    answer="curve",
    needs=("score",),
    paper="Petsiuk et al. 2018, arXiv:1806.07421",
    example={"steps": 4},
    also=("pixel_flipping",),
    cost=lambda steps: Cost(forwards=None if steps is None else steps + 1),
    ranks=True,
)
def deletion(
    explain: Explain,
    score: Score,
    *,
    features: Features | None = None,
    fill: Fill | None = None,
    steps: int | None = 64,
) -> Measure:
    r"""Return the score as parts go, the most relevant first: a faithful map lets it fall early.

    .. math:: t \mapsto F(x \text{ without the first } t \text{ of its elements})

    Evenly spaced stops; ``steps=None`` stops after every part, and then computes only what each part reaches where
    the network is local. Equal values of a map have no order: the curve joins the ends of their group by a straight
    line, which is the mean over all orders where the score is additive. The area is that under the line.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``. It is taken with its sign.
        score: ``(C,*S) -> ()``.
        features: which parts go together, by ``esegeta.features``; their value is the mean of the map. Voxels by
            default.
        fill: what takes their place, from (x, baseline, kept): by default the baseline, which is the last of the
            refs, or zero.
        steps: how many.

    Returns:
        ``(x, *refs, key=, within=) -> Curve``; ``within`` is a mask (\*S) that the order and the fractions are
        restricted to.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (x * torch.tensor([3.0, 2.0, 1.0])).sum()
        >>> deletion(eg.input_x_gradient(score), score, steps=3)(torch.ones(1, 3)).values.tolist()
        [6.0, 3.0, 1.0, 0.0]

    Reference:
        Petsiuk, Das, Saenko 2018, RISE, section 3.4, arXiv:1806.07421.
    """
    return curve(
        "metrics.deletion", explain, score, features=features, fill=fill, steps=steps, keep_first=False
    )


@metric(
    family="faithfulness",
    better="higher",
    answer="curve",
    needs=("score",),
    paper="Petsiuk et al. 2018, arXiv:1806.07421",
    example={"steps": 4},
    cost=lambda steps: Cost(forwards=None if steps is None else steps + 1),
    ranks=True,
)
def insertion(
    explain: Explain,
    score: Score,
    *,
    features: Features | None = None,
    fill: Fill | None = None,
    steps: int | None = 64,
) -> Measure:
    r"""Return the score as parts come, the most relevant first: a faithful map lets it rise early.

    .. math:: t \mapsto F(\text{only the first } t \text{ of the elements of } x)

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        score: ``(C,*S) -> ()``.
        features: as in ``deletion``.
        fill: as in ``deletion``.
        steps: as in ``deletion``.

    Returns:
        ``(x, *refs, key=, within=) -> Curve``.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (x * torch.tensor([3.0, 2.0, 1.0])).sum()
        >>> insertion(eg.input_x_gradient(score), score, steps=3)(torch.ones(1, 3)).values.tolist()
        [0.0, 3.0, 5.0, 6.0]

    Reference:
        Petsiuk, Das, Saenko 2018, RISE, section 3.4, arXiv:1806.07421.
    """
    return curve(
        "metrics.insertion", explain, score, features=features, fill=fill, steps=steps, keep_first=True
    )
