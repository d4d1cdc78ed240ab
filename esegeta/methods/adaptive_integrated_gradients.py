"""Integrated gradients to a tolerance."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import check, levels, progress
from esegeta.engine.execution import record
from esegeta.engine.gradient import value_and_gradient

# Gradients that stay in memory: those beside the intervals that may still be halved.
_KEPT = 12


class Integrated(NamedTuple):
    """An attribution, the completeness residual that is left, and the gradients that it took."""

    attribution: Tensor
    residual: Tensor
    evaluations: Tensor


@method(
    refs=("baseline",),
    axioms=("completeness", "dummy", "symmetry", "shift", "sensitivity_a"),
    example={"tolerance": 1e-6, "most": 400},
    paper="Sundararajan, Taly, Yan 2017, arXiv:1703.01365",
    also=("integrated_gradients_adaptive", "ig_adaptive"),
)
def adaptive_integrated_gradients(score: Score, *, tolerance: float = 0.01, most: int = 200) -> Explain:
    r"""Integrated gradients with as many gradients as completeness needs, where the path needs them.

    .. math:: a_i = (x_i - x'_i) \sum_j \tfrac{h_j}{2} \left( \partial_i F(t_j) + \partial_i F(t_j + h_j) \right)

    The trapezoidal sum over an interval has a residual that is known exactly, since F is evaluated with every
    gradient. The two intervals with the largest residuals are halved until the residual of the whole is at
    most ``tolerance |F(x) - F(x')|`` twice in a row (once could be two errors that cancel).

    Every gradient is used once; twelve are kept, whatever their number.

    Args:
        score: ``(C,*S) -> ()``.
        tolerance: the largest residual as a fraction of ``|F(x) - F(x')|``.
        most: the most gradients; a warning says if they were not enough.

    Returns:
        ``explain(x, baseline) -> like x``. ``integrated(score, ...)`` gives residual and number of gradients
        too.

    Example:
        >>> import torch
        >>> explain = adaptive_integrated_gradients(lambda x: (x ** 2).sum())
        >>> explain(torch.tensor([[1., 2.]]), torch.zeros(1, 2)).tolist()
        [[1.0, 4.0]]

    Reference:
        Sundararajan, Taly, Yan 2017, equation 1, arXiv:1703.01365; the refinement is ours.
    """
    run = integrated(score, tolerance=tolerance, most=most)

    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        return run(x, baseline).attribution

    return explain


def integrated(score: Score, *, tolerance: float = 0.01, most: int = 200):  # type: ignore[no-untyped-def]
    """``(x, baseline) -> Integrated``: adaptive integrated gradients with residual and number of gradients.

    >>> import torch
    >>> done = integrated(lambda x: (x ** 2).sum())(torch.tensor([[1., 2.]]), torch.zeros(1, 2))
    >>> done.residual.item(), int(done.evaluations)
    (0.0, 2)
    """
    where = "adaptive_integrated_gradients"
    tolerance = check.non_negative(where, "tolerance", tolerance)
    most = check.positive_count(where, "most", most, least=3)
    both = value_and_gradient(score)

    def explain(x: Tensor, baseline: Tensor) -> Integrated:
        line = x - baseline

        def at(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            value, slope = both(baseline + t * line)
            return value, (slope * line).sum(), slope

        t = x.new_tensor([0.0, 1.0])
        values, rates, ends = vmap(at)(t)
        kept = list(ends.unbind())
        slot = torch.tensor(
            [0, 1], device=x.device
        )  # where each node's gradient is kept, -1 once it is settled
        left, right = slot[:1], slot[1:]  # the nodes on either side of each interval
        settled = torch.zeros_like(x)
        goal = tolerance * (values[1] - values[0]).abs()
        calm = done = torch.zeros_like(goal, dtype=torch.bool)
        evaluations = torch.full_like(goal, 2, dtype=torch.int64)

        with progress.loop(where) as bar:
            while True:
                errors = (t[right] - t[left]) * (rates[left] + rates[right]) / 2 - (
                    values[right] - values[left]
                )
                below = errors.sum().abs() <= goal
                done = done | (below & calm)
                calm = below
                open_ = torch.where((slot[left] >= 0) & (slot[right] >= 0), errors.abs(), -1.0)
                worst, which = open_.topk(min(2, len(left)))
                done = done | (worst[0] <= 0) & (below | (worst[0] < 0))
                if len(t) + len(which) > most or not levels.true_anywhere(~done):
                    break
                middle = (t[left[which]] + t[right[which]]) / 2
                new_values, new_rates, new_slopes = vmap(at)(middle)
                evaluations = torch.where(done, evaluations, evaluations + len(which))
                t, values, rates = (
                    torch.cat([old, new])
                    for old, new in ((t, middle), (values, new_values), (rates, new_rates))
                )
                for k, slope in enumerate(new_slopes.unbind()):
                    node = len(slot)
                    halved = (torch.arange(len(left), device=x.device) == which[k]) & ~done & (worst[k] >= 0)
                    far = right[which[k]]
                    # An example that is done gets an interval of length zero instead: it changes no more.
                    left = torch.cat([left, torch.where(halved.any(), node, far)[None]])
                    right = torch.cat([torch.where(halved, node, right), far[None]])
                    if len(kept) < _KEPT:
                        slot = torch.cat([slot, slot.new_tensor([len(kept)])])
                        kept.append(slope)
                        continue
                    chosen = (torch.arange(len(open_), device=x.device)[:, None] == which).any(1)
                    out = _calmest(slot, left, right, torch.where(chosen, float("inf"), open_), t)
                    weight = _weights(t, left, right)[out]
                    here = [slot[out] == s for s in range(_KEPT)]
                    settled = settled + weight * sum(
                        torch.where(h, g, 0.0) for h, g in zip(here, kept, strict=True)
                    )
                    kept = [torch.where(h, slope, g) for h, g in zip(here, kept, strict=True)]
                    slot = torch.cat(
                        [torch.where(torch.arange(node, device=x.device) == out, -1, slot), slot[out][None]]
                    )
                bar.at(min(1.0, len(t) / most))

        weights = _weights(t, left, right)
        average = settled
        for s, slope in enumerate(kept):
            average = average + torch.where(slot == s, weights, 0.0).sum() * slope
        residual = (line * average).sum() - (values[1] - values[0])
        if levels.true_anywhere(residual.abs() > 1.5 * goal + 1e-5 * values.abs().amax()):
            record(
                "tolerance",
                f"{where}: the residual is still above {tolerance:.2g} of the difference after {most} gradients.",
            )
        return Integrated(line * average, residual, evaluations)

    return explain


def _weights(t: Tensor, left: Tensor, right: Tensor) -> Tensor:
    half = (t[right] - t[left]) / 2
    nodes = torch.arange(len(t), device=t.device)[:, None]
    return (((nodes == left) | (nodes == right)) * half).sum(1)


def _calmest(slot: Tensor, left: Tensor, right: Tensor, errors: Tensor, t: Tensor) -> Tensor:
    """The kept node whose intervals have the smallest error, to be settled."""
    nodes = torch.arange(len(slot), device=slot.device)[:, None]
    known = torch.cat([errors, errors.new_full((len(left) - len(errors),), float("inf"))])
    known = torch.where(t[right] > t[left], known, -1.0)
    touching = torch.where((nodes == left) | (nodes == right), known, -1.0).amax(1)
    return torch.where(slot >= 0, touching, float("inf")).argmin()
