"""The command that measures: what it keeps, what it says has moved, and that it runs."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import esegeta as eg

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = (
    *("_measure", "_networks", "_questions", "_figures", "_page", "peers", "limit", "scaling", "accuracy"),
    "__main__",
)


@pytest.fixture(scope="module")
def scripts():
    """The modules of the command, which find each other in their own folder."""
    kept = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        found = {name: importlib.import_module(name) for name in NAMES[:-1]}
        found["command"] = _imported(FOLDER / "__main__.py")
        yield found
        for name in NAMES[:-1]:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def _imported(file):
    spec = importlib.util.spec_from_file_location("benchmarks_command", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def question(scripts):
    """A question whose answers are written here."""
    q = scripts["_questions"]
    return q.Question(
        "speed", "How fast?", "Text.", lambda options: iter(()), {"processor": 0.1, "memory": 0.05}, None
    )


@pytest.fixture
def row(scripts):
    q = scripts["_questions"]

    def make(processor, memory=1.0, what="gradient"):
        return q.Row("unet", what, {"processor": processor, "memory": memory}, q.Aim("processor", ">=", 1.0))

    return make


MADE = {"quick": False, "threads": 1, "cores": 2, "torch": "2"}


def test_what_stays_within_the_tolerance_has_not_moved(scripts, question, row):
    q = scripts["_questions"]
    before = q.merged({}, "speed", MADE, [row(2.0)])
    assert q.moved(question, before, MADE, [row(2.0), row(0.1, what="new")]) == []
    assert q.moved(question, before, MADE, [row(1.85, memory=1.04)]) == []


def test_what_moved_is_named_with_its_direction(scripts, question, row):
    q = scripts["_questions"]
    before = q.merged({}, "speed", MADE, [row(2.0)])
    found = q.moved(question, before, MADE, [row(1.5)])
    assert [(m.row, m.value, m.before, m.now, m.worse) for m in found] == [
        ("unet, gradient", "processor", 2.0, 1.5, True)
    ]
    assert str(found[0]) == "speed, unet, gradient, processor: 2 before, 1.5 now, worse"
    assert [m.worse for m in q.moved(question, before, MADE, [row(2.5)])] == [False]
    # nothing says whether more memory is worse: it has no aim in this row
    assert [(m.value, m.worse) for m in q.moved(question, before, MADE, [row(2.0, memory=1.2)])] == [
        ("memory", None)
    ]


def test_an_aim_that_is_lost_has_moved_however_little(scripts, question, row):
    q = scripts["_questions"]
    before = q.merged({}, "speed", MADE, [row(1.01)])
    assert [m.worse for m in q.moved(question, before, MADE, [row(0.99)])] == [True]
    below = q.merged({}, "speed", MADE, [row(0.95)])
    assert q.moved(question, below, MADE, [row(0.94)]) == []


def test_a_row_that_became_an_error_has_moved(scripts, question, row):
    q = scripts["_questions"]
    before = q.merged({}, "speed", MADE, [row(2.0)])
    found = q.moved(question, before, MADE, [row(2.0)._replace(values={}, note="cannot")])
    assert {m.value for m in found} == {"processor", "memory"}
    assert all(math.isnan(m.now) for m in found)
    assert next(m for m in found if m.value == "processor").worse


def test_other_settings_are_not_compared(scripts, question, row):
    q = scripts["_questions"]
    before = q.merged({}, "speed", MADE, [row(2.0)])
    with pytest.raises(ValueError, match=r"expected the setting of ratios\.json"):
        q.moved(question, before, {**MADE, "threads": 2}, [row(2.0)])
    with pytest.raises(ValueError, match=r"expected ratios of speed in ratios\.json, got none"):
        q.moved(question, {}, MADE, [row(2.0)])
    assert q.moved(question, before, {**MADE, "torch": "3"}, [row(2.0)]) == []


def test_the_file_keeps_rows_that_were_not_measured_again(scripts, row, tmp_path):
    q = scripts["_questions"]
    first = q.merged({}, "speed", MADE, [row(2.0), row(3.0, what="occlusion")])
    content = q.merged(first, "speed", MADE, [row(2.46913, what="occlusion")])
    q.write(content, tmp_path / "ratios.json")
    kept = q.rows(q.read(tmp_path / "ratios.json"), "speed")
    assert [(r.what, r.values["processor"]) for r in kept] == [("gradient", 2.0), ("occlusion", 2.47)]
    assert kept[0].aim == q.Aim("processor", ">=", 1.0)
    other = q.merged(content, "speed", {**MADE, "threads": 2}, [row(1.0)])
    assert [r.what for r in q.rows(other, "speed")] == ["gradient"]


def test_the_page_is_what_the_kept_ratios_say(scripts):
    page, q, command = scripts["_page"], scripts["_questions"], scripts["command"]
    content = q.read()
    assert (page.DOCS / "benchmarks.md").read_text() == page.text(content, command.QUESTIONS), (
        "Run: python -m benchmarks --page"
    )
    assert "second" not in json.dumps(content), "ratios only"


def test_the_page_marks_what_misses_its_aim(scripts, question, row):
    page, q = scripts["_page"], scripts["_questions"]
    content = q.merged({}, "speed", MADE, [row(0.5), row(1.5, what="occlusion")])
    lines = page.text(content, [question]).splitlines()
    assert "| gradient | 0.50 | 1.00 | >= 1 ! |  |" in lines
    assert "| occlusion | 1.50 | 1.00 | >= 1 |  |" in lines


def test_unknown_questions_are_refused_with_the_known_ones(scripts, capsys):
    with pytest.raises(SystemExit):
        scripts["command"].main(["pears"])
    assert "expected some of peers, limit, scaling, accuracy, got pears" in capsys.readouterr().err


def test_exact_answers_of_the_benchmark_are_those_of_the_package(scripts):
    """Two ways to the same number: the enumeration of the benchmark, and the method that is exact."""
    accuracy, networks = scripts["accuracy"], scripts["_networks"]
    weights = torch.arange(1.0, 10.0)
    parts = networks.blocks((6, 6), 3)
    score = lambda x: sum(weights[i] * x[0][parts == i].mean() for i in range(9)) + x[0, 0, 0] * x[0, 5, 5]
    x = torch.ones(1, 6, 6)
    shown = [[c >> i & 1 for i in range(9)] for c in range(512)]
    worth = np.array([score(x * torch.tensor(s)[parts][None]).item() for s in shown])
    exact = eg.exact_shapley(score, features=eg.features.labels(parts))(x, torch.zeros_like(x))
    theirs = [exact[0][parts == i].mean().item() for i in range(9)]
    np.testing.assert_allclose(accuracy.shapley_of(worth), theirs, rtol=1e-5)
    many = eg.lime(score, features=eg.features.labels(parts), samples=2000, ridge=1e-6)
    sampled = many(x, torch.zeros_like(x), key=0)
    fitted = [sampled[0][parts == i].mean().item() for i in range(9)]
    np.testing.assert_allclose(accuracy.lime_of(worth, 0.25, 1e-6), fitted, atol=0.15)


def test_a_slope_is_that_of_the_logarithms(scripts):
    sizes = [1, 2, 4, 8]
    assert scripts["scaling"].slope(sizes, [n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert math.isnan(scripts["scaling"].slope([1], [1.0]))


@pytest.mark.slow
def test_the_command_measures_writes_and_compares(scripts, tmp_path, capsys):
    pytest.importorskip("rich")
    command, q = scripts["command"], scripts["_questions"]
    places = ["--file", str(tmp_path / "r.json"), "--docs", str(tmp_path / "docs")]
    quick = [
        *places,
        "--quick",
        "--repeats",
        "1",
        "--only",
        "unet: gradient,samples: SmoothGrad,completeness: mid",
    ]
    assert command.main([*quick, "--write"]) == 0
    content = q.read(tmp_path / "r.json")
    assert {name: len(q.rows(content, name)) for name in content} == {
        **{"peers": 1, "limit": 1},
        **{"scaling": 1, "accuracy": 1},
    }
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    for name in content:
        assert (tmp_path / "docs" / "images" / f"benchmarks_{name}.png").exists()
        assert f"images/benchmarks_{name}.png" in page
    assert "small networks and few rounds" in page
    capsys.readouterr()
    exact = [*places, "accuracy", "--quick", "--repeats", "1", "--only", "completeness: mid", "--check"]
    assert command.main(exact) == 0
    assert "nothing has moved" in capsys.readouterr().out
    content["accuracy"]["rows"][0]["values"]["last"] *= 2
    q.write(content, tmp_path / "r.json")
    assert command.main(exact) == 1
    assert "accuracy, completeness, midpoint, last" in capsys.readouterr().out
