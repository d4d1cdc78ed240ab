"""Shapley values and what is near them: closed forms, enumeration, plain loops from the papers, captum."""

import functools
import itertools
import math
from functools import partial

import jaxtyping
import numpy as np
import pytest
import rounding
import torch
from rounding import assert_alike

import esegeta as eg
from esegeta import coalitions, features, random
from esegeta.engine.execution import Execution, partial_share
from esegeta.methods import hierarchy
from esegeta.methods.lime import lime_fit
from esegeta.methods.sobol import _points
from esegeta.shapley_kernel import drawn

close = functools.partial(rounding.close, tolerance=1e-10)

# Everything that answers with Shapley values for few parts, then what only comes near them.
SHAPLEY = {
    "exact_shapley": eg.exact_shapley,
    "kernel_shap": partial(eg.kernel_shap, samples=1024),
    "shapley_sampling": partial(eg.shapley_sampling, samples=1),
    "partition_shap": eg.partition_shap,
}
OTHERS = {
    "lime": partial(eg.lime, samples=100),
    "sobol_attribution": partial(eg.sobol_attribution, samples=8),
    "hsic_attribution": partial(eg.hsic_attribution, samples=50),
    "channel_shapley": eg.channel_shapley,
}
EVERY = {**SHAPLEY, **OTHERS}
KEYED = {"kernel_shap", "shapley_sampling", "lime", "sobol_attribution", "hsic_attribution"}


def run(name, score, x, baseline=None, key=3, **static):
    baseline = torch.zeros_like(x) if baseline is None else baseline
    return EVERY[name](score, **static)(x, baseline, **({"key": key} if name in KEYED else {}))


def draw(*shape, key=0):
    return random.normal(key, shape, dtype=torch.float64)


def game(d, key=0):
    """A score of d elements in which any three interact, and all of them, with an input and a baseline."""
    w = draw(d, d, d, key=random.fold_in(key, 1))
    score = lambda z: torch.einsum("i,j,k,ijk->", z[0], z[0], z[0].sin(), w) + 3 * z.max()
    return score, draw(1, d, key=random.fold_in(key, 2)), draw(1, d, key=random.fold_in(key, 3))


def values(score, x, baseline):
    return lambda present: score(torch.where(torch.tensor(present, dtype=torch.bool), x, baseline))


def averaged(v, d, orders):
    """What each player adds, averaged over orders, one step after the other."""
    total = torch.zeros(d, dtype=torch.float64)
    for order in orders:
        present = [False] * d
        before = v(present)
        for i in order:
            present[i] = True
            after = v(present)
            total[i] += after - before
            before = after
    return total / len(orders)


# -- closed forms --------------------------------------------------------------------------------------------------

X, ZERO = torch.tensor([[3.0, 2.0, 0.5]], dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
BASE = torch.tensor([[1.0, -1.0, 0.25]], dtype=torch.float64)
W = torch.tensor([[2.0, -1.0, 4.0]], dtype=torch.float64)


@pytest.mark.parametrize("name", SHAPLEY)
def test_a_linear_score(name):
    close(run(name, lambda z: (W * z).sum() + 5, X, BASE), W * (X - BASE))


@pytest.mark.parametrize("name", SHAPLEY)
def test_an_additive_score(name):
    h = lambda z: z.exp() + W * z.pow(3)
    close(run(name, lambda z: h(z).sum(), X, BASE), h(X) - h(BASE))


@pytest.mark.parametrize("name", SHAPLEY)
def test_a_product_is_shared_equally(name):
    close(run(name, lambda z: z[0, 0] * z[0, 1], X), torch.tensor([[3.0, 3.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("name", SHAPLEY)
def test_a_maximum(name):
    close(run(name, lambda z: z[0, :2].max(), X), torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("name", SHAPLEY)
def test_ablation_credits_a_product_twice_where_shapley_values_do_not(name):
    score = lambda z: z[0, 0] * z[0, 1]
    ablated = eg.feature_ablation(score)(X, ZERO)
    close(ablated, 2 * run(name, score, X))


def test_many_samples_of_a_linear_score_are_exact_too():
    w, x, b = draw(1, 30, key=1), draw(1, 30, key=2), draw(1, 30, key=3)
    score = lambda z: (w * z).sum()
    close(eg.kernel_shap(score, samples=100)(x, b, key=0), w * (x - b))
    close(eg.lime(score, samples=100, ridge=1e-12)(x, b, key=0), w * (x - b), tolerance=1e-8)
    close(eg.partition_shap(score, max_runs=30**2)(x, b), w * (x - b))
    shares = (w * (x - b)).square() / (w * (x - b)).square().sum()
    assert (eg.sobol_attribution(score, samples=1024)(x, b, key=0) - shares).abs().max() < 0.02


def test_channels():
    x = draw(3, 4, 5)
    score = lambda z: z[0].sum() * z[1].sum() + z[2].square().sum()
    a = run("channel_shapley", score, x)
    half = x[0].sum() * x[1].sum() / 2
    close(a, torch.stack([half, half, x[2].square().sum()])[:, None, None].expand(3, 4, 5))
    close(a, eg.exact_shapley(score, features=features.channels())(x, 0 * x), tolerance=0)


# -- enumeration and plain loops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_enumeration_equals_all_orders(d):
    score, x, b = game(d)
    slow = averaged(values(score, x, b), d, list(itertools.permutations(range(d))))
    close(eg.exact_shapley(score)(x, b), slow[None])


@pytest.mark.parametrize("d", [1, 2, 3, 4, 8])
def test_kernel_shap_with_all_coalitions_is_the_shapley_value(d):
    score, x, b = game(d)
    explain = eg.with_standard_error(eg.kernel_shap(score, samples=2**d))
    a, error = explain(x, b, key=0)
    close(a, eg.exact_shapley(score)(x, b))
    assert not error.any()


def test_kernel_shap_is_the_least_squares_of_its_own_coalitions():
    """A general solver for constrained least squares, on rows that are not paired or reduced."""
    d, samples = 9, 100
    score, x, b = game(d)
    z, weights = drawn(5, d, samples // 2 - 1, torch.device("cpu"))
    weights[d:] /= len(z) - d
    rows, weights = torch.cat([z, 1 - z]), torch.cat([weights, weights])
    v = values(score, x, b)
    low, high = v([False] * d), v([True] * d)
    gain = torch.stack([v((row > 0).tolist()) for row in rows]) - low
    # The conditions of Lagrange for a.sum() = high - low.
    gram = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    gram[:d, :d] = 2 * rows.T @ (weights[:, None] * rows)
    gram[d, :d] = gram[:d, d] = 1
    target = torch.cat([2 * rows.T @ (weights * gain), (high - low)[None]])
    close(
        eg.kernel_shap(score, samples=samples)(x, b, key=5)[0],
        torch.linalg.solve(gram, target)[:d],
        tolerance=1e-9,
    )


def test_kernel_shaps_sizes_have_its_law():
    d, n = 12, 20_000
    z, weights = drawn(1, d, d + n, torch.device("cpu"))
    assert torch.equal(z[:d], torch.eye(d, dtype=torch.float64))
    kernel = {k: (d - 1) / (math.comb(d, k) * k * (d - k)) for k in range(1, d)}
    law = torch.tensor([kernel[k] * math.comb(d, k) for k in range(2, d - 1)])
    # All of a size weigh what it has coalitions; half of that, since complements come along.
    assert float(weights[-1]) == pytest.approx(float(law.sum()) / 2)
    assert float(weights[0]) == pytest.approx(kernel[1])
    found = torch.bincount(z[d:].sum(1).long(), minlength=d)[2 : d - 1] / n
    assert (found - law / law.sum()).abs().max() < 4 * 0.5 / n**0.5
    assert (z[d:].mean(0) - 0.5).abs().max() < 4 * 0.5 / n**0.5


def test_sampling_is_castros_loop_over_its_own_orders():
    d, n = 6, 5
    score, x, b = game(d)
    orders = []
    for i in range(n):
        order = random.permutation(random.fold_in(11, i), d).tolist()
        orders += [order, order[::-1]]
    slow = averaged(values(score, x, b), d, orders)
    close(eg.shapley_sampling(score, samples=n)(x, b, key=11), slow[None])


def test_opposites_are_exact_where_two_interact():
    """What errs one way in an order errs the other way in its reverse, in a coalition in its complement."""
    w = draw(9, 9)
    score = lambda z: (z[0] @ w @ z[0]) + z.sum()
    x, b = draw(1, 9, key=1), draw(1, 9, key=2)
    exact = eg.exact_shapley(score)(x, b)
    close(eg.shapley_sampling(score, samples=1)(x, b, key=0), exact)
    for samples in (20, 50):
        close(eg.kernel_shap(score, samples=samples)(x, b, key=0), exact)


@pytest.mark.slow
def test_the_page_says_which_error_is_smaller():
    score, x, b = game(9)
    exact = eg.exact_shapley(score)(x, b)
    off = lambda explain: (
        torch.stack([explain(x, b, key=k) - exact for k in range(20)]).square().mean().sqrt()
    )
    ratio = off(eg.shapley_sampling(score, samples=10)) / off(eg.kernel_shap(score, samples=200))
    assert 1.2 < ratio < 2.5


def ordered(tree):
    """All orders that keep the groups of a tree together, groups of more than two halved."""
    if not isinstance(tree, tuple):
        return [[tree]]
    if len(tree) == 1:
        return ordered(tree[0])
    middle = len(tree) // 2
    first, second = ordered(tree[:middle]), ordered(tree[middle:])
    return [a + b for a in first for b in second] + [b + a for a in first for b in second]


TREES = [(0,), (1, 0), (0, (1, 2)), ((0, 3), (1, (2, 4))), (0, (1, (2, (3, (4, 5))))), (3, 1, 5, 0, 2, 4)]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_owen_values_equal_all_orders_of_their_tree(tree):
    orders = ordered(tree)
    d = len(orders[0])
    score, x, b = game(d)
    close(eg.partition_shap(score, tree=tree)(x, b), averaged(values(score, x, b), d, orders)[None])


@pytest.mark.parametrize("most", [2, 3, 4, 7, 10, 30, 60, 200, 2000])
def test_owen_values_are_complete_with_any_number_of_runs(most):
    score, x, b = game(13)
    runs = []

    def counted(z):
        runs.append(1)
        return score(z)

    with eg.execution(chunk=1):
        a = eg.partition_shap(counted, max_runs=most)(x, b)
    close(a.sum(), score(x) - score(b))
    assert len(runs) <= most
    assert len(runs) >= min(most - 1, 100)


def test_owen_values_split_first_what_is_worth_most():
    x = torch.zeros(1, 64, dtype=torch.float64)
    x[0, 37] = 1
    # What surrounds it splits it 1, 2, 4... 32 times, in rounds of 1, 4 and then 16; all 64 would take 2730 runs.
    close(eg.partition_shap(lambda z: z.sum(), max_runs=2 + 2 * (1 + 4 + 5 * 16))(x, 0 * x), x)
    assert eg.partition_shap(lambda z: z.sum(), max_runs=8)(x, 0 * x)[0, 32:48].sum() == pytest.approx(1)


def test_owen_values_with_all_runs_are_linear_and_know_what_changes_nothing():
    (one, x, b), (two, _, _) = game(6), game(6, key=9)
    idle = lambda z: one(torch.where(torch.arange(6) == 4, 0.0, z))
    explain = eg.partition_shap(idle, max_runs=100)
    ignored = (torch.arange(6) == 4)[None]
    assert float(eg.axioms.dummy(explain, ignored)(x, b)) < 1e-12
    assert float(eg.axioms.linearity(partial(eg.partition_shap, max_runs=100), one, two)(x, b)) < 1e-10


def test_a_box_is_halved_along_its_longest_axis():
    x = torch.zeros(1, 8, 4, 2)
    parts = features.voxels()(x)
    order = hierarchy.halved(parts, torch.arange(64)).reshape(2, 2, 2, 8)
    where = torch.stack(torch.unravel_index(order, (8, 4, 2)), -1)
    lengths = lambda places: (places.amax(-2) - places.amin(-2) + 1).tolist()
    assert lengths(where.reshape(1, 64, 3)) == [[8, 4, 2]]
    assert lengths(where.reshape(2, 32, 3)) == [[4, 4, 2]] * 2
    assert lengths(where.reshape(4, 16, 3)) == [[2, 4, 2]] * 4
    assert lengths(where.reshape(8, 8, 3)) == [[2, 2, 2]] * 8
    # Windows overlap; where they are is the mean of where they hide.
    windows = features.windows(2, stride=1)(torch.zeros(1, 5, 2))
    assert hierarchy.halved(windows, torch.arange(4)).tolist() == [0, 1, 2, 3]


def test_trees_of_label_maps():
    lobes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    regions = torch.tensor([[0, 2, 1, 3], [-1, 2, 1, 3]])
    assert hierarchy.of_labels(lobes, regions) == ((0, 2), (1, 3))
    assert hierarchy.of_labels(torch.zeros_like(lobes), lobes, regions) == (((0, 2), (1, 3)),)
    assert hierarchy.of_labels(regions) == (0, 1, 2, 3)
    score, x, b = game(8)
    fold = lambda z: score(z.reshape(1, 8))
    atlas = features.labels(regions)
    a = eg.partition_shap(fold, features=atlas, tree=hierarchy.of_labels(lobes, regions))(
        x.reshape(1, 2, 4), b.reshape(1, 2, 4)
    )
    assert a[0, 1, 0] == 0
    assert a[0, 0, 1] == a[0, 1, 1] != 0


# -- LIME ----------------------------------------------------------------------------------------------------------


def lime_design(n, d, key):
    z = (random.uniform(key, (n, d)) < 0.5).double()
    z[0] = 1
    cosine = torch.nn.functional.cosine_similarity(z, torch.ones(1, d, dtype=torch.float64))
    return z, torch.sqrt(torch.exp(-((1 - cosine) ** 2) / 0.25**2))


def test_lime_is_the_weighted_ridge_of_the_normal_equations():
    d, n, ridge = 5, 60, 0.7
    score, x, b = game(d)
    z, w = lime_design(n, d, 4)
    v = torch.stack([values(score, x, b)((row > 0).tolist()) for row in z])
    # With the intercept as a last column that is not penalised.
    rows = torch.cat([z, torch.ones(n, 1, dtype=torch.float64)], 1)
    penalty = torch.diag(torch.tensor([ridge] * d + [0.0], dtype=torch.float64))
    slow = torch.linalg.solve(rows.T @ torch.diag(w) @ rows + penalty, rows.T @ (w * v))
    close(eg.lime(score, samples=n, ridge=ridge)(x, b, key=4)[0], slow[:d])
    fit = lime_fit(score, samples=n, ridge=ridge)(x, b, key=4)
    close(fit.coefficients, slow[:d])
    close(fit.intercept, slow[d])
    centre = (w * v).sum() / w.sum()
    close(fit.r2, 1 - (w * (v - rows @ slow) ** 2).sum() / (w * (v - centre) ** 2).sum())
    assert 0.1 < fit.r2 < 0.99


def test_limes_nothing_is_as_far_from_the_image_as_possible():
    z, w = lime_design(400, 3, 0)
    nothing = z.sum(1) == 0
    assert nothing.any()
    torch.testing.assert_close(w[nothing], torch.full_like(w[nothing], math.exp(-0.5 / 0.25**2)))
    # Ours, of a score that is 1 for nothing alone: what cosine_similarity says of a zero vector is what we say.
    score = lambda t: (t.sum() == 0).double()
    x = torch.ones(1, 3, dtype=torch.float64)
    fit = lime_fit(score, samples=400, ridge=1e-9, resamples=2)(x, 0 * x, key=0)
    solved = np.linalg.lstsq(
        (w.sqrt()[:, None] * torch.cat([z, torch.ones(400, 1).double()], 1)).numpy(),
        (w.sqrt() * nothing.double()).numpy(),
        rcond=None,
    )[0]
    close(fit.coefficients, torch.tensor(solved[:3]), tolerance=1e-8)


@pytest.mark.slow
def test_limes_intervals_are_as_wide_as_its_coefficients_vary():
    score, x, b = game(6)
    fits = [lime_fit(score, samples=300)(x, b, key=k) for k in range(40)]
    spread = torch.stack([f.coefficients for f in fits]).std(0)
    wide = torch.stack([f.high - f.low for f in fits]).mean(0) / (2 * 1.96)
    assert ((wide / spread) > 0.7).all()
    assert ((wide / spread) < 1.5).all()
    assert all((f.low <= f.coefficients).all() and (f.coefficients <= f.high).all() for f in fits)


def test_a_fit_of_lime_maps():
    score, x, b = game(4)
    fit = lime_fit(score, samples=40, resamples=10)
    both = torch.func.vmap(lambda k: fit(x, b, key=k))(torch.tensor([1, 2]))
    for mapped, single in zip(both, fit(x, b, key=2), strict=True):
        close(mapped[1], single, tolerance=1e-9)


# -- Sobol and HSIC ------------------------------------------------------------------------------------------------


def test_sobol_indices_are_jansens_loop_over_their_own_points():
    d, n = 4, 16
    score, x, b = game(d)
    points = _points(7, n, 2 * d, torch.device("cpu"))
    v = lambda z: score(z * x + (1 - z) * b)
    here = torch.stack([v(p[:d]) for p in points])
    slow = []
    for j in range(d):
        total = 0.0
        for p, before in zip(points, here, strict=True):
            mixed = p[:d].clone()
            mixed[j] = p[d + j]
            total += (before - v(mixed)) ** 2
        slow.append(total / (2 * n * here.var(correction=0)))
    close(eg.sobol_attribution(score, samples=n)(x, b, key=7)[0], torch.stack(slow))


def test_sobol_indices_of_a_product():
    x = torch.ones(1, 3, dtype=torch.float64)
    a = eg.sobol_attribution(lambda z: z[0, 0] * z[0, 1], samples=4096)(x, 0 * x, key=1)[0]
    assert (a - torch.tensor([4 / 7, 4 / 7, 0.0])).abs().max() < 0.01
    assert a[2] == 0


def test_sobol_points_are_even_for_every_key():
    for key in range(5):
        points = _points(key, 64, 6, torch.device("cpu"))
        for column in points.T:
            assert torch.equal((column * 64).long().sort().values, torch.arange(64))
        cells = (points[:, 0] * 8).long() * 8 + (points[:, 1] * 8).long()
        assert len(cells.unique()) == 64
    first, second = (_points(k, 64, 6, torch.device("cpu")) for k in (0, 1))
    assert not torch.equal(first, second)


def test_a_constant_score_has_no_indices_and_no_dependence():
    for name in ("sobol_attribution", "hsic_attribution", "lime"):
        assert run(name, lambda z: 0 * z.sum() + 2.5, X).abs().max() < 1e-12


def test_hsic_is_the_trace_of_the_paper():
    d, n = 4, 40
    score, x, b = game(d)
    z = (random.uniform(3, (n, d)) < 0.5).double()
    v = torch.stack([values(score, x, b)((row > 0).tolist()) for row in z])
    apart = (v[:, None] - v[None]).abs()
    width = torch.tensor(
        sorted(float(apart[i, j]) for i in range(n) for j in range(i))[(n * (n - 1) // 2 - 1) // 2]
    )
    kernel, centre = torch.exp(-(apart**2) / (2 * width**2)), torch.eye(n).double() - 1 / n
    slow = [
        torch.trace((z[:, None, j] == z[None, :, j]).double() @ centre @ kernel @ centre) / (n - 1) ** 2
        for j in range(d)
    ]
    close(eg.hsic_attribution(score, samples=n)(x, b, key=3)[0], torch.stack(slow), tolerance=1e-6)


def test_hsic_of_what_changes_nothing_is_what_the_page_says():
    n = 60
    x = torch.ones(1, 2, dtype=torch.float64)
    a = torch.stack(
        [eg.hsic_attribution(lambda z: z[0, 0], samples=n)(x, 0 * x, key=k)[0] for k in range(200)]
    )
    # Half of all pairs of scores differ, by the median distance or, where that is zero, twice the mean one.
    alike = 0.5 * (1 + math.exp(-0.5))
    low = 0.5 * (1 + math.exp(-2))
    assert (1 - alike) / (2 * n) * 0.8 < float(a[:, 1].mean()) < (1 - low) / (2 * n) * 1.2
    assert (a[:, 0] > 5 * a[:, 1]).double().mean() > 0.95


# -- standard errors, tolerances, deadlines ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapley_sampling", "kernel_shap"])
def test_a_standard_error_is_what_answers_vary_by(name):
    score, x, b = game(10)
    explain = {
        "shapley_sampling": eg.shapley_sampling(score, samples=20),
        "kernel_shap": eg.kernel_shap(score, samples=200),
    }[name]
    found = [eg.with_standard_error(explain)(x, b, key=k) for k in range(100)]
    answers, errors = (torch.stack(t) for t in zip(*found, strict=True))
    apart = answers - eg.exact_shapley(score)(x, b)
    # The mean over 100 keys is near the truth, and 68 and 95 % of the keys are within one and two errors of it.
    assert (apart.mean(0).abs() < 4 * answers.std(0) / 10).all()
    assert 0.8 < float(errors.mean() / answers.std(0).mean()) < 1.2
    for times, share in ((1, 0.68), (2, 0.95)):
        assert abs(float((apart.abs() < times * errors).double().mean()) - share) < 0.06
    assert_alike(found[0][0], explain(x, b, key=0))


def test_too_few_samples_have_no_error_to_speak_of():
    score, x, b = game(10)
    for explain in (eg.shapley_sampling(score, samples=1), eg.kernel_shap(score, samples=22)):
        a, error = eg.with_standard_error(explain)(x, b, key=0)
        assert torch.isinf(error).all()
        close(a.sum(), score(x) - score(b))
    score, x, b = game(4)
    with pytest.raises(TypeError, match="exact_shapley, which gives no error"):
        eg.with_standard_error(eg.exact_shapley(score))(x, b)


def test_the_error_of_few_samples_is_still_honest():
    score, x, b = game(10)
    explain = eg.with_standard_error(eg.kernel_shap(score, samples=50))
    found = [explain(x, b, key=k) for k in range(100)]
    answers, errors = (torch.stack(t) for t in zip(*found, strict=True))
    assert float((answers - answers.mean(0)).abs().lt(2 * errors).double().mean()) > 0.9


def test_sampling_stops_at_its_tolerance():
    score, x, b = game(5)
    runs = []

    def counted(z):
        runs.append(1)
        return score(z)

    def count(**static):
        runs.clear()
        with eg.execution(chunk=1, evaluation="whole"):
            a, error = eg.with_standard_error(eg.shapley_sampling(counted, **static))(x, b, key=2)
        assert len(runs) % 12 == 0
        return len(runs) // 12, a, error

    most, _, unhurried = count(samples=200)
    assert most == 200
    rough = float(unhurried.max() / eg.exact_shapley(score)(x, b).abs().max()) * (200 / 40) ** 0.5
    taken, a, error = count(samples=200, tolerance=rough)
    assert taken in (32, 64, 128)
    assert float(error.max()) <= rough * float(a.abs().max())
    close(a, eg.shapley_sampling(score, samples=taken)(x, b, key=2))
    assert count(samples=200, tolerance=100.0)[0] == 16
    assert count(samples=7, tolerance=100.0)[0] == 7


@pytest.mark.slow
def test_each_example_of_a_batch_stops_for_itself():
    score, x, b = game(5)
    xs = torch.stack([x, b + 0.1 * (x - b), 3 * x])
    explain = eg.shapley_sampling(score, samples=200, tolerance=0.03)
    together = eg.batched(explain, in_dims=(0, None))(xs, b, key=1)
    for one, alone in zip(xs, together, strict=True):
        close(explain(one, b, key=1), alone)


def test_kernel_shap_stops_at_its_tolerance():
    score, x, b = game(12)
    taken = []

    def counted(z):
        taken.append(1)
        return score(z)

    counts = []
    for tolerance in (10.0, 0.05, None):
        taken.clear()
        explain = eg.kernel_shap(counted, samples=2000, tolerance=tolerance)
        with eg.execution(chunk=1):
            a, error = eg.with_standard_error(explain)(x, b, key=2)
        assert tolerance is None or error.max() <= tolerance * a.abs().max()
        counts.append(len(taken))
        close(a.sum(), score(x) - score(b))
        if tolerance == 10.0:  # the answer is that of as many samples
            close(a, eg.kernel_shap(score, samples=len(taken))(x, b, key=2))
    assert counts[0] == 2 + 2 * (12 + 16)
    assert counts[0] < counts[1] < counts[2] == 2000


@pytest.fixture
def clock(monkeypatch):
    """A deadline that passes after so many runs of the score."""

    class Clock:
        runs, most, share = 0, 10**9, None

        def watch(self, score):
            def watched(z):
                self.runs += 1
                return score(z)

            return watched

    here = Clock()
    monkeypatch.setattr(Execution, "left", lambda self: 1.0 if here.runs < here.most else 0.0)
    return here


def at_deadline(clock, most, explain, *args, **kwargs):
    clock.runs, clock.most = 0, most
    with (
        eg.execution(chunk=1, evaluation="whole") as execution,
        pytest.warns(eg.ExecutionWarning, match="the deadline passed"),
    ):
        a = explain(*args, **kwargs)
    clock.most = 10**9
    assert {e["event"] for e in execution.events} - {"evaluation"} == {"partial"}
    clock.share = partial_share(execution.events)
    assert 0 < clock.share < 1
    return a


@pytest.mark.parametrize("most", [10, 13, 20, 25, 38])
def test_sampling_at_a_deadline_is_that_of_its_whole_samples(clock, most):
    score, x, b = game(4)
    explain = eg.shapley_sampling(clock.watch(score), samples=10)
    a = at_deadline(clock, most, explain, x, b, key=3)
    assert clock.runs <= most
    close(a.sum(), score(x) - score(b))
    close(a, eg.shapley_sampling(score, samples=most // 10)(x, b, key=3))
    assert clock.share == pytest.approx(most // 10 / 10)


def test_parts_that_the_first_walk_did_not_reach_are_nan(clock):
    w = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    explain = eg.shapley_sampling(clock.watch(lambda z: (w * z).sum()), samples=1)
    x = torch.ones(1, 4)
    # An order and its reverse are walked side by side: five runs are the baseline and one step of both, and one more.
    a = at_deadline(clock, 5, explain, x, 0 * x, key=0)[0]
    forth = random.permutation(random.fold_in(0, 0), 4)
    # One step of both is a value of the first part of each order, and the other order did not come to it.
    assert a.isnan().all()
    assert clock.share == pytest.approx(5 / 10, abs=0.11)
    a = at_deadline(clock, 8, explain, x, 0 * x, key=0)[0]
    reached = forth[1:3]
    close(a[reached], w[0, reached])
    assert a[forth[[0, 3]]].isnan().all()


def test_a_deadline_between_a_sample_and_its_first_run(clock, monkeypatch):
    """The samples before it count; without any there is nothing to give."""
    score, x, b = game(4)
    walker, late_from = coalitions.walker, 0

    def watched(*args, **kwargs):
        along, calls = walker(*args, **kwargs), []

        def walks(orders):
            if len(calls) >= late_from:
                clock.most = 0
                raise eg.DeadlineExceeded("the deadline passed before a run")
            calls.append(1)
            return along(orders)

        return walks

    monkeypatch.setattr("esegeta.coalitions.walker", watched)
    clock.runs, clock.most = 0, 5
    with pytest.raises(eg.DeadlineExceeded):
        eg.shapley_sampling(score, samples=3)(x, b, key=3)
    late_from = 2
    clock.runs, clock.most = 0, 5
    with pytest.warns(eg.ExecutionWarning, match="the first 2 of 3 samples"):
        a = eg.shapley_sampling(score, samples=3)(x, b, key=3)
    clock.most = 10**9
    close(a, eg.shapley_sampling(score, samples=2)(x, b, key=3))


def test_kernel_shap_at_a_deadline_uses_what_there_is(clock):
    score, x, b = game(10)
    explain = eg.kernel_shap(clock.watch(score), samples=400)
    a = at_deadline(clock, 101, explain, x, b, key=3)
    close(a, eg.kernel_shap(score, samples=100)(x, b, key=3))
    exact = eg.exact_shapley(score)(x, b)
    off = at_deadline(clock, 900, eg.kernel_shap(clock.watch(score), samples=2**10), x, b, key=3) - exact
    assert off.abs().max() < 0.1 * exact.abs().max()
    clock.runs, clock.most = 0, 20
    with (
        eg.execution(chunk=1),
        pytest.warns(eg.ExecutionWarning),
        pytest.raises(eg.DeadlineExceeded, match=r"kernel_shap: .* after 20 runs, too few for 10 features"),
    ):
        explain(x, b, key=3)


def test_owen_values_at_a_deadline_are_complete(clock):
    score, x, b = game(9)
    explain = eg.partition_shap(clock.watch(score))
    for most in (2, 3, 4, 5, 11, 30):
        close(at_deadline(clock, most, explain, x, b).sum(), score(x) - score(b))
    # A group and a half of the second round: the half is left out.
    close(at_deadline(clock, 7, explain, x, b), at_deadline(clock, 6, explain, x, b))


def test_the_others_at_a_deadline(clock):
    score, x, b = game(6)
    watched = clock.watch(score)
    a = at_deadline(clock, 30, eg.lime(watched, samples=100), x, b, key=1)
    close(a, eg.lime(score, samples=30)(x, b, key=1))
    a = at_deadline(clock, 30, eg.hsic_attribution(watched, samples=100), x, b, key=1)
    close(a, eg.hsic_attribution(score, samples=30)(x, b, key=1))
    a = at_deadline(clock, 30, eg.sobol_attribution(watched, samples=32), x, b, key=1)
    close(a, eg.sobol_attribution(score, samples=4)(x, b, key=1))  # 28 runs are four points
    for explain in (eg.exact_shapley(watched), eg.sobol_attribution(watched)):
        clock.runs, clock.most = 0, 13
        extra = {"key": 1} if "sobol" in explain.__name__ else {}
        with (
            eg.execution(chunk=1),
            pytest.warns(eg.ExecutionWarning),
            pytest.raises(eg.DeadlineExceeded, match=rf"{explain.__name__}: the deadline passed after 13 "),
        ):
            explain(x, b, **extra)


# -- features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_answers_are_those_of_any_chunk_and_beside_any_others(name, axes):
    shape = (2, *(7, 5, 4)[:axes])
    xs, b = draw(3, *shape), draw(*shape, key=1)
    score = lambda z: (z * z.roll(1, -1)).sum() + z.max() * z.mean()
    explain = (
        EVERY[name](score) if name == "channel_shapley" else EVERY[name](score, features=features.grid(4))
    )
    extra = {"key": 5} if name in KEYED else {}
    alone = torch.stack([explain(x, b, **extra) for x in xs])
    for chunk in (1, 3, 1000):
        with eg.execution(chunk=chunk):
            close(eg.batched(explain, in_dims=(0, None))(xs, b, **extra), alone, tolerance=1e-9)
    others = torch.stack([9 * xs[2], xs[1], xs[0] - 4])
    close(eg.batched(explain, in_dims=(0, None))(others, b, **extra)[1], alone[1], tolerance=1e-9)


@pytest.mark.parametrize("name", [n for n in EVERY if n != "channel_shapley"])
def test_every_element_of_a_part_has_the_value_of_the_part(name):
    x = draw(2, 4, 4)
    score = lambda z: (z[:, :2].sum() * z[:, 2:, :2].sum()) + z.square().sum()
    a = run(name, score, x, features=features.grid(2))
    assert torch.equal(a, a[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert torch.equal(a[0], a[1])
    if name in SHAPLEY:
        close(a[0, ::2, ::2].sum(), score(x) - score(0 * x))


@pytest.mark.parametrize("name", [n for n in EVERY if n != "channel_shapley"])
def test_regions_that_differ_between_examples(name):
    halves = features.segments(lambda x: (x[0] > x[0].median()).long(), 2)
    xs = draw(2, 1, 4, 5)
    score = lambda z: z.square().sum() * z.mean()
    extra = {"key": 5} if name in KEYED else {}
    explain = EVERY[name](score, features=halves)
    alone = torch.stack([explain(x, 0 * x, **extra) for x in xs])
    close(eg.batched(explain)(xs, 0 * xs, **extra), alone, tolerance=1e-9)


@pytest.mark.parametrize("name", [n for n in EVERY if n != "channel_shapley"])
def test_windows_that_overlap(name):
    x = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    a = run(name, lambda z: z.sum(), x, features=features.windows(2, stride=1))
    assert a[0, 1] == (a[0, 0] + a[0, 2]) / 2
    if name in SHAPLEY:  # of the two windows, which share the middle
        close(a, torch.tensor([[2.0, 3.5, 5.0]], dtype=torch.float64))


def test_enumeration_over_elements_keeps_every_axiom():
    (one, x, b), (two, _, _) = game(6), game(6, key=4)
    explain = eg.exact_shapley(one)
    assert float(eg.axioms.completeness(explain, one)(x, b).abs()) < 1e-10
    assert float(eg.axioms.linearity(eg.exact_shapley, one, two)(x, b)) < 1e-10
    ignored = torch.tensor([[False, True, False, False, True, False]])
    idle = eg.exact_shapley(lambda z: one(torch.where(ignored, 0.3, z)))
    assert float(eg.axioms.dummy(idle, ignored)(x, b)) < 1e-12
    swap = torch.tensor([3, 1, 2, 0, 4, 5])
    same, base = x[:, [0, 1, 2, 0, 4, 5]], b[:, [0, 1, 2, 0, 4, 5]]
    alike = eg.exact_shapley(lambda z: one(z) + one(z[:, swap]))
    assert float(eg.axioms.symmetry(alike, swap)(same, base)) < 1e-10


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture
def our_own_messages():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def refused(kind, text):
    return pytest.raises(kind, match="(?s)^" + text)


@pytest.mark.parametrize("name", [n for n in EVERY if n != "channel_shapley"])
@pytest.mark.usefixtures("our_own_messages")
def test_features_have_to_fit(name):
    x = torch.zeros(1, 4, 4)
    wrong = features.labels(torch.tensor([[0, 1], [2, 3]]))
    with refused(
        ValueError, r"features.labels: expected a map on the grid \(4, 4\) of the image, got \(2, 2\)"
    ):
        run(name, torch.sum, x, features=wrong)
    with refused(TypeError, rf"{name}: expected features: a function of the image, got .*features.grid\(8\)"):
        run(name, torch.sum, x, features=torch.zeros(4, 4).long())


def test_more_features_than_a_method_can_take():
    many, x = torch.zeros(1, 1_000_000), torch.zeros(1, 17)
    with refused(
        ValueError,
        r"exact_shapley: expected at most 16 features, which take 65,536 runs of the score, "
        r"got 17, which take 2\^17\. Use coarser ones, .* or sample the orders with esegeta\.shapley_sampling\.$",
    ):
        eg.exact_shapley(torch.sum)(x, x)
    with refused(ValueError, r"exact_shapley: .* got 1,000,000, which take 2\^1000000"):
        eg.exact_shapley(torch.sum)(many, many)
    with refused(
        ValueError,
        r"shapley_sampling: expected at most 1,000,000 runs .* got 1,000,000 features, which take 50,000,050\. "
        r"Use coarser ones, for example .*grid\(8\)",
    ):
        eg.shapley_sampling(torch.sum)(many, many, key=0)
    with refused(ValueError, r"sobol_attribution: expected at most 1,000,000 runs .* 1,000,000 features"):
        eg.sobol_attribution(torch.sum)(many, many, key=0)
    with refused(
        ValueError, r"sobol_attribution: expected at most 10,600 features, got 12,000\. Use coarser ones"
    ):
        eg.sobol_attribution(torch.sum, samples=2)(many[:, :12_000], many[:, :12_000], key=0)
    with refused(ValueError, r"channel_shapley: expected at most 16 features"):
        eg.channel_shapley(torch.sum)(torch.zeros(17, 2), torch.zeros(17, 2))


def test_too_few_samples():
    x = torch.zeros(1, 20)
    with refused(
        ValueError,
        r"kernel_shap: expected samples >= 42 for 20 features, got samples=41, which do not determine 20 values\. "
        r"Raise samples, or use coarser features",
    ):
        eg.kernel_shap(torch.sum, samples=41)(x, x, key=0)
    assert eg.kernel_shap(torch.sum, samples=42)(x, x, key=0).shape == x.shape
    with refused(ValueError, "kernel_shap: expected samples >= 8 for 3 features, got samples=7"):
        eg.kernel_shap(torch.sum, samples=7)(x[:, :3], x[:, :3], key=0)
    for name, least in (("lime", 2), ("hsic_attribution", 2), ("sobol_attribution", 2)):
        with refused(ValueError, f"{name}: expected samples to be an int >= {least}, got 1"):
            getattr(eg, name)(torch.sum, samples=1)


@pytest.mark.usefixtures("our_own_messages")
def test_other_settings_that_make_no_sense():
    x = torch.zeros(1, 3)
    for name in ("width", "ridge"):
        with refused(ValueError, f"lime: expected {name} > 0, got 0"):
            eg.lime(torch.sum, **{name: 0})
        with refused(ValueError, f"lime: expected {name} to be a finite number >= 0, got -1"):
            eg.lime(torch.sum, **{name: -1})
    with refused(ValueError, "shapley_sampling: expected tolerance to be a finite number >= 0, got -0.1"):
        eg.shapley_sampling(torch.sum, tolerance=-0.1)
    with refused(ValueError, "lime_fit: expected resamples to be an int >= 2, got 1"):
        lime_fit(torch.sum, resamples=1)
    with refused(TypeError, "lime_fit: expected key= .*, got no key"):
        lime_fit(torch.sum)(x, x)
    with refused(ValueError, "lime_fit: expected baseline with the shape of the input"):
        lime_fit(torch.sum)(x, x[:, :2], key=0)
    for tree in ((0, 1), (0, 1, 1), (0, (1, 3)), (0, (1, ())), "012", (0, 1, 2, 3), (0, 1, 2.5)):
        with refused(
            ValueError, "partition_shap: expected a tree of the features 0 to 2, got .*Name every feature"
        ):
            eg.partition_shap(torch.sum, tree=tree)(x, x)
    maps = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    with refused(
        ValueError, r"hierarchy\.of_labels: expected regions within one region .*, got region 0, which"
    ):
        hierarchy.of_labels(*maps)
    with refused(ValueError, r"hierarchy\.of_labels: expected maps of whole numbers, all of shape \(3,\)"):
        hierarchy.of_labels(maps[0], maps[1][:2])
    with refused(ValueError, r"hierarchy\.of_labels: expected maps of whole numbers"):
        hierarchy.of_labels(maps[0].float())


@pytest.mark.parametrize("name", sorted(KEYED))
def test_a_key_is_missing(name):
    with refused(TypeError, f"{name}: expected key="):
        EVERY[name](torch.sum)(torch.zeros(1, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("name", [n for n in EVERY if n != "channel_shapley"])
def test_a_score_without_a_value_for_one_perturbation_says_which(name):
    x = torch.ones(1, 3)
    score = lambda z: torch.where(z[0, 1] < 0.5, torch.nan, z.sum())
    with refused(
        ValueError, rf"{name}: expected a finite score .*, got NaN or infinity for perturbation \d+\."
    ):
        run(name, score, x)


def test_the_number_of_the_perturbation_is_that_of_its_coalition():
    x = torch.ones(1, 3)
    score = lambda z: torch.where((z[0] == torch.tensor([0.0, 1.0, 1.0])).all(), torch.nan, z.sum())
    with refused(
        ValueError, r"exact_shapley: .* for perturbation 6\."
    ):  # 110 in base two, the last part first
        eg.exact_shapley(score)(x, 0 * x)


# -- captum --------------------------------------------------------------------------------------------------------


def captums(score):
    return lambda batch: torch.stack([score(z) for z in batch])


def image_game():
    """A score of an image of two channels with six regions, its label map too."""
    x, b = draw(2, 4, 6), 0.3 * draw(2, 4, 6, key=1)
    w = draw(2, 4, 6, key=2)
    score = lambda z: (
        (w * z * z.roll(1, -1)).sum().tanh() * 3 + z.max() * (w * z).mean() + z[0, :2, :3].prod()
    )
    labels = features.grid((2, 2))(x).labels[0]
    return score, x, b, labels


def test_captums_enumeration_agrees():
    attr = pytest.importorskip("captum.attr")
    score, x, b, labels = image_game()
    explain = eg.exact_shapley(score, features=features.labels(labels.clamp(max=4)))
    theirs = attr.ShapleyValues(captums(score)).attribute(
        x[None], baselines=b[None], feature_mask=labels.clamp(max=4)[None, None]
    )
    close(explain(x, b), theirs[0].expand_as(x).double(), tolerance=1e-6)


@pytest.mark.slow
def test_captums_sampling_has_our_expectation():
    attr = pytest.importorskip("captum.attr")
    score, x, b, labels = image_game()
    torch.manual_seed(0)
    many = torch.stack(
        [
            attr.ShapleyValueSampling(captums(score)).attribute(
                x[None], baselines=b[None], feature_mask=labels[None, None], n_samples=10
            )[0]
            for _ in range(40)
        ]
    ).double()
    exact = eg.exact_shapley(score, features=features.labels(labels))(x, b)
    error = many.std(0) / 40**0.5
    assert ((many.mean(0) - exact).abs() < 4 * error).all()
    # For the same 100 orders ours vary less, because an order and its reverse err in opposite directions.
    explain = eg.shapley_sampling(score, features=features.labels(labels), samples=5)
    ours = torch.stack([explain(x, b, key=k) for k in range(40)])
    assert ((ours.mean(0) - exact).abs() < 4 * ours.std(0) / 40**0.5 + 1e-9).all()
    assert ours.std(0).mean() < many.std(0).mean()


def test_captums_ablation_agrees():
    attr = pytest.importorskip("captum.attr")
    score, x, b, labels = image_game()
    theirs = attr.FeatureAblation(captums(score)).attribute(
        x[None], baselines=b[None], feature_mask=labels[None, None]
    )
    close(
        eg.feature_ablation(score, features=features.labels(labels))(x, b), theirs[0].double(), tolerance=1e-6
    )


@pytest.mark.peers
def test_captums_kernel_shap_over_all_coalitions_agrees():
    attr = pytest.importorskip("captum.attr")
    pytest.importorskip("sklearn")
    score, x, b, labels = image_game()
    d = 6

    class All(attr.KernelShap):
        def kernel_shap_perturb_generator(self, original, **kwargs):
            for row in itertools.product((0, 1), repeat=d):
                yield torch.tensor([row])

        def kernel_shap_similarity_kernel(self, _, __, sample, **kwargs):
            k = int(sample.sum())
            return torch.tensor([(d - 1) / (math.comb(d, k) * k * (d - k)) if 0 < k < d else 1e6])

    theirs = All(captums(score)).attribute(
        x[None], baselines=b[None], feature_mask=labels[None, None], n_samples=2**d
    )
    ours = eg.kernel_shap(score, features=features.labels(labels), samples=2**d)(x, b, key=0)
    close(
        ours, theirs[0].double(), tolerance=1e-4
    )  # their least squares are in float32, with end points as weights


@pytest.mark.peers
def test_captums_lime_with_our_presences_and_weights_agrees():
    attr = pytest.importorskip("captum.attr")
    pytest.importorskip("sklearn")
    from captum._utils.models.linear_model import SkLearnRidge

    score, x, b, labels = image_game()
    d, n = 6, 80
    z, w = lime_design(n, d, 2)
    place = {tuple(row.long().tolist()): float(weight) for row, weight in zip(z, w, strict=True)}

    def presences(original, **kwargs):
        yield from (row[None].long() for row in z)

    theirs = attr.Lime(
        captums(score),
        interpretable_model=SkLearnRidge(alpha=1.0),
        similarity_func=lambda original, sample, row, **kwargs: torch.tensor([place[tuple(row[0].tolist())]]),
        perturb_func=presences,
    ).attribute(x[None], baselines=b[None], feature_mask=labels[None, None], n_samples=n)
    close(
        eg.lime(score, features=features.labels(labels), samples=n)(x, b, key=2),
        theirs[0].double(),
        tolerance=1e-5,
    )


@pytest.mark.peers
def test_scikit_learns_ridge_agrees_with_a_fit_of_lime():
    linear_model = pytest.importorskip("sklearn.linear_model")
    d, n = 6, 80
    score, x, b = game(d)
    z, w = lime_design(n, d, 2)
    v = torch.stack([values(score, x, b)((row > 0).tolist()) for row in z])
    theirs = linear_model.Ridge(alpha=1.0, fit_intercept=True).fit(
        z.numpy(), v.numpy(), sample_weight=w.numpy()
    )
    fit = lime_fit(score, samples=n)(x, b, key=2)
    close(fit.coefficients, torch.tensor(theirs.coef_))
    assert float(fit.intercept) == pytest.approx(theirs.intercept_)
    assert float(fit.r2) == pytest.approx(theirs.score(z.numpy(), v.numpy(), sample_weight=w.numpy()))
