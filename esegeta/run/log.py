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
        """Something has happened."""
        if self._tell is not None:
            self._tell(event)


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
    """An event as texts for the log; none for those that come by the hundred.

    >>> sentences({"event": "note", "task": "a_b_c", "message": "half of it"})
    ['a_b_c: half of it']
    """
    kind, task = event["event"], event.get("task")
    whose = f"{task}: " if task else ""
    if kind in ("progress", "begin", "finishing"):
        return []
    if kind == "start":
        return [f"{whose}starts on {event['device']} in process {event['process']}"]
    if kind == "output":
        return [f"{whose}| {event['message']}"]
    if kind == "end":
        ended = event["outcome"]
        text = f"{whose}{ending(ended)}, {ended.peak_memory / 2**20:.0f} MiB"
        return [
            *(f"{whose}{said['message']}" for said in notes(ended)),
            "\n".join(filter(None, [text, ended.trace])),
        ]
    return [f"{whose}{event.get('message', kind)}"]


def notes(ended: Outcome) -> list[dict[str, Any]]:
    """What a job says was done otherwise than asked."""
    return ended.value.get("events", []) if isinstance(ended.value, dict) else []


def ending(ended: Outcome) -> str:
    """How a job has ended, in a few words.

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

    def __init__(self, total: int, skipped: int, out: TextIO | None = None, every: float = 30.0) -> None:
        super().__init__()
        self.total, self.ended = total, 0
        self.out = out or sys.stderr
        self.every = every
        self.said: dict[str, float] = {}
        self.skipped = skipped

    def __enter__(self) -> "Lines":
        if self.skipped:
            self._say(f"{self.skipped} of {self.total + self.skipped} jobs are done already")
        return self

    def _say(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def show(self, event: Event) -> None:
        """Print it, if it is worth a line."""
        kind, task = event["event"], event.get("task")
        if task is None:
            return
        now = time.monotonic()
        if kind == "begin":
            self.said[task] = now
            self._say(f"        {task}: begins")
        elif kind == "progress" and now - self.said.get(task, now) >= self.every:
            self.said[task] = now
            self._say(f"        {task}: {100 * event['fraction']:.0f} % ({event['label']})")
        elif kind == "end":
            self.ended += 1
            ended = event["outcome"]
            width = len(str(self.total))
            self._say(f"[{self.ended:>{width}}/{self.total}] {task}: {ending(ended)}")


class Table(Display):
    """A bar for each job that is going on, and one for all of them. Needs rich."""

    def __init__(self, total: int, skipped: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        super().__init__()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[label]}", markup=False, style="dim"),
            console=Console(stderr=True),
            refresh_per_second=5,
        )
        self._all = self._progress.add_task("all jobs", total=total + skipped, completed=skipped, label="")
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

        kind, task = event["event"], event.get("task")
        if task is None:
            return
        if kind == "start":
            self._bars[task] = self._progress.add_task(task, total=1.0, label="starting")
        elif kind == "begin" and task in self._bars:
            self._progress.update(self._bars[task], label="reading")
        elif kind == "progress" and task in self._bars:
            self._progress.update(self._bars[task], completed=event["fraction"], label=event["label"])
        elif kind == "end":
            if task in self._bars:
                self._progress.remove_task(self._bars.pop(task))
            self._progress.advance(self._all)
            ended = event["outcome"]
            record = ended.value if isinstance(ended.value, dict) else {}
            colour = "red" if ended.status != "done" else "yellow" if marks(record) else "green"
            self._progress.console.print(Text(f"{task}: {ending(ended)}", style=colour))


def display(total: int, skipped: int, progress: bool | Callable[[Event], None] | None = None) -> Display:
    """How to show a run: bars on a terminal, if rich is there; else lines.

    Args:
        total: how many jobs there are to do.
        skipped: how many are done already.
        progress: False for nothing, True for lines, a function of every event, None for what suits.
    """
    if callable(progress):
        return Display(progress)
    if progress is False:
        return Display()
    if progress is None and sys.stderr.isatty():
        try:
            return Table(total, skipped)
        except ImportError:
            pass
    return Lines(total, skipped)
