"""Anything for any argument: it works, or it is refused in words that name what was expected."""

import inspect
import re
import warnings

import jaxtyping
import numpy as np
import pytest
import torch

import esegeta as eg
from esegeta import baselines, features, masks, noise, spatial
from esegeta._registry import METHODS, REDUCERS, STEPS, TRANSFORMS
from esegeta.conformance.subjects import built
from esegeta.run.volumes import preprocess
from esegeta.run.volumes.reading import Volume

JUNK = (
    *(None, "a", b"a", -1, 0, 10**30, 2.5, float("nan"), True, [], ["a"], [[1, 2]], (), {}, object()),
    *(
        np.ones(2),
        np.float32(0.5),
        np.int64(2),
        torch.ones(()),
        torch.full((2,), float("nan")),
        torch.zeros(0),
    ),
    *(torch.tensor(-1), torch.ones(1, 2, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)),
    *(torch.ones(1, 2, dtype=torch.complex64), torch.ones(1, 2).half(), torch.ones(1, 1, 2, 2)),
)
OURS = re.compile(r"(?s)^.{1,80}?: expected .*, got .*\.$")
X = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
GIVEN = {
    **{"x": X, "like": X, "z": X, "mask": X[0] > 1, "hidden": X[0] > 1, "keep": X[0] > 1, "key": 1, "n": 2},
    **{
        "size": 1,
        "count": 2,
        "sigma": 1.0,
        "fraction": 0.1,
        "noise": 0.1,
        "value": 0.5,
        "width": 1,
        "map": X,
    },
    **{
        "labels": torch.tensor([[0, 1], [0, 1]]),
        "others": torch.zeros(3, 1, 2, 2),
        "features": features.grid(1),
    },
    **{"axis": 0, "index": 0, "to": "RAS", "spacing": 1.0, "shape": 4, "box": [[0, 2]] * 3, "multiple": 2},
}


@pytest.fixture(autouse=True)
def our_own_messages():
    """The run-time type checks of the tests would refuse wrong types before the library can."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    jaxtyping.config.update("jaxtyping_disable", before)


def square(z):
    return (z**2).sum()


def tried(call, what):
    """Every junk goes through, or raises an error of ours."""
    refused = 0
    for junk in JUNK:
        try:
            call(junk)
        except (TypeError, ValueError) as error:
            text = f"{what} = {type(junk).__name__}: {type(error).__name__}: {error}"
            if not OURS.match(str(error)):
                pytest.fail(text)
            refused += 1
        except Exception as error:
            pytest.fail(f"{what} = {type(junk).__name__} {junk!r:.60}: {type(error).__name__}: {error}")
    assert refused, f"{what}: nothing is refused"


def static(fn, skip):
    return list(inspect.signature(fn).parameters)[skip:]


def references(refs):
    return [{"baseline": 0 * X, "baselines": torch.zeros(3, 1, 2, 2)}[kind] for kind in refs]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    spec = METHODS[name]
    few = {k: min(v, 6) if type(v) is int else v for k, v in spec.example.items()}
    refs, extra = references(spec.refs), {"key": 7} if spec.key else {}
    explain = built(spec, few)(square)
    tried(lambda junk: explain(junk, *refs, **extra), "x")
    for i, kind in enumerate(spec.refs):
        tried(
            lambda junk, i=i: explain(X, *[junk if k == i else r for k, r in enumerate(refs)], **extra), kind
        )
    if spec.needs != "activation":
        tried(lambda junk: built(spec, few)(lambda z: junk)(X, *refs, **extra), "what a score returns")
    if spec.place:
        score = lambda z: (eg.mark(z + 0 * torch.relu(z), "copy") ** 2).sum()
        tried(lambda junk: spec.fn(score, junk, **few)(X, *refs, **extra), "place")
    for p in static(spec.fn, 1 + spec.place):
        if p != "steps":  # so many steps that they take for ever are no error
            tried(lambda junk, p=p: built(spec, {**few, p: junk})(square)(X, *refs, **extra), p)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    spec = TRANSFORMS[name]
    plain = spec.refs(()) is not None
    explain = eg.gradient(square) if plain else eg.integrated_gradients(square, steps=2)
    refs, extra = references(spec.refs(() if plain else ("baseline",))), {"key": 7} if spec.key else {}
    tried(lambda junk: spec.fn(explain, **spec.example)(junk, *refs, **extra), "x")
    tried(lambda junk: spec.fn(junk, **spec.example), "explain")
    for p in static(spec.fn, 1):
        tried(lambda junk, p=p: spec.fn(explain, **{**spec.example, p: junk})(X, *refs, **extra), p)


@pytest.mark.parametrize("name", REDUCERS)
def test_reducers(name):
    spec, image = REDUCERS[name], torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    two = lambda x: torch.cat([x, -x])
    model = {"vector": lambda x: two(x).mean((1, 2))}.get(
        spec.output, (lambda x: x) if name == "otsu_sum" else two
    )
    given = {**spec.example, **({"at": image} if spec.mask else {})}
    tried(lambda junk: spec.fn(lambda x: junk, **given)(image), "what a model returns")
    for p in static(spec.fn, 1):
        if p == "at":  # the model of a user meets it first
            continue
        rest = {k: v for k, v in given.items() if p != "dynamic" or k != "at"}
        tried(lambda junk, p=p, rest=rest: spec.fn(model, **{**rest, p: junk})(image), p)


FUNCTIONS = {
    f"{module.__name__}.{name}": fn
    for module in (baselines, features, masks, noise, spatial)
    for name, fn in vars(module).items()
    if inspect.isfunction(fn) and not name.startswith("_") and fn.__module__ == module.__name__
    if all(p.name in GIVEN for p in inspect.signature(fn).parameters.values() if p.default is p.empty)
}


def test_functions_are_found():
    assert len(FUNCTIONS) > 30


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_images(name):
    fn = FUNCTIONS[name]
    given = {p: GIVEN[p] for p, v in inspect.signature(fn).parameters.items() if v.default is v.empty}

    def call(**settings):
        made = fn(**settings)
        if callable(made):
            arguments = {"noise": (X, 1), "fill": (X, 0 * X, X[:1] > 1)}
            made(*arguments.get("noise" if ".noise" in name else made.__name__, (X,)))

    for p in inspect.signature(fn).parameters:
        tried(lambda junk, p=p: call(**{**given, p: junk}), p)


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_preprocessing(name):
    volume = Volume(torch.rand(1, 4, 4, 4), np.eye(4), (1.0, 1.0, 1.0))
    parameters = inspect.signature(STEPS[name].fn).parameters
    given = {p: GIVEN[p] for p, v in parameters.items() if v.default is v.empty}
    for p in parameters:
        tried(lambda junk, p=p: preprocess.apply(volume, [{"step": name, **given, p: junk}]), p)
    tried(lambda junk: preprocess.apply(volume, [{"step": junk}]), "step")
    tried(lambda junk: preprocess.apply(volume, [junk]), "a step")


def test_steps_and_their_parameters_have_nearest_names():
    for table, advice in [
        ({"step": "nromalise"}, "Nearest: normalise"),
        ({"step": "reorientate", "to": "RAS"}, "Nearest: reorient"),
        ({"step": "pad", "multipel": 8}, "Nearest: multiple"),
        ({"step": "resample", "spacing": 1, "how": "linaer"}, "Nearest: linear"),
        ({"name": "pad"}, 'Write step = "name"'),
    ]:
        (line,) = preprocess.problems([table])
        assert advice in line
