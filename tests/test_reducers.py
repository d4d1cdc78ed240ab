"""Every reducer against a plain loop over voxels, and what its mask, its gradient and its errors promise."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rounding import assert_alike
from together import together
from torch.func import grad, jvp, vmap

from esegeta import reducers, spatial
from esegeta._facts import facts_of
from esegeta._registry import REDUCERS
from esegeta.engine import gradient, memory

GRIDS = [(7,), (4, 5), (3, 4, 3)]
DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 2e-5, "atol": 2e-5}}
# The first jvp of a process makes torch compile decompositions by a way that it calls deprecated itself.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
OURS = {name: spec for name, spec in REDUCERS.items() if spec.fn.__module__ == "esegeta.reducers"}


def draw(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def net(channels, seed=0):
    """Smooth, not linear, mixes neighbours along every axis: (2, *S) -> (channels, *S)."""
    weight = draw((channels, 2, 3), seed)

    def model(x):
        near = sum(x.roll(1, a) for a in range(1, x.ndim))
        parts = torch.stack([x, near, (x * near).tanh()])
        return 2 * torch.einsum("kcf,fc...->k...", weight.to(x.dtype), parts) + 0.3

    return model


def classifier(classes, seed=0):
    model = net(classes, seed)
    return lambda x: model(x).flatten(1).mean(1)


# --- The oracle: definitions, voxel by voxel, in Python numbers -------------------------------------------


def voxels(z):
    return list(itertools.product(*(range(n) for n in z.shape[1:])))


def scores(z, v):
    return [float(z[(k, *v)]) for k in range(z.shape[0])]


def slow_logit(zs, c, exclusive=True):
    if exclusive and len(zs) == 1:
        return zs[0] if c == 1 else -zs[0]
    return zs[c]


def slow_probabilities(zs, exclusive=True):
    if not exclusive:
        return [1 / (1 + math.exp(-z)) for z in zs]
    zs = [0.0, *zs] if len(zs) == 1 else zs
    e = [math.exp(z) for z in zs]
    return [v / sum(e) for v in e]


def slow_log_odds(zs, c):
    zs = [0.0, *zs] if len(zs) == 1 else zs
    return zs[c] - math.log(sum(math.exp(z) for k, z in enumerate(zs) if k != c))


def slow_predicted(zs, c, exclusive=True):
    if not exclusive:
        return zs[c] > 0
    zs = [0.0, *zs] if len(zs) == 1 else zs
    return zs.index(max(zs)) == c


def slow_mask(z, c, exclusive=True):
    return {v for v in voxels(z) if slow_predicted(scores(z, v), c, exclusive)}


def faces(v):
    for axis, step in itertools.product(range(len(v)), (-1, 1)):
        yield tuple(i + step * (a == axis) for a, i in enumerate(v))


def slow_parts(mask):
    parts, left = [], sorted(mask)
    while left:
        part, queue = [], [left[0]]
        while queue:
            v = queue.pop()
            if v in left:
                left.remove(v)
                part.append(v)
                queue.extend(faces(v))
        parts.append(set(part))
    return sorted(parts, key=lambda part: -len(part))


def slow_boundary(z, mask):
    every = set(voxels(z))
    return {v for v in every for u in faces(v) if u in every and (u in mask) != (v in mask)}


def slow_otsu(values):
    """The threshold, by trying all: between-class variance of bin centres."""
    bins = [min(int(n * 256), 255) for n in values]
    best, threshold = -1.0, None
    for t in range(255):
        low = [b for b in bins if b <= t]
        high = [b for b in bins if b > t]
        if low and high:
            gap = sum(low) / len(low) - sum(high) / len(high)
            between = len(low) * len(high) * gap**2
            if between > best * (1 + 1e-12):
                best, threshold = between, (t + 0.5) / 256
    return threshold


def slow_above_otsu(z):
    values = {v: float(z[(0, *v)]) for v in voxels(z)}
    low, high = min(values.values()), max(values.values())
    n = {v: (value - low) / (high - low) for v, value in values.items()}
    t = slow_otsu(list(n.values()))
    return {v for v in n if n[v] > t}


def total(z, c, where, exclusive=True):
    return sum(slow_logit(scores(z, v), c, exclusive) for v in where)


def some(z):
    """A region that is neither empty nor all: every third voxel."""
    return set(voxels(z)[::3])


def as_tensor(where, z):
    mask = torch.zeros(z.shape[1:], dtype=torch.bool)
    for v in where:
        mask[v] = True
    return mask


def some_labels(z, classes):
    return (torch.arange(z[0].numel()) % classes).reshape(z.shape[1:])


def slow_entropy(zs, exclusive):
    ps = slow_probabilities(zs, exclusive)
    if exclusive:
        return -sum(p * math.log(p) for p in ps)
    return -sum(q * math.log(q) for p in ps for q in (p, 1 - p))


def slow_dice(z, labels, exclusive=True):
    dice = []
    for k in range(1, max(2, z.shape[0])):
        p = {v: slow_probabilities(scores(z, v), exclusive)[k] for v in voxels(z)}
        truth = {v: float(labels[v] == k) for v in voxels(z)}
        both = sum(p[v] * truth[v] for v in p)
        dice.append((2 * both + 1e-5) / (sum(p.values()) + sum(truth.values()) + 1e-5))
    return sum(dice) / len(dice) - 1


def slow_overlap(one, other):
    return 2 * len(one & other) / (len(one) + len(other))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def slow_finer(zs, c, k=3, alpha=1.0):
    p = slow_probabilities(zs)
    zs = [0.0, *zs] if len(zs) == 1 else zs
    nearest = sorted((j for j in range(len(zs)) if j != c), key=lambda j: abs(zs[j] - zs[c]))[:k]
    return sum(p[j] * (zs[c] - alpha * zs[j]) for j in nearest) / sum(p[j] for j in nearest)


# name -> (channels of the model, the score from (model, x, z), the slow answer from z)
MAPS = {
    "predicted_class_sum": (
        3,
        lambda m, x, z: reducers.predicted_class_sum(m, 1, at=x),
        lambda z: total(z, 1, slow_mask(z, 1)),
    ),
    "predicted_class_sum, one channel": (
        1,
        lambda m, x, z: reducers.predicted_class_sum(m, 1, at=x),
        lambda z: total(z, 1, slow_mask(z, 1)),
    ),
    "predicted_class_sum, background of one channel": (
        1,
        lambda m, x, z: reducers.predicted_class_sum(m, 0, at=x),
        lambda z: total(z, 0, slow_mask(z, 0)),
    ),
    "predicted_class_sum, labels": (
        3,
        lambda m, x, z: reducers.predicted_class_sum(m, 2, at=x, exclusive=False),
        lambda z: total(z, 2, slow_mask(z, 2, False), False),
    ),
    "predicted_class_sum, dynamic": (
        3,
        lambda m, x, z: reducers.predicted_class_sum(m, 2, dynamic=True),
        lambda z: total(z, 2, slow_mask(z, 2)),
    ),
    "otsu_sum": (1, lambda m, x, z: reducers.otsu_sum(m, at=x), lambda z: total(z, 1, slow_above_otsu(z))),
    "otsu_sum, background": (
        1,
        lambda m, x, z: reducers.otsu_sum(m, part="background", at=x),
        lambda z: total(z, 1, set(voxels(z)) - slow_above_otsu(z)),
    ),
    "class_sum": (3, lambda m, x, z: reducers.class_sum(m, 2), lambda z: total(z, 2, voxels(z))),
    "class_sum, background of one channel": (
        1,
        lambda m, x, z: reducers.class_sum(m, 0),
        lambda z: total(z, 0, voxels(z)),
    ),
    "class_sum, one label": (
        1,
        lambda m, x, z: reducers.class_sum(m, 0, exclusive=False),
        lambda z: total(z, 0, voxels(z), False),
    ),
    "class_mean": (
        3,
        lambda m, x, z: reducers.class_mean(m, 2),
        lambda z: total(z, 2, voxels(z)) / len(voxels(z)),
    ),
    "class_mean, probabilities": (
        3,
        lambda m, x, z: reducers.class_mean(m, 2, of="probabilities"),
        lambda z: mean(slow_probabilities(scores(z, v))[2] for v in voxels(z)),
    ),
    "voxel": (
        3,
        lambda m, x, z: reducers.voxel(m, 1, voxels(z)[5]),
        lambda z: total(z, 1, [voxels(z)[5]]),
    ),
    "region": (
        3,
        lambda m, x, z: reducers.region(m, 1, as_tensor(some(z), z)),
        lambda z: total(z, 1, some(z)),
    ),
    "region, average": (
        3,
        lambda m, x, z: reducers.region(m, 1, as_tensor(some(z), z), average=True),
        lambda z: total(z, 1, some(z)) / len(some(z)),
    ),
    "uncertain_band": (
        3,
        lambda m, x, z: reducers.uncertain_band(m, 1, at=x, low=0.02, high=0.9),
        lambda z: total(z, 1, [v for v in voxels(z) if 0.02 <= slow_probabilities(scores(z, v))[1] < 0.9]),
    ),
    "uncertain_band, one channel": (
        1,
        lambda m, x, z: reducers.uncertain_band(m, 1, at=x, low=0.02, high=0.95),
        lambda z: total(z, 1, [v for v in voxels(z) if 0.02 <= slow_probabilities(scores(z, v))[1] < 0.95]),
    ),
    "component": (
        1,
        lambda m, x, z: reducers.component(m, 1, at=x),
        lambda z: total(z, 1, slow_parts(slow_mask(z, 1))[0]),
    ),
    "component, second, dynamic": (
        1,
        lambda m, x, z: reducers.component(m, 0, 1, dynamic=True),
        lambda z: total(z, 0, (*slow_parts(slow_mask(z, 0)), (), ())[1]),
    ),
    "boundary": (
        3,
        lambda m, x, z: reducers.boundary(m, 1, at=x),
        lambda z: total(z, 1, slow_boundary(z, slow_mask(z, 1))),
    ),
    "soft_count": (
        3,
        lambda m, x, z: reducers.soft_count(m, 1),
        lambda z: sum(slow_probabilities(scores(z, v))[1] for v in voxels(z)),
    ),
    "soft_count, background of one channel": (
        1,
        lambda m, x, z: reducers.soft_count(m, 0),
        lambda z: sum(slow_probabilities(scores(z, v))[0] for v in voxels(z)),
    ),
    "soft_count, labels": (
        3,
        lambda m, x, z: reducers.soft_count(m, 1, exclusive=False),
        lambda z: sum(slow_probabilities(scores(z, v), False)[1] for v in voxels(z)),
    ),
    "margin": (
        3,
        lambda m, x, z: reducers.margin(m, 1, 2, as_tensor(some(z), z)),
        lambda z: sum(scores(z, v)[1] - scores(z, v)[2] for v in some(z)),
    ),
    "margin, all others": (
        3,
        lambda m, x, z: reducers.margin(m, 1),
        lambda z: sum(slow_log_odds(scores(z, v), 1) for v in voxels(z)),
    ),
    "margin, one channel": (
        1,
        lambda m, x, z: reducers.margin(m, 0, 1),
        lambda z: sum(slow_log_odds(scores(z, v), 0) for v in voxels(z)),
    ),
    "finer": (
        5,
        lambda m, x, z: reducers.finer(m, 2, at=x, k=2, alpha=0.7),
        lambda z: mean(slow_finer(scores(z, v), 2, 2, 0.7) for v in slow_mask(z, 2)),
    ),
    "finer, fewer classes": (
        3,
        lambda m, x, z: reducers.finer(m, 2, at=x),
        lambda z: mean(slow_finer(scores(z, v), 2) for v in slow_mask(z, 2)),
    ),
    "finer, one channel": (
        1,
        lambda m, x, z: reducers.finer(m, 0, at=x, alpha=0.5),
        lambda z: mean(slow_finer(scores(z, v), 0, alpha=0.5) for v in slow_mask(z, 0)),
    ),
    "log_probability": (
        3,
        lambda m, x, z: reducers.log_probability(m, 0, mask=as_tensor(some(z), z)),
        lambda z: sum(math.log(slow_probabilities(scores(z, v))[0]) for v in some(z)),
    ),
    "log_probability, background of one channel": (
        1,
        lambda m, x, z: reducers.log_probability(m, 0),
        lambda z: sum(math.log(slow_probabilities(scores(z, v))[0]) for v in voxels(z)),
    ),
    "log_probability, labels": (
        3,
        lambda m, x, z: reducers.log_probability(m, 0, exclusive=False),
        lambda z: sum(math.log(slow_probabilities(scores(z, v), False)[0]) for v in voxels(z)),
    ),
    "negative_loss": (
        3,
        lambda m, x, z: reducers.negative_loss(m, some_labels(z, 3)),
        lambda z: mean(
            math.log(slow_probabilities(scores(z, v))[int(some_labels(z, 3)[v])]) for v in voxels(z)
        ),
    ),
    "negative_loss, one channel": (
        1,
        lambda m, x, z: reducers.negative_loss(m, some_labels(z, 2).to(torch.uint8)),
        lambda z: mean(
            math.log(slow_probabilities(scores(z, v))[int(some_labels(z, 2)[v])]) for v in voxels(z)
        ),
    ),
    "negative_loss, labels": (
        3,
        lambda m, x, z: reducers.negative_loss(m, some_labels(z, 2).expand(z.shape), exclusive=False),
        lambda z: mean(
            math.log(p if some_labels(z, 2)[v] else 1 - p)
            for v in voxels(z)
            for p in slow_probabilities(scores(z, v), False)
        ),
    ),
    "negative_loss, dice": (
        3,
        lambda m, x, z: reducers.negative_loss(m, some_labels(z, 3), kind="dice"),
        lambda z: slow_dice(z, some_labels(z, 3)),
    ),
    "negative_loss, dice of one channel": (
        1,
        lambda m, x, z: reducers.negative_loss(m, some_labels(z, 2) == 1, kind="dice"),
        lambda z: slow_dice(z, some_labels(z, 2)),
    ),
    "uncertainty": (
        3,
        lambda m, x, z: reducers.uncertainty(m),
        lambda z: mean(slow_entropy(scores(z, v), True) for v in voxels(z)),
    ),
    "uncertainty, one channel": (
        1,
        lambda m, x, z: reducers.uncertainty(m),
        lambda z: mean(slow_entropy(scores(z, v), True) for v in voxels(z)),
    ),
    "uncertainty, labels": (
        3,
        lambda m, x, z: reducers.uncertainty(m, exclusive=False),
        lambda z: mean(slow_entropy(scores(z, v), False) for v in voxels(z)),
    ),
    "predicted_count": (
        3,
        lambda m, x, z: reducers.predicted_count(m, 1),
        lambda z: float(len(slow_mask(z, 1))),
    ),
    "predicted_dice": (
        3,
        lambda m, x, z: reducers.predicted_dice(lambda y: m(y) if y is x else z.flip(-1), 1, at=x + 0),
        lambda z: slow_overlap(slow_mask(z, 1), slow_mask(z.flip(-1), 1)),
    ),
}

CLASSIFIED = draw((2, 4, 5), 5)  # what the test of classifiers puts in

# For classifiers: K, the score, the slow answer from the list of K numbers.
VECTORS = {
    "logit": (3, lambda m: reducers.logit(m, 1), lambda zs: zs[1]),
    "logit, no of one output": (1, lambda m: reducers.logit(m, 0), lambda zs: -zs[0]),
    "probability": (3, lambda m: reducers.probability(m, 1), lambda zs: slow_probabilities(zs)[1]),
    "probability, no of one output": (
        1,
        lambda m: reducers.probability(m, 0),
        lambda zs: slow_probabilities(zs)[0],
    ),
    "probability, label": (
        3,
        lambda m: reducers.probability(m, 1, exclusive=False),
        lambda zs: slow_probabilities(zs, False)[1],
    ),
    "finer": (
        4,
        lambda m: reducers.finer(m, 1, at=CLASSIFIED, k=2, alpha=0.7),
        lambda zs: slow_finer(zs, 1, 2, 0.7),
    ),
    "finer, dynamic": (
        4,
        lambda m: reducers.finer(m, 2, dynamic=True, k=1),
        lambda zs: slow_finer(zs, 2, 1),
    ),
    "finer, one output": (
        1,
        lambda m: reducers.finer(m, 1, at=CLASSIFIED),
        lambda zs: zs[0],
    ),
    "log_probability": (
        3,
        lambda m: reducers.log_probability(m, 2),
        lambda zs: math.log(slow_probabilities(zs)[2]),
    ),
    "margin": (3, lambda m: reducers.margin(m, 0, 2), lambda zs: zs[0] - zs[2]),
    "margin, all others": (
        3,
        lambda m: reducers.margin(m, 0),
        lambda zs: slow_log_odds(zs, 0),
    ),
    "negative_loss": (
        3,
        lambda m: reducers.negative_loss(m, torch.tensor(2)),
        lambda zs: math.log(slow_probabilities(zs)[2]),
    ),
    "negative_loss, one output": (
        1,
        lambda m: reducers.negative_loss(m, torch.tensor(0)),
        lambda zs: math.log(slow_probabilities(zs)[0]),
    ),
    "negative_loss, dice": (
        3,
        lambda m: reducers.negative_loss(m, torch.tensor(2), kind="dice"),
        lambda zs: (
            (
                (1e-5 / (slow_probabilities(zs)[1] + 1e-5))
                + (2 * slow_probabilities(zs)[2] + 1e-5) / (slow_probabilities(zs)[2] + 1 + 1e-5)
            )
            / 2
            - 1
        ),
    ),
    "uncertainty": (3, lambda m: reducers.uncertainty(m), lambda zs: slow_entropy(zs, True)),
}


def map_case(name, grid, dtype=torch.float64):
    channels, build, slow = MAPS[name]
    model, x = net(channels), draw((2, *grid), 5, dtype)
    z = model(x)
    return model, x, z, build(model, x, z), slow


def test_every_reducer_has_an_oracle_and_every_kind_of_output():
    named = {case.split(",")[0] for case in (*MAPS, *VECTORS)}
    assert named == set(OURS)
    for name, spec in OURS.items():
        in_maps = any(case.split(",")[0] == name for case in MAPS)
        in_vectors = any(case.split(",")[0] == name for case in VECTORS)
        assert {"map": (True, False), "vector": (False, True), "any": (True, True)}[spec.output] == (
            in_maps,
            in_vectors,
        )


@together("dtype", DTYPES, ids=str)
@together("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_value_is_that_of_the_loop_over_voxels(name, grid, dtype):
    _, x, z, score, slow = map_case(name, grid, dtype)
    y = score(x)
    assert y.shape == ()
    assert y.dtype == dtype
    torch.testing.assert_close(y.item(), float(slow(z)), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VECTORS)
def test_value_for_a_classifier(name, dtype):
    classes, build, slow = VECTORS[name]
    model, x = classifier(classes), draw((2, 4, 5), 5, dtype)
    y = build(model)(x)
    assert y.shape == ()
    assert y.dtype == dtype
    torch.testing.assert_close(y.item(), slow(model(x).tolist()), **TOLERANCE[dtype])


def differentiable(name):
    return OURS[name.split(",")[0]].differentiable


@together("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", [*filter(differentiable, MAPS)])
def test_gradient_is_that_of_central_differences(name, grid):
    _, x, _, score, _ = map_case(name, grid)
    step = 1e-6 * torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    slope = (vmap(score)(x + step) - vmap(score)(x - step)) / 2e-6
    g = grad(score)(x)
    assert g.abs().max() > 1e-3
    torch.testing.assert_close(g.flatten(), slope, rtol=1e-6, atol=1e-7)


@FORWARD_MODE
@together("name", [*filter(differentiable, MAPS)])
def test_forward_mode_agrees_with_reverse_mode(name):
    _, x, _, score, _ = map_case(name, (4, 5))
    t = draw(x.shape, 9)
    torch.testing.assert_close(jvp(score, (x,), (t,))[1], (grad(score)(x) * t).sum())


@together("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_built_inside_vmap_it_equals_a_loop(name, grid):
    channels, build, _ = MAPS[name]
    model, xs = net(channels), draw((3, 2, *grid), 7)
    z = model(xs[0])

    def value_there(x, y):
        return build(model, x, z)(y)

    ys = xs + 0.3 * draw(xs.shape, 8)
    try:
        one_by_one = torch.stack([value_there(x, y) for x, y in zip(xs, ys, strict=True)])
    except ValueError as error:
        pytest.fail(f"choose another seed: {error}")
    torch.testing.assert_close(vmap(value_there)(xs, ys), one_by_one, rtol=1e-12, atol=1e-12)
    # The mapped axis last, and twice mapped.
    inner = vmap(value_there, in_dims=-1)
    moved = [t.movedim(0, -1).expand(2, *t.movedim(0, -1).shape) for t in (xs, ys)]
    torch.testing.assert_close(vmap(inner)(*moved), one_by_one.expand(2, 3), rtol=1e-12, atol=1e-12)
    if differentiable(name):
        g = vmap(lambda x: grad(lambda y: value_there(x, y))(x))(xs)
        slow = torch.stack([grad(build(model, x, z))(x) for x in xs])
        torch.testing.assert_close(g, slow, rtol=1e-12, atol=1e-12)


@together("name", MAPS)
def test_a_dry_run_without_values_works(name):
    channels, build, _ = MAPS[name]
    model, x = net(channels), draw((2, 4, 5), 5)
    z = model(x)
    assert memory.forecast(build(model, x, z), x) > 0
    assert memory.forecast(lambda x: build(model, x, z)(x), x) > 0


@pytest.mark.parametrize("name", OURS)
def test_the_example_in_the_registry_fits_one_channel_on_a_small_grid(name):
    spec = OURS[name]
    x = draw((2, 4, 4), 5)
    model, static = net(1), dict(spec.example)
    if spec.output == "vector":
        model = classifier(1)
    if spec.mask:
        static["at"] = x
    score = spec.fn(model, **static)
    assert score(x).shape == ()
    assert score.__name__.startswith(f"{name}(model")
    assert facts_of(score).differentiable is spec.differentiable


# --- Frozen and dynamic masks -----------------------------------------------------------------------------

FROZEN = [name for name, spec in OURS.items() if spec.mask]


def test_the_reducers_with_a_mask_are_the_expected_ones():
    assert set(FROZEN) == {
        "predicted_class_sum",
        "otsu_sum",
        "component",
        "boundary",
        "finer",
        "predicted_dice",
        "uncertain_band",
    }


def test_crossing_the_decision_boundary_changes_only_the_dynamic_score():
    def model(x):
        return torch.cat([torch.ones_like(x), x])

    at = torch.tensor([[2.0, 0.0]])
    frozen = reducers.predicted_class_sum(model, 1, at=at)
    dynamic = reducers.predicted_class_sum(model, 1, dynamic=True)
    assert frozen(at) == dynamic(at) == 2
    # The second voxel becomes class 1: 2 -> 2 + 5. The first stops being it: 2 + 5 -> 5.
    for x, still, moved in (([2.0, 5.0], 2, 7), ([0.5, 5.0], 0.5, 5), ([0.5, 0.0], 0.5, 0)):
        assert frozen(torch.tensor([x])) == still
        assert dynamic(torch.tensor([x])) == moved
    assert grad(frozen)(torch.tensor([[0.5, 5.0]])).tolist() == [[1, 0]]
    assert grad(dynamic)(torch.tensor([[0.5, 5.0]])).tolist() == [[0, 1]]


def test_along_a_path_the_frozen_score_is_smooth_and_the_gradient_explains_it():
    def model(x):
        return torch.cat([torch.full_like(x, 0.5), x])

    x = torch.tensor([[1.0, 2.0, 0.2]], dtype=torch.float64)
    # Midpoints of [0, 1], none on the decision boundaries at 1/2 and 1/4.
    alphas = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def residual(score):
        integral = (vmap(lambda a: grad(score)(a * x))(alphas).mean(0) * x).sum()
        return (integral - (score(x) - score(0 * x))).abs().item()

    frozen = reducers.predicted_class_sum(model, 1, at=x)
    path = vmap(lambda a: frozen(a * x))(alphas)
    torch.testing.assert_close(path, 3 * alphas)
    assert residual(frozen) < 1e-12
    # Two voxels enter the mask on the way, each with a jump of 1/2 that no gradient sees.
    assert residual(reducers.predicted_class_sum(model, 1, dynamic=True)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_gradient_of_a_frozen_score_is_the_masked_gradient(grid):
    model, x, y = net(3), draw((2, *grid), 5), draw((2, *grid), 6)
    mask = model(x).argmax(0) == 1
    assert mask.any()
    assert not torch.equal(mask, model(y).argmax(0) == 1)
    expected = torch.autograd.functional.vjp(model, y, torch.stack([0 * mask, mask, 0 * mask]).to(y))[1]
    assert_alike(grad(reducers.predicted_class_sum(model, 1, at=x))(y), expected)


@pytest.mark.parametrize("name", [n for n in FROZEN if n != "predicted_dice"])
def test_a_frozen_mask_does_not_follow_and_a_dynamic_one_does(name):
    model, x, y = net(1), draw((2, 4, 5), 5), draw((2, 4, 5), 6)
    static = dict(OURS[name].example)
    frozen = [OURS[name].fn(model, **static, at=t) for t in (x, y)]
    dynamic = OURS[name].fn(model, **static, dynamic=True)
    assert frozen[0](x) == dynamic(x)
    assert frozen[1](y) == dynamic(y)
    assert frozen[0](y) != frozen[1](y)


@pytest.mark.parametrize("name", FROZEN)
def test_freezing_runs_the_model_once_without_a_graph(name):
    runs = []

    def model(x):
        runs.append((torch.is_grad_enabled(), x.requires_grad))
        return net(1)(x)

    x = draw((2, 4, 5), 5).requires_grad_()
    score = OURS[name].fn(model, **OURS[name].example, at=x)
    assert runs == [(False, False)]
    score(x)
    assert runs == [(False, False), (True, True)]


@FORWARD_MODE
@pytest.mark.parametrize("name", FROZEN)
def test_the_mask_is_a_constant_even_if_the_score_is_built_inside_grad(name):
    model, x, t = net(1), draw((2, 4, 5), 5), draw((2, 4, 5), 6)

    def inside(y):
        return OURS[name].fn(model, **OURS[name].example, at=y)(y)

    expected = grad(OURS[name].fn(model, **OURS[name].example, at=x))(x)
    assert_alike(grad(inside)(x), expected)
    torch.testing.assert_close(jvp(inside, (x,), (t,))[1], (expected * t).sum())


def test_an_empty_dynamic_mask_is_a_score_of_zero():
    score = reducers.predicted_class_sum(lambda x: x, 1, dynamic=True)
    x = torch.tensor([[-1.0, -2.0]])
    assert score(x) == 0
    assert grad(score)(x).tolist() == [[0, 0]]
    assert reducers.component(lambda x: x, 1, 1, dynamic=True)(-x) == 0


def test_infinite_scores_outside_of_the_mask_do_no_harm():
    x = torch.tensor([[3.0, -math.inf, 2.0]])
    score = reducers.predicted_class_sum(lambda x: x, 1, at=x)
    assert score(x) == 5
    assert grad(score)(x).tolist() == [[1, 0, 1]]


# --- Masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "exclusive"), [(1, True), (1, False), (3, True), (3, False)])
def test_predicted_mask(channels, exclusive):
    z = draw((channels, 4, 5), 3).round()  # rounded: there are ties, and zeros
    for c in range(2 if exclusive and channels == 1 else channels):
        expected = as_tensor(slow_mask(z, c, exclusive), z)
        assert torch.equal(reducers.predicted_mask(z, c, exclusive=exclusive), expected)


def test_predicted_masks_of_exclusive_classes_are_a_partition():
    for channels, classes in ((1, 2), (4, 4)):
        z = draw((channels, 4, 5), 3).round()
        cover = sum(reducers.predicted_mask(z, c).int() for c in range(classes))
        assert (cover == 1).all()


def test_region_of_the_predicted_mask_is_predicted_class_sum():
    model, x, y = net(3), draw((2, 4, 5), 5), draw((2, 4, 5), 6)
    composed = reducers.region(model, 2, reducers.predicted_mask(model(x), 2))
    assert composed(y) == reducers.predicted_class_sum(model, 2, at=x)(y)


@pytest.mark.parametrize("seed", range(20))
def test_otsu_equals_trying_all_thresholds(seed):
    # Two bumps of different size and width, to the power of the seed: from clear to hopeless.
    n = torch.cat([0.2 + 0.05 * draw(40, seed), 0.7 + 0.1 * draw(60, seed + 100)]).abs() ** (1 + seed / 5)
    n = (n - n.min()) / (n.max() - n.min())
    assert reducers._otsu(n).item() == pytest.approx(slow_otsu(n.tolist()), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_otsu_is_that_of_a_histogram(seed):
    # What skimage.filters.threshold_otsu computes, from the histogram of numpy.
    n = draw(500, seed).square()
    n = (n - n.min()) / (n.max() - n.min())
    counts, edges = np.histogram(n.numpy(), 256)
    centres = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    mean_below = np.cumsum(counts * centres) / below
    mean_above = (np.cumsum((counts * centres)[::-1]) / np.cumsum(counts[::-1]))[::-1]
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    assert reducers._otsu(n).item() == pytest.approx(centres[np.argmax(between)], abs=1e-12)


def test_otsu_is_that_of_scikit_image():
    filters = pytest.importorskip("skimage.filters")
    for seed in range(5):
        n = draw(500, seed).square()
        n = (n - n.min()) / (n.max() - n.min())
        assert reducers._otsu(n).item() == pytest.approx(filters.threshold_otsu(n.numpy()), abs=1e-6)


def test_otsu_under_vmap_equals_a_loop():
    z = draw((6, 1, 9, 8), 2).exp()
    masks = vmap(lambda z: reducers._above_otsu(z[0]))(z)
    assert torch.equal(masks, torch.stack([reducers._above_otsu(one[0]) for one in z]))
    assert not torch.equal(masks[0], masks[1])


def test_otsu_compares_the_scaled_output_with_the_threshold_of_the_scaled_output():
    x = torch.tensor([[-50.0, -51.0, -49.5, -10.0, -11.0]])
    # No raw value exceeds a threshold in [0, 1]: comparing those, as the original system did, finds nothing.
    assert not (x > 1).any()
    assert reducers.otsu_sum(lambda x: x, at=x)(x) == -21
    # Hence the mask does not depend on offset and scale.
    for scale, offset in ((1, 100), (8, -3), (0.25, 0)):
        assert reducers.otsu_sum(lambda x: x, at=x * scale + offset)(x) == -21


def test_a_value_on_the_threshold_is_background():
    on = 0.5 / 256
    x = torch.tensor([[0.0, on, 1.0, 1.0]])
    assert reducers._otsu(x) == on
    assert reducers.otsu_sum(lambda x: x, at=x)(x) == 2
    assert reducers.otsu_sum(lambda x: x, part="background", at=x)(x) == on


def test_a_constant_output_is_all_background():
    x = torch.full((1, 2, 3), 4.0)
    assert reducers.otsu_sum(lambda x: x, part="background", at=x)(x) == 24
    with pytest.raises(ValueError, match="the output at x is constant and has no foreground"):
        reducers.otsu_sum(lambda x: x, at=x)
    # One constant example among others, and with the mask recomputed.
    dynamic = reducers.otsu_sum(lambda x: x, dynamic=True)
    xs = torch.stack([x, torch.arange(6.0).reshape(1, 2, 3)])
    assert vmap(dynamic)(xs).tolist() == [0, 12]
    assert grad(dynamic)(x).isfinite().all()


@pytest.mark.parametrize("grid", [(60,), (9, 9), (5, 5, 5)], ids=str)
def test_parts_are_numbered_by_size_through_faces(grid):
    mask = draw(grid, 4) > 0.3
    parts = slow_parts({tuple(v) for v in mask.nonzero().tolist()})
    assert len(parts) > 3
    assert len({len(part) for part in parts}) < len(parts), "there are equally large ones"
    expected = torch.zeros(grid, dtype=torch.int64)
    for number, part in enumerate(parts, 1):
        for v in part:
            expected[v] = number
    assert torch.equal(reducers._Parts.apply(mask), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_parts_under_vmap_equal_a_loop_whatever_the_mapped_axis(axis):
    masks = draw((6, 7, 5), 4) > 0
    loop = torch.stack([reducers._Parts.apply(mask) for mask in masks])
    assert torch.equal(vmap(reducers._Parts.apply, in_dims=axis)(masks.movedim(0, axis)), loop)


def test_voxels_that_touch_in_a_corner_are_two_components():
    x = torch.tensor([[[1.0, -1.0], [-1.0, 2.0]]])
    assert [reducers.component(lambda x: x, 1, k, at=x)(x).item() for k in (0, 1)] == [1, 2]


def test_boundary_is_that_of_spatial():
    model, x, y = net(3), draw((2, 4, 5), 5), draw((2, 4, 5), 6)
    shell = spatial.boundary(reducers.predicted_mask(model(x), 1))
    assert shell.any()
    assert not shell.all()
    assert reducers.boundary(model, 1, at=x)(y) == reducers.region(model, 1, shell)(y)


# --- One channel, many labels, and how the reducers hang together -----------------------------------------


@pytest.mark.parametrize("target", [0, 1])
def test_one_channel_is_the_two_channel_model_with_a_zero(target):
    one, x = net(1), draw((2, 4, 5), 5)

    def two(x):
        z = one(x)
        return torch.cat([torch.zeros_like(z), z])

    labels = some_labels(one(x), 2)
    for build in (
        lambda m: reducers.soft_count(m, target),
        lambda m: reducers.log_probability(m, target),
        lambda m: reducers.margin(m, target),
        lambda m: reducers.margin(m, target, 1 - target),
        lambda m: reducers.class_mean(m, target, of="probabilities"),
        lambda m: reducers.predicted_count(m, target),
        lambda m: reducers.negative_loss(m, labels),
        lambda m: reducers.negative_loss(m, labels, kind="dice"),
        lambda m: reducers.uncertainty(m),
    ):
        torch.testing.assert_close(build(one)(x), build(two)(x), rtol=1e-12, atol=1e-12)


def test_closed_forms():
    x = torch.tensor([[0.0, math.log(3), -math.log(3)]], dtype=torch.float64)
    p = torch.tensor([1 / 2, 3 / 4, 1 / 4], dtype=torch.float64)

    def same(score, expected):
        torch.testing.assert_close(score(x).item(), float(expected), rtol=1e-12, atol=1e-12)

    def model(x):
        return x

    same(reducers.predicted_class_sum(model, 1, at=x), math.log(3))
    same(reducers.predicted_class_sum(model, 0, at=x), math.log(3))
    same(reducers.predicted_count(model, 0), 2)
    same(reducers.predicted_count(model, 1), 1)
    same(reducers.soft_count(model, 1), 1.5)
    same(reducers.log_probability(model, 1), p.log().sum())
    same(reducers.log_probability(model, 0), (1 - p).log().sum())
    same(reducers.margin(model, 1), 0)
    same(reducers.uncertainty(model), -(p * p.log() + (1 - p) * (1 - p).log()).mean())
    same(reducers.negative_loss(model, torch.tensor([1, 1, 0])), (math.log(1 / 2) + 2 * math.log(3 / 4)) / 3)
    dice = (2 * 1.25 + 1e-5) / (1.5 + 2 + 1e-5)
    same(reducers.negative_loss(model, torch.tensor([1, 1, 0]), kind="dice"), dice - 1)
    # exp of a log-probability is a probability; a margin is its log-odds.
    own = reducers.class_mean(model, 1, of="probabilities")(x[:, 1:2]).item()
    assert own == pytest.approx(0.75, abs=1e-12)
    assert reducers.margin(model, 1)(x[:, 1:2]).item() == pytest.approx(math.log(own / (1 - own)), abs=1e-12)


def test_probabilities_of_saturated_outputs_stay_finite():
    x = torch.tensor([[200.0, -200.0, 0.0]])

    def three(x):
        return torch.cat([x, 0 * x, -x])

    for model in (lambda x: x, three):
        for score in (
            reducers.uncertainty(model),
            reducers.log_probability(model, 1),
            reducers.soft_count(model, 1),
            reducers.margin(model, 1),
            reducers.negative_loss(model, torch.tensor([0, 1, 0])),
            reducers.negative_loss(model, torch.tensor([0, 0, 0]), kind="dice"),
        ):
            assert score(x).isfinite()
            assert grad(score)(x).isfinite().all()


def test_dice_of_a_class_that_is_absent_and_not_predicted_is_one():
    x = torch.full((1, 4), -500.0)
    assert reducers.negative_loss(lambda x: x, torch.zeros(4, dtype=torch.int64), kind="dice")(x) == 0


def test_the_margin_ignores_what_all_logits_share():
    model, x = net(3), draw((2, 4, 5), 5)

    def shifted(x):
        return model(x) + x[:1] ** 2

    for other in (None, 2):
        a, b = reducers.margin(model, 1, other), reducers.margin(shifted, 1, other)
        torch.testing.assert_close(a(x), b(x))
        torch.testing.assert_close(grad(a)(x), grad(b)(x))
    assert abs(reducers.class_sum(model, 1)(x) - reducers.class_sum(shifted, 1)(x)) > 1


def test_finer_keeps_the_rivals_and_their_shares_of_the_explained_input():
    at, x = torch.tensor([5.0, 4.0, 3.0, -9.0]), torch.tensor([1.0, 0.0, 7.0, 0.5])
    a, b = (math.exp(v) / (math.exp(4) + math.exp(3)) for v in (4, 3))
    frozen = reducers.finer(lambda x: x, 0, at=at, k=2)
    torch.testing.assert_close(frozen(x).item(), 1 - a * 0 - b * 7)
    torch.testing.assert_close(grad(frozen)(x), torch.tensor([1.0, -a, -b, 0.0]))
    dynamic = reducers.finer(lambda x: x, 0, dynamic=True, k=2)  # of x the last and the second are nearest
    assert dynamic(at) == frozen(at)
    assert grad(dynamic)(x)[2] == 0


def test_finer_of_the_nearest_class_is_a_margin_and_of_none_the_mean_score():
    model, x, y = net(3), draw((2, 4, 5), 5), draw((2, 4, 5), 6)
    z = model(x)
    mask = z.argmax(0) == 1
    nearest = torch.where(torch.tensor([False, True, False])[:, None, None], -math.inf, z).argmax(0)
    margins = [reducers.margin(model, 1, j, mask & (nearest == j))(y) for j in (0, 2)]
    torch.testing.assert_close(reducers.finer(model, 1, at=x, k=1)(y), sum(margins) / mask.sum())
    mean_score = reducers.region(model, 1, mask, average=True)
    torch.testing.assert_close(reducers.finer(model, 1, at=x, alpha=0.0)(y), mean_score(y))


def test_finer_of_saturated_outputs_stays_finite():
    z = torch.tensor([500.0, -400.0, -401.0, -600.0])
    score = reducers.finer(lambda x: x, 0, at=z, k=2)
    torch.testing.assert_close(score(z).item(), 500 + 400 + 1 / (1 + math.e), rtol=1e-6, atol=0)
    assert grad(score)(z).isfinite().all()


def test_the_output_may_have_another_grid_than_the_input():
    x = draw((1, 8, 8), 1)

    def halved(x):
        return torch.nn.functional.avg_pool2d(x, 2)

    mask = halved(x)[0] > 0
    torch.testing.assert_close(reducers.predicted_class_sum(halved, 1, at=x)(x), halved(x)[0][mask].sum())
    assert reducers.voxel(halved, 1, (3, 3))(x) == halved(x)[0, 3, 3]


def test_a_latent_vector_may_be_explained_through_a_generator():
    score = reducers.class_sum(lambda u: u.reshape(1, 2, 3) ** 2, 1)
    assert grad(score)(torch.arange(6.0)).tolist() == [0, 2, 4, 6, 8, 10]


# --- The count of the original system ---------------------------------------------------------------------


def test_the_original_count_has_a_gradient_of_zero_and_ours_is_declared():
    model, x = net(1), draw((2, 4, 5), 5)

    def original(x):
        z = model(x)
        return (z / z * (z > 0.5)).sum()

    assert original(x) == 10
    assert original(0 * x) == 0
    assert (grad(original)(x) == 0).all()
    count = reducers.predicted_count(model, 1)
    assert count(x) == (model(x) > 0).sum()
    assert (grad(count)(x) == 0).all()
    assert (grad(reducers.predicted_class_sum(model, 1, at=x))(x) != 0).any()
    assert (grad(reducers.soft_count(model, 1))(x) != 0).any()
    # Where the output is zero the original count is not even a number.
    assert (torch.zeros(1) / torch.zeros(1)).isnan()
    assert reducers.predicted_count(lambda x: x, 0)(torch.zeros(1, 3)) == 3


def test_gradient_methods_refuse_the_count():
    with pytest.raises(ValueError, match=r"predicted_count\(model, 1\), whose gradient is identically zero"):
        gradient.refuse_forward_only("integrated_gradients", reducers.predicted_count(net(1), 1))
    overlap = reducers.predicted_dice(net(1), 1, at=draw((2, 4, 5), 5))
    with pytest.raises(
        ValueError, match=r"predicted_dice\(model, 1, .*\), whose gradient is identically zero"
    ):
        gradient.refuse_forward_only("gradient", overlap)
    for name in set(OURS) - {"predicted_count", "predicted_dice"}:
        assert OURS[name].differentiable


# --- Errors -----------------------------------------------------------------------------------------------

X = draw((2, 4, 5), 5)
M = torch.ones(4, 5, dtype=torch.bool)
THREE, ONE, CLASSES = net(3), net(1), classifier(3)
CHOOSE = r"Pass at=x to freeze the mask \(recommended\) or dynamic=True\.$"


def nowhere(x):
    return torch.cat([x[:1] * 0 + 1, x[:1] * 0])


BAD = {
    "no mask": (
        lambda: reducers.predicted_class_sum(THREE, 1),
        rf"predicted_class_sum: expected either at= or dynamic=True, got neither. {CHOOSE}",
    ),
    "two masks": (
        lambda: reducers.component(THREE, 1, at=X, dynamic=True),
        rf"component: expected either at= or dynamic=True, got both. {CHOOSE}",
    ),
    "negative target": (
        lambda: reducers.class_sum(THREE, -1),
        "class_sum: expected target to be a class number 0, 1, ..., got -1",
    ),
    "bool target": (lambda: reducers.logit(CLASSES, True), "logit: expected target to be .*, got True"),
    "negative other": (
        lambda: reducers.margin(THREE, 1, -1),
        "margin: expected other to be a class number 0, 1, ..., got -1",
    ),
    "target too large": (
        lambda: reducers.class_sum(THREE, 3)(X),
        "class_sum: expected a target below 3, for the K = 3 channels of the model, got target 3",
    ),
    "target too large at the frozen mask": (
        lambda: reducers.predicted_class_sum(THREE, 7, at=X),
        "predicted_class_sum: expected a target below 3, for the K = 3 .*, got target 7",
    ),
    "target too large for one channel": (
        lambda: reducers.soft_count(ONE, 2)(X),
        r"soft_count: .* below 2, .* K = 1 .*\(one channel counts as two classes\), got target 2",
    ),
    "target too large for one label": (
        lambda: reducers.soft_count(ONE, 1, exclusive=False)(X),
        "soft_count: expected a target below 1, for the K = 1 channels of the model, got target 1",
    ),
    "other too large": (lambda: reducers.margin(THREE, 1, 5)(X), "margin: .* below 3, .* got target 5"),
    "predicted_mask target": (lambda: reducers.predicted_mask(X, 2), "predicted_mask: .* below 2"),
    "margin to itself": (
        lambda: reducers.margin(THREE, 1, 1),
        "margin: expected two classes, got 1 twice",
    ),
    "vector for a map": (
        lambda: reducers.predicted_class_sum(CLASSES, 1, at=X),
        r"expected a model output of shape \(K, \*S\) for one example, got float64\(3,\) for an input "
        r"\(2, 4, 5\). This is a classification output: use logit",
    ),
    "map for a vector": (
        lambda: reducers.logit(THREE, 1)(X),
        r"logit: expected a model output of shape \(K,\) .*, got float64\(3, 4, 5\) .*segmentation output",
    ),
    "batch axis of a map": (
        lambda: reducers.class_sum(lambda x: THREE(x)[None], 1)(X),
        r"class_sum: .* got float64\(1, 3, 4, 5\) .* no batch axis: make the model with esegeta.from_module",
    ),
    "batch of volumes": (
        lambda: reducers.class_sum(lambda x: x, 1)(torch.zeros(1, 1, 3, 3, 3)),
        r"class_sum: .* got float32\(1, 1, 3, 3, 3\) .* no batch axis",
    ),
    "batch axis of a vector": (
        lambda: reducers.probability(lambda x: CLASSES(x)[None], 1)(X),
        r"probability: .* got float64\(1, 3\) .* no batch axis",
    ),
    "a number": (
        lambda: reducers.uncertainty(lambda x: x.sum())(X),
        r"uncertainty: .* \(K, \*S\) or \(K,\) .* got float64\(\) .* it is a score already",
    ),
    "empty mask": (
        lambda: reducers.predicted_class_sum(nowhere, 1, at=X),
        "predicted_class_sum: expected a mask with at least one voxel, got an empty one: class 1 is "
        "predicted nowhere at x. Explain what is there, or use class_sum, soft_count or region",
    ),
    "empty mask of one example in a batch": (
        lambda: vmap(lambda x: reducers.predicted_class_sum(lambda x: x, 1, at=x)(x))(
            torch.tensor([[[1.0, 2.0]], [[-1.0, -2.0]]])
        ),
        "class 1 is predicted nowhere at x",
    ),
    "empty region": (
        lambda: reducers.region(THREE, 1, ~M),
        "region: expected a mask with at least one voxel, got an empty one: no voxel is True",
    ),
    "no such component": (
        lambda: reducers.component(lambda x: x[:1] * 0 + 1, 1, 1, at=X),
        r"component: .* the prediction of class 1 at x has no part k=1 \(the largest is 0\)",
    ),
    "negative component": (
        lambda: reducers.component(THREE, 1, -1, at=X),
        "expected k to be the number of a part 0, 1, ..., got -1",
    ),
    "no boundary": (
        lambda: reducers.boundary(nowhere, 0, at=X),
        "boundary: .* class 0 has no boundary at x, it is predicted nowhere or everywhere",
    ),
    "shape of a mask": (
        lambda: reducers.region(THREE, 1, M[None])(X),
        r"region: expected a mask of the shape \(4, 5\) of the model's output map, got bool\(1, 4, 5\)",
    ),
    "shape of a mask for a vector": (
        lambda: reducers.log_probability(CLASSES, 1, mask=M)(X),
        r"log_probability: expected a mask of the shape \(\)",
    ),
    "another size than at": (
        lambda: reducers.predicted_class_sum(THREE, 1, at=X)(X[:, :3]),
        r"expected a mask of the shape \(3, 5\) .*, got bool\(4, 5\). .* a score fits inputs of one size",
    ),
    "finer nowhere": (
        lambda: reducers.finer(nowhere, 1, at=X),
        "finer: expected a mask with at least one voxel, .*: class 1 is predicted nowhere at x",
    ),
    "finer of another size": (
        lambda: reducers.finer(THREE, 1, at=X)(X[:, :3]),
        r"finer: expected an output \(3, 4, 5\) as at x, got float64\(3, 3, 5\). A frozen score fits",
    ),
    "finer with nothing": (
        lambda: reducers.finer(THREE, 1, at=X, k=0),
        "finer: expected k to be an int >= 1",
    ),
    "finer upside down": (
        lambda: reducers.finer(THREE, 1, at=X, alpha=-1.0),
        "finer: expected alpha .*, got -1.0",
    ),
    "finer target": (lambda: reducers.finer(CLASSES, 3, at=X), "finer: .* below 3, .* got target 3"),
    "length of an index": (
        lambda: reducers.voxel(THREE, 1, (1,))(X),
        r"voxel: expected an index with 2 numbers, from 0 to below \(4, 5\), got index \(1,\)",
    ),
    "index out of bounds": (lambda: reducers.voxel(THREE, 1, (4, 0))(X), r"voxel: .* got index \(4, 0\)"),
    "negative index": (lambda: reducers.voxel(THREE, 1, (0, -1))(X), r"voxel: .* got index \(0, -1\)"),
    "part": (
        lambda: reducers.otsu_sum(ONE, part="middle", at=X),
        "otsu_sum: expected part to be one of foreground, background, got 'middle'",
    ),
    "otsu of many channels": (
        lambda: reducers.otsu_sum(THREE, at=X),
        "otsu_sum: expected a model with one output channel, got K = 3 channels. Use predicted_class_sum",
    ),
    "of": (lambda: reducers.class_mean(THREE, 1, of="odds"), "class_mean: expected of to be one of logits"),
    "kind": (lambda: reducers.negative_loss(THREE, M, kind="l2"), "kind to be one of cross_entropy, dice"),
    "shape of labels": (
        lambda: reducers.negative_loss(THREE, M[None])(X),
        r"negative_loss: expected labels of the shape \(4, 5\) .* \(3, 4, 5\), got bool\(1, 4, 5\)",
    ),
    "labels of many channels": (
        lambda: reducers.negative_loss(THREE, M, exclusive=False)(X),
        r"negative_loss: expected labels of the shape \(3, 4, 5\)",
    ),
    "labels too large": (
        lambda: reducers.negative_loss(THREE, 3 * M)(X),
        "negative_loss: expected labels from 0 to 2, got others",
    ),
    "labels too large for one channel": (
        lambda: reducers.negative_loss(ONE, 2 * M)(X),
        "negative_loss: expected labels from 0 to 1, got others",
    ),
    "negative labels": (lambda: reducers.negative_loss(THREE, -1 * M)(X), "labels from 0 to 2"),
    "labels elsewhere": (
        lambda: reducers.negative_loss(THREE, M.to("meta"))(X),
        "negative_loss: expected the labels on cpu, where the output is, got a tensor on meta. Move",
    ),
    "NaN where the mask is frozen": (
        lambda: reducers.predicted_class_sum(lambda x: THREE(x) / 0 * 0, 1, at=X),
        "predicted_class_sum: expected a model output without NaN at x, got NaN in float64",
    ),
    "NaN in one example of a batch": (
        lambda: vmap(lambda x: reducers.predicted_class_sum(lambda x: x.sqrt(), 1, at=x)(x))(
            torch.tensor([[[1.0, 2.0]], [[1.0, -2.0]]])
        ),
        "a model output without NaN at x",
    ),
}
BAD_TYPES = {
    "a dict": (
        lambda: reducers.class_sum(lambda x: {"out": THREE(x)}, 1)(X),
        r"class_sum: expected the model to return one tensor, got dict .*from_module\(module, output=",
    ),
    "a tuple, where the mask is frozen": (
        lambda: reducers.predicted_class_sum(lambda x: (THREE(x), x), 1, at=X),
        r"predicted_class_sum: expected the model to return one tensor, got tuple",
    ),
    "decisions": (
        lambda: reducers.class_sum(lambda x: THREE(x) > 0, 1)(X),
        r"class_sum: expected the model to return floating scores, got bool\(3, 4, 5\). Explain the logits",
    ),
    "a mask of numbers": (
        lambda: reducers.region(THREE, 1, 1 * M),
        r"region: expected a boolean mask, got int64\(4, 5\). Use mask > 0",
    ),
    "labels of floats": (
        lambda: reducers.negative_loss(THREE, 1.0 * M),
        r"negative_loss: expected labels of an integer dtype, got float32\(4, 5\). Use labels.long\(\)",
    ),
}


@together("case", BAD)
def test_values_and_shapes_that_are_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("case", BAD_TYPES)
def test_types_that_are_refused(case):
    call, message = BAD_TYPES[case]
    with pytest.raises(TypeError, match=message):
        call()


def test_the_documentation_lists_every_reducer():
    page = (Path(__file__).parents[1] / "docs" / "write_a_reducer.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE)) == set(OURS)
