"""A whole run: from a configuration to maps, figures, tables and a report."""

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esegeta.engine import check
from esegeta.run.config import loading as configuration
from esegeta.run.config.faults import nearest
from esegeta.run.config.schema import Config
from esegeta.run.executors import local as pool
from esegeta.run.executors.journal import EVENTS, Journal
from esegeta.run.executors.journal import cancel as cancel_in
from esegeta.run.executors.journal import events as journal_events
from esegeta.run.executors.journal import follow as events_of
from esegeta.run.executors.processes import memory_here
from esegeta.run.executors.protocol import Executor, Outcome, Piece, Task
from esegeta.run.executors.status import Status
from esegeta.run.executors.stopping import Terminated, terminable
from esegeta.run.jobs import dispatch, kinds, outputs
from esegeta.run.jobs import plan as jobs
from esegeta.run.jobs.kinds import Job, Record
from esegeta.run.log import Event, Log, display, sentences

ALL_DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130
# The rest of the memory is for this process and the system.
_MEMORY_SHARE = 0.9
# Much of what an interpreter with torch occupies is shared with the others: below this the sum says little.
_LEAST_MEMORY = 2**30


@dataclass(frozen=True)
class Planned:
    """A job and what is known of it before it runs, from one image of each shape.

    done: whether it need not be done again; shape: of the prepared image; evaluations: how many gradients or
    values of the score it takes, None where only running it tells; needs: which of them; seconds: what these would
    take one after another, each as long as the one that was tried; memory: in bytes, what its tensors will occupy at
    their peak, from a run without values, or where that cannot be, what one evaluation occupied; disk: in bytes, what
    it will write at most, with the copy of the image at its first job; problem: why it would be refused.
    """

    job: Job
    done: bool
    evaluations: int | None = None
    needs: str = ""
    shape: tuple[int, ...] | None = None
    memory: int | None = None
    seconds: float | None = None
    disk: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Summary:
    """What came of a run. records: one for each job, in the order of the configuration; repeated: how many jobs
    were done in this call; exit_code: 0 if all that were asked for are done, 1 if not or only in part, 130 if it was
    interrupted by Ctrl-C, 143 by SIGTERM.
    """

    folder: Path
    records: list[Record]
    repeated: int = 0
    exit_code: int = ALL_DONE
    report: Path | None = None
    plan: list[Planned] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Return how many jobs ended in which way."""
        return dict(Counter(record["status"] for record in self.records))

    @property
    def paths(self) -> list[Path]:
        """The maps."""
        return [self.folder / record["map"] for record in self.records if record.get("map")]


@dataclass(frozen=True)
class _Asked:
    """What a run was asked for: the jobs of the configuration, those of them to do, and whether to keep results."""

    config: Config
    folder: Path
    planned: Sequence[Job]
    chosen: Sequence[Job]
    resume: bool


def run(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    resume: bool = True,
    dry: bool = False,
    only: Sequence[str] | None = None,
    threads: int | None = None,
    progress: bool | Callable[[Event], None] | None = None,
    trust: Iterable[str] = (),
) -> Summary:
    """Do what a configuration says: every image, target and method is a job in a worker process.

    A job that fails fails alone, and the summary says why. What is finished stays: the same call, or one with a
    changed configuration, does only what is not done yet, and tries again what has failed.

    Args:
        config: a configuration, or its file.
        resume: False does everything again.
        dry: look only: the plan with shapes, evaluations and memory, and nothing is written.
        only: ids of jobs, or of methods, to do; others are left as they are.
        threads: of each worker, instead of ``run.threads``; without both the workers share the cores. Sums are
            rounded in another order with another number of threads: the same number gives the same bytes.
        progress: False shows nothing, True prints lines, a function gets every event; None shows bars on a
            terminal and prints lines elsewhere.
        trust: which code may run besides that in the folder of the configuration, as for ``config.load``.

    Returns:
        The summary.
    """
    if isinstance(config, Config):
        config = configuration.trusting(config, trust)
    else:
        config = configuration.load(config, trust=trust)
    folder = Path(config.run.output).absolute()
    planned = jobs.plan(config)
    asked = _Asked(config, folder, planned, _chosen(planned, only), resume)
    if dry:
        return Summary(folder, [], plan=examined(asked))
    _writable(folder)
    with terminable(), _alone(folder) as lock:
        outputs.sweep(folder)
        jobs.forget_drawings(planned, folder)
        return _run(asked, lock, threads=threads, progress=progress)


def draw(folder: str | Path, *, trust: Iterable[str] = (), **how: Any) -> Summary:
    """Draw the figures that a run has left out, of the maps in its folder, and write its report.

    Args:
        folder: of a run, with its ``config.json``.
        trust: which code the configuration may name, as for ``run``.
        **how: ``threads`` and ``progress``, as for ``run``.

    Returns:
        The summary.
    """
    folder = Path(folder)
    whole, _ = configuration.read(folder / "config.json")
    whole = {**whole, "output": {**whole.get("output", {}), "figures": True, "report": True}}
    whole["figures"] = {**whole.get("figures", {}), "maps": "all"}
    whole["run"] = {**whole.get("run", {}), "output": str(folder.absolute())}
    config = configuration.load(whole, trust=trust)
    drawing = [job.id for job in jobs.plan(config) if kinds.find(job.kind).draws]
    return run(config, only=drawing, **how)


def _chosen(planned: Sequence[Job], only: Sequence[str] | None) -> list[Job]:
    if only is None:
        return list(planned)
    known = {name for job in planned for name in (job.id, job.method)}
    for name in only:
        if name not in known:
            advice = nearest(name, known)
            raise check.refused("run", "the id of a job or of a method", repr(name), advice)
    chosen = {job.id for job in planned if {job.id, job.method} & set(only)}
    for job in planned:  # each after those that it reads
        if kinds.find(job.kind).draws and chosen & {one.id for one in job.after}:
            chosen.add(job.id)
    return [job for job in planned if job.id in chosen]


def _writable(folder: Path) -> None:
    """Make the folder of the run, and be sure that files can be written there before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        outputs.write_text(folder / ".jobs" / "writable", "")
        (folder / ".jobs" / "writable").unlink()
    except OSError as error:
        got = f"{folder}: {(error.strerror or str(error)).lower()}"
        advice = "Choose another folder, or free it"
        raise check.refused("run.output", "a folder to write to", got, advice) from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Keep a second run out of a folder while this one works in it, and give the open file that is the lock.

    The system lets go of it at our end.
    """
    import fcntl

    (folder / ".jobs").mkdir(exist_ok=True)
    lock = os.open(folder / ".jobs" / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for again in (True, True, True, False):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if again:  # who only looks whether a run goes on holds it for a moment
                    time.sleep(0.05)
                    continue
                advice = "Wait for it, or give run.output another folder"
                raise check.refused(
                    "run", f"{folder} for itself", "another run that works there", advice
                ) from None
        yield lock
    finally:
        os.close(lock)


def going_on(folder: str | Path) -> bool:
    """Check whether a run works in a folder just now."""
    import fcntl

    try:
        lock = os.open(Path(folder) / ".jobs" / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def journal_of(folder: str | Path) -> Path:
    """Return where the events of the run in a folder are."""
    found = Path(folder) / ".jobs"
    if not (found / EVENTS).is_file():
        got = "none" if not Path(folder).is_dir() else "one without events of a run"
        raise check.refused("follow", f"{folder} to be the folder of a run", got, "Name run.output")
    return found


def follow(folder: str | Path) -> Iterator[Event]:
    """Give the events of the run that works in a folder, from its beginning until it ends.

    The same as ``run(progress=...)`` is told, in another process. If a run ends without saying so, the events end.
    """
    return events_of(journal_of(folder), going_on=lambda: going_on(folder))


def cancel(folder: str | Path, ids: Iterable[str]) -> list[str]:
    """Ask the run that works in a folder to give jobs up, those that wait and those that run.

    Args:
        folder: of the run.
        ids: of jobs, or "all".

    Returns:
        What was asked.
    """
    place, asked = journal_of(folder), list(ids)
    if not going_on(folder):
        raise check.refused("cancel", f"a run that works in {folder}", "none", "It has ended")
    planned = (event["jobs"] for event in journal_events(place) if event["event"] == "planned")
    known: list[str] = next(planned, [])
    for name in asked:
        if name != "all" and name not in known:
            advice = nearest(name, [*known, "all"])
            raise check.refused("cancel", 'the id of a job of the run, or "all"', repr(name), advice)
    cancel_in(place, asked)
    return asked


def _check_that_it_stays(folder: Path, lock: int) -> None:
    """Notice that the folder was deleted or moved: another one of its name would hold half a run."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(folder / ".jobs" / "lock"), os.fstat(lock)):
            return
    expected = f"the folder {folder} to stay while the run writes into it"
    advice = "What was finished there is not there any more: start the run again"
    raise OSError(check.problem("run", expected, "it deleted or moved", advice))


def _limited(jobs: Iterable[Piece], share: int) -> tuple[Piece, ...]:
    """Give jobs that have no limit of memory their share of what there is."""
    return tuple(job if job.memory is not None else dataclasses.replace(job, memory=share) for job in jobs)


def _share(config: Config) -> int:
    """The memory that a job without a limit may occupy."""
    places = len(pool.slots(config.run.devices, config.run.workers, config.run.per_device))
    whole = int(_MEMORY_SHARE * memory_here())
    return min(whole, max(whole // max(1, places), _LEAST_MEMORY))


def _run(
    asked: _Asked, lock: int, *, threads: int | None, progress: bool | Callable[[Event], None] | None
) -> Summary:
    config, folder = asked.config, asked.folder
    outputs.keep_text(folder / "config.json", outputs.json_text(configuration.dump(config)))
    outputs.dataset(folder, title="Attributions", version=jobs.releases()["esegeta"])
    log = Log(folder / "log.txt")
    log.write(f"esegeta {jobs.releases()['esegeta']}: {len(asked.chosen)} jobs of {len(asked.planned)}")
    if any(job.memory is None for job in asked.chosen):
        share = pool.size(_share(config))
        log.write(f"a job without a limit of memory may occupy {share}, its share of this machine")
    work = _Work(asked)
    shown = display(progress)
    interrupted: int | None = None
    try:
        with shown, Journal(folder / ".jobs") as journal, contextlib.closing(work):
            executor = pool.LocalExecutor(
                workers=config.run.workers,
                devices=config.run.devices,
                per_device=config.run.per_device,
                threads=config.run.threads if threads is None else threads,
            )
            try:
                for event in work.events(executor):
                    _check_that_it_stays(folder, lock)
                    executor.cancel(work.known(journal.to_cancel()))
                    if event["event"] == "idle":
                        continue
                    work.note(event)
                    journal.write(event)
                    for line in sentences(event):
                        log.write(line)
                    shown.show(event)
            finally:
                executor.close()
    except KeyboardInterrupt as error:
        interrupted = error.exit_code if isinstance(error, Terminated) else INTERRUPTED
        log.write("interrupted: what is finished is kept")
    finally:
        with contextlib.closing(log):
            _check_that_it_stays(folder, lock)
            for job in work.begun.values():
                if jobs.record_of(folder, job.id) is None:
                    jobs.discard(job, folder)
            summary = _summed_up(asked, work.repeated, log)
    return summary if interrupted is None else dataclasses.replace(summary, exit_code=interrupted)


Survey = list[tuple[Job, jobs.State]]


class _Work:
    """The jobs of a run. What has to be done is found out beside, so that the first job does not wait for the last
    image to be read; a job is submitted when those that it reads have ended; its files are kept in order.
    """

    def __init__(self, asked: _Asked) -> None:
        self.config = asked.config
        self.folder = asked.folder
        self.share = _share(asked.config)
        self.asked = {job.id for job in asked.chosen}
        self.jobs: dict[str, Job] = {}  # that have to be done
        self.open: dict[str, set[str]] = {}  # not submitted: the jobs that each waits for
        self.redrawn: set[str] = set()
        self.begun: dict[str, Job] = {}
        self.ended: set[str] = set()
        self.cancelled: set[str] = set()
        self.repeated = 0
        self.kept = 0  # that need not be done, and were not told yet
        self.found: queue.SimpleQueue[Survey | BaseException | None] = queue.SimpleQueue()
        self.found_all = False
        self.stopped = threading.Event()
        self.surveyor = threading.Thread(target=self._survey, args=(asked.planned, asked.resume), daemon=True)

    def _survey(self, planned: Sequence[Job], resume: bool) -> None:
        """Find out in a thread what has to be done: all that share something at once, so that they stay together."""
        states = jobs.survey(planned, self.folder, resume=resume)
        try:
            for _, together in itertools.groupby(planned, lambda job: (job.kind, _group(job))):
                found = [next(states) for _ in together]
                asked = [(job, state) for job, state in found if job.id in self.asked]
                for job, state in asked:
                    if state != "kept":
                        _ = job.payload  # its image is read here and not where others wait
                self.found.put(asked)
                if self.stopped.is_set():
                    return
            self.found.put(None)
        except BaseException as error:  # raised where it is heard
            self.found.put(error)

    def close(self) -> None:
        """Look for no more."""
        self.stopped.set()

    def known(self, ids: Sequence[str]) -> set[str]:
        """Return the jobs of some names, "all" being that of all; those that were not submitted yet will not be."""
        self.cancelled |= self.asked if "all" in ids else set(ids)
        return self.cancelled if ids else set()

    def events(self, executor: Executor) -> Iterator[Event]:
        """Give the events of all jobs, those that need not be submitted among them."""
        yield {"event": "planned", "job": None, "total": len(self.asked), "jobs": sorted(self.asked)}
        self.surveyor.start()
        while True:
            yield from self._submit(executor)
            for event in executor.events():
                yield event
                if event["event"] == "job_done":
                    self._end(event["job"])
                yield from self._submit(executor)
            if self.found_all and not self.open:
                return
            if self.found_all:  # cannot be, but would hang
                raise RuntimeError(f"jobs wait for one another: {', '.join(self.open)}")
            if not self._hear(wait=0.1):
                yield {"event": "idle", "job": None}

    def _hear(self, wait: float | None = None) -> int:
        """Take what was found out: how many of the jobs need not be done."""
        heard = 0
        with contextlib.suppress(queue.Empty):
            while True:
                found = self.found.get(timeout=wait) if wait and not heard else self.found.get_nowait()
                heard += 1
                if found is None:
                    self.found_all = True
                elif isinstance(found, BaseException):
                    raise found
                for job, state in found or ():
                    if state == "kept":
                        self.kept += 1
                        continue
                    if state == "shown otherwise":
                        self.redrawn.add(job.id)
                    self.repeated += 1
                    self.jobs[job.id] = job
                    self.open[job.id] = {one.id for one in job.after} & self.jobs.keys() - self.ended
        return heard

    def _submit(self, executor: Executor) -> Iterator[Event]:
        """Hand out the jobs for which nothing is to be waited for any more; those that lack an input are skipped."""
        self._hear()
        if self.kept:
            yield {"event": "kept", "job": None, "count": self.kept}
            self.kept = 0
        while ready := self._ready():
            pieces: dict[Any, list[Piece]] = {}
            over = []
            for name in ready:
                del self.open[name]
                job = self.jobs[name]
                lacking = self._lacking(job)
                if name in self.cancelled:
                    over.append(Outcome(name, Status.CANCELLED, error="it was cancelled"))
                elif lacking is not None:
                    over.append(Outcome(name, Status.SKIPPED, error=lacking))
                else:
                    payload = dispatch.payload_of(job, self.config, redraw=name in self.redrawn)
                    group = _group(job)
                    shared = pieces.setdefault(name if group is None else (job.kind, group), [])
                    shared.append(Piece(name, payload, job.deadline, job.memory))
            executor.submit(Task(dispatch.MAIN, _limited(group, self.share)) for group in pieces.values())
            for outcome in over:
                yield {"event": "job_done", "job": outcome.id, "outcome": outcome}
                self._end(outcome.id)

    def _end(self, name: str) -> None:
        """Let nothing wait for a job any more."""
        self.ended.add(name)
        for waits in self.open.values():
            waits.discard(name)

    def _ready(self) -> list[str]:
        """Return the jobs that wait for nothing; those that draw wait until all others are handed out."""
        ready = [name for name, waits in self.open.items() if not waits or name in self.cancelled]
        if not ready:
            return ready
        draws = {name for name in self.open if kinds.find(self.jobs[name].kind).draws}
        if self.found_all and draws >= self.open.keys():
            return ready
        return [name for name in ready if name not in draws or name in self.cancelled]

    def _lacking(self, job: Job) -> str | None:
        """Say which input keeps a job from being done, None if nothing does."""
        if not job.after:
            return None
        made = jobs.inputs_of(self.folder, [one.id for one in job.after])
        lost = [one.id for one in job.after if one.id not in made]
        if not lost or job.need == "none" or (job.need == "any" and made):
            return None
        rest = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        return f"there is no result of {lost[0]}{rest}"

    def note(self, event: Event) -> None:
        """Keep the files of a job in order: clear away what came to no end."""
        job = self.jobs.get(event["job"] or "")
        if job is not None and event["event"] == "start":
            self.begun[job.id] = job
        if job is not None and event["event"] == "job_done":
            if event["outcome"].status != Status.DONE:
                jobs.discard(job, self.folder)  # a worker may have ended between two of its files
                outputs.write_json(
                    jobs.record_path(self.folder, job.id), without_result(job, event["outcome"])
                )
            self.begun.pop(job.id, None)


def _group(job: Job) -> str | None:
    """The name of what a job shares with others."""
    return kinds.find(job.kind).group(job)


def without_result(job: Job, outcome: Outcome) -> Record:
    """Return the record of a job without a result."""
    kind = kinds.find(job.kind)
    reason = None if outcome.error is None else outcome.error.removeprefix(f"{job.id}: ")
    return {
        **kind.blank,
        **kind.header(job.payload),
        "status": outcome.status,
        "error": outcome.error,
        **({"reason": reason} if "reason" in kind.blank else {}),
        "share_done": 0.0,
        "seconds": outcome.seconds,
        "peak_memory": outcome.peak_memory,
        "device": outcome.device,
        "deadline": job.deadline,
        "memory": job.memory,
        "events": [],
        "versions": jobs.releases(),
    }


def _summed_up(asked: _Asked, repeated: int, log: Log) -> Summary:
    """Write the tables and the report of what there is, unless they are there."""
    config, folder, planned = asked.config, asked.folder, asked.planned
    found = [(job, jobs.record_of(folder, job.id)) for job in planned]
    records = [record for _, record in found if record is not None]
    counts = dict(Counter(record["status"] for record in records))
    if config.output.tables:
        _write_tables(folder, records, counts, len(planned) - len(records))
    report = None
    if config.output.report and records:
        report = _report(folder, [job.id for job in planned], log)
    log.write(f"ended: {', '.join(f'{n} {status}' for status, n in sorted(counts.items())) or 'nothing'}")
    chosen = {job.id for job in asked.chosen}
    well = all(
        record is not None and record["status"] == Status.DONE for job, record in found if job.id in chosen
    )
    code = ALL_DONE if well else SOME_FAILED
    return Summary(folder, records, repeated, code, report)


def _write_tables(folder: Path, records: Sequence[Record], counts: Mapping[str, int], missing: int) -> None:
    """Write a table for each kind that has records, and all of them in one file."""
    whole: dict[str, Any] = {"counts": counts, "missing": missing, "jobs": []}
    more = jobs.joined(records)
    for kind in kinds.known():
        if not kind.file:
            continue
        own = [record for record in records if record.get("kind", "methods") == kind.name]
        if not own and kind.file != "summary":
            continue
        names = (name for record in own for name in (*more.get(record["id"], {}), *kind.further(record)))
        added = dict.fromkeys(names)
        columns = [*kind.columns, *(name for name in added if name not in kind.columns)]
        rows = [{**more.get(record["id"], {}), **row} for record in own for row in kind.rows(record)]
        outputs.keep_text(folder / f"{kind.file}.csv", outputs.table_text(rows, columns))
        for name, inside in kind.inner.items():
            inner = [{**record, **row} for record in own for row in record.get(name) or ()]
            if inner:
                outputs.keep_text(folder / f"{name}.csv", outputs.table_text(inner, inside))
        whole["jobs" if kind.file == "summary" else kind.file] = [
            {name: row.get(name) for name in columns} for row in rows
        ]
    outputs.keep_text(folder / "summary.json", outputs.json_text(whole))


def _report(folder: Path, ids: list[str], log: Log) -> Path | None:
    """Write the report, unless the one that is there is of the same records, settings and program."""
    path, mark = folder / "report.html", folder / ".jobs" / "report.mark"
    now = _what_is_reported(folder, ids)
    with contextlib.suppress(OSError):
        if mark.read_text() == f"{now} {path.stat().st_size} {path.stat().st_mtime_ns}":
            return path
    try:
        from esegeta.run.report import page as report

        path = report.write(folder, only=ids)
    except ImportError as error:
        log.write(f'no report: {error.name} is missing, pip install "esegeta[viz]"')
        return None
    outputs.write_text(mark, f"{now} {path.stat().st_size} {path.stat().st_mtime_ns}")
    return path


def _what_is_reported(folder: Path, ids: Sequence[str]) -> str:
    """The name of all that a report is made of."""
    files = [jobs.record_path(folder, name) for name in ids]
    here = [Path(kinds.__file__).parents[1] / "report", Path(kinds.__file__).parents[2] / "plot"]
    program = [file for place in here for file in sorted(place.rglob("*")) if file.suffix != ".pyc"]
    about = [
        [str(file.name), stat.st_size, stat.st_mtime_ns]
        for file in [*files, folder / "config.json", *program]
        if file.is_file() and (stat := file.stat())
    ]
    return kinds.digest([about, jobs.releases()])


# ------------------------------------------------------------------ clearing up


def leftovers(folder: str | Path, configs: Sequence[Config]) -> list[Path]:
    """Return the files that runs have written into a folder and that no configuration knows any more.

    What a run has written is what its records and tables name; everything else in the folder is somebody else's.

    Args:
        folder: of the runs.
        configs: what shall stay: what the jobs of any of these have written or will write.
    """
    folder = Path(folder).absolute()
    planned = [job for config in configs for job in jobs.plan(config)]
    known, asked = {job.id for job in planned}, {kinds.find(job.kind).file for job in planned}
    kept: set[str] = set()
    gone: list[str] = []
    for path in sorted((folder / ".jobs").glob("*.json")):
        record = jobs.record_of(folder, path.stem)
        if record is None or "status" not in record or record.get("id") != path.stem:
            continue
        if path.stem in known:
            kept.update(jobs.named_by(record))
        elif record.get("kind", "methods") in {kind.name for kind in kinds.known()}:
            gone += [*jobs.named_by(record), path.relative_to(folder).as_posix()]
    for path in sorted((folder / ".jobs" / "raw").glob("*.npy")):
        if path.stem not in known:
            gone.append(path.relative_to(folder).as_posix())
    with contextlib.suppress(OSError, ValueError):
        tables = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        written = {kind.file for kind in kinds.known()} & set(tables)
        gone += [f"{name}.csv" for name in sorted(written - asked)]
    paths = [folder / name for name in dict.fromkeys(gone) if name not in kept]
    inside = [path for path in paths if path.is_file() and folder.resolve() in path.resolve().parents]
    return [*inside, *sorted(folder.rglob(f"{outputs.PART}*"))]


def clean(
    folder: str | Path,
    configs: Sequence[Config],
    agreed: Callable[[list[Path]], bool] = lambda files: True,  # noqa: ARG005
) -> list[Path]:
    """Remove ``leftovers``, and folders that are empty then; no run may work there meanwhile.

    Args:
        folder: of the runs.
        configs: what shall stay.
        agreed: asked with the files before they are removed.

    Returns:
        The files that were removed.
    """
    folder = Path(folder).absolute()
    if not (folder / ".jobs").is_dir():
        got = "none" if not folder.is_dir() else "one without records"
        raise check.refused("clean", f"{folder} to be the folder of a run", got, "Name run.output")
    with _alone(folder):
        files = leftovers(folder, configs)
        if not files or not agreed(files):
            return []
        # Records last: should this be interrupted, they still say what there is.
        for path in sorted(files, key=lambda path: path.parent == folder / ".jobs"):
            path.unlink(missing_ok=True)
        for place in sorted({path.parent for path in files}, reverse=True):
            while place != folder and place != folder / ".jobs":
                try:
                    place.rmdir()
                except OSError:  # it is not empty
                    break
                place = place.parent
    return files


# ------------------------------------------------------------------ looking only


def _allowed(together: Sequence[Job]) -> float | None:
    """The time that jobs may take one after another, None if one of them may take any."""
    deadlines = [job.deadline for job in together]
    return None if None in deadlines else float(sum(d for d in deadlines if d is not None))


def examined(asked: _Asked) -> list[Planned]:
    """Return what can be said of jobs before they run. The network is loaded in worker processes, and one image of
    each shape; of jobs that differ in their images alone one is looked at.
    """
    chosen, states = asked.chosen, jobs.survey(asked.planned, asked.folder, resume=asked.resume)
    kept = {job.id for job, state in states if state == "kept"}
    like: dict[str, str] = {}  # each image -> what it looks like
    first: dict[tuple[str, ...], Job] = {}
    same: dict[str, tuple[str, ...]] = {}
    for job in chosen:
        if kinds.find(job.kind).examine is not None:
            files = job.given.get("files", [])
            look = like.setdefault(str(files), jobs.looks_like(files))
            without = {name: value for name, value in job.keys.items() if name != "subject"}
            same[job.id] = (look, job.kind, *without.values())
            first.setdefault(same[job.id], job)
    found = _examined(asked.config, list(first.values()))
    plan, copied = [], set()
    for job in chosen:
        said = found.get(first[same[job.id]].id, {}) if job.id in same else {}
        count, needs = kinds.find(job.kind).cost(job.payload)
        disk = said.get("disk")
        if disk is not None and job.subject not in copied:
            copied.add(job.subject)
            disk += said.get("shared_disk", 0)
        plan.append(
            Planned(
                job,
                job.id in kept,
                count,
                needs,
                tuple(said["shape"]) if said.get("shape") else None,
                said.get("memory"),
                said.get("seconds"),
                disk,
                said.get("problem"),
            )
        )
    return plan


def _examined(config: Config, some: Sequence[Job]) -> dict[str, Record]:
    """What a worker says of jobs; those of an image are looked at one after another."""
    share, tasks = _share(config), []
    groups: dict[str, list[Job]] = {}
    for job in some:
        groups.setdefault(job.subject, []).append(job)
    for subject, together in groups.items():
        payloads = [dispatch.payload_of(job, config) for job in together]
        tasks.append(Task(dispatch.EXAMINE, _limited([Piece(subject, payloads, _allowed(together))], share)))
    found: dict[str, Record] = {}
    for outcome in pool.run(tasks, workers=config.run.workers):
        for job in groups[outcome.id]:
            found[job.id] = (outcome.value or {}).get(job.id) or {"problem": outcome.error}
    return found


@dataclass(frozen=True)
class Forecast:
    """What a run will take, of the jobs that are to do. unknown: of how many jobs only running them tells the time.

    seconds: of all workers together; memory: the most that one job takes; free: what is left on the disk, in bytes.
    """

    jobs: int
    seconds: float
    unknown: int
    memory: int | None
    disk: int
    free: int


def forecast(summary: Summary, workers: int) -> Forecast:
    """Return what a dry run says of time, memory and disk."""
    todo = [planned for planned in summary.plan if not planned.done and planned.problem is None]
    place = next(path for path in [summary.folder, *summary.folder.parents] if path.exists())
    return Forecast(
        len(todo),
        sum(planned.seconds or 0.0 for planned in todo) / max(1, workers),
        sum(planned.seconds is None for planned in todo if planned.shape is not None),
        max((planned.memory for planned in todo if planned.memory is not None), default=None),
        sum(planned.disk or 0 for planned in todo),
        shutil.disk_usage(place).free,
    )
