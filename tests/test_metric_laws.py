"""Metrics are verified themselves: every registered one keeps the laws, and each law rejects what breaks it."""

import math

import pytest
import torch

import esegeta as eg
from esegeta._registry import METRICS
from esegeta.conformance import METRIC_LAWS, MetricSubject, rebuilt, search, subject_of, verify
from esegeta.engine import levels
from esegeta.engine.execution import current

NAMES = [n for n, spec in METRICS.items() if "network" not in spec.needs and n != "random_logit"]
SHAPES = [(1, 6), (1, 2, 2, 3)]
# One of each family is tried by default; the others with the slow tests.
ALWAYS = ("deletion", "infidelity", "sensitivity_n", "pointing_game", "effective_complexity")


def situations(law):
    """A few situations, with ties in every map; they are drawn as those of ``verify`` are, but without a search."""
    for n, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(n)
        draw = lambda high: torch.randint(-high, high + 1, shape, generator=generator).double()
        yield law(draw(4), draw(3) + 0.5, draw(2))


def broken(law, subject):
    """The first of these situations in which a subject breaks a law, None if it keeps it in all."""
    for situation in situations(law):
        residual, allowed = situation.measure(subject)
        if not residual <= allowed:
            return situation, residual, allowed
    return None


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in NAMES]
)
def test_a_registered_metric_keeps_every_law(name):
    subject = subject_of(f"metric:{name}")
    kept = [n for n in METRIC_LAWS if n in subject.axioms]
    assert {"same_key_same_number", "units", "no_number_without_meaning"} <= set(kept)
    for law in kept:
        assert broken(METRIC_LAWS[law], subject) is None, law


def area(values):
    return (values[1:] + values[:-1]).sum() / 2 / (len(values) - 1)


def by_position(explain, score, steps=None):
    """Deletion in which equal values go in the order of their places."""

    def measure(x, key=None):
        order = explain(x).flatten().argsort(descending=True, stable=True)
        kept = [torch.ones(x.numel(), dtype=x.dtype)]
        for place in order:
            kept.append(kept[-1].clone())
            kept[-1][place] = 0
        return area(torch.stack([score(x * k.reshape(x.shape)) for k in kept]))

    return measure


def by_threshold(explain):
    """The share that goes when all from the median on go: of equal values more than half."""

    def measure(x, key=None):
        a = explain(x).flatten()
        return (a >= a.quantile(0.5)).double().mean()

    return measure


def one_after_another(explain, score):
    """How far the map of each element is from its loss, when all before it are gone, too."""

    def measure(x, key=None):
        a, gone, errors = explain(x).flatten(), x.clone(), []
        for place in range(x.numel()):
            before = score(gone)
            gone.view(-1)[place] = 0
            errors.append((before - score(gone) - a[place]) ** 2)
        return torch.stack(errors).mean()

    return measure


def of_one_channel(explain, score):
    """The value at the last element, by its place in the plane: beyond the first channel there is none."""

    def measure(x, key=None):
        return explain(x)[0].flatten()[x.numel() - 1]

    return measure


def counting_steps(explain, score, steps=4):
    """The sum of a curve, of which more steps have more."""

    def measure(x, key=None):
        return eg.metrics.deletion(explain, score, steps=steps)(x).values.sum()

    return measure


def of_sums(explain, score):
    """The loss of all sets so far beside the map of one set: where 1 is right it says 0.56."""

    def measure(x, key=None):
        places = torch.arange(x.numel())
        lost = torch.stack([score(x) - score(x * (places > k).reshape(x.shape)) for k in places])
        return torch.corrcoef(torch.stack([explain(x).flatten(), lost]))[0, 1].nan_to_num(0.0)

    return measure


BROKEN = {
    "same_key_same_number": MetricSubject("draws", lambda e, s: lambda x, key: e(x).sum() + torch.rand(())),
    "batches": MetricSubject("deep", lambda e, s: lambda x, key: e(x).sum() + levels.depth()),
    "chunks": MetricSubject("first chunk", lambda e, s: lambda x, key: e(x).sum() * current().chunk),
    "ties": MetricSubject("by position", by_position, ("score",), "lower"),
    "orders": MetricSubject("by threshold", lambda e, s: by_threshold(e), ordered=True),
    "turns": MetricSubject("one after another", one_after_another, ("score",), "lower"),
    "answers": MetricSubject("of one channel", of_one_channel, ("score",)),
    "steps": MetricSubject("counting steps", counting_steps, ("score",), "lower", steps=True),
    "units": MetricSubject("threshold", lambda e, s: lambda x, key: (e(x).abs() > 1.5).double().sum()),
    "no_number_without_meaning": MetricSubject(
        "empty is a hit", lambda e, s: lambda x, key, mask: (~mask | (e(x)[0] > 0)).double().mean(), ("mask",)
    ),
    "linear_scores": MetricSubject("of sums", of_sums, ("score",), "higher", exact=1.0),
    "truth_above_permutations": MetricSubject(
        "wrong way",
        lambda e, s: lambda x, key: eg.metrics.deletion(e, s)(x).area,
        ("score",),
        "higher",
        ranks=True,
    ),
}


def test_there_is_a_broken_metric_for_every_law():
    assert set(BROKEN) == set(METRIC_LAWS)


@pytest.mark.parametrize("law", BROKEN)
def test_a_law_rejects_what_is_broken_for_it(law):
    found = broken(METRIC_LAWS[law], BROKEN[law])
    assert found is not None
    situation, residual, allowed = found
    again = rebuilt(repr(situation))
    assert repr(again) == repr(situation)
    assert again.measure(BROKEN[law])[0] == pytest.approx(residual) or math.isinf(residual)
    assert not residual <= allowed


def test_verify_takes_metrics_by_name_and_as_functions(monkeypatch):
    monkeypatch.setattr(search, "SHRINKS", 5)
    report = verify(
        "metric:roc_auc", cases=30, axioms=["units", "ties", "no_number_without_meaning", "steps"]
    )
    assert [v.kind for v in report.verdicts] == ["holds", "holds", "holds", "not applicable"]
    assert subject_of(eg.metrics.deletion).name == "deletion"
    with pytest.raises(ValueError, match="find_metric: expected the name of a metric, got 'deltion'"):
        verify("metric:deltion")
    report = verify(BROKEN["ties"], axioms=["ties"], cases=40)
    assert report["ties"].kind == "violated"


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_a_registered_metric_keeps_every_law_on_drawn_situations(name):
    report = verify(f"metric:{name}", cases=30)
    assert not [v for v in report.verdicts if v.kind == "violated"], report


# -- other libraries: their faults are found by the same laws --------------------------------------------------------

PLANES = [(1, 4, 4), (1, 3, 4)]


def in_the_plane(law, subject):
    for n, shape in enumerate(PLANES):
        generator = torch.Generator().manual_seed(n)
        draw = lambda high: torch.randint(-high, high + 1, shape, generator=generator).double()
        residual, allowed = METRIC_LAWS[law](draw(4), draw(3) + 0.5, draw(2)).measure(subject)
        if not residual <= allowed:
            return residual
    return 0.0


def peer(name):
    pytest.importorskip(name.partition(":")[0], reason="pip install 'esegeta[peers]'")
    return subject_of(name)


@pytest.fixture
def torchvision():
    from esegeta.conformance.adapters import peers

    peers.torchvision()


FAULTS = {
    # Step sums beside cumulative drops: of a linear network with exact maps it is not 1.
    "quantus:SensitivityN": {"linear_scores"},
    # An empty mask is a hit.
    "quantus:PointingGame": {"no_number_without_meaning"},
    # The largest are taken in the order of their places.
    "quantus:RelevanceRankAccuracy": {"ties"},
    "torchcam:deletion": {"ties"},
    "torchcam:insertion": {"ties"},
    "quantus:RelevanceMassAccuracy": set(),
    "captum:infidelity": set(),
}


@pytest.mark.peers
@pytest.mark.parametrize("name", FAULTS)
def test_the_faults_of_other_metrics_are_found(name, torchvision):
    subject = peer(name)
    broken_ones = {law for law in METRIC_LAWS if law in subject.axioms and in_the_plane(law, subject) > 0}
    assert broken_ones >= FAULTS[name]
    if not FAULTS[name]:
        assert "linear_scores" not in broken_ones
        assert "ties" not in broken_ones


# What is known to be wrong with other libraries, and the law by which the search finds it.
REDISCOVERED = [
    ("quantus:SensitivityN", "linear_scores"),  # sums of steps beside losses so far
    ("quantus:SensitivityN", "chunks"),  # the first batch stands for all
    ("quantus:Completeness", "linear_scores"),  # by ==
    ("quantus:PointingGame", "no_number_without_meaning"),  # an empty mask is a hit
    ("quantus:PointingGame(weighted=True)", "answers"),  # a hit raises
    ("quantus:ROAD", "chunks"),  # the first batch stands for all
    ("quantus:ROAD", "answers"),  # more than one channel raises
    ("quantus:Infidelity", "answers"),  # a side that patches do not divide raises
    ("quantus:Infidelity", "turns"),  # patches stay removed
    ("quantus:IROF", "answers"),  # three channels raise
    ("quantus:PixelFlipping", "steps"),  # the area is in steps
    ("quantus:NonSensitivity", "linear_scores"),  # a < eps, not |a| < eps
    ("grad_cam:RemoveMostRelevantFirst", "orders"),  # a percentile of equal values is more than its share
    ("grad_cam:RemoveLeastRelevantFirst", "orders"),
]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@pytest.mark.parametrize(("name", "law"), REDISCOVERED)
def test_a_known_fault_is_rediscovered(name, law, torchvision, monkeypatch):
    """By ``verify``, which is told the metric and the law; and that it is this fault the counterexample shows."""
    import numpy as np

    pytest.importorskip("pytorch_grad_cam" if name.startswith("grad_cam") else "quantus")
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)  # gone in NumPy 2.4: that is another fault
    monkeypatch.setattr(search, "SHRINKS", 5)
    found = verify(name, axioms=[law], cases=60)[law]
    assert found.kind == "violated", found.why
    situation = rebuilt(found.counterexample.code)
    residual, allowed = situation.measure(subject_of(name))
    assert residual > allowed
    ours = subject_of(f"metric:{OURS[name.partition('(')[0]]}") if name.partition("(")[0] in OURS else None
    if ours is not None and law in ours.axioms:
        residual, allowed = situation.measure(ours)
        assert residual <= allowed


# The metric here that does what the other is meant to, put to the same situation.
OURS = {
    "quantus:SensitivityN": "sensitivity_n",
    "quantus:PointingGame": "pointing_game",
    "quantus:ROAD": "road",
    "quantus:Infidelity": "infidelity",
    "quantus:IROF": "irof",
    "quantus:PixelFlipping": "deletion",
    "grad_cam:RemoveMostRelevantFirst": "deletion",
    "grad_cam:RemoveLeastRelevantFirst": "deletion",
}


@pytest.mark.peers
def test_an_area_that_counts_its_steps_is_found(torchvision, monkeypatch):
    """One curve has several areas, by the number of elements in a step."""
    import numpy as np

    subject = peer("quantus:PixelFlipping")
    if not hasattr(np, "trapz"):
        situation = METRIC_LAWS["units"](torch.ones(1, 3, 4), torch.ones(1, 3, 4), torch.arange(12.0))
        with pytest.raises(AttributeError, match="trapz"):
            METRIC_LAWS["units"](*[torch.arange(12.0).reshape(1, 3, 4)] * 3).measure(subject)
        assert situation.trivial is False
        monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)
    law = METRIC_LAWS["steps"]
    w = torch.arange(1.0, 17).reshape(1, 4, 4).double()
    situation = law(w, torch.ones_like(w), w)
    score = situation.score()
    numbers = [float(situation.number(subject, w, score, steps=k)) for k in (2, 4, 8)]
    assert max(numbers) > 2 * min(numbers)


# -- libraries that are not installed: their formulas, written down here, and what the laws say of them ------------


def noise_for_an_imputation(explain, score):
    """ROAD of volumes as LATEC has it: what is removed keeps its value, and gets noise."""

    def measure(x, key=7):
        noise = 0.01 * torch.randn(
            x.numel(), generator=torch.Generator().manual_seed(int(key)), dtype=x.dtype
        )
        kept, values = torch.ones(x.numel(), dtype=x.dtype), [score(x)]
        for place in explain(x).flatten().argsort(descending=True, stable=True):
            kept[place] = 0
            values.append(score(x + ((1 - kept) * noise).reshape(x.shape)))
        return area(torch.stack(values))

    return measure


def subsets(darkened, otherwise):
    """mu-fidelity: the rank correlation of what sets of voxels lose with the sum of the map over them.

    darkened: as PnPXAI has it, the voxels that are kept get noise, of which only what lowers them is left;
    otherwise: what a correlation that is not defined becomes, 0 as Xplique has it.
    """

    def metric(explain, score, runs=24, share=0.2):
        def measure(x, key=7):
            generator = torch.Generator().manual_seed(int(key))
            draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=x.dtype)
            size, a = int(x.numel() * share), explain(x).flatten()
            lost, sums = [], []
            for _ in range(runs):
                kept = (draw(x.numel()).argsort() > size).to(x.dtype)
                noisy = x + share * (draw(*x.shape) * x.std() + x.mean())
                image = torch.maximum(x - 1, torch.minimum(x, noisy)) if darkened else x
                assert (image <= x).all()
                lost.append(score(x) - score(image * kept.reshape(x.shape)))
                sums.append((a * (1 - kept)).sum())
            lost, sums = torch.stack(lost).round(decimals=9), torch.stack(sums).round(decimals=9)
            undefined = lost.isnan().any() or sums.isnan().any() or not (lost.std() * sums.std() > 0)
            return (
                torch.tensor(otherwise) if undefined else eg.metrics.rank_correlation(lost[None], sums[None])
            )

        return measure

    return metric


def of_formula(name, metric, **declared):
    return MetricSubject(name, metric, ("score",), drawn=True, **declared)


def test_an_imputation_that_is_noise_does_not_tell_the_truth_from_other_orders():
    law = METRIC_LAWS["truth_above_permutations"]
    assert broken(law, of_formula("noise", noise_for_an_imputation, better="lower", ranks=True)) is not None
    # What is removed has no part in an imputation; of noise upon it, it is nearly all.
    x, keep = torch.arange(12.0).reshape(1, 2, 2, 3).double(), torch.arange(12).reshape(1, 2, 2, 3) % 3 > 0
    other = torch.where(keep, x, -5.0)
    impute = eg.metrics.imputed(noise=0.0)
    filled = [impute(z, torch.zeros_like(z), keep.double()) for z in (x, other)]
    torch.testing.assert_close(filled[0], filled[1])
    assert torch.equal(filled[0][keep], x[keep])


def test_subsets_in_a_darkened_image_are_no_losses_of_the_subset():
    law = METRIC_LAWS["linear_scores"]
    name = "mu-fidelity"
    found = broken(law, of_formula(name, subsets(True, math.nan), better="higher", exact=1.0))
    assert found is not None
    assert found[1] > 0.01
    assert broken(law, of_formula(name, subsets(False, math.nan), better="higher", exact=1.0)) is None
    assert broken(law, subject_of("metric:mu_fidelity")) is None


def test_a_correlation_that_is_not_defined_is_no_zero():
    law = METRIC_LAWS["no_number_without_meaning"]
    name = "mu-fidelity"
    assert broken(law, of_formula(name, subsets(False, 0.0), better="higher")) is not None
    assert broken(law, of_formula(name, subsets(False, math.nan), better="higher")) is None
    assert broken(law, subject_of("metric:mu_fidelity")) is None


def test_a_map_averaged_over_its_last_axis_has_no_order_within_a_row():
    """As Xplique does with maps of four axes: it takes the last axis of a volume for channels."""
    true = torch.arange(1.0, 13).reshape(1, 2, 2, 3).double()
    score, x = lambda z: (true * z).sum(), torch.ones_like(true)
    averaged = lambda a: a.mean(-1, keepdim=True).expand(a.shape)
    number = lambda a: float(eg.metrics.deletion(eg.metrics.given(a), score, steps=None)(x).area)
    assert number(averaged(true)) == pytest.approx(number(averaged(true.flip(-1))))
    assert number(true) < number(averaged(true)) < number(true.flip(-1))
