"""RISE: the score under random masks, credited to what they show."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from esegeta import masks, random
from esegeta._facts import unchecked
from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.coalitions import mixed
from esegeta.engine import check, stream
from esegeta.engine.estimates import answered


@method(
    refs=("baseline",),
    key=True,
    axioms="linearity implementation_invariance shift scale_of_output continuity",
    needs="values",
    shape="map",
    example={"cells": 2, "samples": 6},
    family="parts",
    cost=lambda samples: Cost(forwards=samples),
    numbers="mask",
    paper="Petsiuk, Das, Saenko 2018, arXiv:1806.07421",
    also=("randomized_input_sampling",),
)
def rise(
    score: Score,
    *,
    cells: int | Sequence[int] = 7,
    keep: float | int = 0.5,
    samples: int = 4000,
    estimator: str = "plain",
    antithetic: bool = True,
    tolerance: float | int | None = None,
) -> Explain:
    r"""Explain by the mean score of the random masks that show a voxel.

    .. math:: a_v = \frac{1}{n p} \sum_{t=1}^n F(m_t\, x + (1 - m_t)\, x')\, m_{t,v}, \qquad E[m_{t,v}] = p

    with masks of ``masks.scattered``. A Monte Carlo mean, whose error falls with the root of ``samples``. The
    ``plain`` one is the formula, unbiased for :math:`E[F m_v] / p`; on a score that is c everywhere it gives
    :math:`c\, \bar m_v / p`, which is c in expectation, and c itself for antithetic masks with p = 1/2. The
    ``self-normalised`` one divides by :math:`\sum_t m_{t,v}` instead, which gives exactly c and removes most of the
    noise that a large mean of F brings. Both are means of the score: a voxel that F ignores gets about E[F], not
    zero. The ``debiased`` one, :math:`\mathrm{Cov}(F, m_v) / \mathrm{Var}(m_v)`, is what showing a voxel with its
    surroundings adds: zero in expectation where the masks tell nothing about F.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        cells: of a mask along an axis, or one number for each axis.
        keep: p, strictly between 0 and 1.
        samples: how often the score is run; masks come in pairs, so an odd number counts as the next even one.
        estimator: ``plain``, ``self-normalised`` or ``debiased``.
        antithetic: run the counterpart of every mask too; False draws all of them independently.
        tolerance: stop before that once no standard error exceeds this fraction of the largest value.

    Returns:
        ``explain(x, baseline, key=) -> (1,*S)``, for all channels together; ``with_standard_error`` gives its error.

    Example:
        >>> import torch
        >>> explain = rise(lambda x: 0 * x.sum() + 5, cells=2, samples=4)
        >>> explain(torch.ones(1, 3), torch.zeros(1, 3), key=0).tolist()
        [[5.0, 5.0, 5.0]]

    Reference:
        Petsiuk, Das, Saenko 2018, equation 6, arXiv:1806.07421.
    """
    name = "rise"
    n = check.positive_count(name, "samples", samples)
    p = masks.share(name, "keep", keep)
    check.one_of(name, "estimator", estimator, tuple(_ESTIMATORS))
    kinds, answer = _ESTIMATORS[estimator]
    together = 2 if antithetic else 1
    enough = None if tolerance is None else check.non_negative(name, "tolerance", tolerance)

    def explain(
        x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"], *, key: int | Tensor
    ) -> Float[Tensor, "..."]:
        wide = torch.promote_types(x.dtype, torch.float32)
        plain = unchecked(score)  # a value that is not finite is named by its number below
        run = lambda m: check.scalar(name, plain(mixed(x, baseline, m))).to(wide)
        # Two estimators make of F + c what they make of F, plus c or nothing: without it, little cancels.
        middle = x.new_zeros((), dtype=wide) if estimator == "plain" else run(torch.full_like(x[:1], p))

        def sample(t: Tensor) -> Tensor:
            shown = masks.scattered(random.fold_in(key, t), x, cells=cells, keep=p)[:together, None]
            values = (vmap(run)(shown) - middle).reshape(-1, *[1] * x.ndim)
            m = shown.to(wide)
            return torch.cat([values * m, m, m * m, values.expand_as(m)][:kinds], 1).mean(0)

        nodes = torch.arange(-(-n // together), device=x.device)
        found = stream.estimate_of(
            sample, nodes, lambda mean: answer(mean, p, middle), label=name, tolerance=enough, meaning="mask"
        )
        return answered(*(t[None].to(x.dtype) for t in found))

    return explain


def _over(above: Tensor, below: Tensor) -> Tensor:
    some = below > torch.finfo(below.dtype).eps
    return torch.where(some, above / torch.where(some, below, 1), 0)


# How many of the means of F m, m, m^2 and F it takes, and what the map is of them.
_ESTIMATORS: dict[str, tuple[int, Callable[[Tensor, float, Tensor], Tensor]]] = {
    "plain": (1, lambda mean, p, _: mean[0] / p),
    "self-normalised": (2, lambda mean, _, c: c + _over(mean[0], mean[1])),
    "debiased": (4, lambda mean, *_: _over(mean[0] - mean[1] * mean[3], mean[2] - mean[1] ** 2)),
}
