"""Meaningful perturbation: the least that has to be hidden for the score to go."""

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import masks, spatial
from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.coalitions import Fill, mixed
from esegeta.engine import check
from esegeta.engine.ascent import Best, ascend, better, refuse_late
from esegeta.engine.gradient import value_and_gradient
from esegeta.features import Lengths, Spacing

_PLACES, _AREAS = (
    27,
    (0.02, 0.05, 0.1, 0.2, 0.4),
)  # of a coarse grid, and of its shapes, that are looked at first
_RATE, _FAST, _SLOW, _TINY = 0.1, 0.9, 0.999, 1e-16  # Adam


@method(
    refs=("baseline",),
    axioms=("implementation_invariance", "shift", "affine_equivariance"),
    shape="map",
    example={"steps": 12, "size": 2},
    family="masks",
    cost=lambda steps: Cost(gradients=steps),
    numbers="mask",
    paper="Fong, Vedaldi 2017, arXiv:1704.03296",
    also=("deletion_mask", "meaningful_mask"),
)
def meaningful_perturbation(
    score: Score,
    *,
    steps: int = 300,
    size: Lengths = 8,
    spacing: Spacing | None = None,
    fill: Fill = mixed,
    least: float | int = 0.08,
    edges: float | int = 8.0,
) -> Explain:
    r"""Explain by the smallest and smoothest region that has to be hidden for the score to go.

    .. math:: \min_{h \in [0,1]^G}\; \frac{F(x (1 - \uparrow h) + x' \uparrow h)}{|F(x) - F(x')|}
              + \lambda_1\, \overline{h} + \lambda_2 \sum_a \overline{|\Delta_a h|^3}

    over what is hidden of blocks G of the image, :math:`\uparrow` multilinear interpolation to its grid and
    :math:`\Delta_a` the difference of neighbouring blocks along axis a. A search, of which no result is exact:
    Adam with rate 0.1 from the cheapest of nothing and of balls and boxes of five areas at 27 places. The cheapest
    that was seen comes back: none of those costs less. The search ends early when its mask has stayed the same for a
    fifth of the steps, and at a deadline. It takes ``steps`` gradients at most and beside them some 320 values. The
    score counts by its own difference, and the two terms are means: so the defaults, which are those of the paper on
    probabilities and 28 by 28 blocks, fit any score and any size.

    Args:
        score: ``(C,*S) -> ()``.
        steps: of the search, one gradient each.
        size: of a block, one number or one for each axis, in voxels or in the unit of ``spacing``.
        spacing: of the voxels, if sizes are lengths.
        fill: what is shown of (x, baseline, kept): the baseline, or blur by ``baselines.defocused(10)``.
        least: :math:`\lambda_1`, what hiding all of the image costs.
        edges: :math:`\lambda_2`.

    Returns:
        ``explain(x, baseline) -> (1,*S)`` in [0, 1], how much is hidden: one on what matters.

    Example:
        >>> import torch
        >>> explain = meaningful_perturbation(lambda x: x[0, 2:4].sum(), size=1, edges=0)
        >>> explain(torch.ones(1, 6), torch.zeros(1, 6)).tolist()
        [[0.0, 0.0, 1.0, 1.0, 0.0, 0.0]]

    Reference:
        Fong, Vedaldi 2017, equation 6, arXiv:1704.03296, without its random shifts.
    """
    name = "meaningful_perturbation"
    check.fill(name, fill)
    n = check.positive_count(name, "steps", steps)
    small, smooth = check.non_negative(name, "least", least), check.non_negative(name, "edges", edges)

    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "..."]:
        refuse_late(name)
        wide = torch.promote_types(x.dtype, torch.float32)
        like = x.to(wide)

        def run(kept: Tensor) -> Tensor:
            return check.scalar(name, score(fill(x, baseline, kept.to(x.dtype)))).to(wide)

        apart = (run(torch.ones_like(like[:1])) - run(torch.zeros_like(like[:1]))).abs()
        unit = torch.where(apart > 0, 1 / torch.where(apart > 0, apart, 1), 0)

        def cost(h: Tensor) -> Tensor:
            rough = [h.diff(dim=a).abs().pow(3).mean() for a in range(1, h.ndim) if h.shape[a] > 1]
            return unit * run(1 - spatial.upsample(h, like=like)) + small * h.mean() + smooth * sum(rough)

        slope = value_and_gradient(cost)
        h = like.new_zeros((1, *masks.coarse(name, x, size, spacing)))
        worth_of = lambda h: Best(-cost(h), h)

        def first() -> Best:
            shapes = masks.Shapes(h, _PLACES, _apart(h, x, spacing))
            best = masks.best_shape(worth_of, shapes, areas=_AREAS, finer=0, label=name)
            return better(worth_of(h), best)

        def step(k: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h, first, second = state
            g = slope(h)[1]
            first, second = _FAST * first + (1 - _FAST) * g, _SLOW * second + (1 - _SLOW) * g.square()
            size_of_g = (second / (1 - _SLOW ** (k + 1)) + _TINY).sqrt()
            return (h - _RATE * first / (1 - _FAST ** (k + 1)) / size_of_g).clamp(0, 1), first, second

        start = lambda h: (h, torch.zeros_like(h), torch.zeros_like(h))
        _, best = ascend(step, start, lambda state: worth_of(state[0]), label=name, steps=n, first=first)
        return spatial.upsample(best.point, like=like).to(x.dtype)

    return explain


def _apart(h: Tensor, x: Tensor, spacing: Spacing | None) -> tuple[float, ...]:
    """How far blocks are apart along each axis."""
    units = (1.0,) * (x.ndim - 1) if spacing is None else tuple(spacing)
    return tuple(u * n / g for u, n, g in zip(units, x.shape[1:], h.shape[1:], strict=True))
