"""What can be named in a configuration, in words."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from esegeta._registry import (
    BASELINES,
    METHODS,
    METRICS,
    OBJECTIVES,
    RECIPES,
    REDUCERS,
    TRANSFORMS,
    MethodSpec,
    Spec,
)
from esegeta.engine import check
from esegeta.run.config import catalogue
from esegeta.run.config.catalogue import Parameter
from esegeta.run.config.faults import nearest
from esegeta.run.jobs import kinds

Rows = list[tuple[str, ...]]


def first_line(fn: Callable[..., Any]) -> str:
    """Return what a function is, in its own words."""
    return (inspect.getdoc(fn) or "").split("\n\n")[0].replace("\n", " ")


def _parameters(known: dict[str, Parameter]) -> str:
    return ", ".join(map(str, known.values()))


def tables() -> Iterator[tuple[str, tuple[str, ...], Rows]]:
    """Return title, head and rows of a table for each kind.

    >>> [title for title, _, _ in tables()]
    ['METHODS', 'TRANSFORMS', 'REDUCERS', 'BASELINES', 'OBJECTIVES', 'RECIPES', 'METRICS', 'KINDS OF JOBS']
    """
    rows: Rows = [
        (name, spec.origin, _needs(spec), _parameters(catalogue.of_method(spec)) or "-", first_line(spec.fn))
        for name, spec in sorted(METHODS.items())
    ]
    yield "METHODS", ("name", "from", "needs", "parameters", "what it is"), rows
    for title, table in (
        ("TRANSFORMS", TRANSFORMS),
        ("REDUCERS", REDUCERS),
        ("BASELINES", BASELINES),
        ("OBJECTIVES", OBJECTIVES),
        ("RECIPES", RECIPES),
    ):
        rows = [
            (name, spec.origin, _parameters(catalogue.of_method(spec)) or "-", first_line(spec.fn))
            for name, spec in sorted(table.items())
        ]
        yield title, ("name", "from", "parameters", "what it is"), rows
    rows = [
        (
            name,
            spec.origin,
            " ".join(spec.needs) or "-",
            spec.better or "-",
            _parameters(catalogue.of_method(spec)) or "-",
            first_line(spec.fn),
        )
        for name, spec in sorted(METRICS.items())
    ]
    yield "METRICS", ("name", "from", "needs", "better", "parameters", "what it is"), rows
    rows = [
        (kind.name, kind.origin, _table(kind), ", ".join(_keys(kind)) or "-", first_line(kind.work))
        for kind in kinds.known()
    ]
    yield "KINDS OF JOBS", ("name", "from", "table", "keys", "what a job does"), rows


def _table(kind: kinds.Kind) -> str:
    """The table that asks for a kind, as a file has it."""
    return f"[[{kind.table}]]" if kind.many or kind.section is None else f"[{kind.table}]"


def _keys(kind: kinds.Kind) -> list[str]:
    """The keys of the table that a kind brings along."""
    fields = {} if kind.section is None else kind.section.model_fields
    return [field.alias or name for name, field in fields.items()]


def _needs(spec: MethodSpec) -> str:
    """What a method needs besides the image."""
    return " ".join([*(["place"] if spec.place else []), *spec.refs, *(["key"] if spec.key else [])]) or "-"


def entry(name: str) -> str:
    """Return all about one of them; the nearest names if there is none.

    >>> print(entry("ig").splitlines()[0])
    integrated_gradients: a method
    """
    by_name = METHODS.by_name
    if name in by_name:
        spec = by_name[name]
        facts = {
            "also called": ", ".join(spec.also),
            "explains by": "the activations at a place" if spec.place else "",
            "needs": " and ".join([*spec.refs, *(["a random key (run.key)"] if spec.key else [])]),
            "of the score": {"gradient": "gradients", "values": "values", "activation": "activations"}[
                spec.needs
            ],
            "keeps": ", ".join(sorted(spec.axioms)) or "no axiom that is claimed",
            "reference": spec.paper,
        }
        return _text(spec, "method", facts)
    if name in TRANSFORMS:
        change = TRANSFORMS[name]
        facts = {"preserves": ", ".join(sorted(change.preserves)) or "no axiom", "reference": change.paper}
        return _text(change, "transform", facts)
    if name in REDUCERS:
        reducer = REDUCERS[name]
        facts = {
            "outputs": {"map": "maps", "vector": "of classifiers", "any": "of every kind"}[reducer.output],
            "gradient": "" if reducer.differentiable else "none: for methods that need only values",
        }
        return _text(reducer, "reducer", facts)
    if name in BASELINES:
        facts = {"count": "how many are drawn, default 1" if catalogue.draws(BASELINES[name].fn) else ""}
        return _text(BASELINES[name], "baseline", facts)
    if name in METRICS.by_name:
        metric = METRICS.by_name[name]
        facts = {
            "also called": ", ".join(metric.also),
            "family": metric.family,
            "needs": " and ".join(metric.needs) or "a map",
            "answers with": {"scalar": "a number", "sampled": "a number and its standard error"}.get(
                metric.answer, "a curve and its area"
            ),
            "better": metric.better or "neither higher nor lower",
            "reference": metric.paper,
        }
        return _text(metric, "metric", facts)
    for kind in kinds.known():
        if kind.name == name:
            lines = [f"{name}: a kind of jobs", f"  {first_line(kind.work)}", f"  table: {_table(kind)}"]
            if kind.section is not None:
                lines.append(f"  {first_line(kind.section)}")
            told = {"keys": _keys(kind), "reads": kind.reads, "columns": kind.columns}
            lines += [f"  {key}: {', '.join(words)}" for key, words in told.items() if words]
            return "\n".join([*lines, f"  origin: {kind.origin}"])
    also = [*METRICS.by_name, *(kind.name for kind in kinds.known())]
    known = [*by_name, *TRANSFORMS, *REDUCERS, *BASELINES, *also]
    expected = "the name of a method, transform, reducer, baseline, metric or kind of jobs"
    raise check.refused("methods", expected, repr(name), nearest(name, known))


def _text(spec: Spec, kind: str, facts: dict[str, str]) -> str:
    lines = [f"{spec.name}: a {kind}", f"  {first_line(spec.fn)}"]
    facts = {**facts, "origin": spec.origin}
    lines += [f"  {key}: {value}" for key, value in facts.items() if value]
    known = catalogue.of_method(spec)
    lines.append("  parameters:" if known else "  parameters: none")
    words = explained(spec.fn)
    for parameter in known.values():
        default = "no default" if parameter.required else f"default {str(parameter).partition('=')[2]}"
        lines.append(
            f"    {parameter.name} ({catalogue.wanted(parameter)}; {default}): {words.get(parameter.name, '')}"
        )
    return "\n".join(lines)


def explained(fn: Callable[..., Any]) -> dict[str, str]:
    """Return what the docstring of a function says about each parameter."""
    text = inspect.getdoc(fn) or ""
    section = text.partition("\nArgs:\n")[2].partition("\nReturns:")[0]
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line.startswith("    ") and not line.startswith("     ") and ": " in line:
            name, _, said = line.strip().partition(": ")
            found[name] = said
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found
