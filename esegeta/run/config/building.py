"""Build what a configuration names: scores, explanations, baselines.

The process that reads a file and the worker that does a job build with the same functions. The one has no image, no
files and a collector of faults: everything that is wrong is told at once. The other has all of it, and stops at the
first fault.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esegeta import _types, random
from esegeta._registry import BASELINES, METHODS, REDUCERS, TRANSFORMS, MethodSpec
from esegeta._types import Explain, Score
from esegeta.features import Features
from esegeta.placing import at
from esegeta.run.config import catalogue
from esegeta.run.config.catalogue import Context, Parameter, arguments, complete, found
from esegeta.run.config.faults import shown
from esegeta.run.config.schema import Call, Method, Target


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


# --- Functions and their parameters -----------------------------------------------------------------------


def _made(
    make: Callable[..., Any],
    given: Mapping[str, Any],
    known: Mapping[str, Parameter],
    context: Context,
    path: str,
    owner: str,
) -> Any:
    """Return what a function makes of the parameters in a file; None where it cannot, or not yet."""
    settings = arguments(given, known, context, path, owner)
    if settings is not None and complete(settings):
        with context.faults.at(path):
            return make(**settings)
    return None


# --- Targets ----------------------------------------------------------------------------------------------


def score(
    target: Target, model: _types.Model, x: Tensor | None, context: Context, path: str = "target"
) -> Any:
    """Return the score of a target, its mask frozen at the image; None where something is wrong with it.

    Args:
        target: of the configuration.
        model: from ``sources.load``.
        x: the image after preprocessing; None if there is none yet.
        context: what its parameters are made with.
        path: of the target, for faults.
    """
    faults = context.faults
    spec = found(REDUCERS, target.reducer, f"{path}.reducer", faults)
    if spec is None:
        return None
    known, given = dict(catalogue.parameters(spec.fn, skip=1)), dict(target.parameters)
    if target.class_ is not None:
        got = str(target.class_)
        if "target" not in known:
            faults.add(f"{path}.class", f"no class for {target.reducer}", got, "Leave it out")
            return None
        if "target" in given:
            faults.add(f"{path}.class", "one class", "parameters.target too", "Leave one of them out")
            return None
        given["target"] = target.class_
    if "target" in known and "target" not in given:
        faults.add(f"{path}.class", "a whole number", "nothing", "Say which class is explained")
        known["target"] = known["target"]._replace(default=None)  # that it is missing is told
        arguments(given, known, context, f"{path}.parameters", target.reducer)
        return None

    def make(**settings: Any) -> Score:
        if spec.mask and x is None:
            settings["dynamic"] = True  # there is nothing yet at which it could be frozen
        elif spec.mask and not settings.get("dynamic", False):
            settings["at"] = x
        return spec.fn(model, **settings)

    return _made(make, given, known, context, f"{path}.parameters", target.reducer)


def class_of(target: Target) -> int | None:
    """Return the class that a target is about, None if it is about none or several."""
    given = target.parameters.get("target", target.class_)
    return given if isinstance(given, int) and not isinstance(given, bool) else None


# --- Methods, transforms, baselines -----------------------------------------------------------------------


def explanation(
    method: Method,
    score: Score,
    x: Tensor | None,
    context: Context,
    path: str = "method",
    otherwise: str | Call | list[str | Call] | None = None,
) -> Any:
    """Return the explanation that an entry asks for with its baselines, ``Built``; None where that cannot be.

    Args:
        method: of the configuration.
        score: what is explained.
        x: the image after preprocessing; None if there is none yet.
        context: what its parameters are made with; its key is of everything that this method draws.
        path: of the method, for faults.
        otherwise: the baseline where the method names none.
    """
    faults = context.faults
    spec = found(METHODS, method.name, f"{path}.name", faults)
    explain: Explain | None = None
    features: Features | None = None
    refs: tuple[str, ...] | None = None
    keyed, axioms = False, frozenset[str]()
    if spec is not None:
        explain, features = _method(spec, method, path, score, context)
        refs, keyed, axioms = spec.refs, spec.key, spec.axioms
    for number, call in enumerate(method.transforms):
        here = f"{path}.transforms[{number}]"
        change = found(TRANSFORMS, call.name, f"{here}.name", faults)
        if change is None:
            continue
        if spec is not None and refs is not None:
            before, refs = refs, change.refs(refs)
            if refs is None:
                takes = f"which takes {' and '.join(before) if before else 'no baseline'}"
                expected = f"a transform for {spec.name}, {takes}"
                faults.add(here, expected, repr(call.name), "Leave it out")
        make = partial(change.fn, _stand_in if explain is None or refs is None else explain)
        own = catalogue.parameters(change.fn, skip=1)
        explain = _made(make, call.parameters, own, context, here, call.name)
        keyed, axioms = keyed or change.key, axioms & change.preserves
    if spec is None or refs is None:
        return None
    tensors = _references(method, path, spec.name, refs, x, context, otherwise)
    if explain is None or tensors is None:
        return None
    if method.place is not None and not spec.place:
        axioms = frozenset()  # of the head of the network, not of the score of the image
    return Built(explain, tensors, keyed, axioms, spec, context.key, features)


def _stand_in(x: Tensor) -> Tensor:
    return x


def _method(
    spec: MethodSpec, method: Method, path: str, score: Score, context: Context
) -> tuple[Explain | None, Features | None]:
    """The explanation of a method alone, at the first of its places, and the parts that its map is made of."""
    places = method.place if isinstance(method.place, list) else [method.place]
    if spec.place and method.place is None:
        advice = "`esegeta places` lists the places of a model"
        context.faults.add(f"{path}.place", "the name of a place in the network", "nothing", advice)
    elif not places or any(place == "" for place in places):
        expected, advice = "the name of a place", "Leave out or fill in"
        context.faults.add(f"{path}.place", expected, shown(method.place), advice)
    place = next(filter(None, places), None)

    def make(**settings: Any) -> tuple[Explain, Features | None]:
        if spec.place:
            explain = spec.fn(score, place or "place", **settings)
        else:
            explain = (spec.fn if place is None else at(spec.fn, place))(score, **settings)
        return explain, settings.get("features")

    known, here = catalogue.of_method(spec), f"{path}.parameters"
    return _made(make, method.parameters, known, context, here, spec.name) or (None, None)


def _references(
    method: Method,
    path: str,
    name: str,
    refs: tuple[str, ...],
    x: Tensor | None,
    context: Context,
    otherwise: str | Call | list[str | Call] | None,
) -> tuple[Tensor, ...] | None:
    """Return the baselines of a method, in the order in which it takes them; None where there is no image yet."""
    faults, given, here = context.faults, method.baseline, f"{path}.baseline"
    if not refs:
        if given is not None:
            faults.add(here, f"none for {name}", shown(_plain(given)), "Leave it out")
        return ()
    if given is None and otherwise is not None:
        given, here = otherwise, f"run.baseline, for {path}"
    if given is None:
        advice = 'Add for example baseline = "zero", here or in [run]'
        faults.add(here, f"a baseline for {name}", "nothing", advice)
        return None
    made = baselines(given, here, x, context)
    calls = given if isinstance(given, list) else [given]
    if not calls or (refs == ("baseline",) and made is not None and len(made) != 1):
        few = "one baseline" if refs == ("baseline",) else "at least one baseline"
        advice = "The transform over_baselines averages over several" if calls else "Name one"
        faults.add(here, f"{few} for {name}", str(len(made or ())), advice)
        return None
    images = [image for image in made or () if image is not None]
    if not images:
        return None
    return tuple(images[0] if kind == "baseline" else torch.stack(images) for kind in refs)


def _plain(given: Any) -> Any:
    if isinstance(given, list):
        return [_plain(one) for one in given]
    return given.model_dump() if isinstance(given, Call) else given


def baselines(
    given: str | Call | Sequence[str | Call], path: str, x: Tensor | None, context: Context
) -> list[Tensor | None] | None:
    """Return one or more baselines, None for each that has no image yet; None instead where one of them is wrong.

    The same call twice draws twice.
    """
    if isinstance(given, (str, Call)):
        return _baseline(given, path, 0, x, context)
    made = [_baseline(call, f"{path}[{n}]", n, x, context) for n, call in enumerate(given)]
    return None if None in made else [image for one in made for image in one or ()]


def _baseline(
    given: str | Call, path: str, number: int, x: Tensor | None, context: Context
) -> list[Tensor | None] | None:
    call, faults = Call(name=given) if isinstance(given, str) else given, context.faults
    spec = found(BASELINES, call.name, path, faults)
    if spec is None:
        return None
    fn, settings = spec.fn, call.parameters
    count: Any = settings.pop("count", 1)
    draws, right = catalogue.draws(fn), isinstance(count, int) and not isinstance(count, bool) and count >= 1
    if not draws and "count" in call.parameters:
        right = False
        faults.add(f"{path}.count", f"none: {call.name} is always the same", shown(count), "Leave it out")
    elif not right:
        faults.add(f"{path}.count", "a whole number >= 1", shown(count), "Change it")
    made = arguments(settings, catalogue.parameters(fn, skip=1), context, path, call.name)
    if made is None or not right:
        return None
    if x is None:
        return [None] * count
    if not draws:
        return [fn(x, **made)]
    keys = [random.fold_in(random.fold_in(context.key, number), index) for index in range(count)]
    return [fn(x, **made, key=key) for key in keys]
