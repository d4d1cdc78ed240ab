"""Guided backpropagation and what is made of it."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import check
from esegeta.engine.gradient import gradient
from esegeta.methods.grad_cam import weighted
from esegeta.placing import Names, at_each, local, tap
from esegeta.rules.guided import deconvnet, guided, guided_where_possible
from esegeta.spatial import upsample


@method(
    axioms="symmetry shift scale_of_output translation_equivariance affine_equivariance",
    rewrites="activations",
    differentiable=False,
    family="rules",
    contributions=False,
    paper="Springenberg et al. 2015, arXiv:1412.6806",
    also=("guided_backpropagation", "gbp"),
)
def guided_backprop(score: Score) -> Explain:
    r"""Explain by the gradient, with activations that pass on only what is positive, where they are active.

    .. math:: R_{in} = [R_{out}]_+ \odot [a'(x)]_+ \odot 1[a(x) > 0]

    at every activation a, for a ReLU the published rule. Every activation is seen, in whatever spelling. Sharp
    pictures of what is in the image, hardly of what the network made of it: it changes little when upper
    layers are randomised.

    Args:
        score: ``(C,*S) -> ()``.

    Returns:
        ``explain(x) -> like x``, signed.

    Example:
        >>> import torch
        >>> score = lambda x: (torch.relu(x) * torch.tensor([[1., -1., 1.]])).sum()
        >>> guided_backprop(score)(torch.tensor([[2., 2., -2.]])).tolist()
        [[1.0, 0.0, 0.0]]

    Reference:
        Springenberg et al. 2015, section 3.4, arXiv:1412.6806.
    """
    slope = gradient(guided(score))

    def explain(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        return slope(x)

    return explain


@method(
    axioms="symmetry shift scale_of_output translation_equivariance affine_equivariance",
    rewrites="activations",
    differentiable=False,
    family="rules",
    contributions=False,
    paper="Zeiler, Fergus 2014, arXiv:1311.2901",
    also=("deconvnet_attribution",),
)
def deconvolution(score: Score) -> Explain:
    r"""Explain by the gradient, with activations that pass on whatever is positive: a deconvolutional network.

    .. math:: R_{in} = [R_{out}]_+

    at every activation; linear layers are transposed, max-pools take the recorded places.

    Args:
        score: ``(C,*S) -> ()``.

    Returns:
        ``explain(x) -> like x``, signed.

    Example:
        >>> import torch
        >>> score = lambda x: (torch.relu(x) * torch.tensor([[1., -1., 1.]])).sum()
        >>> deconvolution(score)(torch.tensor([[2., 2., -2.]])).tolist()
        [[1.0, 0.0, 1.0]]

    Reference:
        Zeiler, Fergus 2014, section 2.1, arXiv:1311.2901.
    """
    slope = gradient(deconvnet(score))

    def explain(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        return slope(x)

    return explain


@method(
    place=True,
    shape="input",
    axioms=("implementation_invariance", "translation_equivariance", "affine_equivariance", "monotonicity"),
    rewrites="activations",
    differentiable=False,
    needs="activation",
    example={"unit": 0},
    family="layers",
    paper="Springenberg et al. 2015, arXiv:1412.6806",
)
def layer_activation_guided_backprop(score: Score, place: Names, *, unit: int | None = None) -> Explain:
    r"""Explain by guided backpropagation of how active a filter is: :math:`F = \sum_u |A_{d,u}|`.

    Only activations between the input and the layer are guided. Below the first one there is none, and this is
    the plain gradient of F.

    Args:
        score: a score or a model; it runs only as far as the layer.
        place: the layer; several for several explanations, such as all of ``all_places(score, x)``.
        unit: which filter (channel) d; all of them by default.

    Returns:
        ``explain(x) -> like x``, signed; a tuple for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> net = lambda x: eg.mark(torch.relu(x), "layer").sum()
        >>> layer_activation_guided_backprop(net, "layer", unit=0)(torch.tensor([[3., -1.]])).tolist()
        [[1.0, 0.0]]

        All layers, one after the other:

        >>> x, deep = torch.tensor([[3., -1.]]), lambda x: torch.relu(3 * x).sum()
        >>> for place in eg.all_places(deep, x):
        ...     print(place, layer_activation_guided_backprop(deep, place)(x).tolist())
        mul [[3.0, -3.0]]
        relu [[3.0, 0.0]]

    Reference:
        Springenberg et al. 2015, section 4, arXiv:1412.6806.
    """
    where = "layer_activation_guided_backprop"
    if unit is not None:
        check.positive_count(where, "unit", unit, least=0)

    def explaining(place: str) -> Explain:
        look = tap(score, place)

        def active(x: Tensor) -> Tensor:
            a: Any = look(x)
            if unit is not None and (a.ndim == 0 or unit >= a.shape[0]):
                expected = f"a unit of the channels of {place!r}, whose shape is {tuple(a.shape)}"
                raise check.refused(where, expected, repr(unit), "Count from 0")
            return (a if unit is None else a[unit]).abs().sum()

        return gradient(guided_where_possible(active))

    return at_each(where, explaining, place)


@method(
    place=True,
    shape="input",
    axioms=("translation_equivariance", "affine_equivariance"),
    rewrites="activations",
    differentiable=False,
    family="class activation maps",
    paper="Selvaraju et al. 2017, arXiv:1610.02391",
    also=("guided_gradcam",),
)
def guided_grad_cam(score: Score, place: Names) -> Explain:
    r"""Explain by guided backpropagation where Grad-CAM is positive: :math:`GBP(x) \odot up([L(x)]_+)`.

    Args:
        score: ``(C,*S) -> ()``.
        place: a layer whose activation is ``(D,*U)``; several for several maps.

    Returns:
        ``explain(x) -> like x``, signed; a tuple for several places. Each map is brought to the image by
        ``upsample``.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(torch.relu(x), "layer")).sum()
        >>> guided_grad_cam(score, "layer")(torch.tensor([[3., 1.]])).tolist()
        [[3.0, 1.0]]

    Reference:
        Selvaraju et al. 2017, section 3.2, arXiv:1610.02391.
    """
    fine = gradient(guided(score))
    coarse = local(score, place, weighted)

    def explain(x: Float[Tensor, "*dims"]) -> Any:
        sharp, found = fine(x), coarse(x)
        shown = [
            sharp * upsample(m.clamp(min=0), like=x) for m in ([found] if isinstance(place, str) else found)
        ]
        return shown[0] if isinstance(place, str) else tuple(shown)

    return explain
