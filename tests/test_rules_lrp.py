"""Relevance and excitation: each rule against a slow formula, conservation, and every spelling alike."""

import itertools

import pytest
import torch
from rounding import assert_alike
from together import together
from torch import nn
from torch.func import jacrev
from torch.nn import functional

import esegeta as eg
from esegeta import rules, zoo

ROUNDING = 1e-9
EPS = 1e-6


def drawn(*shape, key=0, dtype=torch.float64):
    return eg.random.normal(key, shape, dtype=dtype)


def filled(net, key=0, bias=True):
    """Weights of either sign, in double precision; with batch statistics of their own."""
    net = net.double().eval()
    net.requires_grad_(False)
    with torch.no_grad():
        for i, (name, p) in enumerate([*net.named_parameters(), *net.named_buffers()]):
            if p.is_floating_point():
                p.copy_(drawn(*p.shape, key=100 * key + i) / max(1, p[0].numel() if p.ndim > 1 else 1) ** 0.5)
            if "running_var" in name:
                p.copy_(0.5 + p.abs())
            if "bias" in name and not bias:
                p.zero_()
    return net


def explained(score, composite, x):
    return eg.lrp(score, composite=composite)(x)


# -- every rule against its definition, one weight at a time ------------------------------------------------------


def stabilised(z, eps=EPS):
    return z + torch.where(z >= 0, eps, -eps).to(z)


def loops(rule, x, w, b, relevance):
    """The relevance of the inputs of ``z_k = sum_j w_kj x_j + b_k``, by one loop over outputs and inputs."""
    out = torch.zeros_like(x)
    for k in range(len(b)):
        (parts, rests), weights = slow_parts(rule, x, w[k], b[k])
        for weight, part, rest in zip(weights, parts, rests, strict=True):
            total = sum(part) + rest
            out = out + weight * part / stabilised(total) * relevance[k]
    return out


def slow_parts(rule, x, w, b):
    """Contributions of each input, what the bias adds to their sum; and the weights of several such shares."""
    z, up, down = x * w, lambda t: t.clamp(min=0), lambda t: t.clamp(max=0)
    if isinstance(rule, rules.Epsilon):
        return ([z], [b]), (1.0,)
    if isinstance(rule, rules.Gamma):
        return ([z + rule.gamma * x * up(w)], [b + rule.gamma * up(b)]), (1.0,)
    if isinstance(rule, rules.GeneralisedGamma):
        toward = up if z.sum() + b > 0 else down
        return ([z + rule.gamma * toward(z)], [b + rule.gamma * toward(b)]), (1.0,)
    if isinstance(rule, rules.AlphaBeta):
        return ([up(z), down(z)], [up(b), down(b)]), (rule.alpha, -rule.beta)
    if isinstance(rule, rules.ZPlus):
        return ([up(z)], [up(b)]), (1.0,)
    if isinstance(rule, rules.ZBox):
        return ([z - rule.low * up(w) - rule.high * down(w)], [0 * b]), (1.0,)
    if isinstance(rule, rules.WSquare):
        return ([w.square()], [0 * b]), (1.0,)
    assert isinstance(rule, rules.Flat)
    return ([(w != 0).to(w)], [0 * b]), (1.0,)


RULES = [
    rules.Epsilon(),
    rules.Gamma(),
    rules.Gamma(gamma=0.5),
    rules.GeneralisedGamma(),
    rules.AlphaBeta(),
    rules.AlphaBeta(3.0, 2.0),
    rules.ZPlus(),
    rules.ZBox(-2.5, 3.0),
    rules.WSquare(),
    rules.Flat(),
]
# By name, the operation on (N, C, *S) with weights and bias.
AFFINE = {
    "linear": lambda x, w, b: functional.linear(x.flatten(1), w, b),
    "conv1d": lambda x, w, b: functional.conv1d(x.flatten(2), w, b, padding=1),
    "grouped": lambda x, w, b: functional.conv2d(x, w, b, groups=2, padding="same", dilation=2),
    "strided": lambda x, w, b: functional.conv2d(x, w, b, stride=2, padding=1),
    "conv3d": lambda x, w, b: functional.conv3d(x.unsqueeze(-1), w, b, padding=1),
    "transposed": lambda x, w, b: functional.conv_transpose2d(x, w, b, stride=2, output_padding=1),
    "transposed, grouped": lambda x, w, b: functional.conv_transpose2d(x, w, b, groups=2),
    "transposed 1-D": lambda x, w, b: functional.conv_transpose1d(x.flatten(2), w, b),
    "transposed 3-D": lambda x, w, b: functional.conv_transpose3d(x.unsqueeze(-1), w, b),
}
WEIGHTS = {
    "linear": (3, 32),
    "conv1d": (3, 2, 3),
    "grouped": (4, 1, 2, 2),
    "strided": (3, 2, 3, 3),
    "conv3d": (3, 2, 3, 3, 1),
    "transposed": (2, 3, 3, 3),
    "transposed, grouped": (2, 2, 2, 2),
    "transposed 1-D": (2, 3, 3),
    "transposed 3-D": (2, 3, 2, 2, 1),
}
X = (2, 4, 4)


def one_layer(kind):
    w = drawn(*WEIGHTS[kind], key=1)
    many = w.shape[0] if "transposed" not in kind else w.shape[1] * (2 if "grouped" in kind else 1)
    b = drawn(many, key=2)
    return lambda x: AFFINE[kind](x[None], w, b)[0]


def matrix(layer, x):
    """An affine map as a matrix and a bias, by its columns."""
    flat = lambda v: layer(v.reshape(x.shape)).flatten()
    return jacrev(flat)(x.flatten()), flat(torch.zeros_like(x.flatten()))


@together("kind", AFFINE)
@together("rule", RULES, ids=repr)
def test_a_rule_is_its_definition(kind, rule):
    layer, x = one_layer(kind), drawn(*X, key=3)
    x[0, 0, :2] = 0  # zeros of a background
    w, b = matrix(layer, x)
    out = drawn(len(b), key=4)
    score = lambda x: (layer(x).flatten() * out).sum()
    expected = loops(rule, x.flatten(), w, b, (w @ x.flatten() + b) * out)
    found = explained(score, rules.Composite(conv=rule, linear=rule, first=rule), x).flatten()
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)


# -- networks, by hand ---------------------------------------------------------------------------------------------


def test_three_layers_by_hand():
    w = [drawn(5, 6, key=1), drawn(4, 5, key=2), drawn(1, 4, key=3)]
    b = [drawn(5, key=4), drawn(4, key=5), drawn(1, key=6)]
    chain = [rules.Flat(), rules.GeneralisedGamma(), rules.Epsilon(0.1)]

    def score(x):
        h = functional.linear(x, w[0], b[0]).relu()
        h = functional.leaky_relu(functional.linear(h, w[1], b[1]), 0.2)
        return functional.linear(h, w[2], b[2]).sum()

    x = drawn(1, 6, key=7)
    first = torch.relu(x[0] @ w[0].T + b[0])
    second = functional.leaky_relu(first @ w[1].T + b[1], 0.2)
    top = second @ w[2].T + b[2]
    share = second * w[2][0] / stabilised(top, 0.1) * top
    expected = loops(chain[0], x[0], w[0], b[0], loops(chain[1], first, w[1], b[1], share))
    composite = rules.Composite(linear=chain[1], first=chain[0], last=chain[2])
    assert torch.allclose(explained(score, composite, x)[0], expected, rtol=1e-7, atol=1e-10)
    by_depth = rules.Composite(until=((1, chain[0]), (2, chain[1])), linear=chain[2])
    assert torch.allclose(explained(score, by_depth, x)[0], expected, rtol=1e-7, atol=1e-10)


def test_depth_and_places_choose_the_rule():
    net = filled(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(2, 2, 3)), nn.Conv2d(2, 1, 1))
    )
    x, model = drawn(1, 6, 6), eg.from_module(net)
    score = eg.reducers.class_sum(model, 0)
    by = lambda **c: explained(score, rules.Composite(**c), x)
    plus = rules.ZPlus()
    assert_alike(by(first=plus), by(places=(("0", plus),)))
    assert_alike(by(last=plus), by(places=(("3", plus),)))
    assert_alike(by(until=((2, plus),)), by(places=(("0", plus), ("2", plus))))
    assert_alike(by(conv=plus), by(until=((9, plus),)))
    assert_alike(by(places=(("2", rules.Flat()), ("2.0", plus))), by(places=(("2.0", plus),)))
    assert len({by(**c).sum().item() for c in ({}, {"first": plus}, {"last": plus}, {"conv": plus})}) == 4


def test_the_first_layer_of_two_networks_in_a_row_is_that_of_the_first():
    one, two = (filled(nn.Conv2d(1, 1, 3, padding=1), key=k) for k in (1, 2))
    x = drawn(1, 5, 5)
    chained = eg.reducers.class_sum(lambda z: eg.from_module(two)(eg.from_module(one)(z).relu()), 0)
    whole = eg.reducers.class_sum(eg.from_module(nn.Sequential(one, nn.ReLU(), two)), 0)
    for composite in (rules.Composite(first=rules.Flat()), "epsilon_plus_flat", "deep_taylor"):
        assert torch.allclose(explained(chained, composite, x), explained(whole, composite, x), rtol=1e-12)
    beside = eg.reducers.class_sum(lambda z: eg.from_module(one)(z) + eg.from_module(two)(z), 0)
    flat = explained(beside, "epsilon_plus_flat", x)
    parts = [
        explained(eg.reducers.class_sum(eg.from_module(n), 0), "epsilon_plus_flat", x) for n in (one, two)
    ]
    assert torch.allclose(flat, sum(parts), rtol=1e-10)


# -- conservation --------------------------------------------------------------------------------------------------


class Skips(nn.Module):
    """Everything that a U-Net is made of, without biases."""

    def __init__(self, ndim, up):
        super().__init__()
        conv = getattr(nn, f"Conv{ndim}d")
        self.ndim, self.up = ndim, up
        self.a, self.b = conv(1, 3, 3, padding=1, bias=False), conv(3, 3, 3, padding=1, bias=False)
        self.transposed = getattr(nn, f"ConvTranspose{ndim}d")(3, 3, 2, stride=2, bias=False)
        self.c, self.out = conv(6, 3, 3, padding=1, bias=False), conv(3, 2, 1, bias=False)

    def forward(self, x):
        skip = functional.relu(self.a(x))
        pool = getattr(functional, f"{'max' if self.up == 'transposed' else 'avg'}_pool{self.ndim}d")
        deep = functional.relu(self.b(pool(skip, 2)))
        if self.up == "transposed":
            deep = self.transposed(deep)
        else:
            deep = functional.interpolate(deep, scale_factor=2, mode=self.up)
        return self.out(torch.relu(self.c(torch.cat([deep, skip], 1)) + skip))


MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
NETS = [(n, up) for n in (1, 2, 3) for up in ("transposed", "nearest", MODES[n])]


@pytest.mark.parametrize(("ndim", "up"), NETS)
@together("composite", ["zero", "ab", "gamma", "plus"])
def test_without_biases_relevance_is_conserved(ndim, up, composite):
    rule = {
        "zero": rules.Zero(),
        "ab": rules.AlphaBeta(epsilon=0.0),
        "gamma": rules.GeneralisedGamma(epsilon=0.0),
        "plus": rules.ZPlus(epsilon=0.0),
    }[composite]
    net = filled(Skips(ndim, up), bias=False)
    x = drawn(1, *(8, 6, 4)[:ndim], key=1)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    found = explained(score, rules.Composite(conv=rule), x)
    # Where all contributions have the other sign there is nothing to share the relevance out to.
    room = ROUNDING if composite in ("zero", "gamma") else None
    if room is not None:
        assert float((found.sum() - score(x)).abs()) <= room * float(found.abs().sum())
    sums = rules.relevances(score, rules.Composite(conv=rule), x, ["c", "out"])
    assert float((sums["out"] - score(x)).abs()) <= ROUNDING * float(score(x).abs())


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_without_biases_four_ways_agree(ndim):
    net = filled(Skips(ndim, "transposed"), bias=False)
    x = drawn(1, *(8, 6, 4)[:ndim], key=1)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    expected = eg.input_x_gradient(score)(x)
    zero = torch.zeros_like(x)
    ways = {
        "zero": explained(score, "zero", x),
        "epsilon": explained(score, rules.Composite(conv=rules.Epsilon(0.0)), x),
        "ig": eg.integrated_gradients(score, steps=3)(x, zero),
        "deep_lift": eg.deep_lift(score)(x, zero),
    }
    for name, found in ways.items():
        assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max()), name


def test_what_is_missing_is_the_share_of_the_biases():
    net, x = filled(Skips(3, "transposed"), bias=False), drawn(1, 4, 4, 4, key=1)
    net.out.bias = nn.Parameter(torch.tensor([0.0, 0.75]).double(), requires_grad=False)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    found = explained(score, "zero", x)
    assert float(score(x) - found.sum()) == pytest.approx(0.75 * 64, rel=1e-9)


@pytest.mark.parametrize("ndim", [2, 3])
def test_relevance_of_a_unet_from_place_to_place(ndim):
    net = filled(zoo.small_unet(ndim))
    x = drawn(1, *[4] * ndim, key=1)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    sums = rules.relevances(score, "zero", x, ["decoder.relu", "decoder.norm", "out"])
    assert float(sums["out"]) == pytest.approx(float(score(x)), rel=1e-9)
    bias = net.out.bias[1] * 4**ndim
    assert float(sums["decoder.relu"]) == pytest.approx(float(score(x) - bias), rel=1e-9)
    assert float(sums["decoder.norm"]) == pytest.approx(float(sums["decoder.relu"]), rel=1e-9)


# -- spellings, norms ----------------------------------------------------------------------------------------------


W, B = drawn(3, 2, 3, 3, key=1), drawn(3, key=2)
V = drawn(2, 3, key=3)


def module_way():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1)).double()
    net[0].load_state_dict({"weight": W, "bias": B})
    head = nn.Linear(3, 2).double()
    head.load_state_dict({"weight": V, "bias": B[:2]})
    return lambda x: head(net(x[None])[0, :, 0])[1]


SPELLINGS = {
    "functional": lambda x: functional.linear(functional.conv2d(x, W, B).relu().mean((1, 2)), V, B[:2])[1],
    "in place": lambda x: functional.linear(functional.conv2d(x, W, B).relu_().mean((1, 2)), V).add_(B[:2])[
        1
    ],
    "clamp": lambda x: (V @ functional.conv2d(x, W, B).clamp(min=0).mean((1, 2)) + B[:2])[1],
    "product": lambda x: (functional.conv2d(x, W, B).relu().mean((1, 2)) @ V.T).add(B[:2])[1],
    "addmm": lambda x: torch.addmm(B[None, :2], functional.conv2d(x, W, B).relu().mean((1, 2))[None], V.T)[
        0, 1
    ],
    "einsum": lambda x: (torch.einsum("oi,i->o", V, functional.conv2d(x, W, B).relu().mean((1, 2))) + B[:2])[
        1
    ],
    "bias later": lambda x: functional.linear(
        (functional.conv2d(x, W) + B[:, None, None]).relu().mean((1, 2)), V, B[:2]
    )[1],
    "aten": lambda x: functional.linear(
        torch.ops.aten.convolution(x[None], W, B, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)[0]
        .relu()
        .mean((1, 2)),
        V,
        B[:2],
    )[1],
}
COMPOSITES = {
    "epsilon": "epsilon",
    "gamma": rules.Composite(conv=rules.Gamma(), linear=rules.GeneralisedGamma()),
    "plus": rules.Composite(conv=rules.ZPlus(), linear=rules.AlphaBeta()),
}


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_agree(spelling, composite):
    x = drawn(2, 5, 5, key=4)
    expected = explained(module_way(), COMPOSITES[composite], x)
    found = explained(SPELLINGS[spelling], COMPOSITES[composite], x)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-12)


def test_a_reused_layer_is_two():
    conv = filled(nn.Conv2d(2, 2, 3, padding=1))
    x, model = drawn(2, 5, 5, key=4), lambda x: conv(conv(x[None]).relu())[0, 1].sum()
    other = filled(nn.Conv2d(2, 2, 3, padding=1))
    twice = lambda x: other(conv(x[None]).relu())[0, 1].sum()
    assert_alike(explained(model, "epsilon_plus_flat", x), explained(twice, "epsilon_plus_flat", x))


NORMED = {
    "conv": (nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)),
    "transposed": (nn.ConvTranspose2d(2, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4)),
    "linear": (nn.Linear(5, 4), nn.BatchNorm1d(4)),
}


@pytest.mark.parametrize("composite", [*COMPOSITES, "epsilon_plus_flat", "deep_taylor"])
@pytest.mark.parametrize("kind", NORMED)
def test_a_batch_norm_is_part_of_the_layer_before_it(kind, composite):
    layer, norm = (filled(m, key=i) for i, m in enumerate(NORMED[kind]))
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    x = drawn(*((5,) if kind == "linear" else (2, 5, 5)), key=6)[None]
    w, bias = layer.weight.detach(), 0 if layer.bias is None else layer.bias.detach()
    merged = (
        w * scale.reshape(-1, *[1] * (w.ndim - 1))
        if kind != "transposed"
        else torch.cat([w[:1] * scale[:2].reshape(1, 2, 1, 1), w[1:] * scale[2:].reshape(1, 2, 1, 1)])
    )
    shift = (bias - norm.running_mean) * scale + norm.bias
    run = {
        "conv": lambda x, w, b: functional.conv2d(x, w, b, groups=2),
        "transposed": lambda x, w, b: functional.conv_transpose2d(x, w, b, groups=2),
        "linear": functional.linear,
    }[kind]
    v = drawn(*norm(layer(x)).shape, key=7)
    chosen = COMPOSITES.get(composite, composite)
    score = lambda x: (norm(layer(x)).relu() * v).sum()
    folded = lambda x: (run(x, merged.detach(), shift.detach()).relu() * v).sum()
    assert torch.allclose(explained(score, chosen, x), explained(folded, chosen, x), rtol=1e-8, atol=1e-12)


def test_a_layer_that_was_written_to_is_not_merged():
    conv, norm = filled(nn.Conv1d(1, 2, 3)), filled(nn.BatchNorm1d(2))
    x = drawn(1, 1, 7, key=1)
    written = lambda x: norm(conv(x).relu_())[0, 1].sum()
    plain = lambda x: norm(conv(x).relu())[0, 1].sum()
    assert_alike(explained(written, "epsilon_plus", x), explained(plain, "epsilon_plus", x))


@pytest.mark.parametrize(
    "norm",
    [nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.LayerNorm((4, 6, 6)), nn.RMSNorm((4, 6, 6))],
    ids=lambda m: type(m).__name__,
)
def test_a_norm_has_a_constant_scale(norm):
    norm, v, x = filled(norm), drawn(4, 6, 6, key=2), drawn(4, 6, 6, key=3)
    with torch.no_grad():
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()
    score = lambda x: (norm(x[None])[0] * v).sum()
    found = explained(score, "epsilon", x)
    assert float(found.sum()) == pytest.approx(float(score(x)), rel=1e-4)
    # With the scale that it has at x the norm is linear.
    spread = {"InstanceNorm2d": (2, 3), "LayerNorm": (1, 2, 3), "RMSNorm": (1, 2, 3), "GroupNorm": (2, 3, 4)}
    axes, shape = (
        spread[type(norm).__name__],
        (1, 2, 2, 6, 6) if isinstance(norm, nn.GroupNorm) else (1, 4, 6, 6),
    )

    def centred(x):
        x = x.reshape(shape)
        return x if isinstance(norm, nn.RMSNorm) else x - x.mean(axes, keepdim=True)

    size = centred(x).square().mean(axes, keepdim=True)
    eps = norm.eps if norm.eps is not None else torch.finfo(x.dtype).eps
    gain = norm.weight.detach().reshape(-1, 1, 1) if norm.weight.ndim == 1 else norm.weight.detach()
    linear = lambda z: ((centred(z) / torch.sqrt(size + eps)).reshape(x.shape) * gain * v).sum()
    assert torch.allclose(found, eg.input_x_gradient(linear)(x), rtol=1e-3, atol=1e-3)


# -- products, attention, refusals -----------------------------------------------------------------------------------


def test_gates_are_constant_and_other_products_are_halved():
    x = drawn(1, 6, key=1)
    u, v = drawn(6, key=2), drawn(6, key=3)
    gated = explained(lambda x: (torch.sigmoid(x * u) * (x * v)).sum(), "epsilon", x)
    assert torch.allclose(gated, torch.sigmoid(x * u) * x * v)
    both = explained(lambda x: ((x[:, :3] * u[:3]) * (x[:, 3:] * v[3:])).sum(), "epsilon", x)
    half = x[:, :3] * u[:3] * x[:, 3:] * v[3:] / 2
    assert torch.allclose(both, torch.cat([half, half], 1))
    ratio = explained(lambda x: (x[:, :3] / (1 + x[:, 3:].square())).sum(), "epsilon", x)
    assert torch.allclose(ratio, torch.cat([x[:, :3] / (1 + x[:, 3:].square()), 0 * half], 1))
    right = explained(lambda x: (1 - x * u).sum(), "epsilon", x)
    assert torch.allclose(right, -x * u)
    unit = explained(lambda x: functional.glu(x).sum(), "epsilon", x)
    assert torch.allclose(unit, torch.cat([functional.glu(x), 0 * half], 1))


@pytest.mark.parametrize("spelling", ["sdpa", "products"])
def test_attention_has_constant_weights(spelling):
    q, k, v = (drawn(4, 4, key=i) for i in range(3))
    x = drawn(3, 4, key=5)
    weights = torch.softmax((x @ q) @ (x @ k).T / 2, -1)

    def score(x):
        if spelling == "sdpa":
            return functional.scaled_dot_product_attention((x @ q)[None], (x @ k)[None], (x @ v)[None]).sum()
        return (torch.softmax((x @ q) @ (x @ k).mT / 2, -1) @ (x @ v)).sum()

    expected = eg.input_x_gradient(lambda z: (weights @ (z @ v)).sum())(x)
    assert torch.allclose(explained(score, "zero", x), expected, rtol=1e-9)


def test_multi_head_attention_is_one_layer_of_its_values():
    net, x = filled(nn.MultiheadAttention(4, 2, bias=False, batch_first=True)), drawn(5, 4, key=1)
    score = lambda x: net(x[None], x[None], x[None], need_weights=False)[0].square().sum()
    found = explained(score, "zero", x)
    assert float(found.sum()) == pytest.approx(float(score(x)), rel=1e-9)


REFUSED = {
    "cumprod": lambda x: torch.relu(x).cumprod(0).sum(),
    "cdist": lambda x: torch.cdist(x, x + 1).sum(),
    "batch_norm": lambda x: functional.batch_norm(x, None, None, training=True).sum(),
    "grid_sample": lambda x: functional.grid_sample(
        torch.ones(1, 1, 2, 2).to(x), x.reshape(1, 2, 2, 2), align_corners=False
    ).sum(),
}


@pytest.mark.parametrize("rewrite", [rules.lrp, rules.excitation])
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused(name, rewrite):
    with pytest.raises(
        NotImplementedError, match=rf"expected operations that it has rules for, got '{name}'"
    ):
        eg.gradient(rewrite(REFUSED[name]))(drawn(2, 4))


def test_more_refusals():
    x = drawn(1, 4)
    with pytest.raises(NotImplementedError, match="expected a softmax that weighs other values"):
        explained(lambda x: torch.softmax(x, -1)[0, 1], "epsilon", x)
    with pytest.raises(ValueError, match=r"expected a Composite or one of zero, .* Nearest: epsilon"):
        eg.lrp(lambda x: x.sum(), composite="epsilom")
    with pytest.raises(ValueError, match="expected beta >= 0 and alpha = 1"):
        rules.AlphaBeta(2.0, 0.5)
    with pytest.raises(ValueError, match="expected low <= 0 <= high"):
        rules.ZBox(1.0, 2.0)
    with pytest.raises(ValueError, match="expected both bounds or none"):
        rules.deep_taylor(low=0.0)
    with pytest.raises(ValueError, match="expected a layer with as many outputs as inputs"):
        explained(lambda x: functional.linear(x, drawn(3, 4)).sum(), rules.Composite(linear=rules.Pass()), x)
    with pytest.raises(NotImplementedError, match="got 'sub'"):
        eg.gradient(rules.excitation(lambda x: (1 - x).sum()))(x)


def test_pass_hands_relevance_on_position_by_position():
    w, v, x = drawn(4, 4, key=1), drawn(4, key=2), drawn(1, 4, key=3)
    found = explained(lambda x: (functional.linear(x, w) * v).sum(), rules.Composite(linear=rules.Pass()), x)
    assert torch.allclose(found, functional.linear(x, w) * v)


# -- examples, batches, layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus_flat", "last"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_three_examples_at_once_are_three(composite, wrapped):
    net = filled(zoo.small_unet(2))
    model = eg.from_module(net) if wrapped else eg.models.parametrised(net)
    if not wrapped:
        model = model[0](model[1])
    xs = drawn(3, 1, 4, 6)
    chosen = rules.Composite(last=rules.ZPlus()) if composite == "last" else composite
    explain = eg.lrp(eg.reducers.class_sum(model, 1), composite=chosen)
    one_by_one = torch.stack([explain(x) for x in xs])
    for many in (torch.func.vmap(explain)(xs), eg.batched(explain)(xs)):
        assert torch.allclose(many, one_by_one, rtol=1e-8, atol=1e-10 * one_by_one.abs().max())


@pytest.mark.parametrize("place", ["encoder", "bottom", "decoder"])
def test_relevance_at_a_layer(place):
    net, x = filled(zoo.small_unet(2)), drawn(1, 4, 6)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    found = eg.at(eg.lrp, place)(score, composite="epsilon_plus")(x)
    sums = rules.relevances(score, "epsilon_plus", x, [place])
    assert found.shape == eg.tap(score, place)(x).shape
    assert float(found.sum()) == pytest.approx(float(sums[place]), rel=1e-9)


# -- excitation ------------------------------------------------------------------------------------------------------


def positive_unet(ndim):
    """All normalisers are positive: every unit excites something, and something excites every unit."""
    net = filled(Skips(ndim, MODES[ndim]), bias=False)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.abs() + 0.01)
    return net


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("up", ["transposed", "nearest", "linear"])
def test_probability_is_one_at_every_cut(ndim, up):
    net = positive_unet(ndim)
    net.up = MODES[ndim] if up == "linear" else up
    x = drawn(1, *(8, 6, 4)[:ndim], key=1).abs()
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    for place in ("a", "out:in"):
        found = eg.excitation_backprop(score, place)(x)
        assert float(found.sum()) == pytest.approx(1, abs=1e-9), place
        assert found.shape[0] == 1
        assert bool((found >= 0).all())
    whole = (x * eg.gradient(rules.excitation(score))(x)).sum()
    assert float(whole) == pytest.approx(1, abs=1e-9)


def test_excitation_is_its_definition():
    w = [drawn(5, 6, key=1), drawn(4, 5, key=2), drawn(3, 4, key=3)]
    b = [drawn(5, key=4), drawn(4, key=5), drawn(3, key=6)]
    x, weights = drawn(1, 6, key=7), torch.tensor([1.0, 3.0, 0.0]).double()

    def score(x):
        h = eg.mark(functional.linear(x, w[0], b[0]).relu(), "hidden")
        h = functional.linear(h, w[1], b[1]).relu()
        return (functional.linear(h, w[2], b[2]) * weights).sum()

    first = torch.relu(x[0] @ w[0].T + b[0])
    second = torch.relu(first @ w[1].T + b[1])

    def slow(last):
        p = weights / weights.sum()
        for a, v in ((second, last), (first, w[1])):
            below = torch.zeros_like(a)
            for k, j in itertools.product(range(len(p)), range(len(a))):
                whole = (a * v[k].clamp(min=0)).sum()
                below[j] += a[j] * max(v[k, j], 0) / whole * p[k] if whole > 0 else 0
            p = below
        return p

    found = eg.excitation_backprop(score, "hidden")(x)
    a, g = eg.activation_and_gradient(rules.excitation(score), "hidden")(x)
    assert torch.allclose((a * g)[0], slow(w[2]), rtol=1e-9)
    assert torch.allclose(found, (a * g).sum(0, keepdim=True))
    contrast = (slow(w[2]) - slow(-w[2])).clamp(min=0)
    assert torch.allclose(eg.contrastive_excitation_backprop(score, "hidden")(x)[0], contrast, rtol=1e-9)


def test_contrast_between_two_layers_is_truncated_there():
    net, x = filled(zoo.small_unet(2)), drawn(1, 4, 6).abs()
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    above = eg.contrastive_excitation_backprop(score, "decoder")(x).sum()
    at_top = eg.contrastive_excitation_backprop(score, "encoder", contrast="decoder")(x)
    signed = eg.contrastive_excitation_backprop(score, "encoder")(x)
    assert 0 < float(at_top.sum()) <= float(above) + 1e-9
    assert not torch.allclose(at_top, signed)
    same = eg.contrastive_excitation_backprop(score, "decoder", contrast="decoder")(x)
    assert torch.allclose(same, eg.contrastive_excitation_backprop(score, "decoder")(x), atol=1e-12)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, affine=True), nn.GroupNorm(3, 3)],
    ids=lambda m: type(m).__name__,
)
def test_a_norm_of_negative_weights_turns_what_excites(norm):
    conv, norm = filled(nn.Conv1d(2, 3, 1, bias=False)), filled(norm)
    head, x = drawn(1, 3, key=5).abs(), drawn(1, 2, 6, key=6).abs()
    sign = torch.tensor([1.0, -1.0, 1.0]).double()
    with torch.no_grad():
        norm.weight.copy_(sign * norm.weight.abs())
    score = lambda x: functional.linear(norm(conv(x)).relu().sum(2), head).sum()
    h = norm(conv(x)).relu().detach()[0]
    p = h * head.T / (h * head.T).sum()
    w = (conv.weight[..., 0].detach() * sign[:, None]).clamp(min=0)
    parts = x[0][None] * w[:, :, None]
    whole = parts.sum(1, keepdim=True)
    expected = (torch.where(whole > 0, parts / whole, 0) * p[:, None]).sum(0)
    found = x * eg.gradient(rules.excitation(score))(x)
    assert torch.allclose(found[0], expected, rtol=1e-9, atol=1e-12)


# -- the trained network ----------


def test_the_leak_of_a_trained_network_is_that_of_its_biases():
    net, x = zoo.brain_extraction_unet().requires_grad_(False), zoo.head().data[:, 32:96:2, 32:96:2, 32:96:2]
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    sums = rules.relevances(score, "zero", x, ["out", "decoder.2.conv"])
    assert float(sums["out"]) == pytest.approx(float(score(x)), rel=1e-4)
    assert float(sums["decoder.2.conv"]) == pytest.approx(float(score(x) - net.out.bias[0] * 32**3), rel=1e-4)
    # What reaches the input is F less the biases, each times what the score gains by it.
    z, share = x.clone(), 0.0
    for name, bias in net.named_parameters():
        if name.endswith("bias"):
            more = eg.nudge(score, name.removesuffix(".bias"))
            zero = torch.zeros(len(bias), 1, 1, 1)
            share += float((torch.func.grad(lambda d: more(z, d))(zero).flatten() * bias).sum())
    reached = explained(score, "zero", x).sum()
    assert float(reached) == pytest.approx(float(score(x)) - share, rel=1e-3)


# -- products of several, addends, attention ---------------------------------------------------------------------


def test_several_factors_of_a_kind_take_equal_parts():
    x, w = drawn(3, 4, key=1), drawn(5, 4, 4, key=2)
    b = drawn(5, key=3)
    each = lambda value, n: value / n
    product = explained(lambda x: x.prod(), "zero", x)
    assert torch.allclose(product, each(x.prod(), 12).expand_as(x))
    columns = explained(lambda x: x.prod(0).sum(), "zero", x)
    assert torch.allclose(columns, (x.prod(0) / 3).expand_as(x))
    three = explained(lambda x: torch.einsum("i,i,i->", x[0], x[1], x[2]), "zero", x)
    assert torch.allclose(three, (x.prod(0) / 3).expand_as(x))
    outer = explained(lambda x: torch.outer(x[0], x[1]).sum(), "zero", x)
    sums = x.sum(1)
    assert torch.allclose(outer, torch.stack([x[0] * sums[1] / 2, x[1] * sums[0] / 2, 0 * x[0]]))
    forms = explained(lambda x: functional.bilinear(x[:1], x[1:2], w, b).sum(), "zero", x)
    contributions = torch.einsum("kij,i,j->ij", w, x[0], x[1])
    expected = torch.stack([contributions.sum(1) / 2, contributions.sum(0) / 2, 0 * x[0]])
    assert torch.allclose(forms, expected)  # the bias keeps its own
    kron = explained(lambda x: torch.kron(x[0], x[1]).sum(), "zero", x)
    assert torch.allclose(kron, outer)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("rule", [rules.Epsilon(0.0), rules.ZPlus(), rules.Gamma(), rules.Flat()], ids=repr)
def test_a_bilinear_form_of_data_and_a_constant_is_a_layer(rule, which):
    x, other, w, b = drawn(2, 4, key=1), drawn(2, 4, key=2), drawn(5, 4, 4, key=3), drawn(5, key=4)
    out = drawn(2, 5, key=5)
    order = (lambda x: (x, other)) if which == 0 else (lambda x: (other, x))
    score = lambda x: (functional.bilinear(*order(x), w, b) * out).sum()
    found = explained(score, rules.Composite(linear=rule), x)
    for row in range(2):
        matrix = torch.einsum("kij,j->ki" if which == 0 else "kij,i->kj", w, other[row])
        one = lambda x, matrix=matrix, row=row: (functional.linear(x, matrix, b) * out[row]).sum()
        expected = explained(one, rules.Composite(linear=rule), x[row : row + 1])
        assert torch.allclose(found[row], expected[0], rtol=1e-9, atol=1e-12)


def plus(x):
    return x.clamp(min=0) + 0.5


ADDENDS = {
    "addmm": (lambda x: torch.addmm(plus(x), x, V4, beta=2, alpha=3), lambda x: 2 * plus(x) + 3 * (x @ V4)),
    "baddbmm": (
        lambda x: torch.baddbmm(plus(x)[None], x[None], V4[None]),
        lambda x: plus(x)[None] + x[None] @ V4[None],
    ),
    "addbmm": (
        lambda x: torch.addbmm(plus(x), torch.stack([x, -x]), torch.stack([V4, 2 * V4])),
        lambda x: plus(x) + (torch.stack([x, -x]) @ torch.stack([V4, 2 * V4])).sum(0),
    ),
    "addcmul": (
        lambda x: torch.addcmul(plus(x), x, x.tanh(), value=2),
        lambda x: plus(x) + 2 * (x * x.tanh()),
    ),
    "addcdiv": (
        lambda x: torch.addcdiv(plus(x), x, x.exp(), value=2),
        lambda x: plus(x) + 2 * (x / x.exp()),
    ),
    "bias of data": (
        lambda x: functional.linear(x, V4, plus(x)[0]),
        lambda x: functional.linear(x, V4) + plus(x)[0],
    ),
    "bias of a convolution": (
        lambda x: functional.conv1d(x[None], V4[..., None], plus(x)[0]),
        lambda x: functional.conv1d(x[None], V4[..., None]) + plus(x)[0][:, None],
    ),
    "lerp": (
        lambda x: torch.lerp(x, plus(x), x.sigmoid()),
        lambda x: (1 - x.sigmoid()) * x + x.sigmoid() * plus(x),
    ),
}

V4 = drawn(4, 4, key=8)


@together("composite", ["epsilon", "epsilon_plus", "deep_taylor", "last"])
@together("name", ADDENDS)
def test_what_is_added_to_a_product_has_a_rule_of_its_own(name, composite):
    x, v = drawn(4, 4, key=1), drawn(4, 4, key=2)
    chosen = rules.Composite(last=rules.ZPlus()) if composite == "last" else composite
    one, other = ((lambda x, f=f: (f(x) * v).sum()) for f in ADDENDS[name])
    assert torch.allclose(explained(one, chosen, x), explained(other, chosen, x), rtol=1e-9, atol=1e-12)


def test_a_gate_stays_a_gate():
    x, u = drawn(1, 2, 4, 4, key=1), drawn(1, 2, 4, 4, key=2)
    gates = {
        "not": lambda x: 1 - torch.sigmoid(x),
        "scaled": lambda x: 2 * torch.sigmoid(x) - 1,
        "of two": lambda x: torch.sigmoid(x) * torch.sigmoid(2 * x),
        "resampled": lambda x: functional.interpolate(
            functional.avg_pool2d(torch.sigmoid(x), 2), scale_factor=2, mode="bilinear"
        ),
        "averaged": lambda x: x.sigmoid().mean((2, 3), keepdim=True).expand_as(x),
    }
    for name, gate in gates.items():
        found = explained(lambda x, gate=gate: (gate(x * u) * (x * u)).sum(), "zero", x[0])
        expected = gate(x * u) * (x * u)
        assert torch.allclose(found, expected[0], rtol=1e-9), name


def test_a_soft_maximum_is_a_mean_with_constant_weights():
    x = drawn(3, 5, key=1)
    p = x.softmax(1)
    assert torch.allclose(explained(lambda x: x.logsumexp(1).sum(), "zero", x), p * x)
    likely = explained(lambda x: x.log_softmax(1)[:, 2].sum(), "zero", x)
    expected = -p * x
    expected[:, 2] += x[:, 2]
    assert torch.allclose(likely, expected)
    # The entropy of the weights is the bias.
    entropy = -(p * p.log()).sum()
    total = explained(lambda x: x.logsumexp(1).sum(), "zero", x).sum()
    assert float(total) == pytest.approx(float(x.logsumexp(1).sum() - entropy), rel=1e-12)
    with pytest.raises(NotImplementedError, match="got 'logsumexp'"):
        eg.gradient(
            rules.excitation(lambda x: functional.linear(torch.relu(x).logsumexp(1), x[:1, :3]).sum())
        )(x)


def test_where_data_is_sampled_is_constant():
    x, to_grid = drawn(2, 4, 4, key=1), drawn(2, 2, key=2) / 3
    grid = lambda x: torch.einsum("ghw,gd->hwd", x, to_grid).tanh()[None]
    score = lambda x: functional.grid_sample(x[None], grid(x), align_corners=True).square().sum() / 2
    fixed = grid(x)
    sampled = functional.grid_sample(x[None], fixed, align_corners=True)
    (expected,) = torch.func.vjp(lambda z: functional.grid_sample(z[None], fixed, align_corners=True), x)[1](
        sampled / 2
    )
    found = explained(score, "zero", x)
    assert torch.allclose(found, x * expected, rtol=1e-9)
    assert float(found.sum()) == pytest.approx(float(score(x)), rel=1e-9)


@pytest.mark.parametrize("composite", [*COMPOSITES, "epsilon_plus_flat", "last", "places"])
@pytest.mark.parametrize("more", [{}, {"kdim": 3, "vdim": 5}, {"bias": False}])
def test_projections_of_attention_follow_the_composite(more, composite):
    """Against the same network with layers of its own for them."""
    net, x = filled(nn.MultiheadAttention(4, 2, batch_first=True, **more)), drawn(5, 4, key=1)
    to_k, to_v = (drawn(more.get(n, 4), 4, key=9) for n in ("kdim", "vdim"))
    weights = (
        net.in_proj_weight.chunk(3)
        if net.in_proj_weight is not None
        else (net.q_proj_weight, net.k_proj_weight, net.v_proj_weight)
    )
    biases = (None,) * 3 if net.in_proj_bias is None else net.in_proj_bias.chunk(3)
    plus = rules.ZPlus()
    chosen = {
        "last": rules.Composite(last=plus),
        "places": rules.Composite(places=(("", rules.Epsilon()), ("0", plus))),
    }.get(composite, COMPOSITES.get(composite, composite))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("0", net)

        def forward(self, x):
            k, v = functional.linear(x, to_k), functional.linear(x, to_v)
            return getattr(self, "0")(x, k if more.get("kdim") else x, v if more.get("vdim") else x)[0]

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("0", nn.Identity())

        def forward(self, x):
            k, v = functional.linear(x, to_k), functional.linear(x, to_v)
            data = (x, k if more.get("kdim") else x, v if more.get("vdim") else x)
            q, k, v = (
                functional.linear(t, w, b).unflatten(-1, (2, 2)).transpose(1, 2)
                for t, w, b in zip(data, weights, biases, strict=True)
            )
            seen = torch.softmax(q @ k.mT / 2**0.5, -1) @ v
            seen = seen.transpose(1, 2).flatten(2)
            return functional.linear(seen, net.out_proj.weight, net.out_proj.bias)

    score = lambda module: lambda x: eg.from_module(module)(x).square().sum()
    whole = explained(score(Whole()), chosen, x)
    if composite == "places":  # the rule of the module is for its projections
        assert not torch.allclose(whole, explained(score(Whole()), "epsilon", x), rtol=1e-2)
        every = rules.Composite(linear=plus)
        if not more.get("vdim"):
            assert torch.allclose(whole, explained(score(Whole()), every, x), rtol=1e-9)
        return
    assert torch.allclose(whole, explained(score(Apart()), chosen, x), rtol=1e-7, atol=1e-10)
