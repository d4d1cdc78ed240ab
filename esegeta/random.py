"""Random numbers as pure functions of ``(key, shape)``: counter-based, in int64 tensor arithmetic.

Element ``j`` of a draw is a hash of ``(key, j)``, so it is the same whatever else is drawn beside it: any
chunk, any ``vmap``, any number of threads. There is no state: torch's generators are neither read nor moved.

One key, one draw: two draws from the same key share their bits. Derive more keys with ``fold_in``, which may
be applied to a key that is also drawn from. The integers behind a draw are equal on every device; logarithms
and cosines may differ there in the last place.

The hash is SplitMix64 (Steele, Lea and Flood, *Fast splittable pseudorandom number generators*, OOPSLA 2014):
a key selects a point of its cycle of 2^64 words. Two keys that each draw n words overlap with probability
``2 n / 2^64``.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from esegeta.engine import check

Key = int | Tensor
Device = torch.device | str | int | None


def _wrap(value: int) -> int:
    """The int64 with the bits of ``value`` modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63


_GAMMA = _wrap(0x9E3779B97F4A7C15)
_MIX = ((30, _wrap(0xBF58476D1CE4E5B9)), (27, _wrap(0x94D049BB133111EB)))

# Different purposes, different streams: a derived key is not one of the words that its parent draws.
_DRAW, _FOLD, _REFINE = 0x243F6A8885A308D3, 0x13198A2E03707344, 0x24299F31D0082EFA


def _shift(z: Tensor, count: int) -> Tensor:
    # int64 shifts copy the sign bit in; the generator is defined on unsigned words.
    return (z >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place because temporaries are half of the cost: ``z`` must be fresh."""
    for count, factor in _MIX:
        z ^= _shift(z, count)
        z *= factor
    z ^= _shift(z, 31)
    return z


def _stream(start: Tensor, count: int) -> Int64[Tensor, " count"]:
    """The first ``count`` words of SplitMix64 seeded with ``start``."""
    steps = torch.arange(1, count + 1, device=start.device)
    return _mix(torch.add(start, steps, alpha=_GAMMA))


def _word(value: Key, device: Device) -> Tensor:
    if isinstance(value, Tensor):
        return value if device is None else value.to(device)
    return torch.full((), _wrap(value), dtype=torch.int64, device=device)


def _start(where: str, key: object, device: Device) -> Tensor:
    """Where the stream of a key begins: hashed, because users number their keys 0, 1, 2."""
    return _mix(_word(check.key(where, key), device) + _DRAW)


def _count(where: str, shape: object) -> int:
    if not isinstance(shape, Sequence):
        advice = "Pass for example x.shape, or (n,) for n numbers"
        raise check.refused_type(where, "shape to be a tuple of ints", check.describe(shape), advice)
    return math.prod(shape)


def _working(where: str, dtype: object) -> torch.dtype:
    """The dtype that the arithmetic runs in."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        advice = "Pass the dtype of the image, or use integers or bits"
        raise check.refused_type(where, "dtype to be a real floating dtype", str(dtype), advice)
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold_in(key: Key, index: Key) -> Int64[Tensor, ""]:
    r"""Return a new key from a key and a number, for example of a sample, a fold or a purpose.

    .. math:: \mathrm{mix}(\mathrm{mix}(key + c) + \gamma \cdot index)

    where mix is a bijection that flips each output bit with probability a half when any input bit flips.
    Distinct indices of one key always give distinct keys.

    Args:
        key: an int (taken modulo 2^64) or an int64 tensor of shape ().
        index: likewise; may be the mapped argument of a vmap.

    Returns:
        (key, index) -> key.

    Example:
        >>> keys = torch.func.vmap(lambda i: fold_in(7, i))(torch.arange(3))
        >>> [int(fold_in(7, i)) == int(k) for i, k in enumerate(keys)]
        [True, True, True]

    Reference: Steele, Lea and Flood, OOPSLA 2014; Salmon et al., SC 2011 (keys and counters).
    """
    check.key("fold_in", key)
    if (
        not isinstance(index, (int, Tensor))
        or isinstance(index, bool)
        or (isinstance(index, Tensor) and (index.dtype != torch.int64 or index.ndim))
    ):
        expected = "index to be an int or an int64 tensor of shape ()"
        advice = "Use torch.func.vmap for many indices"
        raise check.refused_type("fold_in", expected, check.describe(index), advice)
    device = next((v.device for v in (key, index) if isinstance(v, Tensor)), None)
    return _mix(_mix(_word(key, device) + _FOLD) + _word(index, device) * _GAMMA)


def bits(key: Key, shape: Sequence[int], device: Device = None) -> Int64[Tensor, "..."]:
    r"""Draw random words: all 64 bits of every int64 are random, the sign included.

    Args:
        key: an int or an int64 tensor of shape ().
        shape: of the result; a smaller draw is the beginning of a larger one.
        device: where to draw; by default where the key is.

    Returns:
        (key, shape) -> int64 tensor.

    Example:
        >>> bits(7, (2, 3)).shape
        torch.Size([2, 3])
        >>> torch.equal(bits(7, (2,)), bits(7, (9,))[:2])
        True

    Reference: Steele, Lea and Flood, OOPSLA 2014, figure 17.
    """
    return _stream(_start("bits", key, device), _count("bits", shape)).reshape(shape)


def uniform(
    key: Key, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: Device = None
) -> Float[Tensor, "..."]:
    r"""Draw numbers that are uniform on [0, 1).

    Multiples of 2^-24, of 2^-53 in float64. Shorter dtypes are rounded from float32; what would become 1
    becomes the number below it. One key gives the same numbers in all dtypes, up to their precision.

    Args:
        key: an int or an int64 tensor of shape ().
        shape: of the result.
        dtype: float16, bfloat16, float32 or float64.
        device: where to draw; by default where the key is.

    Returns:
        (key, shape) -> tensor.

    Example:
        >>> u = uniform(7, (10_000,))
        >>> bool((u >= 0).all() and (u < 1).all()), round(u.mean().item(), 1)
        (True, 0.5)

    Reference: Steele, Lea and Flood, OOPSLA 2014.
    """
    working = _working("uniform", dtype)
    digits = 53 if working == torch.float64 else 24
    words = _stream(_start("uniform", key, device), _count("uniform", shape))
    u = _shift(words, 64 - digits).to(working).mul_(2.0**-digits)
    if dtype != working:
        u = u.to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2)
    return u.reshape(shape)


def normal(
    key: Key, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: Device = None
) -> Float[Tensor, "..."]:
    r"""Draw numbers from the normal distribution of mean 0 and variance 1, by the Box-Muller transform.

    .. math:: z_{2p} = \sqrt{-2 \ln u_p} \cos t_p, \qquad z_{2p+1} = \sqrt{-2 \ln u_p} \sin t_p

    u has 40 bits and t has 24, from one word (53 each in float64): values end at 7.5 (8.7) and are never
    infinite. Shorter dtypes are rounded from float32. One key gives the same numbers in all dtypes, up to
    their precision.

    Args:
        key: an int or an int64 tensor of shape ().
        shape: of the result; a smaller draw is the beginning of a larger one.
        dtype: float16, bfloat16, float32 or float64.
        device: where to draw; by default where the key is.

    Returns:
        (key, shape) -> tensor.

    Example:
        >>> z = normal(7, (10_000,), dtype=torch.float64)
        >>> round(z.std().item(), 1)
        1.0
        >>> torch.equal(normal(7, (3,)), normal(7, (8,))[:3])
        True

    Reference: Box and Muller, Annals of Mathematical Statistics 29, 1958.
    """
    working, count = _working("normal", dtype), _count("normal", shape)
    start = _start("normal", key, device)
    words = _stream(start, (count + 1) // 2)
    radius, angle, radius_bits, angle_bits = words & (1 << 40) - 1, words >> 40, 40, 24
    if working == torch.float64:
        more = _stream(_mix(start + _REFINE), (count + 1) // 2)
        radius, angle = (radius << 13) | _shift(more, 51), (angle << 29) | (more & (1 << 29) - 1)
        radius_bits = angle_bits = 53
    # The half keeps u above 0. Where it is lost in rounding, u may become 1: the radius is then 0, not NaN.
    r = radius.to(working).add_(0.5).mul_(2.0**-radius_bits).log_().mul_(-2).sqrt_()
    t = angle.to(working).mul_(2 * math.pi * 2.0**-angle_bits)
    # A complex number is the pair side by side: six times as fast as stacking on a last axis of two.
    pairs = torch.view_as_real(torch.complex(t.cos().mul_(r), t.sin().mul_(r)))
    return pairs.reshape(-1)[:count].reshape(shape).to(dtype)


def integers(
    key: Key, shape: Sequence[int], *, low: int, high: int, device: Device = None
) -> Int64[Tensor, "..."]:
    r"""Draw whole numbers that are uniform on [low, high).

    By remainder: the probabilities of two numbers differ by at most 2^-63.

    Args:
        key: an int or an int64 tensor of shape ().
        shape: of the result.
        low: the least number.
        high: one more than the greatest number.
        device: where to draw; by default where the key is.

    Returns:
        (key, shape) -> int64 tensor.

    Example:
        >>> integers(7, (1000,), low=-1, high=2).unique().tolist()
        [-1, 0, 1]

    Reference: Knuth, The Art of Computer Programming 2, section 3.4.1.
    """
    whole = isinstance(low, int) and isinstance(high, int)
    if not whole or not -(2**63) <= low < high <= 2**63 or high - low >= 2**63:
        raise check.refused(
            "integers",
            "ints low < high that fit into int64",
            f"low={low!r}, high={high!r}",
            "high is excluded",
        )
    words = _stream(_start("integers", key, device), _count("integers", shape))
    return (_shift(words, 1) % (high - low)).add_(low).reshape(shape)


def signs(
    key: Key, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: Device = None
) -> Float[Tensor, "..."]:
    r"""Draw random signs: -1 or 1, each with probability a half (Rademacher).

    Args:
        key: an int or an int64 tensor of shape ().
        shape: of the result.
        dtype: float16, bfloat16, float32 or float64.
        device: where to draw; by default where the key is.

    Returns:
        (key, shape) -> tensor.

    Example:
        >>> signs(7, (100,)).unique().tolist()
        [-1.0, 1.0]

    Reference: Hutchinson, Communications in Statistics 18, 1989 (what they are for: traces and diagonals).
    """
    _working("signs", dtype)
    words = _stream(_start("signs", key, device), _count("signs", shape))
    return (words >> 63).mul_(2).add_(1).to(dtype).reshape(shape)


def permutation(key: Key, n: int, device: Device = None) -> Int64[Tensor, " n"]:
    r"""Return the numbers 0 to n - 1 in random order, by sorting random words.

    Every order has probability 1/n! but for ties between words, of probability below n^2 / 2^65, which keep
    their order.

    Args:
        key: an int or an int64 tensor of shape ().
        n: how many.
        device: where to draw; by default where the key is.

    Returns:
        (key, n) -> int64 tensor of shape (n,).

    Example:
        >>> sorted(permutation(7, 5).tolist())
        [0, 1, 2, 3, 4]

    Reference: Knuth, The Art of Computer Programming 2, section 3.4.2.
    """
    check.positive_count("permutation", "n", n)
    return _stream(_start("permutation", key, device), n).sort(stable=True).indices
