"""Test-time augmentation: the answer to a changed image, brought back to the image as it was.

A change is ``(x, key) -> (x', back)``: the changed image, and how an answer (K,\\*S) to it is brought back.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from esegeta import noise as noises
from esegeta import random, spatial
from esegeta._registry import uncertainty
from esegeta.engine import check
from esegeta.uncertainty.sampling import is_random

Back = Callable[[Tensor], Tensor]
Change = Callable[[Tensor, random.Key], tuple[Tensor, Back]]


class Augmented:
    """A model of changed images, as a random function of the image. Made by ``augmented``."""

    def __init__(self, model: Callable[..., Tensor], changes: Sequence[Change]) -> None:
        self.model, self.changes = model, tuple(changes)

    def __repr__(self) -> str:
        return f"augmented(model, {len(self.changes)} changes)"

    @property
    def label(self) -> str:
        """Name what its draws are."""
        return "test-time augmentation"

    def __call__(self, x: Tensor, *, key: random.Key | None = None) -> Tensor:
        """Change the image, ask the model, bring the answer back."""
        word = random.fold_in(check.key("augmented", key), 0)
        backs: list[Back] = []
        for i, change in enumerate(self.changes):
            x, back = change(x, random.fold_in(word, i + 1))
            backs.append(back)
        y = self.model(x, key=random.fold_in(word, 0)) if is_random(self.model) else self.model(x)
        for back in reversed(backs):
            y = back(y)
        return y


@uncertainty(family="changes", example={"axis": 0})
def flip(axis: int) -> Change:
    """Mirror the image along an axis in one of two cases. Only where left may be right: bodies are no mirror images.

    Args:
        axis: of the spatial ones, counted from 0.

    Returns:
        Change ``(x, key) -> (x', back)``.

    Example:
        >>> changed, back = flip(0)(torch.tensor([[1., 2.]]), 3)
        >>> back(changed).tolist()
        [[1.0, 2.0]]
    """
    here = "flip"
    if isinstance(axis, bool) or not isinstance(axis, int) or not 0 <= axis <= 2:
        raise check.refused(here, "a spatial axis 0, 1 or 2", repr(axis), "0 is the first one")

    def change(x: Tensor, key: random.Key) -> tuple[Tensor, Back]:
        if axis + 1 >= x.ndim:
            got = f"axis {axis} of {check.describe(x)}"
            raise check.refused(here, "an axis of the image", got, "Axes are counted from 0")
        turn = random.integers(key, (), low=0, high=2, device=x.device) == 1
        mirrored = lambda t: torch.where(turn, t.flip(axis + 1), t)
        return mirrored(x), mirrored

    return change


@uncertainty(family="changes", example={"degrees": 5.0})
def affine(
    *,
    degrees: float | int = 0.0,
    scale: float | int = 0.0,
    shift: float | int = 0.0,
    spacing: spatial.Spacing | None = None,
) -> Change:
    r"""Turn, enlarge or shrink, and move the image, each by a random amount; the answer is moved back.

    Images are sampled by multilinear interpolation, in mm about the centre; volumes are turned about a random axis.
    The answer is sampled twice, so it is smoother than that of the network. What lies outside of the image is taken
    from its border, also when the answer is brought back: near the border of the volume answers are made up if the
    change is large.

    Args:
        degrees: the largest angle, to either side.
        scale: the factor lies between :math:`1/(1 + scale)` and :math:`1 + scale`.
        shift: the largest way along each axis, in mm if spacing is given, else in voxels.
        spacing: mm per voxel, one per spatial axis.

    Returns:
        Change ``(x, key) -> (x', back)``.

    Example:
        >>> changed, back = affine(shift=0.0, scale=0.0)(torch.tensor([[1., 2., 4.]]), 3)
        >>> changed.tolist(), back(changed).tolist()
        ([[1.0, 2.0, 4.0]], [[1.0, 2.0, 4.0]])
    """
    here = "affine"
    angle = math.radians(check.non_negative(here, "degrees", degrees))
    growth = math.log1p(check.non_negative(here, "scale", scale))
    way = check.non_negative(here, "shift", shift)

    def change(x: Tensor, key: random.Key) -> tuple[Tensor, Back]:
        x = spatial.image(here, "x", x)
        axes = x.ndim - 1
        if angle and axes < 2:
            advice = "Leave degrees out for images with one axis"
            raise check.refused(here, "an image with two or three axes to turn", check.describe(x), advice)
        draw = lambda i, shape=(): (
            2 * random.uniform(random.fold_in(key, i), shape, dtype=x.dtype, device=x.device) - 1
        )
        matrix = torch.eye(axes, dtype=x.dtype, device=x.device) * torch.exp(growth * draw(0))
        if angle:
            matrix = matrix @ _turn(angle * draw(1), axes, random.fold_in(key, 2))
        offset = way * draw(3, (axes,))
        voxel = check.spacing(here, spacing, axes).to(x)
        half = voxel * torch.tensor(x.shape[1:], dtype=x.dtype, device=x.device) / 2
        inverse = torch.linalg.inv(matrix)
        return _sampled(x, matrix, offset, half), lambda y: _sampled(y, inverse, -(inverse @ offset), half)

    return change


@uncertainty(family="changes", example={"noise": 0.05})
def noise(noise: float | int | noises.Noise = 0.05) -> Change:
    """Add noise to the image.

    Args:
        noise: a number, the fraction of the range of the image, or a noise of ``esegeta.noise``.

    Returns:
        Change ``(x, key) -> (x', back)``.

    Example:
        >>> changed, back = noise(0.1)(torch.tensor([[0., 1.]]), 3)
        >>> back(changed) is changed, bool((changed != torch.tensor([[0., 1.]])).all())
        (True, True)
    """
    drawn = noises.as_noise(noise)
    return lambda x, key: (x + drawn(x, key), _as_it_is)


@uncertainty(family="changes", example={"gain": 0.1})
def intensity(gain: float | int = 0.1, offset: float | int = 0.0) -> Change:
    r"""Make the image brighter or darker: :math:`x' = (1 + a) x + b \,(\max x - \min x)`, per channel.

    Args:
        gain: the largest a, to either side.
        offset: the largest b, to either side.

    Returns:
        Change ``(x, key) -> (x', back)``.

    Example:
        >>> changed, _ = intensity(0.5)(torch.tensor([[1., 2.]]), 3)
        >>> bool(changed[0, 1] == 2 * changed[0, 0])
        True
    """
    here = "intensity"
    most, moved = check.non_negative(here, "gain", gain), check.non_negative(here, "offset", offset)

    def change(x: Tensor, key: random.Key) -> tuple[Tensor, Back]:
        x = spatial.image(here, "x", x)
        one = (x.shape[0], *[1] * (x.ndim - 1))
        a, b = (
            2 * random.uniform(random.fold_in(key, i), one, dtype=x.dtype, device=x.device) - 1
            for i in range(2)
        )
        span = (x.flatten(1).amax(1) - x.flatten(1).amin(1)).reshape(one)
        return x * (1 + most * a) + moved * b * span, _as_it_is

    return change


@uncertainty(
    family="draws",
    paper="Wang et al. 2019, arXiv:1807.07356",
    also=("test_time_augmentation", "tta"),
    example={"changes": [flip(0)]},
    leads=1,
)
def augmented(model: Callable[..., Tensor], changes: Sequence[Change]) -> Augmented:
    r"""Make a random model that asks about changed images: test-time augmentation.

    .. math:: (x, key) \mapsto g_{key}^{-1}(f(g_{key}(x)))

    Changes are applied one after another, each with a key of its own, and taken back from the answer in the other
    order. Nothing is changed that is not in the list: images are mirrored only by ``flip``.

    Args:
        model: ``(x) -> (K,*S)``, or a random one, such as ``dropout(module)``.
        changes: of ``flip``, ``affine``, ``noise`` and ``intensity``, or your own ``(x, key) -> (x', back)``.

    Returns:
        Random model ``(x, key=) -> (K,*S)``.

    Example:
        >>> model = augmented(lambda x: 2 * x, [flip(0)])
        >>> [model(torch.tensor([[1., 2.]]), key=k).tolist() for k in (0, 1)]
        [[[2.0, 4.0]], [[2.0, 4.0]]]

    Reference: Wang et al., Aleatoric uncertainty estimation with test-time augmentation for medical image
        segmentation with convolutional neural networks, Neurocomputing 338, 2019.
    """
    here = "augmented"
    check.model(here, model)
    if not isinstance(changes, Sequence) or not changes or not all(map(callable, changes)):
        advice = "Pass for example [uncertainty.affine(degrees=5)]"
        raise check.refused(here, "changes, at least one", check.describe(changes), advice)
    return Augmented(model, changes)


def _as_it_is(y: Tensor) -> Tensor:
    return y


def _turn(angle: Tensor, axes: int, key: random.Key) -> Tensor:
    """The matrix of a turn by an angle, in the plane or about a random axis (Rodrigues)."""
    zero = torch.zeros_like(angle)
    if axes == 2:
        rows = [[zero, zero - 1], [zero + 1, zero]]
    else:
        about = random.normal(key, (3,), dtype=angle.dtype, device=angle.device)
        u = about / about.norm()
        rows = [[zero, -u[2], u[1]], [u[2], zero, -u[0]], [-u[1], u[0], zero]]
    across = torch.stack([torch.stack(row) for row in rows])
    eye = torch.eye(axes, dtype=angle.dtype, device=angle.device)
    return eye + angle.sin() * across + (1 - angle.cos()) * (across @ across)


def _sampled(x: Tensor, matrix: Tensor, offset: Tensor, half: Tensor) -> Tensor:
    """Return what at v has what ``x`` has at ``matrix v + offset``, in mm from the centre."""
    size: Any = x.shape[1:]
    # grid_sample has coordinates from -1 to 1 between the outer edges, the last axis first.
    relative = (matrix * half[None, :] / half[:, None]).flip(0, 1)
    steps = [(torch.arange(n, dtype=x.dtype, device=x.device) * 2 + 1) / n - 1 for n in size]
    grid = torch.stack(torch.meshgrid(*steps, indexing="ij"), dim=-1).flip(-1) @ relative.T
    grid = grid + (offset / half).flip(0)
    if len(size) == 1:  # which it has only for two and three axes
        flat = torch.cat([grid[None], torch.zeros_like(grid[None])], dim=-1)
        return grid_sample(x[None, :, None], flat[None], padding_mode="border", align_corners=False)[0, :, 0]
    return grid_sample(x[None], grid[None], padding_mode="border", align_corners=False)[0]
