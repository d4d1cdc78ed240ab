"""The search for the smallest situation in which an axiom fails. The only part that draws."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import Flaky, Unsatisfiable
from hypothesis.internal.conjecture import providers
from hypothesis.strategies import SearchStrategy

from esegeta.conformance.subjects import NoExplanation
from esegeta.engine import progress

# How often a counterexample is tried to be made smaller.
SHRINKS = 150
# Situations are drawn in blocks, each of the simplest one of all and of others at random. Hypothesis begins a longer
# block with a tenth of tiny situations, which is where a search that ends early would end; and its order would depend
# on the number of cases.
BLOCK = 9
# A search ends after so many blocks without anything new.
BARREN = 3


@dataclass
class Search:
    """How many situations to try, until when, and in which order."""

    cases: int = 100
    until: float = float("inf")
    start: int = 0


@dataclass
class Found:
    """What a search has seen. ``failed`` is the smallest situation that fails, as the code that rebuilds it, with
    residual and what is allowed; ``cases`` are those that could have failed, of all that were ``tried``."""

    cases: int = 0
    tried: int = 0
    refused: int = 0
    why: str = ""
    complete: bool = True
    failed: tuple[str, float, float] | None = None


class _Fails(Exception):
    """A situation in which the axiom fails."""


class _Over(BaseException):
    """The search is at its end. Hypothesis lets through what is no ``Exception``."""


def smallest(
    situations: SearchStrategy[Any],
    measure: Callable[[Any], tuple[float, float]],
    search: Search,
    trivial: Callable[[Any], bool] = lambda _: False,
) -> Found:
    """Draw situations until one has a residual above what is allowed there, and make that one smaller.

    The order of the situations depends on the seed alone: a search that ends early has seen the first of those that
    a longer one sees. A situation in which the method raises is refused, and counted as such; one of which the axiom
    says nothing, or that is ``trivial`` and kept, is no case. The answers to situations are remembered, so that a
    search whose time is over ends with the smallest failure that it has.
    """
    found = Found()
    known: dict[str, tuple[str, float, float] | None] = {}
    wrong: list[NoExplanation] = []
    after = 0

    def failure(situation: Any) -> tuple[str, float, float] | None:
        nonlocal after
        name = repr(situation)  # now: a method may write to its input
        if name in known:
            return known[name]
        after += found.failed is not None
        if time.monotonic() > search.until or after > SHRINKS:
            found.complete = found.failed is not None
            raise _Over
        if found.failed is None and found.tried >= search.cases:
            raise _Over
        known[name] = None
        found.tried += found.failed is None
        with progress.step(bar, (found.tried - 1) / search.cases, found.tried / search.cases):
            bar.at(0.0)
            known[name] = judged(name, situation)
        return known[name]

    def judged(name: str, situation: Any) -> tuple[str, float, float] | None:
        try:
            residual, allowed = measure(situation)
            fails = not residual <= allowed  # NaN fails
            counts = fails or (allowed < math.inf and not trivial(situation))
        except NoExplanation as error:  # not one case, the whole method: Hypothesis is not to make it smaller
            wrong.append(error)
            raise _Over from error
        except Exception as refusal:  # whatever it is: the method does not accept this case
            found.refused += found.failed is None
            found.why = found.why or _line(refusal)
            return None
        found.cases += counts and found.failed is None
        return (name, residual, allowed) if fails else None

    def run(block: int) -> None:
        @seed(search.start * 1_000_003 + block)
        @settings(
            max_examples=BLOCK,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            verbosity=Verbosity.quiet,
        )
        @given(situations)
        def one_block(situation: Any) -> None:
            seen = failure(situation)
            if seen is not None:
                found.failed = seen
                raise _Fails

        one_block()

    try:
        with warnings.catch_warnings(), _whatever_is_imported(), progress.loop("search") as bar:
            # Run-time type checks draw from Python's generator, which Hypothesis warns of.
            warnings.simplefilter("ignore")
            block, barren = 0, 0
            while barren < BARREN:
                before = len(known)
                run(block)
                block, barren = block + 1, barren + 1 if len(known) == before else 0
    except (_Fails, _Over):
        pass
    except Unsatisfiable:
        pass  # nothing can be drawn: there is no such situation
    except Flaky:
        if found.failed is None:
            raise
    if wrong:
        raise wrong[0]
    return found


@contextlib.contextmanager
def _whatever_is_imported() -> Iterator[None]:
    """Hypothesis also draws constants that it finds in the modules a process has imported: a verdict may not depend
    on them."""
    nothing = lambda *_, **__: None
    source = getattr(providers, "HypothesisProvider", None)
    if hasattr(source, "_maybe_draw_constant"):  # versions before it draw no constants
        with mock.patch.object(source, "_maybe_draw_constant", nothing):
            yield
    else:
        yield


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
