"""Figures of maps, for notebooks, files and reports. They need matplotlib: ``pip install "esegeta[viz]"``.

All take images as the rest of the package does, ``(C,*S)``, as tensors or arrays, and return figures of
matplotlib that belong to nobody: no window opens and nothing global changes.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esegeta.engine import check
from esegeta.plot.canvas import png, save
from esegeta.plot.cascade import cascade
from esegeta.plot.images import FIGURES, layers, montage, overlay, projections, side_by_side
from esegeta.plot.lines import curve, is_signal, signal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "cascade",
    "curve",
    "layers",
    "montage",
    "overlay",
    "png",
    "projections",
    "save",
    "save_figures",
    "show",
    "side_by_side",
    "signal",
]


def show(
    map: object,
    anatomy: object = None,
    spacing: Any = None,
    kind: str = "overlay",
    title: str | None = None,
    affine: object = None,
) -> "Figure":
    """The figure of a map, which a notebook shows.

    Args:
        map: ``(C,*S)`` with one to three spatial axes; channels are added up.
        anatomy: the image ``(C,*S)`` that was explained.
        spacing: mm per voxel, one per spatial axis; by default from the affine, else 1.
        kind: "overlay" (planes where the map has most), "projections" (maximum along each axis) or "montage"
            (parallel planes). A signal has one picture.
        title: above the picture.
        affine: from voxels to mm (right, front, up): turns the planes and gives them letters.

    Returns:
        A figure of matplotlib.

    Example:
        >>> import torch
        >>> figure = show(torch.ones(1, 4, 4, 4), kind="montage")
        >>> figure.get_size_inches().tolist()[0] > 4
        True
    """
    check.one_of("show", "kind", kind, list(FIGURES))
    if is_signal(map):
        return signal(map, anatomy, spacing, title=title)
    return FIGURES[kind](map, anatomy, spacing, affine, title=title)


def save_figures(
    map: object,
    anatomy: object,
    spacing: Any,
    stem: "str | os.PathLike[str]",
    title: str | None = None,
    affine: object = None,
) -> dict[str, Path]:
    """Write all figures of a map beside it: ``{stem}_projections.png``, ``_montage.png``, ``_overlay.png``.

    A flat image has no montage, and a signal has one figure, the overlay.

    Args:
        map: ``(C,*S)`` with one to three spatial axes; channels are added up.
        anatomy: the image ``(C,*S)`` that was explained, or None.
        spacing: mm per voxel, one per spatial axis, or None.
        stem: folder and beginning of the names.
        title: above the pictures.
        affine: from voxels to mm (right, front, up): turns the planes and gives them letters.

    Returns:
        Kind of figure -> path of its PNG file.
    """
    stem = Path(stem)
    axes = len(getattr(map, "shape", ())) - 1
    kinds = {1: ("overlay",), 2: ("projections", "overlay")}.get(axes, tuple(FIGURES))
    written = {}
    for kind in kinds:
        path = stem.with_name(f"{stem.name}_{kind}.png")
        written[kind] = save(show(map, anatomy, spacing, kind, title, affine), path)
    return written
