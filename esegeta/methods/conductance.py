"""Layer conductance."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from esegeta import subdivision
from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import check, stream
from esegeta.engine.stitching import InTiles
from esegeta.placing import Names, partials, tilewise


@method(
    place=True,
    refs=("baseline",),
    axioms=(
        "completeness sensitivity_a dummy symmetry implementation_invariance shift scale_of_output "
        "continuity class_sensitivity translation_equivariance affine_equivariance monotonicity"
    ),
    example={"steps": 256},
    family="layers",
    cost=lambda steps: Cost(gradients=steps),
    paper="Dhamdhere, Sundararajan, Yan 2019, arXiv:1805.12233",
    also=("layer_conductance",),
)
def conductance(score: Score, place: Names, *, steps: int = 64) -> Explain:
    r"""Explain by how much of the score's difference to a baseline flows through each unit of a layer.

    .. math:: a_u(x, x') = \int_0^1 \frac{\partial F}{\partial A_u}(x_t) \, dA_u(x_t), \qquad x_t = x' + t (x - x')

    The way is cut into panels, shorter where the score bends; on each, gradient and activation are taken as
    parabolas through its ends and its middle. Both ends of the way are nodes, so no part of it is left out.
    Exact where the score is a polynomial of degree three of an activation that is linear on the way. Over a
    cut of the network (one place or several, see ``places``) the sum is F(x) - F(x'); over a layer beside a
    skip connection it is the part that flows through that layer.

    Args:
        score: ``(C,*S) -> ()``.
        place: one place, or several; then the answer is a tuple.
        steps: how many parts the way has, two for each panel; one more gradient is taken than there are parts,
            and half as many values to place the panels.

    Returns:
        ``explain(x, baseline) -> like the activation``, signed.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "layer") ** 2).sum()
        >>> explain = conductance(score, "layer", steps=8)
        >>> explain(torch.tensor([[1., 3.]]), torch.zeros(1, 2)).tolist()
        [[4.0, 36.0]]

    Reference:
        Dhamdhere, Sundararajan, Yan 2019, equation 3, arXiv:1805.12233.
    """
    steps = check.positive_count("conductance", "steps", steps)
    both = partials(score, place)
    panel = tilewise(score, place, _of_panel)

    def explain(x: Tensor, baseline: Tensor) -> Any:
        line = x - baseline
        value = lambda t: check.scalar("conductance", score(baseline + t * line))
        ends = subdivision.planned(value, (steps + 1) // 2, x, "conductance")
        nodes = torch.stack([ends[:-1], (ends[:-1] + ends[1:]) / 2], dim=1).flatten()
        nodes = torch.cat([nodes, ends[-1:]])
        try:
            flow, _ = stream.fold(
                lambda t: both(baseline + t * line), nodes, _add, (None, []), label="conductance"
            )
        except InTiles:
            flow = None
        return in_tiles(x, baseline, nodes) if flow is None else flow

    def in_tiles(x: Tensor, baseline: Tensor, nodes: Tensor) -> Any:
        ends = zip(nodes[:-2:2], nodes[1::2], nodes[2::2], strict=True)
        panels = torch.stack([torch.stack(three) for three in ends])
        way = lambda three: panel(*(baseline + t * (x - baseline) for t in three))
        return stream.integral(way, panels, torch.ones_like(panels[:, 0]), label="conductance")

    return explain


# The integral of phi_i d(phi_j), for the parabolas phi that are 1 at one of the nodes 0, 1/2, 1 and 0 at the others.
_PANEL = ((-1 / 2, 2 / 3, -1 / 6), (-2 / 3, 0, 2 / 3), (1 / 6, -2 / 3, 1 / 2))


def _add(state: tuple[Any, list[Any]], found: tuple[Any, Any], nodes: Tensor) -> tuple[Any, list[Any]]:
    """Add the panels that are complete; the last node of one is the first of the next."""
    flow, waiting = state
    for i in range(len(nodes)):
        waiting = [*waiting, tree_map(lambda t, i=i: t[i].clone(), found)]
        if len(waiting) == 3:
            (a0, g0), (a1, g1), (a2, g2) = waiting
            part = tree_map(_panel, a0, a1, a2, g0, g1, g2)
            flow = part if flow is None else tree_map(torch.add, flow, part)
            waiting = waiting[2:]
    return flow, waiting


def _of_panel(*found: tuple[Any, Any]) -> Any:
    activations, gradients = zip(*found, strict=True)
    return tree_map(_panel, *activations, *gradients)


def _panel(a0: Tensor, a1: Tensor, a2: Tensor, g0: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
    rows = [sum(c * a for c, a in zip(row, (a0, a1, a2), strict=True)) for row in _PANEL]
    return g0 * rows[0] + g1 * rows[1] + g2 * rows[2]
