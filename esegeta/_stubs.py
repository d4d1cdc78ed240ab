"""The public surface for type checkers: ``python -m esegeta._stubs`` writes ``esegeta/__init__.pyi``.

Methods and transforms are found when the package is imported, which no type checker can follow. The stub says
where each name comes from.
"""

import ast
import inspect
from pathlib import Path

import esegeta
from esegeta import _surface
from esegeta._registry import METHODS, TRANSFORMS

COMMAND = "python -m esegeta._stubs"
WIDTH = 110  # of a line, as the formatter breaks them
PATH = Path(esegeta.__file__).with_name("__init__.pyi")


def _explicit() -> dict[str, str]:
    """Public name to module, for what ``_surface.py`` imports itself."""
    found = {}
    for node in ast.parse(inspect.getsource(_surface)).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found.update({alias.asname or alias.name: node.module for alias in node.names})
    later = {name: f"esegeta.{home}".rstrip(".") for name, home in _surface.LATER.items()}
    return {name: module for name, module in {**found, **later}.items() if name in _surface.__all__}


def _discovered() -> dict[str, str]:
    """Public name to module, for what the registry holds of this package."""
    functions = [*(spec.fn for spec in METHODS.values()), *(spec.fn for spec in TRANSFORMS.values())]
    return {fn.__name__: fn.__module__ for fn in functions if fn.__module__.startswith("esegeta.")}


def _line(module: str, name: str) -> str:
    line = f"from {module} import {name} as {name}"
    return line if len(line) <= WIDTH else f"from {module} import (\n    {name} as {name},\n)"


def text() -> str:
    """What the stub should hold.

    >>> "from esegeta.methods.gradient import gradient as gradient" in text()
    True
    """
    names = {**_explicit(), **_discovered()}
    lines = [_line(module, name) for module, name in sorted((module, name) for name, module in names.items())]
    public = "".join(f'    "{name}",\n' for name in sorted(names))
    return f"# Written by: {COMMAND}\n" + "\n".join(lines) + f"\n\n__version__: str\n__all__ = [\n{public}]\n"


if __name__ == "__main__":
    PATH.write_text(text())
