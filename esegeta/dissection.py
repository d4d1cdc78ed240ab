r"""Network dissection: which channel of a network sees which concept?

A channel is *on* where its activation is among its largest over a whole data set. Where that overlaps with a concept
(a label, a region of an atlas, a tissue) far more than it would with the concept of another image, the channel is a
detector of the concept. In one to three dimensions, over data that are read image by image.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor

from esegeta import random
from esegeta._types import Model
from esegeta.engine import check
from esegeta.metrics.comparing import benjamini_hochberg, holm
from esegeta.placing import tap
from esegeta.spatial import upsample

__all__ = [
    "Detector",
    "Dissection",
    "channel_masks",
    "despeckle",
    "dissect",
    "labelled",
    "largest",
    "thresholds",
    "tissues",
]

Data = Iterable[Any] | Callable[[], Iterator[Any]]
Clean = Callable[[Tensor], Tensor]

NULLS = ("swap", "roll", "none")
CORRECTIONS = ("max", "holm", "bh")
HALF = 2**16  # of the bits of a float32: a threshold is found by its upper half first, then by its lower half
BLOCK = 2**26  # numbers of the masks that are looked at together
_INSIDE = ("tap", "upsample", "thresholds", "channel_masks")


# ------------------------------------------------------------------ what comes of it


class Detector(NamedTuple):
    """A channel and a concept.

    threshold: the channel is on where its activation is at least this; iou: over all images together; image_iou: the
    mean over the images that have the concept; images: how many these are; p: of the permutation test, NaN without
    one; adjusted: p for all channels and concepts together; detector: whether iou and adjusted are what is asked for.
    NaN where no image has the concept.
    """

    place: str
    channel: int
    concept: str
    threshold: float
    iou: float
    image_iou: float
    images: int
    p: float
    adjusted: float
    detector: bool


@dataclass(frozen=True)
class Dissection:
    """What a dissection found; prints as a table of the detectors.

    channels: place and number of each channel; concepts: their names; thresholds: one for each channel; iou:
    (channels, concepts), over all images together; per_image: (images, channels, concepts), NaN where an image has
    not the concept; drawn: (permutations, channels, concepts), iou with permuted concepts; peaks: (images, channels),
    the largest activation of each; quantile, null: as asked for.
    """

    channels: tuple[tuple[str, int], ...]
    concepts: tuple[str, ...]
    thresholds: Tensor
    iou: Tensor
    per_image: Tensor
    drawn: Tensor
    peaks: Tensor
    quantile: float
    null: str

    def rows(self, *, least: float = 0.04, level: float = 0.05, correction: str = "max") -> list[Detector]:
        """Return a row for each channel and concept.

        Args:
            least: the overlap over all images that a detector has at least.
            level: of its p-value, corrected for the number of channels and concepts. Without a null model the
                overlap alone decides.
            correction: "max" compares with the largest overlap of all channels and concepts under each permutation,
                in standard deviations, so it holds the family-wise error with few permutations; "holm" holds it as
                well, and needs as many permutations as there are tests; "bh" holds the false discovery rate.

        Returns:
            In the order of places, channels and concepts.
        """
        where = "Dissection.rows"
        check.non_negative(where, "least", least)
        check.non_negative(where, "level", level)
        check.one_of(where, "correction", correction, CORRECTIONS)
        p, adjusted = self.p_values(correction)
        found, seen = [], (~self.per_image.isnan()).sum(0)
        means = self.per_image.nanmean(0)
        for k, (place, channel) in enumerate(self.channels):
            for c, concept in enumerate(self.concepts):
                iou, corrected = float(self.iou[k, c]), float(adjusted[k, c])
                sure = self.null == "none" or corrected <= level
                found.append(
                    Detector(
                        place=place,
                        channel=channel,
                        concept=concept,
                        threshold=float(self.thresholds[k]),
                        iou=iou,
                        image_iou=float(means[k, c]),
                        images=int(seen[k, c]),
                        p=float(p[k, c]),
                        adjusted=corrected,
                        detector=iou >= least and sure,
                    )
                )
        return found

    def p_values(self, correction: str = "max") -> tuple[Tensor, Tensor]:
        """Return the p-values of all channels and concepts, and the same corrected for their number."""
        unknown = torch.full_like(self.iou, math.nan)
        if not len(self.drawn):
            return unknown, unknown.clone()
        known, tiny = ~self.iou.isnan(), 1e-12
        count = len(self.drawn) + 1
        p = ((self.drawn >= self.iou - tiny).sum(0) + 1) / count
        p = torch.where(known, p.double(), unknown)
        if correction == "max":
            whole = torch.cat([self.iou[None], self.drawn])
            spread = whole.std(0, correction=0)
            z = (whole - whole.mean(0)) / torch.where(spread > tiny, spread, 1.0)
            highest = torch.where(known, z, -math.inf).flatten(1).amax(1)
            above = (highest[1:, None, None] >= z[0] - 1e-9).sum(0) + 1
            return p, torch.where(known, (above / count).double(), unknown)
        correct = holm if correction == "holm" else benjamini_hochberg
        return p, torch.tensor(correct(p.flatten().tolist()), dtype=p.dtype).reshape(p.shape)

    def best(self, **asked: Any) -> list[Detector]:
        """Return for each place and concept the channel with the largest overlap; ``asked`` as for ``rows``."""
        found: dict[tuple[str, str], Detector] = {}
        for row in self.rows(**asked):
            other = found.get((row.place, row.concept))
            if other is None or row.iou > other.iou:
                found[row.place, row.concept] = row
        return list(found.values())

    def exciting(self, place: str, channel: int, count: int = 5) -> list[tuple[int, float]]:
        """Return the images that excite a channel most, as the number of the image and its largest activation.

        They show what a channel sees that detects none of the concepts: ``channel_masks`` says where.
        """
        if (place, channel) not in self.channels:
            names = sorted({one for one, _ in self.channels})
            got, advice = f"{place!r}, {channel!r}", f"Places are {', '.join(names)}"
            raise check.refused("Dissection.exciting", "a channel that was dissected", got, advice)
        peaks = self.peaks[:, self.channels.index((place, channel))]
        order = peaks.sort(descending=True, stable=True).indices[:count].tolist()
        return [(i, float(peaks[i])) for i in order]

    def csv(self, **asked: Any) -> str:
        """Return all rows as a table with commas; empty where there is no number."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(Detector._fields)
        writer.writerows([["" if v != v else v for v in row] for row in self.rows(**asked)])
        return out.getvalue()

    def json(self, **asked: Any) -> str:
        """Return all rows as JSON, null where there is no number."""
        rows = [{k: None if v != v else v for k, v in row._asdict().items()} for row in self.rows(**asked)]
        return json.dumps(rows, indent=1)

    def __str__(self) -> str:
        found = sorted((row for row in self.rows() if row.detector), key=lambda row: -row.iou)
        head = f"{len(found)} detectors among {len(self.channels)} channels and {len(self.concepts)} concepts"
        lines = [("place", "channel", "concept", "IoU", "p adjusted")]
        lines += [
            (r.place, str(r.channel), r.concept, f"{r.iou:.3f}", "" if r.p != r.p else f"{r.adjusted:.3g}")
            for r in found
        ]
        wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(v.ljust(w) for v, w in zip(line, wide, strict=True)).rstrip() for line in lines]
        return "\n".join([head, *(table if found else [])])


# ------------------------------------------------------------------ what it is made of


def despeckle(mask: Tensor) -> Tensor:
    r"""Remove salt and pepper from a mask: each voxel becomes what most of its 3 x 3 (x 3) neighbourhood is.

    Args:
        mask: boolean, (\*S).

    Returns:
        (\*S) -> (\*S), boolean.

    Example:
        >>> despeckle(torch.tensor([True, False, True, True, True, False, False, True, False])).tolist()
        [True, True, True, True, True, False, False, False, False]
    """
    grid = check.tensor("despeckle", "mask", mask).cpu().numpy()
    counts = scipy.ndimage.uniform_filter(grid.astype(np.float64), size=3, mode="nearest")
    return torch.from_numpy(counts > 0.5).to(mask.device)


def largest(mask: Tensor) -> Tensor:
    r"""Keep the largest face-connected component of a mask, of equal ones the first.

    Args:
        mask: boolean, (\*S).

    Returns:
        (\*S) -> (\*S), boolean.

    Example:
        >>> largest(torch.tensor([True, False, True, True])).tolist()
        [False, False, True, True]
    """
    grid = check.tensor("largest", "mask", mask).cpu().numpy().astype(bool)
    found, count = scipy.ndimage.label(grid)
    if not count:
        return mask.clone()
    sizes = np.bincount(found.ravel())
    sizes[0] = 0
    return torch.from_numpy(found == sizes.argmax()).to(mask.device)


def labelled(labels: Tensor, names: Mapping[int, str]) -> dict[str, Tensor]:
    r"""Return the concepts of a label map or an atlas, by their names.

    Args:
        labels: whole numbers, (\*S).
        names: of those labels that are concepts.

    Returns:
        Name -> boolean (\*S); empty where the map has none of a label.

    Example:
        >>> {name: mask.tolist() for name, mask in labelled(torch.tensor([0, 2, 2]), {1: "a", 2: "b"}).items()}
        {'a': [False, False, False], 'b': [False, True, True]}
    """
    check.tensor("labelled", "labels", labels)
    return {name: labels == number for number, name in names.items()}


def tissues(x: Tensor, within: Tensor, *, classes: int = 3) -> Tensor:
    r"""Divide the voxels of a region into classes of like intensity, numbered from 1, the darkest first.

    Lloyd's algorithm in one dimension, from evenly spaced quantiles: deterministic. In a T1-weighted brain three
    classes are roughly cerebrospinal fluid, grey and white matter; where scanners differ so do they.

    Args:
        x: the image (C,\*S), of which the first channel counts.
        within: the region (\*S).
        classes: how many.

    Returns:
        Whole numbers (\*S); 0 outside of the region.

    Example:
        >>> x = torch.tensor([[9., 0., 1., 5., 6., 9.]])
        >>> tissues(x, torch.tensor([False, True, True, True, True, True])).tolist()
        [0, 1, 1, 2, 2, 3]
    """
    check.image("tissues", "x", x)
    count = check.positive_count("tissues", "classes", classes, 2)
    inside = check.tensor("tissues", "within", within).bool()
    if inside.shape != x.shape[1:]:
        got, advice = check.describe(within), "Bring it to the grid of the image"
        raise check.refused("tissues", f"a region of shape {tuple(x.shape[1:])}", got, advice)
    values = x[0][inside].double()
    if len(values.unique()) < count:
        got, advice = f"{len(values.unique())}", "Choose fewer classes"
        raise check.refused("tissues", f"at least {count} different intensities in the region", got, advice)
    ordered = values.sort().values
    starts = ((torch.arange(count, device=x.device) + 0.5) / count * len(ordered)).long()
    centres = ordered[starts]
    if len(centres.unique()) < count:  # many voxels of one value
        distinct = values.unique()
        centres = distinct[((torch.arange(count, device=x.device) + 0.5) / count * len(distinct)).long()]
    for _ in range(100):
        borders = (centres[1:] + centres[:-1]) / 2
        own = torch.bucketize(values, borders)
        sizes = torch.bincount(own, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, own, values)
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    found = torch.zeros(x.shape[1:], dtype=torch.int64, device=x.device)
    found[inside] = torch.bucketize(values, (centres[1:] + centres[:-1]) / 2) + 1
    return found


def channel_masks(
    model: Model, place: str, *, thresholds: Tensor, clean: Clean | None = None
) -> Callable[[Tensor], Tensor]:
    r"""Return where the channels of a place are on, on the grid of the image.

    .. math:: M_k(x) = \mathrm{up}(A_k(x)) \ge T_k

    The activation is brought to the grid of the image before it is compared, so borders are not those of the layer's
    coarse voxels.

    Args:
        model: the network.
        place: of the layer.
        thresholds: (K,), one for each channel.
        clean: a function of a mask that each of them passes, such as ``largest``.

    Returns:
        ``x -> (K,*S)``, boolean.

    Example:
        >>> import esegeta as eg
        >>> model = lambda x: eg.mark(torch.cat([x, -x]), "both")
        >>> on = channel_masks(model, "both", thresholds=torch.tensor([2.0, 0.0]))
        >>> on(torch.tensor([[1., 2., -3.]])).tolist()
        [[False, True, False], [False, False, True]]
    """
    look = tap(model, place)

    def masks(x: Tensor) -> Tensor:
        with torch.no_grad(), check.calling("channel_masks", _INSIDE):
            return _on(look(x), thresholds, x, clean)

    return masks


def _on(a: Tensor, limits: Tensor, x: Tensor, clean: Clean | None) -> Tensor:
    found = upsample(a.float(), like=x.float()) >= limits.to(a.device).reshape(-1, *[1] * (x.ndim - 1))
    return found if clean is None else torch.stack([clean(one) for one in found])


# ------------------------------------------------------------------ thresholds


def _ordered(a: Tensor) -> Tensor:
    """Whole numbers from 0 to 2^32 - 1 in the order of some float32."""
    bits = (a.float() + 0.0).contiguous().view(torch.int32)  # no negative zero
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + 2**31


def _floats(numbers: Tensor) -> Tensor:
    bits = (numbers - 2**31).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _counted(halves: Tensor, where: Tensor | None = None) -> Tensor:
    """How often each of the 2^16 numbers is in each row, of those that count."""
    rows = [
        torch.bincount(row if where is None else row[where[k]], minlength=HALF)
        for k, row in enumerate(halves)
    ]
    return torch.stack(rows)


def thresholds(activations: Data, *, quantile: float = 0.01) -> Tensor:
    r"""Return the value that a channel exceeds at a share of all voxels, of all images together.

    .. math:: P(A_k > T_k) \le q

    Exact for float32, by two passes over the data that count the upper and the lower 16 bits: a channel takes half a
    megabyte, however many images there are, and the order of the images does not matter. With N values in all, the
    :math:`\max(1, \lfloor q N \rfloor)` largest reach the threshold, and more where several are equal to the
    smallest of these. The threshold lies halfway to the next smaller value, so rounding decides about no plateau. A
    channel that has its smallest value at all but fewer voxels than that, as after a ReLU, is on wherever it is above
    it; one that has a single value is never on.

    Args:
        activations: a sequence of tensors (K,\*U), or a function that returns a fresh iterator of them.
        quantile: q, in (0, 1).

    Returns:
        (K,), float32; infinite for a channel that is never on.

    Example:
        >>> a = torch.arange(200.0).reshape(1, 200)
        >>> thresholds([a[:, :50], a[:, 50:]], quantile=0.01).tolist()
        [197.5]

    Reference: Bau et al., Network Dissection, CVPR 2017; q = 0.01 as Natekar et al. 2020.
    """
    share = _quantile("thresholds", quantile)
    first = _Counter(share)
    for a in _again("thresholds", activations):
        first.add(a)
    second = first.second()
    for a in _again("thresholds", activations):
        second.add(a)
    return second.thresholds()


class _Counter:
    """The first pass: upper halves, and how many values there are."""

    def __init__(self, share: float) -> None:
        self.share, self.total = share, 0
        self.counts: Tensor | None = None

    def add(self, a: Tensor) -> None:
        if not bool(torch.isfinite(a).all()):
            got, advice = "NaN or infinite ones", "Look for NaN in the image or the weights"
            raise check.refused("thresholds", "finite activations", got, advice)
        found = _counted(_ordered(a).flatten(1) // HALF)
        self.counts = found if self.counts is None else self.counts + found
        self.total += a[0].numel()

    def second(self) -> "_Refiner":
        assert self.counts is not None
        rank = max(1, math.floor(self.share * self.total * (1 + 1e-12)))
        above = self.counts.flip(1).cumsum(1).flip(1)  # how many are in a bin or above
        upper = (above >= rank).sum(1) - 1  # the last bin for which these are enough
        beyond = torch.cat([above, above.new_zeros(len(above), 1)], 1).gather(1, upper[:, None] + 1)[:, 0]
        return _Refiner(upper, rank - beyond)


class _Refiner:
    """The second pass: lower halves in the one upper half that the threshold lies in, and what lies next to it."""

    def __init__(self, upper: Tensor, rank: Tensor) -> None:
        self.upper, self.rank = upper, rank
        self.counts = torch.zeros(len(upper), HALF, dtype=torch.int64, device=upper.device)
        self.below = torch.full_like(upper, -1)  # the largest below this upper half
        self.above = torch.full_like(upper, 2**32)  # the smallest above it

    def add(self, a: Tensor) -> None:
        numbers = _ordered(a).flatten(1)
        halves, own = numbers // HALF, self.upper[:, None]
        self.counts += _counted(numbers % HALF, halves == own)
        self.below = torch.maximum(self.below, torch.where(halves < own, numbers, -1).amax(1))
        self.above = torch.minimum(self.above, torch.where(halves > own, numbers, 2**32).amin(1))

    def thresholds(self) -> Tensor:
        reached = self.counts.flip(1).cumsum(1).flip(1) >= self.rank[:, None]
        lower = reached.sum(1) - 1
        at = torch.arange(HALF, device=lower.device)[None]
        there = self.counts > 0
        before = torch.where(there & (at < lower[:, None]), at, -1).amax(1)
        after = torch.where(there & (at > lower[:, None]), at, HALF).amin(1)
        base = self.upper * HALF
        before = torch.where(before >= 0, base + before, self.below)
        after = torch.where(after < HALF, base + after, self.above)
        own = base + lower
        # Between the threshold and the value before it; if there is none, between it and the one after.
        low, high = torch.where(before >= 0, before, own), torch.where(before >= 0, own, after)
        never = high >= 2**32
        least, most = _floats(low).double(), _floats(torch.where(never, own, high)).double()
        middle = ((least + most) / 2).float()
        middle = torch.where(middle.double() <= least, most.float(), middle)
        return torch.where(never, math.inf, middle)


def _quantile(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        advice = "0.01 means that one voxel in a hundred is on"
        raise check.refused(where, "quantile to be a number between 0 and 1", repr(value), advice)
    return float(value)


def _again(where: str, data: Any) -> Iterator[Any]:
    """A fresh iterator of data that are gone through more than once."""
    if callable(data) and not hasattr(data, "__getitem__"):
        return iter(data())
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        advice = "Pass a list, or a function that returns a fresh iterator"
        raise check.refused_type(where, "a data set", check.describe(data), advice)
    found = iter(data)
    if found is data:
        got, advice = "an iterator, which is used up by the first pass", "Pass a function that returns one"
        raise check.refused_type(where, "a data set that can be read more than once", got, advice)
    return found


# ------------------------------------------------------------------ the whole


class _Item(NamedTuple):
    x: Tensor
    concepts: Any
    within: Tensor | None


def dissect(
    model: Model,
    *,
    places: str | Sequence[str],
    quantile: float = 0.01,
    clean: Clean | None = None,
    null: str = "swap",
    permutations: int = 1000,
) -> Callable[..., Dissection]:
    r"""Compare where the channels of some places are on with where concepts are, over a data set.

    .. math:: \mathrm{IoU}_{k,c} = \frac{\sum_x |M_k(x) \cap L_c(x)|}{\sum_x |M_k(x) \cup L_c(x)|}, \qquad
              M_k(x) = \mathrm{up}(A_k(x)) \ge T_k, \qquad P(A_k > T_k) \le q

    The quantile is that of all images together at the layer's own resolution (see ``thresholds``). Data are read
    three times, one image at a time.

    A large structure overlaps with any channel that is often on, so an overlap is compared with those of permuted
    concepts. Under "swap" each image has the concepts of another one: whether the channel sees the concept *of this
    image*, and not only that concepts lie in the middle. That is a test at any size if images are independent and
    come from one population; with n of them no p-value is below 1/n!. It keeps the concepts of all images in
    memory, one bit for each voxel. Under "roll" the concepts of an image are shifted round its grid by a random
    amount: for images of different grids, or few of them; it assumes that a concept could lie anywhere.

    Args:
        model: the network.
        places: of layers whose activations have a grid.
        quantile: q, in (0, 1).
        clean: a function of a boolean mask (\*S), for masks of channels before they are compared, such as
            ``despeckle`` or ``largest``.
        null: "swap", "roll" or "none".
        permutations: how many.

    Returns:
        ``(data, key=0) -> Dissection``. Data are a sequence, or a function that returns a fresh iterator, of
        ``(x, concepts)`` or ``(x, concepts, within)``: an image (C,\*S); a mapping from names to boolean masks
        (\*S), or a label map of whole numbers, whose 0 is nothing; and a mask outside of which nothing counts.

    Example:
        >>> import esegeta as eg
        >>> model = lambda x: eg.mark(torch.cat([x, x.flip(-1)]), "both")
        >>> data = [(x[None], {"bright": x > 0}) for x in torch.eye(4)[:, None].expand(4, 5, 4)]
        >>> found = dissect(model, places="both", permutations=50)(data)
        >>> [(row.channel, round(row.iou, 2)) for row in found.rows()]
        [(0, 1.0), (1, 0.0)]

    Reference: Bau, Zhou, Khosla, Oliva, Torralba, Network Dissection, CVPR 2017; Natekar, Kori, Krishnamurthi,
    Demystifying brain tumor segmentation networks, Frontiers in Computational Neuroscience 2020.
    """
    check.model("dissect", model)
    names = (places,) if isinstance(places, str) else tuple(places)
    if not names:
        raise check.refused("dissect", "at least one place", "none", "esegeta.places(model, x) lists them")
    share = _quantile("dissect", quantile)
    check.one_of("dissect", "null", null, NULLS)
    count = 0 if null == "none" else check.positive_count("dissect", "permutations", permutations)
    look = tap(model, names)

    def activations(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = look(x)
        for name, a in zip(names, found, strict=True):
            if a.ndim != x.ndim or not a.is_floating_point():
                expected = f"activations with {x.ndim - 1} spatial axes at {name!r}"
                advice = "Choose a place before pooling or flattening"
                raise check.refused("dissect", expected, check.describe(a), advice)
        return tuple(a.float() for a in found)

    def dissected(data: Data, *, key: int | Tensor = 0) -> Dissection:
        check.key("dissect", key)
        with check.calling("dissect", _INSIDE):
            first, kept = [_Counter(share) for _ in names], _Concepts(null)
            peaks: list[Tensor] = []
            for item in _items(data):
                kept.add(item)
                found = activations(item.x)
                for counter, a in zip(first, found, strict=True):
                    counter.add(a)
                peaks.append(torch.cat([a.flatten(1).amax(1) for a in found]).cpu())
            if kept.images < 2:
                advice = "A quantile and a permutation over a data set need more"
                raise check.refused("dissect", "at least two images", str(kept.images), advice)
            kept.same_grid()
            second = [counter.second() for counter in first]
            for item in _items(data):
                for refiner, a in zip(second, activations(item.x), strict=True):
                    refiner.add(a)
            limits = [refiner.thresholds() for refiner in second]
            tally = _Tally(kept, sum(map(len, limits)), count, key)
            for i, item in enumerate(_items(data)):
                tally.begin(i, item)
                for limit, a in zip(limits, activations(item.x), strict=True):
                    most = max(1, BLOCK // item.x[0].numel())
                    for own, part in zip(limit.split(most), a.split(most), strict=True):
                        tally.add(_on(part, own, item.x, clean))
            return Dissection(
                channels=tuple((name, k) for name, own in zip(names, limits, strict=True) for k in range(len(own))),
                concepts=kept.names,
                thresholds=torch.cat(limits).cpu(),
                iou=tally.iou(),
                per_image=tally.per_image(),
                drawn=tally.drawn(),
                peaks=torch.stack(peaks),
                quantile=share,
                null=null,
            )  # fmt: skip

    return dissected


def _items(data: Data) -> Iterator[_Item]:
    for i, given in enumerate(_again("dissect", data)):
        if not isinstance(given, (tuple, list)) or not 2 <= len(given) <= 3:
            got, advice = f"{check.describe(given)} as number {i}", "Give an image and its concepts"
            raise check.refused_type("dissect", "data of (x, concepts) or (x, concepts, within)", got, advice)
        x = check.finite("dissect", "x", check.image("dissect", "x", given[0]), "Repair the image")
        within = given[2] if len(given) == 3 else None
        if within is not None:
            within = _on_grid(within, x, "within", i).bool()
        yield _Item(x, given[1], within)


def _on_grid(mask: Any, x: Tensor, name: str, i: int) -> Tensor:
    check.tensor("dissect", f"{name} of image {i}", mask)
    grid = tuple(x.shape[1:])
    if tuple(mask.shape) != grid:
        raise check.refused(
            "dissect",
            f"{name} of image {i} on the grid {grid} of the image",
            f"shape {tuple(mask.shape)}",
            "Resample it by nearest neighbours: torch.nn.functional.interpolate(map[None, None].float(), "
            f"size={list(grid)}, mode='nearest-exact')[0, 0]",
        )
    return mask.to(x.device)


class _Concepts:
    """Names of concepts, and their masks one bit a voxel where images swap them."""

    def __init__(self, null: str) -> None:
        self.null, self.images = null, 0
        self.names: tuple[str, ...] = ()
        self._fixed: set[str] | None = None
        self._packed: list[dict[str, np.ndarray]] = []
        self._grids: list[tuple[int, ...]] = []

    def of(self, item: _Item, i: int) -> dict[str, Tensor]:
        given = item.concepts
        if isinstance(given, Tensor):
            labels = _on_grid(given, item.x, "the label map", i)
            if labels.is_floating_point() or labels.dtype == torch.bool:
                advice = "Pass whole numbers, or a mapping from names to masks"
                raise check.refused_type(
                    "dissect", "a label map of whole numbers", check.describe(given), advice
                )
            return {str(int(n)): labels == n for n in labels.unique() if n != 0}
        if not isinstance(given, Mapping) or not given:
            advice = "Pass {name: mask} or a label map"
            raise check.refused_type("dissect", f"concepts of image {i}", check.describe(given), advice)
        if self._fixed is None:
            self._fixed = set(map(str, given))
        if set(map(str, given)) != self._fixed:
            expected = f"the concepts {', '.join(sorted(self._fixed))} of image {i}"
            advice = "Give an empty mask where an image has not the concept"
            raise check.refused("dissect", expected, ", ".join(sorted(map(str, given))), advice)
        found = {}
        for name, mask in given.items():
            own = _on_grid(mask, item.x, f"the concept {name!r}", i)
            if bool(((own != 0) & (own != 1)).any()):
                advice = "Pass mask > 0, or a label map instead of the mapping"
                raise check.refused(
                    "dissect", f"the concept {name!r} of zeros and ones", check.describe(mask), advice
                )
            found[str(name)] = own.bool()
        return found

    def add(self, item: _Item) -> None:
        found = self.of(item, self.images)
        self.names = tuple(dict.fromkeys([*self.names, *found]))
        self._grids.append(tuple(item.x.shape[1:]))
        if self.null == "swap":
            self._packed.append({n: np.packbits(m.cpu().numpy().ravel()) for n, m in found.items()})
        self.images += 1

    def same_grid(self) -> None:
        if not self.names:
            got, advice = "label maps of zeros alone", "Look at the files of the labels"
            raise check.refused("dissect", "at least one concept", got, advice)
        self.names = (
            tuple(sorted(self.names, key=lambda n: (len(n), n))) if self._fixed is None else self.names
        )
        if self.null == "swap" and len(set(self._grids)) > 1:
            other = next(grid for grid in self._grids if grid != self._grids[0])
            got = f"different ones, such as {self._grids[0]} and {other}"
            advice = "Use null='roll', which shifts concepts within their image"
            raise check.refused("dissect", "images of one grid, to swap their concepts", got, advice)

    def stacked(self, found: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """(concepts, voxels), boolean."""
        nothing = torch.zeros(x.shape[1:], dtype=torch.bool, device=x.device)
        return torch.stack([found.get(name, nothing) for name in self.names]).flatten(1)

    def unpacked(self, j: int, like: Tensor) -> Tensor:
        """The concepts of an image, (concepts, voxels)."""
        voxels, found = like.shape[1], torch.zeros_like(like)
        for c, name in enumerate(self.names):
            bits = self._packed[j].get(name)
            if bits is not None:
                found[c] = torch.from_numpy(np.unpackbits(bits, count=voxels)).to(like.device)
        return found


class _Tally:
    """Counts of voxels: in the masks of channels, in concepts and in both, as they are and permuted."""

    def __init__(self, concepts: _Concepts, channels: int, permutations: int, key: Any) -> None:
        self.concepts, self.key, self.null = concepts, key, concepts.null
        n, many = concepts.images, len(concepts.names)
        self.both = torch.zeros(n, channels, many, dtype=torch.float64)
        self.on = torch.zeros(n, channels, dtype=torch.float64)
        self.there = torch.zeros(n, many, dtype=torch.float64)
        self.drawn_both = torch.zeros(permutations, channels, many, dtype=torch.float64)
        self.drawn_there = torch.zeros(permutations, many, dtype=torch.float64)
        self.order = torch.zeros(permutations, n, dtype=torch.int64)
        if self.null == "swap":
            self.order = random.bits(key, (permutations, n)).sort(dim=1, stable=True).indices.cpu()

    def begin(self, i: int, item: _Item) -> None:
        """Take up an image."""
        self.i, self.grid, self.k = i, item.x.shape[1:], 0
        self.within = torch.ones_like(item.x[0], dtype=torch.bool) if item.within is None else item.within
        # Whole numbers are exact up to 2^24 in float32.
        self.dtype = torch.float32 if item.x[0].numel() <= 2**24 else torch.float64
        self.own = self.concepts.stacked(self.concepts.of(item, i), item.x).to(self.dtype)
        inside = self.within.reshape(1, -1).to(self.dtype)
        self.there[i] = (inside @ self.own.T)[0].double().cpu()
        if self.null == "roll":
            own, count = random.fold_in(self.key, i), (len(self.order),)
            shifts = [
                random.integers(random.fold_in(own, axis), count, low=0, high=n)
                for axis, n in enumerate(self.grid)
            ]
            strides = [math.prod(self.grid[axis + 1 :]) for axis in range(len(self.grid))]
            self.shifts = sum(s.cpu() * stride for s, stride in zip(shifts, strides, strict=True))
            self.spectra = torch.fft.rfftn(self.own.double().reshape(-1, *self.grid), dim=self._axes())
        self.drawn_there += self._permuted(inside)[:, 0]

    def add(self, masks: Tensor) -> None:
        """Take in the masks of the next channels of that image."""
        flat = (masks & self.within).flatten(1).to(self.dtype)
        here = slice(self.k, self.k + len(flat))
        self.both[self.i, here] = (flat @ self.own.T).double().cpu()
        self.on[self.i, here] = flat.sum(1, dtype=torch.float64).cpu()
        self.drawn_both[:, here] += self._permuted(flat)
        self.k += len(flat)

    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-len(self.grid), 0))

    def _permuted(self, flat: Tensor) -> Tensor:
        """Voxels that masks share with permuted concepts, (permutations, masks, concepts)."""
        if self.null == "swap":
            pairs = [flat @ self.concepts.unpacked(j, self.own).T for j in range(self.concepts.images)]
            return torch.stack(pairs).double().cpu()[self.order[:, self.i]]
        found = torch.zeros(len(self.order), len(flat), len(self.own), dtype=torch.float64)
        if self.null == "roll":
            # What a mask shares with a concept under all shifts at once: their correlation. Whole numbers, to round.
            for k, mask in enumerate(flat):
                own = torch.fft.rfftn(mask.double().reshape(self.grid), dim=self._axes())
                for c, other in enumerate(self.spectra):
                    shared = torch.fft.irfftn(own * other.conj(), s=self.grid, dim=self._axes())
                    found[:, k, c] = shared.round().flatten().cpu()[self.shifts]
        return found

    def iou(self) -> Tensor:
        """Over all images together; NaN for a concept that no image has."""
        return _ratio(self.both.sum(0), self.on.sum(0), self.there.sum(0))

    def per_image(self) -> Tensor:
        """Of each image, NaN where it has not the concept."""
        return _ratio(self.both, self.on, self.there)

    def drawn(self) -> Tensor:
        """Over all images together, for each permutation.

        A concept that is shifted to where nothing counts overlaps with nothing. That is 0, and no lack of an answer:
        NaN would be less than any overlap, and make a detector of every channel.
        """
        on = self.on.sum(0).expand(len(self.drawn_both), -1)
        return _ratio(self.drawn_both, on, self.drawn_there, known=self.there.sum(0) > 0)


def _ratio(both: Tensor, on: Tensor, there: Tensor, *, known: Tensor | None = None) -> Tensor:
    either = on[..., :, None] + there[..., None, :] - both
    asked = (there > 0 if known is None else known)[..., None, :]
    return torch.where(asked, both / either.clamp(min=1.0), math.nan)
