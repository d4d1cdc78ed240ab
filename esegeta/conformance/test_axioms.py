"""Every axiom, on every method under test."""

from typing import Any

import pytest

from esegeta.conformance.kinds import AnySubject
from esegeta.conformance.subjects import Subject
from esegeta.conformance.verify import verify


def test_axiom(subject: AnySubject, axiom: str, search: dict[str, Any]) -> None:
    """What a subject claims holds on every case; a method that claims nothing is measured by every axiom."""
    verdict = verify(subject, axioms=[axiom], **search)[axiom]
    if verdict.kind == "not applicable" and not verdict.claimed:
        pytest.skip(verdict.why)
    declares = not isinstance(subject, Subject) or subject.declares
    if declares and not verdict.claimed:
        pytest.skip("not claimed" if verdict.kind == "violated" else f"not claimed, but {verdict}")
    assert verdict.kind == "holds", str(verdict)
