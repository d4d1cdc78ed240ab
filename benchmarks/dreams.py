"""Dreams: a step of one against a gradient, and the memory of few and of many steps.

The real network, an objective at its output. Claims: a step takes at most 1.15 gradients, with a plain step and with
Adam, waves, jitter and total variation; 8 times as many steps take no more memory, within 5 %.
"""

import esegeta as eg
from _measure import arguments, interleaved, ratio_table, real_task, setting, table
from esegeta import dreams
from esegeta.engine.memory import Live


def peak(run):
    """The most bytes of tensors that live at once."""
    with Live() as live:
        run()
    return live.peak


def main():
    options = arguments(__doc__, size=64)
    task = real_task(options.size)
    steps = 2 if options.quick else 8
    objective = eg.reducers.class_mean(eg.from_module(task.net), 1)
    gradient = eg.gradient(objective)
    parts = {
        "parametrisation": dreams.parametrisations.fourier(),
        "distortions": [dreams.distortions.jitter(4)],
        "penalties": [(1e-5, dreams.regularisers.total_variation())],
    }

    def gradients():
        for _ in range(steps):
            gradient(task.x)
        return objective(task.x)  # as a dream ends with its value

    plain = dreams.ascend(objective, task.x, steps=steps, optimiser=dreams.optimisers.sgd(0.1))
    whole = dreams.ascend(objective, task.x, steps=steps, **parts)
    print(f"{steps} steps, {setting(options)}\n")
    times = interleaved({"gradients": gradients, "plain": plain, "all parts": whole}, options.repeats)
    ratio_table(times, [(name, "gradients", "at most 1.15") for name in ("plain", "all parts")])
    few, many = (peak(dreams.ascend(objective, task.x, steps=n, **parts)) for n in (2, 16))
    print()
    table(
        ("steps", "peak memory", "claim"),
        [("2", f"{few >> 20} MiB", ""), ("16", f"{many >> 20} MiB", f"{many / few:.3f} times, at most 1.05")],
    )


if __name__ == "__main__":
    main()
