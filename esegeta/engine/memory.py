"""What a computation occupies: measured while it runs, or forecast without running it."""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# On CPU a network is no faster per example in large batches (measured on a 3-D U-Net from 32 to 96 voxels a
# side), once a batch is large enough to hide the overhead of calling it. More would only cost memory.
CPU_TARGET = 128 * 2**20
# Of the free memory of a GPU: the rest is for convolution workspaces and fragmentation.
GPU_SHARE = 0.4

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


_running: ContextVar["tuple[Live, ...]"] = ContextVar("esegeta_live", default=())


class Live(TorchDispatchMode):
    """Counts the bytes of live storages that are allocated inside; ``peak`` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    @staticmethod
    def running() -> "tuple[Live, ...]":
        """Return those that count in this context, for work that moves to another thread."""
        return _running.get()

    def __enter__(self) -> "Live":
        _running.set((*_running.get(), self))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _running.set(_running.get()[:-1])
        super().__exit__(*error)

    def _freed(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size

    def _note(self, tree: Any, allocated: bool) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                address = storage._cdata
                if address not in self._known:
                    size = storage.nbytes() if allocated else 0
                    self._known.add(address)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, address, size).atexit = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note what it allocated: not what came in, of which the result may be a view."""
        self._note((args, kwargs), allocated=False)
        out = func(*args, **(kwargs or {}))
        self._note(out, allocated=True)
        return out


def forecast(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Return peak bytes that ``fn(*args)`` would allocate, from a dry run on tensors without values.

    Takes about a tenth of a second whatever the size, and predicts live tensors exactly; libraries'
    workspaces come on top. Streams run only their first chunk. Code that looks at values (``.item()``)
    cannot be forecast and raises what torch raises there.

    Example:
        >>> import torch
        >>> forecast(lambda x: (x + 1) * 2, torch.zeros(256))
        2048
    """
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args, kwargs = tree_map(
            lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        with Live() as live:
            fn(*args, **kwargs)
    return live.peak


def without_values(fn: Callable[[Tensor], Any], like: Tensor) -> Any:
    """Return what ``fn`` returns for an input of this size, as tensors that have a size but no values.

    >>> import torch
    >>> without_values(lambda x: torch.cat([x, x]), torch.zeros(3)).shape
    torch.Size([6])
    """
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        return fn(torch.empty(like.shape, dtype=like.dtype, device=like.device))


_dry: ContextVar[bool] = ContextVar("esegeta_dry", default=False)


class _Answered(logging.Filter):
    """Drops what torch logs of an operator that refuses a size in a dry run: who asked gets the error itself."""

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002
        return not _dry.get()


logging.getLogger("torch._subclasses.fake_tensor").addFilter(_Answered())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the traceback that torch logs in a failed dry run off the terminal, in this thread."""
    token = _dry.set(True)
    try:
        yield
    finally:
        _dry.reset(token)


def budget(device: torch.device, asked: int | None) -> int:
    """Return bytes that one chunk may occupy."""
    if asked is not None:
        return asked
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(GPU_SHARE * (free + cached))
    return CPU_TARGET


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device."""
    return isinstance(error, OUT_OF_MEMORY) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def release(device: torch.device) -> None:
    """Give cached blocks back before a smaller attempt."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
