"""The kind of jobs "dreams": what would the network like to see?

``[[dreams]]`` in a configuration asks for them. A dream from noise needs no image but its grid and is made once, on
that of the first image; one from an image is made for each. It is written where the image lies.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from esegeta import dreams
from esegeta._registry import OBJECTIVES, RECIPES, Spec
from esegeta._types import Score
from esegeta.engine.execution import execution, partial_share
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
from esegeta.run.jobs.plan import AboutImage, Planning, contents, ended, limits, raw_path, releases, tables_of
from esegeta.run.jobs.plan import header as plan_header
from esegeta.run.volumes import names

TABLE = "dreams"
FOLDER = "dreams"  # where they are, in the folder of the run
GIVEN = ("model", "image")  # of objectives, by the run


class Dream(Section):
    """A dream of the network.

    objective: what it has more and more of, with its parameters beside the name; recipe: how it is made; parameters:
    of the recipe; id: names the entry, for a second one of the same objective. start: "noise" around ``mean`` with
    deviation ``sigma``, or the "image".
    """

    objective: str | Call
    recipe: str = "natekar"
    id: str | None = None
    title: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    start: Literal["noise", "image"] = "noise"
    mean: float = 0.0
    sigma: float = 0.01
    deadline: float | None = None
    memory: str | int | None = None

    @property
    def climbed(self) -> Call:
        """Return the objective, with its parameters."""
        return Call(name=self.objective) if isinstance(self.objective, str) else self.objective

    @property
    def own(self) -> str:
        """Return what the entry is called."""
        return self.id or self.climbed.name


# ------------------------------------------------------------------ the table of a configuration


def settings(spec: Spec) -> dict[str, catalogue.Parameter]:
    """Return the parameters of an objective or a recipe that a file can set.

    >>> list(settings(OBJECTIVES["channel"])), list(settings(RECIPES["layer_visualisation"]))
    (['place', 'channel'], ['steps'])
    """
    known = catalogue.of_method(spec)
    return {name: p for name, p in known.items() if name not in GIVEN and catalogue.settable(p)}


def check_table(table: Dream, path: str, faults: Strict) -> None:
    """Tell what is wrong with an entry, as far as the entry alone shows it."""
    id_and_limits(table, path, faults)
    if table.sigma < 0:
        faults.add(f"{path}.sigma", "a deviation >= 0", str(table.sigma), "0.01 is usual")
    asked = (
        ("objective", OBJECTIVES, table.climbed.name, table.climbed.parameters),
        ("recipe", RECIPES, table.recipe, table.parameters),
    )
    for key, registry, name, given in asked:
        spec = catalogue.found(registry, name, f"{path}.{key}", faults)
        if spec is None:
            continue
        if spec.name in ("diversity", "alignment"):
            advice = "They are for sets of images, which Python dreams"
            faults.add(f"{path}.{key}", "an objective of one image", repr(name), advice)
        else:
            where = f"{path}.parameters" if key == "recipe" else f"{path}.objective"
            catalogue.arguments(given, settings(spec), catalogue.checking(faults), where, spec.name)


def check_all(tables: Sequence[tuple[str, Dream]], beside: Beside, faults: Strict) -> None:  # noqa: ARG001
    """Tell what is wrong with entries beside each other."""
    no_twins([(path, [table.own]) for path, table in tables], "id", faults, names.alike)


# ------------------------------------------------------------------ plan


def entries(planning: Planning) -> list[Job]:
    """Return a job for each dream from noise, and for each image and dream from an image."""
    found = []
    for table in tables_of(planning.config, TABLE, Dream):
        few = None if table.start == "image" else 1
        found += [_job(planning, job, image, table) for image, job in planning.by_image()[:few]]
    return found


def _job(planning: Planning, of: Job, image: AboutImage, table: Dream) -> Job:
    config, key = planning.config, planning.config.run.key
    written = table.model_dump(mode="json")
    parts = with_files([table.climbed.model_dump(mode="json"), table.parameters], contents)

    def decides() -> Record:  # a dream from noise depends on the grid of the image, which its files decide
        return {
            "dream": {**written, "objective": parts[0], "parameters": parts[1], "id": None, "title": None},
            "network": planning.network,
            "image": image.decides,
            "key": key,
            "precision": "float32",
            "versions": releases(),
        }

    title = table.title or f"{table.own.replace('_', ' ')}, {table.recipe.replace('_', ' ')}"
    return Job(
        id=f"{image.subject}_dream_{names.label(table.own)}",
        kind="dreams",
        keys={"subject": image.subject, "dream": table.own},
        given={**of.given, "dream": written, "title": title},
        decides=decides,
        looks=[table.title, config.output.figures],
        **limits(table, config.run),
    )


def cost(payload: Record) -> tuple[int | None, str]:
    """Return how many gradients a dream takes."""
    section = Dream.model_validate(payload["dream"])
    return RECIPES.find(section.recipe).cost(**section.parameters).gradients, "gradients"


def header(payload: Record) -> Record:
    """Return what a record says whatever comes of the job."""
    section = Dream.model_validate(payload["dream"])
    return {
        **plan_header(payload),
        "objective": section.climbed.name,
        "recipe": section.recipe,
        "asked": with_files(payload["dream"], lambda path: Path(path).name),
        "key": payload["key"],
    }


# ------------------------------------------------------------------ work


def objective_of(section: Dream, model: Any, image: Image, context: catalogue.Context) -> Score:
    """Return what is climbed."""
    spec = OBJECTIVES.find(section.climbed.name)
    made = (
        catalogue.arguments(section.climbed.parameters, settings(spec), context, "objective", spec.name) or {}
    )
    own = catalogue.of_method(spec)
    given = {name: value for name, value in (("model", model), ("image", image.x)) if name in own}
    return spec.fn(**given, **made)


def dream(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Dream, and write what came with its figures and its record."""
    started = time.monotonic()
    section = Dream.model_validate(payload["dream"])
    image, entry = inputs.image(), inputs.entry()
    make = catalogue.Context(image.prepared.spacing, entry.key, reader(image))
    recipe = RECIPES.find(section.recipe)
    with refusals():
        objective = objective_of(section, inputs.model(), image, make)
        own = catalogue.arguments(section.parameters, settings(recipe), make, "parameters", recipe.name) or {}
        if "spacing" in recipe.parameters:
            own.setdefault("spacing", image.prepared.spacing)
        start: Any = image.x
        if section.start == "noise":
            shape = tuple(image.x.shape)
            start = dreams.starts.noise(shape, mean=section.mean, sigma=section.sigma, device=image.x.device)
        ready = recipe.fn(objective, start, **own)
    with refusals(), execution(deadline=context.seconds, progress=context.progress) as run:
        found = ready(key=entry.key)
    context.finishing(60.0)
    share = partial_share(run.events)
    folder = Path(payload["folder"])
    write_raw(found.image, folder / raw_path(payload["id"]))
    record = {
        "value": number(found.value),
        "steps": int(found.taken),
        "min": number(found.image.min()),
        "max": number(found.image.max()),
        "raw": raw_path(payload["id"]).as_posix(),
        "status": Status.DONE if share is None else Status.PARTIAL,
        "share_done": 1.0 if share is None else share,
        "preprocess": list(image.prepared.record),
        "events": list(run.events),
    }
    return ended(payload, shown(record, found.image.cpu(), payload, image), context, started)


def redraw(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Show a dream that is there as the configuration asks for now."""
    started = time.monotonic()
    before = inputs.record(payload["id"])
    context.finishing(60.0)
    record = shown({**before, **header(payload)}, inputs.map(payload["id"]), payload, inputs.image())
    return ended(payload, record, context, started)


def shown(record: Record, values: Tensor, payload: Record, image: Image) -> Record:
    """Write a dream where the image lies, and its figure; return the record with what was written."""
    folder, stem = Path(payload["folder"]), Path(FOLDER, payload["id"])
    whole = image.prepared.back(values, "values")
    path = stem.with_name(f"{stem.name}_dream.nii.gz")
    outputs.write_map(whole, image.volume, folder / path, description=payload["title"])
    found = {**record, "image": path.as_posix(), "figures": {}}
    if payload["output"]["figures"]:
        picture = stem.with_name(f"{stem.name}_dream.png")
        said = draw(whole, image, folder / picture, payload, record)
        if said:
            found["events"] = [*record["events"], {"event": "figures", "message": said}]
        else:
            found["figures"] = {"planes": picture.as_posix()}
    return found


def whose(payload: Record, record: Record) -> list[str]:
    """Return what a dream is of: where it began, what it was made to be, and how far it came.

    >>> dream = Dream(objective={"name": "channel", "place": "bottom", "channel": 2})
    >>> payload = {"keys": {"subject": "sub-1"}, "dream": dream.model_dump(mode="json")}
    >>> whose(payload, {"steps": 8, "value": 3.0})
    ['noise on the grid of sub-1', 'channel (place bottom, channel 2)', '8 steps', 'value 3']
    """
    subject, dream = payload["keys"]["subject"], Dream.model_validate(payload["dream"])
    asked = dream.climbed
    more = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in asked.parameters.items())
    return [
        str(subject) if dream.start == "image" else f"{dream.start} on the grid of {subject}",
        f"{asked.name} ({more})" if more else asked.name,
        f"{record['steps']} steps",
        f"value {record['value']:.4g}",
    ]


def draw(whole: Tensor, image: Image, path: Path, payload: Record, record: Record) -> str | None:
    """Draw the planes of a dream; say why if that cannot be."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return outputs.NO_FIGURES
    from esegeta import plot

    volume = image.volume
    figure = plot.dream(
        whole,
        volume.spacing,
        volume.affine,
        title=f"Dream: {payload['title']}",
        subtitle=" · ".join(whose(payload, record)),
    )
    outputs.write_bytes(path, plot.png(figure))
    return None


def written_files(record: Mapping[str, Any]) -> list[str]:
    """Return the files that belong to a record alone, relative to the folder of the run."""
    alone = [record.get("image"), record.get("raw"), *(record.get("figures") or {}).values()]
    return [name for name in alone if name]


DREAMS = register(
    Kind(
        name="dreams",
        table=TABLE,
        section=Dream,
        many=True,
        check=check_table,
        check_all=check_all,
        reads=("methods",),
        entries=entries,
        header=header,
        work=dream,
        redraw=redraw,
        cost=cost,
        group=METHODS.group,
        written=written_files,
        stem=lambda job: Path(FOLDER, job.id),
        blank=dict.fromkeys(("value", "steps", "min", "max", "image", "raw", "figures")),
        file="dreams",
        columns=(
            *("subject", "dream", "objective", "recipe", "value", "steps", "min", "max"),
            *("image", "status", "error", "seconds", "id"),
        ),
        shown={
            "subject": "Grid of",
            "dream": "Dream",
            "objective": "Objective",
            "recipe": "Recipe",
            "value": "Value",
            "steps": "Steps",
            "min": "Smallest",
            "max": "Largest",
            "status": "Status",
            "seconds": "Seconds",
        },
        title="Dreams",
        note="Images that the network answers to most, on the grid of a scan. Value: of the objective at the end.",
    )
)
