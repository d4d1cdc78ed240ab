"""Which axioms a method keeps: a search for counterexamples, and the suite that every method has to pass.

``verify`` puts a method to random situations; ``pytest --pyargs esegeta.conformance -p my_method`` runs the suite.
``esegeta.conformance.strategies`` draws the scores, networks and images, for tests of your own.
"""

from esegeta.conformance.cases import Case
from esegeta.conformance.functions import Additive, Extremum, Ignoring, Linear, Perceptron, Polynomial
from esegeta.conformance.laws import LAWS, rebuilt
from esegeta.conformance.networks import Network
from esegeta.conformance.report import Counterexample, Report, Verdict
from esegeta.conformance.subjects import Subject, of, subjects
from esegeta.conformance.verify import verify

__all__ = [
    "LAWS",
    "Additive",
    "Case",
    "Counterexample",
    "Extremum",
    "Ignoring",
    "Linear",
    "Network",
    "Perceptron",
    "Polynomial",
    "Report",
    "Subject",
    "Verdict",
    "of",
    "rebuilt",
    "subjects",
    "verify",
]
