"""Which parts of an answer can be trusted? Random models, maps of their uncertainty, and what these are worth.

``dropout(module)``, ``augmented(model, changes)`` and ``ensemble(models)`` are random models
``(x, key=) -> output``; ``monte_carlo(model)(x, key=)`` gives named maps and numbers of their draws. ``aggregating``
makes one number of a map, ``calibration`` and ``selection`` hold it against the truth, ``conformal`` makes promises
about new volumes. All in one to three dimensions.
"""

from esegeta.uncertainty import aggregating, augmenting, calibration, conformal, selection
from esegeta.uncertainty.augmenting import affine, augmented, flip, intensity, noise
from esegeta.uncertainty.dropping import dropout
from esegeta.uncertainty.sampling import Spread, Uncertainty, ensemble, monte_carlo

__all__ = [
    "Spread",
    "Uncertainty",
    "affine",
    "aggregating",
    "augmented",
    "augmenting",
    "calibration",
    "conformal",
    "dropout",
    "ensemble",
    "flip",
    "intensity",
    "monte_carlo",
    "noise",
    "selection",
]
