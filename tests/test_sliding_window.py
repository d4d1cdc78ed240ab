"""Stitched inference against explicit stitching in plain torch, under every transform; and patches by themselves."""

import copy
import functools
import gc
import itertools
import math
import subprocess
import sys
import threading

import jaxtyping
import numpy as np
import pytest
import rounding
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import esegeta as eg
from esegeta import zoo
from esegeta.engine.folded import NoGradient
from esegeta.engine.memory import Live
from esegeta.engine.tiles import shares, starts
from esegeta.patches import patchwise, sliding_window

close = functools.partial(rounding.close, tolerance=1e-11, least=0)


def drawn(*shape, key=0, dtype=torch.float64):
    return eg.random.normal(key, shape, dtype=dtype)


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Smooth(nn.Module):
    """Two convolutions with everything that makes tiles matter: zero padding, a norm over the patch, curvature."""

    def __init__(self, axes, inputs=1, classes=2):
        super().__init__()
        torch.manual_seed(1)
        self.first = CONV[axes](inputs, 3, 3, padding=1)
        self.norm = nn.GroupNorm(1, 3)
        self.last = CONV[axes](3, classes, 3, padding=1)

    def forward(self, x):
        return self.last(torch.nn.functional.gelu(self.norm(self.first(x))))


def network(axes, inputs=1, classes=2):
    return Smooth(axes, inputs, classes).double().eval()


# ------------------------------------------------------------------ the plain loop


def nnunet_starts(length, patch, overlap):
    """As nnU-Net describes them: the least number of evenly spread tiles with at most that step."""
    target = max(1, patch * (1 - overlap))
    count = int(np.ceil((length - patch) / target - 1e-9)) + 1
    step = (length - patch) / (count - 1) if count > 1 else 0
    return [int(np.round(step * i)) for i in range(count)]


def monai_starts(length, patch, overlap):
    """Fixed steps until a tile reaches the end; that one is moved inwards."""
    step = max(1, int(patch * (1 - overlap)))
    out = []
    for begin in range(0, length, step):
        out.append(min(begin, length - patch))
        if begin + patch >= length:
            return out
    raise AssertionError("the end was never reached")


def importance(patch, kind):
    """An unnormalised map of weights on a patch."""
    w = torch.ones(patch, dtype=torch.float64)
    if kind == "gaussian":
        for place in itertools.product(*map(range, patch)):
            w[place] = math.exp(
                -sum((i - p // 2) ** 2 / (2 * (p / 8) ** 2) for i, p in zip(place, patch, strict=True))
            )
    return w


def stitched(model, x, patch, overlap=0.5, kind="gaussian", begins=nnunet_starts):
    """Explicit stitching of a model of one example, differentiable by ordinary autograd."""
    grid = x.shape[1:]
    lacking = [max(0, p - n) for n, p in zip(grid, patch, strict=True)]
    lows = [k // 2 for k in lacking]
    sides = [s for low, k in zip(reversed(lows), reversed(lacking), strict=True) for s in (low, k - low)]
    x = torch.nn.functional.pad(x, sides)
    w = importance(patch, kind)
    total = norm = 0
    axes = [begins(n, p, overlap) for n, p in zip(x.shape[1:], patch, strict=True)]
    for start in itertools.product(*axes):
        box = tuple(slice(b, b + p) for b, p in zip(start, patch, strict=True))
        around = [
            s
            for b, p, n in reversed(list(zip(start, patch, x.shape[1:], strict=True)))
            for s in (b, n - b - p)
        ]
        total = total + torch.nn.functional.pad(w * model(x[(slice(None), *box)]), around)
        norm = norm + torch.nn.functional.pad(w, around)
    y = total / norm
    return y[(slice(None), *(slice(low, low + n) for low, n in zip(lows, grid, strict=True)))]


@pytest.mark.parametrize("overlap", [0, 0.25, 0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("patch", [1, 2, 7, 10, 16])
def test_tiles_begin_where_the_two_descriptions_say(patch, overlap):
    for length in range(patch, 5 * patch + 3):
        even, fixed = starts(length, patch, overlap, "even"), starts(length, patch, overlap, "fixed")
        assert even == nnunet_starts(length, patch, overlap)
        assert fixed == monai_starts(length, patch, overlap)
        for begins in (even, fixed):
            assert begins[0] == 0
            assert begins[-1] == length - patch
            steps = [b - a for a, b in itertools.pairwise(begins)]
            assert all(0 < s <= max(1, math.ceil(patch * (1 - overlap) - 1e-9)) for s in steps)


@pytest.mark.parametrize("kind", ["gaussian", "average", "centre"])
def test_weights_sum_to_one_and_are_nowhere_negative(kind):
    for length, patch, overlap in [
        (9, 4, 0.5),
        (4, 4, 0.5),
        (31, 8, 0.7),
        (12, 5, 0),
        (1, 1, 0),
        (40, 16, 0.3),
    ]:
        begins = starts(length, patch, overlap, "even")
        rows = shares(length, patch, begins, kind)
        total = torch.zeros(length, dtype=torch.float64)
        for begin, row in zip(begins, rows, strict=True):
            total[begin : begin + patch] += row
        assert (rows >= 0).all()
        close(total, torch.ones_like(total))
        if kind == "centre":
            assert ((rows == 0) | (rows == 1)).all()


GRIDS = [
    ((13,), (6,)),
    ((4,), (6,)),
    ((9, 12), (4, 6)),
    ((3, 12), (5, 5)),
    ((7, 5, 9), (4, 4, 6)),
    ((3, 4, 9), (4, 4, 4)),
]


@pytest.mark.parametrize("steps", ["even", "fixed"])
@pytest.mark.parametrize("kind", ["gaussian", "average"])
@pytest.mark.parametrize(("grid", "patch"), GRIDS)
def test_prediction_and_gradient_are_those_of_explicit_stitching(grid, patch, kind, steps):
    model = eg.from_module(network(len(grid), inputs=2))
    x, weight = drawn(2, *grid), drawn(2, *grid, key=1)
    ours = sliding_window(model, patch, 0.5, kind, steps=steps)
    begins = nnunet_starts if steps == "even" else monai_starts
    plain = lambda z: stitched(model, z, patch, 0.5, kind, begins)
    close(ours(x), plain(x))
    score = lambda f: lambda z: (weight * f(z)).sum().sin()
    close(eg.gradient(score(ours))(x), grad(score(plain))(x))


def test_a_map_of_weights_of_ones_own():
    model, x = eg.from_module(network(2)), drawn(1, 9, 8)
    w = importance((4, 6), "gaussian")
    a = sliding_window(model, (4, 6), weights=w)
    close(a(x), sliding_window(model, (4, 6))(x))
    clamped = w.clamp(min=0.2)
    ours = sliding_window(model, (4, 6), weights=clamped)
    total = norm = 0
    for i, j in itertools.product(nnunet_starts(9, 4, 0.5), nnunet_starts(8, 6, 0.5)):
        around = (j, 2 - j, i, 5 - i)
        total = total + torch.nn.functional.pad(clamped * model(x[:, i : i + 4, j : j + 6]), around)
        norm = norm + torch.nn.functional.pad(clamped, around)
    close(ours(x), total / norm)
    assert (ours(x) - a(x)).abs().max() > 1e-3


# ------------------------------------------------------------------ every transform

LETTERS = {
    "v": vmap,
    "r": jacrev,
    "f": jacfwd,
    "h": hessian,
    "j": lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1],
    "p": lambda f: lambda x: vjp(f, x)[1](torch.ones_like(f(x)).cumsum(-1))[0],
    "g": lambda f: grad(lambda x: f(x).sin().sum()),
}
WORDS = [
    "v",
    "r",
    "f",
    "h",
    "j",
    "p",
    "g",
    "vv",
    "vg",
    "gv",
    "gg",
    "vgg",
    "jg",
    "gj",
    "vjg",
    "pp",
    "rf",
    "vh",
    "vvg",
]


def plain_curve(x):
    """A model in plain torch, from (1,n) to (2,n), that depends on where in the patch it is."""
    place = torch.arange(x.shape[-1], dtype=x.dtype)
    return torch.cat([x * x.mean() + place * x.sin(), (x * x.flip(-1)).exp()])


@pytest.mark.parametrize("made", ["module", "plain"])
@pytest.mark.parametrize("word", WORDS)
def test_every_nest_is_that_of_explicit_stitching(word, made):
    model = eg.from_module(network(1)) if made == "module" else plain_curve
    ours, plain = sliding_window(model, 4), lambda x: stitched(model, x, (4,))
    depth = word.count("v")
    x = drawn(*(2, 3)[:depth], 1, 6)
    for letter in reversed(word):
        ours, plain = LETTERS[letter](ours), LETTERS[letter](plain)
    close(ours(x), plain(x), tolerance=1e-9)


def test_ordinary_autograd_and_its_second_derivative():
    model = eg.from_module(network(2))
    ours, plain = sliding_window(model, 4), lambda x: stitched(model, x, (4, 4))
    found = []
    for f in (ours, plain):
        x = drawn(1, 6, 7).requires_grad_()
        (g,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad((g * g.cos()).sum(), x)
        found.append((g.detach(), h))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


def test_an_unmapped_image_among_mapped_ones():
    ours = sliding_window(eg.from_module(network(1)), 4)
    xs, b = drawn(3, 1, 7), drawn(1, 7, key=1)
    both = vmap(grad(lambda a, b: (ours(a) * ours(b)).sum(), argnums=1), in_dims=(0, None))(xs, b)
    for a, g in zip(xs, both, strict=True):
        close(g, grad(lambda b, a=a: (ours(a) * ours(b)).sum())(b))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_tensors_of_enclosing_transforms_are_not_taken_for_patches(count):
    """Three patches; a model that reads a tensor of an enclosing map of as many, of more and of fewer."""
    x = drawn(1, 8)
    other = lambda b: sliding_window(lambda patch: patch * b, 4)(x).sum()
    refused = pytest.raises(
        ValueError, match=r"^sliding_window: expected a model that depends on its image alone, got"
    )
    with eg.execution(chunk=3):
        with refused:
            vmap(other)(drawn(count))
        with refused:
            vmap(vmap(other))(drawn(2, count))
        with refused:
            grad(other)(drawn(1)[0])
        with refused:
            vmap(grad(other))(drawn(count))
        with refused:
            grad(lambda b: vmap(lambda c: other(b + c))(drawn(count)).sum())(drawn(1)[0])
        with refused:  # also where the image itself is mapped
            vmap(lambda b, x: grad(lambda x: sliding_window(lambda p: p * b, 4)(x).sum())(x))(
                drawn(count), drawn(count, 1, 8)
            )
        fixed = torch.tensor(3.0, dtype=torch.float64)
        close(vmap(sliding_window(lambda p: p * fixed, 4))(drawn(count, 1, 8)), 3 * drawn(count, 1, 8))


# ------------------------------------------------------------------ methods


def scores(model, x, patch):
    """The same global score: of the streamed model, and of explicit stitching."""
    sizes = (patch,) * (x.ndim - 1)
    plain = lambda z: stitched(model, z, sizes)
    ours = sliding_window(model, patch)
    return [eg.reducers.predicted_class_sum(f, 1, at=x) for f in (ours, plain)]


METHODS = {
    "gradient": lambda s, x, b: eg.gradient(s)(x),
    "input_x_gradient": lambda s, x, b: eg.input_x_gradient(s)(x),
    "integrated_gradients": lambda s, x, b: eg.integrated_gradients(s, steps=5)(x, b),
    "smooth": lambda s, x, b: eg.smooth(eg.gradient(s), samples=3)(x, key=3),
    "expected_gradients": lambda s, x, b: eg.expected_gradients(s, samples=4)(
        x, torch.stack([b, x / 2]), key=1
    ),
    "guided_integrated_gradients": lambda s, x, b: eg.guided_integrated_gradients(s, steps=4)(x, b),
    "occlusion": lambda s, x, b: eg.occlusion(s, size=3, stride=2)(x, b),
    "rise": lambda s, x, b: eg.rise(s, cells=3, samples=6)(x, b, key=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_attributions_of_a_global_score_are_those_of_explicit_stitching(name):
    model, x = eg.from_module(network(2)), drawn(1, 8, 9)
    ours, plain = (METHODS[name](s, x, torch.zeros_like(x)) for s in scores(model, x, 4))
    assert ours.abs().max() > 0
    close(ours, plain, tolerance=1e-9)


def test_integrated_gradients_of_a_stitched_score_are_complete():
    model, x = eg.from_module(network(3)), drawn(1, 6, 5, 7)
    score = eg.reducers.predicted_class_sum(sliding_window(model, 4), 1, at=x)
    ig = eg.integrated_gradients(score, steps=32)
    baseline = x / 2
    residual = eg.axioms.completeness(ig, score)(x, baseline)
    assert residual.abs() < 1e-4 * (score(x) - score(baseline)).abs()


def test_batched_is_each_by_itself():
    model = eg.from_module(network(2))
    sw = sliding_window(model, 4)
    xs = drawn(3, 1, 7, 6)
    ig = eg.integrated_gradients(lambda x: sw(x)[1].sin().sum(), steps=3)
    many = eg.batched(ig)(xs, xs / 3)
    for x, a in zip(xs, many, strict=True):
        close(a, ig(x, x / 3))


def test_rewritten_models_are_stitched():
    net = (
        nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)).double().eval()
    )
    model, x = eg.from_module(net), drawn(1, 8, 7)
    guided = eg.rules.guided(model)
    ours = eg.gradient(lambda z: sliding_window(guided, 4)(z)[1].sum())(x)
    plain = grad(lambda z: stitched(guided, z, (4, 4))[1].sum())(x)
    close(ours, plain)
    assert (ours - eg.gradient(lambda z: sliding_window(model, 4)(z)[1].sum())(x)).abs().max() > 1e-3


# ------------------------------------------------------------------ when it is the whole image


def whole_and_stitched(net, x, patch, overlap, kind):
    model = eg.from_module(net)
    weight = drawn(*model(x).shape, key=5, dtype=x.dtype)
    out = []
    for f in (model, sliding_window(model, patch, overlap, kind)):
        score = lambda z, f=f: (weight * f(z)).sum()
        ig = eg.integrated_gradients(score, steps=3)
        out.append((f(x), eg.gradient(score)(x), ig(x, torch.zeros_like(x))))
    return zip(*out, strict=True)


def conv(axes, reach, classes=2, dtype=torch.float32):
    """Zero-padded convolutions that see ``reach`` elements to each side."""
    torch.manual_seed(2)
    layers = [CONV[axes](1 if i == 0 else 3, 3, 3, padding=1) for i in range(reach)]
    return (
        nn.Sequential(*(m for c in layers for m in (c, nn.ReLU())), CONV[axes](3, classes, 1))
        .to(dtype)
        .eval()
    )


class Strided(nn.Module):
    """Halved, doubled and joined again: covariant to shifts by two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.inner = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(3, 3, 2, stride=2), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x):
        skip = torch.relu(self.first(x))
        low = torch.relu(self.inner(torch.nn.functional.max_pool2d(skip, 2)))
        return self.last(torch.cat([self.up(low), skip], 1))


@pytest.mark.parametrize("kind", ["gaussian", "average", "centre"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_pointwise_networks_are_exact_with_any_weights(axes, kind):
    torch.manual_seed(0)
    net = nn.Sequential(CONV[axes](1, 4, 1), nn.Tanh(), CONV[axes](4, 2, 1)).eval()
    x = drawn(1, *(13, 10, 9)[:axes], dtype=torch.float32)
    for whole, ours in whole_and_stitched(net, x, 5, 0.3, kind):
        close(ours, whole, tolerance=1e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_centres_of_tiles_are_exact_where_neighbours_share_twice_the_reach(axes):
    x = drawn(1, *(27, 17, 14)[:axes], dtype=torch.float32)
    for whole, ours in whole_and_stitched(conv(axes, 2), x, 8, 0.5, "centre"):
        close(ours, whole, tolerance=1e-5)


def test_and_only_there():
    x = drawn(1, 27, 17, dtype=torch.float32)
    for whole, ours in whole_and_stitched(conv(2, 3), x, 8, 0.5, "centre"):  # 4 shared, 6 needed
        assert (ours - whole).abs().max() > 1e-3 * whole.abs().max()
    for whole, ours in whole_and_stitched(conv(2, 2), x, 8, 0.5, "gaussian"):
        assert (ours - whole).abs().max() > 1e-3 * whole.abs().max()


def test_strided_networks_are_exact_where_tiles_begin_at_multiples_of_the_period():
    net = Strided().eval()
    seen = eg.locality(eg.from_module(net), torch.zeros(1, 40, 40))
    reach = max(max(-low, high - 1) for axis in seen.reach for low, high in axis)
    assert seen.period == (2, 2)
    assert reach <= 6
    x = drawn(1, 40, 28, dtype=torch.float32)
    assert starts(40, 16, 0.75, "even") == [0, 4, 8, 12, 16, 20, 24]
    for whole, ours in whole_and_stitched(net, x, 16, 0.75, "centre"):
        close(ours, whole, tolerance=1e-5)
    odd = drawn(1, 38, 28, dtype=torch.float32)  # 3 or 4 steps of 3.67: some tiles begin at odd places
    assert any(s % 2 for s in starts(38, 16, 0.75, "even"))
    whole, ours = next(iter(whole_and_stitched(net, odd, 16, 0.75, "centre")))
    assert (ours - whole).abs().max() > 1e-3 * whole.abs().max()


# ------------------------------------------------------------------ how it is computed


def counted(net):
    """The same network, with the batch sizes that it has seen."""
    sizes = []

    def seen(batch):
        sizes.append(len(batch))
        return net(batch)

    return eg.from_module(seen), sizes


@pytest.mark.parametrize("chunk", [1, 2, 3, 64])
def test_chunks_change_nothing(chunk):
    net = network(2)
    model, sizes = counted(net)
    score = lambda f: lambda x: f(x)[1].sin().sum()
    x = drawn(1, 12, 12)
    free = eg.gradient(score(sliding_window(model, 4)))(x)
    sizes.clear()
    with eg.execution(chunk=chunk):
        close(eg.gradient(score(sliding_window(model, 4)))(x), free)
    assert max(sizes) == min(chunk, 25)


def test_several_patches_go_through_at_once_where_they_are_small():
    model, sizes = counted(network(2))
    sliding_window(model, 4)(drawn(1, 24, 24))
    assert max(sizes) > 50


def test_only_patches_that_the_score_reaches_run_back():
    model = eg.from_module(network(2))
    sw, x = sliding_window(model, 8, 0.5), drawn(1, 24, 24)  # 5 x 5 tiles, of which at most 4 hold a voxel
    pick = lambda f: lambda z: f(z)[1, 11, 18]
    sw(x)
    told = []
    with eg.execution(chunk=1, progress=lambda label, done: told.append(label)):
        ours = eg.gradient(pick(sw))(x)
    assert told.count("sliding_window") == 25
    assert told.count("gradient of sliding_window") == 4
    close(ours, grad(pick(lambda z: stitched(model, z, (8, 8))))(x))
    nothing = torch.func.vjp(sw, x)[1](torch.zeros(2, 24, 24, dtype=x.dtype))[0]
    assert nothing.shape == x.shape
    assert not nothing.any()


def test_memory_limits_how_many_go_together():
    model, sizes = counted(network(2))
    with eg.execution(memory="64 KiB"):
        sliding_window(model, 8)(drawn(1, 40, 40))
    assert 1 <= max(sizes) < 40


def peak(work):
    """Of live tensors, where nothing is left to the garbage collector: it comes by number, not by size."""
    gc.collect()
    gc.disable()
    try:
        with Live() as live:
            work()
    finally:
        gc.enable()
    return live.peak


@pytest.mark.slow
def test_memory_is_that_of_the_images_and_one_chunk():
    net = zoo.small_unet(3, classes=2)
    model = eg.from_module(net)
    short, long = drawn(1, 8, 8, 16, dtype=torch.float32), drawn(1, 8, 8, 64, dtype=torch.float32)
    sw = sliding_window(model, 8)
    explain = eg.gradient(eg.reducers.class_sum(sw, 1))
    plain = eg.gradient(eg.reducers.class_sum(model, 1))
    with eg.execution(chunk=1):
        few, many = peak(lambda: explain(short)), peak(lambda: explain(long))
        whole = peak(lambda: plain(long))
    image = 4 * long.numel()
    assert many - few < 10 * (image - 4 * short.numel())
    assert many < whole / 2
    several = eg.integrated_gradients(eg.reducers.class_sum(sw, 1), steps=4)
    with eg.execution(chunk=2):
        assert peak(lambda: several(long, torch.zeros_like(long))) < 2 * many + 10 * image


def test_a_dry_run_forecasts_it_from_the_first_patches():
    model, sizes = counted(zoo.small_unet(2, classes=2))
    explain = eg.gradient(eg.reducers.class_sum(sliding_window(model, 16), 1))
    x = drawn(1, 40, 40, dtype=torch.float32)
    with eg.execution(chunk=1):
        explain(x)  # finds out at its first batch whether examples go together
        real = peak(lambda: explain(x))
        sizes.clear()
        assert eg.forecast(explain, x) == pytest.approx(real, rel=0.02)
    assert len(sizes) < 10


def test_the_deadline_is_looked_at_between_patches():
    model, sizes = counted(network(2))
    sw = sliding_window(model, 4)
    sw(drawn(1, 4, 4))
    sizes.clear()
    with (
        eg.execution(deadline=0),
        pytest.raises(
            eg.DeadlineExceeded, match=r"sliding_window: the deadline passed after 0 of 25 patches"
        ),
    ):
        sw(drawn(1, 12, 12))
    assert not sizes
    late = lambda label, done: done < 0.3 or clock.append(done)
    clock = []
    with eg.execution(chunk=1, progress=late):
        sw(drawn(1, 12, 12))
    assert clock


def test_progress_moves_forth_and_back():
    sw = sliding_window(eg.from_module(network(2)), 4)
    told = []
    with eg.execution(chunk=5, progress=lambda label, done: told.append((label, done))):
        eg.gradient(lambda x: sw(x).sum())(drawn(1, 12, 12))
    fractions = [pytest.approx(k / 5) for k in range(1, 6)]
    assert [d for name, d in told if name == "sliding_window"] == fractions
    assert [d for name, d in told if name == "gradient of sliding_window"] == fractions


def test_derivatives_in_another_thread_keep_the_settings():
    model, sizes = counted(network(2))
    x = drawn(1, 12, 12).requires_grad_()
    told, found = [], []
    with eg.execution(chunk=3, progress=lambda label, done: told.append(label)):
        y = sliding_window(model, 4)(x).sum()
        sizes.clear()
        # As the autograd engine does on a GPU: the thread has none of this one's context.
        thread = threading.Thread(target=lambda: found.append(torch.autograd.grad(y, x)[0]))
        thread.start()
        thread.join()
    assert max(sizes) == 3
    assert "gradient of sliding_window" in told
    close(found[0], grad(lambda z: stitched(model, z, (4, 4)).sum())(x.detach()))


def test_reduced_precision_is_that_of_the_patches():
    model, x = eg.from_module(network(2).float()), drawn(1, 12, 12, dtype=torch.float32)
    explain = eg.gradient(lambda z: sliding_window(model, 4)(z)[1].sum())
    full = explain(x)
    with eg.execution(precision="bfloat16"):
        half = explain(x)
    assert half.dtype == torch.float32
    assert 1e-5 < (half - full).abs().max() / full.abs().max() < 0.1


def test_half_precision_images_are_summed_in_single():
    model = lambda patch: patch + 1
    x = torch.full((1, 12), 1000.0, dtype=torch.float16)
    y = sliding_window(model, 4, 0.75)(x)
    assert y.dtype == torch.float16
    close(y.double(), x.double() + 1, tolerance=1e-3)


def test_networks_that_take_one_at_a_time():
    coupled = eg.from_module(lambda batch: batch - batch.mean())
    x = drawn(1, 10)
    with pytest.warns(eg.ExecutionWarning, match="one at a time"):
        y = sliding_window(coupled, 4)(x)
    close(y, stitched(lambda p: p - p.mean(), x, (4,)))


def test_black_boxes_have_values():
    opaque = eg.from_module(lambda batch: torch.from_numpy(np.sin(batch.detach().numpy())))
    sw, x = sliding_window(opaque, 4), drawn(1, 9)
    close(sw(x), x.sin())
    with pytest.raises(NoGradient):
        eg.gradient(lambda z: sw(z).sum())(x)


def test_nothing_is_changed_and_copies_work():
    net = network(2)
    before = copy.deepcopy(net.state_dict())
    x = drawn(1, 9, 9)
    kept, state = x.clone(), torch.get_rng_state()
    sw = sliding_window(eg.from_module(net), 4)
    first = eg.gradient(lambda z: sw(z).sum())(x)
    assert torch.equal(first, eg.gradient(lambda z: sw(z).sum())(x))
    assert torch.equal(x, kept)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    close(copy.deepcopy(sw)(x), sw(x))


# ------------------------------------------------------------------ places, reach, local evaluation


def evaluations(run):
    return [e["evaluation"] for e in run.events if e["event"] == "evaluation"]


@pytest.mark.parametrize("weights", ["gaussian", "average", "centre"])
def test_a_local_change_runs_only_the_tiles_that_it_touches(weights):
    model, sizes = counted(zoo.small_unet(2, classes=2).double())
    x = drawn(1, 80, 64)
    sw = sliding_window(model, 16, 0.5, weights)
    score = eg.reducers.predicted_class_sum(sw, 1, at=x)
    explain = lambda: eg.occlusion(score, size=16, stride=16)(x, x / 3)
    sizes.clear()
    with eg.execution(evaluation="windows") as run:  # too small to be worth it
        ours = explain()
    assert evaluations(run) == ["windows"]
    few = sum(sizes)
    sizes.clear()
    with eg.execution(evaluation="whole"):
        whole = explain()
    close(ours, whole)
    assert few < 0.5 * sum(sizes)


def test_changes_that_stay_are_followed_through_the_tiles():
    model = eg.from_module(zoo.small_unet(2, classes=2).double())
    x = drawn(2, 64, 48)[:1]
    score = eg.reducers.class_sum(sliding_window(model, 16, 0.5), 1)
    explain = lambda: eg.shapley_sampling(score, features=eg.features.grid((16, 16)), samples=2)(
        x, x / 3, key=1
    )
    with eg.execution(evaluation="windows"):
        ours = explain()
    with eg.execution(evaluation="whole"):
        close(ours, explain())


def test_where_a_change_touches_everything_whole_images_are_run():
    model, x = eg.from_module(zoo.small_unet(2, classes=2)), drawn(1, 24, 24, dtype=torch.float32)
    score = eg.reducers.class_sum(sliding_window(model, 16), 1)
    with eg.execution() as run:
        ours = eg.occlusion(score, size=6, stride=6)(x, torch.zeros_like(x))
    assert evaluations(run) == ["whole"]
    for i, j in itertools.product(range(0, 24, 6), repeat=2):
        hidden = x.clone()
        hidden[:, i : i + 6, j : j + 6] = 0
        close(ours[0, i, j], score(x) - score(hidden), tolerance=1e-3)
    small = eg.reducers.class_sum(sliding_window(model, 32), 1)  # zeros around the image
    with (
        eg.execution(evaluation="windows"),
        pytest.raises(ValueError, match=r"got one that cannot: .*an image smaller than the patch"),
    ):
        eg.occlusion(small, size=6, stride=6)(x, torch.zeros_like(x))


def test_it_has_no_reach_of_its_own():
    sw = sliding_window(eg.from_module(conv(2, 1)), 8)
    x = torch.zeros(1, 24, 24)
    for score in (lambda z: sw(z).sum(), sw):
        with pytest.raises(ValueError, match=r"locality: .*got a sliding window's reach depends on where"):
            eg.locality(score, x)


# ------------------------------------------------------------------ layers


def deep_network(stride=1, smooth=False):
    """Two convolutions with a pool of that stride between them, brought back to the grid: it sees two pools far."""
    torch.manual_seed(4)
    bend, shrink = (nn.GELU, nn.AvgPool2d) if smooth else (nn.ReLU, nn.MaxPool2d)
    pool = (shrink(stride), nn.Upsample(scale_factor=stride)) if stride > 1 else (nn.Identity(),) * 2
    layers = nn.Conv2d(1, 3, 3, padding=1), bend(), pool[0], nn.Conv2d(3, 4, 1), bend(), pool[1]
    return eg.from_module(nn.Sequential(*layers, nn.Conv2d(4, 2, 3, padding=1)).double().eval())


LAYERS = {
    "grad_cam": lambda score, x, x0: eg.grad_cam(score, "4")(x),
    "grad_cam_plus_plus": lambda score, x, x0: eg.grad_cam_plus_plus(score, "4")(x),
    "layer_cam, hires_cam": lambda score, x, x0: eg.layer_cam(score, "4")(x) + eg.hires_cam(score, "4")(x),
    "two places": lambda score, x, x0: eg.grad_cam(score, ["1", "4"])(x)[1],
    "layer_gradient": lambda score, x, x0: eg.layer_gradient(score, "4")(x),
    "eigen_cam": lambda score, x, x0: eg.eigen_cam(score, "4")(x),
    "guided_grad_cam": lambda score, x, x0: eg.guided_grad_cam(lambda z: -score(z), "4")(x),
    "excitation_backprop": lambda score, x, x0: eg.excitation_backprop(score, "4")(x),
    "contrastive": lambda score, x, x0: eg.contrastive_excitation_backprop(score, "4")(x),
    "conductance": lambda score, x, x0: eg.conductance(score, "4", steps=4)(x, x0),
}
# Sums over all of a mask, and a curved reducer.
QUESTIONS = (
    lambda f: eg.reducers.class_sum(f, 1),
    lambda f: lambda z: f(z).softmax(0)[1].square().sum(),
)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_a_stitched_score_are_those_of_the_whole_where_tiles_change_nothing(name):
    for stride, patch in ((1, (10, 8)), (2, (12, 8))):
        model, x, x0 = deep_network(stride), drawn(1, 20, 8), drawn(1, 20, 8, key=2)
        tilings = [sliding_window(model, (20, 8)), sliding_window(model, patch, 0.5, "centre", steps="fixed")]
        for question in QUESTIONS:
            whole = LAYERS[name](question(model), x, x0)
            assert whole.abs().max() > 1e-4
            for tiled in tilings:
                found = LAYERS[name](question(tiled), x, x0)
                if name == "guided_grad_cam" and tiled is tilings[1]:  # the guided part clips in every patch
                    found, whole = (a[:, [*range(4), *range(16, 20)]] for a in (found, whole))
                close(found, whole, tolerance=1e-9)


def test_channel_weights_are_those_of_all_patches_together():
    """By plain loops: gradients of all tiles added up, activations as answers are stitched, one set of weights."""
    model, x, weight = deep_network(), drawn(1, 11, 9), drawn(2, 11, 9, key=5)
    score = lambda z: (weight * sliding_window(model, 6)(z).tanh()).sum()
    y = stitched(model, x, (6, 6)).requires_grad_()
    (cotangent,) = torch.autograd.grad((weight * y.tanh()).sum(), y)
    trunk = eg.tap(model, "4")
    inside = eg.replace(model, "4")
    boxes = [
        (slice(i, i + 6), slice(j, j + 6))
        for i in nnunet_starts(11, 6, 0.5)
        for j in nnunet_starts(9, 6, 0.5)
    ]
    total = torch.zeros(11, 9, dtype=x.dtype)
    for box in boxes:
        total[box] += importance((6, 6), "gaussian")
    a, g = torch.zeros(4, 11, 9, dtype=x.dtype), torch.zeros(4, 11, 9, dtype=x.dtype)
    for box in boxes:
        here = (slice(None), *box)
        share = importance((6, 6), "gaussian") / total[box]
        z = trunk(x[here]).detach().requires_grad_()
        (slope,) = torch.autograd.grad((share * cotangent[here] * inside(x[here], z)).sum(), z)
        a[here] += share * z.detach()
        g[here] += slope
    close(
        eg.grad_cam(score, "4")(x), (g.mean((1, 2))[:, None, None] * a).sum(0, keepdim=True), tolerance=1e-9
    )
    close(eg.layer_cam(score, "4")(x), (g.clamp(min=0) * a).sum(0, keepdim=True), tolerance=1e-9)
    assert eg.layer_activation(score, "4")(x).shape == (4, 11, 9)


@pytest.mark.parametrize("weights", ["gaussian", "centre"])
def test_conductance_of_a_stitched_score_is_complete(weights):
    """Also where tiles disagree, and where they begin between the units of a layer of stride 2."""
    x, x0 = drawn(1, 13, 9), drawn(1, 13, 9, key=2)
    score = QUESTIONS[1](sliding_window(deep_network(2, smooth=True), 6, weights=weights))
    change = score(x) - score(x0)
    for place, shape in (("2", (3, 7, 5)), ("1", (3, 13, 9))):  # the pooled layer, and the one below
        found = eg.conductance(score, place, steps=8)(x, x0)
        assert found.shape == shape
        torch.testing.assert_close(found.sum(), change, rtol=1e-4, atol=0)
    both = eg.conductance(score, ["2", "4"], steps=4)(x, x0)  # each varied while the other stays
    assert [tuple(a.shape) for a in both] == [(3, 7, 5), (4, 7, 5)]


def test_conductance_of_a_linear_stitched_score_is_gradient_times_difference():
    torch.manual_seed(5)
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
    tiled = sliding_window(eg.from_module(nn.Sequential(*layers).double()), 6)
    weight, x, x0 = drawn(2, 11, 9, key=5), drawn(1, 11, 9), drawn(1, 11, 9, key=2)
    score = lambda z: (weight * tiled(z)).sum()
    found = eg.conductance(score, "0", steps=2)(x, x0)
    torch.testing.assert_close(found.sum(), score(x) - score(x0))
    # Linear in the image, and from no image nothing comes.
    parts = eg.conductance(score, "0", steps=2)(x, 0 * x) - eg.conductance(score, "0", steps=2)(x0, 0 * x)
    close(found, parts, tolerance=1e-9)


@pytest.mark.parametrize("stride", [1, 2])
def test_one_walk_goes_through_all_patches(stride):
    torch.manual_seed(6)
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(stride), nn.Conv2d(3, 4, 1), nn.ReLU()
    net = nn.Sequential(*layers, nn.Upsample(scale_factor=stride), nn.Conv2d(4, 2, 1)).double().eval()
    for p in net.parameters():
        p.data.abs_()
    tiled = sliding_window(eg.from_module(net), 6)
    x = drawn(1, 13, 9).abs()
    for question in QUESTIONS:
        found = eg.excitation_backprop(question(tiled), "2")(x)
        assert found.shape == (1, -(-13 // stride), -(-9 // stride))
        torch.testing.assert_close(found.sum(), x.new_tensor(1.0))
        assert found.min() >= 0


def test_layers_of_stitched_scores_are_batched_and_chunked():
    score = QUESTIONS[1](sliding_window(deep_network(2), 6))
    xs, zeros = drawn(2, 1, 9, 6), torch.zeros(2, 1, 9, 6, dtype=torch.float64)
    explanations = (
        (eg.grad_cam(score, "4"), (xs,)),
        (eg.excitation_backprop(score, "4"), (xs,)),
        (eg.conductance(score, "4", steps=2), (xs, zeros)),
    )
    for explain, given in explanations:
        with eg.execution(chunk=1):
            each = torch.stack([explain(*one) for one in zip(*given, strict=True)])
        close(vmap(explain)(*given), each, tolerance=1e-9)


def test_what_needs_activations_of_the_whole_image_is_refused():
    model = eg.from_module(conv(2, 1))
    tiled = sliding_window(model, 8)
    score, x = eg.reducers.class_sum(tiled, 1), drawn(1, 16, 16, dtype=torch.float32)
    inside = "sliding_window: expected a score whose inside is left alone, .* none of the whole image"
    flat = sliding_window(lambda p: p * eg.mark(p.mean((1, 2)), "mean").sum(), 8)
    vectors = "expected a layer with feature maps .* got an activation of shape \\(1,\\) at 'mean'"
    twice = (
        "grad_cam: expected a score that stitches one answer, .*, which stitches 2. Put what is done several"
    )
    small = r"expected an image of at least \(8, 8\), one patch, .*, got \(16, 6\). Put it into zeros"
    turned = "excitation: expected a network without tiles: .* esegeta.excitation_backprop"
    mixed = lambda z: torch.nn.functional.linear(tiled(z).flatten(), torch.ones(1, 512)).sum()
    after = (
        "expected a stitched score whose last convolution or linear map is one of the network of the patches"
    )
    for explain, text in (
        (lambda: eg.places(score, x), inside),
        (lambda: eg.split(score, "0", at=x)[0](x), inside),
        (lambda: eg.at(eg.gradient, "0")(score)(x), inside),
        (lambda: eg.grad_cam(eg.rules.lrp(score), "0")(x), inside),
        (lambda: eg.ablation_cam(score, "0")(x), inside),
        (lambda: eg.grad_cam(eg.reducers.class_sum(flat, 0), "mean")(x), vectors),
        (lambda: eg.grad_cam(lambda z: (tiled(z) + tiled(z.flip(1))).sum(), "0")(x), twice),
        (lambda: eg.grad_cam(score, "0")(x[:, :, :6]), small),
        (lambda: eg.gradient(eg.rules.excitation(score))(x), turned),
        (lambda: eg.excitation_backprop(mixed, "0")(x), after),
    ):
        with pytest.raises(ValueError, match=text):
            explain()
    with pytest.raises(
        NotImplementedError, match="expected maps of layers that are looked at, got a derivative"
    ):
        grad(lambda z: eg.grad_cam(score, "0")(z).sum())(x)


RULED = {
    "guided": lambda score, x, x0: eg.guided_backprop(score)(x),
    "deconvolution": lambda score, x, x0: eg.deconvolution(score)(x),
    "deep_lift": lambda score, x, x0: eg.deep_lift(score)(x, x0),
    "lrp": lambda score, x, x0: eg.lrp(score)(x),
    "lrp by depth": lambda score, x, x0: eg.lrp(score, composite="epsilon_plus_flat")(x),
}
RULES = {
    "guided": lambda model, x0: eg.rules.guided(model),
    "deconvolution": lambda model, x0: eg.rules.deconvnet(model),
    "deep_lift": eg.rules.deeplift,
    "lrp": lambda model, x0: eg.rules.lrp(model, "epsilon"),
    "lrp by depth": lambda model, x0: eg.rules.lrp(model, "epsilon_plus_flat"),
}


def ruled_network():
    torch.manual_seed(3)
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)
    return eg.from_module(nn.Sequential(*layers).double().eval())


@pytest.mark.parametrize("name", RULED)
def test_rules_of_a_stitched_score_are_those_of_every_patch_added_up(name):
    model, x, x0 = ruled_network(), drawn(1, 10, 9), drawn(1, 10, 9, key=2)
    weight = drawn(2, 10, 9, key=5)
    patch = (6, 6)
    tiled = sliding_window(model, patch)
    found = RULED[name](lambda z: (weight * tiled(z)).sum(), x, x0)
    slow = torch.zeros_like(x)
    total = torch.zeros(10, 9, dtype=x.dtype)
    boxes = [
        (slice(i, i + 6), slice(j, j + 6))
        for i in nnunet_starts(10, 6, 0.5)
        for j in nnunet_starts(9, 6, 0.5)
    ]
    for box in boxes:
        total[box] += importance(patch, "gaussian")
    for box in boxes:
        here = (slice(None), *box)
        pull = vjp(RULES[name](model, x0[here]), x[here])[1]
        slow[here] += pull(weight[here] * importance(patch, "gaussian") / total[box])[0]
    factor = {"deep_lift": x - x0, "lrp": x, "lrp by depth": x}.get(name, 1)
    close(found, factor * slow, tolerance=1e-9)
    if name == "deep_lift":
        change = (weight * (tiled(x) - tiled(x0))).sum()
        torch.testing.assert_close(found.sum(), change)


@pytest.mark.parametrize("name", RULED)
def test_rules_of_a_stitched_score_are_those_of_the_whole_where_tiles_share_twice_the_reach(name):
    model, x, x0 = ruled_network(), drawn(1, 20, 9), drawn(1, 20, 9, key=2)
    tiled = sliding_window(model, (10, 9), 0.5, "centre")
    found = [RULED[name](eg.reducers.class_sum(f, 1), x, x0) for f in (model, tiled)]
    if name in ("guided", "deconvolution"):
        # They clip what comes back, in each patch what comes from there: where outputs of two tiles reach, which is
        # within twice the reach of the seams in the middle of what tiles share, that is not the whole's.
        interior = [i for i in range(20) if min(abs(i - 7), abs(i - 12)) > 2]
        assert (found[0] - found[1]).abs().max() > 1e-3
        found = [a[:, interior] for a in found]
    close(*found, tolerance=1e-9)
    assert found[0].abs().max() > 0.01


def test_rules_go_on_in_what_is_made_of_a_stitched_answer():
    model, x, x0 = ruled_network(), drawn(1, 10, 9), drawn(1, 10, 9, key=2)
    tiled = sliding_window(model, 6)
    score = lambda z: tiled(z).softmax(0)[1].sum()
    torch.testing.assert_close(eg.deep_lift(score)(x, x0).sum(), score(x) - score(x0))
    batch, many = torch.stack([x, x0]), torch.stack([x0, 0 * x])
    close(eg.batched(eg.deep_lift(score))(batch, many)[1], eg.deep_lift(score)(x0, 0 * x), tolerance=1e-9)
    # Without anything to rewrite it is refused, as for a whole network.
    flat = sliding_window(eg.from_module(nn.Conv2d(1, 2, 3, padding=1)), 8)
    with pytest.raises(ValueError, match="expected a network with at least one of the operations"):
        eg.guided_backprop(eg.reducers.class_sum(flat, 1))(drawn(1, 16, 16, dtype=torch.float32))


# ------------------------------------------------------------------ errors

SAY = [
    (lambda: sliding_window(3, 8), TypeError, "expected a model: a function of one example, got int 3"),
    (
        lambda: sliding_window(abs, 4.5),
        TypeError,
        "expected patch to be one size or one for each axis, got 4.5",
    ),
    (lambda: sliding_window(abs, 0), ValueError, "expected patch to be an int >= 1, got 0"),
    (
        lambda: sliding_window(abs, (4, 0)),
        ValueError,
        "expected every size of patch to be an int >= 1, got 0",
    ),
    (lambda: sliding_window(abs, 4, 1), ValueError, r"expected overlap in \[0, 1\), got 1"),
    (lambda: sliding_window(abs, 4, -0.1), ValueError, r"expected overlap in \[0, 1\), got -0.1"),
    (
        lambda: sliding_window(abs, 4, weights="gauss"),
        ValueError,
        "expected weights to be one of gaussian, average",
    ),
    (
        lambda: sliding_window(abs, 4, steps="some"),
        ValueError,
        "expected steps to be one of even, fixed, got 'some'",
    ),
    (
        lambda: sliding_window(abs, 4, weights=torch.ones(4)),
        ValueError,
        "expected a map of weights of the size of the patch, 4, got",
    ),
    (
        lambda: sliding_window(abs, (4,), weights=torch.zeros(4)),
        ValueError,
        "expected weights that are positive numbers",
    ),
    (
        lambda: sliding_window(abs, 4)(torch.ones(4)),
        ValueError,
        r"expected an image \(C,\*S\) with 1 to 3 axes S, got float32\(4,\)",
    ),
    (
        lambda: sliding_window(abs, (4, 4))(torch.ones(1, 4)),
        ValueError,
        r"expected a patch of 1 sizes for an image \(1, 4\), got \(4, 4\)",
    ),
    (
        lambda: sliding_window(abs, 4)(torch.ones(1, 4, dtype=torch.int64)),
        TypeError,
        r"expected the image of a floating dtype, got int64\(1, 4\)",
    ),
    (
        lambda: sliding_window(lambda p: p[:, ::2], 4)(torch.ones(1, 8)),
        ValueError,
        r"expected a model whose output \(K,\*S\) lies on the grid \(4,\) of its patch, got float32\(1, 2\) from <la",
    ),
    (
        lambda: sliding_window(lambda p: p.sum(), 4)(torch.ones(1, 8)),
        ValueError,
        r"expected a model whose output \(K,\*S\) lies on the grid \(4,\) of its patch, got float32\(\)",
    ),
]


@pytest.fixture
def as_users_run_it():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("call", "kind", "text"), SAY, ids=range(len(SAY)))
def test_errors_say_what_to_do(call, kind, text):
    with pytest.raises(kind, match=f"^sliding_window: {text}"):
        call()


# ------------------------------------------------------------------ patches by themselves


def test_patchwise_is_the_mean_of_what_explains_each_patch():
    model, x, b = eg.from_module(network(2)), drawn(1, 9, 8), drawn(1, 9, 8, key=4)
    build = lambda p: eg.integrated_gradients(eg.reducers.predicted_class_sum(model, 1, at=p), steps=3)
    ours = patchwise(build, 4)(x, b)
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    for i, j in itertools.product(nnunet_starts(9, 4, 0.5), nnunet_starts(8, 4, 0.5)):
        box = (slice(None), slice(i, i + 4), slice(j, j + 4))
        total[box] += build(x[box])(x[box], b[box])
        count[box] += 1
    close(ours, total / count)


def test_patchwise_is_not_what_explains_the_whole_image():
    """Constant weights make it plain: every patch asks a question of its own, and answers differ in number."""
    model, x = (lambda p: p**2), drawn(1, 12).abs() + 1
    whole = eg.integrated_gradients(eg.reducers.class_mean(sliding_window(model, 4), 1, of="logits"), steps=8)
    each = patchwise(
        lambda p: eg.integrated_gradients(eg.reducers.class_mean(model, 1, of="logits"), steps=8), 4, 0.5
    )
    zero = torch.zeros_like(x)
    score = model(x).mean()
    close(whole(x, zero).sum(), score)  # complete, as integrated gradients are
    # Each patch's mean counts every voxel 12 / 4 times as much as the mean of the image does.
    close(each(x, zero), 3 * whole(x, zero))
    # And maps of different sizes of patches are maps of different questions.
    other = patchwise(
        lambda p: eg.integrated_gradients(eg.reducers.class_mean(model, 1, of="logits"), steps=8), 6, 0.5
    )
    assert (other(x, zero) - each(x, zero)).abs().max() > 0.1 * each(x, zero).abs().max()


def test_the_mask_of_a_patch_is_not_the_mask_of_the_image():
    model, x = eg.from_module(network(2)), drawn(1, 12, 12)
    exact = eg.gradient(eg.reducers.predicted_class_sum(sliding_window(model, 6), 1, at=x))(x)
    build = lambda p: eg.gradient(eg.reducers.predicted_class_sum(model, 1, at=p))
    rough = patchwise(build, 6)(x)
    cosine = (exact * rough).sum() / (exact.norm() * rough.norm())
    assert (rough - exact).abs().max() > 0.1 * exact.abs().max()
    assert cosine < 0.99


def test_patchwise_cuts_stacks_of_references_and_gives_each_patch_a_key():
    model, x = eg.from_module(network(1)), drawn(1, 9)
    stack = drawn(5, 1, 9, key=1)
    build = lambda p: eg.expected_gradients(lambda z: model(z)[1].sin().sum(), samples=3)
    ours = patchwise(build, 4)(x, stack, key=7)
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    for i, begin in enumerate(nnunet_starts(9, 4, 0.5)):
        box = (..., slice(begin, begin + 4))
        total[box] += build(None)(x[box], stack[box], key=eg.random.fold_in(7, i))
        count[box] += 1
    close(ours, total / count)
    with pytest.raises(TypeError, match="patchwise: expected key="):
        patchwise(build, 4)(x, stack)


def test_patchwise_leaves_out_patches_with_nothing_to_explain():
    x = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0]], dtype=torch.float64)
    build = lambda p: eg.gradient(lambda z: z.sum()) if p.amin() > 0 else None
    assert patchwise(build, 2, 0)(x[:, :4]).tolist() == [[1, 1, 0, 0]]
    assert patchwise(lambda p: None, 2, 0)(x).tolist() == [[0] * 5]
    assert patchwise(build, 8)(x.abs()).tolist() == [
        [0] * 5
    ]  # zeros around a small image belong to the patch


def test_patchwise_under_vmap():
    build = lambda p: eg.gradient(lambda z: (z**3).sum() * p.sum())
    xs = drawn(3, 1, 7)
    explain = patchwise(build, 4, weights="gaussian")
    for x, a in zip(xs, eg.batched(explain)(xs), strict=True):
        close(a, explain(x))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda x: patchwise(lambda p: lambda z: z.sum(), 4)(x), ValueError, "an explanation on the grid"),
        (lambda x: patchwise(lambda p: lambda z, b: z, 4)(x, x[:, :3]), ValueError, "references on the grid"),
        (lambda x: patchwise(lambda p: lambda z: z, 4, 2)(x), ValueError, "overlap in"),
        (lambda x: patchwise(lambda p: lambda z: z, 4)(x * torch.nan), ValueError, "finite values in x"),
    ],
)
def test_patchwise_says_what_is_wrong(call, kind, text):
    with pytest.raises(kind, match=f"^patchwise: expected {text}"):
        call(drawn(1, 9))


# ------------------------------------------------------------------ peers and size


@pytest.mark.peers
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.7])
@pytest.mark.parametrize("grid", [(20, 24, 16), (21, 9, 30), (10, 10, 10)])
def test_monai_predicts_the_same(grid, overlap):
    inferers = pytest.importorskip("monai.inferers")
    utils = pytest.importorskip("monai.data.utils")
    net, x = zoo.small_unet(3, classes=3), drawn(1, *grid, dtype=torch.float32)
    patch = (12, 8, 12)
    model = eg.from_module(net)
    theirs = lambda **how: inferers.sliding_window_inference(x[None], patch, 3, net, overlap=overlap, **how)[
        0
    ]
    ours = lambda weights: sliding_window(model, patch, overlap, weights, steps="fixed")(x)
    with torch.no_grad():
        close(ours("average"), theirs(mode="constant"), tolerance=1e-5)
        gaussian = importance(patch, "gaussian").float()
        close(ours("gaussian"), theirs(roi_weight_map=gaussian), tolerance=1e-5)
        own = utils.compute_importance_map(patch, mode="gaussian")  # another centre, and never below 0.001
        close(ours(own), theirs(mode="gaussian"), tolerance=1e-5)


CHILD = """
import sys, torch, esegeta as eg
from esegeta import zoo
from esegeta.run.executors.child import peak
side, patch = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
model = eg.from_module(zoo.brain_extraction_unet())
x = zoo.head().data.repeat(1, 2, 2, 2)[:, :side, :side, :side].contiguous()
sw = eg.models.sliding_window(model, patch, overlap=0.25)
score = eg.reducers.predicted_class_sum(sw, 1, at=x)
a = eg.gradient(score)(x)
assert a.shape == x.shape and bool(a.isfinite().all()) and bool(a.any())
print(peak())  # ru_maxrss would count what this process was started from
"""


def resident(side, patch):
    command = [sys.executable, "-c", CHILD, str(side), str(patch)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    return int(out.stdout)


@pytest.mark.slow
def test_the_real_network_on_a_large_volume_stays_small():
    """What 160 voxels a side take more than 96 is the images themselves, a dozen of them, and no activations."""
    small, large = resident(96, 64), resident(160, 64)
    images = 4 * (160**3 - 96**3)
    assert large < 1.5 * 2**30
    assert large - small < 12 * images + 64 * 2**20
