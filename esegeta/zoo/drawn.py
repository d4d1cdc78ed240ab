"""Weights by a key, for networks that nobody trained."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)


def drawn(build: Callable[[], Net], key: int) -> Net:
    """Return the module that ``build`` makes, in eval mode, with float32 weights and statistics by the key alone.

    Weights have a variance of 2 by the size of one kernel, so that activations neither vanish nor explode.
    Norms get scales, shifts and running statistics that differ from channel to channel: none is the identity.

    >>> net = drawn(lambda: nn.BatchNorm1d(2), key=0)
    >>> bool((net.running_mean != 0).all() and (net.running_var != 1).all())
    True
    """
    with torch.device("meta"):  # draws nothing, so the global random state stays as it is
        net = build()
    net = net.float().to_empty(device="cpu")
    source = torch.Generator().manual_seed(key)

    def normal(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=source, dtype=torch.float32, device="cpu")

    with torch.no_grad():
        for name, value in net.state_dict().items():
            kind = name.rpartition(".")[2]
            if kind == "num_batches_tracked":
                value.fill_(1)
            elif kind == "running_var":
                value.copy_(normal(value, 0.3).exp())
            elif kind == "weight" and value.ndim == 1:  # the scale of a norm
                value.copy_(1 + normal(value, 0.2))
            elif kind == "weight":
                value.copy_(normal(value, (2 / value[0].numel()) ** 0.5))
            else:  # biases, shifts and running means
                value.copy_(normal(value, 0.2))
    return net.eval()
