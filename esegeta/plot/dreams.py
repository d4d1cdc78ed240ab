"""Figures of dreams: planes of an image that a network dreamed, and what was read on the way to it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from esegeta.engine import check
from esegeta.plot import grids
from esegeta.plot.canvas import Cell, Sheet, new, numeral, sheet
from esegeta.plot.colours import LINES
from esegeta.plot.images import _cell, _place

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def dream(
    image: object,
    spacing: Any = None,
    affine: object = None,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    subtitle: str | None = None,
) -> "Figure":
    r"""Draw an image that a network dreamed in grey, a row for each channel.

    Args:
        image: ``(C,*S)``, two or three spatial axes.
        spacing: mm per voxel, one per spatial axis; by default from the affine, else 1.
        affine: from voxels to mm (right, front, up): turns the planes and gives them letters.
        names: of the channels.
        title: above the pictures.
        subtitle: below the title, smaller.

    Returns:
        A figure of matplotlib; planes go through the voxel that differs most from the middle of its channel.

    Example:
        >>> import torch
        >>> dream(torch.rand(1, 4, 4, 4)).get_size_inches().tolist()[0] > 4
        True
    """
    values = grids.array("dream", "image", image)
    rows: list[list[Cell | None]] = []
    ends = []
    heads: list[str] = []
    for channel in values:
        scene = grids.scene("dream", channel[None], None, spacing, affine)
        turned = scene.affine is not None
        voxel = grids.strongest([np.abs(scene.values - np.median(channel))])
        low, high = (float(v) for v in np.quantile(channel, (0.001, 0.999)))
        ends.append(f"{numeral(low)} to {numeral(high)}")
        share = np.clip((scene.values - low) / (high - low if high > low else 1.0), 0, 1)
        grey = np.repeat(share[..., None], 3, axis=-1)
        rows.append(
            [
                _cell(
                    scene,
                    axis,
                    grids.plane(grey, axis, voxel[axis], turned),
                    _place(scene, axis, voxel[axis]),
                )
                for axis in scene.across
            ]
        )
        heads = [scene.titles[axis] for axis in scene.across]
    caption = f"From black to white: {'; '.join(ends)}."
    labels = () if names is None else names
    return sheet("dream", Sheet(rows, {0: heads}, labels, title=title, subtitle=subtitle, caption=caption))


def analysis(
    found: Any, *, names: Sequence[str] | None = None, shown: int = 4, title: str | None = None
) -> "Figure":
    """Draw the features along a dream, and below them the dream and what was segmented in it, at a few steps.

    Args:
        found: from ``dreams.analysis``, or from ``dreams.normalised``: then a band shows one standard deviation
            around the mean of the population. Of a volume the middle plane is shown.
        names: which features; all by default.
        shown: at how many steps the dream is shown.
        title: above the figure.

    Returns:
        A figure of matplotlib.
    """
    chosen = tuple(found.names) if names is None else tuple(names)
    for name in chosen:
        if name not in found.names:
            advice = check.nearest(name, found.names)
            raise check.refused("analysis", "the name of a feature", repr(name), advice)
    count = min(check.positive_count("analysis", "shown", shown), len(found.steps))
    at = np.unique(np.linspace(0, len(found.steps) - 1, count).round().astype(int))
    wide = max(len(chosen), len(at))
    width, height = 2.4 * wide, 6.4 + 0.3 * (title is not None)
    figure = new(width, height, "white")
    top = 6.4 / height
    steps = found.steps.tolist()
    for i, name in enumerate(chosen):
        axes = figure.add_axes(((i + 0.2) / wide, 0.66 * top, 0.72 / wide, 0.27 * top))
        if found.normalised:
            axes.axhspan(-1, 1, color="#dddddd", linewidth=0)
        axes.plot(
            steps, found.values[:, i if names is None else found.names.index(name)].tolist(), color=LINES[0]
        )
        axes.set_title(name.replace("_", " "), fontsize=8)
        axes.tick_params(labelsize=7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for column, i in enumerate(at):
        pair = (found.images[i][0], found.masks[i])
        for row, picture in enumerate(pair):
            flat = picture.numpy()
            flat = flat[:, :, flat.shape[2] // 2] if flat.ndim == 3 else np.atleast_2d(flat)
            axes = figure.add_axes(((column + 0.05) / wide, (0.31 - 0.3 * row) * top, 0.9 / wide, 0.27 * top))
            low, high = (0.0, 1.0) if row else (float(flat.min()), float(flat.max()))
            axes.imshow(flat, cmap="gray", vmin=low, vmax=high)
            axes.axis("off")
            if row == 0:
                axes.set_title(f"{steps[i]} steps", fontsize=8)
    if title is not None:
        figure.text(0.5, 1 - 0.15 / height, title, ha="center", va="center", fontsize=11)
    return figure
