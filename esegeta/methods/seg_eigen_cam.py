"""Seg-Eigen-CAM."""

import torch
from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.methods.eigen_cam import component
from esegeta.placing import Names, local


@method(
    place=True,
    shape="map",
    axioms=("symmetry", "scale_of_output", "translation_equivariance", "affine_equivariance"),
    family="class activation maps",
    paper="Chung, Ying 2025, doi:10.3390/app15137562",
    also=("segeigencam",),
)
def seg_eigen_cam(score: Score, place: Names) -> Explain:
    r"""Explain by the first principal component of activation times size of the gradient, turned to its larger side.

    .. math:: L = v^\top (B - \bar B), \qquad B = |G| \odot A, \qquad
              v = \arg\max_{\|v\| = 1} \| v^\top (B - \bar B) \|

    with :math:`G = \partial F / \partial A` and the mean :math:`\bar B` of every channel over the grid. It has the
    sign for which :math:`\max L \ge -\min L`; if both are equal, the one that correlates with
    :math:`\sum_d B_d`. Because of the modulus it says where the layer matters, not in which direction.

    Args:
        score: ``(C,*S) -> ()``, for segmentation the sum over a region.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass.

    Returns:
        ``explain(x) -> (1,*U)``, signed, with the sum zero; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(1 * x, "layer") * torch.tensor([[-1., 3., 0.]])).sum()
        >>> seg_eigen_cam(score, "layer")(torch.tensor([[6., 1., 9.]])).tolist()
        [[3.0, 0.0, -3.0]]

    Reference:
        Chung, Ying 2025, doi:10.3390/app15137562.
    """

    def turned(a: Tensor, g: Tensor) -> Tensor:
        found = component(g.abs() * a)
        return torch.where(-found.amin() > found.amax(), -found, found)

    return local(score, place, turned)
