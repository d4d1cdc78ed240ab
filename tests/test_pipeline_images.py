"""Whole jobs, in this process, on images of every kind: where maps lie, what files hold, what decides about them."""

import gzip
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from esegeta.run import pipeline
from esegeta.run.config import loading as config
from esegeta.run.executors import local as pool
from esegeta.run.executors.child import Context, one_line, verdict
from esegeta.run.jobs import dispatch, methods, outputs
from esegeta.run.jobs import plan as jobs
from esegeta.run.report import page as report
from esegeta.zoo.volumes import DATA

CLASSES = [{"name": "lesion", "class": 1}, {"name": "rest", "class": 0}]


def tables(folder, files, **changes):
    """A configuration; ``changes`` replace its tables."""
    return {
        "model": {"source": "zoo:small_unet", "arguments": {"ndim": 3}},
        "input": {"files": str(files)},
        "targets": CLASSES[:1],
        "methods": [{"name": "input_x_gradient"}],
        "run": {"output": str(folder / "out"), "baseline": "zero"},
        "output": {"figures": False, "report": False},
        **changes,
    }


def done(whole):
    """Do all jobs of a configuration here; their records."""
    planned = jobs.plan(config.load(whole))
    here = Context("cpu", None, None, {}, lambda **event: None)
    return [dispatch.main(json.loads(json.dumps(job.payload)), here) for job in planned]


def planned(whole):
    """The first job of a configuration."""
    return jobs.plan(config.load(whole))[0]


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    """The networks of these tests lie beside them, whatever the current folder is."""
    monkeypatch.setenv("ESEGETA_TRUST", f"esegeta.zoo,{Path(__file__).parent}")


@pytest.fixture
def oblique(tmp_path):
    """A scan that is rotated, anisotropic and left-handed; one voxel of it is far brighter than all others."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix() @ np.diag(
        [-0.7, 1.1, 2.5]
    )
    affine[:3, 3] = [31.0, -12.5, 8.25]
    assert np.linalg.det(affine[:3, :3]) < 0
    values = np.random.default_rng(3).random((18, 14, 10)).astype(np.float32)
    values[12, 3, 7] = 60.0
    path = tmp_path / "sub-07_T1w.nii.gz"
    image = nibabel.Nifti1Image(values, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
    return path


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [{"step": "reorient", "to": "LPS"}, {"step": "pad", "multiple": 8}],
        [{"step": "reorient", "to": "RAS"}, {"step": "fit", "shape": [20, 16, 14]}],
        [{"step": "resample", "spacing": [1, 1, 1]}, {"step": "pad", "multiple": 2}],
    ],
    ids=["as it is", "turned and padded", "turned and fitted", "resampled"],
)
def test_maps_of_an_oblique_left_handed_scan_lie_at_the_same_millimetres(tmp_path, oblique, steps):
    whole = tables(tmp_path, oblique, input={"files": str(oblique), "preprocess": steps})
    (record,) = done(whole)
    scan, map = nibabel.load(oblique), nibabel.load(tmp_path / "out" / record["map"])
    np.testing.assert_array_equal(map.affine, scan.affine)
    np.testing.assert_array_equal(map.get_sform(), scan.get_sform())
    np.testing.assert_array_equal(map.get_qform(), scan.get_qform())
    assert map.header.get_xyzt_units()[0] == "mm"
    assert map.shape == scan.shape
    # Input times gradient is largest where the scan is far brighter than anywhere else.
    peak = np.unravel_index(np.abs(map.get_fdata()).argmax(), map.shape)
    apart = nibabel.affines.apply_affine(map.affine, peak) - nibabel.affines.apply_affine(
        scan.affine, [12, 3, 7]
    )
    assert np.linalg.norm(apart) <= (2.6 if steps and steps[0]["step"] == "resample" else 1e-6)
    anatomy = nibabel.load(tmp_path / "out" / record["anatomy"])
    np.testing.assert_array_equal(anatomy.get_fdata(), scan.get_fdata())
    np.testing.assert_array_equal(anatomy.affine, scan.affine)


def test_two_classes_side_by_side_share_the_image_and_have_masks_of_labels(tmp_path, oblique):
    whole = tables(
        tmp_path,
        oblique,
        targets=CLASSES,
        methods=[{"name": "integrated_gradients", "parameters": {"steps": 4}}],
    )
    whole["model"]["arguments"] = {"ndim": 3, "classes": 3, "key": 2}
    whole["input"]["preprocess"] = [{"step": "pad", "multiple": 4}]
    one, two = done(whole)
    assert one["anatomy"] == two["anatomy"]
    assert one["map"] != two["map"]
    masks = [nibabel.load(tmp_path / "out" / record["prediction"]) for record in (one, two)]
    for mask in masks:
        assert mask.get_data_dtype() == np.uint8
        assert set(np.unique(mask.dataobj)) <= {0, 1}
    assert not (np.asarray(masks[0].dataobj) & np.asarray(masks[1].dataobj)).any(), "one class for each voxel"
    maps = [nibabel.load(tmp_path / "out" / record["map"]).get_fdata() for record in (one, two)]
    assert np.abs(maps[0] - maps[1]).max() > 0


def test_the_sum_that_is_kept_is_that_of_the_score_on_any_grid(tmp_path, oblique):
    steps = [{"step": "resample", "spacing": [0.9, 0.9, 0.9]}, {"step": "pad", "multiple": 4}]
    whole = tables(tmp_path, oblique, input={"files": str(oblique), "preprocess": steps})
    whole["methods"] = [{"name": "deep_lift"}]
    whole["targets"] = [{"name": "lesion", "reducer": "class_sum", "class": 1}]
    (record,) = done(whole)
    assert record["sum"] == pytest.approx(
        nibabel.load(tmp_path / "out" / record["map"]).get_fdata().sum(), rel=1e-4
    )
    # What is on voxels that padding made is dropped; they are zero here, as the baseline is.
    tolerance = 1e-3 * abs(record["difference"])
    assert record["sum_kept"] == pytest.approx(record["difference"] + record["residual"], abs=tolerance)


@pytest.mark.parametrize(
    ("method", "share"),
    [
        (
            {
                "name": "shapley_sampling",
                "parameters": {"features": {"name": "grid", "size": 6}, "samples": 2},
            },
            1e-4,
        ),
        (
            {"name": "kernel_shap", "parameters": {"features": {"name": "grid", "size": 6}, "samples": 40}},
            1e-3,
        ),
        (
            {
                "name": "partition_shap",
                "parameters": {"features": {"name": "windows", "size": 9, "stride": 5}},
            },
            None,
        ),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_the_value_of_a_part_counts_once_in_the_residual(tmp_path, oblique, method, share):
    whole = tables(tmp_path, oblique, methods=[method])
    whole["input"]["preprocess"] = [{"step": "fit", "shape": 12}]
    (record,) = done(whole)
    if share is None:
        assert (record["residual"], record["difference"]) == (None, None)
    else:
        assert abs(record["residual"]) < share * abs(record["difference"])
        assert abs(record["sum"]) > 10 * abs(record["difference"]), (
            "a value stands at every element of its part"
        )


def test_a_mask_stays_a_mask_and_the_share_of_a_voxel_is_less_where_voxels_are_smaller(tmp_path, oblique):
    methods = [
        {"name": "extremal_perturbation", "parameters": {"steps": 2, "area": 0.3}},
        {"name": "occlusion", "parameters": {"size": 4, "stride": 4}},
        {"name": "gradient"},
    ]
    whole = tables(tmp_path, oblique, methods=methods)
    maps = {}
    for shape in ([18, 14, 10], [36, 28, 20]):
        values = np.asarray(nibabel.load(oblique).dataobj)
        path = oblique.with_name(f"sub-{shape[0]}.nii.gz")
        factor = shape[0] // 18
        finer = np.kron(values, np.ones((factor,) * 3, np.float32))
        nibabel.Nifti1Image(finer, np.diag([1 / factor] * 3 + [1])).to_filename(path)
        whole["input"] = {"files": str(path), "preprocess": [{"step": "resize", "shape": [18, 14, 10]}]}
        for record in done(whole):
            maps[record["method"], factor] = record
    for name, how, ratio in (
        ("extremal_perturbation", "values", 1),
        ("occlusion", "values", 1),
        ("gradient", "density", 8),
    ):
        coarse, fine = maps[name, 1], maps[name, 2]
        assert coarse["regridding"] == fine["regridding"] == how
        # Twice as many voxels along each axis: interpolation lowers peaks, but not eightfold.
        assert 0.3 < ratio * fine["max"] / coarse["max"] <= 1.001, name


def test_a_picture_is_explained_and_its_map_has_its_rows_and_columns(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    picture = np.random.default_rng(5).integers(0, 255, (24, 16, 3), dtype=np.uint8)
    pil.fromarray(picture).save(tmp_path / "cat.png")
    whole = tables(tmp_path, tmp_path / "*.png", targets=[{"name": "two", "reducer": "logit", "class": 2}])
    whole["model"] = {"source": "zoo:small_classifier", "arguments": {"ndim": 2, "channels": 3}}
    whole["input"]["preprocess"] = [{"step": "normalise", "how": "fixed", "std": 255}]
    whole["output"]["figures"] = True
    record, drawn = done(whole)
    assert record["prediction"] is None, "a classifier predicts no place"
    map = nibabel.load(tmp_path / "out" / record["map"])
    assert map.shape[:2] == (24, 16)
    figures = drawn["figures"][record["id"]]
    assert set(figures) >= {"overlay"}
    for name in figures.values():
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"


def test_what_is_told_about_reading_reaches_the_worker_and_the_digest(tmp_path):
    values = np.random.default_rng(1).random((8, 8, 8, 3)).astype(np.float32)
    values[2, 2, 2, 1] = np.nan
    path = tmp_path / "sub-1_bold.nii.gz"
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(path)
    seen = {}
    for frame in (1, 2):
        whole = tables(tmp_path, path, input={"files": str(path), "frame": frame, "nan": 0.5})
        (record,) = done(whole)
        seen[planned(whole).digest] = record["score"]
        anatomy = nibabel.load(tmp_path / "out" / record["anatomy"]).get_fdata()
        np.testing.assert_array_equal(anatomy, np.nan_to_num(values[..., frame], nan=0.5))
    assert len(seen) == 2
    assert len(set(seen.values())) == 2
    other = tables(tmp_path, path, input={"files": str(path), "frame": 2, "nan": 0.0})
    assert planned(other).digest not in seen


def test_both_files_of_a_pair_decide_which_job_it_is(tmp_path):
    values = np.random.default_rng(1).random((8, 8, 8)).astype(np.float32)
    nibabel.Nifti1Pair(values, np.eye(4)).to_filename(tmp_path / "sub-1.hdr")
    whole = tables(tmp_path, tmp_path / "sub-1.hdr")
    first = planned(whole)
    assert set(first.payload["made_from"]["images"]) == {"sub-1.hdr", "sub-1.img"}
    pixels = tmp_path / "sub-1.img"
    header = (tmp_path / "sub-1.hdr").read_bytes()
    nibabel.Nifti1Pair(values + 1, np.eye(4)).to_filename(tmp_path / "sub-1.hdr")
    (tmp_path / "sub-1.hdr").write_bytes(header)
    assert pixels.stat().st_size >= values.nbytes
    assert planned(whole).digest != first.digest


def test_the_terms_of_the_zoo_are_in_the_report_whatever_its_files_are_called(tmp_path):
    mine = tmp_path / "mine.nii.gz"
    mine.write_bytes((DATA / "colin27_t1_128.nii.gz").read_bytes())
    nobodys = tmp_path / "nobodys.nii.gz"
    nobodys.write_bytes(gzip.compress(b"something else"))

    def said(model, files):
        whole = tables(tmp_path, files, model=model)
        job = planned(whole)
        folder = Path(job.payload["folder"])
        jobs.write_record(folder, {**methods.record_header(job.payload), "status": "failed", "error": "none"})
        outputs.write_json(folder / "config.json", {})
        return "The network and the image of the zoo" in report.write(folder).read_text()

    own = {"source": "pipeline_network:network"}
    assert not said(own, nobodys)
    assert said(own, mine)
    assert said({"source": "esegeta.zoo:small_unet", "arguments": {"ndim": 3}}, nobodys)
    own["weights"] = str(tmp_path / "w.safetensors")
    Path(own["weights"]).write_bytes((DATA / "brain_extraction_unet3d.safetensors").read_bytes())
    assert said(own, nobodys)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "feature_ablation", "parameters": {"features": {"name": "grid", "size": -3}}}, "size"),
        ({"name": "occlusion", "parameters": {"size": 400}}, "size"),
        ({"name": "lime", "parameters": {"features": {"name": "supervoxels", "count": 0}}}, "count"),
        ({"name": "integrated_gradients", "baseline": {"name": "blurred", "sigma": -1}}, "sigma"),
        ({"name": "grad_cam", "place": "nowhere"}, "nowhere"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_what_only_the_image_shows_to_be_wrong_is_refused_in_one_line(tmp_path, oblique, method, said):
    whole = tables(tmp_path, oblique, methods=[method])
    if found := config.problems(whole):
        assert len(found) == 1
        assert said in found[0]
        return
    job = planned(whole)
    here = Context("cpu", None, None, {}, lambda **event: None)
    with pytest.raises((ValueError, TypeError)) as caught:
        dispatch.main(job.payload, here)
    assert verdict(caught.value) == "refused", caught.value
    assert said in str(caught.value)
    line = one_line(caught.value)
    assert ": expected " in line
    assert not line.startswith(type(caught.value).__name__)
    assert "\n" not in line


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, oblique):
    (tmp_path / "file").write_text("")
    for name in ("file/out", "a" * 300):
        whole = tables(tmp_path, oblique, run={"output": str(tmp_path / name), "baseline": "zero"})
        with pytest.raises(
            ValueError, match=r"run.output: expected a folder to write to, got .*Choose another folder"
        ):
            pipeline.run(config.load(whole), progress=False)


def test_the_threads_of_a_configuration_reach_the_workers(tmp_path, oblique, monkeypatch):
    asked = []

    class Idle:
        """An executor that does nothing."""

        def __init__(self, *, threads, **_):
            asked.append(threads)

        submit = cancel = lambda self, tasks: None
        events = lambda self: iter(())
        close = lambda self: None

    monkeypatch.setattr(pool, "LocalExecutor", Idle)
    whole = tables(tmp_path, oblique)
    pipeline.run(config.load(whole), progress=False)
    whole["run"]["threads"] = 3
    pipeline.run(config.load(whole), progress=False)
    pipeline.run(config.load(whole), threads=1, progress=False)
    assert asked == [None, 3, 1]
    monkeypatch.setattr(pool, "cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [pool._share(workers) for workers in (1, 2, 8, 16)] == [2, 2, 1, 1]
    assert torch.get_num_threads() >= 1


def test_targets_and_methods_of_a_picture_are_shown_side_by_side(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    pil.fromarray(np.random.default_rng(5).integers(0, 255, (24, 16, 3), dtype=np.uint8)).save(
        tmp_path / "cat.png"
    )
    whole = tables(tmp_path, tmp_path / "cat.png", targets=CLASSES)
    whole["model"]["arguments"] = {"ndim": 2, "channels": 3}
    whole["output"] = {"figures": True, "report": False}
    *records, drawn = done(whole)
    assert len(records) == 2
    assert [one["title"] for one in drawn["together"]] == ["sub-cat, input x gradient"]
    notes = []
    page = report.page(tmp_path / "out")
    assert 'alt="sub-cat, input x gradient, side by side in the same planes"' in page
    assert page.count("data:image/") >= 3
    occlusion = {**records[0], "regridding": "values", "method": "occlusion", "id": "other", "sum": 4.0}
    jobs.write_record(tmp_path / "out", occlusion)
    sums = {record["id"]: record["sum"] for record in report._records(tmp_path / "out", notes)}
    assert sums["other"] is None, "values that voxels share are not added up"
    assert sums[records[0]["id"]] == records[0]["sum"]
