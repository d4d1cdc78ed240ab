"""The kind of jobs "figures": all pictures of a subject, drawn from the maps on disk when the numbers are there.

Pictures take longer than most maps. They are drawn last, one job for each subject, and of many subjects only for
the first ones; ``esegeta report FOLDER`` draws the others. Another setting of ``[figures]`` computes no map anew.
"""

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from nibabel.nifti1 import Nifti1Image
from torch import Tensor

from esegeta.run.config.schema import Section
from esegeta.run.executors.child import Context, peak
from esegeta.run.executors.status import Status
from esegeta.run.jobs import marks, outputs
from esegeta.run.jobs.inputs import Inputs
from esegeta.run.jobs.kinds import Job, Kind, Record, register
from esegeta.run.jobs.plan import Planning, inputs_of, releases, write_record
from esegeta.run.volumes import names, pictures

TABLE = "figures"


class Figures(Section):
    """How pictures are drawn. maps: of how many maps a run draws them; of the subjects beyond, on demand."""

    maps: int | Literal["all"] = 40


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
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        message = 'There are no figures: matplotlib is missing, pip install "esegeta[viz]".'
        events.append({"event": "figures", "message": message})
    else:
        for count, (job, record) in enumerate(made.items()):
            found[job] = _of_map(folder, job, record, inputs)
            context.progress("figures", (count + 1) / len(made))
    record = {
        **header(payload),
        "figures": found,
        "status": Status.DONE,
        "share_done": 1.0,
        "inputs": inputs_of(folder, payload["after"]),
        "error": None,
        "events": events,
        "versions": releases(),
        "seconds": time.monotonic() - started,
        "peak_memory": peak(),
        "device": "cpu",
        "deadline": context.seconds,
        "memory": context.memory,
    }
    write_record(folder, record)
    return json.loads(outputs.json_text(record))


def _of_map(folder: Path, job: str, record: Mapping[str, Any], inputs: Inputs) -> dict[str, str]:
    from esegeta import plot

    anatomy = of_file(folder / record["anatomy"])
    map = of_file(folder / record["map"]).values if record.get("map") else inputs.map(job, "file")
    title = marks.titled(f"{record['title']} ({record['target']})", marks.marks(record))
    stem = folder / names.statmap(record["subject"], record["target"], record["method"], "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = plot.save_figures(map, anatomy.values, None, stem, title, anatomy.affine)
    return {kind: path.relative_to(folder).as_posix() for kind, path in written.items()}


def header(payload: Record) -> Record:
    """Return what a record says whatever comes of the job."""
    about = {"id": payload["id"], "kind": payload["kind"], "title": "figures", "subject": payload["subject"]}
    nobody = {"target": "", "method": ""}
    return {**about, **nobody, "config_digest": payload["digest"], "look_digest": payload["look"]}


def written_files(record: Mapping[str, Any]) -> list[str]:
    """Return the files that belong to the record alone, relative to the folder of the run."""
    return [name for kinds in (record.get("figures") or {}).values() for name in kinds.values()]


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
    found, count = [], 0
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
        blank={"figures": {}},
        written=written_files,
        file="",
        columns=(),
    )
)
