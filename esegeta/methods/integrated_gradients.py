"""Integrated gradients at fixed nodes."""

from jaxtyping import Float
from torch import Tensor

from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import stream
from esegeta.engine.gradient import gradient
from esegeta.quadrature import nodes_and_weights


@method(
    refs=("baseline",),
    axioms=(
        "completeness sensitivity_a dummy linearity symmetry implementation_invariance sensitivity_n "
        "shift scale_of_output continuity class_sensitivity translation_equivariance "
        "affine_equivariance monotonicity"
    ),
    example={"steps": 64},
    family="gradients and paths",
    cost=lambda steps: Cost(gradients=steps),
    paper="Sundararajan, Taly, Yan 2017, arXiv:1703.01365",
    also=("ig", "path_integrated_gradients"),
)
def integrated_gradients(score: Score, *, steps: int = 32, rule: str = "gauss-legendre") -> Explain:
    r"""Explain by the gradient, averaged on the straight line from a baseline to the input.

    .. math:: a_i(x, x') = (x_i - x'_i) \int_0^1 \partial_i F(x' + t (x - x')) \, dt

    The integral is a quadrature with ``steps`` gradients. Gauss-Legendre is exact if F is a polynomial of
    degree at most ``2 steps`` on the line. On a network the remainder is what
    ``axioms.completeness(explain, score)(x, baseline)`` returns.

    Args:
        score: ``(C,*S) -> ()``. Freeze the mask of a reducer (``at=x``): a mask that changes on the way makes
            the score jump, and no path integral adds jumps up.
        steps: number of gradients.
        rule: ``gauss-legendre``, ``midpoint``, ``trapezoid``, ``left`` or ``right``.

    Returns:
        ``explain(x, baseline) -> like x``, signed, with the sum F(x) - F(baseline) up to the quadrature.

    Example:
        >>> import torch
        >>> explain = integrated_gradients(lambda x: (x ** 3).sum(), steps=2)
        >>> [round(v, 5) for v in explain(torch.tensor([[1., 2.]]), torch.zeros(1, 2)).flatten().tolist()]
        [1.0, 8.0]

    Reference:
        Sundararajan, Taly, Yan 2017, equation 1, arXiv:1703.01365.
    """
    slope = gradient(score)
    t, w = nodes_and_weights(rule, steps)

    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        line = x - baseline
        average = stream.integral(
            lambda t: slope(baseline + t * line),
            x.new_tensor(t),
            x.new_tensor(w),
            label="integrated_gradients",
        )
        return line * average

    return explain
