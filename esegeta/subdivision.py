"""A subdivision of [0, 1] that is refined where a trapezoidal sum is worst.

Everything is a small tensor, and nothing branches on values: a ``vmap`` refines every example where it needs
it. Nodes are numbered in the order in which they come; the gradient at a node is kept in a slot as long as the
intervals beside it may be halved, which changes its weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esegeta.engine import stream


class Subdivision(NamedTuple):
    """Nodes (place, value and derivative of the function there, slot or -1) and intervals (their end nodes)."""

    t: Tensor
    values: Tensor
    rates: Tensor
    slot: Tensor
    left: Tensor
    right: Tensor

    @property
    def lengths(self) -> Tensor:
        """Of the intervals."""
        return self.t[self.right] - self.t[self.left]

    @property
    def errors(self) -> Tensor:
        """Return what the trapezoid over each interval misses of the function's difference: known exactly."""
        mean = (self.rates[self.left] + self.rates[self.right]) / 2
        return self.lengths * mean - (self.values[self.right] - self.values[self.left])

    @property
    def open_errors(self) -> Tensor:
        """Sizes of the errors; -1 for intervals that can be halved no more, since an end is settled."""
        kept = (self.slot[self.left] >= 0) & (self.slot[self.right] >= 0)
        return torch.where(kept, self.errors.abs(), -1.0)

    @property
    def weights(self) -> Tensor:
        """Of the nodes in the trapezoidal sum."""
        return (_touching(self) * self.lengths / 2).sum(1)


def whole(values: Tensor, rates: Tensor) -> Subdivision:
    """Return [0, 1] as one interval, with the function's values and derivatives at its ends in slots 0 and 1.

    >>> p = whole(torch.tensor([0., 1.]), torch.tensor([0., 2.]))
    >>> p.errors.tolist(), p.weights.tolist()
    ([0.0], [0.5, 0.5])
    """
    ends = torch.arange(2, device=values.device)
    return Subdivision(ends.to(values.dtype), values, rates, ends, ends[:1], ends[1:])


def middles(p: Subdivision, which: Tensor) -> Tensor:
    """Return where the intervals are halved."""
    return (p.t[p.left[which]] + p.t[p.right[which]]) / 2


def measured(p: Subdivision, t: Tensor, values: Tensor, rates: Tensor) -> Subdivision:
    """Return the subdivision with new nodes that no interval uses yet, and without slots."""
    return p._replace(
        t=torch.cat([p.t, t]),
        values=torch.cat([p.values, values]),
        rates=torch.cat([p.rates, rates]),
        slot=torch.cat([p.slot, torch.full_like(t, -1, dtype=torch.int64)]),
    )


def halved(p: Subdivision, interval: Tensor, node: int, active: Tensor) -> Subdivision:
    """Cut an interval at the node; where not active, add an interval of length zero."""
    far = p.right[interval]
    cut = (torch.arange(len(p.left), device=p.t.device) == interval) & active
    return p._replace(
        left=torch.cat([p.left, torch.where(active, node, far)[None]]),
        right=torch.cat([torch.where(cut, node, p.right), far[None]]),
    )


class Store(NamedTuple):
    """The gradients in slots, and the weighted sum of those that gave theirs up."""

    kept: list[Tensor]
    settled: Tensor | float = 0.0

    def total(self, p: Subdivision) -> Tensor:
        """Return the trapezoidal sum of the gradients."""
        total = self.settled
        for s, gradient in enumerate(self.kept):
            total = total + torch.where(p.slot == s, p.weights, 0.0).sum() * gradient
        return torch.as_tensor(total)


def stored(
    p: Subdivision, store: Store, node: int, gradient: Tensor, errors: Tensor, room: int
) -> tuple[Subdivision, Store]:
    """Store the gradient of a node in a slot: a new one if there is room, else that of the calmest node."""
    nodes = torch.arange(len(p.slot), device=p.t.device)
    if len(store.kept) < room:
        slot = torch.where(nodes == node, len(store.kept), p.slot)
        return p._replace(slot=slot), store._replace(kept=[*store.kept, gradient])
    out = _calmest(p, errors)
    here = [p.slot[out] == s for s in range(room)]
    leaving = sum(torch.where(h, g, 0.0) for h, g in zip(here, store.kept, strict=True))
    settled = store.settled + p.weights[out] * leaving
    kept = [torch.where(h, gradient, g) for h, g in zip(here, store.kept, strict=True)]
    slot = torch.where(nodes == node, p.slot[out], torch.where(nodes == out, -1, p.slot))
    return p._replace(slot=slot), Store(kept, settled)


def _calmest(p: Subdivision, errors: Tensor) -> Tensor:
    """The node in a slot with the smallest of ``errors`` beside it; intervals after those are not touched."""
    known = torch.cat([errors, errors.new_full((len(p.left) - len(errors),), float("inf"))])
    known = torch.where(p.lengths > 0, known, -1.0)
    beside = torch.where(_touching(p), known, -1.0).amax(1)
    return torch.where(p.slot >= 0, beside, float("inf")).argmin()


def _touching(p: Subdivision) -> Tensor:
    nodes = torch.arange(len(p.t), device=p.t.device)[:, None]
    return (nodes == p.left) | (nodes == p.right)


def planned(value: Callable[[Tensor], Tensor], steps: int, like: Tensor, label: str) -> Tensor:
    r"""Return nodes from 0 to 1 that are dense where a function bends, from its values alone.

    Between two nodes a function is off its chord by about :math:`h^2 |f''| / 8`. The second differences say
    where that is largest; there the next two nodes go, until there are ``steps`` intervals. A kink at the very
    end shows in no difference between even nodes, so from ten intervals on a node lies close beside each end.

    >>> t = planned(lambda t: (t - 0.9).clamp(min=0), 16, torch.zeros(()), "demo")
    >>> len(t), t[0].item(), t[-1].item(), ((t > 0.8) & (t < 1)).sum().item() >= 6
    (17, 0.0, 1.0, True)
    """
    t = torch.linspace(0, 1, min(steps, 8) + 1, dtype=like.dtype, device=like.device)
    if steps >= 10:  # so close that what rounding adds to the slope is about what is lost in between
        near = torch.full_like(t[:1], torch.finfo(t.dtype).eps ** 0.5)
        t = torch.cat([t, near, 1 - near]).sort().values
    values = _values(value, t, label)
    while t.shape[0] <= steps:
        more = min(2, steps + 1 - t.shape[0])
        slopes = values.diff() / t.diff()
        bends = (2 * slopes.diff() / (t[2:] - t[:-2])).abs()
        ends = torch.cat([bends[:1], bends, bends[-1:]])
        worst = torch.maximum(ends[:-1], ends[1:]) * t.diff().square()
        i = worst.topk(more).indices
        new = (t[i] + t[i + 1]) / 2
        t, order = torch.cat([t, new]).sort()
        values = torch.cat([values, _values(value, new, label)])[order]
    return t


def _values(value: Callable[[Tensor], Tensor], t: Tensor, label: str) -> Tensor:
    def absorb(known: Tensor | None, more: Tensor, _: Tensor) -> Tensor:
        return more if known is None else torch.cat([known, more])

    found = stream.fold(value, t, absorb, None, label=label)
    assert found is not None
    return found
