"""How each operator goes through windows: which box of its result changes, what that box needs, and its values.

A handler takes an ``Operator`` and gives (offsets, patch, shape) of the result, or a list of those for several; or
``NotImplemented`` where it is not local, and whole tensors have to do.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from esegeta.engine.windows import (
    INSIDE,
    POINTWISE,
    Offsets,
    Operator,
    Size,
    Window,
    arranged,
    aten,
    beside,
    convolved,
    empty,
    fit,
    on,
    region,
    windows_in,
    zeros,
)

# --- Element by element -----------------------------------------------------------------------------------

_POINTWISE = (
    *("relu", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh"),
    *("softplus", "sigmoid", "tanh", "threshold", "log_sigmoid", "hardshrink", "softshrink", "celu"),
    *("selu", "relu6", "_prelu_kernel", "add", "sub", "mul", "div", "rsub", "pow", "neg", "abs", "exp"),
    *("exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "square", "reciprocal", "sign"),
    *("sgn", "sin", "cos", "tan", "atan", "atan2", "sinh", "cosh", "erf", "erfc", "floor", "ceil"),
    *("round", "trunc", "frac", "fmod", "remainder", "clamp", "clamp_min", "clamp_max", "maximum"),
    *("minimum", "fmax", "fmin", "where", "gt", "ge", "lt", "le", "eq", "ne", "logical_and"),
    *("logical_or", "logical_not", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not", "isnan"),
    *("isinf", "isfinite", "nan_to_num", "lerp", "addcmul", "addcdiv", "xlogy", "logaddexp"),
    *("masked_fill", "clone", "_to_copy", "zeros_like", "ones_like", "full_like", "logit", "hypot"),
    *("heaviside", "bitwise_xor", "floor_divide", "asin", "acos", "asinh", "acosh", "atanh", "copysign"),
)


INSIDE.update(_POINTWISE)
POINTWISE.update(_POINTWISE)


@on(*_POINTWISE)
def _pointwise(op: Operator) -> Any:
    leaves, spec = tree_flatten((op.args, op.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if op.name == "masked_fill" and isinstance(op.args[2], Window):
        return NotImplemented  # which takes no value for each window
    grids = [t.dtype for t in tensors if t.ndim]
    shape = tuple(torch.broadcast_shapes(*(t.shape for t in tensors)))
    windows = [_aligned(leaf, shape) for leaf in leaves if isinstance(leaf, Window)]
    lo = np.min([w_lo for w_lo, _ in windows], axis=0)
    hi = np.max([w_lo + np.array(w_size) for w_lo, w_size in windows], axis=0)
    lo, size = fit(lo, hi, shape)

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or (not leaf.ndim and not isinstance(leaf, Window)):
            return leaf
        lead = len(shape) - leaf.ndim
        narrow = [a for a in range(leaf.ndim) if leaf.shape[a] != 1]
        start = np.where(np.isin(np.arange(leaf.ndim), narrow), lo[:, lead:], 0)
        extent = tuple(size[lead + a] if a in narrow else 1 for a in range(leaf.ndim))
        if isinstance(leaf, Window):
            here = region(leaf, start, extent)
        elif extent == tuple(leaf.shape):
            here = leaf[None]
        else:
            here = beside([leaf[_at(start[b], extent)] for b in range(len(lo))])
        if not leaf.ndim:
            here = here.to(_beside_grids(leaf.dtype, grids))
        return here.reshape(here.shape[0], *(1,) * lead, *here.shape[1:])

    positional, named = tree_unflatten([part(leaf) for leaf in leaves], spec)
    named.pop("memory_format", None)
    out = op.compute(*positional, **named)
    return lo, out.expand(len(lo), *size), shape


def _beside_grids(number: torch.dtype, grids: list[torch.dtype]) -> torch.dtype:
    """The dtype that a tensor without axes takes part in: it is that of the others, where they are of its kind."""
    other = functools.reduce(torch.promote_types, grids)
    both = torch.result_type(torch.empty(1, dtype=other), torch.empty((), dtype=number))
    return other if both == other else number


def _aligned(window: Window, shape: Size) -> tuple[Offsets, Size]:
    """The box of a window on a grid that it broadcasts to."""
    lead = len(shape) - window.ndim
    lo, size = zeros(len(window.lo), len(shape)), list(shape)
    for a in range(window.ndim):
        if window.shape[a] == shape[lead + a]:
            lo[:, lead + a], size[lead + a] = window.lo[:, a], window.extent[a]
    return lo, tuple(size)


def _at(lo: Any, size: Size) -> tuple[slice, ...]:
    return tuple(slice(int(low), int(low) + n) for low, n in zip(lo, size, strict=True))


@on("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _batch_norm(op: Operator) -> Any:
    name = op.name
    training = op.args[5] if name != "_native_batch_norm_legit_no_training" else False
    x = op.args[0]
    if training or not isinstance(x, Window) or windows_in(op.args[1:]) or not x.full(1):
        return NotImplemented
    out = op.compute(x.patch.flatten(0, 1), *op.args[1:], **op.kwargs)[0]
    unused = (zeros(len(x.lo), 1), out.new_zeros(len(x.lo), 0), (0,))
    return [(x.lo, out.reshape(x.patch.shape), tuple(x.shape)), unused, unused]


INSIDE.update(("native_batch_norm", "_native_batch_norm_legit_no_training", "_softmax", "_log_softmax"))


@on("log_sigmoid_forward")
def _log_sigmoid(op: Operator) -> Any:
    x = op.args[0]
    unused = (zeros(len(x.lo), 1), x.patch.new_zeros(len(x.lo), 0), (0,))
    return [(x.lo, op.func(x.patch)[0], tuple(x.shape)), unused]


@on("glu")
def _gated(op: Operator) -> Any:
    x, dim = op.args[0], (op.args[1] if len(op.args) > 1 else -1) % op.args[0].ndim
    if not x.full(dim):
        return NotImplemented
    return x.lo, op.func(x.patch, dim + 1), tuple(n // 2 if a == dim else n for a, n in enumerate(x.shape))


@on("_softmax", "_log_softmax", "cumsum", "logcumsumexp")
def _along(op: Operator) -> Any:
    x, dim = op.args[0], op.args[1] % op.args[0].ndim
    if not x.full(dim):
        return NotImplemented
    return x.lo, op.func(x.patch, dim + 1, *op.args[2:], **op.kwargs), tuple(x.shape)


# --- Sums and other reductions ----------------------------------------------------------------------------


@on(
    "sum",
    "mean",
    "amax",
    "amin",
    "argmax",
    "argmin",
    "max",
    "min",
    "prod",
    "any",
    "all",
    "logsumexp",
    "var",
    "std",
)
def _reduced(op: Operator) -> Any:
    x = op.args[0]
    name = op.name
    if len(windows_in((op.args, op.kwargs))) > 1 or not isinstance(x, Window):
        return NotImplemented
    named = {a.name: v for a, v in zip(op.func._schema.arguments, op.args, strict=False)} | op.kwargs
    dims = named.get("dim")
    dims = (
        list(range(x.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    )
    dims = sorted(d % x.ndim for d in dims) if x.ndim else []
    keep = bool(named.get("keepdim", False))
    if named.get("other") is not None or not dims:
        return NotImplemented
    left = [a for a in range(x.ndim) if a not in dims]
    shape = tuple(1 if a in dims else x.shape[a] for a in range(x.ndim) if keep or a in left)
    lo = (
        np.stack([np.where(a in dims, 0, x.lo[:, a]) for a in range(x.ndim) if keep or a in left], 1)
        if (keep or left)
        else zeros(len(x.lo), 0)
    )
    if all(x.full(d) for d in dims) and "dim" in named:
        several = isinstance(named["dim"], (list, tuple))
        named["dim"] = [d + 1 for d in dims] if several else dims[0] + 1
        named.pop("self" if "self" in named else "input", None)
        out = op.func(x.patch, **named)
        if isinstance(out, (tuple, list)):
            return [(lo, t, shape) for t in out]
        return lo, out, shape
    if name not in ("sum", "mean"):
        return NotImplemented
    # What is summed differs in the box only. In double precision, as a small difference of large sums.
    terms = named.get("dtype") or x.dtype
    wide = _wide(terms)
    along, count = [d + 1 for d in dims], math.prod(x.shape[d] for d in dims) if name == "mean" else 1
    before, after = region_of_clean(x).to(terms).to(wide), x.patch.to(terms).to(wide)
    difference = (after - before).sum(along, keepdim=keep)
    extent = tuple(difference.shape[1:])
    whole = op.clean()
    if whole.dtype != wide or terms != x.dtype:
        # Summed again from the clean activation, once: its sum in single precision has lost too much.
        whole = _summed(x, dims, keep, terms)
        whole = whole / count if name == "mean" else whole
        op.run.kept[op.step] = (whole,)
    base = beside([whole[b % len(whole)][_at(lo[b], extent)] for b in range(len(lo))])
    total = base + (difference / count if name == "mean" else difference)
    if _cancelled(terms, total * count, before.abs().sum(along, keep), after.abs().sum(along, keep)):
        return NotImplemented
    return lo, total, shape


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else torch.int64


def _cancelled(dtype: torch.dtype, total: Tensor, before: Tensor, after: Tensor) -> bool:
    """Whether a sum is so much smaller than what has been taken out of it that too few digits are left, or none."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return False
    digits = 1e3 if torch.finfo(dtype).eps < 1e-10 else 1e6
    near = before <= digits * torch.maximum(total.abs(), after)
    return not near.is_meta and not bool(near.all())


def region_of_clean(x: Window) -> Tensor:
    """Return the clean values in the boxes of a window, (B, *size)."""
    clean = x.clean
    return beside([clean[b % len(clean)][_at(x.lo[b], x.extent)] for b in range(len(x.lo))])


def _summed(x: Window, dims: list[int], keep: bool, terms: torch.dtype) -> Tensor:
    return x.clean.to(terms).to(_wide(terms)).sum([d + 1 for d in dims], keepdim=keep)


# --- Convolutions and pools -------------------------------------------------------------------------------


def _fold(patch: Tensor) -> Tensor:
    """(B, 1, C, *size) as one batch, in the layout that convolutions run fast in."""
    return arranged(patch.flatten(0, 1))


def _slid(
    x: Window, out: Size, kernel: Any, stride: Any, padding: Any, dilation: Any, lead: int
) -> tuple[Offsets, Size, Offsets, Size]:
    """Of a sliding operator: which box of the result changes, and which box of the input that takes."""
    reach = np.array([(k - 1) * d for k, d in zip(kernel, dilation, strict=True)])
    s, p = np.array(stride), np.array(padding)
    lo, hi = x.lo[:, lead:], x.lo[:, lead:] + np.array(x.extent[lead:])
    out_lo, out_size = fit(-((reach - p - lo) // s), (hi - 1 + p) // s + 1, out[lead:])
    in_size = tuple(int(v) for v in (np.array(out_size) - 1) * s + reach + 1)
    keep = zeros(len(x.lo), lead)
    return (
        np.concatenate([keep, out_lo], 1),
        out_size,
        np.concatenate([keep, out_lo * s - p], 1),
        (*tuple(x.shape[:lead]), *in_size),
    )


def _many(value: Any, axes: int) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * axes if len(value) == 1 else value


@on("convolution")
def _convolution(op: Operator) -> Any:
    x, weight, bias, stride, padding, dilation, transposed, more, groups = op.args
    axes = weight.ndim - 2
    if (
        not isinstance(x, Window)
        or windows_in(op.args[1:])
        or x.ndim != axes + 2
        or not (x.full(0) and x.full(1))
    ):
        return NotImplemented
    kernel = tuple(weight.shape[2:])
    stride, padding, dilation = (_many(v, axes) for v in (stride, padding, dilation))
    none = [0] * axes
    if not transposed:
        across = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
        ]
        shape = (x.shape[0], weight.shape[0], *across)
        lo, size, in_lo, in_size = _slid(x, shape, kernel, stride, padding, dilation, 2)
        batch = _fold(region(x, in_lo, in_size))
        out = convolved(op.func, batch, weight, bias, stride, none, dilation, False, none, groups)
        return lo, out.reshape(len(lo), x.shape[0], weight.shape[0], *size), shape
    more = _many(more, axes)
    reach = np.array([(k - 1) * d for k, d in zip(kernel, dilation, strict=True)])
    s, p = np.array(stride), np.array(padding)
    spatial = tuple(int(v) for v in (np.array(x.shape[2:]) - 1) * s - 2 * p + reach + np.array(more) + 1)
    start = x.lo[:, 2:]
    lo, size = fit(start * s - p, (start + np.array(x.extent[2:]) - 1) * s - p + reach + 1, spatial)
    first = -((reach - lo - p) // s)
    last = (lo + np.array(size) - 1 + p) // s
    offset = lo - (first * s - p)
    # Long enough that what comes out reaches to the end of every box.
    extent = np.maximum((last - first).max(0) + 1, -((reach + 1 - offset.max(0) - np.array(size)) // s) + 1)
    keep = zeros(len(lo), 2)
    batch = _fold(region(x, np.concatenate([keep, first], 1), (*x.shape[:2], *(int(n) for n in extent))))
    out = convolved(op.func, batch, weight, bias, stride, none, dilation, True, none, groups)
    out = out.reshape(len(lo), x.shape[0], *out.shape[1:])
    if (offset == offset[0]).all():
        out = out[(slice(None), slice(None), slice(None), *_at(offset[0], size))]
    else:
        out = beside([out[b][(slice(None), slice(None), *_at(offset[b], size))] for b in range(len(lo))])
    shape = (x.shape[0], out.shape[2], *spatial)
    return np.concatenate([keep, lo], 1), out, shape


def _pooled_shape(x: Window, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> list[int]:
    spatial = []
    for n, k, s, p, d in zip(x.shape[-len(kernel) :], kernel, stride, padding, dilation, strict=True):
        span = n + 2 * p - d * (k - 1) - 1
        count = (-(-span // s) if ceil else span // s) + 1
        if ceil and (count - 1) * s >= n + p:  # the last one would start beyond the image
            count -= 1
        spatial.append(count)
    return spatial


def _pooled(op: Operator) -> tuple[Window, int, list[int], list[int], list[int]]:
    """What pools have in common: input, axes before the grid, kernel, stride, padding."""
    x, axes = op.args[0], 2 if "2d" in op.name else 3
    kernel = _many(op.args[1], axes)
    stride = _many(op.args[2], axes) if len(op.args) > 2 and op.args[2] else kernel
    return x, x.ndim - axes, kernel, stride, _many(op.args[3] if len(op.args) > 3 else 0, axes)


@on("max_pool2d_with_indices", "max_pool3d_with_indices")
def _max_pool(op: Operator) -> Any:
    x, lead, kernel, stride, padding = _pooled(op)
    dilation = _many(op.args[4] if len(op.args) > 4 else 1, len(kernel))
    ceil = bool(op.args[5]) if len(op.args) > 5 else False
    if not all(x.full(a) for a in range(lead)):
        return NotImplemented
    shape = (*x.shape[:lead], *_pooled_shape(x, kernel, stride, padding, dilation, ceil))
    lo, size, in_lo, in_size = _slid(x, shape, kernel, stride, padding, dilation, lead)
    here = region(x, in_lo, in_size, -math.inf)
    out = op.func(here.flatten(0, lead - 1) if lead > 1 else here, kernel, stride, 0, dilation)[0]
    out = out.reshape(len(lo), *x.shape[:lead], *size)
    # Indices into the whole image are not known here: tensors without values, which nothing can compute with.
    return [(lo, out, shape), (lo, torch.empty_like(out, dtype=torch.int64, device="meta"), shape)]


@on("avg_pool2d", "avg_pool3d")
def _avg_pool(op: Operator) -> Any:
    x, lead, kernel, stride, padding = _pooled(op)
    axes = len(kernel)
    ceil = bool(op.args[4]) if len(op.args) > 4 else False
    include = bool(op.args[5]) if len(op.args) > 5 else True
    divisor = op.args[6] if len(op.args) > 6 else None
    if not all(x.full(a) for a in range(lead)):
        return NotImplemented
    once = [1] * axes
    shape = (*x.shape[:lead], *_pooled_shape(x, kernel, stride, padding, once, ceil))
    lo, size, in_lo, in_size = _slid(x, shape, kernel, stride, padding, once, lead)
    here = region(x, in_lo, in_size)
    total = op.func(here.flatten(0, lead - 1), kernel, stride, 0, False, True, 1)
    total = total.reshape(len(lo), *x.shape[:lead], *size)
    if divisor:
        return lo, total / divisor, shape
    rows = []
    for b in range(len(lo)):
        where = "cpu" if total.is_meta else total.device
        share = torch.ones((1,) * lead, dtype=total.dtype, device=where)
        for a in range(axes):
            n, k, s, p = x.shape[lead + a], kernel[a], stride[a], padding[a]
            start = (int(lo[b, lead + a]) + np.arange(size[a])) * s - p
            end = np.minimum(start + k, n + p)
            counted = end - start if include else np.minimum(end, n) - np.maximum(start, 0)
            share = share[..., None] / torch.as_tensor(counted, dtype=total.dtype, device=where)
        rows.append(share)
    return lo, total * torch.stack(rows).to(total.device), shape


@on("constant_pad_nd")
def _padded(op: Operator) -> Any:
    x, pads = op.args[0], list(op.args[1])
    value = op.args[2] if len(op.args) > 2 else 0
    before, after = np.zeros(x.ndim, dtype=np.int64), np.zeros(x.ndim, dtype=np.int64)
    for i in range(len(pads) // 2):
        before[x.ndim - 1 - i], after[x.ndim - 1 - i] = pads[2 * i], pads[2 * i + 1]
    shape = tuple(int(n) for n in np.array(x.shape) + before + after)
    lo, size = fit(x.lo + before, x.lo + before + np.array(x.extent), shape)
    return lo, region(x, lo - before, size, value), shape


# --- Linear along each axis: interpolation, reflection, rolling -------------------------------------------


def _separable(x: Window, matrices: dict[int, Tensor], shape: Size) -> Any:
    """Apply (result, input) matrices, one for each axis that they are given for."""
    lo, hi = x.lo.copy(), x.lo + np.array(x.extent)
    in_lo, in_size = x.lo.copy(), list(x.extent)
    tables = {}
    for axis, matrix in matrices.items():
        used = (matrix != 0).cpu().numpy()
        tables[axis] = used
        for b in range(len(lo)):
            rows = np.flatnonzero(used[:, x.lo[b, axis] : x.lo[b, axis] + x.extent[axis]].any(1))
            lo[b, axis], hi[b, axis] = (rows[0], rows[-1] + 1) if len(rows) else (0, 1)
    lo, size = fit(lo, hi, shape)
    for axis, used in tables.items():
        ends = []
        for b in range(len(lo)):
            columns = np.flatnonzero(used[lo[b, axis] : lo[b, axis] + size[axis]].any(0))
            ends.append((columns[0], columns[-1] + 1) if len(columns) else (0, 1))
        box_lo, box_size = fit(
            np.array([[e[0]] for e in ends]), np.array([[e[1]] for e in ends]), (x.shape[axis],)
        )
        in_lo[:, axis], in_size[axis] = box_lo[:, 0], box_size[0]
    out = region(x, in_lo, tuple(in_size))
    if not out.is_meta and not bool(torch.isfinite(out).all()):
        return NotImplemented  # nothing times infinity is not nothing
    for axis, matrix in matrices.items():
        matrix = matrix.to(out.dtype)
        local = [
            matrix[_at((lo[b, axis], in_lo[b, axis]), (size[axis], in_size[axis]))] for b in range(len(lo))
        ]
        moved = out.movedim(axis + 1, -1)
        flat = moved.reshape(len(lo), -1, in_size[axis])
        out = torch.bmm(flat, torch.stack(local).to(flat.device).transpose(1, 2))
        out = out.reshape(*moved.shape[:-1], size[axis]).movedim(-1, axis + 1)
    return lo, out, shape


def _eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(
        n,
        dtype=like.dtype if like.dtype.is_floating_point else torch.float32,
        device="cpu" if like.is_meta else like.device,
    )


def _one_axis(n: int, like: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """The matrix (result, input) of an operator on (1, rows, n)."""
    return apply(_eye(n, like)[None])[0].T


def _each_spatial(x: Window, count: int, make: Callable[[int, int], Tensor]) -> Any:
    lead = x.ndim - count
    if not x.patch.dtype.is_floating_point:
        return NotImplemented
    matrices = {lead + i: make(i, x.shape[lead + i]) for i in range(count)}
    shape = (*x.shape[:lead], *(len(m) for m in matrices.values()))
    return _separable(x, matrices, shape)


@on("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")
def _linear(op: Operator) -> Any:
    x, sizes, corners, *scales = op.args
    scales = scales or [op.kwargs.get(k) for k in ("scales_d", "scales_h", "scales_w") if k in op.kwargs]
    scales = [*scales, *[None] * len(sizes)][: len(sizes)]
    return _each_spatial(
        x,
        len(sizes),
        lambda i, n: _one_axis(
            n, x.patch, lambda e: aten.upsample_linear1d(e, [sizes[i]], corners, scales[i])
        ),
    )


@on("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
def _nearest(op: Operator) -> Any:
    return _nearest_by(aten.upsample_nearest1d, op)


@on("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
def _nearest_exact(op: Operator) -> Any:
    return _nearest_by(aten._upsample_nearest_exact1d, op)


def _nearest_by(kind: Any, op: Operator) -> Any:
    x, sizes, *scales = op.args
    scales = [*scales, *[None] * len(sizes)][: len(sizes)]
    return _each_spatial(
        x, len(sizes), lambda i, n: _one_axis(n, x.patch, lambda e: kind(e, [sizes[i]], scales[i]))
    )


@on("upsample_bicubic2d")
def _cubic(op: Operator) -> Any:
    x, sizes, corners, *scales = op.args
    scales = [*scales, None, None][:2]

    def make(i: int, n: int) -> Tensor:
        rows = _eye(n, x.patch)[None, :, None, :]  # the other axis has length one, which stays as it is
        return op.func(rows, [1, sizes[i]], corners, None, scales[i])[0, :, 0].T

    return _each_spatial(x, 2, make)


@on(*(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)))
def _mirrored(op: Operator) -> Any:
    x, pads = op.args[0], list(op.args[1])
    count = len(pads) // 2
    kind = aten.reflection_pad1d if "reflection" in op.name else aten.replication_pad1d

    def make(i: int, n: int) -> Tensor:
        last = 2 * (count - 1 - i)
        return _one_axis(n, x.patch, lambda e: kind(e, pads[last : last + 2]))

    return _each_spatial(x, count, make)


@on("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def _adaptive(op: Operator) -> Any:
    x, sizes = op.args
    return _each_spatial(
        x,
        len(sizes),
        lambda i, n: _one_axis(n, x.patch, lambda e: torch.nn.functional.adaptive_avg_pool1d(e, sizes[i])),
    )


@on("flip", "roll")
def _reordered(op: Operator) -> Any:
    x = op.args[0]
    if op.name == "flip":
        moves = {d % x.ndim: functools.partial(torch.flip, dims=(-1,)) for d in op.args[1]}
    elif len(op.args) > 2 and op.args[2]:
        shifts = zip(op.args[1], op.args[2], strict=True)
        moves = {d % x.ndim: functools.partial(torch.roll, shifts=n, dims=-1) for n, d in shifts}
    else:
        return NotImplemented
    if not x.patch.dtype.is_floating_point:
        return NotImplemented
    return _separable(
        x, {a: _one_axis(x.shape[a], x.patch, move) for a, move in moves.items()}, tuple(x.shape)
    )


@on("pixel_shuffle")
def _shuffled(op: Operator) -> Any:
    x, r = op.args
    if not all(x.full(a) for a in range(x.ndim - 2)):
        return NotImplemented
    lo = x.lo.copy()
    lo[:, -2:] *= r
    shape = (*x.shape[:-3], x.shape[-3] // r**2, x.shape[-2] * r, x.shape[-1] * r)
    return lo, op.func(x.patch, r), shape


# --- Axes -------------------------------------------------------------------------------------------------


@on("cat", "stack")
def _joined(op: Operator) -> Any:
    tensors = list(op.args[0])
    dim = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    stacking = op.name == "stack"
    one = next(t for t in tensors if isinstance(t, Window))
    axis = dim % (one.ndim + stacking)
    if any(t.ndim != one.ndim for t in tensors):
        return NotImplemented
    windows = [t for t in tensors if isinstance(t, Window)]
    if not stacking and not all(w.full(axis) for w in windows):
        return NotImplemented
    lo = np.min([w.lo for w in windows], axis=0)
    hi = np.max([w.lo + np.array(w.extent) for w in windows], axis=0)
    bound = [
        max(t.shape[a] for t in tensors) if a == axis and not stacking else one.shape[a]
        for a in range(one.ndim)
    ]
    lo, size = fit(lo, hi, tuple(bound))
    lengths = [1 if stacking else t.shape[axis] for t in tensors]
    inner = list(size[:axis]) + ([] if stacking else [0]) + list(size[axis + (not stacking) :])
    whole = (*size[:axis], sum(lengths), *size[axis + (not stacking) :])
    source = one.patch
    order = (
        sorted(range(len(whole)), key=lambda a: -source.stride(a + 1)) if not stacking else range(len(whole))
    )
    dtype = functools.reduce(
        torch.promote_types, (t.patch.dtype if isinstance(t, Window) else t.dtype for t in tensors)
    )
    out = empty(source, (len(lo), *whole), (0, *(a + 1 for a in order)), dtype)
    start = 0
    for t, length in zip(tensors, lengths, strict=True):
        part = out.select(axis + 1, start) if stacking else out.narrow(axis + 1, start, length)
        extent = size if stacking else (*inner[:axis], length, *inner[axis + 1 :])
        if isinstance(t, Window):
            region(t, lo, extent, out=part)
        else:
            for b in range(len(lo)):
                part[b] = t[_at(lo[b], extent)]
        start += length
    if stacking:
        lo = np.insert(lo, axis, 0, axis=1)
        return lo, out, (*one.shape[:axis], len(tensors), *one.shape[axis:])
    total = sum(t.shape[axis] for t in tensors)
    return lo, out, (*one.shape[:axis], total, *one.shape[axis + 1 :])


@on("select")
def _selected(op: Operator) -> Any:
    x, dim, index = op.args
    axis = dim % x.ndim
    if not x.full(axis):
        return NotImplemented
    return np.delete(x.lo, axis, 1), x.patch.select(axis + 1, index), (*x.shape[:axis], *x.shape[axis + 1 :])


@on("slice")
def _sliced(op: Operator) -> Any:
    x = op.args[0]
    axis = (op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)) % x.ndim
    start = op.args[2] if len(op.args) > 2 else op.kwargs.get("start")
    end = op.args[3] if len(op.args) > 3 else op.kwargs.get("end")
    step = op.args[4] if len(op.args) > 4 else op.kwargs.get("step", 1)
    n = x.shape[axis]
    start, end, step = slice(start, end, step).indices(n)
    if step != 1:
        if not x.patch.dtype.is_floating_point:
            return NotImplemented
        matrix = _eye(n, x.patch)[start:end:step]
        return _separable(x, {axis: matrix}, (*x.shape[:axis], len(matrix), *x.shape[axis + 1 :]))
    shape = (*x.shape[:axis], max(end - start, 0), *x.shape[axis + 1 :])
    shift = np.zeros(x.ndim, dtype=np.int64)
    shift[axis] = start
    lo, size = fit(x.lo - shift, x.lo - shift + np.array(x.extent), shape)
    return lo, region(x, lo + shift, size), shape


@on("unsqueeze")
def _unsqueezed(op: Operator) -> Any:
    x, dim = op.args
    axis = dim % (x.ndim + 1)
    return (
        np.insert(x.lo, axis, 0, axis=1),
        x.patch.unsqueeze(axis + 1),
        (*x.shape[:axis], 1, *x.shape[axis:]),
    )


@on("permute", "transpose", "t", "movedim")
def _permuted(op: Operator) -> Any:
    x, name = op.args[0], op.name
    order = list(range(x.ndim))
    if name == "permute":
        order = [d % x.ndim for d in op.args[1]]
    else:
        a, b = (0, 1) if name == "t" else (op.args[1] % x.ndim, op.args[2] % x.ndim)
        order[a], order[b] = order[b], order[a]
    return x.lo[:, order], x.patch.permute(0, *(a + 1 for a in order)), tuple(x.shape[a] for a in order)


@on("view", "_unsafe_view", "reshape", "squeeze", "_reshape_alias")
def _viewed(op: Operator) -> Any:
    x = op.args[0]
    if op.name == "squeeze":
        gone = (
            range(x.ndim)
            if len(op.args) == 1
            else [op.args[1]]
            if isinstance(op.args[1], int)
            else op.args[1]
        )
        gone = [d % x.ndim for d in gone if x.shape[d] == 1] if x.ndim else []
        shape = tuple(n for a, n in enumerate(x.shape) if a not in gone)
    else:
        if not isinstance(op.args[1], (list, tuple)):
            return NotImplemented  # as another dtype
        shape = tuple(op.args[1])
        if -1 in shape:
            known = math.prod(n for n in shape if n != -1)
            shape = tuple(x.numel() // known if n == -1 else n for n in shape)
    lo, size = [], []
    for old, new in _groups(tuple(x.shape), shape):
        partial = [a for a in old if not x.full(a)]
        if not partial:
            lo += [np.zeros(len(x.lo), dtype=np.int64)] * len(new)
            size += [shape[b] for b in new]
        elif [x.shape[a] for a in old if x.shape[a] != 1] == [shape[b] for b in new if shape[b] != 1]:
            found = iter([a for a in old if x.shape[a] != 1])
            for b in new:
                a = None if shape[b] == 1 else next(found)
                lo.append(np.zeros(len(x.lo), dtype=np.int64) if a is None else x.lo[:, a])
                size.append(1 if a is None else x.extent[a])
        else:
            return NotImplemented
    offsets = np.stack(lo, 1) if lo else zeros(len(x.lo), 0)
    return offsets, x.patch.reshape(len(x.lo), *size), shape


def _groups(old: Size, new: Size) -> list[tuple[list[int], list[int]]]:
    """Axes of two shapes of the same elements, in the smallest groups that hold as many each."""
    out, a, b = [], 0, 0
    while a < len(old) or b < len(new):
        left, right = [], []
        if a < len(old):
            left.append(a)
            a += 1
        if b < len(new):
            right.append(b)
            b += 1
        while True:
            p, q = math.prod(old[i] for i in left), math.prod(new[i] for i in right)
            if p == q and (left or right) and (a < len(old)) == (b < len(new)):
                break
            if p == q and a >= len(old) and b >= len(new):
                break
            if (p < q or b >= len(new)) and a < len(old):
                left.append(a)
                a += 1
            elif b < len(new):
                right.append(b)
                b += 1
            else:
                break
        out.append((left, right))
    return out


@on("expand")
def _expanded(op: Operator) -> Any:
    x = op.args[0]
    lead = len(op.args[1]) - x.ndim
    shape = tuple(x.shape[a - lead] if n == -1 else n for a, n in enumerate(op.args[1]))
    size, lo = list(shape), zeros(len(x.lo), len(shape))
    for a in range(x.ndim):
        if x.shape[a] == shape[lead + a]:
            size[lead + a], lo[:, lead + a] = x.extent[a], x.lo[:, a]
    here = x.patch.reshape(len(x.lo), *(1,) * lead, *x.extent)
    return lo, here.expand(len(x.lo), *size), shape


@on("repeat")
def _repeated(op: Operator) -> Any:
    x, times = op.args
    lead = len(times) - x.ndim
    if not all(n == 1 or x.full(a) for a, n in enumerate(times[lead:])):
        return NotImplemented
    lo = np.concatenate([zeros(len(x.lo), lead), x.lo], 1)
    here = x.patch.reshape(len(x.lo), *(1,) * lead, *x.extent).repeat(1, *times)
    return lo, here, (*times[:lead], *(n * m for n, m in zip(x.shape, times[lead:], strict=True)))


@on("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind")
def _split(op: Operator) -> Any:
    x, name = op.args[0], op.name
    dim = (
        (op.args[1] if len(op.args) > 1 else 0)
        if name == "unbind"
        else (op.args[2] if len(op.args) > 2 else 0)
    )
    axis = op.kwargs.get("dim", dim) % x.ndim
    if not x.full(axis):
        return NotImplemented
    if name == "unbind":
        shape = (*x.shape[:axis], *x.shape[axis + 1 :])
        return [(np.delete(x.lo, axis, 1), part, shape) for part in x.patch.unbind(axis + 1)]
    parts = x.patch.split(op.args[1], axis + 1)
    return [(x.lo, p, (*x.shape[:axis], p.shape[axis + 1], *x.shape[axis + 1 :])) for p in parts]
