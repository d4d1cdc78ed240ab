r"""Masks on the grid of an image that are no parts of it: random ones, and smooth ones that are optimised.

A mask is :math:`m \in [0,1]^S`, one for what is kept; :math:`x_m = m\, x + (1 - m)\, x'` for all channels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from esegeta import random, spatial
from esegeta._registry import mask as mask_family
from esegeta.engine import check
from esegeta.engine.ascent import Best, better
from esegeta.engine.execution import current
from esegeta.engine.stream import collect
from esegeta.features import Lengths, Spacing

_COLDNESS = 20.0
_TOGETHER = 2**18  # elements of the sums over neighbours that are made at once: what fits into a cache

Family = Callable[[Tensor], "Smooth"]


# --- Random masks -----------------------------------------------------------------------------------------


def scattered(
    key: random.Key,
    x: Float[Tensor, "..."],
    *,
    cells: int | Sequence[int] = 7,
    keep: float | int = 0.5,
) -> Float[Tensor, "..."]:
    r"""Return a random mask and its counterpart: coarse cells that are kept or not, blown up and moved.

    Each cell of a coarse grid of s cells is 1 with probability p and 0 otherwise; the grid becomes
    :math:`(s + 1) \lceil S / s \rceil` voxels long by multilinear interpolation (half-pixel convention), of which
    S are cut out from a start that is uniform on :math:`0, \dots, \lceil S / s \rceil - 1`. So
    :math:`E[m_v] = p` at every voxel. The counterpart has cells that are kept where
    :math:`1 - u < p` if those of the first are where :math:`u < p`: for p = 1/2 it is :math:`1 - m`, for any other
    it has the same distribution, is kept where the first is hidden as often as can be, and is no complement.

    Args:
        key: of the draw.
        x: an image (C,\*S), for its grid and dtype.
        cells: of the coarse grid along an axis, or one number for each axis.
        keep: the probability p, strictly between 0 and 1; in steps of 2^-24.

    Returns:
        (2,\*S), in [0, 1].

    Example:
        >>> masks = scattered(7, torch.zeros(1, 9, 9), cells=3)
        >>> masks.shape, bool((masks.sum(0) - 1).abs().max() < 1e-6)
        (torch.Size([2, 9, 9]), True)

    Reference: Petsiuk, Das, Saenko 2018, section 3.2, arXiv:1806.07421; the counterpart is ours.
    """
    shape = check.image("scattered", "x", x).shape[1:]
    many = counts("scattered", cells, len(shape))
    p = share("scattered", "keep", keep)
    u = random.uniform(random.fold_in(key, 0), many, device=x.device)
    masks = torch.stack([u < p, (1 - 2.0**-24) - u < p]).to(torch.promote_types(x.dtype, torch.float32))
    for axis, (length, count) in enumerate(zip(shape, many, strict=True)):
        size = -(-length // count)
        start = random.integers(random.fold_in(key, axis + 1), (), low=0, high=size, device=x.device)
        places = (torch.arange(length, device=x.device) + start).to(masks.dtype) + 0.5
        places = (places * (count / ((count + 1) * size)) - 0.5).clamp(0, count - 1)
        hats = (1 - (places[:, None] - torch.arange(count, device=x.device)).abs()).clamp(min=0)
        # The first axis stays; the next is contracted and comes back last, so that in the end they are in order.
        masks = torch.tensordot(masks, hats, dims=([1], [1]))
    return masks.to(x.dtype)


def counts(where: str, cells: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return one number of cells for each axis.

    >>> counts("demo", 7, 2), counts("demo", (3, 7), 2)
    ((7, 7), (3, 7))
    """
    many = check.each_axis(cells, axes)
    if len(many) != axes:
        expected = f"cells: one whole number, or one for each of {axes} axes"
        raise check.refused(where, expected, repr(cells), "7 is usual")
    return tuple(check.positive_count(where, "cells", n) for n in many)


def share(where: str, name: str, value: float | int) -> float:
    """Refuse a fraction that is not strictly between 0 and 1.

    >>> share("demo", "keep", 0.5)
    0.5
    """
    fraction = check.non_negative(where, name, value)
    if not 0 < fraction < 1:
        raise check.refused(where, f"0 < {name} < 1", repr(value), "It is a fraction of the whole")
    return fraction


# --- Smooth masks -----------------------------------------------------------------------------------------


@mask_family(family="smooth", paper="arXiv:1910.08485", example={"step": 2, "sigma": 2.0})
def smooth(
    *, step: Lengths = 7, sigma: float | int = 21, spacing: Spacing | None = None
) -> Callable[[Tensor], "Smooth"]:
    r"""Return masks without detail: a soft maximum of bumps on a coarse grid of parameters.

    .. math:: m(u) = \frac{\sum_j w_j e^{20 w_j}}{\sum_j e^{20 w_j}}, \qquad
              w_j = k\!\left(\tfrac{|u - c_j|}{\sigma}\right) p_j, \qquad k(z) = e^{-2 [z - 1/2]_+^2}

    over the places j of an endless grid with
    :math:`|u_a - c_{j,a}| \le (1 + \lceil \sigma / s_a \rceil + \tfrac12)\, s_a` along every axis, of which those
    in the image have parameters p in [0, 1] and the others zero. The grid lies in the middle of the image and the
    window is the same to both sides: mirrored parameters give the mirrored mask.

    Args:
        step: s, between two places, one number or one for each axis, in voxels or in the unit of ``spacing``
            (rounded to voxels).
        sigma: the width of a bump, in the unit of ``spacing``, else in voxels.
        spacing: of the voxels.

    Returns:
        ``x -> Smooth``, for the grid of an image.

    Example:
        >>> family = smooth(step=2, sigma=2.0)(torch.zeros(1, 5))
        >>> family.grid, family.mask(torch.ones(3)).gt(0.9).tolist()
        ((3,), [True, True, True, True, True])

    Reference: Fong, Patrick, Vedaldi 2019, section 3.2, arXiv:1910.08485.
    """
    where = "masks.smooth"
    if not check.non_negative(where, "sigma", sigma):
        raise check.refused(where, "sigma > 0", repr(sigma), "Three steps are usual")

    def family(x: Tensor) -> Smooth:
        shape = tuple(x.shape[1:])
        steps, grid = _steps(where, step, spacing, len(shape)), coarse(where, x, step, spacing)
        units = (1.0,) * len(shape) if spacing is None else tuple(spacing)
        dtype = torch.promote_types(x.dtype, torch.float32)
        over = tuple(g * s - n for g, s, n in zip(grid, steps, shape, strict=True))
        reach = tuple(1 + math.ceil(sigma / (s * u) - 1e-9) for s, u in zip(steps, units, strict=True))
        # Half a step beyond the last voxel of a cell there may be a place that is just in reach.
        offsets = [torch.arange(-r, r + 1 + o % 2) for r, o in zip(reach, over, strict=True)]
        apart, near = [], []
        for offset, s, u, o, r in zip(offsets, steps, units, over, reach, strict=True):
            inside_cell = torch.arange(s, dtype=torch.float64) - (s - 1 - o % 2) / 2
            distance = inside_cell[None] - s * offset[:, None]
            apart.append((distance * u).square())
            near.append((distance.abs() <= (r + 0.5) * s).to(torch.float64))
        distance = _over_axes(apart, torch.add).sqrt()
        within = _over_axes(near, torch.mul)
        kernel = within * torch.exp(-2 * (distance / sigma - 0.5).clamp(min=0).square())
        padded = [g + 2 * r + 1 for g, r in zip(grid, reach, strict=True)]
        places = [
            (offset[:, None] + torch.arange(g) + r) * math.prod(padded[a + 1 :])
            for a, (offset, g, r) in enumerate(zip(offsets, grid, reach, strict=True))
        ]
        index = _over_axes(places, torch.add)
        return Smooth(
            shape=shape,
            steps=steps,
            grid=grid,
            before=tuple(o // 2 for o in over),
            margin=tuple((r, r + 1) for r in reach),
            kernel=kernel.to(x.device, dtype),
            index=index.to(x.device),
            beyond=(1 - within).sum(0).to(x.device, dtype),
            units=units,
        )

    return family


@dataclass(frozen=True)
class Smooth:
    """The smooth masks of one grid. Voxels are in cells of ``steps`` voxels, one for each parameter.

    ``kernel`` (neighbours, voxels of a cell): k of the distance to each neighbour, zero beyond its reach;
    ``index`` (neighbours, cells): where in the padded parameters the neighbour of each cell is;
    ``beyond`` (voxels of a cell): how many of the neighbours are out of reach.
    """

    shape: tuple[int, ...]
    steps: tuple[int, ...]
    grid: tuple[int, ...]
    before: tuple[int, ...]
    margin: tuple[tuple[int, int], ...]
    kernel: Tensor
    index: Tensor
    beyond: Tensor
    units: tuple[float, ...]

    def ones(self) -> Tensor:
        """Return the parameters of the mask that keeps most."""
        return self.kernel.new_ones(self.grid)

    def mask(self, parameters: Tensor) -> Tensor:
        """Return the mask of parameters like ``ones()``, on the grid of the image."""
        return self.image(*self.sums(parameters))

    def image(self, above: Tensor, below: Tensor) -> Tensor:
        """Return the mask of its sums over neighbours."""
        return self._as_image(above / below)

    def gradient(
        self, parameters: Tensor, slope: Tensor, sums: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        r"""Return the gradient for the parameters from that for the mask, without a graph of the sum.

        .. math:: \sum_u g_u \frac{k_{uj} e^{20 w_{uj}}}{\sum_i e^{20 w_{ui}}} (1 + 20 (w_{uj} - m_u))
        """
        above, below = self.sums(parameters) if sums is None else sums
        scaled, rest = self._as_cells(slope) / below, 1 - _COLDNESS * above / below
        flat = self._padded(parameters)
        out = torch.zeros_like(flat)
        for kernel, index in self._pieces():
            w = _COLDNESS * flat[index][..., None] * kernel[:, None]
            each = torch.einsum("kcv,kv->kc", w.exp() * (w + rest) * scaled, kernel)
            out = out.index_add(0, index.flatten(), each.flatten())
        whole = out.reshape([g + sum(m) for g, m in zip(self.grid, self.margin, strict=True)])
        return whole[tuple(slice(m[0], m[0] + g) for g, m in zip(self.grid, self.margin, strict=True))]

    def _pieces(self) -> list[tuple[Tensor, Tensor]]:
        some = max(1, _TOGETHER // (self.index.shape[1] * self.kernel.shape[1]))
        return list(zip(self.kernel.split(some), self.index.split(some), strict=True))

    def _padded(self, parameters: Tensor) -> Tensor:
        return pad(parameters, [n for m in reversed(self.margin) for n in m]).flatten()

    def sums(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums above and below the line of the soft maximum, (cells, voxels of a cell)."""
        flat = self._padded(parameters)
        above, below = torch.zeros((), dtype=flat.dtype, device=flat.device), -self.beyond
        for kernel, index in self._pieces():
            w = _COLDNESS * flat[index][..., None] * kernel[:, None]
            e = w.exp()
            above, below = above + (w * e).sum(0), below + e.sum(0)
        return above / _COLDNESS, below

    def _as_image(self, cells: Tensor) -> Tensor:
        d = len(self.grid)
        order = [a + d * b for a in range(d) for b in range(2)]
        whole = cells.reshape(*self.grid, *self.steps).permute(order)
        whole = whole.reshape([g * s for g, s in zip(self.grid, self.steps, strict=True)])
        return whole[tuple(slice(b, b + n) for b, n in zip(self.before, self.shape, strict=True))]

    def _as_cells(self, map: Tensor) -> Tensor:
        d = len(self.grid)
        after = [
            g * s - b - n for g, s, b, n in zip(self.grid, self.steps, self.before, self.shape, strict=True)
        ]
        both = list(zip(self.before, after, strict=True))
        whole = pad(map, [n for m in reversed(both) for n in m])
        whole = whole.reshape([n for m in zip(self.grid, self.steps, strict=True) for n in m])
        return whole.permute([2 * a for a in range(d)] + [2 * a + 1 for a in range(d)]).reshape(
            math.prod(self.grid), math.prod(self.steps)
        )


def _over_axes(tables: Sequence[Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Tables (neighbours, voxels) of each axis as one over all neighbours and all voxels of a cell."""
    out = tables[0]
    for table in tables[1:]:
        out = join(out[:, None, :, None], table[None, :, None, :]).flatten(2).flatten(0, 1)
    return out


def coarse(where: str, x: Tensor, step: Lengths, spacing: Spacing | None) -> tuple[int, ...]:
    """Return how many parameters each axis has, one for each ``step``.

    >>> coarse("demo", torch.zeros(1, 9, 8), 4, None), coarse("demo", torch.zeros(1, 9, 8), 4, (1.0, 2.0))
    ((3, 2), (3, 4))
    """
    steps = _steps(where, step, spacing, x.ndim - 1)
    return tuple(-(-n // s) for n, s in zip(x.shape[1:], steps, strict=True))


def _steps(where: str, step: Lengths, spacing: Spacing | None, axes: int) -> tuple[int, ...]:
    many = check.each_axis(step, axes)
    single = isinstance(spacing, (int, float)) or getattr(spacing, "ndim", 1) == 0
    units = (1.0,) * axes if spacing is None else () if single else check.each_axis(spacing, axes)
    right = len(many) == axes == len(units) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < 2.0**31 for v in (*many, *units)
    )
    if not right:
        expected = f"step > 0 and spacing > 0, one number or {axes}"
        raise check.refused(where, expected, f"{step!r} and {spacing!r}", "Seven voxels are usual")
    return tuple(max(1, round(v / u)) for v, u in zip(many, units, strict=True))


class Shapes:
    """Balls and boxes at the places of a coarse grid, as maps of how near a voxel is to their middle.

    ``nearest_region`` of such a map is the ball or box of an area, cut off by the border and the larger for it.
    Distances are in the unit of ``spacing``; boxes have the proportions of the image.

    >>> shapes = Shapes(torch.zeros(1, 6), places=3)
    >>> shapes.count, nearest_region(shapes.near(torch.tensor(1)), 1 / 3).tolist()
    (6, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    """

    def __init__(self, x: Tensor, places: int, spacing: Spacing | None = None) -> None:
        shape = tuple(x.shape[1:])
        each = max(1, int(places ** (1 / len(shape)) + 1e-9))
        units = (1.0,) * len(shape) if spacing is None else tuple(spacing)
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.lines, self.middles, self.apart = [], [], []
        for a, (n, u) in enumerate(zip(shape, units, strict=True)):
            g = min(each, n)
            line = torch.arange(n, device=x.device, dtype=dtype)
            self.lines.append((line.reshape([-1 if b == a else 1 for b in range(len(shape))]), u, 1 / n))
            self.middles.append((torch.arange(g, device=x.device, dtype=dtype) + 0.5) * (n / g) - 0.5)
            self.apart.append(n / g)

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of places along each axis."""
        return tuple(m.shape[0] for m in self.middles)

    @property
    def count(self) -> int:
        """The number of shapes: a ball and a box at each place."""
        return 2 * math.prod(self.grid)

    def near(self, node: Tensor) -> Tensor:
        """Return how near voxels are to the middle of a shape, on the grid of the image: balls first, then boxes."""
        round_, square = [], []
        for (line, unit, length), middle in zip(self.lines, self._middle(node), strict=True):
            off = (line - middle).abs()
            round_.append((off * unit).square())
            square.append(off * length)
        ball, box = sum(round_[1:], round_[0]), square[0]
        for side in square[1:]:
            box = torch.maximum(box, side)
        return -torch.where(node < math.prod(self.grid), ball, box)

    def around(self, node: Tensor) -> "Shapes":
        """Return the places half as far apart around that of a shape, three along each axis."""
        finer = copy(self)
        steps = [self.lines[0][0].new_tensor([-1.0, 0.0, 1.0]) * (apart / 2) for apart in self.apart]
        finer.middles = [m + s for m, s in zip(self._middle(node), steps, strict=True)]
        finer.apart = [apart / 2 for apart in self.apart]
        return finer

    def _middle(self, node: Tensor) -> list[Tensor]:
        rest, out = node % math.prod(self.grid), []
        for middles in reversed(self.middles):
            out.append(middles.index_select(0, (rest % middles.shape[0]).reshape(1))[0])
            rest = rest // middles.shape[0]
        return out[::-1]


def best_shape(
    worth: Callable[[Tensor], Best], shapes: Shapes, *, areas: Sequence[float], finer: int, label: str
) -> Best:
    """Return the best region among coarse shapes, those around the best of them, and what all balls say together.

    At a deadline the best so far.

    Args:
        worth: from a region (1,*S) to it and its value.
        shapes: where to begin.
        areas: of the regions; each is looked at by itself.
        finer: how often to look around the best one, each time half as far.
        label: what progress bars and errors call the loop.
    """
    best = None
    for area in areas:
        for seen in _shapes(worth, shapes, area, finer, label):
            best = seen if best is None else better(best, seen)
            if current().left() <= 0:
                return best
    assert best is not None
    return best


def _shapes(
    worth: Callable[[Tensor], Best], shapes: Shapes, area: float, finer: int, label: str
) -> Iterator[Best]:
    for k in range(finer + 1):
        nodes = torch.arange(shapes.count, device=shapes.middles[0].device)
        run = lambda node, shapes=shapes: worth(nearest_region(shapes.near(node), area)[None]).value
        values = collect(run, nodes, label=label)
        values = torch.where(values.isnan(), -torch.inf, values)  # a deadline leaves some out
        found = values.argmax()
        best = worth(nearest_region(shapes.near(found), area)[None])
        if not k:
            # Where all are worth the same, none of them is preferred: every voxel gets its share.
            flat = torch.where(values.amax() == values.amin(), best.value, -torch.inf)
            yield Best(flat, nearest_region(torch.zeros_like(best.point), area))
        yield best
        if not k:
            balls = values[: shapes.count // 2].reshape(1, *shapes.grid)
            joined = spatial.upsample(balls, like=best.point.to(balls.dtype))
            near = shapes.near(found)[None]  # orders what the balls say nothing about
            tiny = torch.finfo(joined.dtype).tiny
            spread, farthest = joined.amax() - joined.amin(), -near.amin()
            ranked = (joined - joined.amin()) / spread.clamp(min=tiny) + 1e-4 * near / farthest.clamp(
                min=tiny
            )
            yield worth(nearest_region(ranked, area))
        shapes = shapes.around(found)


def nearest_region(mask: Float[Tensor, "..."], area: float | int) -> Float[Tensor, "..."]:
    r"""Return the nearest mask of zeros and ones with that area: ones where the mask is largest.

    Voxels of one value share what is left for them, so that nothing depends on the order of voxels.

    Args:
        mask: (\*S) or (1,\*S).
        area: what share of the voxels is one.

    Returns:
        like the mask.

    Example:
        >>> nearest_region(torch.tensor([0.2, 0.9, 0.5, 0.5]), 0.5).tolist()
        [0.0, 1.0, 0.5, 0.5]
    """
    flat = mask.flatten()
    ranked = flat.sort().values.contiguous()
    zeros = flat.numel() - round(share("nearest_region", "area", area) * flat.numel())
    low = torch.searchsorted(ranked, flat.contiguous())
    high = torch.searchsorted(ranked, flat.contiguous(), right=True)
    ones = (high - zeros).clamp(min=0) - (low - zeros).clamp(min=0)
    return (ones.to(mask.dtype) / (high - low)).reshape(mask.shape)


def area_residual(mask: Float[Tensor, "..."], *, area: float | int) -> Float[Tensor, ""]:
    r"""Return how far a mask is from one of zeros and ones that has the area.

    .. math:: \frac1n \sum_u (m_u - r_u)^2, \qquad r \in \{0, 1\}^n \text{ with ones where } m \text{ is largest}

    What ``extremal_perturbation`` keeps small; zero if its mask is exactly such a region.

    Args:
        mask: (1,\*S) or (\*S), as ``extremal_perturbation`` gives it.
        area: the share that it was asked for.

    Returns:
        mask -> ().

    Example:
        >>> area_residual(torch.tensor([0., 0., 1., 1.]), area=0.5).item()
        0.0
        >>> area_residual(torch.tensor([0., 0., 1., 1.]), area=0.25).item()
        0.25

    Reference: Fong, Patrick, Vedaldi 2019, equation 3, arXiv:1910.08485.
    """
    mask = check.floating("area_residual", "mask", mask)
    ranked = mask.flatten().sort().values
    ones = round(share("area_residual", "area", area) * len(ranked))
    region = torch.arange(len(ranked), device=mask.device) >= len(ranked) - ones
    return (ranked - region.to(mask.dtype)).square().mean()
