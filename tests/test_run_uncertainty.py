"""Uncertainty in a run: maps written where the scan lies, rows for classes, and refusals in words."""

import csv

import nibabel
import numpy as np
import pytest
import torch

import esegeta as eg
from esegeta import uncertainty, zoo
from esegeta.run import pipeline
from esegeta.run.config import loading as config
from esegeta.run.jobs import plan as jobs

SHAPE = (8, 10, 6)
AFFINE = np.diag([2.0, 1.5, 3.0, 1.0])
PUT_IN = {"rate": {"bottom": 0.3}, "samples": 4, "link": "softmax"}
CHANGED = {
    "id": "moved",
    "draws": "augmentation",
    "changes": [{"name": "affine", "degrees": 5.0}, "noise"],
    "samples": 3,
    "map": "variance",
}


def asked(folder, entries, **more):
    for number in (1, 2):
        values = np.random.default_rng(number).random(SHAPE).astype(np.float32)
        nibabel.Nifti1Image(values, AFFINE).to_filename(folder / f"sub-0{number}_T1w.nii.gz")
    return {
        "model": {"source": "zoo:small_unet", "arguments": {"ndim": 3}},
        "input": {"files": str(folder / "sub-*_T1w.nii.gz")},
        "targets": [{"name": "spot", "class": 1}],
        "methods": [{"name": "gradient"}],
        "uncertainty": entries,
        "run": {"output": str(folder / "out"), "key": 3},
        "output": {"figures": False, "nifti": False},
        **more,
    }


@pytest.mark.slow
def test_maps_are_those_of_python_and_lie_where_the_scan_lies(tmp_path):
    entries = [PUT_IN, CHANGED, {"id": "none"}]
    found = config.load(
        asked(tmp_path, entries, output={"figures": True, "nifti": False}), trust=("esegeta.zoo",)
    )
    planned = [job.id for job in jobs.plan(found) if job.kind == "uncertainty"]
    assert len(planned) == 6
    records = {r["id"]: r for r in pipeline.run(found, progress=False).records}
    first = records["sub-01_uncertainty_dropout"]
    assert first["status"] == records["sub-02_uncertainty_moved"]["status"] == "done"
    assert first["draws"] == "dropout put in at bottom (0.3): not Bayesian"
    lost = records["sub-01_uncertainty_none"]  # the network has no dropout
    assert lost["status"] == "refused"
    assert "expected a network that calls dropout" in lost["error"]
    x = torch.from_numpy(nibabel.load(tmp_path / "sub-01_T1w.nii.gz").get_fdata()).float()[None]
    model = uncertainty.dropout(zoo.small_unet(3), rate={"bottom": 0.3})
    alone = uncertainty.monte_carlo(model, samples=4, link="softmax")(x, key=3)
    for name in ("mean", "variance", "entropy", "mutual_information"):
        image = nibabel.load(tmp_path / "out" / first["maps"][name])
        assert np.allclose(image.affine, AFFINE)
        values = torch.from_numpy(image.get_fdata()).float().squeeze()
        expected = getattr(alone, name).movedim(0, -1).squeeze()
        assert torch.allclose(values, expected, atol=1e-5), name
    with (tmp_path / "out" / "uncertainty.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    (row,) = [r for r in rows if r["id"] == "sub-01_uncertainty_dropout" and r["class"] == "1"]
    assert float(row["volume"]) == pytest.approx(float(alone.volumes[:, 1].double().mean()) * 9.0)
    assert float(row["pairwise_dice"]) == pytest.approx(float(alone.pairwise_dice[1]), rel=1e-4)
    assert "Dice of pairs" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / first["figures"]["planes"]).stat().st_size > 1000

    # Another picture of the same numbers is drawn from what is there.
    other = config.load(asked(tmp_path, [{**PUT_IN, "map": "variance"}, CHANGED]), trust=("esegeta.zoo",))
    states = {job.id: state for job, state in jobs.survey(jobs.plan(other), str(tmp_path / "out"))}
    assert states["sub-01_uncertainty_dropout"] != "to do"
    assert states["sub-01_uncertainty_moved"] != "to do"


def test_what_is_wrong_is_told_before_a_run(tmp_path):
    wrong = [
        ({**PUT_IN, "rate": {"bottom": 1.5}}, "rate from 0 to below 1"),
        ({**PUT_IN, "samples": 1}, "at least 2"),
        ({**PUT_IN, "link": "sigmoud"}, "sigmoid"),
        ({**CHANGED, "changes": []}, "at least one change"),
        ({**CHANGED, "changes": ["afine"]}, "Nearest: affine"),
        ({**CHANGED, "changes": ["dropout"]}, "a change of the image"),
        ({**CHANGED, "changes": [{"name": "affine", "degree": 5}]}, "degrees"),
        ({**CHANGED, "rate": {"bottom": 0.1}}, "no rates for changed images"),
        ({**PUT_IN, "changes": ["noise"]}, "no changes of the image for dropout"),
    ]
    for entry, words in wrong:
        with pytest.raises((ValueError, TypeError)) as caught:
            config.load(asked(tmp_path, [entry]), trust=("esegeta.zoo",))
        assert words in str(caught.value), str(caught.value)
    with pytest.raises(ValueError, match="different id"):
        config.load(asked(tmp_path, [PUT_IN, PUT_IN]), trust=("esegeta.zoo",))
    assert eg.uncertainty is uncertainty
