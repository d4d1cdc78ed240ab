"""Which axioms a method keeps, and the smallest counterexample found where it does not."""

import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esegeta._types import Explain
from esegeta.conformance.laws import LAWS, rebuilt
from esegeta.conformance.report import ENOUGH, Counterexample, Kind, Report, Verdict
from esegeta.conformance.subjects import Subject, of
from esegeta.engine import check, progress

if TYPE_CHECKING:
    from esegeta.conformance.search import Found, Search


def verify(
    method: "str | Subject | Callable[..., Explain]",
    *,
    axioms: Iterable[str] | None = None,
    cases: int = 100,
    seconds: float | int | None = None,
    seed: int = 0,
    scores: "Callable[[tuple[Any, ...]], Any] | None" = None,
    database: "str | os.PathLike[str] | None" = None,
) -> Report:
    """Put a method to random scores, networks and images, and tell which axioms it keeps on all of them.

    A verdict is **holds** on so many cases, at least 25 that could have failed; **violated** with the smallest
    counterexample that was found, as the call that rebuilds it; **undecided** where too few cases were tried, or the
    time was over before all of them were; or **not applicable** with the reason. What is allowed to remain of an axiom is derived
    from each case: from the rounding of its arithmetic and, where a method sums over a path, from what its number
    of nodes can leave. "Holds" is no proof; "violated" is one.

    The same seed draws the same cases in the same order, so that a verdict can be repeated. A budget of time tries
    the first of them: it can leave a verdict undecided, and change none.

    Args:
        method: ``Score -> Explain``; the name of a registered method; ``"my_module:my_method"``;
            ``"captum:DeepLift"`` and the like for other libraries; or a ``conformance.Subject``.
        axioms: names in ``esegeta.axioms``, by default all.
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
    subject = of(method)
    names = _chosen(axioms)
    if scores is not None and not callable(scores):
        raise TypeError(
            check.problem(
                "verify",
                "scores: shape -> strategy of scores",
                check.describe(scores),
                "Pass a function of a shape",
            )
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
    subject: Subject, names: Iterable[str], scores: "Callable[[tuple[Any, ...]], Any] | None"
) -> None:
    """What takes its time once, whatever is searched: the first draws for each axiom, and the first explanation."""
    from esegeta.conformance import drawing, search

    measured = 0
    for axiom in names:
        if LAWS[axiom].applies(subject):
            continue
        measure = (lambda situation: situation.measure(subject)) if not measured else lambda _: (0.0, 0.0)
        search.smallest(drawing.situations(axiom, subject, scores), measure, search.Search(2))
        measured += 1


def _chosen(axioms: Iterable[str] | None) -> list[str]:
    names = list(LAWS) if axioms is None else [axioms] if isinstance(axioms, str) else list(axioms)
    for name in names:
        check.one_of("verify", "axioms", name, tuple(LAWS))
    return names


def _verdict(
    subject: Subject,
    axiom: str,
    scores: "Callable[[tuple[Any, ...]], Any] | None",
    settings: "Search",
    before: Iterable[str],
) -> tuple[Verdict, bool]:
    claimed, law = axiom in subject.axioms, LAWS[axiom]
    reason = law.applies(subject)
    if reason:
        return Verdict(axiom, "not applicable", claimed=claimed, why=reason), True
    for code in before:
        again = _again(subject, code)
        if again is not None:
            return Verdict(axiom, "violated", 1, 0, claimed, counterexample=again), True
    from esegeta.conformance import drawing, search  # they need hypothesis

    found = search.smallest(
        drawing.situations(axiom, subject, scores),
        lambda situation: situation.measure(subject),
        settings,
        lambda situation: situation.trivial,
    )
    return decided(axiom, found, settings.cases, claimed), found.complete


def decided(axiom: str, found: "Found", wanted: int, claimed: bool = False) -> Verdict:
    """What follows from a search of ``wanted`` cases. One that ended early, or saw too little, decides nothing."""

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


def _again(subject: Subject, code: str) -> Counterexample | None:
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
