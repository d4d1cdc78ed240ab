"""The laws of reducers: a score is one number, pure, the same in batches, and smooth to its other input."""

import math

import torch
from torch import Tensor
from torch.func import vmap

from esegeta.conformance import cases
from esegeta.conformance.lawbook import ABSURD, Measured, law
from esegeta.conformance.scoring import ReducerLaw, ReducerSubject
from esegeta.engine.gradient import refuse_forward_only


@law("one_number", of="reducer")
class OneNumber(ReducerLaw):
    """The score of every input is one finite number of the input's type."""

    def measure(self, subject: ReducerSubject) -> Measured:
        score = self.score(subject)
        for z in (self.x, self.other):
            y = score(z)
            if not isinstance(y, Tensor) or y.shape != () or y.dtype != z.dtype or not torch.isfinite(y):
                return ABSURD
        return 0.0, 0.0


@law("pure", of="reducer")
class Pure(ReducerLaw):
    """The score writes to no input, draws nothing, and is the same again."""

    def measure(self, subject: ReducerSubject) -> Measured:
        before, state, score = self.other.clone(), torch.get_rng_state(), self.score(subject)
        first = score(self.other)
        same = torch.equal(before, self.other) and torch.equal(state, torch.get_rng_state())
        return (float((first - score(self.other)).abs()), 0.0) if same else ABSURD


@law("batches", of="reducer")
class Batches(ReducerLaw):
    """A batch has the scores of its examples, one by one."""

    def measure(self, subject: ReducerSubject) -> Measured:
        score, xs = self.score(subject), torch.stack([self.x, self.other])
        loop = torch.stack([score(z) for z in xs])
        return float((vmap(score)(xs) - loop).abs().amax()), self.rounding(loop)


@law("frozen_mask", of="reducer")
class FrozenMask(ReducerLaw):
    """The mask stays that of the first input: on the way to another one the score does not jump."""

    @classmethod
    def applies(cls, subject: ReducerSubject) -> str:
        """Return a reason if the subject freezes no mask, or has no gradient."""
        if not subject.mask:
            return "it freezes no mask"
        return "" if subject.differentiable else "a count jumps"

    def measure(self, subject: ReducerSubject) -> Measured:
        score = self.score(subject)
        low, width, jump = 0.0, 1.0, math.inf
        while width > cases.CLOSE:
            at = low + width * torch.linspace(0, 1, cases.LOOKS, dtype=self.x.dtype)
            values = vmap(score)(self.x + at.reshape(-1, *[1] * self.x.ndim) * (self.other - self.x))
            jumps = values.diff().abs()
            where = int(jumps.argmax())
            jump, allowed = (
                float(jumps[where]),
                self.rounding(values) + 2 * cases.CLOSE * float(values.abs().amax()),
            )
            if jump <= allowed:
                break
            low, width = float(at[where]), width / (cases.LOOKS - 1)
        # Of what is steep, but does not jump, a step of 2^-50 leaves next to nothing.
        return jump, allowed + cases.NEAR * (1 + float(values.abs().amax()))


@law("true_gradient", of="reducer")
class TrueGradient(ReducerLaw):
    """The gradient adds up to what the score gains; a score declared to have none is refused where one is needed."""

    def measure(self, subject: ReducerSubject) -> Measured:
        score = self.score(subject)
        if not subject.differentiable:
            try:
                refuse_forward_only(subject.name, score)
            except ValueError:
                return 0.0, 0.0
            return ABSURD
        line = self.other - self.x

        def gained(nodes: int) -> tuple[Tensor, Tensor]:
            t, w = (line.new_tensor(v) for v in cases.gauss(nodes))
            points = self.x + t.reshape(-1, *[1] * line.ndim) * line
            slopes = (cases.gradients(score, points) * line).flatten(1).sum(1)
            return (w * slopes).sum(), slopes

        (coarse, _), (fine, slopes) = gained(8), gained(32)
        gain = score(self.other) - score(self.x)
        # What the quadrature can leave: what changed with more nodes, and at kinks the variation of the slope.
        bends = float(slopes.diff().abs().sum()) * cases.discrepancy(32)
        return float((fine - gain).abs()), 4 * float((fine - coarse).abs()) + bends + self.rounding(gain)
