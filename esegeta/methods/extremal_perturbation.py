"""Extremal perturbation: the region of a given area that matters most."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import masks
from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.coalitions import Fill, mixed
from esegeta.engine import check
from esegeta.engine.ascent import Best, ascend, refuse_late
from esegeta.engine.gradient import refuse_dead_score, value_and_gradient

# Of the paper: 800 steps of 0.01 on 32 x 32 parameters, each keeping 0.9 of the last, the area's weight from 300 up.
_STEPS, _RATE, _PARAMETERS, _MOMENTUM, _WEIGHT, _GROWTH = 800, 0.01, 32 * 32, 0.9, 300.0, 1.0035
_PLACES = 125  # of a coarse grid, whose shapes are looked at first
_LONGEST = 10  # times that length: longer ones overshoot


@method(
    refs=("baseline",),
    axioms=("implementation_invariance", "shift", "affine_equivariance"),
    shape="map",
    differentiable=False,
    example={"area": 0.05, "steps": 16, "mask": masks.smooth(step=4, sigma=1.5), "score_scale": 1000.0},
    family="masks",
    cost=lambda steps: Cost(gradients=steps),
    numbers="mask",
    paper="Fong, Patrick, Vedaldi 2019, arXiv:1910.08485",
    also=("extremal_mask", "extremal_perturbations"),
)
def extremal_perturbation(
    score: Score,
    *,
    area: float | int = 0.1,
    mode: str = "preserve",
    steps: int = 800,
    mask: masks.Family | None = None,
    fill: Fill = mixed,
    score_scale: float | int = 10.0,
) -> Explain:
    r"""Explain by the region of a given area that keeps the score highest, or whose removal lowers it most.

    .. math:: \max_m\; \Phi(m) - \lambda_k\, \tfrac1n \sum_u (m_u - r_u)^2, \qquad
              \Phi(m) = w\, \frac{F(m x + (1 - m) x')}{|F(x) - F(x')|}

    with r the region of that area where m is largest (``masks.nearest_region``), to which the mask m comes
    nearer and nearer in the search. That is ``preserve``; ``delete`` takes :math:`-\Phi(1 - m)` instead, and
    ``dual`` the sum of both. Nothing is flipped and nothing is moved.

    A search, of which no result is exact. It looks at balls and boxes of that area on a grid of 125 places, closer
    and closer around the best of them, and at what they say together; then it climbs by gradient, with momentum and
    among smooth masks, from one that shows all. The best region that was seen comes back, so that no ball or box of
    the grid beats it. The climb ends early when its region has stayed the same for a fifth of the steps; with fewer
    steps each is longer, so that they change the accuracy and not the place where they lead. At a deadline the best
    so far comes back. It takes at most ``steps`` gradients, one after another, and beside them some 340 values (410
    for a volume); twice as many of both for ``dual``.

    Args:
        score: ``(C,*S) -> ()``.
        area: what share of the image the region is.
        mode: ``preserve``, ``delete`` or ``dual``.
        steps: of the search.
        mask: the smooth masks to choose from; by default ``masks.smooth()``, whose bumps are 21 voxels wide. Say
            ``masks.smooth(step=5, sigma=15, spacing=spacing)`` for mm, and smaller numbers for small images.
        fill: what is shown of (x, baseline, m): the baseline, or blur by ``baselines.defocused(20)``.
        score_scale: w, what the difference of the score between all and nothing counts for in units of the paper,
            where it is a difference of logits and the area's weight :math:`\lambda` grows from 300 to 4900.

    Returns:
        ``explain(x, baseline) -> (1,*S)``: one on what matters and zero elsewhere; voxels on the rim that are alike
        share what is left for them. A region jumps where it changes at all, so it has no derivative.

    Example:
        >>> import torch
        >>> explain = extremal_perturbation(
        ...     lambda x: x[0, 2:5].sum(), area=0.3, steps=100, mask=masks.smooth(step=1, sigma=0.5)
        ... )
        >>> explain(torch.ones(1, 10), torch.zeros(1, 10)).round().tolist()
        [[0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]

    Reference:
        Fong, Patrick, Vedaldi 2019, equations 3 to 6, arXiv:1910.08485; the scale of the score is ours.
    """
    name = "extremal_perturbation"
    share = masks.share(name, "area", area)
    n = check.positive_count(name, "steps", steps)
    check.one_of(name, "mode", mode, ("preserve", "delete", "dual"))
    gain, longer = check.non_negative(name, "score_scale", score_scale), min(_STEPS / n, _LONGEST)
    check.fill(name, fill)
    expected, advice = "mask: a family of masks", "Use for example esegeta.masks.smooth(step=7)"
    family = masks.smooth() if mask is None else check.function(name, expected, mask, advice)

    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "..."]:
        choice = family(x)

        def run(m: Tensor) -> Tensor:
            return check.scalar(name, score(fill(x, baseline, m.to(x.dtype)))).to(m.dtype)

        refuse_late(name)
        reward = _reward(run, mode)
        slope = value_and_gradient(reward)
        p = choice.ones()
        full = choice.mask(p)[None]
        apart = (run(torch.ones_like(full)) - run(torch.zeros_like(full))).abs()
        unit = gain / torch.where(apart > 0, apart, 1)

        def worth_of(region: Tensor) -> Best:
            return Best(unit * reward(region), region)

        def first() -> Best:
            shapes = masks.Shapes(x, _PLACES, choice.units)
            return masks.best_shape(worth_of, shapes, areas=(share,), finer=2, label=name)

        rate, kept = longer * _RATE * p.numel() / _PARAMETERS, _MOMENTUM**longer

        def step(k: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            p, last, seen = state
            m = choice.image(*(sums := choice.sums(p)))[None]
            g = slope(m)[1]
            weight = 2 * _WEIGHT * _GROWTH ** (k * _STEPS / n) / m.numel()
            region = masks.nearest_region(
                (m / full).detach(), share
            )  # at first all voxels are alike, and share it
            change = choice.gradient(p, (unit * g + weight * (region - m))[0], sums)
            last = change if k == 0 else kept * last + (1 - kept) * change
            return (p + rate * last).clamp(0, 1), last, seen + g.abs()

        def look(state: tuple[Tensor, ...]) -> Best:
            value, region = worth_of(
                masks.nearest_region((choice.mask(state[0])[None] / full).detach(), share)
            )
            # Where voxels are alike this is no region: it pays for that as at the beginning of the paper's search.
            return Best(value - _WEIGHT * masks.area_residual(region, area=share), region)

        start = lambda _: (p, torch.zeros_like(p), torch.zeros_like(full))
        (_, _, seen), best = ascend(step, start, look, label=name, steps=n, first=first)
        refuse_dead_score(name, score, x, seen)
        return best.point.to(x.dtype)

    return explain


def _reward(run: Callable[[Tensor], Tensor], mode: str) -> Callable[[Tensor], Tensor]:
    if mode == "preserve":
        return run
    if mode == "delete":
        return lambda m: -run(1 - m)
    return lambda m: run(m) - run(1 - m)
