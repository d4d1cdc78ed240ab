"""How certain a Monte Carlo answer is: its standard error, for whoever asks."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from esegeta._facts import explanation, facts_of
from esegeta.engine import check, gradient

# The answers given while somebody asks for errors; None while nobody does.
_asked: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("esegeta_estimates", default=None)


def answered(value: Tensor, error: Tensor) -> Tensor:
    """Give a value back, and its standard error to ``with_standard_error`` if that asks for it."""
    asked = _asked.get()
    if asked is not None:
        asked.append((value, error))
    return value


def with_standard_error(explain: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    r"""Return the explanation of a Monte Carlo method with the standard error of each of its values.

    .. math:: e_i = \sqrt{\tfrac{1}{n (n-1)} \sum_{t=1}^n (a_i^{(t)} - a_i)^2}

    In about two thirds of all runs with other keys, a value is nearer than that to what it would be with
    infinitely many samples.

    Args:
        explain: of a method that draws independent samples, such as ``shapley_sampling(score)``.

    Returns:
        ``(x, *refs, key=) -> (like x, like x)``: the explanation and its error.

    Example:
        >>> import torch, esegeta as eg
        >>> explain = eg.shapley_sampling(lambda x: x.sum(), samples=4)
        >>> a, error = with_standard_error(explain)(torch.ones(1, 2), torch.zeros(1, 2), key=0)
        >>> a.tolist(), error.tolist()
        ([[1.0, 1.0]], [[0.0, 0.0]])
    """

    facts = facts_of(check.explanation("with_standard_error", explain))

    def both(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _asking(explain, *args, **kwargs)

    if facts.refs is None:
        return both
    name = f"with_standard_error({gradient.name_of(explain)})"
    return explanation(both, name, facts.refs, key=facts.key, doc=explain.__doc__)


def value_and_error(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
    """Return an answer and its standard error, None where the function does not estimate by sampling.

    >>> value_and_error(lambda x: 2 * x, 3)
    (6, None)
    """
    token = _asked.set([])
    try:
        value = function(*args, **kwargs)
        found = _asked.get()
    finally:
        _asked.reset(token)
    mine = [error for answer, error in found or () if answer is value]
    return value, mine[-1] if mine else None


def _asking(explain: Callable[..., Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    value, error = value_and_error(explain, *args, **kwargs)
    if error is None:
        raise check.refused_type(
            "with_standard_error",
            "the explanation of a method that estimates by sampling",
            f"{gradient.name_of(explain)}, which gives no error",
            "Ask the method itself, inside of transforms: they change what the error means",
        )
    return value, error
