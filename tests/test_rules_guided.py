"""Guided backpropagation and deconvolution: the rule at every activation, in whatever spelling."""

import copy

import pytest
import torch
from rounding import assert_alike
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

import esegeta as eg
from esegeta import zoo

SPELLINGS = {
    "module": lambda h: nn.ReLU()(h),
    "module in place": lambda h: nn.ReLU(inplace=True)(h.clone()),
    "functional": functional.relu,
    "functional in place": lambda h: functional.relu(h.clone(), inplace=True),
    "in place by position": lambda h: functional.relu(h.clone(), True),
    "torch": torch.relu,
    "torch in place": lambda h: torch.relu_(h.clone()),
    "method": lambda h: h.relu(),
    "method in place": lambda h: h.clone().relu_(),
    "clamp": lambda h: h.clamp(min=0),
    "clamp_min": lambda h: torch.clamp_min(h, 0),
    "clamp in place": lambda h: h.clone().clamp_(0),
    "maximum": lambda h: torch.maximum(h, torch.zeros(())),
    "where": lambda h: torch.where(h > 0, h, 0.0),
    "gate": lambda h: h * (h > 0),
    "float gate": lambda h: (h > 0).float() * h,
    "threshold": lambda h: functional.threshold(h, 0, 0),
    "leaky with slope 0": lambda h: functional.leaky_relu(h, 0.0),
}


class Net(nn.Module):
    """Convolution, activation, a reused convolution, activation: twice the same spelling."""

    def __init__(self, activation, ndim: int = 2):
        super().__init__()
        conv = getattr(nn, f"Conv{ndim}d")
        self.a, self.b, self.out = conv(1, 3, 3, padding=1), conv(3, 3, 3, padding=1), conv(3, 2, 1)
        self.activation = activation
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.a(x))
        h = self.activation(self.b(h))
        return self.out(self.activation(self.b(h)))


def by_definition(net: Net, x: Tensor, rule) -> Tensor:
    """The gradient of sum(out[:, 1]) with the rule in the stead of every ReLU's derivative, layer by layer."""
    convs = [net.a, net.b, net.b]
    inputs, h = [], x[None]
    for layer in convs:
        z = layer(h)
        inputs.append((h, z))
        h = z.clamp(min=0)
    zero = torch.zeros_like(h).requires_grad_()
    (r,) = torch.autograd.grad(net.out(zero)[:, 1].sum(), zero)
    for layer, (h, z) in zip(reversed(convs), reversed(inputs), strict=True):
        r = rule(r, z)
        leaf = h.detach().requires_grad_()
        (r,) = torch.autograd.grad(layer(leaf), leaf, r)
    return r[0]


def guided(r, z):
    return r.clamp(min=0) * (z > 0)


def deconvolved(r, _):
    return r.clamp(min=0)


METHODS = {"guided_backprop": guided, "deconvolution": deconvolved}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_has_the_rule(spelling, ndim, name):
    net = Net(SPELLINGS[spelling], ndim).double().eval()
    x = torch.randn(1, *[6] * ndim, generator=torch.Generator().manual_seed(ndim)).double()
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    expected = by_definition(net, x, METHODS[name])
    found = getattr(eg, name)(score)(x)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found, eg.gradient(score)(x), rtol=1e-2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("spelling", ["module", "functional in place", "gate"])
def test_plain_functions_have_the_rule_too(spelling, name):
    net = Net(SPELLINGS[spelling]).eval()
    xs = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    plain = lambda x: net(x[None])[0, 1].sum()
    expected = torch.stack([by_definition(net, x, METHODS[name]) for x in xs])
    assert torch.allclose(getattr(eg, name)(plain)(xs[0]), expected[0], rtol=1e-5, atol=1e-6)
    if "place" not in spelling:
        many = vmap(getattr(eg, name)(plain))(xs)
        assert torch.allclose(many, expected, rtol=1e-5, atol=1e-6)
    folded = eg.reducers.class_sum(eg.from_module(net), 1)
    assert torch.allclose(vmap(getattr(eg, name)(folded))(xs), expected, rtol=1e-5, atol=1e-6)


ACTIVATIONS = {
    "leaky": (lambda h: functional.leaky_relu(h, 0.2), lambda z: (z > 0).float()),
    "prelu": (nn.PReLU(init=0.3), lambda z: (z > 0).float()),
    "elu": (functional.elu, lambda z: (z > 0).float()),
    "sigmoid": (torch.sigmoid, lambda z: z.sigmoid() * (1 - z.sigmoid())),
    "relu6": (functional.relu6, lambda z: ((z > 0) & (z < 6)).float()),
    "softplus": (functional.softplus, lambda z: z.sigmoid()),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_other_activations_by_the_general_rule(kind):
    """[R]+ [a'(x)]+ 1[a(x) > 0], with the derivatives written out."""
    activation, slope = ACTIVATIONS[kind]
    x = torch.linspace(-3, 8, 23).reshape(1, -1)
    signal = torch.cos(torch.arange(23.0)).reshape(1, -1)
    score = lambda z: (activation(z) * signal).sum()
    expected = signal.clamp(min=0) * slope(x) * (activation(x) > 0)
    assert torch.allclose(eg.guided_backprop(score)(x), expected.detach(), atol=1e-6)
    assert torch.allclose(eg.deconvolution(score)(x), signal.clamp(min=0), atol=1e-6)


def test_values_stay_and_what_is_rewritten_is_told():
    net = zoo.small_unet(3)
    score, x = eg.reducers.class_sum(eg.from_module(net), 1), torch.randn(1, 8, 8, 8)
    for rewrite in (eg.rules.guided, eg.rules.deconvnet):
        assert_alike(rewrite(score)(x), score(x))
    covered = eg.rules.coverage(eg.rules.guided(score), x)
    assert covered["relu", "rewritten"] == 3
    assert covered["conv3d", "plain derivative"] == 4
    assert covered["max_pool3d", "plain derivative"] == 1
    assert {what for _, what in eg.rules.coverage(score, x)} == {"seen"}


def test_layers_and_places_see_the_rule():
    """A place's gradient in a rewritten score is that of the rule from there on."""
    net = Net(functional.relu).eval()
    x = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(1))
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    _, g = eg.activation_and_gradient(eg.rules.guided(score), "relu#2")(x)
    zero = torch.zeros(1, 3, 6, 6, requires_grad=True)
    (r,) = torch.autograd.grad(net.out(zero)[:, 1].sum(), zero)
    assert torch.allclose(g, r[0])
    layered = eg.at(eg.guided_backprop, "a")(score)(x)
    trunk, head = eg.split(score, "a", at=x)
    assert torch.allclose(layered, eg.gradient(eg.rules.guided(head))(trunk(x)))
    assert not torch.allclose(layered, eg.gradient(head)(trunk(x)))


def test_guided_grad_cam_and_layer_activation():
    net, x = zoo.small_unet(2), torch.randn(1, 8, 8)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    cam = eg.upsample(eg.grad_cam(score, "bottom")(x).clamp(min=0), like=x)
    expected = eg.guided_backprop(score)(x) * cam
    assert torch.allclose(eg.guided_grad_cam(score, "bottom")(x), expected)
    for place in ("encoder", "bottom.conv"):
        one = eg.layer_activation_guided_backprop(score, place, unit=1)(x)
        filtered = lambda z, place=place: eg.tap(score, place)(z)[1].abs().sum()
        assert torch.allclose(one, eg.guided_backprop(filtered)(x))


def test_exported_programs():
    net, x = Net(functional.relu).eval(), torch.randn(1, 6, 6)
    program = torch.export.export(net, (x[None],))
    score = eg.reducers.class_sum(eg.from_module(program), 1)
    expected = by_definition(net, x, guided)
    assert torch.allclose(eg.guided_backprop(score)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_seen_is_refused():
    net, x = zoo.small_unet(2), torch.randn(1, 8, 8)
    traced = eg.reducers.class_sum(eg.from_module(torch.jit.trace(net, x[None])), 1)
    with pytest.raises(
        NotImplementedError, match=r"guided: expected .*seen.*TorchScript.*Python module|made from"
    ):
        eg.guided_backprop(traced)(x)

    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    class Hidden(nn.Module):
        def forward(self, z):
            return torch.relu(z) + Odd.apply(z)

    hidden = eg.from_module(Hidden())
    with pytest.raises(NotImplementedError, match=r"expected operations.* got .*Odd"):
        eg.guided_backprop(lambda z: hidden(z).sum())(x)


def test_nothing_to_rewrite_and_unknown_operations_are_refused():
    x = torch.randn(1, 6)
    with pytest.raises(
        ValueError, match=r"guided: expected a network with at least one .*, got none of .*esegeta.gradient"
    ):
        eg.guided_backprop(lambda z: (3 * z).sum())(x)
    with pytest.raises(
        NotImplementedError, match=r"guided: expected operations that it has rules for, got 'fft_fft'"
    ):
        eg.guided_backprop(lambda z: torch.fft.fft(torch.relu(z)).real.sum())(x)
    with pytest.raises(ValueError, match="expected one set of rules"):
        eg.rules.guided(eg.rules.deconvnet(lambda z: torch.relu(z).sum()))(x)
    net = Net(functional.relu).eval()
    with pytest.raises(ValueError, match=r"expected a unit of the channels of .* whose shape is \(3,"):
        eg.layer_activation_guided_backprop(eg.from_module(net), "a", unit=3)(torch.randn(1, 6, 6))


def test_a_rule_of_ones_own():
    calls = []

    @eg.rules.rule("guided", "fft_like")
    def _(op):
        calls.append(op.name)
        return op.call(*op.inputs)

    try:
        assert "fft_like" in eg.rules.rewriting.RULES["guided"]
    finally:
        eg.rules.rewriting.RULES["guided"].pop("fft_like")


def test_derivatives_of_explanations_are_refused():
    score = lambda z: functional.softplus(z * z).sum()
    x = torch.randn(1, 5)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.func.grad(lambda z: eg.guided_backprop(score)(z).sum())(x)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", METHODS)
def test_captum_agrees_where_it_sees_the_modules(name):
    attr = pytest.importorskip("captum.attr")
    net, x = zoo.small_unet(3), torch.randn(1, 8, 8, 8)

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, z):
            return self.net(z)[:, 1].sum((1, 2, 3))

    peer = {"guided_backprop": attr.GuidedBackprop, "deconvolution": attr.Deconvolution}[name](Summed())
    theirs = peer.attribute(x[None])[0]
    ours = getattr(eg, name)(eg.reducers.class_sum(eg.from_module(net), 1))(x)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_captum_misses_functional_activations():
    """Its guided backpropagation is the plain gradient where the network calls relu as a function."""
    attr = pytest.importorskip("captum.attr")
    net, x = Net(functional.relu).eval(), torch.randn(1, 6, 6)

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, z):
            return self.net(z)[:, 1].sum((1, 2))

    theirs = attr.GuidedBackprop(Summed()).attribute(x[None])[0]
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    assert torch.allclose(theirs, eg.gradient(score)(x), atol=1e-6)
    assert not torch.allclose(theirs, eg.guided_backprop(score)(x), rtol=1e-2)


# -- MONAI's networks, whose activations other libraries do not find -----------------------------------------------


class Defined(torch.autograd.Function):
    """The definition, in the stead of an activation's derivative."""

    @staticmethod
    def forward(ctx, z, slopes, active):
        ctx.save_for_backward(z, slopes)
        ctx.active = active
        return functional.prelu(z, slopes)

    @staticmethod
    def backward(ctx, r):
        z, _ = ctx.saved_tensors
        # At a(z) > 0 a PReLU of positive slopes has the derivative 1.
        return r.clamp(min=0) * (z > 0) if ctx.active else r.clamp(min=0), None, None


class ByDefinition(nn.Module):
    def __init__(self, slopes, active):
        super().__init__()
        self.slopes, self.active = slopes, active

    def forward(self, z):
        return Defined.apply(z, self.slopes, self.active)


def with_activations(net, active):
    """A copy with another module for every PReLU."""
    net = copy.deepcopy(net)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.PReLU):
                parent.add_module(name, ByDefinition(child.weight.detach(), active))
    return net


@pytest.mark.peers
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_the_prelu_unet_of_monai_has_the_rule(name, axes):
    nets = pytest.importorskip("monai.networks.nets")
    with torch.random.fork_rng():
        torch.manual_seed(axes)
        net = nets.UNet(axes, 1, 2, channels=(4, 8, 8), strides=(2, 2), num_res_units=1).eval().double()
    prelus = [m for m in net.modules() if isinstance(m, nn.PReLU)]
    assert len(prelus) > 3
    assert not any(isinstance(m, nn.ReLU) for m in net.modules())
    x = torch.randn(1, *[16] * axes, generator=torch.Generator().manual_seed(5)).double()
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    z = x[None].clone().requires_grad_()
    defined = with_activations(net, active=name == "guided_backprop")
    (expected,) = torch.autograd.grad(defined(z)[0, 1].sum(), z)
    found = getattr(eg, name)(score)(x)
    assert torch.allclose(found, expected[0], rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    # A library that rewrites what is called ReLU has the plain gradient here.
    assert not torch.allclose(found, eg.gradient(score)(x), rtol=1e-2)
    assert eg.rules.coverage(eg.rules.guided(score), x)["prelu", "rewritten"] == len(prelus)
