"""What it costs that a module enters through a folded call: time and memory of one batch of gradients.

Rows: the folded call (``from_module``) in its own layout and in the module's; the module's batched autograd,
as it is and in the fastest layout; ``vmap(grad)`` operator by operator. Claim: the folded call takes no more
than 5 % over batched autograd in the same layout, and less time and memory than ``vmap(grad)``.
"""

import copy

import torch
from torch.func import grad, vmap

import esegeta as eg
from _measure import (
    arguments,
    channels_last,
    interleaved,
    progress,
    ratio_table,
    ratios,
    real_task,
    setting,
    summed,
    table,
)
from esegeta.engine.memory import Live


def peak(run) -> int:
    """Bytes of live tensors at the worst moment, measured on the second call."""
    run()
    with Live() as live:
        run()
    return live.peak


def main():
    more = {"batch": {"type": int, "default": 2, "help": "examples at once (default 2)"}}
    options = arguments(__doc__, size=96, **more)
    task = real_task(options.size)
    xs = torch.stack([task.x * (1 - 0.1 * k) for k in range(options.batch)])

    def autograd(net, arrange=torch.clone):
        score = summed(net, task.mask)

        def run():
            leaf = arrange(xs).requires_grad_()
            return torch.autograd.grad(score(leaf).sum(), leaf)[0]

        return run

    fast = copy.deepcopy(task.net).to(memory_format=torch.channels_last_3d).requires_grad_(False)
    folded = vmap(eg.gradient(task.score))
    one = summed(task.net, task.mask)
    by_operators = vmap(grad(lambda x: one(x[None])[0]))

    def contiguous():
        with eg.execution(layout="contiguous"):
            return folded(xs)

    runs = {
        "folded": lambda: folded(xs),
        "folded, contiguous": contiguous,
        "autograd": autograd(task.net),
        "autograd, channels last": autograd(fast, channels_last),
        "vmap(grad)": lambda: by_operators(xs),
    }
    print(f"gradients of a batch of {options.batch}, {setting(options)}\n")
    truth = runs["autograd"]()
    largest = truth.abs().max()
    memory, apart = {}, {}
    for name, run in runs.items():
        progress(f"memory: {name}")
        memory[name] = peak(run)
        apart[name] = ((run() - truth).abs().max() / largest).item()
    times = interleaved(runs, options.repeats)

    rows = []
    for name in runs:
        time = ratios(times, name, "autograd")
        rows.append(
            (
                name,
                *(f"{v:.3f}" for v in time),
                f"{memory[name] / memory['autograd']:.3f}",
                f"{apart[name]:.1e}",
            )
        )
    table(
        ("relative to autograd", "time: of minima", "least pair", "median pair", "live memory", "apart"), rows
    )
    ratio_table(
        times,
        [
            ("folded", "autograd, channels last", "<= 1.05"),
            ("folded, contiguous", "autograd", "<= 1.05"),
            ("folded", "vmap(grad)", "< 1"),
        ],
    )


if __name__ == "__main__":
    main()
