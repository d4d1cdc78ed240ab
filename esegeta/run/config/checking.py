"""Everything that can be wrong with a configuration, found at once and before anything runs."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from esegeta.patches import sliding_window
from esegeta.run.config import catalogue
from esegeta.run.config import sources as networks
from esegeta.run.config.annotations import is_file, shown
from esegeta.run.config.catalogue import fault, faults_of, nearest
from esegeta.run.config.entries import baseline_faults, limits, method_faults, target_faults, told, tried
from esegeta.run.config.loading import Config, Input, Method, Model, Output, Patches, Run, Target, is_program
from esegeta.run.config.plugins import plugin_faults
from esegeta.run.config.tables import Part, keys_of, part
from esegeta.run.config.trust import Trust, UntrustedError, judge, judge_program, located
from esegeta.run.jobs import kinds
from esegeta.run.jobs.names import subjects
from esegeta.run.volumes import files as volumes
from esegeta.run.volumes import preprocess

FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
PROGRAMS = {".pt2": "an exported program", ".ts": "TorchScript", ".pt": "TorchScript"}
WEIGHTS = (".pt", ".pth", ".safetensors")
DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


def model_faults(model: Model, folder: Path, trust: Trust) -> list[str]:
    """What is wrong with the model of a configuration, without loading it."""
    found, source = [], model.source
    if source.startswith("zoo:"):
        known = networks.of_zoo()
        name = source.removeprefix("zoo:")
        if name not in known:
            found.append(fault("model.source", "a network of the zoo", repr(name), nearest(name, known)))
        else:
            settings = catalogue.parameters(known[name], without=())  # the key of its weights is its own
            found += faults_of("model.arguments", model.arguments, settings, name)
        if model.weights is not None:
            found.append(
                fault("model.weights", "none for a network of the zoo", shown(model.weights), "Leave it out")
            )
    elif is_program(source):
        if not _is_file(folder, source):
            found.append(fault("model.source", "a file", repr(source), "There is none of that name"))
        else:
            found += _untrusted(judge_program, folder / os.path.expanduser(source), trust)
        for key, given in (("weights", model.weights), ("arguments", model.arguments)):
            if given:
                kind = PROGRAMS[Path(source).suffix]
                found.append(fault(f"model.{key}", f"nothing beside {kind}", shown(given), "Leave it out"))
    elif FACTORY.fullmatch(source):
        top = source.partition(":")[0].partition(".")[0]
        if networks.of_python(top):
            advice = "Give the file with your network another name"
            found.append(fault("model.source", "a module that is no part of Python", repr(top), advice))
        else:
            found += _module(source, folder / os.path.expanduser(model.path or "."), trust)
    else:
        expected = '"zoo:name", "package.module:factory" or a file .pt2 or .ts'
        found.append(fault("model.source", expected, repr(source), "Write one of these"))
    if model.weights is not None and not source.startswith("zoo:"):
        if Path(model.weights).suffix not in WEIGHTS:
            found.append(
                fault("model.weights", f"a file {', '.join(WEIGHTS)}", repr(model.weights), "Convert it")
            )
        elif not _is_file(folder, model.weights):
            found.append(fault("model.weights", "a file", repr(model.weights), "There is none of that name"))
    return found


def _untrusted(judged: Callable[..., None], *arguments: Any) -> list[str]:
    try:
        judged(*arguments)
    except UntrustedError as error:
        return [fault("model.source", error.expected, error.got, error.advice)]
    return []


def _module(source: str, place: Path, trust: Trust) -> list[str]:
    """What is wrong with the module of a factory, without importing anything."""
    try:
        way = located(source.partition(":")[0], place)
    except (OSError, ValueError):  # a name that no module can have
        way = None
    if way is None:
        advice = "Install it, or name its folder with model.path"
        return [
            fault("model.source", "a module that can be imported", repr(source.partition(":")[0]), advice)
        ]
    return _untrusted(judge, source, way, place, trust)


def _is_file(folder: Path, name: str) -> bool:
    try:
        return (folder / os.path.expanduser(name)).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _missing(value: Any, path: str, folder: Path) -> list[str]:
    """The files that parameters name and that are not there."""
    if is_file(value):
        there = _is_file(folder, value["file"])
        return [] if there else [fault(path, "a file", shown(value["file"]), "There is none of that name")]
    if isinstance(value, Mapping):
        return [line for key, inner in value.items() for line in _missing(inner, f"{path}.{key}", folder)]
    if isinstance(value, list):
        return [line for n, inner in enumerate(value) for line in _missing(inner, f"{path}[{n}]", folder)]
    return []


def _input(given: Input, folder: Path) -> list[str]:
    found = []
    files: list[tuple[Path, ...]] = []
    try:
        files = volumes.expand(given.files, folder)
    except (ValueError, TypeError) as error:
        found.append(f"input.files: {told(error)}")
    strange = [p.name for several in files for p in several if volumes.suffix_of(p) not in volumes.SUFFIXES]
    if strange:
        expected = f"images, which end with {', '.join(volumes.SUFFIXES)}"
        found.append(fault("input.files", expected, shown(strange[0]), "Narrow the pattern, or convert it"))
    if given.frame is not None and (given.frame < 0 or given.channels is not None):
        got = "channels too" if given.channels is not None else str(given.frame)
        found.append(fault("input.frame", "a time point from 0, where no axis is channels", got, "Change it"))
    if given.subject is not None:
        try:
            if re.compile(given.subject).groups < 1:
                advice = "Put round brackets around the subject: sub-([a-z]+)"
                found.append(fault("input.subject", "a pattern with a group", repr(given.subject), advice))
            elif files:
                subjects(files, given.subject)
        except re.error as error:
            found.append(fault("input.subject", "a regular expression", repr(given.subject), str(error)))
        except volumes.UnreadableInput as error:
            found.append(f"input.subject: {told(error)}")
    steps = [{"step": s.step, **s.parameters} for s in given.preprocess]
    for line in preprocess.problems(steps):
        number, _, text = line.partition(": ")
        found.append(f"input.preprocess{number}: {told(ValueError(text))}")
    return found


def _run(run: Run, folder: Path) -> list[str]:
    found = limits(run, "run")
    for key in ("workers", "per_device", "threads"):
        value = getattr(run, key)
        if value is not None and value < 1:
            found.append(fault(f"run.{key}", "a whole number >= 1", str(getattr(run, key)), "Change it"))
    if not run.devices:
        found.append(fault("run.devices", "at least one device", "none", 'Write ["cpu"]'))
    for number, device in enumerate(run.devices):
        found += _device(device, f"run.devices[{number}]")
    if not run.output.strip() or _is_file(folder, run.output):
        found.append(fault("run.output", "a folder", shown(run.output), "Choose another name"))
    if run.baseline is not None:
        calls = run.baseline if isinstance(run.baseline, list) else [run.baseline]
        for n, call in enumerate(calls):
            found += baseline_faults(call, "run.baseline", n, isinstance(run.baseline, list))
    return found


def _device(device: str, path: str) -> list[str]:
    if not DEVICE.fullmatch(device):
        return [fault(path, '"cpu", "cuda", "cuda:1" or "mps"', repr(device), "Write one of these")]
    count = torch.cuda.device_count() if device.startswith("cuda") else 0
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= count:
        return [
            fault(
                path, f"a device of this machine, which has {count} CUDA devices", repr(device), 'Use "cpu"'
            )
        ]
    if device == "mps" and not torch.backends.mps.is_available():
        return [fault(path, "a device of this machine", repr(device), 'Use "cpu"')]
    return []


def _patches(patches: Patches) -> list[str]:
    """What ``sliding_window`` itself says of each of its parameters; the image has one to three axes."""
    sizes = patches.size if isinstance(patches.size, list) else [patches.size]
    if not 1 <= len(sizes) <= 3:
        expected = "one number of voxels or one for each axis"
        return [fault("patches.size", expected, shown(patches.size), "Change it")]
    given: dict[str, dict[str, Any]] = {
        "size": {"patch": patches.size},
        "overlap": {"patch": 1, "overlap": patches.overlap},
        "weights": {"patch": 1, "weights": patches.weights},
    }
    return [
        line
        for key, settings in given.items()
        for line in tried(f"patches.{key}", settings, partial(sliding_window, _same, **settings))
    ]


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def checked(raw: Mapping[str, Any], folder: Path, trust: Trust) -> tuple[Config | None, list[str]]:
    """The configuration as its classes, or None; and everything that is wrong, each on one line."""
    faults: list[str] = []
    of_kinds = kinds.tables()
    known = {key: kind for key, kind in keys_of(Config).items() if key != "more"} | of_kinds
    faults += [
        fault(str(key), "a table of the file", repr(key), nearest(key, known))
        for key in raw
        if key not in known
    ]
    faults += [
        fault(k, "a table" if k in ("model", "input") else f"tables [[{k}]]", "nothing", "Add it")
        for k in ("model", "input", "targets", "methods")
        if k not in raw
    ]
    plugins = raw.get("plugins", [])
    faults += plugin_faults(plugins, folder, trust)  # first: what they register can be named below
    model, given = _one(Model, raw, "model", faults), _one(Input, raw, "input", faults)
    run, patches = _one(Run, raw, "run", faults), _one(Patches, raw, "patches", faults)
    output = _one(Output, raw, "output", faults)
    more = {key: _one(section, raw, key, faults) for key, section in of_kinds.items()}
    targets, methods = _several(Target, raw, "targets", faults), _several(Method, raw, "methods", faults)
    faults += model_faults(model, folder, trust) if model else []
    faults += _input(given, folder) if given else []
    faults += _run(run, folder) if run else []
    faults += _patches(patches) if patches else []
    for number, target in targets:
        faults += target_faults(target, f"targets[{number}]")
        faults += _missing(target.model_dump(), f"targets[{number}]", folder)
    for number, method in methods:
        faults += method_faults(method, f"methods[{number}]", run, patches)
        faults += _missing(method.model_dump(), f"methods[{number}]", folder)
    faults += _twice("targets", "name", [(n, [t.name]) for n, t in targets])
    faults += _twice("methods", "id", [(n, identities(m)) for n, m in methods])
    if faults or model is None or given is None:
        return None, _in_order(faults, raw)
    whole = Config(
        plugins=plugins,
        model=model,
        input=given,
        targets=[t for _, t in targets],
        methods=[m for _, m in methods],
        patches=patches,
        run=run or Run(),
        output=output or Output(),
        more={key: table for key, table in more.items() if table is not None},
    )
    return whole, []


def _in_order(faults: Iterable[str], raw: Mapping[str, Any]) -> list[str]:
    """As the file has them; what follows from a key that is left out, because it is wrong, is no other fault."""
    first: dict[str, str] = {}
    for line in faults:
        first.setdefault(line.partition(":")[0], line)
    tables = list(raw)

    def place(path: str) -> tuple[int, int]:
        found = re.match(r"(\w+)(?:\[(\d+)\])?", path)
        table, number = (found[1], found[2]) if found else ("", None)
        return (tables.index(table) if table in tables else len(tables), int(number or 0))

    return [first[path] for path in sorted(first, key=place)]


def _one(cls: type[Part], raw: Mapping[str, Any], key: str, faults: list[str]) -> Part | None:
    if key not in raw or (raw[key] is None and key == "patches"):
        return None
    return part(cls, raw[key], key, faults)


def _several(cls: type[Part], raw: Mapping[str, Any], key: str, faults: list[str]) -> list[tuple[int, Part]]:
    tables = raw.get(key, ())
    if key in raw and (not isinstance(tables, (list, tuple)) or not tables):
        faults.append(fault(key, f"at least one table [[{key}]]", shown(tables), "Add one"))
        return []
    made = [(n, part(cls, table, f"{key}[{n}]", faults)) for n, table in enumerate(tables)]
    return [(n, one) for n, one in made if one is not None]


def identities(method: Method) -> list[str]:
    """The ids of the entries that a method becomes: one, or one for each place."""
    spec = catalogue.methods_by_name().get(method.name)
    own = method.id or (spec.name if spec else method.name)
    if not isinstance(method.place, list):
        return [own]
    return [f"{own}-{re.sub(r'[^A-Za-z0-9._-]', '-', place)}" for place in method.place]


def _twice(table: str, key: str, entries: Iterable[tuple[int, Sequence[str]]]) -> list[str]:
    first: dict[str, int] = {}
    found = []
    for number, names in entries:
        for name in names:
            if first.setdefault(name.lower(), number) != number or list(names).count(name) > 1:
                path = f"{table}[{number}].{key}"
                got = f"{name!r} again, as in {table}[{first[name.lower()]}]"
                found.append(fault(path, f"a different {key}", got, f"Choose another {key}"))
    return list(dict.fromkeys(found))
