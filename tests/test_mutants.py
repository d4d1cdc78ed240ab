"""Every check rejects a method that is broken in the way that the check is for."""

import random as python_random

import numpy as np
import pytest
import torch
from cases import Case, Subject, make_case, subjects
from test_claims import CASES, SITUATIONS, check_claim, check_no_claim
from test_contract import CHECKS
from torch import Tensor

import esegeta as eg
from esegeta.engine import levels
from esegeta.engine.execution import current

slope = torch.func.grad
SMOOTH = make_case("softplus", axes=2, channels=2)
NET = make_case("segmentation", axes=2, channels=1)


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


def plain(fn, **claims) -> Subject:
    """A subject that takes x alone: ``fn(score, x)``."""
    return Subject(
        fn.__name__,
        lambda score: lambda x: fn(score, x),
        **{"axioms": frozenset({"linearity", "dummy", "symmetry", "shift"}), **claims},
    )


def path(name, *args, **kwargs) -> Subject:
    return Subject(name, quadrature(*args, **kwargs), ("baseline",), axioms=COMPLETE)


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


def eval_left_behind() -> Subject:
    def meddling(score, x):
        NET.module.train()
        NET.module.eval()
        NET.module[2].training = True
        return slope(score)(x)

    return plain(meddling)


def frozen_weights() -> Subject:
    def freezing(score, x):
        NET.module.requires_grad_(False)
        return slope(score)(x)

    return plain(freezing)


def left_hook() -> Subject:
    def hooking(score, x):
        NET.module[0].register_forward_hook(lambda *_: None)
        return slope(score)(x)

    return plain(hooking)


def nudged_weights() -> Subject:
    def nudging(score, x):
        with torch.no_grad():
            NET.module[0].bias.add_(1e-3)
        return slope(score)(x)

    return plain(nudging)


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
    ("mates_free", plain(coupled)),
    ("mates_free", plain(coupled_in_order)),
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
    ("module_untouched", eval_left_behind()),
    ("module_untouched", frozen_weights()),
    ("module_untouched", left_hook()),
    ("module_untouched", nudged_weights()),
]

AXIOMS = [
    # captum's riemann_trapezoid: interior weights 1/n, so that they sum to (n - 1) / n.
    ("completeness", path("captum_trapezoid", [i / 49 for i in range(50)], [0.01, *[0.02] * 48, 0.01])),
    ("completeness", path("right_riemann", [(i + 1) / 24 for i in range(24)], [1 / 24] * 24)),
    ("completeness", path("without_the_difference", T, W, multiply=False)),
    ("completeness", path("single_weights", T, torch.tensor(W).tolist())),
    ("completeness", plain(times_input, axioms=COMPLETE)),
    ("linearity", plain(absolute)),
    ("linearity", plain(normalised)),
    ("linearity", plain(torch_noise)),
    ("dummy", plain(spilling)),
    ("symmetry", plain(ramped)),
    ("shift", plain(times_input)),
    ("sensitivity_a", plain(healthy, axioms=frozenset({"sensitivity_a"}))),
    ("sensitivity_a", path("left_riemann", [i / 8 for i in range(8)], [1 / 8] * 8)),
]


def label(value) -> str:
    return value.name if isinstance(value, Subject) else str(value)


def case_of(check: str) -> Case:
    return NET if check == "module_untouched" else SMOOTH


@pytest.fixture
def fresh():
    """Mutants damage what they share; nothing of it may outlast a test."""
    before = torch.get_rng_state(), np.random.get_state(), python_random.getstate()
    NET.__dict__.pop("module", None)
    yield
    NET.__dict__.pop("module", None)
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    python_random.setstate(before[2])


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("check", "mutant"), CONTRACT, ids=label)
def test_the_contract_rejects(check, mutant):
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS[check](mutant, case_of(check))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("axiom", "mutant"), AXIOMS, ids=label)
def test_a_false_claim_is_rejected(axiom, mutant):
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        check_claim(mutant, axiom)
    if isinstance(caught.value, AssertionError):
        assert "make_case(" in str(caught.value), "the message says which case"


@pytest.mark.parametrize(("axiom"), ["linearity", "dummy", "symmetry", "shift"])
def test_a_missing_claim_is_rejected(axiom):
    with pytest.raises(AssertionError, match="claim it or widen the cases"):
        check_no_claim(plain(healthy), axiom)


@pytest.mark.parametrize("axiom", ["completeness", "sensitivity_a"])
def test_an_unfounded_claim_is_not_asked_for(axiom):
    check_no_claim(plain(healthy), axiom)


def test_the_checks_accept_a_healthy_method():
    for name, check in CHECKS.items():
        if "key" not in name:
            check(plain(healthy), case_of(name))
    for axiom in ("linearity", "dummy", "symmetry", "shift"):
        check_claim(plain(healthy), axiom, CASES[:3])


def test_a_transform_that_falsely_keeps_completeness_is_rejected():
    ig = next(s for s in subjects() if s.name == "integrated_gradients")
    mutant = Subject("halved", lambda score: _halved(ig.build(score)), ig.refs, axioms=ig.axioms)
    with pytest.raises(AssertionError, match="claims completeness"):
        check_claim(mutant, "completeness")


def _halved(explain):
    return lambda x, baseline: explain(x, baseline) / 2


def test_every_check_has_a_mutant():
    assert {check for check, _ in CONTRACT} == set(CHECKS)
    assert {axiom for axiom, _ in AXIOMS} == set(SITUATIONS)


def test_single_precision_weights_survive_a_loose_tolerance():
    """Why the tolerance belongs to the case: 1e-6 for all would accept float32 weights in float64."""
    case = make_case("cubic", axes=2)
    explain = quadrature(T, torch.tensor(W).tolist())(case.score)
    residual: Tensor = eg.axioms.completeness(explain, case.score)(case.x, *case.refs(("baseline",)))
    assert case.remainder < float(residual.abs()) / max(1.0, float(case.score(case.x).abs())) < 1e-6
