"""Processes and those that they start: what they occupy, how they are ended, and how they have ended."""

import contextlib
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from esegeta.run.executors.keeper import parents

_REST_SECONDS = 0.25


class Members:
    """Know which processes have been started below others, and what they occupy, at little cost.

    To find them means to look at every process of the machine, which takes milliseconds where there are thousands.
    So they are looked for only after the system has started another process, and in a hundredth of the time at most.
    What those that are known occupy can be read in microseconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._below: dict[int, set[int]] = {}
        self._newest: str | None = None
        self._due = 0.0

    def resident(self, roots: set[int]) -> dict[int, int]:
        """Return the bytes of memory that each of these processes occupies, with all that are below it.

        >>> import os
        >>> Members().resident({os.getpid()})[os.getpid()] > 2**20
        True
        """
        if not Path("/proc/self/stat").exists():
            return _resident_by_ps(roots)
        started = self._clock()
        newest = _newest()
        unknown = not roots <= self._below.keys()
        if unknown or (started >= self._due and (newest is None or newest != self._newest)):
            self._below, self._newest = _below(roots, parents()), newest
            self._due = self._clock() + max(_REST_SECONDS, 100 * (self._clock() - started))
        page = os.sysconf("SC_PAGE_SIZE")
        return {root: page * sum(map(_pages, self._below[root])) for root in roots}


def _below(roots: set[int], parent_of: Mapping[int, int]) -> dict[int, set[int]]:
    """Return each root and all that descend from it.

    >>> _below({1, 5}, {1: 0, 2: 1, 3: 2, 4: 9, 5: 0})
    {1: {1, 2, 3}, 5: {5}}
    """
    children: dict[int, list[int]] = defaultdict(list)
    for process, parent in parent_of.items():
        children[parent].append(process)
    found: dict[int, set[int]] = {}
    for root in sorted(roots):
        found[root], new = {root}, [root]
        while new:
            new = [child for process in new for child in children[process] if child not in found[root]]
            found[root].update(new)
    return found


def _newest() -> str | None:
    """Return the number of the process or thread that the system has started last, None if it does not tell."""
    with contextlib.suppress(OSError, IndexError):
        return Path("/proc/loadavg").read_text().split()[4]
    return None


def _pages(process: int) -> int:
    """Return how many pages of memory a process occupies; 0 if it has ended."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return 0


def _resident_by_ps(roots: set[int]) -> dict[int, int]:
    """Return the same for systems without /proc."""
    listing = subprocess.run(["ps", "-axo", "pid=,ppid=,rss="], capture_output=True, text=True, check=False)
    rows = [tuple(map(int, line.split())) for line in listing.stdout.splitlines()]
    below = _below(roots, {process: parent for process, parent, _ in rows})
    kilobytes = {process: size for process, _, size in rows}
    return {root: 1024 * sum(kilobytes.get(one, 0) for one in below[root]) for root in roots}


def memory_here() -> int:
    """Return the bytes of memory that this machine has, or fewer if a container or a job of a batch system has fewer.

    >>> memory_here() > 2**28
    True
    """
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        sizes += _allowed(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    return min(sizes)


def _allowed(membership: str, root: Path) -> list[int]:
    """Return the limits of memory of the control groups that a process is in, and of those around them.

    Args:
        membership: what /proc/self/cgroup says, a line ``number:controllers:path`` for each hierarchy.
        root: where the groups are.
    """
    limits = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):  # "" is the one hierarchy of version 2
            continue
        base, file = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        inner = base / path.lstrip("/")
        # Inside a container the path may be that outside, which is not there; what is there is the root.
        for group in (inner, *(parent for parent in inner.parents if parent.is_relative_to(base))):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
                limits.append(int((group / file).read_text()))
    return limits


def send(group: int, number: signal.Signals) -> None:
    """Send a signal to every process of a group; none is left of it is fine."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def reap(process: "subprocess.Popen[bytes]", patience: float = 2.0) -> int:
    """Wait for a process that is about to end, end what is left of its group, and return its exit code.

    Its number stays taken until it has been waited for, so the group that is ended is its own.
    """
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            break
        time.sleep(0.005)
    send(process.pid, signal.SIGKILL)
    return process.wait()


def how_it_ended(code: int) -> str:
    """Return what an exit code says, in words.

    >>> how_it_ended(-11), how_it_ended(3)
    ('the process was ended by SIGSEGV', 'the process ended itself with exit code 3')
    """
    if code >= 0:
        return f"the process ended itself with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (by the system, if it ran out of memory)" if name == "SIGKILL" else ""
    return f"the process was ended by {name}{hint}"
