"""The law of translation equivariance, and the situations in which it is tried."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esegeta import axioms
from esegeta.conformance.lawbook import MethodLaw, law
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw


@law("translation_equivariance")
@dataclass(frozen=True, repr=False)
class TranslationEquivariance(MethodLaw):
    """If image, baselines and network move along the grid, so does the attribution."""

    offsets: tuple[int, ...]

    def measure(self, subject: Subject) -> tuple[float, float]:
        stated = lambda build: axioms.translation_equivariance(build, self.case.score, self.offsets)
        return self.unless_flat(*self.run(subject, subject.build, stated))

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        offsets = draw.st.tuples(*[draw.st.integers(-1, 1)] * (len(draw.shape) - 1)).filter(any)
        return draw.st.builds(cls, draw.case(), offsets)
