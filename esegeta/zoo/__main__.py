"""Explain a real network on a real head: ``python -m esegeta.zoo [--size 64] [--out FOLDER]``.

The brain-extraction U-Net segments the head; four methods say which voxels it used. The maps are written on
the grid of the image that was explained, in mm, beside a picture of all of them.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import esegeta as eg
from esegeta import zoo
from esegeta._types import Score
from esegeta.engine import check

WHERE = "python -m esegeta.zoo"


class Found(NamedTuple):
    """The map of one method, and what can be said about it in numbers."""

    name: str
    map: Tensor
    gradients: int
    seconds: float
    inside: float  # share of the positive attribution that lies in the brain
    residual: float | None  # what is unexplained, as a share of the difference to the baseline


def regrid(values: Tensor, size: int) -> Tensor:
    """The whole of a volume ``(..., n, n, n)`` on ``size`` voxels a side: each is the mean of what it covers.

    >>> regrid(torch.tensor([0., 2., 4., 6.]).expand(1, 4, 4, 4), 2)[0, 0, 0].tolist()
    [1.0, 5.0]
    """
    for _ in range(3):
        n = values.shape[-3]
        edge = torch.arange(size + 1, dtype=values.dtype) * (n / size)
        voxel = torch.arange(n, dtype=values.dtype)
        overlap = torch.minimum(edge[1:, None], voxel + 1) - torch.maximum(edge[:-1, None], voxel)
        # The contracted axis moves to the end: after one turn for each, the axes are back in order.
        values = torch.tensordot(values, overlap.clamp(min=0) * (size / n), dims=([-3], [1]))
    return values


def regrid_affine(affine: np.ndarray, ratio: float) -> np.ndarray:
    """The affine of a grid whose voxels are ``ratio`` times as large and cover the same space.

    >>> regrid_affine(np.eye(4), 2.0)[0].tolist()
    [2.0, 0.0, 0.0, 0.5]
    """
    step = np.diag([ratio, ratio, ratio, 1.0])
    step[:3, 3] = (ratio - 1) / 2
    return affine @ step


def explain(score: Score, x: Tensor, spacing: tuple[float, ...], brain: Tensor) -> list[Found]:
    """Run the four methods, printing a line of the table after each."""
    air = eg.baselines.zero(x)
    sigma, steps, samples = 10.0, 12, 10
    adaptive = eg.integrated(score, tolerance=0.05, most=41)
    smooth = eg.smooth(eg.gradient(score), noise=0.05, samples=samples)
    focus = eg.blur_integrated_gradients(score, sigma=sigma, steps=steps, spacing=spacing)

    def integrated() -> tuple[Tensor, int, Tensor]:
        done = adaptive(x, air)
        return done.attribution, int(done.evaluations), air

    work: dict[str, Callable[[], tuple[Tensor, int, Tensor | None]]] = {
        "gradient": lambda: (eg.gradient(score)(x), 1, None),
        "adaptive_integrated_gradients": integrated,
        "smooth_gradient": lambda: (smooth(x, key=7), samples, None),
        "blur_integrated_gradients": lambda: (focus(x), steps, eg.spatial.blur(x, sigma, spacing)),
    }
    print(
        f"{'method':<31}{'gradients':>10}{'seconds':>9}{'positive in brain':>19}{'completeness residual':>23}"
    )
    found = []
    for name, run in work.items():
        started = time.perf_counter()
        a, gradients, baseline = run()
        seconds = time.perf_counter() - started
        positive = a.clamp(min=0)
        inside = float(positive[0][brain].sum() / positive.sum())
        residual = None
        if baseline is not None:
            difference = score(x) - score(baseline)
            residual = float((a.sum() - difference) / difference)
        found.append(Found(name, a, gradients, seconds, inside, residual))
        last = "no baseline" if residual is None else f"{100 * residual:.2f} %"
        print(f"{name:<31}{gradients:>10}{seconds:>9.1f}{100 * inside:>17.1f} %{last:>23}", flush=True)
    return found


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it: under its own name it is whole or not there."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(values: Tensor, affine: np.ndarray, path: Path) -> None:
    """Write one volume ``(1,*S)`` as NIfTI in mm."""
    from nibabel.nifti1 import Nifti1Image

    image = Nifti1Image(values[0].numpy().astype(np.float32), affine)
    image.header.set_xyzt_units("mm")
    replace(path, lambda part: image.to_filename(part))


def draw(found: Sequence[Found], x: Tensor, predicted: Tensor, spacing: Sequence[float], path: Path) -> None:
    """One picture: planes through the middle of the predicted brain, a column for each map."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    centre = [int(c) for c in predicted.nonzero().float().mean(0).round()]
    figure = Figure(figsize=(2.6 * (1 + len(found)), 8.2), layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(3, 1 + len(found))
    for row, axis in enumerate(range(3)):
        across, up = (a for a in range(3) if a != axis)
        shown = {
            "origin": "lower",
            "aspect": spacing[up] / spacing[across],
        }

        def plane(volume: Tensor, axis: int = axis) -> np.ndarray:
            return volume.select(axis, centre[axis]).numpy().T

        for column, cell in enumerate(axes[row]):
            cell.axis("off")
            cell.imshow(plane(x[0]), cmap="gray", **shown)
            if column == 0:
                cell.contour(plane(predicted.float()), levels=[0.5], colors="gold", linewidths=1)
                continue
            a = found[column - 1].map[0]
            limit = float(a.abs().flatten().kthvalue(int(0.998 * a.numel()))[0]) or 1.0
            seen = np.clip(np.abs(plane(a)) / limit, 0, 1) ** 0.6
            cell.imshow(plane(a), cmap="seismic", vmin=-limit, vmax=limit, alpha=seen, **shown)
            if row == 0:
                cell.set_title(
                    f"{found[column - 1].name.replace('_', ' ')}\nred for, blue against: ±{limit:.1g}",
                    fontsize=8,
                )
        if row == 0:
            axes[0][0].set_title("head, and what is\npredicted as brain", fontsize=8)
    for cell in axes.flat:
        cell.title.set_color("white")
    replace(path, lambda part: figure.savefig(part, format="png", dpi=110))


def a_size(text: str) -> int:
    """A size that the network takes; on coarser grids it finds no brain."""
    with suppress(ValueError):
        if int(text) % 8 == 0 and 40 <= int(text) <= 128:
            return int(text)
    raise argparse.ArgumentTypeError(
        check.problem(
            WHERE, "--size to be a multiple of 8 from 40 to 128", repr(text), "Choose for example 64"
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Explain, print, write."""
    parser = argparse.ArgumentParser(
        prog=WHERE, description="Explain a real brain-extraction U-Net on a real head."
    )
    parser.add_argument(
        "--size",
        type=a_size,
        default=64,
        help="voxels a side for the whole head, a multiple of 8 (default 64; 128 is full)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("brain_maps"), help="folder for the maps (default brain_maps)"
    )
    options = parser.parse_args(arguments)

    full = zoo.head()
    ratio = full.data.shape[-1] / options.size
    x = regrid(full.data, options.size)
    brain = regrid(zoo.brain_mask().float(), options.size) >= 0.5
    affine = regrid_affine(full.affine, ratio)
    spacing = tuple(mm * ratio for mm in full.spacing)

    model = eg.from_module(zoo.brain_extraction_unet())
    score = eg.reducers.predicted_class_sum(model, 1, at=x)
    with torch.no_grad():
        predicted = eg.reducers.predicted_mask(model(x), 1)
    dice = 2 * float((predicted & brain).sum() / (predicted.sum() + brain.sum()))
    print(
        f"The head on {options.size} voxels a side. The network finds the brain with a Dice of {dice:.2f}; "
        f"{100 * float(brain.float().mean()):.1f} % of all voxels are brain."
    )
    with warnings.catch_warnings(), eg.execution() as run:
        warnings.simplefilter("ignore", eg.ExecutionWarning)  # they are printed below
        found = explain(score, x, spacing, brain)
    for event in run.events:
        print(f"Note: {event['message']}")

    options.out.mkdir(parents=True, exist_ok=True)
    save(x, affine, options.out / "head.nii.gz")
    for one in found:
        save(one.map, affine, options.out / f"{one.name}.nii.gz")
    try:
        draw(found, x, predicted, spacing, options.out / "maps.png")
        print(f"Maps and a picture of them are in {options.out}.")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print(f"Maps are in {options.out}.")
        print('There is no picture of them, because matplotlib is missing: pip install "esegeta[viz]".')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
