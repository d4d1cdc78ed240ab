"""HiResCAM."""

from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.placing import Names, grid, local


@method(
    place=True,
    shape="map",
    axioms=(
        "dummy linearity symmetry implementation_invariance scale_of_output translation_equivariance "
        "affine_equivariance"
    ),
    family="class activation maps",
    paper="Draelos, Carin 2020, arXiv:2011.08891",
    also=("hirescam", "linear_approximation", "linear_approximator", "linear_approx"),
)
def hires_cam(score: Score, place: Names) -> Explain:
    r"""Explain by activation times gradient at a layer, added up over the channels.

    .. math:: L_u(x) = \sum_d G_{d,u} A_{d,u}, \qquad G = \partial F / \partial A

    The first-order Taylor terms of the score in the activations: the same map is known as the linear
    approximation. Where all that follows the layer is affine the map sums up to the score without its
    constant, :math:`\sum_u L_u = F(x) - F(x \mid A := 0)`. Nothing is averaged: a voxel that the score does not
    depend on is zero.

    Args:
        score: ``(C,*S) -> ()``.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass.

    Returns:
        ``explain(x) -> (1,*U)``, signed; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "layer") * torch.tensor([[1., 3.]])).sum()
        >>> hires_cam(score, "layer")(torch.tensor([[1., 5.]])).tolist()
        [[2.0, 30.0]]

    Reference:
        Draelos, Carin 2020, without the ReLU, arXiv:2011.08891.
    """

    def product(a: Tensor, g: Tensor) -> Tensor:
        grid(a)
        return (g * a).sum(0, keepdim=True)

    return local(score, place, product)
