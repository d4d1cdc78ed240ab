"""The kind of jobs "components": a row for each connected part of a prediction, such as each lesion.

``[table]`` in a configuration, with ``per = "component"``, asks for one job for each image and target. What a row has
is what ``esegeta.components`` gives: volume, uncertainty, radiomics, Shapley values of channels, context, region.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from esegeta import lesions
from esegeta._types import Score
from esegeta.engine import check
from esegeta.engine.execution import execution
from esegeta.run.config import building, catalogue
from esegeta.run.config.building import class_of
from esegeta.run.config.faults import Strict, message_of
from esegeta.run.config.schema import Call, Method, Section
from esegeta.run.config.tables import own_limits, with_files
from esegeta.run.executors.child import Context
from esegeta.run.jobs.inputs import Inputs
from esegeta.run.jobs.kinds import Beside, Job, Kind, Record, register
from esegeta.run.jobs.methods import METHODS
from esegeta.run.jobs.parts import Image, labels_of, reader, refusals
from esegeta.run.jobs.plan import AboutImage, Planning, contents, ended, header, limits, releases, tables_of
from esegeta.run.jobs.uncertainty import MAPS
from esegeta.run.volumes import labels, names
from esegeta.run.volumes.reading import UnreadableInput

TABLE = "table"
UNCERTAINTY = "entropy"  # the map whose mean inside of a part is told
_SHOWN = ("title", "deadline", "memory")
_AXES = ("x", "y", "z")
_SHAPLEY = Method(name="channel_shapley")  # built for its baseline alone


class Table(Section):
    """A row for each connected part of what the network predicts.

    per: what has a row of its own; "component" is a connected part of the prediction.
    method: whose map says how much of the explanation of a part lies outside of it, with its parameters beside it.
    baseline: of the Shapley values of channels, and of the method. features: radiomic ones. bins: of their grey
    levels. explained: how many parts of each image have these, the largest first. uncertainty: the entry of
    ``[[uncertainty]]`` whose entropy is averaged, by default the first. atlas: a label map for all subjects, or a
    pattern of one for each. grid: "same" where the atlas lies on the grid of the image, "nearest" to bring it there.
    names: of its labels.
    """

    per: Literal["component"]
    method: str | Call = "gradient"
    baseline: str | Call = "zero"
    features: list[str] = Field(default=list(lesions.FEATURES))
    bins: int = 32
    explained: int = 20
    uncertainty: str | None = None
    atlas: str | None = None
    grid: Literal["same", "nearest"] = "same"
    names: dict[str, str] = Field(default={})
    title: str | None = None
    deadline: float | None = None
    memory: str | int | None = None

    def placed(self, place: Callable[[str], str]) -> Self:
        """Return the same with absolute paths."""
        return self.model_copy(update={"atlas": self.atlas and place(self.atlas)})

    @property
    def explanation(self) -> Method:
        """Return the method as an entry of its own."""
        call = Call(name=self.method) if isinstance(self.method, str) else self.method
        return Method(name=call.name, parameters=call.parameters)


# ------------------------------------------------------------------ the table of a configuration


def check_table(table: Table, path: str, faults: Strict) -> None:
    """Tell what is wrong with the table, as far as it alone shows it."""
    own_limits(table, path, faults)
    for name, least in (("bins", 2), ("explained", 0)):
        if getattr(table, name) < least:
            faults.add(f"{path}.{name}", f"at least {least}", str(getattr(table, name)), "Choose more")
    for label in table.names:
        if not label.removeprefix("-").isdigit():
            faults.add(
                f"{path}.names.{label}", "a label, a whole number", repr(label), "As in { 1 = 'left' }"
            )
    with faults.at(f"{path}.features"):
        lesions.components(lambda x: x, 1, features=table.features)
    for name, method in (("method", table.explanation), ("baseline", _SHAPLEY)):
        at = f"{path}.{name}"
        building.explanation(method, torch.sum, None, catalogue.checking(faults), at, table.baseline)


def check_all(tables: Sequence[tuple[str, Table]], beside: Beside, faults: Strict) -> None:
    """Tell what is wrong with the table beside the others."""
    for path, _ in tables:
        if not beside.targets:
            faults.add(path, "a target", "none", "Add [[targets]]")


# ------------------------------------------------------------------ plan


def entries(planning: Planning) -> list[Job]:
    """Return a job for each image and each target that has a class, if the configuration has the table."""
    about = planning.by_target()
    return [
        _job(planning, table, image, job, files.get(image.subject))
        for table in tables_of(planning.config, TABLE, Table)
        for files in [_files(table, planning)]
        for image in planning.images
        for target in planning.config.targets
        if class_of(target) is not None
        for job in [about[image.subject][target.name]]
    ]


def _files(table: Table, planning: Planning) -> dict[str, Path]:
    if table.atlas is None:
        return {}
    try:
        subjects = [image.subject for image in planning.images]
        return labels.of_subjects(table.atlas, subjects, planning.config.input.subject)
    except UnreadableInput as error:
        raise check.Refused(f"table.atlas: {message_of(error)}") from error


def _job(planning: Planning, table: Table, image: AboutImage, of: Job, atlas: Path | None) -> Job:
    written = table.model_dump(mode="json")
    found = [j for j in planning.jobs if j.kind == "uncertainty" and j.subject == image.subject]
    sure = [job for job in found if table.uncertainty in (None, job.keys["estimate"])]
    if table.uncertainty is not None and not sure:
        known = ", ".join(job.keys["estimate"] for job in found) or "none"
        expected = f"an entry of [[uncertainty]] called {table.uncertainty!r}"
        raise check.refused("table.uncertainty", expected, known, "Correct its id, or add it")

    def decides() -> Record:
        return {
            "table": with_files({name: v for name, v in written.items() if name not in _SHOWN}, contents)
            | {"atlas": atlas and contents(atlas)},
            "network": planning.network,
            "image": image.decides,
            "target": with_files(of.given["target"], contents),
            "patches": [of.given["method"]["patches"], planning.whole["patches"]],
            "key": planning.config.run.key,
            "versions": releases(),
        }

    return Job(
        id=f"{image.subject}_{names.label(of.target)}_components",
        kind="components",
        keys={"subject": image.subject, "target": of.target},
        given={
            **of.given,
            "table": written,
            "atlas": atlas and str(atlas),
            "uncertainty": sure[0].id if sure else None,
            "title": table.title or of.target,
        },
        decides=decides,
        looks=[table.title],
        after=tuple(sure[:1]),
        need="none",
        **limits(table, planning.config.run),
    )


# ------------------------------------------------------------------ work


def uncertainty_of(payload: Record, inputs: Inputs, number: int) -> tuple[Tensor | None, str]:
    """Return the map of uncertainty of an image, and why there is none."""
    job = payload["uncertainty"]
    if job is None:
        return None, "the configuration has no [[uncertainty]]"
    made = dict(inputs.many())
    if job not in made:
        return None, f"there is no result of {job}"
    own = inputs.map(job).split(made[job]["channels"])[MAPS.index(UNCERTAINTY)]
    return own[number if len(own) > 1 else 0], ""


def explained_by(table: Table, image: Image, context: catalogue.Context) -> Callable[[Score], Any]:
    """Return how a score is explained."""

    def explain(score: Score) -> Any:
        method = table.explanation
        return building.explanation(method, score, image.x, context, "table.method", table.baseline)

    return explain


def describe(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Describe every part of a prediction, and write the record."""
    started = time.monotonic()
    table = Table.model_validate(payload["table"])
    image, entry = inputs.image(), inputs.entry()
    number = class_of(entry.target)
    assert number is not None
    made = catalogue.Context(image.prepared.spacing, entry.key, reader(image))
    sure, why = uncertainty_of(payload, inputs, number)
    with refusals(), execution(progress=False):
        model, seen = inputs.model(), inputs.prediction("network")
        if seen is None:
            advice = "Parts are of segmentations: leave [table] out"
            raise check.refused("table", "an answer on the grid of the image", "another one", advice)
        atlas = payload["atlas"]
        where = (
            None if atlas is None else labels_of(Path(atlas), image, table.grid, "table.grid", to="network")
        )
        shapley = building.explanation(_SHAPLEY, torch.sum, image.x, made, TABLE, table.baseline)
        ready = lesions.components(
            model,
            number,
            explain=explained_by(table, image, made),
            features=table.features,
            bins=table.bins,
            explained=table.explained,
            exclusive=entry.target.parameters.get("exclusive", True),
        )
        found = ready(
            image.x,
            mask=seen,
            baseline=shapley.refs[0],
            uncertainty=sure,
            atlas=where,
            names={int(label): name for label, name in table.names.items()},
            spacing=image.prepared.spacing,
        )
    context.finishing(60.0)
    channels = names.channels(payload["files"], len(image.x))
    told = {"uncertainty": why, "region": "" if atlas else _no_atlas(table, payload)}
    events = (
        []
        if len(found)
        else [{"event": "empty", "message": "The prediction is empty: it has no components."}]
    )
    record = {
        "rows": [row_of(row, image, channels, told) for row in found],
        "method": None,
        "asked": with_files(payload["table"], lambda path: Path(path).name),
        "preprocess": list(image.prepared.record),
        "events": events,
    }
    return ended(payload, record, context, started)


def _no_atlas(table: Table, payload: Record) -> str:
    subject = payload["keys"]["subject"]
    return (
        ""
        if table.atlas is None
        else f"there is no label map of {subject} among {labels.called(table.atlas)}"
    )


def row_of(row: lesions.Component, image: Image, channels: Sequence[str], why: Mapping[str, str]) -> Record:
    """Return the row of a part: its place in mm of the scan, and channels by their names.

    why: there is no number, where this says more than the row does.
    """
    missing = {name: why.get(name) or said for name, said in row.missing.items()}
    flat = row._replace(missing=missing).flat()
    centre = [place / step for place, step in zip(row.centre, image.prepared.spacing, strict=True)]
    affine = image.prepared.affine
    place = affine[:3, : len(centre)] @ torch.tensor(centre).double().numpy() + affine[:3, 3]
    if not image.volume.is_image:
        flat |= {f"centre_{axis}_mm": float(mm) for axis, mm in zip(_AXES, place, strict=True)}
    found: Record = {}
    for name, value in flat.items():
        kind, _, rest = name.partition("_")
        if kind == "shapley":
            found[f"shapley_{channels[int(rest)]}"] = value
        elif kind.startswith("channel") and kind.removeprefix("channel").isdigit():
            found[f"{channels[int(kind.removeprefix('channel'))]}_{rest}"] = value
        elif name == "number":
            found["component"] = value
        elif name not in {f"centre_{axis}" for axis in range(3)}:
            found[name] = value
    added = [
        f"{name} {value:.4g}" for name, value in zip(channels, row.shapley, strict=True) if value == value
    ]
    return {**found, "channels": ", ".join(added)}


def further(record: Mapping[str, Any]) -> list[str]:
    """Return the columns for channels and features, which differ between runs."""
    rows = record.get("rows") or [{}]
    return [name for name in rows[0] if name not in (*COLUMNS, "channels")]


def rows(record: Mapping[str, Any]) -> list[Record]:
    """Return a row for each part, or one without numbers where there are none."""
    shared = {name: value for name, value in record.items() if name != "rows"}
    return [{**shared, **row} for row in record.get("rows") or [{}]]


COLUMNS = (
    *("subject", "target", "component", "voxels", "volume"),
    *(f"centre_{axis}_mm" for axis in _AXES),
    *("score", "uncertainty", "region", "region_share", "context_share", "missing", "status", "error", "id"),
)

COMPONENTS = register(
    Kind(
        name="components",
        table=TABLE,
        section=Table,
        check=check_table,
        check_all=check_all,
        reads=("methods", "uncertainty"),
        entries=entries,
        header=header,
        work=describe,
        group=METHODS.group,
        blank={"rows": [], "asked": None},
        rows=rows,
        further=further,
        file="components",
        columns=COLUMNS,
        shown={
            "subject": "Subject",
            "target": "Target",
            "component": "Part",
            "volume": "Volume (mm³)",
            "uncertainty": "Entropy",
            "region": "Region",
            "region_share": "Share in it",
            "context_share": "Explained by what is outside",
            "channels": "Channels add",
            "missing": "Not known",
            "status": "Status",
        },
        title="Components",
        note=(
            "The face-connected parts of what the network predicts, the largest first. Entropy: the mean inside of "
            "a part. Channels: their Shapley values for the sum of the logits of a part. What could not be computed "
            "is empty, and the last column says why; components.csv also has the radiomics."
        ),
    )
)
