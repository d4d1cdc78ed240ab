"""A whole run in processes: what fails fails alone, what is finished stays, and files are the same bit for bit."""

import contextlib
import copy
import csv
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from esegeta import cli
from esegeta._registry import METHODS
from esegeta.engine.check import Refused
from esegeta.engine.execution import current, record
from esegeta.run import log, pipeline
from esegeta.run.config import building, catalogue
from esegeta.run.config import loading as config
from esegeta.run.executors import journal, stopping
from esegeta.run.executors.child import Context
from esegeta.run.executors.protocol import Piece
from esegeta.run.jobs import dispatch, methods, parts
from esegeta.run.jobs import plan as jobs
from esegeta.run.jobs.inputs import on_image

DRIVER = Path(__file__).with_name("pipeline_driver.py")
GOOD = [
    {"name": "gradient"},
    {"name": "saliency"},
    {"name": "input_x_gradient"},
    {"name": "integrated_gradients", "baseline": "zero", "parameters": {"steps": 4}},
    {"name": "integrated_gradients", "id": "two_baselines", "baseline": ["black", "white"],
     "parameters": {"steps": 3}, "transforms": [{"name": "over_baselines"}]},
    {"name": "integrated_gradients", "id": "drawn", "baseline": {"name": "uniform"}, "parameters": {"steps": 3}},
    {"name": "gradient", "id": "smooth", "transforms": [{"name": "smooth", "noise": 0.1, "samples": 5}]},
    {"name": "gradient", "id": "variance", "transforms": [{"name": "variance", "samples": 4}]},
    {"name": "guided_backprop"},
    {"name": "lrp"},
    {"name": "deep_lift", "baseline": "zero"},
    {"name": "occlusion", "baseline": "mean", "parameters": {"size": 4}},
    {"name": "rise", "baseline": "zero", "parameters": {"samples": 12, "cells": 3}},
    {"name": "kernel_shap", "baseline": "zero",
     "parameters": {"samples": 40, "features": {"name": "grid", "size": 4}}},
    {"name": "grad_cam", "place": "1"},
    {"name": "gradient", "id": "stitched", "patches": "stitched"},
]  # fmt: skip
BAD = {
    "hangs": ({"name": "hangs", "deadline": 2.0}, "timeout", "not done after 2 s"),
    "kills_itself": ({"name": "kills_itself"}, "crashed", "the process was ended by SIGKILL"),
    "eats_memory": ({"name": "eats_memory", "memory": "1.5 GiB"}, "memory", "more than the 1.50 GiB allowed"),
    "wrong": (
        {"name": "occlusion", "id": "wrong", "baseline": "zero", "parameters": {"size": [4, 4, 4, 4]}},
        "refused",
        "expected size",
    ),
}


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    """The networks of these tests lie beside them, whatever the current folder is."""
    monkeypatch.setenv("ESEGETA_TRUST", f"esegeta.zoo,{Path(__file__).parent}")


@pytest.fixture
def scan(tmp_path):
    """A small scan on a grid that is neither straight nor even."""
    values = np.random.default_rng(7).standard_normal((12, 10, 8)).astype(np.float32)
    affine = np.array([[-1.5, 0.2, 0, 10], [0.1, 2.0, 0, -5], [0, 0, 3.0, 7], [0, 0, 0, 1]])
    path = tmp_path / "sub-01_T1w.nii.gz"
    nibabel.Nifti1Image(values, affine).to_filename(path)
    return path


def settings(folder, scan, methods, *, output=None, **run):
    return {
        "model": {"source": "pipeline_parts:network"},
        "input": {"files": str(scan), "preprocess": [{"step": "normalise", "how": "zscore"}]},
        "targets": [{"name": "spot", "class": 1}],
        "methods": copy.deepcopy(methods),
        "patches": {"size": 8},
        "run": {"output": str(folder), "workers": 2, **run},
        "output": {"figures": False, "report": False, **(output or {})},
    }


def start(whole, *, mark="", threads=1):
    """Begin a run in a process group of its own."""
    folder = Path(whole["run"]["output"])
    path = folder.with_name(f"{folder.name}.json")
    path.write_text(json.dumps(whole))
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(path), str(threads)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ESEGETA_TEST": mark},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(whole, **how):
    """A run from beginning to end: what it said of itself, its records, and what it printed."""
    process = start(whole, **how)
    out, err = process.communicate()
    assert out, err
    return json.loads(out.splitlines()[-1]), records(whole), err


def records(whole):
    folder = Path(whole["run"]["output"]) / ".jobs"
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {one["method"]: one for one in found}


def files(folder):
    """The content of every file that has to be the same in every run."""
    found = {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in Path(folder).glob("sub-*/**/*")
        if p.is_file()
    }
    assert found
    return found


def marked(mark):
    """Processes that were started under this mark and are still there."""
    alive = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            dead = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not dead and f"ESEGETA_TEST={mark}".encode() in Path(f"/proc/{entry}/environ").read_bytes():
                alive.append(int(entry))
    return alive


# ------------------------------------------------------------------ failures


@pytest.mark.slow
def test_of_20_methods_four_go_wrong_and_16_are_delivered(tmp_path, scan):
    whole = settings(tmp_path / "out", scan, [*GOOD[:8], *(entry for entry, _, _ in BAD.values()), *GOOD[8:]])
    assert len(whole["methods"]) == 20
    told, found, printed = run(whole, mark="twenty")
    assert told == {
        "code": 1,
        "counts": {"done": 16, "timeout": 1, "crashed": 1, "memory": 1, "refused": 1},
        "repeated": 20,
    }
    for name, (_, status, error) in BAD.items():
        assert found[name]["status"] == status
        assert error in found[name]["error"]
        assert "\n" not in found[name]["error"]
        assert found[name]["map"] is None
        assert error in printed
    affine = nibabel.load(scan).affine
    for one in found.values():
        if one["status"] == "done":
            image = nibabel.load(tmp_path / "out" / one["map"])
            assert image.shape == (12, 10, 8)
            np.testing.assert_array_equal(image.affine, affine)
            values = image.get_fdata()
            assert np.isfinite(values).all()
            assert np.abs(values).max() > 0
            assert one["max"] == pytest.approx(values.max(), rel=1e-6)
            assert one["sum"] == pytest.approx(values.sum(), rel=1e-4, abs=1e-3)
            assert one["peak_memory"] > 2**26
            assert (tmp_path / "out" / one["prediction"]).exists()
    # What the methods claim, on the numbers that were written.
    assert abs(found["deep_lift"]["residual"]) < 1e-4 * abs(found["deep_lift"]["difference"])
    assert found["gradient"]["residual"] is None
    assert found["deep_lift"]["sum"] - found["deep_lift"]["difference"] == pytest.approx(
        found["deep_lift"]["residual"], abs=1e-3 * abs(found["deep_lift"]["difference"])
    )
    lines = (tmp_path / "out" / "summary.csv").read_text().splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("id,subject,target,method,title,status,error,score,residual")
    written = (tmp_path / "out" / "log.txt").read_text()
    assert "in explain" in written, "where it hung"
    assert written.count("starts on cpu") == 20
    assert not marked("twenty")


@pytest.mark.slow
def test_a_map_that_is_not_finite_is_a_failure_and_one_that_is_cut_short_is_partial(tmp_path, scan):
    endless = {**GOOD[12], "parameters": {"samples": 5_000_000, "cells": 3}, "deadline": 6.0}
    boxes = {
        "name": "slow_occlusion", "baseline": "zero", "parameters": {"size": 2, "seconds": 0.1}, "deadline": 6.0
    }  # fmt: skip
    whole = settings(
        tmp_path / "out", scan, [{"name": "not_finite"}, GOOD[0], endless, boxes],
        output={"figures": True, "report": True},
    )  # fmt: skip
    told, found, printed = run(whole)
    assert (told["code"], told["counts"]) == (1, {"failed": 1, "done": 2, "partial": 2})
    assert [event["event"] for event in found["rise"]["events"]] == ["partial"]
    assert 5 < found["rise"]["seconds"] < 60
    assert found["rise"]["share_done"] < 0.5
    assert np.isfinite(nibabel.load(tmp_path / "out" / found["rise"]["map"]).get_fdata()).all()
    cut = found["slow_occlusion"]
    assert 0 < cut["share_done"] < 1
    assert (cut["sum"], cut["residual"]) == (None, None)
    values = nibabel.load(tmp_path / "out" / cut["map"]).get_fdata()
    assert 0 < np.isnan(values).mean() < 1
    assert abs((~np.isnan(values)).mean() - cut["share_done"]) < 0.05  # 120 boxes side by side, most within
    assert cut["min"] == pytest.approx(np.nanmin(values), rel=1e-6)
    sidecar = json.loads((tmp_path / "out" / cut["map"].replace(".nii.gz", ".json")).read_text())
    assert (sidecar["status"], sidecar["share_done"]) == ("partial", cut["share_done"])
    percent = f"partial: {100 * cut['share_done']:.2g} % done"
    assert percent in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count(percent) >= 2
    assert "3 of 4 maps made, 2 of them in part" in page
    rows = list(csv.DictReader((tmp_path / "out" / "summary.csv").read_text().splitlines()))
    assert {row["method"]: row["status"] for row in rows}["slow_occlusion"] == "partial"
    assert {row["method"]: float(row["share_done"]) for row in rows}["slow_occlusion"] == cut["share_done"]
    assert (
        found["not_finite"]["error"]
        == "FloatingPointError: not_finite: 960 of 960 values of the map are not finite"
    )
    assert sorted(p.name.split("_")[-2] for p in (tmp_path / "out").glob("sub-*/*statmap.nii.gz")) == [
        "desc-gradient",
        "desc-rise",
        "desc-slowOcclusion",
    ]


# ------------------------------------------------------------------ again


@pytest.mark.slow
def test_the_same_call_again_does_only_what_is_not_done_or_has_changed(tmp_path, scan):
    whole = settings(tmp_path / "out", scan, [GOOD[0], GOOD[3], GOOD[6], BAD["wrong"][0]])
    told, first, _ = run(whole)
    assert (told["counts"], told["repeated"]) == ({"done": 3, "refused": 1}, 4)
    before = files(tmp_path / "out")
    # What has failed is tried again, whatever else is as it was. Limits and titles of others change nothing.
    whole["run"]["deadline"] = 500.0
    told, second, printed = run(whole)
    assert told["repeated"] == 1
    assert "3 of 4 jobs are done already" in printed
    assert files(tmp_path / "out") == before
    assert {k: v for k, v in first.items() if k != "wrong"} == {
        k: v for k, v in second.items() if k != "wrong"
    }
    # Another parameter, and a file that is gone.
    whole["methods"][3]["parameters"]["size"] = 4
    whole["methods"][1]["parameters"]["steps"] = 5
    (tmp_path / "out" / first["smooth"]["map"]).unlink()
    told, third, _ = run(whole)
    assert (told["counts"], told["repeated"], told["code"]) == ({"done": 4}, 3, 0)
    assert third["gradient"] == first["gradient"]
    assert third["integrated_gradients"]["residual"] != first["integrated_gradients"]["residual"]
    after = files(tmp_path / "out")
    name = first["smooth"]["map"]
    assert after[name] == before[name]


@pytest.mark.slow
def test_two_workers_write_the_same_bytes_as_one(tmp_path, scan):
    by_patch = {"name": "gradient", "id": "by_patch", "patches": "per_patch"}
    methods = [GOOD[0], GOOD[6], GOOD[12], GOOD[15], by_patch]
    told, found, _ = run(settings(tmp_path / "one", scan, methods, workers=1))
    assert told["counts"] == {"done": 5}
    run(settings(tmp_path / "two", scan, methods, workers=2))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    # What is explained on patches has the prediction that was stitched, and what every patch explains, no score.
    assert found["stitched"]["prediction"] != found["gradient"]["prediction"]
    assert (found["by_patch"]["score"], found["stitched"]["score"] is None) == (None, False)


@pytest.mark.parametrize(
    "seed", [pytest.param(1, marks=pytest.mark.nightly), pytest.param(2, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments_nothing_is_repeated_and_the_files_are_the_same(tmp_path, scan, seed):
    draw = random.Random(seed)
    methods = [*GOOD, *(BAD[name][0] for name in ("kills_itself", "wrong"))]
    drawn = {"figures": True}
    started = time.monotonic()
    told, _, _ = run(settings(tmp_path / "calm", scan, methods, output=drawn))
    whole_time = time.monotonic() - started
    assert told["counts"] == {"done": 17, "crashed": 1, "refused": 1}
    whole = settings(tmp_path / "killed", scan, methods, output=drawn)
    kept, kills = {}, 0
    for _ in range(12):
        process = start(whole, mark=f"kill{seed}")
        # At least until it does something: a machine may be slow.
        time.sleep(whole_time * draw.uniform(0.15, 0.6))
        finished = process.poll() is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        until = time.monotonic() + 10
        while marked(f"kill{seed}") and time.monotonic() < until:
            time.sleep(0.05)
        assert not marked(f"kill{seed}"), "workers are left behind"
        if finished:
            break
        kills += 1
        done = {
            p.name: p.read_bytes()
            for p in (tmp_path / "killed" / ".jobs").glob("*.json")
            if json.loads(p.read_bytes())["status"] == "done"
        }
        assert kept.items() <= done.items(), "what was finished was done again"
        kept = done
    assert kills >= 2
    told, _, _ = run(whole)
    assert told["counts"] == {"done": 17, "crashed": 1, "refused": 1}
    for name, content in kept.items():
        assert (tmp_path / "killed" / ".jobs" / name).read_bytes() == content
    calm, killed = files(tmp_path / "calm"), files(tmp_path / "killed")
    assert sum(name.endswith(".png") for name in calm) >= 16
    assert calm.keys() == killed.keys()
    assert [name for name in calm if calm[name] != killed[name]] == []
    assert not list((tmp_path / "killed").rglob("*.part-*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_keeps_what_is_finished_and_leaves_nothing_behind(tmp_path, scan, name):
    number = getattr(signal, name)
    slow = {"name": "slow", "parameters": {"seconds": 600}}
    whole = settings(tmp_path / "out", scan, [GOOD[0], slow], output={"report": True})
    process = start(whole, mark=name)
    until = time.monotonic() + 120
    while "gradient" not in records(whole) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(number)
    out, _ = process.communicate()
    assert json.loads(out.splitlines()[-1]) == {"code": 128 + number, "counts": {"done": 1}, "repeated": 2}
    assert process.returncode == 128 + number
    assert not marked(name)
    assert "missing" in json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_a_full_disk_is_named_and_nothing_of_the_job_stays(tmp_path, scan):
    """A map is there already when its sidecar finds no room."""
    whole = settings(tmp_path / "out", scan, [{"name": "fills_the_disk"}, GOOD[0]], workers=1)
    said, found, _ = run(whole)
    assert said["counts"] == {"done": 1, "failed": 1}
    error = found["fills_the_disk"]["error"]
    sidecar = r"[^ ]*/out/sub-01/[^ ]*_desc-fillsTheDisk_statmap\.json"
    assert re.fullmatch(
        rf"OSError: write: expected to write {sidecar} and room for its \d+ bytes, "
        r"got no space left on device, \d+ bytes are free there\. Make room and start again, or write elsewhere\.",
        error,
    )
    written = [path.name for path in (tmp_path / "out").rglob("*") if "fillsTheDisk" in path.name]
    assert written == ["sub-01_spot_fillsTheDisk.json"]  # its record
    assert not list((tmp_path / "out").rglob(".part-*"))


def test_a_log_without_room_costs_no_run(tmp_path, capsys, monkeypatch):
    written = log.Log("/dev/full") if Path("/dev/full").exists() else None
    if written is None:
        pytest.skip("the system has no device that is always full")
    written.write("a line")
    written.close()
    assert capsys.readouterr().err == "log: No space left on device: a line\n"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_folder_that_goes_away_under_a_run_ends_it(tmp_path, scan, how):
    whole = settings(tmp_path / "out", scan, [GOOD[0], {"name": "slow", "parameters": {"seconds": 8}}])
    process = start(whole, mark=how)
    until = time.monotonic() + 120
    while "gradient" not in records(whole) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    if how == "deleted":
        shutil.rmtree(tmp_path / "out")
    else:
        (tmp_path / "out").rename(tmp_path / "elsewhere")
    _, err = process.communicate()
    assert "to stay while the run writes into it, got it deleted or moved" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists(), "half a run"
    assert not marked(how)


def test_signals_that_ask_to_end_are_interruptions_once():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]

    def work():
        with stopping.terminable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # while what is finished is put away
                os.kill(os.getpid(), signal.SIGHUP)

    with pytest.raises(stopping.Terminated) as raised:
        work()
    assert raised.value.exit_code == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_signal_that_has_a_handler_keeps_it():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("own"))
    try:
        with stopping.terminable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["own"]


@pytest.mark.parametrize(("there", "each"), [(20, 6), (2, 1), (1, 0.9)])  # GiB, for three workers
def test_a_job_without_a_limit_of_memory_gets_its_share(tmp_path, scan, monkeypatch, there, each):
    monkeypatch.setattr(pipeline, "memory_here", lambda: there * 2**30)
    whole = config.load(settings(tmp_path / "out", scan, [GOOD[0]], workers=3))
    own, none = Piece("own", memory=2**20), Piece("none")
    assert pipeline._share(whole) == int(each * 2**30)
    assert pipeline._limited([own, none], 7) == (own, Piece("none", memory=7))


# ------------------------------------------------------------------ the plan


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, scan):
    whole = settings(tmp_path / "out", scan, [GOOD[3], GOOD[6], GOOD[11], GOOD[14], BAD["wrong"][0]])
    whole["model"] = {"source": "zoo:small_unet", "arguments": {"ndim": 3}}
    whole["input"]["preprocess"].append({"step": "crop", "box": [[0, 8], [0, 8], [0, 8]]})
    whole["methods"][3]["place"] = "nowhere"
    summary = pipeline.run(config.load(whole), dry=True)
    assert not (tmp_path / "out").exists()
    found = {one.job.method: one for one in summary.plan}
    assert {one.shape for one in found.values()} == {(1, 8, 8, 8)}
    assert [found[name].evaluations for name in ("integrated_gradients", "smooth", "occlusion")] == [
        4,
        5,
        None,
    ]
    assert found["occlusion"].needs == "values"
    assert found["smooth"].memory > 8**3 * 4
    assert found["smooth"].problem is None
    assert found["occlusion"].seconds is None
    assert found["smooth"].seconds == pytest.approx(5 / 4 * found["integrated_gradients"].seconds)
    sized = 4 * 8**3 + 4 * math.prod(nibabel.load(scan).shape)
    assert found["smooth"].disk == sized
    assert sum(one.disk or 0 for one in found.values()) == 4 * sized + nibabel.load(scan).get_fdata().size * 4
    ahead = pipeline.forecast(summary, 2)
    assert (ahead.jobs, ahead.unknown) == (3, 1)
    assert ahead.memory == max(one.memory for one in found.values() if one.memory)
    assert ahead.disk == sum(one.disk for one in found.values() if one.problem is None)
    assert "nowhere" in found["grad_cam"].problem
    assert "expected size" in found["wrong"].problem
    assert not any(one.done for one in found.values())


@pytest.mark.slow
def test_a_dry_run_looks_at_one_image_of_each_shape_and_groups_what_is_wrong(tmp_path, capsys, monkeypatch):
    for number, shape in enumerate([(8, 8, 8), (8, 8, 8), (8, 8, 8), (7, 9, 8)]):
        values = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
        nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / f"sub-{number}.nii.gz")
    (tmp_path / "sub-5.nii.gz").write_bytes(b"no image")
    whole = settings(
        tmp_path / "out", tmp_path / "sub-*.nii.gz", [{"name": "gradient"}, {"name": "saliency"}]
    )
    whole["model"] = {"source": "zoo:small_unet", "arguments": {"ndim": 3}}
    whole["input"] = {"files": str(tmp_path / "sub-*.nii.gz")}
    looked = []
    examine = dispatch.payload_of
    monkeypatch.setattr(
        dispatch, "payload_of", lambda job, config: looked.append(job.id) or examine(job, config)
    )
    path = tmp_path / "study.json"
    path.write_text(json.dumps(whole))
    monkeypatch.setattr("esegeta.cli._MOST_ROWS", 3)
    assert cli.main(["run", str(path), "--dry-run", "--trust", str(tmp_path)]) == cli.FAILED
    assert looked == [f"sub-{n}_spot_{method}" for n in (0, 3, 5) for method in ("gradient", "saliency")]
    text = capsys.readouterr().out
    assert re.search(r"^3 x spot gradient +to do +1 gradients +\d+ s +1x8x8x8 +\d", text, re.M)
    assert re.search(r'^sub-3_spot_gradient, sub-3_spot_saliency: .* step = "pad", multiple = ', text, re.M)
    assert re.search(r"^sub-5_spot_gradient, sub-5_spot_saliency: ", text, re.M)
    assert " - " not in text
    assert re.search(r"^About \d+ s with 2 workers. The largest job takes ", text, re.M)
    assert re.search(r"^At most \d+ KiB on disk, without figures; .* are free.$", text, re.M)
    channels = [tmp_path / "two" / f"sub-7_{name}.nii.gz" for name in ("T1w", "T2w")]
    channels[0].parent.mkdir()
    for file in channels:
        file.write_bytes((tmp_path / "sub-0.nii.gz").read_bytes())
    whole["input"]["files"] = [list(map(str, channels))]
    (job, _) = jobs.plan(config.load(whole))
    problem = dispatch.examine([json.loads(json.dumps(job.payload))], context())[job.id]["problem"]
    assert "expected an image of 1 channel, which the network takes, got 2 channels" in problem


def test_a_dry_run_takes_at_most_the_time_of_all_jobs_of_an_image(tmp_path, scan):
    methods = [{"name": "gradient"}, {"name": "saliency", "deadline": 7.5}]
    assert pipeline._allowed(plan(tmp_path, scan, methods, run__deadline=5.0)) == 12.5
    assert pipeline._allowed(plan(tmp_path, scan, methods)) is None


@pytest.mark.parametrize(
    ("name", "method", "count"),
    [
        ("deep_lift_shap", {"baseline": [{"name": "uniform", "count": 3}, {"name": "zero"}]}, 4),
        ("expected_gradients", {"parameters": {"samples": 9}, "baseline": [{"name": "uniform", "count": 3}]}, 9),
        ("integrated_gradients", {"parameters": {"steps": 5}, "baseline": [{"name": "uniform", "count": 3}],
                                  "transforms": [{"name": "over_baselines"}]}, 15),
        ("shapley_sampling", {"parameters": {"samples": 2}}, None),
        ("gradient", {"patches": "per_patch"}, None),
    ],
)  # fmt: skip
def test_what_a_method_costs_counts_its_baselines_and_is_not_guessed(name, method, count):
    whole = {"parameters": {}, "transforms": [], **method}
    assert catalogue.cost(METHODS[name], whole) == count


def plan(tmp_path, scan, methods, **changes):
    whole = settings(tmp_path / "out", scan, methods)
    whole["model"] = {"source": "zoo:small_unet", "arguments": {"ndim": 3}}
    for path, value in changes.items():
        table, _, key = path.partition("__")
        whole[table] = {**whole[table], key: value}
    return jobs.plan(config.load(whole))


def test_a_digest_holds_what_decides_and_nothing_else(tmp_path, scan):
    (one,) = plan(tmp_path, scan, [{"name": "gradient"}])
    assert one.id == "sub-01_spot_gradient"
    same = [
        {"run__deadline": 5.0},
        {"run__memory": "3 GiB"},
        {"run__workers": 7},
        {"run__output": str(tmp_path / "elsewhere")},
        {"output__report": True},
        {"output__figures": True},
        {"output__nifti": False},
        {"patches__size": 4},
    ]
    for change in same:
        assert plan(tmp_path, scan, [{"name": "gradient"}], **change)[0].digest == one.digest, change
    other = [
        {"run__key": 1},
        {"run__precision": "bfloat16"},
        {"input__preprocess": []},
        {"model__arguments": {"ndim": 3, "width": 5}},
    ]
    seen = {one.digest}
    for change in other:
        seen.add(plan(tmp_path, scan, [{"name": "gradient"}], **change)[0].digest)
    assert len(seen) == 1 + len(other)
    moved = tmp_path / "moved" / scan.name
    moved.parent.mkdir()
    moved.write_bytes(scan.read_bytes())
    assert plan(tmp_path, moved, [{"name": "gradient"}])[0].digest == one.digest
    image = nibabel.load(scan)
    nibabel.Nifti1Image(image.get_fdata(dtype=np.float32) * 2, image.affine).to_filename(moved)
    assert plan(tmp_path, moved, [{"name": "gradient"}])[0].digest != one.digest
    atlas = tmp_path / "atlas.npy"
    parts = {"name": "labels", "map": {"file": str(atlas)}}
    method = [{"name": "kernel_shap", "baseline": "zero", "parameters": {"features": parts}}]
    np.save(atlas, np.zeros((12, 10, 8), np.int16))
    (before,) = plan(tmp_path, scan, method)
    shutil.copy(atlas, tmp_path / "moved" / "a.npy")
    parts["map"] = {"file": str(tmp_path / "moved" / "a.npy")}
    (after,) = plan(tmp_path, scan, method)
    assert after.digest == before.digest
    assert methods.record_header(after.payload)["parameters"]["features"]["map"] == {"file": "a.npy"}
    np.save(tmp_path / "moved" / "a.npy", np.ones((12, 10, 8), np.int16))
    assert plan(tmp_path, scan, method)[0].digest != before.digest
    limits = {"name": "gradient", "deadline": 3.0, "memory": "2 GiB"}
    (limited,) = plan(tmp_path, scan, [limits])
    assert (limited.digest, limited.deadline, limited.memory) == (one.digest, 3.0, 2**31)


def test_jobs_that_would_write_the_same_files_are_refused(tmp_path, scan):
    twins = [{"name": "gradient", "id": "a_b"}, {"name": "saliency", "id": "aB"}]
    with pytest.raises(
        ValueError, match=r"expected targets and methods with different names, got .*a_b.* and .*aB"
    ):
        plan(tmp_path, scan, twins)


def test_what_a_deadline_cut_short_is_done_again_only_with_more_time(tmp_path, scan):
    (job,) = plan(tmp_path, scan, [{"name": "gradient", "deadline": 5.0}])
    folder = tmp_path / "out"
    for name in ("a.nii.gz", "sub-01/sub-01_space-orig_label-spot_desc-gradient_statmap.json"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"")
    cut = {
        **methods.record_header(job.payload),
        "status": "partial",
        "map": "a.nii.gz",
        "deadline": 5.0,
        "events": [{"event": "partial"}],
    }
    jobs.write_record(folder, cut)

    def kept(job):
        return [state for _, state in jobs.survey([job], folder)] == ["kept"]

    assert kept(job)
    (more,) = plan(tmp_path, scan, [{"name": "gradient", "deadline": 9.0}])
    (endless,) = plan(tmp_path, scan, [{"name": "gradient"}])
    assert not kept(more)
    assert not kept(endless)
    jobs.write_record(folder, {**cut, "status": "done", "events": []})
    assert kept(more)
    jobs.write_record(folder, {**cut, "status": "timeout"})
    assert not kept(job)
    jobs.write_record(folder, {**cut, "map": "gone.nii.gz"})
    assert not kept(job)


def test_a_record_cannot_have_files_outside_of_the_folder_removed(tmp_path, scan):
    (job,) = plan(tmp_path, scan, [{"name": "gradient"}])
    outside = tmp_path / "precious"
    outside.write_text("mine")
    jobs.write_record(
        tmp_path / "out", {**methods.record_header(job.payload), "map": "../precious", "figures": {}}
    )
    jobs.clear(job.id, tmp_path / "out")
    assert outside.read_text() == "mine"
    assert jobs.record_of(tmp_path / "out", job.id) is None


def test_one_run_at_a_time_works_in_a_folder(tmp_path, scan):
    whole = settings(tmp_path / "out", scan, [GOOD[0]])
    whole["model"] = {"source": "zoo:small_unet", "arguments": {"ndim": 3}}
    (tmp_path / "out").mkdir()
    with (
        pipeline._alone(tmp_path / "out"),
        pytest.raises(ValueError, match="got another run that works there"),
    ):
        pipeline.run(config.load(whole))
    with pytest.raises(
        ValueError, match=r"run: expected the id of a job or of a method, got 'gradent'. Nearest: gra"
    ):
        pipeline.run(config.load(whole), only=["gradent"])


# ------------------------------------------------------------------ precision, maps of layers


def context(**more):
    return Context("cpu", None, None, {}, lambda **event: None, **more)


def computed(explain, precision, tmp_path, scan):
    (job,) = plan(tmp_path, scan, [{"name": "gradient"}])
    entry = parts.entry_of(job.payload)._replace(precision=precision)
    image = parts.image_of(job.payload, entry, torch.device("cpu"), {})
    built = building.Built(explain, (), False, frozenset(), None)
    return methods.computed(entry, built, image, context(), lambda: None)


def test_what_a_worker_may_occupy_bounds_what_it_reads(tmp_path, scan):
    """Also where the configuration has no limit: the worker's share counts before a file is unpacked."""
    (job,) = plan(tmp_path, scan, [{"name": "gradient"}])
    little = Context("cpu", None, 100, {}, lambda **event: None)
    with pytest.raises(ValueError, match="to be a volume that fits into memory, got one that takes"):
        dispatch.main(job.payload, little)
    assert "fits into memory" in dispatch.examine([job.payload], little)[job.id]["problem"]
    (own,) = plan(tmp_path, scan, [{"name": "gradient", "memory": "1 GiB"}])
    assert parts.entry_of(own.payload, 100).method.memory == 2**30


def test_what_is_not_finite_in_reduced_precision_is_computed_again_in_full(tmp_path, scan):
    asked = []

    def overflows(x):
        asked.append(current().precision)
        record("noticed", "something on the way")
        return x / 0 if current().precision is not None else 2 * x

    with pytest.warns(UserWarning, match="something on the way"):
        found, events = computed(overflows, "float16", tmp_path, scan)
    assert asked == [torch.float16, None]
    assert bool(found.isfinite().all())
    assert [e["event"] for e in events] == ["noticed", "precision", "noticed"]
    assert "in float16" in events[1]["message"]

    def refuses(x):
        if current().precision is not None:
            raise ValueError("ig: expected finite values in the score, got 1 NaN. Look.")
        return x

    found, events = computed(refuses, "bfloat16", tmp_path, scan)
    assert "expected finite values" in events[0]["message"]
    with pytest.raises(ValueError, match="always"):
        computed(lambda x: (_ for _ in ()).throw(ValueError("always")), "bfloat16", tmp_path, scan)
    with pytest.raises(FloatingPointError, match="960 of 960 values of the map are not finite"):
        computed(lambda x: x / 0 * 0, "float32", tmp_path, scan)


def test_maps_of_layers_come_to_the_grid_of_the_image():
    x = torch.zeros(1, 4, 4)
    same, said = on_image(torch.ones(1, 4, 4), x)
    assert (same.shape, said) == ((1, 4, 4), [])
    up, said = on_image(torch.ones(3, 2, 2), x)
    assert bool((up == 3).all())
    assert (
        said[0]["message"]
        == "The map is the sum of 3 channels, on the grid of the image by interpolation from (2, 2)."
    )
    with pytest.raises(Refused, match="choose a place before pooling or flattening"):
        on_image(torch.ones(3), x)


# ------------------------------------------------------------------ what is told


def test_lines_and_bars_and_functions_show_a_run(capsys):
    from esegeta.run.executors.protocol import Outcome

    events = [
        {"event": "planned", "job": None, "total": 3},
        {"event": "kept", "job": None, "count": 1},
        {"event": "start", "job": "a", "device": "cpu", "process": 1},
        {"event": "begin", "job": "a"},
        {"event": "progress", "job": "a", "label": "rise", "fraction": 0.25},
        {
            "event": "job_done",
            "job": "a",
            "outcome": Outcome("a", "failed", None, "KeyError: 'x'", "trace", 1.25),
        },
    ]
    seen = []
    shown = [
        log.display(True),
        log.display(seen.append),
        log.display(False),
        log.Table(),
    ]
    for one in shown:
        with one:
            for event in events:
                one.show(event)
    assert seen == events
    printed = capsys.readouterr().err
    assert "1 of 3 jobs are done already" in printed
    assert "[2 of 3, 1 failed, about 1 s left] a: failed after 1.2 s: KeyError: 'x'" in printed
    assert re.search(r"all jobs .*2 of 3, 1 failed, about 1 s left", printed)
    assert log.sentences(events[4]) == []
    assert log.sentences(events[5]) == ["a: failed after 1.2 s: KeyError: 'x', 0 MiB\ntrace"]
    said = {
        "status": "partial",
        "share_done": 1 / 3,
        "events": [{"event": "partial", "message": "3 of 9 samples"}],
    }
    cut = Outcome("b", "done", said, seconds=1.25)
    assert log.sentences({"event": "job_done", "job": "b", "outcome": cut}) == [
        "b: 3 of 9 samples",
        "b: ended after 1.2 s, partial: 33 % done, 0 MiB",
    ]


@pytest.mark.slow
def test_a_run_is_followed_and_its_jobs_cancelled_from_another_process(tmp_path, scan, capsys):
    stuck = {"name": "slow", "id": "stuck", "parameters": {"seconds": 600.0}}
    whole = settings(tmp_path / "out", scan, [{"name": "gradient"}, stuck, {"name": "saliency"}])
    folder = str(tmp_path / "out")
    assert cli.main(["follow", folder]) == cli.BAD_INPUT
    assert "expected" in capsys.readouterr().err
    process = start(whole)
    try:
        seen = []
        while ("begin", "sub-01_spot_stuck") not in seen:
            assert process.poll() is None
            time.sleep(0.05)
            with contextlib.suppress(OSError, ValueError):
                seen = [(event["event"], event["job"]) for event in journal.events(f"{folder}/.jobs")]
        assert cli.main(["follow", folder, "--cancel", "sub-01_spot_stck"]) == cli.BAD_INPUT
        assert "got 'sub-01_spot_stck'. Nearest: sub-01_spot_stuck" in capsys.readouterr().err
        assert pipeline.going_on(folder)
        assert cli.main(["follow", folder, "--cancel", "sub-01_spot_stuck"]) == 0
        assert cli.main(["follow", folder, "--plain"]) == cli.FAILED
    finally:
        out, _ = process.communicate(timeout=60)
    assert json.loads(out)["counts"] == {"done": 2, "cancelled": 1}
    told = capsys.readouterr()
    assert "The run has ended. 3 of 3, 1 failed." in told.out
    assert re.search(r"^\[3 of 3, 1 failed\] sub-01_spot_", told.err, re.M)
    assert "sub-01_spot_stuck: cancelled after" in told.err
    # What has ended can still be read, and is not to be cancelled.
    assert not pipeline.going_on(folder)
    assert cli.main(["follow", folder, "--plain"]) == cli.FAILED
    assert cli.main(["follow", folder, "--cancel", "all"]) == cli.BAD_INPUT
    assert "a run that works in" in capsys.readouterr().err


@pytest.mark.slow
def test_what_no_configuration_knows_is_listed_and_removed_and_nothing_else(tmp_path, scan, capsys):
    folder = tmp_path / "out"
    whole = settings(folder, scan, [GOOD[0], {"name": "saliency"}], output={"tables": True})
    whole["model"] = {"source": "zoo:small_unet", "arguments": {"ndim": 3}}
    whole["summary"] = {}
    assert pipeline.run(config.load(whole), progress=False).exit_code == 0
    own = folder / scan.name.partition("_")[0] / "notes_saliency_statmap.txt"
    own.write_text("of the user")
    (folder / ".jobs" / "raw" / "gone.npy").write_bytes(b"left by a job without a record")
    (folder / ".jobs" / "strange.json").write_text(
        '{"id": "another", "status": "done", "map": "summary.csv"}'
    )
    before = files(folder)
    assert pipeline.clean(folder, [config.load(whole)]) == [folder / ".jobs" / "raw" / "gone.npy"]
    whole["methods"] = whole["methods"][:1]
    del whole["summary"]
    path = tmp_path / "less.json"
    path.write_text(json.dumps(whole))
    assert cli.main(["clean", str(folder), "--config", str(path)]) != 0  # nobody answers: nothing is removed
    assert "saliency" in capsys.readouterr().out
    assert cli.main(["clean", str(folder), "--config", str(path), "--yes"]) == 0
    printed = capsys.readouterr().out
    after = files(folder)
    removed = {str(name) for name in before.keys() - after.keys()}
    assert removed
    assert all(
        "saliency" in name or "summary" in name or "regions" in name or "gone" in name for name in removed
    )
    assert all(name in printed for name in removed if "gone" not in name)
    assert not [name for name in after if "saliency" in str(name) and "notes" not in str(name)]
    assert own.exists()
    assert (folder / ".jobs" / "strange.json").exists()
    assert (folder / "summary.csv").exists()
    again = pipeline.run(config.load(whole), progress=False)
    assert (again.exit_code, again.repeated) == (0, 0)
    assert cli.main(["clean", str(tmp_path)]) == cli.BAD_INPUT
    assert "expected the folder of a run" in capsys.readouterr().err


def test_a_log_gives_every_line_its_time(tmp_path):
    for text in ("first\nsecond", "third"):
        written = log.Log(tmp_path / "log.txt")
        written.write(text)
        written.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[-6:].strip() for line in lines] == ["first", "second", "third"]
    assert lines[0][:2] == "20"
