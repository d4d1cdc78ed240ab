"""Faults in the package are found; and what finds them is found out itself where it does not."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mutants import MUTANTS
from mutation import ROOT, Mutant
from together import together

RUNNER = Path(__file__).with_name("mutation.py")
AT_ONCE = 8  # mutants of one process: enough to share what it imports, few enough to be spread over workers

# Those that are tested by the same side by side: the package without a fault is tested by that only once.
ORDERED = sorted(MUTANTS, key=lambda m: m.selection)
GROUPS = [ORDERED[i : i + AT_ONCE] for i in range(0, len(ORDERED), AT_ONCE)]

QUICK = Mutant(
    "quick",
    "esegeta.noise",
    "return unit * (fraction * (x.amax() - x.amin()))",
    "return unit * (fraction * (x.amax() - x.amin())) + fraction + 1",
    "noise with a mean",
    tests=("tests/test_noise.py::test_zero_sigma_is_no_noise",),
)


def answers(*command):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    environment = {**kept, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {o["id"]: o for o in map(json.loads, done.stdout.splitlines())}


def outcomes(mutants, *, healthy=True, deadline=120):
    """What becomes of mutants that are in no table."""
    script = (
        f"import sys, json; sys.path.insert(0, {str(RUNNER.parent)!r})\n"
        "from mutation import Mutant, outcomes, preload\n"
        "preload()\n"
        f"for o in outcomes({list(mutants)!r}, healthy={healthy}, deadline={deadline}): print(json.dumps(o))\n"
    )
    return answers("-c", script)


# All of them take ten minutes of one core: half are tried with the slow tests, the others at night.
TURNS = [pytest.mark.slow if i % 2 == 0 else pytest.mark.nightly for i in range(len(GROUPS))]


@pytest.mark.parametrize(
    "group", [pytest.param(g, marks=m, id=g[0].id) for g, m in zip(GROUPS, TURNS, strict=True)]
)
def test_every_fault_is_found(group):
    found = answers(str(RUNNER), *(m.id for m in group))
    for mutant in group:
        outcome = found[mutant.id]
        assert outcome["status"] == "rejected", (
            f"{mutant.id} ({mutant.why}) in {mutant.module} {outcome['status']}: {outcome['message']}\n"
            f"- {mutant.old}\n+ {mutant.new}\nis not rejected by {mutant.selection}"
        )


@together("mutant", MUTANTS, ids=lambda m: m.id)
def test_a_fault_is_a_change_of_what_is_there(mutant):
    compile(mutant.source(), str(mutant.path), "exec")
    assert mutant.old != mutant.new
    assert mutant.why
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), test


def test_faults_are_many_and_everywhere():
    assert len({m.id for m in MUTANTS}) == len(MUTANTS) >= 60
    assert len({m.module for m in MUTANTS}) >= 30
    parts = {m.module.split(".")[1] for m in MUTANTS}
    assert parts >= {"methods", "rules", "engine", "transforms", "reducers", "features", "baselines"}
    assert sum(bool(m.subjects) for m in MUTANTS) >= 25


@pytest.mark.slow
def test_the_runner_tells_what_was_found_and_what_was_not():
    nothing = replace(QUICK, id="nothing", new=QUICK.old + "  # nothing")
    found = outcomes([QUICK, nothing])
    assert {name: o["status"] for name, o in found.items()} == {
        f"healthy on {QUICK.tests[0]}": "survived",
        "quick": "rejected",
        "nothing": "survived",
    }
    assert found["quick"]["by"].startswith("tests/test_noise.py::test_zero_sigma_is_no_noise")
    assert found["quick"]["seconds"] > 0


@pytest.mark.slow
def test_what_hangs_is_ended_and_is_not_called_rejected():
    hanging = replace(QUICK, new="import time; time.sleep(1000)")
    (outcome,) = outcomes([hanging], healthy=False, deadline=3).values()
    assert (outcome["status"], outcome["message"]) == ("error", "no answer after 3 s")
    assert 3 <= outcome["seconds"] < 60


@pytest.mark.slow
def test_the_conformance_suite_is_what_rejects():
    fault = next(m for m in MUTANTS if m.id == "the mean over the examples")
    (outcome,) = outcomes([fault], healthy=False).values()
    assert outcome["status"] == "rejected", outcome
    assert outcome["by"] == "gradient: batched_equals_loop"
    assert outcome["message"].startswith("AssertionError: batched: differs by")


@pytest.mark.slow
def test_mutants_that_are_none_are_errors():
    faults = {
        "stale": replace(QUICK, old="what was here once"),
        "ambiguous": replace(QUICK, old="return"),
        "untested": replace(QUICK, tests=()),
        "broken": replace(QUICK, new="return ("),
        "elsewhere": replace(QUICK, module="esegeta._tables", old="def main", new="def other"),
        "of no test": replace(QUICK, tests=("tests/test_noise.py::test_that_is_not_there",)),
    }
    found = outcomes([replace(m, id=name) for name, m in faults.items()], healthy=False)
    assert {o["status"] for o in found.values()} == {"error"}, found
    told = {
        "stale": "expected 'what was here once' once in esegeta.noise, got it 0 times",
        "ambiguous": "expected 'return' once in esegeta.noise, got it",
        "untested": "expected subjects or tests, got none",
        "broken": "SyntaxError",
        "elsewhere": "esegeta._tables is never imported",
        "of no test": "pytest ended with",
    }
    for name, text in told.items():
        assert text in found[name]["message"], found[name]


@pytest.mark.slow
def test_what_rejects_the_sound_package_too_is_no_test_of_a_fault():
    sick = replace(QUICK, tests=("tests/test_mutation.py::test_that_fails_where_it_is_asked_to",))
    os.environ["ESEGETA_FAIL"] = "1"
    try:
        outcome = outcomes([sick])["quick"]
    finally:
        del os.environ["ESEGETA_FAIL"]
    assert outcome["status"] == "error"
    assert "rejects the package without a fault, too" in outcome["message"]


def test_that_fails_where_it_is_asked_to():
    assert "ESEGETA_FAIL" not in os.environ
