"""Images larger than a network takes: one answer stitched of patches, and patches explained each by itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta import random
from esegeta._facts import named
from esegeta._registry import takes_key
from esegeta._types import Explain, Model
from esegeta.engine import check, levels, stream
from esegeta.engine.stitching import SlidingWindow
from esegeta.engine.tiles import Tiling, cropped_by, cut, margins_of, padded_by, patch_of


def sliding_window(
    model: Model,
    patch: int | Sequence[int],
    overlap: float | int = 0.5,
    weights: str | Tensor = "gaussian",
    *,
    steps: str = "even",
) -> Model:
    r"""Return a model of images of any size, stitched of what a model says on overlapping patches.

    .. math:: y_v = \sum_i n_i(v) f(x|_{B_i})_v, \qquad n_i(v) = \frac{w_i(v)}{\sum_j w_j(v)}

    over the tiles :math:`B_i` that hold v. It is a model like any other: a score of the stitched answer is *one*
    score of the whole image, and attributions of it are exact, whatever the network. The gradient streams: every
    patch runs forward again and back, a few at a time, so that memory holds the image, the answer, the gradient,
    and the activations of one chunk of patches (``esegeta.execution(chunk=, memory=)``). Maps of layers are stitched
    of what the layers of the patches are, as docs/patches.md says.

    The stitched answer equals that of the network on the whole image only if nothing depends on where tiles lie:
    always for a network that looks at one element at a time; with ``weights="centre"`` for a network of reach r
    that is covariant to shifts by p elements (r and p as ``esegeta.locality`` finds them), if neighbouring tiles
    share at least 2r elements and begin at multiples of p. With the other weights elements near the border of a
    tile, which the network sees among zeros, take part.

    Args:
        model: ``(C,*S) -> (K,*S)`` on patches; its output lies on the grid of its input.
        patch: size of a patch, one for all axes or one for each. Smaller images get zeros around them.
        overlap: the least part of a patch that neighbours share along an axis, in [0, 1).
        weights: "gaussian" with a standard deviation of an eighth of the patch; "average"; "centre", where
            neighbours meet in the middle of what they share and every element is taken from one tile; or a map of
            positive weights on the grid of a patch.
        steps: "even" spreads as few tiles as will do over the image; "fixed" steps by what is not shared, and
            moves the last tile inwards.

    Returns:
        A model ``(C,*S) -> (K,*S)``.

    Example:
        >>> tilted = lambda patch: patch * torch.arange(4.0)
        >>> stitched = sliding_window(tilted, 4, overlap=0.5, weights="average")
        >>> stitched(torch.ones(1, 6)).tolist()
        [[0.0, 1.0, 1.0, 2.0, 2.0, 3.0]]
        >>> torch.func.grad(lambda x: stitched(x).sum())(torch.ones(1, 6)).tolist()
        [[0.0, 1.0, 1.0, 2.0, 2.0, 3.0]]

    Reference: Isensee, Jaeger, Kohl, Petersen, Maier-Hein, "nnU-Net: a self-configuring method for deep
        learning-based biomedical image segmentation", Nature Methods 18, 2021 (gaussian weights, even steps).
    """
    where = "sliding_window"
    check.model(where, model)
    size = _checked(where, patch, overlap, weights, steps)
    return SlidingWindow(model, size, overlap, weights, steps)


def patchwise(
    build: Callable[[Tensor], Explain | None],
    patch: int | Sequence[int],
    overlap: float | int = 0.5,
    weights: str | Tensor = "average",
    *,
    steps: str = "even",
) -> Explain:
    r"""Explain every patch by a score of its own, and average the maps. **Not** what explains the whole image.

    .. math:: b_v = \sum_i n_i(v)\, a_i(x|_{B_i})_v

    with tiles and normalised weights as in :func:`sliding_window`, and :math:`a_i` the explanation that ``build``
    makes for patch i. Each patch has its own score: its own mask, its own threshold. The maps of different patches
    explain different numbers, and their average explains none: it is not complete for any score of the image, it
    changes with the size of the patch, and an element counts by the patches around it, not by what it does to the
    answer. For the attribution of a score of the whole image explain ``sliding_window(model, patch)``.

    It is here because it is what patch-based pipelines have done, and because a network with instance norm or
    attention can be explained at one patch only where its patches are the question.

    Args:
        build: of a patch (C,*patch), the explanation of its score, for example
            ``lambda p: eg.gradient(eg.reducers.predicted_class_sum(model, 1, dynamic=True))``; None where a patch
            has nothing to explain, which counts as zero.
        patch: size of a patch, as in ``sliding_window``.
        overlap: as in ``sliding_window``.
        weights: as in ``sliding_window``; "average" is what was usual.
        steps: as in ``sliding_window``.

    Returns:
        ``(x, *refs, key=) -> like x``. References are cut as the image is, along their last axes; every patch
        draws from a key of its own.

    Example:
        >>> import esegeta as eg
        >>> share = lambda p: eg.gradient(lambda z: (z / p.sum()).sum())  # each patch on a scale of its own
        >>> patchwise(share, 2, overlap=0)(torch.tensor([[1., 1., 4., 4.]])).tolist()
        [[0.5, 0.5, 0.125, 0.125]]
    """
    where = "patchwise"
    check.function(
        where, "a function from a patch to its explanation", build, "Pass for example lambda p: ..."
    )
    size = _checked(where, patch, overlap, weights, steps)

    def explain(x: Tensor, *refs: Tensor, key: int | Tensor | None = None) -> Tensor:
        extent = patch_of(where, size, check.image(where, "x", x))
        axes = len(extent)
        for number, ref in enumerate(refs, 1):
            if check.tensor(where, f"reference {number}", ref).shape[-axes:] != x.shape[1:]:
                expected = f"references on the grid {tuple(x.shape[1:])} of the image"
                advice = "They are cut into patches as the image is"
                raise check.refused(where, expected, check.describe(ref), advice)
        margins = margins_of(x.shape[1:], extent)
        inputs = [padded_by(margins, t) for t in (x, *refs)]
        tiling = Tiling(inputs[0].shape[1:], extent, overlap, weights, steps, levels.base(x))

        def of_patch(node: Tensor) -> tuple[Tensor, ...]:
            i = int(node)
            own, *others = [cut(t, tiling.boxes[i]) for t in inputs]
            explained = build(own)
            if explained is None:
                return ()
            check.explanation(where, explained)
            extra = {"key": random.fold_in(check.key(where, key), i)} if takes_key(explained) else {}
            a = explained(own, *others, **extra)
            if check.maps(where, a).ndim != own.ndim or a.shape[1:] != own.shape[1:]:
                expected = f"an explanation on the grid {extent} of its patch"
                raise check.refused(where, expected, check.describe(a), "Upsample maps of layers")
            return (a * tiling.weight(i).to(a.dtype),)

        def absorb(whole: Tensor | None, values: tuple[Tensor, ...], node: Tensor) -> Tensor | None:
            for (a,) in values:
                if whole is None:
                    whole = a.new_zeros((len(a), *inputs[0].shape[1:]))
                cut(whole, tiling.boxes[int(node)]).add_(a)
            return whole

        found = stream.fold(
            of_patch, torch.arange(len(tiling.boxes)), absorb, None, label=where, together=False
        )
        return torch.zeros_like(x) if found is None else cropped_by(margins, found)

    return named(explain, "patchwise")


def _checked(where: str, patch: Any, overlap: object, weights: Any, steps: object) -> int | tuple[int, ...]:
    """Refuse what no tiles can be made of."""
    if not isinstance(overlap, (int, float)) or isinstance(overlap, bool) or not 0 <= overlap < 1:
        raise check.refused(where, "overlap in [0, 1)", repr(overlap), "0.5 is half a patch along each axis")
    check.one_of(where, "steps", steps, ("even", "fixed"))
    if isinstance(patch, int):
        size: int | tuple[int, ...] = check.positive_count(where, "patch", patch)
    elif isinstance(patch, Sequence) and not isinstance(patch, str):
        size = tuple(check.positive_count(where, "every size of patch", n) for n in patch)
    else:
        advice = "Pass 64, or (64, 64, 32)"
        raise check.refused_type(where, "patch to be one size or one for each axis", repr(patch), advice)
    if not isinstance(weights, Tensor):
        check.one_of(where, "weights", weights, ("gaussian", "average", "centre"))
    elif not isinstance(size, tuple) or tuple(weights.shape) != size:
        expected = f"a map of weights of the size of the patch, {size}"
        advice = "Give the patch with one size for each axis"
        raise check.refused(where, expected, check.describe(weights), advice)
    elif not weights.is_floating_point() or levels.true_anywhere(~((weights > 0) & weights.isfinite())):
        expected, got = "weights that are positive numbers", f"{weights.dtype}, or values that are not"
        raise check.refused(where, expected, got, "Every element of an image needs a weight")
    return size
