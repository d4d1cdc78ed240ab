"""The feature explanation method."""

from typing import Any

from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import check
from esegeta.placing import Names, grid, tap


@method(
    place=True,
    shape="map",
    axioms=("symmetry", "implementation_invariance", "translation_equivariance", "affine_equivariance"),
    needs="activation",
    example={"k": 1.0},
    family="class activation maps",
    paper="Fuad, Martin, Giot, Bourqui, Benois-Pineau, Zemmari 2020, doi:10.1109/IPTA50016.2020.9286629",
    also=("feature_explanation_method",),
)
def fem(score: Score, place: Names, *, k: float = 2.0, show: str = "mask") -> Explain:
    r"""Explain by the places where the channels of a layer are unusually strong.

    .. math:: M_{d,u} = 1[A_{d,u} \ge \mu_d + k \sigma_d], \qquad L_u(x) = \sum_d \mu_d \, M_{d,u}

    with the mean and the standard deviation of every channel over the grid. It knows nothing of the score but the
    layer. There are two published forms: this is the one of the paper. The other, with ``show="activation"``,
    weighs the channels themselves by how much of their grid is strong,
    :math:`L_u = \sum_d \big( \tfrac{1}{|U|} \sum_{u'} M_{d,u'} \big) A_{d,u}` with > in place of >=. A
    constant channel is nowhere strong; a single voxel that differs is, on grids with at least :math:`k^2 + 1`.

    Args:
        score: ``(C,*S) -> ()``, or a model.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass.
        k: how many standard deviations are unusual.
        show: ``mask`` (the paper) or ``activation``.

    Returns:
        ``explain(x) -> (1,*U)``, signed; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: eg.mark(2 * x, "layer").sum()
        >>> x = torch.tensor([[0., 0., 0., 0., 0., 6.]])
        >>> fem(score, "layer")(x).tolist(), fem(score, "layer", show="activation")(x).tolist()
        ([[0.0, 0.0, 0.0, 0.0, 0.0, 2.0]], [[0.0, 0.0, 0.0, 0.0, 0.0, 2.0]])

    Reference:
        Fuad, Martin, Giot, Bourqui, Benois-Pineau, Zemmari 2020, doi:10.1109/IPTA50016.2020.9286629. The other
        form is that of pytorch-grad-cam.
    """
    trunk = tap(score, place)
    check.non_negative("fem", "k", k)
    check.one_of("fem", "show", show, ("mask", "activation"))

    def one(a: Tensor) -> Tensor:
        axes = grid(a)
        centre = a.mean(axes, keepdim=True)
        above = a.detach() - centre.detach()
        limit = k * above.square().mean(axes, keepdim=True).sqrt()
        varies = above.amax(axes, keepdim=True) > above.amin(axes, keepdim=True)
        strong = ((above >= limit if show == "mask" else above > limit) & varies).to(a.dtype)
        terms = centre * strong if show == "mask" else strong.mean(axes, keepdim=True) * a
        return terms.sum(0, keepdim=True)

    def explain(x: Tensor) -> Any:
        found = trunk(x)
        if isinstance(place, str):
            return one(found)
        return tuple(map(one, found))

    return explain
