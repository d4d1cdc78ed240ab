"""Images that a network answers to most, and what they tell: activation maximisation, DeepDream and its analysis.

``ascend(objective, start, ...)(key=)`` is the loop. What it climbs is a score (``objectives``), what moves is a
parametrisation, what it has to bear are distortions, what it should have little of are regularisers, how it moves is
an optimiser. ``recipes`` are those of papers, made of these parts. All in one to three dimensions.
"""

from esegeta.dreams import (
    distortions,
    objectives,
    optimisers,
    parametrisations,
    recipes,
    regularisers,
    starts,
)
from esegeta.dreams.analysing import Analysis, analysis, normalised, radiomic
from esegeta.dreams.climbing import Dream, ascend, each
from esegeta.dreams.regularisers import relative
from esegeta.dreams.spectra import channel_statistics, spectrum, spectrum_residual

__all__ = [
    "Analysis",
    "Dream",
    "analysis",
    "ascend",
    "channel_statistics",
    "distortions",
    "each",
    "normalised",
    "objectives",
    "optimisers",
    "parametrisations",
    "radiomic",
    "recipes",
    "regularisers",
    "relative",
    "spectrum",
    "spectrum_residual",
    "starts",
]
