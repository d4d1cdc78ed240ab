"""The report in a real browser, without a network: what a reader sees and can do."""

import io
import json
import os
import shutil

import numpy as np
import pytest
from regridding import regrid, regrid_affine

import esegeta as eg
from esegeta import plot, zoo
from esegeta.run.report import page as report

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
Image = pytest.importorskip("PIL.Image", reason="screenshots are read with pillow")
pytest.importorskip("jinja2", reason="reports need the extra viz")
pytest.importorskip("matplotlib", reason="reports need the extra viz")

BROWSER = os.environ.get("ESEGETA_BROWSER") or next(
    (p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None
)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *(
        "--disable-component-update",
        "--disable-sync",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
    ),
)
SIZE = 40
PATIENCE = 180_000  # ms: all of this is drawn without a graphics card, on a machine that may be busy
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium; ESEGETA_BROWSER may say where one is"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two maps of the real network on the real head, and a failure with a name that wants to run."""
    from nibabel.nifti1 import Nifti1Image

    folder = tmp_path_factory.mktemp("run")
    full = zoo.head()
    x, affine = regrid(full.data, SIZE), regrid_affine(full.affine, full.data.shape[-1] / SIZE)
    model = eg.from_module(zoo.brain_extraction_unet())
    score = eg.reducers.predicted_class_sum(model, 1, at=x)
    maps = {"gradient": eg.gradient(score)(x), "input_x_gradient": eg.input_x_gradient(score)(x)}
    predicted = eg.reducers.predicted_mask(model(x), 1)
    (folder / ".jobs").mkdir()
    files = {
        "anatomy": x[0].numpy(),
        "prediction": predicted.detach().reshape(x.shape[1:]).numpy().astype(np.uint8),
    }
    for name, values in files.items():
        Nifti1Image(values, affine).to_filename(folder / f"{name}.nii.gz")
    for name, values in maps.items():
        Nifti1Image(values[0].detach().numpy(), affine).to_filename(folder / f"{name}.nii.gz")
        figures = plot.save_figures(values, x, None, folder / name, name, affine)
        entry = {"id": name, "subject": "colin", "target": "brain", "method": name, "status": "done"}
        entry |= {"map": f"{name}.nii.gz", "anatomy": "anatomy.nii.gz", "prediction": "prediction.nii.gz"}
        entry |= {
            "figures": {k: p.name for k, p in figures.items()},
            "score": float(score(x)),
            "seconds": 1.5,
        }
        (folder / ".jobs" / f"{name}.json").write_text(json.dumps(entry))
    evil = "</script><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"
    entry = {
        "id": "evil",
        "subject": evil,
        "target": evil,
        "method": evil,
        "status": "crashed",
        "error": evil,
    }
    (folder / ".jobs" / "evil.json").write_text(json.dumps(entry))
    return report.write(folder)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield one
        one.close()


def opened(browser, path, **how):
    page = browser.new_page(viewport={"width": 1100, "height": 900}, **how)
    page.set_default_timeout(PATIENCE)
    page.heard = {"requests": [], "errors": []}
    page.on("request", lambda request: page.heard["requests"].append(request.url))
    page.on("pageerror", lambda error: page.heard["errors"].append(str(error)))
    page.on("console", lambda m: page.heard["errors"].append(m.text) if m.type == "error" else None)
    page.goto(path.as_uri())
    return page


@pytest.fixture(scope="module")
def page(browser, run):
    page = opened(browser, run)
    page.wait_for_selector("html[data-viewer=ready], html[data-viewer=failed]", state="attached")
    yield page
    page.close()


def seen(page):
    """The pixels of the viewer, once two looks in a row are the same."""
    before = None
    for _ in range(40):
        picture = page.locator("#canvas").screenshot()
        now = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
        if before is not None and (now == before).all():
            return now
        before = now
        page.wait_for_timeout(300)
    raise AssertionError("the viewer does not come to rest")


def share(mask):
    return float(mask.mean())


def grey(pixels):
    return (np.ptp(pixels, axis=-1) < 12) & (pixels.max(-1) > 40)


def orange(pixels):
    r, g, b = np.moveaxis(pixels, -1, 0)
    return (r - b > 60) & (r > g)


def blue(pixels):
    r, g, b = np.moveaxis(pixels, -1, 0)
    return (b - r > 60) & (b >= g)


def slide(page, name, value):
    """Move a slider as a hand would: by its value and the event that follows."""
    page.locator(name).evaluate(
        "(e, value) => { e.value = value; e.dispatchEvent(new Event('input')); }", str(value)
    )


def test_the_viewer_shows_anatomy_and_map(page):
    assert page.get_attribute("html", "data-viewer") == "ready", page.inner_text("#state")
    pixels = seen(page)
    assert share(grey(pixels)) > 0.10
    assert share(orange(pixels)) > 0.002
    assert share(blue(pixels)) > 0.002
    # Three planes and the rendering: each quarter of the screen has some of both.
    tall, wide = (n // 2 for n in pixels.shape[:2])
    for rows in (slice(0, tall), slice(tall, None)):
        for columns in (slice(0, wide), slice(wide, None)):
            assert share(grey(pixels[rows, columns])) > 0.02
            assert share((orange(pixels) | blue(pixels))[rows, columns]) > 0.0005


def test_the_right_of_the_patient_is_on_the_left(page):
    # Go to a place at the patient's right: the upright line of the axial plane moves to the left.
    assert "right" in page.inner_text("#where")
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    page.mouse.click(box["x"] + 0.33 * box["width"], box["y"] + 0.72 * box["height"])
    left = float(page.inner_text("#where").split(",")[0].removeprefix("right "))
    page.mouse.click(box["x"] + 0.42 * box["width"], box["y"] + 0.72 * box["height"])
    right = float(page.inner_text("#where").split(",")[0].removeprefix("right "))
    assert left > right
    page.click("#strongest")


def test_another_map_is_another_picture(page):
    before = seen(page)
    page.select_option("#choose-map", label="input_x_gradient")
    page.wait_for_selector("html[data-shown=input_x_gradient]", state="attached")
    after = seen(page)
    assert share((before != after).any(-1)) > 0.01
    assert share(orange(after)) > 0.001
    assert "input_x_gradient" in page.inner_text("#state")
    page.select_option("#choose-map", label="gradient")
    page.wait_for_selector("html[data-shown=gradient]", state="attached")
    assert share((seen(page) != before).any(-1)) < 0.01


def test_sliders_move_what_they_say(page):
    coloured = share(orange(seen(page)) | blue(seen(page)))
    page.uncheck("#fade")
    slide(page, "#threshold", 90)
    few = seen(page)
    assert share(orange(few) | blue(few)) < 0.7 * coloured
    assert page.inner_text("#threshold-said") == "90 %"
    slide(page, "#threshold", 5)
    many = seen(page)
    assert share(orange(many) | blue(many)) > 1.3 * coloured
    slide(page, "#opacity", 0)
    none = seen(page)
    assert share(orange(none) | blue(none)) < 0.0005
    assert share(grey(none)) > 0.15
    slide(page, "#opacity", 85)
    slide(page, "#threshold", 45)
    page.check("#fade")


def test_the_prediction_can_be_laid_over(page):
    before = seen(page)
    page.check("#outline")
    page.wait_for_timeout(500)
    after = seen(page)
    r, g, b = np.moveaxis(after, -1, 0)
    greenish = (g - r > 15) & (g - b > 8)
    r, g, b = np.moveaxis(before, -1, 0)
    assert share(greenish) > 0.005 + share((g - r > 15) & (g - b > 8))
    page.uncheck("#outline")


def test_a_table_sorts(page):
    page.locator("#summary ~ .wide th button", has_text="Map").click()
    first = page.locator("#summary ~ .wide tbody tr").first.inner_text()
    page.locator("#summary ~ .wide th button", has_text="Map").click()
    last = page.locator("#summary ~ .wide tbody tr").last.inner_text()
    assert first == last
    page.locator("#summary ~ .wide th button", has_text="Score").focus()
    page.keyboard.press("Enter")
    scores = page.locator("#summary ~ .wide tbody td:nth-child(6)").all_inner_texts()
    assert scores[-1] == ""
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("Score")


def test_nothing_was_asked_for_and_nothing_went_wrong(page, run):
    assert page.heard["requests"] == [run.as_uri()]
    assert page.heard["errors"] == []
    assert page.title().endswith("attribution maps")


def test_without_scripts_tables_and_pictures_are_there(browser, run):
    page = opened(browser, run, java_script_enabled=False)
    assert page.locator("#summary ~ .wide tbody tr").count() == 3
    assert page.locator("#viewer").is_hidden()
    picture = page.locator("article img").first
    picture.scroll_into_view_if_needed()
    pixels = np.asarray(Image.open(io.BytesIO(picture.screenshot())).convert("RGB")).astype(int)
    assert share(grey(pixels)) > 0.10
    assert share(orange(pixels)) > 0.001
    assert page.heard["requests"] == [run.as_uri()]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_colours_of_the_reader(browser, run, scheme):
    page = opened(browser, run, color_scheme=scheme, java_script_enabled=False)
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    paper = pixels[-1, 0].mean()
    assert paper > 230 if scheme == "light" else paper < 40
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    page.close()
