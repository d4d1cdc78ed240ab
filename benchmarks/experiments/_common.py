"""What the experiments share: intervals over cases and seeds, tables, and where pages and figures go."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DOCS = Path(__file__).parents[2] / "docs"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito 2008


class Interval(NamedTuple):
    """A mean and where it would lie in 95 of 100 repetitions with other cases and seeds."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):
            return number(self.mean)
        return f"{number(self.mean)} ({number(self.low)} to {number(self.high)})"


def interval(values: Any, *, draws: int = 2000, key: int = 0) -> Interval:
    """The mean of ``values`` (seeds, cases) and its bootstrap: seeds and cases are both drawn again.

    NaN where something is missing: a mean over what happened to succeed would say more than was measured. One case
    has a mean and no interval.
    """
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.ndim != 2 or not table.size or np.isnan(table).any():
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(key)
    seeds = rng.integers(table.shape[0], size=(draws, table.shape[0]))
    cases = rng.integers(table.shape[1], size=(draws, table.shape[1]))
    means = np.array([table[np.ix_(s, c)].mean() for s, c in zip(seeds, cases, strict=True)])
    low, high = np.quantile(means, [0.025, 0.975]) if table.shape[1] > 1 else (np.nan, np.nan)
    return Interval(float(table.mean()), float(low), float(high))


def verdict(difference: Interval) -> str:
    """What an interval of a difference, which a claim says is positive, says of the claim."""
    if np.isnan(difference).any():
        return "undecided"
    return "holds" if difference.low > 0 else "does not hold" if difference.high < 0 else "undecided"


def together(verdicts: Sequence[str]) -> str:
    """A conclusion of several parts holds if all do, and does not if one does not."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "undecided" if "undecided" in verdicts else "holds"


def number(value: float) -> str:
    """Three digits that count, with an exponent where zeros would hide them."""
    if np.isnan(value):
        return "NaN"
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def filled(name: str, **parts: object) -> str:
    """The page ``pages/{name}.md`` with its numbers."""
    return (Path(__file__).with_name("pages") / f"{name}.md").read_text().format(**parts)


def figure(name: str, drawn: Any, folder: Path) -> str:
    """Save a figure of matplotlib, in 256 colours, and return the place of the file as a page names it."""
    from PIL import Image

    from esegeta import plot

    file = folder / "images" / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    plot.save(drawn, file)
    with Image.open(file) as whole:
        few = whole.convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE)
    few.save(file, optimize=True)
    return f"../images/{name}.png"


def kept(file: Path | None, compute: Callable[[], Any]) -> Any:
    """What a JSON file holds; where there is none, compute it and keep it there."""
    if file is not None and file.exists():
        return json.loads(file.read_text())
    found = compute()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return found
