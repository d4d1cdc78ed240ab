"""What ``import esegeta`` takes on top of ``import torch``, in fresh interpreters.

Claim: at most 0.2 seconds (median of seven). Beware of the first run after an installation, which compiles.
"""

import argparse
import statistics
import subprocess
import sys
import time

from _measure import done, progress, table

CODE = """
import time
import torch
start = time.perf_counter()
{}
print(time.perf_counter() - start)
"""


def fresh(line: str) -> tuple[float, float]:
    """Seconds of a whole interpreter, and of the line alone after ``import torch``."""
    start = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "-c", CODE.format(line)], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - start, float(out.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, help="pairs of interpreters (default 7)")
    parser.add_argument("--quick", action="store_true", help="two pairs, to see whether it runs")
    options = parser.parse_args()
    repeats = options.repeats or (2 if options.quick else 7)
    lines = {"torch": "pass", "torch and esegeta": "import esegeta"}
    whole: dict[str, list[float]] = {name: [] for name in lines}
    inside = []
    for line in lines.values():
        fresh(line)  # compiles, and brings the files into memory
    for r in range(repeats):
        for name, line in lines.items():
            progress(f"pair {r + 1} of {repeats}: {name}")
            took, alone = fresh(line)
            whole[name].append(took)
        inside.append(alone)
    done()
    more = [b - a for a, b in zip(whole["torch"], whole["torch and esegeta"], strict=True)]
    rows = [
        ("whole interpreter, difference of the pairs", more, "<= 0.2 s"),
        ("the statement alone, after import torch", inside, "<= 0.2 s"),
    ]
    print(f"import esegeta, {repeats} fresh interpreters each\n")
    table(
        ("seconds", "least", "median", "claim"),
        [(name, f"{min(v):.3f}", f"{statistics.median(v):.3f}", claim) for name, v, claim in rows],
    )


if __name__ == "__main__":
    main()
