"""The law of completeness, and the situations in which it is tried."""

from esegeta import axioms
from esegeta.conformance.lawbook import MethodLaw, law, path
from esegeta.conformance.subjects import Subject


@law("completeness")
class Completeness(MethodLaw):
    """The attributions add up to the score's difference to the baseline."""

    def measure(self, subject: Subject) -> tuple[float, float]:
        stated = lambda build: axioms.completeness(build(self.case.score), self.case.score)
        residual, rounding = self.run(subject, subject.build, stated)
        allowed = rounding + path(subject, self.case)
        if residual > allowed and subject.finer is not None:
            # Not the quadrature of the straight path, but one that converges: faster than by the first order.
            return self.run(subject, subject.finer, stated)[0], residual / 8 + rounding
        return residual, allowed
