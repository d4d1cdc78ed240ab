"""A small process that outlives the one that started it, only to end what that one has left behind.

It is told process groups on its standard input, ``+123`` and ``-123``. When that pipe closes, for whatever
reason, it kills the groups that are still on its list. The system closes the pipe even if the parent is killed,
and the guard has a session of its own, so a signal to the parent's group does not reach it.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterable


def remaining(lines: Iterable[str]) -> set[int]:
    """The groups that were announced and not taken back.

    >>> remaining(["+12", "+13", "-12"])
    {13}
    """
    groups: set[int] = set()
    for line in lines:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    return groups


def main() -> None:
    """Listen until the pipe closes, then kill."""
    for group in remaining(sys.stdin):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
