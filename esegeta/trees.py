"""Several inputs explained at once."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from esegeta._facts import named
from esegeta._types import Method
from esegeta.engine import check
from esegeta.engine.gradient import name_of


def on_trees(method: Method) -> Method:
    """Let a method explain a tree of tensors, for example an image and its metadata, as one input.

    The tensors are laid end to end into one vector, so it fits methods that treat elements alike (gradients,
    path integrals), not those that look at neighbours (blur). Inputs that are not to be explained are simply
    closed over by the score.

    Args:
        method: ``Score -> Explain``.

    Returns:
        A method whose scores and explanations take trees of floating tensors; baselines are trees of the same
        form.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda inputs: (inputs["image"] * inputs["age"]).sum()
        >>> a = on_trees(eg.gradient)(score)({"image": torch.tensor([[1., 2.]]), "age": torch.tensor(3.)})
        >>> a["image"].tolist(), a["age"].tolist()
        ([[3.0, 3.0]], 3.0)
    """

    check.function("on_trees", "a method", method, "Pass for example esegeta.gradient")

    def on_tree(score: Any, **static: Any) -> Any:
        check.score("on_trees", score)

        def explain(tree: Any, *refs: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten(tree)
            for i, leaf in enumerate(leaves):
                check.floating("on_trees", f"leaf {i}", leaf)
            if not leaves or len({leaf.dtype for leaf in leaves}) != 1:
                raise check.refused_type(
                    "on_trees",
                    "tensors of one dtype",
                    ", ".join(check.describe(leaf) for leaf in leaves) or "no tensors",
                    "Convert them to one dtype",
                )

            def join(other: Any) -> Tensor:
                found, form = tree_flatten(other)
                if form != spec or [f.shape for f in found] != [leaf.shape for leaf in leaves]:
                    raise check.refused(
                        "on_trees", f"a tree like the input, {spec}", str(form), "Match keys and shapes"
                    )
                return torch.cat([f.reshape(-1) for f in found])

            def part(vector: Tensor) -> Any:
                pieces = vector.split([leaf.numel() for leaf in leaves])
                return tree_unflatten(
                    [p.reshape(leaf.shape) for p, leaf in zip(pieces, leaves, strict=True)], spec
                )

            return part(method(lambda v: score(part(v)), **static)(join(tree), *map(join, refs), **kwargs))

        return named(explain, f"on_trees({name_of(method)})")

    return on_tree
