"""Sobol indices: the share of a part in the variance of the score."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from esegeta import coalitions, random
from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import check
from esegeta.engine.execution import DeadlineExceeded
from esegeta.features import Features, elements

BITS, MOST_DIMS = 30, 21201  # of SciPy's sequence


@method(
    refs=("baseline",),
    key=True,
    axioms=("dummy", "implementation_invariance", "shift"),
    needs="values",
    example={"samples": 4},
    family="parts",
    paper="Fel, Cadene, Chalvidal, Cord, Vigouroux, Serre 2021, arXiv:2111.04138",
    also=("sobol", "sobol_total"),
)
def sobol_attribution(score: Score, *, features: Features | None = None, samples: int = 32) -> Explain:
    r"""Explain by the share of a part in the variance of the score as parts fade at random: its total Sobol index.

    .. math:: S_j = \frac{E\left[ \operatorname{Var}(v(z) \mid z_{i \ne j}) \right]}{\operatorname{Var}(v(z))}
              \approx \frac{\sum_n \left( v(A_n) - v(A_n \text{ with } j \text{ from } B_n) \right)^2}
                           {2 \sum_n \left( v(A_n) - \bar v \right)^2}, \qquad z \sim U[0, 1]^d

    Without a sign and without a unit: at least 0, a share of 1 of a score that nothing else moves, sums above 1
    where parts interact. An estimate by Jansen's formula from ``samples`` points of a Sobol sequence in 2 d
    dimensions, with random digits shifted by the key; (d + 1) runs for each. A constant score gives zeros.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        features: which parts, by ``esegeta.features``; by default every element, for small images.
        samples: number of points, best a power of two.

    Returns:
        ``explain(x, baseline, key=) -> like x``, the index of a part at each of its elements.

    Example:
        >>> import torch
        >>> explain = sobol_attribution(lambda x: (torch.tensor([2., 1.]) * x).sum(), samples=4096)
        >>> [round(v, 2) for v in explain(torch.ones(1, 2), torch.zeros(1, 2), key=0)[0].tolist()]
        [0.8, 0.2]

    Reference:
        Fel et al. 2021, arXiv:2111.04138; estimator: Jansen 1999, doi:10.1016/S0010-4655(98)00154-4.
    """
    label = "sobol_attribution"
    n = check.positive_count(label, "samples", samples, 2)

    def explain(
        x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"], *, key: int | Tensor
    ) -> Float[Tensor, "*dims"]:
        parts = coalitions.parts(
            label, elements() if features is None else features, x, runs=lambda d: n * (d + 1)
        )
        d = parts.count
        if 2 * d > MOST_DIMS:
            most, advice = MOST_DIMS // 2, "Use coarser ones, for example esegeta.features.grid(8)"
            raise check.refused(label, f"at most {most:,} features", f"{d:,}", advice)
        points = _points(key, n, 2 * d, x.device)
        here, there = points[:, :d], points[:, d:]

        def keep(node: Tensor) -> Tensor:
            i, j = (node // (d + 1))[None], node % (d + 1) - 1
            from_b = torch.arange(d, device=x.device) == j  # nothing for j = -1, the point itself
            return parts.keep(torch.where(from_b, there.index_select(0, i)[0], here.index_select(0, i)[0]))

        v = coalitions.shown(
            score, x, baseline, keep, torch.arange(n * (d + 1), device=x.device), label=label
        )
        done = len(v) // (d + 1)
        if done < 2:
            raise DeadlineExceeded(
                f"{label}: the deadline passed after {len(v)} runs, and two points take {2 * d + 2}. "
                "Allow more time, or use coarser features."
            )
        v = rearrange(v[: done * (d + 1)], "(point run) -> point run", point=done).double()
        change = (v[:, 1:] - v[:, :1]).square().sum(0)
        varying = 2 * (v[:, 0] - v[:, 0].mean()).square().sum()
        index = torch.where(varying > 0, change / torch.where(varying > 0, varying, 1), 0)
        return parts.spread(index.to(x.dtype)).expand_as(x).clone()

    return explain


def _points(key: int | Tensor, n: int, dims: int, device: torch.device) -> Tensor:
    """Points of the Sobol sequence in [0, 1); flipping the same digits of all of them keeps their evenness."""
    from scipy.stats.qmc import Sobol  # takes a second

    numbers = Sobol(dims, scramble=False, bits=BITS).random_base2((n - 1).bit_length())[:n]
    points = (torch.tensor(numbers, dtype=torch.float64, device=device) * 2**BITS).long()
    flips = random.integers(key, (dims,), low=0, high=2**BITS, device=device)
    return ((points ^ flips).double() + 0.5) / 2**BITS
