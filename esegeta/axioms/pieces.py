"""The linear pieces of a score along a straight path, by intersecting tangents."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from esegeta._types import Score
from esegeta.axioms import arguments
from esegeta.engine import check

EPS = torch.finfo(torch.float64).eps
GOLDEN = (math.sqrt(5) - 1) / 2  # kinks lie at fractions of small numbers: nothing is probed there
PROBES = 64  # where the path is looked at first
CHUNK = 64


class Pieces(NamedTuple):
    """A score on the way from a baseline to an input: its linear pieces.

    ``edges`` (n+1,) from 0 to 1, ``gradients`` (n, *x.shape), ``slopes`` (n,) of t -> F(x' + t (x - x')).
    """

    edges: Tensor
    gradients: Tensor
    slopes: Tensor


def pieces(score: Score, x: Tensor, baseline: Tensor, *, max_pieces: int = 4096) -> Pieces:
    r"""Return the linear pieces of a piecewise linear score on the straight path from a baseline to an input.

    On an interval whose ends have different gradients the tangent lines of the two ends are intersected:

    .. math:: t^* = \frac{F_0 - F_1 + s_1 t_1 - s_0 t_0}{s_1 - s_0}

    If the score has both lines' slopes right beside that point, it is the breakpoint; else the parts of the
    interval are intersected in turn. Where the lines coincide although the gradients differ, the interval is
    cut until a breakpoint in it changes no integral by more than rounding.

    Exact up to rounding. What no probe can tell: a piece of less than 1/100 of the path after which the score
    continues as if nothing had been. Where an operation rests at its kink all the way, as of two equal values
    under a maximum, autograd has no one gradient to integrate: that is refused as soon as it shows.

    Args:
        score: ``(C,*S) -> ()``, continuous and piecewise linear, in float64.
        x: the input, float64.
        baseline: like x.
        max_pieces: number of pieces beyond which the score counts as not piecewise linear.

    Returns:
        ``Pieces(edges, gradients, slopes)``.

    Example:
        >>> import torch
        >>> score = lambda z: torch.relu(z[0] - 1).sum()
        >>> x = torch.tensor([[4.0, 2.0]], dtype=torch.float64)
        >>> found = pieces(score, x, torch.zeros_like(x))
        >>> found.edges.tolist(), found.slopes.round(decimals=9).tolist()
        ([0.0, 0.25, 0.5, 1.0], [0.0, 4.0, 6.0])
    """
    arguments.double("axioms.exact.pieces", score, x, baseline)
    check.positive_count("axioms.exact.pieces", "max_pieces", max_pieces)
    path = _Path(score, x, baseline, max_pieces)
    breaks = path.breaks()
    while True:
        edges = [0.0, *breaks, 1.0]
        inside = [a + GOLDEN * (b - a) for a, b in itertools.pairwise(edges)]
        _, slopes, gradients = path.at(inside)
        spare = path.spare(edges, gradients)
        if spare is None:
            break
        breaks = [t for i, t in enumerate(breaks) if i not in spare]
    ends = path.at(edges)[0]
    length = torch.tensor(edges, dtype=torch.float64).diff().to(x.device)
    if ((ends.diff() - slopes * length).abs() > path.blur).any():
        raise path.refusal(
            "one that its gradient does not add up to", "A score that jumps has no exact path integral"
        )
    found = Pieces(torch.tensor(edges, dtype=torch.float64, device=x.device), gradients, slopes)
    path.confirm(found)
    return found


class _Path:
    """What is known of a score on the way from a baseline to an input."""

    def __init__(self, score: Score, x: Tensor, baseline: Tensor, max_pieces: int) -> None:
        self.score, self.baseline, self.line, self.max_pieces = score, baseline, x - baseline, max_pieces
        self.look = vmap(grad_and_value(score), chunk_size=CHUNK)
        self.scale = self.steepest = 0.0

    def at(self, ts: list[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Values, slopes and gradients at some places of the path."""
        t = torch.tensor(ts, dtype=torch.float64, device=self.line.device)
        zs = self.baseline + t.reshape(-1, *[1] * self.line.ndim) * self.line
        gradients, values = self.look(zs)
        parts = (gradients * self.line).flatten(1)
        self.steepest = max(self.steepest, float(gradients.abs().amax()))
        self.scale = max(self.scale, float(values.abs().amax() + parts.abs().sum(1).amax()))
        return values, parts.sum(1), gradients

    @property
    def blur(self) -> float:
        """How far from a line values are by rounding alone."""
        return 1024 * EPS * self.scale

    def same(self, gradients: Tensor, others: Tensor) -> Tensor:
        """Whether gradients are equal up to rounding."""
        return (gradients - others).abs().flatten(1).amax(1) <= 256 * EPS * self.steepest

    def effect(self, gradients: Tensor, others: Tensor) -> Tensor:
        """What a breakpoint between two gradients changes in an integral, by length of path that it is off."""
        return ((gradients - others) * self.line).abs().flatten(1).sum(1)

    def confirm(self, found: Pieces) -> None:
        """Refuse pieces in which the gradient is another one elsewhere."""
        ts = [k * GOLDEN % 1.0 for k in range(1, 2 * PROBES + 1)]
        t = torch.tensor(ts, dtype=torch.float64, device=self.line.device)
        beside = (t[:, None] - found.edges).abs().amin(1) < 1e-9
        owner = torch.bucketize(t, found.edges[1:-1])
        wrong = ~self.same(self.at(ts)[2], found.gradients[owner]) & ~beside
        if wrong.any():
            raise self.refusal(
                f"a gradient at {float(t[wrong][0]):.6g} of the path that is another one than beside it",
                "An operation rests at its kink on the way, and rounding decides on which side: move the input "
                "or the baseline a little",
            )

    def refusal(self, got: str, advice: str) -> ValueError:
        return check.refused("axioms.exact", "a continuous piecewise linear score", got, advice)

    def breaks(self) -> list[float]:
        """All breakpoints, rising; some may be doubled, or none."""
        first = [0.0, *((k + GOLDEN) / PROBES for k in range(PROBES)), 1.0]
        t = torch.tensor(first, dtype=torch.float64, device=self.line.device)
        known = (t, *self.at(first))
        ends = [tuple(k[:-1] for k in known), tuple(k[1:] for k in known)]
        found: list[float] = []
        while True:
            ends = self._open(ends, found)
            if not len(ends[0][0]):
                return sorted(found)
            if len(found) + len(ends[0][0]) > self.max_pieces:
                raise self.refusal(
                    f"more than {self.max_pieces} pieces on the path",
                    "Smooth scores have no breakpoints: compare with a quadrature of many steps, "
                    "or raise max_pieces=",
                )
            ends = self._cut(ends)

    def _open(self, ends: list[tuple[Tensor, ...]], found: list[float]) -> list[tuple[Tensor, ...]]:
        """The intervals that need another look; breakpoints of those that are done enter ``found``."""
        (t0, v0, s0, g0), (t1, v1, s1, g1) = ends
        same, width = self.same(g0, g1), t1 - t0
        linear = (v1 - v0 - s0 * width).abs() <= self.blur
        thin = width <= 4 * EPS
        if (thin & ((v1 - v0).abs() > self.blur + 4 * EPS * (s0.abs() + s1.abs()))).any():
            raise self.refusal(
                f"a jump at {float(t0[thin][0]):.6g} of the path",
                "A score that jumps has no exact path integral",
            )
        located = ~same & (width * self.effect(g0, g1) <= 64 * EPS * self.scale)
        meet = self._meet(ends)
        inside = torch.where((t0 < meet) & (meet < t1), meet, (t0 + t1) / 2)
        found += inside[located | (thin & ~same)].tolist()
        rest = ~(same & linear) & ~located & ~thin
        return [tuple(k[rest] for k in end) for end in ends]

    @staticmethod
    def _meet(ends: list[tuple[Tensor, ...]]) -> Tensor:
        """Where the tangent lines of the two ends of intervals intersect."""
        (t0, v0, s0, _), (t1, v1, s1, _) = ends
        return t0 + (v1 - v0 - s1 * (t1 - t0)) / (s0 - s1)

    def _cut(self, ends: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """Each interval in parts: at a place that no kink is likely to be at, and on both sides of the tangents'."""
        (t0, _, _, g0), (t1, _, _, g1) = ends
        meet, beside = self._meet(ends), 24 * EPS * self.scale / self.effect(g0, g1)
        cuts = torch.stack([t0 + GOLDEN * (t1 - t0), meet - beside, meet + beside])
        index = torch.arange(len(t0), device=t0.device).expand(3, -1)
        within = (t0 < cuts) & (cuts < t1)
        t, owner = cuts[within], index[within]
        new = (t, *self.at(t.tolist()))
        every = torch.cat([torch.arange(len(t0), device=t0.device)] * 2 + [owner])
        joined = tuple(torch.cat([a, b, c]) for a, b, c in zip(*ends, new, strict=True))
        order = torch.argsort(joined[0])
        order = order[torch.argsort(every[order], stable=True)]
        joined, every = tuple(k[order] for k in joined), every[order]
        neighbours = (every[1:] == every[:-1]) & (joined[0][1:] > joined[0][:-1])
        return [tuple(k[:-1][neighbours] for k in joined), tuple(k[1:][neighbours] for k in joined)]

    def spare(self, edges: list[float], gradients: Tensor) -> set[int] | None:
        """Breakpoints that change no integral, by their number; never two neighbours at once."""
        if len(gradients) < 2:
            return None
        length = torch.tensor(edges, dtype=torch.float64, device=gradients.device).diff()
        short = torch.minimum(length[1:], length[:-1])
        tiny = short * self.effect(gradients[1:], gradients[:-1]) <= 64 * EPS * self.scale
        spare: set[int] = set()
        for i in (self.same(gradients[1:], gradients[:-1]) | tiny).nonzero().flatten().tolist():
            if i - 1 not in spare:
                spare.add(i)
        return spare or None
