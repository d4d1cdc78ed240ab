"""Images that filters of a real 3-D network answer to, with and without regularisers.

    python benchmarks/experiments/preimages.py            # dreams, writes the page and its figures
    python benchmarks/experiments/preimages.py --quick    # does it run?

P. Natekar, A. Kori, G. Krishnamurthi, Demystifying Brain Tumor Segmentation Networks, 2020, figures 6 and 13, on the
network of the zoo that separates brain from head.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

import esegeta as eg
from _common import DOCS, LINES, figure, filled, interval, kept, number, table, verdict
from esegeta import dreams, zoo

PLACES = ("encoder.0.relu_b", "encoder.1.relu_b", "encoder.2.relu_b")
FINE = 0.25  # cycles per voxel, half of what a grid can hold
SWEEPS = {  # figure 13: one of the three grows, the others are left out
    "jitter": (0, 1, 3, 6, 12),
    "style": (0, 0.1, 0.3, 1, 3),
    "total variation": (0, 0.1, 0.3, 1, 3),
}
UNITS = {"jitter": "voxels", "style": "of the gradient", "total variation": "of the gradient"}
REGULAR = {"jitter": 6, "degrees": 10.0, "weights": (0.3, 0.3, 0.1)}


class Setting(NamedTuple):
    """How large and how long."""

    size: int = 48
    steps: int = 48
    filters: int = 3  # at each place


def images(size: int) -> tuple[Tensor, Tensor]:
    """The middle of the head, and the whole head on as small a grid, which is the template of the style."""
    head = zoo.head().data
    first = (head.shape[-1] - size) // 2
    within = slice(first, first + size)
    return head[:, within, within, within].contiguous(), adaptive_avg_pool3d(head[None], size)[0]


def busiest(model: Any, x: Tensor, place: str, count: int) -> list[int]:
    """The channels that vary most over the head: others may be dead."""
    with torch.no_grad():
        spread = eg.tap(model, place)(x).flatten(1).std(1)
    return sorted(spread.argsort(descending=True)[:count].tolist())


def dreamed(model: Any, place: str, channels: Sequence[int], way: Any) -> Tensor:
    """The dreams of several filters of a place, one way."""
    climb = lambda c: way(dreams.objectives.channel(model, place, c))(key=1).image
    return eg.batched(climb)(torch.tensor(channels))


def ways(setting: Setting, x: Tensor, template: Tensor) -> dict[str, Any]:
    """Without regularisers, and with those of the paper."""
    start = dreams.starts.noise(x.shape, mean=float(x.mean()), sigma=0.05)
    return {
        "plain": lambda score: dreams.ascend(score, start, steps=setting.steps),
        "regularised": lambda score: dreams.recipes.natekar(
            score, start, steps=setting.steps, template=template, **REGULAR
        ),
    }


def swept(setting: Setting, x: Tensor, template: Tensor, what: str, amount: float) -> Any:
    """One regulariser of some strength, alone."""
    start = dreams.starts.noise(x.shape, mean=float(x.mean()), sigma=0.05)
    costs = {
        "style": dreams.regularisers.style(template),
        "total variation": dreams.regularisers.total_variation(),
    }
    parts: dict[str, Any] = {}
    if what == "jitter" and amount:
        parts["distortions"] = [dreams.distortions.jitter(int(amount))]
    elif amount:
        parts["penalties"] = [(dreams.relative(amount), costs[what])]
    return lambda score: dreams.ascend(score, start, steps=setting.steps, **parts)


# --- What is measured of a dream ------------------------------------------------------------------------


def power(image: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The frequencies of all waves of an image but its mean, and their powers."""
    lines = torch.meshgrid(*[torch.fft.fftfreq(n) for n in image.shape[1:]], indexing="ij")
    f = torch.stack(lines).square().sum(0).sqrt().flatten()[1:]
    return f.numpy(), dreams.spectrum([image])[0].square().flatten()[1:].numpy()


def fine(image: Tensor) -> float:
    """The share of the power in waves shorter than four voxels: noise, as eyes have it."""
    f, p = power(image)
    return float(p[f > FINE].sum() / p.sum())


def curve(image: Tensor) -> list[float]:
    """The power of a wave by its frequency, relative to that of all."""
    f, p = power(image)
    bins = image.shape[-1] // 4
    which = np.minimum((f / 0.5 * bins).astype(int), bins)
    return [float(p[which == b].mean() / p.mean()) for b in range(bins)]


def alike(image: Tensor, template: Tensor) -> float:
    """The correlation with the template, a sixteenth as fine: whether there is a head."""
    a, b = (adaptive_avg_pool3d(t[None], 8).flatten() for t in (image, template))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def rough(image: Tensor) -> float:
    """How much neighbours differ, in deviations of the image."""
    return float(dreams.regularisers.total_variation()(image) / (3 * image.numel() * image.std()))


# --- The experiment -------------------------------------------------------------------------------------


def pairs(setting: Setting) -> dict[str, Any]:
    """The dreams of three filters at each place, both ways, and what they are like."""
    x, template = images(setting.size)
    model = eg.from_module(zoo.brain_extraction_unet())
    rows = []
    for place in PLACES:
        channels = busiest(model, x, place, setting.filters)
        with torch.no_grad():
            answers = eg.tap(model, place)
            of_head = [float(answers(x)[c].mean()) for c in channels]
            for name, way in ways(setting, x, template).items():
                found = dreamed(model, place, channels, way)
                for channel, image, there in zip(channels, found, of_head, strict=True):
                    rows.append(
                        {
                            "place": place,
                            "channel": channel,
                            "way": name,
                            "answer": float(answers(image)[channel].mean()) / there,
                            "fine": fine(image),
                            "rough": rough(image),
                            "curve": curve(image),
                            "plane": plane(image),
                            "range": [float(image.min()), float(image.max())],
                        }
                    )
    ends = [float(x.min()), float(x.max())]
    head = {"fine": fine(x), "rough": rough(x), "curve": curve(x), "range": ends}
    return {"rows": rows, "head": head}


def sweeps(setting: Setting) -> dict[str, Any]:
    """A filter of each place under each regulariser alone, at every strength."""
    x, template = images(setting.size)
    model = eg.from_module(zoo.brain_extraction_unet())
    rows = []
    for place in PLACES:
        (channel,) = busiest(model, x, place, 1)
        for what, amounts in SWEEPS.items():
            for amount in amounts:
                (image,) = dreamed(model, place, [channel], swept(setting, x, template, what, amount))
                rows.append(
                    {
                        "place": place,
                        "channel": channel,
                        "what": what,
                        "amount": amount,
                        "fine": fine(image),
                        "rough": rough(image),
                        "alike": alike(image, template),
                        "plane": plane(image),
                    }
                )
    return {"rows": rows, "template": plane(template)}


def plane(image: Tensor) -> list[list[float]]:
    """The middle plane, as the eye sees it."""
    return np.round(image[0, :, :, image.shape[-1] // 2].T.flip(0).numpy().astype(float), 4).tolist()


# --- Figures --------------------------------------------------------------------------------------------


def picture(drawn: Any, place: tuple[float, float, float, float], shown: Any, title: str = "") -> None:
    """A plane in grey, from its darkest hundredth to its brightest."""
    axes = drawn.add_axes(place)
    low, high = np.quantile(shown, (0.01, 0.99))
    axes.imshow(np.array(shown), cmap="gray", vmin=low, vmax=high)
    axes.axis("off")
    if title:
        axes.set_title(title, fontsize=8)


def depth(place: str) -> str:
    """What a place is called in figures and tables."""
    return f"level {int(place.split('.')[1]) + 1}"


def draw_pairs(found: dict[str, Any]) -> Any:
    """Figure 6: filters without and with regularisers."""
    from esegeta.plot.canvas import new

    rows = found["rows"]
    wide = sum(row["place"] == PLACES[0] for row in rows)
    drawn = new(1.55 * wide + 0.6, 1.75 * len(PLACES) + 0.3, "white")
    left, step = 0.6 / (1.55 * wide + 0.6), 1.55 / (1.55 * wide + 0.6)
    tall = 1.75 / (1.75 * len(PLACES) + 0.3)
    for i, place in enumerate(PLACES):
        own = [row for row in rows if row["place"] == place]
        drawn.text(
            left / 2, 1 - (i + 0.65) * tall, depth(place), rotation=90, va="center", ha="center", fontsize=9
        )
        for j, row in enumerate(own):
            at = (left + j * step, 1 - (i + 1) * tall, 0.95 * step, 0.85 * tall)
            picture(drawn, at, row["plane"], f"filter {row['channel']}, {row['way']}")
    return drawn


def draw_spectra(found: dict[str, Any]) -> Any:
    """The power of waves by their frequency, of dreams and of the head."""
    from esegeta.plot.canvas import new

    drawn = new(11, 3.1, "white")
    for i, place in enumerate(PLACES):
        axes = drawn.add_axes((0.06 + 0.325 * i, 0.17, 0.26, 0.7))
        axes.set_title(depth(place), fontsize=9)
        at = (np.arange(len(found["head"]["curve"])) + 0.5) / 2 / len(found["head"]["curve"])
        for colour, way in zip(LINES, ("plain", "regularised"), strict=False):
            own = [row["curve"] for row in found["rows"] if (row["place"], row["way"]) == (place, way)]
            for n, one in enumerate(own):
                axes.semilogy(at, one, color=colour, linewidth=1.1, label=way if n == 0 else None)
        axes.semilogy(at, found["head"]["curve"], "--", color="#000000", linewidth=1.1, label="the head")
        axes.set_xlabel("cycles per voxel", fontsize=8)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if i == 0:
            axes.set_ylabel("power, 1 is the mean", fontsize=8)
            axes.legend(fontsize=8, frameon=False)
    return drawn


def draw_sweeps(found: dict[str, Any], place: str) -> Any:
    """Figure 13: each regulariser alone, from none to much."""
    from esegeta.plot.canvas import new

    drawn = new(9.3, 5.6, "white")
    for i, (what, amounts) in enumerate(SWEEPS.items()):
        drawn.text(0.02, 0.83 - 0.33 * i, what, rotation=90, va="center", ha="center", fontsize=9)
        for j, amount in enumerate(amounts):
            keys = (place, what, amount)
            (row,) = [r for r in found["rows"] if (r["place"], r["what"], r["amount"]) == keys]
            at = (0.04 + 0.193 * j, 0.685 - 0.33 * i, 0.185, 0.28)
            title = f"{amount:g} {UNITS[what]}".replace("1 voxels", "1 voxel")
            picture(drawn, at, row["plane"], title if amount else "none")
    return drawn


# --- Page -----------------------------------------------------------------------------------------------


def differences(found: dict[str, Any], key: str) -> np.ndarray:
    """Plain minus regularised, for every filter."""
    of = {way: [row[key] for row in found["rows"] if row["way"] == way] for way in ("plain", "regularised")}
    return np.array(of["plain"]) - np.array(of["regularised"])


def change(found: dict[str, Any], what: str, key: str, least: float, most: float) -> Any:
    """How much a measure falls from one strength to another, over the places."""
    at = {
        amount: [r[key] for r in found["rows"] if (r["what"], r["amount"]) == (what, amount)]
        for amount in (least, most)
    }
    return np.array(at[least]) - np.array(at[most])


def sentences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What holds of the paper's conclusions."""
    claims = (
        (
            "Without regularisers dreams are fine noise, with them they have forms",
            "share of power above a quarter cycle per voxel, plain minus regularised",
            differences(first, "fine"),
        ),
        (
            "A jitter of a few voxels takes away fine noise",
            "share of power above a quarter cycle per voxel, no jitter minus one of 3 voxels",
            change(second, "jitter", "fine", 0, 3),
        ),
        (
            "Total variation makes dreams smooth",
            "roughness, without minus with a whole gradient of it",
            change(second, "total variation", "rough", 0, 1),
        ),
        (
            "Style brings dreams closer to a head",
            "correlation with the template, with a whole gradient of it minus without",
            -change(second, "style", "alike", 0, 1),
        ),
    )
    told = []
    for claim, measured, values in claims:
        found = interval(values)
        told.append(f"- *{claim}*: **{verdict(found)}** here. {measured[0].upper()}{measured[1:]}: {found}.")
    return told


def page(first: dict[str, Any], second: dict[str, Any], setting: Setting, files: dict[str, str]) -> str:
    """The page of the experiment."""
    lines = []
    for place in PLACES:
        for way in ("plain", "regularised"):
            own = [row for row in first["rows"] if (row["place"], row["way"]) == (place, way)]
            mean = lambda key, own=own: number(float(np.mean([row[key] for row in own])))
            ends = [f"{number(f([row['range'][i] for row in own]))}" for i, f in enumerate((min, max))]
            lines.append([depth(place), way, mean("answer"), mean("fine"), mean("rough"), " to ".join(ends)])
    head = first["head"]
    ends = " to ".join(map(number, head["range"]))
    lines.append(["", "the head", "1", number(head["fine"]), number(head["rough"]), ends])
    columns = [
        "filters of",
        "dream",
        "answer, 1 is that to the head",
        "fine power",
        "roughness",
        "intensities",
    ]
    strengths = []
    for what, key in (("jitter", "fine"), ("total variation", "rough"), ("style", "alike")):
        for place in PLACES:
            own = [r for r in second["rows"] if (r["place"], r["what"]) == (place, what)]
            strengths.append([what, depth(place), *[number(r[key]) for r in own]])
    return filled(
        "preimages",
        size=setting.size,
        steps=setting.steps,
        filters=setting.filters,
        conclusions="\n".join(sentences(first, second)),
        table=table(columns, lines),
        sweeps=table(["alone", "filter of", "none", "a little", "more", "much", "most"], strengths),
        amounts="; ".join(
            f"{what} {', '.join(f'{a:g}' for a in amounts)}" for what, amounts in SWEEPS.items()
        ),
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
    setting = Setting(16, 2, 1) if options.quick else Setting()
    folder = options.folder or (Path(tempfile.mkdtemp()) if options.quick else DOCS)
    file = lambda name: options.results / f"{name}.json" if options.results else None
    with eg.execution(progress=False):
        first = kept(file("pairs"), lambda: pairs(setting))
        second = kept(file("sweeps"), lambda: sweeps(setting))
    files = {
        "pairs": figure("preimages_pairs", draw_pairs(first), folder),
        "spectra": figure("preimages_spectra", draw_spectra(first), folder),
        "strengths": figure("preimages_sweeps", draw_sweeps(second, PLACES[1]), folder),
    }
    written = folder / "experiments" / "preimages.md"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(page(first, second, setting, files))
    print(f"written: {written}")


if __name__ == "__main__":
    main()
