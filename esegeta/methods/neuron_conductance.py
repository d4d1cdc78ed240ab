"""Neuron conductance."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import check, levels, stream
from esegeta.placing import Names, activation_and_gradient, at_each, tap
from esegeta.quadrature import nodes_and_weights


@method(
    place=True,
    shape="input",
    refs=("baseline",),
    axioms=(
        "dummy linearity implementation_invariance shift scale_of_output continuity "
        "translation_equivariance affine_equivariance monotonicity"
    ),
    example={"neuron": 0, "steps": 64},
    family="layers",
    cost=lambda steps: Cost(gradients=steps),
    paper="Dhamdhere, Sundararajan, Yan 2019, arXiv:1805.12233",
)
def neuron_conductance(
    score: Score,
    place: Names,
    *,
    neuron: int | Tensor | tuple[int | Tensor, ...] = (),
    steps: int = 32,
    rule: str = "gauss-legendre",
) -> Explain:
    r"""Explain by the part of integrated gradients that goes through chosen units of a layer.

    .. math:: a_i(x, x') = (x_i - x'_i) \int_0^1 \sum_{u \in N} \frac{\partial F}{\partial A_u}
              \frac{\partial A_u}{\partial x_i} \, dt

    Added up over all units of a cut it is integrated gradients. For what makes a unit itself active, whatever
    comes of it, explain a reducer of ``tap(score, place)``.

    Args:
        score: ``(C,*S) -> ()``.
        place: the layer; several for several explanations.
        neuron: which units: a channel, or an index such as ``(channel, i, j)``; all of them by default. Numbers are
            tensors where examples differ.
        steps: number of gradients.
        rule: ``gauss-legendre``, ``midpoint``, ``trapezoid``, ``left`` or ``right``.

    Returns:
        ``explain(x, baseline) -> like x``, signed; a tuple for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(x * torch.tensor([[1.], [2.]]), "layer") ** 2).sum()
        >>> explain = neuron_conductance(score, "layer", neuron=1, steps=2)
        >>> [round(v, 4) for v in explain(torch.tensor([[1., 3.]]), torch.zeros(1, 2)).flatten().tolist()]
        [4.0, 36.0]

    Reference:
        Dhamdhere, Sundararajan, Yan 2019, equation 2, arXiv:1805.12233.
    """
    t, w = nodes_and_weights(rule, steps)
    index = _index(neuron)

    def explaining(place: str) -> Explain:
        both, activation = activation_and_gradient(score, place), tap(score, place)

        def through(z: Tensor) -> Tensor:
            a, g = both(z)
            if len(index) > a.ndim or any(_outside(i, n) for i, n in zip(index, a.shape, strict=False)):
                raise check.refused(
                    "neuron_conductance",
                    f"a neuron within {tuple(a.shape)}",
                    f"({', '.join(map(check.values, index))})",
                    "Count channels from 0",
                )
            chosen = torch.ones(a.shape, dtype=torch.bool, device=a.device)
            for axis, i in enumerate(index):
                here = torch.arange(a.shape[axis], device=a.device) == i % a.shape[axis]
                chosen = chosen & here.reshape(-1, *[1] * (a.ndim - axis - 1))
            return vjp(activation, z)[1](torch.where(chosen, g, 0))[0]

        def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
            line = x - baseline
            average = stream.integral(
                lambda t: through(baseline + t * line),
                x.new_tensor(t),
                x.new_tensor(w),
                label="neuron_conductance",
            )
            return line * average

        return explain

    return at_each("neuron_conductance", explaining, place)


def _index(neuron: object) -> tuple[int | Tensor, ...]:
    given = tuple(neuron) if isinstance(neuron, (tuple, list)) else (neuron,)
    for i in given:
        whole = isinstance(i, int) and not isinstance(i, bool)
        if isinstance(i, Tensor):
            whole = i.ndim == 0 and not (i.is_floating_point() or i.is_complex() or i.dtype == torch.bool)
        if not whole:
            expected, advice = "neuron: a channel or an index", "Pass for example 3 or (3, 10, 12)"
            raise check.refused_type("neuron_conductance", expected, check.describe(neuron), advice)
    return given


def _outside(i: int | Tensor, n: int) -> bool:
    wrong = torch.as_tensor((i < -n) | (i >= n))
    return levels.true_anywhere(wrong)
