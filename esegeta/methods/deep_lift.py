"""DeepLIFT with the Rescale rule."""

from jaxtyping import Float
from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine.gradient import gradient
from esegeta.rules.deeplift import deeplift


@method(
    refs=("baseline",),
    axioms=(
        "completeness sensitivity_a linearity sensitivity_n shift scale_of_output "
        "class_sensitivity translation_equivariance affine_equivariance"
    ),
    differentiable=False,
    family="rules",
    paper="Shrikumar, Greenside, Kundaje 2017, arXiv:1704.02685",
    also=("deeplift", "rescale"),
)
def deep_lift(score: Score) -> Explain:
    r"""Explain by differences from a baseline, carried from operation to operation by secants instead of slopes.

    .. math:: a_i(x, x') = m_i(x, x') \, (x_i - x'_i), \qquad \sum_i a_i = F(x) - F(x')

    The multipliers m are those of ``rules.deeplift``: exact for every operation that has a rule, whatever the
    baseline, so that the sum is right up to rounding with one run each of x and of the baseline, and one
    backwards. An operation without a rule is refused. Unlike path integrals it depends on how the network is
    written down.

    Args:
        score: ``(C,*S) -> ()`` made of torch operations. Freeze the mask of a reducer (``at=x``).

    Returns:
        ``explain(x, baseline) -> like x``, signed, with the sum F(x) - F(baseline).

    Example:
        >>> import torch
        >>> explain = deep_lift(lambda x: torch.relu(x.sum()))
        >>> explain(torch.tensor([[3., 1.]]), torch.tensor([[-1., -3.]])).tolist()
        [[2.0, 2.0]]

    Reference:
        Shrikumar, Greenside, Kundaje 2017, section 3.5.2, arXiv:1704.02685.
    """

    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        return (x - baseline) * gradient(deeplift(score, baseline))(x)

    return explain
