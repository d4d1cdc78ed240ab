"""Networks that label every voxel, reduced to a score by one of the reducers."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from esegeta import reducers as _registered  # noqa: F401
from esegeta._registry import REDUCERS
from esegeta._types import Score
from esegeta.conformance.functions import call, chosen
from esegeta.conformance.grammar import majorant
from esegeta.conformance.networks import TYPES, Network, OfModule

CLASSES = 2


@dataclass(frozen=True, repr=False)
class Reducing:
    """A reducer with its settings: from a model, and the input at which masks are frozen, to a score.

    >>> Reducing("class_sum", (("target", 1),))
    Reducing('class_sum', settings=(('target', 1),))
    """

    name: str
    settings: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        chosen("Reducing", "a reducer", self.name, REDUCERS)

    def __repr__(self) -> str:
        return call(self)

    @property
    def differentiable(self) -> bool:
        """Return whether the score has a gradient."""
        return REDUCERS[self.name].differentiable

    def __call__(self, model: Any, at: Tensor) -> Score:
        """The score."""
        frozen = {"at": at} if REDUCERS[self.name].mask else {}
        return REDUCERS[self.name].fn(model, **dict(self.settings), **frozen)


@dataclass(frozen=True, repr=False)
class Segmentation(OfModule):
    """A network that ends in a map of two classes, as a model: ``(C,*S) -> (2,*S')``.

    >>> model = Segmentation(Network((1, 3), ("conv",)))
    >>> model, tuple(model(torch.ones(1, 3, dtype=torch.float64)).shape)
    (Segmentation(Network((1, 3), layers=('conv',))), (2, 3))
    """

    network: Network

    module: ClassVar[Any]

    def __post_init__(self) -> None:
        body = list(self.network.module)[:-1]
        maps = nn.Sequential(*body, _Classes()).eval()
        object.__setattr__(self, "module", maps)

    def majorant(self, x: Tensor) -> Tensor:
        """Return a size that no value inside exceeds."""
        return majorant(self.module, x.detach().abs().to(TYPES[self.network.dtype])[None]).amax()


@dataclass(frozen=True, repr=False)
class Classification:
    """The means of a segmentation's classes, as a model: ``(C,*S) -> (2,)``."""

    inner: Segmentation

    def __repr__(self) -> str:
        return call(self)

    def __call__(self, x: Tensor) -> Tensor:
        """The value at one example."""
        return self.inner(x).flatten(1).mean(1)

    def majorant(self, x: Tensor) -> Tensor:
        """Return the majorant of what is averaged: a mean is no larger than the largest."""
        return self.inner.majorant(x)


class _Classes(nn.Module):
    """Two classes: the sum of all channels, and what is left of one."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum(1, keepdim=True)
        return torch.cat([1 - total, total], 1)

    def majorant(self, u: Tensor) -> Tensor:
        total = u.sum(1, keepdim=True)
        return torch.cat([1 + total, total], 1)
