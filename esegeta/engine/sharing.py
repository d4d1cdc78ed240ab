"""Forwards that several maps have in common are run once.

Random sets, perturbations and the ends of a curve do not depend on the map that is judged. Within ``sharing()`` what
was computed for the same score, image and settings is remembered, exactly: the same objects, not equal ones.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor

from esegeta.engine import levels
from esegeta.engine.execution import current

T = TypeVar("T")
_Known = dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]]
_known: ContextVar[_Known | None] = ContextVar("esegeta_metrics_shared", default=None)


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Let the metrics within this block share their forwards, for as long as it lasts.

    ``eg.compare``, ``metrics.calibrated`` and ``metrics.relevance_gain`` do so by themselves. Pass the same score and
    image objects to every metric, and the same key: what differs is not shared.

    Example:
        >>> import torch
        >>> from esegeta import metrics
        >>> calls, x = [], torch.ones(1, 8)
        >>> def score(x):
        ...     calls.append(1)
        ...     return x.sum()
        >>> with metrics.sharing():
        ...     for a in (x, 2 * x, 3 * x):
        ...         _ = metrics.sensitivity_n(metrics.given(a), score, samples=4)(x, key=0)
        >>> len(calls) < 8
        True
    """
    if _known.get() is not None:  # the outer block remembers
        yield
        return
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def active() -> bool:
    """Return whether forwards are shared here."""
    return _known.get() is not None and not levels.depth()


def shared(what: str, of: tuple[Any, ...], compute: Callable[[], T]) -> T:
    """Return ``compute()``, or what it was when it was asked for the same things in the same block.

    Tensors and functions are the same if they are the same object, keys and settings if they are equal. Under vmap
    nothing is remembered: there a tensor is one of many. Nor is what a deadline may have cut short.
    """
    known = _known.get()
    if known is None or not active():
        return compute()
    name = (what, *(_token(thing) for thing in of))
    if name not in known:
        found = compute()
        if current().left() <= 0:  # it may be cut short, and the next one has time of its own
            return found
        known[name] = of, found  # the things are kept, so that no other gets their id
    return known[name][1]


def _token(thing: Any) -> Any:
    if isinstance(thing, Tensor) and thing.ndim == 0 and not thing.is_floating_point():
        return int(thing)  # a key
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return thing
    return type(thing).__name__, id(thing)
