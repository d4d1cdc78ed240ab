"""The score of images that differ from one image in a small box: exact, and at the price of the box.

A convolutional network sees a change only as far as it reaches. ``changed`` computes the clean activations once and
then, for every change, only what it reaches (``windows``). Whether that pays is decided by counting multiplications,
so that the same call takes the same way every time, and the answer is compared with a whole evaluation once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta.engine import check, layout, levels, memory, stream
from esegeta.engine import window_operators as window_operators  # puts the operators into their table
from esegeta.engine.execution import DeadlineExceeded, current, note
from esegeta.engine.windows import Missing, Refused, Run, Window

Box = tuple[slice, ...]
Patch = Callable[[int, Box], Tensor]

# Below this many multiplications for a whole evaluation, calling operators costs more than running them.
SMALL = 3e7
# Local evaluation has to save this much to be worth its clean pass and its comparison.
WORTHWHILE = 0.85
# What the comparison with a whole evaluation may differ by, relative to the score.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
MOST_AT_ONCE = 64


@dataclass(frozen=True)
class Changed:
    """The score of the image itself, and of every change of it: that of the image where a deadline came first."""

    clean: Tensor
    values: Tensor


class Followed:
    """A score at one image, followed window by window."""

    def __init__(self, score: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.score, self.run = score, Run()
        self.run.differentiable = torch.is_grad_enabled()
        self.shape = tuple(x.shape)
        last = current().layout != "contiguous"
        self.clean = layout.channels_last(x[None]) if last else x[None].clone()

    def __call__(self, lo: Any, patch: Tensor) -> Tensor:
        """The scores, (B,), of B images that hold these patches at these offsets."""
        for record in (not self.run.names, True):
            self.run.begin(record)
            try:
                with torch.no_grad():
                    y = self.score(Window(self.run, (-1, 0), self.shape, self.clean, lo, patch))
            except Missing:  # other boxes read other activations: compute them again, keeping those too
                continue
            if record:
                self.run.end()
            if not isinstance(y, Window):
                raise Refused("the score does not depend on the image")
            if y.ndim:
                raise Refused("the score is not one number")
            return y.patch.to(torch.float64 if y.patch.is_floating_point() else y.patch.dtype)
        raise Refused("clean activations are read that were not computed")


def changed(
    score: Callable[[Tensor], Tensor], x: Tensor, boxes: Sequence[Box], patch: Patch, *, label: str
) -> Changed | None:
    """``F`` of x with each box changed, or None where whole evaluations are as cheap or the only way.

    Args:
        score: ``(C,*S) -> ()``.
        x: the image.
        boxes: where each change is, over all axes of x; an empty box changes nothing.
        patch: ``(number, box) -> values``: what the changed image holds in a box that contains the change.
        label: what progress bars and errors call the loop.
    """
    way = current().evaluation
    try:
        why = _obstacle(x)
        if why or way == "whole":
            raise Refused(why or "asked for whole evaluations")
        if way == "crops":
            raise Refused("asked for crops")
        found = _followed(score, x, boxes, patch, label, forced=way == "windows")
    except (DeadlineExceeded, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError):
        raise
    except _NotFinite as odd:
        raise ValueError(str(odd)) from None
    except Refused as refused:
        _otherwise(label, str(refused))
    except (
        Exception
    ) as error:  # what no window can go through; whole evaluation says whether it is more than that
        _otherwise(label, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    else:
        return found
    return None


class _NotFinite(Exception):
    pass


def _otherwise(label: str, why: str) -> None:
    way = current().evaluation
    if way in ("windows", "crops"):
        raise ValueError(
            check.problem(
                label,
                f"a score that can be evaluated by {way}",
                f"one that cannot: {why}",
                'Leave it to execution(evaluation="auto")',
            )
        )
    note("evaluation", f"{label}: whole evaluations ({why}).", evaluation="whole", why=why)


def _obstacle(x: Tensor) -> str:
    if levels.depth():
        return "under vmap or grad"
    if levels.fake(x):
        return "a dry run"
    if x.requires_grad and torch.is_grad_enabled():
        return "somebody asks for gradients"
    if current().precision is not None:
        return "reduced precision"
    return ""


def _extent(box: Box) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in box)


def _common(boxes: Sequence[Box], shape: Sequence[int]) -> tuple[Any, list[Box]]:
    """Boxes of one size, within the border, that hold those given."""
    size = np.max([_extent(b) for b in boxes], axis=0)
    lo = np.minimum(np.array([[s.start for s in b] for b in boxes]), np.array(shape) - size)
    return lo, [tuple(slice(int(a), int(a + n)) for a, n in zip(row, size, strict=True)) for row in lo]


def _followed(
    score: Callable[[Tensor], Tensor], x: Tensor, boxes: Sequence[Box], patch: Patch, label: str, forced: bool
) -> Changed:
    shape = tuple(x.shape)
    real = [j for j, box in enumerate(boxes) if all(n > 0 for n in _extent(box))]
    if not real:
        raise Refused("nothing is changed")
    follow = Followed(score, x)

    def evaluated(numbers: Sequence[int]) -> Tensor:
        lo, wide = _common([boxes[j] for j in numbers], shape)
        return follow(lo, torch.stack([patch(j, box) for j, box in zip(numbers, wide, strict=True)]))

    # The change nearest to the centre reaches most. Beside it the image itself, in the same box.
    middle = np.array(shape) / 2
    first = min(
        real,
        key=lambda j: sum(abs((s.start + s.stop) / 2 - m) for s, m in zip(boxes[j], middle, strict=True)),
    )
    lo, (wide,) = _common([boxes[first]], shape)
    here = torch.stack([x[wide], patch(first, wide)])
    clean, central = follow(np.repeat(lo, 2, 0), here)
    share = follow.run.cost / 2 / max(follow.run.whole, 1.0)
    if not forced:
        if follow.run.whole < SMALL:
            raise Refused("a network so small that whole evaluations are as fast")
        if 3 + share * len(real) > WORTHWHILE * len(real):
            raise Refused(_too_wide(share, len(real), follow.run.global_ops))
    _compare(score, x, wide, here[1], clean, central)
    note(
        "evaluation",
        f"{label}: {len(real)} changes window by window, the central one at {share:.3f} of a whole evaluation.",
        evaluation="windows",
        share=share,
        operators=len(follow.run.names),
    )
    numbers = sorted(real, key=lambda j: _class(boxes[j], shape))
    values = clean.repeat(len(boxes))

    def absorb(_: None, new: Tensor, piece: Tensor) -> None:
        odd = (~torch.isfinite(new)).nonzero().flatten().tolist()
        if odd:
            raise _NotFinite(
                check.problem(
                    label,
                    "a finite score for every perturbation",
                    f"NaN or infinity for perturbation {int(piece[odd[0]])}",
                    "Look at the network's answer to it: a division by zero, a logarithm of zero, an overflow",
                )
            )
        values[piece] = new

    stream.fold(
        lambda piece: evaluated(piece.tolist()),
        torch.tensor(numbers, device=x.device),
        absorb,
        None,
        label=label,
        partial=True,
        chunk=_at_once(follow.run, x.device),
    )
    return Changed(clean, values)


def _too_wide(share: float, count: int, global_ops: set[str]) -> str:
    why = f"{count} changes that each reach {100 * share:.0f} % of the work"
    return why + (f", through {', '.join(sorted(global_ops))}" if global_ops else "")


def _class(box: Box, shape: Sequence[int]) -> tuple[int, ...]:
    """Boxes as near to the borders, of one size, go together: they reach as far."""
    near = [min(s.start, n - s.stop) for s, n in zip(box, shape, strict=True)]
    return (*_extent(box), *near, *(s.start for s in box))


def _at_once(run: Run, device: torch.device) -> int:
    settings = current()
    if settings.chunk is not None:
        return settings.chunk
    # The first run held two; operators hold as much again while they work.
    each = max(1, run.peak)
    allowed = memory.budget(device, settings.memory)
    if settings.memory is None and device.type == "cpu":
        allowed *= 2
    return max(1, min(MOST_AT_ONCE, allowed // each))


def _compare(
    score: Callable[[Tensor], Tensor], x: Tensor, box: Box, patch: Tensor, clean: Tensor, central: Tensor
) -> None:
    """Refuse if a whole evaluation says something else: an operator may be local in an unforeseen way."""
    other = x.clone()
    other[box] = patch
    with torch.no_grad():
        whole = torch.stack([score(t) for t in (x, other)]).to(torch.float64)
    here = torch.stack([clean, central]).to(torch.float64)
    odd = ~torch.isfinite(whole)
    scale = whole.abs().masked_fill(odd, 0).max().clamp(min=torch.finfo(torch.float32).tiny)
    if bool(odd.any()):
        return  # named with its number when it is met
    if not bool(((here - whole).abs() <= ROUNDING.get(x.dtype, 1e-4) * scale).all()):
        raise Refused(f"window by window {here.tolist()}, as a whole {whole.tolist()}")
