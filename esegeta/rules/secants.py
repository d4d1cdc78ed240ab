r"""Secants :math:`(f(a) - f(b)) / (a - b)` in forms that lose nothing where values are large, or nearly the same.

The quotient itself is exact as it stands while the difference is large. Where it is small its digits are those of
rounding: in single precision the sigmoid of two values that are 1e-5 apart has two right digits. Here the difference
is taken out before anything is subtracted. Each tends to the derivative as a approaches b.
"""

from collections.abc import Callable
from math import log

import torch
from torch import Tensor

Secant = Callable[[Tensor, Tensor], Tensor]


def log_mean(a: Tensor, b: Tensor) -> Tensor:
    r"""Return the logarithm of the secant of exp, :math:`\log \frac{e^a - e^b}{a - b}`, without overflow.

    >>> log_mean(torch.tensor([2., 1000.]), torch.tensor([2., 1.])).tolist()[0]
    2.0
    """
    apart = torch.where(a == b, 0, a - b).abs()  # also of -inf and -inf
    some = torch.where(apart == 0, 1, apart)
    return torch.maximum(a, b) + torch.where(apart == 0, -apart / 2, (-torch.expm1(-some) / some).log())


def exp(a: Tensor, b: Tensor) -> Tensor:
    """Return the secant of the exponential: the logarithmic mean of both values.

    >>> [round(v, 4) for v in exp(torch.zeros(2), torch.tensor([0., 1.])).tolist()]
    [1.0, 1.7183]
    """
    return log_mean(a, b).exp()


def exp2(a: Tensor, b: Tensor) -> Tensor:
    """Return the secant of powers of two."""
    return log(2) * exp(log(2) * a, log(2) * b)


def sigmoid(a: Tensor, b: Tensor) -> Tensor:
    r"""Return the secant of the sigmoid: :math:`\sigma(a)\,\sigma(-b)\,(1 - e^{-(a - b)}) / (a - b)` for a > b.

    >>> sigmoid(torch.zeros(1), torch.zeros(1)).item()
    0.25
    """
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    return torch.sigmoid(high) * torch.sigmoid(-low) * _decay(high - low)


def tanh(a: Tensor, b: Tensor) -> Tensor:
    """Return the secant of the hyperbolic tangent, which is a sigmoid of twice the value."""
    return 4 * sigmoid(2 * a, 2 * b)


def _decay(apart: Tensor) -> Tensor:
    """``(1 - exp(-t)) / t``, and 1 at 0."""
    some = torch.where(apart == 0, 1, apart)
    return torch.where(apart == 0, 1, -torch.expm1(-some) / some)


def natural_log(a: Tensor, b: Tensor) -> Tensor:
    r"""Return the secant of the logarithm: :math:`\log(1 + t) / t` over the smaller value, t relative.

    >>> natural_log(torch.tensor([2.]), torch.tensor([2.])).item()
    0.5
    """
    low = torch.minimum(a, b)
    t = (a - b).abs() / low
    some = torch.where(t == 0, 1, t)
    return torch.where(t == 0, 1, torch.log1p(some) / some) / low


def log1p(a: Tensor, b: Tensor) -> Tensor:
    """Return the secant of the logarithm of one more."""
    low = torch.minimum(a, b)
    t = (a - b).abs() / (1 + low)
    some = torch.where(t == 0, 1, t)
    return torch.where(t == 0, 1, torch.log1p(some) / some) / (1 + low)


def sqrt(a: Tensor, b: Tensor) -> Tensor:
    """Return the secant of the square root: one over the sum of both.

    >>> sqrt(torch.tensor([9.]), torch.tensor([1.])).item()
    0.25
    """
    return 1 / (a.sqrt() + b.sqrt())


def rsqrt(a: Tensor, b: Tensor) -> Tensor:
    """Return the secant of one over the square root."""
    r, s = a.rsqrt(), b.rsqrt()
    return -r * s * (r * s / (r + s))


def reciprocal(a: Tensor, b: Tensor) -> Tensor:
    """Return the secant of one over the value."""
    return -(1 / a) * (1 / b)


def square(a: Tensor, b: Tensor) -> Tensor:
    """Return the secant of the square: the sum of both."""
    return a + b


def power(n: int) -> Secant:
    r"""Return the secant of a power: :math:`\sum_{k<n} a^k b^{n-1-k}`.

    >>> power(3)(torch.tensor([2.]), torch.tensor([1.])).item()
    7.0
    """

    def of(a: Tensor, b: Tensor) -> Tensor:
        total = torch.ones_like(a)
        last = torch.ones_like(a)
        for _ in range(n - 1):
            last = last * b
            total = total * a + last
        return total

    return of


SECANTS: dict[str, Secant] = {
    "exp": exp,
    "expm1": exp,
    "exp2": exp2,
    "sigmoid": sigmoid,
    "expit": sigmoid,
    "tanh": tanh,
    "log": natural_log,
    "log2": lambda a, b: natural_log(a, b) / log(2),
    "log10": lambda a, b: natural_log(a, b) / log(10),
    "log1p": log1p,
    "sqrt": sqrt,
    "rsqrt": rsqrt,
    "reciprocal": reciprocal,
    "square": square,
}
# Of more factors the rounding of each is the larger part.
_HIGHEST = 8
# Smooth within 1 of every value, so that the slope of a short way is its secant. What has a kink, also in its slope,
# or a pole is not here, nor is what begins with a cube.
SMOOTH = frozenset({"gelu", "silu", "mish", "softplus", "logsigmoid", "log_sigmoid"})
SMOOTH |= {"erf", "erfc", "sin", "cos", "atan", "asinh", "sinh", "cosh"}


def closed_form(name: str, exponent: object = None) -> Secant | None:
    """Return the secant of a function in a form of its own, if there is one; of a power with a fixed exponent."""
    if name not in ("pow", "float_power"):
        return SECANTS.get(name)
    if isinstance(exponent, (int, float)) and not isinstance(exponent, bool):
        if exponent in (0.5, -0.5, -1):
            return {0.5: sqrt, -0.5: rsqrt, -1: reciprocal}[exponent]
        if 1 <= exponent <= _HIGHEST and exponent == int(exponent):
            return power(int(exponent))
    return None


def chord(
    y: Tensor, y0: Tensor, a: Tensor, b: Tensor, slope: Callable[[Tensor], Tensor], *, smooth: bool
) -> Tensor:
    """Return the quotient of the differences, or the slope in the middle where rounding is all of it.

    >>> chord(torch.ones(1), torch.zeros(1), torch.ones(1), -torch.ones(1), torch.exp, smooth=True).item()
    0.5
    """
    small = near(a, b) if smooth else a == b
    middle = slope((a + b) / 2)
    middle = torch.where(middle.isfinite(), middle, 0)  # at the ends of roots and logarithms
    return torch.where(small, middle, (y - y0) / torch.where(small, 1, a - b))


def near(a: Tensor, b: Tensor) -> Tensor:
    """Return where the slope in the middle is closer to the secant of a smooth function than the quotient is.

    The slope errs by the square of the difference, the quotient by the rounding of the values over the difference.
    Both are small where that is the third root of the precision: a thousandth in single precision.

    >>> near(torch.tensor([1., 1., 1e5]), torch.tensor([1.0005, 1.01, 1e5 + 0.03])).tolist()
    [True, False, False]
    """
    return (a - b).abs() <= torch.finfo(a.dtype).eps ** (1 / 3) / 5
