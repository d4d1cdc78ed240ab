"""Equality of what was computed in two ways: bit for bit it depends on the processor and the number of threads.

A convolution that finds its input in another memory layout, in another batch or at another address, may take another
kernel, which adds the same products up in another order. So ``torch.equal`` is for values that nothing was computed
with, and for the same call made twice.
"""

import torch

# A sum of n terms errs by less than n units in the last place of its largest partial sum, and by some sqrt(n) of them
# as a rule: this is for the depth of the networks here, of some thousand terms a value.
UNITS = 64


def alike(a, b, size=0.0, units=UNITS):
    """Whether two tensors differ by rounding only: a few units in the last place of the largest value.

    size: of what was added up, where it is larger than the sum.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    if not a.numel():
        return True
    largest = max(float(a.detach().abs().max()), float(b.detach().abs().max()), float(size))
    return float((a - b).detach().abs().max()) <= units * torch.finfo(a.dtype).eps * largest


def assert_alike(a, b, size=0.0, units=UNITS):
    """The same, as an assertion that says how far apart they are."""
    if not alike(a, b, size, units):
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # it describes the difference
        raise AssertionError(f"{a} and {b} differ")


def close(a, b, tolerance=1e-12, least=1.0):
    """Assert that two tensors, or tuples of them, differ by at most this share of the largest value that is expected.

    least: what the largest value counts for at least, so that zeros have a tolerance, too.
    """
    if isinstance(b, (tuple, list)):
        for one, other in zip(a, b, strict=True):
            close(one, other, tolerance, least)
        return
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    finite = b.detach()[b.isfinite()]
    sizes = (finite if b.is_complex() else finite.double()).abs()
    largest = max(float(sizes.max()) if sizes.numel() else 0.0, least)
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * largest)
