"""Gradients expected over baselines: expected gradients and GradientSHAP."""

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import random
from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import check, stream
from esegeta.engine.gradient import gradient
from esegeta.noise import Noise, as_noise


@method(
    refs=("baselines",),
    key=True,
    axioms=(
        "dummy linearity symmetry implementation_invariance shift scale_of_output continuity "
        "class_sensitivity translation_equivariance affine_equivariance"
    ),
    example={"samples": 8},
    family="gradients and paths",
    cost=lambda samples: Cost(gradients=samples),
    paper="Erion, Janizek, Sturmfels, Lundberg, Lee 2021, arXiv:1906.10670",
    also=("expected_gradient",),
)
def expected_gradients(score: Score, *, samples: int = 64) -> Explain:
    r"""Explain by integrated gradients from a random baseline at a random place of its line, averaged.

    .. math:: a_i = E_{x' \sim B,\, t \sim U(0,1)} \left[ (x_i - x'_i)\, \partial_i F(x' + t (x - x')) \right]

    A Monte-Carlo mean over ``samples`` gradients. The places t are stratified (one in each of ``samples``
    equal parts) and every baseline is used equally often, up to one. In expectation the sum is
    F(x) minus the mean of F over the baselines.

    Args:
        score: ``(C,*S) -> ()``.
        samples: number of gradients.

    Returns:
        ``explain(x, baselines, key=) -> like x`` with ``baselines`` of shape ``(n,C,*S)``.

    Example:
        >>> import torch
        >>> explain = expected_gradients(lambda x: (2 * x).sum(), samples=4)
        >>> explain(torch.tensor([[3.]]), torch.tensor([[[0.]], [[2.]]]), key=0).tolist()
        [[4.0]]

    Reference:
        Erion, Janizek, Sturmfels, Lundberg, Lee 2021, equation 3, arXiv:1906.10670.
    """
    return _expected(score, "expected_gradients", samples, None)


@method(
    refs=("baselines",),
    key=True,
    axioms="dummy linearity implementation_invariance scale_of_output continuity class_sensitivity",
    example={"samples": 8, "noise": 0.1},
    family="gradients and paths",
    cost=lambda samples: Cost(gradients=samples),
    paper="Lundberg, Lee 2017, arXiv:1705.07874",
    also=("gradientshap", "gradient_shapley"),
)
def gradient_shap(score: Score, *, samples: int = 64, noise: float | int | Noise = 0.0) -> Explain:
    r"""Explain by expected gradients of noisy copies of the input.

    .. math:: a_i = E\left[ (x_i + \eta_i - x'_i)\, \partial_i F(x' + t (x + \eta - x')) \right]

    The noise is part of the difference, so that the sum is, in expectation, that of F(x + noise) minus F over
    the baselines. Without noise this is ``expected_gradients``.

    Args:
        score: ``(C,*S) -> ()``.
        samples: number of gradients.
        noise: standard deviation as a fraction of the range of x, or a noise of ``esegeta.noise``.

    Returns:
        ``explain(x, baselines, key=) -> like x`` with ``baselines`` of shape ``(n,C,*S)``.

    Example:
        >>> import torch
        >>> explain = gradient_shap(lambda x: (2 * x).sum(), samples=4)
        >>> explain(torch.tensor([[3.]]), torch.tensor([[[0.]], [[2.]]]), key=0).tolist()
        [[4.0]]

    Reference:
        Lundberg, Lee 2017, arXiv:1705.07874; the estimator is that of the authors' shap package.
    """
    return _expected(score, "gradient_shap", samples, as_noise(noise))


def _expected(score: Score, name: str, samples: int, noise: Noise | None) -> Explain:
    slope = gradient(score)
    n = check.positive_count(name, "samples", samples)

    def explain(
        x: Float[Tensor, "*dims"], baselines: Float[Tensor, "n *dims"], *, key: int | Tensor | None = None
    ) -> Float[Tensor, "*dims"]:
        known = check.key(name, key)
        order = random.permutation(random.fold_in(known, 0), n, device=x.device)
        offsets = random.uniform(random.fold_in(known, 1), (n,), dtype=x.dtype, device=x.device)
        places = (order.to(x) + offsets) / n

        def sample(node: tuple[Tensor, Tensor]) -> Tensor:
            i, t = node
            baseline = baselines.index_select(0, (i % len(baselines))[None])[0]
            noisy = x if noise is None else x + noise(x, random.fold_in(known, i + 2))
            line = noisy - baseline
            return line * slope(baseline + t * line)

        return stream.mean(sample, (torch.arange(n, device=x.device), places), label=name)

    return explain
