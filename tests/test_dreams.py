"""Dreams: known optima are reached, parts have the right derivatives, and the same key is the same dream."""

import math
import warnings

import numpy as np
import pytest
import torch
from rounding import alike
from torch import nn
from torch.func import vmap

import esegeta as eg
from esegeta import dreams
from esegeta._registry import DISTORTIONS, OBJECTIVES, OPTIMISERS, PARAMETRISATIONS, RECIPES, REGULARISERS
from esegeta.dreams import (
    distortions,
    objectives,
    optimisers,
    parametrisations,
    recipes,
    regularisers,
    spectra,
    starts,
)

SIZES = ((1, 8), (2, 6, 5), (1, 4, 5, 6))


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(axes, channels=1, dtype=torch.float64):
    """A small network whose places are "0", "1" and "2"."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    torch.manual_seed(0)
    net = (
        nn.Sequential(conv(channels, 4, 3, padding=1), nn.Softplus(), conv(4, 2, 3, padding=1))
        .to(dtype)
        .eval()
    )
    return eg.from_module(net)


# --- known optima ---


def test_a_quadratic_is_climbed_to_its_top_by_every_parametrisation():
    top = 0.5 + 0.3 * draw(2, 6, 5).tanh()
    score = lambda x: -(x - top).square().sum()
    spread = dreams.channel_statistics([draw(2, 6, 5, seed=s) for s in range(3)])
    ways = {
        "voxels": parametrisations.voxels(),
        "fourier": parametrisations.fourier(spacing=(1.0, 3.0)),
        "bounded": parametrisations.bounded(-1, 2),
        "decorrelated": parametrisations.decorrelated(spread),
        "composed": parametrisations.composed(parametrisations.fourier(), parametrisations.bounded(-1, 2)),
    }
    start = torch.full_like(top, 0.4)
    for name, way in ways.items():
        found = dreams.ascend(score, start, steps=200, parametrisation=way)()
        assert float((found.image - top).abs().max()) < 5e-3, name
    assert set(ways) | {"maco"} == set(PARAMETRISATIONS)


def test_a_linear_filter_under_a_bound_is_its_own_dream():
    # Of w.x - l |x|^2 the top is w / 2l.
    w = draw(1, 5, 4, 3)
    found = dreams.ascend(
        lambda x: (w * x).sum(), torch.zeros_like(w), steps=600, penalties=[(2.0, regularisers.l2())]
    )()
    assert float((found.image - w / 4).abs().max()) < 1e-3


def test_every_optimiser_climbs():
    top = draw(1, 6)
    score = lambda x: -(x - top).square().sum()
    ways = {
        "adam": optimisers.adam(0.05),
        "sgd": optimisers.sgd(0.1, momentum=0.5),
        "normalised": optimisers.normalised(optimisers.sgd(lambda k: 0.3 * 0.98**k)),
        "clipped": optimisers.clipped(optimisers.sgd(0.1), size=1.0),
        "smoothed": optimisers.smoothed(optimisers.sgd(0.1), every=100, sigma=0.02),
    }
    assert set(ways) == set(OPTIMISERS)
    for name, way in ways.items():
        found = dreams.ascend(score, torch.zeros_like(top), steps=400, optimiser=way)()
        assert float((found.image - top).abs().max()) < 0.02, name


def test_plain_steps_are_those_of_the_formula():
    score = lambda x: x.pow(3).sum()
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    expected = x.clone()
    for _ in range(3):
        expected = expected + 0.1 * 3 * expected.square()
    found = dreams.ascend(score, x, steps=3, optimiser=optimisers.sgd(0.1), record=[0, 2, 3])()
    assert alike(found.image, expected)
    assert (found.steps.tolist(), found.taken.item()) == ([0, 2, 3], 3)
    assert alike(found.images[2], found.image)
    assert alike(found.values[2], found.value)
    assert torch.equal(found.images[0], x)


# --- parts ---


@pytest.mark.parametrize("shape", SIZES)
def test_the_gradient_of_every_regulariser_agrees_with_finite_differences(shape):
    parts = {
        "l2": regularisers.l2(),
        "l1": regularisers.l1(),
        "power": regularisers.power(alpha=3),
        "bounds": regularisers.bounds(-0.2, 0.3),
        "total_variation": regularisers.total_variation(spacing=(0.5,) * (len(shape) - 1)),
        "style": regularisers.style(draw(*shape, seed=4), samples=15),
    }
    assert set(parts) == set(REGULARISERS)
    more = {
        "isotropic": regularisers.total_variation(isotropic=True),
        "beta": regularisers.total_variation(beta=2),
    }
    x, along = draw(*shape), draw(*shape, seed=1)
    for name, part in (parts | more).items():
        slope = (torch.func.grad(part)(x) * along).sum()
        step = 1e-6
        differences = (part(x + step * along) - part(x - step * along)) / (2 * step)
        assert math.isclose(float(slope), float(differences), rel_tol=1e-5, abs_tol=1e-6), name


def test_total_variation_is_not_the_sum_of_the_ends():
    there_and_back = torch.tensor([[0.0, 1.0, 0.0]])
    assert regularisers.total_variation()(there_and_back).item() == 2
    assert regularisers.total_variation(spacing=[0.5])(there_and_back).item() == 4
    flat = torch.ones(1, 3, 3, dtype=torch.float64)
    assert torch.func.grad(regularisers.total_variation(isotropic=True))(flat).abs().max().item() == 0


def test_style_is_the_kernel_distance_of_all_voxels_and_needs_places_to_see_forms():
    template = draw(1, 4, 5, seed=2)
    x = draw(1, 4, 5, seed=3)
    sigma = 0.7

    def plain(a, b):  # from the definition, voxel by voxel
        a, b = a.numpy(), b.numpy()
        return np.mean([[math.exp(-((u - v) ** 2) / (2 * sigma**2)) for v in b.ravel()] for u in a.ravel()])

    by_hand = plain(x, x) + plain(template, template) - 2 * plain(x, template)
    unplaced = regularisers.style(template, position=0, bandwidth=sigma)
    assert math.isclose(unplaced(x).item(), by_hand, rel_tol=1e-9)
    shuffled = template.flatten()[torch.randperm(20, generator=torch.Generator().manual_seed(0))].reshape(
        1, 4, 5
    )
    assert abs(unplaced(shuffled).item()) < 1e-12  # blind for where things are
    assert regularisers.style(template)(shuffled).item() > 1e-3


@pytest.mark.parametrize("shape", [(2, 9), (1, 7, 6), (1, 5, 4, 3)])
def test_the_style_of_a_large_image_is_that_of_means_and_felt_by_every_voxel(shape):
    template, x = draw(*shape, seed=2), draw(*shape, seed=3)
    few = regularisers.style(template, samples=8)
    assert few(template).item() == pytest.approx(0, abs=1e-12)
    down = torch.func.grad(few)(x)
    assert float(down.abs().min()) > 0
    # Of a box the penalty sees the mean alone.
    width = next(w for w in range(1, 9) if math.prod(-(-n // w) for n in shape[1:]) <= 8)
    first = (slice(None), *(slice(0, width) for _ in shape[1:]))
    moved = x.clone()
    moved[first] = x[first].flatten(1).mean(1).reshape(-1, *(1,) * (len(shape) - 1))
    assert alike(few(moved), few(x), units=64)
    if math.prod(shape[1:]) > 8:
        assert not torch.equal(moved, x)


def test_regularisers_of_a_recipe_leave_something_of_a_volume_of_any_size():
    for size in (6, 24):
        model = network(3)
        start = 0.01 * draw(1, size, size, size)
        found = recipes.natekar(objectives.channel(model, "1", 0), start, steps=8, jitter=1)(key=2)
        assert float(found.image.std()) > 0.03, size
        assert found.value > objectives.channel(model, "1", 0)(start)


def test_a_relative_weight_is_a_ratio_of_gradients():
    w = draw(1, 4)
    start = torch.zeros(1, 4, dtype=torch.float64)
    pull = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    found = dreams.ascend(
        lambda x: (w * x).sum(),
        start,
        steps=1,
        optimiser=optimisers.sgd(1.0),
        penalties=[(dreams.relative(0.5), lambda x: 1e6 * (pull * x).sum())],
    )()
    assert alike(found.image, w - 0.5 * w.norm() * pull)


@pytest.mark.parametrize("shape", SIZES)
def test_waves_are_complete_smooth_and_know_the_spacing(shape):
    x = draw(*shape)
    spacing = [1.0, 2.0, 5.0][: len(shape) - 1]
    ways = parametrisations.fourier(decay=1.5, spacing=spacing)
    assert alike(ways.decode(ways.encode(x)), x, units=256)
    wide = (1, *[4 * n for n in shape[1:]])
    images = torch.stack([ways.decode(draw(*wide, seed=s)) for s in range(20)])
    assert 0.7 < images.square().mean().item() < 1.4
    steps = [images.diff(dim=a).square().mean().item() for a in range(2, images.ndim)]
    assert steps == sorted(steps)  # along a coarse axis neighbours are farther apart


@pytest.mark.parametrize("shape", [(1, 8), (1, 7), (2, 6, 5), (1, 4, 6, 6)])
def test_maco_keeps_every_magnitude_while_it_dreams(shape):
    cohort = [draw(*shape, seed=s).cumsum(-1) + 2 for s in range(5)]
    magnitude = dreams.spectrum(iter(cohort))
    w = draw(*shape, seed=9)
    dream = recipes.phases(
        lambda x: (w * x).sum(), starts.phases(magnitude.to(torch.float64)), spectrum=magnitude, steps=40
    )
    found = dream(key=5)
    assert dreams.spectrum_residual(found.image, magnitude).item() < 1e-5
    begin = starts.phases(magnitude)(eg.random.fold_in(5, 0))
    assert dreams.spectrum_residual(begin, magnitude).item() < 1e-5
    assert float((w * found.image).sum()) > float((w * begin).sum())
    mean = torch.stack(cohort).mean(dim=(0, *range(2, len(shape) + 1)))
    assert torch.allclose(found.image.flatten(1).mean(1), mean, rtol=1e-4)
    # A sigmoid on voxels, as elsewhere, does not keep them: that is what the residual is there to say.
    assert dreams.spectrum_residual(torch.sigmoid(found.image), magnitude).item() > 0.1


def test_statistics_of_channels_are_those_of_all_voxels():
    images = [draw(3, 4, 5, seed=s) for s in range(4)]
    found = dreams.channel_statistics(iter(images))
    voxels = torch.cat([i.flatten(1) for i in images], dim=1).numpy()
    assert np.allclose(found.covariance.numpy(), np.cov(voxels, ddof=0))
    ways = parametrisations.decorrelated(found)
    assert alike(ways.decode(ways.encode(images[0])), images[0], units=512)
    white = torch.stack([ways.decode(draw(3, 40, 40, seed=s)) for s in range(4)]).transpose(0, 1).flatten(1)
    assert np.allclose(np.cov(white.numpy()), found.covariance.numpy(), atol=0.1)


def test_distortions_move_turn_and_scale_what_they_should():
    image = draw(1, 9, 9)
    moved = distortions.jitter(2)(image, 3)
    inside = [moved[:, 3:6, 3:6]]
    shifts = [image[:, 3 + i : 6 + i, 3 + j : 6 + j] for i in range(-2, 3) for j in range(-2, 3)]
    assert any(torch.equal(inside[0], s) for s in shifts)
    # A ball stays a ball, in mm, whatever the turn.
    spacing = (1.0, 2.0, 0.5)
    axes = [
        (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * d
        for n, d in zip((17, 9, 33), spacing, strict=True)
    ]
    ball = torch.exp(-sum(a.square() for a in torch.meshgrid(*axes, indexing="ij")) / 8)[None]
    turned = distortions.rotation(40, spacing=spacing)(ball, 11)
    assert float((turned - ball).abs().max()) < 0.06
    rod = torch.zeros(1, 17, 9, 33, dtype=torch.float64)
    rod[0, 8, 4] = 1
    assert float((distortions.rotation(40, spacing=spacing)(rod, 11) - rod).abs().max()) > 0.2
    assert alike(distortions.rotation(0)(ball, 1), ball, units=512)
    quarter = vmap(lambda k: distortions.rotation(90)(image, k))(torch.arange(50))
    assert float((quarter - torch.rot90(image, 1, (1, 2))).flatten(1).abs().amax(1).min()) < 1.0
    sums = vmap(lambda k: distortions.scaling(0.5, 0.5)(torch.ones(1, 4), k))(torch.arange(3))
    assert torch.allclose(sums, torch.ones(3, 1, 4))
    assert distortions.padding(2, value=3.0)(image, 0).shape == (1, 13, 13)
    mirrored = vmap(lambda k: distortions.flips(1)(image, k))(torch.arange(20))
    kinds = {bool(torch.equal(m, image)) for m in mirrored}
    assert kinds == {True, False}
    assert all(torch.equal(m, image) or torch.equal(m, image.flip(2)) for m in mirrored)
    assert set(DISTORTIONS) == {"jitter", "rotation", "scaling", "padding", "flips"}


# --- objectives and recipes, by the registry ---


def objective(spec, model, image):
    example = dict(spec.example)
    for name, value in example.items():
        if isinstance(value, torch.Tensor):
            example[name] = torch.ones(4, dtype=image.dtype) if name == "vector" else image + 0.5
    return spec.fn(*([model] if "model" in spec.parameters else []), **example)


@pytest.mark.parametrize("shape", SIZES)
def test_every_objective_grows_in_a_dream_in_every_number_of_axes(shape):
    model, image = network(len(shape) - 1, shape[0]), draw(*shape)
    for name, spec in OBJECTIVES.items():
        score = objective(spec, model, image)
        start = torch.stack([image, draw(*shape, seed=5)]) if name in ("diversity", "alignment") else image
        found = dreams.ascend(score, start, steps=10, optimiser=optimisers.adam(0.02), record=[0])()
        assert found.value > found.values[0], name


@pytest.mark.parametrize("shape", SIZES)
def test_every_recipe_dreams_in_every_number_of_axes(shape):
    model, image = network(len(shape) - 1, shape[0]), draw(*shape)
    for name, spec in RECIPES.items():
        example = dict(spec.example) | (
            {"spectrum": torch.ones(shape, dtype=torch.float64)} if name == "phases" else {}
        )
        if len(shape) == 2:
            example |= {"degrees": 0} if name == "natekar" else {}
            if name == "render":
                continue  # which turns images
        found = spec.fn(objectives.channel(model, "1", 1), image, **example)(key=3)
        assert found.image.shape == image.shape, name
        assert torch.isfinite(found.image).all(), name
        assert not torch.equal(found.image, image), name


def test_a_representation_is_inverted():
    model, image = network(2), draw(1, 6, 6)
    score = objectives.representation(model, "0", image)
    found = recipes.inversion(score, starts.noise((1, 6, 6), sigma=0.1, dtype=torch.float64), steps=400)(
        key=1
    )
    assert found.value > -1e-3  # four filters of nine weights tell every image from every other
    assert float((found.image - image).abs().max()) < 0.2


def test_images_of_a_set_keep_apart():
    model = network(2)
    channel = dreams.each(objectives.channel(model, "1", 0))
    apart = objectives.weighted((1.0, channel), (5.0, objectives.diversity(model, "1")))
    start = 0.01 * draw(3, 1, 6, 6)
    alone, kept = (dreams.ascend(score, start, steps=60)().image for score in (channel, apart))
    diversity = objectives.diversity(model, "1")
    assert diversity(kept) > diversity(alone)


# --- the same key is the same dream ---


def test_a_dream_is_the_same_alone_and_among_others_and_in_any_chunk():
    model = network(2)
    parts = {
        "steps": 6,
        "distortions": [distortions.jitter(1), distortions.rotation(10)],
        "penalties": [(1e-3, regularisers.total_variation()), (dreams.relative(0.1), regularisers.l2())],
        "parametrisation": parametrisations.fourier(),
        "record": [0, 3],
    }
    keys, channels = torch.tensor([4, 5, 6]), torch.tensor([0, 1, 3])
    start = draw(1, 8, 8)
    one = lambda c, key: dreams.ascend(objectives.channel(model, "1", c), start, **parts)(key=key)
    alone = [one(c, key) for c, key in zip(channels, keys, strict=True)]
    together = eg.batched(one)(channels, key=keys)
    with eg.execution(chunk=2):
        chunked = eg.batched(one)(channels, key=keys)
    for i, single in enumerate(alone):
        assert alike(together.image[i], single.image, units=4096)
        assert alike(chunked.images[i], single.images, units=4096)
        assert torch.equal(one(channels[i], keys[i]).image, single.image)  # the same call
        assert alike(one(int(channels[i]), int(keys[i])).image, single.image, units=4096)
    assert not torch.equal(alone[0].image, one(channels[0], 99).image)


def test_dreams_over_starts_are_mapped():
    model = network(2)
    xs = draw(3, 1, 6, 6)
    dream = lambda x: dreams.ascend(objectives.layer_norm(model, "1"), x, steps=4)().image
    assert alike(eg.batched(dream)(xs), torch.stack([dream(x) for x in xs]), units=4096)


# --- what goes wrong ---


def test_a_number_that_is_none_ends_the_dream_at_the_last_good_state():
    good, x = 0, 0.0
    while x < 0.45:
        good, x = good + 1, x + 0.1 * 0.5 / math.sqrt(0.45 - x)
    score = lambda x: -(0.45 - x).sqrt().sum()  # NaN beyond
    with (
        eg.execution() as info,
        pytest.warns(eg.ExecutionWarning, match=f"not finite at step {good + 1} of 9"),
    ):
        found = dreams.ascend(
            score, torch.zeros(1, 1), steps=9, optimiser=optimisers.sgd(0.1), record=[2, 8]
        )()
    assert found.taken.item() == good
    assert torch.isfinite(found.image).all()
    assert torch.isfinite(found.images[0]).all()
    assert found.images[1].isnan().all()
    assert found.values[1].isnan()
    assert any(event["event"] == "partial" for event in info.events)


def test_at_a_deadline_there_is_what_there_is():
    calls = []

    def slow(x):
        calls.append(1)
        if len(calls) == 4:
            clock[0] = True
        return x.sum()

    clock = [False]
    import esegeta.engine.ascent as ascent

    class Clock:
        def left(self):
            return -1.0 if clock[0] else 1.0

    before = ascent.current
    ascent.current = Clock
    try:
        with pytest.warns(eg.ExecutionWarning, match="first 3 of 100 steps"):
            found = dreams.ascend(slow, torch.zeros(1, 2), steps=100, record=[0, 3, 50])()
    finally:
        ascent.current = before
    assert found.taken.item() == 3
    assert torch.isfinite(found.images[1]).all()
    assert found.images[2].isnan().all()


def test_a_flat_start_is_told():
    with pytest.warns(eg.ExecutionWarning, match="gradient of .* is zero at the start"):
        dreams.ascend(lambda x: x.clamp(min=0).sum() * 1.0, torch.full((1, 3), -1.0), steps=2)()
    flat = dreams.objectives.channel(lambda x: eg.mark(x.clamp(min=0), "relu"), "relu", 0)
    with pytest.warns(eg.ExecutionWarning, match="gradient of channel is zero at the start"):
        dreams.ascend(flat, torch.full((1, 3), -1.0), steps=2)()


def test_bad_input_is_refused_in_words():
    model = network(2)
    x = torch.zeros(1, 6, 6, dtype=torch.float64)
    magnitude = torch.ones(1, 5, 5)
    unet = eg.from_module(eg.zoo.small_unet(2))
    cases = [
        (lambda: dreams.ascend(objectives.channel(model, "layer9", 0), x)(), "layer9"),
        (lambda: dreams.ascend(objectives.channel(model, "0", 9), x)(), "channel from 0 to 3"),
        (lambda: dreams.ascend(objectives.neuron(model, "0", 0, index=[9, 9]), x)(), "index into a grid"),
        (lambda: dreams.ascend(objectives.direction(model, "0", torch.ones(3)), x)(), "vector of 4"),
        (
            lambda: dreams.ascend(objectives.channel(unet, "encoder.relu", 0), x.repeat(2, 1, 1).float())(),
            "start (C,*S) that the objective takes, got one of shape (2, 6, 6)",
        ),
        (lambda: dreams.ascend(lambda x: (x * torch.ones(5)).sum(), x)(), "the size that the network takes"),
        (lambda: dreams.ascend(lambda x: x, x)(), "value of shape"),
        (lambda: dreams.ascend(lambda x: x.sum(), x, steps=0), "steps"),
        (lambda: dreams.ascend(lambda x: x.sum(), x, record=[500]), "from 0 to 256"),
        (lambda: dreams.ascend(lambda x: x.sum(), x * math.nan)(), "finite"),
        (lambda: dreams.ascend(lambda x: x.sum(), [1, 2])(), "torch.Tensor"),
        (lambda: dreams.ascend(lambda x: x.sum(), x, penalties=[regularisers.l2()]), "pairs"),
        (lambda: dreams.ascend(lambda x: x.sum(), x, optimiser="adam"), "optimiser to be one"),
        (lambda: recipes.phases(lambda x: x.sum(), x, spectrum=magnitude)(), "shape of the spectrum"),
        (
            lambda: dreams.ascend(lambda x: x.sum(), x, parametrisation=parametrisations.bounded(0, 1))(),
            "strictly between 0 and 1",
        ),
        (
            lambda: parametrisations.decorrelated(spectra.ChannelStatistics(torch.ones(2), torch.ones(2, 2))),
            "full rank",
        ),
        (lambda: dreams.spectrum([]), "at least one image"),
        (lambda: dreams.spectrum([x, x[:, :5]]), "one shape"),
        (lambda: regularisers.style(x)(x[:, :5]), "shape of the template"),
        (lambda: objectives.representation(lambda x: eg.mark(0 * x, "none"), "none", x), "answers to"),
        (lambda: distortions.rotation()(x[:, 0], 1), "two or three axes"),
        (lambda: dreams.radiomic(["shape_elongaton"]), "Nearest: shape_elongation"),
        (lambda: dreams.radiomic(["glcm_contrats_3D_avg"]), "Nearest: glcm_contrast"),
    ]
    for call, words in cases:
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        assert words in str(caught.value), str(caught.value)
        assert ": expected " in str(caught.value), words


def test_a_dream_on_a_size_that_the_rest_of_the_network_refuses_is_quiet(capfd):
    model = eg.from_module(eg.zoo.small_unet(2))
    start = 0.1 * draw(1, 15, 15, dtype=torch.float32)  # which cannot be halved and doubled
    found = dreams.ascend(objectives.channel(model, "encoder.conv", 0), start, steps=2)()
    assert found.taken.item() == 2
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err


# --- analysis ---


def test_an_analysis_reads_features_on_the_way_of_constant_steps():
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    with torch.no_grad():
        conv.weight[:] = 1.0
    model = lambda x: conv(x[None])[0] - 1
    start = torch.zeros(1, 9, 9, dtype=torch.float64)
    features = lambda image, mask: {"voxels": float(mask.sum()), "largest": float(image.max())}
    score = objectives.voxel(model, 1, index=[4, 4])
    found = dreams.analysis(model, score, features=features, steps=4, rate=0.1, record=[0, 2, 4])(start)
    assert found.names == ("voxels", "largest")
    assert torch.allclose(found.curve("largest"), torch.tensor([0.0, 0.2, 0.4]))
    # nine voxels of 0.2 are 1.8 in the middle, 1.2 beside it and 0.8 across.
    assert found.curve("voxels").tolist() == [0.0, 5.0, 13.0]  # of 0.4, six are enough, and three
    scaled = dreams.normalised(found, [{"voxels": 4.0, "largest": 1.0}, {"voxels": 6.0, "largest": 1.0}])
    assert scaled.curve("voxels").tolist()[0] == -5.0
    assert scaled.curve("largest").isnan().all()  # a population without spread gives no unit
    with pytest.raises(ValueError, match="the name of a feature"):
        found.curve("voxel")


def test_steps_of_one_length_walk_the_same_path():
    score = lambda x: -(x - 1).square().sum() * 50
    model = lambda x: x - 0.2
    features = lambda image, mask: {"mean": float(image.mean())}
    look = lambda **how: dreams.analysis(model, score, features=features, steps=4, record=[0, 1, 4], **how)(
        torch.zeros(1, 5, 5)
    )
    assert look(rate=0.1, by_length=True).curve("mean").tolist() == pytest.approx([0, 0.1, 0.4])
    assert look(rate=0.1).curve("mean")[1].item() == pytest.approx(10)  # ten times too far at the first step


def test_an_analysis_says_when_there_is_no_object_and_when_there_is_one_before():
    model = lambda x: x - 100
    score = lambda x: model(x)[0, 2, 2]
    look = dreams.analysis(
        model, score, features=dreams.radiomic(["shape_elongation"]), steps=2, record=[0, 2]
    )
    with pytest.warns(eg.ExecutionWarning, match="no voxel of class 1 was segmented"):
        found = look(torch.zeros(1, 5, 5))
    assert found.values.isnan().all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dreams.analysis(model, score, features=lambda x, m: {"n": 1.0}, steps=1)(torch.full((1, 5, 5), 200.0))
    assert any("voxels of class 1 already" in str(w.message) for w in caught)
