"""Eigen-CAM."""

from typing import Any

import torch
from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.placing import Names, grid, tap


@method(
    place=True,
    shape="map",
    axioms=("symmetry", "implementation_invariance", "translation_equivariance", "affine_equivariance"),
    needs="activation",
    family="class activation maps",
    paper="Muhammad, Yeasin 2020, arXiv:2008.00299",
    also=("eigencam",),
)
def eigen_cam(score: Score, place: Names) -> Explain:
    r"""Explain by the first principal component of the channels of a layer.

    .. math:: L = v^\top (A - \bar A), \qquad v = \arg\max_{\|v\| = 1} \| v^\top (A - \bar A) \|, \qquad
              \bar A_d = \tfrac{1}{|U|} \sum_u A_{d,u}

    with the sign that correlates with the mean of the channels. It says what varies most in the layer and
    knows nothing of the score but the layer. The paper decomposes A without centring, where the component is
    mostly the mean. The first derivative of the map is exact where the largest eigenvalue is single; higher ones
    are not.

    Args:
        score: ``(C,*S) -> ()``, or a model.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass.

    Returns:
        ``explain(x) -> (1,*U)``, signed, with the sum zero; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: eg.mark(torch.cat([3 * x, 4 * x]), "layer").sum()
        >>> [round(v, 4) for v in eigen_cam(score, "layer")(torch.tensor([[1., 2., 6.]]))[0].tolist()]
        [-10.0, -5.0, 15.0]

    Reference:
        Muhammad, Yeasin 2020, arXiv:2008.00299.
    """
    trunk = tap(score, place)

    def explain(x: Tensor) -> Any:
        found = trunk(x)
        if isinstance(place, str):
            return component(found)
        return tuple(map(component, found))

    return explain


def component(a: Tensor) -> Tensor:
    """Return the first principal component (1,*U) of channels (D,*U), with the sign that correlates with their mean.

    >>> component(torch.tensor([[1., 7.], [-1., -9.]])).round(decimals=3).tolist()
    [[5.0, -5.0]]
    """
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    centred = wide - wide.mean(grid(a), keepdim=True)
    rows = centred.flatten(1)
    # The small matrix of channels, not the D x millions of voxels, is decomposed.
    gram = (rows @ rows.T).to(torch.float64)
    values, vectors = torch.linalg.eigh(gram.detach())
    # One step of perturbation theory: zero, with the derivative of the first vector. That of eigh itself is NaN
    # if any two eigenvalues are equal, as two channels that a ReLU keeps silent make them.
    gaps = values[-1] - values
    apart = gaps > 1e-12 * values[-1].abs()
    first = vectors[:, -1]
    step = vectors @ (
        (vectors.T @ (gram @ first)) * torch.where(apart, 1 / torch.where(apart, gaps, 1.0), 0.0)
    )
    projected = torch.tensordot((first + step).to(wide.dtype), centred, 1)
    sign = torch.where((projected * centred.sum(0)).sum() < 0, -1.0, 1.0)
    return (sign * projected)[None].to(a.dtype)
