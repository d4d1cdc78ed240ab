"""Occlusion, Shapley sampling, KernelSHAP and LIME: the cost of one perturbation, esegeta against its peers.

The real network on the real head, windows of 8 voxels a side in steps of 8; peers evaluate the whole volume for
every window, whatever its size, so that a few windows give their cost. For esegeta all positions are run, and its
clean pass and the comparison with whole evaluations are part of the time. Claims: occlusion at least 10 times as
fast as captum and MONAI at 128 voxels a side, at least 8 times in 2-D at 512; the others at least twice as fast as
captum per evaluation, with 100 supervoxels.
"""

import itertools

import torch
from captum.attr import KernelShap, Lime, Occlusion, ShapleyValueSampling
from torch import nn

import esegeta as eg
from _measure import arguments, done, progress, real_task, seconds, setting, summed, table
from esegeta import segmentation


class UNet2d(nn.Module):
    """Three levels down and up, two convolutions each, batch norm, skips: what people train on slices."""

    def __init__(self, base: int = 16) -> None:
        super().__init__()
        widths = [base, 2 * base, 4 * base, 8 * base]
        self.down = nn.ModuleList([self.block(a, b) for a, b in itertools.pairwise([1, *widths])])
        self.up = nn.ModuleList([nn.ConvTranspose2d(b, a, 2, 2) for a, b in itertools.pairwise(widths)])
        self.join = nn.ModuleList([self.block(2 * a, a) for a in widths[:-1]])
        self.pool, self.out = nn.MaxPool2d(2), nn.Conv2d(base, 2, 1)

    @staticmethod
    def block(before: int, after: int) -> nn.Module:
        half = [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*half, nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x):
        skips = []
        for i, block in enumerate(self.down):
            x = block(self.pool(x) if i else x)
            skips.append(x)
        for i in reversed(range(len(self.up))):
            x = self.join[i](torch.cat([self.up[i](x), skips[i]], 1))
        return self.out(x)


def per_position(run, positions, repeats):
    """The least time of a few runs, for one position."""
    return min(seconds(run) for _ in range(repeats)) / positions


def captum_occlusion(forward, x, baseline, window):
    """Few large windows, which cost it as much as small ones, in the faster of two batch sizes."""
    peer = Occlusion(forward)
    axes = x.ndim - 1
    positions = (x.shape[1] // window) ** axes

    def run(together):
        with torch.no_grad():
            return peer.attribute(
                x[None],
                sliding_window_shapes=(x.shape[0], *[window] * axes),
                strides=(x.shape[0], *[window] * axes),
                baselines=baseline[None],
                perturbations_per_eval=together,
            )[0]

    progress("captum")
    costs = [seconds(lambda b=b: run(b)) / positions for b in (1, 2)]
    return min(costs), run(1), positions


def monai_occlusion(forward, x, window, positions):
    """MONAI's, on a row of positions in the middle; None where it is not installed."""
    try:
        from monai.visualize import OcclusionSensitivity
    except ImportError:
        return None

    class Scored(nn.Module):
        def forward(self, batch):
            return torch.stack([forward(batch), -forward_zero(batch)], 1)

    def forward_zero(batch):
        return batch.new_zeros(len(batch))

    axes = x.ndim - 1
    middle = x.shape[1] // 2 // window * window
    row = [-1, -1]
    for a in range(axes):
        row += [0, positions * window - 1] if a == axes - 1 else [middle, middle + window - 1]
    peer = OcclusionSensitivity(
        Scored().eval(), mask_size=window, n_batch=1, overlap=0.0, activate=False, verbose=False
    )
    progress("monai")
    return seconds(lambda: peer(x[None], b_box=row)) / positions


def occlusion(title, score, forward, x, baseline, window, large, repeats):
    """One network, three libraries."""
    theirs, map_of_captum, positions = captum_occlusion(forward, x, baseline, large)
    monais = monai_occlusion(forward, x, window, 8)
    with eg.execution(progress=False) as run:
        progress("esegeta, the windows of captum")
        same = eg.occlusion(score, size=large)(x, baseline)
        progress("esegeta, all positions")
        every = 1
        for n in x.shape[1:]:
            every *= n // window
        ours = per_position(lambda: eg.occlusion(score, size=window)(x, baseline), every, repeats)
    done()
    apart = (same - map_of_captum).abs().max() / map_of_captum.abs().max()
    print(f"{title}: {every} positions; captum {positions} of {large} voxels a side, MONAI 8")
    print(f"largest difference from captum's map: {apart:.1e} of its largest value")
    print(run.events[-1]["message"] + "\n")
    rows = [("esegeta", f"{1e3 * ours:.1f}", "1")]
    rows.append(("captum", f"{1e3 * theirs:.1f}", f"{theirs / ours:.1f}"))
    rows.append(
        (
            "MONAI",
            *(("not installed", "") if monais is None else (f"{1e3 * monais:.1f}", f"{monais / ours:.1f}")),
        )
    )
    table(("occlusion", "ms a position", "times esegeta"), rows)


def coalitions(task, parts, runs, repeats):
    """Shapley sampling, KernelSHAP and LIME on supervoxels."""
    progress("supervoxels")
    labels = segmentation.slic(task.x, parts)
    count = int(labels.max()) + 1
    x, b, mask = task.x, task.baseline, labels[None, None]
    features = eg.features.labels(labels)
    peers = {
        "Shapley sampling": lambda: ShapleyValueSampling(task.forward).attribute(
            x[None], baselines=b[None], feature_mask=mask, n_samples=1
        ),
        "KernelSHAP": lambda: KernelShap(task.forward).attribute(
            x[None], baselines=b[None], feature_mask=mask, n_samples=runs
        ),
        "LIME": lambda: Lime(task.forward).attribute(
            x[None], baselines=b[None], feature_mask=mask, n_samples=runs
        ),
    }
    ours = {
        "Shapley sampling": lambda: eg.shapley_sampling(task.score, features=features, samples=1)(
            x, b, key=0
        ),
        "KernelSHAP": lambda: eg.kernel_shap(task.score, features=features, samples=runs)(x, b, key=0),
        "LIME": lambda: eg.lime(task.score, features=features, samples=runs)(x, b, key=0),
    }
    evaluations = {
        "Shapley sampling": (2 * (count + 1), count + 1),
        "KernelSHAP": (runs, runs),
        "LIME": (runs, runs),
    }
    rows = []
    with eg.execution(progress=False), torch.no_grad():
        for name in ours:
            progress(name)
            mine, theirs = evaluations[name]
            a = per_position(ours[name], mine, repeats)
            c = per_position(peers[name], theirs, repeats)
            rows.append((name, mine, f"{1e3 * a:.1f}", f"{1e3 * c:.1f}", f"{c / a:.2f}"))
    done()
    table((f"{count} supervoxels", "evaluations", "ms esegeta", "ms captum", "captum / esegeta"), rows)


def main():
    options = arguments(__doc__, size=128, repeats=1)
    print(setting(options))
    task = real_task(options.size)
    title = f"real network, {options.size} voxels a side, window 8"
    occlusion(title, task.score, task.forward, task.x, task.baseline, 8, options.size // 4, options.repeats)

    side = 128 if options.quick else 512
    torch.manual_seed(0)
    net = UNet2d().eval()
    x = torch.randn(1, side, side)
    mask = torch.ones(2, side, side, dtype=torch.bool)
    mask[0] = False
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    title = f"2-D U-Net, {side} squared, window 8"
    occlusion(title, score, summed(net, mask), x, torch.zeros_like(x), 8, side // 8, options.repeats)
    coalitions(task, 100, 256, options.repeats)


if __name__ == "__main__":
    main()
