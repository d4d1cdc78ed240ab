"""Which axioms a method keeps: a search for counterexamples, and the suite that every method has to pass.

``verify`` puts a method, transform, reducer or rewrite to random situations;
``pytest --pyargs esegeta.conformance -p my_method`` runs the suite.
``esegeta.conformance.strategies`` draws the scores, networks and images, for tests of your own.
"""

from esegeta.conformance.cases import Case
from esegeta.conformance.finding import of
from esegeta.conformance.functions import Additive, Extremum, Ignoring, Linear, Perceptron, Polynomial
from esegeta.conformance.judging import MetricSubject
from esegeta.conformance.kinds import TransformSubject, laws_of, subject_of
from esegeta.conformance.lawbook import law
from esegeta.conformance.laws import LAWS, METRIC_LAWS, REDUCER_LAWS, REWRITE_LAWS
from esegeta.conformance.networks import Network
from esegeta.conformance.scoring import ReducerSubject, RewriteSubject
from esegeta.conformance.situations import rebuilt
from esegeta.conformance.subjects import Subject, subjects
from esegeta.conformance.verdicts import Counterexample, Report, Verdict
from esegeta.conformance.verify import verify

__all__ = [
    "LAWS",
    "METRIC_LAWS",
    "REDUCER_LAWS",
    "REWRITE_LAWS",
    "Additive",
    "Case",
    "Counterexample",
    "Extremum",
    "Ignoring",
    "Linear",
    "MetricSubject",
    "Network",
    "Perceptron",
    "Polynomial",
    "ReducerSubject",
    "Report",
    "RewriteSubject",
    "Subject",
    "TransformSubject",
    "Verdict",
    "law",
    "laws_of",
    "of",
    "rebuilt",
    "subject_of",
    "subjects",
    "verify",
]
