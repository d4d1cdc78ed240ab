"""Shapley values by weighted least squares over coalitions."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import coalitions, random
from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import check
from esegeta.engine.estimates import answered
from esegeta.engine.execution import DeadlineExceeded
from esegeta.features import Features, elements


@method(
    refs=("baseline",),
    key=True,
    axioms=("completeness", "linearity", "shift", "sensitivity_a"),
    needs="values",
    example={"samples": 64},
    paper="Lundberg, Lee 2017, arXiv:1705.07874",
    also=("kernelshap", "shap"),
)
def kernel_shap(score: Score, *, features: Features | None = None, samples: int = 2048) -> Explain:
    r"""The additive game that is nearest to the score over coalitions, which gives each part its Shapley value.

    .. math:: \min_a \sum_{0 < |T| < d} \frac{d - 1}{\binom{d}{|T|} |T| (d - |T|)}
              \Big( v(T) - v(\emptyset) - \sum_{j \in T} a_j \Big)^2, \qquad \sum_j a_j = F(x) - F(x')

    The two end points are constraints, kept to rounding. If all :math:`2^d` coalitions fit into ``samples``, each
    is run once and the answer is the Shapley value. Else the coalitions of one part or all but one, which weigh
    most, are run, and larger ones are drawn by their weight, each with its complement; the answer is then exact
    where at most two parts interact, and consistent. Least squares are in float64.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        features: which parts, by ``esegeta.features``; by default every element, for small images.
        samples: number of runs of the score, at least 2 d + 2.

    Returns:
        ``explain(x, baseline, key=) -> like x``, the value of a part at each of its elements;
        ``with_standard_error`` gives its error, zero where all coalitions were run.

    Example:
        >>> import torch
        >>> explain = kernel_shap(lambda x: x[0, 0] * x[0, 1] + x[0, 2], samples=8)
        >>> [round(v, 6) for v in explain(torch.tensor([[2., 3., 1.]]), torch.zeros(1, 3), key=0)[0].tolist()]
        [3.0, 3.0, 1.0]

    Reference:
        Lundberg, Lee 2017, theorem 2, arXiv:1705.07874; pairs and constraints: Covert, Lee 2021, arXiv:2012.01536.
    """
    label = "kernel_shap"
    most = check.positive_count(label, "samples", samples)

    def explain(
        x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"], *, key: int | Tensor
    ) -> Float[Tensor, "*dims"]:
        parts = coalitions.parts(label, elements() if features is None else features, x, runs=lambda _: most)
        d = parts.count
        whole = d < 64 and 2**d <= most
        if not whole and most < 2 * d + 2:
            advice = "Raise samples, or use coarser features, for example esegeta.features.grid(8)"
            got = f"samples={most}, which do not determine {d} values"
            raise ValueError(check.problem(label, f"samples >= {2 * d + 2} for {d:,} features", got, advice))
        z, weights = _every(d, x.device) if whole else _drawn(key, d, most // 2 - 1, x.device)
        rows = torch.cat([z.new_zeros(1, d), z.new_ones(1, d), torch.stack([z, 1 - z], 1).reshape(-1, d)])
        v = coalitions.values(score, x, baseline, parts, rows.to(x.dtype), label=label)
        done = max(0, len(v) - 2) // 2
        if done < min(d, len(z)):
            raise DeadlineExceeded(
                f"{label}: the deadline passed after {len(v)} runs, too few for {d} features. "
                "Allow more time, or use coarser features."
            )
        forth, back = v[2 : 2 + 2 * done].double().unflatten(0, (done, 2)).unbind(1)
        total, drawn = (v[1] - v[0]).double(), 0 if whole else done - d
        a, error = _fit(2 * z[:done] - 1, weights[:done], forth - back, total, drawn)
        error = torch.zeros_like(error) if whole else error
        return answered(*(parts.spread(t.to(v.dtype)).expand_as(x).clone() for t in (a, error)))

    return explain


def _weight(d: int, k: int) -> float:
    return (d - 1) / (math.comb(d, k) * k * (d - k))


def _every(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One coalition of every complementary pair, the heaviest first, and their weights."""
    z = (torch.arange(1, 2 ** (d - 1), device=device)[:, None] >> torch.arange(d, device=device)) & 1
    size = z.sum(1)
    order = torch.argsort(torch.minimum(size, d - size), stable=True)
    weights = [0.0, *(_weight(d, k) for k in range(1, d))]
    return z[order].double(), torch.tensor(weights, dtype=torch.float64, device=device)[size[order]]


def _drawn(key: int | Tensor, d: int, pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The coalitions of one part, then drawn ones of 2 to d - 2 parts with the weight of all of those."""
    laws = torch.tensor([1 / (k * (d - k)) for k in range(2, d - 1)], dtype=torch.float64, device=device)
    places = torch.cumsum(laws / laws.sum(), 0)[:-1]

    def one(i: Tensor) -> Tensor:
        mine = random.fold_in(key, i)
        u = random.uniform(random.fold_in(mine, 0), (), dtype=torch.float64, device=device)
        return (random.permutation(mine, d, device=device) < 2 + (u >= places).sum()).double()

    z, rest = torch.eye(d, dtype=torch.float64, device=device), torch.arange(pairs - d, device=device)
    weights = torch.where(torch.arange(pairs, device=device) < d, _weight(d, 1), (d - 1) * laws.sum() / 2)
    return torch.cat([z, torch.func.vmap(one)(rest)]) if pairs > d else z, weights


def _fit(signs: Tensor, weights: Tensor, gain: Tensor, total: Tensor, drawn: int) -> tuple[Tensor, Tensor]:
    """Least squares of ``gain = signs @ a`` with ``a.sum() = total``; the jackknife's error by the drawn rows."""
    fixed = len(weights) - drawn
    weights = torch.cat([weights[:fixed], weights[fixed:] / max(drawn, 1)])
    # The last value is the total less the others.
    rows, target = signs[:, :-1] - signs[:, -1:], gain - signs[:, -1] * total
    inverse = torch.linalg.inv(rows.T @ (weights[:, None] * rows))
    head = inverse @ (rows.T @ (weights * target))
    values = torch.cat([head, (total - head.sum())[None]])
    if drawn < 2:
        return values, torch.full_like(values, torch.inf)
    rest, rows, weights = (target - rows @ head)[fixed:], rows[fixed:], weights[fixed:]
    pull = rows @ inverse
    pull = pull * (weights * rest / (1 - weights * (pull * rows).sum(1)))[:, None]
    pull = torch.cat([pull, -pull.sum(1, keepdim=True)], 1)
    return values, (drawn * pull.var(0)).sqrt()
