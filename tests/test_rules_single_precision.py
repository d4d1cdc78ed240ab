"""In single precision rules lose no more than the network itself does: large offsets, far baselines, ties.

What is missing of F(x) - F(x') is at most 1e-4 of the larger of both, and four times what the network itself errs by.
"""

from copy import deepcopy

import pytest
import torch
from together import together
from torch.nn import functional

import esegeta as eg
from esegeta.rules import Composite, ZBox, deeplift
from esegeta.rules.rewriting import RULES
from esegeta.rules.secants import SMOOTH, closed_form
from esegeta.rules.vocabulary import ELEMENTWISE

SHARE, ROUNDING = 1e-4, 4.0
EPSILON = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny  # what is smaller has fewer digits


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(n, low, high, seed):
    r = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return low + (high - low) * r


# -- functions of one value ------------------------------------------------------------------------------------------

WEIGHT = torch.tensor(0.25, dtype=torch.float64)
SPELLED = {
    "prelu": lambda x: functional.prelu(x, WEIGHT.to(x.dtype)),
    "rrelu": lambda x: functional.rrelu(x, 0.1, 0.3, training=False),
    "threshold": lambda x: functional.threshold(x, 0.5, 0.5),
    "clamp": lambda x: x.clamp(-0.3, 0.4),
    "clip": lambda x: x.clip(-0.3, 0.4),
    "clamp_min": lambda x: x.clamp_min(0.3),
    "clamp_max": lambda x: x.clamp_max(0.3),
    "expit": torch.special.expit,
    "log_sigmoid": functional.logsigmoid,
    "pow": lambda x: x**3,
    "float_power": lambda x: torch.float_power(x, 3).to(x.dtype),
    "hardshrink": lambda x: functional.hardshrink(x, 0.5),
}
MORE = {
    **{f"pow {p}": (lambda x, p=p: x**p) for p in (1, 2, 5, -1, -2, 0.5, -0.5, 1.7)},
    "1 / x": lambda x: 1 / x,
    "elu, alpha 2": lambda x: functional.elu(x, 2.0),
    "gelu, tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "softplus, beta 4": lambda x: functional.softplus(x, 4.0),
    "2 ** x": lambda x: 2.0**x,
}
POSITIVE = {"log", "log1p", "log2", "log10", "sqrt", "rsqrt", "pow 0.5", "pow -0.5", "pow 1.7"}
# Between their poles.
BOUNDED = {"logit": (0.01, 0.99), "tan": (-1.4, 1.4)}


def function(name):
    """What a name of an operation is called as."""
    homes = (functional, torch, torch.special)
    return SPELLED.get(name) or MORE.get(name) or next(getattr(h, name) for h in homes if hasattr(h, name))


ONE_VALUE = sorted({*ELEMENTWISE, *MORE})


def pairs(name):
    """Values and references in single precision: of every size and sign, apart by one digit or by thousands, ties."""
    n = 400
    if name in BOUNDED:
        x, far = uniform(n, *BOUNDED[name], 1), uniform(n, *BOUNDED[name], 2)
    else:
        sign = draw(n, seed=3).sign()
        x = 10 ** uniform(n, -6, 4, 1) * (1 if name in POSITIVE else sign)
        far = 10 ** uniform(n, -3, 3, 2) * x * (1 if name in POSITIVE else draw(n, seed=4).sign())
        x, far = (
            t.clamp(-60, 60) if name in ("exp", "expm1", "exp2", "sinh", "cosh", "2 ** x") else t
            for t in (x, far)
        )
    near = x * (1 + 10 ** uniform(n, -8, -1, 5) * draw(n, seed=6).sign())
    if name in BOUNDED:
        near = near.clamp(*BOUNDED[name])
    x, x0 = torch.cat([x, x, x]).float(), torch.cat([far, near, x]).float()
    return x, x0


def error(f, x):
    """What a function errs by in single precision."""
    return (f(x).double() - f(x.double())).abs()


@together("name", ONE_VALUE)
def test_functions_of_one_value(name):
    f = function(name)
    x, x0 = pairs(name)
    m, m64 = (
        eg.gradient(deeplift(lambda t: f(t).sum(), r[None]))(t[None])[0].double()
        for t, r in ((x, x0), (x.double(), x0.double()))
    )
    y, y0 = f(x).double(), f(x0).double()
    missing = (m * (x.double() - x0.double()) - (y - y0)).abs()
    allowed = SHARE * torch.maximum(y.abs(), y0.abs()) + ROUNDING * (error(f, x) + error(f, x0)) + TINY
    assert (missing <= allowed).all(), (name, x[missing > allowed], x0[missing > allowed])
    if name in SMOOTH or closed_form(name) is not None:
        # And every multiplier is right by itself, also where a quotient of differences would be noise.
        size = torch.maximum(m64.abs(), torch.maximum(y.abs(), y0.abs()))
        wrong = (error(f, x) + error(f, x0)) / (x - x0).abs().clamp(min=1e-3)
        assert ((m - m64).abs() <= 1e-3 * size + ROUNDING * wrong + EPSILON).all()
        if closed_form(name) is not None:
            assert ((m - m64).abs() <= 1e-5 * m64.abs() + TINY).all()


def test_every_rule_for_a_function_of_one_value_is_tried():
    assert {n for n in RULES["deeplift"] if n in ELEMENTWISE} <= set(ONE_VALUE)


# -- everything else -------------------------------------------------------------------------------------------------


def residual(score, x, x0, explain=eg.deep_lift):
    """What is missing, and what may be, of a score that computes in the precision of its input."""
    x, x0 = x.float(), x0.float()
    a = explain(score)(x, x0).double().sum()
    y, y0 = score(x).double(), score(x0).double()
    allowed = SHARE * max(abs(y), abs(y0)) + ROUNDING * (error(score, x) + error(score, x0))
    return float(abs(a - (y - y0))), float(allowed)


def by_hand(h):
    e = (h - h.max(-1, keepdim=True)[0]).exp()
    return e / e.sum(-1, keepdim=True)


GROUPS = {
    "softmax": lambda h: h.softmax(-1),
    "softmax, sharp": lambda h: (5 * h).softmax(0),
    "softmin": lambda h: functional.softmin(h, 1),
    "log_softmax": lambda h: h.log_softmax(-1),
    "logsumexp": lambda h: h.logsumexp((0, 1))[None, None],
    "log-softmax by hand": lambda h: h - h.logsumexp(-1, keepdim=True),
    "softmax by hand": by_hand,
    "cross_entropy": lambda h: functional.cross_entropy(h, torch.arange(5) % 3, reduction="none")[None],
    "bce": lambda h: functional.binary_cross_entropy_with_logits(h, torch.ones_like(h), reduction="none"),
    "attention": lambda h: functional.scaled_dot_product_attention(
        h[None, :, :3], h[None, :, 3:], h[None, :, :3]
    )[0],
    "layer_norm": lambda h: functional.layer_norm(h, (6,)),
    "group_norm": lambda h: functional.group_norm(h.T[None], 2)[0],
    "instance_norm": lambda h: functional.instance_norm(h.T[None])[0],
    "rms_norm": lambda h: functional.rms_norm(h, (6,)),
    "normalize": lambda h: functional.normalize(h, dim=1),
    "quotient": lambda h: h[:, :3] / (h[:, 3:].square() + 1),
    "x * rsqrt": lambda h: h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt(),
    "cosine_similarity": lambda h: functional.cosine_similarity(h[:, :3], h[:, 3:])[None],
    "std": lambda h: h.std(1, keepdim=True),
    "product": lambda h: h[:, :3] * h[:, 3:].sigmoid(),
    "matmul": lambda h: h @ h.T,
    "max_pool": lambda h: functional.max_pool1d(h.relu()[None], 2)[0],
    "overlapping max_pool": lambda h: functional.max_pool1d(h[None], 3, 1)[0],
    "max": lambda h: h.max(0, keepdim=True)[0],
    "maximum": lambda h: torch.maximum(h[:, :3], h[:, 3:]),
    "lp_pool": lambda h: functional.lp_pool1d(h[None], 2, 2)[0],
}
MATRIX, READOUT = draw(6, 4, seed=1), draw(64, seed=2)


def features(x, offset):
    """Features with an offset that x and its reference share, and with one of their own, the last column of x."""
    return x[:, :4] @ MATRIX.to(x.dtype).T + x[:, 4:] + offset


def head_of(name):
    def head(h):
        y = GROUPS[name](h)
        return (y.flatten() * READOUT[: y.numel()].to(h.dtype)).sum()

    return head


def score_of(name, offset):
    head = head_of(name)
    return lambda x: head(features(x, offset))


OFFSETS = {
    "none": (0, 0),
    "shared": (-1e4, 0),
    "own": (0, 1e3),
    "shared, less": (1e3, 0),
    "own, more": (0, -1e4),
}


@pytest.mark.parametrize(
    "offset", ["shared", *(pytest.param(n, marks=pytest.mark.slow) for n in OFFSETS if n != "shared")]
)
@together("name", GROUPS)
def test_offsets_and_far_baselines(name, offset):
    """An offset of its own moves every feature of x by it: parts of the features, each as large as that, cancel.

    Exact parts that are written down with the digits of single precision miss the difference by these digits, and
    how much the network errs at a single point is chance. So some digits of every part may be missing there, eight
    for each of three operations, and nothing but the bound elsewhere.
    """
    shared, own = OFFSETS[offset]
    for far in (1e-3, 1.0, 1e3):
        for seed in range(2):
            x, v = draw(5, 5, seed=10 * seed), draw(5, 5, seed=10 * seed + 1)
            x0 = x + far * v if far < 1 else far * v
            x[:, 4], x0[:, 4] = own, 0
            missing, allowed = residual(score_of(name, shared), x, x0)
            if own and missing > allowed:
                h, h0 = (features(t.float().double(), shared) for t in (x, x0))
                allowed += 3 * 8 * EPSILON * float(eg.deep_lift(head_of(name))(h, h0).abs().sum())
            assert missing <= allowed, f"{missing:.2g} is missing of what may be {allowed:.2g}, {far} away"


def chain(*layers):
    return torch.nn.Sequential(*layers)


def conv(inside, outside):
    return torch.nn.Conv2d(inside, outside, 3, padding=1)


NETWORKS = {
    "max_pool": lambda: chain(
        *(
            conv(4, 8),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            conv(8, 8),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
        ),
        conv(8, 2),
    ),
    "max_pool, deep": lambda: chain(
        *(conv(4, 8), torch.nn.ReLU(), conv(8, 8), torch.nn.ReLU(), torch.nn.MaxPool2d(2), conv(8, 8)),
        *(torch.nn.ELU(), torch.nn.MaxPool2d(2, 1), torch.nn.Flatten(), torch.nn.Linear(72, 5)),
        torch.nn.Softmax(1),
    ),
    "instance norm": lambda: chain(
        *(conv(4, 8), torch.nn.InstanceNorm2d(8), torch.nn.LeakyReLU(), torch.nn.MaxPool2d(2), conv(8, 8)),
        *(torch.nn.InstanceNorm2d(8), torch.nn.PReLU(), conv(8, 2), torch.nn.Softmax(1)),
    ),
    "attention": lambda: chain(
        *(
            torch.nn.Flatten(2),
            torch.nn.Linear(64, 8),
            torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        ),
        torch.nn.Linear(8, 2),
    ),
}


@together("name", NETWORKS)
def test_networks_with_far_baselines(name):
    """Also of logits that share an offset before their softmax."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    models = {
        torch.float32: eg.from_module(network),
        torch.float64: eg.from_module(deepcopy(network).double()),
    }

    for score in (
        lambda t: models[t.dtype](t)[1].sum(),
        lambda t: (models[t.dtype](t) + 1e4).log_softmax(0)[0].sum(),
    ):
        for seed, far in enumerate((1, 500, -1000)):
            x, v = draw(4, 8, 8, seed=seed), draw(4, 8, 8, seed=50 + seed)
            missing, allowed = residual(score, x, far * v)
            assert missing <= allowed, f"{missing:.2g} is missing of what may be {allowed:.2g}, {far} away"


# In double precision nothing of this is seen.
@pytest.mark.parametrize("name", GROUPS)
def test_double_precision(name):
    x, x0 = draw(5, 5, seed=1), draw(5, 5, seed=2)
    score = score_of(name, 3.0)
    difference = score(x) - score(x0)
    assert abs(eg.deep_lift(score)(x, x0).sum() - difference) <= 1e-12 * (1 + abs(score(x)) + abs(score(x0)))


def test_what_all_logits_share_has_no_part_in_a_softmax():
    x, x0 = draw(1, 6, seed=1), draw(1, 6, seed=2)
    for score in (lambda t: t.softmax(-1)[0, 0], lambda t: t.log_softmax(-1)[0, 0]):
        m = eg.gradient(deeplift(score, x0))(x)
        for a, b in ((7.0, 7.0), (-100.0, 30.0)):
            torch.testing.assert_close(eg.gradient(deeplift(score, x0 + b))(x + a), m, rtol=1e-10, atol=1e-12)
        assert abs(m.sum()) <= 1e-15
    weights = eg.gradient(deeplift(lambda t: t.logsumexp(-1)[0], x0))(x)
    assert (weights > 0).all()
    assert abs(weights.sum() - 1) <= 1e-15


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e4])
@pytest.mark.parametrize("name", ["relu", "sigmoid", "softplus", "max_pool1d", "softmax"])
def test_reveal_cancel(name, offset):
    f = {"max_pool1d": lambda h: functional.max_pool1d(h[None], 2)[0], "softmax": lambda h: h.softmax(-1)}
    weights, readout = draw(6, 4, seed=1), draw(6, seed=2)

    def score(x):
        h = functional.linear(x, weights.to(x.dtype), torch.full((6,), offset, dtype=x.dtype))
        y = f.get(name, getattr(functional, name))(h)
        return (y * readout[: y.shape[-1]].to(x.dtype)).sum()

    for far in (1e-3, 1.0, 1e3):
        x, v = draw(5, 4, seed=3), draw(5, 4, seed=4)
        x0 = x + far * v if far < 1 else far * v
        missing, allowed = residual(score, x, x0, eg.deep_lift_reveal_cancel)
        assert missing <= allowed, f"{missing:.2g} is missing of what may be {allowed:.2g}, {far} away"


def of_both(explain, x):
    """What comes out in single and in double precision of the same numbers."""
    return explain(x.float()).double(), explain(x.float().double())


def test_relevance_of_what_is_nearly_its_bias():
    x = torch.tensor([[1e-6, -3e-5, 2e-4, 1.0]])
    for f in (torch.sigmoid, torch.exp, functional.softplus, torch.cosh):
        single, double = of_both(
            lambda t, f=f: t * eg.gradient(eg.rules.lrp(lambda z: f(z).sum(), "zero"))(t), x
        )
        slope = torch.func.grad(lambda t, f=f: f(t).sum())(torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-7 * float(slope.max() == 0))


def test_relevance_between_bounds_that_are_far_from_zero():
    x, w = 1e4 + draw(1, 8, seed=1).tanh(), draw(3, 8, seed=2)
    box = ZBox(torch.tensor(1e4 - 1), torch.tensor(1e4 + 1))
    explain = lambda t: (
        t
        * eg.gradient(
            eg.rules.lrp(lambda z: functional.linear(z, w.to(z.dtype)).sum(), Composite(linear=box))
        )(t)
    )
    single, double = of_both(explain, x)
    assert float((single - double).abs().max()) <= 1e-5 * float(double.abs().max())


def test_excitation_beside_a_large_constant():
    w = draw(3, 8, seed=2).abs().float()
    x = draw(1, 8, seed=1).abs().float()
    p = x * eg.gradient(eg.rules.excitation(lambda z: functional.linear(torch.relu(z) + 1e4, w).sum()))(x)
    assert abs(float(p.sum()) - 1) <= 1e-5
    base = torch.full((8,), 1e4)
    added = lambda z: functional.linear(torch.index_add(base, 0, torch.arange(8), z[0]), w).sum()
    assert abs(float((x * eg.gradient(eg.rules.excitation(added))(x)).sum()) - 1) <= 1e-5
