"""Many small cases as one test, which tries all of them and says which fail."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch


def together(names: str | Iterable[str], cases: Iterable[Any], ids: Any = None) -> Callable[[Any], Any]:
    """Like ``pytest.mark.parametrize``, for cases that are too small to be tests of their own.

    Fixtures are those of the one test. Random numbers begin anew with each case, as they do with each test.
    """
    names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    rows = list(map(_row, cases))

    def change(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def try_all(**fixtures: Any) -> None:
            failed: list[tuple[str, BaseException]] = []
            skipped: list[str] = []
            assert rows, "there is nothing to try"
            for number, values in enumerate(rows):
                if len(names) == 1:
                    values = (values,)
                torch.manual_seed(0)
                try:
                    test(**dict(zip(names, values, strict=True)), **fixtures)
                except pytest.skip.Exception as reason:
                    skipped.append(str(reason))
                except (Exception, pytest.fail.Exception) as error:
                    failed.append((_title(ids, number, values), error))
            if failed:
                told = "\n".join(f"[{name}] {type(e).__name__}: {e}" for name, e in failed)
                raise AssertionError(f"{len(failed)} of {len(rows)} fail:\n{told}") from failed[0][1]
            if len(skipped) == len(rows):
                pytest.skip(skipped[0])

        signature = inspect.signature(test)
        left = [p for name, p in signature.parameters.items() if name not in names]
        try_all.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return try_all

    return change


def _row(case: Any) -> Any:
    if not hasattr(case, "marks"):
        return case
    if case.marks:
        raise ValueError(f"together: expected cases without marks, got {case}. Make it a test of its own.")
    return case.values if len(case.values) > 1 else case.values[0]


def _title(ids: Any, number: int, values: Any) -> str:
    if callable(ids):
        return "-".join(str(ids(v)) for v in values)
    if ids is not None:
        return str(list(ids)[number])
    return "-".join(getattr(v, "__name__", None) or str(v)[:60] for v in values)
