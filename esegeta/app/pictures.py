"""Pictures and display copies of volumes for the page: small, quantised, and made once."""

import base64
import json
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import aff2axcodes

from esegeta.plot import colours
from esegeta.plot import grids as scenes
from esegeta.run.report import display
from esegeta.run.volumes import files

LEVELS = {"preview": 60_000, "fine": 4_000_000}  # bytes of a copy, about
_KEPT = 256_000_000  # bytes of copies in memory
SIDE = 160  # pixels of a plane in a thumbnail


class Shelf:
    """Copies that were made, by the file that they are of and its state; the oldest go first.

    >>> shelf = Shelf(5)
    >>> [shelf.get(n, lambda n=n: bytes(3)) for n in (1, 2)][0], list(shelf.kept)
    (b'\\x00\\x00\\x00', [2])
    """

    def __init__(self, most: int = _KEPT) -> None:
        self.most, self.kept = most, OrderedDict[Any, bytes]()
        self._lock = threading.Lock()

    def get(self, about: Any, make: Callable[[], bytes]) -> bytes:
        """Return the copy about something, made now if it is not there."""
        with self._lock:
            if about in self.kept:
                self.kept.move_to_end(about)
                return self.kept[about]
        made = make()
        with self._lock:
            self.kept[about] = made
            while sum(map(len, self.kept.values())) > self.most and len(self.kept) > 1:
                self.kept.popitem(last=False)
        return made


SHELF = Shelf()
# One volume at a time is unpacked: thirty maps of 256 cubed at once would not fit.
_ONE = threading.Lock()


def _state(path: Path) -> tuple[str, int, int]:
    about = path.stat()
    return str(path), about.st_size, about.st_mtime_ns


def png(pixels: np.ndarray) -> bytes:
    """Return a picture (rows, columns, 3) of bytes as PNG.

    >>> png(np.zeros((2, 3, 3), np.uint8))[1:4]
    b'PNG'
    """
    rows, columns, _ = pixels.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        sum_ = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", sum_)

    flat = np.zeros((rows, 1 + 3 * columns), np.uint8)
    flat[:, 1:] = pixels.reshape(rows, -1)
    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(flat.tobytes(), 6))
        + chunk(b"IEND", b"")
    )


# --- An image before anything is computed -----------------------------------------------------------------


def facts(paths: Sequence[Path], reading: dict[str, Any]) -> dict[str, Any]:
    """Return what an image is: shape, spacing, orientation, range."""
    with _ONE:
        volume = files.read(list(paths), **reading)
    data = volume.data
    codes = "".join(str(c or "?") for c in aff2axcodes(volume.affine))[: data.ndim - 1]
    return {
        "channels": int(data.shape[0]),
        "shape": list(data.shape[1:]),
        "spacing": [round(mm, 4) for mm in volume.spacing],
        "orientation": "" if volume.is_image else codes,
        "units": volume.units,
        "low": float(data.min()),
        "high": float(data.max()),
    }


def thumbnail(paths: Sequence[Path], reading: dict[str, Any]) -> bytes:
    """Return three planes through the middle of an image, beside each other; of a picture the picture."""

    def make() -> bytes:
        with _ONE:
            volume = files.read(list(paths), **reading)
            values = scenes.window(volume.data[0].numpy())
            affine = volume.affine
        return png(
            _planes(_grey(_solid(values)), affine, [n // 2 for n in _solid(values).shape], values.ndim < 3)
        )

    return SHELF.get(("thumbnail", *map(_state, paths), json.dumps(reading, sort_keys=True)), make)


def _solid(values: np.ndarray) -> np.ndarray:
    return values.reshape(*values.shape, *(1,) * (3 - values.ndim))


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def _turned(
    values: np.ndarray, affine: np.ndarray, place: Sequence[int]
) -> tuple[np.ndarray, list[int], list[float]]:
    """Axes in the order right, front, up, as far as the affine says so."""
    main = np.abs(affine[:3, :3])
    order = [int(np.argmax(main[row])) for row in range(3)]
    if sorted(order) != [0, 1, 2]:
        order = [0, 1, 2]
    place, turned = [place[a] for a in order], np.moveaxis(values, order, (0, 1, 2))
    for axis, source in enumerate(order):
        if affine[axis, source] < 0:
            turned = np.flip(turned, axis)
            place[axis] = turned.shape[axis] - 1 - place[axis]
    spacing = [float(np.linalg.norm(affine[:3, a])) or 1.0 for a in order]
    return turned, place, spacing


def _planes(values: np.ndarray, affine: np.ndarray, place: Sequence[int], flat: bool) -> np.ndarray:
    """Three planes (rows, columns, 3) of bytes of a coloured volume; the right of a patient is on the left."""
    if flat or display.is_flat(values.shape[:3]):
        shown = values[:, :, 0] if flat else values[:, :, values.shape[2] // 2]
        return _sized(shown if flat else np.rot90(shown), (1.0, 1.0))
    turned, at, mm = _turned(values, affine, place)
    axial = np.flipud(np.swapaxes(turned[::-1, :, at[2]], 0, 1))
    coronal = np.flipud(np.swapaxes(turned[::-1, at[1], :], 0, 1))
    sagittal = np.flipud(np.swapaxes(turned[at[0], ::-1, :], 0, 1))
    parts = [_sized(axial, (mm[1], mm[0])), _sized(coronal, (mm[2], mm[0])), _sized(sagittal, (mm[2], mm[1]))]
    return np.concatenate(parts, axis=1)


def _sized(picture: np.ndarray, mm: tuple[float, float]) -> np.ndarray:
    """A plane in a square, as large as fits, with pixels as wide as high."""
    tall, wide = picture.shape[0] * mm[0], picture.shape[1] * mm[1]
    scale = SIDE / max(tall, wide)
    rows, columns = max(1, round(tall * scale)), max(1, round(wide * scale))
    up = np.minimum(np.arange(rows) * picture.shape[0] // rows, picture.shape[0] - 1)
    across = np.minimum(np.arange(columns) * picture.shape[1] // columns, picture.shape[1] - 1)
    square = np.zeros((SIDE, SIDE, 3), np.uint8)
    top, left = (SIDE - rows) // 2, (SIDE - columns) // 2
    square[top : top + rows, left : left + columns] = np.round(255 * np.clip(picture[up][:, across], 0, 1))
    return square


# --- Maps -------------------------------------------------------------------------------------------------


def of_map(path: Path, anatomy: Path | None) -> bytes:
    """Return a map in colour over its image, in three planes through where it has most."""

    def make() -> bytes:
        with _ONE:
            values, affine = display.read(path)
            under = np.zeros_like(values)
            if anatomy is not None:
                image, _ = display.read(anatomy)
                under = scenes.window(image) if image.shape == values.shape else under
            at = scenes.strongest([values], under if under.any() else None)
            scale = colours.Scale("signed", scenes.limit_of(values) or 1.0)
            drawn = _MapVolume(values, under, scale)
            return png(drawn.planes(affine, at))

    return SHELF.get(("map", _state(path), anatomy and _state(anatomy)), make)


class _MapVolume:
    """A map that is coloured plane by plane: a volume of colours would take twelve times the memory."""

    def __init__(self, values: np.ndarray, under: np.ndarray, scale: colours.Scale) -> None:
        self.both, self.scale = np.stack([values, under], axis=-1), scale

    def planes(self, affine: np.ndarray, at: Sequence[int]) -> np.ndarray:
        if display.is_flat(self.both.shape[:3]):
            return _sized(self._coloured(np.rot90(self.both[:, :, self.both.shape[2] // 2])), (1.0, 1.0))
        turned, place, mm = _turned(self.both, affine, at)
        flats = (
            (turned[::-1, :, place[2]], (mm[1], mm[0])),
            (turned[::-1, place[1], :], (mm[2], mm[0])),
            (turned[place[0], ::-1, :], (mm[2], mm[1])),
        )
        return np.concatenate(
            [_sized(self._coloured(np.flipud(np.swapaxes(flat, 0, 1))), size) for flat, size in flats], axis=1
        )

    def _coloured(self, flat: np.ndarray) -> np.ndarray:
        return colours.blend(flat[..., 0], self.scale, np.repeat(flat[..., 1:], 3, axis=-1))


def copy(path: Path, kind: str, level: str, anatomy: Path | None = None) -> tuple[bytes, dict[str, Any]]:
    """Return a display copy of a volume as gzipped NIfTI of whole numbers, and what its numbers are.

    Args:
        path: of a NIfTI file.
        kind: "map", "anatomy", or "mask".
        level: "preview", a few voxels at once, or "fine".
        anatomy: the image that a map lies on.
    """

    def make() -> bytes:
        with _ONE:
            values, affine = display.read(path)
            most = LEVELS[level]
            if kind == "map":
                image = None if anatomy is None else display.read(anatomy)[0]
                made = display.of_map(values, affine, most, image)
            elif kind == "anatomy":
                made = display.of_anatomy(values, affine, most)
            else:
                made = display.of_labels(values, affine, most)
        head = {k: v for k, v in made._asdict().items() if k != "text"}
        return json.dumps(head).encode() + b"\n" + base64.b64decode(made.text)

    about, _, content = SHELF.get(("copy", _state(path), kind, level), make).partition(b"\n")
    return content, json.loads(about)
