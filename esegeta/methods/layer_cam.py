"""LayerCAM."""

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
    paper="Jiang, Zhang, Hou, Cheng, Wei 2021, doi:10.1109/TIP.2021.3089943",
    also=("layercam",),
)
def layer_cam(score: Score, place: Names) -> Explain:
    r"""Explain by activation times positive gradient at a layer, added up over the channels.

    .. math:: L_u(x) = \sum_d [G_{d,u}]_+ A_{d,u}, \qquad G = \partial F / \partial A

    Every voxel of every channel has a weight of its own, so it works at early layers with fine grids too. What
    speaks against the score is left out: negative values come from negative activations only.

    Args:
        score: ``(C,*S) -> ()``.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass.

    Returns:
        ``explain(x) -> (1,*U)``, signed; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "layer") * torch.tensor([[1., -3.]])).sum()
        >>> layer_cam(score, "layer")(torch.tensor([[1., 5.]])).tolist()
        [[2.0, 0.0]]

    Reference:
        Jiang, Zhang, Hou, Cheng, Wei 2021, without the last ReLU, doi:10.1109/TIP.2021.3089943.
    """

    def weighted(a: Tensor, g: Tensor) -> Tensor:
        grid(a)
        return (g.clamp(min=0) * a).sum(0, keepdim=True)

    return local(score, place, weighted)
