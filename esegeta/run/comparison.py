"""Two finished runs beside each other: how alike their maps are, and by how much their metrics differ.

Maps and numbers belong together that have the same subject, target and method in both runs, and for numbers the same
metric with the same settings. Nothing is computed again.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esegeta import metrics
from esegeta.engine import check
from esegeta.metrics.comparing import aligned, between, holm, interval, number, turned_signs
from esegeta.run.executors.status import MADE
from esegeta.run.jobs import outputs
from esegeta.run.jobs.kinds import Record
from esegeta.run.jobs.plan import record_of
from esegeta.run.report.page import inside

WHERE = "compare"
LIKENESS = {"rank correlation": metrics.rank_correlation, "ssim": metrics.ssim}
# What does not change the number of a metric.
_ASIDE = ("deadline", "memory", "methods", "targets", "null", "draws", "better")


class Change(NamedTuple):
    """How much more the second run has than the first by a metric, in pairs over subjects.

    first, second: the means; low, high: an interval of 95 % of their difference by bootstrap, NaN for one subject; p:
    of the test that turns signs at random; holm: p for all differences of the table together.
    """

    target: str
    method: str
    metric: str
    better: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    holm: float
    subjects: int


class Likeness(NamedTuple):
    """How alike the maps of two runs are: the mean over subjects, with an interval of 95 % by bootstrap."""

    target: str
    method: str
    measure: str
    value: float
    low: float
    high: float
    subjects: int


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common. notes: what to know before the numbers are believed."""

    changes: tuple[Change, ...]
    likeness: tuple[Likeness, ...]
    notes: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return all of it as one tidy table: of differences of metrics, then of likeness."""
        alike = [{**one._asdict(), "metric": f"maps: {one.measure}"} for one in self.likeness]
        return [one._asdict() for one in self.changes] + alike

    def csv(self) -> str:
        """Return the tidy table as comma-separated values, what is missing as nothing."""
        return outputs.table_text(self.rows(), [*Change._fields, "value"])

    def json(self) -> str:
        """Return everything as JSON, what is missing as null."""
        return outputs.json_text(
            {
                "changes": [one._asdict() for one in self.changes],
                "likeness": [one._asdict() for one in self.likeness],
                "notes": self.notes,
            }
        )

    def __str__(self) -> str:
        """Return the tables as text, the notes below."""
        parts = []
        if self.likeness:
            lines: list[Sequence[str]] = [("target", "map", "likeness of maps", "mean", "95 %", "n")]
            for one in self.likeness:
                named = (one.target, one.method, one.measure, number(one.value))
                lines.append((*named, between(one.low, one.high), str(one.subjects)))
            parts.append(aligned(lines))
        if self.changes:
            lines = [
                ("target", "map", "metric", "first", "second", "difference", "95 %", "p", "Holm", "n", "")
            ]
            for c in self.changes:
                about = (
                    c.target,
                    c.method,
                    c.metric,
                    number(c.first),
                    number(c.second),
                    number(c.difference),
                )
                beside = (between(c.low, c.high), number(c.p), number(c.holm), str(c.subjects), verdict(c))
                lines.append((*about, *beside))
            parts.append(aligned(lines))
        return "\n\n".join([*parts, *(["\n".join(self.notes)] if self.notes else [])])


def verdict(change: Change) -> str:
    """Return which run is better by a metric, in words; nothing where the difference may be chance.

    >>> verdict(Change("t", "m", "deletion", "lower", 2.0, 1.0, -1.0, -1.2, -0.8, 0.01, 0.04, 9))
    'the second is better'
    """
    if not change.better or not change.holm <= 0.05 or not change.difference:
        return ""
    second = (change.difference > 0) == (change.better == "higher")
    return f"the {'second' if second else 'first'} is better"


def records(folder: Path) -> list[Record]:
    """Return the records of a run, in the order of their names."""
    there = folder / ".jobs"
    found = [record_of(folder, path.stem) for path in sorted(there.glob("*.json"))] if there.is_dir() else []
    known = [one for one in found if one is not None and "kind" in one]
    if not known:
        got = f"{folder}, " + ("which has no records of jobs" if folder.is_dir() else "which is not there")
        raise check.refused(WHERE, "the folder of a finished run", got, "Name what run.output is there")
    return known


def compare(first: str | Path, second: str | Path, *, key: int = 0) -> Comparison:
    """Put two finished runs beside each other.

    Args:
        first: the folder of a run.
        second: of another one, with other networks, settings or methods of the same names.
        key: of the draws of the bootstrap.

    Returns:
        The differences of metrics, second less first; the likeness of maps; and notes.
    """
    folders = (Path(first), Path(second))
    every = [records(folder) for folder in folders]
    maps = [_by(found, "methods", "subject", "target", "method") for found in every]
    values = [_by(found, "metrics", "subject", "target", "method", "metric") for found in every]
    shared = [name for name in maps[0] if name in maps[1]]
    if not shared:
        raise check.refused(WHERE, "maps of one subject, target and method in both", _apart(maps), _ADVICE)
    notes = _notes(maps, shared)
    likeness, said = _likeness(folders, maps, shared, key)
    changes, more = _changes(values, key)
    return Comparison(tuple(changes), tuple(likeness), (*notes, *said, *more))


_ADVICE = "Give methods and targets the same names in both, with id and name"


def _by(found: Iterable[Record], kind: str, *keys: str) -> dict[tuple[str, ...], Record]:
    return {
        tuple(str(one.get(key)) for key in keys): one
        for one in found
        if one.get("kind", "methods") == kind and one.get("status") in MADE
    }


def _apart(maps: Sequence[Mapping[tuple[str, ...], Record]]) -> str:
    """What either run has, where nothing matches."""
    if not all(maps):
        return f"no finished map in the {'first' if not maps[0] else 'second'}"
    for n, what in enumerate(("subjects", "targets", "methods")):
        one, two = (sorted({name[n] for name in found}) for found in maps)
        if not set(one) & set(two):
            return f"the {what} {_few(one)} and {_few(two)}"
    return "none, though both have some of the subjects, targets and methods"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _notes(maps: Sequence[Mapping[tuple[str, ...], Record]], shared: Sequence[tuple[str, ...]]) -> list[str]:
    """What differs besides the numbers, and what has no counterpart."""
    found = []
    for n, which in enumerate(("first", "second")):
        alone = [name for name in maps[n] if name not in maps[1 - n]]
        if alone:
            found.append(
                f"Only in the {which}: {len(alone)} maps, {_few(['/'.join(name) for name in alone])}."
            )
    pairs = [(name, maps[0][name], maps[1][name]) for name in shared]
    images = sorted({name[0] for name, a, b in pairs if _made(a, "images") != _made(b, "images")})
    if images:
        found.append(f"Of other images in either run, so pairs are no pairs: {_few(images)}.")
    if any(_network(a) != _network(b) for _, a, b in pairs):
        found.append("The networks differ.")
    how = ("name", "parameters", "transforms", "baseline", "place", "patches", "key", "precision")
    other = sorted({name[2] for name, a, b in pairs if [a.get(k) for k in how] != [b.get(k) for k in how]})
    if other:
        found.append(f"Settings differ: {_few(other)}.")
    partial = [name for name, a, b in pairs if "partial" in (a["status"], b["status"])]
    if partial:
        found.append(f"Partial in a run: {_few(['/'.join(name) for name in partial])}.")
    return found


def _made(record: Record, what: str) -> Any:
    found = (record.get("made_from") or {}).get(what)
    return sorted(found.values()) if isinstance(found, dict) and what == "images" else found


def _network(record: Record) -> list[Any]:
    return [_made(record, what) for what in ("model", "arguments", "code", "weights")]


def _likeness(
    folders: Sequence[Path],
    maps: Sequence[Mapping[tuple[str, ...], Record]],
    shared: Sequence[tuple[str, ...]],
    key: int,
) -> tuple[list[Likeness], list[str]]:
    values: dict[tuple[str, str], list[list[float]]] = {}
    said = []
    for name in shared:
        pair = [_map(folder, found[name]) for folder, found in zip(folders, maps, strict=True)]
        one, two = pair
        if one is None or two is None:
            said.append(f"{'/'.join(name)}: a map is not kept in its folder.")
        elif one.shape != two.shape:
            said.append(f"{'/'.join(name)}: maps of shape {tuple(one.shape)} and {tuple(two.shape)}.")
        elif bool((one.isnan() | two.isnan()).any()):
            said.append(f"{'/'.join(name)}: a map has voxels that were not computed.")
        else:
            found = [float(measure(one, two)) for measure in LIKENESS.values()]
            values.setdefault((name[1], name[2]), []).append(found)
    rows = []
    for (target, method), several in values.items():
        for measure, column in zip(LIKENESS, zip(*several, strict=True), strict=True):
            known = torch.tensor([v for v in column if not math.isnan(v)], dtype=torch.float64)
            rows.append(Likeness(target, method, measure, *interval(known, key), len(known)))
    return rows, said


def _map(folder: Path, record: Record) -> Tensor | None:
    path = inside(folder, record.get("raw"))
    if path is None:
        return None
    try:
        values: Any = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None
    found = torch.from_numpy(values).double()
    return found if 2 <= found.ndim <= 4 else found.reshape(1, -1)


def _changes(values: Sequence[Mapping[tuple[str, ...], Record]], key: int) -> tuple[list[Change], list[str]]:
    groups: dict[tuple[str, ...], list[tuple[Record, Record]]] = {}
    for name, one in values[0].items():
        if name in values[1]:
            groups.setdefault(name[1:], []).append((one, values[1][name]))
    rows, said = [], []
    for (target, method, metric), pairs in groups.items():
        if any(_asked(a) != _asked(b) for a, b in pairs):
            said.append(f"{metric} of {method} has other settings in either run: left out.")
            continue
        known = [(a["value"], b["value"]) for a, b in pairs if None not in (a["value"], b["value"])]
        if not known:
            reason = next((one.get("reason") for one in itertools.chain(*pairs) if one.get("reason")), None)
            said.append(f"{metric} of {method}: no number in both runs{f' ({reason})' if reason else ''}.")
            continue
        both = torch.tensor(known, dtype=torch.float64)
        apart = both[:, 1] - both[:, 0]
        first, second = both.mean(0).tolist()
        better = pairs[0][0].get("better") or ""
        value, low, high = interval(apart, key)
        p = turned_signs(apart, key)
        about = (target, method, metric, better, first, second)
        rows.append(Change(*about, value, low, high, p, math.nan, len(known)))
    adjusted = holm([row.p for row in rows])
    if any(values) and not groups:
        said.append("No metric of one map is in both runs.")
    return [row._replace(holm=p) for row, p in zip(rows, adjusted, strict=True)], said


def _asked(record: Record) -> list[Any]:
    asked = record.get("asked") or {}
    return [record.get("name"), {k: v for k, v in asked.items() if k not in _ASIDE}]
