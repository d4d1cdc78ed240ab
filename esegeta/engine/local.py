"""The score of images that differ from one image in a small box: exact, and at the price of the box.

A convolutional network sees a change only as far as it reaches. ``changed`` computes the clean activations once and
then, for every change, only what it reaches (``windows``). Whether that pays is decided by counting multiplications,
so that the same call takes the same way every time, and the answer is compared with a whole evaluation once.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta.engine import check, layout, levels, memory, progress, stream
from esegeta.engine import window_operators as window_operators  # puts the operators into their table
from esegeta.engine.execution import DeadlineExceeded, current, note, record_partial
from esegeta.engine.windows import Missing, NotFollowed, Offsets, Run, TooWide, Unforeseen, Window, paste

Box = tuple[slice, ...]
Patch = Callable[[int, Box], Tensor]

# Below this many multiplications for a whole evaluation, calling operators costs more than running them.
SMALL = 3e7
# What a local evaluation may cost of a whole one to be worth its trouble.
WORTHWHILE = 0.6
# Whole evaluations that a local one takes beside its changes: the clean activations, and two to compare with.
BESIDE = 3
# Whole evaluations that it takes at most to find out by running: the clean activations, and a change of everything
# beside none.
PROBING = 3
# What finding out whether it is worth its trouble may cost, of what whole evaluations cost.
DECIDING = 0.1
# What the comparison with a whole evaluation may differ by, relative to the score.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
MOST_AT_ONCE = 64
# Beyond this size the allocator hands out pages that were never touched, which takes as long as filling them.
FRESH_PAGES = 32 * 2**20


@dataclass(frozen=True)
class Changed:
    """The score of the image itself, and of every change of it: NaN where a deadline came first."""

    clean: Tensor
    values: Tensor


class Followed:
    """A score at one image, or at several at once that start alike, followed window by window."""

    def __init__(self, score: Callable[[Tensor], Tensor], x: Tensor, states: int = 1) -> None:
        self.score, self.run, self.states = score, Run(), states
        self.run.differentiable = torch.is_grad_enabled()
        self.shape = tuple(x.shape)
        last = current().layout != "contiguous"
        self.clean = layout.channels_last(x[None]) if last else x[None].clone()
        if states > 1:
            self.clean = _together([self.clean] * states)

    def __call__(self, lo: Offsets, patch: Tensor) -> Tensor:
        """The scores, (B,), of B images that hold these patches at these offsets."""
        if not self.run.names:
            self._record(lo, patch)
        while True:
            try:
                return self._once(self.clean, lo, patch)
            except Missing:
                # These boxes read other activations than those before: compute all again, and keep them too.
                self._record(lo, patch)

    def advance(self, lo: Offsets, patch: Tensor) -> Tensor:
        """Return the scores, (B,), of as many states; what was changed stays changed."""
        self.run.commits = []
        try:
            values = self(lo, patch)
            made = self.run.commits
        finally:
            self.run.commits = None
        for window in made:
            step, i = window.at
            known = self.run.kept.get(step, ())[i : i + 1]
            if known and known[0] is not None:
                paste(known[0], window)
        for b, start in enumerate(lo.tolist()):
            self.clean[b][tuple(slice(a, a + n) for a, n in zip(start, patch.shape[1:], strict=True))] = (
                patch[b]
            )
        return values

    def _record(self, lo: Offsets, patch: Tensor) -> None:
        """Compute the clean activations of every state, and keep those that these boxes read."""
        commits, self.run.commits = self.run.commits, None
        kept = []
        for b in range(self.states):
            self._once(self.clean[b : b + 1], lo[b : b + 1], patch[b : b + 1], record=True)
            self.run.end()
            kept.append(dict(self.run.kept))
        if self.states > 1:
            self.run.kept = {step: _beside([state[step] for state in kept]) for step in kept[0]}
        if commits is not None:
            self.run.commits = []

    def _once(self, clean: Tensor, lo: Offsets, patch: Tensor, record: bool = False) -> Tensor:
        self.run.begin(record)
        if self.run.commits is not None:
            self.run.commits.clear()
        # Where somebody may ask for gradients, what takes part has to show that it has some; it is refused then.
        with contextlib.nullcontext() if self.run.differentiable else torch.no_grad():
            y = self.score(Window(self.run, (-1, 0), self.shape, clean, lo, patch))
        if self.run.refused is not None:
            raise self.run.refused  # the score has caught it
        if not isinstance(y, Window):
            raise NotFollowed("the score does not depend on the image")
        if y.ndim:
            raise NotFollowed("the score is not one number")
        return y.patch.to(torch.float64 if y.patch.is_floating_point() else y.patch.dtype)


def _beside(states: Sequence[tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """The outputs of an operator in every state, each as one tensor."""
    columns = ([t for t in column if t is not None] for column in zip(*states, strict=True))
    return tuple(_together(column) if column else None for column in columns)


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (1, *shape) as one, laid out as they are: ``torch.cat`` would lay it out row by row."""
    first = tensors[0]
    order = sorted(range(1, first.ndim), key=first.stride, reverse=True)
    out = torch.empty_permuted(
        (len(tensors), *first.shape[1:]), (0, *order), dtype=first.dtype, device=first.device
    )
    for row, t in zip(out, tensors, strict=True):
        row.copy_(t[0])
    return out


def changed(
    score: Callable[[Tensor], Tensor], x: Tensor, boxes: Sequence[Box], patch: Patch, *, label: str
) -> Changed | None:
    """Return ``F`` of x with each box changed, or None where whole evaluations are as cheap or the only way.

    Args:
        score: ``(C,*S) -> ()``.
        x: the image.
        boxes: where each change is, over all axes of x; an empty box changes nothing.
        patch: ``(number, box) -> values``: what the changed image holds in a box that contains the change.
        label: what progress bars and errors call the loop.
    """
    asked = current().evaluation
    reasons = [_obstacle(x)]
    for way in ("windows", "crops") if not reasons[0] else ():
        if asked not in ("auto", way):
            continue
        try:
            with _remembered(score, way, x, boxes) as known:
                return _followed(score, x, boxes, patch, label, way, forced=asked == way, known=known)
        except (DeadlineExceeded, MemoryError, torch.OutOfMemoryError):
            raise
        except _NotFinite as odd:
            raise ValueError(str(odd)) from None
        except TooWide as wide:
            reasons.append(str(wide))
            break  # what crops would run on is wider still
        except Exception as error:
            # Nothing can go through like that; whole evaluation says whether it is more.
            reasons.append(f"{way}: {_line(error)}")
    _otherwise(label, "; ".join(filter(None, reasons)) or "asked for whole evaluations")
    return None


def _line(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, (NotFollowed, TooWide)) else f"{type(error).__name__}: {text}"


def walked(
    score: Callable[[Tensor], Tensor],
    start: Tensor,
    boxes: Sequence[Box],
    patch: Callable[[int, int, Box], Tensor],
    orders: Sequence[Sequence[int]],
    *,
    label: str,
) -> Tensor | None:
    """Return ``F`` along walks of changes that stay, (walks, d + 1), or None where whole evaluations are as cheap.

    Every step recomputes what it changes, from the activations that the step before has left. At a deadline the
    steps that are done come back, fewer than d + 1.

    Args:
        score: ``(C,*S) -> ()``.
        start: the image where all walks start.
        boxes: where each of the d changes is.
        patch: ``(walk, step, box) -> values``: what the image of a walk holds in a box after so many steps.
        orders: which change each step of a walk makes.
        label: what progress bars and errors call the loop.
    """
    way = current().evaluation
    try:
        why = _obstacle(start)
        if why or way in ("whole", "crops"):
            raise NotFollowed(why or f"asked for {way}")
        with _remembered(score, "walks", start, boxes) as known:
            return _walked(score, start, boxes, patch, orders, label, forced=way == "windows", known=known)
    except (DeadlineExceeded, MemoryError, torch.OutOfMemoryError):
        raise
    except _NotFinite as odd:
        raise ValueError(str(odd)) from None
    except Exception as error:
        _otherwise(label, _line(error))
    return None


def _walked(
    score: Callable[[Tensor], Tensor],
    start: Tensor,
    boxes: Sequence[Box],
    patch: Callable[[int, int, Box], Tensor],
    orders: Sequence[Sequence[int]],
    label: str,
    forced: bool,
    known: bool,
) -> Tensor:
    shape, count = tuple(start.shape), len(orders)
    whole = tuple(slice(0, min(1, n)) for n in shape)
    boxes = [box if all(n > 0 for n in _extent(box)) else whole for box in boxes]
    # The boxes of the parts differ, so the mean over all is what counts.
    typical = [boxes[j] for j in sorted(range(len(boxes)), key=lambda j: _class(boxes[j], shape))]
    typical = typical[:: max(1, len(boxes) // 4)]
    certain = forced or known or _foreseen(score, start, typical, len(boxes), walks=count)
    follow = Followed(score, start, count)

    def at(step: int) -> tuple[Offsets, Tensor]:
        lo, wide = _common([boxes[order[step - 1]] for order in orders], shape)
        return lo, torch.stack([patch(w, step, box) for w, box in enumerate(wide)])

    lo, wide = _common([boxes[order[0]] for order in orders], shape)
    values = [follow(lo, torch.stack([start[box] for box in wide]))]
    shares = [follow.run.share(count, at_once=count, stays=True)]
    for box in () if certain else typical:
        lo, wide = _common([box] * count, shape)
        follow(lo, torch.stack([start[box] for box in wide]))
        shares.append(follow.run.share(count, at_once=count, stays=True))
    share = sum(shares) / len(shares)
    if not certain:
        _refuse_if_too_wide(follow.run, share, len(boxes))
    note(
        "evaluation",
        f"{label}: {count} walks of {len(boxes)} steps window by window, at {share:.3f} of a whole evaluation.",
        evaluation="windows",
        share=share,
    )
    with progress.loop(label) as bar:
        for step in range(1, len(boxes) + 1):
            if current().left() <= 0:
                record_partial(
                    f"{label}: the deadline passed after {step - 1} of {len(boxes)} steps of a walk.",
                    step - 1,
                    len(boxes),
                )
                break
            values.append(follow.advance(*at(step)))
            bar.at(step / len(boxes))
            if not bool(torch.isfinite(values[-1]).all()):
                raise _NotFinite(
                    check.problem(
                        label,
                        "a finite score after every step",
                        f"NaN or infinity after step {step}",
                        "Look at the network's answer to it: a division by zero, a logarithm of zero, an overflow",
                    )
                )
    return torch.stack(values, 1)


class _NotFinite(Exception):
    pass


def _otherwise(label: str, why: str) -> None:
    way = current().evaluation
    if way in ("windows", "crops"):
        raise check.refused(
            label,
            f"a score that can be evaluated by {way}",
            f"one that cannot: {why}",
            'Leave it to execution(evaluation="auto")',
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
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    boxes: Sequence[Box],
    patch: Patch,
    label: str,
    way: str,
    forced: bool,
    known: bool,
) -> Changed:
    shape = tuple(x.shape)
    real = [j for j, box in enumerate(boxes) if all(n > 0 for n in _extent(box))]
    if not real:
        raise TooWide("nothing is changed")
    first = real[_central([boxes[j] for j in real], shape)]
    if not forced and not known:
        if WORTHWHILE * len(real) <= BESIDE:
            raise TooWide(f"{len(real)} changes, too few to save anything")
        if way == "windows" and not _many(len(real)):
            _foreseen(score, x, [boxes[first]], len(real))
    follow = Followed(score, x)
    follow.run.by_crops = way == "crops"
    if not forced:
        follow.run.most = WORTHWHILE - BESIDE / len(real)
        follow.run.probing = DECIDING * (len(real) + 1) * x.numel()

    def evaluated(numbers: Sequence[int]) -> Tensor:
        lo, wide = _common([boxes[j] for j in numbers], shape)
        return follow(lo, torch.stack([patch(j, box) for j, box in zip(numbers, wide, strict=True)]))

    # The change nearest to the centre reaches most. Beside it the image itself, in the same box.
    lo, (wide,) = _common([boxes[first]], shape)
    here = torch.stack([x[wide], patch(first, wide)])
    clean, central = follow(np.repeat(lo, 2, 0), here)
    at_once = _at_once(follow.run, x.device)
    share = follow.run.share(2, at_once=min(len(real), at_once))
    if not forced:
        _refuse_if_too_wide(follow.run, share, len(real), BESIDE)
    _compare(score, x, wide, here[1], clean, central)
    note(
        "evaluation",
        f"{label}: {len(real)} changes by {way}, the central one at {share:.3f} of a whole evaluation.",
        evaluation=way,
        share=share,
        operators=len(follow.run.names),
    )
    numbers = sorted(real, key=lambda j: _class(boxes[j], shape))
    values = torch.full_like(clean, torch.nan).repeat(len(boxes))
    values[sorted({*range(len(boxes))} - {*real})] = clean  # nothing is changed there

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
        what=stream.MISSING,
        chunk=at_once,
    )
    return Changed(clean, values)


def _central(boxes: Sequence[Box], shape: Sequence[int]) -> int:
    """The number of the box nearest to the centre."""
    off = [sum(abs(s.start + s.stop - n) for s, n in zip(box, shape, strict=True)) for box in boxes]
    return min(range(len(boxes)), key=off.__getitem__)


def _foreseen(
    score: Callable[[Tensor], Tensor], x: Tensor, boxes: Sequence[Box], count: int, walks: int = 0
) -> bool:
    """Refuse what would save little, or cannot be followed, before much is computed; False if that is not known.

    The score is followed on tensors that have a size but no values, with a change in each of these boxes: what is
    counted, and most of what is refused, depends on sizes alone. As that takes its time too, a look at whether the
    network is small comes first. With ``walks`` changes stay, in so many images side by side.
    """
    glance = Followed(score, x)
    glance.run.allowance = SMALL
    try:
        _trace(glance, x, boxes[0])
    except Unforeseen:
        pass
    else:
        _refuse_if_too_wide(glance.run, 0.0, count)
    follow = Followed(score, x.to("meta"))
    follow.run.counting = x.device
    try:
        shares = [_trace(follow, x.to("meta"), box, walks, count, x.device) for box in boxes]
    except Unforeseen:
        return False
    except (NotFollowed, MemoryError):
        raise
    except Exception as error:  # some operators have no form without values
        if _many(count):
            return False
        raise NotFollowed(f"{_line(error)}; {count} changes are too few to find out more") from None
    _refuse_if_too_wide(follow.run, sum(shares) / len(shares), count, BESIDE)
    return True


def _many(count: int) -> bool:
    """Whether to find out by running costs little beside so many whole evaluations."""
    return DECIDING * (count + 1) >= PROBING


def _trace(
    follow: Followed, x: Tensor, box: Box, walks: int = 0, count: int = 1, device: torch.device | None = None
) -> float:
    """Run the score once with a box that is as it was, and say at what share of a whole evaluation."""
    lo, (wide,) = _common([box], x.shape)
    follow._record(lo, x[wide][None])
    at_once = walks or min(count, _at_once(follow.run, device or x.device))
    return follow.run.share(1, at_once=at_once, stays=bool(walks))


# What was decided for a score: None to go ahead, or what to raise. A score that is gone leaves nothing behind.
_Decision = tuple[type[Exception], str] | None
_decided: weakref.WeakKeyDictionary[Any, dict[Any, _Decision]] = weakref.WeakKeyDictionary()
_MOST_DECISIONS = 256


@contextlib.contextmanager
def _remembered(
    score: Callable[[Tensor], Tensor], way: str, x: Tensor, boxes: Sequence[Box]
) -> Iterator[bool]:
    """Refuse what was refused before, and say whether it went ahead before; remember how it ends this time.

    What is decided depends on the sizes of the image and of the changes. Whoever asks for one way by name wants
    to know afresh.
    """
    if current().evaluation != "auto" or not boxes:
        yield False
        return
    box = boxes[_central(boxes, x.shape)]
    at = tuple((s.start, s.stop) for s in box)
    kind = (tuple(x.shape), x.dtype, x.device, current().layout, torch.is_grad_enabled())
    key = (way, kind, at, len(boxes))
    try:
        known = _decided.setdefault(score, {})
    except TypeError:  # a score without identity
        known = {}
    before = known.get(key)
    if before is not None:
        raise before[0](before[1])
    try:
        yield key in known
    except (NotFollowed, TooWide) as why:
        if len(known) >= _MOST_DECISIONS:
            known.clear()
        known[key] = (type(why), str(why))
        raise
    known[key] = None


def _refuse_if_too_wide(run: Run, share: float, count: int, beside: int = 0) -> None:
    """Refuse changes at a share of a whole evaluation each, with some whole ones beside, that save little."""
    if run.whole < SMALL:
        raise TooWide("a network so small that whole evaluations are as fast")
    if beside + share * count > WORTHWHILE * count:
        why = f"{count} changes that each reach {100 * share:.0f} % of the work"
        through = f", through {', '.join(sorted(run.global_ops))}" if run.global_ops else ""
        raise TooWide(why + through)


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
    most = MOST_AT_ONCE
    if device.type == "cpu":
        most = min(most, max(2, 2 * FRESH_PAGES // max(1, run.largest)))
        if settings.memory is None:
            allowed *= 2
    return max(1, min(most, allowed // each))


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
        raise NotFollowed(f"window by window {here.tolist()}, as a whole {whole.tolist()}")
