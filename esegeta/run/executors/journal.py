"""The events of a run on disk: another process can follow it and ask it to cancel jobs.

Events are lines of JSON in ``events.jsonl``, each with its time. Ids to cancel are lines in ``cancel``.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from esegeta.run.executors.protocol import Event, Outcome

EVENTS, CANCEL = "events.jsonl", "cancel"
_SHORT = (
    "id",
    "value",
    "trace",
)  # its name is there already; results and traces are in the record and the log


class Journal:
    """Write the events of one run into a folder, anew for each run, and hear what shall be cancelled."""

    def __init__(self, folder: str | Path) -> None:
        self._cancel = Path(folder) / CANCEL
        self._cancel.unlink(missing_ok=True)
        self._file: TextIO = open(Path(folder) / EVENTS, "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.write({"event": "ended", "job": None})
        self._file.close()

    def write(self, event: Event) -> None:
        """Add an event."""
        outcome = event.get("outcome")
        if isinstance(outcome, Outcome):
            fields = {k: v for k, v in dataclasses.asdict(outcome).items() if k not in _SHORT}
            event = {**event, "outcome": fields}
        self._file.write(json.dumps({"time": round(time.time(), 3), **event}, default=str) + "\n")
        self._file.flush()

    def to_cancel(self) -> list[str]:
        """Return the ids that were asked to be cancelled since the last time."""
        try:
            taken = self._cancel.with_name(f"{CANCEL}.taken")
            os.replace(self._cancel, taken)  # what is added from now on is for the next time
            ids = taken.read_text(encoding="utf-8").split()
            taken.unlink()
        except OSError:
            return []
        return ids


def events(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Give the events that a run has written so far; a line that is not whole yet is left for later.

    Args:
        folder: where its journal is, ``.jobs`` in the folder of a run.
    """
    with open(Path(folder) / EVENTS, encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def follow(
    folder: str | Path, *, going_on: Callable[[], bool], every: float = 0.2
) -> Iterator[dict[str, Any]]:
    """Give the events of a run that another process does, as they come, until it ends.

    What came of a job is an ``Outcome``, as for who runs it, but without its value and trace.

    Args:
        folder: where its journal is.
        going_on: whether the other process is still there; asked only while nothing comes.
        every: seconds between two looks.
    """
    with open(Path(folder) / EVENTS, encoding="utf-8") as lines:
        last = False
        while True:
            place = lines.tell()
            line = lines.readline()
            if line.endswith("\n"):
                event = json.loads(line)
                if "outcome" in event:
                    event["outcome"] = Outcome(event["job"], **event["outcome"])
                yield event
                if event["event"] == "ended":
                    return
                continue
            lines.seek(place)  # it is not whole yet
            if last:
                return
            last = not going_on()  # what it has written before it ended is still to be read
            if not last:
                time.sleep(every)


def cancel(folder: str | Path, ids: Iterable[str]) -> None:
    """Ask the run whose journal is in a folder to cancel jobs: those that wait and those that run."""
    with open(Path(folder) / CANCEL, "a", encoding="utf-8") as file:
        file.write("".join(f"{name}\n" for name in ids))
