"""How networks see a tumour: dissection, Grad-CAM at every layer and dropout at test time, on drawn slices.

    python benchmarks/experiments/natekar.py            # computes, judges, writes the page and its figures
    python benchmarks/experiments/natekar.py --quick    # does it run?

P. Natekar, A. Kori, G. Krishnamurthi, Demystifying Brain Tumor Segmentation Networks, Frontiers in Computational
Neuroscience 2020. Three networks of the zoo, with skips and without, on ``zoo.tumour_slice``.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import esegeta as eg
from _common import DOCS, LINES, figure, filled, interval, kept, number, table, together, verdict
from esegeta import dissection, metrics, uncertainty, zoo
from esegeta.uncertainty import selection
from train_natekar import HELD_OUT, REGIONS, held_out, load, settle, slices, untrained

NETWORKS = {"tumour_dense_unet": "DenseUnet", "tumour_residual_unet": "ResUnet", "tumour_plain": "SimUnet"}
DENSE, RESIDUAL, PLAIN = NETWORKS
COLOURS = dict(zip(NETWORKS, LINES, strict=False))
EXPLICIT = ("whole tumour", "tumour core", "core", "edema", "enhancing")
IMPLICIT = ("brain", "fluid", "grey matter", "white matter")
QUANTILES = (0.01, 0.05)
SHARES = (0.25, 0.5, 0.75)  # of a map's mass in a region, from which on the map lies in it
FRACTION = 0.05  # of the pixels, at which uncertainty is judged
PARTS = {"core": 1, "edema": 2, "enhancing": 3}


class Setting(NamedTuple):
    """How many slices, trainings, permutations and draws."""

    dissected: int = 16
    permutations: int = 500
    seeds: int = 1
    located: int = 8
    cases: int = 16
    draws: int = 100


QUICK = Setting(4, 10, 1, 2, 2, 5)


def case(number: int) -> zoo.TumourSlice:
    """A slice that was not in training."""
    return zoo.tumour_slice(HELD_OUT.start + number)


def with_rim(count: int) -> list[int]:
    """The first slices that have every part."""
    return [n for n in range(10 * count + 20) if (case(n).labels == 3).sum() >= 10][:count]


def layers(net: nn.Module, x: Tensor) -> list[str]:
    """Every ReLU, in the order in which the network calls them."""
    kinds = {name for name, module in net.named_modules() if isinstance(module, nn.ReLU)}
    return [place.name for place in eg.places(eg.from_module(net), x) if place.name in kinds]


# --- Dissection (figures 2-4, 9, 10) ------------------------------------------------------------------------


def cleaned(mask: Tensor) -> Tensor:
    """Without salt and pepper, and of what is left the largest component."""
    return dissection.largest(dissection.despeckle(mask))


def dissected(model: Any, places: str | Sequence[str], quantile: float, setting: Setting) -> dict[str, Any]:
    """The best channel for each concept: where it is, its overlaps, and what another image's concept gives."""
    data = [(one.data, one.concepts) for one in map(case, range(setting.dissected))]
    cut = dissection.dissect(
        model, places=places, quantile=quantile, clean=cleaned, permutations=setting.permutations
    )
    found = cut(data)
    rows = found.rows()
    best = {}
    for c, concept in enumerate(found.concepts):
        own = rows[c :: len(found.concepts)]
        k = max(range(len(own)), key=lambda i: own[i].iou)
        row = own[k]
        best[concept] = {
            **{"place": row.place, "channel": row.channel, "threshold": row.threshold, "iou": row.iou},
            **{"p": row.adjusted, "detector": row.detector},
            "images": found.per_image[:, k, c].tolist(),
            "detectors": sum(r.detector for r in own),
            "by place": {
                place: max(r.iou for r in own if r.place == place)
                for place in dict.fromkeys(r.place for r in own)
            },
        }
    return {"channels": len(found.channels), "best": best}


def dissections(setting: Setting) -> dict[str, Any]:
    """All networks at all quantiles; the sequences themselves and untrained networks beside them."""
    x = case(0).data
    found: dict[str, Any] = {}
    for quantile in QUANTILES:
        own = {"sequences": dissected(lambda x: eg.mark(x, "image"), "image", quantile, setting)}
        for name in NETWORKS:
            own[name] = dissected(eg.from_module(load(name)), layers(load(name), x), quantile, setting)
            if quantile == QUANTILES[-1]:
                control = untrained(name)
                own[f"{name}, untrained"] = dissected(
                    eg.from_module(control), layers(control, x), quantile, setting
                )
            print(f"dissected {name} at {quantile}", flush=True)
        found[str(quantile)] = own
    shares = {
        name: float(np.mean([float(case(n).concepts[name].float().mean()) for n in range(setting.dissected)]))
        for name in (*EXPLICIT, *IMPLICIT)
    }
    return {"found": found, "shares": shares}


# --- Grad-CAM at every layer (figures 5, 11) ----------------------------------------------------------------


def scores(model: Any) -> dict[str, Any]:
    """The mean probability of the whole tumour, and those of its parts: equation 3."""
    nothing = eg.reducers.class_mean(model, 0, of="probabilities")
    parts = {name: eg.reducers.class_mean(model, n, of="probabilities") for name, n in PARTS.items()}
    return {"whole tumour": lambda x: 1 - nothing(x), **parts}


def cams(net: nn.Module, x: Tensor, target: str, places: Sequence[str]) -> dict[str, Tensor]:
    """The map of every layer on the grid of the image: equations 4 and 5."""
    explain = eg.grad_cam(scores(eg.from_module(net))[target], places)
    return {p: eg.upsample(a.clamp(min=0), like=x) for p, a in zip(places, explain(x), strict=True)}


def mass(a: Tensor, x: Tensor, mask: Tensor) -> float:
    """The share of a map inside a region; NaN for a map of zeros."""
    if not bool((a > 0).any()):
        return float("nan")
    return float(metrics.relevance_mass(metrics.given(a))(x, mask=mask))


def first(shares: Sequence[float], least: float) -> float:
    """Where the first layer with that share in a region is, from 0 to 1; behind the last where there is none."""
    count = len(shares)
    return next((i / (count - 1) for i, share in enumerate(shares) if share >= least), count / (count - 1))


def located(setting: Setting) -> dict[str, Any]:
    """Of every network, training and slice: the shares of the maps of all layers, in regions."""
    found: dict[str, Any] = {}
    chosen = with_rim(setting.located)
    for name in NETWORKS:
        values, places = [], layers(load(name), case(0).data)
        for seed in range(setting.seeds):
            net = load(name, seed)
            for n in chosen:
                one = case(n)
                regions = one.concepts
                whole = cams(net, one.data, "whole tumour", places).values()
                rows = {
                    region: [mass(a, one.data, regions[region]) for a in whole]
                    for region in ("brain", "whole tumour")
                }
                for part in ("core", "enhancing"):
                    own = cams(net, one.data, part, places).values()
                    rows[part] = [mass(a, one.data, regions[part]) for a in own]
                values.append({"seed": seed, "case": n, **rows})
        found[name] = {"layers": places, "rows": values}
        print(f"located {name}", flush=True)
    return found


def depths(row: dict[str, Any], seeds: int, region: str, least: float) -> np.ndarray:
    """Where maps first lie in a region, (seeds, cases)."""
    values = [first(one[region], least) for one in row["rows"]]
    return np.array(values).reshape(seeds, -1)


# --- Dropout at test time (figure 7) ------------------------------------------------------------------------


def unsure(net: nn.Module, one: zoo.TumourSlice, draws: int, key: int) -> dict[str, Tensor]:
    """The answer of the mean, its errors, and maps of uncertainty: equation 9."""
    found = uncertainty.monte_carlo(uncertainty.dropout(net), samples=draws, link="softmax")(
        one.data, key=key
    )
    with torch.no_grad():
        p = net(one.data[None])[0].softmax(0)
    answer = found.mean.argmax(0)
    return {
        "answer": answer,
        "error": answer != one.labels,
        "variance": found.variance.mean(0),
        "mutual information": found.mutual_information[0],
        "one forward": uncertainty.sampling.entropy_of(p, "softmax")[0],
    }


MAPS = ("variance", "mutual information", "one forward")


def judged(setting: Setting) -> dict[str, Any]:
    """Of every network, slice and map: the share of errors in the most uncertain pixels, and areas under curves."""
    found: dict[str, Any] = {}
    at = np.linspace(0.005, 0.5, 100)
    for name in NETWORKS:
        net, rows = load(name), []
        for n in range(setting.cases):
            one = case(n)
            maps = unsure(net, one, setting.draws, n)
            brain = one.tissues > 0
            error = maps["error"][brain]
            missed = (maps["answer"] == 0)[brain] & (one.labels > 0)[brain]
            own: dict[str, Any] = {
                "errors": int(error.sum()),
                "missed": int(missed.sum()),
                "pixels": int(brain.sum()),
            }
            for map_ in MAPS:
                u = maps[map_][brain]
                own[map_] = {
                    "share": float(selection.error_share(u, error, FRACTION)),
                    "missed": float(selection.error_share(u, missed, FRACTION)),
                    "augrc": float(selection.augrc(u, error)),
                    "curve": [float(selection.error_share(u, error, float(f))) for f in at],
                    "wrong": float(u[error].mean()) if error.any() else float("nan"),
                    "right": float(u[~error].mean()),
                }
            rows.append(own)
        found[name] = rows
        print(f"judged the uncertainty of {name}", flush=True)
    return {"rows": found, "at": at.tolist()}


def known(values: Sequence[float]) -> np.ndarray:
    """Without the slices that have no number, such as a share of errors where there is none."""
    array = np.array(values, dtype=float)
    return array[~np.isnan(array)]


def shifts(setting: Setting) -> dict[str, Any]:
    """What norms make of dropout: errors of the mean answer with statistics from slices without and with it."""
    xs, found = slices(range(160))[0], {}
    for name in NETWORKS:
        other = load(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            settle(other, xs, (nn.BatchNorm2d, nn.Dropout))
        rows = []
        for n in range(setting.located):
            one = case(n)
            brain = one.tissues > 0
            row = {}
            for form, net in (("without", load(name)), ("with", other.eval())):
                maps = unsure(net, one, max(2, setting.draws // 5), n)
                with torch.no_grad():
                    single = net(one.data[None])[0].argmax(0) != one.labels
                row[form] = {
                    "one forward": int(single[brain].sum()),
                    "mean of draws": int(maps["error"][brain].sum()),
                    "share": float(
                        selection.error_share(maps["variance"][brain], maps["error"][brain], FRACTION)
                    ),
                }
            rows.append(row)
        found[name] = rows
    return found


# --- Everything ---------------------------------------------------------------------------------------------


def dices(setting: Setting) -> dict[str, Any]:
    """Dice (slices, regions) of every network and training."""
    keys = range(HELD_OUT.start, HELD_OUT.start + max(2 * setting.cases, 8))
    return {
        name: [held_out(load(name, seed), keys).tolist() for seed in range(setting.seeds)]
        for name in NETWORKS
    }


def measured(setting: Setting, folder: Path | None) -> dict[str, Any]:
    """All numbers, or what a folder has kept of them."""
    parts = {
        "dice": dices,
        "uncertainty": judged,
        "dissection": dissections,
        "cams": located,
        "shifts": shifts,
    }
    return {
        name: kept(folder and folder / f"natekar_{name}.json", lambda part=part: part(setting))
        for name, part in parts.items()
    }


# --- Figures ------------------------------------------------------------------------------------------------


def bare(
    drawn: Any, where: tuple[float, float, float, float], picture: Tensor, title: str, **how: Any
) -> Any:
    """A picture without axes; pictures are grey unless they say otherwise."""
    axes = drawn.add_axes(where)
    axes.imshow(picture.numpy(), **{"cmap": "gray", **how})
    axes.set_title(title, fontsize=7, pad=2)
    axes.axis("off")
    return axes


def over(axes: Any, mask: Tensor, colour: str, filled: bool = False) -> None:
    """A mask over a picture, as a veil or an outline."""
    if not bool(mask.any()):
        return
    values = mask.float().numpy()
    if filled:
        axes.contourf(values, [0.5, 1.5], colors=[colour], alpha=0.5)
    else:
        axes.contour(values, [0.5], colors=[colour], linewidths=0.8)


def place_in_words(place: str) -> str:
    """Short enough for a title."""
    return place.replace("encoder", "enc").replace("decoder", "dec").replace("layers.", "l")


def draw_detectors(found: dict[str, Any]) -> Any:
    """The best channel of each network for each concept, over one slice, beside the concept's outline."""
    from esegeta.plot.canvas import new

    shown = ("whole tumour", "tumour core", "edema", "enhancing", "white matter", "brain")
    one, drawn = case(with_rim(1)[0]), new(9.6, 5.4, "white")
    own = found["dissection"]["found"][str(QUANTILES[-1])]
    for i, (name, title) in enumerate(NETWORKS.items()):
        model = eg.from_module(load(name))
        sizes = {place.name: place.shape[0] for place in eg.places(model, one.data)}
        for j, concept in enumerate(shown):
            best = own[name]["best"][concept]
            limits = torch.full((sizes[best["place"]],), best["threshold"])
            on = dissection.channel_masks(model, best["place"], thresholds=limits, clean=cleaned)(one.data)
            said = f"{place_in_words(best['place'])}, {best['channel']}\n{concept}: {best['iou']:.2f}"
            where = (0.03 + j * 0.162, 0.665 - i * 0.33, 0.15, 0.27)
            axes = bare(drawn, where, one.data[0], said, vmin=0, vmax=1)
            over(axes, on[best["channel"]], LINES[1], filled=True)
            over(axes, one.concepts[concept], LINES[5])
        drawn.text(0.012, 0.8 - i * 0.33, title, rotation=90, va="center", fontsize=9)
    return drawn


def draw_channels(found: dict[str, Any]) -> Any:
    """Some channels of the layer that sees the whole tumour best, of the two networks with skips."""
    from esegeta.plot.canvas import new

    one, drawn, count = case(with_rim(1)[0]), new(9.6, 3.2, "white"), 8
    own = found["dissection"]["found"][str(QUANTILES[-1])]
    for i, name in enumerate((RESIDUAL, DENSE)):
        model, place = eg.from_module(load(name)), own[name]["best"]["whole tumour"]["place"]
        look = eg.tap(model, place)
        with torch.no_grad():
            activations = [look(case(n).data) for n in range(8)]
        limits = dissection.thresholds(activations, quantile=QUANTILES[-1])
        on = dissection.channel_masks(model, place, thresholds=limits, clean=cleaned)(one.data)
        for j, k in enumerate(range(0, len(on), max(1, len(on) // count))[:count]):
            where = (0.03 + j * 0.121, 0.54 - i * 0.49, 0.115, 0.37)
            axes = bare(drawn, where, one.data[0], f"channel {k}", vmin=0, vmax=1)
            over(axes, on[k], LINES[1], filled=True)
        drawn.text(
            0.012,
            0.73 - i * 0.49,
            f"{NETWORKS[name]}, {place_in_words(place)}",
            rotation=90,
            va="center",
            fontsize=6.5,
        )
    return drawn


def draw_cams() -> Any:
    """Maps of the whole tumour at some layers of each network."""
    from esegeta.plot.canvas import new

    one, drawn, count = case(with_rim(1)[0]), new(9.6, 4.2, "white"), 9
    for i, (name, title) in enumerate(NETWORKS.items()):
        net = load(name)
        maps = cams(net, one.data, "whole tumour", layers(net, one.data))
        places = list(maps)
        for j, k in enumerate(np.linspace(0, len(places) - 1, count).round().astype(int)):
            where = (0.03 + j * 0.1075, 0.665 - i * 0.33, 0.102, 0.25)
            axes = bare(drawn, where, maps[places[k]][0], place_in_words(places[k]), cmap="inferno")
            over(axes, one.labels > 0, "#ffffff")
        drawn.text(0.012, 0.79 - i * 0.33, title, rotation=90, va="center", fontsize=9)
    return drawn


def draw_every_layer() -> Any:
    """Maps of the whole tumour at every layer of the residual network."""
    from esegeta.plot.canvas import new

    one, net, drawn = case(with_rim(1)[0]), load(RESIDUAL), new(9.6, 3.2, "white")
    maps = cams(net, one.data, "whole tumour", layers(net, one.data))
    for j, (place, a) in enumerate(maps.items()):
        where = (0.01 + (j % 7) * 0.141, 0.53 - (j // 7) * 0.5, 0.134, 0.39)
        axes = bare(drawn, where, a[0], place_in_words(place), cmap="inferno")
        over(axes, one.labels > 0, "#ffffff")
    return drawn


def quiet(axes: Any, title: str, below: str) -> None:
    """Axes as in the other figures."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(below, fontsize=8)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_masses(found: dict[str, Any]) -> Any:
    """The share of maps inside of what they are about, by depth."""
    from esegeta.plot.canvas import new

    drawn = new(9.6, 2.9, "white")
    regions = {"brain": "#888888", "whole tumour": LINES[0], "core": LINES[2], "enhancing": LINES[1]}
    for i, (name, title) in enumerate(NETWORKS.items()):
        axes = drawn.add_axes((0.05 + 0.325 * i, 0.27, 0.28, 0.64))
        for region, colour in regions.items():
            values = np.nan_to_num(
                np.array([row[region] for row in found["cams"][name]["rows"]], dtype=float)
            )
            at = np.linspace(0, 1, values.shape[1])
            axes.plot(at, values.mean(0), color=colour, linewidth=1.4, label=region)
            axes.fill_between(
                at, *np.quantile(values, [0.25, 0.75], axis=0), color=colour, alpha=0.12, linewidth=0
            )
        axes.set_ylim(0, 1.02)
        quiet(axes, title, "depth, first to last layer")
    drawn.legend(*axes.get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8, frameon=False)
    return drawn


def draw_uncertainty(found: dict[str, Any], setting: Setting) -> Any:
    """Slices with the most errors of the dense network; and how many errors the most uncertain pixels hold."""
    from esegeta.plot.canvas import new

    drawn, net = new(9.6, 4.6, "white"), load(DENSE)
    rows = found["uncertainty"]["rows"]
    worst = np.argsort([-row["errors"] for row in rows[DENSE]], kind="stable")[:3]
    for i, n in enumerate(worst):
        one, maps = case(int(n)), unsure(net, case(int(n)), setting.draws, int(n))
        top = float(maps["variance"].max())
        parts = {"vmin": 0, "vmax": 3, "cmap": "viridis"}
        pictures = (
            ("FLAIR", one.data[0], {"vmin": 0, "vmax": 1}),
            ("reference", one.labels, parts),
            ("mean answer", maps["answer"], parts),
            ("wrong", maps["error"].float(), {"vmin": 0, "vmax": 1}),
            ("variance", maps["variance"], {"vmin": 0, "vmax": top, "cmap": "inferno"}),
        )
        for j, (title, picture, how) in enumerate(pictures):
            bare(
                drawn,
                (0.005 + j * 0.125, 0.675 - i * 0.325, 0.12, 0.27),
                picture,
                title if i == 0 else "",
                **how,
            )
    axes = drawn.add_axes((0.70, 0.12, 0.28, 0.78))
    at = np.array(found["uncertainty"]["at"])
    for name, title in NETWORKS.items():
        for map_, line in (("variance", "-"), ("one forward", ":")):
            curves = [row[map_]["curve"] for row in rows[name] if row["errors"]]
            label = f"{title}, {map_ if map_ == 'one forward' else 'dropout'}"
            axes.plot(at, np.mean(curves, axis=0), line, color=COLOURS[name], linewidth=1.3, label=label)
    axes.plot(at, at, color="#888888", linewidth=1, label="knows nothing")
    axes.set_xlim(0, 0.3)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    quiet(axes, "share of errors found", "share of the brain looked at, the most uncertain first")
    return drawn


# --- Page ---------------------------------------------------------------------------------------------------


def paired(best: dict[str, Any], other: dict[str, Any], concepts: Sequence[str]) -> np.ndarray:
    """Differences of the overlaps of best channels, in the mean over concepts, of the slices that have them all."""
    differences = [np.subtract(best[c]["images"], other[c]["images"]) for c in concepts]
    return known(np.mean(differences, axis=0))


def of_concepts(found: dict[str, Any]) -> list[str]:
    """The conclusion on disentangled concepts."""
    asked = ("whole tumour", "tumour core", "edema")
    own = found["dissection"]["found"][str(QUANTILES[-1])]
    counts = [
        f"{title} " + ", ".join(f"{own[name]['best'][c]['detectors']} ({c})" for c in asked)
        for name, title in NETWORKS.items()
    ]
    everywhere = all(own[name]["best"][c]["detector"] for name in NETWORKS for c in asked)
    told = [
        f"- *Filters are detectors of parts of the tumour, in all architectures*: "
        f"**{'holds' if everywhere else 'undecided'}** here. Channels that overlap with a concept more than with "
        f"that of another slice (permutation test, corrected for all channels and concepts): {'; '.join(counts)}."
    ]
    for what, control in (
        ("training makes them", "{}, untrained"),
        ("no sequence shows them as well", "sequences"),
    ):
        parts = [
            (title, interval(paired(own[name]["best"], own[control.format(name)]["best"], asked)))
            for name, title in NETWORKS.items()
        ]
        says = together([verdict(part) for _, part in parts])
        beside = "untrained networks" if "untrained" in control else "sequences, thresholded alike"
        told.append(
            f"- *... and {what}*: **{says}** here. Overlap of the best channels in a slice less that of {beside}: "
            f"{'; '.join(f'{title} {part}' for title, part in parts)}."
        )
    best = {title: {c: own[name]["best"][c] for c in IMPLICIT} for name, title in NETWORKS.items()}
    seen = all(rows["grey matter"]["detector"] or rows["white matter"]["detector"] for rows in best.values())
    overlaps = (
        f"{title} "
        + ", ".join(f"{c} {number(row['iou'])}{' (detector)' * row['detector']}" for c, row in rows.items())
        for title, rows in best.items()
    )
    told.append(
        f"- *Grey or white matter, of which there are no labels, has filters too*: "
        f"**{'holds' if seen else 'undecided'}** here. Best overlaps: {'; '.join(overlaps)}. "
        f"A channel that is on in a twentieth of the pixels cannot cover a larger structure."
    )
    return told


def of_cams(found: dict[str, Any], seeds: int) -> list[str]:
    """The conclusions on the order of things, and on skips."""
    at = {
        name: {
            r: depths(found["cams"][name], seeds, r, 0.5)
            for r in ("brain", "whole tumour", "core", "enhancing")
        }
        for name in NETWORKS
    }
    steps = (("brain", "whole tumour"), ("whole tumour", "core"), ("whole tumour", "enhancing"))
    told, says = [], []
    lines = []
    for name, title in NETWORKS.items():
        parts = [interval(at[name][later] - at[name][sooner]) for sooner, later in steps]
        says += [verdict(part) for part in parts]
        words = (f"{b} after {a} by {part}" for (a, b), part in zip(steps, parts, strict=True))
        lines.append(f"{title}: {', '.join(words)}")
    told.append(
        f"- *Networks go from large to small, brain, tumour, parts*: **{together(says)}** here. Depth at which half "
        f"of the map lies in the one, less that of the other: {'; '.join(lines)}."
    )
    dice = {name: np.array(found["dice"][name])[..., 0] for name in NETWORKS}
    best = max(NETWORKS, key=lambda name: float(dice[name].mean()))
    slopes = {
        name: np.array([rising(row["whole tumour"]) for row in found["cams"][name]["rows"]]).reshape(
            seeds, -1
        )
        for name in NETWORKS
    }
    parts = [(NETWORKS[n], interval(slopes[best] - slopes[n])) for n in NETWORKS if n != best]
    told.append(
        f"- *The best network converges most clearly*: **{together([verdict(p) for _, p in parts])}** here. Rank "
        f"correlation of depth with the map's share in the tumour, {NETWORKS[best]} less others: "
        f"{'; '.join(f'{title} {part}' for title, part in parts)}."
    )
    parts = [
        (NETWORKS[n], interval(at[PLAIN]["whole tumour"] - at[n]["whole tumour"])) for n in (DENSE, RESIDUAL)
    ]
    told.append(
        f"- *With skips the tumour is localised earlier*: **{together([verdict(p) for _, p in parts])}** here. Depth "
        f"at which half of the map first lies in the tumour, of SimUnet less that of "
        f"{'; '.join(f'{title} {part}' for title, part in parts)}."
    )
    middle = {name: deepest(found["cams"][name], seeds) for name in NETWORKS}
    parts = [(NETWORKS[n], interval(middle[n] - middle[PLAIN])) for n in (DENSE, RESIDUAL)]
    told.append(
        f"- *Middle layers know nearly nothing of the place without skips*: "
        f"**{together([verdict(p) for _, p in parts])}** here. Share of the maps of the deepest level in the tumour, "
        f"less that of SimUnet ({interval(middle[PLAIN])}): {'; '.join(f'{title} {part}' for title, part in parts)}."
    )
    return told


def rising(shares: Sequence[float]) -> float:
    """Spearman's rank correlation of shares with depth; a map of zeros has nothing in the tumour."""
    ranks = np.argsort(np.argsort(np.nan_to_num(np.array(shares, dtype=float)), kind="stable"), kind="stable")
    return float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])


def deepest(row: dict[str, Any], seeds: int) -> np.ndarray:
    """The mean share in the tumour over the layers of the deepest level, (seeds, cases)."""
    inside = [place.startswith("encoder.3") for place in row["layers"]]
    shares = np.nan_to_num(np.array([one["whole tumour"] for one in row["rows"]], dtype=float))
    return shares[:, inside].mean(1).reshape(seeds, -1)


def of_uncertainty(found: dict[str, Any]) -> list[str]:
    """The conclusion on errors and uncertainty, and what dropout adds to it."""
    rows = found["uncertainty"]["rows"]
    told = []
    claims = (
        ("Misclassified regions are uncertain", "share", None, "of all errors"),
        ("So are parts of a tumour that are missed", "missed", None, "of missed tumour"),
        ("Dropout knows more of the errors than one forward", "share", "one forward", "of all errors"),
    )
    for claim, what, other, words in claims:
        parts = []
        for name, title in NETWORKS.items():
            less = [row[other][what] if other else FRACTION for row in rows[name]]
            parts.append(
                (
                    title,
                    interval(
                        known([row["variance"][what] - b for row, b in zip(rows[name], less, strict=True)])
                    ),
                )
            )
        beside = (
            f"that in as many pixels by the entropy of {other}"
            if other
            else f"{FRACTION:g}, which knows nothing"
        )
        told.append(
            f"- *{claim}*: **{together([verdict(p) for _, p in parts])}** here. Share {words} in the most uncertain "
            f"{FRACTION * 100:g} % of the brain, less {beside}: "
            f"{'; '.join(f'{title} {part}' for title, part in parts)}."
        )
    return told


def learnt(found: dict[str, Any]) -> str:
    """Whether the networks segment well enough for their insides to mean something."""
    least = {NETWORKS[name]: np.array(found["dice"][name])[..., 0].mean(1).min() for name in NETWORKS}
    failed = [f"{title} ({number(value)})" for title, value in least.items() if value < 0.8]
    if failed:
        return f"**Failed.** A Dice of the whole tumour of 0.8 was missed by {', '.join(failed)}."
    return "All of them reach the Dice of the whole tumour of 0.8 that was asked for before looking inside."


def page(found: dict[str, Any], setting: Setting, files: dict[str, str]) -> str:
    """The page of the experiment."""
    dice_rows = []
    for name, title in NETWORKS.items():
        values = np.array(found["dice"][name], dtype=float)
        own = [values[..., r] for r in range(len(REGIONS))]
        there = [v[:, ~np.isnan(v).any(0)] for v in own]
        dice_rows.append([title, *(interval(v) for v in there)])
    shares, detector_rows = found["dissection"]["shares"], []
    for concept in (*EXPLICIT, *IMPLICIT):
        cells = []
        for quantile in QUANTILES:
            for name in NETWORKS:
                best = found["dissection"]["found"][str(quantile)][name]["best"][concept]
                text = f"{number(best['iou'])} ({place_in_words(best['place'])}, {best['channel']})"
                cells.append(f"**{text}**" if best["detector"] else text)
        detector_rows.append([concept, number(shares[concept]), *cells])
    head = [
        "concept",
        "share of the pixels",
        *(f"{t}, q = {q}" for q in QUANTILES for t in NETWORKS.values()),
    ]
    depth_rows = []
    for name, title in NETWORKS.items():
        own = [depths(found["cams"][name], setting.seeds, "whole tumour", least) for least in SHARES]
        never = float((own[1] > 1).mean())
        depth_rows.append(
            [title, len(found["cams"][name]["layers"]), *(interval(v) for v in own), number(never)]
        )
    unsure_rows = []
    for name, title in NETWORKS.items():
        rows = found["uncertainty"]["rows"][name]
        for map_ in MAPS:
            values = [
                interval(known([row[map_][what] for row in rows])) for what in ("share", "missed", "augrc")
            ]
            ratio = interval(known([row[map_]["wrong"] / row[map_]["right"] for row in rows]))
            unsure_rows.append([title, map_, *values, ratio])
    shift_rows = [
        [
            *(NETWORKS[name], f"{form} dropout"),
            *(
                interval(known([row[form][what] for row in rows]))
                for what in ("one forward", "mean of draws", "share")
            ),
        ]
        for name, rows in found["shifts"].items()
        for form in ("without", "with")
    ]
    sentences = [*of_concepts(found), *of_cams(found, setting.seeds), *of_uncertainty(found)]
    return filled(
        "natekar",
        **files,
        learnt=learnt(found),
        held_out=len(found["dice"][DENSE][0]),
        seeds="one training" if setting.seeds == 1 else f"{setting.seeds} trainings",
        dice=table(["network", "WT Dice", "TC Dice", "ET Dice"], dice_rows),
        dissected=setting.dissected,
        permutations=setting.permutations,
        detectors=table(head, detector_rows),
        located=setting.located,
        depths=table(
            ["network", "layers", *(f"{s:g} of the mass" for s in SHARES), "never half"], depth_rows
        ),
        cases=setting.cases,
        draws=setting.draws,
        fraction=f"{FRACTION * 100:g}",
        uncertainty=table(
            [
                "network",
                "map",
                f"errors in {FRACTION * 100:g} %",
                "missed tumour in them",
                "AUGRC",
                "wrong / right",
            ],
            unsure_rows,
        ),
        shifts=table(
            [
                *("network", "statistics", "wrong pixels, one forward", "wrong pixels, mean of draws"),
                f"errors in {FRACTION * 100:g} % by variance",
            ],
            shift_rows,
        ),
        shift_draws=max(2, setting.draws // 5),
        conclusions="\n".join(sentences),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and few, to see whether it runs")
    parser.add_argument("--folder", type=Path, help="where the page goes; by default the documentation")
    parser.add_argument(
        "--results", type=Path, help="a folder of numbers: read if they are there, else written"
    )
    options = parser.parse_args()
    setting = QUICK if options.quick else Setting()
    folder = options.folder or (Path(tempfile.mkdtemp()) if options.quick else DOCS)
    with eg.execution(progress=False):
        found = measured(setting, options.results)
        files = {
            "figure_2": figure("natekar_2", draw_detectors(found), folder),
            "figure_9": figure("natekar_9", draw_channels(found), folder),
            "figure_5": figure("natekar_5", draw_cams(), folder),
            "figure_11": figure("natekar_11", draw_every_layer(), folder),
            "masses": figure("natekar_masses", draw_masses(found), folder),
            "figure_7": figure("natekar_7", draw_uncertainty(found, setting), folder),
        }
    written = folder / "experiments" / "natekar.md"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(page(found, setting, files))
    print(f"written: {written}")


if __name__ == "__main__":
    main()
