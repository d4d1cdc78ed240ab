"""A voxel and its neighbours: differences to their mean (NGTDM), and how many have the same level (NGLDM)."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esegeta.radiomics.levels import Levels, grid_of, offsets
from esegeta.radiomics.tables import Events, emphases, mean_of

Array = NDArray[np.floating[Any]]
Whole = NDArray[np.int64]

TONE_TAG, DEPENDENCE_TAG = "ngt", "ngl"
TONE_NAMES = {name: name for name in ("coarseness", "contrast", "busyness", "complexity", "strength")}
DEPENDENCE_NAMES = {
    "lde": "low_dependence_emphasis",
    "hde": "high_dependence_emphasis",
    "lgce": "low_level_count_emphasis",
    "hgce": "high_level_count_emphasis",
    "ldlge": "low_dependence_low_level_emphasis",
    "ldhge": "low_dependence_high_level_emphasis",
    "hdlge": "high_dependence_low_level_emphasis",
    "hdhge": "high_dependence_high_level_emphasis",
    "glnu": "level_non_uniformity",
    "glnu_norm": "normalised_level_non_uniformity",
    "dcnu": "dependence_count_non_uniformity",
    "dcnu_norm": "normalised_dependence_count_non_uniformity",
    "dc_perc": "dependence_count_percentage",
    "gl_var": "level_variance",
    "dc_var": "dependence_count_variance",
    "dc_entr": "dependence_count_entropy",
    "dc_energy": "dependence_count_energy",
}
_COARSE = 1e6  # the coarseness of a region without differences


class Around(NamedTuple):
    """For each voxel of a region: its level, how many neighbours it has, their sum, and how many have its level."""

    levels: Whole
    neighbours: Whole
    sums: Whole
    same: Whole
    slices: Whole


def around(levels: Levels, slice_axis: int, flat: bool) -> Around:
    """Look at the neighbours of every voxel, within its slice if flat."""
    grid, axes = grid_of(levels, slice_axis), levels.image.ndim
    own = grid.flat[grid.inside]
    neighbours, sums, same = (np.zeros(len(own), dtype=np.int64) for _ in range(3))
    for offset in offsets(axes, across=slice_axis % axes if flat else None):
        for step in (grid.step(offset), -grid.step(offset)):
            other = grid.flat[grid.inside + step]
            neighbours += other > 0
            sums += other
            same += other == own
    return Around(own, neighbours, sums, same, grid.slices)


def tones(levels: Whole, differences: Array) -> dict[str, float]:
    r"""Compute the five features of differences of voxels to the means of their neighbours.

    With :math:`p_i` the share of level i and :math:`s_i` the sum of its differences.
    """
    count = len(levels)
    if not count:
        return dict.fromkeys(TONE_NAMES, float("nan"))
    present = np.unique(levels)
    numbers = np.bincount(levels)[present]
    p, i = numbers / count, present.astype(np.float64)
    s = np.bincount(levels, differences)[present]
    weighted = float((p * s).sum())
    apart = i[:, None] - i[None, :]
    both, kinds = p[:, None] + p[None, :], len(present)
    spread = np.abs((i * p)[:, None] - (i * p)[None, :]).sum()
    contrast = (
        (np.outer(p, p) * apart**2).sum() * s.sum() / count / (kinds * (kinds - 1)) if kinds > 1 else 0.0
    )
    mixed = (p * s)[:, None] + (p * s)[None, :]
    values = (
        1 / weighted if weighted > 0 else _COARSE,
        contrast,
        weighted / spread if kinds > 1 and spread > 0 else 0.0,
        (np.abs(apart) * mixed / both).sum() / count,
        (both * apart**2).sum() / s.sum() if s.sum() > 0 else 0.0,
    )
    return {name: float(value) for name, value in zip(TONE_NAMES, values, strict=True)}


def _toned(voxels: Around) -> dict[str, float]:
    some = voxels.neighbours > 0
    levels = voxels.levels[some]
    return tones(levels, np.abs(levels - voxels.sums[some] / voxels.neighbours[some]))


def dependences(events: Events) -> dict[str, float]:
    """Compute the features of dependences: what all events have, and the energy of pairs."""
    values = emphases(events)
    if len(events.levels):
        pairs = np.bincount(events.levels * (int(events.sizes.max()) + 1) + events.sizes) / len(events.levels)
        values["energy"] = float((pairs**2).sum())
    else:
        values["energy"] = float("nan")
    return dict(zip(DEPENDENCE_NAMES, values.values(), strict=True))


def _dependent(voxels: Around) -> dict[str, float]:
    return dependences(Events(voxels.levels, voxels.same + 1, len(voxels.levels)))


def features(
    levels: Levels, slice_axis: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Compute features of tones and of dependences for every aggregation."""
    if levels.image.ndim == 2:
        every = around(levels, slice_axis, flat=False)
        return {"2D": _toned(every)}, {"2D": _dependent(every)}
    flat, solid = (around(levels, slice_axis, flat=f) for f in (True, False))
    numbers = np.unique(flat.slices)
    by_slice = [Around(*(part[flat.slices == n] for part in flat)) for n in numbers]
    return (
        {
            "2D": mean_of([_toned(v) for v in by_slice]) or _toned(flat),
            "2_5D": _toned(flat),
            "3D": _toned(solid),
        },
        {
            "2D": mean_of([_dependent(v) for v in by_slice]) or _dependent(flat),
            "2_5D": _dependent(flat),
            "3D": _dependent(solid),
        },
    )
