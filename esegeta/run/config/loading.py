"""What a run is told: a TOML or JSON file, checked as a whole before anything starts.

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
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from esegeta.engine import check
from esegeta.engine.execution import parse_memory
from esegeta.run.config import bounds
from esegeta.run.config.annotations import with_files
from esegeta.run.config.trust import NOTHING, Trust, asked, of_environment

WHERE = "configuration"


class Section(BaseModel):
    """A table of the file. Numbers are numbers and texts are texts; what has no name here is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, validate_by_name=True)


class Call(BaseModel):
    """A function by its name, with its parameters beside it: ``{name = "smooth", noise = 0.1}``."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.__pydantic_extra__ or {})


class Step(BaseModel):
    """A step of preprocessing, with its parameters beside it: ``{step = "reorient", to = "RAS"}``."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    step: str

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.__pydantic_extra__ or {})


class Model(Section):
    """Where the network comes from, see ``esegeta.run.config.sources.load``."""

    source: str
    weights: str | None = None
    arguments: dict[str, Any] = {}
    output: str | int | list[str | int] | None = None
    path: str | None = (
        None  # the folder where the module of a factory is looked for; default: that of the file
    )


class Input(Section):
    """The images: a pattern, several files or patterns, or for each subject the files of its channels."""

    files: str | list[str | list[str]]
    subject: str | None = None  # a regular expression; its first group in the file's name is the subject
    channels: Literal["first", "last", "none"] | None = None  # which axis of a file holds channels
    frame: int | None = None  # the one time point to take of four axes
    nan: float | None = None  # what takes the place of NaN and infinity
    preprocess: list[Step] = []

    @property
    def reading(self) -> dict[str, Any]:
        """What ``volumes.read`` is told besides the files."""
        said = {"channels": self.channels, "frame": self.frame, "nan": self.nan}
        return {name: value for name, value in said.items() if value is not None}


class Target(Section):
    """What is explained: a reducer of the model's output. ``class`` is short for its parameter ``target``."""

    name: str
    reducer: str = "predicted_class_sum"
    class_: int | None = Field(default=None, alias="class")
    parameters: dict[str, Any] = {}


class Method(Section):
    """How it is explained. After ``load``, ``place`` is one place or None and ``baseline`` a list or None."""

    name: str
    id: str | None = None
    title: str | None = None
    parameters: dict[str, Any] = {}
    place: str | list[str] | None = None
    baseline: str | Call | list[str | Call] | None = None
    transforms: list[Call] = []
    deadline: float | None = None
    memory: str | int | None = None
    patches: Literal["whole", "stitched", "per_patch"] = "whole"


class Patches(Section):
    """How a volume is cut for methods with ``patches = "stitched"`` or ``"per_patch"``."""

    size: int | list[int] = 64
    overlap: float = 0.5
    weights: Literal["gaussian", "average", "centre"] = "gaussian"


class Run(Section):
    """Where and with what it runs. ``deadline`` (seconds) and ``memory`` hold for each method by itself."""

    output: str = "results"
    workers: int = 1
    deadline: float | None = None
    memory: str | int | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    key: int = 0
    devices: list[str] = ["cpu"]
    per_device: int = 1
    threads: int | None = None  # of one worker on the CPU
    baseline: str | Call | list[str | Call] | None = None  # for every method that needs one and names none


class Output(Section):
    """What is written."""

    nifti: bool = True
    figures: bool = True
    report: bool = True
    tables: bool = True


class Config(Section):
    """A whole run. plugins: files that register methods, transforms and reducers of one's own; more: the tables that
    kinds of jobs bring along, in the file beside the others.

    ``trust`` says which code may run; no key of a file can say that.
    """

    plugins: list[str] = []
    model: Model
    input: Input
    targets: list[Target]
    methods: list[Method]
    patches: Patches | None = None
    run: Run = Run()
    output: Output = Output()
    more: dict[str, SerializeAsAny[BaseModel]] = {}
    _trust: Trust = PrivateAttr(default=NOTHING)

    @model_serializer(mode="wrap")
    def with_tables_of_kinds(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the tables of kinds beside the others, as the file has them."""
        found = dump(self)
        more = found.pop("more", {})
        return {**found, **more}

    @property
    def trust(self) -> Trust:
        """Which code may run, as ``load`` was told."""
        return self._trust


class Faults(ValueError):
    """What is wrong with a configuration: ``faults`` has a line for each thing."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))

    def __reduce__(self) -> tuple[Any, ...]:
        return Faults, (self.faults,)


def load(
    source: str | Path | Mapping[str, Any],
    *,
    run: Mapping[str, Any] | None = None,
    trust: Iterable[str] = (),
) -> Config:
    """A configuration, complete and checked.

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
    from esegeta.run.config.checking import checked

    raw, folder = read(source)
    if run and isinstance(raw.get("run", {}), Mapping):
        raw = {**raw, "run": {**raw.get("run", {}), **run}}
    allowed = asked(folder, [*of_environment(), *trust])
    config, faults = checked(raw, folder, allowed)
    if config is None:
        raise Faults(faults)
    whole = _resolved(config, folder)
    whole._trust = allowed
    return whole


def trusting(config: Config, trust: Iterable[str]) -> Config:
    """The same configuration, with more code that may run."""
    more = config.model_copy()
    more._trust = config.trust.and_also(trust)
    return more


def model_of(source: str | Path | Mapping[str, Any], *, trust: Iterable[str] = ()) -> tuple[Model, Trust]:
    """The model of a configuration, whatever else is in it, and which code may run."""
    from esegeta.run.config.checking import model_faults
    from esegeta.run.config.tables import part

    raw, folder = read(source)
    faults: list[str] = []
    model = part(Model, raw.get("model"), "model", faults)
    allowed = asked(folder, [*of_environment(), *trust])
    faults += model_faults(model, folder, allowed) if model else []
    if faults or model is None:
        raise Faults(faults)
    return _placed(model, folder), allowed


def plugins_of(source: str | Path | Mapping[str, Any], *, trust: Iterable[str] = ()) -> None:
    """Import the plugins of a configuration, whatever else is in it."""
    from esegeta.run.config.plugins import plugin_faults

    raw, folder = read(source)
    faults = plugin_faults(raw.get("plugins", []), folder, asked(folder, [*of_environment(), *trust]))
    if faults:
        raise Faults(faults)


def is_program(source: str) -> bool:
    """Whether a model's source is a program in a file, and neither of the zoo nor ``module:factory``.

    >>> is_program("a/net.pt2"), is_program("zoo:small_unet"), is_program("my.pt:build"), is_program("my:net.pt")
    (True, False, False, False)
    """
    return Path(source).suffix in (".pt2", ".ts", ".pt") and ":" not in Path(source).name


def problems(source: str | Path | Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with a configuration, a line each; nothing if it can run."""
    try:
        load(source)
    except Faults as error:
        return error.faults
    return []


def dump(config: Config) -> dict[str, Any]:
    """A configuration as JSON has it; ``load`` of that is the same configuration."""
    return config.model_dump(by_alias=True, mode="json", exclude_none=True)


def read(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], Path]:
    """What is in a file, unchecked, and the folder that its paths are relative to."""
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
    """The same, with everything said in one way."""

    def files(given: Any) -> Any:
        return [files(one) for one in given] if isinstance(given, list) else _pattern(given, folder)

    run = config.run.model_copy(
        update={"output": _absolute(config.run.output, folder), "memory": _bytes(config.run.memory)}
    )
    return config.model_copy(
        update={
            "plugins": [_absolute(name, folder) for name in config.plugins],
            "model": _placed(config.model, folder),
            "input": config.input.model_copy(update={"files": files(config.input.files)}),
            "targets": [_with_files(_target(target), folder) for target in config.targets],
            "methods": [
                _with_files(entry, folder) for method in config.methods for entry in _entries(method, run)
            ],
            "run": run,
        }
    )


def _absolute(path: str, folder: Path) -> str:
    return os.path.normpath(folder / os.path.expanduser(path))


def _pattern(given: str, folder: Path) -> str:
    """The same pattern from anywhere: ``[`` and ``*`` in the name of the folder are no pattern."""
    whole = _absolute(given, folder)
    if os.path.isabs(os.path.expanduser(given)) or os.path.isfile(whole):
        return whole
    return os.path.normpath(Path(glob.escape(str(folder))) / given)


Named = TypeVar("Named", Target, Method)


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


def _bytes(memory: str | int | None) -> int | None:
    return None if memory is None else parse_memory(WHERE, memory)


def _target(target: Target) -> Target:
    if target.class_ is None:
        return target
    return target.model_copy(
        update={"class_": None, "parameters": {**target.parameters, "target": target.class_}}
    )


def _entries(method: Method, run: Run) -> list[Method]:
    """An entry for each place."""
    from esegeta.run.config.catalogue import methods_by_name, references
    from esegeta.run.config.checking import identities

    spec = methods_by_name()[method.name]
    given = method.baseline
    if given is None and references(spec.refs, [call.name for call in method.transforms]):
        given = run.baseline
    calls = given if isinstance(given, list) or given is None else [given]
    common = {
        "name": spec.name,
        "baseline": calls and [Call(name=one) if isinstance(one, str) else one for one in calls],
        "deadline": run.deadline if method.deadline is None else method.deadline,
        "memory": run.memory if method.memory is None else _bytes(method.memory),
    }
    places = method.place if isinstance(method.place, list) else [method.place]
    return [
        method.model_copy(update={**common, "id": name, "place": place})
        for name, place in zip(identities(method), places, strict=True)
    ]
