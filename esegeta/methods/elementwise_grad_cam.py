"""Element-wise Grad-CAM."""

from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.placing import Names, grid, local


@method(
    place=True,
    shape="map",
    axioms=(
        "dummy symmetry implementation_invariance scale_of_output translation_equivariance "
        "affine_equivariance"
    ),
    family="class activation maps",
    paper="pytorch-grad-cam, GradCAMElementWise",
    also=("grad_cam_element_wise", "gradcam_elementwise"),
)
def elementwise_grad_cam(score: Score, place: Names) -> Explain:
    r"""Explain by the positive products of activation and gradient at a layer, added up over the channels.

    .. math:: L_u(x) = \sum_d [G_{d,u} A_{d,u}]_+, \qquad G = \partial F / \partial A

    The ReLU stands before the sum and is part of the definition: channels that speak against the score do not
    cancel those that speak for it, as they do in ``hires_cam``. Never negative.

    Args:
        score: ``(C,*S) -> ()``.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass.

    Returns:
        ``explain(x) -> (1,*U)``, not negative; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "layer") * torch.tensor([[1., 3.], [-1., 1.]])).sum()
        >>> elementwise_grad_cam(score, "layer")(torch.tensor([[1., 5.], [1., 1.]])).tolist()
        [[2.0, 32.0]]

    Reference:
        Defined by its implementation, GradCAMElementWise of pytorch-grad-cam.
    """

    def product(a: Tensor, g: Tensor) -> Tensor:
        grid(a)
        return (g * a).clamp(min=0).sum(0, keepdim=True)

    return local(score, place, product)
