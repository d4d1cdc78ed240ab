"""What is done to the values of an explanation: signs and channels."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from esegeta._registry import transform
from esegeta._types import Explain
from esegeta.engine import check

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda a: a.sum(0, keepdim=True),
    "mean": lambda a: a.mean(0, keepdim=True),
    "max_abs": lambda a: a.abs().amax(0, keepdim=True),
    "l2": lambda a: a.square().sum(0, keepdim=True).sqrt(),
}


def _after(explain: Explain, change: Callable[[Tensor], Tensor]) -> Explain:
    """``change`` after ``explain``, with its signature."""

    @functools.wraps(explain)
    def changed(*args: Tensor, **kwargs: int | Tensor) -> Any:
        a = explain(*args, **kwargs)
        return tuple(map(change, a)) if isinstance(a, tuple) else change(a)  # of several places several maps

    return changed


@transform(
    preserves=(
        "dummy symmetry implementation_invariance shift scale_of_output class_sensitivity continuity "
        "translation_equivariance affine_equivariance"
    ),
    family="numbers",
    paper="",
)
def absolute(explain: Explain) -> Explain:
    r"""Return the size of an attribution without its sign: :math:`|a|`.

    Args:
        explain: ``(x, *refs) -> like x``.

    Returns:
        The same arrow, not negative.

    Example:
        >>> import torch, esegeta as eg
        >>> absolute(eg.gradient(lambda x: (-2 * x).sum()))(torch.ones(1, 1)).tolist()
        [[2.0]]

    Reference:
        Definition.
    """
    return _after(explain, lambda a: a.abs())


@transform(
    preserves=(
        "dummy symmetry implementation_invariance shift scale_of_output translation_equivariance "
        "affine_equivariance monotonicity parameter_dependence continuity"
    ),
    family="numbers",
    paper="",
)
def positive(explain: Explain) -> Explain:
    r"""Keep the part of an attribution that supports the score: :math:`\max(a, 0)`.

    Args:
        explain: ``(x, *refs) -> like x``.

    Returns:
        The same arrow, not negative. ``positive - negative`` is the attribution.

    Example:
        >>> import torch, esegeta as eg
        >>> w = torch.tensor([[1., -2.]])
        >>> positive(eg.gradient(lambda x: (w * x).sum()))(torch.ones(1, 2)).tolist()
        [[1.0, 0.0]]

    Reference:
        Definition.
    """
    return _after(explain, lambda a: a.clamp(min=0))


@transform(
    preserves=(
        "dummy symmetry implementation_invariance shift scale_of_output translation_equivariance "
        "affine_equivariance continuity"
    ),
    family="numbers",
    paper="",
)
def negative(explain: Explain) -> Explain:
    r"""Keep the part of an attribution that opposes the score, as a size: :math:`\max(-a, 0)`.

    Args:
        explain: ``(x, *refs) -> like x``.

    Returns:
        The same arrow, not negative.

    Example:
        >>> import torch, esegeta as eg
        >>> w = torch.tensor([[1., -2.]])
        >>> negative(eg.gradient(lambda x: (w * x).sum()))(torch.ones(1, 2)).tolist()
        [[0.0, 2.0]]

    Reference:
        Definition.
    """
    return _after(explain, lambda a: (-a).clamp(min=0))


@transform(
    preserves=(
        "dummy linearity symmetry implementation_invariance shift scale_of_output class_sensitivity "
        "translation_equivariance affine_equivariance parameter_dependence continuity"
    ),
    shape="one channel",
    family="numbers",
    paper="",
)
def reduce_channels(explain: Explain, *, by: str = "sum") -> Explain:
    r"""Reduce an attribution to one map for all channels: their sum, mean, largest size or Euclidean norm.

    .. math:: a_v = \sum_c a_{c,v} \quad\text{or}\quad \max_c |a_{c,v}| \quad\text{or}\quad \|a_{\cdot,v}\|_2

    The sum keeps completeness and the sign. The channel axis stays, with length one.

    Args:
        explain: ``(x, *refs) -> like x``.
        by: ``sum``, ``mean``, ``max_abs`` or ``l2``.

    Returns:
        ``(x, *refs) -> (1,*S)``.

    Example:
        >>> import torch, esegeta as eg
        >>> w = torch.tensor([[3., 0.], [-4., 1.]])
        >>> explain = eg.gradient(lambda x: (w * x).sum())
        >>> [reduce_channels(explain, by=k)(torch.ones(2, 2)).tolist() for k in ("sum", "max_abs", "l2")]
        [[[-1.0, 1.0]], [[4.0, 1.0]], [[5.0, 1.0]]]

    Reference:
        Simonyan, Vedaldi, Zisserman 2014, section 3.1 (the maximum), arXiv:1312.6034.
    """
    return _after(explain, _REDUCTIONS[check.one_of("reduce_channels", "by", by, tuple(_REDUCTIONS))])
