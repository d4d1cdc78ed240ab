"""Giving operations other derivatives while a score runs.

A *rewrite* is asked at every operation that computes on data, in whatever spelling: function, method, module,
in place, reused. It returns the operation's true value, connected to what it was made of by a derivative of its
choice. What is data is followed from the input on: a product with a weight is another thing than a product of
two activations.

A rewrite that compares with a reference is *paired*: every tensor of data then has a twin, what the same code
computes for the reference. Both run side by side, operation by operation, along the path that the input takes.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from esegeta.engine import check, levels

# Reading a shape or a type, comparing, making new tensors: nothing of it is computed from values of data.
_LOOKS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "data_ptr", "get_device", "tolist", "item"}
    | {"register_hook", "retain_grad", "requires_grad", "is_contiguous", "storage_offset", "element_size"}
    | {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
    | {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "backward", "repr", "len", "format"}
)
# Values of data as Python's own.
_NUMBERS = frozenset({"item", "tolist", "numpy", "__float__", "__int__", "__index__", "__array__"})
# Values of data as another framework's.
_LEAVES = frozenset({"numpy", "__array__", "__dlpack__"})
# What Python asks to choose its way.
_ASKED = frozenset({"__bool__", "is_nonzero"})
# Only the first argument has values in these, the second one a shape or a type.
_LIKE = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
# A condition is still the same one after these.
_CASTS = frozenset(
    {"to", "type", "type_as", "float", "double", "half", "bfloat16", "clone", "contiguous", "detach"}
)
# Attributes that are tensors made of the values.
_VIEWS_BY_NAME = frozenset({"T", "mT", "H", "mH", "real"})
_LATER = object()
_IN_PLACE = {f"__i{n}__": n for n in ("add", "sub", "mul", "pow", "matmul", "truediv", "div")}
_COMMUTE = {"__radd__": "add", "__rmul__": "mul"}


@runtime_checkable
class Rewrite(Protocol):
    """What gives operations other derivatives."""

    paired: bool
    name: str

    def rule(self, op: "Operation") -> Any:
        """Return the value of an operation, connected to its inputs as the rewrite wants, or raise ``op.unknown``."""
        ...


@dataclass
class Operation:
    """One call of an operation on data.

    name: one name for all its spellings; inputs: the tensors of data among its arguments, in order; twins: what
    the reference has instead (in a paired rewrite); where: which module it is in; gate: for a product or
    a choice by a condition, what the condition was made of, if that is known; conditions: whether any argument
    is a truth value or an index that was computed from data. A rule may put right what is there for the twins,
    where that takes more than other data.
    """

    name: str
    function: Callable[..., Any]
    inputs: list[Tensor]
    twins: list[Tensor]
    where: str
    gate: "Gate | None"
    conditions: bool
    _leaves: list[Any]
    _spec: Any
    _data: list[int]
    tracer: "Tracer | None" = None
    _there: Any = None

    @property
    def there(self) -> Any:
        """The value for the twins, computed when it is first asked for."""
        if self._there is _LATER:
            # Only a derivative of the explanation leads through what the reference has.
            watched = any(map(levels.watched, self.twins))
            with torch.set_grad_enabled(watched and torch.is_grad_enabled()):
                self._there = self.call(*self.twins)
        return self._there

    @there.setter
    def there(self, value: Any) -> None:
        self._there = value

    @property
    def others(self) -> list[Tensor]:
        """The tensors among its arguments that are no data, such as weights."""
        return [t for i, t in enumerate(self._leaves) if isinstance(t, Tensor) and i not in self._data]

    def call(self, *inputs: Tensor, others: Sequence[Tensor] | None = None) -> Any:
        """Return the operation with other tensors instead of its data, and perhaps of the rest."""
        leaves = list(self._leaves)
        for i, t in zip(self._data, inputs, strict=True):
            leaves[i] = t
        if others is not None:
            rest = iter(others)
            for i, t in enumerate(self._leaves):
                if isinstance(t, Tensor) and i not in self._data:
                    leaves[i] = next(rest)
        args, kwargs = _unflat(leaves, self._spec)
        return self.function(*args, **kwargs)

    def through(self, made: Callable[..., Any]) -> Any:
        """Return what another spelling gives, made of operations that have rules of their own.

        ``made`` takes the arguments of this operation.
        """
        assert self.tracer is not None
        args, kwargs = _unflat(self._leaves, self._spec)
        with self.tracer:
            return made(*args, **kwargs)

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments, as they came."""
        return tuple(_unflat(self._leaves, self._spec)[0])

    @property
    def kwargs(self) -> dict[str, Any]:
        """Named arguments, as they came."""
        return dict(_unflat(self._leaves, self._spec)[1])

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by position or name."""
        spec = self._spec
        if isinstance(spec, _Row):
            if position < spec.count:
                return self._leaves[position]
            return self._leaves[spec.count + spec.names.index(name)] if name in spec.names else default
        args, kwargs = _unflat(self._leaves, spec)
        return args[position] if len(args) > position else kwargs.get(name, default)

    def is_data(self, value: Any) -> bool:
        """Return whether an argument is one of the data."""
        return any(value is t for t in self.inputs)

    def twin(self, value: Any) -> Any:
        """Return what the reference has instead of an argument: itself, unless it is data."""
        for t, twin in zip(self.inputs, self.twins, strict=False):
            if value is t:
                return twin
        return value

    def unknown(self, rewrite: str) -> NotImplementedError:
        """Return the error for an operation that a rewrite has no rule for."""
        kinds = ", ".join(check.describe(t) for t in self.inputs)
        return NotImplementedError(
            check.problem(
                rewrite,
                "operations that it has rules for",
                f"{self.name!r} on {kinds}" + (f" in {self.where!r}" if self.where else ""),
                f"Add one with esegeta.rules.rule({rewrite!r}, {self.name!r}), or write the network without it",
            )
        )


_notes: ContextVar[Counter[tuple[str, str]] | None] = ContextVar("esegeta_notes", default=None)


@contextmanager
def noting() -> Iterator[Counter[tuple[str, str]]]:
    """Count what rewrites say that they do, in this block and thread."""
    counts: Counter[tuple[str, str]] = Counter()
    token = _notes.set(counts)
    try:
        yield counts
    finally:
        _notes.reset(token)


def note(op: Operation, what: str) -> None:
    """Say what becomes of an operation, to whoever counts."""
    counts = _notes.get()
    if counts is not None:
        counts[op.name, what] += 1


class Tracer(TorchFunctionMode):
    """Follows data through running code and asks a rewrite at every operation on it."""

    def __init__(
        self, rewrite: Rewrite, active: Callable[["Tracer"], bool], where: Callable[[], str]
    ) -> None:
        super().__init__()
        self.rewrite, self.active, self.where = rewrite, active, where
        # The only operations that a rewrite asks for, whatever they compute on; None for all that compute on data.
        self.only: frozenset[str] | None = getattr(rewrite, "only", None)
        self.passed: Counter[Any] = Counter()  # how often a rewrite has met an operation in this run
        self._twins: Any = WeakIdKeyDictionary()
        self._gates: Any = WeakIdKeyDictionary()
        self._shared: Any = WeakIdKeyDictionary()  # twins that share memory with others
        # What a rewrite remembers of a tensor: constants, which follow data into networks and out of them.
        self.notes: Any = WeakIdKeyDictionary()
        self._copies: Any = WeakIdKeyDictionary()  # copies of what is written to: of which tensor
        self._memory: Any = WeakIdKeyDictionary()

    # -- what is data ------------------------------------------------------------------------------------------

    def mark(self, t: Tensor, twin: Tensor | None) -> None:
        """Mark a tensor as data from here on, with its twin; without one it is its own."""
        self._twins[t] = twin

    def is_data(self, value: Any) -> bool:
        """Return whether a value is data: computed from it, or a view of what data was written into."""
        if not isinstance(value, Tensor):
            return False
        if value in self._twins:
            return True
        whole = value._base
        if whole is None or whole not in self._twins or value in self._gates or not value.is_floating_point():
            return False
        if self.rewrite.paired:
            self._adopt_view(value, whole)
        else:
            self.mark(value, None)
        self._note(value, whole)
        return True

    def twin(self, t: Tensor) -> Tensor:
        """Return what the reference has instead of it."""
        found = self._twins.get(t)
        return t if found is None else found

    def remember(self, t: Tensor, what: Any) -> None:
        """Keep something by a tensor, until the run is over or the tensor is written to."""
        if what is not None:
            self._memory[t] = _version(t), what

    def recall(self, t: Tensor) -> Any:
        """Return what is remembered of a tensor."""
        t = self._copies.get(t, t)
        version, what = self._memory.get(t, (None, None))
        return what if version == _version(t) else None

    def forget(self) -> None:
        """Forget what was remembered: the run is over, and whoever keeps its graph must not find it again."""
        self._memory.clear()

    # -- what runs ---------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active(self):
            return func(*args, **kwargs)
        if self.only is not None:
            return self._asked_for(func, args, kwargs)
        func, args, kwargs = _in_order(func, args, kwargs)
        leaves, spec = _flat(args, kwargs)
        likeness = getattr(func, "__name__", "") in _LIKE
        data = [i for i, leaf in enumerate(leaves[:1] if likeness else leaves) if self.is_data(leaf)]
        gates = [self._gates[leaf] for leaf in leaves if isinstance(leaf, Tensor) and leaf in self._gates]
        if not data and not gates:
            return func(*args, **kwargs)
        name, plain, written = _spelled(func, args, kwargs)
        raw = getattr(func, "__name__", "")
        if data and raw in _LEAVES:
            raise self._leaves_torch(raw)
        if self.rewrite.paired and raw in _NUMBERS | _ASKED:
            return self._known_to_python(raw, func, leaves, spec, data)
        if not name or name in _LOOKS or name.startswith(("is_", "has_")):
            return func(*args, **kwargs)
        if name == "setitem":
            return self._set_item(func, args)
        if kwargs.get("out") is not None:
            raise NotImplementedError(
                check.problem(
                    self.rewrite.name,
                    "operations that return their result",
                    f"{name!r} with out=",
                    "Drop out=",
                )
            )
        as_called = leaves, spec
        leaves, spec = _without_inplace(leaves, spec, args, kwargs, written)
        if written:  # the rule computes a new tensor, which is then written into the old one
            leaves = list(leaves)
            i = next(i for i, leaf in enumerate(leaves) if leaf is args[0])
            leaves[i] = kept = args[0].clone()
            self._copies[kept] = args[0]
            self._note(kept, args[0])
            if self.is_data(args[0]):
                self.mark(kept, self._twin_copy(args[0]))
            data = [i for i, leaf in enumerate(leaves) if self.is_data(leaf)]
        if not data:
            return self._gated(func, *as_called, gates)
        inputs = [leaves[i] for i in data]
        twins = [self.twin(t) for t in inputs] if self.rewrite.paired else []
        gate = gates[0] if gates else None
        op = Operation(
            name=name,
            function=plain,
            inputs=inputs,
            twins=twins,
            where=self.where(),
            gate=gate,
            conditions=bool(gates),
            _leaves=leaves,
            _spec=spec,
            _data=data,
            tracer=self,
        )
        out, there = self._ruled(op)
        self._know(op, out, there)
        if written:
            out = self._write(args[0], out, there)
        return out

    def _asked_for(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give a rewrite the operations that it asks for by name; all others run as they are, and follow no data."""
        name = getattr(func, "__name__", "")
        if self.only is None or name not in self.only:
            return func(*args, **kwargs)
        leaves, spec = _flat(args, kwargs)
        at = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        op = Operation(name, func, [leaves[at]], [], self.where(), None, False, leaves, spec, [at], self)
        return self.rewrite.rule(op)

    def _ruled(self, op: Operation) -> tuple[Any, Any]:
        if op.name in _COMPARE or _is_detached(op):
            out = op.call(*op.inputs)
            with torch.no_grad():
                return out, op.call(*op.twins) if self.rewrite.paired else None
        if self.rewrite.paired:
            op.there = _LATER
        out = self.rewrite.rule(op)
        return out, op.there

    def _know(self, op: Operation, out: Any, there: Any) -> None:
        """Remember what came out as data, as a condition, or as severed from it."""
        found = _leaves_of(out)
        twins = _leaves_of(there) if there is not None else [None] * len(found)
        for t, twin in zip(found, twins, strict=True):
            if not isinstance(t, Tensor):
                continue
            if not t.is_floating_point():
                self._gates[t] = Gate(op.inputs[0], _against_zero(op), twin)
            elif _is_detached(op):
                self._gates[t] = Gate(None, False, twin)
            else:
                self.mark(t, twin)
                for other in op.twins if isinstance(twin, Tensor) else ():
                    if torch._C._is_alias_of(levels.base(twin), levels.base(other)):  # type: ignore[attr-defined]
                        self._shared[twin] = self._shared[other] = True

    def _gated(self, func: Any, leaves: list[Any], spec: Any, gates: list["Gate"]) -> Any:
        """What is made of conditions alone is a condition."""
        out, there = _call(func, leaves, spec), None
        if self.rewrite.paired:
            there = _call(func, [self._reference(leaf) for leaf in leaves], spec)
            self._go_the_same_way(getattr(func, "__name__", ""), out, there)
        known = tree_flatten(there)[0] if there is not None else None
        same = gates[0].above_zero and getattr(func, "__name__", "") in _CASTS
        for i, t in enumerate(tree_flatten(out)[0]):
            if isinstance(t, Tensor):
                self._gates[t] = Gate(gates[0].of, same, known[i] if known else None)
        return out

    def _reference(self, leaf: Any) -> Any:
        """What the reference has instead of an argument, which may be a condition."""
        if not isinstance(leaf, Tensor):
            return leaf
        gate = self._gates.get(leaf)
        return self.twin(leaf) if gate is None or gate.there is None else gate.there

    def _known_to_python(self, raw: str, func: Any, leaves: list[Any], spec: Any, data: list[int]) -> Any:
        """Data as a number has no reference; a choice has to be that of the reference too."""
        if data and raw in _NUMBERS:
            raise NotImplementedError(
                check.problem(
                    self.rewrite.name,
                    "values that stay tensors",
                    f"{raw.strip('_')}() of {check.describe(leaves[data[0]])}, a number that has no reference",
                    "Compute with the tensor itself",
                )
            )
        out = _call(func, leaves, spec)
        self._go_the_same_way(raw, out, _call(func, [self._reference(leaf) for leaf in leaves], spec))
        return out

    def _go_the_same_way(self, raw: str, out: Any, there: Any) -> None:
        """Refuse Python that takes another way for the reference: it would be compared with what it is not."""
        if not _same(out, there):
            if raw in _LEAVES:
                raise self._leaves_torch(raw)
            what = "an if or while" if raw in _ASKED else f"{raw.strip('_')}()"
            raise NotImplementedError(
                check.problem(
                    self.rewrite.name,
                    "code that goes the same way for the input and for its reference",
                    f"{what} on a condition of data that differs for the two"
                    + (f" in {where!r}" if (where := self.where()) else ""),
                    "Write the choice with operations, such as relu or maximum, or take a reference nearer to x",
                )
            )

    def _leaves_torch(self, raw: str) -> NotImplementedError:
        """The error for values that go on in another framework."""
        where = f" in {place!r}" if (place := self.where()) else ""
        return NotImplementedError(
            check.problem(
                self.rewrite.name,
                "a network whose operations can be seen",
                f"values that leave torch by {raw.strip('_')}(){where}",
                "NumPy, ONNX, JAX and other frameworks show no operations: take the same network in torch, or a "
                "method that needs only gradients or values, such as integrated_gradients or occlusion",
            )
        )

    def _twin_copy(self, t: Tensor) -> Tensor | None:
        return self.twin(t).clone() if self.rewrite.paired else None

    def _write(self, target: Tensor, out: Tensor, there: Any) -> Tensor:
        if self.rewrite.paired:
            with torch.no_grad():
                self._adopt(target)
                twin = self.twin(target)
                if twin in self._shared or there.shape != twin.shape or there.dtype != twin.dtype:
                    twin.copy_(there)
                else:  # rules may have kept the old one
                    self.mark(target, there)
        else:
            self._fill(target)
        self._memory.pop(target, None)
        target.copy_(out)
        self._note(target, out)
        self.remember(target, self.recall(out))
        return target

    def _note(self, target: Tensor, value: Any) -> None:
        """What is noted of a value goes with it, also into what its target is a view of."""
        if isinstance(value, Tensor) and value in self.notes:
            for t in (target, target._base):
                if t is not None:
                    self.notes[t] = self.notes[value]

    def _fill(self, target: Tensor) -> None:
        """Data is written into it: then the tensor that it is a view of holds data too."""
        self.mark(target, None)
        if target._base is not None:
            self.mark(target._base, None)

    def _adopt(self, target: Tensor) -> None:
        """Before data is written into it for the first time: the reference has a copy, or a view of one."""
        if self.is_data(target):
            return
        whole = target._base
        if whole is None:
            self.mark(target, target.detach().clone())
            return
        self.mark(whole, whole.detach().clone(memory_format=torch.preserve_format))
        self._adopt_view(target, whole)

    def _adopt_view(self, view: Tensor, whole: Tensor) -> None:
        """The reference has the same view of the twin."""
        twin = self.twin(whole)
        same = twin.stride() == whole.stride()
        if not same or twin.storage_offset() != whole.storage_offset():
            raise NotImplementedError(
                check.problem(
                    self.rewrite.name,
                    "to write into tensors that are dense",
                    f"a view of {check.describe(whole)}",
                    "Clone it first",
                )
            )
        self.mark(view, twin.as_strided(view.shape, view.stride(), view.storage_offset()))
        self._shared[twin] = self._shared[self.twin(view)] = True

    def _set_item(self, func: Any, args: Any) -> Any:
        target, where, value = args
        if self.rewrite.paired:
            with torch.no_grad():
                self._adopt(target)
                func(self.twin(target), where, self.twin(value) if isinstance(value, Tensor) else value)
        elif self.is_data(value):
            self._fill(target)
        func(target, where, value)
        self._note(target, value)


def _version(t: Tensor) -> int:
    t = levels.base(t)
    return 0 if t.is_inference() else t._version


@dataclass
class Gate:
    """What a condition was made of, whether it asks if that is above zero, and what it is for the reference."""

    of: Tensor | None
    above_zero: bool
    there: Any = None


_COMPARE = frozenset(
    {"gt", "ge", "lt", "le", "eq", "ne", "argmax", "argmin", "isnan", "isinf", "isfinite", "sign", "argsort"}
    | {
        "logical_and",
        "logical_or",
        "logical_not",
        "bool",
        "long",
        "int",
        "round",
        "floor",
        "ceil",
        "heaviside",
    }
)


def _is_detached(op: Operation) -> bool:
    return op.name in ("detach", "data", "round", "floor", "ceil", "sign", "heaviside")


def _against_zero(op: Operation) -> bool:
    other = op.argument(1, "other")
    return op.name in ("gt", "ge") and isinstance(other, (int, float)) and other == 0


def _spelled(func: Any, args: Any, kwargs: Any) -> tuple[str, Any, bool]:
    """One name for all spellings of an operation, the function that computes it anew, whether it writes in place."""
    raw = getattr(func, "__name__", "")
    if raw == "__get__":
        owner = getattr(func, "__self__", None)
        name = getattr(owner, "__name__", "")
        return (name if name in (*_VIEWS_BY_NAME, "data") else ""), func, False
    raw = raw.split(".")[0]
    name = _COMMUTE.get(raw, raw.strip("_")).removeprefix("special_")
    in_place = raw in _IN_PLACE
    if in_place:
        name = _IN_PLACE[raw]
        func = getattr(Tensor, f"__{name}__")
    elif raw.endswith("_") and not raw.endswith("__"):
        in_place = True
        homes = (Tensor, torch, torch.nn.functional)
        found = (getattr(home, raw[:-1]) for home in homes if hasattr(home, raw[:-1]))
        func = _copied if name == "copy" else next(found, func)
    in_place = in_place or bool(kwargs.get("inplace")) or _inplace_position(name, args)
    same = {
        "truediv": "div",
        "minus": "sub",
        "true_divide": "div",
        "divide": "div",
        "multiply": "mul",
        "subtract": "sub",
    }
    return same.get(name, name), func, in_place


_SAME = {"truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul"}
_SAME |= {"minus": "sub", "subtract": "sub"}


def _minus(a: Any, b: Any, alpha: Any = 1) -> Any:
    return a - b if alpha == 1 else a - alpha * b


def _copied(target: Tensor, source: Tensor, *_: Any, **__: Any) -> Tensor:
    return source.to(target).expand_as(target)


# Spellings whose first argument is the right operand, such as Python's of ``1 - x``, and the usual ones.
_SWAPPED: dict[str, Callable[..., Any]] = {
    "__rsub__": operator.sub,
    "rsub": _minus,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rpow__": operator.pow,
    "__rmatmul__": operator.matmul,
}


def _in_order(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The call with the left operand first, so that no rule has to ask which one that is."""
    plain = _SWAPPED.get(getattr(func, "__name__", "").split(".")[0])
    if plain is None:
        return func, args, kwargs
    named = dict(kwargs)
    right = args[0] if args else named.pop("input")
    left = args[1] if len(args) > 1 else named.pop("other")
    return plain, (left, right, *args[2:]), named


def _same(a: Any, b: Any) -> bool:
    """Whether Python code sees no difference, as long as it does not look at the values of tensors."""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a.shape == b.shape if isinstance(a, Tensor) else bool(torch.as_tensor(a == b).all())


@dataclass(frozen=True)
class _Row:
    """The tree of a call without tensors inside of its arguments: so many by position, the rest by these names."""

    count: int
    names: tuple[str, ...]


def _flat(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of a call and its tree. Most calls are a row of tensors and numbers, whose tree is soon told."""
    leaves = [*args, *kwargs.values()]
    if any(isinstance(leaf, (tuple, list, dict)) and not _plain(leaf) for leaf in leaves):
        return tree_flatten((tuple(args), kwargs))
    return leaves, _Row(len(args), tuple(kwargs))


def _plain(value: Any) -> bool:
    """Whether a sequence holds numbers and the like alone, such as the sizes of a kernel."""
    return type(value) in (tuple, list, torch.Size) and all(
        type(v) in (int, float, bool, str, type(None)) for v in value
    )


def _unflat(leaves: list[Any], spec: Any) -> tuple[Any, Any]:
    """Put a call together again."""
    if not isinstance(spec, _Row):
        args, kwargs = tree_unflatten(leaves, spec)
        return args, kwargs
    n = spec.count
    return tuple(leaves[:n]), dict(zip(spec.names, leaves[n:], strict=True))


def _leaves_of(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) else tree_flatten(value)[0]


def _call(func: Any, leaves: list[Any], spec: Any) -> Any:
    args, kwargs = _unflat(leaves, spec)
    return func(*args, **kwargs)


# Functions of torch.nn.functional whose "inplace" may come by position, and where.
_INPLACE_AT = {"relu": 1, "relu6": 1, "selu": 1, "silu": 1, "mish": 1, "hardswish": 1, "hardsigmoid": 1}
_INPLACE_AT |= {"elu": 2, "celu": 2, "leaky_relu": 2, "threshold": 3, "hardtanh": 3, "dropout": 3}


def _inplace_position(name: str, args: Any) -> bool:
    at = _INPLACE_AT.get(name)
    return at is not None and len(args) > at and args[at] is True


def _without_inplace(
    leaves: list[Any], spec: Any, args: Any, kwargs: Any, written: bool
) -> tuple[list[Any], Any]:
    if not written or ("inplace" not in kwargs and not any(a is True for a in args)):
        return leaves, spec
    args = tuple(False if a is True else a for a in args)
    return _flat(args, {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs)


class _Once(torch.autograd.Function):
    """The end of what can be differentiated.

    A second derivative would lead through the same operations again, whose derivatives are the rewrite's and not
    those of the values: it would be silently wrong.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(r: Tensor) -> Tensor:
        return r.view_as(r)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(_: Any, *gs: Tensor) -> Any:  # noqa: ARG004
        raise _once()

    @staticmethod
    def jvp(_: Any, *ts: Tensor) -> Any:  # noqa: ARG004
        raise _once()


def _once() -> NotImplementedError:
    return NotImplementedError(
        check.problem(
            "rules",
            "a rewritten score to be differentiated once",
            "a derivative of its derivative",
            "Explanations by rules have no derivative of their own; take a method that is made of gradients",
        )
    )


def once(t: Tensor) -> Tensor:
    """Return the tensor, of which no derivative is to be had: asking for one is an error."""
    return _applied(_Once, t)


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """What a rule is made of, unless the network has written into it."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise NotImplementedError(
            check.problem(
                "rules",
                "a network that leaves what its rules are made of as it is",
                "one that writes in place into the input of an operation",
                "Switch inplace off at that layer, or write x = x + y for x += y",
            )
        ) from error


class _Reroute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weigh: Any, count: int, value: Tensor, *tensors: Tensor) -> Tensor:  # noqa: ARG004
        # A copy: the network may write into it, which autograd forbids for views made here and for what it keeps.
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG004
        ctx.weigh, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        value, *tensors = _saved(ctx)
        grads = ctx.weigh(g, value, *tensors)
        grads = grads if isinstance(grads, tuple) else (grads,)
        rest = (None,) * (len(tensors) - ctx.count)
        return (None, None, None, *[None if r is None else _applied(_Once, r) for r in grads], *rest)

    @staticmethod
    def jvp(ctx: Any, _weigh: None, _count: None, value: Tensor | None, *_: Any) -> Any:
        # Forward mode runs along what was computed: only the pullback is another one.
        return torch.zeros_like(ctx.saved_tensors[0]) if value is None else value.view_as(value)


def reroute(
    value: Tensor,
    through: Sequence[Tensor],
    weigh: Callable[..., Tensor | tuple[Tensor | None, ...]],
    *known: Tensor,
) -> Tensor:
    """Return a value that is as it is, and whose gradient goes where it is told to.

    ``weigh(g, value, *through, *known)`` gives the gradient for each of ``through``. It is made of torch
    operations on what it is given; every tensor that it needs comes as ``known``. It is not differentiated in
    turn: that is refused.

    >>> import torch
    >>> x = torch.tensor([-1., 2.], requires_grad=True)
    >>> y = reroute(torch.relu(x), [x], lambda g, y, x: g.clamp(min=0) * (x > 0))
    >>> torch.autograd.grad(y, x, torch.tensor([1., -1.]))[0].tolist()
    [0.0, 0.0]
    """
    return _applied(_Reroute, weigh, len(through), value, *through, *known)


def _applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Apply a function of autograd. Outside of ``torch.func`` torch looks at its signature, which takes longer."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


class _Replace(torch.autograd.Function):
    """A function with another pullback, which asks for its inputs alone."""

    @staticmethod
    def forward(compute: Any, weigh: Any, count: int, *tensors: Tensor) -> Tensor:  # noqa: ARG004
        return compute(*tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG004
        _, ctx.weigh, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        tensors = _saved(ctx)
        grads = ctx.weigh(g, *tensors)
        grads = grads if isinstance(grads, tuple) else (grads,)
        rest = (None,) * (len(tensors) - ctx.count)
        return (None, None, None, *[None if r is None else _applied(_Once, r) for r in grads], *rest)


def replace(
    compute: Callable[..., Tensor],
    through: Sequence[Tensor],
    weigh: Callable[..., Tensor | tuple[Tensor | None, ...]],
    *known: Tensor,
) -> Tensor:
    """Return ``compute(*through)``, a new tensor, whose gradient goes where it is told to: ``reroute`` in one step.

    ``weigh(g, *through, *known)`` gives the gradient for each of ``through``; the value itself is not kept for it.

    >>> import torch
    >>> x = torch.tensor([-1., 2.], requires_grad=True)
    >>> y = replace(torch.relu, [x], lambda g, x: g.clamp(min=0) * (x > 0))
    >>> torch.autograd.grad(y, x, torch.tensor([1., -1.]))[0].tolist()
    [0.0, 0.0]
    """
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return reroute(compute(*through), through, lambda g, _, *ts: weigh(g, *ts), *known)
    return _applied(_Replace, compute, weigh, len(through), *through, *known)


# Elements of a block that is still in the processor's cache when the next pass over it comes.
_BLOCK = 1 << 16


def blockwise(fn: Callable[..., Tensor], *ts: Tensor) -> Tensor:
    """Compute ``fn(*ts)``, which works element by element in several passes, block by block.

    >>> import torch
    >>> blockwise(lambda a, b: (a - b).abs() + 1, torch.ones(2, 3), torch.zeros(2, 3)).sum().item()
    12.0
    """
    first = ts[0]
    watched = torch.is_grad_enabled() and any(t.requires_grad for t in ts)
    if watched or first.numel() <= _BLOCK or first.device.type != "cpu" or any(map(levels.wrapped, ts)):
        return fn(*ts)
    out = torch.empty_like(first)
    dense = first.numel() == 1 + sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True))
    if not dense or any(t.stride() != out.stride() or t.shape != out.shape for t in ts):
        return fn(*ts)
    blocks = [t.as_strided((t.numel(),), (1,)).split(_BLOCK) for t in (out, *ts)]
    for target, *parts in zip(*blocks, strict=True):
        target.copy_(fn(*parts))
    return out


_OURS = ("_Reroute", "_Replace", "_Once", "FoldedCall")


def refuse_unseen(where: str, y: Tensor, tracer: Tracer) -> None:
    """Raise if data went through something that shows no operations: a gradient through it would be a plain one."""
    if not y.requires_grad or tracer.only is not None:
        return
    if not tracer.is_data(y):
        raise NotImplementedError(
            check.problem(
                where,
                "a network whose operations can be seen",
                "an output to which no operation leads",
                "TorchScript, NumPy, ONNX, JAX and other frameworks show none: take the same network as a torch "
                "module, or a method that needs only gradients or values, such as integrated_gradients or occlusion",
            )
        )
    seen, stack = set(), [y.grad_fn] if y.grad_fn is not None and not levels.wrapped(y) else []
    while stack:
        node = stack.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not node.name().startswith(_OURS):
            raise NotImplementedError(
                check.problem(
                    where,
                    "operations of torch",
                    f"a custom autograd.Function ({node.name().removesuffix('Backward')})",
                    "Write it with torch operations, which can be seen",
                )
            )
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
