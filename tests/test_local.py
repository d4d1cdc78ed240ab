"""Local evaluation as its callers see it: which way is taken, that all say the same, and how far a net sees."""

import functools
import itertools

import numpy as np
import pytest
import rounding
import torch
from torch import nn

import esegeta as eg
from esegeta import coalitions, features, zoo
from esegeta.engine import local
from esegeta.engine.execution import Execution
from esegeta.engine.locality import Locality

close = functools.partial(rounding.close, tolerance=1e-10, least=0)

WAYS = ("windows", "crops", "whole")


class Down(nn.Module):
    """Two levels with a skip, wide enough to be worth it, of any number of axes."""

    def __init__(self, axes, width=6, channels=1):
        super().__init__()
        conv, up = getattr(nn, f"Conv{axes}d"), getattr(nn, f"ConvTranspose{axes}d")
        pool, norm = getattr(nn, f"MaxPool{axes}d"), getattr(nn, f"BatchNorm{axes}d")
        self.first = nn.Sequential(conv(channels, width, 3, padding=1), norm(width), nn.ReLU(inplace=True))
        self.inner = nn.Sequential(pool(2), conv(width, 2 * width, 3, padding=1), nn.LeakyReLU(0.1))
        self.up, self.out = up(2 * width, width, 2, 2), conv(2 * width, 2, 3, padding=1)

    def forward(self, x):
        skip = self.first(x)
        return self.out(torch.cat([self.up(self.inner(skip)), skip], 1))


def net(axes, dtype=torch.float64, channels=1):
    torch.manual_seed(axes)
    return Down(axes, channels=channels).to(dtype).eval()


def task(axes, n, dtype=torch.float64, channels=1):
    model = eg.from_module(net(axes, dtype, channels))
    x = eg.random.normal(axes, (channels, *[n] * axes), dtype=dtype)
    return eg.reducers.class_sum(model, 1), x, eg.random.normal(7, tuple(x.shape), dtype=dtype)


def by(way, run, **settings):
    with eg.execution(evaluation=way, **settings) as seen:
        out = run()
    return out, [e for e in seen.events if e["event"] == "evaluation"]


def corner(x, n):
    """A mask of the first voxels along every axis."""
    mask = torch.zeros(x.shape[1:], dtype=torch.bool)
    mask[(slice(0, n),) * mask.ndim] = True
    return mask


# --- Every way says the same ------------------------------------------------------------------------------


@pytest.mark.parametrize(("axes", "n"), [(1, 64), (2, 36), pytest.param(3, 20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["windows", "crops"])
def test_occlusion_is_the_same_by_every_way(axes, n, way):
    score, x, baseline = task(axes, n)
    explain = eg.occlusion(score, size=4, stride=3)
    whole, _ = by("whole", lambda: explain(x, baseline))
    here, events = by(way, lambda: explain(x, baseline))
    close(here, whole)
    assert [e["evaluation"] for e in events] == [way]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["windows", "crops"])
def test_float32_is_within_a_hundred_thousandth_of_the_score(way):
    score, x, baseline = task(3, 24, torch.float32)
    explain = eg.occlusion(score, size=4, stride=4)
    whole, _ = by("whole", lambda: explain(x, baseline))
    here, _ = by(way, lambda: explain(x, baseline))
    assert (here - whole).abs().max() <= 1e-5 * score(x).abs()


def test_windows_are_nearer_to_double_precision_than_whole_evaluations():
    # A small difference of two large sums: in single precision most of its digits are gone.
    score, x, baseline = task(2, 48, torch.float32)
    exact_score = eg.reducers.class_sum(eg.from_module(net(2)), 1)
    sparse = {"features": features.within(features.windows(2), corner(x, 12))}
    exact = eg.feature_ablation(exact_score, **sparse)(x.double(), baseline.double())
    off = {
        way: (by(way, lambda: eg.feature_ablation(score, **sparse)(x, baseline))[0] - exact).abs().max()
        for way in ("windows", "whole")
    }
    assert off["windows"] < off["whole"]


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_change_nothing(chunk):
    score, x, baseline = task(2, 32)
    run = lambda: eg.occlusion(score, size=5, stride=3)(x, baseline)
    close(by("windows", run, chunk=chunk)[0], by("windows", run)[0], tolerance=1e-12)


@pytest.mark.parametrize(
    "parts",
    [
        features.grid((5, 7)),
        features.labels(torch.arange(36 * 36).reshape(36, 36) // 100),
        features.within(features.grid(6), torch.arange(36 * 36).reshape(36, 36) % 36 < 9),
        features.windows(6, stride=4, fade=0.3),
        features.windows(6, stride=4, separate=True),
        features.supervoxels(9),
        features.channels(),
    ],
)
def test_ablation_of_any_parts_is_the_same_by_windows(parts):
    score, x, baseline = task(2, 36, channels=2)
    explain = eg.feature_ablation(score, features=parts)
    close(by("windows", lambda: explain(x, baseline))[0], by("whole", lambda: explain(x, baseline))[0])


def test_a_part_without_elements_loses_nothing():
    score, x, baseline = task(2, 32)
    parts = features.segments(lambda x: (torch.arange(32)[:, None] >= 16).long().expand(32, 32) * 2, 4)
    drops = by("windows", lambda: coalitions.drops(score, x, baseline, parts(x), label="test"))[0]
    assert drops[1] == drops[3] == 0
    assert drops[0] != 0


# --- Walks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_walks_are_the_same_by_windows(axes):
    score, x, baseline = task(axes, 24)
    parts = features.grid(24 if axes == 1 else 12)(x)
    orders = torch.stack([torch.arange(parts.count), torch.arange(parts.count).flip(0)])
    run = lambda: coalitions.walks(score, x, baseline, parts, orders, label="test")
    here, events = by("windows", run)
    close(here, by("whole", run)[0])
    assert events[0]["evaluation"] == "windows"


def test_a_walk_of_overlapping_windows_is_the_same():
    score, x, baseline = task(2, 24)
    parts = features.windows(12, stride=4)(x)
    orders = torch.randperm(parts.count, generator=torch.Generator().manual_seed(1))[None]
    run = lambda: coalitions.walks(score, x, baseline, parts, orders, label="test")
    close(by("windows", run)[0], by("whole", run)[0])


def test_shapley_values_are_complete_by_windows_with_one_sample():
    score, x, baseline = task(2, 24)
    parts = features.grid(6)
    explain = eg.shapley_sampling(score, features=parts, samples=1)
    here, _ = by("windows", lambda: explain(x, baseline, key=3))
    close(here, by("whole", lambda: explain(x, baseline, key=3))[0])
    each = here[0, ::6, ::6]
    assert torch.isclose(each.sum(), score(x) - score(baseline), rtol=1e-10)


def passing_after(looks, monkeypatch):
    """A deadline that has passed when it is looked at for the so-manieth time, whatever the machine."""
    left = iter([1.0] * looks)
    monkeypatch.setattr(Execution, "left", lambda self: next(left, 0.0))


def test_a_walk_that_is_cut_off_returns_what_it_has(monkeypatch):
    score, x, baseline = task(2, 24)
    parts = features.grid(2)(x)
    orders = torch.arange(parts.count)[None]
    passing_after(5, monkeypatch)
    with (
        eg.execution(evaluation="windows"),
        pytest.warns(eg.ExecutionWarning, match="deadline"),
    ):
        some = coalitions.walks(score, x, baseline, parts, orders, label="test")
    assert 1 <= some.shape[1] < parts.count + 1


# --- Which way is taken -----------------------------------------------------------------------------------


def test_the_cheapest_exact_way_is_taken_and_reported():
    score, x, baseline = task(3, 48, torch.float32)
    with eg.execution() as seen:
        eg.occlusion(score, size=12)(x, baseline)
    (event,) = seen.events
    assert event["evaluation"] == "windows"
    assert event["share"] < 0.3


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Conv2d(1, 2, 3, padding=1), "so small"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.InstanceNorm2d(64), nn.Conv2d(64, 2, 1)),
            "reach",
        ),
    ],
)
def test_whole_evaluations_are_taken_where_they_are_as_cheap(make, why):
    torch.manual_seed(0)
    score = eg.reducers.class_sum(eg.from_module(make().eval()), 1)
    x = eg.random.normal(0, (1, 96, 96))
    with eg.execution() as seen:
        eg.occlusion(score, size=24)(x, torch.zeros_like(x))
    (event,) = seen.events
    assert event["evaluation"] == "whole"
    assert why in event["why"]


class Opaque(nn.Module):
    """What dispatch cannot see into: through numpy and back."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.from_numpy(self.inner(torch.from_numpy(x.detach().numpy().copy())).detach().numpy())


def test_a_black_box_is_evaluated_on_crops():
    score = eg.reducers.class_sum(eg.from_module(Opaque(net(2, torch.float32))), 1)
    x = eg.random.normal(0, (1, 256, 256))
    explain = eg.feature_ablation(score, features=features.within(features.windows(8), corner(x, 32)))
    with eg.execution() as seen:
        here = explain(x, torch.zeros_like(x))
    assert [e["evaluation"] for e in seen.events if e["event"] == "evaluation"] == ["crops"]
    whole, _ = by("whole", lambda: explain(x, torch.zeros_like(x)))
    assert (here - whole).abs().max() <= 1e-5 * score(x).abs()


def test_a_way_that_is_asked_for_and_impossible_is_an_error():
    score = eg.reducers.class_sum(eg.from_module(nn.InstanceNorm2d(2).eval()), 1)
    x = eg.random.normal(0, (2, 40, 40))
    with (
        eg.execution(evaluation="crops"),
        pytest.raises(
            ValueError, match=r"occlusion: expected a score that can be evaluated by crops, got .*global"
        ),
    ):
        eg.occlusion(score, size=8)(x, torch.zeros_like(x))


def test_under_vmap_and_autograd_whole_evaluations_give_the_same():
    score, x, baseline = task(2, 24)
    explain = eg.occlusion(score, size=4)
    alone = by("windows", lambda: explain(x, baseline))[0]
    close(torch.func.vmap(explain)(x[None], baseline[None])[0], alone)
    watched = x.clone().requires_grad_()
    found = explain(watched, baseline)
    close(found.detach(), alone)
    (slope,) = torch.autograd.grad(found.square().sum(), watched)
    assert slope.abs().max() > 0


def test_an_evaluation_that_disagrees_with_the_whole_is_refused(monkeypatch):
    # A seeded fault: windows that come out a little wrong are found by the comparison, and not used.
    score, x, baseline = task(2, 32)
    once = local.Followed._once
    monkeypatch.setattr(local.Followed, "_once", lambda self, *a, **k: once(self, *a, **k) * 1.01)
    explain = eg.occlusion(score, size=4)
    with (
        eg.execution(evaluation="windows"),
        pytest.raises(ValueError, match=r"window by window .* as a whole"),
    ):
        explain(x, baseline)


@pytest.mark.parametrize("way", ["windows", "whole"])
def test_a_score_without_value_names_the_perturbation(way):
    inner, x, baseline = task(2, 24)
    target = x.clone()
    target[:, 6:12, 12:18] = baseline[:, 6:12, 12:18]
    odd = inner(target)

    def score(z):
        y = inner(z)
        return torch.where((y - odd).abs() < 1e-9, torch.nan, y)

    with eg.execution(evaluation=way), pytest.raises(ValueError, match="NaN or infinity for perturbation 6"):
        eg.occlusion(score, size=6)(x, baseline)


def test_a_deadline_gives_the_windows_that_are_done(monkeypatch):
    score, x, baseline = task(2, 32)
    with monkeypatch.context() as until:
        passing_after(20, until)
        with (
            pytest.warns(eg.ExecutionWarning, match="the deadline passed"),
            eg.execution(evaluation="windows", chunk=1),
        ):
            some = eg.occlusion(score, size=2)(x, baseline)
    whole = eg.occlusion(score, size=2)(x, baseline)
    done = ~some.isnan()
    assert 0 < done.sum() < some.numel()
    close(some[done], whole[done], tolerance=1e-8)


# --- How far a network sees -------------------------------------------------------------------------------


def test_the_locality_of_a_convolution_is_its_kernel():
    conv = eg.from_module(nn.Conv2d(1, 1, (3, 5), padding=(1, 2)).eval())
    assert eg.locality(conv, torch.zeros(1, 32, 32)) == Locality((1, 1), (((-1, 2),), ((-2, 3),)))


def test_the_locality_of_the_real_network_is_what_was_measured_by_other_means():
    score = eg.reducers.class_sum(eg.from_module(zoo.brain_extraction_unet()), 1)
    found = eg.locality(score, torch.zeros(1, 32, 32, 32))
    reach = ((-23, 30), (-24, 29), (-25, 36), (-26, 35), (-27, 34), (-28, 33), (-21, 32), (-22, 31))
    assert found == Locality((8, 8, 8), (reach,) * 3)


def test_locality_contains_every_change():
    model = eg.from_module(net(2))
    found = eg.locality(model, torch.zeros(1, 40, 40, dtype=torch.float64))
    assert found.period == (2, 2)
    x = eg.random.normal(0, (1, 40, 40), dtype=torch.float64)
    for i, j in itertools.product((0, 1, 17, 20, 39), repeat=2):
        other = x.clone()
        other[0, i, j] += 1
        changed = (model(other) != model(x)).any(0).nonzero()
        for axis, at in enumerate((i, j)):
            low, high = found.affected(axis, at, at + 1, 40)
            assert low <= changed[:, axis].min()
            assert changed[:, axis].max() < high


def test_what_is_needed_suffices():
    model = eg.from_module(net(1))
    found = eg.locality(model, torch.zeros(1, 64, dtype=torch.float64))
    x = eg.random.normal(0, (1, 64), dtype=torch.float64)
    for start, stop in [(0, 3), (21, 22), (30, 41), (60, 64)]:
        low, high = found.needs(0, start, stop, 64)
        assert low % 2 == high % 2 == 0
        cut = model(x[:, low:high])[:, start - low : stop - low]
        assert torch.allclose(cut, model(x)[:, start:stop], rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: eg.from_module(nn.InstanceNorm2d(1).eval()), "is global along axis 1"),
        (lambda: lambda x: torch.where(x > 0, x, 0.0), "hides NaN"),
        (lambda: eg.from_module(nn.AvgPool2d(2)), "gives a grid"),
        (lambda: lambda x: x.sum(), "0 models"),
    ],
)
def test_networks_without_locality_are_refused(model, why):
    with pytest.raises(ValueError, match=why):
        eg.locality(model(), torch.zeros(1, 32, 32))


# --- Parts ------------------------------------------------------------------------------------------------


def test_windows_begin_at_the_first_voxel_and_end_at_the_border():
    found = features.windows(3, stride=2)(torch.zeros(1, 8))
    assert [found.box(j)[1] for j in range(found.count)] == [
        slice(0, 3),
        slice(2, 5),
        slice(4, 7),
        slice(6, 8),
    ]


def test_lengths_are_in_the_unit_of_the_spacing():
    found = features.grid(6.0, spacing=(1.5, 3.0))(torch.zeros(1, 8, 8))
    assert found.count == 2 * 4
    assert found.box(0) == (slice(0, 1), slice(0, 4), slice(0, 2))


@pytest.mark.parametrize(
    "parts",
    [features.grid(3), features.channels(), features.voxels(), features.elements(), features.windows(4)],
)
def test_one_absent_part_is_the_same_coalition_both_ways(parts):
    x = torch.zeros(2, 7, 6)
    found = parts(x)
    for j in {0, found.count // 2, found.count - 1}:
        z = torch.ones(found.count)
        z[j] = 0
        hidden = found.without(torch.tensor(j)).expand(2, 7, 6)
        assert torch.equal(found.keep(z).expand(2, 7, 6), hidden)
        box = found.box(j)
        part = torch.zeros(2, 7, 6)[box]
        assert torch.equal(found.keep(z, box).expand(part.shape), hidden[box])
        assert torch.equal(found.without(torch.tensor(j), box).expand(part.shape), hidden[box])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: features.labels(torch.tensor([0, 2])), "labels 0 to d - 1 without gaps"),
        (lambda: features.labels(torch.tensor([0.0, 1.0])), "a map of whole numbers"),
        (lambda: features.labels(torch.zeros(3, dtype=torch.int64))(torch.zeros(1, 4)), "a map on the grid"),
        (lambda: features.windows(9)(torch.zeros(1, 8)), "windows of at most the image's"),
        (lambda: features.windows(2, stride=0)(torch.zeros(1, 8)), "stride > 0"),
        (lambda: features.grid(2.5)(torch.zeros(1, 8)), "Voxels are whole"),
        (lambda: features.within(features.grid(2), torch.zeros(8, dtype=torch.bool)), "true somewhere"),
        (lambda: features.windows(4, fade=0), "fade > 0"),
        (
            lambda: features.segments(lambda x: torch.full((8,), 5), 3)(torch.zeros(1, 8)),
            "labels below count = 3",
        ),
    ],
)
def test_parts_that_make_no_sense_are_refused(make, text):
    with pytest.raises((ValueError, TypeError), match=text):
        make()


def test_more_runs_than_reasonable_are_refused_with_the_cost():
    x = torch.zeros(1, 101, 100, 100)
    with pytest.raises(ValueError, match=r"got 1,010,000 features, which take 1,010,001\. Use coarser ones"):
        eg.feature_ablation(lambda x: x.sum())(x, x)


def test_segments_are_found_for_each_example_under_vmap():
    halves = lambda x: (x[0] > x.mean()).long()
    xs = torch.stack([torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[3.0, 0.0, 0.0]])])
    explain = eg.feature_ablation(lambda x: x.sum(), features=features.segments(halves, 2))
    together = eg.batched(explain)(xs, torch.zeros_like(xs))
    alone = torch.stack([explain(x, torch.zeros_like(x)) for x in xs])
    assert torch.equal(together, alone)
    assert np.allclose(alone[1].numpy(), [[3, 0, 0]])


def test_occlusion_equals_captums():
    captum = pytest.importorskip("captum.attr")
    score, x, baseline = task(2, 20, torch.float32)
    peer = captum.Occlusion(lambda batch: torch.stack([score(t) for t in batch]))
    for size, stride in [(5, 5), (4, 3), (6, 2)]:
        theirs = peer.attribute(
            x[None],
            sliding_window_shapes=(1, size, size),
            strides=(1, stride, stride),
            baselines=baseline[None],
        )[0]
        ours = by("windows", lambda: eg.occlusion(score, size=size, stride=stride)(x, baseline))[0]
        assert (ours - theirs).abs().max() <= 1e-4 * score(x).abs()
