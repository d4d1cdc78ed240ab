# ruff: noqa: ARG001, ARG005
"""DeepLIFT's Rescale rule for every operation: multipliers that carry differences from a reference exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn import functional

from esegeta._registry import rewrite
from esegeta._types import Score
from esegeta.engine import check, levels
from esegeta.engine.operators import Operation, blockwise, replace, reroute
from esegeta.quadrature import nodes_and_weights
from esegeta.rules.composed import CLAMPS, COMPOSED
from esegeta.rules.lrp import statistics
from esegeta.rules.rewriting import Rewriting, rewritten, rule, spelled_out
from esegeta.rules.secants import SMOOTH, chord, closed_form, log_mean
from esegeta.rules.vocabulary import (
    AFFINE,
    ELEMENTWISE,
    MOVES,
    NORMS,
    PRODUCTS,
    SUMS,
    rectified,
)

RANDOM = frozenset(name for name in MOVES if "dropout" in name)
# Linear whatever of its arguments is data.
_LINEAR = (MOVES | SUMS) - RANDOM - {"lerp"}


class DeepLift(Rewriting):
    """Differences from a reference; under another name, with rules of its own that come first."""

    def __init__(self, name: str = "deeplift", *, fallback: str | None = None) -> None:
        super().__init__(name, _LINEAR, paired=True, fallback=fallback)

    def rule(self, op: Operation) -> Any:
        """Apply the rule of the table; refuse a choice that data makes."""
        # The reference would take the choices of the input along, and be another function of its own values.
        if op.conditions and not rectified(op):
            raise NotImplementedError(
                check.problem(
                    self.name,
                    "a network that computes no conditions, indices or detached values from its data",
                    f"{op.name!r} with one" + (f" in {op.where!r}" if op.where else ""),
                    "A difference has no share in a choice: write it with relu, clamp, maximum, max_pool, or "
                    "close over what shall stay fixed",
                )
            )
        return super().rule(op)


@rewrite(
    family="differences",
    paper="Shrikumar, Greenside, Kundaje 2017, arXiv:1704.02685",
    example={"baseline": torch.zeros(1, 4, 6)},
    leads=1,
)
def deeplift(score: Score, baseline: Tensor) -> Score:
    r"""Return the score whose gradient is DeepLIFT's multipliers with respect to a baseline.

    .. math:: \sum_i m_i(x, x') \, (x_i - x'_i) = F(x) - F(x')

    exactly, because every operation :math:`f` has multipliers with
    :math:`f(x) - f(x') = \sum_i m_i (x_i - x'_i)`, and they chain like derivatives:

    - linear operations: their own derivative;
    - functions of one value: the secant :math:`\Delta a / \Delta x`, in a form that keeps its digits where both
      values are large or nearly the same;
    - products: each factor with the mean of the other, so that also gates and attention are exact;
    - quotients: the numerator over the mean denominator, the denominator with the mean quotient;
    - maxima: a difference belongs to the larger of the two winners;
    - log-sum-exp: weights that add up to 1, the logarithmic means :math:`\Delta p / \Delta \log p` of both
      probabilities over their sum; softmax: the secant of exp after them. What is added to all logits, a different
      amount for x and for the reference too, has no part in the result;
    - norms over groups: secants of mean square and inverse root, in closed form.

    All of them tend to the derivative as x approaches the baseline. What has no rule is refused.

    Args:
        score: ``(C,*S) -> ()``.
        baseline: the reference :math:`x'`, like x.

    Returns:
        A score of the same values.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (x[0] * torch.relu(x[1])).sum()
        >>> x, baseline = torch.tensor([[2.], [3.]]), torch.tensor([[0.], [-1.]])
        >>> eg.gradient(deeplift(score, baseline))(x).tolist()
        [[1.5], [0.75]]

    Reference:
        Shrikumar, Greenside, Kundaje 2017, arXiv:1704.02685.
    """
    return rewritten(score, DeepLift, baseline)


# -- functions of one value ----------------------------------------------------------------------------------------


@rule("deeplift", *ELEMENTWISE)
def _secant(op: Operation) -> Any:
    if op.name in ("clamp", "clip", "clamp_min", "clamp_max") and len(op.inputs) > 1:
        return spelled_out(op, CLAMPS[op.name])
    return _of_one_value(op) if len(op.inputs) == 1 else NotImplemented


def _of_one_value(op: Operation) -> Any:
    """The secant of a function that is applied to every element."""
    if rectified(op):
        return _relu(op)
    form = closed_form(op.name, op.argument(1, "exponent"))

    def weigh(g: Tensor, y: Tensor, x: Tensor, x0: Tensor, y0: Tensor, *others: Tensor) -> Tensor:
        shape, x, x0 = x.shape, x.expand_as(y), x0.expand_as(y)

        def slope(at: Tensor) -> Tensor:
            return vjp(lambda t: op.call(t, others=others), at)[1](torch.ones_like(y))[0]

        if form is None:
            return fold_up(g * chord(y, y0, x, x0, slope, smooth=op.name in SMOOTH), shape)
        made = form(x, x0)
        other = torch.where(x == x0, 0, (y - y0) / torch.where(x == x0, 1, x - x0))
        return g * torch.where(made.isfinite(), made, other)

    return reroute(op.call(*op.inputs), op.inputs, weigh, *op.twins, op.there, *op.others)


def _relu(op: Operation) -> Tensor:
    (x, x0) = (op.inputs[0], op.twins[0])
    op.there = x0.clamp(min=0)  # a spelling by x > 0 asks that of the input alone
    return replace(op.call, [x], _relu_secant, x0)


def _relu_secant(g: Tensor, x: Tensor, x0: Tensor) -> Tensor:
    r"""``max(x, x') / |x - x'|``, but not below 0 or above 1; the slope where both are the same."""
    tiny = torch.finfo(x.dtype).tiny  # so that 0 / 0 is 0

    def weighted(g: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        apart = (x - x0).abs_().add_(tiny)
        return torch.maximum(x, x0).div_(apart).clamp(0, 1).mul_(g)

    return blockwise(weighted, g, x, x0)


# -- products and quotients ----------------------------------------------------------------------------------------

_POLYNOMIAL = (PRODUCTS - {"prod"}) | AFFINE | {"lerp"}


@rule("deeplift", *_POLYNOMIAL)
def _product(op: Operation) -> Any:
    r"""Exact for what is a polynomial of its data: the derivative, integrated on the line between both."""
    if rectified(op):
        return _relu(op)
    if len(op.inputs) == 1:
        return op.call(*op.inputs)
    if op.name == "mul":
        return reroute(op.call(*op.inputs), op.inputs, _mul, *op.twins)
    n = len(op.inputs)
    t, w = nodes_and_weights("gauss-legendre", (n + 1) // 2)

    def weigh(g: Tensor, y: Tensor, *known: Tensor) -> tuple[Tensor, ...]:
        xs, refs, others = known[:n], known[n : 2 * n], known[2 * n :]
        total: Sequence[Tensor] = ()
        for at, weight in zip(t, w, strict=True):
            places = [r + at * (x - r) for x, r in zip(xs, refs, strict=True)]
            pulled = vjp(lambda *z: op.call(*z, others=others), *places)[1](weight * g)
            total = [a + b for a, b in zip(total, pulled, strict=True)] if total else pulled
        return tuple(total)

    return reroute(op.call(*op.inputs), op.inputs, weigh, *op.twins, *op.others)


def _mul(g: Tensor, y: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    g = g / 2
    return fold_up(g * (b + b0), a.shape), fold_up(g * (a + a0), b.shape)


@rule("deeplift", "div")
def _quotient(op: Operation) -> Any:
    if op.kwargs.get("rounding_mode") is not None:
        return NotImplemented
    if len(op.inputs) == 1:
        return op.call(*op.inputs) if op.is_data(op.argument(0, "input")) else _of_one_value(op)

    def weigh(
        g: Tensor, y: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, y0: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The product rule for a and 1 / b, with shares of b and b0 for its two ways: what grows in both cancels
        # before anything large is made of it, as in the norms below. Only a pole in between needs equal shares.
        same = (b > 0) == (b0 > 0)
        whole = torch.where(same, b + b0, 1)
        to_a = torch.where(same, 2 / whole, (1 / b + 1 / b0) / 2)
        to_b = torch.where(same, (y + y0) / whole, (a + a0) / 2 / b / b0)
        return fold_up(g * to_a, a.shape), fold_up(-g * to_b, b.shape)

    return reroute(op.call(*op.inputs), op.inputs, weigh, *op.twins, op.there)


# -- over some of the axes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The values along some axes of a tensor as the last axis of another one."""

    shape: tuple[int, ...]
    kept: tuple[int, ...]
    axes: tuple[int, ...]

    @classmethod
    def along(cls, x: Tensor, dims: Any) -> "Rows":
        """Reduce along one axis, several, or (with None) all."""
        chosen = range(x.ndim) if dims in (None, (), []) else [dims] if isinstance(dims, int) else dims
        axes = tuple(sorted({d % x.ndim for d in chosen})) if x.ndim else ()
        return cls(tuple(x.shape), tuple(d for d in range(x.ndim) if d not in axes), axes)

    def of(self, x: Tensor) -> Tensor:
        """Return the tensor with these axes as the last one."""
        return x.permute(*self.kept, *self.axes).reshape(*(self.shape[d] for d in self.kept), -1)

    def each(self, y: Tensor) -> Tensor:
        """Return one value for each row, aligned with the tensor."""
        return y.reshape(*(self.shape[d] for d in self.kept), 1)

    def back(self, rows: Tensor) -> Tensor:
        """Return rows in the layout of the tensor."""
        order = (*self.kept, *self.axes)
        return rows.reshape([self.shape[d] for d in order]).permute(
            [order.index(d) for d in range(len(order))]
        )


# -- maxima --------------------------------------------------------------------------------------------------------


def _share(y: Tensor, y0: Tensor, apart: Tensor) -> Tensor:
    """Which part of the winner's difference becomes the maximum's: between 0 and 1."""
    same = apart == 0
    return torch.where(same, 1, (y - y0) / torch.where(same, 1, apart))


@rule("deeplift", "maximum", "minimum", "fmax", "fmin")
def _of_two(op: Operation) -> Any:
    if len(op.inputs) == 1:
        return _of_one_value(op)
    sign = -1 if "min" in op.name else 1

    def weigh(
        g: Tensor, y: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, y0: Tensor
    ) -> tuple[Tensor, Tensor]:
        first = torch.where(sign * y >= sign * y0, sign * a >= sign * b, sign * a0 >= sign * b0)
        to_a = torch.where(first, g * _share(y, y0, a - a0), 0)
        to_b = torch.where(first, 0, g * _share(y, y0, b - b0))
        return fold_up(to_a, a.shape), fold_up(to_b, b.shape)

    return reroute(op.call(*op.inputs), op.inputs, weigh, *op.twins, op.there)


@rule("deeplift", "max", "min", "amax", "amin")
def _of_many(op: Operation) -> Any:
    arrange = op.name in ("max", "min")
    other = op.argument(1, "other" if arrange else "dim")
    if arrange and (isinstance(other, Tensor) or "other" in op.kwargs):
        return _of_two(op)
    if len(op.inputs) != 1:
        return NotImplemented
    (x,), (x0,) = op.inputs, op.twins
    rows, sign = Rows.along(x, op.argument(1, "dim")), -1 if "min" in op.name else 1
    out, there = op.call(x), op.there
    named = not isinstance(out, Tensor)

    def weigh(g: Tensor, y: Tensor, x: Tensor, x0: Tensor, y0: Tensor) -> Tensor:
        x, x0 = rows.of(x), rows.of(x0)
        g, y, y0 = (rows.each(t) for t in (g, y, y0))
        here, before = ((sign * t).argmax(-1, keepdim=True) for t in (x, x0))
        at = torch.where(sign * y >= sign * y0, here, before)
        each = g * _share(y, y0, (x - x0).gather(-1, at))
        return rows.back(torch.zeros_like(x).scatter_add(-1, at, each))

    value = reroute(out[0] if named else out, [x], weigh, x0, there[0] if named else there)
    return type(out)((value, out[1])) if named else value


@rule("deeplift", *(f"{kind}max_pool{d}d{more}" for kind in ("", "adaptive_") for d in (1, 2, 3)
                    for more in ("", "_with_indices")))  # fmt: skip
def _max_pool(op: Operation) -> Any:
    (x,), (x0,) = op.inputs, op.twins
    d = int(op.name.partition("pool")[2][0])
    pool = getattr(functional, op.name.removesuffix("_with_indices"))
    if op.name.startswith("adaptive"):
        settings: dict[str, Any] = {"output_size": op.argument(1, "output_size")}
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        plain = (None, None, 0, 1, False)
        settings = {n: op.argument(i + 1, n, v) for i, (n, v) in enumerate(zip(names, plain, strict=True))}
        settings["stride"] = settings["stride"] or None

    def weigh(g: Tensor, y: Tensor, x: Tensor, x0: Tensor, y0: Tensor, i: Tensor, i0: Tensor) -> Tensor:
        flat, at = (x - x0).flatten(-d), torch.where(y >= y0, i, i0).flatten(-d)
        each = g.flatten(-d) * _share(y.flatten(-d), y0.flatten(-d), flat.gather(-1, at))
        return torch.zeros_like(flat).scatter_add(-1, at, each).reshape(x.shape)

    y, i = pool(x, **settings, return_indices=True)
    with torch.set_grad_enabled(torch.is_grad_enabled() and levels.watched(x0)):
        y0, i0 = pool(x0, **settings, return_indices=True)
    value = reroute(y, [x], weigh, x0, y0, i, i0)
    both = op.name.endswith("indices") or bool(op.kwargs.get("return_indices"))
    op.there = (y0, i0) if both else y0
    return (value, i) if both else value


# -- softmax -------------------------------------------------------------------------------------------------------


@rule("deeplift", "softmax", "log_softmax", "softmin", "logsumexp")
def _softmax(op: Operation) -> Any:
    r"""By the logarithmic means of both probabilities, of which every one is small where its difference is.

    With :math:`\bar p = \Delta p / \Delta \log p` the change of :math:`\log p_i = x_i - L` has
    :math:`\sum_i \bar p_i \Delta \log p_i = \sum_i \Delta p_i = 0`, so that
    :math:`\Delta L = \sum_i w_i \Delta x_i` with :math:`w_i = \bar p_i / \sum_j \bar p_j`.
    """
    if len(op.inputs) != 1 or op.kwargs.get("dtype") is not None:
        return NotImplemented
    (x,), (x0,) = op.inputs, op.twins
    dim = op.argument(1, "dim")
    if dim is None:  # what functional.softmax guesses, with a warning
        dim = 0 if x.ndim in (0, 1, 3) else 1
    sign, rows = -1 if op.name == "softmin" else 1, Rows.along(x, dim)

    def weigh(g: Tensor, y: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        likely, likely0 = (rows.of(sign * t).log_softmax(-1) for t in (x, x0))
        mean = log_mean(likely, likely0).exp()
        top = mean.argmax(-1, keepdim=True)
        weights = _balanced(mean / mean.sum(-1, keepdim=True), top, 1)
        if op.name == "logsumexp":
            return rows.back(weights * rows.each(g))
        g = rows.of(g)
        if op.name == "log_softmax":
            return rows.back(_balanced(g - weights * g.sum(-1, keepdim=True), top, 0))
        g = g - g.gather(-1, top)  # what is common to all goes nowhere
        return sign * rows.back(_balanced(mean * (g - (weights * g).sum(-1, keepdim=True)), top, 0))

    return reroute(op.call(x), [x], weigh, x0)


def _balanced(t: Tensor, top: Tensor, total: int) -> Tensor:
    """The largest one as what the others leave of a sum that is known, with their precision."""
    rest = t.scatter(-1, top, 0).sum(-1, keepdim=True)
    return t.scatter(-1, top, total - rest)


# -- norms ---------------------------------------------------------------------------------------------------------


@rule("deeplift", *NORMS)
def _norm(op: Operation) -> Any:
    r"""``y = weight u / sqrt(mean u^2 + eps)``, where u is what is normalised, its mean taken off."""
    if len(op.inputs) != 1 or not op.is_data(op.argument(0, "input")):
        return NotImplemented
    x, x0 = op.inputs[0], op.twins[0]
    centred = op.name != "rms_norm"
    groups, many = 0, 1  # groups of channels, or the last so many axes
    if op.name == "instance_norm":
        if not op.argument(5, "use_input_stats", True):
            return op.call(x)
        weight, eps, groups = op.argument(3, "weight"), op.argument(7, "eps", 1e-5), x.shape[1]
    elif op.name == "group_norm":
        weight, eps, groups = (
            op.argument(2, "weight"),
            op.argument(4, "eps", 1e-5),
            op.argument(1, "num_groups"),
        )
    else:
        many = len(op.argument(1, "normalized_shape"))
        weight = op.argument(2, "weight")
        eps = op.argument(4, "eps", 1e-5) if centred else op.argument(3, "eps")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if groups and weight is not None:
        weight = weight.reshape(-1, *[1] * (x.ndim - 2))

    def weigh(g: Tensor, y: Tensor, x: Tensor, x0: Tensor, *weights: Tensor) -> Tensor:
        q = g * weights[0] if weights else g
        rows = (x.shape[0], groups, -1) if groups else (*x.shape[: x.ndim - many], -1)
        u, u0, q = x.reshape(rows), x0.reshape(rows), q.reshape(rows)
        for _ in range(2 * centred):  # once more for what rounding left of the mean of large values
            u, u0 = u - u.mean(-1, keepdim=True), u0 - u0.mean(-1, keepdim=True)
        s, s0 = (t.square().mean(-1, keepdim=True).add(eps).rsqrt() for t in (u, u0))
        # In the product of u and s each has the other one's mean with weights 1 / s: a group of hardly any size,
        # whose s is huge, is never multiplied by that.
        mean = s * s0 / (s + s0)
        m = 2 * q * mean - (q * (u * s + u0 * s0)).mean(-1, keepdim=True) * mean.square() * (u + u0)
        return (m - m.mean(-1, keepdim=True) if centred else m).reshape(x.shape)

    return reroute(op.call(x), [x], weigh, x0, *([] if weight is None else [weight]))


@rule("deeplift", "batch_norm")
def _batch_norm(op: Operation) -> Any:
    scale = scale_of(op)
    if scale is None:
        return NotImplemented
    # Torch's own derivative is wrong on the CPU for one example in some layouts, such as that of ``h.mT.reshape``.
    return reroute(op.call(*op.inputs), op.inputs, lambda g, y, x, scale: g * scale, scale)


def scale_of(op: Operation) -> Tensor | None:
    """Return the factor of each channel in a batch norm whose statistics are fixed, and no data."""
    fixed = statistics(op) if len(op.inputs) == 1 and op.is_data(op.argument(0, "input")) else None
    return None if fixed is None else fixed[0].detach().reshape(-1, *[1] * (op.inputs[0].ndim - 2))


# -- what is linear in some forms, and what is made of others ------------------------------------------------------


@rule("deeplift", "where")
def _where(op: Operation) -> Any:
    return _relu(op) if rectified(op) else op.call(*op.inputs)


@rule("deeplift", "grid_sample", "affine_grid", "nll_loss")
def _linear_in_the_first(op: Operation) -> Any:
    linear = len(op.inputs) == 1 and op.inputs[0] is op.args[0]
    return op.call(*op.inputs) if linear else NotImplemented


@rule("deeplift", *RANDOM)
def _dropout(op: Operation) -> Any:
    p, training = op.argument(1, "p", 0.5), op.argument(2, "training", True)
    return op.call(*op.inputs) if p == 0 or not training else NotImplemented


@rule("deeplift", *COMPOSED)
def _composed(op: Operation) -> Any:
    return spelled_out(op, COMPOSED[op.name])


def fold_up(g: Tensor, shape: torch.Size) -> Tensor:
    """Add up what has been broadcast."""
    if g.shape == shape:
        return g
    lead = g.ndim - len(shape)
    g = g.sum(list(range(lead))) if lead else g
    wide = [d for d, n in enumerate(shape) if n == 1 and g.shape[d] != 1]
    return g.sum(wide, keepdim=True) if wide else g
