"""How simple a map is: few voxels that matter, or many that matter a little."""

from typing import Any

import torch
from torch import Tensor

from esegeta._registry import Cost, metric
from esegeta._types import Explain
from esegeta.engine import check
from esegeta.metrics.explanations import attribution, mask_of
from esegeta.metrics.removal import Measure


def _sizes(
    where: str, explain: Explain, x: Tensor, refs: Any, key: Any, within: Any
) -> tuple[Tensor, Tensor]:
    """Sizes of the elements of a map, and which of them count."""
    a = attribution(where, explain, x, refs, key).abs()
    counts = torch.ones_like(a, dtype=torch.bool)
    if within is not None:
        counts = mask_of(where, within, x, "within").expand_as(a)
    return (a * counts).flatten(), counts.flatten()


@metric(
    family="complexity",
    better="",
    paper="Bhatt, Weller, Moura 2020, arXiv:2005.00631",
    also=("complexity",),
    cost=lambda: Cost(),
)
def entropy(explain: Explain) -> Measure:
    r"""Return the entropy of the sizes of a map in nats: 0 for a single voxel, log n for n equal ones.

    .. math:: -\sum_v p_v \log p_v, \qquad p = |a| / \sum |a|

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.

    Returns:
        ``(x, *refs, key=, within=) -> ()``; NaN for a map of zeros.

    Example:
        >>> from esegeta.metrics import given
        >>> entropy(given(torch.tensor([[1.0, -1.0, 0.0]])))(torch.zeros(1, 3)).exp().item()
        2.0

    Reference:
        Bhatt, Weller, Moura 2020, Evaluating and aggregating feature-based explanations, arXiv:2005.00631.
    """

    def measure(x: Tensor, *refs: Tensor, key: Any = None, within: Any = None) -> Tensor:
        sizes, _ = _sizes("metrics.entropy", explain, x, refs, key, within)
        total = sizes.sum()
        p = sizes / torch.where(total > 0, total, 1)
        found = -torch.where(p > 0, p * torch.where(p > 0, p, 1).log(), 0).sum()
        return torch.where(total > 0, found, torch.nan)

    return measure


@metric(
    family="complexity",
    better="",
    paper="Chalasani et al. 2020, arXiv:1810.06583",
    also=("sparseness",),
    cost=lambda: Cost(),
)
def gini(explain: Explain) -> Measure:
    r"""Return the Gini index of the sizes of a map: 0 if all are equal, near 1 if one is all.

    .. math:: 1 - 2 \sum_{k=1}^n \frac{|a|_{(k)}}{\sum |a|} \frac{n - k + 1/2}{n}

    with the sizes in rising order.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.

    Returns:
        ``(x, *refs, key=, within=) -> ()`` in [0, 1); NaN for a map of zeros.

    Example:
        >>> from esegeta.metrics import given
        >>> gini(given(torch.tensor([[0.0, 0.0, 0.0, 3.0]])))(torch.zeros(1, 4)).item()
        0.75

    Reference:
        Hurley, Rickard 2009, Comparing measures of sparsity, arXiv:0811.4706; Chalasani et al. 2020.
    """

    def measure(x: Tensor, *refs: Tensor, key: Any = None, within: Any = None) -> Tensor:
        sizes, counts = _sizes("metrics.gini", explain, x, refs, key, within)
        # What does not count is put first, where it has neither size nor rank.
        rising = torch.where(counts, sizes, -1.0).sort().values
        n, left_out = counts.sum(), (~counts).sum()
        k = torch.arange(1, len(sizes) + 1, device=x.device, dtype=sizes.dtype) - left_out
        values, total = rising.clamp(min=0), sizes.sum()
        found = 1 - 2 * (values / torch.where(total > 0, total, 1) * (n - k + 0.5) / n).sum()
        return torch.where(total > 0, found.clamp(min=0), torch.nan)  # rounding may go below

    return measure


@metric(
    family="complexity",
    better="",
    paper="Nguyen, Martinez 2020, arXiv:2007.07584",
    cost=lambda: Cost(),
)
def effective_complexity(explain: Explain, *, fraction: float = 0.01) -> Measure:
    r"""Return which share of the elements has a size above a fraction of the largest.

    .. math:: |\{v : |a_v| > \epsilon \max |a|\}| / n

    The paper counts sizes above a constant; relative to the largest the number does not depend on the unit.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        fraction: :math:`\epsilon`.

    Returns:
        ``(x, *refs, key=, within=) -> ()`` in [0, 1]; NaN for a map of zeros.

    Example:
        >>> from esegeta.metrics import given
        >>> effective_complexity(given(torch.tensor([[0.0, 1e-9, 1.0, 3.0]])))(torch.zeros(1, 4)).item()
        0.5

    Reference:
        Nguyen, Martinez 2020, On quantitative aspects of model interpretability, arXiv:2007.07584.
    """
    where = "metrics.effective_complexity"
    share = check.non_negative(where, "fraction", fraction)

    def measure(x: Tensor, *refs: Tensor, key: Any = None, within: Any = None) -> Tensor:
        sizes, counts = _sizes(where, explain, x, refs, key, within)
        largest = sizes.amax()
        many = (sizes > share * largest).sum().to(sizes.dtype) / counts.sum()
        return torch.where(largest > 0, many, torch.nan)

    return measure
