"""Process groups: what they occupy, how they are ended, and that none outlives whoever started it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from esegeta.run import guard


class Guard:
    """Ends the groups that it knows when this process ends, however that happens."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__],
            stdin=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def _tell(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.write(line + "\n")
            pipe.flush()

    def add(self, group: int) -> None:
        """Watch over a group."""
        self._tell(f"+{group}")

    def drop(self, group: int) -> None:
        """The group has ended."""
        self._tell(f"-{group}")

    def close(self) -> None:
        """End what is left, and the guard."""
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
        self._process.wait()


def resident(groups: set[int]) -> dict[int, int]:
    """Bytes of memory that each process group occupies, all of its processes together.

    >>> import os
    >>> resident({os.getpgrp()})[os.getpgrp()] > 2**20
    True
    """
    used: dict[int, int] = defaultdict(int)
    if not Path("/proc/self/stat").exists():
        listing = subprocess.run(["ps", "-axo", "pgid=,rss="], capture_output=True, text=True, check=False)
        for line in listing.stdout.splitlines():
            group, kilobytes = map(int, line.split())
            if group in groups:
                used[group] += 1024 * kilobytes
        return used
    page = os.sysconf("SC_PAGE_SIZE")
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError):  # it may end while we look
            # After the name, which may hold spaces and brackets: state, parent, group.
            group = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[2])
            if group in groups:
                used[group] += page * int(Path(f"/proc/{entry}/statm").read_text().split()[1])
    return used


def send(group: int, number: signal.Signals) -> None:
    """Send a signal to every process of a group; none is left of it is fine."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def bury(process: "subprocess.Popen[bytes]", patience: float = 2.0) -> int:
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
    """What an exit code says, in words.

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
