"""The law of parameter dependence, and the situations in which it is tried."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esegeta import axioms
from esegeta.conformance import cases
from esegeta.conformance.cases import Case
from esegeta.conformance.lawbook import INAPPLICABLE, MethodLaw, law
from esegeta.conformance.subjects import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw

# An attribution of which more than this share of its variance survives new upper parameters does not depend on them.
UNCHANGED = 0.5


@law("parameter_dependence")
@dataclass(frozen=True, repr=False)
class ParameterDependence(MethodLaw):
    """New upper parameters of the network change the attribution. ``seeds`` draw them."""

    seeds: tuple[int, ...]
    trivial = False  # where slopes do not change either it is silent

    def measure(self, subject: Subject) -> tuple[float, float]:
        score, x = self.case.score, self.case.x
        others = [score.upper(s) for s in self.seeds]
        # There are networks whose slopes do not depend on the redrawn parameters either.
        slope = lambda f: lambda z: cases.gradients(f, z[None])[0]
        if not axioms.parameter_dependence(slope, score, others)(x) <= UNCHANGED / 2:
            return INAPPLICABLE
        stated = lambda build: axioms.parameter_dependence(build, score, others)
        return self.run(subject, subject.build, stated)[0], UNCHANGED

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        # Correlations need elements, and an image that does not decide the map by itself: ones and minus ones.
        # Upper parameters are lost in rectifiers: most of the networks are chains of them.
        shape = (draw.shape[0], *{1: (16,), 2: (5, 5), 3: (3, 3, 3)}[len(draw.shape) - 1])
        st, n, nested = draw.st, math.prod(shape), draw.strategies.nested
        x = st.lists(st.sampled_from([1, -1]), min_size=n, max_size=n).map(lambda v: nested(v, shape))
        nothing = nested([0] * n, shape)
        deep = draw.suiting(_has_upper, draw.deep(shape, _has_upper))
        case = st.builds(Case, deep, x, st.just(nothing), st.just([nothing, nothing]))
        return st.builds(cls, case, st.just(tuple(range(1, 9))))


def _has_upper(score: Any) -> bool:
    return bool(getattr(score, "has_upper", False))
