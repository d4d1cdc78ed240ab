"""Seg-XRes-CAM."""

import torch
from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import check
from esegeta.placing import Names, grid, local


@method(
    place=True,
    shape="map",
    axioms=("linearity", "implementation_invariance", "scale_of_output"),
    example={"window": 2},
    family="class activation maps",
    paper="Hasany, Petitjean, Meriaudeau 2023, Seg-XRes-CAM, CVPR workshops",
    also=("segxrescam", "seg_xres_grad_cam"),
)
def seg_xres_cam(score: Score, place: Names, *, window: int = 1, pool: str = "mean") -> Explain:
    r"""Explain by activation times gradient at a layer, with the gradient pooled over windows of the grid.

    .. math:: L_u(x) = \sum_d \mathrm{pool}_{u' \in W(u)} G_{d,u'} \; A_{d,u}, \qquad G = \partial F / \partial A

    where :math:`W(u)` is the window of ``window`` voxels along each axis that u lies in. Windows do not overlap,
    the first begins at the corner, the last is clipped at the border. Between ``hires_cam`` (window 1) and
    ``grad_cam`` (windows as large as the grid, pooled by mean), both of which it is exactly: a pooled value is used
    as it is in its whole window, where the published code interpolates between windows. The maximum is not linear
    in the score.

    Args:
        score: ``(C,*S) -> ()``, for segmentation the sum over a region.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass.
        window: voxels of the layer's grid along each axis.
        pool: ``mean`` or ``max``.

    Returns:
        ``explain(x) -> (1,*U)``, signed; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(1 * x, "layer") * torch.tensor([[1., 3., 7.]])).sum()
        >>> seg_xres_cam(score, "layer", window=2)(torch.tensor([[1., 1., 1.]])).tolist()
        [[2.0, 2.0, 7.0]]

    Reference:
        Hasany, Petitjean, Meriaudeau 2023, Seg-XRes-CAM, CVPR workshops, without the ReLU.
    """
    check.positive_count("seg_xres_cam", "window", window)
    check.one_of("seg_xres_cam", "pool", pool, ("mean", "max"))

    def pooled(part: Tensor, axis: int) -> Tensor:
        one = part.mean(axis, keepdim=True) if pool == "mean" else part.amax(axis, keepdim=True)
        return one.expand_as(part)

    def weighted(a: Tensor, g: Tensor) -> Tensor:
        # A box is a product of intervals: one axis after the other.
        for axis in grid(a) if window > 1 else ():
            g = torch.cat([pooled(part, axis) for part in g.split(window, axis)], axis)
        return (g * a).sum(0, keepdim=True)

    def averaged(a: Tensor, g: Tensor) -> Tensor | None:
        return g if pool == "mean" and window >= max(a.shape[axis] for axis in grid(a)) else None

    return local(score, place, weighted, name="seg_xres_cam", averaged=averaged)
