"""A row for each part of a prediction: numbers of the package's own functions, and reasons for holes."""

import csv
import json
import math

import pytest
import torch

import esegeta as eg
from esegeta import lesions

SHAPE = (9, 8, 7)
SPACING = (2.0, 1.0, 1.5)


def scene():
    """An image of two channels with three bright parts of 12, 4 and 1 voxels, and a model that sees them."""
    x = 0.1 * eg.random.normal(0, (2, *SHAPE))
    x[0, 1:3, 1:3, 1:4] += 3.0
    x[1, 6:8, 5, 4:6] += 4.0
    x[0, 4, 0, 6] += 5.0
    mix = torch.tensor([1.0, 0.5]).reshape(2, 1, 1, 1)

    def model(x):
        z = (mix * x).sum(0, keepdim=True)
        return z + 0.3 * z.roll(1, 1) * x[:1] - 1.0  # looks beside, and channels interact

    return model, x


def test_rows_are_what_functions_of_the_package_say():
    model, x = scene()
    baseline = torch.full_like(x, 0.05)
    doubt = eg.random.uniform(1, SHAPE)
    atlas = torch.zeros(SHAPE, dtype=torch.long)
    atlas[:, 4:] = 7
    ready = eg.components(model, 1, features=["statistics_mean", "shape_sphericity"], bins=8)
    found = ready(x, baseline=baseline, uncertainty=doubt, atlas=atlas, names={7: "back"}, spacing=SPACING)
    mask = eg.reducers.predicted_mask(model(x), 1)
    assert [row.voxels for row in found] == sorted((row.voxels for row in found), reverse=True)
    assert sum(row.voxels for row in found) == int(mask.sum()) > 16
    means = eg.uncertainty.aggregating.component_means(doubt, mask)
    for k, row in enumerate(found):
        part = found.labels == k + 1
        score = eg.reducers.component(model, 1, k, at=x)
        assert row.volume == int(part.sum()) * 3.0
        assert row.score == pytest.approx(float(score(x)), rel=1e-5)
        assert row.uncertainty == pytest.approx(float(means[k]), rel=1e-5)
        shapley = eg.channel_shapley(score)(x, baseline).flatten(1)[:, 0]
        assert row.shapley == pytest.approx(shapley.tolist(), rel=1e-4, abs=1e-4)
        assert sum(row.shapley) == pytest.approx(float(score(x) - score(baseline)), rel=1e-4)
        share = eg.metrics.context_share(eg.gradient(score))(x, mask=part)
        assert row.context_share == pytest.approx(float(share), rel=1e-5)
        own = eg.radiomics.features(x[1], part, spacing=SPACING, number=8)
        assert row.radiomics["channel1_statistics_mean"] == pytest.approx(own["statistics_mean"])
        places = part.nonzero().double().mean(0) * torch.tensor(SPACING).double()
        assert row.centre == pytest.approx(places.tolist())
        back = float((atlas[part] == 7).double().mean())
        assert (row.region, row.region_share) == (("back", back) if back > 0.5 else ("outside", 1 - back))
    assert {row.region for row in found} == {"back", "outside"}
    assert 0 < found[0].context_share < 1

    rows = list(csv.DictReader(found.csv().splitlines()))
    assert len(rows) == len(found) == len(json.loads(found.json()))
    assert float(rows[0]["shapley_1"]) == pytest.approx(found[0].shapley[1])
    assert str(found).startswith("part  volume")


def test_what_was_not_computed_is_nan_and_says_why():
    model, x = scene()
    found = eg.components(model, 1, explained=1, features=["statistics_mean"])(x)
    assert {"uncertainty", "region", "shapley"} <= set(found[0].missing)
    assert math.isnan(found[0].uncertainty)
    assert found[0].missing["shapley"] == "no baseline was given"
    assert not math.isnan(found[0].context_share)
    assert math.isnan(found[1].context_share)
    assert math.isnan(found[1].radiomics["channel0_statistics_mean"])
    assert found[1].missing["radiomics"] == "only the 1 largest parts are explained"
    assert next(csv.DictReader(found.csv().splitlines()))["uncertainty"] == ""

    flat = eg.components(lambda x: 0 * x[:1] + (x.detach()[:1] > 2).float() - 0.5, 1)(x)
    assert "gradient" in flat[0].missing["context_share"]  # refused: this score has none
    line = eg.components(lambda x: x, 1)(torch.tensor([[0.0, 1.0, 1.0]]))
    assert line[0].missing["radiomics"] == "they have two or three axes"
    many = torch.ones(12, 3, 3)
    wide = eg.components(lambda x: x.sum(0, keepdim=True), 1, features=())(many, baseline=0 * many)
    assert wide[0].missing["shapley"].startswith("12 channels take 2^12 runs")
    nothing = eg.components(lambda x: x[:1], 1)(x - 10)
    assert (len(nothing), nothing.csv().strip()) == (0, "number")


def test_a_part_that_is_too_large_has_no_radiomics(monkeypatch):
    monkeypatch.setattr(lesions, "MOST_VOXELS", 10)
    model, x = scene()
    found = eg.components(model, 1)(x)
    assert found[0].missing["radiomics"] == "the part has more than 10 voxels"
    assert all(math.isnan(value) for value in found[0].radiomics.values())


def test_a_mask_of_ones_own_replaces_the_prediction():
    model, x = scene()
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[5, 2:4] = True
    (row,) = eg.components(model, 1, features=())(x, mask=mask)
    assert row.voxels == 14
    assert row.score == pytest.approx(float(model(x)[0][mask].sum()), rel=1e-5)


def test_what_is_wrong_is_refused():
    model, x = scene()
    ready = eg.components(model, 1, features=())
    with pytest.raises(
        ValueError, match=r"expected atlas on the grid \(9, 8, 7\) of x.*Resample it by nearest"
    ):
        ready(x, atlas=torch.zeros(3, 3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="expected a baseline of the shape"):
        ready(x, baseline=x[:1])
    with pytest.raises(ValueError, match="Nearest: statistics_mean"):
        eg.components(model, 1, features=["statistics_meen"])
    with pytest.raises(ValueError, match="expected an output on the grid"):
        eg.components(lambda x: x.flatten(1).sum(1), 1)(x)
    with pytest.raises(ValueError, match="target"):
        eg.components(model, 4)(x)
