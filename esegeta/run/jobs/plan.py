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
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from esegeta.engine import check
from esegeta.run.config.schema import Config
from esegeta.run.config.sources import is_program
from esegeta.run.config.trust import located
from esegeta.run.executors.status import MADE
from esegeta.run.jobs import kinds, outputs
from esegeta.run.jobs.kinds import Job, Record
from esegeta.run.volumes import files as volumes
from esegeta.run.volumes import labels, names

WHERE = "run"


class AboutImage(NamedTuple):
    """An image before it is read: its files, its subject, what decides about it, and its label map, if it has one."""

    files: Sequence[Path]
    subject: str
    decides: dict[str, Any]
    reference: Path | None = None


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


@functools.lru_cache(maxsize=4096)
def _hashed(path: str, size: int, changed: int) -> str:  # noqa: ARG001
    """The SHA-256 of a file; read again only if it has changed."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content(path: str | Path) -> str | None:
    """What a file holds, as a hash; None if it cannot be read, which the job will say in its turn."""
    try:
        about = os.stat(path)
        return _hashed(str(path), about.st_size, about.st_mtime_ns)
    except OSError:
        return None


def contents(path: str | Path) -> list[str | None]:
    """What is in all files that are read for a name."""
    return [content(part) for part in volumes.files_of(path)]


def source_file(source: str, folder: str | None = None) -> Path | None:
    """The file behind a model's source: a program on disk, or the module of ``package.module:factory``.

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
    """The versions that decide about the numbers."""
    found = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for name in ("esegeta", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def plan(config: Config) -> list[Job]:
    """Return every job of a run: kind by kind, and of a kind in the order of the configuration.

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
    }
    images, given = [], config.reference
    known = (
        {} if given is None else labels.matched(given.files, subjects, given.subject or config.input.subject)
    )
    for files, subject in zip(found, subjects, strict=True):
        about_image = {
            "files": [part for path in files for part in contents(path)],
            "reading": config.input.reading,
            "preprocess": whole["input"]["preprocess"],
            "pad": config.input.pad,
        }
        images.append(AboutImage(files, subject, about_image, known.get(subject)))
    folder = str(Path(config.run.output).absolute())
    planning = Planning(config, whole, folder, network, images, [])
    for kind in kinds.known():
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
            raise ValueError(check.problem(WHERE, "targets and methods with different names", got, advice))


# ------------------------------------------------------------------ what is done already


def record_path(folder: str | Path, job: str) -> Path:
    """Where the record of a job is."""
    return Path(folder) / ".jobs" / f"{job}.json"


def record_of(folder: str | Path, job: str) -> Record | None:
    """The record of a job that has ended, None if there is none that can be read."""
    try:
        found = json.loads(record_path(folder, job).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a job, the last of its files."""
    outputs.write_json(record_path(folder, record["id"]), record)


def written_by(record: Mapping[str, Any]) -> list[str]:
    """Return the files that belong to a record alone, relative to the folder of the run."""
    return list(kinds.find(record.get("kind", "methods")).written(record))


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


def finished(job: Job, folder: str | Path) -> Record | None:
    """Return the record of a job that need not be done again, None if it has to be done or shown otherwise."""
    record = _usable(job, folder)
    return record if record is not None and record.get("look_digest") == job.look else None


def all_finished(planned: Sequence[Job], folder: str | Path) -> dict[str, Record | None]:
    """Return the record of every job that need not be done again; what reads a job that is done again is, too."""
    found: dict[str, Record | None] = {}
    anew: set[str] = set()
    for job in planned:  # each after those that it reads
        stale = any(one.id in anew for one in job.after)
        found[job.id] = None if stale else finished(job, folder)
        if found[job.id] is None and (stale or not to_redraw(job, folder)):
            anew.add(job.id)
    return found


def to_redraw(job: Job, folder: str | Path) -> bool:
    """Check whether the numbers of a job are there, and only how they are shown has changed."""
    record = _usable(job, folder)
    if record is None or kinds.find(job.kind).redraw is None or record.get("look_digest") == job.look:
        return False
    return bool(record.get("raw"))


def clear(job: Job, folder: str | Path) -> None:
    """Remove what an earlier version of a job has left, its record first."""
    record = record_of(folder, job.id)
    record_path(folder, job.id).unlink(missing_ok=True)
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
    clear(job, folder)
    (Path(folder) / raw_path(job.id)).unlink(missing_ok=True)
    stem_of = kinds.find(job.kind).stem
    if stem_of is not None:
        stem = Path(folder) / stem_of(job)
        for path in stem.parent.glob(f"{glob.escape(stem.name)}_*"):
            path.unlink(missing_ok=True)


def raw_path(job: str) -> Path:
    """Return where a map is kept as the network's grid has it, relative to the folder of the run.

    >>> raw_path("sub-01_brain_gradient").as_posix()
    '.jobs/raw/sub-01_brain_gradient.npy'
    """
    return Path(".jobs", "raw", f"{job}.npy")
