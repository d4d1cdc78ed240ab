"""Do probabilities mean what they say? Reliability, its summaries, and one temperature that mends much of it.

Functions take probabilities of events and whether these came, in tensors of one shape, of any number of volumes put
together with ``torch.cat`` where they differ in size. ``confidence`` makes them of several classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from esegeta._registry import uncertainty
from esegeta.engine import check


class Reliability(NamedTuple):
    """A reliability curve: (bins,) each. Empty bins have NaN, and 0 events.

    predicted: mean probability in a bin; observed: how often the event came; events: how many fell into it.
    """

    predicted: Tensor
    observed: Tensor
    events: Tensor


def _events(where: str, p: object, came: object) -> tuple[Tensor, Tensor]:
    p = check.floating(where, "the probabilities", p).flatten()
    came = check.tensor(where, "what came", came).flatten()
    if came.shape != p.shape:
        advice = "Both are of one event each; use confidence for several classes"
        raise check.refused(where, f"{len(p)} events", str(len(came)), advice)
    if came.is_floating_point() or bool(((came != 0) & (came != 1)).any()):
        raise check.refused(where, "events as booleans, or 0 and 1", check.describe(came), "Pass mask > 0")
    if not len(p):
        raise check.refused(where, "at least one event", "none", "Pass what the network says of a volume")
    if bool((~((p >= 0) & (p <= 1))).any()):
        advice = "Pass probabilities: logits.sigmoid()"
        raise check.refused(where, "probabilities from 0 to 1", "others", advice)
    return p, came.to(p.device)


def confidence(p: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return of classes that exclude each other how sure the network is of its answer, and whether that is right.

    .. math:: \max_k p_k, \qquad 1[\arg\max_k p_k = y]

    Args:
        p: probabilities (K,\*S), K of 2 or more.
        reference: class numbers (\*S).

    Returns:
        Two tensors (\*S), for the functions beside this one.

    Example:
        >>> sure, right = confidence(torch.tensor([[0.75, 0.5], [0.25, 0.5]]), torch.tensor([0, 1]))
        >>> sure.tolist(), right.tolist()
        ([0.75, 0.5], [True, False])
    """
    here = "confidence"
    p = check.floating(here, "p", p)
    if p.ndim < 2 or p.shape[0] < 2 or check.tensor(here, "reference", reference).shape != p.shape[1:]:
        got = f"{check.describe(p)} and {check.describe(reference)}"
        advice = "A single channel has one event a voxel: use p[0] and the mask as they are"
        raise check.refused(here, "p (K,*S) of several classes and a reference (*S)", got, advice)
    best = p.max(0)
    return best.values, best.indices == reference.to(p.device)


@uncertainty(family="calibration", paper="Guo et al. 2017, arXiv:1706.04599", example={"bins": 10}, leads=2)
def reliability(p: Tensor, came: Tensor, bins: int = 15) -> Reliability:
    r"""Return how often events of a probability come, in bins of equal width.

    Args:
        p: probabilities, any shape.
        came: booleans or 0 and 1, of that shape.
        bins: how many, from 0 to 1; a probability on an edge belongs to the lower one.

    Returns:
        ``Reliability``: on the diagonal where probabilities are right.

    Example:
        >>> curve = reliability(torch.tensor([0.25, 0.25, 0.25, 0.25]), torch.tensor([1, 0, 0, 0]), bins=2)
        >>> curve.predicted[0].item(), curve.observed[0].item(), curve.events.tolist()
        (0.25, 0.25, [4, 0])

    Reference: Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    n = check.positive_count("reliability", "bins", bins)
    p, came = _events("reliability", p, came)
    where = (p * n).ceil().long().sub(1).clamp(min=0)
    count = torch.bincount(where, minlength=n)
    predicted = torch.bincount(where, weights=p.double(), minlength=n) / count
    observed = torch.bincount(where, weights=came.double(), minlength=n) / count
    return Reliability(predicted, observed, count)


@uncertainty(
    family="calibration",
    paper="Guo et al. 2017, arXiv:1706.04599",
    example={"bins": 10},
    leads=2,
    also=("ece",),
)
def calibration_error(p: Tensor, came: Tensor, bins: int = 15) -> Tensor:
    r"""Return the expected calibration error.

    .. math:: \sum_b \frac{n_b}{n} |\bar p_b - \bar y_b|

    It is biased upwards for few events and depends on the bins.

    Args:
        p: probabilities, any shape.
        came: booleans or 0 and 1, of that shape.
        bins: as in ``reliability``.

    Returns:
        A tensor of shape ().

    Example:
        >>> calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([1, 0])).item()
        0.25

    Reference: Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    curve = reliability(p, came, bins)
    gap = torch.where(curve.events > 0, (curve.predicted - curve.observed).abs(), 0)
    return (gap * curve.events).sum() / curve.events.sum()


@uncertainty(family="calibration", paper="Brier 1950, Monthly Weather Review 78", leads=2)
def brier(p: Tensor, came: Tensor) -> Tensor:
    r"""Return the mean squared difference of probabilities and events: lower is better, and it rewards sharpness too.

    .. math:: \frac1n \sum_i (p_i - y_i)^2

    Args:
        p: probabilities, any shape.
        came: booleans or 0 and 1, of that shape.

    Returns:
        A tensor of shape ().

    Example:
        >>> brier(torch.tensor([0.5, 1.0]), torch.tensor([1, 1])).item()
        0.125
    """
    p, came = _events("brier", p, came)
    return (p.double() - came.double()).square().mean()


@uncertainty(family="calibration", paper="Guo et al. 2017, arXiv:1706.04599", leads=2)
def temperature(logits: Tensor, reference: Tensor) -> float:
    r"""Return the temperature that makes held-out data most likely: divide logits by it.

    .. math:: \arg\min_T \; \mathrm{NLL}(z / T)

    The loss is convex in 1/T, and its slope is brought to zero by bisection. Masks do not change.

    Args:
        logits: (1,\*S) for a sigmoid, (K,\*S) for a softmax; held-out data, not those it was trained on.
        reference: booleans or class numbers, (\*S).

    Returns:
        T > 0: above 1 the network was too sure. At most 1000 and at least 0.001.

    Example:
        >>> z = torch.tensor([[2.0, 2.0, 2.0, 2.0]])
        >>> round(temperature(z, torch.tensor([1, 1, 1, 0])), 3)  # 2 / log 3
        1.82

    Reference: Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    here = "temperature"
    z = check.floating(here, "logits", logits).detach().double()
    y = check.tensor(here, "reference", reference)
    if z.ndim < 2 or y.shape != z.shape[1:]:
        got = f"{check.describe(logits)} and {check.describe(y)}"
        raise check.refused(here, "logits (K,*S) and a reference (*S)", got, "Add a channel axis: z[None]")
    top = 1 if z.shape[0] == 1 else z.shape[0] - 1
    if y.is_floating_point() or bool(((y < 0) | (y > top)).any()):
        got, advice = check.describe(y), "Pass booleans or class numbers"
        raise check.refused(here, f"a reference of whole numbers 0 to {top}", got, advice)
    z, y = z.flatten(1), y.to(z.device).flatten()

    def slope(log_scale: float) -> float:
        with torch.enable_grad():
            s = torch.tensor(log_scale, dtype=torch.float64, device=z.device, requires_grad=True)
            scaled = z * s.exp()
            loss = (
                binary_cross_entropy_with_logits(scaled[0], y.double())
                if len(z) == 1
                else cross_entropy(scaled.T, y.long())
            )
            return float(torch.autograd.grad(loss, s)[0])

    low, high = -_WIDEST, _WIDEST
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(torch.tensor(-(low + high) / 2, dtype=torch.float64).exp())


_WIDEST = 6.907755278982137  # log 1000
