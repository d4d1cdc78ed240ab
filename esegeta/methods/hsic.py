"""HSIC: how much the score depends on the presence of a part."""

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import coalitions, random
from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import check
from esegeta.features import Features, elements


@method(
    refs=("baseline",),
    key=True,
    axioms=("sensitivity_a", "implementation_invariance", "shift"),
    needs="values",
    example={"samples": 32},
    family="parts",
    cost=lambda samples: Cost(forwards=samples),
    paper="Novello, Fel, Vigouroux 2022, arXiv:2206.06219",
    also=("hsic",),
)
def hsic_attribution(score: Score, *, features: Features | None = None, samples: int = 500) -> Explain:
    r"""Explain by the dependence between the presence of a part and the score, of whatever form: Hilbert-Schmidt's.

    .. math:: a_j = \frac{\operatorname{tr}(K_j H L H)}{(n - 1)^2}, \quad K_j = [z_{t,j} = z_{u,j}]_{t,u}, \quad
              L = \left[ e^{-(v_t - v_u)^2 / 2 \sigma^2} \right]_{t,u}, \quad H = I - \tfrac{1}{n} 1 1^T

    for n coalitions in which each part is present by a fair coin. The kernel of presences says whether they are
    equal; that of scores is Gaussian, :math:`\sigma` the median of :math:`|v_t - v_u|` over pairs (their mean
    if that is zero). At least 0, without a sign. A part that changes nothing gets about
    :math:`\tfrac{1}{2n} (1 - \bar L)`, not zero: compare values with each other, not with zero.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        features: which parts, by ``esegeta.features``; by default every element, for small images.
        samples: number of coalitions.

    Returns:
        ``explain(x, baseline, key=) -> like x``, the dependence on a part at each of its elements.

    Example:
        >>> import torch
        >>> explain = hsic_attribution(lambda x: (torch.tensor([2., 1., 0.]) * x).sum(), samples=200)
        >>> a = explain(torch.ones(1, 3), torch.zeros(1, 3), key=0)[0]
        >>> bool(a[0] > a[1] > 10 * a[2])
        True

    Reference:
        Novello, Fel, Vigouroux 2022, arXiv:2206.06219; estimator: Gretton, Bousquet, Smola, Scholkopf 2005,
        doi:10.1007/11564089_7.
    """
    label = "hsic_attribution"
    n = check.positive_count(label, "samples", samples, 2)

    def explain(
        x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"], *, key: int | Tensor
    ) -> Float[Tensor, "*dims"]:
        parts = coalitions.parts(label, elements() if features is None else features, x, runs=lambda _: n)
        present = (random.uniform(key, (n, parts.count), device=x.device) < 0.5).double()
        v = coalitions.values(score, x, baseline, parts, present.to(x.dtype), label=label).double()
        done = len(v)
        # K_j = (1 + s s^T) / 2 for the signs s of presence, and H takes the ones away.
        signs = 2 * present[:done] - 1
        signs = signs - signs.mean(0)
        dependence = (signs * (_alike(v) @ signs)).sum(0) / (2 * max(done - 1, 1) ** 2)
        dependence = coalitions.compared(dependence, present[:done], n)
        return parts.spread(dependence.to(x.dtype)).expand_as(x).clone()

    return explain


def _alike(v: Tensor) -> Tensor:
    """The kernel of scores."""
    apart = (v[:, None] - v).abs()
    if len(v) < 2:
        return apart
    above = torch.triu_indices(len(v), len(v), 1, device=v.device)
    pairs = apart[above[0], above[1]]
    width = torch.where(pairs.median() > 0, pairs.median(), pairs.mean())
    return torch.exp(-0.5 * (apart / torch.where(width > 0, width, 1)) ** 2)
