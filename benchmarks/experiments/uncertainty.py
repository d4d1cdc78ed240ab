"""Does the uncertainty of a real 3-D network lie on its errors?

    python benchmarks/experiments/uncertainty.py            # draws, judges, writes the page and its figures
    python benchmarks/experiments/uncertainty.py --quick    # does it run?

The network of the zoo that separates brain from head, on the head and the reference mask of the zoo. Compared are one
forward, dropout at test time, dropout put in at named places, changed images, and how near the boundary is.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

import esegeta as eg
from _common import DOCS, LINES, Interval, figure, filled, kept, number, table, together, verdict
from esegeta import uncertainty, zoo
from esegeta.uncertainty import calibration, selection

PUT_IN = {"encoder.2.pool": 0.2, "decoder.0.relu": 0.2, "decoder.1.relu": 0.2}
FRACTION = 0.05  # of the voxels, at which the claims are judged
FAR = 3  # voxels from the boundary of the prediction, and more
AIR = 0.05  # of the maximum: what is darker does not count
EDGES = np.concatenate([[0], np.geomspace(1e-4, 1, 81)])  # shares of the voxels, the most uncertain first
ONE, NEAR = "one forward", "nearness to the boundary"
DROPOUT, SHARED, ADDED, CHANGED = (
    *("dropout", "dropout, mutual information"),
    *("dropout put in", "changed images"),
)
RANKERS = (ONE, DROPOUT, SHARED, ADDED, CHANGED, NEAR)
COLOURS = dict(zip(RANKERS, ("#000000", *LINES), strict=False))


class Setting(NamedTuple):
    """How large, how many draws, and how wide the blocks are that are drawn again for an interval."""

    size: int = 128
    draws: int = 30
    block: int = 32


def case(size: int) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """The middle of the head, where its brain is, and the spacing."""
    volume, mask = zoo.head(), zoo.brain_mask()
    first = (mask.shape[-1] - size) // 2
    within = (slice(first, first + size),) * 3
    return volume.data[(slice(None), *within)].contiguous(), mask[within].contiguous(), volume.spacing


def without_dropout() -> nn.Module:
    """The network as one that was never given dropout: its own is taken out."""
    net = zoo.brain_extraction_unet()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def sources(spacing: tuple[float, ...]) -> dict[str, Any]:
    """The random models that are compared."""
    net = zoo.brain_extraction_unet()
    changes = [
        uncertainty.affine(degrees=5, scale=0.05, shift=2, spacing=spacing),
        uncertainty.noise(0.02),
        uncertainty.intensity(gain=0.1),
    ]
    return {
        DROPOUT: uncertainty.dropout(net),
        ADDED: uncertainty.dropout(without_dropout(), rate=PUT_IN),
        CHANGED: uncertainty.augmented(eg.from_module(net), changes),
    }


# --- What is measured ---------------------------------------------------------------------------------------


def counted(map_: np.ndarray, error: np.ndarray, blocks: np.ndarray, where: np.ndarray) -> dict[str, Any]:
    """Voxels and errors of every block, by how uncertain: the first bin holds the most uncertain."""
    u, e, b = map_[where], error[where], blocks[where]
    lowest = np.quantile(u, 1 - EDGES[1:-1])  # of each bin but the last
    bins = np.searchsorted(-lowest, -u)
    width, count = len(EDGES) - 1, int(blocks.max()) + 1
    rows = lambda weights: np.bincount(b * width + bins, weights, count * width).reshape(count, width)
    return {"voxels": rows(None).tolist(), "errors": rows(e.astype(float)).tolist()}


def found_share(voxels: np.ndarray, errors: np.ndarray, at: Any) -> np.ndarray:
    """The share of all errors in the most uncertain shares of the voxels, in the mean over the order of equals."""
    x, y = (np.concatenate([[0], np.cumsum(one)]) for one in (voxels, errors))
    return np.interp(at, x / x[-1], y / max(y[-1], 1))


def again(one: dict[str, Any], at: Any, draws: int = 1000) -> np.ndarray:
    """Those shares, of the image and then of images made of its blocks drawn again, (1 + draws, ...)."""
    voxels, errors = np.array(one["voxels"]), np.array(one["errors"])
    weights = np.random.default_rng(0).multinomial(len(voxels), np.full(len(voxels), 1 / len(voxels)), draws)
    weights = np.concatenate([np.ones((1, len(voxels))), weights])
    return np.array([found_share(w @ voxels, w @ errors, at) for w in weights])


def bounds(values: np.ndarray) -> Interval:
    """The number of the image and the middle 95 % of those of the blocks drawn again."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))


def described(found: uncertainty.Uncertainty, truth: Tensor) -> dict[str, float]:
    """The mean answer and the volumes of the draws."""
    volumes = found.volumes[:, 0].double()
    return {
        "dice": dice(found.mean[0] > 0.5, truth),
        "calibration": float(calibration.calibration_error(found.mean[0], truth)),
        "variation": float(found.volume_variation[0]),
        "pairs": float(found.pairwise_dice[0]),
        "low": float(volumes.quantile(0.025) / truth.sum()),
        "high": float(volumes.quantile(0.975) / truth.sum()),
    }


def dice(mask: Tensor, truth: Tensor) -> float:
    """How far two masks overlap."""
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))


def measured(setting: Setting) -> dict[str, Any]:
    """Everything that the page says."""
    x, truth, spacing = case(setting.size)
    model = eg.from_module(zoo.brain_extraction_unet())
    with torch.no_grad():
        p = model(x).sigmoid()
    mask = p[0] > 0.5
    inside = mask.numpy()
    distance = np.where(
        inside, *(ndimage.distance_transform_edt(m, sampling=spacing) for m in (inside, ~inside))
    )
    maps = {ONE: uncertainty.sampling.entropy_of(p, "sigmoid")[0].numpy(), NEAR: -distance}
    rows = {
        ONE: {"dice": dice(mask, truth), "calibration": float(calibration.calibration_error(p[0], truth))}
    }
    labels = {}
    for name, source in sources(spacing).items():
        found = uncertainty.monte_carlo(source, samples=setting.draws, link="sigmoid")(x, key=7)
        maps[name], rows[name], labels[name] = (
            found.entropy[0].numpy(),
            described(found, truth),
            source.label,
        )
        if name == DROPOUT:
            maps[SHARED] = found.mutual_information[0].numpy()
    error = (mask != truth).numpy()
    here = x[0].numpy() > AIR
    edge = eg.spatial.boundary(mask)
    for _ in range(FAR - 1):
        edge = eg.spatial.dilate(edge)
    far = here & ~edge.numpy()
    grid = np.indices(error.shape) // setting.block
    blocks = np.ravel_multi_index(grid, grid.reshape(3, -1).max(1) + 1)
    judged = {}
    for name in RANKERS:
        u, e = (torch.from_numpy(a[here].astype(np.float32)) for a in (maps[name], error))
        curve = selection.risk_coverage(u, e)
        some = np.linspace(0, len(u) - 1, 201).astype(int)
        judged[name] = {
            "all": counted(maps[name], error, blocks, here),
            "far": counted(maps[name], error, blocks, far),
            "share": float(selection.error_share(u, e, FRACTION)),
            "aurc": float(selection.aurc(u, e)),
            "augrc": float(selection.augrc(u, e)),
            "coverage": curve.coverage[some].tolist(),
            "risk": curve.risk[some].tolist(),
        }
    index = int(error.sum((0, 1)).argmax())
    flat = lambda a: np.round(np.asarray(a, dtype=float)[:, :, index].T[::-1], 4).tolist()
    planes = {name: flat(maps[name]) for name in (ONE, DROPOUT, SHARED, ADDED, CHANGED)}
    planes |= {"image": flat(x[0]), "truth": flat(truth), "mask": flat(mask)}
    sizes = {
        "voxels": int(here.sum()),
        "errors": int(error[here].sum()),
        "outside": int(error[~here].sum()),
        "far": int(far.sum()),
        "far errors": int(error[far].sum()),
    }
    return {
        "rows": rows,
        "judged": judged,
        "planes": planes,
        "sizes": sizes,
        "labels": labels,
        "blocks": int(blocks.max()) + 1,
    }


# --- Figures ------------------------------------------------------------------------------------------------


def draw_maps(found: dict[str, Any]) -> Any:
    """The plane with the most errors: the image with both masks, the errors, and the maps."""
    from esegeta.plot.canvas import new

    drawn = new(12.6, 4.1, "white")
    planes = {name: np.array(plane) for name, plane in found["planes"].items()}
    image, truth, mask = planes["image"], planes["truth"], planes["mask"]
    wrong = (mask != truth).astype(float)
    outlined = [(truth, LINES[2]), (mask, LINES[1])]
    shown = [("reference (green), answer (orange)", image, "gray", (0, 1), outlined)]
    shown += [("errors", wrong, "gray", (0, 1), [])]
    for name in (ONE, DROPOUT, ADDED, CHANGED):
        shown.append((f"{name}, entropy", planes[name], "inferno", (0, float(np.log(2))), []))
    top = float(np.quantile(planes[SHARED], 0.999))
    shown.append((SHARED, planes[SHARED], "inferno", (0, top), []))
    for i, (title, picture, colours, (low, high), rings) in enumerate(shown):
        axes = drawn.add_axes((0.25 * (i % 4) + 0.005, 0.5 - 0.5 * (i // 4), 0.24, 0.44))
        axes.imshow(picture, cmap=colours, vmin=low, vmax=high)
        for ring, colour in rings:
            axes.contour(ring, [0.5], colors=colour, linewidths=1)
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    return drawn


def draw_curves(found: dict[str, Any]) -> Any:
    """Errors found by who looks at the most uncertain first; risk by coverage."""
    from esegeta.plot.canvas import new

    drawn = new(12.6, 3.6, "white")
    at = np.geomspace(1e-3, 1, 100)
    parts = (
        ("all", "errors found, all voxels"),
        ("far", f"errors found, {FAR} voxels from the boundary and more"),
    )
    for i, (part, title) in enumerate(parts):
        axes = drawn.add_axes((0.05 + 0.33 * i, 0.15, 0.26, 0.74))
        for name in RANKERS:
            values = again(found["judged"][name][part], at, draws=200)
            axes.semilogx(at, values[0], color=COLOURS[name], label=name, linewidth=1.3)
            if name == DROPOUT:
                low, high = np.quantile(values[1:], [0.025, 0.975], axis=0)
                axes.fill_between(at, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
        axes.semilogx(at, at, ":", color="#888888", label="knows nothing", linewidth=1.2)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("share of voxels looked at, the most uncertain first", fontsize=8)
        axes.tick_params(labelsize=8)
        if i == 0:
            axes.legend(fontsize=7.5, frameon=False, loc="upper left")
    axes = drawn.add_axes((0.72, 0.15, 0.26, 0.74))
    for name in RANKERS:
        row = found["judged"][name]
        axes.plot(row["coverage"], row["risk"], color=COLOURS[name], linewidth=1.3)
    axes.set_title("share of wrong voxels among those kept", fontsize=9)
    axes.set_xlabel("coverage: share of voxels kept, the most certain first", fontsize=8)
    axes.tick_params(labelsize=8)
    for one in drawn.axes:
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    return drawn


# --- Page ---------------------------------------------------------------------------------------------------


def less(judged: dict[str, Any], more: str, other: str, part: str) -> Interval:
    """How many more errors one map finds in its most uncertain share than another, in the same blocks drawn again."""
    first, second = (again(judged[name][part], FRACTION) for name in (more, other))
    return bounds(first - second)


def sentences(found: dict[str, Any]) -> list[str]:
    """What holds, with intervals over blocks of the image."""
    judged = found["judged"]
    share = f"share of errors in the most uncertain {FRACTION * 100:g} %"
    drawn = [(name, bounds(again(judged[name]["all"], FRACTION) - FRACTION)) for name in RANKERS[:-1]]
    parts = "; ".join(f"{name} {difference}" for name, difference in drawn)
    says = together([verdict(difference) for _, difference in drawn])
    told = [
        f"- *Uncertainty lies on the errors*: **{says}** here. The {share} less {FRACTION:g}, which a map that knows "
        f"nothing finds: {parts}."
    ]
    claims = (
        ("Dropout knows more of the errors than one forward", DROPOUT, ONE, "all"),
        ("Changed images know more than one forward", CHANGED, ONE, "all"),
        ("The network's own dropout knows more than dropout put in", DROPOUT, ADDED, "all"),
        ("The draws' disagreement knows more than the entropy of their mean", SHARED, DROPOUT, "all"),
        ("Dropout knows more than how near the boundary is", DROPOUT, NEAR, "all"),
        ("It does so away from the boundary", DROPOUT, NEAR, "far"),
    )
    for claim, more, other, part in claims:
        difference = less(judged, more, other, part)
        told.append(
            f"- *{claim}*: **{verdict(difference)}** here. {share[0].upper()}{share[1:]}"
            f"{', away from the boundary' if part == 'far' else ''}, {more} less {other}: {difference}."
        )
    return told


def page(found: dict[str, Any], setting: Setting, files: dict[str, str]) -> str:
    """The page of the experiment."""
    judged, sizes = found["judged"], found["sizes"]
    lines = []
    for name in RANKERS:
        own = [bounds(again(judged[name][part], FRACTION)) for part in ("all", "far")]
        lines.append([name, *own, number(judged[name]["aurc"]), number(judged[name]["augrc"])])
    head = [
        "map",
        f"errors in the most uncertain {FRACTION * 100:g} %",
        "the same, away from the boundary",
        "AURC",
        "AUGRC",
    ]
    answers = []
    for name, row in found["rows"].items():
        spread = ["", "", ""]
        if "variation" in row:
            between = f"{number(row['low'])} to {number(row['high'])}"
            spread = [number(row["variation"]), number(row["pairs"]), between]
        answers.append([name, number(row["dice"]), number(row["calibration"]), *spread])
    columns = [
        "answer",
        "Dice of the mean",
        "calibration error",
        "volume variation",
        "Dice of pairs of draws",
        "volume of 95 % of draws, 1 is the reference",
    ]
    return filled(
        "uncertainty",
        size=setting.size,
        draws=setting.draws,
        block=setting.block,
        blocks=found["blocks"],
        label=found["labels"][ADDED],
        voxels=f"{sizes['voxels']:,}".replace(",", " "),
        errors=f"{sizes['errors']:,}".replace(",", " "),
        outside=f"{sizes['outside']:,}".replace(",", " "),
        rate=f"{sizes['errors'] / sizes['voxels']:.1%}".replace("%", " %"),
        distance=FAR,
        far_errors=f"{sizes['far errors']:,}".replace(",", " "),
        conclusions="\n".join(sentences(found)),
        table=table(head, lines),
        answers=table(columns, answers),
        **files,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and few, to see whether it runs")
    parser.add_argument("--folder", type=Path, help="where the page goes; by default the documentation")
    parser.add_argument(
        "--results", type=Path, help="a folder of numbers: read if they are there, else written"
    )
    options = parser.parse_args()
    setting = Setting(48, 3, 16) if options.quick else Setting()
    folder = options.folder or (Path(tempfile.mkdtemp()) if options.quick else DOCS)
    file = options.results / "uncertainty.json" if options.results else None
    with eg.execution(progress=False):
        found = kept(file, lambda: measured(setting))
    files = {
        "maps": figure("uncertainty_maps", draw_maps(found), folder),
        "curves": figure("uncertainty_curves", draw_curves(found), folder),
    }
    written = folder / "experiments" / "uncertainty.md"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(page(found, setting, files))
    print(f"written: {written}")


if __name__ == "__main__":
    main()
