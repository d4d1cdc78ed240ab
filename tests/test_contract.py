"""What every method keeps, and every transform of every method. The checks are functions: others reuse them."""

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jaxtyping
import numpy as np
import pytest
import torch
from cases import KINDS, Case, Subject, every_case, make_case, subjects, transformed
from cases import METHODS as REGISTERED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jvp, vmap

import esegeta as eg

SUBJECTS = list(subjects(few=True))
METHODS = [s for s in SUBJECTS if not s.composite]


def named(chosen: list[Subject]) -> list:
    return [pytest.param(s, id=s.name) for s in chosen]


strict = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=3,
    suppress_health_check=list(HealthCheck),
)
drawn_cases = st.builds(
    make_case,
    st.sampled_from(KINDS),
    axes=st.integers(1, 3),
    channels=st.integers(1, 2),
    dtype=st.sampled_from(["float64", "float32"]),
    seed=st.integers(0, 99),
)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def assert_near(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} is not {tuple(b.shape)}"
    off = float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
    assert off <= tolerance, f"{what}: differs by {off:.2g} of the largest value, allowed {tolerance:.2g}"


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def unchecked_types() -> Iterator[None]:
    """Without the run-time type checks of the tests, which draw from Python's global generator."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


# -- the checks ------------------------------------------------------------------------------------------------


def check_shape_and_dtype(subject: Subject, case: Case) -> None:
    x, a = case.x, subject(case)
    expected = (1, *x.shape[1:]) if subject.one_channel else tuple(x.shape)
    assert isinstance(a, Tensor), f"{type(a)} instead of a tensor"
    assert tuple(a.shape) == expected, f"shape {tuple(a.shape)} instead of {expected}"
    assert a.dtype == x.dtype, f"dtype {a.dtype} instead of {x.dtype}"
    assert torch.isfinite(a).all(), "not finite"


def check_repeatable(subject: Subject, case: Case) -> None:
    explain, arguments = subject.explain(case), (case.x, *case.refs(subject.refs))
    first = explain(*arguments, **subject.extra())
    assert same(first, explain(*arguments, **subject.extra())), "a second call gives another answer"
    assert same(first, subject(case)), "a second explanation gives another answer"


def check_world_untouched(subject: Subject, case: Case) -> None:
    inputs = (case.x, *case.refs(subject.refs))
    before = [t.clone() for t in inputs]
    versions = [t._version for t in inputs]
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    a = subject.explain(case)(*inputs, **subject.extra())
    assert torch.equal(state[0], torch.get_rng_state()), "torch's global generator moved"
    assert (state[1] == np.random.get_state()[1]).all(), "NumPy's global generator moved"
    for t, kept, version in zip(inputs, before, versions, strict=True):
        assert same(t, kept), "an input changed"
        assert t._version == version, "an input was written to"
        assert not t.requires_grad, "an input requires grad"
        assert t.grad is None, "an input has a gradient"
    assert not a.requires_grad, "the answer requires grad"
    assert a.data_ptr() not in {t.data_ptr() for t in inputs}, "the answer is an input"


def check_python_generator(subject: Subject, case: Case) -> None:
    with unchecked_types():
        state = random.getstate()
        subject(case)
        assert state == random.getstate(), "Python's global generator moved"


def check_batched_equals_loop(subject: Subject, case: Case) -> None:
    explain, xs = subject.explain(case), case.xs
    mapped, shared = case.many_refs(subject.refs), case.refs(subject.refs)
    loop = torch.stack([explain(*ts, **subject.extra()) for ts in zip(xs, *mapped, strict=True)])
    assert_near(eg.batched(explain)(xs, *mapped, **subject.extra()), loop, case.batching, "batched")
    straight = vmap(lambda *ts: explain(*ts, **subject.extra()))(xs, *mapped)
    assert_near(straight, loop, case.batching, "vmap")
    if not shared or subject.composite:
        return
    dims = (0, *[None] * len(shared))
    loop = torch.stack([explain(x, *shared, **subject.extra()) for x in xs])
    sharing = eg.batched(explain, in_dims=dims)(xs, *shared, **subject.extra())
    assert_near(sharing, loop, case.batching, "batched with shared references")


def check_keys_per_example(subject: Subject, case: Case) -> None:
    explain, xs, refs = subject.explain(case), case.xs, case.many_refs(subject.refs)
    keys = torch.tensor([3, 1, 4])
    loop = torch.stack([explain(*ts, key=int(k)) for k, *ts in zip(keys, xs, *refs, strict=True)])
    assert_near(eg.batched(explain)(xs, *refs, key=keys), loop, case.batching, "batched")
    straight = vmap(lambda k, *ts: explain(*ts, key=k))(keys, xs, *refs)
    assert_near(straight, loop, case.batching, "vmap")


def check_chunk_free(subject: Subject, case: Case) -> None:
    explain, xs, refs = subject.explain(case), case.xs, case.many_refs(subject.refs)
    answers = {}
    for chunk in (1, 3) if subject.composite else (1, 2, 3, 7):
        with eg.execution(chunk=chunk):
            many = eg.batched(explain)(xs, *refs, **subject.extra())
            answers[chunk] = many[0] if subject.composite else subject(case), many
    for chunk, (one, many) in answers.items():
        assert_near(one, answers[1][0], case.batching, f"chunk {chunk}")
        assert_near(many, answers[1][1], case.batching, f"chunk {chunk}, batched")


def check_mates_free(subject: Subject, case: Case) -> None:
    explain, xs, refs = subject.explain(case), case.xs, case.many_refs(subject.refs)
    run = vmap(lambda *ts: explain(*ts, **subject.extra()))
    here = run(xs, *refs)
    others = run(torch.cat([xs[:1], 30 * xs[1:] + 5]), *refs)
    assert_near(others[0], here[0], case.batching, "beside other examples")
    turned = run(xs.flip(0), *[r.flip(0) for r in refs]).flip(0)
    assert_near(turned, here, case.batching, "in another order")


def check_thread_free(subject: Subject, case: Case) -> None:
    with threads(1):
        one = subject(case)
    with threads(2):
        assert_near(subject(case), one, case.batching, "with two threads")


def check_key(subject: Subject, case: Case) -> None:
    a = subject(case, 7)
    assert same(a, subject(case, 7)), "the same key gives another answer"
    assert same(a, subject(case, torch.tensor(7))), "the same key as a tensor gives another answer"
    assert not torch.equal(a, subject(case, 8)), "another key gives the same answer"


def check_any_strides(subject: Subject, case: Case) -> None:
    def scattered(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape, 2), 1e6, dtype=t.dtype)
        wide.movedim(-1, 0)[1].copy_(t)
        turned = wide[..., 1].movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)
        return turned if t.shape[0] > 1 and turned.stride() != t.stride() else wide[..., 1]

    inputs = (case.x, *case.refs(subject.refs))
    moved = [scattered(t) for t in inputs]
    assert not any(t.is_contiguous() for t in moved)
    assert_near(
        subject.explain(case)(*moved, **subject.extra()), subject(case), case.batching, "with other strides"
    )


def check_differentiable(subject: Subject, case: Case) -> None:
    """Forward mode, reverse mode and plain autograd agree about one directional derivative."""
    explain, x, refs = subject.explain(case), case.x, case.refs(subject.refs)
    run = lambda z: explain(z, *refs, **subject.extra())
    v = case.draw("direction", *case.shape)
    if not subject.differentiable:
        return _derivative_refused(run, x)
    a, change = jvp(run, (x,), (v,))
    w = case.draw("weights", *a.shape)
    (back,) = torch.func.vjp(run, x)[1](w)
    z = x.clone().requires_grad_()
    plain = run(z)
    assert plain.requires_grad, "the answer does not depend on an input that requires grad"
    (g,) = torch.autograd.grad((plain * w).sum(), z)
    assert torch.equal(torch.isfinite(change), torch.ones_like(change, dtype=torch.bool)), "jvp is not finite"
    assert_near(g, back, case.rounding, "plain autograd against vjp")
    scale = (change * w).abs().sum() + (back * v).abs().sum() + 1e-12
    off = float(((change * w).sum() - (back * v).sum()).abs() / scale)
    assert off <= 10 * case.rounding, f"jvp and vjp differ by {off:.2g}"
    assert_near(plain.detach(), subject(case), case.batching, "the answer while somebody differentiates")


def _derivative_refused(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """No derivative, rather than a wrong one, unless the explanation does not depend on the input."""
    a = run(x.clone().requires_grad_())
    if a.requires_grad:
        with pytest.raises(NotImplementedError, match="differentiated once"):
            a.sum().backward()


def check_derivative_right(subject: Subject, case: Case) -> None:
    """The derivative of an explanation is that of finite differences."""
    explain, x, refs = subject.explain(case), case.x, case.refs(subject.refs)
    run = lambda z: explain(z, *refs, **subject.extra())
    v = case.draw("direction", *case.shape)
    if not subject.differentiable:
        return _derivative_refused(run, x)
    _, change = jvp(run, (x,), (v,))
    h = 1e-5
    measured = (run(x + h * v) - run(x - h * v)) / (2 * h)
    scale = measured.abs().max() + run(x).abs().max() + 1e-6
    off = float((change - measured).abs().max() / scale)
    assert off < 1e-5, f"the derivative is off by {off:.2g}"


def _snapshot(module: nn.Module) -> dict[str, object]:
    hooks = [k for k in vars(module) if "hooks" in k]
    return {
        "state": {k: v.clone() for k, v in module.state_dict().items()},
        "identity": {k: id(v) for k, v in [*module.named_parameters(), *module.named_buffers()]},
        "watched": {k: p.requires_grad for k, p in module.named_parameters()},
        "gradients": {k: p.grad for k, p in module.named_parameters()},
        "training": {k: m.training for k, m in module.named_modules()},
        "hooks": {
            (k, h): dict(getattr(m, h)) for k, m in module.named_modules() for h in hooks if hasattr(m, h)
        },
        "attributes": {k: sorted(vars(m)) for k, m in module.named_modules()},
    }


def check_module_untouched(subject: Subject, case: Case) -> None:
    class Failing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            self.inner(x)
            raise ArithmeticError("inside forward")

    module = case.module
    module[0].weight.requires_grad_(False)
    before = _snapshot(module)
    model = eg.from_module(module)
    subject.build(eg.reducers.class_sum(model, 1))(case.x, *case.refs(subject.refs), **subject.extra())
    bad = eg.from_module(Failing(module).eval())
    explain = subject.build(lambda x: bad(x).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", eg.ExecutionWarning)
        if subject.stops_early:
            explain(case.x, *case.refs(subject.refs), **subject.extra())
        else:
            with pytest.raises(ArithmeticError, match="inside forward"):
                explain(case.x, *case.refs(subject.refs), **subject.extra())
    after = _snapshot(module)
    for what in before:
        if what == "state":
            assert all(same(v, after[what][k]) for k, v in before[what].items()), (
                "the module's values changed"
            )
        else:
            assert before[what] == after[what], f"the module's {what} changed"
    module[0].weight.requires_grad_(True)


def check_half_precision(subject: Subject, case: Case) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        w = case.draw("w", *case.shape).to(dtype)
        explain = subject.build(lambda x, w=w: (w * x + x.square() / 8).sum())
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", eg.ExecutionWarning
            )  # tolerances are out of reach in half precision
            a = explain(case.x.to(dtype), *[r.to(dtype) for r in case.refs(subject.refs)], **subject.extra())
        assert a.dtype == dtype, f"{a.dtype} instead of {dtype}"
        assert torch.isfinite(a).all(), f"not finite in {dtype}"


CHECKS: dict[str, Callable[[Subject, Case], None]] = {
    name.removeprefix("check_"): check for name, check in dict(globals()).items() if name.startswith("check_")
}

# -- on everything that is registered --------------------------------------------------------------------------

SMOOTH_2D = make_case("softplus", axes=2, channels=2)


def test_the_subjects_are_the_catalogue():
    catalogue = {name: (spec.refs, spec.key, spec.axioms) for name, spec in eg.catalogue()}
    found = {s.name: (s.refs, s.key, s.axioms) for s in SUBJECTS}
    assert found == {name: catalogue[name] for name in found}
    inner = {name: name.rpartition("(")[2].rstrip(")") for name in catalogue}
    assert {inner[name] for name in set(catalogue) - set(found)} == {
        name for name, spec in REGISTERED.items() if not transformed(spec)
    }
    assert set(REGISTERED) <= set(found)
    shapes = {spec.shape for spec in REGISTERED.values() if spec.place and transformed(spec)}
    assert shapes == {"map", "layer"}


def test_a_case_prints_as_the_call_that_rebuilds_it():
    for case in every_case():
        assert eval(repr(case)) == case
        assert torch.equal(eval(repr(case)).x, case.x)


@pytest.mark.parametrize("subject", METHODS, ids=repr)
@pytest.mark.parametrize("check", ["mates_free", "thread_free", "any_strides", "derivative_right"])
def test_contract_of_methods(check, subject):
    CHECKS[check](subject, SMOOTH_2D)


@pytest.mark.parametrize("subject", named(SUBJECTS))
@pytest.mark.parametrize(
    "check",
    [
        "shape_and_dtype",
        "repeatable",
        "world_untouched",
        "batched_equals_loop",
        "chunk_free",
        "differentiable",
        "half_precision",
    ],
)
def test_contract(check, subject):
    CHECKS[check](subject, SMOOTH_2D)


@pytest.mark.parametrize("subject", named([s for s in SUBJECTS if s.key]))
@pytest.mark.parametrize("check", ["key", "keys_per_example"])
def test_contract_of_random_ones(check, subject):
    CHECKS[check](subject, SMOOTH_2D)


@pytest.mark.parametrize("subject", named(SUBJECTS))
def test_the_module_is_untouched(subject):
    check_module_untouched(subject, make_case("segmentation", axes=2, channels=1))


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if not s.key], ids=repr)
def test_a_key_is_taken_only_where_something_is_drawn(subject):
    with pytest.raises(TypeError):
        subject.explain(SMOOTH_2D)(SMOOTH_2D.x, *SMOOTH_2D.refs(subject.refs), key=7)


@pytest.mark.parametrize("subject", METHODS, ids=repr)
@pytest.mark.parametrize(
    "case", every_case() + every_case("segmentation", "conv", "relu", dtype="float32"), ids=repr
)
def test_contract_on_every_score(case, subject):
    for check in ("shape_and_dtype", "repeatable", "python_generator", "batched_equals_loop"):
        CHECKS[check](subject, case)


@pytest.mark.parametrize("subject", METHODS, ids=repr)
@pytest.mark.parametrize("check", ["chunk_free", "mates_free", "any_strides", "differentiable"])
@pytest.mark.parametrize("case", [make_case("segmentation", axes=3, channels=2, seed=1)], ids=repr)
def test_contract_on_a_volume(case, check, subject):
    CHECKS[check](subject, case)


@pytest.mark.parametrize("subject", METHODS, ids=repr)
@given(case=drawn_cases)
@strict
def test_contract_on_drawn_cases(subject, case):
    check_shape_and_dtype(subject, case)
    check_world_untouched(subject, case)
    check_batched_equals_loop(subject, case)


def test_nested_maps_equal_loops():
    case = SMOOTH_2D
    for subject in METHODS:
        explain, refs = subject.explain(case), case.refs(subject.refs)
        xs = torch.stack([case.xs, case.xs.flip(0) / 2])
        run = lambda x: explain(x, *refs, **subject.extra())
        loop = torch.stack([torch.stack([run(x) for x in row]) for row in xs])
        assert_near(vmap(vmap(run))(xs), loop, case.batching, f"{subject}: vmap of vmap")
        assert_near(eg.batched(vmap(run))(xs), loop, case.batching, f"{subject}: batched of vmap")


def test_a_copied_module_gives_the_same_answer():
    case = make_case("segmentation", axes=2, channels=1)
    twin = eg.reducers.predicted_class_sum(eg.from_module(copy.deepcopy(case.module)), 1, at=case.x)
    for subject in METHODS:
        other = subject.build(twin)(case.x, *case.refs(subject.refs), **subject.extra())
        assert same(other, subject(case)), subject.name


@pytest.mark.parametrize(
    "kind",
    [
        "softplus",
        "segmentation",
    ],
)
def test_tensors_of_inference_mode_are_welcome(kind):
    case = make_case(kind, axes=2, channels=1)
    with torch.inference_mode():
        x = case.x.clone()
    assert same(eg.gradient(case.score)(x).clone(), eg.gradient(case.score)(case.x))
