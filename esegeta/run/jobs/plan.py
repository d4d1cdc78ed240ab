"""What a run has to do: the jobs of every kind that the configuration asks for, and which are done already.

A job is known by what determines its result: the parts of the configuration that it reads, the content of its
files, the weights, the versions. Limits of time and memory, devices and the number of workers are not among them.
"""

import functools
import glob
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import nibabel
import numpy as np
from pydantic import BaseModel

from esegeta.engine import check
from esegeta.engine.execution import parse_memory
from esegeta.run.config import plugins
from esegeta.run.config.schema import Config, Run
from esegeta.run.config.sources import is_program
from esegeta.run.config.trust import located
from esegeta.run.executors.child import Context, peak
from esegeta.run.executors.status import MADE, Status
from esegeta.run.jobs import kinds, outputs
from esegeta.run.jobs.kinds import Job, Record
from esegeta.run.volumes import files as volumes
from esegeta.run.volumes import labels, names

WHERE = "run"


@dataclass(frozen=True)
class AboutImage:
    """An image before it is read: its files, subject, how it is read and prepared, its label map if it has one."""

    files: Sequence[Path]
    subject: str
    reading: dict[str, Any]
    steps: list[dict[str, Any]]
    pad: str | None = None
    reference: Path | None = None

    @functools.cached_property
    def decides(self) -> dict[str, Any]:
        """Everything that decides about it; to know that, its files are read."""
        hashes = [part for path in self.files for part in contents(path)]
        return {"files": hashes, "reading": self.reading, "preprocess": self.steps, "pad": self.pad}

    @functools.cached_property
    def digest(self) -> str:
        """The name of what decides about it."""
        return kinds.digest(self.decides)


class Planning(NamedTuple):
    """What jobs are made from.

    whole: the configuration as JSON; network: what decides about it; jobs: those of the kinds before.
    """

    config: Config
    whole: dict[str, Any]
    folder: str
    network: dict[str, Any]
    images: list[AboutImage]
    jobs: list[Job]

    def by_image(self) -> list[tuple[AboutImage, Job]]:
        """Return each image with the job of a method about it, which says what is given to any job about it.

        That is the first that sees the image as a whole, if there is one.
        """
        found = self.by_target()
        return [(image, next(iter(found[image.subject].values()))) for image in self.images]

    def by_target(self) -> dict[str, dict[str, Job]]:
        """Return for each subject the job of a method about each target, chosen as by ``by_image``."""
        found: dict[str, dict[str, Job]] = {}
        for whole in (True, False):
            for job in self.jobs:
                if job.kind == "methods" and whole == (job.given["method"]["patches"] == "whole"):
                    found.setdefault(job.subject, {}).setdefault(job.target, job)
        return found


Table = TypeVar("Table", bound=BaseModel)


def tables_of(config: Config, key: str, section: type[Table]) -> list[Table]:
    """Return the tables of a configuration that a kind of jobs has brought along, in the order of the file."""
    given = config.more.get(key)
    return [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, section)]


def limits(table: Any, run: Run) -> dict[str, Any]:
    """Return the limits of a job: those of its table, else those of ``[run]``."""
    deadline, memory = (getattr(table, name) for name in ("deadline", "memory"))
    memory = run.memory if memory is None else memory
    return {
        "deadline": run.deadline if deadline is None else deadline,
        "memory": None if memory is None else parse_memory(WHERE, memory),
    }


@functools.lru_cache(maxsize=4096)
def _hashed(path: str, size: int, changed: int) -> str:  # noqa: ARG001
    """The SHA-256 of a file; read again only if it has changed."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content(path: str | Path) -> str | None:
    """Return the hash of a file; None if it cannot be read, which the job will say in its turn."""
    try:
        about = os.stat(path)
        return _hashed(str(path), about.st_size, about.st_mtime_ns)
    except OSError:
        return None


def contents(path: str | Path) -> list[str | None]:
    """Return the hashes of all files that are read for a name."""
    return [content(part) for part in volumes.files_of(path)]


def source_file(source: str, folder: str | None = None) -> Path | None:
    """Return the file behind a model's source: a program on disk, or the module of ``package.module:factory``.

    The module is looked for and not imported.
    """
    if source.startswith("zoo:"):
        return None  # comes with a version of the package
    if is_program(source):
        return Path(source)
    module = source.partition(":")[0]
    way = located(module, folder or ".")
    return way.parts[-1].file if way else None


def releases() -> dict[str, str]:
    """Return the versions that affect results."""
    return dict(_releases())


@functools.cache
def _releases() -> Mapping[str, str]:
    found = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for name in ("esegeta", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def plan(config: Config) -> list[Job]:
    """Return every job of a run: kind by kind, and of a kind in the order of the configuration. No image is read.

    Args:
        config: from ``config.load``.

    Returns:
        Jobs with different ids.
    """
    whole = config.model_dump(mode="json")
    found = volumes.expand(config.input.files)
    subjects = names.subjects(found, config.input.subject)
    model = config.model
    source = source_file(model.source, model.path)
    # By what is in files, not by where they are: a project may move.
    network = {
        "source": model.source if ":" in model.source else None,
        "code": content(source) if source else None,
        "weights": content(model.weights) if model.weights else None,
        "arguments": whole["model"]["arguments"],
        "chosen": whole["model"]["output"],
        "plugins": [content(path) for path in config.plugins],
        **({"installed": offered} if (offered := plugins.installed()) else {}),
    }
    steps, given = whole["input"]["preprocess"], config.reference
    known = (
        {} if given is None else labels.matched(given.files, subjects, given.subject or config.input.subject)
    )
    images = [
        AboutImage(files, subject, config.input.reading, steps, config.input.pad, known.get(subject))
        for files, subject in zip(found, subjects, strict=True)
    ]
    folder = str(Path(config.run.output).absolute())
    planning = Planning(config, whole, folder, network, images, [])
    for kind in kinds.known():
        if kind.section is None or kind.draws or kind.table in config.more:
            planning.jobs.extend(kind.entries(planning))
    _refuse_twins(planning.jobs)
    return planning.jobs


def _refuse_twins(jobs: Sequence[Job]) -> None:
    """Two jobs must not write the same files, also where capitals do not count."""
    seen: dict[str, Job] = {}
    for job in jobs:
        other = seen.setdefault(job.id.lower(), job)
        if other is not job:
            got = f"{other.target!r} {other.method!r} and {job.target!r} {job.method!r}, both named {job.id}"
            advice = "Give a method another id, or a target another name"
            raise check.refused(WHERE, "targets and methods with different names", got, advice)


def looks_like(files: Sequence[str | Path]) -> str:
    """Return the name of what can be told of images by their headers: those of one name have one shape.

    A file whose header tells nothing, or that cannot be read, is like no other.
    """
    return kinds.digest([_header(Path(path)) for path in files])


def _header(path: Path) -> Any:
    try:
        if volumes.suffix_of(path) == ".npy":
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            return [list(found.shape), str(found.dtype)]
        image: Any = nibabel.load(path)
        return [
            list(image.shape),
            str(image.header.get_data_dtype()),
            [float(s) for s in image.header.get_zooms()],
        ]
    except Exception:  # whatever is wrong with it is said when it is read
        return str(path)


# ------------------------------------------------------------------ what is done already


def record_path(folder: str | Path, job: str) -> Path:
    """Return where the record of a job is."""
    return Path(folder) / ".jobs" / f"{job}.json"


def record_of(folder: str | Path, job: str) -> Record | None:
    """Return the record of a job that has ended, None if there is none that can be read."""
    try:
        found = json.loads(record_path(folder, job).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a job, the last of its files."""
    outputs.write_json(record_path(folder, record["id"]), record)


def header(payload: Record) -> Record:
    """Return what a record of most kinds says whatever comes of the job."""
    about = {"id": payload["id"], "kind": payload["kind"], "title": payload["title"], **payload["keys"]}
    return {**about, "config_digest": payload["digest"], "look_digest": payload["look"]}


def ended(payload: Record, found: Record, context: Context, started: float) -> Record:
    """Write the record of a job and return it.

    Args:
        payload: of the job.
        found: what its kind says: its numbers, and "status", "events" and "share_done" if they are not those of a
            job that is done without anything to tell.
        context: of the worker.
        started: by ``time.monotonic``.
    """
    record = {
        **kinds.find(payload["kind"]).header(payload),
        **{"status": Status.DONE, "share_done": 1.0, "events": []},
        **found,
        "inputs": inputs_of(payload["folder"], payload["after"]),
        "error": None,
        "versions": releases(),
        "seconds": time.monotonic() - started,
        "peak_memory": peak(),
        "device": "cpu",
        "deadline": context.seconds,
        "memory": context.memory,
    }
    write_record(Path(payload["folder"]), record)
    return json.loads(outputs.json_text(record))


def written_by(record: Mapping[str, Any]) -> list[str]:
    """Return the files that belong to a record alone, relative to the folder of the run."""
    known = {kind.name: kind for kind in kinds.known()}
    kind = known.get(record.get("kind", "methods"))  # its plugin may be gone
    return [] if kind is None else list(kind.written(record))


def named_by(record: Mapping[str, Any]) -> list[str]:
    """Return all files that a record names, relative to the folder of the run: its own, and those it shares."""
    shared = [str(record[name]) for name in ("anatomy", "prediction", "reference") if record.get(name)]
    beside = [name.replace(".nii.gz", ".json") for name in shared if name.endswith("mask.nii.gz")]
    return [*written_by(record), *shared, *beside]


def _usable(job: Job, folder: str | Path) -> Record | None:
    """Return the record of a job if it holds the numbers that the job would give, and all of its files are there.

    What a deadline cut short is of no use if it may take longer now, and neither is what was made of other inputs
    than there are now.
    """
    record = record_of(folder, job.id)
    if record is None or record.get("status") not in MADE or record.get("config_digest") != job.digest:
        return None
    allowed, had = job.deadline or math.inf, record.get("deadline") or math.inf
    if record["status"] == "partial" and allowed > had:
        return None
    if job.after and record.get("inputs") != inputs_of(folder, [one.id for one in job.after]):
        return None
    shared = [record[name] for name in ("anatomy", "prediction", "reference") if record.get(name)]
    there = all((Path(folder) / name).is_file() for name in [*written_by(record), *shared])
    return record if there else None


def inputs_of(folder: str | Path, ids: Sequence[str]) -> dict[str, list[str]]:
    """Return the digest and the status of those of some jobs that have a result."""
    records = {name: record_of(folder, name) for name in ids}
    return {
        name: [str(record.get("config_digest")), str(record["status"])]
        for name, record in records.items()
        if record is not None and record.get("status") in MADE
    }


State = Literal["kept", "shown otherwise", "to do"]


def survey(planned: Iterable[Job], folder: str | Path, *, resume: bool = True) -> Iterator[tuple[Job, State]]:
    """Say of every job, one after another, whether it has to be done; what reads a job that is done again is, too.

    The files of an image are read when the first of its jobs comes up.

    Args:
        planned: all jobs of a run, each after those that it reads.
        folder: of the run.
        resume: False if everything has to be done.
    """
    anew: set[str] = set()
    for job in planned:
        state: State = "to do"
        if resume and not any(one.id in anew for one in job.after):
            state = _state(job, folder)
        if state == "to do":
            anew.add(job.id)
        yield job, state


def _state(job: Job, folder: str | Path) -> State:
    record = _usable(job, folder)
    if record is None:
        return "to do"
    if record.get("look_digest") == job.look:
        return "kept"
    can = kinds.find(job.kind).redraw is not None and record.get("raw")
    return "shown otherwise" if can else "to do"


def clear(job: str, folder: str | Path) -> None:
    """Remove what an earlier version of a job has left, its record first. The worker does that before it begins: a
    job may be done before anybody else hears that it has begun.
    """
    record = record_of(folder, job)
    record_path(folder, job).unlink(missing_ok=True)
    if record is not None and {"subject", "target", "method"} <= set(record):
        _remove(record, folder)


def forget_drawings(planned: Sequence[Job], folder: str | Path) -> None:
    """Remove what was drawn in a folder by kinds of which the configuration asks for no job any more."""
    unused = {kind.name for kind in kinds.known() if kind.draws} - {job.kind for job in planned}
    if not unused:
        return
    for path in (Path(folder) / ".jobs").glob("*.json"):
        record = record_of(folder, path.stem)
        if record is not None and record.get("kind") in unused:
            _remove(record, folder)
            path.unlink(missing_ok=True)


def _remove(record: Mapping[str, Any], folder: str | Path) -> None:
    """Remove the files of a record, unless they lie elsewhere."""
    for name in written_by(record):
        path = Path(folder) / name
        if Path(folder).resolve() in path.resolve().parents:
            path.unlink(missing_ok=True)


def discard(job: Job, folder: str | Path) -> None:
    """Remove what a job that did not come to its end has written, with or without a record."""
    clear(job.id, folder)
    (Path(folder) / raw_path(job.id)).unlink(missing_ok=True)
    stem_of = kinds.find(job.kind).stem
    if stem_of is not None:
        stem = Path(folder) / stem_of(job)
        for path in stem.parent.glob(f"{glob.escape(stem.name)}_*"):
            path.unlink(missing_ok=True)


def joined(records: Sequence[Mapping[str, Any]]) -> dict[str, Record]:
    """Return the columns that rows of some jobs get from the records of others, by the ids of the jobs."""
    known = {kind.name: kind for kind in kinds.known()}
    found: dict[str, Record] = {}
    for record in records:
        kind = known.get(record.get("kind", "methods"))
        if kind is not None and kind.joins is not None:
            job, columns = kind.joins(record)
            found.setdefault(job, {}).update(columns)
    return found


def raw_path(job: str) -> Path:
    """Return where a map is kept as the network's grid has it, relative to the folder of the run.

    >>> raw_path("sub-01_brain_gradient").as_posix()
    '.jobs/raw/sub-01_brain_gradient.npy'
    """
    return Path(".jobs", "raw", f"{job}.npy")
