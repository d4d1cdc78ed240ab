"""From networks to models: functions of one example that every ``torch.func`` transform can enter."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from esegeta._types import Model
from esegeta.engine import check, layout, levels
from esegeta.engine.execution import current, record
from esegeta.engine.folded import fold

Pick = int | str | Sequence[int | str] | Callable[[Any], Tensor] | None

_RANDOM_IN_TRAINING = (
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
_COUPLED_IN_TRAINING = (nn.modules.batchnorm._NormBase,)


def from_module(module: Callable[..., Any], output: Pick = None) -> "ModuleModel":
    r"""Make a model of a network, or of anything else that maps a batch to a batch.

    .. math:: f : R^{C \times S} \to R^{K \times S'}

    The network runs on plain batches at its own speed, whatever nest of ``vmap``, ``grad``, ``jvp`` surrounds
    the model: mapped axes are folded into the batch axis. It is never changed: no ``eval()``, no hooks,
    no ``requires_grad_``, and buffers that a forward pass writes are put back.

    Modules, TorchScript, ``torch.export`` programs, compiled modules and plain callables enter by the same
    door. What autograd cannot see through still serves methods that need only values. At the first batch of
    more than one example it is checked that examples do not influence each other; if they do, or if the
    network takes no batch, they go through one at a time.

    Args:
        module: maps tensors with a batch axis to tensors with that batch axis. Switch it to ``eval()`` first.
        output: which tensor of the result to take: a key, an index, a path of those such as
            ``("logits", 0)``, or a function. Not needed where the result is a tensor.

    Returns:
        A model ``(C,*S) -> (K,*S)``. Further inputs of the network are further arguments, each without batch
        axis; trees of tensors are welcome.

    Example:
        >>> import torch
        >>> model = from_module(torch.nn.AvgPool1d(2))
        >>> model(torch.tensor([[1., 3., 5., 7.]])).tolist()
        [[2.0, 6.0]]
        >>> torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(torch.zeros(3, 1, 2)).tolist()
        [[[0.5, 0.5]], [[0.5, 0.5]], [[0.5, 0.5]]]
    """
    if isinstance(module, torch.export.ExportedProgram):
        module = module.module()
    if not callable(module):
        raise TypeError(
            check.problem(
                "from_module",
                "a module or another callable",
                check.describe(module),
                "Pass the network itself",
            )
        )
    return ModuleModel(module, output)


class ModuleModel:
    """A network as a function of one example. Made by ``from_module``."""

    def __init__(self, module: Callable[..., Any], output: Pick = None) -> None:
        self.module = module
        self.output = output
        self._batched = _Batched(module, output)
        self._folded: dict[Any, Callable[..., tuple[Tensor, ...]]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        chosen = "" if self.output is None else f", output={self.output!r}"
        return f"from_module({_name(self.module)}{chosen})"

    def __call__(self, *inputs: Any) -> Tensor:
        """Run one example through the network: each tensor comes without a batch axis."""
        leaves, spec = tree_flatten(inputs)
        is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        if not any(is_tensor):
            raise TypeError(
                check.problem(
                    _name(self.module),
                    "at least one tensor",
                    ", ".join(check.describe(leaf) for leaf in leaves) or "nothing",
                    "Pass one example without batch axis",
                )
            )
        self._batched.refuse_training()
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._batched.refuse_strangers(tensors)
        statics = tuple(None if t else leaf for t, leaf in zip(is_tensor, leaves, strict=True))
        (y,) = self._fold(spec, is_tensor, statics)(*tensors)
        return y

    def _fold(self, spec: Any, is_tensor: tuple[bool, ...], statics: tuple[Any, ...]) -> Any:
        key = (str(spec), is_tensor, tuple(map(repr, statics)))
        with self._lock:
            if key not in self._folded:

                def run(*tensors: Tensor) -> tuple[Tensor, ...]:
                    found = iter(tensors)
                    leaves = [next(found) if t else s for t, s in zip(is_tensor, statics, strict=True)]
                    return (self._batched(leaves, spec),)

                self._folded[key] = fold(run, _name(self.module))
            return self._folded[key]


class _Batched:
    """How a network runs on a plain batch: layout, precision, one at a time if need be, buffers put back."""

    def __init__(self, module: Callable[..., Any], output: Pick) -> None:
        self.module, self.output = module, output
        self.tree = list(module.modules()) if isinstance(module, nn.Module) else []
        # Compiled code runs only outside of functorch's interpreters, and so does checkpointing. A thread of
        # one's own is outside of them.
        self.outside = any(type(m).__name__ == "OptimizedModule" for m in self.tree)
        self.one_at_a_time: bool | None = None  # unknown until a batch comes

    def __call__(self, leaves: list[Any], spec: Any) -> Tensor:
        batch = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
        dry = any(levels.fake(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        if batch > 1 and self.one_at_a_time is None and not dry:
            self.one_at_a_time = self._needs_one_at_a_time(leaves, spec)
        if batch > 1 and self.one_at_a_time:
            return torch.cat([self._precise(_only(leaves, i), spec) for i in range(batch)])
        images = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if batch == 1 and layout.lonely(images[0]) and not self.one_at_a_time:
            return self._precise(_each(leaves, lambda t: torch.cat([t, t])), spec)[:1]
        return self._precise(leaves, spec)

    def _precise(self, leaves: list[Any], spec: Any) -> Tensor:
        """Run in the precision asked for; a result that is not finite is computed again in full."""
        reduced = current().precision
        if reduced is None:
            return self._run(leaves, spec)
        first = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        with torch.autocast(first.device.type, dtype=reduced):
            y = self._run(leaves, spec)
        y = y.to(first.dtype) if y.is_floating_point() and first.is_floating_point() else y
        if not levels.fake(y) and not bool(torch.isfinite(y.detach()).all()):
            record(
                "precision",
                f"{_name(self.module)}: result not finite in {reduced}, computed again in {first.dtype}.",
            )
            return self._run(leaves, spec)
        return y

    def _run(self, leaves: list[Any], spec: Any) -> Tensor:
        first = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        arguments = tree_unflatten(_each(leaves, layout.arrange), spec)

        def call() -> Tensor:
            return pick(self.module(*arguments), self.output, _name(self.module))

        with self._kept_buffers():
            try:
                y = _in_thread(call, first.device) if self.outside else call()
            except RuntimeError as error:
                if self.outside or "saved tensor hooks" not in str(error):
                    raise
                self.outside = True
                y = _in_thread(call, first.device)
        if y.ndim == 0 or y.shape[0] != first.shape[0]:
            raise ValueError(
                check.problem(
                    _name(self.module),
                    f"an output whose first axis is the batch of {first.shape[0]}",
                    check.describe(y),
                    "A network maps a batch to a batch; a plain function of one example needs no from_module",
                )
            )
        return y

    @contextmanager
    def _kept_buffers(self) -> Iterator[None]:
        """Put back what a forward pass writes into buffers, also when it fails."""
        saved = [
            (m, n, b, b._version, b.clone())
            for m in self.tree
            for n, b in m._buffers.items()
            if b is not None
        ]
        try:
            yield
        finally:
            with torch.no_grad():
                for owner, name, buffer, version, value in saved:
                    if owner._buffers[name] is not buffer:
                        owner._buffers[name] = buffer
                    if buffer._version != version:
                        buffer.copy_(value)

    def _needs_one_at_a_time(self, leaves: list[Any], spec: Any) -> bool:
        """Run one example alone and beside a very different one, and compare."""
        alone = _only(leaves, 0)
        mates = _each(leaves, _with_a_stranger)
        with torch.no_grad():
            y = self._run(alone, spec)
            try:
                beside = self._run(mates, spec)[:1]
            except Exception as error:
                record(
                    "one at a time",
                    f"{_name(self.module)}: takes no batch of two ({str(error).splitlines()[0][:80]}); "
                    "examples go through it one at a time.",
                )
                return True
            if beside.shape == y.shape and not y.is_floating_point():
                coupled = bool((beside != y).any())
            else:
                scale = y.abs().max() + torch.finfo(y.dtype).tiny
                tolerance = max(1e-4, 50 * torch.finfo(y.dtype).eps)
                coupled = beside.shape != y.shape or not bool((beside - y).abs().max() <= tolerance * scale)
            if not coupled:
                return False
            if bool((self._run(alone, spec) != y).any()):
                raise ValueError(
                    check.problem(
                        _name(self.module),
                        "the same answer to the same input",
                        "two answers",
                        "Call module.eval(); a random network has no attribution",
                    )
                )
        record(
            "one at a time",
            f"{_name(self.module)}: examples influence each other through the batch; they go through one at a time.",
        )
        return True

    def refuse_training(self) -> None:
        for m in self.tree:
            if not m.training:
                continue
            random = isinstance(m, _RANDOM_IN_TRAINING) and getattr(m, "p", 1) != 0
            coupled = isinstance(m, _COUPLED_IN_TRAINING) and (
                m.track_running_stats or "BatchNorm" in type(m).__name__
            )
            if random or coupled:
                raise ValueError(
                    check.problem(
                        _name(self.module),
                        "a network in evaluation mode",
                        f"training mode with {type(m).__name__}",
                        "Call module.eval() first; esegeta does not change it for you",
                    )
                )

    def refuse_strangers(self, tensors: Sequence[Tensor]) -> None:
        """Refuse inputs of another dtype or device than the network's, where it has parameters."""
        if not self.tree or not tensors[0].is_floating_point():
            return
        x = levels.base(tensors[0])
        kinds = {(p.dtype, p.device) for m in self.tree for p in m._parameters.values() if p is not None}
        floating = {kind for kind in kinds if kind[0].is_floating_point}
        if not floating:
            return
        if x.dtype not in {dtype for dtype, _ in floating}:
            dtype = next(iter(floating))[0]
            raise TypeError(
                check.problem(
                    _name(self.module),
                    f"an input of the network's dtype {dtype}",
                    check.describe(x),
                    f"Use x.to({dtype}), or module.to({x.dtype})",
                )
            )
        if x.device not in {device for _, device in floating}:
            device = next(iter(floating))[1]
            raise ValueError(
                check.problem(
                    _name(self.module),
                    f"an input on the network's device {device}",
                    f"one on {x.device}",
                    f"Use x.to({str(device)!r})",
                )
            )


def parametrised(
    module: nn.Module, output: Pick = None
) -> tuple[Callable[[Mapping[str, Tensor]], Model], dict[str, Tensor]]:
    """Take a module's parameters out: ``build(parameters)`` is the model with those parameters.

    For everything that varies weights: NoiseGrad, randomisation, attribution priors in training. These models
    are plain torch functions: torch vectorises them operator by operator and differentiates with respect to
    the parameters too.

    Args:
        module: in evaluation mode; it is not changed.
        output: as in ``from_module``.

    Returns:
        ``(build, parameters)`` with ``build : parameters -> Model``; ``parameters`` are the module's own,
        detached.

    Example:
        >>> import torch
        >>> build, parameters = parametrised(torch.nn.Linear(2, 1, bias=False))
        >>> build({"weight": torch.tensor([[1., 2.]])})(torch.tensor([3., 4.])).tolist()
        [11.0]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            check.problem(
                "parametrised", "an nn.Module", check.describe(module), "Other callables have no parameters"
            )
        )
    rules = _Batched(module, output)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def build(chosen: Mapping[str, Tensor]) -> Model:
        def model(*inputs: Any) -> Tensor:
            rules.refuse_training()
            # Buffers too go in as copies: what a forward pass writes into them is lost with the call.
            state = {**{n: b.detach().clone() for n, b in module.named_buffers()}, **chosen}
            leaves, spec = tree_flatten(inputs)
            arguments = tree_unflatten(_each(leaves, lambda t: t.unsqueeze(0)), spec)
            return pick(functional_call(module, state, arguments), output, _name(module)).squeeze(0)

        return model

    return build, parameters


def pick(result: Any, output: Pick, where: str) -> Tensor:
    """The tensor that ``output`` names in the result of a network.

    >>> import torch
    >>> pick({"logits": [torch.ones(1), torch.zeros(1)]}, ("logits", 1), "net").tolist()
    [0.0]
    """
    if callable(output):
        result = output(result)
    elif output is not None:
        path = [output] if isinstance(output, (int, str)) else list(output)
        for part in path:
            try:
                by_name = isinstance(part, str) and hasattr(result, part)
                result = getattr(result, str(part)) if by_name else result[part]
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    check.problem(
                        where, f"an output at {output!r}", _outline(result), "Choose output= among those"
                    )
                ) from error
    if isinstance(result, Tensor):
        return result
    if type(result).__module__ == "numpy":
        return torch.as_tensor(result)
    raise TypeError(
        check.problem(
            where,
            "one tensor as output",
            _outline(result),
            "Choose one: from_module(module, output='name') or output=0",
        )
    )


def _outline(result: Any) -> str:
    if isinstance(result, Mapping):
        return "a dict with " + ", ".join(f"{k!r}: {check.describe(v)}" for k, v in result.items())
    if isinstance(result, (tuple, list)):
        return f"a {type(result).__name__} of " + ", ".join(check.describe(v) for v in result)
    return check.describe(result)


def _each(leaves: list[Any], change: Callable[[Tensor], Tensor]) -> list[Any]:
    return [change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _only(leaves: list[Any], i: int) -> list[Any]:
    return _each(leaves, lambda t: t[i : i + 1])


def _with_a_stranger(t: Tensor) -> Tensor:
    first = t[:1]
    other = first.flip(list(range(1, t.ndim))) if t.ndim > 1 else first
    return torch.cat([first, 2 * other + 1 if t.is_floating_point() else other])


def _name(module: object) -> str:
    return getattr(module, "__name__", None) or type(module).__name__


def _in_thread(call: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Call in a thread of one's own, with what torch keeps per thread: grad mode, autocast, CUDA stream."""
    keep = torch.is_grad_enabled()
    casts = [
        (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    ]
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(keep))
            for kind, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            return call()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
