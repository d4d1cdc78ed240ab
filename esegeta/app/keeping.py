"""What the page gives away: the configuration as TOML, as a script, as a command; and what it will cost."""

import json
import shlex
from typing import Any

from esegeta._registry import METHODS
from esegeta.app.state import State
from esegeta.engine import check
from esegeta.run.config import catalogue
from esegeta.run.config.schema import Config

_SCRIPT = '''\
"""Run what the page of `esegeta app` shows."""

import tomllib

from esegeta.run import pipeline

CONFIG = tomllib.loads({text})

if __name__ == "__main__":  # worker processes import this file
    summary = pipeline.run(CONFIG{trust})
    print(summary.counts, summary.folder)
'''

_CLUSTER = """\
#!/usr/bin/env bash
#SBATCH --job-name=esegeta
#SBATCH --cpus-per-task={workers}
#SBATCH --output=%x-%j.txt
# Started again, it does what is not done yet.
{command} --workers "${{SLURM_CPUS_PER_TASK:-{workers}}}" --plain
"""


def written(state: State, how: str) -> tuple[str, str]:
    """Return the state in one of its forms, and the name of a file for it.

    Args:
        state: of the page.
        how: "toml", "python", "command" or "cluster".
    """
    check.one_of("app", "how", how, ("toml", "python", "command", "cluster"))
    if how == "toml":
        return state.text(), "esegeta.toml"
    words = ["esegeta", "run", str(state.file)]
    words += [part for name in state.trust for part in ("--trust", name)]
    command = " ".join(map(shlex.quote, words))
    if how == "command":
        return command, "esegeta.sh"
    if how == "cluster":
        run = state.seen().tables.get("run")
        workers = run.get("workers", 1) if isinstance(run, dict) else 1
        return _CLUSTER.format(
            command=command, workers=workers if isinstance(workers, int) else 1
        ), "esegeta.sh"
    trust = f", trust={list(state.trust)!r}" if state.trust else ""
    return _SCRIPT.format(text=_literal(state.text()), trust=trust), "run_esegeta.py"


def _literal(text: str) -> str:
    """A text as a literal of Python that shows its lines, where that says the same."""
    if '"""' not in text and "\\" not in text and not text.endswith('"'):
        return f'"""\n{text}"""'
    return json.dumps(text)


def costs(config: Config) -> dict[str, Any]:
    """Return how many gradients or values each method of a configuration takes, None where the image decides."""
    found = {}
    for method in config.methods:
        spec = METHODS.find(method.name)
        found[str(method.id)] = {
            "count": catalogue.cost(spec, method.model_dump()),
            "needs": "gradients" if spec.needs == "gradient" else "values",
        }
    return found
