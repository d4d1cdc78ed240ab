"""Which features of an object a segmentation network asks for: they are read along the way to a dreamed one."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esegeta import radiomics, reducers, spatial
from esegeta._types import Model, Score
from esegeta.dreams import optimisers
from esegeta.dreams.climbing import ascend
from esegeta.engine import check
from esegeta.engine.execution import ExecutionWarning

WHERE = "dreams.analysis"

Features = Callable[[Tensor, Tensor], Mapping[str, float]]

# Those of the paper, by the names of ``eg.radiomics.features``.
NAMES = (
    *("statistics_rms", "statistics_mean", "histogram_entropy"),
    *("shape_maximum_diameter", "shape_elongation", "shape_sphericity"),
    *("glcm_contrast", "ngldm_high_dependence_emphasis"),
)


class Analysis(NamedTuple):
    """What a dream was like on its way.

    steps: after how many steps (R,); names: of the features; values: (R, F), NaN where one is undefined, as all are
    of an empty mask; images: (R,C,*S); masks: what the network segmented there, (R,*S); scores: the value of what
    was maximised, (R,); normalised: whether values are in units of a population.
    """

    steps: Tensor
    names: tuple[str, ...]
    values: Tensor
    images: Tensor
    masks: Tensor
    scores: Tensor
    normalised: bool = False

    def curve(self, name: str) -> Tensor:
        """Return the values of one feature, step by step."""
        if name not in self.names:
            raise check.refused(WHERE, "the name of a feature", repr(name), check.nearest(name, self.names))
        return self.values[:, self.names.index(name)]


def analysis(
    model: Model,
    objective: Score,
    *,
    features: Features,
    target: int = 1,
    steps: int = 600,
    rate: float | int = 1.0,
    record: Iterable[int] | None = None,
    by_length: bool = False,
) -> Callable[[Tensor], Analysis]:
    r"""Climb a unit of the output from an image without an object, and read the features of what appears.

    .. math:: X_{j+1} = X_j + \alpha\, \partial F / \partial X, \qquad M_j = \text{the network's mask of } X_j, \qquad
              j \mapsto f_k(X_j, M_j)

    A network that is indifferent to a feature leaves it as it comes; one that relies on it brings it about. Steps are
    constant and nothing is regularised, so that the path is that of the gradient.

    Logits have no largest value, and their gradient may grow many times on the way from a start to an object. So the
    same :math:`\alpha` can be too small to begin with and leave every intensity of the data later. With ``by_length``
    every step has the same length instead, which is the same path walked at one speed.

    Args:
        model: the segmentation network.
        objective: F, such as ``dreams.objectives.voxel(model, target, index=...)``.
        features: (image, mask) -> numbers by name: ``dreams.radiomic(...)``, or a function of your own.
        target: the class that is segmented; that of a network with one channel is 1.
        steps: how many.
        rate: :math:`\alpha`, or the length of a step.
        record: after how many steps; 31 of them by default.
        by_length: whether a step is the gradient divided by its root mean square over the image, times the rate.

    Returns:
        ``(start) -> Analysis``.

    Example:
        >>> found = analysis(
        ...     lambda x: x, lambda x: x[0, 1], steps=4, rate=1.0, record=[0, 4],
        ...     features=lambda image, mask: {"voxels": float(mask.sum())},
        ... )(torch.full((1, 3), -1.0))
        >>> found.curve("voxels").tolist(), found.images[1].tolist()
        ([0.0, 1.0], [[-1.0, 3.0, -1.0]])

    Reference:
        Couteaux, Nempont, Pizaine, Bloch 2019, Towards interpretability of segmentation networks by analyzing
        DeepDreams.
    """
    check.model(WHERE, model)
    check.function(
        WHERE, "features (image, mask) -> numbers by name", features, "Pass dreams.radiomic(spacing=...)"
    )
    n = check.positive_count(WHERE, "steps", steps)
    at = sorted({round(i * n / 30) for i in range(31)} if record is None else set(record))
    climbing = optimisers.sgd(rate)
    if by_length:
        climbing = optimisers.normalised(climbing)

    def look(start: Tensor) -> Analysis:
        segment = torch.no_grad()(lambda x: reducers.predicted_mask(model(x), target))
        if segment(start).any():
            text = (
                f"{WHERE}: the start has voxels of class {target} already: its object's features come first."
            )
            warnings.warn(text, ExecutionWarning, stacklevel=2)
        found = ascend(objective, start, steps=n, optimiser=climbing, record=at)()
        there = [i for i, taken in enumerate(found.steps.tolist()) if taken <= int(found.taken)]
        images, scores, reached = found.images[there], found.values[there], found.steps[there]
        masks = torch.stack([segment(x) for x in images])
        rows = [dict(features(x, mask)) for x, mask in zip(images, masks, strict=True)]
        names = tuple(dict.fromkeys(name for row in rows for name in row))
        values = torch.tensor([[float(row.get(name, math.nan)) for name in names] for row in rows])
        if not masks.any():
            text = (
                f"{WHERE}: no voxel of class {target} was segmented at any step: features of an object are "
                "undefined. Take more steps, or a larger rate."
            )
            warnings.warn(text, ExecutionWarning, stacklevel=2)
        return Analysis(reached, names, values.reshape(len(rows), len(names)), images, masks, scores)

    return look


def radiomic(
    names: Sequence[str] = NAMES,
    *,
    spacing: spatial.Spacing | None = None,
    channel: int = 0,
    width: float | None = None,
    number: int | None = 32,
) -> Features:
    """Return a function to radiomic features of an image and a mask; all NaN where the mask is empty.

    Args:
        names: of ``eg.radiomics.features``, those of the paper by default. Without an aggregation such as
            ``glcm_contrast_2_5D_comb`` a texture is that of the image's own axes, averaged over directions.
        spacing: mm per voxel.
        channel: whose intensities count.
        width: of the bins of grey levels.
        number: of bins, if no width is given.

    Example:
        >>> found = radiomic(["statistics_mean"])(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.eye(2) > 0)
        >>> found
        {'statistics_mean': 2.5}
    """
    for name in names:
        _refuse_unknown(name)
    from_bins = {"width": width} if width is not None else {"number": number}

    def features(image: Tensor, mask: Tensor) -> Mapping[str, float]:
        found = radiomics.features(image[channel], mask, spacing=spacing, **from_bins)
        ending = "3D" if mask.ndim == 3 else "2D"
        whole = {
            name: next((n for n in (f"{name}_{ending}", f"{name}_{ending}_avg") if n in found), name)
            for name in names
        }
        return {name: found[whole[name]] for name in names}

    return features


def _refuse_unknown(name: str) -> None:
    """Refuse a name before a dream is climbed, not after."""
    known = set(radiomics.names().values())
    plain = re.sub(r"_(2D|2_5D|3D)(_avg|_comb)?$", "", str(name))
    if plain not in known:
        near = check.nearest(plain, known)
        raise check.refused("dreams.radiomic", "the name of a feature", repr(name), near)


def normalised(found: Analysis, population: Sequence[Mapping[str, float]]) -> Analysis:
    r"""Return an analysis in units of a population, :math:`(f_k - \mu_k) / \sigma_k`: 0 is its mean.

    Args:
        found: from ``dreams.analysis``.
        population: the same features of real objects, such as those of the validation set. What is NaN is left out.

    Example:
        >>> found = Analysis(torch.arange(2), ("size",), torch.tensor([[3.0], [5.0]]), *[torch.zeros(2)] * 3)
        >>> normalised(found, [{"size": 1.0}, {"size": 5.0}]).values.flatten().tolist()
        [0.0, 1.0]
    """
    rows = [[float(row.get(name, math.nan)) for name in found.names] for row in population]
    table = torch.tensor(rows, dtype=found.values.dtype).reshape(len(rows), len(found.names))
    mean = table.nanmean(0)
    spread = (table - mean).square().nanmean(0).sqrt()
    scaled = (found.values - mean) / torch.where(spread > 0, spread, math.nan)
    return found._replace(values=scaled, normalised=True)
