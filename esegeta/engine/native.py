"""How a network runs on a plain batch: what it needs to run at its own speed, and to be left as it was."""

import contextvars
import functools
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from esegeta.engine import check, compiling, layout, levels, memory
from esegeta.engine.execution import current, record

Pick = int | str | Sequence[int | str] | Callable[[Any], Tensor] | None
Arrange = Callable[[Tensor], Tensor]
# A run of the network on leaves, which it arranges first, with what comes out.
Call = Callable[[list[Any], Arrange], tuple[Tensor, ...]]

_RANDOM_IN_TRAINING = (
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
_COUPLED_IN_TRAINING = (nn.modules.batchnorm._NormBase,)
# How far an answer may depend on batch-mates: other kernels for other batch sizes round otherwise.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


# What functorch's interpreters refuse and a thread outside of them runs: checkpointing, and custom
# autograd.Functions in the older style.
_BANNED_INSIDE = ("saved tensor hooks", "must override the setup_context")


class Native:
    """A network as a function of a batch: layout, precision, batch size, buffers, threads."""

    def __init__(self, module: Callable[..., Any], output: Pick) -> None:
        self.module, self.output, self.name = module, output, name_of(module)
        self.one_at_a_time: bool | None = None  # unknown until a batch comes
        self.writes_buffers: bool | None = None  # unknown until a run
        self.channels_last = True
        self.channelless: set[tuple[int, ...]] = set()  # shapes without a channel axis that the network takes
        # Compiled code runs only outside of functorch's interpreters, and checkpointing only without their
        # ban on saved-tensor hooks. A thread of one's own is outside.
        self.outside = any(type(m).__name__ == "OptimizedModule" for m in self.tree)
        self._lock = threading.RLock()
        self._compiled = compiling.Compiled(self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies find out anew what the network takes."""
        return Native, (self.module, self.output)

    def know(self, other: "Native") -> None:
        """Take over what another one of the same network has found out at its batches."""
        self.one_at_a_time, self.writes_buffers = other.one_at_a_time, other.writes_buffers
        self.channels_last, self.outside = other.channels_last, other.outside
        self.channelless = set(other.channelless)

    @property
    def tree(self) -> list[nn.Module]:
        """The module and all below it, as they are now."""
        return below(self.module) if isinstance(self.module, nn.Module) else []

    def plain(self, spec: Any) -> Call:
        """Return the network as it is: its leaves in the tree that it takes, the chosen tensor out."""

        def call(leaves: list[Any], arrange: Arrange) -> tuple[Tensor, ...]:
            # On copies, so that a network that works in place on its input neither writes into the caller's
            # tensor nor into a leaf of autograd's graph.
            y = pick(self.module(*tree_unflatten(each(leaves, arrange), spec)), self.output, self.name)
            return (self.checked(y, _first(leaves).shape[0]),)

        return call

    def fast(self, spec: Any) -> Call:
        """Return the network, compiled where that is asked for and possible here."""
        plain = self.plain(spec)

        def call(leaves: list[Any], arrange: Arrange) -> tuple[Tensor, ...]:
            first = _first(leaves)
            if not (current().compile and compiling.usable()) or levels.fake(first):
                return plain(leaves, arrange)
            tree = self.tree
            if self.writes_buffers is not False and any(m._buffers for m in tree):
                if self.writes_buffers is None:
                    return plain(leaves, arrange)  # which shows whether it does
                raise check.refused(
                    self.name,
                    "a network that compiled code can run",
                    "one that writes into its buffers",
                    "Leave execution(compile=True) away for it",
                )
            if any(type(m).__name__ == "OptimizedModule" for m in tree):
                return plain(leaves, arrange)
            arguments = tree_unflatten(each(leaves, arrange), spec)
            y = pick(self._compiled(self.module, tree, *arguments), self.output, self.name)
            return (self.checked(y, first.shape[0]),)

        return call

    def __call__(
        self, leaves: list[Any], call: Call, full: bool = False, alone: bool = False
    ) -> tuple[Tensor, ...]:
        """Run a batch; ``full`` says that no reduced precision will do, ``alone`` that no batch will."""
        first = _first(leaves)
        batch = first.shape[0]
        lonely = batch == 1 and not alone and layout.lonely(first)
        if self.together(first) and self.one_at_a_time is None and levels.fake(first):
            return self._in_dry_run(leaves, call, full)
        alone = alone or bool(self.one_at_a_time)
        if batch > 1 and alone:
            rows = [self._precise(_only(leaves, i), call, full) for i in range(batch)]
            return tuple(torch.cat(column) for column in zip(*rows, strict=True))
        if lonely and not alone:
            pair = each(leaves, lambda t: torch.cat([t, t]))
            return tuple(y[:1] for y in self._precise(pair, call, full))
        return self._precise(leaves, call, full)

    def together(self, first: Tensor) -> bool:
        """Return whether this batch goes through with more than one example, if the network allows it."""
        return first.shape[0] > 1 or layout.lonely(first)

    def settle(self, leaves: list[Any], call: Call) -> None:
        """Find out, once, at the first batch, whether examples may go through together in such a call."""
        first = _first(leaves)
        if self.one_at_a_time is None and not levels.fake(first) and self.together(first):
            with self._lock:
                if self.one_at_a_time is None:
                    self.one_at_a_time = self._needs_one_at_a_time(leaves, call)

    def host(self, work: Callable[[], Any]) -> Any:
        """Run what touches autograd, in a thread if the network needs to be outside of functorch."""
        if current().compile:
            with compiling.refusing(self.name):
                return _in_thread(work)
        if not self.outside:
            try:
                return work()
            except RuntimeError as error:
                if not any(ban in str(error) for ban in _BANNED_INSIDE):
                    raise
                self.outside = True
        return _in_thread(work)

    def _in_dry_run(self, leaves: list[Any], call: Call, full: bool) -> tuple[Tensor, ...]:
        # Values cannot be compared in a dry run; whether a batch is taken at all can be tried.
        try:
            return self._precise(leaves, call, full)
        except (RuntimeError, ValueError, AssertionError):
            rows = [self._precise(_only(leaves, i), call, full) for i in range(_first(leaves).shape[0])]
            return tuple(torch.cat(column) for column in zip(*rows, strict=True))

    def _precise(self, leaves: list[Any], call: Call, full: bool) -> tuple[Tensor, ...]:
        """Run in the precision asked for; a result that is not finite is computed again in full."""
        reduced = current().precision
        if reduced is None or full:
            return self._run(leaves, call)
        first = _first(leaves)
        with torch.autocast(first.device.type, dtype=reduced):
            ys = self._run(leaves, call)
        if first.is_floating_point():
            ys = tuple(y.to(first.dtype) if y.is_floating_point() else y for y in ys)
        if all(map(levels.finite, ys)):
            return ys
        record("precision", f"{self.name}: result not finite in {reduced}, computed again in {first.dtype}.")
        return self._run(leaves, call)

    def _run(self, leaves: list[Any], call: Call) -> tuple[Tensor, ...]:
        if self.channels_last and current().layout != "contiguous":
            try:
                return self.guarded(leaves, call, layout.channels_last)
            except RuntimeError as error:
                # Some networks cannot take it, above all those that .view() what comes out of a convolution.
                arranged = any(isinstance(leaf, Tensor) and leaf.ndim in (4, 5) for leaf in leaves)
                if not arranged or memory.is_out_of_memory(error):
                    raise
                ys = self.guarded(leaves, call, torch.clone)
                self.channels_last = False
                return ys
        return self.guarded(leaves, call, torch.clone)

    def checked(self, y: Tensor, batch: int) -> Tensor:
        """Refuse an output that is complex, or not a batch."""
        if y.is_complex():
            raise check.refused_type(
                self.name,
                "a real output",
                check.describe(y),
                "Choose its size or a part: output=torch.abs",
            )
        if y.ndim == 0 or y.shape[0] != batch:
            raise check.refused(
                self.name,
                f"an output whose first axis is the batch of {batch}",
                check.describe(y),
                "A network maps a batch to a batch; a plain function of one example needs no from_module",
            )
        return y

    def guarded(self, leaves: list[Any], call: Call, arrange: Arrange) -> tuple[Tensor, ...]:
        """Run once, with what the network writes into its buffers put back."""

        def run() -> tuple[Tensor, ...]:
            return call(leaves, arrange)

        if not any(m._buffers for m in self.tree):
            return run()
        if self.writes_buffers is False:
            with _restored(self._buffers()) as changed:
                y = run()
            if not changed:
                return y
        with self._lock:  # two threads must not take each other's values for the network's own
            if not self.writes_buffers:
                with _restored(self._buffers()) as changed:
                    y = run()
                self.writes_buffers = bool(changed)
                if not changed:
                    return y
            # Once more, on copies: putting values back would spoil what autograd has saved of them.
            self.writes_buffers = True
            with _on_copies(self._buffers()):
                return run()

    def _buffers(self) -> list[tuple[nn.Module, str, Tensor | None]]:
        return [(m, n, b) for m in self.tree for n, b in m._buffers.items()]

    def _needs_one_at_a_time(self, leaves: list[Any], call: Call) -> bool | None:
        """Run one example alone, behind a stranger and before one, and compare; None if that says nothing."""
        one = each(_only(leaves, 0), _varied)
        with torch.no_grad():
            try:
                alone = self._run(one, call)[0]
            except Exception as error:  # not an input that the network takes: the real one will tell
                if memory.is_out_of_memory(error):
                    raise
                one = _only(leaves, 0)
                alone = self._run(one, call)[0]
            rows = []
            for place, sign in ((1, 1.0), (0, -1.0)):
                other = each(one, functools.partial(_stranger, sign=sign))
                pair = [
                    torch.cat([b, a] if place else [a, b]) if isinstance(a, Tensor) else a
                    for a, b in zip(one, other, strict=True)
                ]
                try:
                    rows.append(self._run(pair, call)[0][place : place + 1])
                except Exception as error:
                    if memory.is_out_of_memory(error):
                        raise  # says nothing about the network; whoever chose the batch takes a smaller one
                    try:  # was it the stranger, or the pair?
                        rows.append(self._run(each(one, lambda t: torch.cat([t, t])), call)[0][:1])
                    except Exception as again:
                        if memory.is_out_of_memory(again):
                            raise
                        record(
                            "one at a time",
                            f"{self.name}: takes no batch of two ({_line(again)}); examples go one at a time.",
                        )
                        return True
            if all(_same(row, alone) for row in rows):
                return (
                    False if alone.numel() > 1 and not _same(alone.flatten()[:1], alone.flatten()) else None
                )
            if not _same(self._run(one, call)[0], alone, exactly=True):
                raise check.refused(
                    self.name,
                    "the same answer to the same input",
                    "two answers",
                    "Call module.eval(); a random network has no attribution",
                )
        record(
            "one at a time",
            f"{self.name}: examples influence each other through the batch; they go through one at a time.",
        )
        return True

    def refuse_training(self) -> None:
        """Refuse a network whose answer is random or depends on the batch because it is in training mode."""
        for m in self.tree:
            if not getattr(m, "training", False):
                continue
            random = isinstance(m, _RANDOM_IN_TRAINING) and getattr(m, "p", 1) != 0
            coupled = isinstance(m, _COUPLED_IN_TRAINING) and (
                m.track_running_stats or "BatchNorm" in type(m).__name__
            )
            if random or coupled:
                raise check.refused(
                    self.name,
                    "a network in evaluation mode",
                    f"training mode with {type(m).__name__}",
                    "Call module.eval() first; esegeta does not change it for you",
                )

    def check_dtype_and_device(self, tensors: Sequence[Tensor]) -> None:
        """Refuse inputs of another dtype or device than the network's, where it has parameters."""
        if not tensors[0].is_floating_point() or not isinstance(self.module, nn.Module):
            return
        x = levels.base(tensors[0])
        kinds = {(p.dtype, p.device) for p in self.module.parameters() if p.is_floating_point()}
        if kinds and x.dtype not in {dtype for dtype, _ in kinds}:
            dtype = next(iter(kinds))[0]
            raise check.refused_type(
                self.name,
                f"an input of the network's dtype {dtype}",
                check.describe(x),
                f"Use x.to({dtype}), or module.to({x.dtype})",
            )
        if kinds and x.device not in {device for _, device in kinds}:
            device = next(iter(kinds))[1]
            raise check.refused(
                self.name,
                f"an input on the network's device {device}",
                f"one on {x.device}",
                f"Use x.to({str(device)!r})",
            )

    def misfit(self, tensors: Sequence[Tensor], error: Exception) -> ValueError | None:
        """Return what to say of an error of the network if the input has not the axes of an example."""
        axes, convolution = self._convolutions()
        if memory.is_out_of_memory(error) or convolution is None:
            return None
        x = tensors[0]
        shape = f"({convolution.in_channels}, {', '.join(['*'] * axes)})"
        if len(tensors) > 1 or x.ndim == axes + 1:
            ours = len(tensors) > 1 or check.is_refusal(error)
            if ours or not self._is_first(convolution) or x.shape[0] == convolution.in_channels:
                return None
            advice = f"The first convolution, of {convolution.in_channels} channels, says how many there are"
        elif x.ndim == axes + 2:
            advice = "Pass one example without its batch axis; for many use esegeta.batched"
        elif x.ndim == axes:
            advice = "Add the channel axis: x[None]"
        else:
            advice = "Pass one example"
        got = f"{check.describe(x)}, on which the network fails ({_line(error)})"
        return check.refused(self.name, f"one example (C,*S), here {shape}", got, advice)

    def refuse_missing_channels(self, tensors: Sequence[Tensor], spec: Any) -> None:
        """Refuse an image without a channel axis, whose batch axis a convolution would take for the channels.

        Networks that add the axis themselves take a batch of two as well.
        """
        axes, convolution = self._convolutions()
        x = tensors[0]
        if convolution is None or len(tensors) > 1 or x.ndim != axes or levels.fake(x) or self.outside:
            return
        if tuple(x.shape) not in self.channelless:
            two = torch.zeros((2, *x.shape), dtype=x.dtype, device=x.device)
            try:
                with torch.no_grad():
                    self.guarded([two], self.plain(spec), torch.clone)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                told = self.misfit(tensors, error)
                if told is None:
                    raise
                raise told from error
            self.channelless.add(tuple(x.shape))

    def _convolutions(self) -> tuple[int, Any]:
        """How many axes the convolutions go along, and the first of them; None without, or with different ones."""
        found = [m for m in self.tree if isinstance(m, nn.modules.conv._ConvNd)]
        axes = {len(m.kernel_size) for m in found}
        return (axes.pop(), found[0]) if len(axes) == 1 else (0, None)

    def _is_first(self, convolution: nn.Module) -> bool:
        """Whether nothing with parameters comes before it in a plain sequence."""
        inner = self.module
        while isinstance(inner, nn.Sequential) and len(inner):
            inner = inner[0]
        return inner is convolution


def below(module: nn.Module) -> list[nn.Module]:
    """Return a module and all below it, each once: ``module.modules()`` at a tenth of its time."""
    found: dict[nn.Module, None] = {}
    waiting = [module]
    while waiting:
        m = waiting.pop()
        if m not in found:
            found[m] = None
            if m._modules:
                waiting.extend(c for c in [*m._modules.values()][::-1] if c is not None)
    return list(found)


def pick(result: Any, output: Pick, where: str) -> Tensor:
    """Return the tensor that ``output`` names in the result of a network.

    >>> import torch
    >>> pick({"logits": [torch.ones(1), torch.zeros(1)]}, ("logits", 1), "net").tolist()
    [0.0]
    """
    if callable(output):
        result = output(result)
    elif output is not None:
        for part in [output] if isinstance(output, (int, str)) else list(output):
            try:
                attribute = (
                    isinstance(part, str) and not isinstance(result, Mapping) and hasattr(result, part)
                )
                result = getattr(result, str(part)) if attribute else result[part]
            except (KeyError, IndexError, TypeError) as error:
                raise check.refused(
                    where, f"an output at {output!r}", _outline(result), "Choose output= among those"
                ) from error
    if isinstance(result, Tensor):
        return result
    if type(result).__module__ == "numpy":
        return torch.as_tensor(result)
    raise check.refused_type(
        where,
        "one tensor as output",
        _outline(result),
        "Choose one: from_module(module, output='name') or output=0",
    )


def name_of(module: object) -> str:
    """Return how errors call a network."""
    return getattr(module, "__name__", None) or type(module).__name__


def each(leaves: list[Any], change: Callable[[Tensor], Tensor]) -> list[Any]:
    """Change the tensors among the leaves."""
    return [change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _outline(result: Any) -> str:
    if isinstance(result, Mapping):
        return "a dict with " + ", ".join(f"{k!r}: {check.describe(v)}" for k, v in result.items())
    if isinstance(result, (tuple, list)):
        return f"a {type(result).__name__} of " + ", ".join(check.describe(v) for v in result)
    return check.describe(result)


def _first(leaves: list[Any]) -> Tensor:
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _only(leaves: list[Any], i: int) -> list[Any]:
    return each(leaves, lambda t: t[i : i + 1])


def _varied(t: Tensor) -> Tensor:
    """The example itself, unless it is constant: then nothing that depends on it could be seen."""
    constant = t.is_floating_point() and t.numel() > 1 and bool((t == t.flatten()[0]).all())
    return t + check.wave(t) if constant else t


def _stranger(t: Tensor, sign: float) -> Tensor:
    """Another example of large values, of one sign for the most part."""
    if not t.is_floating_point():
        return t.flip(list(range(1, t.ndim))) if t.ndim > 1 else t
    return sign * (t.abs().amax() + 1) * (1.5 + check.wave(t))


def _same(a: Tensor, b: Tensor, exactly: bool = False) -> bool:
    if not a.is_floating_point() or exactly:
        return bool(((a == b) | (a != a) & (b != b)).all())
    tolerance = _ROUNDING.get(b.dtype, 50 * torch.finfo(b.dtype).eps)
    known = torch.where(b.isfinite(), b.abs(), 0)
    scale = known.amax() + torch.finfo(b.dtype).tiny if b.numel() else known.sum()
    return bool(
        ((a - b).abs() <= tolerance * scale).logical_or(a == b).logical_or(a.isnan() & b.isnan()).all()
    )


def _line(error: Exception) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(first, 120, placeholder=" ...")


@contextmanager
def _restored(buffers: list[tuple[nn.Module, str, Tensor | None]]) -> Iterator[list[str]]:
    """Put back what is written into buffers, also after an error; the names of those end up in the list."""
    saved = [(m, n, b, b._version, b.clone()) for m, n, b in buffers if b is not None]
    empty = [(m, n) for m, n, b in buffers if b is None]
    changed: list[str] = []
    try:
        yield changed
    finally:
        with torch.no_grad():
            for owner, name, buffer, version, value in saved:
                if owner._buffers[name] is not buffer and not isinstance(owner, torch.jit.ScriptModule):
                    owner._buffers[name] = buffer
                    changed.append(name)
                if buffer._version != version:
                    buffer.copy_(value)
                    changed.append(name)
            for owner, name in empty:
                if owner._buffers[name] is not None:
                    owner._buffers[name] = None
                    changed.append(name)


@contextmanager
def _on_copies(buffers: list[tuple[nn.Module, str, Tensor | None]]) -> Iterator[None]:
    """Let the network write into copies of its buffers; TorchScript, which has no place for them, into its own."""
    own = [entry for entry in buffers if isinstance(entry[0], torch.jit.ScriptModule)]
    others = [entry for entry in buffers if not isinstance(entry[0], torch.jit.ScriptModule)]
    with _restored(own):
        try:
            for owner, name, buffer in others:
                owner._buffers[name] = None if buffer is None else buffer.clone()
            yield
        finally:
            for owner, name, buffer in others:
                owner._buffers[name] = buffer


def outside(work: Callable[[], Any]) -> Any:
    """Do something about the code itself, on tensors of one's own, outside of the enclosing transforms."""
    return _in_thread(work) if levels.depth() else work()


def _in_thread(work: Callable[[], Any]) -> Any:
    """Work in a thread of one's own, with what torch keeps per thread: modes, autocast, CUDA stream."""
    grad = torch.is_grad_enabled()
    casts = [
        (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    ]
    stream = (
        torch.cuda.current_stream() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    )
    live = memory.Live.running()

    def run() -> Any:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            for mode in live:
                stack.enter_context(mode)
            return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, run).result()
