"""Networks of the comparisons with other libraries, each with examples, a score and the same score of a batch."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import esegeta as eg
from esegeta import zoo


class Subject(NamedTuple):
    """A network with its score, for both sides: ``score`` of one example, ``forward`` of a batch."""

    name: str
    net: nn.Module
    score: Callable[[Tensor], Tensor]
    forward: nn.Module
    draw: Callable[[int], Tensor]  # of the number of a round: fresh examples, (n, C, *S)
    place: str
    parts: Tensor  # labels of 64 parts


class Summed(nn.Module):
    """The sum of one class over the places of a mask, or the logit of one class, of every example of a batch."""

    def __init__(self, net: nn.Module, mask: Tensor | None, chosen: int) -> None:
        super().__init__()
        self.net, self.mask, self.chosen = net, mask, chosen

    def forward(self, batch: Tensor) -> Tensor:
        y = self.net(batch)
        if self.mask is None:
            return y[:, self.chosen]
        return (y[:, self.chosen] * self.mask).flatten(1).sum(1)


class UNet2d(nn.Module):
    """Three levels down and up, two convolutions each, batch norm, skips: what people train on slices."""

    def __init__(self, base: int = 16) -> None:
        super().__init__()
        widths = [base, 2 * base, 4 * base, 8 * base]
        self.down = nn.ModuleList([_block(a, b) for a, b in itertools.pairwise([1, *widths])])
        self.pool = nn.ModuleList([nn.MaxPool2d(2) for _ in widths[1:]])  # captum wants no layer used twice
        self.up = nn.ModuleList([nn.ConvTranspose2d(b, a, 2, 2) for a, b in itertools.pairwise(widths)])
        self.join = nn.ModuleList([_block(2 * a, a) for a in widths[:-1]])
        self.out = nn.Conv2d(base, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(self.pool[i - 1](x) if i else x)
            skips.append(x)
        for i in reversed(range(len(self.up))):
            x = self.join[i](torch.cat([self.up[i](x), skips[i]], 1))
        return self.out(x)


def _block(before: int, after: int) -> nn.Module:
    half = [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*half, nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions beside a skip."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm_a, self.relu_a = nn.BatchNorm2d(after), nn.ReLU()
        self.conv_b = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm_b, self.relu_b = nn.BatchNorm2d(after), nn.ReLU()
        same = before == after and stride == 1
        # No Identity: captum's LRP has no rule for it.
        self.skip = None if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_b(self.conv_b(self.relu_a(self.norm_a(self.conv_a(x)))))
        return self.relu_b(y + (x if self.skip is None else self.skip(x)))


class ResNet(nn.Module):
    """A stem, four stages of two residual blocks, a global average and a linear layer: ResNet-18, narrow."""

    def __init__(self, base: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = (
            nn.Conv2d(3, base, 3, 2, 1, bias=False),
            nn.BatchNorm2d(base),
            nn.ReLU(),
        )
        stages, before = [], base
        for i in range(4):
            after = base * 2**i
            stages += [Residual(before, after, 1 if i == 0 else 2), Residual(after, after, 1)]
            before = after
        self.stages = nn.Sequential(*stages)
        self.average, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stages(self.relu(self.norm(self.conv(x))))
        return self.linear(self.average(y).flatten(1))  # no module: captum's LRP has no rule for Flatten


def _drawn(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.running_mean, -0.1, 0.1)
                nn.init.uniform_(m.running_var, 0.5, 1.5)
    return net.eval()


def blocks(shape: tuple[int, ...], along: int) -> Tensor:
    """Labels of blocks, so many along each axis."""
    numbers = torch.zeros(shape, dtype=torch.long)
    for d, n in enumerate(shape):
        at = (torch.arange(n) * along // n).reshape([-1 if k == d else 1 for k in range(len(shape))])
        numbers = numbers * along + at
    return numbers


def brain(side: int = 64) -> Subject:
    """The brain extraction network on a cube of the head, its prediction frozen as the mask."""
    net, head = zoo.brain_extraction_unet(), zoo.head().data
    start = (head.shape[-1] - side) // 2
    x = head[(slice(None), *[slice(start, start + side)] * 3)].contiguous()
    with torch.no_grad():
        mask = (net(x[None])[0] > 0).float()
    score = eg.reducers.predicted_class_sum(eg.from_module(net), 1, at=x)
    draw = lambda i: (x * (1 + 0.01 * i))[None]
    return Subject(
        "brain", net, score, Summed(net, mask[0], 0), draw, "encoder.2.relu_b", blocks(x.shape[1:], 4)
    )


def small(side: int = 16) -> Subject:
    """A tiny 3-D U-Net with random weights, to see whether things run."""
    net = _drawn(lambda: zoo.small_unet(3, classes=2))
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    draw = lambda i: eg.random.normal(300 + i, (1, 1, side, side, side))
    mask = torch.ones(side, side, side)
    return Subject("small", net, score, Summed(net, mask, 1), draw, "bottom", blocks((side, side, side), 4))


def unet(side: int = 128, batch: int = 8) -> Subject:
    """A 2-D U-Net with random weights, the sum of one class."""
    net = _drawn(UNet2d)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    draw = lambda i: eg.random.normal(100 + i, (batch, 1, side, side))
    mask = torch.ones(side, side)
    return Subject("unet", net, score, Summed(net, mask, 1), draw, "down.2", blocks((side, side), 8))


def resnet(side: int = 96, batch: int = 32) -> Subject:
    """A small residual network with random weights, one logit."""
    net = _drawn(ResNet)
    score = eg.reducers.logit(eg.from_module(net), 1)
    draw = lambda i: eg.random.normal(200 + i, (batch, 3, side, side))
    return Subject("resnet", net, score, Summed(net, None, 1), draw, "stages.5", blocks((side, side), 8))


SUBJECTS = {"brain": brain, "unet": unet, "resnet": resnet}
QUICK = {
    "small": small,
    "unet": lambda: unet(16, 2),
    "resnet": lambda: resnet(16, 2),
}
