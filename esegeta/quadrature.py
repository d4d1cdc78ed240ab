"""Nodes and weights on [0, 1]."""

import numpy as np

from esegeta.engine import check

# The nodes of Gauss and Legendre are eigenvalues of a matrix with so many rows.
MOST_NODES = 4096
RULES = ("gauss-legendre", "midpoint", "trapezoid", "left", "right")


def nodes_and_weights(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a quadrature on [0, 1] with ``steps`` evaluations; the weights always sum to one.

    ``gauss-legendre`` is exact for polynomials of degree ``2 steps - 1``, ``midpoint`` and ``trapezoid`` for
    degree 1, ``left`` and ``right`` for constants.

    Example:
        >>> t, w = nodes_and_weights("trapezoid", 3)
        >>> t.tolist(), w.tolist()
        ([0.0, 0.5, 1.0], [0.25, 0.5, 0.25])
    """
    where = "quadrature"
    check.one_of(where, "rule", rule, RULES)
    n = check.positive_count(where, "steps", steps, least=2 if rule == "trapezoid" else 1)
    if rule == "gauss-legendre":
        if n > MOST_NODES:
            expected = f"at most {MOST_NODES} steps of {rule}"
            raise check.refused(where, expected, str(n), "Take fewer, or another rule")
        t, w = np.polynomial.legendre.leggauss(n)
        return (t + 1) / 2, w / 2
    if rule == "trapezoid":
        w = np.full(n, 1 / (n - 1))
        w[[0, -1]] /= 2
        return np.linspace(0, 1, n), w
    offset = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return (np.arange(n) + offset) / n, np.full(n, 1 / n)
