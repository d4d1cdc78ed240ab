"""Residuals of what single elements get. In units of the attribution unless said otherwise, never negative."""

from collections.abc import Callable

import torch
from torch import Tensor

from esegeta._types import Explain, Score
from esegeta.axioms import arguments
from esegeta.axioms.registered import axiom
from esegeta.engine import check, levels


@axiom
def dummy(explain: Explain, ignored: Tensor) -> Callable[..., Tensor]:
    r"""Measure the largest attribution of elements that the score does not depend on.

    .. math:: \max_{i \in I} |a_i|

    Args:
        explain: ``(x, *refs) -> like x``.
        ignored: boolean mask of the elements that the score ignores, of the shape of the attribution or, for all
            channels alike, of its grid.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> explain = eg.gradient(lambda x: x[0, 0] ** 2)
        >>> dummy(explain, torch.tensor([[False, True]]))(torch.ones(1, 2)).item()
        0.0

    Reference:
        Friedman 2004, Paths and consistency in additive cost sharing; as sensitivity (b) in Sundararajan, Taly,
        Yan 2017, arXiv:1703.01365.
    """
    where = "axioms.dummy"
    arguments.mask(where, "ignored", ignored)

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        a = explain(x, *refs, **kwargs)
        return torch.where(arguments.fitted(where, "ignored", ignored, a), a, 0.0).abs().amax()

    return residual


@axiom
def sensitivity_a(explain: Explain, score: Score) -> Callable[..., Tensor]:
    r"""Measure the score's difference if the only element that differs from the baseline gets nothing.

    .. math:: \left| F(x) - \overline{F(x')} \right| \cdot 1[a_i = 0]

    The mean is over a stack of baselines; without any baseline x' is zero.

    Args:
        explain: ``(x, *refs) -> like x``.
        score: what it explains.

    Returns:
        ``(x, *refs, key=) -> ()``, in units of the score, for an x that differs from its baselines in one element.
        NaN where the attribution of that element is not finite.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: x.clamp(max=1).sum()
        >>> sensitivity_a(eg.gradient(score), score)(torch.tensor([[2., 0.]])).item()
        1.0

    Reference:
        Sundararajan, Taly, Yan 2017, section 2.1, arXiv:1703.01365.
    """

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        differs = (arguments.stacked(arguments.start(x, refs), x) != x).any(0)
        a = explain(x, *refs, **kwargs)
        seen = torch.where(differs, a, 0.0)
        # Zero times what is not finite is NaN: such an attribution must not pass for one.
        return torch.where((seen == 0).all(), arguments.change(score, x, refs).abs(), 0.0 * seen.sum())

    return residual


@axiom
def symmetry(explain: Explain, permutation: Tensor) -> Callable[..., Tensor]:
    r"""Measure how differently elements are treated that score, input and baseline cannot tell apart.

    .. math:: \max_i |a_i - a_{\pi(i)}|

    Args:
        explain: ``(x, *refs) -> like x`` of a score that the permutation leaves unchanged.
        permutation: of the flattened elements, or of the flattened voxels for all channels alike; x and the refs
            must be unchanged by it too.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> explain = eg.gradient(lambda x: x.prod())
        >>> symmetry(explain, torch.tensor([1, 0]))(torch.tensor([[2., 2.]])).item()
        0.0

    Reference:
        Shapley 1953, A value for n-person games.
    """
    where = "axioms.symmetry"
    arguments.whole(where, "permutation", permutation)
    n = permutation.numel()
    if permutation.ndim != 1 or levels.true_anywhere(
        permutation.sort().values != torch.arange(n, device=permutation.device)
    ):
        raise check.refused(
            where,
            "a permutation of 0 to n - 1, of shape (n,)",
            check.describe(permutation),
            "Name every number once",
        )

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        a = explain(x, *refs, **kwargs)
        if n not in (a.numel(), a[0].numel()):
            raise check.refused(
                where,
                f"a permutation of the {a.numel()} elements or {a[0].numel()} voxels of the attribution",
                f"one of {n}",
                "Permute the flattened elements",
            )
        rows = a.reshape(-1, n)
        return (rows - rows[:, permutation]).abs().amax()

    return residual


@axiom
def monotonicity(explain: Explain) -> Callable[..., Tensor]:
    r"""Measure the largest attribution against the direction in which an element was changed.

    .. math:: \max_i \left[ -a_i \, \mathrm{sign}(x_i - x'_i) \right]_+

    For a score that does not fall when any element rises: raising an element must not count against it, lowering
    it not in its favour. An element that lies on both sides of a stack of baselines is not judged. Without any
    baseline x' is zero.

    Args:
        explain: ``(x, *refs) -> like x`` of a score that rises with every element.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> rising = lambda x: torch.relu(x).sum()
        >>> x, b = torch.tensor([[2., -1.]]), torch.tensor([[0., 1.]])
        >>> monotonicity(eg.exact_shapley(rising))(x, b).item()
        0.0
        >>> monotonicity(eg.saliency(rising))(-x).item()
        0.0
        >>> monotonicity(lambda x: x ** 2)(-x).item()
        4.0

    Reference:
        Friedman, Moulin 1999, Three methods to share joint costs or surplus.
    """

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        sides = torch.sign(x - arguments.stacked(arguments.start(x, refs), x))
        # Above and below in one stack add up to zero.
        direction = torch.sign(sides.amin(0) + sides.amax(0))
        return torch.relu(-explain(x, *refs, **kwargs) * direction).amax()

    return residual


@axiom
def continuity(explain: Explain, step: Tensor) -> Callable[..., Tensor]:
    r"""Measure how much the attribution changes with a small step of the input.

    .. math:: \max_i |a_i(x + h) - a_i(x)|

    It goes to zero with the step where the attribution is continuous. For how steep it is, divide by the size of
    the step.

    Args:
        explain: ``(x, *refs) -> like x``.
        step: h, like x or broadcast to it.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> x, step = torch.tensor([[0.5]]), torch.tensor([[1.0]])
        >>> score = lambda x: torch.relu(x - 1).sum()
        >>> continuity(eg.gradient(score), step)(x).item(), continuity(eg.gradient(score), 0.25 * step)(x).item()
        (1.0, 0.0)

    Reference:
        Montavon, Samek, Mueller 2018, section 7.1, arXiv:1706.07979.
    """
    check.floating("axioms.continuity", "step", step)

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        moved = x + arguments.step("axioms.continuity", "step", step, x)
        return (explain(moved, *refs, **kwargs) - explain(x, *refs, **kwargs)).abs().amax()

    return residual
