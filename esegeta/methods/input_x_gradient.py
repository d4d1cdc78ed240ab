"""Input times gradient."""

from jaxtyping import Float
from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine.gradient import gradient


@method(
    axioms=(
        "dummy linearity symmetry implementation_invariance scale_of_output translation_equivariance "
        "affine_equivariance monotonicity"
    ),
    family="gradients and paths",
    contributions=True,
    paper="Shrikumar, Greenside, Shcherbina, Kundaje 2016, arXiv:1605.01713",
    also=("gradient_times_image", "gradient_times_input", "grad_times_image", "input_times_gradient"),
)
def input_x_gradient(score: Score) -> Explain:
    r"""Explain by first-order Taylor terms from zero; the same formula is also called gradient times image.

    .. math:: a(x) = x \odot \nabla F(x)

    The sum equals :math:`F(x)` exactly where F is positively homogeneous, as a ReLU network without biases is.
    A voxel whose value is zero is never important, so the result depends on where zero lies.

    Args:
        score: ``(C,*S) -> ()``.

    Returns:
        ``explain(x) -> like x``, signed.

    Example:
        >>> import torch
        >>> input_x_gradient(lambda x: (x ** 2).sum())(torch.tensor([[1., 3.]])).tolist()
        [[2.0, 18.0]]

    Reference:
        Shrikumar, Greenside, Shcherbina, Kundaje 2016, arXiv:1605.01713.
    """
    slope = gradient(score)

    def explain(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        return x * slope(x)

    return explain
