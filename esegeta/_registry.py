"""What reducers, methods and transforms declare: one table that tests, docs, benchmarks and tools read.

A function joins the table by its decorator, in its own file. The decorators also put the checks of user
input around every explanation, so that a method is only its mathematics.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from torch import Tensor

from esegeta._facts import carry, explanation, facts_of, named, settings, short
from esegeta.engine import check, gradient, views

Needs = Literal["gradient", "values", "activation"]
Shape = Literal["input", "layer", "map"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class MethodSpec:
    """What a method promises.

    refs: the further tensors of its explanation, by kind (see ``REFS``); key: whether it draws at random;
    axioms: names in ``esegeta.axioms`` that hold for every score; needs: whether the score must be
    differentiable ("gradient"), give values, or run only as far as an activation; example: static arguments of
    a cheap instance; also: other names that people look for.
    place: whether it explains by the activations at a place, which is its second argument; shape: "input" if the
    explanation is like x, "layer" if it is like the activation, "map" if it is one channel on the grid of either.
    rewrites: what it refuses to do without: "activations" if it is the plain gradient of a score that has none.
    differentiable: whether its explanations have a derivative; those by rules refuse it, regions have none.
    """

    fn: Callable[..., Any]
    refs: tuple[str, ...]
    key: bool
    axioms: frozenset[str]
    needs: Needs
    example: Mapping[str, Any]
    paper: str
    also: tuple[str, ...] = ()
    place: bool = False
    shape: Shape = "input"
    rewrites: str = ""
    differentiable: bool = True

    @property
    def name(self) -> str:
        """The public name."""
        return self.fn.__name__


@dataclass(frozen=True)
class TransformSpec:
    """What a transform promises.

    refs: from the refs of the inner explanation to those of the outer one, or None where it does not apply;
    preserves: the axioms that survive it; key: whether it draws at random itself; shape: "input", or
    "one channel" where it reduces the channel axis.
    """

    fn: Callable[..., Any]
    refs: Callable[[tuple[str, ...]], tuple[str, ...] | None]
    key: bool
    preserves: frozenset[str]
    example: Mapping[str, Any]
    paper: str
    shape: Literal["input", "one channel"] = "input"

    @property
    def name(self) -> str:
        """The public name."""
        return self.fn.__name__


@dataclass(frozen=True)
class ReducerSpec:
    """What a reducer promises.

    output: "map" for outputs (K, *S), "vector" for (K,), "any" for both; mask: whether it freezes a mask at
    ``at=``; differentiable: False for counts, whose gradient is zero everywhere.
    """

    fn: Callable[..., Any]
    output: Literal["map", "vector", "any"]
    mask: bool
    differentiable: bool
    example: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The public name."""
        return self.fn.__name__


# What can be claimed: the names of the residuals in ``esegeta.axioms``, each with a law in ``esegeta.conformance``.
AXIOMS = (
    *("completeness", "conservation", "sensitivity_a", "dummy", "linearity", "symmetry"),
    *("implementation_invariance", "sensitivity_n", "shift", "scale_of_output", "efficiency_of_regions"),
    *("continuity", "class_sensitivity", "translation_equivariance", "affine_equivariance", "monotonicity"),
    "parameter_dependence",
)

METHODS: dict[str, MethodSpec] = {}
TRANSFORMS: dict[str, TransformSpec] = {}
REDUCERS: dict[str, ReducerSpec] = {}

# The kinds of tensor that an explanation takes besides x, and how each is checked against x.
REFS: dict[str, Callable[[str, str, object, Tensor], Tensor]] = {
    "baseline": check.like,
    "baselines": check.stack_of,
}


def _add(table: dict[str, Any], spec: Any) -> None:
    if spec.name in table:
        raise ValueError(
            check.problem(
                "esegeta registry",
                "a new name",
                f"{spec.name!r}, already defined in {table[spec.name].fn.__module__}",
                "Rename the function",
            )
        )
    table[spec.name] = spec


def takes_key(explain: Callable[..., Tensor]) -> bool:
    """Whether an explanation draws random numbers: it says so itself, or by its signature.

    >>> takes_key(lambda x, *, key=None: x), takes_key(lambda x, baseline: x)
    (True, False)
    """
    return facts_of(explain).key


# What methods are made of. A user who called none of these should not read of them.
_PLACES = frozenset(
    ["activation_and_gradient", "bias_and_gradient", "nudge", "partials", "places", "replace", "split", "tap"]
)
_BLOCKS = _PLACES | {"quadrature", "windows", "elements"}


def _checked(
    name: str,
    explain: Callable[..., Tensor],
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
        _like_input(name, x, a, shape, place)
        if score is not None:  # a tensor, or several for several places
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
        raise TypeError(check.problem(name, "a place or a sequence of places", check.describe(place), advice))
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
    checked.unchecked = score  # type: ignore[attr-defined]
    return checked


def _claims(where: str, what: str, names: tuple[str, ...] | str) -> frozenset[str]:
    """Names of axioms from a tuple, or from one text; others are refused."""
    claimed = names.split() if isinstance(names, str) else names
    for name in claimed:
        if name not in AXIOMS:
            advice = check.nearest(name, AXIOMS, f"There are {', '.join(AXIOMS)}")
            raise ValueError(check.problem(where, f"{what} to be names of axioms", repr(name), advice))
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
    raise TypeError(check.problem(name, what, got, advice))


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
                raise TypeError(
                    check.problem(
                        name,
                        f"{1 + place} positional argument{'s, the second a place' if place else ''}",
                        f"{1 + len(where)}, the last {check.describe(where[-1])}",
                        f"The image goes into what comes out: {call}"
                        if images
                        else "Settings have to be named",
                    )
                )
            if place:
                if not where and "place" not in static:
                    advice = "esegeta.places(score, x) lists them"
                    raise TypeError(check.problem(name, "a place of the score", "none", advice))
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
            inside = _PLACES if place else frozenset()  # a score of the user's may tap, too
            needed = score if needs == "gradient" else None
            return _checked(
                name, inner, tuple(refs), key, needed, like, place, _doc(fn, call, tensors), inside
            )

        like = shape or ("layer" if place else "input")

        _add(
            METHODS,
            MethodSpec(
                factory,
                tuple(refs),
                key,
                _claims(fn.__name__, "axioms", axioms),
                needs,
                dict(example or {}),
                paper,
                tuple(also),
                place,
                like,
                rewrites,
                differentiable,
            ),
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
) -> Callable[[Function], Function]:
    """Register ``Explain -> Explain`` under its function name and give what it returns names for its tensors."""

    def add(fn: Function) -> Function:
        name = fn.__name__

        @functools.wraps(fn)
        def factory(explain: Callable[..., Tensor], *args: Any, **static: Any) -> Callable[..., Tensor]:
            check.explanation(name, explain)
            if any(explain is spec.fn for spec in METHODS.values()):
                got, advice = f"the method {explain.__name__}", f"Give it a score: {explain.__name__}(score)"
                raise TypeError(check.problem(name, "an explanation", got, advice))
            changed = fn(_returning_maps(name, explain), *args, **static)
            inner = facts_of(explain)
            outer = None if inner.refs is None else refs(inner.refs)
            if outer is None:  # called as it is: only the caller knows what it takes
                return changed
            draws, about = key or inner.key, gradient.name_of(explain)
            call = ", ".join([about, *map(short, args), *filter(None, [settings(static)])])
            doc = _doc(fn, f"{name}({call})", ("x", *outer, *(["key"] if draws else [])))
            face = explanation(changed, name, outer, key=draws, doc=doc)
            return named(carry(face, changed, takes_key=draws, refs=outer), f"{name}({about})")

        _add(
            TRANSFORMS,
            TransformSpec(
                factory,
                refs,
                key,
                _claims(fn.__name__, "preserves", preserves),
                dict(example or {}),
                paper,
                shape,
            ),
        )
        return cast(Function, factory)  # same signature, with checks around

    return add


def reducer(
    *,
    output: Literal["map", "vector", "any"] = "map",
    mask: bool = False,
    differentiable: bool = True,
    example: Mapping[str, Any] | None = None,
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
            score.differentiable = differentiable
            return score

        _add(REDUCERS, ReducerSpec(factory, output, mask, differentiable, dict(example or {})))
        return cast(Function, factory)  # same signature, with checks around

    return add


def catalogue() -> Iterator[tuple[str, MethodSpec]]:
    """Every method, then every transform of every method it applies to, with the axioms that follow."""
    for name, spec in sorted(METHODS.items()):
        yield name, spec
    for name, spec in sorted(METHODS.items()):
        for outer, change in sorted(TRANSFORMS.items()):
            refs = change.refs(spec.refs)
            if refs is not None:
                yield f"{outer}({name})", _composite(spec, change, refs)


def _composite(spec: MethodSpec, change: TransformSpec, refs: tuple[str, ...]) -> MethodSpec:
    def build(score: Callable[[Tensor], Tensor], *where: Any) -> Callable[..., Tensor]:
        return change.fn(spec.fn(score, *where, **spec.example), **change.example)

    build.__name__ = f"{change.name}_{spec.name}"
    return MethodSpec(
        build,
        refs,
        spec.key or change.key,
        spec.axioms & change.preserves,
        spec.needs,
        {},
        change.paper,
        place=spec.place,
        differentiable=spec.differentiable,
        shape="map" if change.shape == "one channel" else spec.shape,
    )


def find_method(name: str) -> MethodSpec:
    """The method of that name or of that other name.

    >>> import esegeta as eg
    >>> eg.find_method("gradient_times_image").name
    'input_x_gradient'
    """
    for spec in METHODS.values():
        if isinstance(name, str) and name in (spec.name, *spec.also):
            return spec
    names = [n for s in METHODS.values() for n in (s.name, *s.also)]
    advice = check.nearest(name, names, "esegeta.catalogue() lists them")
    raise ValueError(check.problem("find_method", "the name of a method", repr(name), advice))
