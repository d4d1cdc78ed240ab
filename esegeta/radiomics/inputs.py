"""What users give: an image, one or two masks, a spacing."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from esegeta.engine import check

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


def _array(where: str, name: str, value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray):
        advice = "Take it from a file with esegeta.run or nibabel"
        raise check.refused_type(where, f"{name} as a tensor or an array", check.describe(value), advice)
    return value


def _without_channel(where: str, name: str, value: NDArray[Any], axes: int | None) -> NDArray[Any]:
    """Drop the one channel of (1,*S); more than one are refused."""
    channel = value.ndim == axes + 1 if axes is not None else value.ndim > 2 and value.shape[0] == 1
    if channel or value.ndim == 4:
        if value.shape[0] != 1:
            advice = "Take one channel, for example image[0]"
            raise check.refused(where, f"one channel in {name}", f"shape {value.shape}", advice)
        value = value[0]
    if value.ndim not in ((2, 3) if axes is None else (axes,)):
        expected = f"{name} with two or three axes" if axes is None else f"{name} with {axes} axes"
        raise check.refused(where, expected, f"shape {value.shape}", "Take one image")
    return value


def arrays(where: str, image: Any, mask: Any, spacing: Any) -> tuple[Array, tuple[Mask, Mask], Array]:
    """Check an image (*S) or (1,*S), a mask or a pair of masks (*S), and the spacing.

    Returns:
        The image in double precision, the mask of the shape, that of the intensities, mm per voxel.
    """
    given = np.atleast_1d(np.asarray(1.0 if spacing is None else spacing, dtype=np.float64))
    axes = len(given) if given.ndim == 1 and len(given) > 1 else None
    data = _without_channel(where, "image", _array(where, "image", image), axes)
    lengths = np.broadcast_to(given, (data.ndim,)).copy()
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        advice = "Take it from the affine, for example header.get_zooms()[:3] of nibabel"
        raise check.refused(where, "spacing of finite lengths > 0", repr(spacing), advice)
    masks = []
    for one in mask if isinstance(mask, tuple) else (mask, mask):
        found = _without_channel(where, "mask", _array(where, "mask", one), data.ndim)
        if found.shape != data.shape:
            expected = f"a mask of the image's shape {data.shape}"
            advice = "Resample it to the image's grid first"
            raise check.refused(where, expected, f"{found.shape}", advice)
        if found.dtype != bool:
            if not np.isin(found, (0, 1)).all():
                advice = "Choose a label, for example mask == 1"
                raise check.refused(where, "a mask of 0 and 1", "other values", advice)
            found = found == 1
        masks.append(found)
    data = data.astype(np.float64)
    if not np.isfinite(data[masks[1]]).all():
        raise check.refused(
            where, "finite intensities in the mask", "NaN or infinity", "Leave them out of the mask"
        )
    return data, (masks[0], masks[1] & masks[0]), lengths


def cropped(image: Array, shape: Mask, counted: Mask) -> tuple[Array, Mask, Mask]:
    """Cut an image and its masks to the box of the shape; an empty shape cuts nothing."""
    if not shape.any():
        return image, shape, counted
    around = [
        np.nonzero(shape.any(axis=tuple(a for a in range(shape.ndim) if a != axis)))[0]
        for axis in range(shape.ndim)
    ]
    box = tuple(slice(int(where[0]), int(where[-1]) + 1) for where in around)
    return image[box], shape[box], counted[box]
