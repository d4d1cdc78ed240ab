"""The kind of jobs "dissection": which channel of the network sees which structure, over all images of a run?

``[dissection]`` in a configuration asks for one job over all subjects. It reads image after image; structures are
what the network predicts, the reference, label maps, or classes of intensity.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from esegeta import dissection
from esegeta.engine import check
from esegeta.run.config.faults import Strict, message_of
from esegeta.run.config.schema import Config, Section
from esegeta.run.config.tables import own_limits, with_files
from esegeta.run.executors.child import Context
from esegeta.run.jobs import outputs
from esegeta.run.jobs.inputs import Inputs
from esegeta.run.jobs.kinds import Beside, Job, Kind, Record, digest, register
from esegeta.run.jobs.methods import number
from esegeta.run.jobs.parts import Image, labels_of, refusals
from esegeta.run.jobs.plan import Planning, contents, ended, header, limits, releases, tables_of
from esegeta.run.volumes import labels
from esegeta.run.volumes.reading import UnreadableInput

TABLE = "dissection"
OWN = ("prediction", "reference", "tissues")
WITHIN = ("all", "prediction", "reference")
CLEAN = {"none": None, "despeckle": dissection.despeckle, "largest": dissection.largest}
MOST_EXCITING = 3  # images that are named for each channel
_PASSES = 3  # over the data
_SHOWN = ("title", "deadline", "memory")


class Dissection(Section):
    """Which channels of which layers see which structures.

    places: of the layers. concepts: "prediction" and "reference" (of each target), "tissues" (classes of intensity
    inside of ``within``), and label maps: a file for all subjects, or a pattern of a file for each. names: of labels,
    and then of those alone. grid: of a label map on another grid than the image, "same" refuses it, "nearest" takes
    the nearest label. within: where voxels count: "all", "prediction" or "reference" of any target, or a mask.
    tissues: how many classes of intensity; quantile: the share of values of a channel that are on; clean: masks of
    channels, before they are compared; null: what is random about the structures of a permutation; permutations: how
    many; least: the overlap of a detector; level: of its p-value; correction: of p-values for many channels and
    structures. They are as for ``esegeta.dissection.dissect`` and ``Dissection.rows``.
    """

    places: list[str] = Field(min_length=1)
    concepts: list[str] = Field(default=["reference"], min_length=1)
    names: dict[str, str] = Field(default={})
    grid: Literal["same", "nearest"] = "same"
    within: str = "all"
    tissues: int = 3
    quantile: float = 0.01
    clean: Literal["none", "despeckle", "largest"] = "none"
    null: Literal["swap", "roll", "none"] = "swap"
    permutations: int = 1000
    least: float = 0.04
    level: float = 0.05
    correction: Literal["max", "holm", "bh"] = "max"
    title: str | None = None
    deadline: float | None = None
    memory: str | int | None = None

    def placed(self, place: Callable[[str], str]) -> Self:
        """Return the same with absolute paths."""
        found = [one if one in OWN else place(one) for one in self.concepts]
        within = self.within if self.within in WITHIN else place(self.within)
        return self.model_copy(update={"concepts": found, "within": within})


# ------------------------------------------------------------------ the table of a configuration


def check_table(table: Dissection, path: str, faults: Strict) -> None:
    """Tell what is wrong with the table, as far as it alone shows it."""
    own_limits(table, path, faults)
    if not 0 < table.quantile < 1:
        got, advice = str(table.quantile), "0.01 means that one voxel in a hundred is on"
        faults.add(f"{path}.quantile", "a number between 0 and 1", got, advice)
    for name, least in (("permutations", 1), ("tissues", 2)):
        if getattr(table, name) < least:
            faults.add(f"{path}.{name}", f"at least {least}", str(getattr(table, name)), "Choose more")
    for name in ("least", "level"):
        if not 0 <= getattr(table, name) <= 1:
            faults.add(f"{path}.{name}", "a number from 0 to 1", str(getattr(table, name)), "Change it")
    for label in table.names:
        if not label.removeprefix("-").isdigit():
            faults.add(
                f"{path}.names.{label}", "a label, a whole number", repr(label), "As in { 1 = 'white' }"
            )
    if "tissues" in table.concepts and table.within == "all":
        advice = 'Write within = "prediction", or a mask of the brain: air is no tissue'
        faults.add(f"{path}.within", "a region for classes of intensity", "'all'", advice)


def check_all(tables: Sequence[tuple[str, Dissection]], beside: Beside, faults: Strict) -> None:
    """Tell what is wrong with the table beside the others."""
    for path, table in tables:
        if "reference" in (*table.concepts, table.within) and not beside.reference:
            advice = 'Add [reference] with its files, or write concepts = ["prediction"]'
            faults.add(f"{path}.concepts", "a table [reference] for its concepts", "none", advice)


# ------------------------------------------------------------------ plan


def entries(planning: Planning) -> list[Job]:
    """Return one job for all images, if the configuration has the table."""
    return [_job(planning, table) for table in tables_of(planning.config, TABLE, Dissection)]


def _job(planning: Planning, table: Dissection) -> Job:
    config = planning.config
    if len(planning.images) < 2:
        got, advice = str(len(planning.images)), "A quantile and a permutation over a data set need more"
        raise check.refused("dissection", "at least two images", got, advice)
    files = {
        one: _files(one, planning) for one in (*table.concepts, table.within) if one not in (*OWN, *WITHIN)
    }
    about = {subject: list(own.values()) for subject, own in planning.by_target().items()}
    written = table.model_dump(mode="json")

    def images() -> list[Record]:
        return [
            {
                "subject": image.subject,
                "about": {job.target: job.payload for job in about[image.subject]},
                "files": {one: str(own[image.subject]) for one, own in files.items() if image.subject in own},
            }
            for image in planning.images
        ]

    def decides() -> Record:
        return {
            "dissection": {name: value for name, value in written.items() if name not in _SHOWN},
            "network": planning.network,
            "images": [image.decides for image in planning.images],
            "subjects": [image.subject for image in planning.images],
            "targets": [
                with_files(job.given["target"], contents) for job in about[planning.images[0].subject]
            ],
            "references": [
                (job.given["reference"]() or {}).get("decides")
                for image in planning.images
                for job in about[image.subject]
            ],
            "files": [digest({s: contents(path) for s, path in own.items()}) for own in files.values()],
            "key": config.run.key,
            "versions": releases(),
        }

    return Job(
        id="dissection",
        kind="dissection",
        keys={},
        given={
            "folder": planning.folder,
            "dissection": written,
            "images": images,
            "key": config.run.key,
            "figures": config.output.figures,
            "title": table.title or "Dissection",
        },
        decides=decides,
        looks=[table.title, config.output.figures],
        **limits(table, config.run),
    )


def _files(given: str, planning: Planning) -> dict[str, Path]:
    try:
        return labels.of_subjects(given, [i.subject for i in planning.images], planning.config.input.subject)
    except UnreadableInput as error:
        raise check.Refused(f"dissection.concepts: {message_of(error)}") from error


# ------------------------------------------------------------------ work


class Subject(NamedTuple):
    """An image of the run: its name, its inputs for each target, and the label map of each concept that is a file."""

    name: str
    inputs: Mapping[str, Inputs]
    files: Mapping[str, str]

    @property
    def image(self) -> Image:
        """Return the image."""
        return next(iter(self.inputs.values())).image()


def subjects_of(payload: Record, context: Context) -> tuple[list[Subject], list[Record]]:
    """Return the images that have all label maps that are asked for, and what to say of the others."""
    found, events = [], []
    for one in payload["images"]:
        asked = payload["dissection"]
        wanted = [name for name in (*asked["concepts"], asked["within"]) if name not in (*OWN, *WITHIN)]
        lost = [labels.called(name) for name in wanted if name not in one["files"]]
        inputs = {target: Inputs(whole(about), context) for target, about in one["about"].items()}
        subject = Subject(one["subject"], inputs, one["files"])
        if "reference" in (*asked["concepts"], asked["within"]):
            lost += ["the reference"] * any(
                not (about["reference"] or {}).get("file") for about in one["about"].values()
            )
        if lost:
            message = f"{subject.name} is left out: there is no label map of it among {', '.join(lost)}."
            events.append({"event": "left_out", "message": message})
        else:
            found.append(subject)
    return found, events


def whole(payload: Record) -> Record:
    """Return the same about the image as a whole: places are those of the network itself, not of its patches."""
    return {**payload, "method": {**payload["method"], "patches": "whole"}}


def named_labels(subjects: Sequence[Subject], section: Dissection) -> dict[str, dict[int, str]]:
    """Return for each label map the labels that are concepts, with their names: of all images together.

    A label that is named and that no label map has is refused.
    """
    found: dict[str, dict[int, str]] = {}
    there: set[int] = set()
    for given in section.concepts:
        if given in OWN:
            continue
        paths = {subject.files[given] for subject in subjects}
        numbers = {int(n) for path in paths for n in labels.read(path).data.unique()} - {0}
        there |= numbers
        called = labels.called(given)
        found[given] = {
            n: section.names.get(str(n), f"{called} {n}")
            for n in sorted(numbers)
            if not section.names or str(n) in section.names
        }
    if found:
        for label, name in section.names.items():
            if int(label) not in there:
                expected = f"the label {label} of {name!r} in one of the label maps"
                known = ", ".join(map(str, sorted(there)[:20])) or "nothing but 0"
                raise check.refused("dissection.names", expected, f"{known} in them", "Correct the label")
    return found


def concepts_of(
    subject: Subject, section: Dissection, numbers: Mapping[str, Mapping[int, str]], within: Tensor | None
) -> dict[str, Tensor]:
    """Return the masks of an image by the names of their concepts, on the grid of the network."""
    found: dict[str, Tensor] = {}
    for given in section.concepts:
        if given in ("prediction", "reference"):
            for target, inputs in subject.inputs.items():
                found[f"{target} ({given})"] = seen(inputs, given, target)
        elif given == "tissues":
            assert within is not None
            classes = dissection.tissues(subject.image.x.cpu(), within, classes=section.tissues)
            names = {n + 1: f"tissue {n + 1}" for n in range(section.tissues)}
            found |= dissection.labelled(classes, names)
        else:
            map = _labels(subject, given, section)
            found |= dissection.labelled(map, numbers[given])
    return found


def _labels(subject: Subject, given: str, section: Dissection) -> Tensor:
    path = Path(subject.files[given])
    return labels_of(path, subject.image, section.grid, f"{TABLE}.grid", to="network")


def seen(inputs: Inputs, given: str, target: str) -> Tensor:
    """Return where the network, or the reference, sees a target, on the grid of the network."""
    mask = inputs.prediction("network") if given == "prediction" else inputs.reference("network")
    if mask is None:
        expected = f"a mask of {target!r} on the grid of the image as {given}"
        advice = "Name a class in the target, or label maps as concepts"
        raise check.refused("dissection.concepts", expected, "none", advice)
    return mask


def within_of(subject: Subject, section: Dissection) -> Tensor | None:
    """Return where voxels of an image count, None for everywhere."""
    if section.within == "all":
        return None
    if section.within in WITHIN:
        masks = [seen(inputs, section.within, target) for target, inputs in subject.inputs.items()]
        return torch.stack(masks).any(0)
    return _labels(subject, section.within, section) != 0


def items(subjects: Sequence[Subject], section: Dissection, context: Context) -> Callable[[], Iterator[Any]]:
    """Return the data set, which is read image by image each time."""
    numbers = named_labels(subjects, section)
    done = 0

    def read() -> Iterator[Any]:
        nonlocal done
        for subject in subjects:
            within = within_of(subject, section)
            concepts = concepts_of(subject, section, numbers, within)
            yield (subject.image.x, concepts) if within is None else (subject.image.x, concepts, within)
            done += 1
            context.progress("images", min(1.0, done / (_PASSES * len(subjects))))

    return read


def dissect(payload: Record, inputs: Inputs, context: Context) -> Record:  # noqa: ARG001
    """Dissect the network, and write the figure and the record."""
    started = time.monotonic()
    section = Dissection.model_validate(payload["dissection"])
    subjects, events = subjects_of(payload, context)
    if len(subjects) < 2:
        got = f"{len(subjects)}; {' '.join(event['message'] for event in events)}".rstrip("; ")
        advice = "A quantile and a permutation over a data set need more"
        raise check.refused("dissection", "at least two images with all of their label maps", got, advice)
    with refusals():
        model = next(iter(subjects[0].inputs.values())).model()
        ready = dissection.dissect(
            model,
            places=section.places,
            quantile=section.quantile,
            clean=CLEAN[section.clean],
            null=section.null,
            permutations=section.permutations,
        )
        found = ready(items(subjects, section, context), key=payload["key"])
    context.finishing(60.0)
    absent = [name for c, name in enumerate(found.concepts) if bool(found.iou[:, c].isnan().all())]
    if absent:
        message = f"No image has {', '.join(absent)}: its overlap is not known."
        events.append({"event": "absent", "message": message})
    asked = {"least": section.least, "level": section.level, "correction": section.correction}
    record = {
        "rows": rows_of(found, [subject.name for subject in subjects], asked),
        "subjects": [subject.name for subject in subjects],
        "concepts": list(found.concepts),
        "channels": len(found.channels),
        "asked": with_files(payload["dissection"], lambda path: Path(path).name),
        "figures": {},
        "events": events,
    }
    if payload["figures"]:
        path = Path("dissection", "dissection_detectors.png")
        reason = draw(found, Path(payload["folder"]) / path, payload["title"], asked)
        if reason:
            events.append({"event": "figures", "message": reason})
        else:
            record["figures"] = {"detectors": path.as_posix()}
    return ended(payload, record, context, started)


def rows_of(found: dissection.Dissection, names: Sequence[str], asked: Mapping[str, Any]) -> list[Record]:
    """Return a row for each channel and concept, the largest overlap first; what is not known is None.

    names: of the images, of which each row has those that excite the channel most.
    """
    order = found.peaks.sort(dim=0, descending=True, stable=True).indices[:MOST_EXCITING]
    exciting = {
        which: ", ".join(names[i] for i in order[:, k].tolist()) for k, which in enumerate(found.channels)
    }
    rows = []
    for row in found.rows(**asked):
        known = {name: number(v) if isinstance(v, float) else v for name, v in row._asdict().items()}
        rows.append({**known, "exciting": exciting[row.place, row.channel]})
    return sorted(rows, key=lambda row: (not row["detector"], -1.0 if row["iou"] is None else -row["iou"]))


def draw(found: dissection.Dissection, path: Path, title: str, asked: Mapping[str, Any]) -> str | None:
    """Draw the best channel of each layer for each concept; say why if that cannot be."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return outputs.NO_FIGURES
    from esegeta import plot

    outputs.write_bytes(path, plot.png(plot.detectors(found, title=title, **asked)))
    return None


def written_files(record: Mapping[str, Any]) -> list[str]:
    """Return the files that belong to a record alone, relative to the folder of the run."""
    return [name for name in (record.get("figures") or {}).values() if name]


def rows(record: Mapping[str, Any]) -> list[Record]:
    """Return the rows of a record, or one without numbers where there are none."""
    shared = {name: value for name, value in record.items() if name not in ("rows", "channels")}
    return [{**shared, **row} for row in record.get("rows") or [{}]]


def asked_of(config: Config) -> Dissection:
    """Return the table of a configuration, which has to have one."""
    for table in tables_of(config, TABLE, Dissection):
        return table
    advice = 'Add [dissection] with places = ["..."]; esegeta places lists them'
    raise check.refused("dissect", "a configuration with a table [dissection]", "none", advice)


DISSECTION = register(
    Kind(
        name="dissection",
        table=TABLE,
        section=Dissection,
        check=check_table,
        check_all=check_all,
        reads=("methods",),
        entries=entries,
        header=header,
        work=dissect,
        cost=lambda payload: (_PASSES * len(payload["images"]), "values"),
        written=written_files,
        stem=lambda job: Path("dissection", job.id),
        blank={"rows": [], "subjects": [], "concepts": [], "channels": None, "figures": None, "asked": None},
        rows=rows,
        file="dissection",
        columns=(
            *("place", "channel", "concept", "threshold", "iou", "image_iou", "images", "p", "adjusted"),
            *("detector", "exciting", "status", "error", "id"),
        ),
        shown={
            "place": "Place",
            "channel": "Channel",
            "concept": "Concept",
            "iou": "IoU",
            "image_iou": "Mean of images",
            "images": "Images",
            "p": "p",
            "adjusted": "p adjusted",
            "detector": "Detector",
            "exciting": "Most excited by",
            "status": "Status",
        },
        title="Dissection",
        note=(
            "Which channel is on where a structure is. IoU: over all images together; mean of images: over those "
            "that have the structure. p: of a permutation test; adjusted: for all channels and structures together. "
            "A detector has both an overlap and an adjusted p as asked for; the largest overlaps come first."
        ),
    )
)
