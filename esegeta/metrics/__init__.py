"""Is this explanation any good? Functions that judge explanations, in one to three dimensions.

A metric is ``(explain, score) -> measure`` or ``explain -> measure``, and a measure ``(x, *refs, key=, mask=,
within=)`` gives one number, or a ``Curve``. Maps are judged with their sign; ``eg.absolute(explain)`` takes sizes.
A metric whose numbers are better one way says so: ``metrics.deletion.better`` is "lower".
"""

from esegeta.metrics.comparing import Comparison, compare
from esegeta.metrics.complexity import effective_complexity, entropy, gini
from esegeta.metrics.curves import Curve
from esegeta.metrics.declared import declare
from esegeta.metrics.explanations import given
from esegeta.metrics.faithfulness import (
    aopc,
    average_drop,
    average_gain,
    average_increase,
    irof,
    monotonicity,
    relevance_gain,
    road,
)
from esegeta.metrics.imputation import imputed
from esegeta.metrics.infidelity import gaussian, infidelity, noisy_baseline, square_removal
from esegeta.metrics.localisation import (
    context_share,
    ioa,
    iou,
    max_dice,
    pointing_game,
    relevance_mass,
    relevance_rank,
    roc_auc,
    top_k_intersection,
    weighted_ioa,
)
from esegeta.metrics.nulls import Calibrated, calibrated, shifted, spectrum_residual, surrogate
from esegeta.metrics.randomisation import (
    Cascade,
    cascade,
    entropy_change,
    layers_of,
    random_logit,
    randomised,
)
from esegeta.metrics.removal import deletion, insertion
from esegeta.metrics.similarity import absolute_rank_correlation, hog_correlation, rank_correlation, ssim
from esegeta.metrics.stability import (
    lipschitz,
    relative_input_stability,
    relative_output_stability,
    sensitivity_max,
    sensitivity_mean,
)
from esegeta.metrics.subsets import faithfulness_correlation, mu_fidelity, sensitivity_n

# Neither way: entropy, gini and effective_complexity say how simple a map is, context_share how far a network looks.
declare(
    {
        "higher": (
            *(insertion, relevance_gain, aopc, irof, average_increase, average_gain, monotonicity),
            *(sensitivity_n, faithfulness_correlation, mu_fidelity),
            *(roc_auc, max_dice, pointing_game, relevance_mass, relevance_rank, top_k_intersection),
            *(iou, ioa, weighted_ioa, entropy_change),
        ),
        "lower": (
            *(deletion, road, average_drop, infidelity, sensitivity_max, sensitivity_mean, lipschitz),
            *(relative_input_stability, relative_output_stability, random_logit),
        ),
    }
)

__all__ = [
    "Calibrated",
    "Cascade",
    "Comparison",
    "Curve",
    "absolute_rank_correlation",
    "aopc",
    "average_drop",
    "average_gain",
    "average_increase",
    "calibrated",
    "cascade",
    "compare",
    "context_share",
    "deletion",
    "effective_complexity",
    "entropy",
    "entropy_change",
    "faithfulness_correlation",
    "gaussian",
    "gini",
    "given",
    "hog_correlation",
    "imputed",
    "infidelity",
    "insertion",
    "ioa",
    "iou",
    "irof",
    "layers_of",
    "lipschitz",
    "max_dice",
    "monotonicity",
    "mu_fidelity",
    "noisy_baseline",
    "pointing_game",
    "random_logit",
    "randomised",
    "rank_correlation",
    "relative_input_stability",
    "relative_output_stability",
    "relevance_gain",
    "relevance_mass",
    "relevance_rank",
    "road",
    "roc_auc",
    "sensitivity_max",
    "sensitivity_mean",
    "sensitivity_n",
    "shifted",
    "spectrum_residual",
    "square_removal",
    "ssim",
    "surrogate",
    "top_k_intersection",
    "weighted_ioa",
]
