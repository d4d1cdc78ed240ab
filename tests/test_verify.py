"""The search for counterexamples, its report, and the suite as others run it."""

import json
import subprocess
import sys
import time

import pytest
import torch

import esegeta as eg
from esegeta import conformance
from esegeta.conformance import (
    LAWS,
    Report,
    Subject,
    contract,
    drawing,
    of,
    rebuilt,
    search,
    strategies,
    verify,
)
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


@pytest.fixture
def as_found(monkeypatch):
    """A counterexample is hardly made smaller, where nothing is said about its size: that takes most of the time."""
    monkeypatch.setattr(search, "SHRINKS", 5)


@pytest.fixture(scope="module")
def report():
    axioms = ["completeness", "linearity", "shift", "efficiency_of_regions"]
    return verify(gradient_times_input, axioms=axioms, cases=40)


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
    again = verify(gradient_times_input, axioms=["linearity", "shift"], cases=40)
    assert again.verdicts == (report["linearity"], report["shift"])


@pytest.mark.usefixtures("as_found")
def test_a_rough_quadrature_is_found_out():
    report = verify(left_riemann, axioms=["completeness", "sensitivity_n"], cases=40)
    assert {v.kind for v in report.verdicts} == {"violated"}


@pytest.mark.usefixtures("as_found")
def test_a_random_method_gets_its_key():
    report = verify(noisy, axioms=["linearity", "symmetry"], cases=40)
    assert [v.kind for v in report.verdicts] == ["holds", "violated"]


@pytest.mark.usefixtures("as_found")
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


@pytest.mark.usefixtures("as_found")
def test_infinity_excuses_nothing():
    endless = lambda score: lambda x: torch.full_like(x, float("inf"))
    report = verify(endless, axioms=["completeness", "linearity", "dummy", "shift"], cases=20)
    assert {v.kind for v in report.verdicts} == {"violated"}, report
    assert all(v.counterexample.allowed < 1 for v in report.verdicts)


FLAT = "Case(Linear((0, 0)), [[-1.5, -2]], [[-0.5, 0.75]], [[[-0.25, -0.75]], [[2, 0.25]]])"
CANCELS = "Ignoring(Extremum('max', (-1.25, 0.75), offsets=(0, -1.75)), (0, 1), how='softened away')"


@pytest.mark.parametrize(
    ("code", "method"),
    [
        (f"Linearity({FLAT}, {CANCELS}, (-1.25, -1.25))", "gradient"),
        (f"ClassSensitivity({FLAT}, {CANCELS})", lambda score: lambda x: x.abs()),
    ],
)
def test_rounding_is_that_of_all_scores_of_a_situation(code, method):
    """The second score is constant, by terms that cancel; the first one has no size that would excuse that."""
    residual, allowed = rebuilt(code).measure(of(method))
    assert residual <= allowed


def test_situations_of_which_an_axiom_says_nothing_are_no_cases():
    """They do not even reach the method: one that refuses everything keeps no axiom."""

    def refusing(score):
        def explain(x):
            raise NotImplementedError("not today")

        return explain

    axioms = ["sensitivity_a", "dummy", "symmetry", "implementation_invariance", "parameter_dependence"]
    report = verify(refusing, axioms=axioms, cases=12)
    assert {(v.kind, v.cases) for v in report.verdicts} == {("not applicable", 0)}, report


def test_a_counterexample_has_the_input_from_before_the_method_wrote_to_it():
    def doubling(score):
        def explain(x):
            a = x * slope(score)(x)
            x.mul_(2)
            return a

        return explain

    found = verify(doubling, axioms=["conservation"], cases=40)["conservation"].counterexample
    assert rebuilt(found.code).measure(of(doubling)) == (found.residual, found.allowed)
    with pytest.raises(AssertionError, match="an input changed"):
        contract.check("world_untouched", of(doubling))
    contract.check("world_untouched", of(gradient_times_input))
    assert torch.equal(contract.SMOOTH.x, contract.waves(2, 3, 4, step=7).double())


def slowly(seconds, method):
    def slow(score):
        explain = method(score)

        def run(x):
            time.sleep(seconds)
            return explain(x)

        return run

    return slow


def half_of_it(score):
    return lambda x: x * slope(score)(x) / 2


@pytest.mark.slow
def test_a_budget_of_time_is_kept():
    # A thousand cases of every axiom would sleep for many minutes, whatever the machine does besides.
    asked = []

    def method(score):
        explain = slowly(0.05, slope)(score)
        return lambda x: (asked.append(x), explain(x))[1]

    report = verify(method, cases=1000, seconds=3)
    assert not report.complete
    assert len(asked) < 3 / 0.05 + 20 * len(LAWS)
    assert "stopped before all cases were tried" in str(report)


@pytest.mark.usefixtures("as_found")
@pytest.mark.parametrize("seconds", [0, 0.1, pytest.param(1, marks=pytest.mark.slow)])
def test_no_budget_makes_an_axiom_hold(seconds):
    """Of the first cases some are trivial: any method keeps anything there."""
    axioms = ["completeness", "linearity", "shift"]
    for method in (half_of_it, slowly(0.02, half_of_it)):
        report = verify(method, axioms=axioms, cases=1000, seconds=seconds)
        assert report["completeness"].kind in ("violated", "undecided"), report
        assert "completeness" not in report.axioms
        for verdict in report.verdicts:
            assert verdict.kind != "holds", "of 1000 cases all would have been tried"
            assert verdict.counterexample or "the time was over after" in verdict.why
    assert verify("gradient", axioms=axioms, cases=1000, seconds=0).undecided == tuple(axioms)


def seen_by(seconds, cases, delay=0.0):
    """The situations that a search puts to a method, in order."""
    seen = []

    def measure(situation):
        seen.append(repr(situation))
        time.sleep(delay)
        return 0.0, 1.0

    found = search.smallest(
        drawing.of_kind(LAWS["completeness"], of("gradient")),
        measure,
        search.Search(cases, time.monotonic() + seconds, 3),
    )
    return seen, found


def test_a_budget_tries_the_first_of_the_same_cases():
    whole, found = seen_by(float("inf"), 60)
    assert (found.complete, found.tried, len(set(whole))) == (True, 60, 60)
    some, cut = seen_by(0.4, 60, delay=0.02)
    assert not cut.complete
    assert 0 < len(some) < 60
    assert some == whole[: len(some)]
    fewer, _ = seen_by(float("inf"), 20)
    assert fewer == whole[:20]
    # The trivial are few, the first of all among them.
    assert sum(rebuilt(code).trivial for code in whole[:20]) < 8


@pytest.mark.usefixtures("as_found")
def test_a_budget_can_only_leave_a_verdict_undecided():
    axioms = ["linearity", "completeness"]
    whole = {v.axiom: v.kind for v in verify(half_of_it, axioms=axioms, cases=40).verdicts}
    assert whole == {"linearity": "holds", "completeness": "violated"}
    for seconds in (0, 0.3, 600):
        for verdict in verify(half_of_it, axioms=axioms, cases=40, seconds=seconds).verdicts:
            assert verdict.kind in (whole[verdict.axiom], "undecided")
            assert seconds < 600 or verdict.kind == whole[verdict.axiom]


def test_few_cases_decide_nothing():
    few = verify("gradient", axioms=["linearity"], cases=10)["linearity"]
    assert few.kind == "undecided"
    assert few.claimed
    assert not few.broken
    assert "25 are needed: try more than 10" in few.why
    # Of scores that do not vary there is nothing to explain, however many there are.
    constant = lambda shape: strategies.functions(shape=shape, kinds=("Linear",)).map(
        lambda f: conformance.Linear((0,) * f.size)
    )
    flat = verify("gradient", axioms=["linearity"], cases=60, scores=constant)["linearity"]
    assert (flat.kind, flat.cases) == ("not applicable", 0)


def test_an_undecided_verdict_shows_in_every_form():
    report = verify("gradient", axioms=["linearity"], cases=10)
    assert "0 of 1 axioms hold, 1 undecided" in str(report)
    assert "| linearity | undecided | yes | kept on" in report.table()
    assert json.loads(report.json())["verdicts"][0]["kind"] == "undecided"
    assert report.undecided == ("linearity",)


@pytest.mark.parametrize("method", ["gradient", "captum:Saliency"])
@pytest.mark.usefixtures("as_found")
def test_a_gradient_jumps_at_kinks(method):
    if ":" in method:
        pytest.importorskip("captum")
    found = verify(method, axioms=["continuity"], cases=100)["continuity"]
    assert found.kind == "violated"
    assert found.cases <= 100
    assert not found.claimed


@pytest.mark.slow
def test_integrated_gradients_do_not():
    assert verify("integrated_gradients", axioms=["continuity"], cases=40)["continuity"].kind == "holds"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.usefixtures("as_found")
def test_hooks_at_modules_depend_on_how_a_rectifier_is_written(seed):
    pytest.importorskip("captum")
    report = verify("captum:GuidedBackprop", axioms=["implementation_invariance"], cases=100, seed=seed)
    found = report["implementation_invariance"]
    assert found.kind == "violated", report
    assert "Rebuilt(" in found.counterexample.code


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda x: None, "NoneType None of named"),
        (lambda x: (x, x), "of named. Return one tensor"),
        (lambda x: x[None], "float64(1, 2, 4, 4) of named"),
        (lambda x: 3.0, "float 3.0 of named"),
    ],
)
def test_what_is_no_explanation_is_refused(answer, got):
    def named(score):
        return lambda x, key=None: answer(x)

    with pytest.raises(TypeError, match="verify: expected an explanation to be one tensor like x") as caught:
        verify(named)
    assert got in str(caught.value)
    with pytest.raises(TypeError, match="verify: expected an explanation"):  # also where a subject is given
        verify(Subject("given", named), axioms=["linearity"])


def test_one_map_for_all_channels_is_recognised():
    flat = lambda score: lambda x: slope(score)(x).sum(0, keepdim=True)
    assert of(flat).one_channel
    assert verify(flat, axioms=["linearity"], cases=40)["linearity"].kind == "holds"
    assert verify(flat, axioms=["monotonicity"])["monotonicity"].kind == "not applicable"


def test_progress_is_that_of_the_cases():
    """Not that of the loops of the method, which end with every case."""
    seen = []
    with eg.execution(progress=lambda label, done: seen.append((label, done))):
        verify("integrated_gradients", axioms=["linearity", "shift"], cases=10)
    labels, done = zip(*seen, strict=True)
    assert set(labels) == {"verify integrated_gradients"}
    assert list(done) == sorted(done)
    assert done[-1] == 1
    assert len({round(20 * d) for d in done}) > 10, done


def test_failures_are_kept_and_tried_first(tmp_path):
    first = verify(gradient_times_input, axioms=["shift"], cases=40, database=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.read_text() == first["shift"].counterexample.code + "\n"
    again = verify(gradient_times_input, axioms=["shift"], cases=1, seed=1, database=tmp_path)
    assert again["shift"].counterexample == first["shift"].counterexample
    assert len(kept.read_text().splitlines()) == 1


def test_what_is_kept_may_be_refused_or_of_another_version(tmp_path):
    def careful(score):
        def explain(x):
            raise NotImplementedError("not any more")

        return explain

    (tmp_path / "careful-shift.txt").write_text(
        "Shift(Case(Linear((1,)), [[1]], [[0]], [[[0]]]), [[1]])\nOf(another, version)\n\nShift(1)\n"
    )
    verdict = verify(careful, axioms=["shift"], cases=3, database=tmp_path)["shift"]
    assert (verdict.kind, verdict.refused) == ("not applicable", 3)


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
        (lambda score: torch.abs, "got (). Rename its parameters, or pass a Subject"),
        (lambda score: score.nothing, "which raised AttributeError: "),
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


@pytest.mark.usefixtures("as_found")
@pytest.mark.slow
def test_chosen_scores_are_what_is_tried():
    """Gradient times input is complete on straight networks; of differences of parts they say nothing."""
    straight = lambda shape: strategies.networks(
        shape=shape, operators=["conv", "average pool"], max_degree=1
    )
    axioms = ["conservation", "sensitivity_n"]
    report = verify(straight_through_zero, axioms=axioms, cases=32, scores=straight)
    assert report["conservation"].kind == "holds", report
    assert report["sensitivity_n"].why == "it says nothing about any of these scores"


@pytest.mark.usefixtures("as_found")
def test_chosen_scores_that_bend():
    bent = lambda shape: strategies.networks(shape=shape, operators=["softplus"], layers=1)
    report = verify(straight_through_zero, axioms=["conservation"], cases=20, scores=bent)
    assert report["conservation"].kind == "violated"
    assert "softplus" in report["conservation"].counterexample.code
    with unchecked_types(), pytest.raises(TypeError, match="expected scores: shape -> strategy"):
        verify(straight_through_zero, scores=3)


def straight_through_zero(score):
    """Gradient times input, and what is there without an image spread over it."""
    return lambda x: x * slope(score)(x) + score(torch.zeros_like(x)) / x.numel()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_to_verify.py").write_text(
        "import torch\n\n\ndef halved(score):\n    return lambda x: torch.func.grad(score)(x) / 2\n"
    )
    (tmp_path / "mine_needs_more.py").write_text("import nobody_has_this\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.slow
@pytest.mark.usefixtures("mine")
def test_a_function_of_the_working_directory_is_checked_from_the_command_line():
    code, out = command("verify", "mine_to_verify:halved", "--axioms", "linearity", "--cases", "40")
    assert code == 0, out
    assert "mine_to_verify:halved: 1 of 1 axioms hold" in out, out


@pytest.mark.usefixtures("mine")
def test_a_function_of_the_working_directory_is_named():
    subject = of("mine_to_verify:halved")
    assert (subject.name, subject.refs) == ("mine_to_verify:halved", ())
    x = torch.ones(1, 2)
    assert subject.build(lambda z: 3 * z.sum())(x).tolist() == [[1.5, 1.5]]


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "error"),
    [
        (
            "mine_to_verify:halve",
            "expected a function or a subject of mine_to_verify, got 'halve'. Nearest: halved.",
        ),
        ("mine_to_verfy:halved", "No module named 'mine_to_verfy'"),
        ("mine_needs_more:halved", "No module named 'nobody_has_this'"),
        ("captun:DeepLift", "Nearest: captum:DeepLift"),
        (":halved", "module:function"),
        ("mine_to_verify:", "expected a function or a subject of mine_to_verify, got ''"),
        ("..:halved", "module:function"),
    ],
)
def test_a_name_that_leads_nowhere_says_where_it_ends(name, error):
    with pytest.raises(ValueError, match=r"^verify: expected .*, got .*\. .*\.$") as caught:
        of(name)
    assert error in str(caught.value)


def command(*words):
    """``esegeta`` in the working directory, which is not on the path of a program that is installed."""
    start = "import sys; sys.path.remove(''); from esegeta.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", start, *words], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_settings_are_checked():
    with pytest.raises(
        ValueError,
        match=r"verify: expected axioms to be one of .*, got .completness.\. Nearest: completeness",
    ):
        verify("gradient", axioms=["completness"])
    with pytest.raises(ValueError, match=r"^verify: expected the name of a method, got .* Nearest: gradient"):
        verify("gradiant")
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
        "esegeta_cases=40",
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
