"""Is a number good? It stands beside that of random maps with the same values and the same smoothness."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from esegeta import random
from esegeta._registry import null as null_
from esegeta._types import Explain, Score
from esegeta.engine import check
from esegeta.engine.sharing import sharing
from esegeta.methods.random_cam import random_cam as cam
from esegeta.metrics.declared import direction
from esegeta.metrics.explanations import attribution, given, says
from esegeta.spatial import upsample

Null = Callable[..., Tensor]


@null_(family="same values", paper="Schreiber, Schmitz 1996, PRL 77", example={"steps": 3})
def surrogate(a: Tensor, key: Any, *, steps: int = 30) -> Tensor:
    r"""Return a random map with exactly the values of another and about its spectrum: as smooth, but elsewhere.

    Iterated amplitude-adjusted Fourier transforms: the amplitudes of the map are put on the phases of a random
    order of its values, then its values on the ranks of what comes, and again. Each channel has draws of its own.

    Args:
        a: the map (C,\*S).
        key: of the draw.
        steps: how often.

    Returns:
        (C,\*S) with the same values in every channel.

    Example:
        >>> a = torch.linspace(0, 1, 16).reshape(1, 16).sin()
        >>> b = surrogate(a, 3)
        >>> torch.equal(b.sort().values, a.sort().values)
        True

    Reference:
        Schreiber, Schmitz 1996, Improved surrogate data for nonlinearity tests, PRL 77.
    """
    word = check.key("metrics.surrogate", key)
    wide = a.to(torch.float64)
    axes = tuple(range(1, a.ndim))
    amplitude = torch.fft.rfftn(wide, dim=axes).abs()
    values = wide.flatten(1).sort(dim=1).values
    orders = [
        random.permutation(random.fold_in(word, c), values.shape[1], device=a.device) for c in range(len(a))
    ]
    found = torch.stack([row[order] for row, order in zip(values, orders, strict=True)]).reshape(a.shape)
    for _ in range(steps):
        phase = torch.fft.rfftn(found, dim=axes)
        size = phase.abs()
        turned = amplitude * phase / torch.where(size > 0, size, 1)
        field = torch.fft.irfftn(turned, s=a.shape[1:], dim=axes).flatten(1)
        ranks = field.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        found = values.gather(1, ranks).reshape(a.shape)
    return found.to(a.dtype)


def spectrum_residual(a: Tensor, b: Tensor) -> Tensor:
    """Return the distance of two spectra of amplitudes, relative to the first, without the mean.

    >>> spectrum_residual(torch.rand(1, 8), torch.rand(1, 8)).item() > 0
    True
    """
    axes = tuple(range(1, a.ndim))
    one, two = (torch.fft.rfftn((t - t.mean(axes, keepdim=True)).double(), dim=axes).abs() for t in (a, b))
    size = one.square().sum().sqrt()
    return (one - two).square().sum().sqrt() / torch.where(size > 0, size, torch.nan)


@null_(family="same form", paper="definition")
def shifted(a: Tensor, key: Any) -> Tensor:
    """Return a map moved by a random number of voxels along every axis; what leaves on one side enters on the other.

    >>> sorted(shifted(torch.tensor([[1.0, 2.0, 3.0]]), 3)[0].tolist())
    [1.0, 2.0, 3.0]
    """
    word = check.key("metrics.shifted", key)
    for axis, n in enumerate(a.shape[1:], 1):
        step = random.integers(random.fold_in(word, axis), (), low=0, high=n, device=a.device)
        index = (torch.arange(n, device=a.device) - step) % n
        a = a.index_select(axis, index)
    return a


def random_cam(score: Score, place: str) -> Null:
    r"""Return a null of the channels of a layer, added up with random weights: what the layer alone is worth.

    .. math:: \sum_d w_d A_d(x), \qquad w_d \sim \mathcal{U}(-1, 1)

    brought to the grid of the image. It has neither the values nor the smoothness of the map, but that of the
    network: what it scores is owed to the layer and not to the explanation.

    Args:
        score: the score, or the model, that has the place.
        place: a layer with a grid; ``esegeta.places`` lists them.

    Returns:
        ``(map, key, x) -> (1,*S)``.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: eg.mark(2 * x, "layer").sum()
        >>> random_cam(score, "layer")(torch.ones(1, 3), 0, torch.ones(1, 3)).shape
        torch.Size([1, 3])

    Reference:
        Defined by its implementation, RandomCAM of pytorch-grad-cam.
    """
    drawn = cam(score, place)

    def null(a: Tensor, key: Any, x: Tensor) -> Tensor:  # noqa: ARG001
        return upsample(drawn(x, key=key), like=x)

    return null


class Calibrated(NamedTuple):
    """A number beside those of random maps.

    value: of the map; null_mean: of the random ones; low, high: between which 95 % of these lie; p: the chance of a
    number as good or better for a random map, (1 + how many are) / (1 + how many there are); a random map without a
    number, NaN, is left out.
    """

    value: Tensor
    null_mean: Tensor
    low: Tensor
    high: Tensor
    p: Tensor


def calibrated(
    metric: Callable[..., Callable[..., Any]],
    *,
    null: Null = surrogate,
    draws: int = 99,
    better: Literal["higher", "lower"] | None = None,
) -> Callable[..., Callable[..., Calibrated]]:
    """Return a metric that says how a map does beside random ones.

    Args:
        metric: of a finished map, ``metrics.roc_auc`` or ``functools.partial(metrics.deletion, steps=16)``. Of a
            curve the area counts.
        null: from (map, key) to a random map: ``metrics.surrogate`` has the same values and smoothness,
            ``metrics.shifted`` the same form elsewhere; from (map, key, x), ``metrics.random_cam(score, place)``.
        draws: how many random maps.
        better: whether higher or lower numbers are better; the metric's own declaration by default.

    Returns:
        ``(explain, ...) -> (x, *refs, key=, ...) -> Calibrated``, called as the metric itself.

    Example:
        >>> from esegeta.metrics import roc_auc
        >>> mask = torch.zeros(8, 8, dtype=torch.bool)
        >>> mask[2:5, 2:5] = True
        >>> judged = calibrated(roc_auc, draws=19)(given(mask[None].float()))
        >>> found = judged(torch.zeros(1, 8, 8), mask=mask, key=0)
        >>> found.value.item(), found.p.item()
        (1.0, 0.05)
    """
    where = "metrics.calibrated"
    check.positive_count(where, "draws", draws)
    way = better or direction(metric)
    if way not in ("higher", "lower"):
        name = getattr(getattr(metric, "func", metric), "__name__", "the metric")
        raise check.refused(where, 'better="higher" or "lower"', f"nothing for {name}", "Say which")

    needs_image = "x" in inspect.signature(null).parameters

    def judged(explain: Explain, *args: Any, **settings: Any) -> Callable[..., Calibrated]:
        contributions = says(explain, "multiplied")

        def measure(x: Tensor, *refs: Tensor, key: Any = None, **called: Any) -> Calibrated:
            word = check.key(where, key)
            a = attribution(where, explain, x, refs, random.fold_in(word, 0)).to(x.dtype)

            def number(map: Tensor) -> Tensor:
                known = {} if contributions is None else {"multiplied": contributions}
                found = metric(given(map, **known), *args, **settings)(
                    x, *refs, key=random.fold_in(word, 1), **called
                )
                return getattr(found, "area", found).to(torch.float64)

            draw = random.fold_in(word, 2)
            seen = (x,) if needs_image else ()
            with sharing():  # perturbations and ends of curves are those of every map
                value = number(a)
                others = torch.stack([number(null(a, random.fold_in(draw, n), *seen)) for n in range(draws)])
            defined = others.isfinite()
            as_good = defined & (others >= value if way == "higher" else others <= value)
            low, high = (torch.nanquantile(others, q) for q in (0.025, 0.975))
            p = (1 + as_good.sum()).to(torch.float64) / (1 + defined.sum())
            known = defined.any() & ~value.isnan()
            return Calibrated(value, others.nanmean(), low, high, torch.where(known, p, torch.nan))

        return measure

    functools.update_wrapper(judged, metric)  # it takes what the metric takes
    judged.better = way  # type: ignore[attr-defined]
    return judged
