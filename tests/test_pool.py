"""Worker processes: what fails fails alone and says why, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esegeta.run.executors import child, processes
from esegeta.run.executors import local as pool
from esegeta.run.executors.protocol import Piece, Task


def task(name, function=None, payload=None, **limits):
    return Task.of(name, f"pool_tasks:{function or name}", payload, **limits)


def run(tasks, **settings):
    events = []
    found = pool.run(tasks, on_event=events.append, grace=0.2, **settings)
    return {one.id: one for one in found}, events


def alive(process):
    """Whether a process exists and is no mere entry that nobody has waited for."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(*processes, within=10.0):
    until = time.monotonic() + within
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, processes))


# ------------------------------------------------------------------ what is done


def test_results_come_in_the_order_of_the_tasks_with_every_event_on_the_way():
    found = []
    ended = pool.run([task(f"t{i}", "double", i) for i in range(5)], workers=2, on_event=found.append)
    assert [one.id for one in ended] == [f"t{i}" for i in range(5)]
    assert [one.value["twice"] for one in ended] == [0, 2, 4, 6, 8]
    assert all(one.status == "done" and one.peak_memory > 2**20 for one in ended)
    assert len({one.value["process"] for one in ended}) == 2  # a worker does several
    mine = [e for e in found if e["job"] == "t3"]
    assert [e["event"] for e in mine if e["event"] != "output"] == [
        "start",
        "begin",
        "progress",
        "note",
        "progress",
        "job_done",
    ]
    assert [e["fraction"] for e in mine if e["event"] == "progress"] == [0.5, 1.0]
    assert [e["message"] for e in mine if e["event"] == "output"] == ["printed 3"]
    assert mine[-1]["outcome"] == ended[3]


def test_a_worker_keeps_its_cache_for_the_next_task_of_its_kind():
    found, _ = run([task("a", "count"), task("b", "count"), task("c", "double", 1), task("d", "count")])
    assert [found[name].value for name in "abd"] == [1, 2, 1]  # one of another kind came between


def test_a_job_in_the_middle_of_a_task_goes_wrong_alone():
    """Its worker goes with it; what was done stays, and the rest of the task goes on in another worker."""
    ways = {
        "hang": "timeout",
        "kill_itself": "crashed",
        "eat": "memory",
        "wrong": "failed",
        "cancelled": "cancelled",
    }
    pieces, last = [], {"hang": {"deadline": 0.2}, "eat": {"memory": 2**28}}
    for name in ways:
        pieces += [Piece(f"{name}: a", "count"), Piece(f"{name}: b", "count")]
        pieces.append(Piece(name, "hang" if name == "cancelled" else name, **last.get(name, {})))
    pieces += [Piece("never", "count"), Piece("z", "count")]
    executor, seen, found = pool.LocalExecutor(grace=0.1), [], {}
    try:
        executor.submit([Task("pool_tasks:several", tuple(pieces))])
        for event in executor.events():
            seen.append((event["event"], event["job"]))
            if seen[-1] == ("begin", "cancelled"):
                executor.cancel(["never", "cancelled", "unknown"])
            if event["event"] == "job_done":
                found[event["job"]] = event["outcome"]
    finally:
        executor.close()
    assert {name: found[name].status for name in ways} == ways
    assert found.pop("never").status == "cancelled"
    counts = [found[one.id].value[1] for one in pieces if one.id in found and one.payload == "count"]
    assert counts == [1, 2, 1, 2, 1, 2, 1, 2, 3, 4, 1]  # a new worker after each but the error
    ends = [name for kind, name in seen if kind == "job_done" and name != "never"]
    assert ends == [one.id for one in pieces if one.id != "never"]
    assert len([kind for kind, _ in seen if kind == "job_done"]) == len(pieces)


def test_a_worker_without_a_task_takes_over_half_of_one():
    pieces = tuple(Piece(f"t{i}", 0.3) for i in range(8))
    found = []
    pool.run([Task("pool_tasks:wait", pieces)], workers=2, on_event=found.append)
    starts = [(e["job"], e["process"]) for e in found if e["event"] == "start"]
    first = starts[0][1]
    mine = [job for job, process in starts if process == first]
    others = [job for job, process in starts if process != first]
    assert others[0] == "t4"  # the later half of the seven that were left
    assert 3 <= len(others) <= 5
    assert mine[:3] == ["t0", "t1", "t2"]


@pytest.mark.parametrize(("device", "left"), [("cpu", 3), ("cuda:0", 1)])
def test_an_error_on_a_gpu_costs_the_worker_too(device, left):
    """A process whose GPU has failed once fails ever after."""
    todo = [task("a", "count"), task("b", "count", "wrong"), task("c", "count")]
    found, _ = run(todo, devices=[device])
    assert (found["b"].status, found["c"].value) == ("failed", left)


def test_several_at_once():
    started = time.monotonic()
    found, events = run([task("a", "wait", 1.5), task("b", "wait", 1.5)], workers=2)
    assert [one.value for one in found.values()] == ["waited", "waited"]
    order = [(e["event"], e["job"]) for e in events if e["event"] in ("begin", "job_done")]
    assert {kind for kind, _ in order[:2]} == {"begin"}, "the second began before the first had ended"
    assert time.monotonic() - started > 1.5


def test_cores_are_shared_and_a_worker_sees_its_own_device(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    both = [task("a", "settings", memory=2**33), task("b", "settings")]
    found, _ = run(both, workers=2)
    each = str(max(1, pool.cores() // 2))
    assert found["a"].value == {
        "device": "cpu",
        "memory": 2**33,
        "OMP_NUM_THREADS": each,
        "CUDA_VISIBLE_DEVICES": "",
    }
    found, _ = run(
        [task("x", "settings", device="cuda:1"), task("y", "settings", device="cuda:0")],
        devices=["cuda:0", "cuda:1"],
        threads=3,
    )
    assert found["x"].value["CUDA_VISIBLE_DEVICES"] == "1"
    assert found["y"].value["CUDA_VISIBLE_DEVICES"] == "0"
    assert found["x"].value["device"] == "cuda:0"  # the only one that it sees
    assert found["x"].value["OMP_NUM_THREADS"] == "3"


def test_what_cannot_be_run_is_refused():
    with pytest.raises(ValueError, match=r"pool.run: expected different ids, got \['a'\] more than once"):
        pool.run([task("a", "double"), task("a", "double")])
    with pytest.raises(ValueError, match=r"expected devices for all tasks, of .'cpu'., got tasks for cuda:0"):
        pool.run([task("a", "double", device="cuda:0")])
    with pytest.raises(ValueError, match=r"pool.run: expected workers"):
        pool.run([task("a", "double")], workers=0)
    assert pool.run([]) == []


# ------------------------------------------------------------------ what fails

FAILURES = {
    "kill_itself": ("crashed", "the process was ended by SIGKILL"),
    "segfault": ("crashed", "the process was ended by SIGSEGV"),
    "leave": ("crashed", "the process ended itself with exit code 3"),
    "leave_politely": ("failed", "SystemExit: 3"),
    "no_memory": ("memory", "MemoryError"),
    "wrong": ("failed", "KeyError: 'what was looked for'"),
    "refuse": ("refused", "ig: expected steps to be at least 1, got 0. Give more."),
    "not_json": ("failed", "TypeError: Object of type object is not JSON serializable"),
    "nowhere": ("failed", "AttributeError: module 'pool_tasks' has no attribute 'nowhere'"),
}


def test_a_task_that_fails_fails_alone_and_says_why():
    tasks = []
    for i, name in enumerate(FAILURES):
        tasks += [task(name), task(f"good {i}", "double", i)]
    found, _ = run(tasks, workers=2)
    for i, (name, (status, error)) in enumerate(FAILURES.items()):
        assert found[name].status == status
        assert found[name].error.startswith(error)
        assert found[f"good {i}"].value["twice"] == 2 * i
    assert "pool_tasks.py" in found["wrong"].trace
    assert "raise KeyError" in found["wrong"].trace
    assert "in segfault" in found["segfault"].trace  # where it was, in a process that has died


@pytest.mark.parametrize(
    "function", ["hang", "hang_inside_c", pytest.param("hang_deaf", marks=pytest.mark.slow)]
)
def test_a_task_that_hangs_is_ended_at_its_deadline(function):
    found, events = run([task("hangs", function, deadline=0.5), task("good", "double", 1)])
    assert found["hangs"].status == "timeout"
    assert found["hangs"].error == "not done after 0.5 s"
    assert 0.5 <= found["hangs"].seconds < 60  # it hangs for ever
    assert found["good"].value["twice"] == 2
    (process,) = {e["process"] for e in events if e["event"] == "start" and e["job"] == "hangs"}
    assert gone(process)
    if function != "hang_deaf":
        assert f"in {function}" in found["hangs"].trace  # where it hangs


@pytest.mark.parametrize("function", ["shout", "shout_on_one_line"])
def test_a_task_that_prints_without_end_is_ended_at_its_deadline(function):
    found = pool.run([task("loud", function, deadline=0.5), task("good", "double", 1)], grace=0.2)
    assert (found[0].status, found[0].error) == ("timeout", "not done after 0.5 s")
    assert found[1].status == "done"


def test_a_task_that_knows_its_deadline_ends_by_itself_and_leaves_its_worker_alive():
    found, events = run([task("a", "stop_in_time", deadline=0.2), task("b", "stop_in_time", deadline=0.2)])
    assert {one.status for one in found.values()} == {"timeout"}
    assert found["a"].error == "DeadlineExceeded: after 3 of 10 steps"
    assert len({e["process"] for e in events if e["event"] == "start"}) == 1


def test_a_result_that_is_there_in_time_may_be_put_away():
    found, _ = run(
        [task("a", "finish", 6.0, deadline=1.0), task("b", "finish", 0.5, deadline=1.0)], workers=2
    )
    assert found["a"].value == "put away"
    assert found["b"].status == "timeout"  # asked for less than it took


@pytest.mark.parametrize("function", ["eat", "eat_in_a_child", "eat_in_a_session"])
def test_a_task_that_eats_memory_is_ended_at_its_limit(function):
    limit = 300 * 2**20
    found, _ = run([task("eats", function, memory=limit), task("good", "double", 1, memory=limit)])
    assert found["eats"].status == "memory"
    assert found["eats"].error.endswith("more than the 300 MiB allowed")
    assert limit < found["eats"].peak_memory < 2 * limit
    assert found["good"].status == "done"
    assert found["good"].peak_memory < limit


def test_verdicts_of_errors_of_torch():
    import torch

    from esegeta.engine import check
    from esegeta.engine.execution import DeadlineExceeded

    assert child.verdict(torch.OutOfMemoryError("CUDA out of memory")) == "memory"
    assert (
        child.verdict(RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 9 bytes")) == "memory"
    )
    for words in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
    ):
        assert child.verdict(RuntimeError(words)) == "memory"
    assert child.verdict(RuntimeError("CUDA error: device-side assert triggered")) == "failed"
    assert child.verdict(DeadlineExceeded("late")) == "timeout"
    assert child.verdict(TimeoutError("of a network")) == "failed"
    assert (
        child.verdict(NotImplementedError(check.problem("lrp", "a plain network", "another", "Change it")))
        == "refused"
    )
    assert child.verdict(check.Refused("no such place")) == "refused"
    assert child.verdict(check.RefusedType("no such type")) == "refused"
    # A foreign library that happens to write in the same shape has failed.
    assert child.verdict(ValueError("conv: expected 3 channels, got 4. Change it.")) == "failed"


# ------------------------------------------------------------------ nothing is left behind


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a subreaper")
def test_what_a_task_has_started_ends_with_its_worker(tmp_path):
    """Also what has a session and an environment of its own, and what has lost its parent."""
    # One that returns, one that is ended, and one whose worker is killed.
    ways = {"a": {"hang": False}, "b": {"hang": True}, "c": {"hang": False, "die": True}}
    payloads = {name: {"file": str(tmp_path / name), **how} for name, how in ways.items()}
    tasks = [
        task(n, "start_a_child", payload, deadline=4 if n == "b" else None) for n, payload in payloads.items()
    ]
    found, _ = run(tasks)
    assert [found[name].status for name in "abc"] == ["done", "timeout", "crashed"]
    for name in "abc":
        started = list(map(int, (tmp_path / name).read_text().split()))
        assert len(started) == 4
        assert gone(*started)


# What is started in the background of a script ignores SIGINT, and so would what it starts.
DRIVER = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from esegeta.run.executors import local as pool
payloads = [{"file": name, "hang": True} for name in sys.argv[1:]]
pool.run([pool.Task.of(p["file"], "pool_tasks:start_a_child", p) for p in payloads], workers=2)
"""


@pytest.mark.parametrize(
    "end",
    [
        "SIGKILL",
        "SIGTERM",
        *(pytest.param(e, marks=pytest.mark.slow) for e in ("SIGKILL to the group", "SIGINT")),
    ],
)
def test_workers_end_when_the_one_who_started_them_does(tmp_path, end):
    files = [tmp_path / "a", tmp_path / "b"]
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *map(str, files)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    until = time.monotonic() + 60
    while not all(f.exists() for f in files):
        assert time.monotonic() < until
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    started = [int(word) for f in files for word in f.read_text().split()]
    assert all(map(alive, started))
    name, _, group = end.partition(" ")
    if group:
        os.killpg(process.pid, signal.Signals[name])
    else:
        process.send_signal(signal.Signals[name])
    process.communicate()
    assert process.returncode != 0
    assert gone(*started)


# ------------------------------------------------------------------ what it costs


def steps_of_a_hand_out(count):
    """The most lines of the pool that one hand-out of tasks executes, of ``count`` tasks."""
    inside, most, now = 0, 0, 0

    def local(frame, event, _):
        nonlocal inside, most, now
        if event == "line":
            now += inside > 0
        elif event == "return" and frame.f_code.co_name == "hand_out":
            inside -= 1
            most = max(most, now)
        return local

    def follow(frame, event, _):
        nonlocal inside, now
        if frame.f_code.co_filename != pool.__file__:
            return None
        if frame.f_code.co_name == "hand_out":
            inside, now = inside + 1, 0
        return local

    before = sys.gettrace()
    sys.settrace(follow)
    try:
        pool.run([task(str(i), "count") for i in range(count)])
    finally:
        sys.settrace(before)
    return most


def test_what_handing_out_a_task_costs_does_not_depend_on_how_many_wait():
    few, many = steps_of_a_hand_out(10), steps_of_a_hand_out(200)
    assert 0 < many <= few


def test_tasks_keep_their_order_among_those_that_a_place_may_do():
    todo = [
        task("a", device="cuda:0"),
        task("b"),
        task("c", device="cpu"),
        task("d"),
        task("e", device="cuda:0"),
    ]
    waiting = pool.Waiting(todo)
    assert [waiting.take({"cpu"}).jobs[0].id for _ in range(3)] == ["b", "c", "d"]
    assert waiting.take({"cpu"}) is None
    assert waiting.take(set()) is None
    assert len(waiting) == 2
    assert [waiting.take({"cpu", "cuda:0"}).jobs[0].id for _ in range(2)] == ["a", "e"]


def test_other_processes_are_looked_for_only_when_there_may_be_new_ones(monkeypatch):
    """To look at every process takes long on a machine with many: a hundredth of the time is spent on it."""
    looks, now, newest = [], [0.0], ["7"]

    def parents():
        looks.append(now[0])
        now[0] += 0.02  # as with some thousand processes
        return {os.getpid(): 1}

    monkeypatch.setattr(processes, "parents", parents)
    monkeypatch.setattr(processes, "_newest", lambda: newest[0])
    members = processes.Members(clock=lambda: now[0])

    def watch(seconds):
        looks.clear()
        for _ in range(10 * seconds):
            assert members.resident({os.getpid()})[os.getpid()] > 2**20
            now[0] += 0.1
        return len(looks)

    assert watch(60) == 1  # nothing was started
    newest[0] = "8"
    assert watch(60) == 1

    def always():
        newest[0] += "1"
        return newest[0]

    monkeypatch.setattr(processes, "_newest", always)
    assert 25 <= watch(60) <= 31  # every two seconds: 100 times what a look takes


def test_memory_is_that_of_the_container(tmp_path):
    assert processes.memory_here() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    job = tmp_path / "batch" / "job 7"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text("4096\n")
    (tmp_path / "memory.max").write_text("8192\n")
    assert processes._allowed("0::/batch/job 7", tmp_path) == [4096, 8192]
    assert processes._allowed("0::/of/the/outer/system", tmp_path) == [8192]
    assert processes._allowed("3:cpu:/batch\n", tmp_path) == []
    old = tmp_path / "memory" / "docker"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("1024")
    assert processes._allowed("4:memory:/docker\n0::/\n", tmp_path) == [1024, 8192]
