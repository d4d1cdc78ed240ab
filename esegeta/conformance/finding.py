"""Find the subject that a name or a function stands for: registered, of another library, or of a module of yours."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch

from esegeta._facts import declared
from esegeta._registry import METHODS, REFS, TRANSFORMS, find_method
from esegeta._types import Explain
from esegeta.conformance import adapters
from esegeta.conformance.networks import Network
from esegeta.conformance.scoring import ReducerSubject, RewriteSubject
from esegeta.conformance.subjects import Subject, by_rule, of_method, of_transform, tried
from esegeta.engine import check


def of(method: "str | Subject | Callable[..., Explain]") -> Subject:
    """Return the subject that a name or a function stands for.

    Args:
        method: a subject; the name of a registered method, ``"smooth(gradient)"`` for a transform of one, or
            ``"captum:DeepLift"`` for one of another library; ``"my_module:my_method"``; a registered method; or any
            ``Score -> Explain`` whose explanation names what else it takes ``baseline``, ``baselines`` and ``key``.

    Returns:
        A subject.

    Example:
        >>> of("gradient").axioms >= {"linearity", "dummy"}
        True
        >>> of(lambda score: lambda x, baseline: x - baseline).refs
        ('baseline',)
    """
    if isinstance(method, Subject):
        return method
    if isinstance(method, str):
        return _named(method)
    if not callable(method):
        raise check.refused_type(
            "verify", "a method: Score -> Explain", check.describe(method), "Pass a function or a name"
        )
    for spec in METHODS.values():
        if spec.fn is method:
            return of_method(spec)
    return _foreign(method)


def _named(name: str) -> Subject:
    if ":" in name:
        if name.partition(":")[0].strip() in adapters.LIBRARIES:
            return adapters.find(name)
        return replace(of(imported(name.strip())), name=name.strip())
    by_rules = {s.name: s for s in by_rule()}
    if name in by_rules:
        return by_rules[name]
    outer, bracket, inner = name.removesuffix(")").partition("(")
    if bracket and outer in TRANSFORMS:
        spec = find_method(inner)
        subject = of_transform(TRANSFORMS[outer], spec)
        if subject is None:
            raise check.refused("verify", f"a method that {outer} applies to", inner, "Choose another method")
        return subject
    return of_method(find_method(name))


def imported(name: str) -> Callable[..., Any]:
    """Return the function or subject ``"my_module:my_method"``; a module of the working directory too."""
    advice = check.nearest(name, adapters.names(), "The libraries are " + ", ".join(adapters.LIBRARIES))
    module, _, function = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # at the end: no file of the user takes the place of an installed package
        importlib.invalidate_caches()
    expected = "library:Method of another library, or module:function of a module that can be imported"
    try:
        found = importlib.import_module(module)
    except (ImportError, ValueError, TypeError) as error:  # the latter for what is no name of a module
        got = f"{name!r} ({type(error).__name__}: {error})"
        advice = f"{advice}. Run this in the folder of the module, or install it"
        raise check.refused("verify", expected, got, advice) from error
    if not _can_be_tried(getattr(found, function, None)):
        known = sorted(n for n, v in vars(found).items() if _can_be_tried(v) and not n.startswith("_"))
        expected = f"a function or a subject of {module}"
        raise check.refused("verify", expected, repr(function), check.nearest(function, known))
    return cast("Callable[..., Any]", getattr(found, function))


def _can_be_tried(thing: object) -> bool:
    return callable(thing) or isinstance(thing, (Subject, ReducerSubject, RewriteSubject))


def _foreign(method: Callable[..., Explain]) -> Subject:
    """A function that nobody registered: what it takes is read off the explanation that it makes."""
    name = getattr(method, "__name__", type(method).__name__)
    expected = "a method: a function of a score that returns an explanation (x, *refs) -> like x"
    try:
        explain = method(Network((2, 4, 4), ("conv", "relu")))
    except Exception as error:  # whatever it is
        got = f"{name}, which raised {type(error).__name__}: {error}"
        advice = "Take a score (C,*S) -> (), or pass a Subject, which says what the explanation takes"
        raise check.refused_type("verify", expected, got, advice) from error
    if not callable(explain):
        got = f"{name}, which returned {check.describe(explain)}"
        raise check.refused_type("verify", expected, got, "Return a function of the input")
    says = declared(explain).refs
    if says is not None:
        found = Subject(name, method, tuple(says), bool(declared(explain).key))
        return _looked_at(found, explain)
    try:
        taken = list(inspect.signature(explain).parameters.values())
    except ValueError:  # builtins do not say what they take
        taken = []
    names = [
        p.name for p in taken if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "key"
    ]
    refs = tuple(names[1:])
    if not names or any(r not in REFS for r in refs):
        raise check.refused_type(
            "verify",
            f"an explanation (x), or (x, {') or (x, '.join(REFS)}), with key= where it draws",
            f"({', '.join(p.name for p in taken)})",
            "Rename its parameters, or pass a Subject, which says what they are",
        )
    return _looked_at(Subject(name, method, refs, any(p.name == "key" for p in taken)), explain)


def _looked_at(subject: Subject, explain: Explain) -> Subject:
    """A subject whose first explanation shows whether it is one map for all channels, or none at all."""
    x = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(2, 4, 4)
    known = {"baseline": torch.zeros_like(x), "baselines": torch.stack([0 * x, x.flip(-1)])}
    try:
        a = explain(x, *(known[kind] for kind in subject.refs), **subject.extra())
    except Exception:  # what it refuses here it may accept elsewhere
        return subject
    return replace(subject, one_channel=tried("verify", subject.name, a, x.shape))
