"""Rules on networks that are drawn from all operations that they know, in every spelling."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap
from torch.nn import functional

import esegeta as eg
from esegeta import rules

strict = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=10,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHANNELS = 4
SIZES = {1: (12,), 2: (6, 8), 3: (4, 6, 4)}
COMPLETE = {torch.float64: 1e-10, torch.float32: 1e-4}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(home, name, axes):
    return getattr(home, f"{name}{axes}d")


class Conv(nn.Module):
    """One convolution, in one of the forms that there are."""

    def __init__(self, axes, kind, bias=True):
        super().__init__()
        conv, c = of(nn, "Conv", axes), CHANNELS
        forms = {
            "plain": lambda: conv(c, c, 3, padding=1, bias=bias),
            "circular": lambda: conv(c, c, 3, padding=1, padding_mode="circular", bias=bias),
            "reflect": lambda: conv(c, c, 3, padding=1, padding_mode="reflect", bias=bias),
            "grouped": lambda: conv(c, c, 3, padding=2, dilation=2, groups=2, bias=bias),
            "strided": lambda: conv(c, c, 2, stride=2, bias=bias),
            "transposed": lambda: of(nn, "ConvTranspose", axes)(c, c, 2, stride=2, bias=bias),
            "point": lambda: conv(c, c, 1, bias=bias),
        }
        if kind == "reflect" and axes == 3:
            kind = "plain"
        self.conv, self.kind = forms[kind](), kind

    def forward(self, x):
        # Volumes stay small, and do not vanish.
        small, large = min(x.shape[2:]) < 4, x[0, 0].numel() > 200
        stays = (self.kind == "strided" and small) or (self.kind == "transposed" and large)
        return x if stays else self.conv(x)


class Norm(nn.Module):
    def __init__(self, axes, kind):
        super().__init__()
        self.kind, c = kind, CHANNELS
        self.norm = {
            "batch": lambda: of(nn, "BatchNorm", axes)(c),
            "instance": lambda: of(nn, "InstanceNorm", axes)(c, affine=True),
            "group": lambda: nn.GroupNorm(2, c),
            "layer": lambda: nn.LayerNorm(c),
            "rms": lambda: nn.RMSNorm(c),
        }[kind]()

    def forward(self, x):
        last = self.kind in ("layer", "rms")
        return self.norm(x.movedim(1, -1)).movedim(-1, 1) if last else self.norm(x)


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu_": lambda x: x.relu_(),
    "functional relu in place": lambda x: functional.relu(x, inplace=True),
    "clamp": lambda x: x.clamp(min=0),
    "gate": lambda x: x * (x > 0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "maximum": lambda x: torch.maximum(x, torch.zeros((), dtype=x.dtype)),
    "clamps": lambda x: x.clamp(-0.4, 0.6),
    "threshold": lambda x: functional.threshold(x, 0.1, 0.1),
    "leaky": nn.LeakyReLU(0.1, inplace=True),
    "elu": functional.elu,
    "selu": nn.SELU(),
    "gelu": functional.gelu,
    "silu": nn.SiLU(inplace=True),
    "mish": functional.mish,
    "hardswish": nn.Hardswish(),
    "relu6": functional.relu6,
    "sigmoid": lambda x: x.sigmoid(),
    "tanh": torch.tanh,
    "softplus": nn.Softplus(),
    "exp": lambda x: x.tanh().exp(),
    "log": lambda x: torch.log(x.square() + 1),
    "root": lambda x: (x.abs() + 0.1).sqrt(),
    "abs": torch.abs,
    "power": lambda x: 2 ** (1 - x.tanh()),
    "inverse": lambda x: 1 / (1 + x.square()),
}


class Activation(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.slopes = nn.PReLU(CHANNELS) if kind == "prelu" else None

    def forward(self, x):
        x = x * 1  # what is written into must be the network's own
        return self.slopes(x) if self.slopes is not None else ACTIVATIONS[self.kind](x)


class Pool(nn.Module):
    def __init__(self, axes, kind):
        super().__init__()
        self.pool = {
            "max": lambda: of(nn, "MaxPool", axes)(2),
            "overlapping": lambda: of(nn, "MaxPool", axes)(3, 1, 1),
            "average": lambda: of(nn, "AvgPool", axes)(3, 1, 1),
            "adaptive": lambda: of(nn, "AdaptiveAvgPool", axes)(3),
            "adaptive max": lambda: of(nn, "AdaptiveMaxPool", axes)(3),
            "norm": lambda: of(nn, "LPPool", axes)(2, 2, stride=1),
            "up": lambda: nn.Upsample(size=5, mode=("linear", "bilinear", "trilinear")[axes - 1]),
            "nearest": lambda: nn.Upsample(size=6),
        }[kind]()
        self.shrinks = kind in ("max", "norm")

    def forward(self, x):
        return x if self.shrinks and min(x.shape[2:]) < 4 else self.pool(x)


class Skip(nn.Module):
    """What a block adds to what it had, in one way or another."""

    def __init__(self, axes, kind, inner, bias=True):
        super().__init__()
        self.kind, self.inner = kind, inner
        self.join = of(nn, "Conv", axes)(2 * CHANNELS, CHANNELS, 1, bias=bias)
        self.gate = of(nn, "Conv", axes)(CHANNELS, 1, 1, bias=bias)

    def forward(self, x):
        y = self.inner(x)
        if y.shape != x.shape:
            y = functional.interpolate(y, x.shape[2:], mode="nearest")
        match self.kind:
            case "add":
                return x + y
            case "add in place":
                y = y * 1
                y += x
                return y
            case "subtract":
                return 1 - x - y
            case "cat":
                return self.join(torch.cat([x, y], 1))
            case "attend":
                return x * torch.sigmoid(self.gate(torch.relu(x + y))) + y
            case "squeeze":
                return x * torch.sigmoid(y.mean(tuple(range(2, y.ndim)), keepdim=True))
            case "product":
                return x * y.tanh()
            case "quotient":
                return x / (1 + y.square())
            case "larger":
                return torch.maximum(x, y)
            case "buffer":
                out = torch.zeros_like(x)
                out[:, :2] = x[:, 2:]
                out[:, 2:].add_(y[:, :2])
                return out
            case "mean":
                return torch.stack([x, y.flip(2)]).mean(0)
            case "again":
                return self.inner(functional.interpolate(y, x.shape[2:], mode="nearest")) if self.kind else y
        raise AssertionError(self.kind)


class Mixing(nn.Module):
    """Every place with every other one."""

    def __init__(self, kind):
        super().__init__()
        self.kind, c = kind, CHANNELS
        self.norm, self.qkv, self.out = nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.attention = nn.MultiheadAttention(c, 2, batch_first=True)

    def forward(self, x):
        h = self.norm(x.flatten(2).mT)
        if self.kind == "module":
            h = h + self.attention(h, h, h, need_weights=False)[0]
        elif self.kind == "softmax":
            h = x.flatten(2).softmax(1).mT * h
        else:
            q, k, v = self.qkv(h).chunk(3, -1)
            if self.kind == "operation":
                seen = functional.scaled_dot_product_attention(q, k, v)
            elif self.kind == "einsum":
                seen = torch.einsum("npc,nqc->npq", q, k).softmax(-1)
                seen = torch.einsum("npq,nqc->npc", seen, v)
            else:
                seen = (q @ k.transpose(1, 2) / 2).softmax(-1) @ v
            h = h + self.out(seen)
        return h.mT.reshape(x.shape)


class Windows(nn.Module):
    """Moved about and back."""

    def forward(self, x):
        moved = x.roll(1, -1).flip(2)
        a, b = moved.chunk(2, 1)
        moved = torch.stack([b, a], 2).flatten(1, 2)
        padded = functional.pad(moved.transpose(1, 2), (1, 1), mode="constant", value=0.5)
        return padded[..., 1:-1].transpose(1, 2).contiguous().view(x.shape)


CONVS = ("plain", "circular", "reflect", "grouped", "strided", "transposed", "point")
POOLS = ("max", "overlapping", "average", "adaptive", "adaptive max", "norm", "up", "nearest")
JOINS = ("add", "add in place", "subtract", "cat", "attend", "squeeze", "product", "quotient", "larger")
JOINS += ("buffer", "mean", "again")


def leaf():
    return st.one_of(
        st.tuples(st.just(Conv), st.sampled_from(CONVS)),
        st.tuples(st.just(Norm), st.sampled_from(["batch", "instance", "group", "layer", "rms"])),
        st.tuples(st.just(Activation), st.sampled_from([*ACTIVATIONS, "prelu"])),
        st.tuples(st.just(Pool), st.sampled_from(POOLS)),
        st.tuples(st.just(Mixing), st.sampled_from(["module", "softmax", "operation", "einsum", "products"])),
        st.tuples(st.just(Windows), st.just("")),
    )


def plans(leaves):
    """A list of blocks; in skips lists of their own."""
    skip = lambda inner: st.tuples(
        st.just(Skip), st.sampled_from(JOINS), st.lists(inner, min_size=1, max_size=3)
    )
    return st.lists(st.one_of(leaves, skip(leaves)), min_size=3, max_size=6)


def build(axes, plan, bias=True):
    made = []
    for kind, form, *inner in plan:
        if kind is Skip:
            made.append(Skip(axes, form, build(axes, inner[0], bias), bias))
        elif kind in (Norm, Pool):
            made.append(kind(axes, form))
        else:
            made.append(
                Conv(axes, form, bias) if kind is Conv else Windows() if kind is Windows else kind(form)
            )
    return nn.Sequential(*made)


def network(axes, plan, seed, dtype=torch.float64, bias=True):
    conv = of(nn, "Conv", axes)
    ends = conv(1, CHANNELS, 3, padding=1, bias=bias), conv(CHANNELS, 2, 1, bias=bias)
    net = nn.Sequential(ends[0], *build(axes, plan, bias), ends[1]).double().eval().requires_grad_(False)
    for i, (name, p) in enumerate([*net.named_parameters(), *net.named_buffers()]):
        if p.is_floating_point():
            fan = max(1, p[0].numel()) if p.ndim > 1 else 1
            p.copy_(draw(*p.shape, seed=1000 * seed + i) / fan**0.5)
        if "running_var" in name:
            p.copy_(0.5 + p.abs())
        if "bias" in name and not bias:
            p.zero_()
    return net.to(dtype)


def scored(net):
    """Positive, so that its size says what rounding may be."""
    model = eg.from_module(net)
    return lambda x: model(x).square().mean()


def example(axes, seed, dtype=torch.float64):
    return draw(1, *SIZES[axes], seed=seed).to(dtype)


def missing(method, score, x, baseline):
    y, y0 = score(x), score(baseline)
    return float((method(score)(x, baseline).sum() - (y - y0)).abs() / torch.maximum(y.abs(), y0.abs()))


@pytest.mark.slow
@pytest.mark.parametrize("method", [eg.deep_lift, eg.deep_lift_reveal_cancel])
@pytest.mark.parametrize("axes", [1, 2, 3])
@strict
@given(plan=plans(leaf()), seed=st.integers(1, 99), far=st.sampled_from([0.1, 1.0, 3.0]))
def test_differences_are_complete(method, axes, plan, seed, far):
    for dtype in (torch.float64, torch.float32):
        score = scored(network(axes, plan, seed, dtype))
        x = example(axes, seed, dtype)
        baseline = x + far * example(axes, seed + 100, dtype)
        off = missing(method, score, x, baseline)
        assert off <= COMPLETE[dtype], f"{off:.2g} is missing in {dtype}"


@pytest.mark.parametrize("axes", [1, 2, 3])
@strict
@given(plan=plans(leaf()), seed=st.integers(1, 99))
def test_no_example_knows_of_another(axes, plan, seed):
    explain = eg.deep_lift(scored(network(axes, plan, seed)))
    xs = torch.stack([example(axes, seed), 5 * example(axes, seed + 1)])
    alone = explain(xs[0], xs[0].flip(-1))
    together = vmap(explain)(xs, xs.flip(-1))[0]
    assert float((together - alone).abs().max()) <= 1e-10 * max(1e-3, float(alone.abs().max()))


# Without a bias anywhere: what is homogeneous, products with gates, attention.
UNBIASED = st.one_of(
    st.tuples(st.just(Conv), st.sampled_from(CONVS)),
    st.tuples(
        st.just(Activation),
        st.sampled_from(
            ["relu", "relu in place", "relu_", "clamp", "gate", "where", "maximum", "leaky", "prelu"]
        ),
    ),
    st.tuples(st.just(Activation), st.sampled_from(["silu", "gelu", "hardswish", "mish", "tanh", "abs"])),
    st.tuples(st.just(Pool), st.sampled_from(POOLS)),
)
UNBIASED_JOINS = (
    "add",
    "add in place",
    "cat",
    "attend",
    "squeeze",
    "product",
    "larger",
    "buffer",
    "mean",
    "again",
)


def unbiased_plans():
    inner = st.lists(UNBIASED, min_size=1, max_size=3)
    skip = st.tuples(st.just(Skip), st.sampled_from(UNBIASED_JOINS), inner)
    return st.lists(st.one_of(UNBIASED, skip), min_size=3, max_size=6)


@pytest.mark.parametrize("axes", [1, 2, 3])
@strict
@given(plan=unbiased_plans(), seed=st.integers(1, 99))
def test_relevance_is_conserved_without_biases(axes, plan, seed):
    score = scored(network(axes, plan, seed, bias=False))
    x = example(axes, seed)
    found = eg.lrp(score, composite="zero")(x)
    allowed = 1e-9 * max(float(score(x)), float(found.abs().sum()))
    assert abs(float(found.sum() - score(x))) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("axes", [1, 2, 3])
@strict
@given(plan=plans(leaf()), seed=st.integers(1, 99))
def test_values_stay_and_every_operation_is_known(axes, plan, seed):
    score, x = scored(network(axes, plan, seed)), example(axes, seed)
    y = score(x)
    for rewrite in (rules.lrp, lambda s: rules.deeplift(s, 0 * x), lambda s: rules.reveal_cancel(s, 0 * x)):
        # Without anybody to look on, torch computes attention in another order.
        assert torch.allclose(rewrite(score)(x), y, rtol=1e-12)
