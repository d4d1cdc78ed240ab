"""The coalitions of KernelSHAP, and the additive game that is nearest to a score on them."""

import math

import torch
from torch import Tensor

from esegeta import random


def _weight(d: int, k: int) -> float:
    return (d - 1) / (math.comb(d, k) * k * (d - k))


def every(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return one coalition of every complementary pair, the heaviest first, and their weights."""
    z = (torch.arange(1, 2 ** (d - 1), device=device)[:, None] >> torch.arange(d, device=device)) & 1
    size = z.sum(1)
    order = torch.argsort(torch.minimum(size, d - size), stable=True)
    weights = [0.0, *(_weight(d, k) for k in range(1, d))]
    return z[order].double(), torch.tensor(weights, dtype=torch.float64, device=device)[size[order]]


def drawn(key: int | Tensor, d: int, pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the coalitions of one part, then drawn ones of 2 to d - 2 parts with the weight of all of those."""
    laws = torch.tensor([1 / (k * (d - k)) for k in range(2, d - 1)], dtype=torch.float64, device=device)
    places = torch.cumsum(laws / laws.sum(), 0)[:-1]

    def one(i: Tensor) -> Tensor:
        mine = random.fold_in(key, i)
        u = random.uniform(random.fold_in(mine, 0), (), dtype=torch.float64, device=device)
        return (random.permutation(mine, d, device=device) < 2 + (u >= places).sum()).double()

    z, rest = torch.eye(d, dtype=torch.float64, device=device), torch.arange(pairs - d, device=device)
    weights = torch.where(torch.arange(pairs, device=device) < d, _weight(d, 1), (d - 1) * laws.sum() / 2)
    return torch.cat([z, torch.func.vmap(one)(rest)]) if pairs > d else z, weights


def fit(signs: Tensor, weights: Tensor, gain: Tensor, total: Tensor, free: int) -> tuple[Tensor, Tensor]:
    """Fit ``gain = signs @ a`` with ``a.sum() = total`` by least squares, with the jackknife's error.

    The last ``free`` rows were drawn, the others are always there.
    """
    fixed = len(weights) - free
    weights = torch.cat([weights[:fixed], weights[fixed:] / max(free, 1)])
    # The last value is the total less the others.
    rows, target = signs[:, :-1] - signs[:, -1:], gain - signs[:, -1] * total
    inverse = torch.linalg.inv(rows.T @ (weights[:, None] * rows))
    head = inverse @ (rows.T @ (weights * target))
    values = torch.cat([head, (total - head.sum())[None]])
    if free < 2:
        return values, torch.full_like(values, torch.inf)
    rest, rows, weights = (target - rows @ head)[fixed:], rows[fixed:], weights[fixed:]
    pull = rows @ inverse
    pull = pull * (weights * rest / (1 - weights * (pull * rows).sum(1)))[:, None]
    pull = torch.cat([pull, -pull.sum(1, keepdim=True)], 1)
    return values, (free * pull.var(0)).sqrt()
