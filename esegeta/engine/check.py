"""Checks of what users pass in. Each message names the function, the expectation, what came, what to do."""

import contextlib
import difflib
import functools
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esegeta.engine import levels
from esegeta.engine.refusals import EmptyMask as EmptyMask
from esegeta.engine.refusals import Problem, problem
from esegeta.engine.refusals import Refused as Refused
from esegeta.engine.refusals import RefusedType as RefusedType
from esegeta.engine.refusals import is_refusal as is_refusal
from esegeta.engine.refusals import refused as refused
from esegeta.engine.refusals import refused_type as refused_type

_MOST = 2**31  # of anything that is counted


# Who was called, and what is inside of each: the innermost last.
_CALLS: ContextVar[tuple[tuple[str, Collection[str]], ...]] = ContextVar("calls", default=())


@contextlib.contextmanager
def calling(name: str, inside: Collection[str]) -> Iterator[None]:
    """Let errors name the function that was called, not one of those inside of it.

    >>> with calling("grad_cam", ["tap"]):
    ...     raise ValueError(problem("tap", "a place", "nothing", "Name one"))
    Traceback (most recent call last):
    ValueError: grad_cam: expected a place, got nothing. Name one.
    """
    token = _CALLS.set((*_CALLS.get(), (name, inside)))
    try:
        yield
    except (TypeError, ValueError) as error:
        text = error.args[0] if error.args else None
        if isinstance(text, Problem) and text.where in inside:
            error.args = (text.by(name),)
        raise
    finally:
        _CALLS.reset(token)


def called(where: str) -> str:
    """Return the function that was called for ``where``: warnings name it, as errors do in ``calling``.

    >>> with calling("grad_cam", ["tap"]):
    ...     called("tap"), called("sum")
    ('grad_cam', 'sum')
    """
    for name, inside in reversed(_CALLS.get()):
        where = name if where in inside else where
    return where


def not_written(path: str | os.PathLike[str], size: int | None, error: OSError) -> OSError:
    """Return the error of a file that could not be written, such as one for which the disk has no room.

    What the system raises then names neither the file nor how much room it takes.
    """
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    with contextlib.suppress(OSError):
        reason += f", {shutil.disk_usage(Path(path).parent).free} bytes are free there"
    room = "room for it" if size is None else f"room for its {size} bytes"
    text = problem(
        "write", f"to write {path} and {room}", reason, "Make room and start again, or write elsewhere"
    )
    told = OSError(text)
    told.errno = error.errno
    return told


def describe(value: object) -> str:
    """Describe a value for an error message in a few words: tensors by dtype and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def tensor(where: str, name: str, value: object) -> Tensor:
    """Refuse anything but a tensor."""
    if not isinstance(value, Tensor):
        raise refused_type(where, f"{name} to be a torch.Tensor", describe(value), "Convert it first")
    return value


def function(where: str, expected: str, value: object, advice: str) -> Any:
    """Refuse what is no function of one example: a network above all, which takes batches."""
    if not callable(value):
        raise refused_type(where, expected, describe(value), advice)
    inner: Any = value
    while isinstance(inner, functools.partial):
        inner = inner.func
    if getattr(inner, "__name__", "") in ("forward", "__call__"):
        inner = getattr(inner, "__self__", inner)
    if isinstance(inner, nn.Module):
        raise refused_type(
            where,
            expected,
            f"an nn.Module, {type(inner).__name__}, which takes batches",
            f"{'Make' if 'model' in expected else 'Explain a score of'} a model of it with "
            "esegeta.from_module(module.eval())",
        )
    return value


def score(where: str, value: object) -> Any:
    """Refuse what is no score: anything but a function of one example."""
    if isinstance(value, Tensor):
        advice = f"The image goes into what comes out: {where}(score)(x)"
        raise refused_type(where, "a score: a function of one example", describe(value), advice)
    return function(where, "a score: a function of one example", value, "Compose a reducer")


def model(where: str, value: object) -> Any:
    """Refuse what is no model: anything but a function of one example."""
    expected = "a model: a function of one example"
    return function(where, expected, value, "Wrap a network with esegeta.from_module")


def runs(where: str, value: object) -> Any:
    """Refuse what is neither a score nor a model."""
    expected = "a score or a model: a function of one example"
    return function(where, expected, value, "Wrap a network with esegeta.from_module")


def explanation(where: str, value: object) -> Any:
    """Refuse what is no explanation, a finished map above all."""
    advice = "Pass the explanation, for example esegeta.gradient(score)"
    if isinstance(value, Tensor):
        advice = f"Pass the explanation, not its map: {where}(explain)(x)"
    return function(where, "an explanation: a function (x, *refs) -> map", value, advice)


def values(value: "int | Tensor") -> str:
    """Return a number, or those of all examples, as text."""
    if not isinstance(value, Tensor):
        return str(value)
    base = levels.base(value)
    return describe(value) if levels.fake(value) or base.numel() > 8 else str(base.tolist())


def whole(where: str, name: str, value: Tensor, shape: tuple[int, ...], advice: str) -> Tensor:
    """Refuse a tensor of anything but whole numbers from 0 on, in that shape; for each of the mapped examples."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise refused_type(where, f"{name} of an integer dtype", describe(value), "Use .long()")
    if tuple(value.shape) != shape:
        more = "For one of each example use esegeta.batched"
        raise refused(where, f"{name}, for one example of shape {shape}", describe(value), more)
    value = value.detach().long()
    if levels.true_anywhere(value < 0):
        raise refused(where, f"{name} 0, 1, ...", values(value), advice)
    return value


def floating(where: str, name: str, value: object) -> Tensor:
    """Refuse integer inputs: they have no gradient and noise or paths would be rounded away."""
    value = tensor(where, name, value)
    if not value.is_floating_point():
        raise refused_type(
            where, f"{name} of a floating dtype", describe(value), f"Convert it with {name}.float()"
        )
    return value


def finite(where: str, name: str, value: Tensor, advice: str) -> Tensor:
    """Refuse NaN and infinity, looking through vmap and grad wrappers."""
    detached = value.detach()
    # A sum is finite only if its terms are, and takes a tenth of the time of looking at each of them.
    if not levels.true_anywhere(~torch.isfinite(detached.sum())):
        return value
    bad = ~torch.isfinite(detached)
    if levels.true_anywhere(bad):
        count, size = int(levels.base(bad).sum()), levels.base(bad).numel()
        raise refused(where, f"finite values in {name}", f"{count} NaN or infinite of {size}", advice)
    return value


def image(where: str, name: str, value: object) -> Tensor:
    """Refuse what cannot be explained: no tensor, integers, no elements, no values, NaN or infinity."""
    value = floating(where, name, value)
    if value.numel() == 0 or value.device.type == "meta":
        got = describe(value) + (" on the meta device" if value.device.type == "meta" else "")
        raise refused(where, f"{name} with elements and values", got, "Pass one example (C,*S)")
    return finite(where, name, value, "Repair the image, e.g. with torch.nan_to_num")


def wave(x: Tensor) -> Tensor:
    """Return a fixed field like x without symmetry, in [-1, 1]: where a probe needs values that say something."""
    steps = torch.arange(x.numel(), device=x.device, dtype=torch.float64)
    return torch.cos(steps * 2.399963).to(x.dtype).reshape(x.shape)


def _one_tensor(where: str, name: str, value: object) -> Tensor:
    """Refuse anything but a tensor; a list of references is told how to become one."""
    if isinstance(value, (list, tuple)):
        got = f"a {type(value).__name__} of {len(value)}"
        raise refused_type(where, f"{name} to be a torch.Tensor", got, f"Use torch.stack({name})")
    return tensor(where, name, value)


def like(where: str, name: str, value: object, x: Tensor) -> Tensor:
    """Refuse a tensor whose shape, dtype or device differs from the input's."""
    value = _one_tensor(where, name, value)
    if value.shape != x.shape:
        raise refused(
            where,
            f"{name} with the shape of the input {tuple(x.shape)}",
            describe(value),
            "Methods see one example at a time: use esegeta.batched for many, esegeta.baselines for baselines",
        )
    if value.dtype != x.dtype:
        raise refused_type(
            where,
            f"{name} with the dtype of the input {describe(x)}",
            describe(value),
            f"Use {name}.to(x.dtype)",
        )
    if value.device != x.device:
        raise refused(
            where, f"{name} on {x.device}", f"a tensor on {value.device}", f"Use {name}.to(x.device)"
        )
    return value


def stack_of(where: str, name: str, value: object, x: Tensor) -> Tensor:
    """Refuse anything but ``n >= 1`` tensors like the input, stacked on a new first axis."""
    value = _one_tensor(where, name, value)
    if value.ndim != x.ndim + 1 or value.shape[0] == 0:
        raise refused(
            where,
            f"{name} of shape (n, {', '.join(map(str, x.shape))}) with n >= 1",
            describe(value),
            "Stack the tensors on a new first axis with torch.stack",
        )
    like(where, f"each of {name}", value[0], x)
    return value


def scalar(where: str, value: object) -> Tensor:
    """Refuse a score that is not one floating number."""
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        expected = "a score with a value of shape ()"
        advice = "Put a reducer on the model, for example esegeta.reducers.class_sum(model, 1)"
        if isinstance(value, Tensor) and not value.ndim:
            expected, advice = f"{expected} and a floating dtype", "Convert a count with .float()"
        raise refused(where, expected, describe(value), advice)
    return value


def flag(where: str, name: str, value: object) -> bool:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise refused_type(where, f"{name} to be True or False", describe(value), "Pass one of them")
    return value


def each_axis(value: Any, axes: int) -> tuple[Any, ...]:
    """Return one number for each axis, from one for all or from a sequence; nothing where it is neither.

    >>> each_axis(2, 2), each_axis((1, 2.5), 2), each_axis(None, 2)
    ((2, 2), (1, 2.5), ())
    """
    if isinstance(value, (np.ndarray, np.generic)) or (
        isinstance(value, Tensor) and not levels.wrapped(value)
    ):
        value = value.tolist()
    if isinstance(value, (int, float)):
        return (value,) * axes
    if isinstance(value, str) or not isinstance(value, Iterable):
        return ()
    return tuple(v.item() if isinstance(v, (np.generic, Tensor)) and v.ndim == 0 else v for v in value)


def fill(where: str, value: object) -> Any:
    """Refuse what is no way to fill the place of a part."""
    expected = "fill: a function (x, baseline, kept) -> like x"
    return function(where, expected, value, "Use for example esegeta.baselines.inpainted")


def features(where: str, value: object) -> Any:
    """Refuse what does not divide an image into parts."""
    advice = "Use esegeta.features, for example features.grid(8) or features.labels(map)"
    return function(where, "features: a function of the image", value, advice)


def maps(where: str, a: object) -> Any:
    """Refuse an explanation that is neither a map nor a tuple of maps."""
    for one in a if isinstance(a, tuple) and a else (a,):
        if not isinstance(one, Tensor) or not one.is_floating_point():
            expected, advice = "an explanation that returns a floating tensor", "Return one map like x"
            raise refused_type(where, expected, describe(one), advice)
    return a


def positive_count(where: str, name: str, value: object, least: int = 1) -> int:
    """Refuse a number of steps or samples that is not a whole number of at least ``least``."""
    right = isinstance(value, int) and not isinstance(value, bool)
    if not right or not least <= value <= _MOST:  # type: ignore[operator]
        advice = "Pass a smaller one" if right and value > _MOST else "Pass a larger whole number"  # type: ignore[operator]
        raise refused(where, f"{name} to be an int >= {least}", repr(value), advice)
    return value  # type: ignore[return-value]


def non_negative(where: str, name: str, value: object) -> float:
    """Refuse a negative or non-finite size."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value < float("inf")
        or (isinstance(value, int) and value >= 2**63)
    ):
        raise refused(where, f"{name} to be a finite number >= 0", repr(value), "Pass such a number")
    return float(value)


def nearest(word: object, choices: Iterable[str], otherwise: str = "Choose one of them") -> str:
    """Return advice for a word that is not among the choices.

    >>> nearest("linaer", ["linear", "nearest"]), nearest(3, ["linear"])
    ('Nearest: linear', 'Choose one of them')
    """
    near = difflib.get_close_matches(word, list(choices), n=3, cutoff=0.5) if isinstance(word, str) else []
    return f"Nearest: {', '.join(near)}" if near else otherwise


def one_of(where: str, name: str, value: object, choices: Sequence[str]) -> str:
    """Refuse a word that is not in the list."""
    if not isinstance(value, str) or value not in choices:
        raise refused(
            where, f"{name} to be one of {', '.join(choices)}", repr(value), nearest(value, choices)
        )
    return value


def key(where: str, value: object) -> "int | Tensor":
    """Refuse a missing random key."""
    if value is None:
        raise refused_type(
            where, "key= (an int, or an int64 tensor of shape ())", "no key", "Pass for example key=0"
        )
    if isinstance(value, bool) or not isinstance(value, (int, Tensor)):
        raise refused_type(
            where, "key to be an int or an int64 tensor", describe(value), "Pass for example key=0"
        )
    if isinstance(value, Tensor) and (value.dtype != torch.int64 or value.ndim):
        raise refused_type(
            where,
            "key to be an int64 tensor of shape ()",
            describe(value),
            "Use esegeta.batched for many keys",
        )
    return value


def spacing(where: str, given: object, axes: int) -> Tensor:
    """Return the spacing as a tensor of lengths, 1 along every axis where it is not given."""
    try:
        lengths = torch.as_tensor([1.0] * axes if given is None else given, dtype=torch.float64)
        right = lengths.shape == (axes,)
        right = right and not levels.true_anywhere(~((lengths > 0) & torch.isfinite(lengths)))
    except (TypeError, ValueError, RuntimeError):
        right = False
    if not right:
        expected = f"spacing of {axes} finite lengths > 0, one per spatial axis"
        advice = "Take it from the affine, for example header.get_zooms()[:3] of nibabel"
        raise refused(where, expected, describe(given), advice)
    return lengths
