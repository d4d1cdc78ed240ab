"""What a configuration may run: nothing that nobody trusts, whoever asks for it and in whatever way.

Every attack here would write a file, the canary. It must not be there afterwards.
"""

import json
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import esegeta
from esegeta import cli
from esegeta.run import pipeline
from esegeta.run.config import loading as config
from esegeta.run.config import sources as networks
from esegeta.run.config import trust
from esegeta.run.config.schema import Model
from esegeta.run.config.trust import UntrustedError, asked
from esegeta.run.executors.child import Context
from esegeta.run.jobs import dispatch
from esegeta.run.jobs import plan as jobs

NET = """
import functools, os, torch
import numpy as elsewhere
from monai.networks.nets import BasicUNet
from pathlib import Path

def build(width=2):
    return torch.nn.Conv2d(1, width, 1)

class Net(torch.nn.Conv2d):
    def __init__(self):
        super().__init__(1, 2, 1)
    @classmethod
    def wide(cls):
        return cls()

made = build()
narrow = functools.partial(build, width=1)
load = functools.partial(torch.load, weights_only=False)
"""


class Touch:
    """Writes the canary when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "ran"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A folder with a configuration that can run, away from everything else."""
    monkeypatch.delenv("ESEGETA_TRUST", raising=False)
    folder = tmp_path / "study"
    folder.mkdir()
    np.save(folder / "sub-a.npy", np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    return folder


def tables(source="zoo:small_unet", **model):
    arguments = {"arguments": {"ndim": 2}} if source == "zoo:small_unet" else {}
    return {
        "model": {"source": source, **arguments, **model},
        "input": {"files": "sub-a.npy"},
        "targets": [{"name": "one", "reducer": "class_sum", "class": 0}],
        "methods": [{"name": "gradient"}],
        "run": {"output": "out"},
        "output": {"figures": False, "report": False},
    }


def written(study, whole, name="c.json"):
    (study / name).write_text(json.dumps(whole))
    return study / name


def of_worker(study, model, **changes):
    """What a worker says to a job that got past every check before it."""
    (job,) = jobs.plan(config.load(written(study, tables(), "good.json")))
    payload = {**job.payload, **changes}
    payload["model"] = {**payload["model"], "arguments": {}, **model}
    context = Context("cpu", None, None, {}, lambda **_: None)
    return dispatch.examine([payload], context)[job.id]["problem"]


def command(folder, *arguments, path="", **environment):
    root = str(Path(esegeta.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-m", "esegeta", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, path))), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


ATTACKS = {
    "torch.hub:load": {"repo_or_dir": "HERE", "model": "evil", "source": "local"},
    "sympy:sympify": {"a": "__import__('pathlib').Path('CANARY').touch()"},
    "numpy.testing:rundocs": {"filename": "HERE/hubconf.py"},
    "torch.utils.cpp_extension:load_inline": {"name": "a", "cpp_sources": "x", "with_cuda": False},
    "torch:load": {"f": "HERE/evil.pt", "weights_only": False},
    "torch.jit:load": {"f": "HERE/evil.pt"},
    "numpy:load": {"file": "HERE/evil.npy", "allow_pickle": True},
    "esegeta.run.executors.child:resolve": {"name": "os:system"},
    "esegeta.run.config.sources:importlib.import_module": {"name": "hubconf"},
    "monai.networks.nets:torch.hub.load": {"repo_or_dir": "HERE", "model": "evil", "source": "local"},
    "monai.networks.nets:resnet10": {"pretrained": "HERE/evil.pt"},
    "monai.networks.nets:HoVerNet": {"pretrained_url": "file://HERE/evil.pt"},
    "monai.networks.nets:DenseNet121": {
        "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "pretrained": True,
    },
    "monai.networks.nets:EfficientNetBN": {"model_name": "efficientnet-b0"},
    "monai.networks.nets:UNet.load_state_dict": {},
    "monai.utils:optional_import": {"module": "hubconf"},
    "subprocess:Popen": {"args": ["touch", "CANARY"]},
    "os.path:os.system": {"command": "touch CANARY"},
}  # fmt: skip


def armed(folder, canary, arguments):
    """Files that write the canary in every way, and arguments that lead to them."""
    (folder / "hubconf.py").write_text(
        f'"""\n>>> open({str(canary)!r}, "w").close()\n"""\nopen({str(canary)!r}, "w").close()\n'
    )
    torch.save(Touch(canary), folder / "evil.pt")
    (folder / "evil.npy").write_bytes(pickle.dumps(Touch(canary)))

    def filled(value):
        if isinstance(value, str):
            return value.replace("HERE", str(folder)).replace("CANARY", str(canary))
        return [filled(one) for one in value] if isinstance(value, list) else value

    return {key: filled(value) for key, value in arguments.items()}


@pytest.mark.parametrize("source", ATTACKS)
def test_functions_of_libraries_are_not_called(study, tmp_path, canary, source):
    if source.startswith("sympy"):
        pytest.importorskip("sympy")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments = armed(elsewhere, canary, ATTACKS[source])
    assert "expected" in of_worker(study, {"source": source, "arguments": arguments})
    lines = config.problems(written(study, tables(source, arguments=arguments)))
    assert all(line.startswith("model.source: expected ") for line in lines)
    assert lines or source.startswith("monai.networks.nets:")  # these are known only when they are imported
    assert not canary.exists()


def said_by(capsys, *arguments):
    """The line on stderr of a command that was refused, in this process: nothing was started."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == cli.BAD_INPUT
    return capsys.readouterr().err


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_run_from_the_command_line_refuses_and_says_what_to_add(study, canary, dry, capsys):
    arguments = armed(study, canary, ATTACKS["torch.hub:load"])
    path = written(study, tables("torch.hub:load", arguments=arguments))
    where = os.path.realpath(torch.hub.__file__)
    assert said_by(capsys, "run", path, *dry) == (
        "esegeta: model.source: expected a Python file in the folder of the configuration, or code that you trust, "
        f"got 'torch.hub:load', which is in {where}. If you trust it, add --trust torch.hub:load.\n"
    )
    assert not canary.exists()
    assert not (study / "out").exists()


@pytest.mark.slow
def test_what_is_refused_runs_with_the_flag_that_the_message_names(
    study, tmp_path, canary, capsys, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far_net.py").write_text(f"open({str(canary)!r}, 'w').close()\n{NET}")
    path = written(study, tables("far_net:build", path="../elsewhere"))
    flag = said_by(capsys, "run", path, "--dry-run").rpartition("add --trust ")[2].strip().removesuffix(".")
    assert flag == os.path.realpath(elsewhere)
    assert not canary.exists()
    assert cli.main(["run", str(path), "--dry-run", "--trust", flag]) == 0
    assert canary.exists()
    canary.unlink()
    with pytest.raises(config.Faults):
        pipeline.run(path, progress=False)
    assert not canary.exists()
    monkeypatch.setenv("ESEGETA_TRUST", f"torch.nn, {flag}")
    assert config.load(path).trust == config.load(path, trust=["torch.nn", flag]).trust.__class__(
        os.path.realpath(study), ("torch.nn",), (flag,)
    )


# -- the folder of the configuration ---------------------------------------------------------------------------


def loaded(folder, of, given=(), place=None, **arguments):
    model = Model(source=of, path=str(place or folder), arguments=arguments)
    return networks.load(model, trust=asked(folder, given)).module


def refusal(*what, **how):
    with pytest.raises(ValueError, match=r"^model: expected ") as caught:
        loaded(*what, **how)
    return str(caught.value)


@pytest.mark.parametrize("name", ["build", "Net", "Net.wide", "made", "narrow"])
def test_what_a_file_of_the_folder_defines_is_called(study, name):
    (study / "own_net.py").write_text(NET)
    try:
        assert isinstance(loaded(study, f"own_net:{name}"), nn.Module)
    finally:
        forget("own_net", study)


def forget(module, folder):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if not path.startswith(str(folder))]


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("torch.hub.load", {"repo_or_dir": "HERE", "model": "evil", "source": "local"}, "'torch' is of torch"),
        ("os.system", {"command": "touch CANARY"}, "'os' is of os"),
        ("elsewhere.load", {"file": "HERE/evil.npy", "allow_pickle": True}, "'elsewhere' is of numpy"),
        ("load", {"f": "HERE/evil.pt"}, "'load' is of torch.serialization"),
        ("Path", {}, "'Path' is of pathlib"),
        ("Net.load_state_dict", {}, "'load_state_dict' is of torch.nn.modules.module"),
        ("build.__globals__.get", {}, "a function of own_bridge"),
        ("build.__class__", {}, "a function of own_bridge"),
    ],
)  # fmt: skip
def test_what_a_file_only_imports_is_no_bridge(study, canary, name, arguments, text):
    (study / "own_bridge.py").write_text(NET)
    try:
        assert text in refusal(study, f"own_bridge:{name}", **armed(study, canary, arguments))
    finally:
        forget("own_bridge", study)
    assert not canary.exists()


def test_a_network_of_a_known_package_may_come_through_a_file_of_the_folder(study):
    (study / "own_names.py").write_text("from monai.networks.nets import BasicUNet")
    said = {"spatial_dims": 2, "features": [2, 2, 2, 2, 2, 2]}
    try:
        assert isinstance(loaded(study, "own_names:BasicUNet", **said), nn.Module)
    finally:
        forget("own_names", study)
    assert isinstance(loaded(study, "monai.networks.nets:BasicUNet", **said), nn.Module)


@pytest.mark.parametrize("form", ["file", "package", "submodule", "folder", "model.path", "bytecode"])
def test_ways_out_of_the_folder(study, tmp_path, canary, form):
    """A link is judged by where it leads."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "way_out").mkdir(parents=True)
    text = f"open({str(canary)!r}, 'w').close()\n{NET}"
    for name in ("way_out.py", "way_out/__init__.py", "way_out/inner.py"):
        (elsewhere / name).write_text(text)
    source, place = "way_out:build", study
    if form == "file":
        (study / "way_out.py").symlink_to(elsewhere / "way_out.py")
    elif form == "package":
        (study / "way_out").symlink_to(elsewhere / "way_out")
    elif form == "submodule":
        (study / "way_out").mkdir()
        (study / "way_out" / "__init__.py").write_text("")
        (study / "way_out" / "inner.py").symlink_to(elsewhere / "way_out.py")
        source = "way_out.inner:build"
    elif form == "folder":
        (study / "link").symlink_to(elsewhere)
        place = study / "link"
    elif form == "model.path":
        place = study / ".." / "elsewhere"
    else:
        import py_compile

        py_compile.compile(str(elsewhere / "way_out.py"), cfile=str(study / "way_out.pyc"))
    try:
        assert "code that you trust, got 'way_out" in refusal(study, source, place=place)
        assert "code that you trust" in of_worker(study, {"source": source, "path": str(place)})
        assert not canary.exists()
        if form != "bytecode":
            assert isinstance(loaded(study, source, [str(elsewhere)], place=place), nn.Module)
            assert canary.exists()
    finally:
        forget("way_out", tmp_path)


@pytest.mark.parametrize("source", ["named_net:build", "segmenters.models:build"])
def test_trust_in_a_name_is_not_in_any_folder_that_has_it(study, tmp_path, canary, source):
    """Who trusts a package that is not installed here must not get a stranger's in its place."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "segmenters").mkdir(parents=True)
    for name in ("named_net.py", "segmenters/__init__.py", "segmenters/models.py"):
        (elsewhere / name).write_text(f"open({str(canary)!r}, 'w').close()\n{NET}")
    for given in ("named_net", "segmenters", source):
        assert "code that you trust" in refusal(study, source, [given], place=elsewhere)
    assert not canary.exists()


def test_a_link_into_the_folder_does_not_open_the_folder_it_lies_in(study, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (study / "way_in.py").write_text(NET)
    (elsewhere / "way_in.py").symlink_to(study / "way_in.py")
    before = list(sys.path)
    assert "code that you trust" in refusal(study, "way_in:build", place=elsewhere)
    assert sys.path == before


def test_an_environment_in_the_folder_is_not_the_users_code(tmp_path):
    """With a configuration beside ``.venv`` all that is installed would lie in its folder."""
    home = Path(os.path.realpath(torch.__file__)).parents[1]
    for folder in (home, home.parent, home.parents[3]):
        assert not asked(folder).own(Path(torch.hub.__file__))
        assert "got 'torch.hub:load'" in refusal(folder, "torch.hub:load")
    other = tmp_path / "env/lib/python3/site-packages/of_env.py"
    other.parent.mkdir(parents=True)
    other.write_text(NET)
    assert "code that you trust" in refusal(tmp_path, "of_env:build", place=other.parent)


@pytest.mark.slow
def test_files_that_are_called_like_a_module_do_not_take_its_place(study, tmp_path, canary, monkeypatch):
    """A worker imports torch, json and all others from where they are; the current folder is not searched."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("monai.py", "helper_of_net.py", "usercustomize.py"):
        (here / name).write_text(f"open({str(canary)!r}, 'w').close()")
    for name in ("json.py", "torch.py", "monai.py", "colorsys.py", "sitecustomize.py"):
        (study / name).write_text(f"open({str(canary)!r}, 'w').close()\nbuild = 3\n")
    first = "import json, torch, colorsys\ntry: import helper_of_net\nexcept ImportError: pass\n"
    (study / "shaded_net.py").write_text(first + NET)
    done = command(here, "run", written(study, tables("shaded_net:build")), "--plain")
    assert done.returncode == 0, done.stderr + done.stdout
    assert not canary.exists()
    for source, text in (("torch:build", "which is in "), ("json:build", "no part of Python, got 'json'")):
        assert text in config.problems(written(study, tables(source)))[0]


# -- programs and weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.pt2", "net.ts", "net.pt"])
def test_a_program_is_not_opened_unless_it_is_trusted(study, canary, name):
    """Also in the folder of the configuration: who sends a network sends that file."""
    with zipfile.ZipFile(study / name, "w") as archive:
        for member in (
            "archive_format",
            "archive/version",
            "models/model.json",
            "archive/data.pkl",
            "data.pkl",
        ):
            archive.writestr(member, pickle.dumps(Touch(canary)))
    whole = written(study, tables(name))
    (line,) = config.problems(whole)
    real = os.path.realpath(study / name)
    assert line == (
        "model.source: expected a program that you trust, for loading one can run code, "
        f"got {real}. If you trust who made it, add --trust {real}."
    )
    assert "a program that you trust" in of_worker(study, {"source": real})
    assert not canary.exists()
    for given in (real, str(study)):
        assert config.load(whole, trust=[given]).trust.paths == (os.path.realpath(given),)


def test_a_trusted_program_is_a_network(study):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(nn.Conv2d(1, 2, 1), torch.zeros(1, 1, 4, 4)).save(str(study / "net.ts"))
    assert isinstance(loaded(study, str(study / "net.ts"), [str(study / "net.ts")]), nn.Module)


def test_weights_are_tensors_even_of_code_that_is_trusted(study, canary):
    armed(study, canary, {})
    (study / "weighty_net.py").write_text(NET)
    model = Model(source="weighty_net:build", path=str(study), weights=str(study / "evil.pt"))
    try:
        with pytest.raises(ValueError, match="tensors only, got a pickle that wants to"):
            networks.load(model, trust=asked(study, [str(study), "torch"]))
    finally:
        forget("weighty_net", study)
    assert not canary.exists()


def test_one_kind_of_source_for_all_who_look(study, canary):
    """``x:y.pt`` was a file for the check and a module for the loader."""
    (study / "hubconf:y.pt").write_bytes(b"x")
    armed(study, canary, {})
    config.problems(written(study, tables("hubconf:y.pt")))
    assert not canary.exists()
    with pytest.raises(ValueError, match=r"got 'hubconf:y.pt', which is in "):
        networks.load(Model(source="hubconf:y.pt", path=str(study)))
    assert not canary.exists()


# -- what is text stays text -----------------------------------------------------------------------------------


def test_no_key_of_a_file_can_grant_trust(study):
    for key in ("trust", "_trust"):
        lines = config.problems(written(study, {**tables(), key: ["torch"]}))
        assert lines[0].startswith(f"{key}: expected a table of the file, got '{key}'")
        lines = config.problems(written(study, {**tables(), "run": {key: ["torch"]}}))
        assert lines[0].startswith(f"run.{key}: expected ")


@pytest.mark.parametrize(
    "changes",
    [
        {"input": {"files": "sub-a.npy", "preprocess": [{"step": "os:system", "command": "touch CANARY"}]}},
        {"input": {"files": "sub-a.npy", "preprocess": [{"step": "crop", "box": "os.system('touch CANARY')"}]}},
        {"methods": [{"name": "os:system", "parameters": {"command": "touch CANARY"}}]},
        {"methods": [{"name": "kernel_shap", "baseline": "zero",
                      "parameters": {"features": {"name": "os:system", "command": "touch CANARY"}}}]},
        {"methods": [{"name": "occlusion", "baseline": {"name": "os.system"}, "parameters": {"size": 4}}]},
        {"methods": [{"name": "gradient", "transforms": [{"name": "subprocess:run", "args": "touch CANARY"}]}]},
        {"methods": [{"name": "lrp", "parameters": {"composite": {"name": "torch.hub:load"}}}]},
        {"methods": [{"name": "rise", "baseline": "zero", "parameters": {"mask": {"name": "hubconf:evil"}}}]},
        {"targets": [{"name": "one", "reducer": "os:system"}]},
        {"targets": [{"name": "one", "reducer": "region", "parameters": {"mask": {"file": "evil.npy"}}, "class": 0}]},
        {"plugins": ["../elsewhere/hubconf.py"]},
        {"plugins": ["link.py"]},
        {"plugins": ["os.py"]},
        {"plugins": "hubconf.py"},
        {"plugins": ["evil.pt"]},
        {"plugins": [{"file": "hubconf.py"}]},
    ],
)  # fmt: skip
def test_functions_named_in_text_are_of_fixed_tables(study, tmp_path, canary, changes):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    armed(elsewhere, canary, {})
    (study / "link.py").symlink_to(elsewhere / "hubconf.py")
    (study / "evil.npy").write_bytes((elsewhere / "evil.npy").read_bytes())
    (study / "evil.pt").write_bytes((elsewhere / "evil.pt").read_bytes())
    (study / "os.py").write_text((elsewhere / "hubconf.py").read_text())
    text = json.dumps({**tables(), **changes}).replace("CANARY", str(canary))
    path = written(study, json.loads(text))
    lines = config.problems(path)
    if not lines:  # what is in a file is known when it is read
        (job,) = jobs.plan(config.load(path))
        lines = [
            dispatch.examine([job.payload], Context("cpu", None, None, {}, lambda **_: None))[job.id][
                "problem"
            ]
        ]
    assert all("expected" in line for line in lines)
    assert not canary.exists()


def test_converting_an_old_configuration_runs_nothing(study, canary):
    words = f"__import__('os').system('touch {canary}')"
    entry = {"method_name": "captum_Saliency", "use": True, "keywords": {"abs": words}, "title": words}
    entries = [entry, {"method_name": "lime_segmentation", "use": True, "keywords": {"num_samples": words}}]
    old = {"model_nature": words, "model_name": words, "methods": entries, "resize": words}
    (study / "old.json").write_text(json.dumps(old))
    assert cli.main(["convert", str(study / "old.json"), "-o", str(study / "new.toml")]) == 0
    config.problems(study / "new.toml")
    assert not canary.exists()


# -- the value itself ------------------------------------------------------------------------------------------


def test_what_is_given_is_a_name_or_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets").mkdir()
    found = asked(tmp_path, ["nets", "./nets", "a.b:c.d"])
    assert found == trust.Trust(os.path.realpath(tmp_path), ("nets", "a.b:c.d"), (os.path.realpath("nets"),))
    assert trust.from_json(json.loads(json.dumps(found.json()))) == found
    with pytest.raises(ValueError, match=r"trust: expected a name, a folder or a file, got './nest'"):
        asked(tmp_path, ["./nest"])
    with pytest.raises(AttributeError):
        found.names = ("torch",)
    assert not asked("").own(tmp_path / "a.py")
    error = pickle.loads(pickle.dumps(UntrustedError("a", "b", "c.")))
    assert (str(error), error.advice) == ("trust: expected a, got b. c.", "c.")


def test_trust_of_a_function_is_of_no_other(study):
    assert loaded(study, "torch.nn:Conv2d", ["torch.nn:Conv2d"], in_channels=1, out_channels=1, kernel_size=1)
    assert "defined in trusted code, got 'torch.nn:Conv3d'" in refusal(
        study, "torch.nn:Conv3d", ["torch.nn:Conv2d"], in_channels=1, out_channels=1, kernel_size=1
    )
    assert "got 'torch.hub:load'" in refusal(study, "torch.hub:load", ["torch.nn"])
    assert "'os' is of os" in refusal(study, "torch.hub:os.system", ["torch.hub"])
    # To import a module is to import what is above it.
    assert "defined in trusted code" in refusal(study, "torch:load", ["torch.nn:Conv2d"])


def test_trust_goes_with_every_job_and_decides_nothing(study):
    path = written(study, tables())
    (plain,), (more,) = (jobs.plan(config.load(path, trust=given)) for given in ([], ["torch.nn"]))
    assert plain.payload["trust"] == {"folder": os.path.realpath(study), "names": [], "paths": []}
    assert more.payload["trust"]["names"] == ["torch.nn"]
    assert plain.digest == more.digest


# -- plugins ---------------------------------------------------------------------------------------------------

PLUGIN = textwrap.dedent("""
    from pathlib import Path
    from esegeta._registry import method, reducer

    @method(needs="values", paper="none")
    def times_own_factor(score, *, factor: float = 2.0):
        "Return the image times a factor."
        return lambda x: factor * x

    @reducer()
    def own_reducer(model):
        "Return the first value."
        return lambda x: model(x).flatten()[0]
""")


@pytest.fixture
def plugged(study):
    (study / "my_own_methods.py").write_text(PLUGIN)
    whole = {"plugins": ["my_own_methods.py"], **tables()}
    whole["methods"] = [{"name": "times_own_factor", "parameters": {"factor": 3.0}}]
    whole["targets"] = [{"name": "one", "reducer": "own_reducer"}]
    return written(study, whole)


@pytest.mark.slow
def test_plugins_reach_all_workers_and_their_content_decides(study, plugged, tmp_path):
    def run():
        done = command(tmp_path, "run", plugged, "--plain")
        assert done.returncode == 0, done.stderr + done.stdout
        return json.loads(next((study / "out/.jobs").glob("sub-*.json")).read_text())

    first = run()
    assert first["max"] == pytest.approx(3.0, rel=1e-6)
    (study / "my_own_methods.py").write_text(PLUGIN.replace("factor * x", "2 * factor * x"))
    again = run()
    assert again["max"] == pytest.approx(6.0, rel=1e-6)
    assert again["config_digest"] != first["config_digest"]
    (study / "my_own_methods.py").write_text("raise RuntimeError('broken')")
    line = config.problems(plugged)[0]
    assert "plugins[0]: expected my_own_methods.py to import, got RuntimeError: broken." in line


@pytest.mark.slow
def test_plugins_are_listed(study, plugged, tmp_path):
    done = command(tmp_path, "methods", "--config", plugged)
    assert "times_own_factor" in done.stdout
    assert "own_reducer" in done.stdout
    done = command(tmp_path, "methods", "times_own_factor", "--plugins", study / "my_own_methods.py")
    assert "factor (a number; default 2.0)" in done.stdout


def test_plugins_from_elsewhere_are_listed_only_if_they_are_trusted(study, tmp_path, canary, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far_methods.py").write_text(PLUGIN + f"Path({str(canary)!r}).touch()\n")
    path = written(study, {"plugins": ["../elsewhere/far_methods.py"], **tables()})
    said = said_by(capsys, "methods", "--config", path)
    assert said.startswith("esegeta: plugins[0]: expected a Python file in the folder of the configuration")
    assert not canary.exists()
    flag = said.rpartition("add --trust ")[2].strip().removesuffix(".")
    assert "times_own_factor" in command(study, "methods", "--config", path, "--trust", flag).stdout


def test_a_worker_asks_before_it_imports_a_plugin(study, tmp_path, canary):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    armed(elsewhere, canary, {})
    said = of_worker(study, {"arguments": {"ndim": 2}}, plugins=[str(elsewhere / "hubconf.py")])
    assert "expected a Python file in the folder of the configuration" in said
    assert not canary.exists()


@pytest.mark.slow
def test_a_plugin_that_has_changed_is_imported_again(tmp_path):
    """In a process that stays; here in one of its own, for what is registered would be tested with the rest."""
    script = textwrap.dedent(f"""
        import os
        from pathlib import Path
        from esegeta.run.config.plugins import load, registered
        from esegeta.run.config.trust import asked
        path, trust = Path("changing.py"), asked(".")
        text = {PLUGIN!r}
        path.write_text(text)
        load([path], trust), load([path], trust)
        assert registered("changing") == ["times_own_factor", "own_reducer"], registered("changing")
        path.write_text(text.replace("times_own", "divided_by_own"))
        load([path], trust)
        assert registered("changing") == ["divided_by_own_factor", "own_reducer"], registered("changing")
        path.write_text(text + "raise RuntimeError")
        try:
            load([path], trust)
        except ValueError as error:
            assert "plugins: expected changing.py to import, got RuntimeError" in str(error), error
        assert registered("changing") == []
        path.write_text(text.replace("times_own_factor", "gradient"))
        try:
            load([path], trust)
        except ValueError as error:
            assert "a new name, got 'gradient'" in str(error), error
        else:
            raise AssertionError
    """)
    root = str(Path(esegeta.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-B", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
