"""How much an explanation changes as the image does, a little."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esegeta import random
from esegeta._registry import Cost, metric
from esegeta._types import Explain
from esegeta.engine import check, stream
from esegeta.engine.estimates import answered
from esegeta.metrics.explanations import asked, fresh
from esegeta.metrics.removal import Measure
from esegeta.placing import tap

_LEAST = 1e-6  # what relative changes are divided by at least, as in the paper


def _moved(where: str, explain: Explain, radius: float) -> Callable[..., tuple[Tensor, Callable[..., Any]]]:
    """The explanation of x, and a function of a draw: how far x was moved, and its explanation there."""
    fresh(where, explain)
    reach = check.non_negative(where, "radius", radius)
    if not reach:
        raise check.refused(where, "radius > 0", "0", "0.02 is usual for images in [0, 1]")

    def prepare(x: Tensor, refs: tuple[Tensor, ...], key: Any) -> tuple[Tensor, Callable[..., Any]]:
        check.image(where, "x", x)
        word = check.key(where, key)
        own, around = random.fold_in(word, 0), random.fold_in(word, 1)
        a = asked(explain, x, refs, own)
        check.finite(where, "the explanation", a, "A change of it is none of any size: repair the method")

        def at(i: Tensor) -> tuple[Tensor, Tensor]:
            drawn = random.uniform(random.fold_in(around, i), x.shape, dtype=x.dtype, device=x.device)
            step = (2 * drawn - 1) * reach
            return step, asked(explain, x + step, refs, own)  # the same draws: only x differs

        return a, at

    return prepare


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a.double())


def _nodes(x: Tensor, samples: int) -> Tensor:
    return torch.arange(samples, device=x.device)


@metric(
    family="robustness",
    better="lower",
    needs=("explain", "key"),
    paper="Yeh et al. 2019, arXiv:1901.09392",
    example={"samples": 3},
    also=("max_sensitivity",),
    cost=lambda samples: Cost(explanations=samples + 1),
    exact=0.0,
)
def sensitivity_max(
    explain: Explain, *, radius: float = 0.02, samples: int = 16, relative: bool = True
) -> Measure:
    r"""Return the largest change of an explanation for images in a small box around x, over its own size.

    .. math:: \max_{\|\delta\|_\infty \le r} \frac{\|a(x + \delta) - a(x)\|_2}{\|a(x)\|_2}

    The largest of random steps, which is at most the maximum. An explanation that draws at random draws the same
    numbers at both places.

    Args:
        explain: ``(x, *refs) -> like x``; a finished map is refused.
        radius: r, in the unit of x: no element moves further.
        samples: how many steps.
        relative: False leaves out the denominator, as in the paper.

    Returns:
        ``(x, *refs, key=) -> ()``; NaN for an explanation of zeros, if relative.

    Example:
        >>> import esegeta as eg
        >>> sensitivity_max(eg.gradient(lambda x: (3 * x).sum()))(torch.ones(1, 2), key=0).item()
        0.0

    Reference:
        Yeh, Hsieh, Suggala, Inouye, Ravikumar 2019, arXiv:1901.09392.
    """
    where = "metrics.sensitivity_max"
    return _sensitivity(where, explain, radius, samples, relative, largest=True)


@metric(
    family="robustness",
    better="lower",
    answer="sampled",
    needs=("explain", "key"),
    paper="Yeh et al. 2019, arXiv:1901.09392",
    example={"samples": 3},
    also=("avg_sensitivity",),
    cost=lambda samples: Cost(explanations=samples + 1),
    exact=0.0,
)
def sensitivity_mean(
    explain: Explain, *, radius: float = 0.02, samples: int = 16, relative: bool = True
) -> Measure:
    r"""Return the mean change of an explanation for images in a small box around x, over its own size.

    .. math:: E_{\delta \sim U[-r, r]} \frac{\|a(x + \delta) - a(x)\|_2}{\|a(x)\|_2}

    Args:
        explain: ``(x, *refs) -> like x``; a finished map is refused.
        radius: r, in the unit of x.
        samples: how many steps.
        relative: False leaves out the denominator.

    Returns:
        ``(x, *refs, key=) -> ()``. ``eg.with_standard_error`` tells how certain it is.

    Example:
        >>> import esegeta as eg
        >>> sensitivity_mean(eg.gradient(lambda x: (3 * x).sum()))(torch.ones(1, 2), key=0).item()
        0.0

    Reference:
        Yeh, Hsieh, Suggala, Inouye, Ravikumar 2019, arXiv:1901.09392.
    """
    where = "metrics.sensitivity_mean"
    return _sensitivity(where, explain, radius, samples, relative, largest=False)


def _sensitivity(
    where: str, explain: Explain, radius: float, samples: int, relative: bool, largest: bool
) -> Measure:
    prepare = _moved(where, explain, radius)
    check.positive_count(where, "samples", samples, least=2)

    def measure(x: Tensor, *refs: Tensor, key: Any = None) -> Tensor:
        a, at = prepare(x, refs, key)
        size = _norm(a)
        over = torch.where(size > 0, size, torch.nan) if relative else torch.ones_like(size)

        def change(i: Tensor) -> Tensor:
            return _norm(at(i)[1] - a) / over

        if largest:
            return stream.extrema(change, _nodes(x, samples), label=where)[1]
        return answered(*stream.estimate(change, _nodes(x, samples), label=where))

    return measure


@metric(
    family="robustness",
    better="lower",
    needs=("explain", "key"),
    paper="Alvarez-Melis, Jaakkola 2018, arXiv:1806.08049",
    example={"samples": 3},
    also=("local_lipschitz_estimate",),
    cost=lambda samples: Cost(explanations=samples + 1),
    exact=0.0,
)
def lipschitz(explain: Explain, *, radius: float = 0.02, samples: int = 16) -> Measure:
    r"""Return the largest change of an explanation per length of a small step.

    .. math:: \max_{\|\delta\|_\infty \le r} \frac{\|a(x + \delta) - a(x)\|_2}{\|\delta\|_2}

    Args:
        explain: ``(x, *refs) -> like x``; a finished map is refused.
        radius: r, in the unit of x.
        samples: how many steps.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        The gradient of a sum of squares is twice the image: it changes twice as much.

        >>> import esegeta as eg
        >>> explain = eg.gradient(lambda x: (x ** 2).sum())
        >>> round(lipschitz(explain)(torch.ones(1, 2, dtype=torch.float64), key=0).item(), 6)
        2.0

    Reference:
        Alvarez-Melis, Jaakkola 2018, On the robustness of interpretability methods, arXiv:1806.08049.
    """
    where = "metrics.lipschitz"
    prepare = _moved(where, explain, radius)
    check.positive_count(where, "samples", samples)

    def measure(x: Tensor, *refs: Tensor, key: Any = None) -> Tensor:
        a, at = prepare(x, refs, key)

        def change(i: Tensor) -> Tensor:
            step, there = at(i)
            return _norm(there - a) / _norm(step)

        return stream.extrema(change, _nodes(x, samples), label=where)[1]

    return measure


def _share(change: Tensor, of: Tensor) -> Tensor:
    """Relative change of every element, nothing where both are zero."""
    some = of != 0
    return torch.where(some, change / torch.where(some, of, 1), torch.where(change != 0, change / _LEAST, 0))


def _relative(where: str, explain: Explain, radius: float, samples: int, below: Any) -> Measure:
    prepare = _moved(where, explain, radius)
    check.positive_count(where, "samples", samples)

    def measure(x: Tensor, *refs: Tensor, key: Any = None) -> Tensor:
        a, at = prepare(x, refs, key)
        size = below(x)

        def change(i: Tensor) -> Tensor:
            step, there = at(i)
            return _norm(_share(there - a, a)) / size(step).clamp(min=_LEAST)

        return stream.extrema(change, _nodes(x, samples), label=where)[1]

    return measure


@metric(
    family="robustness",
    better="lower",
    needs=("explain", "key"),
    paper="Agarwal et al. 2022, arXiv:2203.06877",
    example={"samples": 3},
    also=("ris",),
    cost=lambda samples: Cost(explanations=samples + 1),
    exact=0.0,
)
def relative_input_stability(explain: Explain, *, radius: float = 0.02, samples: int = 16) -> Measure:
    r"""Return the largest relative change of an explanation per relative change of the image.

    .. math:: \max_\delta \frac{\|(a(x + \delta) - a(x)) / a(x)\|}{\max(\|\delta / x\|, 10^{-6})}

    Args:
        explain: ``(x, *refs) -> like x``; a finished map is refused.
        radius: of the box that steps are drawn from.
        samples: how many steps.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> explain = eg.gradient(lambda x: (x ** 2).sum())  # proportional to x
        >>> round(relative_input_stability(explain)(torch.ones(1, 2, dtype=torch.float64), key=0).item(), 6)
        1.0

    Reference:
        Agarwal et al. 2022, Rethinking stability for attribution-based explanations, arXiv:2203.06877.
    """
    where = "metrics.relative_input_stability"
    return _relative(where, explain, radius, samples, lambda x: lambda step: _norm(_share(step, x)))


@metric(
    family="robustness",
    better="lower",
    needs=("explain", "score", "key"),
    paper="Agarwal et al. 2022, arXiv:2203.06877",
    example={"samples": 3},
    also=("ros",),
    cost=lambda samples: Cost(forwards=samples + 1, explanations=samples + 1),
    exact=0.0,
)
def relative_output_stability(
    explain: Explain, model: Callable[[Tensor], Tensor], *, radius: float = 0.02, samples: int = 16
) -> Measure:
    r"""Return the largest relative change of an explanation per change of the output.

    .. math:: \max_\delta \frac{\|(a(x + \delta) - a(x)) / a(x)\|}{\max(\|f(x + \delta) - f(x)\|, 10^{-6})}

    The paper leaves out steps that change the predicted class; here all count, for a score has no class.

    Args:
        explain: ``(x, *refs) -> like x``; a finished map is refused.
        model: f, a model, a score or a layer.
        radius: of the box that steps are drawn from.
        samples: how many steps.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (3 * x).sum()
        >>> relative_output_stability(eg.gradient(score), score)(torch.ones(1, 2), key=0).item()
        0.0

    Reference:
        Agarwal et al. 2022, Rethinking stability for attribution-based explanations, arXiv:2203.06877.
    """
    where = "metrics.relative_output_stability"
    if not callable(model):
        advice = "Pass eg.from_module(network)"
        raise check.refused_type(where, "a model", check.describe(model), advice)

    def change(x: Tensor) -> Callable[[Tensor], Tensor]:
        clean = model(x)
        return lambda step: _norm(model(x + step) - clean)

    return _relative(where, explain, radius, samples, change)


@metric(
    family="robustness",
    better="lower",
    needs=("explain", "score", "key"),
    paper="Agarwal et al. 2022, arXiv:2203.06877",
    example={"samples": 3, "place": "0"},
    also=("rrs",),
    cost=lambda samples: Cost(forwards=samples + 1, explanations=samples + 1),
    exact=0.0,
)
def relative_representation_stability(
    explain: Explain,
    score: Callable[[Tensor], Tensor],
    *,
    place: str,
    radius: float = 0.02,
    samples: int = 16,
) -> Measure:
    r"""Return the largest relative change of an explanation per relative change of an activation.

    .. math:: \max_\delta \frac{\|(a(x + \delta) - a(x)) / a(x)\|}
              {\max(\|(A(x + \delta) - A(x)) / A(x)\|, 10^{-6})}

    Args:
        explain: ``(x, *refs) -> like x``; a finished map is refused.
        score: the score, or the model, that has the place.
        place: of the activation A; ``esegeta.places`` lists them.
        radius: of the box that steps are drawn from.
        samples: how many steps.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "layer") ** 2).sum()
        >>> measure = relative_representation_stability(eg.gradient(score), score, place="layer")
        >>> round(measure(torch.ones(1, 2, dtype=torch.float64), key=0).item(), 6)
        1.0

    Reference:
        Agarwal et al. 2022, Rethinking stability for attribution-based explanations, arXiv:2203.06877.
    """
    where = "metrics.relative_representation_stability"
    inner = tap(score, place)

    def change(x: Tensor) -> Callable[[Tensor], Tensor]:
        clean = inner(x)
        return lambda step: _norm(_share(inner(x + step) - clean, clean))

    return _relative(where, explain, radius, samples, change)
