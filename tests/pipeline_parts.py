"""A network, and methods that go wrong in every way. Imported by worker processes, never by that of the tests:
what is registered here would be tested as if it were a method.
"""

import os
import signal
import time

import torch
from pipeline_network import network as network

from esegeta import execution, occlusion
from esegeta._registry import method


@method(needs="values", paper="")
def hangs(score):
    """Never comes back."""

    def explain(x):
        while True:
            time.sleep(0.05)

    return explain


@method(needs="values", paper="")
def kills_itself(score):
    """Takes its process along."""
    return lambda x: os.kill(os.getpid(), signal.SIGKILL)


@method(needs="values", paper="")
def eats_memory(score):
    """Takes more and more."""

    def explain(x):
        hoard = []
        while True:
            hoard.append(torch.ones(2**22))
            time.sleep(0.002)

    return explain


@method(needs="values", paper="")
def slow(score, *, seconds: float | int = 0.5):
    """A gradient that takes its time."""

    def explain(x):
        time.sleep(seconds)
        return x * score(x)

    return explain


@method(refs=("baseline",), needs="values", paper="")
def slow_occlusion(score, *, size: int = 2, seconds: float | int = 0.1):
    """Occlusion of a score that takes its time."""

    def late(x):
        time.sleep(seconds)
        return score(x)

    def explain(x, baseline):
        with execution(chunk=1, evaluation="whole"):
            return occlusion(late, size=size)(x, baseline)

    return explain


@method(needs="values", paper="")
def not_finite(score):
    """Divides by zero."""
    return lambda x: x / torch.zeros(())


@method(needs="values", paper="")
def fills_the_disk(score):
    """Leaves no room for the file that tells of its map."""
    import errno
    from pathlib import Path

    write = Path.write_bytes

    def full(path, content):
        if b"fills_the_disk" in content:
            write(path, content[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    def explain(x):
        Path.write_bytes = full
        return x * score(x)

    return explain
