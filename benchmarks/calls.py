"""Two checkouts side by side: Python calls and time of one explanation.

Each checkout runs in a process of its own, and one round asks both for the same explanation, one right after the
other, so that whatever else the machine does meets both. Claim of a change that only tidies: not more calls, and
the median of the ratios of times within 10 %.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from _measure import arguments, table

WORKER = """
import json, sys, time, warnings
import torch
import esegeta as eg
from esegeta import zoo

warnings.simplefilter("ignore")
torch.set_num_threads(1)
size = int(sys.argv[1])
x = torch.linspace(-1, 1, size * size).reshape(1, size, size).sin()
score = eg.reducers.class_sum(eg.from_module(zoo.small_unet(2)), 1)
methods = {
    "gradient": (eg.gradient(score), ()),
    "integrated_gradients": (eg.integrated_gradients(score, steps=8), (0 * x,)),
    "guided_backprop": (eg.guided_backprop(score), ()),
    "occlusion": (eg.occlusion(score, size=size // 4), (0 * x,)),
}

def count(explain, refs):
    calls = 0
    def see(frame, event, argument):
        nonlocal calls
        calls += event == "call"
    sys.setprofile(see)
    explain(x, *refs)
    sys.setprofile(None)
    return calls

for line in sys.stdin:
    name, what = line.split()
    explain, refs = methods[name]
    if what == "calls":
        explain(x, *refs), explain(x, *refs)  # what is found out once
        answer = count(explain, refs)
    else:
        start = time.perf_counter()
        explain(x, *refs)
        answer = time.perf_counter() - start
    print(json.dumps(answer), flush=True)
"""
METHODS = ("gradient", "integrated_gradients", "guided_backprop", "occlusion")


class Checkout:
    """A process that explains with the package of one folder."""

    def __init__(self, folder: Path, size: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
        )

    def ask(self, method: str, what: str) -> float:
        """Have one explanation made: its "calls" or its "seconds"."""
        self.process.stdin.write(f"{method} {what}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def main() -> None:
    options = arguments(
        __doc__, size=64, repeats=30, other={"help": "folder of the other checkout", "required": True}
    )
    here, other = (Checkout(p, options.size) for p in (Path(__file__).parents[1], Path(options.other)))
    rows = []
    for method in METHODS:
        calls = [int(c.ask(method, "calls")) for c in (here, other)]
        ratios = []
        for i in range(options.repeats):
            order = (here, other) if i % 2 else (other, here)  # nobody always goes first
            taken = {id(c): c.ask(method, "seconds") for c in order}
            ratios.append(taken[id(here)] / taken[id(other)])
        ratios.sort()
        middle = statistics.median(ratios)
        quartiles = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        rows.append((method, *calls, f"{middle:.2f}", f"{quartiles[0]:.2f} to {quartiles[1]:.2f}"))
    for checkout in (here, other):
        checkout.process.stdin.close()
        checkout.process.wait()
    table(("method", "calls here", "calls there", "time, here / there", "middle half"), rows)


if __name__ == "__main__":
    main()
