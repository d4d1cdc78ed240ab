"""What maps of uncertainty are worth: closed forms by hand, and promises that hold in simulations."""

import math

import pytest
import torch

from esegeta import random, uncertainty
from esegeta.uncertainty import aggregating, calibration, conformal, selection

# ------------------------------------------------------------------ aggregation


def test_maps_become_numbers():
    u = torch.arange(20.0).reshape(4, 5)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, :2] = mask[2:, 3:] = True
    assert aggregating.image_mean(u[None]).item() == 9.5
    assert aggregating.image_mean(u, mask).item() == pytest.approx((0 + 1 + 13 + 14 + 18 + 19) / 6)
    assert aggregating.image_mean(u, mask & ~mask).isnan()
    assert aggregating.component_means(u, mask).tolist() == [16.0, 0.5]  # the larger part first
    assert aggregating.component_means(u, mask & ~mask).tolist() == []
    assert aggregating.top_fraction(u, 0.1).item() == 18.5
    assert aggregating.top_fraction(u, 0.001).item() == 19
    line, far = torch.arange(8.0), torch.arange(8) < 4
    assert aggregating.boundary_excluded(line, far).item() == pytest.approx((0 + 1 + 2 + 5 + 6 + 7) / 6)
    assert aggregating.boundary_excluded(line, far, voxels=2).item() == pytest.approx((0 + 1 + 6 + 7) / 4)
    assert aggregating.boundary_excluded(line, far, voxels=9).isnan()


# ------------------------------------------------------------------ calibration


def test_reliability_by_hand():
    p = torch.tensor([0.0, 0.1, 0.2, 0.2, 0.55, 1.0])
    came = torch.tensor([0, 1, 0, 1, 1, 1])
    curve = calibration.reliability(p, came, bins=5)
    assert curve.events.tolist() == [4, 0, 1, 0, 1]  # 0.2 is on the edge, and of the lower bin
    assert curve.predicted[[0, 2, 4]].tolist() == pytest.approx([0.125, 0.55, 1.0])
    assert curve.observed[[0, 2, 4]].tolist() == [0.5, 1.0, 1.0]
    assert curve.predicted[[1, 3]].isnan().all()
    assert calibration.calibration_error(p, came, 5).item() == pytest.approx((4 * 0.375 + 0.45 + 0) / 6)
    squares = sum((a - b) ** 2 for a, b in zip(p.tolist(), came.tolist(), strict=True))
    assert calibration.brier(p, came).item() == pytest.approx(squares / 6)


def test_probabilities_that_are_right_are_calibrated():
    p = random.uniform(3, (200_000,))
    came = random.uniform(4, (200_000,)) < p
    assert calibration.calibration_error(p, came).item() < 0.005
    assert calibration.calibration_error(p**3, came).item() > 0.1


def test_temperature_is_found():
    z = 2 * random.normal(1, (1, 50_000))
    y = random.uniform(2, (50_000,)) < z[0].sigmoid()
    assert calibration.temperature(2.5 * z, y) == pytest.approx(2.5, rel=0.05)
    z = 2 * random.normal(3, (4, 50_000))
    gumbel = -(-random.uniform(5, z.shape).clamp(min=1e-9).log()).log()
    y = (z + gumbel).argmax(0)  # drawn from the softmax
    assert calibration.temperature(0.5 * z, y) == pytest.approx(0.5, rel=0.05)
    sure, right = calibration.confidence(z.softmax(0), y)
    assert calibration.calibration_error(sure, right).item() < 0.01


# ------------------------------------------------------------------ selective risk


def test_selective_risk_by_hand():
    u = torch.tensor([0.4, 0.1, 0.3, 0.2])
    e = torch.tensor([1.0, 0.0, 0.0, 0.5])
    curve = selection.risk_coverage(u, e)
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([0, 0.25, 0.5 / 3, 0.375])
    assert curve.retained.tolist() == [0, 0.125, 0.125, 0.375]
    assert selection.aurc(u, e).item() == pytest.approx((0.25 + 0.5 / 3 + 0.375) / 4)
    assert selection.augrc(u, e).item() == pytest.approx(0.625 / 4)
    assert selection.error_share(u, e, 0.25).item() == pytest.approx(1 / 1.5)
    assert selection.error_share(u, 0 * e, 0.25).isnan()


def test_equals_are_set_aside_in_random_order():
    """A map that knows nothing has the base rate at every coverage, whatever the order of voxels."""
    e = torch.tensor([1, 1, 0, 0, 0])
    curve = selection.risk_coverage(torch.ones(5), e)
    assert curve.risk.tolist() == pytest.approx([0.4] * 5)
    assert selection.augrc(torch.ones(5), e).item() == pytest.approx(0.4 * 0.6)
    assert selection.error_share(torch.ones(5), e, 0.2).item() == pytest.approx(0.2)
    perfect, wrong = selection.aurc(e.float(), e), selection.aurc(-e.float(), e)
    assert perfect < 0.4 < wrong


# ------------------------------------------------------------------ conformal


def volumes(key, count, classes=2, voxels=24):
    """Volumes whose network is good or bad as a whole, with classes of their own frequencies."""
    skill = 3 * random.uniform(random.fold_in(key, 0), (count, 1, 1)) - 0.5
    rare = random.uniform(random.fold_in(key, 1), (count, voxels)) < 0.3 * random.uniform(
        random.fold_in(key, 2), (count, 1)
    )
    y = rare.long()
    y[:, 0], y[:, 1] = 0, 1  # every class is in every volume
    z = skill * torch.nn.functional.one_hot(y, classes).movedim(-1, 1) + random.normal(
        random.fold_in(key, 3), (count, classes, voxels)
    )
    return z.softmax(1), y


def test_needed():
    assert [conformal.needed(a) for a in (0.5, 0.2, 0.1, 0.05, 0.01)] == [1, 4, 9, 19, 99]


def coverage(draws, per_class):
    """Mean and standard error of the covered share of a new volume; of each class, or of all voxels."""
    shares = []
    for i in range(draws):
        p, y = volumes(i, 10)
        sets = conformal.prediction_sets(zip(p[:9], y[:9], strict=True), alpha=0.2, per_class=per_class)
        held = sets(p[9]).gather(0, y[9][None])[0].double()
        shares.append([held[y[9] == k].mean() for k in range(2)] if per_class else [held.mean()])
    found = torch.tensor(shares, dtype=torch.float64)
    return found.mean(0), found.std(0) / draws**0.5


@pytest.mark.parametrize("draws", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_prediction_sets_keep_their_promise(draws):
    for per_class in (False, True):
        mean, error = coverage(draws, per_class)
        assert (mean >= 0.8 - 3 * error).all(), (per_class, mean, error)
        assert (mean < 0.97).all(), (per_class, mean)  # it is not kept by sets of everything


@pytest.mark.parametrize("draws", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_masks_keep_their_promise(draws):
    missed, included = [], []
    for i in range(draws):
        p, y = volumes(i, 10)
        pairs = [(q[1:], t == 1) for q, t in zip(p, y, strict=True)]
        outer = conformal.outer_mask(pairs[:9], alpha=0.2)
        inner = conformal.inner_mask(pairs[:9], alpha=0.2)
        q, truth = pairs[9]
        missed.append((truth & ~outer(q)).sum() / truth.sum())
        included.append((inner(q) & ~truth).sum() / (~truth).sum())
    for losses in (torch.stack(missed).double(), torch.stack(included).double()):
        error = losses.std() / draws**0.5
        assert losses.mean() <= 0.2 + 3 * error
        assert losses.mean() > 0.05  # it is not kept by masks of everything or nothing


def test_tested_masks_keep_their_promise():
    """The mean share of wrong voxels of the mask is above alpha in at most a tenth of calibrations."""
    p, y = volumes(77_777, 2000)
    # Enough skill that thresholds with few wrong voxels exist.
    z = (p[:, 1] / p[:, 0]).log() + 3 * y
    truth, q = y == 1, z.sigmoid()
    broken = 0
    for i in range(6):
        some = slice(40 * i, 40 * i + 40)
        pairs = [(a[None], b) for a, b in zip(q[some], truth[some], strict=True)]
        mask = conformal.learn_then_test(pairs, alpha=0.25, delta=0.1)
        held = mask(q)
        wrong = (held & ~truth).sum(1) / held.sum(1).clamp(min=1)
        broken += bool(wrong.mean() > 0.25)
    assert broken <= 2  # of 6, at 0.1 each: more in less than 1.6 %


def test_risk_control_by_hand():
    losses = torch.tensor([[1.0, 0.5, 0.25, 0.0]]).repeat(4, 1)
    levels = torch.arange(4.0)
    # (4 R + 1) / 5: 1, 0.6, 0.4, 0.2
    assert [conformal.control_risk(losses, levels, alpha=a) for a in (0.6, 0.5, 0.4, 0.2)] == [1, 2, 2, 3]
    with pytest.raises(
        ValueError,
        match=r"at least 5 calibration volumes for alpha = 0\.19, got 4\. With 4 the smallest is 0\.2",
    ):
        conformal.control_risk(losses, levels, alpha=0.19)
    with pytest.raises(ValueError, match="use learn_then_test"):
        conformal.control_risk(losses.flip(1), levels, alpha=0.5)


def test_the_threshold_is_the_quantile_of_the_mean_of_distribution_functions():
    """By hand: a volume of one voxel weighs as much as one of three."""
    first = (torch.tensor([[0.5, 0.75, 0.875]]), torch.tensor([1, 1, 1]))
    second = (torch.tensor([[0.25]]), torch.tensor([1]))
    sets = conformal.prediction_sets([first, second], alpha=0.5)
    # (F1 + F2) / 3 >= 0.5: at 0.25 it is 2/3, at 0.5 it is 1/3.
    assert (sets.least / 2**16).tolist() == [0.25, 0.25]
    assert sets(torch.tensor([[0.25, 0.24, 0.8]])).tolist() == [[True, True, False], [True, False, True]]


PAIR = (torch.tensor([[0.9, 0.2]]), torch.tensor([1, 0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: conformal.prediction_sets([PAIR] * 8, alpha=0.1),
            r"prediction_sets: expected at least 9 calibration volumes for alpha = 0\.1, got 8",
        ),
        (lambda: conformal.prediction_sets([], alpha=0.1), "at least 9 calibration volumes"),
        (
            lambda: conformal.prediction_sets([(PAIR[0], PAIR[1] * 0)] * 9, alpha=0.1, per_class=True),
            "every class in some calibration volume, got class 1 in none",
        ),
        (
            lambda: conformal.prediction_sets(
                [(PAIR[0], PAIR[1] * 0)] * 9 + [PAIR] * 3, alpha=0.1, per_class=True
            ),
            "at least 9 calibration volumes with class 1 for alpha = 0.1, got 3",
        ),
        (lambda: conformal.prediction_sets([PAIR] * 9, alpha=1.5), "alpha between 0 and 1"),
        (lambda: conformal.prediction_sets([(PAIR[0] * 9, PAIR[1])] * 9, alpha=0.1), "Apply the link"),
        (
            lambda: conformal.outer_mask([(PAIR[0], PAIR[1] == 1)] * 18, alpha=0.05),
            "at least 19 calibration volumes",
        ),
        (lambda: conformal.outer_mask([PAIR] * 19, alpha=0.05), "a boolean reference"),
        (
            lambda: conformal.learn_then_test([(PAIR[0], PAIR[1] == 1)] * 9, alpha=0.1),
            "at least 22 calibration",
        ),
        (lambda: calibration.brier(torch.tensor([1.5]), torch.tensor([1])), "probabilities from 0 to 1"),
        (lambda: calibration.reliability(torch.tensor([0.5]), torch.tensor([2])), "events as booleans"),
        (lambda: selection.aurc(torch.ones(3), torch.ones(2)), "as many errors as uncertainties"),
        (lambda: aggregating.top_fraction(torch.ones(3), 0), "a fraction above 0"),
        (lambda: aggregating.component_means(torch.ones(3), torch.ones(3)), "a boolean mask"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_the_bound_of_learn_then_test_is_the_least_number():
    doubt = math.ceil(math.log(0.1) / math.log(0.9))
    assert doubt == 22
    assert conformal._p_value(0.0, 22, 0.1) <= 0.1 < conformal._p_value(0.0, 21, 0.1)
    assert uncertainty.conformal is conformal
