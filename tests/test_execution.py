"""How to compute: scoped, per thread, recorded; and the gradient primitive and the levels beneath it."""

import threading
import time

import pytest
import torch
from rounding import assert_alike, close
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import esegeta as eg
from esegeta.engine import levels
from esegeta.engine.execution import Execution, current, parse_memory, record
from esegeta.engine.gradient import gradient, value_and_gradient
from esegeta.engine.memory import Live

# ------------------------------------------------------------------ settings


def test_settings_nest_and_are_restored():
    assert current() == Execution()
    with eg.execution(chunk=3, memory="2 MiB") as outer:
        assert current() is outer
        with eg.execution(chunk=5, layout="contiguous") as inner:
            assert (inner.chunk, inner.memory, inner.layout) == (5, 2**21, "contiguous")
        assert current() is outer
        assert (outer.chunk, outer.layout) == (3, "auto")
        with pytest.raises(ZeroDivisionError), eg.execution(chunk=1):
            raise ZeroDivisionError
        assert current() is outer
    assert current() == Execution()


def test_an_inner_deadline_cannot_prolong_an_outer_one():
    with eg.execution(deadline=5.0) as outer:
        with eg.execution(deadline=100.0) as inner:
            assert inner.deadline == outer.deadline
        with eg.execution(deadline=0.5) as inner:
            assert inner.left() <= 0.5 < outer.left()
        with eg.execution(chunk=1) as inner:
            assert inner.deadline == outer.deadline
    assert current().left() == float("inf")


def test_settings_are_those_of_the_thread():
    seen = {}

    def work():
        seen["fresh"] = current().chunk
        with eg.execution(chunk=9):
            inside.set()
            assert leave.wait(10)
            seen["own"] = current().chunk

    inside, leave = threading.Event(), threading.Event()
    with eg.execution(chunk=3) as run:
        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(10)
        assert current() is run
        leave.set()
        thread.join()
    assert seen == {"fresh": None, "own": 9}


def fail_inside(settings):
    with eg.execution() as run:
        settings.append(run)
        record("b", "two")
        raise KeyError


def test_events_reach_every_context_around_in_order():
    with eg.execution() as outer:
        with eg.execution() as first, pytest.warns(eg.ExecutionWarning, match="^one$"):
            record("a", "one", size=1)
        second = []
        with pytest.raises(KeyError), pytest.warns(eg.ExecutionWarning, match="two"):
            fail_inside(second)
        with pytest.warns(eg.ExecutionWarning, match="three"):
            record("c", "three")
    assert [e["event"] for e in outer.events] == ["a", "b", "c"]
    assert first.events == [{"event": "a", "message": "one", "size": 1}]
    assert [e["event"] for e in second[0].events] == ["b"]
    with eg.execution() as fresh:
        pass
    assert fresh.events == []
    assert current().events == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("4 GiB", 2**32), ("3MB", 3 * 10**6), (" 2 KiB ", 2048), ("5 B", 5), (7, 7), (2.5e3, 2500)],
)
def test_memory_in_words(text, size):
    assert parse_memory("execution", text) == size


@pytest.mark.parametrize("bad", ["4", "GiB", "-1 MB", "nan B", 0, float("inf"), True, "4 gib"])
def test_bad_memory_is_refused(bad):
    with pytest.raises(ValueError, match=r"^execution: expected memory in bytes or as"):
        parse_memory("execution", bad)


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"chunk": 0}, "chunk to be an int >= 1"),
        ({"deadline": -1.0}, "deadline to be a finite number"),
        ({"memory": "much"}, "memory in bytes"),
    ],
)
def test_bad_settings_are_refused(setting, error):
    with pytest.raises(ValueError, match=error), eg.execution(**setting):
        pass
    assert current() == Execution()


def test_the_deadline_counts_from_now():
    with eg.execution(deadline=0.2) as run:
        assert 0.1 < run.left() <= 0.2
        time.sleep(0.05)
        assert run.left() < 0.16


# ------------------------------------------------------------------ precision


def test_reduced_precision_is_inside_of_networks_only():
    dtypes = []
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 3)).eval()
    net[2].register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))
    model, x = eg.from_module(net), torch.randn(2, 8, 8)
    explain = eg.integrated_gradients(lambda x: model(x).square().sum(), steps=16)
    full = explain(x, 0 * x)
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    with eg.execution(precision="bfloat16", chunk=4) as run:
        assert model(x).dtype == torch.float32
        reduced = explain(x, 0 * x)
    assert torch.bfloat16 in dtypes
    assert reduced.dtype == torch.float32
    assert not torch.equal(reduced, reduced.bfloat16().float())  # summed up in float32
    error = ((reduced - full).norm() / full.norm()).item()
    assert 1e-5 < error < 0.1
    assert run.events == []


def test_a_non_finite_result_is_computed_again_in_full_precision():
    net = nn.Conv1d(1, 1, 1, bias=False).eval()
    nn.init.constant_(net.weight, 60000.0)
    model, xs = eg.from_module(net), torch.full((2, 1, 3), 10.0)
    both = lambda: (vmap(model)(xs), vmap(grad(lambda x: model(x).sum()))(xs))
    message = "^Conv1d: result not finite in torch.float16, computed again in torch.float32"
    with eg.execution(precision="float16") as run, pytest.warns(eg.ExecutionWarning, match=message):
        y, g = both()
    assert torch.equal(y, 60000 * xs)
    assert torch.equal(g, torch.full_like(xs, 60000.0))
    assert {e["event"] for e in run.events} == {"precision"}


def test_a_non_finite_gradient_is_computed_again_in_full_precision():
    net = nn.Conv1d(1, 1, 1, bias=False).eval()
    nn.init.constant_(net.weight, 100.0)
    model, x = eg.from_module(net), torch.full((1, 3), 1e-5)
    score = lambda x: (model(x) * 1e5).sum()
    with eg.execution(precision="float16"), pytest.warns(eg.ExecutionWarning, match="not finite"):
        assert torch.isfinite(grad(score)(x)).all()


def test_float64_networks_keep_their_precision_by_default():
    net = nn.Conv1d(1, 2, 2).double().eval()
    x = torch.randn(1, 5, dtype=torch.float64)
    assert_alike(eg.from_module(net)(x), net(x[None])[0].detach())


# ------------------------------------------------------------------ the gradient primitive


def chain(x):
    for _ in range(20):
        x = x.sin() * 1.5
    return x.sum()


def peak(fn, *args):
    with Live() as live:
        fn(*args)
    return live.peak


def test_no_graph_of_the_gradient_unless_somebody_asks():
    xs = torch.randn(8, 1000)
    z = xs.clone().requires_grad_()
    plain = peak(lambda: torch.autograd.grad(chain(z), z))
    graph = peak(lambda: torch.autograd.grad(chain(z), z, create_graph=True))
    assert graph > 1.4 * plain
    assert peak(vmap(gradient(chain)), xs) < 1.1 * plain
    with torch.no_grad():
        assert peak(vmap(gradient(chain)), xs) < 1.1 * plain
    assert peak(vmap(grad(chain)), xs) > 1.4 * plain


def test_activations_are_freed_while_the_gradient_runs():
    def funnel(x):
        x = (x * torch.ones(20, 1)).sin().sum(0)  # its gradient, the last one, is the largest
        return chain(x)

    x = torch.randn(1000)
    z = x.clone().requires_grad_()
    freed = peak(lambda: torch.autograd.grad(funnel(z), z))
    kept = peak(lambda: torch.autograd.grad(funnel(z), z, retain_graph=True))
    assert kept > 1.1 * freed
    assert peak(gradient(funnel), x) < 1.05 * freed


def cube(x):
    return (x**3).sum() * x[0].sin()


@pytest.mark.parametrize(
    "outer",
    [
        lambda g: jacrev(g),
        lambda g: jacfwd(g),
        lambda g: grad(lambda x: g(x).square().sum()),
        lambda g: hessian(lambda x: g(x).square().sum()),
        lambda g: lambda x: jvp(g, (x,), (x.cos(),))[1],
        lambda g: lambda x: vmap(jacrev(g))(torch.stack([x, 2 * x])),
        lambda g: lambda x: vmap(lambda t: grad(lambda y: g(y * t).sum())(x))(x),
        lambda g: lambda x: torch.autograd.functional.jacobian(g, x),
        lambda g: lambda x: torch.autograd.functional.jacobian(lambda y: vmap(g)(torch.stack([y, 2 * y])), x),
        lambda g: lambda x: torch.autograd.functional.hvp(lambda y: g(y).square().sum(), x, x.cos())[1],
    ],
)
@pytest.mark.parametrize("folded", [False, True])
def test_derivatives_of_the_gradient(outer, folded):
    x = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    model = eg.from_module(lambda x: (x**3).sum(1) * x[:, 0].sin())
    score = model if folded else cube
    close(outer(gradient(score))(x), outer(grad(cube))(x))


def test_forward_mode_of_plain_autograd_over_the_gradient():
    from torch.autograd import forward_ad

    x = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(gradient(cube)(forward_ad.make_dual(x, x.cos()))).tangent
    close(tangent, hessian(cube)(x) @ x.cos())


def test_derivatives_of_the_gradient_by_weights_that_the_score_reads():
    w = nn.Parameter(torch.tensor([0.5, -0.4, 1.1], dtype=torch.float64))
    x = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)

    def loss(weights):
        return gradient(lambda z: ((z * weights) ** 3).sum().sin())(x).square().sum()

    step = 1e-6
    numeric = torch.stack(
        [
            (loss(w.detach() + step * e) - loss(w.detach() - step * e)) / (2 * step)
            for e in torch.eye(3).double()
        ]
    )
    (by_autograd,) = torch.autograd.grad(loss(w), w)
    close(by_autograd, numeric, 1e-7)
    close(grad(loss)(w.detach()), numeric, 1e-7)
    mapped = vmap(gradient(lambda z: ((z * w) ** 3).sum().sin()))(torch.stack([x, x]))
    (by_mapped,) = torch.autograd.grad(mapped[1].square().sum(), w)
    close(by_mapped, numeric, 1e-7)
    tangent = jvp(loss, (w.detach(),), (torch.ones(3, dtype=torch.float64),))[1]
    close(tangent, numeric.sum(), 1e-7)


def test_value_and_gradient_are_one_forward_run():
    calls = []
    model = eg.from_module(lambda x: (calls.append(len(x)), x**2)[1])
    y, g = value_and_gradient(lambda x: model(x).sum())(torch.tensor([1.0, 3.0]))
    assert (y.item(), g.tolist(), calls) == (10, [2, 6], [1])
    assert not g.requires_grad


def test_scores_without_gradient_and_without_scalar_value_are_refused():
    x, w = torch.ones(1, 3), nn.Parameter(torch.ones(3))
    for dead in (lambda x: x.detach().sum(), lambda x: (x > 0).sum().float(), lambda x: w.sum()):
        for ask in (gradient(dead), lambda x, s=dead: vmap(gradient(s))(x[None])):
            with pytest.raises(ValueError, match="gradient: expected a score that depends on its input"):
                ask(x)
    with pytest.raises(
        ValueError, match=r"gradient: expected a score with a value of shape \(\), got float32\(1, 3\)"
    ):
        gradient(lambda x: x)(x)


def test_a_constant_score_is_refused_while_somebody_differentiates_by_its_weights():
    with pytest.raises(ValueError, match="gradient: expected a score that depends on its input"):
        grad(lambda w: gradient(lambda x: (w * x.detach()).sum())(torch.ones(3)).sum())(torch.ones(3))


# ------------------------------------------------------------------ levels


def test_levels_see_through_every_nest():
    x = torch.tensor([[1.0, 3.0], [0.0, 0.5]])
    seen = []

    def look(z):
        seen.append((levels.true_anywhere(z > 2), levels.true_anywhere(z > 4), levels.base(z).numel()))
        return z * 1

    total = lambda z: look(z).sum()
    for nest in (
        look,
        vmap(look),
        vmap(look, in_dims=1),
        grad(total),
        vmap(grad(total)),
        vmap(vmap(look)),
        lambda x: jvp(look, (x,), (x,)),
        vmap(lambda z: jvp(grad(total), (z,), (z,))[1]),
        vmap(jacrev(jacfwd(look))),
        lambda x: vmap(lambda z: grad(lambda y: vmap(look)(y[None]).sum())(z))(x),
        lambda x: look(x.clone().requires_grad_()),
    ):
        nest(x)
        assert seen
        # the smaller example is never looked at alone
        assert set(seen) == {(True, False, 4)}
        seen.clear()
    assert type(levels.base(x)) is torch.Tensor
    assert levels.base(x) is x


def test_levels_say_who_is_around():
    seen = {}

    def note(name):
        def f(x):
            seen[name] = (levels.mapped(), levels.watched(x), levels.differentiating(), levels.wrapped(x))
            return x * 1.0

        return f

    x = torch.ones(3, 4)
    note("none")(x)
    vmap(vmap(note("maps")))(x)
    grad(lambda x: note("grad")(x).sum())(x)
    vmap(grad(lambda x: note("map grad")(x).sum()))(x)
    jvp(note("jvp"), (x,), (x,))
    grad(lambda x: vmap(note("grad map"))(x).sum())(x)
    assert seen == {
        "none": (1, False, False, False),
        "maps": (12, False, False, True),
        "grad": (1, True, True, True),
        "map grad": (3, True, True, True),
        "jvp": (1, False, True, True),
        "grad map": (3, True, True, True),
    }
