"""Colours of signed values: by default orange for, blue against, violet for the size; zero shows what lies under it.

In every scheme the two signs differ for every kind of colour vision, and each grows brighter with its value, so
that a print in grey still says where there is much.
"""

from typing import NamedTuple

import numpy as np

Ramp = tuple[tuple[int, int, int], ...]
_BLUE: Ramp = ((8, 48, 120), (20, 96, 196), (46, 158, 240), (190, 244, 255))
# From next to zero to the end of the scale; the viewer of the report takes its colours from here.
SCHEMES: dict[str, dict[str, Ramp]] = {
    "orange": {
        "positive": ((122, 28, 0), (214, 69, 4), (252, 141, 30), (255, 233, 120)),
        "negative": _BLUE,
        "size": ((72, 14, 110), (150, 40, 160), (222, 96, 176), (255, 222, 238)),
    },
    "red": {
        "positive": ((96, 0, 0), (178, 8, 12), (238, 44, 38), (255, 150, 128)),
        "negative": _BLUE,
        "size": ((96, 0, 0), (178, 8, 12), (238, 44, 38), (255, 150, 128)),
    },
}
NAMES = {"orange": "orange", "red": "red"}  # what is for the score, in words; what is against it is blue
SIZES = {"orange": "violet", "red": "red"}  # what has no sign
# Of outlines, in their order.
RINGS = (("green", "#5ee08a"), ("white", "#ffffff"), ("yellow", "#ffe14d"), ("pink", "#ff9ad5"))
BROKEN = (0.35, 0.62, 0.35)  # where a value is infinite
UNKNOWN = ((0.28, 0.28, 0.28), (0.58, 0.58, 0.58))  # the stripes where a value is NaN: it was not computed
# Lines on white: Okabe and Ito, Color Universal Design, 2008.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999900")


class Scale(NamedTuple):
    """What a colour stands for: kind is signed, positive, negative or size; limit is the end of the scale."""

    kind: str
    limit: float
    scheme: str = "orange"


def ramp(kind: str, share: np.ndarray, scheme: str = "orange") -> np.ndarray:
    """Return colours ``(..., 3)`` in [0, 1] for shares of the limit in [0, 1].

    >>> (255 * ramp("positive", np.array([1.0]))).tolist()
    [[255.0, 233.0, 120.0]]
    """
    steps = np.array(SCHEMES[scheme][kind], dtype=np.float64) / 255
    at = np.linspace(0, 1, len(steps))
    return np.stack([np.interp(share, at, steps[:, c]) for c in range(3)], axis=-1)


def cover(share: np.ndarray) -> np.ndarray:
    """Return how much of what lies below is hidden: nothing at zero, nearly all at the end of the scale.

    >>> cover(np.array([0.0, 1.0])).tolist()
    [0.0, 0.95]
    """
    return 0.95 * np.clip(share, 0, 1) ** 0.8


def stripes(shape: tuple[int, ...], wide: int) -> np.ndarray:
    """Return which pixels lie on the diagonal stripes, every second one so wide.

    >>> stripes((2, 4), 1).tolist()
    [[True, False, True, False], [False, True, False, True]]
    """
    found: np.ndarray = np.indices(shape[-2:]).sum(0) // wide % 2 == 0
    return found


def hatched(picture: np.ndarray, where: np.ndarray, thin: bool = False) -> np.ndarray:
    """Draw grey stripes over a picture ``(..., 3)`` where something is not known; thin ones leave it visible.

    >>> hatched(np.zeros((1, 4, 3)), np.array([[True, True, True, False]]))[0, :, 0].tolist()
    [0.58, 0.58, 0.28, 0.0]
    """
    light = stripes(where.shape, 2)
    if thin:
        light = light & stripes(where.shape, 1)
        return np.where((where & light)[..., None], UNKNOWN[1], picture)
    return np.where(where[..., None], np.where(light[..., None], UNKNOWN[1], UNKNOWN[0]), picture)


def blend(values: np.ndarray, scale: Scale, below: np.ndarray) -> np.ndarray:
    """Lay values in colour over a picture ``(..., 3)``; what is NaN is hatched.

    >>> blend(np.zeros((1, 1)), Scale("signed", 1.0), np.full((1, 1, 3), 0.5)).tolist()
    [[[0.5, 0.5, 0.5]]]
    """
    broken = ~np.isfinite(values)
    seen = np.where(broken, 0, values)
    if scale.kind == "positive":
        seen = np.maximum(seen, 0)
    if scale.kind == "negative":
        seen = np.minimum(seen, 0)
    share = np.clip(np.abs(seen) / (scale.limit or 1.0), 0, 1)
    if scale.kind == "size":
        colour = ramp("size", share, scale.scheme)
    else:
        up, down = (ramp(kind, share, scale.scheme) for kind in ("positive", "negative"))
        colour = np.where((seen < 0)[..., None], down, up)
    hidden = cover(share)[..., None]
    drawn = np.where(broken[..., None], BROKEN, below * (1 - hidden) + colour * hidden)
    return hatched(drawn, np.isnan(values)) if broken.any() else drawn
