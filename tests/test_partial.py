"""What a deadline leaves out is NaN, sampling means are of whole samples, and both say which share is done."""

import json
from functools import partial

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta import coalitions, features, plot
from esegeta._registry import METHODS
from esegeta.engine import stream
from esegeta.engine.execution import Execution, partial_share, record_partial
from esegeta.run.config import building, schema
from esegeta.run.config import loading as config
from esegeta.run.config.trust import Trust
from esegeta.run.executors.child import Context
from esegeta.run.jobs import dispatch, marks, methods, outputs
from esegeta.run.jobs import plan as jobs
from esegeta.run.jobs.parts import Entry, Image
from esegeta.run.report import display
from esegeta.run.report import page as report
from esegeta.run.volumes import files as volumes
from esegeta.run.volumes import preprocess


@pytest.fixture
def clock(monkeypatch):
    """A deadline that passes after so many runs of a watched score, whatever the machine."""

    class Clock:
        runs, most = 0, 10**9

        def watch(self, score):
            def watched(z):
                self.runs += 1
                return score(z)

            return watched

    here = Clock()
    monkeypatch.setattr(Execution, "left", lambda self: 1.0 if here.runs < here.most else 0.0)
    return here


def cut(clock, most, explain, *args, **kwargs):
    """An explanation, and the share that was done, if its deadline passes after so many runs."""
    clock.runs, clock.most = 0, most
    evaluation = kwargs.pop("evaluation", "whole")
    with (
        eg.execution(chunk=1, evaluation=evaluation) as run,
        pytest.warns(eg.ExecutionWarning, match="the deadline passed"),
    ):
        a = explain(*args, **kwargs)
    clock.most = 10**9
    return a, partial_share(run.events)


def image(*shape, key=0):
    return eg.random.normal(key, shape, dtype=torch.float64)


def curved(z):
    return (z.cumsum(-1).sin() * z).sum()


@pytest.mark.parametrize(
    ("explain", "total"),
    [
        (partial(eg.occlusion, size=2), 8),
        (partial(eg.occlusion, size=3, stride=1), 14),
        (partial(eg.gaussian_occlusion, size=3, stride=2), 8),
        (partial(eg.feature_ablation, features=features.grid(4)), 4),
        (partial(eg.feature_ablation, features=features.within(features.grid(2), torch.arange(16) > 7)), 4),
    ],
)
@pytest.mark.parametrize("done", [1, 3])
def test_parts_that_were_not_looked_at_are_nan_and_the_others_are_as_without_a_deadline(
    clock, explain, total, done
):
    x = image(1, 16)
    a, share = cut(clock, 1 + done, explain(clock.watch(curved)), x, 0 * x)
    whole = explain(curved)(x, 0 * x)
    assert share == pytest.approx(done / total)
    seen = ~a.isnan()
    assert torch.allclose(a[seen], whole[seen], rtol=1e-12)
    assert int(seen.sum()) < x.numel()
    assert bool(seen.any()) or done < 3


def test_a_network_and_a_plain_score_end_alike(clock):
    net = (
        nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1)).double().eval()
    )
    score = eg.reducers.class_sum(eg.from_module(net), 0)
    x = image(1, 24, 24)
    explain = partial(eg.occlusion, size=6)
    whole = explain(score)(x, 0 * x)
    for evaluation in ("windows", "crops", "whole"):
        looks = iter([1.0] * 5)
        clock_left = lambda self, looks=looks: next(looks, -1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Execution, "left", clock_left)
            with (
                eg.execution(chunk=1, evaluation=evaluation) as run,
                pytest.warns(eg.ExecutionWarning, match="of 16 perturbations, and NaN for the others"),
            ):
                a = explain(score)(x, 0 * x)
        seen = ~a.isnan()
        assert int(seen.sum()) == 5 * 36, evaluation
        assert partial_share(run.events) == pytest.approx(5 / 16)
        assert torch.allclose(a[seen], whole[seen], rtol=1e-9)


@pytest.mark.parametrize("most", [4, 9, 14])
def test_a_mean_over_samples_is_that_of_the_whole_ones(clock, most):
    x, others = image(1, 4), image(3, 1, 4, key=1)
    explain = eg.feature_permutation(clock.watch(curved))
    a, share = cut(clock, most, explain, x, others)
    seen = ~a.isnan()
    if most < 5:  # three of the four parts of the first sample
        assert seen.sum() == 3
        assert share == pytest.approx(3 / 4 / 3)
    n = max(1, most // 5)
    whole = eg.feature_permutation(curved)(x, others[:n])
    assert torch.allclose(a[seen], whole[seen], rtol=1e-12)
    if most >= 5:
        assert bool(seen.all())
        assert share == pytest.approx(n / 3)


def test_shuffled_parts_end_alike(clock):
    x = image(1, 16)
    explain = partial(eg.feature_shuffling, features=features.grid(4), samples=3)
    a, share = cut(clock, 3, explain(clock.watch(curved)), x, key=5)
    assert a.isnan()[0].tolist() == [False] * 8 + [True] * 8
    assert share == pytest.approx(2 / 4 / 3)
    a, share = cut(clock, 8, explain(clock.watch(curved)), x, key=5)
    one = partial(eg.feature_shuffling, features=features.grid(4), samples=1)(curved)(x, key=5)
    assert torch.allclose(a, one)
    assert share == pytest.approx(1 / 3)


def test_transforms_of_a_cut_explanation_keep_whole_samples(clock):
    x, others = image(1, 6), image(4, 1, 6, key=1)
    a, share = cut(clock, 10, eg.over_baselines(eg.occlusion(clock.watch(curved), size=2)), x, others)
    whole = eg.over_baselines(eg.occlusion(curved, size=2))(x, others[:2])
    assert torch.allclose(a, whole)
    assert share == pytest.approx(2 / 4)


def test_fits_do_not_credit_parts_that_were_never_compared(clock):
    x = image(1, 6)
    for explain in (partial(eg.lime, samples=50), partial(eg.hsic_attribution, samples=50)):
        a, _ = cut(clock, 1, explain(clock.watch(curved)), x, 0 * x, key=1)
        assert bool(a.isnan().all())
        a, share = cut(clock, 30, explain(clock.watch(curved)), x, 0 * x, key=1)
        assert bool(a.isfinite().all())
        assert share == pytest.approx(30 / 50)


def test_a_batch_gives_each_example_what_it_was_looked_at(clock):
    xs = image(2, 1, 8)
    explain = eg.occlusion(clock.watch(curved), size=2)
    looks = iter([1.0] * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Execution, "left", lambda self: next(looks, -1.0))
        with pytest.warns(eg.ExecutionWarning), eg.execution(chunk=2) as run:
            a = eg.batched(explain)(xs, 0 * xs)
    assert a.isnan()[:, 0].tolist() == [[False] * 4 + [True] * 4] * 2
    assert partial_share(run.events) == pytest.approx(2 / 4)


def test_answers_are_nan_where_the_deadline_came_first(clock):
    score = clock.watch(lambda t: t.sum())
    clock.most = 2
    with pytest.warns(eg.ExecutionWarning, match="NaN for the others"), eg.execution(chunk=1):
        found = stream.answers(score, torch.arange(4.0), label="demo")
    assert found[:2].tolist() == [0.0, 1.0]
    assert found[2:].isnan().all()


def test_a_window_that_is_missing_hides_nothing_beside_it():
    parts = features.windows((2, 2), stride=(1, 2))(torch.zeros(1, 4, 4))
    values = torch.arange(parts.count).double()
    values[2] = torch.nan  # rows 1 and 2, columns 0 and 1
    got, want = parts.spread(values), parts.spread(torch.nan_to_num(values))
    missing = torch.zeros(4, 4, dtype=torch.bool)
    missing[1:3, :2] = True
    assert torch.equal(got[0].isnan(), missing)
    assert torch.allclose(got[0][~missing], want[0][~missing])


def test_drops_are_nan_not_zero(clock):
    x = image(1, 4)
    parts = features.elements()(x)
    clock.most = 3
    with pytest.warns(eg.ExecutionWarning), eg.execution(chunk=1, evaluation="whole"):
        found = coalitions.drops(clock.watch(curved), x, 0 * x, parts, label="demo")
    assert found.isnan().tolist() == [False, False, True, True]


# -- gaps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "explain",
    [
        lambda score: eg.occlusion(score, size=1, stride=3),
        lambda score: eg.gaussian_occlusion(score, size=4, stride=5),
        lambda score: eg.feature_ablation(score, features=features.windows(2, stride=3)),
        lambda score: eg.feature_ablation(score, features=features.windows(2, stride=3, separate=True)),
        lambda score: eg.lime(score, features=features.windows(1, stride=2)),
        # In single precision exp(-0.5 (0.45 / 0.01)^2) is zero: these boxes do not reach their borders.
        lambda score: eg.gaussian_occlusion(score, size=10, fade=0.01),
    ],
)
def test_boxes_that_leave_gaps_are_refused(explain):
    x = torch.ones(2, 20, 20)
    extra = {"key": 0} if "lime" in explain(lambda z: z.sum()).__name__ else {}
    with pytest.raises(ValueError, match=r"windows: expected boxes that leave no voxel out.* got steps of"):
        explain(lambda z: z.sum())(x, 0 * x, **extra)


@pytest.mark.parametrize(("size", "stride", "length"), [(4, 3, 11), (4, 4, 10), (1, 1, 5), (5, 2, 6)])
def test_boxes_reach_every_voxel(size, stride, length):
    for fade in (None, 0.25):
        parts = features.windows(size, stride=stride, fade=fade)(torch.zeros(1, length))
        assert bool((parts.profiles[1].sum(0) > 0).all())


# -- runs ----------------------------------------------------------------------------------------------------------


def prepared_by(tmp_path, *steps):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(12, 10)).astype(np.float32))
    return preprocess.apply(volumes.read(tmp_path / "x.npy"), list(steps))


def test_holes_come_back_onto_the_grid_of_the_file_as_holes(tmp_path):
    for steps in ([], [{"step": "crop", "box": [[2, 10], [0, 8]]}], [{"step": "resize", "shape": [6, 5]}]):
        prepared = prepared_by(tmp_path, *steps)
        whole = torch.ones_like(prepared.data)
        holes = whole.clone()
        holes[:, :3] = torch.nan
        for keep in ("density", "values", "sum"):
            got, want = prepared.back(holes, keep), prepared.back(whole, keep)
            seen = ~got.isnan()
            assert torch.allclose(got[seen], want[seen])
            assert 0.1 < got.isnan().double().mean() < 0.8


def test_maps_with_holes_are_written_only_where_that_is_meant(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 5), np.float32))
    like = volumes.read(tmp_path / "x.npy")
    map = torch.ones(1, 4, 5)
    map[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="write_map: expected finite values in map"):
        outputs.write_map(map, like, tmp_path / "map.nii.gz")
    outputs.write_map(map, like, tmp_path / "map.nii.gz", holes=True)
    assert np.isnan(nibabel.load(tmp_path / "map.nii.gz").get_fdata()).sum() == 1
    map[0, 1, 1] = torch.inf
    with pytest.raises(ValueError, match="write_map: expected finite values in map"):
        outputs.write_map(map, like, tmp_path / "map.nii.gz", holes=True)


def test_a_small_copy_keeps_holes():
    values = np.ones((200, 8, 8), np.float32)
    values[:50] = np.nan
    copy, _ = display.small(values, np.eye(4))
    assert copy.shape == (128, 8, 8)
    assert abs(np.isnan(copy).mean() - 0.25) < 0.02
    assert np.nanmax(np.abs(copy - 1)) < 1e-6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_worker_takes_holes_of_a_deadline_and_no_others(precision):
    x = torch.ones(1, 4, 4)
    entry = Entry(None, None, schema.Method(name="occlusion"), [], None, None, precision, 0, Trust())
    context = Context("cpu", None, None, {}, lambda **_: None)

    def computed(explain):
        built = building.Built(explain, (), False, frozenset(), None)
        return methods.computed(entry, built, Image(None, None, x), context, lambda: None)

    holes = torch.where(torch.arange(4) < 2, x, torch.nan)

    def cut(fill):
        def explain(_):
            record_partial("occlusion: the deadline passed.", 2, 4)
            return fill

        return explain

    with pytest.warns(eg.ExecutionWarning):
        found, events = computed(cut(holes))
    assert found.isnan().sum() == 8
    assert partial_share(events) == 0.5
    with pytest.warns(eg.ExecutionWarning), pytest.raises(FloatingPointError, match="8 of 16 values"):
        computed(cut(torch.where(torch.arange(4) < 2, x, torch.inf)))
    with (
        pytest.warns(eg.ExecutionWarning),
        pytest.raises(eg.DeadlineExceeded, match="occlusion: the deadline passed before any value"),
    ):
        computed(cut(torch.full_like(x, torch.nan)))
    with pytest.raises(FloatingPointError, match="occlusion: 8 of 16 values of the map are not finite"):
        computed(lambda _: holes)


# -- completeness --------------------------------------------------------------------------------------------------


@pytest.fixture
def explained(tmp_path):
    """The record of one job of a bent network, its sidecar, and the warnings on the way."""
    np.save(tmp_path / "x.npy", np.linspace(0.5, 2, 48).reshape(8, 6).astype(np.float32))
    name = f"bent_{tmp_path.name}"  # a module has one file in a process
    (tmp_path / f"{name}.py").write_text(NETWORK)

    def run(method, source="network"):
        whole = {
            "model": {"source": f"{name}:{source}", "path": str(tmp_path)},
            "input": {"files": str(tmp_path / "x.npy")},
            "targets": [{"name": "all", "reducer": "class_sum", "class": 0}],
            "methods": [method],
            "run": {"output": str(tmp_path / "out")},
            "output": {"report": False, "figures": True},
        }
        job, drawing = jobs.plan(config.load(whole, trust=[str(tmp_path)]))
        said = []
        send = lambda **event: said.append(event.get("message"))
        record = dispatch.main(job.payload, Context("cpu", None, None, {}, send))
        dispatch.main(drawing.payload, Context("cpu", None, None, {}, send))
        sidecar = tmp_path / "out" / record["map"].replace(".nii.gz", ".json")
        return record, json.loads(sidecar.read_text()), [text for text in said if text]

    return run


# A step that a straight path meets between two nodes of a coarse quadrature.
NETWORK = """
import torch


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)

    def forward(self, x):
        return torch.sigmoid(200 * (self.layer(x) - 0.31))


def network():
    return Network()


def normed():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 4, 3), torch.nn.InstanceNorm2d(4), torch.nn.GELU(), torch.nn.Conv2d(4, 1, 1)
    return torch.nn.Sequential(*layers)
"""


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        (
            {"name": "integrated_gradients", "parameters": {"steps": 2}},
            "Take more steps, or adaptive_integrated_gradients",
        ),
        (
            {"name": "conductance", "place": "layer", "parameters": {"steps": 1}},
            "or take a place that is a cut",
        ),
    ],
)
def test_what_misses_completeness_says_so_wherever_it_is_read(explained, method, advice, monkeypatch):
    titles, save = [], plot.save_figures
    monkeypatch.setattr(
        "esegeta.plot.save_figures", lambda *args, **how: titles.append(args[4]) or save(*args, **how)
    )
    record, sidecar, said = explained({**method, "baseline": "zero"})
    assert titles[0].endswith(f" (all) [{marks.marks(record)[0]}]")
    share = abs(record["residual"] / record["difference"])
    assert share > 0.4
    assert record["status"] == "done"
    (event,) = [e for e in record["events"] if e["event"] == "incomplete"]
    assert event["message"].startswith(f"{method['name']} claims completeness, but ")
    assert advice in event["message"]
    assert any(event["message"] in text for text in said), "in the log too"
    assert "completeness" in sidecar["axioms"]
    assert sidecar["missed"] == {"completeness": pytest.approx(share)}
    assert (sidecar["residual"], sidecar["difference"]) == (record["residual"], record["difference"])
    (mark,) = marks.marks(record)
    assert mark.startswith("incomplete: ")
    # One that takes enough is not marked.
    enough = {"name": "adaptive_integrated_gradients", "baseline": "zero"}
    record, sidecar, _ = explained(enough)
    assert abs(record["residual"]) < 0.05 * abs(record["difference"])
    assert sidecar["missed"] is None
    assert marks.marks(record) == []
    assert not [e for e in record["events"] if e["event"] == "incomplete"]


def test_weights_that_are_rounding_are_in_the_record_of_a_run(explained):
    record, sidecar, said = explained({"name": "grad_cam", "place": "0"}, source="normed")
    (event,) = [e for e in sidecar["events"] if e["event"] == "vanishing weights"]
    assert event["instead"] == ["2"]
    assert event in record["events"]
    assert any(event["message"] in text for text in said), "in the log too"
    record, _, _ = explained({"name": "grad_cam", "place": "2"}, source="normed")
    assert [e["event"] for e in record["events"]] == ["layer"]


def test_every_method_that_claims_completeness_is_advised():
    for spec in METHODS.values():
        if "completeness" in spec.axioms:
            event = marks.incomplete(spec, 0.6, -3.0, 5.0, "bfloat16")
            assert event["message"].startswith(f"{spec.name} claims completeness, but 60 % of the difference")
            assert "float32" in event["message"]
            assert event["message"].count(". ") >= 1


def test_marks_stand_in_titles_tables_and_pages(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 5), np.float32))
    base = {"id": "a", "method": "ig", "title": "ig", "subject": "01", "target": "spot", "versions": {}}
    (tmp_path / ".jobs").mkdir()
    several = [
        {**base, "status": "done", "missed": {"completeness": 0.83}},
        {
            **base,
            "id": "b",
            "method": "occlusion",
            "title": "boxes",
            "status": "partial",
            "share_done": 0.0987,
        },
        {
            **base,
            "id": "c",
            "method": "odd",
            "title": "odd",
            "status": "partial",
            "share_done": "<b>",
            "missed": 3,
        },
    ]
    for one in several:
        (tmp_path / ".jobs" / f"{one['id']}.json").write_text(json.dumps(one))
    page = report.page(tmp_path)
    assert page.count("incomplete: 83 % missing") == 2
    assert page.count("partial: 9.9 % done") == 2
    assert "3 of 3 maps made, 2 of them in part" in page
    assert "#failures" not in page
    table = outputs.table_text(several, methods.METHODS.columns)
    assert '"{""completeness"": 0.83}"' in table
