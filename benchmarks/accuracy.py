"""How much accuracy an evaluation of the network buys: rules of integrated gradients, estimators of games.

Exact answers come from enumeration of all coalitions, written here and not taken from the package. Evaluations are
counted at the network itself.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import esegeta as eg
from _measure import progress
from _networks import blocks, resnet, small, unet
from _questions import Options, Question, Row
from esegeta.quadrature import RULES
from scaling import slope

PARTS = 9


class Counting(nn.Module):
    """A network that counts the examples it sees."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, batch: Tensor) -> Tensor:
        self.seen += len(batch)
        return self.net(batch)


def measure(options: Options) -> Iterator[Row]:
    """Measure rules of quadrature, then estimators of Shapley values, of LIME and of RISE."""
    yield from _rules(options)
    yield from _estimators(options)


def _rules(options: Options) -> Iterator[Row]:
    head = small() if options.quick else unet(128, 1)
    x = head.draw(0)[0]
    zero = torch.zeros_like(x)
    with torch.no_grad():
        difference = (head.score(x) - head.score(zero)).double().item()
    steps = (4, 8) if options.quick else (4, 8, 16, 32)
    for rule in RULES:
        if options.wants("completeness", rule):
            left = []
            for n in steps:
                progress(f"completeness: {rule}, {n}")
                with eg.execution(progress=False):
                    total = (
                        eg.integrated_gradients(head.score, steps=n, rule=rule)(x, zero).double().sum().item()
                    )
                left.append(abs(total / difference - 1))
            yield _row("completeness", rule, steps, left, "share of F(x) - F(baseline) that is not explained")


def _row(group: str, what: str, counts: Sequence[int], errors: Sequence[float], note: str) -> Row:
    values = {"first": errors[0], "last": errors[-1], "slope": slope(counts, [max(e, 1e-12) for e in errors])}
    series = {"evaluations": [float(n) for n in counts], "error": list(errors)}
    return Row(group, what, values, None, f"{note}; {counts[0]} to {counts[-1]} evaluations", series)


def _estimators(options: Options) -> Iterator[Row]:
    subject = resnet(12 if options.quick else 48, 1)
    net = Counting(subject.net).eval()
    score = eg.reducers.logit(eg.from_module(net), 1)
    x = subject.draw(0)[0]
    zero, parts = torch.zeros_like(x), blocks(tuple(x.shape[1:]), 3)
    labels = eg.features.labels(parts)
    worth = game(subject, x, parts)
    per_part = lambda a: torch.stack([a[0][parts == i].mean() for i in range(PARTS)]).double().numpy()
    keys = range(2 if options.quick else 8)
    few = (1, 2) if options.quick else (1, 2, 4, 8, 16, 32)
    many = (32, 64) if options.quick else (32, 64, 128, 256, 512)
    rise = lambda n: eg.rise(score, cells=3, samples=n)
    width, ridge = 0.25, 1e-6
    exact_lime = lime_of(worth, width, ridge)
    shapley = shapley_of(worth)
    sampling = lambda n: eg.shapley_sampling(score, features=labels, samples=n)
    kernel = lambda n: eg.kernel_shap(score, features=labels, samples=n)
    lime = lambda n: eg.lime(score, features=labels, samples=n, width=width, ridge=ridge)
    for group, what, make, sizes, exact in (
        ("Shapley values", "Shapley sampling", sampling, few, shapley),
        ("Shapley values", "KernelSHAP", kernel, many, shapley),
        ("LIME", "LIME", lime, many, exact_lime),
    ):
        if options.wants(group, what):
            progress(f"{group}: {what}")
            run = lambda n, k, make=make: make(n)(x, zero, key=k)
            yield _error(group, what, net, run, sizes, keys, per_part, exact)
    if options.wants("RISE", "RISE"):
        progress("RISE: many masks as reference")
        with eg.execution(progress=False):
            reference = rise(512 if options.quick else 16384)(x, zero, key=10_000).flatten().double().numpy()
        flat = lambda a: a.flatten().double().numpy()
        run = lambda n, k: rise(n)(x, zero, key=k)
        yield _error("RISE", "RISE", net, run, many, keys, flat, reference, centred=True)


def _error(
    group: str,
    what: str,
    net: Counting,
    run: Callable[[int, int], Tensor],
    sizes: Sequence[int],
    keys: Sequence[int],
    read: Callable[[Tensor], np.ndarray],
    exact: np.ndarray,
    *,
    centred: bool = False,
) -> Row:
    """Root mean square over keys of the error, of the norm of the answer."""
    scale = np.linalg.norm(exact - exact.mean() if centred else exact)
    counts, errors = [], []
    for n in sizes:
        net.seen = 0
        with eg.execution(progress=False):
            off = [np.linalg.norm(read(run(n, k)) - exact) / scale for k in keys]
        counts.append(round(net.seen / len(keys)))
        errors.append(float(np.sqrt(np.mean(np.square(off)))))
    return _row(group, what, counts, errors, "error of the norm of the exact answer")


def game(subject: Any, x: Tensor, parts: Tensor) -> np.ndarray:
    """Return the score of every coalition; bit i of its number says that part i is present."""
    shown = torch.tensor([[c >> i & 1 for i in range(PARTS)] for c in range(2**PARTS)])
    with torch.no_grad():
        batches = [subject.forward(x * some[:, parts][:, None]) for some in shown.split(64)]
    return torch.cat(batches).double().numpy()


def shapley_of(worth: np.ndarray) -> np.ndarray:
    """Return the Shapley values, by their definition over all coalitions."""
    values = np.zeros(PARTS)
    for i, c in itertools.product(range(PARTS), range(2**PARTS)):
        if not c >> i & 1:
            size = c.bit_count()
            weight = math.factorial(size) * math.factorial(PARTS - size - 1) / math.factorial(PARTS)
            values[i] += weight * (worth[c | 1 << i] - worth[c])
    return values


def lime_of(worth: np.ndarray, width: float, ridge: float) -> np.ndarray:
    """Return the coefficients of LIME over all coalitions alike: what its samples tend to."""
    shown = np.array([[c >> i & 1 for i in range(PARTS)] for c in range(2**PARTS)], dtype=float)
    cosine = np.sqrt(shown.mean(1))  # with the whole: |z| / sqrt(|z| d)
    weight = np.sqrt(np.exp(-((1 - cosine) ** 2) / width**2))
    centre = lambda t: t - np.average(t, axis=0, weights=weight)
    a, b = centre(shown), centre(worth)
    return np.linalg.solve(a.T @ (weight[:, None] * a) + ridge * np.eye(PARTS), a.T @ (weight * b))


def draw(rows: list[Row]) -> Any:
    """Draw the errors against evaluations."""
    from _figures import curves

    groups = dict.fromkeys(row.group for row in rows)
    whole = [
        (
            g,
            None,
            {r.what: (r.series["evaluations"], r.series["error"]) for r in rows if r.group == g and r.series},
        )
        for g in groups
    ]
    return curves(whole, "evaluations of the network", "error")


QUESTION = Question(
    "accuracy",
    "What accuracy does an evaluation buy?",
    "Errors against evaluations of the network, counted at the network. Shapley values and LIME are "
    "compared with exact answers over all 512 coalitions, RISE with 16384 other masks. The slope is that of "
    "logarithms: -0.5 is that of independent samples.",
    measure,
    {"first": 0.3, "last": 0.3},
    draw,
)
