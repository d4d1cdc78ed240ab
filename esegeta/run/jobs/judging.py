"""A map of a run put to a metric: what the metric takes is made of the inputs of a job, when it is asked for.

Most metrics judge the finished map, as it was computed, on the grid of the network. Some ask for explanations of
other images or of other networks: these are built anew by the method of the map, with its key and its baselines.
"""

import contextlib
import copy
import functools
import inspect
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esegeta import metrics, random
from esegeta._registry import MetricSpec, find_method
from esegeta._types import Explain, Model, Score
from esegeta.engine import check
from esegeta.engine.estimates import value_and_error
from esegeta.engine.execution import DeadlineExceeded, current, execution, partial_share
from esegeta.metrics.comparing import called, counted
from esegeta.metrics.nulls import Null
from esegeta.models import from_module
from esegeta.run.config import building, catalogue
from esegeta.run.config.building import Built
from esegeta.run.config.schema import Call
from esegeta.run.jobs.inputs import Inputs, on_image
from esegeta.run.jobs.parts import Entry, Image, explanation_of, model_around, reader, refusals


class Answer(NamedTuple):
    """What a metric says of a map.

    value: the number, NaN if there is none; error: its standard error, None if it draws nothing; curve: what it is
    the area of, None if it is no curve; share: of its samples, None if a deadline left all of them; nulls: the same
    of random maps, with their numbers and curves.
    """

    value: float
    error: float | None
    curve: Any
    share: float | None
    nulls: "Nulls | None"


class Nulls(NamedTuple):
    """The numbers of random maps: their mean, where 95 % of them lie, p, how many there are, and their curves."""

    mean: float
    low: float
    high: float
    p: float
    draws: int
    curves: list[Any]


def leading(metric: Callable[..., Any]) -> list[str]:
    """Return the names of what a metric takes before its settings.

    >>> leading(metrics.deletion), leading(metrics.roc_auc)
    (['explain', 'score'], ['explain'])
    """
    own = inspect.signature(metric).parameters.values()
    return [p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]


class Material:
    """What there is of one map. ``evaluations`` has how many images the score was run on so far."""

    def __init__(self, inputs: Inputs, of: str) -> None:
        self.inputs = inputs
        self.of = of
        self.evaluations = [0]

    @functools.cached_property
    def entry(self) -> Entry:
        """The parts of the configuration."""
        return self.inputs.entry()

    @functools.cached_property
    def image(self) -> Image:
        """The image."""
        return self.inputs.image()

    @functools.cached_property
    def map(self) -> Tensor:
        """The map on the grid of the network; one of a layer is interpolated to it."""
        raw = self.inputs.map(self.of).to(self.image.x.device)
        holes = int(raw.isnan().sum())
        if holes:
            got = f"NaN in {holes} of {raw.numel()} voxels, which were not computed"
            advice = "Give the method more time"
            raise check.refused(self.of, "a map without holes", got, advice)
        return on_image(raw, self.image.x)[0]

    def _watched(self, score: Score) -> Score:
        return counted(score, self.evaluations)

    @functools.cached_property
    def explained(self) -> tuple[Built, Score | None]:
        """The explanation by the method of the map, and the score that it explains, whose runs are counted."""
        with refusals():
            return explanation_of(self.entry, self.inputs.model(), self.image, watch=self._watched)

    def score(self) -> Score:
        """Return the score that the map explains."""
        score = self.explained[1]
        if score is None:
            got = 'patches = "per_patch"'
            advice = 'Take patches = "stitched", which explains one score'
            raise check.refused(self.of, "a map of one score", got, advice)
        return score

    def finished(self) -> Explain:
        """Return the map as an explanation."""
        spec = find_method(self.entry.method.name)
        return finished(self.map, catalogue.contributions(spec, self.entry.method))

    def fresh(self) -> Explain:
        """Return the explanation that the map is of, for other images: with the same draws at each of them."""
        built, _ = self.explained
        return _again(built)

    def _network(self) -> Any:
        """The network itself, without what runs it on patches."""
        model = self.inputs.model()
        return getattr(model, "model", model)

    def module(self) -> nn.Module:
        """Return the network."""
        module = getattr(self._network(), "module", None)
        if not isinstance(module, nn.Module):
            advice = "Name the network by zoo: or by a factory"
            raise check.refused(self.of, "a network with parameters", check.describe(module), advice)
        return module

    def method(self) -> Callable[[Model], Explain]:
        """Return the way from a network to its explanation, with the mask of the network as it is.

        The mask of a network of random weights is another target, or empty. So the score is made with the weights as
        they are, and gets others afterwards.
        """
        chosen = getattr(self._network(), "output", None)

        def method(model: Model) -> Explain:
            own = copy.deepcopy(self.module())
            with refusals():
                around = model_around(from_module(own, output=chosen), self.entry)
                built, _ = explanation_of(self.entry, around, self.image, watch=self._watched)
            own.load_state_dict(model.module.state_dict())  # type: ignore[attr-defined]
            return _again(built)

        return method

    def classes(self) -> tuple[int, int]:
        """Return the class of the target, and how many classes there are."""
        target = self.entry.target.parameters.get("target", self.entry.target.class_)
        if not isinstance(target, int):
            advice = "Take a reducer with a class"
            raise check.refused(self.of, "a target with a class", "none", advice)
        channels = len(self.inputs.answer())
        one_for_two = channels == 1 and self.entry.target.parameters.get("exclusive", True)
        return target, 2 if one_for_two else channels

    def explain_of(self) -> Callable[[int], Explain]:
        """Return the way from a class to the explanation of the same target for that class."""
        target = self.entry.target

        def explain_of(number: int) -> Explain:
            changed = target.model_copy(update={"parameters": {**target.parameters, "target": number}})
            entry = self.entry._replace(target=changed)
            with refusals():
                built, _ = explanation_of(entry, self.inputs.model(), self.image, watch=self._watched)
            return _again(built)

        return explain_of

    def other(self) -> int:
        """Return the other one of two classes."""
        target, count = self.classes()
        if count != 2:
            advice = "Say which with parameters.other" if count > 2 else "One class has no other"
            raise check.refused(self.of, "two classes", str(count), advice)
        return 1 - target

    def given(self, name: str, spec: MetricSpec) -> Any:
        """Return what a metric takes under a name."""
        makers: dict[str, Callable[[], Any]] = {
            "explain": self.fresh if "explain" in spec.needs else self.finished,
            "score": self.score,
            "model": self.inputs.model,
            "module": self.module,
            "method": self.method,
            "explain_of": self.explain_of,
            "target": lambda: self.classes()[0],
            "other": self.other,
        }
        if name not in makers:
            advice = "Call it from Python"
            raise check.refused(spec.name, "what a run can give", repr(name), advice)
        return makers[name]()


# What a run gives to a metric by itself; a file may still say the last one.
GIVEN = ("explain", "score", "model", "module", "method", "explain_of", "target", "other")


def _again(built: Built) -> Explain:
    def explain(x: Tensor, *_: Tensor) -> Tensor:
        return built(x)

    return explain


def finished(a: Tensor, multiplied: bool | None) -> Explain:
    """Take a map for an explanation; whether it has contributions may be unknown."""
    explain = metrics.given(a, multiplied=bool(multiplied))
    explain.multiplied = multiplied  # type: ignore[attr-defined]
    return explain


def baseline(given: str | Call | None, material: Material) -> Tensor:
    """Return what takes the place of parts that a metric removes: zero if nothing is said."""
    image = material.image
    if given is None:
        return torch.zeros_like(image.x)
    context = catalogue.Context(image.prepared.spacing, material.entry.key, reader(image))
    with refusals():
        made = building.baselines(given, "baseline", image.x, context)
    found = [one for one in made or () if one is not None]
    return found[0]


def null_of(given: str | Call) -> Null:
    """Return the null model of that name.

    >>> null_of("shifted").__name__
    'shifted'
    """
    call = given if isinstance(given, str) else given.model_dump()
    made: Null = catalogue.called(call, "null", catalogue.Context(), "null")
    return made


def settings_of(
    spec: MetricSpec, given: Mapping[str, Any], material: Material
) -> tuple[list[Any], dict[str, Any]]:
    """Return what a metric takes: first what the run gives, then its settings from the file."""
    known = catalogue.of_method(spec)
    image = material.image
    context = catalogue.Context(image.prepared.spacing, material.entry.key, reader(image))
    with refusals():
        made = catalogue.arguments(given, known, context, "parameters", spec.name) if given else {}
    settings = dict(made or {})
    own = [settings.pop(n) if n in settings else material.given(n, spec) for n in leading(spec.fn)]
    return own, settings


def answer(
    spec: MetricSpec,
    given: Mapping[str, Any],
    material: Material,
    *,
    refs: tuple[Tensor, ...],
    masks: Mapping[str, Tensor],
    null: tuple[Null, int, Any] | None = None,
) -> Answer:
    """Put a map to a metric.

    Args:
        spec: of the metric.
        given: its settings, as a file has them.
        material: what there is of the map.
        refs: baselines.
        masks: ``mask`` and ``within``, where it takes them.
        null: a null model, how many draws of it, and which way the metric is better if it does not say so.

    Returns:
        What it says.
    """
    own, settings = settings_of(spec, given, material)
    seen: list[_Found] = []

    def recorded(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        measure = spec.fn(*args, **kwargs)

        def run(x: Tensor, *refs: Tensor, **more: Any) -> Any:
            if seen and current().left() <= 0:
                raise _Late
            try:
                found = _found(measure, x, refs, {**masks, **more})
            except DeadlineExceeded:
                if seen:
                    raise _Late from None
                raise
            if seen and found.share is not None:  # of less than the map: none to compare with
                raise _Late
            seen.append(found)
            return found.answer

        return run

    x = material.image.x
    word = random.fold_in(check.key(spec.name, material.entry.key), zlib.crc32(spec.name.encode()))
    if null is None:
        recorded(*own, **settings)(x, *refs, key=random.fold_in(word, 1))
        return Answer(*seen[0].numbers(), seen[0].share, None)
    model, draws, better = null
    way = better or spec.better
    judge = metrics.calibrated(recorded, null=model, draws=draws, better=way or None)
    with contextlib.suppress(_Late):  # then there are fewer
        judge(*own, **settings)(x, *refs, key=word)
    mine, *others = (one.numbers() for one in seen)
    curves = [curve for value, _, curve in others if curve is not None and not math.isnan(value)]
    nulls = beside(mine[0], [value for value, *_ in others], way == "higher")
    return Answer(*mine, seen[0].share, nulls._replace(curves=curves))


class _Late(Exception):
    """The time is up while random maps are judged."""


def beside(value: float, others: Sequence[float], higher: bool) -> Nulls:
    """Return how a number stands beside those of random maps, as ``metrics.calibrated`` does.

    Args:
        value: of the map.
        others: of random maps, NaN for those that have none.
        higher: whether higher numbers are better.

    Example:
        >>> beside(3.0, [1.0, 2.0, math.nan, 4.0], True)[3:5]
        (0.5, 3)
    """
    known = torch.tensor([o for o in others if not math.isnan(o)], dtype=torch.float64)
    if not len(known):
        return Nulls(math.nan, math.nan, math.nan, math.nan, 0, [])
    low, high = known.quantile(known.new_tensor([0.025, 0.975])).tolist()
    as_good = int((known >= value).sum() if higher else (known <= value).sum())
    p = math.nan if math.isnan(value) else (1 + as_good) / (1 + len(known))
    return Nulls(known.mean().item(), low, high, p, len(known), [])


class _Found(NamedTuple):
    """What a measure says, its standard error, and of which share of its samples, None for all."""

    answer: Any
    error: Tensor | None = None
    share: float | None = None

    def numbers(self) -> tuple[float, float | None, Any]:
        """Return the number, its error, and the curve if it is the area of one."""
        area = getattr(self.answer, "area", None)
        value = float(self.answer if area is None else area)
        return value, None if self.error is None else float(self.error), None if area is None else self.answer


def _found(
    measure: Callable[..., Any], x: Tensor, refs: tuple[Tensor, ...], more: Mapping[str, Any]
) -> _Found:
    with execution() as run:
        answer, error = value_and_error(measure, x, *refs, **called(measure, more))
    return _Found(answer, error, partial_share(run.events))


@contextlib.contextmanager
def as_reason() -> Any:
    """Make a refusal of what a metric cannot be asked: its message is the reason why there is no number."""
    try:
        yield
    except check.Refused:
        raise
    except TimeoutError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise check.Refused(" ".join(str(error).split())) from error
