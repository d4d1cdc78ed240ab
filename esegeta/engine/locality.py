"""How far a network sees: found by planes of NaN, which nothing that sums or compares can hide."""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from esegeta.engine import check, layout

PHASES = 16  # the longest shift period that is looked for: four halvings
# Lengths of the axis that is probed, and of the others, until one is long enough and one is taken.
LENGTHS = (96, 192, 384)
THIN = (16, 32, 64)


@runtime_checkable
class Model(Protocol):
    """What answers how far it sees: a network as a model, or the same model on patches of an image."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run on one example."""

    def locality(self, x: Tensor, allowed: float = math.inf) -> "Locality":
        """Return how far it sees in images like x, found with no more than ``allowed`` elements; or ``NotLocal``."""


# Calls of models, while somebody wants to know which there are.
_heard: ContextVar[list[tuple[Model, tuple[Any, ...]]] | None] = ContextVar("esegeta_models", default=None)


def hear(model: Model, inputs: tuple[Any, ...]) -> None:
    """Tell those who listen that a model is called."""
    heard = _heard.get()
    if heard is not None:
        heard.append((model, inputs))


@contextlib.contextmanager
def listening() -> Iterator[list[tuple[Model, tuple[Any, ...]]]]:
    """Collect which models are called with what."""
    heard: list[tuple[Model, tuple[Any, ...]]] = []
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


class NotLocal(ValueError):
    """A network has no locality that could be used; the text says why."""


class TooDear(Exception):
    """Finding out how far a network sees takes more than may be spent on it."""


@dataclass(frozen=True)
class Locality:
    """How far one element of the input reaches, for every axis.

    ``period[a]``: a shift of the input by so many elements shifts the output as far. ``reach[a][i % period]`` is
    (low, high): the element at i reaches the elements i + low to i + high - 1 of the output.
    """

    period: tuple[int, ...]
    reach: tuple[tuple[tuple[int, int], ...], ...]

    def affected(self, axis: int, start: int, stop: int, length: int) -> tuple[int, int]:
        """Return which elements of the output depend on the elements from start to stop of the input.

        >>> Locality((1,), (((-1, 2),),)).affected(0, 4, 6, 100)
        (3, 7)
        """
        p, ranges = self.period[axis], self.reach[axis]
        first = range(start, min(stop, start + p))
        last = range(max(start, stop - p), stop)
        low = min(i + ranges[i % p][0] for i in first)
        high = max(i + ranges[i % p][1] for i in last)
        return max(0, low), min(length, high)

    def needs(self, axis: int, start: int, stop: int, length: int) -> tuple[int, int]:
        """Return which elements of the input, from a multiple of the period to one or the end, reach that output.

        >>> Locality((2,), (((-1, 2), (-2, 1)),)).needs(0, 4, 6, 100)
        (4, 8)
        """
        p, ranges = self.period[axis], self.reach[axis]
        low, high = start - max(r[1] for r in ranges), stop - min(r[0] for r in ranges)
        while low < start and low + ranges[low % p][1] <= start:
            low += 1
        while high > stop and high - 1 + ranges[(high - 1) % p][0] >= stop:
            high -= 1
        low, high = max(0, low), min(length, high)
        return low // p * p, min(length, -(-high // p) * p)


def probe(model: Callable[[Tensor], Tensor], x: Tensor, name: str, allowed: float = math.inf) -> Locality:
    """Return the locality of a function from (C,*S) to (K,*S); ``NotLocal`` where it has none.

    ``TooDear`` where more than ``allowed`` elements have to go through it.
    """
    axes = range(1, x.ndim)
    spent = 0
    least = len(axes) * (2 * PHASES + 1) * _cost(x.new_zeros(()).expand(_slab(x, 1, LENGTHS[0], THIN[0])))

    def counted(slab: Tensor) -> Tensor:
        nonlocal spent
        spent += _cost(slab)
        if max(spent, least) > allowed:
            raise TooDear(f"to find out how far {name} sees takes more than a tenth of whole evaluations")
        with torch.no_grad():
            return model(slab)

    found = [_along(counted, x, axis, name) for axis in axes]
    return Locality(tuple(p for p, _ in found), tuple(r for _, r in found))


def _cost(slab: Tensor) -> int:
    return slab.numel() * (2 if layout.lonely(slab[None]) else 1)


def _slab(x: Tensor, axis: int, length: int, thin: int | None) -> list[int]:
    shape = [x.shape[0], *(x.shape[1:] if thin is None else [thin] * (x.ndim - 1))]
    if thin is not None:
        shape[axis] = length
    return shape


def _along(
    model: Callable[[Tensor], Tensor], x: Tensor, axis: int, name: str
) -> tuple[int, tuple[tuple[int, int], ...]]:
    why: Exception | None = None
    for length in LENGTHS:
        base = None
        for thin in (*THIN, None):
            candidate = check.wave(x.new_zeros(_slab(x, axis, length, thin)))
            try:
                out = model(candidate)  # also settles what the model finds out at its first batch
            except TooDear:
                raise
            except Exception as error:
                why = error
                continue
            if out.shape[1:] != candidate.shape[1:]:
                raise NotLocal(f"{name} gives a grid {tuple(out.shape[1:])} for {tuple(candidate.shape[1:])}")
            base = candidate
            break
        if base is None:
            raise NotLocal(f"{name} takes no slab of an image ({why})")
        ranges = _ranges(model, base, axis, name)
        if ranges is not None:
            return _periodic([(i, low - i, high - i) for i, low, high in ranges], name)
        if thin is None:
            break
    raise NotLocal(f"{name} is global along axis {axis}: one element reaches everything that was looked at")


def _ranges(
    model: Callable[[Tensor], Tensor], base: Tensor, axis: int, name: str
) -> list[tuple[int, int, int]] | None:
    """For elements around the middle: which outputs a plane of NaN there reaches; None if that is a border."""
    n = base.shape[axis]
    middle = n // 2 // PHASES * PHASES
    out = []
    others = tuple(a for a in range(base.ndim) if a != axis)
    for i in range(max(0, middle - PHASES), min(n, middle + PHASES)):
        odd = base.clone()
        odd.select(axis, i).fill_(torch.nan)
        reached = model(odd).isnan()
        where = reached.any(dim=others).nonzero().flatten()
        if not len(where):
            raise NotLocal(f"{name} hides NaN (torch.where or nan_to_num), so that its reach cannot be seen")
        low, high = int(where[0]), int(where[-1]) + 1
        if low == 0 or high == n:
            return None  # it sees farther, or everything: the first plane says so as well as all
        out.append((i, low, high))
    return out


def _periodic(ranges: list[tuple[int, int, int]], name: str) -> tuple[int, tuple[tuple[int, int], ...]]:
    relative = {i: (low, high) for i, low, high in ranges}
    for p in range(1, PHASES + 1):
        if all(relative[i] == relative[i + p] for i in relative if i + p in relative):
            start = min(relative)
            by_phase = {i % p: relative[i] for i in range(start, start + p)}
            return p, tuple(by_phase[phase] for phase in range(p))
    raise NotLocal(f"{name} has no shift period up to {PHASES}")
