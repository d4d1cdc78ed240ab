"""From an axiom to random situations in which a method can keep or break it."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from esegeta.conformance import cases, laws, strategies
from esegeta.conformance.cases import Case
from esegeta.conformance.functions import BENDS, Additive, Linear
from esegeta.conformance.kinds import AnySubject
from esegeta.conformance.networks import Network
from esegeta.conformance.operators import OPERATORS
from esegeta.conformance.pairs import REWRITES
from esegeta.conformance.scoring import REDUCER_LAWS, REWRITE_LAWS, ReducerSubject, RewriteSubject
from esegeta.conformance.segmentations import Classification
from esegeta.conformance.strategies import Shape
from esegeta.conformance.subjects import Subject

# Few, so that what draws scores of each shape is made once. Small ones first: they are what a search ends with.
SHAPES: tuple[Shape, ...] = (
    *((1, 1), (1, 2), (1, 3), (2, 2), (1, 4), (2, 4)),
    *((1, 2, 2), (1, 1, 3), (2, 2, 1), (2, 3, 4), (1, 4, 4)),
    *((1, 2, 1, 2), (2, 2, 2, 1), (1, 2, 3, 2), (2, 2, 2, 2)),
)


# Of a shape ``(C,*S)``, strategies of scores.
Scores = Callable[[Shape], SearchStrategy[Any]]


# What draws is made once for each kind of scores and shape: to make it takes longer than to draw from it.
_kept = functools.lru_cache(512)


@dataclass(frozen=True)
class Kind:
    """What decides which situations a subject is put to. ``chosen``: the only scores that are wanted."""

    networks_only: bool
    one_channel: bool
    chosen: Scores | None = None


def situations(axiom: str, subject: Subject, chosen: Scores | None = None) -> SearchStrategy[Any]:
    """Situations of one axiom for a subject: of scores that it can explain, or of those that are chosen."""
    kind = Kind(subject.wants == "module", subject.one_channel, chosen)
    # What compares voxels needs two.
    shapes = [s for s in SHAPES if axiom != "symmetry" or math.prod(s[1:]) > 1]
    return st.sampled_from(shapes).flatmap(lambda shape: _of_shape(axiom, kind, shape))


def of_kind(name: str, subject: AnySubject, chosen: Scores | None = None) -> SearchStrategy[Any]:
    """Situations of one law for a subject of whatever kind."""
    if isinstance(subject, ReducerSubject):
        return st.sampled_from(SHAPES).flatmap(lambda shape: _reduced(name, subject.output, shape))
    if isinstance(subject, RewriteSubject):
        return st.sampled_from(SHAPES).flatmap(lambda shape: _rewritten(name, chosen, shape))
    assert isinstance(subject, Subject)
    return situations(name, subject, chosen)


@_kept
def _rewritten(name: str, chosen: Scores | None, shape: Shape) -> SearchStrategy[Any]:
    if chosen is not None:
        made: SearchStrategy[Any] = chosen(shape)
    else:  # most have what rewrites are about
        active, any_score = (
            strategies.networks(shape=shape, where=_is_active),
            scores(Kind(False, False), shape),
        )
        # Not ``active | active | any_score``: Hypothesis takes equal alternatives for one.
        made = st.integers(0, 3).flatmap(lambda i: active if i < 3 else any_score)
    return st.builds(REWRITE_LAWS[name], strategies.cases(made, shape=shape))


def _is_active(net: Network) -> bool:
    return any(n in OPERATORS and OPERATORS[n].family == "activation" for n in net.operators)


@_kept
def _reduced(name: str, output: str, shape: Shape) -> SearchStrategy[Any]:
    # A gradient adds up to what its quadrature leaves only where it is smooth, and a jump is found in the smooth too.
    model: SearchStrategy[Any] = strategies.segmentations(shape=shape, smooth=True)
    if output == "vector":
        model = model.map(Classification)
    return st.builds(REDUCER_LAWS[name], model, strategies.images(shape), strategies.images(shape))


@_kept
def _of_shape(axiom: str, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    return DRAWN[axiom](laws.LAWS[axiom], kind, shape)


@_kept
def scores(kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    """What a subject can explain: networks, and where it takes any function, functions too."""
    if kind.chosen is not None:
        return kind.chosen(shape)
    nets = strategies.networks(shape=shape)
    return nets if kind.networks_only else strategies.functions(shape=shape) | nets


@_kept
def kinked(kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    """Scores that saturate or start late. The kinks of functions lie where images do, those of networks beside."""
    if kind.chosen is not None:
        return kind.chosen(shape)
    nets = strategies.networks(shape=shape, smooth=False)
    if kind.networks_only:
        return nets
    plain = strategies.functions(shape=shape, kinds=("Additive", "Perceptron", "Extremum"), smooth=False)
    return _of_one_element(shape, _element(shape)) | plain | nets


def _suiting(
    kind: Kind, shape: Shape, suits: Callable[[Any], bool], otherwise: SearchStrategy[Any]
) -> SearchStrategy[Any]:
    """For an axiom about scores of one sort: those of them that are chosen, or else ``otherwise``."""
    return otherwise if kind.chosen is None else kind.chosen(shape).filter(suits)


def _of_one_element(shape: Shape, element: SearchStrategy[int]) -> SearchStrategy[Any]:
    """Functions with a kink that look at one element only: where that one is flat, all of it is."""
    n = math.prod(shape)
    kinks = st.sampled_from(
        [name for name, b in BENDS.items() if not b.smooth and name not in strategies.SPELLINGS]
    )

    def build(element: int, weight: float | int, bend: str) -> Additive:
        at = lambda value, other: tuple(value if i == element else other for i in range(n))
        return Additive(at(weight, 0), at(bend, "identity"))

    return st.builds(build, element, _not_zero(), kinks)


@_kept
def _case(kind: Kind, shape: Shape) -> SearchStrategy[Case]:
    return strategies.cases(scores(kind, shape), shape=shape)


@_kept
def _kinked_case(kind: Kind, shape: Shape) -> SearchStrategy[Case]:
    return strategies.cases(kinked(kind, shape), shape=shape)


def _plain(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    return st.builds(law, _case(kind, shape))


def _element(shape: Shape) -> SearchStrategy[int]:
    return st.integers(0, math.prod(shape) - 1)


def _not_zero(most: int = 2) -> SearchStrategy[float | int]:
    return strategies.numbers(most).filter(bool)


def _sensitivity_a(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    # Most that are blind are blind behind a kink of the very element that changes.
    any_score = kinked(kind, shape) | scores(kind, shape)
    no_other = kind.networks_only or kind.chosen is not None

    @functools.cache
    def at(element: int) -> SearchStrategy[Any]:
        own = any_score if no_other else _of_one_element(shape, st.just(element)) | any_score
        return st.builds(law, strategies.cases(own, shape=shape), st.just(element), _not_zero(4))

    def aimed(law: Any, target: float | None) -> Any:
        by = 0.0 if target is None else target - float(law.case.baseline.flatten()[law.element])
        return replace(law, by=by) if by else law

    # Some end right behind a kink, so that few points of the way to it lie behind.
    ends = st.sampled_from([None, None, 0.25, 1.25, -0.25, -1.25])
    return st.builds(aimed, _element(shape).flatmap(at), ends)


def _dummy(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    # For one map of all channels whole voxels have to be ignored.
    voxels = math.prod(shape[1:])
    which = st.lists(st.integers(0, voxels - 1), max_size=voxels, unique=True)
    if kind.one_channel:
        elements = which.map(lambda vs: tuple(c * voxels + v for c in range(shape[0]) for v in sorted(vs)))
    else:
        elements = st.lists(_element(shape), max_size=math.prod(shape), unique=True).map(
            lambda v: tuple(sorted(v))
        )
    return st.builds(law, _case(kind, shape), elements)


def _linearity(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    return st.builds(law, _case(kind, shape), scores(kind, shape), st.tuples(_not_zero(), _not_zero()))


def _symmetry(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    one = st.integers(0, math.prod(shape[1:] if kind.one_channel else shape) - 1)
    return st.builds(law, _case(kind, shape), st.tuples(one, one).filter(lambda v: v[0] < v[1]))


@_kept
def _equal(kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    if kind.chosen is not None:
        return strategies.pairs(score=kind.chosen(shape), rewrites=() if kind.networks_only else REWRITES)
    rebuilt = strategies.pairs(shape=shape, rewrites=())
    if kind.networks_only:
        return rebuilt
    return strategies.pairs(shape=shape, rebuildings=()) | rebuilt | rebuilt


def _implementation_invariance(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    def of(pair: Any) -> SearchStrategy[Any]:
        return st.builds(law, strategies.cases(st.just(pair.first), shape=shape), st.just(pair.second))

    return _equal(kind, shape).flatmap(of)


def _sensitivity_n(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    plain = strategies.functions(shape=shape, kinds=("Linear", "Additive"))
    additive = _suiting(kind, shape, lambda f: isinstance(f, Linear | Additive), plain)
    subset = st.lists(_element(shape), min_size=1, unique=True).map(lambda v: tuple(sorted(v)))
    return st.builds(law, strategies.cases(additive, shape=shape), subset)


def _shift(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    return st.builds(law, _case(kind, shape), strategies.images(shape))


def _scale(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    return st.builds(law, _case(kind, shape), st.sampled_from([2, 4, 0.5, 1.5, 3, 100]))


def _continuity(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    # What jumps does so at kinks, where no image lies by chance.
    kinks = st.builds(law, _kinked_case(kind, shape), strategies.images(shape)).map(_at_a_kink)
    return kinks | st.builds(law, _case(kind, shape), strategies.images(shape))


def _at_a_kink(situation: Any) -> Any:
    """The image moved towards the baseline right before a kink, and the step across it; as it was without any."""
    case = situation.case
    place = cases.kink(case.score, case.x, case.baseline)
    if place is None:
        return situation
    line = case.x - case.baseline
    moved = replace(case, x=case.baseline + place * line)
    return replace(situation, case=moved, direction=line.tolist())


def _regions(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    def label(flat: list[int]) -> Any:
        ranks = {v: i for i, v in enumerate(sorted(set(flat)))}
        return strategies.nested([ranks[v] for v in flat], shape[1:])

    n = math.prod(shape[1:])
    labels = st.lists(st.integers(0, 3), min_size=n, max_size=n).map(label)
    return st.builds(law, _case(kind, shape), labels)


def _class_sensitivity(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    return st.builds(law, _case(kind, shape), kinked(kind, shape) | scores(kind, shape))


def _translation(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    offsets = st.tuples(*[st.integers(-1, 1)] * (len(shape) - 1)).filter(any)
    return st.builds(law, _case(kind, shape), offsets)


def _turns(axes: int) -> list[tuple[tuple[int, ...], ...]]:
    return [
        tuple(tuple(sign if i == j else 0 for j in range(axes)) for i, sign in zip(order, signs, strict=True))
        for order in itertools.permutations(range(axes))
        for signs in itertools.product((1, -1), repeat=axes)
    ]


def _affine(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    return st.builds(law, _case(kind, shape), st.sampled_from(_turns(len(shape) - 1)))


def _monotonicity(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    plain = strategies.functions(shape=shape, monotone=True)
    rising = _suiting(kind, shape, lambda f: getattr(f, "monotone", False), plain)
    return st.builds(law, strategies.cases(rising, shape=shape))


def _parameters(law: Any, kind: Kind, shape: Shape) -> SearchStrategy[Any]:
    # Correlations need elements, and an image that does not decide the map by itself: ones and minus ones. What
    # upper parameters can be lost in are rectifiers: most of the networks are chains of them.
    shape = (shape[0], *{1: (16,), 2: (5, 5), 3: (3, 3, 3)}[len(shape) - 1])
    n = math.prod(shape)
    x = st.lists(st.sampled_from([1, -1]), min_size=n, max_size=n).map(lambda v: strategies.nested(v, shape))
    nothing = strategies.nested([0] * n, shape)
    deep = _suiting(kind, shape, _has_upper, _deep(shape))
    case = st.builds(Case, deep, x, st.just(nothing), st.just([nothing, nothing]))
    return st.builds(law, case, st.just(tuple(range(1, 9))))


@functools.cache
def _deep(shape: Shape) -> SearchStrategy[Any]:
    end = st.sampled_from([(), ("pointwise conv",)])
    # What goes backwards through many channels and rectifiers forgets where it began.
    layers = st.integers(2, 4).map(("conv", "relu").__mul__) | st.integers(4, 8).map(
        ("wide conv", "relu").__mul__
    )
    chains = st.builds(
        lambda body, end, seed: Network(shape, body + end, "sum", seed), layers, end, st.integers(1, 2**16)
    )
    return chains | chains | chains | strategies.networks(shape=shape, where=_has_upper)


def _has_upper(score: Any) -> bool:
    return bool(getattr(score, "has_upper", False))


DRAWN: dict[str, Callable[[Any, Kind, Shape], SearchStrategy[Any]]] = {
    "completeness": _plain,
    "conservation": _plain,
    "sensitivity_a": _sensitivity_a,
    "dummy": _dummy,
    "linearity": _linearity,
    "symmetry": _symmetry,
    "implementation_invariance": _implementation_invariance,
    "sensitivity_n": _sensitivity_n,
    "shift": _shift,
    "scale_of_output": _scale,
    "efficiency_of_regions": _regions,
    "continuity": _continuity,
    "class_sensitivity": _class_sensitivity,
    "translation_equivariance": _translation,
    "affine_equivariance": _affine,
    "monotonicity": _monotonicity,
    "parameter_dependence": _parameters,
}
