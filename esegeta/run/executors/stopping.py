"""Signals that ask a process to end, taken as Ctrl-C is: what is finished is kept, and the rest is told."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# Batch systems and `kill` send the first, a terminal that is closed the second.
_ASKING = ("SIGTERM", "SIGHUP")


class Terminated(KeyboardInterrupt):
    """A signal has asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise ``Terminated`` inside when a signal asks this process to end: once, so that what follows is not cut off.

    A signal that the process ignores (``nohup``) or that it has a handler of its own for is left alone, and so is
    everything outside of the main thread, where Python has no handlers.
    """
    ours: list[signal.Signals] = []

    def stop(number: int, _: FrameType | None) -> None:
        for one in ours:
            signal.signal(one, signal.SIG_IGN)
        raise Terminated(number)

    if threading.current_thread() is threading.main_thread():
        known = [getattr(signal, name) for name in _ASKING if hasattr(signal, name)]
        ours += [one for one in known if signal.getsignal(one) == signal.SIG_DFL]
    try:
        for one in ours:
            signal.signal(one, stop)
        yield
    finally:
        for one in ours:
            signal.signal(one, signal.SIG_DFL)
