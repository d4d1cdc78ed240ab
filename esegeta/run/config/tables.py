"""What stands in a file: values against the annotations of parameters, tables against their classes.

What is wrong with them is told with the path at which it stands.
"""

import contextlib
import math
import os
import re
import types
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsFloat, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from torch import Tensor

from esegeta.engine.execution import parse_memory
from esegeta.run.config.faults import Strict, nearest, shown

Part = TypeVar("Part", bound=BaseModel)
Fault = tuple[str, str, str, str]  # path, what was expected, what is there, what to do
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# --- Values -----------------------------------------------------------------------------------------------


def is_tensor(annotation: Any) -> bool:
    """Return whether an annotation is a tensor, of whatever shape and dtype.

    >>> from jaxtyping import Float
    >>> is_tensor(Tensor), is_tensor(Float[Tensor, ""]), is_tensor(float)
    (True, True, False)
    """
    return annotation is Tensor or getattr(annotation, "array_type", None) is Tensor


def members(annotation: Any) -> tuple[Any, ...]:
    """Return what a union is a union of; anything else by itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a value of a file can stand for a parameter. Functions cannot: they are asked for by name.

    >>> fits(3, float), fits(True, int), fits([1, 2], tuple[int, ...]), fits("a", float | None)
    (True, False, True, False)
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if annotation is Any:
        return True
    if annotation in (None, types.NoneType):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation in (float, SupportsFloat):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is str:
        return isinstance(value, str)
    if origin is Literal:
        return value in inner
    if is_tensor(annotation):
        return _numbers(value) or is_file(value)
    if _is_sequence(annotation):
        element = inner[0] if inner else Any
        return isinstance(value, (list, tuple)) and all(fits(v, element) for v in value)
    return False


def _is_sequence(annotation: Any) -> bool:
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and kind.__name__ in ("list", "tuple", "Sequence", "Iterable")


def _numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_numbers(v) for v in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Any: "a value"}
_MANY = {bool: "booleans", int: "whole numbers", float: "numbers", str: "texts", SupportsFloat: "numbers"}


def type_words(annotation: Any) -> str:
    """Return an annotation in words, without what cannot stand in a file.

    >>> type_words(float | int), type_words(int | tuple[int, ...]), type_words(Literal["a", "b"])
    ('a number', 'a whole number or a list of whole numbers', '"a" or "b"')
    """
    found: list[str] = []
    for one in members(annotation):
        inner = get_args(one)
        if get_origin(one) is Literal:
            found += [f'"{v}"' for v in inner]
        elif one in _WORDS:
            found.append(_WORDS[one])
        elif is_tensor(one):
            found += ["a list of numbers", '{file = "name"}']
        elif _is_sequence(one):
            # Within a list a number is a number: a tensor there is one for Python alone.
            plain = [k for k in (members(inner[0]) if inner else ()) if not is_tensor(k)]
            kinds = {_MANY.get(k, "values") for k in plain}
            kinds -= {"whole numbers"} if "numbers" in kinds else set()
            found.append(f"a list of {' or '.join(sorted(kinds)) or 'values'}")
    if "a number" in found and "a whole number" in found:
        found.remove("a whole number")
    return " or ".join(dict.fromkeys(found)) or "nothing"


# --- Files that values name -------------------------------------------------------------------------------


def is_file(value: Any) -> bool:
    """Return whether a value asks for what is in a file: ``{file = "lesion.nii.gz"}``."""
    return isinstance(value, Mapping) and set(value) == {"file"} and isinstance(value["file"], str)


def with_files(value: Any, name: Callable[[str], Any]) -> Any:
    """Return the same value, with something else for the name of every file that is in it.

    >>> with_files({"features": [{"file": "a/b.nii"}, 3]}, lambda path: path.rpartition("/")[2])
    {'features': [{'file': 'b.nii'}, 3]}
    """
    if is_file(value):
        return {"file": name(value["file"])}
    if isinstance(value, Mapping):
        return {key: with_files(inner, name) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_files(inner, name) for inner in value]
    return value


def is_there(folder: Path, name: str) -> bool:
    """Check that a file of that name is there, ``~`` being the home folder."""
    try:
        return (folder / os.path.expanduser(name)).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def absolute(path: str, folder: Path) -> str:
    """Return a path that holds from anywhere, ``~`` being the home folder."""
    return os.path.normpath(folder / os.path.expanduser(path))


def placed(entry: Part, path: str, folder: Path, faults: Strict) -> Part:
    """Return a table with the files that its parameters name as absolute paths, and tell which are not there."""
    return type(entry).model_validate(_placed(entry.model_dump(by_alias=True), path, folder, faults))


def _placed(value: Any, path: str, folder: Path, faults: Strict) -> Any:
    if is_file(value):
        if not is_there(folder, value["file"]):
            faults.add(path, "a file", shown(value["file"]), "There is none of that name")
        return {"file": absolute(value["file"], folder)}
    if isinstance(value, Mapping):
        return {key: _placed(inner, f"{path}.{key}", folder, faults) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_placed(inner, f"{path}[{number}]", folder, faults) for number, inner in enumerate(value)]
    return value


# --- Tables -----------------------------------------------------------------------------------------------


def _written(annotation: Any) -> str:
    """How a function with its parameters is written in a file; empty for any other kind of value."""
    return getattr(annotation, "written", "")


def _words(annotation: Any) -> str:
    """What a table of the file takes there, in words."""
    written = [_written(one) for one in members(annotation)]
    if any(written) and str in members(annotation):
        return f"a name, {next(filter(None, written))} or a list of these"
    found = []
    for one in members(annotation):
        if _written(one):
            found.append(_written(one))
        elif get_origin(one) is list and any(map(_written, members(get_args(one)[0]))):
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
    strange = {key: [*_strange({key: value}, path)] for key, value in raw.items()}
    found = [fault for some in strange.values() for fault in some]
    rest = {key: value for key, value in raw.items() if not strange[key]}
    table = None
    try:
        table = cls.model_validate(rest)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        lines = [_told(cls, rest, path, one["loc"], one["type"]) for one in errors]
        found += {line[0]: line for line in reversed(lines)}.values()  # of several kinds, one fault
        wrong = {one["loc"][0] for one in errors}
        with contextlib.suppress(ValidationError):
            table = cls.model_validate({key: value for key, value in rest.items() if key not in wrong})
    for fault in found:
        faults.add(*fault)
    return table


def _told(cls: type[BaseModel], raw: Any, path: str, loc: Sequence[str | int], kind: str) -> Fault:
    """What is wrong with a value, of what the class says of it."""
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
        return here, f"a key of {path}", repr(loc[-1]), nearest(loc[-1], keys)
    takes = _words(keys[str(loc[0])])
    if kind == "missing" and len(loc) == 1:
        return f"{here}.{loc[0]}", takes, "nothing", "Add it"
    return here, takes, shown(value), "Change it"


def _strange(value: Any, path: str) -> Iterator[Fault]:
    """What TOML or Python has and JSON has not: dates, infinity, NaN; and numbers that are none of the machine's."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                yield path, "keys that are texts", shown(key), "Name it"
        for key, inner in value.items():
            yield from _strange(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _strange(inner, f"{path}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, "a finite number", repr(value), "Leave it out where it shall not matter"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield path, "a whole number of 64 bits", shown(value), "Choose a smaller one"
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        yield path, "a text, number, boolean, list or table", shown(str(value)), "Write it as a text"


def one(cls: type[Part], raw: Mapping[str, Any], key: str, faults: Strict) -> Part | None:
    """Return the table of that name, if there is one."""
    if key not in raw or (raw[key] is None and key in ("patches", "reference")):
        return None
    return part(cls, raw[key], key, faults)


def several(cls: type[Part], raw: Mapping[str, Any], key: str, faults: Strict) -> list[tuple[str, Part]]:
    """Return the tables of a list of that name, with their paths."""
    tables = raw.get(key, ())
    if key in raw and (not isinstance(tables, (list, tuple)) or not tables):
        faults.add(key, f"at least one table [[{key}]]", shown(tables), "Add one")
        return []
    given = {f"{key}[{number}]": table for number, table in enumerate(tables)}
    made = [(path, part(cls, table, path, faults)) for path, table in given.items()]
    return [(path, table) for path, table in made if table is not None]


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


# --- What many tables have --------------------------------------------------------------------------------


def _is_name(text: str) -> bool:
    """Letters and digits of any script, with their marks, and '.', '_' and '-' between them.

    >>> _is_name("Ödem_2"), _is_name("肿瘤"), _is_name("../x"), _is_name("a b")
    (True, True, False, False)
    """
    kinds = [unicodedata.category(c)[0] for c in text]
    inside = all(kind in "LNM" or c in "._-" for kind, c in zip(kinds, text, strict=True))
    return bool(kinds) and kinds[0] in "LN" and inside


def check_name(value: str, path: str, faults: Strict) -> None:
    """Tell what is wrong with a name that becomes a part of file names."""
    if not (_is_name(value) if path.endswith(".name") else ID.fullmatch(value)):
        faults.add(path, "letters, digits, '.', '_' and '-'", shown(value), "It becomes a part of file names")


def place_label(place: str) -> str:
    """Return a place as a part of an id.

    >>> place_label("decoder.1#0")
    'decoder.1-0'
    """
    return re.sub(r"[^A-Za-z0-9._-]", "-", place)


def own_limits(given: Any, path: str, faults: Strict) -> dict[str, Any]:
    """Return the ``deadline`` and the ``memory`` of a table, this one in bytes, and tell what is wrong with them."""
    if given.deadline is not None and given.deadline <= 0:
        faults.add(f"{path}.deadline", "seconds > 0", str(given.deadline), "Leave it out for none")
    memory = None
    if given.memory is not None:
        with faults.at(f"{path}.memory"):
            memory = parse_memory(path, given.memory)
    return {"deadline": given.deadline, "memory": memory}


def id_and_limits(given: Any, path: str, faults: Strict) -> dict[str, Any]:
    """Return the limits of a table with an ``id``, and tell what is wrong with either."""
    if given.id is not None:
        check_name(given.id, f"{path}.id", faults)
    return own_limits(given, path, faults)
