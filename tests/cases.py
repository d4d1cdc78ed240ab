"""Scores with inputs, drawn from seeds.

A case prints as the call that rebuilds it:

>>> make_case("cubic", axes=2, channels=1)
make_case('cubic', axes=2, channels=1, dtype='float64', seed=0)
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

import esegeta as eg

SHAPES = {1: (7,), 2: (3, 4), 3: (2, 3, 2)}
POLYNOMIAL = ("linear", "quadratic", "cubic")
SMOOTH = (*POLYNOMIAL, "softplus", "conv")
PIECEWISE = ("relu", "segmentation")
KINDS = (*SMOOTH, *PIECEWISE)

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class Case:
    """A score with an input and references, drawn from a seed of its own."""

    kind: str
    axes: int
    channels: int
    dtype: str
    seed: int

    def __repr__(self) -> str:
        rest = f"axes={self.axes}, channels={self.channels}, dtype={self.dtype!r}, seed={self.seed}"
        return f"make_case({self.kind!r}, {rest})"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, *SHAPES[self.axes])

    @property
    def rounding(self) -> float:
        """What two ways to compute the same may differ by, relative to the largest value."""
        return {"float64": 1e-10, "float32": 1e-4}[self.dtype]

    def draw(self, what: str, *shape: int) -> Tensor:
        """Normal numbers that belong to this case and this word."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{what} {self.seed} {self.kind}".encode()))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(getattr(torch, self.dtype))

    @property
    def x(self) -> Tensor:
        return self.draw("x", *self.shape)

    @property
    def xs(self) -> Tensor:
        """Three examples, of which the first is ``x``."""
        return torch.stack([self.x, 2 * self.draw("x1", *self.shape), self.draw("x2", *self.shape) - 1])

    def refs(self, kinds: tuple[str, ...]) -> tuple[Tensor, ...]:
        shapes = {"baseline": self.shape, "baselines": (3, *self.shape)}
        return tuple(self.draw(kind, *shapes[kind]) for kind in kinds)

    def many_refs(self, kinds: tuple[str, ...]) -> tuple[Tensor, ...]:
        """References for each of ``xs``."""
        return tuple(torch.stack([r, r.flip(-1), 0.5 * r]) for r in self.refs(kinds))

    @cached_property
    def module(self) -> nn.Module:
        """A small segmentation network with everything that a module can have: norm, biases, buffers."""
        conv, norm = getattr(nn, f"Conv{self.axes}d"), getattr(nn, f"BatchNorm{self.axes}d")
        net = nn.Sequential(
            conv(self.channels, 3, 3, padding=1), norm(3), nn.ReLU(inplace=True), conv(3, 2, 1)
        ).to(getattr(torch, self.dtype))
        with torch.no_grad():
            for i, p in enumerate([*net.parameters(), net[1].running_mean]):
                p.copy_(self.draw(f"parameter {i}", *p.shape) / 2)
            z = net.eval()(self.x[None])[0]
            net[3].bias[1] += (z[0] - z[1]).median() + 0.1  # both classes are predicted somewhere at x
        return net

    @cached_property
    def score(self) -> Score:
        return _SCORES[self.kind](self)


def make_case(kind: str, *, axes: int = 2, channels: int = 2, dtype: str = "float64", seed: int = 0) -> Case:
    """Rebuild a case from what it prints."""
    return Case(kind, axes, channels, dtype, seed)


def every_case(*kinds: str, dtype: str = "float64") -> list[Case]:
    """Each kind of score, going through one to three axes and one or two channels."""
    return [
        make_case(kind, axes=1 + i % 3, channels=1 + (i // 3 + i) % 2, dtype=dtype, seed=i)
        for i, kind in enumerate(kinds or KINDS)
    ]


def _linear(case: Case) -> Score:
    w = case.draw("w", *case.shape)
    return lambda x: (w * x).sum() + 0.5


def _quadratic(case: Case) -> Score:
    w, v = case.draw("w", *case.shape), case.draw("v", *case.shape)
    return lambda x: (w * x.square()).sum() + (v * x).sum() * x.sum() / 4


def _cubic(case: Case) -> Score:
    w, v = case.draw("w", *case.shape), case.draw("v", *case.shape)
    return lambda x: (w * x.pow(3) - v * x).sum() + (v * x).sum() * (w * x).sum() * x.mean() / 8


def _perceptron(bend: Callable[[Tensor], Tensor]) -> Callable[[Case], Score]:
    def make(case: Case) -> Score:
        size = torch.Size(case.shape).numel()
        first, second = case.draw("first", 6, size) / size**0.5, case.draw("second", 6)
        bias = case.draw("bias", 6) / 2
        return lambda x: (second * bend(first @ x.flatten() + bias)).sum()

    return make


def _conv(case: Case) -> Score:
    # A plain torch function: vmap goes through it operator by operator.
    conv = getattr(functional, f"conv{case.axes}d")
    first = case.draw("first", 3, case.channels, *[3] * case.axes) / 4
    second = case.draw("second", 2, 3, *[1] * case.axes)
    return lambda x: conv(functional.softplus(conv(x, first, padding=1)), second)[1].sum()


def _segmentation(case: Case) -> Score:
    return eg.reducers.predicted_class_sum(eg.from_module(case.module), 1, at=case.x)


_SCORES: dict[str, Callable[[Case], Score]] = {
    "linear": _linear,
    "quadratic": _quadratic,
    "cubic": _cubic,
    "softplus": _perceptron(functional.softplus),
    "relu": _perceptron(torch.relu),
    "conv": _conv,
    "segmentation": _segmentation,
}
