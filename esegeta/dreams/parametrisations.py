"""What is moved when a dream is made, voxels, waves or phases: ways from numbers to an image and back."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esegeta import spatial
from esegeta._registry import parametrisation
from esegeta.dreams import spectra
from esegeta.engine import check, levels


class Parametrisation(NamedTuple):
    """A way to write an image.

    encode: from the image at the start to parameters; decode: from parameters to the image, differentiable.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    """Return what comes: voxels are their own parameters."""
    return x


@parametrisation(also=("pixels",))
def voxels() -> Parametrisation:
    """Move every voxel by itself.

    Example:
        >>> voxels().decode(torch.ones(1, 2)).tolist()
        [[1.0, 1.0]]
    """
    return Parametrisation(same, same)


@parametrisation(paper="Olah, Mordvintsev, Schubert 2017, Feature visualization")
def fourier(*, decay: float | int = 1.0, spacing: spatial.Spacing | None = None) -> Parametrisation:
    r"""Move waves instead of voxels, long ones faster: the image is smooth from its first step on.

    .. math:: x = H (s \odot z), \qquad s(k) \propto \max(|f(k)|, f_{\min})^{-d}

    H is the orthonormal Hartley transform, which is real and its own inverse: each pair of opposite frequencies has
    two parameters and none twice, so that no plane of coefficients can contradict another. Frequencies are per mm
    and so the same in all directions of an anisotropic volume. The scale s has mean square 1: white parameters of
    variance 1 are an image of variance 1.

    Args:
        decay: d, of which 0 gives all waves the same speed.
        spacing: mm per voxel.

    Example:
        >>> ways = fourier()
        >>> x = torch.tensor([[1.0, 2.0, 0.0, 5.0]])
        >>> torch.allclose(ways.decode(ways.encode(x)), x, atol=1e-6)
        True
    """
    power = check.non_negative("dreams.fourier", "decay", decay)

    found: dict[tuple[object, ...], Tensor] = {}

    def scale(t: Tensor) -> Tensor:
        # A dream asks for it at every step, always for the same grid.
        grid = (t.shape[1:], t.dtype, t.device, levels.fake(t))
        if grid not in found:
            with torch.inference_mode(False):
                f = spectra.frequencies(t.shape, spacing, t)
                longest = f[f > 0].min() if f.numel() > 1 else torch.ones_like(f)
                s = torch.maximum(f, longest) ** -power
                found.clear()
                found[grid] = s / s.square().mean().sqrt()
        return found[grid]

    def encode(x: Tensor) -> Tensor:
        wide = spatial.image("dreams.fourier", "start", x).to(torch.promote_types(x.dtype, torch.float32))
        return hartley(wide) / scale(wide)

    return Parametrisation(encode, lambda z: hartley(z * scale(z)))


def hartley(x: Tensor) -> Tensor:
    """Return the orthonormal Hartley transform of every channel, whose inverse is itself.

    >>> hartley(torch.tensor([[1.0, 1.0]])).tolist()
    [[1.4142135381698608, 0.0]]
    """
    coefficients = spectra.transformed(x)
    return coefficients.real - coefficients.imag


@parametrisation(example={"low": 0.0, "high": 1.0}, also=("sigmoid",))
def bounded(low: float | int, high: float | int) -> Parametrisation:
    r"""Keep intensities in a range, :math:`x = l + (h - l)\, \sigma(z)`.

    Args:
        low: l, which the start has to exceed.
        high: h, below which the start has to lie.

    Example:
        >>> bounded(0, 10).decode(torch.zeros(1, 1)).item()
        5.0
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise check.refused(
            "dreams.bounded", "low < high", f"{low!r} and {high!r}", "Take the range of the data"
        )

    def encode(x: Tensor) -> Tensor:
        if levels.true_anywhere((x <= low) | (x >= high)):
            got = f"values from {levels.base(x).min().item():g} to {levels.base(x).max().item():g}"
            advice = "Widen the range, or clamp the start into it"
            raise check.refused(
                "dreams.bounded", f"a start strictly between {low:g} and {high:g}", got, advice
            )
        return torch.logit((x - low) / (high - low))

    return Parametrisation(encode, lambda z: low + (high - low) * torch.sigmoid(z))


@parametrisation(example={"statistics": spectra.ChannelStatistics(torch.zeros(1), torch.ones(1, 1))})
def decorrelated(statistics: spectra.ChannelStatistics) -> Parametrisation:
    r"""Move channels as the data's go together, :math:`x = \mu + \Sigma^{1/2} z`.

    Args:
        statistics: of the data, from ``dreams.channel_statistics``.

    Example:
        >>> together = spectra.ChannelStatistics(torch.tensor([1.0, 2.0]), torch.diag(torch.tensor([4.0, 9.0])))
        >>> [round(v) for v in decorrelated(together).decode(torch.ones(2, 1)).flatten().tolist()]
        [3, 5]
    """
    mean, covariance = statistics
    if covariance.ndim != 2 or covariance.shape != (*mean.shape, *mean.shape):
        got, advice = f"{tuple(mean.shape)} and {tuple(covariance.shape)}", "Use dreams.channel_statistics"
        raise check.refused("dreams.decorrelated", "mean (C,) and covariance (C, C)", got, advice)
    values, vectors = torch.linalg.eigh(covariance.to(torch.float64))
    if not values.min() > 1e-12 * values.max():
        got, advice = "channels that follow from each other", "Leave out a channel, or add to the diagonal"
        raise check.refused("dreams.decorrelated", "a covariance of full rank", got, advice)
    root, back = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))

    def centre(x: Tensor) -> Tensor:
        if len(x) != len(mean):
            expected, advice = f"{len(mean)} channels", "Take statistics of such images"
            raise check.refused("dreams.decorrelated", expected, check.describe(x), advice)
        return mean.to(x).reshape(-1, *(1,) * (x.ndim - 1))

    return Parametrisation(
        lambda x: torch.tensordot(back.to(x), x - centre(x), 1),
        lambda z: centre(z) + torch.tensordot(root.to(z), z, 1),
    )


@parametrisation(example={"spectrum": torch.ones(1, 4, 6)}, paper="Fel et al. 2023, MACO, arXiv:2306.06805")
def maco(spectrum: Tensor) -> Parametrisation:
    r"""Keep the magnitude of every frequency and move phases alone: the image stays as smooth as the data.

    .. math:: \hat x(k) = M(k)\, e^{i \theta(k)}, \qquad \theta(-k) = -\theta(k)

    A phase belongs to a pair of opposite frequencies, so the image is real and its magnitudes are M up to rounding.
    Frequencies without an opposite have real coefficients: they keep the sign of the start, the mean that of M.
    Nothing is squashed afterwards, since a sigmoid on voxels changes all magnitudes: intensities have the spread of
    the data on the average, not a range. ``starts.phases`` draws a start.

    Args:
        spectrum: M, from ``dreams.spectrum`` over images of the data, (C,\*S).

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 0.0, 5.0]])
        >>> ways = maco(spectra.spectrum([x]))
        >>> torch.allclose(ways.decode(ways.encode(x)), x, atol=1e-5)
        True
    """
    size = spatial.image("dreams.maco", "spectrum", spectrum)
    fixed = spectra.own_mirror(size.shape, size.device)
    place = torch.arange(size.shape[1:].numel(), device=size.device).reshape(1, *size.shape[1:])
    half = (place < spectra.mirrored(place)) & ~fixed
    mean, axes = spectra.at_zero(size), tuple(range(1, size.ndim))

    def encode(x: Tensor) -> Tensor:
        if x.shape != size.shape:
            got, advice = (
                f"{tuple(x.shape)} and {tuple(size.shape)}",
                "Take the spectrum of images of that shape",
            )
            raise check.refused("dreams.maco", "a start of the shape of the spectrum", got, advice)
        return spectra.transformed(x).angle()

    def decode(z: Tensor) -> Tensor:
        phase = torch.where(half, z, 0)
        turn = phase - spectra.mirrored(phase)
        # At a frequency without an opposite the phase of the start is 0 or pi, and nothing moves it.
        sign = torch.where(fixed & (z.detach().cos() < 0), -1.0, 1.0)
        amplitude = torch.where(mean, size, size.abs() * sign).to(z)
        wave = torch.complex(amplitude * turn.cos(), amplitude * turn.sin())
        return torch.fft.ifftn(wave, dim=axes, norm="ortho").real

    return Parametrisation(encode, decode)


@parametrisation(example={"inner": fourier(), "outer": bounded(0, 1)})
def composed(inner: Parametrisation, outer: Parametrisation) -> Parametrisation:
    """Write an image by two parametrisations, one after the other: waves whose image is kept in a range.

    Args:
        inner: whose parameters move.
        outer: which makes the image from what ``inner`` decodes.

    Example:
        >>> both = composed(fourier(), bounded(0, 1))
        >>> round(both.decode(both.encode(torch.full((1, 4), 0.25))).mean().item(), 6)
        0.25
    """
    return Parametrisation(lambda x: inner.encode(outer.encode(x)), lambda z: outer.decode(inner.decode(z)))
