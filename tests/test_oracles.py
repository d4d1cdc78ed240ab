"""Answers known in closed form, and the definitions of the papers as slow plain loops."""

import itertools

import numpy as np
import pytest
import torch
from cases import every_case, make_case
from rounding import close
from torch import Tensor

import esegeta as eg
from esegeta.engine.folded import fold
from esegeta.random import fold_in, normal, permutation, uniform

DOUBLE = torch.float64


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=DOUBLE)


def slope(score, x: Tensor) -> Tensor:
    """The gradient by ordinary autograd, with none of the library's machinery."""
    z = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(score(z), z)
    return g


# -- closed forms ----------------------------------------------------------------------------------------------


@pytest.fixture
def weights() -> tuple[Tensor, Tensor, Tensor]:
    case = make_case("linear", axes=2)
    return case.draw("w", *case.shape), case.x, *case.refs(("baseline",))


def test_a_linear_score(weights):
    w, x, b = weights
    score = lambda z: (w * z).sum() + 3
    share = w * (x - b)
    close(eg.gradient(score)(x), w)
    close(eg.saliency(score)(x), w.abs())
    close(eg.input_x_gradient(score)(x), w * x)
    close(eg.integrated_gradients(score, steps=1)(x, b), share)
    close(eg.adaptive_integrated_gradients(score)(x, b), share)
    close(eg.guided_integrated_gradients(score, steps=5)(x, b), share)
    close(eg.guided_integrated_gradients(score, steps=5, distance=0.0)(x, b), share)
    close(eg.expected_gradients(score, samples=3)(x, b[None], key=1), share)
    close(eg.gradient_shap(score, samples=3)(x, b[None], key=1), share)
    close(eg.smooth(eg.gradient(score))(x, key=1), w)
    close(eg.variance(eg.gradient(score))(x, key=1), 0 * w, 1e-28)
    close(eg.idgi(score, steps=3)(x, b), share.sum() * w**2 / w.square().sum())
    blurred = eg.spatial.blur(x, 1.5)
    close(eg.blur_integrated_gradients(score, sigma=1.5, steps=40)(x), w * (x - blurred), 1e-7)


def test_a_product():
    score = lambda z: z[0, 0] * z[0, 1]
    x, zero = row(3, 5), row(0, 0)
    close(eg.integrated_gradients(score, steps=1)(x, zero), row(7.5, 7.5))
    close(eg.adaptive_integrated_gradients(score)(x, zero), row(7.5, 7.5))
    close(eg.input_x_gradient(score)(x), row(15, 15))


def test_a_maximum():
    score = lambda z: torch.maximum(z[0, 0], z[0, 1])
    close(eg.integrated_gradients(score)(row(5, 2), row(0, 0)), row(5, 0))
    close(eg.integrated_gradients(lambda z: z.amax())(row(5, 2), row(0, 0)), row(5, 0))


def test_a_saturated_score():
    score = lambda z: z.clamp(max=1).sum()
    x, zero = row(2), row(0)
    close(eg.gradient(score)(x), row(0))
    close(eg.input_x_gradient(score)(x), row(0))
    close(eg.integrated_gradients(score, steps=64)(x, zero), row(1))
    close(eg.integrated_gradients(score, steps=64, rule="midpoint")(x, zero), row(1))
    close(eg.adaptive_integrated_gradients(score, tolerance=1e-3)(x, zero), row(1), 1e-3)
    close(eg.idgi(score, steps=4)(x, zero), row(1))
    close(eg.guided_integrated_gradients(score, steps=200)(x, zero), row(1), 0.02)


@pytest.mark.parametrize("h", [torch.sin, torch.exp, lambda z: z**4 - z], ids=["sin", "exp", "quartic"])
def test_an_additive_score(h, weights):
    _, x, b = weights
    score = lambda z: h(z).sum()
    close(eg.integrated_gradients(score, steps=24)(x, b), h(x) - h(b))
    many = torch.stack([b, -b])
    mean = h(x) - h(many).mean(0)
    close(eg.over_baselines(eg.integrated_gradients(score, steps=24))(x, many), mean)


@pytest.mark.parametrize(("degree", "enough"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)])
def test_gauss_legendre_needs_half_the_degree(degree, enough):
    score = lambda z: (z[0, 0] + 2 * z[0, 1]) ** degree
    x, b = row(1, 0.5), row(-0.5, 0.25)
    residual = lambda n: abs(
        float(eg.axioms.completeness(eg.integrated_gradients(score, steps=n), score)(x, b))
    )
    assert residual(enough) < 1e-12
    if enough > 1:
        assert residual(enough - 1) > 1e-3


def test_any_quadratic_needs_one_node():
    case = make_case("quadratic", axes=3)
    b = case.refs(("baseline",))[0]
    expected = (case.x - b) * slope(case.score, (case.x + b) / 2)
    close(eg.integrated_gradients(case.score, steps=1)(case.x, b), expected)
    close(eg.integrated_gradients(case.score, steps=9, rule="trapezoid")(case.x, b), expected)
    close(eg.integrated_gradients(case.score, steps=3, rule="midpoint")(case.x, b), expected)


def test_a_network_of_relus_without_biases():
    case = make_case("relu", axes=2)
    first, second = case.draw("a", 8, case.x.numel()), case.draw("b", 8)
    score = lambda z: (second * (first @ z.flatten()).relu()).sum()
    taylor = eg.input_x_gradient(score)(case.x)
    close(taylor.sum(), score(case.x))
    close(eg.integrated_gradients(score, steps=3)(case.x, torch.zeros_like(case.x)), taylor)


def test_rules_by_hand():
    score, x, b = (lambda z: (z**3).sum()), row(2), row(0)
    f = lambda *pairs: row(sum(w * 3 * (2 * t) ** 2 * 2 for t, w in pairs))
    by = lambda rule, n: eg.integrated_gradients(score, steps=n, rule=rule)(x, b)
    close(by("left", 2), f((0, 0.5), (0.5, 0.5)))
    close(by("right", 2), f((0.5, 0.5), (1, 0.5)))
    close(by("midpoint", 2), f((0.25, 0.5), (0.75, 0.5)))
    close(by("trapezoid", 3), f((0, 0.25), (0.5, 0.5), (1, 0.25)))


# -- the papers as loops -----------------------------------------------------------------------------------------


def ig_loop(score, x, b, steps):
    nodes, w = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(x)
    for t, weight in zip((nodes + 1) / 2, w / 2, strict=True):
        total += weight * slope(score, b + t * (x - b))
    return (x - b) * total


def idgi_loop(score, x, b, steps):
    total = torch.zeros_like(x)
    for k in range(steps):
        here, there = b + k / steps * (x - b), b + (k + 1) / steps * (x - b)
        g = slope(score, here)
        if float(g.square().sum()) > 0:
            total += (score(there) - score(here)) * g.square() / g.square().sum()
    return total


def blur_loop(score, x, sigma, steps):
    nodes, w = np.polynomial.legendre.leggauss(steps)
    total, h = torch.zeros_like(x), 1e-5
    for t, weight in zip((nodes + 1) / 2 * sigma, w / 2 * sigma, strict=True):
        change = (eg.spatial.blur(x, float(t + h)) - eg.spatial.blur(x, float(t - h))) / (2 * h)
        total -= weight * slope(score, eg.spatial.blur(x, float(t))) * change
    return total


def guided_loop(score, x, b, steps, fraction, distance):
    """Move the calmest movable elements, a block at a time, until the distance left is what it should be."""
    line = x - b
    whole, size = float(line.abs().sum()), int(fraction * (x.numel() - 1)) + 1
    here, total = b.clone(), torch.zeros_like(x)
    for k in range(steps):
        g = slope(score, here)
        alpha = (k + 1) / steps
        low, high = b + max(alpha - distance, 0) * line, b + min(alpha + distance, 1) * line
        before = here.clone()
        done = torch.where(line == 0, 1.0, (here - b) / torch.where(line == 0, 1.0, line))
        here = torch.where(done < max(alpha - distance, 0), low, here)
        goal = whole * (1 - alpha)
        calm = g.abs().flatten().argsort(stable=True).tolist()
        gap = (high - here).flatten()
        queue = [i for i in calm if abs(float(gap[i])) > 0 and float(gap[i] * line.flatten()[i]) > 0]
        while queue:
            left = float((x - here).abs().sum()) - goal
            if left <= 0:
                break
            block, queue = queue[:size], queue[size:]
            room = float(gap[block].abs().sum())
            share = min(1.0, left / room)
            moved = here.flatten().clone()
            moved[block] += share * gap[block]
            here = moved.reshape(x.shape)
        total += g * (here - before)
    return total


def expected_loop(score, x, baselines, key, samples, noise=None):
    order = permutation(fold_in(key, 0), samples)
    offsets = uniform(fold_in(key, 1), (samples,), dtype=x.dtype)
    total = torch.zeros_like(x)
    for i in range(samples):
        t = (float(order[i]) + float(offsets[i])) / samples
        b = baselines[i % len(baselines)]
        z = (
            x
            if noise is None
            else x + noise * (x.max() - x.min()) * normal(fold_in(key, i + 2), x.shape, dtype=x.dtype)
        )
        total += (z - b) * slope(score, b + t * (z - b))
    return total / samples


def noisy_loop(explain, x, key, samples, noise):
    sigma = noise * (x.max() - x.min())
    return torch.stack(
        [explain(x + sigma * normal(fold_in(key, i), x.shape, dtype=x.dtype)) for i in range(samples)]
    )


LOOPED = [make_case("softplus", axes=1), make_case("conv", axes=2), make_case("cubic", axes=3, channels=1)]
looped = pytest.mark.parametrize("case", LOOPED, ids=repr)


@looped
def test_integrated_gradients_are_the_loop(case):
    b = case.refs(("baseline",))[0]
    close(eg.integrated_gradients(case.score, steps=7)(case.x, b), ig_loop(case.score, case.x, b, 7))


@looped
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_idgi_is_the_loop(case, steps):
    b = case.refs(("baseline",))[0]
    close(eg.idgi(case.score, steps=steps)(case.x, b), idgi_loop(case.score, case.x, b, steps))


@looped
def test_blur_integrated_gradients_are_the_loop(case):
    ours = eg.blur_integrated_gradients(case.score, sigma=2.0, steps=6)(case.x)
    close(ours, blur_loop(case.score, case.x, 2.0, 6), 1e-7)


@looped
@pytest.mark.parametrize(
    ("steps", "fraction", "distance"),
    [(8, 0.25, 0.02), (5, 0.1, 0.3), (6, 0.5, 1.0), (7, 1.0, 0.1), (4, 0.01, 0.5)],
)
def test_guided_integrated_gradients_are_the_loop(case, steps, fraction, distance):
    b = case.refs(("baseline",))[0].clone()
    b.view(-1)[1] = case.x.reshape(-1)[1]  # one element that does not move
    ours = eg.guided_integrated_gradients(case.score, steps=steps, fraction=fraction, distance=distance)
    close(ours(case.x, b), guided_loop(case.score, case.x, b, steps, fraction, distance), 1e-9)


@looped
def test_guided_without_a_band_is_the_left_rule(case):
    b = case.refs(("baseline",))[0]
    ours = eg.guided_integrated_gradients(case.score, steps=6, distance=0.0)(case.x, b)
    close(ours, eg.integrated_gradients(case.score, steps=6, rule="left")(case.x, b), 1e-10)


@looped
@pytest.mark.parametrize("samples", [2, 3, 8])
def test_expected_gradients_are_the_loop(case, samples):
    many = case.refs(("baselines",))[0]
    ours = eg.expected_gradients(case.score, samples=samples)(case.x, many, key=5)
    close(ours, expected_loop(case.score, case.x, many, 5, samples))
    ours = eg.gradient_shap(case.score, samples=samples, noise=0.2)(case.x, many, key=5)
    close(ours, expected_loop(case.score, case.x, many, 5, samples, noise=0.2))


@looped
def test_smoothing_is_the_two_pass_loop(case):
    explain = lambda x: slope(case.score, x)
    maps = noisy_loop(explain, case.x, 3, 6, 0.15)
    ours = eg.gradient(case.score)
    close(eg.smooth(ours, noise=0.15, samples=6)(case.x, key=3), maps.mean(0))
    close(eg.smooth_squared(ours, noise=0.15, samples=6)(case.x, key=3), maps.square().mean(0))
    close(eg.variance(ours, noise=0.15, samples=6)(case.x, key=3), (maps - maps.mean(0)).square().mean(0))


def test_the_variance_does_not_cancel():
    score = lambda z: 1e8 * z.sum() + torch.sin(z).sum()
    x = make_case("cubic").x
    maps = noisy_loop(lambda z: torch.cos(z), x, 3, 20, 0.1)
    ours = eg.variance(eg.gradient(score), noise=0.1, samples=20)(x, key=3)
    close(ours, maps.var(0, unbiased=False), 1e-6)
    assert (ours >= 0).all()


def test_weight_noise_is_the_loop():
    case = make_case("softplus", axes=2)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.Softplus(), torch.nn.Conv2d(3, 2, 1)
    ).double()
    build, parameters = eg.models.parametrised(net.eval())
    ours = eg.noise_grad(
        lambda p: eg.gradient(lambda x: build(p)(x)[1].sum()), parameters, noise=0.3, samples=4
    )
    total = torch.zeros_like(case.x)
    for i in range(4):
        here = fold_in(9, i)
        noisy = {
            name: p * (1 + 0.3 * normal(fold_in(here, k), tuple(p.shape), dtype=p.dtype))
            for k, (name, p) in enumerate(sorted(parameters.items()))
        }
        total += slope(lambda x: torch.func.functional_call(net, noisy, (x[None],))[0, 1].sum(), case.x)
    close(ours(case.x, key=9), total / 4)
    for name, p in net.named_parameters():
        assert torch.equal(p, parameters[name])


def test_expected_gradients_converge():
    case = make_case("softplus", axes=2)
    many = case.refs(("baselines",))[0]
    exact = eg.over_baselines(eg.integrated_gradients(case.score, steps=40))(case.x, many)
    errors = []
    for samples in (6, 96):
        a = eg.expected_gradients(case.score, samples=samples)(case.x, many, key=0)
        errors.append(float((a - exact).abs().max()))
    assert errors[1] < errors[0] / 2


# -- integration to a tolerance ------------------------------------------------------------------------------------


def exact_relu(case, x, b):
    """Between the places where a unit switches, the gradient is constant."""
    size = x.numel()
    first, bias = case.draw("first", 6, size) / size**0.5, case.draw("bias", 6) / 2
    start, rate = first @ b.flatten() + bias, first @ (x - b).flatten()
    breaks = (-start / rate).tolist()
    t = sorted({0.0, 1.0, *[v for v in breaks if 0 < v < 1]})
    total = torch.zeros_like(x)
    for low, high in itertools.pairwise(t):
        total += (high - low) * slope(case.score, b + (low + high) / 2 * (x - b))
    return (x - b) * total


RELUS = [make_case("relu", axes=1 + s % 3, seed=s) for s in range(6)]


def counted(score):
    """The score, with a count of the examples that it was called on."""
    seen = []
    inner = fold(lambda xs: (seen.append(len(xs)), (torch.func.vmap(score)(xs),))[1], "counted")
    return lambda x: inner(x)[0], seen


@pytest.mark.parametrize("case", RELUS, ids=repr)
def test_networks_of_relus_are_integrated_within_the_tolerance(case):
    b = case.refs(("baseline",))[0]
    exact = exact_relu(case, case.x, b)
    difference = case.score(case.x) - case.score(b)
    close(exact.sum(), difference)
    for tolerance in (0.05, 1e-3):
        done = eg.adaptive_report(case.score, tolerance=tolerance, max_runs=300)(case.x, b)
        assert float(done.residual.abs()) <= tolerance * float(difference.abs())
        close(done.residual, done.attribution.sum() - difference, 1e-10)
    span = float(exact.abs().max())
    assert float((done.attribution - exact).abs().max()) < 0.05 * span


@pytest.mark.parametrize("case", [*every_case("softplus", "cubic", "conv", "linear"), *RELUS[:3]], ids=repr)
def test_the_reported_evaluations_are_those_made(case):
    score, seen = counted(case.score)
    b = case.refs(("baseline",))[0]
    done = eg.adaptive_report(score, tolerance=0.01)(case.x, b)
    assert sum(seen) == int(done.evaluations)
    assert int(done.evaluations) <= (4 if case.kind == "linear" else 60)
    ours = eg.adaptive_integrated_gradients(case.score)(case.x, b)
    assert torch.allclose(ours, done.attribution, rtol=1e-10)


def test_it_takes_fewer_gradients_than_equal_steps():
    # All of the change is in a twentieth of the path.
    score = lambda z: torch.sigmoid(60 * (z.sum() - 1.9))
    x, b = row(1, 1), row(0, 0)
    done = eg.adaptive_report(score, tolerance=0.01)(x, b)
    for n in range(2, int(done.evaluations) + 1):
        fixed = eg.integrated_gradients(score, steps=n, rule="trapezoid")
        assert float(eg.axioms.completeness(fixed, score)(x, b).abs()) > 0.01
    assert int(done.evaluations) < 40


def test_too_few_gradients_are_reported():
    score = lambda z: torch.sigmoid(60 * (z.sum() - 1.9))
    with pytest.warns(
        eg.ExecutionWarning, match="residual is still above 1e-06 of the difference after 7 gr"
    ):
        done = eg.adaptive_report(score, tolerance=1e-6, max_runs=8)(row(1, 1), row(0, 0))
    assert int(done.evaluations) <= 8
    difference = score(row(1, 1)) - score(row(0, 0))
    close(done.residual, done.attribution.sum() - difference, 1e-12)


@pytest.mark.parametrize("kind", ["softplus", "relu", "cubic", "segmentation"])
def test_adaptive_answers_do_not_depend_on_mates(kind):
    case = make_case(kind, axes=2, seed=1)
    run = eg.adaptive_report(case.score, tolerance=2e-3)
    baselines = case.many_refs(("baseline",))[0]
    alone = [run(x, b) for x, b in zip(case.xs, baselines, strict=True)]
    together = torch.func.vmap(lambda x, b: tuple(run(x, b)))(case.xs, baselines)
    for i, one in enumerate(alone):
        close(together[0][i], one.attribution, 1e-10)
        close(together[1][i], one.residual, 1e-10)
        assert int(together[2][i]) == int(one.evaluations)
    turned = torch.func.vmap(lambda x, b: tuple(run(x, b)))(case.xs.flip(0), baselines.flip(0))
    assert torch.equal(turned[2].flip(0), together[2])
    close(turned[0].flip(0), together[0], 1e-10)
    assert len({int(n) for n in together[2]}) > 1 or kind in ("cubic", "segmentation"), (
        "the examples should differ in cost"
    )


def test_an_input_that_is_its_baseline():
    case = make_case("softplus")
    for explain in (
        eg.integrated_gradients(case.score),
        eg.adaptive_integrated_gradients(case.score),
        eg.idgi(case.score),
        eg.guided_integrated_gradients(case.score, steps=4),
    ):
        close(explain(case.x, case.x), torch.zeros_like(case.x), 1e-14)
