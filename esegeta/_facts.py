"""What functions say of themselves: the names of their tensors, whether they draw at random, what they are called.

Scores and explanations are plain functions; what is known of one is written on it once, here, and carried over to
what is made of it. It is also what ``help``, ``inspect.signature`` and error messages show.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from esegeta.engine import check

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Facts:
    """What is known of a score or an explanation.

    key: whether it takes a random key, None if only its signature tells; refs: the names of its tensors besides the
    first, likewise; differentiable: whether it has a derivative; rewritten: whether its derivatives follow rules;
    changes_values: whether those rules change its values, too; partial: whether its derivative is only a part of that
    of its values, so that it may be zero where they vary; unchecked: the same without the refusal of values
    that are not finite; module: its network (B,C,*S) -> (B,); batched: the same for a batch, where vmap cannot.
    """

    key: bool | None = None
    refs: tuple[str, ...] | None = None
    differentiable: bool = True
    rewritten: bool = False
    changes_values: bool = False
    partial: bool = False
    unchecked: Callable[..., Any] | None = None
    module: Any = None
    batched: Callable[..., Any] | None = None


# A function that nobody of us made may say these by attributes of their names.
_LOOSE = {
    "takes_key": "key",
    **{name: name for name in ("refs", "differentiable", "rewritten", "changes_values", "partial")},
    **{name: name for name in ("module", "batched")},
}


def declared(fn: Callable[..., Any]) -> Facts:
    """Return what is written on a function: one ``Facts`` in ``fn.facts``, or attributes of an owner.

    >>> score = lambda x: x.sum()
    >>> score.differentiable = False
    >>> declared(score).differentiable, declared(lambda x: x).differentiable
    (False, True)
    """
    written = getattr(fn, "facts", None)
    if isinstance(written, Facts):
        return written
    return Facts(**{fact: getattr(fn, name) for name, fact in _LOOSE.items() if hasattr(fn, name)})


def facts_of(fn: Callable[..., Any]) -> Facts:
    """Return what a function says of itself, or else what its signature says.

    >>> facts_of(lambda x, baseline: x).refs, facts_of(lambda x, *, key=None: x).key, facts_of(lambda *xs: xs).refs
    (('baseline',), True, None)
    """
    known = declared(fn)
    if known.key is not None and known.refs is not None:
        return known
    key, refs = _by_signature(fn)
    return replace(
        known,
        key=key if known.key is None else known.key,
        refs=refs if known.refs is None else known.refs,
    )


def unchecked(score: Callable[..., Any]) -> Callable[..., Any]:
    """Return a score without the refusal of values that are not finite, for those that name them themselves."""
    facts = getattr(score, "facts", None)
    return score if not isinstance(facts, Facts) or facts.unchecked is None else facts.unchecked


def _by_signature(fn: Callable[..., Any]) -> tuple[bool, tuple[str, ...] | None]:
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return False, None
    key = any(p.name == "key" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    tensors = [p for p in parameters if p.name != "key"]
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in tensors)
    return key, tuple(p.name for p in tensors[1:]) if plain and tensors else None


def named(fn: Function, name: str, doc: str | None = None) -> Function:
    """Call a closure by its public name, with advice for those who hand it to ``pickle``.

    Pickle finds functions by their names, which closures do not have; the only text of ours in its error is
    ``__qualname__``.
    """
    fn.__qualname__ = f"{name}.<locals>.{fn.__name__} (use cloudpickle)"
    fn.__name__ = name
    if doc is not None:
        fn.__doc__ = doc
    return fn


def declare(fn: Function, **facts: Any) -> Function:
    """Write facts on a function, beside those that it has.

    >>> facts_of(declare(lambda x: x, differentiable=False)).differentiable
    False
    """
    return carry(fn, fn, **facts)


def carry(fn: Function, like: Callable[..., Any], **changes: Any) -> Function:
    """Write on a function what is known of the one it was made of, and what has changed.

    >>> score = lambda x: x.sum()
    >>> facts_of(carry(lambda x: 2 * score(x), score, rewritten=True)).rewritten
    True
    """
    known = replace(
        declared(like), **{"unchecked": None, **changes}
    )  # that is the score itself, and nobody else
    fn.facts = known  # type: ignore[attr-defined]
    return fn


def explanation(
    run: Callable[..., Any],
    name: str,
    refs: tuple[str, ...],
    *,
    key: bool | None,
    doc: str | None = None,
    first: str = "x",
) -> Callable[..., Any]:
    """Give an explanation its face: tensors by position or by name, a signature, a name and a docstring.

    Args:
        run: ``(x, *refs, key=) -> anything``, called with tensors by position.
        name: what errors call it.
        refs: the names of its tensors besides the first.
        key: whether it takes a random key.
        doc: what ``help`` says.
        first: the name of the first tensor.
    """
    names, draws = (first, *refs), bool(key)

    def explain(*args: Any, **kwargs: Any) -> Any:
        if len(args) != len(names) or len(kwargs) > draws or (kwargs and "key" not in kwargs):
            args, kwargs = _arranged(name, names, draws, args, kwargs)
        return run(*args, **kwargs)

    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    if draws:
        parameters.append(inspect.Parameter("key", inspect.Parameter.KEYWORD_ONLY))
    explain.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    explain.__module__ = run.__module__
    explain.facts = Facts(key=draws, refs=refs)  # type: ignore[attr-defined]
    return named(explain, name, doc)


def _arranged(
    name: str, names: tuple[str, ...], key: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The tensors in order, and the key; what does not fit is refused."""
    given = dict(kwargs)
    extra = {"key": given.pop("key")} if "key" in given and "key" not in names else {}
    call = f"explain({', '.join([*names, *(['key=...'] if key else [])])})"
    if extra and not key:
        advice = "It draws nothing at random: leave the key out"
        raise check.refused_type(name, call, f"key={check.describe(extra['key'])}", advice)
    for other in given:
        if other not in names:
            advice = check.nearest(other, names, "Settings belong to the method, not to its explanation")
            raise check.refused_type(name, call, f"the keyword {other!r}", advice)
        if names.index(other) < len(args):
            raise check.refused_type(name, call, f"{other} twice", f"Pass {other} once")
    missing = [n for n in names[len(args) :] if n not in given]
    if len(args) > len(names) or missing:
        got = f"{len(args) + len(given)} tensors"
        advice = "Baselines are made by esegeta.baselines, for example baselines.zero(x)"
        raise check.refused_type(name, call, got, advice)
    return (*args, *(given[n] for n in names[len(args) :])), extra


def settings(values: Mapping[str, Any]) -> str:
    """Return settings as a call would have them.

    >>> settings({"steps": 32, "rule": "left"})
    "steps=32, rule='left'"
    """
    return ", ".join(f"{k}={short(v)}" for k, v in values.items())


def short(value: object) -> str:
    """Return one setting in a few words."""
    if isinstance(value, Tensor):
        return check.describe(value)
    if callable(value):
        return str(getattr(value, "__name__", type(value).__name__))
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
