r"""Concepts: directions in the activations of a layer, whether a score depends on them, and where.

A concept is a set of images that show something (``tcav``), a part that activations are made of (``factorise``), or
some channels of a layer (``relevance``). Activations are (K,\*U), directions (K,): the same at every voxel.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esegeta import random
from esegeta._facts import carry, named
from esegeta._registry import find_method
from esegeta._types import Explain, Method, Model, Score
from esegeta.engine import check
from esegeta.engine.gradient import name_of
from esegeta.features import channels as of_channels
from esegeta.methods.sobol import sobol_attribution
from esegeta.placing import activation_and_gradient, replace, tap

__all__ = [
    "Examples",
    "Factors",
    "Tcav",
    "cav",
    "coefficients",
    "examples",
    "factorise",
    "importance",
    "logistic",
    "pooled",
    "pooled_gradient",
    "relevance",
    "ridge",
    "tcav",
    "tcav_score",
    "through",
]

Fit = Callable[[Tensor, Tensor], Tensor]
NULLS = ("labels", "subsets", "kim2018")


# ------------------------------------------------------------------ from volumes to vectors


def pooled(model: Model, place: str) -> Callable[[Tensor], Tensor]:
    r"""Return the mean of each channel of a place over its grid: what a set of images is compared by.

    Args:
        model: a model or a score.
        place: of the layer.

    Returns:
        ``x -> (K,)``, without a graph.

    Example:
        >>> import esegeta as eg
        >>> pooled(lambda x: eg.mark(2 * x, "double"), "double")(torch.tensor([[1., 3.]])).tolist()
        [4.0]
    """
    look = tap(model, place)

    def means(x: Tensor) -> Tensor:
        with torch.no_grad():
            return _grid("pooled", look(x)).flatten(1).mean(1)

    return means


def pooled_gradient(score: Score, place: str) -> Callable[[Tensor], Tensor]:
    r"""Return the derivative of a score along each channel of a place, moved at all of its voxels alike.

    .. math:: g_k = \sum_u \frac{\partial F}{\partial A_{k,u}}

    so that :math:`g \cdot v` is the derivative along a direction v that is the same at every voxel.

    Args:
        score: the score; with a mask that is frozen at an image, each image has its own.
        place: of the layer.

    Returns:
        ``x -> (K,)``.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "double") ** 2).sum()
        >>> pooled_gradient(score, "double")(torch.tensor([[1., 3.]])).tolist()
        [16.0]
    """
    both = activation_and_gradient(score, place)
    return lambda x: _grid("pooled_gradient", both(x)[1]).flatten(1).sum(1)


def _grid(where: str, a: Any) -> Tensor:
    if not isinstance(a, Tensor) or not a.is_floating_point() or a.ndim < 1:
        raise check.refused(where, "activations (K,*U)", check.describe(a), "Choose another place")
    return a[:, None] if a.ndim == 1 else a


# ------------------------------------------------------------------ concept activation vectors


def ridge(penalty: float = 0.01) -> Fit:
    r"""Fit directions by ridge regression on the labels, in closed form.

    .. math:: v = \left( X^\top X + \lambda \tfrac{\operatorname{tr} X^\top X}{D} I \right)^{-1} X^\top y

    with X and y centred. For a penalty of nearly zero it is the direction of linear discriminant analysis, for a very
    large one the difference of means. One factorisation serves any number of labellings.

    Args:
        penalty: :math:`\lambda`, relative to the mean variance of a channel, so it has no unit.

    Returns:
        ``(X (n,D), y (..., n) of zeros and ones) -> (..., D)``, from zeros to ones; longer where these are further
        apart.

    Example:
        >>> x = torch.tensor([[0., 0.], [2., 0.], [0., 1.], [2., 1.]])
        >>> [round(v, 2) for v in ridge(0.0)(x, torch.tensor([0, 0, 1, 1])).tolist()]
        [0.0, 1.0]
    """
    weight = check.non_negative("ridge", "penalty", penalty)

    def fit(x: Tensor, y: Tensor) -> Tensor:
        centred, gram, scale = _centred(x)
        labels = y.double() - y.double().mean(-1, keepdim=True)
        tiny = torch.finfo(torch.float64).eps * len(gram)
        regular = gram + max(weight, tiny) * scale * torch.eye(
            len(gram), dtype=gram.dtype, device=gram.device
        )
        return _solved(torch.linalg.cholesky(regular), labels @ centred).to(x.dtype)

    return fit


def logistic(penalty: float = 0.01, steps: int = 300) -> Fit:
    r"""Fit directions by penalised logistic regression, the classifier that TCAV is usually given with.

    .. math:: \min_{w, b} \frac{1}{n} \sum_i \log\left(1 + e^{-s_i (w \cdot x_i + b)}\right)
              + \frac{\lambda}{2} \|w\|^2

    on centred values over their mean deviation, by steps on the bound of Boehning and Lindsay, which never go up and
    have one factorisation for any number of labellings.

    Args:
        penalty: :math:`\lambda`; without one, sets that can be separated have no optimum.
        steps: how many.

    Returns:
        ``(X (n,D), y (..., n) of zeros and ones) -> (..., D)``, from zeros to ones; longer where these are further
        apart.

    Example:
        >>> x = torch.tensor([[0., 0.], [2., 0.], [0., 1.], [2., 1.]])
        >>> [v > 0.1 for v in logistic()(x, torch.tensor([0, 0, 1, 1])).tolist()]
        [False, True]

    Reference: Kim et al., TCAV, ICML 2018; Boehning and Lindsay, Annals of the Institute of Statistical Mathematics
    40, 1988.
    """
    weight = check.non_negative("logistic", "penalty", penalty)
    count = check.positive_count("logistic", "steps", steps)

    def fit(x: Tensor, y: Tensor) -> Tensor:
        centred, _, scale = _centred(x)
        n = len(x)
        wide = torch.cat([centred / (scale / n).sqrt(), torch.ones_like(centred[:, :1])], 1)
        own = torch.full(
            (wide.shape[1],), max(weight, 1e-9), dtype=wide.dtype, device=x.device
        )  # of a singular X
        own[-1] = 0
        bound = wide.T @ wide / (4 * n) + torch.diag(own)
        factor, labels = torch.linalg.cholesky(bound), y.double()
        w = torch.zeros(*y.shape[:-1], wide.shape[1], dtype=wide.dtype, device=x.device)
        for _ in range(count):
            slope = (torch.sigmoid(w @ wide.T) - labels) @ wide / n + own * w
            w = w - _solved(factor, slope)
        return w[..., :-1].to(x.dtype)

    return fit


def _centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred rows, their products, and the mean variance of a column, times the number of rows."""
    centred = x.double() - x.double().mean(0)
    gram = centred.T @ centred
    scale = gram.diagonal().mean()
    if not float(scale) > 1e-20 * float(x.double().square().mean()):
        advice = "Choose another place, or look at the images"
        raise check.refused("cav", "activations that differ between images", "equal ones", advice)
    return centred, gram, scale


def _solved(factor: Tensor, rows: Tensor) -> Tensor:
    """The rows times the inverse of what has this Cholesky factor."""
    return torch.cholesky_solve(rows.reshape(-1, len(factor)).T, factor).T.reshape(rows.shape)


def _unit(v: Tensor) -> Tensor:
    largest = v.abs().amax(
        -1, keepdim=True
    )  # squares of very small and large weights leave the range of numbers
    v = v / torch.where(largest > 0, largest, 1.0)
    size = v.norm(dim=-1, keepdim=True)
    return v / torch.where(size > 0, size, 1.0)


def _checked(where: str, fit: Fit | None) -> Fit:
    """Refuse weights that are not finite: no share is as far from 1/2 as NaN, so p would be 0."""
    fitted = fit or ridge()

    def finite(x: Tensor, y: Tensor) -> Tensor:
        advice = "Scale the activations, or take another fit"
        return check.finite(where, "weights of fit", fitted(x, y), advice)

    return finite


def _set(where: str, name: str, value: object, least: int, like: Tensor | None = None) -> Tensor:
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) for v in value):
        value = torch.stack(list(value))
    given = check.floating(where, name, value)
    if given.ndim != 2 or len(given) < least or (like is not None and given.shape[1] != like.shape[1]):
        wide = "D" if like is None else str(like.shape[1])
        advice = "Stack what concepts.pooled(model, place)(x) gives, a row for each image"
        raise check.refused(
            where, f"{name} of shape (n, {wide}) with n >= {least}", check.describe(given), advice
        )
    return check.finite(where, name, given, "Look for NaN in the images")


def cav(concept: Tensor, others: Tensor, *, fit: Fit | None = None) -> Tensor:
    r"""Return the concept activation vector: the normal of a plane between a concept's activations and others.

    Args:
        concept: (n, D), a row for each image that shows the concept, from ``pooled``.
        others: (m, D), of images that were chosen at random.
        fit: ``ridge()``, the default, or ``logistic()``.

    Returns:
        (D,), of length 1, pointing to the concept.

    Example:
        >>> cav(torch.tensor([[2., 1.], [2., 0.]]), torch.tensor([[0., 1.], [0., 0.]])).abs().round().tolist()
        [1.0, 0.0]

    Reference: Kim et al., Interpretability beyond feature attribution, ICML 2018.
    """
    mine = _set("cav", "concept", concept, 2)
    rest = _set("cav", "others", others, 2, mine)
    y = torch.cat([torch.ones(len(mine)), torch.zeros(len(rest))]).to(mine.device)
    return _unit(_checked("cav", fit)(torch.cat([mine, rest]), y))


def tcav_score(gradients: Tensor, direction: Tensor) -> Tensor:
    r"""Return the share of images whose score grows along a direction.

    .. math:: \frac{1}{n} \left| \{ i : g_i \cdot v > 0 \} \right|

    Args:
        gradients: (n, D), a row for each image, from ``pooled_gradient``.
        direction: (..., D).

    Returns:
        (...).

    Example:
        >>> tcav_score(torch.tensor([[1., 0.], [-1., 0.], [2., 5.]]), torch.tensor([1., 0.])).item()
        0.6666666666666666
    """
    return (direction.double() @ gradients.double().T > 0).double().mean(-1)


class Tcav(NamedTuple):
    """What ``tcav`` found.

    value: the share of images whose score grows along the concept, 1/2 where it does not matter; derivative: the
    mean derivative along it; p: that a concept without meaning has a share as far from 1/2, two-sided; direction:
    (D,), the vector of all of the concept's images; null: how p was found; drawn: the shares under it;
    anticonservative: whether p is too small by construction, so that it proves nothing.
    """

    value: float
    derivative: float
    p: float
    direction: Tensor
    null: str
    drawn: Tensor
    anticonservative: bool

    def __str__(self) -> str:
        warned = " (anticonservative: it rejects true nulls far too often)" if self.anticonservative else ""
        return f"TCAV {self.value:.3f}, p = {self.p:.3g} by {self.null}{warned}"


def tcav(
    fit: Fit | None = None, *, null: str = "labels", permutations: int = 1000, sets: int = 10
) -> Callable[..., Tcav]:
    r"""Test whether scores grow along a concept: the share of images, and a p-value that holds its level.

    The null hypothesis is that the layer has nothing of the concept: its images are like those chosen at random.

    - "labels": which images are the concept's is drawn again, and the direction fitted again. Exact at any size.
    - "subsets": the concept and the random images are divided into disjoint sets, each pair of sets has its own
      direction, and their shares are compared with those of pairs of random sets by exchanging the two groups.
      Exact as well; it also shows how much the share varies with the images of the concept.
    - "kim2018": all images of the concept against each of several random sets, and a t-test, as in the paper. All
      these directions share the images of the concept, so they are no independent sample, and more sets make it
      worse: of true null hypotheses it rejected 20 % with 10 sets, 42 % with 30 and 63 % with 100 at a level of
      5 %. Only to reproduce what others have published.

    Equal shares are told apart by the mean derivative along the fitted weights, so the test also works where all
    images have one gradient, as below a linear head.

    Args:
        fit: ``ridge()``, the default, or ``logistic()``.
        null: "labels", "subsets" or "kim2018".
        permutations: how many labellings, or exchanges of groups.
        sets: how many disjoint sets; of the random images "subsets" takes three times as many.

    Returns:
        ``(gradients (n, D), concept (m, D), others (k, D), *, key=0) -> Tcav``.

    Example:
        >>> others = random.normal(1, (40, 3))
        >>> concept = random.normal(2, (40, 3)) + torch.tensor([2.0, 0.0, 0.0])
        >>> uses = torch.tensor([[1.0, 0.1, 0.0]]).expand(10, 3)  # a score that grows with the first channel
        >>> found = tcav(permutations=200)(uses, concept, others)
        >>> found.value, found.p < 0.01
        (1.0, True)

    Reference: Kim, Wattenberg, Gilmer, Cai, Wexler, Viegas, Sayres, ICML 2018.
    """
    check.one_of("tcav", "null", null, NULLS)
    count = check.positive_count("tcav", "permutations", permutations)
    many = check.positive_count("tcav", "sets", sets, 2)
    fitted = _checked("tcav", fit)

    def tested(gradients: Tensor, concept: Tensor, others: Tensor, *, key: int | Tensor = 0) -> Tcav:
        g = _set("tcav", "gradients", gradients, 1)
        mine, rest = _set("tcav", "concept", concept, 2, g), _set("tcav", "others", others, 2, g)
        check.key("tcav", key)
        direction = cav(mine, rest, fit=fitted)
        if null == "labels":
            p, drawn = _by_labels(fitted, g, mine, rest, count, key)
        else:
            p, drawn = _by_sets(fitted, g, mine, rest, null, many, count, key)
        value, derivative = float(tcav_score(g, direction)), float((g @ direction.to(g.dtype)).mean())
        return Tcav(value, derivative, p, direction, null, drawn, null == "kim2018")

    return tested


def _fine(g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Shares less 1/2, and the same with ties broken by the mean derivative, which moves none past another."""
    share = tcav_score(g, v) - 0.5
    mean = v.double() @ g.double().mean(0)
    size = mean.abs().max()
    return share, share + 0.4 / len(g) * mean / torch.where(size > 0, size, 1.0)


def _by_labels(fit: Fit, g: Tensor, mine: Tensor, rest: Tensor, count: int, key: Any) -> tuple[float, Tensor]:
    n = len(mine) + len(rest)
    labels = _exchanged(torch.arange(n, device=mine.device) < len(mine), count, key)
    share, fine = _fine(g, fit(torch.cat([mine, rest]), labels))
    size = fine.abs()
    return float((size >= size[0] - 1e-12).double().mean()), share[1:] + 0.5


def _exchanged(own: Tensor, count: int, key: Any) -> Tensor:
    """Who belongs to a group, and the same in ``count`` random orders: (count + 1, n)."""
    orders = random.bits(key, (count, len(own)), device=own.device).sort(dim=1, stable=True).indices
    return torch.cat([own[None], own[orders]]).double()


def _parts(where: str, name: str, x: Tensor, many: int, key: Any) -> Tensor:
    """Disjoint parts of a set, of one size: (many, size, D)."""
    size = len(x) // many
    if size < 2:
        got, advice = str(len(x)), "Take fewer sets, more images, or null='labels'"
        raise check.refused(
            where, f"{name}: at least {2 * many} images for {many} disjoint sets", got, advice
        )
    order = random.permutation(key, len(x))[: size * many].to(x.device)
    return x[order].reshape(many, size, -1)


def _by_sets(
    fit: Fit, g: Tensor, mine: Tensor, rest: Tensor, null: str, many: int, count: int, key: Any
) -> tuple[float, Tensor]:
    def pair(one: Tensor, other: Tensor) -> Tensor:
        y = (torch.arange(len(one) + len(other), device=g.device) < len(one)).double()
        return fit(torch.cat([one, other]), y)

    if null == "kim2018":
        from scipy.stats import ttest_ind

        of_others = _parts("tcav", "others", rest, many, key)
        tested = torch.stack([pair(mine, one) for one in of_others])
        controls = torch.stack([pair(one, of_others[i - 1]) for i, one in enumerate(of_others)])
        shares = tcav_score(g, tested), tcav_score(g, controls)
        if all(bool((s == shares[0][0]).all()) for s in shares):
            return 1.0, shares[1]
        return float(ttest_ind(*(s.cpu().numpy() for s in shares), equal_var=False).pvalue), shares[1]
    of_mine = _parts("tcav", "concept", mine, many, random.fold_in(key, 1))
    of_others = _parts("tcav", "others", rest, 3 * many, random.fold_in(key, 2))
    size = min(of_mine.shape[1], of_others.shape[1])  # a larger set is fitted better
    of_mine, of_others = of_mine[:, :size], of_others[:, :size]
    v = [pair(of_mine[i], of_others[i]) for i in range(many)]
    v += [pair(of_others[many + i], of_others[2 * many + i]) for i in range(many)]
    share, fine = _fine(g, torch.stack(v))
    groups = _exchanged(torch.arange(2 * many, device=g.device) < many, count, random.fold_in(key, 3))
    size_of = (groups @ fine).abs()
    return float((size_of >= size_of[0] - 1e-12).double().mean()), share[many:] + 0.5


# ------------------------------------------------------------------ what activations are made of


class Factors(NamedTuple):
    """Parts that activations are made of.

    directions: (r, K), each of length 1; error: the norm of what they leave, as a share of the activations.
    """

    directions: Tensor
    error: float


def factorise(
    activations: Iterable[Tensor], *, rank: int, steps: int = 200, voxels: int = 4096, key: int | Tensor = 0
) -> Factors:
    r"""Divide activations into parts that add up: non-negative factorisation over the voxels of many images.

    .. math:: \min_{W, H \ge 0} \|A - W H\|_F, \qquad A: (\text{voxels}, K)

    by multiplicative steps, which never go up, from a random start: a local optimum, the same for the same key.

    Args:
        activations: (K,\*U) of each image, not negative, as after a ReLU; of ``eg.tap(model, place)(x)``.
        rank: how many parts.
        steps: how many.
        voxels: that are drawn from each image at most, so memory is bounded.
        key: of the draws.

    Returns:
        Directions in the space of channels, those with most of the activations first.

    Example:
        >>> a = torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 1.0]])
        >>> found = factorise([a], rank=2)
        >>> [[round(v, 2) for v in row] for row in found.directions.tolist()], round(found.error, 3)
        ([[0.71, 0.71, 0.0], [0.0, 0.0, 1.0]], 0.0)

    Reference: Lee and Seung, Nature 401, 1999; for concepts: Fel et al., CRAFT, CVPR 2023.
    """
    count = check.positive_count("factorise", "rank", rank)
    check.positive_count("factorise", "steps", steps)
    check.positive_count("factorise", "voxels", voxels)
    rows = []
    for i, a in enumerate(activations):
        flat = _positive("factorise", a).flatten(1).T
        if len(flat) > voxels:
            flat = flat[random.permutation(random.fold_in(key, i), len(flat))[:voxels].to(flat.device)]
        rows.append(flat.double())
    if not rows:
        raise check.refused("factorise", "activations of one image or more", "none", "Pass a list of them")
    a = torch.cat(rows)
    size = a.norm()
    if not float(size) > 0:
        advice = "Choose another place"
        raise check.refused("factorise", "activations that are not all zero", "zeros", advice)
    if count > min(a.shape):
        got, advice = str(count), "Take fewer parts"
        raise check.refused("factorise", f"rank at most {min(a.shape)}", got, advice)
    start = random.fold_in(key, -1)
    scale = (a.mean() / count).sqrt()
    w = scale * (
        0.1 + random.uniform(random.fold_in(start, 0), (len(a), count), dtype=a.dtype, device=a.device)
    )
    h = scale * (
        0.1 + random.uniform(random.fold_in(start, 1), (count, a.shape[1]), dtype=a.dtype, device=a.device)
    )
    for _ in range(steps):
        h = h * (w.T @ a) / (w.T @ w @ h).clamp(min=1e-30)
        w = w * (a @ h.T) / (w @ (h @ h.T)).clamp(min=1e-30)
    error = float((a - w @ h).norm() / size)
    length = h.norm(dim=1)
    order = ((w.sum(0)) * length).sort(descending=True, stable=True).indices
    directions = h[order] / length[order, None].clamp(min=1e-30)
    return Factors(directions.float(), error)


def _positive(where: str, a: object) -> Tensor:
    given = check.finite(
        where, "activations", _grid(where, check.tensor(where, "activations", a)), "Mend them"
    )
    if bool((given < 0).any()):
        advice = "Choose a place after a ReLU, or pass activations.clamp(min=0)"
        raise check.refused(
            where, "activations that are not negative", f"a minimum of {given.min():.3g}", advice
        )
    return given


def coefficients(directions: Tensor, *, steps: int = 200) -> Callable[[Tensor], Tensor]:
    r"""Return how much of each part is in the activations at each voxel: non-negative least squares.

    .. math:: \min_{w_u \ge 0} \|A_u - H^\top w_u\|

    Args:
        directions: (r, K), from ``factorise``.
        steps: of the multiplicative iteration.

    Returns:
        ``(K,*U) -> (r,*U)``: a map for each part.

    Example:
        >>> coefficients(torch.eye(2))(torch.tensor([[1., 4.], [2., 0.]])).round(decimals=3).tolist()
        [[1.0, 4.0], [2.0, 0.0]]
    """
    h = check.floating("coefficients", "directions", directions).double()
    if h.ndim != 2 or bool((h < 0).any()):
        advice = "Pass those of concepts.factorise"
        raise check.refused("coefficients", "directions (r, K) >= 0", check.describe(directions), advice)
    check.positive_count("coefficients", "steps", steps)
    square = h @ h.T

    def solve(a: Tensor) -> Tensor:
        flat = _positive("coefficients", a).flatten(1).double()
        if len(flat) != h.shape[1]:
            got, advice = check.describe(a), "Take the place that the directions are from"
            raise check.refused("coefficients", f"activations of {h.shape[1]} channels", got, advice)
        onto = h.to(a.device) @ flat
        w = onto.clone()
        for _ in range(steps):
            w = w * onto / (square.to(a.device) @ w).clamp(min=1e-30)
        return w.reshape(len(h), *a.shape[1:]).to(a.dtype)

    return solve


def importance(score: Score, place: str, *, directions: Tensor, samples: int = 32) -> Callable[..., Tensor]:
    r"""Return the share of each part in the variance of a score as parts fade at random: total Sobol indices.

    The activations at the place are :math:`H^\top W + R`; every part's map in W is multiplied by a random number in
    [0, 1], and the rest R stays, so that the score with all parts is that of the image.

    Args:
        score: the score.
        place: of the layer.
        directions: (r, K), from ``factorise``.
        samples: points of the Sobol sequence; each takes r + 1 runs of the score.

    Returns:
        ``(x, key=) -> (r,)``.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (torch.tensor([2.0, 1.0]) * eg.mark(x, "z").sum(1)).sum()
        >>> found = importance(score, "z", directions=torch.eye(2), samples=256)(torch.ones(2, 3), key=0)
        >>> [round(v, 2) for v in found.tolist()]
        [0.8, 0.2]

    Reference: Fel et al., CRAFT, CVPR 2023; Sobol 1993.
    """
    check.score("importance", score)
    look, put, solve = tap(score, place), replace(score, place), coefficients(directions)

    def shares(x: Tensor, *, key: int | Tensor) -> Tensor:
        with torch.no_grad():
            a = look(x)
            w = solve(a)
            h = directions.to(a)
            rest = a - _combined(h, w)
            inside = named(lambda v: put(x, _combined(h, v) + rest), name_of(score))
            with check.calling("importance", ["sobol_attribution"]):
                found = sobol_attribution(inside, features=of_channels(), samples=samples)
                return found(w, torch.zeros_like(w), key=key).flatten(1)[:, 0]

    return shares


def _combined(h: Tensor, w: Tensor) -> Tensor:
    return torch.tensordot(h, w, dims=([0], [0]))


# ------------------------------------------------------------------ relevance of concepts


def through(
    score: Score, place: str, *, channels: Sequence[int] | None = None, directions: Tensor | None = None
) -> Score:
    r"""Return the same score whose derivative goes through some channels or directions of a place alone.

    .. math:: \tilde F(x) = F\left( \bar x \mid A := P A(x) + \overline{(I - P) A(x)} \right)

    where a bar stops derivatives, and P keeps the channels or projects onto the directions at every voxel. Values are
    those of F. Any gradient method, and any rule, explains by what passes there: maps of all channels add up to
    that of the score if the place is a cut and the method is linear in the gradient.

    Args:
        score: the score.
        place: of the layer.
        channels: their numbers.
        directions: (r, K) or (K,), whose span is kept.

    Returns:
        A score.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: (eg.mark(torch.cat([2 * x, 5 * x]), "both")).sum()
        >>> x = torch.ones(1, 2)
        >>> [eg.gradient(through(score, "both", channels=[k]))(x).tolist() for k in (0, 1)]
        [[[2.0, 2.0]], [[5.0, 5.0]]]

    Reference: Achtibat et al., From attribution maps to human-understandable explanations through concept relevance
    propagation, Nature Machine Intelligence 5, 2023.
    """
    check.score("through", score)
    if (channels is None) == (directions is None):
        got = "both" if channels is not None else "neither"
        raise check.refused("through", "channels= or directions=", got, "Give one of them")
    look, put = tap(score, place), replace(score, place)
    plane = None if directions is None else _span(directions)

    def restricted(x: Tensor) -> Tensor:
        a = look(x)
        if plane is None:
            kept = _mask(channels, a) * a
        else:
            if plane.shape[0] != a.shape[0]:
                got, advice = f"{plane.shape[0]}", "Take directions of this place"
                raise check.refused("through", f"directions with {a.shape[0]} channels", got, advice)
            kept = torch.tensordot(plane.to(a), a, dims=([1], [0]))
        return put(x.detach(), kept + (a - kept).detach())

    about = f"channels {list(channels)}" if channels is not None else "some directions"
    return named(carry(restricted, score, partial=True), f"{name_of(score)} through {about} of {place}")


def _mask(channels: Sequence[int] | None, a: Tensor) -> Tensor:
    chosen = list(channels or ())
    if not chosen or any(
        isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < len(a) for k in chosen
    ):
        advice = "Name one or more"
        raise check.refused("through", f"channels from 0 to {len(a) - 1}", repr(chosen), advice)
    keep = torch.zeros(len(a), dtype=a.dtype, device=a.device)
    keep[chosen] = 1
    return keep.reshape(-1, *[1] * (a.ndim - 1))


def _span(directions: Tensor) -> Tensor:
    """The projection onto the span of some directions, (K, K)."""
    given = check.floating("through", "directions", directions)
    rows = given[None] if given.ndim == 1 else given
    if rows.ndim != 2 or not bool((rows.norm(dim=1) > 0).all()):
        raise check.refused(
            "through", "directions (r, K) that are not zero", check.describe(given), "Change them"
        )
    rows = rows.double()
    return torch.linalg.pinv(rows) @ rows


def relevance(
    method: Method | str,
    place: str,
    *,
    channels: Sequence[int] | None = None,
    directions: Tensor | None = None,
) -> Method:
    r"""Return a method that explains by what passes through some channels or directions of a place.

    ``relevance("lrp", place, channels=[3])(score)`` is concept relevance propagation. Like ``eg.at``, it is a
    composition: the method explains ``through(score, place, ...)``.

    Args:
        method: ``Score -> Explain``, or the name of one that differentiates.
        place: of the layer.
        channels: their numbers.
        directions: (r, K), such as those of ``factorise`` or a ``cav``.

    Returns:
        ``Score -> Explain``, with the settings of the method.

    Example:
        >>> import esegeta as eg
        >>> score = lambda x: eg.mark(torch.cat([2 * x, 5 * x]), "both").sum()
        >>> relevance("input_x_gradient", "both", channels=[1])(score)(torch.tensor([[1.0, 3.0]])).tolist()
        [[5.0, 15.0]]
    """
    chosen = find_method(method).fn if isinstance(method, str) else method
    check.function("relevance", "a method or the name of one", chosen, "Pass 'lrp'")

    def restricted(score: Score, **static: Any) -> Explain:
        return chosen(through(score, place, channels=channels, directions=directions), **static)

    return named(restricted, f"{name_of(chosen)} through {place}")


class Examples(NamedTuple):
    """Images in which channels matter most, a row for each channel, the largest first.

    images: (K, n), numbers of images; values: (K, n); voxels: (K, n, axes), where in the layer.
    """

    images: Tensor
    values: Tensor
    voxels: Tensor


def examples(look: Callable[[Tensor], Tensor], *, count: int = 5) -> Callable[[Iterable[Tensor]], Examples]:
    r"""Return the images in which each channel of a place has its largest values.

    With ``look = eg.at("input_x_gradient", place)(score)`` or another explanation of the layer these are the images
    in which the channel is most *relevant* to the score (RelMax); with ``eg.tap(model, place)`` those in which it is
    most active. What is on in many images need not matter in any.

    Args:
        look: ``x -> (K,*U)``.
        count: how many for each channel.

    Returns:
        ``images -> Examples``; images are read one by one.

    Example:
        >>> images = [torch.tensor([[0., 2.]]), torch.tensor([[5., 0.]]), torch.tensor([[1., 1.]])]
        >>> found = examples(lambda x: torch.cat([x, -x]), count=2)(images)
        >>> found.images.tolist(), found.values[0].tolist(), found.voxels[0].tolist()
        ([[1, 0], [0, 1]], [5.0, 2.0], [[0], [1]])

    Reference: Achtibat et al., Nature Machine Intelligence 5, 2023.
    """
    check.runs("examples", look)
    most = check.positive_count("examples", "count", count)

    def best(images: Iterable[Tensor]) -> Examples:
        values, places = [], []
        for x in images:
            a = _grid("examples", look(x).detach())
            value, at = a.flatten(1).max(1)
            values.append(value.cpu())
            index = torch.stack(torch.unravel_index(at, a.shape[1:]), 1)
            places.append(index.cpu())
        if not values:
            raise check.refused("examples", "one image or more", "none", "Pass a list of them")
        table = torch.stack(values, 1)
        order = table.sort(dim=1, descending=True, stable=True).indices[:, :most]
        where = torch.stack(places, 1)
        rows = order[..., None].expand(-1, -1, where.shape[-1])
        return Examples(order, table.gather(1, order), where.gather(1, rows))

    return best
