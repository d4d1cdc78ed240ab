"""Baselines are pure functions of one example, in the units of the network's input."""

import jaxtyping
import pytest
import torch
from together import together
from torch.func import vmap

from esegeta import baselines, random, spatial

SHAPES = ((2, 9), (2, 5, 6), (2, 3, 4, 5))
BASELINES = {
    "zero": baselines.zero,
    "black": baselines.black,
    "white": baselines.white,
    "mean": baselines.mean,
    "blurred": lambda x: baselines.blurred(x, 1.5),
    "uniform": lambda x: baselines.uniform(x, key=3),
    "farthest_corner": baselines.farthest_corner,
}
every = pytest.mark.parametrize("baseline", BASELINES.values(), ids=BASELINES.keys())
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def image(shape, dtype=torch.float64, key=1):
    x = random.normal(key, shape, dtype=dtype)
    return x * torch.arange(1, shape[0] + 1, dtype=dtype).reshape(-1, *(1,) * (len(shape) - 1)) - 0.5


@pytest.fixture
def unannotated():
    """As for users: where annotations are checked, as in this suite, the type checker speaks first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@every
@shapes
@together("dtype", [torch.float16, torch.float32, torch.float64])
def test_contract(baseline, shape, dtype):
    x = image(shape, dtype)
    before, state = x.clone(), torch.get_rng_state()
    b = baseline(x)
    assert b.shape == x.shape
    assert b.dtype == dtype
    assert b.is_contiguous()
    assert torch.equal(b, baseline(x))
    b.fill_(7.0)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@every
@shapes
def test_vmap_is_a_loop(baseline, shape):
    xs = torch.stack([image(shape, key=key) for key in range(6)])
    loop = torch.stack([baseline(x) for x in xs])
    torch.testing.assert_close(vmap(baseline)(xs), loop, rtol=0, atol=1e-14)
    nested = vmap(vmap(baseline))(xs.reshape(2, 3, *shape))
    torch.testing.assert_close(nested.flatten(0, 1), loop, rtol=0, atol=1e-14)


@shapes
def test_values(shape):
    x = image(shape)
    for c, channel in enumerate(x):
        assert (baselines.zero(x)[c] == 0).all()
        assert (baselines.black(x)[c] == channel.min()).all()
        assert (baselines.white(x)[c] == channel.max()).all()
        torch.testing.assert_close(baselines.mean(x)[c], torch.full_like(channel, channel.mean()))
    assert torch.equal(baselines.blurred(x, 1.5), spatial.blur(x, 1.5))
    spacing = (1.0, 2.0, 3.0)[: len(shape) - 1]
    assert torch.equal(baselines.blurred(x, 1.5, spacing), spatial.blur(x, 1.5, spacing))


@shapes
@pytest.mark.parametrize(("name", "argument"), [("black", "minimum"), ("white", "maximum")])
def test_given_levels(shape, name, argument):
    x = image(shape)
    function = getattr(baselines, name)
    assert (function(x, -3) == -3).all()
    assert (function(x, **{argument: 2.5}) == 2.5).all()
    assert (function(x, torch.tensor(2.5, dtype=torch.float64)) == 2.5).all()
    levels = torch.tensor([1.0, -4.0], dtype=torch.float64)
    for c in range(2):
        assert (function(x, levels)[c] == levels[c]).all()
    mapped = vmap(lambda v: function(x, v))(levels)
    assert (mapped[1] == -4).all()
    function(x, levels).fill_(0)
    assert levels.tolist() == [1.0, -4.0]


@shapes
def test_uniform_fills_the_range_of_each_channel(shape):
    x = image((shape[0], *(n * 8 for n in shape[1:])))
    b = baselines.uniform(x, key=3)
    u = random.uniform(3, x.shape, dtype=x.dtype)
    for c, channel in enumerate(x):
        low, high = channel.min(), channel.max()
        torch.testing.assert_close(b[c], low + (high - low) * u[c])
        assert (b[c] >= low).all()
        assert (b[c] <= high).all()
    assert not torch.equal(b, baselines.uniform(x, key=4))
    given = baselines.uniform(x, key=3, low=-1, high=torch.tensor([1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(given, torch.stack([2 * u[0] - 1, 4 * u[1] - 1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_never_leaves_its_range_by_rounding(monkeypatch, dtype):
    largest = 1 - torch.finfo(dtype).eps / 2
    monkeypatch.setattr(random, "uniform", lambda key, shape, **_: torch.full(shape, largest, dtype=dtype))
    x = random.normal(1, (10_000, 2), dtype=dtype)
    b = baselines.uniform(x, key=0)
    assert (b <= x.amax(1, keepdim=True)).all()
    assert (b >= x.amin(1, keepdim=True)).all()


def test_examples_have_their_own_draw_with_their_own_key():
    xs = torch.stack([image((1, 9))] * 2)
    draw = lambda x, key: baselines.uniform(x, key=key)
    own = vmap(draw)(xs, torch.arange(2))
    assert torch.equal(own, torch.stack([draw(xs[0], 0), draw(xs[1], 1)]))
    assert not torch.equal(own[0], own[1])


@shapes
def test_no_corner_is_farther(shape):
    x = image(shape)
    for low, high in ((None, None), (-2.0, 3.0), (-2.0, None)):
        b = baselines.farthest_corner(x, low, high)
        bottom = baselines.black(x, low)
        top = baselines.white(x, high)
        assert torch.equal((x - b).abs(), torch.maximum((x - bottom).abs(), (x - top).abs()))
        assert ((b == bottom) | (b == top)).all()
    middle = baselines.farthest_corner(torch.tensor([[0.0, 1.0, 2.0]]))
    assert middle.tolist() == [[2.0, 0.0, 0.0]]


@shapes
@pytest.mark.parametrize("n", [1, 7])
def test_samples_are_different_and_of_the_data_set(shape, n):
    samples = torch.stack([torch.full(shape, float(i)) for i in range(n)])
    before = samples.clone()
    everything = baselines.dataset(samples, key=3, count=n)
    assert everything.shape == samples.shape
    assert sorted(everything[:, 0].reshape(n, -1)[:, 0].tolist()) == list(range(n))
    for count in range(1, n + 1):
        assert torch.equal(baselines.dataset(samples, key=3, count=count), everything[:count])
    everything.fill_(9.0)
    assert torch.equal(samples, before)


def test_all_samples_are_drawn_equally_often_and_by_key():
    samples = torch.arange(5.0).reshape(5, 1, 1)
    keys = torch.arange(2000)
    drawn = vmap(lambda key: baselines.dataset(samples, key=key, count=2))(keys)
    assert torch.equal(drawn[3], baselines.dataset(samples, key=3, count=2))
    share = torch.bincount(drawn.flatten().long()) / 4000
    assert (share - 0.2).abs().max() < 4 * (0.2 * 0.8 / 4000) ** 0.5


# ------------------------------------------------------------------ bad input

SHAPED = {**BASELINES, "blur": BASELINES["blurred"]}


@pytest.mark.parametrize("name", ["black", "white", "mean", "blur", "uniform", "farthest_corner"])
@pytest.mark.usefixtures("unannotated")
def test_bad_images_are_refused(name):
    for shape in ((4,), (2, 1, 4, 4, 4), (1, 0)):
        expected = rf"^{name}: expected x of shape \(C,\*S\) with one to three spatial axes, got float32\("
        with pytest.raises(ValueError, match=expected):
            SHAPED[name](torch.zeros(shape))
    with pytest.raises(TypeError, match=rf"^{name}: expected x of a floating dtype, got int64\(1, 4\)\. "):
        SHAPED[name](torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=rf"^{name}: expected x to be a torch.Tensor, got list"):
        SHAPED[name]([1.0])


@pytest.mark.usefixtures("unannotated")
def test_zero_of_integers_is_refused():
    with pytest.raises(
        TypeError, match=r"^zero: expected x of a floating dtype, got int64\(4,\)\. Convert it"
    ):
        baselines.zero(torch.arange(4))


LEVELS = {
    ("black", "minimum"): lambda x, v: baselines.black(x, v),
    ("white", "maximum"): lambda x, v: baselines.white(x, v),
    ("uniform", "low"): lambda x, v: baselines.uniform(x, key=0, low=v),
    ("uniform", "high"): lambda x, v: baselines.uniform(x, key=0, high=v),
    ("farthest_corner", "low"): lambda x, v: baselines.farthest_corner(x, low=v),
    ("farthest_corner", "high"): lambda x, v: baselines.farthest_corner(x, high=v),
}


@pytest.mark.parametrize(("name", "argument"), LEVELS)
@pytest.mark.usefixtures("unannotated")
def test_bad_levels_are_refused(name, argument):
    expected = (
        rf"^{name}: expected {argument} to be a finite number or a floating tensor of shape \(\) or \(2,\), "
    )
    for bad in (float("nan"), float("inf"), True, "0", torch.ones(3), torch.ones(2, 4), torch.tensor(1)):
        with pytest.raises(ValueError, match=expected):
            LEVELS[name, argument](torch.zeros(2, 4), bad)


@pytest.mark.parametrize("name", ["uniform", "farthest_corner"])
def test_empty_ranges_are_refused(name):
    key = {"key": 0} if name == "uniform" else {}
    function = getattr(baselines, name)
    x = torch.tensor([[0.0, 1.0]])
    for low, high in ((2, 1), (2, None), (None, -1)):
        with pytest.raises(
            ValueError, match=rf"^{name}: expected low <= high in every channel, got low > high\. Left"
        ):
            function(x, **key, low=low, high=high)
    with pytest.raises(ValueError, match=rf"^{name}: expected low <= high in every channel"):
        vmap(lambda v: function(x, **key, low=v))(torch.tensor([0.5, 2.0]))


@pytest.mark.usefixtures("unannotated")
def test_missing_keys_are_refused():
    with pytest.raises(TypeError, match=r"^uniform: expected key= .*, got no key\. Pass for example key=0\."):
        baselines.uniform(torch.zeros(1, 4), key=None)
    with pytest.raises(TypeError, match=r"^dataset: expected key= .*, got no key\. Pass for example key=0\."):
        baselines.dataset(torch.zeros(3, 1, 4), key=None, count=1)


@pytest.mark.usefixtures("unannotated")
def test_bad_data_sets_are_refused():
    samples = torch.zeros(3, 1, 4)
    with pytest.raises(
        ValueError, match=r"^dataset: expected count <= the 3 samples, got 4\. Pass more samples\."
    ):
        baselines.dataset(samples, key=0, count=4)
    with pytest.raises(ValueError, match=r"^dataset: expected count to be an int >= 1, got 0\. "):
        baselines.dataset(samples, key=0, count=0)
    with pytest.raises(
        ValueError, match=r"^dataset: expected samples of shape \(n,C,\*S\), got float32\(3, 4\)\. "
    ):
        baselines.dataset(samples[:, 0], key=0, count=1)
    with pytest.raises(TypeError, match=r"^dataset: expected samples of a floating dtype, got int64"):
        baselines.dataset(samples.long(), key=0, count=1)
