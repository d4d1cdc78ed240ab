"""What the score loses if the values of a part are those of others: of other samples, or of the part itself."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from esegeta import coalitions, random
from esegeta._registry import method
from esegeta._types import Explain, Score
from esegeta.baselines import shuffled
from esegeta.engine import check, stream
from esegeta.engine.estimates import answered
from esegeta.features import FeatureMap, Features, elements, grid


@method(
    refs=("baselines",),
    axioms=(
        "dummy linearity symmetry implementation_invariance shift scale_of_output continuity "
        "class_sensitivity translation_equivariance affine_equivariance"
    ),
    needs="values",
    family="parts",
    paper="Breiman 2001, doi:10.1023/A:1010933404324",
    also=("permutation_importance", "permute_between_samples"),
)
def feature_permutation(score: Score, *, features: Features | None = None) -> Explain:
    r"""Explain by what the score loses if a part is taken from another sample, averaged over the samples.

    .. math:: a_j = F(x) - \frac1n \sum_{k=1}^n F(x \text{ with part } j \text{ of } x^{(k)})

    Exact for the samples that are given: instead of drawing one permutation of a batch, x meets every sample. It is
    ``over_baselines(feature_ablation(score))``, and as there what two parts do together is credited to both. Parts of
    different samples have to lie at the same place: volumes have to be registered to each other.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        features: which parts, by ``esegeta.features``; by default every element, for small images.

    Returns:
        ``explain(x, baselines) -> like x``, with other samples ``(n,C,*S)``; ``with_standard_error`` gives the
        error that comes from having no more of them.

    Example:
        >>> import torch
        >>> explain = feature_permutation(lambda x: x[0, 0] * x[0, 1])
        >>> explain(torch.tensor([[2., 3.]]), torch.tensor([[[0., 0.]], [[4., 1.]]])).tolist()
        [[0.0, 5.0]]

    Reference:
        Breiman 2001, section 10, doi:10.1023/A:1010933404324; Fisher, Rudin, Dominici 2019, arXiv:1801.01489.
    """
    label = "feature_permutation"
    chosen = elements() if features is None else features

    def explain(x: Float[Tensor, "*dims"], baselines: Float[Tensor, "n *dims"]) -> Float[Tensor, "*dims"]:
        parts = coalitions.parts(label, chosen, x, runs=lambda d: len(baselines) * (d + 1))
        run = lambda sample: coalitions.drops(score, x, sample, parts, label=label)
        return _averaged(run, baselines, parts, x, label)

    return explain


@method(
    key=True,
    axioms=("linearity", "implementation_invariance", "scale_of_output", "continuity"),
    needs="values",
    example={"features": grid(2), "samples": 3},
    family="parts",
    paper="Breiman 2001, doi:10.1023/A:1010933404324",
    also=("permute_within_part", "voxel_shuffling"),
)
def feature_shuffling(score: Score, *, features: Features | None = None, samples: int = 10) -> Explain:
    r"""Explain by what the score loses if the voxels of a part change places with each other, at random.

    .. math:: a_j = F(x) - E_\pi\left[ F(x \text{ with the voxels of } j \text{ permuted by } \pi) \right]

    The values of the part stay, their arrangement goes: a part that counts only by its histogram gets zero, whatever
    it is worth. A Monte Carlo mean over ``samples`` permutations of each part. No other sample is needed.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        features: which parts, by ``esegeta.features``; by default ``grid(8)``. A part of one voxel gets zero.
        samples: how many permutations.

    Returns:
        ``explain(x, key=) -> like x``, the value of a part at each of its elements; ``with_standard_error`` gives its
        error.

    Example:
        >>> import torch
        >>> explain = feature_shuffling(lambda x: x.square().sum(), features=grid(2))
        >>> explain(torch.tensor([[2., 3., 5., 7.]]), key=0).tolist()
        [[0.0, 0.0, 0.0, 0.0]]

    Reference:
        Breiman 2001, section 10, doi:10.1023/A:1010933404324, within an image instead of within a data set.
    """
    label = "feature_shuffling"
    n = check.positive_count(label, "samples", samples)

    def explain(x: Float[Tensor, "*dims"], *, key: int | Tensor) -> Float[Tensor, "*dims"]:
        parts = coalitions.parts(
            label, grid(8) if features is None else features, x, runs=lambda d: n * (d + 1)
        )

        def run(t: Tensor) -> Tensor:
            fill = shuffled(key=random.fold_in(key, t))
            return coalitions.drops(score, x, x, parts, label=label, fill=fill)

        return _averaged(run, torch.arange(n, device=x.device), parts, x, label)

    return explain


def _averaged(
    run: Callable[[Tensor], Tensor], nodes: Tensor, parts: FeatureMap, x: Tensor, label: str
) -> Tensor:
    means = stream.estimate(run, nodes, label=label)
    return answered(*(parts.spread(t).expand_as(x).clone() for t in means))
