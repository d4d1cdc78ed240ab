"""Sheets of pictures, and files of them: the part that knows matplotlib, without the state of pyplot."""

import io
import math
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from esegeta.engine import check
from esegeta.plot import colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILM, INK, QUIET = "#0b0c0e", "#f2f2f2", "#a9adb3"
DPI = 120


class Cell(NamedTuple):
    """One picture: colours ``(rows, columns, 3)``, its width and height in mm, what lies at its four sides."""

    picture: np.ndarray
    width: float
    height: float
    letters: tuple[str, str, str, str] | None = None
    corner: str = ""


class Bar(NamedTuple):
    """A colour bar beside the rows from ``first`` to ``last``, or below the columns, with its unit."""

    scale: colours.Scale
    first: int
    last: int
    unit: str


class Sheet(NamedTuple):
    """Pictures in rows, and all that is written round them."""

    rows: Sequence[Sequence[Cell | None]]
    heads: Mapping[int, Sequence[str]] = {}  # names of columns, above the row with this number
    labels: Sequence[str] = ()
    beside: Sequence[Bar] = ()
    below: Sequence[Bar] = ()
    title: str | None = None
    caption: str = ""
    side: float = 2.5  # inches, of the longest side of a picture


def new(width: float, height: float, paper: str) -> "Figure":
    """An empty figure, drawn without a window, that a notebook shows."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        message = 'Figures need matplotlib, which is missing: pip install "esegeta[viz]".'
        raise ModuleNotFoundError(message, name="matplotlib") from None
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=paper)
    FigureCanvasAgg(figure)
    vars(figure)["_repr_png_"] = partial(png, figure)
    return figure


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file: the same bytes for the same figure, since neither date nor program is in it."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font lacks
        figure.savefig(
            out, format="png", dpi=DPI, facecolor=figure.get_facecolor(), metadata={"Software": None}
        )
    return out.getvalue()


def save(figure: "Figure", path: "str | os.PathLike[str]") -> Path:
    """Write a figure as PNG: the same bytes for the same data, whole or not at all.

    Args:
        figure: what a function of this package returned, or any other of matplotlib.
        path: the file; its folder is made if it is missing.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    content = png(figure)
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        if error.filename is not None:  # it names its file by itself
            raise
        raise check.not_written(path, len(content), error) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def written(axes: Any, x: float, y: float, text: str, **how: Any) -> Any:
    """Text as it stands: dollar signs start no formula."""
    return axes.text(x, y, text, **{"color": INK, "fontsize": 8, "parse_math": False, **how})


RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(value: float) -> int:
    """The power of ten that is taken out of a number, 0 where the number is easily read without.

    >>> power(12345.0), power(0.5), power(0.0002)
    (4, 0, -4)
    """
    found = math.floor(math.log10(abs(value))) if value else 0
    return found if found >= 3 or found <= -3 else 0


def numeral(value: float) -> str:
    """A number in three digits.

    >>> numeral(0.0), numeral(1234567.0), numeral(0.25), numeral(-0.00012)
    ('0', '1.23 × 10⁶', '0.25', '-1.2 × 10⁻⁴')
    """
    taken = power(value)
    return times(f"{value / 10.0**taken:.3g}", taken)


def times(text: str, power: int) -> str:
    """A number or a unit times a power of ten.

    >>> times("score", 3)
    'score × 10³'
    """
    return f"{text} × 10{str(power).translate(RAISED)}" if power else text


def _bar(figure: "Figure", where: tuple[float, float, float, float], bar: Bar, lying: bool) -> None:
    scale = bar.scale
    low = -1.0 if scale.kind in ("signed", "negative") else 0.0
    high = 0.0 if scale.kind == "negative" else 1.0
    share = np.linspace(low, high, 256)
    strip = colours.blend(share, colours.Scale(scale.kind, 1.0), np.zeros((256, 3)))
    axes: Any = figure.add_axes(where)
    shown = strip[None] if lying else strip[:, None]
    extent = (low, high, 0, 1) if lying else (0, 1, low, high)
    axes.imshow(shown, origin="lower", aspect="auto", extent=extent, interpolation="nearest")
    ticks = np.linspace(low, high, 3 if lying or high - low == 1 else 5)
    taken = power(scale.limit)
    end = scale.limit / 10.0**taken
    places = max(0, 2 - math.floor(math.log10(end))) if end else 0
    names = [f"{t * end:.{places}f}" if t else "0" for t in ticks]
    if not scale.limit:
        names = ["0" if t == 0 else "" for t in ticks]
    unit = times(bar.unit, taken)
    along, across = (axes.xaxis, axes.yaxis) if lying else (axes.yaxis, axes.xaxis)
    across.set_visible(False)
    along.set_ticks(ticks, names)
    if not lying:
        along.tick_right()
    axes.tick_params(colors=QUIET, labelsize=7, length=2)
    for spine in axes.spines.values():
        spine.set_color("#55585e")
    if lying:
        axes.set_xlabel(unit, color=QUIET, fontsize=7, labelpad=1, parse_math=False)
    else:
        axes.yaxis.set_label_position("right")
        axes.set_ylabel(unit, color=QUIET, fontsize=7.5, parse_math=False)


def sheet(where: str, content: Sheet) -> "Figure":
    """Lay pictures out on a dark sheet, all to one scale of length."""
    rows = content.rows
    count = max(len(row) for row in rows)
    cells = [cell for row in rows for cell in row if cell is not None]
    if not cells:
        raise ValueError(check.problem(where, "something to draw", "no maps", "Pass one map or more"))
    scale = content.side / max(max(cell.width, cell.height) for cell in cells)
    thin = 0.12  # inches: what is one voxel thick is still seen
    widths = [
        max([thin, *(r[c].width * scale for r in rows if c < len(r) and r[c] is not None)])  # type: ignore[union-attr]
        for c in range(count)
    ]
    heights = [max([thin, *(cell.height * scale for cell in row if cell is not None)]) for row in rows]
    gap, edge = 0.07, 0.15
    left = edge + (0.24 if content.labels else 0)
    heads = {
        r: [textwrap.wrap(n, max(12, int(14 * w))) for n, w in zip(names, widths, strict=False)]
        for r, names in content.heads.items()
    }
    rooms = {r: 0.15 * max([0, *map(len, names)]) + 0.06 for r, names in heads.items() if any(names)}
    right = edge + (0.85 if content.beside else 0)
    pictures = sum(widths) + gap * (count - 1)
    width = max(left + pictures + right, 4.2)
    left += (width - left - pictures - right) / 2
    lines = textwrap.wrap(content.caption, int(15.5 * (width - 2 * edge)))
    titles = textwrap.wrap(content.title or "", int(11 * (width - 2 * edge)))[:3]
    top = edge + 0.22 * len(titles)
    foot = edge + 0.145 * len(lines) + (0.07 if lines else 0) + (0.5 if content.below else 0)
    ys: list[float] = []
    for r, tall in enumerate(heights):
        top += rooms.get(r, 0)
        ys.append(top)
        top += tall + gap
    height = top - gap + foot
    figure = new(width, height, FILM)

    def at(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        return (x / width, 1 - (y + h) / height, w / width, h / height)  # y counts from the top

    def note(x: float, y: float, text: str, **how: Any) -> None:
        written(figure, x / width, 1 - y / height, text, transform=figure.transFigure, **how)

    for i, line in enumerate(titles):
        note(edge, edge + 0.22 * i, line, fontsize=11, va="top")
    for i, line in enumerate(lines):
        note(edge, height - edge - 0.145 * (len(lines) - i), line, color=QUIET, va="top")
    xs = [left + sum(widths[:c]) + gap * c for c in range(count)]
    for r, names in heads.items():
        for c, parts in enumerate(names):
            how = {"ha": "center", "va": "baseline", "fontsize": 8.5, "linespacing": 1.2}
            note(xs[c] + widths[c] / 2, ys[r] - 0.07, "\n".join(parts), **how)
    for r, row in enumerate(rows):
        if r < len(content.labels):
            label = "\n".join(textwrap.wrap(content.labels[r], max(10, int(13 * heights[r]))))
            how = {"ha": "right", "va": "center", "ma": "center", "rotation": 90, "fontsize": 8.5}
            note(left - 0.1, ys[r] + heights[r] / 2, label, **how)
        for c, cell in enumerate(row):
            if cell is not None:
                w, h = max(cell.width * scale, thin), max(cell.height * scale, thin)
                box = at(xs[c] + (widths[c] - w) / 2, ys[r] + (heights[r] - h) / 2, w, h)
                _picture(figure, box, cell)
    for bar in content.beside:
        y = ys[bar.first]
        tall = ys[bar.last] + heights[bar.last] - y
        shrink = min(0.08 * tall, 0.2)
        _bar(figure, at(xs[-1] + widths[-1] + 0.12, y + shrink, 0.13, tall - 2 * shrink), bar, lying=False)
    for bar in content.below:
        x = xs[bar.first]
        wide = xs[bar.last] + widths[bar.last] - x
        box = at(x + 0.08 * wide, ys[-1] + heights[-1] + 0.1, 0.84 * wide, 0.1)
        _bar(figure, box, bar, lying=True)
    return figure


def _picture(figure: "Figure", where: tuple[float, float, float, float], cell: Cell) -> None:
    axes: Any = figure.add_axes(where)
    axes.set_axis_off()
    axes.imshow(np.clip(cell.picture, 0, 1), aspect="auto", interpolation="bilinear")
    at = {"transform": axes.transAxes, "fontsize": 7, "color": "#d6d9de"}
    if cell.letters:
        low, high, top, bottom = cell.letters
        written(axes, 0.015, 0.5, low, ha="left", va="center", **at)
        written(axes, 0.985, 0.5, high, ha="right", va="center", **at)
        written(axes, 0.5, 0.985, top, ha="center", va="top", **at)
        written(axes, 0.5, 0.015, bottom, ha="center", va="bottom", **at)
    if cell.corner:
        written(axes, 0.02, 0.985, cell.corner, ha="left", va="top", **at)
