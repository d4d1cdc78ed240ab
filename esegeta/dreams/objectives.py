"""What a dream has more and more of: scores. Any score will do; these say what a unit, a channel or a layer does."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta import placing, reducers
from esegeta._registry import objective
from esegeta._types import Model, Score
from esegeta.engine import check

Whole = int | Tensor


def _activation(where: str, model: Model, place: str) -> Callable[[Tensor], Tensor]:
    """Return the activation (K,*U) at a place as a function of the image."""
    reached = placing.tap(model, place)

    def tapped(x: Tensor) -> Tensor:
        a = reached(x)
        if not isinstance(a, Tensor) or not a.is_floating_point() or a.ndim < 1:
            advice = "eg.places(model, x) lists those with an activation"
            raise check.refused(where, "a place with one activation (K,*U)", check.describe(a), advice)
        return a

    return tapped


def _channel(where: str, a: Tensor, channel: Whole) -> Tensor:
    if isinstance(channel, Tensor):
        return a.index_select(0, check.whole(where, "channel", channel, (), "Use an int").reshape(1))[0]
    if isinstance(channel, bool) or not isinstance(channel, int) or not -len(a) <= channel < len(a):
        raise check.refused(
            where, f"a channel from 0 to {len(a) - 1}", repr(channel), "Channels are counted from 0"
        )
    return a[channel]


def _at(where: str, a: Tensor, index: Sequence[int] | None) -> Tensor:
    """Return the value at an index of a grid, of its middle by default."""
    spot = tuple(n // 2 for n in a.shape) if index is None else tuple(index)
    if len(spot) != a.ndim or not all(
        isinstance(i, int) and -n <= i < n for i, n in zip(spot, a.shape, strict=True)
    ):
        got, advice = repr(index), "Leave it out for the middle"
        raise check.refused(where, f"an index into a grid of {tuple(a.shape)}", got, advice)
    return a[spot]


@objective(
    example={"place": "0", "channel": 0}, paper="Olah, Mordvintsev, Schubert 2017, Feature visualization"
)
def channel(model: Model, place: str, channel: Whole) -> Score:
    r"""Return the mean of a channel, :math:`\overline{A_k(x)}`: the filter, wherever it answers.

    Args:
        model: a model or a score.
        place: of the activation (K,\*U), one of ``eg.places(model, x)``.
        channel: k, an int or an integer tensor, over which may be mapped.

    Example:
        >>> import esegeta as eg
        >>> double = lambda x: eg.mark(2 * x, "double")
        >>> channel(double, "double", 1)(torch.tensor([[1.0, 3.0], [5.0, 7.0]])).item()
        12.0
    """
    reached = _activation("dreams.channel", model, place)
    return lambda x: _channel("dreams.channel", reached(x), channel).mean()


@objective(example={"place": "0", "channel": 0})
def neuron(model: Model, place: str, channel: Whole, *, index: Sequence[int] | None = None) -> Score:
    r"""Return one unit, :math:`A_{k,u}(x)`.

    Args:
        model: a model or a score.
        place: of the activation (K,\*U).
        channel: k.
        index: u, of the middle by default.

    Example:
        >>> import esegeta as eg
        >>> double = lambda x: eg.mark(2 * x, "double")
        >>> neuron(double, "double", 0, index=[1])(torch.tensor([[1.0, 3.0]])).item()
        6.0
    """
    reached = _activation("dreams.neuron", model, place)
    return lambda x: _at("dreams.neuron", _channel("dreams.neuron", reached(x), channel), index)


@objective(example={"target": 1})
def voxel(
    model: Model, target: Whole, *, index: Sequence[int] | Tensor | None = None, exclusive: bool = True
) -> Score:
    """Return one voxel of a class in the output, in the middle by default. See ``reducers.voxel``.

    Args:
        model: the network.
        target: the class; that of a network with one channel is 1.
        index: of the voxel, ints or an integer tensor.
        exclusive: as in ``reducers.voxel``.

    Example:
        >>> voxel(lambda x: x, 1)(torch.tensor([[1.0, 3.0, 5.0]])).item()
        3.0
    """

    def value(x: Tensor) -> Tensor:
        spot: Any = [n // 2 for n in x.shape[1:]] if index is None else index
        return reducers.voxel(model, target, spot, exclusive=exclusive)(x)

    return value


@objective(example={"target": 1})
def class_region(model: Model, target: Whole, *, mask: Tensor | None = None, exclusive: bool = True) -> Score:
    r"""Return the mean of a class in the output, everywhere or in a region.

    Args:
        model: the network.
        target: the class; that of a network with one channel is 1.
        mask: the region (\*S), boolean.
        exclusive: as in ``reducers.region``.

    Example:
        >>> right = torch.tensor([False, True, True])
        >>> class_region(lambda x: x, 1, mask=right)(torch.tensor([[1.0, 3.0, 5.0]])).item()
        4.0
    """
    if mask is None:
        return reducers.class_mean(model, target, exclusive=exclusive)
    inside = check.tensor("dreams.class_region", "mask", mask)
    score = reducers.region(model, target, inside, exclusive=exclusive)
    return lambda x: score(x) / inside.sum()


@objective(example={"place": "0", "vector": torch.ones(3)})
def direction(model: Model, place: str, vector: Tensor) -> Score:
    r"""Return the mean of the activation along a direction of its channels, :math:`\overline{v \cdot A(x)}`.

    Args:
        model: a model or a score.
        place: of the activation (K,\*U).
        vector: v, (K,).

    Example:
        >>> import esegeta as eg
        >>> double = lambda x: eg.mark(2 * x, "double")
        >>> direction(double, "double", torch.tensor([1.0, -1.0]))(torch.tensor([[1.0], [3.0]])).item()
        -4.0
    """
    reached = _activation("dreams.direction", model, place)
    return lambda x: torch.tensordot(_vector("dreams.direction", vector, a := reached(x)), a, 1).mean()


@objective(example={"place": "0", "vector": torch.ones(3)})
def cosine(model: Model, place: str, vector: Tensor, *, power: float | int = 2.0) -> Score:
    r"""Return how much the activation points along a direction, more if it is large too.

    .. math:: \overline{(v \cdot A)\, \max(\cos(v, A), 0.1)^{p}}

    the mean over the grid. The cosine keeps other directions out; the product keeps the activation from vanishing.

    Args:
        model: a model or a score.
        place: of the activation (K,\*U).
        vector: v, (K,).
        power: p, of which 0 is ``direction``.

    Example:
        >>> import esegeta as eg
        >>> double = lambda x: eg.mark(2 * x, "double")
        >>> cosine(double, "double", torch.tensor([1.0, 0.0]))(torch.tensor([[1.0], [0.0]])).item()
        2.0

    Reference:
        Carter et al. 2019, Activation atlas.
    """
    reached, exponent = (
        _activation("dreams.cosine", model, place),
        check.non_negative("dreams.cosine", "power", power),
    )

    def value(x: Tensor) -> Tensor:
        a = reached(x)
        v = _vector("dreams.cosine", vector, a)
        along = torch.tensordot(v, a, 1)
        sizes = v.norm() * (a.square().sum(0) + 1e-12).sqrt()
        return (along * (along / sizes).clamp(min=0.1) ** exponent).mean()

    return value


@objective(example={"place": "0", "channel": 0})
def local_group(
    model: Model, place: str, channel: Whole, *, index: Sequence[int] | None = None, size: int = 3
) -> Score:
    r"""Return the mean of a channel in a box of its grid.

    Args:
        model: a model or a score.
        place: of the activation (K,\*U).
        channel: k.
        index: of the middle of the box, by default the middle of the grid.
        size: of the box, an odd number; it ends at the border of the grid.

    Example:
        >>> import esegeta as eg
        >>> double = lambda x: eg.mark(2 * x, "double")
        >>> local_group(double, "double", 0)(torch.tensor([[9.0, 1.0, 3.0, 5.0, 9.0]])).item()
        6.0
    """
    where = "dreams.local_group"
    reached, width = _activation(where, model, place), check.positive_count(where, "size", size)
    if width % 2 == 0:
        raise check.refused(where, "an odd size", repr(size), "Use 3 or 5")

    def value(x: Tensor) -> Tensor:
        a = _channel(where, reached(x), channel)
        _at(where, a, index)
        middle = (
            [n // 2 for n in a.shape]
            if index is None
            else [i % n for i, n in zip(index, a.shape, strict=True)]
        )
        box = tuple(slice(max(i - width // 2, 0), i + width // 2 + 1) for i in middle)
        return a[box].mean()

    return value


@objective(example={"place": "0"}, also=("deep_dream",), paper="Mordvintsev, Olah, Tyka 2015, Inceptionism")
def layer_norm(model: Model, place: str) -> Score:
    r"""Return the mean square of a layer, :math:`\overline{A(x)^2}`: more of whatever it sees.

    Args:
        model: a model or a score.
        place: of the activation.

    Example:
        >>> import esegeta as eg
        >>> double = lambda x: eg.mark(2 * x, "double")
        >>> layer_norm(double, "double")(torch.tensor([[1.0, 2.0]])).item()
        10.0
    """
    reached = _activation("dreams.layer_norm", model, place)
    return lambda x: reached(x).square().mean()


@objective(example={"place": "0", "first": 0, "second": 0})
def channel_interpolation(
    model: Model, place: str, first: Whole, second: Whole, *, weight: float | int | Tensor = 0.5
) -> Score:
    r"""Return a mixture of two channels, :math:`(1 - w) \overline{A_i} + w \overline{A_j}`.

    Args:
        model: a model or a score.
        place: of the activation (K,\*U).
        first: i.
        second: j.
        weight: w, a number or a tensor of shape (), over which may be mapped.

    Example:
        >>> import esegeta as eg
        >>> double = lambda x: eg.mark(2 * x, "double")
        >>> channel_interpolation(double, "double", 0, 1, weight=0.25)(torch.tensor([[2.0], [4.0]])).item()
        5.0
    """
    where = "dreams.channel_interpolation"
    reached = _activation(where, model, place)

    def value(x: Tensor) -> Tensor:
        a = reached(x)
        return (1 - weight) * _channel(where, a, first).mean() + weight * _channel(where, a, second).mean()

    return value


@objective(
    example={"place": "0", "image": torch.linspace(0, 1, 24).reshape(1, 4, 6)},
    paper="Mahendran, Vedaldi 2015",
)
def representation(model: Model, place: str, image: Tensor) -> Score:
    r"""Return how near the activation is to that of an image, :math:`-\|A(x) - A(x_0)\|^2 / \|A(x_0)\|^2`.

    Args:
        model: a model or a score.
        place: of the activation.
        image: :math:`x_0`.

    Example:
        >>> import esegeta as eg
        >>> double = lambda x: eg.mark(2 * x, "double")
        >>> near = representation(double, "double", torch.tensor([[3.0, 4.0]]))
        >>> near(torch.tensor([[3.0, 4.0]])).item(), near(torch.zeros(1, 2)).item()
        (-0.0, -1.0)
    """
    where = "dreams.representation"
    reached = _activation(where, model, place)
    aim = reached(check.tensor(where, "image", image)).detach()
    size = aim.square().sum()
    if not size > 0:
        raise check.refused(
            where, "an image that the place answers to", "an activation of zeros", "Use another"
        )
    return lambda x: -(reached(x) - aim).square().sum() / size


@objective(example={"place": "0"}, paper="Olah, Mordvintsev, Schubert 2017, Feature visualization")
def diversity(model: Model, place: str) -> Callable[[Tensor], Tensor]:
    r"""Return how different images of a set are at a place, minus the mean cosine of their correlations of channels.

    .. math:: -\frac{1}{B (B - 1)} \sum_{b \ne c} \frac{\langle G_b, G_c \rangle}{\|G_b\| \|G_c\|},
              \qquad G = A A^\top

    A function of several images (B,C,\*S), for dreams of ``each``.

    Args:
        model: a model or a score.
        place: of the activation (K,\*U).

    Example:
        >>> import esegeta as eg
        >>> double = lambda x: eg.mark(2 * x, "double")
        >>> two = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])
        >>> diversity(double, "double")(two).item(), diversity(double, "double")(two[:1].repeat(2, 1, 1)).item()
        (-0.0, -1.0)
    """
    reached = _activation("dreams.diversity", model, place)

    def value(xs: Tensor) -> Tensor:
        n = len(xs)
        if n < 2:
            raise check.refused("dreams.diversity", "at least two images (B,C,*S)", f"{n}", "Start from more")
        a = torch.func.vmap(reached)(xs).flatten(2)
        gram = (a @ a.mT).flatten(1)
        unit = gram / gram.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return -(unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))

    return value


@objective(paper="Olah, Mordvintsev, Schubert 2017, Feature visualization")
def alignment(*, decay: float | int = 2.0) -> Callable[[Tensor], Tensor]:
    r"""Return how much images of a set agree where they stand, those next to each other more.

    .. math:: -\sum_{b < c} d^{-(c - b)}\, \overline{(x_b - x_c)^2}

    A function of several images (B,C,\*S), for dreams of ``each``: a row of mixtures of two channels whose forms stay
    in their places.

    Args:
        decay: d, by which distance in the row counts less.

    Example:
        >>> alignment()(torch.tensor([[[0.0]], [[2.0]]])).item()
        -2.0
    """
    if not isinstance(decay, (int, float)) or not decay > 0:
        raise check.refused("dreams.alignment", "decay > 0", repr(decay), "2 is usual")

    def value(xs: Tensor) -> Tensor:
        total = xs.new_zeros(())
        for b in range(len(xs)):
            for c in range(b + 1, len(xs)):
                total = total - decay ** (b - c) * (xs[b] - xs[c]).square().mean()
        return total

    return value


def weighted(*terms: tuple[float | int | Tensor, Score]) -> Score:
    """Return the weighted sum of objectives.

    Args:
        terms: pairs of a weight and an objective.

    Example:
        >>> weighted((2, lambda x: x.sum()), (-1, lambda x: x.max()))(torch.tensor([[1.0, 3.0]])).item()
        5.0
    """
    if not terms or not all(isinstance(t, tuple) and len(t) == 2 and callable(t[1]) for t in terms):
        advice = "Write weighted((1.0, one), (0.5, other))"
        raise check.refused_type("dreams.weighted", "pairs (weight, objective)", repr(terms), advice)

    def value(x: Tensor) -> Tensor:
        total = terms[0][0] * terms[0][1](x)
        for weight, term in terms[1:]:
            total = total + weight * term(x)
        return total

    return value


def _vector(where: str, vector: Tensor, a: Tensor) -> Tensor:
    v = check.tensor(where, "vector", vector)
    if v.shape != a.shape[:1]:
        got, advice = f"shape {tuple(v.shape)}", "One number for each channel of the place"
        raise check.refused(where, f"a vector of {len(a)} numbers", got, advice)
    return v.to(a)
