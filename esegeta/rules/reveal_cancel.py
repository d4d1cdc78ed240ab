# ruff: noqa: ARG005
"""DeepLIFT's RevealCancel rule: what is positive and what is negative in a difference have multipliers of their own.

Every value that a rule here has made carries the two parts of its difference, as tensors of their own: the
gradient that arrives at each is its multiplier. Operations without such a rule see the difference as a whole, by
the rules of ``deeplift``, and what they make is parted anew by its sign.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from esegeta._registry import rewrite
from esegeta._types import Score
from esegeta.engine.operators import Operation, reroute
from esegeta.rules.deeplift import RANDOM, DeepLift, fold_up, scale_of
from esegeta.rules.lrp import MATRICES, editing, parts_of
from esegeta.rules.rewriting import rewritten, rule
from esegeta.rules.secants import SMOOTH, chord, near
from esegeta.rules.vocabulary import AFFINE, ELEMENTWISE, MOVES, rectified

NAME = "reveal_cancel"
Two = tuple[Tensor, Tensor]


class _RevealCancel(DeepLift):
    def __init__(self) -> None:
        super().__init__(NAME, fallback="deeplift")

    def rule(self, op: Operation) -> Any:
        # What is looked at or put in at a place has one multiplier.
        return op.call(*op.inputs) if editing() else super().rule(op)


@rewrite(
    family="differences",
    paper="Shrikumar, Greenside, Kundaje 2017, arXiv:1704.02685",
    example={"baseline": torch.zeros(1, 4, 6)},
    leads=1,
)
def reveal_cancel(score: Score, baseline: Tensor) -> Score:
    r"""Return the score whose gradient is DeepLIFT's multipliers by the RevealCancel rule.

    Every difference is a sum of two parts, :math:`\Delta = \Delta^+ + \Delta^-`, each with multipliers of its own:

    - weights (convolutions, linear layers, products with a matrix): positive is what
      :math:`w_i \Delta_i > 0` contributes, negative the rest; an input has one multiplier, by the sign of its
      :math:`\Delta_i`, and the mean of both where that is zero;
    - functions f of one value: the effect of a part, averaged over whether the other one came before,

      .. math:: \Delta y^\pm = \tfrac12 [f(x' + \Delta^\pm) - f(x')]
                + \tfrac12 [f(x' + \Delta^+ + \Delta^-) - f(x' + \Delta^\mp)]

      (where a function falls, the effect of the positive part is negative, and counts as that; where f is not
      defined at one of these, both have the secant);
    - what moves, adds up, averages or scales values, batch norm too, keeps the parts, and swaps them where a
      factor is negative.

    Maxima of several values, products of data, softmax and norms over groups have no such rule: they take the
    whole difference by the rules of ``deeplift``, and so does what a place puts in.

    Args:
        score: ``(C,*S) -> ()``.
        baseline: the reference :math:`x'`, like x.

    Returns:
        A score of the same values.

    Example:
        >>> import torch, esegeta as eg
        >>> smaller = lambda x: x[0, 0] - torch.relu(x @ torch.tensor([1., -1.])).sum()
        >>> x = torch.tensor([[4., 2.]])
        >>> smaller(x).item(), (x * eg.gradient(reveal_cancel(smaller, 0 * x))(x)).tolist()
        (2.0, [[1.0, 1.0]])

    Reference:
        Shrikumar, Greenside, Kundaje 2017, sections 3.5.1 and 3.5.3, arXiv:1704.02685.
    """
    return rewritten(score, _RevealCancel, baseline)


# -- differences in two parts --------------------------------------------------------------------------------------


def _split(t: Tensor, twin: Tensor) -> Two:
    """A whole difference by its sign. Where it is zero each part has half of the multiplier."""
    t = t * 1  # what a rule leads to is kept, and the network may write into its own tensor later
    apart = (t - twin).detach()

    def part(sign: int) -> Tensor:
        weigh = lambda g, _, t, apart: g * torch.heaviside(sign * apart, apart.new_tensor(0.5))
        return reroute(sign * (sign * apart).clamp(min=0), [t], weigh, apart)

    return part(1), part(-1)


def _parts(op: Operation) -> list[Two]:
    """The parts of each of its data."""
    assert op.tracer is not None
    known = [op.tracer.recall(t) for t in op.inputs]
    return [
        _split(t, twin) if k is None else k for k, t, twin in zip(known, op.inputs, op.twins, strict=True)
    ]


def _carrying(op: Operation, value: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A value that carries its parts. Whoever takes it as a whole has one multiplier for both."""
    assert op.tracer is not None
    op.tracer.remember(value, (up, down))
    return value


def _weighed(up: Tensor, a: Tensor, down: Tensor, b: Tensor, *of: Tensor) -> Tensor:
    """``a * up + b * down``, where the factors count as constant, although they come from ``of``."""

    def weigh(g: Tensor, _: Tensor, up: Tensor, down: Tensor, a: Tensor, b: Tensor, *of: Tensor) -> Two:
        return fold_up(_from(g * a, *of), up.shape), fold_up(_from(g * b, *of), down.shape)

    return reroute(a * up.detach() + b * down.detach(), [up, down], weigh, a, b, *of)


def _from(r: Tensor, *of: Tensor) -> Tensor:
    """The same values, connected to what they come from: so that their derivative is refused, and not zero."""
    for t in of:
        r = torch.where(torch.ones((), dtype=torch.bool, device=r.device), r, t)
    return r


def _scaled_by(op: Operation, a: Tensor, b: Tensor, *of: Tensor) -> Two:
    """Each part times its factor, which decides where the product belongs."""
    ((up, down),) = _parts(op)
    positive = _weighed(up, a.clamp(min=0), down, b.clamp(max=0), *of)
    return positive, _weighed(up, a.clamp(max=0), down, b.clamp(min=0), *of)


# -- operations ------------------------------------------------------------------------------------------------------


@rule(NAME, *AFFINE, *MATRICES)
def _weights(op: Operation) -> Any:
    """The Linear rule."""
    parts = parts_of(op)
    if parts is None:
        return NotImplemented
    up, down = _split(parts.x, op.twin(parts.x))
    for_, against = parts.weight.clamp(min=0), parts.weight.clamp(max=0)
    positive = parts.linear(up, for_) + parts.linear(down, against)
    negative = parts.linear(up, against) + parts.linear(down, for_)
    return _carrying(op, op.call(*op.inputs), positive, negative)


@rule(NAME, *ELEMENTWISE, "maximum", "minimum", "fmax", "fmin", "max", "min", "where")
def _of_one_value(op: Operation) -> Any:
    several = op.name in ("max", "min") and not isinstance(op.argument(1, "other"), Tensor)
    if len(op.inputs) != 1 or several or (op.name == "where" and not rectified(op)):
        return _kept(op) if op.name == "where" else NotImplemented
    (x,), (x0,) = op.inputs, op.twins
    call: Callable[..., Tensor] = op.call
    if rectified(op):
        call = torch.relu
        op.there = torch.relu(x0)  # a spelling by x > 0 asks that of the input alone
    ((up, down),) = _parts(op)
    with torch.no_grad():
        a, b = _effects(call, op.name in SMOOTH, x, x0, up, down, op.there)
    parts = _scaled_by(op, a, b, x, x0)
    return _carrying(op, reroute(op.call(x), parts, lambda g, *_: (g, g)), *parts)


def _effects(
    f: Callable[[Tensor], Tensor], smooth: bool, x: Tensor, x0: Tensor, up: Tensor, down: Tensor, y0: Tensor
) -> Two:
    """What each part does to the value, over the part."""
    y, above, below = f(x), f(x0 + up), f(x0 + down)
    x, x0, up, down = (t.expand_as(y) for t in (x, x0, up, down))

    def slope(at: Tensor) -> Tensor:
        if f is torch.relu:
            return (at > 0).to(at.dtype)
        found = vjp(f, at)[1](torch.ones_like(y))[0]
        return torch.where(found.isfinite(), found, 0)

    def over(effect: Tensor, part: Tensor, slope: Tensor) -> Tensor:
        small = near(x0 + part, x0) if smooth else part == 0
        return torch.where(small, slope, effect / torch.where(small, 1, part))

    first, second = ((above - y0) + (y - below)) / 2, ((below - y0) + (y - above)) / 2
    middles = [[(x0 + part / 2), (x0 + part / 2 + other)] for part, other in ((up, down), (down, up))]
    a, b = (
        over(effect, part, (slope(start) + slope(after)) / 2)
        for effect, part, (start, after) in zip((first, second), (up, down), middles, strict=True)
    )
    defined = (first + second).isfinite() | ~(y - y0).isfinite()
    whole = chord(y, y0, x, x0, slope, smooth=smooth)
    return torch.where(defined, a, whole), torch.where(defined, b, whole)


@rule(NAME, "mul", "div")
def _scaled(op: Operation) -> Any:
    """By a constant."""
    if rectified(op):
        return _of_one_value(op)
    if len(op.inputs) != 1 or op.argument(2, "rounding_mode") is not None:
        return NotImplemented
    if op.name == "div" and not op.is_data(op.argument(0, "input")):
        return _of_one_value(op)
    factor = op.call(torch.ones_like(op.inputs[0])).detach()
    return _carrying(op, op.call(*op.inputs), *_scaled_by(op, factor, factor))


@rule(NAME, "batch_norm")
def _batch_norm(op: Operation) -> Any:
    scale = scale_of(op)
    if scale is None:
        return NotImplemented
    parts = _scaled_by(op, scale, scale)
    return _carrying(op, reroute(op.call(*op.inputs), parts, lambda g, *_: (g, g)), *parts)


@rule(NAME, "add", "sub", "neg", "negative")
def _added(op: Operation) -> Any:
    """What is subtracted swaps its parts."""
    alpha = op.argument(2, "alpha", 1)
    factors = {"add": (1, alpha), "sub": (1, -alpha)}.get(op.name, (-1,))
    data, found = [op.argument(i, n) for i, n in enumerate(("input", "other"))], iter(_parts(op))
    up, down = [], []
    for factor, (u, d) in [(f, next(found)) for f, t in zip(factors, data, strict=False) if op.is_data(t)]:
        up.append(factor * (u if factor > 0 else d))
        down.append(factor * (d if factor > 0 else u))
    value = op.call(*op.inputs)
    return _carrying(op, value, *(sum(p).expand_as(value) for p in (up, down)))


_KEEPING = {"sum", "mean", "cumsum", "trace", "pad", "interpolate", "upsample", "positive", "fold", "unfold"}
_KEEPING |= {f"{kind}avg_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3)}
_KEEPING |= {"upsample_nearest", "upsample_bilinear", "upsample_linear1d", "upsample_bilinear2d"}
_KEEPING |= {"upsample_trilinear3d", *(f"upsample_nearest{d}d" for d in (1, 2, 3))}
_FILLING = {"masked_fill", "index_fill", "constant_pad_nd", "pad"}


@rule(NAME, *((MOVES | _KEEPING) - RANDOM))
def _kept(op: Operation) -> Any:
    """Moved, or added up with weights that are not negative: the same of each part."""
    if op.argument(3, "mode") == "bicubic":
        return NotImplemented
    values, spec = tree_flatten(op.call(*op.inputs))
    parts = _parts(op)
    both = [tree_flatten(op.call(*[p[i] for p in parts]))[0] for i in (0, 1)]
    if op.others or op.name in _FILLING:  # constants among the values have no difference
        zeros = tree_flatten(op.call(*map(torch.zeros_like, op.inputs)))[0]
        both = [[torch.where(p == z, 0, p - z) for p, z in zip(each, zeros, strict=True)] for each in both]
    return tree_unflatten([_carrying(op, v, u, d) for v, u, d in zip(values, *both, strict=True)], spec)


@rule(NAME, *RANDOM)
def _dropout(op: Operation) -> Any:
    p, training = op.argument(1, "p", 0.5), op.argument(2, "training", True)
    return _kept(op) if p == 0 or not training else NotImplemented
