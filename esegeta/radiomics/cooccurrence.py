r"""Grey level co-occurrence: how often two levels lie side by side (GLCM).

For each direction the matrix counts the pairs of neighbours, both ways. Features are averaged over matrices of
directions and slices, or computed of matrices that were added up, as the name of an aggregation says.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from esegeta.radiomics.levels import Grid, Levels, grid_of, offsets
from esegeta.radiomics.tables import entropy, mean_of

Array = NDArray[np.floating[Any]]

TAG = "cm"
NAMES = {
    "joint_max": "joint_maximum",
    "joint_avg": "joint_average",
    "joint_var": "joint_variance",
    "joint_entr": "joint_entropy",
    "diff_avg": "difference_average",
    "diff_var": "difference_variance",
    "diff_entr": "difference_entropy",
    "sum_avg": "sum_average",
    "sum_var": "sum_variance",
    "sum_entr": "sum_entropy",
    "energy": "angular_second_moment",
    "contrast": "contrast",
    "dissimilarity": "dissimilarity",
    "inv_diff": "inverse_difference",
    "inv_diff_norm": "normalised_inverse_difference",
    "inv_diff_mom": "inverse_difference_moment",
    "inv_diff_mom_norm": "normalised_inverse_difference_moment",
    "inv_var": "inverse_variance",
    "corr": "correlation",
    "auto_corr": "autocorrelation",
    "clust_tend": "cluster_tendency",
    "clust_shade": "cluster_shade",
    "clust_prom": "cluster_prominence",
    "info_corr1": "information_correlation_1",
    "info_corr2": "information_correlation_2",
}


def pairs(grid: Grid, offset: tuple[int, ...], where: NDArray[np.int64], count: int) -> Array:
    """Count the pairs of levels that one step divides, both ways: (count, count)."""
    first, second = grid.flat[where], grid.flat[where + grid.step(offset)]
    both = second > 0
    found = np.bincount((first[both] - 1) * count + second[both] - 1, minlength=count * count)
    matrix = found.reshape(count, count).astype(np.float64)
    return matrix + matrix.T


def of_matrix(matrix: Array) -> dict[str, float]:
    """Compute the features of one matrix; NaN where it is empty or a feature is undefined."""
    total, count = matrix.sum(), len(matrix)
    if not total:
        return dict.fromkeys(NAMES, float("nan"))
    p = matrix / total
    i = np.arange(1.0, count + 1)
    rows, columns = i[:, None], i[None, :]
    px = p.sum(1)
    mean = float((i * px).sum())
    variance = float(((i - mean) ** 2 * px).sum())
    apart = np.abs(rows - columns)
    indices = np.arange(count)
    differences: Array = np.bincount(np.abs(indices[:, None] - indices).reshape(-1), p.reshape(-1)).astype(
        float
    )
    sums: Array = np.bincount((indices[:, None] + indices).reshape(-1), p.reshape(-1)).astype(float)
    k, s = np.arange(float(len(differences))), np.arange(2.0, len(sums) + 2)
    difference, total_mean = float((k * differences).sum()), float((s * sums).sum())
    together = rows + columns - 2 * mean
    hxy, hx = entropy(p.reshape(-1)), entropy(px)
    independent = np.outer(px, px)
    known = p > 0
    hxy1 = float(-(p[known] * np.log2(independent[known])).sum())
    hxy2 = entropy(independent.reshape(-1))
    product = float((rows * columns * p).sum())
    far = apart > 0
    values = (
        p.max(),
        mean,
        variance,
        hxy,
        difference,
        ((k - difference) ** 2 * differences).sum(),
        entropy(differences),
        total_mean,
        ((s - total_mean) ** 2 * sums).sum(),
        entropy(sums),
        (p**2).sum(),
        (apart**2 * p).sum(),
        (apart * p).sum(),
        (p / (1 + apart)).sum(),
        (p / (1 + apart / count)).sum(),
        (p / (1 + apart**2)).sum(),
        (p / (1 + apart**2 / count**2)).sum(),
        (p[far] / apart[far] ** 2).sum(),
        (product - mean**2) / variance if variance > 0 else 1.0,
        product,
        (together**2 * p).sum(),
        (together**3 * p).sum(),
        (together**4 * p).sum(),
        (hxy - hxy1) / hx if hx > 0 else float("nan"),
        np.sqrt(max(0.0, 1 - np.exp(-2 * (hxy2 - hxy)))),
    )
    return {name: float(value) for name, value in zip(NAMES, values, strict=True)}


def correlation_limit(matrix: Array) -> float:
    """Return the largest correlation that functions of the two levels can have (MCC); 1 for a single level.

    It is the root of the second largest eigenvalue of the chances to come from a level back to it in two steps.
    """
    p = matrix / matrix.sum()
    present = p.sum(1) > 0
    p = p[np.ix_(present, present)]
    if len(p) < 2:
        return 1.0
    root = np.sqrt(p.sum(1))
    values = np.linalg.svd(p / np.outer(root, root), compute_uv=False)
    return float(values[1])


def matrices(levels: Levels, slice_axis: int) -> dict[str, list[Array]]:
    """Count pairs for every aggregation: name of the aggregation to the matrices whose features are averaged."""
    grid = grid_of(levels, slice_axis)
    axes, count = levels.image.ndim, max(levels.number, 1)
    solid = [pairs(grid, offset, grid.inside, count) for offset in offsets(axes)]
    if axes == 2:
        return {"2D_avg": solid, "2D_comb": [np.sum(solid, axis=0)]}
    by_slice = [
        [
            pairs(grid, offset, grid.inside[grid.slices == number], count)
            for offset in offsets(axes, slice_axis % axes)
        ]
        for number in np.unique(grid.slices)
    ]
    by_direction = [np.sum(found, axis=0) for found in zip(*by_slice, strict=True)]
    return {
        "2D_avg": [matrix for found in by_slice for matrix in found],
        "2D_comb": [np.sum(found, axis=0) for found in by_slice],
        "2_5D_avg": by_direction,
        "2_5D_comb": [np.sum(by_direction, axis=0)],
        "3D_avg": solid,
        "3D_comb": [np.sum(solid, axis=0)],
    }


def features(levels: Levels, slice_axis: int) -> dict[str, dict[str, float]]:
    """Compute the features for every aggregation: name of the aggregation to features."""
    none = dict.fromkeys(NAMES, float("nan"))
    found = matrices(levels, slice_axis)
    return {
        name: mean_of([of_matrix(np.asarray(m)) for m in kind if np.ndim(m)]) or none
        for name, kind in found.items()
    }
