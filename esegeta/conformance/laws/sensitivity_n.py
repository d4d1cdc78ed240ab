"""The law of sensitivity n, and the situations in which it is tried."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esegeta import axioms
from esegeta.conformance.functions import Additive, Linear
from esegeta.conformance.lawbook import MethodLaw, law, mask, no_map, no_stack, path
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw


@law("sensitivity_n")
@dataclass(frozen=True, repr=False)
class SensitivityN(MethodLaw):
    """On additive scores the elements of any subset get what the score loses without them."""

    subset: tuple[int, ...]

    applies = classmethod(lambda cls, subject: no_stack(subject) or no_map(subject))

    def measure(self, subject: Subject) -> tuple[float, float]:
        subset = mask(self.case.x, self.subset)
        stated = lambda build: axioms.sensitivity_n(build(self.case.score), self.case.score, subset)
        residual, rounding = self.run(subject, subject.build, stated)
        return residual, rounding + path(subject, self.case)

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        plain = draw.strategies.functions(shape=draw.shape, kinds=("Linear", "Additive"))
        additive = draw.suiting(lambda f: isinstance(f, Linear | Additive), plain)
        subset = draw.st.lists(draw.element(), min_size=1, unique=True).map(lambda v: tuple(sorted(v)))
        return draw.st.builds(cls, draw.strategies.cases(additive, shape=draw.shape), subset)
