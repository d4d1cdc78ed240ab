"""Configurations to begin with: one with comments for ``esegeta init``, and that of ``esegeta demo``."""

import json
from pathlib import Path
from typing import Any

from esegeta.zoo.volumes import DATA

HEAD = DATA / "colin27_t1_128.nii.gz"

TEXT = """\
# What esegeta explains, and how. Run it with:   esegeta run {name}
# Look at what it would do first with:            esegeta run {name} --dry-run
# Paths are relative to the folder of this file. `esegeta methods` lists what can stand here.

# Python files beside this one that register methods of your own:
# plugins = ["my_methods.py"]

[model]
# "zoo:name", "package.module:factory", a file .pt2 (torch.export.save) or .ts (TorchScript).
source = "zoo:brain_extraction_unet"
# For a network of your own, in the file mynet.py beside this one (from elsewhere it needs --trust):
# source = "mynet:build"
# arguments = {{ channels = 1, classes = 4 }}
# weights = "weights.safetensors"         # or a state dict .pt, .pth
# output = "logits"                       # which result, if there are several: a key, an index, or a list of both

[input]
# A pattern, or a list of patterns; a list in the list holds the channels of one subject:
# files = "scans/*.nii.gz"
# files = [["sub-01_T1w.nii.gz", "sub-01_T2w.nii.gz"]]
files = {head}   # a head that comes with esegeta
# Steps in order. The maps are brought back to the grid of the file.
preprocess = [
    {{ step = "resize", shape = 64 }},
    {{ step = "normalise", how = "maximum" }},
    # {{ step = "reorient", to = "RAS" }},
    # {{ step = "resample", spacing = [1, 1, 1] }},
]

# What is explained: a scalar made of the network's output. Several tables [[targets]] are shown side by side.
[[targets]]
name = "brain"
reducer = "predicted_class_sum"           # the class's scores, where the class is predicted
class = 1

# How. Each method runs in a process of its own. `esegeta methods NAME` says what it is and which parameters it has.
[[methods]]
name = "gradient"

[[methods]]
name = "integrated_gradients"
parameters = {{ steps = 16 }}
# baseline = {{ name = "blurred", sigma = 5 }}     # instead of the one in [run]

[[methods]]
name = "gradient"
id = "smoothgrad"                         # a name for a second entry of one method
transforms = [{{ name = "smooth", noise = 0.05, samples = 8 }}]

[[methods]]
name = "grad_cam"
place = "encoder.2.relu_b"                # `esegeta places {name} --shape 1,64,64,64` lists the places

[[methods]]
name = "occlusion"
parameters = {{ size = 16, stride = 16 }}
deadline = 120                            # seconds, instead of the one in [run]

# Is a map any good? `esegeta methods` lists the metrics; the maps that are there are judged.
# [[metrics]]
# metric = "deletion"
# parameters = {{ steps = 16 }}
# null = "surrogate"                      # random maps beside each
# draws = 9
#
# [[metrics]]
# metric = "relevance_mass"
# mask = "prediction"                     # or "reference", or a pattern of files

[run]
output = "results"                        # a folder; what is finished there is not done again
baseline = "zero"                         # for every method that needs one
workers = 2                               # processes at once
deadline = 600                            # seconds for each method
memory = "8 GiB"                          # for each method
key = 0                                   # of everything that is random
# devices = ["cuda:0", "cuda:1"]          # default: ["cpu"]
# per_device = 1                          # processes on one GPU
# precision = "bfloat16"                  # default: "float32"; reduced precision changes results

[output]
nifti = true
figures = true
tables = true
report = true
"""


def text(name: str = "esegeta.toml") -> str:
    """Return the configuration with comments; it can run as it is.

    >>> import tomllib
    >>> tomllib.loads(text())["model"]["source"]
    'zoo:brain_extraction_unet'
    """
    return TEXT.format(name=name, head=json.dumps(str(HEAD)))


def demo(output: str, size: int = 64, workers: int = 2) -> dict[str, Any]:
    """Return the configuration of the demonstration: methods of all families on the real network and head.

    Args:
        output: the folder.
        size: voxels a side.
        workers: processes at once.
    """
    deep, last = "encoder.2.relu_b", "decoder.2.relu"
    parts = {"name": "supervoxels", "count": 12}
    methods: list[dict[str, Any]] = [
        {"name": "gradient"},
        {
            "name": "gradient",
            "id": "smoothgrad",
            "title": "SmoothGrad",
            "transforms": [{"name": "smooth", "noise": 0.05, "samples": 8}],
        },
        {"name": "guided_backprop"},
        {"name": "input_x_gradient"},
        {"name": "adaptive_integrated_gradients", "parameters": {"tolerance": 0.05, "max_runs": 41}},
        {"name": "deep_lift"},
        {"name": "lrp", "parameters": {"composite": "epsilon_plus"}},
        {"name": "excitation_backprop", "place": "encoder.0.relu_a"},
        {"name": "grad_cam", "place": deep},
        {"name": "hires_cam", "place": last},
        {"name": "occlusion", "parameters": {"size": size // 4, "stride": size // 4}},
        {"name": "shapley_sampling", "parameters": {"features": parts, "samples": 2}},
        {"name": "rise", "parameters": {"samples": 48}},
        {"name": "extremal_perturbation", "parameters": {"area": 0.25, "steps": 12}},
    ]
    return {
        "model": {"source": "zoo:brain_extraction_unet"},
        "input": {
            "files": str(HEAD),
            "subject": "(colin27)",
            "preprocess": [{"step": "resize", "shape": size}, {"step": "normalise", "how": "maximum"}],
        },
        "targets": [{"name": "brain", "class": 1}],
        "methods": methods,
        "metrics": [
            {"metric": "deletion", "parameters": {"steps": 12}},
            {"metric": "insertion", "parameters": {"steps": 12}},
            {"metric": "relevance_mass", "mask": "prediction"},
            {"metric": "context_share", "mask": "prediction"},
            {"metric": "gini"},
        ],
        "run": {
            "output": output,
            "workers": workers,
            "baseline": "zero",
            "deadline": 300.0,
            "memory": "6 GiB",
        },
    }


def write(path: Path, force: bool = False) -> None:
    """Write the configuration with comments; a file that is there stays, unless it is forced."""
    with path.open("w" if force else "x", encoding="utf-8") as file:
        file.write(text(path.name))
