"""zennit's relevance: the same rules, on networks of modules, with and without a batch norm to merge."""

import importlib
import warnings

import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta import rules

pytestmark = pytest.mark.peers
CLOSE = 1e-5


@pytest.fixture(scope="module")
def zennit():
    """It imports torchvision, which beside another build of torch does not find its operators."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    found = pytest.importorskip("zennit")
    for part in ("attribution", "canonizers", "composites", "rules", "types"):
        importlib.import_module(f"zennit.{part}")
    return found


def network(norm, pool):
    # zennit leaves its merged norms behind, which then divide by sqrt(1 + eps).
    batch_norm = lambda n: nn.BatchNorm3d(n, eps=1e-9)
    layers = [nn.Conv3d(2, 4, 3, padding=1), batch_norm(4), nn.ReLU()]
    layers += [nn.MaxPool3d(2) if pool == "max" else nn.AvgPool3d(2), nn.Conv3d(4, 6, 3, stride=2)]
    layers += [batch_norm(6), nn.ReLU(), nn.ConvTranspose3d(6, 3, 2, stride=2), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(192, 5), nn.ReLU(), nn.Linear(5, 3)]
    net = nn.Sequential(*[m for m in layers if norm or not isinstance(m, nn.BatchNorm3d)]).double().eval()
    with torch.no_grad():
        for i, (name, p) in enumerate([*net.named_parameters(), *net.named_buffers()]):
            if p.is_floating_point():
                p.copy_(eg.random.normal(10 * i + 3, p.shape, dtype=p.dtype) / max(1, p[0].numel()) ** 0.5)
            if "running_var" in name:
                p.copy_(0.5 + p.abs())
    return net.requires_grad_(False)


def theirs(zennit, net, x, composite):
    with zennit.attribution.Gradient(model=net, composite=composite) as attributor, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, relevance = attributor(x[None], lambda z: z * torch.tensor([0.0, 1.0, 0.0]).to(z))
    return relevance[0].detach()


def ours(net, x, composite):
    return eg.lrp(eg.reducers.logit(eg.from_module(net), 1), composite=composite)(x)


def pairs(zennit, name):
    r, low, high = zennit.rules, -4.0, 4.0
    # An average is shared out exactly here; there with a stabiliser.
    exact = [(zennit.types.AvgPool, r.Norm(stabilizer=1e-12))]
    everywhere = lambda rule: zennit.composites.LayerMapComposite(
        layer_map=[*exact, *zennit.composites.layer_map_base(), (zennit.types.Linear, rule)],
        canonizers=[zennit.canonizers.SequentialMergeBatchNorm()],
    )
    first = lambda rule: zennit.composites.SpecialFirstLayerMapComposite(
        layer_map=[*exact, *zennit.composites.layer_map_base(), (zennit.types.Linear, r.Epsilon())],
        first_map=[(zennit.types.Linear, rule)],
        canonizers=[zennit.canonizers.SequentialMergeBatchNorm()],
    )
    merged = {"layer_map": exact, "canonizers": [zennit.canonizers.SequentialMergeBatchNorm()]}
    all_of = lambda rule: rules.Composite(conv=rule, linear=rule)
    start = lambda rule: rules.Composite(first=rule)
    bare = {"zero_params": ["bias"]}
    return {
        "epsilon": lambda: (everywhere(r.Epsilon()), "epsilon"),
        "large epsilon": lambda: (everywhere(r.Epsilon(epsilon=0.5)), all_of(rules.Epsilon(0.5))),
        "gamma": lambda: (everywhere(r.Gamma()), all_of(rules.GeneralisedGamma())),
        "z plus": lambda: (everywhere(r.ZPlus()), all_of(rules.ZPlus())),
        "alpha beta": lambda: (everywhere(r.AlphaBeta()), all_of(rules.AlphaBeta())),
        "first flat": lambda: (first(r.Flat()), start(rules.Flat())),
        "first w square": lambda: (first(r.WSquare(**bare)), start(rules.WSquare())),
        "first box": lambda: (first(r.ZBox(low, high)), start(rules.ZBox(low, high))),
        "EpsilonPlus": lambda: (zennit.composites.EpsilonPlus(**merged), "epsilon_plus"),
        "EpsilonAlpha2Beta1": lambda: (
            zennit.composites.EpsilonAlpha2Beta1(**merged),
            "epsilon_alpha2_beta1",
        ),
        "EpsilonGammaBox": lambda: (
            zennit.composites.EpsilonGammaBox(low, high, **merged),
            rules.epsilon_gamma_box(low, high),
        ),
        "EpsilonPlusFlat": lambda: (zennit.composites.EpsilonPlusFlat(**merged), "epsilon_plus_flat"),
        "EpsilonAlpha2Beta1Flat": lambda: (
            zennit.composites.EpsilonAlpha2Beta1Flat(**merged),
            "epsilon_alpha2_beta1_flat",
        ),
    }[name]()


EQUAL = [
    "epsilon",
    "large epsilon",
    "gamma",
    "z plus",
    "alpha beta",
    "first flat",
    "first w square",
    "first box",
]
EQUAL += ["EpsilonPlus", "EpsilonAlpha2Beta1", "EpsilonGammaBox", "EpsilonPlusFlat", "EpsilonAlpha2Beta1Flat"]


def distance(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", EQUAL)
def test_rules_and_composites_are_those_of_zennit(zennit, name, norm, pool):
    net, x = network(norm, pool), eg.random.normal(99, (2, 10, 10, 10), dtype=torch.float64)
    x[0, 0] = 0
    their, our = pairs(zennit, name)
    expected, found = theirs(zennit, net, x, their), ours(net, x, our)
    assert distance(found, expected) <= CLOSE
