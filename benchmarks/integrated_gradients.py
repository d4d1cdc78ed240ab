"""Integrated gradients: esegeta against captum, and against the fastest loop one would write by hand.

Claims: at least 1.5 times as fast as captum, and at most 5 % slower than the loop.
"""

import copy

import numpy as np
import torch
from captum.attr import IntegratedGradients

import esegeta as eg
from _measure import (
    Task,
    arguments,
    best,
    channels_last,
    interleaved,
    ratio_table,
    real_task,
    setting,
    summed,
    table,
)


def by_hand(task: Task, steps: int, together: int):
    """Parameters frozen, channels last, no checks; the score and the quadrature are the same."""
    net = copy.deepcopy(task.net).to(memory_format=torch.channels_last_3d).requires_grad_(False)
    score = summed(net, task.mask)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    nodes = torch.tensor((nodes + 1) / 2, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    weights = torch.tensor(weights / 2, dtype=torch.float32)

    def run():
        line = task.x - task.baseline
        average = torch.zeros_like(task.x)
        for k in range(0, steps, together):
            points = task.baseline + nodes[k : k + together] * line
            points = channels_last(points).requires_grad_()
            (g,) = torch.autograd.grad(score(points).sum(), points)
            average += torch.tensordot(weights[k : k + together], g, 1)
        return line * average

    return run


def by_captum(task: Task, steps: int, together: int):
    peer = IntegratedGradients(task.forward)

    def run():
        x = task.x[None].clone().requires_grad_()
        return peer.attribute(
            x, task.baseline[None], n_steps=steps, method="gausslegendre", internal_batch_size=together
        )[0].detach()

    return run


def main():
    more = {"steps": {"type": int, "help": "number of gradients (default 32)"}}
    options = arguments(__doc__, size=96, **more)
    steps = options.steps or (8 if options.quick else 32)
    task = real_task(options.size)
    batches = (1, 2, 4)
    captums = best({b: by_captum(task, 4, b) for b in batches}, "captum")
    hands = best({b: by_hand(task, 4, b) for b in batches}, "the loop")
    explain = eg.integrated_gradients(task.score, steps=steps)
    runs = {
        "esegeta": lambda: explain(task.x, task.baseline),
        "captum": by_captum(task, steps, captums),
        "loop": by_hand(task, steps, hands),
    }
    print(f"integrated gradients, {steps} steps, {setting(options)}")
    print(f"fastest batch of 1, 2, 4: captum {captums}, loop {hands}\n")

    ours, theirs, hand = (run() for run in runs.values())
    largest = theirs.abs().max()
    table(
        ("difference to captum", "of the largest value"),
        [
            (n, f"{((a - theirs).abs().max() / largest).item():.1e}")
            for n, a in (("esegeta", ours), ("loop", hand))
        ],
    )
    times = interleaved(runs, options.repeats)
    ratio_table(times, [("captum", "esegeta", ">= 1.5"), ("esegeta", "loop", "<= 1.05")])


if __name__ == "__main__":
    main()
