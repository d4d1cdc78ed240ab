"""Residuals of attribution axioms: pure functions that return zero where the axiom holds.

They raise nothing and choose no tolerance, so they work under ``vmap`` and at run time. Each has the units of
the attribution or of the score.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from esegeta._types import Explain, Method, Score


def completeness(explain: Explain, score: Score) -> Callable[..., Tensor]:
    r"""What the attribution leaves unexplained of the score's difference to the baseline.

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
    """

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        a = explain(x, *refs, **kwargs)
        baseline = refs[-1] if refs else torch.zeros_like(x)
        if baseline.ndim == x.ndim:
            reference = score(baseline)
        else:
            reference = torch.stack([score(b) for b in baseline.unbind()]).mean()
        return a.sum() - (score(x) - reference)

    return residual


def dummy(explain: Explain, ignored: Tensor) -> Callable[..., Tensor]:
    r"""The largest attribution of elements that the score does not depend on.

    .. math:: \max_{i \in I} |a_i|

    Args:
        explain: ``(x, *refs) -> like x``.
        ignored: boolean mask of the elements that the score ignores.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> explain = eg.gradient(lambda x: x[0, 0] ** 2)
        >>> dummy(explain, torch.tensor([[False, True]]))(torch.ones(1, 2)).item()
        0.0
    """

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        return torch.where(ignored, explain(x, *refs, **kwargs), 0.0).abs().amax()

    return residual


def linearity(
    method: Method, score: Score, other: Score, *, weights: tuple[float | int, float | int] = (1.0, 2.0)
) -> Callable[..., Tensor]:
    r"""How far the attribution of a weighted sum of scores is from the weighted sum of attributions.

    .. math:: \max_i \left| a_i[uF + vG] - u\,a_i[F] - v\,a_i[G] \right|

    Args:
        method: ``Score -> Explain``.
        score: F.
        other: G.
        weights: u and v.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> residual = linearity(eg.saliency, lambda x: x.sum(), lambda x: -x.sum())
        >>> residual(torch.ones(1, 2)).item()
        2.0
    """
    u, v = weights

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        both = method(lambda z: u * score(z) + v * other(z))(x, *refs, **kwargs)
        parts = u * method(score)(x, *refs, **kwargs) + v * method(other)(x, *refs, **kwargs)
        return (both - parts).abs().amax()

    return residual


def symmetry(explain: Explain, permutation: Tensor) -> Callable[..., Tensor]:
    r"""How differently elements are treated that the score, the input and the baseline cannot tell apart.

    .. math:: \max_i |a_i - a_{\pi(i)}|

    Args:
        explain: ``(x, *refs) -> like x`` of a score that the permutation leaves unchanged.
        permutation: of the flattened elements; x and the refs must be unchanged by it too.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> explain = eg.gradient(lambda x: x.prod())
        >>> symmetry(explain, torch.tensor([1, 0]))(torch.tensor([[2., 2.]])).item()
        0.0
    """

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        a = explain(x, *refs, **kwargs).flatten()
        return (a - a[permutation]).abs().amax()

    return residual


def shift(method: Method, score: Score, offset: Tensor) -> Callable[..., Tensor]:
    r"""How much the attribution changes when input, baselines and network are shifted together.

    .. math:: \max_i \left| a_i[F(\cdot - c)](x + c, x' + c) - a_i[F](x, x') \right|

    Args:
        method: ``Score -> Explain``.
        score: F.
        offset: c, like x.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> residual = shift(eg.input_x_gradient, lambda x: x.sum(), torch.ones(1, 2))
        >>> residual(torch.zeros(1, 2)).item()
        1.0
    """

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        moved = method(lambda z: score(z - offset))(x + offset, *[r + offset for r in refs], **kwargs)
        return (moved - method(score)(x, *refs, **kwargs)).abs().amax()

    return residual


def sensitivity_a(explain: Explain, score: Score) -> Callable[..., Tensor]:
    r"""The score's difference if the only element that differs from the baseline gets no attribution.

    .. math:: |F(x) - F(x')| \cdot 1[a_i = 0]

    Args:
        explain: ``(x, *refs) -> like x``.
        score: what it explains.

    Returns:
        ``(x, *refs, key=) -> ()``, for an x that differs from its baseline (zero without one) in one element.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: x.clamp(max=1).sum()
        >>> sensitivity_a(eg.gradient(score), score)(torch.tensor([[2., 0.]])).item()
        1.0
    """

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        baseline = refs[-1] if refs else torch.zeros_like(x)
        a = explain(x, *refs, **kwargs)
        blind = (torch.where(x != baseline, a, 0.0) == 0).all()
        return torch.where(blind, (score(x) - score(baseline)).abs(), 0.0)

    return residual
