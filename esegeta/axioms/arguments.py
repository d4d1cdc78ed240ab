"""What residuals have in common: the reference of a difference, and checks of what users pass in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esegeta._types import Score
from esegeta.engine import check, levels


def start(x: Tensor, refs: Sequence[Tensor]) -> Tensor:
    """Return what the input is compared with: the last of the refs, zero without any."""
    return refs[-1] if refs else torch.zeros_like(x)


def stacked(start: Tensor, x: Tensor) -> Tensor:
    """Return baselines on a first axis, a single one too."""
    return start if start.ndim > x.ndim else start[None]


def change(score: Score, x: Tensor, refs: Sequence[Tensor]) -> Tensor:
    """Return F(x) - F(x'), with the mean of F(x') over a stack of baselines."""
    before = torch.stack([score(b) for b in stacked(start(x, refs), x).unbind()])
    return score(x) - before.mean()


def mask(where: str, name: str, value: object) -> Tensor:
    """Refuse anything but a boolean tensor."""
    value = check.tensor(where, name, value)
    if value.dtype != torch.bool:
        raise check.refused_type(
            where, f"{name} to be a boolean mask", check.describe(value), f"Use {name} != 0"
        )
    return value


def whole(where: str, name: str, value: object) -> Tensor:
    """Refuse anything but a tensor of whole numbers."""
    value = check.tensor(where, name, value)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise check.refused_type(
            where, f"{name} of whole numbers", check.describe(value), f"Convert them with {name}.long()"
        )
    return value


def parts(where: str, labels: object) -> tuple[Tensor, Tensor]:
    """Return a label map that all examples share, and its labels from 0 on."""
    found = whole(where, "labels", labels)
    # Whole numbers have no derivative: under a wrapper for one lie the numbers themselves.
    plain = levels.base(found)
    if plain.shape != found.shape:
        raise check.refused(
            where,
            "labels that all examples share",
            "some that vmap maps over",
            "Map over the input alone",
        )
    names = torch.unique(plain)
    names = names[names >= 0]
    if not len(names):
        raise check.refused(where, "labels of at least one part", "none from 0 on", "Label one")
    return plain, names


def fitted(where: str, name: str, value: Tensor, a: Tensor, what: str = "the attribution") -> Tensor:
    """Return the value for every element of an attribution, or an error where the shapes do not allow that."""
    over = zip(reversed(value.shape), reversed(a.shape), strict=False)
    if value.ndim > a.ndim or any(v not in (1, n) for v, n in over):
        raise check.refused(
            where,
            f"{name} that broadcasts to the shape {tuple(a.shape)} of {what}",
            check.describe(value),
            "Use one value an element (C,*S), or one a voxel (*S)",
        )
    return value.expand_as(a)


def step(where: str, name: str, value: object, x: Tensor) -> Tensor:
    """Return a displacement of the input: its dtype, and a shape that broadcasts to it."""
    value = check.floating(where, name, value)
    if value.dtype != x.dtype:
        raise check.refused_type(
            where,
            f"{name} with the dtype of the input {check.describe(x)}",
            check.describe(value),
            f"Use {name}.to(x.dtype)",
        )
    return fitted(where, name, value, x, "the input")


def grid(where: str, a: Tensor, x: Tensor) -> Tensor:
    """Refuse an attribution on another grid than that of the input: it cannot be moved along."""
    if a.shape[1:] != x.shape[1:]:
        raise check.refused(
            where,
            f"an attribution on the grid {tuple(x.shape[1:])} of the input",
            check.describe(a),
            "Bring it there with esegeta.spatial.upsample",
        )
    return a


def double(where: str, score: Score, x: Tensor, baseline: Tensor) -> None:
    """Refuse what no exact reference can be had for: single precision, other shapes, no scalar score."""
    check.image(where, "x", x)
    if x.dtype != torch.float64:
        raise check.refused_type(
            where, "x in float64", check.describe(x), "Use x.double() and a score in double precision"
        )
    check.finite(where, "the baseline", check.like(where, "the baseline", baseline, x), "Repair it first")
    check.scalar(where, score(x))
