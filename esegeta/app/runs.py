"""Runs of the page: started as ``esegeta run`` in a process of its own, followed by the events that it writes.

Neither the page nor the server is needed while it goes on: what is known of a run is in its folder.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from esegeta.engine import check
from esegeta.run import pipeline
from esegeta.run.executors.journal import EVENTS
from esegeta.run.executors.status import MADE
from esegeta.run.jobs import kinds, marks, plan
from esegeta.run.log import Tally
from esegeta.run.report.page import inside

LOG_TAIL = 64_000  # bytes of a log that the page shows


class Watch:
    """What is known of the run in a folder, from its journal: each job with the number of its last change.

    A reader that was away, or is slow, is told what has changed since the number that it knows: nothing is queued
    for it, and nothing is lost.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        self.generation = 0  # changes with the run: what was known of the one before is of no use
        self._forget(b"")

    def _forget(self, head: bytes) -> None:
        self._head, self._place = head, 0
        self.tally = Tally()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.planned = self.ended = False
        self.generation += 1
        self.number += 1

    def look(self) -> bool:
        """Read what is new; return whether anything is."""
        before = self.number
        try:
            with open(self.folder / ".jobs" / EVENTS, "rb") as lines:
                head = lines.readline()
                if not head.endswith(b"\n"):
                    return False
                if head != self._head:  # another run has begun its journal anew
                    self._forget(head)
                lines.seek(self._place)
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    self._place += len(line)
                    self._hear(json.loads(line))
        except FileNotFoundError:
            if self._head:
                self._forget(b"")
        return self.number != before

    def _hear(self, event: dict[str, Any]) -> None:
        self.number += 1
        self.tally.on_event(event)
        kind, name = event["event"], event.get("job")
        if kind == "planned":
            self.planned = True
            for job in event["jobs"]:
                self.jobs[job] = {"status": "waiting", "number": self.number}
        self.ended = kind == "ended"
        if not name:
            return
        job = self.jobs.setdefault(name, {"status": "waiting"})
        job["number"] = self.number
        if kind in ("start", "begin"):
            job |= {"status": "running", "fraction": 0.0, "began": event["time"]}
        elif kind == "progress":
            job |= {"fraction": event["fraction"], "label": event["label"]}
        elif kind in ("note", "output"):
            job["message"] = str(event.get("message", ""))[:2000]
        elif kind == "job_done":
            outcome = event["outcome"]
            job |= {"status": outcome["status"], "fraction": 1.0, "error": outcome["error"]}
            job["seconds"] = outcome["seconds"]

    def since(self, number: int) -> dict[str, dict[str, Any]]:
        """Return the jobs that have changed after a number."""
        return {name: job for name, job in self.jobs.items() if job["number"] > number}


class Runs:
    """The run in a folder: begin, cancel, look at it.

    Args:
        private: where what the process says is kept.
    """

    def __init__(self, private: Path) -> None:
        self.private = private
        self.process: subprocess.Popen[bytes] | None = None
        self.watch: Watch | None = None
        self.message = ""

    def of(self, folder: Path) -> Watch:
        """Return what is known of the run in a folder."""
        if self.watch is None or self.watch.folder != folder:
            self.watch = Watch(folder)
        return self.watch

    def start(
        self, file: Path, folder: Path, trust: Iterable[str], *, resume: bool = True, only: Iterable[str] = ()
    ) -> None:
        """Begin a run of a configuration's file in a process of its own, which outlives this one."""
        if self.starting() or pipeline.going_on(folder):
            advice = "Wait for it, or cancel it"
            raise check.refused("app", "no run that goes on", f"one in {folder}", advice)
        words = ["run", str(file), "--plain", *([] if resume else ["--no-resume"])]
        for option, values in (("--trust", trust), ("--only", only)):
            words += [part for value in values for part in (option, value)]
        self.message = ""
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "esegeta", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=file.parent,
                env=os.environ,
            )
        # Whoever waits for it takes it off the system's list of processes when it ends.
        threading.Thread(target=self.process.wait, daemon=True).start()

    @property
    def log(self) -> Path:
        """Return the file of what the process has said."""
        return self.private / "run.txt"

    def starting(self) -> bool:
        """Return whether the process that was begun here is there."""
        return self.process is not None and self.process.poll() is None

    def state(self, folder: Path) -> dict[str, Any]:
        """Return how far the run in a folder is, in numbers and words."""
        watch = self.of(folder)
        code = None if self.process is None else self.process.poll()
        going = pipeline.going_on(folder)
        if code is not None and not going:
            self.message = self._said() if code > 1 else ""
            self.process = None
        word = "none"
        if going:
            word = "running"
        elif self.starting():
            word = "starting"
        elif self.message:
            word = "failed"
        elif watch.planned:
            word = "ended" if watch.ended else "interrupted"
        left = watch.tally.left(time.time()) if word == "running" else None
        return {
            "state": word,
            "total": watch.tally.total,
            "done": watch.tally.done,
            "failed": watch.tally.failed,
            "left": None if left is None else round(left),
            "line": watch.tally.line() if watch.planned else "",
            "message": self.message,
        }

    def _said(self) -> str:
        """Why a run did not begin, as its process has said."""
        lines = tail(self.log).strip().splitlines()
        return "\n".join(line.removeprefix("esegeta: ") for line in lines[-8:])


def cancel(folder: Path, ids: Iterable[str]) -> list[str]:
    """Ask the run in a folder to give jobs up."""
    return pipeline.cancel(folder, ids)


def tail(path: Path) -> str:
    """Return the last part of a log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


# --- What there is ----------------------------------------------------------------------------------------

_SHOWN = (
    "id",
    "kind",
    "subject",
    "target",
    "method",
    "title",
    "status",
    "error",
    "score",
    "residual",
    "min",
    "max",
    "sum",
    "seconds",
    "peak_memory",
    "place",
    "share_done",
)


def results(folder: Path) -> dict[str, Any]:
    """Return the records of a run as the page shows them: maps first, with what metrics say of each."""
    records = []
    for path in sorted((folder / ".jobs").glob("*.json")):
        record = plan.record_of(folder, path.stem)
        if record is not None and record.get("id") == path.stem and record.get("status"):
            records.append({"kind": "methods", **record})
    more = plan.joined(records)
    rows = [_row(folder, record, more.get(record["id"], {})) for record in records]
    tables = []
    for kind in kinds.known():
        own = [record for record in records if record["kind"] == kind.name]
        if own and kind.shown and kind.name != "methods":
            heads = list(kind.shown)
            found = [[row.get(name) for name in heads] for record in own for row in kind.rows(record)]
            tables.append(
                {
                    "title": kind.title,
                    "note": kind.note,
                    "heads": list(kind.shown.values()),
                    "rows": found[:500],
                }
            )
    return {"rows": rows, "tables": tables, "report": (folder / "report.html").is_file()}


def _row(folder: Path, record: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: record.get(name) for name in _SHOWN}
    made = record["status"] in MADE
    has = {
        name: made and inside(folder, record.get(name)) is not None
        for name in ("map", "anatomy", "prediction")
    }
    notes = [
        str(e.get("message", e)) if isinstance(e, Mapping) else str(e) for e in record.get("events") or []
    ]
    volumes = [what for what in volumes_of(record) if made and inside(folder, volumes_of(record)[what])]
    return {
        **row,
        "has": has,
        "volumes": volumes,
        "marks": marks.marks(record),
        "notes": notes,
        "metrics": dict(metrics),
    }


def volumes_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the volumes of a record that are looked at, by what they are: its map or maps, or an image that it made.

    >>> volumes_of({"map": "a.nii", "maps": {"mean": "b.nii"}, "image": None})
    {'map': 'a.nii', 'maps.mean': 'b.nii'}
    """
    maps = record.get("maps")
    several = {f"maps.{name}": path for name, path in maps.items()} if isinstance(maps, Mapping) else {}
    found = {"map": record.get("map"), **several, "image": record.get("image")}
    return {what: path for what, path in found.items() if path}


def file_of(folder: Path, job: str, what: str) -> Path:
    """Return a file that the record of a job names: one of ``volumes_of``, "anatomy", "prediction"; it is inside."""
    known = {path.stem for path in (folder / ".jobs").glob("*.json")}
    record = plan.record_of(folder, job) if job in known else None
    path = None if record is None else volumes_of(record).get(what, record.get(what))
    found = inside(folder, path)
    if found is None:
        raise FileNotFoundError(check.problem("app", f"the {what} of a job", repr(job[:200]), "Run it first"))
    return found
