"""Local peaks: the highest mean intensity of a ball of one cubic centimetre (in the plane, a square centimetre)."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

TAG = "loc"
NAMES = {"peak_loc": "local_peak", "peak_glob": "global_peak"}


def radius(axes: int) -> float:
    """Return the radius in mm of a ball of 1 cm^3, or of a disc of 1 cm^2.

    >>> round(radius(3), 2), round(radius(2), 2)
    (6.2, 5.64)
    """
    return 10 * (3 / (4 * math.pi)) ** (1 / 3) if axes == 3 else 10 / math.sqrt(math.pi)


def features(image: Array, mask: Mask, spacing: Array) -> dict[str, float]:
    """Compute the mean around the brightest voxel, and the highest mean around any voxel of a region.

    Voxels outside of the region count in the means; what lies beyond the image does not.
    """
    from scipy import ndimage

    if not mask.any():
        return dict.fromkeys(NAMES, float("nan"))
    far = radius(image.ndim)
    reach = [int(far // s) for s in spacing]
    grid = np.meshgrid(
        *[np.arange(-r, r + 1) * s for r, s in zip(reach, spacing, strict=True)], indexing="ij"
    )
    ball = (sum(g**2 for g in grid) <= far**2).astype(np.float64)
    where = np.argwhere(mask)
    cut = tuple(
        slice(max(0, int(a) - r), int(b) + r + 1)
        for a, b, r in zip(where.min(0), where.max(0), reach, strict=True)
    )
    sums = ndimage.correlate(image[cut], ball, mode="constant")
    means = sums / ndimage.correlate(np.ones_like(image[cut]), ball, mode="constant")
    inside = mask[cut]
    brightest = inside & (image[cut] == image[mask].max())
    return {"peak_loc": float(means[brightest].max()), "peak_glob": float(means[inside].max())}
