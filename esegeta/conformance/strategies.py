"""Hypothesis strategies for scores with known answers, networks, equal pairs, and cases. They shrink to small ones.

>>> from hypothesis import find
>>> find(functions(shape=(1, 2)), lambda f: True)
Linear((0, 0))
"""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from esegeta._registry import REDUCERS
from esegeta.conformance import grammar
from esegeta.conformance.cases import Case
from esegeta.conformance.functions import (
    BENDS,
    IGNORING,
    Additive,
    Extremum,
    Function,
    Ignoring,
    Linear,
    Perceptron,
    Polynomial,
    chosen,
)
from esegeta.conformance.networks import Layer, Network, fits
from esegeta.conformance.pairs import REWRITES, Pair, Rewritten
from esegeta.conformance.rebuilding import REBUILDINGS, Rebuilt, applies
from esegeta.conformance.segmentations import CLASSES, Reducing, Segmentation
from esegeta.engine import check

Shape = tuple[Any, ...]
# Strategies are checked when they are first used, which takes longer than to draw from them: each is made once.
_once = functools.lru_cache(512)
KINDS = ("Linear", "Additive", "Polynomial", "Extremum", "Perceptron")
SPELLINGS = frozenset(b for b in BENDS if " by " in b)


@_once
def numbers(most: int = 2) -> SearchStrategy[float | int]:
    """Draw small multiples of a quarter: zero first, whole ones next."""
    grid = [k / 4 if k % 4 else k // 4 for k in range(-4 * most, 4 * most + 1)]
    return st.sampled_from(sorted(grid, key=lambda v: (v != round(v), abs(v), v < 0)))


def shapes(axes: Sequence[Any] = (1, 2, 3), channels: Sequence[Any] = (1, 2)) -> SearchStrategy[Shape]:
    """Draw shapes ``(C,*S)`` of examples with at most some twenty elements."""
    side = {1: 5, 2: 3, 3: 2}
    return st.sampled_from(tuple(axes)).flatmap(
        lambda n: st.tuples(st.sampled_from(tuple(channels)), *[st.integers(1, side[n])] * n)
    )


def nested(flat: Sequence[Any], shape: Sequence[Any]) -> Any:
    """Return a flat sequence as lists in the shape of an example."""
    if len(shape) <= 1:
        return list(flat)
    step = len(flat) // shape[0]
    return [nested(flat[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def _size(shape: Sequence[Any]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def images(shape: Shape, most: int = 2) -> SearchStrategy[Any]:
    """Draw examples of a shape as nested lists of small numbers."""
    return _images(tuple(shape), most)


@_once
def _images(shape: Shape, most: int) -> SearchStrategy[Any]:
    n = _size(shape)
    return st.lists(numbers(most), min_size=n, max_size=n).map(lambda flat: nested(flat, shape))


def baselines(shape: Shape, count: int = 2, most: int = 2) -> SearchStrategy[Any]:
    """Draw stacks of ``count`` examples."""
    return _baselines(tuple(shape), count, most)


@_once
def _baselines(shape: Shape, count: int, most: int) -> SearchStrategy[Any]:
    return st.lists(images(shape, most), min_size=count, max_size=count)


def functions(
    *,
    shape: Shape,
    kinds: Collection[Any] = (*KINDS, "Ignoring"),
    smooth: bool | None = None,
    piecewise_linear: bool | None = None,
    max_degree: int | None = None,
    monotone: bool | None = None,
    where: Callable[[Function], bool] | None = None,
) -> SearchStrategy[Function]:
    """Draw pure functions with known answers.

    Args:
        shape: ``(C,*S)`` of an example.
        kinds: names of classes in ``esegeta.conformance.functions``.
        smooth: only functions that are, or only others.
        piecewise_linear: the same.
        max_degree: only polynomials of at most this degree.
        monotone: only functions that rise with every element, or only others.
        where: what else has to hold.

    Returns:
        A strategy.
    """
    kinds = tuple(kinds)
    for kind in kinds:
        chosen("functions", "kind", kind, (*KINDS, "Ignoring"))
    return _functions(tuple(shape), kinds, smooth, piecewise_linear, max_degree, monotone, where)


@_once
def _functions(
    shape: Shape,
    kinds: tuple[Any, ...],
    smooth: bool | None,
    piecewise_linear: bool | None,
    max_degree: int | None,
    monotone: bool | None,
    where: Callable[[Function], bool] | None,
) -> SearchStrategy[Function]:
    n = _size(shape)
    weight = st.integers(0, 2) if monotone else numbers()
    weights = lambda size: st.lists(weight, min_size=size, max_size=size).map(tuple)
    bends = [
        name
        for name, b in BENDS.items()
        if name not in SPELLINGS
        and (smooth is None or b.smooth == smooth or name == "identity")
        and (piecewise_linear is None or b.piecewise_linear == piecewise_linear or name == "identity")
        and (max_degree is None or (b.degree is not None and b.degree <= max_degree))
        and (not monotone or b.rising)
    ]
    bend = st.sampled_from(bends)
    element = st.integers(0, n - 1)
    longest = 1 if monotone or piecewise_linear else min(3, max_degree or 3)
    term = st.tuples(weight, st.lists(element, min_size=1, max_size=longest).map(tuple))

    def perceptron(units: int) -> SearchStrategy[Function]:
        rows = st.lists(weights(n), min_size=units, max_size=units).map(tuple)
        offsets = st.lists(numbers(), min_size=units, max_size=units).map(tuple)
        return st.builds(Perceptron, rows, offsets, weights(units), bend)

    def extremum(weights: tuple[Any, ...], *rest: Any) -> Function:
        return Extremum(rest[0], weights if any(weights) else (1, *weights[1:]), *rest[1:])

    made: dict[str, SearchStrategy[Function]] = {
        "Linear": st.builds(Linear, weights(n)),
        "Additive": st.builds(Additive, weights(n), st.lists(bend, min_size=n, max_size=n).map(tuple)),
        "Polynomial": st.builds(Polynomial, st.just(n), st.lists(term, min_size=1, max_size=4).map(tuple)),
        "Extremum": st.builds(
            extremum, weights(n), st.sampled_from(["max", "min"]), st.just(()) | weights(n)
        ),
        "Perceptron": st.integers(1, 3).flatmap(perceptron),
    }
    plain = st.one_of([made[kind] for kind in KINDS if kind in kinds or kinds == ("Ignoring",)])
    ignoring = st.builds(
        Ignoring,
        plain,
        st.lists(element, min_size=1, max_size=n, unique=True).map(lambda v: tuple(sorted(v))),
        st.sampled_from(IGNORING),
    )
    some = st.one_of(plain, ignoring) if "Ignoring" in kinds else plain
    some = ignoring if kinds == ("Ignoring",) else some
    return some.filter(
        lambda f: (
            _meets(f, smooth, piecewise_linear, max_degree)
            and (monotone is None or f.monotone == monotone)
            and (where is None or where(f))
        )
    )


def _meets(f: Any, smooth: bool | None, piecewise_linear: bool | None, max_degree: int | None) -> bool:
    return (
        (smooth is None or f.smooth == smooth)
        and (piecewise_linear is None or f.piecewise_linear == piecewise_linear)
        and (max_degree is None or (f.degree is not None and f.degree <= max_degree))
    )


def networks(
    *,
    shape: Shape | None = None,
    axes: Sequence[Any] = (1, 2, 3),
    channels: Sequence[Any] = (1, 2),
    operators: Collection[Any] | None = None,
    joins: Collection[Any] | None = None,
    heads: Collection[Any] | None = None,
    smooth: bool | None = None,
    piecewise_linear: bool | None = None,
    max_degree: int | None = None,
    layers: int = 4,
    where: Callable[[Network], bool] | None = None,
) -> SearchStrategy[Network]:
    """Draw networks from the grammar of operators.

    Args:
        shape: ``(C,*S)`` of an example; by default drawn from ``axes`` and ``channels``.
        axes: how many spatial axes.
        channels: how many channels.
        operators: names in ``grammar.OPERATORS``, or families of them such as ``"convolution"``.
        joins: names in ``grammar.JOINS``; an empty tuple for chains.
        heads: names in ``grammar.HEADS``.
        smooth: only networks that are; False for those with a kink.
        piecewise_linear: the same.
        max_degree: only polynomials of at most this degree.
        layers: at most so many, with as many again in a branch.
        where: what else has to hold.

    Returns:
        A strategy.
    """
    some = lambda names: None if names is None else tuple(names)
    return _networks(
        shape=shape and tuple(shape),
        axes=tuple(axes),
        channels=tuple(channels),
        operators=some(operators),
        joins=some(joins),
        heads=some(heads),
        smooth=smooth,
        piecewise_linear=piecewise_linear,
        max_degree=max_degree,
        layers=layers,
        where=where,
    )


@_once
def _networks(
    *,
    shape: Shape | None,
    axes: tuple[Any, ...],
    channels: tuple[Any, ...],
    operators: tuple[Any, ...] | None,
    joins: tuple[Any, ...] | None,
    heads: tuple[Any, ...] | None,
    smooth: bool | None,
    piecewise_linear: bool | None,
    max_degree: int | None,
    layers: int,
    where: Callable[[Network], bool] | None,
) -> SearchStrategy[Network]:
    def allowed(known: Any) -> bool:
        return (
            (not smooth or known.smooth)
            and (not piecewise_linear or known.piecewise_linear)
            and (max_degree is None or (known.degree is not None and known.degree <= max_degree))
        )

    wanted = set(operators) if operators is not None else set(grammar.OPERATORS)
    names = [n for n, o in grammar.OPERATORS.items() if (n in wanted or o.family in wanted) and allowed(o)]
    ways = [n for n, j in grammar.JOINS.items() if (joins is None or n in joins) and allowed(j)]
    ends = [n for n, j in grammar.HEADS.items() if (heads is None or n in heads) and allowed(j)]
    one: SearchStrategy[Layer] = st.sampled_from(names)
    if ways:
        branch = st.lists(st.sampled_from(names), min_size=1, max_size=2)
        one = one | st.builds(lambda how, inner: (how, *inner), st.sampled_from(ways), branch)
    drawn = st.tuples(
        st.just(shape) if shape else shapes(axes, channels),
        st.lists(one, max_size=layers),
        st.sampled_from(ends),
        st.integers(0, 2**16),
    )

    def build(parts: tuple[Shape, list[Any], str, int]) -> Network:
        start, chosen, head, seed = parts
        return Network(start, fitting(start, chosen), head, seed)

    return drawn.map(build).filter(
        lambda net: _meets(net, smooth, piecewise_linear, max_degree) and (where is None or where(net))
    )


def fitting(shape: Shape, layers: Sequence[Any]) -> tuple[Any, ...]:
    """Return the layers that fit, one behind the other; others are left out."""
    kept = []
    for layer in layers:
        end = fits(layer, shape)
        if end is not None:
            kept.append(layer)
            shape = end
    return tuple(kept)


def pairs(
    *,
    score: SearchStrategy[Any] | None = None,
    shape: Shape = (1, 3),
    rewrites: Collection[Any] = tuple(REWRITES),
    rebuildings: Collection[Any] = tuple(REBUILDINGS),
) -> SearchStrategy[Pair]:
    """Draw pairs of scores that are equal as functions, but not as graphs.

    Args:
        score: the first of a pair; by default a function, or a network that contains what is rebuilt.
        shape: ``(C,*S)`` of an example, where no score is given.
        rewrites: names in ``pairs.REWRITES``, for all scores.
        rebuildings: names in ``rebuilding.REBUILDINGS``, for networks.

    Returns:
        A strategy of ``Pair(name, first, second)``.
    """

    def of(first: Any) -> SearchStrategy[Pair]:
        ways = st.sampled_from(list(rewrites)).map(lambda how: Pair(how, first, Rewritten(first, how)))
        names = [how for how in rebuildings if isinstance(first, Network) and applies(first, how)]
        if not names:
            return ways if rewrites else st.nothing()
        rebuilt = st.sampled_from(names).map(lambda how: Pair(how, first, Rebuilt(first, how)))
        return rebuilt | ways if rewrites else rebuilt

    if score is not None:
        return score.flatmap(of)
    made = []
    if rewrites:
        made.append(functions(shape=shape).flatmap(of))
    if rebuildings:
        made.append(_rebuilt(shape, list(rebuildings)))
    return st.one_of(made)


def _rebuilt(shape: Shape, names: list[Any]) -> SearchStrategy[Pair]:
    """Pairs of networks, of which the first contains what the rebuilding needs."""
    some = st.lists(st.sampled_from(list(grammar.OPERATORS)), max_size=2)

    def build(how: str, before: list[Any], after: list[Any], seed: int) -> Network | None:
        what = REBUILDINGS[how]
        layers = fitting(shape, [*before, *what.layers, *after])
        net = Network(shape, layers, what.heads[0] if what.heads else "sum", seed)
        return net if applies(net, how) else None

    def of(how: str) -> SearchStrategy[Pair]:
        nets: Any = st.builds(build, st.just(how), some, some, st.integers(0, 2**16)).filter(bool)
        return nets.map(lambda net: Pair(how, net, Rebuilt(net, how)))

    return st.sampled_from(names).flatmap(of)


def cases(
    score: SearchStrategy[Any] | Callable[[Shape], SearchStrategy[Any]] | None = None,
    *,
    shape: Shape | None = None,
    axes: Sequence[Any] = (1, 2, 3),
    channels: Sequence[Any] = (1, 2),
    dtypes: Sequence[Any] = ("float64",),
    **filters: Any,
) -> SearchStrategy[Case]:
    """Draw cases: a score, by default one of ``functions`` and ``networks``, with an input and references."""

    @functools.cache
    def of(at: Shape) -> SearchStrategy[Case]:
        if isinstance(score, SearchStrategy):
            made = score
        elif score is not None:
            made = score(at)
        else:
            made = st.one_of(functions(shape=at, **filters), networks(shape=at, **filters))
        return st.builds(Case, made, images(at), images(at), baselines(at), st.sampled_from(list(dtypes)))

    return of(shape) if shape else shapes(axes, channels).flatmap(of)


def reducers(
    *, output: str = "map", masks: bool | None = None, differentiable: bool | None = True
) -> SearchStrategy[Reducing]:
    """Draw reducers of models with two classes, with settings.

    Args:
        output: ``"map"`` for models ``(C,*S) -> (2,*S)``, ``"vector"`` for ``(C,*S) -> (2,)``.
        masks: only those that freeze a mask, or only others.
        differentiable: only those that have a gradient, or only others.

    Returns:
        A strategy of ``Reducing(name, settings)``, to be called with a model and the input to freeze at.
    """
    chosen("reducers", "output", output, ("map", "vector"))
    names = [
        name
        for name, spec in REDUCERS.items()
        if spec.output in (output, "any")
        and (masks is None or spec.mask == masks)
        and (differentiable is None or spec.differentiable == differentiable)
        and not any(isinstance(v, torch.Tensor) for v in spec.example.values())  # bound to one shape
        and "index" not in spec.example
    ]
    target = st.integers(0, CLASSES - 1)

    def of(name: str) -> SearchStrategy[Reducing]:
        example = REDUCERS[name].example
        settings = st.tuples(
            *[st.tuples(st.just(k), target if k == "target" else st.just(v)) for k, v in example.items()]
        )
        return settings.map(lambda chosen: Reducing(name, chosen))

    return st.sampled_from(names).flatmap(of)


def segmentations(*, shape: Shape | None = None, **filters: Any) -> SearchStrategy[Segmentation]:
    """Draw networks that label every voxel, from the filters of ``networks``."""
    return networks(shape=shape, heads=("sum",), **filters).map(Segmentation)


def symmetric(functions: SearchStrategy[Function]) -> SearchStrategy[Function]:
    """Draw functions that are symmetric in two elements, where there are two; their ``swaps`` are not empty."""
    both = functions.flatmap(
        lambda f: st.tuples(st.just(f), st.permutations(range(f.size)) if f.size > 1 else st.just([0]))
    )
    return both.map(lambda v: tied(v[0], *v[1][:2]) if len(v[1]) > 1 else v[0])


def tied(function: Function, i: int, j: int) -> Function:
    """Return a function in which element j is treated as element i is.

    >>> tied(Linear((1, 2, 3)), 0, 2)
    Linear((1, 2, 1))
    """

    def copied(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[i] if k == j else v for k, v in enumerate(values))

    match function:
        case Ignoring(inner=inner, elements=elements):
            kept = tuple(e for e in elements if e not in (i, j))
            both = tuple(sorted({*kept, i, j})) if i in elements else kept
            return replace(function, inner=tied(inner, i, j), elements=both)
        case Additive():
            return replace(function, weights=copied(function.weights), bends=copied(function.bends))
        case Extremum():
            if not any(copied(function.weights)):
                return function if function.swaps else Extremum(function.which, (1,) * function.size)
            return replace(
                function,
                weights=copied(function.weights),
                offsets=function.offsets and copied(function.offsets),
            )
        case Perceptron():
            return replace(function, rows=tuple(map(copied, function.rows)))
        case Polynomial():
            swap = {i: j, j: i}
            mirrored = tuple((c, tuple(swap.get(k, k) for k in which)) for c, which in function.terms)
            return replace(function, terms=function.terms + mirrored)
        case Linear():
            return replace(function, weights=copied(function.weights))
    raise check.refused_type(
        "tied", "a function of esegeta.conformance.functions", check.describe(function), "Use one"
    )
