"""What a reader has to know of a map before its numbers: that it is a part only, or that its sum misses the score."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from esegeta._registry import MethodSpec
from esegeta.plot.canvas import numeral
from esegeta.run.config import catalogue

# What a method that claims completeness may miss of the difference to the baseline.
MISSED = 0.05
# Below this share of the score itself, single precision decides about a residual.
ROUNDING = 1e-5


def missed(score: float | None, residual: float | None, difference: float | None) -> float | None:
    """Return how much of the score's difference to the baseline a map leaves unexplained, None if that is little.

    >>> missed(10.0, -2.0, 8.0), missed(10.0, 0.1, 8.0), missed(1e6, 0.5, 1.0), missed(1.0, 0.5, 0.0)
    (0.25, None, None, inf)
    """
    if score is None or residual is None or difference is None:
        return None
    rounding = ROUNDING * max(abs(score), abs(score - difference))
    if abs(residual) <= max(MISSED * abs(difference), rounding):
        return None
    return abs(residual / difference) if difference else math.inf


def incomplete(
    spec: MethodSpec, share: float, residual: float, difference: float, precision: str
) -> dict[str, Any]:
    """Return the event that a map does not add up to what its method claims, with what to do about it."""
    settings = catalogue.of_method(spec)
    advice = []
    if "steps" in settings:
        advice.append("take more steps")
    if "steps" in settings and not spec.place:
        advice.append("or adaptive_integrated_gradients, which takes as many as completeness needs")
    if "max_runs" in settings:
        advice.append("raise max_runs")
    if "samples" in settings:
        advice.append("take more samples")
    if spec.place:
        advice.append("or take a place that is a cut: what passes beside this one is not in its map")
    if precision != "float32":
        advice.append('or leave run.precision at "float32"')
    if not advice:
        advice.append("check it with esegeta.axioms.completeness before its values are used")
    text = ", ".join(advice)
    message = (
        f"{spec.name} claims completeness, but {portion(share)} of the difference to the baseline, "
        f"{numeral(difference)}, is not in the map: the residual is {numeral(residual)}. "
        f"{text.removeprefix('or ')[0].upper()}{text.removeprefix('or ')[1:]}."
    )
    return {
        "event": "incomplete",
        "message": message,
        "axiom": "completeness",
        "residual": residual,
        "difference": difference,
        "share": share,
    }


def portion(share: float) -> str:
    """Return a share as it is read.

    >>> portion(0.0987), portion(0.0004), portion(12.0), portion(math.inf)
    ('9.9 %', '0.04 %', '1200 %', 'more than all')
    """
    if not math.isfinite(share):
        return "more than all"
    digits = 0 if share >= 1 else 3 if share >= 0.995 else 2
    return f"{100 * share:.{digits}g} %" if digits else f"{100 * share:.0f} %"


def marks(record: Mapping[str, Any]) -> list[str]:
    """Return what has to stand beside a map wherever it is shown, in a few words.

    >>> marks({"status": "partial", "share_done": 0.1, "missed": {"completeness": 0.83}})
    ['partial: 10 % done', 'incomplete: 83 % missing']
    >>> marks({"status": "done", "missed": None})
    []
    """
    found = []
    if record.get("status") == "partial":
        share = _number(record.get("share_done"))
        found.append("partial" if share is None else f"partial: {portion(share)} done")
    shares = record.get("missed")
    if isinstance(shares, Mapping) and "completeness" in shares:
        share = _number(shares["completeness"])
        found.append("incomplete" if share is None else f"incomplete: {portion(share)} missing")
    return found


def titled(title: str, found: Sequence[str]) -> str:
    """Return a title with the marks behind it.

    >>> titled("occlusion", ["partial: 10 % done"])
    'occlusion [partial: 10 % done]'
    """
    return f"{title} [{'; '.join(found)}]" if found else title


def _number(value: Any) -> float | None:
    sized = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if sized else None
