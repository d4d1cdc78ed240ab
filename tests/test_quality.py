"""Style, types and the price of the import."""

import subprocess
import sys
from pathlib import Path

import pytest

import esegeta

ROOT = Path(esegeta.__file__).parent.parent
# Of the calls of Python functions that the import of torch makes. Seconds are those of the machine and of its load.
IMPORT_SHARE = 0.15
HEAVY = ("nibabel", "scipy.ndimage", "matplotlib", "captum", "hypothesis")


def python(*arguments, env=None):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "command", ["ruff check .", "ruff format --check .", pytest.param("mypy", marks=pytest.mark.slow)]
)
def test_a_tool_has_nothing_to_say(command):
    done = python("-m", *command.split())
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


IMPORTS = """
import sys

calls = 0

def count(frame, event, argument):
    global calls
    calls += event == "call"

sys.setprofile(count)
import torch
sys.setprofile(None)
theirs, calls, before = calls, 0, set(sys.modules)
sys.setprofile(count)
import esegeta
esegeta.gradient
sys.setprofile(None)
print(theirs, calls, *sorted(set(sys.modules) - before))
"""


def test_the_import_is_cheap_and_leaves_heavy_packages_alone():
    done = python("-c", IMPORTS)
    assert done.returncode == 0, done.stderr
    theirs, ours, *modules = done.stdout.split()
    assert "esegeta.methods.gradient" in modules
    assert [m for m in HEAVY if m in modules] == []
    assert int(ours) <= IMPORT_SHARE * int(theirs), f"{ours} calls, and {theirs} of torch"


def test_the_package_alone_imports_nothing():
    done = python("-c", "import sys, esegeta; print(esegeta.__version__, *sorted(sys.modules))")
    version, *modules = done.stdout.split()
    assert version == esegeta.__version__
    assert [m for m in modules if m.partition(".")[0] in ("torch", "numpy", "scipy", "jaxtyping")] == []
    assert [m for m in modules if m.startswith("esegeta.")] == []
