"""Noises are functions (x, key) -> tensor like x with the promised standard deviation."""

import jaxtyping
import pytest
import torch
from torch.func import vmap

from esegeta import noise, random

SHAPES = ((2, 5001), (2, 70, 71), (1, 21, 22, 23))
NOISES = {
    "absolute": noise.absolute(0.5),
    "fraction_of_range": noise.fraction_of_range(0.1),
    "within": noise.within(noise.absolute(2.0), torch.tensor([True, False, True])),
}


def image(shape, dtype=torch.float32, key=1):
    return random.uniform(key, shape, dtype=dtype) * 7 - 2


@pytest.fixture
def unannotated():
    """As for users: where annotations are checked, as in this suite, the type checker speaks first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_standard_deviations(shape, dtype):
    x = image(shape, dtype)
    span = (x.max() - x.min()).item()
    for make, sigma in ((noise.absolute, 0.3), (noise.fraction_of_range, 0.3 / span)):
        eta = make(sigma)(x, 5)
        assert eta.shape == x.shape
        assert eta.dtype == dtype
        assert eta.std().item() == pytest.approx(0.3, rel=4 / (2 * x.numel()) ** 0.5)
        assert abs(eta.mean().item()) < 4 * 0.3 / x.numel() ** 0.5


def test_the_field_is_the_normal_draw_of_the_key():
    x = image((2, 3, 4))
    assert torch.equal(noise.absolute(1.0)(x, 5), random.normal(5, (2, 3, 4)))
    assert not torch.equal(noise.absolute(1.0)(x, 5), noise.absolute(1.0)(x, 6))
    torch.testing.assert_close(noise.absolute(3)(x, 5), 3 * noise.absolute(1.0)(x, 5))


def test_fraction_follows_the_range_and_not_the_offset():
    x = image((2, 3, 4), torch.float64)
    eta = noise.fraction_of_range(0.1)(x, 5)
    torch.testing.assert_close(noise.fraction_of_range(0.1)(10 * x + 3, 5), 10 * eta)
    assert (noise.fraction_of_range(0.1)(torch.full((1, 4), 3.0), 5) == 0).all()


def test_zero_sigma_is_no_noise():
    x = image((1, 6))
    for make in (noise.absolute, noise.fraction_of_range, noise.as_noise):
        assert (make(0)(x, 5) == 0).all()


def test_the_image_and_the_global_generator_are_left_alone():
    x = image((2, 3))
    before, state = x.clone(), torch.get_rng_state()
    for each in NOISES.values():
        assert torch.equal(each(x, 5), each(x, 5))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_within_keeps_the_inside_and_clears_the_outside():
    x = image((2, 4, 5))
    inner = noise.absolute(1.0)
    mask = torch.arange(20).reshape(4, 5) % 3 == 0
    for where in (mask, torch.stack([mask, ~mask])):
        eta = noise.within(inner, where)(x, 5)
        outside = ~where.expand(2, 4, 5)
        assert (eta[outside] == 0).all()
        assert torch.equal(eta[~outside], inner(x, 5)[~outside])
        assert (eta[~outside] != 0).all()


def test_within_clears_even_what_is_not_finite():
    mask = torch.tensor([True, False])
    eta = noise.within(lambda x, key: x / 0, mask)(torch.ones(1, 2), 5)
    assert eta.tolist() == [[float("inf"), 0.0]]


@pytest.mark.parametrize("name", NOISES)
def test_vmap_is_a_loop(name):
    each = NOISES[name]
    xs = torch.stack([i * image((2, 3), key=i) for i in range(1, 5)])
    keys = torch.arange(4)
    loop = torch.stack([each(x, k) for x, k in zip(xs, keys, strict=True)])
    assert torch.equal(vmap(each)(xs, keys), loop)
    assert torch.equal(vmap(lambda x: each(x, 3))(xs)[3], loop[3])
    # Samples of one image: nested, the keys folded inside.
    fold = vmap(vmap(lambda x, i: each(x, random.fold_in(9, i)), in_dims=(None, 0)), in_dims=(0, None))
    samples = fold(xs, torch.arange(3))
    assert torch.equal(samples[2, 1], each(xs[2], random.fold_in(9, 1)))


def test_as_noise():
    x = image((1, 6))
    own = lambda x, key: x
    assert noise.as_noise(own) is own
    assert torch.equal(noise.as_noise(0.2)(x, 5), noise.fraction_of_range(0.2)(x, 5))
    assert torch.equal(noise.as_noise(1)(x, 5), noise.fraction_of_range(1.0)(x, 5))


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_bad_sizes_are_refused(bad):
    with pytest.raises(
        ValueError, match=rf"^absolute: expected sigma to be a finite number >= 0, got {bad}\. "
    ):
        noise.absolute(bad)
    for make in (noise.fraction_of_range, noise.as_noise):
        expected = rf"^fraction_of_range: expected fraction to be a finite number >= 0, got {bad}\. "
        with pytest.raises(ValueError, match=expected):
            make(bad)


@pytest.mark.usefixtures("unannotated")
def test_what_is_no_noise_is_refused():
    expected = (
        r"^as_noise: expected a number \(the fraction of the range of x\) or a noise .*, got {}\. Pass for"
    )
    for bad, got in (("0.1", "str '0.1'"), (None, "NoneType None"), (True, "bool True")):
        with pytest.raises(TypeError, match=expected.format(got)):
            noise.as_noise(bad)
        with pytest.raises(TypeError, match=expected.format(got)):
            noise.within(bad, torch.tensor([True]))


def test_a_number_within_a_mask_is_a_fraction_of_the_range():
    mask = torch.tensor([True, False])
    x = torch.tensor([[0.0, 10.0]])
    expected = noise.within(noise.fraction_of_range(0.1), mask)(x, 3)
    assert torch.equal(noise.within(0.1, mask)(x, 3), expected)
    assert expected[0, 0] != 0


@pytest.mark.usefixtures("unannotated")
def test_bad_masks_are_refused():
    inner = noise.absolute(1.0)
    with pytest.raises(
        TypeError, match=r"^within: expected a boolean mask, got float32\(3,\)\. Pass .* mask > 0\."
    ):
        noise.within(inner, torch.ones(3))
    with pytest.raises(TypeError, match=r"^within: expected mask to be a torch.Tensor, got list \[True\]"):
        noise.within(inner, [True])
    expected = r"^within: expected a mask of shape \(4, 5\) or \(2, 4, 5\), got bool\(5,\)\. Resample"
    with pytest.raises(ValueError, match=expected):
        noise.within(inner, torch.ones(5, dtype=torch.bool))(image((2, 4, 5)), 0)


@pytest.mark.parametrize("name", ["absolute", "fraction_of_range"])
@pytest.mark.usefixtures("unannotated")
def test_images_of_integers_and_missing_keys_are_refused(name):
    each = getattr(noise, name)(0.1)
    with pytest.raises(TypeError, match=rf"^{name}: expected x of a floating dtype, got int64\(3,\)\. "):
        each(torch.arange(3), 0)
    with pytest.raises(TypeError, match=r"expected key to be an int or an int64 tensor, got str 'a'"):
        each(torch.ones(3), "a")
