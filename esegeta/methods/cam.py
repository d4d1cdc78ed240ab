"""Class activation maps."""

from torch import Tensor, finfo

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import check, levels
from esegeta.placing import Names, grid, local


@method(
    place=True,
    shape="map",
    axioms=(
        "linearity symmetry implementation_invariance scale_of_output translation_equivariance "
        "affine_equivariance"
    ),
    # The shared cases have no averaging head: they see the definition without the refusal.
    example={"exact": False},
    family="class activation maps",
    paper="Zhou, Khosla, Lapedriza, Oliva, Torralba 2016, arXiv:1512.04150",
    also=("class_activation_map", "class_activation_mapping"),
)
def cam(score: Score, place: Names, *, exact: bool = True) -> Explain:
    r"""Explain by the channels of a layer, weighted as a head of average and linear map weighs them.

    .. math:: L_u(x) = \sum_d w_d A_{d,u}, \qquad
              w_d = \frac{\partial F}{\partial \bar A_d} = \sum_{u} \frac{\partial F}{\partial A_{d,u}}, \qquad
              \bar A_d = \tfrac{1}{|U|} \sum_u A_{d,u}

    Exact where the score reads the layer through the means of its channels only: for
    :math:`F = \sum_d w_{c,d} \bar A_d + b_c` the weights are :math:`w_{c,d}` and the mean of the map is
    :math:`F - b_c`. Behind such a head the gradient is the same at every voxel. A layer where it is not has no
    class activation map, and is refused; ``grad_cam`` and ``hires_cam`` go on from there.

    Args:
        score: ``(C,*S) -> ()``, for example the logit of a class.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass.
        exact: False for the same weights at any layer: what the score gains if a channel rises everywhere.
            That map is ``grad_cam`` times the number of voxels of the layer.

    Returns:
        ``explain(x) -> (1,*U)``, signed; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: 3 * eg.mark(2 * x, "layer").mean() + 7
        >>> cam(score, "layer")(torch.tensor([[1., 5.]])).tolist()
        [[6.0, 30.0]]

    Reference:
        Zhou, Khosla, Lapedriza, Oliva, Torralba 2016, equation 2, arXiv:1512.04150.
    """

    def weighted(a: Tensor, g: Tensor) -> Tensor:
        axes = grid(a)
        if exact:
            _refuse_varying(g.detach(), axes)
        return (g.sum(axes, keepdim=True) * a).sum(0, keepdim=True)

    return local(score, place, weighted)


def _refuse_varying(g: Tensor, axes: tuple[int, ...]) -> None:
    spread = (g.amax(axes) - g.amin(axes)).amax()
    if levels.true_anywhere(spread > 16 * finfo(g.dtype).eps * g.abs().amax()):
        raise check.refused(
            "cam",
            "a layer that the score reads through the means of its channels",
            "a gradient that varies over the grid",
            "Choose the layer before the global average, or take grad_cam or hires_cam; "
            "exact=False gives the map without this guarantee",
        )
