"""Where a dream begins: functions from a key to an image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esegeta import random
from esegeta.dreams import spectra
from esegeta.engine import check

Start = Callable[[random.Key], Tensor]


def noise(
    shape: Sequence[int],
    *,
    mean: float | int = 0.0,
    sigma: float | int = 0.01,
    dtype: torch.dtype = torch.float32,
    device: random.Device = None,
) -> Start:
    r"""Begin from independent normal noise.

    Args:
        shape: of the image, (C,\*S).
        mean: of the noise, such as the middle of the data's range.
        sigma: its standard deviation.
        dtype: of the image.
        device: of the image.

    Example:
        >>> noise((1, 4), sigma=0)(3).tolist()
        [[0.0, 0.0, 0.0, 0.0]]
    """
    width, size = check.non_negative("dreams.noise", "sigma", sigma), tuple(shape)
    return lambda key: mean + width * random.normal(key, size, dtype=dtype, device=device)


def uniform(
    shape: Sequence[int],
    *,
    low: float | int,
    high: float | int,
    dtype: torch.dtype = torch.float32,
    device: random.Device = None,
) -> Start:
    r"""Begin from independent uniform noise.

    Args:
        shape: of the image, (C,\*S).
        low: the smallest value.
        high: the largest one.
        dtype: of the image.
        device: of the image.

    Example:
        >>> uniform((1, 2), low=3, high=3)(0).tolist()
        [[3.0, 3.0]]
    """
    size = tuple(shape)
    return lambda key: low + (high - low) * random.uniform(key, size, dtype=dtype, device=device)


def phases(spectrum: Tensor) -> Start:
    r"""Begin from the magnitudes of a spectrum, with uniform phases: the start of MACO.

    Args:
        spectrum: from ``dreams.spectrum``, (C,\*S).

    Example:
        >>> magnitude = spectra.spectrum([torch.tensor([[1.0, 2.0, 0.0, 5.0]])])
        >>> spectra.spectrum_residual(phases(magnitude)(7), magnitude).item() < 1e-5
        True
    """
    axes = tuple(range(1, spectrum.ndim))

    def start(key: random.Key) -> Tensor:
        # White noise has independent phases, uniform, and real coefficients of either sign where they must be.
        white = spectra.transformed(random.normal(key, tuple(spectrum.shape), device=spectrum.device))
        size = white.abs()
        turns = torch.where(spectra.at_zero(spectrum), 1, white / torch.where(size > 0, size, 1))
        return torch.fft.ifftn(spectrum * turns, dim=axes, norm="ortho").real.to(spectrum.dtype)

    return start
