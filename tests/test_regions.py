"""Attribution by regions, against the greedy choice as the paper and its authors' code have it."""

import itertools
import math

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import assert_alike
from test_segmentation import drawn, slow_graph_segmentation, smooth
from torch.func import jvp, vmap

import esegeta as eg
from esegeta import segmentation, zoo
from esegeta.methods import xrai as module

GRIDS = [(23,), (8, 7), (4, 6, 3)]
strict = settings(
    derandomize=True, deadline=None, database=None, max_examples=40, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def our_own_messages():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def fixed(a):
    """An explanation that is this map, whatever x is."""
    return lambda x: a + 0 * x[:1].sum()


def random_maps(key, count, grid, most=6):
    """Label maps with gaps and with voxels of no part."""
    return (3 * drawn(key, count, *grid) + most / 2).round().long().clamp(-1, 2 * most) * 2 // 1


# -- the greedy choice ---------------------------------------------------------------------------------------------


def slow_ranks(a, masks, least):
    """Look at every mask before each choice."""
    masks, rank = [m for m in masks if m.any()], torch.full(a.shape, -1)
    for k in itertools.count():
        best, chosen = -math.inf, None
        for m in masks:
            new = m & (rank < 0)
            if int(new.sum()) >= least and a[new].mean() > best:
                best, chosen = a[new].mean(), new
        if chosen is None:
            rank[rank < 0] = k
            return rank
        rank[chosen] = k


def masks_of(maps, reach=0.0, spacing=None):
    maps = maps if maps.ndim > 1 else maps[None]
    return [
        segmentation.dilated(m == k, reach, spacing=spacing)
        for m in maps
        for k in m.unique().tolist()
        if k >= 0
    ]


@given(
    seed=st.integers(0, 10**6),
    grid=st.sampled_from(GRIDS),
    maps=st.integers(1, 4),
    least=st.integers(1, 6),
    reach=st.sampled_from([0.0, 1.0, 1.5, 3.0]),
    ties=st.booleans(),
)
@strict
def test_the_choice_is_that_of_looking_at_every_mask(seed, grid, maps, least, reach, ties):
    a = drawn(seed, *grid)
    # Whole numbers make ties, and sums without rounding make them exact on both sides.
    a = (2 * a).round() if ties else a
    labels = random_maps(seed + 1, maps, grid)
    spacing = (1.0, 0.5, 2.0)[: len(grid)]
    ours = segmentation.ranked(a, labels, reach=reach, least=least, spacing=spacing)
    assert torch.equal(ours, slow_ranks(a, masks_of(labels, reach, spacing), least))


def test_segments_come_in_many_forms():
    a = drawn(1, 8, 7)
    labels = random_maps(2, 3, (8, 7))
    rank = segmentation.ranked(a, labels)
    assert torch.equal(rank, segmentation.ranked(a, list(labels)))
    assert torch.equal(rank, segmentation.ranked(a, (labels[0], labels[1:].to(torch.int16))))
    masks = torch.stack(masks_of(labels))
    assert torch.equal(rank, segmentation.ranked(a, masks))
    assert torch.equal(rank, segmentation.ranked(a, [labels[0], *masks_of(labels[1:])]))
    assert torch.equal(rank, segmentation.ranked(a, 1000 * labels))  # gaps
    one = segmentation.ranked(a, labels[0])
    assert torch.equal(one, segmentation.ranked(a, labels[:1]))
    assert not torch.equal(one, rank)


def test_what_no_segment_covers_comes_last():
    a = drawn(1, 30)
    nothing = torch.full((30,), -1)
    assert segmentation.ranked(a, nothing).tolist() == [0] * 30
    half = nothing.clone()
    half[:10] = 3
    assert segmentation.ranked(a, half).tolist() == [0] * 10 + [1] * 20
    assert segmentation.ranked(a, half, least=11).tolist() == [0] * 30
    assert segmentation.ranked(a, half, reach=20).tolist() == [0] * 30
    rest = segmentation.averaged(a[None], segmentation.ranked(a, half))[0]
    torch.testing.assert_close(rest[20], a[10:].mean())


# -- regions -------------------------------------------------------------------------------------------------------


def test_known_regions():
    a = torch.tensor([[0.0, 0.0, 4.0, 6.0, 1.0, 1.0]])
    halves = torch.tensor([0, 0, 0, 1, 1, 1])
    pairs = torch.tensor([0, 0, 1, 1, 2, 2])
    x = torch.zeros(1, 6)
    third = 4 / 3
    assert torch.allclose(
        eg.regions(fixed(a), halves)(x), torch.tensor([[third, third, third, 8 / 3, 8 / 3, 8 / 3]])
    )
    assert eg.regions(fixed(a), pairs)(x).tolist() == [[0, 0, 5, 5, 1, 1]]
    assert eg.regions(fixed(a), [halves, pairs])(x).tolist() == [[0, 0, 5, 5, 1, 1]]
    masks = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]) > 0
    assert torch.allclose(
        eg.regions(fixed(a), masks)(x), torch.tensor([[0, 2, 5, 5, 2, 2]]) / torch.tensor([1, 3, 1, 1, 3, 3])
    )
    signed = torch.tensor([[-8.0, -8.0, 1.0, 1.0, 0.0, 0.0]])
    assert segmentation.ranked(signed[0], pairs).tolist() == [2, 2, 0, 0, 1, 1]
    by_size = eg.regions(eg.absolute(fixed(signed)), pairs)
    assert by_size(x).tolist() == [[8, 8, 1, 1, 0, 0]]


def test_the_object_is_found_first_and_exactly():
    truth = torch.zeros(24, 24, dtype=torch.bool)
    truth[6:15, 8:19] = True
    a = torch.where(truth, 1.0, 0.0).double() + 0.3 * drawn(4, 24, 24)
    pool = segmentation.graph_segmentation(
        truth[None].double() + 0.05 * drawn(5, 1, 24, 24), [0.5, 2.0, 8.0], sigma=0, minimum=20
    )
    rank = segmentation.ranked(a, [truth.long() - 1, pool])
    assert torch.equal(rank == 0, truth)
    x = truth[None].double()
    found = eg.regions(fixed(a[None]), [pool])(x)[0]
    assert ((found > 0.5) == truth).all()
    assert ((a > 0.5) != truth).float().mean() > 0.03  # before, single voxels were wrong


@given(
    seed=st.integers(0, 10**6),
    grid=st.sampled_from(GRIDS),
    channels=st.integers(1, 3),
    least=st.integers(1, 9),
)
@strict
def test_sums_stay(seed, grid, channels, least):
    a = drawn(seed, channels, *grid)
    labels = random_maps(seed + 1, 3, grid)
    for dtype, rounding in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        b = eg.regions(fixed(a.to(dtype)), labels, reach=1, least=least)(torch.zeros(1, *grid, dtype=dtype))
        assert b.shape == a.shape
        torch.testing.assert_close(
            b.flatten(1).sum(1), a.to(dtype).flatten(1).sum(1), rtol=0, atol=rounding * a.numel()
        )
        # Channels share the regions of their sum.
        rank = segmentation.ranked(a.to(dtype).double().sum(0), labels, reach=1, least=least)
        assert_alike(b, segmentation.averaged(a.to(dtype), rank))


def test_regions_turn_with_the_map():
    a, labels = drawn(1, 1, 4, 6, 3), random_maps(2, 3, (4, 6, 3))
    x = torch.zeros(1, 4, 6, 3, dtype=a.dtype)
    b = eg.regions(fixed(a), labels, reach=1.1, spacing=(1.0, 2.0, 1.0))(x)
    for axes in itertools.permutations(range(3)):
        order = (0, *[1 + i for i in axes])
        spacing = [(1.0, 2.0, 1.0)[i] for i in axes]
        turned = eg.regions(fixed(a.permute(order)), labels.permute(order), reach=1.1, spacing=spacing)
        torch.testing.assert_close(turned(x.permute(order)), b.permute(order))
    flipped = eg.regions(fixed(a.flip(2)), labels.flip(2), reach=1.1, spacing=(1.0, 2.0, 1.0))
    torch.testing.assert_close(flipped(x), b.flip(2))


def test_completeness_survives():
    unet = zoo.small_unet(2, classes=2)
    x = eg.random.uniform(3, (1, 16, 16))
    score = eg.reducers.class_sum(eg.from_module(unet), 1)
    ig = eg.integrated_gradients(score, steps=32)
    by_regions = eg.regions(ig, lambda x: segmentation.slic(x, 9))
    zero = torch.zeros_like(x)
    left = eg.axioms.completeness(by_regions, score)(x, zero)
    torch.testing.assert_close(left, eg.axioms.completeness(ig, score)(x, zero), rtol=1e-3, atol=1e-3)
    assert len(by_regions(x, zero).unique()) <= 9


def test_segments_of_each_example_under_vmap():
    w = drawn(1, 2, 8, 7)
    explain = eg.regions(
        eg.input_x_gradient(lambda x: (w * x.square()).sum()),
        lambda x: [segmentation.slic(x, 6), segmentation.graph_segmentation(x, [0.5, 2.0], minimum=3)],
        reach=1,
    )
    xs = torch.stack([smooth(k, 2, 8, 7) for k in range(3)])
    loop = torch.stack([explain(x) for x in xs])
    torch.testing.assert_close(vmap(explain)(xs), loop)
    torch.testing.assert_close(eg.batched(explain)(xs), loop)


def test_the_derivative_is_that_of_the_means():
    w, labels = drawn(1, 1, 8, 7), random_maps(2, 2, (8, 7))
    inner = eg.input_x_gradient(lambda x: (w * x.pow(3)).sum())
    explain = eg.regions(inner, labels)
    x, v = drawn(3, 1, 8, 7), drawn(4, 1, 8, 7)
    value, change = jvp(explain, (x,), (v,))
    rank = segmentation.ranked(inner(x)[0], labels)
    torch.testing.assert_close(value, explain(x))
    torch.testing.assert_close(change, segmentation.averaged(jvp(inner, (x,), (v,))[1], rank))
    h = 1e-6
    measured = (explain(x + h * v) - explain(x - h * v)) / (2 * h)
    torch.testing.assert_close(change, measured, rtol=1e-6, atol=1e-6)


X = torch.rand(1, 6, 5)
ROWS = torch.arange(6)[:, None].expand(6, 5)
WRONG = [
    (
        lambda: eg.regions(fixed(X), ROWS.T)(X),
        ValueError,
        "ranked",
        r"segments on the grid of the map \(6, 5\)",
        r"\(5, 6\)",
    ),
    (
        lambda: eg.regions(fixed(X), [ROWS, ROWS[0]])(X),
        ValueError,
        "ranked",
        "segments on the grid",
        r"\(5,\)",
    ),
    (lambda: eg.regions(fixed(X), X[0])(X), TypeError, "ranked", "segments of an integer dtype", "float32"),
    (lambda: eg.regions(fixed(X), [])(X), TypeError, "ranked", "a label map, or a list", r"list \[\]"),
    (lambda: eg.regions(fixed(X), lambda x: None)(X), TypeError, "ranked", "a label map, or a list", "None"),
    (lambda: eg.regions(fixed(X), 3), TypeError, "regions", "segments, or a function", "int 3"),
    (lambda: eg.regions(fixed(X), ROWS, reach=-1), ValueError, "regions", "reach to be a finite", "-1"),
    (lambda: eg.regions(fixed(X), ROWS, least=0), ValueError, "regions", "least to be an int >= 1", "0"),
    (lambda: eg.regions(fixed(X), ROWS, spacing=(1,))(X), ValueError, "ranked", "spacing of 2", r"\(1,\)"),
    (
        lambda: eg.regions(fixed(X * math.nan), ROWS)(X),
        ValueError,
        "ranked",
        "finite values in density",
        "30 NaN",
    ),
    (lambda: eg.regions(lambda x: (x, x), ROWS)(X), TypeError, "regions", "an explanation to be", "tuple"),
    (lambda: eg.xrai(torch.sum, minimum=-1), ValueError, "xrai", "minimum to be a finite number >= 0", "-1"),
    (lambda: eg.xrai(torch.sum, reach=math.nan), ValueError, "xrai", "reach to be a finite", "nan"),
    (lambda: eg.xrai(torch.sum, scales=(5, -5)), ValueError, "xrai", "every scale to be a finite", "-5"),
    (lambda: eg.xrai(torch.sum, scales=()), ValueError, "xrai", "a sequence of scales", r"\(\)"),
    (lambda: eg.xrai(torch.sum, scales=50), ValueError, "xrai", "a sequence of scales", "int 50"),
    (lambda: eg.xrai(torch.sum, spacing=(1, 1, 1))(X), ValueError, "xrai", "spacing of 2", r"\(1, 1, 1\)"),
    (lambda: eg.xrai(torch.sum)(X[0, 0]), ValueError, "xrai", r"x of shape \(C,\*S\)", r"\(5,\)"),
]


@pytest.mark.usefixtures("our_own_messages")
@pytest.mark.parametrize(("call", "kind", "where", "expected", "got"), WRONG)
def test_what_is_wrong_is_refused(call, kind, where, expected, got):
    with pytest.raises(kind, match=rf"(?s)^{where}: expected .*{expected}.*, got .*{got}.*\. .+\.$"):
        call()


# -- XRAI ----------------------------------------------------------------------------------------------------------


def disk_dilated(mask, radius):
    """By a disk of whole pixels, as image libraries have it."""
    out = np.zeros_like(mask)
    for i, j in np.argwhere(mask):
        for k, m in np.ndindex(mask.shape):
            if (i - k) ** 2 + (j - m) ** 2 <= radius**2:
                out[k, m] = True
    return out


def authors_xrai(a, segments, min_pixel_diff):
    """The map as the authors' code makes it from an attribution and a list of masks."""
    out = np.full(a.shape, -np.inf)
    current, remaining = np.zeros(a.shape, dtype=bool), dict(enumerate(segments))
    while True:
        best_gain, best = -np.inf, None
        for key in list(remaining):
            new = remaining[key] & ~current
            if new.sum() < min_pixel_diff:
                del remaining[key]
                continue
            gain = a[new].mean()
            if gain > best_gain:
                best_gain, best = gain, key
        if not remaining:
            break
        out[remaining[best] & ~current] = best_gain
        current |= remaining.pop(best)
    rest = out == -np.inf
    if rest.any():
        out[rest] = a[rest].mean()
    return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_xrai_is_that_of_its_authors(seed, channels):
    scales, minimum, radius = (50, 150, 500), 12, 2
    x, w = smooth(seed, channels, 20, 17), drawn(seed + 9, channels, 20, 17)
    score = lambda x: (w * x.sin()).sum() + (x[0] * x[-1]).mean()
    low, high = eg.baselines.black(x), eg.baselines.white(x)
    ig = eg.integrated_gradients(score, steps=64)
    a = ((ig(x, low) + ig(x, high)) / 2).amax(0).numpy()
    unit = (x - x.min()) / (x.max() - x.min()) * 2 - 1
    blurred = eg.spatial.blur(unit, 0.8)
    # Scales are for regions of 150 pixels.
    maps = [slow_graph_segmentation(blurred, k / 255 * minimum / 150, minimum).numpy() for k in scales]
    segments = [disk_dilated(m == k, radius) for m in maps for k in range(m.max() + 1)]
    assert len(segments) > 10
    expected = authors_xrai(a, segments, minimum // 3)
    ours = eg.xrai(score, steps=64, scales=scales, minimum=minimum, reach=radius)(x)
    np.testing.assert_allclose(ours[0].numpy(), expected, rtol=1e-9, atol=1e-12)
    assert len(np.unique(expected.round(9))) > 5


@pytest.mark.parametrize(
    ("shape", "spacing", "minimum", "reach", "least", "scale"),
    [
        ((224, 224), None, 150, 5, 50, 50 / 255),
        ((448, 448), None, 600, 10, 200, 200 / 255),
        ((448, 112), (0.5, 2.0), 150, 5, 50, 50 / 255),
        ((16, 16, 16), None, 150**1.5 / 14**3, 5 / 14, 1, None),
    ],
    ids=str,
)
def test_defaults_are_those_of_the_authors_at_their_size(
    shape, spacing, minimum, reach, least, scale, monkeypatch
):
    seen = {}

    def segment(x, scales, **settings):
        seen.update(settings, scales=scales, range=x.max() - x.min())
        return torch.zeros(x.shape[1:], dtype=torch.int64)

    def rank(a, found, **settings):
        seen.update(reach=settings["reach"], least=settings["least"])
        return torch.zeros_like(a, dtype=torch.int64)

    monkeypatch.setattr(module.segmentation, "graph_segmentation", segment)
    monkeypatch.setattr(module.segmentation, "ranked", rank)
    x = eg.random.uniform(1, (1, *shape))
    eg.xrai(lambda x: x.square().sum(), steps=1, spacing=spacing)(x)
    assert seen["minimum"] == pytest.approx(minimum)
    assert seen["reach"] == pytest.approx(reach)
    assert seen["least"] == least
    assert seen["sigma"] == pytest.approx(0.8)
    assert seen["range"] == pytest.approx(2)  # from -1 to 1: differences are all that counts
    if scale is not None:
        assert seen["scales"][0] == pytest.approx(scale)
    assert [k / seen["scales"][0] for k in seen["scales"]] == pytest.approx([1, 2, 3, 5, 10, 24])


@pytest.mark.parametrize("grid", [(40,), (16, 12), (8, 9, 7)], ids=str)
def test_xrai_keeps_the_sum_in_every_dimension(grid):
    w = drawn(2, 1, *grid)
    score = lambda x: (w * x.pow(3)).sum()
    x = smooth(1, 1, *grid)
    ig = eg.over_baselines(eg.integrated_gradients(score, steps=8))
    a = ig(x, torch.stack([eg.baselines.black(x), eg.baselines.white(x)]))
    b = eg.xrai(score, steps=8, minimum=4, reach=1)(x)
    assert b.shape == x.shape
    torch.testing.assert_close(b.sum(), a.sum())
    assert 2 < len(b.unique()) < x.numel() / 3
    # All lengths are physical: voxels of 2 mm with lengths in mm are voxels of 1.
    mm = eg.xrai(score, steps=8, minimum=4 * 2 ** len(grid), reach=2, spacing=(2.0,) * len(grid))(x)
    torch.testing.assert_close(mm, b)
    torch.testing.assert_close(eg.xrai(score, spacing=(2.0,) * len(grid))(x), eg.xrai(score)(x))


def test_xrai_turns_with_the_image():
    w, x = drawn(2, 1, 9, 8, 7), smooth(1, 1, 9, 8, 7)
    explain = lambda w: eg.xrai(lambda x: (w * x.pow(3)).sum(), steps=4, minimum=4, reach=1.0)
    b = explain(w)(x)
    for axes in itertools.permutations(range(3)):
        order = (0, *[1 + i for i in axes])
        torch.testing.assert_close(explain(w.permute(order))(x.permute(order)), b.permute(order))


def test_xrai_of_an_image_without_edges():
    x = torch.full((1, 9, 9), 0.3)
    assert eg.xrai(lambda x: x.sum())(x).tolist() == torch.zeros(1, 9, 9).tolist()


def test_xrai_finds_what_the_score_looks_at():
    x = torch.zeros(1, 32, 32)
    x[0, 4:14, 5:15] = 1
    x[0, 18:28, 16:28] = 1
    x = x + 0.03 * drawn(1, 1, 32, 32).float()
    seen = torch.zeros(32, 32, dtype=torch.bool)
    seen[4:14, 5:15] = True
    noise = 0.5 * drawn(2, 1, 32, 32).float()
    score = lambda x: ((seen + noise) * x).sum()
    b = eg.xrai(score, steps=2, minimum=60, reach=0)(x)[0]
    top = b >= b.flatten().sort(descending=True).values[int(seen.sum()) - 1]
    assert 2 * float((top & seen).sum()) / float(top.sum() + seen.sum()) > 0.95
