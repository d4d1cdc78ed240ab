"""A table of lesions in a run: the numbers of Python, with uncertainty and atlas, and reasons for what is missing."""

import csv

import nibabel
import numpy as np
import pytest
import torch

import esegeta as eg
from esegeta.run import pipeline
from esegeta.run.config import loading as config
from esegeta.run.executors.child import Context
from esegeta.run.jobs import dispatch
from esegeta.run.jobs import plan as jobs

SHAPE = (9, 8, 7)
AFFINE = np.diag([2.0, 1.0, 1.5, 1.0])
AFFINE[:3, 3] = 10.0, 20.0, 30.0
SPOTS = """
import torch


class Spots(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv3d(2, 2, 1)
        self.drop = torch.nn.Dropout(0.3)
        self.head = torch.nn.Conv3d(2, 1, 3, padding=1)
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(2).reshape(2, 2, 1, 1, 1))
            self.mix.bias.zero_()
            self.head.weight.fill_(0.01)
            self.head.weight[:, :, 1, 1, 1] = torch.tensor([1.0, 0.5])
            self.head.bias.fill_(-1.0)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.mix(x))))
"""


def asked(folder, table, **more):
    module = f"spots_of_{folder.name}"
    (folder / f"{module}.py").write_text(SPOTS)
    values = np.zeros((2, *SHAPE), np.float32)
    values[0, 1:3, 1:3, 1:4] = 3.0
    values[1, 6:8, 5, 4:6] = 4.0
    values += 0.1 * np.random.default_rng(0).random(values.shape, np.float32)
    files = []
    for name, one in zip(("T1w", "FLAIR"), values, strict=True):
        files.append(str(folder / f"sub-1_{name}.nii.gz"))
        nibabel.Nifti1Image(one, AFFINE).to_filename(files[-1])
    atlas = np.zeros(SHAPE, np.uint8)
    atlas[:, 4:] = 7
    nibabel.Nifti1Image(atlas, AFFINE).to_filename(folder / "atlas.nii.gz")
    return {
        "model": {"source": f"{module}:Spots", "path": str(folder)},
        "input": {"files": [files]},
        "targets": [{"name": "lesion", "class": 1}],
        "methods": [{"name": "gradient"}],
        "uncertainty": [{"samples": 4}],
        "table": {
            "per": "component",
            "atlas": str(folder / "atlas.nii.gz"),
            "names": {"7": "back"},
            "features": ["statistics_mean"],
            **table,
        },
        "run": {"output": str(folder / "out"), "key": 3},
        "output": {"figures": False, "nifti": False, "report": False},
        **more,
    }


def described(tables, folder, kinds=("uncertainty", "components")):
    """The record of the table, with the jobs before it; in this process."""
    found = config.load(tables, trust=(str(folder),))
    records = {}
    for job in jobs.plan(found):
        if job.kind in kinds:
            context = Context("cpu", None, None, {}, lambda **event: None)
            records[job.kind] = dispatch.main(dispatch.payload_of(job, found), context)
    return records["components"]


def test_rows_are_those_of_python_at_their_places_in_the_scan(tmp_path):
    record = described(asked(tmp_path, {}), tmp_path)
    scope = {}
    exec(SPOTS, scope)
    net = scope["Spots"]().eval()
    model = eg.from_module(net)
    scans = [nibabel.load(tmp_path / f"sub-1_{name}.nii.gz") for name in ("T1w", "FLAIR")]
    x = torch.stack([torch.from_numpy(scan.get_fdata(dtype=np.float32)) for scan in scans])
    doubt = eg.uncertainty.monte_carlo(eg.uncertainty.dropout(net), samples=4, link="sigmoid")(x, key=3)
    back = torch.zeros(SHAPE, dtype=torch.long)
    back[:, 4:] = 7
    ready = eg.components(model, 1, features=["statistics_mean"])
    expected = ready(
        x,
        baseline=0 * x,
        uncertainty=doubt.entropy[0],
        atlas=back,
        names={7: "back"},
        spacing=(2.0, 1.0, 1.5),
    )
    assert len(record["rows"]) == len(expected) >= 2
    for row, own in zip(record["rows"], expected, strict=True):
        assert (row["component"], row["voxels"], row["region"]) == (own.number, own.voxels, own.region)
        assert row["missing"] == ""
        assert row["volume"] == own.voxels * 3.0
        assert row["uncertainty"] == pytest.approx(own.uncertainty, rel=1e-4)
        assert [row["shapley_T1w"], row["shapley_FLAIR"]] == pytest.approx(list(own.shapley), rel=1e-4)
        assert row["context_share"] == pytest.approx(own.context_share, rel=1e-4)
        assert row["FLAIR_statistics_mean"] == pytest.approx(
            own.radiomics["channel1_statistics_mean"], rel=1e-4
        )
        place = [row[f"centre_{axis}_mm"] for axis in "xyz"]
        assert place == pytest.approx([10 + own.centre[0], 20 + own.centre[1], 30 + own.centre[2]])

    # The same is not done again.
    for changes, state in (({}, "kept"), ({"title": "Lesions"}, "to do"), ({"grid": "nearest"}, "to do")):
        again = jobs.plan(config.load(asked(tmp_path, changes), trust=(str(tmp_path),)))
        states = jobs.survey([job for job in again if job.kind != "methods"], str(tmp_path / "out"))
        assert {job.kind: found for job, found in states}["components"] == state, changes


def test_what_was_not_computed_is_empty_and_says_why(tmp_path):
    tables = asked(tmp_path, {"explained": 1})
    record = described(tables, tmp_path, ("components",))  # the uncertainty has not come
    first, second = record["rows"][:2]
    assert first["uncertainty"] is None
    assert first["missing"] == "uncertainty: there is no result of sub-1_uncertainty_dropout"
    assert second["shapley_T1w"] is second["context_share"] is None
    assert "radiomics: only the 1 largest parts are explained" in second["missing"]
    del tables["uncertainty"]
    tables["table"] = {"per": "component", "features": []}
    record = described(tables, tmp_path)
    assert "the configuration has no [[uncertainty]]" in record["rows"][0]["missing"]
    assert "region: no atlas was given" in record["rows"][0]["missing"]


@pytest.mark.slow
def test_a_run_writes_the_table_and_the_report(tmp_path):
    lost = {"draws": "dropout", "rate": {"nowhere": 0.2}, "samples": 4}
    more = {"output": {"figures": False, "nifti": False, "report": True}, "uncertainty": [lost]}
    found = config.load(asked(tmp_path, {"features": ["statistics_mean"]}, **more), trust=(str(tmp_path),))
    records = {r["id"]: r for r in pipeline.run(found, progress=False).records}
    assert records["sub-1_uncertainty_dropout"]["status"] == "refused"
    assert records["sub-1_lesion_components"]["status"] == "done"  # all the same
    with (tmp_path / "out" / "components.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert rows[0]["component"] == "1"
    assert float(rows[0]["T1w_statistics_mean"]) > 1
    assert float(rows[0]["shapley_T1w"]) > float(rows[0]["shapley_FLAIR"])
    assert rows[0]["missing"] == "uncertainty: there is no result of sub-1_uncertainty_dropout"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Components" in page
    assert "Channels add" in page


def test_what_is_wrong_is_told_before_a_run(tmp_path):
    wrong = [
        ({"per": "lesion"}, "component"),
        ({"bins": 1}, "at least 2"),
        ({"explained": -1}, "at least 0"),
        ({"features": ["statistics_meen"]}, "Nearest: statistics_mean"),
        ({"method": "gradeint"}, "Nearest: gradient"),
        ({"method": {"name": "integrated_gradients", "stepps": 4}}, "steps"),
        ({"baseline": "zeros"}, "zero"),
        ({"names": {"one": "a"}}, "a label, a whole number"),
    ]
    for changes, words in wrong:
        with pytest.raises((ValueError, TypeError)) as caught:
            config.load(asked(tmp_path, changes), trust=(str(tmp_path),))
        assert words in str(caught.value), str(caught.value)
    found = config.load(asked(tmp_path, {"uncertainty": "ensemble"}), trust=(str(tmp_path),))
    with pytest.raises(ValueError, match="called 'ensemble', got dropout"):
        jobs.plan(found)
    nibabel.Nifti1Image(np.ones((3, 3, 3), np.uint8), AFFINE).to_filename(tmp_path / "small.nii.gz")
    with pytest.raises(ValueError, match=r'Write table.grid = "nearest"'):
        described(asked(tmp_path, {"atlas": str(tmp_path / "small.nii.gz")}), tmp_path, ("components",))
