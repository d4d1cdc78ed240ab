"""Shapley-CAM."""

from torch import Tensor
from torch.func import vjp

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine import levels
from esegeta.engine.gradient import gradient, warn_flat
from esegeta.engine.second_order import second_order
from esegeta.engine.views import parse
from esegeta.placing import Names, at_each, grid, refuse_unused, split, vanishing


@method(
    place=True,
    shape="map",
    axioms=(
        "linearity symmetry implementation_invariance scale_of_output translation_equivariance "
        "affine_equivariance"
    ),
    family="class activation maps",
    paper="Cai 2025, arXiv:2501.06261",
    also=("shapleycam",),
)
def shapley_cam(score: Score, place: Names) -> Explain:
    r"""Explain by the channels of a layer, added up with their mean second-order contributions as weights.

    .. math:: L_u(x) = \sum_d \Big( \tfrac{1}{|U|} \sum_{u'} \big( G - \tfrac12 H A \big)_{d,u'} \Big) A_{d,u},
              \qquad G = \frac{\partial F}{\partial A}, \quad H = \frac{\partial^2 F}{\partial A^2}

    The bracket times A is what a second-order expansion around x gives to the elements of the layer when all of
    them go to zero: half of what each loses together with others. Everything beside the layer stays as it is at
    x. One Hessian-vector product, no Hessian. Equal to ``grad_cam`` where the score is piecewise linear in the
    layer, as behind ReLUs and max-pools without a softmax: that is warned of, and ``rules.softplus`` gives such a
    score its curvature back.

    Args:
        score: ``(C,*S) -> ()``; a probability rather than a logit, or there is no second order.
        place: a layer whose activation is ``(D,*U)``; several for several maps.

    Returns:
        ``explain(x) -> (1,*U)``, signed; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "layer") ** 2).sum()
        >>> shapley_cam(score, "layer")(torch.tensor([[1., 2.]])).tolist()
        [[6.0, 12.0]]

    Reference:
        Cai 2025, arXiv:2501.06261.
    """

    def explaining(place: str) -> Explain:
        watch = vanishing("shapley_cam", score, place)

        def explain(x: Tensor) -> Tensor:
            trunk, head = split(score, place, at=x)
            a = trunk(x)
            axes = grid(a)
            with second_order("shapley_cam"):
                # The Hessian is symmetric, so the pullback of the gradient is its product with a vector;
                # forward-mode rules are missing for many operations.
                g, pull = vjp(gradient(head), a)  # type: ignore[misc]
                (change,) = pull(a)
            if not levels.true_anywhere(g.detach() != 0):
                refuse_unused("shapley_cam", score, parse("shapley_cam", place), x)
            watch(x, g - change / 2)
            warn_flat("shapley_cam", score, g, change, "this is grad_cam")
            return ((g - change / 2).mean(axes, keepdim=True) * a).sum(0, keepdim=True)

        return explain

    return at_each("shapley_cam", explaining, place)
