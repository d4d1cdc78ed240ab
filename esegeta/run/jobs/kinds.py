"""Kinds of jobs as data: what a run can do is what is registered here.

A kind brings its own table of the configuration, the jobs that follow from it, what a worker does for one of them,
and how its records are shown. The pool, the plan and the report know kinds by this declaration alone: a new one is a
file, and its name in ``BUILT_IN`` or an import in a plugin.
"""

import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from esegeta.engine import check

Record = dict[str, Any]
BUILT_IN = ("esegeta.run.jobs.methods", "esegeta.run.jobs.summary", "esegeta.run.jobs.figures")


def digest(value: Any) -> str:
    """Return a short name for what a value says.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}), len(digest([]))
    (True, 16)
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """Something to do once.

    keys: what it is about, such as subject, target and method; a job over many subjects has fewer. given: what its
    kind needs in a worker, as JSON. decides: what changes its numbers, and nothing else. looks: what changes only how
    they are shown. after: the jobs that it reads; need: whether all of them must have a result, or any. deadline and
    memory: its limits, in seconds and bytes.
    """

    id: str
    kind: str
    keys: Mapping[str, str]
    given: Record
    decides: Any
    looks: Any = None
    after: "tuple[Job, ...]" = ()
    need: Literal["all", "any"] = "all"
    deadline: float | int | None = None
    memory: int | None = None

    @functools.cached_property
    def digest(self) -> str:
        """The name of its numbers: of what decides about them, and of the jobs that it reads."""
        return digest(self.decides if not self.after else [self.decides, [job.digest for job in self.after]])

    @functools.cached_property
    def look(self) -> str:
        """The name of how its numbers are shown."""
        return digest(self.looks)

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
        """What a worker is given, as JSON."""
        about = {"id": self.id, "kind": self.kind, "keys": dict(self.keys), "digest": self.digest}
        return {**self.given, **about, "look": self.look, "after": [job.id for job in self.after]}


@dataclass(frozen=True)
class Kind:
    """What is known of the jobs of a kind. An example of a whole one is ``esegeta.run.jobs.summary``.

    Args:
        name: as it stands in records.
        table: the table of the configuration that asks for it.
        section: the class of that table; None if the configuration itself has it.
        reads: the kinds whose jobs it may depend on; they are planned before it.
        entries: (plan) -> jobs, from a ``plan.Planning``.
        header: (payload) -> what a record says whatever comes of the job.
        blank: what a record says of what is not known.
        work: (payload, inputs, context) -> record, in a worker, which writes the record last.
        redraw: the same for a job whose numbers are there already, but shown otherwise; None if there is no such.
        examine: (payload, context) -> what can be said of it before it runs: shape, memory, problem.
        cost: (payload) -> how many gradients or values it takes (None if unknown), and which of them.
        written: (record) -> the files that belong to the record alone, relative to the folder of the run.
        stem: (job) -> the beginning of the names of all these files, for what a job left that came to no end.
        draws: whether its jobs only show what others have computed. They are done last and along with any job that
            they read, a dry run leaves them out, and a configuration that asks for none of them has none.
        file: the table that its records become, without its ending, empty for none; columns: of that table.
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
    reads: tuple[str, ...] = ()
    blank: Mapping[str, Any] = field(default_factory=dict)
    redraw: Callable[[Record, Any, Any], Record] | None = None
    examine: Callable[[Record, Any], Record] | None = None
    cost: Callable[[Record], tuple[int | None, str]] = lambda payload: (None, "")  # noqa: ARG005
    written: Callable[[Mapping[str, Any]], Sequence[str]] = lambda record: ()  # noqa: ARG005
    stem: Callable[[Job], Path] | None = None
    draws: bool = False
    shown: Mapping[str, str] = field(default_factory=dict)
    title: str = ""
    note: str = ""


_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Enter a kind; its name must be new."""
    if kind.name in _KINDS:
        raise ValueError(check.problem("kinds.register", "a new name", repr(kind.name), "Rename the kind"))
    _KINDS[kind.name] = kind
    return kind


def known() -> list[Kind]:
    """Return every kind, each after those that it reads. Those of the package are found by the names of modules.

    >>> [kind.name for kind in known()][:2]
    ['methods', 'summary']
    """
    for module in BUILT_IN:
        importlib.import_module(module)
    found: dict[str, Kind] = {}

    def enter(kind: Kind) -> None:
        for name in kind.reads:
            enter(_KINDS[name])
        found.setdefault(kind.name, kind)

    for kind in list(_KINDS.values()):
        enter(kind)
    return list(found.values())


def find(name: str) -> Kind:
    """Return the kind of that name."""
    names = {kind.name: kind for kind in known()}
    if name not in names:
        advice = f"There are {', '.join(names)}"
        raise ValueError(check.problem("kinds.find", "the name of a kind of jobs", repr(name), advice))
    return names[name]


def tables() -> dict[str, type[BaseModel]]:
    """Return the tables of the configuration that kinds bring along, with their classes."""
    return {kind.table: kind.section for kind in known() if kind.section is not None}
