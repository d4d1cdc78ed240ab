"""Every method that captum has too: whether the answers agree, then time and processor time, captum's over ours.

Three networks: the brain extraction network at 64 voxels a side, a 2-D U-Net with eight images of 128 squared, a
residual network with 32 images of 96 squared. Each round has fresh inputs and runs both, one right after the other;
captum has the best of several numbers of perturbations at a time, found by a trial before. Claims: at least 1
everywhere; 1.5 in 3-D and 1.2 in 2-D for what averages gradients; 2 for sampled perturbations.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import esegeta as eg
from _measure import done, progress, table
from _networks import QUICK, SUBJECTS, Subject

STEPS, SAMPLES, RUNS = 16, 8, 64


class Pair(NamedTuple):
    """One method in both libraries; ``theirs`` by how much goes through at a time."""

    method: str
    ours: Callable[[Tensor], Any]
    theirs: dict[int, Callable[[Tensor], Any]]
    agree: float  # how far the answers may be apart, in norm; infinite where both are samples
    aim: float


def _many(explain: Any, *shared: Tensor, key: int | None = None) -> Callable[[Tensor], Any]:
    """Explain every example: one alone as it is, several by ``batched``."""
    more = {} if key is None else {"key": key}

    def run(xs: Tensor) -> Any:
        if len(xs) == 1:
            return explain(xs[0], *shared, **more)[None]
        return eg.batched(explain, in_dims=(0, *[None] * len(shared)))(xs, *shared, **more)

    return run


def pairs(subject: Subject) -> Iterator[Pair]:
    """What both libraries have."""
    from captum import attr

    score, forward, place = subject.score, subject.forward, subject.place
    xs = subject.draw(0)
    zero, n = torch.zeros_like(xs[0]), len(xs)
    others = torch.stack([0.1 * k * xs[0].flip(-1) for k in range(4)])
    layer = dict(subject.net.named_modules())[place]
    paths = 1.5 if subject.name == "brain" else 1.2
    some = (n, 4 * n) if n > 1 else (1, 4)
    several = (1, 4, 16)
    watch = lambda b: b.clone().requires_grad_()
    yield Pair(
        "gradient",
        _many(eg.gradient(score)),
        {0: lambda b: attr.Saliency(forward).attribute(watch(b), abs=False)},
        1e-3,
        1.0,
    )
    yield Pair(
        "input x gradient",
        _many(eg.input_x_gradient(score)),
        {0: lambda b: attr.InputXGradient(forward).attribute(watch(b))},
        1e-3,
        1.0,
    )
    yield Pair(
        f"integrated gradients {STEPS}",
        _many(eg.integrated_gradients(score, steps=STEPS), zero),
        {
            k: lambda b, k=k: attr.IntegratedGradients(forward).attribute(
                watch(b), zero[None], n_steps=STEPS, method="gausslegendre", internal_batch_size=k
            )
            for k in some
        },
        2e-3,
        paths,
    )
    yield Pair(
        f"SmoothGrad {SAMPLES}",
        _many(eg.smooth(eg.gradient(score), noise=eg.noise.absolute(0.1), samples=SAMPLES), key=0),
        {
            k: lambda b, k=k: attr.NoiseTunnel(attr.Saliency(forward)).attribute(
                watch(b), nt_samples=SAMPLES, nt_samples_batch_size=k, stdevs=0.1, abs=False
            )
            for k in (1, 2, 4)
        },
        float("inf"),
        paths,
    )
    yield Pair(
        f"GradientSHAP {SAMPLES}",
        _many(eg.expected_gradients(score, samples=SAMPLES), others, key=0),
        {
            0: lambda b: attr.GradientShap(forward).attribute(
                watch(b), baselines=others, n_samples=SAMPLES, stdevs=0.0
            )
        },
        float("inf"),
        paths,
    )
    yield Pair(
        "guided backprop",
        _many(eg.guided_backprop(score)),
        {0: lambda b: attr.GuidedBackprop(forward).attribute(watch(b))},
        1e-3,
        1.0,
    )
    yield Pair(
        "deconvolution",
        _many(eg.deconvolution(score)),
        {0: lambda b: attr.Deconvolution(forward).attribute(watch(b))},
        1e-3,
        1.0,
    )
    # Captum's DeepLIFT has no rule for a ReLU before a max-pool: there the answers differ, and ours add up.
    yield Pair(
        "DeepLIFT",
        _many(eg.deep_lift(score), zero),
        {0: lambda b: attr.DeepLift(forward).attribute(watch(b), torch.zeros_like(b))},
        float("inf"),
        1.0,
    )
    yield Pair(
        "DeepLIFT-SHAP 4",
        _many(eg.deep_lift_shap(score), others),
        {0: lambda b: attr.DeepLiftShap(forward).attribute(watch(b), others)},
        float("inf"),
        1.0,
    )
    yield Pair(
        "LRP epsilon",
        _many(eg.lrp(score, composite="epsilon")),
        {0: lambda b: attr.LRP(forward).attribute(watch(b))},
        float("inf"),  # norms are merged into convolutions here and have a rule of their own there
        1.0,
    )
    yield Pair(
        "Grad-CAM",
        _many(eg.grad_cam(score, place)),
        {0: lambda b: attr.LayerGradCam(forward, layer).attribute(watch(b))},
        1e-3,
        1.0,
    )
    yield Pair(
        f"conductance {STEPS}",
        _many(eg.conductance(score, place, steps=STEPS), zero),
        {
            k: lambda b, k=k: attr.LayerConductance(forward, layer).attribute(
                watch(b), zero[None], n_steps=STEPS, internal_batch_size=k
            )
            for k in some
        },
        float("inf"),  # other nodes: both tend to the integral
        1.0,
    )
    yield Pair(
        f"internal influence {STEPS}",
        _many(eg.internal_influence(score, place, steps=STEPS), zero),
        {
            k: lambda b, k=k: attr.InternalInfluence(forward, layer).attribute(
                watch(b), zero[None], n_steps=STEPS, method="gausslegendre", internal_batch_size=k
            )
            for k in some
        },
        2e-3,
        1.0,
    )
    side = [s // (4 if subject.name == "brain" else 8) for s in xs.shape[2:]]
    window = (xs.shape[1], *side)
    labels, mask = eg.features.labels(subject.parts), subject.parts[None, None]
    quiet = lambda run: lambda b: _without_gradient(run, b)
    yield Pair(
        "occlusion",
        _many(eg.occlusion(score, size=tuple(side)), zero),
        {
            k: quiet(
                lambda b, k=k: attr.Occlusion(forward).attribute(
                    b, window, strides=window, baselines=0.0, perturbations_per_eval=k
                )
            )
            for k in several
        },
        1e-3,
        1.0,
    )
    yield Pair(
        "ablation 64 parts",
        _many(eg.feature_ablation(score, features=labels), zero),
        {
            k: quiet(
                lambda b, k=k: attr.FeatureAblation(forward).attribute(
                    b, baselines=0.0, feature_mask=mask, perturbations_per_eval=k
                )
            )
            for k in several
        },
        1e-3,
        1.0,
    )
    yield Pair(
        "Shapley sampling 2",  # two walks on both sides: one order and its reverse here
        _many(eg.shapley_sampling(score, features=labels, samples=1), zero, key=0),
        {
            k: quiet(
                lambda b, k=k: attr.ShapleyValueSampling(forward).attribute(
                    b, baselines=0.0, feature_mask=mask, n_samples=2, perturbations_per_eval=k
                )
            )
            for k in several
        },
        float("inf"),
        2.0,
    )
    yield Pair(
        f"KernelSHAP {RUNS}",
        _many(eg.kernel_shap(score, features=labels, samples=RUNS), zero, key=0),
        {
            k: quiet(
                lambda b, k=k: attr.KernelShap(forward).attribute(
                    b, baselines=0.0, feature_mask=mask, n_samples=RUNS, perturbations_per_eval=k
                )
            )
            for k in several
        },
        float("inf"),
        2.0,
    )
    yield Pair(
        f"LIME {RUNS}",
        _many(eg.lime(score, features=labels, samples=RUNS), zero, key=0),
        {
            k: quiet(
                lambda b, k=k: attr.Lime(forward).attribute(
                    b, baselines=0.0, feature_mask=mask, n_samples=RUNS, perturbations_per_eval=k
                )
            )
            for k in several
        },
        float("inf"),
        2.0,
    )


def _without_gradient(run: Callable[[Tensor], Any], b: Tensor) -> Any:
    with torch.no_grad():
        return run(b)


def timed(run: Callable[[Tensor], Any], b: Tensor) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(b)
    return time.perf_counter() - wall, time.process_time() - cpu


def apart(a: Any, b: Any) -> float:
    """The norm of the difference, of that of the answer: at a kink of a ReLU rounding decides about single pixels."""
    a, b = (t[0] if isinstance(t, tuple) else t for t in (a, b))
    a = a.detach().reshape(b.shape)
    return ((a - b.detach()).norm() / b.detach().norm().clamp(min=1e-30)).item()


def measure(pair: Pair, subject: Subject, rounds: int) -> dict[str, Any]:
    """Compare the answers, find captum's best batch, then time both in turns."""
    xs = subject.draw(0)
    ours = pair.ours(xs)
    trial: dict[int, float] = {}
    answer = None
    for k, run in pair.theirs.items():
        try:
            if len(pair.theirs) == 1:
                answer, trial[k] = run(xs), 0.0
            else:
                answer = run(xs)
                trial[k] = min(timed(run, xs)[1] for _ in range(1 if rounds < 4 else 2))
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
    if not trial:
        return {"method": pair.method, "error": reason, "aim": pair.aim}
    chosen = min(trial, key=trial.__getitem__)
    theirs, off = pair.theirs[chosen], apart(ours, answer)
    found: list[tuple[float, float]] = []
    mine: list[tuple[float, float]] = []
    for i in range(rounds):
        xs = subject.draw(i + 1)
        for who in (0, 1) if i % 2 else (1, 0):
            run, times = ((pair.ours, mine), (theirs, found))[who]
            times.append(timed(run, xs))
    of = lambda w: [a[w] / b[w] for a, b in zip(found, mine, strict=True)]
    least = lambda times, w: min(t[w] for t in times)
    return {
        "method": pair.method,
        "apart": off,
        "agrees": off <= pair.agree,
        "batch": chosen,
        "aim": pair.aim,
        "processor": least(found, 1) / least(mine, 1),
        "time": least(found, 0) / least(mine, 0),
        "least": min(of(0)),
        "median": statistics.median(of(0)),
    }


def rows_of(found: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """The rows of a table."""
    for row in found:
        if "error" in row:
            yield row["method"], row["error"], "", "", "", "", f"{row['aim']:g}"
        else:
            off = f"{row['apart']:.0e}" + ("" if row["agrees"] else " !")
            times = (f"{row[k]:.2f}" for k in ("processor", "time", "least", "median"))
            yield (
                row["method"],
                off,
                *times,
                f"{row['aim']:g}" + (" !" if row["processor"] < row["aim"] else ""),
            )


HEAD = ("captum / esegeta", "answers apart", "processor", "time", "least pair", "median pair", "aim")


def compare(names: list[str], *, quick: bool, rounds: int, only: str = "") -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every network."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        subject = (QUICK if quick else SUBJECTS)[name]()
        found[name] = []
        for pair in pairs(subject):
            if only and not any(part in pair.method for part in only.split(",")):
                continue
            progress(f"{name}: {pair.method}")
            with warnings.catch_warnings(), eg.execution(progress=False):
                warnings.simplefilter("ignore")
                np.random.seed(0)
                torch.manual_seed(0)
                found[name].append(measure(pair, subject, rounds))
        done()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small and few, to see whether it runs")
    parser.add_argument("--repeats", type=int, help="rounds (default 5)")
    parser.add_argument("--networks", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--only", default="", help="methods whose name contains one of these, with commas")
    options = parser.parse_args()
    rounds = options.repeats or (2 if options.quick else 5)
    for name in options.networks:
        print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        table(
            HEAD, list(rows_of(compare([name], quick=options.quick, rounds=rounds, only=options.only)[name]))
        )


if __name__ == "__main__":
    main()
