"""Tables as TOML. The standard library reads it and does not write it."""

import json
import re
from collections.abc import Mapping
from typing import Any


def value(v: Any) -> str:
    """Return a value on one line.

    >>> value({"name": "grid", "size": [8, 8.5], "a b": True})
    '{ name = "grid", size = [8, 8.5], "a b" = true }'
    """
    if isinstance(v, bool):
        return "true" if v else "false"
    if isinstance(v, (int, float)):
        return repr(v)
    if isinstance(v, str):
        return _quoted(v)
    if isinstance(v, Mapping):
        return f"{{ {', '.join(f'{_key(k)} = {value(w)}' for k, w in v.items())} }}" if v else "{}"
    return f"[{', '.join(map(value, v))}]"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _quoted(text: str) -> str:
    # JSON would write what is beyond 16 bits as two escapes, which TOML refuses.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def written(tables: Mapping[str, Any], comment: str = "") -> str:
    """Return tables, and lists of tables, as a file; values beside them come first.

    >>> print(written({"run": {"workers": 2}, "targets": [{"name": "a"}]}), end="")
    [run]
    workers = 2
    <BLANKLINE>
    [[targets]]
    name = "a"
    """
    blocks = [f"# {comment}\n"] if comment else []
    plain = {name: v for name, v in tables.items() if not _is_table(v)}
    if plain:
        blocks.append("\n".join(f"{_key(k)} = {value(v)}" for k, v in plain.items()) + "\n")
    for name, table in tables.items():
        if name in plain:
            continue
        key = _key(name)
        head, several = (f"[[{key}]]", table) if isinstance(table, list) else (f"[{key}]", [table])
        for one in several:
            blocks.append("\n".join([head, *(f"{_key(k)} = {value(v)}" for k, v in one.items())]) + "\n")
    return "\n".join(blocks)


def _is_table(v: Any) -> bool:
    """Whether a value is a table, or a list of tables only."""
    tables = v if isinstance(v, (list, tuple)) else [v]
    return all(isinstance(one, Mapping) for one in tables) and bool(tables)
