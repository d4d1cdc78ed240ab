r"""A row for each connected part of a prediction: how large it is, where it lies, how sure and on what grounds.

A segmentation is read lesion by lesion. ``components`` brings together what the package knows of each: its volume,
its intensities and shape, the uncertainty of its voxels, what each channel of the image adds to it, how much of its
explanation lies outside of it, and the region of an atlas that it lies in. What was not computed is NaN, and the row
says why.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esegeta import metrics, radiomics, spatial
from esegeta._types import Explain, Model, Score
from esegeta.engine import check
from esegeta.engine.refusals import one_line
from esegeta.methods.gradient import gradient
from esegeta.reducers import predicted_mask, region
from esegeta.spatial import Spacing

__all__ = ["Component", "Components", "components"]

FEATURES = (
    *("shape_sphericity", "shape_maximum_diameter"),
    *("statistics_mean", "statistics_variance", "statistics_skewness", "histogram_entropy"),
)
MOST_VOXELS = 30_000  # of a part whose radiomics are computed: some of them look at all pairs of voxels
MOST_CHANNELS = 10  # of which all coalitions are run
WHERE = "components"


class Component(NamedTuple):
    """A connected part of a prediction.

    number: 1 is the largest; volume: in mm^3, or in voxels without spacing; centre: the mean place of its voxels, in
    mm from the first voxel; score: the sum of the logits of its voxels, which is explained; uncertainty: the mean of
    the map inside; region: what the atlas calls most of its voxels, and region_share how many these are; shapley: for
    each channel what it adds to the score, against the baseline; context_share: which share of the explanation of the
    score lies outside of the part; radiomics: by the names of the features; missing: why there is no number.
    """

    number: int
    voxels: int
    volume: float
    centre: tuple[float, ...]
    score: float
    uncertainty: float
    region: str
    region_share: float
    shapley: tuple[float, ...]
    context_share: float
    radiomics: Mapping[str, float]
    missing: Mapping[str, str]

    def flat(self) -> dict[str, Any]:
        """Return the same in one row: a column for each axis, channel and feature; None where there is no number."""
        found: dict[str, Any] = {}
        for name, value in self._asdict().items():
            if name == "centre":
                found |= {f"centre_{axis}": v for axis, v in enumerate(value)}
            elif name == "shapley":
                found |= {f"shapley_{channel}": v for channel, v in enumerate(value)}
            elif name == "radiomics":
                found |= value
            elif name == "missing":
                found[name] = "; ".join(f"{what}: {why}" for what, why in value.items())
            else:
                found[name] = value
        return {
            name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in found.items()
        }


@dataclass(frozen=True)
class Components:
    """The parts of a prediction, the largest first; prints as a table.

    rows: one for each; labels: (*S), the number of the part of each voxel, 0 outside.
    """

    rows: tuple[Component, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Component]:
        return iter(self.rows)

    def __getitem__(self, place: int) -> Component:
        return self.rows[place]

    def csv(self) -> str:
        """Return all rows as a table with commas; empty where there is no number."""
        flat, out = [row.flat() for row in self.rows], io.StringIO()
        writer = csv.DictWriter(out, list(flat[0]) if flat else ["number"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return out.getvalue()

    def json(self) -> str:
        """Return all rows as JSON, null where there is no number."""
        return json.dumps([row.flat() for row in self.rows], indent=1)

    def __str__(self) -> str:
        head = ("part", "volume", "uncertainty", "region", "context", "channels")
        lines = [head, *(_printed(row) for row in self.rows)]
        wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(v.ljust(w) for v, w in zip(line, wide, strict=True)).rstrip() for line in lines
        )


def _printed(row: Component) -> tuple[str, ...]:
    def told(value: float) -> str:
        return "-" if math.isnan(value) else f"{value:.4g}"

    channels = " ".join(told(v) for v in row.shapley)
    return (
        str(row.number),
        told(row.volume),
        told(row.uncertainty),
        row.region or "-",
        told(row.context_share),
        channels,
    )


def components(
    model: Model,
    target: int,
    *,
    explain: Callable[[Score], Explain] = gradient,
    features: Sequence[str] = FEATURES,
    bins: int = 32,
    explained: int = 20,
    exclusive: bool = True,
) -> Callable[..., Components]:
    r"""Describe every face-connected part of where a model predicts a class, the largest first.

    .. math:: F_k(x) = \sum_{v \in M_k} z_{c,v}

    is the score of part :math:`M_k`, which is frozen: ``reducers.region(model, target, M_k)``. Its Shapley values
    share its difference to a baseline exactly among the channels; all parts share the :math:`2^C` runs of the model.

    Args:
        model: ``(C,*S) -> (K,*S)``.
        target: class number.
        explain: ``Score -> Explain``; of its map the share outside of the part is taken.
        features: names of radiomic features, as ``esegeta.radiomics`` has them; of several channels each has its own.
        bins: grey levels of those that need them.
        explained: how many parts have an explanation, Shapley values and radiomics, the largest first.
        exclusive: False where channels are independent labels.

    Returns:
        ``(x, *, mask=, baseline=, uncertainty=, atlas=, names=, spacing=) -> Components``: an image (C,\*S); a mask
        (\*S) that replaces the prediction; an image without information, for Shapley values; a map of uncertainty
        (\*S), such as an entropy; an atlas of whole numbers (\*S), and the names of its labels; mm per voxel.

    Example:
        >>> model = lambda x: x[:1] + 2 * x[1:] - 0.5
        >>> x = torch.tensor([[0., 1., 1., 0., 0.], [0., 0., 1., 0., 1.]])
        >>> found = components(model, 1, features=())(x, baseline=torch.zeros_like(x), spacing=[2.0])
        >>> [(row.voxels, row.volume, row.score, row.shapley, row.context_share) for row in found]
        [(2, 4.0, 3.0, (2.0, 2.0), 0.0), (1, 2.0, 1.5, (0.0, 2.0), 0.0)]
        >>> found[0].missing["uncertainty"]
        'no map was given'
    """
    check.model(WHERE, model)
    count = check.positive_count(WHERE, "explained", explained, 0)
    check.positive_count(WHERE, "bins", bins, 2)
    known = set(radiomics.names().values())
    for name in features:
        if not any(name == one or name.startswith(f"{one}_") for one in known):
            advice = check.nearest(name, known, "esegeta.radiomics.names() has them")
            raise check.refused(WHERE, "the name of a radiomic feature", repr(name), advice)

    def described(
        x: Tensor,
        *,
        mask: Tensor | None = None,
        baseline: Tensor | None = None,
        uncertainty: Tensor | None = None,
        atlas: Tensor | None = None,
        names: Mapping[int, str] | None = None,
        spacing: Spacing | None = None,
    ) -> Components:
        check.image(WHERE, "x", x)
        lengths = check.spacing(WHERE, spacing, x.ndim - 1).tolist()
        given = (("uncertainty", uncertainty), ("atlas", atlas), ("mask", mask))
        maps = {name: None if map is None else _on_grid(name, map, x) for name, map in given}
        if baseline is not None and baseline.shape != x.shape:
            got, advice = check.describe(baseline), "Pass for example torch.zeros_like(x)"
            raise check.refused(WHERE, f"a baseline of the shape {tuple(x.shape)} of x", got, advice)
        with torch.no_grad():
            z = model(x)
        if z.ndim != x.ndim or z.shape[1:] != x.shape[1:]:
            got, advice = check.describe(z), "Bring the output to the grid of the image"
            raise check.refused(WHERE, f"an output on the grid {tuple(x.shape[1:])} of x", got, advice)
        own = maps["mask"]
        where = predicted_mask(z, target, exclusive=exclusive) if own is None else own.bool()
        labels = spatial.parts(where)
        few = [labels == n + 1 for n in range(min(count, int(labels.max())))]
        shapley, lost = _shapley(model, target, few, x, baseline, exclusive)

        def part_score(part: Tensor) -> Score:
            return region(model, target, part, exclusive=exclusive)

        rows = []
        for n in range(int(labels.max())):
            part = few[n] if n < len(few) else labels == n + 1
            row = _Part(part, x, {})
            beyond = "" if n < len(few) else f"only the {count} largest parts are explained"
            if beyond or lost:
                row.none("shapley", beyond or lost)
            with torch.no_grad():
                value = float(region(lambda z: z, target, part, exclusive=exclusive)(z))
            place, share = row.region_of(maps["atlas"], names or {})
            rows.append(
                Component(
                    number=n + 1,
                    voxels=int(part.sum()),
                    volume=int(part.sum()) * math.prod(lengths),
                    centre=row.centre(lengths),
                    score=value,
                    uncertainty=row.uncertainty_of(maps["uncertainty"]),
                    region=place,
                    region_share=share,
                    shapley=tuple(shapley[n] if not beyond else [math.nan] * len(x)),
                    context_share=row.context_of(part_score(part), explain, beyond),
                    radiomics=row.features_of(features, bins, lengths, beyond),
                    missing=row.missing,
                )
            )
        return Components(tuple(rows), labels)

    return described


def _on_grid(name: str, map: Tensor, x: Tensor) -> Tensor:
    check.tensor(WHERE, name, map)
    found = map[0] if map.ndim == x.ndim and len(map) == 1 else map
    if found.shape != x.shape[1:]:
        expected, advice = (
            f"{name} on the grid {tuple(x.shape[1:])} of x",
            "Resample it by nearest neighbours",
        )
        raise check.refused(WHERE, expected, check.describe(map), advice)
    return found.to(x.device)


class _Part(NamedTuple):
    """A part of the image, and why there is no number of it."""

    mask: Tensor
    x: Tensor
    missing: dict[str, str]

    def none(self, what: str, why: str) -> float:
        """Say why there is no number."""
        self.missing[what] = why
        return math.nan

    def centre(self, lengths: Sequence[float]) -> tuple[float, ...]:
        places = self.mask.nonzero().double().mean(0).tolist()
        return tuple(place * length for place, length in zip(places, lengths, strict=True))

    def uncertainty_of(self, map: Tensor | None) -> float:
        if map is None:
            return self.none("uncertainty", "no map was given")
        found = float(map[self.mask].double().mean())
        return self.none("uncertainty", "the map has holes here") if math.isnan(found) else found

    def region_of(self, atlas: Tensor | None, names: Mapping[int, str]) -> tuple[str, float]:
        if atlas is None:
            return "", self.none("region", "no atlas was given")
        numbers, counts = atlas[self.mask].unique(return_counts=True)
        most = int(counts.argmax())  # of equals the smallest number
        number = int(numbers[most])
        name = names.get(number, "outside" if number == 0 else str(number))
        return name, float(counts[most] / counts.sum())

    def context_of(self, score: Score, explain: Callable[[Score], Explain], beyond: str) -> float:
        if beyond:
            return self.none("context_share", beyond)
        try:
            map = explain(score)(self.x)
        except check.Refused as error:
            return self.none("context_share", one_line(error))
        if map.shape[1:] != self.x.shape[1:]:
            return self.none("context_share", "the explanation is not on the grid of the image")
        found = float(metrics.context_share(metrics.given(map))(self.x, mask=self.mask))
        return self.none("context_share", "the explanation is zero") if math.isnan(found) else found

    def features_of(
        self, names: Sequence[str], bins: int, lengths: Sequence[float], beyond: str
    ) -> dict[str, float]:
        channels = range(len(self.x))
        named = {(c, n): n if len(self.x) == 1 else f"channel{c}_{n}" for c in channels for n in names}
        if not names:
            return {}
        nothing = dict.fromkeys(named.values(), math.nan)
        if self.mask.ndim == 1:
            beyond = "they have two or three axes"
        elif int(self.mask.sum()) > MOST_VOXELS:
            beyond = f"the part has more than {MOST_VOXELS} voxels"
        if beyond:
            self.none("radiomics", beyond)
            return nothing
        found: dict[str, float] = {}
        for c in channels:
            try:
                own: Mapping[str, float] = radiomics.features(
                    self.x[c].cpu(), self.mask.cpu(), spacing=lengths, number=bins
                )
            except check.Refused as error:
                self.none("radiomics", one_line(error))
                return nothing
            found |= {named[c, name]: float(own.get(name, math.nan)) for name in names}
        undefined = [name for name, value in found.items() if math.isnan(value)]
        if undefined:
            self.none("radiomics", f"{', '.join(undefined)} not defined for this part")
        return found


def _shapley(
    model: Model, target: int, masks: Sequence[Tensor], x: Tensor, baseline: Tensor | None, exclusive: bool
) -> tuple[list[list[float]], str]:
    """Return the Shapley values of the channels for each part, and why there are none."""
    many = len(x)
    nothing = [[math.nan] * many for _ in masks]
    if baseline is None:
        return nothing, "no baseline was given"
    if many > MOST_CHANNELS:
        return nothing, f"{many} channels take 2^{many} runs; at most {MOST_CHANNELS} are tried"
    if not masks:
        return [], ""
    found = torch.zeros(len(masks), many, dtype=torch.float64)
    for present in product((False, True), repeat=many):
        there = torch.tensor(present, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        with torch.no_grad():
            z = model(torch.where(there, x, baseline))
            values = [region(lambda z: z, target, part, exclusive=exclusive)(z) for part in masks]
        value, size = torch.stack(values).double().cpu(), sum(present)
        for channel, here in enumerate(present):
            # A coalition counts for its members and against the others, by the orders in which it comes up.
            weight = (
                1 / (many * math.comb(many - 1, size - 1))
                if here
                else -1 / (many * math.comb(many - 1, size))
            )
            found[:, channel] += weight * value
    return found.tolist(), ""
