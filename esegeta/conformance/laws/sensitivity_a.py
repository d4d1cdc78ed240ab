"""The law of sensitivity a, and the situations in which it is tried."""

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from esegeta import axioms
from esegeta.conformance.lawbook import INAPPLICABLE, MethodLaw, law, no_stack, start
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw


@law("sensitivity_a")
@dataclass(frozen=True, repr=False)
class SensitivityA(MethodLaw):
    """The only element that differs from the baseline is credited if the score differs."""

    element: int
    by: float | int

    applies = classmethod(lambda cls, subject: no_stack(subject))
    trivial = False  # where the scores do not differ it is silent

    def measure(self, subject: Subject) -> tuple[float, float]:
        begin = start(self.case, subject)
        x = begin.clone()
        x.view(-1)[self.element] += self.by
        refs = (begin,) if subject.refs else ()
        score = self.case.score
        gap = float((score(x) - score(begin)).abs())
        if gap <= self.case.rounding(score(x), score(begin)):
            return INAPPLICABLE  # the scores do not differ
        residual = axioms.sensitivity_a(subject.build(score), score)
        return float(residual(x, *refs, **subject.extra())), 0.0

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        # Most methods that are blind are blind behind a kink of the very element that changes.
        st, any_score = draw.st, draw.kinked() | draw.scores()
        no_other = draw.networks_only or draw.chosen is not None

        @functools.cache
        def at(element: int) -> "SearchStrategy[Any]":
            own = any_score if no_other else draw.of_one_element(st.just(element)) | any_score
            case = draw.strategies.cases(own, shape=draw.shape)
            return st.builds(cls, case, st.just(element), draw.not_zero(4))

        def aimed(law: Any, target: float | None) -> Any:
            by = 0.0 if target is None else target - float(law.case.baseline.flatten()[law.element])
            return replace(law, by=by) if by else law

        # Some end right behind a kink, so that few points of the way to it lie behind.
        ends = st.sampled_from([None, None, 0.25, 1.25, -0.25, -1.25])
        return st.builds(aimed, draw.element().flatmap(at), ends)
