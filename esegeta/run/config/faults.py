"""Faults of a configuration, each with its path: raised at the first one, or collected to be told all at once."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from esegeta.engine import check
from esegeta.engine.refusals import one_line

LONGEST = 60  # characters of a value that a message shows


def fault(path: str, expected: str, got: object, advice: str) -> str:
    """Return one line about one thing that is wrong."""
    path = "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)
    return f"{path}: expected {expected}, got {got}. {advice.removesuffix('.')}."


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


def nearest(word: object, known: Iterable[str]) -> str:
    """Return advice for a word that is not known."""
    names = list(known)
    few = 0 < len(names) <= 12
    return check.nearest(
        str(word), names, f"Known: {', '.join(sorted(names))}" if few else "Nothing is near it"
    )


class Faults(check.Refused):
    """What is wrong with a configuration: ``faults`` has a line for each thing."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))

    def __reduce__(self) -> tuple[Any, ...]:
        return Faults, (self.faults,)


def message_of(error: object) -> str:
    """Return what a function says about its argument, without the name of the function and on one line.

    >>> message_of(ValueError("ig: expected steps >= 1,\\n got 0. Raise it."))
    'expected steps >= 1, got 0. Raise it.'
    """
    return re.sub(r"^[\w. \[\]]+: (?=expected )", "", one_line(error))


class Strict:
    """Raise the first fault: whoever builds in earnest has nothing to build then."""

    def say(self, line: str) -> None:
        """Take a whole line about a fault."""
        raise check.Refused(line)

    def add(self, path: str, expected: str, got: object, advice: str) -> None:
        """Take a fault."""
        self.say(fault(path, expected, got, advice))

    @contextlib.contextmanager
    def at(self, path: str) -> Iterator[None]:  # noqa: ARG002
        """Take what a function refuses as a fault at this path; what was to be built is left out then."""
        yield


class Collector(Strict):
    """Collect the faults in ``lines``.

    >>> faults = Collector()
    >>> with faults.at("run.key"):
    ...     raise ValueError("key: expected a number, got none. Pass one.")
    >>> faults.add("run.workers", "a number", 0, "Raise it")
    >>> faults.lines
    ['run.key: expected a number, got none. Pass one.', 'run.workers: expected a number, got 0. Raise it.']
    """

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """Keep a line."""
        self.lines.append(line)

    @contextlib.contextmanager
    def at(self, path: str) -> Iterator[None]:
        """Keep what a function says about its arguments: it looks at them before it sees an image."""
        try:
            yield
        except (ValueError, TypeError) as error:
            self.say(f"{path}: {message_of(error)}")

    def in_order(self, raw: Mapping[str, Any]) -> list[str]:
        """Return the faults as the file has them, without those that only follow from a wrong key."""
        first: dict[str, str] = {}
        for line in self.lines:
            first.setdefault(line.partition(":")[0], line)
        tables = list(raw)

        def place(path: str) -> tuple[int, int]:
            found = re.match(r"(\w+)(?:\[(\d+)\])?", path)
            table, number = (found[1], found[2]) if found else ("", None)
            return (tables.index(table) if table in tables else len(tables), int(number or 0))

        return [first[path] for path in sorted(first, key=place)]
