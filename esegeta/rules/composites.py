"""How affine operations share their relevance out to their inputs, and which rule is for which of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from esegeta._registry import COMPOSITES, composite
from esegeta.engine import check
from esegeta.engine.operators import reroute

TINY = 1e-24  # what is smaller is zero: nothing is divided by it


@dataclass(frozen=True, eq=False)
class Layer:
    """An affine operation ``value = linear(x, weight) + bias`` that a rule is asked for.

    value: connected to x by its ordinary derivative; bias: broadcasts to it, or None; linear: the operation with
    another input or other weights; kind: "conv" or "linear"; where: path of the module; depth: how many affine
    operations come before it on the longest way from the input; last: whether none comes after it; transposed:
    whether its weights have the input channels first, as those of a transposed convolution have; number: which of
    the affine operations there it is.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    value: Tensor
    linear: Callable[[Tensor, Tensor], Tensor]
    kind: str
    where: str = ""
    depth: int = 0
    last: bool = False
    transposed: bool = False
    number: int = 0

    def of(self, x: Tensor, change: Callable[[Tensor], Tensor], *, bias: bool = True) -> Tensor:
        """Return the operation on another input, with weights and bias changed by a function."""
        z = self.linear(x, change(self.weight))
        return z if self.bias is None or not bias else z + change(self.bias)


LayerRule = Callable[[Layer], Tensor]


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and zero where b is zero.

    >>> quotient(torch.tensor([1., 1.]), torch.tensor([2., 0.])).tolist()
    [0.5, 0.0]
    """
    zero = b.abs() < TINY
    return torch.where(zero, 0, a / torch.where(zero, 1, b))


def stabilised(a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    """Return a / (b + epsilon sign(b)), where the sign of zero is one."""
    return quotient(a, b) if epsilon == 0 else a / torch.where(b >= 0, b + epsilon, b - epsilon)


def shared(value: Tensor, parts: list[Tensor], weights: tuple[float, ...], epsilon: float) -> Tensor:
    """Return the value, whose relevance is shared out by what the parts are made of: so much of it by each part."""

    def weigh(g: Tensor, v: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(w * stabilised(g * v, p, epsilon) for w, p in zip(weights, parts, strict=True))

    return reroute(value, parts, weigh)


def _above(t: Tensor) -> Tensor:
    return t.clamp(min=0)


def _below(t: Tensor) -> Tensor:
    return t.clamp(max=0)


def _one(x: Tensor) -> Tensor:
    """Ones that hand the relevance of whatever they are multiplied with to x."""
    return reroute(torch.ones_like(x), [x], lambda g, _, x: quotient(g, x))


def _beyond(x: Tensor, bound: float | Tensor) -> Tensor:
    """How far x is from a bound, all of whose relevance is that of x."""
    return reroute(x - bound, [x], lambda g, apart, x: quotient(g * apart, x))


@dataclass(frozen=True)
class Zero:
    r""":math:`R_j = \sum_k a_j w_{jk} R_k / z_k`: the derivative itself."""

    def __call__(self, layer: Layer) -> Tensor:
        """The value with this rule."""
        return layer.value


@dataclass(frozen=True)
class Epsilon:
    r""":math:`R_j = \sum_k a_j w_{jk} R_k / (z_k + \epsilon\,\mathrm{sign}\,z_k)`: what hardly fires says little."""

    epsilon: float = 1e-6

    def __call__(self, layer: Layer) -> Tensor:
        """The value with this rule."""
        return shared(layer.value, [layer.value], (1.0,), self.epsilon)


@dataclass(frozen=True)
class Gamma:
    r"""Epsilon with the weights :math:`w + \gamma [w]_+`: positive contributions count for more.

    For inputs that are not negative; ``GeneralisedGamma`` is for all.
    """

    gamma: float = 0.25
    epsilon: float = 1e-6

    def __call__(self, layer: Layer) -> Tensor:
        """The value with this rule."""
        z = layer.of(layer.x, lambda t: t + self.gamma * _above(t))
        return shared(layer.value, [z], (1.0,), self.epsilon)


@dataclass(frozen=True)
class GeneralisedGamma:
    r"""Contributions of the sign of the output count for :math:`1 + \gamma`, whatever the sign of the input."""

    gamma: float = 0.25
    epsilon: float = 1e-6

    def __call__(self, layer: Layer) -> Tensor:
        """The value with this rule."""
        more = lambda t: t + self.gamma * _above(t)
        less = lambda t: t + self.gamma * _below(t)
        up, down = _above(layer.x), _below(layer.x)
        positive = layer.of(up, more) + layer.of(down, less, bias=False)
        negative = layer.of(up, less) + layer.of(down, more, bias=False)
        return shared(layer.value, [torch.where(layer.value > 0, positive, negative)], (1.0,), self.epsilon)


@dataclass(frozen=True)
class AlphaBeta:
    r""":math:`\alpha` parts by positive contributions, less :math:`\beta = \alpha - 1` by negative ones."""

    alpha: float = 2.0
    beta: float = 1.0
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise check.refused(
                "AlphaBeta",
                "beta >= 0 and alpha = 1 + beta",
                f"alpha={self.alpha}, beta={self.beta}",
                "Only then is relevance conserved: 2 and 1 are usual",
            )

    def __call__(self, layer: Layer) -> Tensor:
        """The value with this rule."""
        up, down = _above(layer.x), _below(layer.x)
        parts = [layer.of(up, _above) + layer.of(down, _below, bias=False)]
        if self.beta:
            parts.append(layer.of(up, _below) + layer.of(down, _above, bias=False))
        return shared(layer.value, parts, (self.alpha, -self.beta)[: len(parts)], self.epsilon)


@dataclass(frozen=True)
class ZPlus:
    """Positive contributions only: alpha 1, beta 0."""

    epsilon: float = 1e-6

    def __call__(self, layer: Layer) -> Tensor:
        """The value with this rule."""
        return AlphaBeta(1.0, 0.0, self.epsilon)(layer)


@dataclass(frozen=True, eq=False)
class ZBox:
    r"""For an input within bounds: contributions :math:`x_j w_{jk} - l_j [w_{jk}]_+ - h_j [w_{jk}]_-`.

    low, high: numbers, or tensors that broadcast to the input.
    """

    low: float | Tensor
    high: float | Tensor
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        numbers = isinstance(self.low, (int, float)) and isinstance(self.high, (int, float))
        if numbers and not self.low <= 0 <= self.high:
            raise check.refused(
                "ZBox",
                "low <= 0 <= high",
                f"low={self.low}, high={self.high}",
                "Pass the smallest and the largest value that an input can have",
            )

    def __call__(self, layer: Layer) -> Tensor:
        """The value with this rule."""
        # The differences first: an input may be nearer to its bound than to zero by orders of magnitude.
        z = layer.linear(_beyond(layer.x, self.low), _above(layer.weight))
        z = z + layer.linear(_beyond(layer.x, self.high), _below(layer.weight))
        return shared(layer.value, [z], (1.0,), self.epsilon)


@dataclass(frozen=True)
class WSquare:
    r"""By squared weights, whatever the input: :math:`R_j = \sum_k w_{jk}^2 R_k / \sum_j w_{jk}^2`."""

    epsilon: float = 1e-6

    def __call__(self, layer: Layer) -> Tensor:
        """The value with this rule."""
        z = layer.linear(_one(layer.x), layer.weight.square())
        return shared(layer.value, [z], (1.0,), self.epsilon)


@dataclass(frozen=True)
class Flat:
    """In equal parts to all inputs that an output sees."""

    epsilon: float = 1e-6

    def __call__(self, layer: Layer) -> Tensor:
        """The value with this rule."""
        z = layer.linear(_one(layer.x), torch.ones_like(layer.weight))
        return shared(layer.value, [z], (1.0,), self.epsilon)


@dataclass(frozen=True)
class Pass:
    """As it comes: each input gets the relevance of the output at its position."""

    def __call__(self, layer: Layer) -> Tensor:
        """The value with this rule."""
        if layer.value.shape != layer.x.shape:
            raise check.refused(
                "Pass",
                "a layer with as many outputs as inputs",
                f"{tuple(layer.x.shape)} to {tuple(layer.value.shape)} in {layer.where!r}",
                "Choose another rule for it",
            )
        return reroute(layer.value, [layer.x], lambda g, v, x: quotient(g * v, x))


@dataclass(frozen=True)
class Composite:
    """Which rule is for which affine operation.

    conv, linear: by kind (transposed convolutions are convolutions, products with a constant matrix are linear);
    first: for the layers nearest to the input, which no other affine layer comes before; until: ``(n, rule)``, for
    layers that fewer than n come before; last: for those that none comes after; places: ``(path, rule)`` for
    modules at or below a path. Where several apply, the order is places (the longest path), first, until (the
    smallest n), last, kind.

    >>> Composite(conv=ZPlus(), first=Flat()).rule_for("conv", "encoder.0", depth=0, last=False)
    Flat(epsilon=1e-06)
    """

    conv: LayerRule = Epsilon()
    linear: LayerRule = Epsilon()
    first: LayerRule | None = None
    until: tuple[tuple[int, LayerRule], ...] = ()
    last: LayerRule | None = None
    places: tuple[tuple[str, LayerRule], ...] = ()

    def rule_for(self, kind: str, where: str, *, depth: int, last: bool) -> LayerRule:
        """Return the rule for one operation."""
        near = [
            (len(p), i) for i, (p, _) in enumerate(self.places) if where == p or where.startswith(p + ".")
        ]
        if near:
            return self.places[max(near)[1]][1]
        if self.first is not None and depth == 0:
            return self.first
        early = [(n, i) for i, (n, _) in enumerate(self.until) if depth < n]
        if early:
            return self.until[min(early)[1]][1]
        if self.last is not None and last:
            return self.last
        return self.conv if kind == "conv" else self.linear


@composite(family="relevance", paper="Kohlbrenner et al. 2020, arXiv:1910.09840")
def zero() -> Composite:
    """Share relevance by contributions, as they are.

    >>> zero().conv
    Zero()
    """
    return Composite(conv=Zero(), linear=Zero())


@composite(family="relevance", paper="Bach et al. 2015, doi:10.1371/journal.pone.0130140")
def epsilon() -> Composite:
    """Share relevance by contributions with a stabiliser, everywhere.

    >>> epsilon().conv
    Epsilon(epsilon=1e-06)
    """
    return Composite()


@composite(family="relevance", paper="Kohlbrenner et al. 2020, arXiv:1910.09840")
def epsilon_plus(*, first: LayerRule | None = None) -> Composite:
    """Share by positive contributions in convolutions, with epsilon in linear layers.

    >>> epsilon_plus().conv
    ZPlus(epsilon=1e-06)
    """
    return Composite(conv=ZPlus(), first=first)


@composite(family="relevance", paper="Kohlbrenner et al. 2020, arXiv:1910.09840")
def epsilon_plus_flat() -> Composite:
    """Add equal shares for the layers nearest to the input to ``epsilon_plus``.

    >>> epsilon_plus_flat().first
    Flat(epsilon=1e-06)
    """
    return epsilon_plus(first=Flat())


@composite(family="relevance", paper="Bach et al. 2015, doi:10.1371/journal.pone.0130140")
def epsilon_alpha2_beta1(*, first: LayerRule | None = None) -> Composite:
    """Share with alpha 2, beta 1 in convolutions, with epsilon in linear layers.

    >>> epsilon_alpha2_beta1().conv
    AlphaBeta(alpha=2.0, beta=1.0, epsilon=1e-06)
    """
    return Composite(conv=AlphaBeta(), first=first)


@composite(family="relevance", paper="Bach et al. 2015, doi:10.1371/journal.pone.0130140")
def epsilon_alpha2_beta1_flat() -> Composite:
    """Add equal shares for the layers nearest to the input to ``epsilon_alpha2_beta1``.

    >>> epsilon_alpha2_beta1_flat().first
    Flat(epsilon=1e-06)
    """
    return epsilon_alpha2_beta1(first=Flat())


@composite(
    family="relevance",
    paper="Montavon et al. 2019, doi:10.1007/978-3-030-28954-6_10",
    example={"low": -3.0, "high": 3.0},
)
def epsilon_gamma_box(low: float | Tensor, high: float | Tensor) -> Composite:
    """Share with the box at an input of known bounds, generalised gamma in convolutions, epsilon in linear layers.

    >>> epsilon_gamma_box(-3.0, 3.0).first
    ZBox(low=-3.0, high=3.0, epsilon=1e-06)
    """
    return Composite(conv=GeneralisedGamma(), first=ZBox(low, high))


@composite(family="relevance", paper="Montavon et al. 2017, arXiv:1512.02479")
def deep_taylor(low: float | Tensor | None = None, high: float | Tensor | None = None) -> Composite:
    """Decompose by deep Taylor expansion: positive contributions; at the input the box, or squared weights.

    >>> deep_taylor().first, deep_taylor(0.0, 1.0).first
    (WSquare(epsilon=1e-06), ZBox(low=0.0, high=1.0, epsilon=1e-06))
    """
    if (low is None) != (high is None):
        raise check.refused(
            "deep_taylor", "both bounds or none", f"low={low}, high={high}", "Pass the other one"
        )
    first = WSquare() if low is None or high is None else ZBox(low, high)
    return Composite(conv=ZPlus(), linear=ZPlus(), first=first)


def named_composites() -> list[str]:
    """Return the names of the composites that need no settings, which a text stands for.

    >>> "epsilon" in named_composites(), "epsilon_gamma_box" in named_composites()
    (True, False)
    """
    return [n for n, s in COMPOSITES.items() if all(p.default is not p.empty for p in s.parameters.values())]


def composite_of(where: str, composite: Composite | str) -> Composite:
    """Return a composite, or make the one of that name."""
    if isinstance(composite, Composite):
        return composite
    known = named_composites()
    if not isinstance(composite, str) or composite not in known:
        expected = f"a Composite or one of {', '.join(known)}"
        advice = check.nearest(composite, known, "Compose one with esegeta.rules.Composite")
        raise check.refused(where, expected, check.describe(composite), advice)
    made: Composite = COMPOSITES[composite].fn()
    return made
