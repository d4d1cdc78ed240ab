"""A volume on a coarser grid, written for the tests: what the preprocessing of runs is compared with."""

import numpy as np
import torch
from torch import Tensor


def regrid(values: Tensor, size: int) -> Tensor:
    """The whole of a volume ``(..., n, n, n)`` on ``size`` voxels a side: each is the mean of what it covers.

    >>> regrid(torch.tensor([0., 2., 4., 6.]).expand(1, 4, 4, 4), 2)[0, 0, 0].tolist()
    [1.0, 5.0]
    """
    for _ in range(3):
        n = values.shape[-3]
        edge = torch.arange(size + 1, dtype=values.dtype) * (n / size)
        voxel = torch.arange(n, dtype=values.dtype)
        overlap = torch.minimum(edge[1:, None], voxel + 1) - torch.maximum(edge[:-1, None], voxel)
        # The contracted axis moves to the end: after one turn for each, the axes are back in order.
        values = torch.tensordot(values, overlap.clamp(min=0) * (size / n), dims=([-3], [1]))
    return values


def regrid_affine(affine: np.ndarray, ratio: float) -> np.ndarray:
    """The affine of a grid whose voxels are ``ratio`` times as large and cover the same space.

    >>> regrid_affine(np.eye(4), 2.0)[0].tolist()
    [2.0, 0.0, 0.0, 0.5]
    """
    step = np.diag([ratio, ratio, ratio, 1.0])
    step[:3, 3] = (ratio - 1) / 2
    return affine @ step
