"""What is put to the test: something that explains, how it is called, and what it promises."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from esegeta import methods as methods  # imported, they are registered
from esegeta import transforms as transforms
from esegeta._facts import declare, declared
from esegeta._registry import METHODS, TRANSFORMS, MethodSpec, TransformSpec
from esegeta._types import Explain, Score
from esegeta.engine import check
from esegeta.placing import mark
from esegeta.rules.composites import named_composites

Build = Callable[[Score], Explain]

# Transforms see an explanation and what it is called with, not what it is made of: one of each form is enough.
TRANSFORMED = frozenset(
    {"gradient", "integrated_gradients", "gradient_shap", "blur_integrated_gradients", "guided_backprop"}
    | {"conductance", "grad_cam", "layer_gradient"}
)

# Under a transform, and where the effort does not matter, a method takes few steps.
_FAST = {"tolerance": 0.02, "steps": 6}


@dataclass(frozen=True, repr=False)
class Subject:
    """Something that explains, and what it promises.

    name: what reports call it; build: from a score to its explanation, with all settings; refs: the further
    tensors of the explanation (``"baseline"`` or ``"baselines"``); key: whether it draws at random; axioms:
    what it claims; one_channel: one map for all channels; composite: a transform of another subject.
    nodes: how many points of the straight path its sum has, None if it makes no excuse of a quadrature;
    accuracy: the relative accuracy of a stopping rule of its own; differentiable: whether its explanations are;
    stops_early: it runs a score only as far as a place; parts: how it is built on given parts of the image, if it
    explains by parts; wants: ``"module"`` if it needs ``score.module``, a network of batches;
    declares: whether its owner says which axioms it keeps; finer: the same with four times the nodes;
    terms: from the input to how many values of the score it adds up, if they are thousands; mapped: whether vmap can
    map over its explanations; if not they have ``explain.facts.batched(xs, *refs)``, which takes a batch.
    """

    name: str
    build: Build
    refs: tuple[str, ...] = ()
    key: bool = False
    axioms: frozenset[str] = frozenset()
    one_channel: bool = False
    composite: bool = False
    nodes: int | None = None
    accuracy: float = 0.0
    stops_early: bool = False
    differentiable: bool = True
    parts: Callable[[Any], Build] | None = None
    wants: Literal["function", "module"] = "function"
    declares: bool = False
    finer: Build | None = None
    terms: Callable[[Tensor], int] | None = None
    mapped: bool = True

    kind: ClassVar[str] = "method"  # whose laws it is tried by

    def __repr__(self) -> str:
        return self.name

    def extra(self, key: "int | Tensor" = 7) -> dict[str, Any]:
        """Return the key as a keyword, for those that take one."""
        return {"key": key} if self.key else {}


def _settled(example: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: settings.get(k, v) for k, v in example.items()}


def built(spec: MethodSpec, static: Mapping[str, Any]) -> Build:
    """Build a method; one at a place explains a copy of the input: what holds for all places holds there.

    What has to find activations to rewrite finds them in that copy.
    """
    copy = (lambda z: z + 0 * torch.relu(z)) if spec.rewrites else (lambda z: 1.0 * z)
    where = ["copy"] if spec.place else []

    def build(score: Score) -> Explain:
        if not callable(score) or not (spec.place or spec.rewrites):
            return spec.fn(score, *where, **static)
        marked: Any = lambda z: score(mark(copy(z), "copy"))
        declare(marked, differentiable=declared(score).differentiable)
        marked.__name__ = getattr(score, "__name__", "score")
        return spec.fn(marked, *where, **static)

    return build


def of_method(spec: MethodSpec, *, fast: bool = False) -> Subject:
    """Return a registered method with the settings of its example; with ``fast`` it takes few steps."""
    static = _settled(spec.example, _FAST if fast else {"tolerance": 1e-3})
    by_parts = "features" in inspect.signature(spec.fn).parameters
    # What stops at a tolerance may stop at its largest number of nodes before.
    counted = "max_runs" if "tolerance" in static else "steps"
    nodes = static.get(counted) if spec.needs == "gradient" else None
    return Subject(
        spec.name,
        built(spec, static),
        refs=spec.refs,
        key=spec.key,
        axioms=spec.axioms,
        one_channel=spec.shape == "map",
        nodes=nodes,
        accuracy=1.5 * static.get("tolerance", 0.0),
        stops_early=spec.needs == "activation",
        differentiable=spec.differentiable,
        parts=(lambda parts: built(spec, {**static, "features": parts})) if by_parts else None,
        declares=True,
        finer=built(spec, {**static, counted: 4 * nodes}) if nodes else None,
    )


def of_transform(change: TransformSpec, spec: MethodSpec) -> Subject | None:
    """Return a transform of a method, None where it does not apply."""
    refs = change.refs(spec.refs)
    if refs is None:
        return None
    inner = of_method(spec, fast=True)
    changed = lambda build: lambda score: change.fn(build(score), **change.example)
    return Subject(
        f"{change.name}({spec.name})",
        changed(inner.build),
        refs=refs,
        key=spec.key or change.key,
        axioms=spec.axioms & change.preserves,
        one_channel=inner.one_channel or change.shape == "one channel",
        composite=True,
        nodes=inner.nodes,
        accuracy=inner.accuracy,
        stops_early=inner.stops_early,
        differentiable=spec.differentiable,
        declares=True,
        finer=changed(inner.finer) if inner.finer else None,
    )


def subjects(*, fast: bool = False) -> Iterator[Subject]:
    """Return every registered method, and every transform of one method of each form."""
    specs = sorted(METHODS.items())
    for _, spec in specs:
        yield of_method(spec, fast=fast)
    for name, spec in specs:
        for _, change in sorted(TRANSFORMS.items()):
            subject = of_transform(change, spec) if name in TRANSFORMED else None
            if subject is not None:
                yield subject


class NoExplanation(TypeError):
    """What was returned is no explanation at all, so that no axiom says anything about it."""


def tried(where: str, name: str, a: Any, shape: Sequence[Any]) -> bool:
    """Refuse what is no explanation of an input of this shape; whether it is one map for all channels."""
    if isinstance(a, Tensor) and tuple(a.shape) in (tuple(shape), (1, *shape[1:])):
        return tuple(a.shape) != tuple(shape)
    got = f"{check.describe(a)} of {name}"
    expected = f"an explanation to be one tensor like x, {tuple(shape)}, or one map for all channels"
    raise NoExplanation(check.problem(where, expected, got, "Return one tensor"))


def shaped(subject: Subject) -> Subject:
    """Return the same, whose explanations are refused where they are no explanations."""

    def watched(build: Build) -> Build:
        def made(score: Score) -> Explain:
            explain = build(score)

            @functools.wraps(explain)
            def run(x: Tensor, *refs: Tensor, **key: Any) -> Tensor:
                a = explain(x, *refs, **key)
                if subject.wants == "module" and isinstance(a, Tensor):
                    return a  # it may explain a layer of the network, and be like that
                if tried("verify", subject.name, a, x.shape) != (subject.one_channel and x.shape[0] > 1):
                    expected = f"an explanation of the shape {'(1, *S)' if subject.one_channel else 'of x'}"
                    raise NoExplanation(
                        check.problem(
                            "verify", expected, f"{check.describe(a)} of {subject.name}", "Return that"
                        )
                    )
                return a

            return run

        return made

    parts = subject.parts
    return replace(
        subject,
        build=watched(subject.build),
        finer=watched(subject.finer) if subject.finer else None,
        parts=(lambda given: watched(parts(given))) if parts else None,
    )


def by_rule() -> Iterator[Subject]:
    """Return layer-wise relevance propagation by each composite of rules."""
    spec = METHODS["lrp"]
    for name in sorted(named_composites()):
        build = functools.partial(spec.fn, composite=name)
        yield Subject(f"lrp({name})", build, axioms=spec.axioms, differentiable=False, declares=True)
