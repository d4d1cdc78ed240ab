"""The report of a run: one HTML file that needs no network, no server and no other file.

Everything in it comes from the folder of the run. Names, messages and settings may come from anyone, so all of them
are text: the template escapes, data for the script is JSON without a ``<``, and the page forbids itself everything
but its own scripts, styles and pictures by a content security policy with their hashes.
"""

import base64
import gzip
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from esegeta.plot import colours
from esegeta.plot import grids as scenes
from esegeta.plot.canvas import numeral
from esegeta.run.executors.status import MADE
from esegeta.run.jobs import kinds, outputs
from esegeta.run.jobs.marks import marks, titled
from esegeta.run.jobs.plan import joined
from esegeta.run.report import display
from esegeta.run.volumes.names import anatomy as anatomy_name

HERE = Path(__file__).parent
LIBRARY = HERE / "assets" / "niivue-0.69.0.umd.js.gz"
ZOO = HERE.parents[1] / "zoo" / "data" / "NOTICE"

VOLUMES = 8_000_000  # bytes of text for the copies of maps
ANATOMIES = 2_000_000  # for those of images and masks
FIGURES = 7_000_000
MOST_VOLUMES = 120
MOST_COMPARED = 8
MOST_ROWS = 2000  # of a table
KINDS = ("overlay", "channels", "projections", "montage")


def write(folder: "str | os.PathLike[str]", only: Sequence[str] | None = None) -> Path:
    """Write ``report.html`` from the records, maps and figures in the folder of a run.

    What is missing or broken is said in the report, not raised: a run that went wrong needs its report most.

    Args:
        folder: of a run, with the records of its jobs in ``.jobs``.
        only: ids of the jobs to report, in their order: the folder may have others of earlier configurations. By
            default all, in the order of the configuration.

    Returns:
        The path of the report.
    """
    folder = Path(folder)
    path = folder / "report.html"
    outputs.write_text(path, page(folder, only))
    return path


def page(folder: Path, only: Sequence[str] | None = None) -> str:
    """Return the report as text."""
    try:
        import jinja2
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("jinja2", "markupsafe"):
            raise
        message = 'Reports need jinja2, which is missing: pip install "esegeta[viz]".'
        raise ModuleNotFoundError(message, name="jinja2") from None
    notes: list[str] = []
    config = _settings(folder, notes)
    records = _ordered(_records(folder, notes), config)
    together = _attach_figures(records, notes)
    _join(records)
    if only is not None:
        known = {record["id"]: record for record in records}
        records = [known[name] for name in dict.fromkeys(only) if name in known]
    every, records = records, [record for record in records if record["kind"] == MAPS]
    viewer, volumes = _viewer(folder, records, notes)
    compared = _compared(folder, together, {record["id"] for record in records}, notes)
    _figures(folder, records, notes, FIGURES - sum(len(picture["address"]) for picture in compared))
    script = (HERE / "templates" / "report.js").read_text(encoding="utf-8")
    style = (HERE / "templates" / "report.css").read_text(encoding="utf-8")
    library = LIBRARY.read_bytes() if volumes else b""
    allowed = [script, *([gzip.decompress(library).decode()] if library else [])]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "seconds": seconds, "size": size, "pretty": pretty}
    made = sum(record["status"] in MADE for record in records)
    partial = sum(record["status"] == "partial" for record in records)
    text = environment.get_template("report.html").render(
        title=folder.resolve().name,
        scripts=" ".join(_hash(part) for part in allowed),
        styles=_hash(style),
        # Files of this package, without an end tag in them; all else is escaped.
        style=Markup(style),
        script=Markup(script),
        levels=2 * display.LEVELS + 1,
        library=base64.b64encode(library).decode(),
        volumes=volumes,
        data=Markup(embedded(viewer)),
        records=records,
        compared=compared,
        made=made,
        partial=partial,
        failed=[record for record in every if record["status"] not in MADE],
        metrics=_metrics(records),
        channels=_channels(records),
        sections=_sections(folder, every, notes),
        config=config,
        versions=_versions(records),
        notes=notes,
        notices=_notices(config, records, bool(volumes)),
        seconds_spent=sum(record["seconds"] or 0 for record in every),
    )
    return text.replace("@@SIZE@@", f"{len(text.encode()) / 1e6:.1f} MB", 1)


def embedded(value: Any) -> str:
    """Return JSON for a script element: nothing in it can end the element or start a comment.

    >>> embedded({"name": "</script><!--"})
    '{"name":"\\\\u003c/script\\\\u003e\\\\u003c!--"}'
    """
    text = json.dumps(
        _plain(value), ensure_ascii=True, separators=(",", ":"), sort_keys=True, allow_nan=False
    )
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    """Numbers that JSON has no name for become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# -- text ------------------------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """Return a number for a cell; nothing if there is none.

    >>> number(1234.5), number(None), number("text")
    ('1.23 × 10³', '', '')
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    return numeral(float(value)) if math.isfinite(value) else str(value)


def seconds(value: Any) -> str:
    """Return a time for people.

    >>> seconds(0.25), seconds(75), seconds(7200.0), seconds(None)
    ('0.25 s', '1 min 15 s', '2 h 00 min', '')
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return ""
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02d} min"


def size(value: Any) -> str:
    """Return an amount of memory for people.

    >>> size(3 * 2**30), size(5 * 2**20), size(None)
    ('3.00 GiB', '5 MiB', '')
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def pretty(value: Any) -> str:
    """Return settings as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


# -- what is in the folder -------------------------------------------------------------------------------------


def _json(path: Path, notes: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} could not be read: {_line(error)}")
        return None


def _line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _settings(folder: Path, notes: list[str]) -> Any:
    path = folder / "config.json"
    return _json(path, notes) if path.exists() else None


DRAW = "esegeta report FOLDER draws them."
MAPS, DRAWINGS = "methods", "figures"  # the kinds whose records have maps, and the figures of them


def _lists() -> dict[str, Any]:
    """Return what a record says of what there is none of, and for the texts that every record has."""
    texts = dict.fromkeys(("id", "subject", "target", "method", "status"), "")
    dicts: dict[str, Any] = {name: {} for name in ("parameters", "figures", "versions", "metrics")}
    return {**texts, **dicts, "title": None, "error": None, "transforms": [], "events": [], "warnings": []}


def _records(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    found = []
    known = {kind.name: kind for kind in kinds.known()}
    for path in sorted((folder / ".jobs").glob("*.json")):
        value = _json(path, notes)
        if value is None:
            continue
        if not isinstance(value, dict):
            notes.append(f"{path.name} is no record: it holds no object")
            continue
        kind_of = known.get(value.get("kind", MAPS))
        if kind_of is None:
            notes.append(f"{path.name} is of a kind that is not known here: {_line(value.get('kind'))}")
            continue
        record = {**dict.fromkeys(kind_of.columns), **kind_of.blank, **_lists(), "kind": kind_of.name}
        record |= {k: v for k, v in value.items() if v is not None or k not in record}
        for name, kind in (("figures", dict), ("versions", dict), ("metrics", dict), ("events", list)):
            if not isinstance(record[name], kind):
                record[name] = kind()
        for name in ("score", "residual", "min", "max", "sum", "seconds", "peak_memory"):
            if isinstance(record.get(name), bool) or not isinstance(record.get(name), (int, float)):
                record[name] = None
        for name in ("id", "subject", "target", "method", "status"):
            record[name] = str(record[name])
        record["id"] = record["id"] or path.stem
        record["title"] = str(record["title"] or record["method"] or record["id"])
        record["status"] = record["status"] or "unknown"
        if record.get("regridding") == "values":  # a value that many voxels share would count many times
            record["sum"] = None
        record["share"] = _share(record.get("residual"), record.get("difference"))
        record["marks"] = marks(record)
        record["said"] = [_event(event) for event in record["events"]]
        found.append(record)
    if not found:
        notes.append("No job has finished: there are no records in .jobs.")
    return found


def _attach_figures(records: Sequence[dict[str, Any]], notes: list[str]) -> list[dict[str, Any]]:
    """Give the records of maps the figures that were drawn of them, unless the map has changed since.

    Returns the figures of several maps, each with the ids of all maps that were there when it was drawn.
    """
    maps = {record["id"]: record for record in records if record["kind"] == MAPS}
    stale = drawn = 0
    together = []
    for record in records:
        inputs = record.get("inputs")
        if record["kind"] != DRAWINGS or record["status"] not in MADE or not isinstance(inputs, dict):
            continue
        current = {
            job
            for job, seen in inputs.items()
            if job in maps and seen == [str(maps[job].get("config_digest")), maps[job]["status"]]
        }
        stale += len(inputs.keys() & maps.keys() - current)
        for job, figures in record["figures"].items():
            if job in current and isinstance(figures, dict):
                drawn += 1
                maps[job]["figures"] = {**maps[job]["figures"], **figures}
        several = record.get("together")
        if current == inputs.keys() and isinstance(several, list):
            found = [one for one in several if isinstance(one, dict)]
            together += [{**one, "subject": record["subject"], "of": sorted(current)} for one in found]
    if stale:
        notes.append(f"{stale} maps are newer than their figures, which are left out: {DRAW}")
    bare = sum(record["status"] in MADE and not record["figures"] for record in maps.values())
    if drawn and bare - stale > 0:
        notes.append(f"{bare - stale} of {len(maps)} maps have no figures yet: {DRAW}")
    return together


def _join(records: Sequence[dict[str, Any]]) -> None:
    """Give the records of maps what records of other kinds say of them, beside what they have."""
    more = joined(records)
    for record in records:
        record["metrics"] = {**record["metrics"], **more.get(record["id"], {})}


def _share(residual: Any, difference: Any) -> str | None:
    """A residual as a share of what was to be explained.

    >>> _share(-0.5, 2.0), _share(None, 2.0), _share(1.0, 0.0)
    ('-25.0 %', None, None)
    """
    sized = [v for v in (residual, difference) if isinstance(v, (int, float)) and math.isfinite(v)]
    return f"{100 * sized[0] / sized[1]:.1f} %" if len(sized) == 2 and sized[1] else None


def _event(event: Any) -> str:
    if isinstance(event, dict):
        return str(event.get("message", pretty(event)))
    return str(event)


def _ordered(records: list[dict[str, Any]], config: Any) -> list[dict[str, Any]]:
    """As the configuration has them; what it does not know comes last, by name."""

    def order(section: str, *names: str) -> list[str]:
        entries = config.get(section) if isinstance(config, dict) else None
        found = []
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict):
                found.append(next((str(entry[n]) for n in names if entry.get(n)), ""))
        return found

    methods, targets = order("methods", "id", "name"), order("targets", "name", "reducer")

    def rank(known: Sequence[str], value: str) -> int:
        return known.index(value) if value in known else len(known)

    return sorted(
        records,
        key=lambda r: (
            r["subject"],
            rank(targets, r["target"]),
            r["target"],
            rank(methods, r["method"]),
            r["method"],
            r["id"],
        ),
    )


def inside(folder: Path, name: Any) -> Path | None:
    """Return the file of a record, unless it lies outside of the folder or is not there."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    try:
        path = (folder / name).resolve()
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except OSError:
        return None


def _viewer(
    folder: Path, records: list[dict[str, Any]], notes: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """What the viewer shows, and the volumes as text: those of masks and images are shared by many maps."""
    volumes: list[str] = []
    known: dict[tuple[str, Path], int | None] = {}
    done = [r for r in records if r["status"] in MADE and r["map"]]
    most = max(VOLUMES // max(1, min(len(done), MOST_VOLUMES)), 60_000)
    under = {_under(folder, r) for r in done} - {None}
    masks = {inside(folder, r["prediction"]) for r in done} - {None}
    share = ANATOMIES // max(1, len(under) + len(masks) // 4)
    left = ANATOMIES

    def shared(kind: str, path: Path | None) -> int | None:
        nonlocal left
        if path is None or left <= 0:
            return None
        if (kind, path) not in known:
            known[kind, path] = None
            try:
                values, affine = display.read(path)
                make = display.of_anatomy if kind == "anatomy" else display.of_outline
                copy = make(values, affine, min(share, left))
            except Exception as error:  # whatever is in a file, the report goes on without it
                notes.append(f"{path.name} could not be shown: {_line(error)}")
            else:
                left -= len(copy.text)
                volumes.append(copy.text)
                known[kind, path] = len(volumes) - 1
        return known[kind, path]

    @lru_cache(maxsize=1)  # one after the other, many maps lie on one image
    def image(path: Path | None) -> np.ndarray | None:
        try:
            return None if path is None else display.read(path)[0]
        except Exception:  # it is noted where it is copied
            return None

    @lru_cache(maxsize=4)
    def inner(under: Path | None, mask: Path | None) -> tuple[float, ...] | None:
        """Where the viewer opens: in the middle of what is predicted, else of what the image shows."""
        for path in (mask, under):
            if path is None:
                continue
            try:
                values, place = display.read(path)
            except Exception:  # it is noted where it is copied
                continue
            where = values > 0 if path == mask else scenes.body(scenes.window(values))
            if where.any():
                return display.centre(where, place)
        return None

    overlays: list[dict[str, Any]] = []
    reduced = 0
    for record in done:
        path = inside(folder, record["map"])
        if path is None:
            notes.append(f"{record['id']}: its map is not in the folder.")
            continue
        if len(overlays) == MOST_VOLUMES:
            notes.append(
                f"The viewer has the first {MOST_VOLUMES} maps of {len(done)}; the others are in the folder."
            )
            break
        try:
            values, affine = display.read(path)
            if display.is_flat(values.shape):
                continue
            copy = display.of_map(values, affine, most, image(_under(folder, record)))
        except Exception as error:  # as above
            notes.append(f"{path.name} could not be shown: {_line(error)}")
            continue
        anatomy = shared("anatomy", _under(folder, record))
        prediction = shared("mask", inside(folder, record["prediction"]))
        volumes.append(copy.text)
        reduced += copy.shape != copy.full
        overlays.append(
            {
                **{name: record[name] for name in ("id", "subject", "target", "method")},
                "title": titled(record["title"], record["marks"]),
                **copy._asdict(),
                "text": len(volumes) - 1,
                "anatomy": anatomy,
                "prediction": prediction,
                "centre": inner(_under(folder, record), inside(folder, record["prediction"])) or copy.peak,
            }
        )
    if any(record["status"] == "partial" for record in done):
        notes.append("In the viewer nothing shows what a partial map lacks; the figures hatch it.")
    if reduced:
        notes.append(
            f"{reduced} of {len(overlays)} maps are on fewer voxels in the viewer than in their files, "
            "to keep this page small: single strong voxels look weaker there, and the value under the cursor is the "
            "mean of the voxels there."
        )
    steps = {kind: colours.SCHEMES["orange"][kind] for kind in ("positive", "negative")}
    return {"overlays": overlays, "colours": steps}, volumes


def _under(folder: Path, record: Mapping[str, Any]) -> Path | None:
    """The image that a map lies on: what the record names, else where images are written."""
    named = inside(folder, record["anatomy"])
    if named is None and record["subject"]:
        try:
            return inside(folder, str(anatomy_name(record["subject"])))
        except ValueError:
            return None
    return named


def _compared(
    folder: Path, together: Sequence[Mapping[str, Any]], shown: Collection[str], notes: list[str]
) -> list[dict[str, Any]]:
    """The figures of several maps: methods side by side, targets side by side, layers."""
    found: list[dict[str, Any]] = []
    left_out: list[str] = []
    for one in together:
        path, title = inside(folder, one.get("file")), str(one.get("title"))
        if path is None or not set(one["of"]) <= set(shown):
            continue
        if len(found) == MOST_COMPARED:
            left_out.append(title)
            continue
        found += _figure(path, folder, title, notes)
    if left_out:
        rest = _line("; ".join(left_out))
        notes.append(f"Beside this page, after the first {MOST_COMPARED} figures of several maps: {rest}.")
    return found


def _figures(folder: Path, records: list[dict[str, Any]], notes: list[str], left: int) -> None:
    """Give each record its pictures: one of each map is inside of the page, the others as far as its size allows."""
    linked = 0
    for record in records:
        record["pictures"] = []
    kinds = [*KINDS, *sorted({str(k) for r in records for k in r["figures"]} - set(KINDS))]
    share = max(left, 0) // max(1, sum(bool(record["figures"]) for record in records))
    for kind in kinds:  # the overlays of all first: they say most
        for record in records:
            path = inside(folder, record["figures"].get(kind))
            if path is None:
                continue
            picture: dict[str, Any] = {
                "kind": kind,
                "file": path.relative_to(folder.resolve()).as_posix(),
                "address": None,
            }
            first = not any(one["address"] for one in record["pictures"])
            if first or left > 0:
                try:
                    address, width, height = display.figure(path, share if first else None)
                    picture |= {"address": address, "width": width, "height": height}
                    left -= len(address)
                except Exception as error:  # whatever is in the file
                    notes.append(f"{path.name} could not be shown: {_line(error)}")
                    continue
            linked += picture["address"] is None
            record["pictures"].append(picture)
    if linked:
        notes.append(
            f"{linked} figures are links to files beside this page, to keep it small; one of each map is here."
        )


def _metrics(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [r for r in records if r["metrics"]]
    return {"names": sorted({str(name) for r in rows for name in r["metrics"]}), "rows": rows}


def _channels(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each channel of each map that has several."""
    about = ("subject", "target", "title", "id")
    numbers = ("sum", "mean", "share", "min", "max")
    rows = []
    for record in records:
        channels = record.get("channels")
        for one in channels if isinstance(channels, list) else []:
            if isinstance(one, dict):
                own = {"channel": str(one.get("channel")), **{name: one.get(name) for name in numbers}}
                rows.append({**{name: record[name] for name in about}, **own})
    return rows


def _sections(folder: Path, records: Sequence[Mapping[str, Any]], notes: list[str]) -> list[dict[str, Any]]:
    """Return the table, and the pictures, of each kind of jobs without maps that has records."""
    found = []
    for kind in kinds.known():
        own = [record for record in records if record["kind"] == kind.name]
        if kind.name in (MAPS, DRAWINGS) or not own:
            continue
        pictures = [one for record in own for one in _drawn(folder, record, notes)]
        if kind.shown or pictures:
            every = [row for record in own for row in kind.rows(record)]
            known = [name for name in kind.shown if any(row.get(name) not in (None, "") for row in every)]
            rows = [[row.get(name) for name in known] for row in every[:MOST_ROWS]]
            heads = [kind.shown[name] for name in known]  # a column without any value says nothing
            rest = (
                f" {len(every) - MOST_ROWS} more rows are in {kind.file}.csv."
                if len(every) > MOST_ROWS
                else ""
            )
            about = {"name": kind.name, "title": kind.title, "note": kind.note + rest}
            said = [f"{record['id']}: {line}" for record in own for line in record["said"]]
            found.append({**about, "heads": heads, "rows": rows, "said": said, "pictures": pictures})
    return found


def _drawn(folder: Path, record: Mapping[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """The figures of a record without a map."""
    found = []
    for kind, name in record["figures"].items():
        path = inside(folder, name)
        if path is None:
            continue
        whose = ", ".join(str(record[name]) for name in ("title", "target") if record[name])
        found += _figure(path, folder, f"{kind} of {whose}", notes)
    return found


def _figure(path: Path, folder: Path, title: str, notes: list[str]) -> list[dict[str, Any]]:
    """Return a figure as the page shows it; none, and a note, where the file cannot be shown."""
    try:
        address, width, height = display.figure(path)
    except Exception as error:  # whatever is in the file
        notes.append(f"{path.name} could not be shown: {_line(error)}")
        return []
    file = path.relative_to(folder.resolve()).as_posix()
    return [{"title": title, "address": address, "width": width, "height": height, "file": file}]


def _versions(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Each program with its version; several if the run was continued after an update."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name, version in record["versions"].items():
            found.setdefault(str(name), set()).add(str(version))
    return {name: ", ".join(sorted(found[name])) for name in sorted(found)}


@lru_cache(maxsize=1)
def _shipped() -> frozenset[str]:
    """What the files of the zoo hold, as hashes: they are known by that under any name."""
    files = (path for path in ZOO.parent.iterdir() if path.is_file())
    return frozenset(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)


def _of_zoo(record: Mapping[str, Any]) -> bool:
    """Whether the network or an image of a record comes from the zoo."""
    made_from = record.get("made_from")
    if not isinstance(made_from, dict):
        return False
    images = made_from.get("images")
    used = [*(images.values() if isinstance(images, dict) else ()), made_from.get("weights")]
    return str(made_from.get("model")).startswith(("zoo:", "esegeta.zoo")) or any(
        isinstance(one, str) and one in _shipped() for one in used
    )


def _notices(config: Any, records: Iterable[Mapping[str, Any]], viewer: bool) -> list[tuple[str, str]]:
    """The terms of what is inside of the page but was made by others."""
    notices = []
    if viewer:
        notices.append(("The viewer: NiiVue", (HERE / "assets" / "NOTICE").read_text(encoding="utf-8")))
    if '"zoo:' in json.dumps(config, default=str) or any(map(_of_zoo, records)):
        notices.append(("The network and the image of the zoo", ZOO.read_text(encoding="utf-8")))
    return notices
