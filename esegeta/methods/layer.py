"""What a layer says and how the score hangs on it: activation, gradient, their product."""

from typing import Any

from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.placing import Names, local, tap


@method(
    place=True,
    needs="activation",
    axioms=(
        "sensitivity_a symmetry implementation_invariance continuity translation_equivariance "
        "affine_equivariance monotonicity"
    ),
    family="layers",
    paper="Zeiler, Fergus 2014, arXiv:1311.2901",
)
def layer_activation(score: Score, place: Names) -> Explain:
    r"""Explain by the activation of a layer: :math:`a(x) = A(x)`.

    Args:
        score: a score or a model; it runs only as far as the layer.
        place: one place, or several; then the answer is a tuple.

    Returns:
        ``explain(x) -> like the activation``.

    Example:
        >>> import torch, esegeta as eg
        >>> layer_activation(lambda x: eg.mark(2 * x, "layer").sum(), "layer")(torch.ones(1, 2)).tolist()
        [[2.0, 2.0]]

    Reference:
        Zeiler, Fergus 2014, arXiv:1311.2901.
    """
    look = tap(score, place)

    def explain(x: Tensor) -> Any:
        return look(x)

    return explain


@method(
    place=True,
    axioms=(
        "dummy linearity symmetry implementation_invariance shift scale_of_output "
        "translation_equivariance affine_equivariance parameter_dependence"
    ),
    family="layers",
    paper="Simonyan, Vedaldi, Zisserman 2014, arXiv:1312.6034",
    also=("layer_vanilla_backpropagation", "layer_visualisation"),
)
def layer_gradient(score: Score, place: Names) -> Explain:
    r"""Explain by how the score changes with each unit of a layer: :math:`a(x) = \partial F / \partial A`.

    With all places at once (``all_places(score, x)``) it is vanilla backpropagation to every layer, in one backward
    run.

    Args:
        score: ``(C,*S) -> ()``.
        place: one place, or several; then the answer is a tuple.

    Returns:
        ``explain(x) -> like the activation``, signed.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "layer") ** 2).sum()
        >>> layer_gradient(score, "layer")(torch.tensor([[1., 3.]])).tolist()
        [[4.0, 12.0]]

    Reference:
        Simonyan, Vedaldi, Zisserman 2014, arXiv:1312.6034.
    """
    return local(score, place, lambda _, g: g)


@method(
    place=True,
    axioms=(
        "dummy linearity symmetry implementation_invariance scale_of_output translation_equivariance "
        "affine_equivariance monotonicity"
    ),
    family="layers",
    paper="Shrikumar et al. 2016, arXiv:1605.01713",
    also=("layer_grad_x_activation", "layer_gradient_times_activation"),
)
def layer_gradient_x_activation(score: Score, place: Names) -> Explain:
    r"""Explain by first-order Taylor terms in the units of a layer: :math:`a(x) = A \odot \partial F / \partial A`.

    Args:
        score: ``(C,*S) -> ()``.
        place: one place, or several; then the answer is a tuple.

    Returns:
        ``explain(x) -> like the activation``, signed.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "layer") ** 2).sum()
        >>> layer_gradient_x_activation(score, "layer")(torch.tensor([[1., 3.]])).tolist()
        [[8.0, 72.0]]

    Reference:
        Shrikumar et al. 2016, section 2, arXiv:1605.01713.
    """
    return local(score, place, lambda a, g: a * g)
