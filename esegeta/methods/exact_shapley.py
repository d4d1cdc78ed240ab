"""Shapley values by enumeration: of any parts, and of the channels."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import coalitions
from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import check
from esegeta.engine.execution import DeadlineExceeded
from esegeta.features import Features, channels, elements, grid

MOST_PARTS = 16


@method(
    refs=("baseline",),
    axioms=(
        "sensitivity_a linearity implementation_invariance shift scale_of_output "
        "efficiency_of_regions continuity class_sensitivity"
    ),
    needs="values",
    example={"features": grid(2)},
    family="parts",
    contributions=True,
    paper="Shapley 1953, doi:10.1515/9781400881970-018",
    also=("shapley_values", "shapley"),
)
def exact_shapley(score: Score, *, features: Features | None = None) -> Explain:
    r"""Explain by what a part adds to the score, on average over all orders in which parts can become present.

    .. math:: a_j = \sum_{T \not\ni j} \frac{|T|!\, (d - |T| - 1)!}{d!} \left( v(T \cup j) - v(T) \right), \qquad
              \sum_j a_j = F(x) - F(x')

    Exact: every one of the :math:`2^d` coalitions of d parts is run once, for at most 16 parts; sums are in
    float64. Over parts it is complete, symmetric and gives nothing to a part that changes nothing. A map shows
    the value of a part at each of its elements, so its sum counts a part as often as it has elements.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        features: which parts, by ``esegeta.features``; by default every element, for very small images.

    Returns:
        ``explain(x, baseline) -> like x``, the value of a part at each of its elements.

    Example:
        >>> import torch
        >>> explain = exact_shapley(lambda x: x.max())
        >>> explain(torch.tensor([[6., 2.]]), torch.zeros(1, 2)).tolist()
        [[5.0, 1.0]]

    Reference:
        Shapley 1953, A value for n-person games.
    """
    return _enumerated(score, elements() if features is None else features, "exact_shapley")


@method(
    refs=("baseline",),
    axioms=(
        "sensitivity_a linearity implementation_invariance shift scale_of_output continuity "
        "class_sensitivity translation_equivariance affine_equivariance"
    ),
    needs="values",
    family="parts",
    numbers="part",
    paper="Shapley 1953, doi:10.1515/9781400881970-018",
    also=("modality_shapley", "sequence_shapley"),
)
def channel_shapley(score: Score) -> Explain:
    r"""Explain by the Shapley value of each channel: what a modality, an MR sequence or a colour adds to the score.

    .. math:: a_c = \sum_{T \not\ni c} \frac{|T|!\, (C - |T| - 1)!}{C!} \left( v(T \cup c) - v(T) \right)

    Exact: :math:`2^C` runs, 16 for four sequences. The same as ``exact_shapley(score, features=channels())``.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.

    Returns:
        ``explain(x, baseline) -> like x``, the value of a channel at each of its elements.

    Example:
        >>> import torch
        >>> explain = channel_shapley(lambda x: x[0].sum() * x[1].sum())
        >>> explain(torch.tensor([[1., 1.], [3., 0.]]), torch.zeros(2, 2)).tolist()
        [[3.0, 3.0], [3.0, 3.0]]

    Reference:
        Shapley 1953, A value for n-person games.
    """
    return _enumerated(score, channels(), "channel_shapley")


def _enumerated(score: Score, features: Features, label: str) -> Explain:
    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        parts = coalitions.parts(label, features, x, runs=lambda d: 2 ** min(d, MOST_PARTS))
        d = parts.count
        if d > MOST_PARTS:
            raise check.refused(
                label,
                f"at most {MOST_PARTS} features, which take {2**MOST_PARTS:,} runs of the score",
                f"{d:,}, which take 2^{d}",
                "Use coarser ones, for example features=esegeta.features.labels(map), "
                "or sample the orders with esegeta.shapley_sampling",
            )
        present = (torch.arange(2**d, device=x.device)[:, None] >> torch.arange(d, device=x.device)) & 1
        v = coalitions.values(score, x, baseline, parts, present.to(x.dtype), label=label)
        if len(v) < 2**d:
            raise DeadlineExceeded(
                f"{label}: the deadline passed after {len(v)} of {2**d} coalitions, and a part of them has no "
                "meaning of its own. Allow more time, or use esegeta.shapley_sampling."
            )
        gain = (v - v[0]).double()
        return parts.spread((_weights(present).T @ gain).to(v.dtype)).expand_as(x).clone()

    return explain


def _weights(present: Tensor) -> Tensor:
    """How often the value of a coalition (row) counts for or against a part (column)."""
    d = present.shape[1]
    chance = [1 / (d * math.comb(d - 1, k)) for k in range(d)]
    after = torch.tensor([0.0, *chance], dtype=torch.float64, device=present.device)
    before = torch.tensor([*chance, 0.0], dtype=torch.float64, device=present.device)
    size = present.sum(1)
    return torch.where(present == 1, after[size][:, None], -before[size][:, None])
