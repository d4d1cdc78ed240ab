"""The kinds of jobs "summary" and "summary_mean": how maps divide between the prediction and the rest.

``[summary]`` in a configuration asks for both: statistics of every map inside and outside of what the network
predicts, and their mean over all subjects for each target and method.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from esegeta.engine import check
from esegeta.run.config.schema import Section
from esegeta.run.executors.child import Context
from esegeta.run.executors.status import Status
from esegeta.run.jobs.inputs import Inputs
from esegeta.run.jobs.kinds import Job, Kind, Record, register
from esegeta.run.jobs.plan import Planning, ended, header, releases
from esegeta.run.volumes import files as volumes
from esegeta.run.volumes import names

REGIONS = ("inside", "outside")
STATISTICS = ("sum", "mean", "share", "min", "max", "volume")
NUMBERS = tuple(f"{region}_{name}" for region in REGIONS for name in STATISTICS)


class Summary(Section):
    """Statistics of every map. mean: whether also over all subjects, if there are several."""

    mean: bool = True


def of_region(map: Tensor, inside: Tensor, voxel: float) -> dict[str, float | None]:
    r"""Return statistics of a map in a region; None for what an empty region has not.

    Args:
        map: (C,\*S); NaN for what was not computed, which is left out.
        inside: (\*S), True where the region is.
        voxel: volume of a voxel.

    Example:
        >>> import torch
        >>> a = torch.tensor([[1.0, -2.0, 3.0, torch.nan]])
        >>> found = of_region(a, torch.tensor([True, True, False, True]), 2.0)
        >>> [found[name] for name in ("sum", "mean", "share", "min", "max", "volume")]
        [-1.0, -0.5, 0.5, -2.0, 1.0, 6.0]
    """
    values = map.double()
    known = values[~values.isnan()]
    here = values[inside.expand_as(values)]
    here = here[~here.isnan()]
    total = float(known.abs().sum())
    return {
        "sum": float(here.sum()),
        "mean": float(here.mean()) if len(here) else None,
        "share": float(here.abs().sum()) / total if total else None,
        "min": float(here.min()) if len(here) else None,
        "max": float(here.max()) if len(here) else None,
        "volume": int(inside.sum()) * voxel,
    }


def summarise(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Compute the statistics of a map inside and outside of the prediction."""
    started = time.monotonic()
    of = payload["of"]
    made = inputs.record(of)
    map = inputs.map(of, "file")
    numbers: dict[str, float | None] = dict.fromkeys(NUMBERS)
    events = []
    if made["prediction"]:
        mask = volumes.read(Path(payload["folder"]) / made["prediction"]).data
        inside = mask.reshape(map.shape[1:]) > 0
        voxel = math.prod(inputs.image().volume.spacing)
        for name, where in zip(REGIONS, (inside, ~inside), strict=True):
            found = of_region(map, where, voxel)
            numbers |= {f"{name}_{statistic}": found[statistic] for statistic in STATISTICS}
    else:
        message = "The network's answer has no grid: there is no region that it predicts."
        events.append({"event": "region", "message": message})
    if made["regridding"] == "values":  # a value that many voxels share would count many times
        numbers |= {f"{name}_sum": None for name in REGIONS}
    if made["status"] == Status.PARTIAL:
        events.append({"event": "partial", "message": "The map is a part only; the rest does not count."})
    record = {**numbers, "status": made["status"], "share_done": made["share_done"], "events": events}
    return ended(payload, record, context, started)


def average(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Compute the mean of each statistic over the subjects that have whole ones, and say which have not."""
    started = time.monotonic()
    whole = {job: record for job, record in inputs.many() if record["status"] == Status.DONE}
    missing = inputs.missing(list(whole))
    count = len(whole) + len(missing)
    if not whole:
        raise check.Refused(f"{payload['id']}: none of {count} subjects has a whole map")
    events = []
    if missing:
        names_of = ", ".join(f"{job}: {status}" for job, status in sorted(missing.items()))
        message = f"The mean is of {len(whole)} of {count} subjects; without {names_of}."
        events.append({"event": "missing", "message": message})
    record = {
        **{name: mean_of([one.get(name) for one in whole.values()]) for name in NUMBERS},
        "subjects": len(whole),
        "subjects_asked": count,
        "missing": sorted(missing),
        "status": Status.PARTIAL if missing else Status.DONE,
        "share_done": len(whole) / count,
        "events": events,
    }
    return ended(payload, record, context, started)


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean, None if a value is not known: it would be the mean of others than the rest of the row.

    >>> mean_of([1.0, 2.0]), mean_of([1.0, None])
    (1.5, None)
    """
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def entries(planning: Planning) -> list[Job]:
    """Return a job for each map, if the configuration has the table."""
    if "summary" not in planning.config.more:
        return []
    return [
        Job(
            id=f"{job.id}_summary",
            kind="summary",
            keys=job.keys,
            given={**job.given, "of": job.id, "title": job.method},
            decides=["summary", NUMBERS, releases()],
            after=(job,),
        )
        for job in planning.jobs
        if job.kind == "methods"
    ]


def mean_entries(planning: Planning) -> list[Job]:
    """Return a job for each target and method over all subjects, if there are several."""
    section = planning.config.more.get("summary")
    if not isinstance(section, Summary) or not section.mean or len(planning.images) < 2:
        return []
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in planning.jobs:
        if job.kind == "summary":
            groups.setdefault((job.target, job.method), []).append(job)
    return [
        Job(
            id=f"mean_{names.label(target)}_{names.label(method)}",
            kind="summary_mean",
            keys={"target": target, "method": method},
            given={"folder": planning.folder, "title": method},
            decides=["mean", NUMBERS],
            after=tuple(jobs),
            need="any",
        )
        for (target, method), jobs in groups.items()
    ]


_BLANK: Mapping[str, Any] = dict.fromkeys(NUMBERS)
_HEADS = {f"{region}_{name}": f"{name.capitalize()} {region}" for name in STATISTICS for region in REGIONS}
_NOTE = (
    "Inside and outside: of what the network predicts. Share: of the sum of all absolute values. Sum: empty where "
    "voxels show the value of something larger. Volume: in the units of the image's spacing."
)

SUMMARY = register(
    Kind(
        name="summary",
        table="summary",
        section=Summary,
        reads=("methods",),
        entries=entries,
        header=header,
        work=summarise,
        blank=_BLANK,
        file="regions",
        columns=("id", "subject", "target", "method", "status", "error", "share_done", *NUMBERS),
        shown={"subject": "Subject", "target": "Target", "method": "Map", "status": "Status", **_HEADS},
        title="Regions",
        note=_NOTE,
    )
)
MEAN = register(
    Kind(
        name="summary_mean",
        table="summary",
        section=Summary,
        reads=("summary",),
        entries=mean_entries,
        header=header,
        work=average,
        blank={**_BLANK, "subjects": None, "subjects_asked": None, "missing": None},
        file="regions_mean",
        columns=(
            *("id", "target", "method", "status", "error", "subjects", "subjects_asked", "missing"),
            *NUMBERS,
        ),
        shown={
            "target": "Target",
            "method": "Map",
            "status": "Status",
            "subjects": "Subjects",
            **_HEADS,
        },
        title="Regions, mean over subjects",
        note="A mean is empty where a subject has no value for it.",
    )
)
