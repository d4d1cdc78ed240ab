"""The process between the pool and a worker. It ends with the worker everything that the worker has started.

A process that a network starts can leave the worker's process group (``setsid``), and its parent may end before it:
then nothing leads from the worker to it any more. On Linux the keeper therefore adopts what loses its parent below
it (``PR_SET_CHILD_SUBREAPER``). When the worker ends, or when the pool closes its end of a pipe, the keeper kills
its children until there are none. The system closes that pipe whatever ends the pool, SIGKILL included, and the
keeper has a session of its own, so a signal to the group of the pool does not reach it.
"""

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# What cannot be killed within this time waits for a disk that does not answer; the keeper does not wait as well.
_PATIENCE = 5.0


def _prctl(option: int, value: int) -> None:
    """Tell the system something about this process, where it is Linux."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def children(process: int) -> list[int]:
    """Return the processes whose parent is ``process``; none where there is no /proc.

    >>> import subprocess, sys
    >>> child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    >>> child.pid in children(os.getpid()) or not Path("/proc/self/stat").exists()
    True
    >>> _ = child.communicate()
    """
    return [child for child, parent in parents().items() if parent == process]


def parents() -> dict[int, int]:
    """Return the parent of every process; none where there is no /proc."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, IndexError, ValueError):  # it may end while we look
                # After the name, which may hold spaces and brackets: state, parent.
                found[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def keep(pipe: int, theirs: int) -> None:
    """Become the keeper of a new process, and return in that one only.

    Args:
        pipe: the pool holds its other end. When that is closed, everything is ended.
        theirs: a pipe of the worker's, which has to close when the worker ends.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    keeper = os.getpid()
    # Before there is a child: none may end unnoticed.
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the waker
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for unused in (pipe, woken, waker):
            os.close(unused)
        os.setsid()  # a signal to its own group does not reach the keeper
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # the keeper was killed before the line above
            os._exit(1)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _send(worker, signal.SIGTERM))
    os.close(theirs)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    status = _wait(worker, pipe, woken)
    _send(worker, signal.SIGKILL)
    _end_children()
    _end_as(-signal.SIGKILL if status is None else status)


def _wait(worker: int, pipe: int, woken: int) -> int | None:
    """Wait for the worker and return its exit code, negative for a signal; None if the pool is done with it."""
    while True:
        ready, _, _ = select.select([pipe, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
        ended = _reap()
        if worker in ended:
            return os.waitstatus_to_exitcode(ended[worker])
        if pipe in ready:
            return None


def _reap() -> dict[int, int]:
    """Take note of every child that has ended: its status."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = found[1]
    return ended


def _end_children() -> None:
    """Kill all children, and those of theirs, which become ours when theirs have ended."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        _reap()
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # there are none
            return
        for child in children(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def _end_as(code: int) -> None:
    """End this process as the worker has ended."""
    if code < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one image of the memory is enough
        with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
        time.sleep(_PATIENCE)
    os._exit(code if code >= 0 else 1)


def _send(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
