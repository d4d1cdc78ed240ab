"""Networks that are equal as functions, but not as graphs.

A rebuilding is a function from a list of modules to such a list, of the same values, or None where there is nothing
to rebuild. It is applied along every chain of modules of a network, in branches too.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from esegeta.conformance.functions import BENDS, chosen
from esegeta.conformance.grammar import Functional, Join, Scored
from esegeta.conformance.networks import Network, OfModule
from esegeta.engine import check

Chain = list[Any]
Rebuild = Callable[[nn.Module, nn.Module | None], Chain | None]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MAXES = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_MEANS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_EXTREME = 0.5  # where the weights of a split convolution part


def _with(conv: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The same convolution with other weights, possibly of another number of channels, possibly with a bias."""
    made = copy.deepcopy(conv)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    made.out_channels = len(weight)
    return made


def _bias(conv: Any) -> Tensor:
    return torch.zeros_like(conv.weight[:, 0].flatten(1)[:, 0]) if conv.bias is None else conv.bias


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def folded_norm(this: Any, following: Any) -> Chain | None:
    """Return a convolution and the norm behind it as one convolution."""
    if not (isinstance(this, _CONVS) and isinstance(following, _NORMS)):
        return None
    scale, shift = _scale_and_shift(following)
    return [_with(this, this.weight * _column(scale, this.weight), _bias(this) * scale + shift)]


def merged_convolutions(this: Any, following: Any) -> Chain | None:
    """Return a convolution and the pointwise one behind it as one convolution."""
    if not (isinstance(this, _CONVS) and isinstance(following, _CONVS)) or this.groups > 1:
        return None
    if (
        following.weight[0, 0].numel() > 1
        or following.groups > 1
        or following.stride[0] > 1
        or following.padding[0]
    ):
        return None
    mix = following.weight.flatten(1)
    weight = torch.tensordot(mix, this.weight, 1)
    return [_with(this, weight, mix @ _bias(this) + _bias(following))]


class Sum(nn.Module):
    """The weighted sum of what several modules make of one input."""

    def __init__(self, *parts: nn.Module, weight: float | int = 1) -> None:
        super().__init__()
        self.parts, self.weight = nn.ModuleList(parts), weight

    def forward(self, x: Tensor) -> Tensor:
        """Add up."""
        total = sum(part(x) for part in self.parts)
        return total if self.weight == 1 else self.weight * total


class Side(nn.Module):
    """Channels that two modules make of one input, side by side."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate."""
        return torch.cat([part(x) for part in self.parts], 1)


def split_weights(this: Any, _: Any) -> Chain | None:
    """Return a convolution as the sum of one with the large weights and one with the small ones."""
    if not isinstance(this, _CONVS):
        return None
    large = this.weight.abs() > _EXTREME * this.weight.abs().amax()
    parts = (_with(this, this.weight * large, None), _with(this, this.weight * ~large, this.bias))
    return [Sum(*parts)]


def split_channels(this: Any, _: Any) -> Chain | None:
    """Return a convolution as one for each of its channels."""
    if not isinstance(this, _CONVS) or this.groups > 1 or len(this.weight) < 2:
        return None
    bias = _bias(this)
    return [Side(*(_with(this, this.weight[i : i + 1], bias[i : i + 1]) for i in range(len(this.weight))))]


class ByProducts(nn.Module):
    """A convolution as a sum of products: a matrix for each element of the kernel, times the moved image."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation

    def forward(self, x: Tensor) -> Tensor:
        """Move, multiply, add."""
        kernel = self.weight.shape[2:]
        around = [p for pad in reversed(self.padding) for p in (pad, pad)]
        x = functional.pad(x, around)
        reach = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
        total = torch.zeros((), dtype=x.dtype)
        for place in itertools.product(*map(range, kernel)):
            cut = x
            for axis, (i, d, r, s) in enumerate(zip(place, self.dilation, reach, self.stride, strict=True)):
                stop = cut.shape[axis + 2] - r + i * d
                cut = cut[(slice(None),) * (axis + 2) + (slice(i * d, stop, s),)]
            total = total + torch.einsum("oc,nc...->no...", self.weight[(..., *place)], cut)
        return total if self.bias is None else total + _column(self.bias, total[0])


def convolution_by_products(this: Any, _: Any) -> Chain | None:
    """Return a convolution as products of matrices."""
    if not isinstance(this, _CONVS) or this.groups > 1 or this.padding_mode != "zeros":
        return None
    return [ByProducts(this)]


def identity_convolution(this: Any, _: Any) -> Chain | None:
    """Return a convolution with a pointwise identity behind it."""
    if not isinstance(this, _CONVS):
        return None
    size = len(this.weight)
    eye = torch.eye(size, dtype=this.weight.dtype)
    plain = type(this)(size, size, 1, bias=False, device="meta")
    return [this, _with(plain, eye.reshape(size, size, *[1] * (this.weight.ndim - 2)), None)]


def norm_as_affine(this: Any, _: Any) -> Chain | None:
    """Return a batch norm as a factor and a summand for each channel."""
    if not isinstance(this, _NORMS):
        return None
    scale, shift = _scale_and_shift(this)
    return [Functional(lambda x: x * _column(scale, x[0]) + _column(shift, x[0]))]


def _is_rectifier(module: Any) -> bool:
    return isinstance(module, nn.ReLU) and not module.inplace


def scaled_rectifier(this: Any, _: Any) -> Chain | None:
    """Return the rectifier of the double, halved."""
    if not _is_rectifier(this):
        return None
    return [Functional(lambda x: 2 * x), nn.ReLU(), Functional(lambda x: x / 2)]


def _rectifier_by(how: str) -> Rebuild:
    def rebuild(this: Any, _: Any) -> Chain | None:
        return [Functional(BENDS[f"relu by {how}"].value)] if _is_rectifier(this) else None

    rebuild.__doc__ = f"The rectifier by {how}."
    return rebuild


def rectified_difference(this: Any, _: Any) -> Chain | None:
    """Return what comes out of a convolution as the difference of its positive and its negative part."""
    if not isinstance(this, _CONVS):
        return None
    return [this, Functional(lambda x: torch.relu(x) - torch.relu(-x))]


def softened_difference(this: Any, _: Any) -> Chain | None:
    """Return what comes out of a convolution as a difference of two smooth functions."""
    if not isinstance(this, _CONVS):
        return None
    return [this, Functional(lambda x: functional.silu(x) - functional.silu(-x))]


def rectifier_behind_pool(this: Any, following: Any) -> Chain | None:
    """Return the rectifier behind the max pool instead of before it."""
    return [following, this] if _is_rectifier(this) and isinstance(following, _MAXES) else None


def nested_max_pool(this: Any, _: Any) -> Chain | None:
    """Return the largest of the largest, axis by axis."""
    if not isinstance(this, _MAXES):
        return None

    def pool(x: Tensor) -> Tensor:
        for axis in range(2, x.ndim):
            even = 2 * (x.shape[axis] // 2)
            first, second = (x.movedim(axis, -1)[..., i:even:2].movedim(-1, axis) for i in (0, 1))
            x = torch.maximum(first, second)
        return x

    return [Functional(pool)] if this.stride in (2, (2,)) and this.kernel_size in (2, (2,)) else None


def mean_by_convolution(this: Any, _: Any) -> Chain | None:
    """Return the average pool as a mean along axis after axis."""
    if not isinstance(this, _MEANS):
        return None

    def pool(x: Tensor) -> Tensor:
        for axis in range(2, x.ndim):
            even = 2 * (x.shape[axis] // 2)
            first, second = (x.movedim(axis, -1)[..., i:even:2].movedim(-1, axis) for i in (0, 1))
            x = 0.5 * first + 0.5 * second
        return x

    return [Functional(pool)]


def gate_by_tanh(this: Any, _: Any) -> Chain | None:
    """Return a gate with the hyperbolic tangent: ``sigmoid(y) = (1 + tanh(y / 2)) / 2``."""
    if not (isinstance(this, Join) and this.how == "gate"):
        return None
    branch = this.branch

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = branch

        def forward(self, x: Tensor) -> Tensor:
            return x / 2 + x * torch.tanh(self.branch(x) / 2) / 2

    return [Gate()]


def sum_by_channels(this: Any, _: Any) -> Chain | None:
    """Return a skip that is added, as a mean of both stacked."""
    if not (isinstance(this, Join) and this.how == "add"):
        return None
    branch = this.branch

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = branch

        def forward(self, x: Tensor) -> Tensor:
            y = self.branch(x)
            return 2 * torch.stack([x, y.expand_as(x)]).mean(0)

    return [Stacked()]


def unrolled(this: Any, _: Any) -> Chain | None:
    """Return a module that is used twice as two modules."""
    if not (isinstance(this, Join) and this.how == "twice"):
        return None
    return [this.branch, copy.deepcopy(this.branch)]


def duplicated(this: Any, _: Any) -> Chain | None:
    """Return the mean of two copies."""
    if isinstance(this, Scored):
        return None
    return [Sum(this, copy.deepcopy(this), weight=0.5)]


class ByExponentials(nn.Module):
    """A softmax, or its logarithm, of two numbers as what it means."""

    def __init__(self, head: Scored) -> None:
        super().__init__()
        self.linear, self.kind = head.linear, head.kind

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B,C,*S) -> (B,)``."""
        y = self.linear(x.flatten(1))  # type: ignore[misc]
        apart = y[:, 0] - y[:, 1]
        return torch.sigmoid(apart) if self.kind == "softmax" else functional.logsigmoid(apart)


def softmax_by_sigmoid(this: Any, _: Any) -> Chain | None:
    """Return a softmax of two as a sigmoid of their difference."""
    return [ByExponentials(this)] if isinstance(this, Scored) and "softmax" in this.kind else None


@dataclass(frozen=True)
class Rebuilding:
    """A rebuilding, and layers that it applies to. ``kinked`` and ``curved``: it adds kinks, or curves."""

    rebuild: Rebuild
    layers: tuple[Any, ...] = ()
    heads: tuple[Any, ...] = ()
    kinked: bool = False
    curved: bool = False


REBUILDINGS: dict[str, Rebuilding] = {
    "folded norm": Rebuilding(folded_norm, ("conv", "batch norm")),
    "merged convolutions": Rebuilding(merged_convolutions, ("conv", "pointwise conv")),
    "split weights": Rebuilding(split_weights, ("conv",)),
    "split channels": Rebuilding(split_channels, ("conv",)),
    "convolution by products": Rebuilding(convolution_by_products, ("conv",)),
    "identity convolution": Rebuilding(identity_convolution, ("conv",)),
    "norm as affine": Rebuilding(norm_as_affine, ("batch norm",)),
    "scaled rectifier": Rebuilding(scaled_rectifier, ("relu",)),
    # Between two convolutions, so that slopes of both signs arrive at it.
    **{
        f"rectifier by {how}": Rebuilding(_rectifier_by(how), ("conv", "relu", "conv"))
        for how in ("clamp", "maximum", "where", "product", "abs", "function", "method", "negation")
    },
    "rectified difference": Rebuilding(rectified_difference, ("conv",), kinked=True),
    "softened difference": Rebuilding(softened_difference, ("conv",), curved=True),
    "rectifier behind pool": Rebuilding(rectifier_behind_pool, ("relu", "max pool")),
    "nested max pool": Rebuilding(nested_max_pool, ("max pool",)),
    "mean by convolution": Rebuilding(mean_by_convolution, ("average pool",)),
    "gate by tanh": Rebuilding(gate_by_tanh, (("gate", "conv"),)),
    "sum by channels": Rebuilding(sum_by_channels, (("add", "conv"),)),
    "unrolled": Rebuilding(unrolled, (("twice", "conv"),)),
    "duplicated": Rebuilding(duplicated, ("conv",)),
    "softmax by sigmoid": Rebuilding(softmax_by_sigmoid, (), ("softmax", "log softmax")),
}


def _along(chain: Sequence[Any], rebuild: Rebuild) -> tuple[Chain, int]:
    """Rebuild a chain from front to back, and the chains within; and how often that happened."""
    made: Chain = []
    hits, place = 0, 0
    while place < len(chain):
        this = chain[place]
        following = chain[place + 1] if place + 1 < len(chain) else None
        found = rebuild(this, following)
        if found is not None:
            hits += 1
            made += found
            place += 2 if following is not None and _takes_two(rebuild) else 1
            continue
        if isinstance(this, Join) and isinstance(this.branch, nn.Sequential):
            inner, more = _along(list(this.branch), rebuild)
            this, hits = Join(this.how, nn.Sequential(*inner), this.gate), hits + more
        made.append(this)
        place += 1
    return made, hits


def _takes_two(rebuild: Rebuild) -> bool:
    return rebuild in (folded_norm, merged_convolutions, rectifier_behind_pool)


def applies(network: Network, how: str) -> bool:
    """Return whether a network has what is rebuilt."""
    return _along(list(network.module), REBUILDINGS[how].rebuild)[1] > 0


@dataclass(frozen=True, repr=False)
class Rebuilt(OfModule):
    """A network in another form: the same function by another graph.

    >>> net = Network((1, 3), ("conv", "relu"))
    >>> same, x = Rebuilt(net, "scaled rectifier"), torch.ones(1, 3, dtype=torch.float64)
    >>> same, torch.allclose(same(x), net(x))
    (Rebuilt(Network((1, 3), layers=('conv', 'relu')), 'scaled rectifier'), True)
    """

    network: Network
    how: str

    module: ClassVar[Any]

    def __post_init__(self) -> None:
        chosen("Rebuilt", "how", self.how, REBUILDINGS)
        chain, hits = _along(list(copy.deepcopy(self.network.module)), REBUILDINGS[self.how].rebuild)
        if not hits:
            raise check.refused(
                "Rebuilt", f"a network that {self.how!r} applies to", f"{self.network}", "Choose another"
            )
        net = nn.Sequential(*chain).eval().requires_grad_(False)
        object.__setattr__(self, "module", net)

    @property
    def shape(self) -> tuple[Any, ...]:
        """``(C,*S)`` of an example."""
        return self.network.shape

    @property
    def degree(self) -> int | None:
        """That of the formula."""
        known = REBUILDINGS[self.how]
        return None if known.kinked or known.curved else self.network.degree

    @property
    def piecewise_linear(self) -> bool:
        """Return whether the formula is piecewise linear."""
        return self.network.piecewise_linear and not REBUILDINGS[self.how].curved

    @property
    def smooth(self) -> bool:
        """Return whether the formula is smooth."""
        return self.network.smooth and not REBUILDINGS[self.how].kinked

    @property
    def operations(self) -> int:
        """About how many operations a value takes."""
        return 2 * self.network.operations + 8

    def majorant(self, x: Tensor) -> Tensor:
        """Return four times that of the network: differences double what is in them, layer by layer."""
        convolutions = sum("conv" in name for name in self.network.operators)
        known = REBUILDINGS[self.how]
        return (3.0**convolutions if known.kinked or known.curved else 4.0) * (self.network.majorant(x) + 1)

    def to(self, dtype: str) -> "Rebuilt":
        """Return the same in another precision."""
        return Rebuilt(self.network.to(dtype), self.how)
