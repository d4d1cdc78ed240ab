"""Excitation backpropagation: a probability that goes down through what excites, and never through what inhibits."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten

from esegeta._facts import carry, named
from esegeta._registry import rewrite
from esegeta._types import Score
from esegeta.engine import check, levels, views, visits
from esegeta.engine.gradient import name_of
from esegeta.engine.operators import Operation, reroute
from esegeta.engine.stitching import frozen
from esegeta.engine.tiles import cut, patch_of
from esegeta.placing import of_tile, pulled, tile_sizes
from esegeta.rules.composites import Composite, Layer, quotient
from esegeta.rules.lrp import (
    Note,
    Relevance,
    common,
    folded,
    here,
    last_layers,
    product,
    ratio,
    tracer,
)
from esegeta.rules.rewriting import rewritten, rule
from esegeta.rules.vocabulary import ELEMENTWISE, NORMS, rectified

NAME = "excitation"
# What becomes one with the affine operation before it.
_MERGED = NORMS | {"batch_norm", "add", "sub"}


def _excited(value: Tensor, positive: Tensor) -> Tensor:
    """The value, whose probability goes to what made the positive contributions."""
    return reroute(value, [positive], lambda g, v, p: quotient(g * v, p))


class Excitation(Relevance):
    """The one rule of excitation; with ``contrast`` the last layers have weights of the other sign.

    In a patch of a stitched answer the walk starts at one of the last layers, ``start``, with amounts that are not
    divided by their sum, which is that over all patches: it is noted.
    """

    def __init__(self, contrast: bool, last: frozenset[Any], start: tuple[str, int] | None = None) -> None:
        super().__init__(NAME, Composite(), last)
        self.contrast, self.start, self.tiled = contrast, start, start is not None
        self.noted: list[Tensor] = []

    def rule(self, op: Operation) -> Any:
        """Apply the table; after the last layers, operations only say how much each output matters."""
        notes = tracer().notes
        past = any(notes.get(t, Note()).past for t in op.inputs)
        out = op.call(*op.inputs) if past and not self._merges(op) else super().rule(op)
        for t in tree_flatten(out)[0]:
            layer = self.layer(t) if isinstance(t, Tensor) else None
            if isinstance(t, Tensor) and (past or (layer is not None and layer.last)):
                notes[t] = Note(past=True)
        return out

    def _merges(self, op: Operation) -> bool:
        return op.name in _MERGED and self.layer(op.inputs[0]) is not None

    def share(self, layer: Layer) -> Tensor:
        """Share by positive weights and inputs, without bias."""
        weight = -layer.weight if self.contrast and layer.last else layer.weight
        positive = layer.linear(layer.x.clamp(min=0), weight.clamp(min=0))
        if not layer.last:
            return _excited(layer.value, positive)
        session = visits.current()
        first = (
            0 if session is None or session.batch is None else 1
        )  # within a network examples come as a batch
        axes, parts = tuple(range(first, layer.value.ndim)), len(self.last)
        starts = self.start in (None, (layer.where, layer.number))

        def weigh(g: Tensor, _: Tensor, p: Tensor) -> Tensor:
            prior = g.clamp(min=0)
            whole = prior.sum(axes, keepdim=True) if axes else prior
            if not starts:
                return torch.zeros_like(g)
            if self.start is not None:
                self.noted.append(whole)
                return quotient(prior, p)
            return quotient(quotient(prior, whole) / parts, p)

        return reroute(layer.value, [positive], weigh)

    def partly(self, op: Operation, kept: Sequence[int]) -> Any:
        """Share among the positive of those that take all; other factors do not count."""
        positive = [t.clamp(min=0) if i in kept else t.detach() for i, t in enumerate(op.inputs)]
        return _excited(op.call(*op.inputs), op.call(*positive).clamp(min=0))

    def alone(self, op: Operation) -> Tensor:
        """Pass relevance on."""
        return reroute(op.call(*op.inputs), op.inputs, lambda g, v, x: quotient(g * v, x))


common(NAME)


@rule(NAME, "add", "sum", "mean", "cumsum", "nansum", "trace", "interpolate", "upsample")
@rule(NAME, "avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule(NAME, "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
@rule(NAME, "upsample_nearest", "upsample_bilinear", "scatter_add", "index_add")
def _summed(op: Operation) -> Any:
    """Weights that are not negative: what the positive inputs give, less what there would be without any."""
    if op.argument(3, "mode") == "bicubic" or op.kwargs.get("alpha", 1) < 0:
        raise op.unknown(NAME)
    value, excites = op.call(*op.inputs), [t.clamp(min=0) for t in op.inputs]
    if op.name == "add":  # a constant would have to be taken off again, and may be the larger part
        parts = dict(zip(map(id, op.inputs), excites, strict=True))
        a, b = (parts.get(id(t)) for t in (op.argument(0, "input"), op.argument(1, "other")))
        b = None if b is None else op.argument(2, "alpha", 1) * b
        excited = a + b if a is not None and b is not None else b if a is None else a
        assert excited is not None
        return _excited(value, excited.expand_as(value))
    constants = [torch.zeros_like(t) if t.is_floating_point() else t for t in op.others]
    return _excited(value, op.call(*excites, others=constants))


@rule(NAME, "upsample_bicubic2d", "lerp", "diff", "neg", "negative")
def _refused(op: Operation) -> Any:
    raise op.unknown(NAME)


@rule(NAME, "sub")
def _subtracted(op: Operation) -> Any:
    """What is subtracted inhibits."""
    excites = op.argument(0, "input")
    if not op.is_data(excites):
        raise op.unknown(NAME)
    z = op.call(*op.inputs)
    return _excited(z, excites.clamp(min=0).expand_as(z))


@rule(NAME, "mul", "div")
def _scaled(op: Operation) -> Any:
    """By a constant: a weight of its own for every element."""
    x = op.inputs[0]
    if len(op.inputs) != 1 or (op.name == "div" and not op.is_data(op.argument(0, "input"))):
        return product(op) if op.name == "mul" else ratio(op)
    z = op.call(x)
    positive = op.call(x.clamp(min=0)).clamp(min=0)
    return _excited(z, positive)


@rule(NAME, *ELEMENTWISE)
def _activated(op: Operation) -> Any:
    """Its values are as active as its inputs: all of the probability passes, also where it is not zero at zero."""
    if rectified(op):
        return op.call(*op.inputs)
    return here().alone(op) if len(op.inputs) == 1 else NotImplemented


@rule(NAME, *NORMS)
def _normed(op: Operation) -> Any:
    """Together with the affine operation before it, whose weights it turns where its own are negative."""
    if len(op.inputs) != 1:
        return NotImplemented
    x, weight = op.inputs[0], op.argument(3 if op.name == "instance_norm" else 2, "weight")
    layer, z = here().layer(x), op.call(x)
    if layer is None or (op.name in ("layer_norm", "rms_norm") and layer.kind != "linear"):
        return here().alone(op)
    if weight is None:
        return here().ruled(replace(layer, value=z))
    last = layer.kind == "linear" and weight.ndim == 1 and layer.weight.ndim == 2
    turned = layer.weight * weight.sign()[:, None] if last else folded(layer, weight.sign())
    return here().alone(op) if turned is None else here().ruled(replace(layer, weight=turned, value=z))


def in_tiles(score: Score, place: str, x: Tensor, *, contrast: bool = False) -> Tensor:
    """Return the probability at a layer of a stitched answer: what arrives of one walk through all patches.

    The score's derivative for the answer says where the walk starts, with the part of each patch as it is weighted.
    What arrives in the patches is added up. The last affine operations have to be those of the patches' network.
    """
    whole = frozen(NAME, score, x)
    window, (at,) = whole.window, [views.parse(NAME, place)]
    sizes = tile_sizes(window, [at], whole.x)
    own = cut(whole.x, tuple(slice(n) for n in patch_of(NAME, window.patch, whole.x)))
    last = last_layers(NAME, lambda patch: window.model(patch).sum(), own)
    if not last or last_layers(NAME, whole.rest, torch.zeros_like(whole.cotangent)):
        raise check.refused(
            NAME,
            "a stitched score whose last convolution or linear map is one of the network of the patches",
            f"{name_of(score)}, where it is not",
            "Take the network without tiles, or another reducer",
        )
    parts = []
    for start in sorted(last):

        def work(
            weights: Tensor, patches: Tensor, cotangents: Tensor, start: Any = start
        ) -> tuple[Tensor, ...]:
            walk = Excitation(contrast, last, start)

            def one(weight: Tensor, patch: Tensor, cotangent: Tensor) -> Tensor:
                tile = rewritten(of_tile(window, weight, cotangent, score), lambda: walk)
                (a,), (g,), _ = pulled(NAME, tile, [at], sizes, patch)
                return a * g

            arrived = vmap(one)(weights, patches, cotangents)
            # Read under the levels of vmap: the starts of all patches, in their order.
            started = torch.cat([levels.base(total).reshape(-1) for total in walk.noted])
            return arrived, started.reshape(-1, *[1] * (arrived.ndim - 1)).to(arrived.dtype)

        arrived, started = window.gathered(work, whole.x, whole.cotangent)
        parts.append(quotient(arrived, started.sum()) / len(last))
    return torch.stack(parts).sum(0)


@rewrite(family="relevance", paper="Zhang et al. 2016, arXiv:1608.00507", leads=1)
def excitation(score: Score, *, contrast: bool = False) -> Score:
    r"""Return the score with derivatives of excitation: at every place, activation times gradient is a probability.

    .. math:: P_j = \sum_k \frac{a_j^+ w_{jk}^+}{\sum_{j'} a_{j'}^+ w_{j'k}^+} P_k, \qquad 0/0 := 0

    It starts at the last affine operations before the score: their outputs share 1 in proportion to the positive
    part of the derivative of the score (several such operations have equal parts). Without any it starts with 1 at
    the score. From there on it adds up to 1 at every cut, as long as all sums that it is divided by are positive.
    Sums, averages and interpolations have positive weights of their own; what is subtracted inhibits;
    max-pools choose their winner; activations pass it on. Norms belong to the affine operation before them, and
    turn the sign of its weights where their own are negative; a norm alone passes it on.

    Where an input of a layer is negative it excites nothing, so the probability at a raw image with negative values
    has no meaning: stop at a layer. The score runs once more, without a gradient, to find its last operations.

    Args:
        score: ``(C,*S) -> ()``.
        contrast: with the weights of the last affine operations negated: what excites everything but the target.

    Returns:
        A score of the same values.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: torch.nn.functional.linear(x, torch.tensor([[1., 2., -1.]])).sum()
        >>> x = torch.tensor([[2., 1., 1.]])
        >>> (x * eg.gradient(excitation(score))(x)).tolist()
        [[0.5, 0.5, 0.0]]

    Reference:
        Zhang, Lin, Brandt, Shen, Sclaroff 2016, equation 4, arXiv:1608.00507.
    """

    check.score(NAME, score)

    def changed(x: Tensor) -> Tensor:
        last = last_layers(NAME, score, x)
        y = rewritten(score, lambda: Excitation(contrast, last))(x)
        return y if last or not isinstance(y, Tensor) else reroute(y, [y], lambda g, _, y: quotient(g, y))

    changed.of = score  # type: ignore[attr-defined]
    return named(carry(changed, score, rewritten=True), f"{NAME} of {name_of(score)}")
