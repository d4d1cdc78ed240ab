"""The contract, on every method under test."""

import pytest

from esegeta.conformance import contract
from esegeta.conformance.subjects import Subject


def test_contract(subject: Subject, check: str) -> None:
    """Shape, dtype, purity, repeatability, batches, chunks, derivatives, precision, keys."""
    reason = contract.inapplicable(check, subject)
    if reason:
        pytest.skip(reason)
    contract.check(check, subject)
