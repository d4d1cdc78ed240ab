"""Checks of what users pass in. Each message names the function, the expectation, what came, what to do."""

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from esegeta.engine import levels


def problem(where: str, expected: str, got: str, advice: str) -> str:
    """The one shape of every error message.

    >>> problem("gradient", "a scalar score", "shape (2,)", "Apply a reducer")
    'gradient: expected a scalar score, got shape (2,). Apply a reducer.'
    """
    return f"{where}: expected {expected}, got {got}. {advice.rstrip('.')}."


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
    """Short text for a value in an error message: dtype and shape for tensors."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def tensor(where: str, name: str, value: object) -> Tensor:
    """Refuse anything but a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(problem(where, f"{name} to be a torch.Tensor", describe(value), "Convert it first"))
    return value


def floating(where: str, name: str, value: object) -> Tensor:
    """Refuse integer inputs: they have no gradient and noise or paths would be rounded away."""
    value = tensor(where, name, value)
    if not value.is_floating_point():
        raise TypeError(
            problem(where, f"{name} of a floating dtype", describe(value), f"Convert it with {name}.float()")
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
        raise ValueError(
            problem(where, f"finite values in {name}", f"{count} NaN or infinite of {size}", advice)
        )
    return value


def image(where: str, name: str, value: object) -> Tensor:
    """Refuse what cannot be explained: no tensor, integers, no elements, no values, NaN or infinity."""
    value = floating(where, name, value)
    if value.numel() == 0 or value.device.type == "meta":
        got = describe(value) + (" on the meta device" if value.device.type == "meta" else "")
        raise ValueError(problem(where, f"{name} with elements and values", got, "Pass one example (C,*S)"))
    return finite(where, name, value, "Repair the image, e.g. with torch.nan_to_num")


def wave(x: Tensor) -> Tensor:
    """A fixed field like x without symmetry, in [-1, 1]: where a probe needs values that say something."""
    steps = torch.arange(x.numel(), device=x.device, dtype=torch.float64)
    return torch.cos(steps * 2.399963).to(x.dtype).reshape(x.shape)


def like(where: str, name: str, value: object, x: Tensor) -> Tensor:
    """Refuse a tensor whose shape, dtype or device differs from the input's."""
    value = tensor(where, name, value)
    if value.shape != x.shape:
        raise ValueError(
            problem(
                where,
                f"{name} with the shape of the input {tuple(x.shape)}",
                describe(value),
                "Methods see one example at a time: use esegeta.batched for many, esegeta.baselines for baselines",
            )
        )
    if value.dtype != x.dtype:
        raise TypeError(
            problem(
                where,
                f"{name} with the dtype of the input {describe(x)}",
                describe(value),
                f"Use {name}.to(x.dtype)",
            )
        )
    if value.device != x.device:
        raise ValueError(
            problem(where, f"{name} on {x.device}", f"a tensor on {value.device}", f"Use {name}.to(x.device)")
        )
    return value


def stack_of(where: str, name: str, value: object, x: Tensor) -> Tensor:
    """Refuse anything but ``n >= 1`` tensors like the input, stacked on a new first axis."""
    value = tensor(where, name, value)
    if value.ndim != x.ndim + 1 or value.shape[0] == 0:
        raise ValueError(
            problem(
                where,
                f"{name} of shape (n, {', '.join(map(str, x.shape))}) with n >= 1",
                describe(value),
                "Stack the tensors on a new first axis with torch.stack",
            )
        )
    like(where, f"each of {name}", value[0], x)
    return value


def scalar(where: str, value: object) -> Tensor:
    """Refuse a score that is not one floating number."""
    if not isinstance(value, Tensor) or value.ndim:
        raise ValueError(
            problem(
                where,
                "a score with a value of shape ()",
                describe(value),
                "Put a reducer on the model, for example esegeta.reducers.class_sum(model, 1)",
            )
        )
    return value


def positive_count(where: str, name: str, value: object, least: int = 1) -> int:
    """Refuse a number of steps or samples that is not a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            problem(where, f"{name} to be an int >= {least}", repr(value), "Pass a larger whole number")
        )
    return value


def non_negative(where: str, name: str, value: object) -> float:
    """Refuse a negative or non-finite size."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(
            problem(where, f"{name} to be a finite number >= 0", repr(value), "Pass such a number")
        )
    return float(value)


def one_of(where: str, name: str, value: object, choices: Sequence[str]) -> str:
    """Refuse a word that is not in the list."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            problem(where, f"{name} to be one of {', '.join(choices)}", repr(value), "Choose one of them")
        )
    return value


def key(where: str, value: object) -> "int | Tensor":
    """Refuse a missing random key."""
    if value is None:
        raise TypeError(
            problem(
                where, "key= (an int, or an int64 tensor of shape ())", "no key", "Pass for example key=0"
            )
        )
    if isinstance(value, bool) or not isinstance(value, (int, Tensor)):
        raise TypeError(
            problem(where, "key to be an int or an int64 tensor", describe(value), "Pass for example key=0")
        )
    if isinstance(value, Tensor) and (value.dtype != torch.int64 or value.ndim):
        raise TypeError(
            problem(
                where,
                "key to be an int64 tensor of shape ()",
                describe(value),
                "Use esegeta.batched for many keys",
            )
        )
    return value
