"""zennit's attributors and composites.

A composite that spreads relevance starts from the score, which is its default. An attributor that is a gradient
starts from one: by default it would start from the score too, and explain half of its square.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esegeta.conformance.adapters import peers
from esegeta.conformance.adapters.peers import Peer, Run

EXTRA = "test"


def _part(part: str) -> Any:
    peers.torchvision()
    return peers.package(f"zennit.{part}", EXTRA)


def _attributor(name: str) -> Callable[..., Run]:
    def prepare(**options: Any) -> Run:
        kind = getattr(_part("attribution"), name)
        (settings,) = peers.split(f"zennit:{name}", options, kind.__init__)

        def run(model: Callable[[Tensor], Tensor], xs: Tensor, *refs: Tensor) -> Tensor:
            baseline = {"baseline_fn": lambda _: refs[0]} if refs else {}
            with kind(model=model, attr_output=torch.ones_like, **baseline, **settings) as attributor:
                return attributor(xs)[1]

        return run

    return prepare


def _occlusion(**options: Any) -> Run:
    """It gives every window the score of the image with nothing but that window. Its 8 voxels would be all of it."""
    kind = _part("attribution").Occlusion
    (settings,) = peers.split("zennit:Occlusion", {"window": 2, "stride": 2, **options}, kind.__init__)

    def run(model: Callable[[Tensor], Tensor], xs: Tensor) -> Tensor:
        return kind(model=lambda batch: model(batch)[:, None], **settings)(xs)[1]

    return run


def _composite(name: str, relevance: bool = True, **defaults: Any) -> Callable[..., Run]:
    def prepare(**options: Any) -> Run:
        kind = getattr(_part("composites"), name)
        (settings,) = peers.split(f"zennit:{name}", {**defaults, **options}, kind.__init__)
        gradient = _part("attribution").Gradient
        start = {} if relevance else {"attr_output": torch.ones_like}

        def run(model: torch.nn.Module, xs: Tensor) -> Tensor:
            with gradient(model=model, composite=kind(**settings), **start) as attributor:
                return attributor(xs)[1]

        return run

    return prepare


def _relevance(name: str, **defaults: Any) -> Peer:
    return Peer(_composite(name, **defaults), axioms=frozenset({"conservation"}), wants="module")


METHODS: dict[str, Peer] = {
    "Gradient": Peer(_attributor("Gradient"), axioms=peers.GRADIENT),
    "SmoothGrad": Peer(
        _attributor("SmoothGrad"),
        key=True,
        axioms=frozenset({"linearity", "dummy", "implementation_invariance"}),
    ),
    "IntegratedGradients": Peer(_attributor("IntegratedGradients"), ("baseline",), axioms=peers.PATH),
    "Occlusion": Peer(_occlusion, axioms=frozenset({"implementation_invariance"})),
    "EpsilonPlus": _relevance("EpsilonPlus"),
    "EpsilonPlusFlat": _relevance("EpsilonPlusFlat"),
    "EpsilonAlpha2Beta1": _relevance("EpsilonAlpha2Beta1"),
    "EpsilonAlpha2Beta1Flat": _relevance("EpsilonAlpha2Beta1Flat"),
    # It has no default for the box: wide enough for normalised images.
    "EpsilonGammaBox": _relevance("EpsilonGammaBox", low=-10.0, high=10.0),
    "ExcitationBackprop": _relevance("ExcitationBackprop"),
    "BetaSmooth": Peer(_composite("BetaSmooth", relevance=False), wants="module"),
    "GuidedBackprop": Peer(_composite("GuidedBackprop", relevance=False), wants="module"),
    "DeconvNet": Peer(_composite("DeconvNet", relevance=False), wants="module"),
}
