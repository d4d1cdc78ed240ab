"""Puts faults into the package, one at a time, and tells what rejects each.

A mutant is a change of the source of one module. What is tested is the package with that change: on methods by the
conformance suite, or by some of the tests here where a fault lies in what that suite does not look at. The unchanged
package has to pass the same.

``python tests/mutation.py [names of mutants]`` writes one line of JSON for each.

The process imports the libraries once, never the package, and forks a child for every mutant: what a mutant breaks
ends with its child.
"""

import importlib
import importlib.util
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Seconds for one child; those of a loaded machine, so that only what hangs is ended.
DEADLINE = 300.0

# Random situations for each axiom that a method claims.
CASES = 12


@dataclass(frozen=True)
class Mutant:
    """A fault: ``old``, which is once in the module, becomes ``new``.

    subjects: the methods that the conformance suite is run on; tests: tests here that are run in its stead;
    why: what somebody would have done to get there.
    """

    id: str
    module: str
    old: str
    new: str
    why: str
    subjects: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()

    @property
    def selection(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What it is tested by."""
        return self.subjects, self.tests

    @property
    def path(self) -> Path:
        """The file that holds the module."""
        place = ROOT.joinpath(*self.module.split("."))
        return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")

    def source(self) -> str:
        """The source with the fault."""
        text = self.path.read_text()
        times = text.count(self.old)
        if times != 1:
            raise ValueError(
                f"mutant {self.id}: expected {self.old!r} once in {self.module}, got it {times} times. "
                "Follow the change of the source."
            )
        if not self.selection[0] and not self.selection[1]:
            raise ValueError(
                f"mutant {self.id}: expected subjects or tests, got none. Say what has to reject it."
            )
        return text.replace(self.old, self.new)


class Changed(MetaPathFinder):
    """Finds one module, with other source."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source, self.used = name, source, False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        self.used = True
        found = PathFinder.find_spec(name, path)
        assert found is not None
        assert found.origin is not None
        loader = _Source(name, found.origin, self.source)
        return importlib.util.spec_from_file_location(
            name, found.origin, loader=loader, submodule_search_locations=found.submodule_search_locations
        )


class _Source(SourceFileLoader):
    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> Any:
        # Not by way of the files of compiled code, which belong to the source as it is.
        return compile(self.source, self.path, "exec", dont_inherit=True)


# -- in the child ------------------------------------------------------------------------------------------------


def by_conformance(names: Sequence[str]) -> tuple[str, str] | None:
    """The first of the contract and of the claimed axioms that a method breaks, and how; None if it keeps all."""
    from esegeta.conformance import LAWS, contract, of, search, verify

    search.SHRINKS = 0  # any counterexample will do
    for name in names:
        subject = of(name)
        for check in contract.CHECKS:
            if contract.inapplicable(check, subject):
                continue
            try:
                contract.check(check, subject)
            except Exception as found:
                return f"{name}: {check}", _line(found)
        for axiom in (a for a in LAWS if a in subject.axioms):
            verdict = verify(subject, axioms=[axiom], cases=CASES)[axiom]
            if verdict.kind not in ("holds", "undecided"):
                return f"{name}: {axiom}", str(verdict)
    return None


def by_tests(chosen: Sequence[str]) -> tuple[str, str] | None:
    """The first of some tests that fails."""
    import pytest

    failed: list[tuple[str, str]] = []

    class Watching:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                failed.append((report.nodeid, str(getattr(crash, "message", report.longrepr))))

    # Without the type checks at run time, which would put in place of the source one of their own.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what the parent has imported
    with tempfile.TemporaryFile("w+") as out:
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
        try:
            code = pytest.main([*options, *(f"{ROOT}/{name}" for name in chosen)], plugins=[Watching()])
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        out.seek(0)
        said = out.read()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}: {said[-2000:]}")
    return (failed[0][0], failed[0][1].splitlines()[0]) if failed else None


def judged(selection: tuple[Sequence[str], Sequence[str]]) -> tuple[str, str] | None:
    """What rejects the package as it is imported here."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.chdir(ROOT)
    subjects, tests = selection
    import esegeta

    assert all(hasattr(esegeta, name) for name in esegeta.__all__)  # what cannot be imported is no mutant

    return by_conformance(subjects) or (by_tests(tests) if tests else None)


def trial(
    selection: tuple[Sequence[str], Sequence[str]], module: str = "", source: str = ""
) -> dict[str, Any]:
    """One package, with or without a change."""
    changed = Changed(module, source)
    if module:
        sys.meta_path.insert(0, changed)
    found = judged(selection)
    if module and not changed.used:
        raise RuntimeError(f"{module} is never imported")
    if found is None:
        return {"status": "survived", "by": "", "message": ""}
    return {"status": "rejected", "by": found[0], "message": found[1][:500]}


def _error(message: str, seconds: float = 0.0) -> dict[str, Any]:
    return {"status": "error", "by": "", "message": message, "seconds": seconds}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# -- in the parent -----------------------------------------------------------------------------------------------


def apart(work: Callable[[], dict[str, Any]], deadline: float = DEADLINE) -> dict[str, Any]:
    """Run something in a child, and give what it answers, with the seconds that it took."""
    assert not any(name.partition(".")[0] == "esegeta" for name in sys.modules), (
        "a child would not see the fault"
    )
    started = time.monotonic()
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            answer = work()
        except BaseException as error:
            answer = _error(f"{_line(error)[:300]} {traceback.format_exc()[-300:]}")
        with os.fdopen(writing, "w") as out:
            json.dump(answer, out)
        os._exit(0)
    os.close(writing)
    said = b""
    with os.fdopen(reading, "rb", 0) as pipe:
        while select.select([pipe], [], [], max(0.0, started + deadline - time.monotonic()))[0]:
            piece = pipe.read(65536)
            if not piece:
                break
            said += piece
        else:
            os.kill(child, signal.SIGKILL)
    _, code = os.waitpid(child, 0)
    seconds = round(time.monotonic() - started, 2)
    if code == signal.SIGKILL:
        return _error(f"no answer after {deadline:g} s", seconds)
    if code or not said:
        return _error(f"the child ended with {code}", seconds)
    return {**json.loads(said), "seconds": seconds}


def preload() -> None:
    """Import what takes long and does not belong to the package."""
    import torch

    for name in ("hypothesis.strategies", "jaxtyping", "numpy", "pytest", "scipy.ndimage", "scipy.stats"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    # The first transforms of a process import much; not with a backward pass, whose threads would not outlive a fork.
    torch.func.vmap(torch.func.jvp, (None, 0, 0))(torch.sin, (torch.ones(1),), (torch.ones(1),))


def outcomes(
    mutants: Iterable[Mutant], *, healthy: bool = True, deadline: float = DEADLINE
) -> Iterator[dict[str, Any]]:
    """What became of each mutant: ``rejected`` by something, ``survived``, or an ``error`` of the mutant itself.

    With ``healthy`` the package without a fault comes first, for everything that the mutants are tested by: what
    rejects that is an error.
    """
    chosen = list(mutants)
    sick: dict[Any, str] = {}
    for selection in dict.fromkeys(m.selection for m in chosen) if healthy else ():
        found = apart(lambda s=selection: trial(s), deadline)
        if found["status"] != "survived":
            sick[selection] = f"rejects the package without a fault, too: {found['by']} {found['message']}"
        yield {"id": f"healthy on {', '.join(selection[0] + selection[1])}", **found}
    for mutant in chosen:
        try:
            source = mutant.source()
        except ValueError as stale:
            yield {"id": mutant.id, **_error(str(stale))}
            continue
        if mutant.selection in sick:
            yield {"id": mutant.id, **_error(sick[mutant.selection])}
            continue
        found = apart(lambda m=mutant, s=source: trial(m.selection, m.module, s), deadline)
        yield {"id": mutant.id, **found}


def main(names: Sequence[str]) -> int:
    """Write what becomes of the mutants of these names, or of all."""
    from mutants import MUTANTS

    known = {m.id: m for m in MUTANTS}
    healthy = "--mutants-only" not in names
    names = [n for n in names if not n.startswith("--")]
    unknown = [n for n in names if n not in known]
    if unknown:
        raise SystemExit(f"mutation: expected names of mutants, got {unknown}")
    preload()
    for outcome in outcomes([known[n] for n in names] if names else MUTANTS, healthy=healthy):
        print(json.dumps(outcome), flush=True)
    return 0


if __name__ == "__main__":
    # This module under its own name, so that the table of mutants is made of the same class.
    sys.modules["mutation"] = sys.modules["__main__"]
    raise SystemExit(main(sys.argv[1:]))
