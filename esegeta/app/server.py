"""The routes of the page. Each reads or changes files; what they share in memory can be lost at any time."""

import asyncio
import gzip
import hmac
import json
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from esegeta import __version__
from esegeta.app import forms, keeping, pictures, private, runs, trial
from esegeta.app.security import Door, Folders, ForbiddenError, Guard, entered
from esegeta.app.state import StaleError, State, parsed
from esegeta.engine import check, refusals
from esegeta.plot import colours
from esegeta.run import bounds
from esegeta.run.config import loading, trust
from esegeta.run.config.faults import Faults
from esegeta.run.jobs import outputs
from esegeta.run.report import page as report
from esegeta.run.volumes import files

ASSETS = Path(__file__).parent / "assets"
LARGEST_UPLOAD = 4 * 2**30
EVERY = 0.25  # seconds between two looks at the folder
ALIVE = 15.0  # seconds after which a silent stream says that it is there
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


@dataclass
class Site:
    """All that the routes share.

    state: the configuration; door: who is let in; place: the private folder; uploads: where what was dropped lies;
    most: bytes of an upload; ending: whether the server is about to end, and streams with it.
    """

    state: State
    door: Door
    place: Path
    uploads: Path
    most: int = LARGEST_UPLOAD
    going: runs.Runs = field(init=False)
    busy: threading.Lock = field(default_factory=threading.Lock)
    ending: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self.going = runs.Runs(self.place)


def app(site: Site) -> ASGIApp:
    """Return the server of a site."""

    inner = Starlette(
        routes=_routes(site),
        exception_handlers={Exception: _broken, ValueError: _refused, FileNotFoundError: _refused},
    )
    inner.state.site = site
    return Guard(inner, site.door)


async def _refused(_: Request, error: Exception) -> Response:
    status = 409 if isinstance(error, StaleError) else 403 if isinstance(error, ForbiddenError) else 400
    status = 404 if isinstance(error, FileNotFoundError) else status
    lines = error.faults if isinstance(error, Faults) else [refusals.one_line(error)]
    return JSONResponse({"error": lines[0], "errors": lines}, status)


async def _broken(_: Request, error: Exception) -> Response:
    text = f"{type(error).__name__}: {refusals.one_line(error)}"
    return JSONResponse({"error": text, "errors": [text]}, 500)


async def _body(request: Request, most: int = bounds.LARGEST) -> bytes:
    """The body of a request, refused where it is longer than it may be."""
    taken = bytearray()
    async for piece in request.stream():
        taken += piece
        if len(taken) > most:
            raise check.refused(
                "app", f"a request of at most {bounds.size(most)}", "a longer one", "Shorten it"
            )
    return bytes(taken)


async def _json(request: Request) -> dict[str, Any]:
    try:
        text = (await _body(request)).decode()
        bounds.scan(text, json=True)
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        got = str(error)[:200]
        raise check.refused("app", "a table in JSON", got, "Reload the page") from None
    if not isinstance(found, dict):
        raise check.refused("app", "a table in JSON", type(found).__name__, "Reload the page")
    return found


def _answer(content: Any) -> Response:
    return Response(outputs.json_text(content), media_type="application/json")


Handler = Callable[[Request], Awaitable[Response]]


def _routes(site: Site) -> list[Route]:
    state, busy = site.state, site.busy

    # --- The page and who may see it ---

    async def session(request: Request) -> Response:
        given = parse_qs((await _body(request, 4096)).decode(errors="replace")).get("token", [""])[0]
        if not hmac.compare_digest(given.strip().encode(), site.door.token.encode()):
            return PlainTextResponse("app: expected the token of the owner, got another one. Go back.", 401)
        return entered(site.door)

    async def asset(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name == "niivue.js":
            packed, headers = report.LIBRARY.read_bytes(), {"content-encoding": "gzip"}
            if "gzip" not in request.headers.get("accept-encoding", ""):
                packed, headers = gzip.decompress(packed), {}
            kept = {**headers, "cache-control": "private, max-age=86400"}
            return Response(packed, media_type="text/javascript", headers=kept)
        path = ASSETS / name
        if name not in {p.name for p in ASSETS.iterdir()} or path.suffix not in _TYPES:
            raise FileNotFoundError(f"app: expected a file of the page, got {name[:100]!r}. Reload the page.")
        return Response(path.read_bytes(), media_type=_TYPES[path.suffix])

    # --- State ---

    def whole() -> dict[str, Any]:
        seen = state.seen()
        return {
            "tables": seen.tables,
            "mark": seen.mark,
            "fault": seen.fault,
            "finished": state.finished,
            "folder": str(state.folder),
            "file": state.file.name,
            "version": __version__,
            "results": str(state.results),
            "uploads": private.UPLOADS,
            "colours": {k: colours.SCHEMES["orange"][k] for k in ("positive", "negative")},
        }

    async def get_state(_: Request) -> Response:
        return _answer(await run_in_threadpool(whole))

    async def put_state(request: Request) -> Response:
        given = await _json(request)
        tables = given.get("tables")
        if not isinstance(tables, Mapping):
            raise check.refused("app", "the tables of a configuration", "none", "Reload the page")
        seen = await run_in_threadpool(state.keep, tables, given.get("mark"))
        return _answer({"mark": seen.mark})

    async def put_text(request: Request) -> Response:
        text = (await _body(request)).decode(errors="replace")
        await run_in_threadpool(state.keep, parsed(text))
        return _answer(await run_in_threadpool(whole))

    async def problems(_: Request) -> Response:
        def look() -> dict[str, Any]:
            lines = state.problems()
            return {"problems": lines, "costs": {} if lines else keeping.costs(state.config())}

        return _answer(await run_in_threadpool(look))

    async def kept_as(request: Request) -> Response:
        how = request.path_params["how"]
        text, name = await run_in_threadpool(keeping.written, state, how)
        headers = (
            {"content-disposition": f'attachment; filename="{name}"'}
            if "download" in request.query_params
            else {}
        )
        return PlainTextResponse(text, headers=headers)

    # --- Choosing ---

    async def offered(_: Request) -> Response:
        return _answer(await run_in_threadpool(forms.everything))

    async def listing(request: Request) -> Response:
        where = request.query_params.get("path") or str(state.folder)
        return _answer(await run_in_threadpool(state.folders.listing, where))

    def named(request: Request) -> tuple[list[Path], dict[str, Any]]:
        text = request.query_params.get("path", "")
        whole = text if text.startswith("/") or text.startswith("~") else str(state.folder / text)
        paths = [state.folders.real(whole)]
        reading: dict[str, Any] = {}
        if request.query_params.get("channels"):
            reading["channels"] = request.query_params["channels"]
        if request.query_params.get("frame"):
            reading["frame"] = int(request.query_params["frame"])
        return paths, reading

    async def facts(request: Request) -> Response:
        return _answer(await run_in_threadpool(pictures.facts, *named(request)))

    async def thumbnail(request: Request) -> Response:
        return Response(await run_in_threadpool(pictures.thumbnail, *named(request)), media_type="image/png")

    async def upload(request: Request) -> Response:
        name = private.upload_name(request.query_params.get("name", ""))
        length = request.headers.get("content-length", "0")
        too_much = check.refused(
            "app",
            f"a file of at most {bounds.size(site.most)}",
            "a larger one",
            "Put it into the folder yourself",
        )
        if length.isdigit() and int(length) > site.most:
            return JSONResponse({"error": str(too_much)}, 413)
        folder = site.uploads / private.secrets.token_hex(8)
        folder.mkdir(mode=0o700)
        whole, taken = folder / name, 0
        try:
            with open(whole, "xb") as file:
                async for piece in request.stream():
                    taken += len(piece)
                    if taken > site.most:
                        raise too_much
                    file.write(piece)
            if not name.lower().endswith((".safetensors", ".pth")):
                found = await run_in_threadpool(_readable, whole)
            else:
                found = {}
        except (ValueError, ClientDisconnect, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            if error is too_much:
                return JSONResponse({"error": str(too_much)}, 413)
            raise
        return _answer({"path": str(whole), **found})

    async def attempt(_: Request) -> Response:
        def look() -> dict[str, Any]:
            if not busy.acquire(blocking=False):
                raise check.refused("app", "one trial at a time", "another one", "Wait for it")
            try:
                found = trial.run(_trial(site))
                outputs.write_json(site.place / "trial.json", {"mark": _about_trial(state), **found})
                return found
            finally:
                busy.release()

        return _answer(await run_in_threadpool(look))

    async def last_attempt(_: Request) -> Response:
        def look() -> dict[str, Any]:
            try:
                found = json.loads((site.place / "trial.json").read_text())
            except (OSError, ValueError):
                return {}
            return found if found.get("mark") == _about_trial(state) else {}

        return _answer(await run_in_threadpool(look))

    async def voxel(request: Request) -> Response:
        if not (site.place / trial.ANSWER).is_file():
            raise FileNotFoundError("app: expected a trial, got none. Try the network first.")
        place = [float(part) for part in request.query_params.get("mm", "").split(",")]
        return _answer(await run_in_threadpool(trial.part_at, site.place / trial.ANSWER, place))

    # --- Running ---

    async def start(request: Request) -> Response:
        asked = await _json(request)

        def begin() -> dict[str, Any]:
            with busy:
                state.config()  # what is wrong is told here
                only = [str(one) for one in asked.get("only") or ()]
                resume = bool(asked.get("resume", True))
                site.going.start(state.file, state.results, state.trust, resume=resume, only=only)
            return site.going.state(state.results)

        if state.finished:
            raise check.refused("app", "a folder to work in", "that of a finished run", "Open another folder")
        return _answer(await run_in_threadpool(begin))

    async def cancel(request: Request) -> Response:
        ids = [str(one) for one in (await _json(request)).get("ids") or ["all"]]
        if any(len(one.split()) != 1 for one in ids):
            raise check.refused("app", "ids of jobs", "something else", "Reload the page")
        return _answer({"asked": await run_in_threadpool(runs.cancel, state.results, ids)})

    async def log(_: Request) -> Response:
        text = await run_in_threadpool(
            lambda: runs.tail(state.results / "log.txt") or runs.tail(site.going.log)
        )
        return PlainTextResponse(text)

    async def results(_: Request) -> Response:
        return _answer(await run_in_threadpool(lambda: runs.results(state.results)))

    async def picture(request: Request) -> Response:
        def make() -> bytes:
            job, what = request.query_params.get("job", ""), request.query_params.get("what", "map")
            path = runs.file_of(state.results, job, _looked_at(what))
            if what == "image":
                return pictures.thumbnail([path], {})
            return pictures.of_map(path, _under(site, request.query_params.get("under") or job))

        return Response(await run_in_threadpool(make), media_type="image/png")

    async def volume(request: Request) -> Response:
        def make() -> tuple[bytes, dict[str, Any]]:
            ask = request.query_params
            job, what, level = ask.get("job", ""), ask.get("what", "map"), ask.get("level", "fine")
            check.one_of("app", "level", level, tuple(pictures.LEVELS))
            if job == "trial":
                path = site.place / (trial.IMAGE if what == "anatomy" else trial.ANSWER)
                if not path.is_file():
                    raise FileNotFoundError("app: expected a trial, got none. Try the network first.")
                return pictures.copy(path, "anatomy" if what == "anatomy" else "labels", level)
            path = runs.file_of(state.results, job, _looked_at(what))
            kind = {"anatomy": "anatomy", "image": "anatomy", "prediction": "labels"}.get(what, "map")
            under = _under(site, ask.get("under") or job) if kind == "map" else None
            return pictures.copy(path, kind, level, under)

        content, about = await run_in_threadpool(make)
        headers = {"x-esegeta-copy": json.dumps(about)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def report_page(_: Request) -> Response:
        path = state.results / "report.html"
        if not path.is_file():
            raise FileNotFoundError("app: expected a report of the run, got none. Run it first.")
        return FileResponse(path, media_type="application/octet-stream", filename="report.html")

    async def events(request: Request) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            known = _Known()
            silent = 0.0
            while not site.ending():
                news = await run_in_threadpool(_news, site, known)
                if news:
                    silent = 0.0
                    yield b"data: " + json.dumps(news).encode() + b"\n\n"
                elif silent >= ALIVE:
                    silent = 0.0
                    yield b": here\n\n"
                if await request.is_disconnected():
                    return
                await asyncio.sleep(EVERY)
                silent += EVERY

        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)

    return [
        Route("/", asset),
        Route("/assets/{name}", asset),
        Route("/api/session", session, methods=["POST"]),
        Route("/api/state", get_state),
        Route("/api/state", put_state, methods=["PUT"]),
        Route("/api/state/text", put_text, methods=["PUT"]),
        Route("/api/problems", problems),
        Route("/api/keep/{how}", kept_as),
        Route("/api/forms", offered),
        Route("/api/files", listing),
        Route("/api/image", facts),
        Route("/api/image/thumbnail", thumbnail),
        Route("/api/uploads", upload, methods=["POST"]),
        Route("/api/trial", last_attempt),
        Route("/api/trial", attempt, methods=["POST"]),
        Route("/api/trial/voxel", voxel),
        Route("/api/run", start, methods=["POST"]),
        Route("/api/run/cancel", cancel, methods=["POST"]),
        Route("/api/log", log),
        Route("/api/results", results),
        Route("/api/results/picture", picture),
        Route("/api/results/volume", volume),
        Route("/api/report", report_page),
        Route("/api/events", events),
    ]


def _readable(path: Path) -> dict[str, Any]:
    """What an upload is; one that is a part of a pair is looked at when the other one is there."""
    if path.name.lower().endswith((".hdr", ".img", ".hdr.gz", ".img.gz")):
        return {}
    return pictures.facts([path], {})


def _looked_at(what: str) -> str:
    """What of a record may be looked at; anything else is refused."""
    if what not in ("map", "image", "anatomy", "prediction") and not what.startswith("maps."):
        raise check.refused("app", "a map, an image or a prediction", repr(what[:50]), "Reload the page")
    return what


def _under(site: Site, job: str) -> Path | None:
    try:
        return runs.file_of(site.state.results, job, "anatomy")
    except FileNotFoundError:
        return None


def _about_trial(state: State) -> str:
    """What a trial depends on."""
    tables = state.seen().tables
    return json.dumps([tables.get("model"), tables.get("input")], sort_keys=True)


def _trial(site: Site) -> dict[str, Any]:
    """What a worker needs to try the network on the first image."""
    state = site.state
    tables = state.seen().tables
    lines = list(state.outside(tables))
    if lines:
        raise Faults(lines)
    source: Any = state.file if state.file.exists() else tables
    model, allowed = loading.model_of(source, trust=state.trust)
    given = loading.input_of(source)
    if given is None:
        raise check.refused("app", "an image to try the network on", "none", "Choose one")
    first = [state.folders.real(path) for path in files.expand(given.files)[0]]
    return {
        "model": model.model_dump(mode="json"),
        "files": list(map(str, first)),
        "reading": given.reading,
        "preprocess": [step.model_dump() for step in given.preprocess],
        "pad": given.pad,
        "trust": allowed.json(),
        "folder": str(site.place),
    }


class _Known:
    """What a reader of events knows."""

    def __init__(self) -> None:
        self.mark = ""
        self.generation: tuple[int, int] = (-1, -1)
        self.number = -1
        self.run: dict[str, Any] = {}


_LOOK = threading.Lock()


def _news(site: Site, known: _Known) -> dict[str, Any]:
    """What has changed since a reader was told."""
    found: dict[str, Any] = {}
    mark = site.state.seen().mark
    if mark != known.mark:
        known.mark = found["mark"] = mark
    with _LOOK:
        folder = site.state.results
        watch = site.going.of(folder)
        watch.look()
        run = site.going.state(folder)
        if (watch.generation, id(watch)) != known.generation:
            known.generation = (watch.generation, id(watch))
            known.number = -1
            found["anew"] = True
        if watch.number > known.number:
            found["jobs"] = watch.since(known.number)
            known.number = watch.number
    if run != known.run:
        known.run = found["run"] = run
    if found.keys() == {"jobs"} and not found["jobs"]:
        return {}
    return found


def site_of(
    folder: Path,
    *,
    trust_given: tuple[str, ...] = (),
    browse: tuple[Path, ...] = (),
    base_url: str = "/",
    most: int = LARGEST_UPLOAD,
) -> Site:
    """Return the site of a folder: its state, its private place, and who may see it."""
    from esegeta.app.security import door
    from esegeta.zoo.volumes import DATA

    folder = Path(folder).resolve()
    place = private.folder_for(folder)
    allowed = trust.asked(folder, [*trust.of_environment(), *trust_given])
    uploads = private.uploads(place, allowed)
    roots = tuple(Path(one).resolve() for one in (folder, *browse, uploads, DATA))
    state = State(folder, trust_given, Folders(roots))
    return Site(state, door(private.token(place), base_url), place, uploads, most)
