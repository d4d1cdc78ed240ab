"""Files become volumes: NIfTI, NumPy arrays and pictures, with the place of every voxel in mm."""

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esegeta.engine import check
from esegeta.run import bounds
from esegeta.run.volumes import nifti, pictures
from esegeta.run.volumes.reading import WHERE, UnreadableInput, Volume, refused, shown

__all__ = ["SUFFIXES", "UnreadableInput", "Volume", "expand", "files_of", "glob", "read", "suffix_of"]

SUFFIXES = (*nifti.SUFFIXES, ".npy", *pictures.SUFFIXES)


def read(
    paths: str | Path | Iterable[str | Path],
    *,
    channels: str | None = None,
    frame: int | None = None,
    nan: float | int | None = None,
    memory: int | None = None,
) -> Volume:
    r"""Return one volume from one file, or from several files that hold its channels.

    Values are scaled as the file asks for (``scl_slope``, ``scl_inter``) and become float32. The first three axes
    of NIfTI are space, by its definition; what a fourth one is must be said. Nothing is guessed.

    Args:
        paths: .nii, .nii.gz, .hdr or .img (either of the pair), .npy, .png, .jpg; several must share one grid.
        channels: which axis of a file holds channels: "last" (NIfTI: the fourth; .npy), "first" (.npy) or "none".
            Without it one to three axes of NIfTI and one or two of .npy are space, and more are refused.
        frame: the one time point to take of NIfTI with four axes, from 0.
        nan: what takes the place of NaN and infinity; without it they are refused.
        memory: in bytes, what reading may take; a file whose header asks for more is refused before it is unpacked.
            At most, and without it, what the machine or the container has left.

    Returns:
        The volume, data of shape (C,\*S).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/a.npy", np.arange(6, dtype=np.int16).reshape(2, 3))
        ...     read(f"{folder}/a.npy").data.tolist()
        [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]

    Reference: Cox et al., A (sort of) new image data format standard: NIfTI-1, NeuroImage 22, 2004.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]
    if not files:
        raise check.refused(WHERE, "at least one file", "none", "Name the files of one volume")
    if channels is not None:
        check.one_of(WHERE, "channels", channels, ("first", "last", "none"))
    if frame is not None:
        check.positive_count(WHERE, "frame", frame, 0)
        if channels is not None:
            got = f"channels={channels!r} and frame={frame}"
            advice = "The last axis is either channels or time"
            raise check.refused(WHERE, "channels or frame", got, advice)
    if nan is not None and (isinstance(nan, bool) or not math.isfinite(nan)):
        raise check.refused(WHERE, "nan to be a finite number", repr(nan), "Pass for example 0.0")
    limits = [limit for limit in (memory, bounds.available()) if limit is not None]
    parts: list[Volume] = []
    for path in files:
        taken = sum(part.data.nbytes for part in parts)
        left = max(0, min(limits) - taken) if limits else None
        parts.append(_finite(_file(path, channels, frame, left), nan))
    for part in parts[1:]:
        _same_grid(parts[0], part)
    return parts[0]._replace(data=torch.cat([part.data for part in parts]), paths=tuple(files))


def suffix_of(path: Path) -> str:
    """Return what a name ends with, in lower case, of the endings that are read; else the last one.

    >>> suffix_of(Path("a.b/head.T1.NII.GZ")), suffix_of(Path("a.b/notes.txt"))
    ('.nii.gz', '.txt')
    """
    name = path.name.lower()
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default=path.suffix.lower())


def files_of(path: str | Path) -> tuple[Path, ...]:
    """Return all files that are read for a name: two where it is one of a pair .hdr and .img, else the one.

    >>> [p.as_posix() for p in files_of("a/head.nii.gz")]
    ['a/head.nii.gz']
    """
    suffix = suffix_of(Path(path))
    paired = suffix in nifti.SUFFIXES and not suffix.startswith(".nii")
    return nifti.pair(Path(path)) if paired else (Path(path),)


# -- one file -----------------------------------------------------------------------------------------------------


def _file(path: Path, channels: str | None, frame: int | None, memory: int | None) -> Volume:
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        advice = "Convert it, DICOM for example with dcm2niix"
        raise refused(path, f"one of {', '.join(SUFFIXES)}", f"a file that ends with {suffix!r}", advice)
    _exists(path)
    try:
        if suffix in nifti.SUFFIXES:
            return nifti.read_nifti(path, suffix, channels, frame, memory)
        if frame is not None:
            advice = "Use channels= for the axes of arrays, and leave out frame="
            raise refused(path, "NIfTI, where frame= is given", f"a {suffix} file", advice)
        return (
            pictures.read_npy(path, channels, memory)
            if suffix == ".npy"
            else pictures.read_picture(path, channels, memory)
        )
    except OSError as error:
        advice = "Check the file and its permissions"
        raise refused(path, "readable", error.strerror or error, advice) from error
    except MemoryError as error:
        advice = "Resample the file, or use a machine with more memory"
        raise refused(path, "small enough for this machine", "no memory for it", advice) from error


def _exists(path: Path) -> None:
    """Anything but a regular file is refused before it is opened: a pipe would wait for ever."""
    try:
        there, regular = path.exists(), path.is_file()
    except (OSError, ValueError) as error:
        raise refused(
            path, "a file", getattr(error, "strerror", None) or error, "Check the name and the permissions"
        ) from error
    if not regular:
        got = "a folder" if path.is_dir() else "something that is not a file" if there else "no such file"
        raise refused(path, "a file", got, "Check the name, and where it is relative to")


def _finite(volume: Volume, nan: float | int | None) -> Volume:
    if volume.data.sum(dtype=torch.float64).isfinite() and volume.data.isfinite().all():
        return volume
    bad = ~volume.data.isfinite()
    if nan is None:
        got = f"{int(bad.sum())} NaN or infinite of {bad.numel()}"
        raise refused(volume.paths[0], "finite everywhere in float32", got, "Replace them with nan = 0.0")
    return volume._replace(data=volume.data.masked_fill(bad, float(nan)))


def _same_grid(first: Volume, other: Volume) -> None:
    """Voxels of the same index are at the same place, to a hundredth of a voxel."""
    shape, grid = tuple(other.data.shape[1:]), tuple(first.data.shape[1:])
    expected = f"on the grid of {shown(first.paths[0])}"
    advice = "Resample one onto the other first: channels of one voxel must show one place"
    if shape != grid:
        raise refused(other.paths[0], f"{expected}, shape {grid}", f"shape {shape}", advice)
    corners = np.array([*np.ndindex(*(2,) * len(grid))]) * (np.array(grid) - 1)
    away = ((other.affine - first.affine)[:3, : len(grid)] @ corners.T).T + (other.affine - first.affine)[
        :3, 3
    ]
    apart = float(np.linalg.norm(away, axis=1).max())
    if not apart <= 0.01 * min(first.spacing):
        raise refused(other.paths[0], expected, f"corners up to {apart:.4g} mm apart", advice)


# -- many files ---------------------------------------------------------------------------------------------------


def glob(pattern: str | Path, folder: str | Path = ".") -> list[Path]:
    """Return the files that a pattern matches, sorted by name; a file of that very name wins over a pattern.

    Args:
        pattern: with ``*``, ``?``, ``[...]`` and ``**``, relative to the folder; or the name of a file.
        folder: where patterns begin.

    Returns:
        At least one path. Of a pair .hdr and .img the header stands for both.
    """
    import glob as shell

    pattern = Path(os.path.expanduser(pattern))
    whole = Path(folder) / pattern
    try:
        if whole.is_file():
            return [whole]
        found = [Path(folder) / p for p in shell.glob(str(pattern), root_dir=folder, recursive=True)]
    except (OSError, ValueError):
        found = []
    files = sorted({p for p in found if p.is_file()})
    names = {str(p).lower() for p in files}
    twin = {str(p): re.sub(r"\.img(\.gz)?$", r".hdr\1", str(p).lower()) for p in files}
    files = [p for p in files if twin[str(p)] == str(p).lower() or twin[str(p)] not in names]
    if not files:
        advice = "Check the pattern, and the folder that it is relative to"
        text = check.problem("volumes.glob", f"a file that matches {shown(whole)}", "none", advice)
        raise UnreadableInput(text)
    return files


def expand(files: str | Path | Sequence[Any], folder: str | Path = ".") -> list[tuple[Path, ...]]:
    """Return the volumes that a configuration names, each as the files of its channels.

    Args:
        files: a pattern; or a list with an entry for volumes: a pattern, whose files are volumes of one file each, or
            a list with a pattern for each channel, whose files belong together in the order of their names.
        folder: where patterns begin.

    Returns:
        At least one tuple of paths, all with the same number of channels' files as their entry names.
    """
    entries: list[Any] = [files] if isinstance(files, str | Path) else list(files)
    if not entries:
        raise check.refused("volumes.expand", "at least one file", "none", "Name the inputs")
    volumes: list[tuple[Path, ...]] = []
    for entry in entries:
        columns = [glob(pattern, folder) for pattern in ([entry] if isinstance(entry, str | Path) else entry)]
        counts = [len(column) for column in columns]
        if not counts or len(set(counts)) > 1:
            got = f"{counts} for {shown([str(pattern) for pattern in entry])}"
            advice = "Each pattern must find one file for each volume"
            text = check.problem("volumes.expand", "as many files of each channel", got, advice)
            raise UnreadableInput(text)
        volumes += zip(*columns, strict=True)
    for volume in volumes:
        people = {m[0] for path in volume if (m := re.search(r"sub-[A-Za-z0-9]+", path.name))}
        if len(people) > 1:
            got = ", ".join(sorted(people))
            advice = "Sorted by name the files of the channels must belong together"
            text = check.problem("volumes.expand", "channels of one subject", got, advice)
            raise UnreadableInput(text)
    return volumes
