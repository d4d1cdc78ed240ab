"""Residuals that compare the attributions of several scores. In units of the attribution unless said otherwise."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esegeta._types import Method, Score
from esegeta.axioms import arguments
from esegeta.axioms.composed import composed
from esegeta.axioms.registered import axiom
from esegeta.engine import check


@axiom
def linearity(
    method: Method, score: Score, other: Score, *, weights: tuple[float | int, float | int] = (1.0, 2.0)
) -> Callable[..., Tensor]:
    r"""Measure how far the attribution of a weighted sum of scores is from the weighted sum of attributions.

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

    Reference:
        Sundararajan, Taly, Yan 2017, section 2.3, arXiv:1703.01365.
    """
    u, v = weights
    mixed = composed(lambda f, g: lambda z: u * f(z) + v * g(z), score, other)

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        both = method(mixed)(x, *refs, **kwargs)
        parts = u * method(score)(x, *refs, **kwargs) + v * method(other)(x, *refs, **kwargs)
        return (both - parts).abs().amax()

    return residual


@axiom
def scale_of_output(method: Method, score: Score, *, factor: float | int = 2.0) -> Callable[..., Tensor]:
    r"""Measure how far the attribution of a scaled score is from the scaled attribution.

    .. math:: \max_i \left| a_i[cF] - c\,a_i[F] \right|, \qquad c > 0

    A part of linearity that methods with a size or a maximum in them can keep too; the sign is left to linearity.

    Args:
        method: ``Score -> Explain``.
        score: F.
        factor: c.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> score, x = lambda x: x.square().sum(), torch.tensor([[1., 2.]])
        >>> scale_of_output(eg.saliency, score)(x).item()
        0.0
        >>> scale_of_output(lambda score: lambda x: eg.gradient(score)(x) ** 2, score)(x).item()
        32.0

    Reference:
        Lundstroem, Huang, Razaviyayn 2022, arXiv:2202.11912, of which it is the positive part of linearity.
    """
    where = "axioms.scale_of_output"
    if check.non_negative(where, "factor", factor) == 0:
        raise check.refused(where, "factor > 0", repr(factor), "Pass for example 2.0")
    larger = composed(lambda f: lambda z: factor * f(z), score)

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        scaled = method(larger)(x, *refs, **kwargs)
        return (scaled - factor * method(score)(x, *refs, **kwargs)).abs().amax()

    return residual


@axiom
def implementation_invariance(method: Method, score: Score, same: Score) -> Callable[..., Tensor]:
    r"""Measure how differently two networks are explained that are the same function.

    .. math:: \max_i \left| a_i[F] - a_i[G] \right|, \qquad F(z) = G(z) \text{ for all } z

    Args:
        method: ``Score -> Explain``.
        score: F.
        same: G, the same function made of other operations.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (torch.relu(x) - torch.relu(-x)).sum()
        >>> same = lambda x: (x + torch.relu(x) - torch.relu(x)).sum()
        >>> x = torch.ones(1, 2)
        >>> implementation_invariance(eg.gradient, score, same)(x).item()
        0.0
        >>> implementation_invariance(eg.guided_backprop, score, same)(x).item()
        1.0

    Reference:
        Sundararajan, Taly, Yan 2017, section 2.2, arXiv:1703.01365.
    """

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        return (method(score)(x, *refs, **kwargs) - method(same)(x, *refs, **kwargs)).abs().amax()

    return residual


@axiom
def class_sensitivity(method: Method, score: Score, other: Score) -> Callable[..., Tensor]:
    r"""Measure how far two scores are apart if they get the same attribution nevertheless.

    .. math:: \left| \left( F(x) - \overline{F(x')} \right) - \left( G(x) - \overline{G(x')} \right) \right|
              \cdot 1\left[ a[F] = a[G] \right]

    What does not tell the score of one class from that of another explains neither. Scores that differ by a
    constant are not told apart by any difference and need not be. The mean is over a stack of baselines; without
    any baseline x' is zero.

    Args:
        method: ``Score -> Explain``.
        score: F.
        other: G, for example the score of another class.

    Returns:
        ``(x, *refs, key=) -> ()``, in units of the score, not negative.

    Example:
        >>> import torch, esegeta as eg
        >>> one, two, x = lambda x: x[0, 0], lambda x: 3 * x[0, 1], torch.ones(1, 2)
        >>> class_sensitivity(eg.gradient, one, two)(x).item()
        0.0
        >>> class_sensitivity(lambda score: torch.abs, one, two)(x).item()
        2.0

    Reference:
        Adebayo et al. 2018, Sanity checks for saliency maps, arXiv:1810.03292.
    """

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        apart = (method(score)(x, *refs, **kwargs) - method(other)(x, *refs, **kwargs)).abs().amax()
        gap = (arguments.change(score, x, refs) - arguments.change(other, x, refs)).abs()
        # Zero times what is not finite is NaN: such an attribution must not pass for one.
        return torch.where(apart == 0, gap, 0.0 * apart)

    return residual


@axiom
def parameter_dependence(method: Method, score: Score, randomised: Sequence[Score]) -> Callable[..., Tensor]:
    r"""Measure how much of an attribution stays when the parameters of the network are drawn again.

    .. math:: \frac{1}{n} \sum_{k=1}^n r^2\left( a[F], a[F_k] \right)

    with the correlation r over all elements: the share of the map's variance that does not need what the network
    has learnt. A map without any variance counts as one that stays if it is the same, and else as one that does not.

    Args:
        method: ``Score -> Explain``.
        score: F.
        randomised: the scores :math:`F_k`, like F but with (upper) parameters drawn at random.

    Returns:
        ``(x, *refs, key=) -> ()``, in [0, 1]. Zero is reached by attributions without any correlation only.

    Example:
        >>> import torch, esegeta as eg
        >>> weighted = lambda *w: lambda x: (torch.tensor([w]) * x).sum()
        >>> score, others = weighted(1., 2., 3.), [weighted(3., 2., 1.), weighted(1., -2., 1.)]
        >>> round(parameter_dependence(eg.gradient, score, others)(torch.ones(1, 3)).item(), 6)
        0.5
        >>> round(parameter_dependence(lambda score: torch.exp, score, others)(torch.rand(1, 3)).item(), 6)
        1.0

    Reference:
        Adebayo et al. 2018, Sanity checks for saliency maps, arXiv:1810.03292.
    """
    if not randomised:
        raise check.refused(
            "axioms.parameter_dependence",
            "at least one randomised score",
            "none",
            "Draw the parameters of the network again",
        )

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        a = method(score)(x, *refs, **kwargs)
        rest = [_shared_variance(a, method(r)(x, *refs, **kwargs)) for r in randomised]
        return torch.stack(rest).mean()

    return residual


def _shared_variance(a: Tensor, b: Tensor) -> Tensor:
    """The squared correlation of two maps."""
    u, v = _deviation(a), _deviation(b)
    size = u.square().sum() * v.square().sum()
    r2 = (u * v).sum().square() / torch.where(size > 0, size, 1.0)
    return torch.where(size == 0, (a == b).all().to(a.dtype), r2)


def _deviation(a: Tensor) -> Tensor:
    """The deviation of a map from its mean, in a unit in which squares neither overflow nor vanish."""
    largest = a.abs().amax()
    unit = a / torch.where(largest == 0, 1.0, largest)
    apart = unit - unit.mean()
    # What rounding leaves of a constant map is no variance.
    rounding = 64 * torch.finfo(a.dtype).eps
    return torch.where(unit.amax() - unit.amin() <= rounding, 0.0, apart)
