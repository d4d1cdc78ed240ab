"""Layer-wise relevance propagation."""

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import rules
from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.engine.gradient import gradient
from esegeta.rules.composites import Composite, composite_of

# Changes no value, yet can be divided by: relevance that does not depend on the input arrives at zeros too.
_ALMOST_ZERO = 1e-20


@method(
    axioms=(
        "dummy linearity sensitivity_n scale_of_output class_sensitivity translation_equivariance "
        "affine_equivariance"
    ),
    differentiable=False,
    family="rules",
    contributions=True,
    paper="Bach, Binder, Montavon, Klauschen, Mueller, Samek 2015, doi:10.1371/journal.pone.0130140",
    also=("layer_wise_relevance_propagation", "deep_taylor_decomposition"),
)
def lrp(score: Score, *, composite: Composite | str = "epsilon") -> Explain:
    r"""Explain by the score, shared out layer by layer among what each value was made of, down to the input.

    .. math:: R_j = \sum_k \frac{a_j \tilde w_{jk}}{\sum_{j'} a_{j'} \tilde w_{j'k} + \tilde b_k} R_k,
              \qquad R_{top} = F(x)

    The composite says which weights :math:`\tilde w` stand for w in which layer: ``rules.Composite``.
    ``rules.lrp`` says what becomes of all other operations. The sum is F(x) less what stayed with biases; with the
    composite "zero" it is input times gradient as long as all activations are ReLUs. ``rules.relevances`` shows
    the sums at places. Rules for the first layer start at the input that is explained: by ``at(lrp, place)``
    that is the layer after the place.

    Args:
        score: ``(C,*S) -> ()``. Logits: a softmax has no relevance.
        composite: a ``rules.Composite``, or zero, epsilon, epsilon_plus, epsilon_plus_flat,
            epsilon_alpha2_beta1, epsilon_alpha2_beta1_flat or deep_taylor.

    Returns:
        ``explain(x) -> like x``, signed.

    Example:
        >>> import torch
        >>> score = lambda x: torch.relu(torch.nn.functional.linear(x, torch.tensor([[2., -1.]]))).sum()
        >>> explain = lrp(score, composite="epsilon")
        >>> [round(v, 4) for v in explain(torch.tensor([[3., 1.]])).flatten().tolist()]
        [6.0, -1.0]

    Reference:
        Bach et al. 2015, doi:10.1371/journal.pone.0130140; Montavon et al. 2019, doi:10.1007/978-3-030-28954-6_10.
    """
    chosen = composite_of("lrp", composite)
    slope = gradient(rules.lrp(score, chosen))
    blind = chosen.first is not None or bool(chosen.until)

    def explain(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        z = torch.where(x == 0, _ALMOST_ZERO, x) if blind else x
        return z * slope(z)

    return explain
