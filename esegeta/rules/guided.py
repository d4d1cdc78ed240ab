"""Guided backpropagation and deconvolution: activations that let only positive signals pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esegeta._registry import rewrite
from esegeta._types import Score
from esegeta.engine.operators import Operation, replace, reroute
from esegeta.rules.rewriting import Rewriting, rewritten, rule
from esegeta.rules.vocabulary import ACTIVATIONS, KNOWN, rectified

# Operations that are activations in some of their forms.
_LOOKALIKES = ("maximum", "fmax", "max", "mul", "where")


@rule("guided", *ACTIVATIONS, *_LOOKALIKES)
def _guided(op: Operation) -> Any:
    if rectified(op):
        return replace(op.call, op.inputs, _where_active)
    if op.name in _LOOKALIKES or len(op.inputs) != 1:
        return NotImplemented

    # The slope comes from the activation itself, between a gate above it and one below.
    (x,) = op.inputs
    y = op.call(reroute(x, [x], lambda g, *_: g.clamp(min=0)))
    return reroute(y, [y], lambda g, _, y: g.clamp(min=0) * (y > 0))


def _where_active(g: Tensor, x: Tensor) -> Tensor:
    # In place on what is new: a second tensor of the size of the activation takes as long as the arithmetic.
    return torch.ops.aten.threshold_backward(g, x.expand_as(g), 0).relu_()


@rule("deconvnet", *ACTIVATIONS, *_LOOKALIKES)
def _deconvnet(op: Operation) -> Any:
    if (op.name in _LOOKALIKES and not rectified(op)) or len(op.inputs) != 1:
        return NotImplemented
    return replace(op.call, op.inputs, lambda g, _: torch.relu(g))


def _rewrite(name: str, hits: frozenset[str] | None = ACTIVATIONS) -> Callable[[Score], Score]:
    return lambda score: rewritten(score, lambda: Rewriting(name, KNOWN), hits=hits)


@rewrite(family="activations", paper="Springenberg et al. 2015, arXiv:1412.6806", leads=1)
def guided(score: Score) -> Score:
    r"""Return the score with guided derivatives: an activation passes on what is positive, where it is active itself.

    .. math:: R_{in} = [R_{out}]_+ \odot [a'(x)]_+ \odot 1[a(x) > 0]

    which for a ReLU is the published rule. Every activation is seen, whatever its spelling. Its gradient is
    guided backpropagation.

    Args:
        score: ``(C,*S) -> ()``.

    Returns:
        A score of the same values.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (torch.relu(x) * torch.tensor([[1., -1., 1.]])).sum()
        >>> eg.gradient(guided(score))(torch.tensor([[2., 2., -2.]])).tolist()
        [[1.0, 0.0, 0.0]]

    Reference:
        Springenberg et al. 2015, arXiv:1412.6806.
    """
    return _rewrite("guided")(score)


def guided_where_possible(score: Score) -> Score:
    """Return ``guided``, or the score itself where it has no activation."""
    return _rewrite("guided", None)(score)


@rewrite(family="activations", paper="Zeiler, Fergus 2014, arXiv:1311.2901", leads=1)
def deconvnet(score: Score) -> Score:
    r"""Return the score with the derivatives of a deconvolutional network: an activation passes on what is positive.

    .. math:: R_{in} = [R_{out}]_+

    Args:
        score: ``(C,*S) -> ()``.

    Returns:
        A score of the same values.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (torch.relu(x) * torch.tensor([[1., -1., 1.]])).sum()
        >>> eg.gradient(deconvnet(score))(torch.tensor([[2., 2., -2.]])).tolist()
        [[1.0, 0.0, 1.0]]

    Reference:
        Zeiler, Fergus 2014, arXiv:1311.2901.
    """
    return _rewrite("deconvnet")(score)
