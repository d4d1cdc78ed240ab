"""Steps keep every voxel at its place in mm, and maps find the way back to the grid of the file."""

import functools
import itertools
import math
import re

import jaxtyping
import nibabel as nib
import nibabel.processing
import numpy as np
import pytest
import refusing
import scipy.ndimage
import torch
from regridding import regrid, regrid_affine
from together import together

from esegeta import zoo
from esegeta._registry import STEPS
from esegeta.run.volumes import grids
from esegeta.run.volumes.preprocess import apply, problems, step
from esegeta.run.volumes.reading import Volume, spacing_of
from esegeta.run.volumes.steps import content, crop, fit, pad, reorient, resample, resize, slice_

refused = functools.partial(refusing.refused, ValueError)

TURN = nib.eulerangles.euler2mat(0.4, -0.3, 0.2)
AFFINES = {
    "identity": np.eye(4),
    "anisotropic": nib.affines.from_matvec(np.diag([1.0, 2.0, 3.5]), [-10, 4, 7]),
    "left-handed": nib.affines.from_matvec(np.diag([-1.5, 1.0, 2.0]), [80, -40, 3]),
    "permuted": nib.affines.from_matvec([[0, 0, -2.0], [1.0, 0, 0], [0, -1.5, 0]], [3, 2, 1]),
    "oblique": nib.affines.from_matvec(TURN @ np.diag([-1.0, 2.0, 1.5]), [5, -6, 7]),
    "sheared": nib.affines.from_matvec([[1.0, 0.2, 0], [0, 1.5, 0.1], [0.1, 0, 2.0]], [0, 1, 2]),
}
GRID = (9, 12, 10)
affines = pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
# Each with what it needs to be exact on linear images away from the borders, in voxels of the new grid.
GEOMETRY = {
    "reorient": (lambda v: reorient("".join(grids.codes(v.affine)[::-1])), 0),
    "reorient flipped": (
        lambda v: reorient(
            "".join(dict(zip("RLAPSI", "LRPAIS", strict=True))[c] for c in grids.codes(v.affine))
        ),
        0,
    ),
    "crop": (lambda v: crop([[1, 7], [0, 12], [3, 8]]), 0),
    "fit": (lambda v: fit([6, 11, 10]), 0),
    "resample finer": (lambda v: resample([0.6 * s for s in v.spacing]), 2),
    "resample coarser": (lambda v: resample([1.7 * s for s in v.spacing]), 2),
    "resample mixed": (lambda v: resample(1.5), 2),
    "resize": (lambda v: resize([13, 7, 10]), 2),
}


@pytest.fixture(autouse=True)
def our_own_messages():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def volume(data, affine=None):
    data = torch.as_tensor(data, dtype=torch.float32)
    affine = np.eye(4) if affine is None else affine
    return Volume(data, affine, spacing_of(affine, data.ndim - 1))


def places(affine, grid):
    """The mm coordinates of all voxels, (3,*S)."""
    index = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij")).astype(float)
    mm = affine[:3, : len(grid)] @ index.reshape(len(grid), -1) + affine[:3, 3:]
    return mm.reshape(3, *grid)


def random_volume(affine, grid=GRID, channels=2):
    return volume(np.random.default_rng(0).normal(size=(channels, *grid)), affine)


def inner(array, margin):
    return array[(slice(None), *(slice(margin, n - margin) for n in array.shape[1:]))]


# -- places in mm ----------------------------------------------------------------------------------------------


@affines
@together("name", GEOMETRY)
def test_every_step_keeps_every_place_in_mm(affine, name):
    """An image that shows its own coordinates shows them still, where the new affine says they are."""
    make, margin = GEOMETRY[name]
    x = volume(places(affine, GRID), affine)
    done = apply(x, [make(x)])
    expected = places(done.affine, done.data.shape[1:])
    seen = inner(done.data.numpy(), margin)
    assert seen.size
    # The mean of the boxes that a box covers is off by up to an eighth of the old voxel, over the ratio.
    ratio = np.array(done.spacing) / np.linalg.norm(affine[:3, :3], axis=0)
    off = sum(s / 8 / r**2 for s, r in zip(done.spacing, ratio, strict=True) if r > 1 + 1e-9) if margin else 0
    np.testing.assert_allclose(seen, inner(expected, margin), atol=2e-4 + off)
    np.testing.assert_allclose(done.spacing, np.linalg.norm(done.affine[:3, :3], axis=0))
    # And the way back: coordinates on the new grid become those of the old one, away from what was cut off.
    back = done.back(torch.as_tensor(expected, dtype=torch.float64), keep="values").numpy()
    assert back.shape == (3, *GRID)
    kept = np.abs(back).sum(0) > 0
    if "re" in name:
        kept &= np.pad(np.ones([n - 6 for n in GRID], bool), 3)
    assert kept.any()
    finer = sum(s / 8 * r for s, r in zip(x.spacing, ratio, strict=True) if r < 1 - 1e-9) if margin else 0
    np.testing.assert_allclose(back[:, kept], x.data.numpy()[:, kept], atol=1e-4 + finer)


@affines
def test_padding_keeps_every_place_in_mm(affine):
    x = random_volume(affine)
    done = apply(x, [pad(8, fill=-3)])
    assert tuple(done.data.shape) == (2, 16, 16, 16)
    old = (
        np.linalg.inv(affine) @ done.affine @ np.array([3, 2, 3, 1.0])
    )  # 7, 4 and 6 more: half of them first
    np.testing.assert_allclose(old, [0, 0, 0, 1], atol=1e-9)
    inside = done.data[:, 3:12, 2:14, 3:13]
    assert torch.equal(inside, x.data)
    assert (done.data.sum() - inside.sum()).item() == pytest.approx(-3 * 2 * (16**3 - math.prod(GRID)))


@affines
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_plane_keeps_its_places_in_mm(affine, axis):
    x = volume(places(affine, GRID), affine)
    done = apply(x, [slice_(axis=axis, index=4)])
    assert torch.equal(done.data, x.data.select(1 + axis, 4))
    np.testing.assert_allclose(places(done.affine, done.data.shape[1:]), done.data.numpy(), atol=1e-5)
    assert len(done.spacing) == 2
    back = done.back(torch.ones_like(done.data))
    expected = torch.zeros(3, *GRID)
    expected.select(1 + axis, 4).fill_(1)
    assert torch.equal(back, expected)


@affines
def test_orientations_are_those_of_nibabel(affine):
    x = random_volume(affine, channels=1)
    assert grids.codes(affine) == list(nib.aff2axcodes(affine))
    image = nib.Nifti1Image(x.data[0].numpy(), affine)
    for order, signs in itertools.product(
        itertools.permutations(range(3)), itertools.product((0, 1), repeat=3)
    ):
        to = "".join(grids.SIDES[i][s] for i, s in zip(order, signs, strict=True))
        wanted = nib.orientations.ornt_transform(
            nib.io_orientation(affine), nib.orientations.axcodes2ornt(to)
        )
        peer = image.as_reoriented(wanted)
        done = apply(x, [reorient(to)])
        np.testing.assert_array_equal(done.data[0].numpy(), np.asarray(peer.dataobj))
        np.testing.assert_allclose(done.affine, peer.affine, atol=1e-12)
        assert torch.equal(done.back(done.data), x.data)


def test_planes_are_reoriented_by_the_letters_that_they_have():
    x = random_volume(AFFINES["permuted"])  # its axes rise to A, I and L
    plane = apply(x, [slice_(axis=2, index=0), reorient("SP")])
    assert torch.equal(plane.data, x.data[..., 0].flip(1, 2).transpose(1, 2))
    with refused("reorient", "one letter for each axis, which are A, I or the opposite", "'RA'"):
        apply(x, [slice_(axis=2, index=0), reorient("RA")])
    assert torch.equal(plane.back(plane.data)[..., 0], x.data[..., 0])


# -- resampling ------------------------------------------------------------------------------------------------


@affines
def test_resampling_to_finer_voxels_is_linear_interpolation_as_in_nibabel_and_scipy(affine):
    x = random_volume(affine, channels=1)
    done = apply(x, [resample([0.7 * s for s in x.spacing])])
    image = nib.Nifti1Image(x.data[0].numpy().astype(np.float64), affine)
    target = (done.data.shape[1:], done.affine)
    peer = np.asarray(nibabel.processing.resample_from_to(image, target, order=1, mode="nearest").dataobj)
    np.testing.assert_allclose(done.data[0].numpy(), peer, atol=1e-5)
    step_of = np.linalg.inv(affine) @ done.affine
    scipys = scipy.ndimage.affine_transform(
        x.data[0].numpy().astype(np.float64),
        step_of[:3, :3],
        step_of[:3, 3],
        output_shape=done.data.shape[1:],
        order=1,
        mode="nearest",
    )
    np.testing.assert_allclose(done.data[0].numpy(), scipys, atol=1e-5)


def test_resampling_to_coarser_voxels_is_the_mean_of_what_they_cover():
    """By counting a thousand points in each new voxel."""
    x = random_volume(np.diag([1.0, 2.0, 1.0, 1.0]), (11, 6))
    done = apply(x, [resample([2.6, 5.0])])
    assert tuple(done.data.shape) == (2, 4, 2)
    np.testing.assert_allclose(done.spacing, (2.6, 5.0))
    np.testing.assert_allclose(done.affine @ [1.5, 0.5, 0, 1], x.affine @ [5, 2.5, 0, 1], atol=1e-9)
    points = (np.arange(1000) + 0.5) / 1000 - 0.5
    for k in np.ndindex(4, 2):
        rows = []
        for axis, n in enumerate((11, 6)):
            mm = done.affine[axis, 3] + (k[axis] + points) * done.spacing[axis]
            at = np.floor((mm - x.affine[axis, 3]) / x.spacing[axis] + 0.5).astype(int)
            rows.append(np.bincount(at[(at >= 0) & (at < n)], minlength=n))
        expected = np.einsum("cij,i,j->c", x.data.numpy(), *(row / row.sum() for row in rows))
        np.testing.assert_allclose(done.data[:, k[0], k[1]].numpy(), expected, atol=5e-3)


@pytest.mark.parametrize(("n", "m"), [(8, 4), (12, 4), (4, 8), (5, 12), (6, 6), (1, 3), (3, 1)])
def test_resizing_agrees_with_torch(n, m):
    x = random_volume(np.eye(4), (n, 5))
    done = apply(x, [resize([m, 5])])
    if m > n:
        peer = torch.nn.functional.interpolate(
            x.data[None], size=(m, 5), mode="bilinear", align_corners=False
        )[0]
    else:
        peer = torch.nn.functional.adaptive_avg_pool2d(x.data, (m, 5))
    torch.testing.assert_close(done.data, peer, rtol=1e-5, atol=1e-5)
    assert done.spacing[0] == pytest.approx(n / m)
    np.testing.assert_allclose(done.affine @ [-0.5, 0, 0, 1], x.affine @ [-0.5, 0, 0, 1], atol=1e-12)


def test_the_head_is_resized_as_the_zoo_does_it():
    full = zoo.head()
    done = apply(Volume(full.data, full.affine, full.spacing), [resize(56)])
    torch.testing.assert_close(done.data, regrid(full.data, 56), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(done.affine, regrid_affine(full.affine, 128 / 56))


def test_a_resampled_ramp_is_off_by_less_than_an_eighth_of_a_voxel():
    for ratio in (1.05, 1.5, 2.4, 3.3, 7.7):
        x = volume(torch.arange(400.0)[None])
        done = apply(x, [resample(ratio)])
        wanted = places(done.affine, done.data.shape[1:])[0]
        assert np.abs(done.data[0].numpy() - wanted)[2:-2].max() <= 1 / (8 * ratio) + 1e-4
        # And no voxel of the image counts more than another.
        one = done.back(torch.ones_like(done.data), keep="sum")[0, 10:-10]
        torch.testing.assert_close(one, torch.full_like(one, 1 / ratio))


def test_labels_are_resampled_to_the_nearest():
    x = volume(torch.arange(6.0)[None])
    assert apply(x, [resample(0.5, how="nearest")]).data.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]]
    assert apply(x, [resample(3.0, how="nearest")]).data.tolist() == [[1, 4]]
    labels = volume(torch.randint(0, 4, (1, 9, 8, 7)), AFFINES["oblique"])
    seen = apply(labels, [resample([1.7, 0.9, 2.2], how="nearest")]).data
    assert set(seen.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


@pytest.mark.parametrize("spacing", [0.3, 0.77, 1.0, 1.3, 2.0, 5.0, 50.0])
@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_a_constant_stays_and_the_grid_covers_the_image(n, spacing):
    x = volume(torch.full((1, n), 3.0))
    done = apply(x, [resample(spacing)])
    m = done.data.shape[1]
    torch.testing.assert_close(done.data, torch.full((1, m), 3.0))
    assert done.spacing == pytest.approx((spacing,))
    if n >= spacing:
        assert abs(m * spacing - n) <= spacing / 2 + 1e-9
    torch.testing.assert_close(done.back(done.data, keep="values"), x.data)


# -- the way back ----------------------------------------------------------------------------------------------


def chain(x):
    return apply(
        x,
        [
            reorient("PIR"),
            resample([1.3, 2.0, 0.9]),
            content(above=-10, margin=1),
            {"step": "normalise", "how": "zscore"},
            pad(8),
        ],
    )


@affines
def test_the_sum_of_a_map_is_kept_as_it_is_asked_for(affine):
    x = random_volume(affine)
    done = chain(x)
    assert all(n % 8 == 0 for n in done.data.shape[1:])
    grid = done.data.shape[1:]
    map = torch.zeros(3, *grid, dtype=torch.float64)
    centre = tuple(slice(n // 2 - 2, n // 2 + 2) for n in grid)
    map[(slice(None), *centre)] = torch.rand(3, 4, 4, 4, dtype=torch.float64)
    sums = map.sum((1, 2, 3))
    torch.testing.assert_close(done.back(map, keep="sum").sum((1, 2, 3)), sums, rtol=1e-12, atol=0)
    torch.testing.assert_close(done.back(map).sum((1, 2, 3)), sums, rtol=0.1, atol=0)
    ratio = np.prod(x.spacing) / np.prod(done.spacing)
    torch.testing.assert_close(done.back(map, keep="values") * ratio, done.back(map), rtol=1e-6, atol=1e-12)
    assert done.back(map).shape == (3, *GRID)
    assert done.back(map).dtype == torch.float64
    assert done.back(map.half()).dtype == torch.float16


@affines
def test_keeping_the_sum_is_the_chain_rule(affine):
    """The gradient with respect to the image of the file, by finite differences of a linear score."""
    x = random_volume(affine, channels=1)
    steps = [reorient("PIR"), resample([1.3, 2.0, 0.9]), fit([8, 8, 8])]
    weights = torch.rand(1, 8, 8, 8)
    back = apply(x, steps).back(weights, keep="sum")
    for index in [(0, 0, 0), (4, 5, 6), (8, 11, 9), (2, 7, 3)]:
        moved = x.data.clone()
        moved[(0, *index)] += 1
        change = apply(x._replace(data=moved), steps).data - apply(x, steps).data
        assert (weights * change).sum().item() == pytest.approx(back[(0, *index)].item(), abs=2e-4)


def test_a_density_is_not_changed_by_the_size_of_voxels():
    """A smooth map on a fine and on a coarse grid, each voxel with its share, comes back as one map."""
    x = volume(torch.zeros(1, 40, 40), np.diag([2.0, 2.0, 1.0, 1.0]))
    expected = None
    for spacing in (2.0, 1.0, 4.0):
        done = apply(x, [resample(spacing)])
        mm = places(done.affine, done.data.shape[1:])
        bump = np.exp(-((mm[0] - 39) ** 2 + (mm[1] - 39) ** 2) / (2 * 14**2))
        back = done.back(torch.as_tensor(bump[None] * np.prod(done.spacing), dtype=torch.float64))
        expected = back if expected is None else expected
        assert (back - expected).abs().max() < 0.03 * expected.max()
        assert back.sum().item() == pytest.approx(expected.sum().item(), rel=2e-3)


def test_what_was_cut_off_is_zero_and_what_was_padded_is_dropped():
    x = random_volume(AFFINES["oblique"])
    done = apply(x, [crop([[2, 7], [3, 9], [1, 10]]), fit([12, 4, 9])])
    back = done.back(torch.ones(1, 12, 4, 9))
    expected = torch.zeros(1, *GRID)
    expected[:, 2:7, 4:8, 1:10] = 1
    assert torch.equal(back, expected)


@pytest.mark.parametrize("grid", [(11,), (9, 12), (9, 12, 10)])
def test_one_two_and_three_axes(grid):
    x = random_volume(np.eye(4), grid)
    to = "LPS"[: len(grid)]
    done = apply(x, [reorient(to), resample(0.8), fit(7), pad(4)])
    assert tuple(done.data.shape) == (2, *(8,) * len(grid))
    assert done.back(done.data).shape == x.data.shape
    assert [entry["step"] for entry in done.record] == ["reorient", "resample", "fit", "pad"]


def test_cutting_and_padding_are_around_one_centre():
    x = volume(torch.arange(1.0, 6.0)[None])
    for size, seen in ((2, [2, 3]), (3, [2, 3, 4]), (6, [1, 2, 3, 4, 5, 0]), (8, [0, 1, 2, 3, 4, 5, 0, 0])):
        done = apply(x, [fit(size)])
        assert done.data.tolist() == [seen]
        assert torch.equal(apply(x, [fit(size), fit(5)]).data, done.back(done.data))
    assert torch.equal(apply(x, [pad(4)]).data, apply(x, [fit(8)]).data)


def test_nothing_done_gives_the_map_itself():
    x = random_volume(np.eye(4))
    done = apply(x, [])
    assert torch.equal(done.back(x.data), x.data)
    assert torch.equal(done.data, x.data)
    assert done.record == ()


def test_steps_leave_the_volume_alone():
    x = random_volume(AFFINES["oblique"])
    data, affine = x.data.clone(), x.affine.copy()
    done = chain(x)
    done.data.add_(1)
    done.affine[:] = 0
    assert torch.equal(x.data, data)
    np.testing.assert_array_equal(x.affine, affine)


# -- values ----------------------------------------------------------------------------------------------------


VALUES = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 10.0, 20.0, 60.0]])


def normalised(**parameters):
    done = apply(volume(VALUES), [{"step": "normalise", **parameters}])
    return done.data.numpy().round(6).tolist(), done.record[0]


def test_values_are_normalised_channel_by_channel():
    assert normalised(how="minmax")[0] == [
        [0, 0.25, 0.5, 0.75, 1],
        [0, 0, *np.float32([1 / 6, 1 / 3]).round(6), 1],
    ]
    assert normalised(how="maximum")[0][0] == [0, 0.25, 0.5, 0.75, 1]
    values, record = normalised()
    np.testing.assert_allclose(values[0], (np.arange(5) - 2) / np.sqrt(2), atol=1e-5)
    assert record["shift"] == [2.0, 18.0]
    np.testing.assert_allclose(record["scale"], [np.sqrt(2), np.std(VALUES[1].numpy())], rtol=1e-6)
    values, record = normalised(over="nonzero")
    np.testing.assert_allclose(
        values[1], [0, 0, *(np.array([-20, -10, 30]) / np.std([10, 20, 60]))], atol=1e-5
    )
    assert record["shift"] == [2.5, 30.0]
    values, record = normalised(how="percentiles", low=25, high=75)
    assert values == [[0, 0, 0.5, 1, 1], [0, 0, 0.5, 1, 1]]
    assert (record["shift"], record["scale"]) == ([1, 0], [2, 20])
    assert normalised(how="fixed", mean=[1, 10], std=2)[0] == [[-0.5, 0, 0.5, 1, 1.5], [-5, -5, 0, 5, 25]]
    assert normalised(how="fixed", std=4)[0][0] == [0, 0.25, 0.5, 0.75, 1]


def test_what_cannot_be_normalised_is_refused():
    flat = volume(torch.full((1, 4), 3.0))
    for how in ("zscore", "minmax", "percentiles"):
        with refused("normalise", f'a scale > 0 for how = "{how}"', "values from 3 to 3", "fixed"):
            apply(flat, [{"step": "normalise", "how": how}])
    with refused("normalise", "a scale > 0", "values from -1 to -1"):
        apply(volume(torch.full((1, 4), -1.0)), [{"step": "normalise", "how": "maximum"}])
    with refused("normalise", "not 0 everywhere", "zeros"):
        apply(volume(torch.zeros(1, 4)), [{"step": "normalise", "over": "nonzero"}])
    with refused("normalise", "mean with one number or 2, one for each channel", r"\[1, 2, 3\]"):
        normalised(how="fixed", mean=[1, 2, 3])


def test_values_are_clipped():
    x = volume(VALUES)
    assert apply(x, [{"step": "clip", "low": 1, "high": 20}]).data[1].tolist() == [1, 1, 10, 20, 20]
    assert apply(x, [{"step": "clip", "high": 20}]).data[1].tolist() == [0, 0, 10, 20, 20]
    assert apply(x, [{"step": "clip", "low": 1.5}]).data[0].tolist() == [1.5, 1.5, 2, 3, 4]


# -- what is refused -------------------------------------------------------------------------------------------


@together(
    ("table", "message"),
    [
        ({"step": "resampel"}, "preprocess: expected a step of .*, got 'resampel'. Nearest: resample"),
        ({}, 'preprocess: expected a step of .*, got none. Write step = "name".'),
        (
            {"step": "resample", "spacin": 1},
            "resample: expected parameters of spacing, how, got 'spacin'. Nearest: spacing.",
        ),
        ({"step": "resample"}, "resample: expected the parameter spacing, got none. Add"),
        (
            {"step": "resample", "spacing": [1, 0]},
            r"resample: expected spacing of finite numbers > 0, got list \[1, 0\]",
        ),
        (
            {"step": "resample", "spacing": "1"},
            "resample: expected spacing of finite numbers > 0, got str '1'",
        ),
        (
            {"step": "resample", "spacing": [True]},
            "resample: expected spacing of finite numbers > 0, got list",
        ),
        ({"step": "resample", "spacing": float("inf")}, "resample: expected spacing of finite numbers > 0"),
        ({"step": "resample", "spacing": []}, "resample: expected spacing of finite numbers > 0"),
        (
            {"step": "resample", "spacing": 1, "how": "cubic"},
            "resample: expected how to be one of linear, nearest, got 'cubic'",
        ),
        (
            {"step": "reorient", "to": "RAR"},
            "reorient: expected to with one letter of R/L, A/P and S/I each, got 'RAR'",
        ),
        ({"step": "reorient", "to": "ras"}, "reorient: expected to with one letter"),
        ({"step": "reorient", "to": ""}, "reorient: expected to with one letter"),
        ({"step": "reorient", "to": 3}, "reorient: expected to with one letter"),
        ({"step": "resize", "shape": [8, 1.5]}, "resize: expected shape of whole numbers > 0"),
        ({"step": "crop", "box": [[3, 2]]}, "crop: expected box of two rising whole numbers for each axis"),
        ({"step": "crop", "box": [[-1, 2]]}, "crop: expected box of two rising whole numbers"),
        ({"step": "crop", "box": [1, 2]}, "crop: expected box of two rising whole numbers"),
        ({"step": "crop", "box": []}, "crop: expected box of two rising whole numbers"),
        ({"step": "crop", "box": "all"}, "crop: expected box of two rising whole numbers"),
        ({"step": "content", "margin": -1}, "content: expected margin to be an int >= 0, got -1"),
        ({"step": "content", "above": "0"}, "content: expected above of finite numbers"),
        ({"step": "fit", "shape": 0}, "fit: expected shape of whole numbers > 0, got int 0"),
        (
            {"step": "fit", "shape": 8, "fill": None},
            "fit: expected fill of finite numbers, got NoneType None",
        ),
        ({"step": "pad", "multiple": [8, -8]}, "pad: expected multiple of whole numbers > 0"),
        ({"step": "slice", "axis": -1, "index": 0}, "slice: expected axis to be an int >= 0"),
        ({"step": "clip"}, "clip: expected low < high, or one of them, got None and None"),
        ({"step": "clip", "low": 2, "high": 1}, "clip: expected low < high, or one of them, got 2 and 1"),
        ({"step": "clip", "low": "a"}, "clip: expected low and high of finite numbers"),
        ({"step": "normalise", "how": "z"}, "normalise: expected how to be one of zscore, .*, got 'z'"),
        (
            {"step": "normalise", "low": 3},
            'normalise: expected low for how = "percentiles" only, got how = "zscore". Leave out low.',
        ),
        (
            {"step": "normalise", "how": "fixed"},
            'normalise: expected mean or std for how = "fixed", got none',
        ),
        ({"step": "normalise", "how": "fixed", "std": 0}, "normalise: expected std of finite numbers > 0"),
        (
            {"step": "normalise", "how": "percentiles", "low": 60, "high": 40},
            "normalise: expected percentiles 0 <= low < high <= 100",
        ),
    ],
)
def test_parameters_are_checked_by_name_before_there_is_an_image(table, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        step(table)
    assert len(problems([table])) == 1
    assert re.match(rf"\[0\]: {message}", problems([table])[0])


def test_all_problems_come_at_once():
    found = problems([{"step": "pad", "multiple": 8}, {"step": "fit"}, 5, {"step": "clip"}])
    assert [line[:5] for line in found] == ["[1]: ", "[2]: ", "[3]: "]
    assert problems([{"step": "reorient", "to": "RAS"}, {"step": "normalise"}]) == []


@pytest.mark.parametrize(
    ("table", "expected", "got"),
    [
        (
            {"step": "resample", "spacing": [1, 1]},
            "spacing with one number or 3, one for each axis",
            r"\[1, 1\]",
        ),
        ({"step": "resample", "spacing": 1e-6}, "a grid of at most 2\\^31 voxels", "shape"),
        ({"step": "fit", "shape": 100000}, "a grid of at most 2\\^31 voxels", "100000"),
        ({"step": "resize", "shape": [4, 4]}, "shape with one number or 3", r"\[4, 4\]"),
        (
            {"step": "crop", "box": [[0, 4], [0, 4]]},
            r"a box within the image of shape \(9, 12, 10\)",
            r"\[\[0, 4\], \[0, 4\]\]",
        ),
        ({"step": "crop", "box": [[0, 4], [0, 13], [0, 4]]}, "a box within the image", "13"),
        ({"step": "content", "above": 100}, "voxels above 100", "a largest value of"),
        ({"step": "slice", "axis": 2, "index": 10}, "a plane of the image of shape", "axis 2, index 10"),
        (
            {"step": "reorient", "to": "RA"},
            "one letter for each axis, which are R, A, S or the opposite",
            "'RA'",
        ),
    ],
)
def test_parameters_that_do_not_fit_the_image_are_refused(table, expected, got):
    with refused(table["step"], expected, got):
        apply(random_volume(np.eye(4)), [table])


def test_maps_that_do_not_fit_are_refused():
    done = apply(random_volume(np.eye(4)), [pad(8)])
    with refused("Prepared.back", r"spatial shape \(16, 16, 16\)", r"float32\(1, 9, 12, 10\)", "upsample"):
        done.back(torch.zeros(1, 9, 12, 10))
    with refused("Prepared.back", "keep to be one of density, values, sum", "'mean'"):
        done.back(done.data, keep="mean")
    with pytest.raises(TypeError, match=r"^Prepared.back: expected map of a floating dtype"):
        done.back(done.data.int())


def test_every_step_says_what_it_did():
    x = random_volume(AFFINES["anisotropic"])
    tables = [
        {"step": "reorient", "to": "LPS"},
        {"step": "resample", "spacing": 2},
        {"step": "resize", "shape": 9},
        {"step": "content", "above": -9},
        {"step": "fit", "shape": 8},
        {"step": "pad", "multiple": 3},
        {"step": "crop", "box": [[1, 9]] * 3},
        {"step": "clip", "low": -1, "high": 1},
        {"step": "normalise"},
        {"step": "slice", "axis": 0, "index": 2},
    ]
    assert sorted(t["step"] for t in tables) == sorted(STEPS)
    done = apply(x, tables)
    for said, asked in zip(done.record, tables, strict=True):
        assert said["step"] == asked["step"]
    assert done.record[0] == {"step": "reorient", "from": "RAS", "to": "LPS"}
    assert done.record[1]["shape"] == [4, 12, 18]
    assert done.record[5] == {"step": "pad", "multiple": [3], "fill": 0.0, "box": [[0, 9]] * 3}
    assert done.back(torch.ones(1, *done.data.shape[1:])).shape == (1, *GRID)
