"""Explains what neural networks for 2-D and 3-D images do: attributions as pure functions over torch.func.

The names come from ``esegeta._surface`` when the first of them is used: the command line can answer without torch.
"""

import importlib
import importlib.util
import sys
import types
from typing import Any

__version__ = "0.1.0"

# A public function of the name of its file. Importing the file must not put the module in its place.
_NAMESAKES: frozenset[str] = frozenset()


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _NAMESAKES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles of functions that use the package name it, as they name any other module."""
        return importlib.import_module, (__name__,)


sys.modules[__name__].__class__ = _Package


def _bring_in() -> None:
    surface = importlib.import_module(f"{__name__}._surface")
    public = getattr(surface, "__all__", ())  # not there yet while it is still being imported
    later = getattr(surface, "LATER", {})
    globals().update(
        {name: getattr(surface, name) for name in (*public, "__all__") if public and name not in later}
    )


def __getattr__(name: str) -> Any:
    private = name.startswith("__") and name != "__all__"
    # Files of the package import each other by ``from esegeta import random``: that must not ask for all names.
    if not (private or name in _NAMESAKES) and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    if not private:
        _bring_in()
        if name in globals():
            return globals()[name]
        surface = sys.modules[f"{__name__}._surface"]
        if name in getattr(surface, "LATER", {}):
            globals()[name] = getattr(surface, name)
            return globals()[name]
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__]
    )


def __dir__() -> list[str]:
    _bring_in()
    return sorted({*globals(), *globals()["__all__"]})
