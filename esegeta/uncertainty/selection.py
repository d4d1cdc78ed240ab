"""Does uncertainty know where errors are? Curves over what is kept when the most uncertain is set aside.

``uncertainty`` and ``error`` are of the same things: voxels, lesions or images. An error is a boolean or a loss
(such as 1 - Dice). Things of equal uncertainty are set aside in random order; the numbers are means over that order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from esegeta._registry import uncertainty as registered
from esegeta.engine import check
from esegeta.uncertainty.aggregating import most_of


class Curve(NamedTuple):
    """What remains when things are set aside: (n,) each, from the most certain alone to all of them.

    coverage: the share that is kept; risk: the mean error of what is kept; retained: the errors that are kept,
    divided by all n things, which is the mean error when a person corrects what is set aside.
    """

    coverage: Tensor
    risk: Tensor
    retained: Tensor


def _pairs(where: str, uncertainty: object, error: object) -> tuple[Tensor, Tensor]:
    u = check.floating(where, "uncertainty", uncertainty).flatten()
    e = check.tensor(where, "error", error).flatten()
    if u.shape != e.shape or not len(u):
        got = f"{len(u)} and {len(e)}"
        raise check.refused(
            where, "as many errors as uncertainties, at least one", got, "Pass both of the same"
        )
    check.finite(where, "uncertainty", u, "Leave out what has none")
    return u, check.finite(where, "error", e.double(), "Leave out what has none").to(u.device)


@registered(family="selective risk", paper="Geifman, El-Yaniv 2017, arXiv:1705.08500", leads=2)
def risk_coverage(uncertainty: Tensor, error: Tensor) -> Curve:
    r"""Return what remains when the most uncertain things are set aside: risk-coverage and error-retention curves.

    Args:
        uncertainty: any shape.
        error: booleans, or losses, of that shape.

    Returns:
        ``Curve``.

    Example:
        >>> curve = risk_coverage(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 0, 1, 1]))
        >>> curve.retained.tolist()
        [0.0, 0.0, 0.25, 0.5]

    Reference: Geifman, El-Yaniv, Selective classification for deep neural networks, NeurIPS 2017; Malinin et al.,
        Shifts 2.0, 2022 (error retention).
    """
    u, e = _pairs("risk_coverage", uncertainty, error)
    order = u.argsort(stable=True)
    values, sizes = u[order].unique_consecutive(return_counts=True)
    group = torch.repeat_interleave(torch.arange(len(values), device=u.device), sizes)
    # In the mean over the order of equals, each has the mean error of its group.
    mean = torch.zeros(len(values), dtype=e.dtype, device=u.device).scatter_add(0, group, e[order]) / sizes
    kept = mean[group].cumsum(0)
    count = torch.arange(1, len(u) + 1, device=u.device, dtype=e.dtype)
    return Curve(count / len(u), kept / count, kept / len(u))


@registered(family="selective risk", paper="Geifman, Uziel, El-Yaniv 2019, arXiv:1805.08206", leads=2)
def aurc(uncertainty: Tensor, error: Tensor) -> Tensor:
    r"""Return the area under the risk-coverage curve: the mean risk over all coverages. Lower is better.

    Args:
        uncertainty: any shape.
        error: booleans, or losses, of that shape.

    Returns:
        A tensor of shape ().

    Example:
        >>> aurc(torch.tensor([0.1, 0.2]), torch.tensor([0, 1])).item()
        0.25

    Reference: Geifman, Uziel, El-Yaniv, Bias-reduced uncertainty estimation, ICLR 2019.
    """
    return risk_coverage(uncertainty, error).risk.mean()


@registered(family="selective risk", paper="Traub et al. 2024, arXiv:2407.01032", leads=2)
def augrc(uncertainty: Tensor, error: Tensor) -> Tensor:
    r"""Return the area under the generalised risk: the mean error that nobody notices, over all coverages.

    It is the area under the error-retention curve too. Unlike ``aurc`` it does not weigh the most certain few above
    all others. Lower is better.

    Args:
        uncertainty: any shape.
        error: booleans, or losses, of that shape.

    Returns:
        A tensor of shape ().

    Example:
        >>> augrc(torch.tensor([0.1, 0.2]), torch.tensor([0, 1])).item()
        0.25

    Reference: Traub et al., Overcoming common flaws in the evaluation of selective classification systems, NeurIPS
        2024.
    """
    return risk_coverage(uncertainty, error).retained.mean()


@registered(family="selective risk", example={"fraction": 0.1}, leads=2)
def error_share(uncertainty: Tensor, error: Tensor, fraction: float | int = 0.1) -> Tensor:
    r"""Return which share of all errors lies in the most uncertain fraction: what a person finds who looks there.

    A map that knows nothing has the fraction itself.

    Args:
        uncertainty: any shape.
        error: booleans, or losses, of that shape.
        fraction: above 0.

    Returns:
        A tensor of shape (); NaN if there is no error.

    Example:
        >>> error_share(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 0, 1, 1]), 0.25).item()
        0.5
    """
    curve = risk_coverage(uncertainty, error)
    n = len(curve.coverage)
    kept = n - most_of("error_share", fraction, n)
    below = curve.retained[kept - 1] if kept else torch.zeros_like(curve.retained[0])
    return 1 - below / curve.retained[-1] if curve.retained[-1] > 0 else torch.full_like(below, torch.nan)
