"""The package brings in its names when the first of them is used."""

import subprocess
import sys

import pytest


def fresh(script):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
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
def test_names_are_there_in_whatever_way_they_are_asked_for(script):
    fresh(script)


def test_a_name_that_is_not_there_is_an_attribute_error():
    script = "import esegeta\ntry:\n    esegeta.gradientt\nexcept AttributeError as error:\n    print(error)"
    assert fresh(script) == "module 'esegeta' has no attribute 'gradientt'"


def test_no_function_has_the_name_of_a_file():
    import pkgutil

    import esegeta

    files = {module.name for module in pkgutil.iter_modules(esegeta.__path__)}
    assert not [name for name in files & set(esegeta.__all__) if callable(getattr(esegeta, name))]
