"""What kind of thing is put to the test: a method, transform, reducer, rewrite or metric, and which laws it has."""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

import esegeta.rules as rewrites
from esegeta import reducers as reducers  # imported, they are registered
from esegeta._facts import declared
from esegeta._registry import (
    METHODS,
    METRICS,
    REDUCERS,
    REFS,
    TRANSFORMS,
    ReducerSpec,
    TransformSpec,
    takes_key,
)
from esegeta._types import Score
from esegeta.conformance import adapters
from esegeta.conformance.adapters import metrics as peer_metrics
from esegeta.conformance.finding import imported, of
from esegeta.conformance.judging import MetricSubject, of_metric
from esegeta.conformance.lawbook import laws_for
from esegeta.conformance.laws import LAWS
from esegeta.conformance.networks import Network
from esegeta.conformance.scoring import ReducerSubject, RewriteSubject
from esegeta.conformance.subjects import TRANSFORMED, Subject, of_transform, tried
from esegeta.engine import check

METRIC = "metric:"  # before the names of metrics: one of them is also the name of an axiom
RULES = "rules."  # before the names of rewrites: one of them is also the name of a method
NET = Network((2, 4, 4), ("conv", "relu"))


@dataclass(frozen=True, repr=False)
class TransformSubject:
    """A transform under test, as what it makes of one method of each form. ``axioms``: what it says to preserve."""

    name: str
    axioms: frozenset[str]
    members: tuple[Subject, ...]
    keeping: Mapping[str, frozenset[str]]  # by member, what the method inside keeps

    kind: ClassVar[str] = "method"  # it is tried by the laws of what it makes

    def __repr__(self) -> str:
        return self.name

    def of(self, axiom: str) -> list[Subject]:
        """Return the members whose methods keep an axiom that says something about them."""
        return [m for m in self.members if axiom in self.keeping[m.name] and not LAWS[axiom].applies(m)]


AnySubject = Subject | TransformSubject | ReducerSubject | RewriteSubject | MetricSubject
Some = TypeVar("Some", bound=AnySubject)


def laws_of(subject: AnySubject) -> Mapping[str, Any]:
    """Return the laws of a subject's kind; those of methods are the axioms."""
    return laws_for(subject.kind)


def subject_of(what: "str | AnySubject | Callable[..., Any]") -> AnySubject:
    """Return the subject that a name or a function stands for, of whatever kind.

    What is registered is what it was registered as. Of others the name of the first argument tells: ``explain`` for
    a transform, ``model`` for a reducer, unless it explains a score. What makes of a score another one of the same
    values is a rewrite, what makes an explanation a method. A number that is not the score's is neither, and a number
    that a reducer would give as well is ambiguous: both are refused.

    Args:
        what: as for ``of``; also the name of a transform or of a reducer, ``"rules.guided"`` for a rewrite.

    Returns:
        A subject.

    Example:
        >>> import esegeta as eg
        >>> [type(subject_of(f)).__name__ for f in (eg.gradient, eg.smooth, eg.reducers.class_sum, eg.rules.guided)]
        ['Subject', 'TransformSubject', 'ReducerSubject', 'RewriteSubject']
    """
    if isinstance(what, AnySubject):
        return what
    if isinstance(what, str):
        return _named(what.strip())
    if not callable(what) or any(spec.fn is what for spec in METHODS.values()):
        return of(what)
    for change in TRANSFORMS.values():
        if change.fn is what:
            return of_transforms(change)
    for reducer in REDUCERS.values():
        if reducer.fn is what:
            return of_reducer(reducer)
    for judge in METRICS.values():
        if judge.fn is what:
            return of_metric(judge)
    first = _first(what)
    if first == "explain":
        return of_transforms(_foreign_transform(what))
    made = _made(what)
    if first == "model" and not (isinstance(made.value, Tensor) and made.value.shape == NET.shape):
        return _foreign_reducer(what)
    return _foreign_rewrite(what, made, named=first == "score") or of(what)


def _named(name: str) -> AnySubject:
    if name in TRANSFORMS:
        return of_transforms(TRANSFORMS[name])
    if name in REDUCERS:
        return of_reducer(REDUCERS[name])
    if name.startswith(METRIC):
        return of_metric(METRICS.find(name.removeprefix(METRIC)))
    if peer_metrics.known(name):
        return peer_metrics.find(*adapters.parsed(name))
    if name.startswith(RULES):
        made = _as_rewrite(getattr(rewrites, name.removeprefix(RULES), None))
        if made is None:
            known = [n for n in rewrites.__all__ if n.islower() and _as_rewrite(getattr(rewrites, n))]
            raise check.refused(
                "verify",
                "the name of a rewrite",
                repr(name),
                f"There are {', '.join(RULES + n for n in known)}",
            )
        return replace(made, name=name)
    if ":" in name and name.partition(":")[0].strip() not in adapters.LIBRARIES:
        return _renamed(subject_of(imported(name)), name)
    return of(name)


def _renamed(subject: Some, name: str) -> Some:
    return replace(subject, name=name)


def _first(function: Callable[..., Any]) -> str:
    try:
        return next(iter(inspect.signature(function).parameters), "")
    except (TypeError, ValueError):
        return ""


def _called(function: Any) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    return str(getattr(inner, "__name__", type(inner).__name__))


# -- transforms ----------------------------------------------------------------------------------------------------


def of_transforms(change: TransformSpec) -> TransformSubject:
    """Return a transform, as what it makes of one method of each form that it applies to."""
    made = [(of_transform(change, METHODS[name]), METHODS[name].axioms) for name in sorted(TRANSFORMED)]
    applying = [(s, kept) for s, kept in made if s is not None]
    return TransformSubject(
        change.name, change.preserves, tuple(s for s, _ in applying), {s.name: kept for s, kept in applying}
    )


def _foreign_transform(function: Callable[..., Any]) -> TransformSpec:
    """A transform that nobody registered preserves nothing that it would say; what it draws, its explanation says."""
    explain = METHODS["gradient"].fn(NET)
    try:
        outer = function(explain)
        one = outer(torch.ones(NET.shape, dtype=torch.float64), **({"key": 7} if takes_key(outer) else {}))
    except Exception as error:  # whatever it is
        got = f"{_called(function)}, which raised {type(error).__name__}: {error}"
        advice = "Take an explanation (x, *refs) -> like x, give the others defaults, and return such a one"
        raise check.refused_type("verify", "a transform: explain -> explain", got, advice) from error
    flat = tried("verify", _called(function), one, NET.shape)
    named = functools.wraps(function)(lambda inner, **static: function(inner, **static))
    named.__name__ = _called(function)
    return TransformSpec(fn=named, key=takes_key(outer), shape="one channel" if flat else "input")


# -- reducers ------------------------------------------------------------------------------------------------------


def of_reducer(spec: ReducerSpec) -> ReducerSubject:
    """Return a registered reducer with the settings of its example, fitted to the output of each model."""

    def build(model: Any, at: Tensor) -> Score:
        grid = tuple(model(at).shape[1:])
        static = {name: _fitted(value, grid) for name, value in spec.example.items()}
        return spec.fn(model, **static, **({"at": at} if spec.mask else {}))

    return ReducerSubject(spec.name, build, spec.output, spec.mask, spec.differentiable)


def _fitted(value: Any, grid: Sequence[Any]) -> Any:
    """Masks and labels of an example repeated, and a place in it moved, so that they fit another grid."""
    if isinstance(value, Tensor) and value.ndim and grid:
        places = torch.arange(math.prod(grid)) % value.numel()
        return value.flatten()[places].reshape(tuple(grid))
    if isinstance(value, tuple) and grid and all(isinstance(i, int) for i in value):
        return tuple(i % n for i, n in zip(itertools.cycle(value), grid, strict=False))
    return value


def _foreign_reducer(function: Callable[..., Any]) -> ReducerSubject:
    """A reducer that nobody registered: it freezes a mask if it takes ``at``, and has a gradient."""
    mask = "at" in inspect.signature(function).parameters
    build = lambda model, at: function(model, **({"at": at} if mask else {}))
    return ReducerSubject(_called(function), build, "map", mask)


# -- rewrites ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """What a function makes of a score: ``refs`` that it takes, whether it says to be rewritten, and its value."""

    refs: tuple[str, ...] = ()
    says: bool = False
    value: Any = None


def _made(function: Any, of: Callable[[Tensor], Tensor] = NET) -> _Made:
    """Try a function on a score, or on something else; nothing if it does not run."""
    try:
        needed = tuple(
            p.name
            for p in list(inspect.signature(function).parameters.values())[1:]
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        )
        if any(name not in REFS for name in needed):
            return _Made()
        x = _input()
        refs = [torch.zeros_like(x) if name == "baseline" else torch.zeros_like(x)[None] for name in needed]
        made = function(of, *refs)
        if declared(made).rewritten:  # even if one of its rules refuses to run
            return _Made(needed, True)
        return _Made(needed, False, made(x))
    except Exception:  # whatever it is, it is none
        return _Made()


def _input() -> Tensor:
    return torch.linspace(-1, 1, math.prod(NET.shape), dtype=torch.float64).reshape(NET.shape)


def _as_rewrite(function: Any) -> RewriteSubject | None:
    """A function of ours as a rewrite, if what it makes says so."""
    made = _made(function)
    return RewriteSubject(_called(function), function, made.refs) if made.says else None


def _foreign_rewrite(function: Any, made: _Made, named: bool) -> RewriteSubject | None:
    """A function as a rewrite, if it makes the score's own numbers; None if it makes none.

    ``named`` says that its first argument is called a score.
    """
    subject = RewriteSubject(_called(function), function, made.refs)
    if made.says:
        return subject
    value = made.value
    if not isinstance(value, Tensor) or value.ndim:
        return None
    expected = "a method (an explanation is like x), or a rewrite (a score of the same values)"
    own = NET(_input())
    if not torch.allclose(value.to(own.dtype), own, rtol=1e-6, atol=0):
        got = f"{subject.name}, whose number is {float(value):.6g} where the score is {float(own):.6g}"
        advice = (
            "Return an explanation like x; call the first argument explain for a transform, model for a reducer; "
            "or pass a conformance.RewriteSubject, to see which laws of a rewrite it breaks"
        )
        raise check.refused_type("verify", expected, got, advice)
    of_a_map = _made(function, lambda x: x).value
    if not named and isinstance(of_a_map, Tensor) and not of_a_map.ndim:
        got = f"{subject.name}, which makes a number of a map as well, as a reducer does"
        advice = "Call its first argument model for a reducer, score for a rewrite"
        raise check.refused_type("verify", "a rewrite or a reducer", got, advice)
    return subject
