"""Explanations inside a loss: their own derivatives."""

from collections.abc import Callable

import pytest
import torch
from cases import Case, Score, make_case
from torch import Tensor, nn

import esegeta as eg

BASELINE, BASELINES = make_case("softplus").refs(("baseline", "baselines"))


def _explanations(score: Score) -> dict[str, Callable[[Tensor], Tensor]]:
    baseline, many = BASELINE, BASELINES
    ig = eg.integrated_gradients(score, steps=4)
    return {
        "ig": lambda x: ig(x, baseline),
        "smooth(ig)": lambda x: eg.smooth(ig, noise=0.2, samples=3)(x, baseline, key=1),
        "expected_gradients": lambda x: eg.expected_gradients(score, samples=5)(x, many, key=1),
        "idgi": lambda x: eg.idgi(score, steps=4)(x, baseline),
        "blur": lambda x: eg.blur_integrated_gradients(score, steps=4, sigma=2.0)(x),
        "over_baselines(ig)": lambda x: eg.over_baselines(ig)(x, many),
    }


WHICH = sorted(_explanations(lambda x: x.sum()))


def _network(case: Case) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Softplus(), nn.Conv2d(3, 2, 1)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(case.draw(f"p{i}", *p.shape) / 2)
    return net.eval()


def _central(fn: Callable[[float], Tensor], h: float = 1e-4) -> float:
    return float((fn(h) - fn(-h)) / (2 * h))


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("entry", ["plain function", "from_module"])
def test_the_gradient_of_a_prior_with_respect_to_the_input(which, entry):
    case = make_case("softplus")
    network = eg.reducers.class_sum(eg.from_module(_network(case)), 1)
    score = network if entry == "from_module" else case.score
    explain = _explanations(score)[which]
    prior = lambda x: explain(x).square().sum()
    x, v = case.x, case.draw("direction", *case.shape)
    expected = _central(lambda h: prior(x + h * v))
    by_func = torch.func.grad(prior)(x)
    assert float((by_func * v).sum()) == pytest.approx(expected, rel=1e-5)
    z = x.clone().requires_grad_()
    prior(z).backward()
    assert torch.allclose(z.grad, by_func, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", WHICH)
def test_the_gradient_of_a_prior_with_respect_to_the_parameters(which):
    case = make_case("softplus")
    build, parameters = eg.models.parametrised(_network(case))
    x = case.x

    def prior(p):
        return _explanations(eg.reducers.class_sum(build(p), 1))[which](x).square().sum()

    v = {name: case.draw(name, *p.shape) for name, p in parameters.items()}
    expected = _central(lambda h: prior({name: p + h * v[name] for name, p in parameters.items()}))
    by_func = torch.func.grad(prior)(parameters)
    assert float(sum((by_func[name] * v[name]).sum() for name in v)) == pytest.approx(expected, rel=1e-5)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    prior(leaves).backward()
    for name, leaf in leaves.items():
        found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert torch.allclose(found, by_func[name], rtol=1e-10, atol=1e-12), name


def test_many_priors_at_once_equal_a_loop():
    case = make_case("softplus")
    prior = lambda x: _explanations(case.score)["ig"](x).square().sum()
    slope = torch.func.grad(prior)
    loop = torch.stack([slope(x) for x in case.xs])
    assert torch.allclose(torch.func.vmap(slope)(case.xs), loop, rtol=1e-10)
    assert torch.allclose(eg.batched(slope)(case.xs), loop, rtol=1e-10)
