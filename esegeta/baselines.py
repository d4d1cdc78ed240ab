"""What an attribution compares the image with: functions of one example (C,*S).

Baselines live in the network's input space, after normalisation: zero is mean tissue for a z-scored image and
not air, and black is whatever air became. Values that are passed in are values of that space.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from esegeta import harmonic, random, spatial
from esegeta._registry import baseline, fill
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
        return torch.full((1,) * x.ndim, float(value), dtype=x.dtype, device=x.device)
    expected = f"{name} to be a finite number or a floating tensor of shape () or ({x.shape[0]},)"
    advice = "Pass one value, or one per channel"
    raise check.refused(where, expected, check.describe(value), advice)


def _filled(level: Tensor, x: Tensor) -> Tensor:
    return level.expand(x.shape).clone(memory_format=torch.contiguous_format)


def _box(where: str, low: object, high: object, x: Tensor) -> tuple[Tensor, Tensor]:
    bottom = _lowest(x) if low is None else _level(where, "low", low, x)
    top = _highest(x) if high is None else _level(where, "high", high, x)
    if levels.true_anywhere((bottom > top).detach()):
        advice = "Left out, they are the minimum and maximum of x: pass both in the network's input space"
        raise check.refused(where, "low <= high in every channel", "low > high", advice)
    return bottom, top


@baseline(family="constant", paper="arXiv:1703.01365")
def zero(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Return zero everywhere. After z-scoring this is the mean intensity.

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


@baseline(family="constant", paper="Sundararajan, Taly, Yan 2017, arXiv:1703.01365")
def black(x: Float[Tensor, "..."], minimum: Level | None = None) -> Float[Tensor, "..."]:
    r"""Return the smallest value everywhere.

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


@baseline(family="constant", paper="Kapishnikov et al. 2019, arXiv:1906.02825")
def white(x: Float[Tensor, "..."], maximum: Level | None = None) -> Float[Tensor, "..."]:
    r"""Return the largest value everywhere: with black alone, dark regions would get no attribution.

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


@baseline(family="constant", paper="Zeiler, Fergus 2014, arXiv:1311.2901", example={"value": 0.5})
def constant(x: Float[Tensor, "..."], value: Level) -> Float[Tensor, "..."]:
    r"""Return one value everywhere.

    Args:
        x: one example (C,\*S).
        value: in the network's input space, one or one per channel.

    Returns:
        (C,\*S) -> (C,\*S).

    Example:
        >>> constant(torch.tensor([[1.0, 2.0], [5.0, 4.0]]), torch.tensor([3.0, 7.0])).tolist()
        [[3.0, 3.0], [7.0, 7.0]]

    Reference: Zeiler and Fergus, arXiv:1311.2901 (a grey square).
    """
    spatial.image("constant", "x", x)
    return _filled(_level("constant", "value", value, x), x)


@baseline(family="constant", paper="Sturmfels, Lundberg, Lee, Distill 2020")
def mean(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Return the mean of each channel, everywhere.

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


@baseline(family="of the image", paper="Fong, Vedaldi 2017, arXiv:1704.03296", example={"sigma": 1.0})
def blurred(
    x: Float[Tensor, "..."], sigma: float | int | Float[Tensor, ""], spacing: spatial.Spacing | None = None
) -> Float[Tensor, "..."]:
    r"""Return the image without detail: smoothed by ``spatial.blur``.

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


@baseline(family="random", paper="Sturmfels, Lundberg, Lee, Distill 2020", example={"key": 7})
def uniform(
    x: Float[Tensor, "..."], *, key: random.Key, low: Level | None = None, high: Level | None = None
) -> Float[Tensor, "..."]:
    r"""Draw an image of independent voxels, each uniform between the extremes of its channel.

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


@baseline(family="random", paper="Sturmfels, Lundberg, Lee, Distill 2020", example={"key": 7})
def normal(
    x: Float[Tensor, "..."], *, key: random.Key, centre: Level | None = None, sigma: Level | None = None
) -> Float[Tensor, "..."]:
    r"""Draw an image of independent voxels, each from the normal distribution of its channel.

    .. math:: b_{c,v} = \mu_c + \sigma_c z_{c,v}, \qquad z_{c,v} \sim N(0, 1)

    Args:
        x: one example (C,\*S).
        key: of the draw.
        centre: :math:`\mu`, one or one per channel; by default the mean of each channel of x.
        sigma: likewise; by default the standard deviation of each channel of x.

    Returns:
        (C,\*S) -> (C,\*S).

    Example:
        >>> b = normal(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), key=7)
        >>> bool((b[0] != 2).all()), b[1].tolist()
        (True, [5.0, 5.0])

    Reference: Sturmfels, Lundberg and Lee, Distill 2020.
    """
    spatial.image("normal", "x", x)
    axes = tuple(range(1, x.ndim))
    middle = x.mean(axes, keepdim=True)
    if sigma is None:
        width = (x - middle).square().mean(axes, keepdim=True).sqrt()
    else:
        width = _level("normal", "sigma", sigma, x)
    z = random.normal(check.key("normal", key), x.shape, dtype=x.dtype, device=x.device)
    return (middle if centre is None else _level("normal", "centre", centre, x)) + width * z


@baseline(family="of the image", paper="Sturmfels, Lundberg, Lee, Distill 2020")
def farthest_corner(
    x: Float[Tensor, "..."], low: Level | None = None, high: Level | None = None
) -> Float[Tensor, "..."]:
    r"""Return for each element the end of its range that is farther away: none is close to its baseline.

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
    r"""Draw different samples of a data set, without replacement.

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
        raise check.refused("dataset", "samples of shape (n,C,*S)", check.describe(samples), advice)
    n = samples.shape[0]
    if check.positive_count("dataset", "count", count) > n:
        raise check.refused("dataset", f"count <= the {n} samples", str(count), "Pass more samples")
    return samples[random.permutation(check.key("dataset", key), n)[:count]]


def another(samples: Float[Tensor, "..."], *, key: random.Key) -> Float[Tensor, "..."]:
    r"""Draw one sample of a data set at random: the first of ``dataset(samples, key=key, count=1)``.

    Args:
        samples: examples stacked to (n,C,\*S), normalised like the image.
        key: of the draw.

    Returns:
        (n,C,\*S) -> (C,\*S).

    Example:
        >>> another(torch.full((4, 1, 1), 3.0), key=7).tolist()
        [[3.0]]

    Reference: Erion et al., Expected gradients, arXiv:1906.10670.
    """
    return dataset(samples, key=key, count=1)[0]


# --- Fills: what is shown of x where ``keep``, in [0, 1], says how much ----------------------------------------


def continued(
    x: Float[Tensor, "..."],
    hidden: Bool[Tensor, "..."],
    *,
    spacing: spatial.Spacing | None = None,
    steps: int = 12,
) -> Float[Tensor, "..."]:
    r"""Fill a hole in the image with the smoothest continuation of what is around it.

    .. math:: \sum_a \frac{f_{v + e_a} - 2 f_v + f_{v - e_a}}{h_a^2} = 0 \text{ where hidden}, \qquad
              f = x \text{ elsewhere}

    Laplace's equation; at the border of the volume a face through which nothing flows. It keeps slopes and
    constants, and no value leaves the range of those around the hole. Solved by conjugate gradients with a
    multigrid preconditioner, a fixed number of steps: on holes of any shape up to 256 squared and 64 cubed, 12 leave
    a residual below :math:`10^{-6}` of the range and 20 below :math:`10^{-11}`; where one spacing is three times
    another, an error of :math:`2 \cdot 10^{-5}` and :math:`10^{-7}`, where it is five times, of
    :math:`10^{-3}` and :math:`10^{-5}`.

    Args:
        x: one example (C,\*S).
        hidden: the hole, of shape (\*S), (1,\*S) or (C,\*S); in every channel something has to be left.
        spacing: h, mm per voxel, one per spatial axis.
        steps: of the solver.

    Returns:
        (C,\*S) -> (C,\*S).

    Example:
        >>> x = torch.tensor([[0.0, 9.0, -9.0, 9.0, 4.0]])
        >>> hole = torch.tensor([False, True, True, True, False])
        >>> torch.allclose(continued(x, hole), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
        True

    Reference: Perez, Gangnet and Blake, Poisson image editing, SIGGRAPH 2003, equation 2.
    """
    spatial.image("continued", "x", x)
    where = check.tensor("continued", "hidden", hidden)
    where = where[None] if where.ndim == x.ndim - 1 else where
    if where.dtype != torch.bool or where.shape[1:] != x.shape[1:] or where.shape[0] not in (1, x.shape[0]):
        expected, advice = f"a boolean mask on the grid {tuple(x.shape[1:])}", "Pass for example labels == 3"
        raise check.refused("continued", expected, check.describe(hidden), advice)
    if levels.true_anywhere(where.flatten(1).all(1)):
        advice = "Leave some of the image, or use a constant"
        raise check.refused("continued", "a hole with something around it", "all of a channel", advice)
    return _continued("continued", x, where, spacing, steps)


@fill(family="of the surroundings", paper="Perez, Gangnet, Blake, SIGGRAPH 2003", leads=3)
def inpainted(
    x: Float[Tensor, "..."],
    baseline: Float[Tensor, "..."],
    keep: Float[Tensor, "..."],
    *,
    spacing: spatial.Spacing | None = None,
    steps: int = 12,
) -> Float[Tensor, "..."]:
    r"""Continue what is not kept smoothly from what is around it: no edges, no values that x does not have.

    .. math:: k\, x + (1 - k)\, f

    with f of ``continued``, of which all is hidden that is not wholly kept. For methods that replace parts:
    ``feature_ablation(score, fill=inpainted)``.

    Args:
        x: one example (C,\*S).
        baseline: likewise, for channels of which nothing is kept.
        keep: how much is kept, in [0, 1]; broadcasts against x.
        spacing: mm per voxel, one per spatial axis; give it with ``functools.partial(inpainted, spacing=...)``.
        steps: of the solver.

    Returns:
        (x, baseline, keep) -> (C,\*S).

    Example:
        >>> x, keep = torch.tensor([[0.0, 9.0, 2.0]]), torch.tensor([[1.0, 0.0, 1.0]])
        >>> torch.allclose(inpainted(x, 0 * x, keep), torch.tensor([[0.0, 1.0, 2.0]]))
        True

    Reference: Perez, Gangnet and Blake, Poisson image editing, SIGGRAPH 2003, equation 2.
    """
    keep = keep.to(x.dtype).expand(-1, *x.shape[1:])
    hidden = keep < 1
    filled = _continued("inpainted", x, hidden, spacing, steps)
    filled = torch.where(hidden.flatten(1).all(1).reshape(-1, *[1] * (x.ndim - 1)), baseline, filled)
    return keep * x + (1 - keep) * filled


def _continued(where: str, x: Tensor, hidden: Tensor, spacing: spatial.Spacing | None, steps: int) -> Tensor:
    units = check.spacing(where, spacing, x.ndim - 1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = check.positive_count(where, "steps", steps)
    return harmonic.solve(wide, hidden.expand(x.shape), (1 / units.square()).tolist(), count).to(x.dtype)


@fill(
    family="of the image",
    paper="Fong, Patrick, Vedaldi 2019, arXiv:1910.08485",
    example={"sigma": 1.0, "levels": 3},
)
def defocused(
    sigma: float | int = 20, *, levels: int = 8, spacing: spatial.Spacing | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    r"""Return a fill that blurs the more, the less is kept.

    .. math:: (1 - t)\, g_{\sigma_l} * x + t\, g_{\sigma_{l+1}} * x, \qquad l + t = (L - 1)\, k, \qquad
              \sigma_l = \sigma \left(1 - \tfrac{l}{L - 1}\right)

    from wholly blurred at k = 0 to x at k = 1, between L images. The baseline plays no part.

    Args:
        sigma: the largest blur, in mm if spacing is given, else in voxels.
        levels: L, how many images there are, with x itself.
        spacing: mm per voxel, one per spatial axis.

    Returns:
        ``(x, baseline, keep) -> like x``.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 6.0]])
        >>> fill = defocused(2.0)
        >>> torch.equal(fill(x, x, torch.ones(1, 3)), x)
        True
        >>> torch.allclose(fill(x, x, torch.zeros(1, 3)), blurred(x, 2.0))
        True

    Reference: Fong, Patrick and Vedaldi, arXiv:1910.08485, section 3.3.
    """
    many = check.positive_count("defocused", "levels", levels, least=2)
    widest = check.non_negative("defocused", "sigma", sigma)

    def fill(x: Tensor, baseline: Tensor, keep: Tensor) -> Tensor:  # noqa: ARG001
        place = keep.to(x.dtype) * (many - 1)
        # At a level itself the slope is that from below: what is wholly kept can still be lost.
        below = (place.detach().ceil() - 1).clamp(0, many - 2)
        part = place - below
        out = torch.zeros_like(x)
        for level in range(many):
            weight = torch.where(below == level, 1 - part, torch.where(below == level - 1, part, 0))
            sharp = x if level == many - 1 else spatial.blur(x, widest * (1 - level / (many - 1)), spacing)
            out = out + weight * sharp
        return out

    return fill


@fill(family="random", paper="Breiman, Machine Learning 45, 2001", example={"key": 7})
def shuffled(*, key: random.Key) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    r"""Return a fill that permutes the voxels that are not wholly kept among themselves.

    .. math:: k_v\, x_v + (1 - k_v)\, x_{\pi(v)}

    with :math:`\pi` uniform over the permutations of what is hidden. Channels move together where they are hidden
    together, and each by itself where ``keep`` says so for each.

    Args:
        key: of the draw: one permutation for each part.

    Returns:
        ``(x, baseline, keep) -> like x``.

    Example:
        >>> x, keep = torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[0.0, 0.0, 0.0, 1.0]])
        >>> y = shuffled(key=7)(x, x, keep)
        >>> sorted(y[0, :3].tolist()), y[0, 3].item()
        ([1.0, 2.0, 3.0], 9.0)

    Reference: Breiman, Random forests, Machine Learning 45, 2001, section 10.
    """
    known = check.key("shuffled", key)

    def fill(x: Tensor, baseline: Tensor, keep: Tensor) -> Tensor:  # noqa: ARG001
        keep = keep.to(x.dtype).expand(-1, *x.shape[1:])
        hidden = (keep < 1).flatten(1)
        words = random.bits(known, hidden.shape, device=x.device)
        # Both orders list the hidden voxels first, one as they lie and one at random, and the others alike.
        lying = (~hidden).to(torch.int8).sort(dim=1, stable=True).indices
        drawn = torch.where(hidden, words >> 1, 2**63 - 1).sort(dim=1, stable=True).indices
        order = torch.zeros_like(lying).scatter(1, lying, drawn)
        moved = x.flatten(1).gather(1, order.expand(x.shape[0], -1)).reshape(x.shape)
        return keep * x + (1 - keep) * moved

    return fill
