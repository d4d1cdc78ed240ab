"""Steps that move voxels: where they lie in mm is kept, and maps find the way back."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from esegeta._registry import step
from esegeta.engine import check
from esegeta.run.volumes import grids
from esegeta.run.volumes.prepared import Prepared, Step, each, moved, numbers, sized
from esegeta.run.volumes.reading import Array


@step(family="grid", example={"to": "RAS"})
def reorient(to: str) -> Step:
    """Flip and permute axes, so that they point to the sides that are named; voxels keep their places in mm.

    Args:
        to: a letter for each axis, the side to which it rises: "RAS" is right, anterior, superior; "LPS" is
            left, posterior, superior. An oblique axis counts as the one that it is nearest to.
    """
    name = "reorient"
    pairs = [next((p for p in grids.SIDES if c in p), "") for c in to] if isinstance(to, str) else [""]
    if not 1 <= len(pairs) <= 3 or "" in pairs or len(set(pairs)) < len(pairs):
        advice = 'Write for example "RAS" or "LPS"'
        raise check.refused(name, "to with one letter of R/L, A/P and S/I each", repr(to), advice)

    def run(now: Prepared) -> Prepared:
        axes = now.data.ndim - 1
        codes = grids.codes(now.affine)[:axes]
        order = [next((i for i, c in enumerate(codes) if c in pair), -1) for pair in pairs]
        if sorted(order) != list(range(axes)):
            expected = f"to with one letter for each axis, which are {', '.join(codes)} or the opposite"
            raise check.refused(name, expected, repr(to), "Name the axes that the image has")
        flips = [axis for axis, i in enumerate(order) if codes[i] != to[axis]]
        data, affine = grids.turned(now.data.numpy(), now.affine, order, flips)
        inverse = [0, *(1 + order.index(i) for i in range(axes))]
        record = {"step": name, "from": "".join(codes), "to": to}

        def undo(map: Array, keep: str) -> Array:  # noqa: ARG001
            return np.flip(map, tuple(1 + axis for axis in flips)).transpose(inverse)

        return moved(now, data, affine, record, undo)

    return run


def _regridded(
    now: Prepared, name: str, shape: Sequence[int], ratio: Sequence[float], how: str, record: dict[str, Any]
) -> Prepared:
    """On a grid around the same centre, of steps ``ratio`` times as long."""
    sized(name, shape)
    old = now.data.shape[1:]
    matrices = [grids.weights(n, m, r, how) for n, m, r in zip(old, shape, ratio, strict=True)]
    returns = [grids.weights(m, n, 1 / r, "linear") for n, m, r in zip(old, shape, ratio, strict=True)]
    affine = grids.centred(now.affine, old, shape, ratio)

    def undo(map: Array, keep: str) -> Array:
        if keep == "sum":
            return grids.weighted(map, [matrix.T for matrix in matrices])
        values = grids.weighted(map, returns)
        return values / np.prod(ratio).astype(values.dtype) if keep == "density" else values

    return moved(now, grids.weighted(now.data.numpy(), matrices), affine, {"step": name, **record}, undo)


@step(family="grid", example={"spacing": 2.0})
def resample(spacing: Any, how: str = "linear") -> Step:
    """Change the size of voxels. The centre of the volume stays; its borders move by less than half a voxel.

    Args:
        spacing: mm for each axis, or for all.
        how: "linear" is interpolation between the voxels, and where the new ones are larger the mean of what they
            cover; "nearest" is for labels.
    """
    name = "resample"
    wanted = numbers(name, "spacing", spacing, "Pass mm for each axis, or one number", positive=True)
    check.one_of(name, "how", how, ("linear", "nearest"))

    def run(now: Prepared) -> Prepared:
        old = now.data.shape[1:]
        ratio = [
            w / s for w, s in zip(each(name, "spacing", wanted, len(old), "axis"), now.spacing, strict=True)
        ]
        shape = [max(1, round(n / r)) for n, r in zip(old, ratio, strict=True)]
        return _regridded(now, name, shape, ratio, how, {"spacing": list(wanted), "how": how, "shape": shape})

    return run


@step(family="grid", example={"shape": 4})
def resize(shape: Any, how: str = "linear") -> Step:
    """Show the same space on another number of voxels.

    Args:
        shape: voxels along each axis, or along all.
        how: as for ``resample``.
    """
    name = "resize"
    wanted = numbers(name, "shape", shape, "Pass voxels for each axis", whole=True, positive=True)
    check.one_of(name, "how", how, ("linear", "nearest"))

    def run(now: Prepared) -> Prepared:
        old = now.data.shape[1:]
        new = each(name, "shape", wanted, len(old), "axis")
        ratio = [n / m for n, m in zip(old, new, strict=True)]
        return _regridded(now, name, new, ratio, how, {"shape": list(new), "how": how})

    return run


def _windowed(
    now: Prepared, name: str, box: Sequence[tuple[int, int]], fill: float, record: dict[str, Any]
) -> Prepared:
    """The voxels of a box, which may reach beyond the image."""
    sized(name, [stop - start for start, stop in box])
    old = now.data.shape[1:]
    opposite = [(-start, n - start) for (start, _), n in zip(box, old, strict=True)]
    affine = grids.shifted(now.affine, [start for start, _ in box])
    record = {"step": name, **record, "box": [list(side) for side in box]}

    def undo(map: Array, keep: str) -> Array:  # noqa: ARG001
        return grids.window(map, opposite, 0.0)

    return moved(now, grids.window(now.data.numpy(), box, fill), affine, record, undo)


@step(family="grid", example={"box": [[0, 2]] * 3})
def crop(box: Any) -> Step:
    """Keep a box of voxels.

    Args:
        box: for each axis the first index and the one after the last, ``[[10, 90], [0, 128], [5, 69]]``.
    """
    name, advice = "crop", "Write for example [[10, 90], [0, 128], [5, 69]]"
    right = isinstance(box, Sequence) and not isinstance(box, str) and len(box) > 0
    sides = [numbers(name, "box", side, advice, whole=True) for side in box] if right else [()]
    if not all(len(side) == 2 and 0 <= side[0] < side[1] for side in sides):
        expected = "box of two rising whole numbers for each axis"
        raise check.refused(name, expected, check.describe(box), advice)

    def run(now: Prepared) -> Prepared:
        shape = tuple(now.data.shape[1:])
        if len(sides) != len(shape) or any(stop > n for (_, stop), n in zip(sides, shape, strict=True)):
            expected = f"a box within the image of shape {shape}"
            raise check.refused(name, expected, repr([list(s) for s in sides]), "Pass a smaller one")
        return _windowed(now, name, [(a, b) for a, b in sides], 0.0, {})

    return run


@step(family="grid")
def content(above: float | int = 0.0, margin: int = 0) -> Step:
    """Keep the smallest box that holds all voxels above a value in any channel.

    Args:
        above: the value that background does not exceed.
        margin: voxels around the box that are kept too, as far as there are any.
    """
    name = "content"
    (least,) = numbers(name, "above", above, "Pass the value of the background")
    check.positive_count(name, "margin", margin, 0)

    def run(now: Prepared) -> Prepared:
        inside = (now.data > least).any(0)
        if not inside.any():
            got = f"a largest value of {now.data.max().item():.6g}"
            raise check.refused(name, f"voxels above {least}", got, "Pass a lower value")
        where = inside.nonzero()
        lows, highs = where.min(0)[0].tolist(), where.max(0)[0].tolist()
        box = [
            (max(0, low - margin), min(n, high + 1 + margin))
            for low, high, n in zip(lows, highs, inside.shape, strict=True)
        ]
        return _windowed(now, name, box, 0.0, {"above": least, "margin": margin})

    return run


@step(family="grid", example={"shape": 6})
def fit(shape: Any, fill: float | int = 0.0) -> Step:
    """Cut or pad around the centre, to a number of voxels; of an odd number the larger half at the far end.

    Args:
        shape: voxels along each axis, or along all.
        fill: the value of padding.
    """
    name = "fit"
    wanted = numbers(name, "shape", shape, "Pass voxels for each axis", whole=True, positive=True)
    (value,) = numbers(name, "fill", fill, "Pass for example 0")

    def run(now: Prepared) -> Prepared:
        old = now.data.shape[1:]
        new = each(name, "shape", wanted, len(old), "axis")
        starts = [int((n - m) / 2) for n, m in zip(old, new, strict=True)]
        box = [(start, start + m) for start, m in zip(starts, new, strict=True)]
        return _windowed(now, name, box, value, {"fill": value})

    return run


@step(family="grid", example={"multiple": 8})
def pad(multiple: Any, fill: float | int = 0.0) -> Step:
    """Pad on both sides to the next multiple: a U-Net with three levels of pooling takes multiples of 8.

    Args:
        multiple: for each axis, or for all.
        fill: the value of padding.
    """
    name = "pad"
    wanted = numbers(name, "multiple", multiple, "Pass for example 8", whole=True, positive=True)
    (value,) = numbers(name, "fill", fill, "Pass for example 0")

    def run(now: Prepared) -> Prepared:
        old = now.data.shape[1:]
        missing = [-n % k for n, k in zip(old, each(name, "multiple", wanted, len(old), "axis"), strict=True)]
        box = [(-(more // 2), n + more - more // 2) for n, more in zip(old, missing, strict=True)]
        return _windowed(now, name, box, value, {"multiple": list(wanted), "fill": value})

    return run


@step(family="grid", example={"axis": 0, "index": 1}, called="slice")
def slice_(axis: int, index: int) -> Step:
    """Return one plane of a volume, for networks with one axis less.

    Args:
        axis: the axis that goes, from 0.
        index: which plane, from 0.
    """
    name = "slice"
    check.positive_count(name, "axis", axis, 0)
    check.positive_count(name, "index", index, 0)

    def run(now: Prepared) -> Prepared:
        shape = tuple(now.data.shape[1:])
        if len(shape) < 2 or axis >= len(shape) or index >= shape[axis]:
            expected = f"a plane of the image of shape {shape}"
            raise check.refused(name, expected, f"axis {axis}, index {index}", "Count from 0")
        affine = grids.sliced(now.affine, axis, index)
        box = [(-index, shape[axis] - index) if i == axis else (0, n) for i, n in enumerate(shape)]

        def undo(map: Array, keep: str) -> Array:  # noqa: ARG001
            return grids.window(np.expand_dims(map, 1 + axis), box, 0.0)

        record = {"step": name, "axis": axis, "index": index}
        return moved(now, now.data.select(1 + axis, index).numpy(), affine, record, undo)

    return run
