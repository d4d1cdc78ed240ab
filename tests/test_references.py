"""Images whose sizes a network does not take, and ground truths that are given: padded, cropped back, resampled."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

import esegeta as eg
from esegeta import zoo
from esegeta.run.config import loading as config
from esegeta.run.executors.child import Context
from esegeta.run.jobs import dispatch
from esegeta.run.jobs import plan as jobs
from esegeta.run.jobs.inputs import Inputs
from esegeta.run.volumes import labels, padding, preprocess
from esegeta.run.volumes.reading import UnreadableInput, Volume

OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", [10, -25, 40], degrees=True).as_matrix() @ np.diag(
    [-0.7, 1.1, 2.5]
)
OBLIQUE[:3, 3] = [31.0, -12.5, 8.25]
SIZE = (9, 7, 6)


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    monkeypatch.setenv("ESEGETA_TRUST", f"esegeta.zoo,{Path(__file__).parent}")


@pytest.fixture
def scan(tmp_path):
    values = np.random.default_rng(3).standard_normal(SIZE).astype(np.float32)
    path = tmp_path / "sub-07_T1w.nii.gz"
    nibabel.Nifti1Image(values, OBLIQUE).to_filename(path)
    return path


def tables(folder, scan, *, patches="whole", reference=None, **given):
    return {
        "model": {"source": "zoo:small_unet", "arguments": {"ndim": 3, "classes": 3}},
        "input": {"files": str(scan), **given},
        "targets": [{"name": "spot", "class": 1}],
        "methods": [{"name": "gradient", "patches": patches}],
        **({"patches": {"size": 4}} if patches != "whole" else {}),
        **({"reference": reference} if reference else {}),
        "run": {"output": str(folder)},
        "output": {"figures": False, "report": False},
    }


def here():
    return Context("cpu", None, None, {}, lambda **event: None)


def done(whole):
    """Do the first job of a configuration; its record and what a job beside it may read."""
    job = jobs.plan(config.load(whole))[0]
    payload = json.loads(json.dumps(job.payload))
    return dispatch.main(payload, here()), Inputs(payload, here())


class Pooled(nn.Module):
    """A U-Net that halves the plane twice and the last axis not at all."""

    def __init__(self, looks=False):
        super().__init__()
        self.looks = looks

    def forward(self, x):
        if self.looks and x.sum().item() == 1e9:
            return x
        small = nn.functional.max_pool3d(x, (4, 4, 1))
        return nn.functional.interpolate(small, scale_factor=(4, 4, 1)) + x


# ------------------------------------------------------------------ sizes that do not fit


def test_multiples_are_found_for_each_axis_with_and_without_values():
    x, flat = torch.zeros(1, 9, 8, 5), torch.zeros(1, 9)
    assert padding.multiples(eg.from_module(Pooled()), x) == (4, 4, 1)
    assert padding.multiples(eg.from_module(Pooled(looks=True)), x) == (4, 4, 1)
    # 61 padded to 64 is a multiple of 4 and of 2, too: it is the network's own one that is told.
    halves = nn.Sequential(*(nn.MaxPool1d(2) for _ in range(3)), nn.Upsample(scale_factor=8))
    assert padding.multiples(eg.from_module(halves), torch.zeros(1, 61)) == (8,)
    window = nn.Sequential(nn.Unflatten(-1, (-1, 7)), nn.Flatten(-2))
    assert padding.multiples(eg.from_module(window), flat) == (7,)
    # What no size mends is no matter of padding, and what answers without a grid takes every one.
    assert padding.multiples(eg.from_module(nn.Conv1d(2, 1, 3)), flat) is None
    assert padding.multiples(eg.from_module(nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten())), flat) == (
        1,
    )
    # A network whose answer is always smaller is not padded for ever.
    assert padding.multiples(eg.from_module(nn.Conv1d(1, 1, 3)), flat) == (1,)


@pytest.mark.parametrize(
    "steps", [[], [{"step": "reorient", "to": "LPS"}, {"step": "crop", "box": [[0, 7], [1, 6], [0, 5]]}]]
)
def test_a_scan_is_padded_for_the_network_and_its_map_lies_on_the_file(tmp_path, scan, steps):
    record, inputs = done(tables(tmp_path / "auto", scan, pad="auto", preprocess=steps))
    by_hand, _ = done(tables(tmp_path / "step", scan, preprocess=[*steps, {"step": "pad", "multiple": 2}]))
    *_, last = record["preprocess"]
    assert (last["step"], last["multiple"], last["found"]) == ("pad", [2, 2, 2], "auto")
    sidecar = json.loads((tmp_path / "auto" / record["map"].replace(".nii.gz", ".json")).read_text())
    assert sidecar["preprocess"] == record["preprocess"]
    map, other = (nibabel.load(tmp_path / name / record["map"]) for name in ("auto", "step"))
    np.testing.assert_array_equal(map.affine, nibabel.load(scan).affine)
    assert map.shape == SIZE
    np.testing.assert_allclose(map.get_fdata(), other.get_fdata(), rtol=1e-5, atol=1e-7)
    assert by_hand["score"] == pytest.approx(record["score"])
    assert np.abs(map.get_fdata()).max() > 0
    # What a voxel of the network sees is at the same place in mm.
    prepared, volume = inputs.image().prepared, inputs.image().volume
    shift = np.linalg.inv(volume.affine) @ prepared.affine
    assert prepared.data.shape[1:] == inputs.prediction("network").shape
    assert inputs.prediction().shape == SIZE
    where = np.argwhere(np.ones(SIZE if not steps else (7, 5, 5))).T - np.array(last["box"])[:, :1]
    there = (shift[:3, :3] @ where + shift[:3, 3:]).round().astype(int)
    seen, file = inputs.prediction("network").numpy(), inputs.prediction().numpy()
    assert 0 < seen.sum() < seen.size
    np.testing.assert_array_equal(file[tuple(there)], seen[tuple(where)])
    assert file.sum() == file[tuple(there)].sum()


def test_a_size_that_does_not_fit_is_refused_with_what_to_write(tmp_path, scan):
    whole = tables(tmp_path / "out", scan)
    advice = r'Write pad = "auto" in \[input\], or the step \{ step = "pad", multiple = 2 \}'
    with pytest.raises(
        ValueError, match=r"input.preprocess: expected an image of sizes that .* " + advice
    ) as told:
        done(whole)
    assert "\n" not in str(told.value)
    (job,) = jobs.plan(config.load(whole))
    found = dispatch.examine([json.loads(json.dumps(job.payload))], here())
    assert "multiple = 2 }" in found[job.id]["problem"]
    whole = tables(tmp_path / "out", scan, patches="stitched", pad="auto")
    whole["patches"]["size"] = [5, 4, 3]
    with pytest.raises(ValueError, match=r"patches.size: .* Write size = \[6, 4, 4\] in \[patches\]"):
        done(whole)
    # A network that wants other channels is not helped by padding, and nothing says that it is.
    whole = tables(tmp_path / "out", scan)
    whole["model"]["arguments"]["channels"] = 2
    with pytest.raises(RuntimeError, match="to have 2 channels, but got 1 channels"):
        done(whole)


def test_a_sliding_window_takes_every_size_and_pictures_are_padded_too(tmp_path, scan):
    record, _ = done(tables(tmp_path / "out", scan, patches="stitched", pad="auto"))
    map = nibabel.load(tmp_path / "out" / record["map"])
    assert (map.shape, record["preprocess"]) == (SIZE, [])
    np.testing.assert_array_equal(map.affine, nibabel.load(scan).affine)
    np.save(tmp_path / "sub-1.npy", np.random.default_rng(1).random((11, 6)))
    whole = tables(tmp_path / "flat", tmp_path / "sub-1.npy", pad="auto")
    whole["model"]["arguments"]["ndim"] = 2
    record, inputs = done(whole)
    assert nibabel.load(tmp_path / "flat" / record["map"]).shape == (11, 6)
    assert inputs.image().x.shape == (1, 12, 6)
    whole["input"]["pad"] = "always"
    with pytest.raises(ValueError, match=r"input.pad: expected \"auto\""):
        config.load(whole)


# ------------------------------------------------------------------ label maps


def slow_onto(labels, shape, affine):
    """Each voxel by itself, in mm."""
    found = np.zeros(shape, dtype=int)
    for index in np.ndindex(*shape):
        mm = affine[:3, : len(shape)] @ index + affine[:3, 3]
        own = np.linalg.solve(labels.affine[:3, :3], mm - labels.affine[:3, 3])
        size = (*labels.data.shape[1:], 1, 1)[:3]
        near = np.floor(own + 0.5 + 1e-9).astype(int)
        if all(0 <= i < n for i, n in zip(near, size, strict=True)):
            found[index] = labels.data[0].numpy()[tuple(near[: labels.data.ndim - 1])]
    return found


@pytest.mark.parametrize("shape", [(4,), (5, 4), (5, 4, 3)])
def test_labels_come_to_another_grid_by_the_place_of_each_voxel(shape):
    rng = np.random.default_rng(len(shape))
    own = tuple(n + 2 for n in shape)
    values = torch.from_numpy(rng.integers(0, 9, own)).float()[None]
    turn = OBLIQUE if len(shape) == 3 else np.diag([1.5, -0.8, 1.0, 1.0])
    given = Volume(values, turn, (1.0,) * len(shape))
    other = turn @ np.diag([0.8, 1.3, 0.9, 1.0])
    other[:3, 3] += turn[:3, 0]
    np.testing.assert_array_equal(labels.onto(given, shape, other), slow_onto(given, shape, other))
    np.testing.assert_array_equal(labels.onto(given, own, turn), values[0])
    with pytest.raises(UnreadableInput, match=r'expected a label map on the grid .* Write atlas = "nearest"'):
        labels.onto(given, shape, other, "same", "atlas")


def label_file(path, affine=OBLIQUE, shape=SIZE, seed=5):
    values = np.random.default_rng(seed).integers(0, 4, shape).astype(np.int16)
    nibabel.Nifti1Image(values, affine).to_filename(path)
    return values


def test_a_reference_is_written_beside_the_maps_and_read_on_both_grids(tmp_path, scan):
    values = label_file(tmp_path / "sub-07_dseg.nii.gz")
    (tmp_path / "sub-08_T1w.nii.gz").write_bytes(scan.read_bytes())
    reference = {"files": str(tmp_path / "*_dseg.nii.gz"), "labels": {"spot": [1, 3]}}
    steps = [{"step": "reorient", "to": "LPS"}]
    whole = tables(
        tmp_path / "out", tmp_path / "*_T1w.nii.gz", pad="auto", preprocess=steps, reference=reference
    )
    record, inputs = done(whole)
    written = nibabel.load(tmp_path / "out" / record["reference"])
    np.testing.assert_array_equal(written.get_fdata(), np.isin(values, (1, 3)))
    np.testing.assert_array_equal(written.affine, nibabel.load(scan).affine)
    said = json.loads((tmp_path / "out" / record["reference"].replace(".nii.gz", ".json")).read_text())
    assert said == {"Type": "ROI", "labels": {"1": "spot"}, "made_of": [1, 3]}
    seen = nibabel.load(tmp_path / "out" / record["prediction"]).get_fdata()
    np.testing.assert_array_equal(inputs.prediction(), seen > 0)
    np.testing.assert_array_equal(inputs.reference(), np.isin(values, (1, 3)))
    image = inputs.image()
    volume = Volume(torch.from_numpy(values).float()[None], image.volume.affine, image.volume.spacing)
    by_steps = preprocess.apply(volume, [*steps, {"step": "pad", "multiple": 2}]).data[0]
    np.testing.assert_array_equal(inputs.reference("network"), np.isin(by_steps, (1, 3)))
    # It does not decide about the map: another one is drawn anew, and another table of regions made.
    one, two = jobs.plan(config.load(whole))
    before = (one.digest, one.look, one.given["reference"]()["decides"])
    label_file(tmp_path / "sub-07_dseg.nii.gz", seed=6)
    other = jobs.plan(config.load(whole))[0]
    after = (other.digest, other.look, other.given["reference"]()["decides"])
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]
    again = dispatch.main(json.loads(json.dumps({**other.payload, "redraw": True})), here())
    written = nibabel.load(tmp_path / "out" / again["reference"]).get_fdata()
    assert written.sum() not in (0, np.isin(values, (1, 3)).sum())
    assert again["seconds"] == record["seconds"]
    # A subject without one has none, and says so.
    lacking = dispatch.main(json.loads(json.dumps(two.payload)), here())
    assert lacking["reference"] is None
    assert lacking["events"][-1]["message"] == "There is no reference of sub-08: no file of its name."
    assert Inputs(two.payload, here()).reference() is None


def test_a_reference_on_another_grid_is_refused_or_resampled_as_asked(tmp_path, scan):
    coarse = OBLIQUE @ np.diag([2.0, 2.0, 2.0, 1.0])
    values = label_file(tmp_path / "truth.nii.gz", coarse, (5, 4, 3))
    reference = {"files": str(tmp_path / "truth.nii.gz")}  # the one of the one image, whatever its name
    whole = tables(tmp_path / "out", scan, pad="auto", reference=reference)
    with pytest.raises(
        ValueError, match=r'labels: expected .*truth.nii.gz on the grid \(9, 7, 6\) .* got shape \(5, 4, 3\). '
        r'Write reference.grid = "nearest"',
    ):  # fmt: skip
        done(whole)
    whole["reference"]["grid"] = "nearest"
    record, inputs = done(whole)
    written = nibabel.load(tmp_path / "out" / record["reference"]).get_fdata()
    like = Volume(torch.from_numpy(values).float()[None], coarse, (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(written, slow_onto(like, SIZE, OBLIQUE) == 1)
    assert inputs.reference().any()


def test_what_is_wrong_with_a_reference_is_told_before_a_run(tmp_path, scan):
    label_file(tmp_path / "sub-9_dseg.nii.gz")
    label_file(tmp_path / "sub-8_dseg.nii.gz")

    def faults(**reference):
        return config.problems(tables(tmp_path / "out", scan, reference=reference))

    pattern = str(tmp_path / "*_dseg.nii.gz")
    (line,) = faults(files=pattern)
    assert line.startswith(
        "reference.files: expected label maps of the same subjects as the images, got sub-8_dseg"
    )
    (line,) = faults(files=str(tmp_path / "none*"))
    assert line.startswith("reference.files: expected a file that matches")
    (line,) = faults(files=str(tmp_path / "sub-8_dseg.nii.gz"), labels={"spt": 1})
    assert line == "reference.labels: expected names of targets, got 'spt'. Nearest: spot."
    whole = tables(tmp_path / "out", scan, reference={"files": str(tmp_path / "sub-8_dseg.nii.gz")})
    whole["targets"] = [{"name": "all", "reducer": "class_sum", "parameters": {"target": 1}}]
    assert config.problems(whole) == []
    whole["targets"] = [{"name": "bright", "reducer": "uncertainty"}]
    (line,) = config.problems(whole)
    assert line.startswith(
        "reference.labels: expected a label of the target bright, got nothing. Add labels = {"
    )
    np.save(tmp_path / "sub-07.npy", np.full(SIZE, 0.5))
    with pytest.raises(UnreadableInput, match=r"sub-07.npy to hold whole numbers, got 0.5 among its values"):
        labels.read(tmp_path / "sub-07.npy")


def test_rules_of_a_stitched_score_are_run_as_a_script_would(tmp_path, scan):
    whole = tables(tmp_path / "out", scan, patches="stitched")
    ruled = [
        {"name": "guided_backprop", "patches": "stitched"},
        {"name": "deep_lift", "baseline": "zero", "patches": "stitched"},
        {"name": "lrp", "patches": "stitched"},
    ]
    layer = {"name": "grad_cam", "place": "bottom", "patches": "stitched"}
    whole["methods"] = [*ruled, layer]
    planned = jobs.plan(config.load(whole))
    model = eg.models.sliding_window(eg.from_module(zoo.small_unet(3, classes=3)), 4)
    x = torch.from_numpy(nibabel.load(scan).get_fdata(dtype=np.float32))[None]
    score = eg.reducers.predicted_class_sum(model, 1, at=x)
    by_hand = [eg.guided_backprop(score)(x), eg.deep_lift(score)(x, 0 * x), eg.lrp(score)(x)]
    by_hand.append(eg.upsample(eg.grad_cam(score, "bottom")(x), like=x))
    for job, expected in zip(planned, by_hand, strict=True):
        record = dispatch.main(json.loads(json.dumps(job.payload)), here())
        map = nibabel.load(tmp_path / "out" / record["map"]).get_fdata()
        np.testing.assert_allclose(map, expected[0], rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
        if job.method == "deep_lift":
            assert abs(record["residual"]) < 1e-3 * abs(record["difference"])
