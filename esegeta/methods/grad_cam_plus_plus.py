"""Grad-CAM++."""

import torch
from torch import Tensor

from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.placing import Names, grid, local


@method(
    place=True,
    shape="map",
    axioms=("symmetry", "implementation_invariance", "translation_equivariance", "affine_equivariance"),
    family="class activation maps",
    paper="Chattopadhyay, Sarkar, Howlader, Balasubramanian 2018, arXiv:1710.11063",
    also=("gradcam_plus_plus", "gradcampp", "gradcam++"),
)
def grad_cam_plus_plus(score: Score, place: Names) -> Explain:
    r"""Explain by the channels of a layer, added up with weighted sums of their positive gradients.

    .. math:: L_u(x) = \sum_d \Big( \sum_{u'} \alpha_{d,u'} [G_{d,u'}]_+ \Big) A_{d,u}, \qquad
              \alpha_{d,u} = \frac{G_{d,u}^2}{2 G_{d,u}^2 + G_{d,u}^3 \sum_{u'} A_{d,u'}}

    with :math:`G = \partial F / \partial A` and :math:`\alpha = 0` where the denominator is zero. The cube is that
    of one voxel and the sum that of the whole channel, as published. The second and third derivatives of the
    paper are those of :math:`e^F` on a piecewise linear network; its factor :math:`e^F`, common to all weights, is
    left out, because it overflows for sums of logits. Meant for activations that are not negative: only there is
    the denominator positive.

    Args:
        score: ``(C,*S) -> ()``.
        place: a layer whose activation is ``(D,*U)``; several for several maps from one pass.

    Returns:
        ``explain(x) -> (1,*U)``, signed; a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(1 * x, "layer") * torch.tensor([[1., -3.]])).sum()
        >>> grad_cam_plus_plus(score, "layer")(torch.tensor([[1., 5.]])).tolist()
        [[0.125, 0.625]]

    Reference:
        Chattopadhyay, Sarkar, Howlader, Balasubramanian 2018, without the ReLU,
        arXiv:1710.11063.
    """

    def weighted(a: Tensor, g: Tensor) -> Tensor:
        axes = grid(a)
        # Divided by the square, which under- and overflows in single precision where the ratio does not.
        below = 2 + g * a.sum(axes, keepdim=True)
        never = below == 0
        share = torch.where(never, 0.0, g.clamp(min=0) / torch.where(never, 1.0, below))
        return (share.sum(axes, keepdim=True) * a).sum(0, keepdim=True)

    return local(score, place, weighted)
