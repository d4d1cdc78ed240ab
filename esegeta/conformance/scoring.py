"""Reducers and rewrites as subjects, and the situations of the laws that the scores which they make have to keep.

A reducer makes a score of a model, a rewrite a score of a score. As for methods, a situation is frozen data whose
repr is the call that rebuilds it, and ``measure`` gives what remains of a law there, and what may remain.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from esegeta._types import Score
from esegeta.conformance import cases, functions
from esegeta.conformance.cases import Case
from esegeta.conformance.lawbook import Law, laws_for

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw

Values = Any  # nested lists of numbers, or a tensor


@dataclass(frozen=True, repr=False)
class ReducerSubject:
    """A reducer under test: from a model, and the input at which a mask is frozen, to a score, with what it declares.

    output: "map", "vector" or "any", as the registry says; mask: whether it freezes one; differentiable: False for
    counts.
    """

    name: str
    build: Callable[[Any, Tensor], Score]
    output: str = "map"
    mask: bool = False
    differentiable: bool = True

    kind: ClassVar[str] = "reducer"

    @property
    def axioms(self) -> frozenset[str]:
        """The laws that say something about it: a reducer has to keep them all."""
        return frozenset(name for name, law in laws_for("reducer").items() if not law.applies(self))

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, repr=False)
class RewriteSubject:
    """A rewrite under test: from a score to one of the same values. ``refs``: the further tensors that it takes."""

    name: str
    build: Callable[..., Score]
    refs: tuple[str, ...] = ()

    kind: ClassVar[str] = "rewrite"

    @property
    def axioms(self) -> frozenset[str]:
        """A rewrite has to keep every law."""
        return frozenset(laws_for("rewrite"))

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, repr=False)
class ReducerLaw(Law):
    """A model, an input, and another one: masks are frozen at the first."""

    model: Any
    x: Values
    other: Values

    def __post_init__(self) -> None:
        for name in ("x", "other"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float64))

    def __repr__(self) -> str:
        tensors = ", ".join(cases.numbers(getattr(self, name)) for name in ("x", "other"))
        return f"{type(self).__name__}({functions.code(self.model)}, {tensors})"

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        """Return a strategy of models, each with two inputs."""
        return draw.st.builds(cls, draw.models(), draw.images(), draw.images())

    def score(self, subject: ReducerSubject) -> Score:
        """Return the score that the reducer makes of the model."""
        return subject.build(self.model, self.x)

    def rounding(self, *values: Tensor) -> float:
        """Return what rounding may do: a value adds up all voxels of both classes, behind all of the model."""
        size = max(float(self.model.majorant(z)) for z in (self.x, self.other)) * 2 * self.x.numel()
        largest = max([size, *(float(v.abs().amax()) for v in values if torch.isfinite(v).all())])
        return cases.DEVIATIONS * cases.PASSES * torch.finfo(self.x.dtype).eps * largest


@dataclass(frozen=True, repr=False)
class RewriteLaw(Law):
    """A case whose score is rewritten."""

    case: Case

    @property
    def trivial(self) -> bool:
        """Return whether the score does not vary, so that its derivatives are zero."""
        return self.case.flat

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        """Return a strategy of cases; most have activations, which rewrites are about."""
        return draw.st.builds(cls, draw.strategies.cases(draw.active(), shape=draw.shape))

    def rewritten(self, subject: RewriteSubject) -> Score:
        """Return the score with the derivatives of the subject."""
        return subject.build(self.case.score, *self.case.refs(subject.refs))
