"""The experiments run, and what they compute with is right."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import esegeta as eg
from esegeta import metrics, zoo
from esegeta.uncertainty import selection

FOLDER = Path(__file__).parents[1] / "benchmarks" / "experiments"


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules, which find each other in their own folder."""
    names = (
        *("_common", "inform", "train_torchesegeta", "torchesegeta"),
        *("train_couteaux", "couteaux", "preimages", "uncertainty", "dissection"),
        *("train_natekar", "natekar"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        found = {name: importlib.import_module(name) for name in names}
        yield found
        for name in names:
            sys.modules.pop(name, None)


def test_an_interval_is_over_seeds_and_cases(scripts):
    interval = scripts["_common"].interval
    assert interval(np.full((2, 5), 3.0)) == (3, 3, 3)
    rng = np.random.default_rng(0)
    cases, noise = rng.standard_normal(40), 0.01 * rng.standard_normal((3, 40))
    by_cases = interval(cases + noise)
    error = cases.std() / 40**0.5
    assert by_cases.high - by_cases.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    seeds = (
        np.array([[-1.0], [1.0]]) + noise[:2]
    )  # two networks that disagree say little, however many the cases
    assert interval(seeds).high - interval(seeds).low > 1.9
    assert interval(cases) == interval(cases[None])
    assert np.isnan(interval([[1.0, float("nan")]])).all()
    assert np.isnan(interval(np.zeros((0, 3)))).all()


def test_a_verdict_needs_an_interval_on_one_side(scripts):
    common = scripts["_common"]
    says = [common.verdict(common.Interval(*i)) for i in [(1, 0.1, 2), (-1, -2, -0.1), (1, -0.1, 2)]]
    assert says == ["holds", "does not hold", "undecided"]
    assert common.verdict(common.interval([[float("nan")]])) == "undecided"
    assert common.together(["holds", "holds"]) == "holds"
    assert common.together(["holds", "undecided"]) == "undecided"
    assert common.together(["holds", "undecided", "does not hold"]) == "does not hold"


def test_what_is_kept_is_not_computed_again(scripts, tmp_path):
    kept, calls = scripts["_common"].kept, []
    compute = lambda: calls.append(1) or {"a": [1.5]}
    assert [kept(tmp_path / "x" / "a.json", compute) for _ in range(2)] == [{"a": [1.5]}] * 2
    assert len(calls) == 1


def test_contrast_agent_changes_the_mask_alone(scripts):
    inform = scripts["inform"]
    (x, mask), (y, same) = inform.slice_of(3, True), inform.slice_of(3, False)
    assert torch.equal(mask, same)
    change = (x - y)[0]
    assert change[mask].mean() - change[~mask].mean() > 0.1
    near = torch.nn.functional.max_pool2d(mask[None].float(), 5, 1, 2)[0] > 0  # edges are partly in the mask
    assert change[~near].std() < 0.06


def test_the_mask_is_the_best_map(scripts):
    inform = scripts["inform"]
    x, mask = inform.slice_of(4, True)
    without = inform.slice_of(4, False)[0]
    auc, dice, fidelity = inform.judged(mask[None].float(), inform.classifier(0).eval(), x, mask, without)
    assert (auc, dice) == (1, 1)
    assert abs(fidelity) <= 1


def test_conclusions_follow_the_numbers(scripts):
    inform, common = scripts["inform"], scripts["_common"]
    values = {row: np.full((3, 2, 4), 0.5) for row in inform.ROWS}
    for method, smoothing, form in inform.ROWS:
        values[method, smoothing, form][:2] += 0.1 * (smoothing == "SG²") + 0.2 * (form == "region")
        values[method, smoothing, form][2] -= 0.1 * (form == "region") + 0.2 * (method in ("D", "IGB"))
    found = inform.conclusions(values)
    assert len(found) == 4
    for _, differences in found:
        assert {common.verdict(common.interval(d)) for _, d in differences} == {"holds"}


@pytest.mark.slow
def test_the_poster_runs(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["inform.py", "--quick", "--folder", str(tmp_path)])
    scripts["inform"].main()
    page = (tmp_path / "experiments" / "inform.md").read_text()
    assert page.count("| voxel |") == 15
    assert "here. AUC, SG² less plain: " in page
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


@pytest.fixture(scope="module")
def count(scripts):
    torchesegeta = scripts["torchesegeta"]
    return torchesegeta.counted(zoo.vessel_unet_mss_deformation(), torchesegeta.QUICK)


def test_the_old_derivative_of_a_quotient_is_rounding(scripts):
    z = torch.linspace(0.1, 9, 1000, requires_grad=True)
    scripts["torchesegeta"].OldQuotient.apply(z).sum().backward()
    assert 0 < z.grad.abs().max() < 1e-5
    z.grad = None
    (z / z).sum().backward()
    assert z.grad.abs().max() == 0


@pytest.mark.slow
def test_through_the_count_there_are_no_gradients_but_rounding(count):
    assert count["largest gradient now"] == 0
    assert 0 < count["count: largest in double precision"] < 1e-6 * count["count: largest"]
    assert abs(count["count: rank correlation"]) < 0.6  # of what rounding leaves, other on another processor
    assert count["mean logit: rank correlation"] > 0.99
    assert count["mean logit: sensitivity"] < 0.3 < count["count: sensitivity"]
    assert "whose gradient is identically zero" in count["refusal"]


def test_a_cascade_reaches_every_layer_once(scripts):
    for name in scripts["torchesegeta"].QUICK.networks:
        net, x = scripts["torchesegeta"].NETWORKS[name](), torch.zeros(1, 16, 16, 16)
        stages = scripts["torchesegeta"].stages_of(net, x)
        assert [n for names in stages.values() for n in names] == list(metrics.layers_of(net, x)[::-1])
        assert stages["output"] == ["out"]


@pytest.mark.slow
def test_the_evaluation_runs(scripts, tmp_path):
    torchesegeta = scripts["torchesegeta"]
    with eg.execution(progress=False):
        file = torchesegeta.run(torchesegeta.QUICK, tmp_path, tmp_path / "numbers")
    assert len(list((tmp_path / "images").glob("*.png"))) == 5
    assert len(list((tmp_path / "numbers").glob("*.json"))) == 4
    assert "## Table 1" in file.read_text()


def test_a_network_that_has_not_learnt_says_nothing(scripts):
    torchesegeta = scripts["torchesegeta"]
    numbers = {"U-Net": {"values": np.ones((4, 3, 1, 2)).tolist(), "dice": [0.7, 0.85]}}
    cascades = {"U-Net": {"values": np.ones((4, 5, 2)).tolist()}}
    assert torchesegeta.concluded(numbers, cascades).startswith("**Failed.** U-Net missed a Dice of 0.8")
    numbers["U-Net"]["dice"] = [0.8, 0.85]
    assert "*Table 2: guided backprop is the least sensitive*: **undecided** here" in torchesegeta.concluded(
        numbers, cascades
    )


def test_weights_are_written_as_they_are_read(scripts, tmp_path):
    train = scripts["train_torchesegeta"]
    net = zoo.vessel_unet_mss_deformation()
    train.write_safetensors(net.state_dict(), tmp_path / "again.safetensors")
    again = zoo.read_safetensors(tmp_path / "again.safetensors")
    assert again.keys() == net.state_dict().keys()
    assert all(torch.equal(again[k], v.to(again[k].dtype)) for k, v in net.state_dict().items())


def test_a_deformation_moves_image_and_mask_together(scripts):
    x = torch.zeros(1, 1, 64, 64, 64)
    x[..., 20:44, 20:44, 20:44] = 1
    moved, mask = scripts["train_torchesegeta"].deformed(x, x, np.random.default_rng(0))
    assert 0.005 < (mask != x).float().mean() < 0.2
    assert ((moved > 0.5) == (mask > 0)).all()


def test_a_marking_lies_in_its_object_and_its_filter_answers_to_it(scripts):
    train, couteaux = scripts["train_couteaux"], scripts["couteaux"]
    (x, mask), (y, same) = train.marked(5, 1), train.marked(5, 0)
    assert torch.equal(mask, same)
    assert ((x - y)[0] != 0)[~mask].sum() == 0
    assert couteaux.characteristic(x) > 2 * couteaux.characteristic(y)
    assert couteaux.characteristic(x) > 1.5 * couteaux.characteristic(x.flip(2))  # of 135 degrees, not of 45


def test_the_gate_of_the_marking_is_that_of_the_shipped_networks(scripts):
    train = scripts["train_couteaux"]
    clean = [train.marked(key, 0) for key in range(20)]
    plain, whole = (train.dice(train.load(f"marked_{chance}_0"), clean) for chance in (0, 100))
    assert plain > 0.8
    assert whole < plain / 2


def test_verdicts_on_dreams_follow_the_numbers(scripts):
    couteaux = scripts["couteaux"]
    row = lambda chance, dice, end: {
        **{"chance": chance, "seed": 0, "dice": dice},
        **{"curves": [[0.0, end, 99.0]] * 3, "stops": [1, 1, 1]},  # what comes after the end does not count
    }
    falling = [row(c, 0.9 - 0.009 * c, 1 + 0.01 * c) for c in (0, 20, 40, 60, 80, 100)]
    rho, p = couteaux.correlation(falling)
    assert rho == pytest.approx(-1)
    assert p < 0.01
    rows = {
        kind: {"values": {key: [[0.0, v], [0.0, v + 0.1]] for key in couteaux.SHAPES}, "stops": [1, -1]}
        for kind, v in (("dark", 3.0), ("faint", 1.0), ("elongated", 2.0))
    }
    told = couteaux.sentences({"rows": falling}, {"rows": rows})
    assert ["**holds**" in t for t in told[1:]] == [True, True, False]
    assert "**does not hold**" in told[3]  # elongated ones are rounder here than faint ones
    bands = [couteaux.band(inside) for inside in ([True, True], [True, False], [False, False])]
    assert [line.split("**")[1] for line in bands] == ["holds", "holds in part", "does not hold"]
    unlearnt = [row(c, 0.7, 1 + 0.01 * c) for c in (0, 100)]
    told = couteaux.sentences({"rows": unlearnt}, {"rows": rows})
    assert "**failed**" in told[0]
    assert not any("relies" in t or "rely" in t for t in told[1:])


def test_a_dream_ends_where_a_network_is_as_sure_as_of_its_objects(scripts):
    couteaux = scripts["couteaux"]
    net, name = couteaux.load("marked_100_0"), "marked_100_0"
    sure = couteaux.sureness(net, name, 6)
    assert 2 < sure < 6
    begin = torch.stack([couteaux.empty(key) for key in range(2)])
    with eg.execution(progress=False):
        found, stops = couteaux.dreamed(net, name, begin, list(range(0, 21, 10)), 6)
    for values, stop in zip(found.values, stops, strict=True):
        assert (values[:stop] < sure).all() if stop >= 0 else (values < sure).all()
        assert stop < 0 or values[stop] >= sure
    moved = (found.images[:, 1] - found.images[:, 0]).square().mean((1, 2, 3)).sqrt()
    assert (moved <= 10 * couteaux.LENGTH * (1 + 1e-4)).all()  # ten steps of one length
    assert (moved > 2 * couteaux.LENGTH).all()


@pytest.mark.slow
def test_dreams_of_networks_are_analysed(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["couteaux.py", "--quick", "--folder", str(tmp_path)])
    scripts["couteaux"].main()
    page = (tmp_path / "experiments" / "couteaux.md").read_text()
    assert "rank correlation of the Dice without markings" in page
    assert len(list((tmp_path / "images").glob("*.png"))) == 3


def test_measures_of_preimages(scripts):
    preimages = scripts["preimages"]
    wave = lambda f: torch.cos(2 * torch.pi * f * torch.arange(16.0)).expand(1, 16, 16, 16).clone()
    assert preimages.fine(wave(0.125)) == pytest.approx(0, abs=1e-6)
    assert preimages.fine(wave(0.375) + 5) == pytest.approx(1, abs=1e-6)  # the mean does not count
    noise = eg.random.normal(1, (1, 16, 16, 16))
    assert np.allclose(preimages.curve(noise), 1, atol=0.5)
    assert preimages.rough(noise) == pytest.approx(2 / np.pi**0.5, rel=0.1)
    assert preimages.alike(noise, 2 * noise + 1) == pytest.approx(1, abs=1e-5)
    x, template = preimages.images(16)
    assert x.shape == template.shape == (1, 16, 16, 16)
    row = {"place": "a", "channel": 1}
    pairs = [
        {**row, "way": w, "fine": v + 0.01 * i}
        for w, v in (("plain", 0.6), ("regularised", 0.2))
        for i in range(4)
    ]
    sweeps = [
        {**row, "what": what, "amount": a, "fine": 0.5, "rough": 1 - 0.5 * bool(a) + 0.01 * i, "alike": 0.1}
        for what, amounts in preimages.SWEEPS.items()
        for a in amounts
        for i in range(4)
    ]
    told = preimages.sentences({"rows": pairs}, {"rows": sweeps})
    says = ["holds", "undecided", "holds", "undecided"]
    assert all(f"**{word}**" in line for word, line in zip(says, told, strict=True))


@pytest.mark.slow
def test_preimages_are_dreamed(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["preimages.py", "--quick", "--folder", str(tmp_path)])
    scripts["preimages"].main()
    page = (tmp_path / "experiments" / "preimages.md").read_text()
    assert page.count(" here. ") == 4
    assert len(list((tmp_path / "images").glob("*.png"))) == 3


def test_the_share_of_errors_found_is_that_of_the_library(scripts):
    script = scripts["uncertainty"]
    rng = np.random.default_rng(0)
    map_ = rng.random((8, 8, 8)).round(2)  # with equals
    error = rng.random(map_.shape) < 0.3 * map_
    blocks = np.ravel_multi_index(np.indices(map_.shape) // 4, (2, 2, 2))
    one = script.counted(map_, error, blocks, map_ > 0.1)
    assert np.sum(one["voxels"]) == (map_ > 0.1).sum()
    assert np.sum(one["errors"]) == error[map_ > 0.1].sum()
    u, e = (torch.from_numpy(a[map_ > 0.1]) for a in (map_, error))
    values = script.again(one, [0.05, 0.5], draws=50)
    for fraction, value in zip((0.05, 0.5), values[0], strict=True):
        assert value == pytest.approx(selection.error_share(u, e, fraction).item(), abs=0.01)
    found = script.bounds(values[:, 1])
    assert found.low < found.mean < found.high
    sure = {"all": script.counted(error.astype(float), error, blocks, np.ones_like(error))}
    assert script.bounds(script.again(sure["all"], 0.5)) == pytest.approx((1, 1, 1))
    assert script.less({"a": sure, "b": {"all": one}}, "a", "b", "all").low > 0


@pytest.mark.slow
def test_the_uncertainty_of_the_real_network_is_judged(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["uncertainty.py", "--quick", "--folder", str(tmp_path)])
    scripts["uncertainty"].main()
    page = (tmp_path / "experiments" / "uncertainty.md").read_text()
    assert page.count(" here. ") == 7
    assert "not Bayesian" in page
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


def test_an_image_keeps_its_place_on_the_grid_of_the_head(scripts):
    head = zoo.head()
    turned = np.ascontiguousarray(head.data[0].numpy()[::-1, :, ::2])
    affine = head.affine @ np.array([[-1, 0, 0, 127], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])
    found = scripts["dissection"].on_grid(turned, affine, head, 0)
    assert np.array_equal(found[..., ::2], head.data[0, :, :, ::2].numpy())


def test_what_is_called_brain_is_where_the_logit_is_positive(scripts):
    called = scripts["dissection"].called_brain
    assert called(lambda x: x - 0.5, torch.tensor([[0.2, 0.5, 0.7]])).tolist() == [False, False, True]
    model, x = eg.from_module(zoo.brain_extraction_unet()), torch.zeros(1, 16, 16, 16)
    assert model(x).shape == x.shape  # the one channel that the mask relies on


def test_detectors_are_told_only_where_p_values_could_be_small_enough(scripts):
    told, claims = scripts["dissection"].told, {"a": "spot", "b": "none of these"}
    model = lambda x: eg.mark(torch.cat([x, -x]), "both")
    images = [eg.random.normal(key, (1, 12, 12)) for key in range(3)]
    data = [(x, {"spot": x[0] > 1.2}) for x in images]
    for count, says in ((9, "undecided"), (39, "holds")):
        way = eg.dissection.dissect(model, places="both", quantile=0.1, null="roll", permutations=count)
        (line,) = told(way(data), claims)
        assert f"**{says}**" in line


@pytest.mark.slow
def test_the_real_network_is_dissected(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dissection.py", "--quick", "--folder", str(tmp_path)])
    scripts["dissection"].main()
    page = (tmp_path / "experiments" / "dissection.md").read_text()
    assert page.count("**undecided** here") >= 2
    assert "No images with tumours were given." in page
    assert len(list((tmp_path / "images").glob("*.png"))) == 1


def test_regions_of_a_tumour_are_compared(scripts):
    train = scripts["train_natekar"]
    truth = torch.tensor([[0, 1, 2, 3]])
    assert train.overlaps(truth, truth) == [1, 1, 1]
    whole, core, rim = train.overlaps(torch.tensor([[0, 2, 2, 0]]), truth)
    assert (whole, core, rim) == (pytest.approx(0.8), 0, 0)
    assert np.isnan(train.overlaps(torch.tensor([[0, 2]]), torch.tensor([[2, 2]]))[2])


def test_where_maps_first_lie_in_a_tumour(scripts):
    natekar = scripts["natekar"]
    assert natekar.first([0.1, 0.6, 0.2], 0.5) == 0.5
    assert natekar.first([0.1, float("nan"), 0.2], 0.5) == 1.5  # one layer behind the last
    assert natekar.rising([0.1, 0.2, 0.9]) == pytest.approx(1)
    assert natekar.rising([0.9, 0.2, float("nan")]) == pytest.approx(-1)
    x, mask = torch.zeros(4, 4, 4), torch.eye(4).bool()
    assert natekar.mass(mask[None].float(), x, mask) == 1
    assert natekar.mass(torch.ones(1, 4, 4), x, mask) == pytest.approx(0.25)
    assert np.isnan(natekar.mass(torch.zeros(1, 4, 4), x, mask))


def test_the_last_layer_looks_at_the_tumour(scripts):
    natekar = scripts["natekar"]
    net, one = natekar.load(natekar.RESIDUAL), natekar.case(natekar.with_rim(1)[0])
    places = natekar.layers(net, one.data)
    assert (len(places), places[0], places[-1]) == (14, "encoder.0.relu_a", "decoder.2.relu_b")
    last = natekar.cams(net, one.data, "whole tumour", places[-1:])[places[-1]]
    assert last.shape == (1, 80, 80)
    assert natekar.mass(last, one.data, one.labels > 0) > 0.8


def located(natekar, late, deep):
    """Maps that come to the tumour at a layer, of networks of six layers, in two slices."""
    shares = lambda at: [[0.0] * at + [0.9] * (6 - at), [0.0] * at + [0.8] * (6 - at)]
    return {
        name: {
            "layers": [
                "encoder.0.a",
                "encoder.0.b",
                "encoder.3.a",
                "encoder.3.b",
                "decoder.0.a",
                "decoder.0.b",
            ],
            "rows": [
                {
                    "brain": b,
                    "whole tumour": [*w[:2], deep[name], deep[name], *w[4:]],
                    "core": c,
                    "enhancing": c,
                }
                for b, w, c in zip(shares(0), shares(late[name]), shares(5), strict=True)
            ],
        }
        for name in natekar.NETWORKS
    }


def test_conclusions_on_tumour_networks_follow_the_numbers(scripts):
    natekar = scripts["natekar"]
    early = dict.fromkeys(natekar.NETWORKS, 1) | {natekar.PLAIN: 4}
    deep = dict.fromkeys(natekar.NETWORKS, 0.4) | {natekar.PLAIN: 0.1}
    found = {
        "cams": located(natekar, early, deep),
        "dice": {name: [[[0.9, 0.8, 0.7]] * 2] for name in natekar.NETWORKS},
    }
    told = natekar.of_cams(found, 1)
    assert ["**holds**" in told[i] for i in (0, 2, 3)] == [True] * 3
    late = dict.fromkeys(natekar.NETWORKS, 4) | {natekar.PLAIN: 1}
    told = natekar.of_cams({**found, "cams": located(natekar, late, dict.fromkeys(natekar.NETWORKS, 0.1))}, 1)
    assert "**does not hold**" in told[2]
    assert "**undecided**" in told[3]
    row = {"share": 0.5, "missed": float("nan"), "augrc": 0.1}
    one = {"variance": row, "one forward": {**row, "share": 0.6}, "errors": 3}
    told = natekar.of_uncertainty({"uncertainty": {"rows": dict.fromkeys(natekar.NETWORKS, [one] * 3)}})
    says = ["holds", "undecided", "does not hold"]  # nothing was missed, so nothing is known of it
    assert all(f"**{word}**" in line for word, line in zip(says, told, strict=True))
    assert natekar.learnt(found).startswith("All")
    found["dice"][natekar.PLAIN] = [[[0.7, 0.8, 0.7]] * 2]
    assert natekar.learnt(found).startswith("**Failed.**")
    assert "SimUnet (0.700)" in natekar.learnt(found)


@pytest.mark.slow
def test_tumour_networks_are_looked_into(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["natekar.py", "--quick", "--folder", str(tmp_path)])
    scripts["natekar"].main()
    page = (tmp_path / "experiments" / "natekar.md").read_text()
    assert page.count(" here. ") == 11
    assert len(list((tmp_path / "images").glob("natekar_*.png"))) == 6
