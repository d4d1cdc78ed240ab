"""The operators that random networks are made of, each by a name, and how much rounding grows in them.

An operator is built for the shape of one example and has no weights yet. Every one is small, so that a network
of five of them runs in a millisecond.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from esegeta.conformance.functions import BENDS

Shape = tuple[Any, ...]
WIDTH = 2  # channels behind a convolution
WIDE = 8  # and behind one that is wide
SOFT = 0.25  # what norms add to variances: so their slopes stay below two


@dataclass(frozen=True)
class Operator:
    """How an operator is made for a shape, and what is known of it as a function.

    degree: by how much it multiplies the degree of a polynomial, None if it leaves polynomials; family: for
    filters; fits: whether it applies to a shape.
    """

    build: Callable[[Shape], nn.Module]
    family: str
    degree: int | None = None
    piecewise_linear: bool = False
    smooth: bool = True
    fits: Callable[[Shape], bool] = lambda _: True


def of(home: Any, name: str, shape: Shape) -> Any:
    """Return the class or function of a family for this number of axes."""
    return getattr(home, f"{name}{len(shape) - 1}d")


def _empty(cls: Any, *args: Any, **kwargs: Any) -> nn.Module:
    # Nothing is drawn at its making: the global random numbers are the user's.
    return skip_init(cls, *args, dtype=torch.float64, **kwargs)


# --- spellings ----------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """A function of a batch as a module of one line. It is ``steep`` times as steep as the identity at most."""

    def __init__(self, fn: Callable[[Tensor], Tensor], steep: float | int = 1, at_zero: float = 0.0) -> None:
        super().__init__()
        self.fn, self.steep, self.at_zero = fn, steep, at_zero

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function."""
        return self.fn(x)

    def majorant(self, u: Tensor) -> Tensor:
        """Return a size that neither values nor slopes times inputs exceed, for u not negative."""
        return self.steep * u + self.at_zero


class FunctionalPool(nn.Module):
    """The largest of each two by two, by ``torch.nn.functional``."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool."""
        return of(functional, "max_pool", x.shape[1:])(x, 2)


class Square(nn.Module):
    """The square of each element."""

    def forward(self, x: Tensor) -> Tensor:
        """Square each element."""
        return x * x

    def majorant(self, u: Tensor) -> Tensor:
        """Return twice the square: with the slope."""
        return 2 * u * u


class Channels(nn.Module):
    """A module that wants the channels last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Move the channels to the end, apply the module, and move them back."""
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)

    def majorant(self, u: Tensor) -> Tensor:
        """Move the channels to the end and back."""
        return majorant(self.inner, u.movedim(1, -1)).movedim(-1, 1)


class Convolution(nn.Module):
    """A convolution by ``torch.nn.functional``, with weights of its own."""

    def __init__(self, shape: Shape, channels: int) -> None:
        super().__init__()
        axes = len(shape) - 1
        self.weight = nn.Parameter(torch.zeros(channels, shape[0], *[3] * axes, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=torch.float64))
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        return getattr(functional, f"conv{self.axes}d")(x, self.weight, self.bias, padding=1)

    def majorant(self, u: Tensor) -> Tensor:
        """Convolve with the sizes of the weights."""
        conv = getattr(functional, f"conv{self.axes}d")
        return conv(u, self.weight.abs(), self.bias.abs(), padding=1)


class Unfolded(nn.Module):
    """A convolution as products of a matrix with shifted copies of the image."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shifts, self.axis = (-1, 0, 1), 2
        self.weight = nn.Parameter(torch.zeros(WIDTH, 3 * shape[0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Gather three neighbours along the first axis, and mix them."""
        return self._mix(x, self.weight)

    def _mix(self, x: Tensor, weight: Tensor) -> Tensor:
        near = torch.cat([x.roll(s, self.axis) for s in self.shifts], 1)
        return (weight @ near.flatten(2)).reshape(len(x), WIDTH, *x.shape[2:])

    def majorant(self, u: Tensor) -> Tensor:
        """Mix with the sizes of the weights."""
        return self._mix(u, self.weight.abs())


class Attention(nn.Module):
    """Every place sees every other one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        c = shape[0]
        self.qkv = _empty(nn.Linear, c, 3 * c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the softmax of products, times values, to the input."""
        q, k, v = self.qkv(x.flatten(2).mT).chunk(3, -1)
        seen = (q @ k.mT / 2).softmax(-1) @ v
        return x + seen.mT.reshape(x.shape)

    def majorant(self, u: Tensor) -> Tensor:
        """Add the change of the values and theirs times the change of the products."""
        weight: Any = self.qkv.weight
        sizes = u.flatten(2).mT @ weight.abs().mT
        q, k, v = (t.amax() for t in sizes.chunk(3, -1))
        return u + v + 2 * v * (u.shape[1] * q * k)


class Join(nn.Module):
    """What a branch adds to what was there, in one way or another."""

    def __init__(self, how: str, branch: nn.Module, gate: nn.Module | None) -> None:
        super().__init__()
        self.how, self.branch, self.gate = how, branch, gate

    def forward(self, x: Tensor) -> Tensor:
        """Return both ways, and together."""
        y = self.branch(x)
        match self.how:
            case "add":
                return x + y
            case "subtract":
                return y - x
            case "concatenate":
                return torch.cat([x, y], 1)
            case "twice":
                return self.branch(y)
            case "larger":
                return torch.maximum(x, y)
            case "times":
                return x * y
            case "squeeze":
                return x * torch.sigmoid(y.mean(tuple(range(2, y.ndim)), keepdim=True))
        return x * torch.sigmoid(y)

    def majorant(self, u: Tensor) -> Tensor:
        """Add up sizes; multiply those of products, with one for either slope."""
        v = majorant(self.branch, u)
        match self.how:
            case "concatenate":
                return torch.cat([u, v], 1)
            case "twice":
                return majorant(self.branch, v)
            case "larger":
                return torch.maximum(u, v)
            case "times":
                return 2 * u * v
            case "squeeze":
                return u * (1 + v.mean(tuple(range(2, v.ndim)), keepdim=True) / 4)
            case "gate":
                return u * (1 + v / 4)
        return u + v


# --- how large things can be ---------------------------------------------------------------------------------

_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm)
_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _of_batch_norm(norm: Any, u: Tensor) -> Tensor:
    sizes = {k: v.abs() for k, v in norm.named_parameters()} | {"running_var": norm.running_var}
    shift = norm.running_mean.abs().reshape(-1, *[1] * (u.ndim - 2))
    centred = {"running_mean": torch.zeros_like(norm.running_mean)}
    return torch.func.functional_call(norm, sizes | centred, (u + shift,))


def majorant(module: Any, u: Tensor) -> Tensor:
    """Return what neither a value inside a module, nor a slope times its input, exceeds for inputs of size ``u``.

    It is the network with the sizes of its weights, in which nothing cancels. Rounding errors, relative to
    it, are those of single operations.

    >>> line = nn.Linear(2, 1, bias=False)
    >>> _ = line.weight.data.copy_(torch.tensor([[1., -1.]]))
    >>> line(torch.ones(1, 2)).item(), majorant(line, torch.ones(1, 2)).item()
    (0.0, 2.0)
    """
    own = getattr(module, "majorant", None)
    if own is not None:
        return own(u)
    if isinstance(module, nn.Sequential):
        return functools.reduce(lambda v, inner: majorant(inner, v), module, u)
    if isinstance(module, _BATCH):
        return _of_batch_norm(module, u)
    if isinstance(module, _NORMS):
        axes = tuple(range(2, u.ndim)) if not isinstance(module, nn.LayerNorm) else (-1,)
        axes = (1, *axes) if isinstance(module, nn.GroupNorm) else axes
        count = math.prod(u.shape[a] for a in axes)
        mean, power = u.mean(axes, keepdim=True), u.square().mean(axes, keepdim=True).sqrt()
        gain = 1.0 if module.weight is None else float(module.weight.abs().amax())
        shift = 0.0 if module.bias is None else float(module.bias.abs().amax())
        return gain / math.sqrt(SOFT) * (u + mean + math.sqrt(count) * power) + shift
    if any(True for _ in module.parameters(recurse=False)):
        weights = {k: v.abs() for k, v in module.named_parameters()}
        return torch.func.functional_call(module, weights, (u,))
    if isinstance(module, ACTIVATIONS):
        return 1.2 * u + module(torch.zeros((), dtype=u.dtype)).abs()
    return module(u)  # pools and the like: what is larger stays larger


ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid, nn.Tanh)


# --- the table -------------------------------------------------------------------------------------------------


def _divides(shape: Shape) -> bool:
    return all(s % 2 == 0 for s in shape[1:])


def _large(shape: Shape) -> bool:
    return all(s >= 2 for s in shape[1:])


def _small(shape: Shape) -> bool:
    return math.prod(shape[1:]) <= 64


def _conv(**settings: Any) -> Callable[[Shape], nn.Module]:
    def build(shape: Shape) -> nn.Module:
        given = {"kernel_size": 3, **settings}
        width = given.pop("width", WIDTH)
        width = shape[0] if given.pop("depthwise", False) else width
        groups = math.gcd(shape[0], width) if given.pop("groups", False) else 1
        kind = "ConvTranspose" if given.pop("transposed", False) else "Conv"
        return _empty(of(nn, kind, shape), shape[0], width, groups=groups, **given)

    return build


def _affine(build: Callable[[Shape], nn.Module], family: str, **known: Any) -> Operator:
    return Operator(build, family, 1, True, **known)


def _kinked(build: Callable[[Shape], nn.Module], family: str, **known: Any) -> Operator:
    return Operator(build, family, None, True, False, **known)


def _spelled(name: str) -> Operator:
    bend = BENDS[name]
    steep, zero = bend.steep or 1.0, float(bend.value(torch.zeros(())).abs())
    build = lambda _: Functional(bend.value, steep, zero)
    return Operator(build, "activation", None, bend.piecewise_linear, bend.smooth)


def _norm(build: Callable[[Shape], nn.Module]) -> Operator:
    return Operator(build, "norm", fits=lambda shape: math.prod(shape[1:]) > 1)


def _mode(shape: Shape) -> str:
    return ("linear", "bilinear", "trilinear")[len(shape) - 2]


OPERATORS: dict[str, Operator] = {
    "conv": _affine(_conv(padding=1), "convolution"),
    "conv without bias": _affine(_conv(padding=1, bias=False), "convolution"),
    "pointwise conv": _affine(_conv(kernel_size=1), "convolution"),
    "valid conv": _affine(_conv(kernel_size=2), "convolution", fits=_large),
    "strided conv": _affine(_conv(kernel_size=2, stride=2), "convolution", fits=_large),
    "dilated conv": _affine(_conv(padding=2, dilation=2), "convolution"),
    "wide conv": _affine(_conv(padding=1, width=WIDE), "convolution", fits=_small),
    "grouped conv": _affine(_conv(padding=1, groups=True), "convolution"),
    "depthwise conv": _affine(_conv(padding=1, groups=True, depthwise=True), "convolution"),
    "circular conv": _affine(_conv(padding=1, padding_mode="circular"), "convolution"),
    "transposed conv": _affine(_conv(kernel_size=2, stride=2, transposed=True), "convolution", fits=_small),
    "functional conv": _affine(lambda shape: Convolution(shape, WIDTH), "convolution"),
    "unfolded conv": _affine(Unfolded, "convolution"),
    "batch norm": _affine(lambda shape: _empty(of(nn, "BatchNorm", shape), shape[0], eps=SOFT), "norm"),
    "instance norm": _norm(
        lambda shape: _empty(of(nn, "InstanceNorm", shape), shape[0], eps=SOFT, affine=True)
    ),
    "group norm": _norm(lambda shape: _empty(nn.GroupNorm, 1, shape[0], eps=SOFT)),
    "layer norm": Operator(
        lambda shape: Channels(_empty(nn.LayerNorm, shape[0], eps=SOFT)),
        "norm",
        fits=lambda shape: shape[0] > 1,
    ),
    "relu": _kinked(lambda _: nn.ReLU(), "activation"),
    "relu in place": _kinked(
        lambda _: nn.Sequential(Functional(lambda x: 1 * x), nn.ReLU(inplace=True)), "activation"
    ),
    "functional relu": _spelled("relu"),
    "method relu": _kinked(lambda _: Functional(lambda x: x.relu()), "activation"),
    "leaky relu": _kinked(lambda _: nn.LeakyReLU(0.25), "activation"),
    "relu6": _kinked(lambda _: nn.ReLU6(), "activation"),
    **{
        f"relu by {how}": _spelled(f"relu by {how}")
        for how in ("clamp", "maximum", "where", "product", "abs")
    },
    "abs": _spelled("abs"),
    "gelu": Operator(lambda _: nn.GELU(), "activation"),
    "silu": Operator(lambda _: nn.SiLU(), "activation"),
    "softplus": Operator(lambda _: nn.Softplus(), "activation"),
    "sigmoid": Operator(lambda _: nn.Sigmoid(), "activation"),
    "tanh": Operator(lambda _: nn.Tanh(), "activation"),
    "functional gelu": _spelled("gelu"),
    "functional softplus": _spelled("softplus"),
    "sine": _spelled("sine"),
    "square": Operator(lambda _: Square(), "activation", 2),
    "max pool": _kinked(lambda shape: of(nn, "MaxPool", shape)(2), "pool", fits=_large),
    "overlapping max pool": _kinked(lambda shape: of(nn, "MaxPool", shape)(2, stride=1), "pool", fits=_large),
    "functional max pool": _kinked(lambda _: FunctionalPool(), "pool", fits=_large),
    "average pool": _affine(lambda shape: of(nn, "AvgPool", shape)(2), "pool", fits=_large),
    "adaptive average pool": _affine(lambda shape: of(nn, "AdaptiveAvgPool", shape)(2), "pool", fits=_large),
    "upsample": _affine(lambda _: nn.Upsample(scale_factor=2), "upsampling", fits=_small),
    "linear upsample": _affine(
        lambda shape: nn.Upsample(scale_factor=2, mode=_mode(shape)), "upsampling", fits=_small
    ),
    "attention": Operator(Attention, "attention", fits=_small),
}

Family = Literal["convolution", "norm", "activation", "pool", "upsampling", "attention", "join"]


@dataclass(frozen=True)
class Joining:
    """How a branch comes back, and what is known of that."""

    piecewise_linear: bool = True
    smooth: bool = True
    degree: int | None = 1


JOINS: dict[str, Joining] = {
    "add": Joining(),
    "subtract": Joining(),
    "concatenate": Joining(),
    "twice": Joining(),  # one module, used two times
    "larger": Joining(smooth=False, degree=None),
    "times": Joining(piecewise_linear=False, degree=2),
    "gate": Joining(piecewise_linear=False, degree=None),
    "squeeze": Joining(piecewise_linear=False, degree=None),
}

HEADS: dict[str, Joining] = {
    "sum": Joining(),
    "mean": Joining(),
    "linear": Joining(),
    "pooled linear": Joining(),
    "softmax": Joining(piecewise_linear=False, degree=None),
    "log softmax": Joining(piecewise_linear=False, degree=None),
}


class Scored(nn.Module):
    """What turns the last activation into one number for each example."""

    def __init__(self, kind: str, shape: Shape) -> None:
        super().__init__()
        self.kind = kind
        inputs = shape[0] if kind == "pooled linear" else math.prod(shape)
        outputs = {"linear": 1, "pooled linear": 1, "softmax": 2, "log softmax": 2}.get(kind)
        self.linear = None if outputs is None else _empty(nn.Linear, inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B,C,*S) -> (B,)``."""
        if self.linear is None:
            return x.flatten(1).sum(1) if self.kind == "sum" else x.flatten(1).mean(1)
        seen = x.flatten(2).mean(2) if self.kind == "pooled linear" else x.flatten(1)
        y = self.linear(seen)
        if self.kind == "softmax":
            y = functional.softmax(y, 1)
        elif self.kind == "log softmax":
            y = functional.log_softmax(y, 1)
        return y[:, 0]

    def majorant(self, u: Tensor) -> Tensor:
        """Return a size that no value exceeds: softmax is no steeper than its input, its logarithm twice."""
        if self.linear is None:
            return self(u)
        seen = u.flatten(2).mean(2) if self.kind == "pooled linear" else u.flatten(1)
        y = majorant(self.linear, seen)
        return y[:, 0] if y.shape[1] == 1 else y.sum(1) + 1


def after(module: nn.Module, shape: Sequence[Any]) -> Shape:
    """Return the shape behind a module."""
    return tuple(module(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
