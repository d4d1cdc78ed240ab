"""The gradient and its size."""

from jaxtyping import Float
from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import gradient as primitive


@method(
    axioms=(
        "dummy linearity symmetry implementation_invariance shift scale_of_output "
        "translation_equivariance affine_equivariance parameter_dependence"
    ),
    family="gradients and paths",
    contributions=False,
    paper="Simonyan, Vedaldi, Zisserman 2014, arXiv:1312.6034",
    also=("vanilla_gradient", "vanilla_backpropagation", "sensitivity_map"),
)
def gradient(score: Score) -> Explain:
    r"""Explain by how the score changes with each element of the input.

    .. math:: a(x) = \nabla F(x)

    Exact. It is a slope, not a share: where the score is saturated it is zero although the input matters.

    Args:
        score: ``(C,*S) -> ()``.

    Returns:
        ``explain(x) -> like x``, signed.

    Example:
        >>> import torch
        >>> gradient(lambda x: (x ** 2).sum())(torch.tensor([[1., 3.]])).tolist()
        [[2.0, 6.0]]

    Reference:
        Simonyan, Vedaldi, Zisserman 2014, arXiv:1312.6034.
    """
    slope = primitive.gradient(score)

    def explain(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        return slope(x)

    return explain


@method(
    axioms=(
        "dummy symmetry implementation_invariance shift scale_of_output translation_equivariance "
        "affine_equivariance"
    ),
    family="gradients and paths",
    contributions=False,
    paper="Simonyan, Vedaldi, Zisserman 2014, arXiv:1312.6034",
    also=("saliency_map", "absolute_gradient"),
)
def saliency(score: Score) -> Explain:
    r"""Explain by the size of the gradient, whatever its sign.

    .. math:: a(x) = |\nabla F(x)|

    Args:
        score: ``(C,*S) -> ()``.

    Returns:
        ``explain(x) -> like x``, not negative. One map for all channels:
        ``reduce_channels(saliency(score), by="max_abs")``.

    Example:
        >>> import torch
        >>> saliency(lambda x: (x ** 2).sum())(torch.tensor([[-1., 3.]])).tolist()
        [[2.0, 6.0]]

    Reference:
        Simonyan, Vedaldi, Zisserman 2014, section 3, arXiv:1312.6034.
    """
    slope = primitive.gradient(score)

    def explain(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        return slope(x).abs()

    return explain
