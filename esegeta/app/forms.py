"""What the page offers to choose from: everything that is registered, with its parameters as fields.

Nothing is listed here that the registry or the schema can tell. A field is what a browser needs to draw one: its
kind, its default, its choices, what its docstring says, and, where the function itself refuses values, its range.
"""

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

import torch
from pydantic import BaseModel

from esegeta._registry import (
    BASELINES,
    METHODS,
    METRICS,
    NETWORKS,
    OBJECTIVES,
    RECIPES,
    REDUCERS,
    REGISTRIES,
    STEPS,
    TRANSFORMS,
    Spec,
)
from esegeta.run.config import building, catalogue, listing
from esegeta.run.config.catalogue import Parameter
from esegeta.run.config.faults import Collector
from esegeta.run.config.schema import Method, Output, Patches, Reference, Run
from esegeta.run.config.starter import HEAD
from esegeta.run.config.tables import members, type_words
from esegeta.run.jobs import kinds
from esegeta.run.jobs.dreams import settings as settings_of_dream
from esegeta.run.jobs.metrics import settings as settings_of_metric

Form = dict[str, Any]
# Tables of kinds of jobs whose entries name something that is registered: they are offered by these names.
BY_NAME = ("methods", "metrics", "dreams")
# Numbers that most ranges leave out on either side: what refuses them says what it takes.
_BEYOND: tuple[Any, ...] = (-(10**6), 10**6, 0.5)

# The methods of the paper of TorchEsegeta (Chatterjee et al., 2022), as far as they are registered.
PAPER = (
    *(
        "saliency",
        "input_x_gradient",
        "integrated_gradients",
        "guided_backprop",
        "deconvolution",
        "deep_lift",
    ),
    *("gradient_shap", "guided_grad_cam", "occlusion", "feature_ablation", "shapley_sampling", "lime"),
    *(
        "grad_cam",
        "grad_cam_plus_plus",
        "score_cam",
        "layer_activation_guided_backprop",
        "excitation_backprop",
    ),
)
QUICK = ("gradient", "input_x_gradient", "grad_cam")
CHEAP = 8  # gradients or values of the score, at most


def kind_of(parameter: Parameter) -> str:
    """Return what kind of field a parameter is.

    >>> known = catalogue.of_method(METHODS["integrated_gradients"])
    >>> [kind_of(p) for p in known.values()]
    ['integer', 'text']
    """
    if parameter.name in catalogue.FAMILIES and any(
        type_words(one) == "nothing" and one not in (None, types.NoneType)
        for one in members(parameter.annotation)
    ):
        return "call"
    kinds_ = [one for one in members(parameter.annotation) if one not in (None, types.NoneType)]
    plain = {bool: "flag", int: "integer", float: "number", str: "text"}
    if kinds_ and all(get_origin(one) is Literal for one in kinds_):
        return "choice"
    if len(kinds_) == 1:
        inner = get_args(kinds_[0])
        if get_origin(kinds_[0]) is list and (inner == (str,) or (inner and get_origin(inner[0]) is Literal)):
            return "texts"
        return plain.get(kinds_[0], "value")
    if set(kinds_) <= {int, float}:
        return "number"
    return "value"


def plain(text: str) -> str:
    """Return a docstring without its markup.

    >>> plain("``a`` or :math:`x_1`, see :func:`b`")
    'a or x_1, see b'
    """
    return re.sub(r":\w+:`([^`]*)`", r"\1", text).replace("`", "")


def field_of(parameter: Parameter, help: str, depth: int = 0) -> Form:
    """Return a parameter as a field."""
    kind = kind_of(parameter)
    found: Form = {"name": parameter.name, "kind": kind, "help": plain(help), "required": parameter.required}
    found["words"] = catalogue.wanted(parameter)
    default = None if parameter.required else parameter.default
    if isinstance(default, (bool, int, float, str)) or default is None:
        found["default"] = default
    elif isinstance(default, (list, tuple)):
        found["default"] = list(default)
    else:
        found["default"], found["shown"] = None, str(parameter).partition("=")[2]
    if kind == "choice":
        inner = [one for one in members(parameter.annotation) if get_origin(one) is Literal]
        found["choices"] = [value for one in inner for value in one.__args__]
    if kind == "call":
        makers = catalogue.family(parameter.name)
        table = catalogue.FAMILIES[parameter.name]
        found["makers"] = [
            {
                "name": name,
                "line": plain(listing.first_line(table[name].fn)),
                "fields": [] if depth else fields(maker.parameters.values(), table[name].fn, depth + 1),
            }
            for name, maker in sorted(makers.items())
        ]
    return found


def fields(known: Iterable[Parameter], fn: Callable[..., Any], depth: int = 0) -> list[Form]:
    """Return parameters as fields, with what the docstring of their function says of each."""
    words = listing.explained(fn)
    shown = [p for p in known if catalogue.settable(p)]
    return [field_of(p, words.get(p.name, ""), depth) for p in shown]


def _ranged(found: Form) -> Form:
    """A method with the ranges of its fields; what is one of some words is a choice."""
    known = ranges(found["name"])
    for field in found["fields"]:
        field["range"] = known.get(field["name"], "")
        if field["kind"] == "text" and field["range"].startswith("one of "):
            field |= {"kind": "choice", "choices": field["range"].removeprefix("one of ").split(", ")}
    return found


def _form(spec: Spec, known: Mapping[str, Parameter]) -> Form:
    return {
        "name": spec.name,
        "also": list(spec.also),
        "family": spec.family,
        "line": plain(listing.first_line(spec.fn)),
        "paper": spec.paper,
        "origin": spec.origin,
        "fields": fields(known.values(), spec.fn),
    }


def _cost(spec: Spec, needs: str) -> int | None:
    """How many gradients or values of the score a method takes as it is, None where the image decides."""
    try:
        found = spec.cost(baselines=1)
    except (TypeError, KeyError, ValueError):  # a parameter without a default decides
        return None
    return found.gradients if needs == "gradient" else found.forwards


def methods() -> list[Form]:
    """Return every method: what it is, keeps, needs and costs.

    >>> [m["cost"] for m in methods() if m["name"] == "gradient"]
    [1]
    """
    return [
        _ranged(_form(spec, catalogue.of_method(spec)))
        | {
            "axioms": sorted(spec.axioms),
            "needs": spec.needs,
            "place": spec.place,
            "refs": list(spec.refs),
            "key": spec.key,
            "cost": _cost(spec, spec.needs),
        }
        for _, spec in sorted(METHODS.items())
    ]


def everything() -> Form:
    """Return all that the page offers, as JSON."""
    with_facts = lambda table, facts: [
        _form(spec, catalogue.of_method(spec)) | facts(spec) for _, spec in sorted(table.items())
    ]
    offered = methods()
    return {
        "methods": offered,
        "transforms": with_facts(TRANSFORMS, lambda s: {"preserves": sorted(s.preserves)}),
        "reducers": with_facts(
            REDUCERS, lambda s: {"output": s.output, "differentiable": s.differentiable, "mask": s.mask}
        ),
        "baselines": with_facts(BASELINES, lambda s: {"draws": catalogue.draws(s.fn)}),
        "metrics": [
            _form(spec, settings_of_metric(spec)) | {"needs": list(spec.needs), "better": spec.better}
            for _, spec in sorted(METRICS.items())
        ],
        "objectives": [
            _form(spec, settings_of_dream(spec))
            for name, spec in sorted(OBJECTIVES.items())
            if name not in ("diversity", "alignment")
        ],
        "recipes": [_form(spec, settings_of_dream(spec)) for _, spec in sorted(RECIPES.items())],
        "steps": [_form(spec, catalogue.of_method(spec)) for _, spec in sorted(STEPS.items())],
        "networks": [
            {
                "name": name,
                "line": plain(listing.first_line(spec.fn)),
                "fields": fields(catalogue.parameters(spec.fn, without=()).values(), spec.fn),
            }
            for name, spec in sorted(NETWORKS.items())
        ],
        "kinds": tables(),
        "sections": {
            name: section_of(section)
            for name, section in (
                ("reference", Reference),
                ("patches", Patches),
                ("output", Output),
                ("run", Run),
            )
        },
        "presets": presets(offered),
        "example": str(HEAD),
    }


def presets(offered: Iterable[Form]) -> list[Form]:
    """Return selections of methods to begin with.

    >>> [len(p["methods"]) > 2 for p in presets(methods())]
    [True, True, True]
    """
    cheap = [m["name"] for m in offered if m["cost"] is not None and m["cost"] <= CHEAP and not m["place"]]
    return [
        {"name": "quick look", "line": "Three cheap methods of different kinds.", "methods": _known(QUICK)},
        {"name": "the paper's", "line": "The methods of TorchEsegeta, 2022.", "methods": _known(PAPER)},
        {
            "name": "everything cheap",
            "line": f"All methods of at most {CHEAP} evaluations that need no place.",
            "methods": cheap,
        },
    ]


def _known(names: Iterable[str]) -> list[str]:
    return [name for name in names if name in METHODS]


# --- Tables -----------------------------------------------------------------------------------------------


def tables() -> list[Form]:
    """Return every table that a kind of jobs brings along and whose entries have no names of the registry.

    >>> [form["name"] for form in tables()][:2]
    ['summary', 'uncertainty']
    """
    found: dict[str, Form] = {}
    for kind in kinds.known():
        if kind.section is None or kind.table in BY_NAME or kind.table in found:
            continue
        about = {"name": kind.table, "title": kind.table.replace("_", " ").capitalize(), "many": kind.many}
        more = {"also": [], "family": "", "paper": "", "origin": kind.origin}
        work = plain(listing.first_line(kind.work))
        found[kind.table] = {**section_of(kind.section), **about, **more, "does": work}
    return list(found.values())


def section_of(section: type[BaseModel]) -> Form:
    """Return a table of the configuration as fields, from its class.

    >>> section_of(Patches)["fields"][1]["name"], section_of(Patches)["fields"][1]["help"]
    ('overlap', 'what neighbours share, from 0 to below 1.')
    """
    words = keys_of(inspect.getdoc(section) or "", section.model_fields)
    found = []
    for name, field in section.model_fields.items():
        if name == "id" or field.exclude:
            continue
        shown = field.alias or name
        default = (
            inspect.Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)
        )
        one = field_of(Parameter(shown, field.annotation, default), words.get(shown, ""))
        if one["words"] == "nothing":
            one["words"] = "a table, such as {}"
        extra = field.json_schema_extra
        if isinstance(extra, Mapping) and "calls" in extra:
            one |= {"kind": "stack", "makers": _makers(str(extra["calls"]), str(extra.get("family", "")))}
        found.append(one)
    return {"line": plain(listing.first_line(section)), "fields": found}


def keys_of(text: str, known: Iterable[str]) -> dict[str, str]:
    r"""Return what a docstring says of keys, each as ``name: words.`` or ``name: words;``, some names with one text.

    >>> keys_of("Do it. a: the first; b, c: the others. d: last.", "abcd")
    {'a': 'the first', 'b': 'the others.', 'c': 'the others.', 'd': 'last.'}
    """
    one = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    parts = re.split(rf"(?:^|(?<=[\s;.]))((?:{one})(?:, (?:{one}))*): ", " ".join(text.split()))
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return {name: plain(words).strip().rstrip(";") for names, words in pairs for name in names.split(", ")}


def _makers(registry: str, family: str) -> list[Form]:
    """What of a registry can be named in a list of calls, all or one family of it."""
    (table,) = [one for one in REGISTRIES if one.kind == registry]
    specs = [spec for _, spec in sorted(table.items()) if not family or spec.family == family]
    return [_form(spec, catalogue.of_method(spec)) for spec in specs]


# --- Ranges -----------------------------------------------------------------------------------------------


@functools.cache
def ranges(name: str) -> dict[str, str]:
    """Return what the parameters of a method may be, in the words with which it refuses what they may not be.

    >>> ranges("integrated_gradients")["steps"]
    'an int >= 1'
    """
    spec = METHODS.find(name)
    found = {}
    for parameter in catalogue.of_method(spec).values():
        if kind_of(parameter) not in ("integer", "number", "text", "value"):
            continue
        tried = [value for value in (*_BEYOND, "?") if catalogue.fits(value, parameter.annotation)]
        words = [w for w in (_refusal(spec, parameter.name, value) for value in tried) if w]
        if words:
            found[parameter.name] = "; ".join(dict.fromkeys(words))
    return found


def _refusal(spec: Any, name: str, value: Any) -> str:
    """What a method says it expects where a parameter is not that; empty if it takes it, or cannot be tried."""
    place = "a" if spec.place else None
    method = Method(name=spec.name, parameters={**_required(spec), name: value}, place=place)
    faults = Collector()
    building.explanation(method, torch.sum, None, catalogue.checking(faults), otherwise="zero")
    for line in faults.lines:
        if name in line.partition("expected ")[0] or f"expected {name} " in line:
            words = line.partition("expected ")[2].partition(", got ")[0]
            return words.removeprefix(f"{name} to be ").removeprefix(f"{name} ")
    return ""


def _required(spec: Any) -> dict[str, Any]:
    known = catalogue.of_method(spec)
    return {
        k: v
        for k, v in spec.example.items()
        if k in known and known[k].required and isinstance(v, (int, float, str))
    }
