"""Arrays of NumPy, and PNG and JPEG pictures."""

import io
import math
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from esegeta.engine import check
from esegeta.engine.refusals import one_line
from esegeta.run.volumes.reading import (
    WHERE,
    UnreadableInput,
    Volume,
    fits,
    opaque,
    refused,
    scaled,
    shown,
    volume_of,
)

SUFFIXES = (".png", ".jpg", ".jpeg")
# Rows go down and columns right where x points right and y up, so that viewers show it upright.
AFFINE = np.array([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
_PIXELS_PER_BYTE = 10_000  # one-bit pixels, deflated


def read_npy(path: Path, channels: str | None, memory: int | None) -> Volume:
    """Return what numpy.save has written, if it is an array of real numbers. memory: in bytes, that this may take."""
    with path.open("rb") as stream:
        start = stream.read(12)
        wide = start[6:7] != b"\x01"
        known = start[:6] == b"\x93NUMPY" and start[6:7] in (b"\x01", b"\x02", b"\x03") and len(start) == 12
        size = struct.unpack("<I" if wide else "<H", start[8 : 12 if wide else 10])[0] if known else 0
        if not known or size > 10_000:
            advice = "Save it with numpy.save"
            raise refused(path, "an array of NumPy", f"a file that begins with {start[:8]!r}", advice)
        begin = size + (12 if wide else 10)
        stream.seek(0)
        kind, turned, shape = _npy_header(path, stream.read(begin)[-size:].decode("latin-1"))
        room = path.stat().st_size - begin
        if math.prod(shape) * kind.itemsize > room:
            got = f"shape {shape}, where {room} bytes are left"
            raise refused(path, "a whole array of NumPy", got, "It is cut off or damaged: copy it again")
        fits(path, math.prod(shape) * (kind.itemsize + 2 * 4), memory)
        raw = np.fromfile(stream, dtype=kind, count=math.prod(shape))
    data = scaled(raw, 1.0, 0.0).reshape(shape, order="F" if turned else "C")
    if channels is None and data.ndim > 2:
        advice = 'Say which axis is channels: channels="first", "last" or "none"'
        raise refused(path, "an array with two axes, or explained ones", f"shape {shape}", advice)
    data = np.moveaxis(data, -1, 0) if channels == "last" else data if channels == "first" else data[None]
    if not 2 <= data.ndim <= 4 or not data.size:
        got = f"shape {shape}"
        raise refused(path, "an array with one to three axes of space", got, "Save one volume, with voxels")
    return volume_of(data, np.eye(4), path, units="unknown")


def _npy_header(path: Path, text: str) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    """What numpy.save writes, and nothing else: no expression of the file is evaluated."""
    descr = re.search(r"'descr': *'([<>|=]?)([biuf])(\d{1,2})'", text)
    turned = re.search(r"'fortran_order': *(True|False)", text)
    shape = re.search(r"'shape': *\(((?:\d{1,18}, *)*(?:\d{1,18})?)\)", text)
    if not (descr and turned and shape):
        advice = "Save real numbers with numpy.save; objects and pickles are not opened"
        raise refused(path, "an array of real numbers", text.strip(), advice)
    try:
        kind = np.dtype("".join(descr.groups()))
    except TypeError as error:
        raise refused(path, "an array of real numbers", error, "Save it as float32") from error
    sizes = tuple(int(n) for n in shape[1].split(",") if n.strip())
    return kind, turned[1] == "True", sizes


def read_picture(path: Path, channels: str | None, memory: int | None) -> Volume:
    """Return rows and columns of pixels as any viewer shows them, with the values of the file."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        advice = 'Install it with pip install "esegeta[viz]"'
        text = check.problem(WHERE, f"Pillow, to read {shown(path)}", "no such package", advice)
        raise ModuleNotFoundError(text, name="PIL") from error
    if channels in ("first", "none"):
        advice = "Leave it out: pictures say which channels they have"
        raise refused(path, f"an array, where channels={channels!r}", "a picture", advice)
    fits(path, path.stat().st_size, memory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # From memory: of a file Pillow would ask for as many bytes as a damaged length claims.
            content = io.BytesIO(path.read_bytes())
            with Image.open(content, formats=("PNG", "JPEG")) as opened:
                width, height = opened.size
                # Pillow keeps the upper half of 16 bits of a colour, and says so only here.
                deep = opened.mode in ("RGB", "RGBA") and ";16" in str(opened.tile)
                claimed = width * height > _PIXELS_PER_BYTE * path.stat().st_size
                if not claimed:  # as it is decoded, as an array, and as float32 twice
                    fits(path, width * height * len(opened.getbands()) * (4 + 4 + 2 * 4), memory)
                picture = None if claimed else ImageOps.exif_transpose(opened)
                if picture is not None and picture.mode in ("1", "P"):
                    clear = "RGBA" if "transparency" in picture.info else "RGB"
                    picture = picture.convert("L" if picture.mode == "1" else clear)
                values = None if picture is None else np.array(picture)
    except UnreadableInput:
        raise
    except Exception as error:  # a damaged picture: its decoders raise of many kinds
        got = one_line(error) or type(error).__name__
        raise refused(path, "a whole PNG or JPEG picture", got, "Save it again") from error
    if picture is None or values is None:
        got = f"a header that claims {width} x {height} pixels"
        raise refused(path, "a whole PNG or JPEG picture", got, "Save it again")
    if deep:
        got = "16 bits for each colour"
        raise refused(path, "a picture with 8 bits for each colour", got, "Save it as NIfTI or .npy")
    if picture.mode not in ("L", "LA", "I", "I;16", "F", "RGB", "RGBA"):
        raise refused(path, "grey or RGB", f"a picture of mode {picture.mode}", "Convert it to RGB")
    planes = np.moveaxis(values.reshape(*values.shape[:2], -1), -1, 0)
    data = opaque(path, planes) if picture.mode in ("LA", "RGBA") else planes
    return volume_of(data, AFFINE.copy(), path, units="unknown", is_image=True)
