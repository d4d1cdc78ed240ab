"""Progress of nested loops as one number, shown on terminals or handed to a function."""

import contextlib
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar

from esegeta.engine.execution import Execution, current

_QUIET_SECONDS = 2.0
_REFRESH_SECONDS = 0.1


class Bar:
    """The progress of an outermost loop; loops inside it move it by fractions of its steps."""

    def __init__(self, label: str, settings: Execution) -> None:
        self.label = label
        self.report = settings.progress if callable(settings.progress) else None
        terminal = sys.stderr.isatty() if settings.progress is None else bool(settings.progress)
        self.drawn = terminal and self.report is None
        self.at_once = settings.progress is True
        self.started = self.shown = time.monotonic()
        self.visible = False
        self.spans: list[tuple[float, float]] = [(0.0, 1.0)]
        self.reached = 0.0

    def at(self, fraction: float) -> None:
        """Note which fraction of itself the innermost loop has done."""
        start, width = self.spans[-1]
        # Never back: a step may hold two loops, and one that ran out of memory is tried again.
        whole = self.reached = max(self.reached, start + width * fraction)
        if self.report is not None:
            self.report(self.label, whole)
        elif self.drawn:
            self._draw(whole)

    def _draw(self, whole: float) -> None:
        now = time.monotonic()
        if not self.at_once and now - self.started < _QUIET_SECONDS:
            return
        if now - self.shown < _REFRESH_SECONDS and whole < 1:
            return
        self.shown, self.visible = now, True
        spent = now - self.started
        rest = f"{spent * (1 - whole) / whole:.0f} s left" if whole > 0 else ""
        full = int(28 * whole)
        line = f"{self.label} [{'=' * full}{' ' * (28 - full)}] {100 * whole:3.0f} %  {spent:.0f} s  {rest}"
        sys.stderr.write("\r" + line.ljust(90)[:110])
        sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if self.visible:
            sys.stderr.write("\n")
            sys.stderr.flush()


_bar: ContextVar[Bar | None] = ContextVar("esegeta_progress", default=None)


@contextlib.contextmanager
def loop(label: str) -> Iterator[Bar]:
    """Report a loop; the outermost one owns the bar."""
    outer = _bar.get()
    if outer is not None:
        yield outer
        return
    bar = Bar(label, current())
    token = _bar.set(bar)
    try:
        yield bar
    finally:
        _bar.reset(token)
        bar.close()


@contextlib.contextmanager
def step(bar: Bar, start: float, end: float) -> Iterator[None]:
    """Return one step of the loop, from ``start`` to ``end`` as fractions of it; loops inside move within."""
    outer_start, outer_width = bar.spans[-1]
    bar.spans.append((outer_start + outer_width * start, outer_width * (end - start)))
    try:
        yield
    finally:
        bar.spans.pop()
