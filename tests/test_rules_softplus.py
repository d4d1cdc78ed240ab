"""A smoothed score: near to the score, with the second derivative of its closed form."""

import itertools
import math

import pytest
import torch
from together import together
from torch import nn
from torch.func import grad, hessian, vmap
from torch.nn import functional

import esegeta as eg
from esegeta import zoo
from esegeta._facts import facts_of
from esegeta.rules import softplus
from esegeta.rules.rewriting import RULES
from esegeta.rules.vocabulary import ACTIVATIONS

SIZES = {1: (2, 9), 2: (2, 6, 7), 3: (2, 4, 5, 4)}
LOG2 = math.log(2)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second(score):
    """The derivative of the sum of the gradient: for functions of one value, the second derivative."""
    return grad(lambda z: eg.gradient(score)(z).sum())


W = torch.tensor([0.25, -0.5], dtype=torch.float64)
HALF = torch.tensor(0.5, dtype=torch.float64)
# By name: the function, and how many times log(2) / beta it may be away, at the most.
ONE_VALUE = {
    "relu": (torch.relu, 1),
    "nn.ReLU in place": (nn.ReLU(inplace=True), 1),
    "clamp(min=0)": (lambda x: x.clamp(min=0), 1),
    "maximum with zero": (lambda x: torch.maximum(x, torch.zeros((), dtype=x.dtype)), 1),
    "x * (x > 0)": (lambda x: x * (x > 0), 1),
    "where": (lambda x: torch.where(x > 0, x, 0.0), 1),
    "relu6": (functional.relu6, 1),
    "clamp": (lambda x: x.clamp(-0.3, 0.4), 1),
    "clip from above": (lambda x: torch.clip(x, max=0.2), 1),
    "clamp_min": (lambda x: x.clamp_min(0.1), 1),
    "clamp_max": (lambda x: x.clamp_max(0.1), 1),
    "hardtanh": (functional.hardtanh, 1),
    "leaky_relu": (lambda x: functional.leaky_relu(x, 0.2), 1),
    "prelu": (lambda x: functional.prelu(x[None], W)[0], 1.5),
    "rrelu": (lambda x: functional.rrelu(x, 0.1, 0.3, training=False), 1),
    "threshold": (lambda x: functional.threshold(x, 0.5, 0.5), 1),
    "softshrink": (functional.softshrink, 1),
    "hardsigmoid": (functional.hardsigmoid, 1 / 6),
    "hardswish": (functional.hardswish, 1),
    "abs": (torch.abs, 1),
}
SEVERAL = {
    "maximum": (lambda x: torch.maximum(x[:1], x[1:]), 2),
    "minimum": (lambda x: torch.minimum(x[:1], HALF), 2),
    "max of two": (lambda x: torch.max(x[:1], x[1:]), 2),
    "amax": (lambda x: x.amax(0, keepdim=True), 2),
    "amin": (lambda x: torch.amin(x, 0), 2),
    "max along": (lambda x: x.max(dim=0)[0], 2),
    "min along": (lambda x: torch.min(x, 0, True).values, 2),
    "max of all": (lambda x: x.max(), 160),
    "norm, p=1": (lambda x: x.norm(1, dim=0), 4),
    "l1_loss": (lambda x: functional.l1_loss(x, torch.zeros_like(x), reduction="none"), 2),
}


@pytest.mark.parametrize("axes", [1, 2, 3])
@together("name", [*ONE_VALUE, *SEVERAL])
def test_values_are_near_and_tend_to_the_score(name, axes):
    f = ONE_VALUE[name][0] if name in ONE_VALUE else SEVERAL[name][0]
    bound = ONE_VALUE[name][1] * LOG2 if name in ONE_VALUE else math.log(SEVERAL[name][1])
    x = draw(*SIZES[axes], seed=axes)
    for beta in (2.0, 20.0, 2000.0):
        off = (softplus(lambda z: f(z * 1), beta=beta)(x) - f(x.clone())).abs().max()
        assert off <= bound / beta * (1 + 1e-9)
        assert off > 0 or beta > 100


@pytest.mark.parametrize("beta", [0.7, 5.0])
def test_second_derivatives_equal_their_closed_form(beta):
    x = draw(2, 40, seed=1)
    bump = lambda t: beta * torch.sigmoid(beta * t) * torch.sigmoid(-beta * t)
    forms = {
        "relu": bump(x),
        "x * (x > 0)": bump(x),
        "leaky_relu": 0.8 * bump(x),
        "softshrink": bump(x - 0.5) - bump(-x - 0.5),
        "abs": 4 * bump(2 * x),
        "threshold": bump(x - 0.5),
    }
    for name, truth in forms.items():
        f = ONE_VALUE[name][0]
        smooth = softplus(lambda z, f=f: f(z * 1).sum(), beta=beta)
        torch.testing.assert_close(second(smooth)(x), truth, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            vmap(second(smooth))(torch.stack([x, -x]))[0], truth, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_network_by_hand(axes):
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][axes - 1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(conv(2, 3, 3, padding=1), nn.ReLU(inplace=True), conv(3, 2, 1)).double().eval()
    model, beta, x = eg.from_module(net), 3.0, draw(*SIZES[axes], seed=2)
    score = lambda z: model(z)[1].sum()

    def by_hand(z):
        return net[2](functional.softplus(net[0](z[None]), beta, threshold=1e9))[0, 1].sum()

    smooth = softplus(score, beta=beta)
    torch.testing.assert_close(smooth(x), by_hand(x))
    torch.testing.assert_close(eg.gradient(smooth)(x), grad(by_hand)(x))
    torch.testing.assert_close(second(smooth)(x), grad(lambda z: grad(by_hand)(z).sum())(x))
    assert not second(score)(x).any()
    assert second(smooth)(x).any()


def test_the_gradient_tends_to_that_of_the_score():
    net = zoo.small_unet(2).double()
    x = draw(1, 8, 8, seed=3)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    truth, off = eg.gradient(score)(x), []
    for beta in (10.0, 1e3, 1e6):
        smooth = softplus(score, beta=beta)
        off.append(float((eg.gradient(smooth)(x) - truth).abs().max() / truth.abs().max()))
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-6


POOLS = {
    "plain": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated, rounded up": {"kernel_size": 2, "stride": 2, "dilation": 2, "ceil_mode": True},
}


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("how", [*POOLS, "adaptive"])
def test_max_pools(how, axes):
    x, beta = draw(*SIZES[axes], seed=4), 3.0
    name = f"{'adaptive_' if how == 'adaptive' else ''}max_pool{axes}d"
    pool = lambda z: getattr(functional, name)(z, **({"output_size": 3} if how == "adaptive" else POOLS[how]))
    smooth = lambda z, at: softplus(lambda z: pool(z).flatten()[at], beta=beta)(z)
    # Which elements an output sees: those that can win it.
    many = pool(x).numel()
    for at in range(0, many, max(1, many // 5)):
        seen = [
            i for i in range(x.numel())
            if pool(torch.where(torch.arange(x.numel()).reshape(x.shape) == i, 99.0, x)).flatten()[at] == 99
        ]  # fmt: skip
        torch.testing.assert_close(smooth(x, at), (beta * x.flatten()[seen]).logsumexp(0) / beta)
        flat = hessian(lambda z, at=at: smooth(z.reshape(x.shape), at))(x.flatten())
        p = torch.zeros(x.numel(), dtype=x.dtype)
        p[seen] = (beta * x.flatten()[seen]).softmax(0)
        torch.testing.assert_close(flat, beta * (torch.diag(p) - torch.outer(p, p)))


def test_far_from_a_kink_nothing_overflows():
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[-1e4, -900.0, 900.0, 1e4]], dtype=dtype)
        smooth = softplus(lambda z: torch.relu(z).sum(), beta=10.0)
        torch.testing.assert_close(smooth(x), x.clamp(min=0).sum())
        assert eg.gradient(smooth)(x).tolist() == [[0, 0, 1, 1]]
        assert not second(smooth)(x).any()


def test_methods_and_other_rewrites_take_it():
    smooth = softplus(lambda z: torch.relu(z).sum(), beta=4.0)
    x = draw(1, 5, seed=5)
    a = eg.integrated_gradients(smooth, steps=64)(x, 0 * x)
    torch.testing.assert_close(a.sum(), smooth(x) - smooth(0 * x), rtol=1e-3, atol=1e-6)
    assert facts_of(smooth).changes_values
    assert not facts_of(eg.rules.guided(lambda z: torch.relu(z).sum())).changes_values
    assert "rewritten" in str(eg.rules.coverage(smooth, x))


def test_what_jumps_and_what_is_smooth_already():
    x = draw(1, 5)
    for f in (functional.hardshrink, lambda z: functional.threshold(z, 0.1, 0.0)):
        with pytest.raises(NotImplementedError, match=r"^softplus: expected operations without jumps, got '"):
            softplus(lambda z, f=f: f(z).sum(), beta=4.0)(x)
    with pytest.raises(ValueError, match="It has no kinks as it is: take the score itself"):
        softplus(lambda z: z.tanh().sum(), beta=4.0)(x)
    with pytest.raises(ValueError, match="softplus: expected beta > 0, got 0"):
        softplus(lambda z: torch.relu(z).sum(), beta=0)
    with pytest.raises(ValueError, match="beta"):
        softplus(lambda z: torch.relu(z).sum(), beta=-1.0)


def test_every_activation_with_kinks_has_a_rule():
    """Those without one have a gradient without jumps, or are named here: their slope jumps at one point."""
    slopes = {"elu", "selu"}  # for alpha other than 1
    plain = ACTIVATIONS - set(RULES["softplus"]) - slopes
    t = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    for name, home in itertools.product(plain, (functional, torch, torch.special)):
        if (f := getattr(home, name, None)) is not None:
            slope = grad(lambda z, f=f: f(z).sum())(t)
            assert float(slope.diff().abs().max()) < 0.01, name
