"""Metrics as subjects, and the situations of the laws that their numbers have to keep.

A metric judges a map of an image, by a score. In a situation the score is known in closed form,

    F(x) = offset + sum_i w_i x_i + bend (sum_i x_i)^2 / n,

so that what the true map is, and what a fair number would be, is no question.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from esegeta import placing
from esegeta._registry import MetricSpec
from esegeta._types import Score
from esegeta.conformance import cases
from esegeta.conformance.lawbook import Law, laws_for
from esegeta.engine.refusals import is_refusal
from esegeta.metrics import given

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from esegeta.conformance.drawing import Draw

Values = Any  # nested lists of numbers, or a tensor
PLACE = "layer"  # what the score calls its image, for metrics that look at an activation


@dataclass(frozen=True, repr=False)
class MetricSubject:
    """A metric under test: from an explanation, a score and settings to a measure, with what it declares.

    build: ``(explain, score, **settings) -> measure(x, key=, mask=)``; needs, better, exact, ranks: as the registry
    says; steps: whether it takes a number of steps; drawn: whether it draws by position; planar: whether it takes
    images with two spatial axes only; vectorised: whether its measure goes through vmap; slack: what its arithmetic
    may be off by, relative to the size of its number; several: whether ``build`` takes ``chunk=``, and then judges
    several images, so many at once; ordered: whether it is a loss, or an area, as elements go in the order
    of the map.
    """

    name: str
    build: Callable[..., Callable[..., Any]]
    needs: tuple[str, ...] = ()
    better: str = ""
    exact: float | None = None
    ranks: bool = False
    steps: bool = False
    drawn: bool = False
    planar: bool = False
    vectorised: bool = True
    slack: float = 1e-9
    several: bool = False
    ordered: bool = False

    kind: ClassVar[str] = "metric"

    @property
    def axioms(self) -> frozenset[str]:
        """The laws that say something about it: a metric has to keep them all."""
        return frozenset(name for name, law in laws_for("metric").items() if not law.applies(self))

    def __repr__(self) -> str:
        return self.name


def of_metric(spec: MetricSpec) -> MetricSubject:
    """Return a registered metric with the settings of its example."""
    settings = {**spec.example, **({"place": PLACE} if "place" in spec.parameters else {})}

    def build(explain: Any, score: Score, **more: Any) -> Callable[..., Any]:
        own = {**settings, **more}
        if "multiplied" in spec.parameters:
            own["multiplied"] = True
        return spec.fn(explain, *([score] if "score" in spec.needs else []), **own)

    facts = (spec.needs, spec.better, spec.exact, spec.ranks, "steps" in spec.parameters and spec.ranks)
    drawn = "key" in spec.needs or "seed" in spec.parameters
    return MetricSubject(spec.name, build, *facts, drawn=drawn, ordered=spec.answer == "curve" and spec.ranks)


@dataclass(frozen=True, repr=False)
class MetricLaw(Law):
    """The weights of a score, an image, and a map of it; the mask is every third element."""

    weights: Values
    image: Values
    map: Values

    def __post_init__(self) -> None:
        for name in ("weights", "image", "map"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float64))

    def __repr__(self) -> str:
        tensors = ", ".join(cases.numbers(getattr(self, name)) for name in ("weights", "image", "map"))
        return f"{type(self).__name__}({tensors})"

    @property
    def trivial(self) -> bool:
        """Return whether the map has no order, or the score does not look at the image."""
        return bool((self.map == self.map.flatten()[0]).all()) or not bool((self.weights * self.image).any())

    @classmethod
    def fits(cls, shape: Sequence[int]) -> bool:
        """Accept only images with some elements, in one channel."""
        return shape[0] == 1 and math.prod(shape) >= 4

    @classmethod
    def applies(cls, subject: MetricSubject) -> str:
        """Accept only those that are asked about an image."""
        return "it is asked about networks" if {"network", "targets"} & set(subject.needs) else ""

    @classmethod
    def drawn(cls, draw: "Draw") -> "SearchStrategy[Any]":
        """Return a strategy of weights, images and maps."""
        return draw.st.builds(cls, draw.images(), draw.images(), draw.images())

    @property
    def mask(self) -> Tensor:
        """Every third element."""
        return (torch.arange(self.image[0].numel()) % 3 == 0).reshape(self.image.shape[1:])

    def score(self, weights: Tensor | None = None, bend: float = 0.0, unit: float = 1.0) -> Score:
        """Return the score of a situation, positive along every way to the image: shares of it have a meaning."""
        w = self.weights if weights is None else weights
        offset = 1 + 4 * float((self.weights * self.image).abs().sum())

        def score(x: Tensor) -> Tensor:
            z = placing.mark(x, PLACE)
            return unit * (offset + (w * z).sum() + bend * z.sum() ** 2 / z.numel())

        return score

    def number(
        self, subject: MetricSubject, a: Tensor, score: Score, x: Tensor | None = None, **settings: Any
    ) -> Tensor:
        """Return the number of a map, or of slopes that follow the image for metrics that need explanations."""
        x = self.image if x is None else x
        mask = settings.pop("mask", self.mask)
        explain = (lambda y, *_: a * (1 + y - x)) if "explain" in subject.needs else given(a)
        measure = subject.build(explain, score, **settings)
        called = {"mask": mask} if "mask" in subject.needs else {}
        found = measure(x, key=7, **called)
        return torch.as_tensor(getattr(found, "area", found), dtype=torch.float64)

    def answer(
        self, subject: MetricSubject, a: Tensor, score: Score, x: Tensor | None = None, **settings: Any
    ) -> Tensor | None:
        """Return the number of a map, None where it is refused in words, infinity for a crash."""
        try:
            return self.number(subject, a, score, x, **settings)
        except Exception as error:  # a peer may refuse by any error that says why
            in_words = isinstance(error, (ValueError, AssertionError)) and str(error)
            return None if is_refusal(error) or in_words else a.new_full((), torch.inf)

    def unsuited(self, subject: MetricSubject) -> bool:
        """Return whether the subject takes no such images."""
        return subject.planar and self.image.ndim != 3

    def allowed(self, subject: MetricSubject, *values: Tensor) -> float:
        """Return what rounding may do to such numbers."""
        sizes = [float(v.abs()) for v in values if torch.isfinite(v)]
        terms = 1 + 4 * float((self.weights * self.image).abs().sum())
        return subject.slack * max([1.0, terms, *sizes])


def apart(a: Tensor, b: Tensor) -> float:
    """Return how far two numbers are from each other; two that are undefined are equal."""
    if bool(a.isnan()) or bool(b.isnan()):
        return 0.0 if bool(a.isnan()) and bool(b.isnan()) else math.inf
    return float((a - b).abs()) if bool(a != b) else 0.0
