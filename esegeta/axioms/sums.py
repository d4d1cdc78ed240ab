"""Residuals of what an attribution adds up to. In units of the score, signed."""

from collections.abc import Callable

import torch
from torch import Tensor

from esegeta._types import Explain, Score
from esegeta.axioms import arguments
from esegeta.axioms.registered import axiom


@axiom
def completeness(explain: Explain, score: Score) -> Callable[..., Tensor]:
    r"""Measure what the attribution leaves unexplained of the score's difference to the baseline.

    .. math:: \sum_i a_i - \left( F(x) - \overline{F(x')} \right)

    The mean is over a stack of baselines; without any baseline x' is zero.

    Args:
        explain: ``(x, *refs) -> like x``.
        score: what it explains.

    Returns:
        ``(x, *refs, key=) -> ()``, signed, in units of the score.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (x ** 3).sum()
        >>> x, zero = torch.tensor([[1., 2.]]), torch.zeros(1, 2)
        >>> completeness(eg.integrated_gradients(score, steps=1), score)(x, zero).item()
        -2.25
        >>> round(completeness(eg.integrated_gradients(score, steps=2), score)(x, zero).item(), 5) + 0.0
        0.0

    Reference:
        Sundararajan, Taly, Yan 2017, section 3, arXiv:1703.01365.
    """

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        return explain(x, *refs, **kwargs).sum() - arguments.change(score, x, refs)

    return residual


@axiom
def conservation(explain: Explain, score: Score) -> Callable[..., Tensor]:
    r"""Measure by how much the sum of the attribution exceeds the score itself.

    .. math:: \sum_i a_i - F(x)

    It is completeness for a score that is zero at the baseline, and what relevance propagation aims at.

    Args:
        explain: ``(x, *refs) -> like x``.
        score: what it explains.

    Returns:
        ``(x, *refs, key=) -> ()``, signed, in units of the score.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: 3 * x.sum() + 1
        >>> conservation(eg.input_x_gradient(score), score)(torch.tensor([[1., 2.]])).item()
        -1.0

    Reference:
        Bach et al. 2015, equation 2, doi:10.1371/journal.pone.0130140.
    """

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        return explain(x, *refs, **kwargs).sum() - score(x)

    return residual


@axiom
def sensitivity_n(explain: Explain, score: Score, subset: Tensor) -> Callable[..., Tensor]:
    r"""Measure what a part of the attribution leaves unexplained of the score's loss without that part.

    .. math:: \sum_{i \in T} a_i - \left( F(x) - \overline{F(x_{T \to x'})} \right)

    For all elements it is completeness; for each element alone it defines feature ablation; for every subset at
    once no method can keep it unless elements do not interact. The mean is over a stack of baselines; without
    any baseline x' is zero.

    Args:
        explain: ``(x, *refs) -> like x``.
        score: what it explains.
        subset: boolean mask T, of the shape of x or, for all channels alike, of its grid.

    Returns:
        ``(x, *refs, key=) -> ()``, signed, in units of the score.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: x.prod()
        >>> first = torch.tensor([[True, False]])
        >>> x, zero = torch.tensor([[2., 3.]]), torch.zeros(1, 2)
        >>> sensitivity_n(eg.feature_ablation(score), score, first)(x, zero).item()
        0.0
        >>> sensitivity_n(eg.exact_shapley(score), score, first)(x, zero).item()
        -3.0

    Reference:
        Ancona, Ceolini, Oeztireli, Gross 2018, section 4, arXiv:1711.06104.
    """
    where = "axioms.sensitivity_n"
    arguments.mask(where, "subset", subset)

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        a = explain(x, *refs, **kwargs)
        taken = torch.where(arguments.fitted(where, "subset", subset, a), a, 0.0).sum()
        hidden = arguments.fitted(where, "subset", subset, x, "the input")
        return taken - arguments.change(score, x, [torch.where(hidden, arguments.start(x, refs), x)])

    return residual


@axiom
def efficiency_of_regions(explain: Explain, score: Score, labels: Tensor) -> Callable[..., Tensor]:
    r"""Measure what the values of all regions leave unexplained of the score's difference to the baseline.

    .. math:: \sum_r \overline{a}_r - \left( F(x) - \overline{F(x')} \right)

    A map of coalitions shows the value of a region at each of its elements, so its plain sum counts a region as
    often as it has elements. Here each counts once, with its mean. What belongs to no region stays as in x.

    Args:
        explain: ``(x, *refs) -> like x``.
        score: what it explains.
        labels: whole numbers, one for each region, of the shape of x or, for all channels alike, of its grid.
            Elements labelled -1 belong to no region.

    Returns:
        ``(x, *refs, key=) -> ()``, signed, in units of the score.

    Example:
        >>> import torch, esegeta as eg
        >>> score, labels = lambda x: x.prod(), torch.tensor([0, 0, 1])
        >>> explain = eg.exact_shapley(score, features=eg.features.labels(labels))
        >>> x, zero = torch.tensor([[1., 2., 3.]]), torch.zeros(1, 3)
        >>> explain(x, zero).tolist(), efficiency_of_regions(explain, score, labels)(x, zero).item()
        ([[3.0, 3.0, 3.0]], 0.0)

    Reference:
        Shapley 1953, A value for n-person games.
    """
    where = "axioms.efficiency_of_regions"
    labels, names = arguments.parts(where, labels)
    inside = labels >= 0
    index = torch.searchsorted(names, labels.contiguous()).clamp(0, len(names) - 1)

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        a = explain(x, *refs, **kwargs)
        which = arguments.fitted(where, "labels", index, a).flatten()
        counted = arguments.fitted(where, "labels", inside, a).flatten().to(a.dtype)
        empty = a.new_zeros(len(names))
        total = empty.index_add(0, which, a.flatten() * counted)
        mean = total / empty.index_add(0, which, counted)
        hidden = arguments.fitted(where, "labels", inside, x, "the input")
        return mean.sum() - arguments.change(score, x, [torch.where(hidden, arguments.start(x, refs), x)])

    return residual
