"""What is counted of an image with few levels: features that families of matrices share.

Runs, zones, distances and dependences are all lists of events, each with a grey level and a size. A matrix of counts
would hold the same; sums over it are means over events.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Whole = NDArray[np.int64]


class Events(NamedTuple):
    """Events of one kind. voxels: how many voxels there were for them, for the share of events in voxels."""

    levels: Whole
    sizes: Whole
    voxels: int


def merged(parts: list[Events]) -> Events:
    """Return the events of several slices or directions as one list."""
    none = np.zeros(0, dtype=np.int64)
    return Events(
        np.concatenate([none, *(p.levels for p in parts)]),
        np.concatenate([none, *(p.sizes for p in parts)]),
        sum(p.voxels for p in parts),
    )


def entropy(p: NDArray[np.floating[Any]]) -> float:
    """Return the entropy in bits of probabilities.

    >>> entropy(np.array([0.5, 0.25, 0.25, 0.0]))
    1.5
    """
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def emphases(events: Events) -> dict[str, float]:
    r"""Compute the sixteen features of events, in the order of the families' tables of names.

    With N events of level i and size j: :math:`\overline{j^{-2}}, \overline{j^2}, \overline{i^{-2}}, \overline{i^2}`,
    the four products of these, the non-uniformities :math:`\sum_i n_i^2 / N`, the share of events in voxels,
    variances and the entropy of the pairs.
    """
    names = (
        *("small", "large", "low", "high", "small_low", "small_high", "large_low", "large_high"),
        *("level_non_uniformity", "level_non_uniformity_normalised"),
        *("size_non_uniformity", "size_non_uniformity_normalised", "share"),
        *("level_variance", "size_variance", "entropy"),
    )
    count = len(events.levels)
    if not count:
        return dict.fromkeys(names, float("nan"))
    i, j = events.levels.astype(np.float64), events.sizes.astype(np.float64)
    small, large, low, high = j**-2, j**2, i**-2, i**2
    per_level, per_size = np.bincount(events.levels), np.bincount(events.sizes)
    pairs = np.bincount(events.levels * (int(events.sizes.max()) + 1) + events.sizes)
    of_levels, of_sizes = float((per_level**2.0).sum()), float((per_size**2.0).sum())
    values = (
        *(part.mean() for part in (small, large, low, high)),
        *((small * low).mean(), (small * high).mean(), (large * low).mean(), (large * high).mean()),
        *(of_levels / count, of_levels / count**2, of_sizes / count, of_sizes / count**2),
        count / events.voxels,
        *(i.var(), j.var(), entropy(pairs / count)),
    )
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Average features over slices or directions; where one has no value, over the others."""
    if not rows:
        return {}
    found = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        known = values[~np.isnan(values)]
        found[name] = float(known.mean()) if len(known) else float("nan")
    return found


def averaged(parts: list[Events]) -> dict[str, float]:
    """Average the features of events over slices or directions; NaN where there are none."""
    return mean_of([emphases(part) for part in parts]) or emphases(merged([]))
