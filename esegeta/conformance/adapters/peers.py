"""What all adapters share: how a method of another library becomes a ``Subject``."""

import contextlib
import copy
import importlib
import inspect
import io
import random as python_random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from esegeta import random
from esegeta._facts import declare, declared
from esegeta._types import Explain, Score
from esegeta.axioms.composed import Composed
from esegeta.conformance.functions import AsModule
from esegeta.conformance.subjects import Subject
from esegeta.engine import check

# A peer on a batch: (network or function of batches, (B,C,*S), *refs) -> (B, ...).
Run = Callable[..., Tensor]

# What the definitions of the methods promise, whoever implements them.
GRADIENT = frozenset({"linearity", "dummy", "symmetry", "implementation_invariance", "scale_of_output"})
PATH = GRADIENT | {"completeness", "sensitivity_a", "shift"}
SHAPLEY = frozenset(
    {"completeness", "linearity", "dummy", "implementation_invariance", "scale_of_output", "shift"}
)
COMPLETE = frozenset({"completeness"})
NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Peer:
    """A method of another library: how it runs with given options, and what ``Subject`` says of it.

    prepare: from options to a ``Run``; nodes: from options to the field of that name.
    """

    prepare: Callable[..., Run]
    refs: tuple[str, ...] = ()
    key: bool = False
    axioms: frozenset[str] = NOTHING
    one_channel: bool = False
    wants: Literal["function", "module"] = "function"
    nodes: Callable[[Mapping[str, Any]], int | None] | None = None
    accuracy: float = 0.0
    terms: Callable[[Tensor], int] | None = None


def subject(name: str, peer: Peer, options: Mapping[str, Any]) -> Subject:
    """Return the subject of a peer with options. Its explanations also have ``explain.facts.batched``.

    ``explain.facts.batched(xs, *refs, key=)`` gives several examples to the peer at once: a baseline for each,
    baselines shared by all. A method that lets examples influence each other answers otherwise there than one by one.
    """
    run = peer.prepare(**options)

    def build(score: Score) -> Explain:
        model = network(name, score) if peer.wants == "module" else of_batches(score)

        def batched(xs: Tensor, *refs: Tensor, key: "int | Tensor" = 0) -> Tensor:
            with seeded(key), torch.enable_grad(), quiet():
                given = [r.detach().clone() for r in refs]
                return torch.as_tensor(run(model, xs.detach().clone(), *given)).detach().to(xs)

        def explain(x: Tensor, *refs: Tensor, key: "int | Tensor" = 0) -> Tensor:
            alone = [r[None] if kind == "baseline" else r for kind, r in zip(peer.refs, refs, strict=True)]
            return batched(x[None], *alone, key=key)[0]

        return declare(explain, batched=batched)

    return Subject(
        name,
        build,
        peer.refs,
        peer.key,
        peer.axioms,
        peer.one_channel,
        nodes=None if peer.nodes is None else peer.nodes(options),
        accuracy=peer.accuracy,
        differentiable=False,
        wants=peer.wants,
        terms=peer.terms,
        mapped=False,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings, bars and remarks of a peer."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield


# --- Packages and options ---------------------------------------------------------------------------------


def package(name: str, extra: str) -> Any:
    """Import a package or a module of it; a missing one is an error that names the extra."""
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as missing:
        raise ImportError(
            check.problem(
                "esegeta.conformance.adapters",
                f"the package {name.partition('.')[0]} to be installed",
                str(missing),
                f'Install it with pip install "esegeta[{extra}]"',
            )
        ) from missing


_OPERATORS: list[Any] = []


def torchvision() -> None:
    """Make torchvision importable: beside another build of torch it does not find two operators of its own."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # whoever needs it says so
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(library)  # the operators live as long as this does
        importlib.import_module("torchvision")


def split(
    name: str, options: Mapping[str, Any], *takers: Callable[..., Any] | tuple[str, ...]
) -> list[dict[str, Any]]:
    """Sort options by the first function, or list of names, that takes them; refuse others."""
    taken = [t if isinstance(t, tuple) else tuple(inspect.signature(t).parameters) for t in takers]
    parts: list[dict[str, Any]] = [{} for _ in takers]
    for option, value in options.items():
        part = next((p for p, names in zip(parts, taken, strict=True) if option in names), None)
        if part is None:
            known = sorted({n for names in taken for n in names} - {"self", "args", "kwargs"})
            expected = f"options out of {', '.join(known)}"
            raise check.refused(name, expected, option, check.nearest(option, known))
        part[option] = value
    return parts


# --- Scores as what a peer takes --------------------------------------------------------------------------


class Column(nn.Module):
    """A network whose score is the one column of a table (B, 1), for peers that choose a class."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Tensor) -> Tensor:
        """Return the scores of a batch, as (B, 1)."""
        return self.net(batch)[:, None]


class Copied(nn.Module):
    """A network behind a copy of its input, which is a layer that can be explained."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.copy = nn.Identity()
        self.net = net

    def forward(self, batch: Tensor) -> Tensor:
        """Return the scores of a batch."""
        return self.net(self.copy(1.0 * batch))


def network(name: str, score: Score) -> nn.Module:
    """Return a copy of the network (B,C,*S) -> (B,) of a score, which a peer may change as it likes."""
    module = declared(score).module
    if not isinstance(module, nn.Module) or any(isinstance(m, AsModule) for m in module.modules()):
        raise check.refused_type(
            name,
            "a score with a network of modules as its attribute module",
            check.describe(score),
            "It hooks modules, and a function has none",
        )
    return copy.deepcopy(module).eval()


def of_batches(score: Score) -> Callable[[Tensor], Tensor]:
    """Return the score as a function (B,C,*S) -> (B,)."""
    module = declared(score).module
    return copy.deepcopy(module).eval() if isinstance(module, nn.Module) else torch.func.vmap(score)


class Batches(nn.Module):
    """A function of batches as a module, for peers that ask for one but hook nothing."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, batch: Tensor) -> Tensor:
        """Return the scores of a batch."""
        return self.function(batch)


def place(name: str, net: nn.Module, layer: str, xs: Tensor) -> tuple[nn.Module, str]:
    """Return a network and the name of the layer in it that is meant.

    ``"deepest"`` is the convolution with the smallest output, of several the last to run: the bottleneck of an
    encoder, or the last convolution where nothing is pooled. ``"input"`` is a copy of the input.
    """
    if layer == "input":
        return Copied(net), "copy"
    if layer == "deepest":
        return net, _deepest(name, net, xs)
    known = [n for n, _ in net.named_modules() if n]
    if layer not in known:
        raise check.refused(
            name, "layer to be 'deepest', 'input' or a module", layer, check.nearest(layer, known)
        )
    return net, layer


def _deepest(name: str, net: nn.Module, xs: Tensor) -> str:
    if isinstance(net, Composed) and len(net.networks) > 1:
        raise check.refused(
            name,
            "one network",
            f"a sum of {len(net.networks)}",
            "They have no layer in common: use layer='input'",
        )
    sizes: dict[str, int] = {}
    convolutions = [
        (n, m)
        for n, m in net.named_modules()
        if isinstance(m, nn.modules.conv._ConvNd) and not isinstance(m, nn.modules.conv._ConvTransposeNd)
    ]

    def watch(n: str) -> Callable[..., None]:
        def seen(*call: Any) -> None:  # the module, its inputs, its output
            sizes.pop(n, None)
            sizes[n] = call[-1][0, 0].numel()

        return seen

    handles = [m.register_forward_hook(watch(n)) for n, m in convolutions]
    try:
        with torch.no_grad():
            net(xs)
    finally:
        for handle in handles:
            handle.remove()
    if not sizes:
        raise check.refused(
            name, "a network with a convolution", "one without", "Name another layer, or layer='input'"
        )
    smallest = min(sizes.values())
    return [n for n, size in sizes.items() if size == smallest][-1]


# --- Random numbers ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def seeded(key: "int | Tensor") -> Iterator[int]:
    """Set the global generators that peers draw from by a key; afterwards they are as they were."""
    number = int(random.fold_in(key, 0)) % 2**32
    before = torch.get_rng_state(), np.random.get_state(), python_random.getstate()
    torch.manual_seed(number)
    np.random.seed(number)
    python_random.seed(number)
    try:
        yield number
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        python_random.setstate(before[2])
