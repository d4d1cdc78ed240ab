"""Metrics of other libraries: those that follow their papers say the same, and the faults of the others are found.

``pytest -m peers``. Both get the same perturbations: what we draw from keys is handed to the other library. What it
calls black is the least value of the image, so the baseline is given as a number. Faults of metrics that the laws
find by themselves are in ``test_metric_laws``; here is what they come to in numbers.
"""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta import features, metrics, random
from esegeta.conformance.adapters import peers
from esegeta.metrics import given

pytestmark = pytest.mark.peers
DOUBLE = torch.float64
SHAPE = (1, 4, 5)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Net(nn.Module):
    """Two classes: the first is a smooth score of the image, the second its negative."""

    def __init__(self, w, bend=True):
        super().__init__()
        self.w, self.bend = nn.Parameter(w.float(), requires_grad=False), bend

    def forward(self, xs):
        found = (self.w * xs).flatten(1).sum(1)
        found = found.sin() + found / 2 if self.bend else found
        return torch.stack([found, -found], 1)

    def score(self, x):
        found = (self.w.double() * x).sum()
        return found.sin() + found / 2 if self.bend else found


@pytest.fixture(scope="module")
def quantus():
    pytest.importorskip("captum")
    with contextlib.suppress(ImportError):
        peers.torchvision()
    return pytest.importorskip("quantus", reason="pip install 'esegeta[peers]'")


USUAL = {"abs": False, "normalise": False, "disable_warnings": True, "display_progressbar": False}


def asked(metric, net, xs, maps, masks=None, **more):
    """What Quantus says of a few images, one number or list for each."""
    arrays = {"x_batch": xs, "a_batch": maps} | ({} if masks is None else {"s_batch": masks})
    batch = {name: value.float().numpy() for name, value in arrays.items()}
    with peers.quiet():
        return metric(
            model=net.eval(),
            y_batch=np.zeros(len(xs), dtype=int),
            device="cpu",
            softmax=False,
            **batch,
            **more,
        )


# --- The same ---------------------------------------------------------------------------------------------


def test_pixel_flipping_is_our_curve_after_its_first_point(quantus):
    net, x, a = Net(noise(*SHAPE)), noise(*SHAPE, seed=1), noise(*SHAPE, seed=2)
    metric = quantus.PixelFlipping(features_in_step=1, perturb_baseline=0.0, **USUAL)
    theirs = np.asarray(asked(metric, net, x[None], a[None])).flatten()
    ours = metrics.deletion(given(a), net.score, steps=None)(x)
    assert ours.values[1:].tolist() == pytest.approx(theirs.tolist(), abs=1e-5)


def test_region_perturbation_is_our_curve_of_patches(quantus):
    net, x, a = Net(noise(1, 6, 6)), noise(1, 6, 6, seed=1), noise(1, 6, 6, seed=2)
    settings = {"patch_size": 2, "order": "morf", "regions_evaluation": 4, "perturb_baseline": 0.0}
    metric = quantus.RegionPerturbation(**settings, **USUAL)
    theirs = np.asarray(asked(metric, net, x[None], a[None])).flatten()
    ours = metrics.deletion(given(a), net.score, features=features.grid(2), steps=None)(x)
    lost = ours.values[0] - ours.values[1:5]
    assert lost.tolist() == pytest.approx(theirs.tolist(), abs=1e-5)


def test_faithfulness_correlation_of_the_same_sets(quantus, monkeypatch):
    net, x, a, runs, size = Net(noise(*SHAPE)), noise(*SHAPE, seed=1), noise(*SHAPE, seed=2), 7, 6
    own = random.fold_in(5, 1)
    sets = [random.permutation(random.fold_in(own, i), 20) < size for i in range(runs)]
    drawn = iter([s.nonzero().flatten().numpy() for s in sets])
    monkeypatch.setattr(np.random, "choice", lambda *_, **__: next(drawn))
    settings = {"nr_runs": runs, "subset_size": size, "perturb_baseline": 0.0, "return_aggregate": False}
    (theirs,) = asked(quantus.FaithfulnessCorrelation(**settings, **USUAL), net, x[None], a[None])
    # A set of a given size, at most the losses of sensitivity-n: the correlation over the same sets.
    ours = metrics.sensitivity_n(given(a), net.score, n=size, samples=runs)(x, key=5)
    assert ours.item() == pytest.approx(float(theirs), abs=1e-4)


class Steps:
    """The steps that our metrics take around an image, as a perturbation of Quantus."""

    def __init__(self, key, radius, samples):
        self.next = iter(
            [
                (2 * random.uniform(random.fold_in(random.fold_in(key, 1), i), SHAPE, dtype=DOUBLE) - 1)
                * radius
                for i in range(samples)
            ]
        )

    def __call__(self, arr, indices, **_):
        return arr + next(self.next).float().numpy().reshape(1, -1)


def explained(model, inputs, targets, **_):
    xs = torch.as_tensor(inputs)
    return torch.stack([eg.gradient(lambda t: model(t[None])[0, 0])(x) for x in xs]).detach().numpy()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("MaxSensitivity", metrics.sensitivity_max),
        ("AvgSensitivity", metrics.sensitivity_mean),
        ("LocalLipschitzEstimate", metrics.lipschitz),
        ("RelativeInputStability", metrics.relative_input_stability),
    ],
)
def test_robustness_of_the_same_steps(quantus, theirs, ours):
    net, x, samples = Net(noise(*SHAPE)), noise(*SHAPE, seed=1), 6
    a = eg.gradient(net.score)(x)
    own = {"return_nan_when_prediction_changes": False, "nr_samples": samples}
    if theirs == "LocalLipschitzEstimate":  # Euclidean distances, as in the paper; by default it takes others
        own["norm_numerator"] = own["norm_denominator"] = quantus.similarity_func.distance_euclidean
    metric = getattr(quantus, theirs)(perturb_func=Steps(3, 0.05, samples), **own, **USUAL)
    (found,) = asked(metric, net, x[None], a[None], explain_func=explained)
    measure = ours(eg.gradient(net.score), radius=0.05, samples=samples)
    assert measure(x, key=3).item() == pytest.approx(float(found), rel=2e-3)


@pytest.mark.parametrize(
    ("theirs", "ours", "settings"),
    [
        ("RelevanceMassAccuracy", metrics.relevance_mass, {}),
        ("RelevanceRankAccuracy", metrics.relevance_rank, {}),
        ("AUC", metrics.roc_auc, {}),
        ("TopKIntersection", metrics.top_k_intersection, {"k": 5}),
        ("PointingGame", metrics.pointing_game, {}),
    ],
)
def test_where_a_map_lies(quantus, theirs, ours, settings):
    """Of maps without ties, and without negative values, which the mass of Quantus counts against the rest."""
    net, mask = Net(noise(*SHAPE)), noise(1, 4, 5, seed=7) > 0
    for seed in range(4):
        a = noise(*SHAPE, seed=seed).abs()
        metric = getattr(quantus, theirs)(**settings, **USUAL)
        (found,) = asked(metric, net, a[None], a[None], mask[None])
        assert ours(given(a), **settings)(a, mask=mask[0]).item() == pytest.approx(float(found), abs=1e-6)


@pytest.mark.parametrize(("theirs", "ours"), [("Sparseness", metrics.gini), ("Complexity", metrics.entropy)])
def test_how_simple_a_map_is(quantus, theirs, ours):
    net, a = Net(noise(*SHAPE)), noise(*SHAPE, seed=2)
    (found,) = asked(getattr(quantus, theirs)(**USUAL | {"abs": True}), net, a[None], a[None])
    assert ours(given(a))(a).item() == pytest.approx(float(found), rel=1e-5)


def test_the_map_of_another_class(quantus):
    w = noise(*SHAPE)

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.stack([w, w.roll(1), w.flip(2)]).float(), requires_grad=False)

        def forward(self, xs):
            return (self.w[None] * xs[:, None]).flatten(2).sum(2).sin()

    net, x = Three(), noise(*SHAPE, seed=1)
    model = eg.from_module(Three().double())
    explain_of = lambda label: eg.gradient(eg.reducers.logit(model, label))
    chosen = []

    def explain(model, inputs, targets, **_):
        chosen.append(int(np.asarray(targets).flatten()[0]))
        return explain_of(chosen[-1])(x).detach()[None].numpy()

    metric = quantus.RandomLogit(
        num_classes=3, similarity_func=quantus.similarity_func.correlation_spearman, seed=1, **USUAL
    )
    (found,) = asked(metric, net, x[None], explain_of(0)(x)[None], explain_func=explain)
    ours = metrics.random_logit(explain_of, 0, chosen[-1], similarity=metrics.rank_correlation)
    assert ours(x).item() == pytest.approx(float(found), abs=1e-6)


# --- Faults -----------------------------------------------------------------------------------------------


def test_sums_of_steps_beside_losses_so_far(quantus):
    """Of exact maps of a linear network the correlation is 1; and only the first batch counts."""
    w = noise(*SHAPE)
    net, xs = Net(w, bend=False), noise(6, *SHAPE, seed=1)
    metric = quantus.SensitivityN(features_in_step=1, n_max_percentage=1.0, return_aggregate=False, **USUAL)
    found = np.asarray(asked(metric, net, xs, w * xs, batch_size=6), dtype=float)
    assert np.nanmean(found) < 0.9
    ours = [metrics.sensitivity_n(given(w * x), net.score, n=3)(x, key=0).item() for x in xs]
    assert ours == pytest.approx([1] * 6)
    wrong = torch.cat([(w * xs)[:3], noise(3, *SHAPE, seed=5)])
    first = np.asarray(asked(metric, net, xs, wrong, batch_size=3), dtype=float)
    whole = np.asarray(asked(metric, net, xs[:3], wrong[:3], batch_size=3), dtype=float)
    assert first == pytest.approx(whole, nan_ok=True)  # what the other maps are makes no difference


def test_a_weighted_pointing_game_raises_and_an_empty_mask_is_a_hit(quantus):
    net, a, mask = Net(noise(*SHAPE)), noise(*SHAPE), torch.ones(1, 4, 5, dtype=torch.bool)
    mask[0, 0] = False
    hit = torch.where(mask, 1.0, 0.0).double() * (1 + a.abs())
    many = torch.stack([hit, hit])
    with pytest.raises((TypeError, ValueError), match=r"boolean array indexing|shape|broadcast"):
        asked(quantus.PointingGame(weighted=True, **USUAL), net, many, many, torch.stack([mask, mask]))
    (found,) = asked(quantus.PointingGame(**USUAL), net, a[None], a[None], torch.zeros(1, 1, 4, 5))
    assert found == True  # noqa: E712
    assert metrics.pointing_game(given(a))(a, mask=torch.zeros(4, 5, dtype=torch.bool)).isnan()


def test_an_imputation_of_several_channels(quantus):
    """Quantus's ROAD raises with more than one channel, and has the number of the first batch for all."""
    w = noise(3, 6, 6).abs()
    net, xs = Net(w, bend=False), noise(4, 3, 6, 6, seed=1).abs()
    settings = {"percentages": [10, 50], "noise": 0.0}
    with pytest.raises(IndexError):
        asked(quantus.ROAD(**settings, **USUAL), net, xs, xs)
    ours = metrics.road(given(xs[0]), net.score, steps=3, noise=0.0)(xs[0])
    assert torch.isfinite(ours.values).all()
    grey, ys = Net(w[:1], bend=False), noise(4, 1, 6, 6, seed=1).abs()
    ys[2:] = -ys[2:]  # of the other class, whatever is removed
    said = [asked(quantus.ROAD(**settings, **USUAL), grey, some, some, batch_size=2) for some in (ys, ys[:2])]
    assert said[0] == said[1]


def test_a_side_that_patches_do_not_divide(quantus):
    net, x = Net(noise(1, 7, 7), bend=False), noise(1, 7, 7, seed=1)
    metric = quantus.Infidelity(perturb_patch_sizes=[3], n_perturb_samples=1, perturb_baseline=0.0, **USUAL)
    with pytest.raises(ValueError, match=r"reshape|broadcast"):
        asked(metric, net, x[None], x[None])
    removal = metrics.square_removal(3)
    found = metrics.infidelity(given(net.w.double(), multiplied=False), net.score, perturbation=removal)
    assert found(x, key=0) < 1e-10


def test_patches_that_stay_removed(quantus):
    """Infidelity with each patch removed alone is another number than with all before it gone, too."""
    net, x, a = Net(noise(1, 4, 4)), noise(1, 4, 4, seed=1), noise(1, 4, 4, seed=2)
    metric = quantus.Infidelity(perturb_patch_sizes=[2], n_perturb_samples=1, perturb_baseline=0.0, **USUAL)
    (theirs,) = asked(metric, net, x[None], a[None])
    alone, together, gone = [], [], torch.zeros_like(x)
    for row, column in itertools.product((0, 2), repeat=2):
        patch = torch.zeros_like(x)
        patch[:, row : row + 2, column : column + 2] = 1
        gone = gone + patch
        for removed, errors in ((patch, alone), (gone, together)):
            lost = net.score(x) - net.score(x * (1 - removed))
            errors.append(float(((removed * x * a).sum() - lost) ** 2))
    assert float(theirs) == pytest.approx(sum(together) / 4, rel=1e-3)
    assert abs(float(theirs) - sum(alone) / 4) > 0.05 * float(theirs)


def test_segments_of_three_channels(quantus):
    w = noise(3, 8, 8).abs()
    net, x = Net(w, bend=False), noise(3, 8, 8, seed=1).abs()
    metric = quantus.IROF(return_aggregate=False, **USUAL)
    with pytest.raises((AssertionError, ValueError)):
        asked(metric, net, x[None], x[None])
    assert 0 < metrics.irof(given(w * x), net.score, features=features.grid(4))(x) <= 1


def test_negative_values_count_as_nothing(quantus):
    """Every voxel matters, and the map says so: the peer takes negative values for small ones."""
    w = torch.where(noise(*SHAPE) > 0, 1.0, -1.0).double()
    net, x = Net(w, bend=False), torch.ones(SHAPE, dtype=DOUBLE)
    (found,) = asked(quantus.NonSensitivity(perturb_baseline=0.0, **USUAL), net, x[None], (w * x)[None])
    assert int(found) == int((w < 0).sum()) > 0
    # Ours looks at what the score ignores, whatever the sign of the map there.
    inner = lambda x: (w * x)[:, :3].sum()
    ignored = torch.arange(4)[:, None].expand(4, 5) == 3
    for sign in (1, -1):
        assert eg.axioms.dummy(given(sign * w), ignored)(x) == 1
    assert eg.axioms.dummy(eg.input_x_gradient(inner), ignored)(x) == 0


def test_a_percentile_of_a_map_that_is_mostly_zero():
    """20 % are meant: everything goes most relevant first, 86 % least relevant first."""
    package = pytest.importorskip("pytorch_grad_cam.metrics.perturbation_confidence")
    a = torch.zeros(10, 10)
    a.flatten()[:14] = torch.linspace(0.5, 1, 14)
    gone = []
    imputer = lambda x, mask: gone.append(1 - float(mask.mean())) or x
    package.RemoveMostRelevantFirst(80, imputer)(a[None], a)
    package.RemoveLeastRelevantFirst(80, imputer)(a[None], a)
    assert gone == pytest.approx([1.0, 0.86])
    x = torch.ones(1, 10, 10)
    for sign in (1, -1):
        found = metrics.deletion(given(sign * a[None]), lambda x: x.sum(), steps=5)(x)
        assert found.largest_tie.item() == pytest.approx(0.86)
        wanted = {round(k / 5, 2) for k in range(6)} | {0.14, 0.86}
        assert {round(f, 2) for f in found.fractions.tolist()} <= wanted


def test_volumes_that_do_not_differ_have_no_variation():
    """MONAI's coefficient of the variation of a volume pools voxels: of ten equal masks it is not 0."""
    monai = pytest.importorskip("monai.data")
    transforms = pytest.importorskip("monai.transforms")
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:6, 4:6] = 1
    flip = transforms.Compose([transforms.RandFlipd(keys="image", prob=0.0)])
    with peers.quiet():
        again = monai.TestTimeAugmentation(
            flip, batch_size=5, num_workers=0, inferrer_fn=lambda x: x, device="cpu", orig_key="image",
            progress=False,
        )  # fmt: skip
        *_, found = again({"image": mask}, num_examples=10)
    assert found == pytest.approx(float(torch.stack([mask] * 10).std() / mask.mean()), rel=1e-4)
    assert found > 5
    volumes = torch.stack([mask.sum()] * 10)
    assert float(volumes.std() / volumes.mean()) == 0
