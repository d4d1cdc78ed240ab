"""What the workers of ``test_pool`` are given to do. Imports nothing heavy: workers start quickly."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from esegeta.engine import refusals


def double(payload, context):
    context.progress("double", 0.5)
    context.note("half of it")
    context.progress("double", 1.0)
    print("printed", payload)
    return {"twice": 2 * payload, "process": os.getpid()}


def settings(payload, context):
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {"device": context.device, "memory": context.memory, **{n: os.environ[n] for n in names}}


def count(payload, context):
    """How many tasks of this kind the worker has done."""
    context.cache["count"] = context.cache.get("count", 0) + 1
    if payload == "wrong":
        raise RuntimeError(payload)
    return context.cache["count"]


def several(payload, context):
    """One of several jobs: count those of this worker so far, or go wrong in some way."""
    if payload == "count":
        return [os.getpid(), count(payload, context)]
    return globals()[payload](0, context)


def wait(payload, context):
    time.sleep(payload)
    return "waited"


def hang(payload, context):
    while True:
        time.sleep(0.01)


def hang_inside_c(payload, context):
    re.match(r"(a+)+$", "a" * 64 + "b")  # exponential, and does not let other threads of Python run


def hang_deaf(payload, context):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hang(payload, context)


def shout(payload, context):
    while True:
        os.write(1, b"Is anybody there?\n" * 5000)


def shout_on_one_line(payload, context):
    while True:
        os.write(1, b"a" * 2**16)


def stop_in_time(payload, context):
    class DeadlineExceeded(TimeoutError):
        pass

    time.sleep(context.seconds)
    raise DeadlineExceeded("after 3 of 10 steps")


def finish(payload, context):
    """Ask for some time after the result, and take two seconds."""
    context.finishing(payload)
    time.sleep(2.5)
    return "put away"


def kill_itself(payload, context):
    os.kill(os.getpid(), signal.SIGKILL)


def segfault(payload, context):
    ctypes.string_at(0)


def leave(payload, context):
    os._exit(3)


def leave_politely(payload, context):
    sys.exit(3)


def eat(payload, context):
    """Occupy 400 MiB, and wait: however late a busy machine looks, there is never more."""
    hoard = []
    for _ in range(50):
        hoard.append(bytearray(b"x" * 2**23))
        time.sleep(0.005)
    time.sleep(120)


def eat_in_a_child(payload, context):
    subprocess.run([sys.executable, "-c", "import pool_tasks; pool_tasks.eat(0, 0)"], check=False)


def eat_in_a_session(payload, context):
    command = [sys.executable, "-c", "import pool_tasks; pool_tasks.eat(0, 0)"]
    subprocess.run(command, check=False, start_new_session=True)


def no_memory(payload, context):
    raise MemoryError


def wrong(payload, context):
    raise KeyError("what was looked for")


def refuse(payload, context):
    raise refusals.refused("ig", "steps to be at least 1", "0", "Give more")


def not_json(payload, context):
    return object()


# Ends at once, and leaves a process behind that has a session of its own and no parent that could be asked for it.
ORPHAN = """
import subprocess, sys
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(sleep, start_new_session=True, stdout=subprocess.DEVNULL).pid)
"""


def start_a_child(payload, context):
    """Leave processes behind in every way, and say which."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(sleep)
    apart = subprocess.Popen(sleep, start_new_session=True, env={})
    orphan = subprocess.run(
        [sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    part = Path(payload["file"] + ".part")
    part.write_text(f"{os.getpid()} {child.pid} {apart.pid} {orphan}")
    part.rename(payload["file"])
    if payload["hang"]:
        hang(payload, context)
    if payload.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    return child.pid
