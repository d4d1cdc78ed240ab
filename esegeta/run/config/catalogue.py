"""What a configuration can name: methods, transforms, reducers, baselines, and what their parameters may be.

Nothing is listed here that a registry or a signature can tell. A parameter that is a function in Python is asked
for by name, ``features = {name = "grid", size = 8}``; ``FAMILIES`` says from which module.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from esegeta import (
    baselines,
    features,
    masks,
    noise,
    reducers,  # noqa: F401  what these three register is what can be named
    rules,
    segmentation,
)
from esegeta import methods as _methods  # noqa: F401
from esegeta import transforms as _transforms  # noqa: F401
from esegeta._registry import METHODS, TRANSFORMS, MethodSpec
from esegeta.coalitions import mixed
from esegeta.run.config.annotations import fits, is_file, members, said, shown

# What the run itself knows and gives: the image where a mask is frozen, the key of the draw.
GIVEN = ("at", "key")


class Parameter(NamedTuple):
    """A parameter that a file can set."""

    name: str
    annotation: Any
    default: Any  # inspect.Parameter.empty where there is none

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty

    def __str__(self) -> str:
        if self.required:
            return self.name
        default = getattr(self.default, "__name__", None)
        return f"{self.name}={default or repr(self.default)}"


def parameters(fn: Callable[..., Any], skip: int = 0, without: Iterable[str] = GIVEN) -> dict[str, Parameter]:
    """The parameters of a function that a file can set, without the first ones and those that the run gives.

    >>> [str(p) for p in parameters(METHODS["integrated_gradients"].fn, skip=1).values()]
    ['steps=32', "rule='gauss-legendre'"]
    """
    own = list(inspect.signature(fn).parameters.values())[skip:]
    return {p.name: Parameter(p.name, p.annotation, p.default) for p in own if p.name not in without}


def of_method(spec: MethodSpec) -> dict[str, Parameter]:
    """The parameters of a method."""
    return parameters(spec.fn, skip=1 + spec.place)


def methods_by_name() -> dict[str, MethodSpec]:
    """Every method by its name and by its other names."""
    return {name: spec for spec in METHODS.values() for name in (spec.name, *spec.also)}


def nearest(word: object, known: Iterable[str]) -> str:
    """Advice for a word that is not known."""
    names = list(known)
    close = difflib.get_close_matches(str(word), names, n=3, cutoff=0.5)
    if close:
        return f"Nearest: {', '.join(close)}"
    return f"Known: {', '.join(sorted(names))}" if 0 < len(names) <= 12 else "Nothing is near it"


# --- Functions as values ----------------------------------------------------------------------------------


class Maker(NamedTuple):
    """A function that can be asked for by name: ``make`` of its parameters is the value."""

    make: Callable[..., Any]
    parameters: dict[str, Parameter]


def _settable(item: tuple[str, Parameter]) -> bool:
    return item[0] in FAMILIES or said(item[1].annotation) != "nothing"


def _makers(module: Any, result: Any, names: Iterable[str] | None = None) -> dict[str, Maker]:
    """The public functions of a module that return such a value, if a file can set what they need."""
    found = {}
    for name, fn in vars(module).items():
        if name.startswith("_") or not inspect.isfunction(fn) or fn.__module__.partition(".")[0] != "esegeta":
            continue
        of = inspect.signature(fn).return_annotation
        if (of == result) if names is None else (name in names):
            found[name] = fn
    makers = {n: Maker(fn, dict(filter(_settable, parameters(fn).items()))) for n, fn in found.items()}
    return {n: m for n, m in makers.items() if not any(p.required for p in _missing(m))}


def _missing(maker: Maker) -> list[Parameter]:
    return [p for name, p in parameters(maker.make).items() if name not in maker.parameters]


def _later(fn: Callable[..., Any], taken: int) -> Maker:
    """A function that is itself the value, with its first arguments left open."""

    def make(**settings: Any) -> Callable[..., Any]:
        return functools.partial(fn, **settings) if settings else fn

    return Maker(make, parameters(fn, skip=taken))


@functools.cache
def family(name: str) -> dict[str, Maker]:
    """What can be asked for as the value of a parameter of that name.

    >>> "grid" in family("features"), "slic" in family("segments")
    (True, True)
    """
    if name == "features":
        return _makers(features, features.Features)
    if name == "noise":
        return _makers(noise, noise.Noise, ("absolute", "fraction_of_range", "within"))
    if name == "mask":
        return _makers(masks, None, ("smooth",))
    if name == "composite":
        return _makers(rules, rules.Composite)
    if name in ("segments", "segment"):
        return {fn.__name__: _later(fn, 1) for fn in (segmentation.slic, segmentation.graph_segmentation)}
    fills = {"mixed": _later(mixed, 3), "inpainted": _later(baselines.inpainted, 3)}
    return fills | _makers(baselines, None, ("defocused", "shuffled"))


FAMILIES = ("features", "noise", "mask", "composite", "segments", "segment", "fill")


@functools.cache
def of_baselines() -> dict[str, Callable[..., Any]]:
    """The baselines that are made of the image alone, or of numbers.

    >>> sorted(of_baselines())[:3]
    ['black', 'blurred', 'constant']
    """
    found: dict[str, Callable[..., Any]] = {}
    for name, fn in vars(baselines).items():
        if name.startswith("_") or not inspect.isfunction(fn) or fn.__module__ != baselines.__name__:
            continue
        names = list(inspect.signature(fn).parameters)
        rest = parameters(fn, skip=1)
        if names[:1] == ["x"] and not {"hidden", "keep"} & set(rest):
            found[name] = fn
    return found


def draws(fn: Callable[..., Any]) -> bool:
    """Whether a function takes a random key."""
    return "key" in inspect.signature(fn).parameters


# --- Checks -----------------------------------------------------------------------------------------------


def fault(path: str, expected: str, got: object, advice: str) -> str:
    """One line about one thing that is wrong."""
    path = "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)
    return f"{path}: expected {expected}, got {got}. {advice.removesuffix('.')}."


def faults_of(path: str, given: Mapping[str, Any], known: Mapping[str, Parameter], owner: str) -> list[str]:
    """Everything that is wrong with the parameters that a file gives to a function."""
    found = []
    for name, value in given.items():
        here = f"{path}.{name}"
        if name in GIVEN and name not in known:
            advice = "Leave it out: the run gives it" if name == "at" else "Leave it out: run.key is for all"
            found.append(fault(here, "no such key", shown(value), advice))
        elif name not in known:
            expected = f"a parameter of {owner}" if known else f"no parameters: {owner} has none"
            advice = nearest(name, known) if known else "Leave it out"
            found.append(fault(here, expected, repr(name), advice))
        else:
            found += _faults_of_value(here, value, known[name])
    for name, parameter in known.items():
        if parameter.required and name not in given:
            words = wanted(parameter)
            found.append(fault(f"{path}.{name}", words, "nothing", f"{owner} does not go without it"))
    return found


def wanted(parameter: Parameter) -> str:
    """What a parameter takes, in words."""
    words = said(parameter.annotation) + (' or "input"' if parameter.name == "spacing" else "")
    if parameter.name not in FAMILIES or not _callable(parameter):
        return words
    makers = ", ".join(sorted(family(parameter.name)))
    return " or ".join(w for w in (words, f"one of {makers}") if w != "nothing")


def _callable(parameter: Parameter) -> bool:
    """Whether a function, or what only a function makes, may stand for it."""
    return any(
        said(one) == "nothing" and one not in (None, type(None)) for one in members(parameter.annotation)
    )


def _faults_of_value(path: str, value: Any, parameter: Parameter) -> list[str]:
    if parameter.name == "spacing" and value == "input":
        return []
    if parameter.name in FAMILIES and _callable(parameter) and not is_file(value):
        makers = family(parameter.name)
        if isinstance(value, str):
            if parameter.name == "composite" and value in rules.COMPOSITES:
                return []
            value = {"name": value}
        if isinstance(value, Mapping):
            return _faults_of_call(path, value, makers, parameter.name)
    if fits(value, parameter.annotation):
        return []
    advice = "Write it without quotes" if isinstance(value, str) else "Change it"
    return [fault(path, wanted(parameter), shown(value), advice)]


def _faults_of_call(path: str, value: Mapping[str, Any], makers: Mapping[str, Maker], what: str) -> list[str]:
    settings = dict(value)
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in makers:
        known = [*makers, *(rules.COMPOSITES if what == "composite" else ())]
        got = "no name" if name is None else shown(name)
        return [fault(path, f"{what} by name, one of {', '.join(sorted(known))}", got, nearest(name, known))]
    return faults_of(path, settings, makers[name].parameters, name)


def references(refs: tuple[str, ...], transforms: Iterable[str]) -> tuple[str, ...] | None:
    """What an explanation takes after transforms, in their order, the first being the innermost; None if one cannot.

    >>> references(("baseline",), ["over_baselines", "absolute"]), references((), ["over_baselines"])
    (('baselines',), None)
    """
    now: tuple[str, ...] | None = refs
    for name in transforms:
        now = None if now is None else TRANSFORMS[name].refs(now)
    return now
