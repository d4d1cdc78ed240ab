"""The law of class sensitivity, and the situations in which it is tried."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from esegeta import axioms
from esegeta._types import Score
from esegeta.axioms.composed import composed
from esegeta.conformance.lawbook import MethodLaw, law
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw


@law("class_sensitivity")
@dataclass(frozen=True, repr=False)
class ClassSensitivity(MethodLaw):
    """Classes that differ are explained differently. The other class is the case's score and ``more``."""

    more: Score

    @property
    def trivial(self) -> bool:
        """The classes have to differ."""
        return replace(self.case, score=self.more).flat

    def measure(self, subject: Subject) -> tuple[float, float]:
        other = composed(lambda f, g: lambda z: f(z) + g(z), self.case.score, self.more)
        stated = lambda build: axioms.class_sensitivity(build, self.case.score, other)
        residual, rounding = self.run(subject, subject.build, stated)
        # Classes that differ by rounding do not differ.
        rounding = max(rounding, self.rounding_of(subject, self.more))
        return (residual, 0.0) if residual > rounding else (0.0, 0.0)

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        return draw.st.builds(cls, draw.case(), draw.kinked() | draw.scores())
