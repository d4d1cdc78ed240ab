"""Style, types and the price of the import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import esegeta

ROOT = Path(esegeta.__file__).parent.parent
IMPORT_SECONDS = 0.2
# Of what torch takes in the same process: a machine that is busy slows both.
IMPORT_SHARE = 0.15
HEAVY = ("nibabel", "scipy.ndimage", "matplotlib", "captum", "hypothesis")


def python(*arguments, env=None):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_a_tool_has_nothing_to_say(command):
    done = python("-m", *command.split())
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_the_import_is_cheap(tmp_path):
    # As it is where it was installed: compiled once, by the first of these processes.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    # Both in one interpreter, so that a busy machine slows both; the least of several, because load only adds.
    script = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); "
        "import esegeta; esegeta.gradient; c = time.perf_counter() - b; print(c, c / (b - a))"
    )
    seconds, shares = [], []
    for _ in range(8):
        done = python("-c", script, env=env)
        assert done.returncode == 0, done.stderr
        for values, value in zip((seconds, shares), done.stdout.split(), strict=True):
            values.append(float(value))
        if len(seconds) >= 3 and (min(seconds) <= IMPORT_SECONDS or min(shares) <= IMPORT_SHARE):
            break
    else:
        raise AssertionError(
            f"import esegeta takes {min(seconds):.2f} s beyond torch, {min(shares):.0%} of what torch takes"
        )


def test_the_import_leaves_heavy_packages_alone():
    before = python("-c", "import sys, torch; print(*sorted(sys.modules))").stdout.split()
    after = python(
        "-c", "import sys, torch, esegeta; esegeta.gradient; print(*sorted(sys.modules))"
    ).stdout.split()
    assert "esegeta.methods.gradient" in after
    assert [m for m in HEAVY if m in after and m not in before] == []


def test_the_package_alone_imports_nothing():
    done = python("-c", "import sys, esegeta; print(esegeta.__version__, *sorted(sys.modules))")
    version, *modules = done.stdout.split()
    assert version == esegeta.__version__
    assert [m for m in modules if m.partition(".")[0] in ("torch", "numpy", "scipy", "jaxtyping")] == []
    assert [m for m in modules if m.startswith("esegeta.")] == []
