"""Shapley values by weighted least squares over coalitions."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from esegeta import coalitions, shapley_kernel
from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import check, stream
from esegeta.engine.estimates import answered
from esegeta.engine.execution import DeadlineExceeded
from esegeta.features import Features, elements


@method(
    refs=("baseline",),
    key=True,
    axioms=(
        "completeness sensitivity_a linearity implementation_invariance sensitivity_n shift "
        "scale_of_output efficiency_of_regions continuity class_sensitivity"
    ),
    needs="values",
    example={"samples": 64},
    family="parts",
    cost=lambda samples: Cost(forwards=samples),
    paper="Lundberg, Lee 2017, arXiv:1705.07874",
    also=("kernelshap", "shap"),
)
def kernel_shap(
    score: Score,
    *,
    features: Features | None = None,
    samples: int = 2048,
    tolerance: float | int | None = None,
) -> Explain:
    r"""Explain by the additive game nearest to the score over coalitions: each part gets its Shapley value.

    .. math:: \min_a \sum_{0 < |T| < d} \frac{d - 1}{\binom{d}{|T|} |T| (d - |T|)}
              \Big( v(T) - v(\emptyset) - \sum_{j \in T} a_j \Big)^2, \qquad \sum_j a_j = F(x) - F(x')

    The two end points are constraints, kept to rounding. If all :math:`2^d` coalitions fit into ``samples``, each
    is run once and the answer is the Shapley value. Else the coalitions of one part or all but one, which weigh
    most, are run, and larger ones are drawn by their weight, each with its complement; the answer is then exact
    where at most two parts interact, and consistent. Least squares are in float64.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        features: which parts, by ``esegeta.features``; by default every element, for small images.
        samples: number of runs of the score, at least 2 d + 2.
        tolerance: stop before that once no standard error exceeds this fraction of the largest value.

    Returns:
        ``explain(x, baseline, key=) -> like x``, the value of a part at each of its elements;
        ``with_standard_error`` gives its error, zero where all coalitions were run.

    Example:
        >>> import torch
        >>> explain = kernel_shap(lambda x: x[0, 0] * x[0, 1] + x[0, 2], samples=8)
        >>> [round(v, 6) for v in explain(torch.tensor([[2., 3., 1.]]), torch.zeros(1, 3), key=0)[0].tolist()]
        [3.0, 3.0, 1.0]

    Reference:
        Lundberg, Lee 2017, theorem 2, arXiv:1705.07874; pairs and constraints: Covert, Lee 2021, arXiv:2012.01536.
    """
    label = "kernel_shap"
    most = check.positive_count(label, "samples", samples)
    enough = None if tolerance is None else check.non_negative(label, "tolerance", tolerance)

    def explain(
        x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"], *, key: int | Tensor
    ) -> Float[Tensor, "*dims"]:
        parts = coalitions.parts(label, elements() if features is None else features, x, runs=lambda _: most)
        d = parts.count
        whole = d < 64 and 2**d <= most
        if not whole and most < 2 * d + 2:
            advice = "Raise samples, or use coarser features, for example esegeta.features.grid(8)"
            got = f"samples={most}, which do not determine {d} values"
            raise check.refused(label, f"samples >= {2 * d + 2} for {d:,} features", got, advice)
        z, weights = (
            shapley_kernel.every(d, x.device)
            if whole
            else shapley_kernel.drawn(key, d, most // 2 - 1, x.device)
        )
        run = lambda rows: coalitions.values(
            score, x, baseline, parts, rows.to(x.dtype), label=label
        ).double()
        nothing, everything = run(torch.cat([z.new_zeros(1, d), z.new_ones(1, d)]))
        total = everything - nothing
        gains: list[Tensor] = []

        def advance(start: int, stop: int) -> tuple[Tensor, Tensor, int]:
            v = run(rearrange([z[start:stop], 1 - z[start:stop]], "two pair part -> (pair two) part"))
            kept, hidden = rearrange(v[: len(v) // 2 * 2], "(pair two) -> two pair", two=2)
            gains.append(kept - hidden)
            done = sum(map(len, gains))
            if done < min(d, len(z)):
                raise DeadlineExceeded(
                    f"{label}: the deadline passed after {2 * done + 2} runs, too few for {d} features. "
                    "Allow more time, or use coarser features."
                )
            free = 0 if whole else done - d
            a, error = shapley_kernel.fit(2 * z[:done] - 1, weights[:done], torch.cat(gains), total, free)
            return a, torch.zeros_like(error) if whole else error, done

        limit = None if whole else enough
        found = total[None], 0 * total[None]  # a single part has it all
        if d > 1:
            found = stream.until_settled(advance, len(z), label=label, tolerance=limit, least=d + 16)
        return answered(*(parts.spread(t.to(x.dtype)).expand_as(x).clone() for t in found))

    return explain
