"""Directions of concepts: known answers, tests that hold their level, and relevance that adds up."""

import math

import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta import concepts, random
from esegeta.zoo.drawn import drawn

D = 6


def sets(key, images=60, concept=40, others=160):
    """Gradients, and activations of a layer that has nothing of the concept."""
    g = random.normal(random.fold_in(key, 0), (images, D))
    return (
        g,
        random.normal(random.fold_in(key, 1), (concept, D)),
        random.normal(random.fold_in(key, 2), (others, D)),
    )


def rejected(null, trials, **how):
    test = concepts.tcav(null=null, **how)
    return sum(test(*sets(trial), key=trial).p <= 0.05 for trial in range(trials)) / trials


@pytest.mark.parametrize(
    ("null", "trials", "off"),
    [
        ("labels", 200, 0.046),  # three standard errors
        pytest.param("labels", 1000, 0.014, marks=pytest.mark.slow),
        pytest.param("subsets", 1000, 0.014, marks=pytest.mark.slow),
    ],
)
def test_tcav_rejects_a_concept_that_the_network_ignores_as_often_as_it_says(null, trials, off):
    assert abs(rejected(null, trials, permutations=39, sets=5) - 0.05) <= off


def test_one_concept_set_against_many_random_sets_proves_nothing():
    test = concepts.tcav(null="kim2018", sets=30)
    found = [test(*sets(key, images=30, others=900), key=key) for key in range(40)]
    assert sum(one.p <= 0.05 for one in found) / 40 > 0.2
    assert found[0].anticonservative
    assert "anticonservative: it rejects" in str(found[0])
    assert not concepts.tcav(permutations=9)(*sets(3)).anticonservative


@pytest.mark.parametrize("null", ["labels", "subsets"])
def test_tcav_finds_what_the_score_uses(null):
    g, mine, rest = sets(0)
    along = torch.eye(D)[2]
    test = concepts.tcav(null=null, permutations=400, sets=8)
    found = test(g.abs() * along + 0.01 * g, mine + 3 * along, rest)
    assert found.value == 1
    assert found.p < 0.02
    assert found.direction[2] > 0.9
    against = test(-g.abs() * along + 0.01 * g, mine + 3 * along, rest)
    assert against.value == 0
    assert against.p < 0.02
    assert against.derivative < 0


def test_one_gradient_for_all_images_is_told_apart_by_its_mean():
    """The share is 0 or 1 whatever the direction: without the mean every test would end at p = 1."""
    _g, mine, rest = sets(1)
    linear = (torch.eye(D)[2] + 0.1 * torch.eye(D)[0]).expand(30, D)
    assert concepts.tcav(permutations=200)(linear, mine + 2 * torch.eye(D)[2], rest).p < 0.01
    ps = [concepts.tcav(permutations=99)(linear, *sets(key)[1:], key=key).p for key in range(100)]
    assert sum(p <= 0.05 for p in ps) <= 12


def test_directions_have_the_closed_form_and_the_optimum():
    _, mine, rest = sets(5)
    mine = mine + torch.tensor([1.0, 0.5, 0, 0, 0, 0])
    x, y = (
        torch.cat([mine, rest]).double(),
        torch.cat([torch.ones(len(mine)), torch.zeros(len(rest))]).double(),
    )
    within = sum((len(a) - 1) * torch.cov(a.double().T) for a in (mine, rest))
    lda = torch.linalg.solve(within, (mine.mean(0) - rest.mean(0)).double())
    fast = concepts.cav(mine, rest, fit=concepts.ridge(0.0))
    torch.testing.assert_close(fast.double(), lda / lda.norm(), atol=1e-5, rtol=1e-4)
    means = (mine.mean(0) - rest.mean(0)).double()
    far = concepts.cav(mine, rest, fit=concepts.ridge(1e9))
    torch.testing.assert_close(far.double(), means / means.norm(), atol=1e-5, rtol=1e-4)
    # The logistic one, by an optimiser that knows nothing of its bound.
    slow = torch.zeros(D + 1, dtype=torch.float64, requires_grad=True)
    centred = x - x.mean(0)
    centred = centred / centred.square().mean().sqrt()
    step = torch.optim.LBFGS([slow], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss():
        step.zero_grad()
        value = nn.functional.binary_cross_entropy_with_logits(centred @ slow[:-1] + slow[-1], y)
        value = value + 0.005 * slow[:-1].square().sum()
        value.backward()
        return value

    step.step(loss)
    expected = (slow[:-1] / slow[:-1].norm()).detach()
    fitted = concepts.logistic(0.01)(x, y)
    torch.testing.assert_close(fitted / fitted.norm(), expected, atol=1e-4, rtol=1e-3)
    both = concepts.logistic(0.01)(x, torch.stack([y, 1 - y]))
    torch.testing.assert_close(both[1], -both[0], atol=1e-6, rtol=1e-5)


def test_a_network_that_uses_a_concept_is_found_from_its_images():
    """From images to a p-value: stripes make the score grow, blobs do not."""
    net = nn.Sequential(nn.Conv2d(1, 2, (1, 2)), nn.ReLU(), nn.Conv2d(2, 1, 1)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[[[1.0, -1.0]]], [[[1.0, 1.0]]]]))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[[[1.0]], [[0.0]]]]))
    model = eg.from_module(net)
    noise = [random.normal(key, (1, 8, 8)) for key in range(30)]
    stripes = [x + torch.tensor([2.0, -2.0]).repeat(4) for x in noise[:15]]
    look = concepts.pooled(model, "1")
    slope = concepts.pooled_gradient(eg.reducers.class_sum(model, 0, exclusive=False), "1")
    found = concepts.tcav(permutations=200)(
        [slope(x) for x in noise], [look(x) for x in stripes], [look(x) for x in noise[15:]]
    )
    assert found.value == 1
    assert found.p < 0.02


def test_parts_of_activations_are_found_and_weighed():
    h = torch.tensor([[0.8, 0.6, 0.0, 0.0], [0.0, 0.0, 0.6, 0.8]])
    a = [torch.tensordot(h.T, random.uniform(key, (2, 5, 4)).square(), dims=1) for key in range(3)]
    found = concepts.factorise(a, rank=2, steps=500, key=1)
    assert found.error < 0.01
    best = (found.directions @ h.T).amax(1)
    assert (best > 0.999).all()
    assert torch.equal(found.directions, concepts.factorise(a, rank=2, steps=500, key=1).directions)
    w = concepts.coefficients(found.directions)(a[0])
    assert w.shape == (2, 5, 4)
    torch.testing.assert_close(
        torch.tensordot(found.directions, w, dims=([0], [0])), a[0], atol=0.01, rtol=0.05
    )
    few = concepts.factorise(a, rank=2, voxels=8)  # a sample of the voxels
    assert few.directions.shape == (2, 4)


def test_importance_is_that_of_the_score():
    h = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) / torch.tensor([[math.sqrt(2)], [1.0]])
    net = drawn(lambda: nn.Sequential(nn.Conv3d(1, 3, 1), nn.ReLU(), nn.Conv3d(3, 1, 1)), key=2).eval()
    with torch.no_grad():
        net[0].bias.fill_(1.0)
        net[2].weight.copy_(torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1, 1))
    score = eg.reducers.class_sum(eg.from_module(net), 0, exclusive=False)
    x = random.uniform(3, (1, 3, 2, 4))
    found = concepts.importance(score, "1", directions=h, samples=64)(x, key=0)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]), atol=0.05, rtol=0)


NET = drawn(
    lambda: nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)),
    ),
    key=1,
).eval()
X = random.normal(0, (1, 6, 7))
SCORE = eg.reducers.class_sum(eg.from_module(NET), 1)


@pytest.mark.parametrize("method", ["gradient", "input_x_gradient", "lrp"])
@pytest.mark.parametrize("place", ["0", "1", "2"])
def test_relevance_of_all_channels_sums_to_the_whole(method, place):
    whole = eg.find_method(method).fn(SCORE)(X)
    count = len(eg.tap(SCORE, place)(X))
    parts = [concepts.relevance(method, place, channels=[k])(SCORE)(X) for k in range(count)]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(part, whole) for part in parts)
    every = concepts.relevance(method, place, channels=range(count))(SCORE)(X)
    torch.testing.assert_close(every, whole, atol=1e-5, rtol=1e-4)


def test_relevance_of_directions_sums_to_the_whole_and_values_stay():
    base, _ = torch.linalg.qr(random.normal(4, (4, 4)))
    parts = [concepts.relevance("gradient", "1", directions=v)(SCORE)(X) for v in base.T]
    torch.testing.assert_close(torch.stack(parts).sum(0), eg.gradient(SCORE)(X), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(concepts.through(SCORE, "1", directions=base[0])(X), SCORE(X))
    one = concepts.through(SCORE, "1", directions=torch.eye(4)[2])
    two = concepts.through(SCORE, "1", channels=[2])
    torch.testing.assert_close(eg.gradient(one)(X), eg.gradient(two)(X))


def test_a_channel_that_does_not_matter_has_a_map_of_zeros():
    """Not a refusal, as for a count: the score varies, and nothing of that passes here."""
    score = lambda x: (eg.mark(torch.cat([x, -x]), "both") * torch.tensor([[2.0], [0.0]])).sum()
    x = random.normal(0, (1, 5))
    for method in ("gradient", "input_x_gradient"):
        assert not concepts.relevance(method, "both", channels=[1])(score)(x).any()


def test_what_bypasses_a_place_is_left_out():
    unet = eg.from_module(eg.zoo.small_unet(2))
    score, x = eg.reducers.class_sum(unet, 1), random.normal(1, (1, 8, 8))
    assert not eg.places(score, x)["bottom"].cut
    count = len(eg.tap(score, "bottom")(x))
    inside = concepts.relevance("gradient", "bottom", channels=range(count))(score)(x)
    around = eg.gradient(lambda v: eg.replace(score, "bottom")(v, eg.tap(score, "bottom")(x)))(x)
    torch.testing.assert_close(inside + around, eg.gradient(score)(x), atol=1e-5, rtol=1e-4)


def test_examples_by_relevance_are_not_those_by_activation():
    images = [random.normal(key, (1, 6, 6)) for key in range(7)]
    look = eg.tap(SCORE, "2")
    found = concepts.examples(look, count=3)(iter(images))
    peaks = torch.stack([look(x).flatten(1).amax(1) for x in images])
    assert torch.equal(found.images[1], peaks[:, 1].sort(descending=True).indices[:3])
    first = found.voxels[1, 0].tolist()
    assert look(images[found.images[1, 0]])[1][tuple(first)] == found.values[1, 0]
    relevant = concepts.examples(eg.at("input_x_gradient", "2")(SCORE), count=3)(images)
    assert relevant.images.shape == (3, 3)
    assert not torch.equal(relevant.values, found.values)


A = torch.rand(8, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: concepts.tcav()(A, A[:, :3], A), r"concept of shape \(n, 6\) with n >= 2"),
        (lambda: concepts.tcav()(A, A[:1], A), "n >= 2"),
        (lambda: concepts.tcav(null="t-test"), "null to be one of labels, subsets, kim2018"),
        (lambda: concepts.tcav(null="subsets")(A, A, A), "at least 20 images for 10 disjoint sets, got 8"),
        (lambda: concepts.tcav()(A, A[0] * torch.ones(4, 1), A[0] * torch.ones(3, 1)), "activations that differ"),
        (lambda: concepts.cav(A / 0, A), "finite values in concept"),
        (lambda: concepts.factorise([A - 1], rank=2), "activations that are not negative, got a minimum.*ReLU"),
        (lambda: concepts.factorise([], rank=2), "activations of one image or more"),
        (lambda: concepts.factorise([A], rank=9), "rank at most 6"),
        (lambda: concepts.factorise([0 * A], rank=2), "not all zero"),
        (lambda: concepts.coefficients(A)(torch.ones(3, 4)), "activations of 6 channels"),
        (lambda: concepts.coefficients(-A), r"directions \(r, K\) >= 0"),
        (lambda: concepts.through(SCORE, "1"), "channels= or directions=, got neither"),
        (lambda: concepts.through(SCORE, "1", channels=[4])(X), "channels from 0 to 3"),
        (lambda: concepts.through(SCORE, "1", directions=torch.ones(3))(X), "directions with 4 channels, got 3"),
        (lambda: concepts.through(SCORE, "1", directions=torch.zeros(4)), "not zero"),
        (lambda: concepts.relevance("grad", "1", channels=[0]), "the name of a method"),
        (lambda: concepts.examples(eg.tap(SCORE, "1"))([]), "one image or more"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, text):
    with pytest.raises((ValueError, TypeError), match=text):
        call()


def test_weights_that_are_not_finite_are_refused_and_never_significant():
    g, mine, rest = sets(3)

    def broken(x, y):
        return torch.full((*y.shape[:-1], x.shape[1]), math.nan)

    for null in concepts.NULLS:
        with pytest.raises(ValueError, match="finite values in weights of fit"):
            concepts.tcav(broken, null=null, permutations=9, sets=2)(g, mine, rest)
    with pytest.raises(ValueError, match="finite values in weights of fit"):
        concepts.cav(mine, rest, fit=broken)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_a_direction_does_not_depend_on_the_unit_of_activations(scale):
    _, mine, rest = sets(4)
    plain, scaled = concepts.cav(mine + 1, rest), concepts.cav(scale * (mine + 1), scale * rest)
    assert torch.allclose(scaled, plain, atol=1e-4)
