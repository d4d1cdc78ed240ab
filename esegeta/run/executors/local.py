"""Tasks in processes of their own, each with a deadline and a memory limit. Knows nothing of attributions.

A worker is a fresh interpreter. It does the jobs of a task one after another, and then those of the next task of the
same kind, which saves importing torch again. A crash, a time-out or memory running out ends one job and its worker;
another worker takes its place, and what was left of the task goes on there. A worker with nothing to do takes over
half of what is left of the longest task, so that few long tasks keep all of them busy.

Deadlines end in three steps. The job knows its deadline and may stop by itself with something useful. A grace
later, of some seconds and a tenth of the deadline, it gets SIGTERM, upon which the worker writes where it hangs; then
SIGKILL. A task that has its result in time can ask for a while to put it away.

Memory is watched from here: what the worker occupies, with all that it has started. A limit on the address
space (RLIMIT_AS) is not used: torch and CUDA reserve far more addresses than they ever occupy, and a refused
reservation ends in any error at all. Watching reports what happened.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Literal

from esegeta.engine import check
from esegeta.run.executors.processes import Members, how_it_ended, reap
from esegeta.run.executors.protocol import Event, Outcome, Piece, Task
from esegeta.run.executors.status import Status

WHERE = "pool.run"
_POLL_SECONDS = 0.05
# A look at the memory of all processes takes some milliseconds.
_LOOK_SECONDS = 0.1
_IDLE_LOOK_SECONDS = 1.0
_TERM_SECONDS = 2.0
_IDLE_SECONDS = 0.1
# As much as a pipe holds, and more, so that what a process has left behind is read at once.
_READS, _READ_BYTES = 4, 1 << 16
_LONGEST_LINE = 1 << 16
_CANCELLED = "it was cancelled"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share(workers: int) -> int:
    """The threads of each worker: its share of the cores, or fewer if OMP_NUM_THREADS says so."""
    share = max(1, cores() // workers)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdigit() and int(asked) else share


def slots(devices: Sequence[str], workers: int, per_device: int) -> list[str]:
    """Return the device of every worker: ``workers`` on the CPU, ``per_device`` on each GPU.

    >>> slots(["cpu"], 2, 1), slots(["cuda:0", "cuda:1"], 9, 2)
    (['cpu', 'cpu'], ['cuda:0', 'cuda:0', 'cuda:1', 'cuda:1'])
    """
    return [device for device in devices for _ in range(workers if device == "cpu" else per_device)]


def environment(device: str, threads: int, outer: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker: it sees its own GPU only, or none, and starts so many threads.

    >>> environment("cuda:1", 4, {"CUDA_VISIBLE_DEVICES": "5,7"})["CUDA_VISIBLE_DEVICES"]
    '7'
    """
    visible = ""
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        listed = [part.strip() for part in outer.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
        visible = listed[index] if index < len(listed) else str(index)
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return {
        **outer,
        **dict.fromkeys(_THREADS, str(threads)),
        "CUDA_VISIBLE_DEVICES": visible,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it products of matrices on GPUs are not repeatable
        "PYTHONPATH": paths,
        "PYTHONUNBUFFERED": "1",
    }


class _Worker:
    """One worker process, the job that it is doing, and what waits for it of the same task."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        ours, theirs = os.pipe()
        life, self.life = os.pipe()  # while we hold the end that nothing is written to, the worker may live
        inside = "cuda:0" if device.startswith("cuda") else device
        # -P: the folder that it is started in is not searched for modules unless ours is.
        command = [sys.executable, "-P", "-m", "esegeta.run.executors.child", str(theirs), str(life), inside]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs, life],
                env=environment(device, threads, os.environ),
                start_new_session=True,
            )
        finally:
            os.close(theirs)
            os.close(life)
        self.events: IO[bytes] = os.fdopen(ours, "rb", buffering=0)
        assert self.process.stdout is not None
        self.prints: IO[bytes] = self.process.stdout
        os.set_blocking(self.prints.fileno(), False)
        os.set_blocking(ours, False)
        self.rest = {"events": b"", "prints": b""}
        self.function = ""
        self.wanted: str | None = None  # the device that its task asks for
        self.rest_of_task: deque[Piece] = deque()
        self.retired = False
        self.idle()

    def idle(self) -> None:
        """Ready for the next job."""
        self.job: Piece | None = None
        self.begun: float | None = None
        self.until = float("inf")  # when it is too late
        self.sent = time.monotonic()
        self.reason: tuple[Status, str] | None = None  # why it is being ended
        self.asked: float | None = None  # when SIGTERM was sent
        self.peak = 0
        self.printed: deque[str] = deque(maxlen=60)

    def take(self, task: Task) -> None:
        """Let it do the jobs of a task."""
        self.function, self.wanted = task.function, task.device
        self.rest_of_task = deque(task.jobs)

    def give(self, job: Piece) -> None:
        """Let it do a job."""
        self.idle()
        self.job = job
        line = json.dumps(
            {
                "job": job.id,
                "function": self.function,
                "payload": job.payload,
                "deadline": job.deadline,
                "memory": job.memory,
            }
        )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: its pipe will say so
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def begin(self, grace: float) -> None:
        """Its imports are done and its clock starts."""
        assert self.job is not None
        self.begun = time.monotonic()
        if self.job.deadline is not None:
            self.until = self.begun + 1.1 * self.job.deadline + grace

    def lines(self, which: Literal["events", "prints"]) -> tuple[list[bytes], bool]:
        """Whole lines that have come, and whether the pipe has closed.

        Some of them if there are many: who prints without end must not keep the pool from looking at clocks.
        """
        pipe = self.events if which == "events" else self.prints
        closed = False
        for _ in range(_READS):
            try:
                data = os.read(pipe.fileno(), _READ_BYTES)
            except BlockingIOError:
                break
            if not data:
                closed = True
                break
            self.rest[which] += data
        *whole, rest = self.rest[which].split(b"\n")
        if which == "prints" and len(rest) >= _LONGEST_LINE:
            whole, rest = [*whole, rest], b""
        self.rest[which] = rest
        return whole, closed

    def close(self) -> int:
        """End it and everything that it has started; its exit code."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return reap(self.process)

    def kill(self) -> None:
        """Have it and everything that it has started killed at once."""
        if self.life >= 0:
            os.close(self.life)
            self.life = -1

    def shut(self) -> None:
        """Close our ends of its pipes."""
        self.kill()
        self.events.close()
        self.prints.close()


class Waiting:
    """Tasks that wait, those for the same device in one line: to take one costs the same however many there are.

    >>> waiting = Waiting([Task.of("a", "f", device="cuda:0"), Task.of("b", "f"), Task.of("c", "f", device="cpu")])
    >>> len(waiting), [waiting.take({"cpu"}).jobs[0].id for _ in "bc"], waiting.take({"cpu"}), len(waiting)
    (3, ['b', 'c'], None, 1)
    """

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        self._lines: dict[str | None, deque[tuple[int, Task]]] = {}
        self._left = 0
        self._come = 0
        self._first = 0
        self.add(tasks)

    def add(self, tasks: Iterable[Task]) -> None:
        """Let more tasks wait, behind those that do."""
        for task in tasks:
            self._lines.setdefault(task.device, deque()).append((self._come, task))
            self._come += 1
            self._left += len(task.jobs)

    def put_back(self, task: Task) -> None:
        """Let a task wait before all others."""
        self._first -= 1
        self._lines.setdefault(task.device, deque()).appendleft((self._first, task))
        self._left += len(task.jobs)

    def remove(self, ids: Collection[str]) -> list[Piece]:
        """Let some jobs wait no longer, and return those that did."""
        gone: list[Piece] = []
        for device, line in self._lines.items():
            left: deque[tuple[int, Task]] = deque()
            for place, task in line:
                gone += [job for job in task.jobs if job.id in ids]
                jobs = tuple(job for job in task.jobs if job.id not in ids)
                if jobs:
                    left.append((place, dataclasses.replace(task, jobs=jobs)))
            self._lines[device] = left
        self._left -= len(gone)
        return gone

    def __len__(self) -> int:
        return self._left

    def take(self, devices: Collection[str]) -> Task | None:
        """Take the first task that one of these devices may do, None if there is none."""
        heads = [
            (line[0][0], device)
            for device, line in self._lines.items()
            if line and devices and (device is None or device in devices)
        ]
        if not heads:
            return None
        task = self._lines[min(heads)[1]].popleft()[1]
        self._left -= len(task.jobs)
        return task


class LocalExecutor:
    """Do tasks in worker processes of this machine: hand out tasks, listen, watch. See ``protocol.Executor``.

    Args:
        workers: how many on the CPU.
        devices: "cpu", "cuda:0"...; a worker sees its own GPU only.
        per_device: how many workers on each GPU.
        threads: of each worker; None shares the cores among the workers, within OMP_NUM_THREADS.
        grace: seconds past its deadline that a job has to stop by itself, besides a tenth of the deadline.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        devices: Sequence[str] = ("cpu",),
        per_device: int = 1,
        threads: int | None = None,
        grace: float | int = 2.0,
    ) -> None:
        self.places = slots(
            devices,
            check.positive_count(WHERE, "workers", workers),
            check.positive_count(WHERE, "per_device", per_device),
        )
        if not self.places:
            expected = f"devices for all tasks, of {list(devices)}"
            raise check.refused(WHERE, expected, "none", "Add them")
        self.threads = _share(len(self.places))
        if threads is not None:
            self.threads = check.positive_count(WHERE, "threads", threads)
        self.pending = Waiting()
        self.free = list(self.places)
        self.grace = float(grace)
        self.members = Members()
        self.workers: list[_Worker] = []
        self.names: set[str] = set()
        self.heard: deque[Event] = deque()
        self.selector = selectors.DefaultSelector()
        self.looked = 0.0
        self.told = time.monotonic()

    def submit(self, tasks: Iterable[Task]) -> None:
        """Take more tasks, also while others run; their ids must be new."""
        todo = [task for task in tasks if task.jobs]
        counts = Counter(job.id for task in todo for job in task.jobs)
        twice = sorted(name for name, count in counts.items() if count > 1 or name in self.names)
        if twice:
            got = f"{twice} more than once"
            raise check.refused(WHERE, "different ids", got, "Rename them")
        strangers = sorted({t.device for t in todo if t.device is not None} - set(self.places))
        if strangers:
            expected = f"devices for all tasks, of {list(dict.fromkeys(self.places))}"
            got = f"tasks for {', '.join(strangers)}"
            raise check.refused(WHERE, expected, got, "Add them")
        self.names |= counts.keys()
        self.pending.add(todo)

    def waiting(self) -> int:
        """Return how many jobs wait to be begun."""
        return len(self.pending) + sum(len(worker.rest_of_task) for worker in self.workers)

    def cancel(self, ids: Collection[str]) -> None:
        """End jobs that wait or run; what has ended already stays as it is."""
        if not ids:
            return
        gone = self.pending.remove(ids)
        for worker in self.workers:
            gone += [job for job in worker.rest_of_task if job.id in ids]
            worker.rest_of_task = deque(job for job in worker.rest_of_task if job.id not in ids)
            if worker.job is not None and worker.job.id in ids and worker.reason is None:
                worker.reason = (Status.CANCELLED, _CANCELLED)
                worker.kill()
        for job in gone:
            self.finish(Outcome(job.id, Status.CANCELLED, error=_CANCELLED))

    def events(self) -> Iterator[Event]:
        """Give every event as it comes, until no job is left; more tasks may be submitted on the way."""
        while self.heard or self.waiting() or any(w.job for w in self.workers):
            if time.monotonic() - self.told >= _IDLE_SECONDS:
                self.told = time.monotonic()
                yield {"event": "idle", "job": None}
            self.hand_out()
            yield from self._new()  # before a worker has done much
            for key, _ in self.selector.select(_POLL_SECONDS):
                worker, which = key.data
                if worker in self.workers:
                    self.hear(worker, which)
            self.watch()
            yield from self._new()

    def _new(self) -> Iterator[Event]:
        while self.heard:
            yield self.heard.popleft()

    def close(self, *, kill: bool = True) -> None:
        """End all workers: at once, or when what they do has ended."""
        if not kill:
            self.pending = Waiting()
            for worker in self.workers:
                worker.rest_of_task.clear()
            for _ in self.events():
                pass
        for worker in self.workers:
            worker.kill()
        for worker in list(self.workers):
            self.end(worker)
        self.selector.close()

    def tell(self, event: str, job: str | None, **details: Any) -> None:
        """Keep an event for ``events``."""
        self.heard.append({"event": event, "job": job, **details})

    def hand_out(self) -> None:
        """Give every worker that is free the next job of its task, or a task that it may do."""
        for one in self.workers:
            if one.job is None and one.rest_of_task:
                self.next_job(one)
        while True:
            idle = [worker for worker in self.workers if worker.job is None]
            devices = {*self.free, *(worker.device for worker in idle)}
            task = self.pending.take(devices) or self.taken_over(devices)
            if task is None:
                return
            suited = [worker for worker in idle if task.device in (None, worker.device)]
            worker = next((one for one in suited if one.function == task.function), None)
            if worker is None:
                device = next((one for one in self.free if task.device in (None, one)), None)
                if device is None:
                    device = suited[0].device
                    self.end(suited[0])
                worker = self.start(device)
            worker.take(task)
            self.next_job(worker)

    def taken_over(self, devices: Collection[str]) -> Task | None:
        """Take half of what is left of the longest task, the later half, for a worker that has nothing to do."""
        busy = [
            worker
            for worker in self.workers
            if worker.rest_of_task and devices and (worker.wanted is None or worker.wanted in devices)
        ]
        if not busy:
            return None
        longest = max(busy, key=lambda worker: len(worker.rest_of_task))
        jobs = [longest.rest_of_task.pop() for _ in range((len(longest.rest_of_task) + 1) // 2)]
        return Task(longest.function, tuple(reversed(jobs)), longest.wanted)

    def next_job(self, worker: _Worker) -> None:
        """Give a worker the next job of its task."""
        job = worker.rest_of_task.popleft()
        worker.give(job)
        self.tell("start", job.id, device=worker.device, process=worker.process.pid)

    def start(self, device: str) -> _Worker:
        """Start a worker on a device that is free."""
        worker = _Worker(device, self.threads)
        self.free.remove(device)
        self.workers.append(worker)
        self.selector.register(worker.events, selectors.EVENT_READ, (worker, "events"))
        self.selector.register(worker.prints, selectors.EVENT_READ, (worker, "prints"))
        return worker

    def end(self, worker: _Worker) -> int:
        """End a worker; its place becomes free, and what was left of its task waits for another one."""
        if worker.rest_of_task:
            self.pending.put_back(Task(worker.function, tuple(worker.rest_of_task), worker.wanted))
            worker.rest_of_task.clear()
        code = worker.close()
        self.hear_prints(worker)
        for pipe in (worker.events, worker.prints):
            with contextlib.suppress(KeyError):
                self.selector.unregister(pipe)
        worker.shut()
        self.workers.remove(worker)
        self.free.append(worker.device)
        return code

    def hear_prints(self, worker: _Worker) -> bool:
        """Pass on what a worker prints, and return whether it will print no more."""
        lines, closed = worker.lines("prints")
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            worker.printed.append(text)
            self.tell("output", worker.job.id if worker.job else None, message=text)
        return closed

    def hear(self, worker: _Worker, which: Literal["events", "prints"]) -> None:
        """Take what a worker has sent."""
        if which == "prints":
            if self.hear_prints(worker):
                self.selector.unregister(worker.prints)
            return
        lines, closed = worker.lines("events")
        for line in lines:
            message = json.loads(line)
            kind, job = message.pop("event"), message.pop("job")
            if worker.job is None or job != worker.job.id:
                continue
            if kind == "begin":
                worker.begin(self.grace)
            if kind == "finishing":
                worker.until = max(worker.until, time.monotonic() + message["seconds"])
            if kind == "result":
                self.hear_prints(worker)
                self.settle(worker, message)
            else:
                self.tell(kind, job, **message)
        if closed and worker in self.workers:  # a result may have ended it already
            self.lose(worker)

    def settle(self, worker: _Worker, result: dict[str, Any]) -> None:
        """Note that a job has ended by itself."""
        assert worker.job is not None
        peak = max(worker.peak, result.pop("peak_memory"))
        status = Status(result.pop("status"))
        ended = Outcome(worker.job.id, status, device=worker.device, peak_memory=peak, **result)
        # An error on a GPU may have spoiled it for the whole process: all that follows would fail as well.
        spoiled = ended.status == Status.FAILED and worker.device != "cpu"
        worker.retired = worker.reason is not None or ended.status == Status.MEMORY or spoiled
        worker.job = None
        self.finish(ended)
        if worker.retired:
            self.end(worker)
        elif worker.rest_of_task:
            self.next_job(worker)  # at once: it would wait for the next look at everything

    def lose(self, worker: _Worker) -> None:
        """Note that a worker has gone, by itself or because it was ended."""
        job, begun = worker.job, worker.begun or worker.sent
        code = self.end(worker)
        if job is None:
            return
        status, error = worker.reason or (Status.CRASHED, how_it_ended(code))
        trace = "\n".join(worker.printed)
        seconds = time.monotonic() - begun
        self.finish(Outcome(job.id, status, None, error, trace, seconds, worker.peak, worker.device))

    def finish(self, outcome: Outcome) -> None:
        """Tell that a job has ended."""
        self.tell("job_done", outcome.id, outcome=outcome)

    def watch(self) -> None:
        """Look at clocks and memory."""
        now = time.monotonic()
        busy = [w for w in self.workers if w.job is not None]
        limited = any(w.job.memory is not None for w in busy if w.job is not None)
        used: dict[int, int] = {}
        if busy and now - self.looked >= (_LOOK_SECONDS if limited else _IDLE_LOOK_SECONDS):
            self.looked = now
            used = self.members.resident({w.process.pid for w in busy})
        for worker in busy:
            job = worker.job
            assert job is not None
            here = used.get(worker.process.pid, 0)
            worker.peak = max(worker.peak, here)
            if job.memory is not None and here > job.memory and worker.reason is None:
                worker.reason = (
                    Status.MEMORY,
                    f"it occupied {size(here)}, more than the {size(job.memory)} allowed",
                )
                worker.kill()
            elif worker.asked is not None and now - worker.asked > _TERM_SECONDS:
                worker.kill()
            elif now > worker.until and worker.reason is None:
                worker.reason = (Status.TIMEOUT, f"not done after {job.deadline:g} s")
                worker.asked = now
                worker.process.send_signal(signal.SIGTERM)


def size(amount: int) -> str:
    """Return a number of bytes for people.

    >>> size(3 * 2**29), size(2**20)
    ('1.50 GiB', '1 MiB')
    """
    return f"{amount / 2**30:.2f} GiB" if amount >= 2**30 else f"{amount / 2**20:.0f} MiB"


def run(
    tasks: Iterable[Task],
    *,
    workers: int = 1,
    devices: Sequence[str] = ("cpu",),
    per_device: int = 1,
    threads: int | None = None,
    grace: float | int = 2.0,
    on_event: Callable[[Event], None] | None = None,
) -> list[Outcome]:
    """Do tasks in worker processes, several at once. A job that fails in any way fails alone.

    Returns when all have ended. Whatever ends this call or this process, by Ctrl-C or SIGKILL, ends the workers
    and what they have started.

    Args:
        tasks: of jobs with different ids.
        workers: how many on the CPU.
        devices: "cpu", "cuda:0"...; a worker sees its own GPU only.
        per_device: how many workers on each GPU.
        threads: of each worker; None shares the cores among the workers, within OMP_NUM_THREADS.
        grace: seconds past its deadline that a job has to stop by itself, besides a tenth of the deadline.
        on_event: called here with every event: start, begin, progress, note, finishing, output, job_done. The last
            one carries the ``Outcome``.

    Returns:
        The outcomes in the order of the jobs.

    Example:
        >>> done = run([Task.of("a", "math:does_not_exist")])
        >>> done[0].status, done[0].error
        ('failed', "AttributeError: module 'math' has no attribute 'does_not_exist'")
    """
    todo = list(tasks)
    pool = LocalExecutor(
        workers=workers, devices=devices, per_device=per_device, threads=threads, grace=grace
    )
    outcomes: dict[str, Outcome] = {}
    try:
        pool.submit(todo)
        for event in pool.events():
            if event["event"] == "job_done":
                outcomes[event["job"]] = event["outcome"]
            if on_event is not None and event["event"] != "idle":
                on_event(event)
    finally:
        pool.close()
    return [outcomes[job.id] for task in todo for job in task.jobs]
