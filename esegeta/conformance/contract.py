"""What every explanation keeps besides its axioms: the contract, as checks that raise ``AssertionError``.

A check takes a subject and a case. ``CHECKS`` has them by name; ``check(name, subject)`` runs one on a case that
suits it.
"""

import copy
import random as python_random
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from esegeta._facts import declared
from esegeta._types import Score
from esegeta.conformance.cases import Case
from esegeta.conformance.functions import Perceptron
from esegeta.conformance.networks import Network
from esegeta.conformance.subjects import Subject
from esegeta.engine.batching import batched
from esegeta.engine.execution import ExecutionWarning, execution
from esegeta.models import from_module


def draw(case: Case, what: str, *shape: int) -> Tensor:
    """Draw normal numbers that belong to this word."""
    generator = torch.Generator().manual_seed(zlib.crc32(what.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.x)


def examples(case: Case) -> Tensor:
    """Return three examples, of which the first is the case's own."""
    return torch.stack([case.x, 2 * draw(case, "x1", *case.x.shape), draw(case, "x2", *case.x.shape) - 1])


def references(case: Case, kinds: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Return references for each of the examples."""
    return tuple(torch.stack([r, r.flip(-1), 0.5 * r]) for r in case.refs(kinds))


def answer(subject: Subject, case: Case, key: "int | Tensor" = 7) -> Tensor:
    """Return the explanation of a case."""
    return subject.build(case.score)(case.x, *case.refs(subject.refs), **subject.extra(key))


def require(kept: bool | Tensor, otherwise: str) -> None:
    """Refuse what breaks the contract."""
    if not kept:
        raise AssertionError(otherwise)


def same(a: Tensor, b: Tensor) -> bool:
    """Compare bit for bit."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def assert_near(a: Tensor, b: Tensor, case: Case, what: str, times: float | int = 1) -> None:
    """Check that values are equal up to the rounding of the case."""
    require(a.shape == b.shape, f"{what}: {tuple(a.shape)} is not {tuple(b.shape)}")
    off, allowed = float((a - b).abs().max()), times * case.rounding(b.abs().amax())
    require(off <= allowed, f"{what}: differs by {off:.2g}, rounding allows {allowed:.2g}")


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def unchecked_types() -> Iterator[None]:
    """Turn off the run-time type checks of the tests, which draw from Python's global generator."""
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


# -- the checks ------------------------------------------------------------------------------------------------


def check_shape_and_dtype(subject: Subject, case: Case) -> None:
    """Check that an explanation is like its input, and finite."""
    x, a = case.x, answer(subject, case)
    expected = (1, *x.shape[1:]) if subject.one_channel else tuple(x.shape)
    require(isinstance(a, Tensor), f"{type(a)} instead of a tensor")
    require(tuple(a.shape) == expected, f"shape {tuple(a.shape)} instead of {expected}")
    require(a.dtype == x.dtype, f"dtype {a.dtype} instead of {x.dtype}")
    require(torch.isfinite(a).all(), "not finite")


def check_repeatable(subject: Subject, case: Case) -> None:
    """Check that the same call gives the same bits."""
    explain, arguments = subject.build(case.score), (case.x, *case.refs(subject.refs))
    first = explain(*arguments, **subject.extra())
    require(same(first, explain(*arguments, **subject.extra())), "a second call gives another answer")
    require(same(first, answer(subject, case)), "a second explanation gives another answer")


def check_world_untouched(subject: Subject, case: Case) -> None:
    """Check that no input, no random generator and no graph is changed."""
    inputs = (case.x, *case.refs(subject.refs))
    before = [t.clone() for t in inputs]
    versions = [t._version for t in inputs]
    numpy_state: Any = np.random.get_state()
    state = torch.get_rng_state(), numpy_state[1].copy()
    a = subject.build(case.score)(*inputs, **subject.extra())
    now: Any = np.random.get_state()
    require(torch.equal(state[0], torch.get_rng_state()), "torch's global generator moved")
    require(bool((state[1] == now[1]).all()), "NumPy's global generator moved")
    for t, kept, version in zip(inputs, before, versions, strict=True):
        require(same(t, kept), "an input changed")
        require(t._version == version, "an input was written to")
        require(not t.requires_grad, "an input requires grad")
        require(t.grad is None, "an input has a gradient")
    require(not a.requires_grad, "the answer requires grad")
    require(a.data_ptr() not in {t.data_ptr() for t in inputs}, "the answer is an input")


def check_python_generator(subject: Subject, case: Case) -> None:
    """Check that Python's own random generator is left alone."""
    with unchecked_types():
        state = python_random.getstate()
        answer(subject, case)
        require(state == python_random.getstate(), "Python's global generator moved")


def check_batched_equals_loop(subject: Subject, case: Case) -> None:
    """Check that a batch gives what a loop gives, by ``batched`` and by ``vmap``."""
    if not subject.mapped:
        return _own_batch(subject, case)
    explain, xs = subject.build(case.score), examples(case)
    mapped, shared = references(case, subject.refs), case.refs(subject.refs)
    loop = torch.stack([explain(*ts, **subject.extra()) for ts in zip(xs, *mapped, strict=True)])
    assert_near(batched(explain)(xs, *mapped, **subject.extra()), loop, case, "batched")
    straight = vmap(lambda *ts: explain(*ts, **subject.extra()))(xs, *mapped)
    assert_near(straight, loop, case, "vmap")
    if not shared or subject.composite:
        return
    dims = (0, *[None] * len(shared))
    loop = torch.stack([explain(x, *shared, **subject.extra()) for x in xs])
    sharing = batched(explain, in_dims=dims)(xs, *shared, **subject.extra())
    assert_near(sharing, loop, case, "batched with shared references")


def _own_batch(subject: Subject, case: Case) -> None:
    """What takes batches itself: a baseline for each example, but stacks of baselines that all share."""
    explain: Any = subject.build(case.score)
    xs, refs = examples(case), case.refs(subject.refs)
    given = [
        r.expand(xs.shape) if kind == "baseline" else r for kind, r in zip(subject.refs, refs, strict=True)
    ]
    loop = torch.stack([explain(x, *refs) for x in xs])
    own: Any = declared(explain).batched
    assert_near(own(xs, *given), loop, case, "its own batch")


def check_keys_per_example(subject: Subject, case: Case) -> None:
    """Check that each example of a batch may have a key of its own."""
    explain, xs, refs = subject.build(case.score), examples(case), references(case, subject.refs)
    keys = torch.tensor([3, 1, 4])
    loop = torch.stack([explain(*ts, key=int(k)) for k, *ts in zip(keys, xs, *refs, strict=True)])
    assert_near(batched(explain)(xs, *refs, key=keys), loop, case, "batched")
    straight = vmap(lambda k, *ts: explain(*ts, key=k))(keys, xs, *refs)
    assert_near(straight, loop, case, "vmap")


def check_chunk_free(subject: Subject, case: Case) -> None:
    """Check that the size of chunks changes nothing."""
    explain, xs, refs = subject.build(case.score), examples(case), references(case, subject.refs)
    answers = {}
    for chunk in (1, 3) if subject.composite else (1, 2, 3, 7):
        with execution(chunk=chunk):
            many = batched(explain)(xs, *refs, **subject.extra())
            answers[chunk] = many[0] if subject.composite else answer(subject, case), many
    for chunk, (one, many) in answers.items():
        assert_near(one, answers[1][0], case, f"chunk {chunk}")
        assert_near(many, answers[1][1], case, f"chunk {chunk}, batched")


def check_independent_of_batch(subject: Subject, case: Case) -> None:
    """Check that the other examples of a batch, and their order, change nothing."""
    explain, xs, refs = subject.build(case.score), examples(case), references(case, subject.refs)
    run = vmap(lambda *ts: explain(*ts, **subject.extra()))
    here = run(xs, *refs)
    others = run(torch.cat([xs[:1], 30 * xs[1:] + 5]), *refs)
    assert_near(others[0], here[0], case, "beside other examples")
    turned = run(xs.flip(0), *[r.flip(0) for r in refs]).flip(0)
    assert_near(turned, here, case, "in another order")


def check_thread_free(subject: Subject, case: Case) -> None:
    """Check that the number of threads changes nothing."""
    with threads(1):
        one = answer(subject, case)
    with threads(2):
        assert_near(answer(subject, case), one, case, "with two threads")


def check_key(subject: Subject, case: Case) -> None:
    """Check that a key decides all that is random."""
    a = answer(subject, case, 7)
    require(same(a, answer(subject, case, 7)), "the same key gives another answer")
    require(same(a, answer(subject, case, torch.tensor(7))), "the same key as a tensor gives another answer")
    require(not torch.equal(a, answer(subject, case, 8)), "another key gives the same answer")


def check_any_strides(subject: Subject, case: Case) -> None:
    """Check that tensors may lie in memory in any way."""

    def scattered(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape, 2), 1e6, dtype=t.dtype)
        wide.movedim(-1, 0)[1].copy_(t)
        turned = wide[..., 1].movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)
        return turned if t.shape[0] > 1 and turned.stride() != t.stride() else wide[..., 1]

    inputs = (case.x, *case.refs(subject.refs))
    moved = [scattered(t) for t in inputs]
    assert_near(
        subject.build(case.score)(*moved, **subject.extra()),
        answer(subject, case),
        case,
        "with other strides",
    )


def check_differentiable(subject: Subject, case: Case) -> None:
    """Check that forward mode, reverse mode and plain autograd agree about a directional derivative."""
    explain, x, refs = subject.build(case.score), case.x, case.refs(subject.refs)
    run = lambda z: explain(z, *refs, **subject.extra())
    v = draw(case, "direction", *case.x.shape)
    if not subject.differentiable:
        return _derivative_refused(run, x)
    a, change = jvp(run, (x,), (v,))[:2]
    w = draw(case, "weights", *a.shape)
    (back,) = torch.func.vjp(run, x)[1](w)
    z = x.clone().requires_grad_()
    plain = run(z)
    require(plain.requires_grad, "the answer does not depend on an input that requires grad")
    (g,) = torch.autograd.grad((plain * w).sum(), z)
    require(
        torch.equal(torch.isfinite(change), torch.ones_like(change, dtype=torch.bool)), "jvp is not finite"
    )
    assert_near(g, back, case, "plain autograd against vjp")
    off = float(((change * w).sum() - (back * v).sum()).abs())
    allowed = case.rounding((change * w).abs().sum(), (back * v).abs().sum())
    require(off <= allowed, f"jvp and vjp differ by {off:.2g}, rounding allows {allowed:.2g}")
    assert_near(plain.detach(), answer(subject, case), case, "the answer while somebody differentiates")


def _derivative_refused(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """No derivative, rather than a wrong one, unless the explanation does not depend on the input."""
    a = run(x.clone().requires_grad_())
    if a.requires_grad:
        try:
            a.sum().backward()
        except NotImplementedError as refusal:
            require("differentiated once" in str(refusal), f"refused for another reason: {refusal}")
        else:
            require(False, "a derivative, where its own declaration says that there is none")


def check_derivative_right(subject: Subject, case: Case) -> None:
    """Check that the derivative of an explanation is that of finite differences."""
    explain, x, refs = subject.build(case.score), case.x, case.refs(subject.refs)
    run = lambda z: explain(z, *refs, **subject.extra())
    v = draw(case, "direction", *case.x.shape)
    if not subject.differentiable:
        return _derivative_refused(run, x)
    change = jvp(run, (x,), (v,))[1]
    h = 1e-5
    measured = (run(x + h * v) - run(x - h * v)) / (2 * h)
    scale = measured.abs().max() + run(x).abs().max() + 1e-6
    off = float((change - measured).abs().max() / scale)
    require(off < 1e-5, f"the derivative is off by {off:.2g}")


def _snapshot(module: nn.Module) -> dict[str, Any]:
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
    """Check that the network is as it was, also after an error inside it."""

    class Failing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            self.inner(x)
            raise ArithmeticError("inside forward")

    module = case.score.module
    watched = [p.requires_grad for p in module.parameters()]
    for i, p in enumerate(module.parameters()):
        p.requires_grad_(i > 0)
    before = _snapshot(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExecutionWarning)  # of a network that is piecewise linear
        subject.build(from_module(module))(case.x, *case.refs(subject.refs), **subject.extra())
    _unchanged(before, _snapshot(module))
    explain = subject.build(from_module(Failing(module).eval()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExecutionWarning)
        if subject.stops_early:
            explain(case.x, *case.refs(subject.refs), **subject.extra())
        else:
            try:
                explain(case.x, *case.refs(subject.refs), **subject.extra())
            except ArithmeticError:
                pass
            else:
                require(False, "an error inside the network was swallowed")
    _unchanged(before, _snapshot(module))
    for p, was in zip(module.parameters(), watched, strict=True):
        p.requires_grad_(was)


def _unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what in before:
        if what == "state":
            kept = all(same(v, after[what][k]) for k, v in before[what].items())
            require(kept, "the module's values changed")
        else:
            require(before[what] == after[what], f"the module's {what} changed")


def _bowl(w: Tensor) -> Score:
    return lambda x: (w * x + x.square() / 8).sum()


def check_half_precision(subject: Subject, case: Case) -> None:
    """Check that half precision in gives half precision out."""
    for dtype in (torch.float16, torch.bfloat16):
        w = draw(case, "w", *case.x.shape).to(dtype)
        explain = subject.build(_bowl(w))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExecutionWarning)  # tolerances are out of reach in half precision
            a = explain(case.x.to(dtype), *[r.to(dtype) for r in case.refs(subject.refs)], **subject.extra())
        require(a.dtype == dtype, f"{a.dtype} instead of {dtype}")
        require(torch.isfinite(a).all(), f"not finite in {dtype}")


CHECKS: dict[str, Callable[[Subject, Case], None]] = {
    name.removeprefix("check_"): check for name, check in dict(globals()).items() if name.startswith("check_")
}


# What a transform can break that the method inside keeps.
OF_TRANSFORMS = (
    "shape_and_dtype",
    "repeatable",
    "batched_equals_loop",
    "chunk_free",
    "key",
    "keys_per_example",
)


def waves(*shape: int, step: float | int) -> Tensor:
    """Return numbers between -2 and 2 in no order, none of them zero or like another one."""
    size = torch.Size(shape).numel()
    return (2 * torch.sin(step * torch.arange(1.0, 1 + size))).round(decimals=3).reshape(shape)


SMOOTH = Case(
    Perceptron(
        tuple(tuple(row) for row in (waves(2, 24, step=5) / 4).tolist()), (0.25, -0.5), (2, -1), "softplus"
    ),
    waves(2, 3, 4, step=7),
    waves(2, 3, 4, step=3),
    waves(3, 2, 3, 4, step=11),
)
NETWORK = Case(
    Network((1, 3, 4), ("conv", "batch norm", "relu", "conv"), "sum", 3),
    [[[0.5, -1.25, 2, 1], [1, 0.75, -0.5, 0.25], [-1, 2, 1.5, 0]]],
    [[[0, 0.25, 1, 0], [-1, 0.5, 0, 1], [0, 0.5, 0, -1]]],
    [[[[0, 0.25, 1, 0], [-1, 0.5, 0, 1], [0, 0.5, 0, -1]]], [[[1, 0, -1, 0.5], [0, 0, 1, 2], [1, 1, 0, 0]]]],
)


def inapplicable(name: str, subject: Subject) -> str:
    """Return why a check says nothing about a subject; empty if it does."""
    if name in ("key", "keys_per_example") and not subject.key:
        return "it draws nothing at random"
    if name == "half_precision" and subject.wants == "module":
        return "it explains networks, and those of the suite are not in half precision"
    if name in ("keys_per_example", "chunk_free", "independent_of_batch") and not subject.mapped:
        return "vmap does not map over it"
    if name == "batched_equals_loop" and not subject.mapped and subject.key:
        return "it draws for a batch as a whole"
    return ""


def check(name: str, subject: Subject) -> None:
    """Run one check of the contract, on a case that suits it and the subject."""
    network = name == "module_untouched" or subject.wants == "module"
    # A copy: what breaks the contract by writing to its input does so for no other.
    CHECKS[name](subject, copy.deepcopy(NETWORK if network else SMOOTH))
