"""The law of implementation invariance, and the situations in which it is tried."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from esegeta import axioms
from esegeta._types import Score
from esegeta.conformance.lawbook import INAPPLICABLE, MethodLaw, generic, law, path
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw


@law("implementation_invariance")
@dataclass(frozen=True, repr=False)
class ImplementationInvariance(MethodLaw):
    """Scores that are equal as functions get the same attribution. ``same`` equals the case's score."""

    same: Score

    def measure(self, subject: Subject) -> tuple[float, float]:
        first, second = self.case, replace(self.case, score=self.same)
        if not all(generic(c.score, c.x, c.refs(subject.refs)) for c in (first, second)):
            return INAPPLICABLE
        stated = lambda build: axioms.implementation_invariance(build, first.score, second.score)
        residual, rounding = self.run(subject, subject.build, stated)
        left = path(subject, first) + path(subject, second)
        return self.unless_flat(residual, max(rounding, second.rounding(residual)) + left)

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        def of(pair: Any) -> "SearchStrategy[Any]":
            case = draw.strategies.cases(draw.st.just(pair.first), shape=draw.shape)
            return draw.st.builds(cls, case, draw.st.just(pair.second))

        return draw.equal().flatmap(of)
