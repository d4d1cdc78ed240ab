"""A network as a model: one example in, the folded call around it, observed or run in windows where somebody asks."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from esegeta.engine import check, crops, interception, levels, twins, visits
from esegeta.engine.execution import current
from esegeta.engine.folded import fold
from esegeta.engine.locality import Locality, NotLocal, TooDear, hear, probe
from esegeta.engine.native import Arrange, Call, Native, Pick, each, name_of, pick
from esegeta.engine.operators import refuse_unseen
from esegeta.engine.views import Address, Stop
from esegeta.engine.visits import Session
from esegeta.engine.windows import NotFollowed, Window

_OPS = 64  # how many kinds of call a model remembers


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
        return ModuleModel, (self.module, self.output)

    def structure(self) -> tuple[int, ...]:
        """Return what a run occupies depends on: modules, how many of them train, have hooks, and parameters."""
        tree = self._native.tree
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tree)
        return len(tree), sum(m.training for m in tree), hooks, sum(len(m._parameters) for m in tree)

    def again(self) -> "ModuleModel":
        """Return another model of the network that knows what a call shows: whether examples may go together.

        What methods have found out since, at places or in windows, stays behind.
        """
        other = ModuleModel(self.module, self.output)
        other._native.know(self._native)
        return other

    def __call__(self, *inputs: Any) -> Tensor:
        """Run one example through the network: each tensor comes without a batch axis."""
        hear(self, inputs)
        leaves, spec = tree_flatten(inputs)
        is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        if not any(is_tensor):
            raise check.refused_type(
                name_of(self.module),
                "at least one tensor",
                ", ".join(check.describe(leaf) for leaf in leaves) or "nothing",
                "Pass one example without batch axis",
            )
        self._native.refuse_training()
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._native.check_dtype_and_device(tensors)
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
        session = visits.current()
        if any(isinstance(t, Window) for t in tensors):
            return self._in_windows(leaves, spec, session)
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
            self._native.settle(leaves, self._native.plain(spec))
            return self._native(leaves, self._native.fast(spec), full)

        folded = fold(
            run, name_of(self.module), host=self._native.host, full=functools.partial(run, full=True)
        )
        if comparable and len(self._folded) < _OPS:
            self._folded[key] = folded
        return folded

    def _in_windows(self, leaves: list[Any], spec: Any, session: Session | None) -> Tensor:
        """Run on what differs from a known input in a box only, operator by operator."""
        run = next(t for t in leaves if isinstance(t, Window)).run
        if run.by_crops:
            if session is not None and session.local:
                raise NotFollowed("crops of a network that other rules apply to")
            return self._in_crops(leaves)
        observed = session is not None and not session.local
        if observed or self._native.outside or current().precision is not None:
            raise NotFollowed("the network is observed, compiled or runs in reduced precision")
        call = self._native.plain(spec)
        if session is not None:
            call = self._watched_call(len(leaves), spec, session.bare(), [])
        batch = each(leaves, lambda t: t.unsqueeze(0))
        with run.apart(), _put_back(self._native.tree, _holds_windows) as kept, visits.aside():
            (y,) = self._native.guarded(batch, call, lambda t: t)
        if kept:
            raise NotFollowed("the network keeps what it computes for later calls")
        return y.squeeze(0)

    def _in_crops(self, leaves: list[Any]) -> Tensor:
        """Run on the part of the image that a change reaches."""
        (x,) = leaves if len(leaves) == 1 else (None,)
        if not isinstance(x, Window) or x.ndim < 2:
            raise NotFollowed("crops are of one image; this network takes more than that")
        try:
            seen = self.locality(x.clean[0], x.run.probing)
        except (NotLocal, TooDear) as reason:
            raise NotFollowed(str(reason)) from None
        return crops.through(self, x, seen)

    def locality(self, x: Tensor, allowed: float = math.inf) -> Locality:
        """Return how far the network sees in images of this shape, or why it has no reach; cached.

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
            raise check.refused(
                "places",
                "a score that runs its network as it is",
                "one that applies vmap or grad to it",
                "List the places of the function that is mapped",
            )
        last: list[tuple[Session, bool]] = []
        with visits.aside():
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
        data, companions = twins.entering(session.tracer, entering)
        places, plan = session.standing(), session.bare()
        last: list[tuple[Session, bool]] = []

        def run(*tensors: Tensor, full: bool = False) -> tuple[Tensor, ...]:
            found = iter(tensors)
            own = [next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._native.settle(own, self._native.plain(spec))
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
        with visits.aside():
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            out = op(*tensors, *session.put(), *companions)
        inner, stopped = last[-1]
        out = twins.leaving(session.tracer, inner.left, out)
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
            others: list[Any] = [None] * len(data)
            if data and twins.paired(session.tracer):
                put, others = put[: -len(data)], put[-len(data) :]
            batch = next(leaf for leaf in own if isinstance(leaf, Tensor)).shape[0]
            while True:
                if session.listing is not None:  # an attempt before this one may have been for nothing
                    del session.listing[listed:]
                inner = session.fork(put, batch, self._copies)
                out: tuple[Tensor, ...] = ()
                arranged = each(own, arrange)
                twins.mark(inner.tracer, [*arranged, *put], data, each(others, arrange))
                arguments = tree_unflatten(arranged, spec)
                module = getattr(self.module, "_orig_mod", self.module)
                try:
                    with interception.running(inner, self.module):
                        y = pick(module(*arguments), self.output, self._native.name)
                    out = (self._native.checked(y, batch),)
                    if inner.tracer is not None and inner.tracer.is_data(y):
                        refuse_unseen(inner.tracer.rewrite.name, y, inner.tracer)
                except Stop:
                    pass
                spoiled, seen = inner.spoiled, inner.take()
                inner.left, companions = twins.companions(inner.tracer, (*out, *seen))
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
