"""The kind of jobs "uncertainty": which parts of an answer can be trusted?

``[[uncertainty]]`` in a configuration asks for maps of how draws of the network differ: with its dropout active, or
of images that are changed a little. They are written where the image lies, with a row for each class.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from esegeta import uncertainty
from esegeta._registry import UNCERTAINTIES
from esegeta._types import Model
from esegeta.engine import check
from esegeta.engine.execution import execution, parse_memory, partial_share
from esegeta.engine.network import ModuleModel
from esegeta.run.config import catalogue
from esegeta.run.config.faults import Strict
from esegeta.run.config.schema import Call, Section
from esegeta.run.config.tables import id_and_limits, no_twins, with_files
from esegeta.run.executors.child import Context
from esegeta.run.executors.status import Status
from esegeta.run.jobs import outputs
from esegeta.run.jobs.inputs import Inputs
from esegeta.run.jobs.kinds import Beside, Job, Kind, Record, register
from esegeta.run.jobs.methods import METHODS, number, write_raw
from esegeta.run.jobs.parts import Image, reader, refusals
from esegeta.run.jobs.plan import AboutImage, Planning, contents, ended, raw_path, releases, tables_of
from esegeta.run.jobs.plan import header as plan_header
from esegeta.run.volumes import names

TABLE = "uncertainty"
FOLDER = "uncertainty"  # where the maps are, in the folder of the run
MAPS = ("mean", "variance", "entropy", "mutual_information")
TOP = 0.01  # of the voxels, whose mean entropy is told


class Estimate(Section):
    """Draws of the network, and what they are like.

    draws: "dropout" activates that of the network; "augmentation" changes the image. rate: of dropout put in, by the
    name of the module; changes: of the image, by name, with their parameters beside it; samples: how many draws;
    link: from the output to probabilities, by default "sigmoid" for one channel and "softmax" for several; map: the
    one that is drawn; id: names the entry, for a second one of the same draws; title: as figures show it. deadline:
    in seconds; memory: such as "8 GiB"; both instead of what the run says.
    """

    draws: Literal["dropout", "augmentation"] = "dropout"
    rate: dict[str, float] = Field(default_factory=dict)
    changes: list[str | Call] = Field(
        default_factory=list, json_schema_extra={"calls": "uncertainty", "family": "changes"}
    )
    samples: int = 30
    link: Literal["sigmoid", "softmax"] | None = None
    map: Literal["mean", "variance", "entropy", "mutual_information"] = "entropy"
    id: str | None = None
    title: str | None = None
    deadline: float | None = None
    memory: str | int | None = None

    @property
    def own(self) -> str:
        """Return what the entry is called."""
        return self.id or self.draws

    @property
    def calls(self) -> list[Call]:
        """Return the changes, with their parameters."""
        return [Call(name=one) if isinstance(one, str) else one for one in self.changes]


# ------------------------------------------------------------------ the table of a configuration


def change_of(call: Call, context: catalogue.Context, path: str) -> Any:
    """Return a change of the image from what a file says; None where something is wrong, which is told."""
    spec = catalogue.found(UNCERTAINTIES, call.name, path, context.faults)
    if spec is None:
        return None
    if spec.family != "changes":
        known = ", ".join(name for name, one in UNCERTAINTIES.items() if one.family == "changes")
        context.faults.add(path, "a change of the image", repr(call.name), f"There are {known}")
        return None
    settable = {n: p for n, p in catalogue.of_method(spec).items() if catalogue.settable(p)}
    made = catalogue.arguments(call.parameters, settable, context, path, spec.name)
    if not catalogue.complete(made):
        return None
    assert made is not None
    if "spacing" in spec.parameters and context.spacing is not None:
        made.setdefault("spacing", context.spacing)
    return spec.fn(**made)


def check_table(table: Estimate, path: str, faults: Strict) -> None:
    """Tell what is wrong with an entry, as far as the entry alone shows it."""
    id_and_limits(table, path, faults)
    if table.samples < 2:
        faults.add(f"{path}.samples", "at least 2", str(table.samples), "30 is usual")
    for place, rate in table.rate.items():
        if not 0 <= rate < 1:
            faults.add(f"{path}.rate.{place}", "a rate from 0 to below 1", str(rate), "0.2 is usual")
    if table.draws == "dropout" and table.changes:
        advice = 'Add draws = "augmentation"'
        faults.add(f"{path}.changes", "no changes of the image for dropout", "some", advice)
    if table.draws == "augmentation" and table.rate:
        advice = 'Add draws = "dropout"'
        faults.add(f"{path}.rate", "no rates for changed images", "some", advice)
    if table.draws == "augmentation" and not table.changes:
        advice = 'For example [{ name = "affine", degrees = 5 }]'
        faults.add(f"{path}.changes", "at least one change of the image", "none", advice)
    for i, call in enumerate(table.calls):
        change_of(call, catalogue.checking(faults)._replace(spacing=None), f"{path}.changes[{i}]")


def check_all(tables: Sequence[tuple[str, Estimate]], beside: Beside, faults: Strict) -> None:  # noqa: ARG001
    """Tell what is wrong with entries beside each other."""
    no_twins([(path, [table.own]) for path, table in tables], "id", faults, names.alike)


# ------------------------------------------------------------------ plan


def entries(planning: Planning) -> list[Job]:
    """Return a job for each image and entry."""
    return [
        _job(planning, job, image, table)
        for table in tables_of(planning.config, TABLE, Estimate)
        for image, job in planning.by_image()
    ]


def _job(planning: Planning, of: Job, image: AboutImage, table: Estimate) -> Job:
    config, key = planning.config, planning.config.run.key
    written = table.model_dump(mode="json")

    def decides() -> Record:
        return {
            "estimate": {**with_files(written, contents), "id": None, "title": None, "map": None},
            "network": planning.network,
            "image": image.decides,
            "key": key,
            "versions": releases(),
        }

    memory = table.memory if table.memory is not None else config.run.memory
    return Job(
        id=f"{image.subject}_uncertainty_{names.label(table.own)}",
        kind="uncertainty",
        keys={"subject": image.subject, "estimate": table.own},
        given={**of.given, "estimate": written, "title": table.title or table.own.replace("_", " ")},
        decides=decides,
        looks=[table.title, table.map, config.output.figures],
        deadline=table.deadline if table.deadline is not None else config.run.deadline,
        memory=None if memory is None else parse_memory("run", memory),
    )


def cost(payload: Record) -> tuple[int | None, str]:
    """Return how many values of the network it takes."""
    return int(payload["estimate"]["samples"]), "values"


def header(payload: Record) -> Record:
    """Return what a record says whatever comes of the job."""
    asked = with_files(payload["estimate"], lambda path: Path(path).name)
    return {**plan_header(payload), "asked": asked, "key": payload["key"]}


# ------------------------------------------------------------------ work


def drawn_from(section: Estimate, model: Model, context: catalogue.Context) -> Any:
    """Return the random model that an entry asks for."""
    if section.draws == "augmentation":
        changes = [change_of(call, context, f"changes[{i}]") for i, call in enumerate(section.calls)]
        return uncertainty.augmented(model, changes)
    if not isinstance(model, ModuleModel):
        got = f"{model!r} around it"
        advice = 'Use draws = "augmentation", or a method with patches = "whole"'
        raise check.refused("uncertainty", "the network itself for its dropout", got, advice)
    return uncertainty.dropout(model.module, output=model.output, rate=section.rate)


def estimate(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Draw, and write the maps with their figure and record."""
    started = time.monotonic()
    section = Estimate.model_validate(payload["estimate"])
    image, entry = inputs.image(), inputs.entry()
    make = catalogue.Context(image.prepared.spacing, entry.key, reader(image))
    with refusals():
        model = inputs.model()
        answer: Tensor = inputs.answer()
        if answer.ndim != image.x.ndim or answer.shape[1:] != image.x.shape[1:]:
            got, advice = check.describe(answer), "Use Python for answers without a grid, or on another one"
            raise check.refused("uncertainty", "an answer on the grid of the image", got, advice)
        source = drawn_from(section, model, make)
        link = section.link or ("sigmoid" if len(answer) == 1 else "softmax")
        ready = uncertainty.monte_carlo(source, samples=section.samples, link=link)
        with execution(deadline=context.seconds, progress=context.progress) as run:
            found = ready(image.x, key=entry.key)
    context.finishing(60.0)
    share = partial_share(run.events)
    folder = Path(payload["folder"])
    maps = torch.cat([getattr(found, name) for name in MAPS])
    write_raw(maps, folder / raw_path(payload["id"]))
    record = {
        "draws": source.label,
        "samples": len(found.volumes),
        "link": link,
        "channels": [len(getattr(found, name)) for name in MAPS],
        "classes": rows_of(found, image),
        "raw": raw_path(payload["id"]).as_posix(),
        "status": Status.DONE if share is None else Status.PARTIAL,
        "share_done": 1.0 if share is None else share,
        "preprocess": list(image.prepared.record),
        "events": list(run.events),
    }
    return ended(payload, shown(record, maps.cpu(), payload, image), context, started)


def rows_of(found: uncertainty.Uncertainty, image: Image) -> list[Record]:
    """Return the numbers of each class; one channel is class 1."""
    voxel = 1.0
    for length in image.prepared.spacing:
        voxel *= float(length)
    volumes = found.volumes.double() * voxel
    rows = []
    for k in range(found.volumes.shape[1]):
        entropy = found.entropy[k if len(found.entropy) > 1 else 0]
        shared = found.mutual_information[k if len(found.entropy) > 1 else 0]
        inside = found.mean[k] > 0.5 if found.volumes.shape[1] == 1 else found.mean.argmax(0) == k
        aggregating = uncertainty.aggregating
        rows.append(
            {
                "class": 1 if found.volumes.shape[1] == 1 else k,
                "volume": number(volumes[:, k].mean()),
                "volume_sd": number(volumes[:, k].std(correction=0)),
                "volume_variation": number(found.volume_variation[k]),
                "pairwise_dice": number(found.pairwise_dice[k]),
                "entropy_inside": number(aggregating.image_mean(entropy, inside)),
                "entropy_top": number(aggregating.top_fraction(entropy, TOP)),
                "mutual_information_inside": number(aggregating.image_mean(shared, inside)),
            }
        )
    return rows


def redraw(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Show maps that are there as the configuration asks for now."""
    started = time.monotonic()
    before = inputs.record(payload["id"])
    context.finishing(60.0)
    record = shown({**before, **header(payload)}, inputs.map(payload["id"]), payload, inputs.image())
    return ended(payload, record, context, started)


def shown(record: Record, maps: Tensor, payload: Record, image: Image) -> Record:
    """Write the maps where the image lies, and the figure; return the record with what was written."""
    folder, stem = Path(payload["folder"]), Path(FOLDER, payload["id"])
    each = dict(zip(MAPS, image.prepared.back(maps, "values").split(record["channels"]), strict=True))
    paths = {name: stem.with_name(f"{stem.name}_{name}.nii.gz") for name in MAPS}
    for name, path in paths.items():
        outputs.write_map(each[name], image.volume, folder / path, description=f"{payload['title']}: {name}")
    found = {**record, "maps": {name: path.as_posix() for name, path in paths.items()}, "figures": {}}
    if payload["output"]["figures"]:
        picture = stem.with_name(f"{stem.name}.png")
        chosen = payload["estimate"]["map"]
        reason = draw(each[chosen], each["mean"], image, folder / picture, payload, record)
        if reason:
            found["events"] = [*record["events"], {"event": "figures", "message": reason}]
        else:
            found["figures"] = {"planes": picture.as_posix()}
    return found


def draw(map: Tensor, mean: Tensor, image: Image, path: Path, payload: Record, record: Record) -> str | None:
    """Draw a map over the image, with the outline of the mean answer; say why if that cannot be."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return outputs.NO_FIGURES
    from esegeta import plot

    volume = image.volume
    chosen = payload["estimate"]["map"].replace("_", " ")
    outline = mean[0] > 0.5 if len(mean) == 1 else mean.argmax(0) > 0
    figure = plot.overlay(
        map.mean(0, keepdim=True) if len(map) > 1 else map,
        volume.data,
        volume.spacing,
        volume.affine,
        title=f"{chosen.capitalize()}: {payload['title']}",
        subtitle=f"{payload['keys']['subject']}, {record['samples']} draws: {record['draws']}",
        unit=chosen,
        signed=False,
        outline={"mean answer": outline} if bool(outline.any()) else None,
    )
    outputs.write_bytes(path, plot.png(figure))
    return None


def written_files(record: Mapping[str, Any]) -> list[str]:
    """Return the files that belong to a record alone, relative to the folder of the run."""
    maps, figures = record.get("maps") or {}, record.get("figures") or {}
    return [name for name in (*maps.values(), record.get("raw"), *figures.values()) if name]


def rows(record: Mapping[str, Any]) -> list[Record]:
    """Return a row for each class."""
    shared = {name: value for name, value in record.items() if name != "classes"}
    return [{**shared, **row} for row in record.get("classes") or [{}]]


UNCERTAINTY = register(
    Kind(
        name="uncertainty",
        table=TABLE,
        section=Estimate,
        many=True,
        check=check_table,
        check_all=check_all,
        reads=("methods",),
        entries=entries,
        header=header,
        work=estimate,
        redraw=redraw,
        cost=cost,
        group=METHODS.group,
        written=written_files,
        stem=lambda job: Path(FOLDER, job.id),
        blank={"draws": None, "samples": None, "classes": None, "maps": None, "raw": None, "figures": None},
        rows=rows,
        file="uncertainty",
        columns=(
            *("subject", "estimate", "class", "draws", "samples", "volume", "volume_sd", "volume_variation"),
            *("pairwise_dice", "entropy_inside", "entropy_top", "mutual_information_inside"),
            *("status", "error", "seconds", "id"),
        ),
        shown={
            "subject": "Subject",
            "estimate": "Draws",
            "class": "Class",
            "samples": "Number",
            "volume": "Volume (mm³)",
            "volume_sd": "SD",
            "volume_variation": "SD / mean",
            "pairwise_dice": "Dice of pairs",
            "entropy_inside": "Entropy inside",
            "entropy_top": "Entropy, top 1 %",
            "mutual_information_inside": "Of it between draws",
            "status": "Status",
        },
        title="Uncertainty",
        note=(
            "How draws of the network differ. Volumes are those of the draws' masks; entropies in nats, inside the "
            "mean answer, and of the most uncertain 1 % of voxels. Dropout that was put in is not Bayesian."
        ),
    )
)
