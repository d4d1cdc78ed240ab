"""The public surface: ``python -m esegeta._stubs`` writes ``esegeta/__init__.pyi`` and that of the axioms.

The package imports each name from where the stub says, when it is first used; type checkers read the same file.
Methods, transforms and axioms are those that are registered, the rest stands below.
"""

from pathlib import Path

import esegeta
import esegeta.methods
import esegeta.transforms
from esegeta._registry import METHODS, TRANSFORMS
from esegeta.axioms import AXIOMS

COMMAND = "python -m esegeta._stubs"
WIDTH = 110  # of a line, as the formatter breaks them
PATH = Path(esegeta.__file__).with_name("__init__.pyi")
OF_AXIOMS = PATH.parent / "axioms" / "__init__.pyi"

# Module to what it has that is public but in no registry; of the package itself these are modules.
EXPLICIT = {
    "esegeta": (
        *("axioms", "baselines", "concepts", "conformance", "dissection", "dreams", "features", "masks"),
        *("methods", "metrics"),
        *("models", "noise", "plot"),
        *("radiomics", "random", "reducers", "rules", "segmentation", "spatial", "transforms"),
        *("uncertainty", "zoo"),
    ),
    "esegeta._registry": ("find_method", "method", "metric", "reducer", "transform"),
    "esegeta.conformance.verify": ("verify",),
    "esegeta.engine.batching": ("batched", "explained"),
    "esegeta.engine.estimates": ("with_standard_error",),
    "esegeta.engine.execution": ("DeadlineExceeded", "ExecutionWarning", "execution"),
    "esegeta.engine.memory": ("forecast",),
    "esegeta.lesions": ("Component", "Components", "components"),
    "esegeta.methods.adaptive_integrated_gradients": ("adaptive_report",),
    "esegeta.methods.full_gradient": ("FullGradient", "full_gradient"),
    "esegeta.methods.lime": ("LimeFit", "lime_fit"),
    "esegeta.metrics.comparing": ("compare",),
    "esegeta.models": ("from_module", "locality"),
    "esegeta.placing": (
        *(
            "activation_and_gradient",
            "at",
            "all_places",
            "mark",
            "nudge",
            "places",
            "replace",
            "split",
            "tap",
        ),
    ),
    "esegeta.plot": ("show",),
    "esegeta.spatial": ("upsample",),
    "esegeta.transforms.fusion": ("fuse",),
    "esegeta.transforms.weights": ("fusion_grad", "noise_grad"),
    "esegeta.trees": ("on_trees",),
}


def _discovered() -> dict[str, str]:
    """Return the module of every name that the registry holds of this package."""
    functions = [*(spec.fn for spec in METHODS.values()), *(spec.fn for spec in TRANSFORMS.values())]
    return {fn.__name__: fn.__module__ for fn in functions if fn.__module__.startswith("esegeta.")}


def _line(module: str, name: str) -> str:
    line = f"from {module} import {name} as {name}"
    return line if len(line) <= WIDTH else f"from {module} import (\n    {name} as {name},\n)"


def text() -> str:
    """Return what the stub should hold.

    >>> "from esegeta.methods.gradient import gradient as gradient" in text()
    True
    """
    names = {**{name: home for home, names in EXPLICIT.items() for name in names}, **_discovered()}
    lines = [_line(module, name) for module, name in sorted((module, name) for name, module in names.items())]
    public = "".join(f'    "{name}",\n' for name in sorted(names))
    return f"# Written by: {COMMAND}\n" + "\n".join(lines) + f"\n\n__version__: str\n__all__ = [\n{public}]\n"


def text_of_axioms() -> str:
    """Return what the stub of the axioms should hold.

    >>> "from esegeta.axioms.sums import completeness as completeness" in text_of_axioms()
    True
    """
    found = {("esegeta.axioms", "exact"), *(("esegeta.axioms.registered", n) for n in ("AXIOMS", "axiom"))}
    found |= {(fn.__module__, name) for name, fn in AXIOMS.items() if fn.__module__.startswith("esegeta.")}
    lines = [_line(module, name) for module, name in sorted(found)]
    return f"# Written by: {COMMAND}\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(text())
    OF_AXIOMS.write_text(text_of_axioms())
