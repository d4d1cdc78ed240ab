"""What methods, transforms, reducers and rewrites make answers the same in another process, by cloudpickle."""

import pickle
import subprocess
import sys

import cloudpickle
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import esegeta as eg
from esegeta._facts import facts_of
from esegeta._registry import REDUCERS
from esegeta.conformance.subjects import subjects
from esegeta.rules import deconvnet, deeplift, excitation, guided, lrp

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)).eval()
X = torch.randn(1, 4, 4)
TWO = torch.tensor([[1.0, 2.0]])

# In the other process: every function is called with its arguments.
ANSWER = """
import pickle, sys
import torch
torch.set_num_threads(1)
cases = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps([(name, fn(*args, **extra)) for name, fn, args, extra in cases]))
"""


def square(z):
    return (z**2).sum()


def explanations():
    kinds = {"baseline": torch.zeros(1, 2), "baselines": torch.zeros(3, 1, 2)}
    for s in subjects(fast=True):
        yield s.name, s.build(square), (TWO, *[kinds[k] for k in s.refs]), s.extra()


def scores(model):
    classifier = lambda x: model(x).mean((1, 2))
    for name, spec in REDUCERS.items():
        on = (
            classifier
            if spec.output == "vector"
            else (lambda x: model(x)[:1])
            if name == "otsu_sum"
            else model
        )
        score = spec.fn(on, **spec.example, **({"at": X} if spec.mask else {}))
        yield name, score, (X,), {}
        if spec.differentiable:
            yield f"gradient of {name}", eg.gradient(score), (X,), {}


def parts(model):
    score, layer = eg.reducers.class_sum(model, 1), torch.ones(3, 4, 4)
    for rewrite in (guided, deconvnet, lrp, excitation, lambda score: deeplift(score, 0 * X)):
        yield "rewrite", eg.gradient(rewrite(score)), (X,), {}
    for cut in (eg.split(score, "1", at=X), eg.split(score, "1")):
        cut[0](X)
        yield "trunk", cut[0], (X,), {}
        yield "head", cut[1], (layer,), {}
    yield "model", model, (X,), {}
    yield "tap", eg.tap(model, "1"), (X,), {}
    yield "replace", eg.replace(score, "1"), (X, layer), {}
    yield "nudge", eg.nudge(score, "1"), (X, layer), {}
    yield "activation", eg.activation_and_gradient(score, "1"), (X,), {}
    yield "at", eg.at("integrated_gradients", "1")(score), (X, 0 * X), {}
    yield "fuse", eg.fuse(eg.grad_cam(score, ["0", "1"])), (X,), {}
    yield "batched", eg.batched(eg.gradient(score)), (X[None],), {}
    yield "sliding window", eg.models.sliding_window(model, 2), (X,), {}
    whole = lambda p: eg.gradient(eg.reducers.class_sum(model, 1))
    yield "patchwise", eg.models.patchwise(whole, 2), (X,), {}
    build, parameters = eg.models.parametrised(NET)
    yield "parametrised", build(parameters), (X,), {}
    noisy = lambda p: eg.gradient(eg.reducers.class_sum(build(p), 1))
    yield "noise_grad", eg.noise_grad(noisy, parameters, samples=2), (X,), {"key": 1}
    sampled = eg.shapley_sampling(score, samples=2)
    yield "with_standard_error", eg.with_standard_error(sampled), (X, 0 * X), {"key": 1}
    yield "on_trees", eg.on_trees(eg.gradient)(lambda t: score(t["image"])), ({"image": X},), {}
    yield "adaptive_report", eg.adaptive_report(score), (X, 0 * X), {}
    yield "full_gradient", eg.full_gradient(score), (X,), {}
    yield "regions", eg.regions(eg.gradient(score), lambda x: eg.segmentation.slic(x, 4)), (X,), {}


@pytest.mark.slow
def test_other_processes_give_the_same_answers():
    model = eg.from_module(NET)
    cases = [*explanations(), *scores(model), *parts(model)]
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)  # the other process does not find the tests
    try:
        given = cloudpickle.dumps(cases)
    finally:
        cloudpickle.unregister_pickle_by_value(here)
    assert len(given) < 4_000_000
    run = subprocess.run([sys.executable, "-c", ANSWER], input=given, capture_output=True, check=False)
    assert not run.returncode, run.stderr.decode()[-2000:]
    answers = pickle.loads(run.stdout)
    assert len(answers) == len(cases)
    for (name, fn, args, extra), (same, answer) in zip(cases, answers, strict=True):
        here, there = tree_leaves(fn(*args, **extra)), tree_leaves(answer)
        assert name == same
        assert len(here) == len(there) > 0, name
        for a, b in zip(here, there, strict=True):
            torch.testing.assert_close(
                b, a, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_copies_keep_their_faces():
    explain = eg.smooth(eg.integrated_gradients(square, steps=3), samples=2)
    copy = pickle.loads(cloudpickle.dumps(explain))
    assert (copy.__name__, copy.__doc__, facts_of(copy).refs, facts_of(copy).key) == (
        explain.__name__,
        explain.__doc__,
        ("baseline",),
        True,
    )
    assert torch.equal(copy(TWO, baseline=0 * TWO, key=1), explain(TWO, baseline=0 * TWO, key=1))


def test_plain_pickle_names_the_way():
    model = eg.from_module(NET)
    for name, fn, _, _ in [*explanations(), *scores(model), *parts(model)]:
        if name in ("model", "sliding window"):
            pickle.dumps(fn)
            continue
        with pytest.raises((pickle.PicklingError, AttributeError), match="use cloudpickle"):
            pickle.dumps(fn)
