"""The tables of a configuration as classes: what a file may hold, and nothing that reads or checks it.

Needs pydantic: ``pip install "esegeta[cli]"``.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from esegeta.run.config.trust import NOTHING, Trust


class Section(BaseModel):
    """A table of the file. Numbers are numbers and texts are texts; what has no name here is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, validate_by_name=True)

    def placed(self, place: Callable[[str], str]) -> Self:  # noqa: ARG002
        """Return the same with the files that it names as absolute paths, which ``place`` makes."""
        return self


class Call(BaseModel):
    """A function by its name, with its parameters beside it: ``{name = "smooth", noise = 0.1}``."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    written: ClassVar[str] = '{name = "...", ...}'

    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.__pydantic_extra__ or {})


class Step(BaseModel):
    """A step of preprocessing, with its parameters beside it: ``{step = "reorient", to = "RAS"}``."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    written: ClassVar[str] = '{step = "...", ...}'

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
    pad: Literal["auto"] | None = None  # to sizes that the network takes, found by trying it

    @property
    def reading(self) -> dict[str, Any]:
        """Return what ``volumes.read`` is told besides the files."""
        said = {"channels": self.channels, "frame": self.frame, "nan": self.nan}
        return {name: value for name, value in said.items() if value is not None}


class Reference(Section):
    """The ground truth: label maps, each of the subject that its name tells, as for the images.

    files: one, several, or a pattern; subject: a pattern of names of files, as that of the images. grid: of one on
    another grid than its image, "same" refuses it, "nearest" takes the nearest label; labels: of each target, one or
    several; without it that is the number of its class.
    """

    files: str | list[str]
    subject: str | None = None
    grid: Literal["same", "nearest"] = "same"
    labels: dict[str, int | list[int]] = {}


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
    """How a volume is cut for methods with ``patches = "stitched"`` or ``"per_patch"``.

    size: of a patch in voxels, one number or one for each axis; overlap: what neighbours share, from 0 to below 1;
    weights: of a voxel of a patch where several overlap.
    """

    size: int | list[int] = 64
    overlap: float = 0.5
    weights: Literal["gaussian", "average", "centre"] = "gaussian"


class Run(Section):
    """Where and with what it runs. ``deadline`` (seconds) and ``memory`` hold for each method by itself.

    output: the folder of results; workers: processes at once; deadline: in seconds; memory: such as "8 GiB".
    precision: a reduced one changes results. key: of everything that is random; devices: such as "cpu" or "cuda:0";
    per_device: workers on a device that is not the CPU; threads: of a worker on the CPU; baseline: for every method
    that needs one and names none.
    """

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
    """What is written.

    nifti: maps as files; figures: pictures of maps; report: a page of everything; tables: of what the maps are like.
    """

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
    reference: Reference | None = None
    patches: Patches | None = None
    run: Run = Run()
    output: Output = Output()
    more: dict[str, SerializeAsAny[BaseModel] | list[SerializeAsAny[BaseModel]]] = {}
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
