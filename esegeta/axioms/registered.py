"""The axioms that methods can claim, by the names of their residuals."""

from collections.abc import Callable
from typing import Any, TypeVar

from esegeta.engine import check

Residual = TypeVar("Residual", bound=Callable[..., Callable[..., Any]])

AXIOMS: dict[str, Callable[..., Any]] = {}


def axiom(residual: Residual) -> Residual:
    """Register a residual: methods can claim its name, and a law of that name says where it is tried.

    >>> from esegeta import axioms
    >>> axioms.AXIOMS["dummy"] is axioms.dummy
    True
    """
    name = residual.__name__
    if name in AXIOMS:
        got = f"{name!r}, already defined in {AXIOMS[name].__module__}"
        raise check.refused("axiom", "a new name", got, "Rename the function")
    AXIOMS[name] = residual
    return residual
