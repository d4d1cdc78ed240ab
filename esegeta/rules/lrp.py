"""Layer-wise relevance propagation: a score whose gradient, times the activation, is relevance at every place.

The relevance of a value is shared out among what it was made of. In the *gradient form* the relevance of a tensor
is the product of its values with the gradient that arrives there, so that ordinary back-propagation, with other
derivatives for some operations, is the whole of it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from esegeta._facts import carry, named
from esegeta._registry import rewrite
from esegeta._types import Score
from esegeta.engine import check, interception, levels, visits
from esegeta.engine.gradient import name_of
from esegeta.engine.operators import Operation, Tracer, reroute
from esegeta.placing import activation_and_gradient
from esegeta.rules.composed import ADDED, biased_after, lerp, multi_head_attention
from esegeta.rules.composites import (
    TINY,
    Composite,
    Layer,
    composite_of,
    quotient,
    shared,
    stabilised,
)
from esegeta.rules.rewriting import Rewriting, rewritten, rule, spelled_out
from esegeta.rules.secants import SMOOTH, chord, closed_form
from esegeta.rules.vocabulary import (
    ACTIVATIONS,
    AFFINE,
    ELEMENTWISE,
    MAXIMA,
    MOVES,
    NORMS,
    PRODUCTS,
    QUOTIENTS,
    SUMS,
    rectified,
)

# What opens and closes other values, as a factor in a product.
GATES = frozenset({"sigmoid", "expit", "hardsigmoid", "softmax", "softmin"})
# What makes a gate of gates and constants.
_OF_GATES = MOVES | SUMS | {"mul", "div"}
# One matrix of weights and one tensor of data, in the spelling of a product.
MATRICES = frozenset(
    {"matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "tensordot", "einsum", "addmm", "addmv", "baddbmm"}
)
# Positively homogeneous: doubling the data doubles the value, so the derivative shares it out exactly.
_HOMOGENEOUS = frozenset(
    {"lp_pool1d", "lp_pool2d", "lp_pool3d", "norm", "linalg_vector_norm", "vector_norm", "std", "where"}
)
_RATIOS = frozenset({"local_response_norm", "normalize"})
# The derivative is the rule: values are moved, picked or added up, each in proportion to what it contributes.
PLAIN = MOVES | SUMS | MAXIMA | _HOMOGENEOUS


@dataclass(frozen=True)
class Note:
    """What is known of a tensor: how many affine operations made it, whether it is a gate, whether it is behind
    the last of them."""

    depth: int = 0
    gate: bool = False
    past: bool = False


class Relevance(Rewriting):
    """The rules of a composite, and what they have to know of the tensors on the way."""

    def __init__(self, name: str, composite: Composite, last: frozenset[Any] = frozenset()) -> None:
        super().__init__(name, PLAIN)
        self.composite, self.last = composite, last
        self._counts: WeakKeyDictionary[Tracer, Counter[str]] = WeakKeyDictionary()

    def rule(self, op: Operation) -> Any:
        """Apply the table, and note what came out."""
        notes = tracer().notes
        known = [notes.get(t, Note()) for t in op.inputs]
        # What is put in at a place is no part of the network.
        out = op.call(*op.inputs) if editing() else super().rule(op)
        depth = max(n.depth for n in known) + is_affine(op)
        gate = op.name in GATES or (op.name in _OF_GATES and all(n.gate for n in known))
        for t in tree_flatten(out)[0]:
            if isinstance(t, Tensor):
                made = notes.get(t, Note())  # of another spelling
                notes[t] = Note(max(depth, made.depth), gate or made.gate)
        return out

    def is_gate(self, t: Tensor) -> bool:
        """Return whether a tensor comes out of a sigmoid or softmax."""
        return bool(tracer().notes.get(t, Note()).gate)

    def ruled(self, layer: Layer) -> Tensor:
        """Return the value of an affine operation by the rule for it, remembered for what can be merged into it."""
        out = self.share(layer)
        tracer().remember(out, layer)
        return out

    def share(self, layer: Layer) -> Tensor:
        """Return the value of an affine operation by the rule for it."""
        chosen = self.composite.rule_for(layer.kind, layer.where, depth=layer.depth, last=layer.last)
        self.chosen = chosen
        return chosen(layer)

    def affine(self, op: Operation, parts: "Parts") -> Tensor:
        """Put the rule to an affine operation that has just run."""
        depth = tracer().notes.get(parts.x, Note()).depth
        value = op.call(*op.inputs)
        where, count = key = number(self._counts, op.where)
        made = Layer(
            **vars(parts), value=value, where=where, depth=depth, last=key in self.last, number=count
        )
        return self.ruled(made)

    def partly(self, op: Operation, kept: Sequence[int]) -> Any:
        """Return the value of an operation in which some of the data take all."""
        return partly(op, kept)

    def alone(self, op: Operation) -> Tensor:
        """Return the value of a norm with fixed statistics that comes after no affine operation."""
        z, fixed = op.call(*op.inputs), statistics(op) if op.name == "batch_norm" else None
        if fixed is not None:
            # Torch's own derivative is wrong on the CPU for one example in some layouts.
            scale = fixed[0].reshape(-1, *[1] * (z.ndim - 2))
            z = reroute(z, op.inputs, lambda g, _, __, scale: g * scale, scale)
        return shared(z, [z], (1.0,), 1e-6)

    def layer(self, t: Tensor) -> Layer | None:
        """Return the affine operation that a tensor came out of, unless it was written to since."""
        return cast("Layer | None", tracer().recall(t))


def tracer() -> Tracer:
    """Return what is following the data now."""
    session = visits.current()
    assert session is not None
    assert session.tracer is not None
    return session.tracer


def editing() -> bool:
    """Return whether what runs now puts something in at a place."""
    session = visits.current()
    return session is not None and session.busy


def here() -> Relevance:
    """Return the rewrite that is at work."""
    return cast(Relevance, tracer().rewrite)


def number(counts: "WeakKeyDictionary[Tracer, Counter[str]]", where: str) -> tuple[str, int]:
    """Return which affine operation of a run this is: the module, and how many came before in it."""
    counter = counts.setdefault(tracer(), Counter())
    counter[where] += 1
    return where, counter[where] - 1


# -- affine operations -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """An affine operation taken apart: ``linear(x, weight) + bias``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    linear: Callable[[Tensor, Tensor], Tensor]
    kind: str
    transposed: bool = False


def is_affine(op: Operation) -> bool:
    """Return whether an operation multiplies data with a matrix of weights."""
    return parts_of(op) is not None


def parts_of(op: Operation) -> Parts | None:
    """Return an affine operation taken apart; None if it is none, or if its weights are data themselves."""
    if len(op.inputs) != 1:
        return None
    if op.name in AFFINE:
        return _weighted(op)
    if op.name == "bilinear":
        return _bilinear(op)
    return _multiplied(op) if op.name in MATRICES else None


def _weighted(op: Operation) -> Parts | None:
    x, weight, bias = (op.argument(i, n) for i, n in enumerate(("input", "weight", "bias")))
    if not op.is_data(x):
        return None

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        args, kwargs = list(op.args), op.kwargs
        # conv_tbc has no form without a bias.
        none = torch.zeros_like(bias) if op.name == "conv_tbc" else None
        for i, (name, value) in enumerate((("input", x), ("weight", weight), ("bias", none))):
            if i < len(args):
                args[i] = value
            else:
                kwargs[name] = value
        return op.function(*args, **kwargs)

    conv = op.name != "linear"
    if bias is not None and conv and op.name != "conv_tbc":
        bias = bias.reshape(-1, *[1] * (weight.ndim - 2))
    transposed = op.name.startswith("conv_transpose") or (
        op.name == "convolution" and bool(op.argument(6, "transposed"))
    )
    return Parts(x, weight, bias, linear, "conv" if conv else "linear", transposed)


def _bilinear(op: Operation) -> Parts | None:
    """With one of its factors fixed: the matrix that the other one is multiplied with."""
    first, second, weight, bias = (
        op.argument(i, n) for i, n in enumerate(("input1", "input2", "weight", "bias"))
    )
    if not (op.is_data(first) or op.is_data(second)):
        return None
    x, pattern, other = (
        (first, "kij,...j->...ki", second) if op.is_data(first) else (second, "kij,...i->...kj", first)
    )
    matrix = torch.einsum(pattern, weight, other)
    return Parts(x, matrix, bias, lambda x, w: torch.einsum("...i,...ki->...k", x, w), "linear")


def _multiplied(op: Operation) -> Parts | None:
    x, bias, scale = op.inputs[0], None, 1.0
    args, kwargs = list(op.args), op.kwargs
    function: Callable[..., Tensor] = op.function
    if op.name in ("addmm", "addmv", "baddbmm"):
        bias, *args = args[:3]
        if op.is_data(bias) or len(args) != 2:
            return None
        bias, scale = kwargs.get("beta", 1) * bias, kwargs.get("alpha", 1)
        function, kwargs = torch.matmul, {}
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(tensors) != 2:
        return None
    i, j = tensors if leaves[tensors[0]] is x else reversed(tensors)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        here = list(leaves)
        here[i], here[j] = x, weight
        args, kwargs = tree_unflatten(here, spec)
        return scale * function(*args, **kwargs) if scale != 1 else function(*args, **kwargs)

    return Parts(x, leaves[j], bias, linear, "linear")


def folded(layer: Layer, scale: Tensor) -> Tensor | None:
    """Return the weights with each output channel scaled; None where that is not how a norm after it works."""
    w = layer.weight
    if layer.kind == "linear":
        square = w.ndim == 2 and layer.value.ndim == 2 and w.shape[0] == len(scale)
        return w * scale[:, None] if square else None
    ones = [1] * (w.ndim - 2)
    if layer.value.ndim != w.ndim:
        return None
    if layer.transposed:  # input channels first, and with groups only a part of the output channels after
        groups = len(scale) // w.shape[1]
        split = w.reshape(groups, -1, *w.shape[1:]) * scale.reshape(groups, 1, -1, *ones)
        return split.reshape(w.shape)
    return w * scale.reshape(-1, 1, *ones)


def _affine(op: Operation) -> Any:
    parts = parts_of(op)
    if parts is None:
        return _spelled(op) if spelling_of(op) is not None else product(op)
    return here().affine(op, parts)


def statistics(op: Operation) -> tuple[Tensor, Tensor] | None:
    """Scale and shift per channel of a norm with fixed statistics; None if it takes them from the batch."""
    order = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    if op.function is torch.batch_norm:
        order = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
    at = {name: op.argument(i, name) for i, name in enumerate(order)}
    mean, var, weight, bias = (at[n] for n in ("running_mean", "running_var", "weight", "bias"))
    if at["training"] or mean is None or var is None:
        return None
    scale = torch.rsqrt(var + (1e-5 if at["eps"] is None else at["eps"]))
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _batch_norm(op: Operation) -> Any:
    fixed = statistics(op) if len(op.inputs) == 1 else None
    if fixed is None:
        raise op.unknown(here().name)
    return normed(op, *fixed)


def normed(op: Operation, scale: Tensor, shift: Tensor) -> Tensor:
    """Return a norm with fixed statistics: one with the affine operation before it, alone with epsilon."""
    x = op.inputs[0]
    layer = here().layer(x)
    weight = None if layer is None else folded(layer, scale)
    if layer is None or weight is None:
        return here().alone(op)
    axes = (-1, *[1] * (x.ndim - 2))
    shift, scale = shift.reshape(axes), scale.reshape(axes)
    bias = shift if layer.bias is None else shift + layer.bias * scale
    return here().ruled(replace(layer, weight=weight, bias=bias, value=op.call(layer.value)))


# -- everything else ---------------------------------------------------------------------------------------------


def partly(op: Operation, kept: Sequence[int]) -> Any:
    """Return the operation with a derivative for some of its data; the rest counts as constant."""
    inputs = list(op.inputs)

    def weigh(g: Tensor, _: Tensor, *ts: Tensor) -> tuple[Tensor, ...]:
        mine, rest = ts[: len(kept)], iter(ts[len(kept) :])
        others = {i: next(rest) for i in range(len(inputs)) if i not in kept}

        def of(*mine: Tensor) -> Tensor:
            at = others | dict(zip(kept, mine, strict=True))
            out = op.call(*[at[i] for i in range(len(inputs))])
            return out[0] if isinstance(out, tuple) else out

        return cast("tuple[Tensor, ...]", vjp(of, *mine)[1](g))

    out = op.call(*inputs)
    first = out[0] if isinstance(out, tuple) else out
    known = [t for i, t in enumerate(inputs) if i not in kept]
    ruled = reroute(first, [inputs[i] for i in kept], weigh, *known)
    return (ruled, *out[1:]) if isinstance(out, tuple) else ruled


def product(op: Operation) -> Any:
    """Multiply data with data: what is not a gate takes all relevance; several of a kind take equal parts."""
    if spelling_of(op) is not None:
        return _spelled(op)
    if op.name == "bilinear" and op.is_data(op.argument(3, "bias")):
        return NotImplemented
    z = op.call(*op.inputs)
    if op.name == "prod":
        return _equally(z, op.inputs[0].numel() // max(1, z.numel()))
    gates = [here().is_gate(t) for t in op.inputs]
    kept = [i for i, gate in enumerate(gates) if not gate] or list(range(len(gates)))
    if len(kept) < len(gates):
        z = here().partly(op, kept)
    return _equally(z, len(kept))


def _equally(z: Tensor, n: int) -> Tensor:
    """Each of n factors would take all by the derivative."""
    return z if n == 1 else reroute(z, [z], lambda g, *_: g / n)


def spelling_of(op: Operation) -> Callable[..., Any] | None:
    """Return other operations whose rules replace those of this one: projections, addends that are data."""
    if op.name == "multi_head_attention_forward":
        return multi_head_attention
    if op.name in ADDED:
        return ADDED[op.name] if op.is_data(op.argument(0, "input")) else None
    if op.name in AFFINE:
        return biased_after(op.function) if op.is_data(op.argument(2, "bias")) else None
    return lerp if op.name == "lerp" and op.is_data(op.argument(2, "weight")) else None


def _spelled(op: Operation) -> Any:
    spelling = spelling_of(op)
    return NotImplemented if spelling is None else spelled_out(op, spelling)


def ratio(op: Operation) -> Any:
    """Divide: the dividend takes all relevance."""
    if spelling_of(op) is not None:
        return _spelled(op)
    above, below = op.argument(0, "input"), op.argument(1, "other")
    if op.name != "div" or op.argument(2, "rounding_mode") is not None:
        return NotImplemented
    if not op.is_data(below):
        return op.call(*op.inputs)
    return here().partly(op, [0]) if op.is_data(above) else _passed(op)


def _passed(op: Operation) -> Any:
    """An elementwise function hands its relevance down, less what it is at zero, which is a bias."""
    if rectified(op):
        return op.call(*op.inputs)
    if len(op.inputs) != 1:
        return NotImplemented
    if op.name in ("softmax", "softmin"):
        return _gate_only(op)
    x = op.inputs[0]
    if op.name in _RATIOS:
        return reroute(op.call(x), [x], lambda g, y, x: g * quotient(y, x))

    form = closed_form(op.name, op.argument(1, "exponent"))

    def weigh(g: Tensor, y: Tensor, x: Tensor, *others: Tensor) -> Tensor:
        zero = torch.zeros_like(x)
        start = op.call(zero, others=others)
        if form is None:
            slope = lambda at: vjp(lambda t: op.call(t, others=others), at)[1](torch.ones_like(y))[0]
            made = chord(y, start, x, zero, slope, smooth=op.name in SMOOTH)
        else:
            made = form(x, zero)
        made = torch.where(made.isfinite() & start.isfinite(), made, quotient(y, x))
        return g * torch.where(x.abs() < TINY, 0, made)

    return reroute(op.call(x), [x], weigh, *op.others)


def _gate_only(op: Operation) -> Tensor:
    name = here().name

    def weigh(g: Tensor, _: Tensor, x: Tensor) -> Tensor:
        if levels.true_anywhere(g != 0):
            raise NotImplementedError(
                check.problem(
                    name,
                    "a softmax that weighs other values",
                    "one whose probabilities are explained",
                    "Explain the logits: take the score before the softmax",
                )
            )
        return torch.zeros_like(x)

    return reroute(op.call(*op.inputs), op.inputs, weigh)


def centred(op: Operation) -> tuple[Tensor, Tensor, Tensor] | None:
    """Split a norm over groups of values: what it centres, the factor after that, the weights per channel."""
    x = op.inputs[0]
    if op.name == "instance_norm":
        weight, eps, own = (
            op.argument(3, "weight"),
            op.argument(7, "eps", 1e-5),
            op.argument(5, "use_input_stats", True),
        )
        if not own:
            return None
        axes, shape = tuple(range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
        c = _less_mean(x, axes)
        size = c.square().mean(axes, keepdim=True)
    elif op.name == "group_norm":
        groups, weight, eps = (
            op.argument(1, "num_groups"),
            op.argument(2, "weight"),
            op.argument(4, "eps", 1e-5),
        )
        shape = (-1, *[1] * (x.ndim - 2))
        split = x.reshape(x.shape[0], groups, -1)
        split = _less_mean(split, (-1,))
        size = split.square().mean(-1, keepdim=True).expand_as(split).reshape(x.shape)
        c = split.reshape(x.shape)
    else:
        axes = tuple(range(-len(op.argument(1, "normalized_shape")), 0))
        last = 4 if op.name == "layer_norm" else 3
        weight, eps, shape = op.argument(2, "weight"), op.argument(last, "eps"), tuple(x.shape[axes[0] :])
        eps = eps if eps is not None else 1e-5 if op.name == "layer_norm" else torch.finfo(x.dtype).eps
        c = _less_mean(x, axes) if op.name == "layer_norm" else x
        size = c.square().mean(axes, keepdim=True)
    gain = torch.ones((), dtype=x.dtype, device=x.device) if weight is None else weight.reshape(shape)
    return c, torch.rsqrt(size + eps) * gain, gain


def _less_mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Without the mean; once more for what rounding left of the mean of large values."""
    c = x - x.mean(axes, keepdim=True)
    return c - c.mean(axes, keepdim=True)


def _norm(op: Operation) -> Any:
    """The scale is constant, the mean is not: epsilon on the centred values."""
    if len(op.inputs) != 1:
        return NotImplemented
    found = centred(op)
    if found is None:
        order = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (op.argument(i + 1, n) for i, n in enumerate(order))
        scale = torch.rsqrt(var + op.argument(7, "eps", 1e-5))
        scale = scale if weight is None else scale * weight
        return normed(op, scale, (0 if bias is None else bias) - mean * scale)
    c, factor, _ = found
    weigh = lambda g, v, _, f: stabilised(g * v, v, 1e-6) * f
    return reroute(op.call(*op.inputs), [c], weigh, factor)


def _attention(op: Operation) -> Any:
    """The weights of attention are constant."""
    value = op.argument(2, "value")
    kept = [i for i, t in enumerate(op.inputs) if t is value][-1:]
    return here().partly(op, kept) if kept else NotImplemented


def _glu(op: Operation) -> Any:
    x, dim = op.inputs[0], op.argument(1, "dim", -1)

    def weigh(g: Tensor, _: Tensor, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x.chunk(2, dim)[1])
        return torch.cat([g * gate, torch.zeros_like(g)], dim)

    return reroute(op.call(x), [x], weigh)


def _added(op: Operation) -> Any:
    """A constant added to what an affine operation gave is its bias."""
    x = op.argument(0, "input")
    layer = here().layer(x) if op.is_data(x) and len(op.inputs) == 1 else None
    if layer is None:
        return NotImplemented
    value = op.call(layer.value)
    if value.shape != layer.value.shape:
        return NotImplemented
    constant = op.call(torch.zeros_like(layer.value))
    bias = constant if layer.bias is None else constant + layer.bias
    return here().ruled(replace(layer, bias=bias, value=value))


def _sampled(op: Operation) -> Any:
    """Where it is sampled is constant."""
    if not op.is_data(op.argument(0, "input")):
        return NotImplemented
    return op.call(*op.inputs) if len(op.inputs) == 1 else here().partly(op, [0])


def common(rewrite: str) -> None:
    """Give a rewrite the rules that relevance has for everything but affine operations and sums."""
    rule(rewrite, *AFFINE)(_affine)
    rule(rewrite, *MATRICES, "bilinear")(_affine)
    rule(rewrite, *(PRODUCTS - MATRICES - {"bilinear"}))(product)
    rule(rewrite, *QUOTIENTS)(ratio)
    rule(rewrite, *ACTIVATIONS, *ELEMENTWISE, *_RATIOS, "softmax", "softmin")(_passed)
    rule(rewrite, *NORMS)(_norm)
    rule(rewrite, "batch_norm")(_batch_norm)
    rule(rewrite, "add", "sub")(_added)
    rule(rewrite, "scaled_dot_product_attention")(_attention)
    rule(rewrite, "multi_head_attention_forward", "lerp")(_spelled)
    rule(rewrite, "glu")(_glu)
    rule(rewrite, "grid_sample")(_sampled)


common("lrp")


@rule("lrp", "logsumexp", "log_softmax")
def _soft_maximum(op: Operation) -> Any:
    r"""A mean with the weights of a softmax, which are constant; the entropy of these weights is a bias."""
    return op.call(*op.inputs)


# -- which affine operations are the last ones ----------------------------------------------------------------


class _Layout(Rewriting):
    """Changes nothing: finds out which affine operations the score depends on with no other one in between."""

    def __init__(self) -> None:
        super().__init__("lrp", ())
        self._counts: WeakKeyDictionary[Tracer, Counter[str]] = WeakKeyDictionary()

    def rule(self, op: Operation) -> Any:
        notes = tracer().notes
        before: frozenset[Any] = frozenset().union(*(notes.get(t, frozenset()) for t in op.inputs))
        spelling = spelling_of(op)
        if spelling is not None:
            return spelled_out(op, spelling)
        out = op.call(*op.inputs)
        if is_affine(op):
            before = frozenset({number(self._counts, op.where)})
        for t in tree_flatten(out)[0]:
            if isinstance(t, Tensor):
                notes[t] = before
        return out


def last_layers(name: str, score: Score, x: Tensor) -> frozenset[Any]:
    """Return the affine operations after which none comes on the way to the score, by one run."""
    found: frozenset[Any] = frozenset()

    def looked(x: Tensor) -> Tensor:
        nonlocal found
        y = score(x)
        found = tracer().notes.get(y, frozenset()) if isinstance(y, Tensor) else frozenset()
        return y

    with visits.aside(), torch.no_grad():
        interception.observe(name, looked, (x,), (), rewrite=_Layout())
    return found


def relevant(score: Score, make: Callable[[frozenset[Any]], Relevance], *, last: bool) -> Score:
    """Return the score by the rules of a composite; with ``last`` it runs once before, to find its last layers."""

    name = make(frozenset()).name

    check.score(name, score)

    def changed(x: Tensor) -> Tensor:
        found = last_layers(name, score, x) if last else frozenset()
        return rewritten(score, lambda: make(found))(x)

    if not last:
        return rewritten(score, lambda: make(frozenset()))
    return named(carry(changed, score, rewritten=True), f"{name} of {name_of(score)}")


@rewrite(family="relevance", paper="Bach et al. 2015, doi:10.1371/journal.pone.0130140", leads=1)
def lrp(score: Score, composite: Composite | str = "epsilon") -> Score:
    r"""Return the score with derivatives of relevance: at every place, activation times gradient is its relevance.

    .. math:: R_j = a_j \frac{\partial F}{\partial a_j}, \qquad
              R_j = \sum_k \frac{a_j \tilde w_{jk}}{\sum_{j'} a_{j'} \tilde w_{j'k} + \tilde b_k} R_k

    where the rule of an affine operation says what :math:`\tilde w` is. The others, whatever their spelling:

    - Elementwise functions pass relevance on, except for what they are at zero, which is a bias; max-pools give it
      to the winner; sums, averages and interpolations share it out by contribution: their ordinary derivative.
    - A batch norm becomes one with the affine operation before it, and so does the addition of a constant; a norm
      alone has epsilon. Instance, layer, group and RMS norms have a constant scale and epsilon on what they centre.
    - In a product of data with what a sigmoid or softmax gave (also averaged, scaled, taken from 1), the other
      factor takes all; without such a gate n factors take 1 / n each. What is divided takes all.
    - The weights of attention are constant, so that all goes to the values; its projections are affine operations
      like others. Constant are also the places where grid_sample samples, and in logsumexp and log_softmax the
      weights of the softmax, whose entropy is a bias.
    - Anything else is refused, and so is a softmax whose probabilities are explained.

    The relevance of biases stays where it is: the sum at the input is F(x) less that, and exact without biases and
    with epsilon 0. At a convolution with a batch norm after it read the place of the norm.

    Args:
        score: ``(C,*S) -> ()``.
        composite: a ``Composite``, or the name of one: zero, epsilon, epsilon_plus, epsilon_plus_flat,
            epsilon_alpha2_beta1, epsilon_alpha2_beta1_flat, deep_taylor.

    Returns:
        A score of the same values.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: torch.nn.functional.linear(x, torch.tensor([[1., -1.]])).sum()
        >>> x = torch.tensor([[3., 1.]])
        >>> [round(v, 4) for v in (x * eg.gradient(lrp(score, "epsilon"))(x)).flatten().tolist()]
        [3.0, -1.0]

    Reference:
        Bach et al. 2015, doi:10.1371/journal.pone.0130140; Montavon et al. 2019, doi:10.1007/978-3-030-28954-6_10.
    """
    chosen = composite_of("lrp", composite)
    last = chosen.last is not None
    return relevant(score, lambda found: Relevance("lrp", chosen, found), last=last)


def relevances(
    score: Score, composite: Composite | str, x: Tensor, places: Sequence[str]
) -> dict[str, Tensor]:
    r"""Return how much relevance there is at each of several places: :math:`\sum_j R_j`.

    Conserved along a chain of places that are cuts. What is missing at a lower one stayed with biases, or with the
    epsilon of rules.

    Args:
        score: ``(C,*S) -> ()``.
        composite: as in ``lrp``.
        x: an example.
        places: where.

    Returns:
        ``{place: sum}``, in the order asked for.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(torch.relu(2 * x), "hidden") * 3).sum()
        >>> {k: v.item() for k, v in relevances(score, "zero", torch.tensor([[1., -1.]]), ["hidden"]).items()}
        {'hidden': 6.0}
    """
    if isinstance(places, str):
        places = [places]
    values, gradients = activation_and_gradient(lrp(score, composite), places)(x)
    return {p: (a * g).sum() for p, a, g in zip(places, values, gradients, strict=True)}
