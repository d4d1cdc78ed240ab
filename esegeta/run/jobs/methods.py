"""The kind of jobs "methods": one image, one target, one method become a map and a record.

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

import numpy as np
import torch
from torch import Tensor

from esegeta._registry import find_method
from esegeta._types import Score
from esegeta.engine.execution import (
    DeadlineExceeded,
    ExecutionWarning,
    execution,
    partial_share,
)
from esegeta.engine.memory import forecast
from esegeta.methods.gradient import gradient
from esegeta.placing import tap
from esegeta.run.config import catalogue
from esegeta.run.config.building import Built, class_of
from esegeta.run.config.schema import Method, Target
from esegeta.run.config.tables import place_label, with_files
from esegeta.run.executors.child import Context, one_line, peak, reset_peak, resident, verdict
from esegeta.run.jobs import marks, outputs
from esegeta.run.jobs.inputs import Inputs, on_image
from esegeta.run.jobs.kinds import Job, Kind, Record, digest, register
from esegeta.run.jobs.parts import (
    Entry,
    Image,
    answer_of,
    cached,
    entry_of,
    explanation_of,
    image_of,
    model_of,
    on_file,
    predicted,
    reference_of,
    refusals,
    repeatable,
)
from esegeta.run.jobs.plan import (
    AboutImage,
    Planning,
    content,
    contents,
    limits,
    raw_path,
    releases,
    write_record,
)
from esegeta.run.volumes import labels, names
from esegeta.run.volumes.files import files_of

# What differs between two runs of the same job: not beside the map, which has to be the same file.
OF_THE_RUN = (
    *("seconds", "peak_memory", "peak_device_memory", "started", "error", "threads", "deadline", "memory"),
    "raw",
)
_WRITING_SECONDS = 120.0
_NO_NUMBERS = ("id", "title", "deadline", "memory")


def computed(
    entry: Entry, built: Built, image: Image, context: Context, left: Callable[[], float | None]
) -> tuple[Tensor, list[Record]]:
    """Return the map and what happened on the way. In reduced precision, redo in full what is not finite.

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
    """Return the map, if a deadline has left anything of it."""
    if bool(map.isnan().all()):
        message = "the deadline passed before any value of the map was complete. Allow more time."
        raise DeadlineExceeded(f"{entry.method.name}: {message}")
    return map


def broken(map: Tensor, events: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return where a map is not finite although no deadline cut it short.

    >>> a = torch.tensor([1.0, torch.nan, torch.inf])
    >>> broken(a, []).tolist(), broken(a, [{"event": "partial", "share": 0.5}]).tolist()
    ([False, True, True], [False, False, True])
    """
    return map.isinf() if partial_share(events) is not None else ~map.isfinite()


def versions() -> dict[str, str]:
    """Return the versions that affect results, and those of what wrote the files."""
    import nibabel

    return {**releases(), "nibabel": nibabel.__version__, "python": platform.python_version()}


def number(value: Tensor | float) -> float | None:
    """Return a number for JSON, None if it is not finite."""
    value = float(value)
    return value if math.isfinite(value) else None


def explain(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Compute a map, write all of its files and its record, which is written last."""
    clock = time.monotonic()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    there = Path(payload["folder"]).is_dir()
    device = torch.device(context.device)
    repeatable(device)
    if device.type == "cuda":
        torch.cuda.init()  # before it there is nothing to reset
        torch.cuda.reset_peak_memory_stats(device)  # the job before may have ended in an error
    entry, image = inputs.entry(), inputs.image()
    answer = inputs.answer()

    def left() -> float | None:
        return None if context.seconds is None else max(0.0, context.seconds - (time.monotonic() - clock))

    built, score = inputs.explain()
    raw, events = computed(entry, built, image, context, left)
    context.finishing(_WRITING_SECONDS)  # what was stopped in time has to be written too
    if there and not Path(payload["folder"]).is_dir():  # to make it anew would leave what looks like a run
        raise FileNotFoundError(f"{payload['folder']} was deleted while the job was done")
    value, residual, difference = score_and_residual(score, built, image, raw)
    done = partial_share(events)
    share = marks.missed(value, residual, difference)
    if share is not None and residual is not None and difference is not None:
        event = marks.incomplete(built.spec, share, residual, difference, entry.precision)
        events = [*events, event]
        warnings.warn(event["message"], ExecutionWarning, stacklevel=1)
    write_raw(raw, Path(payload["folder"]) / raw_path(payload["id"]))
    map, notes = on_image(raw, image.x)
    regridding = "density" if catalogue.numbers(built.spec, entry.method) == "amount" else "values"
    whole = image.prepared.back(map.cpu(), regridding)
    seen = whole[~whole.isnan()]
    record = {
        **record_header(payload),
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
        "channels": of_channels(whole, names.channels(payload["files"], len(whole)), regridding),
        "device": device.type,
        "versions": versions(),
        "axioms": sorted(built.axioms),
        "preprocess": list(image.prepared.record),
        "events": [*events, *notes],
    }
    masks = shared(payload, entry, image, answer, context)
    masks["reference"], said = referred(payload, entry, image, context)
    record["events"] += said
    record |= written(payload, entry, image, whole, {**record, **masks})
    record |= {
        "raw": raw_path(payload["id"]).as_posix(),
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


def of_channels(map: Tensor, channels: Sequence[str], regridding: str) -> list[Record]:
    r"""Return the numbers of each channel of a map (C,\*S), nothing for a map with one: a sum of channels may cancel.

    share: of the sum of all absolute values. sum: None where voxels show the value of something larger.

    >>> found = of_channels(torch.tensor([[1.0, 2.0], [-3.0, 0.0]]), ["T1", "T2"], "density")
    >>> [(one["channel"], one["sum"], one["share"]) for one in found]
    [('T1', 3.0, 0.5), ('T2', -3.0, 0.5)]
    """
    if len(map) < 2:
        return []
    whole = float(map[~map.isnan()].double().abs().sum())
    found = []
    for name, one in zip(channels, map, strict=True):
        values = one[~one.isnan()].double()
        some = bool(values.numel())
        found.append(
            {
                "channel": name,
                "sum": number(values.sum()) if regridding == "density" else None,
                "mean": number(values.mean()) if some else None,
                "share": float(values.abs().sum()) / whole if whole else None,
                "min": number(values.min()) if some else None,
                "max": number(values.max()) if some else None,
            }
        )
    return found


def score_and_residual(
    score: Score | None, built: Built, image: Image, raw: Tensor
) -> tuple[float | None, float | None, float | None]:
    """Return the score; what the map leaves unexplained of its difference to the baseline, if the method claims
    completeness; and that difference. All in single precision, whatever the map was computed in.
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
    """Return the sum of the values of parts, which a map repeats at each element, and where there are parts.

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


def write_raw(raw: Tensor, path: Path) -> None:
    """Keep a map as it was computed: on the grid of the network or of a layer, with all channels."""
    values = raw.detach().cpu()
    with outputs.atomic(path, values.numel() * values.element_size()) as part:
        np.save(
            part, values.numpy() if values.dtype in (torch.float32, torch.float64) else values.float().numpy()
        )


def shared(payload: Record, entry: Entry, image: Image, answer: Tensor, context: Context) -> Record:
    """Write the image and the masks, once for each worker, and return where they are."""
    folder, subject, target = Path(payload["folder"]), payload["subject"], entry.target.name

    def seen() -> str | None:
        found = predicted(entry, answer, image)
        return (
            None
            if found is None
            else write_mask(on_file(found, image), image, folder, mask, entry, class_of(entry.target))
        )

    def anatomy() -> str:
        outputs.write_map(image.volume.data, image.volume, folder / names.anatomy(subject))
        return names.anatomy(subject).as_posix()

    whose = [payload["files"], payload["input_digest"], str(folder)]
    where = cached(context.cache, "anatomy", whose, anatomy)
    mask = names.prediction(subject, target)
    if entry.method.patches != "whole":  # the network on patches may see something else
        mask = names.statmap(subject, target, "prediction_stitched", "mask.nii.gz")
    whose += [payload["target"], payload["model"], payload["preprocess"], payload["patches"], mask.name]
    prediction = cached(context.cache, "prediction", whose, seen, 8)
    return {"anatomy": where, "prediction": prediction}


def referred(
    payload: Record, entry: Entry, image: Image, context: Context
) -> tuple[str | None, list[Record]]:
    """Write what the given label map shows of the target, once for each worker; return where, and what to say."""
    given = payload["reference"]
    if not given:
        return None, []
    folder, name = Path(payload["folder"]), names.reference(payload["subject"], entry.target.name)

    def write() -> tuple[str | None, list[Record]]:
        with refusals():
            mask = reference_of(payload, image, context.cache, context.memory)
        if mask is None:
            message = f"There is no reference of {payload['subject']}: no file of its name."
            return None, [{"event": "reference", "message": message}]
        path = write_mask(mask, image, folder, name, entry, given["labels"])
        if bool(mask.any()):
            return path, []
        message = (
            f"The reference shows nothing of the target: none of its voxels has a label of {given['labels']}."
        )
        return path, [{"event": "reference", "message": message}]

    whose = [
        payload["files"],
        payload["input_digest"],
        given["file"],
        given["decides"],
        str(folder),
        name.name,
    ]
    return cached(context.cache, "referred", whose, write, 8)


def write_mask(mask: Tensor, image: Image, folder: Path, name: Path, entry: Entry, labels: Any) -> str:
    """Write a mask, and a sidecar that says what its one label is called."""
    target = entry.target.name
    outputs.write_map(mask[None], image.volume, folder / name, description=f"1: {target}")
    sidecar = {"Type": "ROI", "labels": {"1": target}, "made_of": labels}
    outputs.write_json(folder / name.with_name(name.name.replace(".nii.gz", ".json")), sidecar)
    return name.as_posix()


def written(payload: Record, entry: Entry, image: Image, map: Tensor, record: Record) -> Record:
    """Write a map and its sidecar, and return what the record says of them."""
    folder, volume = Path(payload["folder"]), image.volume
    place = functools.partial(names.statmap, payload["subject"], entry.target.name, record["method"])
    paths: Record = {
        "anatomy": record["anatomy"],
        "prediction": record["prediction"],
        "reference": record["reference"],
        "map": None,
    }
    if entry.output.nifti:
        outputs.write_map(map, volume, folder / place(), holes=record["status"] == "partial")
        paths["map"] = place().as_posix()
    sidecar = {k: v for k, v in {**record, **paths}.items() if k not in OF_THE_RUN}
    outputs.write_json(folder / place("statmap.json"), sidecar)
    return paths


def redraw(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Show the map that is there as the configuration asks for now; nothing is computed anew."""
    folder = Path(payload["folder"])
    before = inputs.record(payload["id"])
    entry, image = inputs.entry(), inputs.image()
    whole = inputs.map(payload["id"], "file")
    context.finishing(_WRITING_SECONDS)
    events = [event for event in before["events"] if event.get("event") != "reference"]
    reference, said = referred(payload, entry, image, context)
    record = {**before, **record_header(payload), "events": [*events, *said], "reference": reference}
    gone = dict.fromkeys(written_files(before))
    record |= written(payload, entry, image, whole, record)
    for name in gone.keys() - set(written_files(record)):
        (folder / name).unlink(missing_ok=True)
    write_record(folder, record)
    return json.loads(outputs.json_text(record))


def written_files(record: Mapping[str, Any]) -> list[str]:
    """Return the files that belong to a record alone, relative to the folder of the run."""
    sidecar = names.statmap(record["subject"], record["target"], record["method"], "statmap.json")
    alone = [record.get("map"), record.get("raw")]
    return [sidecar.as_posix(), *(name for name in alone if name)]


def examine(payload: Record, context: Context) -> Record:
    """Say of a job without doing it: shape of the image, memory, seconds, bytes on disk, what would be refused."""
    device, cache = torch.device(context.device), context.cache
    found: Record = {"shape": None, "memory": None, "seconds": None, "disk": None, "problem": None}
    try:
        entry = entry_of(payload, context.memory)
        image = image_of(payload, entry, device, cache)
        found["shape"] = list(image.x.shape)
        model = model_of(entry, device, cache)
        taken = [payload[name] for name in ("files", "model", "preprocess", "pad", "patches")]
        taken += [entry.method.patches]
        cached(cache, "taken", taken, lambda: answer_of(entry, model, image) is None)
        built, score = explanation_of(entry, model, image)
        if entry.method.place is not None and score is not None:
            with torch.no_grad():
                tap(score, entry.method.place)(image.x)
    except Exception as error:
        found["problem"] = one_line(error)
        return found
    found |= _on_disk(image, entry)
    needs = "gradient" if built.spec.needs == "gradient" else "value"
    pace = cached(cache, "pace", [*taken, payload["target"], needs], lambda: _pace(score, image.x, needs), 8)
    count, _ = cost(payload)
    if pace is not None and count is not None:
        found["seconds"] = pace[0] * count
    try:
        with warnings.catch_warnings(), execution(progress=False):
            warnings.simplefilter("ignore")
            found["memory"] = forecast(built.__call__, image.x)
    except Exception as error:
        if verdict(error) == "refused":
            found["problem"] = one_line(error)
        elif (
            pace is not None
        ):  # not every network can be run without values: what one evaluation took is known
            found["memory"] = pace[1]
    return found


def _on_disk(image: Image, entry: Entry) -> Record:
    """The bytes of a map, of the file and of the network, at most; and of what the maps of an image share."""
    file, network = image.volume.data.nbytes, image.x.numel() * 4
    per_voxel = 4 * image.volume.data.numel()
    return {"disk": network + (per_voxel if entry.output.nifti else 0), "shared_disk": file}


def _pace(score: Score | None, x: Tensor, needs: str) -> tuple[float, int] | None:
    """Seconds and bytes of one gradient of a score, or of one value of it; None if that cannot be known."""
    if score is None:
        return None
    evaluate = gradient(score) if needs == "gradient" else score
    try:
        with warnings.catch_warnings(), execution(progress=False):
            warnings.simplefilter("ignore")
            evaluate(x)  # the first call finds out what the network takes
            before = resident()
            reset_peak()
            started = time.monotonic()
            evaluate(x)
            return time.monotonic() - started, max(peak() - before, x.numel() * x.element_size())
    except Exception:  # such as a score without a gradient; if that matters to a job, it is said there
        return None


def entries(planning: Planning) -> list[Job]:
    """Return a job for each image, target and method, in this order."""
    targets = [(target, target.model_dump(mode="json")) for target in planning.config.targets]
    methods = [(method, method.model_dump(mode="json")) for method in planning.config.methods]
    return [
        _job(planning, image, target, what, method, how)
        for image in planning.images
        for target, what in targets
        for method, how in methods
    ]


def _job(
    planning: Planning, image: AboutImage, target: Target, what: Record, method: Method, how: Record
) -> Job:
    config, whole, network = planning.config, planning.whole, planning.network
    own = method.id or method.name

    def decides() -> Record:
        return {
            **network,
            **image.decides,
            "target": with_files({k: what[k] for k in ("reducer", "class_", "parameters")}, contents),
            "method": with_files({k: v for k, v in how.items() if k not in _NO_NUMBERS}, contents),
            "patches": whole["patches"] if method.patches != "whole" else None,
            "precision": config.run.precision,
            "key": config.run.key,
            "versions": releases(),
        }

    def made_from() -> Record:
        return {
            "model": network["source"] or Path(config.model.source).name,
            **{name: network[name] for name in ("arguments", "code", "weights", "plugins")},
            "images": {part.name: content(part) for path in image.files for part in files_of(path)},
        }

    @functools.cache
    def reference() -> Record | None:
        return _reference(planning, image, target)

    def looks() -> Record:
        """What files are called, which of them there are, and what stands above them."""
        found = reference()
        return {
            "names": [image.subject, target.name, own, method.title],
            "reference": found and found["decides"],
            "nifti": whole["output"]["nifti"],
        }

    given = {
        "input_digest": lambda: image.digest,
        "subject": image.subject,
        "files": [str(path) for path in image.files],
        "reading": image.reading,
        "made_from": made_from,
        "target": what,
        "method": how,
        **{name: whole[name] for name in ("model", "patches", "output")},
        "preprocess": image.steps,
        "pad": image.pad,
        "reference": reference,
        "precision": config.run.precision,
        "key": config.run.key,
        "folder": planning.folder,
        "plugins": list(config.plugins),
        "trust": config.trust.json(),
    }
    return Job(
        id=names.job(image.subject, target.name, own),
        kind="methods",
        keys={"subject": image.subject, "target": target.name, "method": own},
        given=given,
        decides=decides,
        looks=looks,
        **limits(method, config.run),
    )


def _reference(planning: Planning, image: AboutImage, target: Target) -> Record | None:
    """Return what a job is told of the given label map; ``decides`` is what changes the numbers made of it."""
    given = planning.config.reference
    if given is None:
        return None
    path, meant = image.reference, labels.meant(given.labels, target.name, class_of(target))
    decides = digest([contents(path) if path else None, given.grid, meant])
    file = str(path) if path else None
    return {"file": file, "grid": given.grid, "labels": list(meant), "decides": decides}


def record_header(payload: Record) -> Record:
    """Return what a record says whatever comes of the job."""
    # Files by their names: where they are may change, and the record is the same.
    method, target = with_files([payload["method"], payload["target"]], lambda path: Path(path).name)
    return {
        "id": payload["id"],
        "kind": payload["kind"],
        "subject": payload["subject"],
        "target": target["name"],
        "reducer": target["reducer"],
        "reducer_parameters": target["parameters"],
        "method": method["id"] or method["name"],
        "name": method["name"],
        "title": title_of(method),
        "parameters": method["parameters"],
        "transforms": method["transforms"],
        "baseline": method["baseline"],
        "place": method["place"],
        "patches": method["patches"],
        "patching": payload["patches"] if method["patches"] != "whole" else None,
        "key": payload["key"],
        "precision": payload["precision"],
        "config_digest": payload["digest"],
        "look_digest": payload["look"],
        "made_from": payload["made_from"],
    }


def title_of(method: Mapping[str, Any]) -> str:
    """Return what stands above the figures of a method: its id in words, or its title.

    >>> title_of({"title": None, "id": "my_cam-encoder.relu_b", "name": "grad_cam", "place": "encoder.relu_b"})
    'my cam at encoder.relu_b'
    """
    if method["title"]:
        return str(method["title"])
    own, place = str(method["id"] or method["name"]), method["place"]
    end = f"-{place_label(place)}" if place else ""
    if place and own.endswith(end):
        return f"{own.removesuffix(end).replace('_', ' ')} at {place}"
    return own.replace("_", " ")


def cost(payload: Record) -> tuple[int | None, str]:
    """Return how many gradients or values of the score a job takes, and which of them."""
    spec = find_method(payload["method"]["name"])
    needs = "gradients" if spec.needs == "gradient" else "values"
    return catalogue.cost(spec, payload["method"]), needs


METHODS = register(
    Kind(
        name="methods",
        table="methods",
        entries=entries,
        header=record_header,
        work=explain,
        redraw=redraw,
        examine=examine,
        cost=cost,
        group=lambda job: digest([job.given["files"], job.given["model"]]),
        written=written_files,
        stem=lambda job: names.statmap(job.subject, job.target, job.method, ""),
        file="summary",
        inner={
            "channels": (
                *("id", "subject", "target", "method", "title", "channel"),
                *("sum", "mean", "share", "min", "max"),
            )
        },
        columns=(
            *("id", "subject", "target", "method", "title", "status", "error", "score", "residual"),
            *("difference", "missed", "share_done", "min", "max", "sum", "sum_kept"),
            *("seconds", "peak_memory", "device", "precision", "map", "prediction", "reference", "anatomy"),
        ),
        blank={
            **dict.fromkeys(("map", "prediction", "reference", "anatomy")),
            **dict.fromkeys(("score", "residual", "difference", "missed")),
            **dict.fromkeys(("min", "max", "sum", "sum_kept", "started", "place", "baseline", "key")),
            "channels": [],
        },
    )
)
