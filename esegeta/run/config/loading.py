"""Read a configuration: a TOML or JSON file, checked as a whole before anything starts.

``load`` gives a ``Config`` in which everything is said in one way: paths are absolute, every method has its id,
its one place and its baseline. Needs pydantic: ``pip install "esegeta[cli]"``.
"""

import glob
import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esegeta._registry import METHODS
from esegeta.engine import check
from esegeta.patches import sliding_window
from esegeta.run import bounds
from esegeta.run.config.building import baselines, class_of, explanation, score
from esegeta.run.config.catalogue import checking, references
from esegeta.run.config.faults import Collector, Faults, Strict, message_of, nearest, shown
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
    Section,
    Target,
)
from esegeta.run.config.sources import checked
from esegeta.run.config.tables import (
    absolute,
    check_name,
    id_and_limits,
    is_there,
    keys_of,
    no_twins,
    one,
    own_limits,
    part,
    place_label,
    placed,
    several,
)
from esegeta.run.config.trust import Trust, asked, of_environment
from esegeta.run.jobs.kinds import Beside, Kind, tables
from esegeta.run.volumes import files as volumes
from esegeta.run.volumes import labels, preprocess
from esegeta.run.volumes.names import subjects

WHERE = "configuration"
DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


def load(
    source: str | Path | Mapping[str, Any],
    *,
    run: Mapping[str, Any] | None = None,
    trust: Iterable[str] = (),
) -> Config:
    """Return a configuration, complete and checked.

    Relative paths are relative to the folder of the file; those of a mapping to the current folder. ``place`` of a
    method is then one place, ``baseline`` a list of calls, ``memory`` bytes; limits of ``[run]`` are in every method
    that has none of its own; ``class`` of a target is its parameter ``target``.

    Args:
        source: a file .toml or .json, or what is in one.
        run: settings that take the place of those in ``[run]``.
        trust: what may run besides the Python files in the folder of the configuration and the networks of known
            packages: names of modules or functions, folders or files.

    Returns:
        The configuration. ``Faults`` has everything that is wrong.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> _ = (folder / "x.npy").write_bytes(b"")
        >>> found = load({
        ...     "model": {"source": "zoo:brain_extraction_unet"},
        ...     "input": {"files": str(folder / "x.npy")},
        ...     "targets": [{"name": "brain", "class": 1}],
        ...     "methods": [{"name": "ig", "parameters": {"steps": 8}, "baseline": "zero"}],
        ... })
        >>> found.methods[0].id, found.methods[0].baseline, found.targets[0].parameters
        ('integrated_gradients', [Call(name='zero')], {'target': 1})
    """
    raw, folder = read(source)
    if run and isinstance(raw.get("run", {}), Mapping):
        raw = {**raw, "run": {**raw.get("run", {}), **run}}
    allowed = asked(folder, [*of_environment(), *trust])
    config = configuration(raw, folder, allowed)
    config._trust = allowed
    return config


def trusting(config: Config, trust: Iterable[str]) -> Config:
    """Return the same configuration, with more code that may run."""
    more = config.model_copy()
    more._trust = config.trust.and_also(trust)
    return more


def model_of(source: str | Path | Mapping[str, Any], *, trust: Iterable[str] = ()) -> tuple[Model, Trust]:
    """Return the model of a configuration, whatever else is in it, and which code may run."""
    raw, folder = read(source)
    faults = Collector()
    model = part(Model, raw.get("model"), "model", faults)
    allowed = asked(folder, [*of_environment(), *trust])
    model = model and checked(model, folder, allowed, faults)
    if faults.lines or model is None:
        raise Faults(faults.lines)
    return model, allowed


def input_of(source: str | Path | Mapping[str, Any]) -> Input | None:
    """Return the images of a configuration, whatever else is in it; None if it names none."""
    raw, folder = read(source)
    if not isinstance(raw.get("input"), Mapping) or not raw["input"].get("files"):
        return None
    faults = Collector()
    found = part(Input, raw["input"], "input", faults)
    if faults.lines or found is None:
        raise Faults(faults.lines)
    return found.model_copy(update={"files": _pattern(found.files, folder)})


def plugins_of(source: str | Path | Mapping[str, Any], *, trust: Iterable[str] = ()) -> None:
    """Import the plugins of a configuration, whatever else is in it."""
    raw, folder = read(source)
    faults = Collector()
    check_plugins(raw.get("plugins", []), folder, asked(folder, [*of_environment(), *trust]), faults)
    if faults.lines:
        raise Faults(faults.lines)


def problems(source: str | Path | Mapping[str, Any]) -> list[str]:
    """Return everything that is wrong with a configuration, a line each; nothing if it can run."""
    try:
        load(source)
    except Faults as error:
        return error.faults
    return []


def dump(config: Config) -> dict[str, Any]:
    """Return a configuration as JSON has it; ``load`` of that is the same configuration."""
    return config.model_dump(by_alias=True, mode="json", exclude_none=True)


def read(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], Path]:
    """Return what is in a file, unchecked, and the folder that its paths are relative to."""
    if isinstance(source, Mapping):
        return source, Path.cwd()
    path = Path(source)
    try:
        if path.suffix not in (".toml", ".json"):
            raise _unreadable(
                path, "a file .toml or .json", "another kind of file", "`esegeta init` writes one"
            )
        text = bounds.text(path)
        raw = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text, object_pairs_hook=_once)
    except OSError as error:
        advice = "Check the name; `esegeta init` writes a new one"
        raise _unreadable(
            path, "a file that can be read", (error.strerror or "an error").lower(), advice
        ) from None
    except bounds.TooMuch as error:
        raise _unreadable(path, error.expected, error.got, error.advice) from None
    except UnicodeDecodeError:
        raise _unreadable(path, "text in UTF-8", "other bytes", "Save it again as text") from None
    except ValueError as error:  # of TOML and of JSON
        language = "TOML" if path.suffix == ".toml" else "JSON"
        raise _unreadable(path, language, f"a fault in it: {error}", "Correct it there") from None
    if not isinstance(raw, dict):
        raise _unreadable(path, "a table", type(raw).__name__, "See `esegeta init`")
    if {"model_nature", "model_name", "amp_enbled", "test_run"} & set(raw):
        advice = f"Translate it first: esegeta convert {path}"
        raise _unreadable(path, "a configuration of esegeta", "one of TorchEsegeta", advice)
    return raw, path.absolute().parent


def _unreadable(path: Path, expected: str, got: str, advice: str) -> Faults:
    return Faults([check.problem(WHERE, f"{path} to be {expected}", got, advice).replace("\n", " ")])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        advice = "Leave one of them out"
        raise Faults([check.problem(WHERE, "every key of a table once", f"{', '.join(twice)} twice", advice)])
    return found


# --- The tables of a file ---------------------------------------------------------------------------------


def _pattern(given: Any, folder: Path) -> Any:
    """Return the same patterns from anywhere: ``[`` and ``*`` in the name of the folder are no pattern."""
    if isinstance(given, list):
        return [_pattern(one, folder) for one in given]
    whole = absolute(given, folder)
    if os.path.isabs(os.path.expanduser(given)) or os.path.isfile(whole):
        return whole
    return os.path.normpath(Path(glob.escape(str(folder))) / given)


def _nothing_yet(x: Tensor) -> Tensor:
    return x


def _input(given: Input, folder: Path, faults: Strict) -> Input:
    """Return the images with patterns that hold from anywhere, and tell what is wrong with them."""
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
    return given.model_copy(update={"files": _pattern(given.files, folder)})


def _reference(
    given: Reference, images: Input | None, targets: Sequence[Target], folder: Path, faults: Strict
) -> Reference:
    """Return ground truths with patterns that hold from anywhere: files of images, and a label for every target."""
    whole = given.model_copy(update={"files": _pattern(given.files, folder)})
    for name in given.labels:
        if name not in [target.name for target in targets]:
            advice = nearest(name, [target.name for target in targets])
            faults.add("reference.labels", "names of targets", repr(name), advice)
    for target in targets:
        if not labels.meant(given.labels, target.name, class_of(target)):
            advice = f"Add labels = {{ {target.name} = 1 }}"
            faults.add("reference.labels", f"a label of the target {target.name}", "nothing", advice)
    if images is None:
        return whole
    try:
        own = subjects(volumes.expand(images.files, folder), images.subject)
    except (ValueError, re.error):  # told at the images
        return whole
    with faults.at("reference.files"):
        try:
            labels.matched(given.files, own, given.subject or images.subject, folder)
        except re.error as error:
            faults.add("reference.subject", "a regular expression", repr(given.subject), str(error))
    return whole


def _run(run: Run, folder: Path, faults: Strict) -> Run:
    """Return how it runs, with the folder of results as an absolute path and memory in bytes."""
    whole = {"output": absolute(run.output, folder), **own_limits(run, "run", faults)}
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
    return run.model_copy(update=whole)


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
            sliding_window(_nothing_yet, **settings)


def _target(target: Target, path: str, folder: Path, faults: Strict) -> Target:
    """Return what is explained, its class among its parameters, and tell what is wrong with it."""
    check_name(target.name, f"{path}.name", faults)
    score(target, _nothing_yet, None, checking(faults), path)
    whole = placed(target, path, folder, faults)
    if target.class_ is None:
        return whole
    return whole.model_copy(
        update={"class_": None, "parameters": {**whole.parameters, "target": target.class_}}
    )


def _entries(
    method: Method, path: str, run: Run, patches: Patches | None, folder: Path, faults: Strict
) -> list[Method]:
    """Return an entry for each place of a method, complete, and tell what is wrong with it."""
    own = {key: limit for key, limit in id_and_limits(method, path, faults).items() if limit is not None}
    if method.patches != "whole" and patches is None:
        faults.add(f"{path}.patches", '"whole"', repr(method.patches), "Add a table [patches] with a size")
    explanation(method, torch.sum, None, checking(faults), path, run.baseline)
    whole = placed(method, path, folder, faults)
    spec = METHODS.by_name.get(method.name)
    given, name = method.baseline, spec.name if spec else method.name
    if given is None and spec and references(spec.refs, [call.name for call in method.transforms]):
        given = run.baseline
    calls = given if isinstance(given, list) or given is None else [given]
    common = {
        "name": name,
        "baseline": calls and [Call(name=one) if isinstance(one, str) else one for one in calls],
        "deadline": run.deadline,
        "memory": run.memory,
        **own,
    }
    places, first = method.place, method.id or name
    if not isinstance(places, list):
        return [whole.model_copy(update={**common, "id": first})]
    ids = [f"{first}-{place_label(place)}" for place in places]
    return [
        whole.model_copy(update={**common, "id": i, "place": p}) for i, p in zip(ids, places, strict=True)
    ]


def _of_kind(kind: Kind, raw: Mapping[str, Any], folder: Path, faults: Strict) -> list[tuple[str, Any]]:
    """Return the tables that a kind of jobs brings along, with their paths, and tell what is wrong with them."""
    section, key, made = kind.section, kind.table, []
    if section is None:
        return []
    alone = None if kind.many else one(section, raw, key, faults)
    given = several(section, raw, key, faults) if kind.many else [(key, alone)] if alone else []
    for path, table in given:
        whole = placed(table, path, folder, faults)
        if kind.check is not None:
            kind.check(table, path, faults)
        if isinstance(whole, Section):
            whole = whole.placed(lambda name: _pattern(name, folder))
        made.append((path, whole))
    return made


def configuration(raw: Mapping[str, Any], folder: Path, trust: Trust) -> Config:
    """Return the configuration of these tables: all that they name is built once, but for what takes an image.

    Args:
        raw: the tables, unchecked.
        folder: what paths are relative to.
        trust: which code may run.

    Returns:
        The configuration, complete. ``Faults`` has everything that is wrong.
    """
    faults, plugins = Collector(), raw.get("plugins", [])
    check_plugins(plugins, folder, trust, faults)  # first: what they register can be named below
    kinds = tables()
    known = {key for key in keys_of(Config) if key != "more"} | set(kinds)
    for key in raw:
        if key not in known:
            faults.add(str(key), "a table of the file", repr(key), nearest(key, known))
    for key in ("model", "input", "targets", "methods"):
        if key not in raw:
            expected = "a table" if key in ("model", "input") else f"tables [[{key}]]"
            faults.add(key, expected, "nothing", "Add it")
    model, images = one(Model, raw, "model", faults), one(Input, raw, "input", faults)
    run, patches = one(Run, raw, "run", faults) or Run(), one(Patches, raw, "patches", faults)
    output = one(Output, raw, "output", faults) or Output()
    reference = one(Reference, raw, "reference", faults)
    of_kinds = {key: _of_kind(kind, raw, folder, faults) for key, kind in kinds.items() if key in raw}
    asked, methods = several(Target, raw, "targets", faults), several(Method, raw, "methods", faults)
    found = images and _input(images, folder, faults)
    model = model and checked(model, folder, trust, faults)
    run = _run(run, folder, faults)
    if patches:
        _patches(patches, faults)
    if reference:
        reference = _reference(reference, images, [target for _, target in asked], folder, faults)
    targets = [(path, _target(target, path, folder, faults)) for path, target in asked]
    entries = [(path, _entries(method, path, run, patches, folder, faults)) for path, method in methods]
    no_twins([(path, [target.name]) for path, target in targets], "name", faults)
    named = [(path, [str(entry.id) for entry in own]) for path, own in entries]
    no_twins(named, "id", faults)
    names, ids = [target.name for _, target in targets], [id for _, own in named for id in own]
    for key, own in of_kinds.items():
        if (together := kinds[key].check_all) is not None:
            together(own, Beside(names, ids, "reference" in raw), faults)
    if faults.lines or model is None or found is None:
        raise Faults(faults.in_order(raw))
    return Config(
        plugins=[absolute(name, folder) for name in plugins],
        model=model,
        input=found,
        targets=[target for _, target in targets],
        methods=[entry for _, own in entries for entry in own],
        reference=reference,
        patches=patches,
        run=run,
        output=output,
        more={
            key: [table for _, table in own] if kinds[key].many else own[0][1]
            for key, own in of_kinds.items()
            if own
        },
    )
