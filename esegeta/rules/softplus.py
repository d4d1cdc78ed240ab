"""Smoothing: piecewise linear operations as their softplus, so that a score has second derivatives to speak of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from esegeta._registry import rewrite
from esegeta._types import Score
from esegeta.engine import check
from esegeta.engine.operators import Operation
from esegeta.rules.composed import COMPOSED
from esegeta.rules.rewriting import RULES, Rewriting, rewritten, rule
from esegeta.rules.vocabulary import KNOWN, rectified

NAME = "softplus"


class Softplus(Rewriting):
    """Replace what has kinks by what is smooth."""

    changes_values = True
    unchanged = "It has no kinks as it is: take the score itself"

    def __init__(self, beta: float) -> None:
        super().__init__(NAME, KNOWN)
        self.beta = beta


@rewrite(
    family="smoothing", paper="Dombrowski et al. 2019, arXiv:1906.07983", example={"beta": 10.0}, leads=1
)
def softplus(score: Score, *, beta: float) -> Score:
    r"""Return the score with everything piecewise linear replaced by its softplus: smooth, and **of other values**.

    .. math:: \max(0, x) \;\to\; s(x) = \tfrac1\beta \log(1 + e^{\beta x}), \qquad
              0 < s(x) - \max(0, x) \le \tfrac{\log 2}{\beta}, \qquad
              s''(x) = \beta\, \sigma(\beta x)\, \sigma(-\beta x)

    A network of ReLUs and max-pools is linear around almost every x, so that its second derivatives are zero: what
    is made of Hessians says nothing. This one has curvature where the kinks were, within about :math:`1 / \beta` of
    them. The other rewrites keep every value; this one adds up to :math:`\log 2 / \beta` at every unit, which the
    layers above pass on: compare ``softplus(score, beta=beta)(x)`` with ``score(x)``. As beta grows the values tend
    to those of the score and the gradient to its gradient, while second derivatives become tall and thin.

    - ReLU, in whatever spelling, leaky, parametric and clipped ones, ``clamp``, ``hardtanh``, ``softshrink``,
      ``hardsigmoid``, ``hardswish``, ``abs``, maximum and minimum of two: sums of s.
    - Maxima of n values, max-pools too: :math:`\tfrac1\beta \log \sum_i e^{\beta x_i}`, which is at most
      :math:`\log n / \beta` more.
    - What jumps (``hardshrink``, ``threshold`` to another value) has no such form and is refused. What chooses by a
      condition of its own, sorts or takes a median keeps its kinks.

    Args:
        score: ``(C,*S) -> ()``.
        beta: how sharp. It is one over a distance of activations, so there is no value for all networks: 10 smooths
            what is within about a tenth of its kink.

    Returns:
        A score of other values, which can be differentiated as often as one likes.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: torch.relu(x).sum()
        >>> smooth = softplus(score, beta=4.)
        >>> x = torch.zeros(1, 1)
        >>> round(smooth(x).item(), 4), eg.gradient(smooth)(x).item()  # log(2) / 4, and half of a step
        (0.1733, 0.5)
        >>> torch.func.grad(lambda z: eg.gradient(smooth)(z).sum())(x).item()  # beta / 4
        1.0

    Reference:
        Dombrowski et al. 2019, section 3.3, arXiv:1906.07983.
    """
    beta = check.non_negative("softplus", "beta", beta)
    if beta == 0:
        raise check.refused("softplus", "beta > 0", "0", "Everything would be a constant: try 10")
    return rewritten(score, lambda: Softplus(beta), hits=frozenset(RULES[NAME]))


def _beta(op: Operation) -> float:
    assert op.tracer is not None
    assert isinstance(op.tracer.rewrite, Softplus)
    return op.tracer.rewrite.beta


def hinge(x: Tensor, beta: float) -> Tensor:
    """Compute ``log(1 + exp(beta x)) / beta``: torch's own is linear from some value on, without curvature there.

    >>> hinge(torch.tensor([0., 1000.]), 2.).tolist()
    [0.34657..., 1000.0]
    """
    return -functional.logsigmoid(-beta * x) / beta


def larger(a: Tensor, b: Any, beta: float) -> Tensor:
    """Return the maximum of two.

    >>> larger(torch.tensor(1.), 30., 1.).item()
    30.0
    """
    return b + hinge(a - b, beta)


def smaller(a: Tensor, b: Any, beta: float) -> Tensor:
    """Return the minimum of two."""
    return b - hinge(b - a, beta)


def _clamped(x: Tensor, low: Any, high: Any, beta: float) -> Tensor:
    x = x if low is None else larger(x, low, beta)
    return x if high is None else smaller(x, high, beta)


@rule(NAME, "relu", "mul", "where")
def _relu(op: Operation) -> Any:
    return hinge(op.inputs[0], _beta(op)) if rectified(op) else NotImplemented


@rule(NAME, "clamp", "clip")
def _clamp(op: Operation) -> Any:
    x, low, high = (op.argument(i, n) for i, n in enumerate(("input", "min", "max")))
    return _clamped(x, low, high, _beta(op))


@rule(NAME, "clamp_min", "clamp_max", "relu6", "hardtanh")
def _bounded(op: Operation) -> Any:
    x = op.argument(0, "input")
    if op.name in ("clamp_min", "clamp_max"):
        bound = op.argument(1, op.name[-3:])
        return (larger if op.name == "clamp_min" else smaller)(x, bound, _beta(op))
    low, high = (
        (0.0, 6.0)
        if op.name == "relu6"
        else (op.argument(1, "min_val", -1.0), op.argument(2, "max_val", 1.0))
    )
    return _clamped(x, low, high, _beta(op))


@rule(NAME, "leaky_relu", "prelu", "rrelu")
def _leaky(op: Operation) -> Any:
    x = op.argument(0, "input")
    if op.name == "prelu":
        slope = op.argument(1, "weight")
        slope = slope.reshape(-1, *[1] * (x.ndim - 2)) if slope.numel() > 1 else slope
    elif op.name == "rrelu":
        if op.argument(3, "training", False):
            return NotImplemented
        slope = (op.argument(1, "lower", 1 / 8) + op.argument(2, "upper", 1 / 3)) / 2
    else:
        slope = op.argument(1, "negative_slope", 0.01)
    return slope * x + (1 - slope) * hinge(x, _beta(op))


@rule(NAME, "hardsigmoid", "hardswish")
def _hard(op: Operation) -> Any:
    (x,) = op.inputs
    gate = _clamped(x + 3, 0.0, 6.0, _beta(op)) / 6
    return x * gate if op.name == "hardswish" else gate


@rule(NAME, "softshrink")
def _softshrink(op: Operation) -> Any:
    (x,), by, beta = op.inputs, op.argument(1, "lambd", 0.5), _beta(op)
    return hinge(x - by, beta) - hinge(-x - by, beta)


@rule(NAME, "abs", "absolute")
def _abs(op: Operation) -> Any:
    (x,) = op.inputs
    return larger(x, -x, _beta(op))


@rule(NAME, "threshold", "hardshrink")
def _jump(op: Operation) -> Any:
    at = op.argument(1, "threshold")
    if op.name == "threshold" and op.argument(2, "value") == at:
        return larger(op.inputs[0], at, _beta(op))
    raise NotImplementedError(
        check.problem(
            NAME,
            "operations without jumps",
            f"{op.name!r}" + (f" in {op.where!r}" if op.where else ""),
            "Nothing smooth is near to it: write the network with softshrink, relu or clamp",
        )
    )


@rule(NAME, "maximum", "minimum", "fmax", "fmin")
def _of_two(op: Operation) -> Any:
    a, b = op.argument(0, "input"), op.argument(1, "other")
    return (smaller if "min" in op.name else larger)(a, b, _beta(op))


@rule(NAME, "max", "min", "amax", "amin")
def _of_many(op: Operation) -> Any:
    if op.name in ("max", "min") and isinstance(op.argument(1, "other"), Tensor):
        return _of_two(op)
    x, sign, beta = op.inputs[0], -1 if "min" in op.name else 1, _beta(op)
    dims = op.argument(1, "dim")
    dims = list(range(x.ndim)) if dims in (None, (), []) else dims
    value = sign * torch.logsumexp(sign * beta * x, dims, bool(op.argument(2, "keepdim", False))) / beta
    out = op.call(x)
    return value if isinstance(out, Tensor) else type(out)((value, out[1]))


@rule(NAME, *(f"{kind}max_pool{d}d{more}" for kind in ("", "adaptive_") for d in (1, 2, 3)
              for more in ("", "_with_indices")))  # fmt: skip
def _max_pool(op: Operation) -> Any:
    """Axis by axis, as a logarithm of sums of sums."""
    x, d, beta = op.inputs[0], int(op.name.partition("pool")[2][0]), _beta(op)
    out = op.call(x)
    sizes = (out if isinstance(out, Tensor) else out[0]).shape[-d:]
    y = x
    for axis, windows in zip(range(x.ndim - d, x.ndim), _windows(op, x.shape[-d:], sizes), strict=True):
        y = _pooled(y, axis, windows, beta)
    return y if isinstance(out, Tensor) else (y, *out[1:])


Windows = list[list[int]]


def _windows(op: Operation, before: Sequence[int], after: Sequence[int]) -> list[Windows]:
    """Which positions each output sees, for every axis."""
    if op.name.startswith("adaptive"):
        return [
            [list(range(i * n // m, -(-(i + 1) * n // m))) for i in range(m)]
            for n, m in zip(before, after, strict=True)
        ]
    names, plain = ("kernel_size", "stride", "padding", "dilation"), (None, None, 0, 1)
    kernel, stride, padding, dilation = (
        op.argument(i + 1, n, v) for i, (n, v) in enumerate(zip(names, plain, strict=True))
    )
    settings = [_each(s, len(before)) for s in (kernel, stride or kernel, padding, dilation)]
    return [
        [[p for j in range(k) if 0 <= (p := i * s - q + j * r) < n] for i in range(m)]
        for n, m, k, s, q, r in zip(before, after, *settings, strict=True)
    ]


def _each(setting: Any, axes: int) -> list[int]:
    listed = [setting] if isinstance(setting, int) else list(setting)
    return listed * axes if len(listed) == 1 else listed


def _pooled(x: Tensor, axis: int, windows: Windows, beta: float) -> Tensor:
    widest = max(map(len, windows))
    at = torch.tensor([w + w[:1] * (widest - len(w)) for w in windows], device=x.device)
    unused = torch.tensor([[i >= len(w) for i in range(widest)] for w in windows], device=x.device)
    seen = x.index_select(axis, at.flatten()).unflatten(axis, at.shape)
    seen = seen.masked_fill(unused.reshape(*at.shape, *[1] * (x.ndim - axis - 1)), -torch.inf)
    return torch.logsumexp(beta * seen, axis + 1) / beta


@rule(NAME, "l1_loss", "dist", "norm", "vector_norm", "linalg_vector_norm")
def _norm(op: Operation) -> Any:
    """Sums of absolute values, and the largest of them."""
    name, at = ("p", 2) if op.name == "dist" else ("p", 1) if op.name == "norm" else ("ord", 1)
    kinked = op.name == "l1_loss" or op.argument(at, name, 2) in (1, torch.inf, -torch.inf, "inf", "-inf")
    return op.through(COMPOSED[op.name]) if kinked else NotImplemented
