"""Curves: a number over the share of an image that was changed."""

from typing import NamedTuple

import torch
from torch import Tensor

from esegeta import random


class Curve(NamedTuple):
    """A number over the share of an image that was changed.

    fractions: of the elements, from 0 on, not falling; values: at these; area: under the line that joins them, over
    the range of fractions; largest_tie: the share of elements that have the most frequent value of the explanation.
    Among equal values there is no order, and the line is straight.
    """

    fractions: Tensor
    values: Tensor
    area: Tensor
    largest_tie: Tensor


def area_under(fractions: Tensor, values: Tensor) -> Tensor:
    """Return the area under a line, over the length of its range.

    >>> area_under(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 1.0, 0.0])).item()
    0.75
    """
    steps = fractions.diff()
    length = fractions[-1] - fractions[0]
    return (steps * (values[1:] + values[:-1]) / 2).sum() / torch.where(length > 0, length, torch.nan)


class Ranking(NamedTuple):
    """An order of parts.

    ranks: of each part, 0 for the first; sizes: of parts, in elements; nodes: how many parts are changed at each
    step; fractions: of the elements at each step; largest_tie: see ``Curve``.
    """

    ranks: Tensor
    sizes: Tensor
    nodes: Tensor
    fractions: Tensor
    largest_tie: Tensor


def ranking(values: Tensor, sizes: Tensor, steps: int | None, max_share: float = 1.0) -> Ranking:
    """Order parts by their values, the largest first, and choose where to stop on the way.

    Stops are evenly spaced in the share of elements, or after every part for ``steps=None``. Of a group of equal
    values that is longer than a step only the two ends are stops, and one that falls into a shorter group moves to
    its end: which part of a group came first never matters. Only where a group goes beyond ``max_share`` some of it
    is left out; which, is drawn at random.

    Args:
        values: of parts (d,), NaN for parts without elements.
        sizes: of parts (d,).
        steps: how many steps.
        max_share: the share of elements that the last step reaches.
    """
    count = len(values)
    empty = sizes <= 0
    falling = torch.where(empty, torch.inf, -values)
    shuffle = random.permutation(0, count, device=values.device)
    ordered, places = falling[shuffle].sort(stable=True)
    places = shuffle[places]
    ranks = places.argsort()
    total = sizes.sum()
    reached = torch.cat([sizes.new_zeros(1), sizes[places].cumsum(0)])
    if steps is None:  # beyond the last that has elements nothing changes
        stops = torch.minimum(torch.arange(count + 1, device=values.device), (~empty).sum())
    else:
        wanted = torch.arange(steps + 1, device=values.device, dtype=sizes.dtype) * (
            max_share * total / steps
        )
        # The least number of parts that holds the share, but for rounding of the share.
        stops = torch.searchsorted(reached, wanted - 1e-9 * total).clamp(0, count)
    # The group of equal values that the last of the changed parts belongs to: parts low ... high - 1.
    last = (stops - 1).clamp(min=0)
    value = ordered[last]
    low = torch.searchsorted(ordered, value, right=False)
    high = torch.minimum(torch.searchsorted(ordered, value, right=True), stops[-1])
    first = torch.cat([low.new_ones(1), (low[1:] != low[:-1]).to(low.dtype)]).bool()
    first = first | (stops.roll(1) == 0)  # nothing was changed before: its group is not begun
    more = torch.cat([(low[1:] == low[:-1]) & (stops[1:] > 0), low.new_zeros(1).bool()])
    alone = high - low == 1
    nodes = torch.where(alone, stops, torch.where(first & more, low, high))
    nodes = torch.where(stops == 0, 0, nodes)
    begin = torch.searchsorted(ordered, ordered, right=False)
    of_group = torch.zeros_like(sizes).index_add(0, begin, sizes[places])  # empty parts add nothing
    return Ranking(ranks, sizes, nodes, reached[nodes] / total, of_group.amax() / total)
