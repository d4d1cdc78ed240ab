"""The search for counterexamples, its report, and the suite as others run it."""

import json
import subprocess
import sys
import time

import pytest
import torch

import esegeta as eg
from esegeta.conformance import LAWS, Report, Subject, of, rebuilt, strategies, verify
from esegeta.conformance.contract import unchecked_types

slope = torch.func.grad


def gradient_times_input(score):
    return lambda x: x * slope(score)(x)


def left_riemann(score):
    def explain(x, baseline):
        steps = [slope(score)(baseline + i / 8 * (x - baseline)) for i in range(8)]
        return (x - baseline) * sum(steps) / 8

    return explain


def noisy(score):
    return lambda x, *, key=None: slope(score)(x + eg.random.normal(key, x.shape, dtype=x.dtype))


@pytest.fixture(scope="module")
def report():
    axioms = ["completeness", "linearity", "shift", "efficiency_of_regions"]
    return verify(gradient_times_input, axioms=axioms, cases=30)


def test_a_report_says_what_holds_and_what_does_not(report):
    assert report.method == "gradient_times_input"
    assert report["linearity"].kind == "holds"
    assert report["linearity"].cases >= 25
    assert report["efficiency_of_regions"].why == "it does not explain by parts"
    assert report.axioms == {"linearity"}
    shift = report["shift"]
    assert shift.kind == "violated"
    assert shift.counterexample.residual > shift.counterexample.allowed
    with pytest.raises(KeyError, match="the report on gradient_times_input is about completeness"):
        report["dummy"]


def test_a_counterexample_rebuilds_itself_and_is_small(report):
    for axiom in ("completeness", "shift"):
        found = report[axiom].counterexample
        situation = rebuilt(found.code)
        assert repr(situation) == found.code
        assert situation.measure(of(gradient_times_input)) == (found.residual, found.allowed)
        assert situation.case.x.numel() <= 4
        assert len(found.code) < 250


def test_reports_as_text_table_and_json(report):
    text, table = str(report), report.table()
    assert "gradient_times_input: 1 of 4 axioms hold" in text
    assert "rounding allows" in text
    assert "Shift(Case(" in text
    assert table.splitlines()[0] == "| axiom | verdict | claimed | |"
    assert len(table.splitlines()) == 2 + 4
    assert json.loads(report.json())["verdicts"][1]["kind"] == "holds"
    assert Report.from_json(report.json()) == report


def test_the_same_seed_gives_the_same_verdicts(report):
    again = verify(gradient_times_input, axioms=[v.axiom for v in report.verdicts], cases=30)
    assert again.verdicts == report.verdicts


def test_a_rough_quadrature_is_found_out():
    report = verify(left_riemann, axioms=["completeness", "sensitivity_n"], cases=40)
    assert {v.kind for v in report.verdicts} == {"violated"}


def test_a_random_method_gets_its_key():
    report = verify(noisy, axioms=["linearity", "symmetry"], cases=40)
    assert [v.kind for v in report.verdicts] == ["holds", "violated"]


def test_claims_of_registered_methods_are_compared():
    assert verify("gradient", axioms=["linearity"], cases=10)["linearity"].claimed
    wrong = Subject("boasting", gradient_times_input, axioms=frozenset({"shift"}))
    assert verify(wrong, axioms=["shift"], cases=40).broken == ("shift",)


def test_a_method_that_refuses_everything_is_not_applicable():
    def refusing(score):
        def explain(x):
            if x.numel():
                raise NotImplementedError("not today")
            return x

        return explain

    verdict = verify(refusing, axioms=["linearity"], cases=10)["linearity"]
    assert verdict.kind == "not applicable"
    assert verdict.cases == 0
    assert "cases were refused: NotImplementedError: not today" in verdict.why


def test_nan_is_a_violation():
    broken = lambda score: lambda x: slope(score)(x) * float("nan")
    assert verify(broken, axioms=["linearity"], cases=5)["linearity"].kind == "violated"


def test_a_budget_of_time_is_kept():
    def slow(score):
        def explain(x):
            time.sleep(0.05)
            return slope(score)(x)

        return explain

    started = time.monotonic()
    report = verify(slow, cases=1000, seconds=3)
    assert not report.complete
    assert time.monotonic() - started < 30  # the first draws of a process take their time
    assert "stopped before all cases were tried" in str(report)


def test_failures_are_kept_and_tried_first(tmp_path):
    first = verify(gradient_times_input, axioms=["shift"], cases=40, database=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.read_text() == first["shift"].counterexample.code + "\n"
    again = verify(gradient_times_input, axioms=["shift"], cases=1, seed=1, database=tmp_path)
    assert again["shift"].counterexample == first["shift"].counterexample
    assert len(kept.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').getcwd()",
        "Completeness.__init__(1)",
        "[x for x in (1,)]",
        "Completeness(Case(Linear((1 + 1,)), [[3]], [[0]], [[[0]]]))",
        "Unknown(1)",
        "(",
    ],
)
def test_code_of_a_situation_is_nothing_else(code):
    with pytest.raises(ValueError, match="expected the code of a situation"):
        rebuilt(code)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        (3, "verify: expected a method: Score -> Explain, got"),
        (lambda score: 3, "expected a method: a function of a score that returns an explanation"),
        (lambda score: lambda x, reference: x, "Rename its parameters, or pass a Subject"),
        ("gradeint", "Nearest: gradient"),
        (
            "over_baselines(gradient)",
            "verify: expected a method that over_baselines applies to, got gradient",
        ),
    ],
)
def test_what_is_no_method_is_refused(method, error):
    with unchecked_types(), pytest.raises((TypeError, ValueError), match="expected") as caught:
        verify(method)
    assert error in str(caught.value)


def test_chosen_scores_are_what_is_tried():
    """Gradient times input is complete on straight networks, and not where they bend."""
    straight = lambda shape: strategies.networks(
        shape=shape, operators=["conv", "average pool"], max_degree=1
    )
    bent = lambda shape: strategies.networks(shape=shape, operators=["softplus"], layers=1)
    axioms = ["conservation", "dummy", "linearity", "sensitivity_n", "implementation_invariance"]
    report = verify(straight_through_zero, axioms=axioms, cases=20, scores=straight)
    assert report["conservation"].kind == "holds", report
    assert report["sensitivity_n"].why == "it says nothing about any of these scores"
    report = verify(straight_through_zero, axioms=["conservation"], cases=20, scores=bent)
    assert report["conservation"].kind == "violated"
    assert "softplus" in report["conservation"].counterexample.code
    with unchecked_types(), pytest.raises(TypeError, match="expected scores: shape -> strategy"):
        verify(straight_through_zero, scores=3)


def straight_through_zero(score):
    """Gradient times input, and what is there without an image spread over it."""
    return lambda x: x * slope(score)(x) + score(torch.zeros_like(x)) / x.numel()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="verify: expected axioms to be one of completeness"):
        verify("gradient", axioms=["completness"])
    with pytest.raises(ValueError, match="cases"):
        verify("gradient", cases=0)


def test_every_law_says_what_it_states():
    for name, law in LAWS.items():
        assert law.__doc__
        assert "\n" not in law.__doc__, name
        assert getattr(eg.axioms, name)


# -- the suite as a product ---------------------------------------------------------------------------------------

MINE = '''
import torch
import esegeta as eg

@eg.method(axioms=("linearity", "shift"{claim}), paper="ours")
def doubled(score):
    """Twice the gradient."""
    return lambda x: 2 * torch.func.grad(score)(x)
'''


def suite(folder, *options, claim=""):
    (folder / "my_method.py").write_text(MINE.format(claim=claim))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--pyargs",
        "esegeta.conformance",
    ]
    command += [
        "-p",
        "my_method",
        "-o",
        "esegeta_cases=10",
        "-k",
        "linearity or dummy or repeatable or differentiable",
    ]
    environment = {"PYTHONPATH": str(folder), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    done = subprocess.run([*command, *options], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_suite_passes_a_sound_method(tmp_path):
    code, out = suite(tmp_path)
    assert code == 0, out
    assert "3 passed, 1 skipped" in out


@pytest.mark.slow
def test_the_suite_rejects_a_false_claim_unless_its_owner_knows(tmp_path):
    code, out = suite(tmp_path, claim=', "completeness"')
    assert code == 0, out  # not among those that were chosen
    code, out = suite(tmp_path, "-k", "completeness", claim=', "completeness"')
    assert code == 1, out
    assert "Completeness(Case(" in out, out
    (tmp_path / "esegeta_xfails.txt").write_text("doubled-completeness  # twice is too much\n")
    code, out = suite(tmp_path, "-k", "completeness", claim=', "completeness"')
    assert code == 0, out
    assert "1 xfailed" in out, out


@pytest.mark.slow
def test_known_failures_that_match_nothing_are_errors(tmp_path):
    (tmp_path / "mine.txt").write_text("# mine\ndoubled-completness\n")
    code, out = suite(tmp_path, "-o", "esegeta_xfails=mine.txt")
    assert code == 4, out
    assert "got 'doubled-completness', which matches none" in out, out
    code, out = suite(tmp_path, "-o", "esegeta_xfails=none.txt")
    assert code == 4, out
    assert "none.txt, which does not exist" in out, out


@pytest.mark.slow
def test_a_suite_without_methods_is_an_error(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--pyargs",
        "esegeta.conformance",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "expected methods to test, got none" in done.stdout + done.stderr
