"""Tiles that cover an image, and what each of them counts for. All of it follows from shapes."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from esegeta.engine import check

Box = tuple[slice, ...]

# The standard deviation of gaussian weights, as a part of the patch.
SIGMA = 1 / 8


def starts(length: int, patch: int, overlap: float | int, steps: str) -> list[int]:
    """Return where tiles of one axis begin, so that neighbours share at least that part of a patch.

    >>> starts(110, 64, 0.5, "even"), starts(110, 64, 0.5, "fixed"), starts(64, 64, 0.5, "even")
    ([0, 23, 46], [0, 32, 46], [0])
    """
    room = length - patch
    if steps == "fixed":
        step = max(1, int(patch * (1 - overlap)))
        return [min(i * step, room) for i in range(-(-room // step) + 1)]
    # Rounded, because 10 * (1 - 0.9) is a little less than 1.
    count = math.ceil(room / max(1, round(patch * (1 - overlap), 9)))
    return [round(i * (room / count)) for i in range(count + 1)] if count else [0]


def shares(length: int, patch: int, begins: Sequence[int], kind: str) -> Tensor:
    """Return the weights of every tile of one axis, (tiles, patch), that sum to one at each of its elements.

    >>> shares(6, 4, [0, 2], "average").tolist()
    [[1.0, 1.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]
    >>> shares(6, 4, [0, 2], "centre").tolist()
    [[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]]
    """
    if kind == "centre":
        # Neighbours meet in the middle of what they share.
        cuts = [0, *((a + patch + b) // 2 for a, b in itertools.pairwise(begins)), length]
        rows = torch.zeros(len(begins), patch, dtype=torch.float64)
        for row, begin, low, high in zip(rows, begins, cuts, cuts[1:], strict=False):
            row[low - begin : high - begin] = 1
        return rows
    place = torch.arange(patch, dtype=torch.float64) - patch // 2
    own = (place / (SIGMA * patch)).square().div(-2).exp() if kind == "gaussian" else torch.ones_like(place)
    total = torch.zeros(length, dtype=torch.float64)
    for begin in begins:
        total[begin : begin + patch] += own
    return torch.stack([own / total[begin : begin + patch] for begin in begins])


class Tiling:
    """Tiles that cover a grid, and weights of theirs that sum to one everywhere. Depends on shapes only."""

    def __init__(
        self,
        grid: Sequence[int],
        patch: Sequence[int],
        overlap: float | int,
        weights: str | Tensor,
        steps: str,
        like: Tensor,
    ) -> None:
        along = [starts(n, p, overlap, steps) for n, p in zip(grid, patch, strict=True)]
        self.boxes: list[Box] = [
            tuple(slice(b, b + p) for b, p in zip(begin, patch, strict=True))
            for begin in itertools.product(*along)
        ]
        kind = torch.promote_types(like.dtype, torch.float32)
        self._total: Tensor | None = None
        if isinstance(weights, Tensor):
            self._map = weights.to(device=like.device, dtype=kind)
            self._total = self._map.new_zeros(tuple(grid))
            for box in self.boxes:
                self._total[box] += self._map
        else:
            tables = [shares(n, p, b, weights) for n, p, b in zip(grid, patch, along, strict=True)]
            self._tables = [table.to(device=like.device, dtype=kind) for table in tables]
            self._rows = list(itertools.product(*map(range, map(len, along))))

    def touched(self, low: Sequence[int], extent: Sequence[int]) -> list[int]:
        """Return which tiles share an element with a box."""
        return [
            i
            for i, box in enumerate(self.boxes)
            if all(s.start < a + n and a < s.stop for s, a, n in zip(box, low, extent, strict=True))
        ]

    def around(self, tiles: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the box that holds these tiles: where it begins and ends."""
        held = list(zip(*(self.boxes[i] for i in tiles), strict=True))
        return [min(s.start for s in side) for side in held], [max(s.stop for s in side) for side in held]

    def weight(self, i: int) -> Tensor:
        """Return what tile i counts for at each of its elements."""
        if self._total is not None:
            return self._map / self._total[self.boxes[i]]
        vectors = [table[k] for table, k in zip(self._tables, self._rows[i], strict=True)]
        return functools.reduce(lambda w, v: w[..., None] * v, vectors)


def patch_of(where: str, patch: int | Sequence[int], x: Tensor) -> tuple[int, ...]:
    """Return the size of a patch of this image."""
    axes = x.ndim - 1
    if not 1 <= axes <= 3:
        advice = "Models see one example, with its channels first and no batch axis"
        raise check.refused(where, "an image (C,*S) with 1 to 3 axes S", check.describe(x), advice)
    sizes = (patch,) * axes if isinstance(patch, int) else tuple(patch)
    if len(sizes) != axes:
        expected = f"a patch of {axes} sizes for an image {tuple(x.shape)}"
        raise check.refused(where, expected, repr(patch), "Give one for each axis, or one for all")
    return sizes


def margins_of(grid: Sequence[int], patch: Sequence[int]) -> list[tuple[int, int]]:
    """Return what a grid smaller than a patch lacks before and after it, along each axis.

    >>> margins_of((5, 8), (8, 8))
    [(1, 2), (0, 0)]
    """
    lacking = [max(0, p - n) for n, p in zip(grid, patch, strict=True)]
    return [(k // 2, k - k // 2) for k in lacking]


def padded_by(margins: Sequence[tuple[int, int]], x: Tensor) -> Tensor:
    """Return the image with zeros around it, along the last axes."""
    return pad(x, [n for pair in reversed(margins) for n in pair]) if any(map(any, margins)) else x


def cropped_by(margins: Sequence[tuple[int, int]], y: Tensor) -> Tensor:
    """Crop what is around a patch."""
    last = y.shape[y.ndim - len(margins) :]
    return cut(y, tuple(slice(low, n - high) for (low, high), n in zip(margins, last, strict=True)))


def cut(t: Tensor, box: Box) -> Tensor:
    """Return a box of the last axes."""
    where: Any = (..., *box)
    return t[where]
