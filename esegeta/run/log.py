"""What a run tells while it goes on: everything into a file, what matters onto the screen."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from esegeta.run.executors.protocol import Outcome
from esegeta.run.executors.status import Status
from esegeta.run.jobs.marks import marks

Event = dict[str, Any]


class Display:
    """Shows nothing of a run, or hands its events to a function."""

    def __init__(self, tell: Callable[[Event], None] | None = None) -> None:
        self._tell = tell

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, event: Event) -> None:
        """Show an event."""
        if self._tell is not None:
            self._tell(event)


class Tally:
    """How far a run is, from its events: as they come, or as another process reads them.

    >>> tally = Tally()
    >>> for event in (
    ...     {"event": "planned", "total": 12, "time": 0.0},
    ...     {"event": "kept", "count": 2, "time": 0.0},
    ...     {"event": "begin", "job": "a", "time": 10.0},
    ...     {"event": "job_done", "job": "a", "outcome": {"status": "failed"}, "time": 70.0},
    ... ):
    ...     tally.on_event(event)
    >>> tally.line(now=70.0)
    '3 of 12, 1 failed, about 9 min left'
    """

    def __init__(self) -> None:
        self.total = self.kept = self.failed = self.here = 0
        self.running: dict[str, float] = {}  # job -> the part of it that is done
        self.ended = False
        self._began: float | None = None

    def on_event(self, event: Event) -> None:
        """Take an event; one without a time is of now."""
        kind, job, now = event["event"], event.get("job"), event.get("time", time.time())
        if kind == "planned":
            self.total = event["total"]
        elif kind == "kept":
            self.kept += event["count"]
        elif kind == "begin" and job:
            self._began = now if self._began is None else self._began
            self.running[job] = 0.0
        elif kind == "progress" and job:
            self.running[job] = event["fraction"]
        elif kind == "job_done" and job:
            self.running.pop(job, None)
            outcome = event["outcome"]
            status = outcome.status if isinstance(outcome, Outcome) else outcome["status"]
            self.here += 1
            self.failed += status != Status.DONE
        elif kind == "ended":
            self.ended = True
            self.running.clear()

    @property
    def done(self) -> int:
        """Return how many jobs need nothing more."""
        return self.kept + self.here

    def left(self, now: float) -> float | None:
        """Return the seconds until all is done, if jobs take as long as they did; None if there is nothing yet."""
        done = self.here + sum(self.running.values())
        rest = self.total - self.done - sum(self.running.values())
        if self._began is None or done <= 0 or rest <= 0:
            return None
        return (now - self._began) * rest / done

    def line(self, now: float | None = None) -> str:
        """Return all of it in one line."""
        left = None if self.ended else self.left(time.time() if now is None else now)
        failed = f"{self.failed} failed" if self.failed else ""
        words = [f"{self.done} of {self.total}", failed, f"about {roughly(left)} left" if left else ""]
        return ", ".join(filter(None, words))


def roughly(seconds: float) -> str:
    """Return a time of which nobody knows the seconds.

    >>> roughly(0.2), roughly(70), roughly(540), roughly(9000)
    ('1 s', '70 s', '9 min', '2 h 30 min')
    """
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class Log:
    """A file to which lines are added, each with the time at which it was written."""

    def __init__(self, path: str | Path) -> None:
        self._file: TextIO = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        """Add a text; further lines of it are indented."""
        first, *rest = text.splitlines() or [""]
        now = datetime.now().isoformat(sep=" ", timespec="milliseconds")
        with self._lock:
            try:
                self._file.write("".join([f"{now}  {first}\n", *(f"    {line}\n" for line in rest)]))
                self._file.flush()
            except OSError as error:  # no line of a log is worth the run, but it has to be seen
                print(f"log: {error.strerror}: {text}", file=sys.stderr)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # what is left in its buffer was printed
            self._file.close()


def sentences(event: Event) -> list[str]:
    """Return an event as texts for the log; none for those that come by the hundred.

    >>> sentences({"event": "note", "job": "a_b_c", "message": "half of it"})
    ['a_b_c: half of it']
    """
    kind, job = event["event"], event.get("job")
    whose = f"{job}: " if job else ""
    if kind in ("progress", "begin", "finishing", "planned"):
        return []
    if kind == "kept":
        return [f"{event['count']} jobs are done already"]
    if kind == "start":
        return [f"{whose}starts on {event['device']} in process {event['process']}"]
    if kind == "output":
        return [f"{whose}| {event['message']}"]
    if kind == "job_done":
        ended = event["outcome"]
        text = f"{whose}{ending(ended)}, {ended.peak_memory / 2**20:.0f} MiB"
        return [
            *(f"{whose}{said['message']}" for said in notes(ended)),
            "\n".join(filter(None, [text, ended.trace])),
        ]
    return [f"{whose}{event.get('message', kind)}"]


def notes(ended: Outcome) -> list[dict[str, Any]]:
    """Return what a job says was done otherwise than asked."""
    return ended.value.get("events", []) if isinstance(ended.value, dict) else []


def ending(ended: Outcome) -> str:
    """Return how a job has ended, in a few words.

    >>> ending(Outcome("a", "done", {"status": "partial", "share_done": 0.25}, seconds=9.0))
    'ended after 9.0 s, partial: 25 % done'
    >>> ending(Outcome("a", "done", seconds=3.14159)), ending(Outcome("a", "timeout", error="not done", seconds=9.0))
    ('done in 3.1 s', 'timeout after 9.0 s: not done')
    """
    if ended.status != "done":
        return f"{ended.status} after {ended.seconds:.1f} s: {ended.error}"
    record = ended.value if isinstance(ended.value, dict) else {}
    cut = record.get("status") == "partial"
    return ", ".join([f"{'ended after' if cut else 'done in'} {ended.seconds:.1f} s", *marks(record)])


class Lines(Display):
    """A line when a job starts and when it ends, and now and then how far a long one is."""

    def __init__(self, out: TextIO | None = None, every: float = 30.0) -> None:
        super().__init__()
        self.tally = Tally()
        self.out = out or sys.stderr
        self.every = every
        self.said: dict[str, float] = {}

    def _say(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def show(self, event: Event) -> None:
        """Print it, if it is worth a line."""
        self.tally.on_event(event)
        kind, job = event["event"], event.get("job")
        if kind == "kept":
            self._say(f"{self.tally.kept} of {self.tally.total} jobs are done already")
        if job is None:
            return
        now = time.monotonic()
        if kind == "begin":
            self.said[job] = now
            self._say(f"        {job}: begins")
        elif kind == "progress" and now - self.said.get(job, now) >= self.every:
            self.said[job] = now
            self._say(f"        {job}: {100 * event['fraction']:.0f} % ({event['label']})")
        elif kind == "job_done":
            self._say(f"[{self.tally.line()}] {job}: {ending(event['outcome'])}")


class Table(Display):
    """A bar for each job that is going on, and one for all of them. Needs rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        super().__init__()
        self.tally = Tally()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[label]}", markup=False, style="dim"),
            console=Console(stderr=True),
            refresh_per_second=5,
        )
        self._all = self._progress.add_task("all jobs", total=None, label="")
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> "Table":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            self._progress.remove_task(bar)
        self._progress.stop()

    def show(self, event: Event) -> None:
        """Move the bars."""
        from rich.text import Text

        self.tally.on_event(event)
        kind, job = event["event"], event.get("job")
        if kind in ("planned", "kept", "progress", "job_done"):
            done, label = self.tally.done, self.tally.line()
            self._progress.update(self._all, total=self.tally.total, completed=done, label=label)
        if job is None:
            return
        if kind == "start":
            self._bars[job] = self._progress.add_task(job, total=1.0, label="starting")
        elif kind == "begin" and job in self._bars:
            self._progress.update(self._bars[job], label="reading")
        elif kind == "progress" and job in self._bars:
            self._progress.update(self._bars[job], completed=event["fraction"], label=event["label"])
        elif kind == "job_done":
            if job in self._bars:
                self._progress.remove_task(self._bars.pop(job))
            ended = event["outcome"]
            record = ended.value if isinstance(ended.value, dict) else {}
            colour = "red" if ended.status != "done" else "yellow" if marks(record) else "green"
            self._progress.console.print(Text(f"{job}: {ending(ended)}", style=colour))


def display(progress: bool | Callable[[Event], None] | None = None) -> Display:
    """Return how to show a run: bars on a terminal, if rich is there; else lines.

    Args:
        progress: False for nothing, True for lines, a function of every event, None for what suits.
    """
    if callable(progress):
        return Display(progress)
    if progress is False:
        return Display()
    if progress is None and sys.stderr.isatty():
        try:
            return Table()
        except ImportError:
            pass
    return Lines()
