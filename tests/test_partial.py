"""What a deadline leaves out is NaN, sampling means are of whole samples, and both say which share is done."""

from functools import partial

import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta import coalitions, features
from esegeta.engine import stream
from esegeta.engine.execution import Execution, partial_share


@pytest.fixture
def clock(monkeypatch):
    """A deadline that passes after so many runs of a watched score, whatever the machine."""

    class Clock:
        runs, most = 0, 10**9

        def watch(self, score):
            def watched(z):
                self.runs += 1
                return score(z)

            return watched

    here = Clock()
    monkeypatch.setattr(Execution, "left", lambda self: 1.0 if here.runs < here.most else 0.0)
    return here


def cut(clock, most, explain, *args, **kwargs):
    """An explanation, and the share that was done, if its deadline passes after so many runs."""
    clock.runs, clock.most = 0, most
    evaluation = kwargs.pop("evaluation", "whole")
    with (
        eg.execution(chunk=1, evaluation=evaluation) as run,
        pytest.warns(eg.ExecutionWarning, match="the deadline passed"),
    ):
        a = explain(*args, **kwargs)
    clock.most = 10**9
    return a, partial_share(run.events)


def image(*shape, key=0):
    return eg.random.normal(key, shape, dtype=torch.float64)


def curved(z):
    return (z.cumsum(-1).sin() * z).sum()


@pytest.mark.parametrize(
    ("explain", "total"),
    [
        (partial(eg.occlusion, size=2), 8),
        (partial(eg.occlusion, size=3, stride=1), 14),
        (partial(eg.gaussian_occlusion, size=3, stride=2), 8),
        (partial(eg.feature_ablation, features=features.grid(4)), 4),
        (partial(eg.feature_ablation, features=features.within(features.grid(2), torch.arange(16) > 7)), 4),
    ],
)
@pytest.mark.parametrize("done", [1, 3])
def test_parts_that_were_not_looked_at_are_nan_and_the_others_are_as_without_a_deadline(
    clock, explain, total, done
):
    x = image(1, 16)
    a, share = cut(clock, 1 + done, explain(clock.watch(curved)), x, 0 * x)
    whole = explain(curved)(x, 0 * x)
    assert share == pytest.approx(done / total)
    seen = ~a.isnan()
    assert torch.allclose(a[seen], whole[seen], rtol=1e-12)
    assert int(seen.sum()) < x.numel()
    assert bool(seen.any()) or done < 3


def test_a_network_and_a_plain_score_end_alike(clock):
    net = (
        nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1)).double().eval()
    )
    score = eg.reducers.class_sum(eg.from_module(net), 0)
    x = image(1, 24, 24)
    explain = partial(eg.occlusion, size=6)
    whole = explain(score)(x, 0 * x)
    for evaluation in ("windows", "crops", "whole"):
        looks = iter([1.0] * 5)
        clock_left = lambda self, looks=looks: next(looks, -1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Execution, "left", clock_left)
            with (
                eg.execution(chunk=1, evaluation=evaluation) as run,
                pytest.warns(eg.ExecutionWarning, match="of 16 perturbations, and NaN for the others"),
            ):
                a = explain(score)(x, 0 * x)
        seen = ~a.isnan()
        assert int(seen.sum()) == 5 * 36, evaluation
        assert partial_share(run.events) == pytest.approx(5 / 16)
        assert torch.allclose(a[seen], whole[seen], rtol=1e-9)


@pytest.mark.parametrize("most", [4, 9, 14])
def test_a_mean_over_samples_is_that_of_the_whole_ones(clock, most):
    x, others = image(1, 4), image(3, 1, 4, key=1)
    explain = eg.feature_permutation(clock.watch(curved))
    a, share = cut(clock, most, explain, x, others)
    seen = ~a.isnan()
    if most < 5:  # three of the four parts of the first sample
        assert seen.sum() == 3
        assert share == pytest.approx(3 / 4 / 3)
    n = max(1, most // 5)
    whole = eg.feature_permutation(curved)(x, others[:n])
    assert torch.allclose(a[seen], whole[seen], rtol=1e-12)
    if most >= 5:
        assert bool(seen.all())
        assert share == pytest.approx(n / 3)


def test_shuffled_parts_end_alike(clock):
    x = image(1, 16)
    explain = partial(eg.feature_shuffling, features=features.grid(4), samples=3)
    a, share = cut(clock, 3, explain(clock.watch(curved)), x, key=5)
    assert a.isnan()[0].tolist() == [False] * 8 + [True] * 8
    assert share == pytest.approx(2 / 4 / 3)
    a, share = cut(clock, 8, explain(clock.watch(curved)), x, key=5)
    one = partial(eg.feature_shuffling, features=features.grid(4), samples=1)(curved)(x, key=5)
    assert torch.allclose(a, one)
    assert share == pytest.approx(1 / 3)


def test_transforms_of_a_cut_explanation_keep_whole_samples(clock):
    x, others = image(1, 6), image(4, 1, 6, key=1)
    a, share = cut(clock, 10, eg.over_baselines(eg.occlusion(clock.watch(curved), size=2)), x, others)
    whole = eg.over_baselines(eg.occlusion(curved, size=2))(x, others[:2])
    assert torch.allclose(a, whole)
    assert share == pytest.approx(2 / 4)


def test_fits_do_not_credit_parts_that_were_never_compared(clock):
    x = image(1, 6)
    for explain in (partial(eg.lime, samples=50), partial(eg.hsic_attribution, samples=50)):
        a, _ = cut(clock, 1, explain(clock.watch(curved)), x, 0 * x, key=1)
        assert bool(a.isnan().all())
        a, share = cut(clock, 30, explain(clock.watch(curved)), x, 0 * x, key=1)
        assert bool(a.isfinite().all())
        assert share == pytest.approx(30 / 50)


def test_a_batch_gives_each_example_what_it_was_looked_at(clock):
    xs = image(2, 1, 8)
    explain = eg.occlusion(clock.watch(curved), size=2)
    looks = iter([1.0] * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Execution, "left", lambda self: next(looks, -1.0))
        with pytest.warns(eg.ExecutionWarning), eg.execution(chunk=2) as run:
            a = eg.batched(explain)(xs, 0 * xs)
    assert a.isnan()[:, 0].tolist() == [[False] * 4 + [True] * 4] * 2
    assert partial_share(run.events) == pytest.approx(2 / 4)


def test_answers_are_nan_where_the_deadline_came_first(clock):
    score = clock.watch(lambda t: t.sum())
    clock.most = 2
    with pytest.warns(eg.ExecutionWarning, match="NaN for the others"), eg.execution(chunk=1):
        found = stream.answers(score, torch.arange(4.0), label="demo")
    assert found[:2].tolist() == [0.0, 1.0]
    assert found[2:].isnan().all()


def test_a_window_that_is_missing_hides_nothing_beside_it():
    parts = features.windows((2, 2), stride=(1, 2))(torch.zeros(1, 4, 4))
    values = torch.arange(parts.count).double()
    values[2] = torch.nan  # rows 1 and 2, columns 0 and 1
    got, want = parts.spread(values), parts.spread(torch.nan_to_num(values))
    missing = torch.zeros(4, 4, dtype=torch.bool)
    missing[1:3, :2] = True
    assert torch.equal(got[0].isnan(), missing)
    assert torch.allclose(got[0][~missing], want[0][~missing])


def test_drops_are_nan_not_zero(clock):
    x = image(1, 4)
    parts = features.elements()(x)
    clock.most = 3
    with pytest.warns(eg.ExecutionWarning), eg.execution(chunk=1, evaluation="whole"):
        found = coalitions.drops(clock.watch(curved), x, 0 * x, parts, label="demo")
    assert found.isnan().tolist() == [False, False, True, True]


# -- gaps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "explain",
    [
        lambda score: eg.occlusion(score, size=1, stride=3),
        lambda score: eg.gaussian_occlusion(score, size=4, stride=5),
        lambda score: eg.feature_ablation(score, features=features.windows(2, stride=3)),
        lambda score: eg.feature_ablation(score, features=features.windows(2, stride=3, separate=True)),
        lambda score: eg.lime(score, features=features.windows(1, stride=2)),
        # In single precision exp(-0.5 (0.45 / 0.01)^2) is zero: these boxes do not reach their borders.
        lambda score: eg.gaussian_occlusion(score, size=10, fade=0.01),
    ],
)
def test_boxes_that_leave_gaps_are_refused(explain):
    x = torch.ones(2, 20, 20)
    extra = {"key": 0} if "lime" in explain(lambda z: z.sum()).__name__ else {}
    with pytest.raises(ValueError, match=r"windows: expected boxes that leave no voxel out.* got steps of"):
        explain(lambda z: z.sum())(x, 0 * x, **extra)


@pytest.mark.parametrize(("size", "stride", "length"), [(4, 3, 11), (4, 4, 10), (1, 1, 5), (5, 2, 6)])
def test_boxes_reach_every_voxel(size, stride, length):
    for fade in (None, 0.25):
        parts = features.windows(size, stride=stride, fade=fade)(torch.zeros(1, length))
        assert bool((parts.profiles[1].sum(0) > 0).all())
