"""Whether a library explains an example the same alone and in a batch."""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from esegeta._facts import declared
from esegeta.conformance.finding import of
from esegeta.conformance.functions import call
from esegeta.conformance.lawbook import MethodLaw
from esegeta.conformance.subjects import Subject
from esegeta.conformance.verdicts import Verdict
from esegeta.conformance.verify import decided
from esegeta.engine import check


class _Softmax(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.softmax = net, nn.Softmax(1)

    def forward(self, batch: Tensor) -> Tensor:
        z = self.net(batch)
        return self.softmax(torch.stack([z, torch.zeros_like(z)], 1))[:, 0]


@dataclass(frozen=True, repr=False)
class Probability:
    """The probability of one of two classes, of which the other has the logit zero, by a module that is a softmax.

    >>> from esegeta.conformance.networks import Network
    >>> Probability(Network((1, 2)))(torch.zeros(1, 2, dtype=torch.float64)).item()
    0.5
    """

    inner: Any

    degree = None
    piecewise_linear = False

    def __repr__(self) -> str:
        return call(self)

    def __call__(self, x: Tensor) -> Tensor:
        """The value at one example."""
        return torch.sigmoid(self.inner(x))

    @property
    def module(self) -> nn.Module:
        """The same as a network of batches."""
        return _Softmax(self.inner.module)

    @property
    def smooth(self) -> bool:
        """Return whether what is inside is smooth."""
        return bool(self.inner.smooth)

    @property
    def operations(self) -> int:
        """Some more than inside."""
        return int(self.inner.operations) + 8

    def majorant(self, x: Tensor) -> Tensor:
        """Return a size that no value inside exceeds: it is less steep than what is inside."""
        return self.inner.majorant(x) + 1

    def to(self, dtype: str) -> "Probability":
        """Return the same in another precision."""
        return replace(self, inner=self.inner.to(dtype))


@dataclass(frozen=True)
class Together(MethodLaw):
    """An example gets the same attribution whatever else is in its batch."""

    mate: Any

    @classmethod
    def applies(cls, subject: Subject) -> str:
        """Return a reason if the subject draws at random: draws are made for a batch as a whole."""
        return "it draws at random" if subject.key else ""

    def measure(self, subject: Subject) -> tuple[float, float]:
        """Return how much an attribution changes beside another example, and what rounding may do."""
        case, explain = self.case, subject.build(self.case.score)
        refs = case.refs(subject.refs)
        given = [
            r.expand(2, *r.shape) if k == "baseline" else r for k, r in zip(subject.refs, refs, strict=True)
        ]
        batched: Any = declared(explain).batched
        if batched is None:
            raise check.refused_type(
                subject.name, "an explanation with batched", "one without", "Give it that attribute"
            )
        both = batched(torch.stack([case.x, torch.as_tensor(self.mate).to(case.x)]), *given)
        alone = explain(case.x, *refs)
        return float((both[0] - alone).abs().amax()), case.rounding(alone.abs().amax())


def examples_apart(
    method: str | Subject, *, cases: int = 100, seconds: float | int | None = None, seed: int = 0
) -> Verdict:
    """Search for a network and two examples of which one is explained otherwise beside the other.

    Args:
        method: a name for ``adapters.find``, or a subject whose explanations have ``batched``.
        cases: how many to try.
        seconds: after which the search ends.
        seed: of the random cases.

    Returns:
        A verdict with the smallest counterexample.

    Example:
        >>> examples_apart("captum:InputXGradient", cases=40).kind
        'holds'
    """
    subject = of(method)
    reason = Together.applies(subject)
    if reason:
        return Verdict("examples_apart", "not applicable", why=reason)
    from hypothesis import strategies as st

    from esegeta.conformance import search, strategies

    def situations(shape: tuple[int, ...]) -> st.SearchStrategy[Together]:
        net = strategies.networks(shape=shape)
        case = strategies.cases(net | st.builds(Probability, net), shape=shape)
        return st.builds(Together, case, strategies.images(shape))

    until = math.inf if seconds is None else time.monotonic() + seconds
    found = search.smallest(
        strategies.shapes().flatmap(situations),
        lambda situation: situation.measure(subject),
        search.Search(cases, until, seed),
        lambda situation: situation.trivial,
    )
    return decided("examples_apart", found, cases)
