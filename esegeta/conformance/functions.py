"""Pure functions with known answers: their gradients, integrated gradients and Shapley values in closed form.

Each is a frozen dataclass over the flattened elements of one example, whatever its shape, and prints as the call
that rebuilds it:

>>> f = Polynomial(2, ((1, (0, 1)),))
>>> f, f(torch.tensor([[2., 3.]])).item()
(Polynomial(2, ((1, (0, 1)),)), 6.0)
>>> f.integrated_gradients(torch.tensor([[2., 3.]]), torch.zeros(1, 2)).tolist()
[[3.0, 3.0]]
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from esegeta.engine import check

Number = float | int
PLAYERS = 10  # up to so many inputs Shapley values are enumerated


# --- what all of them are ---------------------------------------------------------------------------------


def code(value: Any) -> str:
    """Return the shortest code for a value: whole numbers without a point, tuples all the way down.

    >>> code((1.0, (0.25,), "max"))
    "(1, (0.25,), 'max')"
    """
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, tuple):
        return f"({', '.join(map(code, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def chosen(where: str, what: str, value: str, table: Any) -> None:
    """Refuse what is not in a table."""
    # Runtime type checkers look at random elements of a sequence, which Hypothesis does not allow while it draws:
    # nothing that a strategy calls is annotated with the type of elements.
    if value not in table:
        check.one_of(where, what, value, tuple(table))


def call(thing: Any) -> str:
    """Return the call that rebuilds a dataclass: what has no default by position, what differs from it by name."""

    def default(field: "Field[Any]") -> Any:
        return field.default_factory() if field.default_factory is not MISSING else field.default

    given = [(f, getattr(thing, f.name)) for f in fields(thing) if f.init]
    first = [code(v) for f, v in given if default(f) is MISSING]
    rest = [f"{f.name}={code(v)}" for f, v in given if default(f) is not MISSING and v != default(f)]
    return f"{type(thing).__name__}({', '.join([*first, *rest])})"


class AsModule(nn.Module):
    """A function as a network: ``(B,C,*S) -> (B,)``."""

    def __init__(self, function: "Function") -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return each example for itself."""
        return self.function.of_rows(x.flatten(1))


class Function:
    """A score of one example ``(C,*S) -> ()``. Subclasses say what it is of the last axis: ``of_rows``."""

    size: int
    degree: int | None
    piecewise_linear: bool
    smooth: bool
    operations: int
    monotone: bool

    def __repr__(self) -> str:
        return call(self)

    def __call__(self, x: Tensor) -> Tensor:
        """The value at one example."""
        if x.numel() != self.size:
            raise check.refused(
                type(self).__name__, f"{self.size} elements", check.describe(x), "Pass one example"
            )
        return self.of_rows(x.flatten())

    def of_rows(self, x: Tensor) -> Tensor:
        """Return ``(..., n) -> (...)``."""
        raise NotImplementedError

    @property
    def module(self) -> nn.Module:
        """The same as a network of batches."""
        return AsModule(self)

    def majorant(self, x: Tensor) -> Tensor:
        """Return a size that no intermediate sum, and no product of a slope and its input, exceeds."""
        raise NotImplementedError

    def gradient(self, x: Tensor) -> Tensor:
        """Return the gradient at x, written down by hand."""
        raise NotImplementedError

    def integrated_gradients(self, x: Tensor, baseline: Tensor) -> Tensor:
        """Return the exact integral along the straight path."""
        raise NotImplementedError

    def shapley(self, x: Tensor, baseline: Tensor) -> Tensor | None:
        """Return Shapley values of the elements, None where they are too many to enumerate."""
        used = [i for i, no in enumerate(self.unused) if not no]
        if len(used) > PLAYERS:
            return None
        n, flat, start = len(used), x.double().flatten(), baseline.double().flatten()
        inside = torch.tensor(list(itertools.product((False, True), repeat=n)), dtype=torch.bool)
        mixed = start.repeat(2**n, 1)
        mixed[:, used] = torch.where(inside.reshape(2**n, n), flat[used], start[used])
        value = self.of_rows(mixed)
        result = torch.zeros_like(flat)
        count = inside.sum(1) if n else torch.zeros(1)
        for place, i in enumerate(used):
            without = ~inside[:, place]
            weight = torch.tensor(
                [math.factorial(int(k)) * math.factorial(n - int(k) - 1) for k in count[without]],
                dtype=torch.float64,
            )
            result[i] = (weight * (value[inside[:, place]] - value[without])).sum() / math.factorial(n)
        return result.reshape(x.shape).to(x.dtype)

    @property
    def unused(self) -> tuple[Any, ...]:
        """Which elements it does not depend on, as a function: those that cancel are among them."""
        raise NotImplementedError

    def unused_without(self, elements: Sequence[int]) -> tuple[Any, ...]:
        """Return the same where these elements are held at zero."""
        return tuple(no or i in elements for i, no in enumerate(self.unused))

    def ignored(self, shape: Sequence[Any]) -> Tensor:
        """Return the same as a mask of an example."""
        return torch.tensor(self.unused, dtype=torch.bool).reshape(tuple(shape))

    @property
    def swaps(self) -> tuple[Any, ...]:
        """Pairs of elements that can change places without changing the function."""
        return ()

    def permutation(self, i: int, j: int) -> Tensor:
        """Return the permutation of the flattened elements that swaps two."""
        order = torch.arange(self.size)
        order[[i, j]] = order[[j, i]]
        return order


def _hold(thing: Function, **tensors: Sequence[Any]) -> None:
    # Made when the function is, never inside a transform, which would wrap them.
    for name, values in tensors.items():
        object.__setattr__(thing, name, torch.tensor(values, dtype=torch.float64))


def _alike(keys: Sequence[Any]) -> tuple[Any, ...]:
    return tuple((i, j) for i, j in itertools.combinations(range(len(keys)), 2) if keys[i] == keys[j])


# --- bends: functions of one number -----------------------------------------------------------------------


@dataclass(frozen=True)
class Bend:
    """A function of one number, its slope, and what is known of it. ``steep`` is the largest slope, if any."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    degree: int | None = None
    piecewise_linear: bool = False
    smooth: bool = True
    rising: bool = True
    steep: float | None = 1.0


def _phi(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _kinked(value: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], **known: Any) -> Bend:
    return Bend(value, slope, piecewise_linear=True, smooth=False, **known)


_STEP: Callable[[Tensor], Tensor] = lambda x: (x > 0).to(x.dtype)

BENDS: dict[str, Bend] = {
    "identity": Bend(lambda x: x, torch.ones_like, 1, True),
    "square": Bend(torch.square, lambda x: 2 * x, 2, rising=False, steep=None),
    "cube": Bend(lambda x: x * x * x, lambda x: 3 * x.square(), 3, steep=None),
    "relu": _kinked(torch.relu, _STEP),
    "abs": _kinked(torch.abs, torch.sign, rising=False),
    "leaky relu": _kinked(
        lambda x: functional.leaky_relu(x, 0.25), lambda x: torch.where(x > 0, 1.0, 0.25).to(x.dtype)
    ),
    "clamp": _kinked(lambda x: x.clamp(-1, 1), lambda x: (x.abs() <= 1).to(x.dtype)),
    "softplus": Bend(functional.softplus, torch.sigmoid),
    "sigmoid": Bend(torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
    "tanh": Bend(torch.tanh, lambda x: 1 - torch.tanh(x).square()),
    "gelu": Bend(functional.gelu, lambda x: torch.special.ndtr(x) + x * _phi(x), rising=False, steep=1.13),
    "silu": Bend(
        functional.silu,
        lambda x: torch.sigmoid(x) * (1 + x * torch.sigmoid(-x)),
        rising=False,
        steep=1.1,
    ),
    "sine": Bend(torch.sin, torch.cos, rising=False),
    # The rectifier in other words.
    "relu by clamp": _kinked(lambda x: x.clamp(min=0), lambda x: (x >= 0).to(x.dtype)),
    "relu by maximum": _kinked(
        lambda x: torch.maximum(x, torch.zeros_like(x)), lambda x: (_STEP(x) + (x >= 0).to(x.dtype)) / 2
    ),
    "relu by where": _kinked(lambda x: torch.where(x > 0, x, torch.zeros_like(x)), _STEP),
    "relu by product": _kinked(lambda x: x * (x > 0), _STEP),
    "relu by abs": _kinked(lambda x: (x + x.abs()) / 2, lambda x: (1 + torch.sign(x)) / 2),
    "relu by function": _kinked(functional.relu, _STEP),
    "relu by method": _kinked(lambda x: x.relu(), _STEP),
    "relu by negation": _kinked(lambda x: x + torch.relu(-x), lambda x: 1 - _STEP(-x)),
}

_COST = 4  # about as many operations as a bend takes


def _bend(where: str, name: str) -> Bend:
    chosen(where, "bend", name, BENDS)
    return BENDS[name]


def _bend_bound(bend: Bend, x: Tensor) -> Tensor:
    """No value of the bend, and no slope times x, is larger; ``x`` is not negative."""
    if bend.steep is not None:
        return bend.steep * x + bend.value(torch.zeros_like(x)).abs()
    return bend.slope(x) * x + bend.value(x)


def _degrees(bends: Sequence[Any]) -> int | None:
    known = [b.degree for b in bends]
    return None if None in known else max([d for d in known if d is not None], default=0)


# --- the functions ----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Linear(Function):
    r"""A weighted sum.

    .. math:: F(x) = \sum_i w_i x_i + b

    >>> Linear((1, 2)).shapley(torch.tensor([[3., 4.]]), torch.zeros(1, 2)).tolist()
    [[3.0, 8.0]]
    """

    weights: tuple[Any, ...]
    bias: Number = 0

    degree = 1
    piecewise_linear = True
    smooth = True

    def __post_init__(self) -> None:
        _hold(self, _w=self.weights)

    _w: ClassVar[Tensor]

    @property
    def size(self) -> int:  # type: ignore[override]
        """Return how many elements an example has."""
        return len(self.weights)

    @property
    def operations(self) -> int:  # type: ignore[override]
        """About how many operations a value takes."""
        return 2 * self.size + 1

    @property
    def monotone(self) -> bool:  # type: ignore[override]
        """Return whether it never falls when an element rises."""
        return all(w >= 0 for w in self.weights)

    @property
    def unused(self) -> tuple[Any, ...]:
        """Elements without weight."""
        return tuple(w == 0 for w in self.weights)

    @property
    def swaps(self) -> tuple[Any, ...]:
        """Elements of equal weight."""
        return _alike(self.weights)

    def of_rows(self, x: Tensor) -> Tensor:
        """Return ``(..., n) -> (...)``."""
        return (self._w.to(x.dtype) * x).sum(-1) + self.bias

    def majorant(self, x: Tensor) -> Tensor:
        """Return the sum of sizes."""
        return (self._w.abs() * x.double().flatten().abs()).sum() + abs(self.bias)

    def gradient(self, x: Tensor) -> Tensor:
        """Return the weights."""
        return self._w.reshape(x.shape).to(x.dtype)

    def integrated_gradients(self, x: Tensor, baseline: Tensor) -> Tensor:
        """Return weights times differences."""
        return self.gradient(x) * (x - baseline)

    def shapley(self, x: Tensor, baseline: Tensor) -> Tensor:
        """Return the same."""
        return self.integrated_gradients(x, baseline)


@dataclass(frozen=True, repr=False)
class Additive(Function):
    r"""A sum of functions of one element each.

    .. math:: F(x) = \sum_i w_i h_i(x_i) + b

    >>> Additive((1, 2), ("square", "cube")).integrated_gradients(torch.tensor([[3., 1.]]), torch.zeros(1, 2))
    tensor([[9., 2.]])
    """

    weights: tuple[Any, ...]
    bends: tuple[Any, ...]
    bias: Number = 0

    _w: ClassVar[Tensor]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.bends):
            raise check.refused("Additive", "a bend for each weight", f"{self.bends}", "Give as many of both")
        for name in self.bends:
            _bend("Additive", name)
        _hold(self, _w=self.weights)

    @property
    def _used(self) -> list[Any]:
        return [BENDS[b] for b, w in zip(self.bends, self.weights, strict=True) if w]

    @property
    def size(self) -> int:  # type: ignore[override]
        """Return how many elements an example has."""
        return len(self.weights)

    @property
    def operations(self) -> int:  # type: ignore[override]
        """About how many operations a value takes."""
        return (2 + _COST) * self.size + 1

    @property
    def degree(self) -> int | None:  # type: ignore[override]
        """As a polynomial."""
        return _degrees(self._used)

    @property
    def piecewise_linear(self) -> bool:  # type: ignore[override]
        """Return whether all bends are piecewise linear."""
        return all(b.piecewise_linear for b in self._used)

    @property
    def smooth(self) -> bool:  # type: ignore[override]
        """Return whether all bends are smooth."""
        return all(b.smooth for b in self._used)

    @property
    def monotone(self) -> bool:  # type: ignore[override]
        """Return whether it never falls when an element rises."""
        return all(w >= 0 for w in self.weights) and all(b.rising for b in self._used)

    @property
    def unused(self) -> tuple[Any, ...]:
        """Elements without weight."""
        return tuple(w == 0 for w in self.weights)

    @property
    def swaps(self) -> tuple[Any, ...]:
        """Elements of equal weight and bend."""
        return _alike(list(zip(self.weights, self.bends, strict=True)))

    def _each(self, x: Tensor, what: Callable[[Bend, Tensor], Tensor]) -> Tensor:
        terms = [what(BENDS[b], x[..., i]) for i, b in enumerate(self.bends)]
        return self._w.to(x.dtype) * torch.stack(terms, -1)

    def of_rows(self, x: Tensor) -> Tensor:
        """Return ``(..., n) -> (...)``."""
        return self._each(x, lambda b, z: b.value(z)).sum(-1) + self.bias

    def majorant(self, x: Tensor) -> Tensor:
        """Return the sum of sizes."""
        return self._each(x.double().flatten().abs(), _bend_bound).abs().sum() + abs(self.bias)

    def gradient(self, x: Tensor) -> Tensor:
        """Return weights times slopes."""
        return self._each(x.flatten(), lambda b, z: b.slope(z)).reshape(x.shape)

    def integrated_gradients(self, x: Tensor, baseline: Tensor) -> Tensor:
        """Return each element's own difference."""
        a = [self._each(z.double().flatten(), lambda b, z: b.value(z)) for z in (x, baseline)]
        return (a[0] - a[1]).reshape(x.shape).to(x.dtype)

    def shapley(self, x: Tensor, baseline: Tensor) -> Tensor:
        """Return the same."""
        return self.integrated_gradients(x, baseline)


Term = tuple[Number, Any]


@dataclass(frozen=True, repr=False)
class Polynomial(Function):
    r"""A sum of products: ``(2, (0, 0, 1))`` stands for :math:`2 x_0^2 x_1`. Terms may cancel.

    .. math:: F(x) = \sum_k c_k \prod_{i \in I_k} x_i + b

    >>> Polynomial(2, ((1, (0,)), (-1, (0,)), (3, (1,)))).unused
    (True, False)
    """

    size: int
    terms: tuple[Any, ...]
    bias: Number = 0

    smooth = True

    def __post_init__(self) -> None:
        if any(i not in range(self.size) for _, which in self.terms for i in which):
            raise check.refused(
                "Polynomial", f"elements below {self.size}", f"{self.terms}", "Number them from 0"
            )

    @property
    def collected(self) -> dict[Any, Any]:
        """Return what remains when equal products are put together."""
        total: dict[Any, Any] = {}
        for c, which in self.terms:
            key = tuple(sorted(which))
            total[key] = total.get(key, 0) + c
        return {k: c for k, c in total.items() if c and k}

    @property
    def degree(self) -> int:  # type: ignore[override]
        """Of the terms as they are written, since rounding sees those."""
        return max((len(which) for _, which in self.terms), default=0)

    @property
    def piecewise_linear(self) -> bool:  # type: ignore[override]
        """Return whether it is linear."""
        return self.degree <= 1

    @property
    def operations(self) -> int:  # type: ignore[override]
        """About how many operations a value takes."""
        return 1 + sum(1 + len(which) for _, which in self.terms)

    @property
    def monotone(self) -> bool:  # type: ignore[override]
        """Return whether it is linear and rising."""
        return all(len(k) == 1 and c >= 0 for k, c in self.collected.items())

    @property
    def unused(self) -> tuple[Any, ...]:
        """Elements in no term that remains."""
        return self.unused_without(())

    def unused_without(self, elements: Sequence[int]) -> tuple[Any, ...]:
        """Return the elements in no term that remains where these are zero."""
        used = set(itertools.chain.from_iterable(k for k in self.collected if not set(k) & set(elements)))
        return tuple(i not in used for i in range(self.size))

    @property
    def swaps(self) -> tuple[Any, ...]:
        """Elements whose exchange leaves the collected terms as they are."""
        kept = self.collected

        def swapped(i: int, j: int) -> dict[Any, Any]:
            to = {i: j, j: i}
            return {tuple(sorted(to.get(k, k) for k in which)): c for which, c in kept.items()}

        pairs = itertools.combinations(range(self.size), 2)
        return tuple((i, j) for i, j in pairs if swapped(i, j) == kept)

    def _sum(self, x: Tensor, terms: Sequence[Any]) -> Tensor:
        total = torch.zeros_like(x[..., 0])
        for c, which in terms:
            product = torch.ones_like(total) if not which else x[..., which[0]]
            for i in which[1:]:
                product = product * x[..., i]
            total = total + c * product
        return total

    def of_rows(self, x: Tensor) -> Tensor:
        """Return ``(..., n) -> (...)``."""
        return self._sum(x, self.terms) + self.bias

    def majorant(self, x: Tensor) -> Tensor:
        """Return the sum of sizes, with the degree for slopes."""
        sizes = [(abs(c) * max(1, len(which)), which) for c, which in self.terms]
        return self._sum(x.double().flatten().abs(), sizes) + abs(self.bias)

    def _slopes(self) -> list[Any]:
        """The terms of each partial derivative, one for each factor."""
        slopes: list[Any] = [[] for _ in range(self.size)]
        for which, c in self.collected.items():
            for place, i in enumerate(which):
                slopes[i].append((c, which[:place] + which[place + 1 :]))
        return slopes

    def gradient(self, x: Tensor) -> Tensor:
        """Return the gradient by the rule of products."""
        flat = x.flatten()
        return torch.stack([self._sum(flat, slope) for slope in self._slopes()]).reshape(x.shape)

    def integrated_gradients(self, x: Tensor, baseline: Tensor) -> Tensor:
        """Multiply out the polynomials in t that the path makes of the terms."""
        start = baseline.double().flatten().tolist()
        line = (x.double() - baseline.double()).flatten().tolist()

        def average(c: Number, which: tuple[Any, ...]) -> float:
            power = np.ones(1)
            for i in which:
                power = np.convolve(power, [start[i], line[i]])
            return float(c * (power / np.arange(1, len(power) + 1)).sum())

        a = [line[i] * sum(average(*term) for term in slope) for i, slope in enumerate(self._slopes())]
        return x.new_tensor(a).reshape(x.shape)


@dataclass(frozen=True, repr=False)
class Extremum(Function):
    r"""The largest, or smallest, of several lines.

    .. math:: F(x) = \max_{i \in I} \; w_i x_i + c_i

    Elements of weight zero do not take part.

    >>> f, x, zero = Extremum("max", (1, 1)), torch.tensor([[3., 2.]]), torch.zeros(1, 2)
    >>> f.integrated_gradients(x, zero).tolist(), f.shapley(x, zero).tolist()
    ([[3.0, 0.0]], [[2.0, 1.0]])
    """

    which: str
    weights: tuple[Any, ...]
    offsets: tuple[Any, ...] = ()

    piecewise_linear = True
    _w: ClassVar[Tensor]
    _c: ClassVar[Tensor]
    _part: ClassVar[Tensor]

    def __post_init__(self) -> None:
        chosen("Extremum", "which", self.which, ("max", "min"))
        if not any(self.weights) or (self.offsets and len(self.offsets) != len(self.weights)):
            raise check.refused(
                "Extremum", "a weight that is not zero, offsets for all", f"{self}", "Add them"
            )
        _hold(self, _w=self.weights, _c=self.offsets or (0,) * len(self.weights))
        object.__setattr__(self, "_part", torch.tensor([i for i, w in enumerate(self.weights) if w]))

    @property
    def size(self) -> int:  # type: ignore[override]
        """Return how many elements an example has."""
        return len(self.weights)

    @property
    def degree(self) -> int | None:  # type: ignore[override]
        """One, if a single element takes part."""
        return 1 if self.smooth else None

    @property
    def smooth(self) -> bool:  # type: ignore[override]
        """Return whether a single element takes part."""
        return len(self._part) == 1

    @property
    def operations(self) -> int:  # type: ignore[override]
        """About how many operations a value takes."""
        return 3 * len(self._part)

    @property
    def monotone(self) -> bool:  # type: ignore[override]
        """Return whether it never falls when an element rises."""
        return all(w >= 0 for w in self.weights)

    @property
    def unused(self) -> tuple[Any, ...]:
        """Elements that do not take part."""
        return tuple(w == 0 for w in self.weights)

    @property
    def swaps(self) -> tuple[Any, ...]:
        """Elements of equal lines, and those that do not take part."""
        offsets = self.offsets or (0,) * self.size
        return _alike([(w, c if w else 0) for w, c in zip(self.weights, offsets, strict=True)])

    def _lines(self, x: Tensor) -> Tensor:
        # Every element is read, those that do not take part too: a sum with none of them is not easier.
        return (self._w.to(x.dtype) * x + self._c.to(x.dtype))[..., self._part]

    def of_rows(self, x: Tensor) -> Tensor:
        """Return ``(..., n) -> (...)``."""
        lines = self._lines(x)
        return lines.amax(-1) if self.which == "max" else lines.amin(-1)

    def majorant(self, x: Tensor) -> Tensor:
        """Return the largest size."""
        return (self._w.abs() * x.double().flatten().abs() + self._c.abs())[self._part].amax()

    def _shares(self, lines: Tensor) -> Tensor:
        won = lines == (lines.amax() if self.which == "max" else lines.amin())
        return won.double() / won.sum()

    def gradient(self, x: Tensor) -> Tensor:
        """Return the weight of the winner; those who tie share."""
        a = torch.zeros_like(x).flatten()
        shares = self._shares(self._lines(x.flatten()))
        a[self._part] = self._w[self._part].to(x.dtype) * shares.to(x.dtype)
        return a.reshape(x.shape)

    def integrated_gradients(self, x: Tensor, baseline: Tensor) -> Tensor:
        """Return each winner's weight times how long it wins, between the points where lines cross."""
        first, last = (self._lines(z.double().flatten()) for z in (baseline, x))
        gap, turn = first[:, None] - first, (first - last)[:, None] - (first - last)
        t = (gap / turn).flatten()
        ends = torch.cat([t[(t > 0) & (t < 1)].sort().values, t.new_tensor([1.0])])
        share, before = torch.zeros_like(first), 0.0
        for end in ends.tolist():
            middle = (before + end) / 2
            share = share + (end - before) * self._shares(first + middle * (last - first))
            before = end
        a = torch.zeros(self.size, dtype=torch.float64)
        a[self._part] = share * (last - first)
        return a.reshape(x.shape).to(x.dtype)


@dataclass(frozen=True, repr=False)
class Perceptron(Function):
    r"""One hidden layer: a weighted sum of bent lines.

    .. math:: F(x) = \sum_k v_k h(\sum_i w_{ki} x_i + c_k) + b

    >>> f = Perceptron(((1, 1),), (-1,), (1,), "relu")
    >>> f.integrated_gradients(torch.tensor([[1., 1.]]), torch.zeros(1, 2)).tolist()
    [[0.5, 0.5]]
    """

    rows: tuple[Any, ...]
    offsets: tuple[Any, ...]
    weights: tuple[Any, ...]
    bend: str = "relu"
    bias: Number = 0

    _first: ClassVar[Tensor]
    _c: ClassVar[Tensor]
    _second: ClassVar[Tensor]

    def __post_init__(self) -> None:
        _bend("Perceptron", self.bend)
        if not self.rows or not len(self.rows) == len(self.offsets) == len(self.weights):
            raise check.refused("Perceptron", "as many rows as offsets and weights", f"{self}", "Add them")
        _hold(self, _first=self.rows, _c=self.offsets, _second=self.weights)

    @property
    def size(self) -> int:  # type: ignore[override]
        """Return how many elements an example has."""
        return len(self.rows[0])

    @property
    def degree(self) -> int | None:  # type: ignore[override]
        """As a polynomial."""
        return BENDS[self.bend].degree

    @property
    def piecewise_linear(self) -> bool:  # type: ignore[override]
        """Return whether the bend is piecewise linear."""
        return BENDS[self.bend].piecewise_linear

    @property
    def smooth(self) -> bool:  # type: ignore[override]
        """Return whether the bend is smooth."""
        return BENDS[self.bend].smooth

    @property
    def operations(self) -> int:  # type: ignore[override]
        """About how many operations a value takes."""
        return len(self.rows) * (2 * self.size + 2 + _COST)

    @property
    def monotone(self) -> bool:  # type: ignore[override]
        """Return whether it never falls when an element rises: every path has a positive weight."""
        paths = [v * w for v, row in zip(self.weights, self.rows, strict=True) for w in row]
        return BENDS[self.bend].rising and all(p >= 0 for p in paths)

    @property
    def unused(self) -> tuple[Any, ...]:
        """Elements without weight in every line that counts."""
        rows = [row for row, v in zip(self.rows, self.weights, strict=True) if v]
        return tuple(all(row[i] == 0 for row in rows) for i in range(self.size))

    @property
    def swaps(self) -> tuple[Any, ...]:
        """Elements with the same weight in every line."""
        return _alike(list(zip(*self.rows, strict=True)))

    def _lines(self, x: Tensor) -> Tensor:
        first, c = self._first.to(x.dtype), self._c.to(x.dtype)
        return (first * x.unsqueeze(-2)).sum(-1) + c

    def of_rows(self, x: Tensor) -> Tensor:
        """Return ``(..., n) -> (...)``."""
        bent = BENDS[self.bend].value(self._lines(x))
        return (self._second.to(x.dtype) * bent).sum(-1) + self.bias

    def majorant(self, x: Tensor) -> Tensor:
        """Return the sum of sizes."""
        lines = (self._first.abs() * x.double().flatten().abs()).sum(-1) + self._c.abs()
        return (self._second.abs() * _bend_bound(BENDS[self.bend], lines)).sum() + abs(self.bias)

    def _back(self, slopes: Tensor) -> Tensor:
        return ((self._second.to(slopes.dtype) * slopes)[:, None] * self._first.to(slopes.dtype)).sum(0)

    def gradient(self, x: Tensor) -> Tensor:
        """Return the gradient by the chain rule."""
        return self._back(BENDS[self.bend].slope(self._lines(x.flatten()))).reshape(x.shape)

    def integrated_gradients(self, x: Tensor, baseline: Tensor) -> Tensor:
        """Use the fundamental theorem: the average slope of a bend is that of its secant."""
        bend = BENDS[self.bend]
        last, first = (self._lines(z.double().flatten()) for z in (x, baseline))
        rise, run = bend.value(last) - bend.value(first), last - first
        same = run == 0
        slope = torch.where(same, bend.slope(last), rise / torch.where(same, 1.0, run))
        line = (x.double() - baseline.double()).flatten()
        return (line * self._back(slope)).reshape(x.shape).to(x.dtype)


IGNORING = ("replaced", "squared away", "softened away", "rectified away", "times zero")
KINK = 0.3  # no multiple of a power of two: what is drawn does not lie on the kinks that are added


@dataclass(frozen=True, repr=False)
class Ignoring(Function):
    """A function that does not depend on some elements, though its formula may contain them.

    how: ``"replaced"`` by a constant before anything else; or added by terms that cancel: ``"squared away"``
    with :math:`(s + 1)^2 - s^2 - 2 s - 1`, ``"softened away"`` with :math:`silu(s) - silu(-s) - s`,
    ``"rectified away"`` with :math:`relu(relu(s) - b) - relu(s - b)`, where b is not negative and depends on the
    other elements; or added with ``"times zero"``.

    >>> f = Ignoring(Linear((1, 2)), (1,), "squared away")
    >>> f(torch.tensor([[3., 4.]])).item(), f.unused
    (3.0, (False, True))
    """

    inner: Function
    elements: tuple[Any, ...]
    how: str = "replaced"

    _mask: ClassVar[Tensor]

    def __post_init__(self) -> None:
        chosen("Ignoring", "how", self.how, IGNORING)
        mask = torch.zeros(self.inner.size, dtype=torch.bool)
        mask[list(self.elements)] = True
        object.__setattr__(self, "_mask", mask)

    @property
    def size(self) -> int:  # type: ignore[override]
        """Return how many elements an example has."""
        return self.inner.size

    @property
    def degree(self) -> int | None:  # type: ignore[override]
        """That of the formula."""
        if self.how == "softened away" or self.inner.degree is None:
            return None
        return max(self.inner.degree, 2 if self.how == "squared away" else 1)

    @property
    def piecewise_linear(self) -> bool:  # type: ignore[override]
        """Return whether the formula is piecewise linear, part by part."""
        return self.inner.piecewise_linear and self.how not in ("squared away", "softened away")

    @property
    def smooth(self) -> bool:  # type: ignore[override]
        """Return whether what is inside is smooth."""
        return self.inner.smooth

    @property
    def operations(self) -> int:  # type: ignore[override]
        """About how many operations a value takes."""
        return self.inner.operations + 3 * self.size + 3 * _COST

    @property
    def monotone(self) -> bool:  # type: ignore[override]
        """Return whether what is inside rises; rounding of terms that cancel apart."""
        return self.inner.monotone

    @property
    def unused(self) -> tuple[Any, ...]:
        """Return what is ignored inside, and here."""
        return self.inner.unused_without(self.elements)

    def unused_without(self, elements: Sequence[int]) -> tuple[Any, ...]:
        """Return what is ignored inside where these are zero, too."""
        return self.inner.unused_without((*self.elements, *elements))

    @property
    def swaps(self) -> tuple[Any, ...]:
        """Those of what is inside, if none or both of a pair are ignored."""
        return tuple((i, j) for i, j in self.inner.swaps if (i in self.elements) == (j in self.elements))

    def _kept(self, x: Tensor) -> Tensor:
        return torch.where(self._mask, torch.zeros_like(x), x)

    def of_rows(self, x: Tensor) -> Tensor:
        """Return ``(..., n) -> (...)``."""
        y = self.inner.of_rows(self._kept(x))
        if self.how == "replaced":
            return y
        s = torch.where(self._mask, x, torch.zeros_like(x)).sum(-1)
        if self.how == "times zero":
            return y + 0 * s
        if self.how == "squared away":
            return y + ((s + 1).square() - s.square() - 2 * s - 1)
        if self.how == "rectified away":
            b = torch.relu(y + KINK)
            return y + (torch.relu(torch.relu(s - KINK) - b) - torch.relu(s - KINK - b))
        return y + (functional.silu(s) - functional.silu(-s) - s)

    def majorant(self, x: Tensor) -> Tensor:
        """Return the majorant of what is inside, and of the terms that cancel."""
        s = torch.where(self._mask, x.double().flatten(), 0.0).abs().sum()
        y = self.inner.majorant(self._kept(x.flatten()))
        extra = {
            "squared away": 2 * s.square() + 4 * s + 2,
            "softened away": 3 * s + 1,
            "rectified away": 2 * s + 2 * y + 2,
        }
        return y + extra.get(self.how, s)

    def _through(self, answer: Tensor, x: Tensor) -> Tensor:
        return torch.where(self._mask.reshape(x.shape), 0.0, answer).to(x.dtype)

    def _inside(self, x: Tensor) -> Tensor:
        return self._kept(x.flatten()).reshape(x.shape)

    def gradient(self, x: Tensor) -> Tensor:
        """Return the gradient of what is inside, without the elements."""
        return self._through(self.inner.gradient(self._inside(x)), x)

    def integrated_gradients(self, x: Tensor, baseline: Tensor) -> Tensor:
        """Return the integrated gradients of what is inside, without the elements."""
        return self._through(self.inner.integrated_gradients(self._inside(x), self._inside(baseline)), x)

    def shapley(self, x: Tensor, baseline: Tensor) -> Tensor | None:
        """Return the Shapley values of what is inside, without the elements."""
        found = self.inner.shapley(self._inside(x), self._inside(baseline))
        return None if found is None else self._through(found, x)


KINDS: dict[str, type[Function]] = {
    kind.__name__: kind for kind in (Linear, Additive, Polynomial, Extremum, Perceptron, Ignoring)
}
