"""What is drawn, as arrays: maps and anatomy on one grid, turned as a reader of images expects it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esegeta import spatial
from esegeta.engine import check

PERCENTILE = 99.8
NAMES = ("sagittal", "coronal", "axial")


class Scene(NamedTuple):
    """A map and what lies under it, always with three axes: a flat image has one plane.

    values: ``(*S)``, channels added up; anatomy: ``(*S)`` or ``(*S, 3)`` between 0 and 1; sizes: of a voxel;
    across: the axes that planes are drawn across; titles: what a plane across each axis is called;
    affine: of this grid, if known: then the axes point to the left, to the back and up; start: the voxel of the
    whole grid where this one begins; hidden: the share of |a| that a mask hides; outlines: name -> mask ``(*S)``;
    placed: whether the affine says more than the identity, which readers give to files that say nothing, as .npy.
    """

    values: np.ndarray
    anatomy: np.ndarray | None
    sizes: tuple[float, ...]
    across: tuple[int, ...]
    titles: tuple[str, ...]
    affine: np.ndarray | None
    channels: int
    start: tuple[int, ...] = (0, 0, 0)
    hidden: float | None = None
    outlines: Mapping[str, np.ndarray] = {}
    placed: bool = True


def array(where: str, name: str, value: object, axes: int | None = None) -> np.ndarray:
    """Return an image ``(C,*S)`` as float32, from a tensor or an array.

    >>> array("overlay", "map", torch.ones(1, 2, 2)).dtype
    dtype('float32')
    """
    found = value.detach().cpu().to(torch.float32).numpy() if isinstance(value, Tensor) else value
    try:
        with np.errstate(over="ignore"):  # what float32 has no room for is infinite, and said to be
            found = np.asarray(found, dtype=np.float32)
    except (TypeError, ValueError):
        found = np.empty(0, dtype=np.float32)
    if found.ndim - 1 not in ((1, 2, 3) if axes is None else (axes,)) or found.size == 0:
        expected = f"{name} of shape (C,*S) with {'one to three' if axes is None else axes} spatial axes"
        raise check.refused(where, expected, _got(value), "Add a channel axis with map[None]")
    return found


def _got(value: object) -> str:
    """Short text for a value in an error message, in one line."""
    if isinstance(value, np.ndarray):
        numbers = f" {value.ravel().tolist()}" if value.size <= 16 else ""
        return f"{value.dtype}{value.shape}{numbers}"
    return " ".join(check.describe(value).split())


def spacing_of(where: str, spacing: Any, affine: np.ndarray | None, axes: int) -> tuple[float, ...]:
    """Return the size of a voxel: as given, else from the affine, else 1.

    >>> spacing_of("overlay", None, np.diag([2.0, 3.0, 4.0, 1.0]), 2)
    (2.0, 3.0)
    """
    if spacing is None:
        found = np.ones(axes) if affine is None else np.linalg.norm(affine[:3, :axes], axis=0)
    else:
        try:
            found = np.asarray(spacing, dtype=np.float64)
        except (TypeError, ValueError):
            found = np.empty(0)
    if found.shape != (axes,) or not (np.isfinite(found).all() and (found > 0).all()):
        expected = f"spacing of {axes} finite lengths > 0, one per spatial axis"
        got = _got(affine if spacing is None else spacing)
        raise check.refused(where, expected, got, "Take it from the header of the image")
    return tuple(float(size) for size in found)


def _affine(where: str, affine: object) -> np.ndarray | None:
    if affine is None:
        return None
    try:
        found = np.asarray(affine, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != (4, 4) or not np.isfinite(found).all() or abs(np.linalg.det(found[:3, :3])) < 1e-12:
        expected = "affine to be 4 x 4, finite and invertible"
        raise check.refused(where, expected, _got(affine), "Take it from the header of the image")
    return found


def window(image: np.ndarray) -> np.ndarray:
    """Grey values between 0 and 1: one in two hundred of the non-zero values saturates at either end.

    >>> window(np.array([0.0, 5.0, 10.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    seen = image[np.isfinite(image)]
    if not seen.size:
        return np.zeros_like(image)
    low, high = min(float(seen.min()), 0.0), float(seen.max())
    inside = seen[seen != 0]
    if inside.size >= 200:
        low = min(low, 0.0) if low >= 0 else float(np.percentile(inside, 0.5))
        high = float(np.percentile(inside, 99.5))
    if high <= low:
        return np.full_like(image, 0.5 if high else 0.0)
    return np.clip((np.nan_to_num(image, nan=low) - low) / (high - low), 0, 1)


def _anatomy(image: np.ndarray) -> np.ndarray:
    """Three channels of a flat image are its colours; of other images the first is shown."""
    if image.ndim == 3 and image.shape[0] == 3:
        seen = image[np.isfinite(image)]
        low, high = min(float(seen.min(initial=0)), 0.0), max(float(seen.max(initial=0)), 1.0)
        colours = (np.moveaxis(image, 0, -1) - low) / (high - low)
        return np.clip(np.nan_to_num(colours, posinf=0, neginf=0), 0, 1)
    return window(image[0])


def _lifted(image: np.ndarray) -> np.ndarray:
    """A flat picture, rows first, as a volume whose only plane ``plane`` shows as it is."""
    return np.swapaxes(image, 0, 1)[:, ::-1, None]


def scene(
    where: str,
    map: object,
    anatomy: object,
    spacing: Any,
    affine: object,
    *,
    mask: object = None,
    outline: object = None,
    box: object = None,
) -> Scene:
    """Put a map and its anatomy, checked, on one grid, turned to left, back and up if an affine tells that.

    >>> scene("overlay", torch.ones(2, 4, 4, 4), None, None, None).values.max().item()
    2.0
    """
    found = array(where, "map", map)
    axes = found.ndim - 1
    if axes == 1:
        advice = "Draw signals with esegeta.plot.signal"
        expected = "a map (C,*S) with two or three spatial axes"
        raise check.refused(where, expected, f"shape {found.shape}", advice)
    under = None if anatomy is None else array(where, "anatomy", anatomy, axes)
    if under is not None and under.shape[1:] != found.shape[1:]:
        found = spatial.upsample(torch.from_numpy(found), like=torch.from_numpy(under)).numpy()
    lies = _affine(where, affine)
    placed = lies is not None and not np.array_equal(lies, np.eye(4))
    sizes = spacing_of(where, spacing, lies, axes)
    channels = found.shape[0]
    with np.errstate(invalid="ignore", over="ignore"):
        values = found[0] if channels == 1 else found.sum(0)
    shown = None if under is None else _anatomy(under)
    seen = _seen(where, mask, shown, values.shape)
    hidden = None
    if seen is not None:
        hidden = _share_outside(values, seen)
        values = np.where(seen, values, 0)
    rings = {name: _mask(where, name, one, values.shape) for name, one in _named(outline).items()}
    start = (0,) * axes
    if box is not None:
        cut = _box(where, box, values.shape, seen, rings)
        values, start = values[cut], tuple(part.start for part in cut)
        shown = None if shown is None else shown[cut]
        rings = {name: ring[cut] for name, ring in rings.items()}
        if lies is not None:
            lies = lies.copy()
            lies[:3, 3] += lies[:3, :axes] @ np.array(start, dtype=np.float64)
    titles = tuple(f"across axis {a}" for a in range(3))
    lift: Callable[[np.ndarray], np.ndarray] = lambda image: image
    if lies is not None:
        if axes == 2:  # one slice of a volume
            sizes = (*sizes, 1.0)
        turn, back = _turn(lies, (*values.shape, 1)[:3])
        lift = lambda image: _apply(image if axes == 3 else np.expand_dims(image, 2), turn)
        sizes = tuple(sizes[int(np.flatnonzero(turn[:, 0] == a)[0])] for a in range(3))
        lies, titles = lies @ back, NAMES
    elif axes == 2:
        lift, sizes, titles = _lifted, (sizes[1], sizes[0], 1.0), ("", "", "")
    values = lift(values)
    shown = None if shown is None else lift(shown)
    rings = {name: lift(ring) for name, ring in rings.items()}
    thin = tuple(a for a in range(3) if values.shape[a] == 1)
    across = (2,) if titles[0] == "" else thin if len(thin) == 1 else (2, 1, 0)
    begin = start if axes == 3 else (0, 0, 0)
    return Scene(values, shown, sizes, across, titles, lies, channels, begin, hidden, rings, placed)


def _share_outside(values: np.ndarray, seen: np.ndarray) -> float:
    """The share of all ``|a|`` that lies outside of a mask.

    >>> _share_outside(np.array([1.0, -3.0, np.nan]), np.array([True, False, True]))
    0.75
    """
    size = np.abs(np.nan_to_num(values, posinf=0, neginf=0)).astype(np.float64)
    total = float(size.sum())
    return float(size[~seen].sum()) / total if total else 0.0


def _named(outline: object) -> dict[str, object]:
    """Masks by their names, of one or several."""
    if outline is None:
        return {}
    return {str(k): v for k, v in outline.items()} if isinstance(outline, Mapping) else {"mask": outline}


def _mask(where: str, name: str, value: object, shape: tuple[int, ...]) -> np.ndarray:
    """A mask ``(*S)`` or ``(1,*S)`` on the grid of what is drawn."""
    found = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    try:
        found = np.asarray(found)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape == (1, *shape):
        found = found[0]
    if found.shape != shape or found.dtype.kind not in "biuf":
        advice = "Bring it to the grid of the image"
        raise check.refused(where, f"{name} on the grid {shape}", _got(value), advice)
    return found > 0.5


def _seen(where: str, mask: object, anatomy: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """Where a map is shown, None for everywhere."""
    if mask is None:
        return None
    if not isinstance(mask, str):
        return _mask(where, "mask", mask, shape)
    check.one_of(where, "mask", mask, ["otsu"])
    if anatomy is None:
        advice = "Pass the image, or a mask"
        raise check.refused(where, 'an anatomy for mask = "otsu"', "none", advice)
    return body(grey(anatomy))


def otsu(values: np.ndarray) -> float:
    """Return the threshold that parts values in [0, 1] with the least variance in both parts, from 256 bins.

    >>> round(otsu(np.array([0.0, 0.1, 0.8, 0.9, 0.9])), 1)
    0.1
    """
    counts, edges = np.histogram(values, 256, (0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    sums, whole = np.cumsum(counts * centres), (counts * centres).sum()
    above = total - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (whole - sums) / above) ** 2
    return float(edges[1 + int(np.nanargmax(np.where(np.isfinite(between), between, -1)))])


def body(brightness: np.ndarray) -> np.ndarray:
    """Return where an image is brighter than half of Otsu's threshold, closed, without holes.

    >>> body(np.array([[0.0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])).sum().item()
    4
    """
    from scipy.ndimage import binary_closing, binary_fill_holes, binary_opening, binary_propagation, label

    rough = brightness > otsu(brightness) / 2
    # Without specks, and what is left as it was, corners and all.
    clean = binary_propagation(binary_opening(rough), mask=rough) if min(brightness.shape) > 8 else rough
    wide = np.pad(clean, 3)
    closed = binary_fill_holes(binary_closing(wide, iterations=2))
    inner = closed[tuple(slice(3, -3) for _ in brightness.shape)]
    parts, count = label(inner)
    if count > 1:  # specks of noise in the air are no part of it
        sizes = np.bincount(parts.ravel())[1:]
        inner = np.isin(parts, 1 + np.flatnonzero(sizes >= 0.02 * sizes.max()))
    found: np.ndarray = inner if inner.any() else np.ones_like(inner)
    return found


MARGIN = 0.15  # of the sides of what is zoomed to


def _box(
    where: str, box: object, shape: tuple[int, ...], seen: np.ndarray | None, rings: Mapping[str, np.ndarray]
) -> tuple[slice, ...]:
    """The part of a grid that is drawn: given as (start, stop) for each axis, or round "outline" or "mask"."""
    if isinstance(box, str):
        check.one_of(where, "box", box, ["outline", "mask"])
        wanted = (
            [seen] if box == "mask" and seen is not None else list(rings.values()) if box == "outline" else []
        )
        filled = [one for one in wanted if one is not None and one.any()]
        if not filled:
            return tuple(slice(0, n) for n in shape)
        places = np.argwhere(np.any(filled, axis=0))
        low, high = places.min(0), places.max(0) + 1
        room = np.maximum(1, np.ceil(MARGIN * (high - low)))
        limits = [
            (int(max(0, a - r)), int(min(n, b + r)))
            for a, b, r, n in zip(low, high, room, shape, strict=True)
        ]
        return tuple(slice(a, b) for a, b in limits)
    try:
        limits = [(int(a), int(b)) for a, b in box]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        limits = []
    if len(limits) != len(shape) or not all(
        0 <= a < b <= n for (a, b), n in zip(limits, shape, strict=False)
    ):
        expected = f"box to be (start, stop) within {shape} for each axis"
        raise check.refused(where, expected, repr(box), 'Or take "outline" or "mask"')
    return tuple(slice(a, b) for a, b in limits)


def _turn(affine: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    from nibabel import orientations  # here, so that importing the package does not wait for it

    now = orientations.io_orientation(affine)
    turn = orientations.ornt_transform(now, orientations.axcodes2ornt(("L", "P", "S")))
    return turn, orientations.inv_ornt_aff(turn, shape)


def _apply(image: np.ndarray, turn: np.ndarray) -> np.ndarray:
    from nibabel import orientations

    return np.asarray(orientations.apply_orientation(image, turn))


def plane(volume: np.ndarray, axis: int, index: int, oriented: bool) -> np.ndarray:
    """Return one plane of ``(*S)`` or ``(*S, 3)`` as a picture: rows from top to bottom, columns to the right.

    >>> plane(np.arange(8).reshape(2, 2, 2), 2, 0, oriented=False).tolist()
    [[2, 6], [0, 4]]
    """
    return upright(np.take(volume, index, axis=axis), axis, oriented)


def upright(flat: np.ndarray, axis: int, oriented: bool) -> np.ndarray:
    """Return a volume without one of its axes, as a picture."""
    turned = np.swapaxes(flat, 0, 1)
    # Seen from below, as radiologists do, the front is on top; all other axes point up.
    return turned if oriented and axis == 2 else turned[::-1]


def letters(axis: int) -> tuple[str, str, str, str]:
    """Return where left, right, top and bottom of an oriented plane lie.

    >>> letters(2)
    ('R', 'L', 'A', 'P')
    """
    return (("A", "P", "S", "I"), ("R", "L", "S", "I"), ("R", "L", "A", "P"))[axis]


def grey(anatomy: np.ndarray) -> np.ndarray:
    """Return the brightness of an anatomy, with or without colours."""
    return anatomy.max(-1) if anatomy.ndim == 4 else anatomy


def limit_of(values: np.ndarray, percentile: float = PERCENTILE) -> float:
    """Return the end of a colour scale: all but the largest of the non-zero ``|a|``; 0 if all is zero.

    >>> limit_of(np.array([0.0, -2.0, np.nan]))
    2.0
    """
    size = np.abs(values[np.isfinite(values)])
    size = size[size > 0]
    if not size.size:
        return 0.0
    return float(np.percentile(size, percentile)) if size.size >= 1000 else float(size.max())


def strongest(volumes: Sequence[np.ndarray], anatomy: np.ndarray | None = None) -> tuple[int, ...]:
    """Return the voxel round which maps have most, each by its own limit, not where the anatomy is dark.

    >>> strongest([np.diag([0.0, 0.0, 3.0, 0.0])]), strongest([np.ones((9, 9))])
    ((2, 2), (4, 4))
    """
    from scipy.ndimage import uniform_filter

    shape: tuple[int, ...] = volumes[0].shape
    total = np.zeros(shape, dtype=np.float32)
    for values in volumes:
        limit = limit_of(values) or 1.0
        total += np.minimum(np.nan_to_num(np.abs(values), posinf=0) / limit, 1)
    if anatomy is not None and total[inside := grey(anatomy) > 0.05].any():
        total = np.where(inside, total, 0)
    width = [2 * (side // 24) + 1 for side in shape]
    if not total.any():
        return tuple(side // 2 for side in shape)
    near = uniform_filter(total, width, mode="constant")
    seen = near if anatomy is None else near * (grey(anatomy) > 0.05) + 1e-6 * near
    # A map with one value has it everywhere: the voxel nearest to the middle shows more than the first one.
    tied = np.argwhere(seen >= (1 - 1e-5) * seen.max())
    off = (tied - tied.mean(0)) / shape
    return tuple(int(i) for i in tied[int(np.argmin(np.square(off).sum(1)))])
