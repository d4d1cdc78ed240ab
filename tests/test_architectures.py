"""Architectures that people have, put to every method: a finite map of the right shape, or a refusal in our words.

The networks are small and their weights are drawn. Every refusal that is expected is named, so that a method which
begins or ceases to refuse a network is noticed.
"""

import inspect
import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esegeta as eg
from esegeta._registry import METHODS
from esegeta.conformance.adapters.peers import torchvision

pytestmark = pytest.mark.zoo

# Every error of this library: what was expected, what came instead, what to do.
OUR_WORDS = re.compile(r"[^:]+: expected .+, got .+\..+", re.DOTALL)
KEY = 20


@dataclass(frozen=True)
class Architecture:
    """A network, the input that it takes, and where methods at a place look; by default the coarsest grid."""

    library: str
    build: Callable[[Any], nn.Module]
    shape: tuple[int, ...]
    place: str = ""
    output: Any = None
    refused: dict[str, str] = field(default_factory=dict)  # by method: what its refusal says


def monai(name: str, *args: Any, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda library: getattr(library, name)(*args, **options)


def timm(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda library: library.create_model(name, **options)


def smp(name: str, encoder: str = "resnet18", **options: Any) -> Callable[[Any], nn.Module]:
    chosen = {"encoder_name": encoder, "encoder_weights": None, "in_channels": 1, "classes": 2, **options}
    return lambda library: getattr(library, name)(**chosen)


def nnunet(name: str, axes: int, **options: Any) -> Callable[[Any], nn.Module]:
    def build(library: Any) -> nn.Module:
        def of(kind: str) -> Any:
            return getattr(nn, f"{kind}{axes}d")

        own = {"norm_op": of("InstanceNorm"), "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
        own |= {"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}, "conv_bias": True, **options}
        if own.pop("dropout", False):
            own |= {"dropout_op": of("Dropout"), "dropout_op_kwargs": {"p": 0.1, "inplace": False}}
        return getattr(library, name)(
            input_channels=1,
            n_stages=3,
            features_per_stage=(4, 8, 8),
            conv_op=of("Conv"),
            kernel_sizes=3,
            strides=(1, 2, 2),
            num_classes=2,
            n_conv_per_stage_decoder=1,
            **own,
        )

    return build


MONAI, TIMM, SMP = "monai.networks.nets", "timm", "segmentation_models_pytorch"
NNUNET = "dynamic_network_architectures.architectures.unet"
FLAT, SOLID = (1, 32, 32), (1, 16, 16, 16)

# Evolved norms divide by a standard deviation of their own, for which these have no rule.
NO_VARIANCE = dict.fromkeys(("contrastive_excitation_backprop", "excitation_backprop", "lrp"), "got 'var' on")

ARCHITECTURES = {
    "monai UNet": Architecture(
        MONAI, monai("UNet", 3, 1, 2, (4, 8, 8), (2, 2), num_res_units=1, dropout=0.1), SOLID
    ),
    "monai UNet instance norm": Architecture(MONAI, monai("UNet", 2, 1, 2, (4, 8, 8), (2, 2)), FLAT),
    "monai BasicUNet": Architecture(MONAI, monai("BasicUNet", 2, 1, 2, (4, 4, 4, 8, 8, 4)), FLAT),
    "monai BasicUNetPlusPlus": Architecture(
        MONAI, monai("BasicUNetPlusPlus", 2, 1, 2, (4, 4, 4, 8, 8, 4)), FLAT, output=0
    ),
    "monai DynUNet": Architecture(
        MONAI,
        monai("DynUNet", 3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8], dropout=0.1),
        SOLID,
    ),
    "monai SegResNet": Architecture(
        MONAI, monai("SegResNet", 3, 4, 1, 2, norm=("GROUP", {"num_groups": 2}), dropout_prob=0.1), SOLID
    ),
    "monai SegResNetDS": Architecture(MONAI, monai("SegResNetDS", 2, 4, 1, 2, blocks_down=(1, 1, 1)), FLAT),
    "monai SegResNetVAE": Architecture(
        MONAI,
        monai("SegResNetVAE", (16, 16, 16), spatial_dims=3, init_filters=8, in_channels=1, out_channels=2),
        SOLID,
        output=0,
    ),
    "monai AttentionUnet": Architecture(MONAI, monai("AttentionUnet", 2, 1, 2, (4, 8, 8), (2, 2)), FLAT),
    "monai VNet": Architecture(
        MONAI, monai("VNet", 2, 1, 2, dropout_prob_down=0.1, dropout_prob_up=(0.1, 0.1)), FLAT
    ),
    "monai HighResNet": Architecture(MONAI, monai("HighResNet", 2, 1, 2, dropout_prob=0.1), FLAT),
    "monai UNETR": Architecture(
        MONAI,
        monai(
            "UNETR", 1, 2, (32, 32), feature_size=4, hidden_size=16, mlp_dim=16, num_heads=2, spatial_dims=2
        ),
        FLAT,
    ),
    "monai UNETR 3-D fused attention": Architecture(
        MONAI,
        monai("UNETR", 1, 2, (16, 16, 16), feature_size=2, hidden_size=8, mlp_dim=8, num_heads=2),
        SOLID,
    ),
    "monai SwinUNETR": Architecture(
        MONAI,
        monai(
            "SwinUNETR", 1, 2, spatial_dims=2, feature_size=12, num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1)
        ),
        (1, 64, 64),
    ),
    "monai FlexibleUNet": Architecture(
        MONAI,
        monai("FlexibleUNet", 1, 2, "resnet10", decoder_channels=(8, 8, 4, 4, 4), spatial_dims=2),
        FLAT,
    ),
    "monai MedNeXt": Architecture(
        MONAI,
        monai(
            "MedNeXt",
            2,
            4,
            1,
            2,
            encoder_expansion_ratio=2,
            decoder_expansion_ratio=2,
            bottleneck_expansion_ratio=2,
            blocks_down=(1, 1, 1, 1),
            blocks_bottleneck=1,
            blocks_up=(1, 1, 1, 1),
        ),
        FLAT,
    ),
    "monai DenseNet121": Architecture(
        MONAI, monai("DenseNet121", 2, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2, 2, 2)), FLAT
    ),
    "monai ResNet": Architecture(
        MONAI,
        monai(
            "ResNet", "basic", [1, 1, 1, 1], [4, 8, 8, 8], spatial_dims=3, n_input_channels=1, num_classes=3
        ),
        SOLID,
    ),
    "monai EfficientNetBN": Architecture(
        MONAI,
        monai(
            "EfficientNetBN",
            "efficientnet-b0",
            pretrained=False,
            spatial_dims=2,
            in_channels=1,
            num_classes=3,
        ),
        FLAT,
    ),
    "monai SENet": Architecture(
        MONAI,
        lambda library: library.SENet(
            2, 1, "se_bottleneck", [1, 1, 1, 1], 4, 4, dropout_prob=0.2, num_classes=3, inplanes=8
        ),
        FLAT,
    ),
    "monai ViT": Architecture(
        MONAI,
        monai("ViT", 1, (32, 32), (8, 8), 16, 16, 2, 2, classification=True, num_classes=3, spatial_dims=2),
        FLAT,
        output=0,
    ),
    "timm resnet18": Architecture(TIMM, timm("test_resnet", in_chans=1, num_classes=3), FLAT),
    "timm byobnet": Architecture(TIMM, timm("test_byobnet", in_chans=1, num_classes=3), FLAT),
    "timm convnext": Architecture(TIMM, timm("test_convnext", in_chans=1, num_classes=3), FLAT),
    "timm efficientnet": Architecture(TIMM, timm("test_efficientnet", in_chans=1, num_classes=3), FLAT),
    "timm efficientnet_evos": Architecture(
        TIMM, timm("test_efficientnet_evos", in_chans=1, num_classes=3), FLAT, refused=NO_VARIANCE
    ),
    "timm mambaout": Architecture(TIMM, timm("test_mambaout", in_chans=1, num_classes=3), FLAT),
    "timm nfnet": Architecture(TIMM, timm("test_nfnet", in_chans=1, num_classes=3), FLAT),
    "timm mobilenetv3": Architecture(
        TIMM, timm("mobilenetv3_small_050", in_chans=1, num_classes=3), (1, 64, 64)
    ),
    "timm vit": Architecture(TIMM, timm("test_vit", in_chans=1, num_classes=3, img_size=32), FLAT),
    "timm vit pooled": Architecture(TIMM, timm("test_vit3", in_chans=1, num_classes=3, img_size=32), FLAT),
    "timm swin": Architecture(
        TIMM,
        timm(
            "swin_tiny_patch4_window7_224",
            in_chans=1,
            num_classes=3,
            img_size=32,
            window_size=4,
            embed_dim=8,
            depths=(1, 1),
            num_heads=(1, 2),
        ),
        FLAT,
    ),
    "smp Unet": Architecture(SMP, smp("Unet", decoder_channels=(16, 8, 8, 4, 4)), FLAT),
    "smp Unet scse mobilenet": Architecture(
        SMP,
        smp(
            "Unet",
            "timm-mobilenetv3_small_minimal_100",
            decoder_channels=(16, 16, 16, 16, 16),
            decoder_attention_type="scse",
        ),
        FLAT,
    ),
    "smp UnetPlusPlus": Architecture(SMP, smp("UnetPlusPlus", decoder_channels=(8, 8, 8, 4, 4)), FLAT),
    "smp MAnet": Architecture(SMP, smp("MAnet", decoder_channels=(16, 8, 8, 4, 4)), FLAT),
    "smp Linknet": Architecture(SMP, smp("Linknet"), FLAT),
    "smp FPN": Architecture(
        SMP, smp("FPN", decoder_pyramid_channels=16, decoder_segmentation_channels=32), (1, 64, 64)
    ),
    "smp PSPNet": Architecture(SMP, smp("PSPNet", psp_out_channels=16), FLAT),
    "smp PAN": Architecture(SMP, smp("PAN", decoder_channels=8), (1, 128, 128)),
    "smp DeepLabV3Plus": Architecture(SMP, smp("DeepLabV3Plus", decoder_channels=16), (1, 64, 64)),
    "smp UPerNet": Architecture(SMP, smp("UPerNet", decoder_channels=16), FLAT),
    "smp Segformer": Architecture(
        SMP, smp("Segformer", "mit_b0", decoder_segmentation_channels=16, in_channels=3), (3, 32, 32)
    ),
    "nnU-Net plain 3-D": Architecture(NNUNET, nnunet("PlainConvUNet", 3, n_conv_per_stage=2), SOLID),
    "nnU-Net plain 2-D with dropout": Architecture(
        NNUNET, nnunet("PlainConvUNet", 2, n_conv_per_stage=1, dropout=True), FLAT
    ),
    "nnU-Net residual encoder": Architecture(
        NNUNET, nnunet("ResidualEncoderUNet", 2, n_blocks_per_stage=1), FLAT
    ),
}
# One of every kind: norm, dropout and activation in MONAI's order, as_tensor, attention, hard sigmoid, ReLU and
# batch norm, nnU-Net. These run with the slow tests, the whole matrix only with ``-m zoo``.
SAMPLE = (
    "monai UNet instance norm",
    "monai HighResNet",
    "monai ViT",
    "timm mobilenetv3",
    "smp Unet",
    "nnU-Net plain 2-D with dropout",
)


def few(spec: Any, x: Tensor) -> dict[str, Any]:
    """The settings of a method with which it runs the network a few times only."""
    half = [max(n // 2, 1) for n in x.shape[1:]]
    chosen: dict[str, Any] = {
        "steps": 2,
        "samples": 4,
        "features": eg.features.grid(half),
        "max_runs": 16,
        "cells": 2,
    }
    if spec.name in ("occlusion", "gaussian_occlusion"):
        chosen |= {"size": half, "stride": half}
    if spec.name == "adaptive_integrated_gradients":
        chosen |= {"tolerance": 0.5}
    if spec.name in ("kernel_shap", "lime", "hsic_attribution"):
        chosen |= {"samples": 24}
    if spec.name == "cam":
        chosen |= {"exact": False}
    if spec.name == "blur_integrated_gradients":
        chosen |= {"sigma": 2.0}
    if spec.name in ("extremal_perturbation", "meaningful_perturbation"):
        chosen |= {"area": 0.25}
    taken = inspect.signature(spec.fn).parameters
    return {name: value for name, value in chosen.items() if name in taken}


def network(architecture: Architecture) -> nn.Module:
    """The architecture with drawn weights, none of them exactly zero, and with statistics of its own."""
    torchvision()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # what other libraries say when they are imported
        library = pytest.importorskip(architecture.library)
        torch.manual_seed(KEY)
        module = architecture.build(library).eval()
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.02 * torch.randn_like(p))
            for m in module.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
                    m.running_mean.add_(0.1 * torch.randn_like(m.running_mean))
                    m.running_var.mul_(0.5 + torch.rand_like(m.running_var))
    return module


def sensible_place(model: Any, x: Tensor) -> str:
    """The last module that makes a feature map on the coarsest grid with more than one point."""
    found = [p for p in eg.places(model, x) if p.kind == "module" and p.used and len(p.shape) == x.ndim]
    grids = [p for p in found if p.shape[0] > 1 and p.shape[1:].count(1) < x.ndim - 1]
    least = min(torch.Size(p.shape[1:]).numel() for p in grids)
    return [p.name for p in grids if torch.Size(p.shape[1:]).numel() == least][-1]


def explained(spec: Any, score: Any, place: str, x: Tensor) -> Tensor:
    """The map of one cell."""
    where = (place,) if spec.place else ()
    explain = spec.fn(score, *where, **few(spec, x))
    made = {"baseline": torch.zeros_like(x), "baselines": torch.stack([torch.zeros_like(x), x.flip(-1)])}
    return explain(x, *[made[ref] for ref in spec.refs], **({"key": KEY} if spec.key else {}))


def fault(spec: Any, a: Tensor, x: Tensor, activation: Tensor) -> str:
    """What is wrong with a map, or nothing."""
    like = activation if spec.place else x
    shapes = {"input": x.shape, "layer": activation.shape, "map": (1, *like.shape[1:])}
    if a.shape != shapes[spec.shape]:
        return f"shape {tuple(a.shape)} instead of {tuple(shapes[spec.shape])}"
    return "" if a.isfinite().all() else "not finite"


def matrix(architecture: Architecture, names: Any = None) -> tuple[dict[str, str], list[str]]:
    """The refusals of every method on one architecture, and everything that is no answer in our words."""
    model = eg.from_module(network(architecture), architecture.output)
    x = torch.randn(architecture.shape, generator=torch.Generator().manual_seed(KEY))
    y = model(x)
    score = eg.reducers.class_sum(model, 1) if y.ndim > 1 else eg.reducers.logit(model, 1)
    place = architecture.place or sensible_place(model, x)
    activation = eg.tap(score, place)(x)
    refusals, faults = {}, []
    for name, spec in sorted(METHODS.items()):
        if names is not None and name not in names:
            continue
        try:
            wrong = fault(spec, explained(spec, score, place, x), x, activation)
        except Exception as error:
            text = str(error)
            if OUR_WORDS.fullmatch(text) and isinstance(error, (ValueError, TypeError, RuntimeError)):
                refusals[name], wrong = text, ""
            else:
                wrong = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
                wrong += "\n" + "".join(traceback.format_exc().splitlines(True)[-12:])
        if wrong:
            faults.append(f"{name} at {place}: {wrong}" if spec.place else f"{name}: {wrong}")
    return refusals, faults


def cells(name: str) -> Any:
    """An architecture as a case: a sample is among the slow tests, the others are for the night."""
    mark = pytest.mark.slow if name in SAMPLE else pytest.mark.nightly
    return pytest.param(name, marks=mark, id=name)


@pytest.mark.filterwarnings("ignore::esegeta.ExecutionWarning")  # a few steps are not enough, which is said
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", [cells(name) for name in ARCHITECTURES])
def test_every_method_has_an_answer(name: str) -> None:
    """A finite map of the right shape, or the refusal that is expected: never an error of torch."""
    architecture = ARCHITECTURES[name]
    refusals, faults = matrix(architecture)
    assert not faults, "\n\n".join(faults)
    assert refusals.keys() == architecture.refused.keys(), refusals
    for method, text in refusals.items():
        assert re.search(architecture.refused[method], text), text


def test_the_matrix_notices_what_is_wrong() -> None:
    """An error of torch is a fault, and so are a map of another shape and one that is not finite."""
    x, activation, spec = torch.zeros(1, 4, 4), torch.zeros(3, 2, 2), METHODS["grad_cam"]
    assert fault(spec, torch.zeros(1, 2, 2), x, activation) == ""
    assert fault(spec, torch.zeros(1, 4, 4), x, activation) == "shape (1, 4, 4) instead of (1, 2, 2)"
    assert fault(spec, torch.full((1, 2, 2), torch.nan), x, activation) == "not finite"
    assert not OUR_WORDS.fullmatch("The size of tensor a (48) must match the size of tensor b (32)")

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise RuntimeError("no such thing")

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return Own.apply(self.conv(x))

    architecture = Architecture("torch", lambda _: Failing(), (1, 8, 8), "conv")
    refusals, faults = matrix(architecture, ("gradient", "occlusion", "lrp"))
    assert [text.splitlines()[0] for text in faults] == ["gradient: RuntimeError: no such thing"]
    assert refusals.keys() == {"lrp"}
    assert "custom autograd.Function" in refusals["lrp"]
