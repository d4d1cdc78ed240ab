"""The state of the page: a configuration in a file of its folder, which anybody can read, edit and run.

Nothing is kept beside it. Two browsers see the same because both read the file, and a server that was killed goes on
where it was.
"""

import glob
import hashlib
import json
import os
import threading
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from esegeta.app.security import Folders
from esegeta.engine import check
from esegeta.run import bounds
from esegeta.run.config import loading, toml
from esegeta.run.config.faults import Faults, fault
from esegeta.run.config.schema import Config
from esegeta.run.jobs import outputs

NAME = "app.toml"
COMMENT = f"What the page of `esegeta app` shows. Run it without the page: esegeta run {NAME}"
BEGINNING: dict[str, Any] = {"run": {"output": "results", "workers": 2, "baseline": "zero"}}
_NAMES = ("name", "title", "id", "subject")  # keys whose values are never files


class StaleError(ValueError):
    """Another browser has changed the state meanwhile."""


class Seen(NamedTuple):
    """The state as it is: tables, and a mark that changes with them; fault: why the file could not be read."""

    tables: dict[str, Any]
    mark: str
    fault: str = ""


class State:
    """The configuration in a folder.

    Args:
        folder: of the page; that of a finished run is only looked at.
        trust: which code may run, as for ``esegeta run``.
        folders: what the page may look into.
    """

    def __init__(self, folder: Path, trust: Iterable[str], folders: Folders) -> None:
        self.folder, self.trust, self.folders = folder, tuple(trust), folders
        self.finished = (folder / ".jobs").is_dir()
        self.file = folder / ("config.json" if self.finished else NAME)
        self._lock = threading.RLock()

    @property
    def results(self) -> Path:
        """The folder of the run."""
        if self.finished:
            return self.folder
        run = self.seen().tables.get("run")
        name = run.get("output", "results") if isinstance(run, Mapping) else "results"
        whole = Path(os.path.normpath(self.folder / os.path.expanduser(str(name))))
        return whole if _below(whole, self.folder) else self.folder / "results"

    def seen(self) -> Seen:
        """Return the state as the file has it now."""
        with self._lock:
            try:
                text = self.file.read_bytes()
            except OSError:
                return Seen(dict(BEGINNING), "new")
            mark = hashlib.sha256(text).hexdigest()[:16]
            try:
                tables, _ = loading.read(self.file)
            except Faults as error:
                return Seen({}, mark, "; ".join(error.faults))
            return Seen(dict(tables), mark)

    def keep(self, tables: Mapping[str, Any], mark: str | None = None) -> Seen:
        """Write the state.

        Args:
            tables: of the configuration, whole or not.
            mark: of the state that was changed; another one is there: ``StaleError``. None writes in any case.
        """
        if self.finished:
            advice = "Download the configuration and open it in another folder"
            raise check.refused("app", "a folder to work in", "that of a finished run", advice)
        text = written(tables)
        with self._lock:
            if mark is not None and mark != self.seen().mark:
                raise StaleError(
                    check.problem("app", "the newest state", "an older one", "Take the one that is there")
                )
            outputs.write_text(self.file, text)
            return self.seen()

    def text(self) -> str:
        """Return the state as TOML."""
        if self.finished:
            return written(self.seen().tables)
        try:
            return self.file.read_text(encoding="utf-8")
        except OSError:
            return written(BEGINNING)

    def config(self) -> Config:
        """Return the configuration, checked as ``esegeta run`` does, and that it names nothing that it may not."""
        seen = self.seen()
        lines = [seen.fault] if seen.fault else list(self.outside(seen.tables))
        if lines:
            raise Faults(lines)
        with self._lock:  # plugins register themselves
            found = (
                loading.load(self.file, trust=self.trust) if self.file.exists() else loading.load(seen.tables)
            )
        for entry in _expanded(found):
            self.folders.real(entry)
        return found

    def problems(self) -> list[str]:
        """Return everything that keeps the configuration from running, a line each."""
        try:
            self.config()
        except Faults as error:
            return list(error.faults)
        except ValueError as error:
            return [str(error)]
        return []

    def outside(self, tables: Mapping[str, Any]) -> Iterator[str]:
        """Give a line for each file of a configuration that the page may not name."""
        for path, text in _texts(tables, ""):
            whole = Path(os.path.normpath(self.folder / os.path.expanduser(text)))
            if path == "run.output":
                if not _below(Path(os.path.realpath(whole)), self.folder):
                    advice = "Results of the page are written there"
                    yield fault(path, f"a folder in {self.folder}", repr(text), advice)
                continue
            plain = Path(_before_pattern(str(whole)))
            if not self.folders.hold(Path(os.path.realpath(plain))) and _names_a_file(text, plain):
                advice = "Start the page with --browse FOLDER, or choose another file"
                yield fault(path, "a path in the folders of the page", repr(text), advice)


def _below(path: Path, folder: Path) -> bool:
    real = Path(os.path.realpath(folder))
    return Path(os.path.realpath(path)) != real and real in Path(os.path.realpath(path)).parents


def _before_pattern(text: str) -> str:
    """The part of a path that is no pattern.

    >>> _before_pattern("/a/b/*.nii"), _before_pattern("/a/b.nii")
    ('/a/b', '/a/b.nii')
    """
    parts = Path(text).parts
    plain = [part for n, part in enumerate(parts) if not any(glob.has_magic(p) for p in parts[: n + 1])]
    return str(Path(*plain))


def _names_a_file(text: str, plain: Path) -> bool:
    """Whether a text may be the name of a file: a word that is none of a file that is there is just a word."""
    return "/" in text or os.sep in text or text.startswith("~") or ".." in text or os.path.lexists(plain)


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Give every text in tables, with the way there; names and titles are no files."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _NAMES or not isinstance(inner, str):
                yield from _texts(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{path}[{number}]")
    elif isinstance(value, str):
        yield path, value


def _expanded(config: Config) -> Iterator[Path]:
    from esegeta.run.volumes import files

    for volume in files.expand(config.input.files):
        yield from volume
    if config.reference is not None:
        for volume in files.expand(config.reference.files):
            yield from volume


def written(tables: Mapping[str, Any]) -> str:
    """Return tables as TOML that reads back as the same; what has no place there is refused.

    >>> print(written({"run": {"workers": 2, "deadline": None}, "plugins": ["a.py"]}).partition("\\n\\n")[2], end="")
    plugins = ["a.py"]
    <BLANKLINE>
    [run]
    workers = 2
    """
    clean = {name: table for name, table in _without_none(tables).items() if table != []}
    if len(json.dumps(clean)) > bounds.LARGEST:
        raise check.refused(
            "app", "tables of a configuration", "something else, or too much", "Reload the page"
        )
    if {"trust"} & clean.keys():
        advice = "Only the command line can say that"
        raise check.refused("app", "no key `trust` in a configuration", "one", advice)
    text = toml.written(clean, COMMENT)
    try:
        bounds.scan(text, json=False)
        same = tomllib.loads(text) == clean
    except (ValueError, RecursionError) as error:
        raise check.refused("app", "tables of a configuration", str(error)[:200], "Reload the page") from None
    if not same:
        raise check.refused("app", "tables of a configuration", "values that TOML has not", "Reload the page")
    return text


def parsed(text: str) -> dict[str, Any]:
    """Return the tables in a text of TOML, or of JSON if it begins with a brace, within the usual bounds."""
    is_json = text.lstrip().startswith("{")
    try:
        bounds.scan(text, json=is_json)
        found = json.loads(text) if is_json else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        got = f"a fault in it: {str(error)[:200]}"
        raise check.refused("app", "a configuration in TOML", got, "Correct it there") from None
    if not isinstance(found, dict):
        raise check.refused("app", "tables of a configuration", type(found).__name__, "See `esegeta init`")
    return found


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(v) for v in value if v is not None]
    return value
