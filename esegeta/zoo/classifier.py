"""A small classifier in one, two or three dimensions."""

from collections import OrderedDict

from torch import nn

from esegeta._registry import network
from esegeta.engine import check
from esegeta.zoo.drawn import drawn


@network(family="drawn")
def small_classifier(
    ndim: int = 2, channels: int = 1, classes: int = 3, width: int = 8, key: int = 0
) -> nn.Module:
    """Return a classifier with random weights, in eval mode: the structure that class activation maps were made for.

    Two times convolution, batch norm and ReLU with a max-pool between; global average; linear. Names for
    layer access: ``conv_a, norm_a, relu_a, pool, conv_b, norm_b, relu_b, average, flatten, linear``.

    Args:
        ndim: number of spatial axes, 1 to 3.
        channels: of the input.
        classes: length of the output.
        width: channels after the first convolution; twice as many after the second.
        key: the same key gives the same weights; the global random state is not used.

    Returns:
        A float32 module from ``(N, channels, *S)`` to logits ``(N, classes)``.

    Example:
        >>> import torch
        >>> small_classifier(ndim=2)(torch.zeros(4, 1, 8, 10)).shape
        torch.Size([4, 3])

    Reference:
        Zhou et al. 2016, Learning deep features for discriminative localization, https://arxiv.org/abs/1512.04150.
    """
    sizes = {"ndim": ndim, "channels": channels, "classes": classes, "width": width}
    for name, value in sizes.items():
        check.positive_count("small_classifier", name, value)
    if ndim > 3:
        raise check.refused("small_classifier", "ndim to be 1, 2 or 3", str(ndim), "Choose one of them")

    def layer(kind: str) -> type[nn.Module]:
        return getattr(nn, f"{kind}{ndim}d")

    return drawn(
        lambda: nn.Sequential(
            OrderedDict(
                conv_a=layer("Conv")(channels, width, 3, padding=1),
                norm_a=layer("BatchNorm")(width),
                relu_a=nn.ReLU(),
                pool=layer("MaxPool")(2),
                conv_b=layer("Conv")(width, 2 * width, 3, padding=1),
                norm_b=layer("BatchNorm")(2 * width),
                relu_b=nn.ReLU(),
                average=layer("AdaptiveAvgPool")(1),
                flatten=nn.Flatten(),
                linear=nn.Linear(2 * width, classes),
            )
        ),
        key,
    )
