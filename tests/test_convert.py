"""Configurations of the original system: every entry becomes something that can run, or is listed with a reason."""

import json
import tomllib

import numpy as np
import pytest
import torch
from old_configurations import HEADERS, old
from old_configurations import METHODS as ENTRIES

from esegeta._registry import METHODS
from esegeta.run.config import convert, original
from esegeta.run.config import loading as config
from esegeta.run.volumes import preprocess
from esegeta.run.volumes.files import Volume

DREAMS = {"lucent_render_vis", "cnn_vis_layer_visualization", "cnn_vis_DeepDream"}


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "scan.npy"
    path.write_bytes(b"")
    return str(path)


def all_used(layout):
    whole = old(layout)
    for entry in [*whole["methods"], *whole["explain_methods"]]:
        entry["use"] = True
    return whole


def translated(whole, image):
    return convert.convert(whole, "zoo:brain_extraction_unet", image)


def note_of(done, name):
    (line,) = [line for line in done.notes if line.startswith(f"{name}: ")]
    return line


def test_the_layouts_are_whole():
    assert len(ENTRIES) == 37
    assert len(HEADERS) == 4


@pytest.mark.parametrize("layout", HEADERS)
def test_every_entry_is_translated_or_has_a_reason(layout, image):
    done = translated(all_used(layout), image)
    assert config.problems(done.config) == []
    ids = {method["id"] for method in done.config["methods"]}
    for name in [*ENTRIES, "lime_segmentation"]:
        if name in DREAMS:
            assert name not in ids
            (dream,) = [d for d in done.config["dreams"] if d["id"] == name]
            assert note_of(done, name).startswith(f"{name}: [[dreams]], recipe {dream['recipe']};")
        else:
            (method,) = [m for m in done.config["methods"] if m["id"] == name]
            assert method["name"] in METHODS
            assert note_of(done, name).startswith(f"{name}: {method['name']}")
    assert tomllib.loads(done.text) == done.config


@pytest.mark.parametrize("layout", HEADERS)
def test_the_text_runs_from_a_file(layout, image, tmp_path):
    path = tmp_path / "new.toml"
    path.write_text(translated(all_used(layout), image).text)
    found = config.load(path)
    assert found.run.output.endswith("_final_test")


def test_what_was_used_is_used(image):
    done = translated(old("Class_2d"), image)
    assert [m["name"] for m in done.config["methods"]] == ["lime"]
    assert note_of(done, "captum_Saliency").endswith("left out: it had use = false.")
    done = translated(old("Seg_3d"), image)  # in this file nothing is used
    assert len(done.config["methods"]) == 35
    assert note_of(done, "use") == "use: no entry had use = true; all of them are active here."


def test_what_keywords_meant(image):
    done = {m["id"]: m for m in translated(all_used("Seg_3d"), image).config["methods"]}
    assert done["captum_Saliency"]["name"] == "gradient"  # abs was false
    assert done["captum_occlusion"]["parameters"] == {"size": [11, 11, 11], "stride": 3}
    assert done["cnn_vis_grad_cam"]["place"] == "Conv5.conv.0"
    assert done["captum_LayerDeepLift"]["place"] == "Conv5.conv.0:in"
    assert done["captum_gradient_shap"]["parameters"]["noise"] == {"name": "absolute", "sigma": 1.0}
    assert done["cnn_vis_integrated_grad"]["parameters"] == {"steps": 2}
    assert done["captum_ShapleyValueSampling"]["parameters"]["samples"] == 10
    assert done["cnn_vis_layer_activation_guided_backprop"]["parameters"] == {"unit": 0}
    assert done["captum_Saliency"]["patches"] == "per_patch"
    assert "patches" not in done["captum_layer_activaltion"]


def test_what_the_header_meant(image):
    new = translated(all_used("Seg_3d"), image).config
    assert new["patches"] == {"size": 64, "overlap": 0.1875, "weights": "average"}
    assert new["run"] == {"output": "Vessel_seg_UNET_IXI_MRA_final_test"}
    assert new["targets"][0]["reducer"] == "predicted_class_sum"
    new = translated(all_used("Class_2d"), image).config
    assert "patches" not in new
    assert new["run"]["deadline"] == 3600
    assert new["targets"][0]["reducer"] == "logit"
    whole = all_used("Seg_2d")
    for entry in [*whole["methods"], *whole["explain_methods"]]:
        entry.update(share_gpu=True, inpt_transform_req=True)
    new = translated(whole, image).config
    assert new["run"]["per_device"] == 2
    steps = new["input"]["preprocess"]
    assert [step["step"] for step in steps] == ["resize", "fit", "normalise", "normalise"]
    # A picture has values to 255, and the original's means are for values to 1.
    grey = Volume(torch.full((3, 120, 120), 255.0), np.eye(4), (1.0, 1.0))
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(preprocess.apply(grey, steps).data[:, 0, 0], expected)


def test_noise_had_an_effect_on_pictures_only(image):
    flat = {m["id"]: m for m in translated(all_used("Seg_2d"), image).config["methods"]}
    change = {"name": "smooth", "noise": {"name": "absolute", "sigma": 1.0}, "samples": 10}
    assert flat["captum_Saliency-smoothgrad"]["transforms"] == [change]
    done = translated(all_used("Seg_3d"), image)
    assert "captum_Saliency-smoothgrad" not in {m["id"] for m in done.config["methods"]}
    assert "nt_type had no effect on volumes" in note_of(done, "captum_Saliency")


@pytest.mark.parametrize("word", ["amp_enbled", "amp_enabled"])
def test_misspelled_keys_and_their_corrections_are_understood(word, image):
    whole = old("Seg_3d")
    del whole["amp_enbled"]
    whole[word] = True
    whole["methods"][8]["method_name"] = "captum_layer_activation"
    whole["methods"][0]["uncertainty_metrics"] = True
    whole["methods"][0].pop("uncertainity_metrics")
    whole["pach_size"] = 3
    done = translated(whole, image)
    assert note_of(done, "amp_enbled")
    assert note_of(done, "captum_layer_activaltion").startswith("captum_layer_activaltion: layer_activation")
    assert any(line.startswith("uncertainity_metrics") for line in done.notes)
    assert (
        note_of(done, "pach_size")
        == "pach_size: of the header, not a key of the original. Nearest: patch_size, patch_overlap, resize."
    )


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (
            {"method_name": "captum_Salience"},
            "'captum_Salience': not translated: not a method of the original. Nearest",
        ),
        ({}, "'': not translated"),
        ({"method_name": "cnn_vis_grad_cam"}, "cnn_vis_grad_cam: not translated: its keywords name no layer"),
        (
            {"method_name": "captum_occlusion", "keywords": {"sliding_window_shapes": "a"}},
            "captum_occlusion: not translated: its keywords are not those of the original",
        ),
    ],
)
def test_an_entry_that_makes_no_sense_is_listed(entry, text):
    done = convert.convert({"methods": [{"use": True, **entry}]})
    assert done.config["methods"] == []
    assert done.notes[0].startswith(text)


def test_maps_of_layers_are_not_averaged_over_patches(image):
    whole = all_used("Seg_3d")
    for entry in whole["methods"]:
        entry["patch_required"] = True
    done = translated(whole, image)
    made = {m["id"]: m for m in done.config["methods"]}
    patched = {name for name, method in made.items() if method.get("patches") == "per_patch"}
    layers = {name for name, method in made.items() if "place" in method and "guided" not in name}
    assert layers == made.keys() - patched - {"lime_segmentation"}  # whose layout has no patches
    assert {"cnn_vis_grad_cam", "captum_LayerDeepLift", "captum_layer_conductance"} <= layers
    assert {
        "captum_guided_grad_cam",
        "cnn_vis_layer_activation_guided_backprop",
        "captum_Saliency",
    } <= patched
    assert "patch_required is left out" in note_of(done, "cnn_vis_grad_cam")
    assert config.problems(done.config) == []
    # Where no entry is left that goes by patches, there is nothing to say about them.
    whole["methods"] = [entry for entry in whole["methods"] if entry["method_name"] == "cnn_vis_grad_cam"]
    whole["explain_methods"] = []
    assert "patches" not in translated(whole, image).config


def test_metrics_and_signs_are_kept(image):
    whole = all_used("Seg_3d")
    whole["methods"][0].update(uncertainity_metrics=True, sign="all")
    whole["methods"][1].update(uncertainity_cascading=2)
    done = translated(whole, image)
    ids = [entry["method_name"] for entry in whole["methods"][:2]]
    assert done.config["metrics"] == [
        {"metric": "infidelity", "methods": ids},
        {"metric": "sensitivity_max", "methods": ids},
    ]
    assert config.problems(done.config) == []
    assert tomllib.loads(done.text) == done.config
    assert "esegeta.metrics.randomisation" in note_of(done, "uncertainity_cascading")
    assert "Asked for: 'all' of captum_Saliency; 'positive' of" in note_of(
        done, "sign, visualize_method, show_colorbar"
    )
    for entry in whole["methods"]:
        entry["uncertainity_metrics"] = True
    for entry in whole["explain_methods"]:
        entry["uncertainity_metrics"] = True
    assert translated(whole, image).config["metrics"][0] == {"metric": "infidelity"}  # of all
    for entry in whole["methods"]:
        entry["use"] = entry["method_name"] == "captum_guided_backprop"
        entry["uncertainity_metrics"] = not entry["use"]
    whole["explain_methods"] = []
    assert "metrics" not in translated(whole, image).config  # of entries that are not used


def test_what_dreams_were(image):
    done = translated(all_used("Seg_3d"), image)
    dreams = {d["id"]: d for d in done.config["dreams"]}
    assert dreams.keys() == DREAMS
    deep = dreams["cnn_vis_DeepDream"]
    assert deep["objective"] == {"name": "channel", "place": "Conv5.conv", "channel": 5}
    assert deep["parameters"] == {"steps": 250, "rate": 12.0}
    # Grey values from 180 to 200, divided by 255, less 0.485, divided by 0.229.
    assert deep["mean"] == pytest.approx((190 / 255 - 0.485) / 0.229, abs=1e-4)
    assert deep["sigma"] == pytest.approx(20 / 12**0.5 / 255 / 0.229, abs=1e-4)
    assert "past its skip connections" in note_of(done, "cnn_vis_DeepDream")
    layer = dreams["cnn_vis_layer_visualization"]
    assert layer["objective"]["place"] == "Conv5.conv.0"
    assert (layer["recipe"], layer["parameters"]) == ("layer_visualisation", {"steps": 30})
    lucent = dreams["lucent_render_vis"]
    assert lucent["objective"] == {"name": "channel", "place": "Conv3.conv", "channel": 0}
    assert lucent["parameters"] == {"steps": 512, "bounds": [0.0, 1.0], "pad": 0}
    assert "depth was taken for channels" in note_of(done, "lucent_render_vis")
    flat = translated(all_used("Seg_2d"), image)
    flat = {d["id"]: d for d in flat.config["dreams"]}
    assert "pad" not in flat["lucent_render_vis"]["parameters"]


def test_dreams_that_make_no_sense_are_listed(image):
    entry = {"method_name": "lucent_render_vis", "use": True, "keywords": {"layer": "Conv3_conv"}}
    no_layer = {"method_name": "cnn_vis_DeepDream", "use": True, "keywords": {}}
    unused = {"method_name": "cnn_vis_DeepDream", "use": False, "keywords": {"layer": "a"}}
    twice = {"method_name": "cnn_vis_layer_visualization", "use": True, "keywords": {"layer": "a"}}
    done = convert.convert({"methods": [entry, no_layer, unused, twice, twice]})
    assert done.notes[0].startswith("lucent_render_vis: not translated: its keywords are not those")
    assert done.notes[1] == "cnn_vis_DeepDream: not translated: its keywords name no layer."
    assert done.notes[2].endswith("left out: it had use = false.")
    ids = ["cnn_vis_layer_visualization", "cnn_vis_layer_visualization-2"]
    assert [dream["id"] for dream in done.config["dreams"]] == ids
    assert done.notes[-1] == "methods: a run explains its images by at least one: add a table [[methods]]."


def test_two_entries_of_a_name_get_two_ids(image):
    entry = {"method_name": "cnn_vis_grad_cam", "use": True, "keywords": {"layer": "a[1].b"}}
    done = convert.convert({"methods": [entry, entry]}, "zoo:brain_extraction_unet", image)
    assert [m["id"] for m in done.config["methods"]] == ["cnn_vis_grad_cam", "cnn_vis_grad_cam-2"]
    assert config.problems(done.config) == []


def test_every_rule_leads_to_a_method():
    for name, rule in original.RULES.items():
        made = rule(original.Old({**ENTRIES.get(name, {}), "layer": "a"}, True))
        assert made.fields["name"] in METHODS, name
    assert original.DREAMS.keys() == DREAMS


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "to be JSON, got a fault in it"),
        (b"[]", "to be a configuration of TorchEsegeta, got something else"),
        (b'{"methods": 3}', "to be a configuration of TorchEsegeta, got something else"),
        (b"\xff", "to be text, got other bytes"),
    ],
)
def test_a_file_that_is_none_of_the_original(tmp_path, content, text):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(config.Faults, match=r"^convert: expected ") as caught:
        convert.read(tmp_path / "a.json")
    assert text in str(caught.value)
    with pytest.raises(config.Faults, match="got no such file"):
        convert.read(tmp_path / "b.json")


def test_comments_may_stand_twice(tmp_path):
    (tmp_path / "a.json").write_text('{"_comment": "a", "_comment": "b", "methods": []}')
    assert convert.convert(convert.read(tmp_path / "a.json")).config["methods"] == []
    json.dumps(convert.convert({"methods": []}).config)
