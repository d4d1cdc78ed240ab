"""Slices of which everything is known: a drawn tumour in a drawn brain, as four sequences of MRI see them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esegeta.engine import check

Floats = np.ndarray

SEQUENCES = ("FLAIR", "T1", "T1ce", "T2")
PARTS = {1: "core", 2: "edema", 3: "enhancing"}
TISSUES = {1: "fluid", 2: "grey matter", 3: "white matter"}
# How bright what is in each of the sequences.
BRIGHT = {
    "fluid": (0.12, 0.18, 0.18, 0.95),
    "grey matter": (0.50, 0.46, 0.48, 0.58),
    "white matter": (0.40, 0.66, 0.68, 0.42),
    "core": (0.52, 0.26, 0.28, 0.86),
    "edema": (0.88, 0.42, 0.44, 0.80),
    "enhancing": (0.72, 0.44, 1.00, 0.66),
}


class TumourSlice(NamedTuple):
    """An image and what is in it.

    data: float32 of shape ``(4, size, size)``, as ``SEQUENCES``; labels: 0, or the number of a part as in ``PARTS``;
    tissues: what is there, or was before the tumour, as in ``TISSUES``, 0 outside of the brain. Both are int64 of
    shape ``(size, size)``.
    """

    data: Tensor
    labels: Tensor
    tissues: Tensor

    @property
    def concepts(self) -> dict[str, Tensor]:
        """Masks by name: the whole tumour, its parts, the brain and its tissues where the tumour is not."""
        clear = self.labels == 0
        tumour = {"whole tumour": ~clear, "tumour core": (self.labels == 1) | (self.labels == 3)}
        parts = {name: self.labels == number for number, name in PARTS.items()}
        healthy = {name: (self.tissues == number) & clear for number, name in TISSUES.items()}
        return {**tumour, **parts, "brain": self.tissues > 0, **healthy}


def tumour_slice(key: int = 0, size: int = 80) -> TumourSlice:
    """Draw a slice of a brain with a glioma, as FLAIR, T1, T1 with contrast agent and T2 show it.

    A folded cortex around white matter, ventricles; a core with a rim that takes up contrast agent, in most tumours,
    and edema around both. The sequences see the parts differently: all of the tumour is bright in FLAIR and T2, the
    enhancing part in T1ce alone, the core is dark in T1. Small lesions that are bright in FLAIR and vessels that are
    bright in T1ce are no tumour. Tumours are more or less faint, and edema fades at its edge; every sequence has a
    brightness, a bias field and noise of its own. The skull is not in the image; outside of the brain there is zero.

    Args:
        key: the same key gives the same slice.
        size: pixels a side, 32 or more.

    Returns:
        The image, the parts of the tumour, and tissues.

    Example:
        >>> x, labels, tissues = tumour_slice(key=3)
        >>> tuple(x.shape), tuple(labels.shape)
        ((4, 80, 80), (80, 80))
        >>> bool(x[0][labels == 2].mean() > 1.3 * x[0][(labels == 0) & (tissues > 0)].mean())
        True
    """
    check.positive_count("tumour_slice", "size", size)
    if size < 32:
        raise check.refused("tumour_slice", "size to be 32 or more", str(size), "Smaller ones show no parts")
    rng = np.random.default_rng([key, size])
    at = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 2, indexing="ij"))
    edge = 1 / size  # half a pixel: how far what is next to an edge is mixed
    tissues, inside = _brain(rng, at, edge)
    shares, faint = _tumour(rng, at, edge, inside)

    images = []
    lesions, vessels = _lesions(rng, at, edge, inside), _vessels(rng, at, edge, inside)
    for n, sequence in enumerate(SEQUENCES):
        image = sum(BRIGHT[name][n] * share for name, share in tissues.items())
        image = image + 0.05 * inside * _smooth(rng, size, 14)
        if sequence == "FLAIR":
            image = image + lesions * (0.85 - image)
        if sequence == "T1ce":
            image = image + vessels * (0.95 - image)
        texture = 1 + 0.08 * _smooth(rng, size, 10)
        for name, share in shares.items():
            image = image + faint * share * (BRIGHT[name][n] * texture - image)
        image = image * np.exp(0.1 * _smooth(rng, size, 2)) * rng.uniform(0.9, 1.1)
        images.append(np.abs(image + 0.04 * rng.standard_normal(image.shape)) * (inside > 0.5))

    labels = np.zeros((size, size), dtype=np.int64)
    for number, name in ((2, "edema"), (1, "core"), (3, "enhancing")):  # later ones lie in earlier ones
        labels[shares[name] > 0.5] = number
    brain = inside > 0.5
    labels[~brain] = 0
    numbers = 1 + np.argmax(np.stack([tissues[name] for name in TISSUES.values()]), axis=0)
    data = torch.from_numpy(np.stack(images).astype(np.float32))
    return TumourSlice(data, torch.from_numpy(labels), torch.from_numpy(np.where(brain, numbers, 0)))


def _soft(depth: Floats, edge: float) -> Floats:
    """The share of a pixel that lies in a shape, by how deep its middle lies in it."""
    return np.clip(0.5 + depth / (2 * edge), 0, 1)


def _brain(rng: np.random.Generator, at: Floats, edge: float) -> tuple[dict[str, Floats], Floats]:
    """Shares of each pixel by tissue, and the share of the brain."""
    size = at.shape[-1]
    radii = rng.uniform((0.82, 0.68), (0.92, 0.78))
    radius = np.hypot(*(at / radii[:, None, None])) * radii.mean()
    depth = radii.mean() + 0.015 * _smooth(rng, size, 5) - radius  # from the surface inwards
    inside = _soft(depth, edge)
    folds = 0.15 + 0.07 * _smooth(rng, size, 13)  # how deep the cortex reaches
    white = _soft(depth - np.clip(folds, 0.05, 0.3), edge) * inside
    nuclei = np.zeros_like(white)
    fluid = (
        _soft(0.035 - depth, edge) * inside + _soft(0.012 - np.abs(at[1]), edge) * (radius > 0.45) * inside
    )
    for side in (-1, 1):
        near = np.array([rng.uniform(-0.05, 0.05), side * rng.uniform(0.2, 0.26)])
        nuclei = np.maximum(nuclei, _ellipse(at, near, rng.uniform(0.08, 0.13, 2), edge))
        centre = np.array([rng.uniform(-0.06, 0.06), side * rng.uniform(0.06, 0.1)])
        horn = _ellipse(at, centre, (rng.uniform(0.18, 0.3), rng.uniform(0.035, 0.07)), edge)
        fluid = np.maximum(fluid, horn)
    fluid = np.clip(fluid, 0, 1) * inside
    white = np.clip(white - nuclei, 0, 1) * (1 - fluid)
    grey = np.clip(inside - white - fluid, 0, 1)
    return {"fluid": fluid, "grey matter": grey, "white matter": white}, inside


def _tumour(
    rng: np.random.Generator, at: Floats, edge: float, inside: Floats
) -> tuple[dict[str, Floats], float]:
    """Shares of each pixel by part of the tumour, outer ones first, and how visible it is."""
    size = at.shape[-1]
    angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.55)
    centre = away * np.array([np.sin(angle), 0.85 * np.cos(angle)])
    turn = rng.uniform(0, np.pi)
    rows = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    moved = np.einsum("ij,jhw->ihw", rows, at - centre[:, None, None])
    radius = rng.uniform(0.16, 0.34)
    shape = radius * rng.uniform((0.8, 0.8), (1.25, 1.25))
    deep = (1 - np.hypot(*(moved / shape[:, None, None]))) * radius
    whole = deep + 0.05 * _smooth(rng, size, 7)
    core = deep - radius * rng.uniform(0.3, 0.55) + 0.025 * _smooth(rng, size, 8)
    thick = rng.uniform(0.04, 0.09) if rng.random() < 0.8 else -1.0  # low-grade ones take up nothing
    rim = core + 0.015 * _smooth(rng, size, 10)
    fade = rng.uniform(1, 4)  # edges of edema are less sharp than those of the core
    shares = {
        "edema": _soft(whole, fade * edge) * inside,
        "core": _soft(core, edge) * inside,
        "enhancing": _soft(core, edge) * _soft(thick - rim, edge) * inside,
    }
    return shares, rng.uniform(0.55, 1.0)


def _lesions(rng: np.random.Generator, at: Floats, edge: float, inside: Floats) -> Floats:
    """A few small bright spots, some of them as bright as edema."""
    found = np.zeros_like(inside)
    for _ in range(rng.integers(0, 5)):
        spot = _ellipse(at, rng.uniform(-0.5, 0.5, 2), rng.uniform(0.025, 0.07, 2), edge)
        found = np.maximum(found, rng.uniform(0.4, 1) * spot)
    return found * inside


def _vessels(rng: np.random.Generator, at: Floats, edge: float, inside: Floats) -> Floats:
    """A few thin bent lines."""
    found = np.zeros_like(inside)
    for _ in range(rng.integers(2, 6)):
        point, heading = rng.uniform(-0.6, 0.6, 2), rng.uniform(0, 2 * np.pi)
        for _ in range(rng.integers(5, 16)):
            found = np.maximum(found, _ellipse(at, point, (0.018, 0.018), edge))
            heading += 0.4 * rng.standard_normal()
            point = point + 0.025 * np.array([np.sin(heading), np.cos(heading)])
    return 0.8 * found * inside


def _ellipse(at: Floats, centre: Floats, radii: "tuple[float, float] | Floats", edge: float) -> Floats:
    radii = np.asarray(radii)
    away = np.hypot(*((at - np.asarray(centre)[:, None, None]) / radii[:, None, None]))
    return _soft((1 - away) * radii.min(), edge)


def _smooth(rng: np.random.Generator, size: int, waves: int) -> Floats:
    """A smooth random field of mean 0 and deviation 1: noise on ``waves + 2`` nodes a side, interpolated."""
    nodes = torch.from_numpy(rng.standard_normal((waves + 2,) * 2))[None, None]
    field = torch.nn.functional.interpolate(nodes, (size,) * 2, mode="bicubic", align_corners=True)[0, 0]
    return ((field - field.mean()) / field.std()).numpy()
