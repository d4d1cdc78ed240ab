"""Second derivatives of what torch differentiates once: computed from other operations, or refused by name."""

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, vjp
from torch.nn import functional

import esegeta as eg
from esegeta.engine.second_order import second_order


class Attention(nn.Module):
    """Tokens of an image that attend to each other, by torch's own fused attention or by its module."""

    def __init__(self, fused):
        super().__init__()
        self.embed, self.fused = nn.Conv2d(1, 4, 2, 2), fused
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        maps = self.embed(x)
        t = maps.flatten(2).mT
        if self.fused:
            heads = t.unflatten(-1, (2, 2)).transpose(1, 2)
            t = functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        else:
            t = self.attend(t, t, t, need_weights=False)[0]
        return t.mT.reshape(maps.shape)


def composed(x):
    return functional.relu6(x + 3) / 6


NETWORKS = {
    "hard sigmoid": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Hardsigmoid(), nn.Conv2d(3, 2, 1)), "0"),
    "in place": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Hardsigmoid(True), nn.Conv2d(3, 2, 1)), "0"),
    "fused attention": (lambda: Attention(True), "embed"),
    "attention module": (lambda: Attention(False), "embed"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_methods_of_second_order_run(name):
    torch.manual_seed(1)
    make, place = NETWORKS[name]
    net, x = make().double().eval(), torch.randn(1, 8, 8, dtype=torch.float64)
    model = eg.from_module(net)
    score = lambda x: model(x)[1].square().sum()
    a = eg.shapley_cam(score, place)(x)
    trunk, head = eg.split(score, place, at=x)
    z = trunk(x)
    g, pull = vjp(eg.gradient(head), z)
    # The Hessian times A by differences of the gradient.
    step = 1e-5
    change = (eg.gradient(head)(z + step * z) - eg.gradient(head)(z - step * z)) / (2 * step)
    torch.testing.assert_close(pull(z)[0], change, rtol=1e-4, atol=1e-6)
    expected = ((g - change / 2).mean((1, 2), keepdim=True) * z).sum(0, keepdim=True)
    torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-6)
    linear = lambda x: model(x)[1].sum()
    torch.testing.assert_close(eg.full_gradient(linear)(x).total(), linear(x), rtol=1e-9, atol=1e-9)
    assert eg.full_grad(linear)(x).isfinite().all()


def test_plain_functions_too():
    w = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    score = lambda x: functional.hardsigmoid(eg.mark(x @ w, "layer")).square().sum()
    same = lambda x: composed(eg.mark(x @ w, "layer")).square().sum()
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    torch.testing.assert_close(eg.shapley_cam(score, "layer")(x), eg.shapley_cam(same, "layer")(x))


def test_the_hessian_of_a_network_with_hard_sigmoids():
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Hardsigmoid()).double()
    model, x = eg.from_module(net), torch.randn(1, 4, dtype=torch.float64)
    found = hessian(lambda x: model(x).square().sum())(x)
    expected = hessian(lambda x: composed(net[0](x[None])).square().sum())(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "distance", [lambda x: torch.cdist(x, 2 * x + 1), lambda x: functional.pdist(x)], ids=["cdist", "pdist"]
)
def test_distances(distance):
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with second_order("demo"):
        assert hessian(lambda x: distance(x).square().sum())(x).isfinite().all()


def test_attention_masks():
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attend = functional.scaled_dot_product_attention
    for options in (
        {"is_causal": True},
        {"attn_mask": torch.ones(5, 5).tril().bool()},
        {"attn_mask": torch.randn(5, 5, dtype=torch.float64), "scale": 0.3},
    ):
        plain = attend(q, k, v, **options)
        with second_order("demo"):
            torch.testing.assert_close(attend(q, k, v, **options), plain)


def test_what_has_no_second_derivative_is_named():
    def missing(x):
        return (
            torch.ops.aten.hardsigmoid(x).square().sum()
        )  # past the functions of torch that can be replaced

    with (
        pytest.raises(
            NotImplementedError, match=r"^demo: expected operations with a second derivative, got 'hard"
        ),
        second_order("demo"),
    ):
        grad(lambda x: grad(missing)(x).sum())(torch.ones(2))
    model = eg.from_module(lambda x: torch.ops.aten.hardsigmoid(x))
    with pytest.raises(
        NotImplementedError, match=r"expected operations with a second derivative, got 'hardsigmoid'"
    ):
        hessian(lambda x: model(x).square().sum())(torch.ones(1, 2))
