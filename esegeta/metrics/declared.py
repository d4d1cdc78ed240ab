"""Which way a number is better: told once, where metrics are gathered, and read by null models and tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from esegeta.metrics.explanations import says

Better = Literal["higher", "lower"]


def declare(directions: Mapping[Better, Sequence[Callable[..., Any]]]) -> None:
    """Give metrics the attribute ``better``."""
    for better, metrics in directions.items():
        for metric in metrics:
            metric.better = better  # type: ignore[attr-defined]


def direction(metric: object) -> Better | None:
    """Return which way the numbers of a metric are better, ``functools.partial`` or not; None if neither is.

    >>> from esegeta import metrics
    >>> direction(metrics.deletion), direction(metrics.entropy)
    ('lower', None)
    """
    found = says(getattr(metric, "func", metric), "better")
    return found if found in ("higher", "lower") else None
