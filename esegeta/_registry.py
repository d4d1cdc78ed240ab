"""What reducers, methods and transforms declare: one table that tests, docs, benchmarks and tools read.

A function joins the table by its decorator, in its own file. The decorators also put the checks of user
input around every explanation, so that a method is only its mathematics.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from torch import Tensor

from esegeta.engine import check, gradient

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
    says = getattr(explain, "takes_key", None)
    if says is not None:
        return bool(says)
    try:
        return "key" in inspect.signature(explain).parameters
    except (TypeError, ValueError):
        return False


def _checked(
    name: str,
    explain: Callable[..., Tensor],
    kinds: tuple[str, ...],
    key: bool,
    score: Callable[[Tensor], Tensor] | None,
) -> Callable[..., Tensor]:
    """Put the checks of one call around an explanation; ``score`` is given where its gradient is needed."""

    def prepare(x: Tensor, refs: tuple[Tensor, ...]) -> None:
        check.image(name, "x", x)
        if len(refs) != len(kinds):
            raise TypeError(
                check.problem(
                    name,
                    f"explain(x{''.join(', ' + k for k in kinds)}{', key=...' if key else ''})",
                    f"{1 + len(refs)} tensors",
                    "Baselines are made by esegeta.baselines, for example baselines.zero(x)",
                )
            )
        for kind, ref in zip(kinds, refs, strict=True):
            check.finite(name, kind, REFS[kind](name, kind, ref, x), "Repair it, e.g. with torch.nan_to_num")

    def finish(x: Tensor, a: Any) -> Any:  # a tensor, or several for several places
        if score is not None:
            gradient.refuse_dead_score(name, score, x, a if isinstance(a, Tensor) else next(iter(a)))
        return a

    if key:

        @functools.wraps(explain)
        def keyed(x: Tensor, *refs: Tensor, key: "int | Tensor | None" = None) -> Any:
            prepare(x, refs)
            return finish(x, explain(x, *refs, key=check.key(name, key)))

        return _named(keyed, name, kinds, key=True)

    @functools.wraps(explain)
    def plain(x: Tensor, *refs: Tensor) -> Any:
        prepare(x, refs)
        return finish(x, explain(x, *refs))

    return _named(plain, name, kinds, key=False)


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


def _named(explain: Any, name: str, refs: tuple[str, ...], key: bool) -> Callable[..., Tensor]:
    """Errors and progress bars call it by the method; its own signature, not the inner one, is the public one."""
    del explain.__wrapped__
    explain.__name__ = explain.__qualname__ = name
    explain.takes_key, explain.refs = key, refs
    return explain


def _words(names: tuple[str, ...] | str) -> frozenset[str]:
    """Names from a tuple, or from one text."""
    return frozenset(names.split() if isinstance(names, str) else names)


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
        @functools.wraps(fn)
        def factory(score: Callable[[Tensor], Tensor], *where: Any, **static: Any) -> Callable[..., Tensor]:
            if not callable(score):
                raise TypeError(
                    check.problem(
                        fn.__name__,
                        "a score: a function of one example",
                        check.describe(score),
                        "Compose a reducer",
                    )
                )
            if len(where) > place:
                raise TypeError(
                    check.problem(
                        fn.__name__,
                        f"{1 + place} positional argument{'s' if place else ''}",
                        str(1 + len(where)),
                        "Settings have to be named",
                    )
                )
            if needs == "gradient":
                gradient.refuse_forward_only(fn.__name__, score)
            inner = fn(_finite(fn.__name__, score), *where, **static)
            return _checked(fn.__name__, inner, tuple(refs), key, score if needs == "gradient" else None)

        _add(
            METHODS,
            MethodSpec(
                factory,
                tuple(refs),
                key,
                _words(axioms),
                needs,
                dict(example or {}),
                paper,
                tuple(also),
                place,
                shape or ("layer" if place else "input"),
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
    """Register ``Explain -> Explain`` under its function name."""

    def add(fn: Function) -> Function:
        _add(
            TRANSFORMS,
            TransformSpec(
                fn,
                refs,
                key,
                _words(preserves),
                dict(example or {}),
                paper,
                shape,
            ),
        )
        return fn

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
        @functools.wraps(fn)
        def factory(model: Callable[..., Tensor], *args: Any, **static: Any) -> Callable[[Tensor], Tensor]:
            if not callable(model):
                raise TypeError(
                    check.problem(
                        fn.__name__,
                        "a model: a function of one example",
                        check.describe(model),
                        "Wrap a network with esegeta.from_module",
                    )
                )
            score: Any = fn(model, *args, **static)
            words = [*(_short(a) for a in args), *(f"{k}={_short(v)}" for k, v in static.items())]
            score.__name__ = score.__qualname__ = f"{fn.__name__}({', '.join(['model', *words])})"
            score.differentiable = differentiable
            return score

        _add(REDUCERS, ReducerSpec(factory, output, mask, differentiable, dict(example or {})))
        return cast(Function, factory)  # same signature, with checks around

    return add


def _short(value: object) -> str:
    return check.describe(value) if isinstance(value, Tensor) else repr(value)


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
        if name == spec.name or name in spec.also:
            return spec
    import difflib

    names = [n for s in METHODS.values() for n in (s.name, *s.also)]
    near = difflib.get_close_matches(name, names, n=3)
    raise ValueError(
        check.problem(
            "find_method", "the name of a method", repr(name), f"Nearest: {', '.join(near) or 'none'}"
        )
    )
