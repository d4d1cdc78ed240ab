"""Copies of volumes and figures that are small enough to travel inside of a report."""

import base64
import gzip
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.nifti1 import Nifti1Image

from esegeta.plot import grids as scenes
from esegeta.run.volumes import grids

LEVELS = 60  # steps from zero to the end of the colour scale
SMALLEST = 40  # voxels: no axis of a copy gets shorter than this


class Copy(NamedTuple):
    """A volume for the viewer: whole numbers, ``step`` times which are its values.

    text: gzipped NIfTI in base 64; shape: of the copy; full: of the file; end: of the scale, in steps; largest: the
    largest size of a value of the file; peak: where the map has most, in mm.
    """

    text: str
    shape: tuple[int, ...]
    full: tuple[int, ...]
    step: float
    end: int
    largest: float
    peak: tuple[float, ...]


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the values of a NIfTI file, channels added up, and its affine."""
    image = Nifti1Image.from_filename(path)
    values = np.asarray(image.dataobj, dtype=np.float32)
    if values.ndim > 3:
        values = values.reshape(*values.shape[:3], -1).sum(-1)
    affine = image.affine
    if affine is None:
        affine = np.eye(4)
    return values.reshape(*values.shape, *(1,) * (3 - values.ndim)), np.asarray(affine, dtype=np.float64)


def is_flat(shape: tuple[int, ...]) -> bool:
    """Check whether a volume is one plane, line or voxel, of which a viewer in three planes shows nothing.

    >>> is_flat((64, 64, 1)), is_flat((64, 64, 2))
    (True, False)
    """
    return min(shape) == 1


def packed(values: np.ndarray, affine: np.ndarray) -> str:
    """Return whole numbers as gzipped NIfTI in base 64, the same text for the same volume."""
    image = Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    return base64.b64encode(gzip.compress(image.to_bytes(), 6, mtime=0)).decode()


def resampled(
    values: np.ndarray, affine: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume on fewer voxels that cover the same space: each is a mean of what lies there.

    >>> small, affine = resampled(np.ones((4, 4, 4), np.float32), np.eye(4), (2, 2, 2))
    >>> small.min().item(), affine[0].tolist()
    (1.0, [2.0, 0.0, 0.0, 0.5])
    """
    ratio = [n / m for n, m in zip(values.shape, shape, strict=True)]
    matrices = [grids.weights(n, m, r, "linear") for n, m, r in zip(values.shape, shape, ratio, strict=True)]
    return grids.weighted(values[None], matrices)[0], grids.centred(affine, values.shape, shape, ratio)


def _smaller(shape: tuple[int, ...], share: float) -> tuple[int, ...]:
    """A shape with about this share of the voxels."""
    return tuple(max(min(n, SMALLEST), int(n * share ** (1 / 3))) for n in shape)


def _fitted(values: np.ndarray, affine: np.ndarray, most: int, quantised: Any) -> tuple[str, tuple[int, ...]]:
    """The finest copy whose text is at most so long, as far as sizes go."""
    if max(values.shape) > 256:
        values, affine = resampled(values, affine, tuple(min(n, 256) for n in values.shape))
    full, known = values, affine
    text = packed(quantised(values), affine)
    for _ in range(6):
        shape = _smaller(values.shape, 0.95 * most / len(text))
        if len(text) <= most or shape == values.shape:
            break
        values, affine = resampled(full, known, shape)
        text = packed(quantised(values), affine)
    return text, values.shape


def of_map(values: np.ndarray, affine: np.ndarray, most: int, anatomy: np.ndarray | None = None) -> Copy:
    """Copy a map: the colour scale in ``LEVELS`` steps to either side of zero, what is beyond it clipped.

    Args:
        values: ``(*S)``, three axes.
        affine: from voxels to mm.
        most: how long its text may be, in bytes, if that is possible.
        anatomy: ``(*S)``: the place where the map has most is looked for where this is not dark.
    """
    clean = np.nan_to_num(values, posinf=0, neginf=0)
    end = scenes.limit_of(values) or 1.0
    step = end / LEVELS

    def quantised(volume: np.ndarray) -> np.ndarray:
        return np.clip(np.round(volume / step), -32767, 32767).astype(np.int16)

    text, shape = _fitted(clean, affine, most, quantised)
    if anatomy is not None and anatomy.shape != values.shape:
        anatomy = None
    within = None if anatomy is None else scenes.window(anatomy)
    peak = affine @ [*scenes.strongest([clean], within), 1.0]
    largest = float(np.abs(clean).max())
    where = tuple(round(float(mm), 2) for mm in peak[:3])
    return Copy(text, shape, values.shape, step, LEVELS, largest, where)


def centre(where: np.ndarray, affine: np.ndarray) -> tuple[float, ...]:
    """Return the place in a mask ``(*S)`` that is nearest to its centre of mass, in mm: it lies inside.

    >>> centre(np.array([[[True, False, True, True, False]]]), np.eye(4))
    (0.0, 0.0, 2.0)
    """
    voxels = np.argwhere(where)
    if not len(voxels):
        voxels = np.array([[(n - 1) / 2 for n in where.shape]])
    inside = voxels[((voxels - voxels.mean(0)) ** 2).sum(1).argmin()]
    place = affine @ [*inside, 1.0]
    return tuple(round(float(mm), 2) for mm in place[:3])


def of_anatomy(values: np.ndarray, affine: np.ndarray, most: int) -> Copy:
    """Copy an image in 256 shades of grey, windowed as the figures are."""
    seen = scenes.window(values)

    def quantised(volume: np.ndarray) -> np.ndarray:
        return np.round(255 * volume).astype(np.uint8)

    text, shape = _fitted(seen, affine, most, quantised)
    return Copy(text, shape, values.shape, 1 / 255, 255, float(np.nanmax(values)), (0.0, 0.0, 0.0))


def of_outline(values: np.ndarray, affine: np.ndarray, most: int) -> Copy:
    """Copy the outermost voxels of a mask, which hide nothing of what lies inside."""
    from scipy.ndimage import binary_erosion

    def quantised(volume: np.ndarray) -> np.ndarray:
        mask = volume >= 0.5
        return (mask & ~binary_erosion(mask, border_value=1)).astype(np.uint8)

    text, shape = _fitted((values > 0).astype(np.float32), affine, most, quantised)
    return Copy(text, shape, values.shape, 1.0, 1, 1.0, (0.0, 0.0, 0.0))


def of_labels(values: np.ndarray, affine: np.ndarray, most: int) -> Copy:
    """Return a copy of a map of labels: whole numbers, of fewer voxels the one that is in the middle of each."""
    labels = np.nan_to_num(values).astype(np.uint8)
    full, place = labels.shape, affine
    for _ in range(6):
        text = packed(labels, place)
        if len(text) <= most or max(labels.shape) <= SMALLEST:
            break
        steps = tuple(2 if n > SMALLEST else 1 for n in labels.shape)
        labels = labels[tuple(slice(step // 2, None, step) for step in steps)]
        move = np.diag([*map(float, steps), 1.0])
        move[:3, 3] = [step // 2 for step in steps]
        place = place @ move
    largest = int(labels.max(initial=0))
    return Copy(text, labels.shape, full, 1.0, max(1, largest), float(largest), (0.0, 0.0, 0.0))


def small(values: np.ndarray, affine: np.ndarray, most: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume on at most so many voxels a side."""
    if max(values.shape) <= most:
        return values, affine
    shape = tuple(min(n, most) for n in values.shape)
    copy, where = resampled(np.nan_to_num(values), affine, shape)
    holes = np.isnan(values)
    if holes.any():  # what is not known anywhere within a voxel is not known of it
        copy = np.where(resampled(holes.astype(np.float32), affine, shape)[0] > 0, np.nan, copy)
    return copy, where


def picture(content: bytes, quality: int = 80) -> tuple[str, int, int]:
    """Return a picture as the address of an image, with its width and height: WebP if that can be, else PNG.

    Args:
        content: of a PNG file.
        quality: of the WebP copy.
    """
    try:
        from PIL import Image, features

        image = Image.open(io.BytesIO(content))
        width, height = image.size
        if not features.check("webp"):
            raise ImportError
        out = io.BytesIO()
        image.convert("RGB").save(out, "webp", quality=quality, method=2)
        return _address("webp", out.getvalue()), width, height
    except ImportError:
        # The header of a PNG file: its width and height follow the name of the first chunk.
        if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
            raise ValueError("no PNG file") from None
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        return _address("png", content), width, height


def figure(path: Path, most: int | None = None) -> tuple[str, int, int]:
    """Return the picture in a PNG file; at most so many bytes of text if lower quality can do that."""
    content = path.read_bytes()
    found = picture(content)
    for quality in (60, 40, 20):
        if most is None or len(found[0]) <= most:
            break
        found = picture(content, quality)
    return found


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
