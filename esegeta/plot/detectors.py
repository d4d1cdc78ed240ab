"""The figure of a network dissection: which layer sees which concept best."""

from typing import TYPE_CHECKING, Any

from esegeta.engine import check
from esegeta.plot import canvas, colours
from esegeta.plot.lines import PAPER, TEXT, quiet_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def detectors(found: Any, *, title: str | None = None, **asked: Any) -> "Figure":
    """Draw the best channel of each layer for each concept, as bars of its overlap over all images.

    Filled bars are detectors; the others overlap too little, or no more than with the concepts of other images.

    Args:
        found: from ``dissection.dissect``.
        title: above the figure.
        asked: what makes a detector, as for ``Dissection.rows``.

    Returns:
        A figure of matplotlib.

    Example:
        >>> import torch
        >>> import esegeta as eg
        >>> model = lambda x: eg.mark(x, "all")
        >>> data = [(x[None], {"bright": x > 0}) for x in torch.eye(4)[:, None].expand(4, 5, 4)]
        >>> figure = detectors(eg.dissection.dissect(model, places="all")(data))
        >>> len(figure.axes[0].patches)
        1
    """
    best = getattr(found, "best", None)
    if best is None:
        advice = "Pass what dissection.dissect(model, ...)(data) returns"
        raise check.refused_type("detectors", "a dissection", check.describe(found), advice)
    rows = best(**asked)
    places = list(dict.fromkeys(row.place for row in rows))
    concepts = list(found.concepts)
    height = 0.2 * len(rows) + 0.12 * len(places) + 1.6
    figure = canvas.new(8.0, height, PAPER)
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    axes = quiet_axes(figure, 111)
    each, middles, at = 1.0, [], 0.0
    top = max([row.iou for row in rows if row.iou == row.iou], default=0.0)
    for place in places:
        own = [row for row in rows if row.place == place]
        middles.append(at + each * (len(own) - 1) / 2)
        for row in own:
            colour, hatch = _look(concepts.index(row.concept))
            known = 0.0 if row.iou != row.iou else row.iou
            face = colour if row.detector else "none"
            axes.barh(at, known, height=0.82, color=face, **_edge(colour, hatch, row.detector))
            said = f"channel {row.channel}" if row.iou == row.iou else "no image has it"
            text = axes.text(known + 0.012 * (top or 1.0), at, said, fontsize=7, color="#55585e", va="center")
            text.set_parse_math(False)
            at += each
        at += 0.6
    axes.set_yticks(middles, labels=places)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.15 * (top or 1.0))
    axes.set_xlabel("IoU over all images", color=TEXT, fontsize=9)
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=colour, label=name, **_edge(colour, hatch, True))
        for name, (colour, hatch) in zip(concepts, map(_look, range(len(concepts))), strict=True)
    ]
    legend = figure.legend(
        handles=handles, fontsize=8, frameon=False, labelcolor=TEXT, ncols=6, loc="outside upper left"
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    if title:
        axes.set_title(title, color=TEXT, fontsize=11, loc="left", parse_math=False)
    figure.supxlabel(
        "Filled: a detector. Empty: too small, or no more than chance.",
        fontsize=8,
        color="#55585e",
        x=0.01,
        ha="left",
    )
    return figure


def _look(number: int) -> tuple[str, str | None]:
    """The colour of a concept and its hatching: there are eight colours that everyone can tell apart."""
    count = len(colours.LINES)
    return colours.LINES[number % count], (None, "////", "....", "xxxx")[number // count % 4]


def _edge(colour: str, hatch: str | None, filled: bool) -> dict[str, Any]:
    """Lines of a bar; those of a hatching are white on a filled one."""
    return {"edgecolor": "white" if filled and hatch else colour, "linewidth": 1.0, "hatch": hatch}
