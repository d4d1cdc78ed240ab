"""pytorch-grad-cam's maps, as it returns them: rectified, resized to the input and scaled to [0, 1]."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esegeta.conformance.adapters import peers
from esegeta.conformance.adapters.peers import Column, Peer, Run

EXTRA = "test"


def _package() -> Any:
    peers.torchvision()
    return peers.package("pytorch_grad_cam", EXTRA)


def _score(output: Tensor) -> Tensor:
    """What it calls a target: of the outputs of one example the only one."""
    return output[0]


def _maps(made: Any, xs: Tensor, call: Mapping[str, Any]) -> Tensor:
    """Its maps, (B, *S). Its own ``with`` hides errors, and its own cleaning up fails where a gradient is a view."""
    hooks = made.activations_and_grads
    try:
        return torch.as_tensor(made(xs.requires_grad_(), [_score] * len(xs), **call))
    finally:
        for handle in hooks.handles:
            handle.remove()
        hooks.activations.clear()
        hooks.gradients.clear()


def _cam(name: str) -> Callable[..., Run]:
    def prepare(layer: str = "deepest", **options: Any) -> Run:
        kind = getattr(_package(), name)
        constructor, call = peers.split(f"grad_cam:{name}", options, kind.__init__, kind.__call__)

        def run(model: nn.Module, xs: Tensor) -> Tensor:
            net, where = peers.place(f"grad_cam:{name}", model, layer, xs)
            # It hears of a gradient only where the activation requires one.
            column = Column(net).requires_grad_()
            return _maps(kind(column, [net.get_submodule(where)], **constructor), xs, call)[:, None]

        return run

    return prepare


def _everywhere(**options: Any) -> Run:
    """FullGrad takes all layers with a bias."""
    kind = _package().FullGrad
    constructor, call = peers.split("grad_cam:FullGrad", options, kind.__init__, kind.__call__)

    def run(model: nn.Module, xs: Tensor) -> Tensor:
        maps = _maps(kind(Column(model).requires_grad_(), [], **constructor), xs, call)
        return maps.reshape(len(xs), 1, *xs.shape[2:])

    return run


def _guided(**options: Any) -> Run:
    """Its guided backpropagation takes one image, and gives the channels last."""
    kind = _package().GuidedBackpropReLUModel
    (settings,) = peers.split("grad_cam:GuidedBackpropReLUModel", options, kind.__init__)

    def run(model: nn.Module, xs: Tensor) -> Tensor:
        made = kind(Column(model).requires_grad_(), **settings)
        return torch.stack([torch.as_tensor(made(x[None].clone(), 0)).movedim(-1, 0) for x in xs])

    return run


_MAPS = (
    "GradCAM",
    "HiResCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "XGradCAM",
    "LayerCAM",
    "EigenCAM",
    "EigenGradCAM",
    "SegEigenCAM",
    "KPCA_CAM",
    "ShapleyCAM",
    "FEM",
    "ScoreCAM",
    "AblationCAM",
)

METHODS: dict[str, Peer] = {
    **{name: Peer(_cam(name), one_channel=True, wants="module") for name in _MAPS},
    "RandomCAM": Peer(_cam("RandomCAM"), key=True, one_channel=True, wants="module"),
    "FullGrad": Peer(_everywhere, one_channel=True, wants="module"),
    "GuidedBackpropReLUModel": Peer(_guided, wants="module"),
}
