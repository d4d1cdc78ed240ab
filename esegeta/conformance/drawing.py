"""From a law to random situations: what laws draw their scores, images and numbers from."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from esegeta.conformance import strategies
from esegeta.conformance.cases import Case
from esegeta.conformance.functions import BENDS, Additive
from esegeta.conformance.grammar import OPERATORS
from esegeta.conformance.networks import Network
from esegeta.conformance.pairs import REWRITES
from esegeta.conformance.segmentations import Classification
from esegeta.conformance.strategies import Shape

# Few, so that what draws scores of each shape is made once. Small ones first: they are what a search ends with.
SHAPES: tuple[Shape, ...] = (
    *((1, 1), (1, 2), (1, 3), (2, 2), (1, 4), (2, 4)),
    *((1, 2, 2), (1, 1, 3), (2, 2, 1), (2, 3, 4), (1, 4, 4)),
    *((1, 2, 1, 2), (2, 2, 2, 1), (1, 2, 3, 2), (2, 2, 2, 2)),
)

# From a shape ``(C,*S)`` to a strategy of scores.
Scores = Callable[[Shape], SearchStrategy[Any]]

# A strategy takes longer to make than to draw from.
_cached = functools.lru_cache(512)


@dataclass(frozen=True)
class Draw:
    """Strategies of what a subject can be put to, all of one shape.

    shape: of the images, ``(C,*S)``; networks_only: the subject explains networks and no other functions;
    one_channel: it gives one map for all channels; output: what a reducer reads, "map", "vector" or "any";
    chosen: the only scores that may be drawn. ``st`` are Hypothesis's strategies, ``strategies`` those of
    ``esegeta.conformance``.
    """

    shape: Shape = (1, 1)
    networks_only: bool = False
    one_channel: bool = False
    output: str = "map"
    chosen: Scores | None = None

    st: ClassVar[Any] = st
    strategies: ClassVar[Any] = strategies

    def scores(self) -> SearchStrategy[Any]:
        """Return scores that the subject can explain: networks, and where it takes any function, functions too."""
        return _scores(self)

    def kinked(self) -> SearchStrategy[Any]:
        """Return scores that saturate or start late.

        The kinks of functions lie where images do, those of networks beside.
        """
        return _kinked(self)

    def equal(self) -> SearchStrategy[Any]:
        """Return pairs of scores that are equal as functions."""
        return _equal(self)

    def active(self) -> SearchStrategy[Any]:
        """Return networks with activations, three times out of four; any score otherwise."""
        return _active(self)

    def models(self) -> SearchStrategy[Any]:
        """Return models for a reducer: networks that label every voxel, or their means."""
        return _models(self)

    def case(self) -> SearchStrategy[Case]:
        """Return cases of ``scores``."""
        return _case(self)

    def kinked_case(self) -> SearchStrategy[Case]:
        """Return cases of ``kinked`` scores."""
        return _kinked_case(self)

    def images(self) -> SearchStrategy[Any]:
        """Return images, as nested lists."""
        return strategies.images(self.shape)

    def element(self) -> SearchStrategy[int]:
        """Return the positions of elements."""
        return st.integers(0, math.prod(self.shape) - 1)

    def not_zero(self, largest: int = 2) -> SearchStrategy[float | int]:
        """Return numbers other than zero."""
        return strategies.numbers(largest).filter(bool)

    def suiting(self, suits: Callable[[Any], bool], otherwise: SearchStrategy[Any]) -> SearchStrategy[Any]:
        """Return, for an axiom about scores of one sort, those of them that are chosen, or else ``otherwise``."""
        return otherwise if self.chosen is None else self.chosen(self.shape).filter(suits)

    def of_one_element(self, element: SearchStrategy[int]) -> SearchStrategy[Any]:
        """Return functions with a kink that look at one element only: where that one is flat, all of it is."""
        n = math.prod(self.shape)
        kinks = st.sampled_from(
            [name for name, b in BENDS.items() if not b.smooth and name not in strategies.SPELLINGS]
        )

        def build(element: int, weight: float | int, bend: str) -> Additive:
            at = lambda value, other: tuple(value if i == element else other for i in range(n))
            return Additive(at(weight, 0), at(bend, "identity"))

        return st.builds(build, element, self.not_zero(), kinks)

    def deep(self, shape: Shape, where: Callable[[Any], bool]) -> SearchStrategy[Any]:
        """Return networks of a shape, most of them chains of convolutions and rectifiers."""
        return _deep(shape, where)


def of_kind(law: Any, subject: Any, chosen: Scores | None = None) -> SearchStrategy[Any]:
    """Return situations of one law for a subject: of scores that it can explain, or of those that are chosen."""
    draw = Draw(
        networks_only=getattr(subject, "wants", "function") == "module",
        one_channel=getattr(subject, "one_channel", False),
        output=getattr(subject, "output", "map"),
        chosen=chosen,
    )
    shapes = [s for s in SHAPES if law.fits(s)]
    return st.sampled_from(shapes).flatmap(lambda shape: _drawn(law, replace(draw, shape=shape)))


@_cached
def _drawn(law: Any, draw: Draw) -> SearchStrategy[Any]:
    return law.drawn(draw)


@_cached
def _scores(draw: Draw) -> SearchStrategy[Any]:
    if draw.chosen is not None:
        return draw.chosen(draw.shape)
    nets = strategies.networks(shape=draw.shape)
    return nets if draw.networks_only else strategies.functions(shape=draw.shape) | nets


@_cached
def _kinked(draw: Draw) -> SearchStrategy[Any]:
    if draw.chosen is not None:
        return draw.chosen(draw.shape)
    nets = strategies.networks(shape=draw.shape, smooth=False)
    if draw.networks_only:
        return nets
    kinds = ("Additive", "Perceptron", "Extremum")
    plain = strategies.functions(shape=draw.shape, kinds=kinds, smooth=False)
    return draw.of_one_element(draw.element()) | plain | nets


@_cached
def _case(draw: Draw) -> SearchStrategy[Case]:
    return strategies.cases(_scores(draw), shape=draw.shape)


@_cached
def _kinked_case(draw: Draw) -> SearchStrategy[Case]:
    return strategies.cases(_kinked(draw), shape=draw.shape)


@_cached
def _equal(draw: Draw) -> SearchStrategy[Any]:
    if draw.chosen is not None:
        rewrites = () if draw.networks_only else REWRITES
        return strategies.pairs(score=draw.chosen(draw.shape), rewrites=rewrites)
    rebuilt = strategies.pairs(shape=draw.shape, rewrites=())
    if draw.networks_only:
        return rebuilt
    return strategies.pairs(shape=draw.shape, rebuildings=()) | rebuilt | rebuilt


@_cached
def _active(draw: Draw) -> SearchStrategy[Any]:
    if draw.chosen is not None:
        return draw.chosen(draw.shape)
    active, any_score = strategies.networks(shape=draw.shape, where=_is_active), _scores(draw)
    # Not ``active | active | any_score``: Hypothesis takes equal alternatives for one.
    return st.integers(0, 3).flatmap(lambda i: active if i < 3 else any_score)


def _is_active(net: Network) -> bool:
    return any(n in OPERATORS and OPERATORS[n].family == "activation" for n in net.operators)


@_cached
def _models(draw: Draw) -> SearchStrategy[Any]:
    # A gradient adds up to what its quadrature leaves only where it is smooth, and a jump is found in the smooth too.
    model: SearchStrategy[Any] = strategies.segmentations(shape=draw.shape, smooth=True)
    return model.map(Classification) if draw.output == "vector" else model


@_cached
def _deep(shape: Shape, where: Callable[[Any], bool]) -> SearchStrategy[Any]:
    end = st.sampled_from([(), ("pointwise conv",)])
    # What goes backwards through many channels and rectifiers forgets where it began.
    layers = st.integers(2, 4).map(("conv", "relu").__mul__) | st.integers(4, 8).map(
        ("wide conv", "relu").__mul__
    )
    chains = st.builds(
        lambda body, end, seed: Network(shape, body + end, "sum", seed), layers, end, st.integers(1, 2**16)
    )
    return chains | chains | chains | strategies.networks(shape=shape, where=where)
