"""A tensor that differs from a known one inside a box only, and goes through a network as what is in that box.

``Window`` stands for B tensors at once, each equal to one known *clean* tensor outside of its own box. An operator
that meets one computes the box that its result differs in, reads what that box needs (from the window, from the
clean activation around it, and zeros beyond the border), and runs itself on that alone. What it cannot do locally
it does on whole tensors: the answer is the same, the time is not.

Operators are met below autograd, where the many spellings of a convolution have become one.
"""

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from esegeta.engine import layout
from esegeta.engine.execution import current

aten = torch.ops.aten
Offsets = Any  # (B, number of axes) of numpy integers
Size = tuple[int, ...]


class NotFollowed(Exception):
    """The function cannot be followed window by window; the text says why."""


class TooWide(Exception):
    """What changes reach is so much that whole evaluations are as cheap."""


class Unforeseen(Exception):
    """What a run would cost is not known yet, and it may not go on without."""


class Missing(Exception):
    """A clean activation is read that no earlier run has kept."""


class Run:
    """One function at one clean input: its clean activations, and what a run through it costs.

    A run with ``record`` computes every clean activation once, and keeps those that windows are read from.
    """

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor | None, ...]] = {}
        self.read: set[tuple[int, int]] = set()
        self.names: list[str] = []
        self.kinds: list[tuple[tuple[Size, torch.dtype] | None, ...]] = []  # shape and dtype of each result
        self.recording = False
        self.by_crops = False  # whether a network counts as one operator
        self.counting: torch.device | None = (
            None  # where values would be, if nothing has any: work is only counted
        )
        self.allowance = math.inf  # how much work may be done
        self.most = math.inf  # the share of a whole evaluation that a window may cost, before anything is run
        self.probing = math.inf  # how many elements may go through a network to find out how far it sees
        self.begun = 0  # how often
        self.refused: NotFollowed | None = None
        self.step = 0
        self.cost = self.whole = 0.0
        self.held: dict[tuple[int, int], int] = {}  # how many elements the window of each result has
        self.live = self.peak = self.largest = 0  # bytes in patches
        self.global_ops: set[str] = set()
        self.commits: list[Window] | None = None
        self.differentiable = False  # whether somebody outside may ask for gradients of what takes part

    def begin(self, record: bool) -> None:
        """Start at the first operator."""
        self.step, self.recording, self.cost, self.peak = 0, record, 0.0, self.live
        self.begun, self.refused = self.begun + 1, None
        if record:
            self.whole = 0.0
            self.kept.clear()
            self.names, self.kinds = [], []

    def end(self) -> None:
        """Forget the activations that nothing was read from."""
        self.recording = False
        for step, outputs in list(self.kept.items()):
            self.kept[step] = tuple(t if (step, i) in self.read else None for i, t in enumerate(outputs))
            if all(t is None for t in self.kept[step]):
                del self.kept[step]

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Follow the inside of a network, whose parameters nobody asks for gradients of."""
        before, self.differentiable = self.differentiable, False
        try:
            with torch.no_grad():
                yield
        finally:
            self.differentiable = before

    def share(self, count: int, *, at_once: int, stays: bool = False) -> float:
        """Return what one change costs, of a whole evaluation, after a run with ``count`` of them.

        Args:
            count: how many changes there were in that run.
            at_once: how many there will be, that share what calling the operators takes.
            stays: whether changes are written into the clean activations.
        """
        each = self.cost / count + self.step * CALLING / at_once
        if stays:
            each += MOVING * sum(self.held.get(at, 0) for at in self.read) / count
        return each / max(self.whole, 1.0)

    def freed(self, size: int) -> None:
        """Note that a window is gone."""
        self.live -= size

    def next(self, name: str) -> int:
        """Return the number of this operator, which has to be the one that was there before."""
        step = self.step
        self.step += 1
        if self.recording:
            self.names.append(name)
        elif step >= len(self.names) or self.names[step] != name:
            raise NotFollowed(f"the network takes another way for other values (at {name})")
        return step


class Window(Tensor):
    """B tensors, equal to ``clean`` outside of boxes of one size at offsets of their own."""

    run: Run
    at: tuple[int, int]
    clean_: Tensor | None
    lo: Offsets
    extent: Size
    patch: Tensor
    family: list[Any]
    born: int
    stale: bool

    # Results that are plain tensors stay plain.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: Any,
        run: Run,
        at: tuple[int, int],
        shape: Size,
        clean: Tensor | None,
        lo: Offsets,
        patch: Tensor,
        dtype: torch.dtype | None = None,
    ) -> "Window":
        """Make one of a patch of shape (B, *size); ``dtype`` is what it counts as, a single number may be wider."""
        where = run.counting or patch.device
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype or patch.dtype, device=where)
        made.run, made.at, made.clean_ = run, at, clean
        made.lo, made.extent, made.patch = lo, tuple(patch.shape[1:]), patch
        made.family, made.born, made.stale = [weakref.ref(made)], run.begun, False
        size = patch.numel() * patch.element_size()
        run.live += size
        run.peak = max(run.peak, run.live)
        run.largest = max(run.largest, size)
        weakref.finalize(made, run.freed, size).atexit = False
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Window(shape={tuple(self.shape)}, size={self.extent}, {len(self.lo)} at once)"

    @property
    def data(self) -> Tensor:
        """The same values, of which autograd knows nothing."""
        return self.detach()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise NotFollowed("the network replaces the data of a tensor")

    def data_ptr(self) -> int:
        """Refuse: there is no memory to point at."""
        raise NotFollowed("the network looks at memory")

    @property
    def everywhere(self) -> bool:
        """Return whether the box is the whole tensor."""
        return self.extent == tuple(self.shape)

    @property
    def clean(self) -> Tensor:
        """The clean tensor, (1, *shape) or (B, *shape); reading it keeps it for later runs."""
        self.run.read.add(self.at)
        if self.clean_ is None:
            raise Missing
        return self.clean_

    def full(self, axis: int) -> bool:
        """Return whether the box spans this axis."""
        return self.extent[axis] == self.shape[axis]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run one operator of ATen on windows."""
        return _dispatch(func, args, dict(kwargs or {}))


def paste(clean: Tensor, window: "Window") -> None:
    """Write what a window holds into the clean tensors, (B, *shape), that it differs from."""
    for b, lo in enumerate(window.lo.tolist()):
        where = tuple(slice(at, at + n) for at, n in zip(lo, window.extent, strict=True))
        clean[b][where] = window.patch[b].to(clean.dtype)


def region(
    window: Window, lo: Offsets, size: Size, fill: float | int = 0.0, out: Tensor | None = None
) -> Tensor:
    """Return the values in boxes of another size and place, (B, *size); beyond the border they are ``fill``."""
    if out is None and size == window.extent and (lo == window.lo).all():
        return window.patch
    shape = tuple(window.shape)
    covered = window.everywhere or (
        (lo >= window.lo).all() and (lo + np.array(size) <= window.lo + np.array(window.extent)).all()
    )
    clean = None if covered else window.clean
    if out is None:
        like = window.patch if clean is None else clean
        order = sorted(range(len(shape)), key=lambda a: -like.stride(a + 1))
        out = empty(window.patch, (len(lo), *size), (0, *(a + 1 for a in order)))
    window.run.cost += MOVING * out.numel()
    if out.is_meta:
        return out
    outside = (lo < 0).any() or (lo + np.array(size) > np.array(shape)).any()
    origin = [0] * len(shape)
    for b, (start, own) in enumerate(zip(lo.tolist(), window.lo.tolist(), strict=True)):
        here = out[b]
        if outside:
            for low, high in _around(start, size, origin, shape):
                here[tuple(slice(a - s, z - s) for a, z, s in zip(low, high, start, strict=True))] = fill
        if clean is not None:
            source = clean[b % len(clean)]
            for low, high in _around(start, size, own, window.extent):
                put, take = _overlap(start, size, origin, shape, low, high)
                if put is not None:
                    here[put] = source[take]
        put, take = _overlap(
            start, size, own, window.extent, start, [a + n for a, n in zip(start, size, strict=True)]
        )
        if put is not None:
            here[put] = window.patch[b][take]
    return out


def empty(
    like: Tensor, shape: Sequence[int], order: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """Return an uninitialised tensor whose axes lie in memory in this order; without values if ``like`` has none."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis], step = step, step * max(1, shape[axis])
    return like.new_empty_strided(tuple(shape), strides, dtype=dtype)


def _around(
    start: list[int], size: Size, own: list[int], extent: Size
) -> Iterator[tuple[list[int], list[int]]]:
    """What of a box lies outside of another: slabs, two for each axis at most."""
    low, high = list(start), [a + n for a, n in zip(start, size, strict=True)]
    if any(a >= o + n or z <= o for a, z, o, n in zip(low, high, own, extent, strict=True)):
        yield low, high
        return
    for a, (o, n) in enumerate(zip(own, extent, strict=True)):
        if low[a] < o:
            yield list(low), [*high[:a], o, *high[a + 1 :]]
            low[a] = o
        if high[a] > o + n:
            yield [*low[:a], o + n, *low[a + 1 :]], list(high)
            high[a] = o + n


def _overlap(
    to: list[int], to_size: Size, source: list[int], source_size: Size, low: list[int], high: list[int]
) -> tuple[Any, Any]:
    """Where two boxes meet within a third: as slices of the one and of the other, or None."""
    put, take = [], []
    for t, m, o, n, first, last in zip(to, to_size, source, source_size, low, high, strict=True):
        first, last = max(t, o, first), min(t + m, o + n, last)
        if last <= first:
            return None, None
        put.append(slice(first - t, last - t))
        take.append(slice(first - o, last - o))
    return tuple(put), tuple(take)


def fit(lo: Offsets, hi: Offsets, shape: Size) -> tuple[Offsets, Size]:
    """Return boxes of one size that hold those given and lie within the border."""
    bound = np.array(shape)
    lo, hi = np.clip(lo, 0, bound), np.clip(hi, 0, bound)
    size = np.minimum(np.maximum((hi - lo).max(0), np.minimum(bound, 1)), bound)
    return np.minimum(lo, bound - size), tuple(int(n) for n in size)


# --- One operator -----------------------------------------------------------------------------------------


@dataclass
class Operator:
    """One call of one operator, with its clean results if they are known."""

    func: Any
    name: str
    args: Any
    kwargs: dict[str, Any]
    run: Run
    step: int
    cleans: tuple[Tensor | None, ...] | None
    compute: Any  # ``func``, or what stands for it where nothing has values

    def clean(self) -> Tensor:
        """Return the first clean result; reading it keeps it for later runs."""
        self.run.read.add((self.step, 0))
        if self.cleans is None or self.cleans[0] is None:
            raise Missing
        return self.cleans[0]


# From an operator to (offsets, patch, shape) of its result, or a list of those; NotImplemented for "not locally".
Handler = Callable[[Operator], Any]
HANDLERS: dict[str, Handler] = {}
# Operators that read nothing from beyond the box of what they are given.
INSIDE: set[str] = set()
# Operators that take each element by itself.
POINTWISE: set[str] = set()


def on(*names: str) -> Callable[[Handler], Handler]:
    """Say how operators of these names go through windows."""

    def add(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return add


def windows_in(args: Any) -> list[Window]:
    """Return the windows among arguments."""
    return [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Window)]


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    found = windows_in((args, kwargs))
    run = found[0].run
    if run.refused is not None:
        raise run.refused  # the network has caught it, and went on
    try:
        if any(w.run is not run or w.born != run.begun for w in found):
            raise NotFollowed("a tensor that another run has left behind takes part")
        if any(w.stale for w in found):
            raise NotFollowed("a tensor takes part of which a view was written into")
        return _step(func, args, kwargs, found, run)
    except NotFollowed as refused:
        run.refused = refused
        raise


def _step(func: Any, args: Any, kwargs: dict[str, Any], found: list[Window], run: Run) -> Any:
    name = func.overloadpacket.__name__
    if run.cost + run.whole > run.allowance:
        raise Unforeseen
    if run.counting:
        args, kwargs = tree_map(_without_values, (args, kwargs))
    if name in ("_local_scalar_dense", "is_nonzero", "equal", "item"):
        raise NotFollowed("the network looks at values")
    if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in name:
        raise NotFollowed(f"{name} draws random numbers")
    if run.differentiable and any(
        isinstance(t, Tensor) and t.requires_grad for t in tree_flatten((args, kwargs))[0]
    ):
        raise NotFollowed("a tensor that requires grad takes part")
    if name == "detach" or name == "alias":
        return _sibling(found[0])
    if name in _CONSTANT:
        return _constant(func, args, kwargs)
    if name == "_assert_tensor_metadata":
        return None
    target = _written(func, name, args) if func._schema.is_mutable else None
    aliases = target is None and any(r.alias_info is not None for r in func._schema.returns)
    if target is not None:
        func = _functional(func)
        name = name.rstrip("_")
    compute = _sized(func, name) if run.counting else func
    step = run.next(name)
    whole = all(w.everywhere for w in found)
    cleans: tuple[Tensor | None, ...] | None = run.kept.get(step)
    if run.recording:
        # The clean activations may be laid out otherwise than a view expects.
        plain, change = _layout_free(compute, name)
        out = plain(*change(_unwrapped(args)), **change(_unwrapped(kwargs)))
        if target is not None:
            out = out.to(target.dtype)
        cleans = run.kept[step] = tuple(t[None] if isinstance(t, Tensor) else None for t in several(out))
        run.kinds.append(
            tuple((tuple(t.shape), t.dtype) if isinstance(t, Tensor) else None for t in several(out))
        )
        run.whole += _work(name, args, out)
        if len(found) > 1 or not (name in INSIDE or (aliases and name != "slice")):
            # Other boxes will be read around, whether or not these are.
            run.read.update(w.at for w in found)
    op = Operator(func, name, args, kwargs, run, step, cleans, compute)
    local = not whole and name in HANDLERS and func.namespace == "aten"
    results = HANDLERS[name](op) if local else NotImplemented
    if results is NotImplemented:
        if not whole:
            run.global_ops.add(name)
        results = _entirely(op)
    is_list = isinstance(results, list)
    made = []
    for i, (lo, patch, shape) in enumerate(results if is_list else [results]):
        clean = None if cleans is None else cleans[i]
        patch, dtype = _as_known(op, i, patch, shape)
        made.append(Window(run, (step, i), shape, clean, lo, patch, dtype))
        run.cost += _work(name, args, patch)
        run.held[step, i] = patch.numel()
        if run.commits is not None:
            run.commits.append(made[-1])
    if aliases:
        for w in made:
            w.family = found[0].family
            w.family.append(weakref.ref(w))
    if target is not None:
        if tuple(made[0].shape) != tuple(target.shape):
            raise NotFollowed(f"{name}_ changes the shape of a tensor")
        _write(target, made[0])
        return target
    if not is_list:
        return made[0]
    return made if _gives_list(func) else tuple(made)


# What these give depends on no value: plain tensors, which a network may keep.
_CONSTANT = {
    *("zeros_like", "ones_like", "full_like", "empty_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
}


def _without_values(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    return leaf.to("meta") if isinstance(leaf, Tensor) and not isinstance(leaf, Window) else leaf


def _sized(func: Any, name: str) -> Any:
    """An operator for tensors without values, for which torch would load a compiler and take a second."""
    if name in POINTWISE:
        return functools.partial(_by_size, func)
    return {"cat": _cat_by_size, "native_batch_norm": _norm_by_size}.get(name, func)


def _norm_by_size(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _cat_by_size(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return torch.empty(shape, dtype=dtype, device="meta")


def beside(rows: Sequence[Tensor]) -> Tensor:
    """Return ``torch.stack``, also of tensors without values."""
    first = rows[0]
    return first.new_empty((len(rows), *first.shape)) if first.is_meta else torch.stack(list(rows))


def _by_size(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What an operator that takes each element by itself gives: its dtype is found on one element."""
    kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "memory_format")}
    shapes = []

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shapes.append(leaf.shape)
        return torch.ones((1,) * leaf.ndim, dtype=leaf.dtype)

    small = func(*tree_map(one, args), **tree_map(one, kwargs))
    return torch.empty(torch.broadcast_shapes(*shapes), dtype=small.dtype, device="meta")


def _constant(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    def bare(leaf: Any) -> Any:
        if not isinstance(leaf, Window):
            return leaf
        return torch.empty(tuple(leaf.shape), dtype=leaf.dtype, device=leaf.device)

    return func(*tree_map(bare, args), **kwargs)


def _written(func: Any, name: str, args: Any) -> Window:
    """The window that an operator writes into."""
    places = [
        i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]
    target = args[0] if args else None
    if not isinstance(target, Window) or places != [0] or name == "copy_" or not name.endswith("_"):
        raise NotFollowed(f"{name} writes into a tensor that is not followed")
    return target


def _write(target: Window, new: Window) -> None:
    """Give a window, and every alias of it, new values.

    Other views of the same memory change too. As a rule nobody reads them again: autograd keeps the tensor that a
    view was made of, also where a norm makes one on the way to an activation in place. So they are only marked.
    """
    was = target.at
    for relative in [w for w in (ref() for ref in target.family) if w is not None]:
        if relative is target or relative.at == was:
            for slot in ("at", "clean_", "lo", "extent", "patch"):
                setattr(relative, slot, getattr(new, slot))
        else:
            relative.stale = True


def _as_known(op: Operator, i: int, patch: Tensor, shape: Size) -> tuple[Tensor, torch.dtype]:
    """A result in its dtype, which the way that it was computed may have changed; refused if it changes its shape.

    A single number stays in double precision: scores are small differences of such numbers.
    """
    kind = op.run.kinds[op.step][i]
    if kind is None or patch.numel() == 0:
        return patch, patch.dtype
    if kind[0] != shape:
        raise NotFollowed(f"the size of what the network computes depends on values (at {op.name})")
    dtype = kind[1]
    if shape or not (patch.is_floating_point() and dtype.is_floating_point):
        patch = patch.to(dtype)
    return patch, dtype


def _gives_list(func: Any) -> bool:
    return isinstance(func._schema.returns[0].type, torch.ListType)


def _sibling(window: Window) -> Window:
    twin = Window(
        window.run, window.at, tuple(window.shape), window.clean_, window.lo, window.patch, window.dtype
    )
    twin.family = window.family
    twin.family.append(weakref.ref(twin))
    return twin


@functools.cache
def _functional(func: Any) -> Any:
    """The operator that gives a result instead of writing it."""
    name = func.overloadpacket.__name__
    packet = getattr(aten, name.rstrip("_"), None)
    for overload in [] if packet is None else packet.overloads():
        # By what it takes: pow.Scalar is another operator than pow_.Scalar.
        if _taken(getattr(packet, overload)) == _taken(func):
            return getattr(packet, overload)
    raise NotFollowed(f"{name} has no form that writes nowhere")


def _taken(func: Any) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in func._schema.arguments]


def several(out: Any) -> Sequence[Any]:
    """Return the results of an operator that may have one or more."""
    return out if isinstance(out, (tuple, list)) else (out,)


_ONEDNN = torch.backends.mkldnn.is_available()


def _layout_free(func: Any, name: str) -> tuple[Any, Callable[[Any], Any]]:
    """The operator for tensors whose layout is not the one that the network expects of them."""
    if name in ("view", "_unsafe_view"):
        return aten.reshape.default, lambda tree: tree
    if name == "convolution":
        return _laid_out(func), lambda tree: tree
    if name in HANDLERS:
        return func, lambda tree: tree
    return func, lambda tree: tree_map(lambda t: t.contiguous() if isinstance(t, Tensor) else t, tree)


def _laid_out(convolution: Any) -> Any:
    """What comes out of a convolution of one example follows no layout: put it into that of what goes in."""

    def run(x: Tensor, *rest: Any) -> Tensor:
        return arranged(convolved(convolution, arranged(x), *rest))

    return run


def convolved(convolution: Any, batch: Tensor, *rest: Any) -> Tensor:
    """Run a convolution; a single volume does not take the slow kernel that torch has for it.

    A network as a whole is given a pair of volumes instead (``layout.lonely``), of which one is for nothing. Here the
    kernel of the pair can be called for one.
    """
    weight, bias, stride, padding, dilation, transposed, _, groups = rest
    if not transposed and layout.lonely(batch) and batch.dtype == torch.float32 == weight.dtype and _ONEDNN:
        return torch.mkldnn_convolution(batch, weight, bias, padding, stride, dilation, groups)
    return convolution(batch, *rest)


def arranged(batch: Tensor) -> Tensor:
    """Return a batch in the layout that convolutions run fast in."""
    return batch if current().layout == "contiguous" else layout.in_channels_last(batch)


def _unwrapped(tree: Any) -> Any:
    def bare(leaf: Any) -> Any:
        if not isinstance(leaf, Window):
            return leaf
        assert leaf.clean_ is not None  # while it records, every window has one
        return leaf.clean_[0]

    return tree_map(bare, tree)


# What else takes time, as so many multiplications of a convolution with many channels (measured on CPU): moving an
# element through memory, and calling an operator on windows.
MOVING = 40.0
CALLING = 1e7
# Convolutions compute so many channels of their result together, also where there are fewer.
LANES = 16
# Transposed ones run at a fraction of the speed.
TRANSPOSED = 5.0


def _work(name: str, args: Any, out: Any) -> float:
    """A measure of the time: multiplications of convolutions, and elements that are moved."""
    first = next((t for t in several(out) if isinstance(t, Tensor)), None)
    if first is None:
        return 0.0
    each = MOVING
    if name == "convolution":
        weight, transposed = args[1], args[6]
        if transposed:
            each += TRANSPOSED * weight[:, 0].numel() / math.prod(args[3])
        else:
            each += weight[0].numel() * -(-len(weight) // LANES) * LANES / len(weight)
    return float(first.numel() * each)


def _entirely(op: Operator) -> Any:
    """Run on whole tensors, one example of the windows beside the other."""
    leaves, spec = tree_flatten((op.args, op.kwargs))
    wide = not any(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves)
    whole = [
        (stitched(leaf) if wide else stitched(leaf).to(leaf.dtype)) if isinstance(leaf, Window) else leaf
        for leaf in leaves
    ]
    count = next(len(leaf.lo) for leaf in leaves if isinstance(leaf, Window))
    mapped = {i for i, leaf in enumerate(leaves) if isinstance(leaf, Window)}
    func, change = _layout_free(op.compute, op.name)
    rows = []
    for b in range(count):
        positional, named = tree_unflatten([t[b] if i in mapped else t for i, t in enumerate(whole)], spec)
        rows.append(several(func(*change(positional), **change(named))))
    if not all(isinstance(value, Tensor) for value in rows[0]):
        raise NotFollowed(f"{op.name} gives no tensor")
    columns = [beside(column) for column in zip(*rows, strict=True)]
    found = [(zeros(count, t.ndim - 1), t, tuple(t.shape[1:])) for t in columns]
    return found if len(op.func._schema.returns) > 1 or _gives_list(op.func) else found[0]


def stitched(window: Window) -> Tensor:
    """Return the whole tensors, (B, *shape)."""
    return region(window, zeros(len(window.lo), window.ndim), tuple(window.shape))


def zeros(count: int, axes: int) -> Offsets:
    """Return boxes that start at the first element."""
    return np.zeros((count, axes), dtype=np.int64)
