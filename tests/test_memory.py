"""What a computation occupies: forecasts are what runs take."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

import esegeta as eg
from esegeta import zoo
from esegeta.engine import memory
from esegeta.engine.memory import Live, budget, forecast, is_out_of_memory


def conv_net(axes=2):
    torch.manual_seed(1)
    conv, pool = (nn.Conv2d, nn.MaxPool2d) if axes == 2 else (nn.Conv3d, nn.MaxPool3d)
    return nn.Sequential(
        conv(2, 6, 3, padding=1), nn.ReLU(), pool(2), conv(6, 6, 3, padding=1), nn.SiLU(),
        nn.Upsample(scale_factor=2), conv(6, 3, 1),
    ).eval()  # fmt: skip


def commonest(model, x):
    return int(model(x).argmax(0).flatten().mode().values)


def measured(fn, *args):
    with Live() as live:
        fn(*args)
    return live.peak


def test_live_counts_what_is_alive_at_once():
    with Live() as live:
        a = torch.zeros(256)
        b = a + 1
        assert live.now == 2048
        a.add_(1)
        c = b.view(16, 16)[3]
        assert live.now == 2048
        del a
        assert live.now == 1024
        del b
        assert live.now == 1024  # c is a view of it
        del c
        assert live.now == 0
    assert live.peak == 2048


def test_views_of_tensors_from_outside_are_no_allocations():
    x, weight = torch.zeros(256), torch.zeros(100, 100)
    assert forecast(lambda x: x.view(16, 16), x) == 0
    assert forecast(lambda x: x[None] + 1, x) == 1024
    assert measured(lambda: torch.ones(2, 100) @ weight.t()) < 4 * 2 * 100 * 3


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("layout", ["auto", "contiguous"])
def test_a_forecast_is_what_a_gradient_takes(axes, layout):
    model = eg.from_module(conv_net(axes))
    xs = torch.randn(3, 2, *(16,) * axes)
    vmap(model)(xs)  # the check of the first batch is once only
    score = eg.reducers.predicted_class_sum(model, commonest(model, xs[0]), at=xs[0])
    for explain in (eg.gradient(score), eg.gradient(lambda x: model(x).square().sum()), lambda x: model(x)):
        with eg.execution(layout=layout):
            assert forecast(vmap(explain), xs) == pytest.approx(measured(vmap(explain), xs), rel=0.02)
            assert forecast(explain, xs[0]) == pytest.approx(measured(explain, xs[0]), rel=0.02)
            two = torch.cat([xs, xs])  # one alone may be paired
            assert forecast(vmap(explain), two) > 1.8 * forecast(vmap(explain), xs)


def test_a_forecast_is_what_a_plain_function_takes():
    def fn(x):
        for _ in range(9):
            x = x.sin() * x
        return x.sum()

    xs = torch.randn(4, 1000)
    assert forecast(vmap(grad(fn)), xs) == measured(vmap(grad(fn)), xs)
    assert forecast(vmap(eg.gradient(fn)), xs) == pytest.approx(measured(vmap(eg.gradient(fn)), xs), rel=0.01)
    assert forecast(lambda x: (x + 1) * 2, xs) == measured(lambda x: (x + 1) * 2, xs) == 32000


def test_a_forecast_computes_nothing():
    kinds = []
    model = eg.from_module(lambda x: (kinds.append(type(x).__name__), x**2)[1])
    x = torch.ones(3, 1, 100, 1000)
    forecast(vmap(grad(lambda x: model(x).sum())), x)
    assert torch.equal(x, torch.ones_like(x))
    size = forecast(vmap(grad(lambda x: model(x).sum())), torch.empty(1, 1, 1).expand(2000, 2000, 2000))
    assert size > 2000**3 * 4
    assert set(kinds) == {"FakeTensor"}


def test_a_forecast_leaves_the_first_check_to_a_real_batch():
    model = eg.from_module(lambda x: x * x.mean(0, keepdim=True))
    forecast(vmap(model), torch.ones(3, 1, 4))
    xs = torch.randn(3, 1, 4)
    with pytest.warns(eg.ExecutionWarning, match="influence each other"):
        torch.testing.assert_close(vmap(model)(xs), xs**2)


def test_a_forecast_of_a_network_for_single_examples():
    def fn(x):
        if len(x) > 1:
            raise ValueError("one only")
        return x * 2

    assert forecast(vmap(eg.from_module(fn)), torch.ones(4, 1, 256)) > 0


def test_streams_of_any_length_are_forecast_alike():
    model, x = eg.from_module(conv_net()), torch.randn(2, 16, 16)
    score = eg.reducers.predicted_class_sum(model, commonest(model, x), at=x)
    calls = []
    counted = lambda x: (calls.append(1), score(x))[1]
    peaks = []
    for steps in (8, 256):
        calls.clear()
        explain = eg.integrated_gradients(counted, steps=steps)
        peaks.append((forecast(explain, x, torch.zeros_like(x)), len(calls)))
    (short, few), (long, many) = peaks
    assert many == few
    assert long - short == 2 * (256 - 8) * 4  # nodes and weights
    with eg.execution(chunk=2):
        real = measured(eg.integrated_gradients(score, steps=8), x, torch.zeros_like(x))
        assert short == pytest.approx(real, rel=0.05)


def test_values_are_missed_in_a_forecast():
    with pytest.raises(Exception, match=r"item|data|local_scalar"):
        forecast(lambda x: x * x.max().item(), torch.ones(3))


def test_budgets():
    assert budget(torch.device("cpu"), 77) == 77
    assert budget(torch.device("cpu"), None) == memory.CPU_TARGET


def test_errors_that_say_that_memory_ran_out():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "explain",
    [
        lambda score, n: lambda x: eg.integrated_gradients(score, steps=n)(x, torch.zeros_like(x)),
        lambda score, n: lambda x: eg.smooth(eg.gradient(score), samples=n)(x, key=0),
        lambda score, n: lambda x: eg.variance(eg.gradient(score), samples=n)(x, key=0),
        lambda score, n: lambda x: eg.idgi(score, steps=n)(x, torch.zeros_like(x)),
        lambda score, n: lambda x: eg.expected_gradients(score, samples=n)(x, x[None] * 0, key=0),
    ],
    ids=["integrated_gradients", "smooth", "variance", "idgi", "expected_gradients"],
)
def test_what_really_runs_takes_no_more_for_more_steps(explain):
    x = eg.random.uniform(0, (1, 16, 16, 16))
    score = eg.reducers.class_sum(eg.from_module(zoo.small_unet(3)), 1)
    eg.gradient(score)(x)  # the check of the network is behind us

    def peak(n):
        with eg.execution(memory="4 MiB"), Live() as live:
            explain(score, n)(x)
        return live.peak

    assert peak(256) <= 1.05 * peak(8)
