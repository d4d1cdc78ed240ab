"""Grey level run lengths: how far one goes in a direction within one level (GLRLM)."""

import numpy as np
from numpy.typing import NDArray

from esegeta.radiomics.levels import Grid, Levels, grid_of, offsets
from esegeta.radiomics.tables import Events, averaged, merged

TAG = "rlm"
NAMES = {
    "sre": "short_run_emphasis",
    "lre": "long_run_emphasis",
    "lgre": "low_level_run_emphasis",
    "hgre": "high_level_run_emphasis",
    "srlge": "short_run_low_level_emphasis",
    "srhge": "short_run_high_level_emphasis",
    "lrlge": "long_run_low_level_emphasis",
    "lrhge": "long_run_high_level_emphasis",
    "glnu": "level_non_uniformity",
    "glnu_norm": "normalised_level_non_uniformity",
    "rlnu": "run_length_non_uniformity",
    "rlnu_norm": "normalised_run_length_non_uniformity",
    "r_perc": "run_percentage",
    "gl_var": "level_variance",
    "rl_var": "run_length_variance",
    "rl_entr": "run_entropy",
}


def runs(grid: Grid, offset: tuple[int, ...], where: NDArray[np.int64]) -> Events:
    """Find the runs along one direction: their levels and lengths in voxels."""
    step = grid.step(offset)
    starts = where[grid.flat[where - step] != grid.flat[where]]
    levels = grid.flat[starts]
    lengths = np.ones(len(starts), dtype=np.int64)
    going, at = np.arange(len(starts)), starts
    while len(going):
        at = at + step
        same = grid.flat[at] == levels[going]
        going, at = going[same], at[same]
        lengths[going] += 1
    return Events(levels, lengths, len(where))


def _named(values: dict[str, float]) -> dict[str, float]:
    return dict(zip(NAMES, values.values(), strict=True))


def features(levels: Levels, slice_axis: int) -> dict[str, dict[str, float]]:
    """Compute the features for every aggregation: name of the aggregation to features."""
    grid, axes = grid_of(levels, slice_axis), levels.image.ndim
    if axes == 2:
        parts = [runs(grid, offset, grid.inside) for offset in offsets(2)]
        found = {"2D_avg": averaged(parts), "2D_comb": averaged([merged(parts)])}
        return {name: _named(values) for name, values in found.items()}
    flat = offsets(axes, across=slice_axis % axes)
    by_slice = [
        [runs(grid, offset, grid.inside[grid.slices == number]) for offset in flat]
        for number in np.unique(grid.slices)
    ]
    by_direction = [merged([parts[d] for parts in by_slice]) for d in range(len(flat))]
    solid = [runs(grid, offset, grid.inside) for offset in offsets(axes)]
    found = {
        "2D_avg": averaged([p for parts in by_slice for p in parts]),
        "2D_comb": averaged([merged(parts) for parts in by_slice]),
        "2_5D_avg": averaged(by_direction),
        "2_5D_comb": averaged([merged(by_direction)]),
        "3D_avg": averaged(solid),
        "3D_comb": averaged([merged(solid)]),
    }
    return {name: _named(values) for name, values in found.items()}
