"""Many examples in bounded memory."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from esegeta._facts import explanation, facts_of, named
from esegeta.engine import check, levels, stream
from esegeta.engine.execution import current

Explain = Callable[..., Tensor]
Axes = int | None | tuple[int | None, ...]


def batched(explain: Explain, in_dims: Axes = 0) -> Explain:
    """Apply ``vmap`` in bounded memory: explain every example of a stack, a few at a time.

    Args:
        explain: ``(x, *refs, key=) -> like x``.
        in_dims: as in ``torch.func.vmap``: 0 where a tensor holds one entry per example, None where all
            examples share it.

    Returns:
        ``(xs, *refs, key=) -> like xs``; references also by name. Each answer is that of ``explain`` on its
        example alone, whatever the chunk and the other examples. An int key is shared by all; a tensor of
        keys gives each its own.

    Example:
        >>> import torch, esegeta as eg
        >>> ig = eg.integrated_gradients(lambda x: (x ** 2).sum(), steps=1)
        >>> xs = torch.tensor([[[1., 2.]], [[3., 4.]]])
        >>> batched(ig, in_dims=(0, None))(xs, torch.zeros(1, 2)).tolist()
        [[[1.0, 4.0]], [[9.0, 16.0]]]
    """

    facts = facts_of(check.explanation("batched", explain))

    def many(xs: Tensor, *refs: Tensor, key: "int | Tensor | None" = None) -> Tensor:
        tensors = (xs, *refs)
        for i, t in enumerate(tensors):
            check.tensor("batched", "xs" if i == 0 else f"argument {i + 1}", t)
        dims = (in_dims,) * len(tensors) if not isinstance(in_dims, tuple) else in_dims
        whole = all(d is None or (isinstance(d, int) and not isinstance(d, bool)) for d in dims)
        if not whole or len(dims) != len(tensors) or dims[0] is None:
            raise check.refused(
                "batched",
                f"in_dims for {len(tensors)} tensors, the first one mapped",
                repr(in_dims),
                "Give one entry per tensor, e.g. in_dims=(0, None) to share the baseline",
            )
        for t, d in zip(tensors, dims, strict=True):
            if d is not None and not -t.ndim <= d < t.ndim:
                raise check.refused(
                    "batched", f"in_dims within the {t.ndim} axes", repr(in_dims), "0 is usual"
                )
        mapped = [t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True) if d is not None]
        counts = [len(t) for t in mapped]
        keys = isinstance(key, Tensor) and key.ndim == 1
        if keys:
            assert isinstance(key, Tensor)
            mapped.append(key)
            counts.append(len(key))
        if len(set(counts)) != 1 or counts[0] == 0:
            raise check.refused(
                "batched",
                "one entry per example in every mapped tensor",
                f"{counts} entries",
                "Share a tensor between all examples with None in in_dims",
            )

        def one(piece: tuple[Tensor, ...]) -> Tensor:
            found = iter(piece)
            arguments = [next(found) if d is not None else t for t, d in zip(tensors, dims, strict=True)]
            extra = {"key": next(found)} if keys else {} if key is None else {"key": key}
            return explain(*arguments, **extra)

        out: Any = None  # a tensor, or a tree of them, as of a curve
        pieces: list[Any] = []

        def absorb(done: int, values: Any, _: Any) -> int:
            nonlocal out
            leaves = tree_leaves(values)
            size = len(leaves[0])
            if any(v.requires_grad or levels.wrapped(v) for v in leaves):
                pieces.append(values)  # somebody differentiates or maps through us: no writing in place
            else:
                if out is None:
                    out = tree_map(lambda v: v.new_empty(counts[0], *v.shape[1:]), values)
                for t, v in zip(tree_leaves(out), leaves, strict=True):
                    t[done : done + size] = v
            return done + size

        voxels = mapped[0][0, 0].numel() if mapped[0].ndim > 2 else None
        stream.fold(one, tuple(mapped), absorb, 0, label=_label(explain), voxels=voxels)
        return tree_map(lambda *vs: torch.cat(vs), *pieces) if out is None else out

    if facts.refs is None:
        return named(many, f"batched({_label(explain)})")
    face = explanation(many, "batched", facts.refs, key=facts.key, doc=explain.__doc__, first="xs")
    return named(face, f"batched({_label(explain)})")


def explained(
    explain: Explain, examples: Iterable[Any], *, key: int | Tensor | None = None
) -> Iterator[Tensor]:
    """Explain examples as they come, one attribution out for each, in order.

    For data sets that do not fit into memory, and for volumes of different shapes.

    Args:
        explain: ``(x, *refs, key=) -> like x``.
        examples: tensors ``x``, or tuples ``(x, *refs)``.
        key: given to every call, where ``explain`` draws at random.

    Returns:
        A generator of attributions.

    Example:
        >>> import torch, esegeta as eg
        >>> explain = eg.gradient(lambda x: (x ** 2).sum())
        >>> [a.tolist() for a in explained(explain, (torch.full((1, 1), float(i)) for i in range(3)))]
        [[[0.0]], [[2.0]], [[4.0]]]
    """
    check.explanation("explained", explain)
    together = current().chunk or 2  # on CPU a pair takes the time of one large volume (see layout.lonely)
    waiting: list[tuple[Tensor, ...]] = []
    extra = {} if key is None else {"key": key}

    def flush() -> Iterator[Tensor]:
        if len(waiting) == 1:
            yield explain(*waiting[0], **extra)
        elif waiting:
            yield from batched(explain)(*[torch.stack(ts) for ts in zip(*waiting, strict=True)], **extra)
        waiting.clear()

    if not isinstance(examples, Iterable) or (isinstance(examples, Tensor) and examples.ndim == 0):
        got = check.describe(examples)
        raise check.refused_type("explained", "examples, one after another", got, "Pass a list of tensors")
    for example in examples:
        tensors = tuple(example) if isinstance(example, (tuple, list)) else (example,)
        for t in tensors or (example,):
            check.tensor("explained", "every example", t)
        if waiting and [_kind(t) for t in tensors] != [_kind(t) for t in waiting[0]]:
            yield from flush()
        waiting.append(tensors)
        if len(waiting) == together:
            yield from flush()
    yield from flush()


def _kind(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device


def _label(explain: Explain) -> str:
    return getattr(explain, "__name__", "explain")
