"""Residuals of attribution axioms: pure functions that return zero where the axiom holds.

They choose no tolerance and branch on no value, so they work under ``vmap`` and at run time. References for what
can be computed exactly are in ``esegeta.axioms.exact``.
"""

from esegeta.axioms import exact as exact
from esegeta.axioms.elements import continuity as continuity
from esegeta.axioms.elements import dummy as dummy
from esegeta.axioms.elements import monotonicity as monotonicity
from esegeta.axioms.elements import sensitivity_a as sensitivity_a
from esegeta.axioms.elements import symmetry as symmetry
from esegeta.axioms.moves import affine_equivariance as affine_equivariance
from esegeta.axioms.moves import shift as shift
from esegeta.axioms.moves import translation_equivariance as translation_equivariance
from esegeta.axioms.scores import class_sensitivity as class_sensitivity
from esegeta.axioms.scores import implementation_invariance as implementation_invariance
from esegeta.axioms.scores import linearity as linearity
from esegeta.axioms.scores import parameter_dependence as parameter_dependence
from esegeta.axioms.scores import scale_of_output as scale_of_output
from esegeta.axioms.sums import completeness as completeness
from esegeta.axioms.sums import conservation as conservation
from esegeta.axioms.sums import efficiency_of_regions as efficiency_of_regions
from esegeta.axioms.sums import sensitivity_n as sensitivity_n
