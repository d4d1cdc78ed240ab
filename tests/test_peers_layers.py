"""Other libraries at layers: they agree where they are right; where they are wrong, the difference is theirs.

captum belongs to the ``test`` extra. What needs pytorch-grad-cam, MONAI or TorchRay is skipped where they are
not installed; that, and the comparisons on the real network, run with ``pytest -m peers``.
"""

import contextlib
import importlib
import io
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import esegeta as eg
from esegeta import zoo

# A destructor of pytorch-grad-cam raises where a gradient is a view, whenever it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

captum = pytest.importorskip("captum")

RULES = {
    "gauss-legendre": "gausslegendre",
    "left": "riemann_left",
    "right": "riemann_right",
    "midpoint": "riemann_middle",
}
CUTS = ("decoder.conv", "decoder", "out")
BESIDE_A_SKIP = ("encoder", "pool", "bottom.conv", "bottom", "up")
ROUNDING = 1e-12  # float64
FLOAT32_NODES = 1e-6  # captum keeps the nodes of its Riemann rules, and all weights, in float32


class Case(NamedTuple):
    net: nn.Module
    model: Callable[[Tensor], Tensor]
    score: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor], Tensor]  # the same score of a batch, as captum wants it
    x: Tensor
    baseline: Tensor

    def layer(self, place):
        return self.net.get_submodule(place)


def drawn(shape, dtype=torch.float64, key=0):
    return eg.random.normal(key, shape, dtype=dtype)


def unet_case(ndim, curved=False, width=4):
    net = zoo.small_unet(ndim, width=width).double()
    if curved:
        net.out = nn.Sequential(net.out, nn.Softplus())
    x = drawn((1, *(8, 6, 10)[:ndim]))
    model = eg.from_module(net)
    return Case(
        net,
        model,
        eg.reducers.class_sum(model, 1),
        lambda batch: net(batch)[:, 1].flatten(1).sum(1),
        x,
        0.3 * drawn(x.shape, key=1),
    )


def classifier_case(ndim):
    net = zoo.small_classifier(ndim, channels=2).double()
    x = drawn((2, *(8, 6, 10)[:ndim]))
    model = eg.from_module(net)
    return Case(
        net,
        model,
        eg.reducers.logit(model, 2),
        lambda batch: net(batch)[:, 2],
        x,
        0.3 * drawn(x.shape, key=1),
    )


def linear_case():
    """A score that is linear in the input, behind a linear layer."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.Conv2d(3, 2, 1, bias=False)).double()
    for i, p in enumerate(net.parameters()):
        p.data = drawn(p.shape, key=i)
    model = eg.from_module(net)
    x = drawn((1, 6, 7), key=3)
    return Case(
        net,
        model,
        eg.reducers.class_sum(model, 1),
        lambda batch: net(batch)[:, 1].flatten(1).sum(1),
        x,
        torch.zeros_like(x),
    )


@pytest.fixture(params=[2, 3], ids=["2-D", "3-D"])
def case(request):
    return unet_case(request.param)


@pytest.fixture(params=[2, 3], ids=["2-D", "3-D"])
def curved(request):
    """A score with a softplus at its end: its gradient at the layers changes along a path."""
    return unet_case(request.param, curved=True)


def watched(x):
    """A batch of one as captum wants it: it warns if the input does not require a gradient."""
    return x[None].clone().requires_grad_()


def apart(ours, theirs):
    """The largest difference, of the largest value."""
    ours, theirs = torch.as_tensor(ours).detach(), torch.as_tensor(theirs).detach()
    assert ours.shape == theirs.shape
    scale = theirs.abs().max()
    assert scale > 0
    return ((ours - theirs).abs().max() / scale).item()


def assert_agree(ours, theirs, tolerance):
    assert apart(ours, theirs) <= tolerance


def total(map):
    return map.detach().sum().item()


# --- captum, where it is right ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", BESIDE_A_SKIP + CUTS)
def test_layer_activation(case, place):
    from captum.attr import LayerActivation

    theirs = LayerActivation(case.forward, case.layer(place)).attribute(watched(case.x))
    assert_agree(eg.tap(case.score, place)(case.x), theirs[0], ROUNDING)


def test_layer_input(case):
    from captum.attr import LayerActivation, LayerGradientXActivation

    for peer, ours in [
        (LayerActivation, eg.tap(case.score, "decoder.relu:in")(case.x)),
        (
            LayerGradientXActivation,
            torch.mul(*eg.activation_and_gradient(case.score, "decoder.relu:in")(case.x)),
        ),
    ]:
        theirs = peer(case.forward, case.layer("decoder.relu")).attribute(
            watched(case.x), attribute_to_layer_input=True
        )
        assert_agree(ours, theirs[0], ROUNDING)


@pytest.mark.parametrize("place", BESIDE_A_SKIP + CUTS)
def test_layer_gradient_x_activation(case, place):
    from captum.attr import LayerGradientXActivation

    a, g = eg.activation_and_gradient(case.score, place)(case.x)
    theirs = LayerGradientXActivation(case.forward, case.layer(place)).attribute(watched(case.x))
    assert_agree(a * g, theirs[0], ROUNDING)


@pytest.mark.parametrize("place", BESIDE_A_SKIP + CUTS)
def test_layer_grad_cam(case, place):
    from captum.attr import LayerGradCam

    theirs = LayerGradCam(case.forward, case.layer(place)).attribute(watched(case.x))
    assert_agree(eg.grad_cam(case.score, place)(case.x), theirs[0], ROUNDING)


def test_layer_grad_cam_with_its_relu(case):
    from captum.attr import LayerGradCam

    ours = eg.grad_cam(case.score, "up")(case.x)
    assert ours.min() < 0 < ours.max()
    theirs = LayerGradCam(case.forward, case.layer("up")).attribute(watched(case.x), relu_attributions=True)
    assert_agree(ours.clamp(min=0), theirs[0], ROUNDING)


@pytest.mark.parametrize("ndim", [2, 3])
def test_layer_grad_cam_of_a_classifier(ndim):
    from captum.attr import LayerGradCam

    case = classifier_case(ndim)
    for place in ("conv_a", "pool", "relu_b"):
        theirs = LayerGradCam(case.forward, case.layer(place)).attribute(watched(case.x))
        assert_agree(eg.grad_cam(case.score, place)(case.x), theirs[0], ROUNDING)


@pytest.mark.parametrize(
    ("place", "rule"),
    [*((place, "gauss-legendre") for place in CUTS + BESIDE_A_SKIP), *(("decoder.conv", r) for r in RULES)],
)
def test_layer_integrated_gradients(curved, place, rule):
    """Beside a skip, captum too keeps what bypasses the layer as it is at the input."""
    from captum.attr import LayerIntegratedGradients

    ours = eg.at(eg.integrated_gradients, place)(curved.score, steps=12, rule=rule)(curved.x, curved.baseline)
    theirs = LayerIntegratedGradients(curved.forward, curved.layer(place)).attribute(
        watched(curved.x), curved.baseline[None], n_steps=12, method=RULES[rule]
    )
    assert_agree(ours, theirs[0], FLOAT32_NODES)


@pytest.mark.filterwarnings("ignore:Multiple layers provided:UserWarning")
def test_layer_integrated_gradients_at_several_layers(curved):
    """A cut of two layers: together they explain all of the difference."""
    from captum.attr import LayerIntegratedGradients

    places = ("encoder", "up")
    ours = eg.at(eg.integrated_gradients, places)(curved.score, steps=100)(curved.x, curved.baseline)
    theirs = LayerIntegratedGradients(curved.forward, [curved.layer(p) for p in places]).attribute(
        watched(curved.x), curved.baseline[None], n_steps=100
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_agree(a, b[0], FLOAT32_NODES)
    difference = (curved.score(curved.x) - curved.score(curved.baseline)).item()
    assert sum(map(total, ours)) == pytest.approx(difference, rel=1e-2)  # kinks
    assert total(ours[0]) != pytest.approx(difference, rel=0.1)


def conductance_by_definition(case, place, nodes):
    r"""The sum over :math:`t` of :math:`G(x_t) (A(x_{t+1}) - A(x_t))`, with hooks and autograd."""
    found = []
    hook = case.layer(place).register_forward_hook(lambda module, inputs, output: found.append(output))
    gradients = []
    for t in nodes:
        y = case.forward((case.baseline + t * (case.x - case.baseline))[None])
        gradients += torch.autograd.grad(y.sum(), found[-1])
    hook.remove()
    steps = zip(gradients, found, found[1:], strict=False)
    return sum(g * (after - before) for g, before, after in steps)[0].detach()


@pytest.mark.parametrize("place", ["bottom", "decoder.conv", "out"])
def test_captums_conductance_is_the_definition(curved, place):
    """With eight steps the nodes of its trapezoid are exact in float32."""
    from captum.attr import LayerConductance

    theirs = LayerConductance(curved.forward, curved.layer(place)).attribute(
        watched(curved.x), curved.baseline[None], n_steps=8, method="riemann_trapezoid"
    )
    nodes = torch.linspace(0, 1, 9, dtype=torch.float64)
    definition = conductance_by_definition(curved, place, nodes)
    assert_agree(definition, theirs[0], ROUNDING)


@pytest.mark.parametrize("place", ["bottom", pytest.param("decoder.conv", marks=pytest.mark.slow)])
def test_conductance_is_what_captums_trapezoid_tends_to(curved, place):
    """Ours takes parabolas on panels of its own: both go to the same limit, ours with fewer steps."""
    from captum.attr import LayerConductance

    peer = LayerConductance(curved.forward, curved.layer(place))
    ours = {n: eg.conductance(curved.score, place, steps=n)(curved.x, curved.baseline) for n in (8, 64, 1024)}
    off = {}
    for n in (8, 64, 512):
        theirs = peer.attribute(
            watched(curved.x), curved.baseline[None], n_steps=n, method="riemann_trapezoid"
        )
        off[n] = apart(ours[1024], theirs[0])
    assert off[8] > 3 * off[64] > 9 * off[512]
    assert off[512] < 5e-3
    for n in (8, 64):
        assert apart(ours[n], ours[1024]) < off[n]


def test_conductance_where_the_gradient_is_constant(curved):
    """At the end of the network nothing is left to quadrature, in either."""
    from captum.attr import LayerConductance

    theirs = LayerConductance(curved.forward, curved.layer("out")).attribute(
        watched(curved.x), curved.baseline[None], n_steps=8, method="riemann_trapezoid"
    )
    ours = eg.conductance(curved.score, "out", steps=8)(curved.x, curved.baseline)
    assert_agree(ours, theirs[0], ROUNDING)


@pytest.mark.parametrize("rule", RULES)
def test_internal_influence(curved, rule):
    from captum.attr import InternalInfluence

    for place in ("bottom", "decoder.conv"):
        theirs = InternalInfluence(curved.forward, curved.layer(place)).attribute(
            watched(curved.x), curved.baseline[None], n_steps=9, method=RULES[rule]
        )
        ours = eg.internal_influence(curved.score, place, steps=9, rule=rule)(curved.x, curved.baseline)
        assert_agree(ours, theirs[0], FLOAT32_NODES)


NEURON = (7, 2, 2, 2)  # of "bottom.conv" in three dimensions; in two its first three


def at_neuron(case):
    """A neuron as a score: a reducer on what is tapped."""
    inner = eg.tap(case.model, "bottom.conv")
    return lambda x: inner(x)[NEURON[: x.ndim]]


def test_captums_neuron_conductance_is_the_definition(curved):
    """The mean over the nodes of ``dF/dA_k dA_k/dx``, times the difference of the inputs."""
    from captum.attr import NeuronConductance

    neuron = NEURON[: curved.x.ndim]
    theirs = NeuronConductance(curved.forward, curved.layer("bottom.conv")).attribute(
        watched(curved.x), neuron, curved.baseline[None], n_steps=8, method="riemann_middle"
    )
    difference = curved.x - curved.baseline
    found = []
    hook = curved.layer("bottom.conv").register_forward_hook(lambda m, i, output: found.append(output))
    mean = 0
    for k in range(8):
        x = watched(curved.baseline + (k + 0.5) / 8 * difference)
        y = curved.forward(x).sum()
        (outer,) = torch.autograd.grad(y, found[-1], retain_graph=True)
        (inner,) = torch.autograd.grad(found[-1][(0, *neuron)], x)
        mean = mean + outer[(0, *neuron)] * inner / 8
    hook.remove()
    assert_agree(mean[0] * difference, theirs[0], ROUNDING)


@pytest.mark.parametrize("rule", RULES)
def test_neuron_conductance(curved, rule):
    from captum.attr import NeuronConductance

    neuron = NEURON[: curved.x.ndim]
    theirs = NeuronConductance(curved.forward, curved.layer("bottom.conv")).attribute(
        watched(curved.x), neuron, curved.baseline[None], n_steps=8, method=RULES[rule]
    )
    explain = eg.neuron_conductance(curved.score, "bottom.conv", neuron=neuron, steps=8, rule=rule)
    exact = rule != "gauss-legendre"  # eighths are exact in float32
    assert_agree(explain(curved.x, curved.baseline), theirs[0], ROUNDING if exact else FLOAT32_NODES)


def test_neuron_gradient(case):
    from captum.attr import NeuronGradient

    theirs = NeuronGradient(case.forward, case.layer("bottom.conv")).attribute(
        watched(case.x), NEURON[: case.x.ndim]
    )
    assert_agree(eg.gradient(at_neuron(case))(case.x), theirs[0], ROUNDING)


@pytest.mark.parametrize("rule", RULES)
def test_neuron_integrated_gradients(case, rule):
    from captum.attr import NeuronIntegratedGradients

    theirs = NeuronIntegratedGradients(case.forward, case.layer("bottom.conv")).attribute(
        watched(case.x), NEURON[: case.x.ndim], case.baseline[None], n_steps=9, method=RULES[rule]
    )
    ours = eg.integrated_gradients(at_neuron(case), steps=9, rule=rule)(case.x, case.baseline)
    assert_agree(ours, theirs[0], FLOAT32_NODES)


@pytest.mark.parametrize(("ndim", "mode"), [(1, "linear"), (2, "bilinear"), (3, "trilinear")])
def test_interpolation_when_told_to_be_linear(ndim, mode):
    from captum.attr import LayerAttribution

    map, like = drawn((1, 4, 3, 5)[: ndim + 1]), drawn((1, 8, 7, 15)[: ndim + 1])
    theirs = LayerAttribution.interpolate(map[None], like.shape[1:], interpolate_mode=mode)
    assert_agree(eg.upsample(map, like=like), theirs[0], ROUNDING)


# --- captum, where it is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "share"), [(1, 0.577), (5, 0.932), (50, 0.9989)])
def test_captums_conductance_never_reaches_the_ends(n, share):
    """Its Gauss nodes keep clear of the input and the baseline, so even a linear score is not explained."""
    from captum.attr import LayerConductance

    case = linear_case()
    difference = (case.score(case.x) - case.score(case.baseline)).item()
    peer = LayerConductance(case.forward, case.net[0])
    theirs = peer.attribute(watched(case.x), case.baseline[None], n_steps=n)
    last = float(np.polynomial.legendre.leggauss(n + 1)[0][-1])
    assert total(theirs) / difference == pytest.approx(last, abs=1e-9)
    assert last == pytest.approx(share, abs=5e-4)

    with_ends = peer.attribute(watched(case.x), case.baseline[None], n_steps=n, method="riemann_trapezoid")
    assert total(with_ends) == pytest.approx(difference, rel=1e-6)
    ours = eg.conductance(case.score, "0", steps=n)(case.x, case.baseline)
    assert total(ours) == pytest.approx(difference, rel=1e-12)


@pytest.mark.parametrize("rule", ["left", "midpoint", "right"])
def test_captums_conductance_loses_a_step_with_the_other_rules(rule):
    """``n`` differences of ``n + 1`` nodes that are ``1 / (n + 1)`` apart."""
    from captum.attr import LayerConductance

    case, n = linear_case(), 5
    theirs = LayerConductance(case.forward, case.net[0]).attribute(
        watched(case.x), case.baseline[None], n_steps=n, method=RULES[rule]
    )
    difference = (case.score(case.x) - case.score(case.baseline)).item()
    assert total(theirs) / difference == pytest.approx(n / (n + 1), rel=1e-6)


@pytest.mark.parametrize("n", [2, 5, 50])
def test_captums_trapezoid_loses_one_nth_of_the_internal_influence(n):
    """Its weights sum to (n - 1) / n; the influence on a linear score is the gradient itself."""
    from captum.attr import InternalInfluence

    case = linear_case()
    _, g = eg.activation_and_gradient(case.score, "0")(case.x)
    peer = InternalInfluence(case.forward, case.net[0])
    theirs = peer.attribute(watched(case.x), case.baseline[None], n_steps=n, method="riemann_trapezoid")
    assert_agree((n - 1) / n * g, theirs[0], FLOAT32_NODES)


def test_captums_delta_beside_a_skip_is_of_another_question():
    """It compares with a change of the whole input, while all that bypasses the layer was kept as it is."""
    from captum.attr import LayerIntegratedGradients

    case = unet_case(2)
    theirs, delta = LayerIntegratedGradients(case.forward, case.layer("bottom")).attribute(
        watched(case.x), case.baseline[None], n_steps=200, return_convergence_delta=True
    )
    inside = eg.tap(case.score, "bottom")(case.baseline)
    switched = (case.score(case.x) - eg.replace(case.score, "bottom")(case.x, inside)).item()
    whole = (case.score(case.x) - case.score(case.baseline)).item()
    assert total(theirs) == pytest.approx(switched, rel=1e-2)
    assert delta.item() == pytest.approx(switched - whole, rel=5e-2)
    assert abs(delta.item()) > 0.2 * abs(whole)  # and more steps do not help


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU:UserWarning")
def test_captums_guided_grad_cam_has_blocks():
    """The paper upsamples linearly; the default here copies each value of the map over a block."""
    from captum.attr import GuidedBackprop, GuidedGradCam

    case = classifier_case(2)
    forward = nn.Sequential(*case.net)  # what it hooks has to be a module
    place = "relu_b"
    peer = GuidedGradCam(forward, case.layer(place))
    theirs = peer.attribute(watched(case.x), target=2)[0].detach()
    linear = peer.attribute(watched(case.x), target=2, interpolate_mode="bilinear")[0].detach()
    guided = GuidedBackprop(forward).attribute(watched(case.x), target=2)[0].detach()
    map = eg.grad_cam(case.score, place)(case.x).clamp(min=0)
    assert_agree(guided * eg.upsample(map, like=case.x), linear, ROUNDING)
    blocks = map.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert_agree(guided * blocks, theirs, ROUNDING)
    assert apart(theirs, linear) > 0.1


class Twice(nn.Module):
    """One layer, called two times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def test_captum_knows_only_the_last_call_of_a_layer():
    """Here every call is a place."""
    from captum.attr import LayerActivation, LayerGradientXActivation

    net = Twice().double()
    for i, p in enumerate(net.parameters()):
        p.data = drawn(p.shape, key=i)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    forward = lambda batch: net(batch).flatten(1).sum(1)
    x = drawn((1, 6, 7))
    activation = LayerActivation(forward, net.layer).attribute(watched(x))[0]
    assert_agree(eg.tap(score, "layer#1")(x), activation, ROUNDING)
    assert apart(eg.tap(score, "layer#0")(x), activation) > 0.5
    product = LayerGradientXActivation(forward, net.layer).attribute(watched(x))[0]
    first, last = (torch.mul(*eg.activation_and_gradient(score, f"layer#{k}")(x)) for k in (0, 1))
    assert_agree(last, product, ROUNDING)
    assert apart(first, product) > 0.5


# --- pytorch-grad-cam -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradcam():
    """pytorch-grad-cam. It imports torchvision, which beside another build of torch does not find its operators."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("pytorch_grad_cam")


def seen(peer, case, target=None):
    """The map that a class of pytorch-grad-cam computes before it is cut at zero, scaled and resized."""
    maps = []
    inner = peer.get_cam_image

    def get_cam_image(*arguments, **named):
        maps.append(inner(*arguments, **named))
        return maps[-1]

    peer.get_cam_image = get_cam_image
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        shown = peer(case.x[None].clone(), [target or (lambda output: output[1].sum())])
    peer.activations_and_grads.gradients.clear()  # where they are views its destructor fails on them
    (map,) = maps
    return torch.from_numpy(np.asarray(map)), shown


def raw(gradcam, name, case, place, target=None):
    return seen(getattr(gradcam, name)(case.net, [case.layer(place)]), case, target)[0]


class Peer(NamedTuple):
    name: str
    tolerance: float
    settings: Mapping[str, str] = MappingProxyType({})  # of ours
    scale: float = 1.0  # of the score


# Tolerances: what they add to their denominators, and that they return singular vectors in float32.
SAME = {
    "grad_cam": Peer("GradCAM", ROUNDING),
    "hires_cam": Peer("HiResCAM", ROUNDING),
    "layer_cam": Peer("LayerCAM", ROUNDING),
    "elementwise_grad_cam": Peer("GradCAMElementWise", ROUNDING),
    "xgrad_cam": Peer("XGradCAM", 1e-6),
    "grad_cam_plus_plus": Peer("GradCAMPlusPlus", 1e-5, scale=1e4),
    "shapley_cam": Peer("ShapleyCAM", ROUNDING),
    "fem": Peer("FEM", ROUNDING, {"show": "activation"}),
    "eigen_cam": Peer("EigenCAM", 1e-6),
    "eigen_grad_cam": Peer("EigenGradCAM", 1e-6),
    "seg_eigen_cam": Peer("SegEigenCAM", 1e-6),
}


@pytest.mark.peers
@pytest.mark.parametrize("method", SAME)
@pytest.mark.parametrize("place", ["bottom", "up", "decoder.conv", "decoder"])
def test_class_activation_maps(gradcam, curved, method, place):
    name, tolerance, settings, scale = SAME[method]
    theirs = raw(gradcam, name, curved, place, lambda output: scale * output[1].sum())
    ours = getattr(eg, method)(lambda x: scale * curved.score(x), place, **settings)(curved.x)
    assert ours.shape[0] == 1
    if (
        method.startswith("eigen") and (ours[0] * theirs[0]).sum() < 0
    ):  # the sign of a singular vector is free
        theirs = -theirs
    assert_agree(ours, theirs, tolerance)


@pytest.mark.peers
def test_class_activation_maps_are_different(gradcam):
    """So that agreement means something: no two of these methods give the same map."""
    case = unet_case(2, curved=True)
    maps = [raw(gradcam, peer.name, case, "up") for peer in SAME.values()]
    for i, a in enumerate(maps):
        for b in maps[:i]:
            assert apart(a / a.abs().max(), b / b.abs().max()) > 1e-3


@pytest.mark.peers
@pytest.mark.parametrize("ndim", [2, 3])
def test_finer_cam(gradcam, ndim):
    """Grad-CAM of another score. Their weights have a gradient, too; ours are those at the input."""
    case, place = classifier_case(ndim), "relu_b"
    layer, logits = case.layer(place), case.model(case.x)
    nearest = (logits - logits.amax()).abs().argsort().tolist()
    assert len(nearest) == 3
    for frozen in (True, False):
        share = logits.softmax(0)[nearest[1:]]

        def target(output, share=share, frozen=frozen):
            share = share if frozen else output.softmax(-1)[nearest[1:]]
            return (share * (output[nearest[0]] - 0.6 * output[nearest[1:]])).sum() / (share.sum() + 1e-9)

        hand, _ = seen(gradcam.GradCAM(case.net, [layer]), case, target)
        if frozen:
            score = eg.reducers.finer(case.model, nearest[0], at=case.x, alpha=0.6)
            assert_agree(eg.grad_cam(score, place)(case.x), hand, 1e-7)  # their 1e-9
            ours = hand
    peer = gradcam.FinerCAM(case.net, [layer])
    maps = []
    inner = peer.base_cam.get_cam_image
    peer.base_cam.get_cam_image = lambda *a, **named: maps.append(inner(*a, **named)) or maps[-1]
    peer(case.x[None].clone(), None, alpha=0.6)
    peer.base_cam.activations_and_grads.gradients.clear()  # as above
    assert_agree(hand, torch.from_numpy(maps[0]), ROUNDING)
    assert apart(ours, hand) > 1e-3


@pytest.mark.peers
def test_ablation_cam(gradcam):
    """Where the smallest activation is zero, channels are set to zero, as published."""
    for case in (unet_case(2), unet_case(2, curved=True)):
        for place in ("encoder", "bottom", "decoder"):
            assert eg.tap(case.score, place)(case.x).min() == 0
            theirs = raw(gradcam, "AblationCAM", case, place)
            assert_agree(
                eg.ablation_cam(case.score, place, relative=True)(case.x), theirs, 1e-6
            )  # float32 weights


@pytest.mark.peers
@pytest.mark.parametrize("place", ["encoder", "decoder.conv", "decoder"])
def test_score_cam(gradcam, place):
    """On the grid of the image nothing is resized, and a baseline of zeros is what they multiply into."""
    case = unet_case(2, curved=True)
    mean = eg.reducers.class_mean(case.model, 1)
    theirs = raw(gradcam, "ScoreCAM", case, place, lambda output: output[1].mean())
    ours = eg.score_cam(mean, place)(case.x, torch.zeros_like(case.x))
    assert_agree(ours, theirs, 1e-6)  # float32 weights
    assert apart(eg.score_cam(mean, place)(case.x, case.baseline), theirs) > 1e-3


# --- pytorch-grad-cam, where it is wrong or another method ------------------------------------------------


@pytest.mark.peers
def test_their_grad_cam_plus_plus_of_small_gradients_is_another_map(gradcam):
    """The 1e-6 in its denominator outweighs the square of a gradient below 1e-3: that of a mean over voxels."""
    case, unit = unet_case(2), 1e-4
    score = lambda x: unit * case.score(x)
    a, g = eg.activation_and_gradient(score, "bottom")(case.x)

    def by_hand(epsilon):
        below = 2 * g**2 + g**3 * a.sum((1, 2), keepdim=True) + epsilon
        share = torch.where(g == 0, 0.0, g**2 / below)
        return ((share * g.clamp(min=0)).sum((1, 2), keepdim=True) * a).sum(0, keepdim=True)

    ours = eg.grad_cam_plus_plus(score, "bottom")(case.x)
    assert_agree(ours, by_hand(0), 1e-9)
    theirs = raw(gradcam, "GradCAMPlusPlus", case, "bottom", lambda output: unit * output[1].sum())
    assert_agree(theirs, by_hand(1e-6), 1e-9)
    assert theirs.max() < 0.05 * ours.max()
    assert apart(theirs / theirs.max(), ours / ours.max()) > 0.3


@pytest.mark.peers
def test_their_ablation_of_signed_layers_is_none(gradcam):
    """Unless the smallest activation is zero, the first channel becomes -1e7, the second -2e7, and so on."""
    case, place = unet_case(2), "up"
    a, whole = eg.tap(case.score, place)(case.x), case.score(case.x)
    put = eg.replace(case.score, place)

    def by_hand(values):
        map = 0
        for d, value in enumerate(values):
            z = a.clone()
            z[d] = value
            map = map + (whole - put(case.x, z)) / whole * a[d]
        return map[None]

    ours = eg.ablation_cam(case.score, place, relative=True)(case.x)
    assert_agree(ours, by_hand([0] * len(a)), 1e-9)
    theirs = raw(gradcam, "AblationCAM", case, place)
    assert_agree(theirs, by_hand([a.min() - 1e7 * (d + 1) for d in range(len(a))]), 1e-5)
    assert theirs.abs().max() > 1e5 * ours.abs().max()


@pytest.mark.peers
def test_their_ablation_in_3d_fails_and_leaves_the_network_broken(gradcam):
    case = unet_case(3)
    before = case.net.decoder
    with pytest.raises(RuntimeError, match="repeat dims"):
        raw(gradcam, "AblationCAM", case, "decoder")
    assert case.net.decoder is not before

    case = unet_case(3)
    before = case.net.decoder
    assert eg.ablation_cam(case.score, "decoder")(case.x).shape == (1, *case.x.shape[1:])
    assert case.net.decoder is before


@pytest.mark.peers
def test_their_score_cam_aligns_corners(gradcam):
    """The masks of a coarser layer are shifted by up to half a voxel."""
    case = unet_case(2, curved=True)
    mean = eg.reducers.class_mean(case.model, 1)
    theirs = raw(gradcam, "ScoreCAM", case, "bottom.conv", lambda output: output[1].mean())
    a = eg.tap(case.score, "bottom.conv")(case.x)

    def by_hand(**settings):
        up = nn.functional.interpolate(a[None], case.x.shape[1:], mode="bilinear", **settings)[0]
        low, high = up.amin((1, 2), keepdim=True), up.amax((1, 2), keepdim=True)
        scores = torch.stack([mean(m * case.x) for m in ((up - low) / (high - low))[:, None]])
        return torch.einsum("d,dhw->hw", scores.softmax(0), a)[None]

    ours = eg.score_cam(mean, "bottom.conv")(case.x, torch.zeros_like(case.x))
    assert_agree(by_hand(align_corners=True), theirs, 1e-6)
    assert_agree(by_hand(align_corners=False), ours, 1e-9)
    assert apart(ours, theirs) > 0.01


@pytest.mark.peers
def test_score_cam_of_a_large_score_is_one_channel(gradcam):
    """A softmax of scores that are far apart. A temperature that goes with them is there for this."""
    case, place, unit = unet_case(2), "decoder", 1e3
    a = eg.tap(case.score, place)(case.x)
    score, zero = (lambda x: unit * case.score(x)), torch.zeros_like(case.x)
    theirs = raw(gradcam, "ScoreCAM", case, place, lambda output: unit * output[1].sum())
    assert min(apart(theirs, channel[None]) for channel in a) < 1e-6
    assert_agree(eg.score_cam(score, place)(case.x, zero), theirs, 1e-6)

    cooler = eg.score_cam(score, place, temperature=unit * a[0].numel())(case.x, zero)
    assert_agree(cooler, eg.score_cam(eg.reducers.class_mean(case.model, 1), place)(case.x, zero), 1e-9)
    assert min(apart(cooler, channel[None]) for channel in a) > 0.1


@pytest.mark.peers
def test_their_score_cam_counts_channels_that_show_nothing(gradcam):
    """A constant channel is a mask of zeros; its share of the softmax is taken from the others."""
    case, place = unet_case(2), "decoder"
    with torch.no_grad():
        case.net.decoder.norm.bias[0] = -100.0  # a ReLU that is never passed
    a = eg.tap(case.score, place)(case.x)
    assert (a[0] == 0).all()
    mean, zero = eg.reducers.class_mean(case.model, 1), torch.zeros_like(case.x)
    theirs = raw(gradcam, "ScoreCAM", case, place, lambda output: output[1].mean())
    ours = eg.score_cam(mean, place)(case.x, zero)
    shown = torch.stack(
        [mean(m * case.x) for m in (a / a.amax((1, 2), keepdim=True).clamp(min=1e-9))[:, None]]
    )
    assert_agree(theirs, torch.einsum("d,dhw->hw", shown.softmax(0), a)[None], 1e-6)
    assert_agree(ours, torch.einsum("d,dhw->hw", shown[1:].softmax(0), a[1:])[None], 1e-9)
    assert apart(ours, theirs) > 0.1


@pytest.mark.peers
def test_their_score_cam_and_full_grad_fail_in_3d(gradcam):
    case = unet_case(3)
    with pytest.raises(ValueError, match="same number of spatial dimensions"):
        raw(gradcam, "ScoreCAM", case, "decoder")
    peer = gradcam.FullGrad(case.net, [])
    assert peer.bias_data == []  # it looks for Conv2d and BatchNorm2d
    with pytest.raises(ValueError, match="cannot reshape"):
        peer(case.x[None].clone(), [lambda output: output[1].sum()])
    mean = eg.reducers.class_mean(case.model, 1)
    ours = eg.score_cam(mean, "bottom")(case.x, torch.zeros_like(case.x))
    assert ours.shape == (1, *(n // 2 for n in case.x.shape[1:]))


@pytest.mark.peers
def test_their_maps_lose_sign_and_size(gradcam):
    """What is shown has been cut at zero and scaled to [0, 1]: a score that is turned round shows nothing."""
    case = unet_case(2)
    peer = lambda: gradcam.HiResCAM(case.net, [case.layer("decoder")])
    map, shown = seen(peer(), case)
    larger, the_same = seen(peer(), case, lambda output: 1000 * output[1].sum())
    assert_agree(1000 * map, larger, ROUNDING)
    assert shown.min() == 0
    assert shown.max() == pytest.approx(1, abs=1e-5)
    assert np.abs(shown - the_same).max() < 1e-5
    assert 0.2 < (map < 0).double().mean() < 0.8
    _, turned = seen(peer(), case, lambda output: -output[1].sum())
    assert ((shown > 0) & (turned > 0)).sum() == 0


@pytest.mark.peers
def test_they_resize_volumes_with_cubic_splines_that_overshoot(gradcam):
    """In two dimensions they resize linearly; in three a map that is never negative gets negative values."""
    map = (drawn((1, 4, 3, 5)) > 0.8).double()
    like = torch.zeros(1, 8, 6, 10)
    theirs = importlib.import_module("pytorch_grad_cam.utils.image").scale_cam_image(map.numpy(), (10, 6, 8))
    ours = eg.upsample(map, like=like)
    assert theirs.shape == ours.shape
    assert theirs.min() < -0.05
    assert ours.min() == 0
    assert ours.max() <= 1


@pytest.mark.peers
def test_their_eigen_cam_keeps_a_matrix_of_all_voxels_by_all_voxels(gradcam):
    """For a direction among a few channels it decomposes with all singular vectors of the grid."""
    case = unet_case(2)
    voxels = 40 * 30
    case = case._replace(x=drawn((1, 40, 30)))
    peer = gradcam.EigenCAM(case.net, [case.layer("decoder")])
    tracemalloc.start()
    try:
        theirs, _ = seen(peer, case)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak > voxels**2 * 8  # bytes; for a volume of 64^3 that would be 5e11

    tracemalloc.start()
    try:
        ours = eg.eigen_cam(case.score, "decoder")(case.x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert min(apart(ours, theirs), apart(ours, -theirs)) <= 1e-6


@pytest.mark.peers
def test_they_leave_gradients_in_the_network(gradcam):
    case = unet_case(2)
    eg.grad_cam(case.score, "decoder")(case.x)
    assert all(p.grad is None for p in case.net.parameters())
    raw(gradcam, "GradCAM", case, "decoder")
    assert all(p.grad is not None for p in case.net.parameters())


def bias_of(layer):
    """What a convolution or a batch norm adds to what is linear in its input."""
    if not hasattr(layer, "running_mean"):
        return layer.bias.detach()
    return (layer.bias - layer.running_mean * layer.weight / (layer.running_var + layer.eps).sqrt()).detach()


@pytest.mark.peers
def test_their_full_grad_misses_the_transposed_convolution(gradcam):
    """Input and bias gradients of a piecewise linear network add up to the score, if no bias is left out."""
    case = unet_case(2)
    peer = gradcam.FullGrad(case.net, [])
    peer(case.x[None].clone(), [lambda output: output[1].sum()])
    layers = [name for name, m in case.net.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    grads = peer.activations_and_grads.gradients
    assert len(layers) == len(grads) == len(peer.bias_data)
    found = total(eg.input_x_gradient(case.score)(case.x))
    for name, bias, g in zip(layers, peer.bias_data, grads, strict=True):
        assert_agree(bias_of(case.layer(name)), torch.from_numpy(bias), ROUNDING)
        assert_agree(eg.activation_and_gradient(case.score, name)(case.x)[1], g[0], ROUNDING)
        found += total(torch.from_numpy(bias)[:, None, None] * g[0])
    _, g = eg.activation_and_gradient(case.score, "up")(case.x)
    missing = total(case.net.up.bias[:, None, None] * g)
    score = case.score(case.x).item()
    assert found + missing == pytest.approx(score, rel=1e-10)
    assert abs(missing) > 0.3 * abs(score)


# --- MONAI ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def visualize():
    pytest.importorskip("monai")
    return importlib.import_module("monai.visualize.class_activation_maps")


@pytest.mark.peers
@pytest.mark.parametrize("place", ["encoder", "bottom", "up", "decoder.conv", "decoder"])
def test_monais_grad_cam(visualize, curved, place):
    """It keeps only the positive part. And its hooks in the network, so it comes last."""
    ours = eg.grad_cam(curved.score, place)(curved.x)
    theirs = visualize.GradCAM(curved.net, place).compute_map(watched(curved.x), class_idx=1)[0]
    assert ours.max() > 0
    assert_agree(ours.clamp(min=0), theirs, ROUNDING)


@pytest.mark.peers
@pytest.mark.parametrize("ndim", [2, 3])
def test_monais_cam(visualize, ndim):
    """Before global average and linear layer Grad-CAM is CAM, times the number of voxels and less the bias."""
    case = classifier_case(ndim)
    theirs = visualize.CAM(case.net, "relu_b", "linear").compute_map(case.x[None], class_idx=[2])[0]
    voxels = theirs[0].numel()
    without_bias = theirs - case.net.linear.bias[2]
    assert_agree(eg.cam(case.score, "relu_b")(case.x), without_bias, 1e-11)
    assert_agree(voxels * eg.grad_cam(case.score, "relu_b")(case.x), without_bias, 1e-11)


@pytest.mark.peers
@pytest.mark.parametrize("ndim", [2, 3])
def test_monais_grad_cam_plus_plus_divides_by_another_sum(visualize, ndim):
    """The published denominator has the cube of one gradient; here it stands inside of the sum. And exp(F)."""
    case, place = classifier_case(ndim), "relu_a"
    theirs = visualize.GradCAMpp(case.net, place).compute_map(case.x[None], class_idx=2)[0]
    a, g = eg.activation_and_gradient(case.score, place)(case.x)
    axes = tuple(range(1, a.ndim))

    def by_hand(last):
        share = torch.where(g == 0, 0.0, g**2 / (2 * g**2 + last))
        weights = (share * g.clamp(min=0)).sum(axes, keepdim=True)
        return (weights * a).sum(0, keepdim=True).clamp(min=0)

    ours = eg.grad_cam_plus_plus(case.score, place)(case.x)
    factor = case.score(case.x).exp()
    assert_agree(ours, by_hand(g**3 * a.sum(axes, keepdim=True)), 1e-9)
    assert_agree(theirs / factor, by_hand((a * g**3).sum(axes, keepdim=True) + 1e-7), 1e-9)
    assert apart(theirs / theirs.max(), ours / ours.max()) > 0.1


@pytest.mark.peers
def test_monais_grad_cam_plus_plus_overflows(visualize):
    """exp(89) is infinite in float32, and times a gradient of zero it is NaN."""
    net = zoo.small_classifier(2)
    x = drawn((1, 8, 6), torch.float32)
    with torch.no_grad():
        net.linear.bias += 100
    theirs = visualize.GradCAMpp(net, "relu_a").compute_map(x[None], class_idx=1)
    ours = eg.grad_cam_plus_plus(eg.reducers.logit(eg.from_module(net), 1), "relu_a")(x)
    assert theirs.isnan().all()
    assert ours.isfinite().all()
    assert ours.max() > 0


@pytest.mark.peers
def test_monais_grad_cam_plus_plus_of_a_segmentation_needs_the_layer_on_the_grid_of_the_image(visualize):
    """It multiplies gradients at the layer with exp(logit) of every voxel of the output."""
    case = unet_case(3)
    with pytest.raises(RuntimeError, match="must match the size"):
        visualize.GradCAMpp(case.net, "bottom").compute_map(case.x[None], class_idx=1)
    assert eg.grad_cam_plus_plus(case.score, "bottom")(case.x).shape == (1, 4, 3, 5)


@pytest.mark.peers
def test_monai_shows_the_largest_value_as_the_smallest(visualize):
    case = unet_case(3)
    theirs = visualize.GradCAM(case.net, "bottom")(case.x[None], class_idx=1)[0]
    map = eg.upsample(eg.grad_cam(case.score, "bottom")(case.x).clamp(min=0), like=case.x)
    assert_agree(1 - (map - map.min()) / (map.max() - map.min()), theirs, 1e-6)  # it rounds to float32
    assert theirs.flatten()[map.argmax()] == theirs.min() == 0


@pytest.mark.peers
def test_monai_leaves_its_hooks_in_the_network(visualize):
    case = unet_case(2)
    visualize.GradCAM(case.net, "decoder").compute_map(case.x[None], class_idx=1)
    assert case.net.decoder._forward_hooks
    assert case.net.decoder._backward_hooks


# --- TorchRay ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchray(gradcam):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of importlib.resources
        pytest.importorskip("torchray")
        return importlib.import_module("torchray.attribution")


@pytest.mark.peers
@pytest.mark.parametrize("place", ["bottom", "up", "decoder.conv"])
def test_torchrays_linear_approximation(torchray, case, place):
    from torchray.attribution.linear_approx import linear_approx

    theirs = linear_approx(case.net, watched(case.x), 1, saliency_layer=place)[0]
    assert_agree(eg.hires_cam(case.score, place)(case.x), theirs, ROUNDING)


@pytest.mark.peers
@pytest.mark.parametrize("place", ["up", "decoder.conv"])
def test_torchrays_grad_cam_averages_two_axes(torchray, case, place):
    from torchray.attribution.grad_cam import grad_cam

    theirs = grad_cam(case.net, watched(case.x), 1, saliency_layer=place)[0]
    ours = eg.grad_cam(case.score, place)(case.x).clamp(min=0)
    if case.x.ndim == 3:
        assert_agree(ours, theirs, ROUNDING)
        return
    a, g = eg.activation_and_gradient(case.score, place)(case.x)
    assert_agree((a * g.mean((1, 2), keepdim=True)).sum(0, keepdim=True).clamp(min=0), theirs, ROUNDING)
    assert apart(ours, theirs) > 0.05


# --- The real network -------------------------------------------------------------------------------------


class Real(NamedTuple):
    net: nn.Module
    score: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor], Tensor]
    x: Tensor
    baseline: Tensor

    def layer(self, place):
        return self.net.get_submodule(place)


@pytest.fixture(scope="module")
def real():
    net, x = zoo.brain_extraction_unet(), zoo.head().data[:, 32:96, 32:96, 32:96].contiguous()
    with torch.no_grad():
        mask = net(x[None])[0] > 0
    return Real(
        net,
        eg.reducers.predicted_class_sum(eg.from_module(net), 1, at=x),
        lambda batch: torch.where(mask, net(batch), 0).flatten(1).sum(1),
        x,
        torch.zeros_like(x),
    )


REAL_PLACES = ("encoder.2.relu_b", "decoder.0.conv", "decoder.2.relu")


@pytest.mark.peers
@pytest.mark.parametrize("place", REAL_PLACES)
def test_layers_of_the_real_network(real, place):
    from captum.attr import LayerActivation, LayerGradCam, LayerGradientXActivation

    layer = real.layer(place)
    with eg.execution(layout="contiguous"):
        a, g = eg.activation_and_gradient(real.score, place)(real.x)
        map = eg.grad_cam(real.score, place)(real.x)
    assert_agree(a, LayerActivation(real.forward, layer).attribute(watched(real.x))[0], 1e-5)
    assert_agree(a * g, LayerGradientXActivation(real.forward, layer).attribute(watched(real.x))[0], 1e-4)
    assert_agree(map, LayerGradCam(real.forward, layer).attribute(watched(real.x))[0], 1e-4)


@pytest.mark.peers
@pytest.mark.parametrize("place", ["encoder.2.relu_b", "decoder.2.relu"])
def test_layer_integrated_gradients_of_the_real_network(real, place):
    from captum.attr import LayerIntegratedGradients

    with eg.execution(layout="contiguous", chunk=2):
        ours = eg.at(eg.integrated_gradients, place)(real.score, steps=5)(real.x, real.baseline)
    theirs = LayerIntegratedGradients(real.forward, real.layer(place)).attribute(
        watched(real.x), real.baseline[None], n_steps=5, internal_batch_size=2
    )
    assert_agree(ours, theirs[0], 1e-4)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("method", "place"),
    [
        ("hires_cam", "encoder.2.relu_b"),
        ("elementwise_grad_cam", "decoder.0.conv"),
        ("fem", "decoder.2.relu"),
    ],
)
def test_class_activation_maps_of_the_real_network(gradcam, real, method, place):
    name, _, settings, _ = SAME[method]
    theirs, _ = seen(
        getattr(gradcam, name)(real.net, [real.layer(place)]), real, lambda out: out[0][out[0] > 0].sum()
    )
    with eg.execution(layout="contiguous"):
        ours = getattr(eg, method)(real.score, place, **settings)(real.x)
    assert_agree(ours, theirs, 1e-4)
