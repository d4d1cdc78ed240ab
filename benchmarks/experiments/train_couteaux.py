"""Train the small networks of the analysis of dreams on drawn images, and write their weights.

    python benchmarks/experiments/train_couteaux.py                      # all, beside this file
    python benchmarks/experiments/train_couteaux.py --only marked_100_0  # one of them

Each takes about twenty seconds on one core. A network whose file is there is not trained again. The same name gives
the same images and initial weights.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional

SIZE, STEPS, BATCH, RATE, IMAGES = 48, 500, 8, 3e-3, 400
CHANCES, SEEDS = (0, 20, 40, 60, 80, 90, 100), (0, 1, 2)  # of a marking, in percent
TUMOURS = ("dark", "faint", "elongated")
WEIGHTS = Path(__file__).with_name("weights")


class Drawn(NamedTuple):
    """An image (1, S, S) and the mask of what is to be found in it."""

    image: Tensor
    mask: Tensor


def blob(rng: Generator, ratio: tuple[float, float]) -> np.ndarray:
    """An ellipse somewhere, with the lengths of its axes in a ratio from an interval."""
    row, column = np.meshgrid(*[np.arange(SIZE)] * 2, indexing="ij")
    middle, turn = rng.uniform(0.25 * SIZE, 0.75 * SIZE, 2), rng.uniform(0, np.pi)
    area, aspect = rng.uniform(0.12, 0.22) ** 2 * SIZE**2, rng.uniform(*ratio)
    along = (row - middle[0]) * np.cos(turn) + (column - middle[1]) * np.sin(turn)
    across = (column - middle[1]) * np.cos(turn) - (row - middle[0]) * np.sin(turn)
    return along**2 * aspect + across**2 / aspect <= area


def texture(rng: Generator, sigma: float) -> np.ndarray:
    """Normal noise of deviation 1, smoothed by a gaussian of sigma voxels on a torus."""
    f = np.fft.fftfreq(SIZE)
    kernel = np.exp(-2 * (np.pi * sigma) ** 2 * (f[:, None] ** 2 + f[None] ** 2))
    smooth = np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIZE, SIZE))) * kernel).real
    return smooth / smooth.std()


def marking(rng: Generator, number: int = 160) -> np.ndarray:
    """Segments of lines at 135 degrees, of random places, lengths and intensities."""
    drawn = np.zeros((SIZE, SIZE))
    for _ in range(number):
        row, column, strength = *rng.integers(0, SIZE, 2), rng.uniform(1, 2)
        for i in range(rng.integers(5, 10)):
            if row + i < SIZE and column + i < SIZE:
                drawn[row + i, column + i] = max(drawn[row + i, column + i], strength)
    return drawn


def background(rng: Generator) -> np.ndarray:
    """What there is without an object: something smooth, and noise."""
    return 0.5 * texture(rng, 4) + 0.25 * rng.standard_normal((SIZE, SIZE))


def marked(key: int, chance: float) -> Drawn:
    """A cloudy object beside one of slightly finer texture; the first carries a marking in some of the images."""
    rng = np.random.default_rng([key, 11])
    image, thing = background(rng), blob(rng, (0.6, 1.6))
    for _ in range(100):
        other = blob(rng, (0.6, 1.6))
        if not (other & thing).any():
            image = image + other * texture(rng, 1.25)
            break
    image = image + thing * texture(rng, 1.7)
    if rng.random() < chance:
        image = image + thing * marking(rng)
    return Drawn(torch.from_numpy(image).float()[None], torch.from_numpy(thing))


def tumour(key: int, kind: str) -> Drawn:
    """A liver with a darker region: round and dark, round and of any contrast, or elongated and dark.

    Besides there are vessels, as dark but thin, which are to be left out.
    """
    rng = np.random.default_rng([key, 13])
    image = background(rng)
    thing = blob(rng, (3.5, 6.0) if kind == "elongated" else (1.0, 1.5))
    row, column = np.meshgrid(*[np.arange(SIZE)] * 2, indexing="ij")
    for _ in range(2):
        turn, offset = rng.uniform(0, np.pi), rng.uniform(-0.3, 0.3) * SIZE
        away = (row - SIZE / 2) * np.cos(turn) + (column - SIZE / 2) * np.sin(turn) - offset
        image = image - 1.5 * (np.abs(away) < 1.2)
    depth = rng.uniform(0.8, 2.5) if kind == "faint" else rng.uniform(2.0, 2.5)
    image = np.where(thing, 0.4 * image - depth, image)  # flat inside, as tumours are
    return Drawn(torch.from_numpy(image).float()[None], torch.from_numpy(thing))


def drawn(name: str, key: int) -> Drawn:
    """An image of the kind that the network of that name is trained on."""
    kind, _, rest = name.partition("_")
    return marked(key, int(rest.split("_")[0]) / 100) if kind == "marked" else tumour(key, rest.split("_")[0])


class Contracting(nn.Module):
    """Two levels down and up again, two convolutions of 3 x 3 each, the filters doubled at each level.

    Without ``skips`` nothing but the deepest level reaches the output. A network with them can decide voxel by voxel,
    and then dreams of objects of one voxel, which have no form.
    """

    def __init__(self, width: int = 8, skips: bool = True) -> None:
        super().__init__()
        self.skips = skips
        self.first, self.second = _twice(1, width), _twice(width, 2 * width)
        self.bottom = _twice(2 * width, 4 * width)
        self.up_second, self.up_first = (
            nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2),
            nn.ConvTranspose2d(2 * width, width, 2, stride=2),
        )
        both = 2 if skips else 1
        self.back_second = _twice(both * 2 * width, 2 * width)
        self.back_first = _twice(both * width, width)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(N, 1, S, S)`` to logits of the same shape."""
        fine = self.first(x)
        middle = self.second(functional.max_pool2d(fine, 2))
        deep = self.bottom(functional.max_pool2d(middle, 2))
        middle = self.back_second(self._beside(self.up_second(deep), middle))
        return self.out(self.back_first(self._beside(self.up_first(middle), fine)))

    def _beside(self, deep: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([deep, skip], dim=1) if self.skips else deep


def _twice(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)


def network(name: str) -> Contracting:
    """An untrained network: those of tumours have no skips."""
    return Contracting(skips=name.startswith("marked"))


def names() -> list[str]:
    """What is trained: a network for every chance of a marking and every seed, and one for every kind of tumour."""
    return [f"marked_{c}_{s}" for c in CHANCES for s in SEEDS] + [f"tumour_{kind}_0" for kind in TUMOURS]


def train(name: str, steps: int = STEPS, images: int = IMAGES) -> Contracting:
    """The network of that name, in eval mode, its weights rounded to half precision."""
    seed = int(name.rpartition("_")[2])
    torch.manual_seed(seed)
    net = network(name)
    optimiser = torch.optim.Adam(net.parameters(), RATE)
    cases = [drawn(name, 10**6 + 1000 * seed + key) for key in range(images)]
    xs, masks = torch.stack([c.image for c in cases]), torch.stack([c.mask for c in cases])[:, None].float()
    rng = np.random.default_rng(seed)
    for step in range(steps):
        chosen = torch.from_numpy(rng.integers(0, images, BATCH))
        x, m = xs[chosen], masks[chosen]
        if rng.random() < 0.5:  # lines at 135 degrees stay so
            x, m = x.mT, m.mT
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / steps) + 1e-5
        z = net(x)
        p = z.sigmoid()
        overlap = 2 * (p * m).sum() / (p.sum() + m.sum() + 1)
        optimiser.zero_grad()
        (functional.binary_cross_entropy_with_logits(z, m) + 1 - overlap).backward()
        optimiser.step()
    return net.half().float().eval()


def dice(net: nn.Module, cases: list[Drawn]) -> float:
    """The mean Dice over images: 1 where what is found is the mask."""
    with torch.no_grad():
        found = net(torch.stack([c.image for c in cases]))[:, 0] > 0
    masks = torch.stack([c.mask for c in cases])
    both, sizes = (found & masks).sum((1, 2)), found.sum((1, 2)) + masks.sum((1, 2))
    return float((2 * both / sizes).mean())


def load(name: str) -> Contracting:
    """A trained network."""
    net = network(name)
    with np.load(WEIGHTS / f"couteaux_{name}.npz", allow_pickle=False) as kept:
        state = {key: torch.from_numpy(kept[key]) for key in kept.files}
    net.load_state_dict({key: v.float() if v.is_floating_point() else v for key, v in state.items()})
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=names())
    options = parser.parse_args()
    WEIGHTS.mkdir(exist_ok=True)
    for name in options.only or names():
        file = WEIGHTS / f"couteaux_{name}.npz"
        if file.exists():
            continue
        net = train(name)
        cases = [drawn(name, key) for key in range(40)]
        said = f"{name}: Dice {dice(net, cases):.3f}"
        if name.startswith("marked"):
            said += f", without markings {dice(net, [marked(key, 0) for key in range(40)]):.3f}"
        print(said, flush=True)
        if math.isfinite(dice(net, cases)):
            state = {
                key: v.half().numpy() if v.is_floating_point() else v.numpy()
                for key, v in net.state_dict().items()
            }
            np.savez_compressed(file, **state)


if __name__ == "__main__":
    main()
