"""The laws that every rewrite has to keep: the same values, and derivatives that differ only where it says so."""

import torch
from torch import Tensor
from torch.func import grad, vmap

from esegeta._facts import declared
from esegeta.conformance import cases
from esegeta.conformance.lawbook import ABSURD, INAPPLICABLE, Measured, law
from esegeta.conformance.scoring import RewriteLaw, RewriteSubject
from esegeta.rules.rewriting import coverage


@law("same_values", of="rewrite")
class SameValues(RewriteLaw):
    """The rewritten score has the values of the score, for one example and for a batch."""

    def measure(self, subject: RewriteSubject) -> Measured:
        score, made, x = self.case.score, self.rewritten(subject), self.case.x
        xs = torch.stack([x, self.case.baseline])
        loop = [made(z) for z in xs]
        if not all(isinstance(y, Tensor) and y.shape == () and y.dtype == x.dtype for y in loop):
            return ABSURD
        plain = torch.stack([score(z) for z in xs])
        off = [(torch.stack(loop) - plain).abs().amax(), (vmap(made)(xs) - plain).abs().amax()]
        return float(torch.stack(off).amax()), self.case.rounding(plain)


@law("declared_differences", of="rewrite")
class DeclaredDifferences(RewriteLaw):
    """Where no operation is reported as rewritten, the derivative is the plain one."""

    def measure(self, subject: RewriteSubject) -> Measured:
        made, x = self.rewritten(subject), self.case.x
        if not declared(made).rewritten:
            return INAPPLICABLE  # it does not say what it does
        if any(what == "rewritten" for _, what in coverage(made, x)):
            return 0.0, 0.0  # whatever differs, it says so
        plain = grad(self.case.score)(x)
        return float((grad(made)(x) - plain).abs().amax()), self.case.rounding(plain)


@law("batches_of_derivatives", of="rewrite")
class BatchesOfDerivatives(RewriteLaw):
    """A batch has the derivatives of its examples, one by one."""

    def measure(self, subject: RewriteSubject) -> Measured:
        made, xs = self.rewritten(subject), torch.stack([self.case.x, self.case.x.flip(-1) / 2 + 0.125])
        loop = torch.stack([grad(made)(z) for z in xs])
        return float((vmap(grad(made))(xs) - loop).abs().amax()), self.case.rounding(loop)


@law("true_second_derivative", of="rewrite")
class TrueSecondDerivative(RewriteLaw):
    """A derivative of the derivatives is right, or it is refused."""

    def measure(self, subject: RewriteSubject) -> Measured:
        made, x = self.rewritten(subject), self.case.x
        if not cases.generic(self.case.score, x, (self.case.baseline,)):
            return INAPPLICABLE
        weights = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)
        slope = lambda z: (grad(made)(z) * weights).sum()
        along = lambda h: float((slope(x + h * weights) - slope(x - h * weights)) / (2 * h))
        near, nearer = along(2.0**-16), along(2.0**-18)
        try:
            second = float((grad(slope)(x) * weights).sum())
        except (NotImplementedError, RuntimeError):
            return 0.0, 0.0
        # Measured with two steps: what they differ by, and the rounding of a difference over such a step.
        return abs(second - nearer), 4 * abs(near - nearer) + 2.0**19 * self.case.rounding(near, second)
