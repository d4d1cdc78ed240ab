"""Networks compiled by torch for whoever asks for it, without a trace on the network itself.

What is compiled is a twin: a copy of the modules that shares the storage of parameters and buffers. Its parameters
ask for no gradient, because a compiled backward run computes all gradients that anybody could want, and explanations
want that of the input only. It is compiled for the first size, then once more for other sizes.
"""

import contextlib
import copy
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from esegeta.engine import check

_ADVICE = "Leave execution(compile=True) away for it"
_COMPILER = (
    "Install one (g++ or clang++) or name it in the environment variable CXX, or leave compile=True away"
)


class Compiled:
    """The compiled twin of a network, made at its first call and again when the network was changed since."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._seen: list[Any] | None = None
        self._run: Callable[..., Any] | None = None

    def __call__(self, module: Callable[..., Any], tree: list[nn.Module], *arguments: Any) -> Any:
        """Run the twin of ``module``; ``tree`` are the modules that it consists of, as they are now."""
        seen = _fingerprint(tree)
        if self._run is None or self._seen is None or not _same(seen, self._seen):
            self._run, self._seen = self._made(module), seen
        with refusing(self.name):
            return self._run(*arguments)

    def _made(self, module: Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(module, torch.jit.ScriptModule):
            raise _refused(self.name, TypeError("TorchScript is compiled already"))
        try:
            twin = _twin(module)
        except Exception as error:  # copies are made by code of the network
            raise _refused(self.name, error) from error

        def run(*arguments: Any) -> Any:
            return twin(*arguments)

        # Torch keeps what it has compiled, and counts how often, at the code object: each network has its own.
        own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
        return torch.compile(own, fullgraph=True)


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """Refuse a network whose compiling fails inside: forward in its call, backward in the first gradient."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException, TorchRuntimeError
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        yield
    except TorchRuntimeError:
        raise  # an error of the network itself, which plain calls have as well
    except (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler) as error:
        if _because_of(error, InvalidCxxCompiler):
            raise check.refused(name, "a C++ compiler to compile with", "none", _COMPILER) from error
        raise _refused(name, error) from error


def _refused(name: str, error: BaseException) -> ValueError:
    error = getattr(error, "inner_exception", error)
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return check.refused(
        name,
        "a network that torch.compile takes as a whole",
        f"{type(error).__name__} ({textwrap.shorten(said, 160, placeholder=' ...')})",
        _ADVICE,
    )


def usable() -> bool:
    """Return whether compiled code may run here: nobody watches the operators that it would hide.

    >>> usable()
    True
    """
    return not (torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


def _twin(module: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy that shares values with the network and asks for no gradient of its parameters."""
    if not isinstance(module, nn.Module):
        return module
    shared: dict[int, Any] = {id(b): b for b in module.buffers()}
    for p in module.parameters():
        shared[id(p)] = nn.Parameter(p.detach(), requires_grad=False)
    return copy.deepcopy(module, shared)


def _fingerprint(tree: list[nn.Module]) -> list[Any]:
    """Return the objects that a network consists of: another one in a place is another network."""
    found: list[Any] = []
    for m in tree:
        found.append(m)
        for value in vars(m).values():
            found.extend(value.values() if isinstance(value, dict) else (value,))
    return found


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, str)) and a == b)


def _because_of(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error is of a kind, or was raised because of one."""
    while error is not None:
        if isinstance(error, kind) or isinstance(getattr(error, "inner_exception", None), kind):
            return True
        error = error.__cause__ or error.__context__
    return False
