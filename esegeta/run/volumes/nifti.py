"""NIfTI-1 and NIfTI-2, alone or as a pair, packed or not: every field is checked before it is believed."""

import gzip
import io
import logging
import math
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from esegeta.engine.refusals import one_line
from esegeta.run.volumes.reading import BLOCK, Array, Volume, fits, opaque, refused, scaled, volume_of

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz")
MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}

_FAR = 1e9  # mm

# Nothing that deflate has packed grows by more; a header that claims more than that is damaged.
_DEFLATE = 1032

_SILENT = logging.Logger(
    "esegeta.run.volumes.nifti"
)  # outside the tree of loggers: nothing reaches the terminal
_SILENT.addHandler(logging.NullHandler())


def read_nifti(
    path: Path, suffix: str, channels: str | None, frame: int | None, memory: int | None
) -> Volume:
    """Return the volume in one file or pair of files; ``suffix`` says which. memory: in bytes, that this may take."""
    single = suffix.startswith(".nii")
    if channels == "first":
        advice = 'Use channels="last": the first three axes of NIfTI are space'
        raise refused(path, "an array, where channels='first'", "NIfTI", advice)
    head, body = (path, path) if single else pair(path)
    with _opened(head) as stream:
        header = _header(head, _read(head, stream, 540, 348), single)
    affine, units = _affine(head, header)
    grid, count = _grid(head, header, channels, frame)
    kind, planes = _kind(head, header, count)
    voxels = math.prod(grid)
    offset = _offset(head, header, single) + (frame or 0) * voxels * kind.itemsize
    slope, inter = _scale(head, header)
    size = voxels * count * kind.itemsize
    _holds(body, offset + size)
    fits(path, size + 2 * 4 * voxels * (planes if kind.fields else count), memory)
    raw = np.frombuffer(_voxels(body, offset, size), dtype=kind)
    if kind.fields:
        flat = opaque(path, raw.view(np.uint8).reshape(voxels, planes).T)
    else:
        flat = scaled(raw, slope, inter).reshape(count, voxels)
    data = np.empty((len(flat), *grid), dtype=np.float32)
    for channel, values in zip(data, flat, strict=True):
        channel[...] = values.reshape(grid, order="F")
    return volume_of(data, affine, path, units=units, header=header)


def pair(path: Path) -> tuple[Path, Path]:
    """Return the header and the voxels of a pair of files, whichever was named."""
    stem = re.sub(r"\.(hdr|img)(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    found = []
    for ending in (".hdr", ".img"):
        names = [
            stem + spelled + packed for packed in ("", ".gz", ".GZ") for spelled in (ending, ending.upper())
        ]
        there = [path.with_name(name) for name in names if path.with_name(name).is_file()]
        if not there:
            raise refused(path, "one of a pair .hdr and .img", f"no {stem}{ending}", "Put both in one folder")
        found.append(path if path in there else there[0])
    return found[0], found[1]


def _opened(path: Path) -> io.BufferedIOBase:
    with path.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    if packed == path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb") if packed else path.open("rb")
    if packed:
        raise refused(path, "NIfTI as its name says", "a gzip file", "Rename it to end with .gz")
    raise refused(path, "a gzip file as its name says", "something else", "Copy it again, or drop .gz")


def _read(path: Path, stream: io.BufferedIOBase, most: int, least: int) -> bytearray:
    """Bytes from here on. What is kept grows with what is there, not with what a header claims."""
    taken = bytearray()
    try:
        while len(taken) < most and (piece := stream.read(min(BLOCK, most - len(taken)))):
            taken += piece
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        advice = "It is cut off or damaged: copy it again"
        raise refused(path, "a whole gzip file", one_line(error), advice) from error
    if len(taken) < least:
        got = f"{len(taken)} of {least} bytes"
        raise refused(path, "a whole NIfTI file", got, "It is cut off or damaged: copy it again")
    return taken


def _holds(path: Path, size: int) -> None:
    """Refuse a header that asks for more than can be in the file."""
    room = path.stat().st_size
    if path.name.lower().endswith(".gz"):
        room *= _DEFLATE
    if size > room:
        got = f"a header that asks for {size} bytes where at most {room} can be"
        raise refused(path, "a whole NIfTI file", got, "It is cut off or damaged: copy it again")


def _voxels(path: Path, offset: int, size: int) -> bytearray:
    with _opened(path) as stream:
        _skip(path, stream, offset)
        taken = _read(path, stream, size, size)
        _read(path, stream, BLOCK, 0)  # gzip checks its sum at the end of the file only
    return taken


def _skip(path: Path, stream: io.BufferedIOBase, count: int) -> None:
    while count:
        count -= len(_read(path, stream, min(BLOCK, count), min(BLOCK, count)))


def _header(path: Path, block: bytearray, single: bool) -> Any:
    sizes = {struct.unpack(order + "i", block[:4])[0] for order in "<>"}
    kind = Nifti1Header if 348 in sizes else Nifti2Header if 540 in sizes else None
    if kind is None or len(block) < (size := kind.sizeof_hdr):
        raise refused(path, "NIfTI", f"a header that begins with {bytes(block[:4])!r}", "Convert it first")
    version = 1 if kind is Nifti1Header else 2
    magic = bytes(block[344:348] if version == 1 else block[4:8])
    wanted = f"n{'+' if single else 'i'}{version}\0".encode()
    if magic != wanted:
        advice = "Convert it with a tool that knows it; Analyze files do not say how they lie"
        raise refused(path, f"NIfTI with the magic {wanted!r}", repr(magic), advice)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = kind(bytes(block[:size]), check=False)
            header.check_fix(logger=_SILENT, error_level=40)
    except Exception as error:  # a damaged header: nibabel raises of many kinds
        got = one_line(error) or type(error).__name__
        raise refused(path, "NIfTI with a header that holds", got, "Convert or repair it first") from error
    return header


def _affine(path: Path, header: Any) -> tuple[Array, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            affine = np.array(header.get_best_affine(), dtype=np.float64)
    except Exception as error:  # as above
        got = one_line(error) or type(error).__name__
        raise refused(path, "NIfTI with a place in space", got, "Set its sform or qform") from error
    try:
        units = header.get_xyzt_units()[0]
    except KeyError:
        units = "unknown"
    with np.errstate(all="ignore"):
        affine[:3] *= MILLIMETRES[units]
    advice = "Set its sform or qform"
    if not (np.abs(affine) < _FAR).all():
        got = f"the affine {affine[:3].tolist()}"
        raise refused(path, f"NIfTI with an affine of numbers below {_FAR:.0e} mm", got, advice)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # The volume of a voxel over that of a box with its edges: 1 without shear, 0 where space is folded flat.
    if not (lengths > 1 / _FAR).all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        got = f"the affine {affine[:3].tolist()}"
        raise refused(path, "NIfTI with an affine that can be inverted", got, advice)
    return affine, units


def _grid(path: Path, header: Any, channels: str | None, frame: int | None) -> tuple[tuple[int, ...], int]:
    """The spatial shape, and how many volumes of that shape are wanted."""
    axes = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : 1 + max(0, axes)])
    if not 1 <= axes <= 7 or min(shape) < 1:
        got = f"{axes} axes of {shape}"
        raise refused(path, "a volume with one to three axes of space", got, "Convert or repair it")
    grid, rest = shape[:3], [n for n in shape[3:] if n > 1]
    if len(rest) > 1:
        raise refused(
            path, "a volume with at most four axes", f"shape {shape}", "Split it into several files"
        )
    count = rest[0] if rest else 1
    if frame is not None and frame >= count:
        raise refused(path, f"a volume with a frame {frame}", f"{count} of them", "Frames count from 0")
    if count > 1 and frame is None and channels != "last":
        expected = "a volume with three axes, or with a fourth one that is explained"
        advice = 'Pass channels="last" if they are channels, frame=0 for one time point'
        raise refused(path, expected, f"shape {shape}", advice)
    return grid, count if frame is None else 1


def _kind(path: Path, header: Any, count: int) -> tuple[np.dtype[Any], int]:
    try:
        kind = header.get_data_dtype()
    except Exception as error:  # as above
        raise refused(path, "NIfTI with voxels of a known type", error, "Convert it to float32") from error
    name = header._data_type_codes.label[int(header["datatype"])]
    if kind.fields and count == 1:
        return kind, len(kind.fields)
    if kind.kind not in "iuf" or not kind.itemsize:
        advice = "Save the part that counts, for example the magnitude, as float32"
        raise refused(path, "a volume of real numbers", f"voxels of type {name}", advice)
    return kind, count


def _offset(path: Path, header: Any, single: bool) -> int:
    start, least = float(header["vox_offset"]), header.single_vox_offset if single else 0
    if start == 0:
        return least
    if not (math.isfinite(start) and start >= least and start == int(start)):
        got = f"voxels from byte {start}"
        raise refused(path, f"NIfTI with voxels from byte {least} or later", got, "Convert or repair it")
    return int(start)


def _scale(path: Path, header: Any) -> tuple[float, float]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):  # the standard's way to say: as stored
        return 1.0, 0.0
    if not math.isfinite(inter):
        raise refused(path, "NIfTI with a finite scl_inter", inter, "Set it to 0 in the header")
    return slope, inter
