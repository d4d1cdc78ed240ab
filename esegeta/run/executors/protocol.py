"""What every executor is: it takes tasks, tells events of their jobs, and knows only JSON and names of functions."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from esegeta.run.executors.status import Status

Event = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """One job of a task. payload goes through JSON; deadline: in seconds, from its beginning; memory: in bytes,
    resident.
    """

    id: str
    payload: Any = None
    deadline: float | int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Task:
    """Jobs that share something, such as an image and a network: one worker does them, one after another.

    ``function`` is ``package.module:name`` and called for each of them as (payload, context); what it keeps in
    ``context.cache`` is there for the next one. What it returns goes through JSON. Each job has its own limits and
    its own outcome: one that fails, or takes its worker along, costs the others nothing.

    jobs: with ids that are new; device: "cpu", "cuda:0"..., or None for any that the executor has.
    """

    function: str
    jobs: tuple[Piece, ...]
    device: str | None = None

    @classmethod
    def of(
        cls,
        id: str,
        function: str,
        payload: Any = None,
        deadline: float | int | None = None,
        memory: int | None = None,
        device: str | None = None,
    ) -> "Task":
        """Return a task of one job.

        >>> Task.of("a", "math:sqrt", 2.0).jobs
        (Piece(id='a', payload=2.0, deadline=None, memory=None),)
        """
        return cls(function, (Piece(id, payload, deadline, memory),), device)


@dataclass(frozen=True)
class Outcome:
    """How a job ended. error: one line; trace: everything that is known; peak_memory: in bytes, resident."""

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
    """Do tasks somewhere. A job that fails in any way fails alone, with an outcome that says why."""

    def submit(self, tasks: Iterable[Task]) -> None:
        """Take more tasks, also while others run."""

    def events(self) -> Iterator[Event]:
        """Give every event until no job is left: start, begin, progress, note, finishing, output, job_done.

        Each names its job; the last one carries its ``Outcome``. Several times a second comes "idle", of no job, so
        that who listens can do something else, such as submitting more.
        """

    def cancel(self, ids: Collection[str]) -> None:
        """End jobs that wait or run; each ends with the status "cancelled"."""

    def close(self, *, kill: bool = True) -> None:
        """Let go of everything: at once, or when what runs has ended."""
