"""Metrics in a run: the maps that are there are judged, honestly, and nothing is computed twice."""

import csv
import json
import math
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import esegeta as eg
from esegeta import metrics, random, zoo
from esegeta._registry import METRICS
from esegeta.cli import main
from esegeta.engine import check
from esegeta.run import comparison, pipeline
from esegeta.run.config import loading as config
from esegeta.run.executors.child import Context
from esegeta.run.jobs import dispatch
from esegeta.run.jobs import metrics as kind
from esegeta.run.jobs import plan as jobs
from esegeta.run.jobs.plan import tables_of

SHAPE = (8, 8, 8)
METHODS = [
    {"name": "gradient"},
    {"name": "integrated_gradients", "id": "ig", "baseline": "zero", "parameters": {"steps": 2}},
    {"name": "grad_cam", "place": "bottom.relu"},
]


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    monkeypatch.setenv("ESEGETA_TRUST", f"esegeta.zoo,{Path(__file__).parent}")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def scan(path, seed=7, values=None):
    values = np.random.default_rng(seed).standard_normal(SHAPE) if values is None else values
    nibabel.Nifti1Image(values.astype(np.float32), np.diag([2.0, 1.5, 1.0, 1.0])).to_filename(path)
    return path


def tables(folder, asked, *, methods=METHODS[:1], **more):
    return {
        "model": {"source": "zoo:small_unet", "arguments": {"ndim": 3}},
        "input": {"files": str(folder / "sub-*_T1w.nii.gz")},
        "targets": [{"name": "spot", "class": 1}],
        "methods": methods,
        "metrics": asked,
        "run": {"output": str(folder / "out")},
        "output": {"figures": False, "report": False, "nifti": False},
        **more,
    }


def context(seconds=None):
    return Context("cpu", seconds, None, {}, lambda **event: None)


def done_here(whole, *, seconds=None):
    """Do all jobs in this process; records by id, and what was refused."""
    loaded, found, refused = config.load(whole), {}, {}
    for job in jobs.plan(loaded):
        try:
            limits = context(seconds if job.kind == "metrics" else None)
            found[job.id] = dispatch.main(json.loads(json.dumps(dispatch.payload_of(job, loaded))), limits)
        except check.Refused as error:
            refused[job.id] = str(error)
    return found, refused


def by_hand(folder):
    """The network, the image and the score of the first subject."""
    model = eg.from_module(zoo.small_unet(3))
    x = torch.from_numpy(nibabel.load(folder / "sub-1_T1w.nii.gz").get_fdata()).float()[None]
    return model, x, eg.reducers.predicted_class_sum(model, 1, at=x)


def raw(folder, job):
    return torch.from_numpy(np.load(folder / "out" / jobs.raw_path(job)))


def drawn(name, last=True):
    """The key of the draws of a metric."""
    word = random.fold_in(0, zlib.crc32(name.encode()))
    return random.fold_in(word, 1) if last else word


# ------------------------------------------------------------------ numbers


def test_numbers_are_those_of_the_metrics_on_the_maps_that_are_there(tmp_path):
    scan(tmp_path / "sub-1_T1w.nii.gz")
    asked = [
        {"metric": "deletion", "parameters": {"steps": 4}},
        {
            "metric": "insertion",
            "id": "blocks",
            "parameters": {"features": {"name": "grid", "size": 4}, "fill": "mixed", "steps": None},
            "baseline": {"name": "constant", "value": 1.0},
        },
        {"metric": "roc_auc", "mask": "prediction", "null": "shifted", "draws": 9},
        {"metric": "infidelity", "parameters": {"samples": 4}},
        {"metric": "sensitivity_max", "parameters": {"samples": 2}, "methods": ["ig"]},
        {"metric": "cascade", "methods": ["gradient"], "targets": ["spot"]},
        {"metric": "random_logit", "methods": ["gradient"]},
    ]
    asked[1]["parameters"].pop("steps")
    found, refused = done_here(tables(tmp_path, asked, methods=METHODS))
    model, x, score = by_hand(tmp_path)
    mask = eg.reducers.predicted_mask(model(x), 1)
    for method, id in (("gradient", "gradient"), ("ig", "ig")):
        a = raw(tmp_path, f"sub-1_spot_{id}")
        given = metrics.given(a, multiplied=method == "ig")
        record = found[f"sub-1_spot_{id}_deletion"]
        curve = metrics.deletion(given, score, steps=4)(x)
        assert record["value"] == pytest.approx(curve.area.item(), rel=1e-5)
        assert (record["status"], record["reason"], record["evaluations"]) == ("done", None, 5)
        assert (record["better"], record["standard_error"]) == ("lower", None)
        told = json.loads((tmp_path / "out" / record["curve"]).read_text())
        assert told["values"] == pytest.approx(curve.values.tolist(), rel=1e-5)
        assert told["fractions"] == pytest.approx(curve.fractions.tolist())
        blocks = metrics.insertion(given, score, features=eg.features.grid(4))(x, torch.ones_like(x))
        assert found[f"sub-1_spot_{id}_blocks"]["value"] == pytest.approx(blocks.area.item(), rel=1e-4)
        auc = found[f"sub-1_spot_{id}_rocAuc"]
        assert auc["value"] == pytest.approx(metrics.roc_auc(given)(x, mask=mask).item())
        assert auc["null_low"] <= auc["null_mean"] <= auc["null_high"]
        judged = metrics.calibrated(metrics.roc_auc, null=metrics.shifted, draws=9)(given)
        beside = judged(x, mask=mask, key=drawn("roc_auc", last=False))
        assert [auc[k] for k in ("value", *kind.NULL)] == pytest.approx([v.item() for v in beside])
        assert (auc["null_draws"], auc["evaluations"]) == (9, 0)
        unsure = found[f"sub-1_spot_{id}_infidelity"]
        squares = metrics.infidelity(given, score, samples=4)(x, 0 * x, key=drawn("infidelity"))
        assert unsure["value"] == pytest.approx(squares.item(), rel=1e-4)
        assert unsure["standard_error"] > 0
    # What needs other explanations has them built again, with the same settings.
    explain = lambda y: eg.integrated_gradients(score, steps=2)(y, 0 * y)
    calm = metrics.sensitivity_max(explain, samples=2)(x, key=drawn("sensitivity_max"))
    assert found["sub-1_spot_ig_sensitivityMax"]["value"] == pytest.approx(calm.item(), rel=1e-4)
    assert found["sub-1_spot_ig_sensitivityMax"]["evaluations"] == 6
    assert "sub-1_spot_gradient_sensitivityMax" not in found
    # The mask is that of the network as it is, whatever its weights become.
    steps = metrics.cascade(lambda m: eg.gradient(eg.reducers.region(m, 1, mask)), zoo.small_unet(3))
    cascade = found["sub-1_spot_gradient_cascade"]
    assert cascade["value"] == pytest.approx(steps(x, key=drawn("cascade")).area.item(), abs=1e-4)
    assert json.loads((tmp_path / "out" / cascade["curve"]).read_text())["layers"][0] == "out"
    # A class activation map is neither in units of the score nor slopes.
    assert "got neither" in refused.pop("sub-1_spot_grad_cam_infidelity".replace("grad_cam", "gradCam"))
    assert refused == {}
    rows = list(
        csv.DictReader((tmp_path / "out" / "metrics" / "spot_deletion_curves.csv").read_text().splitlines())
    )
    assert {row["method"] for row in rows} == {"gradient", "ig", "grad_cam"}
    assert len(rows) == 15


def test_random_maps_share_forwards_with_the_map_and_maps_do_not_with_each_other(tmp_path):
    """Sets of parts are drawn once for a map and its random maps, and so are both ends of a curve."""
    scan(tmp_path / "sub-1_T1w.nii.gz")
    beside = {"null": "shifted", "draws": 3}
    parameters = {"n": 9, "samples": 4}
    asked = [
        {"metric": "sensitivity_n", "id": "alone", "parameters": parameters},
        {"metric": "sensitivity_n", "id": "beside", "parameters": parameters, **beside},
        {"metric": "deletion", "id": "curves", "parameters": {"steps": 4}, **beside},
    ]
    found, refused = done_here(tables(tmp_path, asked, methods=METHODS[:2]))
    assert not refused
    runs = {
        (record["method"], record["metric"]): record["evaluations"]
        for record in found.values()
        if record["kind"] == "metrics"
    }
    for method in ("gradient", "ig"):
        assert runs[method, "alone"] == runs[method, "beside"] == 1 + 4
        assert (
            runs[method, "curves"] == 2 + 4 * 3
        )  # the whole image, none of it, and three stops of four curves
    values = {record["value"] for record in found.values() if record.get("metric") in ("alone", "beside")}
    assert len(values) == 2  # of each map the same with and without random maps


def test_what_cannot_be_said_has_its_reason(tmp_path):
    for number, values in ((1, None), (2, np.zeros(SHAPE)), (3, None)):
        scan(tmp_path / f"sub-{number}_T1w.nii.gz", seed=number, values=values)
    mask = np.zeros(SHAPE)
    for number, put in ((1, 0), (3, 1)):  # empty, and there; none of sub-2
        mask[2:4, 2:4, 2:4] = put
        scan(tmp_path / f"sub-{number}_mask.nii.gz", values=mask)
    asked = [
        {"metric": "roc_auc", "mask": str(tmp_path / "{subject}_mask.nii.gz")},
        {"metric": "entropy"},
        {"metric": "iou", "mask": "prediction"},
    ]
    methods = [{"name": "input_x_gradient"}, {"name": "gradient"}]
    found, refused = done_here(tables(tmp_path, asked, methods=methods))
    empty = found["sub-1_spot_gradient_rocAuc"]
    assert (empty["value"], empty["status"], empty["reason"]) == (None, "done", "the mask is empty")
    expected = "expected a mask among {subject}_mask.nii.gz, got none for sub-2. Add one, or rename it."
    assert refused["sub-2_spot_gradient_rocAuc"] == f"sub-2_spot_gradient_rocAuc: {expected}"
    assert 0 <= found["sub-3_spot_gradient_rocAuc"]["value"] <= 1
    zero = found["sub-2_spot_input_x_gradient_entropy".replace("input_x_gradient", "inputXGradient")]
    assert (zero["value"], zero["reason"]) == (None, "the map is zero everywhere")
    mean = found["mean_spot_gradient_rocAuc"]
    assert (mean["status"], mean["subjects"], mean["subjects_asked"]) == ("partial", 1, 3)
    message = (
        "The mean is of 1 of 3 subjects; without sub-1_spot_gradient_rocAuc: no number, sub-2_spot_gradient"
    )
    assert mean["events"][0]["message"].startswith(message)
    assert found["mean_spot_gradient_entropy"]["low"] <= found["mean_spot_gradient_entropy"]["value"]
    # A map with holes, as a deadline leaves it.
    whole = tables(tmp_path, [*asked, {"metric": "deletion"}], methods=methods)
    loaded = config.load(whole)
    (job,) = [j for j in jobs.plan(loaded) if j.id == "sub-1_spot_gradient_deletion"]
    holes = raw(tmp_path, "sub-1_spot_gradient")
    holes[0, 0, 0, 0] = torch.nan
    np.save(tmp_path / "out" / jobs.raw_path("sub-1_spot_gradient"), holes.numpy())
    with pytest.raises(check.Refused, match=r"a map without holes, got NaN in 1 of 512 voxels"):
        dispatch.main(dispatch.payload_of(job, loaded), context())


def test_networks_without_weights_or_classes_are_refused(tmp_path):
    scan(tmp_path / "sub-1_T1w.nii.gz")
    asked = [{"metric": name} for name in ("cascade", "entropy_change", "random_logit")]
    model = {"source": "pipeline_network:weightless"}
    target = [{"name": "spot", "reducer": "class_sum", "class": 0, "parameters": {"exclusive": False}}]
    _, refused = done_here(tables(tmp_path, asked, model=model, targets=target))
    for metric in ("cascade", "entropyChange"):
        assert "expected a network with parameters, got none" in refused[f"sub-1_spot_gradient_{metric}"]
    assert "expected two classes, got 1. One class has no other" in refused["sub-1_spot_gradient_randomLogit"]
    patched = [{"name": "gradient", "patches": "per_patch"}]
    _, refused = done_here(tables(tmp_path, [{"metric": "deletion"}], methods=patched, patches={"size": 8}))
    assert "expected a map of one score" in refused["sub-1_spot_gradient_deletion"]


def referenced(folder, numbers):
    """Label maps beside scans, for some of the subjects, with their axes in another order."""
    truths = {}
    for number in numbers:
        truth = np.random.default_rng(100 + number).integers(0, 3, SHAPE)
        turned = np.diag([2.0, 1.5, 1.0, 1.0])[:, [2, 1, 0, 3]]
        file = folder / f"sub-{number}_dseg.nii.gz"
        nibabel.Nifti1Image(truth.transpose(2, 1, 0).astype(np.uint8), turned).to_filename(file)
        truths[number] = torch.from_numpy(truth)
    return truths, {"files": str(folder / "sub-*_dseg.nii.gz"), "grid": "nearest"}


HELD_AGAINST = [
    {"metric": "roc_auc", "mask": "reference"},
    {"metric": "pointing_game", "mask": "reference"},
    {"metric": "relevance_mass", "id": "beside", "mask": "reference", "within": "prediction"},
    {"metric": "deletion", "parameters": {"steps": 3}, "within": "reference"},
]


def test_maps_are_held_against_references(tmp_path):
    scan(tmp_path / "sub-1_T1w.nii.gz", seed=1)
    scan(tmp_path / "sub-2_T1w.nii.gz", seed=2)
    truths, table = referenced(tmp_path, [1])
    found, refused = done_here(tables(tmp_path, HELD_AGAINST, reference=table))
    model, x, score = by_hand(tmp_path)
    given, mask = metrics.given(raw(tmp_path, "sub-1_spot_gradient"), multiplied=False), truths[1] == 1
    predicted = eg.reducers.predicted_mask(model(x), 1)
    direct = {
        "rocAuc": metrics.roc_auc(given)(x, mask=mask),
        "pointingGame": metrics.pointing_game(given)(x, mask=mask),
        "beside": metrics.relevance_mass(given)(x, mask=mask, within=predicted),
        "deletion": metrics.deletion(given, score, steps=3)(x, within=mask).area,
    }
    for name, value in direct.items():
        assert found[f"sub-1_spot_gradient_{name}"]["value"] == pytest.approx(value.item(), rel=1e-5), name
        reason = "a reference to hold the map against, got none for sub-2. Add one to [reference]"
        assert reason in refused[f"sub-2_spot_gradient_{name}"]


def test_a_figure_of_curves_says_what_they_are_and_how_large(tmp_path, monkeypatch):
    drawn, known = [], eg.plot.curve
    monkeypatch.setattr(eg.plot, "curve", lambda *a, **k: drawn.append(known(*a, **k)) or drawn[-1])
    whole = {"fractions": [0.0, 1.0], "values": [4.0, 0.0], "area": 2.0}
    cut = {"fractions": [0.0, 1.0], "values": [4.0, math.nan], "area": math.nan}
    beside = {**whole, "null_low": [4.0, 0.0], "null_high": [4.0, 2.0]}
    axes = METRICS["fidelity"].axes
    assert kind.draw({"a": [whole], "b": [cut], "c": [beside]}, tmp_path / "a.png", "title", axes) is None
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = drawn[0].axes
    assert [line.get_label() for line in axis.lines] == ["a (area 2)", "b (no area)", "c (area 2)"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == axes
    assert axes[1] == "share of the score that is lost"
    assert METRICS["cascade"].axes[0] == "layers that are random, from the output down"
    assert drawn[0].get_supxlabel() == "Shaded: where 95 % of the curves of random maps lie."
    assert len(axis.collections) == 1


def test_what_a_deadline_leaves_is_said(tmp_path):
    scan(tmp_path / "sub-1_T1w.nii.gz")
    asked = [{"metric": "infidelity", "parameters": {"samples": 2000000}}]
    found, _ = done_here(tables(tmp_path, asked), seconds=0.7)
    cut = found["sub-1_spot_gradient_infidelity"]
    assert cut["status"] == "partial"
    assert cut["reason"].endswith("% of its samples: the deadline passed")
    assert cut["value"] > 0
    with pytest.raises(TimeoutError, match="the deadline"):
        done_here(tables(tmp_path, [{"metric": "deletion"}]), seconds=0.0)
    null = [{"metric": "deletion", "parameters": {"steps": 2}, "null": "shifted", "draws": 100000}]
    found, _ = done_here(tables(tmp_path, null), seconds=0.7)
    some = found["sub-1_spot_gradient_deletion"]
    assert 0 < some["null_draws"] < 100000
    assert some["reason"] == f"beside {some['null_draws']} of 100000 random maps that have a number"
    assert some["p"] >= 1 / (1 + some["null_draws"])


# ------------------------------------------------------------------ the table of a configuration

WRONG = [
    ({"metric": "deletoin"}, "metrics[0].metric: expected a metric, got 'deletoin'. Nearest: deletion"),
    ({}, "metrics[0].metric: expected a text, got nothing"),
    ({"metric": "deletion", "step": 3}, "metrics[0].step: expected a key of metrics[0], got 'step'"),
    (
        {"metric": "deletion", "parameters": {"step": 3}},
        "metrics[0].parameters.step: expected a parameter of",
    ),
    ({"metric": "deletion", "parameters": {"steps": 0}}, "metrics[0].parameters: expected steps"),
    ({"metric": "deletion", "parameters": {"steps": "all"}}, "metrics[0].parameters.steps: expected a whole"),
    ({"metric": "deletion", "parameters": {"features": "gird"}}, "metrics[0].parameters.features: expected"),
    ({"metric": "deletion", "mask": "prediction"}, "metrics[0].mask: expected none for deletion"),
    ({"metric": "roc_auc"}, 'metrics[0].mask: expected "prediction", "reference" or a pattern of files, got'),
    (
        {"metric": "roc_auc", "mask": "reference"},
        "metrics[0].mask: expected label maps in [reference], got no",
    ),
    ({"metric": "roc_auc", "mask": " "}, "metrics[0].mask: expected the name of a mask"),
    (
        {"metric": "entropy", "methods": ["grad"]},
        "metrics[0].methods: expected the id of a method of this file",
    ),
    (
        {"metric": "entropy", "methods": []},
        "metrics[0].methods: expected at least one of the methods, got none",
    ),
    (
        {"metric": "entropy", "targets": ["spo"]},
        "metrics[0].targets: expected the name of a target of this file",
    ),
    (
        {"metric": "deletion", "null": "surogate"},
        "metrics[0].null: expected a null model, got 'surogate'. Near",
    ),
    (
        {"metric": "entropy", "null": "surrogate"},
        'metrics[0].better: expected "higher" or "lower", got nothing',
    ),
    ({"metric": "cascade", "null": "surrogate"}, "metrics[0].null: expected none for cascade"),
    ({"metric": "deletion", "draws": 9}, "metrics[0].draws: expected nothing without null, got 9"),
    ({"metric": "deletion", "null": "shifted", "draws": 0}, "metrics[0].draws: expected a whole number >= 1"),
    ({"metric": "deletion", "deadline": -1}, "metrics[0].deadline: expected seconds > 0, got -1"),
    (
        {"metric": "deletion", "baseline": "zeor"},
        "metrics[0].baseline: expected a baseline, got 'zeor'. Nearest",
    ),
    (
        {"metric": "roc_auc", "mask": "prediction", "baseline": "zero"},
        "metrics[0].baseline: expected none for roc",
    ),
    (
        {"metric": "sensitivity_max", "within": "prediction"},
        "metrics[0].within: expected none for sensitivity_max",
    ),
    (
        {"metric": "deletion", "id": "sum"},
        "metrics[0].id: expected a name of its own, got 'sum'. The table of",
    ),
    ({"metric": "deletion", "id": "a/b"}, "metrics[0].id: expected letters, digits"),
    ({"metric": "deletion", "memory": "much"}, "metrics[0].memory: expected"),
]


@pytest.mark.parametrize(("entry", "line"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_with_an_entry_is_said_before_anything_runs(tmp_path, entry, line):
    scan(tmp_path / "sub-1_T1w.nii.gz")
    problems = config.problems(tables(tmp_path, [entry]))
    assert len(problems) == 1
    assert problems[0].startswith(line)


def test_an_entry_is_read_as_it_is_written(tmp_path):
    scan(tmp_path / "sub-1_T1w.nii.gz")
    twice = config.problems(tables(tmp_path, [{"metric": "entropy"}, {"metric": "entropy"}]))
    assert twice == [
        "metrics[1].id: expected a different id, got 'entropy' again, as in metrics[0]. Choose another id."
    ]
    assert config.problems(tables(tmp_path, {"metric": "entropy"})) == [
        "metrics: expected at least one table [[metrics]], got {'metric': 'entropy'}. Add one."
    ]
    path = tmp_path / "study.json"
    path.write_text(json.dumps(tables(tmp_path, [{"metric": "roc_auc", "mask": "m/*.nii"}])))
    loaded = config.load(path)
    (entry,) = tables_of(loaded, kind.TABLE, kind.Metric)
    assert entry.mask == str(tmp_path / "m" / "*.nii")
    assert config.load(config.dump(loaded)).more == loaded.more
    assert list(kind.settings(METRICS["random_logit"])) == ["other", "similarity"]


def test_a_plan_tells_what_metrics_cost(tmp_path):
    scan(tmp_path / "sub-1_T1w.nii.gz")
    asked = [
        {"metric": "deletion", "parameters": {"steps": 8}, "null": "shifted", "draws": 9},
        {"metric": "entropy"},
        {"metric": "sensitivity_max", "parameters": {"samples": 3}},
        {"metric": "irof"},
        {"metric": "mu_fidelity", "parameters": {"samples": 5}, "null": "shifted", "draws": 9},
    ]
    planned = jobs.plan(config.load(tables(tmp_path, asked, methods=METHODS[1:2])))
    told = {job.keys["metric"]: kind.cost(job.payload) for job in planned if job.kind == "metrics"}
    assert told == {
        "deletion": (90, "values"),
        "entropy": (0, "values"),
        "sensitivity_max": (8, "gradients"),
        "irof": (None, "values"),
        "mu_fidelity": (6, "values"),
    }


def test_a_digest_holds_what_decides(tmp_path):
    scan(tmp_path / "sub-1_T1w.nii.gz")
    place = tmp_path / "sub-1_mask.nii.gz"
    scan(place, values=np.ones(SHAPE))

    def digest(run=None, **entry):
        whole = tables(tmp_path, [{"metric": "roc_auc", "mask": str(place), **entry}])
        whole["run"] = run or whole["run"]
        return next(job for job in jobs.plan(config.load(whole)) if job.kind == "metrics").digest

    before = digest()
    assert digest(title="Area", deadline=3.0, id="auc") == before
    others = [digest(null="shifted"), digest(mask="prediction"), digest(within="prediction")]
    assert len({before, *others}) == 4
    assert digest(run={"output": str(tmp_path / "out"), "baseline": "mean"}) == before
    scan(place, values=np.zeros(SHAPE))
    assert digest() != before


# ------------------------------------------------------------------ a whole run


@pytest.mark.slow
def test_a_run_has_tables_curves_and_a_report_and_computes_no_map_again(tmp_path):
    for number in (1, 2):
        scan(tmp_path / f"sub-{number}_T1w.nii.gz", seed=number)
    asked = [
        {"metric": "deletion", "parameters": {"steps": 4}, "null": "shifted", "draws": 4},
        {"metric": "roc_auc", "mask": "prediction"},
    ]
    look = {"output": {"figures": True, "report": True}, "figures": {"maps": 0}}
    whole = tables(tmp_path, asked, **look)

    def run():
        return pipeline.run(config.load(whole), progress=False, threads=1)

    first = run()
    folder = tmp_path / "out"
    assert (first.exit_code, first.counts) == (0, {"done": 9})
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [(r["subject"], r["metric"], r["status"]) for r in rows] == [
        (f"sub-{n}", metric, "done") for n in (1, 2) for metric in ("deletion", "roc_auc")
    ]
    assert all(float(r["null_low"]) <= float(r["null_high"]) for r in rows if r["metric"] == "deletion")
    means = list(csv.DictReader((folder / "metrics_mean.csv").read_text().splitlines()))
    values = [float(r["value"]) for r in rows if r["metric"] == "deletion"]
    assert float(means[0]["value"]) == pytest.approx(np.mean(values))
    assert float(means[0]["low"]) == pytest.approx(min(values))
    summary = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert [float(r["deletion"]) for r in summary] == values
    assert (folder / "metrics" / "spot_deletion_curves.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    for words in ("Metrics, one by one", "Metrics, mean over subjects", "Curves", "deletion", "roc auc"):
        assert words in page
    assert page.count('alt="curves of') == 1
    # Another metric, and one less: no map is computed again.
    map = np.load(folder / jobs.raw_path("sub-1_spot_gradient"))
    np.save(folder / jobs.raw_path("sub-1_spot_gradient"), -map)  # would be another one
    whole["metrics"] = [asked[1], {"metric": "entropy"}]
    second = run()
    assert second.exit_code == 0
    assert {r["metric"] for r in csv.DictReader((folder / "metrics.csv").read_text().splitlines())} == {
        "roc_auc",
        "entropy",
    }
    assert (np.load(folder / jobs.raw_path("sub-1_spot_gradient")) == -map).all()
    assert second.repeated == 3  # two numbers and their mean
    assert not (folder / "metrics" / "spot_deletion_curves.png").exists()


@pytest.mark.slow
def test_a_run_holds_maps_against_references_and_says_where_there_are_none(tmp_path):
    for number in (1, 2):
        scan(tmp_path / f"sub-{number}_T1w.nii.gz", seed=number)
    truths, table = referenced(tmp_path, [1])
    whole = tables(tmp_path, HELD_AGAINST[:1], reference=table)
    whole["output"]["report"] = True
    assert pipeline.run(config.load(whole), progress=False, threads=1).exit_code != 0
    one, two = csv.DictReader((tmp_path / "out" / "metrics.csv").read_text().splitlines())
    x = by_hand(tmp_path)[1]
    direct = metrics.roc_auc(metrics.given(raw(tmp_path, "sub-1_spot_gradient")))(x, mask=truths[1] == 1)
    assert float(one["value"]) == pytest.approx(direct.item(), rel=1e-5)
    assert (two["value"], two["status"]) == ("", "refused")
    reason = "expected a reference to hold the map against, got none for sub-2. Add one to [reference]."
    assert two["reason"] == reason
    page = (tmp_path / "out" / "report.html").read_text()
    assert f'<td class="number" data-value="{float(one["value"])}">' in page
    assert f'<td class="long">{reason}</td>' in page
    assert page.index('<th scope="col">Value</th><th scope="col">Reason</th>') > 0


@pytest.mark.slow
def test_the_number_of_workers_changes_no_number(tmp_path):
    for number in (1, 2, 3):
        scan(tmp_path / f"sub-{number}_T1w.nii.gz", seed=number)
    asked = [
        {"metric": "infidelity", "parameters": {"samples": 3}},
        {
            "metric": "deletion",
            "parameters": {"steps": 3},
            "null": {"name": "surrogate", "steps": 2},
            "draws": 3,
        },
        {"metric": "sensitivity_mean", "parameters": {"samples": 2}},
        {"metric": "entropy_change"},
    ]
    found = []
    for workers in (1, 2):
        where = {"output": str(tmp_path / f"with_{workers}"), "workers": workers}
        whole = tables(tmp_path, asked, methods=METHODS[:2], run=where)
        assert pipeline.run(config.load(whole), progress=False, threads=1).exit_code == 0
        rows = csv.DictReader((tmp_path / f"with_{workers}" / "metrics.csv").read_text().splitlines())
        found.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    assert found[0] == found[1]
    assert len(found[0]) == 24


# ------------------------------------------------------------------ two runs


def test_two_runs_are_put_beside_each_other(tmp_path, capsys):
    for number in range(1, 5):
        scan(tmp_path / f"sub-{number}_T1w.nii.gz", seed=number)
    asked = [{"metric": "deletion", "parameters": {"steps": 4}}, {"metric": "gini"}, {"metric": "entropy"}]
    a = tables(tmp_path, asked, methods=METHODS[:2], run={"output": str(tmp_path / "a")})
    b = tables(tmp_path, asked, methods=METHODS[:2], run={"output": str(tmp_path / "b")})
    b["model"] = {"source": "zoo:small_unet", "arguments": {"ndim": 3, "key": 3}}
    b["metrics"] = [asked[0], asked[1], {"metric": "entropy", "methods": ["ig"]}]
    one, _ = done_here(a)
    two, _ = done_here(b)
    found = comparison.compare(tmp_path / "a", tmp_path / "b")
    (change,) = [c for c in found.changes if (c.method, c.metric) == ("ig", "deletion")]
    pairs = [two[i]["value"] - one[i]["value"] for i in (f"sub-{n}_spot_ig_deletion" for n in range(1, 5))]
    assert change.difference == pytest.approx(np.mean(pairs))
    assert change.low <= change.difference <= change.high
    assert change.second - change.first == pytest.approx(change.difference)
    assert change.subjects == 4
    assert change.p <= change.holm <= 1
    assert {(c.method, c.metric) for c in found.changes} == {
        ("gradient", "deletion"), ("gradient", "gini"),
        ("ig", "deletion"), ("ig", "gini"), ("ig", "entropy"),
    }  # fmt: skip
    alike = {(r.method, r.measure): r.value for r in found.likeness}
    ranks = [
        metrics.rank_correlation(
            *[torch.from_numpy(np.load(tmp_path / s / jobs.raw_path(f"sub-{n}_spot_ig"))) for s in "ab"]
        ).item()
        for n in range(1, 5)
    ]
    assert alike["ig", "rank correlation"] == pytest.approx(np.mean(ranks))
    assert found.notes == ("The networks differ.",)
    # The same from the command line, into files.
    arguments = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    files = [tmp_path / "t.csv", tmp_path / "t.json"]
    assert main([*arguments, "--csv", str(files[0]), "--json", str(files[1])]) == 0
    shown = capsys.readouterr().out
    assert "likeness of maps" in shown
    assert "The networks differ." in shown
    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    assert len(rows) == len(found.changes) + len(found.likeness)
    told = json.loads(files[1].read_text())
    assert told["changes"][0]["difference"] == pytest.approx(found.changes[0].difference)
    # A run beside itself.
    same = comparison.compare(tmp_path / "a", tmp_path / "a")
    assert all(r.value == pytest.approx(1) for r in same.likeness)
    assert all(c.difference == 0 and c.p == 1 for c in same.changes)
    assert all(comparison.verdict(c) == "" for c in same.changes)


def test_runs_that_have_nothing_in_common_are_told_so(tmp_path, capsys):
    scan(tmp_path / "sub-1_T1w.nii.gz")
    done_here(tables(tmp_path, [{"metric": "gini"}], run={"output": str(tmp_path / "a")}))
    other = [{"name": "gradient", "id": "slope"}]
    done_here(tables(tmp_path, [{"metric": "gini"}], methods=other, run={"output": str(tmp_path / "b")}))
    message = "compare: expected maps of one subject, target and method in both, got the methods gradient and slope."
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"expected the folder of a finished run, got .*which is not there"):
        comparison.compare(tmp_path / "a", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"which has no records of jobs"):
        comparison.compare(tmp_path, tmp_path / "a")
    # Other settings of a metric are no pair, and a map that is gone is told.
    done_here(
        tables(
            tmp_path,
            [{"metric": "effective_complexity", "id": "gini"}],
            run={"output": str(tmp_path / "c")},
        )
    )
    (tmp_path / "c" / jobs.raw_path("sub-1_spot_gradient")).unlink()
    found = comparison.compare(tmp_path / "a", tmp_path / "c")
    assert found.changes == ()
    assert found.notes == (
        "sub-1/spot/gradient: a map is not kept in its folder.",
        "gini of gradient has other settings in either run: left out.",
    )
    assert str(found).splitlines() == list(found.notes)
