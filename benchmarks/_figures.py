"""Figures of the questions: bars of ratios, curves on logarithmic axes."""

from collections.abc import Sequence
from typing import Any

from _questions import Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito 2008


def bars(rows: list[Row], value: str, axis: str, *, line: float) -> Any:
    """A panel for each group, a bar for each row from ``line`` on, its aim as a mark; logarithmic."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if value in row.values]
    groups = list(dict.fromkeys(row.group for row in rows))
    tallest = max(sum(row.group == g for row in rows) for g in groups)
    figure = Figure(figsize=(4.2 * len(groups), 0.9 + 0.26 * tallest), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for panel, group in zip(panels, groups, strict=True):
        these = [row for row in rows if row.group == group]
        for i, row in enumerate(these):
            found = row.values[value]
            good = row.aim is None or row.aim.met(row.values)
            panel.barh(i, found - line, left=line, height=0.6, color=COLOURS[0 if good else 1])
            if row.aim is not None and row.aim.value == value:
                panel.plot([row.aim.bound] * 2, [i - 0.4, i + 0.4], color="black", linewidth=1.2)
            panel.annotate(
                f"{found:.2f}", (max(found, line), i), (3, 0), textcoords="offset points", va="center", size=7
            )
        panel.set_yticks(range(len(these)), [row.what for row in these], size=8)
        panel.set_xscale("log")
        low = min([line, *(row.values[value] for row in these)])
        high = max([line, *(row.values[value] for row in these)])
        panel.set_xlim(low / 1.15, high * 1.5)
        ticks = [
            t for t in (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low / 1.15 <= t <= high * 1.5
        ]
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks], size=8)
        panel.minorticks_off()
        panel.axvline(line, color="grey", linewidth=0.8)
        panel.invert_yaxis()
        panel.set_title(group, size=9)
        panel.set_xlabel(axis, size=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def curves(panels: Sequence[tuple[str, Sequence[float] | None, dict[str, Any]]], across: str, up: str) -> Any:
    """A panel for each title, with lines by name over shared sizes or over their own; both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in grid[len(panels) :]:
        panel.set_axis_off()
    for panel, (title, sizes, named) in zip(grid, panels, strict=False):
        every: list[float] = []
        for i, (name, series) in enumerate(named.items()):
            xs, ys = series if sizes is None else (sizes, series)
            every += xs
            panel.plot(xs, ys, "o-", color=COLOURS[i % len(COLOURS)], markersize=3, linewidth=1.2, label=name)
        ticks = sorted(set(every))[:: max(1, len(set(every)) // 5)]
        panel.set_xscale("log")
        panel.set_yscale("log")
        heights = [y for line in panel.lines for y in line.get_ydata()]
        if max(heights) < 4 * min(heights):  # a nearly constant line should look like one
            panel.set_ylim(min(heights) / 2, max(heights) * 2)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks], size=7)
        panel.minorticks_off()
        panel.tick_params(axis="y", labelsize=7)
        panel.set_title(title, size=9)
        panel.set_xlabel(across, size=8)
        panel.set_ylabel(up, size=8)
        panel.legend(fontsize=7, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    return figure
