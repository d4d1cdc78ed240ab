"""The report: all that is in the folder, nothing that runs because of what is in the folder."""

import base64
import gzip
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Image

from esegeta import plot
from esegeta.plot import canvas
from esegeta.run.report import display
from esegeta.run.report import page as report

pytest.importorskip("jinja2", reason="reports need the extra viz")
pytest.importorskip("matplotlib", reason="reports need the extra viz")

AFFINE = np.array([[-2.0, 0.1, 0, 10], [0, 3.0, 0, -20], [0, 0, 4.0, 5], [0, 0, 0, 1]])
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&<!-- $x$ {{ 7 * 7 }} {% raw %} ]]>"


def nifti(path, values, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Nifti1Image(values, affine).to_filename(path)
    return path


def record(folder, **fields):
    fields = {
        "id": "sub-1_brain_ig",
        "subject": "sub-1",
        "target": "brain",
        "method": "ig",
        "status": "done",
    } | fields
    (folder / ".jobs").mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(fields["id"].encode()).hexdigest()[:12]
    (folder / ".jobs" / f"{name}.json").write_text(json.dumps(fields))
    return fields


def full(folder, shape=(12, 14, 10), methods=("ig", "gradient")):
    """A run of real files: an image, a prediction, maps with figures, and four kinds of failure."""
    generator = np.random.default_rng(0)
    image = nifti(folder / "sub-1/anat/image.nii.gz", generator.random(shape).astype(np.float32))
    mask = nifti(folder / "sub-1/mask.nii.gz", (generator.random(shape) > 0.5).astype(np.uint8))
    for i, method in enumerate(methods):
        values = generator.standard_normal(shape).astype(np.float32)
        path = nifti(folder / f"sub-1/{method}_statmap.nii.gz", values)
        figures = {}
        if i == 0:
            written = plot.save_figures(values[None], None, None, folder / f"sub-1/{method}", method)
            figures = {kind: file.relative_to(folder).as_posix() for kind, file in written.items()}
        record(
            folder,
            id=f"sub-1_brain_{method}",
            method=method,
            title=f"The {method}",
            map=path.relative_to(folder).as_posix(),
            anatomy=image.relative_to(folder).as_posix(),
            prediction=mask.relative_to(folder).as_posix(),
            figures=figures,
            score=1234.5,
            residual=0.25 if i else None,
            difference=2.0 if i else None,
            seconds=75.0,
            peak_memory=3 * 2**30,
            parameters={"steps": 32},
            metrics={"deletion": 0.125 * i},
            versions={"torch": "2.13.0" if i else "2.12.0"},
            events=[{"kind": "retry", "message": "Done again in float32."}],
        )
    for status in ("timeout", "crashed", "memory", "refused"):
        record(
            folder, id=status, method=status, status=status, error=f"The reason of {status}.", seconds=60.0
        )
    (folder / "config.json").write_text(
        json.dumps(
            {"methods": [{"name": "gradient"}, {"id": "ig", "name": "x"}], "model": {"source": "zoo:net"}}
        )
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = full(tmp_path_factory.mktemp("run"))
    report.write(path)
    return path


class Page(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, scripts, styles and text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.styles, self.words = [], [], [], []
        self.inside = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside = tag
            (self.scripts if tag == "script" else self.styles).append([dict(attributes), ""])

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = None

    def handle_data(self, data):
        if self.inside:
            (self.scripts if self.inside == "script" else self.styles)[-1][1] += data
        else:
            self.words.append(data)

    def text(self):
        return " ".join(" ".join(self.words).split())

    def script(self, name):
        return next(text for attributes, text in self.scripts if attributes.get("id") == name)

    def data(self):
        return json.loads(self.script("data"))

    def policy(self):
        return next(
            a["content"] for tag, a in self.elements if a.get("http-equiv") == "Content-Security-Policy"
        )


def page_of(folder):
    return Page(report.write(folder).read_text(encoding="utf-8"))


def volume(page, index):
    content = gzip.decompress(base64.b64decode(page.script(f"volume-{index}")))
    image = Nifti1Image.from_bytes(content)
    return np.asarray(image.dataobj), image.affine


# -- what it says ----------------------------------------------------------------------------------------------


def test_everything_can_be_read_without_a_script(folder):
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    text = page.text()
    for said in (
        "2 of 6 maps made", "4 not",
        "The ig", "The gradient", "1.23 × 10³", "0.25 (12.5 %)", "1 min 15 s", "3.00 GiB",
        "The reason of timeout.", "The reason of crashed.", "The reason of memory.", "The reason of refused.",
        '"steps": 32', "Done again in float32.", "2.12.0, 2.13.0", "deletion", "BSD 2-Clause License",
        "Holmes", "zoo:net",
    ):  # fmt: skip
        assert said in text, said
    images = [a for tag, a in page.elements if tag == "img"]
    assert [a["alt"].split()[0] for a in images] == ["overlay", "projections", "montage"]
    assert all(a["src"].startswith(("data:image/webp;base64,", "data:image/png;base64,")) for a in images)
    assert all(a["alt"] and int(a["width"]) > 300 and int(a["height"]) > 300 for a in images)


def test_maps_come_in_the_order_of_the_configuration(folder):
    titles = [o["title"] for o in Page((folder / "report.html").read_text()).data()["overlays"]]
    assert titles == ["The gradient", "The ig"]


def test_the_jobs_of_earlier_configurations_can_be_left_out(folder):
    page = Page(report.page(folder, ["sub-1_brain_ig", "memory", "unheard of"]))
    assert [o["id"] for o in page.data()["overlays"]] == ["sub-1_brain_ig"]
    assert "1 of 2 maps made" in page.text()
    assert "The reason of timeout." not in page.text()


def test_the_page_says_its_size(folder):
    path = folder / "report.html"
    said = re.search(r"its size is ([\d.]+) MB", path.read_text())
    assert float(said[1]) == pytest.approx(path.stat().st_size / 1e6, abs=0.051)


def test_the_same_folder_gives_the_same_page(folder):
    before = (folder / "report.html").read_bytes()
    assert report.write(folder).read_bytes() == before
    assert not [p for p in folder.iterdir() if "part" in p.name]


# -- nothing of it runs or leaves ------------------------------------------------------------------------------


def test_the_page_allows_its_own_scripts_and_nothing_else(folder):
    page = Page((folder / "report.html").read_text(encoding="utf-8"))

    def digest(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    running = [text for attributes, text in page.scripts if "type" not in attributes]
    library = gzip.decompress(base64.b64decode(page.script("library"))).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in page.policy().split(";"))
    assert rules == {
        "default-src": "'none'",
        "script-src": f"{digest(running[0])} {digest(library)}",
        "style-src": digest(page.styles[0][1]),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert len(running) == len(page.styles) == 1
    assert not [a for tag, a in page.elements if any(name == "style" or name.startswith("on") for name in a)]
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action"):
            address = attributes.get(name)
            if address is not None:
                assert address.startswith(("#", "data:")) or (tag == "a" and ":" not in address), address


def test_names_from_files_are_text(tmp_path):
    nifti(tmp_path / "map.nii.gz", np.ones((4, 4, 4), np.float32))
    record(
        tmp_path, id=EVIL, subject=EVIL, target=EVIL, method=EVIL, title=EVIL, name=EVIL, error=EVIL,
        map="map.nii.gz",
        parameters={EVIL: EVIL}, versions={EVIL: EVIL}, events=[EVIL, {"message": EVIL}, {"kind": EVIL}],
        metrics={EVIL: EVIL}, place=EVIL, baseline={EVIL: EVIL}, key=EVIL, warnings=[EVIL], device=EVIL,
        started=EVIL, transforms=[EVIL],
    )  # fmt: skip
    record(tmp_path, id="other", status=EVIL, error=EVIL)
    (tmp_path / ".jobs" / "<b>.json").write_text("{")
    (tmp_path / "config.json").write_text(json.dumps({EVIL: EVIL}))
    page = page_of(tmp_path)
    assert len([s for s in page.scripts if "type" not in s[0]]) == 1
    assert not [a for tag, a in page.elements if tag in ("img", "b")]
    assert page.text().count(" ".join(EVIL.split())) >= 12
    assert "49" not in [w.strip() for w in page.words]
    assert {page.data()["overlays"][0][n] for n in ("id", "subject", "target", "method", "title")} == {EVIL}


@pytest.mark.parametrize(
    "text", ["</script>", "</SCRIPT >", "<!--", "<script", "]]>", "\u2028\u2029", "&lt;", '"\\']
)
def test_data_for_the_script_cannot_end_its_element(text):
    embedded = report.embedded({"a": text, text: [text, float("nan"), float("inf"), 1.5]})
    assert not set("<>&\u2028\u2029") & set(embedded)
    assert json.loads(embedded) == {"a": text, text: [text, None, None, 1.5]}


def test_files_outside_of_the_folder_are_not_read(tmp_path):
    folder = tmp_path / "run"
    values = np.ones((5, 5, 5), np.float32)
    nifti(tmp_path / "secret.nii.gz", values)
    picture = plot.save(plot.overlay(values[None]), tmp_path / "secret.png")
    folder.mkdir()
    (folder / "link.nii.gz").symlink_to(tmp_path / "secret.nii.gz")
    absolute = str(tmp_path / "secret.nii.gz")
    for i, name in enumerate(
        ["../secret.nii.gz", absolute, "link.nii.gz", "a\0b", "x" * 5000, ".", "", 5, None]
    ):
        figures = {"overlay": "../secret.png", "montage": str(picture)}
        record(folder, id=str(i), map=name, figures=figures, anatomy="../secret.nii.gz", prediction=absolute)
    page = page_of(folder)
    assert page.data()["overlays"] == []
    assert not [a for tag, a in page.elements if tag == "img"]
    assert "secret" not in "".join(a.get("href", "") for tag, a in page.elements)
    assert page.text().count("its map is not in the folder") == 7


# -- what goes wrong -------------------------------------------------------------------------------------------


def test_a_report_is_written_whatever_the_folder_holds(tmp_path):
    jobs = tmp_path / ".jobs"
    jobs.mkdir()
    (jobs / "half.json").write_text('{"id": "ha')
    (jobs / "list.json").write_text("[1, 2]")
    (jobs / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (jobs / "empty.json").write_text("{}")
    odd = {
        "id": 5,
        "status": 7,
        "figures": [1],
        "versions": 3,
        "events": "x",
        "metrics": 1,
        "seconds": "long",
    }
    (jobs / "odd.json").write_text(json.dumps(odd | {"score": True, "error": ["a"]}))
    (jobs / "nan.json").write_text('{"id": "n", "score": NaN, "seconds": Infinity, "peak_memory": NaN}')
    (tmp_path / "config.json").write_text("{")
    nifti(tmp_path / "whole.nii.gz", np.ones((5, 5, 5), np.float32))
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "whole.nii.gz").read_bytes()[:60])
    (tmp_path / "text.nii.gz").write_text("no image")
    (tmp_path / "text.png").write_text("no picture")
    record(tmp_path, id="cut", map="cut.nii.gz")
    record(tmp_path, id="text", map="text.nii.gz", figures={"overlay": "text.png"})
    record(tmp_path, id="under", map="whole.nii.gz", anatomy="text.nii.gz", prediction="cut.nii.gz")
    page = page_of(tmp_path)
    text = page.text()
    for name in ("half.json", "bytes.json", "config.json", "cut.nii.gz", "text.nii.gz", "text.png"):
        assert f"{name} could not be" in text, name
    assert "list.json is no record" in text
    assert [o["id"] for o in page.data()["overlays"]] == ["under"]
    assert page.data()["overlays"][0]["anatomy"] is None


def test_an_empty_folder_has_a_report(tmp_path):
    page = page_of(tmp_path)
    assert "No job has finished" in page.text()
    assert page.data()["overlays"] == []


def test_without_jinja2_one_line_says_what_to_install(tmp_path):
    script = (
        "import sys; sys.modules['jinja2'] = None; from esegeta.run.report import page as report\n"
        "try:\n    report.write(sys.argv[1])\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.stdout == 'Reports need jinja2, which is missing: pip install "esegeta[viz]".\n', done.stderr
    assert not list(tmp_path.iterdir())


# -- volumes ---------------------------------------------------------------------------------------------------


def test_the_viewer_has_the_values_and_the_place_of_the_maps(folder):
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    overlay = page.data()["overlays"][1]
    values, affine = volume(page, overlay["text"])
    original = Nifti1Image.from_filename(folder / "sub-1/ig_statmap.nii.gz")
    np.testing.assert_allclose(
        values * overlay["step"], np.asarray(original.dataobj), atol=0.501 * overlay["step"]
    )
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)
    assert values.dtype == np.int16
    assert overlay["end"] * overlay["step"] == pytest.approx(
        plot.grids.limit_of(original.get_fdata()), rel=1e-5
    )
    assert overlay["largest"] == pytest.approx(np.abs(original.get_fdata()).max())
    grey, place = volume(page, overlay["anatomy"])
    assert grey.dtype == np.uint8
    assert (grey.min(), grey.max()) == (0, 255)
    np.testing.assert_allclose(place, AFFINE, atol=1e-5)
    edge, _ = volume(page, overlay["prediction"])
    mask = np.asarray(Nifti1Image.from_filename(folder / "sub-1/mask.nii.gz").dataobj) > 0
    wide = np.pad(mask, 1, mode="edge")
    for index in np.ndindex(mask.shape):
        i, j, k = (n + 1 for n in index)
        near = wide[[i - 1, i + 1, i, i, i, i], [j, j, j - 1, j + 1, j, j], [k, k, k, k, k - 1, k + 1]]
        assert edge[index] == (mask[index] and not near.all())
    shared = [o["anatomy"] for o in page.data()["overlays"]]
    assert shared[0] == shared[1]


def test_a_volume_that_is_too_large_is_shown_on_fewer_voxels_and_that_is_said(tmp_path, monkeypatch):
    values = np.random.default_rng(0).standard_normal((60, 50, 70)).astype(np.float32)
    nifti(tmp_path / "map.nii.gz", values)
    record(tmp_path, map="map.nii.gz")
    monkeypatch.setattr(report, "VOLUMES", 150_000)
    page = page_of(tmp_path)
    overlay = page.data()["overlays"][0]
    small, affine = volume(page, overlay["text"])
    assert small.shape == tuple(overlay["shape"])
    assert min(small.shape) >= display.SMALLEST
    assert np.prod(small.shape) < np.prod(values.shape)
    assert len(page.script(f"volume-{overlay['text']}")) <= 150_000
    assert "fewer voxels in the viewer" in page.text()
    # The box that the voxels fill is the same.
    for corner in ([-0.5, -0.5, -0.5], None):
        old, new = ([*(corner or [n - 0.5 for n in shape]), 1] for shape in (values.shape, small.shape))
        np.testing.assert_allclose(affine @ new, AFFINE @ old, atol=1e-4)
    assert small.mean() * overlay["step"] == pytest.approx(values.mean(), abs=0.02)


def test_there_is_an_end_to_how_much_a_page_takes_in(tmp_path, monkeypatch):
    full(tmp_path, methods=[f"m{i}" for i in range(5)])
    monkeypatch.setattr(report, "MOST_VOLUMES", 3)
    monkeypatch.setattr(report, "FIGURES", 1)
    page = page_of(tmp_path)
    assert len(page.data()["overlays"]) == 3
    assert "first 3 maps of 5" in page.text()
    # One picture of each map is inside of the page, however many there are.
    assert [a["alt"].split()[0] for tag, a in page.elements if tag == "img"] == ["overlay"]
    links = [a["href"] for tag, a in page.elements if tag == "a" and a["href"].endswith(".png")]
    assert links == ["sub-1/m0_overlay.png", "sub-1/m0_projections.png", "sub-1/m0_montage.png"]
    assert "2 figures are links" in page.text()


def test_figures_of_several_maps_are_shown_while_they_are_of_the_maps_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(canvas, "DPI", 40)
    for name in ("ig", "cam"):
        nifti(tmp_path / f"{name}.nii.gz", np.ones((6, 7, 8), np.float32))
        record(tmp_path, id=name, method=name, map=f"{name}.nii.gz", config_digest=f"of {name}")
    picture = plot.save(plot.overlay(np.ones((1, 5, 5, 5))), tmp_path / "both.png")
    for name in ("beside", "layers", "../secret"):
        if "secret" not in name:
            (tmp_path / f"{name}.png").write_bytes(picture.read_bytes())
    drawn = {
        "inputs": {name: [f"of {name}", "done"] for name in ("ig", "cam")},
        "figures": {"ig": {"overlay": "both.png"}, "nobody": {"overlay": "both.png"}, "cam": "odd"},
        "together": [{"title": name, "file": f"{name}.png"} for name in ("beside", "layers", "../secret")],
    }

    def titles():
        page = page_of(tmp_path)
        return [a["alt"].partition(",")[0] for tag, a in page.elements if tag == "img"], page.text()

    record(tmp_path, id="figures_sub-1", kind="figures", target="", method="", **drawn)
    found, text = titles()
    assert found == ["beside", "layers", "overlay of ig"]
    assert "newer" not in text
    assert "1 of 2 maps have no figures yet" in text
    monkeypatch.setattr(report, "MOST_COMPARED", 1)
    assert "after the first 1 figures of several maps: layers." in titles()[1]
    # The map of one was computed anew: what was drawn of it before is left out.
    record(tmp_path, id="ig", method="ig", map="ig.nii.gz", config_digest="another")
    found, text = titles()
    assert found == []
    assert "1 maps are newer than their figures" in text


@pytest.mark.parametrize("shape", [(12, 14), (12, 14, 1)])
def test_flat_images_have_figures_and_no_viewer(tmp_path, shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    nifti(tmp_path / "map.nii.gz", values)
    plot.save(plot.overlay(values.reshape(1, 12, 14)), tmp_path / "a.png")
    record(tmp_path, map="map.nii.gz", figures={"overlay": "a.png"})
    page = page_of(tmp_path)
    assert not [s for s in page.scripts if s[0].get("id") == "library"]
    assert not [a for tag, a in page.elements if a.get("id") == "viewer"]
    assert len([a for tag, a in page.elements if tag == "img"]) == 1


def test_the_viewer_goes_where_the_map_has_most_inside_of_the_image():
    values, image = np.zeros((2, 24, 24, 24), np.float32)
    values[2:5, 2:5, 2:5], values[18:23, 18:23, 18:23], image[:12] = 1, 5, 1
    assert display.of_map(values, AFFINE, 10**6, image).peak == pytest.approx(
        AFFINE[:3] @ [3, 3, 3, 1], abs=0.01
    )
    assert display.of_map(values, AFFINE, 10**6).peak == pytest.approx(AFFINE[:3] @ [19, 19, 19, 1], abs=5)


def test_the_viewer_opens_inside_of_what_is_predicted_and_of_the_image_where_nothing_is(tmp_path):
    ring = np.zeros((12, 12, 12), np.uint8)
    ring[2:10, 2:10, 5] = 1
    ring[4:8, 4:8, 5] = 0  # its centre of mass lies outside of it
    body = np.zeros((12, 12, 12), np.float32)
    body[6:11, 6:11, 6:11] = 1
    values = np.zeros((12, 12, 12), np.float32)
    values[0, 0, 0] = 5  # the map has most in the air
    nifti(tmp_path / "mask.nii.gz", ring)
    nifti(tmp_path / "none.nii.gz", np.zeros_like(ring))
    nifti(tmp_path / "image.nii.gz", body)
    nifti(tmp_path / "map.nii.gz", values)
    for name in ("mask", "none"):
        files = {"map": "map.nii.gz", "anatomy": "image.nii.gz", "prediction": f"{name}.nii.gz"}
        record(tmp_path, id=name, **files)
    found = {one["id"]: one["centre"] for one in page_of(tmp_path).data()["overlays"]}
    voxels = {k: np.round(np.linalg.inv(AFFINE) @ [*mm, 1.0])[:3].astype(int) for k, mm in found.items()}
    assert ring[tuple(voxels["mask"])] == 1
    assert voxels["none"].tolist() == [8, 8, 8]


def test_every_map_has_a_picture_inside_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(canvas, "DPI", 40)
    monkeypatch.setattr(report, "FIGURES", 1)
    plot.save(plot.overlay(np.ones((1, 5, 5, 5))), tmp_path / "a.png")
    for i in range(48):
        figures = {"overlay": "a.png", "montage": "a.png"}
        record(tmp_path, id=f"m{i:02}", method=f"m{i:02}", figures=figures)
    page = page_of(tmp_path)
    images = [a for tag, a in page.elements if tag == "img"]
    assert [a["alt"] for a in images] == [f"overlay of m{i:02}" for i in range(48)]
    assert "48 figures are links" in page.text()


def test_channels_of_a_map_are_added_up_as_in_the_figures(tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 5, 6, 3)).astype(np.float32)
    found, affine = display.read(nifti(tmp_path / "map.nii.gz", values))
    np.testing.assert_allclose(found, values.sum(-1), atol=1e-6)
    np.testing.assert_allclose(affine, AFFINE)


@pytest.mark.parametrize("values", [np.zeros((6, 6, 6)), np.full((6, 6, 6), 7.0), np.full((6, 6, 6), np.nan)])
def test_odd_maps_have_copies(values):
    copy = display.of_map(values.astype(np.float32), np.eye(4), 10**6)
    image = Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(copy.text)))
    expected = np.nan_to_num(values)
    np.testing.assert_allclose(np.asarray(image.dataobj) * copy.step, expected, atol=1e-6)
    assert np.isfinite([copy.step, copy.largest, *copy.peak]).all()


# -- parts -----------------------------------------------------------------------------------------------------


def test_a_figure_keeps_its_size_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr(canvas, "DPI", 40)
    path = plot.save(plot.overlay(np.ones((1, 5, 5, 5))), tmp_path / "a.png")
    webp, width, height = display.figure(path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    png, *same = display.figure(path)
    assert same == [width, height]
    assert base64.b64decode(png.partition(",")[2]) == path.read_bytes()
    assert webp.startswith("data:image/webp")
    assert len(webp) < len(png)


def test_the_viewer_is_the_one_that_its_notice_names():
    library = gzip.decompress(report.LIBRARY.read_bytes())
    assert (
        hashlib.sha256(library).hexdigest()
        == "8129dd51400fd22b02393bee1f68324a033b09c632ebc65e51478abe9b86175e"
    )
    assert b"</script" not in library.lower()
    notice = (report.LIBRARY.parent / "NOTICE").read_text()
    assert report.LIBRARY.name in notice
    assert "Copyright (c) 2021, Niivue" in notice


def test_a_report_of_twelve_maps_stays_small():
    # What may vary has a budget; the rest is the library and text.
    fixed = len(report.LIBRARY.read_bytes()) * 4 / 3 + 300_000
    assert report.VOLUMES + report.ANATOMIES + report.FIGURES + fixed < 19_000_000
