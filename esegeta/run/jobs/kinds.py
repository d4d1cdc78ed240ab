"""Kinds of jobs as data: what a run can do is what is registered here.

A kind brings its own table of the configuration, the jobs that follow from it, what a worker does for one of them,
and how its records are shown. The pool, the plan and the report know kinds by this declaration alone: a new one is a
file, and its name in ``BUILT_IN``, or a file that ``plugins`` of a configuration names, or a package that offers it
by an entry point ``esegeta.plugins``.
"""

import functools
import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from esegeta.engine import check

Record = dict[str, Any]
BUILT_IN = (
    "esegeta.run.jobs.methods",
    "esegeta.run.jobs.summary",
    "esegeta.run.jobs.metrics",
    "esegeta.run.jobs.dreams",
    "esegeta.run.jobs.uncertainty",
    "esegeta.run.jobs.dissection",
    "esegeta.run.jobs.table",
    "esegeta.run.jobs.figures",
)


def digest(value: Any) -> str:
    """Return a short name for what a value says.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}), len(digest([]))
    (True, 16)
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _now(value: Any) -> Any:
    return value() if callable(value) else value


@dataclass(frozen=True)
class Job:
    """Something to do once.

    keys: what it is about, such as subject, target and method; a job over many subjects has fewer. given: what its
    kind needs in a worker, as JSON. decides: what changes its numbers, and nothing else. looks: what changes only how
    they are shown. Where decides, looks, or a value of given is a function, it is called when it is the job's turn: a
    run need not read all inputs before its first job. after: the jobs that it reads; need: whether all of them must
    have a result, or any, or none, if it only waits for them. deadline and memory: its limits, in seconds and bytes.
    """

    id: str
    kind: str
    keys: Mapping[str, str]
    given: Record
    decides: Any
    looks: Any = None
    after: "tuple[Job, ...]" = ()
    need: Literal["all", "any", "none"] = "all"
    deadline: float | int | None = None
    memory: int | None = None

    @functools.cached_property
    def digest(self) -> str:
        """The name of its numbers: of what decides about them, of the code of its kind, and of the jobs it reads."""
        decides, code = _now(self.decides), find(self.kind).code
        if code is not None:
            decides = [decides, code]
        return digest(decides if not self.after else [decides, [job.digest for job in self.after]])

    @functools.cached_property
    def look(self) -> str:
        """The name of how its numbers are shown."""
        return digest(_now(self.looks))

    @property
    def subject(self) -> str:
        """The subject that it is about, empty for many."""
        return self.keys.get("subject", "")

    @property
    def target(self) -> str:
        """The target that it is about, empty for many."""
        return self.keys.get("target", "")

    @property
    def method(self) -> str:
        """The method that it is about, empty for many."""
        return self.keys.get("method", "")

    @functools.cached_property
    def payload(self) -> Record:
        """Everything that a worker is given, as JSON."""
        about = {"id": self.id, "kind": self.kind, "keys": dict(self.keys), "digest": self.digest}
        given = {name: _now(value) for name, value in self.given.items()}
        return {**given, **about, "look": self.look, "after": [job.id for job in self.after]}


class Beside(NamedTuple):
    """What a configuration has beside the tables of a kind: names of targets, ids of methods, label maps."""

    targets: list[str]
    methods: list[str]
    reference: bool


@dataclass(frozen=True)
class Kind:
    """What is known of the jobs of a kind. An example of a whole one is ``esegeta.run.jobs.summary``.

    Args:
        name: as it stands in records.
        table: the table of the configuration that asks for it.
        section: the class of that table; None if the configuration itself has it. Keys named ``file`` in its values
            are paths, relative to the configuration.
        many: whether there may be several of that table, ``[[table]]``, each of the class ``section``.
        check: (section, path, faults) -> None, of one table: tells ``faults`` what its class does not see.
        check_all: ([(path, section)], beside, faults) -> None, of all tables, beside the targets and methods.
        reads: the kinds whose jobs it may depend on; they are planned before it.
        entries: (plan) -> jobs, from a ``plan.Planning``. Called where the configuration has the table; always
            for a kind without a section, or one that only draws.
        header: (payload) -> what a record says whatever comes of the job.
        blank: what a record says of what is not known.
        work: (payload, inputs, context) -> record, in a worker, which writes the record last.
        group: (job) -> the name of what it shares with others, such as its image and network; jobs of one name that
            can be done at the same time are done by the same worker, one after another. None: it shares nothing.
        redraw: the same for a job whose numbers are there already, but shown otherwise; None if there is no such.
        examine: (payload, context) -> what can be said of it before it runs: shape, memory, problem.
        cost: (payload) -> how many gradients or values it takes (None if unknown), and which of them.
        written: (record) -> the files that belong to the record alone, relative to the folder of the run.
        stem: (job) -> the beginning of the names of all these files, for what a job left that came to no end.
        draws: whether its jobs only show what others have computed. They are done last and along with any job that
            they read, a dry run leaves them out, and a configuration that asks for none of them has none.
        joins: (record) -> the id of another job, and the columns that its row gets from this record.
        rows: (record) -> the rows that it becomes in the table and in the report; one by default.
        further: (record) -> columns that its rows have besides, which depend on what was asked for.
        file: the table that its records become, without its ending, empty for none; columns: of that table.
        inner: the fields of a record that hold rows of their own, with their columns: a table of each, by its name.
        shown: column -> heading, of its table in the report; empty if the report knows it better.
        title: of that table; note: what is said below it.
    """

    name: str
    table: str
    entries: Callable[[Any], Sequence[Job]]
    header: Callable[[Record], Record]
    work: Callable[[Record, Any, Any], Record]
    columns: tuple[str, ...]
    file: str
    section: type[BaseModel] | None = None
    many: bool = False
    check: Callable[[Any, str, Any], None] | None = None
    group: Callable[[Job], str | None] = lambda job: None  # noqa: ARG005
    check_all: Callable[[Sequence[tuple[str, Any]], Beside, Any], None] | None = None
    reads: tuple[str, ...] = ()
    blank: Mapping[str, Any] = field(default_factory=dict)
    redraw: Callable[[Record, Any, Any], Record] | None = None
    examine: Callable[[Record, Any], Record] | None = None
    cost: Callable[[Record], tuple[int | None, str]] = lambda payload: (None, "")  # noqa: ARG005
    written: Callable[[Mapping[str, Any]], Sequence[str]] = lambda record: ()  # noqa: ARG005
    stem: Callable[[Job], Path] | None = None
    joins: Callable[[Mapping[str, Any]], tuple[str, Record]] | None = None
    draws: bool = False
    rows: Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]] = lambda record: [record]
    further: Callable[[Mapping[str, Any]], Sequence[str]] = lambda record: ()  # noqa: ARG005
    inner: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shown: Mapping[str, str] = field(default_factory=dict)
    title: str = ""
    note: str = ""

    @property
    def origin(self) -> str:
        """The package or the file that it comes from."""
        return self.work.__module__.partition(".")[0]

    @functools.cached_property
    def code(self) -> str | None:
        """Hash of the file that it comes from; None for one of this package, whose version counts."""
        if self.origin == "esegeta":
            return None
        file = getattr(sys.modules.get(self.work.__module__), "__file__", None)
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Enter a kind; its name must be new."""
    if kind.name in _KINDS:
        got = f"{kind.name!r}, already defined in {_KINDS[kind.name].work.__module__}"
        raise check.refused("kinds.register", "a new name", got, "Rename the kind")
    _KINDS[kind.name] = kind
    return kind


def forget(module: str) -> None:
    """Take out the kinds of a module that is about to be imported again."""
    for name in [name for name, kind in _KINDS.items() if kind.work.__module__ == module]:
        del _KINDS[name]


def known() -> list[Kind]:
    """Return every kind, each after those that it reads. Those of the package are found by the names of modules.

    In one order, whichever module a process happened to import first: those of the package, then others as they came.

    >>> [kind.name for kind in known()][0]
    'methods'
    """
    for module in BUILT_IN:
        importlib.import_module(module)
    found: dict[str, Kind] = {}

    def enter(kind: Kind) -> None:
        for name in kind.reads:
            if name not in _KINDS:
                expected, advice = (
                    f"the kinds that {kind.name!r} reads",
                    "Correct its reads, or add the plugin",
                )
                raise check.refused("kinds.known", expected, f"no kind {name!r}", advice)
            enter(_KINDS[name])
        found.setdefault(kind.name, kind)

    ranks = {module: rank for rank, module in enumerate(BUILT_IN)}
    for kind in sorted(_KINDS.values(), key=lambda kind: ranks.get(kind.work.__module__, len(ranks))):
        enter(kind)
    return list(found.values())


def find(name: str) -> Kind:
    """Return the kind of that name."""
    if name not in _KINDS:
        names = [kind.name for kind in known()]  # imports those of the package
        if name not in names:
            advice = f"There are {', '.join(names)}"
            raise check.refused("kinds.find", "the name of a kind of jobs", repr(name), advice)
    return _KINDS[name]


def tables() -> dict[str, Kind]:
    """Return the tables of the configuration that kinds bring along, with the first kind of each."""
    found: dict[str, Kind] = {}
    for kind in known():
        if kind.section is not None:
            found.setdefault(kind.table, kind)
    return found
