"""What real networks do that small ones seldom do: writes in place behind views, casts, foreign code, dead layers."""

import inspect
import re
import warnings

import numpy as np
import pytest
import torch
from together import together
from torch import nn
from torch.nn import functional

import esegeta as eg
from esegeta._registry import METHODS
from esegeta.engine.folded import NoGradient

X = torch.linspace(-1, 1, 64).reshape(1, 8, 8).sin() * 2


def convs(*between, channels=3):
    torch.manual_seed(3)
    first, last = nn.Conv2d(1, channels, 3, padding=1), nn.Conv2d(channels, 2, 3, padding=1)
    return nn.Sequential(first, *between, last).eval()


def score_of(module):
    return eg.reducers.class_sum(eg.from_module(module), 1)


# -- in-place activations behind what hands its input on -----------------------------------------------------


class Through(nn.Module):
    """A layer made of a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


HANDED_ON = {
    "dropout of nothing": nn.Dropout(0.0),
    "dropout": nn.Dropout(0.3),
    "identity": nn.Identity(),
    "view": Through(lambda x: x.view(x.shape)),
    "getitem": Through(lambda x: x[:, :]),
    "as_tensor": Through(torch.as_tensor),
    "contiguous": Through(lambda x: x.contiguous()),
    "flatten": Through(lambda x: x.flatten(2).unflatten(2, (8, 8))),
}
RULED = {
    "deep_lift_reveal_cancel": lambda s: eg.deep_lift_reveal_cancel(s)(X, 0.5 * X.flip(1)),
    "deep_lift": lambda s: eg.deep_lift(s)(X, 0.5 * X.flip(1)),
    "lrp": lambda s: eg.lrp(s)(X),
    "guided_backprop": lambda s: eg.guided_backprop(s)(X),
    "deconvolution": lambda s: eg.deconvolution(s)(X),
    "excitation": lambda s: eg.excitation_backprop(s, "0")(X),
}


@together("method", RULED)
@pytest.mark.parametrize("between", HANDED_ON)
def test_an_activation_in_place_is_explained_as_one_that_is_not(between, method):
    """MONAI's order is norm, dropout, activation; dropout hands on its input itself, not a copy."""
    for norm in (nn.InstanceNorm2d(3), nn.BatchNorm2d(3)):
        for act in (nn.LeakyReLU, nn.ReLU):
            slope = {} if act is nn.ReLU else {"negative_slope": 0.1}
            written, apart = (
                score_of(convs(norm, HANDED_ON[between], act(inplace=inplace, **slope)))
                for inplace in (True, False)
            )
            expected = RULED[method](apart)
            torch.testing.assert_close(RULED[method](written), expected, rtol=1e-4, atol=1e-5)
            assert expected.abs().max() > 0


def test_what_a_rule_needs_and_the_network_overwrites_is_refused_in_words():
    def forward(x):
        y = torch.sigmoid(x)
        x.mul_(2)
        return x + y

    score = score_of(convs(Through(forward)))
    with pytest.raises(
        NotImplementedError, match=r"^rules: expected a network that leaves .* got one that w"
    ):
        eg.guided_backprop(score)(X)
    assert eg.gradient(score)(X).isfinite().all()


# -- casts and moves -----------------------------------------------------------------------------------------

MOVED = {
    "as_tensor": lambda x: torch.as_tensor(x),
    "asarray": lambda x: torch.asarray(x),
    "hsplit": lambda x: torch.cat(torch.hsplit(x, [1]), 1),
    "vsplit": lambda x: torch.vstack(torch.vsplit(x, 1)),
    "dsplit": lambda x: torch.cat(torch.dsplit(x, 2), 2),
    "unsafe_chunk": lambda x: torch.cat(torch.unsafe_chunk(x, 2, 2), 2),
    "unsafe_split": lambda x: torch.cat(torch.unsafe_split(x, 4, 2), 2),
    "adjoint": lambda x: x.adjoint().adjoint(),
    "column_stack": lambda x: torch.column_stack([x, x])[:, : x.shape[1]],
}


@pytest.mark.filterwarnings(
    "ignore:torch.asarray:UserWarning"
)  # of torch, about the future of its own default
@together("method", RULED)
@pytest.mark.parametrize("move", MOVED)
def test_what_moves_or_casts_values_changes_no_explanation(move, method):
    moved, plain = score_of(convs(Through(MOVED[move]), nn.ReLU())), score_of(convs(nn.ReLU()))
    torch.testing.assert_close(RULED[method](moved), RULED[method](plain), rtol=1e-4, atol=1e-5)


# -- weights and data in the full gradient -------------------------------------------------------------------


PARAMETER = nn.Parameter(torch.linspace(-1, 1, 12).sin().reshape(1, 4, 3))


def _standardised(x):
    weight = functional.batch_norm(PARAMETER, None, None, training=True)[0]
    return x @ weight.T


STATISTICS = [torch.tensor([0.3, -0.2, 0.5]), torch.tensor([1.5, 0.7, 2.0])]
BIASED = {
    "plain weights": lambda x: torch.relu(
        x @ torch.linspace(-1, 1, 12).reshape(3, 4) + torch.linspace(-1, 2, 4)
    ),
    "computed weights": _standardised,
    "statistics": lambda x: functional.batch_norm(x, *STATISTICS, torch.ones(3), torch.linspace(0, 1, 3)),
    "two outputs": lambda x: torch.tanh(x).chunk(2, 0)[1] * torch.sigmoid(x).split([1, 1])[0],
    "a product of data": lambda x: (x @ x.T) / 2 + x.sum(),
}


@pytest.mark.parametrize("name", BIASED)
def test_what_does_not_come_from_the_input_counts_as_weights(name):
    x = torch.tensor([[0.4, -1.2, 0.7], [1.1, 0.2, -0.6]])
    score = lambda x: BIASED[name](x).sum()
    torch.testing.assert_close(eg.full_gradient(score)(x).total(), score(x), rtol=1e-4, atol=1e-5)

    model = eg.from_module(lambda xs: torch.stack([BIASED[name](one) for one in xs]))
    inside = lambda x: model(x).sum()
    torch.testing.assert_close(eg.full_gradient(inside)(x).total(), score(x), rtol=1e-4, atol=1e-5)


# -- lists of places -----------------------------------------------------------------------------------------

SETTINGS = {"steps": 4, "exact": False}


def explained(name, score, place):
    spec = METHODS[name]
    settings = {k: v for k, v in SETTINGS.items() if k in inspect.signature(spec.fn).parameters}
    key = {"key": 5} if spec.key else {}
    return spec.fn(score, place, **settings)(X, *[torch.zeros_like(X)] * len(spec.refs), **key)


AT_A_PLACE = sorted(name for name, spec in METHODS.items() if spec.place)


@pytest.mark.parametrize("name", AT_A_PLACE)
def test_several_places_have_an_explanation_each(name):
    score = score_of(convs(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()))
    found = explained(name, score, ["0", "3"])
    assert isinstance(found, tuple)
    assert len(found) == 2
    for a, place in zip(found, ("0", "3"), strict=True):
        alone = explained(name, score, (place,))[0]
        assert a.shape == alone.shape == explained(name, score, place).shape
        # What lies on the way to a later place is counted once there.
        if name not in ("conductance", "internal_influence"):
            torch.testing.assert_close(a, explained(name, score, place), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match=r"expected a place or a sequence of places, got list \[\]"):
        explained(name, score, [])


# -- guided backpropagation of every layer -------------------------------------------------------------------


def test_layers_below_the_first_activation_have_the_plain_gradient():
    net = convs(nn.ReLU(), nn.Conv2d(3, 3, 1))
    score = score_of(net)
    names = eg.all_places(score, X)
    found = {place: eg.layer_activation_guided_backprop(score, place)(X) for place in names}
    together = eg.layer_activation_guided_backprop(score, names)(X)
    for a, b in zip(found.values(), together, strict=True):
        torch.testing.assert_close(a, b)
    for place in ("0", "3"):
        plain = eg.gradient(lambda x, place=place: eg.tap(score, place)(x).abs().sum())(X)
        same = torch.allclose(found[place], plain, rtol=1e-4, atol=1e-6)
        assert same == (place == "0")
    with pytest.raises(
        ValueError, match=r"^layer_activation_guided_backprop: expected a unit of the channels of '0'"
    ):
        eg.layer_activation_guided_backprop(score, "0", unit=3)(X)


# -- dead places ---------------------------------------------------------------------------------------------


class Dead(nn.Module):
    """One layer whose result is thrown away, and one that is called three times."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.dead, self.act = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 3, 1), nn.ReLU()

    def forward(self, x):
        self.dead(x)
        return self.act(self.a(self.act(x))) + self.act(x)


DEAD = r"expected a place that the score depends on, got 'dead'"


@pytest.mark.parametrize(
    "name", ["gradient", "integrated_gradients", "deep_lift", "lrp", "occlusion", "saliency"]
)
def test_at_a_dead_place_is_refused_as_such(name):
    score = score_of(Dead().eval())
    explain = eg.at(name, "dead")(score)
    with pytest.raises(ValueError, match=rf"^at: {DEAD}"):
        explain(X, *[torch.zeros_like(X)] * len(METHODS[name].refs))


@pytest.mark.parametrize(
    "name", ["shapley_cam", "grad_cam", "excitation_backprop", "contrastive_excitation_backprop"]
)
def test_a_map_of_a_dead_place_is_refused_as_such(name):
    with pytest.raises(ValueError, match=DEAD):
        explained(name, score_of(Dead().eval()), "dead")


# -- several calls -------------------------------------------------------------------------------------------


def test_a_place_that_is_passed_several_times_has_a_number_from_the_first_on():
    score = score_of(Dead().eval())
    found = eg.places(score, X)
    assert [n for n in found.names if n.startswith("act")] == ["act#0", "act#1", "act#2"]
    assert found["act"] is found["act#0"]
    assert found["act#2"].beside == ("act#1",)
    first_of = r"^grad_cam: 'act' is passed 3 times, and this is the first of them. "
    message = first_of + r"Write 'act#0' for it, or a number up to 2"
    twice = lambda: [eg.grad_cam(score, "act")(X) for _ in range(2)]
    with eg.execution() as seen, pytest.warns(eg.ExecutionWarning, match=message):
        first, _ = twice()
    assert [event["event"] for event in seen.events] == ["place"]
    torch.testing.assert_close(eg.grad_cam(score, "act#0")(X), first)
    with pytest.raises(ValueError, match=r"#5, but there are 3\. Calls are counted from 0"):
        eg.grad_cam(score, "act#5")(X)


class Twice(nn.Module):
    """One activation that is called two times; it counts how often real values pass its end."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.b = nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)
        self.ends = 0

    def forward(self, x):
        y = self.act(self.b(self.act(self.a(x))))
        self.ends += type(y) is torch.Tensor
        return y


@together("name", sorted(name for name, spec in METHODS.items() if spec.place))
def test_every_method_at_a_place_says_which_call_it_took(name):
    """Also those that run no further than the place, and see the first call only."""
    spec, score = METHODS[name], score_of(Twice().eval())
    refs = [torch.stack([0 * X, X.flip(-1)]) if ref == "baselines" else 0 * X for ref in spec.refs]
    key = {"key": 1} if spec.key else {}
    message = rf"^{name}: 'act' is passed 2 times, and this is the first of them. Write 'act#0' for it"
    with eg.execution() as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore", eg.ExecutionWarning)
        for place in ("act#0", "act#1"):
            spec.fn(score, place, **spec.example)(X, *refs, **key)
        assert not [e for e in seen.events if e["event"] == "place"]
        spec.fn(score, "act", **spec.example)(X, *refs, **key)
    assert re.search(message, "".join(e["message"] for e in seen.events if e["event"] == "place"))


def test_a_tap_counts_the_calls_once_and_without_values():
    network = Twice().eval()
    model = eg.from_module(network)
    look = eg.tap(model, "act")
    for x in (X, X, 2 * X, torch.cat([X, X], 2)):
        with eg.execution() as seen, pytest.warns(eg.ExecutionWarning, match="^tap: 'act' is passed 2 times"):
            look(x)
        assert len(seen.events) == 1
    assert network.ends == 0
    with pytest.warns(eg.ExecutionWarning, match="^tap: 'act' is passed 2 times"):
        torch.func.vmap(look)(torch.stack([X, X]))
    with pytest.warns(eg.ExecutionWarning, match="^split: 'act' is passed 2 times"):
        eg.split(model, "act", at=X)[0](X)


def test_a_tap_of_code_that_looks_at_values_counts_the_calls_by_one_run():
    network = Twice().eval()
    model = eg.from_module(network)
    looking = lambda x: model(x if x.max().item() > 0 else -x)
    look = eg.tap(looking, "act")
    for x in (X, X, 2 * X):
        with pytest.warns(eg.ExecutionWarning, match="^tap: 'act' is passed 2 times"):
            look(x)
    assert network.ends == 1


def test_an_operation_whose_other_results_are_scalars_is_there_once():
    """A sum inside and a sum at the end: only the first is a place, so its name says which."""
    score = lambda x: (x.sum(0) * 2).sum()
    x = torch.ones(3, 4)
    assert [n for n in eg.places(score, x).names if n.startswith("sum")] == ["sum"]
    with eg.execution() as seen:
        torch.testing.assert_close(eg.activation_and_gradient(score, "sum")(x)[0], torch.full((4,), 3.0))
        assert eg.full_gradient(score)(x).total() == 24
    assert not seen.events


# -- foreign code --------------------------------------------------------------------------------------------


class Foreign(torch.autograd.Function):
    """As ONNX and JAX enter: values and gradients of numpy."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.tanh(x.detach().numpy())).repeat(1, 2, 1, 1)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.sum(1, keepdim=True) * (1 - torch.from_numpy(np.tanh(x.numpy()) ** 2))


def through_dlpack(x):
    return torch.from_numpy(np.from_dlpack(x.detach()) * 2).repeat(1, 2, 1, 1)


@pytest.mark.parametrize("method", [m for m in RULED if m != "excitation"])
@pytest.mark.parametrize(
    "run",
    [Foreign.apply, through_dlpack, lambda x: torch.from_numpy(np.tanh(x.numpy()))],
    ids=["f", "d", "n"],
)
def test_rules_say_that_foreign_code_shows_no_operations(run, method):
    with pytest.raises(
        NotImplementedError,
        match=r"expected a network whose operations can be seen, got .*NumPy, ONNX, JAX",
    ):
        RULED[method](score_of(lambda x: run(x)))


def test_foreign_code_with_a_gradient_has_one_and_without_it_the_way_is_named():
    score = score_of(lambda x: Foreign.apply(x))
    torch.testing.assert_close(eg.gradient(score)(X), 1 - X.tanh() ** 2)
    with pytest.raises(NoGradient, match=r"torch\.autograd\.Function whose backward .* the page on models"):
        eg.gradient(score_of(through_dlpack))(X)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_the_places_of_foreign_code_say_that_there_are_none():
    scripted = torch.jit.trace(convs(nn.ReLU()), X[None])
    for module in (lambda x: Foreign.apply(x), through_dlpack, scripted):
        text = str(eg.places(score_of(module), X))
        assert re.search(r"No place that the score depends on: nothing of its inside can be seen", text)
    assert "No place" not in str(eg.places(score_of(convs(nn.ReLU())), X))
