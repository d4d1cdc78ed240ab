"""A whole run: from a configuration to maps, figures, tables and a report."""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esegeta.engine import check
from esegeta.run.config import catalogue
from esegeta.run.config import loading as configuration
from esegeta.run.config.loading import Config
from esegeta.run.executors import local as pool
from esegeta.run.executors.local import Outcome, Task
from esegeta.run.executors.processes import memory_here
from esegeta.run.executors.stopping import Terminated, terminable
from esegeta.run.jobs import outputs
from esegeta.run.jobs import plan as jobs
from esegeta.run.jobs.plan import Job, Record, about
from esegeta.run.log import Event, Log, display, sentences

COLUMNS = (
    *("id", "subject", "target", "method", "title", "status", "error", "score", "residual", "difference"),
    *("missed", "share_done"),
    *("min", "max", "sum", "sum_kept", "seconds", "peak_memory", "device", "precision"),
    *("map", "prediction", "anatomy"),
)
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
    finished = {job.id: jobs.finished(job, folder) if resume else None for job in planned}
    if dry:
        return Summary(folder, [], plan=examined(config, chosen, finished))
    _writable(folder)
    with terminable(), _alone(folder) as lock:
        outputs.sweep(folder)
        return _run(config, folder, lock, planned, chosen, finished, threads, progress)


def _chosen(planned: Sequence[Job], only: Sequence[str] | None) -> list[Job]:
    if only is None:
        return list(planned)
    known = {name for job in planned for name in (job.id, job.method)}
    for name in only:
        if name not in known:
            advice = catalogue.nearest(name, known)
            raise ValueError(check.problem("run", "the id of a job or of a method", repr(name), advice))
    return [job for job in planned if {job.id, job.method} & set(only)]


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
    threads: int | None,
    progress: bool | Callable[[Event], None] | None,
) -> Summary:
    outputs.write_json(folder / "config.json", configuration.dump(config))
    outputs.dataset(folder, title="Attributions", version=jobs.releases()["esegeta"])
    todo = [job for job in chosen if finished[job.id] is None]
    by_id = {job.id: job for job in todo}
    log = Log(folder / "log.txt")
    log.write(f"esegeta {jobs.releases()['esegeta']}: {len(todo)} of {len(planned)} jobs to do")
    tasks, share = _limited([job.task() for job in todo], config)
    if any(job.memory is None for job in todo):
        log.write(f"a job without a limit of memory may occupy {pool.size(share)}, its share of this machine")
    shown = display(len(todo), len(chosen) - len(todo), progress)
    begun: dict[str, Job] = {}

    def hear(event: Event) -> None:
        _check_that_it_stays(folder, lock)
        job = by_id.get(event["task"] or "")
        if job is not None and event["event"] == "start":
            jobs.clear(job, folder)
            begun[job.id] = job
        if job is not None and event["event"] == "end":
            if event["outcome"].status != "done":
                jobs.discard(job, folder)  # a worker may have ended between two of its files
                outputs.write_json(jobs.record_path(folder, job.id), failed(job, event["outcome"]))
            del begun[job.id]
        for line in sentences(event):
            log.write(line)
        shown.show(event)

    interrupted: int | None = None
    try:
        with shown:
            pool.run(
                tasks,
                workers=config.run.workers,
                devices=config.run.devices,
                per_device=config.run.per_device,
                threads=config.run.threads if threads is None else threads,
                on_event=hear,
            )
    except KeyboardInterrupt as error:
        interrupted = error.exit_code if isinstance(error, Terminated) else INTERRUPTED
        log.write("interrupted: what is finished is kept")
    finally:
        with contextlib.closing(log):
            _check_that_it_stays(folder, lock)
            for job in begun.values():
                if jobs.record_of(folder, job.id) is None:
                    jobs.discard(job, folder)
            summary = _summed_up(config, folder, planned, chosen, len(todo), log)
    return summary if interrupted is None else dataclasses.replace(summary, exit_code=interrupted)


def failed(job: Job, outcome: Outcome) -> Record:
    """The record of a job without a result."""
    return {
        **about(job.payload),
        "status": outcome.status,
        "error": outcome.error,
        "map": None,
        "figures": {},
        "prediction": None,
        "anatomy": None,
        **dict.fromkeys(("score", "residual", "difference", "missed", "min", "max", "sum", "sum_kept")),
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
        outputs.write_table(folder / "summary.csv", records, COLUMNS)
        rows = [{name: record.get(name) for name in COLUMNS} for record in records]
        whole = {"counts": counts, "missing": missing, "jobs": rows}
        outputs.write_json(folder / "summary.json", whole)
    report = None
    if config.output.report and records:
        report = _report(folder, [job.id for job in planned], log)
    log.write(f"ended: {', '.join(f'{n} {status}' for status, n in sorted(counts.items())) or 'nothing'}")
    asked = {job.id for job in chosen}
    well = all(record is not None and record["status"] == "done" for job, record in found if job.id in asked)
    code = ALL_DONE if well else SOME_FAILED
    return Summary(folder, records, repeated, code, report)


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
    specs = catalogue.methods_by_name()
    subjects: dict[str, list[Job]] = {}
    for job in chosen:
        subjects.setdefault(job.subject, []).append(job)
    tasks = [
        Task(
            subject, "esegeta.run.jobs.worker:examine", [job.payload for job in together], _allowed(together)
        )
        for subject, together in subjects.items()
    ]
    found: dict[str, dict[str, Any]] = {}
    for outcome in pool.run(_limited(tasks, config)[0], workers=config.run.workers):
        for job in subjects[outcome.id]:
            said = (outcome.value or {}).get(job.id)
            found[job.id] = said or {"problem": outcome.error}
    plan = []
    for job in chosen:
        spec, said = specs[job.payload["method"]["name"]], found[job.id]
        plan.append(
            Planned(
                job,
                finished[job.id] is not None,
                catalogue.cost(spec, job.payload["method"]),
                "gradients" if spec.needs == "gradient" else "values",
                tuple(said["shape"]) if said.get("shape") else None,
                said.get("memory"),
                said.get("problem"),
            )
        )
    return plan
