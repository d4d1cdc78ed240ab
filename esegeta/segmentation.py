"""Images cut into parts: supervoxels, graph segmentation, and the order of parts by what lies in them.

A **label map** (\\*S) numbers the parts of a grid by 0, 1, ... n-1; voxels with -1 belong to none. Segmenting looks
at values and decides: it has no derivative, and inside of ``vmap`` it goes through the examples one by one. One
input has one answer, whatever stands beside it.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from esegeta import spatial
from esegeta._registry import segmentation
from esegeta.engine import check, levels
from esegeta.engine.folded import fold
from esegeta.spatial import Spacing

Labels = Integer[Tensor, "..."]
Array = np.ndarray

_BLOCK = 1 << 14  # edges that are looked at together


@segmentation(family="compact", paper="Achanta et al., IEEE PAMI 34, 2012", example={"count": 2})
def slic(
    x: Float[Tensor, "..."],
    count: int,
    *,
    spacing: Spacing | None = None,
    compactness: float | int = 1.0,
    iterations: int = 10,
    mask: Bool[Tensor, "..."] | None = None,
) -> Labels:
    r"""Cut an image into supervoxels: compact parts of about equal size that follow its edges.

    .. math:: D(v, k)^2 = \frac{1}{C} \sum_c \left( \frac{x_{c,v} - \mu_{c,k}}{m \, \sigma_c} \right)^2
              + \frac{\|p_v - q_k\|^2}{s^2}

    Every voxel goes to the nearest of the centres around it, and every centre to the mean of its voxels, in turn,
    from a regular grid of cells with side s. Distances of places are in mm, so that parts are as long as wide on
    voxels that are not cubes; those of values are in standard deviations :math:`\sigma_c` of each channel, so
    that the unit of the image does not matter. Fragments smaller than a quarter of a cell join the neighbour
    with which they share the longest border: every part is connected.

    Args:
        x: the image (C,\*S) with one to three spatial axes.
        count: about how many parts. The number of cells is as near to it as whole numbers of them along each
            axis allow; a part that loses all of its voxels to others is gone.
        spacing: mm per voxel, one per spatial axis.
        compactness: m, the standard deviations of value that weigh as much as the side of a cell. Large for
            cubes, small for parts that follow every edge.
        iterations: how often centres move.
        mask: boolean, (\*S); what lies outside is -1.

    Returns:
        (C,\*S) -> (\*S), int64, numbered in the order of the grid.

    Example:
        The border moves from the middle of the grid to the edge of the image.

        >>> slic(torch.tensor([[0., 0., 0., 0., 0., 9., 9., 9.]]), 2).tolist()
        [0, 0, 0, 0, 0, 1, 1, 1]

    Reference: Achanta et al., SLIC superpixels, IEEE PAMI 34, 2012.
    """
    name = "slic"
    _image(name, x)
    voxel = voxel_size(name, spacing, x.ndim - 1)
    check.positive_count(name, "count", count)
    check.positive_count(name, "iterations", iterations, 0)
    if not check.non_negative(name, "compactness", compactness):
        advice = "A small number lets parts follow every edge"
        raise check.refused(name, "compactness > 0", repr(compactness), advice)
    if mask is not None:
        _on_grid(name, "mask", mask, x)
        if mask.dtype != torch.bool:
            got = check.describe(mask)
            raise check.refused_type(name, "a boolean mask", got, "Pass for example mask > 0")

    def work(x: Tensor, *masks: Tensor) -> Array:
        values = _array(x)
        inside = _array(masks[0]) if masks else np.ones(values.shape[1:], dtype=bool)
        if np.count_nonzero(inside) < count:
            got = f"{count} parts of {np.count_nonzero(inside)} voxels"
            advice = "Ask for fewer, or widen the mask"
            raise check.refused(name, "at most as many parts as voxels", got, advice)
        return _slic(values, inside, count, voxel, float(compactness), iterations)

    return _decided(name, work, x[0].shape, x, *(() if mask is None else (mask,)))


@segmentation(family="graph", paper="Felzenszwalb, Huttenlocher, IJCV 59, 2004", example={"scale": 1.0})
def graph_segmentation(
    x: Float[Tensor, "..."],
    scale: float | int | Sequence[float | int],
    *,
    spacing: Spacing | None = None,
    sigma: float | int = 0.8,
    minimum: float | int = 0.0,
) -> Labels:
    r"""Cut an image into parts between which it changes more than within them.

    .. math:: A, B \text{ join} \iff w(e) \le \min\left( I(A) + \frac{k}{|A|},\; I(B) + \frac{k}{|B|} \right)

    for each edge e between two neighbours, in order of its weight: the Euclidean distance of the two values. I
    is the weight of the heaviest edge that a part was joined by, :math:`|A|` its size. Neighbours share a face, an
    edge or a corner (2, 8 or 26 of them). In the end parts below the minimum join a neighbour, lightest edge
    first. Exactly the algorithm of the paper. Equal weights go in a fixed order, one direction after another.

    Args:
        x: the image (C,\*S) with one to three spatial axes. Its channels share one unit.
        scale: k, in units of x times voxels, or times mm (mm2, mm3 in 2-D and 3-D) if spacing is given: larger
            for larger parts. Several at once give one map each and share the sorting of the edges. The number
            that scikit-image calls ``scale`` is 255 k.
        spacing: mm per voxel, one per spatial axis.
        sigma: standard deviation of the Gaussian that the image is smoothed by first, in mm if spacing is given,
            else in voxels.
        minimum: the smallest part, in voxels, or in mm (mm2, mm3) if spacing is given.

    Returns:
        (C,\*S) -> (\*S), int64, numbered by first appearance; (n,\*S) for n scales.

    Example:
        >>> graph_segmentation(torch.tensor([[0., 0., 1., 5., 5., 6.]]), 3.0, sigma=0.0).tolist()
        [0, 0, 0, 1, 1, 1]

    Reference: Felzenszwalb and Huttenlocher, Efficient graph-based image segmentation, IJCV 59, 2004.
    """
    name = "graph_segmentation"
    _image(name, x)
    voxel = voxel_size(name, spacing, x.ndim - 1)
    several = isinstance(scale, Sequence) and not isinstance(scale, str)
    scales: Sequence[Any] = scale if several else [scale]  # type: ignore[assignment]
    if not scales:
        raise check.refused(name, "at least one scale", "none", "Pass for example 1.0")
    ks = [check.non_negative(name, "scale", k) / math.prod(voxel) for k in scales]
    least = math.ceil(check.non_negative(name, "minimum", minimum) / math.prod(voxel) - 1e-9)
    smooth = x.detach().to(torch.float64)
    if check.non_negative(name, "sigma", sigma):  # a blur by zero would round, and equal values would differ
        smooth = spatial.blur(smooth, sigma, voxel)

    def work(x: Tensor) -> Array:
        values = _array(x)
        grid = values.shape[1:]
        edges = _edges(values)
        maps = [_numbered(_joined(math.prod(grid), edges, k, least)).reshape(grid) for k in ks]
        return np.stack(maps) if several else maps[0]

    shape = x[0].shape
    return _decided(name, work, torch.Size([len(ks), *shape]) if several else shape, smooth)


def relabelled(labels: Labels) -> Labels:
    r"""Number parts 0, 1, ... n-1 in the order of their labels; negative labels become -1.

    Args:
        labels: whole numbers, (\*S) or of any other shape.

    Returns:
        (\*S) -> (\*S), int64.

    Example:
        >>> relabelled(torch.tensor([7, 7, 3, -2, 40])).tolist()
        [1, 1, 0, -1, 2]
    """
    _whole("relabelled", "labels", labels)
    return _decided("relabelled", lambda one: _relabelled(_array(one))[0], labels.shape, labels)


def dilated(
    mask: Bool[Tensor, "..."], radius: float | int, *, spacing: Spacing | None = None
) -> Bool[Tensor, "..."]:
    r"""Return everything within a distance of a mask: its dilation by a ball.

    .. math:: \{v : \min_{u \in M} \|p_v - p_u\| \le r\}

    Args:
        mask: boolean, (\*S) with one to three axes.
        radius: r, in mm if spacing is given, else in voxels.
        spacing: mm per voxel, one per spatial axis.

    Returns:
        (\*S) -> (\*S), boolean.

    Example:
        >>> mask = torch.zeros(5, 5, dtype=torch.bool)
        >>> mask[2, 2] = True
        >>> dilated(mask, 1).sum().item(), dilated(mask, 1.5).sum().item()
        (5, 9)
        >>> dilated(mask, 1, spacing=(2.0, 1.0)).sum().item()
        3

    Reference: Serra, Image Analysis and Mathematical Morphology, 1982.
    """
    name = "dilated"
    check.tensor(name, "mask", mask)
    if mask.dtype != torch.bool or not 1 <= mask.ndim <= 3:
        expected, advice = "a boolean mask (*S) with one to three axes", "Pass for example mask > 0"
        raise check.refused_type(name, expected, check.describe(mask), advice)
    voxel, r = voxel_size(name, spacing, mask.ndim), check.non_negative(name, "radius", radius)
    near = _decided(name, lambda one: _near(_array(one), r, voxel).astype(np.int64), mask.shape, mask)
    return near > 0


def ranked(
    density: Float[Tensor, "..."],
    segments: Labels | Bool[Tensor, "..."] | Sequence[Tensor],
    *,
    reach: float | int = 0.0,
    least: int = 1,
    spacing: Spacing | None = None,
) -> Labels:
    r"""Rank the parts of one or many segmentations in the order in which a greedy choice takes them.

    .. math:: s_k = \arg\max_s \frac{1}{|s \setminus M_k|} \sum_{v \in s \setminus M_k} a_v, \qquad
              M_{k+1} = M_k \cup s_k

    The voxels :math:`s_k \setminus M_k` that a part adds get its rank k. Parts may overlap: coarse and fine ones
    of several maps, or all of them grown by a reach. Of equal means the first goes first. Sums and counts are
    kept up to date by what each choice covers, so that the work is that of listing all voxels of all parts once.

    Args:
        density: a, what is large where it matters, (\*S).
        segments: a label map (\*S), masks or maps (n,\*S), or a list of those. Gaps between labels do no harm.
        reach: how far each part is grown before the choice, in mm if spacing is given, else in voxels.
        least: parts that would add fewer voxels are left out.
        spacing: mm per voxel, one per spatial axis.

    Returns:
        (\*S) -> (\*S), int64: 0 for what was chosen first; what no part covers comes last.

    Example:
        >>> a = torch.tensor([1., 1., 5., 5., 0.])
        >>> ranked(a, torch.tensor([[0, 0, 1, 1, -1], [0, 0, 0, 0, -1]])).tolist()
        [1, 1, 0, 0, 2]

    Reference: Kapishnikov, Bolukbasi, Viegas and Terry, XRAI, algorithm 1, arXiv:1906.02825.
    """
    name = "ranked"
    check.floating(name, "density", density)
    if not 1 <= density.ndim <= 3 or not density.numel():
        expected, advice = "a density (*S) with one to three axes", "Reduce the channels first"
        raise check.refused(name, expected, check.describe(density), advice)
    check.finite(name, "density", density, "Repair it, e.g. with torch.nan_to_num")
    voxel, r = voxel_size(name, spacing, density.ndim), check.non_negative(name, "reach", reach)
    check.positive_count(name, "least", least)
    maps = [m for given in _listed(name, segments) for m in _maps(name, given, density)]

    def work(a: Tensor, maps: Tensor) -> Array:
        parts = _parts(_array(maps), r, voxel)
        return _greedy(_array(a).astype(np.float64).ravel(), parts, least).reshape(a.shape)

    return _decided(name, work, density.shape, density, torch.stack(maps))


def averaged(a: Float[Tensor, "..."], labels: Labels) -> Float[Tensor, "..."]:
    r"""Give each voxel the mean of its part, channel by channel: sums over parts stay what they are.

    .. math:: b_{c,v} = \frac{1}{|s(v)|} \sum_{u \in s(v)} a_{c,u}

    Linear in a, with a derivative. Voxels of no part (-1) are one more part.

    Args:
        a: (C,\*S), for example a map.
        labels: a label map (\*S).

    Returns:
        (C,\*S) -> (C,\*S).

    Example:
        >>> averaged(torch.tensor([[1., 3., 5.]]), torch.tensor([0, 0, 1])).tolist()
        [[2.0, 2.0, 5.0]]
    """
    name = "averaged"
    spatial.image(name, "a", a)
    _whole(name, "labels", _on_grid(name, "labels", labels, a))
    n = labels.numel()
    if levels.true_anywhere((labels < -1) | (labels >= n)):
        got = "labels outside"
        raise check.refused(name, f"labels from -1 to {n - 1}", got, "Use relabelled(labels)")
    part = (labels.flatten() + 1).to(torch.int64)
    # In double precision: a part may be half a volume, whose sum a float would round at every voxel.
    wide = a.flatten(1).to(torch.float64)
    sizes = wide.new_zeros(n + 1).scatter_add(0, part, wide.new_ones(n))
    index = part.expand(len(wide), n)
    sums = wide.new_zeros(len(wide), n + 1).scatter_add(1, index, wide)
    return (sums / sizes.clamp(min=1)).gather(1, index).reshape(a.shape).to(a.dtype)


def voxel_size(where: str, spacing: Spacing | None, axes: int) -> tuple[float, ...]:
    """Return the spacing as numbers, 1 per axis where it is not given; refuse what does not fit the axes.

    >>> voxel_size("demo", None, 2), voxel_size("demo", torch.tensor([1.0, 3.0]), 2)
    ((1.0, 1.0), (1.0, 3.0))
    """
    lengths = [1.0] * axes if spacing is None else spacing
    check.spacing(where, lengths, axes)
    return tuple(map(float, lengths))


# -- what comes in, and where the work is done -----------------------------------------------------------------


def _image(where: str, x: Tensor) -> None:
    spatial.image(where, "x", x)
    check.finite(where, "x", x, "Repair the image, e.g. with torch.nan_to_num")


def _whole(where: str, name: str, value: object) -> Tensor:
    value = check.tensor(where, name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        got, advice = check.describe(value), f"Convert them with {name}.long()"
        raise check.refused_type(where, f"{name} of an integer dtype", got, advice)
    return value


def _on_grid(where: str, name: str, value: object, x: Tensor) -> Tensor:
    value = check.tensor(where, name, value)
    if value.shape != x.shape[1:]:
        expected, advice = f"{name} on the grid {tuple(x.shape[1:])}", "Bring both to one grid first"
        raise check.refused(where, expected, check.describe(value), advice)
    return value


def _listed(where: str, segments: object) -> Sequence[Any]:
    listed = [segments] if isinstance(segments, Tensor) else segments
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        expected, advice = "a label map, or a list of them", "Make one with esegeta.segmentation.slic"
        raise check.refused_type(where, expected, check.describe(segments), advice)
    return listed


def _maps(where: str, given: object, density: Tensor) -> list[Tensor]:
    """The label maps of one entry: itself, or the ones that are stacked in it."""
    given = check.tensor(where, "segments", given)
    labels = torch.where(given, 0, -1) if given.dtype == torch.bool else _whole(where, "segments", given)
    one = labels.shape == density.shape
    if not one and (labels.shape[1:] != density.shape or not len(labels)):
        expected = f"segments on the grid of the map {tuple(density.shape)}, or a stack of such"
        advice = "Bring both to one grid first: a map of a layer by esegeta.upsample"
        raise check.refused(where, expected, check.describe(given), advice)
    return [labels.to(torch.int64)] if one else list(labels.to(torch.int64).unbind())


def _array(x: Tensor) -> Array:
    x = x.detach().cpu()
    found: Array = (x.double() if x.is_floating_point() else x).numpy()
    return found


def _decided(name: str, work: Callable[..., Array], shape: torch.Size, *tensors: Tensor) -> Tensor:
    """What is decided by looking at values, one example after another; it has no derivative."""

    def each(*many: Tensor) -> tuple[Tensor]:
        if levels.fake(many[0]):  # a dry run
            return (torch.zeros((len(many[0]), *shape), dtype=torch.int64, device=many[0].device),)
        found = np.stack([work(*one) for one in zip(*many, strict=True)])
        return (torch.as_tensor(found, dtype=torch.int64, device=many[0].device),)

    return fold(each, name)(*[t.detach() for t in tensors])[0]


def _relabelled(labels: Array) -> tuple[Array, int]:
    """Labels without gaps, in order, and how many there are."""
    inside = labels >= 0
    flat = labels[inside]
    out = np.full(labels.shape, -1, dtype=np.int64)
    if not flat.size:
        return out, 0
    if int(flat.max()) < 4 * labels.size:  # a table instead of a sort
        there = np.bincount(flat) > 0
        out[inside] = (np.cumsum(there) - 1)[flat]
        return out, int(there.sum())
    values, out[inside] = np.unique(flat, return_inverse=True)
    return out, len(values)


def _numbered(parts: Array) -> Array:
    """Parts named by any of their voxels, numbered in the order in which they appear."""
    first = np.zeros(len(parts), dtype=np.int64)
    first[parts[::-1]] = np.arange(len(parts))[::-1]  # of several writes the last one stays
    return _relabelled(first[parts])[0]


# -- supervoxels -----------------------------------------------------------------------------------------------


def _slic(
    values: Array, inside: Array, count: int, voxel: tuple[float, ...], compactness: float, iterations: int
) -> Array:
    axes = range(inside.ndim)
    where = np.flatnonzero(inside)
    spread = np.stack([v[inside].std() for v in values]) * compactness * math.sqrt(len(values))
    # What is constant up to rounding says nothing.
    flat = spread <= 1e-12 * np.abs(values.reshape(len(values), -1)).max(1)
    scaled = (values.reshape(len(values), -1) / np.where(flat, np.inf, spread)[:, None]).astype(np.float32)
    scaled = scaled.reshape(values.shape)

    box = [np.flatnonzero(inside.any(tuple(b for b in axes if b != a))) for a in axes]
    low, size = [int(b[0]) for b in box], [int(b[-1] - b[0]) + 1 for b in box]
    cells = _cells(size, voxel, count * math.prod(size) / len(where))
    step = [n * mm / c for n, mm, c in zip(size, voxel, cells, strict=True)]
    side = math.prod(step) ** (1 / len(step))
    place = [(np.arange(inside.shape[a]) * voxel[a] / side).astype(np.float32) for a in axes]

    # The cells with most voxels become the first parts; in a box that is full, all of them.
    index = [
        np.clip((np.arange(inside.shape[a]) - low[a]) * cells[a] // size[a], 0, cells[a] - 1) for a in axes
    ]
    cell = np.ravel_multi_index(np.ix_(*index), cells).ravel()
    filled = np.bincount(cell[where], minlength=math.prod(cells))
    most = len(filled) if inside.all() else count
    chosen = np.sort(np.argsort(-filled, kind="stable")[:most])
    chosen = chosen[filled[chosen] > 0]
    part = np.full(len(filled), -1, dtype=np.int64)
    part[chosen] = np.arange(len(chosen))
    labels = np.where(inside, part[cell].reshape(inside.shape), -1).astype(np.int32)

    features = [v.ravel()[where] for v in scaled]
    features += [np.broadcast_to(p, inside.shape).ravel()[where] for p in np.ix_(*place)]
    centres = np.zeros((len(features), len(chosen)))
    for _ in range(iterations):
        centres = _centres(labels.ravel()[where], features, centres)
        labels = _nearest(labels, scaled, inside, place, centres, [s / side for s in step])
    if (labels[inside] < 0).any():  # voxels around which no centre lies
        index = scipy.ndimage.distance_transform_edt(
            labels < 0, sampling=voxel, return_distances=False, return_indices=True
        )
        labels = np.where(inside, labels[tuple(index)], -1)
    return _relabelled(_connected(labels, len(chosen)))[0]


def _cells(size: list[int], voxel: tuple[float, ...], count: float) -> tuple[int, ...]:
    """How many cells along each axis: nearly as long as wide, and together nearly ``count``."""
    lengths = [n * mm for n, mm in zip(size, voxel, strict=True)]
    # An axis that is thinner than a cell has one cell; what it does not divide, the others have to.
    free, ideal = list(range(len(size))), [1.0] * len(size)
    while free:
        side = (math.prod(lengths[a] for a in free) / count) ** (1 / len(free))
        thin = [a for a in free if lengths[a] < side]
        if not thin:
            for a in free:
                ideal[a] = min(lengths[a] / side, size[a])
            break
        free = [a for a in free if a not in thin]
    choices = [
        sorted({max(1, math.floor(i)), min(n, math.ceil(i))}) for i, n in zip(ideal, size, strict=True)
    ]

    def off(cells: tuple[int, ...]) -> tuple[float, float]:
        sides = [length / c for length, c in zip(lengths, cells, strict=True)]
        return round(abs(math.log(math.prod(cells) / count)), 9), max(sides) / min(sides)

    return min(itertools.product(*choices), key=off)


def _centres(labels: Array, features: list[Array], before: Array) -> Array:
    """The mean of each part's values and places; a part that lost all voxels stays where it was."""
    known = labels >= 0
    if known.all():
        own, seen = labels, features
    else:
        own, seen = labels[known], [f[known] for f in features]
    sizes = np.bincount(own, minlength=before.shape[1])
    sums = np.stack([np.bincount(own, weights=f, minlength=before.shape[1]) for f in seen])
    return np.where(sizes > 0, sums / np.maximum(sizes, 1), before)


def _nearest(
    labels: Array, values: Array, inside: Array, place: list[Array], centres: Array, step: list[float]
) -> Array:
    """The nearest centre of each voxel, among those no further than one cell along any axis."""
    best = np.full(inside.shape, np.inf, dtype=np.float32)
    labels = labels.copy()
    for k, centre in enumerate(centres.T.astype(np.float32)):
        middle = centre[len(values) :]
        around = tuple(
            slice(*np.searchsorted(p, [m - s, m + s])) for p, m, s in zip(place, middle, step, strict=True)
        )
        distance = sum(
            np.square(p[here] - m) for p, here, m in zip(np.ix_(*place), _open(around), middle, strict=True)
        )
        for v, mean in zip(values, centre, strict=False):
            gap = v[around] - mean
            distance = distance + np.square(gap, out=gap)
        closer = distance < best[around]
        np.copyto(best[around], distance, where=closer)
        np.copyto(labels[around], k, where=closer)
    labels[~inside] = -1
    return labels


def _open(around: tuple[slice, ...]) -> list[tuple[slice, ...]]:
    """For each axis of an open mesh its own slice."""
    whole = slice(None)
    return [tuple(s if a == b else whole for b in range(len(around))) for a, s in enumerate(around)]


def _connected(labels: Array, most: int) -> Array:
    """The ``most`` largest connected pieces; the others join the neighbour with the longest common border."""
    pieces = np.full(labels.shape, -1, dtype=np.int64)
    count = 0
    for k, box in enumerate(scipy.ndimage.find_objects(labels + 1)):
        if box is not None:
            found, n = scipy.ndimage.label(labels[box] == k)
            np.copyto(pieces[box], found + (count - 1), where=found > 0)
            count += n
    sizes = np.bincount(pieces[pieces >= 0], minlength=count)
    target = np.full(count, -1)
    kept = np.argsort(-sizes, kind="stable")[:most]
    target[kept] = kept
    left, right, border = _borders(pieces, target < 0, count)
    while (target < 0).any():
        reached = (target[left] < 0) & (target[right] >= 0)
        if not reached.any():  # an island: its largest piece stays
            alone = np.where(target < 0, sizes, -1).argmax()
            target[alone] = alone
            continue
        shared = scipy.sparse.coo_array(
            (border[reached], (left[reached], target[right[reached]])), shape=(count, count)
        ).tocsr()
        shared.sum_duplicates()
        for piece in np.flatnonzero(np.diff(shared.indptr)):
            row = slice(shared.indptr[piece], shared.indptr[piece + 1])
            target[piece] = shared.indices[row][shared.data[row].argmax()]
    return np.where(pieces >= 0, target[pieces], -1)


def _borders(pieces: Array, small: Array, count: int) -> tuple[Array, Array, Array]:
    """Small pieces, their neighbours, and how many faces they share."""
    pairs = []
    for axis, n in enumerate(pieces.shape):
        here, there = (pieces.take(range(lo, n - 1 + lo), axis).ravel() for lo in (0, 1))
        apart = (here != there) & (here >= 0) & (there >= 0) & (small[here] | small[there])
        pairs += [(here[apart], there[apart]), (there[apart], here[apart])]
    left, right = (np.concatenate(side) for side in zip(*pairs, strict=True))
    keys, border = np.unique(left * count + right, return_counts=True)
    return keys // count, keys % count, border


# -- graph segmentation ----------------------------------------------------------------------------------------

Edges = tuple[Array, Array, Array]


def _edges(values: Array) -> Edges:
    """Weight and both ends of every edge between neighbours, lightest first."""
    grid = values.shape[1:]
    number = np.arange(math.prod(grid), dtype=np.int32).reshape(grid)
    found = []
    for offset in itertools.product((-1, 0, 1), repeat=len(grid)):
        if offset <= (0,) * len(grid):  # each edge once
            continue
        here = tuple(slice(max(0, -o), min(n, n - o)) for o, n in zip(offset, grid, strict=True))
        there = tuple(slice(max(0, o), min(n, n + o)) for o, n in zip(offset, grid, strict=True))
        steps = values[(slice(None), *there)] - values[(slice(None), *here)]
        weight = np.abs(steps[0]) if len(steps) == 1 else np.sqrt(np.square(steps).sum(0))
        found.append((weight.ravel(), number[here].ravel(), number[there].ravel()))
    weight, one, other = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(weight, kind="stable")
    return weight[order], one[order], other[order]


class _Forest(NamedTuple):
    """Parts as trees of voxels. Of a part, size and limit stand at the root: the weight up to which it is joined."""

    parent: Array
    size: Array
    limit: Array
    slot: Array  # room for numbers

    def roots(self, voxels: Array) -> Array:
        """The voxel that stands for the part of each."""
        root = self.parent[voxels]
        if not np.array_equal(above := self.parent[root], root):
            while not np.array_equal(above := self.parent[root := above], root):
                pass
            self.parent[voxels] = root
        return root


def _joined(count: int, edges: Edges, k: float, least: int) -> Array:
    """Each voxel with the voxel that stands for its part.

    The loop of the paper is over all edges, one after another. Most of them decide nothing: both ends are in one
    part, or one of the parts was refused a lighter edge, after which it never grows (lemma 1 of the paper). Those
    are found for a block of edges at a time; what remains goes through the loop, in order.
    """
    voxels = np.arange(count, dtype=np.int32)  # what does not fit in 31 bits does not fit in memory as edges
    forest = _Forest(voxels.copy(), np.ones_like(voxels), np.full(count, float(k)), np.zeros_like(voxels))
    weight, one, other = edges
    for start in range(0, len(weight), _BLOCK):
        now = slice(start, start + _BLOCK)
        w, a, b = weight[now], forest.roots(one[now]), forest.roots(other[now])
        apart = np.flatnonzero(a != b)
        live = apart[np.minimum(forest.limit[a[apart]], forest.limit[b[apart]]) >= w[0]]
        _join(forest, w[live], a[live], b[live], k, 0)

    tiny = forest.size[forest.roots(voxels)] < least
    rest = np.flatnonzero(tiny[one] | tiny[other])
    for start in range(0, len(rest), _BLOCK):
        block = rest[start : start + _BLOCK]
        w, a, b = weight[block], forest.roots(one[block]), forest.roots(other[block])
        live = (a != b) & ((forest.size[a] < least) | (forest.size[b] < least))
        _join(forest, w[live], a[live], b[live], k, least)
    return forest.roots(voxels)


def _join(forest: _Forest, w: Array, a: Array, b: Array, k: float, least: int) -> None:
    """Go through edges between parts in order, by their limits or, if ``least`` is given, by their sizes."""
    # Numbers of this block, so that the loop runs on short lists.
    ends = np.concatenate([a, b])
    forest.slot[ends] = np.arange(len(ends))
    own = forest.slot[ends]
    tops, sizes = list(range(len(ends))), forest.size[ends].tolist()
    limits = [-math.inf] * len(ends) if least else forest.limit[ends].tolist()
    for weight, i, j in zip(w.tolist(), own[: len(a)].tolist(), own[len(a) :].tolist(), strict=True):
        while tops[i] != i:
            tops[i] = i = tops[tops[i]]
        while tops[j] != j:
            tops[j] = j = tops[tops[j]]
        if i != j and ((weight <= limits[i] and weight <= limits[j]) or sizes[i] < least or sizes[j] < least):
            if sizes[i] < sizes[j]:
                i, j = j, i
            tops[j] = i
            sizes[i] += sizes[j]
            if not least:
                limits[i] = weight + k / sizes[i]
    local = np.array(tops, dtype=np.int64)
    while not np.array_equal(above := local[local], local):
        local = above
    forest.parent[ends] = ends[local[own]]
    forest.size[ends] = np.array(sizes, dtype=np.int64)[own]
    forest.limit[ends] = np.array(limits)[own]


# -- the greedy choice -----------------------------------------------------------------------------------------


def _near(mask: Array, radius: float, voxel: tuple[float, ...]) -> Array:
    if not mask.any():
        return mask
    # Rounding must not decide about voxels at the very radius.
    distance: Array = scipy.ndimage.distance_transform_edt(~mask, sampling=voxel)
    return distance <= radius * (1 + 1e-9)


def _parts(maps: Array, reach: float, voxel: tuple[float, ...]) -> Any:
    """All parts of all maps as the rows of a sparse matrix with the voxels as columns."""
    grid, n = maps.shape[1:], maps[0].size
    number = np.arange(n, dtype=np.int32).reshape(grid)
    margin = [math.ceil(reach / mm) for mm in voxel]
    rows, indptr = [], [0]
    for labels in maps:
        labels, count = _relabelled(labels)
        if not reach:
            flat = labels.ravel()
            known = np.flatnonzero(flat >= 0)
            found = scipy.sparse.coo_array(
                (np.ones(len(known), dtype=bool), (flat[known], known)), shape=(count, n)
            ).tocsr()
            rows.append(found.indices.astype(np.int32))
            indptr += (found.indptr[1:].astype(np.int64) + indptr[-1]).tolist()
            continue
        for k, box in enumerate(scipy.ndimage.find_objects(labels + 1)):
            around = tuple(slice(max(0, s.start - m), s.stop + m) for s, m in zip(box, margin, strict=True))
            rows.append(number[around][_near(labels[around] == k, reach, voxel)])
            indptr.append(indptr[-1] + len(rows[-1]))
    voxels = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
    return scipy.sparse.csr_array(
        (np.ones(len(voxels), dtype=bool), voxels, np.array(indptr)), shape=(len(indptr) - 1, n)
    )


def _greedy(a: Array, parts: Any, least: int) -> Array:
    """The rank of each voxel."""
    rank = np.full(len(a), -1, dtype=np.int64)
    count = parts.shape[0]
    through = parts.tocsc()  # which parts go through a voxel
    sizes = np.diff(parts.indptr).astype(np.int64)
    sums = np.add.reduceat(np.append(a[parts.indices], 0.0), parts.indptr[:-1]) if count else np.zeros(0)
    for k in range(count + 1):
        mean = np.where(sizes >= least, sums / np.maximum(sizes, 1), -np.inf)
        best = mean.argmax() if count else 0
        if k == count or mean[best] == -np.inf:
            rank[rank < 0] = k
            break
        voxels = parts.indices[parts.indptr[best] : parts.indptr[best + 1]]
        new = voxels[rank[voxels] < 0]
        rank[new] = k
        starts, many = through.indptr[new], np.diff(through.indptr)[new]
        ends = np.cumsum(many)
        touched = through.indices[np.arange(ends[-1]) + np.repeat(starts - ends + many, many)]
        sizes -= np.bincount(touched, minlength=count)
        sums -= np.bincount(touched, weights=np.repeat(a[new], many), minlength=count)
    return rank
