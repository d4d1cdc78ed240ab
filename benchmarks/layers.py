"""Grad-CAM on every layer of the network at once: against one gradient, and against one layer after the other.

Claim: all layers together take at most 1.3 times one forward and backward run.
"""

import esegeta as eg
from _measure import arguments, interleaved, progress, ratio_table, real_task, setting, table
from esegeta.engine.memory import Live


def peak(run) -> int:
    """Bytes of live tensors at the worst moment, measured on the second call."""
    run()
    with Live() as live:
        run()
    return live.peak


def main():
    options = arguments(__doc__, size=96)
    task = real_task(options.size)
    x, score = task.x, eg.reducers.class_mean(eg.from_module(task.net), 1)
    layers = eg.all_places(score, x, grids=True)
    gradient, together = eg.gradient(score), eg.grad_cam(score, layers)
    single = [eg.grad_cam(score, layer) for layer in layers]
    runs = {
        "one gradient": lambda: gradient(x),
        "all layers": lambda: together(x),
        "layer by layer": lambda: [explain(x) for explain in single],
    }
    print(f"Grad-CAM on {len(layers)} layers, {setting(options)}\n")

    apart = 0.0
    for one, several in zip(runs["layer by layer"](), runs["all layers"](), strict=True):
        apart = max(apart, ((one - several).abs().max() / one.abs().max().clamp(min=1e-30)).item())
    memory = {}
    for name, run in list(runs.items())[:2]:
        progress(f"memory: {name}")
        memory[name] = peak(run)
    table(
        ("all layers", ""),
        [
            ("live memory, of one gradient", f"{memory['all layers'] / memory['one gradient']:.3f}"),
            ("difference to layer by layer, of the largest value", f"{apart:.1e}"),
        ],
    )
    # One after the other is many times as slow; it needs no repetition to be seen, and would heat the machine.
    slow = runs.pop("layer by layer")
    times = interleaved(runs, options.repeats)
    times["layer by layer"] = interleaved({"layer by layer": slow}, 1)["layer by layer"]
    ratio_table(times, [("all layers", "one gradient", "<= 1.3")])
    one = min(times["layer by layer"]) / min(times["all layers"])
    table(("layer by layer / all layers", "of minima"), [(f"{len(layers)} layers", f"{one:.1f}")])


if __name__ == "__main__":
    main()
