"""Read a configuration: a TOML or JSON file, checked as a whole before anything starts.

``load`` gives a ``Config`` in which everything is said in one way: paths are absolute, every method has its id,
its one place and its baseline. Needs pydantic: ``pip install "esegeta[cli]"``.
"""

import glob
import json
import os
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from esegeta._registry import find_method
from esegeta.engine import check
from esegeta.engine.execution import parse_memory
from esegeta.run import bounds
from esegeta.run.config.annotations import with_files
from esegeta.run.config.building import configuration, identities
from esegeta.run.config.catalogue import references
from esegeta.run.config.faults import Collector, Faults
from esegeta.run.config.plugins import check_plugins
from esegeta.run.config.schema import Call, Config, Input, Method, Model, Run, Section
from esegeta.run.config.sources import check_model, is_program
from esegeta.run.config.tables import part
from esegeta.run.config.trust import Trust, asked, of_environment

WHERE = "configuration"


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
    faults = Collector()
    config = configuration(raw, folder, allowed, faults)
    if config is None:
        raise Faults(faults.in_order(raw))
    whole = _resolved(config, folder)
    whole._trust = allowed
    return whole


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
    if model is not None:
        check_model(model, folder, allowed, faults)
    if faults.lines or model is None:
        raise Faults(faults.lines)
    return _placed(model, folder), allowed


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


def _resolved(config: Config, folder: Path) -> Config:
    """Return the same, with everything said in one way."""
    memory = None if config.run.memory is None else parse_memory(WHERE, config.run.memory)
    run = config.run.model_copy(update={"output": _absolute(config.run.output, folder), "memory": memory})
    targets = [
        target.model_copy(
            update={"class_": None, "parameters": {**target.parameters, "target": target.class_}}
        )
        if target.class_ is not None
        else target
        for target in config.targets
    ]
    return config.model_copy(
        update={
            "plugins": [_absolute(name, folder) for name in config.plugins],
            "model": _placed(config.model, folder),
            "input": config.input.model_copy(update={"files": _pattern(config.input.files, folder)}),
            "reference": config.reference
            and config.reference.model_copy(update={"files": _pattern(config.reference.files, folder)}),
            "targets": [_with_files(target, folder) for target in targets],
            "methods": [
                _with_files(entry, folder) for method in config.methods for entry in _entries(method, run)
            ],
            "run": run,
            "more": {
                key: [_of_kind(one, folder) for one in given]
                if isinstance(given, list)
                else _of_kind(given, folder)
                for key, given in config.more.items()
            },
        }
    )


def _absolute(path: str, folder: Path) -> str:
    return os.path.normpath(folder / os.path.expanduser(path))


def _pattern(given: Any, folder: Path) -> Any:
    """Return the same patterns from anywhere: ``[`` and ``*`` in the name of the folder are no pattern."""
    if isinstance(given, list):
        return [_pattern(one, folder) for one in given]
    whole = _absolute(given, folder)
    if os.path.isabs(os.path.expanduser(given)) or os.path.isfile(whole):
        return whole
    return os.path.normpath(Path(glob.escape(str(folder))) / given)


def _of_kind(table: BaseModel, folder: Path) -> BaseModel:
    """The same table of a kind of jobs, with the files that it names as absolute paths."""
    whole = _with_files(table, folder)
    return whole.placed(lambda given: _pattern(given, folder)) if isinstance(whole, Section) else whole


Named = TypeVar("Named", bound=BaseModel)


def _with_files(entry: Named, folder: Path) -> Named:
    """The same, with the files that its parameters name as absolute paths."""
    found = with_files(entry.model_dump(by_alias=True), lambda name: _absolute(name, folder))
    return type(entry).model_validate(found)


def _placed(model: Model, folder: Path) -> Model:
    is_file = is_program(model.source)
    return model.model_copy(
        update={
            "source": _absolute(model.source, folder) if is_file else model.source,
            "weights": model.weights and _absolute(model.weights, folder),
            "path": _absolute(model.path or ".", folder),
        }
    )


def _entries(method: Method, run: Run) -> list[Method]:
    """An entry for each place."""
    spec = find_method(method.name)
    given = method.baseline
    if given is None and references(spec.refs, [call.name for call in method.transforms]):
        given = run.baseline
    calls = given if isinstance(given, list) or given is None else [given]
    common = {
        "name": spec.name,
        "baseline": calls and [Call(name=one) if isinstance(one, str) else one for one in calls],
        "deadline": run.deadline if method.deadline is None else method.deadline,
        "memory": run.memory if method.memory is None else parse_memory(WHERE, method.memory),
    }
    places = method.place if isinstance(method.place, list) else [method.place]
    return [
        method.model_copy(update={**common, "id": name, "place": place})
        for name, place in zip(identities(method), places, strict=True)
    ]
