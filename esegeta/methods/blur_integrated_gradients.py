"""Integrated gradients along a path of blur."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp

from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import check, stream
from esegeta.engine.gradient import gradient
from esegeta.quadrature import nodes_and_weights
from esegeta.spatial import Spacing, blur


@method(
    axioms="dummy linearity implementation_invariance scale_of_output affine_equivariance",
    example={"steps": 64, "sigma": 3.0},
    family="gradients and paths",
    cost=lambda steps: Cost(gradients=steps),
    contributions=True,
    paper="Xu, Venugopalan, Sundararajan 2020, arXiv:2004.03383",
    also=("blur_ig",),
)
def blur_integrated_gradients(
    score: Score,
    *,
    sigma: float | int = 20.0,
    steps: int = 32,
    spacing: Spacing | None = None,
    rule: str = "gauss-legendre",
) -> Explain:
    r"""Explain by the gradient, integrated while the image comes into focus.

    .. math:: a_i = -\int_0^{\sigma_{max}} \partial_i F(x_\sigma)\, \frac{\partial x_{\sigma,i}}{\partial \sigma}
              \, d\sigma, \qquad x_\sigma = \text{blur}(x, \sigma)

    The derivative of the path is exact (forward mode through the blur); the integral is a quadrature. The sum
    is F(x) - F(blur(x, sigma)) up to the quadrature: the baseline is the same image without its details.

    Args:
        score: ``(C,*S) -> ()``.
        sigma: the largest standard deviation, in mm if ``spacing`` is given, else in voxels.
        steps: number of gradients.
        spacing: mm per voxel, one per spatial axis.
        rule: as in ``integrated_gradients``.

    Returns:
        ``explain(x) -> like x``, signed.

    Example:
        A linear score: the weights times what the blur took away.

        >>> import torch
        >>> w, x = torch.tensor([[1., 2., 3., 4.]]), torch.tensor([[0., 8., 0., 0.]])
        >>> a = blur_integrated_gradients(lambda x: (w * x).sum(), sigma=1.0, steps=16)(x)
        >>> torch.allclose(a, w * (x - blur(x, 1.0)), atol=1e-4)
        True

    Reference:
        Xu, Venugopalan, Sundararajan 2020, equation 3, arXiv:2004.03383.
    """
    name = "blur_integrated_gradients"
    slope = gradient(score)
    most = check.non_negative(name, "sigma", sigma)
    t, w = nodes_and_weights(rule, steps)

    def explain(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        def at(s: Tensor) -> Tensor:
            image, change = jvp(lambda s: blur(x, s, spacing), (s,), (torch.ones_like(s),))  # type: ignore[misc]
            return slope(image) * change

        return -stream.integral(at, x.new_tensor(t * most), x.new_tensor(w * most), label=name)

    return explain
