"""XRAI: integrated gradients by regions of the image."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from esegeta import baselines, segmentation, spatial
from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import check, stream
from esegeta.engine.gradient import gradient
from esegeta.quadrature import nodes_and_weights
from esegeta.spatial import Spacing

# What the authors' code takes on an image of 224 x 224 pixels with values from -1 to 1.
_SIDE, _MINIMUM, _REACH, _LEAST, _SIGMA, _UNIT = 224, 150, 5, 50, 0.8, 255


@method(
    axioms="implementation_invariance scale_of_output continuity affine_equivariance",
    shape="map",
    example={"steps": 4, "minimum": 3},
    family="gradients and paths",
    cost=lambda steps: Cost(gradients=steps),
    numbers="part",
    paper="Kapishnikov, Bolukbasi, Viegas, Terry 2019, arXiv:1906.02825",
)
def xrai(
    score: Score,
    *,
    steps: int = 32,
    scales: Sequence[float | int] = (50, 100, 150, 250, 500, 1200),
    minimum: float | int | None = None,
    reach: float | int | None = None,
    spacing: Spacing | None = None,
) -> Explain:
    r"""Explain by integrated gradients from black and from white, averaged over the regions where they are densest.

    .. math:: a_v = \max_c \tfrac12 \big( \mathrm{IG}(x, x_{min}) + \mathrm{IG}(x, x_{max}) \big)_{c,v},
              \qquad b = \text{regions}(a)

    The regions come from graph segmentations of the image at several scales, each segment grown a little so that
    edges lie inside: see ``regions`` and ``segmentation.graph_segmentation``, which are how to do the same with
    other explanations and other segments. The sum of b is that of a.

    The paper's code brings every image to 224 x 224 pixels for the segmentation. Here nothing is resampled.
    Lengths are parts of the image's side instead (the geometric mean of its sides, in mm if ``spacing`` is given),
    so that they fit every size and voxels need not be cubes; on an image of 224 x 224 pixels all numbers are those
    of the paper's code. Contrast is that between neighbouring voxels: a finer grid has less of it, and larger
    regions. Integrals are by Gauss-Legendre, black and white are those of each channel.

    Args:
        score: ``(C,*S) -> ()``.
        steps: number of gradients for each of the two baselines.
        scales: larger for larger regions. With values of x from -1 to 1, the k of ``graph_segmentation`` is
            ``scale / 255 * minimum / 150``.
        minimum: size of the smallest region, in mm (mm2, mm3) if ``spacing`` is given, else in voxels; by default
            that of a cube with an 18th of the image's side. Segments that add less than a third of it are left out.
        reach: how far each segment is grown, in mm if ``spacing`` is given, else in voxels; by default a 45th of
            the image's side.
        spacing: mm per voxel, one per spatial axis.

    Returns:
        ``explain(x) -> (1,*S)``, signed.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0., 0., 0., 1., 1., 1.]])
        >>> w = torch.tensor([[0., 0., 0., 1., 3., 8.]])
        >>> xrai(lambda x: (w * x).sum(), steps=1, minimum=3, reach=0)(x).tolist()
        [[0.0, 0.0, 0.0, 2.0, 2.0, 2.0]]

    Reference:
        Kapishnikov, Bolukbasi, Viegas, Terry 2019, algorithm 1, arXiv:1906.02825.
    """
    slope = gradient(score)
    t, w = nodes_and_weights("gauss-legendre", steps)
    if not isinstance(scales, Sequence) or not scales:
        got, advice = check.describe(scales), "The paper takes 50, 100, 150, 250, 500 and 1200"
        raise check.refused("xrai", "a sequence of scales", got, advice)
    for name, given in (("minimum", minimum), ("reach", reach), *(("every scale", k) for k in scales)):
        if given is not None:
            check.non_negative("xrai", name, given)

    def integrated(x: Tensor, baseline: Tensor) -> Tensor:
        line, nodes, weights = x - baseline, x.new_tensor(t), x.new_tensor(w)
        return line * stream.integral(lambda t: slope(baseline + t * line), nodes, weights, label="xrai")

    def explain(x: Tensor) -> Tensor:
        spatial.image("xrai", "x", x)
        voxel = segmentation.voxel_size("xrai", spacing, x.ndim - 1)
        volume = math.prod(voxel)
        side = (x[0].numel() * volume) ** (1 / len(voxel))
        smallest = (math.sqrt(_MINIMUM) * side / _SIDE) ** len(voxel) if minimum is None else minimum
        wide = x.detach().to(torch.float64)
        low, high = wide.amin(), wide.amax()
        found = segmentation.graph_segmentation(
            (wide - low) * (2 / (high - low).clamp(min=1e-30)),
            [scale / _UNIT * smallest / _MINIMUM for scale in scales],
            spacing=voxel,
            sigma=_SIGMA * volume ** (1 / len(voxel)),
            minimum=smallest,
        )
        both = integrated(x, baselines.black(x)) + integrated(x, baselines.white(x))
        a = (both / 2).amax(0, keepdim=True)
        rank = segmentation.ranked(
            a.detach()[0],
            found,
            reach=_REACH * side / _SIDE if reach is None else reach,
            least=max(1, math.ceil(smallest / volume * _LEAST / _MINIMUM)),
            spacing=voxel,
        )
        return segmentation.averaged(a, rank)

    return explain
