"""The law of shift, and the situations in which it is tried."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from esegeta import axioms
from esegeta.conformance.lawbook import MethodLaw, Nested, law, stopping
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw


@law("shift")
@dataclass(frozen=True, repr=False)
class Shift(MethodLaw):
    """Moving the input and the baselines, and the network with them, changes nothing."""

    offset: Nested

    def measure(self, subject: Subject) -> tuple[float, float]:
        offset = torch.as_tensor(self.offset).to(self.case.x)
        stated = lambda build: axioms.shift(build, self.case.score, offset)
        residual, rounding = self.run(subject, subject.build, stated)
        allowed = rounding * (1 + float(offset.abs().amax())) + 2 * stopping(subject, self.case)
        return self.unless_flat(residual, allowed)

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        return draw.st.builds(cls, draw.case(), draw.images())
