"""Looking into a running score: places are passed one after another, and whoever asked sees or changes them.

A *place* is one tensor that the code produces on its way: the output of a module, of one of its calls, of an
operation in its ``forward``, or a value marked by ``name``. Nothing of this is compiled, traced or rewritten:
the code runs as it always does, and a *session*, scoped to the running thread, is told of every place that it
passes. A network behind the folded call is a plain batch inside: there a second session, forked for that one
run, sees batches, and what it has seen leaves the run as further outputs, what it puts in enters as further
inputs. So every transform around the score works for places as for the score itself.
"""

import difflib
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import vjp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from esegeta.engine import check, execution, levels
from esegeta.engine.operators import Rewrite, Tracer, refuse_unseen
from esegeta.engine.second_order import second_order

Kind = Literal["tap", "replace", "nudge", "bias"]

_GRAMMAR = re.compile(r"([^#:\s][^#:]*)(?:#(\d+))?(?::([^#:]+))?")
# What moves, copies or looks at a tensor makes no new value, and Python's own spelling of operators.
_SILENT = frozenset(
    {
        "backward",
        "bfloat16",
        "clone",
        "contiguous",
        "cpu",
        "cuda",
        "delitem",
        "detach",
        "dim",
        "double",
        "empty_like",
        "float",
        "full_like",
        "get",
        "half",
        "item",
        "new_empty",
        "new_full",
        "new_ones",
        "new_tensor",
        "new_zeros",
        "numpy",
        "ones_like",
        "rand_like",
        "randn_like",
        "register_hook",
        "requires_grad",
        "retain_grad",
        "set",
        "setitem",
        "size",
        "to",
        "tolist",
        "type",
        "type_as",
        "zeros_like",
    }
)
_SPELLED = {"truediv": "div", "rtruediv": "div", "multiply": "mul", "true_divide": "div", "divide": "div"}
_SPELLED |= {p + n: n for p in "ir" for n in ("add", "sub", "mul", "pow", "matmul")} | {"itruediv": "div"}


# A function, its arguments, its named arguments.
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Stop(BaseException):
    """Everything that a view asked for has been seen: the rest of the score need not run."""

    def __init__(self, view: "View") -> None:
        self.view = view


@dataclass(frozen=True)
class Address:
    """Where: a path, which of its calls, which tensor of the result.

    >>> parse("demo", "block.conv#1:aux.0")
    Address(path='block.conv', call=1, leaf='aux.0')
    >>> str(parse("demo", "block#0"))
    'block'
    """

    path: str
    call: int = 0
    leaf: str = ""
    numbered: bool = field(
        default=True, compare=False, repr=False
    )  # whether the call was named, or is the first

    def __str__(self) -> str:
        return self.path + (f"#{self.call}" if self.call else "") + (f":{self.leaf}" if self.leaf else "")

    @property
    def in_full(self) -> str:
        """With the number of the call, also if that is the first."""
        return f"{self.path}#{self.call}" + (f":{self.leaf}" if self.leaf else "")

    @property
    def side(self) -> str:
        """What is counted: outputs of a path, or inputs of a module."""
        return f"{self.path}:in" if self.leaf.split(".")[0] == "in" else self.path


def parse(where: str, text: object) -> Address:
    """Read ``path``, ``path#call``, ``path:leaf``, ``path#call:leaf``."""
    found = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(
            check.problem(
                where,
                'a place such as "encoder.0", "block.conv#1" (second call), "block:1" (second output), '
                '"block.relu:in" (input)',
                check.describe(text),
                "esegeta.places(score, x) lists them",
            )
        )
    path, call, leaf = found.groups()
    return Address(path, int(call or 0), leaf or "", call is not None)


@dataclass(frozen=True)
class Edit:
    """What to do at a place. Taps come out; replacements and nudges come with the tensor that they put in.

    A bias comes out too: what an operation adds to its linear part, ``f(z) - J(z) z``.
    """

    at: Address
    kind: Kind
    tensor: Tensor | None = None


@dataclass
class Passed:
    """One tensor that a listing session passed."""

    at: Address
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    vertex: Any
    time: float
    leaf: bool


class View:
    """What one caller asks for while a score runs, and what it has met so far."""

    def __init__(self, where: str, edits: Sequence[Edit], stop: bool) -> None:
        self.where, self.edits, self.stop = where, tuple(edits), stop
        self.counts: Counter[str] = Counter()
        self.met: dict[int, Tensor | None] = {}
        self.fresh: list[int] = []  # the taps of this very run, in order of their numbers
        self.leaves: dict[tuple[str, int], list[str]] = {}
        self.modules: dict[str, str] = {}  # path -> the path that it is known by (another one if shared)
        self.scripted: set[str] = set()
        self.depth = levels.depth()
        self._index()

    def _index(self) -> None:
        self.wanted: dict[tuple[str, int], list[int]] = {}
        for i, edit in enumerate(self.edits):
            self.wanted.setdefault((edit.at.side, edit.at.call), []).append(i)

    def fork(self, tensors: Iterator[Tensor]) -> "View":
        """The same requests for one run of a network, with batches to put in."""
        edits = [Edit(e.at, e.kind, None if e.kind in ("tap", "bias") else next(tensors)) for e in self.edits]
        return self._again(edits)

    def bare(self) -> "View":
        """The same requests without tensors: what may be kept for as long as a graph lives."""
        return self._again([Edit(e.at, e.kind) for e in self.edits])

    def _again(self, edits: Sequence[Edit]) -> "View":
        inner = View(self.where, edits, self.stop)
        inner.counts, inner.met = Counter(self.counts), dict.fromkeys(self.met)
        return inner

    @property
    def done(self) -> bool:
        """Whether it wants no more of this run."""
        return self.stop and len(self.met) == len(self.edits)

    def missing(self) -> Exception | None:
        """The error for what was never passed."""
        for i, edit in enumerate(self.edits):
            if i not in self.met:
                return self._why(edit.at)
        return None

    def say_which_calls(self) -> None:
        """Tell whoever named a place without the number of a call that there are several."""
        known = {edit.at.side for edit in self.edits if edit.at.numbered}
        for edit in self.edits:
            calls = self.counts[edit.at.side]
            if calls < 2 or edit.at.side in known:
                continue
            message = (
                f"{self.where}: {str(edit.at)!r} is passed {calls} times, and this is the first of them. Write "
                f"{edit.at.in_full!r} for it, or a number up to {calls - 1}; esegeta.places(score, x) lists them."
            )
            if all(event.get("message") != message for event in execution.current().events):
                execution.record("place", message)

    def _why(self, at: Address) -> Exception:
        where, path = self.where, at.path
        if path in self.scripted:
            return ValueError(
                check.problem(
                    where,
                    "a place in Python code",
                    f"{str(at)!r}, a part of a TorchScript network, which shows nothing of its inside",
                    "Take the module that it was made from",
                )
            )
        if self.modules.get(path, path) != path:
            other = self.modules[path]
            return ValueError(
                check.problem(
                    where,
                    "a place by the first of its names",
                    f"{str(at)!r}, which is the same module as {other!r}",
                    f"Use {other!r} with the number of the call, such as {other + '#1'!r}",
                )
            )
        calls = self.counts[at.side] or (self.counts[path] if at.side != path else 0)
        if calls > at.call:
            leaves = self.leaves.get((at.side, at.call), [])
            if not leaves:
                got, advice = f"{str(at)!r}, which holds none that torch finds", "Choose a place inside of it"
            elif leaves in ([""], ["in"]):
                got, advice = f"{str(at)!r}, where there is only one", f"Use {str(Address(path, at.call))!r}"
            else:
                got = f"{str(at)!r}, where there are {len(leaves)}: {', '.join(leaves)}"
                advice = f"Choose one, such as {str(Address(path, at.call, leaves[0]))!r}"
            return ValueError(check.problem(where, f"one tensor of {path!r}", got, advice))
        if calls:
            return ValueError(
                check.problem(
                    where,
                    f"a call of {path!r} that happens",
                    f"#{at.call}, but there {'is' if calls == 1 else 'are'} {calls}",
                    "Calls are counted from 0",
                )
            )
        if path in self.modules:
            return ValueError(
                check.problem(
                    where,
                    "a place that this input reaches",
                    f"{str(at)!r}, a module that was never called",
                    "esegeta.places(score, x) lists what is reached",
                )
            )
        names = {*self.modules, *(p.removesuffix(":in") for p in self.counts)}
        return ValueError(
            check.problem(
                where, "a place of this score", f"{str(at)!r}, which is never passed", nearest(path, names)
            )
        )


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
        self.odd = (
            False  # whether some place did not have the batch first: only a batch of one shows it unmixed
        )
        self.silent = False  # after a network has run, the operations around it are a reducer's: no places
        self._held: list[tuple[Address, Tensor, int]] = []
        self._versions: dict[str, list[int | None]] = {}
        self._busy = False
        self._fed: dict[Any, bool] = {}  # by node of autograd's graph: whether it comes from the input
        self.tracer: Tracer | None = None
        self.left: list[tuple[bool, Any]] = []

    # -- what the running code tells ------------------------------------------------------------------------

    def visit(
        self, side: str, value: Any, kind: str, *, written: bool = False, call: Call | None = None
    ) -> Any:
        """A place is passed; what comes back goes on in its stead.

        ``written`` says that the value is a tensor that the code had before and has now written to: whoever
        else holds it reads the new value too, so a change has to be written into it as well. ``call`` is what
        computed it, with its arguments.
        """
        calls = [(view, view.counts[side]) for view in self.views]
        for view, _ in calls:
            view.counts[side] += 1
        asked = [(view, call) for view, call in calls if (side, call) in view.wanted]
        if not asked and self.listing is None:
            return value
        self._busy = True  # what is done here is no operation of the code that is looked at
        try:
            return self._look(side, value, kind, written, call, calls, asked)
        finally:
            self._busy = False

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
                        seen = self._bias(made, leaves, i) if edit.kind == "bias" else leaves[i]
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

    def _bias(self, made: Call | None, out: list[Any], which: int) -> Tensor:
        """What an operation adds to its linear part at this input: ``f(z) - J(z) z``, with its weights fixed."""
        if made is None or _is_homogeneous(made[0]):
            return torch.zeros_like(out[which])
        function, args, kwargs = made
        leaves, spec = tree_flatten((args, kwargs))
        data = [i for i, leaf in enumerate(leaves) if self._comes_from_input(leaf)]

        def again(*zs: Tensor) -> Tensor:
            changed = list(leaves)
            for i, z in zip(data, zs, strict=True):
                changed[i] = z
            positional, named = tree_unflatten(changed, spec)
            once_more = function(
                *positional, **{**named, **({"inplace": False} if "inplace" in named else {})}
            )
            found: Tensor = tree_flatten(once_more)[0][which]
            return found

        zs = tuple(leaves[i] for i in data)
        if not zs:
            return out[which]
        # Reverse mode twice, as everywhere: forward-mode rules are missing for many operations.
        with second_order(operation(function) or "full_grad"):
            value, pull, _ = vjp(lambda *zs: (again(*[z * 1 for z in zs]), ()), *zs, has_aux=True)  # type: ignore[misc]
            (linear,) = vjp(pull, torch.zeros_like(value))[1](zs)
        return (value - linear).detach()

    def _comes_from_input(self, leaf: Any) -> bool:
        """Whether an argument of an operation is data: computed from the input, which is being differentiated.

        Weights are not told by their type: plain functions have them as plain tensors, weight norm computes them,
        and the statistics of a norm are buffers.
        """
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or isinstance(leaf, nn.Parameter):
            return False
        if levels.wrapped(leaf):
            return levels.differentiated(leaf)
        if levels.depth():
            return False
        if leaf.grad_fn is None:
            return leaf.requires_grad
        seen, stack = {leaf.grad_fn}, [leaf.grad_fn]
        while stack:
            node = stack.pop()
            known = self._fed.get(node)
            start = getattr(node, "variable", None)
            if known or (start is not None and not isinstance(start, nn.Parameter)):
                self._fed[leaf.grad_fn] = True
                return True
            for below, _ in () if known is False else node.next_functions:
                if below is not None and below not in seen:
                    seen.add(below)
                    stack.append(below)
        self._fed.update(dict.fromkeys(seen, False))
        return False

    def _list(self, at: Address, kind: str, t: Tensor, leaf: bool) -> None:
        assert self.listing is not None
        if t.is_floating_point() and t.ndim > (self.batch is not None):
            vertex = (t.grad_fn, t.output_nr) if t.grad_fn is not None else None
            self.listing.append(Passed(at, kind, self.shape(t), t.dtype, vertex, _now(), leaf))

    def shape(self, t: Tensor) -> tuple[int, ...]:
        """The shape for one example."""
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
            raise TypeError(
                check.problem(
                    view.where,
                    "a place with floating activations",
                    f"{check.describe(value)} at {str(edit.at)!r}",
                    "Choose a place before the argmax, comparison or cast",
                )
            )
        _refuse_recomputed(view.where, edit.at, put)
        one = self.shape(value)
        have = tuple(put.shape if self.batch is None else put.shape[1:])
        fits = have == one if edit.kind == "replace" else len(have) == len(one) and _broadcasts(have, one)
        if not fits:
            what = "a replacement of shape" if edit.kind == "replace" else "a nudge that broadcasts to"
            raise ValueError(
                check.problem(
                    view.where, f"{what} {one} at {str(edit.at)!r}", str(have), "Take it from esegeta.tap"
                )
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
        """Places whose value, handed out as it was, has been written to since."""
        return {at for at, t, version in self._held if t._version != version}

    def put(self) -> list[Tensor]:
        """What all views put in, in order."""
        return [e.tensor for view in self.views for e in view.edits if e.tensor is not None]

    def bare(self) -> "Session":
        """The same requests without tensors. Graphs keep it: tensors in it would keep the graph in turn."""
        plan = Session([view.bare() for view in self.views])
        plan.listing = self.listing
        plan.rewrite_with(self.tracer.rewrite if self.tracer is not None else None)
        return plan

    def rewrite_with(self, rewrite: Rewrite | None) -> None:
        """Let operations have the derivatives of a rewrite."""
        if rewrite is not None:
            here = lambda tracer: (now := _current.get()) is not None and now.tracer is tracer
            owner = self.owner  # a tracer that knew its session would be a cycle, and activations would stay
            self.tracer = Tracer(rewrite, here, lambda: owner[-1])

    def looking(self) -> "Session":
        """The same places, only looked at."""
        plan = Session([view.bare() for view in self.views])
        for view in plan.views:
            view.edits = tuple(Edit(e.at, "tap") for e in view.edits)
            view.stop = bool(view.edits) and len(plan.views) == 1
        return plan

    def fork(self, put: Sequence[Tensor], batch: int, copies: Iterable[Address]) -> "Session":
        """The session for one run of a network on a batch."""
        rest = iter(put)
        inner = Session([view.fork(rest) for view in self.views], batch, copies)
        inner.listing = self.listing
        inner.rewrite_with(self.tracer.rewrite if self.tracer is not None else None)
        return inner

    def take(self) -> list[Tensor]:
        """The taps of all views, in order, which the session then lets go of."""
        found = [view.met[i] for view in self.views for i in view.fresh]
        for view in self.views:
            view.met = dict.fromkeys(view.met)
        self._held, self._fed = [], {}  # what would keep the graph alive
        return [t for t in found if t is not None]

    def join(self, inner: "Session", seen: Sequence[Tensor]) -> None:
        """Take over what a run has met, with its taps as they came out; stop if that is all."""
        rest = iter(seen)
        for view, other in zip(self.views, inner.views, strict=True):
            view.counts, view.modules = other.counts, {**view.modules, **other.modules}
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
        """Whether another run has met the same places."""
        return all(set(a.met) == set(b.met) for a, b in zip(self.views, other.views, strict=True))

    def missing(self) -> Exception | None:
        """The error for what this run has not met, if it was asked for."""
        return next((e for view in self.views if (e := view.missing()) is not None), None)

    # -- data and its twins, on the way into a network and out of it ------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether what runs now is an edit at a place, and no operation of the code."""
        return self._busy

    @property
    def paired(self) -> bool:
        """Whether data has twins."""
        return self.tracer is not None and self.tracer.rewrite.paired

    def entering(self, values: Sequence[Any]) -> tuple[tuple[tuple[int, Any], ...], list[Tensor]]:
        """Which of the values that enter a network are data, with what is noted of them, and their twins."""
        if self.tracer is None:
            return (), []
        notes = self.tracer.notes
        data = tuple((i, notes.get(t)) for i, t in enumerate(values) if self.tracer.is_data(t))
        return data, [self.tracer.twin(values[i]) for i, _ in data] if self.paired else []

    def marks(
        self, values: Sequence[Any], data: Sequence[tuple[int, Any]], twins: Sequence[Tensor | None]
    ) -> None:
        """Inside of the network the same are data."""
        if self.tracer is not None:
            for (i, note), twin in zip(data, twins, strict=True):
                self.tracer.mark(values[i], twin)
                if note is not None:
                    self.tracer.notes[values[i]] = note

    def companions(self, out: Sequence[Tensor]) -> list[Tensor]:
        """The twins of what leaves the network."""
        if self.tracer is None:
            return []
        self.left = [(self.tracer.is_data(t), self.tracer.notes.get(t)) for t in out]
        return [_apart(self.tracer.twin(t), t) for t in out] if self.paired else []

    def leaving(self, inner: "Session", out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What left the network, marked as it was inside."""
        if self.tracer is None or inner.tracer is None:
            return out
        twins: Sequence[Tensor | None] = [None] * len(out)
        if self.paired:
            out, twins = out[: len(out) // 2], out[len(out) // 2 :]
        for t, (is_data, note), twin in zip(out, inner.left, twins, strict=True):
            if is_data:
                self.tracer.mark(t, twin)
            if note is not None:
                self.tracer.notes[t] = note
        return out

    def standing(self) -> frozenset[tuple[Address, int]]:
        """Every place that is asked for, with how often its path has been passed."""
        return frozenset((e.at, view.counts[e.at.side]) for view in self.views for e in view.edits)

    @contextmanager
    def running(self, module: Any = None) -> Iterator[None]:
        """Be told of what runs inside this block, and of the inside of a module. Hooks are gone afterwards."""
        root = getattr(module, "_orig_mod", module)
        tree: dict[nn.Module, str] = {}
        compiled = False
        if isinstance(root, nn.Module):
            for path, m in root.named_modules(remove_duplicate=False):
                compiled = compiled or getattr(m, "_compiled_call_impl", None) is not None
                known = tree.setdefault(m, path)
                for view in self.views:
                    view.modules[path] = known
                    if isinstance(m, torch.jit.ScriptModule):
                        view.scripted.add(path)
        tree = {m: path for m, path in tree.items() if not isinstance(m, torch.jit.ScriptModule)}
        self.modules = frozenset(tree.values())
        sides = {e.at.side for view in self.views for e in view.edits}
        everything = self.listing is not None
        # Operations that torch has in the code around or inside: only then every operation is looked at.
        operations = everything or any(_may_be_operation(side, self.modules) for side in sides)
        owners = operations or self.tracer is not None
        outer = _current.get()
        # A session nested in another shares its tracer, which is at work already.
        starts = self.tracer is not None and (outer is None or outer.tracer is not self.tracer)
        if self.tracer is not None and any(view.scripted for view in self.views):
            raise NotImplementedError(
                check.problem(
                    self.tracer.rewrite.name,
                    "a network whose operations can be seen",
                    "one with TorchScript in it, which shows nothing of its inside",
                    "Use the module that it was made from",
                )
            )
        with ExitStack() as stack:
            token = _current.set(self)
            stack.callback(_current.reset, token)
            if compiled:  # code that module.compile() has made shows nothing of its inside
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self.tracer is not None and starts:
                stack.enter_context(self.tracer)
                stack.callback(self.tracer.forget)
            if owners:
                self.hidden = frozenset(p for m, p in tree.items() if p and _is_builtin_leaf(m))
                for m, path in tree.items():
                    stack.callback(m.register_forward_pre_hook(self._enter(path)).remove)
            for m, path in tree.items():
                if path:
                    if everything or path in sides:
                        stack.callback(m.register_forward_pre_hook(self._before(path)).remove)
                        stack.callback(m.register_forward_hook(self._leave(path)).remove)
                    if f"{path}:in" in sides:
                        hook = m.register_forward_pre_hook(self._input(path), with_kwargs=True)
                        stack.callback(hook.remove)
            if owners:
                for m in tree:
                    stack.callback(m.register_forward_hook(self._exit(), always_call=True).remove)
            if operations:
                stack.enter_context(_Operations(self))
            yield

    def _mine(self) -> bool:
        # Hooks fire for every thread that runs this module; the context variable says whose run it is.
        return _current.get() is self and not self._busy

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._mine():
                self.owner.append(path)

        return hook

    def _exit(self) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._mine() and len(self.owner) > 1:
                self.owner.pop()

        return hook

    def _before(self, path: str) -> Callable[..., None]:
        def hook(_m: nn.Module, args: Any) -> None:
            if self._mine():
                self._versions.setdefault(path, []).append(_version_of(args))

        return hook

    def _leave(self, path: str) -> Callable[..., Any]:
        def hook(m: nn.Module, args: Any, output: Any) -> Any:
            if not self._mine():
                return None
            written = _is_written(args, output, (self._versions.get(path) or [None]).pop())
            call: Call | None = (m.forward, args, {}) if _is_builtin_leaf(m) else None
            return self.visit(path, output, "module", written=written, call=call)

        return hook

    def _input(self, path: str) -> Callable[..., Any]:
        def hook(_m: nn.Module, args: Any, kwargs: Any) -> Any:
            if not self._mine():
                return None
            if kwargs:
                merged = self.visit(f"{path}:in", {**dict(enumerate(args)), **kwargs}, "input")
                return tuple(merged[i] for i in range(len(args))), {k: merged[k] for k in kwargs}
            return self.visit(f"{path}:in", args, "input"), kwargs

        return hook


_current: ContextVar[Session | None] = ContextVar("esegeta_session", default=None)


def current() -> Session | None:
    """The session that the running code reports to."""
    return _current.get()


@contextmanager
def aside() -> Iterator[None]:
    """Run what is in this block unobserved."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def observe(
    where: str,
    score: Callable[..., Any],
    inputs: Sequence[Any],
    edits: Sequence[Edit],
    *,
    stop: bool = False,
    rewrite: Rewrite | None = None,
    references: Sequence[Tensor] = (),
) -> tuple[Any, list[Tensor]]:
    """Run a score with edits: its value (None if stopped early) and what the taps saw, in order.

    With a rewrite, operations have its derivatives; a paired one compares with the references of the inputs.
    """
    outer = _current.get()
    view = View(where, edits, stop)
    session = Session((view, *(outer.views if outer is not None and outer.batch is None else ())))
    session.silent = outer is not None and outer.silent
    session.listing = outer.listing if outer is not None else None
    session.tracer = outer.tracer if outer is not None else None
    if rewrite is not None:
        if session.tracer is not None:
            raise ValueError(
                check.problem(
                    where,
                    "one set of rules",
                    f"{rewrite.name} inside of {session.tracer.rewrite.name}",
                    "Rewrite the score once",
                )
            )
        session.rewrite_with(rewrite)
        assert session.tracer is not None
        for i, x in enumerate(inputs):
            session.tracer.mark(x, references[i] if references else None)
    result = None
    try:
        with session.running():
            result = score(*inputs)
            if rewrite is not None and isinstance(result, Tensor):
                assert session.tracer is not None
                refuse_unseen(where, result, session.tracer)
    except Stop as reached:
        if reached.view is not view:
            raise
    error = view.missing()
    if error is not None:
        raise error
    view.say_which_calls()
    return result, [t for _, t in sorted(view.met.items()) if t is not None]


def list_passed(score: Callable[..., Any], x: Tensor) -> tuple[Any, list[Passed]]:
    """Run a score on a plain tensor under ordinary autograd and note every place that it passes."""
    session = Session([View("places", (), False)])
    session.listing = []
    with session.running():
        result = score(x)
    return result, session.listing


def nearest(name: str, names: Iterable[str]) -> str:
    """Advice for a name that does not exist."""
    near = difflib.get_close_matches(name, sorted({*names} - {""}), n=3, cutoff=0.5)
    return f"Nearest: {', '.join(near)}" if near else "esegeta.places(score, x) lists them"


def visit_marker(z: Tensor, label: str) -> Tensor:
    """Tell the session of a value that carries a name."""
    session = _current.get()
    return z if session is None else session.visit(label, z, "marker")


class _Operations(TorchFunctionMode):
    """Tells a session of every torch operation in Python code, whoever spelled it how."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        # Modes live in torch's own stack; what they hold must not outlive the run.
        self._session = weakref.ref(session)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = _version_of(args)
        out = func(*args, **(kwargs or {}))
        session = self._session()
        if session is None or not session._mine() or session.silent:
            return out
        name, owner = operation(func), session.owner[-1]
        if not name or owner in session.hidden or not _holds_tensor(out):
            return out
        path = f"{owner}.{name}" if owner else name
        side = f"{path}()" if path in session.modules else path
        call = (func, args, kwargs or {})
        return session.visit(side, out, "operation", written=_is_written(args, out, before), call=call)


def _version_of(args: Any) -> int | None:
    first = args[0] if args else None
    return first._version if isinstance(first, Tensor) and not first.is_inference() else None


def _is_written(args: Any, out: Any, before: int | None) -> bool:
    """Whether what came out is the first argument itself, written to."""
    return before is not None and bool(args) and out is args[0] and bool(out._version != before)


def operation(func: Any) -> str:
    """One name for all spellings of an operation; nothing for what makes no new value.

    >>> [operation(f) for f in (torch.relu, torch.Tensor.relu_, torch.Tensor.__iadd__, torch.Tensor.size)]
    ['relu', 'relu', 'add', '']
    """
    name = getattr(func, "__name__", "").split(".")[0].strip("_")
    name = _SPELLED.get(name, name)
    return "" if name in _SILENT or name.startswith(("is_", "has_")) else name


# Layers and operations with f(c z) = c f(z) for c > 0: nothing is added, and there is no need to look.
_HOMOGENEOUS = re.compile(
    r"(ReLU|LeakyReLU|(Adaptive)?(Max|Avg)Pool\dd|(Alpha)?Dropout\dd?|Identity|Upsample|Flatten|PixelShuffle)"
    r"|relu|leaky_relu|(adaptive_)?(max|avg)_pool\dd|dropout|interpolate|getitem|cat|stack|reshape|view|flatten|permute"
)


def _is_homogeneous(function: Callable[..., Any]) -> bool:
    owner = getattr(function, "__self__", None)
    name = type(owner).__name__ if isinstance(owner, nn.Module) else operation(function)
    return _HOMOGENEOUS.fullmatch(name) is not None


def _holds_tensor(out: Any) -> bool:
    return isinstance(out, Tensor) or (
        isinstance(out, (tuple, list)) and any(isinstance(o, Tensor) for o in out)
    )


def _may_be_operation(side: str, modules: frozenset[str]) -> bool:
    if side in modules or side.endswith(":in"):
        return False
    name = side.rpartition(".")[2].removesuffix("()")
    return any(hasattr(home, name) for home in (torch, nn.functional, Tensor, torch.ops.aten)) or hasattr(
        Tensor, f"__{name}__"
    )


def _now() -> float:
    """The time by the clock of autograd's graph, whose nodes are numbered as they are made."""
    with torch.inference_mode(False), torch.enable_grad():
        tick: Any = torch.zeros((), requires_grad=True).expand(1).grad_fn
    return float(tick._sequence_nr())


def _is_builtin_leaf(m: nn.Module) -> bool:
    """Torch's own layers are one place, not the operations that they are made of."""
    parts = set(m._modules) - {"parametrizations"}
    return type(m).__module__.startswith(("torch.nn.", "torch.ao.")) and not parts


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


def _apart(twin: Tensor, t: Tensor) -> Tensor:
    return t.detach() if twin is t else twin


def _refuse_recomputed(where: str, at: Address, put: Tensor) -> None:
    # Checkpointing runs the region again in the backward pass, without what was put in; and in code under
    # no_grad nothing leads from it to the score.
    hidden = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if hidden or (put.requires_grad and not torch.is_grad_enabled()):
        raise ValueError(
            check.problem(
                where,
                "a place outside of checkpointed code and of no_grad",
                f"{str(at)!r}, from which autograd keeps no way to the score",
                "Switch checkpointing off, or take the place before or after that block",
            )
        )


def _inner(where: str, at: Address) -> ValueError:
    return ValueError(
        check.problem(
            where,
            "a place that is passed once by the score",
            f"{str(at)!r} inside of a vmap or grad that the score itself applies",
            "Take the place of the function that is mapped",
        )
    )
