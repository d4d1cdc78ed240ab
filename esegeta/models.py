"""From networks to models: functions of one example that every ``torch.func`` transform can enter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from esegeta._facts import named
from esegeta._types import Model
from esegeta.engine import check, levels
from esegeta.engine.locality import Locality, NotLocal, listening, probe
from esegeta.engine.native import Native, Pick, each, name_of, pick
from esegeta.engine.network import ModuleModel
from esegeta.patches import patchwise as patchwise
from esegeta.patches import sliding_window as sliding_window


def from_module(module: Callable[..., Any], output: Pick = None) -> ModuleModel:
    r"""Make a model of a network, or of anything else that maps a batch to a batch.

    .. math:: f : R^{C \times S} \to R^{K \times S'}

    The network runs on plain batches at its own speed, whatever nest of ``vmap``, ``grad``, ``jvp`` surrounds
    the model: mapped axes are folded into the batch axis. It is never changed: no ``eval()``, no hooks,
    no ``requires_grad_``, and buffers that a forward pass writes are put back.

    Modules, TorchScript, ``torch.export`` programs, compiled modules and plain callables enter by the same
    door. What autograd cannot see through still serves methods that need only values. At the first batch it is
    checked that examples do not influence each other (five more forward runs, once); if they do, or if the
    network takes no batch, they go through one at a time.

    Args:
        module: maps tensors with a batch axis to tensors with that batch axis. Switch it to ``eval()`` first.
        output: which tensor of the result to take: a key, an index, a path of those such as
            ``("logits", 0)``, or a function. Not needed where the result is a tensor.

    Returns:
        A model ``(C,*S) -> (K,*S)``. Further inputs of the network are further arguments, each without batch
        axis; trees of tensors are welcome.

    Example:
        >>> import torch
        >>> model = from_module(torch.nn.AvgPool1d(2))
        >>> model(torch.tensor([[1., 3., 5., 7.]])).tolist()
        [[2.0, 6.0]]
        >>> torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(torch.zeros(3, 1, 2)).tolist()
        [[[0.5, 0.5]], [[0.5, 0.5]], [[0.5, 0.5]]]
    """
    if isinstance(module, torch.export.ExportedProgram):
        module = module.module()
    if not callable(module):
        raise check.refused_type(
            "from_module",
            "a module or another callable",
            check.describe(module),
            "Pass the network itself",
        )
    steps = [output] if isinstance(output, (str, int)) or not isinstance(output, Sequence) else list(output)
    if not (output is None or callable(output) or all(isinstance(s, (int, str)) for s in steps)):
        expected, advice = (
            "output: a key, an index, a path of those, or a function",
            'Pass for example "logits"',
        )
        raise check.refused_type("from_module", expected, check.describe(output), advice)
    return ModuleModel(module, output)


def locality(score: Callable[[Tensor], Tensor], x: Tensor) -> Locality:
    r"""Return how far the network in a score sees: the reach of one element, and the shift period, for every axis.

    Planes of NaN go through the network, one at every phase of its strides; the NaN in what comes out are what an
    element can influence at most. Slabs stand for whole images, so it takes seconds and is remembered. A network
    that hides NaN (``torch.where``), or in which everything reaches everything (instance norm, attention, global
    pooling), is refused with the reason.

    Args:
        score: ``(C,*S) -> ()`` that runs one ``from_module`` model, or such a model itself, or a plain function
            from (C,\*S) to (K,\*S).
        x: an image of the shape in question.

    Returns:
        A ``Locality``: ``period`` and ``reach`` for every axis; ``affected`` and ``needs`` answer for intervals.

    Example:
        >>> import torch
        >>> blur = from_module(torch.nn.AvgPool1d(3, stride=1, padding=1))
        >>> locality(lambda x: blur(x).sum(), torch.zeros(1, 32))
        Locality(period=(1,), reach=(((-1, 2),),))
    """
    where = "locality"
    check.runs(where, score)
    x = check.image(where, "x", x)
    if levels.depth():
        raise check.refused(where, "a plain image", "one under vmap or grad", "Ask outside of it")
    with listening() as heard, torch.no_grad():
        y = score(x)
    seen = {id(model): (model, inputs) for model, inputs in heard}
    try:
        if len(seen) == 1:
            ((model, inputs),) = seen.values()
            if len(inputs) == 1 and isinstance(inputs[0], Tensor):
                return model.locality(inputs[0])
        elif not seen and isinstance(y, Tensor) and y.ndim == x.ndim:
            return probe(score, x, name_of(score))
    except NotLocal as reason:
        raise check.refused(
            where, "a network that sees only a part of an image", str(reason), "Evaluate it as a whole"
        ) from None
    raise check.refused(
        where,
        "a score with one model of one image",
        f"{len(seen)} models" if len(seen) != 1 else "a model of several inputs",
        "Pass the model itself, made by esegeta.from_module",
    )


def parametrised(
    module: nn.Module, output: Pick = None
) -> tuple[Callable[[Mapping[str, Tensor]], Model], dict[str, Tensor]]:
    """Take a module's parameters out: ``build(parameters)`` is the model with those parameters.

    For everything that varies weights: NoiseGrad, randomisation, attribution priors in training. These models
    are plain torch functions: torch vectorises them operator by operator and differentiates with respect to
    the parameters too.

    Args:
        module: in evaluation mode; it is not changed.
        output: as in ``from_module``.

    Returns:
        ``(build, parameters)`` with ``build : parameters -> Model``; ``parameters`` are the module's own,
        detached.

    Example:
        >>> import torch
        >>> build, parameters = parametrised(torch.nn.Linear(2, 1, bias=False))
        >>> build({"weight": torch.tensor([[1., 2.]])})(torch.tensor([3., 4.])).tolist()
        [11.0]
    """
    if not isinstance(module, nn.Module):
        raise check.refused_type(
            "parametrised", "an nn.Module", check.describe(module), "Other callables have no parameters"
        )
    rules = Native(module, output)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def build(chosen: Mapping[str, Tensor]) -> Model:
        if not isinstance(chosen, Mapping):
            advice = "Pass those that parametrised returned, changed"
            raise check.refused_type("parametrised", "parameters by name", check.describe(chosen), advice)

        def model(*inputs: Any) -> Tensor:
            rules.refuse_training()
            # Buffers too go in as copies: what a forward pass writes into them is lost with the call.
            state = {**{n: b.detach().clone() for n, b in module.named_buffers()}, **chosen}
            leaves, spec = tree_flatten(inputs)
            arguments = tree_unflatten(each(leaves, lambda t: t.unsqueeze(0)), spec)
            return pick(functional_call(module, state, arguments), output, name_of(module)).squeeze(0)

        return named(model, f"parametrised({name_of(module)})")

    return build, parameters
