"""The session of a running score: told of every place that is passed, it hands values out and puts others in."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_unflatten

from esegeta.engine import check, levels
from esegeta.engine.biases import Call, bias
from esegeta.engine.operators import Rewrite, Tracer
from esegeta.engine.views import Address, Edit, Kind, Passed, Stop, View


class Session:
    """The views of one stretch of running code, told of every place that it passes.

    ``batch`` is the number of examples where values are plain batches, None where they are single examples.
    ``copies`` are places whose value is written to later: there what is handed out must be a copy.
    """

    def __init__(
        self, views: Sequence[View], batch: int | None = None, copies: Iterable[Address] | None = None
    ) -> None:
        self.views, self.batch = tuple(views), batch
        self.copies = copies
        self.listing: list[Passed] | None = None
        self.owner = [""]
        self.hidden: frozenset[str] = frozenset()
        self.modules: frozenset[str] = frozenset()
        # Whether some place did not have the batch first: only a batch of one shows it unmixed.
        self.odd = False
        self.silent = False  # after a network has run, the operations around it are a reducer's: no places
        self._held: list[tuple[Address, Tensor, int]] = []
        self.versions: dict[str, list[int | None]] = {}
        self.busy = False  # while an edit is made at a place: what runs then is no operation of the code
        self.fed: dict[Any, bool] = {}  # by node of autograd's graph: whether it comes from the input
        self.tracer: Tracer | None = None
        # Of every tensor that left a network: whether it is data, and what is noted of it.
        self.left: list[tuple[bool, Any]] = []

    # -- what the running code tells ------------------------------------------------------------------------

    def visit(
        self, side: str, value: Any, kind: str, *, written: bool = False, call: Call | None = None
    ) -> Any:
        """Pass a place: return what the code goes on with.

        ``written`` says that the value is a tensor that the code had before and has now written to: whoever
        else holds it reads the new value too, so a change has to be written into it as well. ``call`` is what
        computed it, with its arguments.
        """
        calls = [(view, view.counts[side]) for view in self.views]
        for view, _ in calls:
            view.counts[side] += 1
            if side in view.plain and any(map(self._is_place, tree_leaves(value))):
                view.places[side] += 1
        asked = [(view, call) for view, call in calls if (side, call) in view.wanted]
        if not asked and self.listing is None:
            return value
        self.busy = True  # what is done here is no operation of the code that is looked at
        try:
            return self._look(side, value, kind, written, call, calls, asked)
        finally:
            self.busy = False

    def _look(
        self,
        side: str,
        value: Any,
        kind: str,
        written: bool,
        made: Call | None,
        calls: list[tuple[View, int]],
        asked: list[tuple[View, int]],
    ) -> Any:
        paths, spec = tree_flatten_with_path(value)
        leaves = [leaf for _, leaf in paths]
        names = _leaf_names(paths, "in" if side.endswith(":in") else "")
        for change in (True, False):
            for view, call in asked:
                view.leaves[side, call] = [names[i] for i in sorted(names)]
                for number in view.wanted[side, call]:
                    edit = view.edits[number]
                    i = _find(names, edit.at.leaf)
                    if i is None or (edit.kind in ("tap", "bias")) == change:
                        continue
                    if change:
                        leaves[i] = self._changed(view, edit, leaves[i], written)
                        view.met[number] = None
                    else:
                        seen = bias(made, leaves, i, self.fed) if edit.kind == "bias" else leaves[i]
                        view.met[number] = self._taken(view, edit, seen)
                        view.fresh = sorted({*view.fresh, number})
        if self.listing is not None and kind != "input":
            call = calls[-1][1]  # counted by whoever lists
            for i, name in names.items():
                self._list(Address(side, call, name), kind, leaves[i], made is not None)
        for view, _ in asked:
            if view.done:
                raise Stop(view)
        return tree_unflatten(leaves, spec) if asked else value

    def _list(self, at: Address, kind: str, t: Tensor, leaf: bool) -> None:
        assert self.listing is not None
        if self._is_place(t):
            vertex = (t.grad_fn, t.output_nr) if t.grad_fn is not None else None
            self.listing.append(Passed(at, kind, self.shape(t), t.dtype, vertex, _now(), leaf))

    def _is_place(self, t: object) -> bool:
        """Whether it can be asked for: numbers and scalars cannot."""
        return isinstance(t, Tensor) and t.is_floating_point() and t.ndim > (self.batch is not None)

    def shape(self, t: Tensor) -> tuple[int, ...]:
        """Return the shape for one example."""
        return tuple(t.shape[1:] if self._leads(t) else t.shape)

    def _leads(self, t: Tensor) -> bool:
        """Whether the first axis is the batch."""
        if self.batch is None:
            return False
        leads = t.ndim > 0 and t.shape[0] == self.batch
        self.odd = self.odd or not leads
        return leads

    def _changed(self, view: View, edit: Edit, value: Tensor, written: bool) -> Tensor:
        put = edit.tensor
        assert put is not None
        if not value.is_floating_point():
            raise check.refused_type(
                view.where,
                "a place with floating activations",
                f"{check.describe(value)} at {str(edit.at)!r}",
                "Choose a place before the argmax, comparison or cast",
            )
        _refuse_recomputed(view.where, edit.at, put)
        one = self.shape(value)
        have = tuple(put.shape if self.batch is None else put.shape[1:])
        fits = have == one if edit.kind == "replace" else len(have) == len(one) and _broadcasts(have, one)
        if not fits:
            what = "a replacement of shape" if edit.kind == "replace" else "a nudge that broadcasts to"
            raise check.refused(
                view.where, f"{what} {one} at {str(edit.at)!r}", str(have), "Take it from esegeta.tap"
            )
        if self.batch is not None and not self._leads(value):
            put = put.squeeze(0)
        put = put.to(value.dtype)
        if written:
            return _rewritten(value, put, edit.kind)
        return value + put if edit.kind == "nudge" else _arranged(put, value)

    def _taken(self, view: View, edit: Edit, value: Tensor) -> Tensor:
        if levels.depth() > view.depth and self.batch is None:
            raise _inner(view.where, edit.at)
        t = value if self._leads(value) or self.batch is None else value.unsqueeze(0)
        if self.copies is None or edit.at in self.copies or t.is_inference():
            return t.clone()
        self._held.append((edit.at, t, t._version))
        return t

    # -- what the run of a network needs --------------------------------------------------------------------

    @property
    def spoiled(self) -> set[Address]:
        """Return the places whose value, handed out as it was, has been written to since."""
        return {at for at, t, version in self._held if t._version != version}

    def put(self) -> list[Tensor]:
        """Return what all views put in, in order."""
        return [e.tensor for view in self.views for e in view.edits if e.tensor is not None]

    def bare(self) -> "Session":
        """Return the same requests without tensors. Graphs keep it: tensors in it would keep the graph in turn."""
        plan = Session([view.bare() for view in self.views])
        plan.listing = self.listing
        plan.rewrite_with(self.tracer.rewrite if self.tracer is not None else None)
        return plan

    def rewrite_with(self, rewrite: Rewrite | None) -> None:
        """Let operations have the derivatives of a rewrite."""
        if rewrite is not None:
            here = lambda tracer: (now := CURRENT.get()) is not None and now.tracer is tracer
            owner = self.owner  # a tracer that knew its session would be a cycle, and activations would stay
            self.tracer = Tracer(rewrite, here, lambda: owner[-1])

    @property
    def local(self) -> bool:
        """Return whether the code runs as it is but for operations that are replaced by local ones."""
        return (
            self.tracer is not None
            and bool(getattr(self.tracer.rewrite, "local", False))
            and self.listing is None
            and not any(view.edits for view in self.views)
        )

    def looking(self) -> "Session":
        """Return a session that only looks at the same places."""
        plan = Session([view.bare() for view in self.views])
        for view in plan.views:
            view.edits = tuple(Edit(e.at, "tap") for e in view.edits)
            view.stop = bool(view.edits) and len(plan.views) == 1
        return plan

    def fork(self, put: Sequence[Tensor], batch: int, copies: Iterable[Address]) -> "Session":
        """Return the session for one run of a network on a batch."""
        rest = iter(put)
        inner = Session([view.fork(rest) for view in self.views], batch, copies)
        inner.listing = self.listing
        inner.rewrite_with(self.tracer.rewrite if self.tracer is not None else None)
        return inner

    def take(self) -> list[Tensor]:
        """Return the taps of all views, in order, and let go of them."""
        found = [view.met[i] for view in self.views for i in view.fresh]
        for view in self.views:
            view.met = dict.fromkeys(view.met)
        self._held, self.fed = [], {}  # what would keep the graph alive
        return [t for t in found if t is not None]

    def join(self, inner: "Session", seen: Sequence[Tensor]) -> None:
        """Take over what a run has met, with its taps as they came out; stop if that is all."""
        rest = iter(seen)
        for view, other in zip(self.views, inner.views, strict=True):
            view.counts, view.modules = other.counts, {**view.modules, **other.modules}
            view.places = other.places
            view.scripted |= other.scripted
            view.leaves.update(other.leaves)
            for i in sorted(set(other.met) - set(view.met)):
                view.met[i] = None
            for i in other.fresh:
                if levels.depth() > view.depth:
                    raise _inner(view.where, view.edits[i].at)
                view.met[i] = next(rest)
        self.silent = True
        for view in self.views:
            if view.edits and view.done:
                raise Stop(view)

    def agrees(self, other: "Session") -> bool:
        """Return whether another run has met the same places."""
        return all(set(a.met) == set(b.met) for a, b in zip(self.views, other.views, strict=True))

    def missing(self) -> Exception | None:
        """Return the error for what was asked for and not met, if any."""
        return next((e for view in self.views if (e := view.missing()) is not None), None)

    def standing(self) -> frozenset[tuple[Address, int]]:
        """Return every place that is asked for, with how often its path has been passed."""
        return frozenset((e.at, view.counts[e.at.side]) for view in self.views for e in view.edits)

    def mine(self) -> bool:
        """Return whether what runs now is to be told to this session."""
        # Hooks fire for every thread that runs this module; the context variable says whose run it is.
        return CURRENT.get() is self and not self.busy


CURRENT: ContextVar[Session | None] = ContextVar("esegeta_session", default=None)


def current() -> Session | None:
    """Return the session that the running code reports to."""
    return CURRENT.get()


@contextmanager
def aside() -> Iterator[None]:
    """Run what is in this block unobserved."""
    token = CURRENT.set(None)
    try:
        yield
    finally:
        CURRENT.reset(token)


def _now() -> float:
    """The time by the clock of autograd's graph, whose nodes are numbered as they are made."""
    with torch.inference_mode(False), torch.enable_grad():
        tick: Any = torch.zeros((), requires_grad=True).expand(1).grad_fn
    return float(tick._sequence_nr())


def _leaf_names(paths: Sequence[tuple[Any, Any]], side: str) -> dict[int, str]:
    """A name for each tensor of a tree, by position; nothing where there is only one."""
    tensors = [(i, keys) for i, (keys, leaf) in enumerate(paths) if isinstance(leaf, Tensor)]
    if len(tensors) == 1:
        return {tensors[0][0]: side}
    names = {i: ".".join(str(_key(k)) for k in keys) for i, keys in tensors}
    return {i: f"{side}.{name}" if side else name for i, name in names.items()}


def _key(entry: Any) -> Any:
    for attribute in ("idx", "key", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry


def _find(names: dict[int, str], leaf: str) -> int | None:
    exact = [i for i, name in names.items() if name == leaf]
    if exact:
        return exact[0]
    # Where there is one tensor, any position that holds it is right: "in.0", or "0" of a tuple of one.
    return next(iter(names)) if len(names) == 1 and leaf in ("0", "in.0") else None


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    return all(a in (1, b) for a, b in zip(small, large, strict=True))


def _arranged(z: Tensor, like: Tensor) -> Tensor:
    """A copy of z in the layout of another tensor, so that the next kernel is the same one, and may write to it."""
    if like.layout != torch.strided or levels.wrapped(z) or levels.wrapped(like):
        return z.clone()
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda d: (-strides[d], d))
    back = [order.index(d) for d in range(like.ndim)]
    return z.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def _rewritten(value: Tensor, put: Tensor, kind: Kind) -> Tensor:
    """Write a change into a tensor that an operation in place has just written to."""
    if levels.wrapped(value):
        return value.add_(put) if kind == "nudge" else value.copy_(put)
    # That operation may have kept the tensor for its derivative. It keeps the old memory, with the old values;
    # everybody else who holds the tensor gets new memory. So nothing that was kept has changed.
    value.data = value.detach().clone()
    with torch.autograd._unsafe_preserve_version_counter(value):
        return value.add_(put) if kind == "nudge" else value.copy_(put)


def _refuse_recomputed(where: str, at: Address, put: Tensor) -> None:
    # Checkpointing runs the region again in the backward pass, without what was put in; and in code under
    # no_grad nothing leads from it to the score.
    hidden = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if hidden or (put.requires_grad and not torch.is_grad_enabled()):
        raise check.refused(
            where,
            "a place outside of checkpointed code and of no_grad",
            f"{str(at)!r}, from which autograd keeps no way to the score",
            "Switch checkpointing off, or take the place before or after that block",
        )


def _inner(where: str, at: Address) -> ValueError:
    return check.refused(
        where,
        "a place that is passed once by the score",
        f"{str(at)!r} inside of a vmap or grad that the score itself applies",
        "Take the place of the function that is mapped",
    )
