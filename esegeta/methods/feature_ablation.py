"""What the score loses without each part."""

from jaxtyping import Float
from torch import Tensor

from esegeta import coalitions
from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.coalitions import Fill, mixed
from esegeta.engine import check
from esegeta.features import Features, Lengths, Spacing, elements, windows


@method(
    refs=("baseline",),
    axioms=(
        "sensitivity_a dummy linearity symmetry implementation_invariance sensitivity_n shift "
        "scale_of_output continuity translation_equivariance affine_equivariance monotonicity"
    ),
    needs="values",
    family="parts",
    contributions=True,
    paper="Zeiler, Fergus 2014, arXiv:1311.2901",
    also=("ablation", "leave_one_out"),
)
def feature_ablation(score: Score, *, features: Features | None = None, fill: Fill | None = None) -> Explain:
    r"""Explain by what the score loses if a part is replaced by the baseline, for every part.

    .. math:: a_v = F(x) - F(x \text{ with the part of } v \text{ at } x')

    Exact: one run for each part. Complete only where the score is additive over the parts: what two parts do
    together is credited to both, or to neither.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        features: which parts, by ``esegeta.features``; by default every element, for small images.
        fill: what a part is replaced by, from (x, baseline, kept): by default the baseline;
            ``baselines.inpainted`` continues what surrounds it.

    Returns:
        ``explain(x, baseline) -> like x``, the value of a part at each of its elements.

    Example:
        >>> import torch
        >>> explain = feature_ablation(lambda x: x[0, 0] * x[0, 1] + x[0, 2])
        >>> explain(torch.tensor([[2., 3., 1.]]), torch.zeros(1, 3)).tolist()
        [[6.0, 6.0, 1.0]]

    Reference:
        Zeiler, Fergus 2014, section 4.2, arXiv:1311.2901.
    """
    shown = mixed if fill is None else check.fill("feature_ablation", fill)
    return _dropped(score, elements() if features is None else features, shown, "feature_ablation")


@method(
    refs=("baseline",),
    axioms=(
        "sensitivity_a linearity implementation_invariance shift scale_of_output continuity "
        "class_sensitivity affine_equivariance"
    ),
    needs="values",
    example={"size": 2, "stride": 1},
    family="parts",
    numbers="part",
    paper="Zeiler, Fergus 2014, arXiv:1311.2901",
    also=("sliding_window", "occlusion_sensitivity"),
)
def occlusion(
    score: Score,
    *,
    size: Lengths = 8,
    stride: Lengths | None = None,
    spacing: Spacing | None = None,
) -> Explain:
    r"""Explain by what the score loses under a box that slides over the image.

    .. math:: a_v = \frac{1}{|\{w \ni v\}|} \sum_{w \ni v} F(x) - F(x \text{ with } w \text{ at } x')

    Exact: one run for each place of the box, only of what the box changes where the network is local. Other
    boxes, for each channel alone or in a region only, are ``feature_ablation(score, features=windows(...))``.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        size: of the box, one number or one for each axis, in voxels or in the unit of ``spacing``.
        stride: of its steps, at most its size, which is the default.
        spacing: of the voxels, if sizes are lengths.

    Returns:
        ``explain(x, baseline) -> like x``.

    Example:
        >>> import torch
        >>> explain = occlusion(lambda x: (torch.tensor([1., 2., 4.]) * x).sum(), size=2, stride=1)
        >>> explain(torch.ones(1, 3), torch.zeros(1, 3)).tolist()
        [[3.0, 4.5, 6.0]]

    Reference:
        Zeiler, Fergus 2014, section 4.2, arXiv:1311.2901; the mean over boxes is that of captum.
    """
    return _dropped(score, windows(size, stride=stride, spacing=spacing), mixed, "occlusion")


@method(
    refs=("baseline",),
    axioms="linearity implementation_invariance shift scale_of_output continuity affine_equivariance",
    needs="values",
    example={"size": 2, "stride": 1},
    family="parts",
    numbers="part",
    paper="Zeiler, Fergus 2014, arXiv:1311.2901",
    also=("soft_occlusion",),
)
def gaussian_occlusion(
    score: Score,
    *,
    size: Lengths = 16,
    stride: Lengths | None = None,
    spacing: Spacing | None = None,
    fade: float | int = 0.25,
) -> Explain:
    r"""Explain by what the score loses under a box that fades out towards its borders: no new edges.

    .. math:: a_v = \frac{\sum_w h_{w,v} (F(x) - F(x + h_w (x' - x)))}{\sum_w h_{w,v}}, \qquad
              h_{w,v} = e^{-|v - c_w|^2 / 2 \sigma^2} 1_{v \in w}

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        size: of the box, one number or one for each axis, in voxels or in the unit of ``spacing``.
        stride: of its steps, at most its size, which is the default.
        spacing: of the voxels, if sizes are lengths.
        fade: :math:`\sigma` as a fraction of the size.

    Returns:
        ``explain(x, baseline) -> like x``.

    Example:
        >>> import torch
        >>> explain = gaussian_occlusion(lambda x: x.sum(), size=1)
        >>> explain(torch.tensor([[1., 2.]]), torch.zeros(1, 2)).tolist()
        [[1.0, 2.0]]

    Reference:
        Zeiler, Fergus 2014, arXiv:1311.2901; the fading box is that of MONAI.
    """
    features = windows(size, stride=stride, spacing=spacing, fade=fade)
    return _dropped(score, features, mixed, "gaussian_occlusion")


def _dropped(score: Score, features: Features, fill: Fill, label: str) -> Explain:
    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        parts = coalitions.parts(label, features, x, runs=lambda d: d + 1)
        drops = coalitions.drops(score, x, baseline, parts, label=label, fill=fill)
        return parts.spread(drops).expand_as(x).clone()

    return explain
