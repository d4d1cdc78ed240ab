"""Shapley values by sampling the orders in which parts become present."""

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import coalitions, random
from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import check, stream
from esegeta.engine.estimates import answered
from esegeta.features import Features, elements


@method(
    refs=("baseline",),
    key=True,
    axioms=(
        "completeness sensitivity_a dummy linearity implementation_invariance sensitivity_n shift "
        "scale_of_output efficiency_of_regions continuity class_sensitivity monotonicity"
    ),
    needs="values",
    example={"samples": 3},
    family="parts",
    paper="Castro, Gomez, Tejada 2009, doi:10.1016/j.cor.2008.04.004",
    also=("shapley_value_sampling", "appro_shapley", "svs"),
)
def shapley_sampling(
    score: Score, *, features: Features | None = None, samples: int = 25, tolerance: float | int | None = None
) -> Explain:
    r"""Explain by what a part adds to the score as it becomes present, averaged over random orders of the parts.

    .. math:: a_j = E_\pi \left[ v(\{i : \pi_i \le \pi_j\}) - v(\{i : \pi_i < \pi_j\}) \right], \qquad
              \sum_j a_j = F(x) - F(x')

    A Monte Carlo mean that is unbiased for the Shapley value, and exact where at most two parts interact: each
    sample walks one random order forwards and backwards, 2 (d + 1) runs for d parts. The sum is exact with any
    number of samples, because every walk leads from the baseline to the image. At a deadline it is the mean of the
    samples that are whole; if not even the first one is, parts that its walks did not reach are NaN.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        features: which parts, by ``esegeta.features``; by default every element, for small images.
        samples: number of orders, each walked in both directions.
        tolerance: stop before that once no standard error exceeds this fraction of the largest value.

    Returns:
        ``explain(x, baseline, key=) -> like x``, the value of a part at each of its elements;
        ``with_standard_error`` gives its error.

    Example:
        >>> import torch
        >>> explain = shapley_sampling(lambda x: x[0, 0] * x[0, 1] + x[0, 2], samples=1)
        >>> explain(torch.tensor([[2., 3., 1.]]), torch.zeros(1, 3), key=0).tolist()
        [[3.0, 3.0, 1.0]]

    Reference:
        Castro, Gomez, Tejada 2009, doi:10.1016/j.cor.2008.04.004; orders and their reverse: Mitchell, Cooper,
        Frank, Holmes 2022, arXiv:2104.12199.
    """
    label = "shapley_sampling"
    n = check.positive_count(label, "samples", samples)
    enough = None if tolerance is None else check.non_negative(label, "tolerance", tolerance)

    def explain(
        x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"], *, key: int | Tensor
    ) -> Float[Tensor, "*dims"]:
        parts = coalitions.parts(
            label, elements() if features is None else features, x, runs=lambda d: 2 * n * (d + 1)
        )

        walks = coalitions.walker(score, x, baseline, parts, label=label)

        def sample(i: Tensor) -> Tensor:
            order = random.permutation(random.fold_in(key, i), parts.count, device=x.device)
            orders = torch.stack([order, order.flip(0)])
            v = walks(orders)
            steps = v[:, 1:] - v[:, :-1]
            left = steps.new_full((2, parts.count - steps.shape[1]), torch.nan)
            steps = torch.cat([steps, left], 1)
            return steps.gather(1, torch.argsort(orders, 1)).mean(0)

        nodes = torch.arange(n, device=x.device)
        mean, error = stream.estimate(sample, nodes, label=label, tolerance=enough, together=False)
        return answered(*(parts.spread(t).expand_as(x).clone() for t in (mean, error)))

    return explain
