"""The other side of ``esegeta.run.executors.local``: a worker process that does one job after another.

Jobs come as lines of JSON on standard input, events and results leave as lines of JSON through a pipe of its
own. What they print, and what dies with a message, goes to standard error, which the pool writes into its log.
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from esegeta.engine import refusals
from esegeta.run.executors import keeper
from esegeta.run.executors.status import Status

_REPORT_SECONDS = 0.1
# What torch and the libraries below it say of memory where they raise no error of that kind.
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


@dataclass
class Context:
    """What a job may know and use besides its payload.

    device: where to compute, as this process sees it; seconds: how long it may take, None for as long as it
    likes; memory: how much it may occupy, in bytes; cache: kept for the next job of this worker.
    """

    device: str
    seconds: float | None
    memory: int | None
    cache: dict[str, Any]
    send: Callable[..., None]
    _shown: float = field(default=0.0)

    def progress(self, label: str, fraction: float) -> None:
        """Say how far the task is; at most ten times a second it is passed on."""
        now = time.monotonic()
        if now - self._shown >= _REPORT_SECONDS or fraction >= 1:
            self._shown = now
            self.send(event="progress", label=label, fraction=round(float(fraction), 4))

    def finishing(self, seconds: float) -> None:
        """Say that the result is there, and that it needs at most so long to be put away, deadline or not."""
        self.send(event="finishing", seconds=seconds)

    def note(self, message: str) -> None:
        """Say something for the log."""
        self.send(event="note", message=message)


def resolve(name: str) -> Callable[[Any, Context], Any]:
    """Return the function that ``package.module:name`` names.

    >>> resolve("math:sqrt")(9.0)
    3.0
    """
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def one_line(error: BaseException) -> str:
    """Type and message of an error; what is refused says by itself what it is about.

    >>> one_line(ValueError("first\\n  second")), one_line(refusals.refused("size", "1", "2", "Change it"))
    ('ValueError: first second', 'size: expected 1, got 2. Change it.')
    """
    message = refusals.one_line(error)
    if message and verdict(error) == Status.REFUSED:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def verdict(error: BaseException) -> Status:
    """Return how a task that raised has ended.

    >>> verdict(MemoryError()), verdict(KeyError("x")), verdict(refusals.refused("ig", "steps >= 1", "0", "More"))
    ('memory', 'failed', 'refused')
    """
    # By name, so that a pool of tasks without torch does not import it.
    named = {kind.__name__ for kind in type(error).__mro__}
    no_memory = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    if isinstance(error, MemoryError) or "OutOfMemoryError" in named or no_memory:
        return Status.MEMORY
    if "DeadlineExceeded" in named:
        return Status.TIMEOUT
    return Status.REFUSED if refusals.is_refusal(error) else Status.FAILED


def reset_peak() -> None:
    """Let ``peak`` begin anew, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the most memory that this process has occupied since ``reset_peak``, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def resident() -> int:
    """Return the memory that this process occupies now, in bytes, or the most so far if only that is known.

    >>> 0 < resident() <= peak()
    True
    """
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak()


def tidy() -> None:
    """Give memory back that the last task has left behind, so that it does not count for the next."""
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.empty_cache()
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def perform(job: dict[str, Any], context: Context) -> dict[str, Any]:
    """Do one job: what it returned, or how it ended."""
    started = time.monotonic()
    try:
        work = resolve(job["function"])  # its imports are not the job's time
        context.send(event="begin")
        started = time.monotonic()
        value = work(job["payload"], context)
        json.dumps(value)
        ended = {"status": Status.DONE, "value": value}
    except BaseException as error:  # also SystemExit: it is the job that ends, not the worker
        cause = error.__cause__ if isinstance(error, refusals.Refused) and error.__cause__ else error
        trace = "".join(traceback.format_exception(cause))
        ended = {"status": verdict(error), "error": one_line(error), "trace": trace}
    return {**ended, "seconds": time.monotonic() - started, "peak_memory": peak()}


def serve(jobs: BinaryIO, events: BinaryIO, device: str) -> None:
    """Do jobs until there are no more."""
    cache: dict[str, Any] = {}
    for number, line in enumerate(jobs):
        job = json.loads(line)
        if not number:
            with contextlib.suppress(Exception):  # said where the job is done
                resolve(job["function"])

        def send(job: str = job["job"], **event: Any) -> None:
            events.write(json.dumps({"job": job, **event}).encode() + b"\n")
            events.flush()

        tidy()
        if (
            number <= 1
        ):  # what was imported before the first job or by it stays, and takes long to be looked through
            gc.freeze()
        reset_peak()
        result = perform(job, Context(device, job["deadline"], job["memory"], cache, send))
        send(event="result", **result)
        if result["status"] == Status.MEMORY:  # who knows what is left of it
            return


def main() -> None:
    """Run as a worker: ``python -m esegeta.run.executors.child EVENTS LIFE DEVICE``."""
    channel, life = int(sys.argv[1]), int(sys.argv[2])
    keeper.keep(life, channel)
    tasks = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.set_inheritable(channel, False)  # what a task starts must not keep the pipe open
    faulthandler.enable()
    # Before a task that hangs is ended it is asked where it hangs.
    faulthandler.register(signal.SIGTERM, chain=True)
    with contextlib.suppress(OSError):  # if the system runs out of memory, it is the worker that has to go
        Path("/proc/self/oom_score_adj").write_text("900")
    with os.fdopen(channel, "wb") as events, contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        serve(tasks, events, sys.argv[3])
    sys.stdout.flush()
    os._exit(0)  # nothing that a task has left running can hold it


if __name__ == "__main__":
    from esegeta.run.executors import child  # what tasks import is that module and not this copy of it

    child.main()
