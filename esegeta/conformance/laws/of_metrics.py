"""The laws of metrics: fair to the truth, free of what should not matter, and honest where there is no number."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from esegeta.conformance.judging import MetricLaw, MetricSubject, apart
from esegeta.conformance.lawbook import ABSURD, INAPPLICABLE, Measured, law
from esegeta.engine.execution import execution

UNIT = 4.0  # another unit; powers of two do not round
NEARLY = 1e-3  # between two equal values, so that they have an order


def _no_score(subject: MetricSubject) -> str:
    if "score" not in subject.needs:
        return "it runs no score"
    return "it is asked about other images" if "explain" in subject.needs else ""


@law("same_key_same_number", of="metric")
class SameKey(MetricLaw):
    """The number is the same again, nothing is written to, and the generator of the process is left alone."""

    def measure(self, subject: MetricSubject) -> Measured:
        if self.unsuited(subject):
            return INAPPLICABLE
        score, before, state = self.score(bend=0.5), self.map.clone(), torch.get_rng_state()
        first = self.number(subject, self.map, score)
        if not (torch.equal(before, self.map) and torch.equal(state, torch.get_rng_state())):
            return ABSURD
        return apart(first, self.number(subject, self.map, score)), 0.0


@law("batches", of="metric")
class BatchesOfNumbers(MetricLaw):
    """The numbers of a batch are those of its examples, one by one."""

    @classmethod
    def applies(cls, subject: MetricSubject) -> str:
        """Accept only what goes through vmap."""
        return super().applies(subject) or ("" if subject.vectorised else "its arrays do not go through vmap")

    def measure(self, subject: MetricSubject) -> Measured:
        if self.unsuited(subject):
            return INAPPLICABLE
        score = self.score(bend=0.5)
        maps, images = torch.stack([self.map, self.weights]), torch.stack([self.image, self.image - 1])
        one = lambda a, x: self.number(subject, a, score, x)
        together = vmap(one)(maps, images)
        alone = [one(a, x) for a, x in zip(maps, images, strict=True)]
        far = max(apart(t, s) for t, s in zip(together, alone, strict=True))
        return far, self.allowed(subject, *alone)


@law("chunks", of="metric")
class Chunks(MetricLaw):
    """However many images go through the network at once, the number is the same."""

    def measure(self, subject: MetricSubject) -> Measured:
        if self.unsuited(subject):
            return INAPPLICABLE
        score, found = self.score(bend=0.5), []
        for chunk in (2, 4) if subject.several else (1, 3):  # some compare images, and need two
            settings: dict[str, Any] = {"chunk": chunk} if subject.several else {}
            with execution(chunk=chunk):
                found.append(self.number(subject, self.map, score, **settings))
        return apart(*found), self.allowed(subject, *found)


@law("ties", of="metric")
class Ties(MetricLaw):
    """Equal values have no order: if all is turned round, image, map, mask and score, the number stays."""

    @classmethod
    def applies(cls, subject: MetricSubject) -> str:
        """Accept only what draws nothing: draws are by position."""
        return super().applies(subject) or ("what it draws is by position" if subject.drawn else "")

    def measure(self, subject: MetricSubject) -> Measured:
        if self.unsuited(subject):
            return INAPPLICABLE
        tied = self.map.sign()
        axes = tuple(range(1, tied.ndim))
        turn = lambda t: t.flip(axes)
        here = self.number(subject, tied, self.score())
        mask = self.mask.flip(tuple(range(self.mask.ndim)))
        there = self.number(subject, turn(tied), self.score(turn(self.weights)), turn(self.image), mask=mask)
        return apart(here, there), self.allowed(subject, here, there)


@law("orders", of="metric")
class Orders(MetricLaw):
    """The number of a map with equal values lies among those of the orders that these values could have."""

    @classmethod
    def applies(cls, subject: MetricSubject) -> str:
        """Accept only what is about an order, along a curve or against a mask, and draws nothing."""
        ordered = subject.ordered or "mask" in subject.needs
        unordered = "" if ordered else "it is not about an order"
        return super().applies(subject) or unordered or ("it draws" if subject.drawn else "")

    def measure(self, subject: MetricSubject) -> Measured:
        if self.unsuited(subject):
            return INAPPLICABLE
        tied, score, n = self.map.sign(), self.score(), self.image.numel()
        here = self.number(subject, tied, score)
        true = (self.weights * self.image).flatten()
        places = torch.arange(n)
        inside = self.mask.expand(self.image.shape).flatten().long()
        # Of curves of an additive score the first two are the extremes, of numbers against a mask the next two.
        orders = [true, -true, inside, -inside, places, -places, places.mul(3).remainder(n)]
        ranks = [order.argsort(stable=True).argsort().reshape(tied.shape) for order in orders]
        found = [self.number(subject, tied + NEARLY * rank / n, score) for rank in ranks]
        if bool(here.isnan()) or any(bool(one.isnan()) for one in found):
            return INAPPLICABLE
        low, high = min(map(float, found)), max(map(float, found))
        allowed = NEARLY * max(1.0, abs(low), abs(high)) + self.allowed(subject, here)
        return max(low - float(here), float(here) - high, 0.0), allowed


@law("turns", of="metric")
class Turns(MetricLaw):
    """Nothing depends on where an image begins: turned round, with map, mask and score, it has the same number."""

    @classmethod
    def applies(cls, subject: MetricSubject) -> str:
        """Accept only what draws nothing: draws are by position."""
        return super().applies(subject) or ("what it draws is by position" if subject.drawn else "")

    def measure(self, subject: MetricSubject) -> Measured:
        if self.unsuited(subject):
            return INAPPLICABLE
        n, axes = self.image.numel(), tuple(range(1, self.image.ndim))
        a = self.map + NEARLY * torch.arange(n).reshape(self.map.shape) / n
        turn = lambda t: t.flip(axes)
        here = self.number(subject, a, self.score(bend=0.5))
        mask = self.mask.flip(tuple(range(self.mask.ndim)))
        score = self.score(turn(self.weights), bend=0.5)
        there = self.number(subject, turn(a), score, turn(self.image), mask=mask)
        return apart(here, there), self.allowed(subject, here, there)


@law("answers", of="metric")
class Answers(MetricLaw):
    """What has an answer for one image has one for its like, and nothing crashes.

    Its like are the image in three channels, one that is longer by one along each axis, and the same map beside the
    other side of the mask.
    """

    def measure(self, subject: MetricSubject) -> Measured:
        if self.unsuited(subject):
            return INAPPLICABLE
        found = [
            like.answer(subject, like.map, like.score(), mask=mask)
            for like in self._alike()
            for mask in ((like.mask, ~like.mask) if "mask" in subject.needs else (like.mask,))
        ]
        if any(one is not None and one.isinf() for one in found):
            return ABSURD
        refused = sum(one is None for one in found)
        return (0.0, 0.0) if refused in (0, len(found)) else ABSURD

    def _alike(self) -> "Iterator[Answers]":
        def longer(t: Tensor) -> Tensor:
            for axis in range(1, t.ndim):
                t = torch.cat([t, t.narrow(axis, 0, 1)], axis)
            return t

        yield self
        for change in (lambda t: torch.cat([t, t / 2, -t]), longer):
            yield replace(self, **{k: change(getattr(self, k)) for k in ("weights", "image", "map")})


@law("steps", of="metric")
class Steps(MetricLaw):
    """More steps change an area by no more than the trapezoid rule leaves; of equal values by nothing."""

    @classmethod
    def applies(cls, subject: MetricSubject) -> str:
        """Accept only what takes steps."""
        return super().applies(subject) or ("" if subject.steps else "it takes no steps")

    def measure(self, subject: MetricSubject) -> Measured:
        if self.unsuited(subject):
            return INAPPLICABLE
        score = self.score()
        every = [self.answer(subject, torch.ones_like(self.map), score, steps=k) for k in (1, 2, 3)]
        flat = [one for one in every if one is not None]  # a peer may refuse equal values
        equal = max((apart(flat[0], other) for other in flat[1:]), default=0.0)
        if equal > self.allowed(subject, *flat):
            return equal, self.allowed(subject, *flat)
        n = self.image.numel()
        # A curve between stops is off by no more than it goes up and down there, over the longest stretch; ties join.
        order = self.map + NEARLY * torch.arange(n).reshape(self.map.shape) / n
        some, all_ = (self.number(subject, order, score, steps=k) for k in (max(2, n // 2), n))
        stretch = -(-n // max(2, n // 2)) / n
        swing = float((self.weights * self.image).abs().sum())
        return apart(some, all_), 2 * stretch * swing + self.allowed(subject, some, all_)


@law("units", of="metric")
class Units(MetricLaw):
    """In another unit of the map the number is the same, or it follows the unit of map and score by a whole power."""

    def measure(self, subject: MetricSubject) -> Measured:
        if self.unsuited(subject):
            return INAPPLICABLE
        score = self.score()
        here = self.number(subject, self.map, score)
        scaled = [self.number(subject, unit * self.map, score) for unit in (UNIT, 2.0**-20)]
        free = max(apart(here, other) for other in scaled), self.allowed(subject, here, *scaled)
        if free[0] <= free[1]:
            return free
        both = self.number(subject, UNIT * self.map, self.score(unit=UNIT))
        ways = [(apart(both, UNIT**k * here), self.allowed(subject, both)) for k in (1, 2)]
        return min(ways, key=lambda way: way[0] - way[1])


@law("no_number_without_meaning", of="metric")
class Degenerate(MetricLaw):
    """Constant maps, zeros, and masks that are empty or full have a finite number, none, or a refusal in words.

    A map with a hole, and where a map lies in an empty or a full mask, have none.
    """

    def measure(self, subject: MetricSubject) -> Measured:
        if self.unsuited(subject):
            return INAPPLICABLE
        score, none = self.score(), torch.zeros_like(self.mask)
        maps = [torch.full_like(self.map, 0.1), torch.zeros_like(self.map)]
        for a, mask in itertools.product(maps, (self.mask, none, ~none)):
            found = self.answer(subject, a, score, mask=mask)
            if found is not None and found.isinf():
                return ABSURD
        hole = self.map.clone()
        hole.flatten()[0] = torch.nan
        found = self.answer(subject, hole, score)
        if found is not None and not found.isnan():
            return ABSURD
        if "mask" in subject.needs:
            for mask in (none, ~none):
                found = self.answer(subject, self.map, score, mask=mask)
                if found is not None and not found.isnan():
                    return ABSURD
        return 0.0, 0.0


@law("linear_scores", of="metric")
class LinearScores(MetricLaw):
    """Of a linear score the true map gets the number that the metric calls right."""

    @classmethod
    def applies(cls, subject: MetricSubject) -> str:
        """Accept only what has such a number."""
        return super().applies(subject) or ("" if subject.exact is not None else "it has no such number")

    def measure(self, subject: MetricSubject) -> Measured:
        if self.unsuited(subject):
            return INAPPLICABLE
        weights = self.weights / 3  # sums of halves are exact, and would hide what leaves nothing to rounding
        x = torch.where(self.image == 0, 0.25, self.image)  # at zero a contribution says nothing of a slope
        score = self.score(weights)
        if "explain" in subject.needs:  # the slopes of a linear score are the same everywhere
            explain = lambda *_: weights
            found = subject.build(explain, score)(x, key=7)
        else:
            explain = lambda x, *_: weights * x  # as contributions
            found = subject.build(explain, score)(x, key=7)
            found = torch.as_tensor(getattr(found, "area", found), dtype=torch.float64)
        if bool(found.isnan()):
            return INAPPLICABLE  # sets of equal sums: nothing varies
        # In single precision a thousandfold of rounding would hide anything: a tenth is a fault at any rate.
        return float((found - subject.exact).abs()), min(1e3 * self.allowed(subject), 0.1)


@law("truth_above_permutations", of="metric")
class Truth(MetricLaw):
    """The true map of an additive score is judged no worse than any order of its values."""

    @classmethod
    def applies(cls, subject: MetricSubject) -> str:
        """Accept only what judges by a score, and says so."""
        return _no_score(subject) or ("" if subject.ranks else "a fill may reward another map")

    def measure(self, subject: MetricSubject) -> Measured:
        if self.unsuited(subject):
            return INAPPLICABLE
        # Positive, and no two alike, so that one order is right.
        n = self.image.numel()
        true = self.weights.abs() + 0.1 * torch.arange(1, n + 1).reshape(self.image.shape)
        true = true / true.sum()
        x = torch.ones_like(self.image)
        score = lambda z: (true * z).sum()
        best = self.number(subject, true, score, x)
        if bool(best.isnan()):
            return INAPPLICABLE
        way = 1.0 if subject.better == "higher" else -1.0
        flat = true.flatten()
        worst = -torch.inf
        for k in range(1, 4):
            others = (flat.roll(k), flat.flip(0), flat[torch.arange(n).mul(2 * k + 1).remainder(n).argsort()])
            for a in others:
                other = self.number(subject, a.reshape(true.shape), score, x)
                worst = max(worst, float(way * (other - best)) if not other.isnan() else -torch.inf)
        return max(worst, 0.0), self.allowed(subject, best)
