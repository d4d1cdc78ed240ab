"""Score-CAM."""

from typing import Any

import torch
from torch import Tensor

from esegeta import spatial
from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import check, stream
from esegeta.placing import Names, grid, tap


@method(
    place=True,
    shape="map",
    refs=("baseline",),
    axioms=("symmetry", "implementation_invariance", "translation_equivariance", "affine_equivariance"),
    needs="values",
    family="class activation maps",
    paper="Wang, Wang, Du, Yang, Zhang, Ding, Mardziel, Hu 2020, arXiv:1910.01279",
    also=("scorecam",),
)
def score_cam(score: Score, place: Names, *, weights: str = "softmax", temperature: float = 1.0) -> Explain:
    r"""Explain by the channels of a layer, added up by what the score is if only what they light up is shown.

    .. math:: L_u(x) = \sum_d w_d A_{d,u}, \qquad s_d = F(x' + H_d \odot (x - x')) - F(x'), \qquad
              H_d = \frac{\mathrm{up}(A_d) - \min \mathrm{up}(A_d)}{\max \mathrm{up}(A_d) - \min \mathrm{up}(A_d)}

    with w the softmax of :math:`s / \tau` over the channels, :math:`[s_d]_+` or :math:`s_d`, and up multilinear
    interpolation to the grid of the image. A constant channel shows nothing and weighs zero. No gradient is
    needed, but one run for each channel. The softmax of the paper is meant for probabilities: of sums of logits it
    leaves a single channel, unless the temperature is as large as their differences.

    Args:
        score: ``(C,*S) -> ()``.
        place: a layer whose activation is ``(D,*U)``, with as many axes as the image; several for several maps.
        weights: ``softmax`` (the paper), ``increase`` for :math:`[s_d]_+`, or ``linear`` for :math:`s_d`.
        temperature: :math:`\tau`, of the softmax only.

    Returns:
        ``explain(x, baseline) -> (1,*U)``, signed; a tuple of maps for several places.

    Example:
        The first channel lights up the voxel that the score reads, the second one the other.

        >>> import torch, esegeta as eg
        >>> score = lambda x: eg.mark(torch.cat([x, -x]), "layer")[0, 1]
        >>> score_cam(score, "layer", weights="linear")(torch.tensor([[1., 5.]]), torch.zeros(1, 2)).tolist()
        [[5.0, 25.0]]

    Reference:
        Wang, Wang, Du, Yang, Zhang, Ding, Mardziel, Hu 2020, without the ReLU, arXiv:1910.01279.
    """
    trunk = tap(score, place)
    check.one_of("score_cam", "weights", weights, ("softmax", "increase", "linear"))
    if not check.non_negative("score_cam", "temperature", temperature):
        raise check.refused("score_cam", "temperature > 0", repr(temperature), "Pass such a number")

    def one(a: Tensor, x: Tensor, baseline: Tensor) -> Tensor:
        grid(a)
        channels = torch.arange(len(a), device=a.device)

        def shown(d: Tensor) -> tuple[Tensor, Tensor]:
            lit = spatial.upsample(a.index_select(0, d.reshape(1)), like=x)
            low, span = lit.amin(), lit.amax() - lit.amin()
            varies = span > 0
            mask = (lit - low) * torch.where(varies, 1 / torch.where(varies, span, 1.0), 0.0)
            here = channels == d
            value = check.scalar("score_cam", score(baseline + mask * (x - baseline)))
            return value * here, varies * here.to(a.dtype)

        ones = torch.ones_like(channels, dtype=a.dtype)
        values, varies = stream.integral(shown, channels, ones, label="score_cam")
        if weights == "softmax":
            # A constant channel takes no part, not even in the maximum that keeps the exponentials finite.
            level = values.masked_fill(varies == 0, -torch.inf) / temperature
            w = torch.nan_to_num(torch.softmax(level, 0))
        else:
            s = (values - score(baseline)) * varies
            w = s.clamp(min=0) if weights == "increase" else s
        return torch.tensordot(w, a, 1)[None]

    def explain(x: Tensor, baseline: Tensor) -> Any:
        found = trunk(x)
        if isinstance(place, str):
            return one(found, x, baseline)
        return tuple(one(a, x, baseline) for a in found)

    return explain
