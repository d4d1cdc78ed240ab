"""Rows of measurements, the file that keeps them, and what has moved since it was made."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("ratios.json")
Content = dict[str, dict[str, Any]]


class Options(NamedTuple):
    """What the command was asked for."""

    quick: bool = False
    rounds: int = 5
    only: tuple[str, ...] = ()

    def wants(self, group: str, what: str) -> bool:
        """Whether a row is asked for: one of the words is in its name."""
        return not self.only or any(word in f"{group}: {what}" for word in self.only)


class Aim(NamedTuple):
    """Which value should be at least (``>=``) or at most (``<=``) a bound."""

    value: str
    sign: str
    bound: float

    def met(self, values: Mapping[str, float]) -> bool:
        """Whether the value is there and on the right side."""
        found = values.get(self.value, math.nan)
        return found >= self.bound if self.sign == ">=" else found <= self.bound


class Row(NamedTuple):
    """One measurement: ratios by name, never seconds.

    ``series`` are for the figures; ``note`` is an error or a remark.
    """

    group: str
    what: str
    values: dict[str, float]
    aim: Aim | None = None
    note: str = ""
    series: dict[str, list[float]] | None = None


class Question(NamedTuple):
    """One file: what it measures, in which units, and by which factor a value may differ before it has moved."""

    name: str
    title: str
    text: str
    measure: Callable[[Options], Iterator[Row]]
    tolerance: dict[str, float]
    draw: Callable[[list[Row]], Any]


class Moved(NamedTuple):
    """A value that is no longer what it was, or an aim that is no longer met."""

    question: str
    row: str
    value: str
    before: float
    now: float
    worse: bool | None

    def __str__(self) -> str:
        how = {True: "worse", False: "better", None: "different"}[self.worse]
        return (
            f"{self.question}, {self.row}, {self.value}: {self.before:.3g} before, {self.now:.3g} now, {how}"
        )


def setting(options: Options) -> dict[str, Any]:
    """What has to be the same for two tables to be compared; the version of torch is only told."""
    return {
        "quick": options.quick,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def read(file: Path = FILE) -> Content:
    """Return what was measured before, or nothing."""
    return json.loads(file.read_text()) if file.exists() else {}


def rows(content: Content, question: str) -> list[Row]:
    """Return the rows of a question in the order in which they were first measured."""
    found = content.get(question, {}).get("rows", [])
    return [Row(**{**row, "aim": Aim(*row["aim"]) if row.get("aim") else None}) for row in found]


def merged(content: Content, question: str, made: dict[str, Any], new: Iterable[Row]) -> Content:
    """Replace the rows that were measured anew; of another setting nothing stays."""
    old = rows(content, question) if _same(content.get(question, {}).get("setting", {}), made) else []
    table = {(row.group, row.what): row for row in old}
    table.update({(row.group, row.what): row for row in new})
    return {**content, question: {"setting": made, "rows": [_plain(row) for row in table.values()]}}


def _plain(row: Row) -> dict[str, Any]:
    """As JSON holds it, with three digits: the others are noise."""
    short = lambda v: float(f"{v:.3g}")
    series = None if row.series is None else {k: [short(v) for v in vs] for k, vs in row.series.items()}
    values = {k: short(v) for k, v in row.values.items()}
    full = row._replace(values=values, series=series, aim=list(row.aim) if row.aim else None)._asdict()
    return {key: value for key, value in full.items() if value not in (None, "")}


def write(content: Content, file: Path = FILE) -> None:
    """Write the file, one row a line, so that a change of a row is a change of a line."""
    parts = []
    for name, part in content.items():
        lines = ",\n".join("   " + json.dumps(row) for row in part["rows"])
        parts.append(
            f' {json.dumps(name)}: {{\n  "setting": {json.dumps(part["setting"])},\n  "rows": [\n{lines}\n  ]\n }}'
        )
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a.get(key) == b.get(key) for key in ("quick", "threads"))


def moved(question: Question, before: Content, made: dict[str, Any], new: Iterable[Row]) -> list[Moved]:
    """Return what differs from before by more than the tolerance of its value, and every aim that is lost.

    Refuses to compare what was measured in another setting. Rows that are new or were not asked for say nothing; a
    row that had numbers and now has an error has lost all of them.
    """
    old = before.get(question.name)
    if old is None:
        raise ValueError(
            f"--check: expected ratios of {question.name} in {FILE.name}, got none. Measure with --write first."
        )
    if not _same(old["setting"], made):
        raise ValueError(
            f"--check: expected the setting of {FILE.name}, {old['setting']}, got {made}. "
            "Set OMP_NUM_THREADS and --quick as they were."
        )
    known = {(row.group, row.what): row for row in rows(before, question.name)}
    found: list[Moved] = []
    for row in new:
        was = known.get((row.group, row.what))
        if was is not None:
            found += _moved(question, was, row)
    return found


def _moved(question: Question, was: Row, row: Row) -> Iterator[Moved]:
    name = f"{row.group}, {row.what}"
    for value, tolerance in question.tolerance.items():
        if value not in was.values:
            continue
        before, now = was.values[value], row.values.get(value, math.nan)
        aim = row.aim or was.aim
        judged = aim is not None and aim.value == value
        lost = judged and aim.met(was.values) and not aim.met(row.values)
        if lost or not _near(before, now, tolerance):
            worse = ((now < before) == (aim.sign == ">=") if now == now else True) if judged else None
            yield Moved(question.name, name, value, before, now, worse)


def _near(a: float, b: float, tolerance: float) -> bool:
    """Whether two values are within a factor of each other; for what may be zero, within the tolerance itself."""
    if math.isnan(a) and math.isnan(b):
        return True
    return abs(a - b) <= tolerance * max(abs(a), 1e-3)
