"""Steps that change values, to the scale that a network was trained on; maps need no way back."""

from collections.abc import Callable
from typing import Any

import numpy as np

from esegeta._registry import step
from esegeta.engine import check
from esegeta.run.volumes.prepared import Prepared, Step, changed, each, numbers
from esegeta.run.volumes.reading import Array

HOW = ("zscore", "minmax", "maximum", "percentiles", "fixed")
OVER = ("all", "nonzero")


def _measured(how: str, values: Array, low: float, high: float) -> tuple[float, float]:
    """What is subtracted, and by what is divided then."""
    if how == "zscore":
        return float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    if how == "minmax":
        return float(values.min()), float(values.max()) - float(values.min())
    if how == "maximum":
        return 0.0, float(values.max())
    least, most = (float(v) for v in np.percentile(values, (low, high)))
    return least, most - least


def _scaler(how: str, over: str, low: float, high: float) -> Callable[[Array], tuple[Array, float, float]]:
    """The function of a channel that normalises it by its own values: the result, its shift and its scale."""

    def scaled(channel: Array) -> tuple[Array, float, float]:
        inside = channel != 0 if over == "nonzero" else np.ones(channel.shape, dtype=bool)
        if not inside.any():
            advice = 'Leave out over = "nonzero", or leave out the file'
            raise check.refused("normalise", "a channel that is not 0 everywhere", "zeros", advice)
        shift, scale = _measured(how, channel[inside], low, high)
        if not scale > 0:
            expected = f'a channel with a scale > 0 for how = "{how}"'
            got = f"values from {channel[inside].min():.6g} to {channel[inside].max():.6g}"
            advice = 'Use how = "fixed", or leave out the file'
            raise check.refused("normalise", expected, got, advice)
        values = (channel - shift) / scale
        if how == "percentiles":
            values = values.clip(0, 1)
        return np.where(inside, values, 0).astype(channel.dtype), shift, scale

    return scaled


@step(family="intensities", example={"low": 0.0})
def clip(low: float | int | None = None, high: float | int | None = None) -> Step:
    """Bring what lies outside of two values to the nearer one, Hounsfield units for example.

    Args:
        low: the smallest value that stays, or none.
        high: the largest.
    """
    name, advice = "clip", "Pass numbers, low below high"
    least, most = (
        default if v is None else numbers(name, "low and high", v, advice)[0]
        for v, default in ((low, -np.inf), (high, np.inf))
    )
    if least >= most or (low is None and high is None):
        raise check.refused(name, "low < high, or one of them", f"{low!r} and {high!r}", advice)

    def run(now: Prepared) -> Prepared:
        return changed(now, now.data.numpy().clip(least, most), {"step": name, "low": low, "high": high})

    return run


@step(family="intensities")
def normalise(
    how: str = "zscore",
    over: str = "all",
    low: float | int | None = None,
    high: float | int | None = None,
    mean: Any = None,
    std: Any = None,
) -> Step:
    r"""Shift and scale the values of each channel, :math:`(x - m) / s`. Attributions are for the result.

    Args:
        how: "zscore": by mean and standard deviation; "minmax": to 0...1; "maximum": divided by it; "percentiles":
            two of them to 0 and 1, and what is beyond clipped; "fixed": by numbers that are given.
        over: which voxels are measured and changed: "all", or "nonzero", where 0 stays 0.
        low: for "percentiles", in percent; 0.5 if nothing is said.
        high: likewise; 99.5.
        mean: for "fixed": m, for each channel or for all; 0 if nothing is said.
        std: for "fixed": s; 1. Divide by 255 with std = 255.
    """
    name = "normalise"
    check.one_of(name, "how", how, HOW)
    check.one_of(name, "over", over, OVER)
    owners = {"low": "percentiles", "high": "percentiles", "mean": "fixed", "std": "fixed"}
    for word, value in (("low", low), ("high", high), ("mean", mean), ("std", std)):
        if value is not None and how != owners[word]:
            expected = f'{word} for how = "{owners[word]}" only'
            raise check.refused(name, expected, f'how = "{how}"', f"Leave out {word}")
    if how == "fixed":
        return _fixed(name, over, mean, std)
    (least,) = numbers(name, "low", 0.5 if low is None else low, "Pass percent")
    (most,) = numbers(name, "high", 99.5 if high is None else high, "Pass percent")
    if not 0 <= least < most <= 100:
        expected = "percentiles 0 <= low < high <= 100"
        raise check.refused(name, expected, f"{least} and {most}", "Pass for example 0.5 and 99.5")
    scale = _scaler(how, over, float(least), float(most))

    def run(now: Prepared) -> Prepared:
        channels, shifts, scales = zip(*(scale(channel) for channel in now.data.numpy()), strict=True)
        record = {"step": name, "how": how, "over": over, "shift": list(shifts), "scale": list(scales)}
        return changed(now, np.stack(channels), record)

    return run


def _fixed(name: str, over: str, mean: Any, std: Any) -> Step:
    advice = "Pass one for each channel, or one number"
    if over != "all":
        raise check.refused(name, 'over = "all" for how = "fixed"', repr(over), "Leave out over")
    if mean is None and std is None:
        raise check.refused(name, 'mean or std for how = "fixed"', "none", advice)
    shift = numbers(name, "mean", 0.0 if mean is None else mean, advice)
    scale = numbers(name, "std", 1.0 if std is None else std, advice, positive=True)

    def run(now: Prepared) -> Prepared:
        m = each(name, "mean", shift, len(now.data), "channel")
        s = each(name, "std", scale, len(now.data), "channel")
        columns = [np.reshape(v, (-1, *(1,) * (now.data.ndim - 1))).astype(np.float64) for v in (m, s)]
        record = {"step": name, "how": "fixed", "shift": list(m), "scale": list(s)}
        return changed(now, (now.data.numpy() - columns[0]) / columns[1], record)

    return run
