"""Reducers and rewrites as subjects: what makes scores, and the laws that scores which they make have to keep.

A reducer makes a score of a model, a rewrite a score of a score. As for methods, a situation is frozen data whose
repr is the call that rebuilds it, and ``measure`` gives what remains of a law there, and what may remain.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from esegeta._facts import declared
from esegeta._types import Score
from esegeta.conformance import cases, functions
from esegeta.conformance.cases import Case
from esegeta.conformance.laws import SILENT
from esegeta.engine.gradient import refuse_forward_only
from esegeta.rules.rewriting import coverage

Values = Any  # nested lists of numbers, or a tensor
Measured = tuple[float, float]
ABSURD = math.inf, 0.0  # what no rounding explains


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

    @property
    def axioms(self) -> frozenset[str]:
        """All that says something about it: a reducer has to keep every law."""
        return frozenset(name for name, law in REDUCER_LAWS.items() if not law.applies(self))

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, repr=False)
class RewriteSubject:
    """A rewrite under test: from a score to one of the same values. ``refs``: the further tensors that it takes."""

    name: str
    build: Callable[..., Score]
    refs: tuple[str, ...] = ()

    @property
    def axioms(self) -> frozenset[str]:
        """A rewrite has to keep every law."""
        return frozenset(REWRITE_LAWS)

    def __repr__(self) -> str:
        return self.name


# -- reducers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class ReducerLaw:
    """A model, an input, and another one: masks are frozen at the first."""

    model: Any
    x: Values
    other: Values

    trivial = False

    def __post_init__(self) -> None:
        for name in ("x", "other"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float64))

    def __repr__(self) -> str:
        tensors = ", ".join(cases.numbers(getattr(self, name)) for name in ("x", "other"))
        return f"{type(self).__name__}({functions.code(self.model)}, {tensors})"

    @classmethod
    def applies(cls, subject: ReducerSubject) -> str:
        """Why the law says nothing about the subject; empty if it does."""
        return ""

    def measure(self, subject: ReducerSubject) -> Measured:
        """What remains of the law here, and what may remain."""
        raise NotImplementedError

    def score(self, subject: ReducerSubject) -> Score:
        """What the reducer makes of the model."""
        return subject.build(self.model, self.x)

    def rounding(self, *values: Tensor) -> float:
        """What rounding may do: a value adds up all voxels of both classes, behind all of the model."""
        size = max(float(self.model.majorant(z)) for z in (self.x, self.other)) * 2 * self.x.numel()
        largest = max([size, *(float(v.abs().amax()) for v in values if torch.isfinite(v).all())])
        return cases.DEVIATIONS * cases.PASSES * torch.finfo(self.x.dtype).eps * largest


class OneNumber(ReducerLaw):
    """The score of every input is one finite number of the input's type."""

    def measure(self, subject: ReducerSubject) -> Measured:
        """What remains, and what may."""
        score = self.score(subject)
        for z in (self.x, self.other):
            y = score(z)
            if not isinstance(y, Tensor) or y.shape != () or y.dtype != z.dtype or not torch.isfinite(y):
                return ABSURD
        return 0.0, 0.0


class Pure(ReducerLaw):
    """The score writes to no input, draws nothing, and is the same again."""

    def measure(self, subject: ReducerSubject) -> Measured:
        """What remains, and what may."""
        before, state, score = self.other.clone(), torch.get_rng_state(), self.score(subject)
        first = score(self.other)
        same = torch.equal(before, self.other) and torch.equal(state, torch.get_rng_state())
        return (float((first - score(self.other)).abs()), 0.0) if same else ABSURD


class Batches(ReducerLaw):
    """A batch has the scores of its examples, one by one."""

    def measure(self, subject: ReducerSubject) -> Measured:
        """What remains, and what may."""
        score, xs = self.score(subject), torch.stack([self.x, self.other])
        loop = torch.stack([score(z) for z in xs])
        return float((vmap(score)(xs) - loop).abs().amax()), self.rounding(loop)


class FrozenMask(ReducerLaw):
    """The mask stays that of the first input: on the way to another one the score does not jump."""

    @classmethod
    def applies(cls, subject: ReducerSubject) -> str:
        """Only those that freeze a mask and have a gradient."""
        if not subject.mask:
            return "it freezes no mask"
        return "" if subject.differentiable else "a count jumps"

    def measure(self, subject: ReducerSubject) -> Measured:
        """What remains, and what may."""
        score = self.score(subject)
        low, width, jump = 0.0, 1.0, math.inf
        while width > cases.CLOSE:
            at = low + width * torch.linspace(0, 1, cases.LOOKS, dtype=self.x.dtype)
            values = vmap(score)(self.x + at.reshape(-1, *[1] * self.x.ndim) * (self.other - self.x))
            jumps = values.diff().abs()
            where = int(jumps.argmax())
            jump, allowed = (
                float(jumps[where]),
                self.rounding(values) + 2 * cases.CLOSE * float(values.abs().amax()),
            )
            if jump <= allowed:
                break
            low, width = float(at[where]), width / (cases.LOOKS - 1)
        # Of what is steep, but does not jump, a step of 2^-50 leaves next to nothing.
        return jump, allowed + cases.NEAR * (1 + float(values.abs().amax()))


class TrueGradient(ReducerLaw):
    """The gradient adds up to what the score gains; a score declared to have none is refused where one is needed."""

    def measure(self, subject: ReducerSubject) -> Measured:
        """What remains, and what may."""
        score = self.score(subject)
        if not subject.differentiable:
            try:
                refuse_forward_only(subject.name, score)
            except ValueError:
                return 0.0, 0.0
            return ABSURD
        line = self.other - self.x

        def gained(nodes: int) -> tuple[Tensor, Tensor]:
            t, w = (line.new_tensor(v) for v in cases.gauss(nodes))
            points = self.x + t.reshape(-1, *[1] * line.ndim) * line
            slopes = (cases.gradients(score, points) * line).flatten(1).sum(1)
            return (w * slopes).sum(), slopes

        (coarse, _), (fine, slopes) = gained(8), gained(32)
        gain = score(self.other) - score(self.x)
        # What the quadrature can leave: what changed with more nodes, and at kinks the variation of the slope.
        bends = float(slopes.diff().abs().sum()) * cases.discrepancy(32)
        return float((fine - gain).abs()), 4 * float((fine - coarse).abs()) + bends + self.rounding(gain)


REDUCER_LAWS: dict[str, type[ReducerLaw]] = {
    "one_number": OneNumber,
    "pure": Pure,
    "batches": Batches,
    "frozen_mask": FrozenMask,
    "true_gradient": TrueGradient,
}


# -- rewrites ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class RewriteLaw:
    """A case whose score is rewritten."""

    case: Case

    def __repr__(self) -> str:
        return functions.call(self)

    @property
    def trivial(self) -> bool:
        """Of a score that does not vary there are no derivatives."""
        return self.case.flat

    @classmethod
    def applies(cls, subject: RewriteSubject) -> str:
        """Why the law says nothing about the subject; empty if it does."""
        return ""

    def measure(self, subject: RewriteSubject) -> Measured:
        """What remains of the law here, and what may remain."""
        raise NotImplementedError

    def rewritten(self, subject: RewriteSubject) -> Score:
        """The score with the derivatives of the subject."""
        return subject.build(self.case.score, *self.case.refs(subject.refs))


class SameValues(RewriteLaw):
    """The rewritten score has the values of the score, for one example and for a batch."""

    def measure(self, subject: RewriteSubject) -> Measured:
        """What remains, and what may."""
        score, made, x = self.case.score, self.rewritten(subject), self.case.x
        xs = torch.stack([x, self.case.baseline])
        loop = [made(z) for z in xs]
        if not all(isinstance(y, Tensor) and y.shape == () and y.dtype == x.dtype for y in loop):
            return ABSURD
        plain = torch.stack([score(z) for z in xs])
        off = [(torch.stack(loop) - plain).abs().amax(), (vmap(made)(xs) - plain).abs().amax()]
        return float(torch.stack(off).amax()), self.case.rounding(plain)


class DeclaredDifferences(RewriteLaw):
    """Where no operation is reported as rewritten, the derivative is the plain one."""

    def measure(self, subject: RewriteSubject) -> Measured:
        """What remains, and what may."""
        made, x = self.rewritten(subject), self.case.x
        if not declared(made).rewritten:
            return SILENT  # it does not say what it does
        if any(what == "rewritten" for _, what in coverage(made, x)):
            return 0.0, 0.0  # whatever differs, it says so
        plain = grad(self.case.score)(x)
        return float((grad(made)(x) - plain).abs().amax()), self.case.rounding(plain)


class BatchesOfDerivatives(RewriteLaw):
    """A batch has the derivatives of its examples, one by one."""

    def measure(self, subject: RewriteSubject) -> Measured:
        """What remains, and what may."""
        made, xs = self.rewritten(subject), torch.stack([self.case.x, self.case.x.flip(-1) / 2 + 0.125])
        loop = torch.stack([grad(made)(z) for z in xs])
        return float((vmap(grad(made))(xs) - loop).abs().amax()), self.case.rounding(loop)


class TrueSecondDerivative(RewriteLaw):
    """A derivative of the derivatives is right, or it is refused."""

    def measure(self, subject: RewriteSubject) -> Measured:
        """What remains, and what may."""
        made, x = self.rewritten(subject), self.case.x
        if not cases.generic(self.case.score, x, (self.case.baseline,)):
            return SILENT
        weights = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)
        slope = lambda z: (grad(made)(z) * weights).sum()
        along = lambda h: float((slope(x + h * weights) - slope(x - h * weights)) / (2 * h))
        near, nearer = along(2.0**-16), along(2.0**-18)
        try:
            second = float((grad(slope)(x) * weights).sum())
        except (NotImplementedError, RuntimeError):
            return 0.0, 0.0
        # Measured with two steps: what they differ by, and the rounding of a difference over such a step.
        return abs(second - nearer), 4 * abs(near - nearer) + 2.0**19 * self.case.rounding(near, second)


REWRITE_LAWS: dict[str, type[RewriteLaw]] = {
    "same_values": SameValues,
    "declared_differences": DeclaredDifferences,
    "batches_of_derivatives": BatchesOfDerivatives,
    "true_second_derivative": TrueSecondDerivative,
}
