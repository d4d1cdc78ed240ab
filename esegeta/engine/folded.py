"""The folded call: run a batch function under any nest of vmap, grad, vjp, jvp at its own native speed.

A *batch function* takes tensors that share a first axis of examples and returns a tuple of such tensors. It
may be anything that ordinary autograd can run: a module, TorchScript, an exported program, code with
``.item()``, or something opaque without a derivative. ``fold`` makes of it a function of one example whose
``vmap`` rule moves every mapped axis into that first axis, so that nested maps over 5 examples and 7 steps
reach the batch function as one batch of 35.

Derivatives are batch functions too: the pullback of ``f`` is ``(x, g) -> J(x)^T g``, the pushforward is
``(x, t) -> J(x) t``. Both are folded by the same rule, so any order of derivative exists, and each op only has
to say what it computes on a plain batch. Between the forward run and its first pullback the autograd graph is
kept in a slot, so that the common case, one gradient, costs one forward and one backward run. Higher orders
run again: nothing but inputs is saved between orders.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta.engine import levels

BatchFn = Callable[..., tuple[Tensor, ...]]


class NoGradient(RuntimeError):
    """A derivative was asked of a function that autograd cannot see through."""


class Op:
    """A batch function with its pullback and pushforward, themselves such ops."""

    def __init__(self, fn: BatchFn, name: str) -> None:
        self.fn = fn
        self.name = name
        self._slot = threading.local()  # one live graph per thread: threads never share graphs

    def run(self, xs: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, ...]:
        """Values on a plain batch; with ``keep``, the graph waits in the slot for the pullback."""
        self._slot.live = None  # free an unused graph before the next one is built
        if not keep:
            with torch.no_grad():
                return tuple(y.detach() for y in self.fn(*xs))
        with torch.enable_grad():
            leaves = [_leaf(x) for x in xs]
            ys = self.fn(*leaves)
        self._slot.live = (_identity(xs), xs, leaves, ys)
        return tuple(y.detach() for y in ys)

    def take(self, xs: tuple[Tensor, ...]) -> "tuple[list[Tensor], tuple[Tensor, ...]] | None":
        """The graph of the last kept run if it was of these very inputs; it is handed out once."""
        live = getattr(self._slot, "live", None)
        self._slot.live = None
        if live is None or live[0] != _identity(xs):
            return None
        return live[2], live[3]

    def pullback(self, count: int) -> "Op":
        """``(*xs, *gs) -> J(x)^T g`` for the floating ones of ``count`` inputs."""
        return _Pullback(self, count)

    def pushforward(self, count: int) -> "Op":
        """``(*xs, *ts) -> J(x) t``, one tangent for each floating one of ``count`` inputs."""

        def push(*arguments: Tensor) -> tuple[Tensor, ...]:
            # Reverse mode twice: u -> J^T u is linear in u, and its own pullback is J. Every operator that
            # has a second derivative has this; forward-mode rules are missing for many.
            xs, tangents = arguments[:count], arguments[count:]
            recording = torch.is_grad_enabled() and any(a.requires_grad for a in arguments)
            with torch.enable_grad():
                leaves = [x if recording and x.requires_grad else _leaf(x) for x in xs]
                ys = self.fn(*leaves)
                floats = [y for y in ys if y.is_floating_point()]
                seen = [y for y in floats if y.requires_grad]
                if not seen:
                    raise self.no_gradient()
                dual = [torch.zeros_like(y).requires_grad_() for y in seen]
                inner = [x for x in leaves if x.is_floating_point()]
                pulled = torch.autograd.grad(seen, inner, dual, create_graph=True, allow_unused=True)
                used = [
                    (p, t) for p, t in zip(pulled, tangents, strict=True) if p is not None and p.requires_grad
                ]
                pushed: tuple[Tensor | None, ...] = (None,) * len(dual)
                if used:
                    pushed = torch.autograd.grad(
                        [p for p, _ in used],
                        dual,
                        [t for _, t in used],
                        create_graph=recording,
                        allow_unused=True,
                    )
            by_output = iter(pushed)
            out = [next(by_output) if y.requires_grad else None for y in floats]
            return tuple(torch.zeros_like(y) if p is None else p for p, y in zip(out, floats, strict=True))

        return Op(push, f"pushforward of {self.name}")

    def no_gradient(self) -> NoGradient:
        """The error for a function that autograd cannot see through."""
        return NoGradient(
            f"{self.name}: expected a differentiable model, got outputs that autograd does not connect to the "
            "input. Use a method that needs only values (perturbation methods), or a model that torch differentiates."
        )


class _Pullback(Op):
    def __init__(self, of: Op, count: int) -> None:
        self.of, self.count = of, count
        super().__init__(self._pull, f"pullback of {of.name}")

    def run(self, xs: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, ...]:
        if keep:
            return super().run(xs, keep)
        inputs, gs = xs[: self.count], xs[self.count :]
        live = self.of.take(inputs)
        if live is None:
            with torch.no_grad():
                return self._pull(*xs)
        leaves, ys = live
        return self._grad(leaves, ys, gs, create_graph=False)

    def _pull(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        xs, gs = arguments[: self.count], arguments[self.count :]
        recording = torch.is_grad_enabled() and any(a.requires_grad for a in arguments)
        with torch.enable_grad():
            leaves = [x if recording and x.requires_grad else _leaf(x) for x in xs]
            return self._grad(leaves, self.of.fn(*leaves), gs, create_graph=recording)

    def _grad(
        self, leaves: Sequence[Tensor], ys: tuple[Tensor, ...], gs: Sequence[Tensor], create_graph: bool
    ) -> tuple[Tensor, ...]:
        floats = [y for y in ys if y.is_floating_point()]
        pairs = [(y, g.to(y.dtype)) for y, g in zip(floats, gs, strict=True) if y.requires_grad]
        if not pairs:
            raise self.of.no_gradient()
        inner = [x for x in leaves if x.is_floating_point()]
        with torch.enable_grad():
            grads = torch.autograd.grad(
                [y for y, _ in pairs],
                inner,
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        return tuple(
            torch.zeros_like(x) if g is None else _as(g, x) for g, x in zip(grads, inner, strict=True)
        )


def _as(g: Tensor, x: Tensor) -> Tensor:
    # Autograd hands gradients back in the layout of the network's inside; outside, the layout is the input's.
    return g.contiguous() if x.is_contiguous() else g


def _leaf(x: Tensor) -> Tensor:
    x = x.detach()
    return x.requires_grad_() if x.is_floating_point() else x


def _identity(xs: Sequence[Tensor]) -> tuple[Any, ...]:
    # The slot holds xs alive, so an address cannot be used again while it is compared. Tensors of a dry run
    # have no address: there the objects themselves are compared.
    return tuple(
        (
            id(x) if levels.fake(x) else x.data_ptr(),
            x.shape,
            x.stride(),
            x.storage_offset(),
            x.dtype,
            x.device,
            x._version,
        )
        for x in xs
    )


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(op: Op, keep: bool, *xs: Tensor) -> tuple[Tensor, ...]:
        return op.run(xs, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        op, _, *xs = inputs
        ctx.op = op
        ctx.floats = [y.is_floating_point() for y in output]
        ctx.mark_non_differentiable(*[y for y in output if not y.is_floating_point()])
        ctx.save_for_backward(*xs)
        ctx.save_for_forward(*xs)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Any, ...]:
        xs = ctx.saved_tensors
        kept = [g for g, floating in zip(gs, ctx.floats, strict=True) if floating]
        pulled = iter(_Call.apply(ctx.op.pullback(len(xs)), False, *xs, *kept))
        return (None, None, *[next(pulled) if x.is_floating_point() else None for x in xs])

    @staticmethod
    def jvp(ctx: Any, _op: None, _keep: None, *ts: Tensor | None) -> Any:
        xs = ctx.saved_tensors
        tangents = [
            torch.zeros_like(x) if t is None else t
            for x, t in zip(xs, ts, strict=True)
            if x.is_floating_point()
        ]
        pushed = iter(_Call.apply(ctx.op.pushforward(len(xs)), False, *xs, *tangents))
        return tuple(next(pushed) if floating else None for floating in ctx.floats)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], op: Op, keep: bool, *xs: Tensor) -> Any:
        n = info.batch_size
        moved = [
            x.unsqueeze(0).expand(n, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip(xs, in_dims[2:], strict=True)
        ]
        ys = _Call.apply(op, keep, *[x.flatten(0, 1) for x in moved])
        return tuple(y.unflatten(0, (n, -1)) for y in ys), (0,) * len(ys)


def fold(fn: BatchFn, name: str) -> Callable[..., tuple[Tensor, ...]]:
    """Make of a batch function a function of one example that every ``torch.func`` transform can enter.

    Args:
        fn: tensors with a common first axis in, a tuple of tensors with that first axis out.
        name: how errors call it.

    Returns:
        ``f(*xs) -> tuple`` on single examples; ``f.op`` is the underlying op.

    Example:
        >>> import torch
        >>> from torch.func import grad, vmap
        >>> sizes = []
        >>> cube = fold(lambda x: (sizes.append(len(x)), (x ** 3,))[1], "cube")
        >>> xs = torch.tensor([[1., 2.], [3., 4.], [5., 6.]])
        >>> vmap(vmap(grad(lambda x: cube(x)[0])))(xs).tolist()
        [[3.0, 12.0], [27.0, 48.0], [75.0, 108.0]]
        >>> sizes
        [6]
    """
    op = Op(fn, name)

    def one(*xs: Tensor) -> tuple[Tensor, ...]:
        # Without anybody to differentiate, no graph is built: forward-only methods pay nothing for it.
        keep = levels.pulling() or (torch.is_grad_enabled() and any(x.requires_grad for x in xs))
        ys: tuple[Tensor, ...] = _Call.apply(op, keep, *[x.unsqueeze(0) for x in xs])
        return tuple(y.squeeze(0) for y in ys)

    one.op = op  # type: ignore[attr-defined]
    return one
