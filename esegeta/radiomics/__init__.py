"""Radiomic features: numbers for the intensities, the shape and the texture of a region.

Definitions and tags are those of the Image Biomarker Standardisation Initiative (IBSI), in two and three dimensions,
with voxel spacing. ``features`` computes them all; ``soft`` has forms that can be differentiated, for dreams and
attributions; ``pyradiomics`` computes what that package would.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from esegeta.engine import check
from esegeta.radiomics import (
    cooccurrence,
    histogram,
    levels,
    local,
    morphology,
    neighbours,
    runs,
    soft,
    statistics,
    zones,
)
from esegeta.radiomics.inputs import arrays, cropped
from esegeta.radiomics.preparation import Prepared, prepare
from esegeta.radiomics.pyradiomics import pyradiomics
from esegeta.radiomics.surface import surface

__all__ = [
    "Features",
    "Prepared",
    "features",
    "names",
    "prepare",
    "pyradiomics",
    "soft",
    "statistics",
    "surface",
]

WHERE = "radiomics.features"
_IVH_BINS = 1000

# Tag of a family, its plain name, and its features by tag and by plain name.
FAMILIES: dict[str, tuple[str, Mapping[str, str]]] = {
    morphology.TAG: ("shape", morphology.NAMES),
    local.TAG: ("local", local.NAMES),
    statistics.TAG: ("statistics", {tag: fn.__name__ for tag, fn in statistics.NAMES.items()}),
    histogram.TAG: ("histogram", histogram.NAMES),
    histogram.VOLUME_TAG: ("volume_histogram", histogram.VOLUME_NAMES),
    cooccurrence.TAG: ("glcm", cooccurrence.NAMES),
    runs.TAG: ("glrlm", runs.NAMES),
    zones.SIZE_TAG: ("glszm", zones.SIZE_NAMES),
    zones.DISTANCE_TAG: ("gldzm", zones.DISTANCE_NAMES),
    neighbours.TONE_TAG: ("ngtdm", neighbours.TONE_NAMES),
    neighbours.DEPENDENCE_TAG: ("ngldm", neighbours.DEPENDENCE_NAMES),
}


class Features(Mapping[str, float]):
    """Features by name, and in ``settings`` how they were computed. What is undefined is NaN."""

    def __init__(self, values: Mapping[str, float], settings: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self.settings = dict(settings)

    def __getitem__(self, name: str) -> float:
        try:
            return self._values[name]
        except KeyError:
            near = check.nearest(name, self._values, "list(features) has all names")
            raise KeyError(check.problem("radiomics", "the name of a feature", repr(name), near)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Features({len(self)} of {self.settings.get('voxels', '?')} voxels)"


def names() -> dict[str, str]:
    """List the plain name of every tag, without its aggregation.

    >>> names()["cm_contrast"], names()["morph_pca_flatness"]
    ('glcm_contrast', 'shape_flatness')
    """
    return {
        f"{tag}_{short}": f"{family}_{plain}"
        for tag, (family, table) in FAMILIES.items()
        for short, plain in table.items()
    }


def features(
    image: Any,
    mask: Any,
    *,
    spacing: Any = None,
    width: float | None = None,
    number: int | None = None,
    ivh: Mapping[str, float] | None = None,
    slice_axis: int = -1,
    tags: bool = False,
) -> Features:
    """Compute all radiomic features of a region.

    Intensities are divided into grey levels by bins of a ``width`` that begin at the region's minimum, or by a
    ``number`` of bins; without either the image has to consist of whole numbers >= 1, which are its levels.

    Args:
        image: (*S) or (1,*S), with two or three axes.
        mask: the region (*S); or two of them, the shape and the voxels whose intensities count, as ``prepare`` has
            them.
        spacing: mm per voxel, one number or one for each axis; 1 by default.
        width: of a bin, in the image's unit.
        number: of bins.
        ivh: how the intensity-volume histogram is divided, ``{"width": w}`` or ``{"number": n}``. By default whole
            levels where the image has them, else 1000 bins.
        slice_axis: the axis across slices, for the 2-D and 2.5-D aggregations of volumes.
        tags: name features by the tags of the IBSI, ``cm_contrast_3D_avg``, instead of plain names,
            ``glcm_contrast_3D_avg``.

    Returns:
        Features by name; NaN where one is undefined, as all are of an empty mask.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
        >>> found = features(x, torch.ones(2, 2, dtype=torch.bool), spacing=2.0)
        >>> found["shape_voxel_volume"], found["statistics_mean"], found["histogram_mode"]
        (16.0, 2.25, 2.0)

    Reference: Zwanenburg et al., The Image Biomarker Standardization Initiative, Radiology 295, 2020.
    """
    data, (shape, counted), lengths = arrays(WHERE, image, mask, spacing)
    if width is not None and number is not None:
        raise check.refused(WHERE, "width= or number=", "both", "Leave one of them out")
    if not isinstance(slice_axis, int) or not -data.ndim <= slice_axis < data.ndim:
        raise check.refused(WHERE, f"slice_axis of {data.ndim} axes", repr(slice_axis), "Use -1")
    peaks = local.features(data, counted, lengths)  # reaches beyond the region
    data, shape, counted = cropped(data, shape, counted)
    divided = _divided(data, counted, width, number)
    if ivh is None:
        volume = divided if width is None and number is None else _divided(data, counted, None, _IVH_BINS)
    elif isinstance(ivh, Mapping) and len(ivh) == 1 and set(ivh) <= {"width", "number"}:
        volume = _divided(data, counted, ivh.get("width"), ivh.get("number"))
    else:
        raise check.refused(WHERE, 'ivh={"width": w} or {"number": n}', repr(ivh), "Change it")

    found: dict[str, float] = {}

    def add(tag: str, values: Mapping[str, float], ending: str = "") -> None:
        family, table = FAMILIES[tag]
        for short, value in values.items():
            name = f"{tag}_{short}" if tags else f"{family}_{table[short]}"
            found[f"{name}_{ending}" if ending else name] = value

    form = morphology.features(shape, lengths)
    form |= morphology.intensity_features(data, shape, counted, lengths, form["volume"])
    add(morphology.TAG, form)
    add(local.TAG, peaks)
    add(statistics.TAG, statistics.features(torch.from_numpy(data[counted])))
    add(histogram.TAG, histogram.features(divided))
    add(histogram.VOLUME_TAG, histogram.volume_features(volume))
    sizes, distances = zones.features(divided, shape, slice_axis)
    tones, dependences = neighbours.features(divided, slice_axis)
    textures = {
        cooccurrence.TAG: cooccurrence.features(divided, slice_axis),
        runs.TAG: runs.features(divided, slice_axis),
        zones.SIZE_TAG: sizes,
        zones.DISTANCE_TAG: distances,
        neighbours.TONE_TAG: tones,
        neighbours.DEPENDENCE_TAG: dependences,
    }
    for tag, by_aggregation in textures.items():
        for ending, values in by_aggregation.items():
            add(tag, values, ending)
    settings = {
        "spacing": tuple(lengths.tolist()),
        "width": width,
        "number": number,
        "levels": divided.number,
        "ivh": dict(ivh) if ivh is not None else None,
        "slice_axis": slice_axis,
        "voxels": int(shape.sum()),
        "voxels_counted": int(counted.sum()),
    }
    return Features(found, settings)


def _divided(data: Any, counted: Any, width: float | None, number: float | None) -> levels.Levels:
    if width is not None:
        if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width < np.inf:
            raise check.refused(WHERE, "width > 0", repr(width), "Give it in the image's unit")
        return levels.fixed_width(data, counted, float(width))
    if number is not None:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise check.refused(WHERE, "number of bins >= 1", repr(number), "16 to 128 are usual")
        return levels.fixed_number(data, counted, number)
    return levels.own(data, counted)
