"""What a configuration can name: methods, transforms, reducers, baselines, and what their parameters may be.

Nothing is listed here that a registry can tell. A parameter that is a function in Python is asked for by name,
``features = {name = "grid", size = 8}``: each registry says for which parameters.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from esegeta import baselines as _baselines  # noqa: F401  what comes with the package is registered
from esegeta import dreams as _dreams  # noqa: F401
from esegeta import features as _features  # noqa: F401
from esegeta import masks as _masks  # noqa: F401
from esegeta import methods as _methods  # noqa: F401
from esegeta import metrics as _metrics  # noqa: F401
from esegeta import noise as _noise  # noqa: F401
from esegeta import reducers as _reducers  # noqa: F401
from esegeta import rules as _rules  # noqa: F401
from esegeta import segmentation as _segmentation  # noqa: F401
from esegeta import transforms as _transforms  # noqa: F401
from esegeta import uncertainty as _uncertainty  # noqa: F401
from esegeta import zoo as _zoo  # noqa: F401
from esegeta._registry import (
    BASELINES,
    GIVEN,
    METHODS,
    REGISTRIES,
    TRANSFORMS,
    MethodSpec,
    Numbers,
    Registry,
    Spec,
)
from esegeta.engine import check
from esegeta.rules.composites import named_composites
from esegeta.run.config.annotations import fits, is_file, members, said, shown


class Parameter(NamedTuple):
    """A parameter that a file can set."""

    name: str
    annotation: Any
    default: Any  # inspect.Parameter.empty where there is none

    @property
    def required(self) -> bool:
        """Return whether it has no default."""
        return self.default is inspect.Parameter.empty

    def __str__(self) -> str:
        if self.required:
            return self.name
        default = getattr(self.default, "__name__", None)
        return f"{self.name}={default or repr(self.default)}"


def parameters(fn: Callable[..., Any], skip: int = 0, without: Iterable[str] = GIVEN) -> dict[str, Parameter]:
    """Return the parameters of a function that a file can set, without the first ones and those that the run gives.

    >>> [str(p) for p in parameters(METHODS["integrated_gradients"].fn, skip=1).values()]
    ['steps=32', "rule='gauss-legendre'"]
    """
    own = list(inspect.signature(fn).parameters.values())[skip:]
    any_value = lambda p: Any if p.annotation is p.empty else p.annotation
    return {p.name: Parameter(p.name, any_value(p), p.default) for p in own if p.name not in without}


def of_method(spec: Spec) -> dict[str, Parameter]:
    """Return the parameters of a method, or of anything else that is registered."""
    return parameters(spec.fn, skip=spec.leads)


def methods_by_name() -> dict[str, MethodSpec]:
    """Return every method by its name and by its other names."""
    return {name: spec for spec in METHODS.values() for name in (spec.name, *spec.also)}


def nearest(word: object, known: Iterable[str]) -> str:
    """Return advice for a word that is not known."""
    names = list(known)
    few = 0 < len(names) <= 12
    return check.nearest(
        str(word), names, f"Known: {', '.join(sorted(names))}" if few else "Nothing is near it"
    )


# --- Functions as values ----------------------------------------------------------------------------------


class Maker(NamedTuple):
    """A function that can be asked for by name: ``make`` of its parameters is the value."""

    make: Callable[..., Any]
    parameters: dict[str, Parameter]


# The names of the parameters that are asked for by name, and where the name is looked up.
FAMILIES: dict[str, Registry[Any]] = {name: table for table in REGISTRIES for name in table.asked_by}


def settable(parameter: Parameter) -> bool:
    """Return whether a file can set a parameter: it is no function, or one that is asked for by name."""
    return parameter.name in FAMILIES or said(parameter.annotation) != "nothing"


def _maker(spec: Spec) -> Maker | None:
    """How a member is made from what a file can set; None if that is not all that it needs."""
    known = parameters(spec.fn, skip=spec.leads)
    own = {name: p for name, p in known.items() if settable(p)}
    if any(p.required for name, p in known.items() if name not in own):
        return None
    if not spec.leads:
        return Maker(spec.fn, own)

    def make(**settings: Any) -> Callable[..., Any]:
        return functools.partial(spec.fn, **settings) if settings else spec.fn  # it is itself the value

    return Maker(make, own)


def family(name: str) -> dict[str, Maker]:
    """Return what can be asked for as the value of a parameter of that name.

    >>> "grid" in family("features"), "slic" in family("segments")
    (True, True)
    """
    made = {known: _maker(spec) for known, spec in FAMILIES[name].items()}
    return {known: maker for known, maker in made.items() if maker is not None}


def of_baselines() -> dict[str, Callable[..., Any]]:
    """Return the baselines that are made of the image alone, or of numbers.

    >>> sorted(of_baselines())[:3]
    ['black', 'blurred', 'constant']
    """
    return {name: spec.fn for name, spec in BASELINES.items()}


def draws(fn: Callable[..., Any]) -> bool:
    """Return whether a function takes a random key."""
    return "key" in inspect.signature(fn).parameters


# --- Checks -----------------------------------------------------------------------------------------------


def fault(path: str, expected: str, got: object, advice: str) -> str:
    """Return one line about one thing that is wrong."""
    path = "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)
    return f"{path}: expected {expected}, got {got}. {advice.removesuffix('.')}."


def faults_of(path: str, given: Mapping[str, Any], known: Mapping[str, Parameter], owner: str) -> list[str]:
    """Return everything that is wrong with the parameters that a file gives to a function."""
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
    """Return what a parameter takes, in words."""
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
            if parameter.name == "composite" and value in named_composites():
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
        known = list(makers)
        got = "no name" if name is None else shown(name)
        return [fault(path, f"{what} by name, one of {', '.join(sorted(known))}", got, nearest(name, known))]
    return faults_of(path, settings, makers[name].parameters, name)


def references(refs: tuple[str, ...], transforms: Iterable[str]) -> tuple[str, ...] | None:
    """Return what an explanation takes after transforms, the innermost first; None if one does not apply.

    >>> references(("baseline",), ["over_baselines", "absolute"]), references((), ["over_baselines"])
    (('baselines',), None)
    """
    now: tuple[str, ...] | None = refs
    for name in transforms:
        now = None if now is None else TRANSFORMS[name].refs(now)
    return now


def numbers(spec: MethodSpec, method: Any) -> Numbers:
    """Return what the numbers of a map are: as its method declares, but for parts and places that are named.

    >>> from esegeta.run.config.loading import Method
    >>> [numbers(METHODS[name], Method(name=name)) for name in ("gradient", "occlusion", "grad_cam", "lime")]
    ['amount', 'part', 'layer', 'amount']
    >>> numbers(METHODS["lime"], Method(name="lime", parameters={"features": {"name": "grid", "size": 4}}))
    'part'
    """
    if method.place is not None and not spec.place:
        return "layer"
    return "part" if "features" in method.parameters else spec.numbers


def contributions(spec: MethodSpec, method: Any) -> bool | None:
    """Return whether the values of a map are contributions, False for slopes, None if they are neither.

    Transforms that are no averages leave neither.

    >>> from esegeta.run.config.loading import Method
    >>> [contributions(METHODS[n], Method(name=n)) for n in ("integrated_gradients", "gradient", "grad_cam")]
    [True, False, None]
    """
    averages = all(
        {"completeness", "linearity"} & TRANSFORMS[call.name].preserves for call in method.transforms
    )
    layer = method.place is not None and not spec.place
    return spec.contributions if averages and not layer else None


def cost(spec: MethodSpec, method: Mapping[str, Any]) -> int | None:
    """Return how many gradients, or values of the score, a method takes: at most, with a tolerance.

    None where the image decides.

    >>> cost(METHODS["integrated_gradients"], {"parameters": {"steps": 8}, "transforms": []})
    8
    """
    if method.get("patches") == "per_patch":
        return None
    baselines = sum(call.get("count", 1) for call in method.get("baseline") or [{}])
    own = spec.cost(**method["parameters"], baselines=baselines)
    total: Any = own.gradients if spec.needs == "gradient" else own.forwards
    for call in method["transforms"]:
        settings = {name: value for name, value in call.items() if name != "name"}
        runs = TRANSFORMS[call["name"]].cost(**settings, baselines=baselines).explanations
        total = None if total is None or runs is None else total * runs
    return total if isinstance(total, int) else None
