"""One gradient of a global score of a large volume, stitched patch by patch: peak memory and time.

The volume is the real head put side by side with itself until it is large enough, the network the real one, the
score the sum of the brain's logits over where the stitched answer says brain. Each size runs in an interpreter of
its own; *process* is its peak resident set, interpreter and libraries included, *live* what it held before it
read the volume. The whole volume at once is there for contrast, at the sizes given for it. Claim: 384 voxels a
side below 4 GiB. That takes some ten minutes on a quiet core.
"""

import argparse
import json
import subprocess
import sys
import time

from _measure import arguments, done, progress, table
from memory import resident


def child(way: str, side: int, patch: int, overlap: float) -> None:
    """One setting, in this process; prints one line of JSON."""
    import torch

    import esegeta as eg
    from esegeta import zoo

    model = eg.from_module(zoo.brain_extraction_unet())
    before = resident("VmRSS")
    head = zoo.head().data
    copies = [1, *(-(-side // n) for n in head.shape[1:])]
    x = head.repeat(copies)[:, :side, :side, :side].contiguous()
    if way == "stitched":
        model = eg.models.sliding_window(model, patch, overlap)
    start = time.perf_counter()
    score = eg.reducers.predicted_class_sum(model, 1, at=x)
    a = eg.gradient(score)(x)
    took = time.perf_counter() - start
    assert a.shape == x.shape
    assert bool(torch.isfinite(a).all())
    assert bool(a.any())
    print(json.dumps({"process": resident("VmHWM"), "before": before, "seconds": took}))


def main():
    options = arguments(
        __doc__,
        patch={"type": int, "default": 96, "help": "voxels a side of a patch (default 96)"},
        overlap={"type": float, "default": 0.25, "help": "of neighbours (default 0.25)"},
        sides={"type": int, "nargs": "*", "help": "of the volumes (default 128 256 384)"},
        whole={"type": int, "nargs": "*", "help": "of those that are run as a whole too (default 128)"},
    )
    patch = 48 if options.quick else options.patch
    sides = options.sides or ([64, 96] if options.quick else [128, 256, 384])
    whole = options.whole if options.whole is not None else ([64] if options.quick else [128])
    rows = []
    for way, side in [*(("stitched", s) for s in sides), *(("whole", s) for s in whole)]:
        progress(f"{way}, {side} voxels a side")
        command = [sys.executable, __file__, "--child", way, str(side), str(patch), str(options.overlap)]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        if out.returncode:
            if way == "stitched":
                raise RuntimeError(out.stderr[-2000:])
            rows.append((way, side, "", "too much", "", ""))
            continue
        found = json.loads(out.stdout.splitlines()[-1])
        rows.append(
            (
                way,
                side,
                f"{4 * side**3 / 2**20:.0f}",
                f"{found['process'] / 2**20:.0f}",
                f"{found['before'] / 2**20:.0f}",
                f"{found['seconds']:.0f}",
            )
        )
    done()
    print(f"one gradient, patches of {patch} with overlap {options.overlap}\n")
    table(("", "voxels a side", "volume MiB", "process MiB", "before MiB", "seconds"), rows)


if __name__ == "__main__":
    if "--child" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--child", nargs=4)
        way, side, patch, overlap = parser.parse_args().child
        child(way, int(side), int(patch), float(overlap))
    else:
        main()
