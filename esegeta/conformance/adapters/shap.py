"""shap's explainers for differentiable networks and for functions of tables.

Those for tables see an image as one row, every element of it as a feature.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esegeta.conformance.adapters import peers
from esegeta.conformance.adapters.peers import Peer, Run

EXTRA = "test"
_MANY = ("baselines",)


def _explainer(name: str) -> Any:
    return getattr(peers.package("shap", EXTRA), name)


def _module(model: Callable[[Tensor], Tensor]) -> nn.Module:
    return peers.Column(model if isinstance(model, nn.Module) else peers.Batches(model))


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """It makes its samples in torch's default dtype, which the network may not take."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _of_networks(name: str, draws: bool) -> Callable[..., Run]:
    def prepare(**options: Any) -> Run:
        kind = _explainer(name)
        constructor, call = peers.split(f"shap:{name}", options, kind.__init__, kind.shap_values)

        def run(model: Callable[[Tensor], Tensor], xs: Tensor, baselines: Tensor) -> Tensor:
            # It seeds numpy itself, unless it is told with what.
            seed = {"rseed": int(np.random.randint(2**31))} if draws else {}
            with _default(xs.dtype):
                found = kind(_module(model), baselines, **constructor).shap_values(xs, **{**seed, **call})
            return torch.as_tensor(np.asarray(found)).reshape(xs.shape)

        return run

    return prepare


def _rows(model: Callable[[Tensor], Tensor], like: Tensor) -> Callable[[Any], Any]:
    def function(table: Any) -> Any:
        batch = torch.as_tensor(np.asarray(table)).to(like).reshape(-1, *like.shape[1:])
        with torch.no_grad():
            return model(batch).double().numpy()

    return function


def _table(xs: Tensor) -> Any:
    return xs.flatten(1).double().numpy()


def _kernel(**options: Any) -> Run:
    kind = _explainer("KernelExplainer")
    # It takes these without naming them in its signature.
    (call,) = peers.split("shap:KernelExplainer", options, ("nsamples", "l1_reg", "gc_collect"))

    def run(model: Callable[[Tensor], Tensor], xs: Tensor, baselines: Tensor) -> Tensor:
        made = kind(_rows(model, xs), _table(baselines))
        return torch.as_tensor(made.shap_values(_table(xs), **{"silent": True, **call})).reshape(xs.shape)

    return run


def _of_tables(name: str, seeds: bool = False) -> Callable[..., Run]:
    def prepare(**options: Any) -> Run:
        kind = _explainer(name)
        constructor, call = peers.split(f"shap:{name}", options, kind.__init__, kind.__call__)

        def run(model: Callable[[Tensor], Tensor], xs: Tensor, baselines: Tensor) -> Tensor:
            seed = {"seed": int(np.random.randint(2**31))} if seeds else {}
            made = kind(_rows(model, xs), _table(baselines), **{**seed, **constructor})
            return torch.as_tensor(made(_table(xs), **{"silent": True, **call}).values).reshape(xs.shape)

        return run

    return prepare


METHODS: dict[str, Peer] = {
    "GradientExplainer": Peer(
        _of_networks("GradientExplainer", draws=True), _MANY, True, peers.GRADIENT | {"shift"}
    ),
    "DeepExplainer": Peer(
        _of_networks("DeepExplainer", draws=False), _MANY, axioms=peers.COMPLETE, wants="module"
    ),
    "KernelExplainer": Peer(_kernel, _MANY, True, peers.COMPLETE),
    "PermutationExplainer": Peer(_of_tables("PermutationExplainer", seeds=True), _MANY, True, peers.SHAPLEY),
    "ExactExplainer": Peer(
        _of_tables("ExactExplainer"),
        _MANY,
        axioms=peers.SHAPLEY | {"symmetry"},
        terms=lambda x: 2 ** x.numel(),  # one for each coalition
    ),
}
