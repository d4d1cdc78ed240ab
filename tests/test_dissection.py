"""Which channel sees which concept: known answers, plain loops, and permutation tests that hold their level."""

import csv
import io
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import nn

import esegeta as eg
from esegeta import dissection
from esegeta.dissection import dissect, thresholds
from esegeta.zoo.drawn import drawn


def bands(x):
    """A network whose channels are concepts: dark, middle and bright voxels."""
    return eg.mark(torch.cat([(x < -0.3), (x >= -0.3) & (x < 0.5), (x >= 0.5)]).float(), "bands")


def an_image(key, shape):
    x = eg.random.normal(key, (1, *shape))
    own = bands(x).bool()
    return x, {"dark": own[0], "middle": own[1], "bright": own[2]}


@pytest.mark.parametrize("shape", [(30,), (9, 8), (6, 5, 7)])
@pytest.mark.parametrize("null", ["swap", "roll"])
def test_channels_that_are_concepts_are_found_with_an_overlap_of_one(shape, null):
    data = [an_image(key, shape) for key in range(6)]
    found = dissect(bands, places="bands", null=null, permutations=99)(data)
    assert torch.allclose(found.iou, torch.eye(3, dtype=torch.float64))
    assert torch.allclose(found.per_image, torch.eye(3, dtype=torch.float64).expand(6, 3, 3))
    rows = [(row.channel, row.concept) for row in found.rows() if row.detector]
    assert rows == [(0, "dark"), (1, "middle"), (2, "bright")]
    assert all(row.adjusted == pytest.approx(0.01) for row in found.rows() if row.detector)
    assert str(found).startswith("3 detectors among 3 channels and 3 concepts")
    assert [(row.concept, row.channel) for row in found.best()] == [("dark", 0), ("middle", 1), ("bright", 2)]


@pytest.mark.parametrize("null", ["swap", "roll"])
def test_a_concept_that_is_moved_to_where_nothing_counts_overlaps_with_nothing(null):
    within = torch.zeros(12, 12, dtype=torch.bool)
    within[4:8, 4:8] = True
    data = []
    for key in range(5):  # a channel that is on outside alone, one that knows nothing, and a concept within
        noise = eg.random.normal(key, (1, 12, 12))
        concept = torch.zeros(12, 12, dtype=torch.bool)
        concept[5, 5 + key % 2] = True
        data.append((noise, {"spot": concept if null == "roll" or key < 3 else ~within}, within))
    model = lambda x: eg.mark(torch.cat([x * ~within + 100 * ~within, x]), "both")
    found = dissect(model, places="both", quantile=0.2, null=null, permutations=60)(data)
    assert found.drawn.isfinite().all()
    p, adjusted = found.p_values()
    assert (adjusted >= p).all()
    assert not any(row.detector for row in found.rows())
    assert found.iou[0, 0] == 0
    assert p[0, 0] == 1


@settings(max_examples=30, deadline=None)
@given(
    key=st.integers(0, 10**6),
    quantile=st.sampled_from([0.004, 0.01, 0.1, 0.5, 0.97]),
    kind=st.sampled_from(["plain", "relu", "levels", "constant", "negative"]),
)
def test_a_threshold_is_exact_whatever_the_order_of_the_images(key, quantile, kind):
    a = eg.random.normal(key, (5, 3, 8, 7)) * 10.0 ** float(key % 9 - 4)
    if kind == "relu":
        a = (a - a.std()).relu()
    if kind == "levels":
        a = (a / a.std()).round()
    if kind == "constant":
        a = torch.full_like(a, a[0, 0, 0, 0])
    if kind == "negative":
        a = -a.abs()
    found = thresholds(list(a), quantile=quantile)
    assert torch.equal(found, thresholds(list(a.flip(0)), quantile=quantile))  # the same counts
    for k in range(3):
        values = a[:, k].flatten().sort(descending=True).values
        rank = max(1, math.floor(quantile * len(values) + 1e-9))
        own = values[rank - 1]
        on = values >= found[k]
        if own > values[-1]:
            assert torch.equal(on, values >= own)
        else:  # the smallest of all: whatever is above it
            assert torch.equal(on, values > own)
        assert (values > own).double().mean() <= quantile


def plain(model, data, quantile, place):
    """The definition, with everything in memory and loops."""
    acts = [eg.tap(model, place)(x) for x, *_ in data]
    limits = []
    for k in range(len(acts[0])):
        values = torch.cat([a[k].flatten() for a in acts]).sort(descending=True).values
        rank = max(1, math.floor(quantile * len(values)))
        limits.append((values[rank - 1] + values[rank]) / 2)
    rows = {}
    for name in data[0][1]:
        for k, limit in enumerate(limits):
            both = either = 0
            for (x, concepts, within), a in zip(data, acts, strict=True):
                mask = (eg.upsample(a[k : k + 1], like=x)[0] >= limit) & within
                label = concepts[name] & within
                both += (mask & label).sum().item()
                either += (mask | label).sum().item()
            rows[k, name] = both / either
    return rows


def test_overlaps_are_those_of_plain_loops_on_layers_of_another_resolution():
    net = drawn(lambda: nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh()), key=3)
    model = eg.from_module(net.eval())
    data = []
    for key in range(5):
        x = eg.random.normal(key, (1, 16, 12))
        within = torch.ones(16, 12, dtype=torch.bool)
        within[:, :key] = False
        data.append((x, {"bright": x[0] > 0.2, "left": torch.arange(12).expand(16, 12) < 5}, within))
    found = dissect(model, places=["0", "1"], quantile=0.15, permutations=5)(lambda: iter(data))
    assert len(found.channels) == 8
    expected = plain(model, data, 0.15, "0")
    for row in found.rows():
        if row.place == "0":
            assert row.iou == pytest.approx(expected[row.channel, row.concept])
    inside = dissection.channel_masks(model, "0", thresholds=found.thresholds[:4])(data[0][0])
    assert inside.shape == (4, 16, 12)
    union = inside[2] | data[0][1]["left"]
    assert found.per_image[0, 2, 1] == pytest.approx(
        (inside[2] & data[0][1]["left"]).sum().item() / union.sum().item()
    )


def p_values(null, trials, channels=24):
    """Of a network whose channels have nothing to do with the concept."""
    model = lambda x: eg.mark(x[:-1], "all")
    found = []
    for trial in range(trials):
        x = eg.spatial.blur(eg.random.normal(trial, (8 * (channels + 1), 8, 8)), 1.0)
        x = x.reshape(8, channels + 1, 8, 8)
        data = [(one, {"blob": one[-1] > 0.1}) for one in x]
        found.append(dissect(model, places="all", quantile=0.1, null=null, permutations=199)(data, key=trial))
    return found


@pytest.mark.parametrize("null", ["swap", pytest.param("roll", marks=pytest.mark.slow)])
def test_p_values_are_uniform_where_channels_and_concepts_have_nothing_in_common(null):
    found = p_values(null, 16 if null == "swap" else 8)
    ps = torch.cat([one.p_values()[0].flatten() for one in found])
    # Discrete at multiples of 1/200: without the last step the two distributions are close.
    assert kstest((ps - eg.random.uniform(1, ps.shape) / 200).numpy(), "uniform").pvalue > 0.01
    for correction in ("max", "holm", "bh"):
        wrong = [bool((one.p_values(correction)[1] <= 0.05).any()) for one in found]
        assert sum(wrong) <= 4, correction  # 16 x 0.05 are expected at most


@pytest.mark.slow
def test_the_family_wise_error_is_held():
    wrong = [bool((one.p_values("max")[1] <= 0.05).any()) for one in p_values("swap", 100, channels=8)]
    assert sum(wrong) <= 12  # 5 are expected; 3.2 standard errors


def test_a_concept_in_the_middle_of_all_images_is_no_proof_unless_it_is_asked_for():
    """A channel that is on in the middle overlaps with a concept there, but not with that of the image."""
    model = lambda x: eg.mark(x[1:], "all")
    middle = torch.zeros(8, 8)
    middle[2:6, 2:6] = 1
    data = []
    for key in range(8):
        here = middle.roll(int(eg.random.integers(key, (), low=0, high=2)), 0) > 0
        data.append((torch.stack([here.float(), middle, here.float()]), {"middle": here}))
    found = dissect(model, places="all", quantile=0.2, permutations=400)(data)
    fixed, own = found.rows()
    assert fixed.iou > 0.5
    assert fixed.p > 0.5
    assert not fixed.detector
    assert own.iou == 1
    assert own.p < 0.05
    without = dissect(model, places="all", quantile=0.2, null="none")(data)
    assert all(row.detector and math.isnan(row.p) for row in without.rows())
    rolled = dissect(model, places="all", quantile=0.2, null="roll", permutations=400)(data)
    assert all(row.detector for row in rolled.rows())


def test_data_are_read_three_times_one_image_at_a_time():
    alive, most, read = [0], [0], [0]

    class Counted:
        def __init__(self):
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    def load(key):
        x, concepts = an_image(key, (6, 6))
        x.mark = Counted()
        read[0] += 1
        return x, concepts

    dissect(bands, places="bands", permutations=9)(lambda: (load(key) for key in range(7)))
    assert read[0] == 21
    assert most[0] <= 2


def test_label_maps_absent_concepts_and_exciting_images():
    labels = torch.tensor([[0, 1, 1], [2, 2, 0]])
    data = [
        (torch.tensor([[[0.0, k, 1.0], [2.0, 0.5, 0.0]]]), labels if k else 0 * labels)
        for k in (3.0, 0.0, 2.0)
    ]
    model = lambda x: eg.mark(torch.cat([x, -x]), "z")
    found = dissect(model, places="z", quantile=0.2, permutations=19)(data)
    assert found.concepts == ("1", "2")
    assert found.per_image[1].isnan().all()
    assert [row.images for row in found.rows()] == [2] * 4
    assert found.exciting("z", 0, 2) == [(0, 3.0), (1, 2.0)]
    named = [(x, dissection.labelled(own, {1: "a", 9: "none"})) for x, own in data]
    found = dissect(model, places="z", quantile=0.2, permutations=19)(named)
    rows = {row.concept: row for row in found.rows() if row.channel == 0}
    assert math.isnan(rows["none"].iou)
    assert math.isnan(rows["none"].adjusted)
    assert not rows["none"].detector
    table = list(csv.DictReader(io.StringIO(found.csv())))
    assert len(table) == 4
    assert table[1]["iou"] == ""
    assert json.loads(found.json())[1]["iou"] is None


def test_masks_are_cleaned_before_they_are_compared():
    x = torch.zeros(1, 9, 9)
    x[0, 2:6, 2:6], x[0, 8, 8] = 2.0, 3.0
    object = {"object": x[0] == 2}
    model = lambda x: eg.mark(x, "z")
    measured = {
        clean: dissect(model, places="z", quantile=0.1, clean=clean, null="none")(
            [(x, object)] * 2
        ).iou.item()
        for clean in (None, dissection.largest, dissection.despeckle)
    }
    assert measured[None] == pytest.approx(16 / 17)
    assert measured[dissection.largest] == 1
    assert measured[dissection.despeckle] == pytest.approx(12 / 16)  # corners go, too


def test_the_same_key_is_the_same_answer():
    data = [an_image(key, (6, 6)) for key in range(4)]
    run = dissect(bands, places="bands", permutations=20)
    assert torch.equal(run(data, key=3).drawn, run(data, key=3).drawn)
    assert not torch.equal(run(data, key=3).drawn, run(data, key=4).drawn)


def test_tissues_are_classes_of_like_intensity():
    centres = torch.tensor([0.0, 5.0, 9.0])
    truth = eg.random.integers(1, (20, 20), low=0, high=3)
    x = (centres[truth] + 0.3 * eg.random.normal(2, (20, 20)))[None]
    within = torch.ones(20, 20, dtype=torch.bool)
    within[:3] = False
    found = dissection.tissues(x, within)
    assert torch.equal(found[3:], truth[3:] + 1)
    assert not found[:3].any()


X = torch.zeros(1, 4, 4)
GOOD = (X, {"a": torch.zeros(4, 4, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([GOOD], "dissect: expected at least two images, got 1"),
        ([], "dissect: expected at least two images, got 0"),
        (iter([GOOD, GOOD]), "expected a data set that can be read more than once, got an iterator"),
        ([GOOD, (X, {"b": GOOD[1]["a"]})], "expected the concepts a of image 1, got b. Give an empty mask"),
        (
            [GOOD, (X, {"a": torch.zeros(2, 2)})],
            r"expected the concept 'a' of image 1 on the grid \(4, 4\) of the image, got shape \(2, 2\). "
            "Resample it by nearest neighbours",
        ),
        ([GOOD, (X, {"a": torch.full((4, 4), 3.0)})], "expected the concept 'a' of zeros and ones"),
        ([(X, torch.zeros(4, 4))] * 2, "expected a label map of whole numbers"),
        ([(X, torch.zeros(4, 4).long())] * 2, "expected at least one concept, got label maps of zeros"),
        ([(X, {"a": GOOD[1]["a"]}, torch.ones(3, 3))] * 2, "within of image 0 on the grid"),
        ([X, X], "expected data of"),
        ([(X / 0, GOOD[1])] * 2, "expected finite values in x, got 16 NaN"),
        (
            [GOOD, (torch.zeros(1, 4, 5), {"a": torch.zeros(4, 5)})],
            "expected images of one grid, to swap their concepts.*null='roll'",
        ),
    ],
)  # fmt: skip
def test_bad_data_are_refused(data, text):
    with pytest.raises((ValueError, TypeError), match=text):
        dissect(lambda x: eg.mark(x, "z"), places="z")(data)


def test_bad_settings_are_refused():
    model = lambda x: eg.mark(x, "z")
    for quantile in (0, 1, -0.1, 1.5, True, "1", math.nan):
        with pytest.raises(ValueError, match="expected quantile to be a number between 0 and 1"):
            dissect(model, places="z", quantile=quantile)
    with pytest.raises(ValueError, match="null to be one of swap, roll, none"):
        dissect(model, places="z", null="shuffle")
    with pytest.raises(ValueError, match="at least one place"):
        dissect(model, places=())
    pooled = lambda x: eg.mark(x.mean((1, 2)), "z")
    with pytest.raises(ValueError, match="activations with 2 spatial axes at 'z'"):
        dissect(pooled, places="z")([GOOD, GOOD])
    found = dissect(model, places="z")([GOOD, GOOD])
    with pytest.raises(ValueError, match="correction to be one of max, holm, bh"):
        found.rows(correction="bonferroni")
    with pytest.raises(ValueError, match="a channel that was dissected"):
        found.exciting("z", 5)
    with pytest.raises(ValueError, match="finite activations"):
        dissect(lambda x: eg.mark(x / 0, "z"), places="z")([GOOD, GOOD])
    with pytest.raises(ValueError, match="at least 3 different intensities"):
        dissection.tissues(X, torch.ones(4, 4))
