"""Infidelity: how well a map says how the score answers to perturbations of the image."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esegeta import random
from esegeta._registry import Cost, metric
from esegeta._registry import perturbation as perturbation_
from esegeta._types import Explain, Score
from esegeta.engine import check, stream
from esegeta.engine.estimates import answered
from esegeta.engine.sharing import active, shared
from esegeta.metrics.explanations import attribution, callable_, says, start
from esegeta.metrics.removal import Measure

# From (x, baseline, key) to what is taken from x.
Perturbation = Callable[[Tensor, Tensor, Tensor], Tensor]


@perturbation_(family="noise", paper="Yeh et al. 2019, arXiv:1901.09392")
def gaussian(sigma: float = 0.1) -> Perturbation:
    """Perturb every element by noise with a standard deviation of a fraction of the range of x.

    >>> gaussian(0.5)(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), torch.tensor(3)).shape
    torch.Size([1, 2])
    """
    share = check.non_negative("metrics.gaussian", "sigma", sigma)

    def draw(x: Tensor, _: Tensor, key: Tensor) -> Tensor:
        return share * (x.amax() - x.amin()) * random.normal(key, x.shape, dtype=x.dtype, device=x.device)

    return draw


@perturbation_(family="removal", paper="Yeh et al. 2019, arXiv:1901.09392", example={"size": 2})
def square_removal(size: int = 8) -> Perturbation:
    """Replace a cube of random place by the baseline: wholly within the image, in all channels.

    >>> taken = square_removal(1)(torch.ones(1, 3), torch.zeros(1, 3), torch.tensor(3))
    >>> taken.sum().item()
    1.0
    """
    side = check.positive_count("metrics.square_removal", "size", size)

    def draw(x: Tensor, baseline: Tensor, key: Tensor) -> Tensor:
        inside = torch.ones_like(x, dtype=torch.bool)
        for axis, n in enumerate(x.shape[1:]):
            here = min(side, n)
            first = random.integers(random.fold_in(key, axis), (), low=0, high=n - here + 1, device=x.device)
            at = torch.arange(n, device=x.device)
            shape = [-1 if a == axis + 1 else 1 for a in range(x.ndim)]
            inside = inside & ((at >= first) & (at < first + here)).reshape(shape)
        return torch.where(inside, x - baseline, 0)

    return draw


@perturbation_(family="removal", paper="Yeh et al. 2019, arXiv:1901.09392")
def noisy_baseline(sigma: float = 0.1) -> Perturbation:
    """Go from x to the baseline with noise, whose standard deviation is a fraction of the range of x.

    >>> noisy_baseline(0.0)(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor(3)).tolist()
    [[1.0, 1.0]]
    """
    noise = gaussian(sigma)

    def draw(x: Tensor, baseline: Tensor, key: Tensor) -> Tensor:
        return x - baseline - noise(x, baseline, key)

    return draw


_USUAL = gaussian()


def _losses(
    where: str, score: Score, x: Tensor, baseline: Tensor, draw: Perturbation, own: Tensor, nodes: Tensor
) -> Tensor:
    """What perturbations take from the score, once for all maps that are judged together."""

    def lost() -> Tensor:
        whole = check.scalar(where, score(x)).double()
        fall = lambda i: whole - score(x - draw(x, baseline, random.fold_in(own, i))).double()
        return stream.collect(fall, nodes, label=where)

    return shared("losses of perturbations", (score, x, baseline, draw, own, len(nodes)), lost)


@metric(
    family="faithfulness",
    better="lower",
    answer="sampled",
    needs=("score", "key"),
    paper="Yeh et al. 2019, arXiv:1901.09392",
    example={"samples": 4, "multiplied": True},
    cost=lambda samples: Cost(forwards=samples + 1),
    exact=0.0,
    ranks=True,
)
def infidelity(
    explain: Explain,
    score: Score,
    *,
    perturbation: Perturbation | None = None,
    samples: int = 32,
    multiplied: bool | None = None,
    scaled: bool = False,
) -> Measure:
    r"""Return the mean squared error of a map as a prediction of what perturbations take from the score.

    .. math:: E_I \left[ \left( \sum_v I_v s_v - (F(x) - F(x - I)) \right)^2 \right]

    with slopes s. Contributions a, as of integrated gradients, are slopes times the difference to the baseline x':
    :math:`s_v = a_v / (x_v - x'_v)`, and nothing where the two are equal. With ``scaled`` the map is first multiplied
    by the number with which the error is least,
    :math:`\beta = E[(I \cdot s) \Delta F] / E[(I \cdot s)^2]`: then only its form counts. Numbers can only be
    compared for the same perturbation and image: they grow with the square of both.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        score: ``(C,*S) -> ()``.
        perturbation: from (x, baseline, key) to what is taken from x; ``gaussian(0.1)`` by default.
        samples: how many perturbations.
        multiplied: whether the map has contributions; ``metrics.given`` says so itself.
        scaled: whether the best multiple of the map is judged.

    Returns:
        ``(x, *refs, key=) -> ()``, 0 for the slopes of a linear score. ``eg.with_standard_error`` tells how certain
        it is.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (torch.tensor([1.0, 2.0]) * x).sum()
        >>> measure = infidelity(eg.gradient(score), score, multiplied=False)
        >>> measure(torch.tensor([[0.0, 1.0]]), key=0).item() < 1e-12
        True

    Reference:
        Yeh, Hsieh, Suggala, Inouye, Ravikumar 2019, arXiv:1901.09392.
    """
    where = "metrics.infidelity"
    callable_(where, explain)
    draw = _USUAL if perturbation is None else perturbation
    check.positive_count(where, "samples", samples, least=2)
    contributions = says(explain, "multiplied") if multiplied is None else multiplied
    if not isinstance(contributions, bool):
        raise check.refused(
            where,
            "multiplied=True for contributions or False for slopes",
            "neither",
            "Maps of integrated gradients, DeepLIFT or Shapley values are contributions, gradients are slopes",
        )

    def measure(x: Tensor, *refs: Tensor, key: Any = None) -> Tensor:
        word = check.key(where, key)
        baseline = start(x, refs)
        slopes = attribution(where, explain, x, refs, random.fold_in(word, 0))
        if slopes.shape != x.shape:
            expected, advice = f"a map like x, {tuple(x.shape)}", "One for all channels says nothing of each"
            raise check.refused(where, expected, check.describe(slopes), advice)
        if contributions:
            way = (x - baseline).double()
            slopes = torch.where(way != 0, slopes / torch.where(way != 0, way, 1), 0)
        own = random.fold_in(word, 1)
        nodes = torch.arange(samples, device=x.device)
        told = _losses(where, score, x, baseline, draw, own, nodes) if active() else None
        nodes = nodes if told is None else nodes[: len(told)]  # a deadline may have cut them short
        whole = x.new_zeros(()) if told is not None else check.scalar(where, score(x)).double()

        def both(i: Tensor) -> tuple[Tensor, Tensor]:
            taken = draw(x, baseline, random.fold_in(own, i))
            lost = (
                whole - score(x - taken).double() if told is None else told.index_select(0, i.reshape(1))[0]
            )
            return (taken.double() * slopes).sum(), lost

        if not scaled:

            def error(i: Tensor) -> Tensor:
                said, lost = both(i)
                return (said - lost) ** 2

            return answered(*stream.estimate(error, nodes, label=where))

        def products(i: Tensor) -> Tensor:
            said, lost = both(i)
            return torch.stack([said * said, said * lost, lost * lost])

        def least(mean: Tensor) -> Tensor:
            some = mean[0] > 0
            return (mean[2] - torch.where(some, mean[1] ** 2 / torch.where(some, mean[0], 1), 0)).clamp(min=0)

        return answered(*stream.estimate_of(products, nodes, least, label=where))

    return measure
