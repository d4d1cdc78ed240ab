"""What is done to an image and a mask before features are computed, in the order of the IBSI."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esegeta.engine import check
from esegeta.radiomics.inputs import arrays

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
WHERE = "radiomics.prepare"


@dataclass(frozen=True)
class Prepared:
    """An image, the shape and the voxels whose intensities count, ready for ``features``.

    settings: what was done, in the order in which it was done.
    """

    image: Array
    mask: tuple[Mask, Mask]
    spacing: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def resampled(image: Array, spacing: Sequence[float], to: Sequence[float], order: int) -> Array:
    """Interpolate on a grid of another spacing with the same centre: linear (order 1) or by cubic splines (3).

    The new grid has as many voxels as cover the old one; beyond the outermost voxel centres values continue.

    Example:
        >>> resampled(np.array([[0.0, 2.0, 4.0, 6.0]]), (1.0, 1.0), (1.0, 2.0), 1)
        array([[1., 5.]])
    """
    from scipy import ndimage

    old, new = np.asarray(spacing, float), np.asarray(to, float)
    shape = [max(1, math.ceil(n * a / b - 1e-6)) for n, a, b in zip(image.shape, old, new, strict=True)]
    start = [
        ((n - 1) * a - (m - 1) * b) / 2 / a for n, m, a, b in zip(image.shape, shape, old, new, strict=True)
    ]
    found = ndimage.affine_transform(
        image, np.diag(new / old), offset=start, output_shape=tuple(shape), order=order, mode="nearest"
    )
    return np.asarray(found, dtype=np.float64)


def prepare(
    image: Any,
    mask: Any,
    *,
    spacing: Any = None,
    to: Any = None,
    order: int = 1,
    within: tuple[float, float] | None = None,
    outliers: float | None = None,
) -> Prepared:
    """Resample, then choose the voxels whose intensities count, in the order of the IBSI.

    The image and the mask are interpolated to the spacing ``to`` (the mask linearly, and kept where it is at least
    one half; a whole-numbered image is rounded again), then intensities outside of a range and outliers are left out
    of the mask of intensities. The mask of the shape keeps them.

    Args:
        image: (*S), or (1,*S), with two or three axes.
        mask: the region, of the shape (*S).
        spacing: mm per voxel.
        to: mm per voxel afterwards; None keeps the grid.
        order: of the splines that interpolate the image, 1 is linear, 3 cubic.
        within: the least and the largest intensity that counts.
        outliers: how many standard deviations from the mean an intensity may lie, usually 3.

    Returns:
        What ``features(p.image, p.mask, spacing=p.spacing)`` takes.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 1.0, 2.0, 50.0]])
        >>> prepare(x, x > -1, within=(1, 10)).mask[1].tolist()
        [[False, True, True, False]]
    """
    data, (shape, counted), lengths = arrays(WHERE, image, mask, spacing)
    settings: dict[str, Any] = {"spacing": tuple(lengths.tolist())}
    if to is not None:
        wanted = np.broadcast_to(np.asarray(to, float), (data.ndim,))
        if not (np.isfinite(wanted).all() and (wanted > 0).all()):
            raise check.refused(WHERE, "lengths > 0 in to", repr(to), "Give mm per voxel")
        if isinstance(order, bool) or order not in (0, 1, 2, 3, 4, 5):
            raise check.refused(WHERE, "order from 0 to 5", repr(order), "1 is linear, 3 cubic")
        whole = bool((data == np.round(data)).all())
        data = resampled(data, lengths.tolist(), wanted.tolist(), order)
        data = np.round(data) if whole else data
        shape, counted = (
            resampled(m.astype(float), lengths.tolist(), wanted.tolist(), 1) >= 0.5 for m in (shape, counted)
        )
        lengths = np.array(wanted)
        settings |= {"resampled_to": tuple(wanted.tolist()), "order": order, "rounded": whole}
    if within is not None:
        low, high = within
        if not low <= high:
            raise check.refused(WHERE, "within=(least, largest)", repr(within), "Change it")
        counted = counted & (data >= low) & (data <= high)
        settings["within"] = (float(low), float(high))
    if outliers is not None:
        if not outliers > 0:
            raise check.refused(WHERE, "outliers > 0", repr(outliers), "3 is usual")
        values = data[counted]
        if len(values):
            counted = counted & (np.abs(data - values.mean()) <= outliers * values.std())
        settings["outliers"] = float(outliers)
    settings |= {"voxels": int(shape.sum()), "voxels_counted": int(counted.sum())}
    return Prepared(data, (shape, counted), tuple(lengths.tolist()), settings)
