"""The full gradient adds up to the score, whatever the network is made of."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

import esegeta as eg
from esegeta import zoo


def network(ndim: int, *layers: nn.Module) -> nn.Module:
    conv = getattr(nn, f"Conv{ndim}d")
    torch.manual_seed(ndim)
    net = nn.Sequential(conv(2, 4, 3, padding=1), *layers, conv(4, 2, 1)).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
        for m in net.modules():
            if getattr(m, "running_mean", None) is not None:
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
    return net


LAYERS = {
    "ReLU": lambda n: [nn.ReLU()],
    "in place": lambda n: [nn.ReLU(inplace=True), nn.GroupNorm(1, 4), nn.LeakyReLU(0.1, inplace=True)],
    "batch norm": lambda n: [getattr(nn, f"BatchNorm{n}d")(4), nn.ReLU()],
    "instance norm": lambda n: [getattr(nn, f"InstanceNorm{n}d")(4, affine=True), nn.ReLU()],
    "group norm": lambda n: [nn.GroupNorm(2, 4), nn.LeakyReLU(0.1)],
    "pools": lambda n: [getattr(nn, f"MaxPool{n}d")(2), nn.ReLU(), nn.Upsample(scale_factor=2)],
    "smooth": lambda n: [nn.GELU(), nn.Softplus()],
    "transposed": lambda n: [getattr(nn, f"ConvTranspose{n}d")(4, 4, 2, stride=2), nn.ReLU()],
}


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_parts_add_up_to_the_score(kind, ndim):
    net = network(ndim, *LAYERS[kind](ndim))
    x = torch.randn(2, *[6] * ndim, dtype=torch.float64)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    parts = eg.full_gradient(score)(x)
    assert torch.isclose(parts.total(), score(x), rtol=1e-10, atol=1e-10)
    assert torch.allclose(parts.input, x * eg.gradient(score)(x))
    # Something is in the biases, or this would say nothing about them.
    assert not torch.isclose(parts.input.sum(), score(x), rtol=1e-3)


def test_biases_are_those_of_the_formula():
    """Convolution: its bias; batch norm: beta - gamma mu / sigma; ReLU: nothing."""
    net = network(2, nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(2, 5, 5, dtype=torch.float64)
    score = eg.reducers.class_sum(eg.from_module(net), 0)
    parts = eg.full_gradient(score)(x).biases
    _, gradients = eg.activation_and_gradient(score, ["0", "1"])(x)
    norm = net[1]
    shift = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
    for name, bias, g in zip(("0", "1"), (net[0].bias, shift), gradients, strict=True):
        assert torch.allclose(parts[name], bias.detach()[:, None, None] * g)
    assert not parts["2"].any()


def test_functional_networks_and_skips():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(8, 2, 1)
            self.shift = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            h = functional.relu(self.a(x)) + self.shift
            return self.b(torch.cat([h, functional.instance_norm(h) * h], 1))

    torch.manual_seed(0)
    net, x = Functional().double().eval(), torch.randn(2, 6, 6, dtype=torch.float64)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    parts = eg.full_gradient(score)(x)
    assert torch.isclose(parts.total(), score(x), rtol=1e-10)
    assert {"a", "add", "instance_norm", "mul", "b"} <= set(parts.biases)
    assert parts.biases["add"].abs().sum() > 0


def test_a_score_that_is_not_linear_in_the_output_keeps_its_own_part():
    net, x = network(2, nn.ReLU()), torch.randn(2, 6, 6, dtype=torch.float64)
    score = eg.reducers.log_probability(eg.from_module(net), 1)
    assert not torch.isclose(eg.full_gradient(score)(x).total(), score(x), rtol=1e-2)


def test_batches_and_the_map():
    net = zoo.small_unet(3).double()
    xs = torch.randn(3, 1, 4, 4, 4, dtype=torch.float64)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    totals = vmap(lambda x: eg.full_gradient(score)(x).total())(xs)
    assert torch.allclose(totals, torch.stack([score(x) for x in xs]), rtol=1e-10)
    many = eg.batched(eg.full_grad(score))(xs)
    assert many.shape == (3, 1, 4, 4, 4)
    assert torch.allclose(many[1], eg.full_grad(score)(xs[1]))
    parts = eg.full_gradient(score)(xs[0])
    by_hand = parts.input.abs().sum(0, keepdim=True)
    for part in parts.biases.values():
        by_hand = by_hand + eg.upsample(part.abs().sum(0, keepdim=True), like=xs[0])
    assert torch.allclose(many[0], by_hand)


def test_the_real_network():
    net = zoo.brain_extraction_unet()
    x = functional.avg_pool3d(zoo.head().data, 4)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    total = eg.full_gradient(score)(x).total()
    assert torch.isclose(total, score(x), rtol=1e-5), (total, score(x))
