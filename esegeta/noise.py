"""Noise as functions of an image and a key: ``Noise = (x, key) -> tensor like x``, to be added to x.

They compose: ``within(fraction_of_range(0.1), brain)`` is again a noise. Under ``vmap`` every example has its
own range, and its own field if it has its own key (``random.fold_in``).
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from esegeta import random
from esegeta._registry import noise as noise_like
from esegeta.engine import check

Noise = Callable[[Tensor, random.Key], Tensor]


@noise_like(family="normal", paper="arXiv:1706.03825", example={"sigma": 0.1})
def absolute(sigma: float | int) -> Noise:
    r"""Return normal noise with a given standard deviation, in the units of the network's input.

    .. math:: \eta_i = \sigma z_i, \qquad z_i \sim N(0, 1)

    Args:
        sigma: the standard deviation.

    Returns:
        (x, key) -> tensor like x.

    Example:
        >>> x = torch.zeros(1, 100, 100)
        >>> round(absolute(3.0)(x, 7).std().item(), 1)
        3.0

    Reference: Smilkov et al., SmoothGrad, arXiv:1706.03825, section 2.
    """
    sigma = check.non_negative("absolute", "sigma", sigma)

    def noise(x: Tensor, key: random.Key) -> Tensor:
        check.floating("absolute", "x", x)
        return random.normal(key, x.shape, dtype=x.dtype, device=x.device) * sigma

    return noise


@noise_like(family="normal", paper="arXiv:1706.03825", example={"fraction": 0.1})
def fraction_of_range(fraction: float | int) -> Noise:
    r"""Return normal noise whose standard deviation is a fraction of the range of the image, as in SmoothGrad.

    .. math:: \eta_i = f \, (\max x - \min x) \, z_i, \qquad z_i \sim N(0, 1)

    The range is taken over all channels and voxels of one example; a constant image gets none.

    Args:
        fraction: of the range, commonly 0.1 to 0.2.

    Returns:
        (x, key) -> tensor like x.

    Example:
        >>> x = torch.linspace(-5, 15, 10_000).reshape(1, 100, 100)
        >>> torch.allclose(fraction_of_range(0.1)(x, 7), absolute(2.0)(x, 7))
        True

    Reference: Smilkov et al., SmoothGrad, arXiv:1706.03825, section 3.1.
    """
    fraction = check.non_negative("fraction_of_range", "fraction", fraction)

    def noise(x: Tensor, key: random.Key) -> Tensor:
        check.floating("fraction_of_range", "x", x)
        unit = random.normal(key, x.shape, dtype=x.dtype, device=x.device)
        return unit * (fraction * (x.amax() - x.amin()))

    return noise


@noise_like(family="normal", example={"noise": 0.1, "mask": torch.ones(4, 6, dtype=torch.bool)})
def within(noise: float | int | Noise, mask: Bool[Tensor, "..."]) -> Noise:
    r"""Return the noise inside a mask and zero outside: noise in air is far from what networks are trained on.

    .. math:: \eta'_i = \eta_i \, 1[i \in M]

    Inside, the values are those of the unmasked noise.

    Args:
        noise: the noise to restrict; a number is a fraction of the range of x.
        mask: of shape (\*S) for all channels, or (C,\*S); True where there shall be noise.

    Returns:
        (x, key) -> tensor like x.

    Example:
        >>> mask = torch.tensor([True, False, True])
        >>> (within(absolute(1.0), mask)(torch.zeros(2, 3), 7) != 0).tolist()
        [[True, False, True], [True, False, True]]
    """
    inner = as_noise(noise)
    if check.tensor("within", "mask", mask).dtype != torch.bool:
        raise check.refused_type(
            "within", "a boolean mask", check.describe(mask), "Pass for example mask > 0"
        )

    def masked(x: Tensor, key: random.Key) -> Tensor:
        if mask.shape not in (x.shape, x.shape[1:]):
            expected = f"a mask of shape {tuple(x.shape[1:])} or {tuple(x.shape)}"
            raise check.refused("within", expected, check.describe(mask), "Resample it to the image")
        values = inner(x, key)
        return torch.where(mask, values, torch.zeros_like(values))

    return masked


def as_noise(noise: float | int | Noise) -> Noise:
    r"""Return what a user may write for a noise: a number is a fraction of the range, a noise is itself.

    Args:
        noise: a number >= 0, or a function (x, key) -> tensor like x.

    Returns:
        (x, key) -> tensor like x.

    Example:
        >>> x = torch.tensor([[0.0, 10.0]])
        >>> torch.equal(as_noise(0.1)(x, 7), fraction_of_range(0.1)(x, 7))
        True
    """
    if isinstance(noise, (int, float)) and not isinstance(noise, bool):
        return fraction_of_range(noise)
    if not callable(noise):
        expected = "a number (the fraction of the range of x) or a noise (x, key) -> tensor like x"
        advice = "Pass for example 0.1 or noise.absolute(0.2)"
        raise check.refused_type("as_noise", expected, check.describe(noise), advice)
    return noise
