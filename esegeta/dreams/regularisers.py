"""What a dream should have little of: functions from an image to a number, which is subtracted from the objective."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esegeta import spatial
from esegeta._registry import regulariser
from esegeta.engine import check

Penalty = Callable[[Tensor], Tensor]


class Relative(NamedTuple):
    """A weight that follows the gradients: that of the penalty gets ``ratio`` of the objective's norm."""

    ratio: float


def relative(ratio: float | int) -> Relative:
    """Weigh a penalty by the ratio of gradients: at every step its gradient is ``ratio`` times the objective's.

    Example:
        >>> relative(0.1).ratio
        0.1
    """
    return Relative(check.non_negative("dreams.relative", "ratio", ratio))


@regulariser(also=("weight_decay",))
def l2() -> Penalty:
    r"""Return the sum of squares, :math:`\|x\|_2^2`.

    Example:
        >>> l2()(torch.tensor([[3.0, 4.0]])).item()
        25.0
    """
    return lambda x: x.square().sum()


@regulariser()
def l1() -> Penalty:
    r"""Return the sum of sizes, :math:`\|x\|_1`.

    Example:
        >>> l1()(torch.tensor([[3.0, -4.0]])).item()
        7.0
    """
    return lambda x: x.abs().sum()


@regulariser(paper="Mahendran, Vedaldi 2016, IJCV 120")
def power(*, alpha: float | int = 6.0) -> Penalty:
    r"""Return :math:`\|x\|_\alpha^\alpha`, which a large alpha makes a soft bound.

    Args:
        alpha: the exponent, at least 1.

    Example:
        >>> power(alpha=3)(torch.tensor([[2.0, -1.0]])).item()
        9.0
    """
    if not isinstance(alpha, (int, float)) or not 1 <= alpha < math.inf:
        raise check.refused("dreams.power", "alpha >= 1", repr(alpha), "6 is usual")
    return lambda x: x.abs().pow(alpha).sum()


@regulariser(example={"low": 0.0, "high": 1.0})
def bounds(low: float | int, high: float | int) -> Penalty:
    r"""Return how far values lie outside of a range, squared and summed.

    Args:
        low: where the range begins.
        high: where it ends.

    Example:
        >>> bounds(0, 1)(torch.tensor([[-1.0, 0.5, 3.0]])).item()
        5.0
    """
    if not low < high:
        raise check.refused(
            "dreams.bounds", "low < high", f"{low!r} and {high!r}", "Take the range of the data"
        )
    return lambda x: (x - x.clamp(low, high)).square().sum()


@regulariser(paper="Rudin, Osher, Fatemi 1992; Mahendran, Vedaldi 2016, IJCV 120", also=("tv",))
def total_variation(
    *, beta: float | int = 1.0, isotropic: bool = False, spacing: spatial.Spacing | None = None
) -> Penalty:
    r"""Return how much neighbouring voxels differ.

    .. math:: \sum_v \sum_a |\partial_a x_v|^\beta \qquad\text{or}\qquad
              \sum_v \Big(\sum_a |\partial_a x_v|^2\Big)^{\beta/2}

    with differences to the next voxel, which are 0 at the end of an axis. Without the modulus the sum would be that
    of the ends alone.

    Args:
        beta: of 1 edges are as cheap as ramps; of 2 ramps are cheaper.
        isotropic: whether gradients count by their length, whatever their direction.
        spacing: mm per voxel, by which differences are divided.

    Example:
        >>> x = torch.tensor([[[0.0, 3.0], [4.0, 3.0]]])
        >>> total_variation()(x).item(), total_variation(isotropic=True)(x).item()
        (8.0, 6.0)
    """
    where = "dreams.total_variation"
    if not isinstance(beta, (int, float)) or isinstance(beta, bool) or not 1 <= beta < math.inf:
        raise check.refused(where, "beta >= 1", repr(beta), "1 and 2 are usual")
    joint = check.flag(where, "isotropic", isotropic)

    def penalty(x: Tensor) -> Tensor:
        voxel = check.spacing(where, spacing, x.ndim - 1).tolist()
        slopes = [x.diff(dim=a) / voxel[a - 1] for a in range(1, x.ndim)]
        if not joint:
            return torch.stack([s.abs().pow(beta).sum() for s in slopes]).sum()
        squares = torch.zeros_like(x)
        for a, s in enumerate(slopes, 1):
            end = x.new_zeros(1).expand(*x.shape[:a], 1, *x.shape[a + 1 :])
            squares = squares + torch.cat([s.square(), end], dim=a)
        # The root has no derivative at zero, where the least of its subgradients is taken.
        flat = squares == 0
        return torch.where(flat, 0, torch.where(flat, 1, squares).pow(beta / 2)).sum()

    return penalty


@regulariser(
    example={"template": torch.linspace(0, 1, 24).reshape(1, 4, 6)}, paper="Li et al. 2017, arXiv:1701.01036"
)
def style(
    template: Tensor,
    *,
    position: float | int = 1.0,
    bandwidth: float | int | None = None,
    samples: int = 1024,
    features: Callable[[Tensor], Tensor] | None = None,
) -> Penalty:
    r"""Return how differently values are spread in an image and in a template, such as the mean of the data.

    .. math:: \frac1{N^2} \sum_{ij} k(u_i, u_j) + k(s_i, s_j) - 2 k(u_i, s_j), \qquad
              k(u, s) = e^{-\|u - s\|^2 / 2 \sigma^2}

    the squared distance of the two clouds of samples in the space of the kernel (MMD). A sample is a voxel's channels
    beside its place: without places the voxels could be shuffled, and no form is asked for. An image of more than
    ``samples`` voxels is averaged over boxes first, so that costs do not grow with it and every voxel still feels the
    penalty. The weight of a paper fits its own N and network alone; say ``relative(0.1)`` instead.

    Args:
        template: the image to be alike, (C,\*S).
        position: how much a way across the image counts beside the spread of the template's values; 0 for none.
        bandwidth: :math:`\sigma`; by default the median distance of the template's samples.
        samples: how many, N, at most.
        features: from an image to feature maps (D,\*U), whose channels then are the values.

    Example:
        >>> x = torch.linspace(0, 1, 64).reshape(1, 8, 8)
        >>> like = style(x)
        >>> round(like(x).item(), 6), like(x.flip(1)).item() > 0.01
        (0.0, True)

    Reference:
        Gretton et al. 2012, A kernel two-sample test, JMLR 13.
    """
    where = "dreams.style"
    spatial.image(where, "template", template)
    apart, n = (
        check.non_negative(where, "position", position),
        check.positive_count(where, "samples", samples),
    )
    values = features if features is not None else lambda x: x
    wanted = values(template).detach()
    boxes = _boxes(wanted, n)
    aim = _averaged(wanted, boxes)
    spread = aim.flatten(1).std(dim=1, correction=0).square().sum().sqrt()
    lines = [(b @ torch.linspace(0, 1, b.shape[1]).to(b)) for b in boxes]
    places = torch.stack(torch.meshgrid(*lines, indexing="ij")).flatten(1).T
    places = places * apart * torch.where(spread > 0, spread, 1)

    def cloud(a: Tensor) -> Tensor:
        return torch.cat([a.flatten(1).T, places.to(a)], dim=1)

    aim = cloud(aim)
    if bandwidth is None:
        width = _squares(aim, aim).sqrt().median()
        width = torch.where(width > 0, width, 1)
    else:
        width = torch.as_tensor(bandwidth, dtype=aim.dtype, device=aim.device)
        if not width > 0:
            raise check.refused(
                where, "bandwidth > 0", repr(bandwidth), "Leave it out for the median distance"
            )
    kernel = lambda a, b: torch.exp(-_squares(a, b) / (2 * width.square()).to(a)).mean()
    of_template = kernel(aim, aim)

    def penalty(x: Tensor) -> Tensor:
        own = values(x)
        if own.shape != wanted.shape:
            got = f"{tuple(own.shape)} beside {tuple(wanted.shape)}"
            raise check.refused(where, "an image of the shape of the template", got, "Resample the template")
        mine = cloud(_averaged(own, boxes))
        return kernel(mine, mine) + of_template.to(mine) - 2 * kernel(mine, aim.to(mine))

    return penalty


def _boxes(a: Tensor, most: int) -> list[Tensor]:
    """Return for every axis the matrix that averages over boxes, the smallest of which there are few enough."""
    width = 1
    while math.prod(-(-n // width) for n in a.shape[1:]) > most:
        width += 1
    found = []
    for n in a.shape[1:]:
        box = torch.arange(n, device=a.device) // width
        member = (box == torch.arange(-(-n // width), device=a.device)[:, None]).to(a.dtype)
        found.append(member / member.sum(1, keepdim=True))
    return found


def _averaged(a: Tensor, boxes: list[Tensor]) -> Tensor:
    """Return the means of the boxes of every channel.

    >>> x = torch.tensor([[1.0, 3.0, 5.0]])
    >>> _averaged(x, _boxes(x, 2)).tolist()
    [[2.0, 5.0]]
    """
    for axis, box in enumerate(boxes, 1):
        if len(box) < box.shape[1]:
            a = torch.tensordot(box.to(a), a, ([1], [axis])).movedim(0, axis)
    return a


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distances of two clouds (N, D)."""
    return (a[:, None] - b[None]).square().sum(2)
