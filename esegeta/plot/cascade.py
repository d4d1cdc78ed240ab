"""A cascade in one figure: the map after each step, above the curve of how alike it stays."""

from typing import TYPE_CHECKING, Any

import numpy as np

from esegeta.engine import check
from esegeta.plot import canvas, colours, grids
from esegeta.plot.lines import PAPER, QUIET, TEXT, quiet_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from esegeta.metrics.randomisation import CascadeMaps


def cascade(
    found: "CascadeMaps",
    curves: Any,
    *,
    title: str | None = None,
    spacing: Any = None,
    unit: str = "similarity",
) -> "Figure":
    """Return the map of a network and after each layer that became random, above the curve of a number of each.

    Every map has a scale of its own, since random networks have sizes of their own: what is compared is where it
    lies. Of a volume it is the plane in which the first map is largest.

    Args:
        found: ``metrics.cascade_maps(...)(x)``.
        curves: label -> the numbers of each step, or one ``Cascade``: ``metrics.followed(found)``.
        title: above the picture.
        spacing: mm per voxel, one per spatial axis.
        unit: of the numbers.

    Returns:
        A figure of matplotlib.
    """
    maps = found.maps.detach().cpu().double().numpy()
    if maps.ndim not in (3, 4, 5):
        advice = "Pass what metrics.cascade_maps(...)(x) returns"
        raise check.refused("cascade", "maps (n,C,*S)", check.describe(found.maps), advice)
    values = curves if isinstance(curves, dict) else {"": getattr(curves, "values", curves)}
    lines = {str(label): np.asarray(getattr(v, "values", v), dtype=float) for label, v in values.items()}
    for label, line in lines.items():
        if line.shape != maps.shape[:1]:
            expected = f"{len(maps)} numbers of {label or 'the curve'}, one for each map"
            raise check.refused("cascade", expected, str(line.size), "Follow the same maps")
    pictures, (height, width) = _planes(maps.sum(1), spacing)
    figure = canvas.new(max(6.0, 1.15 * len(maps) + 0.8), 4.6, PAPER)
    figure.set_layout_engine("constrained", h_pad=0.06, w_pad=0.04)
    rows = figure.add_gridspec(2, len(maps), height_ratios=(1, 1.6))
    names = ("as trained", *found.layers)
    for n, picture in enumerate(pictures):
        axes: Any = figure.add_subplot(rows[0, n])
        scale = colours.Scale("signed", grids.limit_of(picture))
        shade = colours.blend(picture, scale, np.ones((*picture.shape, 3)))
        axes.imshow(
            shade, interpolation="nearest", aspect=(height / shade.shape[0]) / (width / shade.shape[1])
        )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(names[n][-14:], color=TEXT, fontsize=7, parse_math=False)
    below = quiet_axes(figure, rows[1, :])
    steps = np.arange(len(maps))
    for i, (label, line) in enumerate(lines.items()):
        below.plot(
            steps,
            line,
            color=colours.LINES[i % 8],
            linewidth=1.8,
            marker="o",
            markersize=4,
            label=label or None,
        )
    below.set_xlim(-0.5, len(maps) - 0.5)
    below.set_xticks(steps, [str(n) for n in steps], fontsize=8)
    below.axhline(0, color="#888c92", linewidth=0.6)
    below.set_xlabel("layers that are random, from the output down", color=TEXT, fontsize=9)
    below.set_ylabel(unit, color=TEXT, fontsize=9, parse_math=False)
    if any(lines):
        below.legend(fontsize=8, frameon=False, labelcolor=TEXT)
    if title:
        figure.suptitle(title, color=TEXT, fontsize=11, x=0.01, ha="left", parse_math=False)
    figure.supxlabel("Each map has its own scale.", fontsize=8, color=QUIET, x=0.01, ha="left")
    return figure


def _planes(maps: np.ndarray, spacing: Any) -> tuple[list[np.ndarray], tuple[float, float]]:
    """One picture of every map (n,*S), and its height and width in mm; signals are shown as stripes."""
    axes = maps.ndim - 1
    sizes = list(grids.spacing_of("cascade", spacing, None, axes))
    if axes == 1:
        return [np.repeat(m[None], max(1, m.size // 3), axis=0) for m in maps], (1.0, 3.0)
    if axes == 3:
        most = np.unravel_index(int(np.abs(np.nan_to_num(maps[0])).argmax()), maps.shape[1:])
        maps, sizes = maps[:, most[0]], sizes[1:]
    height, width = (n * s for n, s in zip(maps.shape[1:], sizes, strict=True))
    return list(maps), (float(height), float(width))
