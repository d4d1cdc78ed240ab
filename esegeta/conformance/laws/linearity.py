"""The law of linearity, and the situations in which it is tried."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from esegeta import axioms
from esegeta._types import Score
from esegeta.conformance.lawbook import MethodLaw, law
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw


@law("linearity")
@dataclass(frozen=True, repr=False)
class Linearity(MethodLaw):
    """The attribution of a weighted sum of scores is the weighted sum of their attributions."""

    other: Score
    weights: tuple[float | int, float | int]

    @property
    def trivial(self) -> bool:
        """Both scores have to vary."""
        return self.case.flat or replace(self.case, score=self.other).flat

    def measure(self, subject: Subject) -> tuple[float, float]:
        stated = lambda build: axioms.linearity(build, self.case.score, self.other, weights=self.weights)
        residual, rounding = self.run(subject, subject.build, stated)
        rounding = max(rounding, self.rounding_of(subject, self.other))
        return residual, rounding * (1 + sum(abs(w) for w in self.weights))

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        weights = draw.st.tuples(draw.not_zero(), draw.not_zero())
        return draw.st.builds(cls, draw.case(), draw.scores(), weights)
