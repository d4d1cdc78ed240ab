"""Dropout at test time: every dropout that a network passes is active, whoever spelled it, and nothing else changes.

The network stays in evaluation mode and is not changed. Operations are seen by a mode of torch, which belongs to the
running thread: modules and functional calls are the same to it. Stochastic depth has no operation of its own, and
dropout that is put in at a place belongs to a module: both are forward hooks, which act in the running thread alone
and are gone when the run ends.

What a network computes before its first dropout is the same in every pass. A ``Tape`` remembers the operations of one
pass up to there: those values that are still alive at the first dropout are kept, the others have left no trace in
what follows, and the next pass skips all of them.
"""

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from esegeta.engine import check

# (keys of the examples, number of the dropout in the pass, how many, rate) -> which are kept, (examples, how many)
Draw = Callable[[Tensor, int, int, float, torch.device], Tensor]

# What is dropped: single elements, whole channels; and whether what is dropped becomes 0 or the low end of a SELU.
_KINDS = {
    name: (functions, whole, selu)
    for name, functions, whole, selu in (
        ("dropout", (functional.dropout, torch.dropout, torch.dropout_), False, False),
        (
            "feature_dropout",
            (
                *(functional.dropout1d, functional.dropout2d, functional.dropout3d),
                *(torch.feature_dropout, torch.feature_dropout_),
            ),
            True,
            False,
        ),
        ("alpha_dropout", (functional.alpha_dropout, torch.alpha_dropout, torch.alpha_dropout_), False, True),
        (
            "feature_alpha_dropout",
            (
                functional.feature_alpha_dropout,
                torch.feature_alpha_dropout,
                torch.feature_alpha_dropout_,
            ),
            True,
            True,
        ),
    )
}
_DROPOUTS = {fn: (whole, selu) for functions, whole, selu in _KINDS.values() for fn in functions}
_PATHS = {
    "DropPath": "drop_prob",
    "StochasticDepth": "p",
}  # classes of stochastic depth, and where the rate stands
_LOW = -1.7580993408473766  # of a SELU


class Uneven(Exception):
    """The examples of a batch cannot be told apart in what is dropped: they have to go one at a time."""


class Diverged(Exception):
    """A pass did not repeat what the tape holds."""


class Tape:
    """What a network computes before its first dropout, for one input.

    ``usable`` is False for a network that goes another way at every pass, or that writes into what is kept.
    """

    def __init__(self) -> None:
        self.usable = True
        self.input: list[Tensor] | None = None
        self._steps: list[tuple[Any, Any]] = []
        self._kept: list[tuple[Tensor, int]] = []

    def holds(self, inputs: Sequence[Tensor]) -> bool:
        """Return whether the tape is of these inputs."""
        return self.input is not None and all(
            a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
            for a, b in zip(self.input, inputs, strict=True)
        )

    def begin(self) -> None:
        """Forget what it holds, for another input."""
        self.input, self._steps, self._kept = None, [], []

    def note(self, func: Any, out: Any) -> None:
        """Remember an operation; tensors only as long as the network holds them."""
        leaves, spec = tree_flatten(out)
        self._steps.append(
            (func, ([weakref.ref(v) if isinstance(v, Tensor) else v for v in leaves], _shapes(leaves), spec))
        )

    def seal(self, inputs: Sequence[Tensor]) -> None:
        """Keep the values that are alive, at the first dropout; the others become tensors without values."""
        steps = []
        for func, (leaves, shapes, spec) in self._steps:
            values = [
                _alive(leaf, hollow) if isinstance(leaf, weakref.ref) else leaf
                for leaf, hollow in zip(leaves, shapes, strict=True)
            ]
            self._kept += [(v, v._version) for v in values if isinstance(v, Tensor) and not v.is_inference()]
            steps.append((func, tree_unflatten(values, spec)))
        self._steps = steps
        self.input = [t.clone() for t in inputs]

    def repeat(self, number: int, func: Any) -> Any:
        """Return what an operation gave."""
        if number >= len(self._steps) or self._steps[number][0] != func:
            raise Diverged
        return self._steps[number][1]

    def finished(self, number: int) -> bool:
        """Return whether that many operations are all that it holds."""
        return number == len(self._steps)

    def check(self) -> None:
        """Give up if something was written into what is kept."""
        if any(value._version != version for value, version in self._kept):
            self.usable = False
            self.begin()


def _shapes(leaves: Sequence[Any]) -> list[Any]:
    return [(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else None for v in leaves]


def _alive(reference: "weakref.ref[Tensor]", shape: Any) -> Tensor:
    value = reference()
    if value is not None:
        return value
    size, dtype, device = shape
    return torch.zeros((), dtype=dtype, device=device).expand(size)


class Dropping(TorchFunctionMode):
    """One pass of a batch with its dropout active. ``calls`` counts the dropouts of a rate above zero.

    Args:
        draw: which elements are kept.
        keys: one for each example of the batch.
        tape: of the part before the first dropout, or None.
        repeating: whether the tape holds this input.
        inputs: of the network.
    """

    def __init__(
        self, draw: Draw, keys: Tensor, tape: Tape | None, repeating: bool, inputs: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.draw, self.keys, self.tape, self.repeating = draw, keys, tape, repeating
        self.inputs = inputs
        self.calls = self._passed = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace dropouts; before the first of them, note or repeat the others."""
        kwargs = kwargs or {}
        known = _DROPOUTS.get(func)
        if known is not None:
            rate = float(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
            if rate == 0:
                return args[0] if args else kwargs["input"]
            inplace = func.__name__.endswith("_") or (
                hasattr(func, "__code__") and bool(args[3] if len(args) > 3 else kwargs.get("inplace"))
            )
            h = args[0] if args else kwargs["input"]
            return self.dropped(h, rate, *known, inplace=inplace)
        if self.tape is None or self.calls:
            return func(*args, **kwargs)
        self._passed += 1
        if self.repeating:
            return self.tape.repeat(self._passed - 1, func)
        out = func(*args, **kwargs)
        self.tape.note(func, out)
        return out

    def dropped(self, h: Tensor, rate: float, whole: bool, selu: bool, inplace: bool = False) -> Tensor:
        """Drop elements, or whole channels, of the examples of a batch."""
        rows = len(self.keys)
        if h.ndim == 0 or h.shape[0] % rows:
            raise Uneven
        if whole:
            shape = (*h.shape[:2], *[1] * (h.ndim - 2))
            return self._masked(h, rate, shape, selu, inplace)
        return self._masked(h, rate, tuple(h.shape), selu, inplace)

    def path(self, h: Tensor, rate: float, scaled: bool) -> Tensor:
        """Drop all of an example, as stochastic depth does."""
        if h.shape[0] % len(self.keys):
            raise Uneven
        return self._masked(h, rate, (h.shape[0], *[1] * (h.ndim - 1)), False, False, scaled)

    def _masked(
        self,
        h: Tensor,
        rate: float,
        shape: tuple[int, ...],
        selu: bool,
        inplace: bool,
        scaled: bool = True,
    ) -> Tensor:
        if not 0 <= rate <= 1:
            raise check.refused("dropout", "a rate from 0 to 1", str(rate), "Mend the network")
        rate = (
            round(rate * 2**16) / 2**16
        )  # what masks of 16 bits have; so values are scaled by what was drawn
        if self.tape is not None and not self.calls:
            if not self.repeating:
                self.tape.seal(self.inputs)
            elif not self.tape.finished(self._passed):
                raise Diverged
        number, self.calls = self.calls, self.calls + 1
        drawn = self.draw(self.keys, number, math.prod(shape) // len(self.keys), rate, h.device)
        # The channels of a voxel stand side by side, as they do in the layout in which networks run here.
        if len(shape) > 3:
            mask = drawn.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).to(h.dtype)
        else:
            mask = drawn.reshape(shape).to(h.dtype)
        del drawn  # the last dropout is often where a network needs most memory
        if selu and rate < 1:
            a = (1 - rate) ** -0.5 * (1 + rate * _LOW**2) ** -0.5
            factor, added = mask * a, (1 - mask) * (_LOW * a) - rate * _LOW * a
            return h.mul_(factor).add_(added) if inplace else h * factor + added
        if scaled and rate < 1:
            mask = mask.mul_(1 / (1 - rate))
        if inplace:
            return h.mul_(mask)
        if torch.is_grad_enabled() or mask.shape != h.shape:
            return h * mask
        return mask.mul_(h)


@contextmanager
def dropping(mode: Dropping, module: Any, places: Mapping[str, float], where: str) -> Iterator[None]:
    """Run the block with all dropout of a network active, and more of it behind the named modules."""
    thread = threading.get_ident()
    tree: dict[str, nn.Module] = dict(module.named_modules()) if isinstance(module, nn.Module) else {}
    with ExitStack() as stack:
        for m in tree.values():
            rate = getattr(m, _PATHS.get(type(m).__name__, ""), None)
            if rate and not isinstance(m, torch.jit.ScriptModule):
                scaled = bool(getattr(m, "scale_by_keep", True))
                hook = _hook(thread, functools.partial(mode.path, rate=float(rate), scaled=scaled))
                stack.enter_context(_removed(m.register_forward_hook(hook)))
        for place, rate in places.items():
            if place not in tree or not place:
                advice = check.nearest(place, [p for p in tree if p], "esegeta.places lists them")
                raise check.refused(where, "names of modules in rate", repr(place), advice)
            if rate:
                hook = _hook(thread, functools.partial(mode.dropped, rate=rate, whole=False, selu=False))
                stack.enter_context(_removed(tree[place].register_forward_hook(hook)))
        if any(getattr(m, "_compiled_call_impl", None) is not None for m in tree.values()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(mode)
        yield


def _hook(thread: int, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if threading.get_ident() != thread:  # hooks are seen by all threads
            return None
        return tree_map(lambda t: change(t) if isinstance(t, Tensor) and t.is_floating_point() else t, output)

    return hook


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
