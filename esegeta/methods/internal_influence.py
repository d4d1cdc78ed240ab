"""Internal influence."""

from typing import Any

from torch import Tensor

from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import stream
from esegeta.placing import Names, activation_and_gradient
from esegeta.quadrature import nodes_and_weights


@method(
    place=True,
    refs=("baseline",),
    axioms=(
        "sensitivity_a dummy linearity symmetry implementation_invariance shift scale_of_output "
        "continuity class_sensitivity translation_equivariance affine_equivariance"
    ),
    example={"steps": 16},
    family="layers",
    cost=lambda steps: Cost(gradients=steps),
    paper="Leino et al. 2018, arXiv:1802.03788",
)
def internal_influence(
    score: Score, place: Names, *, steps: int = 32, rule: str = "gauss-legendre"
) -> Explain:
    r"""Explain by the gradient for the activations of a layer, averaged on the way from a baseline to the input.

    .. math:: a_u(x, x') = \int_0^1 \frac{\partial F}{\partial A_u}(x' + t (x - x')) \, dt

    How sensitive the score is to a unit over a range of inputs, not how much the unit contributes: for that
    there is ``conductance``.

    Args:
        score: ``(C,*S) -> ()``.
        place: one place, or several; then the answer is a tuple.
        steps: number of gradients.
        rule: ``gauss-legendre``, ``midpoint``, ``trapezoid``, ``left`` or ``right``.

    Returns:
        ``explain(x, baseline) -> like the activation``, signed.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "layer") ** 2).sum()
        >>> explain = internal_influence(score, "layer", steps=2)
        >>> [round(v, 4) for v in explain(torch.tensor([[1., 3.]]), torch.zeros(1, 2)).flatten().tolist()]
        [2.0, 6.0]

    Reference:
        Leino et al. 2018, definition 1 with the uniform distribution on the line, arXiv:1802.03788.
    """
    both = activation_and_gradient(score, place)
    t, w = nodes_and_weights(rule, steps)

    def explain(x: Tensor, baseline: Tensor) -> Any:
        line = x - baseline
        gradients = lambda t: both(baseline + t * line)[1]
        return stream.integral(gradients, x.new_tensor(t), x.new_tensor(w), label="internal_influence")

    return explain
