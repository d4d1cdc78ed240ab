"""Each method against its limit: so many passes of the network as it needs, at the speed of the fastest raw pass.

A raw pass is what torch does without any library: parameters frozen, nothing checked, in whichever layout and batch
is fastest, found by a trial. Both are measured in the same round, one right after the other.
"""

import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import esegeta as eg
from _measure import channels_last, progress, timed
from _networks import QUICK, SUBJECTS, Subject
from _questions import Aim, Options, Question, Row

STEPS, SAMPLES, RUNS, KERNEL = 16, 8, 64, 130


class Work(NamedTuple):
    """A method on all examples, how many passes of which kind each example needs, and the aims in 3-D and 2-D."""

    what: str
    run: Callable[[Tensor], Any]
    kind: str
    passes: int
    aims: tuple[float, float]


class Raw(NamedTuple):
    """The fastest raw pass: of so many examples at once, in one layout."""

    run: Callable[[], Any]
    batch: int
    layout: str


def works(subject: Subject) -> Iterator[Work]:
    """Everything that has a claim."""
    score, place, xs = subject.score, subject.place, subject.draw(0)
    zero = torch.zeros_like(xs[0])
    others = torch.stack([0.1 * k * xs[0].flip(-1) for k in range(4)])
    labels = eg.features.labels(subject.parts)
    layers = eg.all_places(score, xs[0], grids=True)
    path = (1.05, 1.1)
    lrp, ig = eg.lrp(score, composite="epsilon"), eg.integrated_gradients(score, steps=STEPS)
    smooth = eg.smooth(eg.gradient(score), samples=SAMPLES)
    expected = eg.expected_gradients(score, samples=SAMPLES)
    ablation = eg.feature_ablation(score, features=labels)
    kernel = eg.kernel_shap(score, features=labels, samples=KERNEL)
    of = lambda explain, *shared, key=None: _on_all(explain, shared, key)
    yield Work("gradient", of(eg.gradient(score)), "gradient", 1, path)
    yield Work(f"integrated gradients {STEPS}", of(ig, zero), "gradient", STEPS, path)
    yield Work(f"SmoothGrad {SAMPLES}", of(smooth, key=0), "gradient", SAMPLES, path)
    yield Work(f"expected gradients {SAMPLES}", of(expected, others, key=0), "gradient", SAMPLES, path)
    yield Work("Grad-CAM", of(eg.grad_cam(score, place)), "gradient", 1, path)
    yield Work("Grad-CAM of all layers", of(eg.grad_cam(score, layers)), "gradient", 1, (1.3, 1.3))
    yield Work("guided backprop", of(eg.guided_backprop(score)), "gradient", 1, (1.1, 1.1))
    yield Work("DeepLIFT", of(eg.deep_lift(score), zero), "gradient", 1, (1.6, 1.6))
    yield Work("LRP epsilon", of(lrp), "gradient", 1, (1.4, 1.4))
    yield Work(f"RISE {RUNS}", of(eg.rise(score, samples=RUNS), zero, key=0), "forward", RUNS, (1.1, 1.1))
    yield Work("ablation 64 parts", of(ablation, zero), "forward", 65, (1.1, 1.1))
    yield Work(f"KernelSHAP {KERNEL}", of(kernel, zero, key=0), "forward", KERNEL, (1.1, 1.1))


def _on_all(explain: Any, shared: tuple[Tensor, ...], key: int | None) -> Callable[[Tensor], Any]:
    more = {} if key is None else {"key": key}

    def run(xs: Tensor) -> Any:
        if len(xs) == 1:
            return explain(xs[0], *shared, **more)
        return eg.batched(explain, in_dims=(0, *[None] * len(shared)))(xs, *shared, **more)

    return run


def fastest(subject: Subject, kind: str, most: int, tries: int) -> Raw:
    """Return the fastest raw pass of at most so many examples at once, by a trial of layouts and batches."""
    x = subject.draw(0)[:1]
    found: list[tuple[float, Raw]] = []
    for layout in ("contiguous", "channels last"):
        net = copy.deepcopy(subject.forward).eval().requires_grad_(False)
        if layout == "channels last":
            net.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
        for batch in sorted({b for b in (1, 2, 4, 8, 16, 32) if b <= most}):
            xs = x.expand(batch, *x.shape[1:]).contiguous()
            xs = channels_last(xs) if layout == "channels last" else xs
            run = _gradient(net, xs) if kind == "gradient" else _forward(net, xs)
            run()
            found.append((min(timed(run)[1] for _ in range(tries)) / batch, Raw(run, batch, layout)))
    return min(found, key=lambda pair: pair[0])[1]


def _forward(net: torch.nn.Module, xs: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return net(xs)

    return run


def _gradient(net: torch.nn.Module, xs: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        leaf = xs.detach().requires_grad_()
        return torch.autograd.grad(net(leaf).sum(), leaf)

    return run


def measure(options: Options) -> Iterator[Row]:
    """Measure every method on the three networks."""
    for name, make in (QUICK if options.quick else SUBJECTS).items():
        subject, raws = make(), {}
        for work in works(subject):
            if not options.wants(name, work.what):
                continue
            progress(f"{name}: {work.what}")
            total = len(subject.draw(0)) * work.passes
            most = min(total, 32)
            if (work.kind, most) not in raws:
                raws[work.kind, most] = fastest(subject, work.kind, most, 1 if options.quick else 3)
            yield _row(name, work, subject, raws[work.kind, most], total, options.rounds)


def _row(name: str, work: Work, subject: Subject, raw: Raw, total: int, rounds: int) -> Row:
    ours: list[tuple[float, float]] = []
    limit: list[tuple[float, float]] = []
    with eg.execution(progress=False):
        work.run(subject.draw(0))
        for i in range(rounds):
            xs = subject.draw(i + 1)
            for mine in (True, False) if i % 2 else (False, True):
                # Several raw batches where one is short: a single one would be measured less well than the method.
                if mine:
                    ours.append(timed(lambda xs=xs: work.run(xs)))
                else:
                    times = [timed(raw.run) for _ in range(max(1, min(4, total // raw.batch)))]
                    limit.append(tuple(min(t[w] for t in times) * total / raw.batch for w in (0, 1)))
    pairs = [a[1] / b[1] for a, b in zip(ours, limit, strict=True)]
    least = lambda times, w: min(t[w] for t in times)
    values = {
        "processor": least(ours, 1) / least(limit, 1),
        "clock": least(ours, 0) / least(limit, 0),
        "median": statistics.median(pairs),
    }
    aim = Aim("processor", "<=", work.aims[0 if subject.draw(0).ndim == 5 else 1])
    return Row(
        name, work.what, values, aim, f"{work.passes} x {work.kind}, {raw.batch} at a time, {raw.layout}"
    )


def draw(rows: list[Row]) -> Any:
    """Draw a bar for every method."""
    from _figures import bars

    return bars(rows, "processor", "time of the method / time of its passes", line=1.0)


QUESTION = Question(
    "limit",
    "How close to the limit is each method?",
    "Processor time of the method over that of the passes it needs, each at the speed of the fastest raw pass that a "
    "search over layouts and batches finds. One is the limit; local evaluation and folded norms can go below.",
    measure,
    {"processor": 0.15},
    draw,
)
