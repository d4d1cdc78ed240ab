"""Small files that ask for a lot are refused before anything is spent on them."""

import gzip
import json
import time
import tomllib
import tracemalloc
import zipfile

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esegeta.run.config import bounds, convert, starter, toml
from esegeta.run.config import loading as config
from esegeta.run.config import sources as networks
from esegeta.run.config.loading import Faults
from esegeta.run.volumes import files as volumes
from esegeta.run.volumes import nifti, pictures

SECONDS = 20.0  # of a scan that takes a fraction of one, on a machine that does nine other things
MIB = 2**20

TOML_BOMBS = {
    "a dotted key": ("a" + ".a" * 50_000 + " = 1", "at most 32 tables"),
    "with spaces and quotes": ('a . "b" . ' * 100 + "c = 1", "at most 32 tables"),
    "in an inline table": ("x = { a" + ".a" * 100 + " = 1 }", "at most 32 tables"),
    "the head of a table": ("[a" + ".a" * 100 + "]", "at most 32 tables"),
    "tables in tables": ("x = " + "{ a.b.c.d = " * 10 + "1" + " }" * 10, "at most 32 tables"),
    "lists in lists": ("x = " + "[" * 5000 + "]" * 5000, "at most 32 tables"),
    "behind five quotes": ('x = """a"""""\ny = 1\na' + ".a" * 100 + " = 1", "at most 32 tables"),
    "behind five single quotes": ("x = '''a'''''\na" + ".a" * 100 + " = 1", "at most 32 tables"),
    "behind an escaped quote": ('x = "a\\\\"\na' + ".a" * 100 + ' = "1"', "at most 32 tables"),
    "behind a quote in a comment": ("# it's\na" + ".a" * 100 + " = '1'", "at most 32 tables"),
    "a long key": ("a" * 5000 + " = 1", "at most 1000 characters"),
    "a long key in quotes": ('"' + "a" * 5000 + '" = 1', "at most 1000 characters"),
    "a long number": ("x = " + "1" * 5000, "at most 1000 characters"),
    "a long number in hex": ("x = 0x" + "f" * 5000, "at most 1000 characters"),
    "many keys": ("".join(f"k{i}=1\n" for i in range(60_000)), "at most 50000 keys"),
    "many tables": ("[[a]]\n" * 60_000, "at most 50000 keys"),
    "many dots": ("".join(f"a.b.c.d.e.k{i}=1\n" for i in range(12_000)), "at most 50000 keys"),
    "a text without end": ('x = "abc\ny = 1', "closed quotes, got open ones in line 1"),
    "many quotes": ("x = '" + "'" * 100_001, "closed quotes|a fault in it"),
    "a large file": ("#" * (bounds.LARGEST + 1), "a text of at most"),
}
JSON_BOMBS = {
    "lists": ("[" * 100_000, "at most 32 tables"),
    "tables": ('{"a":' * 100_000, "at most 32 tables"),
    "a number": (f'{{"run": {"1" * 10_000}}}', "at most 1000 characters"),
    "a key": (f'{{"{"a" * 10_000}": 1}}', "at most 1000 characters"),
    "keys": ("{" + ",".join(f'"{i}":1' for i in range(60_000)) + "}", "at most 50000 keys"),
    "the same key": ("{" + ",".join(['"a":1'] * 40_000) + "}", "every key of a table once, got a twice"),
    "a text without end": ('{"a": "b', "closed quotes"),
    "a large file": (" " * (bounds.LARGEST + 1), "a text of at most"),
}
BOMBS = [
    *((f"c.toml: {name}", "c.toml", *bomb) for name, bomb in TOML_BOMBS.items()),
    *((f"c.json: {name}", "c.json", *bomb) for name, bomb in JSON_BOMBS.items()),
]


@pytest.mark.parametrize(
    ("name", "text", "words"), [bomb[1:] for bomb in BOMBS], ids=[bomb[0] for bomb in BOMBS]
)
def test_a_bomb_is_refused_before_it_is_parsed(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(Faults, match=rf"^configuration: expected .*({words})"):
            config.load(path)
        taken, peak = time.monotonic() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < SECONDS
    assert peak < 64 * MIB


def test_the_same_bounds_for_what_is_converted(tmp_path):
    (tmp_path / "old.json").write_text('{"methods": ' + "[" * 100_000)
    with pytest.raises(Faults, match=r"^convert: expected .*at most 32 tables"):
        convert.read(tmp_path / "old.json")
    (tmp_path / "old.json").write_text('{"methods": [{"keywords": {"n": ' + "9" * 5000 + "}}]}")
    with pytest.raises(Faults, match=r"^convert: expected .*at most 1000 characters"):
        convert.read(tmp_path / "old.json")


TABLES = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.one_of(st.text(max_size=30), st.integers(-9, 9), st.floats(allow_nan=False), st.booleans()),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TABLES)
def test_what_is_written_can_be_read(tables):
    text = toml.written({"a": tables, "b": [tables]})
    tomllib.loads(text)
    bounds.scan(text, json=False)
    bounds.scan(json.dumps(tables), json=True)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.text(alphabet="ab.\"'#\\\n=[]{}, ", max_size=40))
def test_whatever_the_parser_takes_as_deep_the_scan_has_seen(text):
    """A table that is deeper than allowed must not hide in what the scan takes for a text or a comment."""
    deep = f"{text}\nq{'.q' * 40} = 1\n"
    try:
        found = tomllib.loads(deep)
    except tomllib.TOMLDecodeError:
        return
    if "q" in found:
        with pytest.raises(bounds.TooMuch):
            bounds.scan(deep, json=False)


def test_ordinary_texts_pass():
    bounds.scan(starter.text(), json=False)
    many = ", ".join(["1.5"] * 60_000)
    bounds.scan(f"x = [{many}]\ny = 1979-05-27T07:32:00.999\n", json=False)
    bounds.scan('a = """\n"quoted" [[[ \\" """\nb = \'\'\'it\'s\'\'\'\n', json=False)
    bounds.scan(json.dumps({"a": "[" * 100, "b": [1.5] * 100}), json=True)


@pytest.mark.parametrize("name", ["c.toml", "c.json"])
def test_a_byte_order_mark_is_no_fault(tmp_path, name):
    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.float32))
    tables = {
        "model": {"source": "zoo:small_unet", "arguments": {"ndim": 2}},
        "input": {"files": "a.npy"},
        "targets": [{"name": "Läsion_肿瘤", "class": 0}],
        "methods": [{"name": "gradient"}],
    }
    text = toml.written(tables) if name.endswith("toml") else json.dumps(tables)
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert config.load(tmp_path / name).targets[0].name == "Läsion_肿瘤"
    (tmp_path / "old.json").write_text('{"methods": []}', encoding="utf-8-sig")
    assert convert.read(tmp_path / "old.json") == {"methods": []}


# -- volumes ---------------------------------------------------------------------------------------------------


def packed(path, shape, voxels=None, kind=np.uint8):
    """A header for a shape, and so many zeros behind it."""
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(kind)
    header.set_sform(np.eye(4), code=1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    count = int(np.prod(shape)) if voxels is None else voxels
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(header.binaryblock + bytes(4))
        for start in range(0, count, MIB):
            stream.write(bytes(min(MIB, count - start)))
    return path


def peak_of(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def no_reading(monkeypatch):
    def never(*_):
        raise AssertionError("unpacked")

    monkeypatch.setattr(nifti, "_voxels", never)


def test_a_volume_larger_than_memory_is_not_unpacked(tmp_path, no_reading):
    path = packed(tmp_path / "bomb.nii.gz", (512, 512, 128))
    assert path.stat().st_size < MIB
    with pytest.raises(volumes.UnreadableInput) as caught:
        volumes.read(path, memory=64 * MIB)
    assert "to be a volume that fits into memory, got one that takes 288 MiB to read, where 64 MiB" in str(
        caught.value
    )


def test_without_a_limit_it_is_what_the_machine_has(tmp_path, no_reading, monkeypatch):
    path = packed(tmp_path / "bomb.nii.gz", (512, 512, 128))
    for limit in (None, 2**40):
        monkeypatch.setattr(bounds, "available", lambda: 100 * MIB)
        with pytest.raises(volumes.UnreadableInput, match="where 100 MiB are allowed"):
            volumes.read(path, memory=limit)


def test_what_is_there_is_read_within_what_was_promised(tmp_path):
    shape = (128, 128, 64)
    path = packed(tmp_path / "a.nii.gz", shape)
    need = int(np.prod(shape)) * 9
    peak = peak_of(lambda: volumes.read(path, memory=need))
    assert peak < 1.25 * need + 4 * MIB
    with pytest.raises(volumes.UnreadableInput, match="fits into memory"):
        volumes.read(path, memory=need - 1)


def test_more_voxels_than_the_header_says_are_not_unpacked(tmp_path):
    path = packed(tmp_path / "long.nii.gz", (4, 4, 4), voxels=256 * MIB)
    peak = peak_of(lambda: volumes.read(path))
    assert peak < 8 * MIB


def test_fewer_voxels_than_the_header_says_cost_nothing(tmp_path):
    path = packed(tmp_path / "short.nii.gz", (512, 512, 512), voxels=MIB)
    with pytest.raises(volumes.UnreadableInput, match="header that asks for 134218080 bytes"):
        volumes.read(path)


def test_channels_share_what_is_allowed(tmp_path):
    files = [packed(tmp_path / f"{n}.nii.gz", (64, 64, 64)) for n in range(3)]
    with pytest.raises(volumes.UnreadableInput, match="fits into memory"):
        volumes.read(files, memory=3 * MIB)
    assert volumes.read(files, memory=9 * MIB).data.shape == (3, 64, 64, 64)


def test_arrays_with_holes_and_large_pictures(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((2, 2), np.float32))
    head = path.read_bytes().replace(b"(2, 2), }" + b" " * 12, b"(65536, 65536), }    ")
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + 4 * 2**32)  # a file of 16 GiB that occupies nothing
    with pytest.raises(volumes.UnreadableInput, match=r"fits into memory, got one that takes 48.0 GiB"):
        volumes.read(path, memory=2**30)
    pillow = pytest.importorskip("PIL.Image")
    pillow.new("L", (4000, 4000)).save(tmp_path / "a.png")
    with pytest.raises(volumes.UnreadableInput, match="fits into memory, got one that takes 245 MiB"):
        volumes.read(tmp_path / "a.png", memory=64 * MIB)
    assert pictures.read_picture(tmp_path / "a.png", None, None).data.shape == (1, 4000, 4000)


def test_weights_that_unpack_to_more_than_their_file(tmp_path, monkeypatch):
    torch.save({"weight": torch.zeros(2**16)}, tmp_path / "a.pt")
    assert set(networks.weights(tmp_path / "a.pt")) == {"weight"}
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, zipfile.ZipFile(tmp_path / "b.pt", "w") as small:
        for record in plain.infolist():
            small.writestr(record.filename, plain.read(record), zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match="weights as torch writes them, got 1 MiB packed into 1 MiB"):
        networks.weights(tmp_path / "b.pt")
