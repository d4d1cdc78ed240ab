"""One context that says how to compute: chunks, memory, layout, precision, progress, deadline.

It changes speed and memory, never results beyond rounding; the one exception, reduced precision, has to be
asked for by name. Scoped to the running thread or task through a context variable.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from esegeta.engine import check

Layout = Literal["auto", "channels_last", "contiguous"]
Evaluation = Literal["auto", "windows", "crops", "whole"]
Report = Callable[[str, float], None]

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Execution:
    """How to compute. Made by ``execution``; ``events`` collects what happened on the way."""

    chunk: int | None = None
    memory: int | None = None
    layout: Layout = "auto"
    evaluation: Evaluation = "auto"
    precision: torch.dtype | None = None
    progress: bool | Report | None = None
    deadline: float | None = None
    compile: bool = False
    events: list[dict[str, Any]] = field(default_factory=list)

    def left(self) -> float:
        """Return seconds until the deadline, infinity without one."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()


_current: ContextVar[Execution | None] = ContextVar("esegeta_execution", default=None)
_default = Execution()


class DeadlineExceeded(TimeoutError):
    """The deadline of ``esegeta.execution`` passed before a result that means anything existed."""


class ExecutionWarning(UserWarning):
    """Something that the engine did and that the user should know: partial result, fallback, retry."""


def current() -> Execution:
    """Return the settings in force."""
    return _current.get() or _default


def record(event: str, message: str, **details: Any) -> None:
    """Write an event down in the enclosing ``execution`` and warn about it."""
    here = _current.get()
    if here is not None:
        here.events.append({"event": event, "message": message, **details})
    warnings.warn(message, ExecutionWarning, stacklevel=3)


def record_partial(message: str, done: int, total: int, share: float | None = None) -> None:
    """Write down that a deadline cut something short, and which share of it is done."""
    record("partial", message, done=done, total=total, share=done / total if share is None else share)


def partial_share(events: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how much was done of what a deadline cut short, None if nothing was.

    An outer loop is recorded after those inside of it, and counts what they did.

    >>> partial_share([{"event": "layer"}]), partial_share([{"event": "partial", "share": 0.25}])
    (None, 0.25)
    """
    shares = [float(event["share"]) for event in events if event.get("event") == "partial"]
    return shares[-1] if shares else None


def note(event: str, message: str, **details: Any) -> None:
    """Write down in the enclosing ``execution`` how something was computed, which nobody has to be warned of."""
    here = _current.get()
    if here is not None:
        here.events.append({"event": event, "message": message, **details})


def parse_memory(where: str, value: int | float | str) -> int:
    """Return bytes from a number or a text such as "4 GiB".

    >>> parse_memory("execution", "1.5 KiB"), parse_memory("execution", 7)
    (1536, 7)
    """
    amount: float | None = None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        amount = float(value)
    elif isinstance(value, str):
        for unit, size in _UNITS.items():
            number = value.strip().removesuffix(unit)
            if number != value.strip():
                with contextlib.suppress(ValueError):
                    amount = float(number) * size
                    break
    if amount is None or not 1 <= amount < float("inf"):
        raise check.refused(
            where, 'memory in bytes or as "4 GiB"', repr(value), f"Units are {', '.join(_UNITS)}"
        )
    return int(amount)


@contextlib.contextmanager
def execution(
    *,
    chunk: int | None = None,
    memory: int | float | str | None = None,
    layout: Layout | None = None,
    evaluation: Evaluation | None = None,
    precision: Literal["bfloat16", "float16"] | None = None,
    progress: bool | Report | None = None,
    deadline: float | int | None = None,
    compile: bool | None = None,
) -> Iterator[Execution]:
    """Compute in another way inside this ``with`` block. What is not named stays as it is outside.

    Args:
        chunk: how many samples, steps or examples go through the network at once; None lets a measurement
            of the first ones decide.
        memory: what one chunk may occupy, in bytes or as ``"4 GiB"``.
        layout: ``"channels_last"`` or ``"contiguous"`` inside networks; ``"auto"`` takes the faster.
        evaluation: how a score is run on an image of which a part has changed: ``"windows"`` recomputes what
            the change reaches, operator by operator; ``"crops"`` runs the network on what it reaches; ``"whole"``
            runs on everything. ``"auto"`` takes the cheapest that is exact; one that is asked for and
            impossible is an error. ``events`` says what was done.
        precision: run networks in ``"bfloat16"`` or ``"float16"``. **This one changes results** (gradients
            were off by 12 to 21 % in bfloat16 on a 3-D U-Net on CPU); sums stay in the precision of the
            input, and a network call with a non-finite result is redone in full precision and recorded.
        progress: True or False for bars, or a function of (label, fraction done); None shows bars on
            terminals, for work that takes longer than two seconds.
        deadline: seconds from now. Sampling methods then return the mean of the samples that they have and
            warn; methods that look at one part of the image after another return NaN for those that they did
            not come to, and warn; a quadrature, whose partial sum means nothing, raises ``DeadlineExceeded``.
        compile: run networks as ``torch.compile`` makes them, where nothing inside is observed or changed. The
            first calls compile, for minutes if the network is large; it pays where the same network runs often.
            It needs a C++ compiler, and a network that can be compiled as a whole; others are refused.

    Returns:
        The settings; their ``events`` list says afterwards what was retried, cut short or done otherwise.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (x ** 3).sum()
        >>> with eg.execution(chunk=1) as run:
        ...     a = eg.integrated_gradients(score, steps=2)(torch.ones(1, 2), torch.zeros(1, 2))
        >>> [round(v, 4) for v in a.flatten().tolist()], run.events
        ([1.0, 1.0], [])
    """
    where = "execution"
    outer = current()
    changes: dict[str, Any] = {}
    if chunk is not None:
        changes["chunk"] = check.positive_count(where, "chunk", chunk)
    if memory is not None:
        changes["memory"] = parse_memory(where, memory)
    if layout is not None:
        changes["layout"] = check.one_of(where, "layout", layout, ("auto", "channels_last", "contiguous"))
    if evaluation is not None:
        changes["evaluation"] = check.one_of(
            where, "evaluation", evaluation, ("auto", "windows", "crops", "whole")
        )
    if precision is not None:
        changes["precision"] = _PRECISIONS[
            check.one_of(where, "precision", precision, ("bfloat16", "float16"))
        ]
    if progress is not None:
        if not isinstance(progress, bool) and not callable(progress):
            raise check.refused_type(
                where, "progress to be a bool or a function", check.describe(progress), "Pass True"
            )
        changes["progress"] = progress
    if deadline is not None:
        seconds = check.non_negative(where, "deadline", deadline)
        changes["deadline"] = min(time.monotonic() + seconds, outer.deadline or float("inf"))
    if compile is not None:
        if not isinstance(compile, bool):
            raise check.refused_type(where, "compile to be a bool", check.describe(compile), "Pass True")
        changes["compile"] = compile
    settings = replace(outer, **changes, events=[])
    token = _current.set(settings)
    try:
        yield settings
    finally:
        _current.reset(token)
        enclosing = _current.get()
        if enclosing is not None:
            enclosing.events.extend(settings.events)
