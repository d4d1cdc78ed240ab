"""Random numbers from a key against torch's generator.

Claim: beside the gradient of the network that it is drawn for, a normal field takes no more than 5 %. Against
torch.randn alone there is no claim: a hash of every element costs more than a generator with a state.
"""

import torch

import esegeta as eg
from _measure import arguments, interleaved, ratio_table, real_task, setting


def main():
    options = arguments(__doc__, size=96, repeats=9)
    task = real_task(options.size)
    pair = torch.stack([task.x, 0.9 * task.x])
    slope = eg.batched(eg.gradient(task.score))
    shape = (1, options.size, options.size, options.size)
    keys = torch.arange(2)
    many = lambda draw: torch.func.vmap(lambda k: draw(eg.random.fold_in(7, k), shape))

    runs = {
        "normal": lambda: eg.random.normal(7, shape),
        "randn": lambda: torch.randn(shape),
        "uniform": lambda: eg.random.uniform(7, shape),
        "rand": lambda: torch.rand(shape),
        "normal, 2 keys in vmap": lambda: many(eg.random.normal)(keys),
        "2 gradients": lambda: slope(pair),
        "randn of 2": lambda: torch.randn(2, *shape),
    }
    print(f"random fields, {setting(options)}\n")
    times = interleaved(runs, options.repeats)
    ratio_table(
        times,
        [
            ("normal, 2 keys in vmap", "2 gradients", "<= 0.05"),
            ("normal", "randn", ""),
            ("uniform", "rand", ""),
            ("normal, 2 keys in vmap", "randn of 2", ""),
        ],
    )


if __name__ == "__main__":
    main()
