"""Data and its twins, on the way into a network and out of it.

With rules at work a tracer knows which tensors are data, what is noted of them, and, where rules compare with a
reference, the twin of each. Inside of a network there is another tracer: all of it enters and leaves with the data.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from esegeta.engine.operators import Tracer

Noted = tuple[tuple[int, Any], ...]


def paired(tracer: Tracer | None) -> bool:
    """Return whether data has twins."""
    return tracer is not None and tracer.rewrite.paired


def entering(tracer: Tracer | None, values: Sequence[Any]) -> tuple[Noted, list[Tensor]]:
    """Return which of the values that enter a network are data, with what is noted of them, and their twins."""
    if tracer is None:
        return (), []
    data = tuple((i, tracer.notes.get(t)) for i, t in enumerate(values) if tracer.is_data(t))
    return data, [tracer.twin(values[i]) for i, _ in data] if tracer.rewrite.paired else []


def mark(tracer: Tracer | None, values: Sequence[Any], data: Noted, twins: Sequence[Tensor | None]) -> None:
    """Mark the same values as data inside of the network."""
    if tracer is not None:
        for (i, note), twin in zip(data, twins, strict=True):
            tracer.mark(values[i], twin)
            if note is not None:
                tracer.notes[values[i]] = note


def companions(tracer: Tracer | None, out: Sequence[Tensor]) -> tuple[list[tuple[bool, Any]], list[Tensor]]:
    """Return of what leaves a network whether it is data, with what is noted of it, and the twins."""
    if tracer is None:
        return [], []
    left = [(tracer.is_data(t), tracer.notes.get(t)) for t in out]
    return left, [_apart(tracer.twin(t), t) for t in out] if tracer.rewrite.paired else []


def leaving(
    tracer: Tracer | None, left: Sequence[tuple[bool, Any]], out: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return what left a network without its twins, marked as it was inside."""
    if tracer is None:
        return out
    twins: Sequence[Tensor | None] = [None] * len(out)
    if tracer.rewrite.paired:
        out, twins = out[: len(out) // 2], out[len(out) // 2 :]
    for t, (is_data, note), twin in zip(out, left, twins, strict=True):
        if is_data:
            tracer.mark(t, twin)
        if note is not None:
            tracer.notes[t] = note
    return out


def _apart(twin: Tensor, t: Tensor) -> Tensor:
    return t.detach() if twin is t else twin
