"""From the entries of a configuration to functions: a target becomes a score, a method an explanation."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esegeta import random, rules
from esegeta._registry import REDUCERS, TRANSFORMS, MethodSpec
from esegeta._types import Explain, Score
from esegeta._types import Model as Function
from esegeta.engine import check
from esegeta.features import Features
from esegeta.placing import at
from esegeta.run.config import catalogue
from esegeta.run.config.annotations import is_file, is_tensor, members
from esegeta.run.config.catalogue import Parameter
from esegeta.run.config.loading import Call, Method, Target

Reader = Callable[[Path], Tensor]


class Context(NamedTuple):
    """What values are made with: mm per voxel, the key of the draw, and how a file becomes a tensor."""

    spacing: Sequence[float] | None = None
    key: int = 0
    read: Reader | None = None


PLAIN = Context()


class Built(NamedTuple):
    """An explanation that waits for its image.

    refs: the baselines, in the order in which it takes them; keyed: whether it takes the key; axioms: what its
    method claims and its transforms preserve; spec: of its method; features: the parts of the image whose value the
    map shows at each of their elements, None where every element has its own.
    """

    explain: Explain
    refs: tuple[Tensor, ...]
    keyed: bool
    axioms: frozenset[str]
    spec: MethodSpec
    key: int = 0
    features: Features | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Explain an image."""
        extra = {"key": self.key} if self.keyed else {}
        return self.explain(x, *self.refs, **extra)


def _value(value: Any, parameter: Parameter, context: Context) -> Any:
    """What stands in a file, as the function wants it."""
    name = parameter.name
    if name == "spacing" and value == "input":
        if context.spacing is None:
            raise ValueError(
                check.problem(
                    "spacing", "an input with a size of voxels", "one without", "Give it in numbers"
                )
            )
        return tuple(context.spacing)
    if is_file(value):
        if context.read is None:
            raise ValueError(check.problem(name, "a reader of files", "none", "Pass read= to the builder"))
        return context.read(Path(value["file"]))
    if name in catalogue.FAMILIES and not (isinstance(value, str) and value in rules.COMPOSITES):
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping):
            maker = catalogue.family(name)[value["name"]]
            settings = {k: v for k, v in value.items() if k != "name"}
            return maker.make(
                **arguments(settings, maker.parameters, context), **_key_of(maker.make, context)
            )
    if isinstance(value, (list, tuple)):
        kinds = members(parameter.annotation)
        if any(map(is_tensor, kinds)) and not any(getattr(k, "__origin__", None) for k in kinds):
            return torch.tensor(value)
        return tuple(value)
    return value


def _key_of(fn: Callable[..., Any], context: Context) -> dict[str, int]:
    return {"key": context.key} if catalogue.draws(fn) else {}


def arguments(
    given: Mapping[str, Any], known: Mapping[str, Parameter], context: Context = PLAIN
) -> dict[str, Any]:
    """Keyword arguments from the parameters in a file.

    >>> known = catalogue.of_method(catalogue.METHODS["occlusion"])
    >>> arguments({"size": [4, 4], "spacing": "input"}, known, Context(spacing=(2.0, 1.0)))
    {'size': (4, 4), 'spacing': (2.0, 1.0)}
    """
    return {name: _value(value, known[name], context) for name, value in given.items()}


def score(
    target: Target,
    model: Function,
    x: Tensor,
    *,
    spacing: Sequence[float] | None = None,
    read: Reader | None = None,
) -> Score:
    """The score of a target, its mask frozen at the image.

    Args:
        target: of the configuration.
        model: from ``networks.load``.
        x: the image after preprocessing.
        spacing: mm per voxel.
        read: makes a tensor of a file that a parameter names, on the grid of x.
    """
    spec = REDUCERS[target.reducer]
    settings = arguments(target.parameters, catalogue.parameters(spec.fn, 1), Context(spacing, read=read))
    if spec.mask and not settings.get("dynamic", False):
        settings["at"] = x
    return spec.fn(model, **settings)


def explanation(
    method: Method,
    score: Score,
    x: Tensor,
    *,
    spacing: Sequence[float] | None = None,
    key: int = 0,
    read: Reader | None = None,
) -> Built:
    """The explanation that an entry asks for, with its baselines.

    Args:
        method: of the configuration, after ``config.load``.
        score: from ``score``.
        x: the image after preprocessing.
        spacing: mm per voxel.
        key: of everything that this method draws.
        read: makes a tensor of a file that a parameter names, on the grid of x.
    """
    spec = catalogue.methods_by_name()[method.name]
    context = Context(spacing, key, read)
    settings = arguments(method.parameters, catalogue.of_method(spec), context)
    if spec.place:
        explain = spec.fn(score, method.place, **settings)
    elif method.place is not None:
        explain = at(spec.fn, method.place)(score, **settings)
    else:
        explain = spec.fn(score, **settings)
    refs, keyed, axioms = spec.refs, spec.key, spec.axioms
    for call in method.transforms:
        change = TRANSFORMS[call.name]
        own = arguments(call.parameters, catalogue.parameters(change.fn, 1), context)
        explain = change.fn(explain, **own)
        after = change.refs(refs)
        if after is None:
            expected = f"explanations that take other references than {', '.join(refs) or 'none'}"
            raise ValueError(check.problem(call.name, expected, spec.name, "Choose another transform"))
        refs, keyed, axioms = after, keyed or change.key, axioms & change.preserves
    if method.place is not None and not spec.place:
        axioms = frozenset()  # of the head of the network, not of the score of the image
    calls = method.baseline if isinstance(method.baseline, list) else []
    tensors = tuple(_references(kind, calls, x, context) for kind in refs)
    return Built(explain, tensors, keyed, axioms, spec, key, settings.get("features"))


def _references(kind: str, calls: Sequence[str | Call], x: Tensor, context: Context) -> Tensor:
    made = [
        image for number, call in enumerate(calls) for image in _baselines(call, x, context, number)
    ]  # the same call twice draws twice
    return made[0] if kind == "baseline" else torch.stack(made)


def _baselines(call: str | Call, x: Tensor, context: Context, number: int) -> list[Tensor]:
    name, given = (call, {}) if isinstance(call, str) else (call.name, call.parameters)
    fn = catalogue.of_baselines()[name]
    count = given.pop("count", 1)
    make = functools.partial(fn, x, **arguments(given, catalogue.parameters(fn, 1), context))
    if not catalogue.draws(fn):
        return [make()]
    keys = [random.fold_in(random.fold_in(context.key, number), index) for index in range(count)]
    return [make(key=key) for key in keys]
