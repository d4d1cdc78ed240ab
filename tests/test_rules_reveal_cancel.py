"""RevealCancel against its formulas, one weight at a time, and against Shapley values where it gives them."""

import itertools
import math

import pytest
import torch
from test_rules_deeplift import (
    NETWORKS,
    RELATIVE,
    SIZES,
    TABLE,
    between,
    draw,
    network_score,
    seeded,
)
from torch import nn
from torch.func import vmap
from torch.nn import functional

import esegeta as eg
from esegeta import zoo
from esegeta.rules import reveal_cancel

ROUNDING = 1e-12
NOTHING = 1e-7


def explained(score, x, baseline):
    return eg.deep_lift_reveal_cancel(score)(x, baseline)


def assert_complete(score, x, baseline):
    y, y0 = score(x).detach(), score(baseline).detach()
    torch.testing.assert_close(reveal_cancel(score, baseline)(x), y, rtol=RELATIVE[x.dtype], atol=0)
    off = (explained(score, x, baseline).sum().detach() - (y - y0)).abs() / torch.maximum(y.abs(), y0.abs())
    assert float(off) <= RELATIVE[x.dtype]


def close(a, b, rounding=ROUNDING):
    return float((a - b).detach().abs().max()) <= rounding * max(1.0, float(b.detach().abs().max()))


# -- the formulas of the paper, one weight at a time ---------------------------------------------------------------


def affine_by_loops(w, b, start, d):
    """Of ``W x + b`` the reference, and the positive and the negative part of the difference, unit by unit."""
    at = [float(b[k]) + sum(float(w[k, i]) * start[i] for i in range(len(d))) for k in range(len(b))]
    parts = [
        [sum(c for i in range(len(d)) if sign * (c := float(w[k, i]) * d[i]) > 0) for k in range(len(b))]
        for sign in (1, -1)
    ]
    return at, *parts


def multipliers_by_loops(f, layers, x, baseline):
    """Multipliers of the inputs of a perceptron with the activation f after all layers but the last."""
    start, d, kept = (
        [float(v) for v in baseline],
        [float(a - b) for a, b in zip(x, baseline, strict=True)],
        [],
    )
    for w, b in layers[:-1]:
        at, up, down = affine_by_loops(w, b, start, d)
        seen = []
        for z, p, n in zip(at, up, down, strict=True):
            q, m = p or NOTHING, n or -NOTHING  # the limit, where there is no such part
            positive = (f(z + q) - f(z)) / 2 + (f(z + q + n) - f(z + n)) / 2
            negative = (f(z + m) - f(z)) / 2 + (f(z + m + p) - f(z + p)) / 2
            seen.append((positive / q, negative / m))
        kept.append((d, seen))
        d = [f(z + p + n) - f(z) for z, p, n in zip(at, up, down, strict=True)]
        start = [f(z) for z in at]
    m = [(float(v), float(v)) for v in layers[-1][0][0]]  # of the positive and the negative part of each unit
    for (w, _), (d, seen) in zip(reversed(layers[:-1]), reversed(kept), strict=True):
        below = []
        for i, change in enumerate(d):
            total = 0.0
            for k in range(len(w)):
                toward = float(w[k, i]) * change
                share = (1.0, 0.0) if toward > 0 else (0.0, 1.0) if toward < 0 else (0.5, 0.5)
                pulled = [multiplier * slope for multiplier, slope in zip(m[k], seen[k], strict=True)]
                total += float(w[k, i]) * sum(s * v for s, v in zip(share, pulled, strict=True))
            below.append((total, total))
        m = below
    return torch.tensor([p for p, _ in m], dtype=torch.float64)


RISING = {
    "relu": (functional.relu, lambda z: max(z, 0.0)),
    "leaky": (lambda h: functional.leaky_relu(h, 0.2), lambda z: z if z > 0 else 0.2 * z),
    "tanh": (torch.tanh, math.tanh),
    "sigmoid": (torch.sigmoid, lambda z: 1 / (1 + math.exp(-z))),
    "softplus": (functional.softplus, lambda z: math.log1p(math.exp(z))),
    "relu6 shifted": (lambda h: functional.relu6(h + 3) - 1, lambda z: min(max(z + 3, 0.0), 6.0) - 1),
}


@pytest.mark.parametrize("name", RISING)
@pytest.mark.parametrize("seed", range(3))
def test_a_perceptron_by_loops(name, seed):
    f, slow = RISING[name]
    sizes = (5, 4, 6, 1)
    layers = [
        (draw(n, m, seed=10 * seed + n), draw(n, seed=10 * seed + n + 1))
        for m, n in itertools.pairwise(sizes)
    ]
    x, baseline = draw(5, seed=seed), draw(5, seed=seed + 50)
    baseline[1] = x[1]  # an input that does not differ has the mean of both multipliers

    def score(x):
        h = x
        for w, b in layers[:-1]:
            h = f(functional.linear(h, w, b))
        return functional.linear(h, *layers[-1]).sum()

    expected = multipliers_by_loops(slow, layers, x, baseline)
    found = eg.gradient(reveal_cancel(score, baseline))(x)
    assert close(found * (x - baseline), expected * (x - baseline), 1e-9)
    assert close(found, expected, 1e-5)


# -- Shapley values ------------------------------------------------------------------------------------------------


def shapley(score, x, baseline):
    n, out = len(x), torch.zeros_like(x)
    for order in itertools.permutations(range(n)):
        z = baseline.clone()
        for i in order:
            before = score(z)
            z[i] = x[i]
            out[i] += (score(z) - before) / math.factorial(n)
    return out


PAIR = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
OF_TWO = {
    "min": lambda x: x[0] - torch.relu(x @ PAIR[0]),
    "max": lambda x: x[1] + torch.relu(x @ PAIR[0]),
    "min, subtracted": lambda x: x[0] - torch.relu(x[0] - x[1]),
    "min, by a convolution": lambda x: (
        x[0] - functional.conv1d(x[None, :, None], PAIR[..., None]).clamp(min=0).sum()
    ),
    "min of both, doubled": lambda x: (x[:1] - functional.relu(functional.linear(x, PAIR)) * 2 + x[1:]).sum(),
}


@pytest.mark.parametrize("name", OF_TWO)
@pytest.mark.parametrize("ends", [(5.0, 2.0), (2.0, 5.0), (3.0, 3.0), (1e-3, 70.0)])
def test_the_smaller_or_larger_of_two_is_shared_out_as_by_shapley(name, ends):
    score, x = OF_TWO[name], torch.tensor(ends, dtype=torch.float64)
    assert close(explained(score, x, 0 * x), shapley(score, x, 0 * x))


def test_what_cancels_is_seen():
    x = torch.tensor([3.0, 3.0], dtype=torch.float64)
    nothing = lambda x: torch.relu(x[0] - x[1])
    assert eg.deep_lift(nothing)(x, 0 * x).tolist() == [0.0, 0.0]
    assert explained(nothing, x, 0 * x).tolist() == [1.5, -1.5]


SINGLE = ["relu", "leaky_relu", "elu", "gelu", "silu", "mish", "tanh", "softplus", "hardswish", "tanhshrink"]


@pytest.mark.parametrize("name", [*SINGLE, "exp", "square", "abs", "cos", "atan", "prelu", "1 / x", "2 ** x"])
@pytest.mark.parametrize("seed", range(3))
def test_one_unit_with_one_input_on_each_side(name, seed):
    """Also where the function falls: its effects are Shapley values of the two parts."""
    special = {
        "prelu": lambda h: functional.prelu(h[None], torch.tensor([0.3]).double())[0],
        "1 / x": lambda h: 1 / (h.square() + 1),
        "2 ** x": lambda h: 2**h,
    }
    f = special.get(name) or getattr(functional, name, None) or getattr(torch, name)
    x, baseline = draw(2, seed=seed), draw(2, seed=seed + 9)
    w = torch.stack([(x - baseline).sign()[0], -(x - baseline).sign()[1]]) * draw(2, seed=seed + 3).abs()
    score = lambda x: f((x * w).sum()[None] + 0.3).sum()
    if name == "1 / x":
        score = lambda x: (1 / ((x * w).sum() + 9)) * 20
    assert close(explained(score, x, baseline), shapley(score, x, baseline))


def test_roots_that_one_part_has_none_of_take_the_secant():
    x, baseline = torch.tensor([4.0, 5.0]).double(), torch.tensor([1.0, 1.0]).double()
    score = lambda x: torch.sqrt(x[0] - x[1] + 2)  # 2 - 4 has no root
    assert close(explained(score, x, baseline), eg.deep_lift(score)(x, baseline))
    assert_complete(score, x, baseline)


# -- every operation, networks -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_complete(name):
    x = draw(*SIZES[2], seed=1)
    assert_complete(between(2, TABLE[name]), x, x + 2 * draw(*SIZES[2], seed=100))


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("name", ["relu", "transposed", "pools"])
def test_complete_in_other_dimensions(axes, name):
    of = lambda kind: getattr(functional, f"{kind}{axes}d")
    middle = {
        "relu": torch.relu,
        "transposed": lambda h: of("conv_transpose")(h.tanh(), draw(6, 2, *[3] * axes), stride=2).relu(),
        "pools": lambda h: of("avg_pool")(of("max_pool")(h, 3, 2, 1), 2).sigmoid(),
    }[name]
    assert_complete(between(axes, middle), draw(*SIZES[axes], seed=1), draw(*SIZES[axes], seed=2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_complete_on_networks(name, dtype):
    x, baseline = (draw(1, 8, 8, 8, seed=s, dtype=dtype) for s in (0, 50))
    assert_complete(network_score(name, dtype), x, baseline)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_complete_on_the_brain_network(dtype):
    x = zoo.head().data[:, 32:96:4, 32:96:4, 32:96:4].to(dtype)
    x = x / x.max()
    score = eg.reducers.class_sum(eg.from_module(zoo.brain_extraction_unet().to(dtype)), 0)
    assert_complete(score, x, 0.3 * draw(*x.shape, seed=1, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "windowed attention"])
def test_no_example_influences_another(name):
    explain = eg.deep_lift_reveal_cancel(network_score(name))
    xs, baselines = (torch.stack([draw(1, 8, 8, 8, seed=s + i) for i in range(3)]) for s in (0, 50))
    alone = torch.stack([explain(x, b) for x, b in zip(xs, baselines, strict=True)])
    assert close(vmap(explain)(xs, baselines), alone)
    assert close(eg.batched(explain)(xs, baselines), alone)


def test_plain_functions_are_mapped():
    explain = eg.deep_lift_reveal_cancel(between(2, lambda h: functional.max_pool2d(h.relu(), 2)))
    xs, baselines = (torch.stack([draw(*SIZES[2], seed=s + i) for i in range(3)]) for s in (0, 50))
    alone = torch.stack([explain(x, b) for x, b in zip(xs, baselines, strict=True)])
    assert close(vmap(explain)(xs, baselines), alone)


# -- spellings -----------------------------------------------------------------------------------------------------

W, B, NORM = draw(4, 2, 3, 3, seed=1), draw(4, seed=2), seeded(lambda: nn.BatchNorm2d(4))
SCALE = (NORM.weight / (NORM.running_var + NORM.eps).sqrt()).detach()
SCALE[1] = -SCALE[1]
NORM.weight.data[1] *= -1
V = draw(3, 4, 2, 2, seed=5)


def normed(x):
    return NORM(functional.conv2d(x, W, B))


FIRST = {
    "functional": lambda x: functional.relu(normed(x)),
    "in place": lambda x: functional.relu(normed(x), inplace=True),
    "method in place": lambda x: normed(x).relu_(),
    "module": lambda x: nn.ReLU(inplace=True)(normed(x)),
    "clamp": lambda x: normed(x).clamp(min=0),
    "gate": lambda x: (h := normed(x)) * (h > 0),
    "where": lambda x: torch.where((h := normed(x)) > 0, h, 0.0),
    "maximum": lambda x: torch.maximum(normed(x), torch.zeros(()).double()),
    "folded": lambda x: functional.relu(
        functional.conv2d(
            x,
            W * SCALE[:, None, None, None],
            (B - NORM.running_mean) * SCALE + NORM.bias.detach(),
        )
    ),
    "bias later": lambda x: functional.relu(NORM(functional.conv2d(x, W) + B[:, None, None])),
    "bias later, in place": lambda x: functional.relu(NORM(functional.conv2d(x, W).add_(B[:, None, None]))),
    "moved about": lambda x: (
        functional.relu(NORM(functional.conv2d(x, W, B)).permute(0, 2, 3, 1).flip(1).contiguous())
        .flip(1)
        .permute(0, 3, 1, 2)
    ),
    "in two pieces": lambda x: torch.cat([functional.relu(h) for h in normed(x).split(2, 1)], 1),
    "scaled and back": lambda x: functional.relu(-(normed(x) * -2.0)) / 2,
    "subtracted twice": lambda x: functional.relu(1 - (1 - normed(x))),
}


@pytest.mark.parametrize("spelling", FIRST)
def test_spellings_agree(spelling):
    def score(first):
        return lambda x: functional.conv2d(first(x[None]), V).tanh().sum() * 3

    x, baseline = draw(2, 6, 7, seed=3), draw(2, 6, 7, seed=4)
    expected = explained(score(FIRST["functional"]), x, baseline)
    assert close(explained(score(FIRST[spelling]), x, baseline), expected, 1e-9)
    assert not close(eg.deep_lift(score(FIRST["functional"]))(x, baseline), expected, 1e-2)


def test_a_network_inside_and_the_code_around_it_are_one():
    conv = seeded(lambda: nn.Conv2d(2, 3, 3))
    model = eg.from_module(conv)
    x, baseline = draw(2, 6, 6, seed=1), draw(2, 6, 6, seed=2)
    around = lambda x: functional.conv2d(torch.relu(conv(x[None])), draw(1, 3, 3, 3)).sum()
    inside = eg.from_module(nn.Sequential(conv, nn.ReLU()))
    expected = explained(around, x, baseline)
    found = explained(lambda x: functional.conv2d(inside(x)[None], draw(1, 3, 3, 3)).sum(), x, baseline)
    assert close(found, expected)
    # What leaves a network leaves it as a whole.
    cut = lambda x: functional.conv2d(torch.relu(model(x))[None], draw(1, 3, 3, 3)).sum()
    assert_complete(cut, x, baseline)


# -- places, derivatives, refusals ---------------------------------------------------------------------------------


# The score runs its network twice, so that every place has two calls.
@pytest.mark.parametrize("place", ["down#0", "pool#0", "deep.1#0", "up#0"])
def test_layers(place):
    score = network_score("attention")
    x, baseline = draw(1, 8, 8, 8, seed=1), draw(1, 8, 8, 8, seed=2)
    trunk, head = eg.split(score, place, at=x)
    a = eg.at(eg.deep_lift_reveal_cancel, place)(score)(x, baseline)
    change = (head(trunk(x)) - head(trunk(baseline))).detach()  # what goes past the place stays as it is at x
    assert a.shape == trunk(x).shape
    assert float((a.sum() - change).abs()) <= 1e-10 * float(score(x).detach().abs())


@pytest.mark.parametrize("inplace", [True, False])
def test_multipliers_at_a_place_that_is_a_cut(inplace):
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=inplace), nn.Conv2d(3, 2, 3)))
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    x, baseline = draw(1, 7, 7, seed=1), draw(1, 7, 7, seed=2)
    for place in ("0", "1"):
        there = eg.tap(score, place)(baseline)
        a, g = eg.activation_and_gradient(reveal_cancel(score, baseline), place)(x)
        change = (score(x) - score(baseline)).detach()
        # In place the activation is the value after it.
        there = there.relu() if inplace else there
        a = a.relu() if inplace else a
        if place == "1" or not inplace:
            assert float((g * (a - there)).sum()) == pytest.approx(float(change), rel=1e-10)


@pytest.mark.parametrize("middle", ["nn.ReLU", "gate", "functional.silu"])
@pytest.mark.parametrize("which", ["x", "baseline"])
def test_the_derivative_of_multipliers_is_refused(middle, which):
    x, baseline = draw(*SIZES[2], seed=1), draw(*SIZES[2], seed=2)
    (x if which == "x" else baseline).requires_grad_()
    a = explained(between(2, TABLE[middle]), x, baseline)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        a.sum().backward()


def test_choices_and_unknown_operations_are_refused_by_name():
    x = draw(*SIZES[2])
    with pytest.raises(
        NotImplementedError, match=r"^reveal_cancel: expected a network that computes no cond.*'where'"
    ):
        explained(between(2, lambda h: torch.where(h > 0.1, h, 0.0)), x, 0 * x)
    with pytest.raises(NotImplementedError, match=r"^reveal_cancel: expected operations .*'fft_rfft'"):
        explained(between(2, lambda h: torch.fft.rfft(h).abs()), x, 0 * x)
