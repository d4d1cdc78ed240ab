"""Grad-CAM."""

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
    paper="Selvaraju et al. 2017, arXiv:1610.02391",
    also=("gradcam", "layer_grad_cam", "seg_grad_cam"),
)
def grad_cam(score: Score, place: Names) -> Explain:
    r"""Explain by the channels of a layer, added up with their mean gradients as weights.

    .. math:: L_u(x) = \sum_d \Big( \tfrac{1}{|U|} \sum_{u'} G_{d,u'} \Big) A_{d,u}, \qquad
              G = \partial F / \partial A

    Raw: signed, on the grid of the layer. The picture of the paper is ``positive`` of it, brought to the image
    by ``upsample``. The mean over the grid is the approximation that makes it smooth: it may light up where
    the network did not look (``hires_cam`` does not). Before an instance norm all means are zero and the map is
    rounding: a warning says so and names a place after it. For segmentation take the reducer of your question: the
    sum over a region, an instance or one voxel (Seg-Grad-CAM), or ``class_mean``.

    Args:
        score: ``(C,*S) -> ()``.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass.

    Returns:
        ``explain(x) -> (1,*U)``, signed; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "layer") * torch.tensor([[1., 3.]])).sum()
        >>> grad_cam(score, "layer")(torch.tensor([[1., 5.]])).tolist()
        [[4.0, 20.0]]

    Reference:
        Selvaraju et al. 2017, equations 1 and 2 without the ReLU, arXiv:1610.02391.
    """
    return local(score, place, weighted, name="grad_cam", averaged=lambda _, g: g)


def weighted(a: Tensor, g: Tensor) -> Tensor:
    """Return the channels of ``a``, added up with the means of ``g`` as weights."""
    # No product of the size of the layer: on all layers of a network it would take as long as their gradient.
    return torch.einsum("d,d...->...", g.mean(grid(a)), a).unsqueeze(0)
