"""The command line: what it prints, how it ends, and that it answers at once."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from old_configurations import old

import esegeta
from esegeta import cli, zoo
from esegeta._registry import METHODS, REDUCERS, TRANSFORMS
from esegeta.run.config import loading as config
from esegeta.run.executors import stopping

COMMANDS = ("demo", "run", "follow", "clean", "init", "methods", "convert", "places", "verify", "compare")
HELP_SECONDS = 0.5


def called(*arguments, folder=None):
    return subprocess.run(
        [sys.executable, "-m", "esegeta", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(esegeta.__file__).parent.parent), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def refused(capsys, *arguments):
    """The one line on stderr of a command that was asked wrongly."""
    assert cli.main(arguments) == cli.BAD_INPUT
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("esegeta: ")
    assert out.err.count("\n") == 1
    return out.err


@pytest.fixture
def study(tmp_path):
    """A folder with a picture and a configuration of three quick methods."""
    np.save(tmp_path / "sub-a.npy", np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32))
    (tmp_path / "study.toml").write_text(
        """
[model]
source = "zoo:small_unet"
arguments = { ndim = 2 }
[input]
files = "*.npy"
[[targets]]
name = "one"
reducer = "class_sum"
class = 1
[[methods]]
name = "gradient"
[[methods]]
name = "integrated_gradients"
id = "ig"
parameters = { steps = 4 }
[[methods]]
name = "grad_cam"
place = "bottom.relu"
[run]
output = "out"
baseline = "zero"
[output]
figures = false
report = false
"""
    )
    return tmp_path


# --- Answering at once ------------------------------------------------------------------------------------


def test_help_answers_at_once():
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = called("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        # The time of the processor: another process does not make it more.
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if min(spent) < HELP_SECONDS:
            break
    assert min(spent) < HELP_SECONDS
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("run", "--help"), ("verify", "--help")])
def test_help_imports_nothing_heavy(words):
    script = (
        "import sys\nfrom esegeta.cli import main\n"
        f"main({list(words)!r})\n"
        "heavy = {m.partition('.')[0] for m in sys.modules} & {'torch', 'numpy', 'scipy', 'matplotlib'}\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"esegeta {command}" in text
    assert "Example" in text


def test_without_a_command_there_is_help(capsys):
    assert cli.main([]) == 0
    assert "Usage" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"esegeta {esegeta.__version__}\n"


# --- Errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run"], "Missing argument"),
        (["run", "--fast", "a.toml"], "No such option"),
        (["run", "nowhere.toml"], "expected nowhere.toml to be a file that can be read"),
        (["run", "a.yaml"], "to be a file .toml or .json"),
        (["methods", "gradiant"], "got 'gradiant'. Nearest: gradient"),
        (["demo", "--size", "30"], "expected a multiple of 8 from 40 to 128, got 30"),
        (["init", "a.json"], "expected a name that ends in .toml"),
        (["convert", "nowhere.json"], "expected nowhere.json to be a file that can be read"),
        (["places", "zoo:small_unet", "--shape", "1"], "expected channels and one to three sizes"),
        (["places", "zoo:small_unet", "--shape", "1,8,a"], "expected channels and one to three sizes"),
        (["places", "zoo:nothing", "--shape", "1,8,8"], "expected a network of the zoo, got 'nothing'"),
        (["places", "zoo:small_unet", "--shape", "1,8,8", "--arguments", "[]"], "expected a table in JSON"),
        (["places", "zoo:small_unet", "--shape", "1,7,7", "--arguments", '{"ndim": 2}'], ""),
        (["verify", "gradiant"], "got 'gradiant'"),
        (["verify", "gradient", "--axioms", "nothing"], "got 'nothing'"),
        (["verify", "gradient", "--cases", "0"], "--cases"),
    ],
)
def test_what_is_asked_wrongly_ends_with_one_line(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if (
        arguments[0] == "places" and "1,7,7" in arguments
    ):  # the network itself fails: that is no fault of the words
        assert cli.main(arguments) in (cli.BAD_INPUT, cli.FAILED)
        assert capsys.readouterr().err.count("\n") == 1
        return
    assert text in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_every_fault_of_a_configuration_is_a_line(study, capsys):
    text = (study / "study.toml").read_text().replace('"class_sum"', '"clas_sum"').replace("steps", "step")
    (study / "study.toml").write_text(text)
    assert cli.main(["run", str(study / "study.toml")]) == cli.BAD_INPUT
    out = capsys.readouterr()
    assert [line.partition(": expected")[0] for line in out.err.splitlines()] == [
        "esegeta: targets[0].reducer",
        "esegeta: methods[1].parameters.step",
    ]
    assert not (study / "out").exists()


def test_a_traceback_comes_only_if_asked_for(capsys):
    with pytest.raises(ValueError, match="gradiant"):
        cli.main(["methods", "gradiant", "--traceback"])
    done = called("methods", "gradiant")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RuntimeError("a\nb"), 1, "esegeta: RuntimeError: a b"),
        (OSError(28, "No space left on device"), 1, "esegeta: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "esegeta: interrupted. What is finished is kept."),
        (stopping.Terminated(signal.SIGTERM), 143, "esegeta: interrupted. What is finished is kept."),
        (ModuleNotFoundError("No module named 'jinja2'", name="jinja2"), 1, 'pip install "esegeta[viz]"'),
        (KeyError("x"), 1, "esegeta: KeyError: 'x'"),
    ],
)
def test_how_it_ends(error, status, line, capsys):
    assert cli.ended_by(error) == status
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m esegeta methods | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == "METHODS\n"
    assert done.stderr == ""


def test_what_cannot_be_installed_here_is_named():
    script = "import sys; sys.modules['typer'] = None\nimport esegeta.cli"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == 'esegeta: the command line needs typer. Install it: pip install "esegeta[cli]"\n'


# --- Commands ---------------------------------------------------------------------------------------------


def test_methods_lists_all_there_is(capsys):
    assert cli.main(["methods"]) == 0
    words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line}
    assert {*METHODS, *TRANSFORMS, *REDUCERS, "zero", "blurred"} <= words


@pytest.mark.parametrize("name", ["integrated_gradients", "ig", "smooth", "class_sum", "blurred"])
def test_methods_says_all_about_one(name, capsys):
    assert cli.main(["methods", name]) == 0
    text = capsys.readouterr().out
    assert ": a " in text.splitlines()[0]
    if name == "ig":
        assert "needs: baseline" in text
        kept = next(line for line in text.splitlines() if line.strip().startswith("keeps: "))
        assert "completeness" in kept
        assert "steps (a whole number; default 32): " in text


def test_every_parameter_is_explained(capsys):
    silent = []
    for name in METHODS:
        assert cli.main(["methods", name]) == 0
        text = capsys.readouterr().out
        silent += [f"{name} {line.strip()}" for line in text.splitlines() if line.endswith("): ")]
    assert silent == []


def test_init_writes_what_run_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init"]) == 0
    assert config.problems(tmp_path / "esegeta.toml") == []
    assert "esegeta.toml is there already" in (refused_after(capsys, "init"))
    (tmp_path / "esegeta.toml").write_text("x")
    assert cli.main(["init", "--force"]) == 0
    assert tomllib.loads((tmp_path / "esegeta.toml").read_text())["model"]


def refused_after(capsys, *arguments):
    capsys.readouterr()
    return refused(capsys, *arguments)


def test_convert_prints_or_writes(tmp_path, capsys):
    source = tmp_path / "cfg.json"
    source.write_text(json.dumps(old("Class_2d")))
    assert cli.main(["convert", str(source)]) == 0
    out = capsys.readouterr()
    assert tomllib.loads(out.out)["methods"][0]["name"] == "lime"
    assert "captum_Saliency: " in out.err
    assert cli.main(["convert", str(source), "-o", str(tmp_path / "new.toml")]) == 0
    assert tomllib.loads((tmp_path / "new.toml").read_text())["methods"][0]["id"] == "lime_segmentation"
    assert "is there already" in refused_after(
        capsys, "convert", str(source), "-o", str(tmp_path / "new.toml")
    )
    wrong = refused_after(capsys, "convert", str(source), "-o", str(tmp_path / "new.json"))
    assert "expected a name that ends in .toml" in wrong
    assert not (tmp_path / "new.json").exists()


def test_names_are_printed_as_they_are(capsys):
    cli.say("my_module:a:b")  # rich would draw a picture for ":a:"
    assert capsys.readouterr().out == "my_module:a:b\n"


def test_run_says_what_to_do_with_an_old_configuration(tmp_path, capsys):
    (tmp_path / "cfg.json").write_text(json.dumps(old("Seg_3d")))
    assert f"esegeta convert {tmp_path / 'cfg.json'}" in refused(capsys, "run", str(tmp_path / "cfg.json"))


def test_places_lists_what_a_configuration_can_name(study, capsys):
    words = ("zoo:small_unet", "--arguments", '{"ndim": 2}', "--shape", "1,16,16")
    assert cli.main(["places", *words]) == 0
    by_name = capsys.readouterr().out
    assert cli.main(["places", str(study / "study.toml"), "--shape", "1x16x16"]) == 0
    by_file = capsys.readouterr().out
    assert by_name.splitlines()[1:] == by_file.splitlines()[1:]
    assert "zoo:small_unet: from (1, 16, 16) to (2, 16, 16)" in by_name
    found = {line.split()[0]: line.split()[1:] for line in by_name.splitlines()[2:]}
    assert found["bottom.relu"] == ["module", "8x8x8", "no", "encoder"]
    assert found["decoder.relu"] == ["module", "4x16x16", "yes"]
    assert cli.main(["places", *words, "--cuts"]) == 0
    cuts = capsys.readouterr().out
    assert "bottom.relu" not in cuts
    assert "decoder.relu" in cuts


def test_verify_tells_what_holds(tmp_path, capsys):
    report = tmp_path / "report.json"
    words = ("--axioms", "linearity", "--json", str(report))
    assert cli.main(["verify", "gradient", *words, "--cases", "40"]) == 0
    assert "linearity                 holds          claimed" in capsys.readouterr().out
    assert json.loads(report.read_text())["verdicts"][0]["kind"] == "holds"


@pytest.mark.parametrize("few", [("--cases", "5"), ("--seconds", "0")])
def test_verify_that_decides_nothing_says_so(few, capsys):
    assert cli.main(["verify", "gradient", "--axioms", "linearity,dummy", *few]) == cli.UNDECIDED
    out = capsys.readouterr().out
    assert "gradient: 0 of 2 axioms hold, 2 undecided" in out
    assert "linearity                 undecided      claimed" in out
    assert "holds" not in out


def test_verify_takes_what_is_no_method(capsys):
    assert cli.main(["verify", "rules.guided", "--axioms", "same_values", "--cases", "50"]) == 0
    assert "rules.guided: 1 of 1 laws hold" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_writes_nothing(study, capsys):
    before = set(study.iterdir())
    assert cli.main(["run", str(study / "study.toml"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.count("to do") == 3
    assert "4 gradients" in text
    assert "3 jobs. Nothing was written." in text
    assert set(study.iterdir()) == before


def test_a_run_and_the_same_again(study, capsys):
    words = ["run", str(study / "study.toml"), "--workers", "1", "--only", "ig", "--only", "gradient"]
    cli.main(words)
    text = capsys.readouterr().out
    assert "2 done" in text
    maps = sorted(p.name for p in (study / "out").rglob("*statmap.nii.gz"))
    assert len(maps) == 2
    stamps = {p: p.stat().st_mtime_ns for p in (study / "out").rglob("*statmap.nii.gz")}
    assert cli.main(["run", str(study / "study.toml"), "--plain"]) == 0
    assert "3 done" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert "expected the id of a job or of a method" in refused_after(
        capsys, "run", str(study / "study.toml"), "--only", "nothing"
    )


@pytest.mark.slow
def test_a_method_that_fails_fails_alone(study, capsys):
    text = (
        (study / "study.toml")
        .read_text()
        .replace("bottom.relu", "bottom.rellu")
        .replace('"*.npy"', '"sub-a.npy"')
    )
    (study / "study.toml").write_text(text)
    assert cli.main(["run", str(study / "study.toml"), "--output", str(study / "other")]) == cli.FAILED
    out = capsys.readouterr().out
    assert "2 done" in out
    (line,) = [line for line in out.splitlines() if "bottom.rellu" in line]
    assert "Nearest" in line or "bottom.relu" in line
    assert (study / "other").exists()
    assert not (study / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_ends_with_128_and_the_signal(study, name):
    text = (study / "study.toml").read_text()
    long = '[[methods]]\nname = "rise"\nparameters = { samples = 100000000 }\n[run]'
    (study / "study.toml").write_text(text.replace("[run]", long))
    process = subprocess.Popen(
        [sys.executable, "-m", "esegeta", "run", str(study / "study.toml"), "--plain"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 120
    done = study / "out" / ".jobs"
    while time.monotonic() < until and not (done.exists() and len(list(done.glob("*.json"))) >= 1):
        time.sleep(0.2)
    process.send_signal(getattr(signal, name))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name), said
    assert "what is finished is kept" in said
    assert "Traceback" not in said
    assert list((study / "out").rglob("*statmap.nii.gz"))


def test_the_entry_point_is_installed_as_it_is_written():
    project = tomllib.loads((Path(esegeta.__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"esegeta": "esegeta.cli:main"}


def test_a_shape_that_the_model_does_not_take_is_one_line(capsys):
    assert cli.main(["places", "zoo:brain_extraction_unet", "--shape", "1,15,16,16"]) == 2
    said = capsys.readouterr().err
    assert "expected a shape that the model takes, got 1,15,16,16" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("size", "warned"), [(40, True), (56, False), (64, False)])
def test_the_demo_says_below_which_size_its_network_misses_the_brain(monkeypatch, capsys, size, warned):
    x = torch.nn.functional.interpolate(zoo.head().data[None].float(), size=(size,) * 3, mode="trilinear")[0]
    found = esegeta.from_module(zoo.brain_extraction_unet())(x / x.max())[0] > 0
    assert (found.float().mean() < 0.15) == warned  # a quarter of the whole volume is brain
    monkeypatch.setattr(cli, "_execute", lambda *_, **__: None)
    cli.demo(Path("out"), size, 2, False)
    assert ("misses most of the brain" in capsys.readouterr().out) == warned
