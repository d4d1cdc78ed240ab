"""Figures of runs: drawn per subject when the numbers are there, of what lies on the disk, and on demand."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from esegeta import plot
from esegeta.run import pipeline
from esegeta.run.config import loading as config
from esegeta.run.jobs import figures, kinds, outputs
from esegeta.run.jobs import plan as jobs
from esegeta.run.volumes import files as volumes

pytest.importorskip("matplotlib", reason="figures need the extra viz")
pytest.importorskip("jinja2", reason="reports need the extra viz")


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    monkeypatch.setenv("ESEGETA_TRUST", f"esegeta.zoo,{Path(__file__).parent}")


def scans(folder, count, channels=("T1w",), shape=(8, 8, 8)):
    """Files of so many subjects, a list of their channels for each."""
    found = []
    for number in range(count):
        own = []
        for i, name in enumerate(channels):
            values = np.random.default_rng(10 * number + i).random(shape).astype(np.float32)
            path = folder / f"sub-{number}_{name}.nii.gz"
            nibabel.Nifti1Image(values, np.diag([2.0, 1.5, 1.0, 1.0])).to_filename(path)
            own.append(str(path))
        found.append(own)
    return found


def tables(folder, files, **changes):
    return {
        "model": {"source": "zoo:small_unet", "arguments": {"ndim": 3, "channels": len(files[0])}},
        "input": {"files": files},
        "targets": [{"name": "spot", "class": 1}],
        "methods": [{"name": "gradient"}],
        "run": {"output": str(folder / "out"), "baseline": "zero"},
        **changes,
    }


def records(folder):
    return {p.stem: json.loads(p.read_text()) for p in (folder / "out" / ".jobs").glob("*.json")}


def test_of_many_subjects_the_first_are_planned_and_the_settings_decide_about_no_map(tmp_path):
    files = scans(tmp_path, 3)
    methods = [{"name": "gradient"}, {"name": "saliency"}]

    def planned(**how):
        whole = tables(tmp_path, files, methods=methods, figures=how)
        found = jobs.plan(config.load(whole))
        return found, [job for job in found if job.kind == "figures"]

    assert [job.subject for job in planned()[1]] == ["sub-0", "sub-1", "sub-2"]
    assert [job.subject for job in planned(maps=4)[1]] == ["sub-0", "sub-1"]
    assert [job.subject for job in planned(maps=1)[1]] == ["sub-0"], (
        "a subject has all of its figures or none"
    )
    assert planned(maps=0)[1] == []
    assert len(planned(maps="all")[1]) == 3
    every, (drawing, *_) = planned()
    assert [one.id for one in drawing.after] == [job.id for job in every if job.subject == "sub-0"][:2]
    other, (changed, *_) = planned(colours="red")
    assert drawing.digest != changed.digest
    assert [job.digest for job in every[:6]] == [job.digest for job in other[:6]]
    assert planned(maps=4)[1][0].digest == drawing.digest, "how many are drawn changes no picture"
    with pytest.raises(ValueError, match=r'figures.colours: expected "orange" or "red", got .green.'):
        planned(colours="green")
    assert not [job for job in jobs.plan(config.load(tables(tmp_path, files, output={"figures": False})))
                if kinds.find(job.kind).draws]  # fmt: skip


def test_what_was_written_is_read_as_it_was(tmp_path):
    for shape, affine in (((2, 5, 6, 7), np.diag([2.0, 3, 4, 1])), ((1, 5, 6), None), ((3, 5, 6), None)):
        values = np.random.default_rng(0).random(shape).astype(np.float32)
        path = tmp_path / "image.nii.gz"
        if affine is None:
            pil = pytest.importorskip("PIL.Image")
            pixels = np.moveaxis(np.round(255 * values), 0, -1).astype(np.uint8).squeeze()
            pil.fromarray(pixels).save(tmp_path / "image.png")
            volume = volumes.read(tmp_path / "image.png")
        else:
            nibabel.Nifti1Image(np.moveaxis(values, 0, -1), affine).to_filename(path)
            volume = volumes.read(path, channels="last")
        outputs.write_map(volume.data, volume, tmp_path / "written.nii.gz")
        found = figures.of_file(tmp_path / "written.nii.gz")
        torch.testing.assert_close(found.values, volume.data)
        assert (found.affine is None) == volume.is_image


class Cells(HTMLParser):
    """The tables of a page: rows of (text, value) by the id of their heading."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tables, self.name, self.cell = {}, "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        about = dict(attributes)
        if tag == "h2":
            self.name = about.get("id", "")
        if tag == "tr":
            self.tables.setdefault(self.name, []).append([])
        if tag in ("td", "th"):
            self.cell = ["", about.get("data-value")]
            self.tables[self.name][-1].append(self.cell)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell[0] += data


@pytest.mark.slow
def test_channels_have_numbers_and_pictures_and_the_page_says_what_the_files_say(tmp_path, monkeypatch):
    files = scans(tmp_path, 2, ("flair", "t1", "t2"))
    methods = [{"name": "input_x_gradient"}, {"name": "channel_shapley"}]
    whole = tables(tmp_path, files, methods=methods, figures={"maps": 2})
    summary = pipeline.run(config.load(whole), progress=False, threads=1)
    assert (summary.exit_code, summary.counts) == (0, {"done": 5})
    out, told = tmp_path / "out", records(tmp_path)
    assert "figures_sub-1" not in told
    drawn = told["figures_sub-0"]
    assert set(drawn["figures"]["sub-0_spot_channelShapley"]) == {
        "overlay",
        "projections",
        "montage",
        "channels",
    }
    (several,) = drawn["together"]
    assert several["maps"] == 2
    assert all((out / name).is_file() for name in figures.written_files(drawn))
    # The numbers of channels are those of the map.
    record = told["sub-0_spot_inputXGradient"]
    values = nibabel.load(out / record["map"]).get_fdata()
    assert [one["channel"] for one in record["channels"]] == ["flair", "t1", "t2"]
    for i, one in enumerate(record["channels"]):
        assert one["sum"] == pytest.approx(values[..., i].sum(), rel=1e-5)
        assert one["share"] == pytest.approx(np.abs(values[..., i]).sum() / np.abs(values).sum(), rel=1e-5)
        assert one["max"] == pytest.approx(values[..., i].max(), rel=1e-6)
    assert sum(one["sum"] for one in record["channels"]) == pytest.approx(record["sum"], rel=1e-5)
    shares = told["sub-0_spot_channelShapley"]["channels"]
    assert {one["sum"] for one in shares} == {None}, "a voxel shows the value of its channel"
    # The page has the numbers of the files.
    cells = Cells((out / "report.html").read_text()).tables
    rows = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    names = ("score", "residual", "min", "max", "sum")
    for row, shown in zip(rows, cells["summary"][1:], strict=True):
        own = json.loads((out / ".jobs" / f"{row['id']}.json").read_text())
        for name, (_, value) in zip(names, shown[4:9], strict=True):
            if name == "sum" and own["regridding"] == "values":
                assert value == ""
            else:
                assert value == row[name] == ("" if own[name] is None else str(own[name])), name
    rows = list(csv.DictReader((out / "channels.csv").read_text().splitlines()))
    assert len(rows) == len(cells["channels"]) - 1 == 12
    for row, shown in zip(rows, cells["channels"][1:], strict=True):
        assert (row["subject"], row["channel"]) == (shown[0][0], shown[3][0])
        assert [value for _, value in shown[4:9]] == [row[n] for n in ("sum", "mean", "share", "min", "max")]
    # The figures of the others are drawn on demand, of the maps on disk alone.
    before = {name: path.read_bytes() for name, path in ((p.name, p) for p in out.rglob("*.nii.gz"))}
    assert "2 of 4 maps have no figures yet" in (out / "report.html").read_text()
    summary = pipeline.draw(out, progress=False, threads=1)
    assert (summary.exit_code, summary.repeated) == (0, 1)
    assert set(records(tmp_path)["figures_sub-1"]["figures"]) == {
        "sub-1_spot_inputXGradient", "sub-1_spot_channelShapley",
    }  # fmt: skip
    assert "have no figures yet" not in (out / "report.html").read_text()
    assert before == {path.name: path.read_bytes() for path in out.rglob("*.nii.gz")}
    # The same again: with its first settings the run has nothing to do, and the report keeps what was drawn.
    again = pipeline.run(config.load(whole), progress=False, threads=1)
    assert again.repeated == 0


def test_a_loose_picture_says_whose_it_is():
    record = {
        "subject": "sub-1", "target": "brain", "reducer": "class_sum", "method": "cam", "name": "grad_cam",
        "place": "encoder.3", "score": 12.5, "residual": -0.25, "difference": 12.5,
    }  # fmt: skip
    text = figures.facts(record)
    assert (
        text
        == "sub-1 · brain (class_sum) · grad_cam at encoder.3 · score 12.5 · residual -0.25 (2 % of the difference)"
    )
    drawn = plot.overlay(np.ones((1, 6, 6, 6)), title="A cam", subtitle=text)
    said = " ".join(t.get_text() for t in drawn.texts)
    assert text in said
