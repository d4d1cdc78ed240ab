"""Violations that others have published, found by the search: it is told the method and the axiom, not the case."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import esegeta as eg
from esegeta.conformance import search, strategies
from esegeta.conformance.adapters import peers
from esegeta.conformance.adapters.batches import Probability, examples_apart
from esegeta.conformance.cases import Case
from esegeta.conformance.functions import call
from esegeta.conformance.laws import Completeness, ParameterDependence
from esegeta.conformance.networks import Network
from esegeta.conformance.operators import JOINS
from esegeta.conformance.subjects import Subject, of
from esegeta.conformance.verify import verify

pytest.importorskip("captum")

# The run-time type checks of these tests draw from Python's generator, in strategies too.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

SECONDS = 600  # a minute on two quiet cores is enough; a busy machine must not change the verdict


def verdict(method, axiom, cases=200):
    report = verify(method, axioms=[axiom], cases=cases, seconds=SECONDS)
    print(f"\n{report}")
    return report[axiom]


def assert_found(found):
    assert found.kind == "violated", (
        f"{found.kind} on {found.cases} cases; {found.refused} refused: {found.why}"
    )
    assert found.counterexample.residual > found.counterexample.allowed


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
    ("guided_backprop", "implementation_invariance", 200),
    ("lrp", "implementation_invariance", 200),
]
FOUND_SLOWLY = [
    ("deep_lift", "implementation_invariance", 1000),
    ("captum:DeepLift", "implementation_invariance", 1000),
]
FOUND_ELSEWHERE = [
    ("zennit:IntegratedGradients", "completeness", 200),
    ("zennit:EpsilonPlus", "implementation_invariance", 200),
    ("monai:GradCAM", "completeness", 200),
]
HOLDS = [
    ("integrated_gradients", "sensitivity_a"),
    ("gradient", "implementation_invariance"),
    ("captum:IntegratedGradients", "completeness"),
    ("captum:IntegratedGradients", "implementation_invariance"),
]


@pytest.mark.parametrize(("method", "axiom", "cases"), FOUND)
def test_found(method, axiom, cases):
    assert_found(verdict(method, axiom, cases))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "axiom", "cases"), FOUND_SLOWLY)
def test_found_among_many(method, axiom, cases):
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


def searched(subject: Subject, nets: Callable[..., Any], cases=80):
    """The smallest network of a kind on which a subject is not complete."""
    drawn = (
        strategies.shapes()
        .flatmap(lambda shape: strategies.cases(nets(shape), shape=shape))
        .map(Completeness)
    )
    until = time.monotonic() + SECONDS
    found = search.smallest(drawn, lambda law: law.measure(subject), search.Search(cases, until))
    print(f"\n{subject}: {found}")
    return found


def of_modules(shape, where=None):
    """Networks of modules of which captum says that it knows them."""
    known = ("conv", "relu", "max pool", "average pool")
    heads = ("sum", "mean", "linear")
    return strategies.networks(shape=shape, operators=known, joins=(), heads=heads, layers=5, where=where)


def relu_meets_pool(net: Network) -> bool:
    return any(pair == ("relu", "max pool") for pair in zip(net.operators, net.operators[1:], strict=False))


def test_captums_deep_lift_is_incomplete_where_a_relu_meets_a_max_pool():
    subject = of("captum:DeepLift")
    found = searched(subject, of_modules)
    assert found.failed is not None
    assert relu_meets_pool(found.failed[0].case.score)

    # Nowhere else among these networks, and ours is not.
    apart = lambda shape: of_modules(
        shape, lambda net: not relu_meets_pool(net) and net.operators.count("relu") < 2
    )
    found = searched(subject, apart)
    assert found.failed is None
    assert found.cases >= 20
    found = searched(of("deep_lift"), of_modules)
    assert found.failed is None
    assert found.cases >= 20


def test_captums_deep_lift_lets_examples_change_each_other_where_there_is_a_softmax():
    found = examples_apart("captum:DeepLift", seconds=SECONDS)
    print(f"\n{found}")
    assert_found(found)
    assert any(word in found.counterexample.code for word in ("Probability", "softmax"))
    assert_holds(examples_apart("captum:IntegratedGradients", seconds=SECONDS))


def deep_chains(shape: tuple[int, ...]) -> Any:
    """Convolutions and rectifiers, up to eight, and an image of ones and minus ones, large enough to correlate."""
    shape = (shape[0], *{1: (16,), 2: (5, 5), 3: (3, 3, 3)}[len(shape) - 1])
    net = strategies.networks(
        shape=shape,
        operators=("conv", "pointwise conv", "relu"),
        joins=(),
        layers=8,
        where=lambda net: net.has_upper,
    )

    def law(drawn):
        net, key = drawn
        x = eg.random.normal(key, shape, dtype=torch.float64).sign()
        zero = torch.zeros_like(x)
        return ParameterDependence(Case(net, x, zero, torch.stack([zero, zero])), tuple(range(1, 9)))

    return st.tuples(net, st.integers(0, 9)).map(law)


@pytest.mark.parametrize(
    "method", ["captum:GuidedBackprop", "captum:Deconvolution", "guided_backprop", "deconvolution"]
)
def test_what_rectifies_backwards_hardly_sees_the_upper_layers(method):
    subject = of(method)
    found = search.smallest(
        strategies.shapes().flatmap(deep_chains),
        lambda law: law.measure(subject),
        search.Search(200, time.monotonic() + SECONDS),
    )
    print(f"\n{method}: {found}")
    assert found.failed is not None
    assert found.failed[1] > 0.5  # more than half of the variance is there without the upper layers


def test_the_gradient_sees_the_upper_layers():
    subject = of("captum:Saliency(abs=False)")
    found = search.smallest(
        strategies.shapes().flatmap(deep_chains),
        lambda law: law.measure(subject),
        search.Search(60, time.monotonic() + SECONDS),
    )
    assert found.failed is None
    assert found.cases >= 20


def conductance_inside() -> Subject:
    """Conductance at the convolution with the smallest output. The score is not split there, only watched."""

    def build(score):
        def explain(x: Tensor, baseline: Tensor) -> Tensor:
            _, where = peers.place("conductance", score.module, "deepest", x[None])
            return eg.conductance(score, where, steps=32)(x, baseline)

        return explain

    return Subject("conductance inside", build, ("baseline",), nodes=32, wants="module")


@pytest.mark.parametrize(
    "subject",
    [conductance_inside, lambda: of("captum:LayerConductance(method='riemann_trapezoid')")],
    ids=["ours", "captum"],
)
def test_conductance_is_incomplete_beside_a_skip(subject):
    nets = lambda shape: strategies.networks(shape=shape, max_degree=1)
    chains = lambda shape: strategies.networks(shape=shape, max_degree=1, joins=())
    found = searched(subject(), nets)
    assert found.failed is not None
    assert set(found.failed[0].case.score.operators) & set(JOINS)
    found = searched(subject(), chains)
    assert found.failed is None
    assert found.cases >= 20


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

    degree: ClassVar[None] = None
    piecewise_linear: ClassVar[bool] = False
    smooth: ClassVar[bool] = True

    def __repr__(self) -> str:
        return call(self)

    def __call__(self, x: Tensor) -> Tensor:
        return self.score(x)

    @functools.cached_property
    def inner(self) -> Network:
        return Network(self.shape, (*self.layers, "pointwise conv"), seed=self.seed)

    @functools.cached_property
    def score(self) -> Callable[[Tensor], Tensor]:
        body = nn.Sequential(*list(self.inner.module)[:-1])
        return WAYS[self.way](eg.from_module(body), torch.as_tensor(self.at, dtype=torch.float64))

    @property
    def operations(self) -> int:
        return 2 * self.inner.operations

    def majorant(self, x: Tensor) -> Tensor:
        return self.inner.majorant(x)


def segmented(way: str) -> Any:
    """Cases of smooth networks with two classes, one reducer, and its mask at the image of the case."""

    def of_shape(shape: tuple[int, ...]) -> Any:
        smooth = ("conv", "softplus", "tanh")
        net = strategies.networks(shape=shape, operators=smooth, joins=(), heads=("sum",), layers=2)
        image = strategies.images(shape)
        parts = st.tuples(net, image, image, strategies.baselines(shape))
        made = lambda net, x, *refs: Case(Segmented(shape, net.layers, net.seed, way, x), x, *refs)
        return parts.map(lambda p: Completeness(made(*p)))

    return strategies.shapes().flatmap(of_shape)


def found_through(way: str, subject: Subject, cases: int = 40) -> search.Found:
    def measure(law):
        assert law.case.score.score  # made before anything is mapped over it
        return law.measure(subject)

    found = search.smallest(segmented(way), measure, search.Search(cases, time.monotonic() + SECONDS))
    print(f"\n{way}: {found}")
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_count_has_a_gradient_that_is_zero_wherever_it_changes(way):
    """Integrated gradients explain nothing of it. Of the other reducers they explain all, up to their quadrature."""
    loose = dataclasses.replace(of("captum:IntegratedGradients"), nodes=None, accuracy=1e-2)
    found = found_through(way, loose)
    if way != "count":
        assert found.failed is None
        assert found.cases > 5
        return
    law, residual, _ = found.failed
    case = law.case
    attribution = loose.build(case.score)(case.x, case.baseline)
    assert torch.equal(attribution, torch.zeros_like(case.x))
    assert residual == abs(float(case.score(case.x) - case.score(case.baseline))) >= 1


def test_the_library_itself_refuses_a_count():
    """Where others give zeros, it says that there is no gradient."""
    found = found_through("count", of("integrated_gradients"), cases=15)
    assert found.failed is None
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
