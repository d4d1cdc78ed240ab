"""Everything that ``esegeta`` has to offer by name; ``esegeta/__init__.py`` brings it in at its first use."""

import importlib
from typing import Any

from esegeta import (
    axioms,
    baselines,
    features,
    masks,
    methods,
    models,
    noise,
    random,
    reducers,
    rules,
    segmentation,
    spatial,
    transforms,
)
from esegeta._registry import METHODS as _METHODS
from esegeta._registry import TRANSFORMS as _TRANSFORMS
from esegeta._registry import find_method, method, reducer, transform
from esegeta.engine.batching import batched, explained
from esegeta.engine.estimates import with_standard_error
from esegeta.engine.execution import DeadlineExceeded, ExecutionWarning, execution
from esegeta.engine.memory import forecast
from esegeta.methods.adaptive_integrated_gradients import integrated
from esegeta.methods.full_gradient import FullGradient, full_gradient
from esegeta.methods.lime import LimeFit, lime_fit
from esegeta.models import from_module, locality
from esegeta.places import activation_and_gradient, at, every, name, nudge, places, replace, split, tap
from esegeta.spatial import upsample
from esegeta.transforms.fusion import fuse
from esegeta.transforms.weights import fusion_grad, noise_grad
from esegeta.trees import on_trees

# What few scripts use, and none needs to wait for: imported when it is asked for.
LATER = {"conformance": "", "plot": "", "radiomics": "", "verify": "conformance.verify", "show": "plot"}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"esegeta.{LATER[name] or name}")
    return getattr(home, name) if LATER[name] else home


# Every registered method and transform of the package, so that a new one is public without a line here.
globals().update({name: spec.fn for table in (_METHODS, _TRANSFORMS) for name, spec in table.items()})

__all__ = [
    "DeadlineExceeded",
    "ExecutionWarning",
    "FullGradient",
    "LimeFit",
    "activation_and_gradient",
    "at",
    "axioms",
    "baselines",
    "batched",
    "every",
    "execution",
    "explained",
    "features",
    "find_method",
    "forecast",
    "from_module",
    "full_gradient",
    "fuse",
    "fusion_grad",
    "integrated",
    "lime_fit",
    "locality",
    "masks",
    "method",
    "methods",
    "models",
    "name",
    "noise",
    "noise_grad",
    "nudge",
    "on_trees",
    "places",
    "random",
    "reducer",
    "reducers",
    "replace",
    "rules",
    "segmentation",
    "spatial",
    "split",
    "tap",
    "transform",
    "transforms",
    "upsample",
    "with_standard_error",
    *_METHODS,
    *_TRANSFORMS,
    *LATER,
]
