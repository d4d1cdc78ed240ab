"""Draws are pure functions of (key, shape), agree with SplitMix64, and look random."""

import math

import jaxtyping
import pytest
import torch
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap

from esegeta import random

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

DRAWS = {
    "bits": random.bits,
    "uniform": random.uniform,
    "uniform64": lambda k, s: random.uniform(k, s, dtype=torch.float64),
    "uniform16": lambda k, s: random.uniform(k, s, dtype=torch.float16),
    "normal": random.normal,
    "normal64": lambda k, s: random.normal(k, s, dtype=torch.float64),
    "normal16": lambda k, s: random.normal(k, s, dtype=torch.bfloat16),
    "integers": lambda k, s: random.integers(k, s, low=-3, high=11),
    "signs": random.signs,
}
draws = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


@pytest.fixture
def unannotated():
    """As for users: where annotations are checked, as in this suite, the type checker speaks first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def unsigned(words):
    return [int(w) % 2**64 for w in words]


def mix(z):
    """SplitMix64's finaliser in Python integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


# ------------------------------------------------------------------ the generator


def test_the_stream_is_splitmix64():
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert unsigned(random._stream(torch.tensor(1234567), 5)) == expected


def test_bits_are_the_stream_from_the_hashed_key():
    for key in (0, 1, -1, 2**63 - 1):
        start = mix((key + random._DRAW) % 2**64)
        expected = [mix((start + j * 0x9E3779B97F4A7C15) % 2**64) for j in range(1, 5)]
        assert unsigned(random.bits(key, (4,))) == expected


def test_fold_in_is_its_definition():
    for key in (0, 5, -9):
        for index in (0, 1, -(2**63)):
            expected = mix((mix((key + random._FOLD) % 2**64) + index * 0x9E3779B97F4A7C15) % 2**64)
            assert unsigned([random.fold_in(key, index)]) == [expected]


def test_python_integers_wrap():
    for key in (-1, 2**64 - 1, 2**70 - 1):
        assert torch.equal(random.bits(key, (3,)), random.bits(torch.tensor(-1), (3,)))
        assert torch.equal(random.fold_in(3, key), random.fold_in(3, torch.tensor(-1)))
        assert torch.equal(random.fold_in(key, 3), random.fold_in(torch.tensor(-1), 3))


def test_the_numbers_of_this_version():
    # Results that were published with a key must be drawn again by every later version.
    assert random.bits(7, (2,)).tolist() == [1802311047255383899, 7379090539335229444]
    assert random.fold_in(7, 1).item() == -2670109869646284560
    assert random.uniform(7, (2,)).tolist() == [0.09770345687866211, 0.4000212550163269]
    torch.testing.assert_close(
        random.normal(7, (3,)),
        torch.tensor([1.186985731124878, 0.8364964127540588, -0.614534318447113]),
        rtol=1e-6,
        atol=0,
    )
    double = torch.tensor([1.1869854155150392, 0.836496742589198, -0.6145343983409816], dtype=torch.float64)
    torch.testing.assert_close(random.normal(7, (3,), dtype=torch.float64), double, rtol=1e-14, atol=0)
    assert random.integers(7, (6,), low=0, high=10).tolist() == [9, 2, 4, 8, 7, 3]
    assert random.signs(7, (6,)).tolist() == [1.0, 1.0, 1.0, -1.0, 1.0, -1.0]
    assert random.permutation(7, 6).tolist() == [5, 3, 4, 0, 2, 1]


# ------------------------------------------------------------------ purity


@draws
def test_a_smaller_draw_is_the_beginning_of_a_larger_one(draw):
    whole = draw(3, (41,))
    for n in (0, 1, 2, 7, 40):
        assert torch.equal(draw(3, (n,)), whole[:n])
    assert torch.equal(draw(3, (2, 3, 5)).flatten(), whole[:30])
    assert torch.equal(draw(3, ()), whole[0])
    assert draw(3, [4, 2]).shape == (4, 2)


@draws
def test_vmap_over_keys_is_a_loop(draw):
    keys = torch.arange(-2, 5)
    # Odd sizes: vectorised kernels treat the tail of a row apart.
    for shape in ((1,), (3, 7), (1001,)):
        assert torch.equal(vmap(lambda k: draw(k, shape))(keys), torch.stack([draw(k, shape) for k in keys]))


@draws
def test_vmap_over_indices_nested_and_in_chunks_is_a_loop(draw):
    def one(key, index):
        return draw(random.fold_in(key, index), (5, 3))

    keys, indices = torch.arange(4), torch.arange(6)
    expected = torch.stack([torch.stack([one(k, i) for i in range(6)]) for k in range(4)])
    for chunk in (1, 2, 5, None):
        inner = vmap(one, in_dims=(None, 0), chunk_size=chunk)
        assert torch.equal(vmap(inner, in_dims=(0, None), chunk_size=chunk)(keys, indices), expected)
        outer = vmap(one, in_dims=(0, None), chunk_size=chunk)
        assert torch.equal(vmap(outer, in_dims=(None, 0), out_dims=1)(keys, indices), expected)
    constant = vmap(lambda i: draw(random.fold_in(2, i), (5, 3)))(indices)
    assert torch.equal(constant, expected[2])


def test_permutation_under_vmap_is_a_loop():
    keys = torch.arange(5)
    rows = vmap(lambda k: random.permutation(k, 9))(keys)
    assert torch.equal(rows, torch.stack([random.permutation(int(k), 9) for k in keys]))
    nested = vmap(vmap(lambda k: random.permutation(k, 9)))(keys.reshape(5, 1))
    assert torch.equal(nested[:, 0], rows)


@draws
def test_keys_and_the_global_generator_are_left_alone(draw):
    key = torch.tensor(5)
    state = torch.get_rng_state()
    first = draw(key, (50,))
    torch.manual_seed(1)
    assert torch.equal(draw(key, (50,)), first)
    torch.set_rng_state(state)
    random.permutation(random.fold_in(key, 2), 3)
    draw(key, (3,))
    assert torch.equal(torch.get_rng_state(), state)
    assert key.item() == 5


@draws
def test_the_number_of_threads_does_not_matter(draw):
    # Above the grain size (32768), so that threads share the work; odd, so that they share it unevenly.
    shape, threads = (50, 3001), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(draw(4, shape))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_draws_are_constants_for_derivatives():
    x = torch.tensor([1.0, 2.0, 3.0])
    z = random.normal(3, (3,))
    assert torch.equal(grad(lambda v: (v * random.normal(3, (3,))).sum())(x), z)
    keys = torch.arange(3)
    rows = vmap(grad(lambda v, k: (v * random.normal(k, (3,))).sum()), in_dims=(None, 0))(x, keys)
    assert torch.equal(rows, torch.stack([random.normal(k, (3,)) for k in keys]))


@draws
def test_a_dry_run_gives_shapes(draw):
    with FakeTensorMode():
        assert draw(3, (4, 5)).shape == (4, 5)


# ------------------------------------------------------------------ distributions


def chi_square(counts):
    return stats.chisquare(counts).pvalue


def test_uniform_moments_and_chi_square():
    u = random.uniform(11, (1_000_000,), dtype=torch.float64)
    assert 0 <= u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1
    assert abs(u.mean() - 1 / 2) < 4 * math.sqrt(1 / 12) / 1000
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180) / 1000
    assert 1e-3 < chi_square(torch.histc(u, 1000, 0, 1).numpy()) < 1 - 1e-3


def test_pairs_fill_the_square_evenly():
    for lag in (1, 2, 64):
        u = (random.uniform(12, (400_000 + lag,)) * 32).long()
        cells = torch.bincount(u[:-lag] * 32 + u[lag:], minlength=1024)
        # Pairs at a lag share elements and are not quite independent: a wide band.
        assert 1e-4 < chi_square(cells.numpy()) < 1 - 1e-4


def test_every_bit_is_fair_and_independent_of_the_others():
    n = 200_000
    words = random.bits(13, (n,))
    planes = torch.stack([(words >> b & 1).double() * 2 - 1 for b in range(64)])
    correlation = planes @ planes.T / n
    assert planes.mean(1).abs().max() < 4.5 / math.sqrt(n)
    # 2016 pairs: 5 standard deviations happen once in 900 keys.
    assert (correlation - torch.eye(64)).abs().max() < 5 / math.sqrt(n)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_moments_tails_and_shape(dtype):
    n = 1_000_000
    z = random.normal(14, (n,), dtype=dtype).double()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert 4.2 < z.abs().max() < 6.5
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(z[::2].numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(z[1::2].numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("word", [0, -1])
def test_normals_are_finite_at_the_ends_of_the_words(monkeypatch, dtype, word):
    monkeypatch.setattr(random, "_stream", lambda start, count: torch.full((count,), word))
    z = random.normal(0, (4,), dtype=dtype)
    assert torch.isfinite(z).all()
    bits = 40 if dtype == torch.float32 else 53
    longest = math.sqrt(2 * (bits + 1) * math.log(2)) if word == 0 else 0
    assert z[::2].tolist() == pytest.approx([longest] * 2, rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("word", [0, -1])
def test_uniforms_stay_below_one_at_the_ends_of_the_words(monkeypatch, dtype, word):
    monkeypatch.setattr(random, "_stream", lambda start, count: torch.full((count,), word))
    u = random.uniform(0, (4,), dtype=dtype)
    expected = 0.0 if word == 0 else 1 - torch.finfo(dtype).eps / 2
    assert u.dtype == dtype
    assert u.tolist() == [expected] * 4


def test_pairs_of_normals_are_independent():
    n = 500_000
    pairs = random.normal(15, (n, 2)).double()
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 4 / math.sqrt(n)
    assert abs((pairs[:, 0] ** 2 * pairs[:, 1] ** 2).mean() - 1) < 4 * math.sqrt(8 / n)
    angle = torch.atan2(pairs[:, 1], pairs[:, 0]) / (2 * math.pi) + 0.5
    assert 1e-3 < chi_square(torch.histc(angle, 100, 0, 1).numpy()) < 1 - 1e-3


def test_no_correlation_between_keys_indices_or_lags():
    n = 20_000
    streams = [random.normal(key, (n,)) for key in range(-4, 12)]
    streams += [random.normal(2**k, (n,)) for k in range(4, 64, 4)]
    streams += [random.normal(random.fold_in(3, i), (n,)) for i in range(16)]
    streams += [random.normal(random.fold_in(random.fold_in(3, 1), i), (n,)) for i in range(8)]
    streams += [random.normal(random.fold_in(i, 3), (n,)) for i in range(4, 12)]
    z = torch.stack(streams).double()
    m = len(streams)
    correlation = z @ z.T / n
    # About 2000 pairs: 5 standard deviations.
    assert (correlation - torch.diag(correlation.diag())).abs().max() < 5 / math.sqrt(n)
    for lag in (1, 2, 3, 8, 100, 4096):
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < 4 / math.sqrt(m * n)
        crossed = z[:, lag:] @ z[:, :-lag].T / n
        assert crossed.abs().max() < 5.3 / math.sqrt(n)


@pytest.mark.slow
def test_every_bit_of_key_and_index_avalanches():
    base = [random.fold_in(torch.tensor(1234), i) for i in range(32)]
    for where in ("key", "index", "draw"):
        flips = torch.zeros(64, 64)
        for b in range(64):
            for i, before in enumerate(base):
                change = 1 << b if b < 63 else -(2**63)
                if where == "key":
                    word = before ^ random.fold_in(torch.tensor(1234 ^ change), i)
                elif where == "index":
                    word = before ^ random.fold_in(1234, i ^ change)
                else:
                    word = random.bits(i, ()) ^ random.bits(i ^ change, ())
                flips[b] += torch.stack([word >> o & 1 for o in range(64)])
        # Each of 4096 entries is binomial(32, 1/2), of standard deviation 2.8.
        assert flips.min() >= 3
        assert flips.max() <= 29
        assert abs(flips.mean() - 16) < 4 * 2.83 / 64


def test_folded_keys_are_distinct_and_unlike_draws():
    grid = [int(random.fold_in(k, i)) for k in range(30) for i in range(30)]
    nested = [
        int(random.fold_in(random.fold_in(k, i), j)) for k in range(8) for i in range(8) for j in range(8)
    ]
    words = [int(w) for k in range(30) for w in random.bits(k, (30,))]
    everything = grid + nested + words
    assert len(set(everything)) == len(everything)
    assert random.fold_in(1, 2) != random.fold_in(2, 1)


@pytest.mark.parametrize("draw", [random.uniform, random.normal])
def test_one_key_gives_one_field_in_all_precisions(draw):
    fields = {dtype: draw(9, (10_000,), dtype=dtype) for dtype in FLOATS}
    for dtype, field in fields.items():
        assert field.dtype == dtype
    # Rounding u to 2^-24 next to 1 moves the shortest radii the most.
    atol = {random.uniform: 2**-24, random.normal: 1e-4}[draw]
    single, double = fields[torch.float32].double(), fields[torch.float64]
    torch.testing.assert_close(single, double, rtol=1e-5, atol=atol)
    for short in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(
            fields[short].float(), fields[torch.float32], rtol=torch.finfo(short).eps, atol=1e-7
        )


def test_double_precision_is_more_than_single_precision_converted():
    z = random.normal(9, (1000,), dtype=torch.float64)
    u = random.uniform(9, (1000,), dtype=torch.float64)
    assert (z != z.float().double()).float().mean() > 0.99
    assert (u != u.float().double()).float().mean() > 0.99
    # The refinement is random as well: the digits beyond float32 are uniform.
    rest = (u * 2**24) % 1
    assert stats.kstest(rest.numpy(), "uniform").pvalue > 1e-3


def test_integers_are_uniform_between_their_bounds():
    for low, high in ((0, 7), (-5, 6), (10, 11)):
        counts = torch.bincount(random.integers(16, (70_000,), low=low, high=high) - low)
        assert len(counts) == high - low
        assert high - low == 1 or 1e-3 < chi_square(counts.numpy()) < 1 - 1e-3
    wide = random.integers(16, (1000,), low=-(2**62), high=2**62 - 1)
    assert wide.min() < -(2**61)
    assert wide.max() > 2**61


@pytest.mark.parametrize("dtype", FLOATS)
def test_signs_are_fair(dtype):
    s = random.signs(17, (100_000,), dtype=dtype)
    assert s.dtype == dtype
    assert s.unique().tolist() == [-1.0, 1.0]
    assert abs(s.double().mean()) < 4 / math.sqrt(100_000)


def test_permutations_are_permutations_and_all_equally_likely():
    assert sorted(random.permutation(0, 1000).tolist()) == list(range(1000))
    assert random.permutation(0, 1).tolist() == [0]
    orders = vmap(lambda k: random.permutation(k, 4))(torch.arange(24_000))
    names = orders @ torch.tensor([64, 16, 4, 1])
    counts = torch.unique(names, return_counts=True)[1]
    assert len(counts) == 24
    assert 1e-3 < chi_square(counts.numpy()) < 1 - 1e-3


# ------------------------------------------------------------------ bad input

NAMED = {
    "bits": lambda key: random.bits(key, (2,)),
    "uniform": lambda key: random.uniform(key, (2,)),
    "normal": lambda key: random.normal(key, (2,)),
    "integers": lambda key: random.integers(key, (2,), low=0, high=3),
    "signs": lambda key: random.signs(key, (2,)),
    "permutation": lambda key: random.permutation(key, 2),
    "fold_in": lambda key: random.fold_in(key, 0),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.usefixtures("unannotated")
def test_bad_keys_are_refused(name):
    with pytest.raises(
        TypeError, match=rf"^{name}: expected key= .*, got no key\. Pass for example key=0\.$"
    ):
        NAMED[name](None)
    for bad, got in (("a", "str 'a'"), (1.5, "float 1.5"), (True, "bool True")):
        with pytest.raises(
            TypeError, match=f"^{name}: expected key to be an int or an int64 tensor, got {got}"
        ):
            NAMED[name](bad)
    with pytest.raises(
        TypeError, match=rf"^{name}: expected key to be an int64 tensor of shape \(\), got float32"
    ):
        NAMED[name](torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"got int64\(3,\)\. Use esegeta.batched for many keys"):
        NAMED[name](torch.arange(3))


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (None, "NoneType None"),
        (0.5, "float 0.5"),
        (False, "bool False"),
        (torch.arange(2), r"int64\(2,\)"),
        (torch.tensor(0.0), r"float32\(\)"),
    ],
)
def test_bad_indices_are_refused(bad, got):
    expected = (
        rf"^fold_in: expected index to be an int or an int64 tensor of shape \(\), got {got}\. Use torch"
    )
    with pytest.raises(TypeError, match=expected):
        random.fold_in(0, bad)


@pytest.mark.usefixtures("unannotated")
def test_bad_shapes_dtypes_and_bounds_are_refused():
    with pytest.raises(
        TypeError, match=r"^normal: expected shape to be a tuple of ints, got int 3\. Pass .*\(n,\)"
    ):
        random.normal(0, 3)
    for name in ("uniform", "normal", "signs"):
        with pytest.raises(
            TypeError, match=rf"^{name}: expected dtype to be a real floating dtype, got torch.int64"
        ):
            getattr(random, name)(0, (3,), dtype=torch.int64)
    for low, high in ((3, 3), (4, 3), (0, 2**63 + 1), (-(2**63), 2**63 - 1), (0, 1.5)):
        with pytest.raises(
            ValueError, match=r"^integers: expected ints low < high that fit into int64, got low="
        ):
            random.integers(0, (3,), low=low, high=high)
    for n in (0, -1, 2.0):
        with pytest.raises(ValueError, match=r"^permutation: expected n to be an int >= 1, got "):
            random.permutation(0, n)
