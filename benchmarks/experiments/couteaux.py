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
from scipy import stats
from torch import Tensor
from torch.nn import functional

import esegeta as eg
from _common import DOCS, LINES, figure, filled, interval, kept, number, table, verdict
from esegeta import dreams
from train_couteaux import CHANCES, SEEDS, SIZE, TUMOURS, background, dice, load, marked, tumour

STEPS, STARTS, RATE = 200, 8, 0.05
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
    """From a start to its dream."""
    plain = dreams.optimisers.sgd(RATE)
    return lambda x: dreams.ascend(score, x, steps=steps, optimiser=plain, record=record)()


def controlled(
    chances: Sequence[int], seeds: Sequence[int], starts: int, steps: int, cases: int
) -> dict[str, Any]:
    """Of every network the Dice on images without markings, and the feature along its dreams."""
    at = sorted({round(i * steps / 20) for i in range(21)})
    begin = torch.stack([empty(key) for key in range(starts)])
    clean = [marked(key, 0) for key in range(cases)]
    rows = []
    for chance in chances:
        for seed in seeds:
            net = load(f"marked_{chance}_{seed}")
            found = eg.batched(climb(middle(net)[1], steps, at))(begin)
            curves = [[characteristic(image) for image in one] for one in found.images]
            rows.append({"chance": chance, "seed": seed, "dice": dice(net, clean), "curves": curves})
    return {"at": at, "rows": rows}


def analysed(kinds: Sequence[str], starts: int, steps: int, cases: int) -> dict[str, Any]:
    """Features along the dreams of networks of tumours, in units of the tumours that all of them are to find."""
    names = tuple(dict.fromkeys((*SHAPES, *FEATURES)))
    features = dreams.radiomic(names, width=0.25)
    population = [dict(features(c.image, c.mask)) for c in (tumour(key, "dark") for key in range(cases))]
    at = sorted({round(i * steps / 20) for i in range(21)})
    rows = {}
    for kind in kinds:
        net = load(f"tumour_{kind}_0")
        model, score = middle(net)
        look = dreams.analysis(model, score, features=features, steps=steps, rate=RATE, record=at)
        found = [look(empty(key)) for key in range(starts)]
        rows[kind] = {
            "dice": dice(net, [tumour(key, kind) for key in range(cases)]),
            "values": {name: [one.curve(name).tolist() for one in found] for name in names},
        }
    return {"at": at, "rows": rows, "population": population}


def correlation(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The rank correlation of Dice without markings and feature at the end over networks, and its permutation p."""
    found = [[row["dice"] for row in rows], [np.mean([c[-1] for c in row["curves"]]) for row in rows]]
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


def draw_controlled(found: dict[str, Any], steps: int) -> Any:
    """Figure 4: a dream, the feature on the way, and at its end against the Dice."""
    from esegeta.plot.canvas import new

    drawn = new(11, 3.2, "white")
    chances = sorted({row["chance"] for row in found["rows"]})
    for i, chance in enumerate((chances[0], chances[-1])):
        _, score = middle(load(f"marked_{chance}_{found['rows'][0]['seed']}"))
        image = climb(score, steps, ())(empty(0)).image[0]
        axes = drawn.add_axes((0.01 + 0.14 * i, 0.2, 0.13, 0.6))
        axes.imshow(image.numpy(), cmap="gray")
        axes.set_title(f"dream, {chance} % marked", fontsize=9)
        axes.axis("off")
    axes = panel(drawn, (0.35, 0.17, 0.27, 0.7), "characteristic feature on the way")
    ends = panel(drawn, (0.7, 0.17, 0.28, 0.7), "at the end, and what is lost without markings")
    for i, chance in enumerate(chances):
        rows = [row for row in found["rows"] if row["chance"] == chance]
        curves = np.concatenate([row["curves"] for row in rows])
        colour = LINES[i % len(LINES)] if i < len(LINES) else "#000000"
        axes.plot(found["at"], curves.mean(0), color=colour, label=f"{chance} %", linewidth=1.4)
        ends.plot(
            [row["dice"] for row in rows],
            [np.mean([c[-1] for c in row["curves"]]) for row in rows],
            "o",
            color=colour,
            markersize=5,
        )
    axes.set_xlabel("steps", fontsize=8)
    axes.legend(fontsize=7.5, frameon=False, title="marked", title_fontsize=7.5)
    ends.set_xlabel("Dice on images without markings", fontsize=8)
    return drawn


def draw_shapes(found: dict[str, Any]) -> Any:
    """Figure 5: three features of the dreams of three networks."""
    from esegeta.plot.canvas import new

    drawn = new(11, 3.0, "white")
    for i, name in enumerate(SHAPES):
        axes = panel(drawn, (0.05 + 0.33 * i, 0.17, 0.26, 0.7), TITLES[name])
        for colour, (kind, row) in zip(LINES, found["rows"].items(), strict=False):
            curves = np.array(row["values"][name])
            counted = np.where(
                np.isnan(curves).all(0), np.nan, np.nanmean(np.nan_to_num(curves, nan=np.nan), axis=0)
            )
            axes.plot(found["at"], counted, color=colour, label=kind, linewidth=1.4)
        axes.set_xlabel("steps", fontsize=8)
        if i == 0:
            axes.legend(fontsize=8, frameon=False, title="trained on", title_fontsize=8)
    return drawn


def normalised(found: dict[str, Any], kind: str, name: str) -> np.ndarray:
    """The curves of a feature in deviations from the mean of the population."""
    real = np.array([row[name] for row in found["population"]])
    return (np.array(found["rows"][kind]["values"][name]) - np.nanmean(real)) / np.nanstd(real)


def draw_analysis(found: dict[str, Any], steps: int) -> Any:
    """Figures 3 and 6: a dream with its masks, and six features in units of the validation population."""
    from esegeta.plot.canvas import new

    drawn = new(11, 5.6, "white")
    model, score = middle(load("tumour_dark_0"))
    at = [0, steps // 20, steps // 4, steps]
    seen = climb(score, steps, at)(empty(0))
    for i, step in enumerate(at):
        for j, shown in enumerate((seen.images[i][0], torch.sigmoid(model(seen.images[i]))[0].detach())):
            axes = drawn.add_axes((0.02 + 0.12 * i, 0.72 - 0.26 * j, 0.11, 0.22))
            axes.imshow(shown.numpy(), cmap="gray", **({"vmin": 0, "vmax": 1} if j else {}))
            axes.axis("off")
            if j == 0:
                axes.set_title(f"{step} steps", fontsize=9)
            if i == 0 and j == 0:
                axes.plot(SIZE // 2, SIZE // 2, "+", color="red", markersize=8)
    for i, name in enumerate(FEATURES):
        axes = panel(drawn, (0.56 + 0.24 * (i % 2), 0.72 - 0.32 * (i // 2), 0.18, 0.2), TITLES[name])
        curves = normalised(found, "dark", name)
        axes.axhspan(-1, 1, color="#dddddd", linewidth=0)
        for curve in curves:
            axes.plot(found["at"], curve, color=LINES[0], linewidth=0.8)
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
        ends = [np.array([c[-1] for c in second["rows"][kind]["values"][name]]) for kind in (more, less)]
        difference = interval(ends[0] - ends[1])
        told.append(
            f"- *{claim}*: **{verdict(difference)}** here. At the end, {TITLES[name]}, {more} minus {less}: "
            f"{difference} over starts."
        )
    return told


def page(first: dict[str, Any], second: dict[str, Any], files: dict[str, str]) -> str:
    """The page of the experiment, with a sentence on each conclusion of the paper."""
    rows = first["rows"]
    lines = []
    for chance in sorted({row["chance"] for row in rows}):
        own = [row for row in rows if row["chance"] == chance]
        ends = interval([[curve[-1] for curve in row["curves"]] for row in own])
        lines.append([f"{chance} %", number(np.mean([row["dice"] for row in own])), ends])
    looked = (5, 10, 20)
    reached = []
    for name in FEATURES:
        curves = normalised(second, "dark", name)[:, looked]
        means = [float(np.nanmean(c)) if np.isfinite(c).any() else float("nan") for c in curves.T]
        reached.append([TITLES[name], *map(number, means)])
    return filled(
        "couteaux",
        size=SIZE,
        conclusions="\n".join(sentences(first, second)),
        table=table(["objects marked in training", "Dice without markings", "feature at the end"], lines),
        tumours=", ".join(f"{kind} {number(row['dice'])}" for kind, row in second["rows"].items()),
        reached=table(["feature of the dream", *[f"{second['at'][i]} steps" for i in looked]], reached),
        seeds=len({row["seed"] for row in rows}),
        starts=len(rows[0]["curves"]),
        steps=first["at"][-1],
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
    starts, steps, cases = (2, 20, 4) if options.quick else (STARTS, STEPS, 60)
    chances, seeds = ((0, 100), (0,)) if options.quick else (CHANCES, SEEDS)
    folder = options.folder or (Path(tempfile.mkdtemp()) if options.quick else DOCS)
    file = lambda name: options.results / f"{name}.json" if options.results else None
    with eg.execution(progress=False):
        first = kept(file("controlled"), lambda: controlled(chances, seeds, starts, steps, cases))
        second = kept(file("analysed"), lambda: analysed(TUMOURS, starts, steps, cases))
        files = {
            "controlled": figure("couteaux_controlled", draw_controlled(first, steps), folder),
            "shapes": figure("couteaux_shapes", draw_shapes(second), folder),
            "analysis": figure("couteaux_analysis", draw_analysis(second, steps), folder),
        }
    written = folder / "experiments" / "couteaux.md"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(page(first, second, files))
    print(f"written: {written}")


if __name__ == "__main__":
    main()
