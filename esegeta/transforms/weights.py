"""Statistics of an explanation over noisy weights."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from esegeta import random
from esegeta._facts import explanation, facts_of
from esegeta._registry import Cost, combination, takes_key
from esegeta._types import Explain
from esegeta.engine import check, stream
from esegeta.noise import Noise
from esegeta.transforms.smoothing import smooth

Weights = Mapping[str, Tensor]


@combination(
    family="weights",
    paper="Bykov, Hedstroem, Nakajima, Hoehne 2022, arXiv:2106.10185",
    example={"samples": 2},
    leads=2,
    cost=lambda samples: Cost(explanations=samples),
)
def noise_grad(
    build: Callable[[Weights], Explain], parameters: Weights, *, noise: float | int = 0.2, samples: int = 10
) -> Explain:
    r"""Average an explanation over networks with multiplicative noise on their weights.

    .. math:: \frac1n \sum_k a(x;\, \theta \odot (1 + \sigma \epsilon_k)), \qquad \epsilon_k \sim N(0, 1)

    Args:
        build: from parameters to the explanation of the network that has them, for example
            ``lambda p: eg.gradient(eg.reducers.class_sum(model_of(p), 1))`` with ``model_of, parameters =
            eg.models.parametrised(module)``.
        parameters: the network's own, by name.
        noise: sigma.
        samples: how many networks. Each has its own weights, so they run one after another.

    Returns:
        ``(x, *refs, key=) -> like x``.

    Example:
        >>> import torch, esegeta as eg
        >>> model_of, parameters = eg.models.parametrised(torch.nn.Linear(2, 1))
        >>> build = lambda p: eg.gradient(lambda x: model_of(p)(x).sum())
        >>> a = noise_grad(build, parameters, noise=0.0)(torch.ones(2), key=0)
        >>> torch.allclose(a, parameters["weight"][0])
        True

    Reference:
        Bykov, Hedstroem, Nakajima, Hoehne 2022, arXiv:2106.10185.
    """
    name = "noise_grad"
    sigma = check.non_negative(name, "noise", noise)
    n = check.positive_count(name, "samples", samples)
    check.function(name, "a function from weights to an explanation", build, "Pass for example lambda p: ...")
    if not isinstance(parameters, Mapping):
        advice = "See esegeta.models.parametrised"
        raise check.refused_type(name, "parameters by name", check.describe(parameters), advice)
    if not parameters:
        raise check.refused(name, "parameters to disturb", "none", "See esegeta.models.parametrised")
    names = sorted(parameters)
    example = check.explanation(name, build(parameters))
    random_inside = takes_key(example)

    def explain(x: Tensor, *refs: Tensor, key: int | Tensor | None = None) -> Tensor:
        known = check.key(name, key)

        def once(i: Tensor) -> Tensor:
            here = random.fold_in(known, i)
            disturbed = {}
            for k, which in enumerate(names):
                p = parameters[which]
                draw = random.normal(random.fold_in(here, k), tuple(p.shape), dtype=p.dtype, device=p.device)
                disturbed[which] = p * (1 + sigma * draw)
            extra = {"key": random.fold_in(here, len(names))} if random_inside else {}
            return build(disturbed)(x, *refs, **extra)

        return stream.mean(once, torch.arange(n, device=x.device), label=name, together=False)

    refs = facts_of(example).refs
    return explain if refs is None else explanation(explain, name, refs, key=True, doc=example.__doc__)


@combination(
    family="weights",
    paper="Bykov, Hedstroem, Nakajima, Hoehne 2022, arXiv:2106.10185",
    example={"samples": 2, "input_samples": 2},
    leads=2,
    cost=lambda samples, input_samples: Cost(explanations=samples * input_samples),
)
def fusion_grad(
    build: Callable[[Weights], Explain],
    parameters: Weights,
    *,
    noise: float | int = 0.2,
    samples: int = 10,
    input_noise: float | int | Noise = 0.1,
    input_samples: int = 10,
) -> Explain:
    r"""Put noise on the weights and on the input: ``noise_grad`` of ``smooth``.

    .. math:: \frac1{nm} \sum_{k,l} a(x + \eta_l;\, \theta \odot (1 + \sigma \epsilon_k))

    Args:
        build: as in ``noise_grad``.
        parameters: the network's own, by name.
        noise: sigma on the weights.
        samples: how many networks.
        input_noise: as ``noise`` in ``smooth``.
        input_samples: how many noisy inputs for each network.

    Returns:
        ``(x, *refs, key=) -> like x``.

    Example:
        >>> import torch, esegeta as eg
        >>> model_of, parameters = eg.models.parametrised(torch.nn.Linear(2, 1))
        >>> build = lambda p: eg.gradient(lambda x: model_of(p)(x).sum())
        >>> a = fusion_grad(build, parameters, noise=0.0, samples=2, input_samples=2)(torch.ones(2), key=0)
        >>> torch.allclose(a, parameters["weight"][0])
        True

    Reference:
        Bykov, Hedstroem, Nakajima, Hoehne 2022, equation 5, arXiv:2106.10185.
    """
    check.function(
        "fusion_grad", "a function from weights to an explanation", build, "Pass for example lambda p: ..."
    )
    return noise_grad(
        lambda p: smooth(build(p), noise=input_noise, samples=input_samples),
        parameters,
        noise=noise,
        samples=samples,
    )
