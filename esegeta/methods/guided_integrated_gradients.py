"""Integrated gradients along a path that the gradient chooses."""

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import check, progress
from esegeta.engine.execution import DeadlineExceeded, current
from esegeta.engine.gradient import gradient


@method(
    refs=("baseline",),
    axioms=(
        "dummy symmetry implementation_invariance shift scale_of_output class_sensitivity "
        "translation_equivariance affine_equivariance monotonicity"
    ),
    example={"steps": 24},
    family="gradients and paths",
    cost=lambda steps: Cost(gradients=steps),
    paper="Kapishnikov, Venugopalan, Avci, Wedin, Terry, Bolukbasi 2021, arXiv:2106.09788",
    also=("guided_ig",),
)
def guided_integrated_gradients(
    score: Score, *, steps: int = 200, fraction: float | int = 0.25, distance: float | int = 0.02
) -> Explain:
    r"""Move the elements with the smallest gradients first, and add up gradient times movement.

    .. math:: a = \sum_k g(x_k) \odot (x_{k+1} - x_k)

    At each step the elements are moved in order of :math:`|g_i(x_k)|`, a ``fraction`` of them at a time, until
    the L1 distance to the input is :math:`1 - (k+1)/n` of the whole. No element leaves the band of ``distance``
    around the straight line; with ``distance=0`` the path is that line. A line integral to first order: the
    sum tends to F(x) - F(x') as ``steps`` grow. Steps depend on each other and run one after another.

    Args:
        score: ``(C,*S) -> ()``.
        steps: number of gradients.
        fraction: share of all elements that is moved at a time.
        distance: half width of the band, as a fraction of the line.

    Returns:
        ``explain(x, baseline) -> like x``, signed.

    Example:
        >>> import torch
        >>> explain = guided_integrated_gradients(lambda x: x[0, 0] + 2 * x[0, 1], steps=4)
        >>> [round(v, 5) for v in explain(torch.tensor([[5., 5.]]), torch.zeros(1, 2)).flatten().tolist()]
        [5.0, 10.0]

    Reference:
        Kapishnikov et al. 2021, algorithm 1, arXiv:2106.09788.
    """
    name = "guided_integrated_gradients"
    slope = gradient(score)
    n = check.positive_count(name, "steps", steps)
    band = check.non_negative(name, "distance", distance)
    if not 0 < check.non_negative(name, "fraction", fraction) <= 1:
        raise check.refused(name, "0 < fraction <= 1", repr(fraction), "A quarter is usual")

    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        line = x - baseline
        whole = line.abs().sum()
        size = int(fraction * (x.numel() - 1)) + 1  # the lower quantile
        # Progress of each element along its own line, in [0, 1]; what does not move is at its end.
        place = torch.where(line == 0, 1.0, torch.zeros_like(x))
        attribution = torch.zeros_like(x)
        with progress.loop(name) as bar:
            for k in range(n):
                if current().left() <= 0:
                    raise DeadlineExceeded(
                        f"{name}: the deadline passed after {k} of {n} steps. Allow more time."
                    )
                g = slope(baseline + place * line)
                goal = (k + 1) / n
                caught_up = place.clamp(min=max(goal - band, 0.0))
                room = (min(goal + band, 1.0) - caught_up).clamp(min=0) * line.abs()
                needed = ((1 - caught_up) * line.abs()).sum() - (1 - goal) * whole
                share = _shares(g.abs(), room, needed, size)
                # One fused expression moves each element by its share of the room that it has.
                moved = caught_up + share * (min(goal + band, 1.0) - caught_up).clamp(min=0)
                attribution = attribution + g * (moved - place) * line
                place = moved
                bar.at((k + 1) / n)
        return attribution

    return explain


def _shares(size_of_gradient: Tensor, room: Tensor, needed: Tensor, size: int) -> Tensor:
    """Which share of its room each element moves: all of it in the first blocks, part of it in the last one.

    Blocks are the elements up to the next ``size`` in order of the gradient among those that can move; equal
    gradients share a block, so that symmetric elements move together as far as rounding leaves them equal.
    """
    flat = torch.where(room > 0, size_of_gradient, float("inf")).flatten()
    ranked = flat.sort().values
    bounds = ranked[size - 1 :: size]
    block = torch.searchsorted(bounds.contiguous(), flat.contiguous())
    blocks = len(bounds) + 1
    widths = torch.zeros(blocks, dtype=room.dtype, device=room.device).index_add(0, block, room.flatten())
    before = widths.cumsum(0) - widths
    part = ((needed - before) / torch.where(widths == 0, 1.0, widths)).clamp(0, 1)
    return part[block].reshape(room.shape)
