"""Is this explanation any good? Functions that judge explanations, in one to three dimensions.

A metric is ``(explain, score) -> measure`` or ``explain -> measure``, and a measure ``(x, *refs, key=, mask=,
within=)`` gives one number, or a ``Curve``. Maps are judged with their sign; ``eg.absolute(explain)`` takes sizes.
Metrics are registered: ``esegeta._registry.METRICS["deletion"]`` says which way its numbers are better, what it needs
besides a finished map, what it costs and where it comes from.
"""

from esegeta.engine.sharing import sharing
from esegeta.metrics.comparing import Comparison, compare
from esegeta.metrics.complexity import effective_complexity, entropy, gini
from esegeta.metrics.curves import Curve
from esegeta.metrics.explanations import given
from esegeta.metrics.faithfulness import (
    aopc,
    average_drop,
    average_gain,
    average_increase,
    fidelity,
    irof,
    monotonicity,
    relevance_gain,
    road,
)
from esegeta.metrics.imputation import imputed
from esegeta.metrics.infidelity import gaussian, infidelity, noisy_baseline, square_removal
from esegeta.metrics.information import code_length, performance_information
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
from esegeta.metrics.nulls import Calibrated, calibrated, random_cam, shifted, spectrum_residual, surrogate
from esegeta.metrics.randomisation import (
    Cascade,
    CascadeMaps,
    cascade,
    cascade_maps,
    cascaded,
    emprt,
    followed,
    layers_of,
    random_logit,
    randomised,
    smprt,
)
from esegeta.metrics.removal import deletion, insertion
from esegeta.metrics.similarity import absolute_rank_correlation, hog_correlation, rank_correlation, ssim
from esegeta.metrics.stability import (
    lipschitz,
    relative_input_stability,
    relative_output_stability,
    relative_representation_stability,
    sensitivity_max,
    sensitivity_mean,
)
from esegeta.metrics.subsets import faithfulness_correlation, mu_fidelity, sensitivity_n

__all__ = [
    "Calibrated",
    "Cascade",
    "CascadeMaps",
    "Comparison",
    "Curve",
    "absolute_rank_correlation",
    "aopc",
    "average_drop",
    "average_gain",
    "average_increase",
    "calibrated",
    "cascade",
    "cascade_maps",
    "cascaded",
    "code_length",
    "compare",
    "context_share",
    "deletion",
    "effective_complexity",
    "emprt",
    "entropy",
    "faithfulness_correlation",
    "fidelity",
    "followed",
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
    "performance_information",
    "pointing_game",
    "random_cam",
    "random_logit",
    "randomised",
    "rank_correlation",
    "relative_input_stability",
    "relative_output_stability",
    "relative_representation_stability",
    "relevance_gain",
    "relevance_mass",
    "relevance_rank",
    "road",
    "roc_auc",
    "sensitivity_max",
    "sensitivity_mean",
    "sensitivity_n",
    "sharing",
    "shifted",
    "smprt",
    "spectrum_residual",
    "square_removal",
    "ssim",
    "surrogate",
    "top_k_intersection",
    "weighted_ioa",
]
