"""Everything that is found by name: what reducers, methods, transforms and the rest declare of themselves.

A function joins the table of its kind by a decorator, in its own file. Tests, docs, benchmarks, the command line
and configurations read these tables. The decorators of methods, transforms and reducers also put the checks of user
input around every explanation, so that a method is only its mathematics.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

from torch import Tensor

from esegeta._facts import carry, declare, explanation, facts_of, named, settings, short
from esegeta.axioms import AXIOMS
from esegeta.engine import check, gradient, views

Needs = Literal["gradient", "values", "activation"]
Shape = Literal["input", "layer", "map"]
Numbers = Literal["amount", "part", "mask", "layer"]
Better = Literal["higher", "lower", ""]
Answer = Literal["scalar", "sampled", "curve"]
Function = TypeVar("Function", bound=Callable[..., Any])

GROUP = "esegeta.plugins"  # of entry points, by which installed packages offer what they register
GIVEN = ("at", "key")  # what a run knows: the image where a mask is frozen, the key of the draw


class Cost(NamedTuple):
    """How often a call runs the score forwards, differentiates it, or makes another explanation.

    None where only the image tells. What ends at a tolerance costs at most that.
    """

    forwards: int | None = 0
    gradients: int | None = 0
    explanations: int | None = 0


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What everything that is found by name declares.

    fn: the function; family: the group in which a reader looks for it; example: arguments of a cheap instance, by
    name; paper: where it comes from; also: other names that people look for; costs: from some of its arguments, by
    name, to its ``Cost``; numbers: what the numbers of its map are: the amount of an element, of which larger
    elements have more, the value of a part, a mask, or a map of a layer; leads: how many arguments stand before
    those that a file can set; called: its public name, if that is not the name of the function.
    """

    fn: Callable[..., Any]
    family: str = ""
    example: Mapping[str, Any] = field(default_factory=dict)
    paper: str = ""
    also: tuple[str, ...] = ()
    costs: Callable[..., Cost] | None = None
    numbers: Numbers = "amount"
    leads: int = 0
    called: str = ""

    @property
    def name(self) -> str:
        """The public name."""
        return self.called or self.fn.__name__

    @property
    def origin(self) -> str:
        """The package or the file that it comes from."""
        return self.fn.__module__.partition(".")[0]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters that a file can set."""
        own = list(inspect.signature(self.fn).parameters.values())[self.leads :]
        return {p.name: p for p in own if p.name not in GIVEN}

    def cost(self, **arguments: Any) -> Cost:
        """Return what a call with these arguments costs; for those that are left out the defaults count."""
        if self.costs is None:
            return Cost(None, None, None)
        known = {name: p.default for name, p in inspect.signature(self.fn).parameters.items()} | arguments
        return self.costs(*(known[name] for name in inspect.signature(self.costs).parameters))


@dataclass(frozen=True, kw_only=True)
class MethodSpec(Spec):
    """What a method promises.

    refs: the further tensors of its explanation, by kind (see ``REFS``); key: whether it draws at random;
    axioms: names in ``esegeta.axioms`` that hold for every score; needs: whether the score must be
    differentiable ("gradient"), give values, or run only as far as an activation.
    place: whether it explains by the activations at a place, which is its second argument; shape: "input" if the
    explanation is like x, "layer" if it is like the activation, "map" if it is one channel on the grid of either.
    rewrites: what it refuses to do without: "activations" if it is the plain gradient of a score that has none.
    differentiable: whether its explanations have a derivative; those by rules refuse it, regions have none.
    contributions: whether the values of its map are shares of the score, False for slopes, which are in units of the
    score per unit of the image; None where they are neither. What claims completeness has contributions.
    """

    refs: tuple[str, ...] = ()
    key: bool = False
    axioms: frozenset[str] = frozenset()
    needs: Needs = "gradient"
    place: bool = False
    shape: Shape = "input"
    rewrites: str = ""
    differentiable: bool = True
    contributions: bool | None = None


@dataclass(frozen=True, kw_only=True)
class TransformSpec(Spec):
    """What a transform promises.

    refs: from the refs of the inner explanation to those of the outer one, or None where it does not apply;
    preserves: the axioms that survive it; key: whether it draws at random itself; shape: "input", or
    "one channel" where it reduces the channel axis.
    """

    refs: Callable[[tuple[str, ...]], tuple[str, ...] | None] = lambda inner: inner
    key: bool = False
    preserves: frozenset[str] = frozenset()
    shape: Literal["input", "one channel"] = "input"
    leads: int = 1


@dataclass(frozen=True, kw_only=True)
class ReducerSpec(Spec):
    """What a reducer promises.

    output: "map" for outputs (K, *S), "vector" for (K,), "any" for both; mask: whether it freezes a mask at
    ``at=``; differentiable: False for counts, whose gradient is zero everywhere.
    """

    output: Literal["map", "vector", "any"] = "map"
    mask: bool = False
    differentiable: bool = True
    leads: int = 1


@dataclass(frozen=True, kw_only=True)
class MetricSpec(Spec):
    """What a metric promises.

    better: which values are good, "" where neither direction is; answer: one number, a number with a standard error
    because it is a mean over draws, or a curve with an area; needs: what it reads besides a finished map,
    of ``METRIC_NEEDS``; exact: its number for the true map of a linear score, None if that depends on the score;
    ranks: whether no permutation of the true map of an additive score has a better number; axes: what a curve runs
    along, and what its values are, in words.
    """

    better: Better = ""
    answer: Answer = "scalar"
    axes: tuple[str, str] = ("", "")
    needs: tuple[str, ...] = ()
    exact: float | None = None
    ranks: bool = False


S = TypeVar("S", bound=Spec)


class Registry(dict[str, S], Generic[S]):
    """What there is of one kind, by name.

    >>> from dataclasses import dataclass
    >>> colours = Registry("colour", Spec)
    >>> @colours.register(family="warm", also=("crimson",))
    ... def red(depth=1): ...
    >>> colours.find("crimson").name, list(colours["red"].parameters)
    ('red', ['depth'])
    """

    def __init__(self, kind: str, spec: type[S], asked_by: tuple[str, ...] = ()) -> None:
        """Begin an empty table.

        Args:
            kind: what messages call a member.
            spec: what a member declares.
            asked_by: the names of parameters for which a file can ask for a member by name.
        """
        super().__init__()
        self.kind, self.spec, self.asked_by = kind, spec, asked_by

    def add(self, spec: S) -> S:
        """Enter a member; a name is taken once."""
        if spec.name in self:
            got = f"{spec.name!r}, already defined in {self[spec.name].fn.__module__}"
            raise check.refused("esegeta registry", "a new name", got, "Rename the function")
        self[spec.name] = spec
        return spec

    def register(
        self, *, cost: Callable[..., Cost] | None = None, **facts: Any
    ) -> Callable[[Function], Function]:
        """Enter a function under its name.

        Args:
            cost: from some of its arguments, by name, to what a call costs.
            facts: the other fields of its spec.
        """

        def enter(fn: Function) -> Function:
            self.add(self.spec(fn=fn, costs=cost, **facts))
            return fn

        return enter

    @property
    def by_name(self) -> dict[str, S]:
        """Every member by its name and by its other names."""
        return {name: spec for spec in self.values() for name in (spec.name, *spec.also)}

    def find(self, name: str) -> S:
        """Return the member of that name or of that other name."""
        known = self.by_name
        if isinstance(name, str) and name in known:
            return known[name]
        advice = check.nearest(name, list(known), "The command `esegeta methods` lists them")
        where, expected = f"find_{self.kind}", f"the name of a {self.kind}"
        raise check.refused(where, expected, repr(name), advice)


METHODS = Registry("method", MethodSpec)
TRANSFORMS = Registry("transform", TransformSpec)
REDUCERS = Registry("reducer", ReducerSpec)
COMBINATIONS = Registry("combination", Spec)  # of explanations of several layers, or of several networks
REWRITES = Registry("rewrite", Spec)
COMPOSITES = Registry("composite", Spec, ("composite",))
BASELINES = Registry("baseline", Spec)
FEATURES = Registry("features", Spec, ("features",))
SEGMENTATIONS = Registry("segmentation", Spec, ("segments", "segment"))
FILLS = Registry("fill", Spec, ("fill",))
NOISES = Registry("noise", Spec, ("noise",))
MASKS = Registry("mask", Spec, ("mask",))
NETWORKS = Registry("network", Spec)
STEPS = Registry("step", Spec)
METRICS = Registry("metric", MetricSpec)
PERTURBATIONS = Registry("perturbation", Spec, ("perturbation",))  # of images, by metrics
SIMILARITIES = Registry("similarity", Spec, ("similarity",))  # of two maps
NULLS = Registry("null", Spec, ("null",))  # random maps that stand beside a map
OBJECTIVES = Registry("objective", Spec)
PARAMETRISATIONS = Registry("parametrisation", Spec, ("parametrisation",))
REGULARISERS = Registry("regulariser", Spec)
DISTORTIONS = Registry("distortion", Spec)  # under which a dream has to hold
OPTIMISERS = Registry("optimiser", Spec, ("optimiser",))
RECIPES = Registry("recipe", Spec)
UNCERTAINTIES = Registry("uncertainty", Spec)

REGISTRIES: tuple[Registry[Any], ...] = (
    METHODS,
    TRANSFORMS,
    REDUCERS,
    COMBINATIONS,
    REWRITES,
    COMPOSITES,
    BASELINES,
    FEATURES,
    SEGMENTATIONS,
    FILLS,
    NOISES,
    MASKS,
    NETWORKS,
    STEPS,
    METRICS,
    PERTURBATIONS,
    SIMILARITIES,
    NULLS,
    OBJECTIVES,
    PARAMETRISATIONS,
    REGULARISERS,
    DISTORTIONS,
    OPTIMISERS,
    RECIPES,
    UNCERTAINTIES,
)

# The decorators of what needs no checks around it: ``@baseline(example={...})``. The fields are those of ``Spec``.
combination = COMBINATIONS.register
rewrite = REWRITES.register
composite = COMPOSITES.register
baseline = functools.partial(BASELINES.register, leads=1)  # of the image
features = FEATURES.register
segmentation = functools.partial(SEGMENTATIONS.register, leads=1)  # of the image
fill = FILLS.register
noise = NOISES.register
mask = MASKS.register
network = NETWORKS.register
step = STEPS.register
perturbation = PERTURBATIONS.register
similarity = functools.partial(SIMILARITIES.register, leads=2)  # of two maps
null = functools.partial(NULLS.register, leads=2)  # of a map and a key
objective = functools.partial(OBJECTIVES.register, family="dreams")
parametrisation = functools.partial(PARAMETRISATIONS.register, family="dreams")
regulariser = functools.partial(REGULARISERS.register, family="dreams")
distortion = functools.partial(DISTORTIONS.register, family="dreams")
optimiser = functools.partial(OPTIMISERS.register, family="dreams")
recipe = functools.partial(RECIPES.register, family="dreams", leads=2)  # of the objective and the start
uncertainty = UNCERTAINTIES.register


# What a metric can need besides a finished map: a score to run, a mask and a key at the call, explanations of other
# images, and the network whose weights it randomises.
METRIC_NEEDS = ("score", "mask", "key", "explain", "network")


def metric(
    *,
    family: str,
    better: Better,
    answer: Answer = "scalar",
    needs: tuple[str, ...] = (),
    paper: str,
    exact: float | None = None,
    ranks: bool = False,
    axes: tuple[str, str] | None = None,
    example: Mapping[str, Any] | None = None,
    also: tuple[str, ...] = (),
    cost: Callable[..., Cost] | None = None,
) -> Callable[[Function], Function]:
    """Register a metric of explanations under its function name.

    Args:
        family: faithfulness, localisation, robustness, ...
        better: which of its values are good, "higher" or "lower"; "" where neither is.
        answer: "scalar" for one number, "sampled" for a mean over draws, which has a standard error, or "curve".
        needs: what it reads besides a finished map: "score", "network", which are its second argument, "mask" and
            "key", which are given at the call, "explain" for explanations of other images or networks.
        paper: where it comes from.
        exact: its number for the true map of a linear score; None if that depends on the score.
        ranks: whether no permutation of the true map of an additive score has a better number.
        axes: of a curve, what it runs along and what its values are, as figures say it.
        example: arguments of a cheap instance, by name.
        also: other names that people look for.
        cost: from some of its arguments, by name, to the forwards, gradients and explanations of one value beyond
            the map that it judges.
    """
    check.one_of("metric", "better", better, ("higher", "lower", ""))
    check.one_of("metric", "answer", answer, ("scalar", "sampled", "curve"))
    for need in needs:
        check.one_of("metric", "needs", need, METRIC_NEEDS)
    register = METRICS.register(
        family=family,
        better=better,
        answer=answer,
        needs=tuple(needs),
        paper=paper,
        exact=exact,
        ranks=ranks,
        axes=axes or ("share of the elements, the most relevant first", "score"),
        example=dict(example or {}),
        also=tuple(also),
        cost=cost,
        leads=1 + bool({"score", "network"} & set(needs)),
    )
    return (lambda fn: register(_of_a_score(fn))) if "score" in needs else register


def _of_a_score(fn: Function) -> Function:
    """Refuse a network where a metric takes a score, as methods do: a network takes batches."""

    @functools.wraps(fn)
    def factory(explain: Any, *score: Any, **static: Any) -> Any:
        for one in (*score[:1], *([static["score"]] if "score" in static else [])):
            check.score(f"metrics.{fn.__name__}", one)
        return fn(explain, *score, **static)

    return cast("Function", factory)


def load_plugins(trusted: Callable[[EntryPoint], bool]) -> list[str]:
    """Import what installed packages offer to register, if it is trusted.

    A package offers a module by an entry point of the group ``esegeta.plugins``.

    Args:
        trusted: whether the code behind an entry point may run.

    Returns:
        The modules that are imported now.
    """
    found = [point for point in entry_points(group=GROUP) if trusted(point)]
    for point in found:
        point.load()
    return [point.module for point in found]


def waiting_plugins() -> tuple[str, ...]:
    """Return the modules that installed packages offer to register and that were not imported: nobody trusts them."""
    return tuple(module for module in _offered(tuple(sys.path)) if module not in sys.modules)


@functools.cache
def _offered(path: tuple[str, ...]) -> tuple[str, ...]:  # noqa: ARG001  to look through all packages takes long
    return tuple(dict.fromkeys(point.module for point in entry_points(group=GROUP)))


# The kinds of tensor that an explanation takes besides x, and how each is checked against x.
REFS: dict[str, Callable[[str, str, object, Tensor], Tensor]] = {
    "baseline": check.like,
    "baselines": check.stack_of,
}


def takes_key(explain: Callable[..., Tensor]) -> bool:
    """Return whether an explanation draws random numbers: it says so itself, or by its signature.

    >>> takes_key(lambda x, *, key=None: x), takes_key(lambda x, baseline: x)
    (True, False)
    """
    return bool(facts_of(explain).key)


# What methods are made of. A user who called none of these should not read of them.
_PLACES = frozenset(
    ["activation_and_gradient", "bias_and_gradient", "nudge", "partials", "places", "replace", "split", "tap"]
)
_BLOCKS = _PLACES | {"quadrature", "windows", "elements"}


def _checked(
    name: str,
    explain: Callable[..., Tensor],
    *,
    kinds: tuple[str, ...],
    key: bool,
    score: Callable[[Tensor], Tensor] | None,
    shape: Shape,
    place: bool,
    doc: str,
    inside: frozenset[str],
) -> Callable[..., Tensor]:
    """Put the checks of one call around an explanation; ``score`` is given where its gradient is needed."""

    def run(x: Tensor, *refs: Tensor, **extra: "int | Tensor") -> Any:
        check.image(name, "x", x)
        for kind, ref in zip(kinds, refs, strict=True):
            check.finite(name, kind, REFS[kind](name, kind, ref, x), "Repair it, e.g. with torch.nan_to_num")
        if key:
            extra = {"key": check.key(name, extra.get("key"))}
        with check.calling(name, inside):
            a = explain(x, *refs, **extra)
        if shape != "input" or not isinstance(a, Tensor) or a.shape != x.shape:
            _like_input(name, x, a, shape, place)
        if score is not None:  # a tensor, or several for several places
            with check.calling(name, inside):
                gradient.refuse_dead_score(name, score, x, a if isinstance(a, Tensor) else next(iter(a)))
        return a

    run.__module__ = explain.__module__
    return explanation(run, name, kinds, key=key, doc=doc)


_TENSORS = {
    "x": "one example (C,*S); for many use esegeta.batched.",
    "baseline": "like x; see esegeta.baselines.",
    "baselines": "a stack (n,C,*S); see esegeta.baselines.",
    "key": "an int, or an int64 tensor of shape (); the same key draws the same numbers.",
}


def _doc(fn: Callable[..., Any], call: str, tensors: tuple[str, ...]) -> str:
    """The docstring of an explanation: what made it, with which settings, and what it takes."""
    first, _, _ = (inspect.getdoc(fn) or "").partition("\n")
    names = "\n".join(f"    {t}: {_TENSORS[t]}" for t in tensors if t in _TENSORS)
    return f"{call}\n\n{first}\n\nArgs:\n{names}\n\nSee help(esegeta.{fn.__name__})."


def _returning_maps(name: str, explain: Callable[..., Any]) -> Callable[..., Any]:
    """The explanation, refused where it returns anything but maps."""

    @functools.wraps(explain)
    def checked(*args: Any, **kwargs: Any) -> Any:
        return check.maps(name, explain(*args, **kwargs))

    return checked


def _check_place(name: str, place: object) -> None:
    """Refuse what is no name of a place, and no sequence of them."""
    if not isinstance(place, str) and not (isinstance(place, Sequence) and place):
        advice = "Pass for example 'encoder.0'"
        raise check.refused_type(name, "a place or a sequence of places", check.describe(place), advice)
    for one in [place] if isinstance(place, str) else place:
        views.parse(name, one)


def _flags(fn: Callable[..., Any]) -> list[str]:
    """The parameters that are either True or False."""
    return [p.name for p in inspect.signature(fn).parameters.values() if p.annotation in (bool, "bool")]


def _check_flags(name: str, flags: list[str], static: Mapping[str, Any]) -> None:
    for flag in flags:
        if flag in static:
            check.flag(name, flag, static[flag])


def _finite(name: str, score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The score, refused where its value is NaN or infinite."""

    @functools.wraps(score)
    def checked(x: Tensor) -> Tensor:
        y = score(x)
        if isinstance(y, Tensor) and y.is_floating_point():
            check.finite(
                name,
                "the score",
                y,
                "Look for NaN in the weights, overflow in half precision, or log(0) in the score",
            )
        return y

    # For those that run it on many changed inputs, and say themselves which of them had no finite value.
    return carry(checked, score, unchecked=score)


def _claims(where: str, what: str, names: tuple[str, ...] | str) -> frozenset[str]:
    """Names of axioms from a tuple, or from one text; others are refused."""
    claimed = names.split() if isinstance(names, str) else names
    for name in claimed:
        if name not in AXIOMS:
            advice = check.nearest(name, AXIOMS, f"There are {', '.join(sorted(AXIOMS))}")
            raise check.refused(where, f"{what} to be names of axioms", repr(name), advice)
    return frozenset(claimed)


def _like_input(name: str, x: Tensor, a: Any, shape: Shape, place: bool) -> None:
    """Refuse what is no explanation of its input: another shape, several tensors, none."""
    several = place and isinstance(a, (list, tuple)) and len(a) > 0  # for several places
    tensors = list(a) if several else [a]
    if all(isinstance(t, Tensor) for t in tensors):
        got = check.describe(tensors[0])
        expected = tuple(x.shape) if shape == "input" else (1, *x.shape[1:])
        if shape == "layer" or all(tuple(t.shape) == expected for t in tensors):
            return
        if place and shape == "map" and all(t.ndim > 1 and t.shape[0] == 1 for t in tensors):
            return
        what = f"an explanation of shape {expected}"
    else:
        what, got = "an explanation to be one tensor", check.describe(a)
    advice = "Return one tensor like x, or declare shape='map' for one map of all channels"
    raise check.refused_type(name, what, got, advice)


def method(
    *,
    refs: tuple[str, ...] = (),
    key: bool = False,
    axioms: tuple[str, ...] | str = (),
    needs: Needs = "gradient",
    example: Mapping[str, Any] | None = None,
    paper: str,
    also: tuple[str, ...] = (),
    place: bool = False,
    shape: Shape | None = None,
    rewrites: str = "",
    differentiable: bool = True,
    family: str = "",
    cost: Callable[..., Cost] | None = None,
    numbers: Numbers | None = None,
    contributions: bool | None = None,
) -> Callable[[Function], Function]:
    """Register ``Score -> Explain`` under its function name and put input checks around what it returns.

    With ``place`` it is ``(score, place) -> Explain``. Many axioms may be one text, separated by spaces.
    """

    def add(fn: Function) -> Function:
        name, signature = fn.__name__, inspect.signature(fn)
        first, flags = next(iter(signature.parameters)), _flags(fn)

        @functools.wraps(fn)
        def factory(score: Callable[[Tensor], Tensor], *where: Any, **static: Any) -> Callable[..., Tensor]:
            check.score(name, score)
            images = any(isinstance(w, Tensor) for w in where)
            if len(where) > place or images:
                call = f"{name}(score{', place' * place})({', '.join(['x', *refs])})"
                raise check.refused_type(
                    name,
                    f"{1 + place} positional argument{'s, the second a place' if place else ''}",
                    f"{1 + len(where)}, the last {check.describe(where[-1])}",
                    f"The image goes into what comes out: {call}" if images else "Settings have to be named",
                )
            if place:
                if not where and "place" not in static:
                    advice = "esegeta.places(score, x) lists them"
                    raise check.refused_type(name, "a place of the score", "none", advice)
                _check_place(name, where[0] if where else static["place"])
            if needs == "gradient":
                gradient.refuse_forward_only(name, score)
            _check_flags(name, flags, static)
            with check.calling(name, _BLOCKS):
                inner = fn(_finite(name, score), *where, **static)
            given = signature.bind(score, *where, **static)
            given.apply_defaults()
            shown = {k: v for k, v in given.arguments.items() if k != first}
            call = f"{name}({', '.join(filter(None, [gradient.name_of(score), settings(shown)]))})"
            tensors = ("x", *refs, *(["key"] if key else []))
            # A score of the user's may tap, too: its errors are its own.
            inside = frozenset({"gradient"}) | (_PLACES if place else frozenset())
            needed = score if needs == "gradient" else None
            return _checked(
                name,
                inner,
                kinds=tuple(refs),
                key=key,
                score=needed,
                shape=like,
                place=place,
                doc=_doc(fn, call, tensors),
                inside=inside,
            )

        like = shape or ("layer" if place else "input")

        once = (
            Cost(gradients=1) if needs == "gradient" else Cost(forwards=1 if needs == "activation" else None)
        )
        METHODS.add(
            MethodSpec(
                fn=factory,
                refs=tuple(refs),
                key=key,
                axioms=(claimed := _claims(name, "axioms", axioms)),
                contributions=True if "completeness" in claimed else contributions,
                needs=needs,
                example=dict(example or {}),
                paper=paper,
                also=tuple(also),
                place=place,
                shape=like,
                rewrites=rewrites,
                differentiable=differentiable,
                family=family,
                costs=cost or (lambda: once),
                numbers=numbers or ("amount" if like == "input" else "layer"),
                leads=1 + place,
            )
        )
        return cast(Function, factory)  # same signature, with checks around

    return add


def transform(
    *,
    refs: Callable[[tuple[str, ...]], tuple[str, ...] | None] = lambda inner: inner,
    key: bool = False,
    preserves: tuple[str, ...] | str = (),
    example: Mapping[str, Any] | None = None,
    paper: str,
    shape: Literal["input", "one channel"] = "input",
    family: str = "",
    cost: Callable[..., Cost] | None = None,
) -> Callable[[Function], Function]:
    """Register ``Explain -> Explain`` under its function name and give what it returns names for its tensors."""

    def add(fn: Function) -> Function:
        name = fn.__name__

        @functools.wraps(fn)
        def factory(explain: Callable[..., Tensor], *args: Any, **static: Any) -> Callable[..., Tensor]:
            check.explanation(name, explain)
            if any(explain is spec.fn for spec in METHODS.values()):
                got, advice = f"the method {explain.__name__}", f"Give it a score: {explain.__name__}(score)"
                raise check.refused_type(name, "an explanation", got, advice)
            changed = fn(_returning_maps(name, explain), *args, **static)
            inner = facts_of(explain)
            outer = None if inner.refs is None else refs(inner.refs)
            if outer is None:  # called as it is: only the caller knows what it takes
                return changed
            draws, about = key or bool(inner.key), gradient.name_of(explain)
            call = ", ".join([about, *map(short, args), *filter(None, [settings(static)])])
            doc = _doc(fn, f"{name}({call})", ("x", *outer, *(["key"] if draws else [])))
            face = explanation(changed, name, outer, key=draws, doc=doc)
            return named(carry(face, changed, key=draws, refs=outer), f"{name}({about})")

        TRANSFORMS.add(
            TransformSpec(
                fn=factory,
                refs=refs,
                key=key,
                preserves=_claims(name, "preserves", preserves),
                example=dict(example or {}),
                paper=paper,
                shape=shape,
                family=family,
                costs=cost or (lambda: Cost(explanations=1)),
            )
        )
        return cast(Function, factory)  # same signature, with checks around

    return add


def reducer(
    *,
    output: Literal["map", "vector", "any"] = "map",
    mask: bool = False,
    differentiable: bool = True,
    example: Mapping[str, Any] | None = None,
    family: str = "",
) -> Callable[[Function], Function]:
    """Register ``Model -> Score`` under its function name."""

    def add(fn: Function) -> Function:
        flags = _flags(fn)

        @functools.wraps(fn)
        def factory(model: Callable[..., Tensor], *args: Any, **static: Any) -> Callable[[Tensor], Tensor]:
            check.model(fn.__name__, model)
            _check_flags(fn.__name__, flags, static)
            score: Any = fn(model, *args, **static)
            words = [*map(short, args), *filter(None, [settings(static)])]
            named(score, f"{fn.__name__}({', '.join(['model', *words])})")
            return declare(score, differentiable=differentiable)

        REDUCERS.add(
            ReducerSpec(
                fn=factory,
                output=output,
                mask=mask,
                differentiable=differentiable,
                example=dict(example or {}),
                family=family,
                costs=lambda: Cost(forwards=1),
            )
        )
        return cast(Function, factory)  # same signature, with checks around

    return add


def find_method(name: str) -> MethodSpec:
    """Return the method of that name or of that other name.

    >>> import esegeta as eg
    >>> eg.find_method("gradient_times_image").name
    'input_x_gradient'
    """
    return METHODS.find(name)
