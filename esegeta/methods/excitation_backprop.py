"""Excitation backpropagation, and the contrastive one."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from esegeta import rules
from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine.stitching import InTiles
from esegeta.placing import Names, activation_and_gradient, at_each, grid, local, nudge, tap
from esegeta.rules.composites import quotient
from esegeta.rules.excitation import in_tiles


@method(
    place=True,
    shape="map",
    axioms=("dummy", "symmetry", "translation_equivariance", "affine_equivariance"),
    differentiable=False,
    family="rules",
    paper="Zhang, Lin, Brandt, Shen, Sclaroff 2016, arXiv:1608.00507",
    also=("excitation_backpropagation", "ebp", "marginal_winning_probability"),
)
def excitation_backprop(score: Score, place: Names) -> Explain:
    r"""Explain by the probability that a random walk from the score down through what excites comes past each voxel.

    .. math:: P_j = \sum_k \frac{a_j^+ w_{jk}^+}{\sum_{j'} a_{j'}^+ w_{j'k}^+} P_k, \qquad
              L_u = \sum_d P_{d,u}

    Not negative. The sum is 1 at a layer through which everything passes, less what arrived at a value that
    nothing excites; the norms, skips, transposed convolutions and interpolations of a U-Net keep it. What is
    negative excites nothing, so at a raw image with negative values it has no meaning: take a layer behind an
    activation. ``rules.excitation`` says what becomes of each operation and where the walk starts.

    Args:
        score: ``(C,*S) -> ()``.
        place: a layer before the last one, whose activation is ``(D,*U)``; several for several maps.

    Returns:
        ``explain(x) -> (1,*U)``, a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> w = torch.tensor([[3., 1., -2.]])
        >>> score = lambda x: torch.nn.functional.linear(eg.mark(2 * x, "layer"), w).sum()
        >>> excitation_backprop(score, "layer")(torch.ones(1, 3)).tolist()
        [[0.75, 0.25, 0.0]]

    Reference:
        Zhang, Lin, Brandt, Shen, Sclaroff 2016, equations 2 to 4, arXiv:1608.00507.
    """
    whole = local(rules.excitation(score), place, _summed)
    tiled = lambda p: lambda x: in_tiles(score, p, x).sum(0, keepdim=True)

    def explain(x: Tensor) -> Any:
        with contextlib.suppress(InTiles):
            return whole(x)
        return at_each("excitation_backprop", tiled, place)(x)

    return explain


@method(
    place=True,
    shape="map",
    axioms="dummy symmetry continuity translation_equivariance affine_equivariance",
    differentiable=False,
    family="rules",
    paper="Zhang, Lin, Brandt, Shen, Sclaroff 2016, arXiv:1608.00507",
    also=("contrastive_excitation_backpropagation", "c_ebp", "contrastive_marginal_winning_probability"),
)
def contrastive_excitation_backprop(score: Score, place: Names, *, contrast: str | None = None) -> Explain:
    r"""Explain by excitation for the target less excitation for everything but the target, where that is positive.

    .. math:: L_u = \sum_d [P_{d,u} - \bar P_{d,u}]_+

    :math:`\bar P` starts with the negated weights of the last layer. Between a contrast layer above and the place
    the walk is linear: truncated there as published, or not before the place, which is the default.
    Zero for a score without convolution, linear layer or product with a matrix: it has no weights to negate.

    Args:
        score: ``(C,*S) -> ()``, for example the logit of a class.
        place: a layer before the last one, whose activation is ``(D,*U)``; several for several maps.
        contrast: the layer, between the place and the score, where the difference is truncated at zero.

    Returns:
        ``explain(x) -> (1,*U)``, not negative; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> w = torch.tensor([[3., 1., -4.]])
        >>> score = lambda x: torch.nn.functional.linear(eg.mark(2 * x, "layer"), w).sum()
        >>> contrastive_excitation_backprop(score, "layer")(torch.ones(1, 3)).tolist()
        [[0.75, 0.25, 0.0]]

    Reference:
        Zhang, Lin, Brandt, Shen, Sclaroff 2016, section 3.4, arXiv:1608.00507.
    """
    target, others = rules.excitation(score), rules.excitation(score, contrast=True)

    def explaining(place: str) -> Explain:
        where = place if contrast is None else contrast
        parts = lambda x: [in_tiles(score, place, x, contrast=against) for against in (False, True)]
        both = [activation_and_gradient(s, where) for s in (target, others)]

        def explain(x: Tensor) -> Any:
            if contrast is None:
                with contextlib.suppress(InTiles):
                    return whole(x)
                p, q = parts(x)
                return (p - q).clamp(min=0).sum(0, keepdim=True)
            return whole(x)

        def whole(x: Tensor) -> Any:
            (a, g), (_, h) = (run(x) for run in both)
            difference = (a * (g - h)).clamp(min=0)
            if contrast is None:
                return _summed(difference, torch.ones_like(difference))
            z = tap(score, place)(x)
            below = nudge(tap(target, contrast), place)
            (g,) = vjp(lambda d: below(x, d), torch.zeros_like(z))[1](quotient(difference, a))
            return _summed(z, g)

        return explain

    return at_each("contrastive_excitation_backprop", explaining, place)


def _summed(a: Tensor, g: Tensor) -> Tensor:
    grid(a)
    return (a * g).sum(0, keepdim=True)
