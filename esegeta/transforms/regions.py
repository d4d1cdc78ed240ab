"""An explanation by regions."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esegeta import segmentation, spatial
from esegeta._registry import transform
from esegeta._types import Explain
from esegeta.engine import check
from esegeta.spatial import Spacing

Segments = Tensor | Sequence[Tensor]


def _thirds(x: Tensor) -> Tensor:
    """Three bands and two halves of any grid, overlapping."""
    n = x[0].numel()
    place = torch.arange(n, device=x.device).reshape(x.shape[1:])
    return torch.stack([place * 3 // n, place * 2 // n])


@transform(
    preserves=(
        "completeness",
        "implementation_invariance",
        "scale_of_output",
        "class_sensitivity",
        "continuity",
    ),
    example={"segments": _thirds},
    family="regions",
    paper="Kapishnikov, Bolukbasi, Viegas, Terry 2019, arXiv:1906.02825",
)
def regions(
    explain: Explain,
    segments: Segments | Callable[[Tensor], Segments],
    *,
    reach: float | int = 0.0,
    least: int = 1,
    spacing: Spacing | None = None,
) -> Explain:
    r"""Average an explanation in each of the regions where it is densest, found one after another (XRAI).

    .. math:: b_v = \frac{1}{|R_k|} \sum_{u \in R_k} a_u \quad (v \in R_k), \qquad R_k = s_k \setminus M_k

    where :math:`s_k` is the segment with the largest mean of a over what is not in :math:`M_k` yet, all segments
    before it. Segments may overlap: give several scales, and regions of the best scale are found. What no segment
    covers is the last region. The sum stays what it was, in every channel up to rounding; channels share regions,
    which are those of their sum.

    Signs stay: regions against the score come last. For regions by size alone explain with
    ``absolute(explain)``, for the largest channel with ``reduce_channels(explain, by="max_abs")``. The choice is
    a decision: near ties, small changes of the map change the regions. Within one choice the map is linear in a
    and has its derivative.

    Args:
        explain: ``(x, *refs) -> like x``, or a map ``(1,*S)`` on the grid of the segments.
        segments: a label map (\*S); a stack or a list of those, or of masks; or a function of x that returns any
            of these, such as ``lambda x: segmentation.slic(x, 100)``.
        reach: how far each segment is grown first, in mm if ``spacing`` is given, else in voxels.
        least: segments that would add fewer voxels are left out.
        spacing: mm per voxel, one per spatial axis.

    Returns:
        The same arrow.

    Example:
        >>> import torch, esegeta as eg
        >>> w = torch.tensor([[1., 3., 5., 7.]])
        >>> halves = torch.tensor([0, 0, 1, 1])
        >>> regions(eg.gradient(lambda x: (w * x).sum()), halves)(torch.ones(1, 4)).tolist()
        [[2.0, 2.0, 6.0, 6.0]]

    Reference:
        Kapishnikov, Bolukbasi, Viegas, Terry 2019, algorithm 1, arXiv:1906.02825.
    """
    name = "regions"
    check.non_negative(name, "reach", reach)
    check.positive_count(name, "least", least)
    if not (callable(segments) or isinstance(segments, (Tensor, list, tuple))):
        expected, advice = "segments, or a function that makes them", "Pass a label map (*S) of integers"
        raise check.refused_type(name, expected, check.describe(segments), advice)

    @functools.wraps(explain)
    def by_regions(x: Tensor, *refs: Tensor, **extra: int | Tensor) -> Tensor:
        a = explain(x, *refs, **extra)
        spatial.image(name, "an explanation", a)
        found = segments(x) if callable(segments) else segments
        density = a.detach().to(torch.float64).sum(0)
        rank = segmentation.ranked(density, found, reach=reach, least=least, spacing=spacing)
        return segmentation.averaged(a, rank)

    return by_regions
