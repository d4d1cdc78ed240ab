r"""Whether a map says what the score loses without random parts of the image.

For random sets T of parts, what the map gives to T, :math:`\sum_{v \in T} a_v`, is held against what the score loses,
:math:`F(x) - F(x_{T \to x'})`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from esegeta import coalitions, random
from esegeta._registry import Cost, metric
from esegeta._types import Explain, Score
from esegeta.coalitions import Fill, mixed
from esegeta.engine import check, levels
from esegeta.engine.estimates import answered
from esegeta.engine.sharing import active, shared
from esegeta.features import Features
from esegeta.metrics.explanations import attribution, callable_, start
from esegeta.metrics.removal import Measure, means, parts_of


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation; NaN where one of the two does not vary.

    >>> correlation(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 3.0, 1.0])).item()
    -1.0
    """
    # What rounding leaves of a constant is no variation.
    least = [4 * torch.finfo(t.dtype).eps * t.abs().amax() for t in (a, b)]
    a, b = a - a.mean(), b - b.mean()
    spread = (a.square().sum() * b.square().sum()).sqrt()
    alive = (a.abs().amax() > least[0]) & (b.abs().amax() > least[1])
    return torch.where(alive, ((a * b).sum() / torch.where(alive, spread, 1)).clamp(-1, 1), torch.nan)


def average_ranks(a: Tensor) -> Tensor:
    """Return the ranks of values from 1 on; equal ones share their mean.

    >>> average_ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    rising = a.sort().values
    low, high = (torch.searchsorted(rising, a.contiguous(), right=r) for r in (False, True))
    return (low + high + 1).to(torch.float64) / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's rank correlation; NaN where one of the two does not vary, or has a NaN, which has no rank.

    >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 8.0, 27.0])).item(), 6)
    1.0
    """
    known = ~(a.isnan().any() | b.isnan().any())
    return torch.where(known, correlation(average_ranks(a), average_ranks(b)), torch.nan)


def _agreement(
    where: str,
    explain: Explain,
    score: Score,
    features: Features | None,
    fill: Fill | None,
    size: Any,
    samples: int,
    compare: Any,
) -> Measure:
    callable_(where, explain)
    check.positive_count(where, "samples", samples, least=3)

    def measure(x: Tensor, *refs: Tensor, key: Any = None, within: Any = None) -> Tensor:
        word = check.key(where, key)
        a = attribution(where, explain, x, refs, random.fold_in(word, 0))
        parts = parts_of(where, features, x, within)
        mean, sizes = means(a, parts, x)
        each = torch.where(sizes > 0, mean * sizes, 0.0)
        there = sizes > 0
        real = there.sum()
        many = size(real)
        proper = many < real
        if not levels.depth() and not bool(proper):
            expected = f"a set of fewer than the {int(real)} parts"
            raise check.refused(where, expected, str(int(many)), "Change its size, or take finer features")
        order = random.fold_in(word, 1)
        nodes = torch.arange(samples, device=x.device)

        def gone(i: Tensor) -> Tensor:
            drawn = random.permutation(random.fold_in(order, i), parts.count, device=x.device)
            first = torch.where(there, drawn, parts.count).argsort(stable=True)  # empty parts are never drawn
            return first.argsort() < many

        baseline = start(x, refs)

        def lost() -> Tensor:
            keep = lambda i: parts.keep((~gone(i)).to(x.dtype))
            values = coalitions.shown(score, x, baseline, keep, nodes, label=where, fill=fill or mixed)
            whole = check.scalar(where, score(x))
            found = whole.double() - values.double()
            # A score that stays as it was, but for rounding, does not vary.
            rounding = 32 * torch.finfo(whole.dtype).eps * torch.maximum(whole.abs(), values.abs().amax())
            return torch.where((found - found.mean()).abs().amax() <= rounding, 0.0, found)

        # The sets do not depend on the map.
        of = (score, x, baseline, parts, fill, float(many), samples, word) if active() else ()
        losses = shared("losses of sets", of, lost)
        shares = torch.stack([torch.where(gone(i), each, 0.0).sum() for i in nodes[: len(losses)]])
        found = torch.where(proper, compare(shares, losses), torch.nan)
        return answered(found, _jackknife(compare, shares, losses))

    return measure


def _jackknife(compare: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The standard error of a number of n pairs, from what it is without each of them."""
    n = len(a)
    if n < 3:
        return a.new_full((), torch.nan)
    others = torch.arange(n - 1, device=a.device)
    others = others + (others >= torch.arange(n, device=a.device)[:, None])
    without = vmap(compare)(a[others], b[others])
    return ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()


@metric(
    family="faithfulness",
    better="higher",
    answer="sampled",
    needs=("score", "key"),
    paper="Ancona et al. 2018, arXiv:1711.06104",
    example={"n": 3, "samples": 8},
    cost=lambda samples: Cost(forwards=samples + 1),
    exact=1.0,
    ranks=True,
)
def sensitivity_n(
    explain: Explain,
    score: Score,
    *,
    n: int = 1,
    samples: int = 128,
    features: Features | None = None,
    fill: Fill | None = None,
) -> Measure:
    r"""Return the correlation of what a map gives to random sets of n parts with what the score loses without them.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``, with contributions.
        score: ``(C,*S) -> ()``.
        n: how many parts a set has.
        samples: how many sets.
        features: which parts, by ``esegeta.features``; voxels by default.
        fill: what takes their place, from (x, baseline, kept): by default the baseline, which is the last of the
            refs, or zero.

    Returns:
        ``(x, *refs, key=, within=) -> ()`` in [-1, 1]: 1 where the score is linear and the map right; NaN where one
        of the two does not vary.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (torch.tensor([1.0, 2.0, 4.0]) * x).sum()
        >>> x = torch.ones(1, 3)
        >>> round(sensitivity_n(eg.input_x_gradient(score), score, n=2)(x, key=0).item(), 6)
        1.0

    Reference:
        Ancona, Ceolini, Oeztireli, Gross 2018, section 4, arXiv:1711.06104.
    """
    where = "metrics.sensitivity_n"
    many = check.positive_count(where, "n", n)
    return _agreement(where, explain, score, features, fill, lambda _: many, samples, correlation)


@metric(
    family="faithfulness",
    better="higher",
    answer="sampled",
    needs=("score", "key"),
    paper="Bhatt, Weller, Moura 2020, arXiv:2005.00631",
    example={"samples": 8},
    cost=lambda samples: Cost(forwards=samples + 1),
    exact=1.0,
    ranks=True,
)
def faithfulness_correlation(
    explain: Explain,
    score: Score,
    *,
    subset: float = 0.2,
    samples: int = 100,
    features: Features | None = None,
    fill: Fill | None = None,
) -> Measure:
    """Return the correlation of what a map gives to random sets of a share of the parts with what the score loses.

    Args:
        explain: as in ``sensitivity_n``.
        score: ``(C,*S) -> ()``.
        subset: which share of the parts a set has.
        samples: how many sets.
        features: as in ``sensitivity_n``.
        fill: as in ``sensitivity_n``.

    Returns:
        ``(x, *refs, key=, within=) -> ()`` in [-1, 1].

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (torch.arange(10.0) * x).sum()
        >>> measure = faithfulness_correlation(eg.input_x_gradient(score), score)
        >>> round(measure(torch.ones(1, 10), key=0).item(), 6)
        1.0

    Reference:
        Bhatt, Weller, Moura 2020, Evaluating and aggregating feature-based explanations, arXiv:2005.00631.
    """
    where = "metrics.faithfulness_correlation"
    size = _share(where, subset)
    return _agreement(where, explain, score, features, fill, size, samples, correlation)


@metric(
    family="faithfulness",
    better="higher",
    answer="sampled",
    needs=("score", "key"),
    paper="Fel et al. 2021, arXiv:2111.04138",
    example={"samples": 8},
    cost=lambda samples: Cost(forwards=samples + 1),
    exact=1.0,
    ranks=True,
)
def mu_fidelity(
    explain: Explain,
    score: Score,
    *,
    subset: float = 0.2,
    samples: int = 200,
    features: Features | None = None,
    fill: Fill | None = None,
) -> Measure:
    """Return the rank correlation of what a map gives to random sets of parts with what the score loses without them.

    Args:
        explain: as in ``sensitivity_n``.
        score: ``(C,*S) -> ()``.
        subset: which share of the parts a set has.
        samples: how many sets.
        features: which parts; the paper takes a grid of nine blocks along each axis.
        fill: as in ``sensitivity_n``.

    Returns:
        ``(x, *refs, key=, within=) -> ()`` in [-1, 1].

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (torch.arange(10.0) * x).sum()
        >>> measure = mu_fidelity(eg.input_x_gradient(score), score)
        >>> round(measure(torch.ones(1, 10), key=0).item(), 6)
        1.0

    Reference:
        Bhatt, Weller, Moura 2020, arXiv:2005.00631; with ranks: Fel et al. 2021, arXiv:2111.04138.
    """
    where = "metrics.mu_fidelity"
    return _agreement(where, explain, score, features, fill, _share(where, subset), samples, spearman)


def _share(where: str, subset: float) -> Any:
    if isinstance(subset, bool) or not isinstance(subset, (int, float)) or not 0 < subset < 1:
        raise check.refused(where, "subset between 0 and 1", repr(subset), "0.2 is usual")
    return lambda count: (subset * count).round().clamp(min=1)
