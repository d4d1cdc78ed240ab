"""Scores that are equal as functions, but not as graphs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from esegeta.conformance.functions import KINK, call, chosen


def _beside(f: Callable[[Tensor], Tensor], x: Tensor, other: Tensor) -> Tensor:
    y = f(x) - KINK
    return torch.relu(torch.relu(y) - other) - torch.relu(other - y) + other + KINK


REWRITES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "halves": lambda f, x: f(x) / 2 + f(x) / 2,
    "difference": lambda f, x: 2 * f(x) - f(x),
    "scaled and back": lambda f, x: f(4 * x / 4),
    "shifted and back": lambda f, x: f((x + 0.5) - 0.5),
    "rectified parts": lambda f, x: f(torch.relu(x - KINK) - torch.relu(KINK - x) + KINK),
    "softened parts": lambda f, x: f(functional.silu(x) - functional.silu(-x)),
    "larger and smaller": lambda f, x: f(
        torch.maximum(x, KINK - x) + torch.minimum(x, KINK - x) - (KINK - x)
    ),
    "weighted by gates": lambda f, x: f(x * torch.sigmoid(x) + x * torch.sigmoid(-x)),
    "rectified result": lambda f, x: torch.relu(f(x) - KINK) - torch.relu(KINK - f(x)) + KINK,
    # The pair by which Sundararajan, Taly and Yan (2017) show that DeepLIFT and LRP depend on the implementation:
    # relu(a - b) = relu(relu(a) - b) where b is not negative.
    "rectified before the difference": lambda f, x: _beside(f, x, torch.relu(f(x.flip(-1)) + KINK)),
    "softened result": lambda f, x: functional.silu(f(x)) - functional.silu(-f(x)),
    "detour": lambda f, x: f(x.flip(-1).flip(-1).clone()),
}
KINKED = ("rectified parts", "larger and smaller", "rectified result", "rectified before the difference")
CURVED = ("softened parts", "weighted by gates", "softened result")


class _Module(nn.Module):
    def __init__(self, how: str, inner: nn.Module) -> None:
        super().__init__()
        self.how, self.inner = how, inner

    def forward(self, x: Tensor) -> Tensor:
        return REWRITES[self.how](self.inner, x)


@dataclass(frozen=True, repr=False)
class Rewritten:
    """A score in other words: the same function by another graph.

    >>> from esegeta.conformance.functions import Linear
    >>> same = Rewritten(Linear((1, 2)), "halves")
    >>> same, same(torch.tensor([[3., 4.]])).item()
    (Rewritten(Linear((1, 2)), 'halves'), 11.0)
    """

    inner: Any
    how: str

    def __post_init__(self) -> None:
        chosen("Rewritten", "how", self.how, REWRITES)

    def __repr__(self) -> str:
        return call(self)

    def __call__(self, x: Tensor) -> Tensor:
        """The value at one example."""
        return REWRITES[self.how](self.inner, x)

    @property
    def module(self) -> nn.Module:
        """The same as a network of batches."""
        return _Module(self.how, self.inner.module)

    @property
    def degree(self) -> int | None:
        """That of the formula."""
        return None if self.how in KINKED + CURVED else self.inner.degree

    @property
    def piecewise_linear(self) -> bool:
        """Return whether the formula is piecewise linear."""
        return self.inner.piecewise_linear and self.how not in CURVED

    @property
    def smooth(self) -> bool:
        """Return whether the formula is smooth."""
        return self.inner.smooth and self.how not in KINKED

    @property
    def operations(self) -> int:
        """About how many operations a value takes."""
        return 4 * self.inner.operations + 8

    def majorant(self, x: Tensor) -> Tensor:
        """Return three times that of what is inside, at three times the input and what is added to it."""
        return 3 * self.inner.majorant(3 * x.abs() + 1) + 1

    def to(self, dtype: str) -> "Rewritten":
        """Return the same in another precision."""
        return Rewritten(self.inner.to(dtype), self.how) if hasattr(self.inner, "to") else self


@dataclass(frozen=True)
class Pair:
    """Two scores that are equal as functions, and in which words they differ."""

    name: str
    first: Any
    second: Any
