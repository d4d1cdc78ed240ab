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
    """Return tables, and lists of tables, as a file.

    >>> print(written({"run": {"workers": 2}, "targets": [{"name": "a"}]}), end="")
    [run]
    workers = 2
    <BLANKLINE>
    [[targets]]
    name = "a"
    """
    blocks = [f"# {comment}\n"] if comment else []
    for name, table in tables.items():
        head, several = (f"[[{name}]]", table) if isinstance(table, list) else (f"[{name}]", [table])
        for one in several:
            blocks.append("\n".join([head, *(f"{_key(k)} = {value(v)}" for k, v in one.items())]) + "\n")
    return "\n".join(blocks)
