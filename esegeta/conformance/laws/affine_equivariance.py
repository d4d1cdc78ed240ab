"""The law of affine equivariance, and the situations in which it is tried."""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from esegeta import axioms
from esegeta.conformance.lawbook import MethodLaw, law
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw


@law("affine_equivariance")
@dataclass(frozen=True, repr=False)
class AffineEquivariance(MethodLaw):
    """If image, baselines and network are flipped or turned, so is the attribution."""

    matrix: tuple[tuple[int, ...], ...]

    def measure(self, subject: Subject) -> tuple[float, float]:
        matrix = torch.tensor(self.matrix)
        stated = lambda build: axioms.affine_equivariance(build, self.case.score, matrix)
        return self.unless_flat(*self.run(subject, subject.build, stated))

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        return draw.st.builds(cls, draw.case(), draw.st.sampled_from(_turns(len(draw.shape) - 1)))


def _turns(axes: int) -> list[tuple[tuple[int, ...], ...]]:
    """Return the matrices that permute and flip axes."""
    return [
        tuple(tuple(sign if i == j else 0 for j in range(axes)) for i, sign in zip(order, signs, strict=True))
        for order in itertools.permutations(range(axes))
        for signs in itertools.product((1, -1), repeat=axes)
    ]
