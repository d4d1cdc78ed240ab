"""Train the three vessel networks of the zoo on drawn vessels, and write their weights.

    python benchmarks/experiments/train_torchesegeta.py                 # all three, into the zoo
    python benchmarks/experiments/train_torchesegeta.py --only vessel_unet --steps 100 --folder /some/where

Each takes some minutes on one core. What was learnt is kept every few steps in ``--checkpoints``; a training that was
stopped goes on from there. The same seed gives the same phantoms, deformations and initial weights.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from esegeta.zoo.phantoms import vessel_phantom
from esegeta.zoo.vessels import PooledUNet, StridedUNet, VesselUNet
from esegeta.zoo.volumes import DATA

# The network, at how many scales it is supervised, whether volumes are deformed, how many steps are enough.
NETWORKS = {
    "vessel_unet": (StridedUNet, 1, False, 80),
    "vessel_unet_mss": (StridedUNet, 4, False, 130),
    "vessel_unet_mss_deformation": (PooledUNet, 4, True, 130),
}
BATCH, SIZE, LEARNING_RATE = 1, 64, 6e-3
PHANTOMS = 60  # keys 0 to 59 are for training; held out are those from 1000 on
HELD_OUT = range(1000, 1008)


def phantoms(folder: Path, count: int = PHANTOMS) -> tuple[Tensor, Tensor]:
    """The images and masks for training, drawn once."""
    file = folder / f"phantoms_{count}.npz"
    if not file.exists():
        drawn = [vessel_phantom(key, SIZE) for key in range(count)]
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(
            file, x=torch.stack([p.data for p in drawn]).half(), m=torch.stack([p.mask[None] for p in drawn])
        )
    kept = np.load(file)
    return torch.from_numpy(kept["x"]).float(), torch.from_numpy(kept["m"]).float()


def turned(x: Tensor, m: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One of the 48 ways to put a cube, and another brightness."""
    axes = [int(a) for a in rng.permutation(3)]
    flips = [2 + a for a in range(3) if rng.random() < 0.5]
    x, m = (t.permute(0, 1, *(2 + a for a in axes)).flip(flips).contiguous() for t in (x, m))
    return x * float(rng.uniform(0.8, 1.2)), m


def deformed(x: Tensor, m: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Move both along one smooth field, by up to some 4 voxels; how far is drawn too."""
    amount = float(rng.uniform(0, 2.0)) * 2 / SIZE  # a deviation of up to 2 voxels, in units of half the cube
    nodes = torch.from_numpy(rng.standard_normal((1, 3, 6, 6, 6)).astype(np.float32)) * amount
    shift = functional.interpolate(nodes, x.shape[2:], mode="trilinear", align_corners=True)
    axes = [torch.linspace(-1, 1, n) for n in x.shape[2:]]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)[None]
    grid = (grid + shift.permute(0, 2, 3, 4, 1)).expand(len(x), -1, -1, -1, -1)
    moved = functional.grid_sample(torch.cat([x, m], dim=1), grid, padding_mode="border", align_corners=True)
    return moved[:, :1], (moved[:, 1:] > 0.5).float()


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy and one less the soft Dice."""
    logits = logits.float()
    p = logits.sigmoid()
    overlap = 2 * (p * target).sum() / (p.sum() + target.sum() + 1)
    return functional.binary_cross_entropy_with_logits(logits, target) + 1 - overlap


class Supervised(nn.Module):
    """The network with an output at each of the last scales; the finest is its own."""

    def __init__(self, net: VesselUNet, scales: int) -> None:
        super().__init__()
        self.net = net
        widths = [level.get_submodule("conv_b").out_channels for level in net.decoder]
        self.coarser = nn.ModuleList([nn.Conv3d(w, 1, 1) for w in widths[-scales:-1]])

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """The weighted loss: half the weight at half the size."""
        found = self.net.scales(x)
        total, weights = loss(self.net.out(found[-1]), target), 1.0
        for head, z in zip(self.coarser, found[-1 - len(self.coarser) : -1], strict=True):
            factor = target.shape[-1] // z.shape[-1]
            small = functional.max_pool3d(target, factor)  # a thin vessel is one at any scale
            total, weights = total + loss(head(z), small) / factor, weights + 1 / factor
        return total / weights


def train(name: str, seed: int, steps: int | None, checkpoints: Path) -> VesselUNet:
    """The network in eval mode, its weights rounded to half precision."""
    build, scales, deform, enough = NETWORKS[name]
    steps = steps or enough
    torch.manual_seed(seed)
    task = Supervised(build(), scales).to(memory_format=torch.channels_last_3d)
    for head in (task.net.out, *task.coarser):  # vessels are rare: that need not be learnt
        nn.init.constant_(head.bias, -3.0)
    optimiser = torch.optim.AdamW(task.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, steps, pct_start=0.1)
    xs, masks = phantoms(checkpoints)
    file, start = checkpoints / f"{name}_{seed}_{steps}.pt", 0
    if file.exists():
        kept = torch.load(file, weights_only=True)
        start = kept["step"]
        for part, key in ((task, "task"), (optimiser, "optimiser"), (schedule, "schedule")):
            part.load_state_dict(kept[key])
    running = 0.0
    for step in range(start, steps):
        rng = np.random.default_rng([seed, step])
        chosen = torch.from_numpy(rng.choice(len(xs), BATCH, replace=False))
        x, m = turned(xs[chosen], masks[chosen], rng)
        if deform:
            x, m = deformed(x, m, rng)
        optimiser.zero_grad()
        # Activations in bfloat16, weights and losses in float32: three times as fast where the processor knows it.
        with torch.autocast("cpu", torch.bfloat16):
            value = task(x.contiguous(memory_format=torch.channels_last_3d), m)
        value.backward()
        if torch.isfinite(nn.utils.clip_grad_norm_(task.parameters(), 5.0)):  # else one step learns nothing
            optimiser.step()
        schedule.step()
        running = 0.9 * running + 0.1 * float(value.detach())
        if (step + 1) % 10 == 0 or step + 1 == steps:
            print(
                f"{name} {step + 1}/{steps}: loss {running / (1 - 0.9 ** (step + 1 - start)):.3f}", flush=True
            )
            torch.save(
                {
                    "task": task.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step + 1,
                },
                file,
            )
    settle(task.net, xs)
    net = task.net.half().float().eval()
    return net.to(memory_format=torch.contiguous_format)


def settle(net: nn.Module, xs: Tensor) -> None:
    """Make running statistics the plain mean over 30 phantoms, of which training saw the last few most."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm3d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    if norms:
        with torch.no_grad():
            for x in xs[:30].split(BATCH):
                net.train()(x)


def write_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors in half precision (counts stay integers) in the safetensors format."""
    header, values = {}, b""
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            data, dtype = tensor.numpy(), "I64"
        else:
            data, dtype = tensor.detach().half().contiguous().numpy(), "F16"
        content = data.astype(data.dtype.newbyteorder("<")).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [len(values), len(values) + len(content)],
        }
        values += content
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    file.write_bytes(len(written).to_bytes(8, "little") + written + values)


def dice(found: Tensor, mask: Tensor) -> float:
    """Twice the overlap by the sum of the sizes: 1 if both are the same; NaN if both are empty."""
    total = int(found.sum()) + int(mask.sum())
    return 2 * int((found & mask).sum()) / total if total else math.nan


def held_out(net: nn.Module, keys: range = HELD_OUT) -> list[float]:
    """Dice of whole phantoms that were not in training."""
    scores = []
    with torch.no_grad():
        for key in keys:
            x, mask = vessel_phantom(key, SIZE)
            scores.append(dice(net(x[None])[0, 0] > 0, mask))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=NETWORKS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="by default those that were enough")
    parser.add_argument("--folder", type=Path, default=DATA, help="where the weights go")
    parser.add_argument("--checkpoints", type=Path, default=Path("training"))
    options = parser.parse_args()
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    for name in options.only or NETWORKS:
        net = train(name, options.seed, options.steps, options.checkpoints)
        scores = held_out(net)
        print(f"{name}: held-out Dice {np.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})")
        if math.isfinite(min(scores)):
            write_safetensors(net.state_dict(), options.folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
