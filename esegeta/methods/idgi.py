"""Important direction gradient integration."""

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import check, stream
from esegeta.engine.gradient import value_and_gradient


@method(
    refs=("baseline",),
    axioms=(
        "completeness sensitivity_a dummy symmetry implementation_invariance shift scale_of_output "
        "continuity class_sensitivity translation_equivariance affine_equivariance"
    ),
    example={"steps": 16},
    family="gradients and paths",
    cost=lambda steps: Cost(gradients=steps),
    paper="Yang, Wang, Bilgic 2023, arXiv:2303.14242",
    also=("important_direction_gradient_integration", "ig_idgi"),
)
def idgi(score: Score, *, steps: int = 32) -> Explain:
    r"""Explain by each step's change of the score, shared in proportion to the squared gradient.

    .. math:: a_i = \sum_k \left( F(x_{k+1}) - F(x_k) \right) \frac{g_i(x_k)^2}{\|g(x_k)\|^2},
              \qquad x_k = x' + \tfrac{k}{n} (x - x')

    Complete by construction for any number of steps, except for steps that start where the gradient is
    exactly zero: nothing says whose their change is, and they are left out. Not linear in F.

    Args:
        score: ``(C,*S) -> ()``.
        steps: number of gradients.

    Returns:
        ``explain(x, baseline) -> like x``, signed.

    Example:
        >>> import torch
        >>> explain = idgi(lambda x: x[0, 0] + 2 * x[0, 1], steps=2)
        >>> explain(torch.tensor([[5., 5.]]), torch.zeros(1, 2)).tolist()
        [[3.0, 12.0]]

    Reference:
        Yang, Wang, Bilgic 2023, algorithm 1, arXiv:2303.14242.
    """
    both = value_and_gradient(score)
    n = check.positive_count("idgi", "steps", steps)

    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        line = x - baseline

        def at(t: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = both(baseline + t * line)
            square = slope.square()
            total = square.sum()
            return value, square / torch.where(total == 0, 1.0, total)

        # The change of a step is known once the next step starts: the last share of each chunk waits.
        def absorb(
            state: tuple[Tensor, Tensor, Tensor] | None, new: tuple[Tensor, Tensor], _: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            values, shares = new
            done = torch.tensordot(values[1:] - values[:-1], shares[:-1], 1)
            if state is not None:
                before, value, share = state
                done = before + (values[0] - value) * share + done
            return done, values[-1], shares[-1]

        times = torch.arange(n, device=x.device, dtype=x.dtype) / n
        state = stream.fold(at, times, absorb, None, label="idgi")
        assert state is not None
        done, value, share = state
        return done + (score(x) - value) * share

    return explain
