# ruff: noqa: ARG001
"""Operations spelled out in others, for rewrites: with the same arguments, and the same value up to rounding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from esegeta.engine import check

Dims = int | Sequence[int] | None


def _refuse(name: str, what: str) -> NotImplementedError:
    return NotImplementedError(
        check.problem("rules", f"{name!r} in a form that is spelled out", what, "Write it with others")
    )


def clamp(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """Bound from below, then from above, as torch does."""
    if min is not None:
        x = torch.maximum(x, _tensor(min, x))
    return x if max is None else torch.minimum(x, _tensor(max, x))


def _tensor(value: Any, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_tensor(value)


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """Gate one half by the other."""
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


def addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    """Add a quotient."""
    return x + value * (a / b)


def addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    """Add a product."""
    return x + value * (a * b)


def added_product(x: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """Add a product of matrices."""
    return beta * x + alpha * torch.matmul(a, b)


def addbmm(x: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """Add a sum of products of matrices."""
    return beta * x + alpha * torch.matmul(a, b).sum(0)


def lerp(a: Tensor, b: Tensor, weight: Any) -> Tensor:
    """Average two values with a weight."""
    return (1 - weight) * a + weight * b


def biased_after(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an affine operation that adds its bias on its own."""

    def made(x: Tensor, weight: Tensor, bias: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # What is only there for its place is passed without an effect.
        none = torch.zeros_like(bias) if function is torch.conv_tbc else None
        z = function(x, weight, none, *args, **kwargs)
        last = weight.ndim == 2 or none is not None
        return z + (bias if last else bias.reshape(-1, *[1] * (weight.ndim - 2)))

    return made


def normalize(x: Tensor, p: Any = 2.0, dim: Any = 1, eps: Any = 1e-12, out: None = None) -> Tensor:
    """Divide by the norm."""
    return x / vector_norm(x, p, dim, True).clamp_min(eps)


def vector_norm(x: Tensor, p: Any = 2, dim: Dims = None, keepdim: bool = False, dtype: None = None) -> Tensor:
    """Return the root of a sum of powers."""
    p = {"inf": torch.inf, "-inf": -torch.inf, "fro": 2.0, None: 2.0}.get(p, p)
    dims = list(range(x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if p in (torch.inf, -torch.inf):
        return torch.amax(x.abs(), dims, keepdim) if p > 0 else torch.amin(x.abs(), dims, keepdim)
    if p == 1:
        return x.abs().sum(dims, keepdim)
    if p == 2:
        return x.square().sum(dims, keepdim).sqrt()
    if not isinstance(p, (int, float)) or p <= 0 or dtype is not None:
        raise _refuse("norm", f"p={p!r}")
    return x.abs().pow(p).sum(dims, keepdim).pow(1 / p)


def var(
    x: Tensor, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Tensor:
    """Return the mean square of what is left without the mean."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    dims = list(range(x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    less = (1 if unbiased is None else int(unbiased)) if correction is None else correction
    n = 1
    for d in dims:
        n *= x.shape[d]
    return (x - x.mean(dims, keepdim=True)).square().sum(dims, keepdim) / (n - less)


def std(x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """Return the root of the variance."""
    return var(x, dim, *args, **kwargs).sqrt()


def var_mean(
    x: Tensor, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> tuple[Tensor, Tensor]:
    """Return the variance and the mean."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    dims = list(range(x.ndim)) if dim is None else dim
    return var(x, dims, unbiased, keepdim, correction=correction), x.mean(dims, keepdim)


def std_mean(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return the standard deviation and the mean."""
    v, m = var_mean(x, *args, **kwargs)
    return v.sqrt(), m


def cosine_similarity(a: Tensor, b: Tensor, dim: int = 1, eps: Any = 1e-8) -> Tensor:
    """Divide a product by two norms."""
    norms = [vector_norm(t, 2, dim).clamp_min(eps) for t in (a, b)]
    return (a * b).sum(dim) / (norms[0] * norms[1])


def dist(a: Tensor, b: Tensor, p: Any = 2) -> Tensor:
    """Return the norm of a difference."""
    return vector_norm(a - b, p)


def local_response_norm(x: Tensor, size: int, alpha: Any = 1e-4, beta: Any = 0.75, k: Any = 1.0) -> Tensor:
    """Divide by a power of the sum over neighbouring channels."""
    near = functional.pad(x.square().movedim(1, -1), (size // 2, (size - 1) // 2))
    return x / near.unfold(-1, size, 1).mean(-1).movedim(-1, 1).mul(alpha).add(k).pow(beta)


def _lp_pool(d: int) -> Callable[..., Tensor]:
    average = getattr(functional, f"avg_pool{d}d")

    def lp_pool(
        x: Tensor, norm_type: Any, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
    ) -> Tensor:
        sizes = [kernel_size] * d if isinstance(kernel_size, int) else list(kernel_size)
        n = 1
        for size in sizes:
            n *= size
        stride = None if stride in (None, (), []) else stride
        return (average(x.pow(norm_type), kernel_size, stride, 0, ceil_mode) * n).pow(1 / norm_type)

    return lp_pool


def _reduced(t: Tensor, reduction: str) -> Tensor:
    return t.mean() if reduction == "mean" else t.sum() if reduction == "sum" else t


def mse_loss(
    a: Tensor,
    b: Tensor,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    weight: None = None,
) -> Tensor:
    """Return the mean square of a difference."""
    if weight is not None:
        raise _refuse("mse_loss", "weight=")
    return _reduced((a - b).square(), reduction)


def l1_loss(
    a: Tensor,
    b: Tensor,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    weight: None = None,
) -> Tensor:
    """Return the mean size of a difference."""
    if weight is not None:
        raise _refuse("l1_loss", "weight=")
    return _reduced((a - b).abs(), reduction)


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Any = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: Any = 0.0,
) -> Tensor:
    """Return minus the log-probability of the classes."""
    if label_smoothing or target.is_floating_point():
        raise _refuse("cross_entropy", "label smoothing, or targets that are probabilities")
    likely = functional.log_softmax(x, 0 if x.ndim == 1 else 1)
    return functional.nll_loss(likely, target, weight, ignore_index=ignore_index, reduction=reduction)


def binary_cross_entropy_with_logits(
    x: Tensor,
    target: Tensor,
    weight: Any = None,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    pos_weight: Any = None,
) -> Tensor:
    """Sum the log-sigmoids. As softplus less a product it would be a small difference of large values."""
    if pos_weight is not None:
        raise _refuse("binary_cross_entropy_with_logits", "pos_weight=")
    loss = -(target * functional.logsigmoid(x) + (1 - target) * functional.logsigmoid(-x))
    return _reduced(loss if weight is None else loss * weight, reduction)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: Any = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute scores, their softmax, and the mean of values that it weighs."""
    if dropout_p:
        raise _refuse("scaled_dot_product_attention", "dropout")
    if enable_gqa:
        k = k.repeat_interleave(q.size(-3) // k.size(-3), -3)
        v = v.repeat_interleave(q.size(-3) // v.size(-3), -3)
    return torch.matmul(_attending(q, k, attn_mask, is_causal, scale), v)


def _attending(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: Any) -> Tensor:
    k = k - k.mean(-2, keepdim=True)  # what all keys have in common is the same for all, and may be large
    scores = torch.matmul(q * (q.size(-1) ** -0.5 if scale is None else scale), k.transpose(-2, -1))
    if causal and mask is None:
        mask = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return functional.softmax(scores, -1)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: Any,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Project, attend in every head, and project."""
    unusual = any(t is not None for t in (bias_k, bias_v, static_k, static_v)) or add_zero_attn
    if unusual or (training and dropout_p):
        raise _refuse("multi_head_attention_forward", "bias_k, bias_v, static keys, add_zero_attn or dropout")
    single = query.ndim == 2
    if single:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    weights: Sequence[Any] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
    biases: Sequence[Any] = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)

    def heads(t: Tensor, w: Any, b: Any) -> Tensor:
        made = functional.linear(t, w, b)
        return rearrange(made, "place batch (head width) -> batch head place width", head=num_heads)

    q, k, v = (heads(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))
    mask = _added(attn_mask, q)
    if mask is not None and mask.ndim == 3:
        mask = rearrange(mask, "(batch head) ... -> batch head ...", head=num_heads)
    padding = _added(key_padding_mask, q)
    if padding is not None:
        padding = padding[:, None, None, :]
        mask = padding if mask is None else mask + padding
    attending = _attending(q, k, mask, False, None)
    out = rearrange(torch.matmul(attending, v), "batch head place width -> place batch (head width)")
    out = functional.linear(out, out_proj_weight, out_proj_bias)
    seen = attending.mean(1) if average_attn_weights else attending
    if single:
        out, seen = out.squeeze(1), seen.squeeze(0)
    return out, seen if need_weights else None


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask that says True for what is left out, as something to add."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -torch.inf)


COMPOSED: dict[str, Callable[..., Any]] = {
    "glu": glu,
    "addcdiv": addcdiv,
    "normalize": normalize,
    "norm": vector_norm,
    "vector_norm": vector_norm,
    "linalg_vector_norm": vector_norm,
    "var": var,
    "std": std,
    "var_mean": var_mean,
    "std_mean": std_mean,
    "cosine_similarity": cosine_similarity,
    "dist": dist,
    "local_response_norm": local_response_norm,
    "lp_pool1d": _lp_pool(1),
    "lp_pool2d": _lp_pool(2),
    "lp_pool3d": _lp_pool(3),
    "mse_loss": mse_loss,
    "l1_loss": l1_loss,
    "cross_entropy": cross_entropy,
    "binary_cross_entropy_with_logits": binary_cross_entropy_with_logits,
    "scaled_dot_product_attention": attention,
    "multi_head_attention_forward": multi_head_attention,
}
# For what is added to a product, where that is data: each of both has a rule of its own.
ADDED: dict[str, Callable[..., Any]] = {
    "addcmul": addcmul,
    "addcdiv": addcdiv,
    "addmm": added_product,
    "addmv": added_product,
    "baddbmm": added_product,
    "addbmm": addbmm,
}
# For clamps whose bounds are data; with fixed bounds they are functions of one value.
CLAMPS: dict[str, Callable[..., Any]] = {
    "clamp": clamp,
    "clip": clamp,
    "clamp_min": clamp,
    "clamp_max": lambda x, max: clamp(x, None, max),
}
