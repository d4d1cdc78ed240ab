"""A comparison in one figure: every metric has a panel, in which every method has its number with its interval."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from esegeta.engine import check
from esegeta.plot import canvas, colours
from esegeta.plot.lines import PAPER, QUIET, TEXT, quiet_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from esegeta.metrics.comparing import Comparison, Row

ABREAST = 4  # panels in a row
BETTER = {"higher": "higher is better →", "lower": "← lower is better"}


def comparison(found: "Comparison", *, title: str | None = None) -> "Figure":
    """Draw the table of ``eg.compare``: a panel for each metric, with the number of each method and its interval.

    Every panel has its own scale. Of a metric that is calibrated a ring shows what random maps come to. Where there
    is no number, the panel says so.

    Args:
        found: what ``eg.compare`` returns.
        title: above the picture.

    Returns:
        A figure of matplotlib.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (x * torch.tensor([3.0, 2.0, 1.0])).sum()
        >>> found = eg.compare(["gradient"], score, torch.ones(1, 1, 3), metrics=["deletion", "entropy"])
        >>> [axes.get_title(loc="left") for axes in comparison(found).axes]
        ['deletion', 'entropy']
    """
    rows: Sequence[Row] = getattr(found, "rows", ())
    if not rows:
        advice = "Pass what eg.compare returns"
        raise check.refused("comparison", "a table with rows", check.describe(found), advice)
    methods = list(dict.fromkeys(row.method for row in rows))
    metrics = list(dict.fromkeys(row.metric for row in rows))
    lines = math.ceil(len(metrics) / ABREAST)
    abreast = math.ceil(len(metrics) / lines)
    figure = canvas.new(1.4 + 2.6 * abreast, lines * (0.95 + 0.32 * len(methods)) + 0.5, PAPER)
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    cells = figure.add_gridspec(lines, abreast)
    for n, metric in enumerate(metrics):
        axes = quiet_axes(figure, cells[n // abreast, n % abreast])
        _panel(axes, [row for row in rows if row.metric == metric], methods, names=n % abreast == 0)
        axes.set_title(metric, color=TEXT, fontsize=10, loc="left", parse_math=False)
    if title:
        figure.suptitle(title, color=TEXT, fontsize=11, x=0.01, ha="left", parse_math=False)
    if legend := _legend(rows):
        figure.supxlabel(legend, fontsize=8, color=QUIET, x=0.01, ha="left", parse_math=False)
    return figure


def _panel(axes: Any, rows: "Sequence[Row]", methods: Sequence[str], *, names: bool) -> None:
    """One metric: a line for each method, the first on top."""
    for row in rows:
        at = methods.index(row.method)
        if math.isnan(row.value):
            axes.text(
                0.5, at, "no number", transform=axes.get_yaxis_transform(), color=QUIET, fontsize=8,
                style="italic", ha="center", va="center",
            )  # fmt: skip
            continue
        if not math.isnan(row.low):
            axes.plot([row.low, row.high], [at, at], color=colours.LINES[0], linewidth=2.2, alpha=0.45)
        axes.plot(row.value, at, "o", color=colours.LINES[0], markersize=6)
        if not math.isnan(row.null_mean):
            axes.plot(row.null_mean, at, "o", color=colours.LINES[1], markerfacecolor=PAPER, markersize=6)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    labels = axes.set_yticks(range(len(methods)), methods if names else [""] * len(methods))
    for label in labels:
        label.label1.set_parse_math(False)
    axes.margins(x=0.12)
    axes.tick_params(length=0)
    axes.locator_params(axis="x", nbins=4)
    if all(math.isnan(row.value) for row in rows):
        axes.set_xticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(BETTER.get(rows[0].better, ""), color=QUIET, fontsize=8)


def _legend(rows: "Sequence[Row]") -> str:
    """Say what points, lines and rings are, as far as there are any."""
    said = []
    if any(not math.isnan(row.low) for row in rows):
        said.append("Lines: intervals of 95 %.")
    if any(not math.isnan(row.null_mean) for row in rows):
        said.append("Rings: the mean of random maps.")
    return " ".join(said)
