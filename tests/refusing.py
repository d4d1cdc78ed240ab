"""Refusals have messages of one shape: what was expected, what there was instead, what to do."""

import pytest


def refused(kind, where, expected, got="", advice=""):
    """The block raises ``kind`` with a message of that shape; the parts are regexes."""
    return pytest.raises(
        kind, match=rf"(?s)^{where}: expected .*{expected}.*, got .*{got}.*\. .*{advice}.*\.$"
    )
