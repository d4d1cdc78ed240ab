"""Laws: situations in which something can keep or break one axiom, registered for the kind of thing that they try.

A law is frozen data whose repr is the call that rebuilds it. ``measure`` returns the residual of the axiom there and
what is allowed: what rounding can do in this case, and for a sum over a path what its number of nodes can leave.
``drawn`` returns a Hypothesis strategy of such situations, from the ``Draw`` that it is given, so that a law can be
read and measured where Hypothesis is not installed. Each file of ``esegeta.conformance.laws`` holds one law of
methods, or a family of laws of another kind.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from esegeta._types import Explain, Score
from esegeta.conformance import cases, functions
from esegeta.conformance.cases import Case
from esegeta.conformance.subjects import Build, Subject
from esegeta.engine import check
from esegeta.engine.execution import ExecutionWarning

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw

Nested = Any  # numbers as nested tuples or lists, as deep as a tensor has axes
Measured = tuple[float, float]  # the residual, and what is allowed

INAPPLICABLE: Measured = (0.0, math.inf)  # the axiom says nothing about a situation
ABSURD: Measured = (math.inf, 0.0)  # no rounding explains the result

# The kinds of subjects, each with its laws by name; a transform is tried by the laws of methods.
KINDS = ("method", "reducer", "rewrite", "metric")
_LAWS: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}

Some = TypeVar("Some", bound=type)


def law(name: str, *, of: str = "method") -> Callable[[Some], Some]:
    """Register a law by a name, for one kind of subject.

    Args:
        name: of a method's law the axiom, a residual in ``esegeta.axioms``.
        of: the kind of subject: "method", "reducer", "rewrite" or "metric".
    """
    table = _LAWS[check.one_of("law", "of", of, KINDS)]

    def add(made: Some) -> Some:
        if name in table:
            advice = "Give it another name"
            raise check.refused("law", "a new name", f"{name!r}, a law of {table[name].__module__}", advice)
        # A counterexample is a call of the class, by its name alone.
        if any(known.__name__ == made.__name__ for known in every_law()):
            got, advice = f"{made.__name__}, which there is already", "Give the class another name"
            raise check.refused("law", "a class with a name of its own", got, advice)
        table[name] = made
        return made

    return add


def laws_for(kind: str) -> Mapping[str, Any]:
    """Return the laws of one kind of subject, by name."""
    return _LAWS[kind]


def every_law() -> Iterator[Any]:
    """Iterate over the laws of all kinds."""
    for table in _LAWS.values():
        yield from table.values()


class Law:
    """A situation in which a subject can keep or break one axiom."""

    trivial: Any = False  # or a property: whether hardly anything could break the axiom here

    def __repr__(self) -> str:
        return functions.call(self)

    @classmethod
    def applies(cls, subject: Any) -> str:
        """Return why the axiom says nothing about a subject; an empty text if it does."""
        return ""

    @classmethod
    def fits(cls, shape: Sequence[int]) -> bool:
        """Return whether there are situations with images of a shape ``(C,*S)``."""
        return True

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        """Return a strategy of situations."""
        raise NotImplementedError

    def measure(self, subject: Any) -> Measured:
        """Return the residual of the axiom here and what is allowed, or ``INAPPLICABLE``."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class MethodLaw(Law):
    """A case of a score and an image, put to a method."""

    case: Case

    @property
    def trivial(self) -> bool:
        """Return whether the score does not vary, so that it is explained by zeros."""
        return self.case.flat

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        """Return a strategy of cases."""
        return draw.st.builds(cls, draw.case())

    def run(self, subject: Subject, build: Build, residual: Callable[[Build], Any]) -> Measured:
        """Return the residual for this case, and what rounding may do given the largest attribution on the way."""
        largest = [self.case.x.new_zeros(())]

        def watching(score: Score) -> Explain:
            explain = build(score)

            def watched(x: Tensor, *refs: Tensor, **key: Any) -> Tensor:
                a = explain(x, *refs, **key)
                largest.append(a.abs().amax())
                return a

            return watched

        refs = self.case.refs(subject.refs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ExecutionWarning)
            value = residual(watching)(self.case.x, *refs, **subject.extra())
        if subject.accuracy and any(issubclass(w.category, ExecutionWarning) for w in caught):
            return INAPPLICABLE  # the method warned that it did not reach its tolerance
        return float(value.abs()), self.rounding(subject, *largest)

    def unless_flat(self, residual: float, allowed: float) -> Measured:
        """Ignore a failure where the score varies by rounding alone: there rounding decides where an optimum is."""
        return INAPPLICABLE if not residual <= allowed and self.case.flat else (residual, allowed)

    def rounding(self, subject: Subject, *values: Tensor) -> float:
        """Return what rounding may do at the points of the case."""
        return self.case.rounding(*values, terms=subject.terms(self.case.x) if subject.terms else 0)

    def rounding_of(self, subject: Subject, other: Score) -> float:
        """Return what rounding may do in another score at the points of the case."""
        return replace(self, case=replace(self.case, score=other)).rounding(subject)


def start(case: Case, subject: Subject) -> Tensor:
    """Return the point that an attribution starts from: its baselines, or zero."""
    refs = case.refs(subject.refs)
    return refs[-1] if refs else torch.zeros_like(case.x)


def starts(x: Tensor, refs: Sequence[Tensor]) -> list[Tensor]:
    """Return the baselines one by one, those of stacks too."""
    return [start for ref in refs for start in (ref.unbind() if ref.ndim > x.ndim else (ref,))]


def mask(x: Tensor, elements: Sequence[Any]) -> Tensor:
    """Return where in an image like x some elements are."""
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[list(elements)] = True
    return mask.reshape(x.shape)


def generic(score: Score, x: Tensor, refs: Sequence[Tensor]) -> bool:
    """Return whether the score has a derivative at the input and on the path to it; at a kink any slope is right."""
    return cases.generic(score, x, starts(x, refs or (torch.zeros_like(x),)))


def along_a_kink(score: Score, x: Tensor, refs: Sequence[Tensor]) -> bool:
    """Return whether a whole path from a reference lies in a kink: its sum of slopes jumps when it leaves it."""
    points = [start + cases.GOLDEN * (x - start) for start in starts(x, refs)]
    return not all(cases.differentiable(score, z) for z in points)


def no_stack(subject: Subject) -> str:
    """Return a reason if a subject starts from a stack of baselines."""
    return "it starts from a stack of baselines" if "baselines" in subject.refs else ""


def no_map(subject: Subject) -> str:
    """Return a reason if a subject gives one map for all channels."""
    return "it gives one map for all channels" if subject.one_channel else ""


def path(subject: Subject, case: Case) -> float:
    """Return what the subject's own quadrature or stopping rule can leave of a difference of scores."""
    begins = starts(case.x, [start(case, subject)])
    left = max(case.quadrature(subject.nodes, b) for b in begins) if subject.nodes else 0.0
    if not subject.accuracy:
        return left
    return left + subject.accuracy * max(float((case.score(case.x) - case.score(b)).abs()) for b in begins)


def stopping(subject: Subject, case: Case) -> float:
    """Return what a stopping rule can change: it may stop elsewhere if the last digit of a score changes."""
    return path(subject, case) if subject.accuracy else 0.0
