"""What a run takes on top of its computation: many scans and cheap methods against a loop that explains the same.

Claim: at most 3 times the loop with two workers and without figures, 6 times with them; an unchanged run that is
started again takes less than 2 seconds on top of its imports. All are whole processes, started anew: the interpreter
with torch and the loading of the network are in both. The loop keeps nothing: it writes no map, no table, no record.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import torch

from _measure import done, progress, ratio_table, table
from esegeta import zoo

METHODS = ["gradient", "input_x_gradient", "guided_backprop", "grad_cam", "integrated_gradients"]
CONFIG = """
[model]
source = "zoo:brain_extraction_unet"
[input]
files = "sub-*.nii.gz"
[[targets]]
name = "brain"
class = 1
reducer = "class_sum"
{methods}
[run]
output = "{output}"
workers = {workers}
[output]
figures = {figures}
report = {figures}
"""
LOOP = """
import nibabel, torch, pathlib, sys
import esegeta as eg
from esegeta import zoo
net = zoo.brain_extraction_unet()
model = eg.from_module(net)
for path in sorted(pathlib.Path(sys.argv[1]).glob("sub-*.nii.gz")):
    x = torch.from_numpy(nibabel.load(path).get_fdata(dtype="float32"))[None]
    score = eg.reducers.class_sum(model, 1)
    eg.gradient(score)(x)
    eg.input_x_gradient(score)(x)
    eg.guided_backprop(score)(x)
    eg.grad_cam(score, sys.argv[2])(x)
    eg.integrated_gradients(score, steps=8)(x, torch.zeros_like(x))
"""
PLACE = "encoder.0.relu_b"
START = "import torch, esegeta.cli, esegeta.run.pipeline; from esegeta.run.jobs import kinds; kinds.known()"


def study(folder: Path, scans: int, size: int, workers: int) -> None:
    """Write scans, which are parts of the head, and a configuration without and one with figures."""
    head = zoo.head().data[0]
    middle = (min(head.shape) - size) // 2
    for number in range(scans):
        start = middle - scans // 2 + number
        part = head[start : start + size, start : start + size, start : start + size]
        nibabel.Nifti1Image(part.numpy(), torch.eye(4).numpy()).to_filename(
            folder / f"sub-{number:02}.nii.gz"
        )
    more = {
        "grad_cam": f'place = "{PLACE}"',
        "integrated_gradients": 'baseline = "zero"\nparameters = { steps = 8 }',
    }
    methods = "\n".join(f'[[methods]]\nname = "{name}"\n{more.get(name, "")}' for name in METHODS)
    for name, figures in (("plain", "false"), ("figures", "true")):
        text = CONFIG.format(methods=methods, output=f"out_{name}", workers=workers, figures=figures)
        (folder / f"{name}.toml").write_text(text)


def seconds(*command: str) -> float:
    """How long a process takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=int, default=20)
    parser.add_argument("--size", type=int, default=32, help="voxels a side")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="rounds (default 3)")
    parser.add_argument(
        "--quick", action="store_true", help="two scans and one round, to see whether it runs"
    )
    options = parser.parse_args()
    scans, repeats = (2, 1) if options.quick else (options.scans, options.repeats or 3)
    names = ["imports alone", "loop", "run", "run again", "run with figures"]
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            study(Path(folder), scans, options.size, options.workers)
            run = ("-m", "esegeta", "run", "--plain")
            commands = {
                "imports alone": ("-c", START),
                "loop": ("-c", LOOP, folder, PLACE),
                "run": (*run, f"{folder}/plain.toml"),
                "run again": (*run, f"{folder}/plain.toml"),
                "run with figures": (*run, f"{folder}/figures.toml"),
            }
            for name, command in commands.items():
                progress(f"round {number + 1} of {repeats}: {name}")
                found[name].append(seconds(*command))
    done()
    pairs = [
        ("run", "loop", "at most 3"),
        ("run with figures", "loop", "at most 6"),
        ("run again", "loop", ""),
    ]
    ratio_table(found, pairs)
    again = min(found["run again"]) - min(found["imports alone"])
    table(("what", "seconds", "claim"), [("run again, on top of its imports", f"{again:.2f}", "below 2")])


if __name__ == "__main__":
    main()
