"""The law of conservation, and the situations in which it is tried."""

from esegeta import axioms
from esegeta.conformance.lawbook import MethodLaw, law, path
from esegeta.conformance.subjects import Subject


@law("conservation")
class Conservation(MethodLaw):
    """The attributions add up to the score."""

    def measure(self, subject: Subject) -> tuple[float, float]:
        stated = lambda build: axioms.conservation(build(self.case.score), self.case.score)
        residual, rounding = self.run(subject, subject.build, stated)
        return residual, rounding + path(subject, self.case)
