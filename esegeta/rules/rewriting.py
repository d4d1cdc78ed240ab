"""Rewrites: a table of rules for operations, and a score whose operations follow it."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from esegeta._facts import carry, facts_of, named
from esegeta._types import Score
from esegeta.engine import check, interception, levels, operators
from esegeta.engine.gradient import name_of
from esegeta.engine.operators import Operation

Rule = Callable[[Operation], Any]

# By rewrite, then by operation. A rule returns the operation's value, connected to ``op.inputs`` as it wants.
RULES: dict[str, dict[str, Rule]] = {}


def rule(rewrite: str, *operations: str) -> Callable[[Rule], Rule]:
    """Give a rewrite a rule for some operations, its own ones replaced.

    Args:
        rewrite: "guided", "deconvnet", "lrp", "excitation", "deeplift", "softplus", or a new one.
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


# What was compared: by rule, operation, place in the network, weights and shapes. The oldest are forgotten.
_COMPARED: dict[Any, None] = {}
_MOST = 4096
_RANDOM = ("dropout", "rrelu", "bernoulli", "gumbel")


def refuse_other_values(rewrite: str, op: Operation, rule: Callable[..., Any], out: Any) -> None:
    """Refuse a rule that changes the value of its operation: what it explains is another score.

    It is compared once for each rule, network and shape, by running the operation as it is.
    """
    weights = [levels.base(t) for t in op.others]
    if any(map(levels.fake, (*op.inputs, *weights))) or any(word in op.name for word in _RANDOM):
        return
    kinds = tuple((tuple(t.shape), t.dtype) for t in op.inputs)
    which = (rewrite, rule, op.name, op.where, kinds, tuple(t.data_ptr() for t in weights))
    try:
        if which in _COMPARED:
            return
    except TypeError:  # a rule that cannot be remembered is compared every time
        pass
    else:
        while len(_COMPARED) >= _MOST:
            del _COMPARED[next(iter(_COMPARED))]
    with torch.no_grad():
        plain, made = tree_flatten(op.call(*(t.detach() for t in op.inputs)))[0], tree_flatten(out)[0]
        for i, b in enumerate(plain):
            if isinstance(b, Tensor) and b.is_floating_point():
                _refuse_another(rewrite, op, rule, made[i] if i < len(made) else None, b)
    with contextlib.suppress(TypeError):
        _COMPARED[which] = None


def _refuse_another(rewrite: str, op: Operation, rule: Callable[..., Any], made: Any, plain: Tensor) -> None:
    what = f"{getattr(rule, '__qualname__', repr(rule))} for {op.name!r}"
    what += f" in {op.where!r}" if op.where else ""
    if isinstance(made, Tensor) and made.shape == plain.shape:
        known = torch.isfinite(plain)
        off = torch.where(known, (made.detach() - plain).abs(), 0.0)
        size = torch.where(known, plain.abs(), 0.0).amax() if plain.numel() else plain.sum()
        # The same in other words differs by rounding. Half of the digits is far more than that, unless all cancels.
        unit = torch.finfo(plain.dtype).eps
        cancelled = 16 * unit * max(float(levels.base(t.detach()).abs().amax()) for t in op.inputs)
        if not levels.true_anywhere(~(off <= unit**0.5 * size + cancelled)):
            return
        worst, largest = (float(levels.base(t).nan_to_num(torch.inf).amax()) for t in (off, size))
        got = f"{what}, which changes values of at most {largest:.3g} by {worst:.3g}"
    else:
        got = f"{what}, which makes {check.describe(made)} of what is {check.describe(plain)}"
    advice = "Return op.call(*op.inputs), connected to op.inputs with another derivative by operators.reroute"
    raise check.refused(rewrite, "rules that keep the values of their operations", got, advice)


class Rewriting:
    """A rewrite made of the table of its name.

    plain: the operations whose ordinary derivative is the right one; fallback: the rewrite whose rules are taken
    where it has none of its own; changes_values: whether its score has other values than the one that it is made
    of, which is so for smoothing alone; unchanged: what to do where there is nothing to rewrite; tiled: whether the
    patches of a stitched answer can follow it each by itself.
    """

    changes_values = False
    tiled = True
    unchanged = "Its result would be the plain gradient: take esegeta.gradient"

    def __init__(
        self, name: str, plain: Iterable[str], *, paired: bool = False, fallback: str | None = None
    ) -> None:
        self.name, self.plain, self.paired = name, frozenset(plain), paired
        self.tables = [name] if fallback is None else [name, fallback]
        self.rewritten: Counter[str] = Counter()
        # The rule that a table's function last chose among several, if it does.
        self.chosen: Callable[..., Any] | None = None

    def rule(self, op: Operation) -> Any:
        """Ask the table; what is in no table is refused."""
        self.chosen = None
        for table in self.tables:
            found = RULES.get(table, {}).get(op.name)
            out = NotImplemented if found is None else found(op)
            if found is not None and out is not NotImplemented:
                if not self.changes_values:
                    refuse_other_values(self.name, op, self.chosen or found, out)
                self.rewritten[op.name] += 1
                operators.note(op, "rewritten")
                return out
        if op.name in self.plain:
            operators.note(op, "plain derivative")
            return op.call(*op.inputs)
        raise op.unknown(self.name)


def spelled_out(op: Operation, spelling: Callable[..., Any]) -> Any:
    """Return the value of an operation with the derivative of another spelling of it."""
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
    """Return the score with the derivatives of a rewrite; if ``hits`` says so, refuse one that rewrites nothing."""

    check.score(make().name, score)

    def changed(x: Tensor) -> Tensor:
        rewriting = make()
        check.floating(rewriting.name, "x", x)
        for reference in references:
            check.like(rewriting.name, "baseline", reference, x)
        y, _ = interception.observe(rewriting.name, score, (x,), (), rewrite=rewriting, references=references)
        if hits is not None and not rewriting.rewritten:
            raise check.refused(
                rewriting.name,
                "a network with at least one of the operations that it rewrites",
                f"none of {', '.join(sorted(hits)[:8])}, ... in {name_of(score)}",
                rewriting.unchanged,
            )
        return y

    carry(changed, score, rewritten=True, changes_values=make().changes_values)
    changed.of = score  # type: ignore[attr-defined]
    return named(changed, f"{make().name} of {name_of(score)}")


class Coverage(dict[tuple[str, str], int]):
    """How often each operation was met, and what became of it; prints as a table."""

    def __str__(self) -> str:
        rows = sorted(self.items(), key=lambda row: (row[0][1], -row[1], row[0][0]))
        return "\n".join(f"{name:<32} {what:<18} {count}" for (name, what), count in rows)


def coverage(score: Score, x: Tensor) -> Coverage:
    """Return which operations on data a score runs, and which of them a rewrite rewrites.

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
    check.runs("coverage", score)
    check.image("coverage", "x", x)
    with operators.noting() as counts, torch.no_grad():
        if facts_of(score).rewritten:
            score(x)
        else:
            interception.observe("coverage", score, (x,), (), rewrite=_Looking())
    return Coverage(counts)
