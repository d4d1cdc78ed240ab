"""Every method that captum has too: whether the answers agree, then time and processor time, captum's over ours.

Three networks: the brain extraction network at 64 voxels a side, a 2-D U-Net with eight images of 128 squared, a
residual network with 32 images of 96 squared. Each round has fresh inputs and runs both, one right after the other;
captum has the best of several numbers of perturbations at a time, found by a trial before. Claims: at least 1
everywhere; 1.5 in 3-D and 1.2 in 2-D for what averages gradients; 2 for sampled perturbations.
"""

import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import esegeta as eg
from _measure import progress, timed
from _networks import QUICK, SUBJECTS, Subject
from _questions import Aim, Options, Question, Row

STEPS, SAMPLES, RUNS = 16, 8, 64
KERNEL = 130  # the fewest that determine 64 values


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
    paths = 1.5 if xs.ndim == 5 else 1.2
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
    side = [s // (4 if xs.ndim == 5 else 8) for s in xs.shape[2:]]
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
        f"KernelSHAP {KERNEL}",
        _many(eg.kernel_shap(score, features=labels, samples=KERNEL), zero, key=0),
        {
            k: quiet(
                lambda b, k=k: attr.KernelShap(forward).attribute(
                    b, baselines=0.0, feature_mask=mask, n_samples=KERNEL, perturbations_per_eval=k
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


def apart(a: Any, b: Any) -> float:
    """The norm of the difference, of that of the answer: at a kink of a ReLU rounding decides about single pixels."""
    a, b = (t[0] if isinstance(t, tuple) else t for t in (a, b))
    a = a.detach().reshape(b.shape)
    return ((a - b.detach()).norm() / b.detach().norm().clamp(min=1e-30)).item()


def compared(group: str, pair: Pair, subject: Subject, rounds: int) -> Row:
    """Compare the answers, find captum's best batch, then time both in turns with fresh inputs."""
    xs = subject.draw(0)
    aim = Aim("processor", ">=", pair.aim)
    try:
        ours = pair.ours(xs)
    except Exception as error:
        return Row(group, pair.method, {}, aim, f"esegeta cannot: {_reason(error)}")
    trial: dict[int, float] = {}
    answer, reason = None, ""
    for k, run in pair.theirs.items():
        try:
            answer = run(xs)
            if len(pair.theirs) > 1:
                again = range(1 if rounds < 4 else 2)
                trial[k] = min(timed(lambda run=run: run(xs))[1] for _ in again)
            else:
                trial[k] = 0.0
        except Exception as error:
            reason = _reason(error)
    if not trial:
        return Row(group, pair.method, {}, None, f"captum cannot: {reason}")
    chosen = min(trial, key=trial.__getitem__)
    off = apart(ours, answer)
    found: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for i in range(rounds):
        xs = subject.draw(i + 1)
        for who in (0, 1) if i % 2 else (1, 0):
            run = (pair.ours, pair.theirs[chosen])[who]
            found[who].append(timed(lambda run=run, xs=xs: run(xs)))
    mine, theirs = found
    of = [a[1] / b[1] for a, b in zip(theirs, mine, strict=True)]
    least = lambda times, w: min(t[w] for t in times)
    values = {
        "processor": least(theirs, 1) / least(mine, 1),
        "clock": least(theirs, 0) / least(mine, 0),
        "least": min(of),
        "median": statistics.median(of),
        "apart": off,
    }
    note = "" if off <= pair.agree else f"answers should be at most {pair.agree:g} apart"
    if len(pair.theirs) > 1:
        note = "; ".join(filter(None, (note, f"captum {chosen} at a time")))
    return Row(group, pair.method, values, aim, note)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"


def measure(options: Options) -> Iterator[Row]:
    """Measure every method that is asked for on every network."""
    for name, make in (QUICK if options.quick else SUBJECTS).items():
        subject = make()
        for pair in pairs(subject):
            if not options.wants(name, pair.method):
                continue
            progress(f"{name}: {pair.method}")
            with warnings.catch_warnings(), eg.execution(progress=False):
                warnings.simplefilter("ignore")
                np.random.seed(0)
                torch.manual_seed(0)
                yield compared(name, pair, subject, options.rounds)


def draw(rows: list[Row]) -> Any:
    """Draw a bar for every method."""
    from _figures import bars

    return bars(rows, "processor", "captum's time / time here", line=1.0)


QUESTION = Question(
    "peers",
    "How fast are the others at the same?",
    "Processor time of captum over that of esegeta, side by side with fresh inputs in each round; captum has its "
    "best batch, found by a trial before. *Apart* is the norm of the difference of the answers, of that of the "
    "answer; where both are samples, or rules differ, it says no more than that.",
    measure,
    {"processor": 0.15},
    draw,
)
