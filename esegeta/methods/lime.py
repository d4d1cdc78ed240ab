"""LIME: a weighted ridge regression of the score on which parts are present."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import coalitions, random
from esegeta._facts import explanation
from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import check
from esegeta.features import Features, elements


class LimeFit(NamedTuple):
    """The coefficient of each part and its 95 % interval, all (d,); the intercept; the weighted R^2."""

    coefficients: Tensor
    intercept: Tensor
    r2: Tensor
    low: Tensor
    high: Tensor


@method(
    refs=("baseline",),
    key=True,
    axioms=(
        "sensitivity_a linearity implementation_invariance shift scale_of_output continuity class_sensitivity"
    ),
    needs="values",
    example={"samples": 64},
    family="parts",
    cost=lambda samples: Cost(forwards=samples),
    paper="Ribeiro, Singh, Guestrin 2016, arXiv:1602.04938",
)
def lime(
    score: Score,
    *,
    features: Features | None = None,
    samples: int = 1000,
    width: float | int = 0.25,
    ridge: float | int = 1.0,
) -> Explain:
    r"""Explain by the linear model of presences nearest to the score, with most weight near the image.

    .. math:: \min_{a, c} \sum_t w(z_t) \left( v(z_t) - c - a \cdot z_t \right)^2 + \lambda |a|^2, \qquad
              w(z) = \sqrt{e^{-D(z)^2 / \sigma^2}}, \qquad D(z) = 1 - \cos(z, 1)

    with :math:`z_0 = 1` and every other presence drawn by a fair coin. Solved in closed form in float64; the
    intercept c is not penalised. The distance is between presences, as in the authors' package for images, so
    that it does not depend on the units of the image. The ridge pulls towards zero, the more the fewer the
    samples; the sum of the coefficients is no difference of scores.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        features: which parts, by ``esegeta.features``; by default every element, for small images.
        samples: number of coalitions, that of the whole image included.
        width: :math:`\sigma` of the weights. With many parts all coalitions but the whole are equally far.
        ridge: :math:`\lambda > 0`; a tiny one gives weighted least squares.

    Returns:
        ``explain(x, baseline, key=) -> like x``, the coefficient of a part at each of its elements.

    Example:
        >>> import torch
        >>> explain = lime(lambda x: (torch.tensor([2., -1.]) * x).sum(), samples=50, ridge=1e-9)
        >>> [round(v, 3) for v in explain(torch.tensor([[1., 3.]]), torch.zeros(1, 2), key=0)[0].tolist()]
        [2.0, -3.0]

    Reference:
        Ribeiro, Singh, Guestrin 2016, arXiv:1602.04938; weights and ridge: the authors' package, for images.
    """
    fit = _fitting(score, elements() if features is None else features, samples, width, ridge, "lime")

    def explain(
        x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"], *, key: int | Tensor
    ) -> Float[Tensor, "*dims"]:
        parts, z, v, solve = fit(x, baseline, key)
        found = coalitions.compared(solve(z, v)[0], z, samples)
        return parts.spread(found.to(x.dtype)).expand_as(x).clone()

    return explain


def lime_fit(
    score: Score,
    *,
    features: Features | None = None,
    samples: int = 1000,
    width: float | int = 0.25,
    ridge: float | int = 1.0,
    resamples: int = 200,
) -> Callable[..., LimeFit]:
    r"""Return the fit of ``lime`` and what tells whether to believe it: R^2, and how coefficients vary.

    .. math:: R^2 = 1 - \frac{\sum_t w_t (v_t - c - a \cdot z_t)^2}{\sum_t w_t (v_t - \bar v)^2}

    A low R^2 says that the score is not additive over these parts near the image. Intervals hold the middle 95 %
    of the coefficients of fits to samples drawn again from the samples; they say how far another key may lead,
    not how far the linear model is from the score.

    Args:
        score: as in ``lime``, and so are ``features``, ``samples``, ``width`` and ``ridge``.
        features: which parts.
        samples: number of coalitions.
        width: of the weights.
        ridge: the penalty.
        resamples: number of fits behind the intervals.

    Returns:
        ``(x, baseline, key=) -> LimeFit(coefficients, intercept, r2, low, high)``, in float64.

    Example:
        >>> import torch
        >>> fit = lime_fit(lambda x: (torch.tensor([2., -1.]) * x).sum() + 5, samples=50, ridge=1e-9)
        >>> found = fit(torch.tensor([[1., 3.]]), torch.zeros(1, 2), key=0)
        >>> round(found.intercept.item(), 3), round(found.r2.item(), 3), bool((found.low <= found.high).all())
        (5.0, 1.0, True)

    Reference:
        Ribeiro, Singh, Guestrin 2016, arXiv:1602.04938; intervals: Efron 1979, doi:10.1214/aos/1176344552.
    """
    check.score("lime_fit", score)
    fit = _fitting(score, elements() if features is None else features, samples, width, ridge, "lime_fit")
    again = check.positive_count("lime_fit", "resamples", resamples, 2)

    def run(x: Tensor, baseline: Tensor, *, key: Any = None) -> LimeFit:
        check.image("lime_fit", "x", x)
        check.finite("lime_fit", "baseline", check.like("lime_fit", "baseline", baseline, x), "Repair it")
        _, z, v, solve = fit(x, baseline, check.key("lime_fit", key))
        draw = lambda b: random.integers(random.fold_in(key, b), v.shape, low=0, high=len(v))
        others = torch.stack([solve(z[rows], v[rows])[0] for rows in map(draw, range(again))]).sort(0).values
        cut = round(0.025 * (again - 1))
        return LimeFit._make([*solve(z, v), others[cut], others[-1 - cut]])

    return explanation(run, "lime_fit", ("baseline",), key=True)


def _fitting(score: Score, features: Features, samples: int, width: float, ridge: float, label: str) -> Any:
    n = check.positive_count(label, "samples", samples, 2)
    for name, value in (("width", width), ("ridge", ridge)):
        if not check.non_negative(label, name, value):
            raise check.refused(label, f"{name} > 0", "0", "Pass a tiny one, for example 1e-9")

    def solve(z: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distance = 1 - z.mean(1).sqrt()  # the cosine between z and a row of ones
        weights = torch.exp(-0.5 * (distance / width) ** 2)
        middle, level = weights @ z / weights.sum(), weights @ v / weights.sum()
        rows, target = z - middle, v - level
        gram = rows.T @ (weights[:, None] * rows) + torch.diag(torch.full_like(middle, ridge))
        a = torch.linalg.solve(gram, rows.T @ (weights * target))
        left, whole = weights @ (target - rows @ a) ** 2, weights @ target**2
        r2 = 1 - torch.where(whole > 0, left / torch.where(whole > 0, whole, 1), 0)
        return a, level - middle @ a, r2

    def fit(x: Tensor, baseline: Tensor, key: int | Tensor) -> tuple[Any, ...]:
        parts = coalitions.parts(label, features, x, runs=lambda _: n)
        whole = torch.arange(n, device=x.device)[:, None] == 0
        z = (whole | (random.uniform(key, (n, parts.count), device=x.device) < 0.5)).double()
        v = coalitions.values(score, x, baseline, parts, z.to(x.dtype), label=label)
        return parts, z[: len(v)], v.double(), solve

    return fit
