"""The real network on the real head gives the known numbers; the small nets are what they promise."""

import json
import subprocess
import sys
from typing import NamedTuple

import nibabel
import numpy as np
import pytest
import torch
from rounding import assert_alike
from torch import Tensor, nn

from esegeta import zoo
from esegeta.zoo.volumes import DATA

FILES = ["brain_extraction_unet3d.safetensors", "colin27_brain_128.nii.gz", "colin27_t1_128.nii.gz"]
VESSELS = ["vessel_unet", "vessel_unet_mss", "vessel_unet_mss_deformation"]
TUMOURS = ["tumour_dense_unet", "tumour_plain", "tumour_residual_unet"]
TRAINED_HERE = [*VESSELS, *TUMOURS]
DICE = {"vessel_unet": 0.852, "vessel_unet_mss": 0.856, "vessel_unet_mss_deformation": 0.835}


class Real(NamedTuple):
    net: nn.Module
    head: zoo.Volume
    mask: Tensor
    logit: Tensor


@pytest.fixture(scope="module")
def real():
    net, head, mask = zoo.brain_extraction_unet(), zoo.head(), zoo.brain_mask()
    with torch.no_grad():
        return Real(net, head, mask, net(head.data[None]))


def test_the_network_finds_the_brain(real):
    found = real.logit.sigmoid()[0, 0] > 0.5
    dice = 2 * (found & real.mask).sum() / (found.sum() + real.mask.sum())
    assert dice.item() == pytest.approx(0.930, abs=0.001)
    assert found.sum().item() == pytest.approx(544_534, abs=5)
    assert real.mask.sum().item() == 508_173


def test_the_network_is_ready_to_use(real):
    assert not any(module.training for module in real.net.modules())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in real.net.parameters())
    assert sum(p.numel() for p in real.net.parameters()) == 171_465
    assert real.logit.shape == (1, 1, 128, 128, 128)


def test_every_place_in_the_network_has_its_own_name(real):
    places = {name for name, module in real.net.named_modules() if not list(module.children())}
    down, up = ["conv_a", "relu_a", "conv_b", "relu_b", "pool", "dropout"], ["up", "conv", "relu", "dropout"]
    expected = {f"encoder.{i}.{part}" for i in range(3) for part in down}
    expected |= {f"decoder.{i}.{part}" for i in range(3) for part in up}
    assert places == expected | {"out"}


def test_the_network_is_plain_torch(real):
    """The same weights under their names in the file, in the words of torch.nn.functional."""
    w = zoo.read_safetensors(DATA / FILES[0])
    x = real.head.data[None, :, 40:72, 40:64, 40:80]

    def conv(x, name):
        return torch.relu(nn.functional.conv3d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1))

    z, skips = x, []
    for level in "123":
        skips.append(conv(conv(z, f"e{level}a"), f"e{level}b"))
        z = nn.functional.max_pool3d(skips[-1], 2)
    for level in "321":
        up = nn.functional.conv_transpose3d(z, w[f"u{level}.weight"], stride=2)[..., :-1, :-1, :-1]
        z = conv(torch.cat([up, skips.pop()], dim=1), f"d{level}")
    expected = nn.functional.conv3d(z, w["out.weight"], w["out.bias"])
    with torch.no_grad():
        assert_alike(real.net(x), expected)


def test_dropout_is_real(real):
    net, x = zoo.brain_extraction_unet().train(), real.head.data[None, :, 48:80, 48:80, 48:80]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        assert (net(x) - net(x)).abs().max() > 0.1


def test_calls_share_nothing(real):
    other = zoo.brain_extraction_unet()
    with torch.no_grad():
        other.out.bias.add_(1)
    assert not torch.equal(other.out.bias, real.net.out.bias)
    again = zoo.head()
    again.data.zero_()
    assert real.head.data.max() == 1


def test_the_head_lies_where_its_file_says(real):
    image = nibabel.load(DATA / "colin27_t1_128.nii.gz")
    data, affine, spacing = real.head
    assert data.shape == (1, 128, 128, 128)
    assert data.dtype == torch.float32
    assert data.is_contiguous()
    assert (data.min(), data.max()) == (0, 1)
    np.testing.assert_allclose(data[0].numpy(), image.get_fdata() / image.get_fdata().max(), atol=1e-7)
    np.testing.assert_array_equal(affine, image.affine)
    np.testing.assert_allclose(spacing, image.header.get_zooms(), rtol=1e-6)
    np.testing.assert_allclose(spacing, [180 / 127, 216 / 127, 180 / 127], rtol=1e-6)
    assert all(type(mm) is float for mm in spacing)


def test_the_mask_lies_on_the_head(real):
    image = nibabel.load(DATA / "colin27_brain_128.nii.gz")
    np.testing.assert_array_equal(image.affine, real.head.affine)
    np.testing.assert_array_equal(real.mask.numpy(), image.get_fdata() > 0)
    assert real.mask.dtype == torch.bool


def test_the_files_come_with_their_terms():
    assert sorted(path.name for path in DATA.iterdir()) == sorted(
        [*FILES, "NOTICE", *(f"{name}.safetensors" for name in TRAINED_HERE)]
    )
    notice = (DATA / "NOTICE").read_text()
    assert all(name in notice for name in [*FILES, *(f"{name}.safetensors" for name in TRAINED_HERE)])
    assert "Permission is hereby granted, free of charge" in notice
    assert "Louis Collins, McConnell Brain Imaging Centre" in notice


def test_importing_the_zoo_does_not_import_nibabel():
    code = "import sys, esegeta.zoo; print('nibabel' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    zoo.brain_extraction_unet()
    zoo.head()
    zoo.brain_mask()
    zoo.small_unet(2, key=1)
    zoo.small_classifier(key=1)
    zoo.vessel_unet()
    zoo.vessel_phantom(size=32)
    zoo.tumour_plain()
    zoo.tumour_slice(size=32)
    assert torch.equal(before, torch.get_rng_state())


def small_nets(ndim, **settings):
    return [zoo.small_unet(ndim, **settings), zoo.small_classifier(ndim, **settings)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_small_nets_run(ndim, dtype):
    size = (8, 6, 4)[:ndim]
    x = torch.linspace(-1, 1, 2 * 2 * int(np.prod(size)), dtype=dtype).reshape(2, 2, *size)
    unet, classifier = small_nets(ndim, channels=2, classes=3)
    for net, shape in [(unet, (2, 3, *size)), (classifier, (2, 3))]:
        net = net.to(dtype)
        out = net(x)
        assert out.shape == shape
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert out.std() > 0.01
        torch.testing.assert_close(out[:1], net(x[:1]))
        assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_small_nets_are_alive_and_bent(ndim):
    """Every ReLU lets something through and stops something, or rules would be tested on nothing."""
    for net in small_nets(ndim):
        shares = []
        relus = [module for module in net.modules() if isinstance(module, nn.ReLU)]
        for relu in relus:
            relu.register_forward_hook(lambda _, inputs, out: shares.append((out > 0).double().mean().item()))
        net(torch.randn(4, 1, *[8] * ndim, generator=torch.Generator().manual_seed(0)))
        assert len(shares) == len(relus) > 0
        assert all(0.1 < share < 0.9 for share in shares)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_small_nets_depend_on_their_key_alone(ndim):
    for a, b, c in zip(small_nets(ndim), small_nets(ndim), small_nets(ndim, key=1), strict=True):
        assert a.state_dict().keys() == c.state_dict().keys()
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name])
            if not name.endswith("num_batches_tracked"):
                assert not torch.equal(value, c.state_dict()[name])


def test_small_nets_do_not_depend_on_defaults():
    """Strict test runs use float64 as the default dtype; the networks stay the same."""
    plain = small_nets(2)
    try:
        torch.set_default_dtype(torch.float64)
        other = small_nets(2)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(plain, other, strict=True):
        for name, value in a.state_dict().items():
            assert value.dtype == b.state_dict()[name].dtype
            assert torch.equal(value, b.state_dict()[name])


def test_norms_are_not_the_identity():
    norms = [m for net in small_nets(2) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 5
    for norm in norms:
        for value, neutral in [
            (norm.running_mean, 0),
            (norm.running_var, 1),
            (norm.weight, 1),
            (norm.bias, 0),
        ]:
            assert (value != neutral).all()
        assert (norm.running_var > 0).all()


@pytest.mark.parametrize("build", [zoo.small_unet, zoo.small_classifier])
def test_small_nets_refuse_what_they_cannot_be(build):
    with pytest.raises(ValueError, match=f"{build.__name__}: expected ndim to be 1, 2 or 3, got 4"):
        build(4)
    with pytest.raises(ValueError, match=f"{build.__name__}: expected ndim to be an int >= 1, got 0"):
        build(0)
    with pytest.raises(ValueError, match=f"{build.__name__}: expected classes to be an int >= 1, got -1"):
        build(2, classes=-1)


def written(tmp_path, header, values=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "some.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_weights_of_every_kind_are_read(tmp_path):
    arrays = {
        "F64": np.array([[1.5, -2]]),
        "F32": np.array([0.1], np.float32),
        "F16": np.array(3, np.float16),
        "I64": np.array([-(2**40)]),
        "I32": np.array([7, 8], np.int32),
        "I16": np.array([-3], np.int16),
        "I8": np.array([-4], np.int8),
        "U8": np.zeros((0, 2), np.uint8),
        "BOOL": np.array([True, False]),
    }
    header, values = {"__metadata__": {"by": "hand"}}, b""
    for name, array in arrays.items():
        header[name] = entry(name, array.shape, len(values), len(values) + array.nbytes)
        values += array.tobytes()
    read = zoo.read_safetensors(written(tmp_path, header, values))
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name].numpy(), array, strict=True)


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 2000, -1])
def test_truncated_weights_are_refused(tmp_path, kept):
    path = tmp_path / "short.safetensors"
    path.write_bytes((DATA / FILES[0]).read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"^read_safetensors: expected .*, got .*The file is truncated"):
        zoo.read_safetensors(path)


WRONG = {
    "not JSON": (b"\xff{", "expected a header in JSON in some.safetensors"),
    "broken JSON": (b'{"w": ', "expected a header in JSON in some.safetensors"),
    "a list": ([1], r"that maps names to tensors, got \[1\]"),
    "a name twice": (b'{"w": 1, "w": 2}', r"every name once in the header, got \['w', 'w'\]"),
    "no fields": ({"w": 3}, "expected dtype, shape and data_offsets of w, got 3"),
    "no dtype": (
        {"w": {"shape": [2], "data_offsets": [0, 8]}},
        "expected dtype, shape and data_offsets of w",
    ),
    "unknown dtype": ({"w": entry(dtype="F8_E4M3")}, "expected w with a dtype out of F64, .*, got F8_E4M3"),
    "dtype of no kind": (
        {"w": entry() | {"dtype": [1]}},
        r"expected w with a dtype out of F64, .*, got \[1\]",
    ),
    "negative size": ({"w": entry(shape=(-2,))}, r"the shape of w as a list of sizes, got \[-2\]"),
    "fractional size": ({"w": entry(shape=(2.0,))}, r"the shape of w as a list of sizes, got \[2.0\]"),
    "one offset": ({"w": entry() | {"data_offsets": [8]}}, r"data_offsets \[begin, end\] of w, got \[8\]"),
    "wrong length": ({"w": entry(shape=(3,))}, r"expected 12 bytes for w with shape \[3\], got 8"),
    "a gap": (
        {"w": entry(begin=4, end=12)},
        "expected w to begin at byte 0, got 4. The values overlap or have gaps",
    ),
    "an overlap": ({"a": entry(), "b": entry(begin=4, end=12)}, "expected b to begin at byte 8, got 4"),
    "too few values": (
        {"a": entry(), "b": entry(begin=8, end=16)},
        "16 bytes of values or more, for b, got 12",
    ),
    "too many values": (
        {"w": entry()},
        "expected 8 bytes of values, got 12. The file does not end where it should",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_headers_are_refused(tmp_path, case):
    header, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        zoo.read_safetensors(written(tmp_path, header, bytes(12)))


def test_a_file_of_another_kind_is_refused():
    with pytest.raises(
        ValueError, match=r"expected a header in JSON .*The file is damaged or in another format"
    ):
        zoo.read_safetensors(DATA / "colin27_t1_128.nii.gz")


def test_networks_of_vessels_are_what_they_say():
    strided, supervised, pooled = (getattr(zoo, name)() for name in VESSELS)
    kinds = lambda net: {type(module).__name__ for module in net.modules()}
    assert {"InstanceNorm3d", "LeakyReLU", "ConvTranspose3d"} <= kinds(strided) == kinds(supervised)
    assert {"BatchNorm3d", "ReLU", "MaxPool3d", "Upsample"} <= kinds(pooled)
    assert sum(m.stride == (2, 2, 2) for m in strided.modules() if isinstance(m, nn.Conv3d)) == 5
    assert sum(isinstance(m, nn.MaxPool3d) for m in pooled.modules()) == 4
    for net in (strided, supervised, pooled):
        assert not any(module.training for module in net.modules())
        assert all(p.dtype == torch.float32 for p in net.parameters())
    with torch.no_grad():
        assert pooled(torch.zeros(2, 1, 16, 32, 16)).shape == (2, 1, 16, 32, 16)
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            strided(torch.zeros(1, 1, 32, 32, 32))


def test_their_weights_are_small_and_in_half_precision():
    for name in TRAINED_HERE:
        file = DATA / f"{name}.safetensors"
        assert file.stat().st_size < 700_000
        weights = zoo.read_safetensors(file)
        assert {w.dtype for k, w in weights.items() if not k.endswith("num_batches_tracked")} == {
            torch.float16
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", VESSELS)
def test_they_find_the_vessels_of_a_phantom_that_they_have_not_seen(name):
    x, mask = zoo.vessel_phantom(1000)
    with torch.no_grad():
        found = getattr(zoo, name)()(x[None])[0, 0] > 0
    dice = 2 * (found & mask).sum() / (found.sum() + mask.sum())
    assert dice.item() == pytest.approx(DICE[name], abs=0.01)


def test_phantoms_come_from_their_key():
    x, mask = zoo.vessel_phantom(key=5, size=32)
    again, other = zoo.vessel_phantom(key=5, size=32), zoo.vessel_phantom(key=6, size=32)
    assert torch.equal(x, again.data)
    assert torch.equal(mask, again.mask)
    assert not torch.equal(mask, other.mask)
    assert x.shape == (1, 32, 32, 32)
    assert x.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert 0.003 < mask.float().mean() < 0.1
    assert x.min() >= 0
    assert (x <= 1).float().mean() == pytest.approx(0.999, abs=1e-4)
    with pytest.raises(ValueError, match="vessel_phantom: expected size to be 32 or more, got 8"):
        zoo.vessel_phantom(size=8)


def test_networks_of_tumours_are_what_they_say():
    dense, plain, residual = (getattr(zoo, name)() for name in TUMOURS)
    convolutions = lambda net: sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert convolutions(residual) == convolutions(plain) + 4  # one beside each block of the encoder
    assert (
        dense.encoder[0](torch.zeros(1, 12, 8, 8)).shape
        == residual.encoder[0](torch.zeros(1, 12, 8, 8)).shape
    )
    assert (dense.decoder[0].conv_a.in_channels, plain.decoder[0].conv_a.in_channels) == (48 + 32, 48)
    for net in (dense, plain, residual):
        assert sum(p.numel() for p in net.parameters()) < 300_000
        assert not any(module.training for module in net.modules())
        assert all(p.dtype == torch.float32 for p in net.parameters())
        assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {0.2}
        with torch.no_grad():
            assert net(torch.zeros(2, 4, 16, 32)).shape == (2, 4, 16, 32)


@pytest.mark.parametrize("name", TUMOURS)
def test_they_find_tumours_that_they_have_not_seen(name):
    drawn = [zoo.tumour_slice(key) for key in range(5000, 5008)]
    with torch.no_grad():
        found = getattr(zoo, name)()(torch.stack([one.data for one in drawn])).argmax(1) > 0
    truth = torch.stack([one.labels for one in drawn]) > 0
    dice = 2 * (found & truth).sum((1, 2)) / (found.sum((1, 2)) + truth.sum((1, 2)))
    assert dice.mean() > 0.8


def test_slices_come_from_their_key():
    one, again, other = (zoo.tumour_slice(key=key, size=48) for key in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.labels, other.labels)
    assert (one.data.shape, one.data.dtype, one.labels.dtype) == ((4, 48, 48), torch.float32, torch.int64)
    assert (one.data[:, one.tissues == 0] == 0).all()
    assert (one.labels[one.tissues == 0] == 0).all()
    with pytest.raises(ValueError, match="tumour_slice: expected size to be 32 or more, got 8"):
        zoo.tumour_slice(size=8)


def test_sequences_see_the_parts_of_a_tumour_differently():
    drawn = [zoo.tumour_slice(key) for key in range(30)]
    values = {
        name: torch.stack(
            [one.data[:, mask].mean(1) for one in drawn if (mask := one.concepts[name]).any()]
        ).mean(0)
        for name in drawn[0].concepts
    }
    flair, t1, t1ce, t2 = range(4)
    assert values["edema"][flair] > values["white matter"][flair] + 0.2
    assert values["enhancing"][t1ce] > max(values["core"][t1ce], values["edema"][t1ce]) + 0.2
    assert values["enhancing"][t1ce] > values["enhancing"][t1] + 0.2
    assert values["core"][t1] < values["white matter"][t1] - 0.2
    assert values["fluid"][t2] > values["grey matter"][t2] > values["white matter"][t2]
    with_rim = sum(bool(one.concepts["enhancing"].any()) for one in drawn)
    assert 15 < with_rim < 30


def test_concepts_of_a_slice_fit_together():
    concepts = zoo.tumour_slice(4).concepts
    parts = [concepts[name] for name in ("core", "edema", "enhancing")]
    assert torch.equal(sum(m.int() for m in parts), concepts["whole tumour"].int())
    assert torch.equal(concepts["tumour core"], parts[0] | parts[2])
    healthy = [concepts[name] for name in ("fluid", "grey matter", "white matter")]
    assert torch.equal(sum(m.int() for m in [*healthy, concepts["whole tumour"]]), concepts["brain"].int())
