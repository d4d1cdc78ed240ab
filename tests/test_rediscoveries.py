"""Violations that others have published, found by the search: it is told the method and the axiom, not the case."""

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import esegeta as eg
from esegeta.conformance import rebuilt, search, strategies
from esegeta.conformance.adapters import peers
from esegeta.conformance.adapters.batches import Probability, examples_apart
from esegeta.conformance.cases import Case
from esegeta.conformance.finding import of
from esegeta.conformance.functions import call
from esegeta.conformance.grammar import JOINS
from esegeta.conformance.laws.completeness import Completeness
from esegeta.conformance.networks import Network
from esegeta.conformance.subjects import Subject
from esegeta.conformance.verify import verify

pytest.importorskip("captum")

# The run-time type checks of these tests draw from Python's generator, in strategies too.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

slow = pytest.mark.slow


@pytest.fixture
def as_found(monkeypatch):
    """A counterexample is hardly made smaller, where nothing is said about its size: that takes most of the time."""
    monkeypatch.setattr(search, "SHRINKS", 5)


def verdict(method, axiom, cases=200, scores=None):
    report = verify(method, axioms=[axiom], cases=cases, scores=scores)
    print(f"\n{report}")
    return report[axiom]


def assert_found(found):
    assert found.kind == "violated", (
        f"{found.kind} on {found.cases} cases; {found.refused} refused: {found.why}"
    )
    assert found.counterexample.residual > found.counterexample.allowed
    return rebuilt(found.counterexample.code)


def assert_holds(found, least=50):
    assert found.kind == "holds", found
    assert found.cases >= least, f"only {found.cases} cases; {found.refused} refused: {found.why}"


# --- Methods ----------------------------------------------------------------------------------------------

FOUND = [
    # gradient x input, with the baseline that is not there: zero
    ("input_x_gradient", "shift", 200),
    ("captum:InputXGradient", "shift", 200),
    # min(1, x) beyond 1
    ("gradient", "sensitivity_a", 1000),
    ("captum:Saliency", "sensitivity_a", 1000),
    ("grad_cam", "completeness", 200),
    ("captum:LayerGradCam", "completeness", 200),
    # weights that sum to 1 - 1/n
    ("captum:IntegratedGradients(method='riemann_trapezoid')", "completeness", 200),
    ("captum:DeepLift", "completeness", 200),
    ("guided_backprop", "implementation_invariance", 400),
    ("lrp", "implementation_invariance", 400),
    pytest.param("deep_lift", "implementation_invariance", 2000, marks=slow),
    ("captum:DeepLift", "implementation_invariance", 400),
    # what rectifies backwards hardly sees the upper layers: more than half of the variance is there without them
    ("guided_backprop", "parameter_dependence", 400),
    pytest.param("deconvolution", "parameter_dependence", 400, marks=slow),
    ("captum:GuidedBackprop", "parameter_dependence", 400),
    pytest.param("captum:Deconvolution", "parameter_dependence", 400, marks=slow),
    # a rectifier in other words has no hook
    ("captum:GuidedBackprop", "implementation_invariance", 100),
    # slopes jump at kinks
    ("gradient", "continuity", 100),
    ("captum:Saliency", "continuity", 100),
]
FOUND_ELSEWHERE = [
    ("zennit:IntegratedGradients", "completeness", 200),
    ("zennit:EpsilonPlus", "implementation_invariance", 200),
    ("monai:GradCAM", "completeness", 200),
]
HOLDS = [
    pytest.param("integrated_gradients", "sensitivity_a", marks=slow),
    ("gradient", "implementation_invariance"),
    ("captum:IntegratedGradients", "completeness"),
    pytest.param("captum:IntegratedGradients", "implementation_invariance", marks=slow),
    pytest.param("captum:Saliency(abs=False)", "parameter_dependence", marks=slow),
]


@pytest.mark.usefixtures("as_found")
@pytest.mark.parametrize(("method", "axiom", "cases"), FOUND)
def test_found(method, axiom, cases):
    assert_found(verdict(method, axiom, cases))


@pytest.mark.peers
@pytest.mark.parametrize(("method", "axiom", "cases"), FOUND_ELSEWHERE)
def test_found_elsewhere(method, axiom, cases):
    pytest.importorskip(method.partition(":")[0])
    assert_found(verdict(method, axiom, cases))


@pytest.mark.parametrize(("method", "axiom"), HOLDS)
def test_the_same_search_finds_nothing_where_there_is_nothing(method, axiom):
    assert_holds(verdict(method, axiom, cases=80), least=30)


def test_captums_trapezoid_is_incomplete_where_nothing_is_simpler():
    """The smallest case is one element and a straight line, and one in n is missing there."""
    found = verdict("captum:IntegratedGradients(method='riemann_trapezoid', n_steps=10)", "completeness")
    assert_found(found)
    assert "Linear((1,))" in found.counterexample.code
    assert found.counterexample.residual == pytest.approx(0.1, rel=1e-6)


# --- Which networks it is ---------------------------------------------------------------------------------


def of_modules(shape, where=None):
    """Networks of modules of which captum says that it knows them."""
    known = ("conv", "relu", "max pool", "average pool")
    heads = ("sum", "mean", "linear")
    return strategies.networks(shape=shape, operators=known, joins=(), heads=heads, layers=5, where=where)


def relu_meets_pool(net: Network) -> bool:
    return any(pair == ("relu", "max pool") for pair in zip(net.operators, net.operators[1:], strict=False))


@slow
def test_captums_deep_lift_is_incomplete_where_a_relu_meets_a_max_pool():
    once = lambda net: net.operators.count("relu") < 2  # a second relu is another fault of it
    anywhere = lambda shape: of_modules(shape, once)
    found = assert_found(verdict("captum:DeepLift", "completeness", 400, anywhere))
    assert relu_meets_pool(found.case.score)

    # Not where there is only one such layer, and ours is not.
    kinks = lambda net: sum(o in ("relu", "max pool") for o in net.operators)
    apart = lambda shape: of_modules(shape, lambda net: kinks(net) < 2)
    assert_holds(verdict("captum:DeepLift", "completeness", 80, apart))
    assert_holds(verdict("deep_lift", "completeness", 80, of_modules))


@slow
def test_captums_deep_lift_lets_examples_change_each_other_where_there_is_a_softmax():
    found = examples_apart("captum:DeepLift")
    print(f"\n{found}")
    assert found.kind == "violated"
    assert any(word in found.counterexample.code for word in ("Probability", "softmax"))
    assert_holds(examples_apart("captum:IntegratedGradients"))


def conductance_inside() -> Subject:
    """Conductance at the convolution with the smallest output. The score is not split there, only watched."""

    def build(score):
        def explain(x: Tensor, baseline: Tensor) -> Tensor:
            _, where = peers.place("conductance", score.module, "deepest", x[None])
            return eg.conductance(score, where, steps=32)(x, baseline)

        return explain

    return Subject("conductance inside", build, ("baseline",), nodes=32, wants="module")


@slow
@pytest.mark.usefixtures("as_found")
@pytest.mark.parametrize(
    "subject",
    [conductance_inside, lambda: of("captum:LayerConductance(method='riemann_trapezoid')")],
    ids=["ours", "captum"],
)
def test_conductance_is_incomplete_beside_a_skip(subject):
    nets = lambda shape: strategies.networks(shape=shape, max_degree=1)
    chains = lambda shape: strategies.networks(shape=shape, max_degree=1, joins=())
    found = assert_found(verdict(subject(), "completeness", 200, nets))
    assert set(found.case.score.operators) & set(JOINS)
    assert_holds(verdict(subject(), "completeness", 80, chains), least=20)


# --- Reducers ---------------------------------------------------------------------------------------------


def count_by_quotients(model, at):
    """How a published wrapper counts the voxels above a threshold: each adds itself divided by itself."""

    def score(x: Tensor) -> Tensor:
        z = torch.nn.functional.softplus(model(x)[1])
        return (z / z * (z > 0.7)).sum()

    return score


WAYS = {
    "class sum": lambda model, at: eg.reducers.class_sum(model, 1),
    "predicted class sum": lambda model, at: eg.reducers.predicted_class_sum(model, 1, at=at),
    "soft count": lambda model, at: eg.reducers.soft_count(model, 1),
    "count": count_by_quotients,
}


@dataclasses.dataclass(frozen=True, repr=False)
class Segmented:
    """What a reducer makes of a segmentation network, at an image where a mask is frozen."""

    shape: tuple[int, ...]
    layers: tuple[Any, ...]
    seed: int
    way: str
    at: Any

    inner: ClassVar[Any]
    score: ClassVar[Any]
    degree: ClassVar[None] = None
    piecewise_linear: ClassVar[bool] = False
    smooth: ClassVar[bool] = True

    def __repr__(self) -> str:
        return call(self)

    def __call__(self, x: Tensor) -> Tensor:
        return self.score(x)

    def __post_init__(self) -> None:
        # Made here, because what initialises a layer cannot be mapped over.
        inner = Network(self.shape, (*self.layers, "pointwise conv"), seed=self.seed)
        model = eg.from_module(nn.Sequential(*list(inner.module)[:-1]))
        object.__setattr__(self, "inner", inner)
        object.__setattr__(
            self, "score", WAYS[self.way](model, torch.as_tensor(self.at, dtype=torch.float64))
        )

    @property
    def operations(self) -> int:
        return 2 * self.inner.operations

    def majorant(self, x: Tensor) -> Tensor:
        return self.inner.majorant(x)


def segmented(way: str) -> Any:
    """Smooth networks with two classes, one reducer, and its mask at some image."""

    def made(net: Network, at: Any) -> Segmented | None:
        try:
            return Segmented(net.shape, net.layers, net.seed, way, at)
        except ValueError:
            return None  # the class is predicted nowhere

    def scores(shape: tuple[int, ...]) -> Any:
        smooth = ("conv", "softplus", "tanh")
        net = strategies.networks(shape=shape, operators=smooth, joins=(), heads=("sum",), layers=2)
        return st.builds(made, net, strategies.images(shape)).filter(bool)

    return scores


# Up to what its quadrature leaves where a score bends.
LOOSE = dataclasses.replace(of("captum:IntegratedGradients"), nodes=None, accuracy=1e-2)


@pytest.mark.parametrize("way", [pytest.param(w, marks=slow if w == "count" else ()) for w in WAYS])
def test_a_count_has_a_gradient_that_is_zero_wherever_it_changes(way):
    """Integrated gradients explain nothing of it. Of the other reducers they explain all, up to their quadrature."""
    found = verdict(LOOSE, "completeness", 40, segmented(way))
    if way != "count":
        assert_holds(found, least=30)
        return
    assert found.kind == "violated"
    case = rebuilt_here(found.counterexample.code).case
    attribution = LOOSE.build(case.score)(case.x, case.baseline)
    assert torch.equal(attribution, torch.zeros_like(case.x))
    left = abs(float(case.score(case.x) - case.score(case.baseline)))
    assert found.counterexample.residual == left >= 1


def rebuilt_here(code):
    """A situation with a score of this file."""
    return eval(code, {"Completeness": Completeness, "Case": Case, "Segmented": Segmented})


def test_the_library_itself_refuses_a_count():
    """Where others give zeros, it says that there is no gradient."""
    found = verdict("integrated_gradients", "completeness", 15, segmented("count"))
    assert found.kind in ("undecided", "not applicable")
    assert found.refused > 0
    assert "gradient is zero" in found.why
    score = eg.reducers.predicted_count(lambda x: x, 1)
    with pytest.raises(ValueError, match="gradient"):
        eg.integrated_gradients(score, steps=4)(torch.ones(1, 4), -torch.ones(1, 4))


def test_a_probability_by_modules_is_the_probability():
    net = Network((1, 4), ("conv", "relu"), seed=3)
    x = eg.random.normal(0, (1, 4), dtype=torch.float64)
    found = Probability(net)
    assert torch.allclose(found.module(x[None])[0], found(x))
    assert torch.allclose(found(x), torch.sigmoid(net(x)))
