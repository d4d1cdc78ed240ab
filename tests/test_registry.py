"""What is found by name: every kind's examples run, and others register by the same decorators."""

import importlib
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta import _registry, dreams
from esegeta._facts import Facts, carry, declare, declared, facts_of, unchecked
from esegeta._registry import METHODS, METRICS, REGISTRIES, Cost, MetricSpec, Registry, Spec
from esegeta.conformance.kinds import of_reducer, of_transforms
from esegeta.conformance.subjects import of_method
from esegeta.run.config import catalogue, listing, plugins, trust
from esegeta.run.config.faults import Collector
from esegeta.run.volumes import preprocess
from esegeta.run.volumes.reading import Volume
from esegeta.zoo.drawn import drawn

# Examples are for an image (1, 4, 6).
X = torch.linspace(-1, 2, 24).reshape(1, 4, 6)
WAVES = (23 * X).sin()  # which has more to tell than its blurred copy
# Smooth, so that second derivatives are not zero, and with an activation that rules rewrite.
NET = drawn(lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Softplus(), nn.Conv2d(3, 2, 1)), key=0)
# Piecewise linear, for rules and for reducers that look for objects.
UNET = eg.from_module(eg.zoo.small_unet(2))
SHARP = eg.reducers.class_sum(UNET, 1)
SCORE = eg.reducers.class_sum(eg.from_module(NET), 1)
NORMED = eg.reducers.class_sum(eg.from_module(nn.Sequential(nn.InstanceNorm2d(1), NET)), 1)
REFS = {"baseline": torch.zeros_like(X), "baselines": torch.stack([torch.zeros_like(X), X.flip(-1)])}


def a_method(spec):
    key = {"key": 7} if spec.key else {}
    a = of_method(spec, fast=True).build(SCORE)(X, *[REFS[kind] for kind in spec.refs], **key)
    return a if spec.shape == "input" else a[0] + 0 * X  # a map of the copy of x


def a_transform(spec):
    member = of_transforms(spec).members[0]
    key = {"key": 7} if member.key else {}
    return member.build(SCORE)(X, *[REFS[kind] for kind in member.refs], **key).expand_as(X)


def a_combination(spec):
    if spec.name == "fuse":
        return spec.fn([eg.grad_cam(SCORE, "0"), eg.grad_cam(SCORE, "1")], **spec.example)(X)
    model_of, weights = eg.models.parametrised(NET)
    build = lambda p: eg.gradient(eg.reducers.class_sum(model_of(p), 1))
    return spec.fn(build, weights, **spec.example)(X, key=7)


def a_reducer(spec):
    models = {"vector": lambda x: x.mean((1, 2)).repeat(3), "otsu_sum": lambda x: UNET(x)[:1]}
    return of_reducer(spec).build(models.get(spec.output, models.get(spec.name, UNET)), X)(X) + 0 * X


def a_step(spec):
    box = Volume(torch.arange(24.0).reshape(1, 2, 3, 4), torch.eye(4).numpy(), (1.0, 1.0, 1.0))
    return preprocess.apply(box, [spec.fn(**spec.example)]).data.flatten()[0] + 0 * X


def a_metric(spec):
    """The number of a map of x, of a network, or of two classes; like x by broadcasting."""
    explain, settings = eg.gradient(SCORE), dict(spec.example)
    if spec.name == "random_logit":
        explain = lambda label: eg.gradient(eg.reducers.class_sum(eg.from_module(NET), label))
    if "network" in spec.needs:
        explain = lambda model: eg.gradient(eg.reducers.class_sum(model, 1))
    rest = (
        [NET]
        if "network" in spec.needs
        else [lambda x: 0.5 + 0.01 * SCORE(x)]
        if "score" in spec.needs
        else []
    )
    called = {"mask": X[0] > 0} if "mask" in spec.needs else {}
    found = spec.fn(explain, *rest, **settings)(WAVES, key=7, **called)
    assert hasattr(found, "area") == (spec.answer == "curve")
    return getattr(found, "area", found) + 0 * X


def an_objective(spec):
    model = [eg.from_module(NET)] if "model" in spec.parameters else []
    several = spec.name in ("diversity", "alignment")
    return spec.fn(*model, **spec.example)(torch.stack([X, 2 * X]) if several else X) + 0 * X


def a_parametrisation(spec):
    ways = spec.fn(**spec.example)
    inside = 0.5 + 0.1 * X  # of bounds
    return ways.decode(ways.encode(inside))


def a_dream(**parts):
    return dreams.ascend(SCORE, X, steps=2, **parts)().image


def an_uncertainty(spec):
    """A draw, a changed image, a number of a map, or what a calibration gives."""
    p, mask = X.sigmoid(), X[0] > 0
    pairs = [(p, mask if "mask" in spec.name or "learn" in spec.name else mask.long())] * 99
    given = {
        "dropout": [nn.Sequential(NET, nn.Dropout(0.5)).eval()],
        "augmented": [UNET],
        "temperature": [X, mask],
        "control_risk": [torch.zeros(99, 2), torch.arange(2.0)],
    }
    if spec.family in ("draws", "changes"):
        found = spec.fn(*given.get(spec.name, []), **spec.example)
        return (found(X, key=7)[:1] if spec.family == "draws" else found(X, 7)[0]) + 0 * X
    usual = {
        "aggregations": [p[0], mask][: 1 + ("mask" in inspect.signature(spec.fn).parameters)],
        "conformal": [pairs],
    }
    found = spec.fn(*given.get(spec.name, usual.get(spec.family, [p[0], mask])), **spec.example)
    number = found[0] if isinstance(found, tuple) else found
    return torch.as_tensor(number).nan_to_num().float().mean() + 0 * X


def a_rewrite(spec):
    given = {"at": X} if "at" in inspect.signature(spec.fn).parameters else {}
    return eg.gradient(spec.fn(NORMED if given else SHARP, **given, **spec.example))(X)


def a_network(spec):
    """What it says of an image with the channels and axes of its first convolution."""
    net = spec.fn(**spec.example)
    first = next(m for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd))
    size = 64 if spec.family == "trained" else 8
    return net(torch.zeros(1, first.in_channels, *[size] * len(first.kernel_size)))[0].sum().detach() + 0 * X


# How an example of each kind is run; all return something like x.
RUNS = {
    "method": a_method,
    "transform": a_transform,
    "combination": a_combination,
    "reducer": a_reducer,
    "rewrite": a_rewrite,
    "composite": lambda spec: eg.lrp(SCORE, composite=spec.fn(**spec.example))(X),
    "baseline": lambda spec: spec.fn(X, **spec.example),
    "features": lambda spec: eg.feature_ablation(SCORE, features=spec.fn(**spec.example))(X, 0 * X),
    "segmentation": lambda spec: spec.fn(X, **spec.example).expand_as(X),
    "fill": lambda spec: catalogue._maker(spec).make(**spec.example)(X, 0 * X, (X > 0).float()),
    "noise": lambda spec: spec.fn(**spec.example)(X, 7),
    "mask": lambda spec: (lambda m: m.mask(torch.ones(m.grid)))(spec.fn(**spec.example)(X)).expand_as(X),
    "network": a_network,
    "step": a_step,
    "metric": a_metric,
    "perturbation": lambda spec: spec.fn(**spec.example)(X, 0 * X, torch.tensor(7)),
    "similarity": lambda spec: spec.fn(X, 2 * X, **spec.example) + 0 * X,
    "null": lambda spec: spec.fn(X, 7, **spec.example),
    "objective": an_objective,
    "parametrisation": a_parametrisation,
    "regulariser": lambda spec: a_dream(penalties=[(1e-3, spec.fn(**spec.example))]),
    "distortion": lambda spec: spec.fn(**spec.example)(X, 7)[:, :4, :6],
    "optimiser": lambda spec: a_dream(optimiser=spec.fn(**spec.example)),
    "uncertainty": an_uncertainty,
    "recipe": lambda spec: spec.fn(SCORE, X, **spec.example)(key=7).image,
}
SPECS = [(table.kind, spec) for table in REGISTRIES for spec in table.values() if spec.origin == "esegeta"]


@pytest.fixture
def as_before():
    """What a test registers is gone afterwards."""
    before = [dict(table) for table in REGISTRIES]
    yield
    for table, known in zip(REGISTRIES, before, strict=True):
        table.clear()
        table.update(known)


@pytest.mark.parametrize(("kind", "spec"), SPECS, ids=[f"{kind}-{spec.name}" for kind, spec in SPECS])
def test_an_example_runs(kind, spec):
    made = RUNS[kind](spec)
    assert made.shape == X.shape
    assert made.isfinite().all()


@pytest.mark.parametrize("table", REGISTRIES, ids=lambda table: table.kind)
def test_what_is_declared_is_true(table):
    for name, spec in table.items():
        known = inspect.signature(spec.fn).parameters
        assert spec.name == name
        assert set(spec.example) <= set(known), name
        assert spec.family or table.kind == "reducer", name
        if spec.costs is not None:
            needed = {n: 3 for n, p in known.items() if p.default is p.empty}
            assert isinstance(spec.cost(**{**needed, "baselines": 2, "explains": [1, 2]}), Cost), name


def test_names_are_found_and_taken_once():
    assert METHODS.find("ig") is METHODS["integrated_gradients"]
    with pytest.raises(
        ValueError, match=r"find_method: expected the name of a method, got 'gradeint'. Nearest: gra"
    ):
        METHODS.find("gradeint")
    with pytest.raises(
        ValueError, match=r"esegeta registry: expected a new name, got 'gradient', already defined"
    ):
        METHODS.add(METHODS["gradient"])


@pytest.mark.parametrize(
    ("name", "settings", "cost"),
    [
        ("gradient", {}, Cost(gradients=1)),
        ("integrated_gradients", {"steps": 5}, Cost(gradients=5)),
        ("deep_lift_shap", {"baselines": 4}, Cost(gradients=4)),
        ("kernel_shap", {}, Cost(forwards=2048)),
        ("occlusion", {}, Cost(forwards=None)),
        ("eigen_cam", {}, Cost(forwards=1)),
    ],
)
def test_a_cost_follows_from_the_arguments(name, settings, cost):
    assert METHODS[name].cost(**settings) == cost


def test_the_declared_cost_is_what_is_run():
    for name in ("gradient", "integrated_gradients", "expected_gradients", "kernel_shap", "lime"):
        spec, seen = METHODS[name], []

        def score(x, seen=seen):
            seen.append(1)
            return (x**2).sum()

        settings = {n: 16 for n in ("steps", "samples") if n in spec.parameters}
        if "features" in spec.parameters:
            settings["features"] = eg.features.grid(2)
        key = {"key": 7} if spec.key else {}
        with eg.execution(chunk=1):
            spec.fn(score, **settings)(X, *[REFS[kind] for kind in spec.refs], **key)
        cost = spec.cost(**settings)
        # The score is also asked for once or twice at the ends: at x, and at the baseline.
        assert cost.gradients or cost.forwards in range(len(seen) - 3, len(seen) + 1), name
        assert (cost.gradients or cost.forwards) <= len(seen), name


def test_a_metric_says_what_it_needs(as_before):
    @_registry.metric(
        family="faithfulness",
        better="lower",
        needs=("score", "explain"),
        paper="this test",
        example={"samples": 4},
        answer="sampled",
        cost=lambda samples: Cost(forwards=samples, explanations=samples),
    )
    def flatness(explain, score, *, samples=8): ...

    spec = METRICS.find("flatness")
    assert isinstance(spec, MetricSpec)
    assert list(spec.parameters) == ["samples"]
    assert (spec.better, spec.answer, spec.needs, spec.family, dict(spec.example)) == (
        "lower",
        "sampled",
        ("score", "explain"),
        "faithfulness",
        {"samples": 4},
    )
    assert spec.cost(samples=2) == Cost(forwards=2, explanations=2)
    assert spec.cost().explanations == 8
    with pytest.raises(ValueError, match="metric: expected better"):
        _registry.metric(family="", better="more", paper="")
    with pytest.raises(ValueError, match="metric: expected answer"):
        _registry.metric(family="", better="lower", answer="many", paper="")
    with pytest.raises(ValueError, match="metric: expected needs"):
        _registry.metric(family="", better="lower", needs=("truth",), paper="")


def test_a_feature_of_ones_own_can_be_named_in_a_configuration(as_before):
    assert "halves" not in catalogue.family("features")

    @_registry.features(family="blocks")
    def halves(*, turned: bool = False):
        return eg.features.grid(3 if turned else 2)

    maker = catalogue.family("features")["halves"]
    assert list(maker.parameters) == ["turned"]
    assert maker.make(turned=True)(X).count == 4


PLUGIN = """
import esegeta as eg


@eg.method(refs=("baseline",), family="of others", paper="a package", example={})
def halved_difference(score):
    return lambda x, baseline: (x - baseline) / 2


@eg.reducer(output="map")
def half_of_all(model):
    return lambda x: model(x).sum() / 2
"""


@pytest.fixture
def package(tmp_path, monkeypatch, as_before):
    """An installed package with an entry point of the group."""
    (tmp_path / "explaining_package.py").write_text(PLUGIN)
    about = tmp_path / "explaining_package-2.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: explaining-package\nVersion: 2.0\n")
    (about / "entry_points.txt").write_text("[esegeta.plugins]\nexplaining = explaining_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("explaining_package", None)


def test_an_installed_package_registers_when_it_is_trusted(package):
    plugins.load([], trust.asked("", []))
    assert "halved_difference" not in METHODS
    assert "explaining_package" not in sys.modules
    plugins.load([], trust.asked("", ["explaining_package"]))
    assert METHODS["halved_difference"].origin == "explaining_package"
    assert sorted(plugins.registered("explaining_package")) == ["half_of_all", "halved_difference"]
    rows = next(rows for title, _, rows in listing.tables() if title == "METHODS")
    assert [row[1] for row in rows if row[0] == "halved_difference"] == ["explaining_package"]
    assert "\n  origin: explaining_package\n" in listing.entry("halved_difference")


def test_a_trusted_package_that_does_not_import_says_so(package, tmp_path):
    (tmp_path / "explaining_package.py").write_text("raise RuntimeError('broken')\n")
    with pytest.raises(ValueError, match="plugins of trusted packages to import, got RuntimeError: broken"):
        plugins.load([], trust.asked("", ["explaining_package"]))
    faults = Collector()
    plugins.check_plugins([], tmp_path, trust.asked("", ["explaining_package"]), faults)
    (fault,) = faults.lines
    assert "RuntimeError: broken" in fault


def test_facts_are_carried_and_frozen():
    score = declare(lambda x: x.sum(), differentiable=False, module="net")
    twice = carry(lambda x: 2 * score(x), score, rewritten=True)
    assert declared(twice) == Facts(differentiable=False, rewritten=True, module="net")
    with pytest.raises(AttributeError):
        declared(twice).rewritten = False
    checked = carry(lambda x: score(x), score, unchecked=score)
    assert unchecked(checked) is score
    assert unchecked(score) is score
    assert declared(carry(lambda x: x, checked)).unchecked is None
    loose = SimpleNamespace(differentiable=False, takes_key=True, refs=("baseline",))
    assert facts_of(loose) == Facts(key=True, refs=("baseline",), differentiable=False)


def test_a_registry_of_ones_own():
    table = Registry("colour", Spec, asked_by=("colour",))

    @table.register(family="warm", called="red")
    def red_(depth=1): ...

    assert (list(table), table.find("red").fn) == (["red"], red_)
