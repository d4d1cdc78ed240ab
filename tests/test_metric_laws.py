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
SHAPES = [(1, 6), (1, 2, 4), (1, 2, 2, 3)]


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


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_registered_metric_keeps_every_law_on_drawn_situations(name):
    report = verify(f"metric:{name}", cases=30)
    assert not [v for v in report.verdicts if v.kind == "violated"], report
