"""Dreams in a run: written where the scan lies, kept, and refused in words."""

import csv

import nibabel
import numpy as np
import pytest
import torch

import esegeta as eg
from esegeta import dreams, zoo
from esegeta.cli import main
from esegeta.run import pipeline
from esegeta.run.config import loading as config
from esegeta.run.jobs import plan as jobs

SHAPE = (8, 10, 6)
AFFINE = np.diag([2.0, 1.5, 3.0, 1.0])


def asked(folder, entries, **more):
    for number in (1, 2):
        values = np.random.default_rng(number).random(SHAPE).astype(np.float32)
        nibabel.Nifti1Image(values, AFFINE).to_filename(folder / f"sub-0{number}_T1w.nii.gz")
    return {
        "model": {"source": "zoo:small_unet", "arguments": {"ndim": 3}},
        "input": {"files": str(folder / "sub-*_T1w.nii.gz")},
        "targets": [{"name": "spot", "class": 1}],
        "methods": [{"name": "gradient"}],
        "dreams": entries,
        "run": {"output": str(folder / "out"), "key": 3},
        "output": {"figures": False, "nifti": False},
        **more,
    }


CHANNEL = {
    "objective": {"name": "channel", "place": "encoder.relu", "channel": 1},
    "recipe": "layer_visualisation",
    "parameters": {"steps": 3},
    "sigma": 0.5,
}
BRIGHT = {
    "id": "more",
    "objective": {"name": "class_region", "target": 1},
    "recipe": "accentuation",
    "parameters": {"steps": 2, "jitter": 0},
    "start": "image",
}


def test_dreams_are_what_they_are_in_python_and_lie_where_the_scan_lies(tmp_path):
    found = config.load(asked(tmp_path, [CHANNEL, BRIGHT]), trust=("esegeta.zoo",))
    planned = [job.id for job in jobs.plan(found) if job.kind == "dreams"]
    assert planned == ["sub-01_dream_channel", "sub-01_dream_more", "sub-02_dream_more"]
    records = {r["id"]: r for r in pipeline.run(found, progress=False).records}
    assert {records[job]["status"] for job in planned} == {"done"}
    image = nibabel.load(tmp_path / "out" / records["sub-01_dream_channel"]["image"])
    assert np.allclose(image.affine, AFFINE)
    model = eg.from_module(zoo.small_unet(3))
    objective = dreams.objectives.channel(model, "encoder.relu", 1)
    start = dreams.starts.noise((1, *SHAPE), sigma=0.5)
    alone = dreams.recipes.layer_visualisation(objective, start, steps=3)(key=3)
    assert torch.allclose(torch.from_numpy(image.get_fdata()).float(), alone.image[0], atol=1e-5)
    assert records["sub-01_dream_channel"]["value"] == pytest.approx(float(alone.value), rel=1e-4)
    with (tmp_path / "out" / "dreams.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["dream"] for row in rows] == ["channel", "more", "more"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Dreams" in page

    # Another dream leaves those that are there as they are.
    more = config.load(asked(tmp_path, [{**CHANNEL, "id": "other"}, CHANNEL, BRIGHT]), trust=("esegeta.zoo",))
    states = {job.id: state for job, state in jobs.survey(jobs.plan(more), str(tmp_path / "out"))}
    assert states["sub-01_dream_channel"] == states["sub-02_dream_more"] == "kept"
    assert states["sub-01_dream_other"] == "to do"


def test_what_is_wrong_with_a_dream_is_said_before_a_run(tmp_path):
    wrong = [
        ({**CHANNEL, "objective": {"name": "chanel", "place": "x", "channel": 1}}, "Nearest: channel"),
        ({**CHANNEL, "objective": {"name": "channel", "place": "x"}}, "channel"),
        ({**CHANNEL, "recipe": "natkar"}, "natekar"),
        ({**CHANNEL, "parameters": {"stepps": 3}}, "steps"),
        ({**CHANNEL, "objective": "diversity"}, "one image"),
        ({**CHANNEL, "sigma": -1.0}, "sigma"),
        ({**CHANNEL, "start": "nothing"}, "start"),
    ]
    for entry, words in wrong:
        with pytest.raises((ValueError, TypeError)) as caught:
            config.load(asked(tmp_path, [entry]), trust=("esegeta.zoo",))
        assert words in str(caught.value), str(caught.value)
    with pytest.raises(ValueError, match="different id"):
        config.load(asked(tmp_path, [CHANNEL, CHANNEL]), trust=("esegeta.zoo",))


@pytest.mark.slow
def test_an_unknown_place_fails_in_words(tmp_path):
    lost = {**CHANNEL, "objective": {"name": "channel", "place": "encodr.relu", "channel": 1}}
    found = config.load(asked(tmp_path, [lost]), trust=("esegeta.zoo",))
    records = {r["id"]: r for r in pipeline.run(found, progress=False).records}
    assert records["sub-01_dream_channel"]["status"] == "refused"
    assert "encoder.relu" in records["sub-01_dream_channel"]["error"]


def test_objectives_and_recipes_are_listed(capsys):
    assert main(["methods"]) in (0, None)
    said = capsys.readouterr().out
    assert "local_group" in said
    assert "natekar" in said
