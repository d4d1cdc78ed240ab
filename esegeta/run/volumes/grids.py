"""Arithmetic of grids: an array ``(C,*S)`` and the affine that says where its voxels lie in mm."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse

from esegeta.run.volumes.reading import Array

SIDES = ("RL", "AP", "SI")
MOST_VOXELS = 2**31  # more than any scanner makes: a mistake in the units


def codes(affine: Array) -> list[str]:
    """Return for each column the side to which it rises; each pair of sides is given to one column.

    Of the six ways to pair axes with sides the one with the largest sum of squared cosines is taken.

    >>> codes(np.diag([-1.0, 2.0, 1.0, 1.0]))
    ['L', 'A', 'S']
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    best = max(
        itertools.permutations(range(3)), key=lambda p: sum(directions[p[i], i] ** 2 for i in range(3))
    )
    return [SIDES[side][0 if directions[side, axis] > 0 else 1] for axis, side in enumerate(best)]


def turned(data: Array, affine: Array, order: Sequence[int], flips: Sequence[int]) -> tuple[Array, Array]:
    """Permute axes, so that axis i of the result is axis ``order[i]`` of the data, then reverse some."""
    axes = len(order)
    data = data.transpose([0, *(1 + i for i in order)])
    affine = affine[:, [*order, *range(axes, 4)]].copy()
    for axis in flips:
        affine[:, 3] += affine[:, axis] * (data.shape[1 + axis] - 1)
        affine[:, axis] *= -1
    return np.flip(data, tuple(1 + axis for axis in flips)), affine


def shifted(affine: Array, start: Sequence[int | float]) -> Array:
    """Return the affine of a grid that begins at another index.

    >>> shifted(np.diag([2.0, 1.0, 1.0, 1.0]), [3])[0].tolist()
    [2.0, 0.0, 0.0, 6.0]
    """
    affine = affine.copy()
    affine[:3, 3] += affine[:3, : len(start)] @ np.asarray(start, dtype=np.float64)
    return affine


def centred(affine: Array, old: Sequence[int], new: Sequence[int], ratio: Sequence[float]) -> Array:
    """Return the affine of a grid around the same centre, whose steps are ``ratio`` times as long.

    >>> centred(np.eye(4), [4], [2], [2.0])[0].tolist()
    [2.0, 0.0, 0.0, 0.5]
    """
    start = [(n - 1) / 2 - (m - 1) / 2 * r for n, m, r in zip(old, new, ratio, strict=True)]
    affine = shifted(affine, start)
    affine[:3, : len(ratio)] *= ratio
    return affine


def sliced(affine: Array, axis: int, index: int) -> Array:
    """Return the affine of one plane: its axis comes last, where the index is always 0."""
    moved = shifted(affine, [index if i == axis else 0 for i in range(3)])
    return moved[:, [*(i for i in range(3) if i != axis), axis, 3]]


def weights(n: int, m: int, ratio: float, how: str) -> Any:
    r"""Return the sparse matrix (m, n) that resamples an axis of n voxels to m around the same centre.

    Voxel k of the new grid, r times as long as the old ones, has its centre at

    .. math:: c_k = \frac{n-1}{2} + r \left(k - \frac{m-1}{2}\right)

    and is the mean of what it covers where it is larger, :math:`W_{kj} = |V_k \cap U_j| / |V_k|`, voxels being boxes;
    else it is interpolated linearly, :math:`W_{kj} = \max(0, 1 - |c_k - j|)`. The two agree at r = 1. Rows sum to 1;
    beyond the border the last value goes on. "nearest" has one 1 in each row.

    >>> weights(5, 2, 2.5, "linear").toarray().round(4).tolist()
    [[0.4, 0.4, 0.2, 0.0, 0.0], [0.0, 0.0, 0.2, 0.4, 0.4]]
    >>> weights(2, 4, 0.5, "linear").toarray().tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    centre = (n - 1) / 2 + ratio * (np.arange(m) - (m - 1) / 2)
    if how == "nearest":
        # Rounding must not decide about centres that lie right between two voxels.
        nearest = np.floor(centre + 0.5 + 1e-9).astype(np.int64).clip(0, n - 1)
        return scipy.sparse.csr_array((np.ones(m), (np.arange(m), nearest)), shape=(m, n))
    half = max(1.0, ratio) / 2
    far = min(math.ceil(half + 0.5), n)
    columns = np.floor(centre + 0.5).astype(np.int64)[:, None] + np.arange(-far, far + 1)
    away = np.abs(columns - centre[:, None])
    # A box of twice the half and one of length 1 have this in common; both of length 1 make the hat of interpolation.
    share = (half + 0.5 - away).clip(0, 1)
    share[(columns < 0) | (columns >= n)] = 0
    share /= share.sum(1, keepdims=True)
    rows = np.broadcast_to(np.arange(m)[:, None], columns.shape)
    used = share > 0
    return scipy.sparse.csr_array((share[used], (rows[used], columns[used])), shape=(m, n))


def weighted(data: Array, matrices: Sequence[Any]) -> Array:
    """Apply a matrix to each axis but the first."""
    for axis, matrix in enumerate(matrices, start=1):
        first = np.moveaxis(data, axis, 0)
        mixed = matrix.astype(data.dtype) @ np.ascontiguousarray(first).reshape(len(first), -1)
        data = np.moveaxis(mixed.reshape(matrix.shape[0], *first.shape[1:]), 0, axis)
    return data


def window(data: Array, box: Sequence[tuple[int, int]], fill: float) -> Array:
    """Return the voxels of a box, which may reach beyond the data.

    >>> window(np.array([[1.0, 2.0, 3.0]]), [(-1, 2)], 0.0).tolist()
    [[0.0, 1.0, 2.0]]
    """
    shape = data.shape[1:]
    result = np.full((len(data), *(stop - start for start, stop in box)), fill, dtype=data.dtype)
    source, target = [slice(None)], [slice(None)]
    for (start, stop), n in zip(box, shape, strict=True):
        low, high = max(0, start), max(max(0, start), min(n, stop))
        source.append(slice(low, high))
        target.append(slice(low - start, high - start))
    result[tuple(target)] = data[tuple(source)]
    return result
