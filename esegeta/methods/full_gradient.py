"""FullGrad: the score as a sum over the input and over the biases of all layers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esegeta._facts import explanation
from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import check
from esegeta.engine.gradient import gradient
from esegeta.engine.operators import once
from esegeta.placing import bias_and_gradient, operations
from esegeta.spatial import upsample


class FullGradient(NamedTuple):
    """The part of the input, and for each operation the part of what it adds to its linear part."""

    input: Tensor
    biases: dict[str, Tensor]

    def total(self) -> Tensor:
        """Return all parts added up: the score."""
        return torch.stack([self.input.sum(), *(b.sum() for b in self.biases.values())]).sum()


def full_gradient(score: Score) -> Callable[[Tensor], FullGradient]:
    r"""Return the score, split up exactly into what the input and what every bias contributes.

    .. math:: F(x) = \sum_i x_i \, g_i + \sum_l \sum_{d,u} b_{l,d,u} \frac{\partial F}{\partial z_{l,d,u}}, \qquad
              b_l = f_l(z) - J_{f_l}(z) \, z

    over all operations l: the bias of a convolution, the shift of a batch norm, what an instance norm or a
    smooth activation adds to its own linear part. Exact up to rounding where the score is linear in the
    network's output; what a score of another kind adds on its own (a softmax, a logarithm) is in no part.

    Args:
        score: ``(C,*S) -> ()``.

    Returns:
        ``x -> FullGradient(input, biases)``; ``total()`` is F(x), ``biases`` are like the activations.

    Example:
        >>> import torch, esegeta as eg
        >>> net = torch.nn.Sequential(torch.nn.Conv1d(1, 1, 1), torch.nn.ReLU()).eval()
        >>> net[0].weight.data.fill_(2.0), net[0].bias.data.fill_(3.0)
        (tensor([[[2.]]]), tensor([3.]))
        >>> parts = full_gradient(eg.reducers.class_sum(eg.from_module(net), 1))(torch.tensor([[1., 4.]]))
        >>> parts.input.tolist(), parts.biases["0"].tolist(), parts.total().item()
        ([[2.0, 8.0]], [[3.0, 3.0]], 16.0)

    Reference:
        Srinivas, Fleuret 2019, proposition 1, arXiv:1905.00780.
    """
    slope = gradient(check.score("full_gradient", score))

    def explain(x: Tensor) -> FullGradient:
        check.image("full_gradient", "x", x)
        found = operations(score, x)
        if not found:
            return FullGradient(x * slope(x), {})
        biases, gradients, g = bias_and_gradient(score, found)(x)
        parts = {name: b * at for name, b, at in zip(found, biases, gradients, strict=True)}
        return FullGradient(x * g, parts)

    return explanation(explain, "full_gradient", (), key=False)


@method(
    shape="map",
    axioms=("scale_of_output",),
    family="layers",
    paper="Srinivas, Fleuret 2019, arXiv:1905.00780",
    also=("fullgrad", "simple_full_grad"),
    differentiable=False,
)
def full_grad(score: Score) -> Explain:
    r"""Explain by the sizes of all parts of the full gradient, added up on the grid of the input.

    .. math:: a_v = \sum_c |x \odot g|_{c,v} + \sum_l \sum_d up\left( |b_l \odot G_l| \right)_{d,v}

    without the rescaling of each part to [0, 1], which would lose how much it matters. Layers without a grid
    have no place on the map.

    Args:
        score: ``(C,*S) -> ()``.

    Returns:
        ``explain(x) -> (1,*S)``, not negative.

    Example:
        >>> import torch, esegeta as eg
        >>> net = torch.nn.Sequential(torch.nn.Conv1d(1, 1, 1), torch.nn.ReLU()).eval()
        >>> net[0].weight.data.fill_(2.0), net[0].bias.data.fill_(3.0)
        (tensor([[[2.]]]), tensor([3.]))
        >>> full_grad(eg.reducers.class_sum(eg.from_module(net), 1))(torch.tensor([[1., 4.]])).tolist()
        [[5.0, 11.0]]

    Reference:
        Srinivas, Fleuret 2019, equation 4 without rescaling, arXiv:1905.00780.
    """
    parts = full_gradient(score)

    def explain(x: Tensor) -> Tensor:
        found = parts(x)
        total = found.input.abs().sum(0, keepdim=True)
        for part in found.biases.values():
            if part.ndim == x.ndim:
                total = total + upsample(part.abs().sum(0, keepdim=True), like=x)
        return once(total)

    return explain
