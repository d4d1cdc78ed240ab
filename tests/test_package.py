"""The package brings in its names when the first of them is used."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from together import together

import esegeta

# What the package needs is imported once: that takes most of the time. Each script has a process of its own, which
# has imported nothing of the package.
FORKING = """
import contextlib, io, json, os, sys, traceback
import jaxtyping, numpy, scipy, torch

assert not any(name.partition(".")[0] == "esegeta" for name in sys.modules)
for line in sys.stdin:
    read, write = os.pipe()
    if not os.fork():
        said, code = io.StringIO(), 0
        try:
            with contextlib.redirect_stdout(said):
                exec(json.loads(line), {"__name__": "__main__"})
        except BaseException:
            said, code = io.StringIO(traceback.format_exc()), 1
        os.write(write, json.dumps([code, said.getvalue()]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        print(answer.read(), flush=True)
    os.wait()
"""


@pytest.fixture(scope="module")
def fresh():
    command = [sys.executable, "-W", "error", "-c", FORKING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(script):
            process.stdin.write(json.dumps(script) + "\n")
            process.stdin.flush()
            code, said = json.loads(process.stdout.readline())
            assert code == 0, said
            return said.strip()

        yield run


@pytest.mark.slow
@together(
    "script",
    [
        "import esegeta as eg; assert callable(eg.gradient)",
        "from esegeta import gradient, random, reducers",
        "from esegeta import *; assert callable(integrated_gradients) and callable(places)",
        "import esegeta as eg; assert set(eg.__all__) <= set(dir(eg)) and '__version__' in dir(eg)",
        "import pickle, esegeta as eg; assert pickle.loads(pickle.dumps(eg.smooth)) is eg.smooth",
        "import importlib, esegeta as eg; eg.gradient; importlib.reload(eg); eg.gradient",
        "import esegeta.methods.gradient as g; assert callable(g.gradient)",
        "import esegeta as eg; assert eg.zoo.small_unet",
        # Whoever has one name finds by name all that comes with the package.
        "from esegeta import at; assert callable(at('integrated_gradients', 'encoder'))",
        "import esegeta as eg; eg.forecast\nfrom esegeta import _registry as r\n"
        "known = lambda: [set(t) for t in (r.METHODS, r.TRANSFORMS, r.REDUCERS)]\nfirst = known()\n"
        "assert all(first) and all(hasattr(eg, name) for name in eg.__all__) and first == known()",
        "import esegeta as eg; eg.gradient; import sys; later = ('conformance', 'plot', 'radiomics', 'zoo')\n"
        "assert not {f'esegeta.{name}' for name in later} & set(sys.modules)",
        "import esegeta as eg; assert not hasattr(eg, '__wrapped__') and not hasattr(eg, 'gradientt')",
        "from esegeta.placing import tap; import esegeta as eg; assert callable(eg.places)",
        "from esegeta import places; assert callable(places)",
        # Files that import each other do not ask for everything.
        "from esegeta import random, spatial; import sys; assert 'esegeta.methods' not in sys.modules",
        "from threading import Thread as T\nimport esegeta as eg\nfound = []\n"
        "all = [T(target=lambda: found.append(eg.gradient)) for _ in range(8)]\n"
        "[t.start() for t in all]; [t.join() for t in all]; assert len(found) == 8 and len(set(found)) == 1",
    ],
)
def test_names_are_there_in_whatever_way_they_are_asked_for(fresh, script):
    fresh(script)


def test_a_name_that_is_not_there_is_an_attribute_error(fresh):
    script = "import esegeta\ntry:\n    esegeta.gradientt\nexcept AttributeError as error:\n    print(error)"
    assert fresh(script) == "module 'esegeta' has no attribute 'gradientt'"


def test_no_function_has_the_name_of_a_file():
    import pkgutil

    import esegeta

    files = {module.name for module in pkgutil.iter_modules(esegeta.__path__)}
    assert not [name for name in files & set(esegeta.__all__) if callable(getattr(esegeta, name))]


def test_what_is_declared_to_be_needed_is_imported():
    root = Path(esegeta.__file__).parent
    declared = tomllib.loads((root.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    sources = "\n".join(path.read_text() for path in root.rglob("*.py"))
    for name in (re.match(r"[\w-]+", line)[0] for line in declared):
        assert re.search(rf"^\s*(from|import) {name}\b", sources, re.MULTILINE), name
