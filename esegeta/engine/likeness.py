"""When two computations are alike: the same code with the same settings on tensors of the same shapes.

What a computation occupies is measured while it runs, at the price of a hook on every operator. A second one that is
alike occupies as much, so that it is enough to measure the first. What is remembered decides about speed and memory
alone: where a network has changed in a way that is not seen here, a chunk is larger or smaller than it should be.
"""

import functools
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from esegeta.engine import levels
from esegeta.engine.execution import current

_MOST = 256  # how many computations are remembered
_DEEPEST = 400  # how many values of closures are looked at

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


@runtime_checkable
class Structured(Protocol):
    """An object that is the same but may change what it computes, such as a model of a network."""

    def structure(self) -> Any:
        """Return what its memory depends on, to be compared."""
        ...


class _Unknown(Exception):
    pass


class Memory:
    """A number for each of the computations that ran last; what is gone is forgotten, and threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a reference may die, and call back, while the lock is held
        self._known: OrderedDict[Any, tuple[list[Any], int]] = OrderedDict()

    def recall(self, which: "Likeness | None") -> int | None:
        """Return the number of a computation that is alike, if there was one."""
        if which is None:
            return None
        with self._lock:
            found = self._known.get(which.key)
            if found is None or any(ref() is None for ref in found[0]):
                return None
            self._known.move_to_end(which.key)
            return found[1]

    def remember(self, which: "Likeness | None", number: int) -> None:
        """Keep the number of a computation, as long as the objects live that it is made of."""
        if which is None:
            return
        key = which.key
        owner = weakref.ref(self)

        def gone(_: Any) -> None:
            memory = owner()
            if memory is not None:
                with memory._lock:
                    memory._known.pop(key, None)

        refs = [weakref.ref(thing, gone) for thing in which.things]
        with self._lock:
            self._known[key] = (refs, number)
            while len(self._known) > _MOST:
                self._known.popitem(last=False)


class Likeness:
    """What is compared, and the objects that it names by their identity."""

    def __init__(self, key: Any, things: list[Any]) -> None:
        self.key, self.things = key, things


def likeness(fn: Callable[..., Any], *values: Any) -> Likeness | None:
    """Return what makes a call like another one, or None where that cannot be told.

    Functions are alike with the same code and closures that are alike; tensors by shape, dtype and device; other
    objects if they are the same one.

    >>> make = lambda t: lambda x: x + t
    >>> a, b, c = (likeness(make(torch.zeros(n)), torch.ones(1)) for n in (2, 2, 3))
    >>> a.key == b.key, a.key == c.key
    (True, False)
    """
    things: list[Any] = []
    settings = current()
    around = (levels.depth(), levels.mapped(), levels.differentiating(), torch.is_grad_enabled())
    how = (settings.layout, settings.precision, settings.evaluation)
    try:
        return Likeness((around, how, *_parts((fn, values), things, {})), things)
    except _Unknown:
        return None


def _parts(value: Any, things: list[Any], seen: dict[int, int]) -> Iterator[Any]:
    """What a value is compared by, as a flat row."""
    if isinstance(value, _PLAIN):
        yield type(value)
        yield value
        return
    if isinstance(value, Tensor):
        base = levels.base(value)
        yield (tuple(value.shape), value.dtype, value.device, type(base), levels.watched(value))
        return
    known = seen.get(id(value))
    if known is not None:  # by the order in which it was met, so that what is shared is shared in both
        yield known
        return
    if len(seen) >= _DEEPEST:
        raise _Unknown
    seen[id(value)] = len(seen)
    if isinstance(value, tuple):
        yield tuple
        yield len(value)
        for part in value:
            yield from _parts(part, things, seen)
    elif isinstance(value, frozenset) and all(isinstance(part, _PLAIN) for part in value):
        yield value
    elif isinstance(value, (list, dict, set, types.CellType)):
        yield type(value)  # what a function keeps for later calls, for the most part
    elif isinstance(value, types.FunctionType):
        yield value.__code__
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:
                yield None
                continue
            if name == "key" and isinstance(content, int):
                yield int  # says which random numbers are drawn, not how many
            else:
                yield from _parts(content, things, seen)
        yield from _parts(value.__defaults__, things, seen)
        for name, part in (value.__kwdefaults__ or {}).items():
            yield name
            yield from _parts(part, things, seen)
    elif isinstance(value, functools.partial):
        yield functools.partial
        yield from _parts((value.func, value.args, tuple(value.keywords.items())), things, seen)
    elif isinstance(value, types.MethodType):
        yield types.MethodType
        yield from _parts((value.__func__, value.__self__), things, seen)
    elif isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
        yield value
    else:
        try:
            weakref.ref(value)
        except TypeError:
            raise _Unknown from None
        things.append(value)
        yield id(value)
        if isinstance(value, Structured):
            yield value.structure()
