"""Explains what neural networks for 2-D and 3-D images do: attributions as pure functions over torch.func.

``__init__.pyi`` says which names there are and where each comes from. They are imported when they are first used:
the command line can answer without torch.
"""

import functools
import importlib
import pkgutil
import re
from typing import Any

__version__ = "0.1.0"

# Whoever has one name of the package finds everything that it registers, as ``find_method`` and ``at`` do by name.
_REGISTERED = ("methods", "reducers", "transforms")


@functools.cache
def _homes() -> dict[str, str]:
    """The module that each public name comes from, by the stub."""
    stub = (pkgutil.get_data(__name__, "__init__.pyi") or b"").decode()
    return {name: home for home, name in re.findall(r"^from (\S+) import \(?\s*(\w+) as", stub, re.MULTILINE)}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return list(_homes())
    home = "" if name.startswith("__") else _homes().get(name, "")
    if not home:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    if home == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    for package in _REGISTERED:
        importlib.import_module(f"{__name__}.{package}")
    globals()[name] = getattr(importlib.import_module(home), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), "__all__", *_homes()})
