"""Derivatives that end where they should go on.

The backward run of a custom ``autograd.Function`` may leave torch: numpy, another framework, a detached tensor. What
it hands back is then a constant for whoever differentiates the gradient, and torch fills in a zero, the same as for
what really does not depend on the input. Here such a gradient gets an end that raises when a derivative of it is
asked for, so that a first derivative costs nothing and a second one is refused.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esegeta.engine import check, levels

_OURS = ("_Reroute", "_Once", "FoldedCall", "_Severed")


class NoGradient(RuntimeError):
    """A derivative was asked of a function that autograd cannot see through."""


class _Severed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(who: tuple[str, str], g: Tensor, anchor: Tensor) -> Tensor:  # noqa: ARG004
        return g.view_as(g)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG004
        ctx.who = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:  # noqa: ARG004
        raise _refusal(*ctx.who)

    @staticmethod
    def jvp(ctx: Any, *ts: Any) -> Any:  # noqa: ARG004
        raise _refusal(*ctx.who)


def _refusal(name: str, function: str) -> NoGradient:
    return NoGradient(
        check.problem(
            name,
            "a gradient that torch can differentiate again",
            "one that ends in the backward of "
            f"{function.removesuffix('Backward').removesuffix('Generated')}, a custom autograd.Function",
            "Write that backward with torch operations on what it has saved, or take a method that needs first "
            "derivatives only",
        )
    )


def custom_functions(ys: Sequence[Tensor]) -> list[Any]:
    """Return the calls of custom ``autograd.Function``s that some values were made by.

    >>> custom_functions([torch.ones(1, requires_grad=True) * 2])
    []
    """
    return [node for node in _nodes(ys) if isinstance(node, torch.autograd.function.BackwardCFunction)]


def _nodes(ys: Sequence[Tensor]) -> Iterator[Any]:
    stack = [y.grad_fn for y in ys if y.grad_fn is not None]
    seen: set[Any] = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)


def mark(name: str, functions: Sequence[Any], anchors: Sequence[Tensor]) -> None:
    """Give what these functions hand back an end that raises, where it has no graph although an anchor has one.

    Args:
        name: how the error calls the network.
        functions: what ``custom_functions`` found, before the backward run.
        anchors: what the gradient may depend on: values of the network, and the gradients that it is given.
    """
    watched = [t for t in anchors if levels.watched(t)]
    for node in functions if watched else ():
        if not node.name().startswith(_OURS):
            node.register_hook(partial(_ended, (name, node.name()), watched[0]))


def _ended(
    who: tuple[str, str], anchor: Tensor, grads: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    def ended(g: Tensor | None) -> Tensor | None:
        if g is None or levels.watched(g) or any(_same(g, t) for t in given):
            return g
        made: Tensor = _Severed.apply(who, g, anchor)
        return made

    return tuple(map(ended, grads))


def _same(g: Tensor, given: Tensor | None) -> bool:
    """Whether a function hands on what it is given: its derivative is that of what comes after it."""
    if given is None:
        return False
    return bool(torch._C._is_alias_of(levels.base(g), levels.base(given)))  # type: ignore[attr-defined]
