"""The kind of jobs "figures": all pictures of a subject, drawn from the maps on disk when the numbers are there.

Pictures take longer than most maps. They are drawn last, one job for each subject, and of many subjects only for
the first ones; ``esegeta report FOLDER`` draws the others. Another setting of ``[figures]`` computes no map anew.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from nibabel.nifti1 import Nifti1Image
from pydantic import Field
from torch import Tensor

from esegeta.plot.canvas import numeral
from esegeta.run.config.schema import Section
from esegeta.run.executors.child import Context
from esegeta.run.jobs import marks, outputs
from esegeta.run.jobs.inputs import Inputs
from esegeta.run.jobs.kinds import Job, Kind, Record, register
from esegeta.run.jobs.plan import Planning, ended, releases
from esegeta.run.volumes import names, pictures

TABLE = "figures"


Picture = Literal["overlay", "projections", "montage", "channels"]
KINDS: tuple[Picture, ...] = ("overlay", "projections", "montage", "channels")
SOME = 12  # maps beside each other in one picture


class Figures(Section):
    """How pictures are drawn.

    maps: of how many maps a run draws them; of the subjects beyond, on demand. kinds: which pictures of each map.
    colours: of what speaks for the target; mask: where a map is shown: "otsu" for where there is something in the
    scan (a flat picture is shown as it is).
    outline: what is gone round. zoom: to what, or the voxels from where to where for each axis.
    """

    maps: int | Literal["all"] = 40
    kinds: list[Picture] = Field(default=list(KINDS))
    colours: Literal["orange", "red"] = "orange"
    mask: Literal["otsu", "prediction", "reference", "none"] = "otsu"
    outline: list[Literal["prediction", "reference"]] = Field(default=["prediction", "reference"])
    zoom: Literal["none", "outline", "mask"] | list[list[int]] = "none"


class Drawn(NamedTuple):
    """A volume of the folder of a run: ``(C,*S)``, and its affine, None for a picture, which lies nowhere in mm."""

    values: Tensor
    affine: np.ndarray | None


def of_file(path: Path) -> Drawn:
    """Return what ``outputs.write_map`` has written."""
    image = Nifti1Image.from_filename(path)
    values = np.asarray(image.dataobj)
    values = np.moveaxis(values, -1, 0) if values.ndim == 4 else values[None]
    affine = np.eye(4) if image.affine is None else np.asarray(image.affine, dtype=np.float64)
    flat = np.array_equal(affine, pictures.AFFINE)
    least = 2 if flat else 1
    while values.ndim - 1 > least and values.shape[-1] == 1 and (flat or values.shape[-2] == 1):
        values = values[..., 0]
    return Drawn(torch.from_numpy(np.ascontiguousarray(values)), None if flat else affine)


def draw(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Draw the figures of every map of a subject; without matplotlib there are none, and that is said."""
    started = time.monotonic()
    folder = Path(payload["folder"])
    made = dict(inputs.many())
    events: list[Record] = []
    found: dict[str, dict[str, str]] = {}
    together: list[Record] = []
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        events.append({"event": "figures", "message": outputs.NO_FIGURES})
    else:
        how = Figures.model_validate(payload["figures"])
        shown = {job: _shown(folder, job, record, inputs, how) for job, record in made.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for count, (job, one) in enumerate(shown.items()):
                found[job] = _of_map(folder, one, how)
                context.progress("figures", (count + 1) / len(made))
            together = _together(folder, list(shown.values()))
    record = {"figures": found, "together": together, "events": events}
    return ended(payload, record, context, started)


class Shown(NamedTuple):
    """A map with all that is drawn of it; ``look`` is what the functions of ``esegeta.plot`` are told of it."""

    record: Mapping[str, Any]
    map: Tensor
    anatomy: Tensor
    affine: np.ndarray | None
    look: dict[str, Any]


def _shown(folder: Path, job: str, record: Mapping[str, Any], inputs: Inputs, how: Figures) -> Shown:
    anatomy = of_file(folder / record["anatomy"])
    map = of_file(folder / record["map"]).values if record.get("map") else inputs.map(job, "file")
    grid = tuple(anatomy.values.shape[1:])
    masks = {}
    for name in ("prediction", "reference"):
        if record.get(name):
            mask = of_file(folder / record[name]).values[0]
            if tuple(mask.shape) == grid and bool(mask.any()):
                masks[name] = mask
    look: dict[str, Any] = {
        "colours": how.colours,
        "outline": {n: masks[n] for n in how.outline if n in masks},
    }
    if how.mask in masks:
        look["mask"] = masks[how.mask]
    elif how.mask == "otsu" and anatomy.affine is not None and not _same_everywhere(map):
        look["mask"] = "otsu"
    if how.zoom != "none":
        look["box"] = how.zoom
    return Shown(record, map, anatomy.values, anatomy.affine, look)


def _same_everywhere(map: Tensor) -> bool:
    """Check whether each channel has one value: then nothing in the air is noise."""
    flat = map.flatten(1)
    return bool((flat == flat[:, :1]).all())


def facts(record: Mapping[str, Any]) -> str:
    """Return whose a map is and what came of it, for below the title of a picture.

    >>> print(facts({"subject": "sub-1", "target": "brain", "reducer": "logit", "name": "saliency", "score": 2.0}))
    sub-1 · brain (logit) · saliency · score 2
    """
    where = f" at {record['place']}" if record.get("place") else ""
    said = [
        str(record["subject"]),
        f"{record['target']} ({record['reducer']})" if record.get("reducer") else str(record["target"]),
        f"{record.get('name') or record['method']}{where}",
    ]
    score, residual, difference = (record.get(name) for name in ("score", "residual", "difference"))
    if score is not None:
        said.append(f"score {numeral(score)}")
    if residual is not None:
        share = f" ({100 * abs(residual / difference):.2g} % of the difference)" if difference else ""
        said.append(f"residual {numeral(residual)}{share}")
    return " · ".join(said)


def in_common(records: Sequence[Mapping[str, Any]]) -> str:
    """Return what holds for all of several maps, for below the title of their picture.

    >>> one = {"subject": "sub-1", "target": "brain", "method": "rise", "score": 2.0}
    >>> in_common([one, {**one, "method": "lime"}]), in_common([one, {**one, "target": "skull", "score": 3.0}])
    ('sub-1 · brain · score 2', 'sub-1 · rise')
    """
    alike = lambda name: len({repr(record.get(name)) for record in records}) == 1
    one = records[0]
    said = [str(one["subject"])] if alike("subject") else []
    if alike("target") and alike("reducer"):
        said.append(f"{one['target']} ({one['reducer']})" if one.get("reducer") else str(one["target"]))
    own = [str(record.get("name") or record["method"]) for record in records]
    if len(set(own)) == 1:
        said.append(f"{own[0]} at {one['place']}" if one.get("place") and alike("place") else own[0])
    if alike("score") and one.get("score") is not None:
        said.append(f"score {numeral(one['score'])}")
    return " · ".join(said)


def _of_map(folder: Path, shown: Shown, how: Figures) -> dict[str, str]:
    from esegeta import plot

    record = shown.record
    title = marks.titled(f"{record['title']} ({record['target']})", marks.marks(record))
    stem = folder / names.statmap(record["subject"], record["target"], record["method"], "")
    channels = [one["channel"] for one in record.get("channels") or ()]
    written = plot.save_figures(
        shown.map,
        shown.anatomy,
        None,
        stem,
        title,
        shown.affine,
        kinds=how.kinds,
        names=channels if len(channels) == len(shown.map) else None,
        subtitle=facts(record),
        **shown.look,
    )
    return {kind: path.relative_to(folder).as_posix() for kind, path in written.items()}


def _together(folder: Path, shown: Sequence[Shown]) -> list[Record]:
    """Draw maps that belong together: methods of a target, targets of a method, places of a method."""
    methods: dict[tuple[str, str], list[Shown]] = {}
    targets: dict[tuple[str, str], list[Shown]] = {}
    places: dict[tuple[str, str], list[Shown]] = {}
    for one in shown:
        record = one.record
        if min(len(one.map.shape) - 1, sum(length > 1 for length in one.map.shape[1:])) < 2:
            continue  # a signal, or a line of voxels
        subject, target, name = record["subject"], record["target"], record.get("name") or record["method"]
        methods.setdefault((subject, target), []).append(one)
        targets.setdefault((subject, record["method"]), []).append(one)
        if record.get("place"):
            places.setdefault((target, name), []).append(one)
    found = []
    for (subject, target), group in methods.items():
        path = names.folder_of(subject) / names.name(subject, "comparison", ".png", target=target)
        found += _beside(folder, path, group, f"{subject}, {target}", "title", shared=False)
    for (subject, method), group in targets.items():
        path = names.folder_of(subject) / names.name(subject, "comparison", ".png", desc=method)
        found += _beside(folder, path, group, f"{subject}, {group[0].record['title']}", "target", shared=True)
    for (target, name), group in places.items():
        found += _sweep(folder, group, target, name)
    return found


def _beside(
    folder: Path, path: Path, group: Sequence[Shown], title: str, by: str, shared: bool
) -> list[Record]:
    """Draw maps side by side, if there are several."""
    from esegeta import plot

    if len(group) < 2:
        return []
    group = group[:SOME]
    maps: dict[str, Tensor] = {}
    for one in group:
        name = marks.titled(str(one.record[by]), marks.marks(one.record))
        if by == "target" and one.record.get("score") is not None:
            name = f"{name}, score {numeral(one.record['score'])}"
        maps[name if name not in maps else f"{name} ({one.record['method']})"] = one.map
    look = _common_look(group)
    figure = plot.side_by_side(
        maps,
        group[0].anatomy,
        None,
        group[0].affine,
        title=title,
        subtitle=in_common([one.record for one in group]),
        shared=shared,
        **look,
    )
    plot.save(figure, folder / path, 256)
    return [{"title": title, "file": path.as_posix(), "maps": len(maps)}]


def _sweep(folder: Path, group: Sequence[Shown], target: str, name: str) -> list[Record]:
    """Draw a method at several places of a network, in planes and projected."""
    from esegeta import plot

    maps = {str(one.record["place"]): one.map for one in group}
    if len(maps) < 2 or len(maps) != len(group):
        return []
    found, subject = [], group[0].record["subject"]
    for kind, project in (("layers", False), ("layersProjected", True)):
        if project and group[0].map.ndim < 4:
            continue
        path = names.folder_of(subject) / names.name(subject, kind, ".png", target=target, desc=name)
        title = f"{subject}, {target}: {name} at {len(maps)} places{', projected' if project else ''}"
        first = group[0]
        look = _common_look(group)
        said = in_common([one.record for one in group])
        figure = plot.layers(
            maps,
            first.anatomy,
            None,
            first.affine,
            title=title,
            subtitle=said,
            project=project,
            **look,
        )
        plot.save(figure, folder / path, 256)
        found.append({"title": title, "file": path.as_posix(), "maps": len(maps)})
    return found


def _common_look(group: Sequence[Shown]) -> dict[str, Any]:
    """What is told of maps in one picture: outlines only where all of them have the same target."""
    look = dict(group[0].look)
    if len({one.record["target"] for one in group}) > 1:
        look["outline"] = {}
        if not isinstance(look.get("mask"), str):
            look.pop("mask", None)
    return look


def header(payload: Record) -> Record:
    """Return what a record says whatever comes of the job."""
    about = {"id": payload["id"], "kind": payload["kind"], "title": "figures", "subject": payload["subject"]}
    nobody = {"target": "", "method": ""}
    return {**about, **nobody, "config_digest": payload["digest"], "look_digest": payload["look"]}


def written_files(record: Mapping[str, Any]) -> list[str]:
    """Return the files that belong to the record alone, relative to the folder of the run."""
    alone = [name for kinds in (record.get("figures") or {}).values() for name in kinds.values()]
    return [*alone, *(one["file"] for one in record.get("together") or ())]


def settings(planning: Planning) -> Figures:
    """Return how pictures are drawn."""
    found = planning.config.more.get(TABLE)
    return found if isinstance(found, Figures) else Figures()


def entries(planning: Planning) -> list[Job]:
    """Return a job for each of the first subjects, until as many maps as are asked for have figures."""
    if not planning.config.output.figures:
        return []
    how = settings(planning)
    of_subject: dict[str, list[Job]] = {}
    for job in planning.jobs:
        if job.kind == "methods":
            of_subject.setdefault(job.subject, []).append(job)
    found: list[Job] = []
    count = 0
    for subject, jobs in of_subject.items():
        if how.maps != "all" and (how.maps <= 0 or (found and count + len(jobs) > how.maps)):
            break
        count += len(jobs)
        found.append(_job(subject, jobs, how))
    return found


def _job(subject: str, jobs: Sequence[Job], how: Figures) -> Job:
    looks = how.model_dump(mode="json", exclude={"maps"})
    return Job(
        id=f"figures_{names.subject_of(subject)}",
        kind="figures",
        keys={"subject": subject},
        given={**jobs[0].given, "figures": looks},
        decides=lambda: ["figures", looks, [job.look for job in jobs], releases()["esegeta"]],
        after=tuple(jobs),
        need="any",
    )


FIGURES = register(
    Kind(
        name="figures",
        table=TABLE,
        section=Figures,
        reads=("methods",),
        entries=entries,
        header=header,
        work=draw,
        draws=True,
        blank={"figures": {}, "together": []},
        written=written_files,
        file="",
        columns=(),
    )
)
