"""What ``execution(compile=True)`` gains: the same gradients and forwards by a compiled network and by the plain one.

On the U-Net and the ResNet of the other questions. Compiling is done before the rounds and not counted; the first
column says how many plain calls would have taken as long. No claim: it depends on network and processor.
"""

import torch
from torch.func import vmap

import esegeta as eg
from _measure import arguments, interleaved, progress, ratios, seconds, setting, table
from _networks import resnet, unet


def main():
    options = arguments(__doc__, size=96)
    print(f"compiled / plain, {setting(options)}\n")
    for subject in (resnet(options.size, 8), unet(options.size, 4)):
        rows, xs = [], subject.draw(0)
        work = {
            "values": vmap(subject.score),
            "gradients": vmap(eg.gradient(subject.score)),
            "integrated gradients 8": eg.batched(
                eg.integrated_gradients(subject.score, steps=8), in_dims=(0, None)
            ),
        }
        for name, explain in work.items():
            given = (xs, torch.zeros_like(xs[0])) if "integrated" in name else (xs,)

            def compiled(explain=explain, given=given):
                with eg.execution(compile=True):
                    return explain(*given)

            def plain(explain=explain, given=given):
                return explain(*given)

            progress(f"compiling: {subject.name}, {name}")
            truth, once = plain(), seconds(compiled)
            apart = ((compiled() - truth).abs().max() / truth.abs().max()).item()
            times = interleaved({"compiled": compiled, "plain": plain}, options.repeats)
            found = ratios(times, "compiled", "plain")
            rows.append(
                (
                    subject.name,
                    name,
                    f"{once / min(times['plain']):.0f}",
                    *(f"{v:.3f}" for v in found),
                    f"{apart:.1e}",
                )
            )
        table(
            (
                "network",
                "what",
                "compiling, in plain calls",
                "time: of minima",
                "least pair",
                "median pair",
                "apart",
            ),
            rows,
        )


if __name__ == "__main__":
    main()
