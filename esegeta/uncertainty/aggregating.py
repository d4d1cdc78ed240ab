"""From a map of uncertainty to one number, for an image or a part of it: a choice of its own, not part of the map.

Every function takes a map (\\*S), or one of one channel (1,\\*S), and gives numbers. Which of them tells most about
errors differs from task to task: compare them with ``selection.aurc`` over images.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta import spatial
from esegeta._registry import uncertainty
from esegeta.engine import check

_PAPER = "Kahl et al. 2024, arXiv:2401.08501"


def _map(where: str, values: object) -> Tensor:
    values = check.floating(where, "the map", values)
    if values.ndim > 1 and values.shape[0] == 1:
        values = values[0]
    if not 1 <= values.ndim <= 3:
        advice = "Choose a channel: map[1]"
        raise check.refused(where, "a map (*S) or (1,*S)", check.describe(values), advice)
    return values


def _mask(where: str, mask: object, values: Tensor) -> Tensor:
    mask = check.tensor(where, "mask", mask)
    if mask.dtype != torch.bool:
        raise check.refused_type(where, "a boolean mask", check.describe(mask), "Pass for example mask > 0")
    if mask.shape != values.shape:
        got, advice = check.describe(mask), "Resample it to the map"
        raise check.refused(where, f"a mask of the shape {tuple(values.shape)} of the map", got, advice)
    return mask


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean where the mask is, NaN if that is nowhere: there is nothing to be uncertain of."""
    return torch.where(mask, values, 0).sum() / mask.sum()


@uncertainty(family="aggregations", paper=_PAPER, leads=1)
def image_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Average a map over the image, or over a mask such as the brain or the prediction.

    Most voxels of an image are far from any object, so the mean over all of them says more about the size of an
    object than about doubt.

    Args:
        values: the map, (\*S) or (1,\*S).
        mask: boolean, (\*S).

    Returns:
        (\*S) -> (); NaN for an empty mask.

    Example:
        >>> image_mean(torch.tensor([1., 2., 6.])).item()
        3.0
    """
    values = _map("image_mean", values)
    if mask is None:
        return values.mean()
    return _mean(values, _mask("image_mean", mask, values))


@uncertainty(family="aggregations", paper=_PAPER, leads=1)
def component_means(values: Tensor, mask: Tensor) -> Tensor:
    r"""Average a map over every face-connected part of a mask: one number for each lesion, the largest part first.

    Args:
        values: the map, (\*S) or (1,\*S).
        mask: boolean, (\*S), commonly the prediction.

    Returns:
        (\*S) -> (n,); empty for an empty mask.

    Example:
        >>> component_means(torch.tensor([1., 5., 2., 4.]), torch.tensor([True, False, True, True])).tolist()
        [3.0, 1.0]
    """
    here = "component_means"
    values = _map(here, values)
    labels = torch.from_numpy(_parts(_mask(here, mask, values).cpu().numpy())).to(values.device).flatten()
    sizes = torch.bincount(labels)
    sums = torch.zeros(len(sizes), dtype=values.dtype, device=values.device)
    sums = sums.scatter_add(0, labels, values.flatten())
    order = sizes[1:].argsort(descending=True, stable=True) + 1
    return (sums / sizes)[order]


def _parts(mask: Any) -> Any:
    """Number the face-connected parts of a mask from 1, with 0 outside."""
    from scipy import ndimage

    return ndimage.label(mask)[0].astype(np.int64)


@uncertainty(family="aggregations", paper=_PAPER, example={"voxels": 1}, leads=2)
def boundary_excluded(values: Tensor, mask: Tensor, voxels: int = 1) -> Tensor:
    r"""Average a map over all but the boundary of a mask, where every network is in doubt.

    Args:
        values: the map, (\*S) or (1,\*S).
        mask: boolean, (\*S), commonly the prediction.
        voxels: how far from the boundary a voxel has to be, on either side of it.

    Returns:
        (\*S) -> (); NaN if nothing is left.

    Example:
        >>> mask = torch.tensor([True, True, True, False, False, False])
        >>> boundary_excluded(torch.tensor([1., 1., 9., 9., 1., 1.]), mask).item()
        1.0
    """
    here = "boundary_excluded"
    values = _map(here, values)
    edge = spatial.boundary(_mask(here, mask, values))
    for _ in range(check.positive_count(here, "voxels", voxels) - 1):
        edge = spatial.dilate(edge)
    return _mean(values, ~edge)


@uncertainty(family="aggregations", paper=_PAPER, example={"fraction": 0.1}, leads=1)
def top_fraction(values: Tensor, fraction: float | int = 0.01) -> Tensor:
    r"""Average the largest values of a map: where doubt is, however small the place.

    Args:
        values: the map, (\*S) or (1,\*S).
        fraction: of the voxels, above 0; at least one voxel.

    Returns:
        (\*S) -> ().

    Example:
        >>> top_fraction(torch.tensor([1., 2., 6., 4.]), 0.5).item()
        5.0
    """
    here = "top_fraction"
    values = _map(here, values).flatten()
    return values.topk(most_of(here, fraction, len(values))).values.mean()


def most_of(where: str, fraction: object, count: int) -> int:
    """Return how many are that fraction of so many, at least one.

    >>> most_of("top_fraction", 0.1, 25)
    2
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise check.refused(where, "a fraction above 0, at most 1", repr(fraction), "0.01 is usual")
    return max(1, int(fraction * count))
