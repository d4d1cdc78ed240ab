"""Features with the definitions, defaults and names of the package pyradiomics, for comparisons with its numbers.

They differ from those of the IBSI in a few places: bins begin at multiples of their width, the kurtosis of a normal
distribution is 3, a shift is added to intensities before they are squared, axes come from variances that divide by n.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from esegeta.engine import check
from esegeta.radiomics import cooccurrence, levels, morphology, neighbours, runs, statistics, tables, zones
from esegeta.radiomics.inputs import arrays, cropped
from esegeta.radiomics.surface import surface

WHERE = "radiomics.pyradiomics"

_GLCM = {
    "Autocorrelation": "auto_corr",
    "JointAverage": "joint_avg",
    "ClusterProminence": "clust_prom",
    "ClusterShade": "clust_shade",
    "ClusterTendency": "clust_tend",
    "Contrast": "contrast",
    "Correlation": "corr",
    "DifferenceAverage": "diff_avg",
    "DifferenceEntropy": "diff_entr",
    "DifferenceVariance": "diff_var",
    "JointEnergy": "energy",
    "JointEntropy": "joint_entr",
    "Imc1": "info_corr1",
    "Imc2": "info_corr2",
    "Idm": "inv_diff_mom",
    "Idmn": "inv_diff_mom_norm",
    "Id": "inv_diff",
    "Idn": "inv_diff_norm",
    "InverseVariance": "inv_var",
    "MaximumProbability": "joint_max",
    "SumAverage": "sum_avg",
    "SumEntropy": "sum_entr",
    "SumSquares": "joint_var",
}
# The sixteen features of events, in the order of ``tables.emphases``; {} is what a family calls an event's size.
_EVENTS = {
    "glrlm": (
        *("ShortRunEmphasis", "LongRunEmphasis", "LowGrayLevelRunEmphasis", "HighGrayLevelRunEmphasis"),
        *("ShortRunLowGrayLevelEmphasis", "ShortRunHighGrayLevelEmphasis"),
        *("LongRunLowGrayLevelEmphasis", "LongRunHighGrayLevelEmphasis"),
        *("GrayLevelNonUniformity", "GrayLevelNonUniformityNormalized"),
        *("RunLengthNonUniformity", "RunLengthNonUniformityNormalized", "RunPercentage"),
        *("GrayLevelVariance", "RunVariance", "RunEntropy"),
    ),
    "glszm": (
        *("SmallAreaEmphasis", "LargeAreaEmphasis", "LowGrayLevelZoneEmphasis", "HighGrayLevelZoneEmphasis"),
        *("SmallAreaLowGrayLevelEmphasis", "SmallAreaHighGrayLevelEmphasis"),
        *("LargeAreaLowGrayLevelEmphasis", "LargeAreaHighGrayLevelEmphasis"),
        *("GrayLevelNonUniformity", "GrayLevelNonUniformityNormalized"),
        *("SizeZoneNonUniformity", "SizeZoneNonUniformityNormalized", "ZonePercentage"),
        *("GrayLevelVariance", "ZoneVariance", "ZoneEntropy"),
    ),
    "gldm": (
        *(
            "SmallDependenceEmphasis",
            "LargeDependenceEmphasis",
            "LowGrayLevelEmphasis",
            "HighGrayLevelEmphasis",
        ),
        *("SmallDependenceLowGrayLevelEmphasis", "SmallDependenceHighGrayLevelEmphasis"),
        *("LargeDependenceLowGrayLevelEmphasis", "LargeDependenceHighGrayLevelEmphasis"),
        *("GrayLevelNonUniformity", None),
        *("DependenceNonUniformity", "DependenceNonUniformityNormalized", None),
        *("GrayLevelVariance", "DependenceVariance", "DependenceEntropy"),
    ),
}


def pyradiomics(
    image: Any,
    mask: Any,
    *,
    spacing: Any = None,
    width: float | None = 25.0,
    number: int | None = None,
    shift: float = 0.0,
    slice_axis: int | None = None,
) -> dict[str, float]:
    """Compute features as pyradiomics does, under its names.

    Args:
        image: (*S) or (1,*S), with three axes.
        mask: the region (*S).
        spacing: mm per voxel.
        width: of a bin, whose borders are multiples of it.
        number: of bins, which takes the place of the width.
        shift: added to intensities before they are squared.
        slice_axis: textures within slices across this axis, in matrices that are added up over slices; None for
            textures in all directions.

    Returns:
        ``original_glcm_Contrast`` and so on; NaN where one is undefined.

    Example:
        >>> x = torch.arange(27.0).reshape(3, 3, 3)
        >>> found = pyradiomics(x, x > 0, width=5.0)
        >>> found["original_firstorder_Maximum"], found["original_shape_VoxelVolume"]
        (26.0, 26.0)
    """
    data, (shape, counted), lengths = arrays(WHERE, image, mask, spacing)
    if data.ndim != 3:
        advice = "esegeta.radiomics.features takes images of two axes"
        raise check.refused(WHERE, "three axes", f"shape {data.shape}", advice)
    data, shape, counted = cropped(data, shape, counted)
    if number is not None:
        divided = levels.fixed_number(data, counted, number)
    elif width is not None and width > 0:
        least = float(data[counted].min()) if counted.any() else 0.0
        divided = levels.fixed_width(data, counted, width, start=math.floor(least / width) * width)
    else:
        raise check.refused(WHERE, "width > 0 or number", repr(width), "Its default is 25")
    found = {
        "firstorder": _first_order(data, counted, divided, lengths, shift),
        "shape": _shape(shape, lengths),
        **_textures(divided, shape, slice_axis),
    }
    return {f"original_{family}_{name}": v for family, values in found.items() for name, v in values.items()}


def _first_order(
    data: Any, counted: Any, divided: levels.Levels, lengths: Any, shift: float
) -> dict[str, float]:
    v = torch.from_numpy(data[counted])
    own, moved = statistics.features(v), statistics.features(v + shift)
    present = divided.image[divided.image > 0]
    p = np.bincount(present) / max(1, len(present))
    return {
        "Energy": moved["energy"],
        "TotalEnergy": moved["energy"] * float(np.prod(lengths)),
        "Entropy": tables.entropy(p),
        "Minimum": own["min"],
        "10Percentile": own["p10"],
        "90Percentile": own["p90"],
        "Maximum": own["max"],
        "Mean": own["mean"],
        "Median": own["median"],
        "InterquartileRange": own["iqr"],
        "Range": own["range"],
        "MeanAbsoluteDeviation": own["mad"],
        "RobustMeanAbsoluteDeviation": own["rmad"],
        "RootMeanSquared": moved["rms"],
        "Skewness": own["skew"],
        "Kurtosis": own["kurt"] + 3,
        "Variance": own["var"],
        "Uniformity": float((p**2).sum()),
    }


def _shape(mask: Any, lengths: Any) -> dict[str, float]:
    own = morphology.features(mask, lengths)
    points = morphology.positions(mask, lengths)
    along = (
        4 * np.sqrt(morphology.variances(points) * (len(points) - 1) / len(points))
        if len(points)
        else [math.nan] * 3
    )
    corners = np.unique(surface(mask.astype(np.float64), 0.5, lengths).reshape(-1, 3).round(9), axis=0)

    def flat(axis: int) -> float:
        values = [morphology.diameter(corners[corners[:, axis] == c]) for c in np.unique(corners[:, axis])]
        return max(values, default=math.nan)

    return {
        "MeshVolume": own["volume"],
        "VoxelVolume": own["vol_approx"],
        "SurfaceArea": own["area_mesh"],
        "SurfaceVolumeRatio": own["av"],
        "Sphericity": own["sphericity"],
        "MajorAxisLength": float(along[0]),
        "MinorAxisLength": float(along[1]),
        "LeastAxisLength": float(along[2]),
        "Elongation": own["pca_elongation"],
        "Flatness": own["pca_flatness"],
        "Maximum3DDiameter": own["diam"],
        "Maximum2DDiameterSlice": flat(2),
        "Maximum2DDiameterColumn": flat(1),
        "Maximum2DDiameterRow": flat(0),
    }


def _textures(divided: levels.Levels, mask: Any, slice_axis: int | None) -> dict[str, dict[str, float]]:
    axis = -1 if slice_axis is None else slice_axis
    each, whole = ("3D_avg", "3D") if slice_axis is None else ("2_5D_avg", "2_5D")
    matrices = [m for m in cooccurrence.matrices(divided, axis)[each] if np.sum(m)]
    pairs = tables.mean_of([cooccurrence.of_matrix(m) for m in matrices])
    limits = [cooccurrence.correlation_limit(m) for m in matrices]
    sizes, _ = zones.features(divided, mask, axis)
    tones, dependences = neighbours.features(divided, axis)
    found = {"glcm": {theirs: pairs.get(ours, math.nan) for theirs, ours in _GLCM.items()}}
    found["glcm"]["MCC"] = float(np.mean(limits)) if limits else math.nan
    events: Mapping[str, dict[str, float]] = {
        "glrlm": runs.features(divided, axis)[each],
        "glszm": sizes[whole],
        "gldm": dependences[whole],
    }
    for family, names in _EVENTS.items():
        values = list(events[family].values())[: len(names)]
        found[family] = {n: value for n, value in zip(names, values, strict=True) if n is not None}
    found["ngtdm"] = {name.capitalize(): value for name, value in tones[whole].items()}
    return found
