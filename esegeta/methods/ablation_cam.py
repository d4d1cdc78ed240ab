"""Ablation-CAM."""

import torch
from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import check, stream
from esegeta.placing import Names, grid, split, tap


@method(
    place=True,
    shape="map",
    axioms=(
        "sensitivity_a linearity symmetry implementation_invariance scale_of_output continuity "
        "class_sensitivity translation_equivariance affine_equivariance"
    ),
    needs="values",
    family="class activation maps",
    paper="Desai, Ramaswamy 2020, doi:10.1109/WACV45572.2020.9093360",
    also=("ablationcam",),
)
def ablation_cam(score: Score, place: Names, *, relative: bool = False) -> Explain:
    r"""Explain by the channels of a layer, added up by what the score loses without them.

    .. math:: L_u(x) = \sum_d w_d A_{d,u}, \qquad w_d = F(x) - F(x \mid A_d := 0)

    Everything beside the layer stays as it is at x. No gradient is needed, but one run for each channel. The paper
    divides all weights by :math:`F(x)`. That is a scale, common to the whole map, which turns its sign where the
    score is negative and magnifies rounding without bound where it is nearly zero, as sums of logits may be; so it
    is done on request only.

    Args:
        score: ``(C,*S) -> ()``.
        place: a layer whose activation is ``(D,*U)``; several for several maps.
        relative: divide by :math:`F(x)` as in the paper; the map is zero where :math:`F(x) = 0`.

    Returns:
        ``explain(x) -> (1,*U)``, signed; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: eg.mark(torch.cat([x, 2 * x]), "layer").sum()
        >>> ablation_cam(score, "layer")(torch.tensor([[3., 6.]])).tolist()
        [[135.0, 270.0]]
        >>> ablation_cam(score, "layer", relative=True)(torch.tensor([[3., 6.]])).tolist()
        [[5.0, 10.0]]

    Reference:
        Desai, Ramaswamy 2020, without the ReLU, doi:10.1109/WACV45572.2020.9093360.
    """
    if not isinstance(place, str):
        tap(score, place)  # refuses what is no sequence of places
        each = [ablation_cam(score, p, relative=relative) for p in place]
        return lambda x: tuple(explain(x) for explain in each)  # type: ignore[return-value]

    def explain(x: Tensor) -> Tensor:
        trunk, head = split(score, place, at=x)
        a = trunk(x)
        axes = grid(a)
        whole = check.scalar("ablation_cam", score(x))
        channels = torch.arange(len(a), device=a.device)
        column = channels.reshape(-1, *[1] * len(axes))

        def lost(d: Tensor) -> Tensor:
            return (whole - head(torch.where(column == d, 0.0, a))) * (channels == d)

        w = stream.integral(lost, channels, torch.ones_like(channels, dtype=a.dtype), label="ablation_cam")
        if relative:
            none = whole == 0
            w = torch.where(none, 0.0, w / torch.where(none, 1.0, whole))
        return torch.tensordot(w, a, 1)[None]

    return explain
