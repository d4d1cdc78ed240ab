"""The evaluation of TorchEsegeta on drawn vessels: tables 1 and 2, figures 5 to 9, and what their numbers are.

    python benchmarks/experiments/torchesegeta.py --results somewhere    # judges, draws, writes the page
    python benchmarks/experiments/torchesegeta.py --quick                # does it run?

S. Chatterjee et al., TorchEsegeta: Framework for Interpretability and Explainability of Image-based Deep Learning
Models, 2022. Networks: ``vessel_unet``, ``vessel_unet_mss`` and ``vessel_unet_mss_deformation`` of the zoo, which
``train_torchesegeta.py`` made. What was computed is kept in ``--results``, network by network; a run that was stopped
goes on from there.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import esegeta as eg
from _common import DOCS, LINES, figure, filled, interval, kept, number, table, together, verdict
from esegeta import metrics, zoo
from train_torchesegeta import HELD_OUT, dice

NETWORKS = {
    "U-Net": zoo.vessel_unet,
    "U-Net MSS": zoo.vessel_unet_mss,
    "U-Net MSS deformation": zoo.vessel_unet_mss_deformation,
}
SHORT = dict(zip(NETWORKS, ("U-Net", "MSS", "MSS deformation"), strict=True))  # in figures
LEAST_DICE, THRESHOLD = 0.8, 0.5
TABLED = ("guided backprop", "deconvolution", "saliency")
MEASURES = ("infidelity", "least infidelity", "sensitivity", "AUC")
SIDE_BY_SIDE = ("guided backprop", "deconvolution", "saliency", "gradient", "input x gradient", "DeepLIFT")
ALIKE = ("gradient", "saliency", "integrated gradients", "deconvolution", "GradientSHAP")
SWEEPS = ("excitation backprop", "conductance", "layer DeepLIFT", "gradient x activation")
COUNTED = (
    *("largest", "largest in double precision", "rank correlation"),
    *("infidelity", "sensitivity"),
)
CASCADED = ("saliency", "guided backprop", "deconvolution", "guided Grad-CAM")


class Setting(NamedTuple):
    """How much is done."""

    networks: Sequence[str]
    size: int
    cases: int  # held-out phantoms
    cascades: int  # of them, for the cascade
    keys: int  # draws of perturbations
    samples: int  # perturbations of a number
    steps: int  # of integrals
    held_out: int  # phantoms for the Dice


FULL = Setting(tuple(NETWORKS), 64, 3, 1, 1, 3, 2, 4)
QUICK = Setting(("U-Net MSS deformation",), 32, 1, 1, 2, 2, 2, 1)


# --- What is explained ------------------------------------------------------------------------------------


def found_by(net: nn.Module, x: Tensor) -> Tensor:
    """Where a network finds vessels."""
    with torch.no_grad():
        return net(x[None])[0, 0] > 0


def score_of(model: Callable[[Tensor], Tensor], found: Tensor) -> Callable[[Tensor], Tensor]:
    """The mean logit where the network finds vessels, with that mask frozen."""
    weights = found / found.sum().clamp(min=1)
    return lambda x: (model(x)[0] * weights).sum()


def deepest(net: nn.Module) -> str:
    """The place of Grad-CAM: the level above the bottom, where a map has still some voxels a side."""
    return f"down.{len(net.down) - 2}"


def methods_of(score: Callable, net: nn.Module, steps: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every method at the input, as a function of x; what is drawn has a fixed key."""
    zero = torch.zeros_like
    shap = eg.gradient_shap(score, samples=steps, noise=0.05)
    ends = lambda x: torch.stack([torch.zeros_like(x), torch.full_like(x, float(x.median()))])
    return {
        "guided backprop": eg.guided_backprop(score),
        "deconvolution": eg.deconvolution(score),
        "saliency": eg.saliency(score),
        "gradient": eg.gradient(score),
        "input x gradient": eg.input_x_gradient(score),
        "DeepLIFT": lambda x: eg.deep_lift(score)(x, zero(x)),
        "integrated gradients": lambda x: eg.integrated_gradients(score, steps=steps)(x, zero(x)),
        "GradientSHAP": lambda x: shap(x, ends(x), key=0),
        "guided Grad-CAM": eg.guided_grad_cam(score, deepest(net)),
    }


def sweeps_of(
    score: Callable, places: Sequence[str], steps: int
) -> dict[str, Callable[[Tensor], Sequence[Tensor]]]:
    """Every method at every level by itself.

    Conductance and DeepLIFT of several places at once share the score among them: of levels that follow each other
    the last would get everything.
    """
    zero = torch.zeros_like

    def each(method: Callable[[str], Callable[..., Tensor]]) -> Callable[[Tensor], Sequence[Tensor]]:
        return lambda x: [method(place)(x, zero(x)) for place in places]

    return {
        "excitation backprop": eg.excitation_backprop(score, list(places)),
        "conductance": each(lambda place: eg.conductance(score, place, steps=steps)),
        "layer DeepLIFT": each(lambda place: eg.at(eg.deep_lift, place)(score)),
        "gradient x activation": eg.layer_gradient_x_activation(score, list(places)),
    }


def levels_of(net: nn.Module) -> list[str]:
    """The levels of a network in the order in which they run."""
    return [f"down.{n}" for n in range(len(net.down))] + [f"decoder.{n}" for n in range(len(net.decoder))]


# --- Numbers ----------------------------------------------------------------------------------------------


def judged(net: nn.Module, setting: Setting) -> dict[str, Any]:
    """The numbers of tables 1 and 2: measure by method, key and case; and the Dice of held-out phantoms."""
    model = eg.from_module(net)
    values = np.full((len(MEASURES), len(TABLED), setting.keys, setting.cases), np.nan)
    for case in range(setting.cases):
        x, mask = zoo.vessel_phantom(HELD_OUT[case], setting.size)
        score = score_of(model, found_by(net, x))
        methods = methods_of(score, net, setting.steps)
        for m, name in enumerate(TABLED):
            a = methods[name](x)
            area = float(metrics.roc_auc(metrics.given(a.abs()))(x, mask=mask))
            given = metrics.given(a, multiplied=False)
            plain, scaled = (
                metrics.infidelity(given, score, samples=setting.samples, scaled=s) for s in (False, True)
            )
            sensitivity = metrics.sensitivity_max(
                methods[name], radius=0.02, samples=max(2, setting.samples // 2)
            )
            for key in range(setting.keys):
                values[:, m, key, case] = [
                    float(plain(x, key=1000 * case + key)),
                    float(scaled(x, key=1000 * case + key)),
                    float(sensitivity(x, key=1000 * case + key)),
                    area,
                ]
        print(f"  numbers of phantom {case + 1} of {setting.cases}", flush=True)
    scores = []
    for key in HELD_OUT[: setting.held_out]:
        x, mask = zoo.vessel_phantom(key, setting.size)
        scores.append(dice(found_by(net, x), mask))
    return {"values": values.tolist(), "dice": scores}


def stages_of(net: nn.Module, x: Tensor) -> dict[str, list[str]]:
    """The layers in three groups, from the output down; each is randomised together with those before it."""
    names = metrics.layers_of(net, x)[::-1]
    group = {"out": "output", "up": "decoders", "decoder": "decoders", "down": "all"}
    stages: dict[str, list[str]] = {"output": [], "decoders": [], "all": []}
    for name in names:
        stages[group[name.partition(".")[0]]].append(name)
    return stages


def cascaded(net: nn.Module, setting: Setting) -> dict[str, Any]:
    """Rank correlation of sizes after every stage, by method, stage and case; and projections of the first maps."""
    values = np.full((len(CASCADED), 3, setting.cascades), np.nan)
    pictures: dict[str, list] = {}
    for case in range(setting.cascades):
        x, _ = zoo.vessel_phantom(HELD_OUT[case], setting.size)
        found = found_by(net, x)
        clean = methods_of(score_of(eg.from_module(net), found), net, setting.steps)
        maps = {name: clean[name](x) for name in CASCADED}
        if case == 0:
            pictures["trained"] = [projected(maps[name]).tolist() for name in CASCADED]
        gone: list[str] = []
        for stage, (title, names) in enumerate(stages_of(net, x).items()):
            gone = gone + names
            other = metrics.randomised(net, gone, key=case)
            anew = methods_of(score_of(eg.from_module(other), found), other, setting.steps)
            for m, name in enumerate(CASCADED):
                a = anew[name](x)
                values[m, stage, case] = float(metrics.absolute_rank_correlation(maps[name], a))
                if case == 0:
                    pictures.setdefault(title, []).append(projected(a).tolist())
        print(f"  cascade of phantom {case + 1} of {setting.cascades}", flush=True)
    return {"values": values.tolist(), "pictures": pictures}


def drawn_maps(net: nn.Module, setting: Setting) -> dict[str, Any]:
    """Projections of the maps of figures 5 and 6, and of every layer for figures 7 and 8, of one phantom."""
    x, mask = zoo.vessel_phantom(HELD_OUT[0], setting.size)
    found = found_by(net, x)
    score = score_of(eg.from_module(net), found)
    methods = methods_of(score, net, setting.steps)
    wanted = dict.fromkeys((*SIDE_BY_SIDE, *ALIKE))
    maps = {name: projected(methods[name](x)).tolist() for name in wanted}
    places = levels_of(net)
    layers, sums = {}, {}
    for name, sweep in sweeps_of(score, places, setting.steps).items():
        found_maps = sweep(x)
        sums[name] = [float(a.double().abs().sum()) for a in found_maps]
        layers[name] = [projected(a, x.shape[1:]).tolist() for a in found_maps]
        print(f"  {name} at {len(places)} levels", flush=True)
    head = [
        projected(x).tolist(),
        projected(mask[None].float()).tolist(),
        projected(found[None].float()).tolist(),
    ]
    return {"maps": maps, "layers": layers, "sums": sums, "places": places, "head": head}


def projected(a: Tensor, shape: Sequence[int] | None = None) -> np.ndarray:
    """The maximum along the second axis of the size of a map, channels added up; layers brought to the grid of x."""
    size = a.detach().abs().sum(0).float()
    if shape is not None and size.shape != tuple(shape):
        size = functional.interpolate(size[None, None], tuple(shape), mode="trilinear")[0, 0]
    return np.array([[float(f"{v:.4g}") for v in line] for line in size.amax(1).T.flip(0)])


# --- The count --------------------------------------------------------------------------------------------


class OldQuotient(torch.autograd.Function):
    """z / z with the derivative that torch once had: g / z - g z / (z z), which is 0 but for rounding."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z / z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return g / z - g * z / (z * z)


def count_of(net: nn.Module, quotient: Callable[[Tensor], Tensor], at: Tensor) -> Callable[[Tensor], Tensor]:
    """How the original system reduces: the sum of z / z over what is above a threshold, which is a count.

    Which voxels those are is frozen: else each that crosses the threshold would change the count by one.
    """
    model = eg.from_module(net)
    with torch.no_grad():
        above = model(at) > THRESHOLD

    def score(x: Tensor) -> Tensor:
        return torch.where(above, quotient(model(x)), 0.0).sum()

    return score


def counted(net: nn.Module, setting: Setting) -> dict[str, float | str]:
    """What gradients through the count are, beside those of the mean logit."""
    x, _ = zoo.vessel_phantom(HELD_OUT[0], setting.size)
    slope = lambda score: lambda x: torch.func.grad(score)(x)
    now = slope(count_of(net, lambda z: z / z, x))(x)
    wide, y = copy.deepcopy(net).double(), x.double()
    exact_old = slope(count_of(wide, OldQuotient.apply, y))(y)
    exact_mean = slope(score_of(eg.from_module(wide), found_by(wide, y)))(y)
    count, mean = count_of(net, OldQuotient.apply, x), score_of(eg.from_module(net), found_by(net, x))
    told: dict[str, float | str] = {"largest gradient now": float(now.abs().max())}
    for name, score, exact in (("count", count, exact_old), ("mean logit", mean, exact_mean)):
        a = slope(score)(x)
        told[f"{name}: largest"] = float(a.abs().max())
        told[f"{name}: largest in double precision"] = float(exact.abs().max())
        told[f"{name}: rank correlation"] = float(metrics.rank_correlation(a, exact.float()))
        small = lambda x, baseline, key: 1e-4 * eg.random.normal(key, x.shape)  # noqa: ARG005
        explain = metrics.given(a.abs(), multiplied=False)
        told[f"{name}: infidelity"] = float(
            metrics.infidelity(explain, score, perturbation=small, samples=4)(x, key=0)
        )
        moved = x + 1e-3 * eg.random.normal(1, x.shape)
        told[f"{name}: sensitivity"] = float((slope(score)(moved).abs() - a.abs()).norm() / a.norm())
    try:
        eg.gradient(eg.reducers.predicted_count(eg.from_module(net), 1))(x)
    except ValueError as refusal:
        told["refusal"] = str(refusal)
    return told


# --- Figures ----------------------------------------------------------------------------------------------


def _picture(a: Any, head: Any, limit: float | None = None) -> np.ndarray:
    """A projection in red over the faint projection of the head."""
    from esegeta.plot.colours import Scale, blend

    size, below = np.asarray(a), np.asarray(head)
    grey = 0.45 * np.clip(below / below.max(), 0, 1)
    end = limit or float(np.quantile(size, 0.995)) or 1.0
    return blend(size, Scale("positive", end), np.repeat(grey[..., None], 3, axis=-1))


def _grid(
    rows: int, columns: int, side: float, left: float, top: float, bottom: float = 0.05
) -> tuple[Any, Callable]:
    """A white figure and a function (row, column) -> axes without ticks; lengths in inches."""
    from esegeta.plot.canvas import new

    width, height = left + columns * side + 0.05, top + rows * side + bottom
    drawn = new(width, height, "white")

    def axes_at(row: int, column: int, share: float = 0.96) -> Any:
        x, y = left + column * side, height - top - (row + 1) * side
        axes = drawn.add_axes((x / width, y / height, side * share / width, side * share / height))
        axes.set_xticks([])
        axes.set_yticks([])
        return axes

    def label(row: float, text: str, rows: float = 1, at: float = 0.5, size: float = 9) -> None:
        y = height - top - (row + rows / 2) * side
        drawn.text(at * left / width, y / height, text, ha="center", va="center", fontsize=size, rotation=90)

    drawn.label = label
    return drawn, axes_at


def figure_5(parts: dict[str, dict]) -> Any:
    """Methods in rows; for each network its map, and a part of it from nearby."""
    drawn, axes_at = _grid(1 + len(SIDE_BY_SIDE), 2 * len(parts), 1.2, 0.5, 0.32)
    for n, (network, part) in enumerate(parts.items()):
        head, mask, found = (np.asarray(p) for p in part["head"])
        close = zoomed(mask)
        for k, cut in enumerate((slice(None), close)):
            cut = (cut, cut) if k == 0 else cut
            axes = axes_at(0, 2 * n + k)
            axes.imshow(np.clip(head / np.quantile(head, 0.999), 0, 1)[cut], cmap="gray", vmin=0, vmax=1)
            axes.contour(found[cut] > 0.5, [0.5], colors="#E69F00", linewidths=0.6)
            axes.set_title(SHORT[network] if k == 0 else "closer", fontsize=8.5)
            for m, method in enumerate(SIDE_BY_SIDE):
                a = np.asarray(part["maps"][method])
                picture = _picture(a, head)
                axes_at(m + 1, 2 * n + k).imshow(picture[cut])
    drawn.label(0, "prediction")
    for m, method in enumerate(SIDE_BY_SIDE):
        drawn.label(m + 1, method)
    return drawn


def zoomed(mask: np.ndarray) -> tuple[slice, slice]:
    """A third of a picture, round where most of its mask lies."""
    side = max(8, mask.shape[0] // 3)
    sums = np.lib.stride_tricks.sliding_window_view(mask, (side, side)).sum((2, 3))
    row, column = np.unravel_index(int(sums.argmax()), sums.shape)
    return slice(row, row + side), slice(column, column + side)


def figure_6(part: dict) -> Any:
    """Methods that look alike, of the last network."""
    drawn, axes_at = _grid(1, len(ALIKE), 1.7, 0.05, 0.32)
    for n, method in enumerate(ALIKE):
        axes = axes_at(0, n)
        axes.imshow(_picture(part["maps"][method], part["head"][0]))
        axes.set_title(method, fontsize=9)
    return drawn


def figure_layers(parts: dict[str, dict], sweeps: Sequence[str]) -> Any:
    """A row for each method and network, a column for each level; each picture on its own scale."""
    wide = max(len(part["places"]) for part in parts.values())
    drawn, axes_at = _grid(len(sweeps) * len(parts), wide, 0.92, 0.75, 0.1)
    for s, sweep in enumerate(sweeps):
        drawn.label(s * len(parts), sweep, rows=len(parts), at=0.25, size=10)
        for n, (network, part) in enumerate(parts.items()):
            row = s * len(parts) + n
            drawn.label(row, SHORT[network], at=0.75, size=7)
            for k, place in enumerate(part["places"]):
                # The encoder ends where it ends; decoders stand at the right.
                column = k if place.startswith("down") else wide - (len(part["places"]) - k)
                axes = axes_at(row, column)
                axes.imshow(_picture(part["layers"][sweep][k], part["head"][0]))
                axes.text(0.04, 0.94, place, transform=axes.transAxes, color="white", fontsize=6.5, va="top")
    return drawn


def figure_9(found: dict[str, dict], heads: dict[str, Any]) -> Any:
    """The map after some stages of the cascade, above the curves of what is left of it."""
    shown = ("trained", "output", "decoders", "all")
    drawn, axes_at = _grid(len(CASCADED), len(shown) * len(found), 0.92, 0.5, 0.55, bottom=2.35)
    width, height = drawn.get_size_inches()
    for n, (network, part) in enumerate(found.items()):
        for k, stage in enumerate(shown):
            for m in range(len(CASCADED)):
                axes = axes_at(m, n * len(shown) + k)
                axes.imshow(_picture(part["pictures"][stage][m], heads[network]))
                if m == 0:
                    axes.set_title(stage, fontsize=8)
        drawn.text(
            (0.5 + (n + 0.5) * len(shown) * 0.92) / width,
            1 - 0.12 / height,
            network,
            ha="center",
            va="top",
            fontsize=10,
        )
        values = np.asarray(part["values"])
        axes = drawn.add_axes(
            (
                (0.5 + n * len(shown) * 0.92 + 0.25) / width,
                0.62 / height,
                (len(shown) * 0.92 - 0.4) / width,
                1.5 / height,
            )
        )
        for m, method in enumerate(CASCADED):
            points = [interval(values[m, s]) for s in range(values.shape[1])]
            error = [[0.0] + [p.mean - p.low for p in points], [0.0] + [p.high - p.mean for p in points]]
            axes.errorbar(
                np.arange(len(shown)) + 0.05 * (m - 1.5),
                [1.0] + [p.mean for p in points],
                yerr=error,
                fmt="o-",
                ms=3,
                lw=1.2,
                color=LINES[m],
                label=method,
            )
        axes.axhline(0, color="#888888", lw=0.7)
        axes.set_xticks(range(len(shown)), shown, fontsize=7)
        axes.set_ylim(-0.25, 1.05)
        axes.tick_params(axis="y", labelsize=7)
        if n == 0:
            axes.set_ylabel("rank correlation", fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    drawn.legend(*axes.get_legend_handles_labels(), ncol=4, loc="lower center", frameon=False, fontsize=8.5)
    for m, method in enumerate(CASCADED):
        drawn.label(m, method.replace(" ", "\n"), size=8)
    return drawn


# --- What the paper says, and what is found ---------------------------------------------------------------


def claims(numbers: dict[str, dict], cascades: dict[str, dict]) -> list[str]:
    """Sentences of the paper, each with what was found here."""
    values = {n: np.asarray(found["values"]) for n, found in numbers.items()}
    told: list[str] = []

    def tell(claim: str, differences: Sequence[tuple[str, np.ndarray]]) -> None:
        intervals = [(name, interval(d)) for name, d in differences]
        says = together([verdict(i) for _, i in intervals])
        shown = "; ".join(f"{name}: {i}" for name, i in intervals)
        told.append(f"- *{claim}*: **{says}** here. {shown}.")

    guided, deconvolution, saliency = range(3)
    log = {n: np.log10(v) for n, v in values.items()}
    last = list(values)[-1]
    tell(
        "Table 1: guided backprop has the lowest infidelity, saliency the highest",
        [
            (f"{n}, log10 of the ratio, {TABLED[b]} to {TABLED[a]}", log[n][0, b] - log[n][0, a])
            for n in values
            for a, b in ((guided, deconvolution), (deconvolution, saliency))
        ],
    )
    tell(
        "Table 2: guided backprop is the least sensitive",
        [
            (f"{n}, {TABLED[m]} less guided backprop", values[n][2, m] - values[n][2, guided])
            for n in values
            for m in (deconvolution, saliency)
        ],
    )
    if len(values) > 1:
        others = [n for n in values if n != last]
        tell(
            "Table 1: the network with deformation has the lowest infidelity, for every method",
            [
                (f"{TABLED[m]}, log10 of the ratio, {n} to deformation", log[n][0, m] - log[last][0, m])
                for m in range(3)
                for n in others
            ],
        )
        tell(
            "Table 2: the network with deformation is the least sensitive, for every method",
            [
                (f"{TABLED[m]}, {n} less deformation", values[n][2, m] - values[last][2, m])
                for m in range(3)
                for n in others
            ],
        )
        focus = {n: values[n][3].mean(0) for n in values}
        tell(
            "Figure 5: the maps of the network with deformation lie best on the vessels",
            [
                (f"AUC against the mask, mean of three methods, deformation less {n}", focus[last] - focus[n])
                for n in others
            ],
        )
    after = {n: np.asarray(c["values"]) for n, c in cascades.items()}
    tell(
        "Figure 9: maps fade as the network is randomised",
        [
            (
                f"{n}, 0.5 less the size of the rank correlation when all is random, {CASCADED[m]}",
                0.5 - np.abs(after[n][m, -1]),
            )
            for n in after
            for m in range(len(CASCADED))
        ],
    )
    tell(
        "Figure 9: guided Grad-CAM depends most on the weights, from the first step on",
        [
            (f"{n}, {CASCADED[m]} less guided Grad-CAM after the output", after[n][m, 0] - after[n][3, 0])
            for n in after
            for m in range(3)
        ],
    )
    if len(after) > 1:
        first, *others = after
        depends = {n: np.abs(after[n][:, 0]).mean(0) for n in after}
        tell(
            "Figure 9: the maps of the other networks depend more on the weights than those of the U-Net",
            [
                (
                    f"size of the rank correlation after the output, {first} less {n}",
                    depends[first] - depends[n],
                )
                for n in others
            ],
        )
    return told


def concluded(numbers: dict[str, dict], cascades: dict[str, dict]) -> str:
    """The claims, unless a network has not learnt its task."""
    failed = [n for n, found in numbers.items() if not np.mean(found["dice"]) >= LEAST_DICE]
    if failed:
        return (
            f"**Failed.** {', '.join(failed)} missed a Dice of {LEAST_DICE} on held-out phantoms. What explanations"
            " of a network say that has not learnt its task is no evidence for or against anything, so no conclusions"
            " are drawn."
        )
    return "\n".join(claims(numbers, cascades))


def peaks(parts: dict[str, dict]) -> list[list[str]]:
    """For each sweep and network the level with the largest sum of sizes."""
    rows = []
    for sweep in SWEEPS:
        rows.append(
            [sweep, *(f"`{part['places'][int(np.argmax(part['sums'][sweep]))]}`" for part in parts.values())]
        )
    return rows


def page(
    setting: Setting, numbers: dict, cascades: dict, parts: dict, count: dict, files: dict[str, str]
) -> str:
    """The page of the experiment."""
    values = {n: np.asarray(found["values"]) for n, found in numbers.items()}

    def tabled(measure: int) -> str:
        rows = [
            [TABLED[m], *(str(interval(values[n][measure, m])) for n in values)] for m in range(len(TABLED))
        ]
        return table(["", *values], rows)

    rows = [
        [row, *(number(float(count[f"{name}: {row}"])) for name in ("count", "mean logit"))]
        for row in COUNTED
    ]
    dices = [[n, str(interval(d["dice"])), number(min(d["dice"]))] for n, d in numbers.items()]
    return filled(
        "torchesegeta",
        held_out=setting.held_out,
        cases=setting.cases,
        keys=setting.keys,
        steps=max(2, setting.samples // 2),
        dices=table(["network", "mean and interval", "least"], dices),
        peaks=table(["", *parts], peaks(parts)),
        infidelity=tabled(0),
        least_infidelity=tabled(1),
        sensitivity=tabled(2),
        auc=tabled(3),
        conclusions=concluded(numbers, cascades),
        now=number(float(count["largest gradient now"])),
        counted=setting.networks[-1],
        counts=table(["", "through the count", "through the mean logit"], rows),
        refusal=count["refusal"],
        **{f"figure_{n}": file for n, file in files.items()},
    )


# --- Running ----------------------------------------------------------------------------------------------


def measured(name: str, setting: Setting, results: Path | None) -> tuple[dict, dict, dict]:
    """Numbers, cascade and maps of one network."""
    net = NETWORKS[name]()
    print(name, flush=True)

    def part(kind: str, compute: Callable) -> dict[str, Any]:
        file = None if results is None else results / f"{kind}_{name.replace(' ', '_').lower()}.json"
        return kept(file, lambda: compute(net, setting))

    return part("numbers", judged), part("cascade", cascaded), part("maps", drawn_maps)


def run(setting: Setting, folder: Path, results: Path | None) -> Path:
    """Everything, network by network; returns the page."""
    numbers, cascades, parts = {}, {}, {}
    for name in setting.networks:
        numbers[name], cascades[name], parts[name] = measured(name, setting, results)
    file = None if results is None else results / "count.json"
    count = kept(file, lambda: counted(NETWORKS[setting.networks[-1]](), QUICK))
    heads = {name: part["head"][0] for name, part in parts.items()}
    drawn = {
        "5": figure_5(parts),
        "6": figure_6(parts[setting.networks[-1]]),
        "7": figure_layers(parts, SWEEPS[:2]),
        "8": figure_layers(parts, SWEEPS[2:]),
        "9": figure_9(cascades, heads),
    }
    files = {n: figure(f"torchesegeta_{n}", f, folder) for n, f in drawn.items()}
    file = folder / "experiments" / "torchesegeta.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(setting, numbers, cascades, parts, count, files))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and few, to see whether it runs")
    parser.add_argument("--folder", type=Path, help="where the page goes; by default the documentation")
    parser.add_argument(
        "--results", type=Path, help="a folder of numbers: what is there is read, the rest written"
    )
    parser.add_argument(
        "--only", choices=NETWORKS, help="compute the numbers of one network, and write no page"
    )
    options = parser.parse_args()
    setting = QUICK if options.quick else FULL
    folder = options.folder or (Path(tempfile.mkdtemp()) if options.quick else DOCS)
    with eg.execution(progress=False):
        if options.only:
            measured(options.only, setting, options.results)
        else:
            print(f"written: {run(setting, folder, options.results)}")


if __name__ == "__main__":
    main()
