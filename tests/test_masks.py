"""Random masks, smooth masks, fills, and the methods that are made of them, against sums written out."""

import itertools
import math
import time
import warnings
from functools import partial

import jaxtyping
import pytest
import torch
from rounding import assert_alike
from together import together
from torch.func import vjp, vmap

import esegeta as eg
from esegeta import baselines, features, masks, random, zoo

SHAPES = [(9,), (6, 7), (5, 4, 6)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def unannotated():
    """As for users: where annotations are checked, as in this suite, the type checker speaks first."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def drawn(shape, key=0, dtype=torch.float64):
    return random.normal(key, shape, dtype=dtype)


def bent(shape, key=3):
    """A score with interactions."""
    w, v = drawn((4, *shape), key) / math.prod(shape) ** 0.5, drawn((4,), key + 1)
    return lambda x: (v * torch.tanh((w * x).flatten(1).sum(1))).sum() + 2.0


# --- Random masks -----------------------------------------------------------------------------------------


def stretched(grid, length, start):
    """What torch's own interpolation makes of a coarse line, and a piece of it."""
    count = len(grid)
    size = -(-length // count)
    wide = torch.nn.functional.interpolate(
        grid[None, None], size=(count + 1) * size, mode="linear", align_corners=False
    )
    return wide[0, 0, start : start + length]


def test_a_random_mask_is_a_coarse_grid_that_is_stretched_and_moved():
    x = torch.zeros(1, 20, dtype=torch.float64)
    for key in range(20):
        found = masks.scattered(key, x, cells=4, keep=0.3)[0]
        u = random.uniform(random.fold_in(key, 0), (4,))
        start = int(random.integers(random.fold_in(key, 1), (), low=0, high=5))
        torch.testing.assert_close(found, stretched((u < 0.3).double(), 20, start).float(), check_dtype=False)


def test_random_masks_of_volumes_are_stretched_as_trilinear_interpolation_stretches():
    x = torch.zeros(1, 9, 8, 7, dtype=torch.float64)
    cells = (3, 2, 4)
    sizes = (3, 4, 2)
    for key in range(5):
        u = (random.uniform(random.fold_in(key, 0), cells) < 0.5).double()
        whole = [(c + 1) * s for c, s in zip(cells, sizes, strict=True)]
        wide = torch.nn.functional.interpolate(
            u[None, None], size=whole, mode="trilinear", align_corners=False
        )[0, 0]
        starts = [
            int(random.integers(random.fold_in(key, a + 1), (), low=0, high=s)) for a, s in enumerate(sizes)
        ]
        piece = tuple(slice(a, a + n) for a, n in zip(starts, x.shape[1:], strict=True))
        torch.testing.assert_close(masks.scattered(key, x, cells=cells)[0], wide[piece])


@shapes
@pytest.mark.parametrize("keep", [0.5, 0.2, 0.75])
def test_random_masks_keep_as_much_as_they_say(shape, keep):
    x = torch.zeros(1, *shape, dtype=torch.float64)
    draw = vmap(lambda k: masks.scattered(k, x, cells=3, keep=keep))
    found = draw(torch.arange(4000))
    assert found.min() >= 0
    assert found.max() <= 1
    error = math.sqrt(keep * (1 - keep) / 4000)
    assert ((found.mean(0) - keep).abs() < 5 * error).all()
    first, second = found.unbind(1)
    together = ((first - keep) * (second - keep)).mean(0)
    assert (together < 0).all(), "counterparts are not opposed"
    if keep == 0.5:
        torch.testing.assert_close(first + second, torch.ones_like(first))
    else:
        assert ((first + second).mean(0) - 2 * keep).abs().max() < 10 * error


def test_random_masks_are_the_same_in_every_precision():
    for key in range(10):
        a = masks.scattered(key, torch.zeros(1, 7, 6, dtype=torch.float64))
        b = masks.scattered(key, torch.zeros(1, 7, 6, dtype=torch.float16))
        assert b.dtype == torch.float16
        assert (a - b).abs().max() < 1e-3


# --- RISE -------------------------------------------------------------------------------------------------


def by_hand(score, x, baseline, key, cells, keep, samples, estimator, antithetic=True):
    """The definition in float64, sample by sample; also the values and masks."""
    pairs = []
    for t in range(-(-samples // (2 if antithetic else 1))):
        both = masks.scattered(random.fold_in(key, t), x, cells=cells, keep=keep)
        pairs += list(both if antithetic else both[:1])
    values = torch.stack([score(m * x + (1 - m) * baseline) for m in pairs])
    m = torch.stack(pairs)
    f = values.reshape(-1, *[1] * (x.ndim - 1))
    if estimator == "plain":
        return (f * m).sum(0) / (len(m) * keep)
    if estimator == "self-normalised":
        return (f * m).sum(0) / m.sum(0)
    return ((f - f.mean(0)) * (m - m.mean(0))).mean(0) / (m - m.mean(0)).square().mean(0)


ESTIMATORS = ("plain", "self-normalised", "debiased")


@shapes
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("keep", "antithetic"), [(0.5, True), (0.3, True), (0.5, False)])
def test_rise_is_its_formula(shape, estimator, keep, antithetic):
    x, baseline, score = drawn((2, *shape)), drawn((2, *shape), 1), bent((2, *shape))
    settings = {"cells": 3, "keep": keep, "samples": 40, "estimator": estimator, "antithetic": antithetic}
    found = eg.rise(score, **settings)(x, baseline, key=5)
    expected = by_hand(score, x, baseline, 5, 3, keep, 40, estimator, antithetic)
    assert found.shape == (1, *shape)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("c", [3.0, -0.7, 1e6])
def test_rise_of_a_constant_is_the_constant(c):
    x = drawn((1, 8, 9))
    run = lambda **k: eg.rise(lambda z: 0 * z.sum() + c, samples=20, **k)(x, 0 * x, key=1)
    constant = torch.full((1, 8, 9), c, dtype=torch.float64)
    for keep in (0.5, 0.3):
        assert torch.equal(run(estimator="self-normalised", keep=keep), constant)
        assert torch.equal(run(estimator="debiased", keep=keep), 0 * constant)
    torch.testing.assert_close(run(), constant, rtol=1e-14, atol=0)  # pairs add up to one
    # Else it is c times the mean mask over p, and that is c only in expectation.
    alone = run(antithetic=False)
    mean = torch.stack([masks.scattered(random.fold_in(1, t), x)[0] for t in range(20)]).mean(0)
    torch.testing.assert_close(alone[0], c * mean / 0.5)
    assert (alone - c).abs().max() > 0.1 * abs(c)


def expectations(score, x, baseline, keep):
    """Over every mask on one axis: all grids of two cells and all starts."""
    length, size = x.shape[1], -(-x.shape[1] // 2)
    weights, values, shown = [], [], []
    for grid in itertools.product((0.0, 1.0), repeat=2):
        for start in range(size):
            m = stretched(torch.tensor(grid, dtype=torch.float64), length, start)
            weights.append(math.prod(keep if g else 1 - keep for g in grid) / size)
            values.append(score(m * x + (1 - m) * baseline))
            shown.append(m)
    w, f, m = (
        torch.tensor(weights, dtype=torch.float64)[:, None],
        torch.stack(values)[:, None],
        torch.stack(shown),
    )
    mean = lambda t: (w * t).sum(0)
    plain, kept = mean(f * m) / keep, mean(m)
    torch.testing.assert_close(kept, torch.full_like(kept, keep))
    slope = (mean(f * m) - mean(f) * kept) / (mean(m * m) - kept**2)
    return {"plain": plain, "self-normalised": plain, "debiased": slope}


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_rise_is_right_in_expectation_and_knows_its_error(estimator, keep):
    """Two hundred keys: the mean of them is the exact expectation, their spread is the error that each states."""
    x, baseline, score = drawn((1, 6)), drawn((1, 6), 1), bent((1, 6))
    truth = expectations(score, x, baseline, keep)[estimator]
    run = eg.with_standard_error(eg.rise(score, cells=2, keep=keep, samples=200, estimator=estimator))
    found = [run(x, baseline, key=k) for k in range(200)]
    a, error = (torch.stack(t)[:, 0] for t in zip(*found, strict=True))
    spread = a.std(0)
    # The ratios have a bias of order 1/n, which is small beside their error.
    assert ((a.mean(0) - truth).abs() < 4.5 * spread / 200**0.5 + 0.1 * spread).all()
    assert ((error.mean(0) / spread - 1).abs() < 0.25).all()
    covered = ((a - truth).abs() < 2 * error).double().mean()
    assert 0.91 < covered < 0.985


def test_ratios_and_pairs_are_nearer_where_the_score_is_far_from_zero():
    x, score = torch.ones(1, 12, dtype=torch.float64), lambda z: 50 + z[0, :4].sum()
    error = lambda **k: eg.with_standard_error(eg.rise(score, cells=3, samples=200, **k))(x, 0 * x, key=0)[
        1
    ].mean()
    assert error(antithetic=False) > 10 * error(antithetic=False, estimator="self-normalised")
    assert error(antithetic=False) > 10 * error()


def test_debiased_rise_gives_nothing_to_what_is_ignored():
    x, score = torch.ones(1, 40, dtype=torch.float64), lambda z: 5 + z[0, :6].sum()
    run = lambda estimator: eg.rise(score, cells=5, samples=4000, estimator=estimator)(x, 0 * x, key=0)[0]
    assert run("plain")[20:].min() > 7  # about the mean score, 8
    assert run("debiased")[20:].abs().max() < 0.4
    assert run("debiased")[:4].min() > 4


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rise_is_the_same_in_every_chunk_and_beside_any_other(estimator):
    x, baseline, score = drawn((2, 6, 5)), drawn((2, 6, 5), 1), bent((2, 6, 5))
    explain = eg.rise(score, samples=30, estimator=estimator)
    alone = explain(x, baseline, key=9)
    for chunk in (1, 4, 30):
        with eg.execution(chunk=chunk):
            torch.testing.assert_close(explain(x, baseline, key=9), alone, rtol=1e-11, atol=1e-12)
    others = torch.stack([x, 100 * x, -x])
    many = eg.batched(explain, in_dims=(0, None))(others, baseline, key=9)
    torch.testing.assert_close(many[0], alone, rtol=1e-11, atol=1e-12)
    longer = by_hand(score, x, baseline, 9, 7, 0.5, 60, estimator)
    torch.testing.assert_close(eg.rise(score, samples=60, estimator=estimator)(x, baseline, key=9)[0], longer)


def test_rise_at_a_deadline_is_that_of_the_masks_so_far():
    x = drawn((1, 9))

    def slow(z):
        time.sleep(0.02)
        return z.sum()

    with eg.execution(chunk=2, deadline=0.15) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore", eg.ExecutionWarning)
        found = eg.rise(slow, samples=1000)(x, 0 * x, key=2)
    (event,) = [e for e in run.events if e["event"] == "partial"]
    assert 0 < event["done"] < event["total"] == 500
    expected = by_hand(torch.sum, x, 0 * x, 2, 7, 0.5, 2 * event["done"], "plain")
    torch.testing.assert_close(found[0], expected)


def test_the_memory_of_rise_does_not_grow_with_samples():
    x = drawn((1, 24, 24), dtype=torch.float32)
    run = lambda samples: lambda: eg.rise(lambda z: z.sum(), samples=samples)(x, 0 * x, key=0)
    peak = []
    for samples in (64, 640):
        with eg.execution(chunk=8), eg.engine.memory.Live() as live:
            run(samples)()
        peak.append(live.peak)
    assert peak[1] < 1.1 * peak[0]


def test_bad_settings_of_rise(unannotated):
    x, score = torch.ones(1, 4), lambda z: z.sum()
    for keep in (0, 1, 1.5):
        with pytest.raises(ValueError, match=r"rise: expected 0 < keep < 1, got .*fraction"):
            eg.rise(score, keep=keep)
    with pytest.raises(
        ValueError, match="rise: expected estimator to be one of plain, self-normalised, debiased"
    ):
        eg.rise(score, estimator="fast")
    with pytest.raises(ValueError, match=r"cells: one whole number, or one for each of 1 axes, got \(3, 3\)"):
        eg.rise(score, cells=(3, 3), samples=2)(x, 0 * x, key=0)
    with pytest.raises(ValueError, match="cells to be an int >= 1, got 0"):
        eg.rise(score, cells=0, samples=2)(x, 0 * x, key=0)
    late = lambda z: torch.where(z.sum() < 1e-3, torch.nan, z.sum())  # where a mask hides all
    with pytest.raises(
        ValueError, match=r"rise: expected a finite score, got NaN or infinity for mask \d+\."
    ):
        eg.rise(late, cells=1, samples=50)(x, 0 * x, key=0)


# --- Smooth masks -----------------------------------------------------------------------------------------


def smooth_by_hand(parameters, shape, steps, sigma, units):
    """The definition, voxel by voxel and neighbour by neighbour."""
    out = torch.zeros(shape, dtype=torch.float64)
    for u in itertools.product(*map(range, shape)):
        above, below, places = 0.0, 0.0, []
        for a, (n, s, count) in enumerate(zip(shape, steps, parameters.shape, strict=True)):
            window = (1 + math.ceil(sigma / (s * units[a])) + 0.5) * s
            first = (n - 1) / 2 - s * (count - 1) / 2
            all_of_them = [(j, first + s * j) for j in range(-40, 40)]
            places.append([(j, c) for j, c in all_of_them if abs(u[a] - c) <= window])
        for chosen in itertools.product(*places):
            index = tuple(j for j, _ in chosen)
            distance = math.sqrt(
                sum(((v - c) * unit) ** 2 for v, (_, c), unit in zip(u, chosen, units, strict=True))
            )
            inside = all(0 <= j < n for j, n in zip(index, parameters.shape, strict=True))
            k = math.exp(-2 * max(0.0, distance / sigma - 0.5) ** 2)
            w = k * float(parameters[index]) if inside else 0.0
            above, below = above + w * math.exp(20 * w), below + math.exp(20 * w)
        out[u] = above / below
    return out


@pytest.mark.parametrize(
    ("shape", "step", "sigma", "spacing"),
    [
        ((11,), 3, 4.0, None),
        ((10,), 4, 2.5, None),
        ((9,), 2, 3.0, (0.5,)),
        ((7, 6), 3, 3.0, None),
        ((6, 7), 2, 2.0, (1.0, 2.0)),
        ((4, 5, 3), 2, 2.0, None),
    ],
    ids=str,
)
def test_a_smooth_mask_is_its_formula(shape, step, sigma, spacing):
    family = masks.smooth(step=step, sigma=sigma, spacing=spacing)(
        torch.zeros(1, *shape, dtype=torch.float64)
    )
    p = random.uniform(3, family.grid, dtype=torch.float64)
    units = spacing or (1.0,) * len(shape)
    expected = smooth_by_hand(p, shape, [max(1, round(step / u)) for u in units], sigma, units)
    torch.testing.assert_close(family.mask(p), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(11,), (8, 7), (5, 6, 4)], ids=str)
def test_the_gradient_of_a_smooth_mask_is_that_of_autograd(shape):
    family = masks.smooth(step=3, sigma=3)(torch.zeros(1, *shape, dtype=torch.float64))
    p, slope = random.uniform(3, family.grid, dtype=torch.float64), drawn(shape)
    (expected,) = vjp(family.mask, p)[1](slope)
    torch.testing.assert_close(family.gradient(p, slope), expected)
    many = vmap(family.gradient)(torch.stack([p, 0.5 * p]), torch.stack([slope, slope]))
    torch.testing.assert_close(many[0], expected)


def test_sums_over_neighbours_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    family = masks.smooth(step=2, sigma=3)(torch.zeros(1, 9, 10, dtype=torch.float64))
    p, slope = random.uniform(3, family.grid, dtype=torch.float64), drawn((9, 10))
    once = family.mask(p), family.gradient(p, slope)
    monkeypatch.setattr(masks, "_TOGETHER", 1)
    torch.testing.assert_close((family.mask(p), family.gradient(p, slope)), once)


@together("length", range(5, 15))
@together("step", [1, 2, 3, 4])
def test_left_and_right_are_alike(length, step):
    """Mirrored parameters give the mirrored mask: a mask has no side that it prefers."""
    family = masks.smooth(step=step, sigma=2.5)(torch.zeros(1, length, length + 1, dtype=torch.float64))
    p = random.uniform(3, family.grid, dtype=torch.float64)
    for axis in (0, 1):
        torch.testing.assert_close(
            family.mask(p.flip(axis)), family.mask(p).flip(axis), rtol=1e-12, atol=1e-14
        )


def test_a_mask_lies_between_nothing_and_all():
    family = masks.smooth(step=3, sigma=6)(torch.zeros(1, 20, 20))
    assert torch.equal(family.mask(0 * family.ones()), torch.zeros(20, 20))
    full = family.mask(family.ones())
    assert full.min() > 0.9
    assert full.max() <= 1


def test_sizes_in_mm():
    x = torch.zeros(1, 12, 24, dtype=torch.float64)
    in_mm = masks.smooth(step=4, sigma=4, spacing=(2.0, 1.0))(x)
    assert in_mm.steps == (2, 4)
    fine = masks.smooth(step=4, sigma=4)(torch.zeros(1, 24, 24, dtype=torch.float64))
    assert in_mm.grid == fine.grid
    p = random.uniform(3, fine.grid, dtype=torch.float64)
    # Each coarse voxel lies in the middle of two fine ones.
    between = fine.mask(p).unflatten(0, (12, 2)).mean(1)
    assert (in_mm.mask(p) - between).abs().max() < 0.1


def test_bad_settings_of_smooth_masks():
    x = torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match=r"masks.smooth: expected sigma > 0, got 0"):
        masks.smooth(sigma=0)
    for bad in (0, -1, (2, 2, 2)):
        with pytest.raises(ValueError, match=r"step > 0 and spacing > 0, one number or 2"):
            masks.smooth(step=bad)(x)
    with pytest.raises(ValueError, match=r"step > 0 and spacing > 0, one number or 2"):
        masks.smooth(spacing=(1.0,))(x)


# --- Areas ------------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("area", [0.1, 0.37, 0.9])
def test_the_region_is_where_the_mask_is_largest(shape, area):
    m = random.uniform(1, shape, dtype=torch.float64)
    region = masks.nearest_region(m, area)
    ones = round(area * m.numel())
    assert region.sum() == ones
    assert set(region.unique().tolist()) <= {0.0, 1.0}
    if 0 < ones < m.numel():
        assert m[region == 1].min() > m[region == 0].max()
    torch.testing.assert_close(masks.area_residual(m, area=area), (m - region).square().mean())


def test_ties_share():
    assert masks.nearest_region(torch.ones(4), 0.25).tolist() == [0.25] * 4
    assert masks.nearest_region(torch.tensor([1.0, 0.0, 1.0, 1.0]), 0.5).tolist() == pytest.approx(
        [2 / 3, 0, 2 / 3, 2 / 3]
    )
    many = vmap(lambda m: masks.nearest_region(m, 0.5))(torch.tensor([[0.1, 0.2], [0.4, 0.3]]))
    assert many.tolist() == [[0, 1], [1, 0]]


# --- Extremal and meaningful perturbation -----------------------------------------------------------------


def paper(score, x, baseline, area, mode, steps, family, worth):
    """The paper's loop with torch's own optimiser and gradients: the region of its mask after every step."""
    choice = family(x)
    p = choice.ones().requires_grad_()
    optimizer = torch.optim.SGD([p], lr=0.01 * p.numel() / 1024, momentum=0.9, dampening=0.9)
    full = choice.mask(p).detach()
    unit = worth / (score(x) - score(baseline)).abs()
    for k in range(steps):
        m = choice.mask(p)
        region = largest((m / full).detach(), area)
        energy = unit * rewarded(score, x, baseline, mode, m) - 300 * 1.0035**k * (m - region).square().mean()
        optimizer.zero_grad()
        (-energy).backward()
        optimizer.step()
        p.data.clamp_(0, 1)
        yield largest((choice.mask(p) / full).detach(), area)


def rewarded(score, x, baseline, mode, m):
    show = lambda m: score(m * x + (1 - m) * baseline)
    both = {"preserve": lambda: show(m), "delete": lambda: -show(1 - m)}
    return both.get(mode, lambda: show(m) - show(1 - m))()


def largest(m, area):
    """Ones for so many of the largest; what is alike at the threshold shares what is left."""
    ones = round(area * m.numel())
    threshold = m.flatten().sort(descending=True).values[ones - 1]
    inside, rim = m > threshold, m == threshold
    return inside.to(m.dtype) + rim.to(m.dtype) * (ones - inside.sum()) / rim.sum()


def balls_and_boxes(shape, middles, area, spacing=None):
    """Written out: the voxels nearest to each of some places, by two distances."""
    units = spacing or (1.0,) * len(shape)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in shape), indexing="ij"), -1)
    for middle in itertools.product(*middles):
        off = (grid - torch.tensor(middle, dtype=torch.float64)).abs()
        yield largest(-(off * torch.tensor(units)).square().sum(-1), area)
        yield largest(-(off / torch.tensor([float(n) for n in shape])).amax(-1), area)


def evenly(n, count):
    return [(i + 0.5) * n / count - 0.5 for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["preserve", "delete", "dual"])
def test_extremal_perturbation_is_the_best_that_shapes_and_the_loop_of_the_paper_see(mode):
    """With 800 steps the settings are those of the paper."""
    x, baseline, score = drawn((2, 8, 7)), drawn((2, 8, 7), 1), bent((2, 8, 7))
    family, area = masks.smooth(step=2, sigma=2), 0.2
    unit = 10 / (score(x) - score(baseline)).abs()

    def value(r):
        return unit * rewarded(score, x, baseline, mode, r)

    seen = list(balls_and_boxes((8, 7), [evenly(8, 8), evenly(7, 7)], area))
    seen += itertools.islice(paper(score, x, baseline, area, mode, 800, family, 10.0), 19, None, 20)
    best = max(float(value(r)) for r in seen)
    with eg.execution() as run:
        found = eg.extremal_perturbation(score, area=area, mode=mode, mask=family)(x, baseline)[0]
    assert not run.events
    assert float(value(found)) >= best - 1e-9 * abs(best)
    torch.testing.assert_close(largest(found, area), found)  # a region of that area


def modes_of(shape, spacing):
    """A score with three bumps of different width that saturate and compete: gradients alone find one of them."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in shape), indexing="ij"), -1)
    bumps = []
    for k, width in enumerate((0.12, 0.2, 0.16)):
        middle = random.uniform(random.fold_in(5, k), (len(shape),), dtype=torch.float64) * torch.tensor(
            shape
        )
        off = (grid - middle) * torch.tensor(spacing)
        bumps.append(torch.exp(-off.square().sum(-1) / (2 * (width * max(shape)) ** 2)))
    w = torch.stack([b / b.sum() for b in bumps])
    return lambda x: torch.logsumexp(12 * (w * x[0]).flatten(1).sum(1) * torch.tensor([1.0, 0.9, 0.8]), 0)


@pytest.mark.parametrize(
    ("shape", "spacing"), [((40,), (1.0,)), ((24, 20), (1.0, 2.0)), ((12, 10, 8), (1.0, 1.0, 2.5))], ids=str
)
@pytest.mark.parametrize("mode", ["preserve", "delete"])
def test_no_ball_or_box_of_the_same_area_beats_extremal_perturbation(shape, spacing, mode):
    score, area = modes_of(shape, spacing), 0.12
    x, zero = torch.ones(1, *shape, dtype=torch.float64), torch.zeros(1, *shape, dtype=torch.float64)
    family = masks.smooth(step=2.0, sigma=4.0, spacing=spacing)
    found = eg.extremal_perturbation(score, area=area, mode=mode, steps=80, mask=family)(x, zero)
    value = lambda r: float(rewarded(score, x, zero, mode, r))
    middles = [evenly(n, 4 if len(shape) == 3 else 8) for n in shape]
    best = max(value(r[None]) for r in balls_and_boxes(shape, middles, area, spacing))
    assert value(found) >= best - 1e-9
    assert float(found.sum()) == pytest.approx(round(area * x.numel()))


def test_no_ball_or_box_of_the_same_area_beats_meaningful_perturbation():
    score, size = modes_of((24, 20), (1.0, 1.0)), 2
    x = torch.ones(1, 24, 20, dtype=torch.float64)
    unit = 1 / (score(x) - score(0 * x)).abs()

    def cost(h):
        rough = sum(h.diff(dim=a).abs().pow(3).mean() for a in (1, 2))
        return float(unit * score(x * (1 - eg.spatial.upsample(h, like=x))) + 0.08 * h.mean() + rough)

    found = eg.meaningful_perturbation(score, steps=60, size=size, edges=1.0)(x, 0 * x)
    blocks = torch.linalg.lstsq(
        torch.stack(
            [eg.spatial.upsample(e.reshape(1, 12, 10), like=x).flatten() for e in torch.eye(120).double()], 1
        ),
        found.flatten(),
    ).solution.reshape(1, 12, 10)
    shapes = balls_and_boxes((12, 10), [evenly(12, 5), evenly(10, 5)], float(blocks.mean()))
    assert cost(blocks) <= min(cost(r[None]) for r in shapes) + 1e-9


@pytest.mark.slow
def test_no_ball_beats_the_mask_of_the_real_network():
    network = eg.from_module(zoo.brain_extraction_unet())
    x = zoo.head().data[:, 52:76, 52:76, 52:76].contiguous()
    score = eg.reducers.class_mean(network, 1)
    family = masks.smooth(step=4, sigma=8)
    found = eg.extremal_perturbation(score, area=0.13, steps=10, mask=family)(x, 0 * x)
    shapes = balls_and_boxes((24, 24, 24), [evenly(24, 3)] * 3, 0.13)
    assert float(score(found * x)) >= max(float(score(r.float() * x)) for r in shapes)


def test_a_search_that_has_settled_ends_and_waits_for_nobody_in_a_batch():
    w = torch.stack([(torch.arange(24) // 6 == 1).float(), torch.linspace(0, 1, 24) ** 2])
    calls = []

    def score(z):
        calls.append(1)
        return (z[0] * z[1]).sum()

    for build in (
        lambda: eg.extremal_perturbation(score, area=0.25, steps=400, mask=masks.smooth(step=2, sigma=3)),
        lambda: eg.meaningful_perturbation(score, steps=400, size=2),
    ):
        xs = torch.stack([torch.stack([torch.ones(24), v]) for v in w])
        calls.clear()
        alone = torch.stack([build()(x, torch.stack([0 * x[0], x[1]])) for x in xs])
        assert len(calls) < 2 * 400
        together = eg.batched(build())(xs, torch.stack([0 * xs[:, 0], xs[:, 1]], 1))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def box_score(w):
    return lambda x: (w * x[0]).sum()


@pytest.mark.parametrize("mode", ["preserve", "delete", "dual"])
def test_extremal_perturbation_finds_the_region_that_counts(mode):
    w = torch.zeros(20, 24)
    w[4:10, 13:21] = 1
    x, area = torch.ones(1, 20, 24), float(w.mean())
    explain = eg.extremal_perturbation(
        box_score(w), area=area, mode=mode, steps=120, mask=masks.smooth(step=1, sigma=2)
    )
    m = explain(x, 0 * x)[0]
    found = m > 0.5
    iou = (found & (w > 0)).sum() / (found | (w > 0)).sum()
    assert iou > 0.8
    assert masks.area_residual(m, area=area) < 0.02
    assert abs(float(m.mean()) - area) < 0.03
    mirrored = eg.extremal_perturbation(
        box_score(w.flip(1)), area=area, mode=mode, steps=120, mask=masks.smooth(step=1, sigma=2)
    )
    torch.testing.assert_close(mirrored(x, 0 * x)[0], m.flip(1), rtol=1e-3, atol=1e-3)


def test_extremal_perturbation_of_a_volume_and_of_a_line():
    for shape in [(30,), (8, 9, 10)]:
        w = torch.zeros(shape)
        w[tuple(slice(n // 4, n // 2 + 1) for n in shape)] = 1
        x, area = torch.ones(1, *shape), float(w.mean())
        explain = eg.extremal_perturbation(
            box_score(w), area=area, steps=120, mask=masks.smooth(step=1, sigma=1)
        )
        found = explain(x, 0 * x)[0] > 0.5
        assert (found & (w > 0)).sum() / (found | (w > 0)).sum() > 0.75


def test_the_scale_of_the_score_does_not_matter():
    x, baseline, score = drawn((1, 9, 9)), drawn((1, 9, 9), 1), bent((1, 9, 9))
    explain = lambda f: eg.extremal_perturbation(f, area=0.2, steps=40, mask=masks.smooth(step=2, sigma=2))
    a = explain(score)(x, baseline)
    torch.testing.assert_close(explain(lambda z: 1e4 * score(z) - 7)(x, baseline), a, rtol=1e-6, atol=1e-6)


def test_a_search_at_a_deadline_gives_what_it_has():
    x = torch.ones(1, 9)
    slow = lambda z: (time.sleep(0.01), z[0, :3].sum())[1]
    for build in (eg.extremal_perturbation, eg.meaningful_perturbation):
        with eg.execution(deadline=0.4) as run, warnings.catch_warnings():
            warnings.simplefilter("ignore", eg.ExecutionWarning)
            a = build(slow, steps=100_000)(x, 0 * x)
        event = [e for e in run.events if e["event"] == "partial"][-1]
        assert 0 <= event["done"] < 100_000
        assert a.isfinite().all()
        with eg.execution(deadline=1e-9), pytest.raises(eg.DeadlineExceeded, match="before the first step"):
            build(slow, steps=3)(x, 0 * x)


def test_a_flat_score_prefers_no_place():
    x = drawn((1, 6, 5))
    flat = lambda z: 0 * z.sum() + 3
    found = eg.extremal_perturbation(flat, area=0.2, steps=3, mask=masks.smooth(step=2, sigma=2))(x, 0 * x)
    torch.testing.assert_close(found, torch.full_like(found, 0.2))
    assert eg.meaningful_perturbation(flat, steps=3, size=2)(x, 0 * x).abs().max() == 0


def test_progress_of_a_search():
    seen = []
    x = torch.ones(1, 9)
    with eg.execution(progress=lambda label, done: seen.append((label, done))):
        eg.extremal_perturbation(lambda z: z.sum(), steps=5)(x, 0 * x)
    assert {label for label, _ in seen} == {"extremal_perturbation"}
    done = [done for _, done in seen]
    assert done == sorted(done)
    assert done[-1] == 1


def test_bad_settings_of_the_searches():
    score = lambda z: z.sum()
    with pytest.raises(ValueError, match=r"extremal_perturbation: expected 0 < area < 1, got 1.0"):
        eg.extremal_perturbation(score, area=1.0)
    with pytest.raises(ValueError, match="mode to be one of preserve, delete, dual, got 'flip'"):
        eg.extremal_perturbation(score, mode="flip")
    with pytest.raises(ValueError, match="score_scale to be a finite number >= 0"):
        eg.extremal_perturbation(score, score_scale=-1.0)
    with pytest.raises(ValueError, match="least to be a finite number >= 0"):
        eg.meaningful_perturbation(score, least=-1.0)
    with pytest.raises(ValueError, match=r"meaningful_perturbation: expected step > 0 and spacing > 0"):
        eg.meaningful_perturbation(score, size=0)(torch.ones(1, 3), torch.zeros(1, 3))


def test_meaningful_perturbation_costs_no_more_than_what_the_loop_of_the_paper_sees():
    x, baseline, score = drawn((2, 8, 6)), drawn((2, 8, 6), 1), bent((2, 8, 6))
    unit = 1 / (score(x) - score(baseline)).abs()

    def shown(h):
        return torch.nn.functional.interpolate(h[None], size=(8, 6), mode="bilinear", align_corners=False)[0]

    def cost(h):
        up = shown(h)
        rough = h.diff(dim=1).abs().pow(3).mean() + h.diff(dim=2).abs().pow(3).mean()
        return unit * score((1 - up) * x + up * baseline) + 0.08 * h.mean() + 8.0 * rough

    nothing = torch.zeros(1, 4, 3, dtype=torch.float64)
    shapes = [
        r[None]
        for a in (0.02, 0.05, 0.1, 0.2, 0.4)
        if round(12 * a)
        for r in balls_and_boxes((4, 3), [evenly(4, 4), evenly(3, 3)], a)
    ]
    h = min([nothing, *shapes], key=lambda h: float(cost(h))).requires_grad_()
    optimizer = torch.optim.Adam([h], lr=0.1)
    seen = [h.detach().clone()]
    for _ in range(30):
        optimizer.zero_grad()
        cost(h).backward()
        optimizer.step()
        h.data.clamp_(0, 1)
        seen.append(h.detach().clone())
    expected = min(seen, key=lambda h: float(cost(h)))
    found = eg.meaningful_perturbation(score, steps=30, size=2)(x, baseline)
    torch.testing.assert_close(found, shown(expected), rtol=1e-5, atol=1e-6)


def test_meaningful_perturbation_hides_what_counts():
    w = torch.zeros(16, 16)
    w[4:8, 8:16] = 1
    x = torch.ones(1, 16, 16)
    h = eg.meaningful_perturbation(box_score(w), size=2, edges=0.1)(x, 0 * x)[0]
    assert h[5, 10:14].min() > 0.8
    assert h[12:].max() < 0.1


# --- Permutation and shuffling ----------------------------------------------------------------------------


@shapes
def test_feature_permutation_is_its_formula(shape):
    x, others, score = drawn((2, *shape)), drawn((3, 2, *shape), 1), bent((2, *shape))
    parts = features.grid(3)
    found = eg.feature_permutation(score, features=parts)(x, others)
    labels = parts(x).labels.expand_as(x)
    expected = torch.zeros_like(x)
    for j in range(parts(x).count):
        losses = [score(x) - score(torch.where(labels == j, other, x)) for other in others]
        expected += torch.where(labels == j, torch.stack(losses).mean(), 0.0)
    torch.testing.assert_close(found, expected)
    same = eg.over_baselines(eg.feature_ablation(score, features=parts))(x, others)
    torch.testing.assert_close(found, same)


def test_the_error_of_feature_permutation_is_that_of_the_mean():
    x, others, score = drawn((1, 4)), drawn((9, 1, 4), 1), bent((1, 4))
    a, error = eg.with_standard_error(eg.feature_permutation(score))(x, others)
    each = torch.stack([eg.feature_ablation(score)(x, other) for other in others])
    torch.testing.assert_close(a, each.mean(0))
    torch.testing.assert_close(error, each.std(0) / 3)


def test_captum_permutes_a_batch_and_agrees_on_each_swap():
    captum = pytest.importorskip("captum.attr")
    x, other, score = drawn((1, 5)), drawn((1, 5), 1), bent((1, 5))
    swap = lambda batch, mask: torch.where(mask, batch.flip(0), batch)
    theirs = captum.FeaturePermutation(vmap(score), perm_func=swap).attribute(torch.stack([x, other]))
    for i, (one, two) in enumerate([(x, other), (other, x)]):
        torch.testing.assert_close(eg.feature_permutation(score)(one, two[None]), theirs[i])


@shapes
def test_shuffling_keeps_values_and_what_is_outside(shape):
    x = drawn((2, *shape))
    hidden = drawn((1, *shape), 5) > 0
    keep = (~hidden).double()
    seen = set()
    for key in range(5):
        y = baselines.shuffled(key=key)(x, x, keep)
        assert torch.equal(torch.where(hidden, 0, y), torch.where(hidden, 0, x))
        before, after = x[:, hidden[0]], y[:, hidden[0]]
        order = before[0].argsort()
        assert torch.equal(before[:, order], after[:, after[0].argsort()]), "channels move apart"
        seen.add(tuple(after[0].tolist()))
    assert len(seen) > 1


def test_every_order_is_as_likely():
    x, keep = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    many = vmap(lambda k: baselines.shuffled(key=k)(x, x, keep))(torch.arange(6000))
    _, counts = many.reshape(6000, 4).unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 1000).abs() < 150).all()


def test_channels_that_are_hidden_apart_are_shuffled_apart():
    x = torch.stack([torch.arange(50.0), torch.arange(50.0)])
    y = baselines.shuffled(key=1)(x, x, torch.zeros(2, 50))
    assert not torch.equal(y[0], y[1])
    one = baselines.shuffled(key=1)(x, x, torch.tensor([[0.0], [1.0]]))
    assert torch.equal(one[1], x[1])
    assert not torch.equal(one[0], x[0])


def test_feature_shuffling_is_its_formula():
    x, score = drawn((2, 6, 5)), bent((2, 6, 5))
    parts = features.grid(3)
    labels = parts(x).labels
    expected = torch.zeros_like(x)
    for j in range(parts(x).count):
        keep = (labels != j).double()
        runs = [score(baselines.shuffled(key=random.fold_in(4, t))(x, x, keep)) for t in range(6)]
        expected += torch.where(labels == j, score(x) - torch.stack(runs).mean(), 0.0)
    found = eg.feature_shuffling(score, features=parts, samples=6)(x, key=4)
    torch.testing.assert_close(found, expected)


def test_feature_shuffling_has_an_expectation():
    """One value among equal ones: a shuffle keeps it at its place once in n."""
    x = torch.tensor([[8.0, 0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    parts = features.labels(torch.tensor([0, 0, 0, 0, 1]))
    run = eg.with_standard_error(eg.feature_shuffling(lambda z: z[0, 0], features=parts, samples=400))
    a, error = run(x, key=0)
    assert (a[0, :4] - 6).abs().max() < 4 * error[0, 0]
    assert a[0, 4] == 0


# --- Fills ------------------------------------------------------------------------------------------------


def holes(shape, key=0):
    u = random.uniform(key, (1, *shape))
    yield u < 0.5
    yield u < 0.9
    box = torch.zeros(1, *shape, dtype=torch.bool)
    box[(slice(None), *(slice(1, n - 1) for n in shape))] = True
    yield box
    edge = torch.zeros(1, *shape, dtype=torch.bool)
    edge[..., : shape[-1] - 1] = True
    yield edge


def solved(x, hidden, spacing):
    """The same equations by a direct sparse solver."""
    import numpy as np
    from scipy.sparse import lil_matrix
    from scipy.sparse.linalg import spsolve

    n = x.numel()
    index = torch.arange(n).reshape(x.shape)
    matrix, right = lil_matrix((n, n)), x.flatten().numpy().copy()
    for v in itertools.product(*map(range, x.shape)):
        i = int(index[v])
        if not hidden[v]:
            matrix[i, i] = 1
            continue
        right[i] = 0
        for axis, h in enumerate(spacing):
            for side in (-1, 1):
                u = list(v)
                u[axis] += side
                if 0 <= u[axis] < x.shape[axis]:
                    matrix[i, i] += 1 / h**2
                    matrix[i, int(index[tuple(u)])] -= 1 / h**2
    return torch.from_numpy(np.asarray(spsolve(matrix.tocsr(), right))).reshape(x.shape)


@pytest.mark.parametrize("shape", [(12,), (9, 10), (6, 7, 5)], ids=str)
@pytest.mark.parametrize("spacing", [None, (1.0, 0.5, 2.5)], ids=["voxels", "mm"])
def test_inpainting_solves_the_equation_of_laplace(shape, spacing):
    units = (spacing or (1.0, 1.0, 1.0))[: len(shape)]
    x = drawn((1, *shape))
    for hole in holes(shape):
        found = baselines.continued(x, hole, spacing=units, steps=25)
        expected = solved(x[0], hole[0], units)
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-8)
        twelve = baselines.continued(x, hole, spacing=units)
        assert (twelve[0] - expected).abs().max() < (1e-6 if spacing is None else 1e-3)


@shapes
def test_slopes_and_constants_are_continued(shape):
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    ramp = sum((a + 1) * t for a, t in enumerate(axes))[None] - 3
    inside = torch.zeros(1, *shape, dtype=torch.bool)
    inside[(slice(None), *(slice(1, n - 1) for n in shape))] = True
    torch.testing.assert_close(baselines.continued(ramp, inside), ramp, rtol=0, atol=1e-6)
    for hole in holes(shape):
        constant = torch.full_like(ramp, 0.3)
        assert_alike(baselines.continued(torch.where(hole, 99.0, constant), hole), constant)


@shapes
def test_no_value_leaves_the_range_of_what_is_around(shape):
    x = drawn((1, *shape))
    for hole in holes(shape):
        f = baselines.continued(torch.where(hole, 1e3, x), hole)
        assert torch.equal(f[~hole], x[~hole])
        known = x[~hole]
        assert f.min() >= known.min() - 1e-6
        assert f.max() <= known.max() + 1e-6


@pytest.mark.parametrize("shape", [(64, 64), (20, 20, 20)], ids=str)
@pytest.mark.parametrize(("steps", "allowed"), [(12, 1e-6), (20, 1e-11)])
def test_the_residual_that_is_promised(shape, steps, allowed):
    x = drawn((1, *shape))
    for hole in holes(shape):
        f = baselines.continued(x, hole, steps=steps)
        flow = torch.zeros_like(f)
        for axis in range(1, f.ndim):
            step = f.diff(dim=axis)
            edge = torch.zeros_like(f.narrow(axis, 0, 1))  # nothing flows through the border
            flow += torch.cat([step, edge], axis) - torch.cat([edge, step], axis)
        assert flow[hole].abs().max() < allowed * (x.max() - x.min())


def test_inpainting_maps_and_differentiates():
    xs, hole = drawn((3, 2, 7, 6)), next(holes((7, 6)))
    loop = torch.stack([baselines.continued(x, hole) for x in xs])
    torch.testing.assert_close(vmap(lambda x: baselines.continued(x, hole))(xs), loop)
    # A linear function of the image: its derivative in a direction is its value there.
    v = drawn((2, 7, 6), 9)
    _, change = torch.func.jvp(lambda x: baselines.continued(x, hole, steps=20), (xs[0],), (v,))
    torch.testing.assert_close(change, baselines.continued(v, hole, steps=20), rtol=0, atol=1e-6)


def test_inpainted_is_a_fill():
    x, score = drawn((2, 8, 8)), bent((2, 8, 8))
    parts = features.grid(4)
    labels = parts(x).labels
    expected = torch.zeros_like(x)
    for j in range(4):
        filled = baselines.continued(x, labels == j)
        expected += torch.where(labels == j, score(x) - score(filled), 0.0)
    found = eg.feature_ablation(score, features=parts, fill=baselines.inpainted)(x, 0 * x)
    torch.testing.assert_close(found, expected)
    spaced = partial(baselines.inpainted, spacing=(1.0, 3.0))
    assert not torch.allclose(eg.feature_ablation(score, features=parts, fill=spaced)(x, 0 * x), found)


def test_a_channel_that_is_wholly_hidden_becomes_the_baseline():
    x, b = drawn((2, 5, 5)), drawn((2, 5, 5), 1)
    keep = torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
    assert torch.equal(baselines.inpainted(x, b, keep), torch.stack([b[0], x[1]]))


def test_holes_that_are_refused(unannotated):
    x = torch.ones(1, 4, 4)
    with pytest.raises(ValueError, match="continued: expected a hole with something around it, got all"):
        baselines.continued(x, torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"a boolean mask on the grid \(4, 4\), got bool\(3, 4\)"):
        baselines.continued(x, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="a boolean mask on the grid"):
        baselines.continued(x, torch.ones(4, 4))
    with pytest.raises(ValueError, match="steps to be an int >= 1"):
        baselines.continued(x, torch.eye(4, dtype=torch.bool), steps=0)


@pytest.mark.parametrize("levels", [2, 5])
def test_defocused_reads_a_pyramid(levels):
    x, keep = drawn((2, 6, 7)), random.uniform(4, (1, 6, 7), dtype=torch.float64)
    keep[0, 0, :levels] = torch.linspace(0, 1, levels, dtype=torch.float64)
    images = [x if s == 0 else eg.spatial.blur(x, s) for s in torch.linspace(3, 0, levels).tolist()]
    expected = torch.zeros_like(x)
    for v in itertools.product(range(6), range(7)):
        place = float(keep[0][v]) * (levels - 1)
        low = min(int(place), levels - 2)
        for c in range(2):
            a, b = images[low][c][v], images[low + 1][c][v]
            expected[c][v] = a + (place - low) * (b - a)
    fill = baselines.defocused(3.0, levels=levels)
    torch.testing.assert_close(fill(x, x, keep), expected, rtol=1e-6, atol=1e-6)


def test_what_is_wholly_kept_has_a_slope():
    x = drawn((1, 9))
    slope = torch.func.jacrev(lambda k: baselines.defocused(3.0)(x, x, k))(torch.ones_like(x)).sum(-1)
    assert (slope[0, :, 0].abs() > 0).all()


def test_constants_noise_and_another_sample():
    x = drawn((2, 400))
    assert torch.equal(baselines.constant(x, 3.0), torch.full_like(x, 3.0))
    noise = baselines.normal(2 + 3 * x, key=1)
    torch.testing.assert_close(noise.mean(1), (2 + 3 * x).mean(1), rtol=0, atol=0.6)
    torch.testing.assert_close(noise.std(1), (3 * x).std(1), rtol=0.15, atol=0)
    given = baselines.normal(x, key=1, centre=torch.tensor([5.0, -5.0], dtype=x.dtype), sigma=0.0)
    assert given.unique().tolist() == [-5.0, 5.0]
    samples = drawn((6, 1, 4))
    for key in range(5):
        one = baselines.another(samples, key=key)
        assert torch.equal(one, baselines.dataset(samples, key=key, count=1)[0])
    keys = vmap(lambda k: baselines.another(samples, key=k))(torch.arange(200))
    assert len(keys.reshape(200, 4).unique(dim=0)) == 6


@pytest.mark.slow
def test_a_tolerance_stops_rise_and_no_example_waits_for_another():
    weights = torch.linspace(0, 1, 64)
    runs = []

    def score(z):
        runs.append(1)
        return (z[0] * weights).sum()

    x, zero = torch.ones(1, 64), torch.zeros(1, 64)
    counts = []
    for tolerance in (0.5, 0.02, None):
        runs.clear()
        explain = eg.rise(score, samples=2000, estimator="self-normalised", tolerance=tolerance)
        with eg.execution(chunk=1):
            a, error = eg.with_standard_error(explain)(x, zero, key=1)
        assert error.max() <= (tolerance or 1) * a.abs().max()
        counts.append(len(runs))
    assert counts[0] < counts[1] < counts[2]

    explain = eg.rise(score, samples=400, tolerance=0.1)
    xs = torch.stack([x, eg.random.uniform(0, (1, 64))])
    together = eg.batched(explain)(xs, torch.zeros_like(xs), key=3)
    alone = torch.stack([explain(one, zero, key=3) for one in xs])
    assert torch.allclose(together, alone, atol=1e-4)
