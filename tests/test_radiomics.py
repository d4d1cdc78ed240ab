"""Radiomic features against consensus values, another package's numbers, closed forms and slow loops."""

import csv
import itertools
import math
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.special import elliprg
from torch.autograd import gradcheck
from torch.func import grad, vmap

import esegeta as eg
from esegeta import radiomics
from esegeta.radiomics import morphology, soft, statistics
from esegeta.radiomics.surface import content, size, surface

ORACLES = Path(__file__).parents[2] / "shared" / "oracles"
needs_oracles = pytest.mark.skipif(
    not ORACLES.is_dir(), reason="the reference values are not beside the checkout"
)


def volume(name):
    found = nib.load(ORACLES / name)
    return np.asarray(found.dataobj).astype(np.float64), found.header.get_zooms()


def ball(axes, radius, half, width=1.0, stretch=(1.0, 1.0, 1.0)):
    """A soft ball, with its surface where it is one half."""
    grids = torch.meshgrid(*[torch.arange(-half, half + 1, dtype=torch.float64)] * axes, indexing="ij")
    distance = sum((g / s) ** 2 for g, s in zip(grids, stretch, strict=False)).sqrt()
    return torch.sigmoid((radius - distance) / width)


# ------------------------------------------------------------------ what others found


@needs_oracles
def test_all_consensus_values_of_the_digital_phantom():
    image, spacing = volume("ibsi/phantom.nii.gz")
    mask, _ = volume("ibsi/mask.nii.gz")
    found = radiomics.features(image, mask, spacing=spacing, tags=True)
    with open(ORACLES / "ibsi" / "reference_values.csv") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    known = [row for row in rows if row["reference value"]]
    assert len(rows) == 487
    assert len(known) == 482
    wrong = []
    for row in known:
        value, wanted = found[row["tag"]], float(row["reference value"])
        if not (float(f"{value:.3g}") == wanted or abs(value - wanted) <= float(row["tolerance"])):
            wrong.append((row["tag"], wanted, value))
    assert not wrong
    assert {row["tag"] for row in rows} == set(found)


# Their surfaces come of another table of cases.
ROUGH = {"MeshVolume", "SurfaceArea", "SurfaceVolumeRatio", "Sphericity"}


@needs_oracles
def test_the_numbers_of_pyradiomics_on_two_tumours():
    settings = {"brain1": {}, "brain2": {}, "brain1_FBN": {"number": 64}, "brain1_2d": {"slice_axis": 2}}
    found = {}
    for case, given in settings.items():
        image, spacing = volume(f"pyradiomics/{case[:6]}_image.nii.gz")
        mask, _ = volume(f"pyradiomics/{case[:6]}_label.nii.gz")
        for shift in (0.0, 2000.0):
            found[case, shift] = radiomics.pyradiomics(image, mask, spacing=spacing, shift=shift, **given)
    with open(ORACLES / "pyradiomics" / "reference_values.csv") as file:
        rows = [
            r for r in csv.DictReader(file) if "diagnostics" not in r["feature"] and r["case"] in settings
        ]
    assert len(rows) == 364
    for row in rows:
        value = found[row["case"], 2000.0 if row["family"] == "firstorder" else 0.0][row["feature"]]
        rough = "Diameter" in row["feature"] or row["feature"].rpartition("_")[2] in ROUGH
        assert value == pytest.approx(float(row["value"]), rel=1e-2 if rough else 1e-6), row


@needs_oracles
def test_all_families_of_a_real_tumour_take_less_than_a_second_of_one_core():
    image, spacing = volume("pyradiomics/brain1_image.nii.gz")
    mask, _ = volume("pyradiomics/brain1_label.nii.gz")
    took = []
    for _ in range(2):
        start = time.process_time()
        found = radiomics.features(image, mask, spacing=spacing, width=25.0)
        took.append(time.process_time() - start)
    assert {name.partition("_")[0] for name in found} >= {"shape", "local", "glcm", "gldzm", "ngtdm", "ngldm"}
    assert min(took) < 1


# ------------------------------------------------------------------ closed forms and slow loops


@pytest.mark.parametrize("axes", [2, 3])
def test_volume_axes_and_diameter_of_a_ball_converge(axes):
    errors = []
    for radius in (5, 20):
        mask = (ball(axes, radius, radius + 2) >= 0.5).numpy()
        found = morphology.features(mask, np.full(axes, 2.0))
        exact = math.pi * (2 * radius) ** 2 if axes == 2 else 4 / 3 * math.pi * (2 * radius) ** 3
        along = 4 * 2 * radius / math.sqrt(axes + 2)
        errors.append(
            [
                abs(found["volume"] / exact - 1),
                abs(found["pca_maj_axis"] / along - 1),
                abs(found["diam"] / (4 * radius) - 1),
                abs(found["pca_elongation"] - 1),
            ]
        )
    assert max(errors[1]) < 0.03
    assert all(small <= large + 1e-9 for small, large in zip(errors[1], errors[0], strict=True))


def test_axes_of_an_ellipsoid_with_anisotropic_voxels():
    mask = (ball(3, 1.0, 24, 1e-9, stretch=(6, 12, 24)) >= 0.5).numpy()
    found = morphology.features(mask, np.array([2.0, 1.0, 1.0]))  # half axes 12, 12 and 24 mm
    assert found["pca_elongation"] == pytest.approx(0.5, abs=0.02)
    assert found["pca_flatness"] == pytest.approx(0.5, abs=0.02)
    assert found["vol_dens_aee"] == pytest.approx(
        (5 / 4) ** 1.5, rel=0.03
    )  # an axis is 4 sd, the ball's 4.47


def test_the_area_of_smooth_level_sets_converges_and_that_of_a_binary_ball_does_not():
    field = ball(3, 10, 13).numpy()
    smooth, hard = surface(field, 0.5, np.ones(3)), surface((field > 0.5).astype(float), 0.5, np.ones(3))
    assert size(smooth) == pytest.approx(400 * math.pi, rel=0.01)
    assert content(smooth) == pytest.approx(4000 / 3 * math.pi, rel=0.01)
    larger = surface((ball(3, 24, 26).numpy() > 0.5).astype(float), 0.5, np.ones(3))
    for mesh, radius in ((hard, 10), (larger, 24)):
        sphericity = (36 * math.pi * content(mesh) ** 2) ** (1 / 3) / size(mesh)
        assert 0.90 < sphericity < 0.94, radius


@pytest.mark.parametrize("seed", range(3))
def test_a_surface_is_closed_and_complements_share_it(seed):
    field = (eg.random.uniform(seed, (6, 5, 4)) > 0.5).numpy().astype(float)
    mesh = surface(field, 0.5, np.ones(3))
    corners = mesh.round(6)
    edges = {}
    for triangle in corners:
        for a, b in itertools.pairwise([*triangle, triangle[0]]):
            edges[tuple(a), tuple(b)] = edges.get((tuple(a), tuple(b)), 0) + 1
    assert edges
    assert all(edges.get((b, a), 0) == n for (a, b), n in edges.items())  # every edge is walked both ways
    assert content(mesh) == pytest.approx(content(mesh + 100.0), rel=1e-9)
    mirrored = surface(field[::-1], 0.5, np.ones(3))
    assert content(mirrored) == pytest.approx(content(mesh))


def test_the_ellipsoid_of_the_consensus_has_another_area_than_an_ellipsoid():
    a, b, c = 2.0, 1.0, 1.0
    exact = 4 * math.pi * elliprg(a * a * b * b, a * a * c * c, b * b * c * c)
    assert exact == pytest.approx(2 * math.pi * (1 + a / math.sqrt(0.75) * math.asin(math.sqrt(0.75))))
    assert morphology.ellipsoid(np.array([a, b, c]))[1] == pytest.approx(0.8075 * exact, rel=1e-3)
    assert morphology.ellipsoid(np.ones(3))[1] == pytest.approx(4 * math.pi)


def test_hulls_boxes_and_ellipsoids_of_a_turned_box():
    sides = np.array(list(itertools.product((0.0, 6.0), (0.0, 3.0), (0.0, 2.0))))
    turn = np.linalg.qr(np.arange(9.0).reshape(3, 3) + np.eye(3))[0]
    corners = sides @ turn
    from scipy.spatial import ConvexHull

    hull = ConvexHull(corners)
    assert sorted(morphology.oriented_box(corners, corners[hull.simplices])) == pytest.approx([2, 3, 6])
    half = morphology.enclosing_ellipsoid(corners)
    assert sorted(half) == pytest.approx([math.sqrt(3) * s for s in (1, 1.5, 3)], rel=1e-5)


def test_moran_and_geary_are_sums_over_all_pairs():
    image = eg.random.normal(3, (4, 5, 3), dtype=torch.float64).numpy()
    mask = eg.random.uniform(4, (4, 5, 3)).numpy() > 0.3
    spacing = np.array([1.0, 0.5, 3.0])
    places, values = np.argwhere(mask) * spacing, image[mask]
    centred, total, products, squares = values - values.mean(), 0.0, 0.0, 0.0
    for i, j in itertools.permutations(range(len(values)), 2):
        weight = 1 / np.linalg.norm(places[i] - places[j])
        total += weight
        products += weight * centred[i] * centred[j]
        squares += weight * (values[i] - values[j]) ** 2
    spread, n = (centred**2).sum(), len(values)
    found = morphology.autocorrelation(image, mask, spacing)
    assert found == pytest.approx(
        (n / total * products / spread, (n - 1) / (2 * total) * squares / spread), rel=1e-9
    )


def test_a_local_peak_is_a_mean_over_a_ball_that_leaves_the_region():
    image = torch.zeros(15, 15, 15)
    image[7, 7, 7] = 1.0
    mask = image > 0
    found = radiomics.features(image + 1, mask, spacing=2.0)
    inside = sum(
        4 * (a * a + b * b + c * c) <= 6.2035**2 for a, b, c in itertools.product(range(-4, 5), repeat=3)
    )
    assert found["local_global_peak"] == pytest.approx(1 + 1 / inside)


# ------------------------------------------------------------------ the whole mapping


def region(axes=3):
    shape = (9, 8, 7)[:axes]
    image = eg.random.normal(5, shape, dtype=torch.float64) * 20 + 100
    return image, ball(axes, 3, 4)[tuple(slice(n) for n in shape)] > 0.5


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("given", [{"width": 7.5}, {"number": 16}])
def test_every_feature_has_a_value_and_forgets_channels_position_and_kind(axes, given):
    image, mask = region(axes)
    found = radiomics.features(image, mask, spacing=[1.0, 2.0, 0.5][:axes], **given)
    missing = {"shape_least_axis", "shape_flatness"} if axes == 2 else set()
    assert {name for name, value in found.items() if math.isnan(value)} == missing
    again = radiomics.features(
        image[None].float().numpy(), mask.numpy(), spacing=[1.0, 2.0, 0.5][:axes], **given
    )
    moved = radiomics.features(
        torch.nn.functional.pad(image, [2, 1] * axes),
        torch.nn.functional.pad(mask, [2, 1] * axes),
        spacing=[1.0, 2.0, 0.5][:axes],
        **given,
    )
    for name, value in found.items():
        assert again[name] == pytest.approx(value, rel=1e-3, nan_ok=True), name
        if not name.startswith("local"):  # the border of the image is nearer there
            assert moved[name] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), name


def test_slices_across_another_axis_are_the_slices_of_a_turned_image():
    image, mask = region()
    one = radiomics.features(image, mask, number=8, spacing=(1.0, 2.0, 3.0), slice_axis=0)
    other = radiomics.features(
        image.permute(1, 2, 0), mask.permute(1, 2, 0), number=8, spacing=(2.0, 3.0, 1.0), slice_axis=-1
    )
    assert dict(one) == pytest.approx(dict(other), rel=1e-9)


def test_an_empty_mask_has_no_features_and_a_single_voxel_few():
    image, mask = region()
    assert all(math.isnan(v) for n, v in radiomics.features(image, mask & False, number=8).items())
    one = torch.zeros_like(mask)
    one[4, 4, 3] = True
    found = radiomics.features(image, one, number=8)
    assert found["statistics_mean"] == pytest.approx(image[4, 4, 3].item())
    assert found["shape_voxel_volume"] == 1
    assert math.isnan(found["glcm_contrast_3D_avg"])


def test_levels_of_the_volume_histogram_are_chosen_by_themselves():
    image, mask = region()
    wide = radiomics.features(image, mask, number=16, ivh={"width": 10.0})
    assert wide["glcm_contrast_3D_avg"] == radiomics.features(image, mask, number=16)["glcm_contrast_3D_avg"]
    low = image[mask].min().item()
    assert ((wide["volume_histogram_intensity_at_volume_fraction_10"] - low) / 10 % 1) == pytest.approx(0.5)


def test_names_and_settings():
    image, mask = region()
    found, tagged = (radiomics.features(image, mask, width=5.0, tags=t) for t in (False, True))
    names = radiomics.names()
    for tag, value in tagged.items():
        ending = next((e for e in ("_2_5D_avg", "_2_5D_comb", "_2D_avg", "_2D_comb", "_3D_avg", "_3D_comb",
                                   "_2_5D", "_2D", "_3D") if tag.endswith(e)), "")  # fmt: skip
        assert found[names[tag.removesuffix(ending)] + ending] == pytest.approx(value, nan_ok=True)
    assert found.settings["voxels"] == int(mask.sum())
    assert found.settings["width"] == 5.0
    with pytest.raises(KeyError, match=r"Nearest: .*glcm_contrast_3D_avg"):
        found["glcm_contrst_3D_avg"]


# ------------------------------------------------------------------ preparation


def test_intensities_are_left_out_of_one_mask_only():
    image, mask = region()
    image[4, 4, 3] = 1e6
    mask[4, 4, 3] = True
    ready = radiomics.prepare(image, mask, spacing=2.0, within=(0, 2e6), outliers=3)
    shape, counted = ready.mask
    assert shape.sum() == counted.sum() + 1
    found = radiomics.features(ready.image, ready.mask, spacing=ready.spacing, number=8)
    assert found["statistics_maximum"] < 1e6
    assert found["shape_voxel_volume"] == 8 * int(mask.sum())
    assert list(ready.settings)[1:3] == ["within", "outliers"]
    assert ready.settings["voxels_counted"] == ready.settings["voxels"] - 1


def test_resampling_keeps_a_linear_image_and_the_volume():
    places = torch.meshgrid(*[torch.arange(12.0, dtype=torch.float64)] * 3, indexing="ij")
    image = 0.5 + places[0] + 2 * places[1] - places[2]
    mask = ball(3, 4, 6)[:12, :12, :12] > 0.5
    ready = radiomics.prepare(image, mask, spacing=2.0, to=1.0)
    assert ready.image.shape == (24, 24, 24)
    assert ready.image[12, 12, 12] == pytest.approx(0.5 + 5.75 * 2)  # voxel centres lie at (i - 0.5) / 2
    assert ready.mask[0].sum() == pytest.approx(8 * int(mask.sum()), rel=0.15)
    assert ready.spacing == (1.0, 1.0, 1.0)


# ------------------------------------------------------------------ what can be differentiated


@pytest.mark.parametrize("axes", [2, 3])
def test_soft_features_of_a_ball(axes):
    mask, spacing = ball(axes, 9, 20), 1.5
    # Radii of level sets have a logistic distribution with mean r and scale s: these are means over it.
    r, s = 13.5, 1.5
    exact = (
        math.pi * (r**2 + (math.pi * s) ** 2 / 3)
        if axes == 2
        else 4 / 3 * math.pi * (r**3 + r * (math.pi * s) ** 2)
    )
    around = 2 * math.pi * r if axes == 2 else 4 * math.pi * (r**2 + (math.pi * s) ** 2 / 3)
    whole = 2 * math.sqrt(math.pi * exact) if axes == 2 else (36 * math.pi * exact**2) ** (1 / 3)
    assert soft.volume(mask, spacing=spacing).item() == pytest.approx(exact, rel=1e-3)
    assert soft.area(mask, spacing=spacing).item() == pytest.approx(around, rel=0.02)
    assert soft.sphericity(mask, spacing=spacing).item() == pytest.approx(whole / around, rel=0.02)
    assert soft.elongation(mask, spacing=spacing).item() == pytest.approx(1.0, abs=1e-6)


def test_soft_features_of_a_binary_mask_are_the_hard_ones():
    image, mask = region()
    spacing = (1.0, 2.0, 0.5)
    hard = radiomics.features(image, mask, spacing=spacing, number=8)
    m = mask.double()
    n = int(mask.sum())
    assert soft.volume(m, spacing=spacing).item() == pytest.approx(hard["shape_voxel_volume"])
    found = soft.axes(m, spacing=spacing) * math.sqrt(n / (n - 1))
    names = ("shape_major_axis", "shape_minor_axis", "shape_least_axis")
    assert found.tolist() == pytest.approx([hard[name] for name in names])
    assert soft.flatness(m, spacing=spacing).item() == pytest.approx(hard["shape_flatness"])
    assert soft.rms(image, m).item() == pytest.approx(hard["statistics_rms"])
    whole = torch.randint(1, 7, image.shape, generator=torch.Generator().manual_seed(0)).double()
    levels = radiomics.features(whole, mask)
    centres = torch.arange(1.0, int(whole[mask].max()) + 1, dtype=torch.float64)
    assert soft.contrast(whole, m, centres=centres).item() == pytest.approx(levels["glcm_contrast_3D_comb"])
    assert soft.joint_entropy(whole, m, centres=centres).item() == pytest.approx(
        levels["glcm_joint_entropy_3D_comb"]
    )
    inverse = levels["glcm_inverse_difference_moment_3D_comb"]
    assert soft.homogeneity(whole, m, centres=centres).item() == pytest.approx(inverse)
    assert soft.histogram_entropy(whole, m, centres=centres).item() == pytest.approx(
        levels["histogram_entropy"]
    )


@pytest.mark.parametrize("axes", [2, 3])
def test_derivatives_agree_with_finite_differences(axes):
    shape = (4, 5, 3)[:axes]
    mask = eg.random.uniform(1, shape, dtype=torch.float64) * 0.8 + 0.1
    image = eg.random.uniform(2, shape, dtype=torch.float64) * 3.9
    mask.requires_grad_()
    image.requires_grad_()
    centres = torch.arange(4.0, dtype=torch.float64)
    shapes = [soft.volume, soft.area, soft.sphericity, soft.elongation, soft.variances]
    for feature in shapes + ([soft.flatness] if axes == 3 else []):
        assert gradcheck(lambda m, f=feature: f(m, spacing=(1.0, 2.0, 0.5)[:axes]), mask)
    for feature in (soft.mean, soft.variance, soft.rms):
        assert gradcheck(feature, (image, mask))
    for feature in (soft.contrast, soft.homogeneity, soft.joint_entropy, soft.histogram_entropy):
        assert gradcheck(lambda x, m, f=feature: f(x, m, centres=centres), (image, mask))
    for feature in statistics.NAMES.values():
        assert gradcheck(feature, image.flatten().detach().requires_grad_())


def test_features_compose_with_transforms_and_attributions():
    masks = torch.stack([ball(2, r, 8) for r in (3, 5)])
    slopes = vmap(grad(soft.sphericity))(masks)
    for mask, slope in zip(masks, slopes, strict=True):
        assert torch.allclose(slope, grad(soft.sphericity)(mask), atol=1e-10)
    model = eg.from_module(eg.zoo.small_unet(2, classes=2))
    x = eg.random.uniform(7, (1, 16, 16))

    def score(image):
        return soft.elongation(torch.softmax(model(image), 0)[1], spacing=(1.0, 2.0))

    baseline = eg.baselines.zero(x)
    a = eg.integrated_gradients(score, steps=64)(x, baseline)
    difference = score(x) - score(baseline)
    assert a.sum().item() == pytest.approx(difference.item(), abs=0.02 * abs(difference.item()) + 1e-6)

    where = torch.zeros(16, 16, dtype=torch.bool)
    where[4:9, 4:9] = True

    def loudness(image):
        return statistics.rms(image[0][where])

    b = eg.gradient(loudness)(x)
    assert torch.allclose(b[0], torch.where(where, x[0] / (25 * loudness(x)), 0.0), atol=1e-6)


def test_a_dream_can_ascend_sphericity():
    grid = torch.meshgrid(*[torch.arange(-12.0, 13.0)] * 2, indexing="ij")
    ellipse = ((grid[0] / 9) ** 2 + (grid[1] / 3.5) ** 2).sqrt()
    start = 5 * (1 - ellipse)[None]  # logits
    sphericity = lambda x: soft.sphericity(torch.sigmoid(x[0]))
    plain = eg.dreams.optimisers.sgd(20.0)
    found = eg.dreams.ascend(sphericity, start, steps=100, optimiser=plain)()
    assert found.value > sphericity(start)
    before, after = (
        radiomics.features(torch.ones_like(x[0]), x[0] > 0, number=1) for x in (start, found.image)
    )
    assert after["shape_sphericity"] > before["shape_sphericity"] + 0.05  # of the mask, which is not soft
    assert after["shape_elongation"] > before["shape_elongation"] + 0.2


# ------------------------------------------------------------------ wrong input


def test_what_is_refused_and_with_which_words():
    image, mask = region()
    cases = [
        (lambda: radiomics.features(image, mask), ValueError, "Say width= .* or number="),
        (lambda: radiomics.features(image, mask, width=1.0, number=4), ValueError, "Leave one of them out"),
        (lambda: radiomics.features(image, mask, width=-1.0), ValueError, "width > 0"),
        (lambda: radiomics.features(image, mask, number=0), ValueError, "number of bins >= 1"),
        (lambda: radiomics.features(image, mask[1:], number=4), ValueError, "a mask of the image's shape"),
        (lambda: radiomics.features(image, mask.long() * 3, number=4), ValueError, "mask == 1"),
        (lambda: radiomics.features(image, mask, number=4, spacing=(1.0, 0.0, 1.0)), ValueError, "spacing"),
        (lambda: radiomics.features(image, mask, number=4, slice_axis=3), ValueError, "slice_axis"),
        (lambda: radiomics.features(image, mask, number=4, ivh={"bins": 3}), ValueError, "ivh="),
        (
            lambda: radiomics.features(image.expand(2, *image.shape), mask, number=4),
            ValueError,
            "one channel",
        ),
        (lambda: radiomics.features([1, 2], mask, number=4), TypeError, "as a tensor or an array"),
        (lambda: radiomics.features(image * math.nan, mask, number=4), ValueError, "finite intensities"),
        (lambda: radiomics.prepare(image, mask, to=-1.0), ValueError, "lengths > 0 in to"),
        (lambda: radiomics.prepare(image, mask, to=1.0, order=9), ValueError, "order from 0 to 5"),
        (lambda: radiomics.prepare(image, mask, within=(3, 1)), ValueError, "within="),
        (lambda: radiomics.prepare(image, mask, outliers=0), ValueError, "outliers > 0"),
        (lambda: radiomics.pyradiomics(image[0], mask[0]), ValueError, "three axes"),
        (lambda: radiomics.pyradiomics(image, mask, width=None), ValueError, "width > 0 or number"),
        (lambda: soft.volume(torch.zeros(4)), ValueError, "two or three axes"),
        (lambda: soft.volume(torch.zeros(4, 4), spacing=(1.0,) * 3), ValueError, "spacing of 2"),
        (lambda: soft.volume(torch.zeros(4, 4, dtype=torch.long)), TypeError, "floating dtype"),
        (lambda: soft.flatness(torch.zeros(4, 4)), ValueError, "three axes"),
    ]
    for call, kind, words in cases:
        with pytest.raises(kind, match=words):
            call()
