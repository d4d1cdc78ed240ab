"""Several methods by several metrics on several images: one table, honest about what it could not say."""

import csv
import functools
import io
import itertools
import json
import math
import time

import pytest
import torch

import esegeta as eg
from esegeta import metrics, random
from esegeta._registry import METRICS as REGISTERED
from esegeta.engine.sharing import shared
from esegeta.metrics.comparing import holm, interval, turned_signs

W = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.5]], dtype=torch.float64)
METHODS = {
    "right": eg.input_x_gradient,
    "wrong": lambda score: lambda x: -eg.input_x_gradient(score)(x),
    "flat": lambda _: metrics.given(torch.ones_like(W)),
}
METRICS = {"deletion": functools.partial(metrics.deletion, steps=None), "auc": metrics.roc_auc}
XS = torch.rand(7, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
MASKS = torch.tensor([[True, True, False, False, False]] * 7)


def score(x):
    return (W * x).sum()


def compared(**settings):
    return eg.compare(METHODS, score, XS, **{"metrics": METRICS, "masks": MASKS, "key": 3, **settings})


def row(found, method, metric):
    (only,) = [r for r in found.rows if (r.method, r.metric) == (method, metric)]
    return only


def test_a_row_is_the_mean_over_patients_with_its_interval():
    found = compared()
    by_hand = [metrics.deletion(eg.input_x_gradient(score), score, steps=None)(x).area.item() for x in XS]
    right = row(found, "right", "deletion")
    assert right.value == pytest.approx(sum(by_hand) / 7)
    assert right.low < right.value < right.high
    assert min(by_hand) < right.low
    assert right.high < max(by_hand)
    assert right.patients == 7
    assert right.better == "lower"
    assert row(found, "right", "auc").value > 0.9
    assert row(found, "flat", "auc").value == 0.5
    assert len(found.rows) == 6
    assert len(found.cells) == 42


def test_images_of_one_patient_count_once():
    patients = ["a"] * 5 + ["b", "c"]
    found = row(compared(patients=patients), "right", "deletion")
    alone = [c.value for c in compared().cells if (c.method, c.metric) == ("right", "deletion")]
    assert found.value == pytest.approx((sum(alone[:5]) / 5 + alone[5] + alone[6]) / 3)
    assert found.patients == 3


def test_differences_are_paired_and_held_against_turned_signs():
    found = compared()
    (only,) = [
        d for d in found.differences if (d.metric, d.method, d.other) == ("deletion", "right", "wrong")
    ]
    values = {m: [c.value for c in found.cells if (c.method, c.metric) == (m, "deletion")] for m in METHODS}
    pairs = [a - b for a, b in zip(values["right"], values["wrong"], strict=True)]
    assert only.value == pytest.approx(sum(pairs) / 7)
    as_large = [
        abs(sum(s * p for s, p in zip(signs, pairs, strict=True))) >= abs(sum(pairs)) - 1e-12
        for signs in itertools.product([1, -1], repeat=7)
    ]
    assert only.p == pytest.approx(sum(as_large) / 2**7)
    assert only.p <= only.holm <= 1
    assert only.low < only.value < only.high < 0
    ps = [d.p for d in found.differences]
    assert [d.holm for d in found.differences] == pytest.approx(holm(ps))


def test_holm_equals_its_definition():
    ps = [0.04, 0.001, math.nan, 0.02, 0.5]
    real = sorted(p for p in ps if p == p)
    for p, q in zip(ps, holm(ps), strict=True):
        expected = [min(1, (4 - k) * r) for k, r in enumerate(real) if r <= p]
        assert math.isnan(q) if math.isnan(p) else q == pytest.approx(max(expected))


def test_metrics_agree_or_do_not():
    found = compared(metrics={**METRICS, "simple": metrics.entropy})
    assert found.agreement["deletion", "auc"] == pytest.approx(1)
    assert math.isnan(found.agreement["deletion", "simple"])


def test_what_cannot_be_said_is_missing_and_has_its_reason():
    asked = {"auc": metrics.roc_auc, "sensitivity": metrics.sensitivity_max, "iou": metrics.iou}
    found = compared(metrics=asked)
    flat = row(found, "flat", "sensitivity")
    assert math.isnan(flat.value)
    assert "got a finished map" in flat.reason
    assert flat.patients == 0
    assert row(found, "flat", "iou").reason == "the map is constant"
    flat = row(found, "flat", "auc")
    assert (flat.value, flat.reason) == (0.5, "the map is constant")  # a number, but none that says something
    assert row(found, "right", "auc").reason == ""
    for whole, reason in ((False, "the mask is empty"), (True, "the mask is full")):
        filled = torch.full_like(MASKS, whole)
        for only in compared(masks=filled, metrics={"auc": metrics.roc_auc}).rows[:2]:
            assert math.isnan(only.value)
            assert only.reason == reason
    assert "mask at the call, got nothing" in row(compared(masks=None), "right", "auc").reason
    nan = eg.compare(
        {"nan": lambda _: metrics.given(W * torch.nan)}, score, XS, metrics={"simple": metrics.entropy}
    )
    assert math.isnan(nan.rows[0].value)
    assert "finite" in nan.rows[0].reason
    parsed = json.loads(compared(metrics=asked).json())
    assert parsed["rows"][7]["value"] is None
    table = list(csv.DictReader(io.StringIO(found.csv())))
    assert table[7]["value"] == ""
    assert float(table[0]["value"]) == pytest.approx(found.rows[0].value)


OF_A_MAP = [n for n, s in REGISTERED.items() if not {"network", "targets", "explain"} & set(s.needs)]
OF_A_MASK = [n for n in OF_A_MAP if "mask" in REGISTERED[n].needs]
BAD = {
    "a map of another shape": (torch.ones(1, 7, dtype=torch.float64), MASKS, OF_A_MAP, "on the grid of x"),
    "a map with a hole": (W.where(W > 1, torch.nan), MASKS, OF_A_MAP, "finite"),
    "a constant map": (torch.ones_like(W), MASKS, OF_A_MAP, "the map is constant"),
    "an empty mask": (W, torch.zeros_like(MASKS), OF_A_MASK, "the mask is empty"),
    "a full mask": (W, torch.ones_like(MASKS), OF_A_MASK, "the mask is full"),
    "no mask": (W, None, OF_A_MASK, "mask at the call, got nothing"),
}


@pytest.mark.parametrize("what", BAD)
def test_no_metric_has_a_silent_number_of(what):
    a, masks, names, reason = BAD[what]
    assert len(names) >= 10
    methods = {"bad": lambda _: metrics.given(a)}
    found = eg.compare(
        methods, score, XS[:1], masks=None if masks is None else masks[:1], metrics=names, key=0
    )
    for only in found.rows:
        assert reason in only.reason, only
        assert what == "a constant map" or math.isnan(only.value), only
    assert [only.metric for only in found.rows] == names


def test_a_map_is_computed_once_and_its_cost_is_told():
    calls = []

    def method(score):
        def explain(x):
            calls.append(x)
            return eg.input_x_gradient(score)(x)

        return explain

    found = eg.compare({"counted": method}, score, XS, metrics=METRICS, masks=MASKS)
    assert len(calls) == 7
    assert all(c.map_evaluations >= 1 for c in found.cells)
    assert {c.evaluations for c in found.cells if c.metric == "auc"} == {0}
    assert all(c.evaluations >= 6 for c in found.cells if c.metric == "deletion")


def test_methods_share_the_forwards_that_are_the_same_for_all_of_them():
    """Both ends of a curve, random sets and perturbations; not what lies between, nor those of another image."""
    calls = []

    def score(x):
        calls.append(x)
        return (W * x).sum() + x[0, 0] * x[0, 1]

    maps = {f"map {n}": lambda _, n=n: metrics.given(W.roll(n)) for n in range(3)}
    asked = {
        "curve": functools.partial(metrics.deletion, steps=4),
        "sets": functools.partial(metrics.sensitivity_n, samples=6),
        "perturbed": functools.partial(metrics.infidelity, samples=5),
    }
    with eg.execution(chunk=1):
        found = eg.compare(maps, score, XS[:2], metrics=asked)
    together = len(calls)
    first = 5 + (1 + 6) + (1 + 5)
    assert together == 2 * (first + 2 * 3)  # of every further map the three stops between the ends
    assert sum(c.evaluations for c in found.cells) == together
    assert [c.evaluations for c in found.cells if c.image == 1] == [5, 7, 6, 3, 0, 0, 3, 0, 0]
    for name, method in maps.items():
        with eg.execution(chunk=1):
            alone = eg.compare({name: method}, score, XS[:2], metrics=asked)
        values = [c.value for c in found.cells if c.method == name]
        assert values == pytest.approx([c.value for c in alone.cells], rel=1e-12)
    assert len(calls) == together + 3 * 2 * first


def test_what_a_deadline_cut_short_is_not_shared():
    with metrics.sharing():
        for limit, expected in ((0.0, 1), (None, 2), (None, 2)):
            with eg.execution(deadline=limit):
                assert shared("what", (W,), lambda expected=expected: expected) == expected
        assert shared("what", (W,), lambda: 3) == 2


def test_a_random_explanation_is_judged_on_one_draw():
    method = lambda score: eg.smooth(eg.input_x_gradient(score), noise=0.3, samples=2)
    asked = {"one": metrics.entropy, "two": metrics.entropy, "calm": metrics.sensitivity_max}
    found = eg.compare({"smooth": method}, lambda x: (W * x).sum(), XS, metrics=asked, key=5)
    one, two = (row(found, "smooth", m).value for m in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-12)
    assert row(found, "smooth", "calm").value < 0.05
    again = eg.compare({"smooth": method}, lambda x: (W * x).sum(), XS, metrics=asked, key=5)
    assert row(again, "smooth", "one").value == pytest.approx(one, rel=1e-12)


def test_one_image_has_the_interval_of_its_sampling_error():
    asked = {
        "sampled": functools.partial(metrics.infidelity, multiplied=False),
        "exact": metrics.entropy,
    }
    found = eg.compare({"twice": lambda _: metrics.given(2 * W)}, score, XS[:1], metrics=asked)
    sampled, exact = found.rows
    assert sampled.low < sampled.value < sampled.high
    assert math.isnan(exact.low)
    assert not found.differences


def test_each_image_may_have_its_own_score_and_references():
    scores = [lambda x, n=n: (W * x).sum() * (n + 1) for n in range(7)]
    refs = [(torch.full_like(W, float(n)),) for n in range(7)]
    found = eg.compare(
        {"ig": functools.partial(eg.integrated_gradients, steps=2)},
        scores,
        list(XS),
        refs=refs,
        metrics={"deletion": METRICS["deletion"]},
    )
    for n, cell in enumerate(found.cells):
        explain = eg.integrated_gradients(scores[n], steps=2)
        area = metrics.deletion(explain, scores[n], steps=None)(XS[n], *refs[n]).area
        assert cell.value == pytest.approx(area.item())


def test_a_deadline_holds_for_each_method_and_is_told():
    def slow(x):
        time.sleep(0.05)
        return (W * x).sum()

    found = eg.compare({"a": eg.gradient, "b": eg.gradient}, slow, XS, metrics=METRICS, deadline=0.3)
    for method in "ab":
        last = row(found, method, "deletion")
        assert "deadline" in last.reason
        assert last.patients < 7


def test_an_error_of_torch_is_a_reason_and_leaves_the_others_their_numbers():
    drawn = {"torch": lambda _: lambda x: x + torch.rand_like(x), "slope": eg.gradient}
    asked = {"calm": functools.partial(metrics.sensitivity_max, samples=2)}
    found = eg.compare(drawn, score, XS[:1], metrics=asked)
    assert row(found, "torch", "calm").reason.startswith("RuntimeError: vmap: called random operation")
    assert row(found, "slope", "calm").value == 0


def test_what_is_called_wrongly_is_refused_at_once():
    with pytest.raises(TypeError, match="compare: expected methods by name"):
        eg.compare(eg.gradient, score, XS, metrics=METRICS)
    with pytest.raises(ValueError, match=r"the name of a method, got 'gradeint'. Nearest: gradient"):
        eg.compare(["gradeint"], score, XS, metrics=METRICS)
    with pytest.raises(ValueError, match=r"the name of a metric, got 'deletoin'. Nearest: deletion"):
        eg.compare(METHODS, score, XS, metrics=["deletoin"])
    with pytest.raises(ValueError, match="metrics with different names, got 'deletion' twice"):
        eg.compare(METHODS, score, XS, metrics=["deletion", METRICS["deletion"]])
    with pytest.raises(TypeError, match="compare: expected metrics by name"):
        eg.compare(METHODS, score, XS, metrics={})
    with pytest.raises(ValueError, match="masks for each of the 7 images, got 2"):
        eg.compare(METHODS, score, XS, metrics=METRICS, masks=MASKS[:2])
    with pytest.raises(ValueError, match="at least one image"):
        eg.compare(METHODS, score, [], metrics=METRICS)


def test_the_tables_can_be_read(capsys):
    found = compared()
    found.show()
    rows, differences, agreement = capsys.readouterr().out.rstrip("\n").split("\n\n")
    assert rows == str(found)
    lines = rows.splitlines()
    assert lines[0].split()[:3] == ["method", "metric", "value"]
    assert len(lines) == 7
    assert differences.splitlines()[0].split()[:4] == ["metric", "method", "less", "difference"]
    assert len(differences.splitlines()) == 1 + len(found.differences)
    assert agreement.splitlines()[1].split() == ["deletion", "auc", "1"]
    for table, count in (("rows", 6), ("differences", 6), ("cells", 42)):
        assert len(list(csv.DictReader(io.StringIO(found.csv(table))))) == count
    with pytest.raises(ValueError, match="table"):
        found.csv("all")


def test_lists_are_named_by_what_is_in_them_and_random_maps_stand_beside():
    judged = metrics.calibrated(metrics.roc_auc, null=metrics.shifted, draws=19)
    curve = metrics.calibrated(METRICS["deletion"], null=metrics.shifted, draws=9)
    asked = {"auc": judged, "deletion": curve, "plain": metrics.roc_auc}
    found = eg.compare(
        ["input_x_gradient", eg.gradient], score, XS[:2], masks=MASKS[:2], metrics=asked, key=1
    )
    one = row(found, "input_x_gradient", "auc")
    assert (one.better, one.reason) == ("higher", "")
    assert one.value == row(found, "input_x_gradient", "plain").value
    assert one.null_mean < one.value
    assert math.isnan(row(found, "gradient", "plain").null_mean)
    assert row(found, "gradient", "deletion").null_mean > row(found, "gradient", "deletion").value
    cells = [c for c in found.cells if c.metric == "auc"]
    assert all(0.05 <= c.p <= 1 for c in cells)
    assert "random" in str(found).splitlines()[0]
    named = eg.compare([eg.gradient], score, XS[:1], metrics=["entropy", metrics.gini])
    assert [r.metric for r in named.rows] == ["entropy", "gini"]


def test_contributions_and_slopes_are_told_apart_by_what_methods_declare():
    score = lambda x: (W * x).sum().sin()
    path = functools.partial(eg.integrated_gradients, steps=3)
    refs = (torch.zeros_like(W),)
    methods = {"path": path, "slopes": eg.gradient, "own": lambda s: eg.gradient(s)}
    found = eg.compare(methods, score, XS[:1], refs=refs, metrics=["infidelity"], key=4)
    key = random.fold_in(random.fold_in(4, 0), 1)
    for name, multiplied in (("path", True), ("slopes", False)):
        a = methods[name](score)(XS[0], *(refs if multiplied else ()))
        direct = metrics.infidelity(metrics.given(a, multiplied=multiplied), score)(XS[0], *refs, key=key)
        assert row(found, name, "infidelity").value == pytest.approx(direct.item())
    assert "multiplied=True for contributions" in row(found, "own", "infidelity").reason


def test_methods_with_and_without_a_baseline_share_the_refs():
    score = lambda x: (x**2).sum()
    xs = torch.arange(12.0).reshape(3, 1, 4) + 1
    methods = {"gradient": eg.gradient, "path": lambda s: eg.integrated_gradients(s, steps=4)}
    table = eg.compare(
        methods, score, xs, refs=(torch.zeros(1, 4),), metrics={"deletion": eg.metrics.deletion}
    )
    assert [(row.patients, row.reason) for row in table.rows] == [(3, ""), (3, "")]
    alone = eg.metrics.deletion(eg.gradient(score), score)(xs[0], torch.zeros(1, 4))
    assert alone.area == eg.metrics.deletion(eg.gradient(score), score)(xs[0]).area


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_makes_no_difference_significant(bad):
    values = torch.tensor([bad, bad, 1.0, 2.0], dtype=torch.float64)
    assert math.isnan(turned_signs(values, 0))
    assert all(math.isnan(bound) for bound in interval(values, 0)[1:])
