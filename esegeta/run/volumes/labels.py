"""Label maps: whole numbers that name the part of each voxel, on the grid of an image or brought there."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esegeta.engine import check
from esegeta.run.volumes import files, names
from esegeta.run.volumes.reading import Array, UnreadableInput, Volume, shown

WHERE = "labels"
GRIDS = ("same", "nearest")
_FAR = 0.01  # of a voxel: two grids whose corners are closer than this are one


def read(path: str | Path, *, memory: int | None = None) -> Volume:
    """Return the label map in a file: one channel of whole numbers.

    Args:
        path: of any file that ``files.read`` reads.
        memory: in bytes, what reading may take.
    """
    array = files.suffix_of(Path(path)) == ".npy"  # of which three axes are not known to be space
    found = files.read(path, channels="none" if array else None, memory=memory)
    advice = "Save the labels as whole numbers, one file for each label map"
    if len(found.data) != 1:
        expected, got = f"{shown(path)} to be a label map of one channel", f"{len(found.data)} channels"
        raise UnreadableInput(check.problem(WHERE, expected, got, advice))
    broken = found.data != found.data.round()
    if bool(broken.any()):
        got = f"{float(found.data[broken][0]):.6g} among its values"
        raise UnreadableInput(check.problem(WHERE, f"{shown(path)} to hold whole numbers", got, advice))
    return found


def apart(labels: Volume, shape: Sequence[int], affine: Array) -> float | None:
    """Return by how many mm the corners of two grids differ at most, None if their shapes differ.

    Args:
        labels: a label map.
        shape: of the other grid.
        affine: of the other grid, 4 x 4.
    """
    if tuple(labels.data.shape[1:]) != tuple(shape):
        return None
    corners = np.array([*np.ndindex(*(2,) * len(shape))]) * (np.array(shape) - 1)
    difference = (labels.affine - affine)[:3]
    ends = corners @ difference[:, : len(shape)].T + difference[:, 3]
    return float(np.linalg.norm(ends, axis=1).max())


def onto(labels: Volume, shape: Sequence[int], affine: Array, grid: str = "nearest", key: str = "") -> Tensor:
    r"""Return a label map on another grid: at each voxel the label of the voxel that its centre lies in.

    Args:
        labels: from ``read``.
        shape: of the grid.
        affine: of the grid, from voxel indices to mm, 4 x 4.
        grid: "nearest" to take the nearest voxel, and 0 where the label map has none; "same" to refuse a label map
            that is on another grid, to a hundredth of a voxel.
        key: of the configuration that can say ``"nearest"``, for the advice.

    Returns:
        int64 of the shape of the grid.

    Example:
        >>> coarse = Volume(torch.tensor([[1.0, 2.0]]), np.diag([2.0, 1.0, 1.0, 1.0]), (2.0,))
        >>> fine = np.eye(4)
        >>> fine[0, 3] = -0.5  # the first two of its voxels lie in the first coarse one
        >>> onto(coarse, (5,), fine).tolist()
        [1, 1, 2, 2, 0]
    """
    distance = apart(labels, shape, affine)
    if distance is not None and distance <= _FAR * min(labels.spacing):
        return labels.data[0].long()
    if grid == "same":
        own = tuple(labels.data.shape[1:])
        got = f"shape {own}" if distance is None else f"corners up to {distance:.4g} mm apart"
        name = shown(labels.paths[0]) if labels.paths else "a label map"
        expected = f"{name} on the grid {tuple(shape)} of the image"
        advice = f'Write {key or "grid"} = "nearest" to have the nearest label taken, or resample the file'
        raise UnreadableInput(check.problem(WHERE, expected, got, advice))
    return _nearest(labels, shape, affine)


def _nearest(labels: Volume, shape: Sequence[int], affine: Array) -> Tensor:
    """Look up each voxel of a grid, one slab at a time: the places of a whole volume take six times its memory."""
    axes, own = len(shape), labels.data.shape[1:]
    way = np.linalg.inv(labels.affine) @ affine  # from indices there to indices here
    values = labels.data[0].numpy()
    found = np.zeros(tuple(shape), dtype=np.int64)
    rest = np.indices(tuple(shape[1:])).reshape(axes - 1, math.prod(shape[1:]))
    for first in range(shape[0]):
        places = way[:3, 3:] + way[:3, :1] * first + way[:3, 1:axes] @ rest
        index = np.floor(places + 0.5 + 1e-9).astype(
            np.int64
        )  # a centre between two voxels is the later one's
        size = np.array([*own, *(1,) * (3 - len(own))])[:, None]
        inside = ((index >= 0) & (index < size)).all(0)
        slab = np.zeros(rest.shape[1], dtype=np.int64)
        slab[inside] = values[tuple(index[: len(own), inside])].astype(np.int64)
        found[first] = slab.reshape(shape[1:])
    return torch.from_numpy(found)


def matched(
    given: str | Path | Sequence[str], subjects: Sequence[str], pattern: str | None, folder: str | Path = "."
) -> dict[str, Path]:
    """Return the label map of each subject that has one.

    Args:
        given: a pattern, or several, as for the images.
        subjects: of the images.
        pattern: the regular expression that finds a subject in the name of a label map, as for the images.
        folder: where patterns begin.

    Returns:
        Subject to file. One file for one image belongs to it whatever its name is.
    """
    found = files.expand(given if isinstance(given, str | Path) else list(given), folder)
    paths = [several[0] for several in found if len(several) == 1]
    if len(paths) < len(found):
        advice = "A label map has one channel: list files or patterns, and no lists of them"
        raise UnreadableInput(check.problem(WHERE, "one file for each subject", "several", advice))
    if len(paths) == len(subjects) == 1:
        return {subjects[0]: paths[0]}
    own = dict(zip(names.subjects([[path] for path in paths], pattern), paths, strict=True))
    strange = sorted(set(own) - set(subjects))
    if strange and not set(own) & set(subjects):
        images = shown(", ".join(subjects[:3]))
        got = f"{shown(own[strange[0]].name)}, which is of {strange[0]}, and images of {images}"
        advice = (
            "Name the files by their subjects, or say with reference.subject which part of the name it is"
        )
        raise UnreadableInput(
            check.problem(WHERE, "label maps of the same subjects as the images", got, advice)
        )
    return {subject: own[subject] for subject in subjects if subject in own}


def of_subjects(given: str, subjects: Sequence[str], pattern: str | None) -> dict[str, Path]:
    """Return the label map of each subject that has one: a file is for all, a pattern matches one for each.

    Args:
        given: an absolute name or pattern.
        subjects: of the images.
        pattern: the regular expression that finds a subject in the name of a label map, as for the images.
    """
    paths = files.glob(given)
    if len(paths) == 1 and not any(sign in Path(given).name for sign in "*?["):
        return dict.fromkeys(subjects, paths[0])
    return matched(given, subjects, pattern)


def called(given: str) -> str:
    """Return what a label map is called, from its name or its pattern without signs and ending.

    >>> called("/data/sub-*_dseg.nii.gz"), called("atlas.nii")
    ('sub-*_dseg', 'atlas')
    """
    name = Path(given).name
    return name[: len(name) - len(files.suffix_of(Path(name)))].strip("*_-.") or name


def meant(labels: Mapping[str, int | Sequence[int]], target: str, number: int | None) -> tuple[int, ...]:
    """Return the labels that show a target: those given by its name, else the number of its class.

    >>> meant({"tumour": [1, 4]}, "tumour", 2), meant({}, "tumour", 2), meant({}, "tumour", None)
    ((1, 4), (2,), ())
    """
    if target in labels:
        found = labels[target]
        return (found,) if isinstance(found, int) else tuple(found)
    return () if number is None else (number,)
