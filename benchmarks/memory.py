"""Peak memory against the number of steps or samples: more of them may take longer, never more memory.

Each setting runs in an interpreter of its own, after one gradient has been computed there. *Process* is by
how much the resident set then grows at its peak, the kernels' workspaces included; *live* is the peak of live
tensors (``esegeta.engine.memory.Live``), exact and without them, from another interpreter. Captum runs at its
defaults, all steps at once, for contrast. Claim: many over few is within 5 %.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from _measure import arguments, done, progress, setting, table

STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at the peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_the_peak() -> None:
    """Start a new peak at what is resident now; where the system does not allow it, the old one stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak of the warm-up could not be reset", file=sys.stderr)


def child(what: str, count: int, size: int, measure: str) -> None:
    """One setting, in this process; prints one line of JSON."""
    import torch
    from captum.attr import IntegratedGradients, NoiseTunnel, Saliency

    import esegeta as eg
    from _measure import real_task
    from esegeta.engine.memory import Live

    task = real_task(size)
    batch = task.x[None].clone().requires_grad_()
    runs = {
        "integrated gradients": lambda: eg.integrated_gradients(task.score, steps=count)(
            task.x, task.baseline
        ),
        "SmoothGrad": lambda: eg.smooth(eg.gradient(task.score), samples=count)(task.x, key=0),
        "captum integrated gradients": lambda: IntegratedGradients(task.forward).attribute(
            batch, n_steps=count
        ),
        "captum SmoothGrad": lambda: NoiseTunnel(Saliency(task.forward)).attribute(
            batch, nt_samples=count, stdevs=0.1
        ),
    }
    if what.startswith("captum"):
        torch.autograd.grad(task.forward(batch).sum(), batch)
    else:
        eg.gradient(task.score)(task.x)
    if measure == "live":
        with Live() as live:
            runs[what]()
        found = live.peak
    else:
        forget_the_peak()
        before = resident("VmRSS")
        runs[what]()
        found = resident("VmHWM") - before
    print(json.dumps(found))


def measured(what: str, count: int, size: int, measure: str) -> int | None:
    command = [sys.executable, __file__, "--child", what, str(count), str(size), measure]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        # Captum's defaults may take more than there is: the kernel ends the child, or torch says so.
        if not what.startswith("captum"):
            raise RuntimeError(f"{what} with {count}: {out.stderr[-2000:]}")
        return None
    return json.loads(out.stdout.splitlines()[-1])


def main():
    options = arguments(__doc__, size=64, repeats=3)
    few, many = (8, 32) if options.quick else (8, 256)
    contrast = (4, 8) if options.quick else (8, 32)
    settings = [
        *((what, n) for what in ("integrated gradients", "SmoothGrad") for n in (few, many)),
        *((what, n) for what in ("captum integrated gradients", "captum SmoothGrad") for n in contrast),
    ]
    found: dict[tuple[str, int, str], float] = {}
    rows = []
    for what, n in settings:
        row: list[object] = [what, n]
        for measure in ("process", "live"):
            progress(f"{what}, {n}, {measure}")
            # Live memory is the same every time; what the process takes is not quite.
            times = options.repeats if measure == "process" and not what.startswith("captum") else 1
            values = [measured(what, n, options.size, measure) for _ in range(times)]
            kept = [v for v in values if v is not None]
            if kept:
                found[what, n, measure] = statistics.median(kept)
            row.append(f"{statistics.median(kept) / 2**20:.0f}" if kept else "too much")
        rows.append(row)
    done()
    print(f"peak memory in MiB, {setting(options)}\n")
    table(("", "number", "process", "live"), rows)
    rows = []
    pairs = [("integrated gradients", few, many, "0.95 to 1.05"), ("SmoothGrad", few, many, "0.95 to 1.05")]
    pairs += [("captum integrated gradients", *contrast, ""), ("captum SmoothGrad", *contrast, "")]
    for what, a, b, claim in pairs:
        row = [f"{what}, {b} / {a}"]
        for measure in ("process", "live"):
            low, high = found.get((what, a, measure)), found.get((what, b, measure))
            row.append(f"{high / low:.3f}" if low and high else "-")
        rows.append((*row, claim))
    table(("ratio", "process", "live", "claim"), rows)


if __name__ == "__main__":
    if "--child" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--child", nargs=4)
        what, count, size, measure = parser.parse_args().child
        child(what, int(count), int(size), measure)
    else:
        main()
