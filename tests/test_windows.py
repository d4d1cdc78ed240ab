"""Local evaluation: what is computed window by window equals what is computed as a whole, or is refused."""

import contextlib
import itertools
import math
import threading
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import assert_alike
from torch import nn

import esegeta as eg
from esegeta import features, zoo
from esegeta._registry import REDUCERS
from esegeta.engine import layout, local, windows
from esegeta.engine.execution import DeadlineExceeded, Execution, ExecutionWarning
from esegeta.engine.windows import Missing, NotFollowed, Run, Window, region, zeros

F = nn.functional
strict = settings(
    derandomize=True, deadline=None, database=None, max_examples=90, suppress_health_check=list(HealthCheck)
)


# -- what windows are compared with --------------------------------------------------------------------------------


def boxes_of(shape):
    """Offsets and sizes: one voxel, small, thin, most of the image; in corners, at borders, in the middle."""
    grid = shape[1:]
    for size in ((1,), (2,), (3,), (1, 4), (4, 1, 2), (6,)):
        size = tuple(min(n, s) for n, s in zip(grid, itertools.cycle(size), strict=False))
        far = [n - s for n, s in zip(grid, size, strict=True)]
        places = [[0] * len(far), far, [f // 2 for f in far], [f if a % 2 else 0 for a, f in enumerate(far)]]
        yield [[0, *place] for place in places], (shape[0], *size)
    yield [[0] * len(shape)], tuple(shape)
    channel = (shape[0] - 1) // 2
    yield [[channel, *(n // 3 for n in grid)]] * 2, (1, *(min(n, 2) for n in grid))


def calls_of(x, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for lo, size in boxes_of(tuple(x.shape)):
        patch = torch.randn((len(lo), *size), generator=draw, dtype=torch.float64)
        yield np.array(lo), (3 * patch).to(x.dtype)


def ran(run, fn, x, clean, lo, patch):
    """The result for windows: it is run again with its activations recorded where some are missing."""
    for record in (not run.names, True, True):
        run.begin(record)
        try:
            with torch.no_grad():
                y = fn(Window(run, (-1, 0), tuple(x.shape), clean, lo, patch))
        except Missing:
            continue
        if record:
            run.end()
        return y
    raise AssertionError("activations are missing twice")


def changed(x, lo, patch):
    for at, values in zip(lo.tolist(), patch, strict=True):
        other = x.clone()
        other[tuple(slice(a, a + n) for a, n in zip(at, values.shape, strict=True))] = values
        yield other


def agree(got, want, tolerance):
    assert got.shape == want.shape
    if not (want.is_floating_point() or want.is_complex()):
        assert torch.equal(got.to(want.dtype), want)
        return
    known = torch.where(want.isfinite(), want, 0).abs()
    scale = float(known.max()) if want.numel() else 0.0
    same = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= tolerance * scale)
    assert bool(same.all()), f"differ by {float((got - want).abs().nan_to_num().max()):.3g} of {scale:.3g}"


def let_all_pay(patch):
    """Networks of any size are worth it."""
    patch.setattr(local, "SMALL", 0)
    patch.setattr(windows, "CALLING", 0)


def same_in_windows(fn, x, calls=None, tolerance=1e-12, same_dtype=True):
    """Compare fn for every box; the same run serves all of them, so that what it remembers is put to the test."""
    run, clean = Run(), layout.channels_last(x[None])
    with torch.no_grad():
        untouched = fn(x.clone())
    for lo, patch in calls_of(x) if calls is None else calls:
        y = ran(run, fn, x, clean, lo, patch)
        assert isinstance(y, Window)
        assert (y.dtype == untouched.dtype) or not same_dtype
        y.clean_ = untouched[None]
        got = region(y, zeros(len(lo), y.ndim), tuple(y.shape))
        for b, other in enumerate(changed(x, lo, patch)):
            with torch.no_grad():
                agree(got[b], fn(other), tolerance)
    return run


@contextlib.contextmanager
def unless_refused(why):
    try:
        yield
    except (NotFollowed, ValueError) as refused:
        if why not in str(refused):
            raise


def image(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


GRIDS = {1: (4, 13), 2: (4, 11, 10), 3: (4, 8, 7, 9)}


def alone(module):
    """A network as a function of one example, with weights and statistics of some variety."""
    draw = torch.Generator().manual_seed(5)
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64))
        for b in module.buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape, generator=draw, dtype=torch.float64) + 0.5)
    return lambda x: module(x[None]).squeeze(0)


def nth(name, axes):
    return getattr(nn, f"{name}{axes}d")


# -- one operator --------------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": 2, "stride": 2},
    {"kernel_size": 2, "stride": 3, "padding": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 3, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "stride": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
]
TRANSPOSED = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 2, "stride": 3, "output_padding": 1},
    {"kernel_size": 3, "stride": 3, "dilation": 2, "groups": 2, "padding": 2},
    {"kernel_size": 5, "stride": 1, "padding": 4, "groups": 4},
]
MAX_POOLS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": 2, "stride": 3, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 1},
]
AVERAGES = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": 4, "stride": 3, "padding": 2, "ceil_mode": True, "count_include_pad": False},
]
RESIZED = [
    {"scale_factor": 2, "mode": "nearest"},
    {"scale_factor": 1.7, "mode": "nearest"},
    {"scale_factor": 0.6, "mode": "nearest-exact"},
    {"scale_factor": 2, "mode": "linear"},
    {"scale_factor": 2, "mode": "linear", "align_corners": True},
    {"scale_factor": 1.5, "mode": "linear"},
    {"scale_factor": 0.7, "mode": "linear", "recompute_scale_factor": True},
    {"scale_factor": 0.5, "mode": "area"},
    {"size": 7, "mode": "linear", "align_corners": True},
    {"size": 17, "mode": "nearest"},
]
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def every_axis(configurations):
    """Every configuration on lines and planes; on volumes a sample, and the others with the slow tests."""
    return [
        pytest.param(
            axes,
            c,
            id=f"{axes}d-" + "-".join(f"{k}={v}" for k, v in c.items()),
            marks=pytest.mark.slow if axes == 3 and i % 4 != 2 else (),
        )
        for axes in GRIDS
        for i, c in enumerate(configurations)
    ]


def local_everywhere(fn, x, **how):
    """Right for every box, and local for all that hold every channel."""
    same_in_windows(fn, x, **how)
    run = same_in_windows(fn, x, [c for c in calls_of(x) if c[1].shape[1] == x.shape[0]], **how)
    assert not run.global_ops


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("axes", "how"), every_axis(CONVOLUTIONS))
def test_convolutions(axes, how):
    local_everywhere(alone(nth("Conv", axes)(4, 8, **how)), image(*GRIDS[axes]))


@pytest.mark.parametrize(("axes", "how"), every_axis(TRANSPOSED))
def test_transposed_convolutions(axes, how):
    local_everywhere(alone(nth("ConvTranspose", axes)(4, 8, **how)), image(*GRIDS[axes]))


@pytest.mark.parametrize(("axes", "how"), every_axis(MAX_POOLS))
def test_max_pools(axes, how):
    local_everywhere(alone(nth("MaxPool", axes)(**how)), image(*GRIDS[axes]))


@pytest.mark.parametrize(("axes", "how"), every_axis(AVERAGES))
def test_average_pools(axes, how):
    local_everywhere(alone(nth("AvgPool", axes)(**how)), image(*GRIDS[axes]))


@pytest.mark.parametrize(("axes", "how"), every_axis(RESIZED))
def test_interpolation(axes, how):
    how = {**how, "mode": LINEAR[axes] if how["mode"] == "linear" else how["mode"]}
    local_everywhere(lambda t: F.interpolate(t[None], **how)[0], image(*GRIDS[axes]))


@pytest.mark.parametrize("axes", GRIDS)
@pytest.mark.parametrize(
    ("mode", "pads"),
    [
        ("constant", (1, 2)),
        ("constant", (-2, 3, 1, -1)),
        ("constant", (0, 0, -1, -2)),
        ("reflect", (2, 1)),
        ("replicate", (1, 3)),
        ("replicate", (0, 0)),
    ],
)
def test_padding(axes, mode, pads):
    if mode != "constant":
        pads = pads * axes
    elif len(pads) > 2 * axes:
        pads = pads[: 2 * axes]
    fill = {"value": 1.5} if mode == "constant" else {}
    local_everywhere(lambda t: F.pad(t[None], pads, mode=mode, **fill)[0], image(*GRIDS[axes]))


@pytest.mark.parametrize("axes", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_is_particular_to_a_number_of_axes(axes):
    x = image(*GRIDS[axes])
    local_everywhere(alone(nth("BatchNorm", axes)(4)), x)
    local_everywhere(alone(nth("AdaptiveAvgPool", axes)(1)), x)
    local_everywhere(alone(nth("AdaptiveAvgPool", axes)(3)), x)
    local_everywhere(alone(nth("InstanceNorm", axes)(4, track_running_stats=True)), x)
    if axes == 2:
        local_everywhere(alone(nn.AvgPool2d(3, 2, 1, divisor_override=5)), x)
        local_everywhere(alone(nn.Upsample(size=(12, 15), mode="bicubic")), x)
        local_everywhere(alone(nn.Upsample(scale_factor=1.4, mode="bicubic", align_corners=True)), x)
        local_everywhere(alone(nn.LPPool2d(2, 2)), x)
        local_everywhere(alone(nn.PixelShuffle(2)), x)
        same_in_windows(alone(nn.PixelUnshuffle(5)), image(4, 10, 10))


X = image(4, 9, 10)
MASK = image(9, 10, seed=3) > 0
KERNEL = image(4, 4, 3, 3, seed=4)
MIX = image(3, 4, seed=6)
POINTS = torch.linspace(-1, 1, 40).double().view(1, 4, 5, 2)
SMALLER = F.affine_grid(torch.eye(2, 3).double()[None] * 0.9, (1, 4, 9, 10), True)
ZERO, THIRD = torch.tensor(0.0), torch.tensor(1 / 3, dtype=torch.float64)


def conv(t):
    y = F.conv2d(t[None], KERNEL.to(t.dtype), padding=1)
    return y.reshape(y.shape[1:]).clone()  # which is no view of anything


def put(target, **changes):
    for name, value in changes.items():
        getattr(target, name)(value)
    return target


POINTWISE = {
    "relu module": nn.ReLU(),
    "relu in place": lambda t: nn.ReLU(inplace=True)(t.clone()),
    "relu function": F.relu,
    "relu method": lambda t: t.relu(),
    "relu_": lambda t: torch.relu_(t * 1),
    "leaky": nn.LeakyReLU(0.2),
    "leaky in place": lambda t: nn.LeakyReLU(0.2, inplace=True)(t + 0),
    "prelu": alone(nn.PReLU(4)),
    "elu": nn.ELU(),
    "celu": nn.CELU(),
    "selu": nn.SELU(),
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
    "relu6": nn.ReLU6(),
    "softplus": nn.Softplus(),
    "softsign": nn.Softsign(),
    "softshrink": nn.Softshrink(),
    "hardshrink": nn.Hardshrink(),
    "tanhshrink": nn.Tanhshrink(),
    "threshold": nn.Threshold(0.1, 20.0),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "operators": lambda t: (1 - t) * t / 3 + 2 / (t.abs() + 1) - (-t) ** 2 + 2**t,
    "in place": lambda t: (t * 2).add_(1).sub_(t).mul_(t).div_(3).clamp_(-1, 2).abs_().sqrt_().pow_(2).neg_(),
    "in place with one more": lambda t: (t + 0).addcmul_(t, t, value=2).lerp_(t, 0.3).copysign_(t),
    "operators in place": lambda t: put(t * 1, __iadd__=t, __imul__=2.0, __isub__=t[:1]),
    "broadcast": lambda t: t * t[:1] + t[..., :1] - t[:, 3:4] * torch.arange(10.0, dtype=torch.float64),
    "clamp": lambda t: t.clamp(min=0).clamp(max=t.mean()).clamp_max(0.7),
    "maximum": lambda t: torch.maximum(t, conv(t)) + torch.minimum(t, THIRD) + torch.fmax(t, -t),
    "comparisons": lambda t: ((t > 0) & (t < 1) | ~(t >= -1)) ^ (t.abs() > 0.5),
    "comparisons in place": lambda t: (t > 0).logical_and_(t < 1).logical_or_(t < -1),
    "mask in place": lambda t: put(put(t > 0, __iand__=t < 1), __ior__=t < -1),
    "number from comparison": lambda t: t.clone().gt_(0) + t.clone().lt_(0.5),
    "where": lambda t: torch.where(t > 0, t, 0.0) + torch.where(MASK, t, conv(t)),
    "masked_fill": lambda t: t.masked_fill(MASK, -5.0).masked_fill_(t > 1, 3.0),
    "masked_fill by a number of the image": lambda t: t.masked_fill(MASK, t.sum()),
    "nan": lambda t: torch.nan_to_num(t.log()) + t.log().isnan(),
    "heaviside": lambda t: torch.heaviside(t, THIRD),
    "round": lambda t: t.round() + t.floor() * t.ceil() + t.frac() + t.trunc() + t.sign() + (3 * t) // 2,
    "functions": lambda t: (
        t.sin() + t.cos().exp() + t.square().log1p() + t.abs().rsqrt() + t.atan2(t + 1) + t.erf()
    ),
    "integers": lambda t: (5 * t).int() // 2 % 3 + (t > 0).long() * 7 - ((5 * t).int() & 3),
    "integers in place": lambda t: put((5 * t).int(), add_=3, mul_=torch.tensor(2), __imod__=4),
    "as another type": lambda t: (
        t.float().double() * t.to(torch.int16) + (t > 0).to(t.dtype) + t.bool().byte()
    ),
    "a wider number": lambda t: conv(
        (t.float() * THIRD + THIRD * 2 - t.float() / t.float().amax(0)).double()
    ),
    "a wider image": lambda t: (t.float().add_(t) * 1).mul_(t),
    "comparison with a wider number": lambda t: (
        (0 * t + 0.1).float() >= torch.tensor(0.1, dtype=torch.float64)
    ),
    "complex": lambda t: ((t * 1j).exp() * t).abs() + torch.fft.ifft2(torch.fft.fft2(t)).real,
    "softmax": nn.Softmax(0),
    "log_softmax": nn.LogSoftmax(0),
    "glu": lambda t: F.glu(t, 0),
    "logsigmoid": F.logsigmoid,
    "dropout": nn.Dropout().eval(),
    "sum of channels": lambda t: t.sum(0) + t.mean(0) + t.amax(0) * t.amin(0) + t.prod(0) + t.std(0),
    "several of channels": lambda t: t.max(0)[0] + t.min(0, keepdim=True)[1] + t.argmax(0) + t.logsumexp(0),
    "any of channels": lambda t: (t > 1).any(0) & ~(t > -1).all(0),
    "cumulated channels": lambda t: t.cumsum(0) + t.cumsum(0, dtype=torch.float64),
    "instance of a channel": lambda t: t[1] * t[-1] + t[::2].sum(0) + t.select(0, 2),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_operators(name):
    same_in_windows(POINTWISE[name], X)
    if name not in ("complex", "nan", "masked_fill by a number of the image"):
        full = [c for c in calls_of(X) if c[1].shape[1] == len(X)]
        assert not same_in_windows(POINTWISE[name], X, full).global_ops


SHAPES = {
    "view": lambda t: t.view(2, 2, 9, 10).sum(0).view(1, 2, 9, 1, 10)[0, :, :, 0],
    "flatten": lambda t: t.flatten(1).sum(0) + t.reshape(-1)[:90],
    "unflatten": lambda t: t.unflatten(0, (2, 2)).sum(1) + t.view(4, 9, 5, 2)[:2].sum(-1).repeat_interleave(2, -1),
    "squeeze": lambda t: t[None, :, None].squeeze(0).squeeze() + t.unsqueeze(-1).squeeze(-1),
    "permute": lambda t: t.permute(2, 0, 1).transpose(0, 2).movedim(0, 1).mT + t.swapaxes(0, 1).sum(),
    "transpose": lambda t: t[0].t() + t[1].T,
    "expand": lambda t: t[:1].expand(4, 9, 10) * t + t[:, :1].expand_as(t) + t[:1, :1].expand(4, -1, 10),
    "plain to windows": lambda t: THIRD.expand_as(t) * t + ZERO.to(t) + MASK.type_as(t).view_as(t[0]),
    "repeat": lambda t: t.repeat(2, 1, 1)[:4] * t.tile(2)[..., :10],
    "slices": lambda t: t[:, 2:-1, :7] + t[:, 2:8, 3:] * t[..., -7:][:, :6],
    "strides": lambda t: t[:, ::2, 1::3] + t[:, ::2, ::3][..., :3],
    "narrow": lambda t: t.narrow(1, 3, 4) + t.narrow(-2, 0, 4),
    "one row": lambda t: t[:, 3] + t[..., 4, :] * t.select(1, -1),
    "empty": lambda t: torch.cat([t[:, 5:5], t], 1)[:, 9:].sum() + t.sum(),
    "index": lambda t: t[:, [0, 2]] + t[:, MASK.any(1).nonzero()[:2, 0]] + t.index_select(1, torch.tensor([1, 0])),
    "mask": lambda t: t[:, MASK].sum(0),
    "gather": lambda t: t.gather(1, torch.zeros(4, 2, 10).long()) + t.take_along_dim(t.argmin(1, True), 1),
    "split": lambda t: (lambda a, b: a * b)(*t.split(2)) + t.split_with_sizes([1, 1, 2])[1],
    "chunk": lambda t: math.prod(t.chunk(4)) + math.prod(t.unbind(0)) + math.prod(t.tensor_split(2)).sum(0),
    "chunk in space": lambda t: math.prod(t.chunk(2, -1)) + math.prod(t.split(5, 2)),
    "unsafe": lambda t: math.prod(torch.unsafe_chunk(t, 2)) + math.prod(torch.unsafe_split(t, 2)),
    "foreach": lambda t: sum(torch._foreach_mul([t, conv(t)], 3.0)),
    "cat": lambda t: torch.cat([t, conv(t), torch.ones_like(t[:1]), MASK[None] * 1.0]),
    "cat in space": lambda t: torch.cat([t, 2 * t[:, :2]], 1),
    "cat with nothing": lambda t: torch.cat([torch.zeros(0, dtype=torch.float64), t]),
    "cat of types": lambda t: torch.cat([t > 0, (3 * t).int(), t.float()]),
    "stack": lambda t: torch.stack([t, 2 * t], 1).amax(1) + torch.stack([t, -t], -1)[..., 0],
    "flip": lambda t: t.flip(-1) + t.flip(1, 2) * t.flip(0),
    "roll": lambda t: t.roll(2, -1) + t.roll((1, -3), (1, 2)) + t.roll(3),
    "rotate": lambda t: torch.rot90(t, 1, (1, 2)),
    "unfold": lambda t: F.unfold(t[None], 3) .sum() + t.unfold(1, 3, 2)[..., 0],
    "diagonal": lambda t: t.diagonal(dim1=1, dim2=2) + t[0].tril().sum() + torch.diag_embed(t[:, 0]).sum(),
    "grid_sample": lambda t: F.grid_sample(t[None], POINTS, align_corners=False)[0],
    "affine": lambda t: F.grid_sample(t[None], SMALLER, align_corners=True)[0],
    "linear": lambda t: F.linear(t.movedim(0, -1), MIX).movedim(-1, 0),
    "einsum": lambda t: torch.einsum("chw,dc->dhw", t, MIX) + torch.einsum("chw,chw->hw", t, t),
    "matmul": lambda t: t @ t.mT + torch.bmm(t, t.transpose(1, 2)),
    "attention": lambda t: (lambda q: F.scaled_dot_product_attention(q, 2 * q, q))(t.flatten(1).T[None]),
    "cumulated": lambda t: t.cumsum(1) + t.cumprod(2) + t.flip(2).cummax(2)[0],
    "sort": lambda t: t.sort(1)[0] + t.topk(2, 2)[0].sum() + t.median() + t.kthvalue(2, 1)[0].sum(),
    "adaptive max": lambda t: F.adaptive_max_pool2d(t[None], 3)[0],
    "unique": lambda t: torch.unique((t > 0.3).long()).sum() + t,
    "deep copy": lambda t: t.clone().detach().contiguous().requires_grad_(False) + t.data + t.cpu(),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    same_in_windows(SHAPES[name], X)


@pytest.mark.parametrize(
    "name",
    [
        *("squeeze", "permute", "transpose", "expand", "plain to windows", "slices", "strides", "narrow"),
        *("split", "unsafe", "cat", "cat of types", "stack", "flip", "channels again"),
    ],
)
def test_shapes_that_are_local(name):
    fn = {**SHAPES, "channels again": lambda t: t.repeat(2, 1, 1) + t.repeat(3, 2, 1, 1)[0]}[name]
    local_everywhere(fn, X)


def soft_dice(t):
    p = t[1].sigmoid()
    return 2 * (p * MASK).sum() / (p.sum() + MASK.sum())


SUMS = {
    "sum": lambda t: t.sum(),
    "sum of some": lambda t: t.sum((1, 2)) * t.mean(2).sum(1),
    "kept": lambda t: t - t.mean((1, 2), keepdim=True) + t.sum(1, keepdim=True),
    "mean": lambda t: t.mean() + t[1].mean(0).sum(),
    "as another type": lambda t: t.sum(dtype=torch.float32).double() + (t > 0).sum(dtype=torch.float64) / 7,
    "as integers": lambda t: (3 * t).sum((1, 2), dtype=torch.int64) + (t > 0).sum((1, 2), dtype=torch.int8),
    "count": lambda t: (t > 0).sum() + (t.argmax(0) == 1).sum((0,)),
    "mean of a mask": lambda t: (t > 0).double().mean() + (t > 0).float().mean().double(),
    "complex": lambda t: (t * 1j).exp().sum().abs(),
    "dice": soft_dice,
    "masked mean": lambda t: (t[0] * (t[1] > 0)).sum() / (t[1] > 0).sum().clamp(min=1),
    "norm": lambda t: t.norm() + t.square().sum().sqrt() + torch.linalg.vector_norm(t, dim=0).sum(),
    "entropy": lambda t: -(t.softmax(0) * t.log_softmax(0)).sum(),
    "extremes": lambda t: t.amax((1, 2)) - t.amin((1, 2)) + t.max() * t.min() + t.argmax(),
    "variance": lambda t: t.var() + t.std((1, 2)).sum() + torch.var_mean(t, 0)[1].sum(),
    "nansum": lambda t: t.log().nansum() + t.log().nanmean(),
    "logsumexp": lambda t: t.logsumexp((0, 1, 2)),
    "total variation": lambda t: (t[:, 1:] - t[:, :-1]).abs().sum() + t.diff(dim=2).square().mean(),
    "distance": lambda t: F.mse_loss(t, X.roll(1, 1)) + F.l1_loss(t, X * 0) + F.huber_loss(t, X * 0),
    "cross entropy": lambda t: F.cross_entropy(t[None], MASK.long()[None]) + F.nll_loss(t[None], MASK.long()[None]),
    "binary cross entropy": lambda t: F.binary_cross_entropy_with_logits(t, (X > 0).double()),
    "cosine": lambda t: F.cosine_similarity(t.flatten(), X.flatten() + 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_sums_and_other_reductions(name):
    rough = name in ("as another type", "mean of a mask")  # which are in single precision
    same_in_windows(SUMS[name], X, tolerance=1e-4 if rough else 1e-11)


def test_a_sum_of_which_almost_all_is_taken_away():
    x = torch.rand(1, 8, 8).double()
    x[0, 3, 3] = 60.0
    cancelling = {
        "logarithm": lambda t: t.exp().sum().log(),
        "mean": lambda t: t.exp().mean((1, 2), keepdim=True).log() * t,
        "one axis": lambda t: t.exp().sum(2).log(),
    }
    gone = (np.array([[0, 2, 2]]), torch.zeros(1, 1, 3, 3).double())
    elsewhere = (np.array([[0, 5, 5]]), torch.zeros(1, 1, 3, 3).double())
    for fn in cancelling.values():
        same_in_windows(fn, x, [gone, elsewhere, gone])
        same_in_windows(lambda t: fn(t.float()).double(), x, [gone, elsewhere], tolerance=1e-5)


def test_infinities_stay_where_they_are():
    x = X.clamp(min=0)
    for fn in (
        lambda t: t.log().flip(-1).exp(),
        lambda t: F.interpolate(t.log()[None], scale_factor=2)[0].exp(),
        lambda t: F.pad(t.log()[None], (1, 1, 1, 1), mode="reflect")[0].exp(),
        lambda t: t.log()[:, ::2].exp(),
        lambda t: t.log().roll(1, 1).exp(),
        lambda t: F.max_pool2d(t.log(), 2).exp(),
        lambda t: t.log().sum((1, 2)).exp() + t.log().mean(1).exp().sum(),
        lambda t: torch.where(MASK, t.log(), 0).sum(),
        lambda t: (1 / t).amin(0).sum(),
    ):
        same_in_windows(fn, x)


def test_single_precision():
    x = image(4, 12, 11, dtype=torch.float32)
    kernel = KERNEL.float()
    gate = lambda t: t * F.conv2d(F.adaptive_avg_pool2d(t[None], 1), kernel[:, :, :1, :1])[0].sigmoid()
    for fn in (
        conv,
        lambda t: conv(gate(conv(t))),
        lambda t: conv(t - t.mean((1, 2), keepdim=True)),
        lambda t: conv(t / (t.sum() + 100)),
        lambda t: conv(t * torch.tensor(2.0, dtype=torch.float64)),
        lambda t: F.linear(t.mean((1, 2))[None], MIX.float()).softmax(1),
        lambda t: torch.stack([t.sum(), t.mean()]) * kernel[0, 0, 0, :2],
    ):
        same_in_windows(fn, x, tolerance=1e-5)


# -- what is written, and what is looked at ------------------------------------------------------------------------


def aliased(t):
    y = conv(t)
    skip = y
    y.relu_()
    return conv(skip) + y


def listed(t):
    seen = []
    y = conv(t)
    seen.append(y)
    y += 1
    return conv(seen[0])


def written(read, write):
    """Write into something that was read off an activation, then use the activation."""

    def fn(t):
        y = conv(t)
        write(read(y))
        return conv(y) + y.sum()

    return fn


def stored(make, fill):
    def fn(t):
        y = conv(t)
        out = make(y)
        fill(out, y)
        return conv(out)

    return fn


double = lambda t: t.mul_(2)
VIEWS = {
    "view": lambda y: y.view(-1)[3:50],
    "channel": lambda y: y[0],
    "slice": lambda y: y[:, 2:4],
    "strides": lambda y: y[..., ::2],
    "transposed": lambda y: y.transpose(1, 2),
    "permuted": lambda y: y.permute(2, 0, 1),
    "flattened": lambda y: y.flatten(),
    "expanded": lambda y: y.unsqueeze(0),
    "diagonal": lambda y: y[0].diagonal(),
    "diagonal of several": lambda y: y.diagonal(dim1=1, dim2=2),
    "unfolded": lambda y: y.unfold(1, 3, 3),
    "strided": lambda y: y.as_strided((4, 9), (90, 1)),
    "split": lambda y: y.split(2)[1],
    "chunk": lambda y: y.chunk(2, 2)[0],
    "unbound": lambda y: y.unbind(1)[3],
    "detached": lambda y: y.detach(),
    "data": lambda y: y.data,
    "data of a view": lambda y: y.data[1].detach(),
    "contiguous": lambda y: y.contiguous(),
    "itself": lambda y: y,
    "real": lambda y: torch.view_as_real(torch.view_as_complex(y.view(4, 9, 5, 2))),
    "movedim": lambda y: y.movedim(0, 2),
    "narrow": lambda y: y.narrow(1, 0, 3),
    "squeezed": lambda y: y[None].squeeze(0),
    "squeezed in place": lambda y: y[None].squeeze_(0),
    "reshaped": lambda y: y.reshape(2, 2, 9, 10),
    "unflattened": lambda y: y.unflatten(0, (2, 2)),
}
WRITERS = {f"a view: {n}": written(r, double) for n, r in VIEWS.items()}
WRITERS |= {f"a set view: {n}": written(r, lambda t: t.fill_(2.0)) for n, r in VIEWS.items()}
WRITERS |= {
    "skip": aliased,
    "list": listed,
    "setitem": written(lambda y: y, lambda y: y.__setitem__((slice(None), 2), 7.0)),
    "setitem of windows": written(lambda y: y, lambda y: y.__setitem__((slice(0, 1), 2), y[1:2, 5])),
    "setitem by a mask": written(lambda y: y, lambda y: y.__setitem__(y > 0, 0.0)),
    "setitem by a known mask": written(lambda y: y, lambda y: y.__setitem__((slice(None), MASK), 0.5)),
    "setitem by numbers": written(lambda y: y, lambda y: y.__setitem__((slice(None), [0, 2]), 0.5)),
    "index_add_": written(lambda y: y, lambda y: y.index_add_(0, torch.tensor([1]), y[:1] * 2)),
    "scatter_": written(lambda y: y, lambda y: y.scatter_(0, torch.zeros(1, 9, 10, dtype=torch.int64), 3.0)),
    "swap": written(lambda y: y, lambda y: y.__setitem__(0, y[1].clone())),
    "copy_ of itself": written(lambda y: y, lambda y: y.copy_(y.flip(1))),
    "copy_ of one channel": written(lambda y: y, lambda y: y.copy_(y[:1] * 2)),
    "zero_": written(lambda y: y, lambda y: y.zero_()),
    "into itself": written(lambda y: y, lambda y: torch.mul(y, 2, out=y)),
    "data replaced": written(lambda y: y, lambda y: setattr(y, "data", y * 2)),
    "transpose_": written(lambda y: y, lambda y: y.transpose_(1, 2).transpose_(1, 2).mul_(3)),
    "unsqueeze_": written(lambda y: y, lambda y: y.unsqueeze_(0).mul_(3).squeeze_(0)),
    "out of the operator": stored(torch.empty_like, lambda out, y: torch.add(y, 1, out=out)),
    "filled": stored(torch.empty_like, lambda out, y: out.fill_(0.0).add_(y)),
    "copied": stored(torch.empty_like, lambda out, y: out.copy_(y)),
    "copied in parts": stored(torch.zeros_like, lambda out, y: out[1:].copy_(y[:3])),
    "set in parts": stored(torch.ones_like, lambda out, y: out.__setitem__(slice(2), y[:2])),
    "new": stored(lambda y: y.new_zeros(y.shape), lambda out, y: out.__setitem__((slice(None), 3), y[:, 1])),
    "plain": stored(lambda y: torch.zeros(4, 9, 10).double(), lambda out, y: out.add_(y)),
    "plain and copied": stored(lambda y: torch.zeros(4, 9, 10).double(), lambda out, y: out.copy_(y)),
    "plain and indexed": stored(
        lambda y: torch.zeros(4, 9, 10).double(), lambda out, y: out.index_put_((torch.tensor([1]),), y[:1])
    ),
    "accumulated": lambda t: sum((k * conv(t) for k in range(3)), torch.zeros_like(t)),
    "its input": lambda t: conv(t.mul_(2)) + t,
    "a copy that is transposed": lambda t: (lambda y: (y.transpose(1, 2).contiguous().add_(1), conv(y))[1])(conv(t)),
    "circular padding": lambda t: F.conv2d(F.pad(t[None], (1, 1, 1, 1), mode="circular"), KERNEL)[0],
    "random leaky": lambda t: F.rrelu(conv(t)) + t,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_followed_or_refused(name):
    fn = WRITERS[name]
    x, score = X, lambda t: (fn(t.clone()) * X.roll(2, 1)).sum()
    calls = list(calls_of(x))[:4]
    try:
        same_in_windows(lambda t: fn(t.clone()), x, calls)
    except NotFollowed:
        want = loop(score, x, features.windows(3))
        with eg.execution() as run, pytest.MonkeyPatch.context() as patch:
            let_all_pay(patch)
            agree(eg.occlusion(from_one(score), size=3)(x, 0 * x), want, 1e-11)
        assert run.events[0]["evaluation"] == "whole"
    else:
        assert name not in REFUSED_WRITERS


REFUSED_WRITERS = {f"a view: {n}" for n in VIEWS} - {
    "a view: itself",
    "a view: data",
    "a view: detached",
    "a view: contiguous",
} | {"out of the operator", "plain", "copied", "data replaced", "circular padding"}


def from_one(score):
    """A score that no transform looks into."""
    model = eg.from_module(lambda xs: torch.stack([score(x) for x in xs])[:, None])
    return lambda x: model(x)[0]


def loop(score, x, parts, baseline=None):
    """One run after the other."""
    baseline = torch.zeros_like(x) if baseline is None else baseline
    found = parts(x)
    drops = []
    with torch.no_grad():
        for j in range(found.count):
            kept = found.without(torch.tensor(j)).to(x.dtype)
            drops.append(score(x.clone()) - score(kept * x + (1 - kept) * baseline))
        return found.spread(torch.stack(drops)).expand_as(x)


LOOKS = {
    "if": lambda t: conv(t) if t.sum() > 0 else t,
    "item": lambda t: t * t.sum().item(),
    "float": lambda t: t * float(t[0, 0, 0]),
    "int": lambda t: t[:, : 1 + int(t.abs().sum()) % 5],
    "numpy": lambda t: t * t.numpy().sum(),
    "detached numpy": lambda t: t * torch.from_numpy(np.tanh(t.detach().cpu().numpy())),
    "list": lambda t: t * torch.tensor(t.flatten().tolist()).sum(),
    "allclose": lambda t: t if torch.allclose(t, X) else t * 2,
    "equal": lambda t: t if torch.equal(t, X) else t * 2,
    "in": lambda t: t if 0.0 in t else t * 2,
    "for": lambda t: sum(float(v) for v in t.flatten()) * t,
    "text": lambda t: t * float(f"{t.sum():.3f}"),
    "caught": lambda t: t * attempt(t),
    "caught later": lambda t: (lambda k: conv(t) * k)(attempt(t)),
    "number of voxels": lambda t: conv(t) * len((t > 0).nonzero()),
    "number of voxels above": lambda t: conv(conv(t) * t[t > 0].shape[0]),
    "slice by number of voxels": lambda t: conv(t)[:, : 1 + (t > 0).nonzero().shape[0] % 7],
    "number of labels": lambda t: conv(conv(t) * torch.unique((t > 1.5).long()).numel()),
    "repeated": lambda t: torch.repeat_interleave(t[0, 0], (t[0, 0] > 0).long()).sum() * t,
    "memory": lambda t: conv(t) * (2 if t.data_ptr() else 1),
}


# Not only what the engine refuses: torch has no memory to show, and no rows of several lengths.
LOOKED = (NotFollowed, RuntimeError, TypeError)


def attempt(t):
    try:
        return float(t.sum())
    except Exception:
        return 0.0


@pytest.mark.parametrize("name", LOOKS)
def test_what_looks_at_values_is_refused_and_right(name):
    fn = LOOKS[name]
    calls = list(calls_of(X))[:5]
    followed = name == "number of labels"  # where there are as many labels in every image of the loop
    with contextlib.suppress(NotFollowed) if followed else pytest.raises(LOOKED):
        same_in_windows(fn, X, calls)
    score = lambda t: fn(t).square().sum()
    with eg.execution() as run, pytest.MonkeyPatch.context() as patch:
        let_all_pay(patch)
        got = eg.occlusion(from_one(score), size=3)(X, 0 * X)
    agree(got, loop(score, X, features.windows(3)), 1e-11)
    assert run.events[0]["evaluation"] == "whole" or followed


def test_a_path_that_depends_on_the_size_of_a_result_is_refused_in_later_runs():
    x = torch.zeros(1, 6, 6).double()
    fn = lambda t: F.avg_pool2d((t + 1)[None], 3, 1, 1)[0] * (1 + (t > 0).nonzero().shape[0])
    same = (np.array([[0, 1, 1]]), torch.zeros(1, 1, 2, 2).double())
    other = (np.array([[0, 1, 1]]), torch.ones(1, 1, 2, 2).double())
    same_in_windows(fn, x, [same])
    with pytest.raises(NotFollowed, match="the size of what the network computes depends on values"):
        same_in_windows(fn, x, [same, other])


def test_operators_of_other_libraries_are_no_local_ones():
    if not hasattr(torch.ops.esegeta_tests, "relu"):

        @torch.library.custom_op("esegeta_tests::relu", mutates_args=())
        def relu(x: torch.Tensor) -> torch.Tensor:
            return x.roll(1, -1).clone()

    run = same_in_windows(lambda t: torch.ops.esegeta_tests.relu(conv(t)), X, list(calls_of(X))[:4])
    assert run.global_ops == {"relu"}


def test_tensors_of_an_earlier_run_are_refused():
    kept, run = [], Run()
    lo, patch = next(iter(calls_of(X)))

    def fn(t):
        kept.append(t * 2)
        return t + kept[0]

    def random(t):
        return conv(t + torch.randn_like(t))

    with pytest.raises(NotFollowed, match="draws random numbers"):
        same_in_windows(random, X)

    ran(run, fn, X, X[None], lo, patch)
    with pytest.raises(NotFollowed, match="another run has left behind"):
        ran(run, fn, X, X[None], lo, patch)


def test_constants_that_a_network_keeps_are_plain(however_small):
    class Grid(nn.Module):
        def __init__(self):
            super().__init__()
            self.ones = None
            self.conv = nn.Conv2d(3, 1, 3).double()

        def forward(self, x):
            if self.ones is None:
                self.ones = torch.ones_like(x[:1, :1])
            return self.conv(torch.cat([x, self.ones.expand(len(x), -1, -1, -1)], 1))

    net = Grid()
    model = eg.from_module(net)
    score = lambda t: model(t).square().sum()
    x = image(2, 9, 9)
    got = explained(score, x, features.windows(3), "auto")[0]
    assert type(net.ones) is torch.Tensor
    agree(got, loop(score, x, features.windows(3)), 1e-11)


def test_networks_keep_no_windows(however_small):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.ones = None
            self.conv = nn.Conv2d(3, 1, 3).double()

        def forward(self, x):
            if self.ones is None or len(self.ones) != len(x):
                self.ones = 0 * x[:, :1] + 1
            return self.conv(torch.cat([x, self.ones], 1))

    net = Keeping()
    model = eg.from_module(net)
    x = image(2, 9, 9)
    score = lambda t: model(t).square().sum()
    agree(explained(score, x, features.grid(3), "auto")[0], loop(score, x, features.grid(3)), 1e-11)
    assert type(net.ones) is torch.Tensor


def test_a_score_that_catches_what_is_refused():
    def score(t):
        y, z = t.square().sum(), t.sum()
        try:
            return z if bool(t[0, 0, 0] == 0) else y
        except Exception:
            return y

    x = image(1, 9, 9)
    with pytest.raises(ValueError, match="looks at values"):
        explained(score, x, features.grid(3), "windows")


# -- whole networks ------------------------------------------------------------------------------------------------


def network(axes, seed, plan):
    """A network of these operators, on (4, *S), in place and on views; everything keeps four channels."""
    draw = torch.Generator().manual_seed(seed)
    weight = lambda *shape: (
        torch.randn(shape, generator=draw, dtype=torch.float64) / math.sqrt(math.prod(shape[1:]))
    )
    pick = lambda n: int(torch.randint(n, (), generator=draw))
    convolve = getattr(F, f"conv{axes}d")
    transposed = getattr(F, f"conv_transpose{axes}d")
    largest, average = getattr(F, f"max_pool{axes}d"), getattr(F, f"avg_pool{axes}d")
    three = (3,) * axes
    shared = weight(4, 4, *three)
    saved = []

    def spatial(y):
        return tuple(y.shape[2:])

    def plain(size):
        pattern = torch.cos(torch.arange(math.prod(size), dtype=torch.float64))
        return pattern.reshape(size)

    def joined(weights):
        def op(y, skips):
            if not skips:
                return y
            skip = skips.pop()
            y = F.interpolate(y, size=spatial(skip), mode=LINEAR[axes], align_corners=False)
            return convolve(torch.cat([skip, y], 1), weights)

        return op

    def make(kind):
        w, tall = weight(4, 4, *three), weight(4, 4, *(2,) * axes)
        grouped, pair, gate = weight(4, 2, *three), weight(4, 8, *(1,) * axes), weight(4, 4)
        k = pick(3)
        return {
            "conv": lambda y, s: convolve(y, w, padding=1),
            "down": lambda y, s: convolve(y, w, padding=1, stride=2),
            "dilated": lambda y, s: convolve(y, grouped, padding=2, dilation=2, groups=2),
            "shared": lambda y, s: convolve(y, shared, padding=1),
            "max": lambda y, s: largest(y, 2, ceil_mode=bool(k % 2)),
            "mean": lambda y, s: average(y, 3, 2, 1, ceil_mode=bool(k % 2), count_include_pad=k > 1),
            "up": lambda y, s: transposed(y, tall, stride=2),
            "up and out": lambda y, s: transposed(y, w, stride=2, padding=1, output_padding=1),
            "linear": lambda y, s: F.interpolate(y, scale_factor=(2, 1.5, 0.8)[k], mode=LINEAR[axes]),
            "nearest": lambda y, s: F.interpolate(y, scale_factor=(2, 1.5, 0.8)[k]),
            "relu_": lambda y, s: y.relu_(),
            "leaky": lambda y, s: F.leaky_relu(y, 0.1),
            "alias": lambda y, s: (lambda skip: skip + y.tanh_() * skip)(y),
            "norm": lambda y, s: F.batch_norm(y, gate[0], gate[1].abs() + 0.1, gate[2], gate[3]),
            "save": lambda y, s: (s.append(y), y * 1)[1],
            "join": joined(pair),
            "view": lambda y, s: y.reshape(1, 2, 2, *spatial(y)).flip(2).reshape(y.shape) + 0,
            "turn": lambda y, s: y.transpose(-1, 1).contiguous().transpose(-1, 1) * plain(spatial(y)),
            "softmax": lambda y, s: y.softmax(1),
            "crop": lambda y, s: y[..., 1:-1],
            "pad": lambda y, s: F.pad(y, (1, 2) * axes, mode=("reflect", "replicate", "constant")[k]),
            "roll": lambda y, s: y.roll(1 + k, -1) + y.flip(2),
            "halves": lambda y, s: (lambda a, b: torch.cat([a * b.sigmoid(), b], 1))(*y.chunk(2, 1)),
            "write": lambda y, s: (y + 0).mul_(y.mean(1, keepdim=True)).clamp_(-3, 3),
            "instance": lambda y, s: F.instance_norm(y),
            "squeeze": lambda y, s: (
                y * (y.mean(tuple(range(2, y.ndim))) @ gate).sigmoid()[(...,) + (None,) * axes]
            ),
        }[kind]

    ops = [make(kind) for kind in plan]

    def run(x):
        y, skips = x[None], list(saved)
        for kind, op in zip(plan, ops, strict=True):
            n = spatial(y)
            shrinks = kind in ("down", "max", "mean", "crop", "linear", "nearest")
            grows = kind in ("up", "up and out", "linear", "nearest", "pad")
            if (shrinks and min(n) < 5) or (grows and math.prod(n) > 1500) or min(n) < 4:
                continue
            y = op(y * 1 if kind == "relu_" and y._base is not None else y, skips)
        return y.squeeze(0)

    return run


LOCAL_KINDS = [
    *("conv", "conv", "down", "dilated", "shared", "max", "mean", "up", "up and out", "linear", "nearest"),
    *("relu_", "leaky", "alias", "norm", "save", "save", "join", "join", "view", "turn", "softmax", "crop"),
    *("pad", "roll", "halves", "write"),
]
KINDS = [*LOCAL_KINDS, "instance", "squeeze"]


@pytest.mark.slow
@given(
    axes=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 10**6),
    plan=st.lists(st.sampled_from(KINDS), min_size=3, max_size=9),
    repeats=st.permutations(range(4)),
)
@strict
def test_random_networks(axes, seed, plan, repeats):
    fn = network(axes, seed, plan)
    grid = {1: (17,), 2: (11, 9), 3: (6, 7, 8)}[axes]
    x = image(4, *grid, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    calls = []
    for _ in range(4):
        size = [1 + int(torch.randint(min(4, n), (), generator=draw)) for n in grid]
        count = 1 + int(torch.randint(3, (), generator=draw))
        lo = [
            [0, *(int(torch.randint(n - s + 1, (), generator=draw)) for n, s in zip(grid, size, strict=True))]
            for _ in range(count)
        ]
        calls.append((np.array(lo), torch.randn((count, 4, *size), generator=draw, dtype=torch.float64)))
    calls += [calls[i] for i in repeats]
    with unless_refused("views"):
        same_in_windows(fn, x, calls, tolerance=1e-10 if "instance" in plan else 1e-11)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_most_random_networks_are_local(axes):
    draw = torch.Generator().manual_seed(axes)
    done = 0
    for seed in range(12):
        plan = [LOCAL_KINDS[int(torch.randint(len(LOCAL_KINDS), (), generator=draw))] for _ in range(6)]
        x = image(4, *{1: (17,), 2: (11, 9), 3: (6, 7, 8)}[axes], seed=seed)
        lo, patch = np.array([[0, *(n // 2 for n in x.shape[1:])]]), torch.zeros(1, 4, *(1,) * axes).double()
        with_refusal = Run()
        try:
            with_refusal = same_in_windows(network(axes, seed, plan), x, [(lo, patch)])
        except NotFollowed:
            continue
        done += not with_refusal.global_ops
    assert done >= 8


# -- through the methods -------------------------------------------------------------------------------------------


def explained(score, x, parts, way, baseline=None, **settings):
    explain = eg.feature_ablation(score, features=parts)
    with eg.execution(evaluation=way, **settings) as run:
        return explain(x, torch.zeros_like(x) if baseline is None else baseline), run.events


forced = partial(explained, way="windows")
whole = partial(explained, way="whole")


@pytest.fixture
def however_small(monkeypatch):
    """Networks of any size are worth it."""
    let_all_pay(monkeypatch)


def unet(axes=2, channels=2, classes=3, dtype=torch.float64):
    return zoo.small_unet(axes, channels, classes).to(dtype)


def test_windows_are_taken_where_they_pay_and_said_so(however_small):
    x = image(2, 48, 48)
    model = eg.from_module(unet())
    score = eg.reducers.class_sum(model, 1)
    got, events = explained(score, x, features.grid(4), "auto")
    want, other = whole(score, x, features.grid(4))
    agree(got, want, 1e-11)
    assert events[0]["evaluation"] == "windows"
    assert events[0]["share"] < 0.3
    assert other[0]["why"] == "asked for whole evaluations"


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.fc, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 4), nn.Conv2d(4, 3, 3)

    def forward(self, x):
        y = self.first(x).relu_()
        return self.last(y * self.fc(y.mean((2, 3))).sigmoid()[:, :, None, None])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3, stride=2), nn.Conv2d(4, 3, 1)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        y = self.first(x)
        z = y.flatten(2).transpose(1, 2)
        return self.last(self.attend(z, z, z, need_weights=False)[0].transpose(1, 2).reshape(y.shape))


def sequence(middle):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), middle, nn.ReLU(), nn.Conv2d(4, 3, 3))


GLOBALS = {
    "instance norm": (lambda: sequence(nn.InstanceNorm2d(4, affine=True)), "batch_norm"),
    "group norm": (lambda: sequence(nn.GroupNorm(2, 4)), "native_group_norm"),
    "softmax over space": (lambda: sequence(nn.Softmax(2)), "_softmax"),
    "local response": (lambda: sequence(nn.LocalResponseNorm(3)), ""),
    "adaptive max": (lambda: sequence(nn.AdaptiveMaxPool2d(7)), "adaptive_max_pool2d"),
    "gate": (Gate, ""),
    "attention": (Attention, ""),
    "layer norm": (lambda: sequence(nn.LayerNorm([4, 24, 24])), "native_layer_norm"),
    "classifier": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", GLOBALS)
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_global_operators_in_the_middle(name, dtype, however_small):
    make, called = GLOBALS[name]
    torch.manual_seed(3)
    model = eg.from_module(make().to(dtype).eval())
    x = image(2, 24, 24, dtype=dtype)
    score = lambda t: model(t)[1].sum()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    want, _ = whole(score, x, features.grid(6))
    scale = float(score(x).abs().detach()) / max(float(want.abs().max()), 1e-9)
    if name == "attention":
        with pytest.raises(ValueError, match="_native_multi_head_attention"):
            forced(score, x, features.grid(6))
    else:
        got, events = forced(score, x, features.grid(6))
        agree(got, want, tolerance * max(1.0, scale))
        assert events[0]["evaluation"] == "windows"
    got, events = explained(score, x, features.grid(6), "auto")
    agree(got, want, tolerance * max(1.0, scale))
    assert len(events) == 1
    if events[0]["evaluation"] == "whole":
        assert "changes that each reach" in events[0]["why"] or name == "attention"
        assert called in events[0]["why"]


# What the examples of the registry hold for one grid, on another.
def fitted(example, grid):
    made = dict(example)
    for name, value in example.items():
        if isinstance(value, torch.Tensor):
            pattern = image(*grid, seed=9) > 0
            made[name] = pattern.to(value.dtype) if value.dtype != torch.bool else pattern
    return made


class Centred(nn.Module):
    """A network of which every class is predicted somewhere."""

    def __init__(self, net, x):
        super().__init__()
        self.net = net
        with torch.no_grad():
            self.middle = net(x[None]).flatten(2).median(2)[0][..., None, None]

    def forward(self, x):
        return self.net(x) - self.middle


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("classes", [1, 3])
def test_every_reducer(name, classes):
    spec, x = REDUCERS[name], image(2, 16, 12)
    if (name, classes) in (("otsu_sum", 3), ("finer", 1)):
        pytest.skip("for models of another number of classes")
    net = Centred(unet(classes=classes), x)
    example = fitted(spec.example, (16, 12))
    if spec.output == "vector":
        net = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = eg.from_module(net.eval())
    scores = [spec.fn(model, **example, **({"at": x} if spec.mask else {}))]
    if "dynamic" in spec.parameters:
        scores.append(spec.fn(model, **example, dynamic=True))
    for score in scores:
        parts = features.windows(5, stride=4)
        want, _ = whole(score, x, parts)
        refused = name in REFUSED_REDUCERS and score is not scores[0]
        if refused:
            with pytest.raises(ValueError, match="a score that can be evaluated by windows"):
                forced(score, x, parts)
        got, events = explained(score, x, parts, "auto" if refused else "windows")
        assert events[0]["evaluation"] == ("whole" if refused else "windows")
        scale = float(score(x).abs().detach()) / max(float(want.abs().max()), 1e-9)
        agree(got, want, 1e-12 * max(10.0, scale))


# With a mask of every image's own: parts are labelled on the host, borders are written into views.
REFUSED_REDUCERS = {"component", "boundary"}


def simple():
    torch.manual_seed(2)
    pool = [nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.Upsample(scale_factor=2, mode="bilinear")]
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), *pool, nn.Conv2d(4, 3, 1)
    )
    return net.double().eval()


def scripted(net, x):
    return torch.jit.script(net)


def traced(net, x):
    return torch.jit.trace(net, x[None])


def exported(net, x):
    batch = torch.export.Dim("batch")
    return torch.export.export(net, (torch.stack([x, x]),), dynamic_shapes=({0: batch},))


def compiled(net, x):
    return torch.compile(net, backend="eager")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    "make", [scripted, traced, *(pytest.param(m, marks=pytest.mark.slow) for m in (exported, compiled))]
)
def test_foreign_forms_of_a_network(make, however_small):
    x, net = image(2, 16, 12), simple()
    model = eg.from_module(make(net, x))
    score = lambda t: model(t)[1].square().sum()
    want = loop(lambda t: net(t[None])[0, 1].square().sum(), x, features.grid(4))
    agree(explained(score, x, features.grid(4), "auto")[0], want, 1e-11)
    if make is compiled:
        with pytest.raises(ValueError, match="compiled"):
            forced(score, x, features.grid(4))
    else:
        agree(forced(score, x, features.grid(4))[0], want, 1e-11)


def test_black_boxes_go_as_a_whole():
    model = eg.from_module(lambda xs: torch.from_numpy(np.sin(xs.detach().numpy())))
    x = image(2, 9, 8)
    score = lambda t: model(t).sum()
    agree(explained(score, x, features.grid(3), "auto")[0], loop(score, x, features.grid(3)), 1e-12)
    with pytest.raises(ValueError, match=r"a score that can be evaluated by windows.*evaluation=\"auto\""):
        forced(score, x, features.grid(3))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 3, padding=1).double()

    def forward(self, a, b, scale=1.0):
        return {"out": self.conv(torch.cat([a, b], 1)) * scale}


def test_several_networks_and_several_inputs():
    x, other = image(2, 12, 12), image(2, 12, 12, seed=8)
    a, b, two = eg.from_module(unet()), eg.from_module(unet().eval()), eg.from_module(Two(), output="out")
    for score in (
        lambda t: (a(t)[1] * b(t.flip(-1))[0]).sum(),
        lambda t: b(a(t)[:2])[2].sum(),
        lambda t: two(t, other)[0].square().sum(),
        lambda t: two(other, t, 3.0)[0].square().sum() + two(t, 2 * t)[1].sum(),
        lambda t: F.mse_loss(two(t, a(t)[1:]), other),
    ):
        agree(forced(score, x, features.grid(4))[0], loop(score, x, features.grid(4)), 1e-11)


def test_networks_are_left_as_they_were():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3).double()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(2).double())

        def forward(self, x):
            self.calls += 1
            self.mean = x.mean((0, 2, 3))
            return self.conv(x) * self.mean.sigmoid()[:, None, None]

    net = Counting()
    model = eg.from_module(net)
    score = lambda t: model(t).square().sum()
    x = image(2, 9, 9)
    score(x)  # networks that write are run twice, once
    before = {n: t.clone() for n, t in net.state_dict().items()}
    agree(forced(score, x, features.grid(3))[0], loop(score, x, features.grid(3)), 1e-11)
    assert all(torch.equal(t, before[n]) and type(t) is torch.Tensor for n, t in net.state_dict().items())
    assert not net.conv.weight.grad_fn
    assert net.conv.weight.requires_grad


# -- precision, gradients, transforms ------------------------------------------------------------------------------


def test_a_small_drop_of_a_large_sum_is_exact_in_single_precision():
    x = 1000 + image(1, 96, 96, dtype=torch.float32).abs()
    net = unet(channels=1)
    single, exact = eg.from_module(net.float()), eg.from_module(unet(channels=1))
    parts = features.within(features.grid(4), torch.arange(96 * 96).reshape(96, 96) < 96 * 8)
    score = lambda model: lambda t: model(t)[1].sum()
    want = loop(score(exact), x.double(), parts)
    got, _ = forced(score(single), x, parts)
    rough, _ = whole(score(single), x, parts)
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= 2e-5
    assert error <= float((rough - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_right_or_refused(dtype):
    x = image(2, 12, 12, dtype=dtype)
    net = unet().to(dtype)
    model = eg.from_module(net)
    score = lambda t: model(t)[1].mean()
    want, _ = whole(score, x, features.grid(4))
    coarse = float(torch.finfo(dtype).eps) * 8 * float(score(x).abs().detach()) / float(want.abs().max())
    with unless_refused("a score that can be evaluated by windows"):
        got, _ = forced(score, x, features.grid(4))
        assert got.dtype == dtype
        agree(got.double(), want.double(), coarse + 0.05)


def test_reduced_precision_is_left_to_whole_evaluations():
    x = image(2, 12, 12, dtype=torch.float32)
    model = eg.from_module(unet(dtype=torch.float32))
    with pytest.raises(ValueError, match="reduced precision"):
        forced(lambda t: model(t)[1].sum(), x, features.grid(4), precision="bfloat16")


def test_gradients_of_what_is_asked_for_are_kept(however_small):
    x, model = image(2, 32, 32), eg.from_module(unet())
    score = lambda t: model(t)[1].sum()
    wanted = x.clone().requires_grad_()
    got, events = explained(score, wanted, features.grid(4), "auto")
    assert got.requires_grad
    assert "gradients" in events[0]["why"]
    got, events = explained(score, x, features.grid(4), "auto", baseline=torch.zeros_like(x).requires_grad_())
    assert got.requires_grad
    weight = KERNEL[:1, :2].clone().requires_grad_()
    got, events = explained(lambda t: F.conv2d(t[None], weight).square().sum(), x, features.grid(4), "auto")
    assert got.requires_grad
    assert "requires grad" in events[0]["why"]
    with torch.no_grad():
        got, events = explained(score, wanted, features.grid(4), "auto")
    assert not got.requires_grad
    assert events[0]["evaluation"] == "windows"


def test_gradients_of_what_parameters_were_made_into_are_kept(however_small):
    x = image(2, 32, 32)
    weight = KERNEL[:1, :2].clone().requires_grad_()
    score = lambda t: F.conv2d(t[None], weight.exp()).square().sum()
    got, _ = explained(score, x, features.grid(4), "auto")
    assert got.requires_grad
    (mine,) = torch.autograd.grad(got.sum(), weight)
    want, _ = whole(score, x, features.grid(4))
    (theirs,) = torch.autograd.grad(want.sum(), weight)
    agree(mine, theirs, 1e-11)


def test_under_vmap_and_batched_the_same_answer():
    xs = image(3, 2, 12, 12)
    model = eg.from_module(unet())
    explain = eg.occlusion(lambda t: model(t)[1].sum(), size=4)
    one = []
    for x in xs:
        with eg.execution(evaluation="windows"):
            one.append(explain(x, 0 * x))
    with eg.execution() as run:
        together = torch.func.vmap(explain)(xs, 0 * xs)
    assert all("under vmap" in e["why"] for e in run.events if e["event"] == "evaluation")
    agree(together, torch.stack(one), 1e-11)
    agree(eg.batched(explain)(xs, 0 * xs), torch.stack(one), 1e-11)
    inner = lambda t: torch.func.vmap(lambda c: model(torch.stack([c, c]))[1].sum())(t).sum()
    agree(explained(inner, xs[0], features.grid(4), "auto")[0], loop(inner, xs[0], features.grid(4)), 1e-11)


def test_an_explanation_of_an_explanation():
    x, model = image(2, 8, 8), eg.from_module(unet())
    inner = eg.occlusion(lambda t: model(t)[1].square().sum(), size=4)
    outer = lambda t: inner(t, 0 * x).square().sum()
    agree(explained(outer, x, features.grid(4), "auto")[0], loop(outer, x, features.grid(4)), 1e-11)


def test_two_threads_at_once():
    model = eg.from_module(unet())
    xs = image(4, 2, 24, 24)
    explain = lambda x: forced(lambda t: model(t)[1].square().sum(), x, features.grid(4))[0]
    want, got = [explain(x) for x in xs], {}

    def work(i):
        got[i] = explain(xs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, w in enumerate(want):
        assert_alike(got[i], w)


def test_chunks_and_memory_change_nothing():
    x, model = image(2, 16, 12), eg.from_module(unet())
    score = lambda t: model(t)[1].square().sum()
    parts = features.windows(6, stride=5)
    want = loop(score, x, parts)
    for settings_ in (
        {"chunk": 2},
        {"chunk": 7},
        {"memory": "64 KiB"},
        {"layout": "contiguous"},
        {},
    ):
        agree(forced(score, x, parts, **settings_)[0], want, 1e-11)


def test_a_score_without_value_is_named_by_its_number():
    x = image(2, 12, 12).abs() + 0.1
    model = eg.from_module(nn.Conv2d(2, 2, 1).double())
    score = lambda t: model(t).sum() * t[0, 5, 5].log().clamp(max=9) / t[0, 5, 5]
    for run in (forced, whole):
        with pytest.raises(
            ValueError, match="finite score for every perturbation, got NaN or infinity for perturbation 4"
        ):
            run(score, x, features.grid((3, 4)))


def test_a_deadline_gives_what_is_done(monkeypatch):
    x, model = image(2, 12, 12), eg.from_module(unet())
    score = lambda t: model(t)[1].square().sum()
    full, _ = forced(score, x, features.grid(3), chunk=1)
    left = iter([9.0] * 5)
    monkeypatch.setattr(Execution, "left", lambda self: next(left, -1.0))
    with pytest.warns(ExecutionWarning, match="the deadline passed"):
        got, events = forced(score, x, features.grid(3), chunk=1)
    assert events[-1]["event"] == "partial"
    done = ~got.isnan()
    assert int(done[0].sum()) == 5 * 9
    agree(got[done], full[done], 1e-12)
    with pytest.raises(DeadlineExceeded):
        forced(score, x, features.grid(3))


# -- features ------------------------------------------------------------------------------------------------------

BLOBS = ((torch.arange(10)[:, None] // 3) * 4 + torch.arange(12) // 4) % 7
PARTS = {
    "elements": features.within(features.elements(), torch.arange(120).reshape(10, 12) % 17 == 0),
    "voxels": features.within(features.voxels(), torch.arange(120).reshape(10, 12) % 13 == 0),
    "channels": features.channels(),
    "grid": features.grid((3, 5)),
    "labels": features.labels(BLOBS),
    "labels with nothing": features.labels(torch.where(BLOBS < 5, BLOBS, -1)),
    "labels of channels": features.labels(torch.stack([BLOBS, (BLOBS + 3) % 7])),
    "segments": features.segments(lambda x: (x[0] > 0).long() * 2, 4),
    "supervoxels": features.supervoxels(6),
    "windows": features.windows(4),
    "overlapping": features.windows((3, 4), stride=(2, 1)),
    "side by side": features.windows(3),
    "separate": features.windows(4, stride=3, separate=True),
    "fading": features.windows(5, stride=2, fade=0.25),
    "fading and separate": features.windows(4, stride=4, fade=0.5, separate=True),
    "everything": features.windows((10, 12)),
    "within": features.within(features.grid(3), BLOBS == 2),
    "windows within": features.within(features.windows(3, stride=2, fade=0.3), BLOBS == 2),
}


@pytest.mark.parametrize("name", PARTS)
def test_features_equal_a_plain_loop(name):
    x, baseline = image(2, 10, 12), image(2, 10, 12, seed=7)
    model = eg.from_module(unet())
    score = lambda t: model(t)[1].square().sum()
    want = loop(score, x, PARTS[name], baseline)
    agree(forced(score, x, PARTS[name], baseline=baseline)[0], want, 1e-11)
    agree(whole(score, x, PARTS[name], baseline=baseline)[0], want, 1e-11)


@pytest.mark.parametrize("axes", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_occlusions_equal_a_plain_loop(axes):
    x = image(2, *{1: (20,), 2: (12, 10), 3: (8, 6, 8)}[axes])
    model = eg.from_module(unet(axes))
    score = lambda t: model(t)[1].square().sum()
    for explain, parts in (
        (eg.occlusion(score, size=3, stride=2), features.windows(3, stride=2)),
        (eg.gaussian_occlusion(score, size=4, stride=3), features.windows(4, stride=3, fade=0.25)),
    ):
        with eg.execution(evaluation="windows"):
            agree(explain(x, 0 * x + 0.3), loop(score, x, parts, 0 * x + 0.3), 1e-11)


def test_another_filling():
    x, model = image(2, 12, 12), eg.from_module(unet())
    score = lambda t: model(t)[1].square().sum()

    def blurred(x, baseline, kept):
        mean = F.avg_pool2d((kept * x)[None], 5, 1, 2)[0]
        return torch.where(kept > 0, x, mean + baseline)

    explain = eg.feature_ablation(score, features=features.grid(4), fill=blurred)
    with eg.execution(evaluation="windows"):
        got = explain(x, 0 * x)
    found = features.grid(4)(x)
    with torch.no_grad():
        drops = [
            score(x) - score(blurred(x, 0 * x, found.without(torch.tensor(j)).double()))
            for j in range(found.count)
        ]
    agree(got, found.spread(torch.stack(drops)).expand_as(x), 1e-11)


def test_captum_agrees():
    attr = pytest.importorskip("captum.attr")
    x, net = image(2, 12, 12), unet().eval()
    model = eg.from_module(net)
    score = lambda t: model(t)[1].square().sum()
    batch = lambda ts: net(ts)[:, 1].square().sum((1, 2))
    labels = (torch.arange(12)[:, None] // 3) * 4 + torch.arange(12) // 3
    theirs = attr.FeatureAblation(batch).attribute(
        x[None], baselines=0.2, feature_mask=labels[None, None].expand(1, 2, -1, -1)
    )[0]
    agree(forced(score, x, features.labels(labels), baseline=0 * x + 0.2)[0], theirs, 1e-11)
    theirs = attr.Occlusion(batch).attribute(
        x[None], sliding_window_shapes=(2, 3, 4), strides=(2, 2, 3), baselines=0.2
    )[0]
    got, _ = forced(score, x, features.windows((3, 4), stride=(2, 3)), baseline=0 * x + 0.2)
    agree(got, theirs.double(), 1e-6)  # which divides in single precision
