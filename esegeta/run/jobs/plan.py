"""What a run has to do: one job for each image, target and method, and which of them are done already.

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
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from esegeta.engine import check
from esegeta.engine.execution import parse_memory
from esegeta.run.config.annotations import with_files
from esegeta.run.config.loading import Config, is_program
from esegeta.run.config.trust import located
from esegeta.run.executors.local import Task
from esegeta.run.jobs import names
from esegeta.run.jobs.marks import MADE
from esegeta.run.volumes import files as volumes

Record = dict[str, Any]
WHERE = "run"
FUNCTION = "esegeta.run.jobs.worker:main"


@dataclass(frozen=True)
class Job:
    """One image, one target, one method. payload: all that a worker needs, as JSON."""

    id: str
    kind: str
    subject: str
    target: str
    method: str
    digest: str
    payload: dict[str, Any]
    deadline: float | int | None = None
    memory: int | None = None

    def task(self) -> Task:
        """What the pool is given."""
        return Task(self.id, FUNCTION, self.payload, self.deadline, self.memory)


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


def digest(value: Any) -> str:
    """A short name for what a value says.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}), len(digest([]))
    (True, 16)
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    """Every job of a run: images, then targets, then methods, in the order of the configuration.

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
    folder = str(Path(config.run.output).absolute())
    jobs: list[Job] = []
    for files, subject in zip(found, subjects, strict=True):
        image = {
            "files": [part for path in files for part in contents(path)],
            "reading": config.input.reading,
            "preprocess": whole["input"]["preprocess"],
        }
        for target, method in ((t, m) for t in config.targets for m in config.methods):
            jobs.append(_job(config, whole, network, image, files, subject, target, method, folder))
    _refuse_twins(jobs)
    return jobs


def _job(
    config: Config,
    whole: dict[str, Any],
    network: dict[str, Any],
    image: dict[str, Any],
    files: Sequence[Path],
    subject: str,
    target: Any,
    method: Any,
    folder: str,
) -> Job:
    what, how = target.model_dump(mode="json"), method.model_dump(mode="json")
    about_target = {k: what[k] for k in ("reducer", "class_", "parameters")}
    about_method = {k: v for k, v in how.items() if k not in ("id", "title", "deadline", "memory")}
    decides = {
        **network,
        **image,
        "target": with_files(about_target, contents),
        "method": with_files(about_method, contents),
        "patches": whole["patches"] if method.patches != "whole" else None,
        "precision": config.run.precision,
        "key": config.run.key,
        "output": {k: whole["output"][k] for k in ("nifti", "figures")},
        "versions": releases(),
        # What files are called and what stands above the pictures.
        "shown": [subject, target.name, method.id, method.title],
    }
    mark = digest(decides)
    job = names.job(subject, target.name, method.id or method.name)
    payload = {
        "id": job,
        "kind": "methods",
        "digest": mark,
        "input_digest": digest(image),
        "subject": subject,
        "files": [str(path) for path in files],
        "reading": image["reading"],
        "made_from": {
            "model": network["source"] or Path(config.model.source).name,
            **{name: network[name] for name in ("arguments", "code", "weights", "plugins")},
            "images": {part.name: content(part) for path in files for part in volumes.files_of(path)},
        },
        "model": whole["model"],
        "target": what,
        "method": how,
        "preprocess": whole["input"]["preprocess"],
        "patches": whole["patches"],
        "output": whole["output"],
        "precision": config.run.precision,
        "key": config.run.key,
        "folder": folder,
        "plugins": list(config.plugins),
        "trust": config.trust.json(),
    }
    memory = method.memory if method.memory is not None else config.run.memory
    return Job(
        job,
        "methods",
        subject,
        target.name,
        method.id or method.name,
        mark,
        payload,
        method.deadline if method.deadline is not None else config.run.deadline,
        None if memory is None else parse_memory(WHERE, memory),
    )


def _refuse_twins(jobs: Sequence[Job]) -> None:
    """Two jobs must not write the same files, also where capitals do not count."""
    seen: dict[str, Job] = {}
    for job in jobs:
        other = seen.setdefault(job.id.lower(), job)
        if other is not job:
            got = f"{other.target!r} {other.method!r} and {job.target!r} {job.method!r}, both named {job.id}"
            advice = "Give a method another id, or a target another name"
            raise ValueError(check.problem(WHERE, "targets and methods with different names", got, advice))


def about(payload: dict[str, Any]) -> Record:
    """What a record says whatever comes of the job."""
    # Files by their names: where they are may change, and the record is the same.
    method, target = with_files([payload["method"], payload["target"]], lambda path: Path(path).name)
    return {
        "id": payload["id"],
        "kind": payload["kind"],
        "subject": payload["subject"],
        "target": target["name"],
        "reducer": target["reducer"],
        "reducer_parameters": target["parameters"],
        "method": method["id"] or method["name"],
        "name": method["name"],
        "title": method["title"] or (method["id"] or method["name"]).replace("_", " "),
        "parameters": method["parameters"],
        "transforms": method["transforms"],
        "baseline": method["baseline"],
        "place": method["place"],
        "patches": method["patches"],
        "patching": payload["patches"] if method["patches"] != "whole" else None,
        "key": payload["key"],
        "precision": payload["precision"],
        "config_digest": payload["digest"],
        "made_from": payload["made_from"],
    }


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


def written_by(record: Mapping[str, Any]) -> list[str]:
    """The files that belong to a record alone, relative to the folder of the run."""
    name = record.get("map")
    sidecar = names.statmap(record["subject"], record["target"], record["method"], "statmap.json")
    figures = record.get("figures") or {}
    return [*([name] if name else []), sidecar.as_posix(), *figures.values()]


def finished(job: Job, folder: str | Path) -> Record | None:
    """The record of a job that need not be done again: the same job, with a map, and all of its files are there.

    One that a deadline cut short is done again if it may take longer now.
    """
    record = record_of(folder, job.id)
    if record is None or record.get("status") not in MADE or record.get("config_digest") != job.digest:
        return None
    allowed, had = job.deadline or math.inf, record.get("deadline") or math.inf
    if record["status"] == "partial" and allowed > had:
        return None
    shared = [record[name] for name in ("anatomy", "prediction") if record.get(name)]
    there = all((Path(folder) / name).is_file() for name in [*written_by(record), *shared])
    return record if there else None


def clear(job: Job, folder: str | Path) -> None:
    """Remove what an earlier version of a job has left, its record first."""
    record = record_of(folder, job.id)
    record_path(folder, job.id).unlink(missing_ok=True)
    if record is not None and {"subject", "target", "method"} <= set(record):
        for name in written_by(record):
            path = Path(folder) / name
            if Path(folder).resolve() in path.resolve().parents:
                path.unlink(missing_ok=True)


def discard(job: Job, folder: str | Path) -> None:
    """Remove what a job that did not come to its end has written, with or without a record."""
    clear(job, folder)
    stem = Path(folder) / names.statmap(job.subject, job.target, job.method, "")
    for path in stem.parent.glob(f"{glob.escape(stem.name)}_*"):
        path.unlink(missing_ok=True)
