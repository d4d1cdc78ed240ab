"""Zones: connected voxels of one level, by their size (GLSZM) and by their distance to the border (GLDZM)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from esegeta.radiomics.levels import Levels, Mask, grid_of, offsets
from esegeta.radiomics.tables import Events, averaged

SIZE_TAG, DISTANCE_TAG = "szm", "dzm"
SIZE_NAMES = {
    "sze": "small_zone_emphasis",
    "lze": "large_zone_emphasis",
    "lgze": "low_level_zone_emphasis",
    "hgze": "high_level_zone_emphasis",
    "szlge": "small_zone_low_level_emphasis",
    "szhge": "small_zone_high_level_emphasis",
    "lzlge": "large_zone_low_level_emphasis",
    "lzhge": "large_zone_high_level_emphasis",
    "glnu": "level_non_uniformity",
    "glnu_norm": "normalised_level_non_uniformity",
    "zsnu": "zone_size_non_uniformity",
    "zsnu_norm": "normalised_zone_size_non_uniformity",
    "z_perc": "zone_percentage",
    "gl_var": "level_variance",
    "zs_var": "zone_size_variance",
    "zs_entr": "zone_size_entropy",
}
DISTANCE_NAMES = {
    "sde": "small_distance_emphasis",
    "lde": "large_distance_emphasis",
    "lgze": "low_level_zone_emphasis",
    "hgze": "high_level_zone_emphasis",
    "sdlge": "small_distance_low_level_emphasis",
    "sdhge": "small_distance_high_level_emphasis",
    "ldlge": "large_distance_low_level_emphasis",
    "ldhge": "large_distance_high_level_emphasis",
    "glnu": "level_non_uniformity",
    "glnu_norm": "normalised_level_non_uniformity",
    "zdnu": "zone_distance_non_uniformity",
    "zdnu_norm": "normalised_zone_distance_non_uniformity",
    "z_perc": "zone_percentage",
    "gl_var": "level_variance",
    "zd_var": "zone_distance_variance",
    "zd_entr": "zone_distance_entropy",
}


class Zones(NamedTuple):
    """Zones of a region. slices: where each lies, if zones are flat; voxels: of the region in each slice."""

    levels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    distances: NDArray[np.int64]
    slices: NDArray[np.int64]
    voxels: dict[int, int]


def zones(levels: Levels, mask: Mask, slice_axis: int, flat: bool) -> Zones:
    """Find zones, connected through faces, edges and corners; flat ones stay within a slice.

    The distance of a zone is the number of faces between its nearest voxel and the outside of ``mask``.
    """
    from scipy import ndimage, sparse

    grid, axes = grid_of(levels, slice_axis), levels.image.ndim
    along = slice_axis % axes if flat else None
    position = np.full(len(grid.flat), -1)
    position[grid.inside] = np.arange(len(grid.inside))
    first, second = [], []
    for offset in offsets(axes, across=along):
        other = grid.inside + grid.step(offset)
        same = grid.flat[other] == grid.flat[grid.inside]
        first.append(np.nonzero(same)[0])
        second.append(position[other[same]])
    rows, columns = np.concatenate(first), np.concatenate(second)
    graph = sparse.coo_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(len(grid.inside),) * 2)
    count, labels = sparse.csgraph.connected_components(graph, directed=False)
    cross = ndimage.generate_binary_structure(axes, 1)
    if along is not None:
        cross = np.where(np.arange(3).reshape([-1 if a == along else 1 for a in range(axes)]) == 1, cross, 0)
    depth = _depth(mask, along)[levels.image > 0]
    distances = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(distances, labels, depth)
    one = np.zeros(count, dtype=np.int64)
    one[labels] = np.arange(len(labels))  # any voxel of the zone
    return Zones(
        grid.flat[grid.inside[one]],
        np.bincount(labels, minlength=count),
        distances,
        grid.slices[one],
        {int(n): int(v) for n, v in zip(*np.unique(grid.slices, return_counts=True), strict=True)},
    )


def _depth(mask: Mask, along: int | None) -> NDArray[np.int64]:
    """How many faces lie between each voxel and the outside of a mask, within its slice along an axis."""
    from scipy import ndimage

    padded = np.pad(mask, 1)
    if along is None:
        found = ndimage.distance_transform_cdt(padded, metric="taxicab")
    else:
        parts = [
            ndimage.distance_transform_cdt(part, metric="taxicab") for part in np.moveaxis(padded, along, 0)
        ]
        found = np.moveaxis(np.stack(parts), 0, along)
    return found[(slice(1, -1),) * mask.ndim].astype(np.int64)


def features(
    levels: Levels, mask: Mask, slice_axis: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Compute features by size and by distance for every aggregation.

    Args:
        levels: of the region whose intensities count.
        mask: the object whose border distances are measured from.
        slice_axis: the axis across the slices of flat zones.
    """
    if levels.image.ndim == 2:
        parts = {"2D": [_as_one(zones(levels, mask, slice_axis, flat=False))]}
    else:
        flat, solid = (zones(levels, mask, slice_axis, flat=f) for f in (True, False))
        parts = {"2D": _by_slice(flat), "2_5D": [_as_one(flat)], "3D": [_as_one(solid)]}
    of_sizes = {name: _named(found, "sizes", SIZE_NAMES) for name, found in parts.items()}
    return of_sizes, {name: _named(found, "distances", DISTANCE_NAMES) for name, found in parts.items()}


def _as_one(found: Zones) -> Zones:
    return found._replace(voxels={0: sum(found.voxels.values())})


def _by_slice(found: Zones) -> list[Zones]:
    parts = []
    for number, voxels in found.voxels.items():
        here = found.slices == number
        parts.append(
            Zones(
                found.levels[here],
                found.sizes[here],
                found.distances[here],
                found.slices[here],
                {number: voxels},
            )
        )
    return parts


def _named(parts: list[Zones], which: str, names: dict[str, str]) -> dict[str, float]:
    """Average features over parts of a region."""
    events = [Events(part.levels, getattr(part, which), sum(part.voxels.values())) for part in parts]
    return dict(zip(names, averaged(events).values(), strict=True))
