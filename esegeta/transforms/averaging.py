"""An explanation averaged over baselines."""

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import random
from esegeta._registry import Cost, takes_key, transform
from esegeta._types import Explain
from esegeta.engine import check, stream


@transform(
    refs=lambda inner: ("baselines",) if inner == ("baseline",) else None,
    preserves=(
        "completeness dummy linearity symmetry implementation_invariance shift scale_of_output "
        "continuity class_sensitivity translation_equivariance affine_equivariance"
    ),
    family="averages",
    cost=lambda baselines: Cost(explanations=baselines),
    paper="Sturmfels, Lundberg, Lee 2020, doi:10.23915/distill.00022",
)
def over_baselines(explain: Explain) -> Explain:
    r"""Average an explanation over a stack of baselines.

    .. math:: \frac1n \sum_k a(x, x'_k)

    Integrated gradients over black and white is
    ``over_baselines(ig)(x, torch.stack([baselines.black(x), baselines.white(x)]))``.

    Args:
        explain: ``(x, baseline) -> like x``.

    Returns:
        ``(x, baselines) -> like x`` with ``baselines`` of shape ``(n,C,*S)``; complete to the mean of the
        differences if ``explain`` is complete.

    Example:
        >>> import torch, esegeta as eg
        >>> ig = eg.integrated_gradients(lambda x: (2 * x).sum(), steps=1)
        >>> over_baselines(ig)(torch.tensor([[3.]]), torch.tensor([[[0.]], [[2.]]])).tolist()
        [[4.0]]

    Reference:
        Sturmfels, Lundberg, Lee 2020, doi:10.23915/distill.00022.
    """
    name = "over_baselines"

    def averaged(x: Float[Tensor, "*dims"], baselines: Float[Tensor, "n *dims"]) -> Tensor:
        check.stack_of(name, "baselines", baselines, check.floating(name, "x", x))
        return stream.mean(lambda baseline: explain(x, baseline), baselines, label=name)

    def keyed(x: Tensor, baselines: Tensor, *, key: int | Tensor | None = None) -> Tensor:
        check.stack_of(name, "baselines", baselines, check.floating(name, "x", x))
        known = check.key(name, key)
        nodes = (baselines, torch.arange(len(baselines), device=x.device))
        return stream.mean(lambda n: explain(x, n[0], key=random.fold_in(known, n[1])), nodes, label=name)

    return keyed if takes_key(explain) else averaged
