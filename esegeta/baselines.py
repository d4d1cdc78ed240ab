"""What an attribution compares the image with: functions of one example (C,*S).

Baselines live in the network's input space, after normalisation: zero is mean tissue for a z-scored image and
not air, and black is whatever air became. Values that are passed in are values of that space.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import random, spatial
from esegeta.engine import check, levels

Level = float | int | Float[Tensor, "..."]


def _lowest(x: Tensor) -> Tensor:
    return x.amin(tuple(range(1, x.ndim)), keepdim=True)


def _highest(x: Tensor) -> Tensor:
    return x.amax(tuple(range(1, x.ndim)), keepdim=True)


def _level(where: str, name: str, value: object, x: Tensor) -> Tensor:
    """A number or a tensor () or (C,) as a tensor that broadcasts against x."""
    if isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) in ((), (x.shape[0],)):
        return value.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return torch.full((1,) * x.ndim, value, dtype=x.dtype, device=x.device)
    expected = f"{name} to be a finite number or a floating tensor of shape () or ({x.shape[0]},)"
    advice = "Pass one value, or one per channel"
    raise ValueError(check.problem(where, expected, check.describe(value), advice))


def _filled(level: Tensor, x: Tensor) -> Tensor:
    return level.expand(x.shape).clone(memory_format=torch.contiguous_format)


def _box(where: str, low: object, high: object, x: Tensor) -> tuple[Tensor, Tensor]:
    bottom = _lowest(x) if low is None else _level(where, "low", low, x)
    top = _highest(x) if high is None else _level(where, "high", high, x)
    if levels.true_anywhere((bottom > top).detach()):
        advice = "Left out, they are the minimum and maximum of x: pass both in the network's input space"
        raise ValueError(check.problem(where, "low <= high in every channel", "low > high", advice))
    return bottom, top


def zero(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Zero everywhere. After z-scoring this is the mean intensity.

    Args:
        x: one example (C,\*S).

    Returns:
        (C,\*S) -> (C,\*S).

    Example:
        >>> zero(torch.tensor([[1.0, 2.0]])).tolist()
        [[0.0, 0.0]]

    Reference: Sundararajan, Taly and Yan, arXiv:1703.01365.
    """
    return torch.zeros_like(check.floating("zero", "x", x))


def black(x: Float[Tensor, "..."], minimum: Level | None = None) -> Float[Tensor, "..."]:
    r"""The smallest value everywhere.

    .. math:: b_{c,v} = \min_u x_{c,u}

    Args:
        x: one example (C,\*S).
        minimum: the value of black in the network's input space, one or one per channel; by default the
            minimum of each channel of x.

    Returns:
        (C,\*S) -> (C,\*S).

    Example:
        >>> black(torch.tensor([[1.0, 2.0], [5.0, 4.0]])).tolist()
        [[1.0, 1.0], [4.0, 4.0]]

    Reference: Sundararajan, Taly and Yan, arXiv:1703.01365.
    """
    spatial.image("black", "x", x)
    return _filled(_lowest(x) if minimum is None else _level("black", "minimum", minimum, x), x)


def white(x: Float[Tensor, "..."], maximum: Level | None = None) -> Float[Tensor, "..."]:
    r"""The largest value everywhere: with black alone, dark regions would get no attribution.

    .. math:: b_{c,v} = \max_u x_{c,u}

    Args:
        x: one example (C,\*S).
        maximum: the value of white in the network's input space, one or one per channel; by default the
            maximum of each channel of x.

    Returns:
        (C,\*S) -> (C,\*S).

    Example:
        >>> white(torch.tensor([[1.0, 2.0], [5.0, 4.0]])).tolist()
        [[2.0, 2.0], [5.0, 5.0]]

    Reference: Kapishnikov et al., XRAI, arXiv:1906.02825.
    """
    spatial.image("white", "x", x)
    return _filled(_highest(x) if maximum is None else _level("white", "maximum", maximum, x), x)


def mean(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""The mean of each channel, everywhere.

    .. math:: b_{c,v} = \frac{1}{|S|} \sum_u x_{c,u}

    Args:
        x: one example (C,\*S).

    Returns:
        (C,\*S) -> (C,\*S).

    Example:
        >>> mean(torch.tensor([[1.0, 3.0], [5.0, 4.0]])).tolist()
        [[2.0, 2.0], [4.5, 4.5]]

    Reference: Sturmfels, Lundberg and Lee, Visualizing the impact of attribution baselines, Distill 2020.
    """
    return _filled(spatial.image("mean", "x", x).mean(tuple(range(1, x.ndim)), keepdim=True), x)


def blurred(
    x: Float[Tensor, "..."], sigma: float | int | Float[Tensor, ""], spacing: spatial.Spacing | None = None
) -> Float[Tensor, "..."]:
    r"""The image without detail: smoothed by ``spatial.blur``.

    Args:
        x: one example (C,\*S).
        sigma: the standard deviation, in mm if spacing is given, else in voxels.
        spacing: mm per voxel, one per spatial axis.

    Returns:
        (C,\*S) -> (C,\*S).

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 6.0]])
        >>> torch.allclose(blurred(x, 100.0), mean(x))
        True

    Reference: Fong and Vedaldi, arXiv:1704.03296; Sturmfels, Lundberg and Lee, Distill 2020.
    """
    return spatial.blur(x, sigma, spacing)


def uniform(
    x: Float[Tensor, "..."], *, key: random.Key, low: Level | None = None, high: Level | None = None
) -> Float[Tensor, "..."]:
    r"""An image of independent voxels, each uniform between the least and the greatest value of its channel.

    .. math:: b_{c,v} = l_c + (h_c - l_c) u_{c,v}, \qquad u_{c,v} \sim U[0, 1)

    Args:
        x: one example (C,\*S).
        key: of the draw.
        low: the least value, one or one per channel; by default the minimum of each channel of x.
        high: the greatest value, likewise.

    Returns:
        (C,\*S) -> (C,\*S).

    Example:
        >>> b = uniform(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), key=7)
        >>> bool(((b[0] >= 1) & (b[0] <= 3)).all()), b[1].tolist()
        (True, [5.0, 5.0])

    Reference: Sturmfels, Lundberg and Lee, Distill 2020.
    """
    spatial.image("uniform", "x", x)
    bottom, top = _box("uniform", low, high, x)
    u = random.uniform(check.key("uniform", key), x.shape, dtype=x.dtype, device=x.device)
    # The range may be rounded up, but u < 1 by as much: the sum never passes high.
    return bottom + (top - bottom) * u


def farthest_corner(
    x: Float[Tensor, "..."], low: Level | None = None, high: Level | None = None
) -> Float[Tensor, "..."]:
    r"""For each element the end of its range that is farther away: no element is close to its baseline.

    .. math:: b_{c,v} = \arg\max_{b \in \{l_c, h_c\}} |x_{c,v} - b|

    and l in the middle. It is the corner of the box of images that is farthest from x in every norm.

    Args:
        x: one example (C,\*S).
        low: the least value, one or one per channel; by default the minimum of each channel of x.
        high: the greatest value, likewise.

    Returns:
        (C,\*S) -> (C,\*S).

    Example:
        >>> farthest_corner(torch.tensor([[0.0, 2.0, 3.0, 10.0]])).tolist()
        [[10.0, 10.0, 10.0, 0.0]]

    Reference: Sturmfels, Lundberg and Lee, Distill 2020 (maximum distance baseline).
    """
    spatial.image("farthest_corner", "x", x)
    bottom, top = _box("farthest_corner", low, high, x)
    return torch.where((x - bottom).abs() >= (top - x).abs(), bottom, top)


def dataset(samples: Float[Tensor, "..."], *, key: random.Key, count: int) -> Float[Tensor, "..."]:
    r"""Different samples of a data set, drawn without replacement.

    A smaller count draws the first of what a larger count draws.

    Args:
        samples: examples stacked to (n,C,\*S), normalised like the image.
        key: of the draw.
        count: how many, at most n.

    Returns:
        (n,C,\*S) -> (count,C,\*S).

    Example:
        >>> samples = torch.arange(4.0).reshape(4, 1, 1)
        >>> sorted(dataset(samples, key=7, count=4).flatten().tolist())
        [0.0, 1.0, 2.0, 3.0]

    Reference: Erion et al., Expected gradients, arXiv:1906.10670.
    """
    check.floating("dataset", "samples", samples)
    if not 3 <= samples.ndim <= 5:
        advice = "Stack the examples on a new first axis with torch.stack"
        raise ValueError(
            check.problem("dataset", "samples of shape (n,C,*S)", check.describe(samples), advice)
        )
    n = samples.shape[0]
    if check.positive_count("dataset", "count", count) > n:
        raise ValueError(
            check.problem("dataset", f"count <= the {n} samples", str(count), "Pass more samples")
        )
    return samples[random.permutation(check.key("dataset", key), n)[:count]]
