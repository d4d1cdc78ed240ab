"""DeepLIFT is complete for every operation that it has a rule for, and refuses the others."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from together import together
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

import esegeta as eg
from esegeta import zoo
from esegeta.rules import deeplift

captum = pytest.importorskip("captum.attr")

strict = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=2,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
SIZES = {1: (2, 12), 2: (2, 7, 8), 3: (2, 6, 7, 6)}
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-4}


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def seeded(make, dtype=torch.float64, seed=0, gain=1.0):
    """A module with weights of its own, also where torch starts with ones and zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make().to(dtype).eval()
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(gain).add_(0.2 * torch.randn(p.shape).to(dtype))
            for name, b in net.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    b.add_(torch.rand(b.shape).to(dtype))
    return net


def between(axes, middle, dtype=torch.float64):
    """The operation between a convolution and a read-out that is not linear either."""
    conv = getattr(functional, f"conv{axes}d")
    w, b = draw(6, 2, *[3] * axes, seed=1, dtype=dtype) / 3, draw(6, seed=2, dtype=dtype) / 3

    def score(x):
        h = middle(conv(x[None], w, b, padding=1))
        readout = (h * torch.cos(torch.arange(h.numel(), dtype=dtype)).reshape(h.shape)).sum()
        return readout + torch.sigmoid(readout)

    return score


def residual(score, x, baseline):
    """What is missing of the difference, relative to the larger of the two values."""
    a = eg.deep_lift(score)(x, baseline).detach()
    y, y0 = score(x).detach(), score(baseline).detach()
    return float((a.sum() - (y - y0)).abs() / torch.maximum(y.abs(), y0.abs()))


def assert_complete(score, x, baseline):
    y, y0 = score(x).detach(), score(baseline).detach()
    assert abs(float(y - y0)) > 1e-6 * abs(float(y)), "nothing to explain"
    torch.testing.assert_close(deeplift(score, baseline)(x), y, rtol=RELATIVE[x.dtype], atol=0)
    off = residual(score, x, baseline)
    assert off <= RELATIVE[x.dtype], f"{off:.2g} of the value is missing"


# -- every operation -----------------------------------------------------------------------------------------------

P = draw(6, seed=3).abs() + 0.1
RELU, SILU = nn.ReLU(), nn.SiLU()
NORMS = {
    kind: seeded(make)
    for kind, make in {
        "nn.GroupNorm": lambda: nn.GroupNorm(3, 6),
        "nn.InstanceNorm2d": lambda: nn.InstanceNorm2d(6, affine=True),
        "nn.InstanceNorm2d with running statistics": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
        "nn.LayerNorm": lambda: nn.LayerNorm([7, 8]),
        "nn.RMSNorm": lambda: nn.RMSNorm(8),
        "nn.BatchNorm2d": lambda: nn.BatchNorm2d(6),
        "nn.PReLU": lambda: nn.PReLU(6),
        "nn.LocalResponseNorm": lambda: nn.LocalResponseNorm(3, alpha=0.5),
    }.items()
}
ACTIVATIONS = [
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "celu",
    "selu",
    "gelu",
    "silu",
    "mish",
    "sigmoid",
    "tanh",
    "softplus",
    "softsign",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "logsigmoid",
    "tanhshrink",
    "hardshrink",
    "softshrink",
    "rrelu",
]
FUNCTIONS = [
    "exp",
    "expm1",
    "exp2",
    "square",
    "abs",
    "erf",
    "erfc",
    "sin",
    "cos",
    "tan",
    "atan",
    "asinh",
    "sinh",
    "cosh",
    "positive",
    "neg",
    "nan_to_num",
]
POSITIVE = ["log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal"]


def _assign(h):
    out = torch.zeros_like(h)
    out[:, :3] = torch.relu(h[:, 3:])
    out[:, 3:] = h[:, :3].sigmoid()
    return out


def _into_views(h):
    h[:, 0].relu_()
    h[:, 1:3].mul_(2)
    return h.sigmoid()


def _into_a_buffer(h):
    out = torch.zeros(1, 6, 7, 8, dtype=h.dtype)
    out[:, :3].add_(torch.tanh(h[:, 3:]))
    return out * h


def _data_weights(h):
    return functional.conv2d(h[:, :2], h[0, :4].reshape(2, 2, 7, 8), padding=3)


def _attention(**more):
    return lambda h: functional.scaled_dot_product_attention(h[:, :2], h[:, 2:4], h[:, 4:], **more)


SPELLINGS = {
    "nn.ReLU": RELU,
    "reused": lambda h: RELU(RELU(h) - 1) + RELU(-h),
    "relu_": lambda h: h.relu_(),
    "relu(inplace=True)": lambda h: functional.relu(h, inplace=True),
    "relu(h, True)": lambda h: functional.relu(h, True),
    "leaky_relu_": lambda h: functional.leaky_relu_(h, 0.2),
    "silu in place": lambda h: functional.silu(h, True),
    "nn.SiLU": SILU,
    "sigmoid_": lambda h: h.sigmoid_(),
    "in place on what a rule gave": lambda h: functional.silu(h).mul_(2).add_(1),
    "norm, then relu in place": lambda h: functional.relu(functional.instance_norm(h), inplace=True),
    "into views": _into_views,
    "into a buffer": _into_a_buffer,
    "assignment": _assign,
    "clamp(min=0)": lambda h: h.clamp(min=0),
    "maximum(h, 0)": lambda h: torch.maximum(h, torch.zeros((), dtype=h.dtype)),
    "maximum(h, c)": lambda h: torch.maximum(h, h.new_tensor(0.3)),
    "where(h > 0, h, 0)": lambda h: torch.where(h > 0, h, 0.0),
    "where with zeros": lambda h: torch.where(h > 0, h, torch.zeros_like(h)),
    "where with a fixed mask": lambda h: torch.where(torch.arange(8) % 2 == 0, h.tanh(), h),
    "h * (h > 0)": lambda h: h * (h > 0),
    "(h > 0) * h": lambda h: (h > 0) * h,
    "h * (h > 0).to": lambda h: h * (h > 0).to(h.dtype),
    "clamp": lambda h: h.clamp(-0.3, 0.4),
    "clip": lambda h: torch.clip(h, -0.2, 0.2),
    "clamp by data": lambda h: torch.clamp(h, h.mean() - 0.1, h.mean() + 0.1),
    "threshold": lambda h: functional.threshold(h, 0.1, -0.3),
    "prelu": lambda h: functional.prelu(h, P.to(h.dtype)),
    "h ** 3": lambda h: h**3,
    "h ** 2": lambda h: h**2,
    "root": lambda h: (h.abs() + 0.1) ** 0.5,
    "2 ** h": lambda h: 2.0**h,
    "1 / h": lambda h: 1 / (h.square() + 1),
    "1 - h": lambda h: 1 - h,
}
PRODUCTS = {
    "gate": lambda h: h * torch.sigmoid(h),
    "square": lambda h: h * h,
    "gate of channels": lambda h: h * h.mean((2, 3), keepdim=True),
    "gate of places": lambda h: h * torch.sigmoid(h[:, :1]),
    "quotient": lambda h: h[:, :3] / (1 + h[:, 3:].exp()),
    "quotient by a sum": lambda h: h / (h.square().sum() + 1),
    "lerp": lambda h: torch.lerp(h[:, :3], h[:, 3:], h[:, :3].sigmoid()),
    "addcmul": lambda h: torch.addcmul(h[:, :3], h[:, 3:], h[:, :3], value=0.5),
    "addcdiv": lambda h: torch.addcdiv(h[:, :3], h[:, 3:], h[:, :3].exp(), value=0.5),
    "matmul": lambda h: h @ h.transpose(-1, -2),
    "matmul broadcast": lambda h: torch.matmul(h, h[0, 0].T),
    "bmm": lambda h: torch.bmm(h[0], h[0].transpose(1, 2)),
    "mm": lambda h: h[0, 0].mm(h[0, 1].t()),
    "mv": lambda h: torch.mv(h[0, 0], h[0, 1, 0]),
    "dot": lambda h: h[0, 0, 0].dot(h[0, 1, 0])[None],
    "outer": lambda h: torch.outer(h[0, 0, 0], h[0, 1, 0]),
    "einsum": lambda h: torch.einsum("bcij,bcik->bjk", h, h),
    "einsum of three": lambda h: torch.einsum("bcij,bcik,bcil->bjkl", h, h, h[:, :, :, :2]),
    "bilinear": lambda h: functional.bilinear(h[0, 0], h[0, 1], draw(3, 8, 8, dtype=h.dtype)),
    "baddbmm": lambda h: torch.baddbmm(h[0].mean()[None, None, None], h[0], h[0].transpose(1, 2)),
    "addmm": lambda h: torch.addmm(h[0, 0, :, :7], h[0, 0], h[0, 1].t()),
    "tensordot": lambda h: torch.tensordot(h, h, dims=([2, 3], [2, 3])),
    "linear with data as weights": lambda h: functional.linear(h, h[0, 0]),
    "convolution with data as weights": _data_weights,
}
MAXIMA = {
    "torch.maximum": lambda h: torch.maximum(h[:, :3], h[:, 3:]),
    "torch.minimum": lambda h: torch.minimum(h[:, :3], h[:, 3:4]),
    "torch.max of two": lambda h: torch.max(h[:, :3], h[:, 3:]),
    "amax": lambda h: h.amax((2, 3)),
    "amax of all": lambda h: torch.amax(h)[None],
    "amin": lambda h: h.amin(1, keepdim=True),
    "max along": lambda h: h.max(1)[0],
    "max along, by name": lambda h: h.max(dim=1, keepdim=True).values,
    "min along": lambda h: torch.min(h, 2).values,
    "max of all": lambda h: h.max()[None],
    "max_pool": lambda h: functional.max_pool2d(h, 2),
    "torch.max_pool2d": lambda h: torch.max_pool2d(h, 2),
    "overlapping": lambda h: functional.max_pool2d(h, 3, 1, 1),
    "dilated, ceil": lambda h: functional.max_pool2d(h, 2, 2, 0, 2, True),
    "nn.MaxPool2d": nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
    "with indices": lambda h: functional.max_pool2d(h, 2, return_indices=True)[0],
    "adaptive": lambda h: functional.adaptive_max_pool2d(h, (3, 5)),
    "nn.AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d((None, 2)),
    "relu, then pool": lambda h: functional.max_pool2d(torch.relu(h), 2),
}
OVER_GROUPS = {
    "softmax": lambda h: h.softmax(1),
    "softmax, sharp": lambda h: (30 * h).softmax(1),
    "functional.softmax": lambda h: functional.softmax(3 * h, dim=-1),
    "softmin": lambda h: functional.softmin(h, dim=1),
    "log_softmax": lambda h: functional.log_softmax(h, 1),
    "logsumexp": lambda h: h.logsumexp((2, 3)),
    "instance_norm": lambda h: functional.instance_norm(h, weight=P.to(h.dtype), bias=P.to(h.dtype)),
    "group_norm": lambda h: functional.group_norm(h, 3, P.to(h.dtype), P.to(h.dtype)),
    "layer_norm": lambda h: functional.layer_norm(h, h.shape[-2:]),
    "rms_norm": lambda h: functional.rms_norm(h, h.shape[-1:]),
    "local_response_norm": lambda h: functional.local_response_norm(h, 3, alpha=0.5),
    "normalize": lambda h: functional.normalize(h, dim=1),
    "norm": lambda h: h.norm(dim=1),
    "norm, p=1": lambda h: h.norm(1, dim=1),
    "norm, p=3": lambda h: torch.linalg.vector_norm(h, 3, dim=(2, 3)),
    "norm, p=inf": lambda h: torch.linalg.vector_norm(h, float("inf"), dim=1),
    "std": lambda h: h.std((2, 3)),
    "std of all": lambda h: h.std()[None],
    "var": lambda h: torch.var(h, 1, unbiased=False),
    "var_mean": lambda h: torch.cat(torch.var_mean(h, 1)),
    "cosine_similarity": lambda h: functional.cosine_similarity(h[:, :3], h[:, 3:]),
    "dist": lambda h: torch.dist(h[:, :3], h[:, 3:])[None],
    "lp_pool": lambda h: functional.lp_pool2d(h, 2, 2),
    "nn.LPPool2d": nn.LPPool2d(2, 3, stride=1),
    "glu": lambda h: functional.glu(h, 1),
    "attention": _attention(),
    "causal attention": _attention(is_causal=True),
    "masked attention": _attention(attn_mask=torch.eye(7).bool() | (torch.arange(7) > 3), scale=0.7),
    "mse_loss": lambda h: functional.mse_loss(h[:, :3], h[:, 3:])[None],
    "l1_loss": lambda h: functional.l1_loss(h, torch.zeros_like(h))[None],
    "cross_entropy": lambda h: functional.cross_entropy(h.flatten(2), torch.zeros(1, 56).long())[None],
    "bce": lambda h: functional.binary_cross_entropy_with_logits(h, torch.ones_like(h))[None],
}
LINEAR = {
    "avg_pool": nn.AvgPool2d(3, 2, 1),
    "adaptive_avg_pool": nn.AdaptiveAvgPool2d(2),
    "conv_transpose": lambda h: functional.conv_transpose2d(h, draw(6, 2, 3, 3, dtype=h.dtype), stride=2),
    "grouped": lambda h: functional.conv2d(h, draw(6, 2, 3, 3, dtype=h.dtype), groups=3, dilation=2),
    "linear": lambda h: functional.linear(h, draw(3, 8, dtype=h.dtype), draw(3, dtype=h.dtype)),
    "batch_norm": lambda h: functional.batch_norm(h, *(P.to(h.dtype),) * 4),
    **{
        f"interpolate {mode}": (lambda h, mode=mode: functional.interpolate(h, (9, 5), mode=mode))
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    },
    **{
        f"pad {mode}": (lambda h, mode=mode: functional.pad(h, (1, 2, 1, 1), mode=mode))
        for mode in ("constant", "reflect", "replicate", "circular")
    },
    "pixel_shuffle": lambda h: functional.pixel_shuffle(h[:, :4], 2),
    "channel_shuffle": lambda h: functional.channel_shuffle(h, 2),
    "grid_sample": lambda h: functional.grid_sample(
        h, torch.linspace(-1, 1, 50, dtype=h.dtype).reshape(1, 5, 5, 2), align_corners=False
    ),
    "max_unpool": lambda h: functional.max_unpool2d(
        h[..., :4], 2 * torch.arange(28).reshape(7, 4).expand(1, 6, 7, 4), (1, 2)
    ),
    "roll and flip": lambda h: h.roll(1, 2).flip(3),
    "index": lambda h: h[:, [0, 2, 4], 1:, ::2],
    "cat and stack": lambda h: torch.cat([torch.stack([h, -h]).sum(0), h.unsqueeze(0)[0]], 1),
    "unbind": lambda h: torch.stack(h.unbind(1)[::2]),
    "cumsum": lambda h: h.cumsum(1),
    "fold and unfold": lambda h: functional.fold(functional.unfold(h, 3), (7, 8), 3),
    "dropout": nn.Dropout(0.5).eval(),
    "pixel and time": lambda h: h.permute(0, 2, 3, 1).reshape(1, -1, 6).mT.contiguous().view(1, 6, 7, 8),
}
TABLE = {
    **{f"functional.{n}": getattr(functional, n) for n in ACTIVATIONS},
    **{f"torch.{n}": getattr(torch, n) for n in FUNCTIONS},
    **{f"torch.{n}": (lambda h, n=n: getattr(torch, n)(h.square() + 0.1)) for n in POSITIVE},
    **NORMS,
    **SPELLINGS,
    **PRODUCTS,
    **MAXIMA,
    **OVER_GROUPS,
    **LINEAR,
}


@pytest.mark.parametrize("name", TABLE)
@strict
@given(seed=st.integers(1, 99), far=st.sampled_from([0.3, 1.0, 2.0]))
def test_complete(name, seed, far):
    x = draw(*SIZES[2], seed=seed)
    assert_complete(between(2, TABLE[name]), x, x + far * draw(*SIZES[2], seed=seed + 100))


@together("name", [n for n in TABLE if n not in NORMS])
def test_complete_in_single_precision(name):
    x, baseline = (draw(*SIZES[2], seed=s, dtype=torch.float32) for s in (1, 2))
    assert_complete(between(2, TABLE[name], torch.float32), x, baseline)


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize(
    "middle",
    [
        lambda h, d: getattr(functional, f"max_pool{d}d")(torch.relu(h), 2),
        lambda h, d: getattr(functional, f"max_pool{d}d")(h, 3, 2, 1, ceil_mode=True),
        lambda h, d: getattr(functional, f"adaptive_max_pool{d}d")(h, 2),
        lambda h, d: getattr(functional, f"lp_pool{d}d")(h, 2, 2),
        lambda h, _: functional.instance_norm(h),
        lambda h, _: functional.group_norm(h, 2),
        lambda h, _: functional.leaky_relu(h).softmax(1),
        lambda h, d: functional.interpolate(h.tanh(), scale_factor=2, mode={1: "linear", 3: "trilinear"}[d]),
    ],
)
def test_complete_in_other_dimensions(axes, middle):
    for seed in range(2):
        x, baseline = draw(*SIZES[axes], seed=seed), draw(*SIZES[axes], seed=seed + 9)
        assert_complete(between(axes, lambda h: middle(h, axes)), x, baseline)


@pytest.mark.parametrize("more", [{}, {"kdim": 5, "vdim": 4}, {"bias": False}, {"batch_first": True}])
def test_complete_for_multi_head_attention(more):
    attend = seeded(lambda: nn.MultiheadAttention(6, 2, **more))
    to_k, to_v = draw(6, 5, seed=1), draw(6, 4, seed=2)

    def score(x):
        h = x.tanh()
        k, v = (h @ to_k, h @ to_v) if "kdim" in more else (h, h)
        out, seen = attend(h, k, v)
        return out.square().sum() + seen.square().sum() + attend(h, k, v, need_weights=False)[0].sum()

    assert_complete(score, draw(7, 2, 6, seed=3), draw(7, 2, 6, seed=4))


def test_complete_for_masked_multi_head_attention_and_an_encoder_layer():
    attend = seeded(lambda: nn.MultiheadAttention(6, 2))
    layer = seeded(lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, dropout=0.0))
    later, absent = torch.ones(7, 7).bool().triu(1), torch.arange(7) > 4
    x, baseline = draw(7, 6, seed=3), draw(7, 6, seed=4)
    assert_complete(lambda x: attend(x, x, x, attn_mask=later)[0].square().sum(), x, baseline)
    assert_complete(lambda x: attend(x, x, x, key_padding_mask=absent)[0].square().sum(), x, baseline)
    assert_complete(lambda x: layer(x[None]).square().sum(), x, baseline)
    model = eg.from_module(layer)
    assert_complete(lambda x: model(x).square().sum(), x, baseline)


REFUSED = {
    "'mul'": lambda h: h * h.detach(),
    "'mul' ": lambda h: h * torch.sign(h),
    "'getitem'": lambda h: h[:, h.mean((0, 2, 3)).argmax()],
    "'sort'": lambda h: h.sort(1)[0],
    "'topk'": lambda h: h.topk(2, 1)[0],
    "'median'": lambda h: h.median(1)[0],
    "'prod'": lambda h: h.prod(1),
    "'where'": lambda h: torch.where(h > 0.1, h, 0.0),
    "'masked_fill'": lambda h: h.masked_fill(h < 0, 0),
    "float": lambda h: h * float(h.sum()),
    "item": lambda h: h * h.max().item(),
    "'dropout'": lambda h: functional.dropout(h, training=True),
    "'batch_norm'": lambda h: functional.batch_norm(h, None, None, training=True),
    "'max_unpool2d'": lambda h: functional.max_unpool2d(
        *functional.max_pool2d(h, 2, return_indices=True), 2, output_size=(7, 8)
    ),
    "'fft_rfft'": lambda h: torch.fft.rfft(h).abs(),
    "'pow'": lambda h: h.exp() ** h,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name(name):
    x = draw(*SIZES[2])
    with pytest.raises(NotImplementedError, match=f"^deeplift: expected .*{name.strip()}"):
        eg.deep_lift(between(2, REFUSED[name]))(x, 0 * x)


# -- whole networks ------------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """Attention of a skip by what comes from below."""

    def __init__(self, c):
        super().__init__()
        self.a, self.b, self.c = nn.Conv3d(c, c, 1), nn.Conv3d(c, c, 1), nn.Conv3d(c, 1, 1)

    def forward(self, skip, below):
        return skip * torch.sigmoid(self.c(functional.relu(self.a(skip) + self.b(below))))


class UNet(nn.Module):
    """Two levels; every kind of block that the networks of the field have."""

    def __init__(self, kind):
        super().__init__()
        self.kind, c = kind, 4
        norm = (lambda c: nn.InstanceNorm3d(c, affine=True)) if kind == "nnunet" else nn.BatchNorm3d
        act = (
            (lambda: nn.LeakyReLU(0.01, inplace=True)) if kind == "nnunet" else lambda: nn.ReLU(inplace=True)
        )

        def block(before, after):
            return nn.Sequential(nn.Conv3d(before, after, 3, padding=1), norm(after), act())

        self.down, self.deep = block(1, c), block(c, 2 * c)
        self.again = block(2 * c if kind != "dense" else 3 * c, 2 * c)
        self.pool = nn.MaxPool3d(3, 2, 1) if kind == "residual" else nn.MaxPool3d(2)
        self.up = nn.ConvTranspose3d(2 * c, c, 2, stride=2)
        self.gate = Gate(c)
        self.join, self.out = block(2 * c, c), nn.Conv3d(c, 2, 1)

    def forward(self, x):
        skip = self.down(x)
        pooled = self.pool(skip)
        deep = self.deep(pooled)
        if self.kind == "dense":
            deep = self.again(torch.cat([pooled, deep], 1))
        else:
            more = self.again(deep)
            more = more + deep
            deep = functional.relu_(more) if self.kind == "residual" else more
        below = self.up(deep)
        if self.kind == "attention":
            skip = self.gate(skip, below)
        return self.out(self.join(torch.cat([below, skip], 1)))


class Windowed(nn.Module):
    """A shifted-window block: norm, windows, relative positions, mask, perceptron."""

    def __init__(self, c=6, heads=2, window=2, size=4):
        super().__init__()
        self.heads, self.window = heads, window
        self.embed = nn.Conv3d(1, c, 2, stride=2)
        self.first, self.second = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.project = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 3, heads))
        places = torch.cartesian_prod(*[torch.arange(window)] * 3)
        apart = places[:, None] - places[None] + window - 1
        weights = torch.tensor([(2 * window - 1) ** 2, 2 * window - 1, 1])
        self.register_buffer("index", (apart * weights).sum(-1))
        region = (torch.arange(size) >= size - 1).long()
        regions = region[:, None, None] * 4 + region[:, None] * 2 + region
        parts = self.windows(regions[None, ..., None].double())[..., 0]
        self.register_buffer("mask", (parts[:, None] != parts[:, :, None]) * -100.0)
        self.perceptron = nn.Sequential(nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c))
        self.up = nn.ConvTranspose3d(c, 2, 2, stride=2)

    def windows(self, x):
        n, d, h, w, c = x.shape
        s = self.window
        parts = x.view(n, d // s, s, h // s, s, w // s, s, c)
        return parts.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, s**3, c)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 4, 1)
        n, d, h, w, c = x.shape
        s = self.window
        parts = self.windows(torch.roll(self.first(x), (-1, -1, -1), (1, 2, 3)))
        q, k, v = self.qkv(parts).reshape(len(parts), s**3, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[self.index].permute(2, 0, 1)
        many = self.mask.shape[0]
        scores = scores.view(n, many, self.heads, s**3, s**3) + self.mask[None, :, None].to(x.dtype)
        seen = scores.view(-1, self.heads, s**3, s**3).softmax(-1) @ v
        y = self.project(seen.transpose(1, 2).reshape(len(parts), s**3, c))
        y = (
            y.view(n, d // s, h // s, w // s, s, s, s, c)
            .permute(0, 1, 4, 2, 5, 3, 6, 7)
            .reshape(n, d, h, w, c)
        )
        x = x + torch.roll(y, (1, 1, 1), (1, 2, 3))
        x = x + self.perceptron(self.second(x))
        return self.up(x.permute(0, 4, 1, 2, 3))


NETWORKS = {kind: (lambda kind=kind: UNet(kind)) for kind in ("nnunet", "attention", "residual", "dense")}
NETWORKS["windowed attention"] = Windowed


def network_score(name, dtype=torch.float64):
    model = eg.from_module(seeded(NETWORKS[name], dtype))
    return lambda x: model(x)[1].sum() + model(x).square().mean()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_complete_on_networks(name, dtype):
    score = network_score(name, dtype)
    x, baseline = (draw(1, 8, 8, 8, seed=s, dtype=dtype) for s in (0, 50))
    assert_complete(score, x, baseline)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.float32])
def test_complete_on_the_brain_network(dtype):
    x = zoo.head().data[:, 32:96:2, 32:96:2, 32:96:2].to(dtype)
    x = x / x.max()
    model = eg.from_module(zoo.brain_extraction_unet().to(dtype))
    score = eg.reducers.class_sum(model, 0)
    assert_complete(score, x, 0.3 * draw(*x.shape, seed=1, dtype=dtype))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_example_influences_another(name):
    explain = eg.deep_lift(network_score(name))
    xs, baselines = (torch.stack([draw(1, 8, 8, 8, seed=s + i) for i in range(3)]) for s in (0, 50))
    alone = torch.stack([explain(x, b) for x, b in zip(xs, baselines, strict=True)])
    scale = float(alone.abs().max())
    assert float((vmap(explain)(xs, baselines) - alone).abs().max()) <= 1e-12 * scale
    assert float((eg.batched(explain)(xs, baselines) - alone).abs().max()) <= 1e-12 * scale


@pytest.mark.parametrize(
    "name", ["softmax", "max_pool", "group_norm", "h * (h > 0)", "assignment", "attention"]
)
def test_plain_functions_are_mapped(name):
    explain = eg.deep_lift(between(2, TABLE[name]))
    xs, baselines = (torch.stack([draw(*SIZES[2], seed=s + i) for i in range(3)]) for s in (0, 50))
    alone = torch.stack([explain(x, b) for x, b in zip(xs, baselines, strict=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on the speed of some operations under vmap
        mapped = vmap(explain)(xs, baselines)
    assert float((mapped - alone).abs().max()) <= 1e-12 * float(alone.abs().max())


# The score runs its network twice, so that every place has two calls.
@pytest.mark.parametrize("place", ["down#0", "pool#0", "deep.1#0", "up#0"])
def test_layers(place):
    score = network_score("attention")
    x, baseline = draw(1, 8, 8, 8, seed=1), draw(1, 8, 8, 8, seed=2)
    trunk, head = eg.split(score, f"{place}", at=x)
    a = eg.at(eg.deep_lift, place)(score)(x, baseline)
    change = (head(trunk(x)) - head(trunk(baseline))).detach()  # what goes past the place stays as it is at x
    assert a.shape == trunk(x).shape
    assert float((a.sum() - change).abs()) <= 1e-10 * float(score(x).detach().abs())


def test_a_set_of_layers():
    score = network_score("dense")
    x, baseline = draw(1, 8, 8, 8, seed=1), draw(1, 8, 8, 8, seed=2)
    a = eg.at(eg.deep_lift, ["down#0", "deep#0"])(score)(x, baseline)
    trunk, head = eg.split(score, ["down#0", "deep#0"], at=x)
    change = (head(trunk(x)) - head(trunk(baseline))).detach()
    assert float((sum(t.sum() for t in a) - change).abs()) <= 1e-10 * float(score(x).detach().abs())


def test_many_baselines_and_noise():
    score = network_score("nnunet")
    x, baselines = draw(1, 8, 8, 8, seed=1), draw(3, 1, 8, 8, 8, seed=2)
    a = eg.deep_lift_shap(score)(x, baselines)
    each = torch.stack([eg.deep_lift(score)(x, b) for b in baselines])
    assert float((a - each.mean(0)).abs().max()) <= 1e-12 * float(a.abs().max())
    calm = eg.smooth(eg.deep_lift(score), noise=0.1, samples=4)(x, baselines[0], key=1)
    assert torch.isfinite(calm).all()
    assert float((calm - each[0]).abs().max()) > 1e-6


# -- what is known otherwise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["functional.silu", "torch.exp", "group_norm", "softmax", "gate", "attention", "std"]
)
def test_multipliers_tend_to_the_gradient(name):
    score = between(2, TABLE[name])
    x, v = draw(*SIZES[2], seed=1), draw(*SIZES[2], seed=2)
    slope = eg.gradient(score)(x)
    off = []
    for h in (1e-1, 1e-3, 0.0):
        multipliers = eg.gradient(deeplift(score, x - h * v))(x)
        off.append(float((multipliers - slope).abs().max() / slope.abs().max()))
    assert off[0] > 1e-3
    assert off[1] < 3e-2 * off[0]
    assert off[2] < 1e-12


def test_gradient_times_input_on_networks_without_biases():
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(4, 4, 3, padding=1, bias=False),
        nn.LeakyReLU(0.1),
        nn.Upsample(scale_factor=2, mode="trilinear"),
        nn.Conv3d(4, 2, 1, bias=False),
    )
    model = eg.from_module(seeded(lambda: net))
    score = eg.reducers.class_sum(model, 1)
    x = draw(1, 8, 8, 8)
    a, b = eg.deep_lift(score)(x, 0 * x), eg.input_x_gradient(score)(x)
    assert float((a - b).abs().max()) <= 1e-6 * float(b.abs().max())


def test_closed_forms():
    two = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    zero = 0 * two
    assert eg.deep_lift(lambda x: x[0, 0] * x[0, 1])(two, zero).tolist() == [[1.5, 1.5]]
    assert eg.deep_lift(lambda x: x.max())(two, zero).tolist() == [[3.0, 0.0]]
    assert eg.deep_lift(lambda x: x.clamp(max=1).sum())(two, zero).tolist() == [[1.0, 1.0]]
    # The winner of the input takes what it wins by; 1 was won by the other one before.
    before = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    assert eg.deep_lift(lambda x: x.max())(two, before).tolist() == [[1.0, 0.0]]


def test_softmax_far_from_its_baseline():
    x = torch.tensor([[800.0, -800.0, 1.0]], dtype=torch.float64)
    for sign in (-1, 1):
        a = eg.deep_lift(lambda x: x.softmax(-1)[0, 0])(x, sign * x.flip(-1))
        assert torch.isfinite(a).all()
        assert_complete(lambda x: 1 + x.softmax(-1)[0, 0], x, x.flip(-1))


def test_the_derivative_of_multipliers_is_refused():
    x = draw(*SIZES[2])
    a = eg.deep_lift(between(2, TABLE["gate"]))(x.clone().requires_grad_(), 0 * x)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        a.sum().backward()


# -- captum 0.9.0: right in some places, and wrong in others -------------------------------------------------------


def both(net, x, baseline):
    """Its attribution and ours of the sum of the outputs, with what is missing in each, relative to F(x) - F(x')."""

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).flatten(1).sum(1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = captum.DeepLift(Summed()).attribute(x, baseline).detach()
    model = eg.from_module(net)
    ours = eg.batched(eg.deep_lift(lambda z: model(z).sum()))(x, baseline)
    change = (Summed()(x) - Summed()(baseline)).detach()
    missing = [(a.flatten(1).sum(1) - change).abs() / change.abs() for a in (theirs, ours)]
    return theirs, ours, float(missing[0].max()), float(missing[1].max())


def conv(before, after, **more):
    return nn.Conv2d(before, after, 3, padding=1, **more)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 4), nn.Sigmoid(), conv(4, 1)),
        lambda: nn.Sequential(conv(1, 4), nn.Tanh(), conv(4, 4), nn.ELU(), nn.AvgPool2d(2), conv(4, 1)),
        lambda: nn.Sequential(conv(1, 4), nn.Softplus(), conv(4, 4), nn.MaxPool2d(2), conv(4, 1)),
        lambda: nn.Sequential(conv(1, 4), nn.BatchNorm2d(4), nn.LeakyReLU(0.1), conv(4, 1)),
    ],
)
def test_captum_agrees_where_it_is_right(make):
    net = seeded(make)
    theirs, ours, missing, _ = both(net, draw(2, 1, 8, 8, seed=1), draw(2, 1, 8, 8, seed=2))
    assert missing < 1e-8
    assert float((theirs - ours).abs().max()) <= 1e-6 * float(ours.abs().max())


class FunctionalReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(1, 4), conv(4, 1)

    def forward(self, x):
        return self.b(functional.relu(self.a(x)))


@pytest.mark.parametrize(
    ("why", "make"),
    [
        ("neighbours", lambda: nn.Sequential(conv(1, 4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 1))),
        ("overlap", lambda: nn.Sequential(conv(1, 4), nn.MaxPool2d(3, 1), conv(4, 1))),
        ("group norm", lambda: nn.Sequential(conv(1, 4), nn.GroupNorm(2, 4), conv(4, 1))),
        (
            "instance norm",
            lambda: nn.Sequential(conv(1, 4), nn.InstanceNorm2d(4), conv(4, 4), nn.ReLU(), conv(4, 1)),
        ),
        ("functional", FunctionalReLU),
    ],
)
def test_captum_is_incomplete(why, make):
    net = seeded(make)
    *_, theirs, ours = both(net, draw(2, 1, 8, 8, seed=1), draw(2, 1, 8, 8, seed=2))
    assert theirs > 0.01, why
    assert ours < 1e-10, why


def test_captum_couples_the_examples_of_a_batch_by_softmax():
    net = seeded(lambda: nn.Sequential(conv(1, 4), nn.Softmax(1), conv(4, 1)))
    x, baseline = draw(3, 1, 8, 8, seed=1), draw(3, 1, 8, 8, seed=2)
    x = x * torch.tensor([1.0, 3.0, 9.0]).reshape(3, 1, 1, 1).double()
    theirs, ours, missing, mine = both(net, x, baseline)
    alone, mine_alone, *_ = both(net, x[:1], baseline[:1])
    assert float((theirs[:1] - alone).abs().max()) > 1e-3 * float(alone.abs().max())
    assert float((ours[:1] - mine_alone).abs().max()) <= 1e-10 * float(mine_alone.abs().max())
    assert missing > 0.01
    assert mine < 1e-10


def test_tensors_are_what_the_tests_draw():
    assert isinstance(draw(2), Tensor)
    assert not torch.equal(draw(2, seed=1), draw(2, seed=2))
