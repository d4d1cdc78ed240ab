"""From a random model to maps of its uncertainty: draws are streamed, never stacked."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from esegeta import random
from esegeta.engine import check, layout, levels, stream
from esegeta.engine.execution import current
from esegeta.engine.network import ModuleModel

Random = Callable[..., Tensor]  # (x, key=) -> output
LINKS = ("sigmoid", "softmax")
USUAL = 30  # draws
# Packed masks are compared in blocks of bytes (65 536 voxels) and of rows, so that memory stays that of a few maps.
_BLOCK, _ROWS = 2**13, 512


class Spread(NamedTuple):
    """How the answers of a random model differ, without a link to probabilities.

    mean and variance: (K,\\*S), of the output, divided by the number of draws. volumes: (T, K), how many voxels each
    draw sees of each class. volume_variation: (K,), standard deviation of the volume over its mean, NaN where no draw
    sees the class. pairwise_dice: (K,), mean over all pairs of draws, of those pairs in which at least one sees the
    class; NaN without such a pair.
    """

    mean: Tensor
    variance: Tensor
    volumes: Tensor
    volume_variation: Tensor
    pairwise_dice: Tensor


class Uncertainty(NamedTuple):
    """How the answers of a random model differ.

    mean and variance: (K,\\*S), of the probabilities. entropy: of the mean, in nats, (K,\\*S) of yes and no for each
    channel of a sigmoid, (1,\\*S) for a softmax. mutual_information: the part of it that comes from the draws'
    disagreement: the entropy of the mean less the mean of the entropies. volumes: (T, K), how many voxels each draw
    sees of each class. volume_variation: (K,), standard deviation of the volume over its mean, NaN where no draw sees
    the class. pairwise_dice: (K,), mean over all pairs of draws, of those pairs in which at least one sees the class;
    NaN without such a pair.
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor
    mutual_information: Tensor
    volumes: Tensor
    volume_variation: Tensor
    pairwise_dice: Tensor


class Ensemble:
    """Several models as one random model: a key chooses a member. Made by ``ensemble``."""

    def __init__(self, members: Sequence[Callable[..., Tensor]]) -> None:
        self.members = tuple(members)

    def __repr__(self) -> str:
        return f"ensemble of {len(self.members)}"

    @property
    def label(self) -> str:
        """Name what its draws are."""
        return f"{len(self.members)} networks"

    def member(self, i: int, x: Tensor, key: random.Key) -> Tensor:
        """Return the answer of one member, with the key if that is random itself."""
        model = self.members[i]
        return model(x, key=key) if is_random(model) else model(x)

    def __call__(self, x: Tensor, *, key: random.Key | None = None) -> Tensor:
        """Return the answer of the member that the key chooses."""
        word = random.fold_in(check.key("ensemble", key), 0)
        if levels.wrapped(word):
            advice = "monte_carlo takes all members; else choose one key for all examples"
            raise check.refused("ensemble", "one key", "a different one for each example", advice)
        i = int(random.integers(word, (), low=0, high=len(self.members)))
        return self.member(i, x, random.fold_in(word, 1))


def is_random(model: Any) -> bool:
    """Return whether a model draws at random: it is one of this package, or has a parameter ``key``."""
    if isinstance(model, ModuleModel):
        return False
    try:
        return "key" in inspect.signature(model).parameters
    except (TypeError, ValueError):
        return False


def ensemble(models: Sequence[Callable[..., Tensor]]) -> Ensemble:
    r"""Make a random model of several: networks of other folds, seeds or versions.

    ``monte_carlo`` takes each member once, the same number of times if more samples are asked for. Members that are
    random themselves, such as ``dropout(module)``, draw by keys of their own.

    Args:
        models: at least two, ``(x) -> (K,*S)`` or random ones.

    Returns:
        Random model ``(x, key=) -> (K,*S)``.

    Example:
        >>> model = ensemble([lambda x: x, lambda x: 3 * x])
        >>> monte_carlo(model)(torch.ones(1, 2), key=0).mean.tolist()
        [[2.0, 2.0]]

    Reference: Lakshminarayanan, Pritzel, Blundell, Simple and scalable predictive uncertainty estimation using deep
        ensembles, NeurIPS 2017.
    """
    if not isinstance(models, Sequence) or len(models) < 2:
        got = f"{len(models)} of them" if isinstance(models, Sequence) else check.describe(models)
        raise check.refused("ensemble", "at least two models", got, "One model has no spread")
    return Ensemble([check.model("ensemble", model) for model in models])


def entropy_of(p: Tensor, link: str) -> Tensor:
    """Return the entropy of probabilities, in nats: of yes and no for each channel, or of classes.

    >>> entropy_of(torch.tensor([[0.5]]), "sigmoid").exp().item()
    2.0
    >>> entropy_of(torch.full((4, 1), 0.25), "softmax").exp().item()
    4.0
    """
    if link == "softmax":
        return torch.special.entr(p).sum(0, keepdim=True)
    return torch.special.entr(p) + torch.special.entr(1 - p)


def monte_carlo(
    model: Random,
    *,
    samples: int | None = None,
    link: str | None = None,
    threshold: float | int | None = None,
) -> Callable[..., Any]:
    r"""Draw answers of a random model and tell how they differ, in the memory of a few draws.

    .. math::

        \bar p = \frac1T \sum_t p_t, \qquad \mathrm{var} = \frac1T \sum_t (p_t - \bar p)^2, \qquad
        I = H[\bar p] - \frac1T \sum_t H[p_t]

    for every class and voxel, after the link, merged without cancellation. With a link there are the entropy
    :math:`H[\bar p]` and the mutual information I too. Every draw is thresholded to a mask: its volume, and the Dice
    of every pair of draws. Those are exact: masks are kept as bits, which takes an eighth of a byte for a voxel and
    a draw (32 draws are as large as one map).

    What comes before the first dropout of a network is computed once. The answer does not depend on how many draws
    go through the network together.

    Args:
        model: ``(x, key=) -> (K,*S)``: ``dropout(module)``, ``augmented(model, ...)``, ``ensemble(models)``, or your
            own.
        samples: how many draws, at least 2; by default 30, and every member of an ensemble once.
        link: from the output to probabilities: "sigmoid" for channels that are independent (or one alone), "softmax"
            for classes that exclude each other; None to take the output as it is.
        threshold: above which a channel is in its mask: by default 0.5 of a sigmoid, 0 without a link and with one
            channel. Several channels of a softmax, and those without a link, belong to the largest; there it is not
            used.

    Returns:
        ``(x, key=) -> Uncertainty``, named tensors; without a link ``Spread``, which has no entropy. After a deadline
        of ``esegeta.execution`` they are of fewer draws, as many as ``volumes`` has rows.

    Example:
        >>> noisy = lambda x, key: x + random.signs(key, x.shape)
        >>> found = monte_carlo(noisy, samples=400)(torch.zeros(1, 3), key=1)
        >>> torch.allclose(found.variance, 1 - found.mean**2)
        True

    Reference: Natekar, Kori, Krishnamurthi, Demystifying brain tumor segmentation networks, Frontiers in
        Computational Neuroscience 2020, section 2.4 (the diagonal of equation 9b); Depeweg et al., ICML 2018.
    """
    here = "monte_carlo"
    check.model(here, model)
    members = len(model.members) if isinstance(model, Ensemble) else 0
    if not members and isinstance(model, ModuleModel):
        advice = (
            "Make one with esegeta.uncertainty.dropout(module), augmented(model, ...) or ensemble(models)"
        )
        raise check.refused_type(here, "a random model (x, key=) -> output", repr(model), advice)
    total = check.positive_count(here, "samples", samples or members or USUAL, least=2)
    if samples is not None:
        check.positive_count(here, "samples", samples, least=2)
    if members and total % members:
        advice = f"Leave samples out to take each once, or pass {members * -(-total // members)}"
        raise check.refused(here, f"a multiple of {members} samples, one for each member", str(total), advice)
    if link is not None:
        check.one_of(here, "link", link, LINKS)

    def estimate(x: Tensor, *, key: random.Key | None = None) -> Spread | Uncertainty:
        x = check.image(here, "x", x)
        word = random.fold_in(check.key(here, key), 0)
        source: Any = model.repeating() if hasattr(model, "repeating") else model

        def draw(i: Tensor) -> Tensor:
            own = random.fold_in(word, i)
            if members:
                assert isinstance(model, Ensemble)
                return model.member(int(i) % members, x, own)
            return source(x, key=own)

        together = not members
        alone = together and _large(x)
        found = stream.fold(
            vmap(draw) if alone else draw,
            torch.arange(total),
            lambda state, z, _: _absorbed(state, z, link, threshold),
            None,
            label=here,
            partial=True,
            together=together,
            chunk=1 if alone else None,
        )
        return _finished(found, link)  # type: ignore[arg-type]

    return estimate


def _large(x: Tensor) -> bool:
    """Whether draws of an image go through one at a time: on a CPU two large volumes are no faster than one."""
    volume = x.ndim == 4 and x.device.type == "cpu"
    free = current().chunk is None and levels.mapped() == 1
    return volume and free and not layout.lonely(x[None])


class _State(NamedTuple):
    """What is kept of the draws so far."""

    draws: int
    mean: Tensor
    squares: Tensor
    entropies: Tensor | None
    volumes: list[Tensor]
    packed: list[Tensor]
    dtype: torch.dtype


def _absorbed(state: _State | None, z: Tensor, link: str | None, threshold: float | int | None) -> _State:
    """Take a few more draws, (n,K,*S)."""
    here = "monte_carlo"
    if not z.is_floating_point() or z.ndim < 2:
        advice = "Draw the logits or probabilities"
        raise check.refused_type(here, "a floating output (K,*S)", check.describe(z[0]), advice)
    if link == "softmax" and z.shape[1] == 1:
        got, advice = "one channel", "Use link='sigmoid': the softmax of one channel is 1 everywhere"
        raise check.refused(here, "several channels for a softmax", got, advice)
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    p = wide if link is None else wide.sigmoid() if link == "sigmoid" else wide.softmax(1)
    own = None
    if link is not None:
        own = sum((entropy_of(one, link) for one in p), torch.zeros(()).to(p))
    masks = _masks(p, link, threshold).reshape(*p.shape[:2], -1)
    new, centre = len(p), p.mean(0)
    volumes, packed = masks.sum(2), _pack(masks)
    squares = (p - centre).square().sum(0)
    if state is None:
        return _State(new, centre, squares, own, [volumes], [packed], z.dtype)
    both, step = state.draws + new, centre - state.mean
    return _State(
        both,
        state.mean + step * (new / both),
        state.squares + squares + step.square() * (state.draws * new / both),
        None if own is None or state.entropies is None else state.entropies + own,
        [*state.volumes, volumes],
        [*state.packed, packed],
        z.dtype,
    )


def _masks(p: Tensor, link: str | None, threshold: float | int | None) -> Tensor:
    """Which voxels each draw sees of each class."""
    if link == "sigmoid" or (link is None and p.shape[1] == 1):
        least = (0.5 if link == "sigmoid" else 0.0) if threshold is None else float(threshold)
        return p > least
    classes = torch.arange(p.shape[1], device=p.device).reshape(-1, *[1] * (p.ndim - 2))
    return p.argmax(1, keepdim=True) == classes


def _pack(masks: Tensor) -> Tensor:
    """Eight voxels a byte: voxel ``v`` is in plane ``v // bytes``, so that planes are shifted as a whole."""
    voxels = masks.shape[-1]
    size = -(-voxels // 8)
    planes = torch.nn.functional.pad(masks.to(torch.uint8), (0, 8 * size - voxels))
    planes = planes.reshape(*masks.shape[:-1], 8, size)
    return sum((planes[..., i, :] << i for i in range(1, 8)), planes[..., 0, :])


def _dice(packed: Tensor, volumes: Tensor) -> Tensor:
    """Mean Dice of all pairs of draws, (K,), from their packed masks (T,K,bytes) and volumes (T,K)."""
    draws = len(packed)
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)[:, None]
    found = []
    for masks, sizes in zip(packed.unbind(1), volumes.double().unbind(1), strict=True):
        dice, pairs = torch.zeros_like(sizes[0]), torch.zeros_like(sizes[0])
        step = _BLOCK // max(1, draws // 128)
        for first in range(0, draws, _ROWS):
            both = torch.zeros_like(sizes)
            for part in masks.split(step, dim=-1):
                bits = ((part[:, None] >> shifts) & 1).flatten(1).to(torch.float32)
                both = (
                    both + (bits[first : first + _ROWS] @ bits.T).double()
                )  # exact: below 2^24 voxels a block
            sums = sizes[first : first + _ROWS, None] + sizes
            later = torch.arange(draws, device=both.device) > torch.arange(
                first, first + len(sums), device=both.device
            ).unsqueeze(1)
            counted = later & (sums > 0)
            dice = dice + torch.where(counted, 2 * both / sums.clamp(min=1), 0).sum()
            pairs = pairs + counted.sum()
        found.append(dice / pairs)  # 0 / 0 is NaN: no pair
    return torch.stack(found)


def _finished(state: _State, link: str | None) -> Spread | Uncertainty:
    volumes = torch.cat(state.volumes)
    narrow = state.dtype
    mean, variance = state.mean, state.squares / state.draws
    sizes = volumes.double()
    scalars = (
        volumes,
        (sizes.std(0, correction=0) / sizes.mean(0)).to(narrow),  # 0 / 0 is NaN: no draw sees it
        _dice(torch.cat(state.packed), volumes).to(narrow),
    )
    if link is None or state.entropies is None:
        return Spread(mean.to(narrow), variance.to(narrow), *scalars)
    entropy = entropy_of(mean, link)
    shared = (entropy - state.entropies / state.draws).clamp(
        min=0
    )  # it is never below zero, but for rounding
    return Uncertainty(mean.to(narrow), variance.to(narrow), entropy.to(narrow), shared.to(narrow), *scalars)
