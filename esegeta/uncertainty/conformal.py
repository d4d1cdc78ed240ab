r"""Guarantees from calibration volumes: sets that hold the true class, masks that miss no more than promised.

The unit is the **volume**. Voxels of one volume are not exchangeable with those of another: a quantile over pooled
voxels promises 90 % and gives 83 % with five volumes. All promises are about a new volume from where the calibration
volumes come from, in the mean over calibration volumes and it; they say nothing of a scanner that was not among them.

Volumes come one after another and are counted in bins of width 2^-16, so memory does not grow with them. Scores are
rounded to these bins before anything is promised, for calibration volumes and new ones alike: promises are exact.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esegeta._registry import uncertainty
from esegeta.engine import check

_BINS = 2**16
Pairs = Iterable[tuple[Tensor, Tensor]]


def needed(alpha: float | int) -> int:
    r"""Return how many calibration volumes a level takes: :math:`\lceil 1/\alpha - 1 \rceil`.

    >>> needed(0.1), needed(0.05)
    (9, 19)
    """
    level = _level("needed", alpha)
    return max(1, math.ceil(1 / level - 1 - 1e-9))


def _level(where: str, alpha: object, name: str = "alpha") -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
        advice = "0.1 promises nine in ten"
        raise check.refused(where, f"{name} between 0 and 1", repr(alpha), advice)
    return float(alpha)


def _enough(where: str, count: int, alpha: float, of: str = "calibration volumes") -> None:
    least = needed(alpha)
    if count < least:
        advice = f"With {count} the smallest is {1 / (count + 1):.3g}; take more volumes, or a larger alpha"
        raise check.refused(where, f"at least {least} {of} for alpha = {alpha:g}", str(count), advice)


def _probabilities(where: str, p: object) -> Tensor:
    p = check.floating(where, "the probabilities", p)
    if p.ndim < 2:
        raise check.refused(where, "probabilities (K,*S)", check.describe(p), "Add a channel axis: p[None]")
    if bool((~((p >= 0) & (p <= 1))).any()):
        raise check.refused(where, "probabilities from 0 to 1", "others", "Apply the link: z.sigmoid()")
    return p


def _bin(p: Tensor) -> Tensor:
    """The number of the bin of a probability, 0 to 2^16: rounded down, so that a small one is not made larger."""
    return (p.double() * _BINS).floor().long()


# ------------------------------------------------------------------ prediction sets


class Sets(NamedTuple):
    """Prediction sets: ``sets(p)`` tells which classes each voxel may have.

    least: (K,), the probability in bins that a class needs to be in the set; volumes: (K,), how many calibration
    volumes each is from; alpha: the share of voxels that may lack their class.
    """

    least: Tensor
    volumes: Tensor
    alpha: float

    def __call__(self, p: Tensor) -> Tensor:
        """Return which classes are in the set of each voxel, (K,\\*S), from probabilities (K,\\*S)."""
        p = _two(_probabilities("prediction_sets", p))
        if len(p) != len(self.least):
            advice = "Calibrate with the same network"
            raise check.refused("prediction_sets", f"{len(self.least)} classes", str(len(p)), advice)
        return _bin(p) >= self.least.to(p.device).reshape(-1, *[1] * (p.ndim - 1))


def _two(p: Tensor) -> Tensor:
    """One channel is two classes."""
    return torch.cat([1 - p, p]) if len(p) == 1 else p


@uncertainty(
    family="conformal", paper="Lee, Barber, Willett 2023, arXiv:2306.06342", example={"alpha": 0.1}, leads=1
)
def prediction_sets(calibration: Pairs, *, alpha: float | int, per_class: bool = False) -> Sets:
    r"""Calibrate sets of classes that hold the true class of a voxel with probability at least 1 - alpha.

    .. math::

        \hat F = \frac1{n+1} \Big(\sum_{i=1}^n \hat F_i + \delta_\infty\Big), \qquad
        C(v) = \{k : 1 - p_k(v) \le \hat F^{-1}(1 - \alpha)\}

    where :math:`\hat F_i` is the distribution function of the scores :math:`1 - p_{y}` within volume i: every volume
    counts the same, whatever its size. The promise holds for a random voxel of a new volume. With ``per_class`` it
    holds for every class by itself, for a random voxel of that class in a volume that has the class; small classes
    need it, since the background alone fills most sets.

    Args:
        calibration: pairs of probabilities (K,\*S) and class numbers (\*S), one for each volume, which may come one
            after another. One channel is two classes.
        alpha: the share that may be missed.
        per_class: a threshold of its own for every class.

    Returns:
        ``Sets``: ``sets(p) -> (K,*S)``, boolean.

    Example:
        >>> volume = (torch.tensor([[0.9, 0.25], [0.1, 0.75]]), torch.tensor([0, 1]))
        >>> sets = prediction_sets([volume] * 9, alpha=0.1)
        >>> sets(torch.tensor([[0.8, 0.5], [0.2, 0.5]])).tolist()
        [[True, False], [False, False]]

    Reference: Lee, Barber, Willett, Distribution-free inference with hierarchical data, JRSS B 2025.
    """
    here = "prediction_sets"
    level, classwise = _level(here, alpha), check.flag(here, "per_class", per_class)
    sums: Tensor | None = None
    volumes: Tensor | None = None
    for p, y in calibration:
        p = _two(_probabilities(here, p))
        y = _classes(here, y, p)
        groups = len(p) if classwise else 1
        if sums is None or volumes is None:
            sums = torch.zeros(groups, _BINS + 1, dtype=torch.float64, device=p.device)
            volumes = torch.zeros(groups, dtype=torch.long, device=p.device)
        own = _bin(p.flatten(1).gather(0, y.flatten()[None])[0])
        for g in range(groups):
            some = own[y.flatten() == g] if classwise else own
            if len(some):
                sums[g] += torch.bincount(some, minlength=_BINS + 1) / len(some)
                volumes[g] += 1
    if sums is None or volumes is None:
        _enough(here, 0, level)
        raise AssertionError
    for g, count in enumerate(volumes.tolist()):
        if classwise and not count:
            advice = "Leave per_class out, or calibrate with volumes that have it"
            raise check.refused(here, "every class in some calibration volume", f"class {g} in none", advice)
        of = f"calibration volumes with class {g}" if classwise else "calibration volumes"
        _enough(here, count, level, of)
    # The share of a volume with a probability of the true class in bin b or above: it falls with b.
    above = sums.flip(1).cumsum(1).flip(1) / (volumes[:, None] + 1)
    least = (above >= 1 - level - 1e-12).sum(1) - 1
    if not classwise:
        least, volumes = least.expand(len(p)), volumes.expand(len(p))
    return Sets(least, volumes, level)


def _classes(where: str, y: object, p: Tensor) -> Tensor:
    y = check.tensor(where, "the reference", y)
    if y.shape != p.shape[1:]:
        got = f"{check.describe(y)} beside {check.describe(p)}"
        raise check.refused(where, "a reference of the shape of the map", got, "Resample the labels")
    if y.is_floating_point() or bool(((y < 0) | (y.long() >= len(p))).any()):
        got, advice = check.describe(y), "Number classes from 0"
        raise check.refused(where, f"class numbers below {len(p)}", got, advice)
    return y.long().to(p.device)


# ------------------------------------------------------------------ risk control


@uncertainty(
    family="conformal", paper="Angelopoulos et al. 2022, arXiv:2208.02814", example={"alpha": 0.1}, leads=2
)
def control_risk(losses: Tensor, levels: Tensor, *, alpha: float | int) -> float:
    r"""Return the least level at which the loss of a new volume is at most alpha in the mean.

    .. math:: \hat\lambda = \inf\Big\{\lambda : \frac{n}{n+1} \hat R(\lambda) + \frac1{n+1} \le \alpha\Big\}

    Args:
        losses: (n, m), of n volumes at m levels, between 0 and 1; a loss must not grow with the level.
        levels: (m,), growing.
        alpha: the mean loss that is allowed.

    Returns:
        One of the levels.

    Example:
        >>> losses = torch.tensor([[1.0, 0.0]]).repeat(9, 1)
        >>> control_risk(losses, torch.tensor([0.0, 1.0]), alpha=0.1)
        1.0

    Reference: Angelopoulos et al., Conformal risk control, ICLR 2024.
    """
    here = "control_risk"
    level = _level(here, alpha)
    losses = check.finite(
        here, "losses", check.floating(here, "losses", losses), "Leave volumes without loss out"
    )
    if losses.ndim != 2 or check.tensor(here, "levels", levels).shape != losses.shape[1:]:
        got = f"{check.describe(losses)} and {check.describe(levels)}"
        raise check.refused(here, "losses (n, m) and levels (m,)", got, "One row for each volume")
    if bool((levels.diff() <= 0).any()):
        raise check.refused(
            here, "growing levels", "others", "Sort them, and the columns of losses with them"
        )
    if bool(((losses < 0) | (losses > 1)).any()):
        raise check.refused(
            here, "losses between 0 and 1", "others", "Divide by the largest that is possible"
        )
    if bool((losses.diff(dim=1) > 1e-9).any()):
        advice = "Precision is none: use learn_then_test"
        raise check.refused(here, "a loss that does not grow with the level", "one that grows", advice)
    _enough(here, len(losses), level)
    bound = (losses.double().sum(0) + 1) / (len(losses) + 1)
    right = bound <= level + 1e-12
    if not bool(right.any()):
        got, advice = f"{bound.min():.3g} at the last level", "Add levels, or allow more"
        raise check.refused(here, f"a level at which the bound is at most {level:g}", got, advice)
    return float(levels[int(right.int().argmax())])


class Mask(NamedTuple):
    """A calibrated mask: ``mask(p)`` is where a probability reaches ``threshold``.

    volumes: how many it is from; alpha: what was allowed.
    """

    threshold: float
    volumes: int
    alpha: float

    def __call__(self, p: Tensor) -> Tensor:
        """Return the mask (\\*S) of the probabilities (\\*S) or (1,\\*S) of the class."""
        p = check.floating("mask", "the probabilities", p)
        p = p[0] if p.ndim > 1 and p.shape[0] == 1 else p
        return _bin(p) >= round(self.threshold * _BINS)


def _shares(
    where: str, calibration: Pairs, part: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of each volume, for every threshold in bins, which share of a part of it lies in the mask (p >= threshold)."""
    shares, inside, outside = [], [], []
    for p, y in calibration:
        p = _probabilities(where, p)
        if len(p) != 1:
            advice = "Choose the channel of the class: p[1:2]"
            raise check.refused(where, "probabilities (1,*S) of the class", check.describe(p), advice)
        mask = check.tensor(where, "the reference", y)
        if mask.dtype != torch.bool or mask.shape != p.shape[1:]:
            got, advice = check.describe(mask), "Pass for example labels == 1"
            raise check.refused(where, f"a boolean reference {tuple(p.shape[1:])}", got, advice)
        bins, own = _bin(p[0]), part(mask.to(p.device))
        counted = torch.bincount(bins[own], minlength=_BINS + 1).flip(0).cumsum(0).flip(0)
        whole = int(own.sum())
        shares.append(counted.double() / whole if whole else torch.full_like(counted, torch.nan).double())
        inside.append(counted)
        outside.append(torch.bincount(bins.flatten(), minlength=_BINS + 1).flip(0).cumsum(0).flip(0))
    return shares, inside, outside


@uncertainty(
    family="conformal", paper="Angelopoulos et al. 2022, arXiv:2208.02814", example={"alpha": 0.1}, leads=1
)
def outer_mask(calibration: Pairs, *, alpha: float | int) -> Mask:
    r"""Calibrate a mask of which a new volume's object is missed by at most a share alpha in the mean.

    .. math:: M = \{v : p_v \ge \hat\tau\}, \qquad E\left[\frac{|Y \setminus M|}{|Y|}\right] \le \alpha

    A volume without the object misses nothing.

    Args:
        calibration: pairs of probabilities (1,\*S) and boolean masks (\*S), one for each volume.
        alpha: the share that may be missed.

    Returns:
        ``Mask``: ``mask(p) -> (*S)``, boolean.

    Example:
        >>> volume = (torch.tensor([[0.75, 0.5, 0.25]]), torch.tensor([True, True, False]))
        >>> outer_mask([volume] * 19, alpha=0.1)(torch.tensor([[0.6, 0.5, 0.4]])).tolist()
        [True, True, False]

    Reference: Angelopoulos et al., Conformal risk control, ICLR 2024, section 3.
    """
    here = "outer_mask"
    level = _level(here, alpha)
    shares, _, _ = _shares(here, calibration, lambda mask: mask)
    missed = [1 - s.nan_to_num(1.0) for s in shares]  # grows with the threshold
    _enough(here, len(missed), level)
    bound = (sum(missed, torch.zeros(())) + 1) / (len(missed) + 1)
    return Mask((int((bound <= level + 1e-12).sum()) - 1) / _BINS, len(missed), level)


@uncertainty(
    family="conformal", paper="Angelopoulos et al. 2022, arXiv:2208.02814", example={"alpha": 0.1}, leads=1
)
def inner_mask(calibration: Pairs, *, alpha: float | int) -> Mask:
    r"""Calibrate a mask that holds at most a share alpha of a new volume's background in the mean.

    .. math:: M = \{v : p_v \ge \hat\tau\}, \qquad E\left[\frac{|M \setminus Y|}{|\bar Y|}\right] \le \alpha

    The share is of the background, which for small objects is nearly the whole volume: take a small alpha, or put
    probabilities and masks of a region around the object in. For the share of the *mask* that is wrong use
    ``learn_then_test``.

    Args:
        calibration: pairs of probabilities (1,\*S) and boolean masks (\*S), one for each volume.
        alpha: the share of the background that may be included.

    Returns:
        ``Mask``: ``mask(p) -> (*S)``, boolean.

    Example:
        >>> volume = (torch.tensor([[0.75, 0.5, 0.25]]), torch.tensor([True, False, False]))
        >>> inner_mask([volume] * 19, alpha=0.1)(torch.tensor([[0.7, 0.5, 0.4]])).tolist()
        [True, False, False]

    Reference: Angelopoulos et al., Conformal risk control, ICLR 2024.
    """
    here = "inner_mask"
    level = _level(here, alpha)
    shares, _, _ = _shares(here, calibration, lambda mask: ~mask)
    included = [s.nan_to_num(0.0) for s in shares]  # falls with the threshold
    _enough(here, len(included), level)
    bound = (sum(included, torch.zeros(())) + 1) / (len(included) + 1)
    # Where no threshold of a probability will do, none is in the mask: the bin above them all.
    right = torch.cat([bound <= level + 1e-12, torch.ones(1, dtype=torch.bool, device=bound.device)])
    return Mask(int(right.int().argmax()) / _BINS, len(included), level)


@uncertainty(
    family="conformal", paper="Angelopoulos et al. 2021, arXiv:2110.01052", example={"alpha": 0.1}, leads=1
)
def learn_then_test(
    calibration: Pairs,
    *,
    alpha: float | int,
    delta: float | int = 0.1,
    thresholds: Sequence[float] | None = None,
) -> Mask:
    r"""Calibrate a mask of which, with confidence 1 - delta, at most a share alpha is wrong in the mean.

    .. math:: P\left(E\left[\frac{|M \setminus Y|}{|M|}\right] \le \alpha\right) \ge 1 - \delta

    The precision of a mask is no monotone function of its threshold. Thresholds are tested from the highest one down,
    each by the p-value of Hoeffding and Bentkus, until the first that is not rejected. An empty mask is not wrong.

    Args:
        calibration: pairs of probabilities (1,\*S) and boolean masks (\*S), one for each volume.
        alpha: the share of the mask that may be wrong.
        delta: the probability that the promise fails.
        thresholds: to be tested; by default 0.99, 0.98, ... 0.01.

    Returns:
        ``Mask``, of the lowest threshold that passes.

    Example:
        >>> volume = (torch.tensor([[0.75, 0.5, 0.25]]), torch.tensor([True, True, False]))
        >>> round(learn_then_test([volume] * 60, alpha=0.1, delta=0.1).threshold, 2)
        0.26

    Reference: Angelopoulos et al., Learn then test, 2021; Bates et al., JACM 2021 (the p-value).
    """
    here = "learn_then_test"
    level, doubt = _level(here, alpha), _level(here, delta, "delta")
    chosen = [i / 100 for i in range(1, 100)] if thresholds is None else list(thresholds)
    if not chosen or not all(isinstance(t, (int, float)) and 0 < t <= 1 for t in chosen):
        raise check.refused(here, "thresholds above 0, at most 1", repr(thresholds)[:60], "Leave them out")
    _, wrong, size = _shares(here, calibration, lambda mask: ~mask)
    n = len(wrong)
    least = math.ceil(math.log(doubt) / math.log(1 - level))
    if n < least:  # even without a wrong voxel nothing could be promised
        advice = "Take more volumes, or a larger alpha or delta"
        expected = f"at least {least} calibration volumes for alpha = {level:g} and delta = {doubt:g}"
        raise check.refused(here, expected, str(n), advice)
    losses = torch.stack([w.double() / s.clamp(min=1) for w, s in zip(wrong, size, strict=True)])
    found: float | None = None
    for t in sorted(chosen, reverse=True):
        bin_ = math.ceil(t * _BINS - 1e-9)
        if _p_value(float(losses[:, bin_].mean()), n, level) > doubt:
            break
        found = bin_ / _BINS
    if found is None:
        got = f"p = {_p_value(float(losses[:, math.ceil(max(chosen) * _BINS - 1e-9)].mean()), n, level):.3g} there"
        advice = "Take more volumes, a higher threshold, or allow more"
        raise check.refused(here, f"a share below {level:g} at the highest threshold", got, advice)
    return Mask(found, n, level)


def _p_value(risk: float, n: int, alpha: float) -> float:
    """Hoeffding and Bentkus: how likely a mean this small is, if the risk were alpha.

    >>> round(_p_value(0.0, 22, 0.1), 3), _p_value(0.5, 22, 0.1)
    (0.098, 1.0)
    """
    from scipy.stats import binom

    if risk >= alpha:
        return 1.0
    divergence = (1 - risk) * math.log((1 - risk) / (1 - alpha))
    divergence += risk * math.log(risk / alpha) if risk else 0.0
    return min(1.0, math.exp(-n * divergence), math.e * float(binom.cdf(math.ceil(n * risk), n, alpha)))
