"""Deletion curves part by part and whole, scattered steps against forwards, shared forwards, and an imputation.

The real network on the real head. Blocks of 8 voxels a side within the middle 32: every step changes one of them, and
only what it reaches is computed again. With 64 stops over all voxels every step changes the whole volume, and nothing
can be saved. Ten random maps beside a map are judged on the same perturbed images. Claims, at 128 voxels a side: part
by part takes at most a fifth of whole evaluation, and finds the same curve to 1e-5 of the score; 64 scattered steps
take at most 1.1 times 64 forwards; sets of parts for eleven maps take the forwards of one. An imputation of ROAD
takes less than a second of one core at 64 voxels a side.

Times are of the processor, so that others on the machine count less; with several threads they are of all of them.
"""

import functools
import time

import torch

import esegeta as eg
from _measure import arguments, progress, ratio_table, real_task, setting, table


def timed(runs: dict, repeats: int) -> tuple[dict, dict]:
    """Seconds of every run in every round, in turning order, and what each returned last. No run goes first twice."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names, answers = list(runs), {}
    for r in range(repeats):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            progress(f"round {r + 1} of {repeats}: {name}")
            start = time.process_time()
            answers[name] = runs[name]()
            times[name].append(time.process_time() - start)
    return times, answers


def main() -> None:
    options = arguments(__doc__.splitlines()[0], size=128, repeats=3)
    if options.quick and options.size == 48:
        options.size = 64
    task = real_task(options.size)
    print(setting(options))
    a = eg.input_x_gradient(task.score)(task.x)
    explain = eg.metrics.given(a)
    body = torch.zeros(task.x.shape[1:], dtype=torch.bool)
    side = min(32, options.size // 2)
    start = (options.size - side) // 2
    body[(slice(start, start + side),) * 3] = True

    def by_parts(evaluation: str) -> eg.metrics.Curve:
        blocks = eg.features.grid(8)
        with eg.execution(evaluation=evaluation, progress=False):
            measure = eg.metrics.deletion(explain, task.score, features=blocks, steps=None)
            return measure(task.x, within=body)

    ways = {"part by part": "auto", "whole": "whole"}
    times, found = timed({n: functools.partial(by_parts, way) for n, way in ways.items()}, options.repeats)
    one, two = found["part by part"].values, found["whole"].values
    apart = (one - two).abs().max() / two.abs().max()
    print(f"\ncurves differ by {apart:.1e} of the score; claimed: at most 1e-05\n")
    ratio_table(times, [("whole", "part by part", "at least 5")])

    steps = 16 if options.quick else 64
    scattered = eg.metrics.deletion(explain, task.score, steps=steps - 1)
    shares = torch.linspace(0, 1, steps)

    def forwards() -> None:
        with torch.no_grad(), eg.execution(progress=False):
            eg.batched(lambda share: task.score(share * task.x))(shares)

    def curve() -> None:
        with eg.execution(progress=False):
            scattered(task.x)

    print()
    names = f"{steps} scattered steps", f"{steps} forwards"
    times, _ = timed(dict(zip(names, (curve, forwards), strict=True)), options.repeats)
    ratio_table(times, [(*names, "at most 1.1")])

    print()
    images = [0]

    def counted(x: torch.Tensor) -> torch.Tensor:
        images[0] += 1
        return task.score(x)

    sets = functools.partial(eg.metrics.sensitivity_n, samples=4, features=eg.features.grid(16))
    rows = []
    with eg.execution(progress=False, chunk=1):
        for name, metric in {
            "one map": sets,
            "eleven maps": eg.metrics.calibrated(sets, draws=10, null=eg.metrics.shifted),
        }.items():
            images[0] = 0
            metric(explain, counted)(task.x, key=0)
            rows.append((name, str(images[0])))
    claim = "the same" if rows[0][1] == rows[1][1] else "claimed to be the same"
    table(("judged by 4 sets of parts", "forwards"), [*rows, (claim, "")])

    impute, image = eg.metrics.imputed(), eg.random.normal(0, (1, 64, 64, 64))
    rows = []
    for hidden in (0.1, 0.5, 0.9):
        keep = (eg.random.uniform(1, image.shape) > hidden).to(image.dtype)
        spent, _ = timed({"once": functools.partial(impute, image, 0 * image, keep)}, options.repeats)
        rows.append((f"{hidden:.0%} of 64 cubed", f"{min(spent['once']):.2f}"))
    table(("imputed", "seconds"), [*rows, ("claimed: at most", "1")])


if __name__ == "__main__":
    main()
