"""The kinds of jobs "summary" and "summary_mean": how maps divide between regions.

``[summary]`` in a configuration asks for both: statistics of every map in regions, such as inside and outside of what
the network predicts or the parts of an atlas, and their mean over all subjects for each target and method.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import scipy.ndimage
import torch
from pydantic import Field

from esegeta import spatial
from esegeta.engine import check
from esegeta.run.config.faults import message_of
from esegeta.run.config.schema import Section
from esegeta.run.executors.child import Context
from esegeta.run.executors.status import Status
from esegeta.run.jobs.inputs import Inputs
from esegeta.run.jobs.kinds import Job, Kind, Record, digest, register
from esegeta.run.jobs.parts import cached, refusals
from esegeta.run.jobs.plan import Planning, contents, ended, header, releases, tables_of
from esegeta.run.volumes import files as volumes
from esegeta.run.volumes import labels, names
from esegeta.run.volumes.reading import Array, Volume

OWN = ("prediction", "reference", "components")
OUTSIDE = "outside"
AXES = ("x", "y", "z")
STATISTICS = ("sum", "mean", "share", "min", "max")
PLACES = tuple(f"{end}_{axis}_mm" for end in ("min", "max") for axis in AXES)
SIZES = ("voxels", "volume_mm3")
NUMBERS = (*STATISTICS, *PLACES, *SIZES)
WHICH = ("of", "region", "name", "channel")


class Summary(Section):
    """Statistics of every map in regions.

    regions: "prediction" and "reference" (inside and outside of them), "components" (the face-connected parts of the
    prediction, the largest first), and label maps: a file for all subjects, or a pattern of a file for each. grid:
    of a label map on another grid than the image, "same" refuses it, "nearest" takes the nearest label. names: of the
    labels. mean: whether also over all subjects, if there are several.
    """

    regions: list[str] = Field(default=["prediction"], min_length=1)
    grid: Literal["same", "nearest"] = "same"
    names: dict[str, str] = Field(default={})
    mean: bool = True

    def placed(self, place: Callable[[str], str]) -> Self:
        """Return the same with absolute paths."""
        found = [one if one in OWN else place(one) for one in self.regions]
        return self.model_copy(update={"regions": found})


class Parts(NamedTuple):
    """Regions of an image.

    of: what they are parts of; labels: for each voxel the number of its region, from 0, or -1; regions: what each is
    called, in the order of the table; numbers: the label of each in its file, if there is one.
    """

    of: str
    labels: Array
    regions: list[str]
    numbers: tuple[int, ...] = ()


def of_parts(
    map: Array, parts: Array, count: int, affine: Array, total: float | None = None
) -> list[dict[str, Any]]:
    r"""Return the statistics of a map in each part of an image.

    What an empty part has not is None. Of several equal values one is the extremum.

    Args:
        map: (C,\*S); NaN for what was not computed, which is left out.
        parts: (\*S), for each voxel the number of its part, from 0, or -1.
        count: how many parts there are.
        affine: from voxel indices to mm, 4 x 4.
        total: what a share is a share of; by default the sum of all absolute values of the map.

    Example:
        >>> a = np.array([[1.0, -2.0, 3.0, np.nan]])
        >>> one, _ = of_parts(a, np.array([0, 0, 1, 0]), 2, np.diag([2.0, 1.0, 1.0, 1.0]))
        >>> [one[name] for name in ("sum", "mean", "share", "min", "max", "volume_mm3", "min_x_mm")]
        [-1.0, -0.5, 0.5, -2.0, 1.0, 6.0, 2.0]
    """
    unknown = np.isnan(map)
    values = np.where(unknown, 0.0, map).astype(np.float64)
    total = float(np.abs(values).sum()) if total is None else total
    here = np.where(unknown | (parts < 0), count, parts)
    flat, many = here.ravel(), count + 1
    numbers = np.bincount(flat, minlength=many)
    sums, sizes = np.bincount(flat, values.ravel(), many), np.bincount(flat, np.abs(values).ravel(), many)
    voxels = np.bincount(np.where(parts < 0, count, parts).ravel(), minlength=many)
    low, high, lowest, highest = scipy.ndimage.extrema(values, here, np.arange(count))
    voxel = abs(float(np.linalg.det(affine[:3, :3])))
    return [
        {
            "sum": float(sums[n]),
            "mean": float(sums[n] / numbers[n]) if numbers[n] else None,
            "share": float(sizes[n]) / total if total else None,
            "min": float(low[n]) if numbers[n] else None,
            "max": float(high[n]) if numbers[n] else None,
            **_places("min", affine, lowest[n] if numbers[n] else None),
            **_places("max", affine, highest[n] if numbers[n] else None),
            "voxels": int(voxels[n]),
            "volume_mm3": int(voxels[n]) * voxel,
        }
        for n in range(count)
    ]


def _places(end: str, affine: Array, index: Sequence[int] | None) -> dict[str, float | None]:
    """Return the place in mm of an element (channel, and then the voxel)."""
    if index is None:
        return {f"{end}_{axis}_mm": None for axis in AXES}
    voxel = np.array(index[1:], dtype=np.float64)
    place = affine[:3, : len(voxel)] @ voxel + affine[:3, 3]
    return {f"{end}_{axis}_mm": float(mm) for axis, mm in zip(AXES, place, strict=True)}


def components(mask: Array) -> Array:
    """Return the face-connected parts of a mask, numbered from 0, the largest first; -1 is what lies outside.

    >>> components(np.array([[1, 0, 0], [0, 1, 1]], dtype=bool)).tolist()
    [[1, -1, -1], [-1, 0, 0]]
    """
    found: Array = spatial.parts(torch.from_numpy(np.asarray(mask, dtype=bool))).numpy() - 1
    return found


def summarise(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Compute the statistics of a map in regions."""
    started = time.monotonic()
    made = inputs.record(payload["of"])
    values = inputs.map(payload["of"], "file").numpy().astype(np.float64)
    volume, total = inputs.image().volume, float(np.nansum(np.abs(values)))
    channels = [("", values)]
    if len(values) > 1:
        channels += [(str(channel), values[channel : channel + 1]) for channel in range(len(values))]
    rows, events = [], []
    for asked in payload["regions"]:
        about = [payload[name] for name in ("files", "input_digest", "target")]
        about += [asked, payload["grid"], made["prediction"], made["config_digest"], payload["reference"]]
        with refusals():
            found = cached(context.cache, "parts", about, lambda: _parts(asked, payload, made, inputs), 4)  # noqa: B023
        if isinstance(found, str):
            events.append({"event": "region", "message": found})
            continue
        for channel, map in channels:
            numbers = of_parts(map, found.labels, len(found.regions), volume.affine, total)
            for n, region in enumerate(found.regions):
                label = str(found.numbers[n]) if found.numbers else ""
                which = {"of": found.of, "region": region, "name": payload["names"].get(label, "")}
                rows.append({**which, "channel": channel, **_known(numbers[n], made, volume)})
    if made["status"] == Status.PARTIAL:
        events.append({"event": "partial", "message": "The map is a part only; the rest does not count."})
    record = {"rows": rows, "status": made["status"], "share_done": made["share_done"], "events": events}
    return ended(payload, record, context, started)


def _known(numbers: Record, made: Record, volume: Volume) -> Record:
    """Leave out what means nothing: the sum of values that many voxels share, and mm of a picture, which has none."""
    without = ["sum"] if made["regridding"] == "values" else []
    if volume.is_image:
        without += [*PLACES, "volume_mm3"]
    return {**numbers, **dict.fromkeys(without)}


def _parts(asked: Record, payload: Record, made: Record, inputs: Inputs) -> Parts | str:
    """Return the regions that are asked for, or why there are none."""
    of, subject = asked["of"], payload["keys"]["subject"]
    if of == "reference":
        mask = inputs.reference()
        if mask is None:
            return f"There is no reference of {subject}: its regions are left out."
        return Parts(of, np.where(mask.numpy(), 0, 1), ["inside", OUTSIDE])
    if of in ("prediction", "components"):
        if not made["prediction"]:
            return "The network's answer has no grid: there is no region that it predicts."
        shape = inputs.image().volume.data.shape[1:]
        inside = volumes.read(Path(payload["folder"]) / made["prediction"]).data.reshape(shape).numpy() > 0
        if of == "prediction":
            return Parts(of, np.where(inside, 0, 1), ["inside", OUTSIDE])
        found = components(inside)
        if found.max() < 0:
            return "The prediction is empty: it has no components."
        return Parts(of, found, [str(n + 1) for n in range(found.max() + 1)])
    if asked["file"] is None:
        return f"There is no label map of {subject} among {of}: its regions are left out."
    volume, atlas = inputs.image().volume, labels.read(asked["file"])
    there = labels.onto(atlas, volume.data.shape[1:], volume.affine, payload["grid"], "summary.grid").numpy()
    # Also those of which this image has nothing: that there is nothing is a number.
    numbers = [int(n) for n in np.unique(atlas.data.numpy()) if n != 0]
    order = {number: n for n, number in enumerate([*numbers, 0])}
    present, back = np.unique(there, return_inverse=True)
    ranks = np.array([order[int(number)] for number in present])[back].reshape(there.shape)
    return Parts(of, ranks, [*map(str, numbers), OUTSIDE], (*numbers, 0))


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
        "rows": over_subjects({record["subject"]: record["rows"] for record in whole.values()}),
        "subjects": len(whole),
        "subjects_asked": count,
        "missing": sorted(missing),
        "status": Status.PARTIAL if missing else Status.DONE,
        "share_done": len(whole) / count,
        "events": events,
    }
    return ended(payload, record, context, started)


def over_subjects(rows: Mapping[str, Sequence[Record]]) -> list[Record]:
    """Return a row for each region and channel: the means over those subjects that have voxels of it.

    n says how many these are, and without which have none. The place of a mean is no place of anything: rows of many
    subjects have none.

    >>> rows = {"a": [{"of": "p", "region": "1", "name": "", "channel": "", "sum": 1.0, "voxels": 2}], "b": []}
    >>> [(row["sum"], row["n"], row["without"]) for row in over_subjects(rows)]
    [(1.0, 1, ['b'])]
    """
    found: dict[tuple[str, ...], dict[str, Record]] = {}
    for subject, own in rows.items():
        for row in own:
            regions = found.setdefault(tuple(row[name] for name in WHICH), {})
            if row["voxels"]:
                regions[subject] = row
    return [
        {
            **dict(zip(WHICH, which, strict=True)),
            **{name: mean_of([row.get(name) for row in own.values()]) for name in (*STATISTICS, *SIZES)},
            "n": len(own),
            "without": [subject for subject in rows if subject not in own],
        }
        for which, own in found.items()
    ]


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean, None if a value is not known: it would be the mean of others than the rest of the row.

    >>> mean_of([1.0, 2.0]), mean_of([1.0, None])
    (1.5, None)
    """
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def rows_of(record: Mapping[str, Any]) -> list[Record]:
    """Return a row for each region of a record, or one without numbers where there are none."""
    rows = record.get("rows") or [{}]
    return [{**record, **row} for row in rows]


def entries(planning: Planning) -> list[Job]:
    """Return a job for each map, if the configuration has the table."""
    (section,) = tables_of(planning.config, "summary", Summary)
    files_of = _files(section, planning)
    return [_job(job, section, files_of) for job in planning.jobs if job.kind == "methods"]


def _job(job: Job, section: Summary, files_of: Mapping[str, Mapping[str, Path]]) -> Job:
    regions = [_asked(one, files_of, job.subject) for one in section.regions]

    def decides() -> list[Any]:
        return ["summary", section.grid, section.names, _decides(regions, job.given["reference"]), releases()]

    how = {"regions": regions, "grid": section.grid, "names": section.names}
    return Job(
        id=f"{job.id}_summary",
        kind="summary",
        keys=job.keys,
        given={**job.given, "of": job.id, "title": job.method, **how},
        decides=decides,
        after=(job,),
    )


def _files(section: Summary, planning: Planning) -> dict[str, dict[str, Path]]:
    """Return for each label map the file of each subject: a name is for all, a pattern matches one for each."""
    subjects = [image.subject for image in planning.images]
    found: dict[str, dict[str, Path]] = {}
    for one in section.regions:
        if one in OWN:
            continue
        try:
            found[one] = labels.of_subjects(one, subjects, planning.config.input.subject)
        except volumes.UnreadableInput as error:
            raise check.Refused(f"summary.regions: {message_of(error)}") from error
    return found


def _asked(one: str, files: Mapping[str, Mapping[str, Path]], subject: str) -> Record:
    """Return what a job is told of regions."""
    if one in OWN:
        return {"of": one, "file": None}
    path = files[one].get(subject)
    return {"of": labels.called(one), "file": str(path) if path else None}


def _decides(regions: Sequence[Record], reference: Callable[[], Record | None]) -> list[Any]:
    """Return what decides about regions: their files by what is in them."""
    found: list[Any] = [[one["of"], one["file"] and digest(contents(one["file"]))] for one in regions]
    if any(one["of"] == "reference" for one in regions):
        found.append((reference() or {}).get("decides"))
    return found


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


_HEADS = {
    **{"of": "Regions of", "region": "Region", "name": "Name", "channel": "Channel"},
    **{name: name.capitalize() for name in STATISTICS},
    **{"voxels": "Voxels", "volume_mm3": "Volume, mm\u00b3"},
}
_ENDS = {f"max_{axis}_mm": f"Max at {axis}, mm" for axis in AXES}
_NOTE = (
    "Inside and outside: of the prediction or the reference. Components: face-connected parts of the prediction, the "
    "largest first. Share: of the sum of all absolute values. Sum: empty where voxels show the value of something "
    "larger. Channel: empty for all together. Places in mm: right, anterior, superior."
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
        group=lambda job: digest([job.given["files"], job.given["model"]]),
        blank={"rows": []},
        rows=rows_of,
        file="regions",
        columns=("id", "subject", "target", "method", "status", "error", "share_done", *WHICH, *NUMBERS),
        shown={
            "subject": "Subject",
            "target": "Target",
            "method": "Map",
            "status": "Status",
            **_HEADS,
            **_ENDS,
        },
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
        blank={"rows": [], "subjects": None, "subjects_asked": None, "missing": None},
        rows=rows_of,
        file="regions_mean",
        columns=(
            *("id", "target", "method", "status", "error", "subjects", "subjects_asked", "missing"),
            *(*WHICH, "n", "without", *STATISTICS, *SIZES),
        ),
        shown={"target": "Target", "method": "Map", "status": "Status", "n": "Subjects", **_HEADS},
        title="Regions, mean over subjects",
        note="Over those subjects that have voxels of a region; regions_mean.csv names the others. A mean is empty "
        "where one of them has no value for it.",
    )
)
