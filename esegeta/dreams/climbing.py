"""The loop of a dream: a state goes in at every step and comes out, and images are kept at the steps asked for."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils._pytree import tree_map

from esegeta import random
from esegeta._types import Score
from esegeta.dreams import optimisers, parametrisations
from esegeta.dreams.distortions import Distortion
from esegeta.dreams.optimisers import Optimiser
from esegeta.dreams.parametrisations import Parametrisation
from esegeta.dreams.regularisers import Penalty, Relative
from esegeta.engine import check, levels, memory
from esegeta.engine import execution as told
from esegeta.engine.ascent import climb, refuse_late
from esegeta.engine.execution import record_partial
from esegeta.engine.gradient import gradient, name_of, value_and_gradient

WHERE = "dreams.ascend"
_START, _STEPS = 0, 1  # of the streams of a key


class Dream(NamedTuple):
    """What came of an ascent.

    image: the last one; value: of the objective there, without distortions and penalties; taken: after how many steps
    that was; steps: after how many steps those below were recorded; images, values: what there was then, NaN where it
    did not come to that.
    """

    image: Tensor
    value: Tensor
    taken: Tensor
    steps: Tensor
    images: Tensor
    values: Tensor


class _State(NamedTuple):
    point: Tensor
    memory: Any
    taken: Tensor
    stopped: Tensor  # by a number that is none
    moved: Tensor


def ascend(
    objective: Score,
    start: Tensor | Callable[[random.Key], Tensor],
    *,
    steps: int = 256,
    parametrisation: Parametrisation | None = None,
    distortions: Sequence[Distortion] = (),
    penalties: Sequence[tuple[float | Relative, Penalty]] = (),
    optimiser: Optimiser | None = None,
    record: Sequence[int] = (),
) -> Callable[..., Dream]:
    r"""Climb an objective from an image, by its gradient for the image.

    .. math:: z_{j+1} = z_j + U_j\!\left(\nabla_z \Big[ F(T_j(x(z_j))) - \sum_p w_p R_p(x(z_j)) \Big]\right)

    U is the optimiser's step, x the parametrisation, :math:`T_j` the distortions with the numbers drawn for step j,
    R the penalties. One gradient of the objective a step; penalties and parametrisation are differentiated beside
    it. Nothing is kept of the steps but what is asked for. A step that leads to a value or a point that is not finite
    is taken back: the dream ends there, and a warning names the step. At a deadline the dream ends with what it has,
    and the execution says how many steps that took.

    Map over starts, channels or keys by ``torch.func.vmap`` or ``eg.batched``: each answer is that of its dream
    alone.

    Args:
        objective: any score ``(C,*S) -> ()``: of ``dreams.objectives``, a reducer, a function of your own.
        start: the image (C,\*S), or a function from a key to it, such as ``dreams.starts.noise((1, 64, 64))``.
        steps: how many.
        parametrisation: what moves, voxels by default.
        distortions: applied in this order, another draw at every step.
        penalties: pairs of a weight and a penalty; ``relative(r)`` weighs by the ratio of gradients.
        optimiser: Adam with rate 0.05 by default.
        record: after how many steps an image is kept; 0 is the start.

    Returns:
        ``dream(key=0) -> Dream``. Without distortions and with an image as start the key changes nothing. It has a
        derivative by ``torch.func`` alone, not by the graph of ordinary autograd.

    Example:
        >>> top = torch.tensor([[1.0, -2.0]])
        >>> dream = ascend(lambda x: -(x - top).square().sum(), torch.zeros(1, 2), steps=300, record=[0])
        >>> found = dream()
        >>> torch.allclose(found.image, top, atol=1e-3), found.values.tolist()
        (True, [-5.0])

    Reference:
        Erhan et al. 2009; Olah, Mordvintsev, Schubert 2017, Feature visualization.
    """
    check.score(WHERE, objective)
    n = check.positive_count(WHERE, "steps", steps)
    ways = _part("parametrisation", parametrisation, Parametrisation, parametrisations.voxels)
    climbing = _part("optimiser", optimiser, Optimiser, optimisers.adam)
    changes, costs = tuple(distortions), [_penalty(pair) for pair in penalties]
    for change in changes:
        check.function(
            WHERE, "distortions (x, key) -> x", change, "Pass for example [dreams.distortions.jitter(8)]"
        )
    kept = [_recorded(k, n) for k in record]
    direct = ways.decode is parametrisations.same

    def seen(x: Tensor, key: random.Key) -> Tensor:
        for i, change in enumerate(changes):
            x = change(x, random.fold_in(key, i))
        return x

    def slope(x: Tensor, key: random.Key) -> tuple[Tensor, Tensor, Tensor]:
        y, g = value_and_gradient(lambda x: check.scalar(WHERE, objective(seen(x, key))))(x)
        whole = g
        for weight, penalty in costs:
            down = gradient(penalty)(x)
            if isinstance(weight, Relative):
                size = down.norm()
                weight = weight.ratio * g.norm() / torch.where(size > 0, size, 1)
            whole = whole - weight * down
        return y, (g != 0).any(), whole

    def dream(key: random.Key = 0) -> Dream:
        # Weights that ask for a gradient would keep the graphs of all steps alive. Only an enclosing grad needs them.
        with contextlib.nullcontext() if levels.differentiating() else torch.no_grad():
            return climbed(key)

    def climbed(key: random.Key) -> Dream:
        refuse_late(WHERE)
        word = random.fold_in(check.key(WHERE, key), _STEPS)
        x = start(random.fold_in(key, _START)) if callable(start) else start
        check.finite(WHERE, "start", check.floating(WHERE, "start", x), "Begin from noise or from an image")
        first = ways.encode(x)
        history: list[tuple[Tensor, Tensor]] = []

        def keep(state: _State, after: int) -> None:
            # A dream that stopped before has no image of that step.
            there = state.taken == after
            image = ways.decode(state.point)
            history.append(
                (torch.where(there, image, torch.nan), torch.where(there, objective(image), torch.nan))
            )

        def step(k: int, state: _State) -> _State:
            z = state.point
            x, pull = (z, lambda g: (g,)) if direct else vjp(ways.decode, z)  # type: ignore[misc]
            y, answered, g = (
                slope(x, random.fold_in(word, k)) if k else _begun(slope, x, random.fold_in(word, k))
            )
            (pulled,) = pull(g)
            point, memory = climbing.update(k, z, pulled, state.memory)
            bad = ~(torch.isfinite(y) & torch.isfinite(pulled).all() & torch.isfinite(point).all())
            stopped = state.stopped | bad
            old = (z, state.memory)
            point, memory = tree_map(lambda a, b: torch.where(stopped, a, b), old, (point, memory))
            taken = state.taken + (~stopped).to(torch.int64)
            return _State(point, memory, taken, stopped, state.moved | answered)

        def after(k: int, state: _State, late: bool) -> bool:
            if not late and k + 1 in kept:
                keep(state, k + 1)
            return not levels.true_anywhere(~state.stopped)

        zero = torch.zeros((), dtype=torch.int64, device=first.device)
        no = zero != zero
        state = _State(first, climbing.begin(first), zero, no, no)
        if 0 in kept:
            keep(state, 0)
        state = climb(step, state, after, label=f"dream of {name_of(objective)}", steps=n)
        _warn(objective, state, n)
        image = ways.decode(state.point)
        value = objective(image)
        empty = (torch.full_like(image, torch.nan), torch.full_like(value, torch.nan))
        history += [empty] * (len(kept) - len(history))
        numbers = torch.tensor(sorted(kept), dtype=torch.int64, device=image.device)
        images = torch.stack([i for i, _ in history]) if history else image.new_zeros(0, *image.shape)
        values = torch.stack([v for _, v in history]) if history else value.new_zeros(0)
        return Dream(image, value, state.taken, numbers, images, values)

    return dream


def each(part: Any) -> Any:
    """Let a part of a dream work on every image of a set (B,C,*S) by itself, so that they can be climbed together.

    Objectives and penalties are summed; a distortion draws for each image; a parametrisation writes each. With
    ``objectives.diversity`` the images keep apart from each other.

    Args:
        part: an objective, a penalty, a distortion or a parametrisation.

    Example:
        >>> each(lambda x: x.square().sum())(torch.ones(3, 1, 2)).item()
        6.0
    """
    if isinstance(part, Parametrisation):
        return Parametrisation(vmap(part.encode), vmap(part.decode))
    check.function(
        "dreams.each", "an objective, penalty, distortion or parametrisation", part, "Pass one of these"
    )

    def together(xs: Tensor, *key: random.Key) -> Tensor:
        if not key:
            return vmap(part)(xs).sum()
        numbers = torch.arange(len(xs), device=xs.device)
        return vmap(lambda x, i: part(x, random.fold_in(key[0], i)))(xs, numbers)

    return together


def _begun(slope: Callable[..., Any], x: Tensor, key: random.Key) -> Any:
    """Take the first slope; if the objective cannot be computed of the start, say so, not what its operator says."""
    try:
        return slope(x, key)
    except (RuntimeError, IndexError) as error:
        if check.is_refusal(error) or memory.is_out_of_memory(error):
            raise
        why = (str(error) or type(error).__name__).splitlines()[0]
        got = f"one of shape {tuple(x.shape)}, on which it fails ({why:.150})"
        advice = (
            "Begin from the channels and the size that the network takes; a frame of padding adds to the size"
        )
        raise check.refused(WHERE, "a start (C,*S) that the objective takes", got, advice) from error


def _part(name: str, value: Any, kind: type, default: Callable[[], Any]) -> Any:
    if value is None:
        return default()
    if not isinstance(value, kind):
        got, advice = check.describe(value), f"Those of dreams.{name}s are"
        raise check.refused_type(WHERE, f"{name} to be one", got, advice)
    return value


def _penalty(pair: object) -> tuple[float | Relative, Penalty]:
    if not isinstance(pair, tuple) or len(pair) != 2 or not callable(pair[1]):
        advice = "Write penalties=[(1e-3, dreams.regularisers.total_variation())]"
        raise check.refused_type(WHERE, "penalties as pairs (weight, penalty)", check.describe(pair), advice)
    weight, penalty = pair
    return (
        weight if isinstance(weight, Relative) else check.non_negative(WHERE, "a weight", weight)
    ), penalty


def _recorded(k: object, steps: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= steps:
        raise check.refused(
            WHERE, f"record= of numbers of steps from 0 to {steps}", repr(k), "0 is the start"
        )
    return k


def _called(objective: Score) -> str:
    """Return the name of an objective; those of this package are functions that others return."""
    name, _, inner = getattr(objective, "__qualname__", "").partition(".<locals>.")
    own = inner and str(getattr(objective, "__module__", "")).startswith("esegeta.")
    return name if own else name_of(objective)


def _warn(objective: Score, state: _State, steps: int) -> None:
    """Say why a dream is not what was asked for."""
    if levels.true_anywhere(state.stopped):
        done = int(levels.base(state.taken).min())
        text = (
            f"{WHERE}: {_called(objective)} was not finite at step {done + 1} of {steps}; the result is that of the "
            f"{done} steps before. Take smaller steps, or bound the image."
        )
        record_partial(text, done, steps)
    if levels.true_anywhere(state.taken > 0) and not levels.true_anywhere(state.moved):
        text = (
            f"{WHERE}: the gradient of {_called(objective)} is zero at the start, so nothing leads from there. Begin "
            "from stronger noise or from an image that the network answers to."
        )
        told.record("flat", text)
