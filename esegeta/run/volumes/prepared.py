"""An image on its way to the network, and the checks of parameters that all steps share."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from esegeta.engine import check
from esegeta.run.volumes import grids
from esegeta.run.volumes.reading import Array, spacing_of

Undo = Callable[[Array, str], Array]
KEPT = ("density", "values", "sum")


class Prepared(NamedTuple):
    r"""An image on the grid of the network.

    data: (C,\*S); affine: from its voxel indices to mm, 4 x 4; spacing: mm per voxel; record: what was done, with
    the numbers that were found, ready for JSON; undo: the way back of each step that moved voxels, last one first.
    """

    data: Tensor
    affine: Array
    spacing: tuple[float, ...]
    record: tuple[dict[str, Any], ...] = ()
    undo: tuple[Undo, ...] = ()

    def back(self, map: Float[Tensor, "..."], keep: str = "density") -> Float[Tensor, "..."]:
        r"""Put a map onto the grid of the file.

        Flips, permutations, crops and padding are undone exactly: what was cut off is 0, what was padded is dropped.
        NaN stays NaN, and so is what would be
        interpolated from it. A change of the spacing cannot be undone; what is kept of the map is a choice:

        Args:
            map: (K,\*S) with the spatial shape of ``data``.
            keep: "density", for attributions: what a voxel has for each mm^3 is interpolated linearly, so smooth
                maps stay smooth, and their sum stays up to interpolation; "values", for images, probabilities and
                masks: they are interpolated as they are; "sum": each voxel hands all it has to the voxels it was
                computed from (the transpose of the resampling), which keeps the sum up to rounding and is the
                chain rule for gradients, but leaves ripples where the network's grid was finer.

        Returns:
            (K,\*S) -> (K,\*T), T the spatial shape of the file.
        """
        check.floating("Prepared.back", "map", map)
        check.one_of("Prepared.back", "keep", keep, KEPT)
        if map.ndim < 2 or map.shape[1:] != self.data.shape[1:]:
            expected = (
                f"a map (K,*S) with the spatial shape {tuple(self.data.shape[1:])} of the prepared image"
            )
            advice = "Bring maps of layers onto the image with esegeta.upsample first"
            raise check.refused("Prepared.back", expected, check.describe(map), advice)
        values = (
            map.detach().cpu().numpy() if map.dtype == torch.float64 else map.detach().float().cpu().numpy()
        )
        holes = np.isnan(values)
        if holes.any():  # each of them, and all that is interpolated from it, is not known
            touched = self._undone(holes.astype(values.dtype), keep) != 0
            values = np.where(touched, np.nan, self._undone(np.where(holes, 0, values), keep))
        else:
            values = self._undone(values, keep)
        return torch.from_numpy(np.ascontiguousarray(values)).to(map.dtype)

    def _undone(self, values: Array, keep: str) -> Array:
        for undo in self.undo:
            values = undo(values, keep)
        return values


Step = Callable[[Prepared], Prepared]


def moved(before: Prepared, data: Array, affine: Array, record: dict[str, Any], undo: Undo) -> Prepared:
    """Return the image after a step that put it onto another grid."""
    tensor = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
    spacing = spacing_of(affine, tensor.ndim - 1)
    return Prepared(tensor, affine, spacing, (*before.record, record), (undo, *before.undo))


def changed(now: Prepared, data: Array, record: dict[str, Any]) -> Prepared:
    """Return the image after a step that changed values only."""
    return now._replace(data=torch.from_numpy(data.astype(np.float32)), record=(*now.record, record))


def numbers(
    where: str, name: str, value: Any, advice: str, *, whole: bool = False, positive: bool = False
) -> tuple[Any, ...]:
    """Return one number or several, as a tuple: whole ones, finite ones, those above zero."""
    kinds = (int,) if whole else (int, float)
    several = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    right = bool(several) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in several)
    if not right or not all(
        abs(v) < (2**63 if isinstance(v, int) else float("inf")) and (v > 0 or not positive) for v in several
    ):
        expected = f"{name} of {'whole' if whole else 'finite'} numbers{' > 0' if positive else ''}"
        raise check.refused(where, expected, check.describe(value), advice)
    return several


def each(where: str, name: str, value: tuple[Any, ...], count: int, what: str) -> tuple[Any, ...]:
    """Return as many numbers as there are axes or channels; one stands for all."""
    if len(value) not in (1, count):
        expected = f"{name} with one number or {count}, one for each {what}"
        raise check.refused(where, expected, repr(list(value)), "Pass as many as the image has")
    return value * count if len(value) == 1 else value


def sized(where: str, shape: Sequence[int]) -> None:
    """Refuse a grid that no memory holds."""
    if math.prod(shape) > grids.MOST_VOXELS:
        got = f"shape {tuple(shape)}"
        raise check.refused(where, "a grid of at most 2^31 voxels", got, "Mind the units")
