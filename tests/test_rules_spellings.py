"""What every set of rules relies on: which operand is first, who holds data, which way Python goes, what stays."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional

import esegeta as eg
from esegeta import rules

ROUNDING = 1e-12


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


X, BASELINE = tensor(2.0, 3.0), tensor(1.0, -4.0)
C = tensor(5.0, -7.0)
M = tensor([1.0, -2.0], [0.5, 3.0], [-1.0, 4.0])


def reflected(x, other, name):
    """Python's call for an operand on the right."""
    return getattr(torch.Tensor, f"__{name}__")(x, other)


# Each with the function that it is of one value, and its derivative; or what it is as a matrix.
OF_ONE = {
    "1 - x": (lambda x: 1 - x, lambda v: 1 - v, lambda v: -1 + 0 * v),
    "c - x": (lambda x: C - x, lambda v: C - v, lambda v: -1 + 0 * v),
    "rsub": (lambda x: torch.rsub(x, 1), lambda v: 1 - v, lambda v: -1 + 0 * v),
    "rsub by name": (
        lambda x: torch.rsub(input=x, other=C, alpha=3),
        lambda v: C - 3 * v,
        lambda v: -3 + 0 * v,
    ),
    "aten.rsub": (lambda x: torch.ops.aten.rsub.Scalar(x, 1, 2), lambda v: 1 - 2 * v, lambda v: -2 + 0 * v),
    "__rsub__": (lambda x: reflected(x, C, "rsub"), lambda v: C - v, lambda v: -1 + 0 * v),
    "1 / x": (lambda x: 1 / x, lambda v: 1 / v, lambda v: -1 / v**2),
    "c / x": (lambda x: C / x, lambda v: C / v, lambda v: -C / v**2),
    "__rtruediv__": (lambda x: reflected(x, C, "rtruediv"), lambda v: C / v, lambda v: -C / v**2),
    "2 ** x": (lambda x: 2**x, lambda v: 2**v, lambda v: 2**v * tensor(2.0).log()),
    "__rpow__": (lambda x: reflected(x, 3.0, "rpow"), lambda v: 3**v, lambda v: 3**v * tensor(3.0).log()),
    "x ** 2": (lambda x: x**2, lambda v: v**2, lambda v: 2 * v),
    "3 + x": (lambda x: 3 + x, lambda v: 3 + v, lambda v: 1 + 0 * v),
    "3 * x": (lambda x: 3 * x, lambda v: 3 * v, lambda v: 3 + 0 * v),
    "x / 4": (lambda x: x / 4, lambda v: v / 4, lambda v: 0.25 + 0 * v),
    "-=": (lambda x: x.clone().__isub__(C), lambda v: v - C, lambda v: 1 + 0 * v),
    "/=": (lambda x: x.clone().__itruediv__(C), lambda v: v / C, lambda v: 1 / C + 0 * v),
    "**=": (lambda x: x.clone().__ipow__(2), lambda v: v**2, lambda v: 2 * v),
}


def close(a, b):
    return torch.allclose(a, b, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", OF_ONE)
def test_an_operand_on_the_right(name):
    function, value, slope = OF_ONE[name]
    score = lambda x: function(x).sum()
    for method in (eg.deep_lift, eg.deep_lift_reveal_cancel):
        assert close(method(score)(X, BASELINE), value(X) - value(BASELINE))
    # The signal that comes back to the activation is the derivative of what is after it.
    active = lambda x: function(torch.relu(x)).sum()
    assert close(eg.guided_backprop(active)(X), slope(X).clamp(min=0))
    assert close(eg.deconvolution(active)(X), slope(X).clamp(min=0))
    start = value(0 * X)
    bias = torch.where(start.isfinite(), start, 0)
    assert close(eg.lrp(score, composite="zero")(X), value(X) - bias)


def test_two_operands_of_data_in_either_order():
    right = lambda x: reflected(x[:1], x[1:], "rsub") * 2
    assert eg.deep_lift(lambda x: right(x).sum())(X, BASELINE).tolist() == [-2.0, 14.0]
    ratio = lambda x: reflected(x[:1], x[1:], "rtruediv").sum()  # x1 / x0
    found = eg.lrp(ratio, composite="zero")(X)
    assert close(found, tensor(0.0, 1.5))
    power = lambda x: reflected(x @ M[0], 2.0, "rpow")
    assert close(eg.deep_lift(power)(X, BASELINE).sum(), power(X) - power(BASELINE))


def test_a_matrix_on_the_left():
    for product in (lambda x: M @ x[:, None], lambda x: reflected(x[:, None], M, "rmatmul")):
        score = lambda x, product=product: product(x).sum()
        assert close(eg.deep_lift(score)(X, BASELINE), M.sum(0) * (X - BASELINE))
        exact = rules.Composite(linear=rules.Epsilon(0.0))
        assert close(eg.lrp(score, composite=exact)(X), M.sum(0) * X)
        plus = eg.lrp(score, composite=rules.Composite(linear=rules.ZPlus(0.0)))(X)
        share = M.clamp(min=0) * X
        expected = (share / share.sum(1, keepdim=True) * (M @ X)[:, None]).sum(0)
        assert close(plus, expected)


@pytest.mark.parametrize("name", ["1 - x", "c - x", "rsub", "__rsub__", "aten.rsub"])
def test_what_is_subtracted_excites_nothing(name):
    function = OF_ONE[name][0]
    with pytest.raises(NotImplementedError, match="got 'sub'"):
        eg.gradient(rules.excitation(lambda x: function(x).sum()))(X)


def test_what_is_subtracted_from_data_inhibits():
    score = lambda x: functional.linear(torch.relu(x[0]) - torch.relu(x[1]), tensor([1.0])).sum()
    x = tensor([3.0], [1.0])
    assert close(x * eg.gradient(rules.excitation(score))(x), tensor([1.0], [0.0]))


@pytest.mark.parametrize("name", ["sigmoid", "exp", "softplus", "hardsigmoid", "relu", "gelu"])
def test_all_excitation_passes_an_activation(name):
    """Also where the activation is not zero at zero."""
    activation = getattr(functional, name, None) or getattr(torch, name)
    w, v, x = tensor([1.0, 2.0], [0.5, 1.0]), tensor(2.0, 1.0), tensor(1.0, 3.0)
    score = lambda x: functional.linear(activation(functional.linear(x, w)), v[None]).sum()
    h = activation(w @ x)
    p = h * v / (h * v).sum()
    expected = (w * x / (w @ x)[:, None] * p[:, None]).sum(0)
    assert close(x * eg.gradient(rules.excitation(score))(x), expected)


# -- who holds data ------------------------------------------------------------------------------------------------

SIGNS = tensor(1.0, -2.0, 3.0, 4.0, 5.0, 6.0)


def _plain(x):
    return torch.cat([torch.tanh(x[3:]), torch.zeros(3).double()])


def _added(x):
    out = torch.zeros(6, dtype=x.dtype)
    out[:3].add_(torch.tanh(x[3:]))
    return out


def _assigned(x):
    out = torch.zeros(6, dtype=x.dtype)
    view = out[:3]
    view[:] = torch.tanh(x[3:])
    return out


def _seen_by_an_older_view(x):
    out = torch.zeros(2, 3, dtype=x.dtype)
    older = out.view(6)
    out[0] = torch.tanh(x[3:])
    return older


def _seen_by_a_sibling(x):
    out = torch.zeros(6, dtype=x.dtype)
    one, other = out[:3], out.view(2, 3)
    one.copy_(x[3:]).tanh_()
    return torch.cat([other[0], other[1]])


BUFFERS = {f.__name__: f for f in (_added, _assigned, _seen_by_an_older_view, _seen_by_a_sibling)}
METHODS = {
    "guided": lambda s, x: eg.guided_backprop(s)(x),
    "deconvolution": lambda s, x: eg.deconvolution(s)(x),
    "lrp": lambda s, x: eg.lrp(s, composite="epsilon_plus")(x),
    "first": lambda s, x: eg.lrp(s, composite="epsilon_plus_flat")(x),
    "excitation": lambda s, x: eg.gradient(rules.excitation(s))(x),
    "deep_lift": lambda s, x: eg.deep_lift(s)(x, x.flip(0)),
    "reveal": lambda s, x: eg.deep_lift_reveal_cancel(s)(x, x.flip(0)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_that_data_is_written_into(name, method):
    x = tensor(0.3, -0.2, 0.7, 1.1, -0.4, 0.9)
    weights = torch.arange(24.0).reshape(4, 6).cos().double()

    def score(made):
        inner = lambda x: functional.linear(
            made(functional.linear(x, torch.eye(6).double())) * SIGNS, weights
        )
        return lambda x: functional.linear(torch.relu(inner(x)), weights[:, :4]).sum()

    expected = METHODS[method](score(_plain), x)
    assert close(METHODS[method](score(BUFFERS[name]), x), expected)
    assert float(expected.abs().max()) > 0


def test_a_constant_that_is_made_like_data_is_none():
    """Its type or shape says nothing of values: in a product with it data takes all."""
    for made in (
        lambda h: C.to(h),
        lambda h: C.type_as(h),
        lambda h: C[:1].expand_as(h),
        lambda h: C.view_as(h),
    ):
        score = lambda x, made=made: (made(x) * x).sum()
        assert close(eg.lrp(score, composite="zero")(X), made(X) * X)


# -- conditions ----------------------------------------------------------------------------------------------------

SAME = {
    "above": lambda x: (x if x.sum() > -9 else 3 * x).sum(),
    "any": lambda x: x.sum() * (2 if (x > 1.5).any() else 1),
    "not": lambda x: x.sum() * (2 if not x.isnan().any() else 1),
    "count": lambda x: x.sum() * int((x > 0).sum()),
    "is_nonzero": lambda x: x.sum() if torch.is_nonzero(x.sum()) else x.sum() * 2,
    "list": lambda x: x.sum() * sum((x > 0).tolist()),
    "where the largest is": lambda x: x[int(x.argmax())],
}
OTHER = {
    "above": lambda x: (x if x.sum() > 3 else 3 * x).sum(),
    "data": lambda x: x.sum() if x[1] - 3 else 2 * x.sum(),
    "any": lambda x: x.sum() * (2 if (x < 0).any() else 1),
    "while": lambda x: _halved(x).sum(),
    "count": lambda x: x.sum() * int((x > 0).sum()),
    "item": lambda x: x.sum() * (x > 0).all().item(),
    "list": lambda x: x.sum() * sum((x > 0).tolist()),
    "how many": lambda x: x.sum() * len((x > 0).nonzero()),
    "where the largest is": lambda x: x[int(x.argmax())],
    "rounded": lambda x: x.sum() * float(x.detach().sum().round()),
}


def _halved(x):
    while x.abs().max() > 3.5:
        x = x / 2
    return x


@pytest.mark.parametrize("method", [eg.deep_lift, eg.deep_lift_reveal_cancel])
@pytest.mark.parametrize("name", SAME)
def test_python_that_goes_the_same_way_is_followed(name, method):
    score, near = SAME[name], X + tensor(0.5, 1.0)
    assert close(method(score)(X, near).sum(), score(X) - score(near))


@pytest.mark.parametrize("method", [eg.deep_lift, eg.deep_lift_reveal_cancel])
@pytest.mark.parametrize("name", OTHER)
def test_python_that_goes_another_way_for_the_reference_is_refused(name, method):
    with pytest.raises(
        NotImplementedError, match=r"expected code that goes the same way for the input and for its reference"
    ):
        method(OTHER[name])(X, BASELINE)


def test_a_network_that_goes_another_way_is_refused():
    class Choosing(nn.Module):
        def forward(self, x):
            return torch.relu(x) if (x > 0).any() else x.tanh()

    model = eg.from_module(Choosing())
    explain = eg.deep_lift(lambda x: model(x[None]).sum())
    assert close(explain(X, 2 * X), X - 2 * X)
    with pytest.raises(NotImplementedError, match=r"an if or while on a condition of data"):
        explain(X, -X)


CONDITIONS = {
    "not": lambda h: h * ~(h > 0),
    "and": lambda h: h * ((h > 0) & (h > 1.5)),
    "weighted": lambda h: h * ((h > 0).double() * 2),
    "where not": lambda h: torch.where(~(h > 0), h, 0.0),
    "of another": lambda h: h * (h.flip(0) > 0),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_that_is_not_above_zero_is_no_relu(name):
    score = lambda x: CONDITIONS[name](x * 1).sum()
    with pytest.raises(NotImplementedError, match="computes no conditions"):
        eg.deep_lift(score)(X, BASELINE)
    with pytest.raises(ValueError, match="at least one of the operations that it rewrites"):
        eg.guided_backprop(score)(X)


# -- nothing stays -------------------------------------------------------------------------------------------------

RUNS = {
    "guided": lambda s, x: eg.guided_backprop(s)(x),
    "lrp": lambda s, x: eg.lrp(s, composite="epsilon_plus")(x),
    "last": lambda s, x: eg.lrp(s, composite=rules.Composite(last=rules.ZPlus()))(x),
    "excitation": lambda s, x: eg.gradient(rules.excitation(s))(x),
    "deep_lift": lambda s, x: eg.deep_lift(s)(x, 0 * x),
    "reveal": lambda s, x: eg.deep_lift_reveal_cancel(s)(x, 0 * x),
}


@pytest.mark.parametrize("name", RUNS)
def test_no_activation_outlives_its_run(name):
    """Not even until the collector of cycles comes by: it is seldom, and activations of volumes are large."""
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3)]
    score = eg.reducers.class_sum(eg.from_module(nn.Sequential(*layers).eval()), 1)
    x = torch.randn(1, 8, 8)
    RUNS[name](score, x)
    alive = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
    gc.disable()
    try:
        RUNS[name](score, x)
        new = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and id(o) not in alive]
        left = [tuple(o.shape) for o in new if o.shape != x.shape]
        new.clear()
    finally:
        gc.enable()
    assert left == []
