"""Grey levels: intensities of a region as whole numbers, and the offsets between neighbouring voxels."""

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esegeta.engine import check

Array = NDArray[np.floating[Any]]
Whole = NDArray[np.int64]
Mask = NDArray[np.bool_]
WHERE = "radiomics"


class Levels(NamedTuple):
    """An image in whole levels.

    image: (*S), 1 ... count within the region and 0 outside; number: of levels, absent ones included; centres: the
    intensity that each level stands for, from level 1 on.
    """

    image: Whole
    number: int
    centres: Array


def own(image: Array, mask: Mask) -> Levels:
    """Take an image of positive whole numbers as its own levels.

    >>> own(np.array([2., 5., 9.]), np.array([True, True, False])).image
    array([2, 5, 0])
    """
    values = image[mask]
    if len(values) and (np.any(values != np.round(values)) or values.min() < 1):
        raise check.refused(
            WHERE,
            "an image of whole numbers >= 1, its grey levels",
            f"values from {values.min():.6g} to {values.max():.6g}",
            "Say width= (of a bin, in the image's unit) or number= (of bins)",
        )
    count = int(values.max()) if len(values) else 0
    return Levels(np.where(mask, image, 0).astype(np.int64), count, np.arange(1, count + 1.0))


def fixed_number(image: Array, mask: Mask, number: int) -> Levels:
    """Divide the range of a region into a number of bins of equal width.

    >>> fixed_number(np.array([0., 1., 2., 4.]), np.ones(4, bool), 2).image
    array([1, 1, 2, 2])
    """
    values = image[mask]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    width = (high - low) / number
    inside = np.where(mask, image, low)
    found = np.floor((inside - low) / width) + 1 if width > 0 else np.ones(image.shape)
    found = np.where(mask, np.clip(found, 1, number), 0)
    return Levels(found.astype(np.int64), number, low + (np.arange(number) + 0.5) * width)


def fixed_width(image: Array, mask: Mask, width: float, start: float | None = None) -> Levels:
    """Divide into bins of one width, the first of which begins at a start: the minimum of the region by default.

    >>> fixed_width(np.array([1., 3., 9.]), np.ones(3, bool), 4.0).image
    array([1, 1, 3])
    """
    values = image[mask]
    if start is None:
        start = float(values.min()) if len(values) else 0.0
    inside = np.where(mask, image, start)
    found = np.where(mask, np.floor((inside - start) / width) + 1, 0).astype(np.int64)
    count = int(found.max()) if found.size else 0
    return Levels(found, count, start + (np.arange(count) + 0.5) * width)


def offsets(axes: int, across: int | None = None) -> list[tuple[int, ...]]:
    """List the steps to half of the neighbours of a voxel: the other half is opposite.

    Args:
        axes: of the image.
        across: an axis along which no step goes, so that they stay within its slices.

    Example:
        >>> len(offsets(3)), len(offsets(3, across=2)), offsets(2)
        (13, 4, [(0, 1), (1, -1), (1, 0), (1, 1)])
    """
    steps = itertools.product((-1, 0, 1), repeat=axes)
    return [s for s in steps if s > (0,) * axes and (across is None or s[across] == 0)]


class Grid(NamedTuple):
    """Levels with a border of zeros, flat, so that a step to a neighbour is one number to add."""

    flat: Whole
    inside: Whole  # positions within the region
    strides: tuple[int, ...]
    slices: Whole  # for each position within the region, the slice that it lies in

    def step(self, offset: tuple[int, ...]) -> int:
        """Return what to add to a position to take a step."""
        return sum(o * s for o, s in zip(offset, self.strides, strict=True))


def grid_of(levels: Levels, slice_axis: int) -> Grid:
    """Lay out levels so that neighbours are found by one addition, cut to the box of the region."""
    found = np.nonzero(levels.image)
    box = tuple(slice(int(w.min()), int(w.max()) + 1) for w in found) if len(found[0]) else ...
    padded = np.pad(levels.image[box], 1)
    strides = tuple(int(np.prod(padded.shape[axis + 1 :])) for axis in range(padded.ndim))
    flat = np.ascontiguousarray(padded).reshape(-1)
    inside = np.nonzero(flat)[0]
    along = slice_axis % padded.ndim
    slices = inside // strides[along] % padded.shape[along]
    return Grid(flat, inside, strides, slices)
