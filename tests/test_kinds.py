"""Kinds of jobs as data: what depends on what, what is done again, and what a kind brings along."""

import csv
import json
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

from esegeta.run import pipeline
from esegeta.run.config import listing, plugins
from esegeta.run.config import loading as config
from esegeta.run.executors import journal, local
from esegeta.run.executors.child import Context
from esegeta.run.executors.protocol import Task
from esegeta.run.executors.status import Status
from esegeta.run.jobs import dispatch, kinds, methods, parts, summary
from esegeta.run.jobs import plan as jobs
from esegeta.run.jobs.inputs import Inputs


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    monkeypatch.setenv("ESEGETA_TRUST", f"esegeta.zoo,{Path(__file__).parent}")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def scan(path, seed=7, shape=(8, 7, 6)):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    nibabel.Nifti1Image(values, np.diag([2.0, 1.5, 1.0, 1.0])).to_filename(path)
    return path


def tables(folder, files, **more):
    return {
        "model": {"source": "pipeline_network:network"},
        "input": {"files": str(files)},
        "targets": [{"name": "spot", "class": 1}],
        "methods": [{"name": "gradient"}],
        "run": {"output": str(folder)},
        "output": {"figures": False, "report": False},
        **more,
    }


def run(whole, **how):
    return pipeline.run(config.load(whole), progress=False, threads=1, **how)


def records(folder):
    return {p.stem: json.loads(p.read_text()) for p in (Path(folder) / ".jobs").glob("*.json")}


def context():
    return Context("cpu", None, None, {}, lambda **event: None)


def done_here(planned, folder):
    """Do jobs in this process, one after another."""
    for job in planned:
        dispatch.main(json.loads(json.dumps(job.payload)), context())
    return records(folder)


# ------------------------------------------------------------------ what is registered


def test_a_kind_brings_its_table_and_enters_once(tmp_path):
    path = scan(tmp_path / "sub-1.nii.gz")
    plain = config.load(tables(tmp_path / "out", path))
    assert [job.kind for job in jobs.plan(plain)] == ["methods"]
    asked = config.load(tables(tmp_path / "out", path, summary={}))
    assert [(job.kind, job.id) for job in jobs.plan(asked)] == [
        ("methods", "sub-1_spot_gradient"),
        ("summary", "sub-1_spot_gradient_summary"),
    ]
    again = config.load(config.dump(asked))
    assert again.more == asked.more == {"summary": summary.Summary()}
    with pytest.raises(ValueError, match=r"summary.mean: expected true or false, got 'x'"):
        config.load(tables(tmp_path / "out", path, summary={"mean": "x"}))
    with pytest.raises(
        ValueError, match=r"summery: expected a table of the file, got 'summery'. Nearest: summ"
    ):
        config.load(tables(tmp_path / "out", path, summery={}))
    with pytest.raises(ValueError, match=r"kinds.register: expected a new name, got 'summary'"):
        kinds.register(summary.SUMMARY)
    with pytest.raises(ValueError, match=r"kinds.find: expected the name of a kind of jobs, got 'none'"):
        kinds.find("none")


def test_a_job_is_known_by_what_it_reads_too(tmp_path):
    path = scan(tmp_path / "sub-1.nii.gz")

    def digests(**changes):
        return [
            job.digest
            for job in jobs.plan(config.load(tables(tmp_path / "out", path, summary={}, **changes)))
        ]

    before = digests()
    titled = digests(methods=[{"name": "gradient", "title": "Another"}])
    assert titled == before
    other = digests(run={"output": str(tmp_path / "out"), "key": 1})
    assert all(a != b for a, b in zip(before, other, strict=True))


STRANGER = '''
"""How many values of a map are above a threshold: a kind of jobs as a stranger writes it."""

import time

from esegeta.run.config.schema import Section
from esegeta.run.jobs.kinds import Job, Kind, register
from esegeta.run.jobs.plan import ended, header


class Counting(Section):
    """Count large values."""

    above: float
    name: str = "large"


def check(section, path, faults):
    if section.above < 0:
        faults.add(f"{path}.above", "a number >= 0", section.above, "Raise it")


def entries(planning):
    return [
        Job(
            id=f"{job.id}_{section.name}",
            kind="counting",
            keys=job.keys,
            given={**job.given, "of": job.id, "above": section.above, "title": section.name},
            decides=["counting", section.above],
            after=(job,),
        )
        for section in planning.config.more.get("counting", [])
        for job in planning.jobs
        if job.kind == "methods"
    ]


def count(payload, inputs, context):
    """Count the values of a map above a threshold, and those of a new explanation."""
    started = time.monotonic()
    map, (explain, score) = inputs.map(payload["of"]), inputs.explain()
    again = explain(inputs.image().x)
    found = {"count": int((map > payload["above"]).sum()), "again": int((again > payload["above"]).sum())}
    return ended(payload, {**found, "score": float(score(inputs.image().x))}, context, started)


COUNTING = register(
    Kind(
        name="counting",
        table="counting",
        section=Counting,
        many=True,
        check=check,
        reads=("methods",),
        entries=entries,
        header=header,
        work=count,
        file="counts",
        columns=("id", "title", "status", "error", "count", "again"),
        shown={"title": "What", "count": "How many"},
        title="Counts of a stranger",
    )
)
'''


@pytest.fixture
def stranger(tmp_path):
    file = tmp_path / "stranger_kind.py"
    file.write_text(STRANGER)
    yield file
    plugins._forget("stranger_kind")
    plugins._loaded.clear()


@pytest.mark.slow
def test_a_kind_of_a_plugin_is_a_file_and_a_table(tmp_path, stranger, capsys):
    path, folder = scan(tmp_path / "sub-1.nii.gz"), tmp_path / "out"
    whole = tables(folder, path, output={"figures": False, "report": True})
    whole["counting"] = [{"above": 0.0}, {"above": 1.0, "name": "larger"}]
    whole["run"]["workers"] = 2
    allowed = [str(tmp_path)]
    with pytest.raises(ValueError, match=r"counting: expected a table of the file, got 'counting'"):
        config.load(whole, trust=allowed)
    whole["plugins"] = [str(stranger)]
    with pytest.raises(ValueError, match=r"counting\[1\].above: expected a number >= 0, got -1.0. Raise it."):
        config.load({**whole, "counting": [{"above": 0.0}, {"above": -1.0}]}, trust=allowed)
    asked = config.load(whole, trust=allowed)
    assert config.load(config.dump(asked), trust=allowed).more == asked.more
    found = pipeline.run(asked, progress=False, threads=1)
    assert (found.exit_code, found.counts) == (0, {"done": 3})
    told = records(folder)
    values = nibabel.load(folder / told["sub-1_spot_gradient"]["map"]).get_fdata()
    for name, above in (("large", 0.0), ("larger", 1.0)):
        one = told[f"sub-1_spot_gradient_{name}"]
        assert one["count"] == one["again"] == (values > above).sum()
        assert one["score"] == pytest.approx(told["sub-1_spot_gradient"]["score"])
    rows = list(csv.DictReader((folder / "counts.csv").read_text().splitlines()))
    assert [row["title"] for row in rows] == ["large", "larger"]
    assert "Counts of a stranger" in (folder / "report.html").read_text()
    listed = {title: rows for title, _, rows in listing.tables()}["KINDS OF JOBS"]
    assert ("counting", "stranger_kind", "[[counting]]", "above, name") in [row[:4] for row in listed]
    assert listing.entry("counting").startswith("counting: a kind of jobs\n  Count the values of a map above")
    # Nothing again; what the plugin does differently is done again, and no more than that.
    assert pipeline.run(asked, progress=False, threads=1).repeated == 0
    before = [job.digest for job in jobs.plan(asked)]
    stranger.write_text(STRANGER.replace("map > payload", "map >= payload"))
    after = [job.digest for job in jobs.plan(config.load(whole, trust=allowed))]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, False]


@pytest.mark.slow
def test_a_kind_of_an_installed_package_is_known_when_it_is_trusted(tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "stranger-1.0.dist-info").mkdir(parents=True)
    (site / "stranger-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n"
    )
    (site / "stranger-1.0.dist-info" / "entry_points.txt").write_text(
        "[esegeta.plugins]\nx = stranger_package\n"
    )
    (site / "stranger_package.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(str(site))
    path, folder = scan(tmp_path / "sub-1.nii.gz"), tmp_path / "out"
    whole = tables(folder, path, counting=[{"above": 0.0}])
    try:
        with pytest.raises(ValueError, match=r"counting: expected a table of the file"):
            config.load(whole)
        asked = config.load(whole, trust=["stranger_package"])
        assert pipeline.run(asked, progress=False, threads=1).counts == {"done": 2}
        code = kinds.find("counting").code
        assert jobs.plan(asked)[0].decides()["installed"] == {"stranger_package": code}
    finally:
        plugins._forget("stranger_package")
        plugins._offered.clear()
        plugins._asked.clear()


# ------------------------------------------------------------------ maps that others read


def test_a_map_is_there_as_it_was_computed_and_on_the_grid_of_the_file(tmp_path):
    path = scan(tmp_path / "sub-1.nii.gz")
    steps = {"files": str(path), "preprocess": [{"step": "crop", "box": [[0, 6], [0, 6], [0, 6]]}]}
    methods_ = [{"name": "gradient"}, {"name": "grad_cam", "place": "1"}]
    planned = jobs.plan(config.load(tables(tmp_path / "out", path, input=steps, methods=methods_)))
    found = done_here(planned, tmp_path / "out")
    for job, channels in zip(planned, (1, 1), strict=True):
        inputs = Inputs(job.payload, context())
        raw = inputs.map(job.id)
        assert raw.shape == (channels, 6, 6, 6)
        written = torch.from_numpy(nibabel.load(tmp_path / "out" / found[job.id]["map"]).get_fdata())
        assert written.shape == (8, 7, 6)
        back = inputs.map(job.id, "file")
        torch.testing.assert_close(back[0].double(), written, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(back[0, :6, :6], raw[0], rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match=r"expected a result of nobody, got none"):
        Inputs(planned[0].payload, context()).map("nobody")


# ------------------------------------------------------------------ what is done again


@pytest.mark.slow
def test_a_title_and_figures_recompute_no_map(tmp_path, monkeypatch):
    path = scan(tmp_path / "sub-1.nii.gz")
    folder = tmp_path / "out"
    whole = tables(folder, path, summary={})
    first = run(whole)
    assert (first.exit_code, first.repeated) == (0, 2)
    before = records(folder)["sub-1_spot_gradient"]
    map = (folder / before["map"]).read_bytes()
    assert run(whole).repeated == 0
    # A map that was computed again would differ from this mark.
    raw = np.load(folder / before["raw"])
    np.save(folder / before["raw"], 2 * raw)
    whole["methods"][0]["title"] = "Another"
    whole["output"]["figures"] = True
    second = run(whole)
    assert (second.exit_code, second.repeated) == (0, 2)
    after = records(folder)["sub-1_spot_gradient"]
    assert (after["title"], before["title"]) == ("Another", "gradient")
    assert {k: after[k] for k in ("score", "sum", "seconds", "started", "config_digest")} == {
        k: before[k] for k in ("score", "sum", "seconds", "started", "config_digest")
    }
    drawn = records(folder)["figures_sub-1"]["figures"]["sub-1_spot_gradient"]
    assert "overlay" in drawn
    assert all((folder / name).is_file() for name in drawn.values())
    sidecar = json.loads((folder / after["map"].replace(".nii.gz", ".json")).read_text())
    assert sidecar["title"] == "Another"
    written = nibabel.load(folder / after["map"]).get_fdata()
    np.testing.assert_allclose(written, 2 * raw[0], rtol=1e-6)
    # Without figures again: they go, and the map stays.
    np.save(folder / before["raw"], raw)
    whole["output"] = {**whole["output"], "figures": False, "nifti": False}
    assert run(whole).repeated == 1
    assert records(folder)["sub-1_spot_gradient"]["map"] is None
    assert "figures_sub-1" not in records(folder)
    assert not any((folder / name).exists() for name in [*drawn.values(), after["map"]])
    whole["output"] = {"figures": False, "report": False}
    assert run(whole).repeated == 1
    assert (folder / before["map"]).read_bytes() == map
    # Without what was kept there is nothing to draw from.
    (folder / before["raw"]).unlink()
    whole["methods"][0]["title"] = "A third"
    assert run(whole).repeated == 2
    assert (folder / before["map"]).read_bytes() == map


# ------------------------------------------------------------------ the proof


@pytest.mark.slow
def test_a_summary_is_what_is_written_and_a_mean_is_of_those_that_came(tmp_path):
    for number in (1, 2, 3):
        scan(tmp_path / f"sub-{number}.nii.gz", seed=number, shape=(8, 8, 8))
    broken = tmp_path / "sub-2.nii.gz"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    folder = tmp_path / "out"
    whole = tables(folder, tmp_path / "sub-*.nii.gz", summary={}, output={"figures": False, "report": True})
    whole["model"] = {"source": "zoo:small_unet", "arguments": {"ndim": 3}}
    found = run(whole)
    assert found.exit_code == 1
    assert found.counts == {"done": 4, "failed": 1, "skipped": 1, "partial": 1} or found.counts == {
        "done": 4, "refused": 1, "skipped": 1, "partial": 1,
    }  # fmt: skip
    told = records(folder)
    assert told["sub-2_spot_gradient_summary"]["error"] == "there is no result of sub-2_spot_gradient"
    mean = told["mean_spot_gradient"]
    assert (mean["status"], mean["subjects"], mean["subjects_asked"]) == ("partial", 2, 3)
    assert mean["missing"] == ["sub-2_spot_gradient_summary"]
    message = "The mean is of 2 of 3 subjects; without sub-2_spot_gradient_summary: skipped."
    assert mean["events"][0]["message"] == message
    sums = []
    for number in (1, 3):
        record, one = told[f"sub-{number}_spot_gradient"], told[f"sub-{number}_spot_gradient_summary"]
        values = nibabel.load(folder / record["map"]).get_fdata()
        inside = nibabel.load(folder / record["prediction"]).get_fdata() > 0
        assert 0 < inside.sum() < inside.size
        within, outside = one["rows"]
        assert (within["region"], outside["region"]) == ("inside", "outside")
        assert within["sum"] == pytest.approx(values[inside].sum(), rel=1e-5, abs=1e-5)
        assert outside["mean"] == pytest.approx(values[~inside].mean(), rel=1e-5, abs=1e-7)
        assert within["share"] == pytest.approx(np.abs(values[inside]).sum() / np.abs(values).sum(), rel=1e-5)
        assert within["share"] + outside["share"] == pytest.approx(1)
        assert within["max"] == pytest.approx(values[inside].max(), rel=1e-6)
        assert within["volume_mm3"] == pytest.approx(3.0 * inside.sum())
        sums.append(within["sum"])
    assert mean["rows"][0]["sum"] == pytest.approx(np.mean(sums))
    rows = list(csv.DictReader((folder / "regions_mean.csv").read_text().splitlines()))
    assert [(row["method"], row["region"], row["n"], row["status"]) for row in rows] == [
        ("gradient", "inside", "2", "partial"),
        ("gradient", "outside", "2", "partial"),
    ]
    assert (
        len((folder / "regions.csv").read_text().splitlines()) == 6
    )  # two regions of two, and one without a map
    assert len((folder / "summary.csv").read_text().splitlines()) == 4
    page = (folder / "report.html").read_text()
    assert "Regions, mean over subjects" in page
    assert message in page
    # The image is mended: what depends on it is done, the rest is not done again.
    broken.write_bytes(content)
    again = run(whole)
    assert (again.exit_code, again.repeated, again.counts) == (0, 3, {"done": 7})
    mean = records(folder)["mean_spot_gradient"]
    assert (mean["status"], mean["subjects"], mean["missing"]) == ("done", 3, [])


def test_without_any_input_there_is_no_mean(tmp_path):
    for number in (1, 2):
        (tmp_path / f"sub-{number}.nii.gz").write_bytes(b"nothing")
    found = run(tables(tmp_path / "out", tmp_path / "sub-*.nii.gz", summary={}))
    assert found.exit_code == 1
    told = records(tmp_path / "out")
    assert told["mean_spot_gradient"]["status"] == Status.SKIPPED
    assert told["mean_spot_gradient"]["error"] == (
        "there is no result of sub-1_spot_gradient_summary and 1 more"
    )
    assert told["mean_spot_gradient"]["rows"] == []
    assert (tmp_path / "out" / "summary.csv").exists()


def test_the_columns_of_maps_are_those_of_their_kind():
    assert kinds.find("methods") is methods.METHODS
    assert methods.METHODS.columns[:4] == ("id", "subject", "target", "method")


# ------------------------------------------------------------------ while it runs


@pytest.mark.slow
def test_another_process_can_follow_a_run_and_cancel_jobs(tmp_path):
    path = scan(tmp_path / "sub-1.nii.gz")
    whole = tables(tmp_path / "out", path, methods=[{"name": "gradient"}, {"name": "saliency"}], summary={})

    def hear(event):
        if (event["event"], event["job"]) == ("start", "sub-1_spot_gradient"):
            journal.cancel(tmp_path / "out" / ".jobs", ["sub-1_spot_saliency"])

    found = pipeline.run(config.load(whole), progress=hear, threads=1)
    assert (found.exit_code, found.counts) == (1, {"done": 2, "cancelled": 1, "skipped": 1})
    told = list(journal.events(tmp_path / "out" / ".jobs"))
    assert told[-1]["event"] == "ended"
    ends = {one["job"]: one["outcome"]["status"] for one in told if one["event"] == "job_done"}
    assert ends == {
        "sub-1_spot_gradient": "done",
        "sub-1_spot_gradient_summary": "done",
        "sub-1_spot_saliency": "cancelled",
        "sub-1_spot_saliency_summary": "skipped",
    }
    assert records(tmp_path / "out")["sub-1_spot_saliency"]["error"] == "it was cancelled"
    again = run(whole)
    assert (again.exit_code, again.repeated, again.counts) == (0, 2, {"done": 4})


def test_an_executor_takes_tasks_while_others_run_and_gives_them_up():
    executor = local.LocalExecutor()
    outcomes = {}
    try:
        executor.submit([Task.of("a", "pool_tasks:wait", 0.1), Task.of("hangs", "pool_tasks:hang")])
        for event in executor.events():
            if (event["event"], event["job"]) == ("begin", "a"):
                executor.submit([Task.of("b", "pool_tasks:wait", 0.0), Task.of("c", "pool_tasks:wait", 60)])
                executor.cancel(["c"])
                with pytest.raises(ValueError, match=r"expected different ids, got \['a'\] more than once"):
                    executor.submit([Task.of("a", "pool_tasks:wait", 0.0)])
            if (event["event"], event["job"]) == ("begin", "hangs"):
                executor.cancel(["hangs", "a"])
            if event["event"] == "job_done":
                outcomes[event["job"]] = event["outcome"].status
    finally:
        executor.close()
    assert outcomes == {"a": "done", "b": "done", "c": "cancelled", "hangs": "cancelled"}


# ------------------------------------------------------------------ what jobs share, and when they start


@pytest.mark.slow
def test_what_jobs_of_an_image_share_is_made_once(tmp_path, monkeypatch):
    """They are one task: an image is read, a network is loaded and asked once, whatever the number of methods."""
    for number in (1, 2):
        scan(tmp_path / f"sub-{number}.nii.gz", seed=number)
    whole = tables(
        tmp_path / "out", tmp_path / "sub-*.nii.gz", methods=[{"name": "gradient"}, {"name": "saliency"}]
    )
    whole["targets"] = [{"name": "spot", "class": 1}, {"name": "rest", "class": 1}]
    asked = config.load(whole)
    submitted = []
    submit = local.LocalExecutor.submit

    def noted(executor, tasks):
        tasks = list(tasks)
        submitted.extend([job.id for job in task.jobs] for task in tasks)
        submit(executor, tasks)

    monkeypatch.setattr(local.LocalExecutor, "submit", noted)
    assert pipeline.run(asked, progress=False, threads=1).counts == {"done": 8}
    assert submitted == [
        [f"sub-{n}_{target}_{method}" for target in ("spot", "rest") for method in ("gradient", "saliency")]
        for n in (1, 2)
    ]
    calls = Counter()

    def counted(module, name):
        real = getattr(module, name)

        def call(*args, **settings):
            calls[name] += 1
            return real(*args, **settings)

        monkeypatch.setattr(module, name, call)

    counted(parts.volumes, "read")
    counted(parts.networks, "load")
    one, cache = jobs.plan(asked)[:4], {}
    answers = []
    monkeypatch.setattr(methods.Inputs, "answer", recording(methods.Inputs.answer, answers))
    for job in one:
        dispatch.main(
            json.loads(json.dumps(job.payload)), Context("cpu", None, None, cache, lambda **event: None)
        )
    assert (calls["read"], calls["load"]) == (1, 1)
    assert len(answers) >= 4
    assert len({id(answer) for answer in answers}) == 1


def recording(function, results):
    def call(*args):
        results.append(function(*args))
        return results[-1]

    return call


@pytest.mark.slow
def test_the_first_job_does_not_wait_until_all_inputs_are_read(tmp_path, monkeypatch):
    """Were they read first, the run would never begin: the others are not read before a job has begun."""
    for number in range(6):
        scan(tmp_path / f"sub-{number}.nii.gz", seed=number)
    begun, read, before = threading.Event(), [], []
    contents = jobs.contents

    def slow(path):
        if Path(path).name.startswith("sub-"):
            if read:
                assert begun.wait(60)
            read.append(Path(path).name)
        return contents(path)

    def hear(event):
        if event["event"] == "begin" and not begun.is_set():
            before.extend(read)
            begun.set()

    monkeypatch.setattr(jobs, "contents", slow)
    asked = config.load(tables(tmp_path / "out", tmp_path / "sub-*.nii.gz", summary={}))
    assert len(jobs.plan(asked)) == 13
    assert read == []  # to plan is to read nothing
    found = pipeline.run(asked, progress=hear, threads=1)
    assert found.counts == {"done": 13}
    assert before == ["sub-0.nii.gz"]
    assert len(read) == 6  # each once


def test_what_goes_wrong_while_inputs_are_read_ends_the_run(tmp_path, monkeypatch):
    path = scan(tmp_path / "sub-1.nii.gz")

    def gone(path):
        raise OSError("the disk is gone")

    monkeypatch.setattr(jobs, "contents", gone)
    with pytest.raises(OSError, match="the disk is gone"):
        run(tables(tmp_path / "out", path))


@pytest.mark.slow
def test_an_unchanged_run_writes_nothing_again(tmp_path, monkeypatch):
    path, folder = scan(tmp_path / "sub-1.nii.gz"), tmp_path / "out"
    whole = tables(folder, path, summary={}, output={"figures": False, "report": True})
    assert run(whole).repeated == 2

    def dates():
        of_a_run = {"log.txt", "events.jsonl", "lock", ".jobs"}
        return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name not in of_a_run}

    before = dates()
    monkeypatch.setattr(local._Worker, "__init__", None)  # nothing is started either
    found = run(whole)
    assert (found.exit_code, found.repeated, found.report) == (0, 0, folder / "report.html")
    assert dates() == before
    (folder / "report.html").write_text("changed by somebody")
    assert run(whole).report == folder / "report.html"
    assert "changed by somebody" not in (folder / "report.html").read_text()


def test_what_was_there_before_is_cleared_away_by_the_worker_before_it_begins(tmp_path, monkeypatch):
    """Whoever only hears of it may hear too late, and clear away what a quick job has just written."""
    seen = []

    def work(payload, inputs, context):
        seen.append(jobs.record_of(tmp_path, "quick"))
        return {}

    monkeypatch.setattr(dispatch, "_kind_of", lambda payload: SimpleNamespace(redraw=None, work=work))
    jobs.write_record(tmp_path, {"id": "quick", "status": "partial"})
    payload = {"id": "quick", "kind": "quick", "folder": str(tmp_path)}
    dispatch.main(payload, Context("cpu", None, None, {}, lambda **event: None))
    assert seen == [None]


def test_kinds_have_one_order_whatever_was_imported_first():
    told = [kind.name for kind in kinds.known()]
    first = dict(sorted(kinds._KINDS.items(), key=lambda item: item[1].work.__module__, reverse=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "_KINDS", first)
        assert list(first) != told
        assert [kind.name for kind in kinds.known()] == told
