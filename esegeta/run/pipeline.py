"""A whole run: from a configuration to maps, figures, tables and a report."""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esegeta.engine import check
from esegeta.run.config import catalogue
from esegeta.run.config import loading as configuration
from esegeta.run.config.schema import Config
from esegeta.run.executors import local as pool
from esegeta.run.executors.journal import Journal
from esegeta.run.executors.processes import memory_here
from esegeta.run.executors.protocol import Executor, Outcome, Task
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
    """A job and what is known of it before it runs.

    done: whether it need not be done again; shape: of the prepared image; evaluations: how many gradients or
    values of the score it takes, None where only running it tells; needs: which of them; memory: in bytes, what
    its tensors will occupy at their peak, from a run without values; problem: why it would be refused.
    """

    job: Job
    done: bool
    evaluations: int | None = None
    needs: str = ""
    shape: tuple[int, ...] | None = None
    memory: int | None = None
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
        """How many jobs ended in which way."""
        return dict(Counter(record["status"] for record in self.records))

    @property
    def paths(self) -> list[Path]:
        """The maps."""
        return [self.folder / record["map"] for record in self.records if record.get("map")]


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
    chosen = _chosen(planned, only)
    finished = jobs.all_finished(planned, folder) if resume else dict.fromkeys(job.id for job in planned)
    redrawn = {job.id for job in chosen if resume and not finished[job.id] and jobs.to_redraw(job, folder)}
    if dry:
        return Summary(folder, [], plan=examined(config, chosen, finished))
    _writable(folder)
    with terminable(), _alone(folder) as lock:
        outputs.sweep(folder)
        jobs.forget_drawings(planned, folder)
        return _run(config, folder, lock, planned, chosen, finished, redrawn, threads, progress)


def _chosen(planned: Sequence[Job], only: Sequence[str] | None) -> list[Job]:
    if only is None:
        return list(planned)
    known = {name for job in planned for name in (job.id, job.method)}
    for name in only:
        if name not in known:
            advice = catalogue.nearest(name, known)
            raise ValueError(check.problem("run", "the id of a job or of a method", repr(name), advice))
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
        raise ValueError(check.problem("run.output", "a folder to write to", got, advice)) from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Keep a second run out of a folder while this one works in it, and give the open file that is the lock.

    The system lets go of it at our end.
    """
    import fcntl

    (folder / ".jobs").mkdir(exist_ok=True)
    lock = os.open(folder / ".jobs" / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            advice = "Wait for it, or give run.output another folder"
            raise ValueError(
                check.problem("run", f"{folder} for itself", "another run that works there", advice)
            ) from None
        yield lock
    finally:
        os.close(lock)


def _check_that_it_stays(folder: Path, lock: int) -> None:
    """Notice that the folder was deleted or moved: another one of its name would hold half a run."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(folder / ".jobs" / "lock"), os.fstat(lock)):
            return
    expected = f"the folder {folder} to stay while the run writes into it"
    advice = "What was finished there is not there any more: start the run again"
    raise OSError(check.problem("run", expected, "it deleted or moved", advice))


def _limited(tasks: Sequence[Task], config: Config) -> tuple[list[Task], int]:
    """Give tasks that have no limit of memory their share of what there is, which is returned as well."""
    places = len(pool.slots(config.run.devices, config.run.workers, config.run.per_device))
    whole = int(_MEMORY_SHARE * memory_here())
    share = min(whole, max(whole // max(1, places), _LEAST_MEMORY))
    limited = [t if t.memory is not None else dataclasses.replace(t, memory=share) for t in tasks]
    return limited, share


def _run(
    config: Config,
    folder: Path,
    lock: int,
    planned: Sequence[Job],
    chosen: Sequence[Job],
    finished: Mapping[str, Record | None],
    redrawn: Collection[str],
    threads: int | None,
    progress: bool | Callable[[Event], None] | None,
) -> Summary:
    outputs.write_json(folder / "config.json", configuration.dump(config))
    outputs.dataset(folder, title="Attributions", version=jobs.releases()["esegeta"])
    todo = [job for job in chosen if finished[job.id] is None]
    log = Log(folder / "log.txt")
    log.write(f"esegeta {jobs.releases()['esegeta']}: {len(todo)} of {len(planned)} jobs to do")
    _, share = _limited([], config)
    if any(job.memory is None for job in todo):
        log.write(f"a job without a limit of memory may occupy {pool.size(share)}, its share of this machine")
    work = _Work(config, folder, todo, redrawn)
    shown = display(len(todo), len(chosen) - len(todo), progress)
    interrupted: int | None = None
    try:
        with shown, Journal(folder / ".jobs") as journal:
            executor = pool.LocalExecutor(
                workers=config.run.workers,
                devices=config.run.devices,
                per_device=config.run.per_device,
                threads=config.run.threads if threads is None else threads,
            )
            try:
                for event in work.events(executor):
                    _check_that_it_stays(folder, lock)
                    executor.cancel(journal.to_cancel())
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
            summary = _summed_up(config, folder, planned, chosen, len(todo), log)
    return summary if interrupted is None else dataclasses.replace(summary, exit_code=interrupted)


class _Work:
    """The jobs of a run: each is submitted when those that it reads have ended, and its files are kept in order."""

    def __init__(self, config: Config, folder: Path, todo: Sequence[Job], redrawn: Collection[str]) -> None:
        self.config = config
        self.folder = folder
        self.jobs = {job.id: job for job in todo}
        self.redrawn = redrawn
        self.begun: dict[str, Job] = {}
        self.open = {job.id: {one.id for one in job.after} & self.jobs.keys() for job in todo}

    def events(self, executor: Executor) -> Iterator[Event]:
        """Give the events of all jobs, those that need not be submitted among them."""
        yield from self._submit(executor)
        for event in executor.events():
            yield event
            if event["event"] == "end":
                for waits in self.open.values():
                    waits.discard(event["task"])
                yield from self._submit(executor)

    def _submit(self, executor: Executor) -> Iterator[Event]:
        """Hand out the jobs for which nothing is to be waited for any more; those that lack an input are skipped."""
        while ready := self._ready():
            tasks, skipped = [], []
            for name in ready:
                del self.open[name]
                job = self.jobs[name]
                lacking = self._lacking(job)
                if lacking is None:
                    payload = {**job.payload, "redraw": name in self.redrawn}
                    tasks.append(Task(name, dispatch.MAIN, payload, job.deadline, job.memory))
                else:
                    skipped.append(Outcome(name, Status.SKIPPED, error=lacking))
            executor.submit(_limited(tasks, self.config)[0])
            for outcome in skipped:
                yield {"event": "end", "task": outcome.id, "outcome": outcome}
                for waits in self.open.values():
                    waits.discard(outcome.id)

    def _ready(self) -> list[str]:
        """Return the jobs that wait for nothing; those that draw wait until all others are handed out."""
        ready = [name for name, waits in self.open.items() if not waits]
        draws = {name for name in self.open if kinds.find(self.jobs[name].kind).draws}
        return ready if draws >= self.open.keys() else [name for name in ready if name not in draws]

    def _lacking(self, job: Job) -> str | None:
        """Say which input keeps a job from being done, None if nothing does."""
        made = jobs.inputs_of(self.folder, [one.id for one in job.after])
        lost = [one.id for one in job.after if one.id not in made]
        if not lost or (job.need == "any" and made):
            return None
        rest = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        return f"there is no result of {lost[0]}{rest}"

    def note(self, event: Event) -> None:
        """Keep the files of a job in order: clear away what was before, and what came to no end."""
        job = self.jobs.get(event["task"] or "")
        if job is not None and event["event"] == "start":
            if job.id not in self.redrawn:
                jobs.clear(job, self.folder)
            self.begun[job.id] = job
        if job is not None and event["event"] == "end":
            if event["outcome"].status != Status.DONE:
                jobs.discard(job, self.folder)  # a worker may have ended between two of its files
                outputs.write_json(
                    jobs.record_path(self.folder, job.id), without_result(job, event["outcome"])
                )
            self.begun.pop(job.id, None)


def without_result(job: Job, outcome: Outcome) -> Record:
    """Return the record of a job without a result."""
    kind = kinds.find(job.kind)
    return {
        **kind.blank,
        **kind.header(job.payload),
        "status": outcome.status,
        "error": outcome.error,
        "share_done": 0.0,
        "seconds": outcome.seconds,
        "peak_memory": outcome.peak_memory,
        "device": outcome.device,
        "deadline": job.deadline,
        "memory": job.memory,
        "events": [],
        "versions": jobs.releases(),
    }


def _summed_up(
    config: Config, folder: Path, planned: Sequence[Job], chosen: Sequence[Job], repeated: int, log: Log
) -> Summary:
    """Write the tables and the report of what there is."""
    found = [(job, jobs.record_of(folder, job.id)) for job in planned]
    records = [record for _, record in found if record is not None]
    counts = dict(Counter(record["status"] for record in records))
    missing = len(planned) - len(records)
    if config.output.tables:
        _write_tables(folder, records, counts, missing)
    report = None
    if config.output.report and records:
        report = _report(folder, [job.id for job in planned], log)
    log.write(f"ended: {', '.join(f'{n} {status}' for status, n in sorted(counts.items())) or 'nothing'}")
    asked = {job.id for job in chosen}
    well = all(
        record is not None and record["status"] == Status.DONE for job, record in found if job.id in asked
    )
    code = ALL_DONE if well else SOME_FAILED
    return Summary(folder, records, repeated, code, report)


def _write_tables(folder: Path, records: Sequence[Record], counts: Mapping[str, int], missing: int) -> None:
    """Write a table for each kind that has records, and all of them in one file."""
    whole: dict[str, Any] = {"counts": counts, "missing": missing, "jobs": []}
    for kind in kinds.known():
        if not kind.file:
            continue
        own = [record for record in records if record.get("kind", "methods") == kind.name]
        if not own and kind.file != "summary":
            continue
        outputs.write_table(folder / f"{kind.file}.csv", own, kind.columns)
        whole["jobs" if kind.file == "summary" else kind.file] = [
            {name: record.get(name) for name in kind.columns} for record in own
        ]
    outputs.write_json(folder / "summary.json", whole)


def _report(folder: Path, ids: list[str], log: Log) -> Path | None:
    try:
        from esegeta.run.report import page as report

        return report.write(folder, only=ids)
    except ImportError as error:
        log.write(f'no report: {error.name} is missing, pip install "esegeta[viz]"')
        return None


# ------------------------------------------------------------------ looking only


def _allowed(together: Sequence[Job]) -> float | None:
    """The time that jobs may take one after another, None if one of them may take any."""
    deadlines = [job.deadline for job in together]
    return None if None in deadlines else float(sum(d for d in deadlines if d is not None))


def examined(config: Config, chosen: Sequence[Job], finished: Mapping[str, Record | None]) -> list[Planned]:
    """What can be said of jobs before they run. The network and the images are loaded in worker processes."""
    subjects: dict[str, list[Job]] = {}
    for job in chosen:
        if kinds.find(job.kind).examine is not None:
            subjects.setdefault(job.subject, []).append(job)
    tasks = [
        Task(subject, dispatch.EXAMINE, [job.payload for job in together], _allowed(together))
        for subject, together in subjects.items()
    ]
    found: dict[str, dict[str, Any]] = {}
    for outcome in pool.run(_limited(tasks, config)[0], workers=config.run.workers):
        for job in subjects[outcome.id]:
            said = (outcome.value or {}).get(job.id)
            found[job.id] = said or {"problem": outcome.error}
    plan = []
    for job in chosen:
        if kinds.find(job.kind).draws:
            continue
        said = found.get(job.id, {})
        count, needs = kinds.find(job.kind).cost(job.payload)
        shape = tuple(said["shape"]) if said.get("shape") else None
        done = finished[job.id] is not None
        plan.append(Planned(job, done, count, needs, shape, said.get("memory"), said.get("problem")))
    return plan
