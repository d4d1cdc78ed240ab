"""Files are read as their formats say, and what cannot be read is refused in one line."""

import gzip
import os
import re
import struct
import tempfile
import zlib
from pathlib import Path

import jaxtyping
import nibabel as nib
import numpy as np
import pytest
import refusing
import torch

from esegeta.run.volumes import files as volumes
from esegeta.run.volumes.files import UnreadableInput, read
from esegeta.zoo import head

AFFINE = np.array([[0.0, -2, 0, 10], [1.5, 0, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])
VALUES = np.arange(60, dtype=np.float32).reshape(3, 4, 5) - 7


@pytest.fixture(autouse=True)
def our_own_messages():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def refused(expected, got="", advice="", kind=UnreadableInput):
    return refusing.refused(kind, r"volumes\.\w+", expected, got, advice)


def nifti(path, values=VALUES, affine=AFFINE, kind=nib.Nifti1Image, **fields):
    image = kind(values, affine)
    for field, value in fields.items():
        image.header[field] = value
    image.to_filename(path)
    return path


def patched(path, offset, value):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)
    return path


# -- NIfTI -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII", "a.b.c.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_volume_comes_back_with_its_place(tmp_path, name, kind):
    volume = read(nifti(tmp_path / name, kind=kind))
    np.testing.assert_array_equal(volume.data[0].numpy(), VALUES)
    assert volume.data.dtype == torch.float32
    assert volume.data.is_contiguous()
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert volume.spacing == (1.5, 2.0, 3.0)
    assert volume.paths == (tmp_path / name,)
    assert not volume.is_image


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("named", ["hdr", "img"])
def test_either_file_of_a_pair_stands_for_both(tmp_path, ending, named):
    nib.Nifti1Pair(VALUES, AFFINE).to_filename(tmp_path / f"p.img{ending}")
    volume = read(tmp_path / f"p.{named}{ending}")
    np.testing.assert_array_equal(volume.data[0].numpy(), VALUES)
    np.testing.assert_allclose(volume.affine, AFFINE)
    both = tuple(tmp_path / f"p.{half}{ending}" for half in ("hdr", "img"))
    assert volumes.files_of(tmp_path / f"p.{named}{ending}") == both
    (tmp_path / f"p.{'img' if named == 'hdr' else 'hdr'}{ending}").unlink()
    with refused("one of a pair .hdr and .img", "no p.", "in one folder"):
        read(tmp_path / f"p.{named}{ending}")


@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_real_type_in_both_byte_orders_with_and_without_scaling(tmp_path, kind, order):
    values = np.arange(24).reshape(2, 3, 4).astype(kind)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(values.dtype)
    path = tmp_path / "t.nii"
    nib.Nifti1Image(values, AFFINE, header).to_filename(path)
    assert path.read_bytes()[40:42] == struct.pack(order + "h", 3)
    np.testing.assert_array_equal(read(path).data[0].numpy(), values.astype(np.float32))
    patched(path, 112, struct.pack(order + "ff", 0.25, -3.0))
    volume = read(path)
    np.testing.assert_array_equal(volume.data[0].numpy(), values.astype(np.float32) * 0.25 - 3)
    np.testing.assert_array_equal(volume.data[0].numpy(), nib.load(path).get_fdata(dtype=np.float32))


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf])
def test_a_slope_that_means_nothing_leaves_the_values_as_they_are(tmp_path, slope):
    path = patched(nifti(tmp_path / "s.nii"), 112, struct.pack("<ff", slope, 9.0))
    np.testing.assert_array_equal(read(path).data[0].numpy(), VALUES)


def test_an_intercept_that_is_no_number_is_refused(tmp_path):
    path = patched(nifti(tmp_path / "s.nii"), 112, struct.pack("<ff", 2.0, np.nan))
    with refused("a finite scl_inter", "nan"):
        read(path)


@pytest.mark.parametrize(("units", "factor"), [("mm", 1), ("meter", 1000), ("micron", 0.001), ("unknown", 1)])
def test_units_become_millimetres(tmp_path, units, factor):
    image = nib.Nifti1Image(VALUES, AFFINE)
    image.header.set_xyzt_units(units)
    image.to_filename(tmp_path / "u.nii")
    volume = read(tmp_path / "u.nii")
    np.testing.assert_allclose(volume.affine[:3], AFFINE[:3] * factor)
    np.testing.assert_allclose(volume.spacing, np.array([1.5, 2, 3]) * factor)
    assert volume.units == units


@pytest.mark.parametrize("codes", [(1, 2), (0, 1), (4, 0), (0, 0)])
def test_the_affine_is_the_one_that_nibabel_prefers(tmp_path, codes):
    turn = nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag([-1.5, 2, 3])
    image = nib.Nifti1Image(VALUES, AFFINE)
    image.set_qform(nib.affines.from_matvec(turn, [3, -4, 5]), code=codes[0])
    image.set_sform(AFFINE, code=codes[1])
    image.to_filename(tmp_path / "q.nii")
    volume = read(tmp_path / "q.nii")
    np.testing.assert_allclose(volume.affine, nib.load(tmp_path / "q.nii").affine, atol=1e-6)
    np.testing.assert_allclose(volume.spacing, nib.affines.voxel_sizes(volume.affine))


def test_the_head_is_read_as_the_zoo_reads_it():
    data, affine, spacing = head()
    volume = read(Path(volumes.__file__).parents[2] / "zoo" / "data" / "colin27_t1_128.nii.gz")
    torch.testing.assert_close(volume.data / volume.data.max(), data)
    np.testing.assert_array_equal(volume.affine, affine)
    assert volume.spacing == spacing


REAL = Path(nib.__file__).parent / "tests" / "data"


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("anatomical.nii", "mm"),
        ("example4d.nii.gz", "mm"),
        ("example_nifti2.nii.gz", "mm"),
        ("functional.nii", "mm"),
        ("reoriented_anat_moved.nii", "mm"),
        ("standard.nii.gz", "unknown"),
    ],
)
def test_real_scans_are_read_as_nibabel_reads_them(name, units):
    if not (REAL / name).exists():
        pytest.skip("nibabel is installed without its data")
    volume, image = read(REAL / name, channels="last"), nib.load(REAL / name)
    values = image.get_fdata(dtype=np.float32).reshape(*image.shape[:3], -1)
    np.testing.assert_array_equal(volume.data.numpy(), np.moveaxis(values, -1, 0))
    np.testing.assert_allclose(volume.affine, image.affine)
    np.testing.assert_allclose(volume.spacing, nib.affines.voxel_sizes(image.affine))
    assert volume.units == units


@pytest.mark.parametrize("shape", [(7,), (3, 4), (3, 4, 1), (3, 4, 5), (3, 4, 5, 1), (3, 4, 5, 1, 1)])
def test_one_to_three_axes_are_space_and_further_ones_of_length_one_are_dropped(tmp_path, shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    volume = read(nifti(tmp_path / "d.nii", values))
    assert tuple(volume.data.shape) == (1, *shape[:3])
    np.testing.assert_array_equal(volume.data.numpy().ravel(), values.ravel())
    assert len(volume.spacing) == len(shape[:3])


def test_a_fourth_axis_is_what_it_is_said_to_be(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    path = nifti(tmp_path / "f.nii.gz", values)
    np.testing.assert_array_equal(read(path, channels="last").data.numpy(), np.moveaxis(values, -1, 0))
    for k in (0, 3, 5):
        np.testing.assert_array_equal(read(path, frame=k).data[0].numpy(), values[..., k])
    with refused("a fourth one that is explained", re.escape("(3, 4, 5, 6)"), 'channels="last".*frame=0'):
        read(path)
    with refused("a fourth one", re.escape("(3, 4, 5, 6)")):
        read(path, channels="none")
    with refused("a frame 6", "6 of them"):
        read(path, frame=6)
    with refused("channels='first'", "NIfTI"):
        read(path, channels="first")


def test_vectors_in_the_fifth_axis_are_channels_and_two_more_axes_are_too_many(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 4, 5, 1, 2)).astype(np.float32)
    path = nifti(tmp_path / "v.nii", values)
    np.testing.assert_array_equal(
        read(path, channels="last").data.numpy(), values[:, :, :, 0].transpose(3, 0, 1, 2)
    )
    for more in ({}, {"channels": "last"}, {"frame": 0}):
        with refused("at most four axes", re.escape("(3, 4, 5, 2, 2)")):
            read(nifti(tmp_path / "w.nii", np.ones((3, 4, 5, 2, 2), np.float32)), **more)


def test_colours_are_channels(tmp_path):
    raw = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 3), dtype=np.uint8)
    rgb = raw.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    volume = read(nifti(tmp_path / "c.nii", rgb))
    np.testing.assert_array_equal(volume.data.numpy(), np.moveaxis(raw, -1, 0).astype(np.float32))
    with refused("a volume of real numbers", "RGB"):
        read(nifti(tmp_path / "d.nii", np.stack([rgb, rgb], -1)), channels="last")
    four = np.concatenate([raw, np.full((3, 4, 5, 1), 255, np.uint8)], -1)
    names = [("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")]
    rgba = nifti(tmp_path / "e.nii", four.view(names)[..., 0])
    np.testing.assert_array_equal(read(rgba).data.numpy(), volume.data.numpy())
    four[0, 0, 0, 3] = 254
    with refused("opaque", "transparent parts"):
        read(nifti(tmp_path / "f.nii", np.ascontiguousarray(four).view(names)[..., 0]))


@pytest.mark.parametrize("kind", [np.complex64, np.complex128])
def test_complex_values_are_refused(tmp_path, kind):
    with refused("real numbers", "complex", "magnitude"):
        read(nifti(tmp_path / "c.nii", VALUES.astype(kind)))


def test_values_that_are_none_are_counted_or_replaced(tmp_path):
    values = VALUES.copy()
    values[0, 0, :2] = np.nan
    values[2, 3, 4] = -np.inf
    path = nifti(tmp_path / "n.nii", values)
    with refused("finite everywhere", "3 NaN or infinite of 60", "nan = 0.0"):
        read(path)
    replaced = read(path, nan=-1).data[0].numpy()
    np.testing.assert_array_equal(replaced, np.where(np.isfinite(values), values, -1))
    with refused("finite everywhere in float32", "1 NaN or infinite of 60"):
        read(nifti(tmp_path / "big.nii", np.where(VALUES == 5, 1e300, 0.0)))
    with refused("nan to be a finite number", "nan", kind=ValueError):
        read(path, nan=float("nan"))


@pytest.mark.parametrize(
    ("offset", "value", "expected", "got"),
    [
        (344, b"ni1\0", "the magic b'n\\+1", "ni1"),
        (344, b"\0\0\0\0", "the magic b'n\\+1", "Analyze"),
        (0, struct.pack("<i", 349), "NIfTI", "a header that begins with"),
        (40, struct.pack("<h", 0), "one to three axes of space", "0 axes"),
        (42, struct.pack("<h", 0), "one to three axes of space", r"\(0, 4, 5\)"),
        (42, struct.pack("<h", -1), "one to three axes of space", r"\(-1, 4, 5\)"),
        (42, struct.pack("<hhh", 32767, 32767, 32767), "a whole NIfTI file", "140724"),
        (70, struct.pack("<h", 1), "a header that holds", "code 1 not supported"),
        (70, struct.pack("<h", 999), "a header that holds", "code 999 not recognized"),
        (108, struct.pack("<f", 100.0), "a header that holds", "vox offset 100 too low"),
        (108, struct.pack("<f", np.nan), "voxels from byte 352", "nan"),
        (108, struct.pack("<f", 1e30), "a whole NIfTI file", "bytes"),
        (280, bytes(48), "an affine that can be inverted", r"\[\[0.0, 0.0"),
        (280, struct.pack("<f", np.nan), "an affine of numbers below 1e\\+09 mm", "nan"),
        (292, struct.pack("<f", 1e30), "an affine of numbers below 1e\\+09 mm", "e\\+30"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, offset, value, expected, got):
    with pytest.raises(UnreadableInput, match=rf"^volumes.read: expected .*{expected}") as caught:
        read(patched(nifti(tmp_path / "h.nii"), offset, value))
    assert re.search(got, str(caught.value))
    assert "\n" not in str(caught.value)


def test_files_that_are_cut_off_or_mislabelled_are_refused(tmp_path):
    path = nifti(tmp_path / "t.nii")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with refused("a whole NIfTI file", "592 bytes where at most 591", "copy it again"):
        read(path)
    path.write_bytes(whole[:100])
    with refused("a whole NIfTI file", "100 of 348 bytes"):
        read(path)
    path.write_bytes(b"")
    with refused("a whole NIfTI file", "0 of 348 bytes"):
        read(path)
    packed = tmp_path / "t.nii.gz"
    packed.write_bytes(gzip.compress(whole)[:-30])
    with refused("a whole gzip file", "end-of-stream", "cut off"):
        read(packed)
    broken = bytearray(gzip.compress(whole))
    broken[-5] ^= 1
    packed.write_bytes(broken)
    with refused("a whole gzip file", "CRC"):
        read(packed)
    packed.write_bytes(whole)
    with refused("a gzip file as its name says", "something else", r"drop \.gz"):
        read(packed)
    path.write_bytes(gzip.compress(whole))
    with refused("NIfTI as its name says", "a gzip file", r"end with \.gz"):
        read(path)


def test_a_pipe_a_folder_and_nothing_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "folder.nii").mkdir()
    with refused("pipe.nii to be a file", "something that is not a file"):
        read(tmp_path / "pipe.nii")
    with refused("folder.nii to be a file", "a folder"):
        read(tmp_path / "folder.nii")
    with refused("none.nii to be a file", "no such file"):
        read(tmp_path / "none.nii")
    with refused("to be a file", "too long"):
        read(tmp_path / ("x" * 300 + ".nii"))
    with refused("one of .nii, .nii.gz,.*.png", "ends with '.dcm'", "dcm2niix"):
        read(tmp_path / "x.dcm")
    with refused("at least one file", "none", kind=ValueError):
        read([])


def test_a_file_without_permission_is_refused():
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        path = nifti(Path(folder) / "secret.nii")
        path.chmod(0)
        try:
            if root:
                os.seteuid(65534)
            with refused("secret.nii to be a file", "Permission denied", "permissions"):
                read(path)  # in a folder that is closed
            os.seteuid(os.getuid())
            Path(folder).chmod(0o755)
            if root:
                os.seteuid(65534)
            with refused("secret.nii to be readable", "Permission denied", "permissions"):
                read(path)
        finally:
            os.seteuid(os.getuid())


def test_names_with_control_characters_stay_on_one_line(tmp_path):
    path = tmp_path / "a\nb\x1b[2J.nii"
    path.write_bytes(b"no")
    with pytest.raises(UnreadableInput, match=r"a\\nb\\x1b\[2J\.nii") as caught:
        read(path)
    assert str(caught.value).isprintable()


# -- arrays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["?", "u1", "<i2", ">i4", "i8", "f2", "<f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_real_type(tmp_path, kind, order):
    values = (np.arange(24) % 3).reshape(2, 3, 4).astype(kind)
    np.save(tmp_path / "a.npy", np.asarray(values, order=order))
    expected = values.astype(np.float32)
    for channels, result in (
        ("none", expected[None]),
        ("first", expected),
        ("last", np.moveaxis(expected, -1, 0)),
    ):
        volume = read(tmp_path / "a.npy", channels=channels)
        np.testing.assert_array_equal(volume.data.numpy(), result)
        assert volume.data.is_contiguous()
        assert volume.spacing == (1.0,) * (result.ndim - 1)
        np.testing.assert_array_equal(volume.affine, np.eye(4))


def test_arrays_with_one_or_two_axes_are_space_and_more_must_be_explained(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6.0).reshape(2, 3))
    assert tuple(read(tmp_path / "a.npy").data.shape) == (1, 2, 3)
    np.save(tmp_path / "b.npy", np.arange(6.0).reshape(1, 2, 3))
    with refused("explained", re.escape("(1, 2, 3)"), 'channels="first", "last" or "none"'):
        read(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.zeros((1, 1, 2, 3, 4)))
    for channels in ("first", "last", "none"):
        with refused("one to three axes of space", re.escape("(1, 1, 2, 3, 4)")):
            read(tmp_path / "c.npy", channels=channels)
    for values in (np.zeros(()), np.zeros((0, 3))):
        np.save(tmp_path / "d.npy", values)
        with refused("one to three axes of space"):
            read(tmp_path / "d.npy")
    with refused("NIfTI, where frame= is given"):
        read(tmp_path / "a.npy", frame=0)


def test_arrays_of_other_things_are_refused(tmp_path):
    for i, values in enumerate(
        (
            np.zeros(3, complex),
            np.array(["a"]),
            np.zeros(2, [("x", "f4")]),
            np.zeros(2, "M8[s]"),
            np.array([{}]),
        )
    ):
        np.save(tmp_path / f"{i}.npy", values, allow_pickle=True)
        with refused("an array of real numbers", "descr", "pickles are not opened"):
            read(tmp_path / f"{i}.npy")


def test_arrays_that_are_damaged_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 4), np.float32))
    whole = path.read_bytes()
    for cut in range(0, len(whole), 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(UnreadableInput):
            read(path)
    path.write_bytes(whole.replace(b"(4, 4)", b"(9**9,"))
    with refused("an array of real numbers"):
        read(path)
    path.write_bytes(whole.replace(b"(4, 4), } ", b"(99999,),}"))
    with refused("a whole array", "99999,.*64 bytes are left"):
        read(path)
    path.write_bytes(b"\x80\x04pickle")
    with refused("an array of NumPy", "pickle"):
        read(path)


# -- pictures --------------------------------------------------------------------------------------------------


def picture(path, values, mode=None, **options):
    image = pytest.importorskip("PIL.Image")
    made = image.fromarray(values)
    (made.convert(mode) if mode else made).save(path, **options)
    return path


def test_pictures_are_channels_of_rows_and_columns(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    volume = read(picture(tmp_path / "p.png", values))
    np.testing.assert_array_equal(volume.data.numpy(), np.moveaxis(values, -1, 0).astype(np.float32))
    assert volume.is_image
    assert volume.spacing == (1.0, 1.0)
    # A row further down lies lower in a viewer, where y points up; a column further right lies right.
    np.testing.assert_array_equal(volume.affine @ [2, 3, 0, 1], [3, -2, 0, 1])
    grey = read(picture(tmp_path / "g.PNG", values[..., 0]))
    np.testing.assert_array_equal(grey.data.numpy(), values[None, ..., 0].astype(np.float32))
    wide = values[..., 0].astype(np.uint16) * 257
    np.testing.assert_array_equal(
        read(picture(tmp_path / "w.png", wide)).data[0].numpy(), wide.astype(np.float32)
    )
    flat = np.full((16, 16, 3), 77, np.uint8)
    np.testing.assert_allclose(read(picture(tmp_path / "j.jpg", flat)).data.numpy(), 77, atol=1)
    assert tuple(read([tmp_path / "g.PNG", tmp_path / "p.png"]).data.shape) == (4, 4, 6)


def test_pictures_with_palettes_bits_and_opacity(tmp_path):
    values = np.zeros((4, 6, 3), np.uint8)
    values[:2] = [10, 200, 30]
    palette = read(picture(tmp_path / "p.png", values, "P"))
    assert palette.data.shape == (3, 4, 6)
    bits = read(picture(tmp_path / "b.png", np.where(np.eye(8) > 0, 255, 0).astype(np.uint8), "1"))
    assert torch.equal(bits.data[0], 255 * torch.eye(8))
    four = np.dstack([values, np.full((4, 6), 255, np.uint8)])
    np.testing.assert_array_equal(
        read(picture(tmp_path / "o.png", four)).data.numpy(), values.transpose(2, 0, 1)
    )
    four[0, 0, 3] = 0
    with refused("opaque", "transparent parts", "background"):
        read(picture(tmp_path / "t.png", four))
    with refused("grey or RGB", "CMYK"):
        read(picture(tmp_path / "c.jpg", values, "CMYK"))
    with refused("an array, where channels='first'", "a picture"):
        read(tmp_path / "p.png", channels="first")


def test_colours_of_16_bits_are_not_cut_down_to_8(tmp_path):
    pytest.importorskip("PIL.Image")

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    for depth, bytes_a_pixel in ((8, 3), (16, 6)):
        head = struct.pack(">IIBBBBB", 2, 2, depth, 2, 0, 0, 0)
        rows = zlib.compress((b"\0" + bytes(range(2 * bytes_a_pixel))) * 2)
        content = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
        (tmp_path / f"{depth}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert read(tmp_path / "8.png").data[:, 0, 1].tolist() == [3, 4, 5]
    with refused("8 bits for each colour", "16 bits for each colour", "NIfTI"):
        read(tmp_path / "16.png")


def test_a_picture_that_is_stored_lying_is_read_upright(tmp_path):
    image = pytest.importorskip("PIL.Image")
    values = np.zeros((8, 16), np.uint8)
    values[:, 8:] = 255
    exif = image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture(tmp_path / "e.jpg", values, exif=exif, quality=95)
    seen = read(tmp_path / "e.jpg").data[0]
    assert seen.shape == (16, 8)
    assert seen[:7].max() < 30
    assert seen[9:].min() > 225


def test_pictures_that_are_damaged_or_something_else_are_refused(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name in ("p.png", "p.jpg"):
        whole = picture(tmp_path / name, values).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with refused("a whole PNG or JPEG picture"):
            read(tmp_path / name)
    picture(tmp_path / "g.gif", values, "P").rename(tmp_path / "g.png")
    with refused("a whole PNG or JPEG picture", "cannot identify"):
        read(tmp_path / "g.png")
    claim = picture(tmp_path / "c.png", values[:2, :2]).read_bytes()
    claim = bytearray(claim)
    claim[16:24] = struct.pack(">II", 60000, 60000)
    claim[29:33] = struct.pack(">I", zlib.crc32(claim[12:29]))
    (tmp_path / "c.png").write_bytes(claim)
    with refused("a whole PNG or JPEG picture", "60000|bomb"):
        read(tmp_path / "c.png")


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "p.png").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r'expected Pillow.*pip install "esegeta\[viz\]"'):
        read(tmp_path / "p.png")


# -- several files ---------------------------------------------------------------------------------------------


def test_channels_from_several_files_share_one_grid(tmp_path):
    one = nifti(tmp_path / "1.nii", VALUES)
    two = nifti(tmp_path / "2.nii.gz", 2 * VALUES)
    volume = read([one, two])
    np.testing.assert_array_equal(volume.data.numpy(), np.stack([VALUES, 2 * VALUES]))
    assert volume.paths == (one, two)
    near = AFFINE.copy()
    near[0, 3] += 0.01
    read([one, nifti(tmp_path / "3.nii", affine=near)])
    far = AFFINE.copy()
    far[0, 3] += 0.03
    far[1, 3] -= 0.04
    with refused("4.nii to be on the grid of .*1.nii", "corners up to 0.05 mm apart", "Resample"):
        read([one, nifti(tmp_path / "4.nii", affine=far)])
    with refused("on the grid of .*1.nii, shape", r"shape \(3, 4, 4\)"):
        read([one, nifti(tmp_path / "5.nii", VALUES[..., :4])])
    turned = AFFINE @ np.diag([1, 1, 1.01, 1])  # 0.03 mm a plane, four planes
    with refused("on the grid", "corners up to 0.12 mm apart"):
        read([one, nifti(tmp_path / "6.nii", affine=turned)])


def test_patterns_find_files_in_order(tmp_path):
    for name in ("b.nii", "a.nii", "c[1].nii", "x.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "d.nii").mkdir()
    assert [p.name for p in volumes.glob("*.nii", tmp_path)] == ["a.nii", "b.nii", "c[1].nii"]
    assert [p.name for p in volumes.glob("c[1].nii", tmp_path)] == ["c[1].nii"]
    (tmp_path / "d.nii" / "e.nii").write_text("")
    assert [p.name for p in volumes.glob("**/*.nii", tmp_path)] == ["a.nii", "b.nii", "c[1].nii", "e.nii"]
    with refused("a file that matches .*z", "none", "relative to"):
        volumes.glob("z*", tmp_path)
    with refused("a file that matches", "none"):
        volumes.glob("a\0*", tmp_path)
    for name in ("p.hdr", "p.img", "q.img.gz", "q.hdr.gz", "r.img"):
        (tmp_path / name).write_text("")
    assert [p.name for p in volumes.glob("[pqr].*", tmp_path)] == ["p.hdr", "q.hdr.gz", "r.img"]
    odd = tmp_path / "run [1]"  # the folder is no pattern
    odd.mkdir()
    (odd / "a.nii").write_text("")
    assert volumes.glob("*.nii", odd) == [odd / "a.nii"] == volumes.glob(odd / "a.nii")
    assert volumes.glob(str(tmp_path / "a*.nii"), odd) == [tmp_path / "a.nii"]


def test_inputs_are_named_as_patterns_lists_and_channels(tmp_path):
    for name in ("sub-1_t1.nii", "sub-1_t2.nii", "sub-2_t1.nii", "sub-2_t2.nii", "sub-3_t1.nii"):
        (tmp_path / name).write_text("")

    def names(files):
        return [tuple(p.name for p in volume) for volume in volumes.expand(files, tmp_path)]

    assert names("*_t1.nii") == [("sub-1_t1.nii",), ("sub-2_t1.nii",), ("sub-3_t1.nii",)]
    assert names(["sub-3_t1.nii", "sub-1_*"]) == [("sub-3_t1.nii",), ("sub-1_t1.nii",), ("sub-1_t2.nii",)]
    pairs = [("sub-1_t1.nii", "sub-1_t2.nii"), ("sub-2_t1.nii", "sub-2_t2.nii")]
    assert names([["sub-[12]_t1.nii", "*_t2.nii"]]) == pairs
    assert names([list(pairs[1]), list(pairs[0])]) == pairs[::-1]
    with refused("as many files of each channel", r"\[3, 2\]"):
        names([["*_t1.nii", "*_t2.nii"]])
    with refused("channels of one subject", "sub-1, sub-2"):
        names([["sub-[23]_t1.nii", "*_t2.nii"]])
    with refused("at least one file", "none", kind=ValueError):
        names([])
    with refused("as many files of each channel", r"\[\]"):
        names([[]])
