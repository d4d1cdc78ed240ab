"""An approximation: norms keep the statistics of one image, so that a change reaches only its neighbourhood."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from esegeta import random
from esegeta._registry import rewrite
from esegeta._types import Score
from esegeta.engine import check, interception, levels, operators, visits
from esegeta.engine.operators import Operation
from esegeta.rules.rewriting import Rewriting, rewritten
from esegeta.rules.vocabulary import NORMS

NAME = "frozen_norms"
FROZEN = NORMS | {"batch_norm"}
# What the statistics of two runs at one image may differ by, relative to their size.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


class Norm(NamedTuple):
    """A call of a norm: its image, number of groups or shape of a token, weight, bias, epsilon."""

    x: Tensor
    parts: Any
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Statistics(NamedTuple):
    """What a norm subtracts, and the square that it divides by the root of; they broadcast to one example."""

    mean: Tensor
    variance: Tensor


Known = dict[Any, Statistics]


class Frozen(Rewriting):
    """Compute norms with the statistics that are known; ``recording`` says to find them out."""

    changes_values = True
    unchanged = "It has no statistics of its own to keep: take the score itself"
    only = FROZEN
    local = True

    def __init__(self, known: Known, *, recording: bool) -> None:
        super().__init__(NAME, ())
        self.known, self.recording = known, recording

    def rule(self, op: Operation) -> Any:
        """Compute a norm with statistics that do not depend on the image, any other operation as it is."""
        norm = _norm(op)
        if norm is None:
            return op.call(*op.inputs)
        batch = _batch()
        each, odd = divmod(norm.x.shape[0], batch or norm.x.shape[0])
        each = each if batch else norm.x.shape[0]
        if odd:
            raise check.refused(
                NAME,
                "norms of tensors that begin with the batch",
                f"{check.describe(norm.x)} for a batch of {batch}{_in(op)}",
                "Take the score as it is",
            )
        place = self._place(op)
        if self.recording:
            self._record(op, place, _statistics(op.name, norm._replace(x=norm.x[:each])))
        if place not in self.known:
            raise check.refused(
                NAME,
                "a network that takes the way it took at the image of the statistics",
                f"{op.name!r}{_in(op)}, which was not met there",
                "Take the score as it is",
            )
        self.rewritten[op.name] += 1
        operators.note(op, "rewritten")
        return _normalised(op, norm, self.known[place], 1 if batch is None else batch)

    def _place(self, op: Operation) -> Any:
        """One key for every norm that a run meets: its module and how often that has been called."""
        assert op.tracer is not None
        session = visits.current()
        module = None if session is None else session.views[0].modules.get(op.where)
        where = module, op.where, op.name
        op.tracer.passed[where] += 1
        return *where, op.tracer.passed[where]

    def _record(self, op: Operation, place: Any, found: Statistics) -> None:
        before = self.known.setdefault(place, found)
        rounding = ROUNDING.get(found.mean.dtype, 1e-2)
        for old, new in zip(before, found, strict=True):
            near = old.shape == new.shape and not levels.fake(old)
            if near and bool(((old - new).abs() <= rounding * (old.abs() + new.abs() + 1)).all()):
                continue
            if not levels.fake(old):
                raise check.refused(
                    NAME,
                    "a score that runs each network once",
                    f"one in which {op.name!r}{_in(op)} has other statistics in another run",
                    "Freeze the score of one image in one run: without flips, tiles or samples around the network",
                )


def _in(op: Operation) -> str:
    return f" in {op.where!r}" if op.where else ""


def _batch() -> int | None:
    """The number of examples of the network that runs; None outside of networks."""
    session = visits.current()
    return None if session is None else session.batch


def _norm(op: Operation) -> Norm | None:
    """The call of a norm with statistics of its own; None for one that has fixed ones."""
    x, name = op.argument(0, "input"), op.name
    if name in ("layer_norm", "rms_norm"):
        bias = op.argument(3, "bias") if name == "layer_norm" else None
        eps = op.argument(4, "eps", 1e-5) if name == "layer_norm" else op.argument(3, "eps")
        shape = op.argument(1, "normalized_shape")
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return Norm(x, len(shape), op.argument(2, "weight"), bias, eps)
    if name == "group_norm":
        groups, weight, bias = (op.argument(i, n) for i, n in ((1, "num_groups"), (2, "weight"), (3, "bias")))
        return Norm(x, groups, weight, bias, op.argument(4, "eps", 1e-5))
    lower = op.function in (torch.instance_norm, torch.batch_norm)  # other orders of arguments
    first, flag = (1, "use_input_stats") if lower else (3, "use_input_stats")
    own = op.argument(5, flag if name == "instance_norm" else "training", name == "instance_norm")
    if not own:
        return None
    weight, bias = op.argument(first, "weight"), op.argument(first + 1, "bias")
    return Norm(x, None, weight, bias, op.argument(7, "eps", 1e-5))


def _statistics(name: str, norm: Norm) -> Statistics:
    """The statistics of one example."""
    x = norm.x.detach()
    if name in ("layer_norm", "rms_norm"):
        dims = list(range(x.ndim - norm.parts, x.ndim))
        if name == "rms_norm":
            square = x.square().mean(dims, keepdim=True)
            return Statistics(torch.zeros_like(square), square)
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        return Statistics(mean, variance)
    if name == "group_norm":
        grouped = x.unflatten(1, (norm.parts, -1))
        found = torch.var_mean(grouped, list(range(2, grouped.ndim)), correction=0, keepdim=True)
        wide = [t.expand(-1, -1, grouped.shape[2], *t.shape[3:]).flatten(1, 2) for t in found]
        return Statistics(wide[1], wide[0])
    dims = [*([0] if name == "batch_norm" else []), *range(2, x.ndim)]
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return Statistics(mean, variance)


def _normalised(op: Operation, norm: Norm, known: Statistics, batch: int) -> Tensor:
    x, (mean, variance) = norm.x, (t.to(norm.x.dtype) for t in known)
    if op.name not in ("layer_norm", "rms_norm") and len(mean) == 1:
        # One operation, and one that evaluation window by window knows.
        return functional.batch_norm(
            x, mean.flatten(), variance.flatten(), norm.weight, norm.bias, False, 0.0, norm.eps
        )
    if len(mean) > 1 and batch > 1:
        mean, variance = (t.repeat(batch, *[1] * (t.ndim - 1)) for t in (mean, variance))
    if any(n not in (1, m) for n, m in zip(mean.shape, x.shape, strict=True)):
        raise check.refused(
            NAME,
            f"images of the shape that the statistics{_in(op)} are of, {tuple(mean.shape)} there",
            f"{check.describe(x)}",
            "Freeze the norms at an image of that size",
        )
    channels = (lambda w: w) if op.name in ("layer_norm", "rms_norm") else _along_channels(x.ndim)
    y = (x - mean) * (variance + norm.eps).rsqrt()
    y = y if norm.weight is None else y * channels(norm.weight)
    return y if norm.bias is None else y + channels(norm.bias)


def _along_channels(ndim: int) -> Callable[[Tensor], Tensor]:
    return lambda w: w.reshape(-1, *[1] * (ndim - 2))


@rewrite(family="approximation", paper="definition", leads=1)
def frozen_norms(score: Score, *, at: Tensor) -> Score:
    r"""Return the score with the statistics of its norms kept at an image: **an approximation**, exact there only.

    .. math:: \frac{h(z) - \mu(h(z))}{\sqrt{\sigma^2(h(z)) + \epsilon}} \;\to\;
              \frac{h(z) - \mu(h(x))}{\sqrt{\sigma^2(h(x)) + \epsilon}}

    for instance, group, layer and root-mean-square norms, and for batch norm in training mode. It has the value of
    the score at x, within rounding, and is another function everywhere else; its gradient at x leaves out what
    reaches the score through the statistics. ``norm_deviation`` measures by how much it differs.

    In return a change of the image reaches as far as convolutions carry it and no further. A network such as nnU-Net,
    with an instance norm behind every convolution, becomes local: occlusion, ablation and Shapley values can
    be evaluated window by window (``docs/local_evaluation.md``). Norms written with ``mean`` and ``var`` are not
    seen.

    Args:
        score: ``(C,*S) -> ()``. It runs each of its networks once.
        at: the image x whose statistics are kept.

    Returns:
        A score of other values, but at x.

    Example:
        >>> import torch, esegeta as eg
        >>> norm = lambda x: torch.nn.functional.instance_norm(x[None], eps=0.)[0]
        >>> score = lambda x: norm(x)[0, 0]
        >>> x = torch.tensor([[0., 2., 4., 2.]])
        >>> frozen = frozen_norms(score, at=x)
        >>> bool(torch.isclose(frozen(x), score(x)))
        True
        >>> round(frozen(x + 1).item() - frozen(x).item(), 4)  # one over the deviation of x
        0.7071
        >>> round(score(x + 1).item() - score(x).item(), 4)
        0.0
    """
    check.score(NAME, score)
    check.floating(NAME, "at", at)
    if levels.depth():
        raise check.refused(
            NAME,
            "one image, outside of vmap and grad",
            f"at={check.describe(at)} under vmap or grad",
            "Freeze the norms before, once for each image",
        )
    known: Known = {}
    with torch.no_grad():
        interception.observe(NAME, score, (at.detach(),), (), rewrite=Frozen(known, recording=True))
    if not known:
        raise check.refused(
            NAME,
            "a network with norms that have statistics of their own",
            f"none of {', '.join(sorted(FROZEN))} in it",
            Frozen.unchanged,
        )
    return rewritten(score, lambda: Frozen(known, recording=False))


@dataclass(frozen=True)
class NormDeviation:
    """How much a score falls where windows are replaced: the score itself, and with its norms frozen."""

    plain: Tensor
    frozen: Tensor

    @property
    def relative(self) -> float:
        """Return the root mean square of the difference, over that of what the score itself falls by."""
        return float((self.frozen - self.plain).square().mean().sqrt() / self.plain.square().mean().sqrt())

    @property
    def largest(self) -> float:
        """Return the largest difference, over the largest fall of the score itself."""
        return float((self.frozen - self.plain).abs().max() / self.plain.abs().max())

    @property
    def correlation(self) -> float:
        """Return the correlation of both over the windows."""
        return float(torch.corrcoef(torch.stack([self.plain, self.frozen]))[0, 1])

    def __str__(self) -> str:
        return (
            f"frozen norms, {len(self.plain)} windows: off by {100 * self.relative:.3g} % in the root mean square, "
            f"{100 * self.largest:.3g} % at most; correlation {self.correlation:.4f}"
        )


def norm_deviation(score: Score, *, size: int, samples: int = 16) -> Callable[..., NormDeviation]:
    r"""Measure by how much frozen norms change what windows of an image are found to matter.

    For random windows w, within the border, both of

    .. math:: f(x) - f(x \text{ with } b \text{ in } w), \qquad
              f_x(x) - f_x(x \text{ with } b \text{ in } w)

    where :math:`f_x` is ``frozen_norms(f, at=x)``. Two evaluations for each window, and two more.

    Args:
        score: ``(C,*S) -> ()``.
        size: side of a window, in voxels; an axis that is shorter is covered.
        samples: how many windows.

    Returns:
        ``(x, baseline, key=) -> NormDeviation``, which prints as a sentence.

    Example:
        >>> import torch, esegeta as eg
        >>> norm = lambda x: torch.nn.functional.instance_norm(x[None])[0]
        >>> x = eg.random.normal(0, (1, 64))
        >>> off = norm_deviation(lambda x: norm(x)[0, 8:16].sum(), size=4)(x, torch.zeros(1, 64), key=1)
        >>> off.relative > 0, off.plain.shape
        (True, torch.Size([16]))
    """
    check.score("norm_deviation", score)
    size, samples = (
        check.positive_count("norm_deviation", n, v) for n, v in (("size", size), ("samples", samples))
    )

    def measure(x: Tensor, baseline: Tensor, *, key: int) -> NormDeviation:
        check.like("norm_deviation", "baseline", baseline, x)
        frozen = frozen_norms(score, at=x)
        shares = random.uniform(key, (samples, x.ndim - 1), dtype=torch.float64).tolist()
        extent = [min(size, n) for n in x.shape[1:]]
        found = []
        with torch.no_grad():
            clean = score(x), frozen(x)
            for row in shares:
                corner = [int(u * (n - m + 1)) for u, n, m in zip(row, x.shape[1:], extent, strict=True)]
                box = (slice(None), *(slice(a, a + m) for a, m in zip(corner, extent, strict=True)))
                changed = x.clone()
                changed[box] = baseline[box]
                found.append(torch.stack([clean[0] - score(changed), clean[1] - frozen(changed)]).double())
        plain, kept = torch.stack(found, 1)
        return NormDeviation(plain, kept)

    return measure
