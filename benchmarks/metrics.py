"""Deletion curves: part by part against whole evaluation, and scattered steps against as many forwards.

The real network on the real head. Blocks of 8 voxels a side within the middle 32: every step changes one of them, and
only what it reaches is computed again. With 64 stops over all voxels every step changes the whole volume, and nothing
can be saved. Claims: part by part takes at most a fifth of whole evaluation, and finds the same curve to 1e-5 of the
score; 64 scattered steps take at most 1.1 times 64 forwards.
"""

import functools

import torch

import esegeta as eg
from _measure import arguments, interleaved, ratio_table, real_task, setting


def main() -> None:
    options = arguments(__doc__.splitlines()[0], size=128, repeats=3)
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

    one, two = by_parts("auto"), by_parts("whole")
    apart = (one.values - two.values).abs().max() / two.values.abs().max()
    print(f"\ncurves differ by {apart:.1e} of the score; claimed: at most 1e-05\n")
    times = interleaved(
        {
            "part by part": functools.partial(by_parts, "auto"),
            "whole": functools.partial(by_parts, "whole"),
        },
        options.repeats,
    )
    ratio_table(times, [("whole", "part by part", "at least 5")])

    steps = 8 if options.quick else 64
    scattered = eg.metrics.deletion(explain, task.score, steps=steps - 1)
    images = torch.linspace(0, 1, steps).tolist()

    def forwards() -> None:
        with torch.no_grad(), eg.execution(progress=False):
            eg.batched(lambda share: task.score(share * task.x))(torch.tensor(images))

    def curve() -> None:
        with eg.execution(progress=False):
            scattered(task.x)

    print()
    times = interleaved({f"{steps} scattered steps": curve, f"{steps} forwards": forwards}, options.repeats)
    ratio_table(times, [(f"{steps} scattered steps", f"{steps} forwards", "at most 1.1")])


if __name__ == "__main__":
    main()
