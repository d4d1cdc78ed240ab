"""What a worker calls for a job of any kind. Everything that it needs comes as JSON."""

import warnings
from typing import Any

from esegeta.run.executors.child import Context
from esegeta.run.jobs import kinds
from esegeta.run.jobs.inputs import Inputs
from esegeta.run.jobs.kinds import Record

MAIN, EXAMINE = f"{__name__}:main", f"{__name__}:examine"


def main(payload: Record, context: Context) -> Record:
    """Do a job and return its record; warnings go to the log."""
    kind = kinds.find(payload["kind"])
    work = kind.redraw if payload.get("redraw") and kind.redraw is not None else kind.work
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: context.note(" ".join(str(message).split()))
        return work(payload, Inputs(payload, context), context)


def examine(payloads: list[Record], context: Context) -> dict[str, Any]:
    """Say of jobs without doing them: the shape of the image, memory, and what would be refused."""
    found = {}
    for payload in payloads:
        look = kinds.find(payload["kind"]).examine
        found[payload["id"]] = {} if look is None else look(payload, context)
    return found
