"""The sizes of images that a network takes: found by trying it, mostly without values."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta.engine.execution import execution
from esegeta.engine.memory import without_values

# U-Nets take multiples of a power of two; windows of attention and patches of transformers bring other factors.
MULTIPLES = (
    2,
    4,
    8,
    16,
    32,
    64,
    3,
    6,
    12,
    24,
    48,
    96,
    5,
    10,
    20,
    40,
    80,
    7,
    14,
    28,
    56,
    112,
    9,
    36,
    128,
    224,
)
# As many are tried in earnest, where a network cannot be run without values.
_FEW = 6

Model = Callable[[Tensor], Any]
Size = tuple[int, ...]
Answers = Callable[[Size], Size | None]


def padded(size: Sequence[int], multiple: Sequence[int]) -> Size:
    """Return a size after padding to multiples.

    >>> padded((20, 7), (8, 2))
    (24, 8)
    """
    return tuple(-(-n // m) * m for n, m in zip(size, multiple, strict=True))


def multiples(model: Model, x: Tensor) -> Size | None:
    """Return for each axis the multiple to which an image has to be padded, all 1 if it has not.

    The first of ``MULTIPLES`` that helps is made smaller on each axis for as long as it does. An answer that has a
    grid has to lie on that of the image; of a network that never gives such a one it is enough that it answers.

    Args:
        model: the network.
        x: an image.

    Returns:
        One number for each axis; None if no padding helps.

    Example:
        >>> from esegeta import from_module, zoo
        >>> net = from_module(zoo.small_unet(2))
        >>> multiples(net, torch.zeros(1, 6, 7)), multiples(net, torch.zeros(3, 6, 7))
        ((2, 2), None)
    """
    size = tuple(x.shape[1:])
    without = _search(_answers(model, x, values=False), size, MULTIPLES)
    return without or _search(_answers(model, x, values=True), size, MULTIPLES[:_FEW])


def _answers(model: Model, x: Tensor, *, values: bool) -> Answers:
    """Return a function from a size to the shape of the network's answer, None where it does not take that size."""

    @functools.cache
    def shape(size: Size) -> Size | None:
        with _quiet(), execution(progress=False), torch.no_grad():
            image = x.new_zeros((len(x), *size)) if values else x.new_empty(()).expand(len(x), *size)
            try:
                found = model(image) if values else without_values(model, image)
                return tuple(found.shape)
            except MemoryError:
                raise
            except Exception:  # networks refuse sizes in every way
                return None

    return shape


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings about a refused size off the terminal: here it is an answer, not an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _search(answers: Answers, size: Size, many: Sequence[int]) -> Size | None:
    axes = len(size)

    def on_grid(shape: Size) -> bool:
        found = answers(shape)
        return found is not None and (len(found) != 1 + axes or found[1:] == shape)

    def steps_by(multiple: Size) -> bool:
        """Whether it is the network's own multiple: 64 is one of 4 as well, and 68 shows that 4 are too few."""
        shape = padded(size, multiple)
        return on_grid(shape) and on_grid(tuple(n + m for n, m in zip(shape, multiple, strict=True)))

    if on_grid(size):
        return (1,) * axes
    tried = [(n,) * axes for n in many]
    right = next(filter(steps_by, tried), None)
    if right is None:  # of a network of one size
        right = next((multiple for multiple in tried if on_grid(padded(size, multiple))), None)
    if right is None:
        ones = [(1,) * axes, *tried]
        return next((multiple for multiple in ones if answers(padded(size, multiple)) is not None), None)
    for axis, multiple in enumerate(right):  # depth is often pooled less than the plane, or not at all
        fewer = [(*right[:axis], n, *right[axis + 1 :]) for n in range(1, multiple) if multiple % n == 0]
        smaller = [one for one in fewer if padded(size, one) != padded(size, right)]
        right = next(filter(steps_by, smaller), right)
    return right
