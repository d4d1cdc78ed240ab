"""MONAI's visualisations. They choose a class by its index: the score is the only one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esegeta.conformance.adapters import peers
from esegeta.conformance.adapters.peers import Column, Peer, Run

EXTRA = "test"


def _class(name: str) -> Any:
    return getattr(peers.package("monai.visualize", EXTRA), name)


def _one_by_one(explain: Callable[[Tensor], Tensor], xs: Tensor) -> Tensor:
    """They refuse batches."""
    return torch.cat([explain(x[None].clone()) for x in xs])


def _gradient(name: str, **defaults: Any) -> Callable[..., Run]:
    def prepare(**options: Any) -> Run:
        kind = _class(name)
        (settings,) = peers.split(f"monai:{name}", {**defaults, **options}, kind.__init__)

        def run(model: nn.Module, xs: Tensor) -> Tensor:
            made = kind(Column(model), **settings)
            return _one_by_one(lambda x: made(x, index=0), xs)

        return run

    return prepare


def _occlusion(**options: Any) -> Run:
    """Its box of 16 voxels would be larger than small images, and its softmax over a single score constant."""
    kind = _class("OcclusionSensitivity")
    settings: dict[str, Any] = {"verbose": False, "activate": False, "mask_size": 2}
    (more,) = peers.split("monai:OcclusionSensitivity", options, kind.__init__)

    def run(model: nn.Module, xs: Tensor) -> Tensor:
        made = kind(Column(model), **{**settings, **more})
        return _one_by_one(lambda x: made(x)[0].as_tensor(), xs)

    return run


def _cam(name: str) -> Callable[..., Run]:
    def prepare(layer: str = "deepest", **options: Any) -> Run:
        kind = _class(name)
        (settings,) = peers.split(f"monai:{name}", options, kind.__init__)

        def run(model: nn.Module, xs: Tensor) -> Tensor:
            net, where = peers.place(f"monai:{name}", model, layer, xs)
            made = kind(Column(net), target_layers=f"net.{where}", **settings)
            return made(xs.requires_grad_(), class_idx=0)

        return run

    return prepare


METHODS: dict[str, Peer] = {
    "VanillaGrad": Peer(_gradient("VanillaGrad"), axioms=peers.GRADIENT, wants="module"),
    "SmoothGrad": Peer(_gradient("SmoothGrad", verbose=False), key=True, wants="module"),
    "GuidedBackpropGrad": Peer(_gradient("GuidedBackpropGrad"), wants="module"),
    "GuidedBackpropSmoothGrad": Peer(
        _gradient("GuidedBackpropSmoothGrad", verbose=False), key=True, wants="module"
    ),
    "OcclusionSensitivity": Peer(_occlusion, one_channel=True, wants="module"),
    "GradCAM": Peer(_cam("GradCAM"), one_channel=True, wants="module"),
    "GradCAMpp": Peer(_cam("GradCAMpp"), one_channel=True, wants="module"),
}
