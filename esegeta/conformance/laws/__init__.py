"""One axiom a file: its law, and the situations in which it is tried. They are found by name.

``LAWS`` are those of methods: the axioms. Reducers, rewrites and metrics have laws of their own.
"""

import importlib
import pkgutil

from esegeta.conformance.lawbook import laws_for

for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

LAWS = laws_for("method")
REDUCER_LAWS = laws_for("reducer")
REWRITE_LAWS = laws_for("rewrite")
METRIC_LAWS = laws_for("metric")
