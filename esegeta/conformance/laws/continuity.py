"""The law of continuity, and the situations in which it is tried."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from esegeta import axioms
from esegeta._types import Explain
from esegeta.conformance import cases
from esegeta.conformance.lawbook import INAPPLICABLE, MethodLaw, Nested, along_a_kink, law, path
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw

# The change of an input for which a continuous attribution may not jump, and one that is coarser.
FINE, COARSE = 2.0**-24, 2.0**-12


@law("continuity")
@dataclass(frozen=True, repr=False)
class Continuity(MethodLaw):
    """A small change of the input is a small change of the attribution, but where a straight path lies in a kink."""

    direction: Nested

    def measure(self, subject: Subject) -> tuple[float, float]:
        refs = self.case.refs(subject.refs)
        if along_a_kink(self.case.score, self.case.x, refs):
            return INAPPLICABLE
        direction = torch.as_tensor(self.direction).to(self.case.x)

        def change(explain: Explain, size: float) -> float:
            residual = axioms.continuity(explain, size * direction)
            return float(residual(self.case.x, *refs, **subject.extra()))

        explain = subject.build(self.case.score)
        a = explain(self.case.x, *refs, **subject.extra())
        rounding = 4 * self.rounding(subject, a.abs().amax())
        # Of a continuous map less than half is left of a change after a step 4 096 times smaller; a jump stays.
        residual = change(explain, FINE)
        allowed = change(explain, COARSE) / 2 + rounding + path(subject, self.case)
        if residual > allowed and subject.finer is not None:
            # The jump of a node at the end of the way, rather than that of the map: with more nodes it is smaller.
            return change(subject.finer(self.case.score), FINE), residual / 2 + rounding
        return residual, allowed

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        # Maps jump at kinks, where no image lies by chance.
        kinks = draw.st.builds(cls, draw.kinked_case(), draw.images()).map(_at_a_kink)
        return kinks | draw.st.builds(cls, draw.case(), draw.images())


def _at_a_kink(situation: Any) -> Any:
    """Move the image right before the next kink on its way from the baseline, and step across it, if there is one."""
    case = situation.case
    place = cases.kink(case.score, case.x, case.baseline)
    if place is None:
        return situation
    line = case.x - case.baseline
    moved = replace(case, x=case.baseline + place * line)
    return replace(situation, case=moved, direction=line.tolist())
