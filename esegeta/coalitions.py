r"""The score of an image of which some parts are hidden: what every perturbation method is made of.

.. math:: x_z = k(z)\, x + (1 - k(z))\, x', \qquad v(z) = F(x_z)

Values come as plain numbers, one for each coalition; the images are made a few at a time and are gone.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from esegeta._facts import unchecked
from esegeta._registry import fill as fill_in
from esegeta._types import Score
from esegeta.engine import check, levels, local, stream
from esegeta.features import Box, FeatureMap, Features

Fill = Callable[[Tensor, Tensor, Tensor], Tensor]

MOST_RUNS = 1_000_000


@fill_in(family="of the baseline", leads=3)
def mixed(x: Tensor, baseline: Tensor, keep: Tensor) -> Tensor:
    """Return what is kept of x, and the baseline for the rest: exactly x where all is kept.

    >>> mixed(torch.tensor([1., 2.]), torch.tensor([5., 6.]), torch.tensor([1., 0.])).tolist()
    [1.0, 6.0]
    """
    keep = keep.to(x.dtype)
    return keep * x + (1 - keep) * baseline


def shown(
    score: Score,
    x: Tensor,
    baseline: Tensor,
    keep: Callable[[Any], Tensor],
    nodes: Any,
    *,
    label: str,
    fill: Fill = mixed,
) -> Tensor:
    """Return ``F`` of the image of every node: ``keep(node)`` says how much of x it shows, the rest is filled.

    At a deadline those that are done come back.
    """
    score = unchecked(score)  # a value that is not finite is named by its number below
    return stream.collect(
        lambda node: check.scalar(label, score(fill(x, baseline, keep(node)))), nodes, label=label
    )


def values(
    score: Score, x: Tensor, baseline: Tensor, features: FeatureMap, rows: Tensor, *, label: str
) -> Tensor:
    """Return ``v(z)`` for every row z of ``rows``, (n, d) in [0, 1].

    >>> from esegeta.features import elements
    >>> x = torch.tensor([[1., 2.]])
    >>> rows = torch.tensor([[0., 0.], [1., 0.], [1., 1.]])
    >>> values(lambda t: t.sum(), x, 0 * x, elements()(x), rows, label="demo").tolist()
    [0.0, 1.0, 3.0]
    """
    return shown(score, x, baseline, features.keep, rows, label=label)


def compared(values: Tensor, rows: Tensor, asked: int) -> Tensor:
    """Return the values of parts that a fit to coalitions found, (d,); NaN where a deadline left no comparison.

    Args:
        values: of the parts.
        rows: the coalitions that were run, (n, d) in {0, 1}.
        asked: how many should have been: if n is less, a part that was the same in all of them says nothing.

    >>> compared(torch.tensor([2., 0.]), torch.tensor([[1., 1.], [0., 1.]]), 9).tolist()
    [2.0, nan]
    """
    if len(rows) == asked:
        return values
    return torch.where(rows.amin(0) == rows.amax(0), torch.nan, values)


def drops(
    score: Score, x: Tensor, baseline: Tensor, features: FeatureMap, *, label: str, fill: Fill = mixed
) -> Tensor:
    """Return what the score loses without each part, (d,); NaN for parts that a deadline cut off.

    >>> from esegeta.features import elements
    >>> x = torch.tensor([[1., 2.]])
    >>> drops(lambda t: t.sum(), x, 0 * x, elements()(x), label="demo").tolist()
    [1.0, 2.0]
    """
    score = unchecked(score)
    if not levels.depth() and not levels.watched(baseline):

        def patch(j: int, box: Box) -> Tensor:
            number = torch.tensor(j, device=x.device)
            if fill is mixed:
                return mixed(x[box], baseline[box], features.without(number, box))
            return fill(x, baseline, features.without(number))[box]  # may look beyond the part

        boxes = [_whole(features.box(j), x) for j in range(features.count)]
        found = local.changed(score, x, boxes, patch, label=label)
        if found is not None:
            return (found.clean - found.values).to(x.dtype)
    numbers = torch.arange(features.count, device=x.device)
    clean = check.scalar(label, score(x))
    changed = lambda j: check.scalar(label, score(fill(x, baseline, features.without(j))))
    return (clean - stream.answers(changed, numbers, label=label)).to(x.dtype)


def _whole(box: Box, x: Tensor) -> Box:
    """A box on a grid that broadcasts against x, as a box of x."""
    return tuple(
        slice(0, n) if part.stop == 1 and n > 1 else part for part, n in zip(box, x.shape, strict=True)
    )


def walk(
    score: Score, x: Tensor, baseline: Tensor, features: FeatureMap, order: Tensor, *, label: str
) -> Tensor:
    """Return ``F`` along the way from nothing to all, (d + 1,): parts become present in the order given, (d,).

    At a deadline, those that are done.

    >>> from esegeta.features import elements
    >>> x = torch.tensor([[1., 2.]])
    >>> walk(lambda t: t.sum(), x, 0 * x, elements()(x), torch.tensor([1, 0]), label="demo").tolist()
    [0.0, 2.0, 3.0]
    """
    return walks(score, x, baseline, features, order[None], label=label)[0]


def walks(
    score: Score, x: Tensor, baseline: Tensor, features: FeatureMap, orders: Tensor, *, label: str
) -> Tensor:
    """Return ``F`` along several walks, (m, d + 1) for orders (m, d); each step changes what the last one left.

    At a deadline, the steps that are done in all of them.

    >>> from esegeta.features import elements
    >>> x = torch.tensor([[1., 2.]])
    >>> walks(lambda t: t.sum(), x, 0 * x, elements()(x), torch.tensor([[1, 0], [0, 1]]), label="demo").tolist()
    [[0.0, 2.0, 3.0], [0.0, 1.0, 3.0]]
    """
    return walker(score, x, baseline, features, label=label)(orders)


def walker(
    score: Score, x: Tensor, baseline: Tensor, features: FeatureMap, *, label: str
) -> Callable[[Tensor], Tensor]:
    """Return ``walks`` as a function of the orders, which finds out once how to evaluate them."""
    score = unchecked(score)
    step_by_step = not levels.depth() and not (levels.watched(x) or levels.watched(baseline))
    if step_by_step:
        start = mixed(x, baseline, features.keep(torch.zeros(features.count, dtype=x.dtype, device=x.device)))
        boxes = [_whole(features.box(j), x) for j in range(features.count)]

    def along(orders: Tensor) -> Tensor:
        nonlocal step_by_step
        ranks = torch.argsort(orders, dim=1)
        if step_by_step:

            def patch(walk: int, step: int, box: Box) -> Tensor:
                return mixed(x[box], baseline[box], features.keep((ranks[walk] < step).to(x.dtype), box))

            found = local.walked(score, start, boxes, patch, orders.tolist(), label=label)
            if found is not None:
                return found.to(x.dtype)
            step_by_step = False
        count = len(orders)
        nodes = torch.arange(count * (features.count + 1), device=x.device)

        def keep(node: Tensor) -> Tensor:
            rank = ranks.index_select(0, (node % count).reshape(1))[0]
            return features.keep((rank < node // count).to(x.dtype))

        values = shown(score, x, baseline, keep, nodes, label=label)
        return rearrange(values[: len(values) // count * count], "(step walk) -> walk step", walk=count)

    return along


def parts(label: str, features: Features, x: Tensor, runs: Callable[[int], int]) -> FeatureMap:
    """Return the parts of x, refused if the score would have to be run more often than is reasonable.

    Args:
        label: the method.
        features: which parts.
        x: the image.
        runs: how many runs d parts take.
    """
    check.features(label, features)
    found = features(x)
    needed = runs(found.count)
    if needed > MOST_RUNS:
        raise check.refused(
            label,
            f"at most {MOST_RUNS:,} runs of the score",
            f"{found.count:,} features, which take {needed:,}",
            "Use coarser ones, for example esegeta.features.grid(8) or features.supervoxels(100)",
        )
    return found
