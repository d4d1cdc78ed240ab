"""Extremal perturbation: the region of a given area that matters most."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import masks
from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.coalitions import Fill, mixed
from esegeta.engine import check, progress
from esegeta.engine.execution import DeadlineExceeded, current, record_partial
from esegeta.engine.gradient import refuse_dead_score, value_and_gradient

# Of the paper: 800 steps of 0.01 on 32 x 32 parameters, each keeping 0.9 of the last, the area's weight from 300 up.
_STEPS, _RATE, _PARAMETERS, _MOMENTUM, _WEIGHT, _GROWTH = 800, 0.01, 32 * 32, 0.9, 300.0, 1.0035
_LONGEST = 10  # times that length: longer ones overshoot


@method(
    refs=("baseline",),
    axioms=("implementation_invariance", "shift", "affine_equivariance"),
    shape="map",
    example={"area": 0.05, "steps": 16, "mask": masks.smooth(step=4, sigma=1.5), "worth": 1000.0},
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
    worth: float | int = 10.0,
) -> Explain:
    r"""The smooth mask of a given area that keeps the score highest, or whose removal lowers it most.

    .. math:: \max_m\; \Phi(m) - \lambda_k\, \tfrac1n \sum_u (m_u - r_u)^2, \qquad
              \Phi(m) = w\, \frac{F(m x + (1 - m) x')}{|F(x) - F(x')|}

    with r the region of that area where m is largest (``masks.wanted``), so that in the end the mask is nearly one
    there and zero elsewhere: ``masks.area_residual`` says how nearly. That is ``preserve``; ``delete`` takes
    :math:`-\Phi(1 - m)` instead, and ``dual`` the sum of both. Nothing is flipped and nothing is moved.

    A search, of which no result is exact: gradient ascent with momentum from a mask that shows all. With fewer
    steps each is longer, so that they change the accuracy and not the place where they lead. At a deadline the
    mask so far comes back. Gradients are taken one after another, ``steps`` of them, twice as many for ``dual``.

    Args:
        score: ``(C,*S) -> ()``.
        area: what share of the image the region is.
        mode: ``preserve``, ``delete`` or ``dual``.
        steps: of the search.
        mask: the smooth masks to choose from; by default ``masks.smooth()``, whose bumps are 21 voxels wide. Say
            ``masks.smooth(step=5, sigma=15, spacing=spacing)`` for mm, and smaller numbers for small images.
        fill: what is shown of (x, baseline, m): the baseline, or blur by ``baselines.defocused(20)``.
        worth: w, what the difference of the score between all and nothing counts for in units of the paper, where
            it is a difference of logits and the area's weight :math:`\lambda` grows from 300 to 4900.

    Returns:
        ``explain(x, baseline) -> (1,*S)`` in [0, 1], one on what matters.

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
    gain, longer = check.non_negative(name, "worth", worth), min(_STEPS / n, _LONGEST)
    check.fill(name, fill)
    expected, advice = "mask: a family of masks", "Use for example esegeta.masks.smooth(step=7)"
    family = masks.smooth() if mask is None else check.function(name, expected, mask, advice)

    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "..."]:
        choice = family(x)

        def run(m: Tensor) -> Tensor:
            return check.scalar(name, score(fill(x, baseline, m.to(x.dtype)))).to(m.dtype)

        slope = value_and_gradient(_reward(run, mode))
        p = choice.ones()
        m = full = choice.image(*(sums := choice.sums(p)))[None]
        apart = (run(torch.ones_like(m)) - run(torch.zeros_like(m))).abs()
        unit = gain / torch.where(apart > 0, apart, 1)
        rate, kept = longer * _RATE * p.numel() / _PARAMETERS, _MOMENTUM**longer
        seen, last = torch.zeros_like(m), None
        for k in counted(name, n):
            g = slope(m)[1]
            seen = seen + g.abs()
            weight = 2 * _WEIGHT * _GROWTH ** (k * _STEPS / n) / m.numel()
            region = masks.wanted((m / full).detach(), share)  # at first all voxels are alike, and share it
            change = choice.gradient(p, (unit * g + weight * (region - m))[0], sums)
            last = change if last is None else kept * last + (1 - kept) * change
            p = (p + rate * last).clamp(0, 1)
            m = choice.image(*(sums := choice.sums(p)))[None]
        refuse_dead_score(name, score, x, seen)
        return m.to(x.dtype)

    return explain


def _reward(run: Callable[[Tensor], Tensor], mode: str) -> Callable[[Tensor], Tensor]:
    if mode == "preserve":
        return run
    if mode == "delete":
        return lambda m: -run(1 - m)
    return lambda m: run(m) - run(1 - m)


def counted(name: str, n: int) -> Iterator[int]:
    """The numbers of the steps of a search, until the deadline; without a first step there is nothing to give.

    >>> list(counted("demo", 3))
    [0, 1, 2]
    """
    with progress.loop(name) as bar:
        for k in range(n):
            if current().left() <= 0:
                if not k:
                    raise DeadlineExceeded(
                        f"{name}: the deadline passed before the first step. Allow more time."
                    )
                text = f"{name}: the deadline passed; the mask is that of the first {k} of {n} steps."
                record_partial(text, k, n)
                return
            yield k
            bar.at((k + 1) / n)
