"""The folded call: run a batch function under any nest of vmap, grad, vjp, jvp at its own native speed.

A *batch function* takes tensors that share a first axis of examples and returns a tuple of such tensors. It
may be anything that ordinary autograd can run: a module, TorchScript, an exported program, code with
``.item()``, or something opaque without a derivative. ``fold`` makes of it a function of one example whose
``vmap`` rule moves every mapped axis into that first axis, so that nested maps over 5 examples and 7 steps
reach the batch function as one batch of 35.

Derivatives are batch functions too: the pullback of ``f`` is ``(x, g) -> J(x)^T g``, the pushforward is
``(x, t) -> J(x) t``. Both are folded by the same rule, so any order of derivative exists, and each op only has
to say what it computes on a plain batch. Between a forward run and its first pullback autograd's graph is kept
beside the inputs, so that the common case, one gradient, costs one forward and one backward run; it is gone
when either is. Higher orders run again: nothing but inputs is saved between orders.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from esegeta.engine import levels, severed
from esegeta.engine.execution import current, record
from esegeta.engine.second_order import second_order
from esegeta.engine.severed import NoGradient

BatchFn = Callable[..., tuple[Tensor, ...]]
Host = Callable[[Callable[[], Any]], Any]


class Run:
    """One forward run: for which inputs a pullback may follow, and until then its graph (leaves and outputs)."""

    __slots__ = ("graph", "watched")

    def __init__(self, watched: Sequence[bool] = ()) -> None:
        self.watched = watched
        self.graph: tuple[list[Tensor], tuple[Tensor, ...]] | None = None

    def take(self, batch: int, wanted: Sequence[int]) -> tuple[list[Tensor], tuple[Tensor, ...]] | None:
        """Return the graph, once. A pullback that is itself mapped (a Jacobian) has another batch: not this graph."""
        graph, self.graph = self.graph, None
        if graph is None or graph[0][0].shape[0] != batch:
            return None
        return graph if all(graph[0][i].requires_grad for i in wanted) else None


class Op:
    """A batch function with its pullback and pushforward, themselves such ops.

    ``host`` runs whatever touches autograd; the default runs it on the spot. ``full`` is the same function in
    full precision, for gradients that overflow in a reduced one. ``derived`` ones are derivatives of others.
    """

    derived = False

    def __init__(self, fn: BatchFn, name: str, host: Host | None = None, full: BatchFn | None = None) -> None:
        self.fn, self.name, self.full = fn, name, full
        self.network = name  # the derivatives of a network are still called by its name
        self.host: Host = host or (lambda work: work())

    def run(self, run: Run, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return values on a plain batch; if a pullback may follow, the graph waits in ``run``."""
        if any(run.watched):

            def build() -> tuple[list[Tensor], tuple[Tensor, ...]]:
                with torch.enable_grad():
                    leaves = [_leaf(x, w) for x, w in zip(xs, run.watched, strict=True)]
                    return leaves, self.fn(*leaves)

            try:
                run.graph = self.host(build)
                return tuple(y.detach() for y in run.graph[1])
            except RuntimeError as error:
                if "numpy() on Tensor that requires grad" not in str(error):
                    raise  # else it is a black box: it has values, and the pullback says that it has no more

        def values() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return self.fn(*xs)

        return tuple(y.detach() for y in self.host(values))

    def pullback(
        self, count: int, wanted: tuple[int, ...], given: tuple[int, ...], run: Run | None = None
    ) -> "Op":
        """Return ``(*xs, *gs) -> J(x)^T g`` for the wanted of ``count`` inputs, from the given of the outputs."""
        return _Pullback(self, count, wanted, given, run)

    def pushforward(self, count: int) -> "Op":
        """Return ``(*xs, *ts) -> J(x) t``, one tangent for each floating one of ``count`` inputs."""

        def push(*arguments: Tensor) -> tuple[Tensor, ...]:
            # Reverse mode twice: u -> J^T u is linear in u, and its own pullback is J. Every operator that
            # has a second derivative has this; forward-mode rules are missing for many.
            xs, tangents = arguments[:count], arguments[count:]
            recording = torch.is_grad_enabled() and any(a.requires_grad for a in arguments)
            with torch.enable_grad(), second_order(self.name):
                leaves = [x if recording and x.requires_grad else _leaf(x) for x in xs]
                ys = self.fn(*leaves)
                floats = [y for y in ys if _smooth(y)]
                seen = [y for y in floats if y.requires_grad]
                if not seen:
                    raise self.no_gradient()
                dual = [torch.zeros_like(y).requires_grad_() for y in seen]
                severed.mark(self.network, severed.custom_functions(seen), dual)
                inner = [x for x in leaves if _smooth(x)]
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

        op = Op(push, f"pushforward of {self.name}", self.host)
        op.derived, op.network = True, self.network
        return op

    def no_gradient(self) -> NoGradient:
        """Return the error for a function that autograd cannot see through."""
        return NoGradient(
            f"{self.name}: expected a differentiable model, got outputs that autograd does not connect to the "
            "input. Use a method that needs only values (perturbation methods), or a model that torch "
            "differentiates. "
            "A model of another framework has a gradient if it is called in a torch.autograd.Function whose backward "
            "asks that framework for it; the page on models shows one."
        )


class _Pullback(Op):
    derived = True

    def __init__(
        self,
        of: Op,
        count: int,
        wanted: tuple[int, ...],
        given: tuple[int, ...],
        forward: Run | None = None,
    ) -> None:
        super().__init__(self._pull, f"pullback of {of.name}", of.host)
        self.network = of.network
        self.of, self.count, self.wanted, self.given, self.forward = of, count, wanted, given, forward

    def run(self, run: Run, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        graph = self.forward.take(xs[0].shape[0], self.wanted) if self.forward is not None else None
        if graph is None:
            grads = super().run(Run(), xs)
        else:
            gs = xs[self.count :]
            grads = self.host(lambda: self._grad(graph[0], graph[1], gs, create_graph=False))
        full = self.of.full if current().precision is not None else None
        if full is not None and not all(map(levels.finite, grads)):
            record(
                "precision", f"{self.of.name}: gradient not finite in {current().precision}, computed again."
            )
            again = Op(full, self.of.name, self.host)
            return _Pullback(again, self.count, self.wanted, self.given).run(run, xs)
        return grads

    def _pull(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        xs, gs = arguments[: self.count], arguments[self.count :]
        recording = torch.is_grad_enabled() and any(a.requires_grad for a in arguments)
        with torch.enable_grad():
            leaves = [
                x if recording and x.requires_grad else _leaf(x, i in self.wanted) for i, x in enumerate(xs)
            ]
            try:
                with second_order(self.of.name) if recording else nullcontext():
                    ys = self.of.fn(*leaves)
            except RuntimeError as error:
                if "numpy() on Tensor that requires grad" in str(error):
                    raise self.of.no_gradient() from error
                raise
            return self._grad(leaves, ys, gs, create_graph=recording)

    def _grad(
        self, leaves: Sequence[Tensor], ys: tuple[Tensor, ...], gs: Sequence[Tensor], create_graph: bool
    ) -> tuple[Tensor, ...]:
        seen = [ys[i] for i in self.given]
        pairs = [(y, g.to(y.dtype)) for y, g in zip(seen, gs, strict=True) if y.requires_grad]
        inner = [leaves[i] for i in self.wanted]
        if not pairs:
            # Not connected to what is asked for. If it is connected to anything, that derivative is zero.
            with torch.enable_grad():
                if self.of.derived or any(y.requires_grad for y in self.of.fn(*map(_leaf, leaves))):
                    return tuple(map(torch.zeros_like, inner))
            raise self.of.no_gradient()
        if create_graph:
            severed.mark(self.network, severed.custom_functions(seen), [*gs, *(y for y, _ in pairs)])
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


def _smooth(t: Tensor) -> bool:
    """Whether it can have a derivative at all."""
    return t.is_floating_point() or t.is_complex()


def _leaf(x: Tensor, watched: bool = True) -> Tensor:
    x = x.clone() if x.is_inference() else x.detach()
    return x.requires_grad_() if watched and _smooth(x) else x


class FoldedCall(torch.autograd.Function):
    """An operation on batches, as autograd and ``torch.func`` enter it: what they map becomes the batch axis."""

    @staticmethod
    def forward(op: Op, run: Run, *xs: Tensor) -> tuple[Tensor, ...]:
        """Run the operation on batches."""
        # Returned as it came in, an input would count as the output's alias.
        return tuple(y.clone() if any(y is x for x in xs) else y for y in op.run(run, xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the derivatives need."""
        ctx.op, ctx.run, *xs = inputs
        ctx.floats = [_smooth(y) for y in output]
        ctx.mark_non_differentiable(*[y for y in output if not _smooth(y)])
        # Outputs that nobody differentiates, such as observed activations, cost no gradient of zeros.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*xs)
        ctx.save_for_forward(*xs)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Any, ...]:
        """Pull cotangents back by an operation that can be entered in turn."""
        xs = ctx.saved_tensors
        wanted = tuple(i for i, x in enumerate(xs) if _smooth(x) and ctx.needs_input_grad[i + 2])
        given = tuple(i for i, (g, f) in enumerate(zip(gs, ctx.floats, strict=True)) if f and g is not None)
        if not given:
            return (None,) * (2 + len(xs))
        op = ctx.op.pullback(len(xs), wanted, given, ctx.run)
        pulled = FoldedCall.apply(op, Run(), *xs, *[gs[i] for i in given])
        out: list[Any] = [None] * len(xs)
        for i, g in zip(wanted, pulled, strict=True):
            out[i] = g
        return (None, None, *out)

    @staticmethod
    def jvp(ctx: Any, _op: None, _run: None, *ts: Tensor | None) -> Any:
        """Push tangents forward by an operation that can be entered in turn."""
        xs = ctx.saved_tensors
        tangents = [
            torch.zeros_like(x) if t is None else t for x, t in zip(xs, ts, strict=True) if _smooth(x)
        ]
        pushed = iter(FoldedCall.apply(ctx.op.pushforward(len(xs)), Run(), *xs, *tangents))
        return tuple(next(pushed) if floating else None for floating in ctx.floats)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], op: Op, run: Run, *xs: Tensor) -> Any:
        """Fold the mapped axis into that of the batch."""
        n = info.batch_size
        moved = [
            x.unsqueeze(0).expand(n, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip(xs, in_dims[2:], strict=True)
        ]
        inner = moved[0].shape[1]
        ys = FoldedCall.apply(op, run, *[x.flatten(0, 1) for x in moved])
        return tuple(y.reshape(n, inner, *y.shape[1:]) for y in ys), (0,) * len(ys)


def fold(
    fn: BatchFn, name: str, *, host: Host | None = None, full: BatchFn | None = None
) -> Callable[..., tuple[Tensor, ...]]:
    """Make of a batch function a function of one example that every ``torch.func`` transform can enter.

    Args:
        fn: tensors with a common first axis in, a tuple of tensors with that first axis out.
        name: how errors call it.
        host: runs the work that is handed to it, elsewhere if need be.
        full: the same function in full precision; gradients that are not finite are computed with it.

    Returns:
        ``f(*xs) -> tuple`` on single examples.

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
    op = Op(fn, name, host, full)

    def one(*xs: Tensor) -> tuple[Tensor, ...]:
        # Without anybody to differentiate, no graph is built: forward-only methods pay nothing for it, and
        # inputs that stay fixed cost no gradient.
        run = Run([torch.is_grad_enabled() and levels.watched(x) for x in xs])
        ys: tuple[Tensor, ...] = FoldedCall.apply(op, run, *[x.unsqueeze(0) for x in xs])
        return tuple(y.squeeze(0) for y in ys)

    return one
