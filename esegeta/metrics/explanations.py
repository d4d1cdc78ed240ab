"""The explanation that a metric judges: made anew at every call, or a finished map."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esegeta._facts import facts_of
from esegeta._registry import takes_key
from esegeta._types import Explain
from esegeta.engine import check
from esegeta.engine.sharing import shared


def given(a: Tensor, *, multiplied: bool = True) -> Explain:
    r"""Take a finished map for an explanation: from a file, another library, or an earlier run.

    Metrics of one map can be asked about it. Those that need explanations of other inputs or networks refuse it.

    Args:
        a: the map, (C,\*S) or (1,\*S) on the grid of the image.
        multiplied: whether values are contributions, in units of the score, such as those of integrated gradients;
            False for slopes, in units of the score per unit of the image, such as gradients.

    Returns:
        ``explain(x, *refs) -> a``, whatever x is.

    Example:
        >>> given(torch.tensor([[1.0, 2.0]]))(torch.zeros(1, 2)).tolist()
        [[1.0, 2.0]]
    """
    check.floating("metrics.given", "a", a)
    if not isinstance(multiplied, bool):
        advice = "Contributions are multiplied by the image's difference to a baseline, gradients are not"
        raise check.refused_type("metrics.given", "multiplied=True or False", repr(multiplied), advice)

    def explain(_: Tensor, *refs: Tensor) -> Tensor:  # noqa: ARG001
        return a

    explain.finished, explain.multiplied, explain.takes_key = True, multiplied, False  # type: ignore[attr-defined]
    explain.__name__ = explain.__qualname__ = "given"
    return explain


def fresh(where: str, explain: object) -> Callable[..., Tensor]:
    """Refuse a finished map where other explanations are needed."""
    if getattr(explain, "finished", False):
        raise check.refused(
            where,
            "an explanation that can be asked about other inputs",
            "a finished map",
            "Pass the method, for example eg.integrated_gradients(score)",
        )
    return callable_(where, explain)


def callable_(where: str, explain: object) -> Callable[..., Tensor]:
    """Refuse a map where an explanation belongs."""
    if isinstance(explain, Tensor):
        advice = "Wrap a finished map: metrics.given(map)"
        raise check.refused_type(where, "explain, a function of the image", check.describe(explain), advice)
    if not callable(explain):
        advice = "Pass a method applied to a score, for example eg.gradient(score)"
        raise check.refused_type(where, "explain, a function of the image", check.describe(explain), advice)
    return explain


def asked(explain: Callable[..., Tensor], x: Tensor, refs: tuple[Tensor, ...], key: Any) -> Tensor:
    """Explain x with as many of the refs as the explanation takes, and with the key if it draws at random.

    So methods with and without a baseline can be judged side by side, with the same fill.

    >>> asked(lambda x: x + 1, torch.zeros(1), (torch.ones(1),), 0).item()
    1.0
    """
    taken = facts_of(explain).refs
    given = refs if taken is None else refs[: len(taken)]
    return explain(x, *given, key=key) if takes_key(explain) else explain(x, *given)


def attribution(
    where: str, explain: Callable[..., Tensor], x: Tensor, refs: tuple[Tensor, ...], key: Any
) -> Tensor:
    """Return the map that is judged: on the grid of x, in double precision, without NaN."""
    check.image(where, "x", x)
    a = check.floating(where, "the explanation", asked(callable_(where, explain), x, refs, key))
    if a.ndim != x.ndim or a.shape[1:] != x.shape[1:] or a.shape[0] not in (1, x.shape[0]):
        shapes = " or ".join(dict.fromkeys(str(tuple(s)) for s in ((1, *x.shape[1:]), x.shape)))
        advice = "Bring it there with esegeta.spatial.upsample"
        raise check.refused(where, f"a map on the grid of x, {shapes}", check.describe(a), advice)
    advice = (
        "NaN is what was not computed, for example because of a deadline: explain again, or repair the map"
    )
    check.finite(where, "the explanation", a, advice)
    return a.to(torch.float64)


def voxelwise(a: Tensor) -> Tensor:
    """Return one value for each voxel: the sum over channels."""
    return a.sum(0)


def mask_of(where: str, mask: object, x: Tensor, name: str = "mask") -> Tensor:
    """Check a boolean mask on the grid of x, (*S) or (1,*S)."""
    if mask is None:
        advice = f"Pass {name}=, a boolean tensor on the grid of the image"
        raise check.refused_type(where, f"{name} at the call", "nothing", advice)
    mask = check.tensor(where, name, mask)
    if mask.dtype != torch.bool:
        raise check.refused_type(where, f"a boolean {name}", check.describe(mask), f"Use {name} > 0")
    if mask.ndim == x.ndim and len(mask) == 1:
        mask = mask[0]
    if mask.shape != x.shape[1:]:
        expected = f"{name} of shape {tuple(x.shape[1:])}, the grid of x"
        raise check.refused(where, expected, check.describe(mask), "Resample it to that grid")
    return mask


def doubts(a: Tensor | None, *, mask: Tensor | None = None, within: Tensor | None = None) -> list[str]:
    """Return what makes a number of a map say little, or keeps it from being one.

    >>> doubts(torch.ones(1, 3), mask=torch.zeros(3, dtype=torch.bool))
    ['the map is constant', 'the mask is empty']
    """
    found = []
    if a is not None:
        if not bool((a != 0).any()):
            found.append("the map is zero everywhere")
        elif bool(a.amax() == a.amin()):
            found.append("the map is constant")
    if within is not None and not bool(within.any()):
        found.append("the mask within is empty")
    if mask is not None:
        counts = torch.ones_like(mask) if within is None else within
        if not bool((mask & counts).any()):
            found.append("the mask is empty")
        elif not bool((counts & ~mask).any()):
            found.append("the mask is full")
    return found


def start(x: Tensor, refs: tuple[Tensor, ...]) -> Tensor:
    """Return what parts are replaced by: the last of the refs, or the mean of a stack of them; else zero."""
    if not refs:
        return shared("zeros", (x,), lambda: torch.zeros_like(x))
    if refs[-1].ndim > x.ndim:
        return shared("mean", (refs[-1],), lambda: refs[-1].mean(0))
    return refs[-1]


def says(explain: object, name: str) -> Any:
    """Return what an explanation says of itself, None if it does not."""
    return inspect.getattr_static(explain, name, None)
