"""Whatever bytes a file holds, reading it gives a finite volume or one line that says why not."""

import gzip
import io
import struct
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esegeta.run.volumes import files as volumes
from esegeta.run.volumes.files import UnreadableInput, read

MOST = 100 * 2**20  # bytes
# Where the fields of a NIfTI-1 header begin, and how they are packed.
FIELDS = {
    **{"sizeof_hdr": (0, "i"), "dim_info": (39, "b"), "datatype": (70, "h"), "bitpix": (72, "h")},
    **{f"dim{i}": (40 + 2 * i, "h") for i in range(8)},
    **{f"pixdim{i}": (76 + 4 * i, "f") for i in range(8)},
    **{"vox_offset": (108, "f"), "slope": (112, "f"), "inter": (116, "f"), "units": (123, "B")},
    **{"qform": (252, "h"), "sform": (254, "h"), "b": (256, "f"), "c": (260, "f"), "offset": (268, "f")},
    **{f"srow{i}": (280 + 4 * i, "f") for i in range(12)},
}
EXTREMES = {
    "b": [-128, -1, 0, 127],
    "B": [0, 3, 7, 255],
    "h": [-32768, -1, 0, 1, 2, 7, 8, 128, 2304, 32767],
    "i": [-(2**31), -1, 0, 540, 348 << 16, 2**31 - 1],
    "f": [0.0, -1.0, 1e-45, 1e38, -1e38, float("inf"), float("-inf"), float("nan"), 0.5, 1e9],
}


def small(kind=nib.Nifti1Image, shape=(5, 4, 3), dtype=np.int16):
    """A corner of a head-like volume: bright inside, scaled and oblique."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    values = (100 * np.exp(-(grid**2).sum(0))).astype(dtype)
    image = kind(values, nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, 0.3) * 1.5, [-90, 7, 5]))
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(0.5, 1.0)
    return image.to_bytes()


def pixels(kind):
    image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    values = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)
    image.fromarray(values).save(stream, format=kind)
    return stream.getvalue()


def array():
    stream = io.BytesIO()
    np.save(stream, np.arange(12, dtype=np.float32).reshape(3, 4))
    return stream.getvalue()


NIFTI = small()
NIFTI2 = small(nib.Nifti2Image)
SEEDS = {
    "a.nii": NIFTI,
    "b.nii": NIFTI2,
    "a.nii.gz": gzip.compress(NIFTI, mtime=0),
    "a.npy": array(),
    "a.png": pixels("PNG"),
    "a.jpg": pixels("JPEG"),
}


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def outcome(path, **options):
    """The volume, checked, or None where the file was refused, checked too."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        tracemalloc.start()
        try:
            volume = read(path, **options)
        except UnreadableInput as error:
            text = str(error)
            assert text.startswith("volumes.read: expected ")
            assert ", got " in text
            assert text.endswith(".")
            assert text.isprintable()
            assert len(text) < 1200
            volume = None
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert not heard
    assert peak < MOST
    if volume is not None:
        assert volume.data.dtype == torch.float32
        assert 2 <= volume.data.ndim <= 4
        assert volume.data.numel() > 0
        assert volume.data.isfinite().all()
        assert volume.affine.shape == (4, 4)
        assert np.isfinite(volume.affine).all()
        assert len(volume.spacing) == volume.data.ndim - 1
        assert min(volume.spacing) > 0
        assert abs(np.linalg.det(volume.affine[:3, :3])) > 0
    return volume


def test_the_seeds_are_readable(folder):
    for name, content in SEEDS.items():
        (folder / name).write_bytes(content)
        assert outcome(folder / name) is not None, name


@pytest.mark.parametrize("name", SEEDS)
def test_a_file_cut_off_at_any_byte(folder, name):
    content, path = SEEDS[name], folder / f"cut-{name}"
    path.write_bytes(content)
    whole, ends = read(path), []
    for end in range(len(content)):
        path.write_bytes(content[:end])
        volume = outcome(path)
        if volume is not None:
            assert torch.equal(volume.data, whole.data)
            ends.append(len(content) - end)
    # A picture may lack its last bytes, which hold sums and marks but no pixels; everything else is refused.
    assert max(ends, default=0) <= (20 if name in ("a.png", "a.jpg") else 0)


def test_pairs_cut_off_at_any_byte(folder):
    nib.Nifti1Pair(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4)).to_filename(folder / "p.img")
    files = {name: (folder / name).read_bytes() for name in ("p.hdr", "p.img")}
    assert outcome(folder / "p.img") is not None
    for name, content in files.items():
        for end in range(len(content)):
            (folder / name).write_bytes(content[:end])
            # A header may lack its last four bytes, which say that it has no extensions.
            assert (outcome(folder / "p.hdr") is None) == (name == "p.img" or end < 348)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["a.nii", "b.nii"])
def test_every_byte_of_a_header_turned_over(folder, name):
    path, read_well = folder / f"turned-{name}", 0
    for i in range(348 if name == "a.nii" else 540):
        content = bytearray(SEEDS[name])
        content[i] ^= 0xFF
        path.write_bytes(content)
        read_well += outcome(path) is not None
    assert read_well > 100  # text fields and display ranges do no harm


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_at_its_extremes(folder, field):
    offset, code = FIELDS[field]
    path = folder / "field.nii"
    for order in "<>":
        for value in EXTREMES[code]:
            content = bytearray(NIFTI)
            struct.pack_into(order + code, content, offset, value)
            path.write_bytes(content)
            outcome(path)
            outcome(path, channels="last", nan=0.0)
            packed = folder / "field.nii.gz"
            packed.write_bytes(gzip.compress(content, 1))
            outcome(packed)


@pytest.mark.parametrize("sizes", [(2**15 - 1,) * 3, (2**15 - 1,) * 7, (2**10, 2**15 - 1, 2**15 - 1)])
@pytest.mark.parametrize("name", ["huge.nii", "huge.nii.gz"])
def test_a_header_that_claims_a_huge_volume_costs_nothing(folder, sizes, name):
    content = bytearray(NIFTI)
    struct.pack_into("<8h", content, 40, len(sizes), *sizes, *(1,) * (7 - len(sizes)))
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert outcome(path) is None
    assert outcome(path, frame=32000) is None


def test_nifti_2_may_claim_even_more(folder):
    content = bytearray(NIFTI2)
    for sizes in ((2**40, 1, 1), (2**62, 2**62, 2**62), (-(2**63), 1, 1), (2**31, 2**31, 4)):
        struct.pack_into("<4q", content, 16, 3, *sizes)
        (folder / "huge2.nii").write_bytes(content)
        assert outcome(folder / "huge2.nii") is None
    content = bytearray(NIFTI2)
    for start in (2**62, -(2**62), 2**63 - 1):
        struct.pack_into("<q", content, 168, start)
        (folder / "far.nii").write_bytes(content)
        assert outcome(folder / "far.nii") is None


def test_affines_of_astronomical_size_are_refused(folder):
    for value in (1e200, -1e300, 1e12, float("inf"), float("nan")):
        for i in range(12):
            content = bytearray(NIFTI2)
            struct.pack_into("<d", content, 400 + 8 * i, value)
            (folder / "far2.nii").write_bytes(content)
            assert outcome(folder / "far2.nii") is None


def test_the_parts_of_a_picture_may_claim_any_length(folder):
    for name, mark in (("a.png", b"IDAT"), ("a.png", b"IHDR"), ("a.png", b"IEND")):
        content = bytearray(SEEDS[name])
        start = content.index(mark) - 4
        for length in (2**31 - 1, 2**32 - 1, 2**27):
            content[start : start + 4] = struct.pack(">I", length)
            (folder / f"long-{name}").write_bytes(content)
            outcome(folder / f"long-{name}")


def test_a_packed_file_that_grows_without_end_is_not_followed(folder):
    bomb = gzip.compress(NIFTI + bytes(2**28), 9)
    (folder / "bomb.nii.gz").write_bytes(bomb)
    assert outcome(folder / "bomb.nii.gz") is not None  # what the header asks for is there; the rest is left


fuzz = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@fuzz
@given(
    name=st.sampled_from(sorted(SEEDS)),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_bytes_changed_anywhere(folder, name, changes):
    content = bytearray(SEEDS[name])
    for place, value in changes:
        content[place % len(content)] = value
    path = folder / f"changed-{name}"
    path.write_bytes(content)
    outcome(path)


@fuzz
@given(
    suffix=st.sampled_from(volumes.SUFFIXES),
    content=st.binary(max_size=700),
    start=st.sampled_from([0, 4, 352]),
)
def test_bytes_of_nowhere_with_any_ending(folder, suffix, content, start):
    """From nothing, after a few right bytes, and after a whole header."""
    seed = next((v for k, v in SEEDS.items() if k.endswith(suffix)), NIFTI)
    path = folder / f"nowhere{suffix}"
    path.write_bytes(seed[:start] + content)
    outcome(path)


@fuzz
@given(
    header=st.binary(min_size=348, max_size=348),
    right=st.sets(st.sampled_from(["sizeof_hdr", "dim", "datatype", "vox_offset", "magic"])),
)
def test_headers_with_some_fields_right(folder, header, right):
    content = bytearray(header + NIFTI[348:])
    places = {
        "sizeof_hdr": (0, 4),
        "dim": (40, 56),
        "datatype": (70, 74),
        "vox_offset": (108, 112),
        "magic": (344, 348),
    }
    for field in right | {"sizeof_hdr", "magic"}:
        a, b = places[field]
        content[a:b] = NIFTI[a:b]
    path = folder / "some.nii"
    path.write_bytes(content)
    outcome(path, nan=0.0)


@fuzz
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    kind=st.sampled_from(["u1", "i2", "f4", "f8", "c8"]),
    channels=st.sampled_from([None, "first", "last", "none"]),
    frame=st.sampled_from([None, 0, 2]),
    ending=st.sampled_from([".nii", ".nii.gz", ".npy"]),
)
def test_shapes_of_all_kinds_are_read_or_refused(folder, shape, kind, channels, frame, ending):
    values = np.arange(np.prod(shape)).reshape(shape).astype(kind)
    path = folder / f"shape{ending}"
    if ending == ".npy":
        np.save(path, values)
    else:
        nib.Nifti1Image(values, np.eye(4)).to_filename(path)
    if channels is not None and frame is not None:
        with pytest.raises(ValueError, match=r"^volumes\.read: expected channels or frame, got "):
            read(path, channels=channels, frame=frame)
        return
    volume = outcome(path, channels=channels, frame=frame)
    if volume is not None and frame is None:
        assert volume.data.numel() == values.size
        assert sorted(volume.data.flatten().tolist()) == list(range(values.size))


def test_the_head_of_the_zoo_cut_off_turned_over_and_packed_badly(folder):
    whole = (Path(volumes.__file__).parents[1] / "zoo" / "data" / "colin27_t1_128.nii.gz").read_bytes()
    path = folder / "head.nii.gz"
    rng = np.random.default_rng(7)
    for _ in range(4):
        path.write_bytes(whole[: rng.integers(len(whole))])
        assert outcome(path) is None
        damaged = bytearray(whole)
        damaged[rng.integers(12, len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert outcome(path) is None
