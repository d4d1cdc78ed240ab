"""Pictures of maps on volumes and flat images."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from esegeta.engine import check
from esegeta.plot import colours as shades
from esegeta.plot import grids
from esegeta.plot.canvas import Bar, Cell, Sheet, numeral, sheet
from esegeta.plot.colours import Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABREAST = 6  # maps beside each other before a new row begins


def _signed(scheme: str) -> str:
    return f"{shades.NAMES[scheme]} for the score, blue against"


def _unsigned(scheme: str) -> str:
    return f"{shades.SIZES[scheme]}, the brighter the more"


def _scheme(where: str, scheme: str) -> str:
    return check.one_of(where, "colours", scheme, list(shades.SCHEMES))


def _grey(scene: grids.Scene) -> np.ndarray:
    """The anatomy as colours ``(*S, 3)``, black where there is none."""
    if scene.anatomy is None:
        return np.zeros((*scene.values.shape, 3), dtype=np.float32)
    if scene.anatomy.ndim == 4:
        return scene.anatomy
    return np.repeat(scene.anatomy[..., None], 3, axis=-1)


def _below(scene: grids.Scene) -> np.ndarray:
    """What lies under a map: the anatomy without its own colours, which would be taken for the map's."""
    if scene.anatomy is None or scene.anatomy.ndim < 4:
        return _grey(scene)
    return np.repeat((scene.anatomy @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=-1)


def _cell(scene: grids.Scene, axis: int, picture: np.ndarray, corner: str = "") -> Cell:
    a, b = (i for i in range(3) if i != axis)
    width, height = (scene.values.shape[i] * scene.sizes[i] for i in (a, b))
    letters = None if scene.affine is None else grids.letters(axis)
    return Cell(picture, float(width), float(height), letters, corner)


def _rings(scene: grids.Scene, flat: Callable[[np.ndarray], np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """The outlines in a picture, each in its colour; ``flat`` makes a picture of a volume."""
    hues = [shades.RINGS[i % len(shades.RINGS)][1] for i in range(len(scene.outlines))]
    return [(hue, flat(mask)) for hue, mask in zip(hues, scene.outlines.values(), strict=True)]


def _plane(scene: grids.Scene, axis: int, index: int, scale: Scale | None, corner: str = "") -> Cell:
    """One plane of the anatomy, under the map unless there is no scale for it."""
    turned = scene.affine is not None
    below = grids.plane(_grey(scene) if scale is None else _below(scene), axis, index, turned)
    if scale is not None:
        below = shades.blend(grids.plane(scene.values, axis, index, turned), scale, below)
    rings = _rings(scene, lambda mask: grids.plane(mask, axis, index, turned))
    return _cell(scene, axis, below, corner)._replace(lines=rings)


def _place(scene: grids.Scene, axis: int, index: int) -> str:
    """Where a plane lies: in mm where that is known, else its number."""
    if scene.titles[axis] == "":
        return ""
    if scene.affine is None:
        return f"{index + scene.start[axis]}"
    voxel = [(n - 1) / 2 for n in scene.values.shape]
    voxel[axis] = index
    way = int(np.argmax(np.abs(scene.affine[:3, axis])))
    return f"{round(float((scene.affine @ [*voxel, 1.0])[way]))} mm"


def _words(scenes: Sequence[grids.Scene], limit: float | None, percentile: float, how: str) -> str:
    """What has to be known to read a picture, from its colours to the side that the patient's right is on."""
    said = [f"{how[0].upper()}{how[1:]}."]
    known = np.concatenate([scene.values[~np.isnan(scene.values)] for scene in scenes])
    whole = known.size == sum(scene.values.size for scene in scenes)
    if not known.size:
        said.append("Nothing of the map is known.")
    elif not known.any():
        said.append(f"The map is zero {'everywhere' if whole else 'wherever it is known'}.")
    elif limit is not None:
        most = max(float(np.nanmax(np.abs(_finite(scene.values)), initial=0)) for scene in scenes)
        share = f" ({percentile:g} % of the non-zero sizes are smaller)" if most > limit else ""
        said.append(f"The scale ends at {numeral(limit)}{share}; the largest size is {numeral(most)}.")
    else:
        said.append("Each map has its own scale.")
    unknown = sum(int(np.isnan(scene.values).sum()) for scene in scenes)
    if unknown:
        percent = 100 * unknown / sum(scene.values.size for scene in scenes)
        said.append(f"{numeral(percent)} % of the values are NaN: they were not computed (hatched).")
    infinite = sum(int(np.isinf(scene.values).sum()) for scene in scenes)
    if infinite:
        said.append(f"{infinite} values are infinite (green).")
    if scenes[0].channels > 1:
        said.append(f"Sum of {scenes[0].channels} channels.")
    if (hidden := max((scene.hidden or 0 for scene in scenes), default=0)) or scenes[0].hidden is not None:
        which = "" if len(scenes) == 1 else "up to "
        said.append(f"Outside of the mask nothing is shown: {which}{numeral(100 * hidden)} % of all |a|.")
    if scenes[0].outlines:
        names = [f"{n} ({shades.RINGS[i % len(shades.RINGS)][0]})" for i, n in enumerate(scenes[0].outlines)]
        said.append(f"Outlined: {', '.join(names)}.")
    if scenes[0].affine is not None:
        said.append("Seen as radiologists do: the patient's right is on the left of the picture.")
        if not scenes[0].placed:
            said.append("Letters and mm assume that voxels are of 1 mm and axes point right, front and up.")
        part = np.abs(scenes[0].affine[:3, :3] / np.linalg.norm(scenes[0].affine[:3, :3], axis=0)).max(0)
        if part.min() < np.cos(np.radians(5)):
            said.append("The grid is oblique: the letters say what each side is nearest to.")
    return " ".join(said)


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _limit(where: str, limit: float | int | None, scenes: Sequence[grids.Scene]) -> float:
    if limit is None:
        return max(grids.limit_of(scene.values) for scene in scenes)
    if not 0 < limit < float("inf"):
        expected = "limit to be a finite number > 0"
        raise check.refused(where, expected, repr(limit), "Leave it out for a robust one")
    return float(limit)


def _centre(where: str, scene: grids.Scene, at: Sequence[int] | None, affine: Any) -> tuple[int, ...]:
    """The voxel of the turned grid that planes go through."""
    if at is None:
        return grids.strongest([scene.values], scene.anatomy)
    axes = 2 if scene.titles[0] == "" else 3
    if len(at) != 3 or axes == 2:
        expected = "at to be the three indices of a voxel of a volume"
        raise check.refused(where, expected, repr(at), "Leave it out for where the map has most")
    voxel = np.array([*at, 1.0])
    if scene.affine is None:
        voxel[:3] -= scene.start
    else:
        voxel = np.linalg.inv(scene.affine) @ np.asarray(affine, dtype=np.float64) @ voxel
    found = tuple(round(float(v)) for v in voxel[:3])
    if any(not 0 <= i < n for i, n in zip(found, scene.values.shape, strict=True)):
        raise check.refused(where, "at inside of the volume", repr(tuple(at)), "Indices count from 0")
    return found


def projections(
    map: object,
    anatomy: object = None,
    spacing: Any = None,
    affine: object = None,
    *,
    title: str | None = None,
    subtitle: str | None = None,
    unit: str = "attribution",
    limit: float | int | None = None,
    mask: object = None,
    outline: object = None,
    box: object = None,
    colours: str = "orange",
) -> "Figure":
    r"""Maximum intensity projections of what is for the score, what is against it, and of the size.

    .. math:: \max_u |a|, \qquad \max_u \max(a, 0), \qquad \max_u \max(-a, 0)

    along each axis u. The maximum of a signed map would hide all that is negative. The first row is the projection of
    the image itself, without colours: it is anatomy and no attribution; faintly it lies below the others, too. A flat
    image has nothing to project: it is shown three times as it is.

    Args:
        map: ``(C,*S)``, two or three spatial axes; channels are added up.
        anatomy: the image ``(C,*S)``; a map on another grid is interpolated to it.
        spacing: mm per voxel, one per spatial axis; by default from the affine, else 1.
        affine: from voxels to mm (right, front, up): turns the planes and gives them letters.
        title: above the picture.
        subtitle: below the title, smaller: whose it is, score, residual.
        unit: at the colour bar.
        limit: the end of the scale; by default what 99.5 % of the non-zero pixels stay within.
        mask: where the map is shown, ``(*S)`` or "otsu" for what is not dark in the anatomy; the rest is muted, and
            the line below says how much lies there.
        outline: a mask ``(*S)`` to go round, or several by their names: the prediction, a reference.
        box: the part to zoom to: (start, stop) in voxels for each axis, or "outline" or "mask" for round these.
        colours: "orange" or "red" for what is for the score; what is against it is blue.

    Returns:
        A figure of matplotlib.
    """
    scheme = _scheme("projections", colours)
    scene = grids.scene("projections", map, anatomy, spacing, affine, mask=mask, outline=outline, box=box)
    turned = scene.affine is not None
    broken, unknown = ~np.isfinite(scene.values), np.isnan(scene.values)
    clean = np.where(broken, 0, scene.values)
    parts = {"size": np.abs(clean), "positive": np.maximum(clean, 0), "negative": np.maximum(-clean, 0)}
    flat = {kind: [part.max(axis) for axis in scene.across] for kind, part in parts.items()}
    percentile = 99.5
    end = _limit("projections", limit, [scene]) if limit is not None else 0.0
    if limit is None:
        end = grids.limit_of(np.concatenate([p.ravel() for p in flat["size"]]), percentile)
    faint = [0.35 * _below(scene).max(axis) for axis in scene.across]
    rows: list[list[Cell | None]] = []
    for kind, pictures in flat.items():
        scale, sign = Scale(kind, end, scheme), -1 if kind == "negative" else 1
        row: list[Cell | None] = []
        for axis, picture, below in zip(scene.across, pictures, faint, strict=True):
            picture = np.where(unknown.all(axis), np.nan, sign * picture)
            picture = np.where(broken.all(axis) & ~unknown.all(axis), np.inf, picture)
            drawn = shades.blend(
                grids.upright(picture, axis, turned), scale, grids.upright(below, axis, turned)
            )
            in_part = unknown.any(axis) & ~unknown.all(axis)
            drawn = shades.hatched(drawn, grids.upright(in_part, axis, turned), thin=True)
            row.append(_cell(scene, axis, drawn)._replace(lines=_shadows(scene, axis)))
        rows.append(row)
    names = ["size |a|", "for (a > 0)", "against (a < 0)"]
    scales = [Scale(kind, end, scheme) for kind in parts]
    bars = [Bar(scale, i, i, unit) for i, scale in enumerate(scales)]
    if scene.anatomy is not None and scene.titles[0] != "":
        own = [grids.upright(_grey(scene).max(axis), axis, turned) for axis in scene.across]
        cells = [_cell(scene, axis, flat) for axis, flat in zip(scene.across, own, strict=True)]
        rows.insert(
            0, [cell._replace(lines=_shadows(scene, a)) for a, cell in zip(scene.across, cells, strict=True)]
        )
        names.insert(0, "the image itself")
        bars = [bar._replace(first=bar.first + 1, last=bar.last + 1) for bar in bars]
    single = len(scene.across) == 1
    how = "the map as it is" if scene.titles[0] == "" else "the largest value along each line of sight"
    caption = _words([scene], end, percentile, how)
    if unknown.any() and not single:
        caption += " Thinly hatched: known on a part of the line of sight only."
    if single:  # side by side reads better than three rows of one
        return sheet(
            "projections",
            Sheet(
                [[row[0] for row in rows]],
                heads={0: names},
                below=bars,
                title=title,
                subtitle=subtitle,
                caption=caption,
            ),
        )
    return sheet(
        "projections",
        Sheet(
            rows,
            heads={0: [scene.titles[axis] for axis in scene.across]},
            labels=names,
            beside=bars,
            title=title,
            subtitle=subtitle,
            caption=caption,
        ),
    )


def _shadows(scene: grids.Scene, axis: int) -> list[tuple[str, np.ndarray]]:
    """The outlines of what masks project to along an axis."""
    turned = scene.affine is not None
    return _rings(scene, lambda mask: grids.upright(np.asarray(mask.any(axis)), axis, turned))


def montage(
    map: object,
    anatomy: object = None,
    spacing: Any = None,
    affine: object = None,
    *,
    title: str | None = None,
    subtitle: str | None = None,
    unit: str = "attribution",
    limit: float | int | None = None,
    axis: int | None = None,
    slices: int = 24,
    mask: object = None,
    outline: object = None,
    box: object = None,
    colours: str = "orange",
) -> "Figure":
    """Draw parallel planes through the part of a volume that is not empty, from one end to the other.

    Args:
        map: ``(C,*S)``, two or three spatial axes; channels are added up.
        anatomy: the image ``(C,*S)``; a map on another grid is interpolated to it.
        spacing: mm per voxel, one per spatial axis; by default from the affine, else 1.
        affine: from voxels to mm (right, front, up): turns the planes and gives them letters.
        title: above the picture.
        subtitle: below the title, smaller: whose it is, score, residual.
        unit: at the colour bar.
        limit: the end of the scale; by default what 99.8 % of the non-zero values stay within.
        axis: the axis of the picture that the planes are across (with an affine: 0 sagittal, 1 coronal, 2 axial);
            by default the thinnest axis, else the last.
        slices: how many at most.
        mask: where the map is shown, ``(*S)`` or "otsu" for what is not dark in the anatomy; the rest is muted, and
            the line below says how much lies there.
        outline: a mask ``(*S)`` to go round, or several by their names: the prediction, a reference.
        box: the part to zoom to: (start, stop) in voxels for each axis, or "outline" or "mask" for round these.
        colours: "orange" or "red" for what is for the score; what is against it is blue.

    Returns:
        A figure of matplotlib.
    """
    scheme = _scheme("montage", colours)
    scene = grids.scene("montage", map, anatomy, spacing, affine, mask=mask, outline=outline, box=box)
    count = check.positive_count("montage", "slices", slices)
    across = scene.across[0] if axis is None else axis
    if across not in (0, 1, 2):
        raise check.refused("montage", "axis to be 0, 1 or 2", repr(axis), "Leave it out")
    scale = Scale("signed", _limit("montage", limit, [scene]), scheme)
    seen = _grey(scene).max(-1) > 0.05 if scene.anatomy is not None else scene.values != 0
    others = tuple(a for a in range(3) if a != across)
    area = seen.sum(axis=others)
    full = np.flatnonzero(area > 0.02 * area.max(initial=0))
    first, last = (int(full[0]), int(full[-1])) if full.size else (0, scene.values.shape[across] - 1)
    indices = sorted({round(i) for i in np.linspace(first, last, min(count, last - first + 1))})
    cells: list[Cell | None] = [
        _plane(scene, across, i, scale, _place(scene, across, i))._replace(letters=None) for i in indices
    ]
    if cells[0] is not None:
        cells[0] = cells[0]._replace(letters=_cell(scene, across, np.empty(0)).letters)
    wide = min(len(cells), ABREAST)
    rows = [list(islice(cells, r, r + wide)) for r in range(0, len(cells), wide)]
    caption = _words([scene], scale.limit, grids.PERCENTILE, _signed(scheme))
    name = scene.titles[across]
    numbered = f"{name[0].upper()}{name[1:]} planes. " if name else ""
    return sheet(
        "montage",
        Sheet(
            rows,
            beside=[Bar(scale, 0, len(rows) - 1, unit)],
            title=title,
            subtitle=subtitle,
            caption=numbered + caption,
            side=1.55 if len(cells) > 3 else 2.5,
        ),
    )


def overlay(
    map: object,
    anatomy: object = None,
    spacing: Any = None,
    affine: object = None,
    *,
    title: str | None = None,
    subtitle: str | None = None,
    unit: str = "attribution",
    limit: float | int | None = None,
    signed: bool = True,
    at: Sequence[int] | None = None,
    mask: object = None,
    outline: object = None,
    box: object = None,
    colours: str = "orange",
) -> "Figure":
    """Draw the map over the anatomy, in planes through one voxel, with the anatomy alone above.

    Args:
        map: ``(C,*S)``, two or three spatial axes; channels are added up.
        anatomy: the image ``(C,*S)``; a map on another grid is interpolated to it.
        spacing: mm per voxel, one per spatial axis; by default from the affine, else 1.
        affine: from voxels to mm (right, front, up): turns the planes and gives them letters.
        title: above the picture.
        subtitle: below the title, smaller: whose it is, score, residual.
        unit: at the colour bar.
        limit: the end of the scale; by default what 99.8 % of the non-zero values stay within.
        signed: whether values are for and against; False is for what has no sign, such as an entropy.
        at: indices of the voxel; by default where the map has most, seen with blurred eyes.
        mask: where the map is shown, ``(*S)`` or "otsu" for what is not dark in the anatomy; the rest is muted, and
            the line below says how much lies there.
        outline: a mask ``(*S)`` to go round, or several by their names: the prediction, a reference.
        box: the part to zoom to: (start, stop) in voxels for each axis, or "outline" or "mask" for round these.
        colours: "orange" or "red" for what is for the score; what is against it is blue.

    Returns:
        A figure of matplotlib.
    """
    scheme = _scheme("overlay", colours)
    scene = grids.scene("overlay", map, anatomy, spacing, affine, mask=mask, outline=outline, box=box)
    scale = Scale("signed" if signed else "size", _limit("overlay", limit, [scene]), scheme)
    voxel = _centre("overlay", scene, at, affine)
    above: list[Cell | None] = []
    below: list[Cell | None] = []
    for axis in scene.across:
        above.append(_plane(scene, axis, voxel[axis], None, _place(scene, axis, voxel[axis])))
        below.append(_plane(scene, axis, voxel[axis], scale))
    how = _signed(scheme) if signed else _unsigned(scheme)
    caption = _words([scene], scale.limit, grids.PERCENTILE, how)
    heads = {0: [scene.titles[axis] for axis in scene.across]}
    if scene.anatomy is None:
        rows = [[cell._replace(corner=a.corner) for cell, a in zip(below, above, strict=True) if cell and a]]
        return sheet(
            "overlay",
            Sheet(
                rows, heads, beside=[Bar(scale, 0, 0, unit)], title=title, subtitle=subtitle, caption=caption
            ),
        )
    if len(scene.across) == 1:
        rows = [[c for c in (above[0], below[0]) if c is not None]]
        return sheet(
            "overlay",
            Sheet(rows, beside=[Bar(scale, 0, 0, unit)], title=title, subtitle=subtitle, caption=caption),
        )
    return sheet(
        "overlay",
        Sheet(
            [above, below],
            heads,
            beside=[Bar(scale, 1, 1, unit)],
            title=title,
            subtitle=subtitle,
            caption=caption,
        ),
    )


def side_by_side(
    maps: Mapping[str, object],
    anatomy: object = None,
    spacing: Any = None,
    affine: object = None,
    *,
    title: str | None = None,
    subtitle: str | None = None,
    unit: str = "attribution",
    shared: bool = True,
    at: Sequence[int] | None = None,
    mask: object = None,
    outline: object = None,
    box: object = None,
    colours: str = "orange",
) -> "Figure":
    """Draw maps of several targets or methods, one a column, in the same planes.

    Args:
        maps: name -> map ``(C,*S)``.
        anatomy: the image ``(C,*S)``; maps on other grids are interpolated to it.
        spacing: mm per voxel, one per spatial axis; by default from the affine, else 1.
        affine: from voxels to mm (right, front, up): turns the planes and gives them letters.
        title: above the picture.
        subtitle: below the title, smaller: whose it is, score, residual.
        unit: at the colour bar.
        shared: one scale for all, which compares sizes (several targets of one method); False: each its own,
            which compares places (several methods, whose values mean different things).
        at: indices of the voxel that the planes go through; by default where the maps together have most.
        mask: where the map is shown, ``(*S)`` or "otsu" for what is not dark in the anatomy; the rest is muted, and
            the line below says how much lies there.
        outline: a mask ``(*S)`` to go round, or several by their names: the prediction, a reference.
        box: the part to zoom to: (start, stop) in voxels for each axis, or "outline" or "mask" for round these.
        colours: "orange" or "red" for what is for the score; what is against it is blue.

    Returns:
        A figure of matplotlib.
    """
    scheme = _scheme("side_by_side", colours)
    look = {"mask": mask, "outline": outline, "box": box}
    names, scenes = _several("side_by_side", maps, anatomy, spacing, affine, look)
    limits = [grids.limit_of(scene.values) for scene in scenes]
    ends = [max(limits)] * len(limits) if shared else limits
    voxel = _common("side_by_side", scenes, at, affine)
    rows: list[list[Cell | None]] = []
    heads: dict[int, list[str]] = {}
    wide = min(len(names), ABREAST)
    for start in range(0, len(names), wide):
        block = range(start, min(start + wide, len(names)))
        # Bars fit below one block of columns only.
        ended = [f" (±{numeral(ends[i])})" if len(names) > wide and not shared else "" for i in block]
        heads[len(rows)] = [names[i] + end for i, end in zip(block, ended, strict=True)]
        for axis in scenes[0].across:
            corner = _place(scenes[0], axis, voxel[axis])
            rows.append(
                [
                    _plane(scenes[i], axis, voxel[axis], Scale("signed", ends[i], scheme), corner)
                    for i in block
                ]
            )
    caption = _words(scenes, ends[0] if shared else None, grids.PERCENTILE, _signed(scheme))
    scale = Scale("signed", ends[0], scheme)
    beside = [Bar(scale, 0, len(rows) - 1, unit)] if shared else []
    below = (
        []
        if shared or len(names) > wide
        else [Bar(Scale("signed", e, scheme), i, i, unit) for i, e in enumerate(ends)]
    )
    return sheet(
        "side_by_side",
        Sheet(
            rows, heads, beside=beside, below=below, title=title, subtitle=subtitle, caption=caption, side=2.1
        ),
    )


def layers(
    maps: Mapping[str, object],
    anatomy: object = None,
    spacing: Any = None,
    affine: object = None,
    *,
    title: str | None = None,
    subtitle: str | None = None,
    unit: str = "attribution",
    at: Sequence[int] | None = None,
    project: bool = False,
    mask: object = None,
    outline: object = None,
    box: object = None,
    colours: str = "orange",
) -> "Figure":
    """Draw maps of several places of a network, one a row, from first to last, each on its own scale.

    Args:
        maps: place -> map ``(C,*U)``; maps on the coarser grids of layers are interpolated to the anatomy.
        anatomy: the image ``(C,*S)``.
        spacing: mm per voxel, one per spatial axis; by default from the affine, else 1.
        affine: from voxels to mm (right, front, up): turns the planes and gives them letters.
        title: above the picture.
        subtitle: below the title, smaller: whose it is, score, residual.
        unit: at the colour bars.
        at: indices of the voxel that the planes go through; by default the middle of the anatomy.
        project: instead of planes, along each line of sight the value of the largest size, with its sign.
        mask: where the map is shown, ``(*S)`` or "otsu" for what is not dark in the anatomy; the rest is muted, and
            the line below says how much lies there.
        outline: a mask ``(*S)`` to go round, or several by their names: the prediction, a reference.
        box: the part to zoom to: (start, stop) in voxels for each axis, or "outline" or "mask" for round these.
        colours: "orange" or "red" for what is for the score; what is against it is blue.

    Returns:
        A figure of matplotlib.
    """
    scheme = _scheme("layers", colours)
    look = {"mask": mask, "outline": outline, "box": box}
    names, scenes = _several("layers", maps, anatomy, spacing, affine, look)
    voxel = _middle(scenes[0]) if at is None else _centre("layers", scenes[0], at, affine)
    rows: list[list[Cell | None]] = []
    bars = []
    for i, scene in enumerate(scenes):
        scale = Scale("signed", grids.limit_of(scene.values), scheme)
        if project:
            rows.append([_peaks(scene, axis, scale) for axis in scene.across])
        else:
            corners = {axis: _place(scene, axis, voxel[axis]) if i == 0 else "" for axis in scene.across}
            rows.append([_plane(scene, axis, voxel[axis], scale, corners[axis]) for axis in scene.across])
        bars.append(Bar(scale, i, i, unit))
    heads = {0: [scenes[0].titles[axis] for axis in scenes[0].across]}
    caption = _words(scenes, None, grids.PERCENTILE, _signed(scheme))
    if project:
        caption = f"The value of the largest size along each line of sight. {caption}"
    return sheet(
        "layers",
        Sheet(rows, heads, names, beside=bars, title=title, subtitle=subtitle, caption=caption, side=2.1),
    )


def _peaks(scene: grids.Scene, axis: int, scale: Scale) -> Cell:
    """The value of the largest size along each line of sight, over a faint projection of the anatomy."""
    turned = scene.affine is not None
    clean = np.nan_to_num(scene.values, posinf=0, neginf=0)
    place = np.expand_dims(np.abs(clean).argmax(axis), axis)
    peaks = np.take_along_axis(clean, place, axis).squeeze(axis)
    peaks = np.where(np.isnan(scene.values).all(axis), np.nan, peaks)
    faint = grids.upright(0.35 * _below(scene).max(axis), axis, turned)
    drawn = shades.blend(grids.upright(peaks, axis, turned), scale, faint)
    return _cell(scene, axis, drawn)._replace(lines=_shadows(scene, axis))


def channels(
    map: object,
    anatomy: object = None,
    spacing: Any = None,
    affine: object = None,
    *,
    title: str | None = None,
    subtitle: str | None = None,
    unit: str = "attribution",
    names: Sequence[str] | None = None,
    at: Sequence[int] | None = None,
    mask: object = None,
    outline: object = None,
    box: object = None,
    colours: str = "orange",
) -> "Figure":
    """Draw each channel of a map over that of the image, all on one scale: a sum may cancel.

    Args:
        map: ``(C,*S)``, two or three spatial axes.
        anatomy: the image ``(C,*S)``; with one channel it lies under all.
        spacing: mm per voxel, one per spatial axis; by default from the affine, else 1.
        affine: from voxels to mm (right, front, up): turns the planes and gives them letters.
        title: above the picture.
        subtitle: below the title, smaller: whose it is, score, residual.
        unit: at the colour bar.
        names: of the channels; by default their numbers from 0.
        at: indices of the voxel that the planes go through; by default where all channels together have most.
        mask: where the map is shown, ``(*S)`` or "otsu" for what is not dark in the anatomy; the rest is muted, and
            the line below says how much lies there.
        outline: a mask ``(*S)`` to go round, or several by their names: the prediction, a reference.
        box: the part to zoom to: (start, stop) in voxels for each axis, or "outline" or "mask" for round these.
        colours: "orange" or "red" for what is for the score; what is against it is blue.

    Returns:
        A figure of matplotlib.
    """
    scheme = _scheme("channels", colours)
    found = grids.array("channels", "map", map)
    under = None if anatomy is None else grids.array("channels", "anatomy", anatomy)
    labels = [f"channel {i}" for i in range(len(found))] if names is None else [str(name) for name in names]
    if len(labels) != len(found):
        expected = f"names of {len(found)} channels"
        raise check.refused("channels", expected, f"{len(labels)}", "Name each of them once")
    look: dict[str, Any] = {"mask": mask, "outline": outline, "box": box}
    if isinstance(mask, str) and under is not None:
        look["mask"] = grids.body(grids.window(under[0]))
    scenes = []
    for i, one in enumerate(found):
        own = None if under is None else under[i : i + 1] if len(under) == len(found) else under
        scenes.append(grids.scene("channels", one[None], own, spacing, affine, **look))
    scale = Scale("signed", max(grids.limit_of(scene.values) for scene in scenes), scheme)
    voxel = _common("channels", scenes, at, affine)
    rows: list[list[Cell | None]] = []
    for i, scene in enumerate(scenes):
        corners = {axis: _place(scene, axis, voxel[axis]) if i == 0 else "" for axis in scene.across}
        bare = [_plane(scene, axis, voxel[axis], None, corners[axis]) for axis in scene.across]
        drawn = [_plane(scene, axis, voxel[axis], scale, corners[axis]) for axis in scene.across]
        rows.append([bare[0], *drawn] if scene.anatomy is not None else list(drawn))
    head = [scenes[0].titles[axis] or "the map" for axis in scenes[0].across]
    if scenes[0].anatomy is not None:
        head = ["the image itself", *head]
    caption = _words(scenes, scale.limit, grids.PERCENTILE, _signed(scheme))
    beside = [Bar(scale, 0, len(rows) - 1, unit)]
    content = Sheet(
        rows, {0: head}, labels, beside, title=title, subtitle=subtitle, caption=caption, side=1.9
    )
    return sheet("channels", content)


def _several(
    where: str,
    maps: Mapping[str, object],
    anatomy: object,
    spacing: Any,
    affine: object,
    look: Mapping[str, Any],
) -> tuple[list[str], list[grids.Scene]]:
    if not isinstance(maps, Mapping) or not maps:
        raise check.refused(where, "maps as a mapping name -> map", check.describe(maps), "Pass one or more")
    scenes = [grids.scene(where, map, anatomy, spacing, affine, **look) for map in maps.values()]
    if any(scene.values.shape != scenes[0].values.shape for scene in scenes):
        got = ", ".join(sorted({str(tuple(scene.values.shape)) for scene in scenes}))
        raise check.refused(
            where, "maps on one grid", got, "Pass the anatomy, whose grid they are brought to"
        )
    return list(maps), scenes


def _middle(scene: grids.Scene) -> tuple[int, ...]:
    """The voxel in the middle of the bright part of the anatomy, of the volume where there is none."""
    bright = _grey(scene).max(-1) > 0.05
    if not bright.any():
        bright = np.ones_like(bright)
    return tuple(int(c) for c in np.argwhere(bright).mean(0).round())


def _common(
    where: str, scenes: Sequence[grids.Scene], at: Sequence[int] | None, affine: Any
) -> tuple[int, ...]:
    if at is None:
        return grids.strongest([scene.values for scene in scenes], scenes[0].anatomy)
    return _centre(where, scenes[0], at, affine)


FIGURES: dict[str, Callable[..., "Figure"]] = {
    "projections": projections,
    "montage": montage,
    "overlay": overlay,
    "channels": channels,
}
