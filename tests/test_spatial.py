"""The blur is the heat equation on the grid; masks grow and shrink as in the textbook."""

import itertools
import math

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.linalg import expm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap

from esegeta import random, spatial

SHAPES = ((2, 13), (2, 9, 12), (2, 7, 8, 5))
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
kinds = pytest.mark.parametrize(
    ("shape", "dtype"), list(itertools.product(SHAPES, TOLERANCE)), ids=lambda v: str(v).replace(" ", "")
)


def image(shape, dtype=torch.float64, key=1):
    return random.uniform(key, shape, dtype=dtype) * 2 - 1


def same(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.fixture
def unannotated():
    """As for users: where annotations are checked, as in this suite, the type checker speaks first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# ------------------------------------------------------------------ blur


@kinds
def test_shape_dtype_and_purity(shape, dtype):
    x = image(shape, dtype)
    before = x.clone()
    y = spatial.blur(x, 1.3)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert torch.equal(x, before)
    assert torch.equal(y, spatial.blur(x, 1.3))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 33])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_the_kernel_is_the_matrix_exponential_of_the_laplacian(n, sigma):
    neighbours = np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1)
    laplacian = neighbours - np.diag(neighbours.sum(1))
    expected = torch.from_numpy(expm(sigma**2 / 2 * laplacian))
    same(spatial.blur(torch.eye(n, dtype=torch.float64), sigma), expected, 1e-14)


@kinds
def test_it_is_separable(shape, dtype):
    x = image(shape, dtype)
    y = x
    for axis in range(1, x.ndim):
        rows = y.movedim(axis, -1)
        y = spatial.blur(rows.reshape(-1, rows.shape[-1]), 1.7).reshape(rows.shape).movedim(-1, axis)
    same(spatial.blur(x, 1.7), y, TOLERANCE[dtype])


@kinds
def test_zero_sigma_is_the_identity(shape, dtype):
    x = image(shape, dtype)
    same(spatial.blur(x, 0.0), x, TOLERANCE[dtype])
    same(spatial.blur(x, torch.tensor(0.0)), x, TOLERANCE[dtype])


@kinds
@pytest.mark.parametrize("sigma", [0.4, 2.0, 50.0])
def test_the_mean_stays_and_nothing_becomes_negative(shape, dtype, sigma):
    x = image(shape, dtype).abs()
    y = spatial.blur(x, sigma)
    axes = tuple(range(1, x.ndim))
    same(y.mean(axes), x.mean(axes), TOLERANCE[dtype])
    assert (y >= 0).all()
    assert (spatial.blur(torch.eye(40, dtype=dtype), sigma) >= 0).all()
    same(
        spatial.blur(torch.ones(shape, dtype=dtype), sigma), torch.ones(shape, dtype=dtype), TOLERANCE[dtype]
    )


@kinds
def test_a_then_b_is_the_root_of_the_sum_of_squares(shape, dtype):
    x = image(shape, dtype)
    twice = spatial.blur(spatial.blur(x, 0.9), 1.6)
    same(twice, spatial.blur(x, math.hypot(0.9, 1.6)), TOLERANCE[dtype])


def test_enough_blur_is_the_mean():
    x = image((2, 5, 6))
    same(spatial.blur(x, 1e3), x.mean((1, 2), keepdim=True).expand_as(x), 1e-14)


@pytest.mark.parametrize("sigma", [0.2, 0.7, 1.0, 3.0])
def test_the_variance_is_sigma_squared_in_the_interior(sigma):
    n = 101
    x = torch.zeros(1, n, dtype=torch.float64)
    x[0, 50] = 1
    y = spatial.blur(x, sigma)[0]
    offset = torch.arange(n, dtype=torch.float64) - 50
    same((y * offset).sum(), torch.tensor(0.0, dtype=torch.float64), 1e-12)
    same((y * offset**2).sum(), torch.tensor(sigma**2, dtype=torch.float64), 1e-11)


@kinds
def test_borders_mirror(shape, dtype):
    x = image(shape, dtype)
    y = spatial.blur(x, 1.5)
    mirrored = x
    for axis in range(1, x.ndim):
        mirrored = torch.cat((mirrored.flip(axis), mirrored, mirrored.flip(axis)), axis)
    middle = (slice(None), *(slice(n, 2 * n) for n in shape[1:]))
    # Three copies, not all of the line: what is left out is 5 voxels or 3 standard deviations away at least.
    same(spatial.blur(mirrored, 1.5)[middle], y, 1e-3)
    same(spatial.blur(x.flip(1), 1.5), y.flip(1), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(1, 64), (1, 40, 30), (1, 24, 20, 22)])
def test_it_is_close_to_the_sampled_gaussian(shape):
    x = image(shape)
    for sigma in (1.5, 3.0, 6.0):
        sampled = ndimage.gaussian_filter(x[0].numpy(), sigma, mode="reflect", truncate=10)
        # Noise is the worst case: it shows how the kernels differ at high frequencies, by a term in sigma^-2.
        same(spatial.blur(x, sigma)[0], torch.from_numpy(sampled), 0.1 / sigma**2)


@kinds
def test_millimetres(shape, dtype):
    x = image(shape, dtype)
    axes = len(shape) - 1
    same(spatial.blur(x, 3.0, (2.0,) * axes), spatial.blur(x, 1.5), TOLERANCE[dtype])
    same(spatial.blur(x, 1.5, (1,) * axes), spatial.blur(x, 1.5), 0)
    zooms = np.array((0.5, 1.0, 3.0)[:axes], dtype=np.float32)
    by_axis = x
    for axis, length in enumerate(zooms, start=1):
        rows = by_axis.movedim(axis, -1)
        flat = spatial.blur(rows.reshape(-1, rows.shape[-1]), 1.2 / float(length))
        by_axis = flat.reshape(rows.shape).movedim(-1, axis)
    for spacing in (zooms, tuple(zooms), zooms.tolist(), torch.from_numpy(zooms)):
        same(spatial.blur(x, 1.2, spacing), by_axis, TOLERANCE[dtype])


def test_voxels_of_different_size_give_a_round_blur():
    x = torch.zeros(1, 61, 31, dtype=torch.float64)
    x[0, 30, 15] = 1
    y = spatial.blur(x, 4.0, (1.0, 2.0))[0]
    rows = torch.arange(61, dtype=torch.float64) - 30
    columns = 2 * (torch.arange(31, dtype=torch.float64) - 15)
    same((y.sum(1) * rows**2).sum(), torch.tensor(16.0, dtype=torch.float64), 1e-6)
    same((y.sum(0) * columns**2).sum(), torch.tensor(16.0, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes(dtype):
    x = image((1, 9, 10)).to(dtype)
    y = spatial.blur(x, 1.5)
    assert y.dtype == dtype
    same(y.double(), spatial.blur(x.double(), 1.5), 2 * torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # the first jvp of a process
def test_derivatives_in_sigma_and_x():
    x, weight = image((1, 9, 10)), image((1, 9, 10), key=2)

    def score(sigma):
        return (weight * spatial.blur(x, sigma)).sum()

    sigma, h = torch.tensor(1.3, dtype=torch.float64), 1e-5
    slope = (score(sigma + h) - score(sigma - h)) / (2 * h)
    same(grad(score)(sigma), slope, 1e-8)
    same(jvp(score, (sigma,), (torch.ones_like(sigma),))[1], slope, 1e-8)
    assert grad(score)(torch.tensor(0.0, dtype=torch.float64)) == 0
    # The kernel is symmetric, so it is its own adjoint.
    same(grad(lambda v: (weight * spatial.blur(v, 1.3)).sum())(x), spatial.blur(weight, 1.3), 1e-14)


@kinds
def test_blur_under_vmap_is_a_loop(shape, dtype):
    xs = torch.stack([image(shape, dtype, key) for key in range(3)])
    sigmas = torch.tensor([0.0, 0.8, 2.0], dtype=dtype)
    spacings = 1 + random.uniform(3, (3, len(shape) - 1), dtype=dtype)
    loop = torch.stack([spatial.blur(*each) for each in zip(xs, sigmas, spacings, strict=True)])
    same(vmap(spatial.blur)(xs, sigmas, spacings), loop, TOLERANCE[dtype])
    grid = vmap(vmap(spatial.blur, in_dims=(None, 0)), in_dims=(0, None))(xs, sigmas)
    same(grid[1, 2], spatial.blur(xs[1], sigmas[2]), TOLERANCE[dtype])
    slopes = vmap(grad(lambda s: spatial.blur(xs[0], s).square().sum()))(sigmas)
    same(slopes[1], grad(lambda s: spatial.blur(xs[0], s).square().sum())(sigmas[1]), 100 * TOLERANCE[dtype])


def test_a_dry_run_of_the_blur_gives_shapes():
    with FakeTensorMode():
        y = spatial.blur(torch.zeros(2, 5, 6), torch.tensor(2.0), (1.0, 2.0))
    assert y.shape == (2, 5, 6)


# ------------------------------------------------------------------ masks


def mask(shape, key=1, share=0.5):
    return random.uniform(key, shape) < share


MASKS = ((9,), (1,), (6, 7), (5, 1), (4, 5, 6))


@pytest.mark.parametrize("faces", [True, False])
@pytest.mark.parametrize("shape", MASKS)
def test_morphology_agrees_with_scipy(shape, faces):
    structure = ndimage.generate_binary_structure(len(shape), 1 if faces else len(shape))
    for key, share in ((1, 0.1), (2, 0.5), (3, 0.9), (4, 0.0), (5, 1.0)):
        m = mask(shape, key, share)
        before = m.clone()
        grown = ndimage.binary_dilation(m.numpy(), structure, border_value=0)
        worn = ndimage.binary_erosion(m.numpy(), structure, border_value=1)
        assert np.array_equal(spatial.dilate(m, faces=faces).numpy(), grown)
        assert np.array_equal(spatial.erode(m, faces=faces).numpy(), worn)
        assert np.array_equal(spatial.boundary(m, faces=faces).numpy(), grown & ~worn)
        assert torch.equal(m, before)


@pytest.mark.parametrize(("axes", "faces", "count"), [(1, 0, 3), (2, 1, 5), (2, 0, 9), (3, 1, 7), (3, 0, 27)])
def test_one_voxel_becomes_its_neighbourhood(axes, faces, count):
    m = torch.zeros((5,) * axes, dtype=torch.bool)
    m[(2,) * axes] = True
    assert spatial.dilate(m, faces=bool(faces)).sum() == count
    assert spatial.dilate(spatial.dilate(m, faces=False), faces=False).all()


def test_faces_are_the_default():
    spot = torch.zeros(5, 6, dtype=torch.bool)
    spot[2, 2] = True
    for function, m in ((spatial.dilate, spot), (spatial.erode, ~spot), (spatial.boundary, spot)):
        assert torch.equal(function(m), function(m, faces=True))
        assert not torch.equal(function(m), function(m, faces=False))


@pytest.mark.parametrize("faces", [True, False])
@pytest.mark.parametrize("shape", MASKS)
def test_morphology_under_vmap_is_a_loop(shape, faces):
    masks = torch.stack([mask(shape, key) for key in range(6)])
    for function in (spatial.dilate, spatial.erode, spatial.boundary):
        loop = torch.stack([function(m, faces=faces) for m in masks])
        assert torch.equal(vmap(lambda m: function(m, faces=faces))(masks), loop)
        nested = vmap(vmap(lambda m: function(m, faces=faces)))(masks.reshape(2, 3, *shape))
        assert torch.equal(nested, loop.reshape(2, 3, *shape))


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 4, 4, 4), (1, 0)])
def test_images_of_other_shapes_are_refused(shape):
    expected = (
        r"^blur: expected x of shape \(C,\*S\) with one to three spatial axes, got float32\(.*\)\. Add a"
    )
    with pytest.raises(ValueError, match=expected):
        spatial.blur(torch.zeros(shape), 1.0)


@pytest.mark.usefixtures("unannotated")
def test_images_of_integers_are_refused():
    with pytest.raises(TypeError, match=r"^blur: expected x of a floating dtype, got int64\(1, 4\)\. "):
        spatial.blur(torch.zeros(1, 4, dtype=torch.int64), 1.0)


@pytest.mark.usefixtures("unannotated")
def test_bad_sigmas_are_refused():
    x = torch.zeros(1, 4)
    for bad in (-1.0, float("nan"), float("inf"), "2"):
        with pytest.raises(
            ValueError, match=rf"^blur: expected sigma to be a finite number >= 0, got {bad!r}\. "
        ):
            spatial.blur(x, bad)
        if isinstance(bad, float):
            with pytest.raises(
                ValueError, match=r"^blur: .*, got a negative or non-finite tensor\. Clamp it at"
            ):
                spatial.blur(x, torch.tensor(bad))
    for bad in (torch.ones(2), torch.tensor(1)):
        with pytest.raises(
            TypeError, match=r"^blur: expected sigma .* or a floating tensor of shape \(\), got"
        ):
            spatial.blur(x, bad)
    with pytest.raises(
        ValueError, match=r"^blur: .*, got a negative or non-finite tensor\. Clamp it at zero\."
    ):
        vmap(lambda s: spatial.blur(x, s))(torch.tensor([1.0, -1.0]))


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    "bad",
    [
        (1.0,),
        (1.0, 1.0, 1.0),
        (1.0, 0.0),
        (1.0, -1.0),
        (1.0, float("nan")),
        2.0,
        "mm",
        (1.0, None),
        torch.ones(3),
        torch.tensor([1.0, -1.0]),
    ],
)
def test_bad_spacings_are_refused(bad):
    expected = r"^blur: expected spacing of 2 finite lengths > 0, one per spatial axis, got .*\. Take it"
    with pytest.raises(ValueError, match=expected):
        spatial.blur(torch.zeros(1, 4, 4), 1.0, bad)


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize("name", ["dilate", "erode", "boundary"])
def test_bad_masks_are_refused(name):
    function = getattr(spatial, name)
    with pytest.raises(
        TypeError, match=rf"^{name}: expected a boolean mask, got float32\(3,\)\. Pass .* mask > 0\."
    ):
        function(torch.zeros(3))
    with pytest.raises(TypeError, match=rf"^{name}: expected mask to be a torch.Tensor, got list "):
        function([True])
    for shape in ((), (1, 2, 3, 4), (0, 2)):
        expected = rf"^{name}: expected a mask of shape \(\*S\) with one to three axes, got bool"
        with pytest.raises(ValueError, match=expected):
            function(torch.zeros(shape, dtype=torch.bool))
