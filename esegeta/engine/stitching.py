r"""Run a model patch by patch: tiles that cover an image, and sums over them that stream in every derivative.

With :math:`E_i` that cuts tile i out of an image, its transpose that puts it back among zeros, and weights
:math:`w_i` that sum to one at every element, a stitched answer is a sum over tiles. So is each of its derivatives:

.. math::
    y = \sum_i E_i^T w_i f(E_i x), \qquad
    J^T g = \sum_i E_i^T J_f(E_i x)^T w_i E_i g, \qquad
    J t = \sum_i E_i^T w_i J_f(E_i x) E_i t

``Stitched`` is that sum for any operation on patches. Its derivatives are such sums for the derivatives of the
operation, so that nothing but the images themselves is kept between orders: memory is that of the images and of
the few patches that are in work.
"""

import contextlib
import contextvars
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from esegeta.engine import check, crops, folded, layout, levels, progress, stream, visits
from esegeta.engine.execution import DeadlineExceeded, current
from esegeta.engine.folded import Op, Run
from esegeta.engine.gradient import value_gradients_and_more
from esegeta.engine.interception import observe
from esegeta.engine.locality import Locality, NotLocal, hear, listening
from esegeta.engine.operators import Tracer
from esegeta.engine.refusals import Refused
from esegeta.engine.tiles import Tiling, cropped_by, cut, margins_of, padded_by, patch_of
from esegeta.engine.windows import Missing, NotFollowed, TooWide, Unforeseen, Window, fit, region

T = TypeVar("T")
Row = tuple[int, int]  # the number of an image, and of a tile

WHERE = "sliding_window"

# What is put in place of a stitched answer while somebody asks how the score hangs on it.
_answering: contextvars.ContextVar[Callable[["SlidingWindow", Tensor], Tensor] | None] = (
    contextvars.ContextVar("esegeta_answering", default=None)
)


class InTiles(Refused):
    """A place inside of a stitched answer: there are activations of tiles, and none of the whole image."""


def streamed(
    name: str,
    todo: Sequence[Row],
    patch: Tensor,
    work: Callable[[Sequence[Row]], tuple[Tensor, ...]],
    absorb: Callable[[Sequence[Row], tuple[Tensor, ...]], None],
) -> None:
    """Work on rows, as many at a time as memory allows, and absorb what comes out; ``patch`` is one like them."""
    total, done = len(todo), 0
    plan = stream.Plan(total)
    if not plan.measured and not layout.lonely(patch[None]):
        plan.size = 1  # a pair of these is no faster
    with torch.no_grad(), progress.loop(name) as bar:
        while done < total:
            if current().left() <= 0:
                raise DeadlineExceeded(
                    f"{name}: the deadline passed after {done} of {total} patches, and a part of them has no "
                    "meaning of its own. Allow more time, or larger patches with less overlap."
                )
            size = min(plan.size, total - done)
            rows = todo[done : done + size]
            # The inside of a patch is nobody's to observe: places and reach are those of the whole.
            with progress.step(bar, done / total, (done + size) / total), visits.aside(), listening():
                ys = plan.attempt(lambda piece: work(piece[1]), (patch, rows), size, name)
            if ys is None:  # out of memory: the plan is smaller now
                continue
            absorb(rows, ys)
            done += size
            bar.at(done / total)
            del ys
            if levels.fake(patch) and done > size:
                break  # a dry run: patches after the second lot occupy no more


class Stitched(Op):
    """The sum over tiles of an operation on patches; its derivatives are the sums of the operation's.

    ``of`` makes the operation from a list of one: the weights of the tiles (n,1,*patch) that it is going to run
    on. Inputs and outputs are batches (B,C,*S) on the same grid.
    """

    def __init__(self, of: Callable[[list[Tensor]], Op], name: str, tiling: Tiling) -> None:
        self.of, self.name, self.tiling = of, name, tiling
        self.linear: int | None = None  # from which input on the result is linear
        # On a GPU, autograd's own thread runs the derivatives. It knows nothing of settings and progress here.
        self.thread, self.context = threading.get_ident(), contextvars.copy_context()

    def run(self, run: Run, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Return values on a plain batch, a few patches at a time; no graph is kept."""
        if threading.get_ident() == self.thread:
            return self._stream(*xs)
        return self.context.copy().run(self._stream, *xs)

    def pullback(
        self,
        count: int,
        wanted: tuple[int, ...],
        given: tuple[int, ...],
        run: Run | None = None,  # noqa: ARG002
    ) -> Op:
        """Return the sum of the patches' own pullbacks: each runs forward again, and back."""
        return self._derived(f"gradient of {self.name}", count, lambda op: op.pullback(count, wanted, given))

    def pushforward(self, count: int) -> Op:
        """Return the sum of the patches' own pushforwards."""
        return self._derived(f"pushforward of {self.name}", count, lambda op: op.pushforward(count))

    def _derived(self, name: str, count: int, derive: Callable[[Op], Op]) -> Op:
        of = self.of
        made = Stitched(lambda weights: derive(of(weights)), name, self.tiling)
        made.linear, made.thread, made.context = count, self.thread, self.context
        return made

    def _stream(self, *xs: Tensor) -> tuple[Tensor, ...]:
        sums: list[Tensor] = []
        kinds: list[torch.dtype] = []

        def absorb(rows: Sequence[Row], ys: tuple[Tensor, ...]) -> None:
            if not sums:
                kinds.extend(y.dtype for y in ys)
                sums.extend(self._nothing(xs[0], y) for y in ys)
            for row, *parts in zip(rows, *ys, strict=True):
                for whole, part in zip(sums, parts, strict=True):
                    self._put(whole, row, part)

        streamed(
            self.name, self._rows(xs), self._box(xs[0], (0, 0)), lambda rows: self._patches(rows, xs), absorb
        )
        return tuple(s.to(kind) for s, kind in zip(sums, kinds, strict=True))

    def _rows(self, xs: tuple[Tensor, ...]) -> list[Row]:
        """Which tiles of which examples to run: of a derivative those that a tangent or cotangent reaches."""
        rows = list(itertools.product(range(len(xs[0])), range(len(self.tiling.boxes))))
        if self.linear is None or levels.fake(xs[0]):
            return rows
        given = [self._box(x, row).count_nonzero() for row in rows for x in xs[self.linear :]]
        reached = torch.stack(given).reshape(len(rows), -1).any(1).tolist()
        return [row for row, some in zip(rows, reached, strict=True) if some] or rows[:1]

    def _box(self, x: Tensor, row: Row) -> Tensor:
        return cut(x[row[0]], self.tiling.boxes[row[1]])

    def _put(self, whole: Tensor, row: Row, part: Tensor) -> None:
        self._box(whole, row).add_(part)

    def _patches(self, rows: Sequence[Row], xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        weights = [torch.stack([self.tiling.weight(i)[None] for _, i in rows])]
        try:
            return self.of(weights).run(Run(), tuple(self._cut(x, rows) for x in xs))
        finally:
            weights.clear()  # a pullback refers to itself, and lives on until it is collected

    def _cut(self, x: Tensor, rows: Sequence[Row]) -> Tensor:
        return torch.stack([self._box(x, row) for row in rows])

    def _nothing(self, x: Tensor, y: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        return torch.zeros((len(x), y.shape[1], *x.shape[2:]), dtype=wide, device=y.device)


class Gathered(Stitched):
    r"""The sum over tiles of amounts on the grid of a layer: (n,D,*U) of a batch of patches, (B,D,*V) of images.

    The layer of the whole image has units of the same size s as that of a patch, as many as cover the image. A unit
    of a tile gives to the units that it lies on, to each the part that lies there: sums stay what they are, and where
    tiles begin at multiples of s every unit is one of the whole.
    """

    def pullback(self, *_: Any, **__: Any) -> Op:
        """Refuse: what was found in tiles is not differentiated."""
        raise NotImplementedError(
            check.problem(
                WHERE,
                "maps of layers that are looked at",
                "a derivative of what was found at a layer in the patches of a stitched answer",
                "Explain the input, or take the network without tiles",
            )
        )

    pushforward = pullback

    def _put(self, whole: Tensor, row: Row, part: Tensor) -> None:
        ends = [(s.start, s.stop - s.start) for s in self.tiling.boxes[row[1]]]
        sides = []
        for (start, size), units in zip(ends, part.shape[1:], strict=True):
            first, rest = divmod(start * units, size)  # in units of the layer
            here, next_one = (slice(first + k, first + k + units) for k in (0, 1))
            sides.append([(here, 1 - rest / size), (next_one, rest / size)][: 2 if rest else 1])
        for corner in itertools.product(*sides):
            share = math.prod(part_of for _, part_of in corner)
            cut(whole[row[0]], tuple(place for place, _ in corner)).add_(part, alpha=share)

    def _nothing(self, x: Tensor, y: Tensor) -> Tensor:
        grid, size = x.shape[2:], [s.stop - s.start for s in self.tiling.boxes[0]]
        wide = torch.promote_types(y.dtype, torch.float32)
        units = [-(-n * u // p) for n, u, p in zip(grid, y.shape[2:], size, strict=True)]
        return torch.zeros((len(x), y.shape[1], *units), dtype=wide, device=y.device)


def beneath(depth: int, work: Callable[[], T]) -> T:
    """Work below that many empty levels of vmap.

    Levels have numbers, and those that enclose us are put away while an operation runs. Without others in their
    place our own vmap would take their numbers, and a tensor of theirs for its own.
    """
    found: list[T] = []

    def innermost(z: Tensor) -> Tensor:
        found.append(work())
        return z

    step: Callable[[Tensor], Tensor] = innermost
    for _ in range(depth):
        step = functools.partial(_one_deeper, step)
    step(torch.zeros(()))
    return found[0]


def _one_deeper(step: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return vmap(step)(z[None])[0]


class SlidingWindow:
    """A model that runs another one on tiles of its input. Made by ``esegeta.models.sliding_window``."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        patch: int | tuple[int, ...],
        overlap: float | int,
        weights: str | Tensor,
        steps: str,
    ) -> None:
        self.model, self.patch, self.overlap, self.weights, self.steps = model, patch, overlap, weights, steps

    def __repr__(self) -> str:
        kind = check.describe(self.weights) if isinstance(self.weights, Tensor) else repr(self.weights)
        return f"sliding_window({name_of(self.model)}, {self.patch}, overlap={self.overlap}, weights={kind})"

    def __call__(self, x: Tensor) -> Tensor:
        """The stitched answer (K,*S) for one image (C,*S)."""
        if isinstance(x, Window):
            return self._in_windows(x)
        hear(self, (x,))
        answer = _answering.get()
        if answer is not None:
            return answer(self, x)
        session = visits.current()
        if session is None:
            return self._stitched(x)
        if session.tracer is None or session.listing is not None or any(view.edits for view in session.views):
            raise InTiles(
                check.problem(
                    WHERE,
                    "a score whose inside is left alone",
                    "one whose places are looked at",
                    "Patches run apart, so a layer has activations of patches and none of the whole image that "
                    "could be listed, changed or cut at. Class activation maps, excitation backpropagation and "
                    "conductance are made of those of the patches; for other layer methods explain patches with "
                    "esegeta.models.patchwise, or take the network without tiles",
                )
            )
        with visits.aside():
            return self._rewritten(x, session.tracer)

    def _rewritten(self, x: Tensor, tracer: Tracer) -> Tensor:
        """Stitch with the rules of a rewrite in every patch: a stitched answer is a sum, through which all rules go.

        A rule that compares with a reference has that of its own patch, which is cut out beside it.
        """
        if not tracer.is_data(x):
            return self._stitched(x)
        rewrite, note, notes = tracer.rewrite, tracer.notes.get(x), [None]
        if not getattr(rewrite, "tiled", True):
            raise check.refused(
                rewrite.name,
                "a network without tiles: its rules share one amount among all of the answer",
                "a stitched answer, of which every patch would share one of its own",
                f"Take the method at a layer, esegeta.{rewrite.name}_backprop(score, place)",
            )
        twin = tracer.twin(x) if rewrite.paired else None

        def looked(own: Tensor) -> Tensor:
            session = visits.current()
            assert session is not None
            assert session.tracer is not None
            if note is not None:
                session.tracer.notes[own] = note
            y = self.model(own)
            notes[:] = [session.tracer.notes.get(y)]  # of code, and so the same for every patch
            return y

        def ruled(patch: Tensor) -> Tensor:
            own, *others = patch.chunk(2) if rewrite.paired else (patch,)
            others = [other.detach() for other in others]
            return observe(rewrite.name, looked, (own,), (), rewrite=rewrite, references=others)[0]

        inner = SlidingWindow(ruled, self.patch, self.overlap, self.weights, self.steps)
        y = inner._stitched(x if twin is None else torch.cat([x, twin]))
        tracer.mark(y, None if twin is None else self._stitched(twin))
        if notes[0] is not None:
            tracer.notes[y] = notes[0]
        return y

    def gathered(self, work: Callable[..., tuple[Tensor, ...]], *images: Tensor) -> tuple[Tensor, ...]:
        """Return the sums over tiles of what ``work`` finds at layers, on the grids of these layers.

        Args:
            work: of a few tiles, ``(weights (n,1,*patch), *patches (n,C,*patch)) -> `` amounts (n,D,*U), several of
                them.
            images: (C,*S), cut into patches alike.
        """
        grid = tuple(images[0].shape[1:])
        patch = patch_of(WHERE, self.patch, images[0])
        if any(map(any, margins_of(grid, patch))):
            raise check.refused(
                WHERE,
                f"an image of at least {patch}, one patch, where layers are looked at",
                str(grid),
                "Put it into zeros of that size first (torch.nn.functional.pad), or take a smaller patch",
            )
        tiling = Tiling(grid, patch, self.overlap, self.weights, self.steps, levels.base(images[0]))
        depth = levels.depth()

        def of(weights: list[Tensor]) -> Op:
            def run(*patches: Tensor) -> tuple[Tensor, ...]:
                return beneath(depth, lambda: work(weights[0], *patches))

            return Op(run, f"layers of {name_of(self.model)}")

        op = Gathered(of, WHERE, tiling)
        found = folded.FoldedCall.apply(op, Run(), *(image.unsqueeze(0) for image in images))
        return tuple(t.squeeze(0) for t in found)

    def _stitched(self, x: Tensor) -> Tensor:
        patch = patch_of(WHERE, self.patch, check.floating(WHERE, "the image", x))
        margins = margins_of(x.shape[1:], patch)
        padded = padded_by(margins, x)
        tiling = Tiling(padded.shape[1:], patch, self.overlap, self.weights, self.steps, levels.base(x))
        op = Stitched(functools.partial(self._of_patches, levels.depth()), WHERE, tiling)
        (y,) = folded.FoldedCall.apply(op, Run(), padded.unsqueeze(0))
        return cropped_by(margins, y.squeeze(0))

    def _in_windows(self, x: Window) -> Tensor:
        """Run on the tiles that a change touches: what they say now, less what they said before."""
        run, grid = x.run, tuple(x.shape[1:])
        patch = patch_of(WHERE, self.patch, x)
        if any(map(any, margins_of(grid, patch))):
            raise NotFollowed("an image smaller than the patch")
        if run.counting:
            raise Unforeseen  # the patches' own network runs on values only; what it may cost is looked at below
        step = run.next(WHERE)
        tiling = Tiling(grid, patch, self.overlap, self.weights, self.steps, x.patch)
        touched = [tiling.touched(low[1:], x.extent[1:]) for low in x.lo.tolist()]
        share = 2 * sum(map(len, touched)) / len(touched) / len(tiling.boxes)
        if share > run.most:
            raise TooWide(f"changes that each need {100 * share:.0f} % of the patches")
        if run.recording:
            with torch.no_grad():
                whole = self(x.clean[0])
            run.kept[step] = (whole[None],)
            run.kinds.append(((tuple(whole.shape), whole.dtype),))
            run.read.update((x.at, (step, 0)))
        if step not in run.kept:
            raise Missing
        clean = run.kept[step][0]
        assert clean is not None
        work = crops.OPAQUE * x.shape[0] * math.prod(patch)
        if run.recording:
            run.whole += work * len(tiling.boxes)
        ends = [tiling.around(tiles) for tiles in touched]
        lo, size = fit(np.array([low for low, _ in ends]), np.array([high for _, high in ends]), grid)
        offsets = np.concatenate([np.zeros((len(lo), 1), dtype=np.int64), lo], 1)
        at = [tuple(slice(a, a + n) for a, n in zip(low, size, strict=True)) for low in lo.tolist()]
        out = torch.stack([cut(clean[b % len(clean)], box) for b, box in enumerate(at)])
        todo = [(b, i) for b, tiles in enumerate(touched) for i in tiles]
        run.cost += 2 * work * len(todo)

        def change(rows: Sequence[Row]) -> tuple[Tensor, ...]:
            boxes = [tiling.boxes[i] for _, i in rows]
            places = [np.array([[0, *(s.start for s in box)]]) for box in boxes]
            now = [
                region(crops.one_of(x, b), place, (x.shape[0], *patch))[0]
                for (b, _), place in zip(rows, places, strict=True)
            ]
            before = [cut(x.clean[b % len(x.clean)], box) for (b, _), box in zip(rows, boxes, strict=True)]
            weights = torch.stack([tiling.weight(i)[None] for _, i in rows])
            new, old = vmap(self.model)(torch.stack([*now, *before])).chunk(2)
            return ((new - old) * weights,)

        def absorb(rows: Sequence[Row], ys: tuple[Tensor, ...]) -> None:
            for (b, i), y in zip(rows, ys[0], strict=True):
                where = [
                    slice(t.start - a.start, t.stop - a.start)
                    for t, a in zip(tiling.boxes[i], at[b], strict=True)
                ]
                cut(out[b], tuple(where)).add_(y)

        streamed(WHERE, todo, cut(x.clean[0], tiling.boxes[0]), change, absorb)
        made = Window(run, (step, 0), tuple(clean.shape[1:]), clean, offsets, out)
        if run.commits is not None:
            run.commits.append(made)
        return made

    def _of_patches(self, depth: int, weights: list[Tensor]) -> Op:
        def weighted(patches: Tensor) -> tuple[Tensor, ...]:
            y: Any = beneath(depth, lambda: self._on(patches))
            if not isinstance(y, Tensor) or y.ndim != patches.ndim or y.shape[2:] != patches.shape[2:]:
                got = check.describe(y[0]) if isinstance(y, Tensor) else check.describe(y)
                raise check.refused(
                    WHERE,
                    f"a model whose output (K,*S) lies on the grid {tuple(patches.shape[2:])} of its patch",
                    f"{got} from {name_of(self.model)} for a patch {tuple(patches.shape[1:])}",
                    "Resize the output inside of the model, for example with torch.nn.functional.interpolate",
                )
            return ((y * weights[0]).to(y.dtype),)

        return Op(weighted, name_of(self.model))

    def _on(self, patches: Tensor) -> Tensor:
        why: Exception | None = None
        try:
            y = vmap(self.model)(patches)
            if not isinstance(y, Tensor) or not levels.wrapped(y):
                return y
        except RuntimeError as error:
            if "functorch/" not in str(error):
                raise
            why = error
        raise check.refused(
            WHERE,
            "a model that depends on its image alone",
            f"{name_of(self.model)}, which reads another tensor that vmap or grad is working on",
            "Patches run outside of those: give it fixed weights, one set at a time",
        ) from why

    def locality(self, x: Tensor, allowed: float = math.inf) -> Locality:  # noqa: ARG002
        """Return no locality: what an element reaches depends on its place in the tiles."""
        raise NotLocal("a sliding window's reach depends on where the tiles lie")


class Frozen(NamedTuple):
    """A score that is made of one stitched answer, at an input.

    window: what stitches; x: the image that goes into it; cotangent: the derivative of the score for the answer;
    rest: the score as a function of what is added to the answer, whose inside does not run again.
    """

    window: SlidingWindow
    x: Tensor
    cotangent: Tensor
    rest: Callable[[Tensor], Tensor]


def frozen(where: str, score: Callable[[Tensor], Tensor], x: Tensor) -> Frozen:
    """Run a score and return the stitched answer that it is made of, with the score's derivative there."""
    calls: list[tuple[SlidingWindow, Tensor, Tensor]] = []

    def note(window: SlidingWindow, z: Tensor) -> Tensor:
        with _answers(None):
            y = window(z)
        calls.append((window, z, y))
        return y

    with _answers(note):
        score(x)
    if len(calls) != 1:
        raise check.refused(
            where,
            "a score that stitches one answer, where layers are looked at",
            f"{name_of(score)}, which stitches {len(calls)}",
            "Put what is done several times (mirroring, an ensemble) inside of the model of a patch, or explain each",
        )
    ((window, z, y),) = calls

    def rest(change: Tensor) -> Tensor:
        with _answers(lambda *_: y + change):
            return score(x)

    zero = torch.zeros(y.shape, dtype=y.dtype, device=y.device)
    _, (cotangent,), _ = value_gradients_and_more(lambda d: (rest(d), ()), name_of(score))(zero)
    return Frozen(window, z, cotangent, rest)


class _Met(BaseException):
    """The stitched answer has been reached: the rest of the score need not run."""


def met(score: Callable[[Tensor], Any], x: Tensor) -> tuple[SlidingWindow, Tensor]:
    """Run a score or a model as far as its first stitched answer: return what stitches, and its image."""
    found: list[tuple[SlidingWindow, Tensor]] = []

    def stop(window: SlidingWindow, z: Tensor) -> Tensor:
        found.append((window, z))
        raise _Met

    with contextlib.suppress(_Met), _answers(stop):
        score(x)
    return found[0]


@contextlib.contextmanager
def _answers(answer: Callable[[SlidingWindow, Tensor], Tensor] | None) -> Iterator[None]:
    token = _answering.set(answer)
    try:
        yield
    finally:
        _answering.reset(token)


def name_of(model: Callable[..., Any]) -> str:
    """Return how errors call a model."""
    name = getattr(model, "__name__", None) or repr(model)
    return name if len(name) < 60 else f"{name[:57]}..."
