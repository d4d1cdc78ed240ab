"""Exact references that share no code with the methods: enumeration, breakpoints and finite differences.

They are slow, small and in float64, so that what a method returns can be compared with something beyond doubt.
"""

import math

import torch
from torch import Tensor
from torch.func import vmap

from esegeta._types import Score
from esegeta.axioms import arguments
from esegeta.axioms.pieces import CHUNK
from esegeta.axioms.pieces import Pieces as Pieces
from esegeta.axioms.pieces import pieces as pieces
from esegeta.engine import check

MOST_PARTS = 16
LEVELS = 10  # steps of finite differences


def shapley(score: Score, x: Tensor, baseline: Tensor, labels: Tensor | None = None) -> Tensor:
    r"""Compute the Shapley value of every part, by running every coalition.

    .. math:: a_j = \sum_{T \not\ni j} \frac{|T|!\, (d - |T| - 1)!}{d!} \left( F(x_{T \cup j}) - F(x_T) \right)

    where :math:`x_T` is x on the parts of T and the baseline on the others. Exact up to rounding.

    Args:
        score: ``(C,*S) -> ()``, in float64; no derivative is needed.
        x: the input, float64.
        baseline: like x.
        labels: whole numbers, one for each part, of the shape of x or, for all channels alike, of its grid. Elements
            labelled -1 belong to no part and stay as in x. By default every element is a part. 16 parts at most.

    Returns:
        Like x, the value of a part at each of its elements, zero outside of all parts.

    Example:
        >>> import torch
        >>> x = torch.tensor([[6.0, 2.0]], dtype=torch.float64)
        >>> shapley(lambda z: z.max(), x, torch.zeros_like(x)).tolist()
        [[5.0, 1.0]]

    Reference:
        Shapley 1953, A value for n-person games.
    """
    where = "axioms.exact.shapley"
    arguments.double(where, score, x, baseline)
    if labels is None:
        labels = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    labels, names = arguments.parts(where, labels)
    labels = arguments.fitted(where, "labels", labels, x, "the input")
    d = len(names)
    if d > MOST_PARTS:
        raise check.refused(
            where, f"at most {MOST_PARTS} parts", f"{d}, which take 2^{d} runs", "Join some with labels="
        )
    members = torch.stack([labels == n for n in names])

    def value(code: Tensor) -> Tensor:
        present = (code >> torch.arange(d, device=x.device)) & 1
        absent = (members & (present == 0).reshape(-1, *[1] * x.ndim)).any(0)
        return score(torch.where(absent, baseline, x))

    v = vmap(value, chunk_size=CHUNK)(torch.arange(2**d, device=x.device)).reshape([2] * d)
    # Part j is bit j of a coalition's number, hence axis d - 1 - j; the other axes are the others.
    rest = torch.arange(2 ** (d - 1), device=x.device)[:, None]
    size = ((rest >> torch.arange(d - 1, device=x.device)) & 1).sum(1).reshape([2] * (d - 1))
    weight = x.new_tensor([1 / (d * math.comb(d - 1, k)) for k in range(d)])[size]
    out = torch.zeros_like(x)
    for j in range(d):
        gain = v.select(d - 1 - j, 1) - v.select(d - 1 - j, 0)
        out = torch.where(members[j], (weight * gain).sum(), out)
    return out


def breakpoints(score: Score, x: Tensor, baseline: Tensor, *, max_pieces: int = 4096) -> Tensor:
    """Find where the gradient of a piecewise linear score changes on the straight path from a baseline.

    Exact up to rounding; how, and what it cannot see, says :func:`pieces`.

    Args:
        score: ``(C,*S) -> ()``, continuous and piecewise linear, in float64.
        x: the input, float64.
        baseline: like x.
        max_pieces: number of pieces beyond which the score counts as not piecewise linear.

    Returns:
        ``(n,)``: fractions of the path in (0, 1), rising.

    Example:
        >>> import torch
        >>> x = torch.tensor([[4.0, 2.0]], dtype=torch.float64)
        >>> breakpoints(lambda z: torch.relu(z - 1).sum(), x, torch.zeros_like(x)).tolist()
        [0.25, 0.5]
    """
    return pieces(score, x, baseline, max_pieces=max_pieces).edges[1:-1]


def slopes(score: Score, x: Tensor, baseline: Tensor, *, max_pieces: int = 4096) -> Tensor:
    """Return the slope of each linear piece of a score along the straight path, from the baseline on.

    Args:
        score: ``(C,*S) -> ()``, continuous and piecewise linear, in float64.
        x: the input, float64.
        baseline: like x.
        max_pieces: number of pieces beyond which the score counts as not piecewise linear.

    Returns:
        ``(n + 1,)`` for n breakpoints: :math:`dF(x' + t (x - x')) / dt` between them.

    Example:
        >>> import torch
        >>> x = torch.tensor([[4.0, 2.0]], dtype=torch.float64)
        >>> slopes(lambda z: torch.relu(z - 1).sum(), x, torch.zeros_like(x)).tolist()
        [0.0, 4.0, 6.0]
    """
    return pieces(score, x, baseline, max_pieces=max_pieces).slopes


def variation(score: Score, x: Tensor, baseline: Tensor, *, max_pieces: int = 4096) -> Tensor:
    r"""Return the total variation of the slope of a score along the straight path.

    .. math:: V = \sum_k |s_{k+1} - s_k|

    By the inequality of Koksma a quadrature along the path misses F(x) - F(x') by no more than V times the
    discrepancy of its nodes and weights.

    Args:
        score: ``(C,*S) -> ()``, continuous and piecewise linear, in float64.
        x: the input, float64.
        baseline: like x.
        max_pieces: number of pieces beyond which the score counts as not piecewise linear.

    Returns:
        ``()``, not negative, in units of the score.

    Example:
        >>> import torch
        >>> x = torch.tensor([[4.0, 2.0]], dtype=torch.float64)
        >>> variation(lambda z: torch.relu(z - 1).sum(), x, torch.zeros_like(x)).item()
        6.0
    """
    return slopes(score, x, baseline, max_pieces=max_pieces).diff().abs().sum()


def integrated_gradients(score: Score, x: Tensor, baseline: Tensor, *, max_pieces: int = 4096) -> Tensor:
    r"""Compute integrated gradients of a piecewise linear score without any quadrature.

    .. math:: a = (x - x') \odot \sum_k (t_{k+1} - t_k)\, g_k

    with the gradient :math:`g_k` between the breakpoints :math:`t_k` and :math:`t_{k+1}`. Exact up to rounding.

    Args:
        score: ``(C,*S) -> ()``, continuous and piecewise linear, in float64.
        x: the input, float64.
        baseline: like x.
        max_pieces: number of pieces beyond which the score counts as not piecewise linear.

    Returns:
        Like x, with the sum F(x) - F(x').

    Example:
        >>> import torch
        >>> x = torch.tensor([[4.0, 2.0]], dtype=torch.float64)
        >>> score = lambda z: z.max() + z.min().clamp(max=1)
        >>> integrated_gradients(score, x, torch.zeros_like(x)).round(decimals=9).tolist()
        [[4.0, 1.0]]

    Reference:
        Sundararajan, Taly, Yan 2017, arXiv:1703.01365.
    """
    found = pieces(score, x, baseline, max_pieces=max_pieces)
    return (x - baseline) * torch.tensordot(found.edges.diff(), found.gradients, dims=1)


def gradient(score: Score, x: Tensor, *, step: float | int = 0.0625) -> Tensor:
    r"""Compute the gradient by central differences, extrapolated to a step of zero.

    .. math:: D_0(h) = \frac{F(x + h e_i) - F(x - h e_i)}{2h}, \qquad
              D_k(h) = D_{k-1}(h/2) + \frac{D_{k-1}(h/2) - D_{k-1}(h)}{4^k - 1}

    The step is halved nine times. Of all entries of Richardson's table that is taken, element by element, which
    differs least from the two that it was made of. Where F is smooth within the step that is about 12 digits; where
    a kink is near, the smaller steps say it. At a kink there is no gradient, and what comes is between both sides.

    Args:
        score: ``(C,*S) -> ()``, in float64; no derivative is needed.
        x: the input, float64.
        step: the first h, in units of the image.

    Returns:
        Like x.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        >>> gradient(lambda z: z.exp().sum(), x).round(decimals=10).tolist()
        [[1.0, 2.7182818285]]

    Reference:
        Ridders 1982, Accurate computation of F'(x) and F'(x)F''(x), doi:10.1016/S0141-1195(82)80057-0.
    """
    where = "axioms.exact.gradient"
    arguments.double(where, score, x, x)
    if check.non_negative(where, "step", step) == 0:
        raise check.refused(where, "step > 0", repr(step), "Pass for example 0.0625")
    run = vmap(score, chunk_size=CHUNK)

    def central(h: float) -> Tensor:
        units = h * torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape)
        return (run(x + units) - run(x - units)) / (2 * h)

    row = [central(float(step))]
    best, error = row[0], torch.full_like(row[0], math.inf)
    for level in range(1, LEVELS):
        before, row = row, [central(step / 2**level)]
        for k in range(1, level + 1):
            row.append(row[-1] + (row[-1] - before[k - 1]) / (4**k - 1))
            apart = torch.maximum((row[k] - row[k - 1]).abs(), (row[k] - before[k - 1]).abs())
            best = torch.where(apart <= error, row[k], best)
            error = torch.minimum(apart, error)
    return best.reshape(x.shape)
