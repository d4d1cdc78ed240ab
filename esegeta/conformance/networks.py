"""Random networks from a grammar of operators, with weights that their seed decides.

A network prints as the call that rebuilds it:

>>> net = Network((1, 4), ("conv", "relu", ("add", "conv")))
>>> net
Network((1, 4), layers=('conv', 'relu', ('add', 'conv')))
>>> net(torch.tensor([[0., 1., 0., 0.]], dtype=torch.float64)).item()
38.0
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from esegeta.conformance.functions import call, chosen
from esegeta.conformance.grammar import HEADS, JOINS, OPERATORS, Join, Scored, Shape, after, majorant
from esegeta.engine import check
from esegeta.engine.network import ModuleModel
from esegeta.models import from_module

Layer = Any  # the name of an operator, or (join, *layers)
OFF = 2.0**-10  # what biases are off the grid of weights: so no activation is exactly at a kink
TYPES = {"float64": torch.float64, "float32": torch.float32}


class OfModule:
    """A function of one example that runs a module of batches, and prints as the call that rebuilds it."""

    module: ClassVar[Any]

    def __repr__(self) -> str:
        return call(self)

    @cached_property
    def _model(self) -> ModuleModel:
        return from_module(self.module)

    def __call__(self, x: Tensor) -> Tensor:
        """What the module makes of one example."""
        return self._model(x)


@dataclass(frozen=True, repr=False)
class Network(OfModule):
    """A network with one number for each example, as a score: ``(C,*S) -> ()``.

    Args:
        shape: ``(C,*S)`` of an example, with one, two or three axes.
        layers: names of ``grammar.OPERATORS``, and tuples ``(join, *layers)`` of a name in
            ``grammar.JOINS`` and what its branch consists of. ``("twice", "conv")`` uses one module twice.
        head: a name in ``grammar.HEADS``.
        seed: of the weights. They are quarters, times a power of two where many are summed; biases are small, and off
            that grid, so that nothing lies exactly on a kink. With seed 0 weights are one, biases zero.
        redrawn: another seed, for the later half of the parameters.
        dtype: ``"float64"`` or ``"float32"``.

    ``module`` is the network itself, ``(B,C,*S) -> (B,)``.
    """

    shape: Shape
    layers: tuple[Any, ...] = ()
    head: str = "sum"
    seed: int = 0
    redrawn: int | None = None
    dtype: str = "float64"

    module: ClassVar[Any]

    def __post_init__(self) -> None:
        chosen("Network", "head", self.head, HEADS)
        chosen("Network", "dtype", self.dtype, TYPES)
        body, shape = _body(self.layers, self.shape)
        net = nn.Sequential(*body, Scored(self.head, shape)).eval().requires_grad_(False)
        tensors = [
            *net.named_parameters(),
            *((k, b) for k, b in net.named_buffers() if b.is_floating_point()),
        ]
        parameters = sum(1 for _ in net.parameters())
        for place, (name, p) in enumerate(tensors):
            upper = self.redrawn is not None and parameters // 2 <= place < parameters
            p.copy_(_weights(name, p.shape, f"{self.redrawn} again" if upper else self.seed, place))
        object.__setattr__(self, "module", net.to(TYPES[self.dtype]))

    @property
    def operators(self) -> tuple[Any, ...]:
        """The names of all operators and joins, in order."""
        return tuple(_names(self.layers))

    @cached_property
    def _known(self) -> list[Any]:
        return [OPERATORS.get(n) or JOINS[n] for n in self.operators] + [HEADS[self.head]]

    @property
    def piecewise_linear(self) -> bool:
        """Return whether all operators are piecewise linear."""
        return all(k.piecewise_linear for k in self._known)

    @property
    def smooth(self) -> bool:
        """Return whether all operators are smooth."""
        return all(k.smooth for k in self._known)

    @property
    def degree(self) -> int | None:
        """As a polynomial, None if it is none."""
        if any(k.degree is None for k in self._known):
            return None
        return _degree(self.layers)

    @property
    def has_upper(self) -> bool:
        """Return whether there are parameters to redraw."""
        return any(True for _ in self.module.parameters())

    @cached_property
    def operations(self) -> int:
        """About how many operations one element of an activation takes, added up over the network."""
        longest = [p[0].numel() for p in self.module.parameters() if p.ndim > 1]
        twice = 2 ** self.operators.count("twice")
        return twice * (sum(2 * n for n in longest) + 8 * (len(self.operators) + 1)) + math.prod(self.shape)

    def majorant(self, x: Tensor) -> Tensor:
        """Return a size that no value inside, and no product of a slope and its input, exceeds."""
        u = x.detach().abs().to(TYPES[self.dtype])
        return majorant(self.module, u[None]).squeeze(0)

    def upper(self, redrawn: int) -> "Network":
        """Return the same with another later half of the parameters."""
        return replace(self, redrawn=redrawn)

    def to(self, dtype: str) -> "Network":
        """Return the same in another precision."""
        return replace(self, dtype=dtype)


def _names(layers: Sequence[Any]) -> Iterator[str]:
    for layer in layers:
        if isinstance(layer, tuple):
            yield layer[0]
            yield from _names(layer[1:])
        else:
            yield layer


def _degree(layers: Sequence[Any], before: int = 1) -> int:
    for layer in layers:
        if isinstance(layer, str):
            before *= OPERATORS[layer].degree or 1
            continue
        inside = _degree(layer[1:], before)
        if layer[0] == "twice":
            inside = _degree(layer[1:], inside)
        before = before + inside if layer[0] == "times" else max(before, inside)
    return before


def fits(layer: Layer, shape: Shape) -> Shape | None:
    """Return the shape behind a layer, None where it cannot be."""
    try:
        return _layer(layer, shape)[1]
    except ValueError:
        return None


def _body(layers: Sequence[Any], shape: Shape) -> tuple[list[Any], Shape]:
    made = []
    for layer in layers:
        module, shape = _layer(layer, shape)
        made.append(module)
    return made, shape


def _layer(layer: Layer, shape: Shape) -> tuple[nn.Module, Shape]:
    if isinstance(layer, str):
        chosen("Network", "an operator", layer, OPERATORS)
        if not OPERATORS[layer].fits(shape):
            raise _misfit(layer, shape)
        module = OPERATORS[layer].build(shape)
        return module, after(module, shape)
    how, inner = layer[0], layer[1:]
    chosen("Network", "a join", how, JOINS)
    branch, end = _body(inner, shape)
    if how == "concatenate" and end[1:] == shape[1:]:
        return Join(how, nn.Sequential(*branch), None), (shape[0] + end[0], *end[1:])
    if (
        how == "concatenate"
        or end[1:] != shape[1:]
        or (how == "twice" and end != shape)
        or end[0] not in (1, shape[0])
    ):
        raise _misfit(layer, shape)
    return Join(how, nn.Sequential(*branch), None), shape


def _misfit(layer: Layer, shape: Shape) -> ValueError:
    return check.refused(
        "Network", "layers that fit each other", f"{layer!r} behind shape {shape}", "Choose another"
    )


def _weights(name: str, shape: Sequence[Any], seed: int | str, place: int) -> Tensor:
    """The values of one parameter or buffer: decided by its place and the seed."""
    bias = name.endswith(("bias", "running_mean"))
    if seed == 0:
        return torch.zeros(*shape) if bias else torch.ones(*shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {place}".encode()))
    quarters = torch.randint(-4, 5, tuple(shape), generator=generator, dtype=torch.float64) / 4
    if bias:
        return quarters / 4 + OFF * (1 + place % 7)
    if name.endswith("running_var"):
        return 0.5 + quarters.abs()
    if len(shape) > 1:
        return quarters * 2.0 ** -round(math.log2(math.prod(shape[1:])) / 2)
    return torch.where(quarters == 0, 1.0, quarters)  # gains: no channel is switched off
