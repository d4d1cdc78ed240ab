"""DeepLIFT with the RevealCancel rule."""

from jaxtyping import Float
from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine.gradient import gradient
from esegeta.rules.reveal_cancel import reveal_cancel


@method(
    refs=("baseline",),
    axioms=(
        "completeness sensitivity_a linearity sensitivity_n shift scale_of_output "
        "class_sensitivity translation_equivariance affine_equivariance"
    ),
    differentiable=False,
    family="rules",
    paper="Shrikumar, Greenside, Kundaje 2017, arXiv:1704.02685",
    also=("reveal_cancel", "deeplift_reveal_cancel"),
)
def deep_lift_reveal_cancel(score: Score) -> Explain:
    r"""Explain by DeepLIFT that carries what is positive and what is negative in a difference apart.

    .. math:: \Delta y^\pm = \tfrac12 [f(x' + \Delta^\pm) - f(x')]
              + \tfrac12 [f(x' + \Delta^+ + \Delta^-) - f(x' + \Delta^\mp)], \qquad
              \sum_i a_i = F(x) - F(x')

    So it sees two inputs that cancel each other, where Rescale finds that nothing happened. With one input on
    each side of a unit these are Shapley values, and the minimum or maximum of two inputs, made of ReLUs, is
    shared out as such; with more on a side they share its effect in proportion. ``rules.reveal_cancel`` says what
    becomes of each operation, and which of them take the whole difference as ``deep_lift`` does. The sum is exact
    up to rounding.

    Args:
        score: ``(C,*S) -> ()`` made of torch operations. Freeze the mask of a reducer (``at=x``).

    Returns:
        ``explain(x, baseline) -> like x``, signed, with the sum F(x) - F(baseline).

    Example:
        >>> import torch
        >>> explain = deep_lift_reveal_cancel(lambda x: torch.relu(x @ torch.tensor([1., -1.])).sum())
        >>> explain(torch.tensor([[5., 2.]]), torch.zeros(1, 2)).tolist()
        [[4.0, -1.0]]

    Reference:
        Shrikumar, Greenside, Kundaje 2017, section 3.5.3, arXiv:1704.02685.
    """

    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        return (x - baseline) * gradient(reveal_cancel(score, baseline))(x)

    return explain
