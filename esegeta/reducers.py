r"""Reducers: what of a model's output is explained, as one number.

A segmentation network answers at every voxel; an explanation needs one number :math:`F(x) = \rho(f(x))`.
A reducer takes the model and returns that score: ``predicted_class_sum(model, 1, at=x)``.

Notation, for the output :math:`z = f(x)` of shape ``(K, *S)``, or ``(K,)`` for a classifier:

- several channels exclude each other: :math:`p = \mathrm{softmax}(z)`, and a voxel belongs to the class with
  the largest :math:`z_k` (the first of equals);
- one channel is two classes: class 1 has the logit :math:`z` and the probability :math:`\sigma(z)` and is
  predicted where :math:`z > 0`; class 0 has :math:`-z` and :math:`\sigma(-z)` and is predicted where
  :math:`z \le 0`. Where classes are compared their logits are :math:`(0, z)`, the same model;
- with ``exclusive=False`` channels are independent labels: :math:`p_k = \sigma(z_k)`, predicted where
  :math:`z_k > 0`.

A reducer that sums over predicted voxels needs a mask, and a mask has no derivative. ``at=x`` computes it
once and freezes it: the score is then as smooth as the model, gradients describe it, and along a path from a
baseline it is the *same* score. ``dynamic=True`` recomputes the mask at every evaluation: then the score may
jump where voxels change class, its gradient does not know of the jumps, and completeness fails by their sum.
Where a dynamic mask is empty the score is 0; an empty frozen mask is an error.

Class numbers, part numbers and the indices of voxels are ints, or integer tensors where examples differ:
``batched(lambda x, t: gradient(logit(model, t))(x))(xs, targets)`` explains each image for a class of its own.
One that does not exist is refused, also if only one example of a batch has it.
"""

import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from esegeta import spatial
from esegeta._facts import named
from esegeta._registry import reducer
from esegeta._types import Model, Score
from esegeta.engine import check, levels

Mask = Callable[[Tensor], Tensor]
Whole = int | Tensor  # a tensor of shape () where examples differ

# Examples in the registry fit a one-channel model on a grid of 4 x 4 voxels (and vectors of one or more).
_GRID = torch.ones(4, 4, dtype=torch.bool)


# --- What a model may return ------------------------------------------------------------------------------


def _output(where: str, model: Model, x: Tensor, kind: str = "map") -> Tensor:
    """Run the model on one example and refuse what is not a floating ``(K, *S)`` map or ``(K,)`` vector."""
    z: object = model(check.tensor(where, "x", x))
    if not isinstance(z, Tensor):
        raise check.refused_type(
            where,
            "the model to return one tensor",
            check.describe(z),
            "Choose the tensor when the model is made: esegeta.from_module(module, output=...)",
        )
    if not z.is_floating_point():
        raise check.refused_type(
            where,
            "the model to return floating scores",
            check.describe(z),
            "Explain the logits before argmax or thresholds: those have no gradient",
        )
    # Where the input is an image, the output has as many axes; a latent vector may grow into any map.
    is_map = 2 <= z.ndim <= 4 and (x.ndim < 2 or z.ndim == x.ndim)
    if (is_map and kind != "vector") or (z.ndim == 1 and kind != "map"):
        return z
    if z.ndim == 0:
        advice = "One number needs no reducer, it is a score already"
    elif z.ndim == 1:
        advice = "This is a classification output: use logit, probability, log_probability or margin"
    elif is_map and z.shape[0] != 1:
        advice = "This is a segmentation output: use predicted_class_sum or another reducer of maps"
    else:
        advice = (
            "Models see one example and return no batch axis: make the model with esegeta.from_module, "
            "and use esegeta.batched for many examples"
        )
    wanted = {"map": "(K, *S)", "vector": "(K,)", "any": "(K, *S) or (K,)"}[kind]
    raise check.refused(
        where,
        f"a model output of shape {wanted} for one example",
        f"{check.describe(z)} for an input {tuple(x.shape)}",
        advice,
    )


def _whole(where: str, name: str, value: object, advice: str = "Choose one") -> Whole:
    """Refuse anything but a whole number from 0 on; how many there are is known at the first call."""
    if isinstance(value, Tensor):
        return check.whole(where, name, value, (), advice)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) < 2**31:
        raise check.refused(where, f"{name} 0, 1, ...", repr(value), advice)
    return int(value)


def _target(where: str, target: object, name: str = "target") -> Whole:
    return _whole(where, f"{name} to be a class number", target)


def _shown(index: Iterable[object]) -> str:
    """An index as Python writes it, with the numbers of all examples where it holds tensors."""
    numbers = [check.values(i) if isinstance(i, Tensor) else repr(i) for i in index]
    return f"({numbers[0]},)" if len(numbers) == 1 else f"({', '.join(numbers)})"


def _not_below(i: Whole, n: int) -> bool:
    """Whether a number is n or more, for any example."""
    return levels.true_anywhere(i >= n) if isinstance(i, Tensor) else i >= n


def _in_range(where: str, z: Tensor, target: Whole, exclusive: bool) -> None:
    channels = z.shape[0]
    classes = 2 if exclusive and channels == 1 else channels
    if _not_below(target, classes):
        note = " (one channel counts as two classes)" if exclusive and channels == 1 else ""
        raise check.refused(
            where,
            f"a target below {classes}, for the K = {channels} channels of the model{note}",
            f"target {check.values(target)}",
            "Count classes from 0",
        )


# --- What the output says, voxel by voxel -----------------------------------------------------------------


def _softmaxed(z: Tensor, exclusive: bool) -> bool:
    """Whether classes compete by softmax; otherwise every channel is a question with a yes and a no."""
    return exclusive and z.shape[0] > 1


def _logit(where: str, z: Tensor, target: Whole, exclusive: bool) -> Tensor:
    _in_range(where, z, target, exclusive)
    if exclusive and z.shape[0] == 1:
        return _either(target, z[0], -z[0])
    return _channel(z, target)


def _channel(z: Tensor, target: Whole) -> Tensor:
    """One channel; vmap cannot index with a number that differs between examples, but it can gather."""
    if not isinstance(target, Tensor):
        return z[target]
    return z.gather(0, target.to(z.device).expand(1, *z.shape[1:])).squeeze(0)


def _others(z: Tensor, target: Whole) -> Tensor:
    """All channels but one."""
    if not isinstance(target, Tensor):
        return torch.cat([z[:target], z[target + 1 :]])
    i = torch.arange(len(z) - 1, device=z.device)
    i = i + (i >= target.to(z.device))
    return z.gather(0, i.reshape(-1, *[1] * (z.ndim - 1)).expand(-1, *z.shape[1:]))


def _either(target: Whole, one: Tensor, zero: Tensor) -> Tensor:
    """Of two classes the map of the target."""
    if not isinstance(target, Tensor):
        return one if target else zero
    return torch.where(target.to(one.device) == 1, one, zero)


def _probability(where: str, z: Tensor, target: Whole, exclusive: bool) -> Tensor:
    own = _logit(where, z, target, exclusive)
    return _channel(z.softmax(0), target) if _softmaxed(z, exclusive) else own.sigmoid()


def _log_probability(where: str, z: Tensor, target: Whole, exclusive: bool) -> Tensor:
    own = _logit(where, z, target, exclusive)
    return _channel(z.log_softmax(0), target) if _softmaxed(z, exclusive) else logsigmoid(own)


def _predicted(where: str, z: Tensor, target: Whole, exclusive: bool) -> Tensor:
    _in_range(where, z, target, exclusive)
    if _softmaxed(z, exclusive):
        return z.argmax(0) == (target.to(z.device) if isinstance(target, Tensor) else target)
    if exclusive:
        return _either(target, z[0] > 0, z[0] <= 0)
    return _channel(z, target) > 0


def predicted_mask(z: Tensor, target: Whole, *, exclusive: bool = True) -> Tensor:
    r"""Return where an output predicts a class: :math:`M_v = 1[\hat y_v = c]`.

    The building block of frozen masks: ``region(model, 1, predicted_mask(model(x), 1))`` is
    ``predicted_class_sum(model, 1, at=x)``.

    Args:
        z: output of a model.
        target: class number.
        exclusive: False where channels are independent labels.

    Returns:
        ``(K, *S) -> (*S)``, boolean.

    Example:
        >>> predicted_mask(torch.tensor([[0., 5.], [1., 2.]]), 1).tolist()
        [True, False]
        >>> predicted_mask(torch.tensor([[-1., 0., 3.]]), 0).tolist()
        [True, True, False]
    """
    here = "predicted_mask"
    if check.floating(here, "z", z).ndim == 0:
        raise check.refused(here, "an output (K, *S)", check.describe(z), "Pass model(x)")
    return _predicted(here, z.detach(), _target(here, target), check.flag(here, "exclusive", exclusive))


def _otsu(n: Tensor) -> Tensor:
    """Otsu's threshold of values in [0, 1]: the centre of the last of 256 bins of the lower class.

    With w voxels of mean m on either side, the split maximises w0 w1 (m0 - m1)^2. Counts and sums of bin
    centres are exact in float64, so that equal splits are equal numbers and the first one is taken. That the
    centre and not the upper edge of the bin is returned is the convention of scikit-image.
    """
    bins = 256
    i = (n.detach() * bins).long().clamp(0, bins - 1).flatten()
    none = torch.zeros(bins, dtype=torch.float64, device=n.device)
    count = none.scatter_add(0, i, torch.ones_like(i, dtype=torch.float64))
    sums = count * (torch.arange(bins, dtype=torch.float64, device=n.device) + 0.5)
    w0, s0 = count.cumsum(0)[:-1], sums.cumsum(0)[:-1]
    w1, s1 = count.sum() - w0, sums.sum() - s0
    between = (s0 * w1 - s1 * w0).square() / (w0 * w1).clamp(min=1)
    return (between.argmax() + 0.5) / bins


def _above_otsu(z: Tensor) -> Tensor:
    """Where one channel, scaled to [0, 1], exceeds its Otsu threshold; nowhere if it is constant."""
    low, high = z.amin(), z.amax()
    n = (z - low) / torch.where(high > low, high - low, 1)
    return n > _otsu(n)


class _Parts(torch.autograd.Function):
    """Number the connected parts of a mask by size: 1 for the largest, 0 outside. Equals keep raster order.

    Labelling depends on values and runs on the host, one example at a time, hence its own rule for vmap.
    """

    @staticmethod
    def forward(mask: Tensor) -> Tensor:
        """Label one mask."""
        if levels.fake(mask):
            return torch.zeros_like(mask, dtype=torch.int64)
        return spatial.parts(mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        """Labels have no derivative."""
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], mask: Tensor) -> tuple[Tensor, int]:  # noqa: ARG004
        """One example after the other."""
        return torch.stack([_Parts.apply(one) for one in mask.movedim(in_dims[0], 0)]), 0


# --- Masks and sums ---------------------------------------------------------------------------------------


def _given(where: str, mask: Tensor, empty: str = "no voxel is True") -> Mask:
    """A constant mask as a function of the output, checked once for content and at each call for fit."""
    if check.tensor(where, "the mask", mask).dtype != torch.bool:
        raise check.refused_type(where, "a boolean mask", check.describe(mask), "Use mask > 0")
    mask = mask.detach()
    if levels.true_anywhere(~mask.any()):
        raise check.EmptyMask(
            check.problem(
                where,
                "a mask with at least one voxel",
                f"an empty one: {empty}",
                "Explain what is there, or use class_sum, soft_count or region with a mask of your own",
            )
        )

    def constant(z: Tensor) -> Tensor:
        if mask.shape != z.shape[1:]:
            raise check.refused(
                where,
                f"a mask of the shape {tuple(z.shape[1:])} of the model's output map",
                check.describe(mask),
                "Masks live on the output grid and have no channel axis; a score fits inputs of one size",
            )
        return _beside(where, "the mask", mask, z)

    return constant


def _beside(where: str, name: str, value: Tensor, z: Tensor) -> Tensor:
    if value.device != z.device:
        raise check.refused(
            where,
            f"{name} on {z.device}, where the output is",
            f"a tensor on {value.device}",
            "Move it there",
        )
    return value


def _frozen(where: str, model: Model, mask_of: Mask, at: Tensor | None, dynamic: bool, empty: str) -> Mask:
    """A mask computed by the model: once at ``at``, or with ``dynamic`` from every output anew."""
    z = _output_at(where, model, at, dynamic, "map")
    return (lambda z: mask_of(z.detach())) if z is None else _given(where, mask_of(z), empty)


def _output_at(where: str, model: Model, at: Tensor | None, dynamic: bool, kind: str) -> Tensor | None:
    """The output that something is frozen at, without a graph; None with ``dynamic``."""
    if dynamic == (at is not None):
        raise check.refused(
            where,
            "either at= or dynamic=True",
            "both" if dynamic else "neither",
            "Pass at=x to freeze the mask (recommended) or dynamic=True",
        )
    if at is None:
        return None
    with torch.no_grad():
        z = _output(where, model, check.tensor(where, "at", at).detach(), kind).detach()
        if levels.true_anywhere(z.isnan()):
            raise check.refused(
                where,
                "a model output without NaN at x",
                f"NaN in {check.describe(z)}",
                "Look for NaN in the input, the weights, or an overflow in half precision",
            )
        return z


def _sum(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.sum()
    # where, not a product: an infinite logit outside of the mask must not become NaN.
    return torch.where(mask, values, 0).sum()


def _summed(where: str, model: Model, target: Whole, exclusive: bool, mask: Mask) -> Score:
    def score(x: Tensor) -> Tensor:
        z = _output(where, model, x)
        return _sum(_logit(where, z, target, exclusive), mask(z))

    return score


# --- Sums of scores over a map ----------------------------------------------------------------------------


@reducer(mask=True, example={"target": 1})
def predicted_class_sum(
    model: Model, target: Whole, *, at: Tensor | None = None, dynamic: bool = False, exclusive: bool = True
) -> Score:
    r"""Sum the scores of a class where that class is predicted: the usual choice for segmentation.

    .. math:: F(x) = \sum_{v \in M} z_{c,v}, \qquad M = \{v : \hat y_v = c\} \text{ at } x_0

    With the mask frozen at :math:`x_0` (``at``) this is linear in the output and its gradient is exact. With
    ``dynamic=True`` the gradient is that of the sum over the current mask; it misses the change of the mask.

    Args:
        model: ``(C, *S) -> (K, *S)``.
        target: class number.
        at: the explained input, where the mask is frozen.
        dynamic: recompute the mask at every evaluation instead.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> model = lambda x: torch.cat([torch.ones_like(x), x ** 2])
        >>> x = torch.tensor([[0., 2., 3.]])
        >>> score = eg.reducers.predicted_class_sum(model, 1, at=x)
        >>> score(x).item(), torch.func.grad(score)(x).tolist()
        (13.0, [[0.0, 4.0, 6.0]])

    Reference: S. Chatterjee et al., "TorchEsegeta: Framework for Interpretability and Explainability of
        Image-based Deep Learning Models", 2022, section 2.5.4 (multi-class). Its equation 16 is a count:
        see :func:`predicted_count`.
    """
    here = "predicted_class_sum"
    target = _target(here, target)
    empty = f"class {check.values(target)} is predicted nowhere at x"
    mask = _frozen(here, model, lambda z: _predicted(here, z, target, exclusive), at, dynamic, empty)
    return _summed(here, model, target, exclusive, mask)


@reducer(mask=True, example={"part": "foreground"})
def otsu_sum(
    model: Model, *, part: str = "foreground", at: Tensor | None = None, dynamic: bool = False
) -> Score:
    r"""Sum the scores of a one-channel output above (or not above) its Otsu threshold.

    .. math::

        n = \frac{z - \min z}{\max z - \min z}, \qquad M = \{v : n_v > \mathrm{otsu}(n)\}, \qquad
        F(x) = \sum_{v \in M} z_v \text{ or } \sum_{v \notin M} z_v

    The threshold is the centre of one of 256 bins, so that a value in this last bin of the background may
    still exceed it, as in scikit-image. It is a threshold of the *scaled* output and is compared with the
    scaled output. A constant output has no foreground. For outputs without a natural zero, such as distances
    or intensities; where zero divides two classes use :func:`predicted_class_sum`.

    Args:
        model: ``(C, *S) -> (1, *S)``.
        part: "foreground" (above the threshold) or "background".
        at: the explained input, where the mask is frozen.
        dynamic: recompute threshold and mask at every evaluation instead.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> x = torch.tensor([[10., 10., 30., 31., 32.]])
        >>> eg.reducers.otsu_sum(lambda x: 2 * x, at=x)(x).item()
        186.0
        >>> eg.reducers.otsu_sum(lambda x: 2 * x, part="background", at=x)(x).item()
        40.0

    Reference: N. Otsu, "A Threshold Selection Method from Gray-Level Histograms", 1979. S. Chatterjee et
        al., "TorchEsegeta", 2022, equations 17 and 18 (threshold-based).
    """
    here = "otsu_sum"
    foreground = check.one_of(here, "part", part, ("foreground", "background")) == "foreground"

    def single(z: Tensor) -> Tensor:
        if z.shape[0] != 1:
            raise check.refused(
                here,
                "a model with one output channel",
                f"K = {z.shape[0]} channels",
                "Use predicted_class_sum where channels are classes",
            )
        return z[0]

    def mask_of(z: Tensor) -> Tensor:
        above = _above_otsu(single(z))
        return above if foreground else ~above

    mask = _frozen(here, model, mask_of, at, dynamic, "the output at x is constant and has no foreground")

    def score(x: Tensor) -> Tensor:
        z = _output(here, model, x)
        return _sum(single(z), mask(z))

    return score


@reducer(example={"target": 1})
def class_sum(model: Model, target: Whole, *, exclusive: bool = True) -> Score:
    r"""Sum the scores of a class over the whole map.

    .. math:: F(x) = \sum_v z_{c,v}

    No mask, so voxels of every class speak, in a mostly empty volume above all the background.

    Args:
        model: ``(C, *S) -> (K, *S)``.
        target: class number.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> score = eg.reducers.class_sum(lambda x: torch.cat([x, x ** 3]), 1)
        >>> score(torch.tensor([[1., 2.]])).item()
        9.0
    """
    here = "class_sum"
    target = _target(here, target)
    return lambda x: _logit(here, _output(here, model, x), target, exclusive).sum()


@reducer(example={"target": 1})
def class_mean(model: Model, target: Whole, *, of: str = "logits", exclusive: bool = True) -> Score:
    r"""Average the scores of a class over the whole map: global average pooling.

    .. math:: F(x) = \frac1{|S|} \sum_v z_{c,v} \quad\text{or}\quad \frac1{|S|} \sum_v p_{c,v}

    :func:`class_sum` on a scale that does not grow with the volume: methods that exponentiate or square the
    score, and half precision, need it.

    Args:
        model: ``(C, *S) -> (K, *S)``.
        target: class number.
        of: "logits" or "probabilities".
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> score = eg.reducers.class_mean(lambda x: torch.cat([x, x ** 3]), 1)
        >>> score(torch.tensor([[1., 2.]])).item()
        4.5

    Reference: V. Couteaux et al., "Towards Interpretability of Segmentation Networks by Analyzing
        DeepDreams", 2019, equation 3.
    """
    here = "class_mean"
    target = _target(here, target)
    value = {"logits": _logit, "probabilities": _probability}[
        check.one_of(here, "of", of, ("logits", "probabilities"))
    ]
    return lambda x: value(here, _output(here, model, x), target, exclusive).mean()


@reducer(example={"target": 1, "index": (1, 2)})
def voxel(model: Model, target: Whole, index: Sequence[Whole] | Tensor, *, exclusive: bool = True) -> Score:
    r"""Read the score of a class at one voxel: why *here*?

    .. math:: F(x) = z_{c,v}

    Args:
        model: ``(C, *S) -> (K, *S)``.
        target: class number.
        index: the voxel, one whole number for each spatial axis of the output; a tensor of them where
            examples differ.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> score = eg.reducers.voxel(lambda x: torch.cat([x, x ** 3]), 1, (0, 1))
        >>> torch.func.grad(score)(torch.tensor([[[1., 2.]]])).tolist()
        [[[0.0, 12.0]]]
    """
    here = "voxel"
    target = _target(here, target)
    advice = "Index the voxels of the output map, in array order"
    if isinstance(index, Tensor) and index.ndim == 1:
        index = check.whole(here, "the index", index, tuple(index.shape), advice).unbind()
    if isinstance(index, (Tensor, str)) or not isinstance(index, Iterable):
        got = check.describe(index)
        raise check.refused_type(here, "an index: a whole number for each spatial axis", got, advice)
    at, got = tuple(index), f"index {_shown(index)}"
    for i in at:
        if isinstance(i, Tensor):
            check.whole(here, "an index of whole numbers", i, (), advice)
        elif isinstance(i, bool) or not isinstance(i, numbers.Integral) or not 0 <= int(i) < 2**31:
            raise check.refused(here, "an index of whole numbers 0, 1, ...", got, advice)

    def score(x: Tensor) -> Tensor:
        z = _output(here, model, x)
        size = tuple(z.shape[1:])
        if len(at) != len(size) or any(map(_not_below, at, size)):
            raise check.refused(
                here,
                f"an index with {len(size)} numbers, from 0 to below {size}",
                got,
                advice,
            )
        scores = _logit(here, z, target, exclusive)
        for i in at:
            scores = _channel(scores, i)
        return scores

    return score


@reducer(example={"target": 1, "mask": _GRID})
def region(
    model: Model, target: Whole, mask: Tensor, *, average: bool = False, exclusive: bool = True
) -> Score:
    r"""Sum or average the scores of a class over a region that you choose.

    .. math:: F(x) = \sum_{v \in M} z_{c,v} \quad\text{or}\quad \frac1{|M|} \sum_{v \in M} z_{c,v}

    Args:
        model: ``(C, *S) -> (K, *S)``.
        target: class number.
        mask: boolean ``(*S)`` on the output grid: a lesion, a reference segmentation, what was missed.
        average: divide by the number of voxels.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> mask = torch.tensor([True, False, True])
        >>> score = eg.reducers.region(lambda x: torch.cat([x, x ** 2]), 1, mask, average=True)
        >>> score(torch.tensor([[1., 2., 3.]])).item()
        5.0
    """
    here = "region"
    target = _target(here, target)
    inside = _given(here, mask)

    def score(x: Tensor) -> Tensor:
        z = _output(here, model, x)
        m = inside(z)
        total = _sum(_logit(here, z, target, exclusive), m)
        return total / m.sum() if average else total

    return score


@reducer(mask=True, example={"target": 1, "k": 0})
def component(
    model: Model,
    target: Whole,
    k: Whole = 0,
    *,
    at: Tensor | None = None,
    dynamic: bool = False,
    exclusive: bool = True,
) -> Score:
    r"""Sum the scores of a class over one connected part of its prediction: one lesion, one vessel.

    .. math:: F(x) = \sum_{v \in M_k} z_{c,v}

    :math:`M_0, M_1, \dots` are the parts of :math:`\{v : \hat y_v = c\}` that hang together through the faces
    of voxels, the largest first; equally large ones in array order.

    Args:
        model: ``(C, *S) -> (K, *S)``.
        target: class number.
        k: which part, 0 for the largest.
        at: the explained input, where the mask is frozen.
        dynamic: find the parts anew at every evaluation instead; parts may then change places.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> x = torch.tensor([[5., 0., 1., 2., 0., 9., 9., 9.]])
        >>> [eg.reducers.component(lambda x: x, 1, k, at=x)(x).item() for k in range(3)]
        [27.0, 3.0, 5.0]
    """
    here = "component"
    target = _target(here, target)
    k = _whole(here, "k to be the number of a part", k)

    def mask_of(z: Tensor) -> Tensor:
        return _Parts.apply(_predicted(here, z, target, exclusive)) == k + 1

    empty = f"the prediction of class {check.values(target)} at x has no part k={check.values(k)} (the largest is 0)"
    return _summed(here, model, target, exclusive, _frozen(here, model, mask_of, at, dynamic, empty))


@reducer(mask=True, example={"target": 1})
def boundary(
    model: Model, target: Whole, *, at: Tensor | None = None, dynamic: bool = False, exclusive: bool = True
) -> Score:
    r"""Sum the scores of a class along the boundary of its prediction: why does it end *there*?

    .. math:: F(x) = \sum_{v \in \partial M} z_{c,v}, \qquad M = \{v : \hat y_v = c\}

    :math:`\partial M` is :func:`esegeta.spatial.boundary`: voxels of the class with another class across one
    of their faces, and those others. What raises this score pushes the boundary outwards.

    Args:
        model: ``(C, *S) -> (K, *S)``.
        target: class number.
        at: the explained input, where the mask is frozen.
        dynamic: recompute the mask at every evaluation instead.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> x = torch.tensor([[1., 2., 5., -3., -4.]])
        >>> eg.reducers.boundary(lambda x: x, 1, at=x)(x).item()
        2.0
    """
    here = "boundary"
    target = _target(here, target)

    def mask_of(z: Tensor) -> Tensor:
        return spatial.boundary(_predicted(here, z, target, exclusive))

    empty = f"class {check.values(target)} has no boundary at x, it is predicted nowhere or everywhere"
    return _summed(here, model, target, exclusive, _frozen(here, model, mask_of, at, dynamic, empty))


# --- Comparisons and probabilities ------------------------------------------------------------------------


@reducer(example={"target": 1})
def soft_count(model: Model, target: Whole, *, exclusive: bool = True) -> Score:
    r"""Sum the probabilities of a class: the volume that the model expects, with a gradient.

    .. math:: F(x) = \sum_v p_{c,v}

    :func:`predicted_count` counts the same voxels with hard decisions and has no gradient.

    Args:
        model: ``(C, *S) -> (K, *S)``.
        target: class number.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> eg.reducers.soft_count(lambda x: x, 1)(torch.zeros(1, 8)).item()
        4.0
    """
    here = "soft_count"
    target = _target(here, target)
    return lambda x: _probability(here, _output(here, model, x), target, exclusive).sum()


@reducer(output="any", example={"target": 1})
def margin(model: Model, target: Whole, other: Whole | None = None, mask: Tensor | None = None) -> Score:
    r"""Measure how far a class leads another, or all others: why this class *and not that one*?

    .. math::

        F(x) = \sum_{v \in M} \bigl( z_{c,v} - z_{c',v} \bigr) \quad\text{or}\quad
        F(x) = \sum_{v \in M} \Bigl( z_{c,v} - \log \sum_{k \ne c} e^{z_{k,v}} \Bigr)
             = \sum_{v \in M} \log \frac{p_{c,v}}{1 - p_{c,v}}

    Adding the same map to all logits changes neither the prediction nor the margin; it changes
    :func:`class_sum`.

    Args:
        model: ``(C, *S) -> (K, *S)`` or ``-> (K,)``; channels exclude each other.
        target: class number.
        other: the class to compare with; without it all others together.
        mask: boolean ``(*S)`` on the output grid; without it the whole map.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> model = lambda x: torch.cat([x, x ** 2, 0 * x])
        >>> eg.reducers.margin(model, 1, 0)(torch.tensor([[1., 2., 3.]])).item()
        8.0
        >>> eg.reducers.margin(lambda x: x, 1)(torch.tensor([3.])).item()
        3.0
    """
    here = "margin"
    target = _target(here, target)
    if other is not None:
        other = _target(here, other, "other")
        if levels.true_anywhere(torch.as_tensor(other == target)):
            got = f"{check.values(target)} twice"
            raise check.refused(here, "two classes", got, "Choose another class")
    inside = None if mask is None else _given(here, mask)

    def score(x: Tensor) -> Tensor:
        z = _output(here, model, x, "any")
        for c in (target, *(() if other is None else (other,))):
            _in_range(here, z, c, exclusive=True)
        if z.shape[0] == 1:
            lead = _logit(here, z, target, exclusive=True)
        elif other is not None:
            lead = _channel(z, target) - _channel(z, other)
        else:
            lead = _channel(z, target) - _others(z, target).logsumexp(0)
        return _sum(lead, inside and inside(z))

    return score


@reducer(output="any", mask=True, example={"target": 1})
def finer(
    model: Model,
    target: Whole,
    *,
    at: Tensor | None = None,
    dynamic: bool = False,
    k: int = 3,
    alpha: float = 1.0,
) -> Score:
    r"""Measure how far a class leads those that it is most easily mistaken for: what tells it from *them*?

    .. math::

        F(x) = \frac1{|M|} \sum_{v \in M} \frac{\sum_{j \in J_v} p_{j,v} (z_{c,v} - \alpha z_{j,v})}
                                              {\sum_{j \in J_v} p_{j,v}}

    :math:`J_v` are the k classes whose scores at v are nearest to that of c, all others if there are fewer, and
    M is where c is predicted; for a vector there is no average. M, J and the probabilities p are frozen at
    :math:`x_0`: the score is linear in the output. A class activation map of this score is FinerCAM; any other
    method can explain it, too. With k = 1 it is :func:`margin` over the nearest class.

    Args:
        model: ``(C, *S) -> (K, *S)`` or ``-> (K,)``; channels exclude each other.
        target: class number.
        at: the explained input, where mask, classes and probabilities are frozen.
        dynamic: find them anew at every evaluation instead; the gradient does not know of their change.
        k: how many classes it is compared with.
        alpha: how much of their scores is taken off; 0 leaves the mean score of the class.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> z = torch.tensor([5., 4., 4., -9.])
        >>> eg.reducers.finer(lambda x: x, 0, at=z, k=2)(z).item()
        1.0
        >>> eg.reducers.finer(lambda x: x, 0, at=z, k=2, alpha=0.5)(z).item()
        3.0

    Reference: Z. Zhang et al., "Finer-CAM: Spotting the Difference Reveals Finer Details for Visual
        Explanation", 2025, arXiv:2501.11309; the weights are those of pytorch-grad-cam, there not frozen.
    """
    here = "finer"
    target = _target(here, target)
    check.positive_count(here, "k", k)
    check.non_negative(here, "alpha", alpha)

    def classes(z: Tensor) -> Tensor:
        _in_range(here, z, target, exclusive=True)
        return z if z.shape[0] > 1 else torch.cat([torch.zeros_like(z), z])

    def rivals(z: Tensor) -> tuple[Tensor, Tensor]:
        z = classes(z)
        gap = (z - _channel(z, target)).abs()
        number = target.to(z.device) if isinstance(target, Tensor) else target
        own = torch.arange(len(z), device=z.device).reshape(-1, *[1] * (z.ndim - 1)) == number
        nearest = torch.where(own, float("inf"), gap).argsort(stable=True, dim=0)[: min(k, len(z) - 1)]
        return nearest, z.gather(0, nearest).softmax(0)

    def mask_of(z: Tensor) -> Tensor:
        return _predicted(here, z, target, exclusive=True)

    z_at = _output_at(here, model, at, dynamic, "any")
    frozen = None if z_at is None else rivals(z_at)
    if z_at is None or z_at.ndim == 1:
        mask: Mask = mask_of
    else:
        mask = _given(here, mask_of(z_at), f"class {check.values(target)} is predicted nowhere at x")

    def score(x: Tensor) -> Tensor:
        z = _output(here, model, x, "any")
        if z_at is not None and z.shape != z_at.shape:
            got, advice = check.describe(z), "A frozen score fits inputs of one size"
            raise check.refused(here, f"an output {tuple(z_at.shape)} as at x", got, advice)
        inside = mask(z.detach()) if z.ndim > 1 else None
        nearest, share = frozen or rivals(z.detach())
        z = classes(z)
        lead = _channel(z, target) - alpha * (share.to(z.dtype) * z.gather(0, nearest)).sum(0)
        return lead if inside is None else _sum(lead, inside) / inside.sum().clamp(min=1)

    return score


@reducer(output="any", example={"target": 1})
def log_probability(
    model: Model, target: Whole, *, mask: Tensor | None = None, exclusive: bool = True
) -> Score:
    r"""Sum the log-probability of a class over a region.

    .. math:: F(x) = \sum_{v \in M} \log p_{c,v}

    The log-likelihood of "all of M is c", voxels taken as independent. It dwells on voxels that are in doubt
    or wrong: where :math:`p_c` is near 1 its gradient vanishes.

    Args:
        model: ``(C, *S) -> (K, *S)`` or ``-> (K,)``.
        target: class number.
        mask: boolean ``(*S)`` on the output grid; without it the whole map.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> x = torch.zeros(4, dtype=torch.float64)
        >>> round(eg.reducers.log_probability(lambda x: x, 1)(x).exp().item(), 12)
        0.25
    """
    here = "log_probability"
    target = _target(here, target)
    inside = None if mask is None else _given(here, mask)

    def score(x: Tensor) -> Tensor:
        z = _output(here, model, x, "any")
        return _sum(_log_probability(here, z, target, exclusive), inside and inside(z))

    return score


@reducer(output="any", example={"labels": _GRID.long()})
def negative_loss(
    model: Model, labels: Tensor, *, kind: str = "cross_entropy", exclusive: bool = True
) -> Score:
    r"""Measure how well the output agrees with a reference: minus the loss, so evidence for it is positive.

    .. math::

        F(x) = \frac1{|S|} \sum_v \log p_{y_v,v} \quad\text{or}\quad
        F(x) = \frac1{|T|} \sum_{k \in T} \frac{2 \sum_v p_{k,v} 1[y_v = k] + \epsilon}
                                              {\sum_v p_{k,v} + 1[y_v = k] + \epsilon} - 1

    T are the classes but 0, the background; with ``exclusive=False`` all labels. :math:`\epsilon = 10^{-5}`
    decides about a class that is neither there nor predicted: its Dice is 1.

    Args:
        model: ``(C, *S) -> (K, *S)`` or ``-> (K,)``.
        labels: the reference: whole numbers ``(*S)``, class numbers below K (0 and 1 for one channel); with
            ``exclusive=False`` zeros and ones ``(K, *S)``.
        kind: "cross_entropy" or "dice".
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> model = lambda x: torch.cat([x, x, x, x])
        >>> labels = torch.tensor([0, 3])
        >>> score = eg.reducers.negative_loss(model, labels)
        >>> round(score(torch.zeros(1, 2, dtype=torch.float64)).exp().item(), 12)
        0.25
    """
    here = "negative_loss"
    check.one_of(here, "kind", kind, ("cross_entropy", "dice"))
    if check.tensor(here, "labels", labels).is_floating_point() or labels.is_complex():
        raise check.refused_type(
            here, "labels of an integer dtype", check.describe(labels), "Use labels.long()"
        )
    y = labels.detach().long()

    def score(x: Tensor) -> Tensor:
        z = _output(here, model, x, "any")
        wanted = z.shape[1:] if exclusive else z.shape
        if y.shape != wanted:
            raise check.refused(
                here,
                f"labels of the shape {tuple(wanted)} for the model's output {tuple(z.shape)}",
                check.describe(labels),
                "Labels are class numbers without a channel axis, or (K, *S) with exclusive=False",
            )
        _beside(here, "the labels", y, z)
        softmaxed = _softmaxed(z, exclusive)
        classes = z.shape[0] if softmaxed else 2
        if levels.true_anywhere((y < 0) | (y >= classes)):
            raise check.refused(
                here,
                f"labels from 0 to {classes - 1}",
                "others",
                "Merge or renumber classes, and give ignored voxels a class",
            )
        if kind == "cross_entropy" and softmaxed:
            return z.log_softmax(0).gather(0, y.unsqueeze(0)).mean()
        if kind == "cross_entropy":
            return logsigmoid(torch.where(y.reshape(z.shape) == 1, z, -z)).mean()
        if softmaxed:
            p = z.softmax(0)[1:].reshape(classes - 1, -1)
            truth = y.flatten() == torch.arange(1, classes, device=z.device)[:, None]
        else:
            p = z.sigmoid().reshape(z.shape[0], -1)
            truth = y.reshape(p.shape) == 1
        both = torch.where(truth, p, 0).sum(1)
        dice = (2 * both + 1e-5) / (p.sum(1) + truth.sum(1) + 1e-5)
        return dice.mean() - 1

    return score


@reducer(output="any")
def uncertainty(model: Model, *, exclusive: bool = True) -> Score:
    r"""Average the entropy of the predicted probabilities: where does doubt come from?

    .. math:: F(x) = -\frac1{|S|} \sum_v \sum_k p_{k,v} \log p_{k,v}

    In nats. Independent labels add the entropies of yes and no of each channel. It is what the model
    *reports*, not whether it is calibrated.

    Args:
        model: ``(C, *S) -> (K, *S)`` or ``-> (K,)``.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> score = eg.reducers.uncertainty(lambda x: torch.cat([x, x, x, x]))
        >>> round(score(torch.zeros(1, 5, dtype=torch.float64)).exp().item(), 12)
        4.0
    """
    here = "uncertainty"

    def score(x: Tensor) -> Tensor:
        z = _output(here, model, x, "any")
        # The logarithm from the logits stays finite where p is rounded to 0, and so does its derivative.
        if _softmaxed(z, exclusive):
            log_p = z.log_softmax(0)
            return -(log_p.exp() * log_p).sum(0).mean()
        yes, no = logsigmoid(z), logsigmoid(-z)
        return -(yes.exp() * yes + no.exp() * no).sum(0).mean()

    return score


@reducer(differentiable=False, example={"target": 1})
def predicted_count(model: Model, target: Whole, *, exclusive: bool = True) -> Score:
    r"""Count the voxels that are predicted as a class: for methods that need only values.

    .. math:: F(x) = |\{v : \hat y_v = c\}|

    A whole number, constant but for jumps where a voxel changes class: its gradient is 0 wherever it exists.
    Gradient methods refuse it; occlusion and other perturbations can use it. The original system returned it
    as :math:`\sum_v \frac{z_v}{z_v} 1[z_v > t]`, through which automatic differentiation runs without
    complaint and yields zeros, or rounding noise that looks like a map. :func:`soft_count` is the count that
    has a gradient.

    Args:
        model: ``(C, *S) -> (K, *S)``.
        target: class number.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``, in the dtype of the output.

    Example:
        >>> import esegeta as eg
        >>> score = eg.reducers.predicted_count(lambda x: x, 1)
        >>> x = torch.tensor([[-1., 2., 0., 7.]])
        >>> score(x).item(), torch.func.grad(score)(x).tolist()
        (2.0, [[0.0, 0.0, 0.0, 0.0]])

    Reference: S. Chatterjee et al., "TorchEsegeta", 2022, equation 16.
    """
    here = "predicted_count"
    target = _target(here, target)

    def score(x: Tensor) -> Tensor:
        z = _output(here, model, x)
        return _predicted(here, z.detach(), target, exclusive).sum().to(z.dtype)

    return score


@reducer(mask=True, differentiable=False, example={"target": 1})
def predicted_dice(model: Model, target: Whole, *, at: Tensor, exclusive: bool = True) -> Score:
    r"""Return how much of the prediction at the explained input stays: what curves of metrics follow in segmentation.

    .. math:: F(x) = \frac{2 |P(x) \cap M|}{|P(x)| + |M|}, \qquad P(x) = \{v : \hat y_v = c\}, \quad M = P(x_0)

    1 at the explained input, 0 where none of its object is found. Constant but for jumps where a voxel changes
    class: for methods and metrics that need only values.

    Args:
        model: ``(C, *S) -> (K, *S)``.
        target: class number.
        at: the explained input, whose prediction is the reference.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()`` in [0, 1], in the dtype of the output.

    Example:
        >>> import esegeta as eg
        >>> x = torch.tensor([[-1., 2., 3., -7.]])
        >>> score = eg.reducers.predicted_dice(lambda x: x, 1, at=x)
        >>> score(x).item(), score(x - 2.5).item()
        (1.0, 0.6666666865348816)

    Reference: A. Zijdenbos et al., "Morphometric analysis of white matter lesions in MR images", 1994.
    """
    here = "predicted_dice"
    target = _target(here, target)
    empty = f"class {check.values(target)} is predicted nowhere at x"
    predicted = lambda z: _predicted(here, z.detach(), target, exclusive)
    reference = _frozen(here, model, predicted, at, False, empty)

    def score(x: Tensor) -> Tensor:
        z = _output(here, model, x)
        now, then = predicted(z), reference(z)
        return 2 * (now & then).sum().to(z.dtype) / (now.sum() + then.sum()).to(z.dtype)

    return score


@reducer(mask=True, example={"target": 1, "low": 0.01, "high": 0.99})
def uncertain_band(
    model: Model,
    target: Whole,
    *,
    at: Tensor | None = None,
    low: float | int = 0.1,
    high: float | int = 0.9,
    dynamic: bool = False,
    exclusive: bool = True,
) -> Score:
    r"""Sum the scores of a class where it is neither sure nor excluded: what makes this edge so wide?

    .. math:: F(x) = \sum_{v \in B} z_{c,v}, \qquad B = \{v : l \le p_{c,v} < h\} \text{ at } x_0

    With the thresholds of ``esegeta.uncertainty.conformal`` the band lies between the outer mask, which misses
    little, and the inner mask, which includes little else: ``low=outer.threshold, high=inner.threshold``. Positive
    values of an explanation speak for the class in the band, negative ones against it; the entropy would have no
    gradient where doubt is largest.

    Args:
        model: ``(C, *S) -> (K, *S)``.
        target: class number.
        at: the explained input, where the band is frozen.
        low: the probability from which on a voxel may belong to the class.
        high: that from which on it does.
        dynamic: recompute the band at every evaluation instead.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> x = torch.tensor([[-5., -1., 2., 7.]])
        >>> eg.reducers.uncertain_band(lambda x: x, 1, at=x)(x).item()
        1.0

    Reference: Angelopoulos et al., Conformal risk control, ICLR 2024 (the thresholds).
    """
    here = "uncertain_band"
    target = _target(here, target)
    ends = [check.non_negative(here, name, value) for name, value in (("low", low), ("high", high))]
    if not ends[0] < ends[1]:
        got = f"low = {low!r} and high = {high!r}"
        advice = "An outer mask that lies within the inner one leaves no band"
        raise check.refused(here, "low < high", got, advice)

    def band(z: Tensor) -> Tensor:
        p = _probability(here, z, target, exclusive)
        return (p >= ends[0]) & (p < ends[1])

    empty = f"no voxel has a probability from {low:g} to {high:g} of class {check.values(target)} at x"
    return _summed(here, model, target, exclusive, _frozen(here, model, band, at, dynamic, empty))


def difference(
    model: Model,
    other: Model,
    target: Whole,
    *,
    at: Tensor | None = None,
    mask: Tensor | None = None,
    exclusive: bool = True,
) -> Score:
    r"""Sum how much more one model speaks for a class than another: where do two folds or versions disagree, and why?

    .. math:: F(x) = \sum_{v \in M} \big(z^a_{c,v} - z^b_{c,v}\big), \qquad
        M = \{v : \hat y^a_v = c \ne \hat y^b_v \text{ or } \hat y^b_v = c \ne \hat y^a_v\} \text{ at } x_0

    The score is a difference of two scores on one mask, so an explanation of a method that is linear in the score
    (``"linearity" in esegeta.find_method(name).axioms``) is exactly the difference of the two models' explanations.
    Others explain the difference by rules of their own. A configuration has one model and cannot ask for it.

    Args:
        model: ``(C, *S) -> (K, *S)``.
        other: likewise.
        target: class number.
        at: the explained input, where the mask is frozen: voxels that only one of them predicts as the class.
        mask: boolean ``(*S)``, a mask of your own that replaces it.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> x = torch.tensor([[-1., 2., 3.]])
        >>> score = eg.reducers.difference(lambda x: x, lambda x: 2 * x - 5, 1, at=x)
        >>> score(x).item(), torch.func.grad(score)(x).tolist()
        (3.0, [[0.0, -1.0, 0.0]])
    """
    here = "difference"
    target = _target(here, target)
    check.model(here, model), check.model(here, other)
    if (at is None) == (mask is None):
        got, advice = "both" if at is not None else "neither", "at=x takes the voxels where they disagree"
        raise check.refused(here, "either at= or mask=", got, advice)
    if at is not None:
        found = [_output_at(here, one, at, False, "map") for one in (model, other)]
        one, two = (_predicted(here, z, target, exclusive) for z in found if z is not None)
        if one.shape != two.shape:
            got, advice = f"{tuple(one.shape)} and {tuple(two.shape)}", "Resample one of them"
            raise check.refused(here, "two models with answers on one grid", got, advice)
        mask = one != two
    assert mask is not None
    inside = _given(here, mask, "the models predict the same voxels at x")

    def score(x: Tensor) -> Tensor:
        a, b = _output(here, model, x), _output(here, other, x)
        own = _logit(here, a, target, exclusive) - _logit(here, b, target, exclusive)
        return _sum(own, inside(a))

    return named(score, f"difference(model, other, {check.values(target)})")


# --- Classification ---------------------------------------------------------------------------------------


@reducer(output="vector", example={"target": 1})
def logit(model: Model, target: Whole, *, exclusive: bool = True) -> Score:
    r"""Read the score of a class before softmax: the usual choice for classification.

    .. math:: F(x) = z_c

    Args:
        model: ``(C, *S) -> (K,)``.
        target: class number.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> eg.reducers.logit(lambda x: x ** 2, 1)(torch.tensor([2., 3.])).item()
        9.0
    """
    here = "logit"
    target = _target(here, target)
    return lambda x: _logit(here, _output(here, model, x, "vector"), target, exclusive)


@reducer(output="vector", example={"target": 1})
def probability(model: Model, target: Whole, *, exclusive: bool = True) -> Score:
    r"""Read the probability of a class.

    .. math:: F(x) = p_c

    It saturates: its gradient vanishes where the model is sure, and evidence against another class counts as
    evidence for this one.

    Args:
        model: ``(C, *S) -> (K,)``.
        target: class number.
        exclusive: False where channels are independent labels.

    Returns:
        Score ``(C, *S) -> ()``.

    Example:
        >>> import esegeta as eg
        >>> eg.reducers.probability(lambda x: x, 1)(torch.zeros(4)).item()
        0.25
    """
    here = "probability"
    target = _target(here, target)
    return lambda x: _probability(here, _output(here, model, x, "vector"), target, exclusive)
