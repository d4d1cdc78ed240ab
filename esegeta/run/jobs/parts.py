"""The parts of a job, from its JSON: configuration, image, network, explanation. What jobs share is made once."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esegeta import patches, reducers
from esegeta._facts import declare
from esegeta._registry import find_method
from esegeta._types import Model, Score
from esegeta.engine import check
from esegeta.engine.execution import parse_memory
from esegeta.engine.memory import without_values
from esegeta.engine.refusals import one_line
from esegeta.models import from_module
from esegeta.run.config import building, plugins, trust
from esegeta.run.config import schema as config
from esegeta.run.config import sources as networks
from esegeta.run.config.building import Built
from esegeta.run.config.catalogue import Context
from esegeta.run.executors.child import verdict
from esegeta.run.executors.status import Status
from esegeta.run.volumes import files as volumes
from esegeta.run.volumes import labels, padding, preprocess, steps
from esegeta.run.volumes.prepared import Prepared
from esegeta.run.volumes.reading import Volume

_KEPT_INPUTS = 2
_MOST_CHANNELS = 16  # that are tried, to say how many a network takes


class Entry(NamedTuple):
    """The parts of a configuration that one job is about."""

    model: config.Model
    target: config.Target
    method: config.Method
    steps: list[dict[str, Any]]
    patches: config.Patches
    output: config.Output
    precision: str
    key: int
    trust: trust.Trust
    pad: str | None = None


class Image(NamedTuple):
    """An input as it is in its file, and as the network takes it."""

    volume: Volume
    prepared: Prepared
    x: Tensor


def entry_of(payload: dict[str, Any], memory: int | None = None) -> Entry:
    """Return the configuration in a job's payload, after its plugins have registered what it may name.

    Without a limit of its own the method has ``memory``, in bytes: what this worker may occupy.
    """
    allowed = trust.from_json(payload["trust"])
    plugins.load(payload["plugins"], allowed)
    method = config.Method.model_validate(payload["method"])
    return Entry(
        config.Model.model_validate(payload["model"]),
        config.Target.model_validate(payload["target"]),
        method.model_copy(update={"memory": memory}) if method.memory is None else method,
        payload["preprocess"],
        config.Patches.model_validate(payload["patches"] or {}),
        config.Output.model_validate(payload["output"]),
        payload["precision"],
        payload["key"],
        allowed,
        payload.get("pad"),
    )


def cached(cache: dict[str, Any], kind: str, about: Any, make: Callable[[], Any], most: int = 1) -> Any:
    """Return what this worker has made for a task before, or make it now; the last few of each kind are kept.

    >>> cache = {}
    >>> [cached(cache, "square", n, lambda: made) for n, made in ((3, 9), (3, 0), (4, 16))]
    [9, 9, 16]
    """
    shelf = cache.setdefault(kind, {})
    name = _key(about)
    if name not in shelf:
        while len(shelf) >= most:
            del shelf[next(iter(shelf))]
        shelf[name] = make()
    return shelf[name]


def _key(about: Any) -> str:
    return json.dumps(about, sort_keys=True, default=str)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn errors about arguments into refusals: what is wrong in here was asked for wrongly."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise check.Refused(str(error.args[0]) if isinstance(error, KeyError) else str(error)) from error


def repeatable(device: torch.device) -> None:
    """Make what a GPU computes repeatable, where it can be, and single precision single."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def image_of(payload: dict[str, Any], entry: Entry, device: torch.device, cache: dict[str, Any]) -> Image:
    """Return the input, read and prepared once for the jobs that share it."""

    def read() -> Image:
        files = [Path(p) for p in payload["files"]]
        volume = volumes.read(files, **payload["reading"], memory=_memory(entry))
        prepared = preprocess.apply(volume, entry.steps)
        return Image(volume, prepared, prepared.data.to(device))

    about = [payload["files"], payload["input_digest"], entry.steps]
    image: Image = cached(cache, "image", about, read, _KEPT_INPUTS)
    if entry.pad is None or entry.method.patches != "whole":  # a sliding window takes every image
        return image
    about = [*about, entry.model.model_dump(mode="json")]
    return cached(
        cache, "padded", about, lambda: _padded(image, model_of(entry, device, cache)), _KEPT_INPUTS
    )


def _padded(image: Image, model: Model) -> Image:
    """The image at sizes that the network takes, or as it is if no padding helps, which the network will say."""
    multiple = padding.multiples(model, image.x)
    if multiple is None or set(multiple) == {1}:
        return image
    prepared = steps.pad(list(multiple))(image.prepared)
    *before, last = prepared.record
    prepared = prepared._replace(record=(*before, {**last, "found": "auto"}))
    return image._replace(prepared=prepared, x=prepared.data.to(image.x.device))


def answer_of(entry: Entry, model: Model, image: Image) -> Any:
    """Return the network's answer; if it does not take the sizes of the image, say which it would take."""
    try:
        with torch.no_grad():
            return model(image.x)
    except Exception as error:
        if verdict(error) == Status.MEMORY:
            raise
        advice = _sizes(entry, model, image)
        shape = tuple(image.x.shape)
        if advice is None:
            channels = _channels(model, image)
            if channels is None:
                raise
            expected = f"an image of {channels} channel{'s' * (channels > 1)}, which the network takes"
            got = f"{shape[0]} channel{'s' * (shape[0] > 1)}, shape {shape}"
            mend = "Name the files of all its channels, or say with input.channels which axis they are"
            raise check.refused("input.files", expected, got, mend) from error
        where = advice[0]
        got = f"shape {shape}, of which it says {one_line(error)[:200]!r}"
        text = check.problem(where, "an image of sizes that the network takes", got, advice[1])
        raise check.Refused(one_line(text)) from error


def _channels(model: Model, image: Image) -> int | None:
    """How many channels the network takes, if it takes an image of this size with others than there are."""
    inner: Any = getattr(model, "model", model)
    for channels in range(1, _MOST_CHANNELS + 1):
        with contextlib.suppress(Exception):
            without_values(inner, image.x.new_empty((channels, *image.x.shape[1:])))
            return None if channels == len(image.x) else channels
    return None


def _sizes(entry: Entry, model: Model, image: Image) -> tuple[str, str] | None:
    """Where in a configuration sizes are wrong, and what to write there; None if no padding helps."""
    if entry.method.patches == "whole":
        found = padding.multiples(model, image.x)
        if found is None or set(found) == {1}:
            return None
        alike = found[0] if len(set(found)) == 1 else list(found)
        advice = f'Write pad = "auto" in [input], or the step {{ step = "pad", multiple = {alike} }}'
        return "input.preprocess", advice
    inner: Any = getattr(model, "model", model)
    size = entry.patches.size
    each = tuple(size) if isinstance(size, list) else (size,) * (image.x.ndim - 1)
    found = padding.multiples(inner, image.x.new_empty((len(image.x), *each)))
    if found is None or set(found) == {1}:
        return None
    return "patches.size", f"Write size = {list(padding.padded(each, found))} in [patches]"


def predicted(entry: Entry, answer: Any, image: Image) -> Tensor | None:
    """Return where the network sees the target, on its own grid; None if its answer has no grid."""
    target = building.class_of(entry.target)
    if target is None or answer.ndim != image.x.ndim or answer.shape[1:] != image.x.shape[1:]:
        return None
    exclusive = entry.target.parameters.get("exclusive", True)
    return reducers.predicted_mask(answer, target, exclusive=exclusive)


def on_file(mask: Tensor, image: Image) -> Tensor:
    """Bring a mask from the grid of the network to that of the file."""
    return image.prepared.back(mask[None].float().cpu(), "values")[0] >= 0.5


def reference_of(
    payload: dict[str, Any], image: Image, cache: dict[str, Any], memory: int | None, grid: str = "file"
) -> Tensor | None:
    """Return where the label map shows the target, on the grid of the file or the network; None without one."""
    given = payload.get("reference")
    if not given or given["file"] is None:
        return None
    path = Path(given["file"])

    def read() -> Tensor:
        return labels_of(path, image, given["grid"], "reference.grid", to=grid, memory=memory)

    about = [str(path), given["decides"], payload["input_digest"], grid, list(image.prepared.data.shape)]
    return torch.isin(cached(cache, "reference", about, read, 4), torch.tensor(given["labels"]))


def labels_of(
    path: Path, image: Image, grid: str, key: str, *, to: str = "file", memory: int | None = None
) -> Tensor:
    r"""Return a label map on the grid of an image.

    Args:
        path: of the label map.
        image: whose grid it is.
        grid: of a label map on another grid than the file of the image: "same" refuses it, "nearest" takes the
            nearest label.
        key: of the configuration that says that.
        to: "file" for the grid of the file, "network" for that of the prepared image.
        memory: in bytes, what reading may take.

    Returns:
        int64 (\*S).
    """
    found = labels.read(path, memory=memory)
    volume, prepared = image.volume, image.prepared
    own = labels.onto(found, volume.data.shape[1:], volume.affine, grid, key)
    return own if to == "file" else labels.onto(found, prepared.data.shape[1:], prepared.affine)


def _memory(entry: Entry) -> int | None:
    memory = entry.method.memory
    return None if memory is None else parse_memory("memory", memory)


def model_of(entry: Entry, device: torch.device, cache: dict[str, Any], whose: Any = None) -> Model:
    """Return the model, whose weights are loaded once; what methods find out about it is not kept.

    A job must not depend on which jobs its worker has done before. What the first call with an image shows, whether
    examples may go together, takes as long as several calls: ``answered`` keeps that for ``whose`` image.
    """
    about = entry.model.model_dump(mode="json")
    shown = cache.get("shown", {}).get(_key([about, whose])) if whose is not None else None
    if shown is None:
        loaded = cached(
            cache, "network", about, lambda: networks.load(entry.model, str(device), trust=entry.trust)
        )
        model: Model = from_module(loaded.module, output=loaded.output)
    else:
        model = shown.again()
    return model_around(model, entry)


def model_around(model: Model, entry: Entry) -> Model:
    """Return what runs a network on an image: on patches, where the method asks for them."""
    if entry.method.patches == "whole":
        return model
    extent = entry.patches
    with refusals():
        return patches.sliding_window(model, _size(extent.size), extent.overlap, extent.weights)


def answered(entry: Entry, image: Image, device: torch.device, cache: dict[str, Any], whose: Any) -> Any:
    """Return the network's answer to an image, computed once for the jobs that share both."""
    patched = entry.patches.model_dump(mode="json") if entry.method.patches != "whole" else None
    about = entry.model.model_dump(mode="json")

    def answer() -> Any:
        model = model_of(entry, device, cache)
        found = answer_of(entry, model, image)
        if patched is None:
            cached(cache, "shown", [about, whose], lambda: model)
        return found

    return cached(cache, "answer", [about, whose, patched], answer)


def _size(size: int | list[int]) -> int | tuple[int, ...]:
    return size if isinstance(size, int) else tuple(size)


def reader(image: Image, memory: int | None = None) -> Callable[[Path], Tensor]:
    """Return how a file becomes a tensor that a parameter names: a mask, labels or values on the image's grid."""

    def read(path: Path) -> Tensor:
        data = volumes.read(path, memory=memory).data
        grid = tuple(image.x.shape[1:])
        if tuple(data.shape[1:]) != grid:
            expected = f"{path.name} on the grid {grid} of the prepared image"
            advice = "Save it after the same preprocessing, or leave out the steps that change the grid"
            raise check.refused("file", expected, f"shape {tuple(data.shape[1:])}", advice)
        data = data.to(image.x.device)
        if len(data) == 1 and bool((data == data.round()).all()):
            labels = data[0].long()
            return labels.bool() if bool(((labels == 0) | (labels == 1)).all()) else labels
        return data

    return read


def explanation_of(
    entry: Entry, model: Model, image: Image, *, watch: Callable[[Score], Score] = lambda score: score
) -> tuple[Built, Score | None]:
    """Return the explanation with its baselines, and its score: none if every patch has its own.

    watch: from the score to what is explained, such as the same score with its runs counted.
    """
    context = Context(image.prepared.spacing, entry.key, reader(image, _memory(entry)))
    target, method = f"target {entry.target.name}", f"method {entry.method.id or entry.method.name}"

    def build(target_model: Model, x: Tensor) -> tuple[Built, Score]:
        score = watch(building.score(entry.target, target_model, x, context, target))
        return building.explanation(entry.method, score, x, context, method), score

    if entry.method.patches != "per_patch":
        return build(model, image.x)
    inner = getattr(model, "model", model)

    def of_patch(x: Tensor) -> Any:
        try:
            built, _ = build(inner, x)
        except check.EmptyMask:  # nothing of the target in this patch
            return None

        def own(z: Tensor, *, key: Any = None) -> Tensor:
            return (built._replace(key=key) if built.keyed else built)(z)

        return declare(own, key=built.keyed)

    extent = entry.patches
    explain = patches.patchwise(of_patch, _size(extent.size), extent.overlap, extent.weights)
    spec = find_method(entry.method.name)
    return Built(explain, (), True, frozenset(), spec, entry.key), None
