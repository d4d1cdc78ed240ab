"""Second derivatives of operations that torch differentiates only once.

Fused attention, hard sigmoids and distances have a backward of their own that nothing differentiates. Where a
derivative of a derivative is taken, they are computed from operations that have one.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from esegeta.engine import check

_MISSING = re.compile(
    r"derivative for '?(?:aten::)?(\w+?)(?:_backward)?'? is not implemented"
    r"|use forward AD with (?:aten::)?(\w+?)(?:_backward)? that does not support it"
)


@contextmanager
def second_order(where: str) -> Iterator[None]:
    """Compute what is differentiated in this block so that it can be differentiated again.

    What still has no second derivative is refused by its name.

    >>> import torch
    >>> from torch.func import grad
    >>> with second_order("demo"):
    ...     grad(grad(lambda x: torch.nn.functional.hardsigmoid(x) ** 2))(torch.tensor(1.)).item()
    0.0555555559694767
    """
    try:
        with _Composed():
            yield
    except RuntimeError as error:  # NotImplementedError is one
        found = _MISSING.search(str(error))
        if found is None:
            raise
        name = (found.group(1) or found.group(2)).strip("_")
        raise NotImplementedError(
            check.problem(
                where,
                "operations with a second derivative",
                f"{name!r}, which torch differentiates only once",
                "Write it with others, or take a method that needs only first derivatives",
            )
        ) from error


def hard_sigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """Return ``min(max(x / 6 + 1/2, 0), 1)``.

    >>> hard_sigmoid(torch.tensor([-4., 0., 4.])).tolist()
    [0.0, 0.5, 1.0]
    """
    y = functional.relu6(x + 3) / 6
    return x.copy_(y) if inplace else y


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the softmax of the products of queries and keys, times the values, step by step.

    >>> attention(torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2, 3), torch.tensor([[[[1.], [3.]]]])).flatten().tolist()
    [2.0, 2.0]
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        left_out = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        attn_mask = left_out.masked_fill(~attn_mask, -torch.inf)
    found: Tensor = torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return found


def _attention_of_heads(*args: Any, need_weights: bool = True, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    # With its weights asked for, attention is never the fused one.
    out, weights = functional.multi_head_attention_forward(*args, need_weights=True, **kwargs)  # type: ignore[misc]
    return out, weights if need_weights else None


def distances(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:  # noqa: ARG001
    """Return the distance of every row of ``a`` from every row of ``b``.

    >>> distances(torch.tensor([[0., 0.]]), torch.tensor([[3., 4.], [0., 0.]])).tolist()
    [[5.0, 0.0]]
    """
    return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), ord=p, dim=-1)


def distances_within(x: Tensor, p: float = 2.0) -> Tensor:
    """Return the distance of every row from every later one.

    >>> distances_within(torch.tensor([[0., 0.], [3., 4.], [0., 0.]])).tolist()
    [5.0, 0.0, 5.0]
    """
    i, j = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    return torch.linalg.vector_norm(x[i] - x[j], ord=p, dim=-1)


_COMPOSED: dict[Any, Callable[..., Any]] = {
    functional.hardsigmoid: hard_sigmoid,
    torch._C._nn.hardsigmoid: hard_sigmoid,
    torch._C._nn.hardsigmoid_: lambda x: hard_sigmoid(x, inplace=True),
    functional.scaled_dot_product_attention: attention,
    functional.multi_head_attention_forward: _attention_of_heads,
    torch.cdist: distances,
    functional.pdist: distances_within,
    torch.pdist: distances_within,
}


class _Composed(TorchFunctionMode):
    """Replaces the operations of the table, in every spelling that reaches torch from Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _COMPOSED.get(func, func)(*args, **(kwargs or {}))
