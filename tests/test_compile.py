"""``execution(compile=True)``: the same answers from compiled networks, which are left as they were."""

import copy

import pytest
import torch
from rounding import close
from torch import nn

import esegeta as eg
from esegeta.engine import compiling

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of itself while it compiles


class Deciding(nn.Module):
    """Takes one way or another by values, which no compiler can follow."""

    def forward(self, x):
        return x.sin() if x.sum() > 0 else x.cos()


class Counting(nn.Module):
    """Writes into a buffer at every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * x


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 3, 3, padding=1),
        nn.Softplus(),
    ).eval()


def image(scale=1.0):
    return scale * torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(3))


def graphs():
    """How many graphs torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_compiled_networks_give_the_same_answers_and_are_left_alone():
    net, x = network(), image()
    before, state = {k: set(vars(m)) for k, m in net.named_modules()}, copy.deepcopy(net.state_dict())
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    xs = torch.stack([x, 2 * x, 3 * x])
    runs = {
        "value": lambda: score(x),
        "gradient": lambda: eg.gradient(score)(x),
        "integrated_gradients": lambda: eg.integrated_gradients(score, steps=9)(x, 0 * x),
        "batched": lambda: eg.batched(eg.gradient(score))(xs),
        "occlusion": lambda: eg.occlusion(score, size=4)(x, 0 * x),
        "guided_backprop": lambda: eg.guided_backprop(score)(x),
        "grad_cam": lambda: eg.grad_cam(score, "2")(x),
        "second order": lambda: torch.func.grad(lambda z: eg.gradient(score)(z).square().sum())(x),
    }
    for name, run in runs.items():
        plain, count = run(), graphs()
        with eg.execution(compile=True, evaluation="whole"):
            compiled = run()
        close(compiled, plain, 1e-5)
        if name in ("value", "gradient"):
            assert graphs() > count
        if name in ("guided_backprop", "second order"):
            assert (
                graphs() == count
            )  # rules see operators, and compiled code has one derivative: both run plainly
    assert {k: set(vars(m)) for k, m in net.named_modules()} == before
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.slow
def test_compiled_networks_follow_their_network():
    net, x = network(), image()
    model = eg.from_module(net)
    model(x)  # shows that it writes nothing into its buffers
    with eg.execution(compile=True):
        model(x)
        with torch.no_grad():
            net[0].weight.mul_(2)
        written = model(x)
        net[3] = nn.Conv2d(6, 3, 1)
        replaced = model(x)
    net[2] = nn.Sigmoid()
    with eg.execution(compile=True):
        other = model(x)
    close(other, eg.from_module(net)(x), 1e-5)
    net[2] = nn.ReLU()
    close(replaced, eg.from_module(net)(x), 1e-5)
    again = network()
    with torch.no_grad():
        again[0].weight.mul_(2)
    close(written, eg.from_module(again)(x), 1e-5)


@pytest.mark.slow
def test_what_cannot_be_compiled_is_refused():
    with eg.execution(compile=True):
        with pytest.raises(
            ValueError, match=r"Deciding: expected a network that torch.compile takes as a whole"
        ):
            eg.from_module(Deciding())(image())
        with pytest.raises(ValueError, match="got one that writes into its buffers"):
            eg.from_module(Counting())(image())
        script = torch.jit.script(nn.ReLU())
        with pytest.raises(ValueError, match="TorchScript is compiled already"):
            eg.from_module(script)(image())


@pytest.mark.slow
def test_a_missing_compiler_is_said(monkeypatch):
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setattr(config, "force_disable_caches", True)
    try:
        told = r"ReLU: expected a C\+\+ compiler to compile with, got none. Install one"
        with eg.execution(compile=True), pytest.raises(ValueError, match=told):
            eg.from_module(nn.ReLU())(image(2.0))
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()


def test_nothing_is_compiled_where_operators_are_watched():
    assert compiling.usable()
    with torch.overrides.TorchFunctionMode():
        assert not compiling.usable()
    with eg.execution(compile=True) as outer, eg.execution(compile=False) as inner:
        assert outer.compile
        assert not inner.compile
    with pytest.raises(TypeError, match="expected compile to be a bool, got int 1"), eg.execution(compile=1):
        pass
