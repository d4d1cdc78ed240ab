"""Statistics of an explanation over noisy copies of the input."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import random
from esegeta._registry import Cost, takes_key, transform
from esegeta._types import Explain
from esegeta.engine import check, stream
from esegeta.noise import Noise, as_noise


@transform(
    key=True,
    preserves=(
        "sensitivity_a dummy linearity implementation_invariance scale_of_output continuity class_sensitivity"
    ),
    example={"noise": 0.1, "samples": 4},
    family="smoothing",
    cost=lambda samples: Cost(explanations=samples),
    paper="Smilkov, Thorat, Kim, Viegas, Wattenberg 2017, arXiv:1706.03825",
)
def smooth(explain: Explain, *, noise: float | int | Noise = 0.1, samples: int = 25) -> Explain:
    r"""Average an explanation over noisy copies of the input; SmoothGrad when it is the gradient.

    .. math:: \bar a(x) = \frac1n \sum_k a(x + \eta_k), \qquad \eta_k \sim N(0, \sigma^2)

    Args:
        explain: ``(x, *refs) -> like x``.
        noise: sigma as a fraction of the range of each x, or a noise of ``esegeta.noise``: ``absolute(0.2)``,
            ``within(0.1, mask)``. Other libraries mean other things by the same number.
        samples: how many copies.

    Returns:
        ``(x, *refs, key=) -> like x``. If ``explain`` is complete, the sum is E F(x + noise) - F(x').

    Example:
        >>> import torch, esegeta as eg
        >>> explain = smooth(eg.gradient(lambda x: (3 * x).sum()), noise=0.2, samples=5)
        >>> explain(torch.tensor([[1., 2.]]), key=0).tolist()
        [[3.0, 3.0]]

    Reference:
        Smilkov, Thorat, Kim, Viegas, Wattenberg 2017, arXiv:1706.03825.
    """
    draw, nodes = _sampler("smooth", explain, noise, samples)

    def smoothed(x: Float[Tensor, "*dims"], *refs: Tensor, key: int | Tensor | None = None) -> Tensor:
        return stream.mean(draw(x, refs, check.key("smooth", key)), nodes(x), label="smooth")

    return smoothed


@transform(
    key=True,
    preserves="sensitivity_a dummy implementation_invariance continuity class_sensitivity",
    example={"noise": 0.1, "samples": 4},
    family="smoothing",
    cost=lambda samples: Cost(explanations=samples),
    paper="Smilkov, Thorat, Kim, Viegas, Wattenberg 2017, arXiv:1706.03825",
)
def smooth_squared(explain: Explain, *, noise: float | int | Noise = 0.1, samples: int = 25) -> Explain:
    r"""Average the squared explanation over noisy copies of the input.

    .. math:: \frac1n \sum_k a(x + \eta_k)^2

    Args:
        explain: ``(x, *refs) -> like x``.
        noise: as in ``smooth``.
        samples: how many copies.

    Returns:
        ``(x, *refs, key=) -> like x``, not negative.

    Example:
        >>> import torch, esegeta as eg
        >>> explain = smooth_squared(eg.gradient(lambda x: (3 * x).sum()), samples=5)
        >>> explain(torch.tensor([[1., 2.]]), key=0).tolist()
        [[9.0, 9.0]]

    Reference:
        Smilkov, Thorat, Kim, Viegas, Wattenberg 2017, section 3.2 of the discussion, arXiv:1706.03825.
    """
    draw, nodes = _sampler("smooth_squared", explain, noise, samples)

    def squared(x: Float[Tensor, "*dims"], *refs: Tensor, key: int | Tensor | None = None) -> Tensor:
        once = draw(x, refs, check.key("smooth_squared", key))
        return stream.mean(lambda i: once(i).square(), nodes(x), label="smooth_squared")

    return squared


@transform(
    key=True,
    preserves=("dummy", "implementation_invariance", "continuity"),
    example={"noise": 0.1, "samples": 4},
    family="smoothing",
    cost=lambda samples: Cost(explanations=samples),
    paper="Adebayo, Gilmer, Goodfellow, Kim 2018, arXiv:1810.03307",
)
def variance(explain: Explain, *, noise: float | int | Noise = 0.1, samples: int = 25) -> Explain:
    r"""Return the variance of an explanation over noisy copies of the input; VarGrad when it is the gradient.

    .. math:: \frac1n \sum_k \left( a(x + \eta_k) - \bar a(x) \right)^2

    Computed by merging chunk means (as exact as two passes): the difference of two large means would cancel.
    It is a spread, not an importance: for a linear score it is zero.

    Args:
        explain: ``(x, *refs) -> like x``.
        noise: as in ``smooth``.
        samples: how many copies.

    Returns:
        ``(x, *refs, key=) -> like x``, not negative.

    Example:
        >>> import torch, esegeta as eg
        >>> explain = variance(eg.gradient(lambda x: (3 * x).sum()), samples=5)
        >>> explain(torch.tensor([[1., 2.]]), key=0).tolist()
        [[0.0, 0.0]]

    Reference:
        Adebayo, Gilmer, Goodfellow, Kim 2018, arXiv:1810.03307.
    """
    draw, nodes = _sampler("variance", explain, noise, samples)

    def spread(x: Float[Tensor, "*dims"], *refs: Tensor, key: int | Tensor | None = None) -> Tensor:
        return stream.moments(draw(x, refs, check.key("variance", key)), nodes(x), label="variance")[1]

    return spread


Sample = Callable[[Tensor], Tensor]


def _sampler(
    name: str, explain: Explain, noise: float | int | Noise, samples: int
) -> tuple[Callable[[Tensor, tuple[Tensor, ...], int | Tensor], Sample], Callable[[Tensor], Tensor]]:
    """``draw(x, refs, key)`` is the explanation of the i-th noisy copy, ``nodes(x)`` are the i."""
    disturb = as_noise(noise)
    n = check.positive_count(name, "samples", samples)
    random_inside = takes_key(explain)

    def draw(x: Tensor, refs: tuple[Tensor, ...], key: int | Tensor) -> Sample:
        check.image(name, "x", x)

        def once(i: Tensor) -> Tensor:
            here = random.fold_in(key, i)
            noisy = x + disturb(x, here)
            return (
                explain(noisy, *refs, key=random.fold_in(here, 1)) if random_inside else explain(noisy, *refs)
            )

        return once

    return draw, lambda x: torch.arange(n, device=x.device)
