"""A real head and its brain mask."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).with_name("data")


class Volume(NamedTuple):
    """An image and where it lies.

    data: float32 of shape ``(1, *S)``, divided by its maximum; affine: from voxel indices to mm, 4 x 4;
    spacing: the size of a voxel along each axis of ``S``, in mm.
    """

    data: Tensor
    affine: np.ndarray
    spacing: tuple[float, float, float]


def head() -> Volume:
    """Load a T1-weighted MRI of one person's head, the average of 27 scans (Colin 27), 128 voxels a side.

    Returns:
        The volume; see ``esegeta/zoo/data/NOTICE`` for its source and terms.

    Example:
        >>> x, affine, spacing = head()
        >>> tuple(x.shape), x.min().item(), x.max().item()
        ((1, 128, 128, 128), 0.0, 1.0)
        >>> [round(mm, 3) for mm in spacing]
        [1.417, 1.701, 1.417]

    Reference:
        Holmes et al. 1998, Enhancement of MR images using registration for signal averaging.
    """
    values, affine = _read("colin27_t1_128.nii.gz")
    data = torch.from_numpy(values.astype(np.float32))[None]
    x, y, z = (float(size) for size in np.linalg.norm(affine[:3, :3], axis=0))
    return Volume(data / data.max(), affine, (x, y, z))


def brain_mask() -> Tensor:
    """Return the brain in ``head()``: True inside.

    Returns:
        A bool tensor of shape ``(128, 128, 128)``, on the grid of the head.

    Example:
        >>> brain_mask().sum().item()
        508173
    """
    values, _ = _read("colin27_brain_128.nii.gz")
    return torch.from_numpy(values > 0)


def _read(name: str) -> tuple[np.ndarray, np.ndarray]:
    from nibabel.nifti1 import Nifti1Image  # here, so that importing esegeta does not wait for it

    image = Nifti1Image.from_filename(DATA / name)
    return np.ascontiguousarray(image.dataobj), image.affine
