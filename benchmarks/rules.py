"""What rewritten derivatives cost, against one plain gradient in the same engine and against captum's.

Claims: guided backpropagation within 1.15 of a gradient, DeepLIFT within 1.6, LRP-epsilon within 1.8; captum
takes longer for each that it has.
"""

import warnings

import torch
from captum.attr import DeepLift, GuidedBackprop
from torch import nn

import esegeta as eg
from _measure import arguments, interleaved, ratio_table, real_task, setting


class Summed(nn.Module):
    def __init__(self, net, mask):
        super().__init__()
        self.net, self.mask = net, mask

    def forward(self, batch):
        return torch.where(self.mask, self.net(batch), 0).flatten(1).sum(1)


def main():
    options = arguments(__doc__, size=96)
    task = real_task(options.size)
    x, baseline, score = task.x, task.baseline, task.score
    gradient, guided = eg.gradient(score), eg.guided_backprop(score)
    deep_lift, lrp = eg.deep_lift(score), eg.lrp(score, composite="epsilon")
    summed = Summed(task.net, task.mask)
    # Captum refuses reused activations, of which this network has none.
    their_guided, their_deep_lift = GuidedBackprop(summed), DeepLift(summed)
    runs = {
        "gradient": lambda: gradient(x),
        "guided": lambda: guided(x),
        "DeepLIFT": lambda: deep_lift(x, baseline),
        "LRP-epsilon": lambda: lrp(x),
        "captum guided": lambda: their_guided.attribute(x[None]),
        "captum DeepLIFT": lambda: their_deep_lift.attribute(x[None], baseline[None]),
    }
    print(f"Rules, {setting(options)}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = interleaved(runs, options.repeats)
    ratio_table(
        times,
        [
            ("guided", "gradient", "<= 1.15"),
            ("DeepLIFT", "gradient", "<= 1.6"),
            ("LRP-epsilon", "gradient", "<= 1.8"),
            ("captum guided", "guided", "> 1"),
            ("captum DeepLIFT", "DeepLIFT", "> 1"),
        ],
    )


if __name__ == "__main__":
    main()
