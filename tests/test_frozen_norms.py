"""Norms with statistics of one image: the same value there, local everywhere, and how far off they are is known."""

import math

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional

import esegeta as eg
from esegeta.rules import frozen_norms, norm_deviation
from esegeta.rules.rewriting import coverage


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(norm, axes=2, width=8):
    """Two levels of convolutions, a norm behind each, a skip."""
    torch.manual_seed(0)
    conv, up = getattr(nn, f"Conv{axes}d"), getattr(nn, f"ConvTranspose{axes}d")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Sequential(
                conv(1, width, 3, padding=1), norm(width), nn.LeakyReLU(0.1, inplace=True)
            )
            self.two = nn.Sequential(
                conv(width, 2 * width, 3, stride=2, padding=1),
                norm(2 * width),
                nn.LeakyReLU(0.1, inplace=True),
            )
            self.up, self.out = up(2 * width, width, 2, 2), conv(2 * width, 2, 1)

        def forward(self, x):
            skip = self.one(x)
            return self.out(torch.cat([self.up(self.two(skip)), skip], 1))

    return Net().double().eval()


class Last(nn.LayerNorm):
    """Norm of the channels of each voxel, as in ConvNeXt."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


NORMS = {
    "instance": lambda n: nn.InstanceNorm2d(n, affine=True),
    "group": lambda n: nn.GroupNorm(4, n),
    "layer": Last,
}


def score_of(module):
    return eg.reducers.class_sum(eg.from_module(module), 1)


def close(a, b, tolerance=1e-10):
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max() + 1)


@pytest.mark.parametrize("kind", NORMS)
def test_the_value_at_the_image_is_the_scores_and_another_elsewhere(kind):
    score, x = score_of(net(NORMS[kind])), image(1, 12, 16)
    frozen = frozen_norms(score, at=x)
    close(frozen(x), score(x))
    other = 3 * x + image(1, 12, 16, seed=1)
    assert abs(float(frozen(other) - score(other))) > 1e-3 * abs(float(score(other)))
    close(vmap(frozen)(torch.stack([x, other])), torch.stack([frozen(x), frozen(other)]))


@pytest.mark.parametrize("kind", NORMS)
def test_the_gradient_is_that_of_what_is_computed(kind):
    frozen, x, v = (
        frozen_norms(score_of(net(NORMS[kind])), at=image(1, 8, 8)),
        image(1, 8, 8, seed=2),
        image(1, 8, 8, seed=3),
    )
    h = 1e-6
    slope = (frozen(x + h * v) - frozen(x - h * v)) / (2 * h)
    assert float((grad(frozen)(x) * v).sum()) == pytest.approx(float(slope), rel=1e-5)


def test_a_norm_is_linear_in_closed_form():
    weight, bias = torch.tensor([2.0, -1.0]).double(), torch.tensor([0.5, 1.0]).double()
    x, z = image(2, 5, 7), image(2, 5, 7, seed=1)
    mean, deviation = x.mean((1, 2), keepdim=True), (x.var((1, 2), correction=0, keepdim=True) + 1e-5).sqrt()
    expected = ((z - mean) / deviation * weight[:, None, None] + bias[:, None, None]).square().sum()
    for norm in (
        lambda t: functional.instance_norm(t[None], weight=weight, bias=bias),
        lambda t: torch.instance_norm(t[None], weight, bias, None, None, True, 0.1, 1e-5, False),
        lambda t: functional.batch_norm(t[None], None, None, weight, bias, training=True),
        lambda t: functional.group_norm(t[None], 2, weight, bias),
    ):
        frozen = frozen_norms(lambda t, norm=norm: norm(t).square().sum(), at=x)
        close(frozen(z), expected)
    last = frozen_norms(lambda t: functional.rms_norm(t, (5, 7), eps=1e-5).square().sum(), at=x)
    close(last(z), (z.square() / (x.square().mean((1, 2), keepdim=True) + 1e-5)).sum())


@pytest.mark.parametrize("kind", NORMS)
def test_local_evaluation_says_the_same_and_saves_work(kind):
    x, baseline = image(1, 48, 48), image(1, 48, 48, seed=1)
    score = score_of(net(NORMS[kind]))
    frozen = frozen_norms(score, at=x)
    for explain in (
        eg.occlusion(frozen, size=6),
        eg.feature_ablation(frozen, features=eg.features.windows(6)),
    ):
        with eg.execution(evaluation="whole"):
            whole = explain(x, baseline)
        with eg.execution(evaluation="windows") as run:
            local = explain(x, baseline)
        close(local, whole)
        share = [e["share"] for e in run.events if e["event"] == "evaluation"]
        assert share
        assert share[0] < 0.3
    plain = eg.occlusion(score, size=6)
    with eg.execution(evaluation="auto") as run:
        plain(x, baseline)
    if kind != "layer":  # whose statistics are of one voxel each
        assert [e["evaluation"] for e in run.events if e["event"] == "evaluation"] == ["whole"]


def test_walks_of_shapley_values_are_local_too():
    x, baseline = image(1, 32, 32), image(1, 32, 32, seed=1)
    frozen = frozen_norms(score_of(net(NORMS["instance"])), at=x)
    explain = eg.shapley_sampling(frozen, features=eg.features.windows(8), samples=2)
    with eg.execution(evaluation="whole"):
        whole = explain(x, baseline, key=3)
    with eg.execution(evaluation="windows"):
        close(explain(x, baseline, key=3), whole)


def test_only_norms_are_touched():
    x = image(1, 8, 8)
    frozen = frozen_norms(score_of(net(NORMS["instance"])), at=x)
    assert dict(coverage(frozen, x)) == {("instance_norm", "rewritten"): 2}


def test_the_deviation_is_that_of_the_two_scores():
    score, x, baseline = score_of(net(NORMS["instance"])), image(1, 24, 24), torch.zeros(1, 24, 24).double()
    whole = norm_deviation(score, size=24, samples=3)(x, baseline, key=0)
    frozen = frozen_norms(score, at=x)
    close(whole.plain, (score(x) - score(baseline)).expand(3))
    close(whole.frozen, (frozen(x) - frozen(baseline)).expand(3))
    small = norm_deviation(score, size=3, samples=12)(x, baseline, key=0)
    assert 0 < small.relative < math.inf
    assert 0 < small.largest < math.inf
    assert -1 <= small.correlation <= 1
    assert "12 windows" in str(small)


def test_what_cannot_be_frozen_is_refused():
    x = image(1, 8, 8)
    with pytest.raises(ValueError, match="expected a network with norms that have statistics"):
        frozen_norms(score_of(nn.Conv2d(1, 2, 3).double()), at=x)
    model = eg.from_module(net(NORMS["instance"]))
    twice = lambda z: (model(z) + model(z.flip(-1))).sum()
    with pytest.raises(ValueError, match="a score that runs each network once"):
        frozen_norms(twice, at=x)
    with pytest.raises(ValueError, match="outside of vmap"):
        vmap(lambda z: frozen_norms(lambda t: model(t).sum(), at=z)(z))(x[None])
    tokens = frozen_norms(lambda t: functional.layer_norm(t.flatten(1).T, (1,)).sum(), at=x)
    with pytest.raises(ValueError, match="images of the shape that the statistics are of"):
        tokens(image(1, 4, 8))
