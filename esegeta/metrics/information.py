"""Performance information curves: the score over the information that a map lets through."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esegeta import baselines, coalitions
from esegeta._registry import Cost, metric
from esegeta._types import Explain, Score
from esegeta.coalitions import mixed
from esegeta.engine import check
from esegeta.features import Features
from esegeta.metrics.curves import Curve, area_under, ranking
from esegeta.metrics.explanations import attribution, callable_
from esegeta.metrics.removal import Measure, means, parts_of

LEVELS = 256


def code_length(x: Tensor, like: Tensor) -> Tensor:
    r"""Return the bits that an ideal entropy coder needs for an image, each voxel told by its neighbour.

    Channels are quantised to 256 levels over the range of ``like``. Every value is predicted by the one before it
    along the last axis, and what is left, modulo 256, costs the entropy of its histogram. The first of every row
    costs 8 bits:

    .. math:: 8 m + (n - m) H(r), \qquad r_v = q_v - q_{v-1} \bmod 256

    with n voxels in m rows. Turned round, an image is as long.

    Args:
        x: the image (C,\*S).
        like: the image whose range is quantised.

    >>> flat, x = torch.zeros(1, 8), torch.arange(8.0)[None] ** 2
    >>> code_length(flat, x).item(), round(code_length(x, x).item(), 1)
    (8.0, 27.7)
    """
    axes = tuple(range(1, x.ndim))
    low, high = like.amin(axes, keepdim=True), like.amax(axes, keepdim=True)
    scale = (LEVELS - 1) / torch.where(high > low, high - low, 1)
    quantised = ((x - low) * scale).round().clamp(0, LEVELS - 1).long()
    rest = (quantised.diff(dim=-1) % LEVELS).flatten()
    ones = torch.ones_like(rest, dtype=torch.float64)
    p = ones.new_zeros(LEVELS).index_add(0, rest, ones) / max(1, len(rest))
    entropy = (p * -torch.where(p > 0, p, 1).log2()).sum()
    return 8 * (quantised.numel() - len(rest)) + len(rest) * entropy


@metric(
    family="faithfulness",
    better="higher",
    answer="curve",
    axes=("share of the information, the most relevant first", "share of the score that is back"),
    needs=("score",),
    paper="Kapishnikov et al. 2019, arXiv:1906.02825",
    example={"steps": 4},
    also=("pic", "sic", "performance_information_curve"),
    cost=lambda steps: Cost(forwards=steps + 1),
)
def performance_information(
    explain: Explain,
    score: Score,
    *,
    blur: float = 5.0,
    length: Callable[[Tensor, Tensor], Tensor] = code_length,
    features: Features | None = None,
    steps: int = 64,
) -> Measure:
    r"""Return the share of the score that comes back over the share of the information, the most relevant first.

    Parts of the image come back into a blurred copy of it. Over

    .. math:: \max_{s \le t} \frac{L(z_s) - L(z_0)}{L(x) - L(z_0)} \quad\text{stands}\quad
              \max_{s \le t} \frac{F(z_s) - F(z_0)}{F(x) - F(z_0)}

    both cut to [0, 1], from (0, 0) to (1, 1). Not the number of voxels but what they tell is paid for: a map that
    shows scattered voxels pays for every edge that it makes. The paper takes the length of a lossy file in webp
    format, which is for 8-bit pictures in the plane. Here L is the number of bits of an ideal entropy coder of the
    differences between neighbours at 256 levels, ``metrics.code_length``: the same in one to three dimensions, on
    every machine. With a probability as the score it is the paper's softmax information curve; with
    ``reducers.predicted_dice`` that of a segmentation.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        score: ``(C,*S) -> ()``.
        blur: the standard deviation in voxels of the copy, where no refs are given; else the last of them is it.
        length: the bits of an image, from (image, x).
        features: which parts come together; voxels by default.
        steps: how many.

    Returns:
        ``(x, *refs, key=, within=) -> Curve`` with ``fractions`` of the information; an area of NaN where the image
        does no better than its copy, or tells no more.

    Example:
        The score is all in one voxel of eight, and the map knows which.

        >>> from esegeta.metrics import given
        >>> x = torch.tensor([[1.0, 5.0, 2.0, 9.0, 0.0, 7.0, 3.0, 4.0]])
        >>> score = lambda x: x[0, 3]
        >>> knows = performance_information(given((x == 9) * 1.0), score)(x, 0 * x)
        >>> other = performance_information(given((x == 2) * 1.0), score)(x, 0 * x)
        >>> bool(knows.area > other.area)
        True

    Reference:
        Kapishnikov, Bolukbasi, Viegas, Terry 2019, XRAI, section 4.1.2, arXiv:1906.02825.
    """
    where = "metrics.performance_information"
    callable_(where, explain)
    check.positive_count(where, "steps", steps)
    sigma = check.non_negative(where, "blur", blur)

    def measure(x: Tensor, *refs: Tensor, key: Any = None, within: Any = None) -> Curve:
        a = attribution(where, explain, x, refs, key)
        parts = parts_of(where, features, x, within)
        values, sizes = means(a, parts, x)
        order = ranking(values, sizes, steps)
        copy = baselines.blurred(x, sigma) if not refs else refs[-1]
        keep = lambda stop: parts.keep((order.ranks < stop).to(x.dtype))
        found = coalitions.shown(score, x, copy, keep, order.nodes, label=where).double()
        found = torch.cat([found, found.new_full((len(order.nodes) - len(found),), torch.nan)])
        bits = torch.stack([length(mixed(x, copy, keep(stop)), x) for stop in order.nodes]).double()
        at, share = _climbed(bits), _climbed(found)
        return Curve(at, share, area_under(at, share), order.largest_tie)

    return measure


def _climbed(values: Tensor) -> Tensor:
    """The share of the way from the first to the last value that was ever reached; NaN if there is no way up."""
    way = values[-1] - values[0]
    share = (values - values[0]) / torch.where(way > 0, way, torch.nan)
    reached = share.clamp(0, 1).cummax(0).values
    return torch.where(values.isnan().any(), torch.nan, reached)
