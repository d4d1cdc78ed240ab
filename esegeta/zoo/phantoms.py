"""Volumes of which everything is known: drawn vessels in a drawn head."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esegeta.engine import check

Floats = np.ndarray


class Phantom(NamedTuple):
    """An image and what is in it.

    data: float32 of shape ``(1, *S)``; mask: bool of shape ``S``, True inside of vessels.
    """

    data: Tensor
    mask: Tensor


def vessel_phantom(key: int = 0, size: int = 64) -> Phantom:
    """Draw vessels of many radii in a head, as an angiogram without contrast agent shows them.

    Trees of tubes branch and get thinner, from 2.6 voxels of radius to 0.8. The brain around them is mottled,
    a scalp as bright as small vessels lies around it; a bias field, noise as in magnitude images. A voxel is
    in the mask if more than half of it lies in a tube. Then the image is divided by its 99.9th percentile.

    Args:
        key: the same key gives the same phantom.
        size: voxels a side, 32 or more.

    Returns:
        The image and its mask.

    Example:
        >>> x, mask = vessel_phantom(key=3)
        >>> tuple(x.shape), tuple(mask.shape)
        ((1, 64, 64, 64), (64, 64, 64))
        >>> bool(x[0][mask].mean() > 1.5 * x[0][~mask].mean())
        True
    """
    check.positive_count("vessel_phantom", "size", size)
    if size < 32:
        advice = "Smaller heads hold no vessels"
        raise check.refused("vessel_phantom", "size to be 32 or more", str(size), advice)
    rng = np.random.default_rng([key, size])
    scale = size / 64
    at = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij"))
    radii = rng.uniform(0.78, 0.9, 3)[:, None, None, None]
    inside = np.sqrt(((at / radii) ** 2).sum(0))
    brain = inside < 0.9
    scalp = (inside > 0.97) & (inside < 1.03)

    vessels = np.zeros((size,) * 3)
    for point, radius in _trees(rng, radii.ravel() * 0.82):
        _paint(vessels, (point + 1) / 2 * (size - 1), radius * scale)

    image = 0.32 * brain + 0.05 + 0.09 * brain * _smooth(rng, size, 8)
    image += scalp * (0.55 + 0.1 * _smooth(rng, size, 6))
    bright = 0.95 + 0.15 * _smooth(rng, size, 5)
    image += vessels * (bright - image)
    image *= np.exp(0.25 * _smooth(rng, size, 2))
    level = rng.uniform(0.05, 0.09)
    noise = level * rng.standard_normal((2, size, size, size))
    image = np.sqrt((image + noise[0]) ** 2 + noise[1] ** 2)
    data = torch.from_numpy((image / np.quantile(image, 0.999)).astype(np.float32))[None]
    return Phantom(data, torch.from_numpy(vessels > 0.5))


def _trees(rng: np.random.Generator, radii: Floats) -> Iterator[tuple[Floats, float]]:
    """Points along the middle of tubes, in coordinates from -1 to 1, each with its radius in voxels of 64."""
    for _ in range(rng.integers(4, 7)):
        start = np.add(rng.normal(0, 0.25, 3), (0, 0, -0.35))
        branches = [(start, _unit(rng.standard_normal(3)), rng.uniform(1.6, 2.6))]
        while branches:
            point, heading, radius = branches.pop()
            for _ in range(rng.integers(14, 40)):
                heading = _unit(heading + 0.2 * rng.standard_normal(3))
                ahead = point + 0.025 * heading
                if ((ahead / radii) ** 2).sum() > 1:  # at the edge of the brain: back inwards
                    heading = _unit(heading - 1.6 * _unit(point / radii**2))
                    ahead = point + 0.025 * heading
                yield point, radius
                point = ahead
            for share in rng.uniform(0.6, 0.86, 2):  # two thinner ones go on
                if radius * share >= 0.8:
                    branches.append((point, _unit(heading + 0.8 * rng.standard_normal(3)), radius * share))


def _unit(vector: Floats) -> Floats:
    return vector / np.linalg.norm(vector)


def _paint(volume: Floats, centre: Floats, radius: float) -> None:
    """Put a ball into the volume, in place: the share of each voxel that lies in it, about."""
    low = np.maximum(np.floor(centre - radius - 1).astype(int), 0)
    high = np.minimum(np.ceil(centre + radius + 2).astype(int), volume.shape[0])
    if (low >= high).any():
        return
    axes = [np.arange(a, b) - c for a, b, c in zip(low, high, centre, strict=True)]
    away = np.sqrt(axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    volume[box] = np.maximum(volume[box], np.clip(radius + 0.5 - away, 0, 1))


def _smooth(rng: np.random.Generator, size: int, waves: int) -> Floats:
    """A smooth random field of mean 0 and deviation 1: noise on ``waves + 2`` nodes a side, interpolated."""
    nodes = torch.from_numpy(rng.standard_normal((waves + 2,) * 3))[None, None]
    field = torch.nn.functional.interpolate(nodes, (size,) * 3, mode="trilinear", align_corners=True)[0, 0]
    return ((field - field.mean()) / field.std()).numpy()
