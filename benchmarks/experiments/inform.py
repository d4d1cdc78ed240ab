"""The comparison of a poster, on drawn slices: five methods, smoothed or not, by voxels and by regions.

    python benchmarks/experiments/inform.py            # trains, judges, writes the page and its figures
    python benchmarks/experiments/inform.py --quick    # does it run?

W. Marchadour, J. Maison, B. Badic, M. Hatt, F. Vermet, Comparison of Methods for Interpretability of DNNs in the
context of CT images Classification. A classifier tells slices with contrast agent from slices without; its maps are
compared with masks of the heart and the vessels, and judged by what becomes of the prediction without what they show.
"""

import argparse
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import esegeta as eg
from _common import DOCS, LINES, figure, filled, interval, kept, number, table, together, verdict
from esegeta import metrics, segmentation

SIZE = 64
METHODS = ("BP", "IGB", "IGBW", "EG", "D")
SMOOTHINGS = ("plain", "SG", "SG²")
FORMS = ("voxel", "region")
VOXEL = FORMS[:1]
METRICS = ("AUC", "maximum Dice", "fidelity")
ROWS = [(m, s, f) for m in METHODS for s in SMOOTHINGS for f in FORMS]
CONTROLS = (("random", "", "voxel"), ("the mask", "", "voxel"))


# --- Slices -----------------------------------------------------------------------------------------------


def slice_of(key: int, contrast: bool, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """A drawn slice of a chest, in [0, 1] as in a window of a CT, and the mask of its heart and vessels.

    Only heart, aorta and the vessels of the lungs tell whether there is contrast agent. Bones are as bright; all of a
    slice is brighter or darker from patient to patient.
    """
    rng = np.random.default_rng([key, 7])  # the same patient with and without contrast agent
    row, column = np.meshgrid(*[np.linspace(-1, 1, size)] * 2, indexing="ij")

    def ellipse(centre: Any, radii: Any, sharp: float = size / 2) -> np.ndarray:
        away = np.sqrt(((row - centre[0]) / radii[0]) ** 2 + ((column - centre[1]) / radii[1]) ** 2)
        return np.clip((1 - away) * min(radii) * sharp + 0.5, 0, 1)

    def put(image: np.ndarray, where: np.ndarray, value: float | np.ndarray) -> np.ndarray:
        return image + where * (value - image)

    jitter = lambda amount: rng.uniform(-amount, amount, 2)
    body = np.array([rng.uniform(0.62, 0.72), rng.uniform(0.82, 0.92)])
    image = put(np.zeros((size, size)), ellipse((0, 0), body), 0.34)  # fat
    image = put(image, ellipse((0, 0), body - 0.07), 0.5)  # muscle
    lungs = []
    for side in (-1, 1):
        at = (-0.02 + jitter(0.03)[0], side * (0.42 + jitter(0.03)[0]))
        lung = ellipse(at, (body[0] * 0.68, 0.25 + jitter(0.02)[0]))
        image = put(image, lung, 0.08)
        lungs.append((at, lung))
    bone = ellipse((body[0] - 0.2, jitter(0.02)[0]), (0.09, 0.1))
    for angle in np.linspace(0.15, 2 * np.pi + 0.15, 12, endpoint=False) + jitter(0.1)[0]:
        place = (np.sin(angle) * (body[0] - 0.1), np.cos(angle) * (body[1] - 0.1))
        bone = np.maximum(bone, ellipse(place, (0.035, 0.035)))
    image = put(image, bone, rng.uniform(0.8, 0.95))

    heart = ellipse(
        (-0.1 + jitter(0.04)[0], -0.08 + jitter(0.05)[0]), (0.22 + jitter(0.03)[0], 0.25 + jitter(0.03)[0])
    )
    aorta = ellipse((0.22 + jitter(0.03)[0], -0.14 + jitter(0.03)[0]), (0.075, 0.075))
    vessels = np.maximum(heart, aorta)
    for at, lung in lungs:
        branches = np.zeros_like(image)
        for _ in range(rng.integers(5, 9)):
            shift = rng.uniform(-1, 1, 2) * (0.3, 0.16)
            branches = np.maximum(branches, ellipse(np.add(at, shift), rng.uniform(0.02, 0.05, 2)))
        vessels = np.maximum(vessels, branches * lung)
    level = rng.uniform(0.62, 0.85) if contrast else rng.uniform(0.47, 0.53)
    image = put(image, vessels, level)

    own = np.random.default_rng([key, int(contrast)])
    image = (image - 0.4) * own.uniform(0.9, 1.1) + 0.4 + own.uniform(-0.06, 0.06)
    image = np.clip(image + 0.03 * own.standard_normal(image.shape), 0, 1)
    return torch.from_numpy(image.astype(np.float32))[None], torch.from_numpy(vessels > 0.5)


def slices(keys: range, contrast: bool) -> Tensor:
    return torch.stack([slice_of(key, contrast)[0] for key in keys])


# --- The classifier ---------------------------------------------------------------------------------------


def classifier(seed: int) -> nn.Sequential:
    """Four convolutions; the seed gives the initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for n, (before, after) in enumerate([(1, 8), (8, 16), (16, 32), (32, 32)]):
            parts[f"conv_{n}"] = nn.Conv2d(before, after, 3, padding=1)
            parts[f"norm_{n}"] = nn.BatchNorm2d(after)
            parts[f"relu_{n}"] = nn.ReLU()
            parts[f"pool_{n}"] = nn.MaxPool2d(2) if n < 3 else nn.AdaptiveAvgPool2d(1)
        return nn.Sequential(OrderedDict(**parts, flatten=nn.Flatten(), linear=nn.Linear(32, 2)))


def trained(seed: int, steps: int, patients: int) -> tuple[nn.Sequential, float]:
    """A classifier in eval mode, and its accuracy on 200 slices that it has not seen."""
    without, with_agent = (slices(range(patients), contrast) for contrast in (False, True))
    xs, ys = torch.cat([without, with_agent]), torch.arange(2).repeat_interleave(patients)
    net = classifier(seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = torch.from_numpy(rng.choice(len(xs), min(32, len(xs)), replace=False))
        batch = xs[chosen].roll(tuple(rng.integers(-4, 5, 2).tolist()), (2, 3))
        if rng.random() < 0.5:
            batch = batch.flip(3)
        optimiser.zero_grad()
        functional.cross_entropy(net(batch), ys[chosen]).backward()
        optimiser.step()
        schedule.step()
    net.eval()
    unseen = range(5000, 5100)
    with torch.no_grad():
        right = [net(slices(unseen, c)).argmax(1) == int(c) for c in (False, True)]
    return net, float(torch.cat(right).float().mean())


# --- Maps -------------------------------------------------------------------------------------------------


def explanations(score: Callable, samples: int) -> dict[str, Callable]:
    """The five methods; all are called with (x, black and white, slices of the training set, key)."""
    ig = eg.integrated_gradients(score, steps=samples)
    both = eg.over_baselines(ig)
    expected = eg.expected_gradients(score, samples=samples)
    gradient, deconvolution = eg.gradient(score), eg.deconvolution(score)
    return {
        "BP": lambda x, ends, pool: gradient(x),  # noqa: ARG005
        "IGB": lambda x, ends, pool: ig(x, ends[0]),  # noqa: ARG005
        "IGBW": lambda x, ends, pool: both(x, ends),  # noqa: ARG005
        "EG": lambda x, ends, pool, *, key=0: expected(x, pool, key=key),  # noqa: ARG005
        "D": lambda x, ends, pool: deconvolution(x),  # noqa: ARG005
    }


def smoothed(explain: Callable, how: str, samples: int) -> Callable:
    """An explanation as it is, its mean over noisy copies, or the mean of its square; then its size."""
    if how == "SG":
        explain = eg.smooth(explain, noise=0.1, samples=samples)
    if how == "SG²":
        explain = eg.smooth_squared(explain, noise=0.1, samples=samples)
    return eg.absolute(explain)


def segments(x: Tensor) -> Tensor:
    """The segmentations of XRAI: six scales, as a share of the image those of its authors."""
    minimum = 150 * (SIZE / 224) ** 2
    wide = x.double()
    scaled = (wide - wide.amin()) * (2 / (wide.amax() - wide.amin()))
    scales = [k / 255 * minimum / 150 for k in (50, 100, 150, 250, 500, 1200)]
    return segmentation.graph_segmentation(scaled, scales, sigma=0.8, minimum=minimum)


def maps_of(
    net: nn.Module, x: Tensor, pool: Tensor, key: int, samples: int
) -> dict[tuple[str, str, str], Tensor]:
    """Every map of one slice: 5 methods, 3 ways of smoothing, 2 forms."""
    score = eg.reducers.logit(eg.from_module(net), 1)
    ends = torch.stack([torch.zeros_like(x), torch.ones_like(x)])
    found = segments(x)
    maps = {}
    for method, explain in explanations(score, samples).items():
        for smoothing in SMOOTHINGS:
            whole = smoothed(explain, smoothing, samples)
            random = smoothing != "plain" or method == "EG"
            a = whole(x, ends, pool, key=key) if random else whole(x, ends, pool)
            maps[method, smoothing, "voxel"] = a
            by_regions = eg.regions(metrics.given(a), found, reach=5 * SIZE / 224, least=4)
            maps[method, smoothing, "region"] = by_regions(x)
    return maps


def judged(a: Tensor, net: nn.Module, x: Tensor, mask: Tensor, without: Tensor) -> list[float]:
    """AUC, maximum Dice and fidelity of one map.

    Fidelity is the share of the probability of contrast agent that is lost, on average while pixels, the largest of
    the map first, become what slices without contrast agent have there on average.
    """
    explain = metrics.given(a)
    probability = eg.reducers.probability(eg.from_module(net), 1)
    return [
        float(metrics.roc_auc(explain)(x, mask=mask)),
        float(metrics.max_dice(explain)(x, mask=mask)),
        float(metrics.fidelity(explain, probability, steps=32)(x, without).area),
    ]


# --- The experiment ---------------------------------------------------------------------------------------


def measure(seeds: int, cases: int, steps: int, patients: int, samples: int) -> dict[str, Any]:
    """Numbers by row, metric, seed and case, and the accuracies of the networks."""
    pool = slices(range(0, patients, max(1, patients // 32)), False)
    pool = torch.cat([pool, slices(range(0, patients, max(1, patients // 32)), True)])
    without = slices(range(patients), False).mean(0)
    rows = [*ROWS, *CONTROLS]
    values = np.full((len(rows), len(METRICS), seeds, cases), np.nan)
    accuracies = []
    for seed in range(seeds):
        net, accuracy = trained(seed, steps, patients)
        accuracies.append(accuracy)
        for case in range(cases):
            x, mask = slice_of(9000 + case, True)
            maps = maps_of(net, x, pool, key=1000 * seed + case, samples=samples)
            maps["random", "", "voxel"] = eg.random.uniform(case, x.shape)
            maps["the mask", "", "voxel"] = mask[None].float()
            for n, row in enumerate(rows):
                values[n, :, seed, case] = judged(maps[row], net, x, mask, without)
            print(f"seed {seed}, slice {case + 1} of {cases}", flush=True)
    return {"accuracies": accuracies, "values": values.tolist(), "samples": samples}


def example(
    steps: int, patients: int, samples: int
) -> tuple[Tensor, Tensor, dict[tuple[str, str, str], Tensor]]:
    """The maps of one slice, to look at."""
    net, _ = trained(0, steps, patients)
    pool = torch.cat([slices(range(0, patients, max(1, patients // 32)), c) for c in (False, True)])
    x, mask = slice_of(9000, True)
    return x, mask, maps_of(net, x, pool, key=0, samples=samples)


def by_row(found: dict[str, Any]) -> dict[tuple[str, str, str], np.ndarray]:
    """(metric, seed, case) of each row."""
    return dict(zip([*ROWS, *CONTROLS], np.asarray(found["values"]), strict=True))


def mean_of(values: dict, metric: int, **which: Any) -> np.ndarray:
    """(seed, case), averaged over all rows of some methods, smoothings and forms."""
    chosen = [
        values[m, s, f][metric]
        for m in which.get("methods", METHODS)
        for s in which.get("smoothings", SMOOTHINGS)
        for f in which.get("forms", FORMS)
    ]
    return np.mean(chosen, axis=0)


def conclusions(values: dict) -> list[tuple[str, list[tuple[str, Any]]]]:
    """What the poster concludes, and the differences that would be positive if it held here."""
    found = []
    told: list[tuple[str, Any]] = []
    for metric in (0, 1):
        squared = mean_of(values, metric, smoothings=["SG²"])
        for other in ("plain", "SG"):
            told.append(
                (
                    f"{METRICS[metric]}, SG² less {other}",
                    squared - mean_of(values, metric, smoothings=[other]),
                )
            )
    found.append(("The best maps, by AUC and by Dice, are those with SG²", told))
    told = []
    for metric in (0, 1):
        region, voxel = (mean_of(values, metric, smoothings=["SG²"], forms=[f]) for f in ("region", "voxel"))
        told.append((f"{METRICS[metric]} with SG², region less voxel", region - voxel))
    found.append(("especially by regions", told))
    region, voxel = (mean_of(values, 2, forms=[f]) for f in ("region", "voxel"))
    found.append(
        ("Maps by voxels have the higher fidelity", [("fidelity, voxel less region", voxel - region)])
    )
    good = mean_of(values, 2, methods=["BP", "IGBW", "EG"], forms=VOXEL)
    told = [
        (
            f"fidelity by voxels, mean of BP, IGBW and EG less {m}",
            good - mean_of(values, 2, methods=[m], forms=["voxel"]),
        )
        for m in ("D", "IGB")
    ]
    found.append(("All methods but deconvolution and IGB are faithful", told))
    return found


# --- Figures and the page ---------------------------------------------------------------------------------


def plots(values: dict) -> Any:
    """The three plots of the poster: a point for each kind of map, with its interval."""
    from esegeta.plot.canvas import new

    drawn = new(11, 4.6, "white")
    for metric, name in enumerate(METRICS):
        axes = drawn.add_axes((0.055 + 0.32 * metric, 0.2, 0.275, 0.68))
        for n, method in enumerate(METHODS):
            if n % 2 == 0:
                axes.axvspan(n - 0.5, n + 0.5, color="#f3f3f3", lw=0, zorder=-2)
            for k, (smoothing, form) in enumerate((s, f) for f in FORMS for s in SMOOTHINGS):
                at = interval(values[method, smoothing, form][metric])
                place = n + (k - 2.5) * 0.13
                colour = LINES[SMOOTHINGS.index(smoothing)]
                face = colour if form == "voxel" else "white"
                error = [[at.mean - at.low], [at.high - at.mean]]
                label = f"{smoothing}, {form}" if n == 0 else None
                axes.errorbar(
                    place,
                    at.mean,
                    yerr=error,
                    fmt="o" if form == "voxel" else "s",
                    ms=4.5,
                    lw=1.1,
                    color=colour,
                    markerfacecolor=face,
                    label=label,
                )
        for control, style in (("random", ":"), ("the mask", "--")):
            at = values[control, "", "voxel"][metric].mean()
            axes.axhline(
                at, color="#666666", lw=0.9, ls=style, label=control if metric == 0 else None, zorder=0
            )
        axes.set_xticks(range(len(METHODS)), METHODS)
        axes.set_xlim(-0.5, len(METHODS) - 0.5)
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if metric == 0:
            handles = axes.get_legend_handles_labels()
    drawn.legend(*handles, ncol=8, loc="lower center", frameon=False, fontsize=8.5)
    return drawn


def gallery(x: Tensor, mask: Tensor, maps: dict) -> Any:
    """Every kind of map of one slice, and the mask, as figure 1 of the poster has them."""
    from esegeta.plot.canvas import new

    wide, high, side, gap = 1 + len(SMOOTHINGS) * len(FORMS), len(METHODS), 1.28, 0.3
    width, height = side * wide + gap + 0.05, side * high + 0.4
    drawn = new(width, height, "white")

    def axes_at(row: int, column: int) -> Any:
        left, top = 0.05 + column * side + gap * (column > 0), height - 0.35 - (row + 1) * side
        axes = drawn.add_axes((left / width, top / height, side * 0.96 / width, side * 0.96 / height))
        axes.axis("off")
        return axes

    first, second = axes_at(0, 0), axes_at(1, 0)
    first.imshow(x[0].numpy(), cmap="gray", vmin=0, vmax=1)
    first.set_title("slice", fontsize=9)
    second.imshow(mask.numpy(), cmap="gray")
    axes_at(2, 0).text(0.5, 1, "reference mask:\nheart and vessels", ha="center", va="top", fontsize=9)
    for n, method in enumerate(METHODS):
        place = ((0.05 + side + gap / 2) / width, (height - 0.35 - (n + 0.5) * side) / height)
        drawn.text(*place, method, ha="center", va="center", fontsize=10, rotation=90)
        for k, (smoothing, form) in enumerate((s, f) for f in FORMS for s in SMOOTHINGS):
            axes = axes_at(n, 1 + k)
            a = maps[method, smoothing, form][0]
            axes.imshow(a.numpy(), cmap="inferno", vmin=0, vmax=float(a.quantile(0.995)))
            if n == 0:
                axes.set_title(f"{smoothing}, {form}", fontsize=9)
    return drawn


def page(found: dict[str, Any], files: dict[str, str], cases: int) -> str:
    """The page of the experiment."""
    values = by_row(found)
    rows = []
    best = [max(values[row][metric].mean() for row in ROWS) for metric in range(len(METRICS))]
    for row in [*ROWS, *CONTROLS]:
        cells = []
        for metric in range(len(METRICS)):
            at = interval(values[row][metric])
            bold = "**" if row in ROWS and values[row][metric].mean() == best[metric] else ""
            cells.append(f"{bold}{number(at.mean)}{bold} ({number(at.low)} to {number(at.high)})")
        rows.append([row[0], row[1], row[2] if row in ROWS else "", *cells])
    told = []
    for claim, differences in conclusions(values):
        intervals = [(name, interval(d)) for name, d in differences]
        says = together([verdict(i) for _, i in intervals])
        numbers = "; ".join(f"{name}: {i}" for name, i in intervals)
        told.append(f"- *{claim}*: **{says}** here. {numbers}.")
    accuracies = ", ".join(f"{100 * a:.1f} %" for a in found["accuracies"])
    return filled(
        "inform",
        size=SIZE,
        cases=cases,
        seeds=len(found["accuracies"]),
        accuracies=accuracies,
        samples=found["samples"],
        conclusions="\n".join(told),
        table=table(["method", "smoothing", "form", *METRICS], rows),
        **files,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and few, to see whether it runs")
    parser.add_argument("--folder", type=Path, help="where the page goes; by default the documentation")
    parser.add_argument(
        "--results", type=Path, help="a JSON file of numbers: read if it is there, else written"
    )
    options = parser.parse_args()
    seeds, cases, steps, patients, samples = (1, 2, 6, 8, 2) if options.quick else (3, 12, 250, 160, 16)
    folder = options.folder or (Path(tempfile.mkdtemp()) if options.quick else DOCS)
    with eg.execution(progress=False):
        found = kept(options.results, lambda: measure(seeds, cases, steps, patients, samples))
        drawn = example(steps, patients, samples)
    files = {
        "plots": figure("inform_numbers", plots(by_row(found)), folder),
        "gallery": figure("inform_maps", gallery(*drawn), folder),
    }
    file = folder / "experiments" / "inform.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(found, files, cases))
    print(f"written: {file}")


if __name__ == "__main__":
    main()
