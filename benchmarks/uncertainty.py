"""Uncertainty: draws with dropout against forwards, and the memory of few and of many draws.

The real network, which was trained with its dropout. Claims: a draw takes at most 1.10 forwards, and the memory of
many draws is that of one forward and of the maps: at most 1.10 forwards. What comes before the first dropout is
computed once for all draws, which pays for the masks.
"""

import torch

import esegeta as eg
from _measure import arguments, interleaved, ratio_table, real_task, setting, table
from esegeta import random, uncertainty
from esegeta.engine.memory import Live


def peak(run):
    """The most bytes of tensors that live at once."""
    with Live() as live:
        run()
    return live.peak


def main():
    options = arguments(__doc__, size=64, draws={"type": int, "default": 20, "help": "how many (default 20)"})
    task, count = real_task(options.size), options.draws
    x, plain = task.x, eg.from_module(task.net)
    model = uncertainty.dropout(task.net)

    def forwards():
        with torch.no_grad():
            for _ in range(count // 2):
                torch.func.vmap(plain)(torch.stack([x, x]))  # in pairs, as draws go through small volumes

    def singles():
        with torch.no_grad():
            for _ in range(count):
                plain(x)

    def unrepeated():
        for i in range(count):
            model(x, key=random.fold_in(7, i))

    estimate = uncertainty.monte_carlo(model, samples=count, link="sigmoid")
    draws = lambda: estimate(x, key=7)
    print(f"{count} draws, {setting(options)}\n")
    runs = {"forwards": forwards, "one by one": singles, "draws": draws, "nothing repeated": unrepeated}
    best = "forwards" if options.size <= 72 else "one by one"
    times = interleaved(runs, options.repeats)
    ratio_table(
        times,
        [("draws", best, "at most 1.10"), ("nothing repeated", "one by one", "for comparison")],
    )
    one = peak(lambda: plain(x))
    few, many = (
        peak(lambda n=n: uncertainty.monte_carlo(model, samples=n, link="sigmoid")(x, key=7))
        for n in (2, count)
    )
    print()
    table(
        ("what", "peak memory", "claim"),
        [
            ("one forward", f"{one >> 20} MiB", ""),
            ("2 draws", f"{few >> 20} MiB", f"{few / one:.3f} forwards"),
            (f"{count} draws", f"{many >> 20} MiB", f"{many / one:.3f} forwards, at most 1.10"),
        ],
    )


if __name__ == "__main__":
    main()
