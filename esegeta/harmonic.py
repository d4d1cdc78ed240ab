r"""Laplace's equation on a part of a grid: the smoothest continuation of an image into a hole.

Preconditioned conjugate gradients with a fixed number of steps, so that it runs under every transform. The
preconditioner is one multigrid cycle over blocks of 2, 4, 8... voxels: the number of steps that an accuracy takes
hardly grows with the hole.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv3d, pad

_DAMPED = 0.8  # Jacobi
_STIFF = 2.0  # constant on blocks of two, a slope costs twice what it does


class Level(NamedTuple):
    """The equation on one grid, for rows (n,*S): what flows between unknowns along an axis, and to what is known."""

    between: tuple[Tensor, ...]
    known: Tensor

    def apply(self, f: Tensor) -> Tensor:
        """Return what flows out of every voxel."""
        out = self.known * f
        for axis, c in enumerate(self.between, 1):
            flow = c * f.diff(dim=axis)
            out = out - _beside(flow, axis, 1) + _beside(flow, axis, 0)
        return out

    def inverse_diagonal(self) -> Tensor:
        """Return one over what a voxel alone lets flow, zero where nothing is unknown."""
        diagonal = self.known
        for axis, c in enumerate(self.between, 1):
            diagonal = diagonal + _beside(c, axis, 0) + _beside(c, axis, 1)
        return _ratio(torch.ones_like(diagonal), diagonal)


def solve(x: Tensor, hidden: Tensor, weights: Sequence[float], steps: int) -> Tensor:
    r"""Return rows x (n,*S) with the hidden elements such that no more flows into each of them than out.

    .. math:: \sum_a w_a \left( f_{v + e_a} + f_{v - e_a} - 2 f_v \right) = 0 \text{ in the hole}, \qquad
              f = x \text{ elsewhere}

    Args:
        x: the image.
        hidden: bool (n,*S), where the values of x are not looked at.
        weights: of the axes, one over the square of the spacing.
        steps: of the conjugate gradients.
    """
    unknown = hidden.to(x.dtype)
    seen = torch.where(hidden, 0, x)
    axes = tuple(range(1, x.ndim))
    level = _ratio(seen.sum(axes, keepdim=True), (1 - unknown).sum(axes, keepdim=True))
    outside = torch.where(hidden, 0, x - level)  # constants come out as they went in
    between, known, flow = [], torch.zeros_like(x), torch.zeros_like(x)
    for axis, w in enumerate(weights, 1):
        n = x.shape[axis]
        here, there = (t.narrow(axis, s, n - 1) for t in [unknown] for s in (0, 1))
        between.append(w * here * there)
        out, back = w * here * (1 - there), w * there * (1 - here)
        known = known + _beside(out, axis, 1) + _beside(back, axis, 0)
        values = (outside.narrow(axis, s, n - 1) for s in (1, 0))
        flow = flow + _beside(out * next(values), axis, 1) + _beside(back * next(values), axis, 0)
    levels = _hierarchy(Level(tuple(between), known))
    found = _conjugate(levels[0].apply, flow, levels, steps)
    return torch.where(hidden, found + level, x)


def impute(x: Tensor, hidden: Tensor, spacing: Sequence[float], steps: int) -> Tensor:
    r"""Fill every hidden element of the rows x (n,*S) with the weighted mean of its neighbours, diagonal ones too.

    .. math:: f_v = \sum_u w_{vu} f_u / \sum_u w_{vu}, \qquad w_{vu} = 1 / |v - u|^2

    over the neighbours that the grid has, 26 within a volume. The equation is symmetric before it is divided by the
    sums of weights, so conjugate gradients solve it; the cycle for face neighbours is their preconditioner.

    Args:
        x: the image.
        hidden: bool (n,*S), where the values of x are not looked at.
        spacing: of the voxels.
        steps: of the conjugate gradients.
    """
    axes = len(spacing)
    convolve = (conv1d, conv2d, conv3d)[axes - 1]
    weights = torch.zeros((3,) * axes, dtype=x.dtype, device=x.device)
    for offset in itertools.product((-1, 0, 1), repeat=axes):
        distance = sum((o * s) ** 2 for o, s in zip(offset, spacing, strict=True))
        if distance > 0:
            weights[tuple(o + 1 for o in offset)] = 1 / distance

    def around(f: Tensor) -> Tensor:
        return convolve(f[:, None], weights[None, None], padding=1)[:, 0]

    unknown = hidden.to(x.dtype)
    over = tuple(range(1, x.ndim))
    level = _ratio(torch.where(hidden, 0, x).sum(over, keepdim=True), (1 - unknown).sum(over, keepdim=True))
    outside = torch.where(hidden, 0, x - level)
    degree = around(torch.ones_like(x))

    def apply(f: Tensor) -> Tensor:
        return torch.where(hidden, degree * f - around(f), 0)

    between, known = [], torch.where(hidden, around(1 - unknown), 0)
    for axis, length in enumerate(spacing, 1):
        n = x.shape[axis]
        between.append(unknown.narrow(axis, 0, n - 1) * unknown.narrow(axis, 1, n - 1) * (_STIFF / length**2))
    found = _conjugate(
        apply, torch.where(hidden, around(outside), 0), _hierarchy(Level(tuple(between), known)), steps
    )
    return torch.where(hidden, found + level, x)


def _hierarchy(finest: Level) -> list[Level]:
    """The equation on the grid, and on blocks of 2, 4, 8... voxels."""
    levels = [finest]
    while max(levels[-1].known.shape[1:]) > 1:
        levels.append(_coarser(levels[-1]))
    return levels


def _conjugate(apply: Callable[[Tensor], Tensor], flow: Tensor, levels: list[Level], steps: int) -> Tensor:
    """Solve for a right side by conjugate gradients, each row by itself."""
    inverses = [each.inverse_diagonal() for each in levels]
    axes = tuple(range(1, flow.ndim))

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(axes, keepdim=True)

    f, r = torch.zeros_like(flow), flow
    z = _cycle(levels, inverses, r)
    p, size = z, dot(r, z)
    for _ in range(steps):
        q = apply(p)
        length = _ratio(size, dot(p, q))
        f, r = f + length * p, r - length * q
        z = _cycle(levels, inverses, r)
        before, size = size, dot(r, z)
        p = z + _ratio(size, before) * p
    return f


def _cycle(levels: list[Level], inverses: list[Tensor], r: Tensor) -> Tensor:
    """About the solution for a right side: smoothed, corrected on the coarser grids, smoothed."""
    level, inverse = levels[0], inverses[0]
    if len(levels) == 1:
        return inverse * r
    f = _DAMPED * inverse * r
    f = f + _DAMPED * inverse * (r - level.apply(f))
    coarse = _cycle(levels[1:], inverses[1:], _blocks(r - level.apply(f)))
    for axis in range(1, r.ndim):
        coarse = coarse.repeat_interleave(2, dim=axis).narrow(axis, 0, r.shape[axis])
    f = f + torch.where(inverse > 0, coarse, 0)
    f = f + _DAMPED * inverse * (r - level.apply(f))
    return f + _DAMPED * inverse * (r - level.apply(f))


def _coarser(level: Level) -> Level:
    between = []
    for axis, c in enumerate(level.between, 1):
        at = torch.tensor(range(1, c.shape[axis], 2), dtype=torch.int64, device=c.device)
        between.append(_blocks(c.index_select(axis, at), axis) / _STIFF)
    return Level(tuple(between), _blocks(level.known))


def _blocks(f: Tensor, apart: int = 0) -> Tensor:
    """Sums over two neighbours along every axis but one."""
    for axis in range(1, f.ndim):
        if axis != apart:
            n = f.shape[axis]
            even = _beside(f, axis, 1) if n % 2 else f
            f = even.unflatten(axis, (-1, 2)).sum(axis + 1)
    return f


def _beside(f: Tensor, axis: int, after: int) -> Tensor:
    """One zero more along an axis, before or after."""
    return pad(f, [0, 0] * (f.ndim - 1 - axis) + [1 - after, after])


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    some = b > 0
    return torch.where(some, a / torch.where(some, b, 1), 0)
