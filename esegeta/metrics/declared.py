"""What a metric or a method declares of itself, found from what was made of it."""

import functools
from collections.abc import Callable
from typing import Any, Literal

from esegeta._registry import METHODS, METRICS, MetricSpec


def spec_of(metric: Callable[..., Any]) -> MetricSpec | None:
    """Return what a registered metric declares, ``functools.partial`` or not; None for a function of one's own.

    >>> from esegeta import metrics
    >>> spec_of(functools.partial(metrics.deletion, steps=4)).answer
    'curve'
    """
    metric = _bare(metric)
    return next((spec for spec in METRICS.values() if spec.fn is metric), None)


def _bare(fn: Any) -> Any:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def contributions(method: Callable[..., Any]) -> bool | None:
    """Return whether a registered method gives contributions, False for slopes; None if neither, or not registered.

    >>> import esegeta as eg
    >>> contributions(eg.gradient), contributions(functools.partial(eg.integrated_gradients, steps=4))
    (False, True)
    """
    method = _bare(method)
    return next((spec.contributions for spec in METHODS.values() if spec.fn is method), None)


def direction(metric: Callable[..., Any]) -> Literal["higher", "lower"] | None:
    """Return which way the numbers of a metric are better; None if neither is, or if it is not registered.

    >>> from esegeta import metrics
    >>> direction(metrics.deletion), direction(metrics.entropy)
    ('lower', None)
    """
    spec = spec_of(metric)
    return None if spec is None or spec.better == "" else spec.better
