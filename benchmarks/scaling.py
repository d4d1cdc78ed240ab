"""How time and peak memory grow with steps, samples, side, batch, parts and threads, with fitted slopes.

Ratios to the smallest setting; the slope is that of a line through the logarithms: 1 is proportional, 0 is constant.
Memory is the peak of live tensors, exact and the same every time.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import esegeta as eg
from _measure import progress, timed
from _networks import blocks, brain, resnet, small
from _questions import Aim, Options, Question, Row
from esegeta.engine.memory import Live


class Growth(NamedTuple):
    """A method with a run for each of several sizes; memory that should stay has the aim of 5 %."""

    along: str
    what: str
    sizes: Sequence[int]
    make: Callable[[int], Callable[[], Any]]
    constant_memory: bool = False


def growths(quick: bool) -> Iterator[Growth]:
    """Everything that grows."""
    head = small() if quick else brain(64)
    x, score = head.draw(0)[0], head.score
    zero = torch.zeros_like(x)
    others = torch.stack([zero, x.flip(-1)])
    few = (4, 8) if quick else (8, 32, 128, 256)
    labels = eg.features.labels(blocks(x.shape[1:], 3))
    many = (56, 112) if quick else (64, 512)
    ig = lambda n: eg.integrated_gradients(score, steps=n)
    influence = lambda n: eg.internal_influence(score, head.place, steps=n)
    smooth = lambda n: eg.smooth(eg.gradient(score), samples=n)
    expected = lambda n: eg.expected_gradients(score, samples=n)
    kernel = lambda n: eg.kernel_shap(score, features=labels, samples=n)
    lime = lambda n: eg.lime(score, features=labels, samples=n)
    of = lambda make, *shared, **key: lambda n: lambda: make(n)(x, *shared, **key)
    yield Growth("steps", "integrated gradients", few, of(ig, zero), True)
    yield Growth("steps", "internal influence", few, of(influence, zero), True)
    yield Growth("samples", "SmoothGrad", few, of(smooth, key=0), True)
    yield Growth("samples", "expected gradients", few, of(expected, others, key=0), True)
    yield Growth("samples", "RISE", many, of(lambda n: eg.rise(score, samples=n), zero, key=0), True)
    yield Growth("samples", "KernelSHAP", many, of(kernel, zero, key=0), True)
    yield Growth("samples", "LIME", many, of(lime, zero, key=0), True)
    yield Growth("side", "gradient", (8, 16) if quick else (32, 48, 64, 96), _cube)
    net = resnet(16 if quick else 96, 2 if quick else 32)
    each = eg.batched(eg.gradient(net.score))
    yield Growth(
        "batch", "gradient", (1, 2) if quick else (2, 8, 32), lambda n: lambda: each(net.draw(0)[:n])
    )
    parts = lambda n: eg.features.labels(blocks(x.shape[1:], n))
    ablation = lambda n: lambda: eg.feature_ablation(score, features=parts(round(n ** (1 / 3))))(x, zero)
    yield Growth("parts", "ablation", (8, 27) if quick else (8, 27, 64, 216), ablation)
    threads = sorted({1, 2, os.cpu_count() or 1})
    path = ig(few[0])
    yield Growth(
        "threads", "integrated gradients", threads, lambda n: lambda: _with_threads(n, lambda: path(x, zero))
    )


def _cube(side: int) -> Callable[[], Any]:
    head = brain(side) if side > 16 else small(side)
    return lambda: eg.gradient(head.score)(head.draw(0)[0])


def _with_threads(n: int, run: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n)
        return run()
    finally:
        torch.set_num_threads(before)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0]) if len(set(sizes)) > 1 else float("nan")


def measure(options: Options) -> Iterator[Row]:
    """Measure all sizes of every growth in turns."""
    for growth in growths(options.quick):
        if not options.wants(growth.along, growth.what):
            continue
        runs = {n: growth.make(n) for n in growth.sizes}
        watch = 0 if growth.along == "threads" else 1  # with threads the clock counts, else processor time
        times: dict[int, list[float]] = {n: [] for n in runs}
        memory: list[float] = []
        with eg.execution(progress=False):
            for n, run in runs.items():
                progress(f"{growth.along}: {growth.what}, {n}")
                run()
                with Live() as live:
                    run()
                memory.append(live.peak)
            for _ in range(min(options.rounds, 3)):
                for n, run in runs.items():
                    times[n].append(timed(run)[watch])
        time = [min(times[n]) for n in growth.sizes]
        series = {
            "size": [float(n) for n in growth.sizes],
            "time": [t / time[0] for t in time],
            "memory": [m / memory[0] for m in memory],
        }
        values = {
            "time": series["time"][-1],
            "time slope": slope(growth.sizes, series["time"]),
            "memory": series["memory"][-1],
            "memory slope": slope(growth.sizes, series["memory"]),
        }
        sizes = f"{growth.sizes[0]} to {growth.sizes[-1]}"
        aim = Aim("memory", "<=", 1.05) if growth.constant_memory else None
        yield Row(growth.along, growth.what, values, aim, sizes, series)


def draw(rows: list[Row]) -> Any:
    """Draw time and memory against size, both relative to the smallest."""
    from _figures import curves

    whole = [
        (f"{r.what}, {r.group}", r.series["size"], {k: r.series[k] for k in ("time", "memory")})
        for r in rows
        if r.series
    ]
    return curves(whole, "size", "ratio to the smallest")


QUESTION = Question(
    "scaling",
    "How do time and memory grow?",
    "Ratios of the largest setting to the smallest, and slopes of logarithms: 1 is proportional, 0 is constant. "
    "Whatever samples should need no more memory for more samples. Time is processor time, with threads the clock's.",
    measure,
    {"time": 0.25, "memory": 0.05},
    draw,
)
