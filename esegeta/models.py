"""From networks to models: functions of one example that every ``torch.func`` transform can enter."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from esegeta._facts import named
from esegeta._types import Model
from esegeta.engine import check, crops, interception, levels
from esegeta.engine.execution import current
from esegeta.engine.folded import fold
from esegeta.engine.interception import Address, Session, Stop
from esegeta.engine.locality import Locality, NotLocal, TooDear, hear, listening, probe
from esegeta.engine.native import Arrange, Call, Native, Pick, each, name_of, pick
from esegeta.engine.operators import refuse_unseen
from esegeta.engine.windows import Refused, Window
from esegeta.patches import patchwise as patchwise
from esegeta.patches import sliding_window as sliding_window

_OPS = 64  # how many kinds of call a model remembers


def from_module(module: Callable[..., Any], output: Pick = None) -> "ModuleModel":
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
        raise TypeError(
            check.problem(
                "from_module",
                "a module or another callable",
                check.describe(module),
                "Pass the network itself",
            )
        )
    steps = [output] if isinstance(output, (str, int)) or not isinstance(output, Sequence) else list(output)
    if not (output is None or callable(output) or all(isinstance(s, (int, str)) for s in steps)):
        expected, advice = (
            "output: a key, an index, a path of those, or a function",
            'Pass for example "logits"',
        )
        raise TypeError(check.problem("from_module", expected, check.describe(output), advice))
    return ModuleModel(module, output)


class ModuleModel:
    """A network as a function of one example. Made by ``from_module``."""

    def __init__(self, module: Callable[..., Any], output: Pick = None) -> None:
        self.module = module
        self.output = output
        self._native = Native(module, output)
        self._folded: dict[Any, Callable[..., tuple[Tensor, ...]]] = {}
        # What has been learnt about places: which are written to after they were passed, and for which sets
        # of places examples have to go through alone, because the first axis is not the batch.
        self._copies: set[Address] = set()
        self._alone: dict[frozenset[tuple[Address, int]], bool] = {}
        self._localities: dict[Any, Locality | str] = {}

    def __repr__(self) -> str:
        chosen = "" if self.output is None else f", output={self.output!r}"
        return f"from_module({name_of(self.module)}{chosen})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made anew from a copy of the network."""
        return from_module, (self.module, self.output)

    def __call__(self, *inputs: Any) -> Tensor:
        """Run one example through the network: each tensor comes without a batch axis."""
        hear(self, inputs)
        leaves, spec = tree_flatten(inputs)
        is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        if not any(is_tensor):
            raise TypeError(
                check.problem(
                    name_of(self.module),
                    "at least one tensor",
                    ", ".join(check.describe(leaf) for leaf in leaves) or "nothing",
                    "Pass one example without batch axis",
                )
            )
        self._native.refuse_training()
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._native.refuse_strangers(tensors)
        self._native.refuse_missing_channels(tensors, spec)
        try:
            return self._run(tensors, leaves, spec, is_tensor)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            told = self._native.misfit(tensors, error)
            if told is None:
                raise
            raise told from error

    def _run(
        self, tensors: list[Tensor], leaves: list[Any], spec: Any, is_tensor: tuple[bool, ...]
    ) -> Tensor:
        statics = tuple(None if t else leaf for t, leaf in zip(is_tensor, leaves, strict=True))
        session = interception.current()
        if any(isinstance(t, Window) for t in tensors):
            return self._in_windows(leaves, spec, session is not None)
        if session is None:
            (y,) = self._fold(spec, is_tensor, statics)(*tensors)
            return y
        if session.listing is not None:
            return self._listed(session, leaves, spec)
        return self._observed(session, leaves, spec)

    def _fold(self, spec: Any, is_tensor: tuple[bool, ...], statics: tuple[Any, ...]) -> Any:
        # One op for all calls alike but for tensors; what cannot be compared safely gets one for itself.
        key = (str(spec), is_tensor, tuple((type(s), s) for s in statics))
        comparable = all(isinstance(s, (bool, int, float, str, type(None))) for s in statics)
        if comparable and key in self._folded:
            return self._folded[key]

        def run(*tensors: Tensor, full: bool = False) -> tuple[Tensor, ...]:
            found = iter(tensors)
            leaves = [next(found) if t else s for t, s in zip(is_tensor, statics, strict=True)]
            self._native.settle(leaves, spec)
            return self._native(leaves, self._native.plain(spec), full)

        folded = fold(
            run, name_of(self.module), host=self._native.host, full=functools.partial(run, full=True)
        )
        if comparable and len(self._folded) < _OPS:
            self._folded[key] = folded
        return folded

    def _in_windows(self, leaves: list[Any], spec: Any, observed: bool) -> Tensor:
        """Run on what differs from a known input in a box only, operator by operator."""
        run = next(t for t in leaves if isinstance(t, Window)).run
        if run.by_crops:
            return self._in_crops(leaves)
        if observed or self._native.outside or current().precision is not None:
            raise Refused("the network is observed, compiled or runs in reduced precision")
        batch = each(leaves, lambda t: t.unsqueeze(0))
        with run.apart(), _put_back(self._native.tree, _holds_windows) as kept:
            (y,) = self._native.guarded(batch, self._native.plain(spec), lambda t: t)
        if kept:
            raise Refused("the network keeps what it computes for later calls")
        return y.squeeze(0)

    def _in_crops(self, leaves: list[Any]) -> Tensor:
        """Run on the part of the image that a change reaches."""
        (x,) = leaves if len(leaves) == 1 else (None,)
        if not isinstance(x, Window) or x.ndim < 2:
            raise Refused("crops are of one image; this network takes more than that")
        try:
            seen = self.locality(x.clean[0], x.run.probing)
        except (NotLocal, TooDear) as reason:
            raise Refused(str(reason)) from None
        return crops.through(self, x, seen)

    def locality(self, x: Tensor, allowed: float = math.inf) -> Locality:
        """How far the network sees in images of this shape, or why it has no reach: found once, and remembered.

        More than ``allowed`` elements do not go through the network for it; that is no finding, and forgotten.
        """
        key = (tuple(x.shape), x.dtype, x.device)
        if key not in self._localities:
            with _put_back(self._native.tree, lambda _: True):  # what it learns from slabs is not for images
                try:
                    self._localities[key] = probe(self, x, name_of(self.module), allowed)
                except NotLocal as reason:
                    self._localities[key] = str(reason)
        found = self._localities[key]
        if isinstance(found, str):
            raise NotLocal(found)
        return found

    def _listed(self, session: Session, leaves: list[Any], spec: Any) -> Tensor:
        """Run under ordinary autograd, as one graph with the code around, and note every place."""
        if levels.depth():
            raise ValueError(
                check.problem(
                    "places",
                    "a score that runs its network as it is",
                    "one that applies vmap or grad to it",
                    "List the places of the function that is mapped",
                )
            )
        last: list[tuple[Session, bool]] = []
        with interception.aside():
            batch = [*each(leaves, lambda t: t.unsqueeze(0)), *(t.unsqueeze(0) for t in session.put())]
            call = self._watched_call(len(leaves), spec, session.bare(), last)
            out = [y.squeeze(0) for y in self._native.guarded(batch, call, torch.clone)]
            inner, stopped = last[-1]
            session.join(inner, out if stopped else out[1:])
            return out[0]

    def _observed(self, session: Session, leaves: list[Any], spec: Any) -> Tensor:
        """Run with places observed or changed: what goes in are further inputs, what is seen further outputs."""
        count = sum(isinstance(leaf, Tensor) for leaf in leaves)
        entering = [*leaves, *session.put()]
        data, twins = session.entering(entering)
        places, plan = session.standing(), session.bare()
        last: list[tuple[Session, bool]] = []

        def run(*tensors: Tensor, full: bool = False) -> tuple[Tensor, ...]:
            found = iter(tensors)
            own = [next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._native.settle(own, spec)
            calls = functools.partial(self._watched_call, len(leaves), spec, data=data)
            last.clear()
            unknown = places not in self._alone and not self._native.one_at_a_time
            if unknown and not levels.fake(tensors[0]) and self._native.together(tensors[0]):
                self._alone[places] = self._leads_nowhere(plan, own, calls)
            # A dry run cannot compare; one example alone shows its places unmixed.
            alone = self._alone.get(places, levels.fake(tensors[0]) and tensors[0].shape[0] == 1)
            return self._native([*own, *tensors[count:]], calls(plan, last), full, alone)

        name = name_of(self.module)
        op = fold(run, name, host=self._native.host, full=functools.partial(run, full=True))
        with interception.aside():
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            out = op(*tensors, *session.put(), *twins)
        inner, stopped = last[-1]
        out = session.leaving(inner, out)
        session.join(inner, out if stopped else out[1:])
        return out[0]

    def _watched_call(
        self,
        count: int,
        spec: Any,
        session: Session,
        last: list[tuple[Session, bool]],
        data: tuple[tuple[int, Any], ...] = (),
    ) -> Call:
        listed = len(session.listing or ())

        def call(leaves: list[Any], arrange: Arrange) -> tuple[Tensor, ...]:
            own, put = leaves[:count], leaves[count:]
            twins: list[Any] = [None] * len(data)
            if data and session.paired:
                put, twins = put[: -len(data)], put[-len(data) :]
            batch = next(leaf for leaf in own if isinstance(leaf, Tensor)).shape[0]
            while True:
                if session.listing is not None:  # an attempt before this one may have been for nothing
                    del session.listing[listed:]
                inner = session.fork(put, batch, self._copies)
                out: tuple[Tensor, ...] = ()
                arranged = each(own, arrange)
                inner.marks([*arranged, *put], data, each(twins, arrange))
                arguments = tree_unflatten(arranged, spec)
                module = getattr(self.module, "_orig_mod", self.module)
                try:
                    with inner.running(self.module):
                        y = pick(module(*arguments), self.output, self._native.name)
                    out = (self._native.checked(y, batch),)
                    if inner.tracer is not None and inner.tracer.is_data(y):
                        refuse_unseen(inner.tracer.rewrite.name, y, inner.tracer)
                except Stop:
                    pass
                spoiled, seen = inner.spoiled, inner.take()
                companions = inner.companions((*out, *seen))
                if spoiled:
                    self._copies |= spoiled
                    continue
                if last and not inner.agrees(last[-1][0]):
                    # Examples that go through one at a time may go different ways.
                    raise inner.missing() or last[-1][0].missing() or RuntimeError("places differ")
                last[:] = [(inner, not out)]
                return (*out, *seen, *companions)

        return call

    def _leads_nowhere(self, plan: Session, leaves: list[Any], calls: Any) -> bool:
        """Whether the first axis of any place is not the batch: seen on one example, and on two."""
        odd = False
        one = each(leaves, lambda t: t[:1])
        for batch in (one, each(one, lambda t: torch.cat([t, t]))):
            seen: list[tuple[Session, bool]] = []
            with torch.no_grad():
                self._native.guarded(batch, calls(plan.looking(), seen), torch.clone)
            odd = odd or seen[-1][0].odd
        return odd


@contextlib.contextmanager
def _put_back(modules: list[nn.Module], which: Callable[[Any], bool]) -> Iterator[list[str]]:
    """Put back attributes that a network writes for later calls, if ``which`` is true of what it wrote."""
    before = [dict(vars(m)) for m in modules]
    written: list[str] = []
    try:
        yield written
    finally:
        for module, old in zip(modules, before, strict=True):
            for name, value in list(vars(module).items()):
                if (name not in old or old[name] is not value) and which(value):
                    written.append(name)
                    if name in old:
                        vars(module)[name] = old[name]
                    else:
                        del vars(module)[name]


def _holds_windows(value: Any) -> bool:
    return any(isinstance(t, Window) for t in tree_leaves(value))


def locality(score: Callable[[Tensor], Tensor], x: Tensor) -> Locality:
    r"""How far the network in a score sees: the reach of one element, and the shift period, for every axis.

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
        raise ValueError(check.problem(where, "a plain image", "one under vmap or grad", "Ask outside of it"))
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
        raise ValueError(
            check.problem(
                where, "a network that sees only a part of an image", str(reason), "Evaluate it as a whole"
            )
        ) from None
    raise ValueError(
        check.problem(
            where,
            "a score with one model of one image",
            f"{len(seen)} models" if len(seen) != 1 else "a model of several inputs",
            "Pass the model itself, made by esegeta.from_module",
        )
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
        raise TypeError(
            check.problem(
                "parametrised", "an nn.Module", check.describe(module), "Other callables have no parameters"
            )
        )
    rules = Native(module, output)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def build(chosen: Mapping[str, Tensor]) -> Model:
        if not isinstance(chosen, Mapping):
            advice = "Pass those that parametrised returned, changed"
            raise TypeError(
                check.problem("parametrised", "parameters by name", check.describe(chosen), advice)
            )

        def model(*inputs: Any) -> Tensor:
            rules.refuse_training()
            # Buffers too go in as copies: what a forward pass writes into them is lost with the call.
            state = {**{n: b.detach().clone() for n, b in module.named_buffers()}, **chosen}
            leaves, spec = tree_flatten(inputs)
            arguments = tree_unflatten(each(leaves, lambda t: t.unsqueeze(0)), spec)
            return pick(functional_call(module, state, arguments), output, name_of(module)).squeeze(0)

        return named(model, f"parametrised({name_of(module)})")

    return build, parameters
