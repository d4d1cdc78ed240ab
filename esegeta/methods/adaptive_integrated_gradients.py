"""Integrated gradients to a tolerance."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from esegeta import subdivision
from esegeta._facts import explanation
from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import check, levels, progress
from esegeta.engine.execution import DeadlineExceeded, current, record
from esegeta.engine.gradient import value_and_gradient

# Gradients that stay in memory: those beside the intervals that may still be halved. Too few of them settle
# intervals that would have been worth halving: with 12 the real U-Net never came below 2 %.
_KEPT = 32


class Integrated(NamedTuple):
    """An attribution, the completeness residual that is left, and the gradients that it took."""

    attribution: Tensor
    residual: Tensor
    evaluations: Tensor


@method(
    refs=("baseline",),
    axioms=(
        "completeness sensitivity_a dummy symmetry implementation_invariance sensitivity_n shift "
        "scale_of_output continuity class_sensitivity translation_equivariance affine_equivariance "
        "monotonicity"
    ),
    example={"tolerance": 1e-6, "max_runs": 400},
    family="gradients and paths",
    cost=lambda max_runs: Cost(gradients=max_runs),
    paper="Sundararajan, Taly, Yan 2017, arXiv:1703.01365",
    also=("integrated_gradients_adaptive", "ig_adaptive"),
)
def adaptive_integrated_gradients(
    score: Score, *, tolerance: float | int = 0.01, max_runs: int = 200
) -> Explain:
    r"""Explain by integrated gradients with as many gradients as completeness needs, where the path needs them.

    .. math:: a_i = (x_i - x'_i) \sum_j \tfrac{h_j}{2} \left( \partial_i F(t_j) + \partial_i F(t_j + h_j) \right)

    The trapezoidal sum over an interval has a residual that is known exactly, since F is evaluated with every
    gradient. The two intervals with the largest residuals are halved until the residual of the whole is at
    most ``tolerance |F(x) - F(x')|`` twice in a row (once could be two errors that cancel).

    Every gradient is used once. At most 32 are kept, those beside the largest residuals; the rest is summed up.

    Args:
        score: ``(C,*S) -> ()``.
        tolerance: the largest residual as a fraction of ``|F(x) - F(x')|``.
        max_runs: the most gradients; a warning says if they were not enough.

    Returns:
        ``explain(x, baseline) -> like x``. ``adaptive_report(score, ...)`` gives residual and number of gradients
        too.

    Example:
        >>> import torch
        >>> explain = adaptive_integrated_gradients(lambda x: (x ** 2).sum())
        >>> explain(torch.tensor([[1., 2.]]), torch.zeros(1, 2)).tolist()
        [[1.0, 4.0]]

    Reference:
        Sundararajan, Taly, Yan 2017, equation 1, arXiv:1703.01365; the refinement is ours.
    """
    run = adaptive_report(score, tolerance=tolerance, max_runs=max_runs)

    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        return run(x, baseline).attribution

    return explain


def adaptive_report(
    score: Score, *, tolerance: float | int = 0.01, max_runs: int = 200
) -> Callable[[Tensor, Tensor], Integrated]:
    """Return ``(x, baseline) -> Integrated``: adaptive integrated gradients with residual and number of gradients.

    >>> import torch
    >>> done = adaptive_report(lambda x: (x ** 2).sum())(torch.tensor([[1., 2.]]), torch.zeros(1, 2))
    >>> done.residual.item(), int(done.evaluations)
    (0.0, 2)
    """
    where = "adaptive_integrated_gradients"
    tolerance = check.non_negative(where, "tolerance", tolerance)
    max_runs = check.positive_count(where, "max_runs", max_runs, least=3)
    both = value_and_gradient(check.score(where, score))

    def explain(x: Tensor, baseline: Tensor) -> Integrated:
        check.image(where, "x", x)
        check.finite(where, "baseline", check.like(where, "baseline", baseline, x), "Repair it")
        line = x - baseline

        def at(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            value, slope = both(baseline + t * line)
            return value, (slope * line).sum(), slope

        values, rates, slopes = vmap(at)(x.new_tensor([0.0, 1.0]))
        p, store = subdivision.whole(values, rates), subdivision.Store(list(slopes.unbind()))
        goal = tolerance * (values[1] - values[0]).abs()
        calm = done = torch.zeros_like(goal, dtype=torch.bool)
        evaluations = torch.full_like(goal, 2, dtype=torch.int64)
        with progress.loop(where) as bar:
            while True:
                below, errors = p.errors.sum().abs() <= goal, p.open_errors
                worst, which = errors.topk(min(2, len(errors)))
                done = done | (below & calm) | (worst[0] < 0) | (below & (worst[0] == 0))
                calm = below
                if len(p.t) + len(which) > max_runs or not levels.true_anywhere(~done):
                    break
                if current().left() <= 0:
                    raise DeadlineExceeded(
                        f"{where}: the deadline passed after {len(p.t)} gradients. Allow more time or error."
                    )
                t, first = subdivision.middles(p, which), len(p.t)
                values, rates, slopes = vmap(at)(t)
                p = subdivision.measured(p, t, values, rates)
                evaluations = evaluations + torch.where(done, 0, len(which))
                # The ends of the intervals that are being halved keep their gradients.
                indices = torch.arange(len(errors), device=x.device)[:, None]
                errors = torch.where((indices == which).any(1), float("inf"), errors)
                for k, slope in enumerate(slopes.unbind()):
                    p = subdivision.halved(p, which[k], first + k, ~done & (worst[k] >= 0))
                    p, store = subdivision.stored(p, store, first + k, slope, errors, _KEPT)
                bar.at(min(1.0, len(p.t) / max_runs))

        average = store.total(p)
        residual = (line * average).sum() - (p.values[1] - p.values[0])
        if levels.true_anywhere(residual.abs() > 1.5 * goal + 1e-5 * p.values.abs().amax()):
            record(
                "tolerance",
                f"{where}: the residual is still above {tolerance:.2g} of the difference after {len(p.t)} gradients.",
            )
        return Integrated(line * average, residual, evaluations)

    return explanation(explain, "adaptive_report", ("baseline",), key=False)
