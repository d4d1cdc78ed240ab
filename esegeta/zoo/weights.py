"""Reads files of named tensors, without running anything that is in them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esegeta.engine import check
from esegeta.zoo.volumes import DATA

WHERE = "read_safetensors"
LITTLE_ENDIAN = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "?",
}


class OtherDtype(check.Refused):
    """A tensor of a type that numpy does not have: another reader may know it."""


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read tensors by name from a file in the safetensors format.

    The file is the length of a header (8 bytes, little-endian), the header (JSON: of each tensor the dtype,
    the shape and where its values begin and end), then the values, without gaps.

    Args:
        path: the file.

    Returns:
        Name to tensor; each owns its memory, on the CPU.

    Example:
        >>> import tempfile, torch
        >>> header = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        >>> values = torch.tensor([1.0, 2.0]).numpy().tobytes()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "w.safetensors"
        ...     _ = file.write_bytes(len(header).to_bytes(8, "little") + header + values)
        ...     read_safetensors(file)
        {'w': tensor([1., 2.])}

    Reference:
        https://github.com/huggingface/safetensors, "Format".
    """
    header, values = _parts(Path(path))
    entries = {name: _entry(name, fields) for name, fields in header.items() if name != "__metadata__"}
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise _problem(f"{name} to begin at byte {position}", begin, "The values overlap or have gaps")
        if end > len(values):
            raise _problem(
                f"{end} bytes of values or more, for {name}",
                len(values),
                "The file is truncated: copy it again",
            )
        position = end
    if position != len(values):
        raise _problem(f"{position} bytes of values", len(values), "The file does not end where it should")
    return {
        name: torch.from_numpy(np.ndarray(shape, dtype, values, begin).astype(dtype.newbyteorder("=")))
        for name, (dtype, shape, begin, _) in entries.items()
    }


def _parts(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise _problem(
            f"8 bytes of length and then a header of that length in {path.name}",
            f"a header of {length} bytes in a file of {len(content)} bytes",
            "The file is truncated or not in the safetensors format",
        )
    try:
        header = json.loads(content[8 : 8 + length], object_pairs_hook=_once)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _problem(
            f"a header in JSON in {path.name}", error, "The file is damaged or in another format"
        ) from error
    if not isinstance(header, dict):
        raise _problem(
            f"a header in {path.name} that maps names to tensors", header, "The file is in another format"
        )
    return header, content[8 + length :]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _problem("every name once in the header", [name for name, _ in pairs], "The file is damaged")
    return found


def _entry(name: str, fields: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise _problem(f"dtype, shape and data_offsets of {name}", fields, "The header is damaged")
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in LITTLE_ENDIAN:
        expected, advice = (
            f"{name} with a dtype out of {', '.join(LITTLE_ENDIAN)}",
            "Save it with another dtype",
        )
        raise OtherDtype(check.problem(WHERE, expected, str(fields["dtype"]), advice))
    dtype, shape, offsets = np.dtype(LITTLE_ENDIAN[fields["dtype"]]), fields["shape"], fields["data_offsets"]
    if not _counts(shape):
        raise _problem(f"the shape of {name} as a list of sizes", shape, "The header is damaged")
    if not _counts(offsets) or len(offsets) != 2:
        raise _problem(f"data_offsets [begin, end] of {name}", offsets, "The header is damaged")
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise _problem(
            f"{size} bytes for {name} with shape {shape}",
            offsets[1] - offsets[0],
            "Shape and data_offsets disagree",
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _problem(expected: str, got: object, advice: str) -> check.Refused:
    return check.Refused(check.problem(WHERE, expected, str(got), advice))


def trained(build: Callable[[], nn.Module], name: str) -> nn.Module:
    """Build a network with its shipped weights, in single precision and in eval mode."""
    with torch.device("meta"):  # draws no initial weights, so the global random state stays as it is
        net = build()
    weights = read_safetensors(DATA / f"{name}.safetensors")
    net.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, assign=True
    )
    return net.eval()
