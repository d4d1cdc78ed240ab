"""Exact references against closed forms, slow searches, peers and the methods of the package."""

import itertools
import math

import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta.axioms import exact

SHAPES = {1: (2, 5), 2: (2, 3, 4), 3: (2, 2, 3, 2)}
EPS = torch.finfo(torch.float64).eps


def draw(key, shape):
    return eg.random.normal(key, shape, dtype=torch.float64)


def smooth_score(z):
    """Every element matters, each in its own way, and all interact."""
    w = torch.cos(1.3 * torch.arange(z.numel(), dtype=z.dtype)).reshape(z.shape)
    return (w * z).sum() ** 2 / 4 + (w * z**2).sum()


def blocks(shape):
    return (torch.arange(math.prod(shape[1:])) % 3).reshape(shape[1:]) - 1


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def network(dims, channels, seed, bias=True):
    conv, pool = CONVS[dims], POOLS[dims]
    net = nn.Sequential(
        conv(channels, 3, 3, padding=1, bias=bias),
        nn.LeakyReLU(0.1),
        pool(2, stride=1),
        conv(3, 2, 3, padding=1, bias=bias),
        nn.ReLU(),
        conv(2, 1, 1, bias=bias),
    ).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(draw(100 * seed + i, p.shape) * 0.7)
    model = eg.from_module(net)
    return lambda z: model(z).sum()


def uniform_breaks(score, x, b, times):
    """Slow and dumb: where neighbours on a fine grid have different gradients, cut in halves."""
    slope = torch.func.vmap(torch.func.grad(score), chunk_size=100)
    at = lambda t: slope(b + t.reshape(-1, *[1] * x.ndim) * (x - b)).flatten(1)
    same = lambda g, h: ((g - h).abs() <= 1e-9).all(1)
    t = (torch.arange(times + 1, dtype=torch.float64) + 0.1234) / (times + 1)
    t = torch.cat([t.new_tensor([1e-9]), t, t.new_tensor([1 - 1e-9])])
    g = at(t)
    differ = ~same(g[:-1], g[1:])
    low, high, g = t[:-1][differ], t[1:][differ], g[:-1][differ]
    for _ in range(45):
        middle = (low + high) / 2
        below = same(g, at(middle))
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


@pytest.mark.parametrize("dims", SHAPES)
def test_breakpoints_against_a_dumb_search(dims):
    score, x, b = network(dims, 2, dims), draw(5, SHAPES[dims]), draw(6, SHAPES[dims])
    found = exact.breakpoints(score, x, b)
    expected = uniform_breaks(score, x, b, 1000)
    # Of several kinks in one cell of the grid that search finds one.
    cells = ((found * 1001 - 0.1234).floor().unique(), (expected * 1001 - 0.1234).floor())
    assert len(expected) > 4
    assert torch.equal(*cells)
    assert (expected[:, None] - found).abs().amin(1).max() < 1e-12


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("zero", [False, True])
def test_exact_integrated_gradients_of_networks(dims, zero):
    score, x = network(dims, 2, dims + 7, bias=not zero), draw(5, SHAPES[dims])
    b = torch.zeros_like(x) if zero else draw(6, SHAPES[dims])
    found = exact.pieces(score, x, b)
    a = exact.integrated_gradients(score, x, b)
    size = float((found.gradients * (x - b)).abs().flatten(1).sum(1).max())
    assert (a.sum() - (score(x) - score(b))).abs() < 100 * EPS * size
    torch.testing.assert_close(
        found.slopes, (found.gradients * (x - b)).flatten(1).sum(1), rtol=0, atol=10 * EPS * size
    )
    if zero:  # positively homogeneous: one piece, whose gradient is that of the input
        assert found.slopes.shape == (1,)
        torch.testing.assert_close(a, x * eg.gradient(score)(x), rtol=0, atol=100 * EPS * size)
        return
    # A midpoint rule with n nodes misses an integral by no more than variation / 2n (Koksma), element by element.
    n = 500
    parts = found.gradients * (x - b)
    bound = parts.diff(dim=0).abs().sum(0) / (2 * n)
    missed = (eg.integrated_gradients(score, steps=n, rule="midpoint")(x, b) - a).abs()
    assert (missed <= bound + 100 * EPS * size).all()
    assert missed.max() > 1e-6
    total = eg.axioms.completeness(eg.integrated_gradients(score, steps=n, rule="midpoint"), score)(x, b)
    assert total.abs() <= exact.variation(score, x, b) / (2 * n) + 100 * EPS * size


def test_exact_integrated_gradients_against_a_peer():
    from captum.attr import IntegratedGradients

    score, x, b = network(2, 2, 9), draw(5, SHAPES[2]), draw(6, SHAPES[2])
    ig = IntegratedGradients(torch.func.vmap(score))
    # By the peer's rule of midpoints, with the bound that its number of steps gives.
    peer = ig.attribute(x[None], b[None], n_steps=400, method="riemann_middle")[0]
    found = exact.pieces(score, x, b)
    bound = (found.gradients * (x - b)).diff(dim=0).abs().sum(0) / 800
    assert ((peer - exact.integrated_gradients(score, x, b)).abs() <= bound + 1e-12).all()


def test_integrated_gradients_in_closed_form():
    x, zero = torch.tensor([[3.0, 1.0, -2.0]]).double(), torch.zeros(1, 3).double()
    close = lambda found, expected: torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13
    )
    # relu(3 t - 1) + |t - 0.5| - relu(2 t - 1): kinks at 1/3, 1/2, 1/2
    score = lambda z: torch.relu(z[0, 0] - 1) + (z[0, 1] - 0.5).abs() - torch.relu(-z[0, 2] - 1)
    close(exact.breakpoints(score, x, zero), [1 / 3, 1 / 2])
    close(exact.slopes(score, x, zero), [-1.0, 2.0, 2.0])
    assert exact.variation(score, x, zero) == pytest.approx(3.0, abs=1e-13)
    close(exact.integrated_gradients(score, x, zero), [[2.0, 0.0, -1.0]])
    # One kink with a slope that does not change: the gradient does.
    bend = lambda z: torch.where(z[0, 0] + z[0, 1] > 1, z[0, 0] - 3 * z[0, 1] + 7, 7 + 0 * z.sum())
    close(exact.breakpoints(bend, x, zero), [1 / 4])
    close(exact.slopes(bend, x, zero), [0.0, 0.0])
    close(exact.integrated_gradients(bend, x, zero), [[2.25, -2.25, 0.0]])
    # No kinks: linear, constant, no way at all.
    linear = lambda z: (z * torch.tensor([1.0, 2.0, 3.0])).sum()
    assert exact.breakpoints(linear, x, zero).shape == (0,)
    close(exact.integrated_gradients(linear, x, zero), [[3.0, 2.0, -6.0]])
    close(exact.integrated_gradients(lambda z: z.sum() * 0 + 4, x, zero), [[0.0, 0.0, 0.0]])
    close(exact.integrated_gradients(score, x, x), [[0.0, 0.0, 0.0]])
    # Kinks at both ends are none inside.
    ends = lambda z: z.abs().sum() + (z - x).abs().sum()
    assert exact.breakpoints(ends, x, zero).shape == (0,)
    close(exact.integrated_gradients(ends, x, zero), [[0.0, 0.0, 0.0]])


@pytest.mark.parametrize("seed", range(6))
def test_breakpoints_at_known_places(seed):
    """A sum of kinks at given places, close ones, equal ones, weak ones among strong ones."""
    places = eg.random.uniform(seed, (40,), dtype=torch.float64)
    places[1] = places[0] + 1e-7
    places[3] = places[2]
    places[4] = 0.25
    weights = draw(seed + 50, (40,)) * 10 ** (-3 * eg.random.uniform(seed + 99, (40,), dtype=torch.float64))
    x, zero = torch.ones(1, 40).double(), torch.zeros(1, 40).double()
    score = lambda z: (weights * torch.relu(z[0] - places)).sum()
    found = exact.breakpoints(score, x, zero)
    expected = places[torch.arange(40) != 3].sort().values
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        exact.integrated_gradients(score, x, zero)[0], weights * (1 - places), rtol=0, atol=1e-12
    )


NOT_LINEAR = {
    "smooth": (lambda z: (z**3).sum(), "got more than 4096 pieces on the path"),
    "barely curved": (lambda z: z.sum() + 1e-3 * (z**2).sum(), "got more than 4096 pieces on the path"),
    "a jump": (lambda z: z.sum() + (z.sum() > 1.3) * 0.5, "got a jump at 0.3[0-9]* of the path"),
    "many jumps": (lambda z: z.sum() + z.sum().floor(), "got a jump at [01].?[0-9]* of the path"),
    "an operation at its kink all the way": (
        lambda z: torch.relu(z[0, 0] * 5 / 3 - z[0, 1]) + z.sum(),
        "got a gradient at 0.[0-9]* of the path that is another one than beside it",
    ),
    "a derivative with an error": (
        lambda z: z.sum() + 1e-10 * z.detach().sum(),
        "got one that its gradient does not add up to",
    ),
    "a derivative that is not its own": (
        lambda z: torch.relu(z).sum() + (torch.relu(z - 1) ** 2).sum().detach(),
        "got more than 4096 pieces on the path",
    ),
}


@pytest.mark.parametrize("what", NOT_LINEAR)
def test_a_score_that_is_not_piecewise_linear_is_refused(what):
    score, text = NOT_LINEAR[what]
    x = torch.tensor([[1.5, 2.5]]).double()
    with pytest.raises(ValueError, match=f"expected a continuous piecewise linear score, {text}"):
        exact.integrated_gradients(score, x, torch.zeros_like(x))


def test_the_number_of_pieces_is_limited():
    places = torch.arange(1, 30).double() / 30
    score = lambda z: torch.relu(z[0, 0] - places).sum()
    x = torch.ones(1, 1).double()
    assert len(exact.slopes(score, x, 0 * x, max_pieces=60)) == 30
    with pytest.raises(ValueError, match="more than 20 pieces"):
        exact.slopes(score, x, 0 * x, max_pieces=20)
    with pytest.raises(ValueError, match="expected max_pieces to be an int >= 1, got 0"):
        exact.slopes(score, x, 0 * x, max_pieces=0)


def slow_shapley(score, x, baseline, labels):
    """The mean over all orders of what a part adds when it enters."""
    names = sorted(set(labels[labels >= 0].tolist()))
    out = torch.zeros_like(x)
    orders = list(itertools.permutations(names))
    for order in orders:
        z = torch.where(labels >= 0, baseline, x)
        for part in order:
            entered = torch.where(labels == part, x, z)
            out += torch.where(labels == part, score(entered) - score(z), 0.0)
            z = entered
    return out / len(orders)


@pytest.mark.parametrize("dims", SHAPES)
def test_shapley_values_against_all_orders(dims):
    shape = SHAPES[dims]
    x, b = draw(1, shape), draw(2, shape)
    labels = (torch.arange(math.prod(shape)) * 7 % 6).reshape(shape) * 3 - 1  # gaps, none, both channels
    labels = torch.where(labels < 0, -1, labels)
    score = lambda z: smooth_score(z).exp().clamp(max=50.0) + z.max()
    torch.testing.assert_close(exact.shapley(score, x, b, labels), slow_shapley(score, x, b, labels))
    of_voxels = blocks(shape)
    torch.testing.assert_close(
        exact.shapley(score, x, b, of_voxels), slow_shapley(score, x, b, of_voxels.expand(shape))
    )
    by_method = eg.exact_shapley(score, features=eg.features.labels(of_voxels))(x, b)
    torch.testing.assert_close(exact.shapley(score, x, b, of_voxels), by_method)


def test_shapley_values_in_closed_form_and_of_a_peer():
    from captum.attr import ShapleyValues

    x, zero = torch.tensor([[3.0, 1.0, 2.0]]).double(), torch.zeros(1, 3).double()
    found = exact.shapley(lambda z: z.prod(), x, zero)
    torch.testing.assert_close(found, torch.full_like(x, 2.0))
    found = exact.shapley(lambda z: z.max(), x, zero)  # steps of 1: shared by all, by two, by one
    torch.testing.assert_close(found, torch.tensor([[1 / 3 + 1 / 2 + 1, 1 / 3, 1 / 3 + 1 / 2]]).double())
    assert exact.shapley(lambda z: z[0, 0] ** 2, x[:, :1], zero[:, :1]).tolist() == [[9.0]]
    x, b = draw(1, (1, 5)), draw(2, (1, 5))
    peer = ShapleyValues(lambda zs: torch.stack([smooth_score(z) for z in zs])).attribute(x[None], b[None])
    # The peer answers in single precision.
    torch.testing.assert_close(exact.shapley(smooth_score, x, b).float(), peer[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exact.shapley(smooth_score, x, b), eg.exact_shapley(smooth_score)(x, b))


@pytest.mark.parametrize("dims", SHAPES)
def test_gradients_by_differences(dims):
    shape = SHAPES[dims]
    x = draw(1, shape)
    scores = {
        "a polynomial": smooth_score,
        "waves": lambda z: torch.sin(5 * z).sum() * z.exp().mean(),
        "large": lambda z: 1e6 * smooth_score(z),
        "kinks": network(dims, 2, dims),
        "softplus": lambda z: nn.functional.softplus(10 * z - 5).sum(),
    }
    for name, score in scores.items():
        expected = eg.gradient(score)(x)
        error = (exact.gradient(score, x) - expected).abs().max() / expected.abs().max()
        assert error < 1e-10, name


def test_a_gradient_by_differences_needs_no_derivative():
    score = lambda z: z.detach().square().sum()
    x = torch.tensor([[1.0, -2.0]]).double()
    torch.testing.assert_close(exact.gradient(score, x), 2 * x, rtol=0, atol=1e-11)
    near = lambda z: (z - 0.999).abs().sum()
    torch.testing.assert_close(
        exact.gradient(near, x), torch.tensor([[1.0, -1.0]]).double(), rtol=0, atol=1e-10
    )
