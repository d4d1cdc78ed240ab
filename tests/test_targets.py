"""Class numbers, voxels, parts and neurons may differ between the examples of a batch: then they are tensors."""

import pytest
import torch

import esegeta as eg
from esegeta import reducers
from esegeta.reducers import predicted_mask

PER_EXAMPLE = {
    "class_sum": lambda m, x, t, u, v: reducers.class_sum(m, t),
    "class_mean": lambda m, x, t, u, v: reducers.class_mean(m, t, of="probabilities"),
    "predicted_class_sum": lambda m, x, t, u, v: reducers.predicted_class_sum(m, t, dynamic=True),
    "a frozen mask": lambda m, x, t, u, v: reducers.predicted_class_sum(m, t * 0, at=x * 0),
    "voxel": lambda m, x, t, u, v: reducers.voxel(m, t, v),
    "a voxel of one class": lambda m, x, t, u, v: reducers.voxel(m, 1, v),
    "a class at one voxel": lambda m, x, t, u, v: reducers.voxel(m, t, (0,) * (x.ndim - 1)),
    "region": lambda m, x, t, u, v: reducers.region(m, t, torch.ones(x.shape[1:], dtype=torch.bool)),
    "component": lambda m, x, t, u, v: reducers.component(m, t, u, dynamic=True),
    "boundary": lambda m, x, t, u, v: reducers.boundary(m, t, dynamic=True),
    "soft_count": lambda m, x, t, u, v: reducers.soft_count(m, t),
    "margin": lambda m, x, t, u, v: reducers.margin(m, t),
    "margin over another": lambda m, x, t, u, v: reducers.margin(m, t, u),
    "finer": lambda m, x, t, u, v: reducers.finer(m, t, dynamic=True, k=1),
    "log_probability": lambda m, x, t, u, v: reducers.log_probability(m, t),
    "independent labels": lambda m, x, t, u, v: reducers.log_probability(m, t * 0, exclusive=False),
    "predicted_count": lambda m, x, t, u, v: lambda x: x.sum() * reducers.predicted_count(m, t)(x),
    "logit": lambda m, x, t, u, v: reducers.logit(lambda x: m(x).flatten(1).mean(1), t),
    "probability": lambda m, x, t, u, v: reducers.probability(lambda x: m(x).flatten(1).mean(1), t),
    "predicted_mask": lambda m, x, t, u, v: lambda z: (z * predicted_mask(m(z), t)).sum(),
}


@pytest.mark.parametrize("grid", [(5,), (4, 5), (3, 4, 3)], ids=str)
@pytest.mark.parametrize("classes", [1, 3])
def test_targets_may_differ_between_examples(grid, classes):
    """One at a time with ints, with tensors, under vmap, in chunks: the same gradients."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(classes, 2, generator=generator, dtype=torch.float64)
    model = lambda x: torch.tanh(torch.einsum("kc,c...->k...", weights, x)) + (0.1 if classes == 1 else 0)
    xs = torch.randn(4, 2, *grid, generator=generator, dtype=torch.float64)
    targets = torch.arange(4) % max(classes, 2)
    others = (targets + 1) % max(classes, 2)
    voxels = torch.stack([torch.randint(0, n, (4,), generator=generator) for n in grid], 1)
    for name, make in PER_EXAMPLE.items():
        if name == "a frozen mask" and classes == 1:
            continue  # class 0 is predicted nowhere at a black image

        def explain(x, t, u, v, make=make):
            return torch.func.grad(make(model, x, t, u, v))(x)

        wanted = torch.stack(
            [
                explain(x, int(t), int(u), tuple(map(int, v)))
                for x, t, u, v in zip(xs, targets, others, voxels, strict=True)
            ]
        )
        given = (xs, targets, others, voxels)
        alone = torch.stack([explain(*one) for one in zip(*given, strict=True)])
        with eg.execution(chunk=3):
            chunks = eg.batched(explain)(*given)
        for found in (alone, torch.func.vmap(explain)(*given), chunks):
            torch.testing.assert_close(
                found, wanted, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_methods_explain_each_example_for_its_own_target():
    xs, targets = torch.randn(3, 2, 4, 5), torch.tensor([2, 0, 1])
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(2)
    ).eval()
    model = eg.from_module(torch.nn.Sequential(net, torch.nn.AdaptiveAvgPool1d(1), torch.nn.Flatten()).eval())
    for method in (
        eg.gradient,
        eg.guided_backprop,
        eg.lrp,
        lambda score: lambda x: eg.deep_lift(score)(x, 0 * x),
        lambda score: lambda x: eg.occlusion(score, size=2, stride=1)(x, 0 * x),
        lambda score: eg.grad_cam(score, "0.1"),
    ):
        many = eg.batched(lambda x, t, method=method: method(eg.reducers.logit(model, t))(x))(xs, targets)
        each = [method(eg.reducers.logit(model, int(t)))(x) for x, t in zip(xs, targets, strict=True)]
        torch.testing.assert_close(many, torch.stack(each), rtol=1e-4, atol=1e-6)


def test_neurons_may_differ_between_examples():
    score = lambda x: (eg.mark(x * torch.tensor([[1.0], [2.0]]), "layer") ** 2).sum()
    xs, channels, units = torch.randn(3, 1, 2), torch.tensor([0, 1, -1]), torch.tensor([1, 0, 1])
    explain = lambda x, c, u: eg.neuron_conductance(score, "layer", neuron=(c, u), steps=2)(x, 0 * x)
    each = [explain(x, int(c), int(u)) for x, c, u in zip(xs, channels, units, strict=True)]
    torch.testing.assert_close(eg.batched(explain)(xs, channels, units), torch.stack(each))
    with pytest.raises(
        ValueError, match=r"neuron_conductance: expected a neuron within \(2, 2\), got \(\[.*2"
    ):
        eg.batched(explain)(xs, torch.tensor([0, 1, 2]), units)


def test_a_target_that_does_not_exist_is_refused_for_any_example():
    xs, model = torch.randn(3, 1, 4, 5), lambda x: torch.cat([x, -x])
    one = lambda make: lambda x, t: eg.gradient(make(t))(x)
    summed, at_voxel = one(lambda t: reducers.class_sum(model, t)), one(lambda v: reducers.voxel(model, 1, v))
    for run in (torch.func.vmap, eg.batched):
        with pytest.raises(ValueError, match=r"class_sum: expected a target below 2.* got target \[.*2"):
            run(summed)(xs, torch.tensor([0, 2, 1]))
        with pytest.raises(
            ValueError, match=r"class_sum: expected target to be a class number 0, 1, .*got \[.*-1"
        ):
            run(summed)(xs, torch.tensor([0, -1, 1]))
        with pytest.raises(
            ValueError, match=r"voxel: expected an index with 2 numbers, from 0 to below \(4, 5\)"
        ):
            run(at_voxel)(xs, torch.tensor([[0, 0], [3, 5], [1, 1]]))
        with pytest.raises(ValueError, match=r"margin: expected two classes, got .* twice"):
            run(one(lambda t: reducers.margin(model, 1, t)))(xs, torch.tensor([0, 1, 0]))
    for wrong, kind, message in [
        (torch.tensor(1.0), TypeError, "an integer dtype"),
        (torch.tensor(True), TypeError, "an integer dtype"),
        (torch.tensor([1]), ValueError, "use esegeta.batched"),
        (torch.tensor(2), ValueError, "below 2"),
        (torch.tensor(-1), ValueError, "class number 0, 1"),
    ]:
        with pytest.raises(kind, match=f"class_sum: expected .*{message}"):
            reducers.class_sum(model, wrong)(xs[0])
