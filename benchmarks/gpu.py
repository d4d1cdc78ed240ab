"""Check and measure on a CUDA device, in one go of at most eight minutes.

    python benchmarks/gpu.py                    all of it; exit status 2 without a device, 1 if answers differ
    python benchmarks/gpu.py --device cpu --quick   the same way through, small and on the processor

In this order, each table printed as soon as it is measured: whether the device says what the processor says; every
method beside captum and beside one raw gradient, in milliseconds and memory; limits of memory; layouts, TF32 and
bfloat16 with their errors; repeated gradients as a CUDA graph. What the time does not suffice for is named.
"""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import Tensor

import esegeta as eg
from _measure import progress, table
from _networks import QUICK, SUBJECTS, Subject, Summed
from peers import apart, pairs

# How far float32 on a device may be from float32 on the processor, in norm of the answer.
AGREE = 2e-3
SKIPPED = 2


class Clock:
    """The time that is left of what was allowed."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def over(self, what: str) -> bool:
        """Return whether there is no time for something, and say so."""
        late = time.monotonic() >= self.end
        if late:
            print(f"no time left for {what}", flush=True)
        return late


def unavailable(device: str) -> str | None:
    """Return why nothing can run on a device, or None."""
    if torch.device(device).type != "cuda" or torch.cuda.is_available():
        return None
    return (
        f"gpu: expected a CUDA device, got none (torch {torch.__version__}). "
        "Run it on a machine with one and a torch built for it; --device cpu --quick only tries the script."
    )


def moved(subject: Subject, device: str) -> Subject:
    """Return a subject whose network, score and examples are on a device."""
    net = copy.deepcopy(subject.net).to(device)
    old: Any = subject.forward
    mask = None if old.mask is None else old.mask.to(device)
    draw = lambda i: subject.draw(i).to(device)
    model, reducers = eg.from_module(net), eg.reducers
    if subject.name == "brain":
        score = reducers.predicted_class_sum(model, 1, at=draw(0)[0])
    else:
        score = (reducers.logit if mask is None else reducers.class_sum)(model, 1)
    forward = Summed(net, mask, old.chosen)
    return subject._replace(net=net, score=score, forward=forward, draw=draw, parts=subject.parts.to(device))


def wait(device: str) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], object], device: str, rounds: int) -> float:
    """Return the least time of a call, after one to warm up."""
    times = []
    for i in range(rounds + 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times += [1e3 * (time.perf_counter() - start)] if i else []
    return min(times)


def peak(run: Callable[[], object], device: str) -> float:
    """Return the MiB that a call allocates beside what there is; NaN where the device does not say."""
    if torch.device(device).type != "cuda":
        return float("nan")
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    wait(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def methods(subject: Subject) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Explanations of one example, one of each way of computing."""
    score, like = subject.score, subject.draw(0)[0]
    zero = torch.zeros_like(like)
    yield "gradient", eg.gradient(score)
    yield "integrated gradients", lambda x: eg.integrated_gradients(score, steps=8)(x, zero)
    noisy = eg.smooth(eg.gradient(score), noise=eg.noise.absolute(0.1), samples=4)
    yield "SmoothGrad", lambda x: noisy(x, key=0)
    yield "guided backprop", eg.guided_backprop(score)
    yield "DeepLIFT", lambda x: eg.deep_lift(score)(x, zero)
    yield "Grad-CAM", eg.grad_cam(score, subject.place)
    parts = eg.features.labels(subject.parts)
    yield "ablation", lambda x: eg.feature_ablation(score, features=parts)(x, zero)
    yield "KernelSHAP", lambda x: eg.kernel_shap(score, features=parts, samples=130)(x, zero, key=0)


def agreement(subjects: Sequence[Subject], device: str, clock: Clock) -> bool:
    """Print how far answers on the device are from those of the processor; return whether all are near."""
    rows, well = [], True
    for subject in subjects:
        there = dict(methods(moved(subject, device)))
        for name, here in methods(subject):
            if clock.over(f"{subject.name}: {name}"):
                return well
            progress(f"agreement: {subject.name}: {name}")
            x = subject.draw(1)[0]
            off = apart(there[name](x.to(device)).cpu(), here(x))
            well = well and off <= AGREE
            rows.append((f"{subject.name}: {name}", f"{off:.1e}", "" if off <= AGREE else "!"))
    table(("answers on the device", "apart", ""), rows)
    return well


def beside(subjects: Sequence[Subject], device: str, clock: Clock, rounds: int) -> None:
    """Print time and memory of every method, captum's at its best batch, and over one raw gradient."""
    for subject in (moved(s, device) for s in subjects):
        xs = subject.draw(1)

        def raw(xs: Tensor = xs, forward: Any = subject.forward) -> Tensor:
            leaf = xs.clone().requires_grad_()
            return torch.autograd.grad(forward(leaf).sum(), leaf)[0]

        unit = milliseconds(raw, device, rounds)
        rows = [("one raw gradient", f"{unit:.2f}", "-", "1.00", "-", f"{peak(raw, device):.0f}", "-")]
        for pair in pairs(subject):
            if clock.over(f"{subject.name}: {pair.method}"):
                break
            progress(f"{subject.name}: {pair.method}")
            ours = lambda pair=pair, xs=xs: pair.ours(xs)
            mine = milliseconds(ours, device, rounds)
            theirs, most = float("nan"), float("nan")
            for run in pair.theirs.values():
                try:
                    took = milliseconds(lambda run=run, xs=xs: run(xs), device, rounds)
                except Exception:  # captum cannot, whatever the reason: the page of peers has it
                    continue
                if not took >= theirs:
                    theirs, most = took, peak(lambda run=run, xs=xs: run(xs), device)
            numbers = (f"{mine:.2f}", f"{theirs:.2f}", f"{mine / unit:.2f}", f"{theirs / mine:.2f}")
            rows.append((pair.method, *numbers, f"{peak(ours, device):.0f}", f"{most:.0f}"))
        names = ("ms", "captum ms", "raw gradients", "captum / here", "MiB", "captum MiB")
        table((f"{subject.name} on {device}", *names), rows)


def settings(subjects: Sequence[Subject], device: str, clock: Clock, rounds: int) -> None:
    """Print what limits of memory, layouts and precisions do to time, memory and answers."""
    tf32: Any = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [b.allow_tf32 for b in tf32]
    for subject in (moved(s, device) for s in subjects):
        x = subject.draw(1)[0]
        zero = torch.zeros_like(x)
        explain = eg.integrated_gradients(subject.score, steps=32)
        cases: dict[str, dict[str, Any]] = {
            "contiguous, no TF32": {"layout": "contiguous"},
            "channels last, no TF32": {"layout": "channels_last"},
            "auto, TF32": {},
            "auto, bfloat16": {"precision": "bfloat16"},
            "auto, 256 MiB": {"memory": "256 MiB"},
            "auto, 1 GiB": {"memory": "1 GiB"},
            "auto, one at a time": {"chunk": 1},
        }
        rows, truth = [], None
        for name, how in cases.items():
            if clock.over(f"{subject.name}: {name}"):
                break
            progress(f"{subject.name}: {name}")
            for backend in tf32:
                backend.allow_tf32 = name.endswith(", TF32")
            try:
                with eg.execution(progress=False, **how):
                    run = lambda explain=explain, x=x, zero=zero: explain(x, zero)
                    found = run()
                    truth = found if truth is None else truth
                    took, most = milliseconds(run, device, rounds), peak(run, device)
            finally:
                for backend, allowed in zip(tf32, before, strict=True):
                    backend.allow_tf32 = allowed
            rows.append((name, f"{took:.2f}", f"{most:.0f}", f"{apart(found, truth):.1e}"))
        table((f"{subject.name}: integrated gradients 32", "ms", "MiB", "apart from the first"), rows)


def graphs(subjects: Sequence[Subject], device: str, clock: Clock, rounds: int) -> None:
    """Print one gradient by esegeta, by autograd, and by autograd replayed as a CUDA graph."""
    if torch.device(device).type != "cuda":
        print("CUDA graphs: not measured, they need a CUDA device\n")
        return
    rows = []
    for subject in (moved(s, device) for s in subjects):
        if clock.over(f"{subject.name}: CUDA graph"):
            break
        leaf = subject.draw(1)[:1].clone().requires_grad_()

        def plain(leaf: Tensor = leaf, forward: Any = subject.forward) -> Tensor:
            return torch.autograd.grad(forward(leaf).sum(), leaf)[0]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                plain()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = plain()
        graph.replay()
        off = apart(captured, plain())
        explain = eg.gradient(subject.score)
        ours = milliseconds(lambda explain=explain, leaf=leaf: explain(leaf.detach()[0]), device, rounds)
        eager, replayed = (milliseconds(run, device, rounds) for run in (plain, graph.replay))
        rows.append((subject.name, f"{ours:.3f}", f"{eager:.3f}", f"{replayed:.3f}", f"{off:.1e}"))
    table(("one gradient", "esegeta ms", "autograd ms", "graph ms", "apart"), rows)


def main(asked: Sequence[str] | None = None) -> int:
    """Run everything; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="where to run (default cuda)")
    parser.add_argument("--quick", action="store_true", help="small networks and one round")
    parser.add_argument("--minutes", type=float, default=8.0, help="when to stop (default 8)")
    options = parser.parse_args(asked)
    why = unavailable(options.device)
    if why is not None:
        print(why, file=sys.stderr)
        return SKIPPED
    clock, rounds = Clock(options.minutes), 1 if options.quick else 5
    print(f"{options.device}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    with warnings.catch_warnings(), eg.execution(progress=False):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        subjects = [make() for make in (QUICK if options.quick else SUBJECTS).values()]
        well = agreement(subjects, options.device, clock)
        settings(subjects, options.device, clock, rounds)
        graphs(subjects, options.device, clock, rounds)
        beside(subjects, options.device, clock, rounds)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
