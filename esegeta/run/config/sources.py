"""Networks from where they are: the zoo, a function of yours with weights beside it, a program in a file.

Weights are read as tensors, never as objects: a file that wants to run code is refused. ``module:factory`` imports
that module, and a program in a file is run as it is loaded: both only if they are trusted, see ``trust``.
"""

import contextlib
import inspect
import logging
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esegeta import zoo
from esegeta._registry import NETWORKS  # zoo registers its own
from esegeta.engine import check
from esegeta.engine.network import ModuleModel
from esegeta.models import from_module
from esegeta.run import bounds
from esegeta.run.config import catalogue
from esegeta.run.config import trust as trusting
from esegeta.run.config.faults import Strict, nearest, shown
from esegeta.run.config.schema import Model
from esegeta.run.config.tables import absolute, is_there
from esegeta.run.config.trust import NOTHING, Trust, UntrustedError
from esegeta.zoo.weights import OtherDtype

WHERE = "model"
NESTED = ("state_dict", "model_state_dict", "network_weights", "model", "net", "network", "weights")
NAMED = 3  # of many names, how many are said
FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
PROGRAMS = {".pt2": "an exported program", ".ts": "TorchScript", ".pt": "TorchScript"}
WEIGHTS = (".pt", ".pth", ".safetensors")


def is_program(source: str) -> bool:
    """Return whether a model's source is a program in a file, and neither of the zoo nor ``module:factory``.

    >>> is_program("a/net.pt2"), is_program("zoo:small_unet"), is_program("my.pt:build"), is_program("my:net.pt")
    (True, False, False, False)
    """
    return Path(source).suffix in (".pt2", ".ts", ".pt") and ":" not in Path(source).name


def load(model: Model, device: str = "cpu", *, trust: Trust = NOTHING) -> ModuleModel:
    """Return the network of a configuration as a model, in evaluation mode.

    - ``zoo:name``: one that comes with esegeta;
    - ``package.module:factory``: what the function returns for ``arguments``, with ``weights`` put in if there are
      any: a state dict .pt or .pth (alone, or as ``state_dict`` of a checkpoint; a common prefix such as ``module.``
      is dropped) or .safetensors;
    - ``name.pt2``: a program saved by ``torch.export.save``; ``name.ts`` or ``name.pt``: TorchScript.

    What a factory draws at random is the same at every call.

    Args:
        model: the section ``[model]``.
        device: where it runs.
        trust: which code may run; without it only the zoo and the networks of known packages.

    Returns:
        A model of ``from_module``. ``ValueError`` says in one line what is wrong.

    Example:
        >>> load(Model(source="zoo:small_unet", arguments={"ndim": 2}))(torch.zeros(1, 8, 8)).shape
        torch.Size([2, 8, 8])
    """
    source = model.source
    if source.startswith("zoo:"):
        name = source.removeprefix("zoo:")
        if name not in NETWORKS:
            raise _problem("a network of the zoo", repr(name), nearest(name, NETWORKS))
        network = _made(NETWORKS[name].fn, source, model.arguments)
    else:
        with _trusted():
            if is_program(source):
                trusting.judge_program(Path(source), trust)
                network = _program(Path(source))
            else:
                factory = _factory(source, model.path, trust)
                trusting.judge_arguments(factory, source, model.arguments, trust)
                network = _made(factory, source, model.arguments)
    if model.weights is not None:
        put_in(network, weights(Path(model.weights)), Path(model.weights).name)
    if isinstance(network, nn.Module):
        with contextlib.suppress(NotImplementedError):  # exported programs have one mode only
            network.eval()
        network = network.to(device)
    return from_module(network, output=_path(model.output))


def _problem(expected: str, got: object, advice: str) -> check.Refused:
    return check.refused(WHERE, expected, str(got).removesuffix("."), advice)


def _path(output: Any) -> Any:
    return tuple(output) if isinstance(output, list) else output


def _in_short(error: BaseException) -> str:
    """The kind of an error and its first sentence."""
    lines = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {re.split('[.] (?=[A-Z])', lines[0])[0][:200]}"
        if lines
        else type(error).__name__
    )


# --- Faults that show without loading -------------------------------------------------------------------


def checked(model: Model, folder: Path, trust: Trust, faults: Strict) -> Model:
    """Return the model of a configuration with absolute paths, and tell what is wrong with it, without loading it."""
    source, place = model.source, absolute(model.path or ".", folder)
    if source.startswith("zoo:"):
        name = source.removeprefix("zoo:")
        if name not in NETWORKS:
            faults.add("model.source", "a network of the zoo", repr(name), nearest(name, NETWORKS))
        else:
            settings = catalogue.parameters(
                NETWORKS[name].fn, without=()
            )  # the key of its weights is its own
            context = catalogue.checking(faults)
            catalogue.arguments(model.arguments, settings, context, "model.arguments", name)
        if model.weights is not None:
            faults.add("model.weights", "none for a network of the zoo", shown(model.weights), "Leave it out")
    elif is_program(source):
        if not is_there(folder, source):
            faults.add("model.source", "a file", repr(source), "There is none of that name")
        else:
            with _judged(faults):
                trusting.judge_program(Path(absolute(source, folder)), trust)
        for key, given in (("weights", model.weights), ("arguments", model.arguments)):
            if given:
                kind = PROGRAMS[Path(source).suffix]
                faults.add(f"model.{key}", f"nothing beside {kind}", shown(given), "Leave it out")
    elif FACTORY.fullmatch(source):
        top = source.partition(":")[0].partition(".")[0]
        if of_python(top):
            advice = "Give the file with your network another name"
            faults.add("model.source", "a module that is no part of Python", repr(top), advice)
        else:
            _check_module(source, Path(place), trust, faults)
    else:
        expected = '"zoo:name", "package.module:factory" or a file .pt2 or .ts'
        faults.add("model.source", expected, repr(source), "Write one of these")
    if model.weights is not None and not source.startswith("zoo:"):
        if Path(model.weights).suffix not in WEIGHTS:
            faults.add("model.weights", f"a file {', '.join(WEIGHTS)}", repr(model.weights), "Convert it")
        elif not is_there(folder, model.weights):
            faults.add("model.weights", "a file", repr(model.weights), "There is none of that name")
    return model.model_copy(
        update={
            "source": absolute(source, folder) if is_program(source) else source,
            "weights": model.weights and absolute(model.weights, folder),
            "path": place,
        }
    )


@contextlib.contextmanager
def _judged(faults: Strict) -> Iterator[None]:
    try:
        yield
    except UntrustedError as error:
        faults.add("model.source", error.expected, error.got, error.advice)


def _check_module(source: str, place: Path, trust: Trust, faults: Strict) -> None:
    """Look for what is wrong with the module of a factory, without importing anything."""
    module = source.partition(":")[0]
    try:
        way = trusting.located(module, place)
    except (OSError, ValueError):  # a name that no module can have
        way = None
    if way is None:
        advice = "Install it, or name its folder with model.path"
        faults.add("model.source", "a module that can be imported", repr(module), advice)
        return
    with _judged(faults):
        trusting.judge(source, way, place, trust)


# --- Factories --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _trusted() -> Iterator[None]:
    try:
        yield
    except UntrustedError as error:
        raise _problem(error.expected, error.got, error.advice) from None


def _factory(source: str, folder: str | None, trust: Trust) -> Any:
    module, _, name = source.partition(":")
    if not module or not name:
        expected = '"zoo:name", "package.module:factory" or a file .pt2 or .ts'
        raise _problem(f"source to be {expected}", repr(source), "Write one of these")
    if of_python(module):
        got = f"{source!r}, a part of Python"
        raise _problem("a function that builds a network", got, "Name one of yours")
    place = str(Path(folder or ".").absolute())
    try:
        found = trusting.imported(source, place, trust)
    except ModuleNotFoundError as error:
        raise _problem(f"{module} to import", _in_short(error), "Install what it needs") from error
    except UntrustedError:
        raise
    except (Exception, SystemExit) as error:
        raise _problem(
            f"{module} to import", _in_short(error), f"Try it in Python: import {module}"
        ) from error
    if found is None:
        advice = f"Install it, or put it into {shown(place)}, or name its folder with model.path"
        raise _problem("a module that can be imported", repr(module), advice)
    try:
        return trusting.member(found, source, trust)
    except AttributeError as error:
        known = [n for n in dir(error.obj) if not n.startswith("_")]
        raise _problem(f"a function of {module}", repr(name), nearest(error.name, known)) from None


def of_python(module: str) -> bool:
    """Return whether a module comes with Python: no network is in there, but much that must not run.

    >>> of_python("os.path"), of_python("torch.nn")
    (True, False)
    """
    return module.partition(".")[0] in sys.stdlib_module_names


def _made(factory: Any, source: str, arguments: Mapping[str, Any]) -> nn.Module:
    if isinstance(factory, nn.Module) and not arguments:
        return factory
    if not callable(factory):
        raise _problem(f"{source} to be a function", type(factory).__name__, "Name what builds the network")
    try:
        inspect.signature(factory).bind(**arguments)
    except ValueError:
        pass  # builtins have no signature
    except TypeError as error:
        known = list(inspect.signature(factory).parameters)
        takes = f"Its arguments are {', '.join(known)}" if known else "It takes none"
        raise _problem(f"arguments that {source} takes", str(error).removeprefix("got "), takes) from None
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)  # every worker builds the same network
            made = factory(**arguments)
    except (Exception, SystemExit) as error:
        raise _problem(f"{source} to build a network", _in_short(error), "Try it in Python") from error
    if not isinstance(made, nn.Module):
        raise _problem(f"{source} to return an nn.Module", type(made).__name__, "Return the network itself")
    return made


# --- Programs ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says about its own files
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


def _program(path: Path) -> Any:
    _readable(path)
    kind, advice = "an exported program", "Save it with torch.export.save"
    if path.suffix != ".pt2":
        kind = "TorchScript"
        advice = "For weights alone: model.source names the function that builds the network, model.weights this file"
    try:
        with _quiet():
            if path.suffix == ".pt2":
                return torch.export.load(path).module()
            return torch.jit.load(str(path), map_location="cpu")
    except Exception as error:
        raise _problem(f"{path.name} to be {kind}", _in_short(error), advice) from error


def _readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        got = (error.strerror or "an error").lower()
        raise _problem(f"{path} to be a file that can be read", got, "Check its name") from None
    if empty:
        raise _problem(f"{path.name} to hold something", "an empty file", "Copy it again")


# --- Weights ----------------------------------------------------------------------------------------------


def weights(path: Path) -> dict[str, Tensor]:
    """Return tensors by name from a file of weights: .pt and .pth as torch writes them, or .safetensors.

    Only tensors are read. A checkpoint with more in it gives its ``state_dict``.
    """
    _readable(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    _unpacked(path)
    try:
        with _quiet():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _not_allowed(path, error) from None
    except Exception as error:
        advice = "The file is truncated, damaged or of another kind: copy it again"
        raise _problem(f"{path.name} to hold weights", _in_short(error), advice) from error
    return _state(content, path.name)


def _unpacked(path: Path) -> None:
    """Torch packs nothing: records that unpack to more than the file are none that it wrote."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch says what is wrong with it
    if total > path.stat().st_size:
        got = f"{bounds.size(total)} packed into {bounds.size(path.stat().st_size)}"
        raise _problem(
            f"{path.name} to hold weights as torch writes them", got, "Save it again with torch.save"
        )


def _not_allowed(path: Path, error: Exception) -> check.Refused:
    text = str(error)
    named = text.partition("Unsupported global: GLOBAL ")[2].partition(" ")[0]
    if named or "Unsupported" in text or "weights_only" in text.lower():
        got = f"a pickle that wants to make {named}" if named else "a pickle that wants to run code"
        advice = "Save network.state_dict() in a process that you trust"
        return _problem(f"{path.name} to hold tensors only", got, advice)
    return _problem(
        f"{path.name} to hold weights", _in_short(error), "The file is damaged or of another kind"
    )


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return zoo.read_safetensors(path)
    except OtherDtype:
        pass
    except ValueError as error:
        raise _problem(f"{path.name} to hold weights", error, "Copy or save it again") from None
    try:  # bfloat16 and newer types
        from safetensors.torch import load_file
    except ImportError:
        advice = "pip install safetensors, or save it in float32"
        raise _problem(f"{path.name} in a common dtype", "another", advice) from None
    try:
        return load_file(path)
    except Exception as error:
        raise _problem(f"{path.name} to hold weights", _in_short(error), "Copy or save it again") from error


def _state(content: Any, name: str) -> dict[str, Tensor]:
    """The tensors by name in what a file holds, at the top or under a usual key."""
    if isinstance(content, Mapping):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if tensors and len(tensors) == len(content):
            return tensors
        for key in NESTED:
            inner = content.get(key)
            if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
                return {str(k): v for k, v in inner.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
        keys = ", ".join(map(str, list(content)[:5])) or "none"
        raise _problem(
            f"tensors by name in {name}", f"the keys {shown(keys)}", f"Usual keys are {', '.join(NESTED[:3])}"
        )
    got = type(content).__name__
    raise _problem(f"tensors by name in {name}", got, "Save network.state_dict()")


def without_prefix(given: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Return names without what wrappers put before them: ``module.``, ``_orig_mod.``, ``model.`` and the like.

    >>> list(without_prefix({"module.net.a": torch.zeros(1), "module.net.b": torch.zeros(1)}, {"a", "b"}))
    ['a', 'b']
    """
    now = dict(given)
    while now and not set(now) & set(wanted):
        first = next(iter(now)).partition(".")
        prefix = f"{first[0]}."
        if not first[2] or not all(name.startswith(prefix) for name in now):
            return dict(given)
        now = {name.removeprefix(prefix): value for name, value in now.items()}
    return now


def put_in(network: nn.Module, given: Mapping[str, Tensor], source: str) -> None:
    """Put weights into a network; every name and every shape has to agree."""
    wanted = network.state_dict()
    found = without_prefix(given, wanted)
    missing = [n for n in wanted if n not in found and not n.endswith("num_batches_tracked")]
    strange = [n for n in found if n not in wanted]
    if missing:
        names = _several([f"{n}{_near(n, strange)}" for n in missing])
        expected = f"{source} to hold all {len(wanted)} tensors of the network"
        raise _problem(
            expected, f"none for {names}", "Check that it is of this network, built with these arguments"
        )
    if strange:
        names = _several([f"{n}{_near(n, list(wanted))}" for n in strange])
        expected = f"{source} to hold the {len(wanted)} tensors of the network and no others"
        raise _problem(expected, names, "Check that it is of this network, built with these arguments")
    other = [
        f"{n} {tuple(found[n].shape)} for {tuple(wanted[n].shape)}"
        for n in found
        if found[n].shape != wanted[n].shape
    ]
    if other:
        expected = f"the shapes of the network in {source}"
        raise _problem(expected, _several(other), "Check the arguments of the factory")
    network.load_state_dict(found, strict=False)


def _near(name: str, names: list[str]) -> str:
    text = nearest(name, names) if names else ""
    return (
        f" (nearest: {text.removeprefix('Nearest: ').partition(',')[0]})"
        if text.startswith("Nearest: ")
        else ""
    )


def _several(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
