"""Rewrites: scores with other derivatives, made at the level of operations; of the same values, but for smoothing.

The same up to rounding: where an operation is computed in other words, its sums have another order.
"""

from esegeta.rules.composites import (
    COMPOSITES,
    AlphaBeta,
    Composite,
    Epsilon,
    Flat,
    Gamma,
    GeneralisedGamma,
    Layer,
    Pass,
    WSquare,
    ZBox,
    Zero,
    ZPlus,
    deep_taylor,
    epsilon_alpha2_beta1,
    epsilon_gamma_box,
    epsilon_plus,
)
from esegeta.rules.deeplift import deeplift
from esegeta.rules.excitation import excitation
from esegeta.rules.frozen_norms import NormDeviation, frozen_norms, norm_deviation
from esegeta.rules.guided import deconvnet, guided
from esegeta.rules.lrp import lrp, relevances
from esegeta.rules.reveal_cancel import reveal_cancel
from esegeta.rules.rewriting import coverage, rule
from esegeta.rules.softplus import softplus

__all__ = [
    "COMPOSITES",
    "AlphaBeta",
    "Composite",
    "Epsilon",
    "Flat",
    "Gamma",
    "GeneralisedGamma",
    "Layer",
    "NormDeviation",
    "Pass",
    "WSquare",
    "ZBox",
    "ZPlus",
    "Zero",
    "coverage",
    "deconvnet",
    "deep_taylor",
    "deeplift",
    "epsilon_alpha2_beta1",
    "epsilon_gamma_box",
    "epsilon_plus",
    "excitation",
    "frozen_norms",
    "guided",
    "lrp",
    "norm_deviation",
    "relevances",
    "reveal_cancel",
    "rule",
    "softplus",
]
