"""The experiments of a paper on dreams of segmentation networks, on drawn images.

    python benchmarks/experiments/couteaux.py            # dreams, judges, writes the page and its figures
    python benchmarks/experiments/couteaux.py --quick    # does it run?

V. Couteaux, O. Nempont, G. Pizaine, I. Bloch, Towards Interpretability of Segmentation Networks by Analyzing
DeepDreams, 2019. Networks that rely on a marking dream of it; those of other tumours dream of other tumours. The
networks are those of ``train_couteaux.py``.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage, stats
from torch import Tensor
from torch.nn import functional

import esegeta as eg
from _common import DOCS, LINES, figure, filled, interval, kept, number, table, verdict
from esegeta import dreams
from train_couteaux import CHANCES, SEEDS, SIZE, TUMOURS, background, dice, drawn, load, marked, tumour

STEPS, STARTS = 160, 8
LENGTH = 0.01  # of a step, the root mean square of what it changes; images have a deviation of 0.56
UNMARKED_DICE = (
    0.8  # of the network without markings; the one with them all has to reach half of that at most
)
FEATURES = (
    *("statistics_mean", "statistics_rms", "histogram_entropy"),
    *("shape_sphericity", "glcm_contrast", "ngldm_high_dependence_emphasis"),
)
SHAPES = ("statistics_rms", "shape_maximum_diameter", "shape_elongation")
TITLES = {
    "statistics_mean": "mean intensity",
    "statistics_rms": "root mean square intensity",
    "histogram_entropy": "entropy of intensities",
    "shape_sphericity": "sphericity",
    "shape_maximum_diameter": "maximum diameter",
    "shape_elongation": "elongation (1 is round)",
    "glcm_contrast": "GLCM contrast",
    "ngldm_high_dependence_emphasis": "large dependence emphasis",
}


def segment() -> Tensor:
    """The filter of a line at 135 degrees, of mean 0: a bright diagonal between darker ones."""
    row, column = torch.meshgrid(*[torch.arange(7)] * 2, indexing="ij")
    line = (row == column).float() - 0.5 * ((row - column).abs() == 1).float()
    return (line - line.mean())[None, None] / 7


def characteristic(image: Tensor) -> float:
    """The largest answer of the filter, the feature that says whether a marking is there."""
    return float(functional.conv2d(image[None], segment()).max())


def empty(key: int) -> Tensor:
    """An image without an object."""
    return torch.from_numpy(background(np.random.default_rng([key, 17]))).float()[None]


def middle(net: torch.nn.Module) -> Any:
    """The model and its output in the middle of the image."""
    model = eg.from_module(net)
    return model, dreams.objectives.voxel(model, 1, index=[SIZE // 2, SIZE // 2])


def climb(score: Any, steps: int, record: Sequence[int]) -> Any:
    """From a start to its dream, by steps of one length."""
    plain = dreams.optimisers.normalised(dreams.optimisers.sgd(LENGTH))
    return lambda x: dreams.ascend(score, x, steps=steps, optimiser=plain, record=record)()


def sureness(net: torch.nn.Module, name: str, cases: int) -> float:
    """The value that a network has in the depth of objects of its own validation images, their median."""
    model, values = eg.from_module(net), []
    for case in (drawn(name, key) for key in range(cases)):
        depth = ndimage.distance_transform_edt(case.mask.numpy())
        with torch.no_grad():
            values.append(float(model(case.image)[0].flatten()[int(depth.argmax())]))
    return float(np.median(values))


def dreamed(net: torch.nn.Module, name: str, begin: Tensor, at: Sequence[int], cases: int) -> tuple[Any, Any]:
    """Dreams from all starts, and which of the recorded steps ends each: there it is as sure as of a real object.

    A dream that never is has no end, -1. Further steps would go on for ever, since a logit has no largest value.
    """
    found = eg.batched(climb(middle(net)[1], at[-1], at))(begin)
    there = found.values >= sureness(net, name, cases)
    return found, torch.where(there.any(1), there.int().argmax(1), -1).tolist()


def controlled(
    chances: Sequence[int], seeds: Sequence[int], starts: int, steps: int, cases: int
) -> dict[str, Any]:
    """Of every network the Dice on images without markings, and the feature along its dreams."""
    at = list(range(0, steps + 1, 2))
    begin = torch.stack([empty(key) for key in range(starts)])
    clean = [marked(key, 0) for key in range(cases)]
    rows = []
    for chance in chances:
        for seed in seeds:
            name = f"marked_{chance}_{seed}"
            net = load(name)
            found, ends = dreamed(net, name, begin, at, cases)
            curves = [[characteristic(image) for image in one] for one in found.images]
            rows.append(
                {
                    "chance": chance,
                    "seed": seed,
                    "dice": dice(net, clean),
                    "curves": curves,
                    "stops": ends,
                    "first": found.images[0, ends[0], 0].tolist(),
                }
            )
    return {"at": at, "rows": rows}


def analysed(kinds: Sequence[str], starts: int, steps: int, cases: int) -> dict[str, Any]:
    """Features along the dreams of networks of tumours, and of the tumours of their validation images."""
    names = tuple(dict.fromkeys((*SHAPES, *FEATURES)))
    features = dreams.radiomic(names, width=0.25)
    at = list(range(0, steps + 1, 4))
    begin = torch.stack([empty(key) for key in range(starts)])
    rows = {}
    for kind in kinds:
        name = f"tumour_{kind}_0"
        net, real = load(name), [tumour(key, kind) for key in range(cases)]
        model = eg.from_module(net)
        found, ends = dreamed(net, name, begin, at, cases)
        with torch.no_grad():
            logits = torch.stack([torch.func.vmap(model)(images)[:, 0] for images in found.images])
        read = [
            [dict(features(image, logit > 0)) for image, logit in zip(images, own, strict=True)]
            for images, own in zip(found.images, logits, strict=True)
        ]
        shown = max(range(starts), key=lambda i: ends[i])  # one that reaches its end, the longest
        rows[kind] = {
            "dice": dice(net, real),
            "values": {key: [[step[key] for step in one] for one in read] for key in names},
            "population": [dict(features(case.image, case.mask)) for case in real],
            "stops": ends,
            "shown": shown,
            "images": found.images[shown, :, 0].tolist(),
            "answers": torch.sigmoid(logits[shown]).tolist(),
        }
    return {"at": at, "rows": rows}


def at_end(curves: Sequence[Sequence[float]], stops: Sequence[int]) -> np.ndarray:
    """What a feature is where each dream ends; of a dream without end the last."""
    return np.array([curve[stop] for curve, stop in zip(curves, stops, strict=True)])


def correlation(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The rank correlation of Dice without markings and feature at the end over networks, and its permutation p."""
    found = [[row["dice"] for row in rows], [at_end(row["curves"], row["stops"]).mean() for row in rows]]
    dices, ends = (stats.zscore(stats.rankdata(one)) for one in found)
    rng = np.random.default_rng(0)
    shuffled = np.array([rng.permutation(dices) for _ in range(1999)])
    rho = float(dices @ ends / len(rows))
    return rho, float((1 + np.sum(shuffled @ ends / len(rows) <= rho + 1e-9)) / 2000)


# --- Figures ----------------------------------------------------------------------------------------------


def panel(drawn: Any, place: tuple[float, float, float, float], title: str) -> Any:
    """Axes with a title and without a frame at the top and the right."""
    axes = drawn.add_axes(place)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def draw_controlled(found: dict[str, Any]) -> Any:
    """Figure 4: a dream, the feature on the way, and at its end against the Dice."""
    from esegeta.plot.canvas import new

    drawn = new(11, 3.2, "white")
    chances = sorted({row["chance"] for row in found["rows"]})
    for i, chance in enumerate((chances[0], chances[-1])):
        row = next(row for row in found["rows"] if row["chance"] == chance)
        axes = drawn.add_axes((0.01 + 0.14 * i, 0.2, 0.13, 0.6))
        axes.imshow(np.array(row["first"]), cmap="gray")
        axes.set_title(f"dream, {chance} % marked", fontsize=9)
        axes.axis("off")
    axes = panel(drawn, (0.35, 0.17, 0.27, 0.7), "characteristic feature on the way")
    ends = panel(drawn, (0.7, 0.17, 0.28, 0.7), "at the end, and what is lost without markings")
    for i, chance in enumerate(chances):
        rows = [row for row in found["rows"] if row["chance"] == chance]
        curves = np.concatenate([row["curves"] for row in rows])
        colour = LINES[i % len(LINES)] if i < len(LINES) else "#000000"
        stop = int(np.median([s if s >= 0 else len(found["at"]) - 1 for row in rows for s in row["stops"]]))
        middle_line = curves.mean(0)
        axes.plot(found["at"], middle_line, color=colour, label=f"{chance} %", linewidth=1.2, alpha=0.6)
        axes.plot(found["at"][stop], middle_line[stop], "o", color=colour, markersize=6)
        ends.plot(
            [row["dice"] for row in rows],
            [at_end(row["curves"], row["stops"]).mean() for row in rows],
            "o",
            color=colour,
            markersize=5,
        )
    axes.set_xlabel("steps (dots: as sure as of a real object)", fontsize=8)
    axes.legend(fontsize=7.5, frameon=False, title="marked", title_fontsize=7.5)
    ends.set_xlabel("Dice on images without markings", fontsize=8)
    return drawn


def draw_shapes(found: dict[str, Any]) -> Any:
    """Figure 5: three features of the dreams of three networks, to their ends."""
    from esegeta.plot.canvas import new

    drawn = new(11, 3.0, "white")
    for i, name in enumerate(SHAPES):
        axes = panel(drawn, (0.05 + 0.33 * i, 0.17, 0.26, 0.7), TITLES[name])
        for colour, (kind, row) in zip(LINES, found["rows"].items(), strict=False):
            for n, (curve, stop) in enumerate(zip(row["values"][name], row["stops"], strict=True)):
                last = stop if stop >= 0 else len(curve) - 1
                label = kind if n == 0 else None
                axes.plot(
                    found["at"][: last + 1], curve[: last + 1], color=colour, label=label, linewidth=0.9
                )
                axes.plot(
                    found["at"][last], curve[last], "o" if stop >= 0 else "x", color=colour, markersize=5
                )
            real = np.nanmean([one[name] for one in row["population"]])
            axes.axhline(real, color=colour, linestyle=":", linewidth=1)
        axes.set_xlabel("steps (dotted: the validation tumours)", fontsize=8)
        if i == 1:  # the panel with room below the longest tumours
            axes.legend(
                fontsize=8,
                framealpha=0.9,
                edgecolor="none",
                title="trained on",
                title_fontsize=8,
                ncols=3,
                loc="upper center",
                bbox_to_anchor=(0.5, 0.94),
                columnspacing=1,
            )
    return drawn


def normalised(row: dict[str, Any], name: str) -> np.ndarray:
    """The curves of a feature in deviations from the mean of the validation tumours."""
    real = np.array([one[name] for one in row["population"]])
    return (np.array(row["values"][name]) - np.nanmean(real)) / np.nanstd(real)


def draw_analysis(found: dict[str, Any]) -> Any:
    """Figures 3 and 6: a dream with its masks, and six features in units of the validation tumours."""
    from esegeta.plot.canvas import new

    drawn = new(11, 5.6, "white")
    row = found["rows"]["dark"]
    stops = [stop if stop >= 0 else len(found["at"]) - 1 for stop in row["stops"]]
    last = stops[row["shown"]]
    before = max([i for i, a in enumerate(row["answers"]) if i <= last and np.max(a) <= 0.5], default=0)
    for i, step in enumerate((0, before, min(before + 1, last), last)):
        for j, shown in enumerate((row["images"][step], row["answers"][step])):
            axes = drawn.add_axes((0.02 + 0.12 * i, 0.72 - 0.26 * j, 0.11, 0.22))
            axes.imshow(np.array(shown), cmap="gray", **({"vmin": 0, "vmax": 1} if j else {}))
            axes.axis("off")
            if j == 0:
                axes.set_title(f"{found['at'][step]} steps", fontsize=9)
            if i == 0 and j == 0:
                axes.plot(SIZE // 2, SIZE // 2, "+", color="red", markersize=8)
    for i, name in enumerate(FEATURES):
        axes = panel(drawn, (0.56 + 0.24 * (i % 2), 0.72 - 0.32 * (i // 2), 0.18, 0.2), TITLES[name])
        axes.axhspan(-1, 1, color="#dddddd", linewidth=0)
        if i >= len(FEATURES) - 2:
            axes.set_xlabel("steps", fontsize=8)
        for curve, stop, real in zip(normalised(row, name), stops, row["stops"], strict=True):
            axes.plot(found["at"][: stop + 1], curve[: stop + 1], color=LINES[0], linewidth=0.8)
            axes.plot(found["at"][stop], curve[stop], "o" if real >= 0 else "x", color=LINES[0], markersize=4)
    return drawn


# --- Page -------------------------------------------------------------------------------------------------


def sentences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What holds of the paper's conclusions."""
    rows = first["rows"]
    chances = sorted({row["chance"] for row in rows})
    plain, whole = (np.mean([r["dice"] for r in rows if r["chance"] == c]) for c in (chances[0], chances[-1]))
    passed = plain >= UNMARKED_DICE and whole <= plain / 2
    told = [
        f"Networks without markings reach a Dice of {number(plain)} on images without them, those that saw every "
        f"object marked {number(whole)}: "
        + (
            "the marking decides."
            if passed
            else "**failed**, the marking does not decide, and nothing follows."
        )
    ]
    if passed:
        rho, p = correlation(rows)
        says = "holds" if rho < 0 and p < 0.05 else "undecided"
        told.append(
            f"- *Networks that rely on the marking dream of it*: **{says}** here. Over {len(rows)} networks the rank "
            "correlation of the Dice without markings and the feature at the end is "
            f"{number(rho)} (p = {number(p)} by permutation)."
        )
    claims = (
        (
            "statistics_rms",
            ("dark", "faint"),
            "A network of dark tumours asks for more intensity than one of any",
        ),
        (
            "shape_elongation",
            ("faint", "elongated"),
            "A network of elongated tumours dreams of elongated ones",
        ),
    )
    for name, (more, less), claim in claims:
        ends = [
            at_end(second["rows"][kind]["values"][name], second["rows"][kind]["stops"])
            for kind in (more, less)
        ]
        difference = interval(ends[0] - ends[1])
        told.append(
            f"- *{claim}*: **{verdict(difference)}** here. At the end, {TITLES[name]}, {more} minus {less}: "
            + (
                f"{difference} over starts."
                if np.isfinite(difference.mean)
                else "some dreams end without an object, so there is no mean over starts."
            )
        )
    return told


def page(first: dict[str, Any], second: dict[str, Any], files: dict[str, str]) -> str:
    """The page of the experiment, with a sentence on each conclusion of the paper."""
    rows = first["rows"]
    lines = []
    for chance in sorted({row["chance"] for row in rows}):
        own = [row for row in rows if row["chance"] == chance]
        ends = interval([at_end(row["curves"], row["stops"]) for row in own])
        lines.append([f"{chance} %", number(np.mean([row["dice"] for row in own])), ends, reached(own)])
    told, inside = [], []
    for name in FEATURES:
        row = second["rows"]["dark"]
        ends = at_end(normalised(row, name), row["stops"])
        counted = ends[np.isfinite(ends)]
        mean = interval(counted) if counted.size else interval([np.nan])
        within = "in" if abs(mean.mean) <= 1 else "above" if mean.mean > 1 else "below"
        told.append([TITLES[name], mean, "undefined" if np.isnan(mean.mean) else within, len(counted)])
        inside.append(within == "in" and not np.isnan(mean.mean))
    kinds = [[kind, number(row["dice"]), reached([row])] for kind, row in second["rows"].items()]
    return filled(
        "couteaux",
        size=SIZE,
        length=f"{LENGTH:g}",
        conclusions="\n".join(sentences(first, second)),
        table=table(
            ["objects marked in training", "Dice without markings", "feature at the end", "dreams that end"],
            lines,
        ),
        tumours=table(["trained on", "Dice", "dreams that end"], kinds),
        features=band(inside),
        reached=table(["feature of the dream", "at the end", "the band", "dreams that have it"], told),
        seeds=len({row["seed"] for row in rows}),
        starts=len(rows[0]["curves"]),
        steps=first["at"][-1],
        **files,
    )


def band(inside: list[bool]) -> str:
    """What holds of the paper's conclusion that dreams come to be like what a network was trained on."""
    says = "holds" if all(inside) else "does not hold" if not any(inside) else "holds in part"
    return (
        f"- *Features of dreams come to be those of the tumours that a network learnt*: **{says}** here. At the end "
        f"{sum(inside)} of {len(inside)} means lie in the band."
    )


def reached(rows: list[dict[str, Any]]) -> str:
    """How many dreams came to an end."""
    stops = [stop for row in rows for stop in row["stops"]]
    return f"{sum(stop >= 0 for stop in stops)} of {len(stops)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and few, to see whether it runs")
    parser.add_argument("--folder", type=Path, help="where the page goes; by default the documentation")
    parser.add_argument(
        "--results", type=Path, help="a folder of numbers: read if they are there, else written"
    )
    options = parser.parse_args()
    starts, steps, cases = (2, 20, 4) if options.quick else (STARTS, STEPS, 60)
    chances, seeds = ((0, 100), (0,)) if options.quick else (CHANCES, SEEDS)
    folder = options.folder or (Path(tempfile.mkdtemp()) if options.quick else DOCS)
    file = lambda name: options.results / f"{name}.json" if options.results else None
    with eg.execution(progress=False):
        first = kept(file("controlled"), lambda: controlled(chances, seeds, starts, steps, cases))
        second = kept(file("analysed"), lambda: analysed(TUMOURS, starts, steps, cases))
        files = {
            "controlled": figure("couteaux_controlled", draw_controlled(first), folder),
            "shapes": figure("couteaux_shapes", draw_shapes(second), folder),
            "analysis": figure("couteaux_analysis", draw_analysis(second), folder),
        }
    written = folder / "experiments" / "couteaux.md"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(page(first, second, files))
    print(f"written: {written}")


if __name__ == "__main__":
    main()
