"""Rewrites: a table of rules for operations, and a score whose operations follow it."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from esegeta._types import Score
from esegeta.engine import check, interception, operators
from esegeta.engine.gradient import name_of
from esegeta.engine.operators import Operation

Rule = Callable[[Operation], Any]

# By rewrite, then by operation. A rule returns the operation's value, connected to ``op.inputs`` as it wants.
RULES: dict[str, dict[str, Rule]] = {}


def rule(rewrite: str, *operations: str) -> Callable[[Rule], Rule]:
    """Give a rewrite a rule for some operations, its own ones replaced.

    Args:
        rewrite: "guided", "deconvnet", "lrp", "excitation", "deeplift", or a new one.
        operations: names such as "relu", "conv3d"; see ``coverage``.

    Returns:
        A decorator for ``Operation -> value``.

    Example:
        >>> from esegeta.engine.operators import reroute
        >>> @rule("straight_through", "round_half")
        ... def straight_through(op):
        ...     return reroute(op.call(*op.inputs), op.inputs, lambda g, *_: g)
        >>> RULES.pop("straight_through").keys()
        dict_keys(['round_half'])
    """

    def add(function: Rule) -> Rule:
        table = RULES.setdefault(rewrite, {})
        for name in operations:
            table[name] = function
        return function

    return add


class Rewriting:
    """A rewrite made of the table of its name.

    plain: the operations whose ordinary derivative is the right one; fallback: the rewrite whose rules are taken
    where it has none of its own.
    """

    def __init__(
        self, name: str, plain: Iterable[str], *, paired: bool = False, fallback: str | None = None
    ) -> None:
        self.name, self.plain, self.paired = name, frozenset(plain), paired
        self.tables = [name] if fallback is None else [name, fallback]
        self.rewritten: Counter[str] = Counter()

    def rule(self, op: Operation) -> Any:
        """Ask the table; what is in no table is refused."""
        for table in self.tables:
            found = RULES.get(table, {}).get(op.name)
            out = NotImplemented if found is None else found(op)
            if out is not NotImplemented:
                self.rewritten[op.name] += 1
                operators.note(op, "rewritten")
                return out
        if op.name in self.plain:
            operators.note(op, "plain derivative")
            return op.call(*op.inputs)
        raise op.unknown(self.name)


def spelled_out(op: Operation, spelling: Callable[..., Any]) -> Any:
    """An operation with the derivative of another spelling, and with what is known of the values of that."""
    made, out = op.through(spelling), op.call(*op.inputs)
    if isinstance(out, Tensor):
        return _same_as(op, out, made)
    return type(out)(
        [_same_as(op, a, b) if isinstance(b, Tensor) else a for a, b in zip(out, made, strict=True)]
    )


def _same_as(op: Operation, value: Tensor, made: Tensor) -> Tensor:
    tracer = op.tracer
    assert tracer is not None
    out = operators.reroute(value, [made], lambda g, *_: g)
    tracer.remember(out, tracer.recall(made))
    if made in tracer.notes:
        tracer.notes[out] = tracer.notes[made]
    return out


class _Looking:
    """Changes nothing: for a report on a score that nothing has rewritten."""

    paired, name = False, "coverage"

    def rule(self, op: Operation) -> Any:
        """The operation as it is."""
        operators.note(op, "seen")
        return op.call(*op.inputs)


def rewritten(
    score: Score, make: Callable[[], Rewriting], *references: Tensor, hits: frozenset[str] | None = None
) -> Score:
    """The score with the derivatives of a rewrite; a run that rewrites nothing is refused if ``hits`` says so."""

    def changed(x: Tensor) -> Tensor:
        rewriting = make()
        y, _ = interception.observe(rewriting.name, score, (x,), (), rewrite=rewriting, references=references)
        if hits is not None and not rewriting.rewritten:
            raise ValueError(
                check.problem(
                    rewriting.name,
                    "a network with at least one of the operations that it rewrites",
                    f"none of {', '.join(sorted(hits)[:8])}, ... in {name_of(score)}",
                    "Its result would be the plain gradient: take esegeta.gradient",
                )
            )
        return y

    changed.__name__ = f"{make().name} of {name_of(score)}"
    changed.differentiable = getattr(score, "differentiable", True)  # type: ignore[attr-defined]
    changed.rewritten, changed.of = True, score  # type: ignore[attr-defined]
    return changed


class Coverage(dict[tuple[str, str], int]):
    """How often each operation was met, and what became of it; prints as a table."""

    def __str__(self) -> str:
        rows = sorted(self.items(), key=lambda row: (row[0][1], -row[1], row[0][0]))
        return "\n".join(f"{name:<32} {what:<18} {count}" for (name, what), count in rows)


def coverage(score: Score, x: Tensor) -> Coverage:
    """Which operations on data a score runs, and which of them a rewrite rewrites.

    Args:
        score: rewritten, or not: then it says what there is to rewrite.
        x: an example.

    Returns:
        ``{(operation, what became of it): how often}``; prints as a table.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: torch.relu(2 * x).sum()
        >>> print(coverage(eg.rules.guided(score), torch.ones(1, 2)))
        mul                              plain derivative   1
        sum                              plain derivative   1
        relu                             rewritten          1
    """
    with operators.noting() as counts, torch.no_grad():
        if getattr(score, "rewritten", False):
            score(x)
        else:
            interception.observe("coverage", score, (x,), (), rewrite=_Looking())
    return Coverage(counts)
