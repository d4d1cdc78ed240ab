"""Looking into a running score: places are passed one after another, and whoever asked sees or changes them.

A *place* is one tensor that the code produces on its way: the output of a module, of one of its calls, of an
operation in its ``forward``, or a value marked by ``name``. Nothing of this is compiled, traced or rewritten:
the code runs as it always does, and a *session*, scoped to the running thread, is told of every place that it
passes. A network behind the folded call is a plain batch inside: there a second session, forked for that one
run, sees batches, and what it has seen leaves the run as further outputs, what it puts in enters as further
inputs. So every transform around the score works for places as for the score itself.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from esegeta.engine import check
from esegeta.engine.biases import Call
from esegeta.engine.operators import Rewrite, refuse_unseen
from esegeta.engine.spellings import is_builtin_leaf, may_be_operation, operation
from esegeta.engine.views import Address, Edit, Passed, Stop, View
from esegeta.engine.visits import CURRENT, Session


def observe(
    where: str,
    score: Callable[..., Any],
    inputs: Sequence[Any],
    edits: Sequence[Edit],
    *,
    stop: bool = False,
    rewrite: Rewrite | None = None,
    references: Sequence[Tensor] = (),
) -> tuple[Any, list[Tensor]]:
    """Run a score with edits: its value (None if stopped early) and what the taps saw, in order.

    With a rewrite, operations have its derivatives; a paired one compares with the references of the inputs.
    """
    outer = CURRENT.get()
    view = View(where, edits, stop)
    session = Session((view, *(outer.views if outer is not None and outer.batch is None else ())))
    session.silent = outer is not None and outer.silent
    session.listing = outer.listing if outer is not None else None
    session.tracer = outer.tracer if outer is not None else None
    if rewrite is not None:
        if session.tracer is not None:
            raise check.refused(
                where,
                "one set of rules",
                f"{rewrite.name} inside of {session.tracer.rewrite.name}",
                "Rewrite the score once",
            )
        session.rewrite_with(rewrite)
        assert session.tracer is not None
        for i, x in enumerate(inputs):
            session.tracer.mark(x, references[i] if references else None)
    result = None
    try:
        with running(session):
            result = score(*inputs)
            if rewrite is not None and isinstance(result, Tensor):
                assert session.tracer is not None
                refuse_unseen(where, result, session.tracer)
    except Stop as reached:
        if reached.view is not view:
            raise
    error = view.missing()
    if error is not None:
        raise error
    view.say_which_calls()
    return result, [t for _, t in sorted(view.met.items()) if t is not None]


def count_passes(
    where: str, score: Callable[..., Any], inputs: Sequence[Any], places: Sequence[Address]
) -> View:
    """Run a score to its end and return the view that counted how often it passes the places."""
    view = View(where, [Edit(at, "tap") for at in places], False)
    with running(Session((view,))):
        score(*inputs)
    view.met = dict.fromkeys(view.met)  # the counts alone are kept
    return view


def list_passed(score: Callable[..., Any], x: Tensor) -> tuple[Any, list[Passed]]:
    """Run a score on a plain tensor under ordinary autograd and note every place that it passes."""
    session = Session([View("places", (), False)])
    session.listing = []
    with running(session):
        result = score(x)
    return result, session.listing


def visit_marker(z: Tensor, label: str) -> Tensor:
    """Tell the session of a value that carries a name."""
    session = CURRENT.get()
    return z if session is None else session.visit(label, z, "marker")


@contextmanager
def running(session: Session, module: Any = None) -> Iterator[None]:
    """Tell a session of what runs inside this block, and of the inside of a module. Hooks are gone afterwards."""
    tree, compiled = _introduced(session, getattr(module, "_orig_mod", module))
    sides = {e.at.side for view in session.views for e in view.edits}
    everything = session.listing is not None
    # Operations that torch has in the code around or inside: only then every operation is looked at.
    operations = everything or any(may_be_operation(side, session.modules) for side in sides)
    owners = operations or session.tracer is not None
    outer = CURRENT.get()
    # A session nested in another shares its tracer, which is at work already.
    starts = session.tracer is not None and (outer is None or outer.tracer is not session.tracer)
    if session.tracer is not None and any(view.scripted for view in session.views):
        raise NotImplementedError(
            check.problem(
                session.tracer.rewrite.name,
                "a network whose operations can be seen",
                "one with TorchScript in it, which shows nothing of its inside",
                "Use the module that it was made from",
            )
        )
    with ExitStack() as stack:
        token = CURRENT.set(session)
        stack.callback(CURRENT.reset, token)
        if compiled:  # code that module.compile() has made shows nothing of its inside
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if session.tracer is not None and starts:
            stack.enter_context(session.tracer)
            stack.callback(session.tracer.forget)
        if owners:
            session.hidden = frozenset(p for m, p in tree.items() if p and is_builtin_leaf(m))
            for m, path in tree.items():
                stack.callback(m.register_forward_pre_hook(_enter(session, path)).remove)
        for m, path in tree.items():
            if path:
                if everything or path in sides:
                    stack.callback(m.register_forward_pre_hook(_before(session, path)).remove)
                    stack.callback(m.register_forward_hook(_leave(session, path)).remove)
                if f"{path}:in" in sides:
                    hook = m.register_forward_pre_hook(_input(session, path), with_kwargs=True)
                    stack.callback(hook.remove)
        if owners:
            for m in tree:
                stack.callback(m.register_forward_hook(_exit(session), always_call=True).remove)
        if operations:
            stack.enter_context(_Operations(session))
        yield


def _introduced(session: Session, root: Any) -> tuple[dict[nn.Module, str], bool]:
    """Tell a session which modules there are: those that hooks can see, by path, and whether some are compiled."""
    tree: dict[nn.Module, str] = {}
    compiled = False
    if isinstance(root, nn.Module):
        for path, m in root.named_modules(remove_duplicate=False):
            compiled = compiled or getattr(m, "_compiled_call_impl", None) is not None
            known = tree.setdefault(m, path)
            for view in session.views:
                view.modules[path] = known
                if isinstance(m, torch.jit.ScriptModule):
                    view.scripted.add(path)
    tree = {m: path for m, path in tree.items() if not isinstance(m, torch.jit.ScriptModule)}
    session.modules = frozenset(tree.values())
    return tree, compiled


def _enter(session: Session, path: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if session.mine():
            session.owner.append(path)

    return hook


def _exit(session: Session) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if session.mine() and len(session.owner) > 1:
            session.owner.pop()

    return hook


def _before(session: Session, path: str) -> Callable[..., None]:
    def hook(_m: nn.Module, args: Any) -> None:
        if session.mine():
            session.versions.setdefault(path, []).append(_version_of(args))

    return hook


def _leave(session: Session, path: str) -> Callable[..., Any]:
    def hook(m: nn.Module, args: Any, output: Any) -> Any:
        if not session.mine():
            return None
        written = _is_written(args, output, (session.versions.get(path) or [None]).pop())
        call: Call | None = (m.forward, args, {}) if is_builtin_leaf(m) else None
        return session.visit(path, output, "module", written=written, call=call)

    return hook


def _input(session: Session, path: str) -> Callable[..., Any]:
    def hook(_m: nn.Module, args: Any, kwargs: Any) -> Any:
        if not session.mine():
            return None
        if kwargs:
            merged = session.visit(f"{path}:in", {**dict(enumerate(args)), **kwargs}, "input")
            return tuple(merged[i] for i in range(len(args))), {k: merged[k] for k in kwargs}
        return session.visit(f"{path}:in", args, "input"), kwargs

    return hook


class _Operations(TorchFunctionMode):
    """Tells a session of every torch operation in Python code, whoever spelled it how."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        # Modes live in torch's own stack; what they hold must not outlive the run.
        self._session = weakref.ref(session)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = _version_of(args)
        out = func(*args, **(kwargs or {}))
        session = self._session()
        if session is None or not session.mine() or session.silent:
            return out
        name, owner = operation(func), session.owner[-1]
        if not name or owner in session.hidden or not _holds_tensor(out):
            return out
        path = f"{owner}.{name}" if owner else name
        side = f"{path}()" if path in session.modules else path
        call = (func, args, kwargs or {})
        return session.visit(side, out, "operation", written=_is_written(args, out, before), call=call)


def _version_of(args: Any) -> int | None:
    first = args[0] if args else None
    return first._version if isinstance(first, Tensor) and not first.is_inference() else None


def _is_written(args: Any, out: Any, before: int | None) -> bool:
    """Whether what came out is the first argument itself, written to."""
    return before is not None and bool(args) and out is args[0] and bool(out._version != before)


def _holds_tensor(out: Any) -> bool:
    return isinstance(out, Tensor) or (
        isinstance(out, (tuple, list)) and any(isinstance(o, Tensor) for o in out)
    )
