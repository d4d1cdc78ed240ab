"""Trees of parts, for methods that take groups of parts as one."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from esegeta.engine import check
from esegeta.features import FeatureMap

Tree = Sequence[Any]

AT_ONCE = 16  # groups that are split before the values of their halves are looked at


def of_labels(*maps: Tensor) -> tuple[Any, ...]:
    """Return the tree of nested label maps, from the coarsest to the one whose labels are the parts.

    Args:
        maps: whole numbers on one grid. A region of one lies in one region of the map before it; what is negative
            in the last one belongs to no part.

    Returns:
        ``(maps) -> tree``: nested tuples of the labels of the last map, for ``partition_shap(tree=)``.

    Example:
        >>> lobes, regions = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 2, 2, 1, 3])
        >>> of_labels(lobes, regions)
        ((0, 2), (1, 3))
    """
    where = "hierarchy.of_labels"
    for one in maps:
        if check.tensor(where, "each map", one).is_floating_point() or one.shape != maps[0].shape:
            expected = f"maps of whole numbers, all of shape {tuple(maps[0].shape)}"
            raise check.refused(where, expected, check.describe(one), "Resample them onto one grid")
    columns = torch.stack([one.flatten() for one in maps])
    rows = torch.unique(columns[:, columns[-1] >= 0], dim=1).T.tolist()
    last = sorted(row[-1] for row in rows)
    twice = [a for a, b in pairwise(last) if a == b]
    if twice:
        got = f"region {twice[0]}, which lies in several"
        raise check.refused(where, "regions within one region of each map before", got, "Split it")
    return _grouped(rows)


def _grouped(rows: list[list[int]]) -> tuple[Any, ...]:
    if len(rows[0]) == 1:
        return tuple(row[0] for row in rows)
    groups = (list(group) for _, group in groupby(rows, key=lambda row: row[0]))
    return tuple(_grouped([row[1:] for row in group]) for group in groups)


def binary(tree: Tree) -> tuple[list[Any], list[list[int]], list[int]]:
    """Return a tree with every group of more than two halved.

    Its leaves in order; for each group, the root first, the places [start, end) of its leaves and the numbers of
    its two halves, its own number for a leaf; how many splits each level takes if a group is split before and
    after each group beside it or above.

    >>> binary((5, (6, 7)))
    ([5, 6, 7], [[0, 3, 1, 2], [0, 1, 1, 1], [1, 3, 3, 4], [1, 2, 3, 3], [2, 3, 4, 4]], [1, 2])
    """
    leaves: list[Any] = []
    groups: list[list[int]] = []
    levels: list[int] = []

    def grow(part: Any, depth: int) -> int:
        while isinstance(part, (list, tuple, range)) and len(part) == 1:
            part = part[0]
        number, start = len(groups), len(leaves)
        groups.append([])
        halves = [number, number]
        if isinstance(part, (list, tuple, range)) and part:
            levels.extend([0] * (depth + 1 - len(levels)))
            levels[depth] += 2**depth
            middle = len(part) // 2
            halves = [grow(half, depth + 1) for half in (part[:middle], part[middle:])]
        else:
            leaves.append(part)
        groups[number] = [start, len(leaves), *halves]
        return number

    grow(tree, 0)
    return leaves, groups, levels


def halved(parts: FeatureMap, numbers: Tensor) -> Tensor:
    """Return the parts in an order whose halves, and halves of those, halve their box along its length.

    >>> from esegeta.features import grid
    >>> halved(grid(1)(torch.zeros(1, 2, 4)), torch.arange(8)).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    # Where a part lies: the mean place of the elements that its value goes to.
    pulled: Any = torch.func.vjp(parts.spread, numbers.double())
    shown, back = pulled
    places = [
        torch.arange(n, device=numbers.device).reshape(-1, *[1] * (shown.ndim - i - 1))
        for i, n in enumerate(shown.shape)
    ]
    sizes = back(torch.ones_like(shown))[0].clamp(min=1e-9)
    centres = torch.stack([back(p.expand_as(shown).to(shown))[0] / sizes for p in places], 1)

    def ordered(some: Tensor) -> Tensor:
        if len(some) < 2:
            return some
        here = centres.index_select(0, some)
        longest = (here.amax(0) - here.amin(0)).argmax()
        some = some.index_select(0, here.index_select(1, longest[None])[:, 0].sort(stable=True).indices)
        middle = len(some) // 2
        return torch.cat([ordered(some[:middle]), ordered(some[middle:])])

    return ordered(numbers)


def rounds(levels: list[int], splits: int) -> list[int]:
    """Return how many groups are split at once: whole levels if there are runs for all, else a few of the dearest.

    >>> rounds([1, 4, 16, 64], 85), rounds([1, 4, 16, 64], 40)
    ([1, 4, 16, 64], [1, 4, 16, 16, 3])
    """
    if sum(levels) <= splits:
        return levels
    sizes: list[int] = []
    while sum(sizes) < splits:
        wide = levels[len(sizes)] if len(sizes) < len(levels) else AT_ONCE
        sizes.append(min(wide, AT_ONCE, splits - sum(sizes)))
    return sizes
