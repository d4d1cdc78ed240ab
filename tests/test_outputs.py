"""Maps lie where their image lies, files are whole or not there, and the same content is the same bytes."""

import csv
import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jaxtyping
import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esegeta.run.jobs import outputs
from esegeta.run.volumes import files as volumes
from esegeta.run.volumes import names
from esegeta.run.volumes.preprocess import apply
from esegeta.run.volumes.reading import UnreadableInput, Volume

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.4, -0.3, 0.2) @ np.diag([-1.0, 2.0, 1.5]), [5, -6, 7]
)


@pytest.fixture(autouse=True)
def our_own_messages():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def scan(path, affine=OBLIQUE, codes=(1, 2), units="mm", kind=nib.Nifti1Image, shape=(4, 5, 6)):
    image = kind(np.arange(math.prod(shape), dtype=np.int16).reshape(shape), affine)
    image.set_sform(affine, code=codes[1])
    image.set_qform(affine, code=codes[0])
    image.header.set_xyzt_units(units)
    image.header["descrip"] = b"a secret name"
    image.to_filename(path)
    return volumes.read(path)


# -- maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [(1, 1), (0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("units", ["mm", "micron", "meter", "unknown"])
def test_a_map_has_the_place_of_its_image(tmp_path, codes, kind, units):
    like = scan(tmp_path / "scan.nii.gz", codes=codes, kind=kind, units=units)
    map = torch.randn(1, 4, 5, 6)
    outputs.write_map(map, like, tmp_path / "map.nii.gz", description="gradient")
    image, original = nib.load(tmp_path / "map.nii.gz"), nib.load(tmp_path / "scan.nii.gz")
    np.testing.assert_allclose(image.affine, original.affine, atol=1e-6)
    for get in ("get_sform", "get_qform"):
        ours, theirs = getattr(image, get)(coded=True), getattr(original, get)(coded=True)
        assert ours[1] == theirs[1]
        if theirs[1]:
            np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
    assert image.header.get_xyzt_units()[0] == units
    assert image.header.get_data_dtype() == np.float32
    assert image.header["descrip"].item() == b"gradient"
    np.testing.assert_array_equal(np.asarray(image.dataobj), map[0].numpy())
    assert not isinstance(image, nib.Nifti2Image)
    again = volumes.read(tmp_path / "map.nii.gz")
    assert torch.equal(again.data, map)
    np.testing.assert_allclose(again.affine, like.affine, rtol=1e-6, atol=1e-6 * np.abs(like.affine).max())


def test_a_nifti_1_header_of_an_image_is_copied_to_the_bit(tmp_path):
    like = scan(tmp_path / "scan.nii")
    outputs.write_map(torch.zeros(1, 4, 5, 6), like, tmp_path / "map.nii")
    one, two = ((tmp_path / name).read_bytes() for name in ("scan.nii", "map.nii"))
    for start, stop in ((76, 92), (252, 328)):  # pixdim[0..3]; the codes, the quaternion and the rows
        assert one[start:stop] == two[start:stop]
    assert b"secret" not in two


def test_points_in_mm_are_the_same_in_a_map_that_went_through_steps(tmp_path):
    """A left-handed, anisotropic, oblique scan: a blob found on the network's grid lies on the blob of the scan."""
    grid = (24, 20, 18)
    index = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"))
    centre = np.array([15, 7, 11])
    blob = np.exp(
        -((index - centre[:, None, None, None]) ** 2 * np.array([1, 4, 2.25])[:, None, None, None]).sum(0)
        / 18
    )
    affine = OBLIQUE @ np.diag([1, 1, 1, 1])
    assert np.linalg.det(affine[:3, :3]) < 0
    nib.Nifti1Image(blob.astype(np.float32), affine).to_filename(tmp_path / "scan.nii.gz")
    like = volumes.read(tmp_path / "scan.nii.gz")
    done = apply(
        like,
        [
            {"step": "reorient", "to": "LPS"},
            {"step": "resample", "spacing": 1.2},
            {"step": "pad", "multiple": 8},
        ],
    )
    best = np.unravel_index(int(done.data[0].argmax()), done.data.shape[1:])
    assert np.linalg.norm((done.affine @ [*best, 1] - affine @ [*centre, 1])[:3]) < 1.5
    outputs.write_map(done.back(done.data), like, tmp_path / "map.nii.gz")
    seen = nib.load(tmp_path / "map.nii.gz")
    values = seen.get_fdata()
    mass = np.array([(index[i] * values).sum() for i in range(3)]) / values.sum()
    np.testing.assert_allclose((seen.affine @ [*mass, 1])[:3], (affine @ [*centre, 1])[:3], atol=0.1)
    assert np.corrcoef(values.ravel(), blob.ravel())[0, 1] > 0.97


def test_several_channels_are_the_fourth_axis(tmp_path):
    like = scan(tmp_path / "scan.nii")
    map = torch.randn(3, 4, 5, 6)
    outputs.write_map(map, like, tmp_path / "map.nii.gz")
    image = nib.load(tmp_path / "map.nii.gz")
    assert image.shape == (4, 5, 6, 3)
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), map.permute(1, 2, 3, 0).numpy())
    assert torch.equal(volumes.read(tmp_path / "map.nii.gz", channels="last").data, map)


@pytest.mark.parametrize("shape", [(7,), (4, 5)])
def test_images_with_fewer_axes(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape))
    like = volumes.read(tmp_path / "x.npy")
    for channels, expected in ((1, shape), (2, (*shape, *(1,) * (3 - len(shape)), 2))):
        map = torch.randn(channels, *shape)
        outputs.write_map(map, like, tmp_path / "map.nii.gz")
        image = nib.load(tmp_path / "map.nii.gz")
        assert image.shape == expected
        np.testing.assert_array_equal(
            np.asarray(image.dataobj).reshape(*shape, channels), map.moveaxis(0, -1).numpy()
        )
        np.testing.assert_array_equal(image.affine, np.eye(4))
        assert image.header.get_xyzt_units()[0] == "unknown"


def test_the_map_of_a_picture_is_upright_and_has_no_millimetres(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    pillow.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "p.png")
    like = volumes.read(tmp_path / "p.png")
    outputs.write_map(torch.zeros(1, 4, 6), like, tmp_path / "map.nii")
    image = nib.load(tmp_path / "map.nii")
    assert image.header.get_xyzt_units()[0] == "unknown"
    assert nib.aff2axcodes(image.affine) == ("P", "R", "S")


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        *((torch.bool, np.uint8), (torch.uint8, np.uint8), (torch.int64, np.int32), (torch.int16, np.int32)),
        *((torch.float64, np.float32), (torch.float16, np.float32), (torch.bfloat16, np.float32)),
    ],
)
def test_types_of_maps(tmp_path, kind, stored):
    like = scan(tmp_path / "scan.nii")
    map = (torch.arange(120).reshape(1, 4, 5, 6) % 2).to(kind)
    outputs.write_map(map, like, tmp_path / "map.nii.gz")
    image = nib.load(tmp_path / "map.nii.gz")
    assert image.header.get_data_dtype() == stored
    np.testing.assert_array_equal(np.asarray(image.dataobj), map[0].double().numpy())


def test_a_map_with_a_long_axis_is_nifti_2(tmp_path):
    like = Volume(torch.zeros(1, 40000), np.eye(4), (1.0,))
    outputs.write_map(torch.arange(40000.0)[None], like, tmp_path / "map.nii.gz")
    assert nib.load(tmp_path / "map.nii.gz").header.get_xyzt_units()[0] == "mm"
    assert isinstance(nib.load(tmp_path / "map.nii.gz"), nib.Nifti2Image)
    assert torch.equal(volumes.read(tmp_path / "map.nii.gz").data[0], torch.arange(40000.0))


def test_maps_that_cannot_be_written_leave_nothing(tmp_path):
    like = scan(tmp_path / "scan.nii")
    cases = [
        (
            torch.zeros(1, 4, 5, 7),
            "map.nii",
            ValueError,
            r"a map \(K,\*S\) on the grid of the image, S = \(4, 5, 6\)",
        ),
        (torch.zeros(4, 5, 6), "map.nii", ValueError, r"a map \(K,\*S\) on the grid"),
        (torch.zeros(0, 4, 5, 6), "map.nii", ValueError, r"a map \(K,\*S\) on the grid"),
        (torch.full((1, 4, 5, 6), math.nan), "map.nii", ValueError, "finite values in map, got 120 NaN"),
        (torch.zeros(1, 4, 5, 6, dtype=torch.complex64), "map.nii", TypeError, "real values"),
        (torch.zeros(1, 4, 5, 6), "map.img", ValueError, "a path ending in .nii or .nii.gz"),
        ("map", "map.nii", TypeError, "map to be a torch.Tensor"),
    ]
    for map, name, kind, expected in cases:
        with pytest.raises(kind, match=rf"^write_map: expected {expected}"):
            outputs.write_map(map, like, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["scan.nii"]


def test_the_same_map_is_the_same_bytes(tmp_path):
    like = scan(tmp_path / "scan.nii.gz")
    map = torch.randn(2, 4, 5, 6)
    for name in ("a.nii.gz", "b.nii.gz"):
        outputs.write_map(map, like, tmp_path / name)
    # Another process, another working directory, another hash seed, another day.
    code = """
        import sys, time, torch
        time.time = lambda: 1e9
        from esegeta.run.jobs import outputs
        from esegeta.run.volumes import files as volumes
        like = volumes.read(sys.argv[1])
        outputs.write_map(torch.load(sys.argv[2]), like, sys.argv[3])
    """
    torch.save(map, tmp_path / "map.pt")
    files = [str(tmp_path / name) for name in ("scan.nii.gz", "map.pt", "c.nii.gz")]
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *files],
        check=True,
        cwd=Path(outputs.__file__).parents[3],
        env={**os.environ, "PYTHONHASHSEED": "5", "TZ": "Asia/Tokyo"},
        timeout=120,
    )
    a, b, c = ((tmp_path / f"{name}.nii.gz").read_bytes() for name in "abc")
    assert a == b == c
    assert a[:10] == b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # no name, no date, no system
    assert len(gzip.decompress(a)) == 352 + 4 * map.numel()


# -- whole or not there ----------------------------------------------------------------------------------------


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.nii.gz"
    path.write_text("old")

    def fail():
        with outputs.atomic(path) as part:
            assert part.parent == tmp_path
            assert part.name.endswith(".nii.gz")
            part.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_was_never_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), outputs.atomic(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_written_files_have_the_permissions_of_any_file(tmp_path):
    before = os.umask(0o022)
    try:
        outputs.write_text(tmp_path / "new" / "x.txt", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "x.txt").stat().st_mode & 0o777 == 0o644


def test_a_killed_process_leaves_the_old_file_and_a_part_that_is_swept_away(tmp_path):
    outputs.write_text(tmp_path / "sub" / "x.txt", "old")
    code = """
        import sys, time
        from esegeta.run.jobs import outputs
        with outputs.atomic(sys.argv[1]) as part:
            part.write_text("half")
            print("now", flush=True)
            time.sleep(100)
    """
    path = str(tmp_path / "sub" / "x.txt")
    root = Path(outputs.__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), path], stdout=subprocess.PIPE, cwd=root
    )
    with process:
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "sub" / "x.txt").read_text() == "old"
    assert len(list((tmp_path / "sub").iterdir())) == 2
    assert outputs.sweep(tmp_path) == 1
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["x.txt"]
    assert outputs.sweep(tmp_path) == 0


def test_who_reads_the_old_file_reads_it_to_the_end(tmp_path):
    path = tmp_path / "x.txt"
    outputs.write_text(path, "old " * 100_000)
    with path.open() as stream:
        start = stream.read(4)
        outputs.write_text(path, "new")
        assert start + stream.read() == "old " * 100_000
    assert path.read_text() == "new"


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "x.json"
    outputs.write_json(path, list(range(2000)))
    seen = set()
    for n in range(20):
        with outputs.atomic(path) as part:
            part.write_text("[")
            seen.add(len(json.loads(path.read_text())))
            part.write_text(json.dumps([n] * (n + 1)))
        seen.add(len(json.loads(path.read_text())))
    assert seen == {2000, *range(1, 21)}


# -- text ------------------------------------------------------------------------------------------------------


def test_sidecars_are_sorted_and_every_reader_takes_them(tmp_path):
    content = {
        "z": math.inf,
        "a": {"nan": np.float32("nan"), 2: torch.tensor([1.5, -math.inf]), 1: np.int64(3)},
        "path": tmp_path,
        "set": {"b", "a"},
        "tuple": (True, None, "ü\n"),
        "dtype": torch.float32,
    }
    outputs.write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "z": None,
        "a": {"nan": None, "2": [1.5, None], "1": 3},
        "path": str(tmp_path),
        "set": ["a", "b"],
        "tuple": [True, None, "ü\n"],
        "dtype": "torch.float32",
    }
    assert text == outputs.json_text(dict(reversed(content.items())))
    assert text.isascii()
    assert text.endswith("}\n")


def test_tables_have_a_header_and_survive_the_way_back(tmp_path):
    rows = [
        {"id": "a", "score": 0.1 + 0.2, "error": None},
        {"id": 'b,"x"\nnext', "score": -1, "seconds": torch.tensor(2.0), "list": [1, 2]},
        {"id": "=SUM(A1)", "score": math.nan},
    ]
    outputs.write_table(tmp_path / "t.csv", rows)
    with (tmp_path / "t.csv").open(newline="") as stream:
        back = list(csv.DictReader(stream))
    assert list(back[0]) == ["id", "score", "error", "seconds", "list"]
    assert float(back[0]["score"]) == 0.1 + 0.2
    assert [row["id"] for row in back] == ["a", 'b,"x"\nnext', "'=SUM(A1)"]
    assert back[1]["score"] == "-1"
    assert (back[1]["seconds"], back[1]["list"], back[2]["score"], back[0]["error"]) == (
        "2.0",
        "[1, 2]",
        "",
        "",
    )
    outputs.write_table(tmp_path / "u.csv", rows, ["score", "none"])
    assert (tmp_path / "u.csv").read_text().splitlines()[0] == "score,none"
    outputs.write_table(tmp_path / "v.csv", [], ["id"])
    assert (tmp_path / "v.csv").read_text() == "id\n"


def test_the_folder_is_a_derived_dataset(tmp_path):
    outputs.dataset(tmp_path, title="Brain", version="0.1.0")
    about = json.loads((tmp_path / "dataset_description.json").read_text())
    assert about["Name"] == "Brain"
    assert about["DatasetType"] == "derivative"
    assert about["GeneratedBy"] == [{"Name": "esegeta", "Version": "0.1.0"}]
    ignored = (tmp_path / ".bidsignore").read_text().splitlines()
    for path in (names.anatomy("sub-1"), names.statmap("sub-1", "t", "m"), names.prediction("sub-1", "t")):
        assert any(path.match(pattern) for pattern in ignored), path


# -- names -----------------------------------------------------------------------------------------------------

EVIL = [
    "../../x",
    "a\0b",
    "/etc/passwd",
    "..",
    "",
    " ",
    "x" * 500,
    "Ünïcödé",
    "脳",
    "CON",
    "a\nb",
    "-rf",
    ".hidden",
]


def safe(part):
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part), part
    assert len(part) < 200
    assert ".." not in part


@pytest.mark.parametrize("text", EVIL)
def test_text_from_files_is_never_a_path(tmp_path, text):
    for path in (
        names.anatomy(text),
        names.statmap(text, text, text),
        names.statmap("sub-1", "t", "m", f"{text}.png"),
        names.prediction(text, text),
        Path(names.job(text, text, text)),
    ):
        assert not path.is_absolute()
        for part in path.parts:
            safe(part)
        whole = (tmp_path / path).resolve()
        assert whole.is_relative_to(tmp_path.resolve())
        outputs.write_text(whole, "here")
        assert whole.read_text() == "here"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=80), st.text(max_size=80))
def test_labels_are_letters_and_digits_and_stay_apart(a, b):
    for text in (a, b):
        assert re.fullmatch(f"[A-Za-z0-9]{{1,{names.LONGEST}}}", names.label(text))
        assert names.label(names.label(text)) == names.label(text)
        for path in (f"{text}.nii.gz", f"sub-{text}.nii.gz", f"sub-1_ses-{text}_run-{text}.nii"):
            if "/" not in text:
                safe(names.subject(path))
                assert names.subject_of(names.subject(path)) == names.subject(path)
    if a != b:
        assert names.subject_label(a) != names.subject_label(b)
        assert names.label(f"ä{a}") != names.label(f"ä{b}")


def test_names_of_files_as_in_bids():
    base = {"target": "tumour", "desc": "smoothgrad"}
    assert (
        names.name("sub-01", "statmap", ".nii.gz", **base)
        == "sub-01_space-orig_label-tumour_desc-smoothgrad_statmap.nii.gz"
    )
    assert names.name("sub-01", "statmap", ".json", channel=2, **base).endswith(
        "label-tumour_chan-2_desc-smoothgrad_statmap.json"
    )
    assert outputs.name is names.name
    for path in (names.anatomy("sub-1_ses-2"), names.statmap("sub-1_ses-2", "t", "m", "overlay.png")):
        entities = path.name.split(".")[0].split("_")
        assert entities[:2] == ["sub-1", "ses-2"]
        assert path.parts[:2] == ("sub-1", "ses-2")
    assert names.statmap("sub-1", "t", "m", "statmap.json").suffix == ".json"


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("sub-01_T1w.nii.gz", "sub-01"),
        ("sub-AB12_run-1_ses-pre_T1w.nii", "sub-AB12_ses-pre_run-1"),
        ("sub-1_space-MNI_desc-clean_T1w.nii", "sub-1"),
        ("photo.JPG", "sub-photo"),
        ("../../sub-9/../x.npy", "sub-x"),
    ],
)
def test_subjects_from_names(name, subject):
    assert names.subject(name) == subject


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("BraTS_001_t1.nii.gz", "sub-BraTS001T1x"),
        (".nii", "sub-niix"),
        ("sub-.nii", "sub-subx"),
        ("sub-ä中.nii", "sub-ax"),
        ("sub-中.nii", "sub-x"),
        ("sub-A-1_T1w.nii", "sub-A1x"),
        ("sub-01.T1.nii", "sub-01T1x"),
        (
            "sub-1_" + "_".join(f"{'ab'[i % 2]}{chr(99 + i)}-{'v' * 9}" for i in range(12)) + ".nii",
            "sub-sub1",
        ),
    ],
)
def test_what_a_label_cannot_hold_is_marked(name, begins):
    subject = names.subject(name)
    assert re.fullmatch(re.escape(begins) + r"[A-Za-z0-9]*?x?[0-9a-f]{8}", subject), subject
    safe(subject)


def test_subjects_by_a_pattern():
    assert names.subject("case_0042_a.nii", r"case_(\d+)") == "sub-0042"
    assert names.subject("x/p-sub-7.nii", r"p-(.*)\.nii") == "sub-7"
    with pytest.raises(
        UnreadableInput, match=r"^names.subject: expected a name that .* matches, got b.nii. Its first"
    ):
        names.subject("b.nii", r"case_(\d+)")
    with pytest.raises(UnreadableInput, match="Its first group"):
        names.subject("case_1.nii", r"case_\d+")
    with pytest.raises(ValueError, match=r"^names.subject: expected a regular expression, got '\('"):
        names.subject("b.nii", "(")


@pytest.mark.parametrize("pattern", [r"((a+)+)\d$", r"((a|aa)+)\d", "(" + "a?" * 60 + "a" * 60 + ")b"])
def test_a_pattern_that_takes_for_ever_is_refused(monkeypatch, pattern):
    monkeypatch.setattr(names, "_SECONDS", 0.5)
    with pytest.raises(
        UnreadableInput, match=r"^names.subject: expected a pattern that is looked for in 1 names"
    ):
        names.subjects([["a" * 60 + ".nii"]], pattern)


def test_a_pattern_is_short():
    with pytest.raises(
        UnreadableInput, match=r"^names.subject: expected a pattern of at most 200 characters"
    ):
        names.subject("a.nii", "(" + "a" * 500 + ")")


def test_a_subject_does_not_depend_on_other_files():
    files = [
        "y/A-1.nii",
        "y/A_1.nii",
        "y/A1.nii",
        "y/A12.nii",
        "y/A-12.nii",
        "sub-1_T1w.nii",
        "sub-1_ses-1_T1w.nii",
    ]
    together = names.subjects([[f] for f in files])
    assert together == [names.subjects([[f]])[0] for f in files] == [names.subject(f) for f in files]
    assert len({name.lower() for name in together}) == len(files)
    assert together[2:4] == ["sub-A1", "sub-A12"]
    assert not set(together[:2]) & {"sub-A1", "sub-A12"}
    assert names.subjects([]) == []
    for name in together:
        safe(name)
        assert names.subject_of(name) == name


@pytest.mark.parametrize(
    "pair",
    [
        ("a/scan.nii", "b/scan.nii"),
        ("sub-1_T1w.nii", "sub-1_T2w.nii"),
        ("scan.nii", "SCAN.nii"),
        ("sub-1_desc-a_T1w.nii", "sub-1_desc-b_T1w.nii"),
    ],
)
def test_two_files_of_one_subject_are_refused(pair):
    """A number behind one of them would depend on the other."""
    with pytest.raises(
        UnreadableInput, match=r"expected files with a subject each, got .*, both sub-"
    ) as caught:
        names.subjects([[f] for f in pair])
    assert all(f in str(caught.value) for f in pair)
    pattern = str(caught.value).split("'")[1]
    assert names.subjects([["/x/a/scan.nii"], ["/x/b/scan.nii"]], pattern) == ["sub-a", "sub-b"]
