"""Tables of regions: every number is that of plain numpy on the files that were written."""

import csv
import json
from collections import deque
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from esegeta.run import pipeline
from esegeta.run.config import loading as config
from esegeta.run.executors.child import Context
from esegeta.run.jobs import dispatch, summary
from esegeta.run.jobs import plan as jobs
from esegeta.run.report import page as report

OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", [10, -25, 40], degrees=True).as_matrix() @ np.diag(
    [-0.7, 1.1, 2.5]
)
OBLIQUE[:3, 3] = [31.0, -12.5, 8.25]
SIZE = (8, 8, 6)


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    monkeypatch.setenv("ESEGETA_TRUST", f"esegeta.zoo,{Path(__file__).parent}")


def save(path, values, affine=OBLIQUE):
    nibabel.Nifti1Image(values, affine).to_filename(path)
    return path


def scan(path, seed=7, channels=1):
    values = np.random.default_rng(seed).standard_normal((*SIZE, channels)).astype(np.float32)
    return save(path, values[..., 0] if channels == 1 else values)


def tables(folder, files, regions, channels=1, **more):
    return {
        "model": {"source": "zoo:small_unet", "arguments": {"ndim": 3, "channels": channels}},
        "input": {"files": str(files), **({"channels": "last"} if channels > 1 else {})},
        "targets": [{"name": "spot", "class": 1}],
        "methods": [{"name": "input_x_gradient"}],
        "summary": {"regions": regions, **more.pop("summary", {})},
        "run": {"output": str(folder)},
        "output": {"figures": False, "report": False},
        **more,
    }


def done(whole):
    """Do all jobs here; the record of the map and that of its regions, and their rows by what they are about."""
    here = Context("cpu", None, None, {}, lambda **event: None)
    made, regions = (
        dispatch.main(json.loads(json.dumps(job.payload)), here) for job in jobs.plan(config.load(whole))
    )
    return made, regions, {(row["of"], row["region"], row["channel"]): row for row in regions["rows"]}


def plain(values, inside, affine, total):
    """The statistics of a region by plain numpy; values (C,*S)."""
    here = values[:, inside]
    found = {
        "sum": here.sum(),
        "mean": here.mean(),
        "share": np.abs(here).sum() / total,
        "min": here.min(),
        "max": here.max(),
        "voxels": inside.sum(),
        "volume_mm3": inside.sum() * 0.7 * 1.1 * 2.5,
    }
    for end, value in (("min", here.min()), ("max", here.max())):
        (index,) = np.argwhere((values == value) & inside)  # the one voxel that has it
        mm = nibabel.affines.apply_affine(affine, index[1:])
        found |= dict(zip((f"{end}_{axis}_mm" for axis in "xyz"), mm, strict=True))
    return found


def same(row, expected):
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


def flood(mask):
    """The face-connected parts, one voxel at a time."""
    left, found = set(map(tuple, np.argwhere(mask))), []
    while left:
        queue, part = deque([left.pop()]), set()
        while queue:
            here = queue.popleft()
            part.add(here)
            for axis in range(mask.ndim):
                for step in (-1, 1):
                    other = (*here[:axis], here[axis] + step, *here[axis + 1 :])
                    if other in left:
                        left.discard(other)
                        queue.append(other)
        found.append(part)
    return found


def test_every_number_of_every_region_and_channel_is_that_of_plain_numpy(tmp_path):
    path = scan(tmp_path / "sub-1.nii.gz", channels=2)
    atlas = np.random.default_rng(1).integers(0, 4, SIZE).astype(np.int16)
    save(tmp_path / "lobes.nii.gz", atlas)
    truth = np.zeros(SIZE, dtype=np.int16)
    truth[2:5, 1:4, 1:5] = 1
    save(tmp_path / "truth.nii.gz", truth)
    whole = tables(
        *(
            tmp_path / "out",
            path,
            ["prediction", "components", "reference", str(tmp_path / "lobes.nii.gz")],
            2,
        ),
        summary={"names": {"2": "temporal"}},
        reference={"files": str(tmp_path / "truth.nii.gz")},
    )
    made, regions, rows = done(whole)
    values = np.moveaxis(nibabel.load(tmp_path / "out" / made["map"]).get_fdata(), -1, 0)
    inside = nibabel.load(tmp_path / "out" / made["prediction"]).get_fdata() > 0
    parts = sorted(flood(inside), key=len, reverse=True)
    assert len(parts) > 1, "a prediction of several parts is what this is about"
    masks = {("prediction", "inside"): inside, ("prediction", "outside"): ~inside}
    masks |= {("reference", "inside"): truth > 0, ("reference", "outside"): truth == 0}
    masks |= {("lobes", str(label)): atlas == label for label in (1, 2, 3)}
    masks[("lobes", "outside")] = atlas == 0
    largest = np.zeros(SIZE, dtype=bool)
    largest[tuple(np.array(list(parts[0])).T)] = True
    if len(parts[0]) > len(parts[1]):
        masks[("components", "1")] = largest
    total = np.abs(values).sum()
    for (of, region), mask in masks.items():
        same(rows[of, region, ""], plain(values, mask, OBLIQUE, total))
        for channel in (0, 1):
            same(rows[of, region, str(channel)], plain(values[channel][None], mask, OBLIQUE, total))
    sizes = [row["voxels"] for (of, _, channel), row in rows.items() if (of, channel) == ("components", "")]
    assert sizes == [len(part) for part in parts]
    assert rows["lobes", "2", ""]["name"] == "temporal"
    assert (regions["status"], regions["events"]) == ("done", [])
    assert rows["prediction", "inside", "0"]["share"] + rows["prediction", "inside", "1"][
        "share"
    ] == pytest.approx(rows["prediction", "inside", ""]["share"])


def test_parts_that_touch_at_an_edge_are_two_and_at_a_face_one():
    mask = np.zeros((4, 4, 4), dtype=bool)
    mask[0, 0, :2] = True
    mask[1, 1, 0] = True  # at an edge only
    mask[3, 3] = True
    found = summary.components(mask)
    assert [int((found == n).sum()) for n in (0, 1, 2)] == [4, 2, 1]
    assert found.max() == 2
    assert (found[~mask] == -1).all()


def test_what_an_empty_region_and_an_unknown_value_have_is_nothing_and_not_zero():
    map = np.array([[1.0, np.nan, -3.0]])
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    known, rest, nothing = summary.of_parts(map, np.array([0, 0, 1]), 3, affine)
    assert (known["sum"], known["share"], known["voxels"], known["volume_mm3"]) == (1.0, 0.25, 2, 4.0)
    assert (rest["min"], rest["min_x_mm"]) == (-3.0, 4.0)
    assert (nothing["sum"], nothing["share"], nothing["voxels"]) == (0.0, 0.0, 0)
    assert {nothing[name] for name in ("mean", "min", "max", "max_x_mm", "min_z_mm")} == {None}
    assert summary.of_parts(0 * map, np.array([0, 0, 0]), 1, affine)[0]["share"] is None


def test_without_a_prediction_or_a_reference_a_region_is_left_out_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("esegeta.run.jobs.parts.predicted", lambda *_: torch.zeros(SIZE, dtype=torch.bool))
    monkeypatch.setattr("esegeta.run.jobs.methods.predicted", lambda *_: torch.zeros(SIZE, dtype=torch.bool))
    path = scan(tmp_path / "sub-1.nii.gz")
    whole = tables(tmp_path / "out", path, ["components", "reference", "prediction"])
    whole["targets"] = [{"name": "spot", "reducer": "class_sum", "class": 1}]
    _, regions, rows = done(whole)
    assert [event["message"] for event in regions["events"]] == [
        "The prediction is empty: it has no components.",
        "There is no reference of sub-1: its regions are left out.",
    ]
    assert list(rows) == [("prediction", "inside", ""), ("prediction", "outside", "")]
    inside, outside = regions["rows"]
    assert (inside["voxels"], inside["mean"], inside["share"], outside["share"]) == (0, None, 0.0, 1.0)


def test_an_atlas_on_another_grid_is_refused_or_resampled_as_asked(tmp_path):
    path = scan(tmp_path / "sub-1.nii.gz")
    coarse = OBLIQUE @ np.diag([2.0, 2.0, 2.0, 1.0])
    values = np.zeros((6, 6, 5), dtype=np.int16)
    values[:2], values[2:4], values[5, 5, 4] = 1, 2, 3
    save(tmp_path / "atlas.nii.gz", values, coarse)
    whole = tables(tmp_path / "out", path, [str(tmp_path / "atlas.nii.gz")])
    with pytest.raises(
        ValueError, match=r'labels: expected .*atlas.nii.gz on the grid \(8, 8, 6\).* Write summary.grid = "nearest"'
    ):  # fmt: skip
        done(whole)
    whole["summary"]["grid"] = "nearest"
    _, _, rows = done(whole)
    assert [region for _, region, _ in rows] == ["1", "2", "3", "outside"]
    assert sum(row["voxels"] for row in rows.values()) == np.prod(SIZE)
    assert rows["atlas", "3", ""]["voxels"] == 0, "what of the atlas is not in the image has a row"
    whole["summary"]["regions"] = [str(tmp_path / "none.nii.gz")]
    with pytest.raises(ValueError, match=r"summary.regions: expected a file that matches .*none.nii.gz"):
        done(whole)
    whole["summary"] = {"grid": "other", "regions": []}
    lines = config.problems(whole)
    assert any(line.startswith('summary.grid: expected "same" or "nearest"') for line in lines)


def test_a_picture_has_voxels_and_no_millimetres(tmp_path):
    np.save(tmp_path / "sub-1.npy", np.random.default_rng(1).random((6, 4)))
    whole = tables(tmp_path / "out", tmp_path / "sub-1.npy", ["prediction"])
    whole["model"]["arguments"]["ndim"] = 2
    _, _, rows = done(whole)
    row = rows["prediction", "outside", ""]
    assert row["voxels"] + rows["prediction", "inside", ""]["voxels"] == 24


@pytest.mark.slow
def test_groups_have_a_row_for_each_region_with_those_that_lack_it_by_name(tmp_path):
    for number in (1, 2, 3):
        scan(tmp_path / f"sub-{number}_T1w.nii.gz", seed=number)
        parts = np.random.default_rng(number).integers(0, 3 if number < 3 else 2, SIZE).astype(np.int16)
        save(tmp_path / f"sub-{number}_dseg.nii.gz", parts)
    (tmp_path / "sub-2_dseg.nii.gz").unlink()
    text = json.dumps(tables("out", "*_T1w.nii.gz", ["*_dseg.nii.gz"]))
    (tmp_path / "study.json").write_text(text)  # patterns are relative to the file
    whole = config.load(tmp_path / "study.json")
    found = pipeline.run(whole, progress=False, threads=1)
    assert found.exit_code == 0
    folder = tmp_path / "out"
    record = json.loads((folder / ".jobs" / "mean_spot_inputXGradient.json").read_text())
    rows = {row["region"]: row for row in record["rows"]}
    assert {region: (row["n"], row["without"]) for region, row in rows.items()} == {
        "1": (2, ["sub-2"]),
        "2": (1, ["sub-2", "sub-3"]),
        "outside": (2, ["sub-2"]),
    }
    told = list(csv.DictReader((folder / "regions.csv").read_text().splitlines()))
    sums = [float(row["sum"]) for row in told if row["region"] == "1"]
    assert rows["1"]["sum"] == pytest.approx(np.mean(sums))
    (lacking,) = [row for row in told if row["subject"] == "sub-2"]
    assert (lacking["status"], lacking["sum"]) == ("done", "")
    # What stands on the page stands in the table.
    page = report.page(folder)
    for row in record["rows"]:
        assert f'data-value="{row["sum"]}"' in page
    assert "There is no label map of sub-2 among dseg: its regions are left out." in page
