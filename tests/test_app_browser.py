"""The page in a real browser: from an empty folder to maps, and away with the configuration."""

import contextlib
import filecmp
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
    page.on("pageerror", lambda error: page.heard["errors"].append(str(error)))
    page.on("console", lambda m: page.heard["errors"].append(m.text) if m.type == "error" else None)
    page.goto(key.as_uri())
    page.wait_for_selector("html[data-ready=yes]", state="attached")
    return page


def picture(page, name):
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"app_{name}.png")


def state(page, name, value):
    page.wait_for_selector(f"html[data-{name}={value}]", state="attached")


def test_from_an_empty_folder_to_maps_and_away_with_the_configuration(browser, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "private"))
    folder = tmp_path / "work"
    folder.mkdir()
    site = server.site_of(folder)
    with serving(site) as key:
        page = opened(browser, key)
        # Choose: the network of the zoo, the example, what is explained.
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
        page.click("#picker button[data-class='1']")
        assert page.locator("[data-target=class1]").count() == 1
        page.wait_for_selector("#picker .screen[data-state=ready]")
        picture(page, "choose")
        # Methods: three, one with a parameter.
        page.click("[data-step=methods]")
        page.click("button[aria-label='Add gradient']")
        page.fill("#search", "integrated")
        page.click("button[aria-label='Add integrated_gradients']")
        page.fill("#search", "rise")
        page.click("button[aria-label='Add rise']")
        page.fill("#search", "")
        page.click("details[data-chosen=integrated_gradients] summary")
        page.fill("details[data-chosen=integrated_gradients] [data-field=steps]", "4")
        page.keyboard.press("Tab")
        page.click("details[data-chosen=rise] summary")
        page.fill("details[data-chosen=rise] [data-field=samples]", "100000")  # it is cancelled
        page.keyboard.press("Tab")
        picture(page, "methods")
        # Run: progress, a map, a job that is cancelled, a reload in the middle.
        page.click("[data-step=run]")
        page.click("#start")
        state(page, "run", "running")
        page.wait_for_selector(".map-entry[data-map$=gradient]")
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
        assert page.locator(".map-entry").count() == 2
        page.check("#several")
        page.click(".map-entry[data-map$=integrated_gradients]")
        page.wait_for_selector("#screens .screens.n2 .screen:nth-child(2)[data-state=ready]")
        assert page.locator("#numbers tbody tr").count() == 3
        picture(page, "maps")
        # Keep: what was downloaded makes the same files.
        page.click("[data-step=keep]")
        with page.expect_download() as kept:
            page.click("#download")
        picture(page, "keep")
        away = tmp_path / "away"
        away.mkdir()
        kept.value.save_as(away / "esegeta.toml")
        assert page.heard["errors"] == []
        ours = key.read_text().partition('action="')[2].partition("api/session")[0]
        assert all(url.startswith((ours, "file:", "data:", "blob:")) for url in page.heard["requests"])
        page.context.close()
    command = [sys.executable, "-m", "esegeta", "run", str(away / "esegeta.toml"), "--plain"]
    only = ["--only", "gradient", "--only", "integrated_gradients"]
    subprocess.run([*command, *only], check=True, cwd=away, env=os.environ)
    maps = sorted(path.relative_to(away) for path in (away / "results").rglob("*statmap.nii.gz"))
    assert len(maps) == 2
    assert maps == sorted(path.relative_to(folder) for path in (folder / "results").rglob("*statmap.nii.gz"))
    assert all(filecmp.cmp(away / name, folder / name, shallow=False) for name in maps)
    shutil.rmtree(away)


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
