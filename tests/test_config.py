"""Configurations: what is read, what is completed, and everything that is wrong, at once."""

import copy
import json
import random
import subprocess
import sys
import tomllib

import pytest
import torch
from rounding import assert_alike

from esegeta import reducers
from esegeta._registry import METHODS, REDUCERS, TRANSFORMS
from esegeta.engine.check import Refused
from esegeta.engine.refusals import is_refusal
from esegeta.models import from_module
from esegeta.run.config import building, catalogue, schema, starter
from esegeta.run.config import loading as config
from esegeta.run.config.tables import fits
from esegeta.run.volumes import files as volumes
from esegeta.zoo import small_unet


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "scan.npy"
    path.write_bytes(b"")
    return str(path)


@pytest.fixture
def plain(image):
    """The smallest configuration, to be changed."""
    return {
        "model": {"source": "zoo:small_unet", "arguments": {"ndim": 2}},
        "input": {"files": image},
        "targets": [{"name": "one", "class": 1}],
        "methods": [{"name": "gradient"}],
    }


def faults(table, **changes):
    return config.problems({**table, **changes})


def only(table, **changes):
    (line,) = faults(table, **changes)
    assert "\n" not in line
    return line


def of_method(table, **method):
    return only(table, methods=[method])


def test_what_is_built_within_a_table_is_told_beside_the_rest(plain):
    """A function asked for by name is made while the table is looked at: its own complaint has its own path."""
    made = {"name": "smooth", "sigma": -1}
    found = faults(
        plain,
        methods=[
            {"name": "occlusion", "parameters": {"size": 4, "fill": "nothing"}},
            {
                "name": "extremal_perturbation",
                "baseline": "zero",
                "parameters": {"mask": made, "stride": 3},
            },
        ],
    )
    assert [line.partition(": ")[0] for line in found] == [
        "methods[0].parameters.fill",
        "methods[0].baseline",
        "methods[1].parameters.mask",
        "methods[1].parameters.stride",
    ]


def test_a_baseline_for_all_takes_the_size_of_voxels_from_the_image(plain):
    blurred = {"name": "blurred", "sigma": 2, "spacing": "input"}
    found = config.load({**plain, "methods": [{"name": "ig"}], "run": {"baseline": blurred}})
    assert found.methods[0].baseline == [schema.Call(**blurred)]


# --- Reading and completing -------------------------------------------------------------------------------


def test_the_smallest_configuration_is_completed(plain, tmp_path):
    found = config.load(plain)
    assert found.methods[0].id == "gradient"
    assert found.targets[0].parameters == {"target": 1}
    assert found.targets[0].class_ is None
    assert found.run.devices == ["cpu"]
    assert found.input.files == str(tmp_path / "scan.npy")


def test_what_load_gives_is_itself_a_configuration(plain, image):
    plain["methods"] = [
        {"name": "ig", "baseline": {"name": "blurred", "sigma": 2}, "memory": "2 GiB"},
        {"name": "grad_cam", "id": "cams", "place": ["encoder.relu", "bottom.relu"]},
        {"name": "lime", "parameters": {"features": {"name": "grid", "size": 4}}},
        {"name": "gradient", "transforms": [{"name": "smooth", "noise": {"name": "absolute", "sigma": 0.5}}]},
    ]
    plain["run"] = {"baseline": ["zero"], "deadline": 5, "memory": "1 GiB"}
    plain["patches"] = {"size": [4, 4], "overlap": 0}
    found = config.load(plain)
    assert config.load(config.dump(found)) == found
    assert config.load(found.model_dump(mode="json")) == found
    json.dumps(config.dump(found))
    assert [m.id for m in found.methods] == [
        "integrated_gradients",
        "cams-encoder.relu",
        "cams-bottom.relu",
        "lime",
        "gradient",
    ]
    assert [m.place for m in found.methods][1:3] == ["encoder.relu", "bottom.relu"]
    assert [m.memory for m in found.methods][:2] == [2 * 2**30, 2**30]
    assert {m.deadline for m in found.methods} == {5.0}
    assert found.methods[0].baseline == [schema.Call(name="blurred", sigma=2)]
    assert found.methods[3].baseline == [schema.Call(name="zero")]
    assert found.methods[4].baseline is None


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_paths_in_a_file_are_relative_to_its_folder(suffix, tmp_path, monkeypatch, plain):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "a.npy").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    if suffix == ".toml":
        text = '[model]\nsource = "zoo:small_unet"\narguments = {ndim = 2}\n[input]\nfiles = ["a.npy"]\n'
        text += '[[targets]]\nname = "t"\nclass = 0\n[[methods]]\nname = "gradient"\n[run]\noutput = "out"\n'
    else:
        text = json.dumps({**plain, "input": {"files": ["a.npy"]}, "run": {"output": "out"}})
    (folder / f"c{suffix}").write_text(text)
    found = config.load(f"study/c{suffix}")
    assert found.input.files == [str(folder / "a.npy")]
    assert found.run.output == str(folder / "out")
    assert found.model.path == str(folder)
    assert config.load(f"study/c{suffix}", run={"output": str(tmp_path)}).run.output == str(tmp_path)


def test_what_the_names_of_images_show_to_be_wrong_is_told_with_the_rest(plain, tmp_path):
    for name in ("sub-1.npy", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    said = {"files": str(tmp_path / "*"), "subject": r"(sub-\d)", "frame": 0, "channels": "last"}
    assert faults(plain, input=said) == [
        "input.files: expected images, which end with .nii, .nii.gz, .hdr, .img, .hdr.gz, .img.gz, .npy, .png, .jpg, "
        ".jpeg, got 'notes.txt'. Narrow the pattern, or convert it.",
        "input.frame: expected a time point from 0, where no axis is channels, got channels too. Change it.",
        r"input.subject: expected a name that '(sub-\\d)' matches, got notes.txt. "
        "Its first group must be the subject.",
    ]
    assert "got -1" in only(plain, input={"files": str(tmp_path / "*.npy"), "frame": -1})


def test_the_folder_of_a_configuration_may_have_brackets_in_its_name(plain, tmp_path, monkeypatch):
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    for name in ("a.npy", "b.npy", "c[2].npy"):
        (folder / name).write_bytes(b"")
    (folder / "c.json").write_text(json.dumps({**plain, "input": {"files": ["[ab].npy", "c[2].npy"]}}))
    found = config.load(folder / "c.json")
    names = [path.name for (path,) in volumes.expand(found.input.files)]
    assert names == ["a.npy", "b.npy", "c[2].npy"]
    monkeypatch.chdir(folder)  # what tables may run is in the current folder
    assert config.load(config.dump(found)) == found


def test_files_of_parameters_are_relative_to_the_file_and_have_to_be_there(plain, tmp_path):
    (tmp_path / "atlas.npy").write_bytes(b"")
    features = {"name": "labels", "map": {"file": "atlas.npy"}}
    plain["targets"][0] |= {"reducer": "region", "parameters": {"mask": {"file": "atlas.npy"}}}
    plain["methods"] = [{"name": "rise", "baseline": "zero"}, {"name": "kernel_shap", "baseline": "zero"}]
    plain["methods"][1]["parameters"] = {"features": features}
    path = tmp_path / "c.json"
    path.write_text(json.dumps(plain))
    found = config.load(path)
    whole = str(tmp_path / "atlas.npy")
    assert found.targets[0].parameters["mask"] == {"file": whole}
    assert found.methods[1].parameters["features"]["map"] == {"file": whole}
    features["map"]["file"] = "atals.npy"
    path.write_text(json.dumps(plain))
    assert config.problems(path) == [
        "methods[1].parameters.features.map: expected a file, got 'atals.npy'. There is none of that name."
    ]


def test_a_tilde_is_the_home_folder_wherever_a_file_is_named(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ESEGETA_TRUST", "~")
    for name in ("net.py", "w.pt", "a.npy"):
        (tmp_path / name).write_bytes(b"")
    plain["model"] = {"source": "net:build", "path": "~", "weights": "~/w.pt"}
    found = config.load({**plain, "input": {"files": "~/a.npy"}})
    assert found.model.weights == str(tmp_path / "w.pt")
    assert found.input.files == str(tmp_path / "a.npy")
    (line,) = config.problems({**plain, "input": {"files": "~nobody-of-that-name/a.npy"}})
    assert line.startswith("input.files: expected a file that matches")


def test_the_starter_can_run_and_names_what_exists(tmp_path):
    path = tmp_path / "esegeta.toml"
    starter.write(path)
    found = config.load(path)
    assert [m.id for m in found.methods] == [
        "gradient",
        "integrated_gradients",
        "smoothgrad",
        "grad_cam",
        "occlusion",
    ]
    with pytest.raises(FileExistsError):
        starter.write(path)
    # What is commented out is right, too.
    text = starter.text().replace("# weights", "#weights")
    lines = [
        line.removeprefix("# ") if line.startswith(("# baseline = {", "# per_device")) else line
        for line in text.splitlines()
    ]
    assert config.problems(tomllib.loads("\n".join(lines))) == []


def test_the_demonstration_has_a_method_of_every_family(tmp_path):
    found = config.load(starter.demo(str(tmp_path)))
    names = {m.name for m in found.methods}
    assert len(found.methods) >= 12
    assert {METHODS[n].needs for n in names} >= {"gradient", "values"}
    assert any(METHODS[n].place for n in names)
    assert any(METHODS[n].rewrites for n in names)
    assert any(METHODS[n].key for n in names)
    assert any(m.transforms for m in found.methods)


# --- Everything at once -----------------------------------------------------------------------------------


def test_every_fault_is_told_at_once_in_the_order_of_the_file(plain):
    found = faults(
        plain,
        model={"source": "zoo:small_unett", "weigths": "w.pt"},
        targets=[{"name": "a", "reducer": "clas_sum", "class": 1}, {"name": "a b"}],
        methods=[
            {"name": "integrated_gradient"},
            {"name": "integrated_gradients", "parameters": {"steps": "32", "step": 3}},
            {"name": "grad_cam", "basline": "zero", "transforms": [{"name": "over_baselines"}]},
        ],
        run={"workers": 0, "devices": ["gpu"]},
        outputs={},
    )
    assert [line.partition(":")[0] for line in found] == [
        "model.weigths",
        "model.source",
        "targets[0].reducer",
        "targets[1].name",
        "targets[1].class",
        "methods[0].name",
        "methods[1].parameters.steps",
        "methods[1].parameters.step",
        "methods[1].baseline",
        "methods[2].basline",
        "methods[2].place",
        "methods[2].transforms[0]",
        "run.workers",
        "run.devices[0]",
        "outputs",
    ]
    assert found[0] == "model.weigths: expected a key of model, got 'weigths'. Nearest: weights."
    assert all(": expected " in line and ", got " in line for line in found)
    with pytest.raises(config.Faults, match="weigths") as caught:
        config.load({**plain, "model": {"source": "zoo:small_unet", "weigths": 1}})
    assert caught.value.faults == str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model": 3}, "model: expected a table, got 3"),
        ({"model": {"source": 3}}, "model.source: expected a text, got 3"),
        ({"model": {}}, "model.source: expected a text, got nothing. Add it"),
        (
            {"model": {"source": "net"}},
            'model.source: expected "zoo:name", "package.module:factory" or a file',
        ),
        ({"model": {"source": "a.pt2"}}, "model.source: expected a file, got 'a.pt2'"),
        ({"model": {"source": "os;print:x"}}, "model.source: expected"),
        (
            {"model": {"source": "os:system"}},
            "model.source: expected a module that is no part of Python, got 'os'",
        ),
        ({"model": {"source": "nowhere_at_all:x"}}, "model.source: expected a module that can be imported"),
        (
            {"model": {"source": "zoo:small_unet", "arguments": {"ndims": 2, "ndim": 2}}},
            "model.arguments.ndims: expected a parameter of small_unet, got 'ndims'. Nearest: ndim",
        ),
        ({"input": {"files": "none/*.nii"}}, "input.files: expected a file that matches"),
        ({"targets": []}, "targets: expected at least one table [[targets]], got []"),
        ({"methods": {}}, "methods: expected at least one table [[methods]], got {}"),
        ({"methods": [3]}, "methods[0]: expected a table, got 3"),
        ({"run": {"deadline": float("nan")}}, "run.deadline: expected a finite number, got nan"),
        ({"run": {"deadline": 0}}, "run.deadline: expected seconds > 0"),
        ({"run": {"memory": "4 Gib"}}, 'run.memory: expected memory in bytes or as "4 GiB"'),
        ({"run": {"key": 2**70}}, "run.key: expected"),
        ({"run": {"key": True}}, "run.key: expected a whole number, got True"),
        ({"run": {"devices": ["cuda:99"]}}, "run.devices[0]: expected a device of this machine"),
        ({"run": {"baseline": "zeros"}}, "run.baseline: expected a baseline, got 'zeros'. Nearest: zero"),
        ({"patches": {"size": 0}}, "patches.size: expected patch to be an int >= 1"),
        ({"patches": {"size": [4, 0]}}, "patches.size: expected every size of patch to be an int >= 1"),
        ({"patches": {"size": [4, 4, 4, 4]}}, "patches.size: expected one number of voxels"),
        ({"patches": {"overlap": 1.0}}, "patches.overlap: expected overlap in [0, 1)"),
        ({"patches": {"weights": "hann"}}, "patches.weights: expected"),
        ({"output": {"nifti": 1}}, "output.nifti: expected true or false, got 1"),
    ],
)
def test_a_fault_of_a_section(plain, changes, line):
    assert only(plain, **changes).startswith(line)


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ({"name": "a", "class": 1, "parameters": {"target": 1}}, "targets[0].class: expected one class"),
        (
            {"name": "a", "reducer": "uncertainty", "class": 1},
            "targets[0].class: expected no class for uncertainty",
        ),
        ({"name": "a", "class": -1}, "targets[0].parameters: expected "),
        (
            {"name": "a", "class": 1, "parameters": {"at": 3}},
            "targets[0].parameters.at: expected no such key",
        ),
        (
            {"name": "a", "reducer": "class_mean", "class": 1, "parameters": {"of": "logit"}},
            "targets[0].parameters: ",
        ),
        (
            {"name": "a", "reducer": "voxel", "class": 1},
            "targets[0].parameters.index: expected a list of whole numbers",
        ),
    ],
)
def test_a_fault_of_a_target(plain, target, line):
    assert only(plain, targets=[target]).startswith(line)


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ({"name": "ig"}, "methods[0].baseline: expected a baseline for integrated_gradients, got nothing"),
        ({"name": "gradient", "baseline": "zero"}, "methods[0].baseline: expected none for gradient"),
        (
            {"name": "ig", "baseline": "zer"},
            "methods[0].baseline: expected a baseline, got 'zer'. Nearest: zero",
        ),
        ({"name": "ig", "baseline": 3}, "methods[0].baseline: expected a name, {name"),
        ({"name": "ig", "baseline": {"name": "blurred"}}, "methods[0].baseline.sigma: expected a number"),
        (
            {"name": "ig", "baseline": ["zero", "white"]},
            "methods[0].baseline: expected one baseline for integr",
        ),
        ({"name": "deep_lift_shap", "baseline": []}, "methods[0].baseline: expected at least one baseline"),
        (
            {"name": "ig", "baseline": {"name": "zero", "count": 2}},
            "methods[0].baseline.count: expected none",
        ),
        (
            {"name": "ig", "baseline": "zero", "parameters": {"steps": 0}},
            "methods[0].parameters: expected steps to",
        ),
        (
            {"name": "ig", "baseline": "zero", "parameters": {"rule": "simpson"}},
            "methods[0].parameters: expected ",
        ),
        (
            {"name": "gradient", "parameters": {"x": 1}},
            "methods[0].parameters.x: expected no parameters: gradient has",
        ),
        ({"name": "gradient", "parameters": {"key": 1}}, "methods[0].parameters.key: expected no such key"),
        ({"name": "grad_cam"}, "methods[0].place: expected the name of a place in the network, got nothing"),
        ({"name": "gradient", "id": "a/b"}, "methods[0].id: expected letters"),
        ({"name": "gradient", "id": ""}, "methods[0].id: expected letters"),
        (
            {"name": "gradient", "patches": "stitched"},
            "methods[0].patches: expected \"whole\", got 'stitched'",
        ),
        (
            {"name": "gradient", "patches": "all"},
            'methods[0].patches: expected "whole" or "stitched" or "per_patch"',
        ),
        (
            {"name": "gradient", "transforms": ["smooth"]},
            "methods[0].transforms[0]: expected a list of {name",
        ),
        (
            {"name": "gradient", "transforms": [{"name": "smoth"}]},
            "methods[0].transforms[0].name: expected a transform",
        ),
        (
            {"name": "gradient", "transforms": [{"name": "smooth", "samples": 1.5}]},
            "methods[0].transforms[0].samples: expected a whole number, got 1.5",
        ),
        (
            {"name": "gradient", "transforms": [{"name": "smooth", "noise": -0.1}]},
            "methods[0].transforms[0]: expected ",
        ),
        (
            {"name": "gradient", "transforms": [{"name": "regions"}]},
            "methods[0].transforms[0].segments: expected ",
        ),
        (
            {"name": "feature_shuffling", "parameters": {"features": "gridd"}},
            "methods[0].parameters.features: expected features by name",
        ),
        (
            {
                "name": "feature_shuffling",
                "parameters": {"features": {"name": "grid", "sizes": 3, "size": 2}},
            },
            "methods[0].parameters.features.sizes: expected a parameter of grid, got 'sizes'. Nearest: size",
        ),
        (
            {"name": "lrp", "parameters": {"composite": "epsilon_pluss"}},
            "methods[0].parameters.composite: expected composite by name",
        ),
        ({"name": "blur_ig", "parameters": {"spacing": "mm"}}, "methods[0].parameters.spacing: expected "),
    ],
)
def test_a_fault_of_a_method(plain, method, line):
    assert of_method(plain, **method).startswith(line)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "gradientt"}, ".name: expected a method, got 'gradientt'"),
        ({"name": "ig"}, ".baseline: expected a baseline for integrated_gradients, got nothing"),
        ({"name": "ig", "baseline": "zer"}, ".baseline: expected a baseline, got 'zer'. Nearest: zero"),
        ({"name": "ig", "baseline": ["zero", "white"]}, ".baseline: expected one baseline for integr"),
        ({"name": "gradient", "parameters": {"x": 1}}, ".parameters.x: expected no parameters"),
        (
            {"name": "lime", "baseline": "zero", "parameters": {"features": {"name": "grid"}}},
            ".parameters.features.size: expected",
        ),
        ({"name": "grad_cam"}, ".place: expected the name of a place in the network, got nothing"),
        (
            {"name": "gradient", "transforms": [{"name": "over_baselines"}]},
            ".transforms[0]: expected a transf",
        ),
        (
            {"name": "gradient", "transforms": [{"name": "smoth"}]},
            ".transforms[0].name: expected a transform",
        ),
        (
            {"name": "ig", "baseline": "zero", "parameters": {"steps": 0}},
            ": expected steps to be an int >= 1",
        ),
    ],
)
def test_a_worker_refuses_what_a_file_is_refused_for(plain, method, said):
    """One function builds for both: with a collector of faults, and in earnest."""
    assert said in of_method(plain, **method)
    target = schema.Target(name="one", parameters={"target": 1})
    model, x = from_module(small_unet(ndim=2)), torch.rand(1, 8, 8)
    made = building.score(target, model, x, catalogue.Context())
    with pytest.raises((ValueError, TypeError)) as caught:
        building.explanation(schema.Method.model_validate(method), made, x, catalogue.Context())
    assert said in str(caught.value)
    assert is_refusal(caught.value)


@pytest.mark.parametrize(
    "changes", [{"reducer": "clas_sum"}, {"parameters": {"targt": 1}}, {"reducer": "uncertainty"}]
)
def test_a_target_is_built_in_earnest_as_it_is_checked(plain, changes):
    table = {"name": "one", "class": 1, **changes}
    told = only(plain, targets=[table])
    target, x = schema.Target.model_validate(table), torch.rand(2, 4, 4)
    with pytest.raises(Refused) as caught:
        building.score(target, lambda x: x, x, catalogue.Context(), "target one")
    assert str(caught.value).removeprefix("target one") == told.removeprefix("targets[0]")


def test_names_that_would_be_the_same_files_are_refused(plain):
    assert "got 'gradient' again" in only(plain, methods=[{"name": "gradient"}, {"name": "gradient"}])
    assert "got 'a' again" in only(plain, targets=[{"name": "A", "class": 0}, {"name": "a", "class": 1}])
    two = {"name": "grad_cam", "place": ["a", "a"]}
    assert only(plain, methods=[two]).startswith("methods[0].id: expected a different id")


def test_every_method_can_be_configured(plain):
    """Its registered example is another way to say it; here it is asked for with what a file can say."""
    entries = []
    for name, spec in METHODS.items():
        if not spec.fn.__module__.startswith("esegeta."):
            continue
        entry = {"name": name}
        if spec.place:
            entry["place"] = "bottom.relu"
        if spec.refs:
            entry["baseline"] = "zero"
        parameters = {k: v for k, v in spec.example.items() if isinstance(v, (int, float, str))}
        entries.append({**entry, "parameters": parameters})
    assert faults(plain, methods=entries) == []


@pytest.mark.parametrize("name", sorted(METHODS) + sorted(TRANSFORMS) + sorted(REDUCERS))
def test_every_default_fits_its_parameter(name):
    spec = {**METHODS, **TRANSFORMS, **REDUCERS}[name]
    for parameter in catalogue.parameters(spec.fn, skip=1 + getattr(spec, "place", False)).values():
        if not parameter.required and not callable(parameter.default):
            assert fits(parameter.default, parameter.annotation), str(parameter)
        assert parameter.name in catalogue.FAMILIES or catalogue.wanted(parameter) != "nothing", str(
            parameter
        )


# --- Files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.toml", b"x = ", "to be TOML, got a fault in it: Invalid value"),
        ("a.toml", b"x = 1\nx = 2", "to be TOML, got a fault in it: Cannot overwrite a value"),
        ("a.json", b"{", "to be JSON, got a fault in it: Expecting property name"),
        ("a.json", b'{"run": 1, "run": 2}', "expected every key of a table once, got run twice"),
        ("a.json", b"[]", "to be a table, got list"),
        ("a.json", b"\xff\xfe", "to be text in UTF-8, got other bytes"),
        ("a.json", b"[" * 100000, "at most 32 tables inside one another"),
        ("a.yaml", b"", "to be a file .toml or .json"),
        (
            "a.json",
            b'{"model_nature": "Segmentation"}',
            "got one of TorchEsegeta. Translate it first: esegeta convert",
        ),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(config.Faults, match="expected") as caught:
        config.load(tmp_path / name)
    assert len(caught.value.faults) == 1
    assert text in caught.value.faults[0]
    assert "\n" not in caught.value.faults[0]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(config.Faults, match="got no such file or directory"):
        config.load(tmp_path / "a.toml")


def test_nothing_in_a_configuration_is_executed(plain, tmp_path):
    trace = tmp_path / "trace"
    words = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    plain["model"] = {"source": f"{words}:x"}
    plain["methods"] = [{"name": words, "place": words, "baseline": words, "parameters": {words: words}}]
    plain["targets"] = [{"name": words, "reducer": words}]
    assert faults(plain)
    assert not trace.exists()


def test_a_module_is_not_imported_before_the_run(plain, tmp_path):
    (tmp_path / "of_mine.py").write_text("raise RuntimeError('imported')")
    whole = {**plain, "model": {"source": "of_mine:build", "path": str(tmp_path)}}
    assert config.load(whole, trust=[str(tmp_path)]).model.source == "of_mine:build"


JUNK = [
    *(
        None,
        True,
        -1,
        0,
        1.5,
        float("nan"),
        float("inf"),
        10**400,
        "",
        "zero",
        "../x",
        "\x00",
        "\n\x1b[2J",
        "e" * 3000,
    ),
    *(
        [],
        [[]],
        [None],
        [1, 2],
        {},
        {"name": "zero"},
        {"name": ["a"]},
        {"file": "x"},
        {"step": 3},
        {1: 2},
        {"\n": 1},
    ),
    {"name": "grid", "size": {"name": "grid"}},
]


def mutated(table, draw):
    """A copy in which some values are something else, or some keys are new."""
    table = copy.deepcopy(table)
    for _ in range(draw.randint(1, 4)):
        where, value = table, None
        while isinstance(where, (dict, list)) and where:
            key = draw.choice(list(where)) if isinstance(where, dict) else draw.randrange(len(where))
            if not isinstance(where[key], (dict, list)) or not where[key] or draw.random() < 0.3:
                value = copy.deepcopy(draw.choice(JUNK))
                where[
                    draw.choice(["nme", "class", "key", "count"])
                    if draw.random() < 0.2 and isinstance(where, dict)
                    else key
                ] = value
                break
            where = where[key]
    return table


def test_whatever_stands_there_is_told_in_lines(tmp_path):
    mask = str(starter.HEAD)
    whole = starter.demo(str(tmp_path / "out"))
    whole["methods"].append(
        {
            "name": "lime",
            "baseline": [{"name": "uniform", "count": 1}],
            "transforms": [{"name": "smooth", "noise": {"name": "absolute", "sigma": 1}}],
            "parameters": {
                "features": {
                    "name": "within",
                    "features": {"name": "grid", "size": 3},
                    "mask": {"file": mask},
                }
            },
        }
    )
    assert config.problems(whole) == []
    draw, wrong = random.Random(0), 0
    for _ in range(24):
        lines = config.problems(mutated(whole, draw))
        wrong += bool(lines)
        assert all(line.isprintable() and len(line) < 4000 for line in lines), lines
    assert wrong > 12
    assert list(tmp_path.iterdir()) == []


# --- Building ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net():
    return from_module(small_unet(2))


def built(table, x, model, **more):
    found = config.load(table)
    context = catalogue.Context(key=7, **more)
    score = building.score(found.targets[0], model, x, context)
    return score, building.explanation(found.methods[0], score, x, context)


def test_an_entry_is_built_as_a_script_would(plain, net):
    import esegeta as eg

    x = torch.randn(1, 8, 8)
    plain["methods"] = [
        {
            "name": "ig",
            "parameters": {"steps": 4},
            "baseline": [{"name": "constant", "value": 0.5}, "zero"],
            "transforms": [{"name": "over_baselines"}, {"name": "smooth", "noise": 0.1, "samples": 3}],
        }
    ]
    score, explain = built(plain, x, net)
    expected = eg.reducers.predicted_class_sum(net, 1, at=x)
    assert_alike(score(x), expected(x))
    by_hand = eg.smooth(eg.over_baselines(eg.integrated_gradients(expected, steps=4)), noise=0.1, samples=3)
    baselines = torch.stack([torch.full_like(x, 0.5), torch.zeros_like(x)])
    assert_alike(explain(x), by_hand(x, baselines, key=7))
    assert explain.axioms >= {"linearity", "dummy"}
    assert "completeness" not in explain.axioms  # the mean over noise adds up to something else
    assert explain.keyed


def test_an_entry_at_a_place_is_built_as_a_script_would(plain, net):
    import esegeta as eg

    x = torch.randn(1, 8, 8)
    score = eg.reducers.predicted_class_sum(net, 1, at=x)
    plain["methods"] = [{"name": "gradcam", "place": "bottom.relu"}]
    assert_alike(built(plain, x, net)[1](x), eg.grad_cam(score, "bottom.relu")(x))
    plain["methods"] = [
        {"name": "ig", "parameters": {"steps": 3}, "place": "decoder.relu", "baseline": "zero"}
    ]
    by_hand = eg.at(eg.integrated_gradients, "decoder.relu")(score, steps=3)(x, torch.zeros_like(x))
    assert_alike(built(plain, x, net)[1](x), by_hand)


def test_functions_are_asked_for_by_name(plain, net):
    import esegeta as eg

    x = torch.randn(1, 8, 8)
    plain["methods"] = [
        {
            "name": "feature_ablation",
            "baseline": "zero",
            "parameters": {"features": {"name": "grid", "size": 4, "spacing": "input"}},
        }
    ]
    score, explain = built(plain, x, net, spacing=(2.0, 1.0))
    by_hand = eg.feature_ablation(score, features=eg.features.grid(4, spacing=(2.0, 1.0)))(
        x, torch.zeros_like(x)
    )
    assert_alike(explain(x), by_hand)
    with pytest.raises(ValueError, match="expected an input with a size of voxels"):
        built(plain, x, net)
    plain["methods"] = [
        {"name": "gradient", "transforms": [{"name": "regions", "segments": {"name": "slic", "count": 5}}]}
    ]
    by_hand = eg.regions(eg.gradient(score), lambda x: eg.segmentation.slic(x, 5))(x)
    assert_alike(built(plain, x, net)[1](x), by_hand)


def test_baselines_that_draw_differ_and_repeat(plain, net):
    x = torch.randn(1, 8, 8)
    draw = {"name": "uniform", "count": 3}
    plain["methods"] = [{"name": "deep_lift_shap", "baseline": [draw, draw]}]
    refs = [built(plain, x, net)[1].refs[0] for _ in range(2)]
    assert refs[0].shape == (6, 1, 8, 8)
    assert torch.equal(*refs)
    assert len({tuple(b.flatten().tolist()) for b in refs[0]}) == 6


def test_a_file_stands_for_a_tensor(plain, net, tmp_path):
    (tmp_path / "l.npy").write_bytes(b"")
    x = torch.randn(1, 8, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:7] = True
    asked = []

    def read(path):
        asked.append(path.name)
        return mask

    plain["targets"] = [
        {
            "name": "lesion",
            "reducer": "region",
            "class": 1,
            "parameters": {"mask": {"file": str(tmp_path / "l.npy")}},
        }
    ]
    score, _ = built(plain, x, net, read=read)
    assert asked == ["l.npy"]
    assert_alike(score(x), reducers.region(net, 1, mask)(x))
    with pytest.raises(ValueError, match="expected a reader of files, got none"):
        built(plain, x, net)


def test_every_method_with_its_example_runs_as_configured(plain, net):
    x = torch.randn(1, 8, 8)
    wrong = []
    quick = (
        "gradient",
        "ig",
        "deep_lift",
        "lrp",
        "occlusion",
        "rise",
        "shapley_sampling",
        "ebp",
        "gradcam",
        "xrai",
    )
    for name in quick:
        spec = METHODS.find(name)
        entry = {
            "name": name,
            "parameters": {k: v for k, v in spec.example.items() if isinstance(v, (int, float, str))},
        }
        if spec.place:
            entry["place"] = "bottom.relu"
        if spec.refs:
            entry["baseline"] = "zero"
        if "features" in catalogue.of_method(spec):
            entry["parameters"]["features"] = {"name": "grid", "size": 4}
        plain["methods"] = [entry]
        a = built(plain, x, net)[1](x)
        if not a.isfinite().all() or (spec.shape == "input" and a.shape != x.shape):
            wrong.append(name)
    assert wrong == []


def test_a_configuration_needs_pydantic_and_says_so():
    script = (
        "import sys; sys.modules['pydantic'] = None\n"
        "from esegeta.cli import main\nraise SystemExit(main(['run', 'a.toml']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert 'pip install "esegeta[cli]"' in done.stderr


def test_what_a_function_of_the_library_takes_a_file_may_say(plain):
    plain["model"]["arguments"] = {"ndim": 2, "key": 5}
    plain["patches"] = {"size": 8, "overlap": 0.25, "weights": "centre"}
    plain["run"] = {"threads": 2}
    found = config.load(plain)
    assert (found.model.arguments["key"], found.patches.weights, found.run.threads) == (5, "centre", 2)
    plain["methods"][0]["parameters"] = {**plain["methods"][0].get("parameters", {}), "key": 5}
    assert "run.key is for all" in config.problems(plain)[0]
