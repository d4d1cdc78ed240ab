"""What random cases promise: known answers, equal pairs, derived tolerances, small cases that print as code."""

import itertools
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

import esegeta as eg
from esegeta.axioms import exact
from esegeta.conformance import cases as case_module
from esegeta.conformance import functions, grammar, networks, pairs, rebuilding, segmentations, strategies
from esegeta.conformance.cases import Case, discrepancy
from esegeta.conformance.functions import Additive, Ignoring, Linear, Perceptron, Polynomial
from esegeta.conformance.networks import Network
from esegeta.conformance.rebuilding import REBUILDINGS, Rebuilt
from esegeta.quadrature import nodes_and_weights

NAMES = {}
for _module in (functions, networks, pairs, rebuilding, segmentations, case_module):
    NAMES |= vars(_module)
EPS = torch.finfo(torch.float64).eps
SHAPES = {1: (1, 4), 2: (2, 3, 2), 3: (1, 2, 2, 2)}
SOME = st.sampled_from(list(SHAPES.values()))


def random(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def smallest(strategy, condition):
    quiet = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    return find(strategy, condition, settings=settings(quiet, max_examples=2000))


def of_functions(**filters):
    return strategies.cases(lambda shape: strategies.functions(shape=shape, **filters))


def of_networks(**filters):
    return strategies.cases(lambda shape: strategies.networks(shape=shape, **filters))


def incomplete(case, a, extra=0.0):
    left = float((a.sum() - (case.score(case.x) - case.score(case.baseline))).abs())
    return left > case.rounding(a) + extra


# --- functions --------------------------------------------------------------------------------------------


@random(30)
@given(of_functions())
def test_closed_forms_are_what_exact_references_say(case):
    f, x, b = case.score, case.x, case.baseline
    size = case.rounding() / EPS * EPS + 1e-12 * case.size
    assert float(f.majorant(x)) >= float(f(x).abs())
    if case.generic:
        slope = f.gradient(x)
        assert torch.allclose(slope, torch.func.grad(f)(x), rtol=0, atol=size)
        assert torch.allclose(slope, exact.gradient(f, x), rtol=0, atol=1e-6 * (1 + case.size))
    ig = f.integrated_gradients(x, b)
    assert not incomplete(case, ig)
    if f.piecewise_linear and case.generic:
        assert torch.allclose(ig, exact.integrated_gradients(f, x, b), rtol=0, atol=1e-9 * (1 + case.size))
    elif f.degree is not None:
        assert torch.allclose(ig, _average(f, x, b, 4), rtol=0, atol=size)
    elif f.smooth:
        assert torch.allclose(ig, _average(f, x, b, 80), rtol=0, atol=1e-9 * (1 + case.size))


def _average(f, x, b, steps):
    t, w = (torch.tensor(v) for v in nodes_and_weights("gauss-legendre", steps))
    slopes = torch.stack([torch.func.grad(f)(b + s * (x - b)) for s in t])
    return (x - b) * torch.tensordot(w, slopes, 1)


def _shapley_by_orders(f, x, b):
    """The mean over all orders in which elements are put in: a slow plain loop."""
    a, orders = torch.zeros_like(x).flatten(), list(itertools.permutations(range(x.numel())))
    for order in orders:
        z = b.flatten().clone()
        before = f(z.reshape(x.shape))
        for i in order:
            z[i] = x.flatten()[i]
            after = f(z.reshape(x.shape))
            a[i] += (after - before) / len(orders)
            before = after
    return a.reshape(x.shape)


@random(40)
@given(strategies.cases(lambda shape: strategies.functions(shape=shape), shape=(1, 4)))
def test_shapley_values_are_means_over_orders(case):
    f, x, b = case.score, case.x, case.baseline
    found = f.shapley(x, b)
    assert torch.allclose(
        found, _shapley_by_orders(f, x, b), rtol=0, atol=case.rounding() + 1e-13 * (1 + case.size)
    )


@random(60)
@given(of_functions())
def test_what_is_ignored_has_no_influence(case):
    f, x = case.score, case.x
    moved = torch.where(f.ignored(x.shape), x + 1.5, x)
    assert float((f(moved) - f(x)).abs()) <= case.rounding() + Case(f, moved, x, [x.tolist()]).rounding()
    for i, no in enumerate(f.unused):  # and what is not has some, somewhere
        if not no:
            points = torch.linspace(-40, 40, 1601, dtype=torch.float64)
            assert any(
                _varies(f, base, i, points) for base in (x, case.baseline, *case.baselines, x + 5, x - 5)
            )


def _varies(f, base, i, points):
    rows = base.flatten().repeat(len(points), 1)
    rows[:, i] = points
    values = f.of_rows(rows)
    return float(values.max() - values.min()) > 1e-12


@random(60)
@given(of_functions().filter(lambda c: c.score.swaps))
def test_swaps_change_nothing(case):
    f, x = case.score, case.x
    for i, j in f.swaps[:6]:
        swapped = x.flatten()[f.permutation(i, j)].reshape(x.shape)
        assert float((f(swapped) - f(x)).abs()) <= case.rounding()


@random(50)
@given(strategies.symmetric(strategies.functions(shape=(1, 3))))
def test_tied_functions_are_symmetric(f):
    assert f.swaps


@random(50)
@given(of_functions(monotone=True), st.integers(0, 100))
def test_monotone_functions_rise(case, k):
    f, x = case.score, case.x
    up = x.clone()
    up.view(-1)[k % x.numel()] += 0.5
    assert float(f(up) - f(x)) >= -case.rounding()


@pytest.mark.parametrize("how", functions.IGNORING)
def test_terms_that_cancel_are_in_the_formula(how):
    f = Ignoring(Linear((1, 2)), (1,), how)
    x = torch.tensor([[0.5, 3.0]], dtype=torch.float64)
    assert f.unused == (False, True)
    assert float(f(x)) == pytest.approx(0.5, abs=1e-14)
    assert torch.allclose(torch.func.grad(f)(x), f.gradient(x), atol=1e-14)


@random(50)
@given(of_functions())
def test_a_function_is_its_module_and_goes_through_vmap(case):
    xs = torch.stack([case.x, case.baseline])
    alone = torch.stack([case.score(z) for z in xs])
    bound = case.rounding()
    assert float((case.score.module(xs) - alone).abs().max()) <= bound
    assert float((torch.func.vmap(case.score)(xs) - alone).abs().max()) <= bound


def test_a_product_with_what_is_ignored_is_ignored():
    f = Ignoring(Polynomial(3, ((2, (1, 2, 0)), (1, (2,)))), (0,), "rectified away")
    assert f.unused == (True, True, False)
    assert Ignoring(f, (2,)).unused == (True, True, True)
    assert not _varies(f, torch.ones(3, dtype=torch.float64), 1, torch.linspace(-9, 9, 5).double())


def test_bad_functions_are_refused():
    with pytest.raises(ValueError, match="expected 2 elements, got float32"):
        Linear((1, 2))(torch.ones(1, 3))
    with pytest.raises(ValueError, match="elements below 2"):
        Polynomial(2, ((1, (2,)),))
    with pytest.raises(ValueError, match="as many rows"):
        Perceptron(((1, 1),), (0, 0), (1,))
    with pytest.raises(ValueError, match="a bend for each weight"):
        Additive((1, 2), ("relu",))


# --- networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_every_operator_in_one_to_three_dimensions(axes):
    for name in grammar.OPERATORS:
        print(name)  # of which one fails, if one does
        as_it_says(name, axes)


def as_it_says(name, axes):
    """The degree, the bends and the size of an operator are those that it declares."""
    shape = (2, *[4] * axes)
    known = grammar.OPERATORS[name]
    net = Network(shape, ("conv", name), "linear", seed=3)
    x = torch.linspace(-2, 2, 2 * 4**axes, dtype=torch.float64).reshape(shape).sin() + 0.1
    start = -x.flip(-1)
    slope = torch.func.grad(net)(x)
    assert torch.allclose(slope, exact.gradient(net, x), rtol=1e-6, atol=1e-7)
    assert float(slope.abs().max()) > 0
    assert float((slope * x).abs().sum()) <= float(net.majorant(x)) * (1 + 1e-12)
    if known.degree is not None:
        a = [_average(net, x, start, n).sum() for n in (known.degree, 3)]
        assert torch.allclose(a[0], net(x) - net(start)), "it is no polynomial of this degree"
    if known.piecewise_linear:
        assert torch.allclose(exact.integrated_gradients(net, x, start).sum(), net(x) - net(start), rtol=1e-8)
    else:
        t = torch.linspace(0, 1, 9, dtype=torch.float64)
        line = torch.stack([net(start + s * (x - start)) for s in t])
        assert float(line.diff(n=2).abs().max()) > 1e-9, "it is linear"


@random(40)
@given(strategies.networks())
def test_networks_are_what_they_say(net):
    x = operators_input(net)
    assert net(x).shape == ()
    assert torch.allclose(net.module(x[None])[0], net(x))
    assert float(net.majorant(x)) >= float(net(x).abs())
    assert net == eval(repr(net), NAMES)
    assert torch.equal(eval(repr(net), NAMES)(x), net(x)), "weights belong to the seed"


def operators_input(net):
    n = torch.Size(net.shape).numel()
    return (torch.arange(n, dtype=torch.float64) * 2.4).sin().reshape(net.shape)


def test_making_networks_leaves_the_random_state_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    Network((2, 4, 4), ("conv", "batch norm", "attention", ("add", "grouped conv")), "softmax", 5)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_are_small_multiples_of_powers_of_two():
    net = Network((2, 4, 4), ("conv", "batch norm"), "linear", 5)
    for name, p in net.module.named_parameters():
        scaled = p * 2**14
        assert torch.equal(scaled, scaled.round()), name
        assert float(p.abs().max()) <= 1.02


def test_upper_parameters_are_redrawn():
    net = Network((1, 4), ("conv", "relu", "conv"), "linear", seed=2)
    before, after = (dict(n.module.named_parameters()) for n in (net, net.upper(4)))
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert same == ["0.weight", "0.bias", "2.weight"]
    assert repr(net.upper(4)).endswith("seed=2, redrawn=4)")


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (("max pool",), "layers that fit"),
        (("add",), "an operator"),
        ((("plus", "conv"),), "a join"),
        ((("add", "strided conv"),), "layers that fit"),
    ],
)
def test_networks_that_do_not_fit_are_refused(layers, text):
    with pytest.raises(ValueError, match=text):
        Network((1, 1), layers)


@random(25)
@given(st.data(), st.sampled_from(["smooth", "piecewise_linear", "max_degree"]))
def test_filters_filter(data, which):
    wanted = {which: 2 if which == "max_degree" else True}
    for strategy in (strategies.networks(**wanted), strategies.functions(shape=(1, 3), **wanted)):
        f = data.draw(strategy)
        assert f.degree <= 2 if which == "max_degree" else getattr(f, which)
    net = data.draw(strategies.networks(axes=[2], channels=[3], operators=["pool", "conv"], joins=()))
    assert len(net.shape) == 3
    assert net.shape[0] == 3
    assert all(n == "conv" or "pool" in n for n in net.operators)


# --- pairs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", list(pairs.REWRITES))
@random(6)
@given(data=st.data())
def test_rewritten_scores_are_equal(how, data):
    shape = data.draw(SOME)
    pair = data.draw(strategies.pairs(shape=shape, rewrites=[how], rebuildings=()))
    assert pair.name == how
    _equal(pair, data.draw(strategies.images(shape)), data.draw(strategies.images(shape)))


@pytest.mark.parametrize("how", list(REBUILDINGS))
@random(6)
@given(data=st.data())
def test_rebuilt_networks_are_equal(how, data):
    shape = data.draw(st.sampled_from([(2, 4), (2, 4, 5), (2, 2, 4, 2)]))
    pair = data.draw(strategies.pairs(shape=shape, rewrites=(), rebuildings=[how]))
    assert pair.name == how
    assert [type(m) for m in pair.first.module.modules()] != [
        type(m) for m in pair.second.module.modules()
    ] or (how in ("merged convolutions", "folded norm"))
    _equal(pair, data.draw(strategies.images(shape)), data.draw(strategies.images(shape)))


def _equal(pair, x, start):
    first, second = (Case(s, x, start, [start]) for s in (pair.first, pair.second))
    assert eval(repr(pair), NAMES) == pair
    bound = max(first.rounding(), second.rounding())
    assert float((pair.first(first.x) - pair.second(first.x)).abs()) <= bound
    assert torch.allclose(pair.second.module(first.x[None])[0], pair.second(first.x))
    if first.generic and second.generic:
        slopes = [torch.func.grad(s)(first.x) for s in (pair.first, pair.second)]
        assert float((slopes[0] - slopes[1]).abs().max()) <= bound


def test_at_a_kink_equal_scores_may_have_other_slopes():
    first = Network((1, 1), ("relu",))
    second = Rebuilt(first, "rectifier by maximum")
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert torch.func.grad(first)(zero) != torch.func.grad(second)(zero)
    assert not Case(first, zero, zero + 1, zero[None]).generic
    assert not Case(first, zero + 1, zero + 2, zero[None]).generic
    assert Case(first, zero + 1, zero + 2, zero[None] + 1).generic


def test_a_rebuilding_without_anything_to_rebuild_is_refused():
    with pytest.raises(ValueError, match="a network that 'folded norm' applies to"):
        Rebuilt(Network((1, 3), ("conv",)), "folded norm")


# --- tolerances -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 2, 5, 16])
def test_the_discrepancy_is_the_largest_gap(nodes):
    t, w = (torch.tensor(v) for v in nodes_and_weights("gauss-legendre", nodes))
    places = torch.linspace(0, 1, 20001, dtype=torch.float64)
    gaps = ((t[None] < places[:, None]) * w).sum(1) - places
    assert float(gaps.abs().max()) == pytest.approx(discrepancy(nodes), abs=1e-4)


@random(60)
@given(strategies.cases(dtypes=("float64", "float32")), st.sampled_from([1, 2, 3, 8]))
def test_integrated_gradients_stay_within_the_tolerance(case, nodes):
    x, start = case.x, case.baseline
    t, w = (x.new_tensor(v) for v in nodes_and_weights("gauss-legendre", nodes))
    slopes = torch.stack([torch.func.grad(case.score)(start + s * (x - start)) for s in t])
    a = (x - start) * torch.tensordot(w, slopes, 1)
    assert not incomplete(case, a, case.quadrature(nodes, start))


@random(40)
@given(of_networks())
def test_rounding_covers_another_order_of_all_operations(case):
    """In batches of another size, and from float32 to float64, the same is computed differently."""
    score, x = case.score, case.x
    several = score.module(torch.stack([x, case.baseline, *case.baselines.unbind()]))[0]
    assert float((several - score(x)).abs()) <= case.rounding()
    low = Case(score, x / 3, case.baseline, case.baselines, dtype="float32")
    assert float((low.score(low.x).double() - score(low.x.double())).abs()) <= low.rounding()


@pytest.mark.parametrize("fault", ["one weight", "float32 weights", "too few nodes", "midpoint"])
@pytest.mark.parametrize("seed", range(5))
def test_wrong_quadratures_are_outside(fault, seed):
    # Of high enough degree that every fault shows.
    net = Network((1, 4), ("conv", "square", "conv", "square"), "linear", seed=seed + 1)
    x = [[0.5, -0.75, 1, 1.25]]
    case = Case(net, x, [[-0.25, 0.5, 0.25, -1]], [x])
    t, w = (torch.tensor(v) for v in nodes_and_weights("gauss-legendre", 3))
    right = (case.x - case.baseline) * torch.tensordot(w, _slopes(case, t), 1)
    assert not incomplete(case, right, case.quadrature(3, case.baseline))
    if fault == "one weight":
        w = w * torch.tensor([1 + 1e-10, 1, 1], dtype=torch.float64)
    elif fault == "float32 weights":
        t, w = t.float().double(), w.float().double()
    elif fault == "too few nodes":
        t, w = (torch.tensor(v) for v in nodes_and_weights("gauss-legendre", 1))
    else:
        t, w = (torch.tensor(v) for v in nodes_and_weights("midpoint", 3))
    wrong = (case.x - case.baseline) * torch.tensordot(w, _slopes(case, t), 1)
    assert incomplete(case, wrong, case.quadrature(3, case.baseline))


def _slopes(case, t):
    return torch.stack([torch.func.grad(case.score)(case.baseline + s * (case.x - case.baseline)) for s in t])


def test_the_bound_for_kinks_is_reached():
    # A jump right at the node of the midpoint rule: half of the variation is missed.
    case = Case(Perceptron(((1,),), (-0.5,), (1,)), [[1]], [[0]], [[[0]]])
    assert case.quadrature(1, case.baseline) == pytest.approx(0.5)
    a = torch.func.grad(case.score)(torch.full((1, 1), 0.5 + 1e-9, dtype=torch.float64))
    assert float((a.sum() - (case.score(case.x) - case.score(case.baseline))).abs()) == pytest.approx(0.5)


# --- cases that are found ---------------------------------------------------------------------------------


@random(40)
@given(strategies.cases(dtypes=("float64", "float32")))
def test_a_case_prints_as_code(case):
    again = eval(repr(case), NAMES)
    assert again == case
    assert hash(again) == hash(case)
    assert torch.equal(again.x, case.x)
    assert again.x.dtype == case.x.dtype
    assert torch.equal(again.score(again.x), case.score(case.x))


@pytest.mark.slow
def test_the_smallest_case_is_nothing():
    assert (
        repr(smallest(strategies.cases(), lambda case: True))
        == "Case(Linear((0,)), [[0]], [[0]], [[[0]], [[0]]])"
    )


def test_the_smallest_network_is_nothing():
    assert repr(smallest(strategies.networks(), lambda net: True)) == "Network((1, 1))"


@pytest.mark.slow
def test_incompleteness_of_a_quadrature_with_wrong_weights_is_found_on_a_linear_model():
    def wrong(case):  # as of a trapezoid rule whose weights add up to 0.98
        a = eg.integrated_gradients(case.score, steps=2)(case.x, case.baseline) * 0.98
        return incomplete(case, a, case.quadrature(2, case.baseline))

    found = smallest(of_functions(), wrong)
    assert repr(found) in (
        "Case(Linear((1,)), [[0]], [[1]], [[[0]], [[0]]])",
        "Case(Linear((1,)), [[1]], [[0]], [[[0]], [[0]]])",
    )
    assert wrong(eval(repr(found), NAMES))


@pytest.mark.slow
def test_gradient_times_input_is_found_incomplete_on_one_rectifier():
    def wrong(case):
        a = torch.func.grad(case.score)(case.x) * (case.x - case.baseline)
        return incomplete(case, a)

    found = smallest(of_networks(piecewise_linear=True), wrong)
    assert found.shape == (1, 1)
    assert len(found.score.layers) == 1
    assert found.score.seed == 0
    assert wrong(eval(repr(found), NAMES))


@pytest.mark.slow
def test_an_image_that_forgets_its_window_is_found_on_two_elements():
    def wrong(case):  # explains only the first element
        a = eg.integrated_gradients(case.score, steps=2)(case.x, case.baseline).clone()
        a.view(-1)[1:] = 0
        return incomplete(case, a)

    found = smallest(of_functions(kinds=["Linear"]), wrong)
    assert found.x.numel() == 2
    assert sorted(found.score.weights) == [0, 1]


def test_networks_are_drawn_quickly():
    """Thousands of them are drawn. Calls are counted, because seconds are those of the machine."""
    drawn, calls = [], 0

    @random(40)
    @given(strategies.networks())
    def draw(net):
        drawn.append(net)

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    draw()
    drawn.clear()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        draw()
    finally:
        sys.setprofile(before)
    assert calls / len(drawn) < 12_000, calls / len(drawn)


# --- reducers ---------------------------------------------------------------------------------------------


@random(40)
@given(strategies.segmentations(), strategies.reducers())
def test_reducers_make_scores_of_segmentations(model, reduce):
    assert eval(repr(reduce), NAMES) == reduce
    assert eval(repr(model), NAMES) == model
    x = operators_input(model.network)
    y = model(x)
    assert y.shape[0] == 2
    assert float((y.sum(0) - 1).abs().max()) <= 1e-9 * float(model.majorant(x))
    try:
        score = reduce(model, x)
    except ValueError:  # nothing is predicted as this class, or there is one value only
        return
    assert score(x).shape == ()
    assert reduce.differentiable


def test_reducers_are_chosen_by_what_they_do():
    names = set()

    @random(50)
    @given(strategies.reducers(masks=True))
    def collect(reduce):
        names.add(reduce.name)

    collect()
    assert {"predicted_class_sum", "boundary"} <= names
    assert "class_sum" not in names
