"""What is wrong with targets, methods, transforms and baselines of a configuration."""

import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from esegeta._registry import REDUCERS, TRANSFORMS
from esegeta.engine.execution import parse_memory
from esegeta.run.config import catalogue
from esegeta.run.config.annotations import is_file, shown
from esegeta.run.config.building import Context, arguments
from esegeta.run.config.catalogue import fault, faults_of, nearest
from esegeta.run.config.loading import Call, Method, Patches, Run, Target

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NOWHERE = Context(spacing=(1.0, 1.0, 1.0))


def told(error: Exception) -> str:
    """What a function says about its argument, without its name and on one line."""
    text = " ".join(str(error).split())
    return re.sub(r"^[\w. \[\]]+: (?=expected )", "", text)


def limits(given: Method | Run, path: str) -> list[str]:
    """What is wrong with a deadline and a memory limit."""
    found = []
    if given.deadline is not None and given.deadline <= 0:
        found.append(fault(f"{path}.deadline", "seconds > 0", str(given.deadline), "Leave it out for none"))
    if given.memory is not None:
        try:
            parse_memory(path, given.memory)
        except ValueError as error:
            found.append(f"{path}.memory: {told(error)}")
    return found


def _is_name(text: str) -> bool:
    """Letters and digits of any script, with their marks, and '.', '_' and '-' between them.

    >>> _is_name("Ödem_2"), _is_name("肿瘤"), _is_name("../x"), _is_name("a b")
    (True, True, False, False)
    """
    kinds = [unicodedata.category(c)[0] for c in text]
    inside = all(kind in "LNM" or c in "._-" for kind, c in zip(kinds, text, strict=True))
    return bool(kinds) and kinds[0] in "LN" and inside


def _names(path: str, key: str, value: str) -> list[str]:
    if _is_name(value) if key == "name" else ID.fullmatch(value):
        return []
    return [
        fault(
            f"{path}.{key}",
            "letters, digits, '.', '_' and '-'",
            shown(value),
            "It becomes a part of file names",
        )
    ]


def _has_file(value: Any) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return is_file(value) or any(map(_has_file, inner))


def tried(path: str, given: Any, make: Callable[[], object]) -> list[str]:
    """What a function itself says about its parameters: it looks at them before it sees an image."""
    if _has_file(given):
        return []
    try:
        make()
    except (ValueError, TypeError) as error:
        return [f"{path}: {told(error)}"]
    return []


def target_faults(target: Target, path: str) -> list[str]:
    """What is wrong with a target."""
    found = _names(path, "name", target.name)
    spec = REDUCERS.get(target.reducer)
    if spec is None:
        advice = nearest(target.reducer, REDUCERS)
        return [*found, fault(f"{path}.reducer", "a reducer", repr(target.reducer), advice)]
    known = catalogue.parameters(spec.fn, skip=1)
    given = dict(target.parameters)
    if target.class_ is not None:
        if "target" not in known:
            expected = f"no class for {target.reducer}"
            return [*found, fault(f"{path}.class", expected, str(target.class_), "Leave it out")]
        if "target" in given:
            return [
                *found,
                fault(f"{path}.class", "one class", "parameters.target too", "Leave one of them out"),
            ]
        given["target"] = target.class_
    wrong = faults_of(f"{path}.parameters", given, known, target.reducer)
    if "target" in known and "target" not in given:
        missing = f"{path}.parameters.target"
        wrong = [w for w in wrong if not w.startswith(missing)]
        wrong.append(fault(f"{path}.class", "a whole number", "nothing", "Say which class is explained"))
    frozen = {"dynamic": True} if spec.mask else {}
    return found + (
        wrong
        or tried(
            f"{path}.parameters", given, lambda: spec.fn(lambda x: x, **{**arguments(given, known), **frozen})
        )
    )


def method_faults(method: Method, path: str, run: Run | None, patches: Patches | None) -> list[str]:
    """What is wrong with a method, its transforms and its baseline."""
    known = catalogue.methods_by_name()
    found = [] if method.id is None else _names(path, "id", method.id)
    found += limits(method, path)
    if method.patches != "whole" and patches is None:
        found.append(
            fault(f"{path}.patches", '"whole"', repr(method.patches), "Add a table [patches] with a size")
        )
    if method.name not in known:
        found.append(fault(f"{path}.name", "a method", repr(method.name), nearest(method.name, known)))
        return found + _calls(method, path)
    spec = known[method.name]
    wrong = faults_of(f"{path}.parameters", method.parameters, catalogue.of_method(spec), spec.name)
    found += wrong or tried(f"{path}.parameters", method.parameters, lambda: _made(method))
    places = method.place if isinstance(method.place, list) else [method.place]
    if spec.place and method.place is None:
        advice = "`esegeta places` lists the places of a model"
        found.append(fault(f"{path}.place", "the name of a place in the network", "nothing", advice))
    elif not places or any(place == "" for place in places):
        found.append(
            fault(f"{path}.place", "the name of a place", shown(method.place), "Leave out or fill in")
        )
    found += _calls(method, path)
    refs: tuple[str, ...] | None = spec.refs
    for number, call in enumerate(method.transforms):
        if call.name in TRANSFORMS and refs is not None:
            before, refs = refs, TRANSFORMS[call.name].refs(refs)
            if refs is None:
                takes = f"which takes {' and '.join(before) if before else 'no baseline'}"
                expected = f"a transform for {spec.name}, {takes}"
                found.append(fault(f"{path}.transforms[{number}]", expected, repr(call.name), "Leave it out"))
    if refs is not None:
        found += _baseline(method, path, spec.name, refs, run)
    return found


def _made(method: Method) -> object:
    spec = catalogue.methods_by_name()[method.name]
    settings = arguments(method.parameters, catalogue.of_method(spec), NOWHERE)
    return spec.fn(lambda x: x.sum(), *(["place"] if spec.place else []), **settings)


def _calls(method: Method, path: str) -> list[str]:
    """Transforms and their parameters."""
    found = []
    for number, call in enumerate(method.transforms):
        here = f"{path}.transforms[{number}]"
        if call.name not in TRANSFORMS:
            found.append(
                fault(f"{here}.name", "a transform", repr(call.name), nearest(call.name, TRANSFORMS))
            )
            continue
        change, given = TRANSFORMS[call.name].fn, call.parameters
        known = catalogue.parameters(change, skip=1)
        wrong = faults_of(here, given, known, call.name)
        found += wrong or tried(here, given, partial(_changed, change, given, known))
    return found


def _changed(change: Callable[..., Any], given: Mapping[str, Any], known: Mapping[str, Any]) -> object:
    return change(lambda x: x, **arguments(given, known, NOWHERE))


def _baseline(method: Method, path: str, name: str, refs: tuple[str, ...], run: Run | None) -> list[str]:
    given, here = method.baseline, f"{path}.baseline"
    if not refs:
        if given is None:
            return []
        return [fault(here, f"none for {name}", shown(_plain(given)), "Leave it out")]
    if given is None and run is not None and run.baseline is not None:
        given, here = run.baseline, f"run.baseline, for {path}"
    if given is None:
        advice = 'Add for example baseline = "zero", here or in [run]'
        return [fault(here, f"a baseline for {name}", "nothing", advice)]
    calls = given if isinstance(given, list) else [given]
    found = [
        line
        for n, call in enumerate(calls)
        for line in baseline_faults(call, here, n, isinstance(given, list))
    ]
    counts = [c.parameters.get("count", 1) for c in map(_as_call, calls)]
    if not calls or (refs == ("baseline",) and not found and sum(counts) != 1):
        few = "one baseline" if refs == ("baseline",) else "at least one baseline"
        advice = "The transform over_baselines averages over several" if calls else "Name one"
        found.append(fault(here, f"{few} for {name}", str(sum(counts)), advice))
    return found


def _as_call(given: str | Call) -> Call:
    return Call(name=given) if isinstance(given, str) else given


def _plain(given: Any) -> Any:
    if isinstance(given, list):
        return [_plain(one) for one in given]
    return given.model_dump() if isinstance(given, Call) else given


def baseline_faults(given: str | Call, path: str, number: int, listed: bool) -> list[str]:
    """What is wrong with one baseline."""
    call, known = _as_call(given), catalogue.of_baselines()
    here = f"{path}[{number}]" if listed else path
    if call.name not in known:
        return [fault(here, "a baseline", repr(call.name), nearest(call.name, known))]
    fn, settings = known[call.name], call.parameters
    found = []
    if "count" in settings:
        count = settings.pop("count")
        if not catalogue.draws(fn):
            found.append(
                fault(f"{here}.count", f"none: {call.name} is always the same", shown(count), "Leave it out")
            )
        elif isinstance(count, bool) or not isinstance(count, int) or count < 1:
            found.append(fault(f"{here}.count", "a whole number >= 1", shown(count), "Change it"))
    return found + faults_of(here, settings, catalogue.parameters(fn, skip=1), call.name)
