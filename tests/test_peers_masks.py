"""TorchRay's RISE and extremal perturbation: equal where the definitions are, and whose the differences are."""

import importlib
import math
import types
import warnings

import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta import baselines, masks, random

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def torchray():
    """Its package imports data sets and models that are not needed here, and torchvision for them."""
    pytest.importorskip("matplotlib").use("Agg")
    if importlib.util.find_spec("torchray") is None:
        pytest.skip("torchray is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return types.SimpleNamespace(
            extremal=importlib.import_module("torchray.attribution.extremal_perturbation"),
            rise=importlib.import_module("torchray.attribution.rise"),
        )


@pytest.fixture(autouse=True)
def their_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs(torchray, p, shape, step, sigma):
    generator = torchray.extremal.MaskGenerator(shape, step, sigma)
    return generator.generate(p[None, None])[0][0, 0]


@pytest.mark.parametrize("sigma", [1, 2, 3, 5])
def test_the_mask_operator_with_a_place_at_every_voxel(torchray, sigma):
    family = masks.smooth(step=1, sigma=sigma)(torch.zeros(1, 17, 20))
    for key in range(3):
        p = random.uniform(key, family.grid).round() if key else random.uniform(key, family.grid)
        expected = theirs(torchray, p, (17, 20), 1, sigma)
        assert (family.mask(p) - expected).abs().max() < 1e-5


def test_their_windows_reach_farther_to_one_side(torchray):
    """A single parameter in the middle: their bump ends step - 1 voxels later on the right, ours is symmetric."""
    shape, step, sigma = (57, 57), 7, 14
    family = masks.smooth(step=step, sigma=sigma)(torch.zeros(1, *shape))
    p = torch.zeros(family.grid)
    assert family.grid == (9, 9)  # 57 = 8 * 7 + 1: their places, multiples of the step, are ours moved by 3
    p[4, 4] = 1
    ours = family.mask(p)
    torch.testing.assert_close(ours, ours.flip(1))
    bump = theirs(torchray, p, shape, step, sigma)
    row = bump[28].nonzero().flatten()
    assert (28 - int(row.min()), int(row.max()) - 28) == (21, 21 + step - 1)
    # Where both see the same places they agree: around the middle of the bump.
    near = slice(24, 33)
    assert (bump[near, near] - ours[near, near]).abs().max() < 1e-4


def test_their_fading_is_ours(torchray):
    x, m = torch.randn(1, 3, 9, 8), torch.rand(1, 1, 9, 8)
    found = torchray.extremal.Perturbation(x, type="fade").apply(m)[0]
    torch.testing.assert_close(found, m[0] * x[0], rtol=1e-5, atol=1e-6)


def test_their_pyramid_is_ours_away_from_the_border(torchray):
    """Near it they blur zeros in. Their Gaussian is sampled, ours is that of the grid: hence two percent."""
    x = eg.spatial.blur(torch.randn(1, 96, 96), 1.5)
    m = torch.rand(1, 96, 96)
    found = torchray.extremal.Perturbation(x[None], max_blur=6.0).apply(m[None])[0]
    ours = baselines.defocused(6.0)(x, x, m)
    off = (found - ours).abs() / x.abs().max()
    assert off[:, 30:-30, 30:-30].max() < 0.02
    bright = torch.ones(1, 96, 96)
    dark = torchray.extremal.Perturbation(bright[None], max_blur=6.0).apply(torch.zeros(1, 1, 96, 96))[0]
    assert dark[0, 0, 0] < 0.3
    torch.testing.assert_close(baselines.defocused(6.0)(bright, bright, 0 * bright), bright)


class Boxes(nn.Module):
    """Two classes: how bright two boxes are."""

    def __init__(self):
        super().__init__()
        w = torch.zeros(2, 32, 32)
        w[0, 6:14, 15:25] = 1 / 80
        w[1, 20:28, 4:12] = 1 / 64
        self.weight = nn.Parameter(w)

    def forward(self, x):
        return 10 * torch.einsum("bchw,khw->bk", x, self.weight)


@pytest.mark.parametrize("mode", ["preserve", "delete", "dual"])
@pytest.mark.parametrize("target", [0, 1])
def test_the_mask_that_is_found(torchray, mode, target):
    """The same objective: no flips, fading, a place at every voxel, an area in voxels, the logit as it is.

    Three things differ: they count the area of a margin around the image; at a mask of ones, where their search
    starts, their pyramid has no slope; and they return the last smooth mask, we the best region that was seen. Cut at
    one half their mask is a tenth larger than the area, so regions are compared: theirs is where it is largest.
    """
    net, x, sigma = Boxes().eval(), torch.ones(1, 32, 32), 3
    area = (80, 64)[target] / 32**2
    out = torchray.extremal.MaskGenerator((32, 32), 1, sigma).shape_out
    settings = {"perturbation": "fade", "step": 1, "sigma": sigma, "jitter": False, "variant": mode}
    found, _ = torchray.extremal.extremal_perturbation(
        Boxes().eval(), x[None], target, areas=[area * 32**2 / math.prod(out)], **settings
    )
    score = eg.reducers.logit(eg.from_module(net), target)
    worth = float((score(x) - score(0 * x)).detach().abs())
    explain = eg.extremal_perturbation(
        score, area=area, mode=mode, mask=masks.smooth(step=1, sigma=sigma), score_scale=worth
    )
    mask, truth = explain(x, 0 * x)[0], net.weight[target] > 0
    region = masks.nearest_region(found[0, 0].detach(), area)
    assert float(region.mean()) == pytest.approx(area) == pytest.approx(float(mask.mean()))
    ours, peer = mask > 0.5, region > 0.5
    iou = lambda a, b: float((a & b).sum() / (a | b).sum())
    assert iou(ours, truth) > 0.9
    assert iou(ours, peer) > 0.8  # the corners of theirs are round
    assert iou(ours, truth) > iou(peer, truth) - 0.05
    sign = -1 if mode == "delete" else 1
    reached = lambda m: float(sign * score((m if sign > 0 else 1 - m)[None]))
    assert reached(mask) >= reached(region)


def test_they_flip_left_and_right_unless_told_not_to(torchray):
    """Jitter is a mirror: a network that reads one side is shown the other in every second step."""
    net, x = Boxes().eval(), torch.ones(1, 1, 32, 32)
    settings = {"perturbation": "fade", "step": 1, "sigma": 3, "areas": [0.08]}
    run = lambda jitter: torchray.extremal.extremal_perturbation(net, x, 0, jitter=jitter, **settings)[0][
        0, 0
    ]
    truth = net.weight[0] > 0
    outside = lambda m: float((m * truth.flip(1) * ~truth).sum() / m.sum())
    assert outside(run(True)) > outside(run(False)) + 0.1


# --- RISE -------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 9 * 8).reshape(1, 9, 8))

    def forward(self, x):
        return torch.einsum("bchw,khw->bk", x, self.weight)[..., None, None]


def test_rise_with_their_masks(torchray):
    """On the same masks theirs is ours of sigmoid(logit), times p: they divide by n and leave p out."""
    net, x, n = Linear(), random.normal(1, (1, 9, 8)), 60
    shown = torch.cat([masks.scattered(random.fold_in(4, t), x, cells=3) for t in range(n // 2)])[:, None]
    found = torchray.rise.rise(net, x[None], num_masks=n, num_cells=3, filter_masks=shown)[0]
    logit = lambda z: (net.weight.detach() * z).sum()
    ours = lambda score: eg.rise(score, cells=3, samples=n)(x, 0 * x, key=4)
    torch.testing.assert_close(
        found.detach(), 0.5 * ours(lambda z: torch.sigmoid(logit(z))), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(found.detach(), 0.5 * ours(logit), rtol=0.1)


def test_what_they_call_the_probability_of_zero_is_that_of_one(torchray):
    """Of a score that is one everywhere theirs is the mean mask: p, where their text says 1 - p."""
    found = torchray.rise.rise(
        lambda x: torch.full((len(x), 1), 50.0), torch.ones(1, 1, 14, 14), num_masks=4000, p=0.1
    )
    assert float(found.mean()) == pytest.approx(0.1, abs=0.01)
    ours = eg.rise(lambda z: 0 * z.sum() + 1, keep=0.1, samples=4000)(
        torch.ones(1, 14, 14), torch.zeros(1, 14, 14), key=0
    )
    assert float(ours.mean()) == pytest.approx(1, abs=0.05)
