"""Which channels of a real 3-D network see tissues, structures and tumours?

    python benchmarks/experiments/dissection.py --tumours FOLDER   # writes the page and its figures
    python benchmarks/experiments/dissection.py --quick            # does it run?

P. Natekar, A. Kori, G. Krishnamurthi, Demystifying Brain Tumor Segmentation Networks, 2020, section 3.1, on the
network of the zoo that separates brain from head. The atlas is that of the Debian package ``mricron-data``, the
tumours are images ``*_image.nii.gz`` with labels ``*_label.nii.gz``; both may be missing.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import avg_pool3d, max_pool3d

import esegeta as eg
from _common import DOCS, figure, filled, number, table
from esegeta import dissection, zoo

ATLAS = Path("/usr/share/mricron/templates/aal.nii.gz")
PLACES = (
    *("encoder.0.relu_b", "encoder.1.relu_b", "encoder.2.relu_b"),
    *("decoder.0.relu", "decoder.1.relu", "decoder.2.relu"),
)
TISSUES = {1: "dark (fluid)", 2: "middle (grey)", 3: "bright (white)"}
STRUCTURES = {  # by the beginnings of the atlas's names
    "cerebellum": ("Cerebelum", "Vermis"),
    "deep grey matter": ("Caudate", "Putamen", "Pallidum", "Thalamus"),
    "frontal lobe": ("Frontal", "Precentral", "Supp_Motor", "Rectus", "Olfactory"),
    "temporal lobe": ("Temporal", "Heschl", "Fusiform", "Hippocampus", "ParaHippocampal", "Amygdala"),
    "occipital lobe": ("Occipital", "Calcarine", "Cuneus", "Lingual"),
}
LEVEL = 0.05  # of an adjusted p-value
AIR = 0.06  # of the largest intensity: below lies air


class Setting(NamedTuple):
    """How fine and how sure."""

    shrink: int = 1
    permutations: int = 99
    quantile: float = 0.05


def shrunk(x: Tensor, mask: bool, shrink: int) -> Tensor:
    """A volume on a coarser grid: the mean of an image, any voxel of a mask."""
    pool = max_pool3d if mask else avg_pool3d
    found = pool(x.float().reshape(1, 1, *x.shape[-3:]), shrink)[0]
    return found[0].bool() if mask else found


def on_grid(values: np.ndarray, affine: np.ndarray, like: Any, order: int) -> np.ndarray:
    """An image on the grid of another one by their affine matrices; 0 outside of it."""
    across = np.linalg.inv(affine) @ like.affine
    shape = like.data.shape[1:]
    return ndimage.affine_transform(values, across[:3, :3], across[:3, 3], output_shape=shape, order=order)


def structures(head: Any) -> dict[str, Tensor]:
    """Parts of the brain from the atlas, on the grid of the head; none where the atlas is not there."""
    if not ATLAS.exists():
        return {}
    import nibabel

    atlas = nibabel.load(ATLAS)
    labels = on_grid(np.asarray(atlas.dataobj).astype(np.int16), atlas.affine, head, 0)
    names = [line.split() for line in ATLAS.with_suffix(".txt").read_text().splitlines() if line.strip()]
    return {
        part: torch.from_numpy(np.isin(labels, [int(n) for n, name, *_ in names if name.startswith(begin)]))
        for part, begin in STRUCTURES.items()
    }


def halves(setting: Setting) -> list[Any]:
    """Both sides of the head, with tissues, structures of the atlas, and what lies around the brain."""
    head, brain = zoo.head(), zoo.brain_mask()
    classes = dissection.tissues(head.data, brain)
    concepts = dissection.labelled(classes, TISSUES) | structures(head)
    concepts |= {"brain": brain, "around the brain": (head.data[0] > AIR) & ~brain}
    x = shrunk(head.data, False, setting.shrink)
    small = {name: shrunk(mask, True, setting.shrink) for name, mask in concepts.items()}
    inside = small["brain"] | small["around the brain"]
    middle = x.shape[1] // 2
    sides = (slice(None, middle), slice(middle, None))
    return [(x[:, s], {name: mask[s] for name, mask in small.items()}, inside[s]) for s in sides]


def elsewhere(folder: Path, setting: Setting) -> list[Any]:
    """Images with tumours of another centre, turned and resampled as the head is, with tissues and the tumour."""
    import nibabel

    head, found = zoo.head(), []
    for file in sorted(folder.glob("*_image.nii.gz")):
        image = nibabel.load(file)
        label = nibabel.load(file.with_name(file.name.replace("_image", "_label")))
        centre = image.affine @ [*(np.array(image.shape) - 1) / 2, 1]
        own = head.affine @ [*(np.array(head.data.shape[1:]) - 1) / 2, 1]
        affine = image.affine.copy()
        affine[:3, 3] += own[:3] - centre[:3]  # scanner coordinates of two people are not to be compared
        values = on_grid(image.get_fdata().astype(np.float32), affine, head, 1)
        top = np.quantile(values, 0.999)
        x = shrunk(torch.from_numpy(np.clip(values / top, 0, 1))[None], False, setting.shrink)
        mask = on_grid((label.get_fdata() > 0).astype(np.uint8), affine, head, 0)
        tumour = shrunk(torch.from_numpy(mask) > 0, True, setting.shrink)
        inside = x[0] > AIR
        concepts = dissection.labelled(dissection.tissues(x, inside), TISSUES) | {"tumour": tumour}
        found.append((x, concepts, inside))
    return found


def called_brain(model: Any, x: Tensor) -> Tensor:
    """Where the network sees brain: it has one channel, a logit."""
    with torch.no_grad():
        return model(x)[0] > 0


def measured(setting: Setting, folder: Path | None) -> dict[str, Any]:
    """The dissection over the head, that over the tumours, and how much of each image is called brain."""
    net = zoo.brain_extraction_unet()
    model = eg.from_module(net)
    ways = dissection.dissect(
        model, places=PLACES, quantile=setting.quantile, null="roll", permutations=setting.permutations
    )
    here, there = halves(setting), elsewhere(folder, setting) if folder else []
    voxel = float(np.prod(zoo.head().spacing)) * setting.shrink**3 / 1000
    answers = [called_brain(model, x) for x, _, _ in there]
    tumours = [concepts["tumour"] for _, concepts, _ in there]
    return {
        "head": ways(here),
        "tumours": ways(there) if len(there) > 1 else None,
        "volumes": [float(answer.sum()) * voxel for answer in answers],
        "sizes": [float(tumour.sum()) * voxel for tumour in tumours],
        "covered": [float(a[t].float().mean()) for a, t in zip(answers, tumours, strict=True)],
    }


def best_of(found: Any) -> list[list[str]]:
    """A row for each concept: the channel with the largest overlap anywhere, and how many detectors it has."""
    rows, lines = found.rows(), []
    for concept in found.concepts:
        own = [row for row in rows if row.concept == concept]
        best = max(own, key=lambda row: -1 if row.iou != row.iou else row.iou)
        count = sum(row.detector for row in own)
        where = f"{best.place}, channel {best.channel}"
        lines.append([concept, where, number(best.iou), number(best.p), number(best.adjusted), str(count)])
    return lines


def told(found: Any, of: dict[str, str]) -> list[str]:
    """A sentence for each claim that channels detect some concepts: which do.

    Undecided where no p-value of so few permutations could be small enough.
    """
    rows, lines = found.rows(level=LEVEL), []
    for claim, names in of.items():
        asked = [c for c in found.concepts if c in names.split("; ")]
        if not asked:
            continue
        seen = [c for c in asked if any(r.detector for r in rows if r.concept == c)]
        says = "holds" if len(seen) == len(asked) else "does not hold" if not seen else "holds in part"
        if (len(found.drawn) + 1) * LEVEL < 1:
            says = "undecided"
        which = ", ".join(seen) if seen else "none"
        lines.append(f"- *{claim}*: **{says}** here. Detected of {', '.join(asked)}: {which}.")
    return lines


def page(found: dict[str, Any], setting: Setting, files: dict[str, str]) -> str:
    """The page with its numbers."""
    head = ["concept", "best channel", "IoU", "p", "p adjusted", "detectors"]
    claims = {
        "Channels see tissues": "; ".join(TISSUES.values()),
        "Channels see what the network was trained to find, and what is around it": "brain; around the brain",
        "Channels see structures of the brain": "; ".join(STRUCTURES),
    }
    tumours = "No images with tumours were given."
    if found["tumours"] is not None:
        sizes = " and ".join(f"{number(v)} ml" for v in found["sizes"])
        volumes = " and ".join(f"{number(v)} ml" for v in found["volumes"])
        covered = " and ".join(f"{share:.0%}".replace("%", " %") for share in found["covered"])
        tumours = "\n\n".join(
            [
                f"The tumours have {sizes}. The network calls {volumes} of these heads brain, and of the tumours "
                f"{covered}.",
                f"![The best channel of each layer for each concept]({files['tumours']})",
                table(head, best_of(found["tumours"])),
                "\n".join(
                    told(found["tumours"], {"A channel sees the tumour without being taught": "tumour"})
                ),
            ]
        )
    missing = "" if ATLAS.exists() else "The atlas was not there, so structures are left out."
    return filled(
        "dissection",
        share=f"{setting.quantile:.0%}".replace("%", " %"),
        permutations=setting.permutations,
        channels=len(found["head"].channels),
        missing=missing,
        table=table(head, best_of(found["head"])),
        conclusions="\n".join(told(found["head"], claims)),
        elsewhere=tumours,
        head=files["head"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="coarse and few, to see whether it runs")
    parser.add_argument("--folder", type=Path, help="where the page goes; by default the documentation")
    parser.add_argument("--tumours", type=Path, help="a folder of *_image.nii.gz and *_label.nii.gz")
    options = parser.parse_args()
    setting = Setting(4, 9, 0.05) if options.quick else Setting()
    folder = options.folder or (Path(tempfile.mkdtemp()) if options.quick else DOCS)
    found = measured(setting, options.tumours)
    files = {
        name: figure(f"dissection_{name}", eg.plot.detectors(found[name]), folder)
        for name in ("head", "tumours")
        if found[name] is not None
    }
    written = folder / "experiments" / "dissection.md"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(page(found, setting, files))
    print(f"written: {written}")


if __name__ == "__main__":
    main()
