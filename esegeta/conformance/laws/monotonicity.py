"""The law of monotonicity, and the situations in which it is tried."""

from typing import TYPE_CHECKING, Any

from esegeta import axioms
from esegeta.conformance.lawbook import MethodLaw, law, no_map, no_stack
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw


@law("monotonicity")
class Monotonicity(MethodLaw):
    """A score that rises with every element credits none below zero that lies above its baseline."""

    applies = classmethod(lambda cls, subject: no_stack(subject) or no_map(subject))

    def measure(self, subject: Subject) -> tuple[float, float]:
        stated = lambda build: axioms.monotonicity(build(self.case.score))
        return self.run(subject, subject.build, stated)

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        plain = draw.strategies.functions(shape=draw.shape, monotone=True)
        rising = draw.suiting(lambda f: getattr(f, "monotone", False), plain)
        return draw.st.builds(cls, draw.strategies.cases(rising, shape=draw.shape))
