"""captum's attributions. Options go to the constructor or to ``attribute``, whichever takes them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from esegeta.conformance.adapters import peers
from esegeta.conformance.adapters.peers import Peer, Run

EXTRA = "test"

# It keeps the weights of its quadratures, and the nodes of some, in float32.
FLOAT32 = 2.0**-21


def _class(name: str) -> Any:
    return getattr(peers.package("captum.attr", EXTRA), name)


def _ready(name: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    kind = _class(name)
    constructor, call = peers.split(f"captum:{name}", options, kind.__init__, kind.attribute)
    return kind, constructor, call


def _keywords(names: tuple[str, ...], refs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(names, refs, strict=True))


def _plain(name: str, taken: tuple[str, ...] = (), window: bool = False) -> Callable[..., Run]:
    """A class that explains the input; its references go to the arguments of the names ``taken``."""

    def prepare(**options: Any) -> Run:
        kind, constructor, call = _ready(name, options)

        def run(model: Callable[[Tensor], Tensor], xs: Tensor, *refs: Tensor) -> Tensor:
            given = {"sliding_window_shapes": _window(xs)} if window else {}
            return kind(model, **constructor).attribute(
                xs.requires_grad_(), **_keywords(taken, refs), **{**given, **call}
            )

        return run

    return prepare


def _window(xs: Tensor) -> tuple[int, ...]:
    """It has no default of its own: two voxels along every axis that has them, one channel."""
    return (1, *(min(2, n) for n in xs.shape[2:]))


def _tunnel(**options: Any) -> Run:
    """Its noise tunnel around the plain gradient: SmoothGrad, by its options also SmoothGrad squared and VarGrad."""
    kind, _, call = _ready("NoiseTunnel", options)
    gradient = partial(_class("Saliency"))
    return lambda model, xs: kind(gradient(model)).attribute(xs.requires_grad_(), **{"abs": False, **call})


def _layered(name: str, taken: tuple[str, ...] = ()) -> Callable[..., Run]:
    """A class that explains a layer: the deepest convolution, or the one that the option ``layer`` names."""

    def prepare(layer: str = "deepest", **options: Any) -> Run:
        kind, constructor, call = _ready(name, options)

        def run(model: nn.Module, xs: Tensor, *refs: Tensor) -> Tensor:
            net, where = peers.place(f"captum:{name}", model, layer, xs)
            made = kind(net, net.get_submodule(where), **constructor)
            found = made.attribute(xs.requires_grad_(), **_keywords(taken, refs), **call)
            return found[0] if isinstance(found, tuple) else found

        return run

    return prepare


def _steps(options: Mapping[str, Any]) -> int | None:
    """Only Gauss and Legendre's rule has the excuse of a quadrature of that order."""
    return options.get("n_steps", 50) if options.get("method", "gausslegendre") == "gausslegendre" else None


_ONE, _MANY = ("baseline",), ("baselines",)
_TAKEN = ("baselines",)

METHODS: dict[str, Peer] = {
    "Saliency": Peer(_plain("Saliency")),
    "InputXGradient": Peer(_plain("InputXGradient"), axioms=peers.GRADIENT),
    "IntegratedGradients": Peer(
        _plain("IntegratedGradients", _TAKEN), _ONE, axioms=peers.PATH, nodes=_steps, accuracy=FLOAT32
    ),
    "GradientShap": Peer(_plain("GradientShap", _TAKEN), _MANY, True, peers.GRADIENT | {"shift"}),
    "NoiseTunnel": Peer(
        _tunnel, key=True, axioms=frozenset({"dummy", "linearity", "implementation_invariance"})
    ),
    "DeepLift": Peer(_plain("DeepLift", _TAKEN), _ONE, axioms=peers.COMPLETE, wants="module"),
    "DeepLiftShap": Peer(_plain("DeepLiftShap", _TAKEN), _MANY, axioms=peers.COMPLETE, wants="module"),
    "GuidedBackprop": Peer(_plain("GuidedBackprop"), wants="module"),
    "Deconvolution": Peer(_plain("Deconvolution"), wants="module"),
    "LRP": Peer(_plain("LRP"), axioms=frozenset({"conservation"}), wants="module"),
    "FeatureAblation": Peer(_plain("FeatureAblation", _TAKEN), _ONE, axioms=peers.GRADIENT | {"shift"}),
    "Occlusion": Peer(_plain("Occlusion", _TAKEN, window=True), _ONE, axioms=peers.GRADIENT - {"symmetry"}),
    "ShapleyValueSampling": Peer(_plain("ShapleyValueSampling", _TAKEN), _ONE, True, peers.SHAPLEY),
    "KernelShap": Peer(_plain("KernelShap", _TAKEN), _ONE, True, peers.COMPLETE),
    "Lime": Peer(_plain("Lime", _TAKEN), _ONE, True),
    "GuidedGradCam": Peer(_layered("GuidedGradCam"), wants="module"),
    "LayerGradCam": Peer(
        _layered("LayerGradCam"), axioms=frozenset({"linearity"}), one_channel=True, wants="module"
    ),
    "LayerGradientXActivation": Peer(
        _layered("LayerGradientXActivation"), axioms=frozenset({"linearity"}), wants="module"
    ),
    "LayerActivation": Peer(_layered("LayerActivation"), wants="module"),
    "LayerConductance": Peer(
        _layered("LayerConductance", _TAKEN), _ONE, axioms=peers.COMPLETE, wants="module", accuracy=FLOAT32
    ),
    "InternalInfluence": Peer(
        _layered("InternalInfluence", _TAKEN), _ONE, axioms=frozenset({"linearity"}), wants="module"
    ),
    "LayerIntegratedGradients": Peer(
        _layered("LayerIntegratedGradients", _TAKEN),
        _ONE,
        axioms=peers.COMPLETE,
        wants="module",
        nodes=_steps,
        accuracy=FLOAT32,
    ),
    "LayerGradientShap": Peer(_layered("LayerGradientShap", _TAKEN), _MANY, True, wants="module"),
    "LayerDeepLift": Peer(_layered("LayerDeepLift", _TAKEN), _ONE, axioms=peers.COMPLETE, wants="module"),
    "LayerDeepLiftShap": Peer(
        _layered("LayerDeepLiftShap", _TAKEN), _MANY, axioms=peers.COMPLETE, wants="module"
    ),
    "LayerFeatureAblation": Peer(_layered("LayerFeatureAblation"), wants="module"),
    "LayerLRP": Peer(_layered("LayerLRP"), axioms=frozenset({"conservation"}), wants="module"),
}
