"""Which axioms a method keeps, and the smallest counterexample found where it does not."""

import math
import operator
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esegeta.conformance.kinds import AnySubject, TransformSubject, laws_of, subject_of
from esegeta.conformance.situations import rebuilt
from esegeta.conformance.subjects import Subject, shaped
from esegeta.conformance.verdicts import ENOUGH, Counterexample, Kind, Report, Verdict
from esegeta.engine import check, progress

if TYPE_CHECKING:
    from esegeta.conformance.search import Found, Search


def verify(
    method: "str | AnySubject | Callable[..., Any]",
    *,
    axioms: Iterable[str] | None = None,
    cases: int = 100,
    seconds: float | int | None = None,
    seed: int = 0,
    scores: "Callable[[tuple[Any, ...]], Any] | None" = None,
    database: "str | os.PathLike[str] | None" = None,
) -> Report:
    """Put a method to random scores, networks and images, and tell which axioms it keeps on all of them.

    A transform is put to methods that keep an axiom, and has to preserve it; reducers and rewrites have laws of their
    own, ``conformance.REDUCER_LAWS`` and ``conformance.REWRITE_LAWS``, and have to keep all of them.

    A verdict is **holds** on so many cases, at least 25 that could have failed; **violated** with the smallest
    counterexample that was found, as the call that rebuilds it; **undecided** where too few cases were tried, or the
    time was over before all of them were; or **not applicable** with the reason. What is allowed to remain of an
    axiom is derived from each case: from the rounding of its arithmetic and, where a method sums over a path, from
    what its number of nodes can leave. "Holds" is no proof; "violated" is one.

    The same seed draws the same cases in the same order, so that a verdict can be repeated. A budget of time tries
    the first of them: it can leave a verdict undecided, and change none.

    Args:
        method: ``Score -> Explain``; the name of a registered method; ``"my_module:my_method"``;
            ``"captum:DeepLift"`` and the like for other libraries; or a ``conformance.Subject``. Also a transform,
            whose first argument is ``explain``, a reducer, whose first argument is ``model``, a rewrite, or the name
            of one (``"smooth"``, ``"class_sum"``, ``"rules.guided"``).
        axioms: names in ``esegeta.axioms``, or of the laws of a reducer or a rewrite; by default all.
        cases: how many to try for each axiom.
        seconds: after which the search ends, shared by the axioms. What takes its time once does not count.
        seed: of the random cases.
        scores: from a shape ``(C,*S)`` to a Hypothesis strategy of scores, such as
            ``lambda shape: strategies.networks(shape=shape, operators=["conv", "relu"])``: only on these; by
            default on all functions and networks of ``conformance.strategies``.
        database: a folder in which the code of counterexamples is kept, to be tried first the next time.

    Returns:
        A report: ``print(report)``, ``report.json()``, ``report.table()``, ``report["completeness"]``.

    Example:
        >>> import esegeta as eg
        >>> report = eg.verify(eg.input_x_gradient, axioms=["linearity", "shift"], cases=40)
        >>> [v.kind for v in report.verdicts]
        ['holds', 'violated']
    """
    with check.calling("verify", ["find_method"]):
        subject = subject_of(method)
    names = _chosen(axioms, tuple(laws_of(subject)))
    if scores is not None and not callable(scores):
        raise check.refused_type(
            "verify",
            "scores: shape -> strategy of scores",
            check.describe(scores),
            "Pass a function of a shape",
        )
    cases = check.positive_count("verify", "cases", cases)
    budget = math.inf if seconds is None else check.non_negative("verify", "seconds", seconds)
    from esegeta.conformance.search import Search  # it needs hypothesis

    if seconds is not None:
        _warm_up(subject, names, scores)
    started = time.monotonic()
    until = started + budget
    verdicts, complete = [], True

    with progress.loop(f"verify {subject.name}") as bar:
        for i, axiom in enumerate(names):
            bar.at(i / len(names))
            # Each axiom may take its share of the time that is left.
            share = time.monotonic() + (until - time.monotonic()) / (len(names) - i)
            kept = (
                None if database is None else Path(database) / f"{subject.name}-{axiom}.txt".replace("/", "_")
            )
            with progress.step(bar, i / len(names), (i + 1) / len(names)):
                verdict, whole = _verdict(subject, axiom, scores, Search(cases, share, seed), _tried(kept))
            _keep(kept, verdict)
            verdicts.append(verdict)
            complete &= whole
        bar.at(1.0)
    return Report(subject.name, tuple(verdicts), time.monotonic() - started, complete)


def _warm_up(
    subject: AnySubject, names: Iterable[str], scores: "Callable[[tuple[Any, ...]], Any] | None"
) -> None:
    """What takes its time once, whatever is searched: the first draws for each axiom, and the first explanation."""
    from esegeta.conformance import drawing, search

    measured = 0
    for name in names:
        for one in _members(subject, name)[:1]:
            measure = operator.methodcaller("measure", one) if not measured else lambda _: (0.0, 0.0)
            search.smallest(drawing.of_kind(laws_of(subject)[name], one, scores), measure, search.Search(2))
            measured += 1


def _chosen(axioms: Iterable[str] | None, known: tuple[str, ...]) -> list[str]:
    names = list(known) if axioms is None else [axioms] if isinstance(axioms, str) else list(axioms)
    for name in names:
        check.one_of("verify", "axioms", name, known)
    return names


def _members(subject: AnySubject, name: str) -> list[Any]:
    """What a law is put to: the subject, or what a transform makes of the methods that keep it."""
    if isinstance(subject, TransformSubject):
        return [shaped(s) for s in subject.of(name)]
    if laws_of(subject)[name].applies(subject):
        return []
    return [shaped(subject)] if isinstance(subject, Subject) else [subject]


def _verdict(
    subject: AnySubject,
    axiom: str,
    scores: "Callable[[tuple[Any, ...]], Any] | None",
    settings: "Search",
    before: Iterable[str],
) -> tuple[Verdict, bool]:
    claimed, members = axiom in subject.axioms, _members(subject, axiom)
    if not members:
        reason = (
            "it is kept by none of the methods that transforms are tried on"
            if isinstance(subject, TransformSubject)
            else laws_of(subject)[axiom].applies(subject)
        )
        return Verdict(axiom, "not applicable", claimed=claimed, why=reason), True
    for code in before:
        for member in members:
            again = _again(member, code)
            if again is not None:
                return Verdict(axiom, "violated", 1, 0, claimed, _of(subject, member), again), True
    from esegeta.conformance import drawing, search  # they need hypothesis

    # A transform of several methods shares the cases, and the time, among them.
    share = -(-settings.cases // len(members))
    total = search.Found()
    for i, member in enumerate(members):
        until = time.monotonic() + (settings.until - time.monotonic()) / (len(members) - i)
        found = search.smallest(
            drawing.of_kind(laws_of(subject)[axiom], member, scores),
            operator.methodcaller("measure", member),
            search.Search(share, until, settings.start),
            lambda situation: situation.trivial,
        )
        total = search.Found(
            total.cases + found.cases,
            total.tried + found.tried,
            total.refused + found.refused,
            total.why or found.why,
            total.complete and found.complete,
            found.failed,
        )
        if found.failed is not None:
            verdict = decided(axiom, total, settings.cases, claimed)
            return replace(verdict, why=_of(subject, member) or verdict.why), True
    return decided(axiom, total, settings.cases, claimed), total.complete


def _of(subject: AnySubject, member: Any) -> str:
    return f"by {member.name}" if isinstance(subject, TransformSubject) else ""


def decided(axiom: str, found: "Found", wanted: int, claimed: bool = False) -> Verdict:
    """Decide what follows from a search of ``wanted`` cases; one that saw too little decides nothing."""

    def verdict(kind: Kind, why: str, example: Counterexample | None = None) -> Verdict:
        return Verdict(axiom, kind, found.cases, found.refused, claimed, why, example)

    if found.failed is not None:
        return verdict("violated", found.why if found.refused else "", Counterexample(*found.failed))
    if not found.complete:
        looked = f"{found.cases} cases said something and kept it" if found.cases else "none said anything"
        return verdict(
            "undecided", f"the time was over after {found.tried} of {wanted}, {looked}: give it more seconds"
        )
    if not found.cases:
        return verdict("not applicable", _why_none(found))
    if found.cases < ENOUGH:
        refused = f"; {found.refused} refused: {found.why}" if found.refused else ""
        more = f"kept on {found.cases} cases, {ENOUGH} are needed: try more than {wanted}{refused}"
        return verdict("undecided", more)
    return verdict("holds", found.why)


def _again(subject: Any, code: str) -> Counterexample | None:
    """What failed at another time, if it still does."""
    try:
        residual, allowed = rebuilt(code).measure(subject)
    except Exception:  # refused by now, or a situation of another version
        return None
    return None if residual <= allowed else Counterexample(code, residual, allowed)


def _tried(kept: Path | None) -> list[str]:
    """What failed at another time, a line for each situation."""
    return kept.read_text().splitlines() if kept is not None and kept.exists() else []


def _keep(kept: Path | None, verdict: Verdict) -> None:
    if kept is None or verdict.counterexample is None or verdict.counterexample.code in _tried(kept):
        return
    try:
        rebuilt(verdict.counterexample.code)
    except ValueError:
        return  # of scores that only their owner can rebuild
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as file:
        file.write(f"{verdict.counterexample.code}\n")


def _why_none(found: "Found") -> str:
    if found.refused:
        return f"all {found.refused} cases were refused: {found.why}"
    return "it says nothing about any of these scores"
