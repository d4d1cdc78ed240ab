"""SmoothGrad: esegeta against captum, and against the fastest loop one would write by hand.

The loop draws its noise with torch.randn. Claims: at least 1.5 times as fast as captum, and at most 5 % slower
than the loop.
"""

import copy
import functools

import torch
from captum.attr import NoiseTunnel, Saliency

import esegeta as eg
from _measure import (
    Task,
    against_claims,
    arguments,
    channels_last,
    contenders,
    real_task,
    setting,
    summed,
)

SIGMA = 0.1


def by_hand(task: Task, samples: int, together: int):
    """Parameters frozen, channels last, no checks."""
    net = copy.deepcopy(task.net).to(memory_format=torch.channels_last_3d).requires_grad_(False)
    score = summed(net, task.mask)

    def run():
        total = torch.zeros_like(task.x)
        for k in range(0, samples, together):
            points = task.x + SIGMA * torch.randn(min(together, samples - k), *task.x.shape)
            points = channels_last(points).requires_grad_()
            (g,) = torch.autograd.grad(score(points).sum(), points)
            total += g.sum(0)
        return total / samples

    return run


def by_captum(task: Task, samples: int, together: int):
    peer = NoiseTunnel(Saliency(task.forward))

    def run():
        x = task.x[None].clone().requires_grad_()
        return peer.attribute(x, nt_samples=samples, nt_samples_batch_size=together, stdevs=SIGMA, abs=False)[
            0
        ]

    return run


def main():
    more = {"samples": {"type": int, "help": "number of gradients (default 24)"}}
    options = arguments(__doc__, size=96, **more)
    samples = options.samples or (8 if options.quick else 24)
    task = real_task(options.size)
    explain = eg.smooth(eg.gradient(task.score), noise=eg.noise.absolute(SIGMA), samples=samples)
    runs = contenders(
        f"SmoothGrad, {samples} samples, {setting(options)}",
        lambda: explain(task.x, key=0),
        functools.partial(by_captum, task),
        functools.partial(by_hand, task),
        samples,
    )
    against_claims(runs, options.repeats)


if __name__ == "__main__":
    main()
