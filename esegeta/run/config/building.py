"""Build what a configuration names: scores, explanations, baselines, patches; and the configuration itself.

The process that reads a file and the worker that does a job build with the same functions. The one has no image, no
files and a collector of faults: everything that is wrong is told at once. The other has all of it, and stops at the
first fault.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esegeta import _types, random
from esegeta._registry import BASELINES, METHODS, REDUCERS, TRANSFORMS, MethodSpec
from esegeta._types import Explain, Score
from esegeta.engine.execution import parse_memory
from esegeta.features import Features
from esegeta.patches import sliding_window
from esegeta.placing import at
from esegeta.run.config import catalogue
from esegeta.run.config.annotations import is_file, shown
from esegeta.run.config.catalogue import (
    Context,
    Parameter,
    arguments,
    checking,
    complete,
    found,
    nearest,
)
from esegeta.run.config.faults import Collector, Strict, message_of
from esegeta.run.config.plugins import check_plugins
from esegeta.run.config.schema import (
    Call,
    Config,
    Input,
    Method,
    Model,
    Output,
    Patches,
    Reference,
    Run,
    Target,
)
from esegeta.run.config.sources import check_model, is_there
from esegeta.run.config.tables import keys_of, no_twins, one, several
from esegeta.run.config.trust import Trust
from esegeta.run.jobs import kinds
from esegeta.run.volumes import files as volumes
from esegeta.run.volumes import labels, preprocess
from esegeta.run.volumes.names import subjects

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


class Built(NamedTuple):
    """An explanation that waits for its image.

    refs: the baselines, in the order in which it takes them; keyed: whether it takes the key; axioms: what its
    method claims and its transforms preserve; spec: of its method; features: the parts of the image whose value the
    map shows at each of their elements, None where every element has its own.
    """

    explain: Explain
    refs: tuple[Tensor, ...]
    keyed: bool
    axioms: frozenset[str]
    spec: MethodSpec
    key: int = 0
    features: Features | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Explain an image."""
        extra = {"key": self.key} if self.keyed else {}
        return self.explain(x, *self.refs, **extra)


# --- Functions and their parameters -----------------------------------------------------------------------


def _made(
    make: Callable[..., Any],
    given: Mapping[str, Any],
    known: Mapping[str, Parameter],
    context: Context,
    path: str,
    owner: str,
) -> Any:
    """Return what a function makes of the parameters in a file; None where it cannot, or not yet."""
    settings = arguments(given, known, context, path, owner)
    if settings is not None and complete(settings):
        with context.faults.at(path):
            return make(**settings)
    return None


# --- Targets ----------------------------------------------------------------------------------------------


def score(
    target: Target, model: _types.Model, x: Tensor | None, context: Context, path: str = "target"
) -> Any:
    """Return the score of a target, its mask frozen at the image; None where something is wrong with it.

    Args:
        target: of the configuration.
        model: from ``sources.load``.
        x: the image after preprocessing; None if there is none yet.
        context: what its parameters are made with.
        path: of the target, for faults.
    """
    faults = context.faults
    spec = found(REDUCERS, target.reducer, f"{path}.reducer", faults)
    if spec is None:
        return None
    known, given = dict(catalogue.parameters(spec.fn, skip=1)), dict(target.parameters)
    if target.class_ is not None:
        got = str(target.class_)
        if "target" not in known:
            faults.add(f"{path}.class", f"no class for {target.reducer}", got, "Leave it out")
            return None
        if "target" in given:
            faults.add(f"{path}.class", "one class", "parameters.target too", "Leave one of them out")
            return None
        given["target"] = target.class_
    if "target" in known and "target" not in given:
        faults.add(f"{path}.class", "a whole number", "nothing", "Say which class is explained")
        known["target"] = known["target"]._replace(default=None)  # that it is missing is told
        arguments(given, known, context, f"{path}.parameters", target.reducer)
        return None

    def make(**settings: Any) -> Score:
        if spec.mask and x is None:
            settings["dynamic"] = True  # there is nothing yet at which it could be frozen
        elif spec.mask and not settings.get("dynamic", False):
            settings["at"] = x
        return spec.fn(model, **settings)

    return _made(make, given, known, context, f"{path}.parameters", target.reducer)


# --- Methods, transforms, baselines -----------------------------------------------------------------------


def explanation(
    method: Method,
    score: Score,
    x: Tensor | None,
    context: Context,
    path: str = "method",
    otherwise: str | Call | list[str | Call] | None = None,
) -> Any:
    """Return the explanation that an entry asks for with its baselines, ``Built``; None where that cannot be.

    Args:
        method: of the configuration.
        score: what is explained.
        x: the image after preprocessing; None if there is none yet.
        context: what its parameters are made with; its key is of everything that this method draws.
        path: of the method, for faults.
        otherwise: the baseline where the method names none.
    """
    faults = context.faults
    spec = found(METHODS, method.name, f"{path}.name", faults)
    explain: Explain | None = None
    features: Features | None = None
    refs: tuple[str, ...] | None = None
    keyed, axioms = False, frozenset[str]()
    if spec is not None:
        explain, features = _method(spec, method, path, score, context)
        refs, keyed, axioms = spec.refs, spec.key, spec.axioms
    for number, call in enumerate(method.transforms):
        here = f"{path}.transforms[{number}]"
        change = found(TRANSFORMS, call.name, f"{here}.name", faults)
        if change is None:
            continue
        if spec is not None and refs is not None:
            before, refs = refs, change.refs(refs)
            if refs is None:
                takes = f"which takes {' and '.join(before) if before else 'no baseline'}"
                expected = f"a transform for {spec.name}, {takes}"
                faults.add(here, expected, repr(call.name), "Leave it out")
        make = partial(change.fn, _stand_in if explain is None or refs is None else explain)
        own = catalogue.parameters(change.fn, skip=1)
        explain = _made(make, call.parameters, own, context, here, call.name)
        keyed, axioms = keyed or change.key, axioms & change.preserves
    if spec is None or refs is None:
        return None
    tensors = _references(method, path, spec.name, refs, x, context, otherwise)
    if explain is None or tensors is None:
        return None
    if method.place is not None and not spec.place:
        axioms = frozenset()  # of the head of the network, not of the score of the image
    return Built(explain, tensors, keyed, axioms, spec, context.key, features)


def _stand_in(x: Tensor) -> Tensor:
    return x


def _method(
    spec: MethodSpec, method: Method, path: str, score: Score, context: Context
) -> tuple[Explain | None, Features | None]:
    """The explanation of a method alone, at the first of its places, and the parts that its map is made of."""
    places = method.place if isinstance(method.place, list) else [method.place]
    if spec.place and method.place is None:
        advice = "`esegeta places` lists the places of a model"
        context.faults.add(f"{path}.place", "the name of a place in the network", "nothing", advice)
    elif not places or any(place == "" for place in places):
        expected, advice = "the name of a place", "Leave out or fill in"
        context.faults.add(f"{path}.place", expected, shown(method.place), advice)
    place = next(filter(None, places), None)

    def make(**settings: Any) -> tuple[Explain, Features | None]:
        if spec.place:
            explain = spec.fn(score, place or "place", **settings)
        else:
            explain = (spec.fn if place is None else at(spec.fn, place))(score, **settings)
        return explain, settings.get("features")

    known, here = catalogue.of_method(spec), f"{path}.parameters"
    return _made(make, method.parameters, known, context, here, spec.name) or (None, None)


def _references(
    method: Method,
    path: str,
    name: str,
    refs: tuple[str, ...],
    x: Tensor | None,
    context: Context,
    otherwise: str | Call | list[str | Call] | None,
) -> tuple[Tensor, ...] | None:
    """Return the baselines of a method, in the order in which it takes them; None where there is no image yet."""
    faults, given, here = context.faults, method.baseline, f"{path}.baseline"
    if not refs:
        if given is not None:
            faults.add(here, f"none for {name}", shown(_plain(given)), "Leave it out")
        return ()
    if given is None and otherwise is not None:
        given, here = otherwise, f"run.baseline, for {path}"
    if given is None:
        advice = 'Add for example baseline = "zero", here or in [run]'
        faults.add(here, f"a baseline for {name}", "nothing", advice)
        return None
    made = baselines(given, here, x, context)
    calls = given if isinstance(given, list) else [given]
    if not calls or (refs == ("baseline",) and made is not None and len(made) != 1):
        few = "one baseline" if refs == ("baseline",) else "at least one baseline"
        advice = "The transform over_baselines averages over several" if calls else "Name one"
        faults.add(here, f"{few} for {name}", str(len(made or ())), advice)
        return None
    images = [image for image in made or () if image is not None]
    if not images:
        return None
    return tuple(images[0] if kind == "baseline" else torch.stack(images) for kind in refs)


def _plain(given: Any) -> Any:
    if isinstance(given, list):
        return [_plain(one) for one in given]
    return given.model_dump() if isinstance(given, Call) else given


def baselines(
    given: str | Call | Sequence[str | Call], path: str, x: Tensor | None, context: Context
) -> list[Tensor | None] | None:
    """Return one or more baselines, None for each that has no image yet; None instead where one of them is wrong.

    The same call twice draws twice.
    """
    if isinstance(given, (str, Call)):
        return _baseline(given, path, 0, x, context)
    made = [_baseline(call, f"{path}[{n}]", n, x, context) for n, call in enumerate(given)]
    return None if None in made else [image for one in made for image in one or ()]


def _baseline(
    given: str | Call, path: str, number: int, x: Tensor | None, context: Context
) -> list[Tensor | None] | None:
    call, faults = Call(name=given) if isinstance(given, str) else given, context.faults
    spec = found(BASELINES, call.name, path, faults)
    if spec is None:
        return None
    fn, settings = spec.fn, call.parameters
    count: Any = settings.pop("count", 1)
    draws, right = catalogue.draws(fn), isinstance(count, int) and not isinstance(count, bool) and count >= 1
    if not draws and "count" in call.parameters:
        right = False
        faults.add(f"{path}.count", f"none: {call.name} is always the same", shown(count), "Leave it out")
    elif not right:
        faults.add(f"{path}.count", "a whole number >= 1", shown(count), "Change it")
    made = arguments(settings, catalogue.parameters(fn, skip=1), context, path, call.name)
    if made is None or not right:
        return None
    if x is None:
        return [None] * count
    if not draws:
        return [fn(x, **made)]
    keys = [random.fold_in(random.fold_in(context.key, number), index) for index in range(count)]
    return [fn(x, **made, key=key) for key in keys]


# --- The tables of a file ---------------------------------------------------------------------------------


def _missing(value: Any, path: str, folder: Path, faults: Strict) -> None:
    """The files that parameters name and that are not there."""
    if is_file(value):
        if not is_there(folder, value["file"]):
            faults.add(path, "a file", shown(value["file"]), "There is none of that name")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _missing(inner, f"{path}.{key}", folder, faults)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _missing(inner, f"{path}[{number}]", folder, faults)


def _is_name(text: str) -> bool:
    """Letters and digits of any script, with their marks, and '.', '_' and '-' between them.

    >>> _is_name("Ödem_2"), _is_name("肿瘤"), _is_name("../x"), _is_name("a b")
    (True, True, False, False)
    """
    kinds = [unicodedata.category(c)[0] for c in text]
    inside = all(kind in "LNM" or c in "._-" for kind, c in zip(kinds, text, strict=True))
    return bool(kinds) and kinds[0] in "LN" and inside


def check_name(value: str, path: str, faults: Strict) -> None:
    """Tell what is wrong with a name that becomes a part of file names."""
    if not (_is_name(value) if path.endswith(".name") else ID.fullmatch(value)):
        faults.add(path, "letters, digits, '.', '_' and '-'", shown(value), "It becomes a part of file names")


def limits(given: Any, path: str, faults: Strict) -> None:
    """Tell what is wrong with the ``deadline`` and the ``memory`` of a table."""
    if given.deadline is not None and given.deadline <= 0:
        faults.add(f"{path}.deadline", "seconds > 0", str(given.deadline), "Leave it out for none")
    if given.memory is not None:
        with faults.at(f"{path}.memory"):
            parse_memory(path, given.memory)


def _input(given: Input, folder: Path, faults: Strict) -> None:
    files: list[tuple[Path, ...]] = []
    with faults.at("input.files"):
        files = volumes.expand(given.files, folder)
    strange = [p.name for several in files for p in several if volumes.suffix_of(p) not in volumes.SUFFIXES]
    if strange:
        expected = f"images, which end with {', '.join(volumes.SUFFIXES)}"
        faults.add("input.files", expected, shown(strange[0]), "Narrow the pattern, or convert it")
    if given.frame is not None and (given.frame < 0 or given.channels is not None):
        got = "channels too" if given.channels is not None else str(given.frame)
        faults.add("input.frame", "a time point from 0, where no axis is channels", got, "Change it")
    if given.subject is not None:
        try:
            if re.compile(given.subject).groups < 1:
                advice = "Put round brackets around the subject: sub-([a-z]+)"
                faults.add("input.subject", "a pattern with a group", repr(given.subject), advice)
            elif files:
                subjects(files, given.subject)
        except (re.error, OverflowError, RecursionError) as error:
            faults.add("input.subject", "a regular expression", repr(given.subject), str(error))
        except volumes.UnreadableInput as error:
            faults.say(f"input.subject: {message_of(error)}")
    steps = [{"step": s.step, **s.parameters} for s in given.preprocess]
    for line in preprocess.problems(steps):
        number, _, text = line.partition(": ")
        faults.say(f"input.preprocess{number}: {message_of(text)}")


def _reference(
    given: Reference, images: Input | None, targets: Sequence[Target], folder: Path, faults: Strict
) -> None:
    """Check that the files are those of images, and that every target has a label."""
    for name in given.labels:
        if name not in [target.name for target in targets]:
            advice = nearest(name, [target.name for target in targets])
            faults.add("reference.labels", "names of targets", repr(name), advice)
    for target in targets:
        if not labels.meant(given.labels, target.name, class_of(target)):
            advice = f"Add labels = {{ {target.name} = 1 }}"
            faults.add("reference.labels", f"a label of the target {target.name}", "nothing", advice)
    if images is None:
        return
    try:
        own = subjects(volumes.expand(images.files, folder), images.subject)
    except (ValueError, re.error):  # told at the images
        return
    with faults.at("reference.files"):
        try:
            labels.matched(given.files, own, given.subject or images.subject, folder)
        except re.error as error:
            faults.add("reference.subject", "a regular expression", repr(given.subject), str(error))


def class_of(target: Target) -> int | None:
    """Return the class that a target is about, None if it is about none or several."""
    given = target.parameters.get("target", target.class_)
    return given if isinstance(given, int) and not isinstance(given, bool) else None


def _run(run: Run, folder: Path, faults: Strict) -> None:
    limits(run, "run", faults)
    for key in ("workers", "per_device", "threads"):
        value = getattr(run, key)
        if value is not None and value < 1:
            faults.add(f"run.{key}", "a whole number >= 1", str(getattr(run, key)), "Change it")
    if not run.devices:
        faults.add("run.devices", "at least one device", "none", 'Write ["cpu"]')
    for number, device in enumerate(run.devices):
        _device(device, f"run.devices[{number}]", faults)
    if not run.output.strip() or is_there(folder, run.output):
        faults.add("run.output", "a folder", shown(run.output), "Choose another name")
    if run.baseline is not None:
        baselines(run.baseline, "run.baseline", None, checking(faults))


def _device(device: str, path: str, faults: Strict) -> None:
    count = torch.cuda.device_count() if device.startswith("cuda") else 0
    if not DEVICE.fullmatch(device):
        faults.add(path, '"cpu", "cuda", "cuda:1" or "mps"', repr(device), "Write one of these")
    elif device.startswith("cuda") and int(device.partition(":")[2] or 0) >= count:
        expected = f"a device of this machine, which has {count} CUDA devices"
        faults.add(path, expected, repr(device), 'Use "cpu"')
    elif device == "mps" and not torch.backends.mps.is_available():
        faults.add(path, "a device of this machine", repr(device), 'Use "cpu"')


def _patches(patches: Patches, faults: Strict) -> None:
    """What ``sliding_window`` itself says of each of its parameters; the image has one to three axes."""
    sizes = patches.size if isinstance(patches.size, list) else [patches.size]
    if not 1 <= len(sizes) <= 3:
        expected = "one number of voxels or one for each axis"
        faults.add("patches.size", expected, shown(patches.size), "Change it")
        return
    given: dict[str, dict[str, Any]] = {
        "size": {"patch": patches.size},
        "overlap": {"patch": 1, "overlap": patches.overlap},
        "weights": {"patch": 1, "weights": patches.weights},
    }
    for key, settings in given.items():
        with faults.at(f"patches.{key}"):
            sliding_window(_stand_in, **settings)


def identities(method: Method) -> list[str]:
    """Return the ids of the entries that a method becomes: one, or one for each place."""
    spec = METHODS.by_name.get(method.name)
    own = method.id or (spec.name if spec else method.name)
    if not isinstance(method.place, list):
        return [own]
    return [f"{own}-{place_label(place)}" for place in method.place]


def place_label(place: str) -> str:
    """Return a place as a part of an id.

    >>> place_label("decoder.1#0")
    'decoder.1-0'
    """
    return re.sub(r"[^A-Za-z0-9._-]", "-", place)


def _of_kind(
    kind: kinds.Kind, raw: Mapping[str, Any], folder: Path, faults: Collector
) -> list[tuple[str, Any]]:
    """The tables that a kind of jobs brings along, with their paths."""
    section, key = kind.section, kind.table
    if section is None:
        return []
    if kind.many:
        given = [(f"{key}[{number}]", table) for number, table in several(section, raw, key, faults)]
    else:
        table = one(section, raw, key, faults)
        given = [] if table is None else [(key, table)]
    for path, table in given:
        _missing(table.model_dump(), path, folder, faults)
        if kind.check is not None:
            kind.check(table, path, faults)
    return given


def configuration(raw: Mapping[str, Any], folder: Path, trust: Trust, faults: Collector) -> Config | None:
    """Build a configuration of its tables, and once everything that they name, but for what takes an image.

    Args:
        raw: the tables, unchecked.
        folder: what paths are relative to.
        trust: which code may run.
        faults: everything that is wrong.
    """
    plugins = raw.get("plugins", [])
    check_plugins(plugins, folder, trust, faults)  # first: what they register can be named below
    of_kinds = kinds.tables()
    known = {key: kind for key, kind in keys_of(Config).items() if key != "more"} | of_kinds
    for key in raw:
        if key not in known:
            faults.add(str(key), "a table of the file", repr(key), nearest(key, known))
    for key in ("model", "input", "targets", "methods"):
        if key not in raw:
            expected = "a table" if key in ("model", "input") else f"tables [[{key}]]"
            faults.add(key, expected, "nothing", "Add it")
    model, given = one(Model, raw, "model", faults), one(Input, raw, "input", faults)
    run, patches = one(Run, raw, "run", faults), one(Patches, raw, "patches", faults)
    output = one(Output, raw, "output", faults)
    reference = one(Reference, raw, "reference", faults)
    more = {key: _of_kind(kind, raw, folder, faults) for key, kind in of_kinds.items() if key in raw}
    targets, methods = several(Target, raw, "targets", faults), several(Method, raw, "methods", faults)
    if model:
        check_model(model, folder, trust, faults)
    if given:
        _input(given, folder, faults)
    if run:
        _run(run, folder, faults)
    if patches:
        _patches(patches, faults)
    if reference:
        _reference(reference, given, [target for _, target in targets], folder, faults)
    nowhere = checking(faults)
    for number, target in targets:
        path = f"targets[{number}]"
        check_name(target.name, f"{path}.name", faults)
        score(target, _stand_in, None, nowhere, path)
        _missing(target.model_dump(), path, folder, faults)
    for number, method in methods:
        path = f"methods[{number}]"
        if method.id is not None:
            check_name(method.id, f"{path}.id", faults)
        limits(method, path, faults)
        if method.patches != "whole" and patches is None:
            advice = "Add a table [patches] with a size"
            faults.add(f"{path}.patches", '"whole"', repr(method.patches), advice)
        explanation(method, torch.sum, None, nowhere, path, run.baseline if run else None)
        _missing(method.model_dump(), path, folder, faults)
    no_twins([(f"targets[{n}]", [target.name]) for n, target in targets], "name", faults)
    no_twins([(f"methods[{n}]", identities(method)) for n, method in methods], "id", faults)
    ids = [name for _, method in methods for name in identities(method)]
    beside = kinds.Beside([target.name for _, target in targets], ids, "reference" in raw)
    for key, tables in more.items():
        if (together := of_kinds[key].check_all) is not None:
            together(tables, beside, faults)
    if faults.lines or model is None or given is None:
        return None
    return Config(
        plugins=plugins,
        model=model,
        input=given,
        targets=[t for _, t in targets],
        methods=[m for _, m in methods],
        reference=reference,
        patches=patches,
        run=run or Run(),
        output=output or Output(),
        more={
            key: [table for _, table in tables] if of_kinds[key].many else tables[0][1]
            for key, tables in more.items()
            if tables
        },
    )
