"""A second derivative that does not exist is refused, and not zero: what a custom backward leaves torch for."""

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, jvp, vmap

import esegeta as eg
from esegeta.engine.folded import NoGradient


class Outside(torch.autograd.Function):
    """A cube by numpy, as networks of other frameworks enter torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.as_tensor(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.as_tensor(g.detach().numpy() * 3 * x.detach().numpy() ** 2)


class Inside(torch.autograd.Function):
    """The same by torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.detach() ** 3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * x**2


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Detached(torch.autograd.Function):
    """A function that torch.func takes, and whose backward forgets what it was made of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * 3 * ctx.saved_tensors[0].detach() ** 2


class Net(nn.Module):
    """A layer below and one above a custom function."""

    def __init__(self, function):
        super().__init__()
        self.function, self.below, self.above = function, nn.Tanh(), nn.Identity()

    def forward(self, x):
        return self.above(self.function.apply(self.below(x)))


X = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
MESSAGE = "expected a gradient that torch can differentiate again, got one that ends in the backward of"
SCORES = {
    "linear above": lambda model: lambda x: model(x).sum(),
    "squares above": lambda model: lambda x: model(x).square().sum(),
    "another way beside": lambda model: lambda x: model(x).sum() + (x**3).sum(),
}
SECOND = {
    "grad": lambda s, x: grad(lambda z: eg.gradient(s)(z).sum())(x),
    "torch.func alone": lambda s, x: grad(lambda z: grad(s)(z).sum())(x),
    "jvp of the gradient": lambda s, x: jvp(eg.gradient(s), (x,), (x,)),
    "jacrev": lambda s, x: jacrev(eg.gradient(s))(x),
    "vmap outside": lambda s, x: vmap(grad(lambda z: eg.gradient(s)(z).sum()))(torch.stack([x, 2 * x])),
    "vmap inside": lambda s, x: grad(lambda z: vmap(eg.gradient(s))(torch.stack([z, 2 * z])).sum())(x),
    "jvp of the value": lambda s, x: jvp(s, (x,), (x,)),
}


def plain(s, x):
    """By ordinary autograd."""
    x = x.clone().requires_grad_()
    eg.gradient(s)(x).sum().backward()
    return x.grad


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("second", [*SECOND, "ordinary autograd"])
def test_refused_where_it_was_cut(score, second):
    s = SCORES[score](eg.from_module(Net(Outside)))
    with pytest.raises(NoGradient, match=f"^Net: {MESSAGE} Outside"):
        (SECOND | {"ordinary autograd": plain})[second](s, X)


@pytest.mark.parametrize("score", SCORES)
def test_right_where_it_was_not(score):
    ours, truth = (
        grad(lambda z, f=f: eg.gradient(SCORES[score](f))(z).sum())(X)
        for f in (eg.from_module(Net(Inside)), lambda x: torch.tanh(x) ** 3)
    )
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(plain(SCORES[score](eg.from_module(Net(Inside))), X), truth)


def test_zero_where_nothing_depends_on_the_input():
    linear = nn.Conv1d(1, 2, 3, dtype=torch.float64)
    model = eg.from_module(linear)
    assert not grad(lambda z: eg.gradient(lambda x: model(x).sum())(z).sum())(X).any()
    step = eg.from_module(nn.Sequential(nn.Flatten(), Wrapped(StraightThrough)))
    assert not grad(lambda z: eg.gradient(lambda x: step(x).sum())(z).sum())(X).any()


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def test_first_derivatives_are_as_they_were():
    model = eg.from_module(Wrapped(Outside))
    score = lambda x: model(x).sum()
    torch.testing.assert_close(eg.gradient(score)(X), 3 * X**2)
    torch.testing.assert_close(eg.gradient(score)(X.clone().requires_grad_()).detach(), 3 * X**2)
    torch.testing.assert_close(vmap(eg.gradient(score))(torch.stack([X, 2 * X]))[1], 12 * X**2)
    a = eg.integrated_gradients(score, steps=16)(X, 0 * X)
    torch.testing.assert_close(a, X**3)


def test_plain_functions():
    score = lambda x: Detached.apply(x).sum()
    torch.testing.assert_close(eg.gradient(score)(X), 3 * X**2)
    for second in ("grad", "jacrev", "vmap outside", "vmap inside"):
        with pytest.raises(NoGradient, match=f"{MESSAGE} Detached"):
            SECOND[second](score, X)


def test_weights_that_are_trained():
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    attribution = eg.gradient(lambda x: Detached.apply(w * x).sum())(X)
    with pytest.raises(NoGradient, match=MESSAGE):
        attribution.sum().backward()


def test_at_places():
    score = lambda x, model: model(x).square().sum()
    outside = lambda x: score(x, eg.from_module(Net(Outside)))
    with pytest.raises(NoGradient, match=MESSAGE):
        eg.shapley_cam(outside, "below")(X)
    # Above it everything is torch's.
    above = eg.shapley_cam(outside, "above")(X)
    torch.testing.assert_close(
        above, eg.shapley_cam(lambda x: score(x, eg.from_module(Net(Inside))), "above")(X)
    )
