"""Supervoxels, graph segmentation and label maps, against slow plain loops straight from the papers."""

import itertools
import math

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.func import grad, jvp, vmap

import esegeta as eg
from esegeta import segmentation, spatial
from esegeta.segmentation import averaged, dilated, graph_segmentation, relabelled, slic

NAN = float("nan")
GRIDS = [(23,), (9, 7), (6, 4, 5)]
strict = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def drawn(key, *shape):
    return eg.random.normal(key, shape, dtype=torch.float64)


def smooth(key, *shape):
    return spatial.blur(drawn(key, *shape), 1.5)


def without_gaps(labels):
    return torch.equal(labels.unique(), torch.arange(int(labels.max()) + 1))


def in_order_of_appearance(labels):
    seen = list(dict.fromkeys(labels.flatten().tolist()))
    return seen == sorted(seen)


def same_parts(a, b):
    """Whether two label maps differ in the numbers only."""
    pairs = set(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    return len(pairs) == len(a.unique()) == len(b.unique())


@pytest.fixture
def our_own_messages():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


# -- graph segmentation --------------------------------------------------------------------------------------------


def neighbours_of(grid):
    """Every pair of neighbours once, one direction after another."""
    for offset in itertools.product((-1, 0, 1), repeat=len(grid)):
        if offset > (0,) * len(grid):
            for v in itertools.product(*map(range, grid)):
                u = tuple(a + b for a, b in zip(v, offset, strict=True))
                if all(0 <= a < n for a, n in zip(u, grid, strict=True)):
                    yield v, u


def slow_graph_segmentation(x, k, minimum):
    """Algorithm 1 of Felzenszwalb and Huttenlocher, and the joining of small parts, edge by edge."""
    values, grid = x.numpy(), x.shape[1:]
    part = {v: v for v in itertools.product(*map(range, grid))}
    members = {v: [v] for v in part}
    internal = dict.fromkeys(part, 0.0)
    edges = [
        (
            math.sqrt(sum((c[u] - c[v]) ** 2 for c in values))
            if len(values) > 1
            else abs(values[0][u] - values[0][v]),
            v,
            u,
        )
        for v, u in neighbours_of(grid)
    ]
    edges.sort(key=lambda e: e[0])

    def join(a, b, weight):
        if len(members[a]) < len(members[b]):
            a, b = b, a
        for v in members[b]:
            part[v] = a
        members[a] += members.pop(b)
        internal[a] = weight

    for weight, v, u in edges:
        a, b = part[v], part[u]
        if a != b and weight <= min(internal[c] + k / len(members[c]) for c in (a, b)):
            join(a, b, weight)
    for weight, v, u in edges:
        a, b = part[v], part[u]
        if a != b and min(len(members[a]), len(members[b])) < minimum:
            join(a, b, weight)
    number = {c: i for i, c in enumerate(dict.fromkeys(part.values()))}
    return torch.tensor([number[c] for c in part.values()]).reshape(grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("block", [1, 7, 1 << 14])
def test_graph_segmentation_is_the_algorithm_of_the_paper(grid, channels, block, monkeypatch):
    monkeypatch.setattr(segmentation, "_BLOCK", block)
    found = set()
    for seed in range(4):
        for k, minimum in [(0.0, 0), (0.3, 0), (2.0, 1), (2.0, 5), (8.0, 3), (1e9, 0)]:
            x = smooth(seed, channels, *grid)
            ours = graph_segmentation(x, k, sigma=0, minimum=minimum)
            assert torch.equal(ours, slow_graph_segmentation(x, k, minimum)), (seed, k, minimum)
            found.add(int(ours.max()) + 1)
    assert len(found) > 5, "these settings tell nothing apart"
    assert 1 in found


@given(
    seed=st.integers(0, 10**6),
    grid=st.sampled_from(GRIDS),
    values=st.integers(2, 6),
    k=st.floats(0, 20),
    minimum=st.integers(0, 12),
)
@strict
def test_graph_segmentation_is_the_algorithm_of_the_paper_among_ties(seed, grid, values, k, minimum):
    x = (drawn(seed, 1, *grid) * values).round()
    assert torch.equal(
        graph_segmentation(x, k, sigma=0, minimum=minimum), slow_graph_segmentation(x, k, minimum)
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_parts_of_a_graph_segmentation(grid):
    x = drawn(3, 2, *grid)
    for minimum in (0, 4, 9):
        labels = graph_segmentation(x, 1.0, minimum=minimum)
        assert labels.shape == grid
        assert labels.dtype == torch.int64
        assert without_gaps(labels)
        assert in_order_of_appearance(labels)
        assert int(labels.flatten().bincount().min()) >= minimum
        for part in labels.unique():  # neighbours share a corner at least
            assert ndimage.label(labels == part, np.ones((3,) * len(grid)))[1] == 1
    scales = [0.1, 1.0, 10.0]
    several = graph_segmentation(x, scales, minimum=3)
    each = [graph_segmentation(x, k, minimum=3) for k in scales]
    assert torch.equal(several, torch.stack(each))


def test_graph_segmentation_finds_flat_objects_exactly():
    objects = torch.zeros(1, 12, 12, 12)
    objects[0, 2:6, 2:9, 3:7] = 1
    objects[0, 8:11, 1:4, 8:11] = 3
    labels = graph_segmentation(objects, 20.0, sigma=0)
    assert same_parts(labels, objects[0].long())


def test_lengths_of_a_graph_segmentation_are_physical():
    x = smooth(5, 1, 8, 9, 7)
    voxels = graph_segmentation(x, 0.5, sigma=0.8, minimum=6)
    assert int(voxels.max()) > 1
    mm = graph_segmentation(x, 0.5 * 8, sigma=1.6, minimum=48, spacing=(2, 2, 2))
    assert torch.equal(voxels, mm)
    narrow = graph_segmentation(x, 0.5 * 3, sigma=0, minimum=18, spacing=torch.tensor([1.0, 3.0, 1.0]))
    assert torch.equal(narrow, graph_segmentation(x, 0.5, sigma=0, minimum=6))
    blurred = spatial.blur(x, 1.0, (1, 3, 1))
    assert torch.equal(
        graph_segmentation(x, 1.5, sigma=1.0, spacing=(1, 3, 1)), graph_segmentation(blurred, 0.5, sigma=0)
    )


def test_graph_segmentation_turns_with_the_image():
    x = smooth(6, 1, 6, 7, 8)
    labels = graph_segmentation(x, 0.3, minimum=4)
    assert int(labels.max()) > 3
    for axes in itertools.permutations(range(3)):
        turned = graph_segmentation(x.permute(0, *[1 + a for a in axes]), 0.3, minimum=4)
        assert same_parts(turned, labels.permute(axes))
    assert same_parts(graph_segmentation(x.flip(2), 0.3, minimum=4), labels.flip(1))


# -- supervoxels ---------------------------------------------------------------------------------------------------


def slow_slic(x, cells, spacing, compactness, iterations):
    """SLIC on a full grid, voxel by voxel, in the precision of the fast one; then pieces join neighbours."""
    grid, single = x.shape[1:], np.float32
    step = [n * mm / c for n, mm, c in zip(grid, spacing, cells, strict=True)]
    side = math.prod(step) ** (1 / len(grid))
    scaled = [(c / (c.std() * compactness * math.sqrt(len(x)))).astype(single) for c in x.numpy()]
    voxels = list(itertools.product(*map(range, grid)))
    place = {v: [single(i * mm / side) for i, mm in zip(v, spacing, strict=True)] for v in voxels}
    label = {
        v: int(np.ravel_multi_index([i * c // n for i, c, n in zip(v, cells, grid, strict=True)], cells))
        for v in voxels
    }
    count = math.prod(cells)
    for _ in range(iterations):
        centres = []
        for k in range(count):
            own = [v for v in voxels if label[v] == k]
            rows = [[float(c[v]) for c in scaled] + [float(p) for p in place[v]] for v in own]
            centres.append([single(sum(column) / len(own)) for column in zip(*rows, strict=True)])
        before = dict(label)
        for v in voxels:
            best = single(np.inf)
            for k, centre in enumerate(centres):
                middle = centre[len(x) :]
                if all(
                    m - s / side <= p < m + s / side
                    for p, m, s in zip(place[v], map(float, middle), step, strict=True)
                ):
                    d = single(0)
                    for p, m in zip(place[v], middle, strict=True):
                        d = d + (p - m) * (p - m)
                    for c, m in zip(scaled, centre, strict=False):
                        d = d + (c[v] - m) * (c[v] - m)
                    if d < best:
                        best, label[v] = d, k
            assert best < np.inf or label[v] == before[v]
    # Connected pieces by flooding.
    piece, pieces = {}, []
    for k in range(count):
        for v in voxels:
            if label[v] == k and v not in piece:
                pieces.append([v])
                piece[v] = len(pieces) - 1
                for u in pieces[-1]:
                    for n in faces(u, grid):
                        if n not in piece and label[n] == k:
                            piece[n] = piece[v]
                            pieces[-1].append(n)
    kept = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))[:count]
    target = {i: i for i in kept}
    while len(target) < len(pieces):
        new = {}
        for i in set(range(len(pieces))) - set(target):
            touching = [
                target[piece[n]]
                for v in pieces[i]
                for n in faces(v, grid)
                if piece[n] in target and piece[n] != i
            ]
            if touching:
                new[i] = max(sorted(set(touching)), key=touching.count)
        target.update(new)
    return relabelled(torch.tensor([target[piece[v]] for v in voxels]).reshape(grid))


def faces(v, grid):
    for axis, n in enumerate(grid):
        for i in (v[axis] - 1, v[axis] + 1):
            if 0 <= i < n:
                yield (*v[:axis], i, *v[axis + 1 :])


@pytest.mark.parametrize(
    ("grid", "spacing", "cells"),
    [
        ((40,), (1.0,), (5,)),
        ((14, 12), (1.0, 1.0), (4, 3)),
        ((14, 6), (1.0, 2.5), (4, 4)),
        ((7, 8, 4), (1.0, 1.0, 2.0), (2, 2, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("compactness", [0.3, 1.0, 5.0])
def test_slic_is_the_algorithm_of_the_paper(grid, spacing, cells, channels, compactness):
    for seed in range(3):
        x = smooth(seed, channels, *grid) + 0.05 * drawn(seed + 50, channels, *grid)
        ours = slic(x, math.prod(cells), spacing=spacing, compactness=compactness, iterations=4)
        assert torch.equal(ours, slow_slic(x, cells, spacing, compactness, 4))


@pytest.mark.parametrize(
    ("grid", "count", "expected"),
    [
        ((100,), 7, 7),
        ((30, 30), 100, 100),
        ((30, 30), 7, 6),
        ((20, 20, 20), 100, 100),
        ((40, 20, 20), 54, 54),
    ],
)
def test_the_number_of_parts(grid, count, expected):
    assert int(slic(torch.zeros(1, *grid), count).max()) + 1 == expected
    x = smooth(4, 2, *grid)
    labels = slic(x, count, compactness=0.5)
    assert int(labels.max()) + 1 == expected
    assert without_gaps(labels)
    for part in labels.unique():  # neighbours share a face
        assert ndimage.label(labels == part)[1] == 1


def test_parts_of_a_constant_image_are_cubes_in_mm():
    labels = slic(torch.ones(1, 40, 20, 10), 64, spacing=(1.0, 2.0, 4.0))
    assert int(labels.max()) + 1 == 64
    for box in ndimage.find_objects(labels.numpy() + 1):
        assert [s.stop - s.start for s in box] in ([10, 5, 2], [10, 5, 3])
    thin = slic(torch.ones(1, 60, 60, 2), 36)
    assert int(thin.max()) + 1 == 36  # one layer
    assert torch.equal(thin[..., 0], thin[..., 1])


def test_slic_follows_edges_where_it_may():
    x = torch.zeros(1, 24, 24)
    x[:, 5:14, 3:17] = 1
    x[:, 16:, 9:] = 2
    x = x + 0.01 * drawn(1, 1, 24, 24)
    labels = slic(x, 16, compactness=0.2)
    truth = x[0].round()
    pure = sum(int((truth[labels == k] == truth[labels == k].mode().values).sum()) for k in labels.unique())
    assert pure == labels.numel()
    cubes = slic(x, 16, compactness=1e6)
    assert torch.equal(cubes, slic(torch.zeros(1, 24, 24), 16))


def test_slic_ignores_units():
    x = smooth(2, 2, 12, 12)
    labels = slic(x, 9)
    assert torch.equal(labels, slic(4 * x, 9))
    scaled = torch.stack([1024 * x[0], x[1]])
    assert torch.equal(labels, slic(scaled, 9))
    assert torch.equal(labels, slic(x, 9, spacing=(2, 2)))
    constant = torch.cat([x, torch.full((1, 12, 12), 0.1, dtype=x.dtype)])
    assert torch.equal(slic(constant, 9, compactness=math.sqrt(2 / 3)), labels)


@pytest.mark.parametrize("grid", [(50,), (24, 30), (14, 15, 16)], ids=str)
def test_slic_in_a_mask(grid):
    x = smooth(7, 1, *grid)
    places = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in grid], indexing="ij"))
    ball = places.norm(dim=0) < 0.8
    labels = slic(x, 12, mask=ball)
    assert torch.equal(labels >= 0, ball)
    assert torch.equal(labels.unique(), torch.arange(-1, int(labels.max()) + 1))
    assert 10 <= int(labels.max()) + 1 <= 14
    assert torch.equal(slic(x, 12, mask=torch.ones(grid, dtype=torch.bool)), slic(x, 12))
    changed = torch.where(ball, x, 1e3)
    assert torch.equal(slic(changed, 12, mask=ball), labels)  # what lies outside does not matter
    sizes = labels[ball].bincount()
    assert sizes.max() < 5 * sizes.float().mean()


def test_islands_of_a_mask_are_parts_of_their_own():
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[:8, :8] = mask[15:, 15:] = mask[19, 0] = True
    labels = slic(torch.zeros(1, 20, 20), 2, mask=mask)
    assert torch.equal(labels >= 0, mask)
    assert len(labels[:8, :8].unique()) == len(labels[15:, 15:].unique()) == 1
    assert labels[0, 0] != labels[19, 19]
    assert without_gaps(labels[mask])


# -- small functions -----------------------------------------------------------------------------------------------


def test_relabelled_closes_gaps_in_order():
    labels = torch.tensor([[5, -7, 5], [10**12, 0, 3]])
    assert relabelled(labels).tolist() == [[2, -1, 2], [3, 0, 1]]
    assert relabelled(labels.clamp(max=11)).tolist() == [[2, -1, 2], [3, 0, 1]]
    assert relabelled(torch.full((3,), -2)).tolist() == [-1, -1, -1]
    assert relabelled(torch.tensor([3, 1], dtype=torch.uint8)).tolist() == [1, 0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("radius", [0, 1, 1.5, 2.5])
def test_dilated_is_everything_within_a_distance(grid, radius):
    mask = drawn(3, *grid) > 1.2
    spacing = (1.0, 0.7, 1.6)[: len(grid)]
    places = torch.stack([i * mm for i, mm in zip(mask.nonzero().T, spacing, strict=True)], 1)
    expected = torch.zeros(grid, dtype=torch.bool)
    for v in itertools.product(*map(range, grid)):
        here = torch.tensor([i * mm for i, mm in zip(v, spacing, strict=True)])
        expected[v] = (places - here).norm(dim=1).min() <= radius + 1e-6
    assert torch.equal(dilated(mask, radius, spacing=spacing), expected)
    assert torch.equal(dilated(mask, 1), spatial.dilate(mask))
    assert not dilated(torch.zeros_like(mask), 3).any()


def test_averaged_keeps_sums_and_has_a_derivative():
    a, labels = drawn(1, 2, 6, 5), (drawn(2, 6, 5) * 2).round().long().clamp(min=-1)
    mean = averaged(a, labels)
    for part in labels.unique():
        here = labels == part
        torch.testing.assert_close(mean[:, here], a[:, here].mean(1, keepdim=True).expand(2, int(here.sum())))
    w = drawn(3, 2, 6, 5)
    g = grad(lambda a: (w * averaged(a, labels)).sum())(a)
    torch.testing.assert_close(g, averaged(w, labels))  # it is a projection: its own transpose
    torch.testing.assert_close(averaged(mean, labels), mean)
    many = torch.stack([labels, labels.flip(0)])
    mapped = vmap(averaged)(torch.stack([a, a]), many)
    torch.testing.assert_close(mapped, torch.stack([averaged(a, m) for m in many]))
    wide = averaged(torch.full((1, 10**6), 0.1), torch.zeros(10**6, dtype=torch.int64))
    assert wide[0, 0] == torch.tensor(0.1)


# -- everywhere ----------------------------------------------------------------------------------------------------

EVERY = {
    "slic": lambda x: slic(x, 6, spacing=(1.0, 2.0)),
    "slic in a mask": lambda x: slic(x, 4, mask=x[0] < 1),
    "graph_segmentation": lambda x: graph_segmentation(x, 0.5, minimum=3),
    "several scales": lambda x: graph_segmentation(x, [0.5, 2.0], minimum=3),
    "relabelled": lambda x: relabelled((7 * x[0]).long()),
    "dilated": lambda x: dilated(x[0] > 0.5, 1.5),
    "ranked": lambda x: segmentation.ranked(x[0], (3 * x[1]).long().clamp(-1, 2)),
}


@pytest.mark.parametrize("run", EVERY.values(), ids=EVERY)
def test_under_every_transform(run):
    xs = torch.stack([smooth(k, 2, 8, 7) for k in range(3)])
    xs = xs / xs.std()
    loop = torch.stack([run(x) for x in xs])
    assert not torch.equal(loop[0], loop[1])
    assert torch.equal(vmap(run)(xs), loop)
    assert torch.equal(vmap(vmap(run))(xs[None]), loop[None])
    assert torch.equal(eg.batched(run)(xs), loop)
    g = grad(lambda x: (run(x) * x.sum()).sum())(xs[0])
    torch.testing.assert_close(g, loop[0].sum().expand(xs[0].shape).to(g))
    value, change = jvp(lambda x: run(x) * 1.0 + 0 * x.sum(), (xs[0],), (xs[1],))
    assert torch.equal(value, loop[0] * 1.0)
    assert not change.any()
    watched = run(xs[0].clone().requires_grad_())
    assert torch.equal(watched, loop[0])
    assert not watched.requires_grad
    state = torch.get_rng_state()
    kept = xs[0].clone()
    assert torch.equal(run(kept), run(kept))
    assert torch.equal(kept, xs[0])
    assert torch.equal(state, torch.get_rng_state())
    with torch.inference_mode():
        assert torch.equal(run(xs[0].clone()), loop[0])
    scattered = torch.empty(2, 8, 7, 2, dtype=xs.dtype)[..., 0].copy_(xs[0])
    assert torch.equal(run(scattered), loop[0])


def test_a_dry_run_has_a_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.rand(2, 8, 7))
        assert slic(x, 4).shape == (8, 7)
        assert graph_segmentation(x, [1.0, 2.0]).shape == (2, 8, 7)


X = torch.rand(1, 6, 5)
WRONG = [
    (lambda: slic(X[0, 0], 3), ValueError, "slic", r"x of shape \(C,\*S\)", r"float32\(5,\)"),
    (lambda: slic(X[None, None], 3), ValueError, "slic", r"x of shape \(C,\*S\)", r"\(1, 1, 1, 6, 5\)"),
    (lambda: slic(X.long(), 3), TypeError, "slic", "x of a floating dtype", "int64"),
    (lambda: slic(X, 0), ValueError, "slic", "count to be an int >= 1", "0"),
    (lambda: slic(X, 2.5), ValueError, "slic", "count to be an int >= 1", "2.5"),
    (lambda: slic(X, 31), ValueError, "slic", "at most as many parts as voxels", "31 parts of 30 voxels"),
    (lambda: slic(X, 3, iterations=-1), ValueError, "slic", "iterations to be an int >= 0", "-1"),
    (lambda: slic(X, 3, compactness=0), ValueError, "slic", "compactness > 0", "0"),
    (lambda: slic(X, 3, compactness=NAN), ValueError, "slic", "compactness to be a finite", "nan"),
    (lambda: slic(X, 3, spacing=(1.0,)), ValueError, "slic", "spacing of 2 finite lengths", r"\(1.0,\)"),
    (lambda: slic(X, 3, spacing=(1.0, 0.0)), ValueError, "slic", "spacing of 2 finite lengths", "0.0"),
    (lambda: slic(X, 3, mask=X[0]), TypeError, "slic", "a boolean mask", "float32"),
    (lambda: slic(X, 3, mask=X > 0), ValueError, "slic", r"mask on the grid \(6, 5\)", r"bool\(1, 6, 5\)"),
    (lambda: slic(X, 3, mask=X[0] > 2), ValueError, "slic", "as many parts as voxels", "3 parts of 0 voxels"),
    (lambda: slic(X * NAN, 3), ValueError, "slic", "finite values in x", "30 NaN"),
    (
        lambda: graph_segmentation(X * NAN, 1),
        ValueError,
        "graph_segmentation",
        "finite values in x",
        "30 NaN",
    ),
    (lambda: graph_segmentation(X, -1), ValueError, "graph_segmentation", "scale to be a finite", "-1"),
    (
        lambda: graph_segmentation(X, [1, NAN]),
        ValueError,
        "graph_segmentation",
        "scale to be a finite",
        "nan",
    ),
    (lambda: graph_segmentation(X, []), ValueError, "graph_segmentation", "at least one scale", "none"),
    (
        lambda: graph_segmentation(X, 1, sigma=-1),
        ValueError,
        "graph_segmentation",
        "sigma to be a finite",
        "-1",
    ),
    (lambda: graph_segmentation(X, 1, minimum=-1), ValueError, "graph_segmentation", "minimum to be", "-1"),
    (
        lambda: graph_segmentation(X, 1, spacing=(1, 1, 1)),
        ValueError,
        "graph_segmentation",
        "spacing of 2",
        "1",
    ),
    (lambda: relabelled(X), TypeError, "relabelled", "labels of an integer dtype", "float32"),
    (lambda: dilated(X, 1), TypeError, "dilated", "a boolean mask", "float32"),
    (lambda: dilated(X > 0, -1), ValueError, "dilated", "radius to be a finite number >= 0", "-1"),
    (
        lambda: averaged(X, torch.zeros(5, 6).long()),
        ValueError,
        "averaged",
        "labels on the grid",
        r"\(5, 6\)",
    ),
    (lambda: averaged(X, X[0]), TypeError, "averaged", "labels of an integer dtype", "float32"),
    (lambda: averaged(X, torch.full((6, 5), 30)), ValueError, "averaged", "labels from -1 to 29", "outside"),
]


@pytest.mark.usefixtures("our_own_messages")
@pytest.mark.parametrize(("call", "kind", "where", "expected", "got"), WRONG)
def test_what_is_wrong_is_refused(call, kind, where, expected, got):
    with pytest.raises(kind, match=rf"^{where}: expected .*{expected}.*, got .*{got}.*\. .+\.$"):
        call()
