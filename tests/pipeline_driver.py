"""``python pipeline_driver.py CONFIG THREADS`` runs a configuration and prints what came of it."""

import json
import sys
from pathlib import Path

import pipeline_parts  # noqa: F401  its methods can be named in the configuration

from esegeta.run import pipeline
from esegeta.run.config import loading as config

if __name__ == "__main__":
    found = config.load(sys.argv[1], trust=[str(Path(__file__).parent)])
    summary = pipeline.run(found, threads=int(sys.argv[2]), progress=True)
    told = {"code": summary.exit_code, "counts": summary.counts, "repeated": summary.repeated}
    print(json.dumps(told))
    sys.exit(summary.exit_code)
