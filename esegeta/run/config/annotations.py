"""Values as they stand in TOML and JSON, against the annotations of parameters."""

import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, SupportsFloat, Union, get_args, get_origin

from torch import Tensor

LONGEST = 60  # characters of a value that a message shows


def shown(value: object) -> str:
    """Return a value in a message: on one line, and not all of it if it is long.

    >>> shown("a\\nb"), shown([1.5, None])
    ("'a\\\\nb'", '[1.5, None]')
    """
    try:
        text = "nothing" if value is None else repr(value)
    except ValueError:  # a number of thousands of digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


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
