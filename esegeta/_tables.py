"""Tables of what exists, from the registry: ``python -m esegeta._tables`` writes them into the docs.

A page says where a table goes by a pair of comments, ``<!-- table: methods -->`` and ``<!-- end -->``.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import esegeta
import esegeta.baselines
import esegeta.dreams
import esegeta.features
import esegeta.masks
import esegeta.methods
import esegeta.metrics
import esegeta.noise
import esegeta.reducers
import esegeta.rules
import esegeta.run.volumes.preprocess
import esegeta.segmentation
import esegeta.transforms
import esegeta.uncertainty
import esegeta.zoo  # all of these register what comes with the package
from esegeta._registry import (
    METHODS,
    METRICS,
    REDUCERS,
    REGISTRIES,
    TRANSFORMS,
    MethodSpec,
    MetricSpec,
    ReducerSpec,
    TransformSpec,
)
from esegeta.axioms import AXIOMS

Spec = TypeVar("Spec", MethodSpec, TransformSpec, ReducerSpec, MetricSpec)

COMMAND = "python -m esegeta._tables"
PAGES = ("README.md", "docs/methods.md", "docs/metrics.md", "docs/reducers.md")
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _own(table: dict[str, Spec]) -> list[tuple[str, Spec]]:
    """What comes with the package, in alphabetical order; others may register more."""
    return [(name, table[name]) for name in sorted(table) if table[name].fn.__module__.startswith("esegeta.")]


def _first_line(fn: Callable[..., object]) -> str:
    text = (inspect.getdoc(fn) or "").split("\n\n")[0].replace("\n", " ")
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    return text.removesuffix(".").replace("|", "\\|")


def _arguments(fn: Callable[..., object]) -> list[str]:
    """The signature without types, and without the function that is transformed."""
    words = []
    for p in list(inspect.signature(fn).parameters.values())[1:]:
        default = getattr(p.default, "__name__", None) if inspect.isroutine(p.default) else repr(p.default)
        given = "" if p.default is p.empty or p.default is None else f"={default}"
        words.append(f"{p.name}{given}")
    return words


def _link(paper: str) -> str:
    """A paper with a link where it has an identifier."""
    paper = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    return re.sub(r"doi:(\S+)", r"[doi:\1](https://doi.org/\1)", paper)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _names(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def methods() -> str:
    """Return every method: how it is called, the axioms that it keeps, other names."""
    return _table(
        ("method", "called with", "what it is", "axioms it keeps", "other names"),
        (
            (
                f"`{name}`",
                f"`({', '.join(['x', *spec.refs, *(['key='] if spec.key else [])])})`{' at a place' * spec.place}",
                _first_line(spec.fn),
                ", ".join(sorted(spec.axioms)),
                _names(spec.also),
            )
            for name, spec in _own(METHODS)
        ),
    )


def transforms() -> str:
    """Return every transform and the axioms that survive it."""
    return _table(
        ("transform", "what it is", "axioms that survive it"),
        (
            (f"`{name}`", _first_line(spec.fn), ", ".join(sorted(spec.preserves)))
            for name, spec in _own(TRANSFORMS)
        ),
    )


def reducers() -> str:
    """Return every reducer, what outputs it reads, and whether it has a gradient."""
    kinds = {"map": "maps", "vector": "classifiers", "any": "both"}
    return _table(
        ("reducer", "for", "what it is"),
        (
            (
                f"`reducers.{name}`",
                kinds[spec.output] + ("" if spec.differentiable else ", no gradient"),
                _first_line(spec.fn),
            )
            for name, spec in _own(REDUCERS)
        ),
    )


def metrics() -> str:
    """Return every metric by its family: what it needs besides a map, which way it is better, where it comes from."""
    return _table(
        ("metric", "of", "what it is", "needs", "answer", "better", "other names", "reference"),
        (
            (
                f"`{name}`",
                spec.family,
                _first_line(spec.fn).removeprefix("Return "),
                ", ".join(spec.needs) or "a map",
                spec.answer,
                spec.better or "neither",
                _names(spec.also),
                _link(spec.paper),
            )
            for name, spec in sorted(_own(METRICS), key=lambda row: (row[1].family, row[0]))
        ),
    )


def papers() -> str:
    """Return what every method and transform takes, and where it comes from."""
    found = {name: (spec.fn, spec.paper) for name, spec in _own(METHODS)}
    found.update({name: (spec.fn, spec.paper) for name, spec in _own(TRANSFORMS)})
    return _table(
        ("function", "static arguments", "reference"),
        (
            (f"`{name}`", _names(_arguments(fn)), _link(paper) or "definition")
            for name, (fn, paper) in sorted(found.items())
        ),
    )


def families() -> str:
    """Return what there is: methods by family, everything else by kind, with numbers and names."""
    found: dict[str, list[str]] = {}
    for name, spec in _own(METHODS):
        found.setdefault(f"methods: {spec.family}", []).append(name)
    for table in REGISTRIES[1:]:
        plural = table.kind if table.kind.endswith("s") else f"{table.kind}s"
        found[plural.replace("ys", "ies")] = [name for name, _ in _own(table)]
    found["axioms"] = sorted(AXIOMS)
    rows = ((kind, str(len(names)), ", ".join(names)) for kind, names in found.items() if names)
    return _table(("family", "number", "names"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "families": families,
    "methods": methods,
    "transforms": transforms,
    "reducers": reducers,
    "metrics": metrics,
    "papers": papers,
}


def fill(text: str) -> str:
    """Return a page with its tables as they are now.

    >>> fill("<!-- table: transforms -->\\nold\\n<!-- end -->").splitlines()[1]
    '| transform | what it is | axioms that survive it |'
    """
    return _MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> None:
    """Bring the tables of every page up to date."""
    root = Path(esegeta.__file__).parent.parent
    for page in PAGES:
        path = root / page
        path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
