"""Figures: what is drawn is what the numbers say, wherever the patient's right lies."""

import io
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from esegeta import plot
from esegeta.plot import canvas, colours, grids, images

pytest.importorskip("matplotlib", reason="figures need the extra viz")


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Fewer pixels, the same content; the tests that compare files with other processes leave it out."""
    monkeypatch.setattr(canvas, "DPI", 40)


def bumps(shape, key=0):
    """A map with both signs, ``(1, *shape)``."""
    return np.random.default_rng(key).standard_normal((1, *shape)).astype(np.float32)


def pictures(figure):
    """The arrays of a figure's pictures, without colour bars, from left to right and top to bottom."""
    return [np.asarray(one.get_array()) for one in artists(figure)]


def artists(figure):
    """The pictures of a figure as matplotlib has them."""
    return [one for one in figure.artists if one.get_gid() == "picture"]


def words(figure):
    return "\n".join(
        [t.get_text() for t in figure.texts if t.get_gid() != "bar"]
        + [t.get_text() for a in figure.axes for t in a.texts]
    )


AFFINE = np.array([[-2.0, 0, 0, 10], [0, 3.0, 0, -20], [0, 0, 4.0, 5], [0, 0, 0, 1]])


# -- where things are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_and_letters_agree_on_where_the_patient_s_right_is(axis):
    # One bright voxel at the right, front and top of the patient, in an array that runs right, front, up.
    values = np.zeros((1, 5, 6, 7))
    values[0, 4, 5, 6] = 1
    scene = grids.scene("overlay", values, None, None, np.eye(4))
    index = [int(i) for i in np.argwhere(scene.values)[0]]
    picture = grids.plane(scene.values, axis, index[axis], oriented=True)
    row, column = np.argwhere(picture)[0]
    low, high, top, bottom = grids.letters(axis)
    across = low if column == 0 else high
    down = top if row == 0 else bottom
    assert row in (0, picture.shape[0] - 1)
    assert column in (0, picture.shape[1] - 1)
    assert {across, down} == {"RAS"[a] for a in range(3) if a != axis}


def test_a_file_without_a_place_does_not_pretend_to_know_sides():
    def said(affine, box=None):
        scene = grids.scene("overlay", bumps((6, 8, 10)), None, None, affine, box=box)
        return images._words([scene], None, 99.5, "as it is")

    moved = np.eye(4)
    moved[:3, 3] = 0.25, -20, 3
    assert "assume" in said(np.eye(4))
    assert "assume" in said(np.eye(4), [[1, 5], [2, 6], [3, 9]])
    assert "assume" not in said(moved)
    assert "assume" not in said(AFFINE)


def test_a_plane_through_the_middle_lies_at_0_mm_and_not_at_minus_0():
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, 3] = -2.2, -3.4, -4.3
    scene = grids.scene("overlay", bumps((5, 7, 9)), None, None, affine)
    assert [images._place(scene, axis, n) for axis, n in enumerate((2, 3, 4))] == ["0 mm"] * 3


@pytest.mark.parametrize("kind", ["overlay", "projections", "montage"])
def test_the_picture_does_not_depend_on_how_the_array_is_stored(kind):
    from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

    values, anatomy = bumps((6, 8, 10))[0], np.abs(bumps((6, 8, 10), 1))[0]
    first = plot.png(plot.show(values[None], anatomy[None], None, kind, "x", AFFINE))
    codes = [
        "".join(c) for order in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*order)
    ]
    assert len(codes) == 48
    for code in codes[5 :: 14 if kind == "overlay" else 23]:
        turn = ornt_transform(axcodes2ornt("LAS"), axcodes2ornt(code))
        affine = AFFINE @ inv_ornt_aff(turn, values.shape)
        stored, under = apply_orientation(values, turn), apply_orientation(anatomy, turn)
        assert plot.png(plot.show(stored[None], under[None], None, kind, "x", affine)) == first, code


def test_spacing_gives_the_pictures_their_shape():
    figure = plot.overlay(bumps((10, 20, 30)), spacing=(3.0, 2.0, 1.0))
    boxes = [one.get_window_extent(None) for one in artists(figure)]
    found = [(b.width, b.height) for b in boxes]
    expected = [(30.0, 40.0), (30.0, 30.0), (40.0, 30.0)]  # mm: across axis 2, 1, 0
    scale = found[0][0] / 30.0
    np.testing.assert_allclose(found, np.array(expected) * scale, rtol=1e-6)


def test_spacing_comes_from_the_affine_where_it_is_not_given():
    scene = grids.scene("overlay", bumps((3, 4, 5)), None, None, AFFINE)
    assert scene.sizes == (2.0, 3.0, 4.0)
    turned = grids.scene("overlay", bumps((3, 4, 5)), None, None, AFFINE[:, [1, 2, 0, 3]])
    assert turned.sizes == (2.0, 3.0, 4.0)


def test_planes_say_where_they_lie_in_mm():
    # Array index 2 along the third axis lies at 5 + 4 * 2 mm.
    values = np.zeros((1, 5, 6, 7))
    values[0, 1, 3, 2] = 1
    text = words(plot.overlay(values, np.ones_like(values), affine=AFFINE, at=(1, 3, 2)))
    assert {"8 mm", "-11 mm", "13 mm"} <= set(text.splitlines())


def test_planes_go_through_what_is_strongest_inside_of_the_anatomy():
    values = np.full((1, 24, 24, 24), 0.01)
    values[0, 3:6, 4:7, 5:8] = 1
    values[0, 19:24, 19:24, 19:24] = -5  # in the air
    anatomy = np.zeros_like(values)
    anatomy[0, :12] = 1
    scene = grids.scene("overlay", values, anatomy, None, None)
    assert grids.strongest([scene.values], scene.anatomy) == (4, 5, 6)
    assert grids.strongest([scene.values]) == (21, 21, 21)  # the middle of what is alike


def test_a_flat_image_is_shown_as_it_is():
    rgb = np.random.default_rng(0).random((3, 5, 7)).astype(np.float32)
    first, second = pictures(plot.overlay(np.zeros((1, 5, 7)), rgb))
    np.testing.assert_allclose(first, np.moveaxis(rgb, 0, -1), atol=1e-6)
    # Its colours would be taken for those of the map.
    np.testing.assert_allclose(second, np.repeat(first @ [[0.299], [0.587], [0.114]], 3, -1), atol=1e-6)
    grey = pictures(plot.overlay(np.zeros((1, 5, 7)), rgb[:1]))[0]
    order = np.argsort(rgb[0].ravel())
    assert (np.diff(grey[..., 0].ravel()[order]) >= 0).all()


def test_one_slice_of_a_volume_is_turned_by_its_affine():
    values = np.zeros((1, 4, 5))
    values[0, 3, 4] = 1  # right and in front: the right is on the left of the picture, the front on top
    picture = pictures(plot.overlay(values, affine=np.eye(4)))[0]
    assert picture.shape[:2] == (5, 4)
    assert picture[0, 0].max() > 0.5
    assert picture.reshape(-1, 3)[1:].max() == 0


# -- what is drawn ---------------------------------------------------------------------------------------------


def test_projections_are_the_maxima_along_each_axis():
    values = bumps((4, 5, 6))
    figure = plot.projections(values)
    a = values[0]
    limit = max(float(np.abs(a).max(axis).max()) for axis in range(3))
    found = pictures(figure)
    assert len(found) == 9
    for row, (kind, sign) in enumerate([("size", 0), ("positive", 1), ("negative", -1)]):
        for column, axis in enumerate((2, 1, 0)):
            others = [b for b in range(3) if b != axis]
            expected = np.zeros((a.shape[others[1]], a.shape[others[0]]))
            for index in np.ndindex(a.shape):  # the plainest loop
                value = abs(a[index]) if sign == 0 else max(sign * a[index], 0)
                place = (a.shape[others[1]] - 1 - index[others[1]], index[others[0]])
                expected[place] = max(expected[place], value)
            black = np.zeros((*expected.shape, 3))
            scale = colours.Scale(kind, limit)
            drawn = colours.blend(-expected if sign == -1 else expected, scale, black)
            np.testing.assert_allclose(found[3 * row + column], drawn, atol=1e-6)


def test_zero_leaves_the_anatomy_alone_and_says_so():
    anatomy = np.abs(bumps((6, 7, 8)))
    figure = plot.overlay(np.zeros((1, 6, 7, 8)), anatomy)
    above, below = pictures(figure)[:3], pictures(figure)[3:]
    for one, other in zip(above, below, strict=True):
        np.testing.assert_allclose(one, other)
    assert "zero everywhere" in words(figure).replace("\n", " ")


def test_the_scale_is_robust_and_stated():
    values = bumps((20, 20, 20))
    values[0, 0, 0, 0] = 1e6
    size = np.sort(np.abs(values).ravel())
    limit = grids.limit_of(values)
    assert size[int(0.997 * size.size)] < limit < size[int(0.999 * size.size)]
    text = words(plot.overlay(values)).replace("\n", " ")
    assert f"ends at {canvas.numeral(limit)}" in text
    assert "99.8 %" in text
    assert "largest size is 1 × 10⁶" in text


def test_a_scale_that_is_asked_for_is_kept():
    values = bumps((5, 5, 5))
    assert "ends at 0.5" in words(plot.overlay(values, limit=0.5)).replace("\n", " ")


def test_channels_are_added_up():
    values = np.concatenate([bumps((4, 4, 4)), bumps((4, 4, 4), 1)])
    both = pictures(plot.overlay(values, at=(1, 1, 1)))
    summed = pictures(plot.overlay(values.sum(0, keepdims=True), at=(1, 1, 1)))
    for one, other in zip(both, summed, strict=True):
        np.testing.assert_array_equal(one, other)
    assert "Sum of 2 channels" in words(plot.overlay(values)).replace("\n", " ")


def test_tensors_and_arrays_are_the_same():
    values = bumps((4, 5, 6))
    tensor = torch.from_numpy(values).double().requires_grad_()
    assert plot.png(plot.overlay(values)) == plot.png(plot.overlay(tensor))


def test_maps_side_by_side_share_a_scale_or_have_their_own():
    maps = {"a": bumps((5, 6, 7)), "b": 10 * bumps((5, 6, 7))}
    shared = pictures(plot.side_by_side(maps, at=(2, 2, 2)))
    own = pictures(plot.side_by_side(maps, at=(2, 2, 2), shared=False))
    assert len(shared) == len(own) == 6
    for row in range(3):
        assert not np.allclose(shared[2 * row], shared[2 * row + 1])
        np.testing.assert_allclose(own[2 * row], own[2 * row + 1], atol=1e-6)


def test_many_maps_begin_new_rows_and_keep_their_names():
    maps = {f"map {i}": bumps((4, 4, 4), i) for i in range(8)}
    figure = plot.side_by_side(maps, shared=False)
    assert len(pictures(figure)) == 8 * 3
    text = words(figure)
    assert all(name in text for name in maps)


def test_maps_of_layers_are_brought_to_the_grid_of_the_image():
    anatomy = np.abs(bumps((8, 8, 8)))
    coarse = np.arange(8.0).reshape(1, 2, 2, 2) + 1
    figure = plot.layers({"encoder.0": coarse, "encoder.1": bumps((8, 8, 8))}, anatomy)
    assert len(pictures(figure)) == 6
    assert {p.shape for p in pictures(figure)} == {(8, 8, 3)}
    assert "encoder.0" in words(figure)


def test_a_montage_goes_through_what_is_not_empty():
    anatomy = np.zeros((1, 8, 8, 40))
    anatomy[0, 2:6, 2:6, 10:30] = 1
    figure = plot.montage(bumps((8, 8, 40)), anatomy, slices=5)
    assert [line for line in words(figure).splitlines() if line.isdigit()] == ["10", "15", "20", "24", "29"]
    assert len(pictures(figure)) == 5
    assert len(pictures(plot.montage(bumps((8, 8, 3))))) == 3
    assert len(pictures(plot.montage(bumps((8, 8))))) == 1
    assert {p.shape for p in pictures(plot.montage(bumps((4, 5, 6)), axis=0))} == {(6, 5, 3)}


# -- colours ---------------------------------------------------------------------------------------------------


def brightness(rgb):
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("kind", ["positive", "negative", "size"])
def test_more_is_brighter(kind):
    share = np.linspace(0, 1, 101)
    for scheme in colours.SCHEMES:
        scale = colours.Scale(kind, 1.0, scheme)
        drawn = colours.blend(-share if kind == "negative" else share, scale, np.zeros((101, 3)))
        assert (np.diff(brightness(drawn)) > 0).all(), scheme


@pytest.mark.parametrize(
    "loss",
    [  # Machado, Oliveira, Fernandes 2009, full severity: protanopia, deuteranopia, tritanopia
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ],
)
def test_signs_differ_for_every_kind_of_colour_vision(loss):
    share = np.linspace(0.3, 1, 30)
    for scheme in colours.SCHEMES:
        kinds = [colours.ramp(kind, share, scheme) for kind in ("positive", "negative")]
        plus, minus = (np.clip(kind @ np.array(loss).T, 0, 1) for kind in kinds)
        assert np.abs(plus - minus).max(-1).min() > 0.25, scheme


def test_signed_colours_are_symmetric_in_what_they_cover():
    values = np.array([-2.0, -0.5, 0.0, 0.5, 2.0])
    scale = colours.Scale("signed", 1.0)
    on_black, on_white = (colours.blend(values, scale, np.full((5, 3), c)) for c in (0.0, 1.0))
    seen_through = (on_white - on_black)[:, 0]
    np.testing.assert_allclose(seen_through, seen_through[::-1])
    assert seen_through[2] == 1
    assert seen_through[0] == pytest.approx(0.05)


def test_what_is_no_number_has_a_colour_of_its_own():
    values = bumps((6, 6, 6))
    values[0, 2, 2, 2], values[0, 3, 3, 3] = np.inf, np.inf
    figure = plot.overlay(values, at=(2, 2, 2))
    assert any((np.abs(p - colours.BROKEN).max(-1) < 1e-6).sum() == 1 for p in pictures(figure))
    assert "2 values are infinite (green)" in words(figure).replace("\n", " ")


def stripes_in(picture):
    """Which pixels have the colours of what was not computed."""
    return np.min([np.abs(picture - grey).max(-1) for grey in colours.UNKNOWN], 0) < 1e-6


def test_what_was_not_computed_is_hatched_and_its_share_is_said():
    values = bumps((8, 8, 8)) + 1
    values[0, :4] = np.nan
    said = "50 % of the values are NaN: they were not computed (hatched)"
    for draw in (plot.overlay, plot.montage, plot.projections):
        figure = draw(values)
        assert said in words(figure).replace("\n", " ")
        assert any(stripes_in(p).any() for p in pictures(figure))
    across, along = (pictures(plot.overlay(values, at=(6, 2, 2)))[i] for i in (0, 2))
    assert stripes_in(across).sum() == 32, "half of a plane, in both greys"
    assert len(np.unique(across[stripes_in(across)], axis=0)) == 2
    assert not stripes_in(along).any(), "a plane that is whole"
    # Along the first axis every line of sight meets what is not known, but no line is without what is.
    figure = plot.projections(values)
    assert "Thinly hatched: known on a part" in words(figure).replace("\n", " ")
    thin = stripes_in(pictures(figure)[2])
    assert 0 < thin.mean() < 0.5
    assert not any(stripes_in(p).any() for p in pictures(plot.projections(bumps((8, 8, 8)))))


def test_a_signal_hatches_what_was_not_computed():
    values = np.ones((1, 20))
    values[0, 15:] = np.nan
    figure = plot.signal(values)
    assert "5 values are NaN: not computed (hatched)" in words(figure)
    (span,) = [patch for patch in figure.axes[0].patches if patch.get_hatch()]
    assert (span.get_x(), span.get_width()) == (14.5, 5.0)


# -- odd maps --------------------------------------------------------------------------------------------------

ODD = {
    "zero": np.zeros((1, 6, 6, 6)),
    "constant": np.full((1, 6, 6, 6), 3.0),
    "negative": np.full((1, 6, 6, 6), -3.0),
    "all NaN": np.full((1, 4, 4, 4), np.nan),
    "infinite": np.full((1, 4, 4, 4), -np.inf),
    "one voxel": np.ones((1, 1, 1, 1)),
    "one slice": bumps((9, 7, 1)),
    "one row": bumps((1, 1, 9)),
    "a long one": bumps((2, 2, 200)),
    "huge": 1e37 * bumps((5, 5, 5)),
    "too huge": 1e300 * bumps((5, 5, 5)).astype(np.float64),
    "tiny": 1e-37 * bumps((5, 5, 5)),
    "flat": bumps((6, 5)),
    "flat and zero": np.zeros((1, 3, 3)),
    "one pixel": np.ones((2, 1, 1)),
    "whole numbers": np.arange(27).reshape(1, 3, 3, 3),
}


# Every map as every kind of picture with the slow tests; before that one kind for each map.
KINDS = ("overlay", "projections", "montage")
ODD_PICTURES = [
    pytest.param(name, kind, id=f"{name}-{kind}", marks=() if (i + j) % 3 == 0 else pytest.mark.slow)
    for i, name in enumerate(ODD)
    for j, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("name", "kind"), ODD_PICTURES)
def test_odd_maps_have_sensible_pictures(name, kind):
    values = ODD[name]
    anatomy = np.ones_like(values, dtype=np.float32)
    for under, affine in ((None, AFFINE), (anatomy, None)):
        figure = plot.show(values, under, None, kind, name, affine)
        assert plot.png(figure)[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = figure.get_size_inches()
        assert 1 < width < 20
        assert 1 < height < 20
        for picture in pictures(figure):
            assert np.isfinite(picture).all()
            assert picture.min() >= 0
            assert picture.max() <= 1


def test_an_anatomy_may_be_broken_too():
    anatomy = np.abs(bumps((6, 6, 6)))
    anatomy[0, 0] = np.nan
    for picture in pictures(plot.overlay(bumps((6, 6, 6)), anatomy)):
        assert np.isfinite(picture).all()
    rgb = np.full((3, 4, 4), np.nan)
    assert all(np.isfinite(p).all() for p in pictures(plot.overlay(bumps((4, 4)), rgb)))


def test_names_are_text_and_never_formulas():
    name = "cost $5 and $6_x^2 \\frac{ 中文 <b>"
    for figure in (
        plot.overlay(bumps((4, 4, 4)), title=name, unit=name),
        plot.side_by_side({name: bumps((4, 4, 4))}, title=name, shared=False),
        plot.layers({name: bumps((4, 4, 4))}, title=name),
        plot.curve([1, 2], {name: [1, 2]}, xlabel=name, ylabel=name, title=name),
        plot.signal(bumps((9,)), bumps((9,)), title=name, unit=name, xlabel=name),
    ):
        assert len(plot.png(figure)) > 1000


def test_long_names_are_broken_and_stay_in_the_picture():
    name = " ".join(f"word{i}" for i in range(40))
    figure = plot.side_by_side({name: bumps((4, 4, 4)), "b": bumps((4, 4, 4))}, title=name)
    figure.draw_without_rendering()
    for text in figure.texts:
        box = text.get_window_extent()
        assert box.x0 >= -1
        assert box.x1 <= figure.bbox.x1 + 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: plot.show(np.ones((4, 4, 4, 4, 4))), r"show|overlay: expected map of shape \(C,\*S\)"),
        (lambda: plot.overlay(np.ones(4)), r"overlay: expected map of shape \(C,\*S\)"),
        (lambda: plot.overlay(np.zeros((1, 0, 4))), r"overlay: expected map of shape"),
        (lambda: plot.overlay("text"), r"overlay: expected map of shape"),
        (
            lambda: plot.overlay(np.ones((1, 4))),
            r"two or three spatial axes, got shape \(1, 4\). Draw signals with",
        ),
        (
            lambda: plot.overlay(np.ones((1, 4, 4)), np.ones((1, 4, 4, 4))),
            r"anatomy of shape \(C,\*S\) with 2 spatial",
        ),
        (
            lambda: plot.overlay(np.ones((1, 4, 4, 4)), spacing=(1, 1)),
            r"expected spacing of 3 finite lengths > 0",
        ),
        (
            lambda: plot.overlay(np.ones((1, 4, 4, 4)), spacing=(1, 0, 1)),
            r"expected spacing of 3 finite lengths > 0",
        ),
        (
            lambda: plot.overlay(np.ones((1, 4, 4, 4)), spacing="mm"),
            r"expected spacing of 3 finite lengths > 0",
        ),
        (
            lambda: plot.overlay(np.ones((1, 4, 4, 4)), affine=np.eye(3)),
            r"affine to be 4 x 4, finite and invertible",
        ),
        (lambda: plot.overlay(np.ones((1, 4, 4, 4)), affine=np.zeros((4, 4))), r"affine to be 4 x 4"),
        (
            lambda: plot.overlay(np.ones((1, 4, 4, 4)), at=(9, 0, 0)),
            r"at inside of the volume, got \(9, 0, 0\)",
        ),
        (lambda: plot.overlay(np.ones((1, 4, 4)), at=(1, 1)), r"three indices of a voxel of a volume"),
        (
            lambda: plot.overlay(np.ones((1, 4, 4, 4)), limit=-1.0),
            r"limit to be a finite number > 0, got -1.0",
        ),
        (lambda: plot.montage(np.ones((1, 4, 4, 4)), axis=3), r"axis to be 0, 1 or 2, got 3"),
        (lambda: plot.montage(np.ones((1, 4, 4, 4)), slices=0), r"slices to be an int >= 1, got 0"),
        (
            lambda: plot.show(np.ones((1, 4, 4, 4)), kind="pie"),
            r"kind to be one of projections, montage, overlay",
        ),
        (lambda: plot.side_by_side({}), r"side_by_side: expected maps as a mapping"),
        (
            lambda: plot.layers({"a": np.ones((1, 4, 4, 4)), "b": np.ones((1, 2, 2, 2))}),
            r"layers: expected maps on one grid, got \(2, 2, 2\), \(4, 4, 4\). Pass the anatomy",
        ),
        (lambda: plot.curve([1, 2], {"a": [1, 2, 3]}), r"ys\['a'\] with the 2 numbers of x, got 3"),
        (lambda: plot.curve([[1]], {"a": [1]}), r"x to be numbers in a row"),
        (lambda: plot.curve([1], {}), r"ys as a mapping label -> numbers"),
        (
            lambda: plot.signal(np.ones((1, 4)), np.ones((1, 5))),
            r"a signal with the 4 samples of the map, got 5",
        ),
        (
            lambda: plot.signal(np.ones((1, 4, 4))),
            r"signal: expected map of shape \(C,\*S\) with 1 spatial axes",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(call, text):
    with pytest.raises(ValueError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


# -- curves and signals ----------------------------------------------------------------------------------------


def test_a_curve_has_the_numbers_it_was_given():
    y = torch.tensor([1.0, float("nan"), 0.5])
    figure = plot.curve([0, 1, 2], {"deletion": y, "insertion": [0, 1, 1]}, xlabel="share", ylabel="score")
    lines = figure.axes[0].get_lines()
    np.testing.assert_array_equal(lines[0].get_ydata(), y.double().numpy())
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["deletion", "insertion"]
    assert len({line.get_color() for line in lines}) == 2


def test_a_signal_has_a_bar_for_each_sample():
    values = bumps((30,))
    figure = plot.signal(values, np.sin(np.arange(30.0))[None], 0.5)
    heights = np.array([bar.get_height() for bar in figure.axes[1].patches])
    np.testing.assert_allclose(heights[:30] + heights[30:], values[0], atol=1e-6)
    assert figure.axes[1].patches[3].get_x() == pytest.approx(3 * 0.5 - 0.25)
    assert plot.png(figure) == plot.png(plot.show(values, np.sin(np.arange(30.0))[None], 0.5))


# -- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        ((9,), {"overlay"}),
        ((6, 5), {"projections", "overlay"}),
        ((4, 5, 6), {"projections", "montage", "overlay"}),
    ],
)
def test_figures_of_a_map_lie_beside_it(tmp_path, shape, kinds):
    values = bumps(shape)
    written = plot.save_figures(values, np.abs(values), None, tmp_path / "new" / "sub-1.2_statmap", "title")
    assert set(written) == kinds
    for kind, path in written.items():
        assert path == tmp_path / "new" / f"sub-1.2_statmap_{kind}.png"
    assert set((tmp_path / "new").iterdir()) == set(written.values())


@pytest.mark.slow
def test_the_same_data_give_the_same_file_in_another_process(tmp_path, monkeypatch):
    monkeypatch.undo()
    script = (
        "import numpy as np, sys; from esegeta import plot; "
        "v = np.random.default_rng(0).standard_normal((1, 8, 9, 10)).astype('float32'); "
        "plot.save_figures(v, abs(v), (1, 2, 3), sys.argv[1], 'title'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = bumps((8, 9, 10))
    here = plot.save_figures(values, np.abs(values), (1, 2, 3), tmp_path / "b", "title")
    for kind, path in here.items():
        assert path.read_bytes() == (tmp_path / f"a_{kind}.png").read_bytes()
        assert b"tEXt" not in path.read_bytes()
        assert b"tIME" not in path.read_bytes()


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("old")
    figure = plot.overlay(bumps((4, 4, 4)))

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(canvas.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plot.save(figure, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_notebook_gets_a_picture():
    figure = plot.show(torch.ones(1, 4, 4, 4))
    assert figure._repr_png_() == plot.png(figure)


def test_without_matplotlib_one_line_says_what_to_install():
    script = (
        "import sys; sys.modules['matplotlib'] = None; import numpy as np\n"
        "from esegeta import plot\n"
        "try:\n    plot.show(np.ones((1, 4, 4, 4)))\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == 'Figures need matplotlib, which is missing: pip install "esegeta[viz]".\n', (
        done.stderr
    )


@pytest.mark.parametrize("shape", [(9,), (6, 8), (4, 6, 8)])
def test_a_cascade_shows_every_map_above_its_number(shape):
    from esegeta.metrics import CascadeMaps, followed

    found = CascadeMaps(("head", "body"), torch.from_numpy(np.stack([bumps(shape, key=k) for k in range(3)])))
    figure = plot.cascade(found, {"ranks": followed(found), "same": [1.0, 1.0, 1.0]}, title="as it goes")
    *maps, curve = figure.axes
    assert [axes.get_title() for axes in maps] == ["as trained", "head", "body"]
    assert curve.lines[0].get_ydata().tolist() == pytest.approx(followed(found).values.tolist())
    assert curve.lines[1].get_ydata().tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="cascade: expected 3 numbers of the curve, one for each map, got 2"):
        plot.cascade(found, [1.0, 0.5])


def test_a_comparison_shows_every_number_with_its_interval_or_that_there_is_none():
    import esegeta as eg
    from esegeta import metrics

    score = lambda x: (x * torch.tensor([3.0, 2.0, 1.0])).sum()
    methods = {"slope": eg.gradient, "flat": lambda _: metrics.given(torch.zeros(1, 3)), "$x$": eg.saliency}
    judges = {"area": metrics.deletion, "gini": metrics.gini}
    judges |= {"top": metrics.calibrated(metrics.roc_auc, draws=2)}
    xs, masks = torch.rand(3, 1, 3) + 1, torch.tensor([[True, False, False]] * 3)
    found = eg.compare(methods, score, xs, masks=masks, metrics=judges)
    figure = plot.comparison(found, title="three")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["area", "gini", "top"]
    area, gini, top = figure.axes
    rows = {(row.metric, row.method): row for row in found.rows}
    points = [line for line in area.lines if line.get_marker() == "o"]
    assert [p.get_xdata()[0] for p in points] == [rows["area", m].value for m in methods]
    spans = [line.get_xdata().tolist() for line in area.lines if line.get_marker() != "o"]
    assert spans == [[rows["area", m].low, rows["area", m].high] for m in methods]
    assert [text.get_text() for text in gini.texts] == ["no number"]
    assert gini.texts[0].get_position()[1] == 1
    rings = [line.get_xdata()[0] for line in top.lines if line.get_markerfacecolor() == "white"]
    assert rings == [rows["top", m].null_mean for m in methods]
    assert (area.get_xlabel(), gini.get_xlabel()) == ("← lower is better", "")
    assert "the mean of random maps" in words(figure)
    assert plot.png(figure) == plot.png(plot.comparison(found, title="three"))
    with pytest.raises(
        ValueError, match=r"comparison: expected a table with rows, got int 3. Pass what eg.compare"
    ):
        plot.comparison(3)


def test_the_legend_of_many_curves_stands_beside_them():
    few, many = ({str(n): [n, 1] for n in range(count)} for count in (3, 4))
    few, many = plot.curve([0, 1], few), plot.curve([0, 1], many, note="of four")
    assert few.axes[0].get_legend() is not None
    assert many.axes[0].get_legend() is None
    (legend,) = many.legends
    assert [text.get_text() for text in legend.get_texts()] == ["0", "1", "2", "3"]
    assert "of four" in words(many)


def test_a_band_lies_behind_its_curve():
    figure = plot.curve([0, 1, 2], {"a": [3, 2, 1], "b": [1, 1, 1]}, bands={"a": ([2, 1, 0], [4, 3, 2])})
    (axes,) = figure.axes
    (band,) = axes.collections
    (path,) = band.get_paths()
    assert (path.vertices[:, 1].min(), path.vertices[:, 1].max()) == (0, 4)
    with pytest.raises(ValueError, match=r"bands\['a'\] with the 3 numbers of x, got 2"):
        plot.curve([0, 1, 2], {"a": [3, 2, 1]}, bands={"a": ([2, 1], [4, 3])})


# -- what is shown, and round what -----------------------------------------------------------------------------


def said(figure):
    return words(figure).replace("\n", " ")


def test_a_mask_mutes_what_lies_outside_and_says_how_much_that_is():
    values, anatomy = bumps((12, 12, 12)), np.zeros((1, 12, 12, 12))
    anatomy[0, 3:9, 3:9, 3:9] = 1
    inside = anatomy[0] > 0
    share = 100 * np.abs(values[0])[~inside].sum() / np.abs(values).sum()
    for mask in (inside, torch.from_numpy(inside), "otsu"):
        figure = plot.overlay(values, anatomy, mask=mask, at=(6, 6, 6))
        assert f"Outside of the mask nothing is shown: {canvas.numeral(share)} % of all |a|" in said(figure)
        above, below = pictures(figure)[:3], pictures(figure)[3:]
        for one, other in zip(above, below, strict=True):
            np.testing.assert_array_equal((one != other).any(-1)[:3], False)
            assert (one != other).any()


def test_an_outline_goes_round_a_mask_and_is_named():
    mask = np.zeros((8, 8, 8))
    mask[2:6, 2:6, 2:6] = 1
    figure = plot.overlay(bumps((8, 8, 8)), outline={"prediction": mask, "truth": mask}, at=(4, 4, 4))
    assert "Outlined: prediction (green), truth (white)." in said(figure)
    (ring,) = canvas.rings(mask[4] > 0)
    np.testing.assert_allclose([ring.min(0), ring.max(0)], [[0.25, 0.25], [0.75, 0.75]])
    hole = mask[4] > 0
    hole[3, 3] = False
    assert len(canvas.rings(hole)) == 2
    assert len(canvas.rings(np.eye(2) > 0)) in (1, 2), "corners that touch end somewhere"


@pytest.mark.parametrize("affine", [None, AFFINE])
def test_a_box_shows_a_part_of_the_same_place(affine):
    values, anatomy = bumps((10, 12, 14)), np.abs(bumps((10, 12, 14), 1)) + 0.1
    whole = plot.overlay(values, anatomy, affine=affine, at=(5, 6, 7), limit=1.0)
    part = plot.overlay(
        values, anatomy, affine=affine, at=(5, 6, 7), limit=1.0, box=[(2, 8), (3, 9), (4, 10)]
    )
    places = [line for line in words(whole).splitlines() if line.endswith("mm") or line.isdigit()]
    assert places
    assert [line for line in words(part).splitlines() if line.endswith("mm") or line.isdigit()] == places
    mask = np.zeros((10, 12, 14))
    mask[4:6, 4:6, 4:6] = 1
    for box in ("outline", "mask"):
        near = plot.overlay(values, anatomy, affine=affine, mask=mask, outline=mask, box=box)
        assert {max(p.shape[:2]) for p in pictures(near)} == {4}


def test_channels_are_shown_one_by_one_and_named():
    values = np.concatenate([bumps((6, 6, 6)), -bumps((6, 6, 6))])
    assert "zero everywhere" in said(plot.overlay(values)), "their sum is nothing"
    figure = plot.channels(values, np.abs(values), names=["T1", "FLAIR"], at=(3, 3, 3))
    assert {"T1", "FLAIR"} <= set(words(figure).splitlines())
    shown = pictures(figure)
    assert len(shown) == 8
    assert all((one != shown[4 * (i // 4)]).any() for i, one in enumerate(shown) if i % 4)
    with pytest.raises(ValueError, match="channels: expected names of 2 channels, got 1"):
        plot.channels(values, names=["T1"])


def test_layers_can_be_projected():
    values = bumps((5, 6, 7))
    shown = pictures(plot.layers({"a": values}, project=True))
    place = np.abs(values[0]).argmax(2)
    peaks = np.take_along_axis(values[0], place[..., None], 2)[..., 0]
    scale = colours.Scale("signed", grids.limit_of(values[0]))
    expected = colours.blend(peaks.T[::-1], scale, np.zeros((6, 5, 3)))
    np.testing.assert_allclose(shown[0], expected, atol=1e-6)


def test_the_first_projections_are_the_image_without_colours():
    anatomy = np.abs(bumps((6, 7, 8)))
    first = pictures(plot.projections(bumps((6, 7, 8), 1), anatomy))
    assert len(first) == 12
    for picture, axis in zip(first[:3], (2, 1, 0), strict=True):
        assert np.ptp(picture, axis=-1).max() == 0
        np.testing.assert_allclose(
            picture[..., 0], grids.upright(grids.window(anatomy[0]).max(axis), axis, False)
        )


def test_few_colours_make_a_smaller_file_that_looks_the_same():
    figure = plot.overlay(bumps((20, 20, 20)), np.abs(bumps((20, 20, 20), 1)))
    whole, few = plot.png(figure), plot.png(figure, 256)
    assert len(few) < 0.7 * len(whole)
    one, other = (np.asarray(Image.open(io.BytesIO(c)).convert("RGB")).astype(int) for c in (whole, few))
    assert np.abs(one - other).mean() < 6


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"mask": np.ones((3, 3, 3))}, r"mask on the grid \(4, 4, 4\), got float64\(3, 3, 3\)"),
        ({"mask": "otsu"}, 'an anatomy for mask = "otsu", got none'),
        ({"mask": "body"}, "mask to be one of otsu"),
        ({"outline": {"truth": "x"}}, r"truth on the grid \(4, 4, 4\)"),
        ({"box": [(0, 9), (0, 4), (0, 4)]}, r"box to be \(start, stop\) within \(4, 4, 4\) for each axis"),
        ({"box": "all"}, "box to be one of outline, mask"),
        ({"colours": "green"}, "colours to be one of orange, red"),
    ],
)
def test_words_that_say_nothing_are_refused(how, text):
    with pytest.raises(ValueError, match=text):
        plot.overlay(np.ones((1, 4, 4, 4)), **how)


def test_few_colours_keep_those_that_outlines_are_named_by():
    """A thin line has few pixels, of which none may be among those that a palette is made of."""
    reds = np.random.default_rng(0).integers(0, 256, (64, 64))
    pixels = np.stack([reds, reds // 2, reds // 3], -1).astype(np.uint8)
    green = [int(colours.RINGS[0][1][i : i + 2], 16) for i in (1, 3, 5)]
    pixels[5] = green
    few = Image.fromarray(pixels).quantize(palette=canvas._palette(pixels, 256), dither=Image.Dither.NONE)
    assert (np.asarray(few.convert("RGB"))[5] == green).all()


def test_a_map_of_one_value_is_shown_in_the_middle():
    assert grids.strongest([np.full((20, 30, 40), -2.0)]) == (9, 14, 19)


def test_what_has_no_sign_is_not_said_to_be_for_the_score():
    map = np.abs(bumps((8, 8, 8)))
    plain, unsigned = plot.overlay(map), plot.overlay(map, signed=False, unit="entropy")
    assert "Orange for the score" in words(plain)
    assert "Violet, the brighter the more." in words(unsigned)
    bar = [t.get_text() for t in unsigned.texts if t.get_gid() == "bar"]
    assert bar[0] == "0"
    assert not any(text.startswith(("-", "\u2212")) for text in bar)


def test_a_dream_is_shown_from_the_black_to_the_white_that_it_says():
    """Values far from those of an image: grey is a share of what the line below says."""
    values = np.linspace(100.0, 300.0, 12**3).reshape(1, 12, 12, 12)
    figure = plot.dream(values)
    low, high = np.quantile(values, (0.001, 0.999))
    middle = tuple(int(i) for i in grids.strongest([np.abs(values[0] - np.median(values))]))
    expected = np.clip((values[0][:, :, middle[2]] - low) / (high - low), 0, 1)
    seen = pictures(figure)[0][..., 0]
    assert sorted(np.round(seen.ravel(), 4)) == pytest.approx(sorted(np.round(expected.ravel(), 4)), abs=1e-3)
    assert "100 to 300" in words(figure)
