"""Class activation maps against their published formulas as plain loops, on networks hooked by torch alone."""

import itertools
import warnings

import jaxtyping
import numpy as np
import pytest
import torch
from rounding import assert_alike
from together import together
from torch import nn
from torch.func import vmap

import esegeta as eg
from esegeta import zoo
from esegeta._facts import facts_of
from esegeta._registry import METHODS
from esegeta.random import normal, uniform
from esegeta.transforms.fusion import fuse

# Those by rules have tests of their own.
CAMS = sorted(
    name for name, spec in METHODS.items() if spec.place and spec.shape == "map" and spec.differentiable
)
LAYERS = {"unet": ("encoder.conv", "bottom", "up", "decoder.norm"), "classifier": ("norm_a", "relu_b")}
NETS = {"unet": zoo.small_unet, "classifier": zoo.small_classifier}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small spend more time on waking threads than on arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def our_own_messages():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def close(ours, expected, dtype=torch.float64, factor=1.0):
    ours, expected = ours.detach().double().numpy(), np.asarray(expected, dtype=np.float64)
    assert ours.shape == expected.shape
    off = np.abs(ours - expected).max() / max(np.abs(expected).max(), 1e-12)
    assert off <= factor * TOLERANCE[dtype], f"differs by {off:.2g} of the largest value"


# -- what the oracles see: plain modules, hooks and autograd ---------------------------------------------------------


class Looked:
    """A network with an input, and everything that an oracle may ask, without the library."""

    def __init__(self, kind, ndim, dtype):
        self.kind, self.dtype = kind, dtype
        self.net = NETS[kind](ndim).to(dtype)
        size = {1: (12,), 2: (8, 6), 3: (4, 6, 4)}[ndim]
        self.x = normal(ndim, (1, *size), dtype=torch.float64).to(dtype)
        self.baseline = normal(9, (1, *size), dtype=torch.float64).to(dtype) / 4

    def of_logits(self, y):
        """A score with curvature, so that second order is seen."""
        return (y[1].sigmoid() * y[0]).sum() + y[1].sum() / 7

    def score(self, x):
        return self.of_logits(eg.from_module(self.net)(x))

    def run(self, x, layer=None, change=None):
        """F(x) and the activation of a layer, which ``change`` may replace."""
        seen = []

        def hook(module, args, out):
            out = out if change is None else change(out)
            seen.append(out)
            return out

        handle = self.net.get_submodule(layer or "").register_forward_hook(hook)
        try:
            y = self.of_logits(self.net(x[None])[0])
        finally:
            handle.remove()
        return y, seen[0]

    def value(self, x, layer=None, change=None):
        with torch.no_grad():
            return float(self.run(x, layer, change)[0])

    def both(self, layer):
        y, a = self.run(self.x.clone().requires_grad_(), layer)
        (g,) = torch.autograd.grad(y, a)
        return a[0].detach().double().numpy(), g[0].double().numpy()

    def curvature(self, layer):
        """The Hessian-vector product H A, by autograd twice."""
        y, a = self.run(self.x.clone().requires_grad_(), layer)
        (g,) = torch.autograd.grad(y, a, create_graph=True)
        (h,) = torch.autograd.grad(g, a, grad_outputs=a.detach())
        return h[0].double().numpy()


def voxels(a):
    return list(itertools.product(*map(range, a.shape[1:])))


def weighted(w, a):
    return sum(w[d] * a[d] for d in range(len(a)))[None]


# -- the formulas ----------------------------------------------------------------------------------------------------


def cam(look, layer):
    a, g = look.both(layer)
    return weighted([sum(g[d][u] for u in voxels(a)) for d in range(len(a))], a)


def grad_cam(look, layer):
    a, g = look.both(layer)
    return weighted([sum(g[d][u] for u in voxels(a)) / a[d].size for d in range(len(a))], a)


def grad_cam_plus_plus(look, layer):
    a, g = look.both(layer)
    w = np.zeros(len(a))
    for d in range(len(a)):
        total = a[d].sum()
        for u in voxels(a):
            below = 2 * g[d][u] ** 2 + g[d][u] ** 3 * total
            alpha = g[d][u] ** 2 / below if below != 0 else 0.0
            w[d] += alpha * max(g[d][u], 0.0)
    return weighted(w, a)


def hires_cam(look, layer):
    a, g = look.both(layer)
    return sum(g[d] * a[d] for d in range(len(a)))[None]


def layer_cam(look, layer):
    a, g = look.both(layer)
    return sum(np.maximum(g[d], 0) * a[d] for d in range(len(a)))[None]


def elementwise_grad_cam(look, layer):
    a, g = look.both(layer)
    return sum(np.maximum(g[d] * a[d], 0) for d in range(len(a)))[None]


def xgrad_cam(look, layer):
    a, g = look.both(layer)
    w = [(g[d] * a[d]).sum() / a[d].sum() if a[d].sum() != 0 else 0.0 for d in range(len(a))]
    return weighted(w, a)


def interpolated(row, n):
    """One line of values on another grid, linear between the centres of voxels, constant beyond them."""
    at = (np.arange(n) + 0.5) * len(row) / n - 0.5
    return np.interp(at, np.arange(len(row)), row)


def up(a, size):
    for axis, n in enumerate(size):
        a = np.apply_along_axis(interpolated, axis, a, n)
    return a


def score_cam(look, layer, weights="softmax", temperature=1.0):
    a, _ = look.both(layer)
    x, b = look.x.double().numpy(), look.baseline.double().numpy()
    empty = look.value(look.baseline)
    rise, varies = np.zeros(len(a)), np.zeros(len(a), dtype=bool)
    for d in range(len(a)):
        h = up(a[d], x.shape[1:])
        varies[d] = h.max() > h.min()
        if varies[d]:
            h = (h - h.min()) / (h.max() - h.min())
            rise[d] = look.value(torch.from_numpy(x * h + b * (1 - h)).to(look.dtype)) - empty
    if weights == "softmax":
        e = np.exp((rise - rise[varies].max()) / temperature) * varies
        w = e / e.sum()
    else:
        w = (np.maximum(rise, 0) if weights == "increase" else rise) * varies
    return weighted(w, a)


def ablation_cam(look, layer, relative=False):
    a, _ = look.both(layer)
    whole = look.value(look.x)

    def without(d):
        keep = torch.ones(len(a), dtype=look.dtype)
        keep[d] = 0
        return lambda out: out * keep.reshape(1, -1, *[1] * (out.ndim - 2))

    w = [whole - look.value(look.x, layer, without(d)) for d in range(len(a))]
    return weighted(np.array(w) / (whole if relative else 1), a)


def principal(b):
    rows = b.reshape(len(b), -1)
    rows = rows - rows.mean(1, keepdims=True)
    left, _, _ = np.linalg.svd(rows, full_matrices=False)
    return (left[:, 0] @ rows).reshape(1, *b.shape[1:]), rows.sum(0).reshape(1, *b.shape[1:])


def eigen_cam(look, layer):
    a, _ = look.both(layer)
    found, total = principal(a)
    return found * np.sign((found * total).sum())


def eigen_grad_cam(look, layer):
    a, g = look.both(layer)
    found, total = principal(a * g)
    return found * np.sign((found * total).sum())


def seg_eigen_cam(look, layer):
    a, g = look.both(layer)
    found, _ = principal(a * np.abs(g))
    return -found if abs(found.min()) > abs(found.max()) else found


def fem(look, layer, k=1.0, show="mask"):
    a, _ = look.both(layer)
    total = np.zeros((1, *a.shape[1:]))
    for d in range(len(a)):
        limit = a[d].mean() + k * a[d].std()
        if a[d].std() == 0:
            continue
        total[0] += a[d].mean() * (a[d] >= limit) if show == "mask" else (a[d] > limit).mean() * a[d]
    return total


def shapley_cam(look, layer):
    a, g = look.both(layer)
    h = look.curvature(layer)
    return weighted([(g[d] - h[d] / 2).mean() for d in range(len(a))], a)


def seg_xres_cam(look, layer, window=2, pool="mean"):
    a, g = look.both(layer)
    total = np.zeros((1, *a.shape[1:]))
    for d in range(len(a)):
        for u in voxels(a):
            box = tuple(slice(i // window * window, i // window * window + window) for i in u)
            total[0][u] += (g[d][box].mean() if pool == "mean" else g[d][box].max()) * a[d][u]
    return total


def random_cam(look, layer):
    a, _ = look.both(layer)
    u = uniform(7, (len(a),), dtype=look.dtype).double().numpy()
    return weighted(2 * u - 1, a)


def ours(name, look, layer, **static):
    spec = METHODS[name]
    static = static or dict(spec.example)
    refs, extra = [look.baseline] * len(spec.refs), {"key": 7} if spec.key else {}
    return spec.fn(look.score, layer, **static)(look.x, *refs, **extra)


LOOKED = {
    (kind, ndim, dtype): Looked(kind, ndim, dtype)
    for kind, ndim, dtype in itertools.product(NETS, (1, 2, 3), (torch.float64, torch.float32))
}
THERE = [("unet", 1, "encoder.conv"), ("classifier", 2, "norm_a"), ("unet", 3, "bottom")]


@together("name", CAMS)
@pytest.mark.parametrize("ndim", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3])
@together("kind", NETS)
def test_every_map_is_the_published_formula(name, kind, ndim):
    look = LOOKED[kind, ndim, torch.float64]
    for layer in LAYERS[kind]:
        close(ours(name, look, layer), globals()[name](look, layer))


@together("name", CAMS)
@together(("kind", "layer"), [("unet", "bottom"), ("classifier", "relu_b")])
def test_single_precision_follows(name, kind, layer):
    look = LOOKED[kind, 2, torch.float32]
    exact = globals()[name](look, layer)
    close(ours(name, look, layer), exact, torch.float32)


@pytest.mark.parametrize(
    ("name", "static"),
    [
        ("score_cam", {"weights": "increase"}),
        ("score_cam", {"weights": "linear"}),
        ("score_cam", {"weights": "softmax", "temperature": 0.1}),
        ("ablation_cam", {"relative": True}),
        ("fem", {"k": 0.5}),
        ("fem", {"k": 2.0}),
        ("fem", {"k": 0.5, "show": "activation"}),
        ("seg_xres_cam", {"window": 3}),
        ("seg_xres_cam", {"window": 2, "pool": "max"}),
        ("seg_xres_cam", {"window": 3, "pool": "max"}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("kind", "ndim", "layer"), THERE)
def test_every_setting_is_the_published_formula(name, static, kind, ndim, layer):
    look = LOOKED[kind, ndim, torch.float64]
    close(ours(name, look, layer, **static), globals()[name](look, layer, **static))


# -- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:shapley_cam. the second derivative of:esegeta.ExecutionWarning")
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("label", [0, 2])
def test_an_average_and_a_linear_map(ndim, label):
    net = zoo.small_classifier(ndim).double()
    look = LOOKED["classifier", ndim, torch.float64]
    score = lambda x: eg.from_module(net)(x)[label]
    a, _ = look.both("relu_b")
    w, b = net.linear.weight[label].detach().double().numpy(), float(net.linear.bias.detach()[label])
    value, n = float(score(look.x)), a[0].size
    made = eg.cam(score, "relu_b")(look.x)
    close(made, weighted(w, a))
    assert float(made.mean()) == pytest.approx(value - b)
    close(eg.grad_cam(score, "relu_b")(look.x) * n, weighted(w, a))
    for name in ("hires_cam", "xgrad_cam", "grad_cam", "shapley_cam"):
        there = METHODS[name].fn(score, "relu_b")(look.x)
        assert float(there.sum()) == pytest.approx(value - b), name
    close(eg.ablation_cam(score, "relu_b")(look.x), weighted(w * a.reshape(len(a), -1).mean(1), a))


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_behind_an_affine_rest_hires_cam_has_the_sum_of_the_score(ndim):
    net = zoo.small_unet(ndim).double()
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    x = LOOKED["unet", ndim, torch.float64].x
    constant = float(net.out.bias.detach()[1]) * x[0].numel()
    made = eg.hires_cam(score, "decoder.relu")(x)
    assert float(made.sum()) == pytest.approx(float(score(x)) - constant)
    # Without a norm's constant and a ReLU in between it is not.
    early = eg.hires_cam(score, "encoder.conv")(x)
    assert abs(float(early.sum()) - float(score(x)) + constant) > 1e-3


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("layer", ["bottom", "decoder"])
def test_windows_go_from_hires_cam_to_grad_cam(ndim, layer):
    look = LOOKED["unet", ndim, torch.float64]
    one = eg.seg_xres_cam(look.score, layer)(look.x)
    assert_alike(one, eg.hires_cam(look.score, layer)(look.x))
    assert_alike(one, eg.seg_xres_cam(look.score, layer, pool="max")(look.x))
    for window in (12, 99):
        whole = eg.seg_xres_cam(look.score, layer, window=window)(look.x)
        close(whole, eg.grad_cam(look.score, layer)(look.x).numpy())


def test_shapley_cam_of_a_piecewise_linear_score_is_grad_cam():
    look = LOOKED["unet", 2, torch.float64]
    score = eg.reducers.class_sum(eg.from_module(look.net), 1)
    with pytest.warns(
        eg.ExecutionWarning, match="^shapley_cam: the second derivative of .* is zero .*: this is grad_cam"
    ):
        map_ = eg.shapley_cam(score, "bottom")(look.x)
    close(map_, eg.grad_cam(score, "bottom")(look.x).numpy(), factor=10)
    with eg.execution() as run, pytest.warns(eg.ExecutionWarning):
        eg.shapley_cam(score, "bottom")(look.x)
    assert [e["event"] for e in run.events] == ["flat"]


def test_shapley_cam_of_a_smoothed_score_has_a_second_order():
    look = LOOKED["unet", 2, torch.float64]
    score = eg.reducers.class_sum(eg.from_module(look.net), 1)
    smooth = eg.rules.softplus(score, beta=5.0)
    map_, first = (m(smooth, "bottom")(look.x) for m in (eg.shapley_cam, eg.grad_cam))
    assert float((map_ - first).abs().max()) > 1e-3 * float(first.abs().max())


def test_a_constant_channel_weighs_nothing_in_score_cam():
    score = lambda x: eg.mark(torch.cat([x, torch.full_like(x, 5.0), -x]), "layer")[0].sum()
    alone = lambda x: eg.mark(torch.cat([x, -x]), "layer")[0].sum()
    x, b = torch.tensor([[1.0, 2.0, 4.0]]), torch.zeros(1, 3)
    for weights in ("softmax", "increase", "linear"):
        with_it = eg.score_cam(score, "layer", weights=weights)(x, b)
        assert torch.allclose(with_it, eg.score_cam(alone, "layer", weights=weights)(x, b))
    flat = lambda x: (eg.mark(0 * x + 3, "layer") + x).sum()
    for weights in ("softmax", "increase", "linear"):
        assert torch.equal(eg.score_cam(flat, "layer", weights=weights)(x, b), torch.zeros(1, 3))


def test_the_softmax_of_large_scores_stays_finite():
    score = lambda x: 1e30 * eg.mark(torch.cat([x, -x]), "layer")[0].sum()
    x = torch.tensor([[1.0, 2.0, 4.0]])
    made = eg.score_cam(score, "layer")(x, torch.zeros(1, 3))
    assert torch.equal(made, x)


def test_grad_cam_plus_plus_neither_over_nor_underflows():
    for scale in (1e-25, 1e25):
        score = lambda x, s=scale: (s * eg.mark(1 * x, "layer")).sum()
        x = torch.tensor([[1.0, 2.0]]) / scale
        # With s the gradient and 3 / s the sum of the channel: two voxels of s / (2 + 3).
        made = eg.grad_cam_plus_plus(score, "layer")(x)
        assert torch.allclose(made, torch.tensor([[0.4, 0.8]]), rtol=1e-5)


def test_random_weights_belong_to_the_key():
    look = LOOKED["unet", 2, torch.float64]
    explain = eg.random_cam(look.score, "bottom")
    one = explain(look.x, key=3)
    assert torch.equal(one, explain(look.x, key=3))
    assert torch.equal(one, eg.random_cam(look.score, "bottom")(look.x, key=torch.tensor(3)))
    assert not torch.allclose(one, explain(look.x, key=4))
    keys = torch.arange(200)
    slope = vmap(lambda k: eg.random_cam(lambda x: eg.mark(1 * x, "a").sum(), "a")(torch.ones(1, 1), key=k))
    w = slope(keys).flatten()
    assert (w.abs() <= 1).all()
    assert abs(float(w.mean())) < 0.15
    assert float(w.std()) == pytest.approx(3**-0.5, rel=0.1)


def test_the_sign_of_a_component_is_definite():
    for turn in (1, -1):
        score = lambda x, turn=turn: (eg.mark(turn * torch.cat([x, 3 * x, x**2 / 9]), "layer")).sum()
        x = torch.tensor([[1.0, -2.0, 4.0, 0.5]])
        made = eg.eigen_cam(score, "layer")(x)
        middle = turn * torch.cat([x, 3 * x, x**2 / 9]).mean(0)
        assert float((made[0] * (middle - middle.mean())).sum()) > 0
        assert abs(float(made.sum())) < 1e-5
        there = eg.seg_eigen_cam(score, "layer")(x)
        assert float(there.max()) >= float(-there.min())


def test_dead_channels_do_no_harm():
    dead = lambda x: eg.mark(torch.cat([x, 0 * x, 0 * x, -x.square()]), "layer").square().sum()
    x = torch.tensor([[1.0, 2.0, -4.0]])
    for name in CAMS:
        spec = METHODS[name]
        extra = {"key": 1} if spec.key else {}
        made = spec.fn(dead, "layer", **spec.example)(x, *[torch.zeros(1, 3)] * len(spec.refs), **extra)
        assert torch.isfinite(made).all(), name


@pytest.mark.parametrize("name", ["eigen_cam", "eigen_grad_cam", "seg_eigen_cam"])
def test_components_have_derivatives_beside_dead_channels(name):
    dead = lambda x: eg.mark(torch.cat([x, 0 * x, 0 * x, x.square() / 3, x.sin()]), "layer").square().sum()
    x = torch.tensor([[1.0, 2.0, -4.0]], dtype=torch.float64)
    v = torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64)
    run = METHODS[name].fn(dead, "layer")
    _, change = torch.func.jvp(run, (x,), (v,))
    h = 1e-5
    assert torch.allclose(change, (run(x + h * v) - run(x - h * v)) / (2 * h), rtol=1e-6, atol=1e-7)
    back = torch.func.grad(lambda z: (run(z) * torch.arange(3)).sum())(x)
    assert float((back * v).sum()) == pytest.approx(float((change * torch.arange(3)).sum()), rel=1e-9)


# -- several places, batches, sizes ----------------------------------------------------------------------------------


def arguments(name, look):
    spec = METHODS[name]
    return [look.baseline] * len(spec.refs), {"key": 7} if spec.key else {}


@pytest.mark.parametrize("name", CAMS)
def test_several_places_are_the_single_ones(name):
    look, spec = LOOKED["unet", 3, torch.float64], METHODS[name]
    refs, extra = arguments(name, look)
    layers = ["bottom", "encoder.relu", "decoder"]
    made = spec.fn(look.score, layers, **spec.example)(look.x, *refs, **extra)
    assert isinstance(made, tuple)
    for layer, a in zip(layers, made, strict=True):
        one = spec.fn(look.score, layer, **spec.example)(look.x, *refs, **extra)
        assert torch.allclose(a, one, rtol=1e-9, atol=1e-12), layer


@pytest.mark.parametrize("name", [n for n in CAMS if n not in ("score_cam", "ablation_cam", "shapley_cam")])
def test_several_places_take_one_pass(name):
    runs = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = zoo.small_unet(2)

        def forward(self, x):
            runs.append(len(x))
            return self.net(x)

    score = eg.reducers.class_sum(eg.from_module(Counted().eval()), 1)
    x = torch.ones(1, 4, 4)
    extra = {"key": 7} if METHODS[name].key else {}
    explain = METHODS[name].fn(score, ["net.bottom", "net.encoder", "net.decoder"], **METHODS[name].example)
    explain(x, **extra)  # the first call also finds the shapes
    del runs[:]
    explain(x, **extra)
    assert runs == [1]


@pytest.mark.parametrize("name", CAMS)
def test_batches_are_the_single_ones(name):
    look, spec = LOOKED["unet", 2, torch.float64], METHODS[name]
    refs, extra = arguments(name, look)
    explain = spec.fn(look.score, "bottom", **spec.example)
    xs = torch.stack([look.x, -look.x, look.x.flip(-1) + 1])
    loop = torch.stack([explain(x, *refs, **extra) for x in xs])
    run = lambda x: explain(x, *refs, **extra)
    assert torch.allclose(vmap(run)(xs), loop, rtol=1e-8, atol=1e-10)
    dims = (0, *[None] * len(refs))
    assert torch.allclose(eg.batched(explain, in_dims=dims)(xs, *refs, **extra), loop, rtol=1e-8, atol=1e-10)
    with eg.execution(chunk=3):
        assert torch.allclose(
            eg.batched(explain, in_dims=dims)(xs, *refs, **extra), loop, rtol=1e-8, atol=1e-10
        )


@pytest.mark.parametrize("name", ["score_cam", "ablation_cam"])
def test_channels_are_streamed(name):
    """A run for each of 64 channels, but never 64 images or 64 activations at once."""
    kernel = torch.ones(64, 1, 1, 1)
    score = lambda x: eg.mark(torch.nn.functional.conv2d(x[None, :, ::4, ::4], kernel)[0], "layer").sum()
    x = torch.zeros(1, 128, 128)
    held = eg.forecast(METHODS[name].fn(score, "layer"), x, *[x] * len(METHODS[name].refs))
    assert held < 64 * x.numel() * x.element_size() / 2


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAMS)
def test_a_layer_without_a_grid_is_refused(name):
    look, spec = LOOKED["classifier", 2, torch.float64], METHODS[name]
    refs, extra = arguments(name, look)
    with pytest.raises(ValueError, match=r"expected a layer with feature maps .* got .* shape \(\d+,\)"):
        spec.fn(look.score, "linear", **spec.example)(look.x, *refs, **extra)


@pytest.mark.parametrize("name", CAMS)
def test_a_place_that_is_none_is_refused(name):
    look, spec = LOOKED["classifier", 2, torch.float64], METHODS[name]
    refs, extra = arguments(name, look)
    with pytest.raises(ValueError, match="expected a place of this score, got 'relu_c'"):
        spec.fn(look.score, "relu_c", **spec.example)(look.x, *refs, **extra)
    for wrong in (3, [], None):
        with pytest.raises(TypeError, match="expected a place or a sequence of places"):
            spec.fn(look.score, wrong, **spec.example)
    with pytest.raises(ValueError, match="expected each place once"):
        spec.fn(look.score, ["pool", "pool"], **spec.example)


def test_no_class_activation_map_without_an_average():
    look = LOOKED["classifier", 2, torch.float32]
    with pytest.raises(
        ValueError, match=r"cam: expected a layer .* means of its channels, got a gradient that varies"
    ):
        eg.cam(look.score, "norm_a")(look.x)
    with pytest.raises(ValueError, match="cam: expected"):
        vmap(eg.cam(look.score, "norm_a"))(torch.stack([look.x, 2 * look.x]))
    loose = eg.cam(look.score, "norm_a", exact=False)(look.x)
    grad = eg.grad_cam(look.score, "norm_a")(look.x)
    assert torch.allclose(loose, grad * grad.numel(), rtol=1e-4)
    assert eg.cam(look.score, ("relu_b", "norm_b:in"), exact=False)(look.x)[0].shape == (1, 4, 3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda s: eg.score_cam(s, "a", weights="maximum"),
            "score_cam: expected weights to be one of softmax, inc",
        ),
        (lambda s: eg.score_cam(s, "a", temperature=0), "score_cam: expected temperature > 0, got 0"),
        (
            lambda s: eg.score_cam(s, "a", temperature=-1),
            "score_cam: expected temperature to be a finite number",
        ),
        (lambda s: eg.fem(s, "a", k=-1), "fem: expected k to be a finite number >= 0, got -1"),
        (lambda s: eg.fem(s, "a", show="all"), "fem: expected show to be one of mask, activation, got 'all'"),
        (
            lambda s: eg.seg_xres_cam(s, "a", window=0),
            "seg_xres_cam: expected window to be an int >= 1, got 0",
        ),
        (lambda s: eg.seg_xres_cam(s, "a", pool="min"), "seg_xres_cam: expected pool to be one of mean, max"),
    ],
)
def test_settings_are_checked(make, text):
    with pytest.raises(ValueError, match=text):
        make(lambda x: eg.mark(1 * x, "a").sum())


def test_other_names():
    for name in ("linear_approximation", "linear_approximator", "linear_approx"):
        assert eg.find_method(name).name == "hires_cam"
    assert eg.find_method("gradcam++").name == "grad_cam_plus_plus"


# -- several layers as one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("by", ["mean", "product", "max"])
def test_fusion_is_the_loop(ndim, by):
    look = LOOKED["unet", ndim, torch.float64]
    layers = ["encoder", "bottom", "decoder"]
    parts = []
    for layer in layers:
        one = np.maximum(grad_cam(look, layer), 0)[0]
        parts.append(up(one / one.max() if one.max() > 0 else one, look.x.shape[1:]))
    combine = {
        "mean": lambda p: sum(p) / len(p),
        "product": lambda p: np.prod(p, 0),
        "max": lambda p: np.max(p, 0),
    }
    together = fuse(eg.grad_cam(look.score, layers), by=by)(look.x)
    close(together, combine[by](parts)[None])
    close(fuse([eg.grad_cam(look.score, p) for p in layers], by=by)(look.x), combine[by](parts)[None])
    xs = torch.stack([look.x, 2 * look.x])
    fused = fuse(eg.grad_cam(look.score, layers), by=by)
    assert torch.allclose(eg.batched(fused)(xs), torch.stack([fused(x) for x in xs]), rtol=1e-8)


def test_a_map_that_is_positive_nowhere_stays_zero():
    score = lambda x: -eg.mark(1 * x, "a").sum()
    x = torch.tensor([[1.0, 2.0]])
    assert torch.equal(fuse(eg.grad_cam(score, "a"))(x), torch.zeros(1, 2))


def test_fusion_passes_keys_on():
    look = LOOKED["unet", 2, torch.float64]
    fused = fuse(eg.random_cam(look.score, ["bottom", "decoder"]))
    assert facts_of(fused).key
    assert torch.equal(fused(look.x, key=1), fused(look.x, key=1))
    assert not torch.equal(fused(look.x, key=1), fused(look.x, key=2))


def test_fusion_refuses_what_it_cannot_combine():
    score = lambda x: eg.mark(torch.cat([x, x]), "a").sum()
    for wrong in (None, [], [3], "grad_cam"):
        with pytest.raises(TypeError, match="fuse: expected an explanation"):
            fuse(wrong)
    with pytest.raises(ValueError, match="fuse: expected by to be one of mean, product, max, got 'sum'"):
        fuse(eg.grad_cam(score, "a"), by="sum")
    with pytest.raises(ValueError, match=r"fuse: expected maps \(1,\*U\), got float32\(2, 3\)"):
        fuse(eg.at(eg.input_x_gradient, "a")(score))(torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"fuse: expected x to be a torch\.Tensor"):
        fuse(eg.grad_cam(score, "a"))([1.0])


# -- weights that are nothing but rounding -------------------------------------------------------------------------

MEANS = {
    "grad_cam": eg.grad_cam,
    "xgrad_cam": eg.xgrad_cam,
    "shapley_cam": eg.shapley_cam,
    "seg_xres_cam": lambda score, place: eg.seg_xres_cam(score, place, window=64),
}


def normed(axes, norm="InstanceNorm", act=nn.LeakyReLU, dtype=torch.float32):
    """Blocks of convolution, norm and activation, as in nnU-Net."""
    torch.manual_seed(0)
    conv, layer = getattr(nn, f"Conv{axes}d"), getattr(nn, f"{norm}{axes}d")
    blocks = [
        nn.Sequential(conv(1 if i == 0 else 6, 6, 3, padding=1), layer(6, affine=True), act())
        for i in range(3)
    ]
    net = nn.Sequential(*blocks, conv(6, 2, 1)).to(dtype).eval()
    x = normal(3, (1, *{1: (40,), 2: (16, 12), 3: (8, 10, 8)}[axes]), dtype=dtype)
    return eg.reducers.predicted_class_sum(eg.from_module(net), 1, at=x), x


def warned(explain, *args):
    """What was recorded and what was warned of."""
    with eg.execution() as run, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        explain(*args)
    texts = [str(w.message) for w in said if issubclass(w.category, eg.ExecutionWarning)]
    # Behind the last activation a score is linear, and shapley_cam says that it has no second derivative there.
    texts = [text for text in texts if "the second derivative" not in text]
    return [e for e in run.events if e["event"] == "vanishing weights"], texts


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize(("axes", "dtype"), [(1, torch.float32), (2, torch.float64), (3, torch.float32)])
def test_means_that_cancel_before_an_instance_norm_are_warned_of(name, axes, dtype):
    act = nn.GELU if name == "shapley_cam" else nn.LeakyReLU
    score, x = normed(axes, act=act, dtype=dtype)
    for block in range(3):
        (event,), (text,) = warned(MEANS[name](score, f"{block}.0"), x)
        assert event["message"] == text
        assert text.startswith(f"{name}: the weights of all channels at '{block}.0' are rounding errors")
        assert f"Take a place after the norm and its activation, such as '{block}.2'" in text
        assert "hires_cam or layer_cam" in text
        assert event["instead"] == [f"{block}.2"]
        for place in event["instead"]:
            assert warned(MEANS[name](score, place), x) == ([], [])


@pytest.mark.parametrize("name", sorted(set(CAMS) - set(MEANS) - {"cam"}))
def test_cams_without_means_say_nothing_before_a_norm(name):
    score, x = normed(2)
    spec = METHODS[name]
    extra = {"key": 0} if spec.key else {}
    refs = (torch.zeros_like(x),) if spec.refs else ()
    assert warned(lambda: spec.fn(score, "1.0", **spec.example)(x, *refs, **extra)) == ([], [])


@pytest.mark.parametrize("norm", ["BatchNorm", "InstanceNorm"])
def test_other_places_are_not_warned_of(norm):
    score, x = normed(2, norm)
    places = [f"{b}.{i}" for b in range(3) for i in (1, 2)] + ["0", "3"]
    places += [f"{b}.0" for b in range(3)] if norm == "BatchNorm" else []
    for name, make in MEANS.items():
        if name != "shapley_cam":
            for place in places:
                assert warned(make(score, place), x) == ([], []), (name, place)
    assert warned(eg.seg_xres_cam(score, "1.0", window=4), x) == ([], [])


def test_batches_and_several_places_are_warned_of_once():
    score, x = normed(2)
    xs = torch.stack([x, 2 * x + 1, -x])
    for explain in (
        eg.batched(eg.grad_cam(score, "1.0")),
        vmap(eg.grad_cam(score, "1.0")),
        lambda xs: eg.batched(eg.smooth(eg.grad_cam(score, "1.0"), noise=0.1, samples=3))(xs, key=0),
    ):
        with eg.execution(chunk=1):
            (event,), texts = warned(explain, xs)
        assert texts == [event["message"]]
        assert event["instead"] == ["1.2"]
    events, _ = warned(eg.grad_cam(score, ["0.0", "0.2", "1.0", "2"]), x)
    assert [e["place"] for e in events] == ["0.0", "1.0"]


def test_the_means_of_a_gradient_that_is_zero_are_not_warned_of():
    score = lambda x: eg.mark(2 * x, "layer").relu().sum()
    assert warned(eg.grad_cam(score, "layer"), -torch.ones(2, 5)) == ([], [])
