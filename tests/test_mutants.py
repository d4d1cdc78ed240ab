"""Every check and every law rejects a method that is broken in the way that it is for."""

import random as python_random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta import conformance
from esegeta.conformance import LAWS, Case, Polynomial, Subject, claims, contract, of, search, verify
from esegeta.engine import levels
from esegeta.engine.execution import current

slope = torch.func.grad

# At most: the search ends with the first counterexample, which for most mutants is one of the first cases.
CASES = 300


def quadrature(t, w, *, multiply=True):
    """Integrated gradients with given nodes and weights, as a researcher might write it."""

    def build(score):
        def explain(x, baseline):
            nodes = [wi * slope(score)(baseline + ti * (x - baseline)) for ti, wi in zip(t, w, strict=True)]
            return (x - baseline if multiply else 1) * sum(nodes)

        return explain

    return build


GAUSS = np.polynomial.legendre.leggauss(8)
T, W = ((GAUSS[0] + 1) / 2).tolist(), (GAUSS[1] / 2).tolist()
COMPLETE = frozenset({"completeness", "linearity", "dummy"})


def plain(fn, *claimed, **settings) -> Subject:
    """A subject that takes x alone: ``fn(score, x)``."""
    axioms = frozenset(claimed or ("linearity", "dummy", "symmetry", "shift"))
    return Subject(fn.__name__, lambda score: lambda x: fn(score, x), **{"axioms": axioms, **settings})


def path(name, t, *rest, claims=COMPLETE, **settings) -> Subject:
    """Of a quadrature no more is asked than Gauss-Legendre with as many nodes could do."""
    return Subject(
        name, quadrature(t, *rest, **settings), ("baseline",), axioms=frozenset(claims), nodes=len(t)
    )


def keyed(fn) -> Subject:
    return Subject(fn.__name__, lambda score: lambda x, *, key: fn(score, x, key), key=True)


def healthy(score, x):
    return slope(score)(x)


def torch_noise(score, x):
    return slope(score)(x + 0.1 * torch.randn(x.shape, dtype=x.dtype))


def torch_noise_reseeded(score, x):
    torch.manual_seed(12345)
    return slope(score)(x)


def numpy_noise(score, x):
    return slope(score)(x) * (1 + 0 * np.random.rand())


def python_noise(score, x):
    return slope(score)(x) * (1 + 0 * python_random.random())


def in_place(score, x):
    g = slope(score)(x)
    x.add_(1).sub_(1)
    return g


def in_place_and_back_lost(score, x):
    g = slope(score)(x)
    x.mul_(1.5)
    return g


def watched_input(score, x):
    x.requires_grad_()
    return slope(score)(x.detach())


def watched_answer(score, x):
    (g,) = torch.autograd.grad(score(z := x.detach().requires_grad_()), z, create_graph=True)
    return g + 0 * z


def the_input_itself(score, x):
    return x


def wrong_dtype(score, x):
    return slope(score)(x).float()


def wrong_shape(score, x):
    return slope(score)(x)[None]


def not_finite(score, x):
    return slope(score)(x) / 0


def single_in_double(score, x):
    return slope(score)(x.float().to(x.dtype))


def calls() -> Subject:
    count = [0]

    def nondeterministic(score, x):
        count[0] += 1
        return slope(score)(x) * (1 + 1e-9 * count[0])

    return plain(nondeterministic)


def coupled(score, x):
    return slope(score)(x) / levels.base(x).detach().abs().max()


def coupled_in_order(score, x):
    return slope(score)(x) + levels.base(x).detach().flatten()[0]


def chunky(score, x):
    return slope(score)(x) * (1 + 0.01 * (current().chunk or 0))


def threaded(score, x):
    return slope(score)(x) * torch.get_num_threads()


def strided(score, x):
    return slope(score)(x) * x.stride()[-1]


def detached(score, x):
    return slope(score)(x.detach())


def half_detached(score, x):
    # The product rule loses a term: everything runs and the outer derivative is wrong.
    return x * slope(score)(x.detach())


def absolute(score, x):
    return slope(score)(x).abs()


def normalised(score, x):
    g = slope(score)(x)
    return g / g.abs().max()


def times_input(score, x):
    return x * slope(score)(x)


def spilling(score, x):
    g = slope(score)(x)
    return g + 1e-6 * g.sum()


def ramped(score, x):
    return slope(score)(x) * (1 + torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape))


def leaning(score, x):
    # What lies to the left counts more.
    return slope(score)(x) * torch.linspace(1, 2, x.shape[-1], dtype=x.dtype)


def by_operations(score, x):
    return slope(score)(x) * getattr(score, "operations", 1)


def jumping(score, x):
    return torch.where(x > x.mean(), 1.0, -1.0) * slope(score)(x).sum()


def edges(score, x):
    # Looks like an explanation of any network, and knows none.
    return x - x.mean() + 0 * slope(score)(x)


def falling(score):
    return lambda x, baseline: (baseline - x) * slope(score)(x)


def halves(parts):
    """Half of what each part loses."""
    return lambda score: lambda x, baseline: eg.exact_shapley(score, features=parts)(x, baseline) / 2


def one_key_for_all(score, x, key):
    return slope(score)(x + eg.random.normal(0, x.shape, dtype=x.dtype))


def global_draws(score, x, key):
    return slope(score)(x + torch.randn(x.shape, dtype=x.dtype))


def int_keys_differ(score, x, key):
    shift = 1 if isinstance(key, int) else 0
    return slope(score)(x + eg.random.normal(eg.random.fold_in(key, shift), x.shape, dtype=x.dtype))


def no_half(score, x):
    if x.dtype in (torch.float16, torch.bfloat16):
        raise RuntimeError("not implemented for Half")
    return slope(score)(x)


def meddling(change):
    """A method that does something to the network that it explains."""

    def build(score):
        def explain(x):
            g = slope(score)(x)
            change(score.module)
            return g

        return explain

    return Subject(change.__name__, build)


def mode_left_behind(module):
    part = next(m for m in module.modules() if isinstance(m, nn.ReLU))
    part.training = not part.training


def frozen_weights(module):
    module.requires_grad_(False)


def left_hook(module):
    convolution(module).register_forward_hook(lambda *_: None)


def nudged_weights(module):
    with torch.no_grad():
        convolution(module).bias.add_(1e-3)


def left_attribute(module):
    convolution(module).seen = True


def convolution(module):
    return next(m for m in module.modules() if isinstance(m, nn.Conv2d))


CONTRACT = [
    ("shape_and_dtype", plain(wrong_dtype)),
    ("shape_and_dtype", plain(wrong_shape)),
    ("shape_and_dtype", plain(not_finite)),
    ("repeatable", plain(torch_noise)),
    ("repeatable", calls()),
    ("world_untouched", plain(torch_noise)),
    ("world_untouched", plain(torch_noise_reseeded)),
    ("world_untouched", plain(numpy_noise)),
    ("python_generator", plain(python_noise)),
    ("world_untouched", plain(in_place)),
    ("world_untouched", plain(in_place_and_back_lost)),
    ("world_untouched", plain(watched_input)),
    ("world_untouched", plain(watched_answer)),
    ("world_untouched", plain(the_input_itself)),
    ("batched_equals_loop", plain(coupled)),
    ("independent_of_batch", plain(coupled)),
    ("independent_of_batch", plain(coupled_in_order)),
    ("chunk_free", plain(chunky)),
    ("thread_free", plain(threaded)),
    ("any_strides", plain(strided)),
    ("differentiable", plain(detached)),
    ("derivative_right", plain(half_detached)),
    ("derivative_right", plain(single_in_double)),
    ("key", keyed(one_key_for_all)),
    ("key", keyed(global_draws)),
    ("key", keyed(int_keys_differ)),
    ("keys_per_example", keyed(int_keys_differ)),
    ("half_precision", plain(no_half)),
    ("half_precision", plain(wrong_dtype)),
    ("module_untouched", meddling(mode_left_behind)),
    ("module_untouched", meddling(frozen_weights)),
    ("module_untouched", meddling(left_hook)),
    ("module_untouched", meddling(nudged_weights)),
    ("module_untouched", meddling(left_attribute)),
]

AXIOMS = [
    # captum's riemann_trapezoid: interior weights 1/n, so that they sum to (n - 1) / n.
    ("completeness", path("captum_trapezoid", [i / 49 for i in range(50)], [0.01, *[0.02] * 48, 0.01])),
    ("completeness", path("right_riemann", [(i + 1) / 24 for i in range(24)], [1 / 24] * 24)),
    ("completeness", path("without_the_difference", T, W, multiply=False)),
    ("completeness", path("single_weights", T, torch.tensor(W).tolist())),
    ("completeness", plain(times_input, *COMPLETE)),
    ("conservation", plain(healthy, "conservation")),
    ("linearity", plain(absolute)),
    ("linearity", plain(normalised)),
    ("linearity", plain(torch_noise)),
    ("dummy", plain(spilling)),
    ("symmetry", plain(ramped)),
    ("shift", plain(times_input)),
    ("sensitivity_a", plain(healthy, "sensitivity_a")),
    ("sensitivity_a", path("left_riemann", [i / 8 for i in range(8)], [1 / 8] * 8, claims=["sensitivity_a"])),
    ("implementation_invariance", plain(by_operations, "implementation_invariance")),
    ("sensitivity_n", path("no_difference", T, W, multiply=False, claims=["sensitivity_n"])),
    ("scale_of_output", plain(normalised, "scale_of_output")),
    (
        "efficiency_of_regions",
        Subject("halved_parts", halves(eg.features.elements()), ("baseline",),
                axioms=frozenset({"efficiency_of_regions"}), parts=halves),
    ),
    ("continuity", plain(jumping, "continuity")),
    ("class_sensitivity", plain(edges, "class_sensitivity")),
    ("translation_equivariance", plain(leaning, "translation_equivariance")),
    ("affine_equivariance", plain(leaning, "affine_equivariance")),
    ("monotonicity", Subject("falling", falling, ("baseline",), axioms=frozenset({"monotonicity"}))),
    ("parameter_dependence", plain(edges, "parameter_dependence")),
]  # fmt: skip


def label(value) -> str:
    return value.name if isinstance(value, Subject) else str(value)


def case_of(check: str) -> Case:
    """The suite's own case, made anew: mutants damage the network in it."""
    case = contract.NETWORK if check == "module_untouched" else contract.SMOOTH
    return eval(repr(case), dict(vars(conformance)))


@pytest.fixture
def fresh(monkeypatch):
    """Mutants damage what they share; nothing of it may outlast a test."""
    monkeypatch.setattr(search, "SHRINKS", 0)
    before = torch.get_rng_state(), np.random.get_state(), python_random.getstate()
    yield
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    python_random.setstate(before[2])


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("check", "mutant"), CONTRACT, ids=label)
def test_the_contract_rejects(check, mutant):
    with pytest.raises((AssertionError, RuntimeError)):
        contract.CHECKS[check](mutant, case_of(check))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("axiom", "mutant"), AXIOMS, ids=label)
def test_a_false_claim_is_rejected(axiom, mutant):
    report = verify(mutant, axioms=[axiom], cases=CASES)
    assert report.broken == (axiom,), str(report)
    found = report[axiom].counterexample
    assert found.residual > found.allowed or found.residual != found.residual
    assert "Case(" in found.code, "the message says which case"


@pytest.mark.parametrize("axiom", ["linearity", "dummy", "symmetry", "shift"])
def test_a_missing_claim_is_rejected(axiom):
    modest = replace(plain(healthy), axioms=frozenset())
    assert axiom in claims.unclaimed(modest)
    verdict = claims.counterexample(modest, axiom, cases=60)
    assert not isinstance(verdict, str), "nothing shows that it is not kept"
    assert verdict.kind == "holds"


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("axiom", ["completeness", "sensitivity_a"])
def test_an_unfounded_claim_is_not_asked_for(axiom):
    code = claims.counterexample(plain(healthy), axiom, cases=CASES)
    assert isinstance(code, str)
    assert claims.violated(plain(healthy), code)


@pytest.mark.parametrize("check", [c for c in contract.CHECKS if "key" not in c])
def test_the_checks_accept_a_healthy_method(check):
    contract.CHECKS[check](plain(healthy), case_of(check))


def test_the_laws_accept_a_healthy_method():
    report = verify(plain(healthy), axioms=["linearity", "dummy", "symmetry", "shift"], cases=60)
    assert {v.kind for v in report.verdicts} == {"holds"}, str(report)


@pytest.mark.usefixtures("fresh")
def test_a_transform_that_falsely_keeps_completeness_is_rejected():
    whole = of("integrated_gradients")
    half = lambda score: lambda x, baseline: whole.build(score)(x, baseline) / 2
    mutant = Subject("halved", half, whole.refs, axioms=whole.axioms, nodes=whole.nodes, composite=True)
    assert verify(mutant, axioms=["completeness"], cases=CASES).broken == ("completeness",)


def test_every_check_and_every_law_has_a_mutant():
    assert {check for check, _ in CONTRACT} == set(contract.CHECKS)
    assert {axiom for axiom, _ in AXIOMS} == set(LAWS)


def test_single_precision_weights_survive_a_loose_tolerance():
    """Why the tolerance belongs to the case: 1e-6 for all would accept float32 weights in float64."""
    cubic = Polynomial(2, ((1, (0, 0, 0)), (-0.5, (0, 1, 1)), (0.25, (1,))))
    case = Case(cubic, [[1.5, -2]], [[0.25, 1]], [[[0.25, 1]]])
    explain = quadrature(T, torch.tensor(W).tolist())(case.score)
    residual = float(eg.axioms.completeness(explain, case.score)(case.x, case.baseline).abs())
    assert case.rounding(case.score(case.x)) + case.quadrature(len(T)) < residual < 1e-6
