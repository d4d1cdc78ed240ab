"""The law of symmetry, and the situations in which it is tried."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esegeta import axioms
from esegeta._types import Score
from esegeta.axioms.composed import composed
from esegeta.conformance.lawbook import INAPPLICABLE, MethodLaw, generic, law
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw


@law("symmetry")
@dataclass(frozen=True, repr=False)
class Symmetry(MethodLaw):
    """Elements that score, input and baseline cannot tell apart get the same."""

    swap: tuple[int, int]  # elements, or voxels for those that give one map for all channels

    def measure(self, subject: Subject) -> tuple[float, float]:
        i, j = self.swap
        shape = self.case.x.shape
        rows = (shape[0], -1) if subject.one_channel else (-1,)
        order = torch.arange(self.case.x.reshape(rows).shape[-1])
        order[[i, j]] = torch.tensor([j, i])

        def moved(t: Tensor, order: Tensor) -> Tensor:
            return t.reshape(*t.shape[: t.ndim - len(shape)], *rows)[..., order].reshape(t.shape)

        inner, alike = self.case.score, order.clone()
        alike[j] = alike[i] = i
        x, refs = moved(self.case.x, alike), [moved(r, alike) for r in self.case.refs(subject.refs)]
        score: Score = inner
        if subject.one_channel or self.swap not in getattr(inner, "swaps", ()):
            score = composed(lambda f: lambda z: f(z) + f(moved(z, order)), inner)
        if not generic(score, x, refs):
            return INAPPLICABLE
        a = subject.build(score)(x, *refs, **subject.extra())
        residual = axioms.symmetry(lambda *_, **__: a, order)
        return float(residual(x, *refs)), 2 * self.rounding(subject, a.abs().amax())

    @classmethod
    def fits(cls, shape: Sequence[int]) -> bool:
        """Return whether there are two voxels to compare."""
        return math.prod(shape[1:]) > 1

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        one = draw.st.integers(0, math.prod(draw.shape[1:] if draw.one_channel else draw.shape) - 1)
        return draw.st.builds(cls, draw.case(), draw.st.tuples(one, one).filter(lambda v: v[0] < v[1]))
