"""What a metric declares of itself, found from the metric as it was set up."""

import functools
from collections.abc import Callable
from typing import Any, Literal

from esegeta._registry import METRICS, MetricSpec


def spec_of(metric: Callable[..., Any]) -> MetricSpec | None:
    """Return what a registered metric declares, ``functools.partial`` or not; None for a function of one's own.

    >>> from esegeta import metrics
    >>> spec_of(functools.partial(metrics.deletion, steps=4)).answer
    'curve'
    """
    while isinstance(metric, functools.partial):
        metric = metric.func
    return next((spec for spec in METRICS.values() if spec.fn is metric), None)


def direction(metric: Callable[..., Any]) -> Literal["higher", "lower"] | None:
    """Return which way the numbers of a metric are better; None if neither is, or if it is not registered.

    >>> from esegeta import metrics
    >>> direction(metrics.deletion), direction(metrics.entropy)
    ('lower', None)
    """
    spec = spec_of(metric)
    return None if spec is None or spec.better == "" else spec.better
