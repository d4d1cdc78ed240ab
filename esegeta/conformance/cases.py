"""A case: a score, an input and its references, with the tolerances that follow from them.

Tolerances are derived. What rounding can do follows from the precision, the number of operations and the size of
what is added up; what a quadrature can leave follows from the degree of a polynomial, the breakpoints of a
piecewise linear score, or the convergence of the quadrature itself.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vmap

from esegeta._facts import declared
from esegeta._types import Score
from esegeta.axioms import exact
from esegeta.conformance.functions import chosen, code
from esegeta.conformance.networks import TYPES
from esegeta.engine import check

# Errors of n roundings add up like steps of a random walk: beyond six of its standard deviations is beyond doubt.
# Two computations are compared, each with a forward and a backward pass.
DEVIATIONS = 6
PASSES = 4
NEAR = 2.0**-20  # where the other side of a kink is looked for
GOLDEN = (5**0.5 - 1) / 2  # a point of the path where nobody puts a kink
LOOKS = 33  # how many points are looked at for a kink, again and again
CLOSE = 2.0**-50  # and how close to it that ends: before it nothing but rounding is left
FINER = 4  # a quadrature is judged by one with so many times more nodes

Values = Any  # nested lists of numbers, or a tensor


@dataclass(frozen=True, repr=False, eq=False)
class Case:
    """A score with an input, a baseline and a stack of baselines. Numbers may be given as nested lists.

    >>> from esegeta.conformance.functions import Linear
    >>> case = Case(Linear((1, 2)), [[3, 4]], [[0, 0]], [[[0, 0]], [[1, 1]]])
    >>> case
    Case(Linear((1, 2)), [[3, 4]], [[0, 0]], [[[0, 0]], [[1, 1]]])
    >>> case.quadrature(1)
    0.0
    """

    score: Any
    x: Values
    baseline: Values
    baselines: Values
    dtype: str = "float64"

    def __post_init__(self) -> None:
        chosen("Case", "dtype", self.dtype, TYPES)
        for name in ("x", "baseline", "baselines"):
            held = torch.as_tensor(getattr(self, name), dtype=TYPES[self.dtype])
            object.__setattr__(self, name, held)
        if self.baseline.shape != self.x.shape or self.baselines.shape[1:] != self.x.shape:
            raise check.refused(
                "Case",
                f"a baseline of shape {tuple(self.x.shape)} and a stack of such",
                f"{tuple(self.baseline.shape)} and {tuple(self.baselines.shape)}",
                "Give all of them the shape of x",
            )
        if hasattr(self.score, "to"):
            object.__setattr__(self, "score", self.score.to(self.dtype))

    def __repr__(self) -> str:
        tensors = ", ".join(numbers(getattr(self, name)) for name in ("x", "baseline", "baselines"))
        rest = "" if self.dtype == fields(self)[-1].default else f", dtype={self.dtype!r}"
        return f"Case({code(self.score)}, {tensors}{rest})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Case) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def shape(self) -> tuple[Any, ...]:
        """``(C,*S)``."""
        return tuple(self.x.shape)

    def refs(self, kinds: Sequence[Any]) -> tuple[Any, ...]:
        """Return the references of these kinds: ``"baseline"`` and ``"baselines"``."""
        return tuple(getattr(self, kind) for kind in kinds)

    @property
    def starts(self) -> tuple[Any, ...]:
        """All baselines."""
        return (self.baseline, *self.baselines.unbind())

    @cached_property
    def size(self) -> float:
        """Return what no value inside the score exceeds at the input and the baselines, even if nothing cancels."""
        return float(torch.stack([self.score.majorant(z).double() for z in (self.x, *self.starts)]).amax())

    @cached_property
    def generic(self) -> bool:
        """Return whether no kink of the score lies at the input, at a baseline, or all along the way between them.

        There implementations of one function may choose different slopes, and all of them are right.
        """
        return generic(self.score, self.x, self.starts, NEAR if self.dtype == "float64" else NEAR**0.5)

    @cached_property
    def flat(self) -> bool:
        """Return whether the score does not vary, but for rounding, at the input and on the way to the baselines."""
        points = torch.stack([self.x, *(s + t * (self.x - s) for s in self.starts for t in (0.0, GOLDEN))])
        values = torch.stack([self.score(z) for z in points])
        slopes = gradients(self.score, points).abs().amax()
        return float(torch.maximum(slopes, (values - values[0]).abs().amax())) <= self.rounding()

    def rounding(self, *values: Tensor | float | int, terms: int = 0) -> float:
        r"""Return what two ways to compute the same may differ by, absolutely.

        .. math:: 6 \cdot 4 \cdot u \sqrt{n} \cdot \max(M, |v|)

        u is the unit roundoff, n the number of operations behind a value, M what nothing inside the score
        exceeds at the input and the baselines, v the values that are compared. Errors of n roundings add up
        to more than :math:`6 u \sqrt{n}` with a probability below 1e-7 (Higham and Mary 2019).

        Args:
            values: what is compared.
            terms: how many values of the score are added up to get them, where those are many.

        Returns:
            An absolute bound.
        """
        sizes = [float(torch.as_tensor(v).abs().amax()) for v in values]
        largest = max([self.size, *(s for s in sizes if s < math.inf)])  # the infinite excuses nothing
        unit = torch.finfo(TYPES[self.dtype]).eps / 2
        operations = self.score.operations + self.x.numel() + terms
        return DEVIATIONS * PASSES * unit * float(np.sqrt(operations)) * largest

    def quadrature(self, nodes: int, start: Tensor | None = None) -> float:
        r"""Return what a Gauss-Legendre quadrature with so many nodes may leave of F(x) - F(x') on the straight path.

        Polynomials of degree d: nothing if :math:`2 n \ge d`. Piecewise linear scores: the total variation of
        the slope along the path, times the discrepancy of the nodes (Koksma). Others: the change of all
        elements together from n to 4 n nodes, plus what 4 n nodes leave of the difference.

        Args:
            nodes: how many gradients are added up.
            start: the baseline; without one the worst of all baselines of the case.

        Returns:
            An absolute bound, without rounding.
        """
        if start is None:
            return max(self.quadrature(nodes, start) for start in self.starts)
        degree = self.score.degree
        if degree is not None and 2 * nodes >= degree:
            return 0.0
        x, start = self.x.double(), start.double()
        score = self.score.to("float64") if hasattr(self.score, "to") else self.score
        if torch.equal(x, start):
            return 0.0
        if self.score.piecewise_linear:
            return float(exact.variation(score, x, start)) * discrepancy(nodes)
        return by_refinement(score, x, start, nodes)


def gradients(score: Score, points: Tensor) -> Tensor:
    """Return the gradients at a stack of points: where the score has a module by plain autograd on one batch."""
    module = declared(score).module
    if module is None:
        return vmap(grad(score))(points)
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        return torch.autograd.grad(module(leaf).sum(), leaf)[0]


def generic(score: Score, x: Tensor, starts: Sequence[Any], step: float = NEAR) -> bool:
    """Return whether no kink lies at x, at one of the starts, or at a point of the way from it that nobody chose."""
    points = [x, *(start + t * (x - start) for start in starts for t in (0.0, GOLDEN))]
    return all(differentiable(score, z, step) for z in points)


def differentiable(score: Score, x: Tensor, step: float = NEAR) -> bool:
    """Return whether no kink lies at x: the gradient right beside it, on both sides, is the one at x.

    >>> zero = torch.zeros(1, 1, dtype=torch.float64)
    >>> differentiable(lambda z: z.relu().sum(), zero), differentiable(lambda z: z.relu().sum(), zero + 1)
    (False, True)
    """
    aside = step * check.wave(x)
    slope = gradients(score, torch.stack([x, x + aside, x - aside]))
    # A kink changes the gradient by a part of it, whatever the step; a curve by about the step.
    return bool((slope[1:] - slope[0]).abs().amax() <= step**0.5 * (1 + slope.abs().amax()))


def kink(score: Score, x: Tensor, start: Tensor) -> float | None:
    """Return the share of the way from start to x after which the gradient jumps next, None if it is not seen to.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> round(kink(lambda z: (z - 0.3).relu().sum(), one, 0 * one), 9)
    0.3
    """
    if torch.equal(x, start):
        return None
    low, width = 0.0, 1.0
    while width > CLOSE:
        at = low + width * torch.linspace(0, 1, LOOKS, dtype=x.dtype)
        slopes = gradients(score, torch.stack([start + t * (x - start) for t in at])).flatten(1)
        jumps = slopes.diff(dim=0).abs().amax(1)
        where = int(jumps.argmax())
        # A curve changes the gradient by less from look to look, a kink by the same.
        if jumps[where] <= NEAR**0.5 * (1 + slopes.abs().amax()):
            return None
        low, width = float(at[where]), width / (LOOKS - 1)
    return low


def numbers(values: Tensor) -> str:
    """Return a tensor as nested lists, whole numbers without a point.

    >>> numbers(torch.tensor([[1.0, 0.25]]))
    '[[1, 0.25]]'
    """
    if values.ndim:
        return f"[{', '.join(map(numbers, values))}]"
    return code(float(values))


def gauss(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights on [0, 1], by NumPy: what is judged by them has others."""
    t, w = np.polynomial.legendre.leggauss(nodes)
    return (t + 1) / 2, w / 2


@functools.cache
def discrepancy(nodes: int) -> float:
    r"""Return how far the weights of Gauss-Legendre nodes up to a point are from its place, at worst.

    .. math:: D = \sup_{t \in [0, 1]} \left| \sum_{t_i < t} w_i - t \right|

    >>> discrepancy(1)
    0.5
    """
    t, w = gauss(nodes)
    after = np.cumsum(w)
    return float(max(np.abs(after - t).max(), np.abs(after - w - t).max()))


def by_refinement(score: Score, x: Tensor, start: Tensor, nodes: int) -> float:
    """Return what n nodes leave on a path on which nothing is known of the slope, judged by four times as many."""
    line = x - start

    def attributed(n: int) -> Tensor:
        t, w = (x.new_tensor(v) for v in gauss(n))
        slope = gradients(score, start + t.reshape(-1, *[1] * x.ndim) * line)
        return line * torch.tensordot(w, slope, 1)

    coarse, fine = attributed(nodes), attributed(FINER * nodes)
    left = (fine.sum() - (score(x) - score(start))).abs()
    return float((coarse - fine).abs().sum() + left)
