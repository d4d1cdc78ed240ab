"""Compare `auto` with whole evaluation where nothing is local, and where something is.

Occlusion of a volume by the evaluation that the engine chooses and by whole evaluations, interleaved: on a network
with instance norm after every convolution, as nnU-Net and DynUNet are built, and on the real network. The first call
of a score includes the decision; later calls know it. Claims: at most 1.1 times as long on the former, also at the
first call; less than half as long on the latter. With its norms frozen, the former is local too: less than half as
long as its whole evaluation with blocks of a sixth of the side; by how much what it says then differs is printed.
"""

import torch
from torch import nn

import esegeta as eg
from _measure import arguments, interleaved, ratio_table, real_task, setting


class Block(nn.Sequential):
    def __init__(self, a, b, stride=1):
        super().__init__(
            nn.Conv3d(a, b, 3, stride, padding=1),
            nn.InstanceNorm3d(b, affine=True),
            nn.Dropout3d(0.1),
            nn.LeakyReLU(0.01, inplace=True),
        )


class Net(nn.Module):
    """Three levels with skips."""

    def __init__(self, width=8):
        super().__init__()
        self.one, self.two, self.three = (
            Block(1, width),
            Block(width, 2 * width, 2),
            Block(2 * width, 4 * width, 2),
        )
        self.up = nn.ModuleList(
            [nn.ConvTranspose3d(4 * width, 2 * width, 2, 2), nn.ConvTranspose3d(2 * width, width, 2, 2)]
        )
        self.join = nn.ModuleList([Block(4 * width, 2 * width), Block(2 * width, width)])
        self.head = nn.Conv3d(width, 2, 1)

    def forward(self, x):
        one = self.one(x)
        two = self.two(one)
        x = self.join[0](torch.cat([self.up[0](self.three(two)), two], 1))
        return self.head(self.join[1](torch.cat([self.up[1](x), one], 1)))


def main():
    options = arguments(__doc__, size=96, repeats=3)
    print(setting(options))
    task = real_task(options.size)
    torch.manual_seed(0)
    normed = eg.from_module(Net().eval())
    known = eg.reducers.class_sum(normed, 1)

    frozen = eg.rules.frozen_norms(known, at=task.x)

    def by(way, make, size):
        def run():
            with eg.execution(evaluation=way, progress=False):
                eg.occlusion(make(), size=size)(task.x, task.baseline)

        return run

    side = options.size // 3
    runs = {
        "instance norm, whole": by("whole", lambda: known, side),
        "instance norm, auto, first call": by("auto", lambda: eg.reducers.class_sum(normed, 1), side),
        "instance norm, auto, later": by("auto", lambda: known, side),
        "frozen norms, plain score, whole": by("whole", lambda: known, options.size // 6),
        "frozen norms, auto": by("auto", lambda: frozen, options.size // 6),
        "real network, whole": by("whole", lambda: task.score, options.size // 6),
        "real network, auto": by("auto", lambda: task.score, options.size // 6),
    }
    times = interleaved(runs, options.repeats)
    ratio_table(
        times,
        [
            ("instance norm, auto, first call", "instance norm, whole", "<= 1.1"),
            ("instance norm, auto, later", "instance norm, whole", "<= 1.1"),
            ("frozen norms, auto", "frozen norms, plain score, whole", "<= 0.5 at 96"),
            ("real network, auto", "real network, whole", "<= 0.5 at 96"),
        ],
    )
    print(eg.rules.norm_deviation(known, size=options.size // 6)(task.x, task.baseline, key=0))


if __name__ == "__main__":
    main()
