"""Every method at a place, from the registry; and what conductance on the real network comes to."""

import pytest
import torch
from together import together

import esegeta as eg
from esegeta import zoo
from esegeta._registry import METHODS

AT_A_PLACE = [spec for spec in METHODS.values() if spec.place and spec.fn.__module__.startswith("esegeta.")]
SIZES = (8, 6, 4)

# The networks are piecewise linear, which a method of second derivatives warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*the second derivative of:esegeta.ExecutionWarning")
every = pytest.mark.parametrize("spec", AT_A_PLACE, ids=lambda spec: spec.name)


def unet(ndim):
    score = eg.reducers.class_sum(eg.from_module(zoo.small_unet(ndim).double()), 1)
    return score, eg.random.normal(7, (1, *SIZES[:ndim]), dtype=torch.float64)


def run(spec, score, place, x):
    refs = {"baseline": torch.zeros_like(x), "baselines": torch.zeros(3, *x.shape, dtype=x.dtype)}
    static = {k: min(v, 8) if k == "steps" else v for k, v in spec.example.items()}
    static |= {"exact": False} if spec.name == "cam" else {}
    extra = {"key": 7} if spec.key else {}
    return spec.fn(score, place, **static)(x, *(refs[kind] for kind in spec.refs), **extra)


@every
@together("ndim", [1, 2, 3])
def test_on_grids_of_every_dimension(spec, ndim):
    score, x = unet(ndim)
    layer = (8, *(n // 2 for n in x.shape[1:]))
    a = run(spec, score, "bottom.conv", x)
    assert a.shape == {"layer": layer, "map": (1, *layer[1:]), "input": x.shape}[spec.shape]
    assert a.dtype == x.dtype
    assert a.isfinite().all()
    assert (a != 0).any()


@every
@together(
    ("place", "text"),
    [
        ("botom.conv", "'botom.conv'.*Nearest: bottom.conv"),
        ("bottom.conv#1", "#1, but there is 1"),
        ("bottom.conv:1", "'bottom.conv:1'"),
    ],
)
def test_a_place_that_is_none_is_refused(spec, place, text):
    score, x = unet(2)
    with pytest.raises(ValueError, match=rf"(?s)expected .*, got .*{text}"):
        run(spec, score, place, x)


@every
def test_a_place_that_this_input_does_not_reach_is_refused(spec):
    def score(x):
        z = torch.relu(x).square()
        return (eg.mark(z, "wide") if x.shape[-1] > 5 else z).sum()

    run(spec, score, "wide", torch.ones(1, 4, 6))
    with pytest.raises(ValueError, match=r"(?s)expected .*, got .*'wide'"):
        run(spec, score, "wide", torch.ones(1, 4, 5))


@every
def test_the_network_is_left_as_it_was(spec):
    net = zoo.small_unet(2).double()
    score, x = eg.reducers.class_sum(eg.from_module(net), 1), unet(2)[1]
    run(spec, score, "bottom.conv", x)
    for module in net.modules():
        assert not {**module._forward_hooks, **module._forward_pre_hooks, **module._backward_hooks}
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("ndim", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_conductance_of_a_cut_is_complete_and_of_one_of_its_places_is_not(ndim):
    score, x = unet(ndim)
    baseline = torch.full_like(x, 0.3)
    difference = (score(x) - score(baseline)).item()
    found = eg.places(score, x)
    assert found["bottom"].beside == ("encoder",)
    cut = eg.conductance(score, ("bottom", *found["bottom"].beside), steps=512)(x, baseline)
    assert sum(a.sum() for a in cut).item() == pytest.approx(difference, rel=5e-3)
    alone = eg.conductance(score, "bottom", steps=512)(x, baseline)
    assert alone.sum().item() != pytest.approx(difference, rel=0.05)
    assert torch.allclose(alone, cut[0])


@pytest.mark.slow
def test_conductance_on_the_real_network():
    """Complete over the cut at the bottleneck; over the bottleneck alone not, and the listing says why."""
    net, x = zoo.brain_extraction_unet(), torch.nn.functional.avg_pool3d(zoo.head().data, 2)
    score = eg.reducers.predicted_class_sum(eg.from_module(net), 1, at=x)
    empty = torch.zeros_like(x)
    difference = (score(x) - score(empty)).item()
    bottleneck = eg.places(score, x)["encoder.2:0"]
    assert not bottleneck.cut
    assert bottleneck.beside == ("encoder.0:1", "encoder.1:1", "encoder.2:1")

    flow = eg.conductance(score, (bottleneck.name, *bottleneck.beside), steps=64)(x, empty)
    off = [abs(total / difference - 1) for total in (sum(a.sum().item() for a in flow), flow[0].sum().item())]
    assert off[0] < 1e-3
    assert off[1] > 0.1
    alone = eg.conductance(score, bottleneck.name, steps=16)(x, empty).sum().item()
    assert abs(alone / difference - 1) > 0.1


@pytest.mark.slow
def test_hires_cam_of_the_real_network_has_the_sum_of_the_score():
    """Only a sum of channels with a bias follows its last layer."""
    net, x = zoo.brain_extraction_unet(), torch.nn.functional.avg_pool3d(zoo.head().data, 2)
    model = eg.from_module(net)
    score = eg.reducers.predicted_class_sum(model, 1, at=x)
    bias = net.out.bias.item() * (model(x) > 0).sum().item()
    assert abs(bias) > 0
    for place in ("decoder.2.relu", "out:in"):
        total = eg.hires_cam(score, place)(x).sum().item()
        assert total == pytest.approx(score(x).item() - bias, rel=1e-4)
    before = eg.hires_cam(score, "decoder.2.conv")(x).sum().item()  # a ReLU follows, but no bias of its own
    assert before == pytest.approx(score(x).item() - bias, rel=1e-4)
    assert eg.hires_cam(score, "decoder.1")(x).sum().item() != pytest.approx(score(x).item() - bias, rel=1e-2)


def test_finer_cam_is_grad_cam_of_another_score():
    """What two classes share is off the map."""
    model = lambda x: torch.stack([3 * z[0].mean() + z[1].mean() for z in (eg.mark(x, "layer"),)] * 2)
    apart = lambda x: model(x) + torch.stack([0 * x.sum(), x[1].mean()])
    x = torch.rand(2, 4, 4)
    map = eg.grad_cam(eg.reducers.finer(lambda x: apart(eg.mark(x, "in")), 1, at=x), "in")(x)
    torch.testing.assert_close(map, x[1:] / 16)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_conductance_sees_a_kink_at_an_end_of_the_way(end):
    score = lambda x: (torch.relu(eg.mark(x, "layer") - end)).sum()
    x, baseline = torch.full((1, 2), end + 1), torch.full((1, 2), end)
    for steps, most in ((20, 1e-4), (64, 1e-4), (256, 1e-4)):  # its first panel counts for a gradient of zero
        flow = eg.conductance(score, "layer", steps=steps)(x, baseline)
        assert (flow - 1).abs().max() < most
        back = eg.conductance(score, "layer", steps=steps)(baseline, x)
        assert (back + 1).abs().max() < most
