"""The law of efficiency of regions, and the situations in which it is tried."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from esegeta import axioms, features
from esegeta.conformance.lawbook import MethodLaw, Nested, law, no_stack
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw


@law("efficiency_of_regions")
@dataclass(frozen=True, repr=False)
class EfficiencyOfRegions(MethodLaw):
    """The values of the parts add up to the score's difference to the baseline."""

    labels: Nested

    @classmethod
    def applies(cls, subject: Subject) -> str:
        return "it does not explain by parts" if subject.parts is None else no_stack(subject)

    def measure(self, subject: Subject) -> tuple[float, float]:
        assert subject.parts is not None
        labels, score = torch.as_tensor(self.labels), self.case.score
        build = subject.parts(features.labels(labels))
        stated = lambda build: axioms.efficiency_of_regions(build(score), score, labels)
        return self.run(subject, build, stated)

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        def label(flat: list[int]) -> Any:
            ranks = {v: i for i, v in enumerate(sorted(set(flat)))}
            return draw.strategies.nested([ranks[v] for v in flat], draw.shape[1:])

        n = math.prod(draw.shape[1:])
        labels = draw.st.lists(draw.st.integers(0, 3), min_size=n, max_size=n).map(label)
        return draw.st.builds(cls, draw.case(), labels)
