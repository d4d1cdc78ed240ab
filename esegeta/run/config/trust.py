"""Which code a configuration may run. A file alone is never trusted; its folder is, like that of a Makefile.

Without a word more a configuration can name Python files whose real path lies in its own folder, and the networks
(subclasses of ``nn.Module``) of the packages in ``SHIPPED``. Everything else has to be trusted by whoever starts the
run: ``--trust``, the environment variable ``ESEGETA_TRUST``, or ``trust=``. One ``Trust`` goes with every job, and
the worker that does the job asks it before it imports, calls or loads anything.
"""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from esegeta.engine import check
from esegeta.run.config.faults import shown

VARIABLE = "ESEGETA_TRUST"  # with commas between
# Packages whose networks are made of numbers and words alone. Their functions are not among them: some download.
SHIPPED = ("monai.networks.nets", "torchvision.models")
NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*(\.[^\W\d]\w*)*)?")
_FILES = (".py", ".pt2", ".ts", ".pt")
_INSTALLED = ("site-packages", "dist-packages")
# What makes a network of a package read files or ask the net, by the name of the argument.
_FETCHES = re.compile(r"pretrained|(^|_)url($|_)|(^|_)repo($|_)")


class UntrustedError(check.Refused):
    """Code that a configuration names and nobody trusts. The message says what to add if it is to run."""

    def __init__(self, expected: str, got: str, advice: str) -> None:
        self.expected, self.got, self.advice = expected, got, advice
        super().__init__(str(check.refused("trust", expected, got, advice)))

    def __reduce__(self) -> tuple[Any, ...]:
        return UntrustedError, (self.expected, self.got, self.advice)


@dataclasses.dataclass(frozen=True)
class Trust:
    """What may run.

    folder: that of the configuration, as a real path, or empty for none; names: modules, ``package.module``, with
    all below them, and single functions, ``package.module:function``; paths: folders and files, as real paths.
    """

    folder: str = ""
    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """Return the trust as a payload has it."""
        return {"folder": self.folder, "names": list(self.names), "paths": list(self.paths)}

    def and_also(self, given: Iterable[str]) -> "Trust":
        """Return the same with more that is trusted, see ``asked``."""
        more = asked("", given)
        return dataclasses.replace(self, names=self.names + more.names, paths=self.paths + more.paths)

    def granted(self, path: Path) -> bool:
        """Return whether a file was trusted by its path, or by a folder that it really lies in."""
        real = Path(os.path.realpath(path))
        return any(real == Path(p) or Path(p) in real.parents for p in self.paths)

    def names_module(self, module: str) -> bool:
        """Return whether a module was trusted by name, or something above it."""
        return any(":" not in name and _within(module, name) for name in self.names)

    def holds(self, folder: str | Path) -> bool:
        """Return whether a folder is that of the configuration, or really lies in it."""
        real = Path(os.path.realpath(folder))
        return bool(self.folder) and Path(self.folder) in (real, *real.parents)

    def own(self, path: Path) -> bool:
        """Return whether it is a Python file of the configuration's folder, and not of an environment in there."""
        real, folder = Path(os.path.realpath(path)), Path(self.folder)
        if not self.folder or real.suffix != ".py" or folder not in real.parents:
            return False
        if set(_INSTALLED) & set(real.relative_to(folder).parts):
            return False
        return not any((folder == p or folder in p.parents) and p in real.parents for p in _environment())


NOTHING = Trust()


def from_json(said: Mapping[str, Any]) -> Trust:
    """Return what a payload says may run.

    >>> from_json(Trust("/study", ("a.b",)).json())
    Trust(folder='/study', names=('a.b',), paths=())
    """
    return Trust(said["folder"], tuple(said["names"]), tuple(said["paths"]))


def asked(folder: str | Path, given: Iterable[str] = ()) -> Trust:
    """Return the trust that a run begins with: the folder of its configuration, and what its user has added.

    Args:
        folder: of the configuration; empty for none.
        given: names of modules or functions, or paths of folders or files. What could be either is a name:
            write ``./nets`` for a folder.

    Example:
        >>> asked("", ["my_package", "torch.hub:load"]).names
        ('my_package', 'torch.hub:load')
    """
    if isinstance(given, str):
        given = [given]
    names: list[str] = []
    paths: list[str] = []
    for text in given:
        if NAME.fullmatch(text) and not text.endswith(_FILES):
            names.append(text)
            continue
        path = os.path.realpath(os.path.expanduser(text))
        if not text.strip() or not os.path.exists(path):
            advice = "Write package.module, package.module:function, or a folder or file that is there"
            raise check.refused("trust", "a name, a folder or a file", shown(text), advice)
        paths.append(path)
    return Trust(os.path.realpath(folder) if str(folder) else "", tuple(names), tuple(paths))


def of_environment() -> list[str]:
    """Return what the environment variable adds for every run of this user."""
    return [part.strip() for part in os.environ.get(VARIABLE, "").split(",") if part.strip()]


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@functools.cache
def _environment() -> tuple[Path, ...]:
    """Where this interpreter has its packages."""
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    places = [*(sysconfig.get_path(kind) for kind in kinds), sys.prefix, sys.exec_prefix]
    return tuple(Path(os.path.realpath(place)) for place in places if place)


# --- Modules ----------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A module on the way to the one that is named, and the file that importing it runs: none of a namespace."""

    name: str
    file: Path | None
    search: tuple[str, ...]


class Way(NamedTuple):
    """A module and all above it, found and not imported; beside: whether it is in the folder that was named only."""

    parts: list[Part]
    beside: bool


def located(module: str, place: str | Path) -> Way | None:
    """Find a module without running anything: among the installed ones, else in a folder; None if it is in neither.

    >>> located("esegeta.run.config.trust", ".").parts[-1].file.name
    'trust.py'
    """
    head, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(head)
    except (ImportError, ValueError):
        spec = None
    beside = spec is None
    if beside:
        spec = PathFinder.find_spec(head, [str(place)])
    parts = []
    for step in (*rest, None):
        if spec is None:
            return None
        parts.append(_part(spec))
        if step is not None:
            spec = PathFinder.find_spec(f"{spec.name}.{step}", list(parts[-1].search))
    return Way(parts, beside)


def _part(spec: ModuleSpec) -> Part:
    search = tuple(spec.submodule_search_locations or ())
    return Part(spec.name, Path(spec.origin) if spec.origin and spec.has_location else None, search)


def _importable(part: Part, way: Way, place: str | Path, trust: Trust) -> bool:
    if part.file is None:
        return True
    if way.beside and not (trust.holds(place) or trust.granted(Path(place))):
        return False  # a folder that anybody could name: what is trusted by name is what is installed
    if trust.names_module(part.name) or trust.own(part.file) or trust.granted(part.file):
        return True
    if any(_within(name.partition(":")[0], part.name) for name in trust.names):
        return True  # it is above what is trusted, or has a function that is
    return not way.beside and any(_within(part.name, p) or _within(p, part.name) for p in SHIPPED)


def judge(source: str, way: Way, place: str | Path, trust: Trust) -> None:
    """Refuse to import a module, ``module`` or ``module:function``, if it or anything above it is not trusted."""
    for part in way.parts:
        if not _importable(part, way, place, trust):
            where = Path(os.path.realpath(way.parts[-1].file or part.file or place))
            raise UntrustedError(
                "a Python file in the folder of the configuration, or code that you trust",
                f"{source!r}, which is in {where}",
                f"If you trust it, add --trust {where.parent if way.beside else source}",
            )


def imported(source: str, place: str | Path, trust: Trust) -> ModuleType | None:
    """Import the module of ``module`` or ``module:function`` if it is trusted; None if there is no such module.

    A folder is searched after everything that is installed: a file of the user never takes the place of a package.
    """
    module = source.partition(":")[0]
    way = located(module, place)
    if way is None:
        return None
    judge(source, way, place, trust)
    if way.beside and str(place) not in sys.path:
        sys.path.append(str(place))
        importlib.invalidate_caches()
    found = importlib.import_module(module)
    wanted, got = way.parts[-1].file, getattr(found, "__file__", None)
    if wanted is not None and (got is None or os.path.realpath(got) != os.path.realpath(wanted)):
        advice = "Give one of them another name"
        raise UntrustedError(f"{module} from {wanted}", f"another module of that name, {got}", advice)
    return found


# --- What is in a module ----------------------------------------------------------------------------------


def _home(thing: Any) -> str:
    """The name of the module where something was defined, empty if it does not say."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    if inspect.ismethod(thing):
        thing = thing.__func__
    if isinstance(thing, ModuleType):
        return thing.__name__
    name = getattr(thing, "__module__", None)
    return name if isinstance(name, str) else ""


def _defined(thing: Any, source: str, trust: Trust) -> bool:
    """Whether something was defined in trusted code: what a trusted module has imported is not its own."""
    home = _home(thing)
    if source in trust.names or trust.names_module(home):
        return True
    file = getattr(sys.modules.get(home), "__file__", None)
    if file is not None and (trust.own(Path(file)) or trust.granted(Path(file))):
        return True
    shipped = any(_within(home, name) for name in SHIPPED)
    return shipped and (isinstance(thing, ModuleType) or _is_network(thing))


def _is_network(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, nn.Module)


def member(found: ModuleType, source: str, trust: Trust) -> Any:
    """Return what ``module:name`` or ``module:Class.name`` names, if it was defined in trusted code.

    A name that is missing raises ``AttributeError`` with that ``name``, and the ``obj`` that does not have it.
    """
    now: Any = found
    steps = source.partition(":")[2].split(".")
    for number, step in enumerate(steps):
        if step.startswith("__") or not hasattr(now, step):
            raise AttributeError(step, name=step, obj=now)
        now = getattr(now, step)
        last = number == len(steps) - 1
        # What a trusted module has made is used as it is: only functions and classes are called.
        made = last and (isinstance(now, nn.Module) or not callable(now))
        if not made and not _defined(now, source, trust):
            home = _home(now) or type(now).__name__
            what = "a module" if isinstance(now, ModuleType) else "a class or function"
            if any(_within(home, name) for name in SHIPPED):
                what, home = "a network, a subclass of nn.Module,", f"{home}, a function that may download"
            raise UntrustedError(
                f"{what} that is defined in trusted code",
                f"{source!r}, where {step!r} is of {home}",
                f"Define a function around it in a file of yours, or, if you trust it, add --trust {source}",
            )
    return now


def judge_arguments(made: Any, source: str, arguments: Mapping[str, Any], trust: Trust) -> None:
    """Refuse what makes a network of a package in ``SHIPPED`` fetch or read something: given, or by default."""
    home = _home(made)
    if source in trust.names or trust.names_module(home) or not any(_within(home, p) for p in SHIPPED):
        return
    known = inspect.signature(made).parameters
    defaults = {k: p.default for k, p in known.items() if p.default is not inspect.Parameter.empty}
    for name, value in {**defaults, **arguments}.items():
        if value and (_FETCHES.search(name) or ("weights" in name and isinstance(value, str))):
            default = "" if name in arguments else ", its default"
            raise UntrustedError(
                f"arguments with which {source} fetches nothing",
                f"{name} = {shown(value)}{default}",
                f"Change {name}, and name a file with model.weights; or, if you trust it, add --trust {source}",
            )


def judge_program(path: Path, trust: Trust) -> None:
    """Refuse a program in a file, .pt2 or TorchScript: loading it can run code, wherever it lies."""
    if not trust.granted(path):
        real = os.path.realpath(path)
        raise UntrustedError(
            "a program that you trust, for loading one can run code",
            f"{real}",
            f"If you trust who made it, add --trust {real}",
        )
