"""One loop that climbs: a state goes in at every step and comes out. Masks keep the best that they saw."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from esegeta.engine import levels, progress
from esegeta.engine.execution import DeadlineExceeded, current, record_partial

State = TypeVar("State")

LOOKS = 40  # how often a climb is looked at
SETTLED = 8  # looks in a row that find it where it was: a fifth of the steps
FIRST = 0.1  # of the progress, for what comes before the first step
MOVED = 1e-3  # of its own size, that a point has to move to count as another


class Best(NamedTuple):
    """The best point that was seen, and its value."""

    value: Tensor
    point: Tensor


def better(one: Best, other: Best) -> Best:
    """Return the better of two; the first if they are as good.

    >>> better(Best(torch.tensor(1.), torch.zeros(2)), Best(torch.tensor(2.), torch.ones(2))).point.tolist()
    [1.0, 1.0]
    """
    up = other.value > one.value
    return Best(torch.where(up, other.value, one.value), torch.where(up, other.point, one.point))


def climb(
    step: Callable[[int, State], State],
    state: State,
    after: Callable[[int, State, bool], bool],
    *,
    label: str,
    steps: int,
    begin: float = 0.0,
) -> State:
    """Run a step over and over, from a state to the next one, and give the last state.

    Args:
        step: from the number of the step and a state to the next state, a tree of tensors.
        state: the first one.
        after: looks at (number of the step, state, whether the deadline has passed), and says whether to stop. At a
            deadline the state is that of the step before, and the loop ends.
        label: what the progress bar and errors call the loop.
        steps: how many at most.
        begin: of the progress, which is done already.

    >>> climb(lambda k, x: x + k, 0, lambda k, x, late: x > 5, label="demo", steps=9)
    6
    """
    with progress.loop(label) as bar:
        for k in range(steps):
            late = current().left() <= 0
            if late:
                text = f"{label}: the deadline passed; the result is that of the first {k} of {steps} steps."
                record_partial(text, k, steps)
            else:
                with progress.step(
                    bar, begin + (1 - begin) * k / steps, begin + (1 - begin) * (k + 1) / steps
                ):
                    state = step(k, state)
            if after(k, state, late) or late:
                break
            bar.at(begin + (1 - begin) * (k + 1) / steps)
        bar.at(1.0)
    return state


def ascend(
    step: Callable[[int, State], State],
    start: Callable[[Tensor], State],
    look: Callable[[State], Best],
    *,
    label: str,
    steps: int,
    first: Callable[[], Best],
) -> tuple[State, Best]:
    """Climb, and give the last state and the best point that was looked at.

    Every fortieth of the steps, and at the end, the point is looked at. A climb whose point has not moved for eight
    looks has settled: it stays where it is, whatever others in a batch still do, and the loop ends with the last of
    them. At a deadline the best so far comes back.

    Args:
        step: from the number of the step and a state to the next state, a tree of tensors.
        start: from the point of ``first`` to the first state.
        look: from a state to the point that it stands for, and what that is worth.
        label: what progress bars and errors call the loop.
        steps: how many at most.
        first: finds the best point before the first step.

    >>> climb = lambda k, x: x + 0.5 * (3 - x)
    >>> look = lambda x: Best(-(x - 3).square(), x)
    >>> first = lambda: look(torch.tensor(0.))
    >>> ascend(climb, lambda x: x, look, label="demo", steps=9, first=first)[1].point.item() > 2.9
    True
    """
    every = max(1, steps // LOOKS)
    still: Tensor | None = None
    best: Best
    last: Tensor

    def unless_settled(k: int, state: State) -> State:
        new = step(k, state)
        return new if still is None else _unless(still >= SETTLED, state, new)

    def after(k: int, state: State, late: bool) -> bool:
        nonlocal best, last, still
        if not late and k != steps - 1 and (k + 1) % every != 0:
            return False
        seen = look(state)
        best = better(best, seen)
        stays = (seen.point - last).abs().mean() <= MOVED * seen.point.abs().mean()
        last = seen.point
        before = torch.zeros_like(stays, dtype=torch.int64) if still is None else still
        still = torch.where((before >= SETTLED) | stays, before + 1, 0)
        return not levels.true_anywhere(still < SETTLED)

    with progress.loop(label) as bar:
        with progress.step(bar, 0.0, FIRST):
            best = first()
        last = best.point
        state = climb(unless_settled, start(best.point), after, label=label, steps=steps, begin=FIRST)
    return state, best


def refuse_late(label: str) -> None:
    """Raise where the deadline passed before there is anything to give."""
    if current().left() <= 0:
        raise DeadlineExceeded(f"{label}: the deadline passed before the first step. Allow more time.")


def _unless(settled: Tensor, old: Any, new: Any) -> Any:
    return tree_map(lambda a, b: torch.where(settled, a, b), old, new)
