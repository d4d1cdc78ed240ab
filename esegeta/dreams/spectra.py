"""What a set of images is like, as dreams need it: its spectrum of magnitudes and how its channels go together."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from esegeta import spatial
from esegeta.engine import check


def mirrored(t: Tensor) -> Tensor:
    """Return the value at the opposite frequency, for every frequency.

    >>> mirrored(torch.arange(4.0)[None]).tolist()
    [[0.0, 3.0, 2.0, 1.0]]
    """
    axes = tuple(range(1, t.ndim))
    return t.flip(axes).roll((1,) * len(axes), axes)


def at_zero(like: Tensor) -> Tensor:
    """Return where the mean stands among the coefficients.

    >>> at_zero(torch.zeros(2, 3)).tolist()
    [[True, False, False]]
    """
    return torch.arange(like.shape[1:].numel(), device=like.device).reshape(1, *like.shape[1:]) == 0


def own_mirror(shape: torch.Size, device: torch.device) -> Tensor:
    """Return where a frequency is its own opposite, so that its coefficient is real: mean, and at even sizes more.

    >>> own_mirror(torch.Size((1, 4)), torch.device("cpu")).tolist()
    [[True, False, True, False]]
    """
    place = torch.arange(shape[1:].numel(), device=device).reshape(1, *shape[1:])
    return place == mirrored(place)


def transformed(x: Tensor) -> Tensor:
    """Return the orthonormal Fourier coefficients of every channel, all of them."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.fft.fftn(wide, dim=tuple(range(1, x.ndim)), norm="ortho")


def frequencies(shape: torch.Size, spacing: spatial.Spacing | None, like: Tensor) -> Tensor:
    """Return how often the wave of every coefficient repeats, per mm with ``spacing``, else per voxel.

    >>> frequencies(torch.Size((1, 4)), None, torch.zeros(1)).tolist()
    [[0.0, 0.25, 0.5, 0.25]]
    """
    voxel = check.spacing("dreams", spacing, len(shape) - 1)
    lines = [
        torch.fft.fftfreq(n, d=float(d), dtype=like.dtype, device=like.device)
        for n, d in zip(shape[1:], voxel, strict=True)
    ]
    squares = torch.meshgrid(*[line.square() for line in lines], indexing="ij")
    return torch.stack(squares).sum(0).sqrt()[None]


def spectrum(images: Iterable[Tensor]) -> Tensor:
    r"""Return the mean magnitude of every frequency over images, one at a time.

    .. math:: M(k) = \frac1n \sum_i |\hat x_i(k)|, \qquad M(0) = \frac1n \sum_i \hat x_i(0)

    with the orthonormal transform; the mean keeps its sign.

    Args:
        images: of one shape (C,\*S), streamed.

    Returns:
        (C,\*S), with the mean at index 0.

    Example:
        >>> spectrum([torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, -3.0]])]).tolist()
        [[0.0, 2.8284270763397217]]
    """
    total: Tensor | None = None
    n = 0
    for image in images:
        spatial.image("dreams.spectrum", "an image", image)
        coefficients = transformed(image)
        own = torch.where(at_zero(image), coefficients.real, coefficients.abs())
        if total is not None and total.shape != own.shape:
            got, advice = f"{tuple(total.shape)} and {tuple(own.shape)}", "Resample them to one grid"
            raise check.refused("dreams.spectrum", "images of one shape", got, advice)
        total = own if total is None else total + own
        n += 1
    if total is None:
        raise check.refused("dreams.spectrum", "at least one image", "none", "Pass a list or an iterator")
    return total / n


def spectrum_residual(x: Tensor, spectrum: Tensor) -> Tensor:
    """Return how far the magnitudes of an image are from a spectrum, relative to its size without the mean.

    Example:
        >>> x = torch.tensor([[1.0, -1.0, 2.0, 0.0]])
        >>> spectrum_residual(2 * x, transformed(x).abs()).item()
        1.0
    """
    wanted = check.like("dreams.spectrum_residual", "spectrum", spectrum, x).abs()
    others = ~at_zero(x)
    off = (transformed(x).abs() - wanted).square() * others
    power = (wanted.square() * others).sum()
    return (off.sum() / torch.where(power > 0, power, torch.nan)).sqrt()


class ChannelStatistics(NamedTuple):
    """How the channels of images go together: ``mean`` (C,) and ``covariance`` (C, C) over voxels."""

    mean: Tensor
    covariance: Tensor


def channel_statistics(images: Iterable[Tensor]) -> ChannelStatistics:
    r"""Return mean and covariance of the channels over all voxels of images, one at a time.

    Args:
        images: with the same channels, (C,\*S), streamed.

    Example:
        >>> found = channel_statistics([torch.tensor([[1.0, 3.0], [2.0, 6.0]])])
        >>> found.mean.tolist(), found.covariance.tolist()
        ([2.0, 4.0], [[1.0, 2.0], [2.0, 4.0]])
    """
    n, total, products = 0, None, None
    for image in images:
        voxels = spatial.image("dreams.channel_statistics", "an image", image).flatten(1).to(torch.float64)
        own = voxels.sum(1), voxels @ voxels.T
        if total is not None and total.shape != own[0].shape:
            got, advice = f"{len(total)} and {len(own[0])} channels", "Leave the others out"
            raise check.refused("dreams.channel_statistics", "images with the same channels", got, advice)
        total, products = own if total is None or products is None else (total + own[0], products + own[1])
        n += voxels.shape[1]
    if total is None or products is None:
        advice = "Pass a list or an iterator"
        raise check.refused("dreams.channel_statistics", "at least one image", "none", advice)
    mean = total / n
    return ChannelStatistics(mean, products / n - torch.outer(mean, mean))
