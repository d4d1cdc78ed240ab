r"""Residuals of what happens when input, baselines and score are moved together. In units of the attribution.

A move T is undone inside of the score, so that nothing but coordinates has changed: the attribution must move along.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esegeta._types import Method, Score
from esegeta.axioms import arguments
from esegeta.axioms.composed import composed
from esegeta.axioms.registered import axiom
from esegeta.engine import check


@axiom
def shift(method: Method, score: Score, offset: Tensor) -> Callable[..., Tensor]:
    r"""Measure how much the attribution changes when input, baselines and network are shifted together.

    .. math:: \max_i \left| a_i[F(\cdot - c)](x + c, x' + c) - a_i[F](x, x') \right|

    Args:
        method: ``Score -> Explain``.
        score: F.
        offset: c, like x or broadcast to it.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> residual = shift(eg.input_x_gradient, lambda x: x.sum(), torch.ones(1, 2))
        >>> residual(torch.zeros(1, 2)).item()
        1.0

    Reference:
        Kindermans et al. 2017, The (un)reliability of saliency methods, arXiv:1711.00867.
    """
    check.floating("axioms.shift", "offset", offset)

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        c = arguments.step("axioms.shift", "offset", offset, x)
        moved = method(composed(lambda f: lambda z: f(z - c), score))(x + c, *[r + c for r in refs], **kwargs)
        return (moved - method(score)(x, *refs, **kwargs)).abs().amax()

    return residual


@axiom
def translation_equivariance(method: Method, score: Score, offsets: Sequence[int]) -> Callable[..., Tensor]:
    r"""Measure how far the attribution of a moved image is from the moved attribution.

    .. math:: \max_i \left| a[F \circ T^{-1}](T x, T x') - T\, a[F](x, x') \right|_i

    T rolls the spatial axes: what leaves the image on one side enters it on the other. The score itself need not be
    equivariant, for it is moved too. Windows and segments of a method have places of their own and break it.

    Args:
        method: ``Score -> Explain``.
        score: F.
        offsets: voxels to roll by, one number for each spatial axis.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (x[0, 0] * x[0, 1] + x[0, 2]) ** 2
        >>> x, zero = torch.tensor([[1., 2., 3.]]), torch.zeros(1, 3)
        >>> translation_equivariance(eg.integrated_gradients, score, (1,))(x, zero).item()
        0.0
        >>> from functools import partial
        >>> pairs = partial(eg.feature_ablation, features=eg.features.grid(2))
        >>> translation_equivariance(pairs, score, (1,))(x, zero).item()
        9.0
    """
    where = "axioms.translation_equivariance"
    for number in offsets:
        if isinstance(number, bool) or not isinstance(number, int):
            raise check.refused_type(where, "whole numbers as offsets", repr(number), "Roll by whole voxels")
    offsets = tuple(offsets)

    def rolled(z: Tensor, by: tuple[int, ...]) -> Tensor:
        return torch.roll(z, by, dims=tuple(range(-len(by), 0)))

    return _moved(
        where,
        len(offsets),
        method,
        score,
        lambda z: rolled(z, offsets),
        lambda z: rolled(z, tuple(-n for n in offsets)),
    )


@axiom
def affine_equivariance(
    method: Method, score: Score, matrix: "Tensor | Sequence[Sequence[float | int]]"
) -> Callable[..., Tensor]:
    r"""Measure how far the attribution of a flipped or turned image is from the flipped or turned attribution.

    .. math:: \max_i \left| a[F \circ T^{-1}](T x, T x') - T\, a[F](x, x') \right|_i

    T sends the voxel at p, measured from the centre of the image, to M p. For a signed permutation M of the axes
    that is exact on the grid: flips, quarter turns, exchanged axes.

    Args:
        method: ``Score -> Explain``.
        score: F.
        matrix: M, with one entry of 1 or -1 in each row and column and 0 elsewhere, n x n for n spatial axes.

    Returns:
        ``(x, *refs, key=) -> ()``.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (x[0, 0, 1] * x[0, 1, 0]) ** 2
        >>> x, quarter = torch.tensor([[[1., 2.], [3., 4.]]]), torch.tensor([[0, -1], [1, 0]])
        >>> affine_equivariance(eg.gradient, score, quarter)(x).item()
        0.0
        >>> weighted = lambda score: lambda x: torch.arange(4.).reshape(1, 2, 2) * eg.gradient(score)(x)
        >>> affine_equivariance(weighted, score, quarter)(x).item()
        36.0
    """
    where = "axioms.affine_equivariance"
    order, signs = _signed_permutation(where, matrix)
    n = len(order)
    back = tuple(order.index(axis) for axis in range(n))

    def turned(z: Tensor) -> Tensor:
        lead = z.ndim - n
        axes = [*range(lead), *(lead + axis for axis in order)]
        return z.permute(axes).flip([lead + i for i, sign in enumerate(signs) if sign < 0])

    def turned_back(z: Tensor) -> Tensor:
        lead = z.ndim - n
        z = z.flip([lead + i for i, sign in enumerate(signs) if sign < 0])
        return z.permute([*range(lead), *(lead + axis for axis in back)])

    return _moved(where, n, method, score, turned, turned_back)


def _moved(
    where: str,
    axes: int,
    method: Method,
    score: Score,
    there: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor],
) -> Callable[..., Tensor]:
    """The residual of one move of the spatial axes and its inverse."""

    def residual(x: Tensor, *refs: Tensor, **kwargs: "int | Tensor") -> Tensor:
        if x.ndim - 1 != axes:
            raise check.refused(
                where,
                f"an input (C,*S) with {axes} spatial axes",
                check.describe(x),
                "Give the move one number, or one row, for each spatial axis",
            )
        a = arguments.grid(where, method(score)(x, *refs, **kwargs), x)
        moved = method(composed(lambda f: lambda z: f(back(z)), score))(
            there(x), *[there(r) for r in refs], **kwargs
        )
        return (moved - there(a)).abs().amax()

    return residual


def _signed_permutation(where: str, matrix: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each axis after the move, the axis that it was and the direction in which it runs."""
    m = torch.as_tensor(matrix).detach().cpu().to(torch.float64)
    good = m.ndim == 2 and m.shape[0] == m.shape[1]
    if good:
        one = torch.ones(len(m), dtype=torch.float64)
        good = bool(((m == 0) | (m.abs() == 1)).all())
        good = good and torch.equal(m.abs().sum(0), one) and torch.equal(m.abs().sum(1), one)
    if not good:
        raise check.refused(
            where,
            "a matrix with one entry of 1 or -1 in each row and column, and 0 elsewhere",
            str(m.tolist()),
            "Other matrices do not map the grid to itself",
        )
    return tuple(m.abs().argmax(1).tolist()), tuple(int(s) for s in m.sum(1).tolist())
