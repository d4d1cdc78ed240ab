"""Residuals of axioms against closed forms and slow loops."""

import itertools
import math

import pytest
import torch
from together import together

import esegeta as eg
from esegeta import axioms
from esegeta.axioms import exact

SHAPES = {1: (2, 5), 2: (2, 3, 4), 3: (2, 2, 3, 2)}


def draw(key, shape, dtype=torch.float64):
    return eg.random.normal(key, shape, dtype=dtype)


def smooth_score(z):
    """Every element matters, each in its own way, and all interact."""
    w = torch.cos(1.3 * torch.arange(z.numel(), dtype=z.dtype)).reshape(z.shape)
    return (w * z).sum() ** 2 / 4 + (w * z**2).sum()


def other_score(z):
    return (z.roll(1, -1) * z).sum() - z.sum()


def times_difference(score):
    """Integrated gradients with one node: complete for quadratics."""
    return eg.integrated_gradients(score, steps=1)


def one_map(method):
    """The same method with one map for all channels."""
    return lambda score: lambda *args, **kwargs: method(score)(*args, **kwargs).sum(0, keepdim=True)


# -- what each residual is: the formula as a plain loop --------------------------------------------------------


def halves(shape):
    return (torch.arange(math.prod(shape)) % 3 == 0).reshape(shape)


def blocks(shape):
    return (torch.arange(math.prod(shape[1:])) % 3).reshape(shape[1:]) - 1


def turn(shape):
    """Of the first spatial axis the direction, and the order of all."""
    n = len(shape) - 1
    matrix = torch.zeros(n, n)
    for i in range(n):
        matrix[i, (i + 1) % n] = -1 if i == 0 else 1
    return matrix


RANDOMISED = [lambda z: smooth_score(z * 0.5 + 1), lambda z: smooth_score(z.roll(1, -1))]
# name -> (residual of a shape and dtype, whether it is signed)
RESIDUALS = {
    "completeness": lambda s, d: axioms.completeness(times_difference(other_score), smooth_score),
    "conservation": lambda s, d: axioms.conservation(times_difference(smooth_score), smooth_score),
    "sensitivity_n": lambda s, d: axioms.sensitivity_n(
        times_difference(smooth_score), smooth_score, halves(s)
    ),
    "efficiency_of_regions": lambda s, d: axioms.efficiency_of_regions(
        times_difference(smooth_score), smooth_score, blocks(s)
    ),
    "dummy": lambda s, d: axioms.dummy(times_difference(smooth_score), halves(s)),
    "sensitivity_a": lambda s, d: axioms.sensitivity_a(
        lambda x, b: torch.zeros_like(x), lambda z: smooth_score(z)
    ),
    "symmetry": lambda s, d: axioms.symmetry(
        times_difference(smooth_score), torch.arange(math.prod(s)).flip(0)
    ),
    "monotonicity": lambda s, d: axioms.monotonicity(times_difference(other_score)),
    "continuity": lambda s, d: axioms.continuity(times_difference(smooth_score), torch.full(s, 0.5, dtype=d)),
    "linearity": lambda s, d: axioms.linearity(
        lambda score: lambda x, b: times_difference(score)(x, b).abs(), smooth_score, other_score
    ),
    "scale_of_output": lambda s, d: axioms.scale_of_output(
        lambda score: lambda x, b: times_difference(score)(x, b) ** 2, smooth_score, factor=3
    ),
    "implementation_invariance": lambda s, d: axioms.implementation_invariance(
        times_difference, smooth_score, other_score
    ),
    "class_sensitivity": lambda s, d: axioms.class_sensitivity(
        lambda score: lambda x, b: x - b, smooth_score, other_score
    ),
    "parameter_dependence": lambda s, d: axioms.parameter_dependence(
        times_difference, smooth_score, RANDOMISED
    ),
    "shift": lambda s, d: axioms.shift(
        lambda score: lambda x, b: x * eg.gradient(score)(x), smooth_score, torch.full(s, 0.5, dtype=d)
    ),
    "translation_equivariance": lambda s, d: axioms.translation_equivariance(
        lambda score: lambda x, b: times_difference(score)(x, b).cumsum(-1), smooth_score, (1,) * (len(s) - 1)
    ),
    "affine_equivariance": lambda s, d: axioms.affine_equivariance(
        lambda score: lambda x, b: times_difference(score)(x, b).cumsum(1), smooth_score, turn(s)
    ),
}


def test_every_public_residual_is_in_the_table():
    public = {n for n in vars(axioms) if callable(getattr(axioms, n)) and not n.startswith("_")}
    assert public - {"axiom"} == set(RESIDUALS)  # that is the decorator


@together("dims", SHAPES)
@together("name", RESIDUALS)
def test_many_examples_equal_a_loop(name, dims):
    shape = SHAPES[dims]
    residual = RESIDUALS[name](shape, torch.float64)
    xs, bs = draw(1, (3, *shape)), draw(2, (3, *shape))
    loop = torch.stack([residual(x, b) for x, b in zip(xs, bs, strict=True)])
    assert loop.shape == (3,)
    # Each of these explanations breaks its axiom on every example: what is compared is no zero.
    assert (loop.abs() > 1e-3).all()
    torch.testing.assert_close(torch.func.vmap(residual)(xs, bs), loop, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(eg.batched(residual)(xs, bs), loop, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals_keep_single_precision_and_have_derivatives(name):
    shape = SHAPES[2]
    single = RESIDUALS[name](shape, torch.float32)
    x, b = draw(1, shape), draw(2, shape)
    value = RESIDUALS[name](shape, torch.float64)(x, b)
    found = single(x.float(), b.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), value, rtol=1e-3, atol=1e-4)
    slope = torch.func.grad(lambda x: RESIDUALS[name](shape, torch.float64)(x, b).square())(x)
    assert slope.isfinite().all()


@pytest.mark.parametrize("name", RESIDUALS)
def test_keys_and_stacks_of_baselines_reach_the_explanation(name):
    shape = SHAPES[1]
    seen = []

    def recorded(x, baselines, *, key):
        seen.append((baselines.shape, key))
        return (x - baselines).mean(0) * draw(key, shape)

    explain = lambda score: recorded
    arguments = {
        "completeness": (recorded, smooth_score),
        "conservation": (recorded, smooth_score),
        "sensitivity_n": (recorded, smooth_score, halves(shape)),
        "efficiency_of_regions": (recorded, smooth_score, blocks(shape)),
        "dummy": (recorded, halves(shape)),
        "sensitivity_a": (recorded, smooth_score),
        "symmetry": (recorded, torch.arange(10).flip(0)),
        "monotonicity": (recorded,),
        "continuity": (recorded, torch.ones(shape, dtype=torch.float64)),
        "parameter_dependence": (explain, smooth_score, RANDOMISED),
        "shift": (explain, smooth_score, torch.ones(shape, dtype=torch.float64)),
        "translation_equivariance": (explain, smooth_score, (1,)),
        "affine_equivariance": (explain, smooth_score, [[-1]]),
        "scale_of_output": (explain, smooth_score),
    }.get(name, (explain, smooth_score, other_score))
    residual = getattr(axioms, name)(*arguments)(draw(1, shape), draw(2, (4, *shape)), key=7)
    assert residual.shape == ()
    assert residual.isfinite()
    assert set(seen) == {(torch.Size((4, *shape)), 7)}


def test_random_keys_may_differ_between_examples():
    explain = lambda score: lambda x, *, key: eg.gradient(score)(x) * draw(key, (1, 3))
    residual = axioms.shift(explain, smooth_score, torch.ones(1, 3, dtype=torch.float64))
    xs, keys = draw(1, (2, 1, 3)), torch.tensor([3, 4])
    found = torch.func.vmap(lambda x, k: residual(x, key=k))(xs, keys)
    assert found.max() < 1e-12
    noisy = lambda x, k: axioms.conservation(explain(smooth_score), smooth_score)(x, key=k)
    loop = torch.stack([noisy(x, k) for x, k in zip(xs, keys, strict=True)])
    torch.testing.assert_close(torch.func.vmap(noisy)(xs, keys), loop)


@pytest.mark.parametrize("dims", SHAPES)
def test_sums_against_the_formula(dims):
    shape = SHAPES[dims]
    x, bs = draw(1, shape), draw(2, (3, *shape))
    explain, f, mask, labels = (lambda x, *refs: x**2), smooth_score, halves(shape), blocks(shape)
    a = x**2
    close = lambda found, expected: torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for refs, starts in (((), [torch.zeros_like(x)]), ((bs[0],), [bs[0]]), ((bs,), list(bs))):
        before = sum(f(b) for b in starts) / len(starts)
        close(axioms.completeness(explain, f)(x, *refs), a.sum() - (f(x) - before))
        close(axioms.conservation(explain, f)(x, *refs), a.sum() - f(x))
        without = sum(f(torch.where(mask, b, x)) for b in starts) / len(starts)
        close(axioms.sensitivity_n(explain, f, mask)(x, *refs), a[mask].sum() - (f(x) - without))
        hidden = sum(f(torch.where(labels >= 0, b, x)) for b in starts) / len(starts)
        regions = sum(a[:, labels == n].mean() for n in (0, 1))
        close(axioms.efficiency_of_regions(explain, f, labels)(x, *refs), regions - (f(x) - hidden))


@pytest.mark.parametrize("dims", SHAPES)
def test_elements_against_the_formula(dims):
    shape = SHAPES[dims]
    x, bs, step = draw(1, shape), draw(2, (3, *shape)) / 4, draw(3, shape)
    explain, mask = (lambda x, *refs: x**3 - x), halves(shape)
    a = explain(x)
    order = torch.argsort(draw(4, (x.numel(),)))
    assert axioms.dummy(explain, mask)(x) == max(abs(float(v)) for v in a[mask])
    assert axioms.dummy(explain, mask[0])(x) == a[:, mask[0]].abs().max()
    expected = max(abs(float(a.flatten()[i] - a.flatten()[j])) for i, j in enumerate(order))
    assert axioms.symmetry(explain, order)(x) == expected
    voxels = torch.argsort(draw(5, (x[0].numel(),)))
    expected = max(abs(float(c.flatten()[i] - c.flatten()[j])) for c in a for i, j in enumerate(voxels))
    assert axioms.symmetry(explain, voxels)(x) == expected
    assert axioms.continuity(explain, step)(x) == (explain(x + step) - a).abs().max()
    worst = 0.0
    for value, one, many in zip(a.flatten(), x.flatten(), bs.flatten(1).T, strict=True):
        if (one > many).all():
            worst = max(worst, -float(value))
        if (one < many).all():
            worst = max(worst, float(value))
    assert worst > 0
    assert axioms.monotonicity(explain)(x, bs) == pytest.approx(worst, rel=1e-12)


def test_sensitivity_a():
    f = smooth_score
    b = draw(1, (1, 4))
    x = b.clone()
    x[0, 2] += 1
    blind = lambda x, *refs: torch.tensor([[1.0, 2.0, 0.0, 3.0]], dtype=x.dtype)
    assert axioms.sensitivity_a(blind, f)(x, b) == (f(x) - f(b)).abs()
    assert axioms.sensitivity_a(lambda x, b: blind(x) + 1e-30, f)(x, b) == 0
    # Several baselines that all differ there; and the map of several channels.
    many = torch.stack([b, b.clone()])
    many[1, 0, 2] += 3
    mean = (f(many[0]) + f(many[1])) / 2
    torch.testing.assert_close(axioms.sensitivity_a(blind, f)(x, many), (f(x) - mean).abs())
    x2, b2 = torch.cat([x, b]), torch.cat([b, b])
    assert axioms.sensitivity_a(blind, f)(x2, b2) == (f(x2) - f(b2)).abs()
    # Without a baseline: zero.
    alone = torch.where(torch.arange(4) == 2, x, 0.0)
    assert axioms.sensitivity_a(blind, f)(alone) == f(alone).abs()
    # What is not finite is no attribution.
    assert axioms.sensitivity_a(lambda x, b: blind(x) * math.nan, f)(x, b).isnan()
    assert axioms.class_sensitivity(lambda s: lambda x: x * math.nan, f, other_score)(x).isnan()
    assert axioms.dummy(lambda x: x * math.nan, torch.ones(1, 4, dtype=torch.bool))(x).isnan()


def test_class_sensitivity():
    f, g, x, b = smooth_score, other_score, draw(1, (1, 4)), draw(2, (1, 4))
    same = lambda score: lambda x, *refs: x
    expected = ((f(x) - f(b)) - (g(x) - g(b))).abs()
    torch.testing.assert_close(axioms.class_sensitivity(same, f, g)(x, b), expected)
    assert axioms.class_sensitivity(eg.gradient, f, g)(x) == 0
    # A constant makes no difference to explain.
    assert axioms.class_sensitivity(eg.gradient, f, lambda z: f(z) + 5)(x) < 1e-12


def test_parameter_dependence_against_numpy():
    import numpy as np

    x = draw(1, (2, 4, 3))
    maps = [draw(10 + k, x.shape) * 10.0 ** (100 * k) for k in range(3)]
    number = lambda n: lambda z: z.sum() * 0 + n  # a network with one parameter
    of = lambda score: score(torch.zeros(1))
    expected = np.mean(
        [np.corrcoef(maps[0].flatten(), m.flatten() / m.abs().max())[0, 1] ** 2 for m in maps[1:]]
    )
    residual = lambda method, n, *others: float(
        axioms.parameter_dependence(method, number(n), [number(m) for m in others])(x)
    )
    assert residual(lambda score: lambda x: maps[int(of(score))], 0, 1, 2) == pytest.approx(
        expected, rel=1e-10
    )
    # A sign or a unit is no information on parameters; other constants are.
    assert residual(lambda score: lambda x: of(score) * x, -1, 3, -0.5) == pytest.approx(1)
    flat = lambda score: lambda x: torch.full_like(x, float(of(score)))
    assert residual(flat, 0.1, 0.1) == 1
    assert residual(flat, 0.1, 0.2) == 0
    assert residual(lambda score: lambda x: x if of(score) else torch.full_like(x, 0.1), 0, 1) == 0


@pytest.mark.parametrize("dims", SHAPES)
def test_moves_of_the_grid_against_numpy(dims):
    import numpy as np

    shape = SHAPES[dims]
    x, b = draw(1, shape), draw(2, shape)
    offsets = tuple(range(1, dims + 1))
    axes = tuple(range(1, dims + 1))
    roll = lambda z: torch.from_numpy(np.roll(z.numpy(), offsets, axes))
    back = lambda z: torch.from_numpy(np.roll(z.numpy(), [-o for o in offsets], axes))
    values = lambda score: lambda x, b: (score(x) - score(b)) * x.cumsum(-1)  # knows where the image begins
    moved = values(lambda z: smooth_score(back(z)))(roll(x), roll(b))
    expected = (moved - roll(values(smooth_score)(x, b))).abs().max()
    assert expected > 0.1
    found = axioms.translation_equivariance(values, smooth_score, offsets)(x, b)
    torch.testing.assert_close(found, expected)

    # All signed permutations: the voxel at p goes to M p, voxel by voxel.
    for order in itertools.permutations(range(dims)):
        for signs in itertools.product((1, -1), repeat=dims):
            matrix = np.zeros((dims, dims))
            matrix[range(dims), order] = signs

            def there(z, matrix=matrix):
                sizes = np.abs(matrix) @ np.array(z.shape[1:])
                out = torch.full((z.shape[0], *sizes.astype(int)), math.nan, dtype=z.dtype)
                for p in np.ndindex(*z.shape[1:]):
                    centred = np.array(p) - (np.array(z.shape[1:]) - 1) / 2
                    q = matrix @ centred + (sizes - 1) / 2
                    out[(slice(None), *q.astype(int))] = z[(slice(None), *p)]
                return out

            def again(z, matrix=matrix, there=there):
                return there(z, matrix.T)

            expected = values(lambda z, again=again: smooth_score(again(z)))(there(x), there(b))
            expected = (expected - there(values(smooth_score)(x, b))).abs().max()
            found = axioms.affine_equivariance(values, smooth_score, matrix.tolist())(x, b)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dims", SHAPES)
def test_methods_without_places_of_their_own_move_along(dims):
    shape = SHAPES[dims]
    x, b = draw(1, shape), draw(2, shape)
    for method in (eg.integrated_gradients, one_map(eg.integrated_gradients), eg.feature_ablation):
        moves = [
            axioms.translation_equivariance(method, smooth_score, range(1, dims + 1)),
            axioms.affine_equivariance(method, smooth_score, turn(shape)),
            axioms.shift(method, smooth_score, torch.tensor(0.5, dtype=x.dtype)),
        ]
        assert max(float(move(x, b)) for move in moves) < 1e-10
    placed = lambda score: eg.feature_ablation(score, features=eg.features.grid(2))
    assert axioms.translation_equivariance(placed, smooth_score, (1,) * dims)(x, b) > 0.01


def test_maps_of_one_channel():
    shape = SHAPES[2]
    x, b = draw(1, shape), draw(2, shape)
    explain = one_map(eg.integrated_gradients)(smooth_score)
    assert axioms.completeness(explain, smooth_score)(x, b).abs() < 1e-10
    voxels = halves(shape)[0]
    ignoring = lambda z: smooth_score(torch.where(voxels, 0.0, z))
    assert axioms.dummy(one_map(eg.integrated_gradients)(ignoring), voxels)(x, b) == 0
    additive = lambda z: (z**2).sum()
    part = axioms.sensitivity_n(one_map(eg.integrated_gradients)(additive), additive, voxels)
    assert part(x, b).abs() < 1e-10
    swap = torch.arange(12).flip(0)
    assert axioms.symmetry(explain, swap)(x, b) == (explain(x, b) - explain(x, b).flip(1, 2)).abs().max()


# -- the axioms of known methods ------------------------------------------------------------------------------


def test_known_methods_keep_what_theorems_say():
    x, b = draw(1, (1, 2, 2)), draw(2, (1, 2, 2))
    additive = lambda z: (z**3 + z).sum()
    for n in range(1, 16):
        subset = torch.tensor([n >> k & 1 for k in range(4)], dtype=torch.bool).reshape(2, 2)
        part = axioms.sensitivity_n(eg.integrated_gradients(additive, steps=2), additive, subset)
        assert part(x, b).abs() < 1e-10
        part = axioms.sensitivity_n(eg.feature_ablation(smooth_score), smooth_score, subset)
        assert (part(x, b).abs() < 1e-10) == (int(subset.sum()) == 1)
    x, b = draw(1, (1, 2, 3)), draw(2, (1, 2, 3))
    labels = torch.tensor([[0, 0, 4], [4, 2, -1]])
    closed = torch.tensor([[0, 0, 2], [2, 1, -1]])
    shapley = eg.exact_shapley(smooth_score, features=eg.features.labels(closed))
    assert axioms.efficiency_of_regions(shapley, smooth_score, labels)(x, b).abs() < 1e-10
    ablation = eg.feature_ablation(smooth_score, features=eg.features.labels(closed))
    assert axioms.efficiency_of_regions(ablation, smooth_score, labels)(x, b).abs() > 0.01
    rising = lambda z: torch.relu(z).sum() + z.max()
    assert axioms.monotonicity(eg.exact_shapley(rising))(x, b) == 0
    assert axioms.monotonicity(eg.exact_shapley(smooth_score))(x, b) > 0
    assert axioms.scale_of_output(eg.saliency, smooth_score, factor=0.5)(x) < 1e-12
    assert axioms.linearity(eg.saliency, smooth_score, other_score)(x) > 0.01


# -- bad arguments --------------------------------------------------------------------------------------------

X = torch.ones(1, 2, 3)
BAD = {
    "a mask of numbers": (
        lambda: axioms.dummy(eg.gradient(smooth_score), torch.ones(1, 2, 3)),
        TypeError,
        r"axioms.dummy: expected ignored to be a boolean mask, got float32\(1, 2, 3\). Use ignored != 0.",
    ),
    "a mask of another shape": (
        lambda: axioms.dummy(eg.gradient(smooth_score), torch.ones(3, 2, dtype=torch.bool))(X),
        ValueError,
        r"expected ignored that broadcasts to the shape \(1, 2, 3\) of the attribution, got bool\(3, 2\)",
    ),
    "a mask with more channels than the map": (
        lambda: axioms.sensitivity_n(lambda x: x[:1], smooth_score, torch.ones(2, 3, dtype=torch.bool))(
            torch.ones(2, 3)
        ),
        ValueError,
        r"axioms.sensitivity_n: expected subset that broadcasts to the shape \(1, 3\) of the attribution",
    ),
    "a subset of numbers": (
        lambda: axioms.sensitivity_n(eg.gradient(smooth_score), smooth_score, torch.ones(1, 2, 3)),
        TypeError,
        "expected subset to be a boolean mask",
    ),
    "labels that are no numbers of parts": (
        lambda: axioms.efficiency_of_regions(eg.gradient(smooth_score), smooth_score, torch.ones(2, 3)),
        TypeError,
        "axioms.efficiency_of_regions: expected labels of whole numbers, got float32",
    ),
    "labels of another shape": (
        lambda: axioms.efficiency_of_regions(
            eg.gradient(smooth_score), smooth_score, torch.zeros(3, 2, dtype=torch.int64)
        )(X),
        ValueError,
        r"labels that broadcasts to the shape \(1, 2, 3\) of the attribution",
    ),
    "no labels": (
        lambda: axioms.efficiency_of_regions(eg.gradient(smooth_score), smooth_score, torch.full((2, 3), -1)),
        ValueError,
        "expected labels of at least one part, got none from 0 on",
    ),
    "labels of their own for each example": (
        lambda: torch.func.vmap(
            lambda x, n: axioms.efficiency_of_regions(eg.gradient(smooth_score), smooth_score, n)(x)
        )(X[None], torch.zeros(1, 2, 3, dtype=torch.int64)),
        ValueError,
        "expected labels that all examples share, got some that vmap maps over",
    ),
    "no permutation": (
        lambda: axioms.symmetry(eg.gradient(smooth_score), torch.tensor([0, 0, 1])),
        ValueError,
        r"axioms.symmetry: expected a permutation of 0 to n - 1, of shape \(n,\), got int64\(3,\)",
    ),
    "a permutation of something else": (
        lambda: axioms.symmetry(eg.gradient(smooth_score), torch.arange(4))(X),
        ValueError,
        "expected a permutation of the 6 elements or 6 voxels of the attribution, got one of 4",
    ),
    "a permutation of fractions": (
        lambda: axioms.symmetry(eg.gradient(smooth_score), torch.arange(6.0)),
        TypeError,
        "expected permutation of whole numbers",
    ),
    "a factor of zero": (
        lambda: axioms.scale_of_output(eg.gradient, smooth_score, factor=0),
        ValueError,
        "axioms.scale_of_output: expected factor > 0, got 0. Pass for example 2.0.",
    ),
    "a negative factor": (
        lambda: axioms.scale_of_output(eg.gradient, smooth_score, factor=-1.0),
        ValueError,
        "expected factor to be a finite number >= 0, got -1.0",
    ),
    "no randomised score": (
        lambda: axioms.parameter_dependence(eg.gradient, smooth_score, []),
        ValueError,
        "axioms.parameter_dependence: expected at least one randomised score, got none",
    ),
    "a whole offset": (
        lambda: axioms.shift(eg.gradient, smooth_score, torch.ones(1, 2, 3, dtype=torch.int64)),
        TypeError,
        "axioms.shift: expected offset of a floating dtype, got int64",
    ),
    "an offset in double precision": (
        lambda: axioms.shift(eg.gradient, smooth_score, torch.ones(1, 2, 3).double())(X),
        TypeError,
        r"axioms.shift: expected offset with the dtype of the input float32\(1, 2, 3\), got float64",
    ),
    "an offset of another shape": (
        lambda: axioms.shift(eg.gradient, smooth_score, torch.ones(2))(X),
        ValueError,
        r"axioms.shift: expected offset that broadcasts to the shape \(1, 2, 3\) of the input, got float32\(2,\)",
    ),
    "a step of another shape": (
        lambda: axioms.continuity(eg.gradient(smooth_score), torch.ones(2, 1, 2, 3))(X),
        ValueError,
        "axioms.continuity: expected step that broadcasts",
    ),
    "an offset that is no number": (
        lambda: axioms.translation_equivariance(eg.gradient, smooth_score, (True, 1)),
        TypeError,
        "axioms.translation_equivariance: expected whole numbers as offsets, got True",
    ),
    "an offset for an axis that is not there": (
        lambda: axioms.translation_equivariance(eg.gradient, smooth_score, (1, 1, 1))(X),
        ValueError,
        r"expected an input \(C,\*S\) with 3 spatial axes, got float32\(1, 2, 3\)",
    ),
    "a matrix that is no signed permutation": (
        lambda: axioms.affine_equivariance(eg.gradient, smooth_score, [[1, 1], [0, 1]]),
        ValueError,
        "axioms.affine_equivariance: expected a matrix with one entry of 1 or -1 in each row and column, "
        r"and 0 elsewhere, got \[\[1.0, 1.0\], \[0.0, 1.0\]\]. Other matrices do not map the grid to itself.",
    ),
    "a scaling": (
        lambda: axioms.affine_equivariance(eg.gradient, smooth_score, torch.eye(2) * 2),
        ValueError,
        "one entry of 1 or -1 in each row",
    ),
    "two entries in a row": (
        lambda: axioms.affine_equivariance(eg.gradient, smooth_score, [[1, 0], [1, 0]]),
        ValueError,
        "one entry of 1 or -1 in each row",
    ),
    "an axis too few": (
        lambda: axioms.affine_equivariance(eg.gradient, smooth_score, [[-1]])(X),
        ValueError,
        r"with 1 spatial axes, got float32\(1, 2, 3\)",
    ),
    "a map on another grid": (
        lambda: axioms.translation_equivariance(lambda s: lambda x: x[..., ::2], smooth_score, (1, 1))(X),
        ValueError,
        r"expected an attribution on the grid \(2, 3\) of the input, got float32\(1, 2, 2\)",
    ),
    "an exact reference in single precision": (
        lambda: exact.integrated_gradients(smooth_score, X, X),
        TypeError,
        r"axioms.exact.pieces: expected x in float64, got float32\(1, 2, 3\). Use x.double\(\)",
    ),
    "a baseline of another shape": (
        lambda: exact.shapley(smooth_score, X.double(), torch.zeros(2).double()),
        ValueError,
        "axioms.exact.shapley: expected the baseline with the shape of the input",
    ),
    "too many parts": (
        lambda: exact.shapley(smooth_score, torch.ones(1, 17).double(), torch.zeros(1, 17).double()),
        ValueError,
        "axioms.exact.shapley: expected at most 16 parts, got 17, which take 2.17 runs. Join some with labels=.",
    ),
    "a step of zero": (
        lambda: exact.gradient(smooth_score, X.double(), step=0),
        ValueError,
        "axioms.exact.gradient: expected step > 0, got 0",
    ),
    "no scalar": (
        lambda: exact.gradient(lambda z: z, X.double()),
        ValueError,
        "axioms.exact.gradient: expected a score with a value of shape",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_refused(what):
    call, error, text = BAD[what]
    with pytest.raises(error, match=text):
        call()


def test_masks_offsets_and_permutations_may_differ_between_examples():
    shape = SHAPES[1]
    xs, cs = draw(1, (3, *shape)), draw(2, (3, *shape))
    masks = draw(3, (3, *shape)) > 0
    orders = torch.argsort(draw(4, (3, 10)), dim=1)
    explain, method = eg.gradient(smooth_score), eg.input_x_gradient
    residuals = {
        "dummy": (lambda x, m: axioms.dummy(explain, m)(x), masks),
        "sensitivity_n": (lambda x, m: axioms.sensitivity_n(explain, smooth_score, m)(x), masks),
        "symmetry": (lambda x, p: axioms.symmetry(explain, p)(x), orders),
        "shift": (lambda x, c: axioms.shift(method, smooth_score, c)(x), cs),
        "continuity": (lambda x, c: axioms.continuity(explain, c)(x), cs),
    }
    for residual, arguments in residuals.values():
        loop = torch.stack([residual(x, a) for x, a in zip(xs, arguments, strict=True)])
        assert (loop.abs() > 1e-3).all()
        torch.testing.assert_close(torch.func.vmap(residual)(xs, arguments), loop)
    wrong = orders.clone()
    wrong[1, 0] = wrong[1, 1]
    with pytest.raises(ValueError, match="expected a permutation of 0 to n - 1"):
        torch.func.vmap(residuals["symmetry"][0])(xs, wrong)
