"""What every executor is: it takes tasks, tells events, and knows only JSON and names of functions."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from esegeta.run.executors.status import Status

Event = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Something to do in a worker: ``function`` is ``package.module:name`` and called as (payload, context).

    payload and what the function returns go through JSON. deadline: in seconds, from its beginning; memory: in
    bytes, resident; device: "cpu", "cuda:0"..., or None for any that the pool has.
    """

    id: str
    function: str
    payload: Any = None
    deadline: float | int | None = None
    memory: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a task ended. error: one line; trace: everything that is known; peak_memory: in bytes, resident."""

    id: str
    status: Status
    value: Any = None
    error: str | None = None
    trace: str = ""
    seconds: float = 0.0
    peak_memory: int = 0
    device: str = "cpu"


@runtime_checkable
class Executor(Protocol):
    """Do tasks somewhere. One that fails in any way fails alone, with an outcome that says why."""

    def submit(self, tasks: Iterable[Task]) -> None:
        """Take more tasks, also while others run."""

    def events(self) -> Iterator[Event]:
        """Give every event until no task is left: start, begin, progress, note, finishing, output, end.

        Each names its task; the last one carries its ``Outcome``. About once a second comes "idle", of no task, so
        that who listens can do something else.
        """

    def cancel(self, ids: Collection[str]) -> None:
        """End tasks that wait or run; each ends with the status "cancelled"."""

    def close(self, *, kill: bool = True) -> None:
        """Let go of everything: at once, or when what runs has ended."""
