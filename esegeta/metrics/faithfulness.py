"""Faithfulness in one number: areas between curves, and what the score makes of the image that a map shows."""

from typing import Any

import torch
from torch import Tensor

from esegeta import baselines, segmentation
from esegeta._registry import Cost, metric
from esegeta._types import Explain, Score
from esegeta.coalitions import Fill, mixed
from esegeta.engine import check
from esegeta.engine.sharing import sharing
from esegeta.features import Features, segments, voxels
from esegeta.metrics.curves import Curve, area_under, ranking
from esegeta.metrics.explanations import attribution, callable_, start
from esegeta.metrics.imputation import imputed
from esegeta.metrics.removal import Measure, along, curve, means, parts_of


@metric(
    family="faithfulness",
    better="higher",
    needs=("score",),
    paper="Bluecher, Vielhaben, Strodthoff 2024, arXiv:2401.06654",
    example={"steps": 4},
    also=("srg",),
    cost=lambda steps: Cost(forwards=None if steps is None else 2 * steps),
    ranks=True,
)
def relevance_gain(
    explain: Explain,
    score: Score,
    *,
    features: Features | None = None,
    fill: Fill | None = None,
    steps: int | None = 64,
) -> Measure:
    r"""Return how much more of the score stays if the least relevant parts go first than if the most relevant do.

    .. math:: \int_0^1 F(x \text{ without the last } t) - F(x \text{ without the first } t) \, dt

    Zero on average for a random order, whatever the fill does to the network.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        score: ``(C,*S) -> ()``.
        features: as in ``deletion``.
        fill: as in ``deletion``.
        steps: as in ``deletion``.

    Returns:
        ``(x, *refs, key=, within=) -> ()`` in the unit of the score.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (x * torch.tensor([3.0, 2.0, 1.0])).sum()
        >>> round(relevance_gain(eg.input_x_gradient(score), score, steps=3)(torch.ones(1, 3)).item(), 6)
        1.333333

    Reference:
        Bluecher, Vielhaben, Strodthoff 2024, Decoupling pixel flipping and occlusion strategy, arXiv:2401.06654.
    """
    where = "metrics.relevance_gain"
    callable_(where, explain)
    if steps is not None:
        check.positive_count(where, "steps", steps)

    def measure(x: Tensor, *refs: Tensor, key: Any = None, within: Any = None) -> Tensor:
        a = attribution(where, explain, x, refs, key)
        parts = parts_of(where, features, x, within)
        values, sizes = means(a, parts, x)
        areas = []
        with sharing():  # both curves begin with the whole image and end without it
            baseline = start(x, refs)
            for sign in (-1.0, 1.0):
                order = ranking(sign * values, sizes, steps)
                found = along(where, score, x, baseline, parts, order, fill=fill, keep_first=False)
                areas.append(area_under(order.fractions, found))
        return areas[0] - areas[1]

    return measure


@metric(
    family="faithfulness",
    better="higher",
    needs=("score",),
    paper="Samek et al. 2017, arXiv:1509.06321",
    example={"steps": 4},
    also=("region_perturbation",),
    cost=lambda steps: Cost(forwards=None if steps is None else steps + 1),
    ranks=True,
)
def aopc(
    explain: Explain,
    score: Score,
    *,
    features: Features | None = None,
    fill: Fill | None = None,
    steps: int | None = 64,
) -> Measure:
    r"""Return what the score loses on average as parts go, the most relevant first.

    .. math:: F(x) - \int_0^1 F(x \text{ without the first } t) \, dt

    The paper's mean over steps tends to it as steps get small.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        score: ``(C,*S) -> ()``.
        features: as in ``deletion``.
        fill: as in ``deletion``.
        steps: as in ``deletion``.

    Returns:
        ``(x, *refs, key=, within=) -> ()`` in the unit of the score.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: x.sum()
        >>> aopc(eg.input_x_gradient(score), score, steps=4)(torch.ones(1, 4)).item()
        2.0

    Reference:
        Samek, Binder, Montavon, Lapuschkin, Mueller 2017, arXiv:1509.06321.
    """
    where = "metrics.aopc"
    found = curve(where, explain, score, features=features, fill=fill, steps=steps, keep_first=False)

    def measure(x: Tensor, *refs: Tensor, key: Any = None, within: Any = None) -> Tensor:
        going: Curve = found(x, *refs, key=key, within=within)
        return going.values[0] - going.area

    return measure


@metric(
    family="faithfulness",
    better="higher",
    answer="curve",
    axes=("share of the elements, the most relevant first", "share of the score that is lost"),
    needs=("score",),
    paper="Chatterjee et al. 2020, INFORM, Medical Imaging with Deep Learning",
    example={"steps": 4},
    also=("inform_fidelity",),
    cost=lambda steps: Cost(forwards=steps + 1),
    ranks=True,
)
def fidelity(
    explain: Explain,
    score: Score,
    *,
    features: Features | None = None,
    fill: Fill | None = None,
    steps: int = 64,
    max_share: float = 1.0,
) -> Measure:
    r"""Return which share of the score is lost as what a map highlights is replaced, the most highlighted first.

    .. math:: t \mapsto 1 - F(x \text{ without the first } t \text{ of its elements}) / F(x)

    The poster replaces what is highlighted and expects the prediction to drop, and has no formula: here the share is
    followed over all fractions, or up to ``max_share``. ``eg.absolute`` highlights by size, ``eg.regions`` whole
    regions; ``metrics.calibrated(metrics.fidelity)`` stands beside a random order, ``metrics.relevance_gain`` beside
    the opposite one. With ``reducers.predicted_dice`` as the score it is the share of the segmented object that goes.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        score: ``(C,*S) -> ()``.
        features: as in ``deletion``.
        fill: as in ``deletion``: what highlighted elements are replaced by.
        steps: as in ``deletion``.
        max_share: the fraction that the last step reaches.

    Returns:
        ``(x, *refs, key=, within=) -> Curve``; NaN where F(x) is not positive.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (x * torch.tensor([3.0, 2.0, 1.0])).sum()
        >>> found = fidelity(eg.input_x_gradient(score), score, steps=3)(torch.ones(1, 3))
        >>> [round(v, 4) for v in found.values.tolist()]
        [0.0, 0.5, 0.8333, 1.0]
    """
    where = "metrics.fidelity"
    if isinstance(max_share, bool) or not isinstance(max_share, (int, float)) or not 0 < max_share <= 1:
        raise check.refused(where, "max_share in (0, 1]", repr(max_share), "1 goes on until nothing is left")
    found = curve(
        where,
        explain,
        score,
        features=features,
        fill=fill,
        steps=steps,
        keep_first=False,
        max_share=max_share,
    )

    def measure(x: Tensor, *refs: Tensor, key: Any = None, within: Any = None) -> Curve:
        going: Curve = found(x, *refs, key=key, within=within)
        whole = going.values[0]
        lost = 1 - going.values / torch.where(whole > 0, whole, torch.nan)
        return Curve(going.fractions, lost, area_under(going.fractions, lost), going.largest_tie)

    return measure


def _supervoxels(x: Tensor) -> Tensor:
    return segmentation.slic(x, min(100, x[0].numel()))


_SEGMENTS = segments(_supervoxels, 1000)


def _mean_fill(x: Tensor, baseline: Tensor, keep: Tensor) -> Tensor:  # noqa: ARG001
    return mixed(x, baselines.mean(x), keep)


@metric(
    family="faithfulness",
    better="higher",
    needs=("score",),
    paper="Rieger, Hansen 2020, arXiv:2003.08747",
    cost=lambda: Cost(forwards=None),
    ranks=True,
    example={"features": voxels()},
)
def irof(
    explain: Explain, score: Score, *, features: Features | None = None, fill: Fill | None = None
) -> Measure:
    r"""Return the area over the curve of the score's share that stays as segments go, the most relevant first.

    .. math:: 1 - \int_0^1 F(x \text{ without the first } t) / F(x) \, dt

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        score: ``(C,*S) -> ()``, a probability in the paper.
        features: the segments; about a hundred supervoxels of the image by default.
        fill: what takes their place; by default the mean of each channel.

    Returns:
        ``(x, *refs, key=, within=) -> ()``; NaN where F(x) is not positive.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: x.abs().sum()
        >>> zero = lambda x, baseline, keep: x * keep
        >>> irof(eg.input_x_gradient(score), score, features=eg.features.voxels(), fill=zero)(torch.ones(1, 4)).item()
        0.5

    Reference:
        Rieger, Hansen 2020, IROF: a low resource evaluation metric, arXiv:2003.08747.
    """
    where = "metrics.irof"
    cut = _SEGMENTS if features is None else features
    found = curve(where, explain, score, features=cut, fill=fill or _mean_fill, steps=None, keep_first=False)

    def measure(x: Tensor, *refs: Tensor, key: Any = None, within: Any = None) -> Tensor:
        going: Curve = found(x, *refs, key=key, within=within)
        whole = going.values[0]
        return torch.where(whole > 0, 1 - going.area / torch.where(whole > 0, whole, 1), torch.nan)

    return measure


@metric(
    family="faithfulness",
    better="lower",
    answer="curve",
    needs=("score",),
    paper="Rong et al. 2022, arXiv:2202.00449",
    example={"steps": 3, "noise": 0.0},
    also=("remove_and_debias",),
    cost=lambda steps: Cost(forwards=steps + 1),
)
def road(
    explain: Explain,
    score: Score,
    *,
    noise: float = 0.01,
    spacing: Any = None,
    steps: int = 9,
    features: Features | None = None,
    seed: int = 0,
) -> Measure:
    r"""Return the score as voxels are replaced by what their neighbours tell, the most relevant first.

    What was removed is imputed (``metrics.imputed``), so that the network is not led by edges, and a mask tells
    nothing. Fractions end at 0.9: of an image of which nothing is left nothing can be imputed. The paper's number
    is the area of ``road`` of the negative map (least relevant first) less this one; higher is better.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        score: ``(C,*S) -> ()``.
        noise: standard deviation of what is added to imputed voxels, as a fraction of the range of the channel.
        spacing: mm per voxel, one per spatial axis.
        steps: how many, up to 0.9 of the elements.
        features: which parts go together; voxels by default.
        seed: the key of the noise.

    Returns:
        ``(x, *refs, key=, within=) -> Curve``, with the area over the fractions from 0 to 0.9.

    Example:
        A smooth image is imputed as it was, whatever is removed but its corners.

        >>> from esegeta.metrics import given
        >>> ramp = torch.arange(20.0, dtype=torch.float64)[None]
        >>> inner = torch.where((ramp > 0) & (ramp < 19), 1.0, 0.0).double()
        >>> found = road(given(inner), lambda x: x.sum(), noise=0.0, steps=3)(ramp)
        >>> [round(v, 6) for v in found.values.tolist()]
        [190.0, 190.0, 190.0, 190.0]

    Reference:
        Rong, Leemann, Borisov, Kasneci, Kasneci 2022, arXiv:2202.00449.
    """
    fill = imputed(noise=noise, spacing=spacing, key=seed)
    return curve(
        "metrics.road",
        explain,
        score,
        features=features,
        fill=fill,
        steps=steps,
        keep_first=False,
        max_share=0.9,
    )


def _shown(where: str, explain: Explain, x: Tensor, refs: tuple[Tensor, ...], key: Any) -> Tensor:
    """The image, dimmed by the positive part of a map over its largest value."""
    a = attribution(where, explain, x, refs, key).clamp(min=0)
    largest = a.amax()
    weight = (a / torch.where(largest > 0, largest, 1)).to(x.dtype)
    return mixed(x, start(x, refs), weight)


@metric(
    family="faithfulness",
    better="lower",
    needs=("score",),
    paper="Chattopadhay et al. 2018, arXiv:1710.11063",
    cost=lambda: Cost(forwards=2),
    ranks=True,
)
def average_drop(explain: Explain, score: Score) -> Measure:
    r"""Return which share of the score is lost if only what a map shows is left of the image.

    .. math:: \max(0, F(x) - F(x')) / F(x), \qquad x' = m \odot x + (1 - m) \odot b, \quad m = a^+ / \max a^+

    with the baseline b, which is the last of the refs, or zero. The mean over images is the paper's number.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        score: ``(C,*S) -> ()``.

    Returns:
        ``(x, *refs, key=) -> ()`` in [0, 1] for scores that are not negative; NaN where F(x) is not positive: a share
        of it has no meaning.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (x * torch.tensor([3.0, 1.0])).sum()
        >>> round(average_drop(eg.gradient(score), score)(torch.ones(1, 2)).item(), 6)  # 3 + 1/3 of 4 are left
        0.166667

    Reference:
        Chattopadhay, Sarkar, Howlader, Balasubramanian 2018, arXiv:1710.11063.
    """
    where = "metrics.average_drop"
    callable_(where, explain)

    def measure(x: Tensor, *refs: Tensor, key: Any = None) -> Tensor:
        whole, part = score(x), score(_shown(where, explain, x, refs, key))
        some = whole > 0
        return torch.where(some, (whole - part).clamp(min=0) / torch.where(some, whole, 1), torch.nan)

    return measure


@metric(
    family="faithfulness",
    better="higher",
    needs=("score",),
    paper="Chattopadhay et al. 2018, arXiv:1710.11063",
    also=("increase_in_confidence",),
    cost=lambda: Cost(forwards=2),
    ranks=True,
)
def average_increase(explain: Explain, score: Score) -> Measure:
    """Return 1 where the score is higher if only what a map shows is left of the image, else 0.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        score: ``(C,*S) -> ()``.

    Returns:
        ``(x, *refs, key=) -> ()``; the mean over images is the paper's number.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (x * torch.tensor([3.0, -1.0])).sum()
        >>> average_increase(eg.gradient(score), score)(torch.ones(1, 2)).item()
        1.0

    Reference:
        Chattopadhay, Sarkar, Howlader, Balasubramanian 2018, arXiv:1710.11063.
    """
    where = "metrics.average_increase"
    callable_(where, explain)

    def measure(x: Tensor, *refs: Tensor, key: Any = None) -> Tensor:
        whole, part = score(x), score(_shown(where, explain, x, refs, key))
        return torch.where((whole + part).isnan(), torch.nan, (part > whole).to(x.dtype))

    return measure


@metric(
    family="faithfulness",
    better="higher",
    needs=("score",),
    paper="Zhang, Rao, Yang 2024, arXiv:2301.07002",
    cost=lambda: Cost(forwards=2),
    ranks=True,
)
def average_gain(explain: Explain, score: Score) -> Measure:
    r"""Return which share of what a probability could still gain is gained if only what a map shows is left.

    .. math:: \max(0, F(x') - F(x)) / (1 - F(x))

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        score: ``(C,*S) -> ()`` in [0, 1), a probability.

    Returns:
        ``(x, *refs, key=) -> ()`` in [0, 1]; NaN where F(x) is no probability below 1.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (x * torch.tensor([0.75, -0.25])).sum()
        >>> average_gain(eg.gradient(score), score)(torch.ones(1, 2)).item()
        0.5

    Reference:
        Zhang, Rao, Yang 2024, Opti-CAM, arXiv:2301.07002, section 4.
    """
    where = "metrics.average_gain"
    callable_(where, explain)

    def measure(x: Tensor, *refs: Tensor, key: Any = None) -> Tensor:
        whole, part = score(x), score(_shown(where, explain, x, refs, key))
        some = (whole >= 0) & (whole < 1)
        return torch.where(some, (part - whole).clamp(min=0) / torch.where(some, 1 - whole, 1), torch.nan)

    return measure


@metric(
    family="faithfulness",
    better="higher",
    needs=("score",),
    paper="Arya et al. 2019, arXiv:1909.03012",
    example={"steps": 4},
    cost=lambda steps: Cost(forwards=None if steps is None else steps + 1),
    ranks=True,
)
def monotonicity(
    explain: Explain,
    score: Score,
    *,
    features: Features | None = None,
    fill: Fill | None = None,
    steps: int | None = 64,
) -> Measure:
    """Return in which share of the steps the score does not fall as parts come, the least relevant first.

    Steps within a group of equal values, in which nothing comes, do not count.

    Args:
        explain: ``(x, *refs) -> like x``, or ``metrics.given(map)``.
        score: ``(C,*S) -> ()``.
        features: as in ``deletion``.
        fill: as in ``deletion``.
        steps: as in ``deletion``.

    Returns:
        ``(x, *refs, key=, within=) -> ()`` in [0, 1].

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (x * torch.tensor([2.0, 1.0, -1.0])).sum()
        >>> round(monotonicity(eg.input_x_gradient(score), score, steps=3)(torch.ones(1, 3)).item(), 4)
        0.6667

    Reference:
        Arya et al. 2019, One explanation does not fit all, arXiv:1909.03012.
    """
    where = "metrics.monotonicity"
    found = curve(
        where, explain, score, features=features, fill=fill, steps=steps, keep_first=True, sign=-1.0
    )

    def measure(x: Tensor, *refs: Tensor, key: Any = None, within: Any = None) -> Tensor:
        coming: Curve = found(x, *refs, key=key, within=within)
        real = coming.fractions.diff() > 0
        changes = coming.values.diff()
        share = ((changes >= 0) & real).sum().double() / real.sum()
        return torch.where(changes.isnan().any(), torch.nan, share)

    return measure
