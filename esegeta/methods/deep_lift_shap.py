"""DeepLIFT, averaged over baselines."""

from jaxtyping import Float
from torch import Tensor

from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import stream
from esegeta.engine.gradient import gradient
from esegeta.rules.deeplift import deeplift


@method(
    refs=("baselines",),
    axioms=(
        "completeness linearity shift scale_of_output "
        "class_sensitivity translation_equivariance affine_equivariance"
    ),
    differentiable=False,
    family="rules",
    cost=lambda baselines: Cost(gradients=baselines),
    paper="Lundberg, Lee 2017, arXiv:1705.07874",
    also=("deepshap", "deep_shap"),
)
def deep_lift_shap(score: Score) -> Explain:
    r"""Explain by DeepLIFT from each of several baselines, averaged: an approximation of expected Shapley values.

    .. math:: a_i = \frac{1}{n} \sum_{k=1}^{n} m_i(x, x'_k) \, (x_i - x'_{k,i})

    Exact are the sum, F(x) minus the mean of F over the baselines, and the values of a linear score. Shapley
    values themselves it gives only where no operation mixes inputs non-linearly.

    Args:
        score: ``(C,*S) -> ()`` made of torch operations.

    Returns:
        ``explain(x, baselines) -> like x`` with ``baselines`` of shape ``(n,C,*S)``.

    Example:
        >>> import torch
        >>> explain = deep_lift_shap(lambda x: torch.relu(x).sum())
        >>> explain(torch.tensor([[3.]]), torch.tensor([[[1.]], [[-5.]]])).tolist()
        [[2.5]]

    Reference:
        Lundberg, Lee 2017, section 4.2, arXiv:1705.07874.
    """

    def explain(x: Float[Tensor, "*dims"], baselines: Float[Tensor, "n *dims"]) -> Float[Tensor, "*dims"]:
        def one(baseline: Tensor) -> Tensor:
            return (x - baseline) * gradient(deeplift(score, baseline))(x)

        return stream.mean(one, baselines, label="deep_lift_shap")

    return explain
