"""How a task or a job has ended."""

from enum import StrEnum


class Status(StrEnum):
    """How a task or a job has ended; in files and messages it is its word.

    DONE: with a result. PARTIAL: with a part of it, as a deadline or missing inputs left it. FAILED: with an error.
    REFUSED: it cannot be done as it is put. TIMEOUT, MEMORY: at its limit. CRASHED: with its process. CANCELLED: on
    request. SKIPPED: what it needs did not come.

    >>> Status("done") is Status.DONE, f"{Status.TIMEOUT}", Status.MEMORY == "memory"
    (True, 'timeout', True)
    """

    DONE = "done"
    PARTIAL = "partial"
    FAILED = "failed"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    CRASHED = "crashed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"

    def __repr__(self) -> str:
        return repr(self.value)


# How a job ends that has a result to show.
MADE = (Status.DONE, Status.PARTIAL)
