"""Maps of several layers as one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta import spatial
from esegeta._facts import declare, explanation, facts_of
from esegeta._registry import Cost, combination
from esegeta._types import Explain
from esegeta.engine import check
from esegeta.engine.gradient import name_of

_WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda maps: maps.mean(0),
    "product": lambda maps: maps.prod(0),
    "max": lambda maps: maps.amax(0),
}


@combination(
    family="layers",
    paper="pytorch-grad-cam",
    leads=1,
    cost=lambda explains: Cost(explanations=1 if callable(explains) else len(explains)),
)
def fuse(explains: Explain | Sequence[Explain], *, by: str = "mean") -> Explain:
    r"""Combine maps of several layers, brought to the grid of the image.

    .. math:: a = \mathrm{by}_l \; \mathrm{up}\!\left( \frac{[L_l]_+}{\max [L_l]_+} \right)

    Each map is made positive and divided by its maximum, so that no layer outweighs another; one that is positive
    nowhere stays zero. Early layers have detail and late layers meaning: the product is high where both agree.

    Args:
        explains: an explanation that returns a tuple of maps, such as a class activation map of several places,
            which takes one pass; or several explanations, called with the same arguments.
        by: ``mean``, ``product`` or ``max``.

    Returns:
        ``(x, *refs) -> (1,*S)``, between 0 and 1.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "fine").reshape(1, 2, 2).mean(2) * torch.tensor([[1., 3.]])).sum()
        >>> fuse(eg.hires_cam(score, ["fine", "mean"]), by="product")(torch.tensor([[1., 1., 1., 1.]])).tolist()
        [[0.1111111..., 0.1666666..., 0.833333..., 1.0]]

    Reference:
        The mean is that of pytorch-grad-cam over target layers, the product that of its RefineCAM.
    """
    several = [explains] if not isinstance(explains, Sequence) else explains
    if not several:
        raise check.refused_type("fuse", "an explanation or several", "none", "Pass grad_cam(...)")
    for one in several:
        check.explanation("fuse", one)
    combine = _WAYS[check.one_of("fuse", "by", by, tuple(_WAYS))]

    def on_image(a: Any, x: Tensor) -> Tensor:
        spatial.image("fuse", "every map", a)
        if len(a) != 1:
            got, advice = check.describe(a), "Reduce the channels first, for example with reduce_channels"
            raise check.refused("fuse", "maps (1,*U)", got, advice)
        high = a.amax()
        scaled = a.clamp(min=0) / torch.where(high > 0, high, 1.0)
        return spatial.upsample(scaled, like=x)

    def fused(x: Tensor, *refs: Tensor, **extra: int | Tensor) -> Tensor:
        check.image("fuse", "x", x)
        found = [explain(x, *refs, **extra) for explain in several]
        maps = [a for one in found for a in (one if isinstance(one, tuple) else (one,))]
        return combine(torch.stack([on_image(a, x) for a in maps]))

    facts = [facts_of(one) for one in several]
    key = any(f.key for f in facts)
    if facts[0].refs is None or any(f.refs != facts[0].refs for f in facts):
        return declare(fused, key=key)
    doc = "\n\n".join(str(one.__doc__) for one in several)
    return explanation(fused, f"fuse({', '.join(map(name_of, several))})", facts[0].refs, key=key, doc=doc)
