"""Small random changes of the image under which a dream has to hold: (x, key) -> x, another one at every step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from esegeta import random, spatial
from esegeta._registry import distortion
from esegeta.engine import check

Distortion = Callable[[Tensor, random.Key], Tensor]


@distortion(example={"voxels": 1}, paper="Mordvintsev, Olah, Tyka 2015, Inceptionism", also=("translation",))
def jitter(voxels: int = 8) -> Distortion:
    """Move the image along every axis by a random number of voxels; its border is repeated where nothing is left.

    Args:
        voxels: how far at most, to either side.

    Example:
        >>> moved = jitter(1)(torch.tensor([[1.0, 2.0, 3.0]]), 5)
        >>> moved.tolist() in ([[1.0, 1.0, 2.0]], [[1.0, 2.0, 3.0]], [[2.0, 3.0, 3.0]])
        True
    """
    most = check.positive_count("dreams.jitter", "voxels", voxels)

    def moved(x: Tensor, key: random.Key) -> Tensor:
        for axis, n in enumerate(x.shape[1:], 1):
            step = random.integers(random.fold_in(key, axis), (), low=-most, high=most + 1, device=x.device)
            x = x.index_select(axis, (torch.arange(n, device=x.device) + step).clamp(0, n - 1))
        return x

    return moved


@distortion(example={"degrees": 10})
def rotation(degrees: float | int = 10.0, *, spacing: spatial.Spacing | None = None) -> Distortion:
    """Turn the image about its centre by a random angle; volumes about a random axis.

    Args:
        degrees: the largest angle, to either side.
        spacing: mm per voxel, so that what is turned keeps its form.

    Example:
        >>> rotation(90)(torch.ones(1, 5, 5), 3).sum().item()
        25.0
    """
    most = math.radians(check.non_negative("dreams.rotation", "degrees", degrees))

    def turned(x: Tensor, key: random.Key) -> Tensor:
        axes = x.ndim - 1
        if axes < 2:
            advice = "Leave it out for images with one axis"
            raise check.refused(
                "dreams.rotation", "an image with two or three axes", check.describe(x), advice
            )
        draw = random.uniform(random.fold_in(key, 0), (), dtype=x.dtype, device=x.device)
        angle = most * (2 * draw - 1)
        if axes == 2:
            across = angle.new_zeros(2, 2)
            across[0, 1], across[1, 0] = -1, 1
        else:
            about = random.normal(random.fold_in(key, 1), (3,), dtype=x.dtype, device=x.device)
            u = about / about.norm()
            zero = torch.zeros_like(u[0])
            rows = [[zero, -u[2], u[1]], [u[2], zero, -u[0]], [-u[1], u[0], zero]]
            across = torch.stack([torch.stack(row) for row in rows])
        eye = torch.eye(axes, dtype=x.dtype, device=x.device)
        # The matrix of the turn, by the formula of Rodrigues; in the plane its square is minus the identity.
        matrix = eye + angle.sin() * across + (1 - angle.cos()) * (across @ across)
        return _sampled(x, matrix, spacing)

    return turned


@distortion(example={"low": 0.9, "high": 1.1})
def scaling(low: float | int = 0.9, high: float | int = 1.1) -> Distortion:
    """Enlarge or shrink what the image shows by a random factor about its centre, the same along every axis.

    Args:
        low: the smallest factor.
        high: the largest one.

    Example:
        >>> scaling(2, 2)(torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]]), 1).tolist()
        [[0.0, 0.5, 1.0, 0.5, 0.0]]
    """
    if (
        not 0
        < check.non_negative("dreams.scaling", "low", low)
        <= check.non_negative("dreams.scaling", "high", high)
    ):
        raise check.refused(
            "dreams.scaling", "0 < low <= high", f"{low!r} and {high!r}", "0.9 and 1.1 are usual"
        )

    def scaled(x: Tensor, key: random.Key) -> Tensor:
        factor = low + (high - low) * random.uniform(key, (), dtype=x.dtype, device=x.device)
        return _sampled(x, torch.eye(x.ndim - 1, dtype=x.dtype, device=x.device) / factor, None)

    return scaled


@distortion(example={"voxels": 2})
def padding(voxels: int = 8, *, value: float | int = 0.0) -> Distortion:
    """Put a frame around the image, so that nothing is drawn just at its border. The network has to take the size.

    Args:
        voxels: its width.
        value: of the frame.

    Example:
        >>> padding(1)(torch.ones(1, 2), 0).tolist()
        [[0.0, 1.0, 1.0, 0.0]]
    """
    width = check.positive_count("dreams.padding", "voxels", voxels)
    return lambda x, key: pad(x, [width, width] * (x.ndim - 1), value=float(value))  # noqa: ARG005


@distortion(example={"axis": 0})
def flips(axis: int) -> Distortion:
    """Mirror the image along an axis in one of two cases. Bodies are no mirror images: only where left may be right.

    Args:
        axis: of the spatial ones, counted from 0.

    Example:
        >>> flips(0)(torch.tensor([[1.0, 2.0]]), 1).tolist() in ([[1.0, 2.0]], [[2.0, 1.0]])
        True
    """
    if isinstance(axis, bool) or not isinstance(axis, int) or not 0 <= axis <= 2:
        raise check.refused("dreams.flips", "a spatial axis 0, 1 or 2", repr(axis), "0 is the first one")

    def mirrored(x: Tensor, key: random.Key) -> Tensor:
        if axis + 1 >= x.ndim:
            got, advice = f"axis {axis} of {check.describe(x)}", "Axes are counted from 0"
            raise check.refused("dreams.flips", "an axis of the image", got, advice)
        turn = random.integers(key, (), low=0, high=2, device=x.device) == 1
        return torch.where(turn, x.flip(axis + 1), x)

    return mirrored


def _sampled(x: Tensor, matrix: Tensor, spacing: spatial.Spacing | None) -> Tensor:
    """Return the image that at v has what the image has at ``matrix v``, in mm from the centre."""
    size = x.shape[1:]
    voxel = check.spacing("dreams", spacing, len(size)).to(x)
    half = voxel * torch.tensor(size, dtype=x.dtype, device=x.device) / 2
    # grid_sample has coordinates from -1 to 1 between the outer edges, the last axis first.
    relative = (matrix * half[None, :] / half[:, None]).flip(0, 1)
    steps = [(torch.arange(n, dtype=x.dtype, device=x.device) * 2 + 1) / n - 1 for n in size]
    grid = torch.stack(torch.meshgrid(*steps, indexing="ij"), dim=-1).flip(-1) @ relative.T
    if len(size) == 1:  # which it has only for two and three axes
        flat = torch.cat([grid[None], torch.zeros_like(grid[None])], dim=-1)
        return grid_sample(x[None, :, None], flat[None], padding_mode="border", align_corners=False)[0, :, 0]
    return grid_sample(x[None], grid[None], padding_mode="border", align_corners=False)[0]
