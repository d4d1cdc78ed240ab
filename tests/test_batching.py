"""Many examples in bounded memory: each answer is that of its example alone."""

import pytest
import torch
from rounding import close
from torch import nn
from torch.func import grad, vmap

import esegeta as eg
from esegeta.engine import levels


def score(x):
    return (x**3).sum() + x.flatten()[0] * x.sum().sin()


@pytest.fixture
def data():
    return torch.rand(7, 2, 3, dtype=torch.float64), torch.rand(7, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50, None])
def test_batched_is_a_loop(chunk, data):
    xs, baselines = data
    ig = eg.integrated_gradients(score, steps=5)
    expected = torch.stack([ig(x, b) for x, b in zip(xs, baselines, strict=True)])
    with eg.execution(chunk=chunk):
        close(eg.batched(ig)(xs, baselines), expected)
        close(eg.batched(ig, in_dims=(1, -1))(xs.movedim(0, 1), baselines.movedim(0, -1)), expected)
        shared = eg.batched(ig, in_dims=(0, None))(xs, baselines[0])
    close(shared, torch.stack([ig(x, baselines[0]) for x in xs]))


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_batched_networks_are_a_loop(chunk):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.SiLU(), nn.Conv2d(3, 2, 3)).eval().double()
    model, xs = eg.from_module(net), torch.randn(5, 1, 8, 8, dtype=torch.float64)

    def explain(x):
        return eg.gradient(eg.reducers.predicted_class_sum(model, 1, at=x))(x)

    with eg.execution(chunk=chunk):
        close(eg.batched(explain)(xs), torch.stack([explain(x) for x in xs]))


def noisy(x, *, key=None):
    return x * eg.random.uniform(key, (3,), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_keys(chunk, data):
    xs, keys = data[0], torch.arange(7) + 3
    with eg.execution(chunk=chunk):
        close(
            eg.batched(noisy)(xs, key=keys),
            torch.stack([noisy(x, key=k) for x, k in zip(xs, keys, strict=True)]),
        )
        close(eg.batched(noisy)(xs, key=5), torch.stack([noisy(x, key=5) for x in xs]))
        close(eg.batched(noisy)(xs, key=torch.tensor(5)), torch.stack([noisy(x, key=5) for x in xs]))


def test_the_shape_of_an_answer_may_differ_from_that_of_the_input(data):
    got = eg.batched(lambda x: x.sum(0, keepdim=True).float())(data[0])
    assert got.dtype == torch.float32
    close(got, data[0].sum(1, keepdim=True).float())


@pytest.mark.parametrize("chunk", [2, None])
def test_batched_inside_of_derivatives_and_maps(chunk, data):
    explain = eg.gradient(score)
    many, plain = eg.batched(explain), vmap(grad(score))
    xs = data[0]
    with eg.execution(chunk=chunk):
        close(grad(lambda xs: many(xs).square().sum())(xs), grad(lambda xs: plain(xs).square().sum())(xs))
        z = xs.clone().requires_grad_()
        (got,) = torch.autograd.grad(many(z).square().sum(), z)
        close(got, grad(lambda xs: plain(xs).square().sum())(xs))
        stacked = torch.stack([xs, 2 * xs])
        close(vmap(many)(stacked), torch.stack([plain(xs), plain(2 * xs)]))
        close(vmap(many, in_dims=1)(stacked.movedim(0, 1)), torch.stack([plain(xs), plain(2 * xs)]))
        w = torch.rand(3, dtype=torch.float64, requires_grad=True)
        by_weights = eg.batched(eg.gradient(lambda x: ((x * w) ** 3).sum()))(xs).sum()
        close(torch.autograd.grad(by_weights, w)[0], (9 * w**2 * xs**2).sum((0, 1)))


def test_memory_is_that_of_a_chunk(data):
    sizes = []

    def explain(x):
        sizes.append(levels.mapped())
        return x * 2

    with eg.execution(chunk=3):
        eg.batched(explain)(data[0])
    assert sizes == [3, 3, 1]


def test_bad_stacks_are_refused(data):
    xs, _ = data
    ig = eg.integrated_gradients(score, steps=2)
    with pytest.raises(ValueError, match=r"batched: expected one entry per example .* got \[7, 3\] entries"):
        eg.batched(ig)(xs, xs[:3])
    with pytest.raises(ValueError, match=r"batched: expected one entry per example .* got \[0\] entries"):
        eg.batched(eg.gradient(score))(xs[:0])
    with pytest.raises(ValueError, match=r"batched: expected in_dims for 2 tensors, .* got \(0,\)"):
        eg.batched(ig, in_dims=(0,))(xs, xs)
    with pytest.raises(ValueError, match="the first one mapped"):
        eg.batched(ig, in_dims=(None, 0))(xs[0], xs)
    with pytest.raises(ValueError, match=r"got \[7, 2\] entries"):
        eg.batched(noisy)(xs, key=torch.arange(2))


# ------------------------------------------------------------------ explained


def test_explained_is_a_loop_over_any_iterable(data):
    xs, baselines = data
    ig = eg.integrated_gradients(score, steps=3)
    expected = [ig(x, b) for x, b in zip(xs, baselines, strict=True)]
    for chunk in (1, 2, 3, 50, None):
        with eg.execution(chunk=chunk):
            for examples in (
                zip(xs, baselines, strict=True),
                [[x, b] for x, b in zip(xs, baselines, strict=True)],
            ):
                got = list(eg.explained(ig, examples))
                close(torch.stack(got), torch.stack(expected))
    assert list(eg.explained(ig, [])) == []
    close(torch.stack(list(eg.explained(noisy, xs, key=3))), torch.stack([noisy(x, key=3) for x in xs]))


def test_explained_keeps_the_order_of_different_shapes():
    shapes = [(1, 2), (1, 2), (1, 3), (1, 2), (2, 2), (2, 2), (2, 2), (1, 4)]
    xs = [torch.rand(s, dtype=torch.float64) for s in shapes]
    got = list(eg.explained(eg.gradient(score), iter(xs)))
    assert [a.shape for a in got] == shapes
    for a, x in zip(got, xs, strict=True):
        close(a, grad(score)(x))


@pytest.mark.parametrize(("chunk", "ahead"), [(1, 1), (3, 3), (None, 2)])
def test_explained_looks_only_a_chunk_ahead(chunk, ahead):
    taken = []

    def source():
        for i in range(20):
            taken.append(i)
            yield torch.full((1, 2), float(i))

    with eg.execution(chunk=chunk):
        for i, a in enumerate(eg.explained(eg.gradient(lambda x: (x**2).sum()), source())):
            assert a.tolist() == [[2.0 * i] * 2]
            assert i < len(taken) <= i + ahead
    assert len(taken) == 20


def test_explained_starts_when_asked():
    def source():
        raise AssertionError("asked too early")
        yield

    eg.explained(eg.gradient(score), source())


def test_explained_keeps_dtypes_apart():
    xs = [torch.ones(1, 2), torch.ones(1, 2, dtype=torch.float64)]
    assert [a.dtype for a in eg.explained(eg.gradient(score), xs)] == [torch.float32, torch.float64]
