"""One name for all spellings of an operation, and what its name says of it."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# What moves, copies or looks at a tensor makes no new value, and Python's own spelling of operators.
_SILENT = frozenset(
    {
        "backward",
        "bfloat16",
        "clone",
        "contiguous",
        "cpu",
        "cuda",
        "delitem",
        "detach",
        "dim",
        "double",
        "empty_like",
        "float",
        "full_like",
        "get",
        "half",
        "item",
        "new_empty",
        "new_full",
        "new_ones",
        "new_tensor",
        "new_zeros",
        "numpy",
        "ones_like",
        "rand_like",
        "randn_like",
        "register_hook",
        "requires_grad",
        "retain_grad",
        "set",
        "setitem",
        "size",
        "to",
        "tolist",
        "type",
        "type_as",
        "zeros_like",
    }
)
_SPELLED = {"truediv": "div", "rtruediv": "div", "multiply": "mul", "true_divide": "div", "divide": "div"}
_SPELLED |= {p + n: n for p in "ir" for n in ("add", "sub", "mul", "pow", "matmul")} | {"itruediv": "div"}


def operation(func: Any) -> str:
    """Return one name for all spellings of an operation; nothing for what makes no new value.

    >>> [operation(f) for f in (torch.relu, torch.Tensor.relu_, torch.Tensor.__iadd__, torch.Tensor.size)]
    ['relu', 'relu', 'add', '']
    """
    name = getattr(func, "__name__", "").split(".")[0].strip("_")
    name = _SPELLED.get(name, name)
    return "" if name in _SILENT or name.startswith(("is_", "has_")) else name


# Layers and operations with f(c z) = c f(z) for c > 0: nothing is added, and there is no need to look.
_HOMOGENEOUS = re.compile(
    r"(ReLU|LeakyReLU|(Adaptive)?(Max|Avg)Pool\dd|(Alpha)?Dropout\dd?|Identity|Upsample|Flatten|PixelShuffle)"
    r"|relu|leaky_relu|(adaptive_)?(max|avg)_pool\dd|dropout|interpolate|getitem|cat|stack|reshape|view|flatten|permute"
)


def is_homogeneous(function: Callable[..., Any]) -> bool:
    """Return whether a layer or an operation adds nothing."""
    owner = getattr(function, "__self__", None)
    name = type(owner).__name__ if isinstance(owner, nn.Module) else operation(function)
    return _HOMOGENEOUS.fullmatch(name) is not None


def may_be_operation(side: str, modules: frozenset[str]) -> bool:
    """Return whether a place that is no module has the name of an operation of torch."""
    if side in modules or side.endswith(":in"):
        return False
    name = side.rpartition(".")[2].removesuffix("()")
    return any(hasattr(home, name) for home in (torch, nn.functional, Tensor, torch.ops.aten)) or hasattr(
        Tensor, f"__{name}__"
    )


def is_builtin_leaf(m: nn.Module) -> bool:
    """Return whether a module is a layer of torch: one place, not the operations it is made of."""
    parts = set(m._modules) - {"parametrizations"}
    return type(m).__module__.startswith(("torch.nn.", "torch.ao.")) and not parts
