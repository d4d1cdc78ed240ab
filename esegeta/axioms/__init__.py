"""Residuals of attribution axioms: pure functions that return zero where the axiom holds.

They choose no tolerance and branch on no value, so they work under ``vmap`` and at run time. References for what
can be computed exactly are in ``esegeta.axioms.exact``. A family of residuals is a file; they are found by name.
"""

import importlib
import pkgutil

from esegeta.axioms import exact as exact
from esegeta.axioms.registered import AXIOMS as AXIOMS
from esegeta.axioms.registered import axiom as axiom

for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
globals().update(AXIOMS)
