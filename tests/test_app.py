"""The page's server: who is let in, what it keeps, and what it does not lose."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

testclient = pytest.importorskip("starlette.testclient", reason="the page needs the extra gui")
pytest.importorskip("uvicorn", reason="the page needs the extra gui")

from esegeta.app import forms, keeping, launch, private, runs, server, state, trial  # noqa: E402
from esegeta.app.security import HEADERS, Folders, ForbiddenError, door, refusal  # noqa: E402
from esegeta.run.config import loading, schema, sources, starter, trust  # noqa: E402
from esegeta.run.config.faults import Faults  # noqa: E402
from esegeta.run.jobs import summary  # noqa: E402

HOST = "http://localhost:8765"
PREPARED = [{"step": "resize", "shape": 40}, {"step": "normalise", "how": "maximum"}]
TABLES = {
    "model": {"source": "zoo:brain_extraction_unet"},
    "input": {"files": str(starter.HEAD), "preprocess": PREPARED},
    "targets": [{"name": "brain", "class": 1}],
    "methods": [{"name": "gradient"}, {"name": "integrated_gradients", "parameters": {"steps": 4}}],
    "run": {"output": "results", "workers": 1, "baseline": "zero"},
    "output": {"figures": False},
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of work, with the private ones elsewhere."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "private"))
    monkeypatch.delenv("ESEGETA_TRUST", raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def site(home):
    return server.site_of(home)


def client_of(site, **headers):
    given = {"authorization": f"Bearer {site.door.token}", **headers}
    return testclient.TestClient(
        server.app(site), base_url=HOST, headers=given, raise_server_exceptions=False
    )


@pytest.fixture
def client(site):
    with client_of(site) as found:
        yield found


# --- Who is let in ----------------------------------------------------------------------------------------

EVERY_ROUTE = (
    "/",
    "/assets/app.css",
    "/assets/niivue.js",
    "/api/state",
    "/api/forms",
    "/api/events",
    "/api/files",
)


@pytest.mark.parametrize("path", EVERY_ROUTE)
def test_page_assets_and_events_need_the_token(site, path):
    with testclient.TestClient(server.app(site), base_url=HOST) as stranger:
        for headers in ({}, {"authorization": "Bearer guess"}, {"cookie": f"{site.door.cookie}=guess"}):
            answer = stranger.get(path, headers=headers)
            assert answer.status_code == 401
            assert site.door.token not in answer.text
            assert HEADERS.items() <= dict(answer.headers).items()


def test_the_token_is_exchanged_for_a_cookie_that_opens_the_page(site):
    with testclient.TestClient(server.app(site), base_url=HOST) as browser:
        assert browser.post("/api/session", data={"token": "guess"}).status_code == 401
        found = browser.post("/api/session", data={"token": site.door.token}, headers={"origin": "null"})
        cookie = found.headers["set-cookie"].lower()
        assert found.status_code == 200
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert site.door.token not in cookie
        assert browser.get("/").text.startswith("<!doctype html>")
        assert browser.get("/api/state").json()["tables"]["run"]["output"] == "results"


GOOD = {"host": "localhost:9000"}


def asked(door, method="GET", path="/api/state", **headers):
    found = refusal(method, path, {**GOOD, "authorization": f"Bearer {door.token}", **headers}, door)
    return found and found[0]


def test_a_tunnel_has_another_port_and_other_names_are_refused():
    here = door("secret")
    for host in ("localhost:9000", "127.0.0.1:8765", "[::1]:1", "LOCALHOST"):
        assert asked(here, host=host) is None
    for host in (
        "evil.example",
        "localhost.evil.example:8765",
        "127.0.0.1.nip.io",
        "192.168.0.2:8765",
        "",
        "a@localhost",
    ):
        assert asked(here, host=host) == 403


def test_other_origins_change_nothing_and_read_nothing():
    here = door("secret")
    cookie = {"cookie": f"{here.cookie}={here.session}", "authorization": ""}
    own = {"origin": "http://localhost:9000"}
    assert asked(here, "POST", **cookie, **own) is None
    assert asked(here, "PUT", **cookie) == 403  # a browser always says where it comes from
    for origin in ("http://evil.example", "http://localhost:3000", "null", "https://localhost"):
        assert asked(here, "POST", **cookie, origin=origin) == 403
        assert asked(here, "GET", **cookie, origin=origin) == 403
    for where in ("cross-site", "same-site"):
        assert asked(here, "GET", "/api/events", **cookie, **{"sec-fetch-site": where}) == 403
        assert asked(here, "POST", **cookie, **own, **{"sec-fetch-site": where}) == 403


def test_a_proxy_has_a_name_an_origin_and_a_path_of_its_own(home):
    there = door("secret", "https://hub.example.org/user/me/proxy/8765")
    cookie = {"cookie": f"{there.cookie}={there.session}", "authorization": ""}
    assert asked(there, "POST", host="hub.example.org", origin="https://hub.example.org", **cookie) is None
    assert (
        asked(there, "POST", origin="https://hub.example.org", **cookie) is None
    )  # the proxy has renamed the host
    assert asked(there, "POST", host="hub.example.org", origin="https://evil.example", **cookie) == 403
    for wrong in ("ftp://a/b", "/a?b", "https://a b/", "/<i>"):
        with pytest.raises(ValueError, match="--base-url to be a path or an address"):
            door("t", wrong)
    site = server.site_of(home, base_url="/user/me/proxy/8765/")
    with client_of(site) as client:
        assert client.get("/user/me/proxy/8765/api/state").status_code == 200  # some leave the path there
        assert client.get("/api/state").status_code == 200  # some take it away
        cookie = client.post("/user/me/proxy/8765/api/session", data={"token": site.door.token}).headers[
            "set-cookie"
        ]
        assert "path=/user/me/proxy/8765/" in cookie.lower()


def test_private_files_are_for_the_owner_alone(home, site):
    assert stat.S_IMODE(site.place.stat().st_mode) == 0o700
    assert stat.S_IMODE((site.place / "token").stat().st_mode) == 0o600
    assert server.site_of(home).door.token == site.door.token  # whoever was let in stays so after a restart
    (site.place / "token").unlink()
    (site.place / "token").symlink_to(home / "elsewhere")
    with pytest.raises(ValueError, match="belong to whoever starts the page"):
        server.site_of(home)


def test_the_browser_is_opened_through_a_file_and_names_are_escaped(site):
    from esegeta.app.security import key_page

    text = key_page('http://127.0.0.1:1/"><script>', site.door.token)
    assert "<script>document" in text
    assert '"><script>' not in text.replace('"><button', "")
    assert site.door.token not in " ".join(launch.advice(1, {}, False, site.place / "open.html"))


@pytest.mark.parametrize(
    ("environment", "container", "words"),
    [
        (
            {"SSH_CONNECTION": "1.1.1.1 1 10.0.0.2 22", "USER": "me"},
            False,
            "ssh -L 8000:localhost:8000 me@10.0.0.2",
        ),
        ({"JUPYTERHUB_USER": "me"}, False, "--base-url"),
        ({}, True, "--network host"),
        ({}, False, "open.html"),
    ],
)
def test_it_says_how_to_get_there(environment, container, words):
    lines = launch.advice(8000, environment, container, Path("/k/open.html"))
    assert any(words in line for line in lines)


# --- Files ------------------------------------------------------------------------------------------------


def test_nothing_outside_of_the_allowed_folders_is_read(home, client, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    np.save(outside / "secret.npy", np.zeros((4, 4), np.float32))
    np.save(home / "mine.npy", np.zeros((4, 4), np.float32))
    (home / "link.npy").symlink_to(outside / "secret.npy")
    (home / "linked").symlink_to(outside)
    (home / ".hidden").mkdir()
    names = [entry["name"] for entry in client.get("/api/files").json()["entries"]]
    assert names == ["mine.npy"]
    assert client.get("/api/image", params={"path": "mine.npy"}).json()["shape"] == [4, 4]
    for path in (
        "../outside/secret.npy",
        str(outside / "secret.npy"),
        "link.npy",
        "linked/secret.npy",
        "/etc/passwd",
    ):
        for route in ("/api/image", "/api/image/thumbnail"):
            assert client.get(route, params={"path": path}).status_code == 403
    for path in ("..", "/", str(outside), "linked", ".hidden", "a\0b"):
        assert client.get("/api/files", params={"path": str(home / path)}).status_code == 403
    for name in ("../server.py", "..%2fserver.py", "%2e%2e/server.py", "server.py"):
        assert client.get(f"/assets/{name}").status_code == 404
    for job in ("../../outside/secret", "a/b", "\0"):
        assert client.get("/api/results/volume", params={"job": job}).status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        {"input": {"files": "../outside/*.npy"}},
        {"input": {"files": [["/etc/passwd"]]}},
        {"input": {"files": "linked/*.npy"}},
        {"model": {"source": "zoo:small_unet", "weights": "~/weights.pth"}},
        {"model": {"source": "/somewhere/net.pt2"}},
        {"reference": {"files": "../outside/*.npy"}},
        {"plugins": ["../plugin.py"]},
        {"run": {"output": "../elsewhere"}},
        {"run": {"output": "/tmp/elsewhere"}},
        {"targets": [{"name": "a", "reducer": "region", "parameters": {"mask": {"file": "/etc/passwd"}}}]},
    ],
)
def test_a_configuration_names_nothing_outside(home, site, change, tmp_path):
    (tmp_path / "outside").mkdir()
    np.save(tmp_path / "outside" / "secret.npy", np.zeros((4, 4), np.float32))
    (home / "linked").symlink_to(tmp_path / "outside")
    site.state.keep({**TABLES, **change})
    with pytest.raises(Faults, match=r"a path in the folders of the page|a folder in"):
        site.state.config()
    with client_of(site) as client:
        assert client.post("/api/run", json={}).status_code == 400
    assert not list(home.glob("results*"))


def test_uploads_are_bounded_named_safely_and_lie_where_nothing_is_trusted(home, tmp_path):
    site = server.site_of(home, most=2000)
    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.float32))
    content = (tmp_path / "a.npy").read_bytes()
    with client_of(site) as client:
        send = lambda name, content: client.post("/api/uploads", params={"name": name}, content=content)
        found = send("../../<b>a b.npy", content).json()
        path = Path(found["path"])
        assert path.name == "_b_a_b.npy"
        assert path.is_relative_to(site.uploads)
        assert not path.is_relative_to(home)
        assert found["shape"] == [4, 4]
        assert client.get("/api/image", params={"path": str(path)}).status_code == 200
        assert send("a.npy", bytes(3000)).status_code == 413
        assert (
            client.post(
                "/api/uploads", params={"name": "a.npy"}, content=(bytes(900) for _ in range(5))
            ).status_code
            == 413
        )  # without a length
        for name in ("evil.py", "net.pt2", "net.ts", "net.pt", "a.toml", "", "..", "a.npy/.py"):
            assert send(name, content).status_code == 400
        assert send("b.npy", b"no array").status_code == 400
        assert [p.name for p in site.uploads.rglob("*") if p.is_file()] == ["_b_a_b.npy"]
        assert client.put("/api/state/text", content=b"a = " + b"[" * 500).status_code == 400
        assert client.put("/api/state", content=bytes(5 * 2**20)).status_code == 400


def test_uploads_go_elsewhere_where_the_private_folder_is_trusted(home, site, monkeypatch, tmp_path):
    everything = trust.asked(tmp_path)
    assert everything.holds(site.place)
    monkeypatch.setattr(
        private.tempfile, "gettempdir", lambda: str(tmp_path.parent / f"{tmp_path.name}-away")
    )
    found = private.uploads(site.place, everything)
    assert not everything.holds(found)
    with pytest.raises(ValueError, match="a place for uploads that is not trusted"):
        private.uploads(site.place, trust.asked("", ["/"]))


def test_code_runs_only_as_the_command_line_allows(home, tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "theirs.py").write_text("raise RuntimeError('it ran')\n")
    (code / "net.pt2").write_bytes(b"no program")
    (home / "own.py").write_text("import torch\ndef build():\n    return torch.nn.Conv3d(1, 2, 1)\n")
    site = server.site_of(home, browse=(code,))
    for model in ({"source": "theirs:build", "path": str(code)}, {"source": str(code / "net.pt2")}):
        site.state.keep({**TABLES, "model": model})
        with pytest.raises(Faults, match="If you trust"):
            site.state.config()
        with pytest.raises(ValueError, match="If you trust"):
            trial.run(server._trial(site))
    site.state.keep(
        {**TABLES, "model": {"source": "own:build"}}
    )  # beside the configuration, as for `esegeta run`
    assert site.state.problems() == []
    trusting = server.site_of(home, browse=(code,), trust_given=(str(code),))
    trusting.state.keep({**TABLES, "model": {"source": str(code / "net.pt2")}})
    assert trusting.state.problems() == []
    assert "--trust" in keeping.written(trusting.state, "command")[0]
    with pytest.raises(ValueError, match="no key `trust`"):
        site.state.keep({**TABLES, "trust": [str(code)]})


def test_uploaded_weights_load_no_code(home, site, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    with client_of(site) as client:
        path = client.post(
            "/api/uploads", params={"name": "w.pth"}, content=pickle.dumps({"a": Evil()})
        ).json()["path"]
    (home / "own.py").write_text("import torch\ndef build():\n    return torch.nn.Conv3d(1, 2, 1)\n")
    site.state.keep({**TABLES, "model": {"source": "own:build", "weights": path}})
    asked = server._trial(site)
    with pytest.raises(ValueError, match="tensors only"):
        sources.load(schema.Model.model_validate(asked["model"]), trust=trust.from_json(asked["trust"]))
    assert not (tmp_path / "ran").exists()


# --- State ------------------------------------------------------------------------------------------------


def test_the_state_is_a_configuration_that_runs_without_the_page(home, client, site):
    mark = client.get("/api/state").json()["mark"]
    assert client.put("/api/state", json={"tables": TABLES, "mark": mark}).status_code == 200
    found = loading.load(home / "app.toml")
    assert [method.id for method in found.methods] == ["gradient", "integrated_gradients"]
    assert client.get("/api/problems").json()["costs"]["integrated_gradients"] == {
        "count": 4,
        "needs": "gradients",
    }
    text = client.get("/api/keep/toml").text
    assert client.put("/api/state/text", content=text).json()["tables"] == TABLES
    space = {}
    script = client.get("/api/keep/python").text
    exec(compile(script, "script", "exec"), space)
    assert space["CONFIG"] == TABLES
    assert "esegeta run" in client.get("/api/keep/cluster").text
    assert "attachment" in client.get("/api/keep/toml?download").headers["content-disposition"]


def test_two_browsers_see_the_same_and_neither_overwrites_the_other_unseen(home, site):
    with client_of(site) as one, client_of(site) as other:
        mark = one.get("/api/state").json()["mark"]
        assert other.put("/api/state", json={"tables": TABLES, "mark": mark}).status_code == 200
        stale = one.put("/api/state", json={"tables": {"run": {}}, "mark": mark})
        assert stale.status_code == 409
        assert one.get("/api/state").json()["tables"] == TABLES
        (home / "app.toml").write_text('[model]\nsource = "zoo:small_unet"\n')  # and so does an editor
        assert one.get("/api/state").json()["tables"] == {"model": {"source": "zoo:small_unet"}}
        (home / "app.toml").write_text("[model")
        assert "a fault in it" in one.get("/api/state").json()["fault"]


def test_what_is_wrong_is_said_in_words(client):
    wrong = {**TABLES, "methods": [{"name": "integrated_gradients", "parameters": {"steps": "many"}}]}
    client.put("/api/state", json={"tables": wrong})
    (line,) = client.get("/api/problems").json()["problems"]
    assert line.startswith("methods[0].parameters.steps: expected a whole number")
    assert client.post("/api/run", json={}).json()["errors"] == [line]


def test_names_with_html_stay_text(client, home):
    evil = "<img src=x onerror=alert(1)>"
    np.save(home / f"{evil}.npy", np.zeros((4, 4), np.float32))
    answer = client.get("/api/files")
    assert answer.headers["content-type"].startswith("application/json")
    assert evil + ".npy" in [entry["name"] for entry in answer.json()["entries"]]
    assert (
        client.get("/api/image", params={"path": f"/{evil}"})
        .headers["content-type"]
        .startswith("application/json")
    )
    page = Path(server.ASSETS / "index.html").read_text()
    assert "onclick" not in page
    for script in server.ASSETS.glob("*.js"):
        assert "innerHTML" not in script.read_text()
        assert "http://" not in script.read_text().replace("http://www.w3.org", "")


# --- What is offered --------------------------------------------------------------------------------------


def test_everything_that_is_registered_is_offered_with_words_for_every_field():
    from esegeta._registry import METHODS, METRICS

    found = forms.everything()
    assert {m["name"] for m in found["methods"]} == set(METHODS)
    assert {m["name"] for m in found["metrics"]} == set(METRICS)
    for one in (*found["methods"], *found["transforms"], *found["metrics"]):
        assert one["line"]
        assert all(field["help"] for field in one["fields"]), one["name"]
    known = {m["name"]: m for m in found["methods"]}
    steps, rule = known["integrated_gradients"]["fields"]
    assert known["integrated_gradients"]["cost"] == 32
    assert (steps["kind"], steps["default"], steps["range"]) == ("integer", 32, "an int >= 1")
    assert (rule["kind"], rule["choices"][:2]) == ("choice", ["gauss-legendre", "midpoint"])
    assert known["grad_cam"]["place"]
    features = next(f for f in known["lime"]["fields"] if f["name"] == "features")
    assert "grid" in [maker["name"] for maker in features["makers"]]
    assert all(set(preset["methods"]) <= set(METHODS) for preset in found["presets"])
    json.dumps(found)


def test_every_table_that_a_kind_of_jobs_brings_is_offered_with_words_for_every_field():
    from esegeta.run.jobs import kinds

    found = {one["name"]: one for one in forms.tables()}
    known = {kind.table for kind in kinds.known() if kind.section is not None}
    assert set(found) == known - set(forms.BY_NAME)
    for one in (*found.values(), *forms.everything()["sections"].values()):
        assert one["line"]
        assert all(field["help"] for field in one["fields"]), one
    fields = {field["name"]: field for field in found["uncertainty"]["fields"]}
    assert (fields["samples"]["kind"], fields["samples"]["default"]) == ("integer", 30)
    assert "affine" in [maker["name"] for maker in fields["changes"]["makers"]]
    assert {field["name"]: field["kind"] for field in found["summary"]["fields"]}["regions"] == "texts"


def test_every_volume_of_a_record_is_looked_at_and_nothing_else(home, client):
    folder = home / "results"
    (folder / ".jobs").mkdir(parents=True)
    image = nibabel.nifti1.Nifti1Image(np.random.default_rng(0).normal(size=(8, 8, 8)), np.eye(4))
    for name in ("mean", "entropy", "dream"):
        image.to_filename(folder / f"{name}.nii.gz")
    image.to_filename(home / "outside.nii.gz")
    maps = {"mean": "mean.nii.gz", "entropy": "entropy.nii.gz", "far": "../outside.nii.gz"}
    records = {"u": {"maps": maps}, "d": {"image": "dream.nii.gz"}, "f": {"status": "failed", "maps": maps}}
    for name, more in records.items():
        record = {"id": name, "kind": "uncertainty", "subject": "s", "status": "done", "digest": "1", **more}
        (folder / ".jobs" / f"{name}.json").write_text(json.dumps(record))
    rows = {row["id"]: row["volumes"] for row in client.get("/api/results").json()["rows"]}
    assert rows == {"u": ["maps.mean", "maps.entropy"], "d": ["image"], "f": []}
    ask = lambda what, job="u": client.get("/api/results/volume", params={"job": job, "what": what})
    assert ask("maps.mean").headers["x-esegeta-copy"]
    assert ask("image", "d").status_code == 200
    picture = client.get("/api/results/picture", params={"job": "d", "what": "image"})
    assert picture.headers["content-type"] == "image/png"
    assert [ask(what).status_code for what in ("maps.far", "maps.none", "status", "../../etc")] == [
        404,
        404,
        400,
        400,
    ]


def test_copies_for_the_screen_are_bounded_whatever_the_size_of_a_map(tmp_path, monkeypatch):
    from esegeta.app import pictures

    monkeypatch.setattr(pictures, "SHELF", pictures.Shelf(600_000))
    rng = np.random.default_rng(0)
    for n in range(2):
        volume = nibabel.nifti1.Nifti1Image(rng.normal(size=(64, 64, 64)).astype(np.float32), np.eye(4))
        volume.to_filename(tmp_path / f"{n}.nii")
        preview, about = pictures.copy(tmp_path / f"{n}.nii", "map", "preview")
        fine, _ = pictures.copy(tmp_path / f"{n}.nii", "map", "fine")
        assert len(preview) < pictures.LEVELS["preview"] < len(fine) < pictures.LEVELS["fine"]
        assert (about["full"], max(about["shape"]) < 64) == ([64, 64, 64], True)
    assert sum(map(len, pictures.SHELF.kept.values())) <= 600_000


# --- A real server ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(site):
    """The server in a thread of its own, on a port of this machine."""
    began, said = threading.Event(), []
    servers = []

    def ready(one):
        servers.append(one)
        began.set()

    thread = threading.Thread(
        target=launch.serve, args=(site, 0), kwargs={"browser": False, "say": said.append, "ready": ready}
    )
    thread.start()
    assert began.wait(20)
    end = time.monotonic() + 20
    while not servers[0].started and time.monotonic() < end:
        time.sleep(0.02)
    try:
        yield servers[0].config.loaded and int(said[0].split(":")[2].split("/")[0])
    finally:
        servers[0].should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def ask(site, port, path, method="GET", body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {"authorization": f"Bearer {site.door.token}"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def events_of(site, port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/api/events", headers={"authorization": f"Bearer {site.door.token}"})
    return connection, connection.getresponse()


def next_event(stream):
    while not (line := stream.readline()).startswith(b"data: "):
        assert line, "the stream has ended"
    return json.loads(line[6:])


def journal(folder, events):
    """Write the journal of a run as the run itself does."""
    (folder / ".jobs").mkdir(parents=True, exist_ok=True)
    with open(folder / ".jobs" / "events.jsonl", "a") as file:
        for event in events:
            file.write(json.dumps({"time": 1.0, "job": None, **event}) + "\n")


def test_many_at_once_and_one_that_leaves_lose_nothing(home, site):
    jobs = [f"job{n}" for n in range(50)]
    site.state.keep(TABLES)
    with serving(site) as port, concurrent.futures.ThreadPoolExecutor(40) as pool:
        gone, stream = events_of(site, port)
        next_event(stream)
        stays, other = events_of(site, port)
        first = next_event(other)
        assert first["run"]["state"] == "none"
        gone.close()  # in the middle
        journal(home / "results", [{"event": "planned", "total": 50, "jobs": jobs}])
        done = {"status": "done", "error": None, "seconds": 1.0, "peak_memory": 1, "device": "cpu"}
        asked = [pool.submit(ask, site, port, "/api/state") for _ in range(200)]
        for name in jobs:
            journal(
                home / "results",
                [{"event": "begin", "job": name}, {"event": "job_done", "job": name, "outcome": done}],
            )
        assert {answer.result()[0] for answer in asked} == {200}
        seen = {}
        while sum(job["status"] == "done" for job in seen.values()) < 50:
            seen |= next_event(other).get("jobs", {})
        assert set(seen) == set(jobs)
        stays.close()
        assert json.loads(ask(site, port, "/api/state")[1])["tables"] == TABLES
        with (
            pytest.raises(ValueError, match="for itself, got a page that is open already"),
            launch.alone(site),
        ):
            pass


def test_a_reader_that_was_away_is_told_what_has_changed_and_a_new_run_begins_anew(tmp_path):
    watch = runs.Watch(tmp_path)
    assert not watch.look()
    journal(tmp_path, [{"event": "planned", "total": 2, "jobs": ["a", "b"]}, {"event": "begin", "job": "a"}])
    assert watch.look()
    assert watch.jobs["a"]["status"] == "running"
    known, before = watch.number, watch.generation
    failed = {"status": "refused", "error": "no", "seconds": 1.0, "peak_memory": 1, "device": "cpu"}
    journal(tmp_path, [{"event": "job_done", "job": "a", "outcome": failed}, {"event": "ended"}])
    watch.look()
    assert list(watch.since(known)) == ["a"]
    assert watch.jobs["a"]["error"] == "no"
    assert watch.ended
    (tmp_path / ".jobs" / "events.jsonl").unlink()
    journal(tmp_path, [{"event": "planned", "total": 1, "jobs": ["c"], "time": 2.0}])
    watch.look()
    assert (set(watch.jobs), watch.generation > before) == ({"c"}, True)


def started(home, environment):
    process = subprocess.Popen(
        [sys.executable, "-m", "esegeta", "app", str(home), "--port", "0", "--no-browser"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
    )
    line = process.stdout.readline()
    return process, int(line.split(":")[2].split("/")[0])


@pytest.mark.slow
def test_a_job_survives_the_page_and_the_server_and_a_killed_server_comes_back(home, site, tmp_path):
    site.state.keep(TABLES)
    environment = {"XDG_STATE_HOME": str(tmp_path / "private")}
    process, port = started(home, environment)
    try:
        assert ask(site, port, "/api/run", "POST", "{}")[0] == 200
        connection, stream = events_of(site, port)
        while next_event(stream).get("run", {}).get("state") != "running":
            pass
        connection.close()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    process, port = started(home, environment)
    try:
        connection, stream = events_of(site, port)
        jobs, word = {}, ""
        while word != "ended":
            news = next_event(stream)
            jobs |= news.get("jobs", {})
            word = news.get("run", {}).get("state", word)
        connection.close()
        assert {job["status"] for job in jobs.values()} == {"done"}
        rows = json.loads(ask(site, port, "/api/results")[1])["rows"]
        maps = [row["id"] for row in rows if row["has"]["map"]]
        assert len(maps) == 2
        assert json.loads(ask(site, port, "/api/state")[1])["tables"] == TABLES
        status, content = ask(site, port, f"/api/results/volume?job={maps[0]}&what=map&level=preview")
        assert (status, content[:2]) == (200, b"\x1f\x8b")
        assert ask(site, port, f"/api/results/picture?job={maps[0]}")[1][1:4] == b"PNG"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
    finished = server.site_of(home / "results")  # opened to be looked at alone
    with client_of(finished) as client:
        assert client.get("/api/state").json()["finished"]
        assert len(client.get("/api/results").json()["rows"]) >= 2
        assert client.put("/api/state", json={"tables": TABLES}).status_code == 400
        assert client.post("/api/run", json={}).status_code == 400
        assert client.get("/api/report").status_code == 200


@pytest.mark.slow
def test_a_trial_tells_the_places_the_classes_and_the_part_under_a_voxel(site):
    site.state.keep(TABLES)
    found = trial.run(server._trial(site))
    assert found["output"] == [1, 40, 40, 40]
    assert "encoder.2.relu_b" in [place["name"] for place in found["places"]]
    answer = nibabel.load(site.place / trial.ANSWER)
    inside = np.argwhere(summary.components(answer.get_fdata() > 0) == 0)
    mm = lambda voxel: nibabel.affines.apply_affine(answer.affine, voxel).tolist()
    assert found["parts"]["1"][0] == len(inside) > 1
    there = trial.part_at(answer.get_filename(), mm(inside[0]))
    assert there == {"class": 1, "part": 0, "index": inside[0].tolist()}
    assert trial.part_at(answer.get_filename(), mm([0, 0, 0]))["part"] is None
    with pytest.raises(ValueError, match="a place in an image"):
        trial.part_at(answer.get_filename(), mm([0, 0, 99]))


def test_folders_follow_links_before_they_decide(tmp_path):
    inner = tmp_path / "a"
    inner.mkdir()
    (inner / "out").symlink_to(tmp_path)
    folders = Folders((inner,))
    assert folders.real(inner) == inner
    for path in (inner / "out", inner / ".." / "b", inner / ".x" / "y", tmp_path):
        with pytest.raises(ForbiddenError, match="expected a path in"):
            folders.real(path)


def test_tables_are_written_so_that_they_read_back():
    given = {
        "plugins": ["a.py"],
        "run": {"key": 1, "memory": None},
        "methods": [],
        "a b": {"c": [1.5, {"d": "é\x7f"}]},
    }
    assert state.parsed(state.written(given)) == {
        "plugins": ["a.py"],
        "run": {"key": 1},
        "a b": {"c": [1.5, {"d": "é\x7f"}]},
    }
    for wrong in ('{"a": 1', "a = ", "[1", '{"a": ' * 60):
        with pytest.raises(ValueError, match="app: expected"):
            state.parsed(wrong)
