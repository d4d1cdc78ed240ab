"""How a dream moves along its gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esegeta import spatial
from esegeta._registry import optimiser
from esegeta.engine import check

Rate = float | int | Callable[[int], float]

_TINY = 1e-12


class Optimiser(NamedTuple):
    """A way to climb.

    begin: from the point to the memory before the first step, a tree of tensors.
    update: (number of the step, point, gradient, memory) -> (next point, next memory).
    """

    begin: Callable[[Tensor], Any]
    update: Callable[[int, Tensor, Tensor, Any], tuple[Tensor, Any]]


def _rate(name: str, rate: object) -> Callable[[int], float]:
    if callable(rate):
        return rate
    fixed = check.non_negative(f"dreams.{name}", "rate", rate)
    return lambda k: fixed  # noqa: ARG005


def _optimiser(name: str, value: object) -> None:
    if not isinstance(value, Optimiser):
        got, advice = check.describe(value), "Pass for example dreams.optimisers.adam()"
        raise check.refused_type(f"dreams.{name}", "an optimiser", got, advice)


@optimiser(paper="Kingma, Ba 2015, arXiv:1412.6980")
def adam(
    rate: Rate = 0.05, *, fast: float | int = 0.9, slow: float | int = 0.999, decay: float | int = 0.0
) -> Optimiser:
    """Climb by Adam: every coordinate at about the same speed, whatever the size of its gradient.

    Args:
        rate: of a step, or a function from the number of the step to it.
        fast: how much the mean of the gradients keeps from step to step.
        slow: how much the mean of their squares keeps.
        decay: how much the point shrinks, times the rate.

    Example:
        >>> climbing = adam(0.1)
        >>> z = torch.zeros(2)
        >>> [round(v, 3) for v in climbing.update(0, z, torch.tensor([5.0, -0.01]), climbing.begin(z))[0].tolist()]
        [0.1, -0.1]
    """
    speed = _rate("adam", rate)
    for name, value in (("fast", fast), ("slow", slow)):
        if not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise check.refused("dreams.adam", f"{name} in [0, 1)", repr(value), "0.9 and 0.999 are usual")
    shrinking = check.non_negative("dreams.adam", "decay", decay)

    def update(k: int, z: Tensor, g: Tensor, memory: Any) -> tuple[Tensor, Any]:
        mean, square = memory
        mean, square = fast * mean + (1 - fast) * g, slow * square + (1 - slow) * g.square()
        size = (square / (1 - slow ** (k + 1))).sqrt() + _TINY
        move = mean / (1 - fast ** (k + 1)) / size
        return z + speed(k) * (move - shrinking * z), (mean, square)

    return Optimiser(lambda z: (torch.zeros_like(z), torch.zeros_like(z)), update)


@optimiser(example={"rate": 0.1})
def sgd(rate: Rate, *, momentum: float | int = 0.0, decay: float | int = 0.0) -> Optimiser:
    r"""Climb along the gradient, :math:`v \leftarrow m v + g`, :math:`z \leftarrow z + r (v - d z)`.

    Without momentum and decay these are the constant steps of a DeepDream analysis.

    Args:
        rate: of a step, or a function from the number of the step to it.
        momentum: how much of the last move goes on.
        decay: how much the point shrinks, times the rate.

    Example:
        >>> climbing = sgd(0.5)
        >>> z = torch.ones(1)
        >>> climbing.update(0, z, torch.tensor([4.0]), climbing.begin(z))[0].item()
        3.0
    """
    speed = _rate("sgd", rate)
    keeps = check.non_negative("dreams.sgd", "momentum", momentum)
    shrinking = check.non_negative("dreams.sgd", "decay", decay)

    def update(k: int, z: Tensor, g: Tensor, memory: Any) -> tuple[Tensor, Any]:
        move = keeps * memory + g
        return z + speed(k) * (move - shrinking * z), move

    return Optimiser(torch.zeros_like, update)


@optimiser(example={"inner": sgd(0.1)})
def normalised(inner: Optimiser) -> Optimiser:
    """Divide the gradient by its root mean square first: steps of the same length at every height.

    Example:
        >>> climbing = normalised(sgd(1.0))
        >>> z = torch.zeros(2)
        >>> z, _ = climbing.update(0, z, torch.tensor([30.0, 40.0]), climbing.begin(z))
        >>> round(z.square().mean().item(), 3)
        1.0
    """
    _optimiser("normalised", inner)

    def update(k: int, z: Tensor, g: Tensor, memory: Any) -> tuple[Tensor, Any]:
        size = g.square().mean().sqrt()
        return inner.update(k, z, g / torch.where(size > 0, size, 1), memory)

    return Optimiser(inner.begin, update)


@optimiser(example={"inner": sgd(0.1), "size": 0.1})
def clipped(inner: Optimiser, *, size: float | int) -> Optimiser:
    """Shorten a gradient whose norm is above ``size`` to it.

    Example:
        >>> climbing = clipped(sgd(1.0), size=1.0)
        >>> z = torch.zeros(1)
        >>> climbing.update(0, z, torch.tensor([30.0]), climbing.begin(z))[0].item()
        1.0
    """
    _optimiser("clipped", inner)
    most = check.non_negative("dreams.clipped", "size", size)

    def update(k: int, z: Tensor, g: Tensor, memory: Any) -> tuple[Tensor, Any]:
        norm = g.square().sum().sqrt()
        return inner.update(k, z, g * torch.where(norm > most, most / norm, 1), memory)

    return Optimiser(inner.begin, update)


@optimiser(example={"inner": sgd(0.1), "every": 2}, paper="Yosinski et al. 2015, arXiv:1506.06579")
def smoothed(
    inner: Optimiser, *, every: int = 4, sigma: float | int = 1.0, spacing: spatial.Spacing | None = None
) -> Optimiser:
    """Blur the image after every few steps, which takes away fine noise that the gradient keeps adding.

    For dreams whose parameters are voxels.

    Args:
        inner: how the other steps are made.
        every: how many steps from blur to blur.
        sigma: of the blur, in mm if ``spacing`` is given, else in voxels.
        spacing: mm per voxel.

    Example:
        >>> climbing = smoothed(sgd(1.0), every=1)
        >>> z = torch.zeros(1, 9)
        >>> g = torch.zeros(1, 9)
        >>> g[0, 4] = 1
        >>> bool(climbing.update(0, z, g, climbing.begin(z))[0][0, 4] < 0.5)
        True
    """
    _optimiser("smoothed", inner)
    n, width = (
        check.positive_count("dreams.smoothed", "every", every),
        check.non_negative("dreams.smoothed", "sigma", sigma),
    )

    def update(k: int, z: Tensor, g: Tensor, memory: Any) -> tuple[Tensor, Any]:
        z, memory = inner.update(k, z, g, memory)
        return (spatial.blur(z, width, spacing) if (k + 1) % n == 0 else z), memory

    return Optimiser(inner.begin, update)
