"""The one gradient primitive. Every method that differentiates a score does it here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from esegeta._facts import declared
from esegeta.engine import check, levels, severed
from esegeta.engine.execution import record

Score = Callable[[Tensor], Tensor]

FORWARD_ONLY = (
    "Counts, argmax masks and detached values have no gradient: explain a sum of scores instead "
    "(esegeta.reducers.predicted_class_sum or soft_count), or use a method that needs only values"
)


def value_and_gradient(score: Score) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return ``x -> (F(x), dF/dx)`` with one forward and one backward run.

    The backward graph is built only if somebody will differentiate through it: an enclosing ``torch.func``
    transform, or ordinary autograd watching the input or anything that the score reads. Building it always
    keeps activations alive for nobody; never building it makes outer gradients silently wrong.

    Example:
        >>> import torch
        >>> y, g = value_and_gradient(lambda x: (x ** 2).sum())(torch.tensor([1., 3.]))
        >>> y.item(), g.tolist()
        (10.0, [2.0, 6.0])
    """
    pulled = value_gradients_and_more(lambda x: (score(x), ()), name_of(score))

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        y, (g,), _ = pulled(x)
        return y, g

    return both


def value_gradients_and_more(
    fn: Callable[..., tuple[Tensor, Any]], name: str
) -> Callable[..., tuple[Tensor, tuple[Tensor, ...], Any]]:
    """Return, of ``(*xs) -> (y, more)``, the value, the gradient of each input, and ``more``.

    Example:
        >>> import torch
        >>> fn = lambda a, b: ((a * b).sum(), {"product": a * b})
        >>> y, (ga, gb), more = value_gradients_and_more(fn, "demo")(torch.tensor([2.]), torch.tensor([3.]))
        >>> y.item(), ga.item(), gb.item(), more["product"].item()
        (6.0, 3.0, 2.0, 6.0)
    """

    def all_of_it(*xs: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        if torch.is_inference_mode_enabled() or any(levels.base(x).is_inference() for x in xs):
            # Tensors of inference mode never get a derivative; a copy made outside of it does.
            with torch.inference_mode(False):
                return outside(*[x.clone() for x in xs])
        return outside(*xs)

    def outside(*xs: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        watched = levels.differentiating()
        functions: list[Any] = []

        def traced(*zs: Tensor) -> tuple[Tensor, Any]:
            y, more = fn(*zs)
            y = check.scalar("gradient", y)
            if not y.requires_grad:
                raise check.refused(
                    "gradient",
                    "a score that depends on its input through differentiable operations",
                    f"{name}, whose gradient is identically zero",
                    FORWARD_ONLY,
                )
            if watched or levels.watched(y):
                functions.extend(severed.custom_functions([y]))
            return y, more

        y, pull, more = vjp(traced, *xs, has_aux=True)  # type: ignore[misc]
        graph = watched or levels.base(y).requires_grad
        if graph:
            severed.mark(name, functions, [y])
        gs = pull(torch.ones_like(y), retain_graph=graph, create_graph=graph)
        return y, gs, more

    return all_of_it


def gradient(score: Score) -> Callable[[Tensor], Tensor]:
    """Return ``x -> dF/dx``."""
    both = value_and_gradient(score)
    return lambda x: both(x)[1]


def name_of(score: Callable[..., Any]) -> str:
    """Return how errors call a score, or another function."""
    return getattr(score, "__name__", type(score).__name__)


def refuse_forward_only(where: str, score: Score) -> None:
    """Raise for a score that declares that it has no gradient."""
    if declared(score).differentiable is False:
        raise check.refused(
            where,
            "a differentiable score",
            f"{name_of(score)}, whose gradient is identically zero",
            FORWARD_ONLY,
        )


def warn_flat(where: str, score: Callable[..., Any], first: Tensor, second: Tensor, instead: str) -> None:
    """Say that a second derivative is zero everywhere although the first is not: ReLUs and max-pools are linear.

    Args:
        where: the method that is made of second derivatives.
        score: what it differentiates.
        first, second: the first derivative, and the second one along some direction.
        instead: what the method is then.
    """
    flat = (second.detach() == 0).all() & (first.detach() != 0).any()
    if levels.true_anywhere(flat):
        record(
            "flat",
            f"{where}: the second derivative of {name_of(score)} is zero at this input, as that of everything "
            f"piecewise linear, such as ReLUs and max-pools: {instead}. Explain a probability, or smooth the score "
            "with esegeta.rules.softplus(score, beta=10).",
        )


def refuse_dead_score(where: str, score: Score, x: Tensor, attribution: Tensor) -> None:
    """Raise if the score varies but its gradient is exactly zero wherever we look.

    An attribution that is zero everywhere may be right: a saturated score, or an input that equals its
    baseline. It is wrong for scores such as ``sum(z / z * (z > t))``, a count that autograd can differentiate.
    The two are told apart at other points, far and near: zero gradients at all of them, at different values of
    the score, do not come from a function that its gradient describes.
    """
    a = attribution.detach()
    dead = (a.amin() == 0) & (a.amax() == 0)
    if declared(score).partial or not levels.true_anywhere(dead):
        return
    both = value_and_gradient(score)
    x = x.detach()
    wave = (x.abs().amax() + 1) * check.wave(x)
    seen = [both(z) for z in (x, x / 2, x + wave, *(wave / 10**k for k in range(5)))]
    flat = torch.stack([(g == 0).all() for _, g in seen]).all()
    values = torch.stack([y for y, _ in seen])
    if levels.true_anywhere(flat & (values.amax() > values.amin()) & dead):
        raise check.refused(
            where,
            "a score with a gradient",
            f"{name_of(score)}, which varies although its gradient is zero at {len(seen)} points",
            FORWARD_ONLY,
        )
