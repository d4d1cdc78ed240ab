"""What every reader of files needs: the volume that it makes, and how it says that it cannot."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esegeta.engine import check
from esegeta.run import bounds

WHERE = "volumes.read"
BLOCK = 1 << 20
Array = np.ndarray


class UnreadableInput(ValueError):
    """A file that holds nothing that can be explained. The message is one line."""


class Volume(NamedTuple):
    """An image, where it lies, and what its file says about that.

    data: float32 of shape ``(C, *S)`` with one to three spatial axes, all values finite; affine: from voxel indices
    to mm, right-anterior-superior, 4 x 4 (with fewer spatial axes the indices that are missing are 0); spacing: mm
    per voxel along each axis of ``S``; units: of the affine in the file, "unknown" where it says nothing; header: of
    the first NIfTI file, else None; paths: the files; is_image: a picture, which lies nowhere in mm.
    """

    data: Tensor
    affine: Array
    spacing: tuple[float, ...]
    units: str = "mm"
    header: Any = None
    paths: tuple[Path, ...] = ()
    is_image: bool = False


def spacing_of(affine: Array, axes: int) -> tuple[float, ...]:
    """Return the length in mm of a step along each of the first axes.

    >>> spacing_of(np.diag([2.0, -3.0, 1.0, 1.0]), 2)
    (2.0, 3.0)
    """
    return tuple(float(mm) for mm in np.linalg.norm(affine[:3, :axes], axis=0))


def shown(text: object, most: int = 200) -> str:
    r"""Return text that may come from anywhere, safe to print on one line.

    >>> print(shown("a\nb\x1b[2J"))
    a\nb\x1b[2J
    """
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return line if len(line) <= most else line[: most // 2 - 2] + "..." + line[-most // 2 + 1 :]


def refused(path: Path, expected: str, got: object, advice: str) -> UnreadableInput:
    """Return the error for a file that is not as expected."""
    return UnreadableInput(check.problem(WHERE, f"{shown(path)} to be {expected}", shown(got), advice))


def fits(path: Path, need: int, memory: int | None) -> None:
    """Refuse a file before it is unpacked, if what its header says needs more memory than is allowed."""
    if memory is not None and need > memory:
        got = f"one that takes {bounds.size(need)} to read, where {bounds.size(memory)} are allowed"
        raise refused(path, "a volume that fits into memory", got, "Raise memory, or make the file smaller")


def volume_of(data: Array, affine: Array, path: Path, **rest: Any) -> Volume:
    """Return the volume of one file."""
    tensor = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
    return Volume(tensor, affine, spacing_of(affine, data.ndim - 1), paths=(path,), **rest)


def scaled(raw: Array, slope: float, inter: float) -> Array:
    """Return Float32, by blocks: the double precision in between takes no second volume of memory."""
    scaled = np.empty(raw.size, dtype=np.float32)
    with np.errstate(all="ignore"):  # what is too large becomes infinite, and is refused as such
        for start in range(0, raw.size, BLOCK):
            now = slice(start, start + BLOCK)
            plain = slope == 1 and inter == 0
            scaled[now] = raw[now] if plain else raw[now].astype(np.float64) * slope + inter
    return scaled


def opaque(path: Path, planes: Array) -> Array:
    """Return colours without their opacity, which is a second or fourth plane, if that is full everywhere."""
    if len(planes) in (1, 3):
        return planes
    if (planes[-1] != 255).any():
        advice = "Put it on a background first: what lies behind is not in the file"
        raise refused(path, "opaque", "a picture with transparent parts", advice)
    return planes[:-1]
