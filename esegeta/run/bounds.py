"""How large a text may be before it is parsed, and a volume before it is unpacked.

A parser of TOML takes time and memory with the square of the parts of a dotted key: 40 kB of ``a.a.a`` took 17 s and
1.8 GB. Depth, lengths and the number of keys are counted here in one pass over the text, before any parser sees it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

LARGEST = 2**22  # bytes of a text: what is larger is some other file
DEEPEST = 32  # tables and lists inside one another, a dotted key counting once for each of its dots
LONGEST = 1000  # characters of a key, or of a number
MOST_KEYS = 50_000  # each with the parts of a dotted one


class TooMuch(ValueError):
    """A text beyond its bounds: what was expected, what was found, what to do."""

    def __init__(self, expected: str, got: str, advice: str) -> None:
        self.expected, self.got, self.advice = expected, got, advice
        super().__init__(f"expected {expected}, got {got}. {advice}.")


def text(path: Path) -> str:
    """Return what is in a file .toml or .json, within the bounds above; a byte order mark is dropped."""
    size = path.stat().st_size
    if size > LARGEST:
        raise TooMuch(f"a text of at most {LARGEST} bytes", f"{size} bytes", "Name another file")
    with path.open("rb") as stream:
        found = stream.read(LARGEST + 1).decode("utf-8-sig")  # not more, whatever a device says of its size
    scan(found, json=path.suffix == ".json")
    return found


# Each alternative is linear: what is matched is never given back.
_STRINGS = r'"(?:[^"\\\n]++|\\.)*+"'
_TOKENS = {
    True: re.compile(
        rf'(?P<text>{_STRINGS})|(?P<mark>[\[\]{{}},:])|(?P<bare>[^\s"\[\]{{}},:]++)' r'|(?P<bad>")', re.DOTALL
    ),
    False: re.compile(
        r'(?P<long>"""(?:[^"\\]++|\\.|"(?!""))*+"{3,5}+'
        r"|'''(?:[^']++|'(?!''))*+'{3,5}+)"
        rf"|(?P<text>{_STRINGS}|'[^'\n]*+')"
        r"|(?P<comment>#[^\n]*+)"
        r"|(?P<mark>[\[\]{},=.\n])"
        r"|(?P<bare>[^\s\"'#\[\]{},=.]++)"
        r"|(?P<bad>[\"'])",
        re.DOTALL,
    ),
}


def scan(text: str, *, json: bool) -> None:
    """Refuse a text that is too deep or has too long or too many keys, without parsing it.

    >>> scan("a.b = { c = [1.5, 2] }", json=False)
    >>> scan("a" + ".a" * 40 + " = 1", json=False)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    esegeta.run.bounds.TooMuch: expected a text with at most 32 tables inside one another, ...
    """
    # levels: how deep each open bracket is; dots: of the key that is being read; before: of the key of a value.
    keys, levels, dots, before, value = 0, [0], 0, 0, False
    for kind, token, start in _tokens(text, json):
        if kind == "mark":
            if token in "=:":
                keys, before, dots, value = keys + 1 + dots, dots, 0, True
            elif token == ".":
                dots += 1
            elif token in "[{":
                keys += not (value or json)  # the head of a table
                levels.append(levels[-1] + 1 + before)
                before = dots = 0
            else:
                keys += 0 if value else dots
                before = dots = 0
                if token in "]}" and len(levels) > 1:
                    levels.pop()
                value = value and not (token == "\n" and len(levels) == 1)
        if levels[-1] + dots > DEEPEST:
            raise _beyond(f"at most {DEEPEST} tables inside one another", text, start, "Make it flatter")
        if keys > MOST_KEYS:
            raise _beyond(f"at most {MOST_KEYS} keys", text, start, "Name another file")
        if kind == "bad":
            raise _beyond("closed quotes", text, start, "Close them", "open ones")
        if len(token) > LONGEST and (
            kind == "bare" or (kind == "text" and _is_key(text, start + len(token)))
        ):
            raise _beyond(f"keys and numbers of at most {LONGEST} characters", text, start, "Make it shorter")


def _tokens(text: str, json: bool) -> Iterator[tuple[str, str, int]]:
    for found in _TOKENS[json].finditer(text):
        yield str(found.lastgroup), found[0], found.start()


def _is_key(text: str, position: int) -> bool:
    return re.compile(r"\s*[=:.]").match(text, position) is not None


def _beyond(expected: str, text: str, position: int, advice: str, got: str = "more") -> TooMuch:
    return TooMuch(f"a text with {expected}", f"{got} in line {text.count(chr(10), 0, position) + 1}", advice)


# --- Volumes ----------------------------------------------------------------------------------------------


def available() -> int | None:
    """Return the memory that this process could still take, of the machine or its container; None if nobody says."""
    found = []
    for name, line in (("/proc/meminfo", r"MemAvailable:\s*(\d+) kB"),):
        if (match := re.search(line, _read(name))) is not None:
            found.append(int(match[1]) * 1024)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


def _read(name: str) -> str:
    try:
        with open(name, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def size(count: int) -> str:
    """Return bytes in words.

    >>> size(3 * 2**30), size(2**20)
    ('3.0 GiB', '1 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{-(-count // 2**20)} MiB"
