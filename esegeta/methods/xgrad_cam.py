"""XGrad-CAM."""

import torch
from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.placing import Names, grid, local


@method(
    place=True,
    shape="map",
    axioms=(
        "linearity symmetry implementation_invariance scale_of_output translation_equivariance "
        "affine_equivariance"
    ),
    family="class activation maps",
    paper="Fu, Hu, Dong, Guo, Gao, Li 2020, arXiv:2008.02312",
    also=("xgradcam", "axiom_based_grad_cam"),
)
def xgrad_cam(score: Score, place: Names) -> Explain:
    r"""Explain by the channels of a layer, added up with their gradients, averaged by activation, as weights.

    .. math:: L_u(x) = \sum_d \Big( \frac{\sum_{u'} G_{d,u'} A_{d,u'}}{\sum_{u'} A_{d,u'}} \Big) A_{d,u}, \qquad
              G = \partial F / \partial A

    The weight is zero where a channel sums up to zero. The weights are those with which the map has the sum of
    ``hires_cam``, so it sums up to the score without its constant where all that follows the layer is affine.
    Meant for activations that are not negative: a channel whose values cancel gets a weight without bound.

    Args:
        score: ``(C,*S) -> ()``.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass.

    Returns:
        ``explain(x) -> (1,*U)``, signed; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(1 * x, "layer") * torch.tensor([[1., 3.]])).sum()
        >>> xgrad_cam(score, "layer")(torch.tensor([[2., 6.]])).tolist()
        [[5.0, 15.0]]

    Reference:
        Fu, Hu, Dong, Guo, Gao, Li 2020, without the ReLU, arXiv:2008.02312.
    """

    def weighted(a: Tensor, g: Tensor) -> Tensor:
        axes = grid(a)
        total = a.sum(axes, keepdim=True)
        empty = total == 0
        weights = (g * a).sum(axes, keepdim=True) / torch.where(empty, 1.0, total)
        return (torch.where(empty, 0.0, weights) * a).sum(0, keepdim=True)

    # Before a norm of each channel its epsilon, which is there to avoid a division by zero, is all that is left.
    return local(score, place, weighted, name="xgrad_cam", averaged=lambda a, g: g * a, tolerance=1e-3)
