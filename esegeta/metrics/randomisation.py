"""Whether a map depends on what the network has learnt: its weights are randomised, and the map should change."""

import copy
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from esegeta import random
from esegeta._registry import Cost, metric
from esegeta._types import Explain, Model, Score
from esegeta.engine import check
from esegeta.metrics.explanations import asked, fresh
from esegeta.metrics.similarity import rank_correlation
from esegeta.models import from_module
from esegeta.transforms.smoothing import smooth

How = Literal["permute", "normal", "uniform", "reset"]
Similarity = Callable[[Tensor, Tensor], Tensor]
_FRESH = {
    "running_mean": 0,
    "running_var": 1,
    "num_batches_tracked": 0,
}  # statistics of a norm that has seen nothing


class Cascade(NamedTuple):
    """How alike the maps of randomised networks are to that of the network, or another number of each.

    layers: names, in the order in which they were randomised; values: the number before the first of them, which is 1
    for a similarity that is 1 for equal maps, and after each; area: the mean of those after each, which is lower
    where a map follows the network.
    """

    layers: tuple[str, ...]
    values: Tensor
    area: Tensor

    def rows(self) -> list[dict[str, Any]]:
        """Return a tidy table: a row for each step, with its number, the layer that became random, and the value.

        >>> found = Cascade(("head",), torch.tensor([1.0, 0.5]), torch.tensor(0.5))
        >>> found.rows()[1]
        {'step': 1, 'layer': 'head', 'value': 0.5}
        """
        names = ("", *self.layers)
        return [{"step": n, "layer": names[n], "value": v} for n, v in enumerate(self.values.tolist())]

    def csv(self) -> str:
        """Return the rows as comma-separated values, what is missing as nothing."""
        lines = ["step,layer,value"]
        lines += [
            f"{r['step']},{r['layer']},{'' if math.isnan(r['value']) else r['value']}" for r in self.rows()
        ]
        return "\n".join(lines) + "\n"


class CascadeMaps(NamedTuple):
    """The maps of a network as its layers become random.

    layers: names, in the order in which they were randomised; maps: (n + 1, C, *S), that of the network and that
    after each.
    """

    layers: tuple[str, ...]
    maps: Tensor


def layers_of(module: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Return the names of the modules that have parameters of their own, in the order in which they first run.

    A module that does not run is left out: to randomise it changes nothing.

    Args:
        module: the network; it is not changed.
        x: an example.

    Example:
        >>> from esegeta import zoo
        >>> layers_of(zoo.small_classifier(2), torch.zeros(1, 16, 16))[-1]
        'linear'
    """
    own = copy.deepcopy(module)
    order: list[str] = []

    def entered(name: str, *_: Any) -> None:
        if name not in order:
            order.append(name)

    for name, part in own.named_modules():
        if any(True for _ in part.parameters(recurse=False)):
            part.register_forward_pre_hook(functools.partial(entered, name))
    with torch.no_grad():
        own(x[None])
    return tuple(order)


def randomised(module: nn.Module, layers: Sequence[str], *, how: How = "permute", key: Any = 0) -> nn.Module:
    """Return a copy of a network in which the parameters of some layers are random.

    Every layer has draws of its own, by its name: the same whichever others are randomised with it.

    Args:
        module: the network; it is not changed.
        layers: names of modules, of which the own parameters become random.
        how: "permute" shuffles the values of each parameter; "normal" draws from a normal, "uniform" from a uniform
            distribution with its mean and variance; "reset" draws as torch does where layers are made: uniform with a
            bound of one over the root of the number of inputs, ones and zeros and fresh statistics for norms. The
            others keep the statistics of norms.
        key: of the draws.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> other = randomised(nn.Sequential(net), ["0"], key=3)
        >>> sorted(other[0].weight.flatten().tolist()) == sorted(net.weight.flatten().tolist())
        True
    """
    where = "metrics.randomised"
    if how not in ("permute", "normal", "uniform", "reset"):
        advice = "See the docstring"
        raise check.refused(where, 'how "permute", "normal", "uniform" or "reset"', repr(how), advice)
    own = copy.deepcopy(module)
    parts = dict(own.named_modules())
    word = check.key(where, key)
    with torch.no_grad():
        for name in layers:
            if name not in parts:
                known = ", ".join(list(parts)[1:6])
                raise check.refused(where, "names of modules", repr(name), f"There are {known}, ...")
            here = random.fold_in(word, _number(name))
            own_parameters = dict(parts[name].named_parameters(recurse=False))
            for n, kind in enumerate(sorted(own_parameters)):
                p = own_parameters[kind]
                p.copy_(_drawn(p, parts[name], how, random.fold_in(here, n)))
            if how == "reset":
                for kind, buffer in parts[name].named_buffers(recurse=False):
                    if kind in _FRESH:
                        buffer.fill_(_FRESH[kind])
    return own


def _number(name: str) -> int:
    """A number for a name, the same in every process."""
    return zlib.crc32(name.encode())


def _drawn(p: Tensor, part: nn.Module, how: How, key: Tensor) -> Tensor:
    wide = torch.promote_types(p.dtype, torch.float32)
    if how == "permute":
        order = random.permutation(key, p.numel(), device=p.device)
        return p.flatten()[order].reshape(p.shape)
    values = p.to(wide)
    if how == "reset":
        weight = getattr(part, "weight", None)
        if isinstance(part, nn.PReLU):
            return torch.full_like(p, 0.25)
        if isinstance(part, nn.LayerNorm) or p.ndim < 2:  # biases, and the gains of norms
            if p is weight:
                return torch.ones_like(p)
            if isinstance(part, nn.LayerNorm) or not isinstance(weight, Tensor) or weight.ndim < 2:
                return torch.zeros_like(p)
            inputs = weight[0].numel()
        else:
            inputs = p[0].numel()
        spread = values.new_tensor(1 / inputs).sqrt()
        return ((2 * random.uniform(key, p.shape, dtype=wide, device=p.device) - 1) * spread).to(p.dtype)
    mean, deviation = values.mean(), values.std(correction=0)
    if how == "normal":
        drawn = random.normal(key, p.shape, dtype=wide, device=p.device)
    else:  # a uniform distribution on [-1, 1] has variance 1/3
        drawn = (2 * random.uniform(key, p.shape, dtype=wide, device=p.device) - 1) * 3**0.5
    return (mean + deviation * drawn).to(p.dtype)


def _refuse_without_parameters(where: str, method: object, module: object) -> None:
    fresh(where, method)
    if not isinstance(module, nn.Module):
        advice = "Pass the network itself, not a model"
        raise check.refused_type(where, "an nn.Module", check.describe(module), advice)
    if not any(True for _ in module.parameters()):
        raise check.refused(where, "a network with parameters", "none to randomise", "Pass another")


@metric(
    family="randomisation",
    better="lower",
    answer="curve",
    axes=("layers that are random, from the output down", "likeness to the map of the network"),
    needs=("explain", "network", "key"),
    paper="Adebayo et al. 2018, arXiv:1810.03292",
    also=("model_parameter_randomisation", "mprt"),
    cost=lambda: Cost(forwards=1, explanations=None),
)
def cascade(
    method: Callable[[Model], Explain],
    module: nn.Module,
    *,
    how: How = "permute",
    cumulative: bool = True,
    similarity: Similarity = rank_correlation,
    layers: Sequence[str] | None = None,
) -> Callable[..., Cascade]:
    r"""Randomise a network layer by layer, from the output down, and return how alike its maps stay.

    A map that stays the same does not show what the network has learnt. The network is not changed; one copy is in
    memory at a time, and the clean map is computed once.

    Args:
        method: from a model to an explanation, ``lambda model: eg.gradient(eg.reducers.class_sum(model, 1))``. Freeze
            masks before, with the model as it is: the mask of a random network is another target.
        module: the network, in evaluation mode.
        how: as in ``metrics.randomised``.
        cumulative: whether layers stay random; False randomises one at a time.
        similarity: of two maps.
        layers: names of modules in the order of the cascade; by default all that have parameters, in the reverse of
            the order in which they run.

    Returns:
        ``(x, *refs, key=) -> Cascade``.

    Example:
        >>> import esegeta as eg
        >>> from esegeta import zoo
        >>> found = cascade(lambda m: eg.gradient(eg.reducers.logit(m, 0)), zoo.small_classifier(2))
        >>> found(torch.rand(1, 16, 16), key=0).values[0].item()
        1.0

    Reference:
        Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim 2018, arXiv:1810.03292.
    """
    where = "metrics.cascade"
    _refuse_without_parameters(where, method, module)

    def measure(x: Tensor, *refs: Tensor, key: Any = None) -> Cascade:
        word = check.key(where, key)
        order, networks = _networks(module, x, how, cumulative, layers, random.fold_in(word, 1))
        maps = _explained(where, method, networks, x, refs, random.fold_in(word, 0))
        clean = next(maps)
        return _cascade(order, [similarity(clean, clean), *(similarity(clean, a) for a in maps)])

    return measure


def _networks(
    module: nn.Module, x: Tensor, how: How, cumulative: bool, layers: Sequence[str] | None, key: Tensor
) -> tuple[tuple[str, ...], Iterator[nn.Module]]:
    """The layers in the order of a cascade, and the network before and after each; one copy at a time."""
    order = tuple(layers) if layers is not None else layers_of(module, x)[::-1]

    def networks() -> Iterator[nn.Module]:
        yield module
        for n in range(1, len(order) + 1):
            yield randomised(module, order[:n] if cumulative else order[n - 1 : n], how=how, key=key)

    return order, networks()


def _explained(
    where: str, method: Any, networks: Iterator[nn.Module], x: Tensor, refs: tuple[Tensor, ...], key: Tensor
) -> Iterator[Tensor]:
    for network in networks:
        yield asked(fresh(where, method(from_module(network))), x, refs, key)


def _cascade(order: tuple[str, ...], values: list[Tensor]) -> Cascade:
    found = torch.stack([v.to(torch.float64) for v in values])
    return Cascade(order, found, found[1:].mean())


def cascade_maps(
    method: Callable[[Model], Explain],
    module: nn.Module,
    *,
    how: How = "permute",
    cumulative: bool = True,
    layers: Sequence[str] | None = None,
) -> Callable[..., CascadeMaps]:
    """Return the map after each step of ``cascade``: what its figure shows above the curve, ``eg.plot.cascade``.

    Args:
        method: as in ``cascade``.
        module: as in ``cascade``.
        how: as in ``cascade``.
        cumulative: as in ``cascade``.
        layers: as in ``cascade``.

    Returns:
        ``(x, *refs, key=) -> CascadeMaps``, all in memory: as many maps as there are layers, and one.

    Example:
        >>> import esegeta as eg
        >>> from esegeta import zoo
        >>> found = cascade_maps(lambda m: eg.gradient(eg.reducers.logit(m, 0)), zoo.small_classifier(2))
        >>> found(torch.rand(1, 16, 16), key=0).maps.shape[1:]
        torch.Size([1, 16, 16])
    """
    where = "metrics.cascade_maps"
    _refuse_without_parameters(where, method, module)

    def measure(x: Tensor, *refs: Tensor, key: Any = None) -> CascadeMaps:
        word = check.key(where, key)
        order, networks = _networks(module, x, how, cumulative, layers, random.fold_in(word, 1))
        maps = _explained(where, method, networks, x, refs, random.fold_in(word, 0))
        return CascadeMaps(order, torch.stack([a.detach() for a in maps]))

    return measure


def followed(found: CascadeMaps, *, similarity: Similarity = rank_correlation) -> Cascade:
    """Return how alike the maps of a cascade are to the first: ``cascade`` from maps that are there.

    >>> maps = CascadeMaps(("head",), torch.tensor([[[1.0, 2.0]], [[2.0, 1.0]]]))
    >>> followed(maps).values.tolist()
    [1.0, -1.0]
    """
    clean = found.maps[0]
    return _cascade(found.layers, [similarity(clean, a) for a in found.maps])


def cascaded(
    metric: Callable[..., Callable[..., Any]],
    method: Callable[[Model], Explain],
    module: nn.Module,
    *,
    score: Callable[[Model], Score] | None = None,
    how: How = "permute",
    cumulative: bool = True,
    layers: Sequence[str] | None = None,
) -> Callable[..., Cascade]:
    """Return what any other metric says of the maps of a network as its layers become random.

    A number that stays as good is not earned by the explanation.

    Args:
        metric: from (explain), or (explain, score) if ``score`` is given, to a measure: ``metrics.roc_auc``. Of a
            curve the area counts.
        method: as in ``cascade``.
        module: as in ``cascade``.
        score: from a model to the score that the metric runs: each step is judged by the network that it explains.
        how: as in ``cascade``.
        cumulative: as in ``cascade``.
        layers: as in ``cascade``.

    Returns:
        ``(x, *refs, key=, ...) -> Cascade`` with the number of each step, called as the metric itself.

    Example:
        >>> import esegeta as eg
        >>> from esegeta import metrics, zoo
        >>> logit = lambda model: eg.reducers.logit(model, 0)
        >>> judge = cascaded(metrics.deletion, lambda m: eg.gradient(logit(m)), zoo.small_classifier(2), score=logit)
        >>> found = judge(torch.rand(1, 16, 16), key=0)
        >>> len(found.values) == len(found.layers) + 1
        True

    Reference:
        Chatterjee et al. 2022, TorchEsegeta, section 2.4 (evaluation of the second level).
    """
    where = "metrics.cascaded"
    _refuse_without_parameters(where, method, module)

    def measure(x: Tensor, *refs: Tensor, key: Any = None, **called: Any) -> Cascade:
        word = check.key(where, key)
        order, networks = _networks(module, x, how, cumulative, layers, random.fold_in(word, 1))
        values = []
        for network in networks:
            model = from_module(network)
            explain = fresh(where, method(model))
            judged = metric(explain) if score is None else metric(explain, score(model))
            found = judged(x, *refs, key=random.fold_in(word, 0), **called)
            values.append(torch.as_tensor(getattr(found, "area", found)))
        return _cascade(order, values)

    return measure


@metric(
    family="randomisation",
    better="lower",
    answer="curve",
    axes=("layers that are random, from the output down", "likeness to the map of the network"),
    needs=("explain", "network", "key"),
    paper="Hedstroem et al. 2023, arXiv:2401.06465",
    example={"samples": 2},
    also=("smooth_mprt",),
    cost=lambda: Cost(forwards=1, explanations=None),
)
def smprt(
    method: Callable[[Model], Explain],
    module: nn.Module,
    *,
    noise: float = 0.1,
    samples: int = 25,
    how: How = "permute",
    cumulative: bool = True,
    similarity: Similarity = rank_correlation,
) -> Callable[..., Cascade]:
    r"""Randomise a network as ``cascade`` does, and return how alike the averages of noisy maps stay (sMPRT).

    .. math:: \bar a(x) = \frac1n \sum_k a(x + \eta_k), \qquad \eta_k \sim N(0, \sigma^2)

    The noise that shattered gradients bring into both maps hides how alike they are; averages have less of it. All
    networks see the same noise.

    Args:
        method: as in ``cascade``.
        module: as in ``cascade``.
        noise: :math:`\sigma` as a fraction of the range of x, or a noise of ``esegeta.noise``.
        samples: n.
        how: as in ``cascade``.
        cumulative: as in ``cascade``.
        similarity: as in ``cascade``.

    Returns:
        ``(x, *refs, key=) -> Cascade``.

    Example:
        >>> import esegeta as eg
        >>> from esegeta import zoo
        >>> method = lambda model: eg.gradient(eg.reducers.logit(model, 0))
        >>> found = smprt(method, zoo.small_classifier(2), samples=2)
        >>> round(found(torch.rand(1, 16, 16), key=0).values[0].item(), 6)
        1.0

    Reference:
        Hedstroem, Weber, Lapuschkin, Hoehne 2023, Sanity checks revisited, arXiv:2401.06465.
    """
    _refuse_without_parameters("metrics.smprt", method, module)
    averaged = lambda model: smooth(fresh("metrics.smprt", method(model)), noise=noise, samples=samples)
    return cascade(averaged, module, how=how, cumulative=cumulative, similarity=similarity)


@metric(
    family="randomisation",
    better="lower",
    needs=("explain",),
    paper="Sixt, Granz, Landgraf 2020, arXiv:1912.09818",
    example={"target": 0, "other": 1},
    cost=lambda: Cost(explanations=2),
)
def random_logit(
    explain_of: Callable[[int], Explain],
    target: int,
    other: int,
    *,
    similarity: Similarity = rank_correlation,
) -> Callable[..., Tensor]:
    """Return how alike the maps for two classes are: what is the same for every class explains none.

    Args:
        explain_of: from a class to its explanation.
        target: the class that is explained.
        other: another class.
        similarity: of two maps.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> model = lambda x: torch.stack([x.sum(), (x * torch.tensor([1.0, -1.0, 2.0])).sum()])
        >>> explain_of = lambda c: eg.input_x_gradient(eg.reducers.logit(model, c))
        >>> random_logit(explain_of, 1, 0)(torch.tensor([[1.0, 2.0, 3.0]])).item()
        0.5

    Reference:
        Sixt, Granz, Landgraf 2020, When explanations lie, arXiv:1912.09818.
    """
    where = "metrics.random_logit"
    fresh(where, explain_of)
    if target == other:
        advice = "The map of a class is like itself, whatever it shows"
        raise check.refused(where, "two different classes", f"{target} twice", advice)

    def measure(x: Tensor, *refs: Tensor, key: Any = None) -> Tensor:
        one, two = (asked(fresh(where, explain_of(c)), x, refs, key) for c in (target, other))
        return similarity(one, two)

    return measure


@metric(
    family="randomisation",
    better="higher",
    needs=("explain", "network", "key"),
    paper="Hedstroem et al. 2023, arXiv:2401.06465",
    also=("efficient_mprt", "entropy_change"),
    cost=lambda: Cost(forwards=1, explanations=2),
)
def emprt(
    method: Callable[[Model], Explain], module: nn.Module, *, how: How = "permute", bins: int = 100
) -> Callable[..., Tensor]:
    r"""Return how much the histogram of a map spreads as all of the network becomes random (eMPRT).

    .. math:: (H(a_{random}) - H(a)) / H(a)

    with the entropy of a histogram of values between the extremes of each map.

    Args:
        method: as in ``cascade``.
        module: as in ``cascade``.
        how: as in ``metrics.randomised``.
        bins: of the histogram.

    Returns:
        ``(x, *refs, key=) -> ()``; NaN for a constant map.

    Example:
        >>> import esegeta as eg
        >>> from esegeta import zoo
        >>> found = emprt(lambda m: eg.gradient(eg.reducers.logit(m, 0)), zoo.small_classifier(2))
        >>> found(torch.rand(1, 16, 16), key=0).isfinite().item()
        True

    Reference:
        Hedstroem, Weber, Lapuschkin, Hoehne 2023, Sanity checks revisited, arXiv:2401.06465.
    """
    where = "metrics.emprt"
    _refuse_without_parameters(where, method, module)
    check.positive_count(where, "bins", bins, least=2)

    def spread(a: Tensor) -> Tensor:
        values = a.double().flatten()
        low, high = values.amin(), values.amax()
        place = ((values - low) / torch.where(high > low, high - low, 1) * bins).long().clamp(max=bins - 1)
        p = values.new_zeros(bins).index_add(0, place, torch.ones_like(values)) / len(values)
        return -torch.where(p > 0, p * torch.where(p > 0, p, 1).log(), 0).sum()

    def measure(x: Tensor, *refs: Tensor, key: Any = None) -> Tensor:
        word = check.key(where, key)
        own, draws = random.fold_in(word, 0), random.fold_in(word, 1)
        before = spread(asked(fresh(where, method(from_module(module))), x, refs, own))
        network = randomised(module, layers_of(module, x), how=how, key=draws)
        after = spread(asked(method(from_module(network)), x, refs, own))
        return torch.where(before > 0, (after - before) / torch.where(before > 0, before, 1), torch.nan)

    return measure
