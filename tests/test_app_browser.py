"""The page in a real browser: from an empty folder to maps, and away with the configuration."""

import contextlib
import filecmp
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
pytest.importorskip("uvicorn", reason="the page needs the extra gui")

from test_report_browser import BROWSER, FLAGS  # noqa: E402

from esegeta.app import launch, server  # noqa: E402
from esegeta.run.config import loading, starter  # noqa: E402

PATIENCE = 60_000  # ms
PICTURES = os.environ.get("ESEGETA_PICTURES")  # a folder where the tour's pictures are put
# Controls that are seen and have no name for who does not see them.
NAMELESS = """() => [...document.querySelectorAll("main :is(input, select, textarea, button)")]
    .filter((e) => e.checkVisibility())
    .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim()))
    .map((e) => e.outerHTML)"""
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium; ESEGETA_BROWSER may say where one is"),
]


@contextlib.contextmanager
def serving(site):
    """The server in a thread of its own; gives the file that opens it."""
    began, servers = threading.Event(), []

    def ready(one):
        servers.append(one)
        began.set()

    how = {"browser": False, "say": lambda line: None, "ready": ready}
    thread = threading.Thread(target=launch.serve, args=(site, 0), kwargs=how)
    thread.start()
    assert began.wait(20)
    while not servers[0].started and thread.is_alive():
        time.sleep(0.02)
    try:
        yield site.place / "open.html"
    finally:
        servers[0].should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield one
        one.close()


def opened(browser, key, **how):
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True, **how)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.heard = {"requests": [], "errors": []}
    page.on("request", lambda request: page.heard["requests"].append(request.url))
    failed = lambda answer: page.heard["errors"].append(f"{answer.status} {answer.url}")
    page.on("response", lambda answer: failed(answer) if answer.status >= 400 else None)
    page.on("pageerror", lambda error: page.heard["errors"].append(str(error)))
    page.on(
        "console",
        lambda m: page.heard["errors"].append(f"{m.text} {m.location}") if m.type == "error" else None,
    )
    page.goto(key.as_uri())
    page.wait_for_selector("html[data-ready=yes]", state="attached")
    return page


# Where the tests put things is nothing that a tour shows.
PLAINLY = """(names) => {
    const plainly = (text) => names.reduce((now, [found, shown]) => now.replaceAll(found, shown), text);
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode;
        if (plainly(text.data) !== text.data) text.data = plainly(text.data);
    }
    for (const one of document.querySelectorAll("input[type=text], textarea")) one.value = plainly(one.value);
    scrollTo(0, 0);
}"""


def picture(page, name):
    """Keep a picture of the page for the tour, in few colours: it is small then."""
    if PICTURES:
        from PIL import Image

        folder = page.get_attribute("#where-kept", "title")
        study = Path(folder).parent if Path(folder).name == "results" else Path(folder)
        page.evaluate(PLAINLY, [[str(study), "study"], [str(starter.HEAD.parent), "scans"]])
        image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        small = image.resize((1024, 640), Image.Resampling.LANCZOS).quantize(96, dither=Image.Dither.NONE)
        small.save(Path(PICTURES) / f"app_{name}.png", optimize=True)


def state(page, name, value):
    page.wait_for_selector(f"html[data-{name}='{value}']", state="attached")


def chosen(page, name):
    return page.locator(f"details[data-chosen='{name}']")


def add(page, kind, name):
    """Choose something that is offered, and open its card."""
    page.select_option("select[aria-label=Kind]", kind)
    page.fill("#search", name)
    page.click(f"button[aria-label='Add {name}']")
    page.fill("#search", "")


def set_field(card, name, value):
    if not card.evaluate("card => card.open"):
        card.locator("> summary").click()
    field = card.locator(f"[data-field={name}]")
    field.fill(value)
    field.press("Tab")


def clicked(page, part=(0.3, 0.2)):
    """Click into a plane of the picker."""
    canvas = page.locator("#picker canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + part[0] * box["width"], box["y"] + part[1] * box["height"]
    page.mouse.click(x, y)
    return x, y


def lacking(page):
    """What a page lacks that has just been opened is said in steps; what was wrong goes when it is mended."""
    page.keyboard.press("3")
    page.wait_for_selector("#lacking li:nth-child(4)")
    words = page.locator("#lacking li").all_inner_texts()
    assert [word.rpartition(" ")[2] for word in words] == ["1.", "1.", "1.", "2."]
    assert page.locator("#no-screens").is_visible()
    assert not page.locator("#controls").is_visible()
    page.keyboard.press("2")
    page.fill("#search", "no such method")
    page.wait_for_selector("#offered:has-text('Nothing of methods')")
    page.fill("#search", "")
    page.click("[data-step=choose]")
    page.select_option("#network", "zoo:brain_extraction_unet")
    page.click("#try")
    page.wait_for_selector("#say.bad:has-text('an image to try')")
    assert all("400" in error for error in page.heard["errors"])  # the refusal
    page.heard["errors"].clear()
    page.select_option("#network", "")
    page.wait_for_selector("#say:not(.bad)", state="attached")


def choose(page):
    """The network of the zoo and the example head; targets by clicking."""
    page.select_option("#network", "zoo:brain_extraction_unet")
    page.click("#example")
    page.wait_for_selector("#picture img")
    page.click("summary:has-text('Preparation')")
    for step, name, value in (("resize", "shape", "48"), ("normalise", "how", "maximum")):
        page.select_option("select[aria-label='Add to Steps of preparation']", step)
        control = page.locator(f"li[data-entry={step}] [data-field={name}]")
        if control.evaluate("e => e.tagName") == "SELECT":
            control.select_option(value)
        else:
            control.fill(value)
            control.press("Tab")
    page.click("#try")
    state(page, "tried", "yes")
    assert page.locator("#tried .tree").inner_text()
    page.wait_for_selector("#picker .screen[data-state=ready]")
    page.click("#picker button[data-class='1']")
    x, y = clicked(page)  # a voxel, its connected part, and a region that is painted there
    page.click("#picked button:has-text('this voxel')")
    page.click("#picked button:has-text('this part')")
    page.click("#paint")
    corners = ((-20, -20), (20, -20), (20, 20), (-20, 20), (-20, -20))
    page.mouse.move(x + corners[0][0], y + corners[0][1])
    page.mouse.down()
    for right, down in corners[1:]:
        page.mouse.move(x + right, y + down, steps=4)
    page.mouse.up()
    page.click("#picked button:has-text('use it')")
    page.wait_for_selector("[data-target=painted]")
    names = page.locator("[data-target]").evaluate_all("all => all.map((one) => one.dataset.target)")
    assert names == ["class1", "class1voxel", "class1part0", "painted"]
    picture(page, "choose")
    for name in names[1:]:  # one is enough for this run
        page.click(f"[data-target={name}] button:has-text('remove')")


def pick_methods(page):
    """Three methods, one with a parameter and one at a layer that is picked; a metric."""
    page.click("[data-step=methods]")
    add(page, "methods", "integrated_gradients")
    set_field(chosen(page, "integrated_gradients"), "steps", "4")
    add(page, "methods", "rise")
    set_field(chosen(page, "rise"), "samples", "100000")  # it is cancelled
    chosen(page, "rise").locator("> summary").click()
    add(page, "metrics", "relevance_mass")
    chosen(page, "relevance_mass").locator("> summary").click()
    chosen(page, "relevance_mass").locator("input[aria-label=mask]").fill("prediction")
    page.keyboard.press("Tab")
    set_field(chosen(page, "relevance_mass"), "methods", "grad_cam, integrated_gradients")
    chosen(page, "relevance_mass").locator("> summary").click()
    add(page, "methods", "grad_cam")
    set_field(chosen(page, "grad_cam"), "place", "no.such.layer")
    page.click("details[data-chosen=grad_cam] [data-pick=place]")
    page.fill("#browse input[type=search]", "encoder.2")
    page.click("#browse button[data-place='encoder.2.relu_b']")
    assert page.input_value("details[data-chosen=grad_cam] [data-field=place]") == "encoder.2.relu_b"
    state(page, "problems", "0")
    page.wait_for_selector("[data-cost=rise]:has-text('100000 values')")
    page.select_option("select[aria-label='Family']", "class activation maps")
    picture(page, "methods")


def test_from_an_empty_folder_to_maps_and_away_with_the_configuration(browser, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "private"))
    folder = tmp_path / "work"
    folder.mkdir()
    site = server.site_of(folder)
    with serving(site) as key:
        page = opened(browser, key)
        lacking(page)
        choose(page)
        pick_methods(page)
        # Run: progress, a map, a job that is cancelled, a reload in the middle.
        page.click("[data-step=run]")
        page.click("summary:has-text('Settings of the run')")
        page.click("summary:has-text('What is written')")
        page.select_option("#run-settings [data-field=figures]", "false")
        page.click("summary:has-text('Settings of the run')")
        page.click("#start")
        state(page, "run", "running")
        page.wait_for_selector(".map-entry[data-map$=gradCam]")
        page.wait_for_selector("#screens .screen[data-state=ready]")
        page.wait_for_selector("tr[data-job$=rise][data-status=running] progress[value]:not([value='0'])")
        picture(page, "run")
        page.reload()
        state(page, "ready", "yes")
        assert page.get_attribute("html", "data-step") == "run"
        page.click("tr[data-job$=rise] button")
        page.wait_for_selector("tr[data-job$=rise][data-status=cancelled]")
        state(page, "run", "ended")
        page.wait_for_selector("#failures li:has-text('cancelled')")
        page.wait_for_selector("#numbers tbody tr:nth-child(3)")
        assert page.locator(".map-entry").count() == 2
        page.click("#log-box summary")
        page.wait_for_function("() => document.getElementById('log').textContent.includes('rise')")
        # Keep: what was downloaded makes the same files.
        page.click("[data-step=keep]")
        with page.expect_download() as kept:
            page.click("#download")
        for how, words in (("python", "pipeline.run"), ("cluster", "#SBATCH"), ("command", "esegeta run")):
            page.click(f"[data-how={how}]")
            page.wait_for_function(
                "words => document.getElementById('kept').textContent.includes(words)", arg=words
            )
        page.click("[data-how=toml]")
        page.wait_for_selector("[data-how=toml][aria-pressed=true]")
        picture(page, "keep")
        away = tmp_path / "away"
        away.mkdir()
        kept.value.save_as(away / "esegeta.toml")
        assert page.heard["errors"] == []
        ours = key.read_text().partition('action="')[2].partition("api/session")[0]
        assert all(url.startswith((ours, "file:", "data:", "blob:")) for url in page.heard["requests"])
        page.context.close()
    command = [sys.executable, "-m", "esegeta", "run", str(away / "esegeta.toml"), "--plain"]
    only = ["--only", "grad_cam", "--only", "integrated_gradients"]
    subprocess.run([*command, *only], check=True, cwd=away, env=os.environ)
    maps = sorted(path.relative_to(away) for path in (away / "results").rglob("*statmap.nii.gz"))
    assert len(maps) == 2
    assert maps == sorted(path.relative_to(folder) for path in (folder / "results").rglob("*statmap.nii.gz"))
    assert all(filecmp.cmp(away / name, folder / name, shallow=False) for name in maps)
    look_at(browser, folder / "results")
    shutil.rmtree(away)


def look_at(browser, results):
    """Open a finished run: maps side by side with crosshairs that go together; nothing is computed."""
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*") if path.is_file()}
    with serving(server.site_of(results)) as key:
        page = opened(browser, key, color_scheme="dark")
        assert page.get_attribute("html", "data-step") == "run"
        assert page.locator("#start").is_disabled()
        page.wait_for_selector("#screens .screen[data-state=ready]")
        page.check("#several")
        page.keyboard.press("Tab")
        page.click(".map-entry[data-map$=integratedGradients]")
        page.wait_for_selector("#screens .screens.n2 .screen:nth-child(2)[data-state=ready]")
        before_click = page.inner_text("#where")
        box = page.locator("#screens .screen canvas").first.bounding_box()
        page.mouse.click(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.3)
        page.wait_for_function(
            "text => document.getElementById('where').textContent !== text", arg=before_click
        )
        words = page.inner_text("#where")
        assert words.count("±") == 2  # the value of either map at the same place
        page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.2)  # and under the cursor
        page.wait_for_function("text => document.getElementById('where').textContent !== text", arg=words)
        picture(page, "maps")
        page.locator("#threshold").press("End")
        page.wait_for_selector("label:has(#threshold) output:has-text('95 %')")
        page.uncheck("#symmetric")
        page.locator("body").press("n")
        page.click("#grid")
        page.wait_for_function(
            "() => document.querySelectorAll('.map-entry[aria-pressed=true]').length === 2"
        )
        assert page.locator("#report").is_visible()
        with page.expect_download() as report:
            page.click("#report")
        assert report.value.path().stat().st_size > 10_000
        assert page.heard["errors"] == []
        page.context.close()
    after = {path: path.stat().st_mtime_ns for path in results.rglob("*") if path.is_file()}
    assert before == after


def test_tables_of_kinds_presets_transforms_and_a_configuration_that_is_loaded(
    browser, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "private"))
    folder = tmp_path / "work"
    folder.mkdir()
    site = server.site_of(folder)
    text = f"""
    model.source = "zoo:brain_extraction_unet"
    input.files = "{starter.HEAD}"
    run.baseline = "zero"
    [[targets]]
    name = "brain"
    class = 1
    [[methods]]
    name = "gradient"
    """
    (tmp_path / "theirs.toml").write_text(text)
    with serving(site) as key:
        page = opened(browser, key)
        other = opened(browser, key)  # it sees what the first does
        page.keyboard.press("4")
        page.set_input_files("#load", tmp_path / "theirs.toml")
        page.keyboard.press("2")
        chosen(page, "gradient").wait_for()
        page.click("[data-preset='quick look']")
        assert chosen(page, "grad_cam").count() == 1
        set_field(chosen(page, "grad_cam"), "place", "encoder.2.relu_b")
        gradient = chosen(page, "gradient")
        gradient.locator("> summary").click()
        for name in ("smooth", "absolute"):
            gradient.locator("select[aria-label='Add to Transforms']").select_option(name)
        order = lambda: gradient.locator("li[data-entry]").evaluate_all(
            "all => all.map((e) => e.dataset.entry)"
        )
        gradient.locator("button[aria-label='absolute up']").click()
        assert order() == ["absolute", "smooth"]
        first, second = (gradient.locator(f"li[data-entry={name}] strong") for name in order())
        first.hover()
        page.mouse.down()
        second.hover()
        second.hover()  # the browser begins to drag with the second move
        page.mouse.up()
        assert order() == ["smooth", "absolute"]
        add(page, "uncertainty", "uncertainty")
        card = chosen(page, "uncertainty[0]")
        card.locator("[data-field=draws]").select_option("augmentation")
        card.locator("select[aria-label='Add to changes']").select_option("affine")
        set_field(card, "samples", "4")
        add(page, "summary", "summary")
        set_field(chosen(page, "summary[]"), "regions", "prediction, components")
        add(page, "dreams", "channel")
        state(page, "problems", "2")  # a dream needs its place and channel
        page.wait_for_selector("#faults li:has-text('dreams[0]')")
        page.click("button[aria-label='Remove channel']")
        state(page, "problems", "0")
        tables = loading.load(folder / "app.toml")
        (estimate,) = tables.more["uncertainty"]
        assert (estimate.draws, estimate.samples, estimate.calls[0].name) == ("augmentation", 4, "affine")
        assert tables.more["summary"].regions == ["prediction", "components"]
        assert [one.name for one in tables.methods[0].transforms] == ["smooth", "absolute"]
        other.keyboard.press("2")
        chosen(other, "uncertainty[0]").wait_for()
        assert page.heard["errors"] == other.heard["errors"] == []
        page.context.close()
        other.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_colours_of_the_reader_and_every_control_has_a_name(
    browser, tmp_path, monkeypatch, scheme
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "private"))
    folder = tmp_path / "work"
    folder.mkdir()
    evil = "<img src=x onerror=\"document.title='ran'\">"
    site = server.site_of(folder)
    site.state.keep({"model": {"source": evil}, "targets": [{"name": evil}], "methods": [{"name": evil}]})
    with serving(site) as key:
        page = opened(browser, key, color_scheme=scheme)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        for step in "1234":
            page.keyboard.press(step)
            nameless = page.evaluate(NAMELESS)
            assert nameless == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            picture(page, f"{scheme}_{step}")
        page.keyboard.press("?")
        assert page.locator("#help").is_visible()
        assert page.title() == "esegeta"
        page.context.close()
