"""Figures of maps, for notebooks, files and reports. They need matplotlib: ``pip install "esegeta[viz]"``.

All take images as the rest of the package does, ``(C,*S)``, as tensors or arrays, and return figures of
matplotlib that belong to nobody: no window opens and nothing global changes.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esegeta.engine import check
from esegeta.plot.canvas import png, save
from esegeta.plot.cascade import cascade
from esegeta.plot.comparison import comparison
from esegeta.plot.detectors import detectors
from esegeta.plot.dreams import analysis, dream
from esegeta.plot.images import FIGURES, channels, layers, montage, overlay, projections, side_by_side
from esegeta.plot.lines import curve, is_signal, signal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "analysis",
    "cascade",
    "channels",
    "comparison",
    "curve",
    "detectors",
    "dream",
    "kinds_of",
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
    *,
    subtitle: str | None = None,
    mask: object = None,
    outline: object = None,
    box: object = None,
    colours: str = "orange",
) -> "Figure":
    """Draw the figure of a map, which a notebook shows.

    Args:
        map: ``(C,*S)`` with one to three spatial axes; channels are added up but for "channels".
        anatomy: the image ``(C,*S)`` that was explained.
        spacing: mm per voxel, one per spatial axis; by default from the affine, else 1.
        kind: "overlay" (planes where the map has most), "projections" (maximum along each axis), "montage"
            (parallel planes) or "channels" (one a row). A signal has one picture.
        title: above the picture.
        affine: from voxels to mm (right, front, up): turns the planes and gives them letters.
        subtitle: below the title, smaller: whose it is, score, residual.
        mask: where the map is shown, ``(*S)`` or "otsu" for what is not dark in the anatomy.
        outline: a mask ``(*S)`` to go round, or several by their names.
        box: the part to zoom to: (start, stop) in voxels for each axis, or "outline" or "mask" for round these.
        colours: "orange" or "red" for what is for the score; what is against it is blue.

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
        return signal(map, anatomy, spacing, title=title, subtitle=subtitle)
    look: dict[str, Any] = {"mask": mask, "outline": outline, "box": box, "colours": colours}
    return FIGURES[kind](map, anatomy, spacing, affine, title=title, subtitle=subtitle, **look)


def kinds_of(map: object) -> tuple[str, ...]:
    """Return the kinds of figures that say something of a map.

    >>> import torch
    >>> kinds_of(torch.ones(1, 4)), kinds_of(torch.ones(1, 4, 4)), kinds_of(torch.ones(2, 4, 4, 4))
    (('overlay',), ('overlay', 'projections'), ('overlay', 'projections', 'montage', 'channels'))
    """
    shape: Sequence[int] = getattr(map, "shape", ())
    found = {2: ("overlay",), 3: ("overlay", "projections")}.get(
        len(shape), ("overlay", "projections", "montage")
    )
    return (*found, "channels") if len(shape) > 2 and shape[0] > 1 else found


def save_figures(
    map: object,
    anatomy: object,
    spacing: Any,
    stem: "str | os.PathLike[str]",
    title: str | None = None,
    affine: object = None,
    *,
    kinds: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    subtitle: str | None = None,
    mask: object = None,
    outline: object = None,
    box: object = None,
    colours: str = "orange",
) -> dict[str, Path]:
    """Write all figures of a map beside it: ``{stem}_projections.png``, ``_montage.png``, ``_overlay.png``.

    A flat image has no montage, a signal has one figure, the overlay, and a map with several channels has one of
    them, too. The files have 256 colours.

    Args:
        map: ``(C,*S)`` with one to three spatial axes; channels are added up but for "channels".
        anatomy: the image ``(C,*S)`` that was explained, or None.
        spacing: mm per voxel, one per spatial axis, or None.
        stem: folder and beginning of the names.
        title: above the pictures.
        affine: from voxels to mm (right, front, up): turns the planes and gives them letters.
        kinds: which, of those that the map has; by default all.
        names: of the channels.
        subtitle: below the title, smaller: whose it is, score, residual.
        mask: where the map is shown, ``(*S)`` or "otsu" for what is not dark in the anatomy.
        outline: a mask ``(*S)`` to go round, or several by their names.
        box: the part to zoom to: (start, stop) in voxels for each axis, or "outline" or "mask" for round these.
        colours: "orange" or "red" for what is for the score; what is against it is blue.

    Returns:
        Kind of figure -> path of its PNG file.
    """
    stem = Path(stem)
    look: dict[str, Any] = {"mask": mask, "outline": outline, "box": box, "colours": colours}
    written = {}
    for kind in kinds_of(map):
        if kinds is not None and kind not in kinds:
            continue
        path = stem.with_name(f"{stem.name}_{kind}.png")
        if kind == "channels":
            about: dict[str, Any] = {"title": title, "subtitle": subtitle, "names": names}
            figure = channels(map, anatomy, spacing, affine, **about, **look)
        else:
            figure = show(map, anatomy, spacing, kind, title, affine, subtitle=subtitle, **look)
        written[kind] = save(figure, path, 256)
    return written
