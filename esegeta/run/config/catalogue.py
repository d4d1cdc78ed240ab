"""What a configuration can name: methods, transforms, reducers, baselines; and their parameters, made of its values.

Nothing is listed here that a registry can tell. A parameter that is a function in Python is asked for by name,
``features = {name = "grid", size = 8}``: each registry says for which parameters.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

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
    GIVEN,
    REGISTRIES,
    TRANSFORMS,
    MethodSpec,
    Numbers,
    Registry,
    Spec,
    waiting_plugins,
)
from esegeta.engine import check
from esegeta.rules.composites import named_composites
from esegeta.run.config.faults import Collector, Strict, nearest, shown
from esegeta.run.config.tables import fits, is_file, is_tensor, members, type_words


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

    >>> from esegeta._registry import METHODS
    >>> [str(p) for p in parameters(METHODS["integrated_gradients"].fn, skip=1).values()]
    ['steps=32', "rule='gauss-legendre'"]
    """
    own = list(inspect.signature(fn).parameters.values())[skip:]
    any_value = lambda p: Any if p.annotation is p.empty else p.annotation
    return {p.name: Parameter(p.name, any_value(p), p.default) for p in own if p.name not in without}


def of_method(spec: Spec) -> dict[str, Parameter]:
    """Return the parameters of a method, or of anything else that is registered."""
    return parameters(spec.fn, skip=spec.leads)


# --- Functions as values ----------------------------------------------------------------------------------


class Maker(NamedTuple):
    """A function that can be asked for by name: ``make`` of its parameters is the value."""

    make: Callable[..., Any]
    parameters: dict[str, Parameter]


# The names of the parameters that are asked for by name, and where the name is looked up.
FAMILIES: dict[str, Registry[Any]] = {name: table for table in REGISTRIES for name in table.asked_by}


def settable(parameter: Parameter) -> bool:
    """Return whether a file can set a parameter: it is no function, or one that is asked for by name."""
    return parameter.name in FAMILIES or type_words(parameter.annotation) != "nothing"


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


def draws(fn: Callable[..., Any]) -> bool:
    """Return whether a function takes a random key."""
    return "key" in inspect.signature(fn).parameters


# --- Values of a file, as a function wants them -----------------------------------------------------------


Reader = Callable[[Path], Any]


class Context(NamedTuple):
    """What values are made with: mm per voxel, the key of the draw, how a file becomes a tensor, where faults go."""

    spacing: Sequence[float] | None = None
    key: int = 0
    read: Reader | None = None
    faults: Strict = Strict()


_PLAIN = Context()


def checking(faults: Strict) -> Context:
    """Return what values are made with before there is an image: no file is read, and faults are collected."""
    return Context(spacing=(1.0, 1.0, 1.0), faults=faults)


class _Unmade:
    """What stands for a value that cannot be made: it is wrong, and that was told, or its file is not read yet."""


_WRONG, _UNREAD = _Unmade(), _Unmade()


def complete(made: Mapping[str, Any] | None) -> bool:
    """Return whether arguments are right, and none of them waits for a file that nobody reads before a job does."""
    return made is not None and not any(isinstance(value, _Unmade) for value in made.values())


def found(table: Registry[Any], name: str, path: str, faults: Strict) -> Any:
    """Return the member of that name, one of its other names included; None where there is none, which is told."""
    known = table.by_name
    if name not in known:
        what = f"{'an' if table.kind[0] in 'aeiou' else 'a'} {table.kind}"
        waiting = waiting_plugins()
        trust = f". Installed plugins may bring it: --trust {' --trust '.join(waiting)}" if waiting else ""
        faults.add(path, what, repr(name), nearest(name, known) + trust)
    return known.get(name)


def arguments(
    given: Mapping[str, Any],
    known: Mapping[str, Parameter],
    context: Context = _PLAIN,
    path: str = "parameters",
    owner: str = "the function",
) -> dict[str, Any] | None:
    """Return keyword arguments from the parameters in a file; None where something is wrong with them.

    >>> from esegeta._registry import METHODS
    >>> known = of_method(METHODS["occlusion"])
    >>> arguments({"size": [4, 4], "spacing": "input"}, known, Context(spacing=(2.0, 1.0)))
    {'size': (4, 4), 'spacing': (2.0, 1.0)}
    """
    faults, made = context.faults, {}
    for name, value in given.items():
        here, made[name] = f"{path}.{name}", _WRONG
        if name in known:
            made[name] = _value(value, known[name], context, here)
        elif name in GIVEN:
            advice = "Leave it out: the run gives it" if name == "at" else "Leave it out: run.key is for all"
            faults.add(here, "no such key", shown(value), advice)
        else:
            expected = f"a parameter of {owner}" if known else f"no parameters: {owner} has none"
            faults.add(here, expected, repr(name), nearest(name, known) if known else "Leave it out")
    for name, parameter in known.items():
        if parameter.required and name not in given:
            made[name] = _WRONG
            faults.add(f"{path}.{name}", wanted(parameter), "nothing", f"{owner} does not go without it")
    return None if any(value is _WRONG for value in made.values()) else made


def _value(value: Any, parameter: Parameter, context: Context, path: str) -> Any:
    """Return what stands in a file as the function wants it."""
    name = parameter.name
    if name == "spacing" and value == "input":
        if context.spacing is None:
            raise check.refused(name, "an input with a size of voxels", "one without", "Give it in numbers")
        return tuple(context.spacing)
    composite = name == "composite" and isinstance(value, str) and value in named_composites()
    named = isinstance(value, (str, Mapping)) and not is_file(value) and not composite
    if named and name in FAMILIES and _callable(parameter):
        return called(value, name, context, path)
    if not composite and not fits(value, parameter.annotation):
        advice = "Write it without quotes" if isinstance(value, str) else "Change it"
        context.faults.add(path, wanted(parameter), shown(value), advice)
        return _WRONG
    if is_file(value):
        if context.read is not None:
            return context.read(Path(value["file"]))
        if isinstance(context.faults, Collector):
            return _UNREAD
        raise check.refused(name, "a reader of files", "none", "Pass a context with read=")
    if isinstance(value, (list, tuple)):
        kinds = members(parameter.annotation)
        if any(map(is_tensor, kinds)) and not any(getattr(k, "__origin__", None) for k in kinds):
            return torch.tensor(value)
        return tuple(value)
    return value


def called(value: str | Mapping[str, Any], what: str, context: Context, path: str) -> Any:
    """Return what a function makes that a file asks for by name, with its parameters beside the name."""
    settings = {"name": value} if isinstance(value, str) else dict(value)
    name, makers = settings.pop("name", None), family(what)
    if not isinstance(name, str) or name not in makers:
        expected = f"{what} by name, one of {', '.join(sorted(makers))}"
        context.faults.add(path, expected, "no name" if name is None else shown(name), nearest(name, makers))
        return _WRONG
    make = makers[name].make
    made = arguments(settings, makers[name].parameters, context, path, name)
    if made is None or not complete(made):
        return _WRONG if made is None else _UNREAD
    with context.faults.at(path):
        return make(**made, **({"key": context.key} if draws(make) else {}))
    return _WRONG


def wanted(parameter: Parameter) -> str:
    """Return what a parameter takes, in words."""
    words = type_words(parameter.annotation) + (' or "input"' if parameter.name == "spacing" else "")
    if parameter.name not in FAMILIES or not _callable(parameter):
        return words
    makers = ", ".join(sorted(family(parameter.name)))
    return " or ".join(w for w in (words, f"one of {makers}") if w != "nothing")


def _callable(parameter: Parameter) -> bool:
    """Return whether a function, or what only a function makes, may stand for it."""
    return any(
        type_words(one) == "nothing" and one not in (None, type(None))
        for one in members(parameter.annotation)
    )


# --- What a method is with its transforms -----------------------------------------------------------------


def references(refs: tuple[str, ...], transforms: Iterable[str]) -> tuple[str, ...] | None:
    """Return what an explanation takes after transforms, the innermost first; None if one does not apply.

    >>> references(("baseline",), ["over_baselines", "absolute"]), references((), ["over_baselines"])
    (('baselines',), None)
    """
    now: tuple[str, ...] | None = refs
    for name in transforms:
        change = TRANSFORMS.by_name.get(name)
        now = None if now is None or change is None else change.refs(now)
    return now


def numbers(spec: MethodSpec, method: Any) -> Numbers:
    """Return what the numbers of a map are: as its method declares, but for parts and places that are named.

    >>> from esegeta._registry import METHODS
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

    >>> from esegeta._registry import METHODS
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

    >>> from esegeta._registry import METHODS
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
