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
    """One picture: colours ``(rows, columns, 3)``, its width and height in mm, what lies at its four sides.

    lines: the colour of an outline, and the masks ``(rows, columns)`` that it goes round.
    """

    picture: np.ndarray
    width: float
    height: float
    letters: tuple[str, str, str, str] | None = None
    corner: str = ""
    lines: Sequence[tuple[str, np.ndarray]] = ()


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
    subtitle: str | None = None
    caption: str = ""
    side: float = 2.5  # inches, of the longest side of a picture


def new(width: float, height: float, paper: str) -> "Figure":
    """Make an empty figure, drawn without a window, that a notebook shows."""
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


def png(figure: "Figure", colours: int | None = None) -> bytes:
    """Return the figure as a PNG file: the same bytes for the same figure, without date and program.

    colours: how many different ones the file may have, 2 to 256; with 256 it takes a third of the bytes and of the
    time, and eyes see no difference. None keeps every shade.
    """
    from PIL import Image  # matplotlib cannot be without it

    canvas: Any = figure.canvas
    if not hasattr(canvas, "buffer_rgba"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
    before = figure.dpi
    try:
        figure.dpi = DPI
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font lacks
            canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    finally:
        figure.dpi = before
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if colours is not None:
        image = image.quantize(palette=_palette(pixels, colours), dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, "png", compress_level=4)
    return out.getvalue()


def _palette(pixels: np.ndarray, colours: int) -> Any:
    """The colours of a picture, from every fourth row and column: half of them many pixels have, half are rare.

    Outlines are named by their colours and may have few pixels: theirs are kept as they are.
    """
    from PIL import Image

    few = Image.fromarray(np.ascontiguousarray(pixels[::4, ::4]))
    often, rare = Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE
    found = _of_rings() if colours >= 64 else []
    left = colours - len(found) // 3
    for count, how in ((left - left // 2, often), (left // 2, rare)):
        found += (few.quantize(count, method=how).getpalette() or [])[: 3 * count]
    palette = Image.new("P", (1, 1))
    palette.putpalette(found + found[:3] * (256 - len(found) // 3))
    return palette


def _of_rings() -> list[int]:
    """The colours of outlines, each also half as bright, as it is at the edge of its line."""
    whole = [int(hue[i : i + 2], 16) for _, hue in colours.RINGS for i in (1, 3, 5)]
    return [*whole, *(part // 2 for part in whole)]


def save(figure: "Figure", path: "str | os.PathLike[str]", colours: int | None = None) -> Path:
    """Write a figure as PNG: the same bytes for the same data, whole or not at all.

    Args:
        figure: what a function of this package returned, or any other of matplotlib.
        path: the file; its folder is made if it is missing.
        colours: how many different ones the file may have, 2 to 256; with 256 it is a third as large.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    content = png(figure, colours)
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
    """Return the power of ten that is taken out of a number, 0 if it is easily read without.

    >>> power(12345.0), power(0.5), power(0.0002)
    (4, 0, -4)
    """
    found = math.floor(math.log10(abs(value))) if value else 0
    return found if found >= 3 or found <= -3 else 0


def numeral(value: float) -> str:
    """Return a number in three digits.

    >>> numeral(0.0), numeral(1234567.0), numeral(0.25), numeral(-0.00012)
    ('0', '1.23 × 10⁶', '0.25', '-1.2 × 10⁻⁴')
    """
    taken = power(value)
    return times(f"{value / 10.0**taken:.3g}", taken)


def times(text: str, power: int) -> str:
    """Return a number or a unit times a power of ten.

    >>> times("score", 3)
    'score × 10³'
    """
    return f"{text} × 10{str(power).translate(RAISED)}" if power else text


BAR_STEPS = 256
GREYS = (0.08, 0.72)  # what lies below the two halves of a colour bar: dark and bright tissue


def _bar(figure: "Figure", where: tuple[float, float, float, float], bar: Bar, lying: bool) -> None:
    """A colour bar: its halves lie on dark and on bright grey, as colours do in the pictures."""
    scale = bar.scale
    low = -1.0 if scale.kind in ("signed", "negative") else 0.0
    high = 0.0 if scale.kind == "negative" else 1.0
    share = np.linspace(low, high, BAR_STEPS)
    strip = np.stack(
        [colours.blend(share, scale._replace(limit=1.0), np.full((BAR_STEPS, 3), grey)) for grey in GREYS]
    )
    _image(figure, where, strip if lying else strip.swapaxes(0, 1)[::-1], "nearest", "bar")
    x, y, w, h = where
    _lines(figure, [np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]])], "#8a8e95", 0.6)
    ticks = np.linspace(low, high, 3 if lying or high - low == 1 else 5)
    taken = power(scale.limit)
    end = scale.limit / 10.0**taken
    places = max(0, 2 - math.floor(math.log10(end))) if end else 0
    unit = times(bar.unit, taken)
    inch = 1 / figure.get_size_inches()
    tick_like = {"color": INK, "fontsize": 7.5, "gid": "bar"}
    for tick in ticks:
        name = "0" if tick == 0 else f"{tick * end:.{places}f}".replace("-", "\u2212") if scale.limit else ""
        at = (tick - low) / (high - low)
        if lying:
            _word(
                figure, x + at * w, y - 0.03 * inch[1], name, ha="center", va="top", color=INK, fontsize=7.5
            )
        else:
            _word(figure, x + w + 0.05 * inch[0], y + at * h, name, va="center", **tick_like)
    if lying:
        _word(figure, x + w / 2, y - 0.17 * inch[1], unit, ha="center", va="top", color=QUIET, fontsize=7.5)
    else:
        how = {"ha": "center", "va": "center", "rotation": 90, "color": QUIET, "fontsize": 7.5}
        _word(figure, x + w + 0.56 * inch[0], y + h / 2, unit, **how)


def _word(figure: "Figure", x: float, y: float, text: str, **how: Any) -> None:
    """Text at a place that is given in shares of the figure."""
    if text:
        written(figure, x, y, text, transform=figure.transFigure, **how)


def _image(
    figure: "Figure",
    where: tuple[float, float, float, float],
    picture: np.ndarray,
    how: str,
    name: str = "picture",
) -> None:
    """A picture in a place that is given in shares of the figure. Axes would take ten times as long."""
    from matplotlib.image import BboxImage
    from matplotlib.transforms import Bbox, TransformedBbox

    box = TransformedBbox(Bbox.from_bounds(*where), figure.transFigure)
    image = BboxImage(box, interpolation=how, origin="upper")
    image.set_data(np.clip(picture, 0, 1))
    image.set_gid(name)
    figure.add_artist(image)


def _lines(figure: "Figure", parts: Sequence[np.ndarray], colour: str, width: float) -> None:
    """Lines through points that are given in shares of the figure."""
    from matplotlib.collections import LineCollection

    lines: Any = LineCollection(list(parts), colors=colour, linewidths=width, transform=figure.transFigure)
    figure.add_artist(lines)


def sheet(where: str, content: Sheet) -> "Figure":
    """Lay pictures out on a dark sheet, all to one scale of length."""
    rows = content.rows
    count = max(len(row) for row in rows)
    cells = [cell for row in rows for cell in row if cell is not None]
    if not cells:
        raise check.refused(where, "something to draw", "no maps", "Pass one map or more")
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
    facts = textwrap.wrap(content.subtitle or "", int(14 * (width - 2 * edge)))[:3]
    top = edge + 0.22 * len(titles) + 0.16 * len(facts)
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
    for i, line in enumerate(facts):
        note(edge, edge + 0.22 * len(titles) + 0.16 * i, line, fontsize=8.5, color="#c9ccd1", va="top")
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
    _image(figure, where, cell.picture, "bilinear")
    x, y, w, h = where
    for colour, mask in cell.lines:
        parts = [np.column_stack([x + w * part[:, 0], y + h * part[:, 1]]) for part in rings(mask)]
        if parts:
            _lines(figure, parts, FILM, 2.2)  # a dark rim: to be seen on what is bright, too
            _lines(figure, parts, colour, 1.1)
    # A dark ground: to be read on any picture.
    at = {"fontsize": 7.5, "color": "#f4f5f7", "bbox": {**GROUND}}
    inch = 1 / figure.get_size_inches()
    dx, dy = 0.045 * inch
    if cell.letters:
        low, high, top, bottom = cell.letters
        _word(figure, x + dx, y + h / 2, low, ha="left", va="center", **at)
        _word(figure, x + w - dx, y + h / 2, high, ha="right", va="center", **at)
        _word(figure, x + w / 2, y + h - dy, top, ha="center", va="top", **at)
        _word(figure, x + w / 2, y + dy, bottom, ha="center", va="bottom", **at)
    if cell.corner:
        _word(figure, x + dx, y + h - dy, cell.corner, ha="left", va="top", **at)


GROUND = {"facecolor": FILM, "alpha": 0.6, "pad": 1.0, "linewidth": 0}


def rings(mask: np.ndarray) -> list[np.ndarray]:
    """Return the closed lines round a mask ``(rows, columns)``, as points right and up in shares of its sides.

    >>> [ring.min(0).tolist() + ring.max(0).tolist() for ring in rings(np.array([[False, True], [False, False]]))]
    [[0.5, 0.5, 1.0, 1.0]]
    """
    if not mask.any():
        return []
    rows, columns = mask.shape
    # Along the sides of pixels: a mask is what it is, however coarse.
    wide = np.pad(mask, 1)
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def enter(cells: np.ndarray, start: tuple[int, int], end: tuple[int, int]) -> None:
        for r, c in np.argwhere(cells) - 1:
            steps.setdefault((r + start[0], c + start[1]), []).append((r + end[0], c + end[1]))

    enter(wide & ~np.roll(wide, 1, 0), (0, 0), (0, 1))
    enter(wide & ~np.roll(wide, -1, 1), (0, 1), (1, 1))
    enter(wide & ~np.roll(wide, -1, 0), (1, 1), (1, 0))
    enter(wide & ~np.roll(wide, 1, 1), (1, 0), (0, 0))
    found = []
    while steps:
        first = here = next(iter(steps))
        ring = [first]
        while here in steps:
            following = steps[here].pop()
            if not steps[here]:
                del steps[here]
            here = following
            ring.append(here)
            if here == first:
                break
        points = np.array(ring, dtype=np.float64)
        found.append(np.column_stack([points[:, 1] / columns, 1 - points[:, 0] / rows]))
    return found
