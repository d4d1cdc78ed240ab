"""The conformance suite as pytest runs it: which methods, how many cases, which failures their owner knows.

Settings are lines of pytest's own configuration, so that ``-o name=value`` gives them too.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esegeta._registry import METHODS, REDUCERS, TRANSFORMS
from esegeta.conformance import contract
from esegeta.conformance.kinds import (
    AnySubject,
    TransformSubject,
    laws_of,
    of_reducer,
    of_transforms,
    subject_of,
)
from esegeta.conformance.subjects import Subject, of_method

OPTIONS = {
    "esegeta_methods": "names of methods, transforms, reducers and rewrites, beside what plugins (-p) register",
    "esegeta_xfails": "file of tests that are known to fail, one a line; a line that matches no test is an error",
    "esegeta_cases": "how many random cases each axiom is tried on (100)",
    "esegeta_seed": "of the random cases: a number (0), or random for new ones in every run",
    "esegeta_database": "folder in which failing cases are kept",
}


def pytest_addoption(parser: Any) -> None:
    """Make the settings known."""
    for name, text in OPTIONS.items():
        parser.addini(name, text, type="linelist" if name == "esegeta_methods" else "string", default=None)


def under_test(config: Any) -> list[AnySubject]:
    """Return what plugins registered, methods, transforms and reducers, and what is named."""
    made: tuple[tuple[Any, Any], ...] = (
        (METHODS, of_method),
        (TRANSFORMS, of_transforms),
        (REDUCERS, of_reducer),
    )
    foreign = [
        subject(spec)
        for table, subject in made
        for spec in table.values()
        if not spec.fn.__module__.startswith("esegeta.")
    ]
    return foreign + [subject_of(name) for name in config.getini("esegeta_methods") or []]


def checked(subject: AnySubject) -> Iterator[tuple[Subject, str]]:
    """List what the contract is put to: methods, and what transforms make of one method of each form."""
    if isinstance(subject, Subject):
        yield from ((subject, check) for check in contract.CHECKS)
    elif isinstance(subject, TransformSubject):
        yield from ((member, check) for member in subject.members for check in contract.OF_TRANSFORMS)


def setting(config: Any, name: str, otherwise: str) -> str:
    """Return one setting as text."""
    return config.getini(f"esegeta_{name}") or otherwise


@pytest.fixture(scope="session")
def search(request: Any) -> dict[str, Any]:
    """Return how ``verify`` is to search."""
    config = request.config
    seed = setting(config, "seed", "0")
    if seed == "random":
        seed = str(random.SystemRandom().randrange(2**32))
        print(f"esegeta_seed={seed}")
    database = setting(config, "database", "")
    return {"cases": int(setting(config, "cases", "100")), "seed": int(seed), "database": database or None}


def pytest_generate_tests(metafunc: Any) -> None:
    """Make a test for every method and every check, or every axiom."""
    for name in ("check", "axiom"):
        if name in metafunc.fixturenames and "subject" in metafunc.fixturenames:
            chosen = under_test(metafunc.config)
            if not chosen and metafunc.config.getoption("pyargs"):
                raise pytest.UsageError(
                    "esegeta.conformance: expected methods to test, got none. Register yours with @esegeta.method in "
                    "a module that is given with -p, or name some with -o esegeta_methods=..."
                )
            asked: list[tuple[AnySubject, str]] = [
                pair
                for s in chosen
                for pair in (checked(s) if name == "check" else ((s, law) for law in laws_of(s)))
            ]
            pairs = [pytest.param(s, n, id=f"{s.name}-{n}") for s, n in asked]
            metafunc.parametrize(("subject", name), pairs)


def known(path: Path) -> Iterator[tuple[str, str]]:
    """Read the tests of a file of known failures, each with its reason."""
    for line in path.read_text().splitlines():
        test, _, reason = line.partition("#")
        if test.strip():
            yield test.strip(), reason.strip()


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Expect the failures that the owner of a method knows, and refuse those that are no tests."""
    name = setting(config, "xfails", "")
    path = config.rootpath / (name or "esegeta_xfails.txt")
    if not path.exists():
        if name:
            raise pytest.UsageError(
                f"esegeta_xfails: expected a file, got {name}, which does not exist. Create it."
            )
        return
    ours = {
        item.callspec.id: item
        for item in items
        if Path(__file__).parent in item.path.parents and hasattr(item, "callspec")
    }
    for test, reason in known(path):
        if test not in ours:
            raise pytest.UsageError(
                f"{path.name}: expected the id of a test such as {next(iter(ours), 'method-completeness')!r}, "
                f"got {test!r}, which matches none. Remove the line or correct it."
            )
        ours[test].add_marker(pytest.mark.xfail(reason=reason or "known", strict=True))
