"""Places by name, and what one caller asks for at them while a score runs."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from esegeta.engine import check, execution, levels

Kind = Literal["tap", "replace", "nudge", "bias"]

_GRAMMAR = re.compile(r"([^#:\s][^#:]*)(?:#(\d+))?(?::([^#:]+))?")


class Stop(BaseException):
    """Everything that a view asked for has been seen: the rest of the score need not run."""

    def __init__(self, view: "View") -> None:
        self.view = view


@dataclass(frozen=True)
class Address:
    """Where: a path, which of its calls, which tensor of the result.

    >>> parse("demo", "block.conv#1:aux.0")
    Address(path='block.conv', call=1, leaf='aux.0')
    >>> str(parse("demo", "block#0"))
    'block'
    """

    path: str
    call: int = 0
    leaf: str = ""
    # Whether the call was named, or is the first.
    numbered: bool = field(default=True, compare=False, repr=False)

    def __str__(self) -> str:
        return self.path + (f"#{self.call}" if self.call else "") + (f":{self.leaf}" if self.leaf else "")

    @property
    def in_full(self) -> str:
        """With the number of the call, also if that is the first."""
        return f"{self.path}#{self.call}" + (f":{self.leaf}" if self.leaf else "")

    @property
    def side(self) -> str:
        """Return what is counted: outputs of a path, or inputs of a module."""
        return f"{self.path}:in" if self.leaf.split(".")[0] == "in" else self.path


def parse(where: str, text: object) -> Address:
    """Read ``path``, ``path#call``, ``path:leaf``, ``path#call:leaf``."""
    found = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise check.refused(
            where,
            'a place such as "encoder.0", "block.conv#1" (second call), "block:1" (second output), '
            '"block.relu:in" (input)',
            check.describe(text),
            "esegeta.places(score, x) lists them",
        )
    path, call, leaf = found.groups()
    return Address(path, int(call or 0), leaf or "", call is not None)


@dataclass(frozen=True)
class Edit:
    """What to do at a place. Taps come out; replacements and nudges come with the tensor that they put in.

    A bias comes out too: what an operation adds to its linear part, ``f(z) - J(z) z``.
    """

    at: Address
    kind: Kind
    tensor: Tensor | None = None


@dataclass
class Passed:
    """One tensor that a listing session passed."""

    at: Address
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    vertex: Any
    time: float
    leaf: bool


class View:
    """What one caller asks for while a score runs, and what it has met so far."""

    def __init__(self, where: str, edits: Sequence[Edit], stop: bool) -> None:
        self.where, self.edits, self.stop = where, tuple(edits), stop
        self.counts: Counter[str] = Counter()
        self.places: Counter[str] = Counter()  # of these calls those that made a place
        self.met: dict[int, Tensor | None] = {}
        self.fresh: list[int] = []  # the taps of this very run, in order of their numbers
        self.leaves: dict[tuple[str, int], list[str]] = {}
        self.modules: dict[str, str] = {}  # path -> the path that it is known by (another one if shared)
        self.scripted: set[str] = set()
        self.depth = levels.depth()
        self.wanted: dict[tuple[str, int], list[int]] = {}
        self.plain = {edit.at.side for edit in self.edits if not edit.at.numbered}
        for i, edit in enumerate(self.edits):
            self.wanted.setdefault((edit.at.side, edit.at.call), []).append(i)

    def fork(self, tensors: Iterator[Tensor]) -> "View":
        """Return the same requests for one run of a network, with batches to put in."""
        edits = [Edit(e.at, e.kind, None if e.kind in ("tap", "bias") else next(tensors)) for e in self.edits]
        return self._again(edits)

    def bare(self) -> "View":
        """Return the same requests without tensors: what may be kept for as long as a graph lives."""
        return self._again([Edit(e.at, e.kind) for e in self.edits])

    def _again(self, edits: Sequence[Edit]) -> "View":
        inner = View(self.where, edits, self.stop)
        inner.counts, inner.met = Counter(self.counts), dict.fromkeys(self.met)
        inner.places = Counter(self.places)
        return inner

    @property
    def done(self) -> bool:
        """Return whether it wants no more of this run."""
        return self.stop and len(self.met) == len(self.edits)

    def missing(self) -> Exception | None:
        """Return the error for what was never passed, if any."""
        for i, edit in enumerate(self.edits):
            if i not in self.met:
                return self._why(edit.at)
        return None

    def say_which_calls(self) -> None:
        """Tell whoever named a place without the number of a call that there are several."""
        known = {edit.at.side for edit in self.edits if edit.at.numbered}
        for edit in self.edits:
            calls = self.counts[edit.at.side]
            # An operation whose other results are scalars, such as a sum at the end, is there once.
            if self.places[edit.at.side] < 2 or edit.at.side in known:
                continue
            where = check.called(self.where)
            message = (
                f"{where}: {str(edit.at)!r} is passed {calls} times, and this is the first of them. Write "
                f"{edit.at.in_full!r} for it, or a number up to {calls - 1}; esegeta.places(score, x) lists them."
            )
            if all(event.get("message") != message for event in execution.current().events):
                execution.record("place", message)

    def _why(self, at: Address) -> Exception:
        where, path = self.where, at.path
        if path in self.scripted:
            return check.refused(
                where,
                "a place in Python code",
                f"{str(at)!r}, a part of a TorchScript network, which shows nothing of its inside",
                "Take the module that it was made from",
            )
        if self.modules.get(path, path) != path:
            other = self.modules[path]
            return check.refused(
                where,
                "a place by the first of its names",
                f"{str(at)!r}, which is the same module as {other!r}",
                f"Use {other!r} with the number of the call, such as {other + '#1'!r}",
            )
        calls = self.counts[at.side] or (self.counts[path] if at.side != path else 0)
        if calls > at.call:
            leaves = self.leaves.get((at.side, at.call), [])
            if not leaves:
                got, advice = f"{str(at)!r}, which holds none that torch finds", "Choose a place inside of it"
            elif leaves in ([""], ["in"]):
                got, advice = f"{str(at)!r}, where there is only one", f"Use {str(Address(path, at.call))!r}"
            else:
                got = f"{str(at)!r}, where there are {len(leaves)}: {', '.join(leaves)}"
                advice = f"Choose one, such as {str(Address(path, at.call, leaves[0]))!r}"
            return check.refused(where, f"one tensor of {path!r}", got, advice)
        if calls:
            return check.refused(
                where,
                f"a call of {path!r} that happens",
                f"#{at.call}, but there {'is' if calls == 1 else 'are'} {calls}",
                "Calls are counted from 0",
            )
        if path in self.modules:
            return check.refused(
                where,
                "a place that this input reaches",
                f"{str(at)!r}, a module that was never called",
                "esegeta.places(score, x) lists what is reached",
            )
        names = {*self.modules, *(p.removesuffix(":in") for p in self.counts)}
        return check.refused(
            where, "a place of this score", f"{str(at)!r}, which is never passed", nearest(path, names)
        )


def nearest(name: str, names: Iterable[str]) -> str:
    """Return advice for a name that does not exist."""
    return check.nearest(name, {*names} - {""}, "esegeta.places(score, x) lists them")
