"""Images as grids with one, two or three spatial axes: smoothing and the morphology of masks."""

import math
from collections.abc import Iterable
from typing import SupportsFloat

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import interpolate

from esegeta.engine import check, levels

Spacing = Iterable[SupportsFloat] | Float[Tensor, " axes"]


def image(where: str, name: str, value: object) -> Tensor:
    """Refuse anything but a floating image (C,*S) with one to three spatial axes.

    >>> image("blur", "x", torch.zeros(1, 4, 4)).shape
    torch.Size([1, 4, 4])
    """
    value = check.floating(where, name, value)
    if not 2 <= value.ndim <= 4 or not value.numel():
        advice = "Add a channel axis with x[None]; map over a batch axis with torch.func.vmap"
        expected = f"{name} of shape (C,*S) with one to three spatial axes"
        raise check.refused(where, expected, check.describe(value), advice)
    return value


def _sigma(where: str, sigma: object) -> float | Tensor:
    if not isinstance(sigma, Tensor):
        return check.non_negative(where, "sigma", sigma)
    expected = "sigma to be a finite number >= 0 or a floating tensor of shape ()"
    if not sigma.is_floating_point() or sigma.ndim:
        advice = "Map over many with torch.func.vmap"
        raise check.refused_type(where, expected, check.describe(sigma), advice)
    if levels.true_anywhere(~((sigma >= 0) & torch.isfinite(sigma))):
        got = "a negative or non-finite tensor"
        raise check.refused(where, expected, got, "Clamp it at zero")
    return sigma.to(torch.float64)


def _heat(n: int, sigma: float | Tensor, device: torch.device) -> Tensor:
    """The matrix (n, n) that lets heat flow on a path of n voxels until the variance is ``sigma**2``."""
    k = torch.arange(n, device=device)
    # Cosines have period 4n in these integers; reducing them first keeps all digits of large angles.
    cosines = torch.cos((torch.outer(2 * k + 1, k) % (4 * n)).to(torch.float64) * (math.pi / (2 * n)))
    weight = torch.where(k == 0, 1.0, 2.0).to(torch.float64) / n
    decay = torch.exp(-2 * (torch.sin(k.to(torch.float64) * (math.pi / (2 * n))) * sigma) ** 2)
    # No entry is negative; rounding leaves some at -1e-17.
    return ((cosines * (weight * decay)) @ cosines.T).clamp(min=0)


def blur(
    x: Float[Tensor, "..."], sigma: float | int | Float[Tensor, ""], spacing: Spacing | None = None
) -> Float[Tensor, "..."]:
    r"""Smooth as a Gaussian does, made for grids: heat flows between neighbours, and none leaves the volume.

    .. math:: y = B \, \mathrm{diag}\!\left(e^{-\frac{\sigma^2}{2} (2 - 2 \cos \pi k / n)}\right) B^\top x

    along each axis of n voxels, with B the cosine basis (DCT-II) and sigma in voxels. It is the Gaussian's
    discrete counterpart and keeps on the grid what a sampled Gaussian keeps only in the limit of large sigma:
    no weight is negative, the mean stays, the variance of the kernel is sigma^2, and blurring by a and then b
    is blurring by :math:`\sqrt{a^2 + b^2}`. Values are mirrored at the borders of the volume.

    Args:
        x: the image (C,\*S) with one to three spatial axes.
        sigma: the standard deviation, in mm if spacing is given, else in voxels; a tensor of shape () may be
            differentiated and mapped over.
        spacing: mm per voxel, one per spatial axis.

    Returns:
        (C,\*S) -> (C,\*S).

    Example:
        The kernel of variance t has the modified Bessel functions :math:`e^{-t} I_n(t)` as weights.

        >>> x = torch.zeros(1, 41)
        >>> x[0, 20] = 1
        >>> torch.allclose(blur(x, 1.0)[0, 20], torch.special.i0e(torch.tensor(1.0)))
        True

    Reference: Lindeberg, Scale-space for discrete signals, IEEE PAMI 12, 1990.
    """
    image("blur", "x", x)
    width = _sigma("blur", sigma)
    voxel = check.spacing("blur", spacing, x.ndim - 1)
    for axis, n in enumerate(x.shape[1:]):
        # The contracted axis moves to the end: after one turn for each, the axes are back in order.
        x = torch.tensordot(x, _heat(n, width / voxel[axis], x.device).to(x.dtype), dims=([1], [0]))
    return x


def _mask(where: str, mask: object) -> Tensor:
    mask = check.tensor(where, "mask", mask)
    if mask.dtype != torch.bool:
        raise check.refused_type(where, "a boolean mask", check.describe(mask), "Pass for example mask > 0")
    if not 1 <= mask.ndim <= 3 or not mask.numel():
        expected, advice = (
            "a mask of shape (*S) with one to three axes",
            "Map over more axes with torch.func.vmap",
        )
        raise check.refused(where, expected, check.describe(mask), advice)
    return mask


def _grow(mask: Tensor, faces: bool) -> Tensor:
    grown = mask.clone()
    for axis, n in enumerate(mask.shape):
        # From the mask itself only faces are reached; from what the axes before have grown, the whole box.
        source = mask if faces else grown.clone()
        grown.narrow(axis, 1, n - 1).logical_or_(source.narrow(axis, 0, n - 1))
        grown.narrow(axis, 0, n - 1).logical_or_(source.narrow(axis, 1, n - 1))
    return grown


def dilate(mask: Bool[Tensor, "..."], *, faces: bool = True) -> Bool[Tensor, "..."]:
    r"""Return the mask and its neighbours. Outside of the volume is background.

    .. math:: D(M) = \{v : \exists u \in M, \|u - v\| \le 1\}

    in the 1-norm (faces) or the maximum norm (box).

    Args:
        mask: boolean, (\*S).
        faces: neighbours share a face (2, 4 or 6 of them); False: also an edge or corner (2, 8 or 26).

    Returns:
        (\*S) -> (\*S), boolean.

    Example:
        >>> mask = torch.zeros(3, 3, dtype=torch.bool)
        >>> mask[1, 1] = True
        >>> dilate(mask).sum().item(), dilate(mask, faces=False).sum().item()
        (5, 9)

    Reference: Serra, Image Analysis and Mathematical Morphology, 1982.
    """
    return _grow(_mask("dilate", mask), check.flag("dilate", "faces", faces))


def erode(mask: Bool[Tensor, "..."], *, faces: bool = True) -> Bool[Tensor, "..."]:
    r"""Return the mask without the voxels next to its background. Outside of the volume is foreground.

    .. math:: E(M) = \overline{D(\overline{M})}

    so a mask that is cut by the border of the volume is not worn off there.

    Args:
        mask: boolean, (\*S).
        faces: neighbours share a face (2, 4 or 6 of them); False: also an edge or corner (2, 8 or 26).

    Returns:
        (\*S) -> (\*S), boolean.

    Example:
        >>> erode(torch.tensor([True, True, True, False, True])).tolist()
        [True, True, False, False, False]

    Reference: Serra, Image Analysis and Mathematical Morphology, 1982.
    """
    return ~_grow(~_mask("erode", mask), check.flag("erode", "faces", faces))


def boundary(mask: Bool[Tensor, "..."], *, faces: bool = True) -> Bool[Tensor, "..."]:
    r"""Return the voxels on both sides of the surface of the mask. The border of the volume is no surface.

    .. math:: \partial M = D(M) \setminus E(M)

    Args:
        mask: boolean, (\*S).
        faces: neighbours share a face (2, 4 or 6 of them); False: also an edge or corner (2, 8 or 26).

    Returns:
        (\*S) -> (\*S), boolean.

    Example:
        >>> boundary(torch.tensor([True, True, True, False, False])).tolist()
        [False, False, True, True, False]

    Reference: Serra, Image Analysis and Mathematical Morphology, 1982.
    """
    mask = _mask("boundary", mask)
    check.flag("boundary", "faces", faces)
    return _grow(mask, faces) & _grow(~mask, faces)


def parts(mask: Bool[Tensor, "..."]) -> Int64[Tensor, "..."]:
    r"""Number the face-connected parts of a mask by size: 1 for the largest, 0 outside.

    Equally large ones are numbered in array order. Parts depend on values and are found on the host.

    Args:
        mask: boolean, (\*S).

    Returns:
        (\*S) -> (\*S), int64.

    Example:
        >>> parts(torch.tensor([True, False, True, True])).tolist()
        [2, 0, 1, 1]
    """
    from scipy import ndimage

    labels, _ = ndimage.label(_mask("parts", mask).cpu().numpy())
    sizes = np.bincount(labels.ravel())
    rank = np.zeros(len(sizes), dtype=np.int64)
    rank[1 + np.argsort(-sizes[1:], kind="stable")] = np.arange(1, len(sizes))
    return torch.from_numpy(rank[labels]).to(mask.device)


def upsample(map: Float[Tensor, "..."], *, like: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Bring a map from the grid of a layer to the grid of an image, by multilinear interpolation.

    Voxels are boxes and their values sit at the centres (half-pixel convention, ``align_corners=False``), as
    pooling and strided convolution with padding have it. Nothing overshoots; a constant stays a constant.

    Args:
        map: (D,\*U), computed in its own dtype, in float32 where that is narrower.
        like: an image (C,\*S) with as many axes.

    Returns:
        (D,\*U) -> (D,\*S).

    Example:
        >>> upsample(torch.tensor([[0., 4.]]), like=torch.zeros(1, 4)).tolist()
        [[0.0, 1.0, 3.0, 4.0]]
    """
    image("upsample", "map", map)
    check.tensor("upsample", "like", like)
    if like.ndim != map.ndim:
        raise check.refused(
            "upsample",
            f"a map with the {like.ndim - 1} spatial axes of the image",
            check.describe(map),
            "Maps of layers without a grid have no place on the image",
        )
    mode = ("linear", "bilinear", "trilinear")[map.ndim - 2]
    wide = map.to(torch.promote_types(map.dtype, torch.float32))
    size = list(like.shape[1:])
    return interpolate(wide[None], size=size, mode=mode, align_corners=False)[0].to(map.dtype)
