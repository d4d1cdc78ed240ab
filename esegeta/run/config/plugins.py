"""Methods, transforms, kinds of jobs and so on of one's own: code that registers them when it is imported.

There are files that a configuration names, and installed packages with an entry point ``esegeta.plugins``.

The process that reads a configuration imports them, to check what it names, and so does every worker. They have to
be trusted as a network's file has to be.
"""

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from esegeta._registry import REGISTRIES, load_plugins
from esegeta.engine import check
from esegeta.run.config.faults import Strict, shown
from esegeta.run.config.trust import NAME, Trust, UntrustedError, imported
from esegeta.run.jobs import kinds

WHERE = "plugins"
_loaded: dict[str, str] = {}  # what was in the files that this process has imported
_asked: set[Any] = set()  # for whom, and where, installed packages were looked through
_offered: dict[
    str, str
] = {}  # modules of installed packages that were imported, with what was in their files


def registered(module: str) -> list[str]:
    """Return the names of what a module has registered."""
    functions = [name for table in REGISTRIES for name, spec in table.items() if spec.fn.__module__ == module]
    return functions + [kind.name for kind in kinds.known() if kind.work.__module__ == module]


def load(files: Iterable[str | Path], trust: Trust) -> None:
    """Import files that register methods, transforms and so on; one that has changed since is imported again.

    Installed packages that offer an entry point of the group ``esegeta.plugins`` are imported if they are trusted
    by name; nobody has named the others, so they stay out silently.

    Args:
        files: Python files.
        trust: which code may run.
    """
    _installed(trust)
    for file in files:
        _one(Path(os.path.abspath(os.path.expanduser(file))), trust)


def _installed(trust: Trust) -> None:
    asked = (trust.names, tuple(sys.path))
    if asked in _asked:  # to look through all packages takes longer than many a job
        return
    try:
        modules = load_plugins(lambda point: trust.names_module(point.module) or point.value in trust.names)
        for module in modules:
            file = getattr(sys.modules[module], "__file__", None)
            if module not in _offered:
                _offered[module] = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    except (Exception, SystemExit) as error:
        got = f"{type(error).__name__}: {error}".removesuffix(".")
        advice = "Repair the package, or do not trust it"
        raise check.refused(WHERE, "the plugins of trusted packages to import", got, advice) from error
    _asked.add(asked)


def installed() -> dict[str, str]:
    """Return the modules of installed packages that have registered something, with hashes of their files."""
    return dict(sorted(_offered.items()))


def _one(path: Path, trust: Trust) -> None:
    if path.suffix != ".py" or not NAME.fullmatch(path.stem) or path.stem in sys.stdlib_module_names:
        advice = "Name it with letters, digits and _, and not as a module of Python"
        raise check.refused(WHERE, "a file name.py", shown(path.name), advice)
    try:
        now = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        got = f"{shown(str(path))}: {(error.strerror or 'an error').lower()}"
        raise check.refused(WHERE, "a file that can be read", got, "Check its name") from None
    real = os.path.realpath(path)
    if _loaded.get(real) == now:
        return
    if real in _loaded:
        _forget(path.stem)
    try:
        found = imported(path.stem, path.parent, trust)
    except UntrustedError:
        raise
    except (Exception, SystemExit) as error:
        _forget(path.stem)
        got = f"{type(error).__name__}: {error}".removesuffix(".")
        raise check.refused(
            WHERE, f"{path.name} to import", got, f"Try it in Python: import {path.stem}"
        ) from error
    if found is None or os.path.realpath(str(found.__file__)) != real:
        got = f"a module {path.stem} that is installed"
        raise check.refused(WHERE, f"{path.name} to be the only one of its name", got, "Give it another name")
    _loaded[real] = now


def _forget(module: str) -> None:
    sys.modules.pop(module, None)
    kinds.forget(module)
    for table in REGISTRIES:
        for name in [name for name, spec in table.items() if spec.fn.__module__ == module]:
            del table[name]


def check_plugins(given: Any, folder: Path, trust: Trust, faults: Strict) -> None:
    """Look for what is wrong with the plugins of a configuration. Those that are trusted are imported."""
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
        faults.add(WHERE, "a list of Python files", shown(given), 'Write ["my_methods.py"]')
        return
    try:
        load([], trust)
    except ValueError as error:
        faults.say(str(error))
        return
    for number, name in enumerate(given):
        path = f"{WHERE}[{number}]"
        try:
            load([folder / os.path.expanduser(name)], trust)
        except UntrustedError as error:
            faults.add(path, error.expected, error.got, error.advice)
        except ValueError as error:
            faults.say(f"{path}: {str(error).removeprefix(f'{WHERE}: ')}")
