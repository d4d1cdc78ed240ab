"""What a run writes: maps where the image lies, tables and sidecars; each file whole or not there at all.

The same content gives the same bytes: no dates, no names of machines, no order that could change.
"""

import csv
import io
import json
import math
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.nifti1 import Nifti1Image
from nibabel.nifti2 import Nifti2Image
from torch import Tensor

from esegeta.engine import check
from esegeta.run.volumes.names import name
from esegeta.run.volumes.reading import Volume

__all__ = [
    "NO_FIGURES",
    "atomic",
    "dataset",
    "json_text",
    "keep_text",
    "name",
    "sweep",
    "write_bytes",
    "write_json",
    "write_map",
    "write_table",
    "write_text",
]

PART = ".part-"
_GEOMETRY = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
)
_LEVEL = (
    1  # of compression: maps of 64 MiB shrink by 3 % more at the highest one, which takes half as long again
)
_IGNORED = (
    *(
        "*_statmap.*",
        "*_mask.*",
        "*_desc-input.*",
        "*_projections.*",
        "*_montage.*",
        "*_overlay.*",
        "*_channels.*",
    ),
    *("*.png", "config.json", "log.txt", "summary.*", "channels.csv", "report.html", ".jobs/"),
)

NO_FIGURES = 'There are no figures: matplotlib is missing, pip install "esegeta[viz]".'


@contextmanager
def atomic(path: str | Path, size: int | None = None) -> Iterator[Path]:
    """Open a file that takes the place of ``path`` when all went well, and is gone if not.

    It lies in the same folder, which is made if need be, and has the same ending.

    Args:
        path: the file that shall be there.
        size: of it, in bytes, to be named if there is no room; None if that is not known.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic(f"{folder}/a/b.txt") as part:
        ...         _ = part.write_text("whole")
        ...     Path(f"{folder}/a/b.txt").read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(PART + secrets.token_hex(8) + "".join(path.suffixes)[-40:])
    try:
        yield part
        _flush(part)
        os.replace(part, path)
        with suppress(OSError):  # not every system can do it for folders
            _flush(path.parent)
    except OSError as error:
        if error.filename is not None:  # it names its file by itself
            raise
        raise check.not_written(path, size, error) from error
    finally:
        part.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the disk hold it, so that a file with its name has its content even after a power cut."""
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sweep(folder: str | Path) -> int:
    """Remove what killed processes have left half-written below a folder; how many files that were.

    To be called while nothing is written there.
    """
    parts = [path for path in Path(folder).rglob(f"{PART}*") if path.is_file()]
    for path in parts:
        path.unlink(missing_ok=True)
    return len(parts)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file as a whole."""
    with atomic(path, len(content)) as part:
        part.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, lines ending as they do in it."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def keep_text(path: str | Path, text: str) -> None:
    """Write a text, unless it is there already: an unchanged file keeps its date."""
    with suppress(OSError, ValueError):
        if Path(path).read_text(encoding="utf-8") == text:
            return
    write_text(path, text)


# -- maps ------------------------------------------------------------------------------------------------------


def write_map(
    map: Tensor,
    like: Volume,
    path: str | Path,
    *,
    description: str = "",
    holes: bool = False,
) -> None:
    r"""Write a map as NIfTI where the image lies: its affine, the codes of its sform and qform, its units.

    Args:
        map: (K,\*S), finite, with the spatial shape of the image; one channel has the axes of space only, several are
            the fourth axis. Floating values are written as float32, booleans as uint8, integers as int32.
        like: the image, from ``volumes.read``.
        path: ending in .nii or .nii.gz.
        description: up to 79 signs for the header.
        holes: whether NaN may stand for what was not computed.
    """
    values = _checked(map, like, holes)
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        expected = "a path ending in .nii or .nii.gz"
        raise check.refused("write_map", expected, repr(str(path)), "Add .nii.gz")
    channels, *grid = values.shape
    shape = grid if channels == 1 else [*grid, *(1,) * (3 - len(grid)), channels]
    stored = np.moveaxis(values, 0, -1).reshape(shape)
    kind: Any = Nifti1Image if max(shape) < 2**15 else Nifti2Image
    image = kind(stored, None, dtype=stored.dtype)
    _place(image, like)
    ascii_only = description.encode("ascii", "replace").decode()
    image.header["descrip"] = "".join(c if c.isprintable() else " " for c in ascii_only)[:79]
    content = image.to_bytes()
    write_bytes(path, zipped(content) if path.name.endswith(".gz") else content)


def _checked(map: Tensor, like: Volume, holes: bool) -> Any:
    check.tensor("write_map", "map", map)
    if map.ndim < 2 or map.shape[1:] != like.data.shape[1:] or not len(map):
        expected = f"a map (K,*S) on the grid of the image, S = {tuple(like.data.shape[1:])}"
        advice = "Bring it there with Prepared.back"
        raise check.refused("write_map", expected, check.describe(map), advice)
    if map.is_complex():
        raise check.refused_type("write_map", "real values", check.describe(map), "Take its magnitude")
    map = map.detach().cpu()
    if not map.is_floating_point():
        return map.numpy().astype(np.uint8 if map.dtype in (torch.bool, torch.uint8) else np.int32)
    values = map.to(torch.float32)
    known = torch.nan_to_num(values, posinf=torch.inf, neginf=-torch.inf) if holes else values
    check.finite("write_map", "map", known, "A map with holes would look like one without: find the cause")
    return values.numpy()


def _place(image: Any, like: Volume) -> None:
    """Say in the header what the header of the image says of its place, to the last bit."""
    header = image.header
    if like.header is None:
        header.set_xyzt_units("unknown" if like.units == "unknown" else "mm")
        image.set_sform(like.affine, code="aligned")
        image.set_qform(like.affine, code="unknown")
        return
    for field in _GEOMETRY:
        header[field] = like.header[field]
    header["pixdim"][:4] = like.header["pixdim"][:4]
    header["xyzt_units"] = int(like.header["xyzt_units"]) & 7  # of space; time is another matter


def zipped(content: bytes) -> bytes:
    """Compress with gzip, without the date, the name and the kind of machine that its header has room for.

    >>> import gzip
    >>> gzip.decompress(zipped(b"abc"))
    b'abc'
    """
    press = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    start = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
    end = struct.pack("<II", zlib.crc32(content), len(content) & 0xFFFFFFFF)
    return start + press.compress(content) + press.flush() + end


# -- text ------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """What JSON has a word for; it has none for NaN and infinity, which become null."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | os.PathLike):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def json_text(value: Any) -> str:
    """Return sorted, indented JSON that every reader takes; the same for the same content.

    >>> print(json_text({"b": (1.5, float("nan")), "a": Path("x")}), end="")
    {
      "a": "x",
      "b": [
        1.5,
        null
      ]
    }
    """
    return json.dumps(_plain(value), indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"


def write_json(path: str | Path, value: Any) -> None:
    """Write a sidecar or a record."""
    write_text(path, json_text(value))


def table_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return a CSV table with a header.

    A cell of text that a spreadsheet would take for a formula gets an apostrophe in front.

    Args:
        rows: values by the name of their column; what is missing or None is an empty cell.
        columns: which, in order; without it all, in the order in which the rows name them first.

    Example:
        >>> print(table_text([{"name": "a", "score": 0.5}, {"name": "=b", "note": "x, y"}]), end="")
        name,score,note
        a,0.5,
        '=b,,"x, y"
    """
    header = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, header))
    writer.writerows([_cell(_plain(row.get(column))) for column in header] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, list | dict):
        value = json.dumps(value, sort_keys=True)
    return "'" + value if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value


def write_table(
    path: str | Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """Write a CSV table, see ``table_text``."""
    write_text(path, table_text(rows, columns))


def dataset(folder: str | Path, *, title: str, version: str) -> None:
    """Make a folder a derived dataset of BIDS: what it is, made by what, and which files BIDS has no names for.

    Args:
        folder: of the run.
        title: what is explained, in words.
        version: of the package.
    """
    made_by = [{"Name": "esegeta", "Version": version}]
    about = {"Name": title, "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": made_by}
    keep_text(Path(folder) / "dataset_description.json", json_text(about))
    keep_text(Path(folder) / ".bidsignore", "".join(f"{line}\n" for line in _IGNORED))
