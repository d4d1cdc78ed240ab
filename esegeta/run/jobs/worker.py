"""What a worker does: one image, one target, one method become a map, figures and a record.

Everything that it needs comes as JSON. Files are written whole or not at all, and the record last: where it is,
everything of the job is. What is written beside the map does not change from run to run; times, memory and dates
stand in the record only.
"""

import datetime
import functools
import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esegeta import reducers, spatial
from esegeta._types import Score
from esegeta.engine import check
from esegeta.engine.execution import DeadlineExceeded, ExecutionWarning, execution, partial_share
from esegeta.engine.memory import forecast
from esegeta.places import tap
from esegeta.run.config import catalogue
from esegeta.run.config.building import Built
from esegeta.run.executors.child import Context, RefusedError, one_line, peak, verdict
from esegeta.run.jobs import marks, names, outputs
from esegeta.run.jobs.parts import (
    Entry,
    Image,
    entry_of,
    explanation_of,
    image_of,
    kept,
    model_of,
    refusals,
    repeatable,
)
from esegeta.run.jobs.plan import about, record_path, releases
from esegeta.run.volumes.reading import Volume

Record = dict[str, Any]
# What differs between two runs of the same job: not beside the map, which has to be the same file.
OF_THE_RUN = ("seconds", "peak_memory", "started", "error", "threads", "deadline", "memory")
_WRITING_SECONDS = 120.0


def on_image(map: Tensor, x: Tensor) -> tuple[Tensor, list[Record]]:
    """A map of a layer on the grid of the image; the channels of a layer are added up.

    >>> a, said = on_image(torch.tensor([[1., 2.], [3., 4.]]), torch.zeros(1, 4))
    >>> a.tolist(), said[0]["event"]
    ([[4.0, 4.5, 5.5, 6.0]], 'layer')
    """
    if map.shape[1:] == x.shape[1:] and len(map) in (1, len(x)):
        return map, []
    if map.ndim != x.ndim:
        expected = f"a map with {x.ndim - 1} spatial axes"
        advice = "This place has no grid: choose a place before pooling or flattening"
        raise RefusedError(check.problem("place", expected, check.describe(map), advice))
    shape = tuple(map.shape)
    how = f"on the grid of the image by interpolation from {shape[1:]}"
    if len(map) > 1:
        map, how = map.sum(0, keepdim=True), f"the sum of {shape[0]} channels, {how}"
    return spatial.upsample(map, like=x), [{"event": "layer", "message": f"The map is {how}."}]


def computed(
    entry: Entry, built: Built, image: Image, context: Context, left: Callable[[], float | None]
) -> tuple[Tensor, list[Record]]:
    """The map, and what happened on the way. In reduced precision what is not finite is computed again in full.

    NaN stands for what a deadline cut off, where it did.
    """
    memory = None
    if image.x.device.type == "cuda":
        # Not of what is free just now: chunks decide how sums are rounded.
        memory = torch.cuda.get_device_properties(image.x.device).total_memory // 8
    told: dict[str, Any] = {"progress": context.progress, "memory": memory}
    if entry.precision != "float32":
        found: Tensor | None = None
        with execution(precision=entry.precision, deadline=left(), **told) as run:  # type: ignore[arg-type]
            try:
                found = built(image.x)
                reason = f"{int(broken(found, run.events).sum())} values of the map are not finite"
            except DeadlineExceeded:
                raise
            except (ValueError, FloatingPointError) as error:  # such as a score that is not finite
                reason = " ".join(str(error).split())
        if found is not None and not bool(broken(found, run.events).any()):
            return known(entry, found), run.events
        message = f"Not possible in {entry.precision} ({reason}); all of it was computed again in float32."
        found, events = computed(entry._replace(precision="float32"), built, image, context, left)
        return found, [*run.events, {"event": "precision", "message": message}, *events]
    with execution(deadline=left(), **told) as run:
        found = built(image.x)
    bad = int(broken(found, run.events).sum())
    if bad:
        raise FloatingPointError(
            f"{entry.method.name}: {bad} of {found.numel()} values of the map are not finite"
        )
    return known(entry, found), run.events


def known(entry: Entry, map: Tensor) -> Tensor:
    """The map, if a deadline has left anything of it."""
    if bool(map.isnan().all()):
        message = "the deadline passed before any value of the map was complete. Allow more time."
        raise DeadlineExceeded(f"{entry.method.name}: {message}")
    return map


def broken(map: Tensor, events: Sequence[Mapping[str, Any]]) -> Tensor:
    """Where a map is not finite although no deadline cut it short.

    >>> a = torch.tensor([1.0, torch.nan, torch.inf])
    >>> broken(a, []).tolist(), broken(a, [{"event": "partial", "share": 0.5}]).tolist()
    ([False, True, True], [False, False, True])
    """
    return map.isinf() if partial_share(events) is not None else ~map.isfinite()


def versions() -> dict[str, str]:
    """Of what decides about the numbers, and of what wrote the files."""
    import nibabel

    return {**releases(), "nibabel": nibabel.__version__, "python": platform.python_version()}


def number(value: Tensor | float) -> float | None:
    """A number for JSON, None for what is not finite."""
    value = float(value)
    return value if math.isfinite(value) else None


def explain(payload: dict[str, Any], context: Context) -> Record:
    """Do a job of the kind "methods": its record, which is written last."""
    clock = time.monotonic()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    there = Path(payload["folder"]).is_dir()
    device = torch.device(context.device)
    repeatable(device)
    if device.type == "cuda":
        torch.cuda.init()  # before it there is nothing to reset
        torch.cuda.reset_peak_memory_stats(device)  # the job before may have ended in an error
    with refusals():
        entry = entry_of(payload)
    image = image_of(payload, entry, device, context.cache)
    model = model_of(entry, device, context.cache)
    with torch.no_grad():
        answer = model(image.x)

    def left() -> float | None:
        return None if context.seconds is None else max(0.0, context.seconds - (time.monotonic() - clock))

    with refusals():
        built, score = explanation_of(entry, model, image)
    raw, events = computed(entry, built, image, context, left)
    context.finishing(_WRITING_SECONDS)  # what was stopped in time has to be written too
    if there and not Path(payload["folder"]).is_dir():  # to make it anew would leave what looks like a run
        raise FileNotFoundError(f"{payload['folder']} was deleted while the job was done")
    value, residual, difference = said_by(score, built, image, raw)
    done = partial_share(events)
    share = marks.missed(value, residual, difference)
    if share is not None and residual is not None and difference is not None:
        said = marks.incomplete(built.spec, share, residual, difference, entry.precision)
        events = [*events, said]
        warnings.warn(said["message"], ExecutionWarning, stacklevel=1)
    map, notes = on_image(raw, image.x)
    regridding = "density" if catalogue.numbers(built.spec, entry.method) == "amount" else "values"
    whole = image.prepared.back(map.cpu(), regridding)
    seen = whole[~whole.isnan()]
    record = {
        **about(payload),
        "score": value,
        "residual": residual,
        "difference": difference,
        "missed": None if share is None else {"completeness": share},
        "status": "done" if done is None else "partial",
        "share_done": 1.0 if done is None else done,
        "min": number(seen.min()),
        "max": number(seen.max()),
        "sum": number(whole.sum(dtype=torch.float64)),
        "sum_kept": number(image.prepared.back(map.cpu(), "sum").sum(dtype=torch.float64)),
        "regridding": regridding,
        "device": device.type,
        "versions": versions(),
        "axioms": sorted(built.axioms),
        "preprocess": list(image.prepared.record),
        "events": [*events, *notes],
    }
    record |= written(payload, entry, image, whole, answer, record, context)
    record |= {
        "error": None,
        "started": started,
        "seconds": time.monotonic() - clock,
        "peak_memory": peak(),
        "threads": torch.get_num_threads(),
        "deadline": context.seconds,
        "memory": context.memory,
    }
    if device.type == "cuda":
        record["peak_device_memory"] = torch.cuda.max_memory_allocated(device)
    write_record(Path(payload["folder"]), record)
    return json.loads(outputs.json_text(record))


def said_by(
    score: Score | None, built: Built, image: Image, raw: Tensor
) -> tuple[float | None, float | None, float | None]:
    """The score; what the map leaves unexplained of its difference to the baseline, if the method claims nothing
    is left; and that difference. All in single precision, whatever the map was computed in.
    """
    if score is None:
        return None, None, None
    x = image.x
    with torch.no_grad(), execution():
        value = score(x)
        if "completeness" not in built.axioms:
            return number(value), None, None
        total, hidden = raw.sum(dtype=torch.float64), None
        if built.features is not None:
            counted = each_part_once(raw, built.features(x))
            if counted is None:
                return number(value), None, None
            total, hidden = counted
        base = built.refs[-1] if built.refs else torch.zeros_like(x)
        many = (base if base.ndim > x.ndim else base[None]).unbind()
        starts = many if hidden is None else [torch.where(hidden, b, x) for b in many]
        difference = value.double() - torch.stack([score(b) for b in starts]).double().mean()
        return number(value), number(total - difference), number(difference)


def each_part_once(map: Tensor, parts: Any) -> tuple[Tensor, Tensor] | None:
    """The sum of the values of parts, which a map shows at each of their elements, and where there are parts.

    None where it cannot be told from the map: of parts that overlap, or a map that differs within one.

    >>> from esegeta.features import grid
    >>> a = torch.tensor([[3., 3., 5., 5.]])
    >>> each_part_once(a, grid(2)(a))[0].item(), each_part_once(a + torch.arange(4), grid(2)(a))
    (8.0, None)
    """
    labels = getattr(parts, "labels", None)
    if labels is None:
        return None
    labels = labels.expand_as(map)
    inside = labels >= 0
    which, values = labels[inside], map[inside].double()
    one = values.new_zeros(parts.count).scatter(0, which, values)  # of any element of the part
    return (one.sum(), inside) if bool((one[which] == values).all()) else None


def predicted(entry: Entry, answer: Tensor, image: Image) -> Tensor | None:
    """Where the network sees the target, on the grid of the file; None for networks that answer without a grid."""
    target = entry.target.parameters.get("target", entry.target.class_)
    if not isinstance(target, int) or answer.ndim != image.x.ndim or answer.shape[1:] != image.x.shape[1:]:
        return None
    exclusive = entry.target.parameters.get("exclusive", True)
    mask = reducers.predicted_mask(answer, target, exclusive=exclusive)
    return image.prepared.back(mask[None].float().cpu(), "values") >= 0.5


def written(
    payload: dict[str, Any],
    entry: Entry,
    image: Image,
    map: Tensor,
    answer: Tensor,
    record: Record,
    context: Context,
) -> Record:
    """Write the image and the prediction, once for each worker; the map, its sidecar and its figures."""
    folder, subject, target = Path(payload["folder"]), payload["subject"], entry.target.name
    volume = image.volume

    def write(tensor: Tensor | None, name: Path) -> str | None:
        if tensor is None:
            return None
        outputs.write_map(tensor, volume, folder / name, holes=record["status"] == "partial")
        return name.as_posix()

    whose = [payload["files"], payload["input_digest"], str(folder)]
    anatomy = kept(context.cache, "anatomy", whose, lambda: write(volume.data, names.anatomy(subject)))
    mask = names.prediction(subject, target)
    if entry.method.patches != "whole":  # the network on patches may see something else
        mask = names.statmap(subject, target, "prediction_stitched", "mask.nii.gz")
    whose += [payload["target"], payload["model"], payload["preprocess"], payload["patches"], mask.name]
    prediction = kept(
        context.cache, "prediction", whose, lambda: write(predicted(entry, answer, image), mask), 8
    )
    place = functools.partial(names.statmap, subject, target, record["method"])
    figures: dict[str, str] = {}
    events = list(record["events"])
    if entry.output.figures:
        drawings, said = drawn(map, volume, folder / place(""), record)
        figures = {kind: path.relative_to(folder).as_posix() for kind, path in drawings.items()}
        events += said
    paths = {
        "anatomy": anatomy,
        "prediction": prediction,
        "map": write(map, place()) if entry.output.nifti else None,
        "figures": figures,
        "events": events,
    }
    sidecar = {k: v for k, v in {**record, **paths}.items() if k not in OF_THE_RUN}
    outputs.write_json(folder / place("statmap.json"), sidecar)
    return paths


def drawn(map: Tensor, volume: Volume, stem: Path, record: Record) -> tuple[dict[str, Path], list[Record]]:
    """Draw the figures of a map; without matplotlib there are none, and that is said."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        message = 'There are no figures: matplotlib is missing, pip install "esegeta[viz]".'
        return {}, [{"event": "figures", "message": message}]
    from esegeta import plot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        title = marks.titled(f"{record['title']} ({record['target']})", marks.marks(record))
        affine = None if volume.is_image else volume.affine
        return plot.save_figures(map, volume.data, volume.spacing, stem, title, affine), []


def write_record(folder: Path, record: Record) -> None:
    """Write a job's record, the last of its files."""
    outputs.write_json(record_path(folder, record["id"]), record)


def examine(payload: list[dict[str, Any]], context: Context) -> dict[str, Record]:
    """What can be said of jobs without doing them: the shape of the image, memory, and what would be refused."""
    return {job["id"]: _examined(job, context) for job in payload}


def _examined(payload: dict[str, Any], context: Context) -> Record:
    device = torch.device(context.device)
    found: Record = {"shape": None, "memory": None, "problem": None}
    try:
        entry = entry_of(payload)
        image = image_of(payload, entry, device, context.cache)
        found["shape"] = list(image.x.shape)
        model = model_of(entry, device, context.cache)
        built, score = explanation_of(entry, model, image)
        if entry.method.place is not None and score is not None:
            with torch.no_grad():
                tap(score, entry.method.place)(image.x)
    except Exception as error:
        found["problem"] = one_line(error)
        return found
    try:
        with warnings.catch_warnings(), execution(progress=False):
            warnings.simplefilter("ignore")
            found["memory"] = forecast(built.__call__, image.x)
    except Exception as error:
        # Not every network and method can be run without values: then nothing is said of memory.
        if verdict(error) == "refused":
            found["problem"] = one_line(error)
    return found


# What a job of each kind does. Further kinds enter here.
KINDS: dict[str, Callable[[dict[str, Any], Context], Record]] = {"methods": explain}


def main(payload: dict[str, Any], context: Context) -> Record:
    """Do a job, whatever its kind; warnings go to the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: context.note(" ".join(str(message).split()))
        return KINDS[payload["kind"]](payload, context)
