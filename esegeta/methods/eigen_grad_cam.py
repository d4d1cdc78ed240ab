"""Eigen-Grad-CAM."""

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.methods.eigen_cam import component
from esegeta.placing import Names, local


@method(
    place=True,
    shape="map",
    axioms=(
        "symmetry implementation_invariance scale_of_output translation_equivariance affine_equivariance"
    ),
    family="class activation maps",
    paper="pytorch-grad-cam, EigenGradCAM",
    also=("eigengradcam",),
)
def eigen_grad_cam(score: Score, place: Names) -> Explain:
    r"""Explain by the first principal component of activation times gradient at a layer.

    .. math:: L = v^\top (B - \bar B), \qquad B = G \odot A, \qquad
              v = \arg\max_{\|v\| = 1} \| v^\top (B - \bar B) \|

    with :math:`G = \partial F / \partial A`, the mean :math:`\bar B` of every channel over the grid, and the sign
    that correlates with :math:`\sum_d B_d`, the map of ``hires_cam``: ``eigen_cam`` that knows of the score. Where
    a single channel matters it is ``hires_cam`` without its mean.

    Args:
        score: ``(C,*S) -> ()``.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass.

    Returns:
        ``explain(x) -> (1,*U)``, signed, with the sum zero; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "layer") * torch.tensor([[1., 3.]])).sum()
        >>> eigen_grad_cam(score, "layer")(torch.tensor([[1., 5.]])).tolist()
        [[-14.0, 14.0]]

    Reference:
        Defined by its implementation, EigenGradCAM of pytorch-grad-cam; after Muhammad, Yeasin 2020,
        arXiv:2008.00299.
    """
    return local(score, place, lambda a, g: component(g * a))
