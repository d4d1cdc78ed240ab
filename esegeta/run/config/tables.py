"""A table of a configuration as its class, and what is wrong with its keys and values."""

import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from esegeta.run.config.annotations import members, shown, type_words
from esegeta.run.config.catalogue import nearest
from esegeta.run.config.faults import Strict, fault
from esegeta.run.config.schema import Call, Step

Part = TypeVar("Part", bound=BaseModel)


def _words(annotation: Any) -> str:
    """What a table of the file takes there, in words."""
    if Call in members(annotation) and str in members(annotation):
        return 'a name, {name = "...", ...} or a list of these'
    found = []
    for one in members(annotation):
        if one in (Call, Step):
            found.append('{name = "...", ...}' if one is Call else '{step = "...", ...}')
        elif get_origin(one) is list and any(kind in (Call, Step) for kind in members(get_args(one)[0])):
            found.append(f"a list of {_words(get_args(one)[0])}")
        elif get_origin(one) is dict:
            found.append("a table")
        elif one is not types.NoneType:
            found.append(type_words(one))
    return " or ".join(found)


def keys_of(cls: type[BaseModel]) -> dict[str, Any]:
    """Return the keys of a table and what they take."""
    return {field.alias or name: field.annotation for name, field in cls.model_fields.items()}


def part(cls: type[Part], raw: object, path: str, faults: Strict) -> Part | None:
    """Return a table as its class, without the keys that are wrong, if it is anything without them."""
    if not isinstance(raw, Mapping):
        faults.add(path, "a table", shown(raw), f"Its keys are {', '.join(keys_of(cls))}")
        return None
    strange = {key: _strange_values({key: value}, path) for key, value in raw.items()}
    for line in (line for lines in strange.values() for line in lines):
        faults.say(line)
    rest = {key: value for key, value in raw.items() if not strange[key]}
    try:
        return cls.model_validate(rest)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [_fault_of(cls, rest, path, one["loc"], one["type"]) for one in errors]
    for line in {line.partition(":")[0]: line for line in reversed(lines)}.values():
        faults.say(line)  # of several kinds, one fault
    wrong = {one["loc"][0] for one in errors}
    try:
        return cls.model_validate({key: value for key, value in rest.items() if key not in wrong})
    except ValidationError:
        return None


def _fault_of(cls: type[BaseModel], raw: Any, path: str, loc: Sequence[str | int], kind: str) -> str:
    here, value = path, raw
    rest: list[Any] = list(loc)
    while rest and (
        (isinstance(value, Mapping) and rest[0] in value)
        or (isinstance(value, list) and isinstance(rest[0], int) and rest[0] < len(value))
    ):
        step = rest.pop(0)
        value = value[step]
        here += f"[{step}]" if isinstance(step, int) else f".{step}"
    keys = keys_of(cls)
    if kind == "extra_forbidden":
        return fault(here, f"a key of {path}", repr(loc[-1]), nearest(loc[-1], keys))
    if kind == "missing" and len(loc) == 1:
        return fault(f"{here}.{loc[0]}", _words(keys[str(loc[0])]), "nothing", "Add it")
    return fault(here, _words(keys[str(loc[0])]), shown(value), "Change it")


def _strange_values(value: Any, path: str) -> list[str]:
    """What TOML or Python has and JSON has not: dates, infinity, NaN; and numbers that are none of the machine's."""
    if isinstance(value, Mapping):
        names = [
            fault(path, "keys that are texts", shown(key), "Name it")
            for key in value
            if not isinstance(key, str)
        ]
        return names + [line for key, v in value.items() for line in _strange_values(v, f"{path}.{key}")]
    if isinstance(value, (list, tuple)):
        return [line for i, v in enumerate(value) for line in _strange_values(v, f"{path}[{i}]")]
    if isinstance(value, float) and not math.isfinite(value):
        return [fault(path, "a finite number", repr(value), "Leave it out where it shall not matter")]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return [fault(path, "a whole number of 64 bits", shown(value), "Choose a smaller one")]
    if value is not None and not isinstance(value, (bool, int, float, str)):
        return [
            fault(path, "a text, number, boolean, list or table", shown(str(value)), "Write it as a text")
        ]
    return []


def one(cls: type[Part], raw: Mapping[str, Any], key: str, faults: Strict) -> Part | None:
    """Return the table of that name, if there is one."""
    if key not in raw or (raw[key] is None and key in ("patches", "reference")):
        return None
    return part(cls, raw[key], key, faults)


def several(cls: type[Part], raw: Mapping[str, Any], key: str, faults: Strict) -> list[tuple[int, Part]]:
    """Return the tables of a list of that name, with their numbers."""
    tables = raw.get(key, ())
    if key in raw and (not isinstance(tables, (list, tuple)) or not tables):
        faults.add(key, f"at least one table [[{key}]]", shown(tables), "Add one")
        return []
    made = [(n, part(cls, table, f"{key}[{n}]", faults)) for n, table in enumerate(tables)]
    return [(n, one) for n, one in made if one is not None]


def no_twins(
    entries: Iterable[tuple[str, Sequence[str]]],
    key: str,
    faults: Strict,
    same: Callable[[str], str] = str.lower,
) -> None:
    """Refuse two tables of one name: their files would be the same.

    Args:
        entries: the path of each table, and its names.
        key: which key of the tables that is.
        faults: where faults go.
        same: from a name to what it has in common with those that are too like it.
    """
    first: dict[str, str] = {}
    for path, names in entries:
        for name in names:
            other = first.setdefault(same(name), path)
            if other != path or list(names).count(name) > 1:
                got = f"{name!r} again, as in {other}"
                faults.add(f"{path}.{key}", f"a different {key}", got, f"Choose another {key}")
