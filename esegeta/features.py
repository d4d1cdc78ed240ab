r"""Features: which parts of an image are present or hidden together.

A perturbation method asks what a score is without a part. Which parts there are is said once, by a function of the
image: ``features.grid(8)``, ``features.channels()``, ``features.labels(atlas)``, ``features.supervoxels(100)``,
``features.windows(8, stride=4)``. The same object serves every method that hides, samples or ranks parts.

With d parts, a coalition is :math:`z \in [0,1]^d`; what is kept of the image is :math:`k(z) \in [0,1]^{C \times S}`,
and the image of the coalition :math:`x_z = k(z)\, x + (1 - k(z))\, x'` for a baseline :math:`x'`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from esegeta import segmentation
from esegeta._registry import features as feature_map
from esegeta.engine import check, levels
from esegeta.models import from_module

Box = tuple[slice, ...]
Spacing = Sequence[float | int]
Lengths = float | int | Sequence[float | int]


@runtime_checkable
class FeatureMap(Protocol):
    """The parts of one image. Tensors are on the grid of the image, one axis of them may be of length one."""

    @property
    def count(self) -> int:
        """The number of parts."""

    def keep(self, z: Tensor, box: Box | None = None) -> Tensor:
        """Return how much of every element (of a box) is kept in the coalition z of shape (count,)."""

    def without(self, j: Tensor, box: Box | None = None) -> Tensor:
        """Return how much of every element (of a box) is kept if all parts but j are present."""

    def spread(self, values: Tensor) -> Tensor:
        """Return one value for each part as a map: at every element the mean over the parts that it is in, or zero.

        NaN wherever the value of one of them is: it has not been computed.
        """

    def box(self, j: int) -> Box:
        """Return the smallest box, over all axes, that holds part j."""


Features = Callable[[Tensor], FeatureMap]


@dataclass(frozen=True)
class Partition:
    """Parts that do not overlap: ``labels`` broadcasts against the image, -1 is what is never hidden."""

    labels: Tensor
    count: int

    def keep(self, z: Tensor, box: Box | None = None) -> Tensor:
        """Return how much of every element (of a box) is kept in the coalition z of shape (count,)."""
        return _read(z, self._within(box), 1.0)

    def without(self, j: Tensor, box: Box | None = None) -> Tensor:
        """Return how much of every element (of a box) is kept if all parts but j are present."""
        return (self._within(box) != j).to(torch.get_default_dtype())

    def spread(self, values: Tensor) -> Tensor:
        """Return one value for each part as a map: at every element that of its part, or zero."""
        return _read(values, self.labels, 0.0)

    def box(self, j: int) -> Box:
        """Return the smallest box, over all axes, that holds part j; empty where no element has that label."""
        return self._boxes()[j]

    def _within(self, box: Box | None) -> Tensor:
        return self.labels if box is None else self.labels[_narrowed(box, self.labels)]

    def _boxes(self) -> list[Box]:
        found = self.__dict__.get("_found")
        if found is None:
            from scipy.ndimage import find_objects

            known = find_objects((self.labels + 1).cpu().numpy(), max_label=self.count)
            nothing = tuple(slice(0, 0) for _ in self.labels.shape)
            found = [nothing if box is None else tuple(box) for box in known]
            self.__dict__["_found"] = found
        return found


@dataclass(frozen=True)
class Cover:
    """Parts that may overlap: part (j_0, ..., j_n) hides the product of one profile for each axis.

    ``profiles[a]`` is (n_a, length of axis a), in [0, 1]: how much of each element the window hides.
    """

    profiles: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """The number of windows."""
        return math.prod(len(p) for p in self.profiles)

    def keep(self, z: Tensor, box: Box | None = None) -> Tensor:
        """Return how much of every element (of a box) is kept; what several windows hide is hidden once."""
        return 1 - self._add(1 - z, box).clamp(0, 1)

    def without(self, j: Tensor, box: Box | None = None) -> Tensor:
        """Return how much of every element (of a box) is kept if all windows but j are transparent."""
        rest, shown = j, []
        for profile in reversed(self.profiles):
            shown.append(profile.index_select(0, (rest % len(profile)).reshape(1))[0])
            rest = rest // len(profile)
        shown.reverse()
        if box is not None:
            shown = [p[b] for p, b in zip(shown, box, strict=True)]
        return 1 - _outer(shown)

    def spread(self, values: Tensor) -> Tensor:
        """Return one value for each window as a map: the mean over the windows that hide an element, or zero.

        NaN wherever the value of one of them is: so what is not NaN is as if all windows had been looked at.
        """
        cover = _outer([p.sum(0) for p in self.profiles]).to(values.dtype)
        missing = torch.isnan(values)  # added up as it is, one would spread along all axes
        total = self._add(torch.where(missing, 0, values))
        mean = torch.where(cover > 0, total / torch.where(cover > 0, cover, 1), 0)
        return torch.where(self._add(missing.to(values.dtype)) > 0, torch.nan, mean)

    def box(self, j: int) -> Box:
        """Return the smallest box, over all axes, that holds window j."""
        where = []
        for profile in reversed(self.profiles):
            hidden = profile[j % len(profile)].nonzero().flatten().tolist()
            where.append(slice(hidden[0], hidden[-1] + 1) if hidden else slice(0, 0))
            j //= len(profile)
        return tuple(reversed(where))

    def _add(self, values: Tensor, box: Box | None = None) -> Tensor:
        out = values.reshape(*(len(p) for p in self.profiles))
        within = [slice(None)] * len(self.profiles) if box is None else box
        for profile in (
            p[:, part] for p, part in zip(self.profiles, within, strict=True)
        ):  # takes the first axis away and puts its grid last
            out = torch.tensordot(out, profile.to(values.dtype), dims=([0], [0]))
        return out


def _read(values: Tensor, labels: Tensor, outside: float) -> Tensor:
    padded = torch.cat([values, values.new_full((1,), outside)])
    index = torch.where(labels < 0, len(values), labels)
    return padded.index_select(0, index.flatten()).reshape(labels.shape)


def _outer(rows: Sequence[Tensor]) -> Tensor:
    out = rows[0]
    for row in rows[1:]:
        out = out[..., None] * row
    return out


def _narrowed(box: Box, labels: Tensor) -> Box:
    return tuple(slice(0, 1) if length == 1 else part for part, length in zip(box, labels.shape, strict=True))


# --- Which parts there are --------------------------------------------------------------------------------


@feature_map(family="elements")
def elements() -> Features:
    """Make every channel of every voxel a part: exact, and only for small images.

    Returns:
        ``x -> FeatureMap``.

    Example:
        >>> elements()(torch.zeros(2, 3)).count
        6
    """

    def features(x: Tensor) -> Partition:
        return Partition(torch.arange(x.numel(), device=x.device).reshape(x.shape), x.numel())

    return features


@feature_map(family="elements")
def voxels() -> Features:
    """Make every voxel a part, with all of its channels.

    Returns:
        ``x -> FeatureMap``.

    Example:
        >>> voxels()(torch.zeros(2, 3)).labels.tolist()
        [[0, 1, 2]]
    """

    def features(x: Tensor) -> FeatureMap:
        return elements()(x[:1])

    return features


@feature_map(family="elements")
def channels() -> Features:
    """Make every channel a part: the sequences of an MR examination, the colours of a photograph.

    Returns:
        ``x -> FeatureMap``.

    Example:
        >>> channels()(torch.zeros(2, 3)).labels.tolist()
        [[0], [1]]
    """

    def features(x: Tensor) -> Partition:
        return Partition(torch.arange(len(x), device=x.device).reshape(-1, *[1] * (x.ndim - 1)), len(x))

    return features


@feature_map(family="blocks", example={"size": 2})
def grid(size: Lengths, *, spacing: Spacing | None = None) -> Features:
    r"""Return blocks side by side, all channels together; those at the far border are cut off by it.

    Args:
        size: of a block, one number or one for each axis; in voxels, or in the unit of ``spacing``.
        spacing: of the voxels, if sizes are lengths.

    Returns:
        ``x -> FeatureMap``.

    Example:
        >>> grid(2)(torch.zeros(1, 2, 3)).labels.tolist()
        [[[0, 0, 1], [0, 0, 1]]]
    """

    def features(x: Tensor) -> Partition:
        labels = torch.zeros((1,), dtype=torch.int64, device=x.device)
        count = 1
        for length, block in zip(x.shape[1:], _lengths("grid", "size", size, spacing, x), strict=True):
            here = torch.arange(length, device=x.device) // block
            many = -(-length // block)
            labels = labels[..., None] * many + here
            count *= many
        return Partition(labels, count)

    return features


@feature_map(family="regions", example={"map": torch.arange(24).reshape(4, 6) // 8})
def labels(map: Tensor) -> Features:
    r"""Return the regions of a label map: an atlas, a parcellation, a segmentation.

    Args:
        map: whole numbers 0 to d - 1 without gaps, of shape (\*S), (1,\*S) or (C,\*S). Elements labelled -1 belong
            to no part and are never hidden. ``esegeta.segmentation.relabelled`` closes gaps.

    Returns:
        ``x -> FeatureMap``.

    Example:
        >>> labels(torch.tensor([0, 0, 1]))(torch.zeros(2, 3)).spread(torch.tensor([5., 7.])).tolist()
        [[5.0, 5.0, 7.0]]
    """
    where = "features.labels"
    map = check.tensor(where, "map", map)
    if map.is_floating_point() or map.is_complex() or map.dtype == torch.bool or map.numel() == 0:
        raise check.refused_type(where, "a map of whole numbers", check.describe(map), "Use map.long()")
    map = map.to(torch.int64)
    count = 0
    if not levels.wrapped(map):
        present = torch.unique(map)
        present = present[present != -1].tolist()
        count = len(present)
        if present != list(range(count)) or not count:
            shown = ", ".join(str(n) for n in present[:8]) + (", ..." if count > 8 else "")
            raise check.refused(
                where,
                "labels 0 to d - 1 without gaps, and -1 for what belongs to no part",
                f"labels {shown or 'that are all -1'}",
                "Close gaps with esegeta.segmentation.relabelled(map)",
            )
    else:
        raise check.refused(
            where,
            "one map for all examples",
            "one that vmap maps over",
            "Use features.segments(function of x) where each example has its own regions",
        )

    def features(x: Tensor) -> Partition:
        return Partition(_fitted(where, map, x), count)

    return features


@feature_map(family="regions", example={"segment": lambda x: (x[0] > 0).long(), "count": 2})
def segments(segment: Callable[[Tensor], Tensor], count: int) -> Features:
    r"""Return regions that depend on the image: found anew in every example.

    Args:
        segment: from (C,\*S) to a label map (\*S) with labels from 0, for example
            ``lambda x: esegeta.segmentation.slic(x, 100)``. It may do anything, on plain tensors.
        count: the number of parts; labels are below it. Numbers without a region are parts without elements: they
            change nothing and are credited with nothing.

    Returns:
        ``x -> FeatureMap``.

    Example:
        >>> halves = segments(lambda x: (torch.arange(x.shape[-1]) >= x.shape[-1] // 2).long(), 2)
        >>> halves(torch.zeros(1, 4)).labels.tolist()
        [[0, 0, 1, 1]]
    """
    where = "features.segments"
    count = check.positive_count(where, "count", count)

    def found(x: Tensor) -> Tensor:
        map = check.tensor(where, "the result of segment", segment(x))
        map = _fitted(where, map.to(torch.int64), x)
        if levels.true_anywhere((map >= count) | (map < -1)):
            raise check.refused(
                where,
                f"labels below count = {count}",
                f"labels from {int(map.min())} to {int(map.max())}",
                "Raise most, or ask for fewer segments",
            )
        return map

    def features(x: Tensor) -> Partition:
        x = x.detach()
        if not levels.depth():
            return Partition(found(x), count)
        # A black box goes through every transform; what it sees are plain tensors, one example at a time.
        each = from_module(lambda xs: torch.stack([found(one) for one in xs]).to(xs.dtype))
        return Partition(each(x).round().to(torch.int64), count)

    return features


@feature_map(family="regions", example={"count": 2})
def supervoxels(count: int, *, spacing: Spacing | None = None, compactness: float | int = 1.0) -> Features:
    r"""Compact regions of similar intensity: N-dimensional SLIC, found anew in every example.

    Args:
        count: about how many.
        spacing: of the voxels, so that regions are as deep as they are wide.
        compactness: how much nearness counts against likeness.

    Returns:
        ``x -> FeatureMap``.

    Example:
        >>> supervoxels(2)(torch.tensor([[0., 0., 9., 9.]])).labels.tolist()
        [[0, 0, 1, 1]]
    """
    check.positive_count("supervoxels", "count", count)
    return segments(
        lambda x: segmentation.slic(x, count, spacing=spacing, compactness=compactness), 2 * count + 8
    )


@feature_map(family="blocks", example={"size": 2})
def windows(
    size: Lengths,
    *,
    stride: Lengths | None = None,
    spacing: Spacing | None = None,
    fade: float | int | None = None,
    separate: bool = False,
) -> Features:
    r"""Return boxes that slide over the image, from the first voxel on in steps of the stride.

    The last one on each axis is cut off by the border. Together they hide every voxel: a stride beyond the size,
    which would leave gaps where nobody looked, is refused.

    Args:
        size: of a box, one number or one for each axis; in voxels, or in the unit of ``spacing``.
        stride: the same for the steps; by default the size, so that boxes touch and do not overlap.
        spacing: of the voxels, if sizes are lengths.
        fade: None for boxes that hide all within; or the standard deviation, as a fraction of the size, of a
            gaussian around the centre by which they fade out.
        separate: whether every channel has its own boxes; otherwise a box goes through all channels.

    Returns:
        ``x -> FeatureMap``.

    Example:
        >>> windows(2, stride=1)(torch.zeros(1, 3)).spread(torch.tensor([1., 2.])).tolist()
        [[1.0, 1.5, 2.0]]
    """

    check.flag("windows", "separate", separate)

    def features(x: Tensor) -> Cover:
        sizes = _lengths("windows", "size", size, spacing, x)
        steps = sizes if stride is None else _lengths("windows", "stride", stride, spacing, x)
        first = torch.eye(len(x), device=x.device) if separate else torch.ones(1, len(x), device=x.device)
        profiles = [first.to(x.dtype)]
        for length, wide, step in zip(x.shape[1:], sizes, steps, strict=True):
            if wide > length:
                raise check.refused(
                    "windows",
                    f"windows of at most the image's {tuple(x.shape[1:])} voxels",
                    f"{sizes} voxels",
                    "Choose a smaller size",
                )
            starts = torch.arange(0, min(length - wide + step, length), step, device=x.device)[:, None]
            here = torch.arange(length, device=x.device)[None]
            inside = (here >= starts) & (here < starts + wide)
            if fade is None:
                profiles.append(inside.to(x.dtype))
            else:
                centre = starts + (wide - 1) / 2
                shape = torch.exp(-0.5 * ((here - centre) / (fade * wide)) ** 2)
                profiles.append(torch.where(inside, shape, 0.0).to(x.dtype))
            if levels.true_anywhere(profiles[-1].sum(0) == 0):
                faded = "" if fade is None or step <= wide else f" with fade {fade}"
                raise check.refused(
                    "windows",
                    "boxes that leave no voxel out" + (" before they fade to nothing" if faded else ""),
                    f"steps of {step} and boxes of {wide} voxels on an axis of {length}{faded}",
                    "Choose a stride of at most the size; features.within looks at a region only",
                )
        return Cover(tuple(profiles))

    if fade is not None and not check.non_negative("windows", "fade", fade):
        raise check.refused("windows", "fade > 0", repr(fade), "0.25 is usual")
    return features


@feature_map(family="regions", example={"features": grid(2), "mask": torch.ones(4, 6, dtype=torch.bool)})
def within(features: Features, mask: Tensor) -> Features:
    r"""Return only the parts that touch a region of interest; the others are left alone, and cost nothing.

    Args:
        features: of the whole image.
        mask: bool, of shape (\*S). Of a label map, parts keep the elements inside of it; of windows, those are
            dropped that lie wholly outside of the smallest box around it.

    Returns:
        ``x -> FeatureMap``.

    Example:
        >>> within(grid(1), torch.tensor([False, True, True]))(torch.zeros(1, 3)).labels.tolist()
        [[-1, 0, 1]]
    """
    where = "features.within"
    check.features(where, features)
    mask = check.tensor(where, "mask", mask)
    if mask.dtype != torch.bool or not levels.true_anywhere(mask):
        raise check.refused(where, "a bool mask that is true somewhere", check.describe(mask), "Draw one")

    def restricted(x: Tensor) -> FeatureMap:
        found = features(x)
        inside = _fitted(where, mask, x)
        if isinstance(found, Cover):
            axes = range(1, x.ndim)
            edges = [inside.any(dim=tuple(a for a in range(x.ndim) if a != axis)) for axis in axes]
            near = [(p * e).any(1) for p, e in zip(found.profiles[1:], edges, strict=True)]
            kept = [p[n] for p, n in zip(found.profiles[1:], near, strict=True)]
            return Cover((found.profiles[0], *kept))
        assert isinstance(found, Partition)
        inside_labels = torch.where(inside, found.labels, -1)
        if levels.wrapped(inside_labels):
            return Partition(inside_labels, found.count)
        kept_numbers, small = torch.unique(inside_labels, return_inverse=True)
        offset = int((kept_numbers == -1).any())
        return Partition(small - offset, len(kept_numbers) - offset)

    return restricted


def _single(spacing: object) -> bool:
    """Whether a spacing is one number, which says nothing of the axes."""
    return isinstance(spacing, (int, float)) or getattr(spacing, "ndim", 1) == 0


def _lengths(where: str, name: str, value: Any, spacing: Spacing | None, x: Tensor) -> tuple[int, ...]:
    """Whole numbers of voxels, one for each spatial axis."""
    axes = x.ndim - 1
    many = check.each_axis(value, axes)
    units = (1.0,) * axes if spacing is None else () if _single(spacing) else check.each_axis(spacing, axes)
    unit = "voxels" if spacing is None else "the unit of spacing"
    right = len(many) == axes == len(units) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < 2.0**31 for v in (*many, *units)
    )
    if right and spacing is None:
        right = all(float(v).is_integer() for v in many)
    if not right:
        raise check.refused(
            where,
            f"{name} > 0 in {unit}, one number or {axes}",
            repr(value) + (f" with spacing {check.describe(spacing)}" if spacing is not None else ""),
            "Voxels are whole; give spacing= for lengths, one number for each axis",
        )
    return tuple(max(1, round(v / u)) for v, u in zip(many, units, strict=True))


def _fitted(where: str, map: Tensor, x: Tensor) -> Tensor:
    """A map on the grid of x, with a first axis for channels."""
    fitted = map[None] if map.ndim == x.ndim - 1 else map
    if fitted.ndim != x.ndim or fitted.shape[1:] != x.shape[1:] or fitted.shape[0] not in (1, len(x)):
        raise check.refused(
            where,
            f"a map on the grid {tuple(x.shape[1:])} of the image",
            f"{tuple(map.shape)}",
            "Resample it onto that grid with nearest neighbours",
        )
    return fitted.to(x.device)
