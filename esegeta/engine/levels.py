"""What encloses the running code: which ``torch.func`` transforms, and what lies under their wrappers.

The one place that reads functorch's interpreter stack.
"""

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_unwrapped,
    is_functorch_wrapped_tensor,
)
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._subclasses.fake_tensor import FakeTensor


def differentiating() -> bool:
    """Return whether an enclosing ``grad``, ``vjp`` or ``jvp`` may differentiate what is computed now."""
    return any(
        level.key() in (TransformType.Grad, TransformType.Jvp)
        for level in retrieve_all_functorch_interpreters()
    )


def depth() -> int:
    """Return how many ``torch.func`` transforms enclose the running code."""
    return len(retrieve_all_functorch_interpreters())


def mapped() -> int:
    """Return how many examples the enclosing ``vmap`` levels run at once (1 outside of any).

    >>> import torch
    >>> seen = []
    >>> _ = torch.func.vmap(lambda x: seen.append(mapped()) or x)(torch.zeros(3))
    >>> mapped(), seen
    (1, [3])
    """
    total = 1
    for level in retrieve_all_functorch_interpreters():
        if level.key() == TransformType.Vmap:
            total *= level.batch_size()  # type: ignore[attr-defined]
    return total


def base(tensor: Tensor) -> Tensor:
    """Return the ordinary tensor under all functorch wrappers: every example of the batch, no derivative.

    Reading it leaks nothing: it is used to *look* at values (are they finite?), never to compute with them.
    """
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def watched(tensor: Tensor) -> bool:
    """Return whether an enclosing ``grad`` or ``vjp``, or ordinary autograd, may ask for a gradient of this tensor.

    >>> import torch
    >>> seen = []
    >>> _ = torch.func.grad(lambda x: (seen.append((watched(x), watched(torch.ones(1)))), x)[1])(torch.ones(()))
    >>> seen
    [(True, False)]
    """
    while is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = get_unwrapped(tensor)
    return tensor.requires_grad


def differentiated(tensor: Tensor) -> bool:
    """Return whether an enclosing ``grad`` or ``vjp`` differentiates through this tensor.

    Unlike ``watched`` it is not so for a weight that ordinary autograd alone watches.
    """
    while is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = get_unwrapped(tensor)
    return False


def wrapped(tensor: Tensor) -> bool:
    """Return whether a functorch transform stands between this tensor and its values."""
    return is_functorch_wrapped_tensor(tensor)


def fake(tensor: Tensor) -> bool:
    """Return whether the tensor has a shape but no values, as in a dry run."""
    return isinstance(base(tensor), FakeTensor)


def finite(tensor: Tensor) -> bool:
    """Return whether a plain tensor holds neither NaN nor infinity; in a dry run it has no values and passes."""
    return fake(tensor) or bool(torch.isfinite(tensor.detach()).all())


def true_anywhere(condition: Tensor) -> bool:
    """Return whether a boolean tensor is true for any element of any example, seen through every wrapper.

    The only sanctioned way for an error check to look at values. In a dry run nothing has a value,
    and the answer is False.

    >>> import torch
    >>> def f(x):
    ...     return x * 0 if true_anywhere(x > 2) else x
    >>> torch.func.vmap(f)(torch.tensor([1., 3.])).tolist()
    [0.0, 0.0]
    """
    if fake(condition):
        return False
    with torch.no_grad():
        return bool(base(condition).any())
