"""Random class activation maps."""

from typing import Any

import torch
from torch import Tensor

from esegeta import random
from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.placing import Names, grid, tap


@method(
    place=True,
    shape="map",
    key=True,
    axioms=(
        "sensitivity_a symmetry implementation_invariance continuity translation_equivariance "
        "affine_equivariance"
    ),
    needs="activation",
    family="class activation maps",
    paper="pytorch-grad-cam, RandomCAM",
    also=("randomcam",),
)
def random_cam(score: Score, place: Names) -> Explain:
    r"""Explain by the channels of a layer, added up with random weights: what a map has to be better than.

    .. math:: L_u(x) = \sum_d w_d A_{d,u}, \qquad w_d \sim \mathcal{U}(-1, 1)

    A null model for metrics: what it scores is owed to the layer, not to the explanation. It knows nothing of the
    score but the layer.

    Args:
        score: ``(C,*S) -> ()``, or a model.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass, each with the
            weights that its channels would get alone.

    Returns:
        ``explain(x, key=) -> (1,*U)``, signed; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: eg.mark(2 * x, "layer").sum()
        >>> a = random_cam(score, "layer")(torch.tensor([[1., 5.]]), key=0)
        >>> bool((a[0, 1] == 5 * a[0, 0]) & (a[0, 0].abs() < 2))
        True

    Reference:
        Defined by its implementation, RandomCAM of pytorch-grad-cam.
    """
    trunk = tap(score, place)

    def one(a: Tensor, key: int | Tensor) -> Tensor:
        grid(a)
        w = 2 * random.uniform(key, a.shape[:1], dtype=a.dtype, device=a.device) - 1
        return torch.tensordot(w, a, 1)[None]

    def explain(x: Tensor, *, key: int | Tensor) -> Any:
        found = trunk(x)
        if isinstance(place, str):
            return one(found, key)
        return tuple(one(a, key) for a in found)

    return explain
