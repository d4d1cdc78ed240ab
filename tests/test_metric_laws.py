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


@pytest.mark.peers
def test_completeness_by_equality_is_found(torchvision):
    subject = peer("quantus:Completeness")
    w = torch.tensor([[[0.1, 0.2, 0.3], [0.7, -0.4, 0.11]]], dtype=torch.float64)
    law = METRIC_LAWS["linear_scores"](w, torch.full_like(w, 0.3), w)
    residual, allowed = law.measure(subject)
    assert residual > allowed  # False, for a residual of one part in 10 million
    assert (
        eg.axioms.completeness(lambda x, b: w * (x - b), lambda x: (w * x).sum())(
            law.image, 0 * law.image
        ).abs()
        < 1e-12
    )
