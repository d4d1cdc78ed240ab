"""A test of many cases tries all of them, and fails if one does."""

import pytest
import torch
from together import together


def test_all_are_tried_and_what_fails_is_named():
    tried = []

    @together("a", [1, pytest.param(2, id="two"), 3])
    @together(("b", "c"), [(1, 2), (3, 4)])
    def run(a, b, c, fixture):
        tried.append((a, b, c, fixture))
        if a != 1:
            assert b == 1, "b is three"

    with pytest.raises(
        AssertionError, match=r"(?s)2 of 3 fail.*\[2\] .*1 of 2 fail.*\[3-4\] .*b is three.*\[3\] "
    ):
        run(fixture="f")
    assert tried == [(a, *bc, "f") for a in (1, 2, 3) for bc in ((1, 2), (3, 4))]


def test_random_numbers_begin_anew_and_what_pytest_says_counts():
    drawn = []

    @together("n", range(3), ids=lambda n: f"n is {n}")
    def run(n):
        drawn.append(float(torch.rand(())))
        if n == 1:
            pytest.skip("not this one")
        if n == 2:
            with pytest.raises(ValueError, match="x"):
                pass

    with pytest.raises(AssertionError, match=r"1 of 3 fail:\n\[n is 2\] Failed: DID NOT RAISE"):
        run()
    assert len(set(drawn)) == 1


def test_nothing_and_marks_are_refused():
    with pytest.raises(AssertionError, match="nothing to try"):
        together("n", [])(lambda n: None)()
    with pytest.raises(ValueError, match="without marks"):
        together("n", [pytest.param(1, marks=pytest.mark.slow)])
    with pytest.raises(pytest.skip.Exception, match="none"):
        together("n", [1, 2])(lambda n: pytest.skip("none"))()
