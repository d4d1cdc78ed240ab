"""What the benchmarks share: the real network on a cube of the real head, interleaved timing, tables."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import esegeta as eg
from esegeta import zoo


class Task(NamedTuple):
    """The same score three times: as esegeta wants it, as captum wants it, and what both are made of."""

    net: nn.Module
    x: Tensor
    baseline: Tensor
    mask: Tensor
    score: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor], Tensor]


def arguments(
    description: str, size: int | None = None, repeats: int = 7, **more: dict
) -> argparse.Namespace:
    """Parse ``--size``, ``--repeats`` and ``--quick``, and options of one's own."""
    parser = argparse.ArgumentParser(description=description)
    if size is not None:
        parser.add_argument("--size", type=int, help=f"voxels a side, a multiple of 8 (default {size})")
    parser.add_argument("--repeats", type=int, help=f"rounds of measurement (default {repeats})")
    parser.add_argument("--quick", action="store_true", help="small and few, to see whether it runs")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    options = parser.parse_args()
    options.repeats = options.repeats or (2 if options.quick else repeats)
    if size is not None:
        options.size = options.size or (48 if options.quick else size)
        if options.size % 8 or not 8 <= options.size <= 128:
            parser.error(f"--size: expected a multiple of 8 up to 128, got {options.size}")
    return options


def real_task(size: int) -> Task:
    """The brain extraction network on the central cube of the head, its prediction frozen as the mask."""
    net, x = zoo.brain_extraction_unet(), zoo.head().data
    start = (x.shape[-1] - size) // 2
    x = x[:, start : start + size, start : start + size, start : start + size].contiguous()
    with torch.no_grad():
        mask = net(x[None])[0] > 0
    score = eg.reducers.predicted_class_sum(eg.from_module(net), 1, at=x)
    return Task(net, x, torch.zeros_like(x), mask, score, summed(net, mask))


def summed(net: nn.Module, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """The score of every example of a batch."""
    return lambda batch: torch.where(mask, net(batch), 0).flatten(1).sum(1)


def channels_last(batch: Tensor) -> Tensor:
    """A copy with the channels last. One channel counts as that already, but its strides do not say so."""
    return batch.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def progress(text: str) -> None:
    """One line on stderr that the next one overwrites."""
    if sys.stderr.isatty():
        sys.stderr.write("\r" + text.ljust(100)[:100])
    else:
        sys.stderr.write(text + "\n")
    sys.stderr.flush()


def done() -> None:
    """End the line of ``progress``."""
    if sys.stderr.isatty():
        sys.stderr.write("\r" + " " * 100 + "\r")
        sys.stderr.flush()


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call by the clock and of the processor, which a busy machine disturbs less."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run in every round; each round runs all of them, in turning order.

    Neighbours in time see the same machine, so ratios within a round mean something when times do not.
    """
    names = list(runs)
    for name in names:
        progress(f"warming up: {name}")
        runs[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(repeats):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            progress(f"round {r + 1} of {repeats}: {name}")
            times[name].append(seconds(runs[name]))
    done()
    return times


def ratios(times: dict[str, list[float]], of: str, to: str) -> tuple[float, float, float]:
    """The ratio of the minima, and the least and the median ratio of the rounds."""
    pairs = [a / b for a, b in zip(times[of], times[to], strict=True)]
    return min(times[of]) / min(times[to]), min(pairs), statistics.median(pairs)


def ratio_table(times: dict[str, list[float]], pairs: Sequence[tuple[str, str, str]]) -> None:
    """Print ratios of time for (name of one, name of the other, claim)."""
    rows = [(f"{of} / {to}", *(f"{v:.3f}" for v in ratios(times, of, to)), claim) for of, to, claim in pairs]
    table(("time of / time of", "of minima", "least pair", "median pair", "claim"), rows)


def best(candidates: dict[int, Callable[[], object]], what: str) -> int:
    """The key of the fastest of a few candidates: each is warmed up, then timed twice in turns."""
    times = {key: float("inf") for key in candidates}
    for attempt in range(3):
        for key, run in candidates.items():
            progress(f"choosing the batch of {what}: {key}")
            took = seconds(run)
            if attempt:
                times[key] = min(times[key], took)
    done()
    return min(times, key=lambda key: times[key])


def contenders(
    title: str,
    ours: Callable[[], object],
    captums: Callable[[int, int], Callable[[], object]],
    by_hand: Callable[[int, int], Callable[[], object]],
    count: int,
) -> dict[str, Callable[[], object]]:
    """Three ways to the same ``count`` gradients, the other two in the batch that is fastest for them."""
    theirs = best({b: captums(4, b) for b in (1, 2, 4)}, "captum")
    hand = best({b: by_hand(4, b) for b in (1, 2, 4)}, "the loop")
    print(title)
    print(f"fastest batch of 1, 2, 4: captum {theirs}, loop {hand}\n")
    return {"esegeta": ours, "captum": captums(count, theirs), "loop": by_hand(count, hand)}


def against_claims(runs: dict[str, Callable[[], object]], repeats: int) -> None:
    """Time the three and print the two ratios that are claimed."""
    times = interleaved(runs, repeats)
    ratio_table(times, [("captum", "esegeta", ">= 1.5"), ("esegeta", "loop", "<= 1.05")])


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns: the first to the left, the others to the right."""
    cells = [tuple(map(str, head)), *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    for n, row in enumerate(cells):
        padded = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(padded).rstrip())
        if n == 0:
            print("  ".join("-" * w for w in widths))
    print(flush=True)


def setting(options: argparse.Namespace) -> str:
    """What every measurement depends on."""
    return f"{options.size} voxels a side, {torch.get_num_threads()} threads, torch {torch.__version__}"
