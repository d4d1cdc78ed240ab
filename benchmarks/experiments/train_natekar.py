"""Train the three tumour networks of the zoo on drawn slices, and write their weights.

    python benchmarks/experiments/train_natekar.py                 # all three, into the zoo
    python benchmarks/experiments/train_natekar.py --only tumour_plain --seed 1 --folder /some/where

Each takes some minutes on one core. The same seed gives the same slices, order and initial weights. Weights of other
seeds than 0 are for the intervals of the experiment; they go to ``benchmarks/experiments/weights``.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from esegeta import zoo
from esegeta.zoo.tumour_networks import TumourNetwork, dense_unet, plain_network, residual_unet
from esegeta.zoo.volumes import DATA
from train_torchesegeta import dice, write_safetensors

# The network, and how many steps are enough.
NETWORKS = {
    "tumour_dense_unet": (dense_unet, 500),
    "tumour_residual_unet": (residual_unet, 500),
    "tumour_plain": (plain_network, 500),
}
BATCH, LEARNING_RATE = 8, 1e-2
WEIGHTS = (1.0, 3.0, 2.0, 5.0)  # of the classes in the cross-entropy: rims are thin
SLICES = 400  # keys 0 to 399 are for training; held out are those from 5000 on
HELD_OUT = range(5000, 5048)
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}  # whole tumour, tumour core, enhancing tumour
MORE_WEIGHTS = Path(__file__).with_name("weights")


def slices(keys: range) -> tuple[Tensor, Tensor]:
    """Images and label maps."""
    drawn = [zoo.tumour_slice(key) for key in keys]
    return torch.stack([one.data for one in drawn]), torch.stack([one.labels for one in drawn])


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, in which rare parts count for more, and one less the mean soft Dice of the parts."""
    p = logits.softmax(1)[:, 1:]
    target = functional.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:].to(p.dtype)
    both, sizes = (p * target).sum((0, 2, 3)), (p + target).sum((0, 2, 3))
    weighted = functional.cross_entropy(logits, labels, logits.new_tensor(WEIGHTS))
    return weighted + 1 - ((2 * both + 1) / (sizes + 1)).mean()


def train(name: str, seed: int, steps: int | None) -> TumourNetwork:
    """The network in eval mode, its weights rounded to half precision."""
    build, enough = NETWORKS[name]
    steps = steps or enough
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build().to(memory_format=torch.channels_last)
        optimiser = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, steps, pct_start=0.2)
        xs, labels = slices(range(SLICES))
        rng, running = np.random.default_rng(seed), 0.0
        for step in range(steps):
            chosen = torch.from_numpy(rng.choice(len(xs), BATCH, replace=False))
            x, y = xs[chosen], labels[chosen]
            for axis in (1, 2):
                if rng.random() < 0.5:
                    x, y = x.flip(axis + 1), y.flip(axis)
            optimiser.zero_grad()
            value = loss(net(x.contiguous(memory_format=torch.channels_last)), y)
            value.backward()
            if torch.isfinite(
                nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            ):  # else one step learns nothing
                optimiser.step()
            schedule.step()
            running = 0.95 * running + 0.05 * float(value.detach())
            if (step + 1) % 50 == 0 or step + 1 == steps:
                print(f"{name} {step + 1}/{steps}: loss {running / (1 - 0.95 ** (step + 1)):.3f}", flush=True)
        settle(net, xs)
    return net.half().float().eval().to(memory_format=torch.contiguous_format)


def load(name: str, seed: int = 0) -> nn.Module:
    """A trained network in eval mode: that of the zoo, or one of another seed."""
    if seed == 0:
        return getattr(zoo, name)()
    net = NETWORKS[name][0]()
    weights = zoo.read_safetensors(MORE_WEIGHTS / f"{name}_{seed}.safetensors")
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return net.eval()


def untrained(name: str) -> nn.Module:
    """The network with initial weights and statistics of its activations on slices, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NETWORKS[name][0]()
    settle(net, slices(range(160))[0])
    return net.eval()


def settle(net: nn.Module, xs: Tensor, active: tuple[type[nn.Module], ...] = (nn.BatchNorm2d,)) -> None:
    """Make running statistics the plain mean over 160 slices; without dropout, as one forward is used."""
    net.eval()
    for module in (m for m in net.modules() if isinstance(m, active)):
        module.train()
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for x in xs[:160].split(BATCH):
            net(x)


def overlaps(found: Tensor, labels: Tensor) -> list[float]:
    """Dice of the regions of two label maps; NaN where both have nothing of a region."""
    return [
        dice(sum(found == n for n in numbers) > 0, sum(labels == n for n in numbers) > 0)
        for numbers in REGIONS.values()
    ]


def held_out(net: nn.Module, keys: range = HELD_OUT) -> np.ndarray:
    """Dice (slices, regions) of slices that were not in training."""
    xs, labels = slices(keys)
    with torch.no_grad():
        found = torch.cat([net(x).argmax(1) for x in xs.split(BATCH)])
    return np.array([overlaps(one, truth) for one, truth in zip(found, labels, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=NETWORKS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="by default those that were enough")
    parser.add_argument("--folder", type=Path, help="where the weights go")
    options = parser.parse_args()
    for name in options.only or NETWORKS:
        net = train(name, options.seed, options.steps)
        scores = np.nanmean(held_out(net), axis=0)
        print(f"{name}: held-out Dice", *(f"{r} {s:.3f}" for r, s in zip(REGIONS, scores, strict=True)))
        if math.isfinite(scores[0]):
            file = f"{name}.safetensors" if options.seed == 0 else f"{name}_{options.seed}.safetensors"
            folder = options.folder or (DATA if options.seed == 0 else MORE_WEIGHTS)
            write_safetensors(net.state_dict(), folder / file)


if __name__ == "__main__":
    main()
