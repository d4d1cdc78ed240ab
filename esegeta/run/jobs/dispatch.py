"""What a worker calls for a job of any kind. Everything that it needs comes as JSON."""

import warnings
from typing import Any

from esegeta.engine.refusals import Refused, one_line
from esegeta.run.config import plugins, trust
from esegeta.run.config.schema import Config
from esegeta.run.executors.child import Context
from esegeta.run.jobs import kinds
from esegeta.run.jobs.inputs import Inputs
from esegeta.run.jobs.kinds import Job, Record
from esegeta.run.jobs.plan import clear

MAIN, EXAMINE = f"{__name__}:main", f"{__name__}:examine"


def payload_of(job: Job, config: Config, *, redraw: bool = False) -> Record:
    """Return what a worker is given for a job: also which code it may run, and which plugins bring its kind."""
    code = {"plugins": list(config.plugins), "trust": config.trust.json()}
    return {**code, **job.payload, "redraw": redraw}


def _kind_of(payload: Record) -> kinds.Kind:
    """The kind of a job, which a plugin may have to bring first."""
    plugins.load(
        payload.get("plugins", ()), trust.from_json(payload["trust"]) if "trust" in payload else trust.NOTHING
    )
    return kinds.find(payload["kind"])


def main(payload: Record, context: Context) -> Record:
    """Do a job and return its record; warnings go to the log."""
    kind = _kind_of(payload)
    work = kind.work
    if payload.get("redraw") and kind.redraw is not None:
        work = kind.redraw
    elif "folder" in payload:
        clear(payload["id"], payload["folder"])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: context.note(" ".join(str(message).split()))
        return work(payload, Inputs(payload, context), context)


def examine(payloads: list[Record], context: Context) -> dict[str, Any]:
    """Say of jobs without doing them: the shape of the image, memory, and what would be refused."""
    found = {}
    for payload in payloads:
        try:
            look = _kind_of(payload).examine
        except Refused as error:  # its plugin may not run
            found[payload["id"]] = {"problem": one_line(error)}
        else:
            found[payload["id"]] = {} if look is None else look(payload, context)
    return found
