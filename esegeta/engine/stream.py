"""Work is streamed, never stacked.

Everything that samples or integrates is a fold over ``fn(i)``: a few of them at a time go through the network
as one batch, are absorbed into a running state, and are gone. Memory is one chunk plus the state, whatever the
number of samples; the chunk size changes speed only.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from esegeta.engine import check, levels, likeness, memory, progress
from esegeta.engine.execution import DeadlineExceeded, current, partial_share, record, record_partial

State = TypeVar("State")
Tree = Any


def fold(
    fn: Callable[[Tree], Tree],
    nodes: Tree,
    absorb: Callable[[State, Tree, Tree], State],
    start: State,
    *,
    label: str,
    partial: bool = False,
    already: int = 0,
    what: str = "samples",
    together: bool = True,
    chunk: int | None = None,
    voxels: int | None = None,
) -> State:
    """Absorb ``fn(node)`` for every node into a state, a chunk at a time.

    Args:
        fn: what to compute at one node.
        nodes: a tensor, or a tree of tensors, with one node along each first axis.
        absorb: ``(state, values, nodes) -> state`` with the values and nodes of one chunk stacked.
        start: the first state.
        label: what progress bars and errors call the loop.
        partial: whether the state means something before the last node. If so, the deadline ends the loop
            early with a warning; if not, it raises ``DeadlineExceeded``. A chunk in which something was cut
            short is left out if there are others, so that every element is of the same samples.
        already: how many nodes the first state holds.
        what: what the warning calls the nodes.
        together: False where several nodes cannot share a call (each its own weights): one at a time.
        chunk: how many nodes go together, where ``fn`` itself takes them stacked.
        voxels: of how many a node is, where nodes are images: small ones need no measurement to go together.

    Returns:
        The last state.
    """
    counts = {len(leaf) for leaf in tree_leaves(nodes)}
    if len(counts) != 1 or 0 in counts:
        raise check.refused(
            label, "nodes that share a first axis of at least one", f"{sorted(counts)}", "Stack them"
        )
    total = counts.pop()
    if chunk is not None:
        many = fn
    elif together:
        many = vmap(fn)
    else:
        many = lambda piece: tree_map(lambda t: t[None], fn(tree_map(lambda t: t[0], piece)))
    state, done = start, 0
    plan = Plan(
        total if together else 1,
        chunk,
        lambda: likeness.likeness(fn, tree_map(lambda t: t[0], nodes)),
        voxels,
    )
    whole, inner = total + already, 1.0

    def cut_short() -> None:
        first = f"the first {done + already} of {whole} {what}"
        if inner < 1:
            message = f"{label}: the deadline passed within {first}; what it came before is NaN."
        else:
            message = f"{label}: the deadline passed; the result is that of {first}."
        record_partial(message, done + already, whole, inner * (done + already) / whole)

    with progress.loop(label) as bar:
        while done < total:
            some = partial and done + already > 0
            if current().left() <= 0:
                if not some:
                    raise DeadlineExceeded(
                        f"{label}: the deadline passed after {done} of {total} steps, and a part of them has no "
                        "meaning of its own. Allow more time, or ask for fewer steps."
                    )
                cut_short()
                break
            size = min(plan.size, total - done)
            piece = tree_map(lambda t, lo=done, hi=done + size: t[lo:hi], nodes)
            before = len(current().events)
            with progress.step(bar, done / total, (done + size) / total):
                try:
                    values = plan.attempt(many, piece, size, label)
                except DeadlineExceeded:
                    if not some:
                        raise
                    cut_short()
                    break
                if values is None:  # out of memory: the plan is smaller now
                    continue
                within = partial_share(current().events[before:])
                if within is not None and current().left() <= 0:
                    if some:
                        cut_short()
                        break
                    inner = within
                state = absorb(state, values, piece)
            done += size
            bar.at(done / total)
            if any(levels.fake(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor)):
                break  # a dry run: later chunks occupy no more
            del values
    return state


# Images of so many voxels together, a pair of volumes of 64 cubed, go through at once before anything is measured.
# Each chunk calls all operators again: for small images that takes longer than what they compute.
FIRST_VOXELS = 2 * 64**3

# Bytes that one node takes, by what it computes.
_OCCUPIED = likeness.Memory()


class Plan:
    """How many nodes go together: the least number first, then what the measurement of those allows.

    The measurement of a stream that is alike another one is that of the other one; its chunks are the same, so that
    a call gives the same numbers again.
    """

    def __init__(
        self,
        most: int,
        chunk: int | None = None,
        which: Callable[[], likeness.Likeness | None] = lambda: None,
        voxels: int | None = None,
    ) -> None:
        self.most = most
        settings = current()
        self.measured = settings.chunk is not None or most == 1 or chunk is not None
        self.which = None if self.measured else which()
        self.known = _OCCUPIED.recall(self.which)
        if chunk is not None:
            self.size = min(most, chunk)
        elif settings.chunk is not None:
            self.size = min(most, max(1, settings.chunk // levels.mapped()))
        else:
            # On CPU a 3-D convolution of a single example takes a slow kernel (1.5 to 5 times).
            self.size = min(most, max(1, -(-2 // levels.mapped())))
        self.least = self.size
        if voxels is not None and chunk is None and settings.chunk is None and settings.memory is None:
            self.size = min(most, max(self.size, FIRST_VOXELS // (levels.mapped() * max(1, voxels))))

    def attempt(self, many: Callable[[Tree], Tree], piece: Tree, size: int, label: str) -> Tree | None:
        """Run ``size`` nodes; None where memory did not suffice and the next attempt takes fewer."""
        device = levels.base(tree_leaves(piece)[0]).device
        failed = False
        try:
            if self.measured:
                return many(piece)
            if self.known is not None:
                values, each = many(piece), self.known
            else:
                with memory.Live() as live:
                    values = many(piece)
                each = max(1, live.peak // size)
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            failed = True  # retry outside of this block: the traceback holds the activations
            if size == 1:
                raise torch.OutOfMemoryError(
                    f"{label}: one step alone does not fit into memory. Use smaller patches, or a device with more."
                ) from error
        if failed:
            memory.release(device)
            self.size, self.measured = size // 2, True
            record(
                "out of memory",
                f"{label}: out of memory with {size} at once, going on with {size // 2}.",
                size=size,
            )
            return None
        leaves = [levels.base(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        if self.known is None and not any(map(levels.fake, leaves)):
            _OCCUPIED.remember(self.which, each)
        allowed = memory.budget(leaves[0].device if leaves else device, current().memory)
        floor = 1 if current().memory is not None else self.least
        self.size = max(floor, min(self.most, allowed // each))
        self.measured = True
        return values


def _wide(values: Tensor) -> torch.dtype:
    """What sums are kept in: a half-precision sum stops growing once its terms fall below its spacing."""
    return torch.promote_types(values.dtype, torch.float32)


def _narrow(total: Tensor, dtype: torch.dtype) -> Tensor:
    return total.to(dtype) if dtype.is_floating_point else total


def _dtypes(values: Tree) -> Tree:
    return tree_map(lambda v: v.dtype, values)


def integral(fn: Callable[[Tree], Tree], nodes: Tree, weights: Tensor, *, label: str) -> Tree:
    """Return ``sum_i w_i fn(node_i)``: a quadrature, of which no part has a meaning.

    >>> import torch
    >>> integral(lambda t: t ** 2, torch.tensor([0., 1.]), torch.tensor([.5, .5]), label="demo").item()
    0.5
    """

    def absorb(
        state: tuple[Tree, Tree] | None, values: Tree, piece: tuple[Tree, Tensor]
    ) -> tuple[Tree, Tree]:
        new = tree_map(lambda v: torch.tensordot(piece[1].to(_wide(v)), v.to(_wide(v)), 1), values)
        return (new if state is None else tree_map(torch.add, state[0], new)), _dtypes(values)

    sums, dtypes = fold(lambda node: fn(node[0]), (nodes, weights), absorb, None, label=label)  # type: ignore[misc]
    return tree_map(_narrow, sums, dtypes)


def mean(fn: Callable[[Tree], Tree], nodes: Tree, *, label: str, together: bool = True) -> Tree:
    """Return ``1/n sum_i fn(node_i)``: a sampling mean, of which the first part is a mean too.

    >>> import torch
    >>> mean(lambda i: i * 1.0, torch.arange(5), label="demo").item()
    2.0
    """

    def absorb(state: tuple[int, Tree, Tree] | None, values: Tree, piece: Tree) -> tuple[int, Tree, Tree]:
        here = len(tree_leaves(piece)[0])
        new = tree_map(lambda v: v.sum(0, dtype=_wide(v)), values)
        if state is None:
            return here, new, _dtypes(values)
        return state[0] + here, tree_map(torch.add, state[1], new), state[2]

    count, sums, dtypes = fold(fn, nodes, absorb, None, label=label, partial=True, together=together)  # type: ignore[misc]
    return tree_map(lambda s, dtype: _narrow(s / count, dtype), sums, dtypes)


def moments(
    fn: Callable[[Tree], Tensor], nodes: Tree, *, label: str, together: bool = True
) -> tuple[Tensor, Tensor]:
    """Return mean and (1/n) variance of ``fn(node_i)``, merged chunk by chunk without cancellation (Chan et al.).

    >>> import torch
    >>> m, v = moments(lambda i: i + 1e8, torch.arange(4).double(), label="demo")
    >>> m.item() - 1e8, v.item()
    (1.5, 1.25)
    """

    count, centre, spread, dtype = _moments(fn, nodes, label, together)
    return _narrow(centre, dtype), _narrow(spread / count, dtype)


def extrema(fn: Callable[[Tree], Tensor], nodes: Tree, *, label: str) -> tuple[Tensor, Tensor]:
    """Return element-wise minimum and maximum of ``fn(node_i)``.

    >>> import torch
    >>> lo, hi = extrema(lambda i: (i - 2.0) ** 2, torch.arange(5), label="demo")
    >>> lo.item(), hi.item()
    (0.0, 4.0)
    """

    def absorb(state: tuple[Tensor, Tensor] | None, values: Tensor, _: Tree) -> tuple[Tensor, Tensor]:
        low, high = values.amin(0), values.amax(0)
        return (low, high) if state is None else (torch.minimum(state[0], low), torch.maximum(state[1], high))

    found = fold(fn, nodes, absorb, None, label=label, partial=True)
    assert found is not None
    return found


def collect(
    fn: Callable[[Tree], Tensor],
    nodes: Tree,
    *,
    label: str,
    meaning: str = "perturbation",
    what: str = "samples",
) -> Tensor:
    """Return ``fn(node_i)`` for every node, one number each, in the order of the nodes.

    At the deadline those that are done come back, fewer than there are nodes: for values that are samples.
    ``answers`` is for values that are answers. A value that is not finite is an error that names its node.

    >>> import torch
    >>> collect(lambda i: 2.0 * i, torch.arange(3), label="demo").tolist()
    [0.0, 2.0, 4.0]
    """

    def absorb(state: list[Tensor], values: Tensor, _: Tree) -> list[Tensor]:
        first = sum(len(v) for v in state)
        odd = ~torch.isfinite(values.detach())
        if levels.true_anywhere(odd):
            i = next(i for i in range(len(values)) if levels.true_anywhere(odd[i]))
            raise check.refused(
                label,
                f"a finite score for every {meaning}",
                f"NaN or infinity for {meaning} {first + i}",
                "Look at the network's answer to it: a division by zero, a logarithm of zero, an overflow",
            )
        return [*state, values]

    nothing: list[Tensor] = []
    return torch.cat(fold(fn, nodes, absorb, nothing, label=label, partial=True, what=what))


# What events call answers, of which some are missing.
MISSING = "perturbations, and NaN for the others"


def answers(fn: Callable[[Tree], Tensor], nodes: Tree, *, label: str) -> Tensor:
    """Return ``fn(node_i)`` for every node, each an answer of its own: NaN for those that a deadline cut off.

    >>> import torch
    >>> answers(lambda i: 2.0 * i, torch.arange(3), label="demo").tolist()
    [0.0, 2.0, 4.0]
    """
    found = collect(fn, nodes, label=label, what=MISSING)
    missing = len(tree_leaves(nodes)[0]) - len(found)
    return torch.cat([found, found.new_full((missing,), torch.nan)]) if missing else found


def estimate(
    fn: Callable[[Tree], Tensor],
    nodes: Tree,
    *,
    label: str,
    tolerance: float | None = None,
    together: bool = True,
) -> tuple[Tensor, Tensor]:
    """Estimate the mean of independent ``fn(node_i)`` and its standard error, with as many as it takes.

    With a tolerance sampling ends once the standard error is nowhere above that fraction of the largest ``|mean|``.
    That is looked at after 16, 32, 64... nodes, for each example by itself: what others in a batch still need and
    how nodes are put into chunks change nothing.

    >>> import torch
    >>> mean, error = estimate(lambda i: i * 1.0, torch.arange(4), label="demo")
    >>> mean.item(), round(error.item() ** 2, 4)
    (1.5, 0.4167)
    """
    state: tuple[Any, ...] = _NOTHING

    def advance(start: int, stop: int) -> tuple[Tensor, Tensor, int]:
        nonlocal state
        piece = tree_map(lambda t: t[start:stop], nodes)
        state = _moments(fn, piece, label, together, state)
        count, centre, spread, dtype = state
        # One sample says nothing of its error.
        error = (spread / (count * (count - 1))).sqrt() if count > 1 else torch.full_like(spread, torch.inf)
        return _narrow(centre, dtype), _narrow(error, dtype), count

    return until_settled(advance, len(tree_leaves(nodes)[0]), label=label, tolerance=tolerance)


def estimate_of(
    fn: Callable[[Tree], Tensor],
    nodes: Tree,
    of: Callable[[Tensor], Tensor],
    *,
    label: str,
    tolerance: float | None = None,
    meaning: str = "sample",
) -> tuple[Tensor, Tensor]:
    """Return a function of the means of several numbers, and its standard error to first order.

    Args:
        fn: of a node, k numbers for every element, (k, ...).
        nodes: independent samples.
        of: from the means (k, ...) to the value, element by element.
        label: what progress bars and errors call the loop.
        tolerance: as in ``estimate``.
        meaning: what errors call a node.

    >>> import torch
    >>> both = lambda i: torch.stack([i * 1.0, i + 1.0])
    >>> ratio, error = estimate_of(both, torch.arange(3), lambda mean: mean[0] / mean[1], label="demo")
    >>> ratio.item(), error.item() > 0
    (0.5, True)
    """
    state: tuple[Any, ...] = (0, 0.0, 0.0)

    def absorb(state: tuple[Any, ...], values: Tensor, _: Tree) -> tuple[Any, ...]:
        count, centre, spread = state
        new = len(values)
        odd = ~torch.isfinite(values.detach()).flatten(1).all(1)
        if levels.true_anywhere(odd):
            which = count + next(i for i in range(new) if levels.true_anywhere(odd[i]))
            advice = "Look at the network's answer to it: a division by zero, an overflow"
            raise check.refused(label, "a finite score", f"NaN or infinity for {meaning} {which}", advice)
        here = values.mean(0)
        step, rest = here - centre, values - here
        spread = spread + torch.einsum("ti...,tj...->ij...", rest, rest)
        spread = spread + step[:, None] * step[None] * (count * new / (count + new))
        return count + new, centre + step * (new / (count + new)), spread

    def advance(start: int, stop: int) -> tuple[Tensor, Tensor, int]:
        nonlocal state
        piece = tree_map(lambda t: t[start:stop], nodes)
        count, centre, spread = state = fold(
            fn, piece, absorb, state, label=label, partial=True, already=state[0]
        )
        value, pull, *_ = vjp(of, centre)
        (slope,) = pull(torch.ones_like(value))
        variance = torch.einsum("i...,j...,ij...->...", slope, slope, spread).clamp(min=0)
        error = (variance / (count * (count - 1))).sqrt() if count > 1 else variance + torch.inf
        return value, error, count

    return until_settled(advance, len(tree_leaves(nodes)[0]), label=label, tolerance=tolerance)


def until_settled(
    advance: Callable[[int, int], tuple[Tensor, Tensor, int]],
    total: int,
    *,
    label: str,
    tolerance: float | None,
    least: int = 16,
) -> tuple[Tensor, Tensor]:
    """Return a value and its standard error, from as many samples as a tolerance needs: see ``estimate``.

    The first look is after ``least`` samples.

    ``advance(start, stop)`` takes the samples from start to stop and gives value, error and how many samples are in
    them, fewer than stop where a deadline came first.
    """
    kept: tuple[Tensor, Tensor] | None = None
    settled: Tensor | None = None
    done, end = 0, total if tolerance is None else min(least, total)

    def cut_short(done: int) -> None:
        message = f"{label}: the deadline passed; the result is that of the first {done} of {total} samples."
        record_partial(message, done, total)

    with progress.loop(label) as bar:
        while done < total:
            if kept is not None and current().left() <= 0:
                cut_short(done)
                break
            try:
                with progress.step(bar, done / total, end / total):
                    value, error, reached = advance(done, end)
            except DeadlineExceeded:
                if kept is None:
                    raise
                cut_short(done)
                break
            if reached < end < total:  # what is recorded counts to the next look only
                cut_short(reached)
            if kept is None or settled is None:
                kept = (value, error)
            else:
                kept = (torch.where(settled, kept[0], value), torch.where(settled, kept[1], error))
            if tolerance is None or reached < end:
                break  # all of them, or all that the deadline allowed
            near = kept[1].amax() <= tolerance * kept[0].abs().amax()
            settled = near if settled is None else settled | near
            if not levels.true_anywhere(~settled):
                break
            done, end = end, min(2 * end, total)
    assert kept is not None
    return kept


_NOTHING: tuple[Any, ...] = (0, 0.0, 0.0, None)


def _moments(
    fn: Callable[[Tree], Tensor],
    nodes: Tree,
    label: str,
    together: bool = True,
    start: tuple[Any, ...] = _NOTHING,
) -> tuple[Any, ...]:
    """How many, their mean, the sum of squares around it, and the dtype: merged as in Chan et al."""

    def absorb(state: tuple[Any, ...], values: Tensor, piece: Tree) -> tuple[Any, ...]:
        count, centre, spread, _ = state
        wide = values.to(_wide(values))
        new = len(tree_leaves(piece)[0])
        both = count + new
        here = wide.mean(0)
        step = here - centre
        centre = centre + step * (new / both)
        spread = spread + (wide - here).square().sum(0) + step.square() * (count * new / both)
        return both, centre, spread, values.dtype

    return fold(fn, nodes, absorb, start, label=label, partial=True, already=start[0], together=together)
