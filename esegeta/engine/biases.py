"""The bias of an operation: what it adds to its linear part."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from esegeta.engine import levels
from esegeta.engine.second_order import second_order
from esegeta.engine.spellings import is_homogeneous, operation

# A function, its arguments, its named arguments.
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def bias(made: Call | None, out: list[Any], which: int, fed: dict[Any, bool]) -> Tensor:
    """Return what an operation adds to its linear part at this input: ``f(z) - J(z) z``, with its weights fixed.

    ``fed`` remembers, by node of autograd's graph, what comes from the input.
    """
    if made is None or is_homogeneous(made[0]):
        return torch.zeros_like(out[which])
    function, args, kwargs = made
    leaves, spec = tree_flatten((args, kwargs))
    data = [i for i, leaf in enumerate(leaves) if _comes_from_input(leaf, fed)]

    def again(*zs: Tensor) -> Tensor:
        changed = list(leaves)
        for i, z in zip(data, zs, strict=True):
            changed[i] = z
        positional, named = tree_unflatten(changed, spec)
        once_more = function(*positional, **{**named, **({"inplace": False} if "inplace" in named else {})})
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


def _comes_from_input(leaf: Any, fed: dict[Any, bool]) -> bool:
    """Return whether an argument of an operation is data: computed from the input, which is being differentiated.

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
        known = fed.get(node)
        start = getattr(node, "variable", None)
        if known or (start is not None and not isinstance(start, nn.Parameter)):
            fed[leaf.grad_fn] = True
            return True
        for below, _ in () if known is False else node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
    fed.update(dict.fromkeys(seen, False))
    return False
