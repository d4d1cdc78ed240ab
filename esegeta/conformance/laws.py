"""The axioms as laws: in which situations each is put to a method, what remains of it there, and what may.

A situation is frozen data whose repr is the call that rebuilds it. ``measure`` gives the residual of
``esegeta.axioms`` and what is allowed there: what rounding can do in this case, and for a sum over a path what
its number of nodes can leave. Nothing is drawn here.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from esegeta import axioms, features
from esegeta._types import Explain, Score
from esegeta.axioms.composed import composed
from esegeta.conformance import cases, functions
from esegeta.conformance.cases import Case
from esegeta.conformance.subjects import Build, Subject
from esegeta.engine.execution import ExecutionWarning

Nested = Any  # numbers as nested tuples or lists, as deep as a tensor has axes

# The change of an input for which a continuous attribution may not jump, and one that is coarser.
FINE, COARSE = 2.0**-24, 2.0**-12
# What stands in the place of elements that a score ignores: on no kink.
HIDDEN = 0.7
# An attribution of which more than this share of its variance survives new upper parameters does not depend on them.
UNCHANGED = 0.5
# Of a situation about which an axiom says nothing: whatever remains is allowed.
SILENT = 0.0, math.inf


@dataclass(frozen=True, repr=False)
class Law:
    """A situation in which a method can keep or break one axiom."""

    case: Case

    def __repr__(self) -> str:
        return functions.call(self)

    @classmethod
    def applies(cls, subject: Subject) -> str:
        """Why the axiom says nothing about the subject; empty if it does."""
        return ""

    def measure(self, subject: Subject) -> tuple[float, float]:
        """What remains of the axiom here, and what may remain: ``SILENT`` if the axiom says nothing here."""
        raise NotImplementedError

    @property
    def trivial(self) -> bool:
        """Whether hardly anything could break the axiom here: a score that does not vary is explained by zeros."""
        return self.case.flat

    def _run(self, subject: Subject, build: Build, residual: Callable[[Build], Any]) -> tuple[float, float]:
        """The residual for this case, and what rounding may do given the largest attribution on the way."""
        largest = [self.case.x.new_zeros(())]

        def watching(score: Score) -> Explain:
            explain = build(score)

            def watched(x: Tensor, *refs: Tensor, **key: Any) -> Tensor:
                a = explain(x, *refs, **key)
                largest.append(a.abs().amax())
                return a

            return watched

        refs = self.case.refs(subject.refs)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", ExecutionWarning)
            value = residual(watching)(self.case.x, *refs, **subject.extra())
        if subject.accuracy and any(issubclass(w.category, ExecutionWarning) for w in said):
            return SILENT  # it says itself that it did not reach its tolerance
        return float(value.abs()), self._rounding(subject, *largest)

    def _unless_flat(self, residual: float, allowed: float) -> tuple[float, float]:
        """Where the score varies by rounding alone, rounding decides where an optimum is."""
        return SILENT if not residual <= allowed and self.case.flat else (residual, allowed)

    def _rounding(self, subject: Subject, *values: Tensor) -> float:
        return self.case.rounding(*values, terms=subject.terms(self.case.x) if subject.terms else 0)

    def _rounding_of(self, subject: Subject, other: Score) -> float:
        """What rounding may do in another score at the points of the case."""
        return replace(self, case=replace(self.case, score=other))._rounding(subject)


def _start(case: Case, subject: Subject) -> Tensor:
    """The point that an attribution starts from: its baselines, or zero."""
    refs = case.refs(subject.refs)
    return refs[-1] if refs else torch.zeros_like(case.x)


def _starts(x: Tensor, refs: Sequence[Tensor]) -> list[Tensor]:
    """The baselines one by one, those of stacks too."""
    return [start for ref in refs for start in (ref.unbind() if ref.ndim > x.ndim else (ref,))]


def _mask(x: Tensor, elements: Sequence[Any]) -> Tensor:
    """Where in an image like x these elements are."""
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[list(elements)] = True
    return mask.reshape(x.shape)


def _generic(score: Score, x: Tensor, refs: Sequence[Tensor]) -> bool:
    """Whether the score has a derivative at the input and on the path to it: elsewhere every slope is as good."""
    return cases.generic(score, x, _starts(x, refs or (torch.zeros_like(x),)))


def _along_a_kink(score: Score, x: Tensor, refs: Sequence[Tensor]) -> bool:
    """Whether a whole path from a reference lies in a kink: its sum of slopes jumps when it leaves it."""
    points = [start + cases.GOLDEN * (x - start) for start in _starts(x, refs)]
    return not all(cases.differentiable(score, z) for z in points)


def _no_stack(subject: Subject) -> str:
    return "it starts from a stack of baselines" if "baselines" in subject.refs else ""


def _no_map(subject: Subject) -> str:
    return "it gives one map for all channels" if subject.one_channel else ""


def _path(subject: Subject, case: Case) -> float:
    """What the subject's own quadrature or stopping rule can leave of a difference of scores."""
    starts = _starts(case.x, [_start(case, subject)])
    left = max(case.quadrature(subject.nodes, b) for b in starts) if subject.nodes else 0.0
    if not subject.accuracy:
        return left
    return left + subject.accuracy * max(float((case.score(case.x) - case.score(b)).abs()) for b in starts)


class Completeness(Law):
    """The attributions add up to the score's difference to the baseline."""

    def measure(self, subject: Subject) -> tuple[float, float]:
        stated = lambda build: axioms.completeness(build(self.case.score), self.case.score)
        residual, rounding = self._run(subject, subject.build, stated)
        allowed = rounding + _path(subject, self.case)
        if residual > allowed and subject.finer is not None:
            # Not the quadrature of the straight path, but one that converges: faster than by the first order.
            return self._run(subject, subject.finer, stated)[0], residual / 8 + rounding
        return residual, allowed


class Conservation(Law):
    """The attributions add up to the score."""

    def measure(self, subject: Subject) -> tuple[float, float]:
        stated = lambda build: axioms.conservation(build(self.case.score), self.case.score)
        residual, rounding = self._run(subject, subject.build, stated)
        return residual, rounding + _path(subject, self.case)


@dataclass(frozen=True, repr=False)
class SensitivityA(Law):
    """The only element that differs from the baseline is credited if the score differs."""

    element: int
    by: float | int

    applies = classmethod(lambda cls, subject: _no_stack(subject))
    trivial = False  # where the scores do not differ it is silent

    def measure(self, subject: Subject) -> tuple[float, float]:
        start = _start(self.case, subject)
        x = start.clone()
        x.view(-1)[self.element] += self.by
        refs = (start,) if subject.refs else ()
        score = self.case.score
        gap = float((score(x) - score(start)).abs())
        if gap <= self.case.rounding(score(x), score(start)):
            return SILENT  # the scores do not differ
        residual = axioms.sensitivity_a(subject.build(score), score)
        return float(residual(x, *refs, **subject.extra())), 0.0


@dataclass(frozen=True, repr=False)
class Dummy(Law):
    """Elements that the score does not depend on get nothing: those listed, and those that its formula cancels."""

    elements: tuple[int, ...]

    def measure(self, subject: Subject) -> tuple[float, float]:
        x, inner = self.case.x, self.case.score
        hidden = _mask(x, self.elements)
        ignored = hidden | inner.ignored(x.shape) if hasattr(inner, "ignored") else hidden
        if subject.one_channel:
            ignored = ignored.all(0, keepdim=True)
        if not ignored.any():
            return SILENT
        score = (
            composed(lambda f: lambda z: f(torch.where(hidden, HIDDEN, z)), inner) if self.elements else inner
        )
        stated = lambda build: axioms.dummy(build(score), ignored)
        return self._run(subject, subject.build, stated)


@dataclass(frozen=True, repr=False)
class Linearity(Law):
    """The attribution of a weighted sum of scores is the weighted sum of their attributions."""

    other: Score
    weights: tuple[float | int, float | int]

    @property
    def trivial(self) -> bool:
        """Both scores have to vary."""
        return self.case.flat or replace(self.case, score=self.other).flat

    def measure(self, subject: Subject) -> tuple[float, float]:
        stated = lambda build: axioms.linearity(build, self.case.score, self.other, weights=self.weights)
        residual, rounding = self._run(subject, subject.build, stated)
        rounding = max(rounding, self._rounding_of(subject, self.other))
        return residual, rounding * (1 + sum(abs(w) for w in self.weights))


@dataclass(frozen=True, repr=False)
class Symmetry(Law):
    """Elements that score, input and baseline cannot tell apart get the same."""

    swap: tuple[int, int]  # elements, or voxels for those that give one map for all channels

    def measure(self, subject: Subject) -> tuple[float, float]:
        i, j = self.swap
        shape = self.case.x.shape
        rows = (shape[0], -1) if subject.one_channel else (-1,)
        order = torch.arange(self.case.x.reshape(rows).shape[-1])
        order[[i, j]] = torch.tensor([j, i])

        def moved(t: Tensor, order: Tensor) -> Tensor:
            return t.reshape(*t.shape[: t.ndim - len(shape)], *rows)[..., order].reshape(t.shape)

        inner, alike = self.case.score, order.clone()
        alike[j] = alike[i] = i
        x, refs = moved(self.case.x, alike), [moved(r, alike) for r in self.case.refs(subject.refs)]
        score: Score = inner
        if subject.one_channel or self.swap not in getattr(inner, "swaps", ()):
            score = composed(lambda f: lambda z: f(z) + f(moved(z, order)), inner)
        if not _generic(score, x, refs):
            return SILENT
        a = subject.build(score)(x, *refs, **subject.extra())
        residual = axioms.symmetry(lambda *_, **__: a, order)
        return float(residual(x, *refs)), 2 * self._rounding(subject, a.abs().amax())


@dataclass(frozen=True, repr=False)
class ImplementationInvariance(Law):
    """Scores that are equal as functions get the same attribution. ``same`` equals the case's score."""

    same: Score

    def measure(self, subject: Subject) -> tuple[float, float]:
        first, second = self.case, replace(self.case, score=self.same)
        if not all(_generic(c.score, c.x, c.refs(subject.refs)) for c in (first, second)):
            return SILENT
        stated = lambda build: axioms.implementation_invariance(build, first.score, second.score)
        residual, rounding = self._run(subject, subject.build, stated)
        left = _path(subject, first) + _path(subject, second)
        return self._unless_flat(residual, max(rounding, second.rounding(residual)) + left)


@dataclass(frozen=True, repr=False)
class SensitivityN(Law):
    """On additive scores the elements of any subset get what the score loses without them."""

    subset: tuple[int, ...]

    applies = classmethod(lambda cls, subject: _no_stack(subject) or _no_map(subject))

    def measure(self, subject: Subject) -> tuple[float, float]:
        subset = _mask(self.case.x, self.subset)
        stated = lambda build: axioms.sensitivity_n(build(self.case.score), self.case.score, subset)
        residual, rounding = self._run(subject, subject.build, stated)
        return residual, rounding + _path(subject, self.case)


@dataclass(frozen=True, repr=False)
class Shift(Law):
    """Moving the input and the baselines, and the network with them, changes nothing."""

    offset: Nested

    def measure(self, subject: Subject) -> tuple[float, float]:
        offset = torch.as_tensor(self.offset).to(self.case.x)
        stated = lambda build: axioms.shift(build, self.case.score, offset)
        residual, rounding = self._run(subject, subject.build, stated)
        allowed = rounding * (1 + float(offset.abs().amax())) + 2 * _stopping(subject, self.case)
        return self._unless_flat(residual, allowed)


@dataclass(frozen=True, repr=False)
class ScaleOfOutput(Law):
    """A score times a positive factor has that factor's attribution."""

    factor: float | int

    def measure(self, subject: Subject) -> tuple[float, float]:
        stated = lambda build: axioms.scale_of_output(build, self.case.score, factor=self.factor)
        residual, rounding = self._run(subject, subject.build, stated)
        return residual, rounding * (1 + self.factor) + 2 * self.factor * _stopping(subject, self.case)


def _stopping(subject: Subject, case: Case) -> float:
    """A stopping rule may stop elsewhere if the last digit of a score changes."""
    return _path(subject, case) if subject.accuracy else 0.0


@dataclass(frozen=True, repr=False)
class EfficiencyOfRegions(Law):
    """The values of the parts add up to the score's difference to the baseline."""

    labels: Nested

    @classmethod
    def applies(cls, subject: Subject) -> str:
        return "it does not explain by parts" if subject.parts is None else _no_stack(subject)

    def measure(self, subject: Subject) -> tuple[float, float]:
        assert subject.parts is not None
        labels, score = torch.as_tensor(self.labels), self.case.score
        build = subject.parts(features.labels(labels))
        stated = lambda build: axioms.efficiency_of_regions(build(score), score, labels)
        return self._run(subject, build, stated)


@dataclass(frozen=True, repr=False)
class Continuity(Law):
    """A small change of the input is a small change of the attribution, but where a straight path lies in a kink."""

    direction: Nested

    def measure(self, subject: Subject) -> tuple[float, float]:
        refs = self.case.refs(subject.refs)
        if _along_a_kink(self.case.score, self.case.x, refs):
            return SILENT
        direction = torch.as_tensor(self.direction).to(self.case.x)

        def change(explain: Explain, size: float) -> float:
            residual = axioms.continuity(explain, size * direction)
            return float(residual(self.case.x, *refs, **subject.extra()))

        explain = subject.build(self.case.score)
        a = explain(self.case.x, *refs, **subject.extra())
        rounding = 4 * self._rounding(subject, a.abs().amax())
        # Of a continuous map less than half is left of a change after a step 4 096 times smaller; a jump stays.
        residual = change(explain, FINE)
        allowed = change(explain, COARSE) / 2 + rounding + _path(subject, self.case)
        if residual > allowed and subject.finer is not None:
            # The jump of a node at the end of the way, rather than that of the map: with more nodes it is smaller.
            return change(subject.finer(self.case.score), FINE), residual / 2 + rounding
        return residual, allowed


@dataclass(frozen=True, repr=False)
class ClassSensitivity(Law):
    """Classes that differ are explained differently. The other class is the case's score and ``more``."""

    more: Score

    @property
    def trivial(self) -> bool:
        """The classes have to differ."""
        return replace(self.case, score=self.more).flat

    def measure(self, subject: Subject) -> tuple[float, float]:
        other = composed(lambda f, g: lambda z: f(z) + g(z), self.case.score, self.more)
        stated = lambda build: axioms.class_sensitivity(build, self.case.score, other)
        residual, rounding = self._run(subject, subject.build, stated)
        # Classes that differ by rounding do not differ.
        rounding = max(rounding, self._rounding_of(subject, self.more))
        return (residual, 0.0) if residual > rounding else (0.0, 0.0)


@dataclass(frozen=True, repr=False)
class TranslationEquivariance(Law):
    """If image, baselines and network move along the grid, so does the attribution."""

    offsets: tuple[int, ...]

    def measure(self, subject: Subject) -> tuple[float, float]:
        stated = lambda build: axioms.translation_equivariance(build, self.case.score, self.offsets)
        return self._unless_flat(*self._run(subject, subject.build, stated))


@dataclass(frozen=True, repr=False)
class AffineEquivariance(Law):
    """If image, baselines and network are flipped or turned, so is the attribution."""

    matrix: tuple[tuple[int, ...], ...]

    def measure(self, subject: Subject) -> tuple[float, float]:
        matrix = torch.tensor(self.matrix)
        stated = lambda build: axioms.affine_equivariance(build, self.case.score, matrix)
        return self._unless_flat(*self._run(subject, subject.build, stated))


class Monotonicity(Law):
    """A score that rises with every element credits none below zero that lies above its baseline."""

    applies = classmethod(lambda cls, subject: _no_stack(subject) or _no_map(subject))

    def measure(self, subject: Subject) -> tuple[float, float]:
        stated = lambda build: axioms.monotonicity(build(self.case.score))
        return self._run(subject, subject.build, stated)


@dataclass(frozen=True, repr=False)
class ParameterDependence(Law):
    """New upper parameters of the network change the attribution. ``seeds`` draw them."""

    seeds: tuple[int, ...]
    trivial = False  # where slopes do not change either it is silent

    def measure(self, subject: Subject) -> tuple[float, float]:
        score, x = self.case.score, self.case.x
        others = [score.upper(s) for s in self.seeds]
        # There are networks whose slopes do not depend on the redrawn parameters either.
        slope = lambda f: lambda z: cases.gradients(f, z[None])[0]
        if not axioms.parameter_dependence(slope, score, others)(x) <= UNCHANGED / 2:
            return SILENT
        stated = lambda build: axioms.parameter_dependence(build, score, others)
        return self._run(subject, subject.build, stated)[0], UNCHANGED


LAWS: dict[str, type[Law]] = {
    "completeness": Completeness,
    "conservation": Conservation,
    "sensitivity_a": SensitivityA,
    "dummy": Dummy,
    "linearity": Linearity,
    "symmetry": Symmetry,
    "implementation_invariance": ImplementationInvariance,
    "sensitivity_n": SensitivityN,
    "shift": Shift,
    "scale_of_output": ScaleOfOutput,
    "efficiency_of_regions": EfficiencyOfRegions,
    "continuity": Continuity,
    "class_sensitivity": ClassSensitivity,
    "translation_equivariance": TranslationEquivariance,
    "affine_equivariance": AffineEquivariance,
    "monotonicity": Monotonicity,
    "parameter_dependence": ParameterDependence,
}
