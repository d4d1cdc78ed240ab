"""Curves, and maps on signals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from esegeta.engine import check
from esegeta.plot import canvas, colours, grids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW, SHORT = 3, 24  # of curves, and letters of a label, up to which the legend stands within the axes
PAPER, TEXT, QUIET, GRID = "white", "#1b1d20", "#55585e", "#dcdfe3"


def quiet_axes(figure: "Figure", where: Any) -> Any:
    """Add axes for numbers to a figure: a grid behind the lines, and no frame."""
    axes: Any = figure.add_subplot(where)
    axes.set_facecolor(PAPER)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#888c92")
    return axes


def curve(
    x: Any,
    ys: Mapping[str, Any],
    *,
    bands: Mapping[str, tuple[Any, Any]] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    title: str | None = None,
    note: str = "",
) -> "Figure":
    """Several curves over one axis: how a score falls as voxels are taken away, a loss, a sweep.

    Args:
        x: the numbers along the axis, n of them.
        ys: label -> n numbers; gaps where they are NaN.
        bands: label of a curve -> n numbers below and n above: what lies between is shaded in its colour.
        xlabel: what x is, with its unit.
        ylabel: what the curves are, with their unit.
        title: above the picture.
        note: below it, such as what the bands are.

    Returns:
        A figure of matplotlib.
    """
    along = _numbers("curve", "x", x)
    if not isinstance(ys, Mapping) or not ys:
        advice = "Pass one curve or more"
        raise check.refused("curve", "ys as a mapping label -> numbers", check.describe(ys), advice)
    lines = {str(label): _like("ys", label, y, along) for label, y in ys.items()}
    between = {
        str(k): [_like("bands", k, side, along) for side in sides] for k, sides in (bands or {}).items()
    }
    figure = canvas.new(7.0, 4.2, PAPER)
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    axes = quiet_axes(figure, 111)
    for i, (label, y) in enumerate(lines.items()):
        marker = "osD^vPX*"[(i // len(colours.LINES)) % 8] if along.size <= 40 else None
        axes.plot(
            along, y, color=colours.LINES[i % 8], linestyle=("-", "--", ":", "-.")[(i // 8) % 4], linewidth=1.8,
            marker=marker, markersize=4, label=label if not label.startswith("_") else f"\u200b{label}",
        )  # fmt: skip
        if label in between:
            low, high = between[label]
            axes.fill_between(along, low, high, color=colours.LINES[i % 8], alpha=0.12, linewidth=0)
    axes.set_xlabel(xlabel, color=TEXT, fontsize=9, parse_math=False)
    axes.set_ylabel(ylabel, color=TEXT, fontsize=9, parse_math=False)
    if title:
        axes.set_title(title, color=TEXT, fontsize=11, loc="left", parse_math=False)
    if len(lines) > 1 or list(lines) != [""]:
        how: dict[str, Any] = {"fontsize": 8, "frameon": False, "labelcolor": TEXT}
        if beside := len(lines) > FEW or max(map(len, lines)) > SHORT:  # it would lie over the lines
            figure.set_size_inches(9.2, 4.2)
        legend = (
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", **how)
            if beside
            else axes.legend(loc="best", **how)
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    if note:
        figure.supxlabel(note, fontsize=8, color=QUIET, x=0.01, ha="left", parse_math=False)
    return figure


def _like(name: str, label: str, values: Any, along: np.ndarray) -> np.ndarray:
    found = _numbers("curve", f"{name}[{label!r}]", values)
    if found.shape != along.shape:
        expected = f"{name}[{label!r}] with the {along.size} numbers of x"
        raise check.refused("curve", expected, f"{found.size}", "Give each x a value or NaN")
    return found


def _numbers(where: str, name: str, values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.empty((0, 0))
    if found.ndim != 1 or not found.size:
        raise check.refused(where, f"{name} to be numbers in a row", check.describe(values), "Flatten it")
    return found


def signal(
    map: object,
    signal: object = None,
    spacing: Any = None,
    *,
    title: str | None = None,
    subtitle: str | None = None,
    unit: str = "attribution",
    xlabel: str = "",
) -> "Figure":
    """Draw a map with one spatial axis below the signal that it explains, whose colours it lends.

    Args:
        map: ``(C, T)``; channels are added up.
        signal: ``(C, T)``; each channel is a line.
        spacing: the distance of two samples, alone or in a sequence.
        title: above the picture.
        subtitle: below the title, smaller: whose it is, score, residual.
        unit: at the axis of the map.
        xlabel: what the spatial axis is, with its unit.

    Returns:
        A figure of matplotlib.
    """
    values = grids.array("signal", "map", map, 1).sum(0)
    lines = None if signal is None else grids.array("signal", "signal", signal, 1)
    if lines is not None and lines.shape[1] != values.size:
        expected = f"a signal with the {values.size} samples of the map"
        raise check.refused("signal", expected, f"{lines.shape[1]}", "Interpolate the map with upsample")
    step = [spacing] if isinstance(spacing, (int, float)) else spacing
    size = grids.spacing_of("signal", step, None, 1)[0]
    along = np.arange(values.size) * size
    limit = grids.limit_of(values)
    scale = colours.Scale("signed", limit)
    figure = canvas.new(8.0, 4.4 if lines is not None else 2.8, PAPER)
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    rows = figure.add_gridspec(
        2 if lines is not None else 1, 1, height_ratios=(3, 2) if lines is not None else None
    )
    extent = (-size / 2, along[-1] + size / 2)
    first = None
    if lines is not None:
        first = quiet_axes(figure, rows[0])
        shade = colours.blend(values[None], scale, np.ones((1, values.size, 3)))
        low, high = _range(lines)
        first.imshow(shade, aspect="auto", extent=(*extent, low, high), interpolation="nearest", alpha=0.75)
        for i, line in enumerate(lines):
            first.plot(
                along, line, color="#17191c" if len(lines) == 1 else colours.LINES[i % 8], linewidth=1.2
            )
        first.set_ylabel("signal", color=TEXT, fontsize=9)
        first.set_ylim(low, high)
        first.set_xlim(*extent)
    axes = quiet_axes(figure, rows[-1])
    clean = np.nan_to_num(values, posinf=0, neginf=0)
    for sign, colour in ((1, "#d64504"), (-1, "#1460c4")):
        part = np.maximum(sign * clean, 0) * sign
        axes.bar(along, part, width=size, color=colour, linewidth=0)
    axes.axhline(0, color="#55585e", linewidth=0.8)
    axes.set_xlim(*extent)
    axes.set_ylabel(unit, color=TEXT, fontsize=9, parse_math=False)
    axes.set_xlabel(xlabel, color=TEXT, fontsize=9, parse_math=False)
    if subtitle:
        title = f"{title}\n{subtitle}" if title else subtitle
    if title:
        (first or axes).set_title(title, color=TEXT, fontsize=11, loc="left", parse_math=False)
    said = f"Orange for the score, blue against; colours end at ±{canvas.numeral(limit)}."
    unknown = np.isnan(values)
    ends = np.flatnonzero(np.diff(np.concatenate([[False], unknown, [False]]).astype(int)))
    for start, stop in ends.reshape(-1, 2):
        where = ((start - 0.5) * size, (stop - 0.5) * size)
        axes.axvspan(*where, facecolor="#c9ccd1", edgecolor="#55585e", hatch="///", linewidth=0)
    said += f" {unknown.sum()} values are NaN: not computed (hatched)." if unknown.any() else ""
    infinite = int(np.isinf(values).sum())
    said += f" {infinite} values are infinite." if infinite else ""
    figure.supxlabel(said, fontsize=8, color="#55585e", x=0.01, ha="left")
    return figure


def _range(lines: np.ndarray) -> tuple[float, float]:
    seen = lines[np.isfinite(lines)]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0)
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def is_signal(map: object) -> bool:
    """Check whether a map has one spatial axis.

    >>> is_signal(np.zeros((1, 9)))
    True
    """
    shape: Sequence[int] = getattr(map, "shape", ())
    return len(shape) == 2
