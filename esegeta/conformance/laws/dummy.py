"""The law of dummy, and the situations in which it is tried."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from esegeta import axioms
from esegeta.axioms.composed import composed
from esegeta.conformance.lawbook import INAPPLICABLE, MethodLaw, law, mask
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw

HIDDEN = 0.7  # replaces elements that a score ignores; no kink lies there


@law("dummy")
@dataclass(frozen=True, repr=False)
class Dummy(MethodLaw):
    """Elements that the score does not depend on get nothing: those listed, and those that its formula cancels."""

    elements: tuple[int, ...]

    def measure(self, subject: Subject) -> tuple[float, float]:
        x, inner = self.case.x, self.case.score
        hidden = mask(x, self.elements)
        ignored = hidden | inner.ignored(x.shape) if hasattr(inner, "ignored") else hidden
        if subject.one_channel:
            ignored = ignored.all(0, keepdim=True)
        if not ignored.any():
            return INAPPLICABLE
        score = (
            composed(lambda f: lambda z: f(torch.where(hidden, HIDDEN, z)), inner) if self.elements else inner
        )
        stated = lambda build: axioms.dummy(build(score), ignored)
        return self.run(subject, subject.build, stated)

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        # For one map of all channels whole voxels have to be ignored.
        st, channels, voxels = draw.st, draw.shape[0], math.prod(draw.shape[1:])
        which = st.lists(st.integers(0, voxels - 1), max_size=voxels, unique=True)
        if draw.one_channel:
            elements = which.map(
                lambda vs: tuple(c * voxels + v for c in range(channels) for v in sorted(vs))
            )
        else:
            elements = st.lists(draw.element(), max_size=math.prod(draw.shape), unique=True).map(
                lambda v: tuple(sorted(v))
            )
        return st.builds(cls, draw.case(), elements)
