"""Try a network on an image before a run: its answer, its places, how long one evaluation takes.

This is done by a worker process of the pool, with a limit of time: a network is code.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esegeta import placing
from esegeta.engine import check
from esegeta.run.config import schema, sources
from esegeta.run.config.loading import WHERE
from esegeta.run.config.trust import from_json
from esegeta.run.executors import local
from esegeta.run.executors.child import Context
from esegeta.run.executors.protocol import Task
from esegeta.run.jobs import summary
from esegeta.run.volumes import files, padding, preprocess, steps

FUNCTION = "esegeta.app.trial:tried"
SECONDS = 120.0
IMAGE, ANSWER = "trial_image.nii.gz", "trial_answer.nii.gz"
MOST_PARTS = 50  # components of a class that are told
_SMALLEST_PART = 2  # voxels


def tried(payload: dict[str, Any], context: Context) -> dict[str, Any]:
    """Run a network once, in a worker.

    Args:
        payload: model, files, reading, preprocess, pad, trust; folder: where the answer is written.
        context: of the worker.

    Returns:
        Shapes, seconds, classes with their voxels, places.
    """
    model = schema.Model.model_validate(payload["model"])
    context.progress("reading the image", 0.1)
    volume = files.read([Path(p) for p in payload["files"]], **payload["reading"], memory=context.memory)
    prepared = preprocess.apply(volume, payload["preprocess"])
    context.progress("loading the network", 0.3)
    network = sources.load(model, trust=from_json(payload["trust"]))
    if payload["pad"] is not None:
        multiple = padding.multiples(network, prepared.data)
        if multiple is not None and set(multiple) != {1}:
            prepared = steps.pad(list(multiple))(prepared)
    x = prepared.data
    context.progress("running the network", 0.5)
    began = time.monotonic()
    try:
        with torch.no_grad():
            answer = network(x)
    except RuntimeError as error:
        got, advice = str(error).splitlines()[0][:200], 'Resize it, or set input.pad = "auto"'
        raise check.refused(
            WHERE, f"an image that the network takes, {tuple(x.shape)}", got, advice
        ) from None
    seconds = time.monotonic() - began
    context.progress("finding its places", 0.7)
    found = {
        "input": list(x.shape),
        "output": list(answer.shape),
        "seconds": seconds,
        "gradient_seconds": 3 * seconds,
        "places": _places(network, x),
        "classes": [],
        "grid": answer.ndim == x.ndim and answer.shape[1:] == x.shape[1:],
        "spacing": list(prepared.spacing),
        "parts": {},
    }
    folder = Path(payload["folder"])
    _write(folder / IMAGE, x[0].numpy(), prepared.affine)
    if found["grid"]:
        labels = answer.argmax(0) if len(answer) > 1 else (answer[0] > 0).long()
        _write(folder / ANSWER, labels.numpy().astype(np.uint8), prepared.affine)
        counts = torch.bincount(labels.flatten(), minlength=max(2, len(answer))).tolist()
        found["classes"] = [{"class": n, "voxels": count} for n, count in enumerate(counts)]
        found["parts"] = {n: _parts(labels.numpy() == n) for n, count in enumerate(counts) if n and count}
    else:
        values = answer.flatten().tolist()
        found["classes"] = [{"class": n, "value": value} for n, value in enumerate(values[:1000])]
    return found


def _parts(mask: np.ndarray) -> list[int]:
    """The voxels of the connected parts of a class, the largest first."""
    numbers = summary.components(mask)
    sizes = np.bincount(numbers[numbers >= 0].ravel())
    return [int(n) for n in sizes[:MOST_PARTS] if n >= _SMALLEST_PART]


def part_at(path: Path, place: Sequence[float]) -> dict[str, Any]:
    """Return the class at a place of an answer that was written, and which connected part of that class it is in.

    Args:
        path: of the answer.
        place: in mm.
    """
    from nibabel.nifti1 import Nifti1Image

    image = Nifti1Image.from_filename(path)
    labels = np.asarray(image.dataobj)
    if len(place) != 3 or not np.isfinite(place).all():
        raise check.refused("app", "a place in mm", str(list(place)), "Click into the image")
    affine = np.eye(4) if image.affine is None else image.affine
    voxel = np.round(np.linalg.solve(affine, [*place, 1.0]))[: labels.ndim]
    if not all(0 <= i < n for i, n in zip(voxel, labels.shape, strict=True)):
        expected = f"a place in an image of {labels.shape} voxels"
        raise check.refused("app", expected, str(list(place)), "Click into the image")
    index = [int(i) for i in voxel]
    number = int(labels[tuple(index)])
    part = int(summary.components(labels == number)[tuple(index)]) if number else None
    return {"class": number, "part": part, "index": index}


def _places(network: Any, x: torch.Tensor) -> list[dict[str, Any]]:
    return [
        {"name": p.name, "kind": p.kind, "shape": list(p.shape), "cut": p.cut, "beside": list(p.beside)}
        for p in placing.places(network, x)
        if p.used and not p.same_as
    ]


def _write(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    from nibabel.nifti1 import Nifti1Image

    Nifti1Image(values, affine).to_filename(path)


def run(payload: dict[str, Any]) -> dict[str, Any]:
    """Try a network in a process of its own; ``ValueError`` says in one line why it cannot be."""
    (ended,) = local.run([Task.of("trial", FUNCTION, payload, deadline=SECONDS)])
    if not isinstance(ended.value, dict):
        raise ValueError(ended.error or check.problem("app", "an answer of the network", "none", "Try again"))
    return ended.value
