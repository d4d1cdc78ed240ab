"""The histogram of grey levels, and the volume above each intensity."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esegeta.radiomics import statistics
from esegeta.radiomics.levels import Levels
from esegeta.radiomics.tables import entropy

Array = NDArray[np.floating[Any]]

TAG, VOLUME_TAG = "ih", "ivh"
_OWN = {
    "mode": "mode",
    "entropy": "entropy",
    "uniformity": "uniformity",
    "max_grad": "maximum_gradient",
    "max_grad_g": "level_of_maximum_gradient",
    "min_grad": "minimum_gradient",
    "min_grad_g": "level_of_minimum_gradient",
}
_SHARED = {name: fn.__name__ for name, fn in statistics.NAMES.items() if name not in ("energy", "rms")}
NAMES = {**_SHARED, **_OWN}
VOLUME_NAMES = {
    "v10": "volume_at_intensity_fraction_10",
    "v90": "volume_at_intensity_fraction_90",
    "i10": "intensity_at_volume_fraction_10",
    "i90": "intensity_at_volume_fraction_90",
    "diff_v10_v90": "volume_fraction_difference",
    "diff_i10_i90": "intensity_difference",
    "auc": "area_under_curve",
}


def features(levels: Levels) -> dict[str, float]:
    """Compute the statistics of levels, their entropy, and where their histogram is steepest."""
    values = levels.image[levels.image > 0]
    if not len(values):
        return dict.fromkeys(NAMES, float("nan"))
    found = statistics.features(torch.from_numpy(values.astype(np.float64)))
    counts = np.bincount(values, minlength=levels.number + 1)[1:].astype(np.float64)
    p = counts / counts.sum()
    steep = np.gradient(counts) if len(counts) > 1 else np.zeros(1)
    often = np.nonzero(counts == counts.max())[0] + 1
    mode = often[np.abs(often - found["mean"]).argmin()]  # of several, the nearest to the mean
    found |= {
        "mode": float(mode),
        "entropy": entropy(p),
        "uniformity": float((p**2).sum()),
        "max_grad": float(steep.max()),
        "max_grad_g": float(steep.argmax() + 1),
        "min_grad": float(steep.min()),
        "min_grad_g": float(steep.argmin() + 1),
    }
    return {name: found[name] for name in NAMES}


def volume_features(levels: Levels) -> dict[str, float]:
    """Compute features of the curve of the share of the volume at or above each level, absent levels included."""
    values = levels.image[levels.image > 0]
    if not len(values):
        return dict.fromkeys(VOLUME_NAMES, float("nan"))
    low, high = int(values.min()), int(values.max())
    grid = np.arange(low, high + 1)
    counts = np.bincount(values, minlength=high + 1)[low:]
    volume = counts[::-1].cumsum()[::-1] / counts.sum()
    intensity = (grid - low) / (high - low) if high > low else np.zeros(1)

    def at_intensity(share: float) -> float:
        known = volume[intensity >= share]
        return float(known.max()) if len(known) else 0.0

    def at_volume(share: float) -> float:
        below = np.nonzero(volume <= share)[0]
        step = float(levels.centres[1] - levels.centres[0]) if len(levels.centres) > 1 else 1.0
        level = grid[below[0]] if len(below) else high + 1
        return float(levels.centres[0] + (level - 1) * step)

    v10, v90, i10, i90 = at_intensity(0.1), at_intensity(0.9), at_volume(0.1), at_volume(0.9)
    area = float((np.diff(intensity) * (volume[1:] + volume[:-1]) / 2).sum()) if high > low else float("nan")
    return dict(zip(VOLUME_NAMES, (v10, v90, i10, i90, v10 - v90, i10 - i90, area), strict=True))
