"""A dissection in a run: the numbers of Python over all images, structures from files, and refusals in words."""

import csv

import nibabel
import numpy as np
import pytest
import torch

import esegeta as eg
from esegeta import dissection
from esegeta.cli import main
from esegeta.run.config import loading as config
from esegeta.run.config import toml
from esegeta.run.executors.child import Context
from esegeta.run.jobs import dispatch
from esegeta.run.jobs import plan as jobs

SHAPE = (8, 9, 7)
AFFINE = np.diag([2.0, 1.5, 3.0, 1.0])
PARTS = """
import torch


class Parts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.Conv3d(1, 3, 1)
        self.head = torch.nn.Conv3d(3, 2, 1)
        with torch.no_grad():
            self.parts.weight.copy_(torch.tensor([1.0, -1.0, 0.0]).reshape(3, 1, 1, 1, 1))
            self.parts.bias.zero_()
            self.head.weight.copy_(torch.tensor([[0.0, 0, 0], [1.0, 0, 0]]).reshape(2, 3, 1, 1, 1))
            self.head.bias.copy_(torch.tensor([0.0, -0.5]))

    def forward(self, x):
        return self.head(self.parts(x))
"""
IMAGES = 6


def asked(folder, table, *, images=IMAGES, **more):
    """Channel 0 is the bright ball of each image, channel 1 the dark one, channel 2 nothing."""
    module = f"parts_of_{folder.name}"  # a module is imported once, and each test has a folder
    (folder / f"{module}.py").write_text(PARTS)
    for i in range(images):
        draws = np.random.default_rng(i)
        grid = np.indices(SHAPE)
        centres = [draws.integers(1, [n - 1 for n in SHAPE]) for _ in range(2)]
        balls = [sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= 2 for centre in centres]
        values, own = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.uint8)
        for ball, value, label in zip(balls, (1.0, -1.0), (1, 2), strict=True):
            values[ball], own[ball] = value, label
        nibabel.Nifti1Image(values, AFFINE).to_filename(folder / f"sub-0{i}_T1w.nii.gz")
        nibabel.Nifti1Image(own, AFFINE).to_filename(folder / f"sub-0{i}_dseg.nii.gz")
    return {
        "model": {"source": f"{module}:Parts", "path": str(folder)},
        "input": {"files": str(folder / "sub-*_T1w.nii.gz")},
        "targets": [{"name": "ball", "class": 1}],
        "methods": [{"name": "gradient"}],
        "dissection": {
            "places": ["parts"],
            "concepts": [str(folder / "sub-*_dseg.nii.gz"), "prediction"],
            "names": {"1": "bright", "2": "dark"},
            "quantile": 0.03,
            "permutations": 99,
            **table,
        },
        "run": {"output": str(folder / "out"), "key": 3},
        "output": {"figures": False, "nifti": False, "report": False},
        **more,
    }


def dissected(tables, folder):
    """The record of the dissection alone, or in words why there is none; in this process."""
    found = config.load(tables, trust=(str(folder),))
    (job,) = [job for job in jobs.plan(found) if job.kind == "dissection"]
    context = Context("cpu", None, None, {}, lambda **event: None)
    return dispatch.main(dispatch.payload_of(job, found), context)


def refused(tables, folder):
    with pytest.raises(ValueError, match="expected") as caught:
        dissected(tables, folder)
    return str(caught.value)


def test_channels_that_are_structures_are_found_and_numbers_are_those_of_python(tmp_path):
    tables = asked(tmp_path, {}, output={"figures": True, "nifti": False, "report": True})
    record = dissected(tables, tmp_path)
    assert (record["status"], record["error"]) == ("done", None)
    rows = {(row["channel"], row["concept"]): row for row in record["rows"]}
    assert rows[0, "bright"]["iou"] == rows[1, "dark"]["iou"] == rows[0, "ball (prediction)"]["iou"] == 1.0
    assert rows[0, "bright"]["detector"]
    assert not rows[1, "bright"]["detector"]
    assert record["concepts"] == ["bright", "dark", "ball (prediction)"]

    def item(i):
        image = nibabel.load(tmp_path / f"sub-0{i}_T1w.nii.gz").get_fdata(dtype=np.float32)
        own = torch.from_numpy(nibabel.load(tmp_path / f"sub-0{i}_dseg.nii.gz").get_fdata()).long()
        masks = dissection.labelled(own, {1: "bright", 2: "dark"})
        return torch.from_numpy(image)[None], {**masks, "ball (prediction)": masks["bright"]}

    scope = {}
    exec(PARTS, scope)
    model = eg.from_module(scope["Parts"]())
    alone = dissection.dissect(model, places="parts", quantile=0.03, permutations=99)
    expected = alone([item(i) for i in range(IMAGES)], key=3)
    for row in expected.rows():
        assert rows[row.channel, row.concept]["adjusted"] == pytest.approx(row.adjusted)
        limit = None if row.threshold == float("inf") else pytest.approx(row.threshold)
        assert rows[row.channel, row.concept]["threshold"] == limit
    assert (tmp_path / "out" / record["figures"]["detectors"]).stat().st_size > 1000

    # The same is not done again, another quantile is.
    for changes, state in (({}, "kept"), ({"title": "Other"}, "to do"), ({"quantile": 0.1}, "to do")):
        again = config.load(asked(tmp_path, changes, output=tables["output"]), trust=(str(tmp_path),))
        planned = [job for job in jobs.plan(again) if job.kind == "dissection"]
        assert [s for _, s in jobs.survey(planned, str(tmp_path / "out"))] == [state], changes


@pytest.mark.slow
def test_the_command_dissects_alone_and_says_what_it_found(tmp_path, capsys):
    path = tmp_path / "study.toml"
    tables = asked(tmp_path, {}, output={"figures": True, "nifti": False, "report": True})
    path.write_text(toml.written(tables))
    assert main(["dissect", str(path), "--plain"]) == 0
    said = capsys.readouterr().out
    assert "detectors among 3 channels and 3 concepts" in said
    assert [p.stem for p in (tmp_path / "out" / ".jobs").glob("*.json")] == ["dissection"]
    with (tmp_path / "out" / "dissection.csv").open() as stream:
        written = list(csv.DictReader(stream))
    assert len(written) == 9
    assert written[0]["place"] == "parts"
    assert float(written[0]["iou"]) == 1.0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Most excited by" in page
    assert "detectors of Dissection" in page
    path.write_text(toml.written({k: v for k, v in asked(tmp_path, {}).items() if k != "dissection"}))
    assert main(["dissect", str(path)]) == 2
    assert "expected a configuration with a table [dissection], got none" in capsys.readouterr().err


def test_what_is_wrong_is_told_before_a_run(tmp_path):
    wrong = [
        ({"quantile": 0.0}, "a number between 0 and 1, got 0.0"),
        ({"quantile": 1.0}, "a number between 0 and 1, got 1.0"),
        ({"places": []}, "places"),
        ({"permutations": 0}, "at least 1"),
        ({"null": "swop"}, "swap"),
        ({"names": {"one": "bright"}}, "a label, a whole number"),
        ({"concepts": ["tissues"]}, "a region for classes of intensity"),
        ({"concepts": ["reference"]}, r"a table [reference]"),
    ]
    for changes, words in wrong:
        with pytest.raises((ValueError, TypeError)) as caught:
            config.load(asked(tmp_path, changes), trust=(str(tmp_path),))
        assert words in str(caught.value), str(caught.value)
    found = config.load(
        asked(tmp_path, {}, input={"files": str(tmp_path / "sub-00_T1w.nii.gz")}), trust=(str(tmp_path),)
    )
    with pytest.raises(ValueError, match="expected at least two images, got 1"):
        jobs.plan(found)


def test_label_maps_of_other_grids_and_absent_labels_are_refused(tmp_path):
    said = refused(asked(tmp_path, {"names": {"7": "green"}}), tmp_path)
    assert "expected the label 7 of 'green' in one of the label maps, got 1, 2 in them" in said
    atlas = np.zeros((4, 9, 7), np.uint8)
    atlas[:2] = 3
    coarse = np.diag([4.0, 1.5, 3.0, 1.0])
    coarse[0, 3] = 1.0
    nibabel.Nifti1Image(atlas, coarse).to_filename(tmp_path / "atlas.nii.gz")
    table = {"concepts": [str(tmp_path / "atlas.nii.gz")], "names": {}}
    assert 'Write dissection.grid = "nearest"' in refused(asked(tmp_path, table), tmp_path)
    record = dissected(asked(tmp_path, {**table, "grid": "nearest", "null": "none"}), tmp_path)
    assert (record["status"], record["concepts"]) == ("done", ["atlas 3"])
    assert "expected" in refused(asked(tmp_path, {"places": ["part"]}), tmp_path)


def test_an_image_without_a_label_map_is_left_out(tmp_path):
    tables = asked(tmp_path, {"within": "prediction", "concepts": ["tissues"], "names": {}, "tissues": 2})
    assert "different intensities" in refused(tables, tmp_path)  # a ball of one intensity
    tables = asked(tmp_path, {})
    (tmp_path / "sub-03_dseg.nii.gz").unlink()
    record = dissected(tables, tmp_path)
    assert record["status"] == "done"
    assert record["subjects"] == [f"sub-0{i}" for i in range(IMAGES) if i != 3]
    assert record["events"][0]["message"].startswith("sub-03 is left out")
    for i in range(1, IMAGES):
        (tmp_path / f"sub-0{i}_dseg.nii.gz").unlink(missing_ok=True)
    tables["dissection"]["concepts"] = [str(tmp_path / "sub-00_dseg.nii.gz")]
    tables["dissection"]["concepts"] = [str(tmp_path / "sub-0[0-1]_dseg.nii.gz")]
    assert "at least two images" in refused(tables, tmp_path)
