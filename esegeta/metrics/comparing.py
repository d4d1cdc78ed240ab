"""Several methods judged by several metrics on several images, in one table."""

import contextlib
import csv
import functools
import inspect
import io
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from esegeta import random
from esegeta._registry import METHODS, METRICS, Registry
from esegeta._types import Explain, Score
from esegeta.engine import check, levels, progress
from esegeta.engine.estimates import value_and_error
from esegeta.engine.execution import ExecutionWarning, execution
from esegeta.engine.sharing import sharing
from esegeta.metrics.declared import contributions, direction, spec_of
from esegeta.metrics.explanations import asked, doubts, says
from esegeta.metrics.nulls import Calibrated
from esegeta.metrics.subsets import spearman

Metric = Callable[..., Callable[..., Any]]
Method = Callable[[Score], Explain]
Table = Literal["rows", "differences", "cells"]
RESAMPLES = 2000
_TURNED = {"higher": 1.0, "lower": -1.0, "": math.nan}
EXACT = 12  # up to so many patients every choice of signs is looked at


class Cell(NamedTuple):
    """One number: of one method by one metric on one image.

    error: the standard error of a sampled metric, else NaN; null_mean, p: of a metric that is calibrated, else NaN;
    evaluations: images that the score was run on forwards, of whatever share, what several maps have in common for
    the first of them only; seconds: that it took;
    map_evaluations, map_seconds: what the map took, which all metrics share;
    reason: why there is no number, or why it is of less than was asked for.
    """

    method: str
    metric: str
    image: int
    patient: str
    value: float
    error: float
    null_mean: float
    p: float
    evaluations: int
    seconds: float
    map_evaluations: int
    map_seconds: float
    reason: str


class Row(NamedTuple):
    """A method by a metric, over all patients.

    value: the mean over patients of the means over their images; low, high: an interval of 95 %, by bootstrap over
    patients, of one alone by the metric's own standard error, else NaN; null_mean: the mean of what random maps have,
    of a metric that is calibrated; better: which way; patients: how many have a number; evaluations, seconds: in
    sum over images, with what the maps took; reason: as of cells, the first of them.
    """

    method: str
    metric: str
    value: float
    low: float
    high: float
    null_mean: float
    better: str
    patients: int
    evaluations: int
    seconds: float
    reason: str


class Difference(NamedTuple):
    """How much more one method has than another by a metric, in pairs over patients.

    low, high: an interval of 95 % by bootstrap; p: of the test that turns signs at random, NaN for fewer than two
    patients; holm: p for all differences of the table together; patients: how many have both numbers.
    """

    metric: str
    method: str
    other: str
    value: float
    low: float
    high: float
    p: float
    holm: float
    patients: int


@dataclass(frozen=True)
class Comparison:
    """Rows for each method and metric, differences in pairs, the agreement of metrics, and every single number.

    agreement: for two metrics, the rank correlation of what they make of the methods, better ones higher; NaN with
    fewer than three methods, or where a metric does not say which way is better.
    """

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    agreement: Mapping[tuple[str, str], float]
    cells: tuple[Cell, ...]

    def csv(self, table: Table = "rows") -> str:
        """Return a table as comma-separated values, what is missing as nothing.

        Args:
            table: "rows", "differences" or "cells", every single number.
        """
        check.one_of("Comparison.csv", "table", table, ("rows", "differences", "cells"))
        kind: Any = {"rows": Row, "differences": Difference, "cells": Cell}[table]
        return _csv(kind._fields, getattr(self, table))

    def json(self) -> str:
        """Return everything as JSON, what is missing as null."""
        found = {
            "rows": [_plain(r._asdict()) for r in self.rows],
            "differences": [_plain(d._asdict()) for d in self.differences],
            "agreement": [
                _plain({"metric": a, "other": b, "value": v}) for (a, b), v in self.agreement.items()
            ],
            "cells": [_plain(c._asdict()) for c in self.cells],
        }
        return json.dumps(found, indent=1, allow_nan=False)

    def __str__(self) -> str:
        """Return the rows as a table of text."""
        calibrated = any(not math.isnan(r.null_mean) for r in self.rows)
        head = ("method", "metric", "value", "95 %", *(["random"] if calibrated else []))
        lines = [(*head, "better", "n", "forwards", "s", "")]
        for r in self.rows:
            beside = [number(r.null_mean)] if calibrated else []
            counts = (str(r.patients), str(r.evaluations), f"{r.seconds:.2f}")
            about = (r.method, r.metric, number(r.value), between(r.low, r.high))
            lines.append((*about, *beside, r.better or "-", *counts, r.reason))
        return aligned(lines)

    def show(self) -> None:
        """Print the rows, the differences in pairs, and which metrics agree, as far as there are any."""
        print(self)
        pairs = [d for d in self.differences if d.patients > 1]
        if pairs:
            lines = [("metric", "method", "less", "difference", "95 %", "p", "Holm", "n")]
            for d in pairs:
                about = (d.metric, d.method, d.other, number(d.value), between(d.low, d.high))
                lines.append((*about, number(d.p), number(d.holm), str(d.patients)))
            print(f"\n{aligned(lines)}")
        agreeing = {pair: value for pair, value in self.agreement.items() if not math.isnan(value)}
        if agreeing:
            alike = [(a, b, number(v)) for (a, b), v in agreeing.items()]
            print(f"\n{aligned([('metric', 'and', 'rank methods alike'), *alike])}")


def number(value: float | None) -> str:
    """Return a number as it stands in a table of text.

    >>> number(0.123456), number(math.nan), number(None)
    ('0.1235', '-', '-')
    """
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def between(low: float, high: float) -> str:
    """Return an interval as it stands in a table of text.

    >>> between(0.5, 1), between(math.nan, math.nan)
    ('0.5 to 1', '-')
    """
    return "-" if math.isnan(low) else f"{low:.4g} to {high:.4g}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of a table with their columns below one another.

    >>> print(aligned([("a", "b"), ("long", "c")]))
    a     b
    long  c
    """
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def compare(
    methods: Mapping[str, Method] | Sequence[Method | str],
    score: Score | Sequence[Score],
    xs: Tensor | Sequence[Tensor],
    *,
    metrics: Mapping[str, Metric] | Sequence[Metric | str],
    refs: tuple[Tensor, ...] | list[tuple[Tensor, ...]] = (),
    masks: Tensor | Sequence[Tensor] | None = None,
    patients: Sequence[Any] | None = None,
    deadline: float | None = None,
    key: int = 0,
) -> Comparison:
    """Judge methods by metrics on images, and return one tidy table.

    Every map is computed once for each method and image, and all metrics judge that one; those that need
    explanations of other inputs draw the same random numbers there. Perturbed images that are the same for every map
    are run once (``metrics.sharing``). What cannot be said of a map is NaN with its
    reason. Images of one patient are no independent cases: intervals and tests are over patients.

    Args:
        methods: by name, from a score to an explanation: ``{"ig": eg.integrated_gradients}``; or a list of them, or
            of the names of registered ones: ``["gradient", eg.saliency]``.
        score: ``(C,*S) -> ()``, or one for each image, where masks are frozen at it.
        xs: images, stacked or in a sequence.
        metrics: by name, from (explain) or (explain, score) to a measure: ``{"auc": metrics.roc_auc}``, and
            ``functools.partial(metrics.deletion, steps=16)`` with settings, or
            ``metrics.calibrated(metrics.roc_auc)`` to have random maps beside each; or a list as for methods. Of a
            curve the area counts.
        refs: a tuple for all images, or a list with a tuple for each.
        masks: one for each image, for the metrics that take one.
        patients: of each image; by default each is a patient of its own.
        deadline: seconds for each method; what it did not come to is NaN.
        key: of the draws.

    Returns:
        A ``Comparison``, with ``rows``, ``differences``, ``agreement``, ``cells``, ``csv()``, ``json()``, ``show()``.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (x * torch.tensor([3.0, 2.0, 1.0])).sum()
        >>> methods = {"gradient": eg.gradient, "product": eg.input_x_gradient}
        >>> found = compare(methods, score, torch.ones(2, 1, 3), metrics={"deletion": eg.metrics.deletion})
        >>> [(r.method, round(r.value, 3), r.better, r.patients) for r in found.rows]
        [('gradient', 2.333, 'lower', 2), ('product', 2.333, 'lower', 2)]
    """
    where = "compare"
    images = list(xs)
    methods = _named(where, "methods", methods, METHODS)
    metrics = _named(where, "metrics", metrics, METRICS)
    count = len(images)
    if not count:
        raise check.refused(where, "at least one image", "none", "Pass xs=[x]")
    scores = list(score) if isinstance(score, Sequence) else [score] * count
    known = list(refs) if isinstance(refs, list) else [refs] * count
    shown = [None] * count if masks is None else list(masks)
    names = [str(n) for n in (range(count) if patients is None else patients)]
    lists: list[tuple[str, list[Any]]] = [
        ("score", scores),
        ("refs", known),
        ("masks", shown),
        ("patients", names),
    ]
    for what, found in lists:
        if len(found) != count:
            expected = f"{what} for each of the {count} images"
            raise check.refused(where, expected, str(len(found)), "Pass as many")
    limit = math.inf if deadline is None else check.non_negative(where, "deadline", deadline)
    cells: dict[str, list[Cell]] = {name: [] for name in methods}
    left = dict.fromkeys(methods, limit)  # seconds
    with progress.loop(where) as bar:
        for i, x in enumerate(images):
            runs = [0]
            watched = counted(scores[i], runs)
            # One score and one key for all methods: images with all parts or none, perturbations and random sets are
            # the same for every map, and are run once.
            with sharing():
                for n, (name, method) in enumerate(methods.items()):
                    place = (name, i, names[i])
                    job = (watched, runs, x, known[i], shown[i], random.fold_in(key, i))
                    done = (i * len(methods) + n) / (count * len(methods))
                    begun = time.monotonic()
                    with progress.step(bar, done, done + 1 / (count * len(methods))):
                        cells[name] += _judged(place, method, metrics, *job, begun + left[name])
                    left[name] -= time.monotonic() - begun
        bar.at(1.0)
    ways: dict[str, str] = {m: _way(metric) for m, metric in metrics.items()}
    return _gathered([cell for some in cells.values() for cell in some], list(methods), ways, key)


Function = TypeVar("Function", bound=Callable[..., Any])


def _named(
    where: str,
    what: str,
    value: Mapping[str, Function] | Sequence[Function | str],
    registry: Registry[Any],
) -> Mapping[str, Function]:
    """What is given by name; a list of functions, or of the names of registered ones, gets their names."""
    found: Mapping[str, Any] = {}
    if isinstance(value, Mapping):
        found = value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        made = [registry.find(one).fn if isinstance(one, str) else one for one in value]
        titles = [getattr(getattr(one, "func", one), "__name__", "") for one in made]
        if len(set(titles)) < len(titles):
            twice = next(title for title in titles if titles.count(title) > 1)
            advice = f"Pass {what}={{'name': function}}"
            raise check.refused(where, f"{what} with different names", f"{twice!r} twice", advice)
        found = dict(zip(titles, made, strict=True))
    right = bool(found) and all(isinstance(k, str) and k and callable(v) for k, v in found.items())
    if not right:
        advice = f"Pass {what}={{'name': function}}, or a list of functions"
        raise check.refused_type(where, f"{what} by name", check.describe(value), advice)
    return found


def counted(score: Score, count: list[int]) -> Score:
    """Return a score that adds to a number on how many images it was run.

    >>> count = [0]
    >>> _ = torch.vmap(counted(lambda x: x.sum(), count))(torch.ones(3, 1, 2))
    >>> count
    [3]
    """

    @functools.wraps(score)
    def watched(x: Tensor) -> Tensor:
        patch = getattr(x, "patch", None)  # of images of which only a window is computed
        count[0] += levels.mapped() if patch is None else len(patch)
        return score(x)

    return watched


def _once(
    explain: Explain, x: Tensor, refs: tuple[Tensor, ...], a: Tensor, key: Tensor, multiplied: bool | None
) -> Explain:
    """The explanation with its draws fixed, which remembers its map of x, and knows what its numbers are."""

    def again(y: Tensor, *others: Tensor) -> Tensor:
        same = y is x and len(others) == len(refs) and all(s is t for s, t in zip(others, refs, strict=True))
        return a if same else asked(explain, y, others, key)

    for name, usual in (("finished", None), ("multiplied", multiplied)):
        told = says(explain, name)
        if told is not None or usual is not None:
            setattr(again, name, usual if told is None else told)
    return again


@contextlib.contextmanager
def _until(end: float) -> Iterator[list[str]]:
    """Work until then, and say why something is missing."""
    reasons: list[str] = []
    left = end - time.monotonic()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ExecutionWarning)
        try:
            with execution(deadline=None if math.isinf(left) else max(left, 0.0)):
                yield reasons
        except (ValueError, TypeError, TimeoutError, NotImplementedError) as problem:
            reasons.append(str(problem).splitlines()[0])
        except (
            RuntimeError
        ) as problem:  # of torch, for example: the numbers of the others are not lost for it
            reasons.append(f"{type(problem).__name__}: {str(problem).splitlines()[0]}")
    reasons += [str(w.message) for w in told if issubclass(w.category, ExecutionWarning)]


def _in_time(end: float) -> None:
    if time.monotonic() >= end:
        raise TimeoutError("the deadline of the method passed before")


def _judged(
    place: tuple[str, int, str],
    method: Method,
    metrics: Mapping[str, Metric],
    watched: Score,
    count: list[int],
    x: Tensor,
    refs: tuple[Tensor, ...],
    mask: Tensor | None,
    key: Tensor,
    end: float,
) -> Iterable[Cell]:
    """The cells of one method on one image."""
    name, image, patient = place
    before, begun, explain, a = count[0], time.perf_counter(), None, None
    with _until(end) as why:
        _in_time(end)
        found = method(watched)
        a = asked(found, x, refs, random.fold_in(key, 0))
        explain = _once(found, x, refs, a, random.fold_in(key, 0), contributions(method))
    cost = (count[0] - before, time.perf_counter() - begun)
    for number, (title, metric) in enumerate(metrics.items(), 1):
        before, started = count[0], time.perf_counter()
        value = error = null_mean = p = math.nan
        reasons = list(why)
        if explain is not None:
            with _until(end) as more:
                _in_time(end)
                measure = metric(explain, watched) if _takes_score(metric) else metric(explain)
                masked = _masked(metric, mask)
                known = called(measure, {"key": random.fold_in(key, number), **masked})
                got, spread = value_and_error(measure, x, *refs, **known)
                more += doubts(a, mask=known.get("mask"))
                if isinstance(got, Calibrated):
                    null_mean, p = float(got.null_mean), float(got.p)
                    got = got.value
                value = float(getattr(got, "area", got))
                error = math.nan if spread is None else float(spread)
            reasons += more
            if math.isnan(value) and not reasons:
                reasons = ["not defined for this map, mask or score"]
        taken = (count[0] - before, time.perf_counter() - started)
        yield Cell(name, title, image, patient, value, error, null_mean, p, *taken, *cost, "; ".join(reasons))


def _way(metric: Metric) -> str:
    """Which way a metric is better, empty if neither; what is made of another one says so by an attribute."""
    return direction(metric) or getattr(metric, "better", None) or ""


def _masked(metric: Metric, mask: Tensor | None) -> dict[str, Tensor]:
    """The mask, for a metric that does not say that it takes none."""
    spec = spec_of(inspect.unwrap(metric))
    return {} if mask is None or (spec is not None and "mask" not in spec.needs) else {"mask": mask}


def _takes_score(metric: Callable[..., Any]) -> bool:
    """Whether a metric asks for the score, after the explanation."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    asked_for = [p for p in inspect.signature(metric).parameters.values() if p.kind in kinds]
    return len(asked_for) > 1 and asked_for[1].default is inspect.Parameter.empty


def called(measure: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some tensors that a measure takes at its call.

    >>> called(lambda x, *refs, key=None: x, {"key": 3, "mask": None})
    {'key': 3}
    """
    known = inspect.signature(measure).parameters
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    return {name: value for name, value in given.items() if any_name or name in known}


def _gathered(cells: list[Cell], methods: list[str], ways: dict[str, str], key: int) -> Comparison:
    patients = list(dict.fromkeys(c.patient for c in cells))
    table = {}
    for m, t in itertools.product(methods, ways):
        mine = [c for c in cells if (c.method, c.metric) == (m, t)]
        table[m, t] = torch.tensor(
            [_mean([c.value for c in mine if c.patient == p]) for p in patients], dtype=torch.float64
        )
    rows, means = [], {}
    for (m, t), values in table.items():
        mine = [c for c in cells if (c.method, c.metric) == (m, t)]
        there = values[~values.isnan()]
        value, low, high = interval(there, key)
        if len(there) == 1 and len(mine) == 1:
            low, high = (value + s * 1.96 * mine[0].error for s in (-1, 1))
        cost = (
            sum(c.evaluations + c.map_evaluations for c in mine),
            sum(c.seconds + c.map_seconds for c in mine),
        )
        reason = next((c.reason for c in mine if c.reason), "")
        beside = _mean([_mean([c.null_mean for c in mine if c.patient == p]) for p in patients])
        rows.append(Row(m, t, value, low, high, beside, ways[t], len(there), *cost, reason))
        means[m, t] = value
    differences = []
    for t in ways:
        for m, other in itertools.combinations(methods, 2):
            pairs = table[m, t] - table[other, t]
            pairs = pairs[~pairs.isnan()]
            found = (*interval(pairs, key), turned_signs(pairs, key), math.nan)
            differences.append(Difference(t, m, other, *found, len(pairs)))
    adjusted = holm([d.p for d in differences])
    differences = [d._replace(holm=p) for d, p in zip(differences, adjusted, strict=True)]
    agreement = {}
    for one, two in itertools.combinations(ways, 2):
        a, b = (torch.tensor([_TURNED[ways[t]] * means[m, t] for m in methods]).double() for t in (one, two))
        both = ~(a.isnan() | b.isnan())
        agreement[one, two] = spearman(a[both], b[both]).item() if both.sum() > 2 else math.nan
    return Comparison(tuple(rows), tuple(differences), agreement, tuple(cells))


def _mean(values: list[float]) -> float:
    there = [v for v in values if not math.isnan(v)]
    return sum(there) / len(there) if there else math.nan


def interval(values: Tensor, key: int) -> tuple[float, float, float]:
    """Return the mean, and where 95 % of the means of resampled values lie; NaN of fewer than two.

    The interval is NaN where a value is not finite.

    >>> interval(torch.tensor([1.0, 1.0, 1.0]), 0)
    (1.0, 1.0, 1.0)
    """
    count = len(values)
    if not count:
        return math.nan, math.nan, math.nan
    if count == 1 or not values.isfinite().all():
        return values.mean().item(), math.nan, math.nan
    drawn = random.integers(random.fold_in(key, 1), (RESAMPLES, count), low=0, high=count)
    low, high = values[drawn].mean(1).quantile(values.new_tensor([0.025, 0.975])).tolist()
    return values.mean().item(), low, high


def turned_signs(values: Tensor, key: int) -> float:
    """Return p of a mean difference: how many choices of signs give one as large. All of them for few values.

    NaN of fewer than two, and where a value is not finite: no mean is as large as NaN, so p would be 0.

    >>> turned_signs(torch.tensor([1.0, 2.0, 3.0]), 0)
    0.25
    """
    count = len(values)
    if count < 2 or not values.isfinite().all():
        return math.nan
    if count <= EXACT:
        signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=count)), dtype=values.dtype)
    else:
        drawn = random.integers(random.fold_in(key, 2), (RESAMPLES, count), low=0, high=2)
        signs = torch.cat([torch.ones(1, count), 2.0 * drawn - 1]).to(values.dtype)
    sizes = (signs * values).mean(1).abs()
    return (sizes >= sizes[0] * (1 - 1e-9)).double().mean().item()


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values of several tests such that the chance of any false rejection stays below them (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted((p, n) for n, p in enumerate(ps) if not math.isnan(p))
    found, highest = [math.nan] * len(ps), 0.0
    for rank, (p, n) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        found[n] = highest
    return found


def benjamini_hochberg(ps: Sequence[float]) -> list[float]:
    """Return p-values of several tests such that the expected share of false rejections stays below them (1995).

    For tests that are independent or positively dependent.

    >>> benjamini_hochberg([0.01, 0.04, 0.03])
    [0.03, 0.04, 0.04]
    """
    order = sorted((p, n) for n, p in enumerate(ps) if not math.isnan(p))
    found, lowest = [math.nan] * len(ps), 1.0
    for rank, (p, n) in reversed(list(enumerate(order))):
        lowest = min(lowest, p * len(order) / (rank + 1))
        found[n] = lowest
    return found


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _csv(fields: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows(["" if isinstance(v, float) and math.isnan(v) else v for v in row] for row in rows)
    return out.getvalue()
