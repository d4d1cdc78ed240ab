"""The law of scale of output, and the situations in which it is tried."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esegeta import axioms
from esegeta.conformance.lawbook import MethodLaw, law, stopping
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw


@law("scale_of_output")
@dataclass(frozen=True, repr=False)
class ScaleOfOutput(MethodLaw):
    """A score times a positive factor has that factor's attribution."""

    factor: float | int

    def measure(self, subject: Subject) -> tuple[float, float]:
        stated = lambda build: axioms.scale_of_output(build, self.case.score, factor=self.factor)
        residual, rounding = self.run(subject, subject.build, stated)
        return residual, rounding * (1 + self.factor) + 2 * self.factor * stopping(subject, self.case)

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        return draw.st.builds(cls, draw.case(), draw.st.sampled_from([2, 4, 0.5, 1.5, 3, 100]))
