"""Residuals of attribution axioms: zero where the axiom holds."""

from esegeta.axioms.residuals import completeness as completeness
from esegeta.axioms.residuals import dummy as dummy
from esegeta.axioms.residuals import linearity as linearity
from esegeta.axioms.residuals import sensitivity_a as sensitivity_a
from esegeta.axioms.residuals import shift as shift
from esegeta.axioms.residuals import symmetry as symmetry
