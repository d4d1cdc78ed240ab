"""Claimed axioms hold on every case, and every axiom that is not claimed has a counterexample."""

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import POLYNOMIAL, Case, Score, Subject, every_case, make_case, subjects
from torch import Tensor, nn

import esegeta as eg

AXIOMS = ("completeness", "linearity", "dummy", "symmetry", "shift", "sensitivity_a")
CASES = [*every_case(), make_case("conv", axes=2, channels=1, dtype="float32")]
FEW = [
    make_case("cubic", axes=2, channels=2, seed=1),
    make_case("cubic", axes=1, channels=1, dtype="float32"),
]
SUBJECTS = list(subjects())
METHODS = [s for s in SUBJECTS if not s.composite]

# A situation: where it is, what remains of the axiom there, what rounding or quadrature may leave.
Found = tuple[str, float, float]


def _size(*values: Tensor) -> float:
    return max(1.0, *(float(v.abs().max()) for v in values))


def _start(case: Case, subject: Subject) -> Tensor:
    """The point that an attribution starts from: the baseline, or zero where there is none."""
    refs = case.refs(subject.refs)
    return refs[-1] if refs else torch.zeros_like(case.x)


def completeness(subject: Subject, case: Case) -> Iterator[Found]:
    residual = eg.axioms.completeness(subject.explain(case), case.score)
    value, start = case.score(case.x), _start(case, subject)
    others = start if start.ndim > case.x.ndim else start[None]
    before = torch.stack([case.score(b) for b in others])
    allowed = case.remainder * _size(value, before) + subject.accuracy * float((value - before).abs().max())
    yield "", float(residual(case.x, *case.refs(subject.refs), **subject.extra()).abs()), allowed


def linearity(subject: Subject, case: Case) -> Iterator[Found]:
    other = make_case("cubic", axes=case.axes, channels=case.channels, dtype=case.dtype, seed=case.seed + 1)
    refs = case.refs(subject.refs)
    for weights in ((-1.5, 2.0),):
        run = eg.axioms.linearity(subject.build, case.score, other.score, weights=weights)
        parts = [subject.build(s)(case.x, *refs, **subject.extra()) for s in (case.score, other.score)]
        yield (
            f"weights={weights}",
            float(run(case.x, *refs, **subject.extra())),
            case.rounding * 4 * _size(*parts),
        )


def dummy(subject: Subject, case: Case) -> Iterator[Found]:
    ignored = case.draw("ignored", *case.shape) > 0.3
    inner = case.score
    score: Score = lambda z: inner(torch.where(ignored, 0.7, z))
    explain = subject.build(score)
    a = explain(case.x, *case.refs(subject.refs), **subject.extra())
    if subject.one_channel:
        ignored = ignored.all(0, keepdim=True)
    residual = eg.axioms.dummy(lambda *args, **kwargs: explain(*args, **kwargs), ignored)
    yield (
        "ignoring some",
        float(residual(case.x, *case.refs(subject.refs), **subject.extra())),
        case.rounding * _size(a),
    )
    # What cancels is ignored too: the function does not depend on it, only its formula does.
    nothing = lambda z, q: torch.relu(z) - torch.relu(z) + (z * z) * q - z * (z * q)
    cancelling = lambda z: score(z) + torch.where(ignored, nothing(z, z.roll(1, -1)), 0.0).sum()
    explain = subject.build(cancelling)
    yield (
        "cancelling some",
        float(residual(case.x, *case.refs(subject.refs), **subject.extra())),
        case.rounding * _size(a),
    )


def symmetry(subject: Subject, case: Case) -> Iterator[Found]:
    # Elements, or voxels where the channels are one map.
    rows = (case.channels, -1) if subject.one_channel else (-1,)
    size = case.x.reshape(rows).shape[-1]
    swap = torch.arange(size)
    i, j = 0, size - 2
    swap[[i, j]] = torch.tensor([j, i])
    symmetric = torch.arange(size)
    symmetric[j] = i
    inner = case.score
    moved = lambda z, order: z.reshape(*z.shape[: -len(case.shape)], *rows)[..., order].reshape(z.shape)
    score: Score = lambda z: inner(z) + inner(moved(z, swap))
    x = moved(case.x, symmetric)
    refs = [moved(r, symmetric) for r in case.refs(subject.refs)]
    explain = subject.build(score)
    a = explain(x, *refs, **subject.extra())
    residual = eg.axioms.symmetry(explain, swap)
    yield f"elements {i} and {j}", float(residual(x, *refs, **subject.extra())), case.rounding * _size(a)
    # The same function of both, by two formulas.
    bent = lambda a, b: torch.relu(a) + b + torch.relu(-b)
    product = lambda a, b: (a * a) * b + b * (b * a)
    formulas = lambda z: score(z) + (product(*z.flatten()[[i, j]]) - bent(*z.flatten()[[i, j]]))
    if len(rows) == 1 and case.kind in POLYNOMIAL:
        residual = eg.axioms.symmetry(subject.build(formulas), swap)
        yield "two formulas", float(residual(x, *refs, **subject.extra())), case.rounding * _size(a)


def shift(subject: Subject, case: Case) -> Iterator[Found]:
    refs = case.refs(subject.refs)
    a = subject(case)
    apart = max(float((case.score(case.x) - case.score(r)).abs()) for r in refs) if subject.accuracy else 0.0
    for what, c in (
        ("by 3", torch.full_like(case.x, 3.0)),
        ("by a ramp", 3 * case.draw("offset", *case.shape)),
    ):
        residual = eg.axioms.shift(subject.build, case.score, c)
        # A stopping rule may stop elsewhere when the last digit of a score changes.
        allowed = 10 * case.rounding * _size(a) + subject.accuracy * apart
        yield what, float(residual(case.x, *refs, **subject.extra())), allowed


def sensitivity_a(subject: Subject, case: Case) -> Iterator[Found]:
    if "baselines" in subject.refs:
        return
    start = _start(case, subject)
    scores: dict[str, Score] = {
        "the case's score": case.score,
        "saturating early": lambda z: (z - start).sum().clamp(max=0.05),
        "starting late": lambda z: (z - start - 1.95).clamp(min=0).sum(),
        "falling": lambda z: -torch.relu(z - start).sum(),
        "falling short": lambda z: -(0.05 - (z - start).sum()).clamp(min=0),
    }
    for element in (0, case.x.numel() // 2):
        x = start.clone()
        x.view(-1)[element] += 2
        # The constructed scores ignore the case's own: a few cases of them are enough.
        for what, score in list(scores.items())[: 5 if case.kind in POLYNOMIAL else 1]:
            residual = eg.axioms.sensitivity_a(subject.build(score), score)
            if what == "the case's score" and float((score(x) - score(start)).abs()) < 1e-3:
                continue
            refs = [start] if subject.refs else []
            yield f"element {element}, {what}", float(residual(x, *refs, **subject.extra())), 0.0


SITUATIONS: dict[str, Callable[[Subject, Case], Iterator[Found]]] = {
    "completeness": completeness,
    "linearity": linearity,
    "dummy": dummy,
    "symmetry": symmetry,
    "shift": shift,
    "sensitivity_a": sensitivity_a,
}


def check_claim(subject: Subject, axiom: str, cases: list[Case] = CASES) -> None:
    """A claimed axiom holds on every case."""
    for case in cases:
        for where, residual, allowed in SITUATIONS[axiom](subject, case):
            assert residual <= allowed, (
                f"{subject} claims {axiom}, but {residual:.3g} > {allowed:.3g} at {case} {where}"
            )


def check_no_claim(subject: Subject, axiom: str, cases: list[Case] = CASES) -> None:
    """An axiom that is not claimed fails somewhere."""
    for case in cases:
        for _, residual, allowed in SITUATIONS[axiom](subject, case):
            if residual > allowed:
                return
    raise AssertionError(f"{subject} keeps {axiom} on every case: claim it or widen the cases")


def _applies(subject: Subject, axiom: str) -> bool:
    # What a rule breaks, it breaks in networks that have what it rewrites: its own tests show where.
    return subject.differentiable and not (axiom == "sensitivity_a" and "baselines" in subject.refs)


# Whose explanations take long on every case.
LONG = ("conductance", "shapley_sampling", "deep_lift_reveal_cancel")


def _pair(subject: Subject, axiom: str):
    marks = [pytest.mark.slow] if subject.name in LONG else []
    return pytest.param(subject, axiom, id=f"{subject}-{axiom}", marks=marks)


CLAIMS = [_pair(s, a) for s in SUBJECTS for a in sorted(s.axioms)]
OPEN = [_pair(s, a) for s in METHODS for a in AXIOMS if a not in s.axioms and _applies(s, a)]


@pytest.mark.parametrize(("subject", "axiom"), CLAIMS)
def test_a_claimed_axiom_holds(subject, axiom):
    check_claim(subject, axiom, FEW if subject.composite else CASES)


@pytest.mark.parametrize(("subject", "axiom"), OPEN)
def test_an_unclaimed_axiom_has_a_counterexample(subject, axiom):
    check_no_claim(subject, axiom)


def test_claims_are_names_of_axioms():
    for subject in SUBJECTS:
        assert subject.axioms <= set(AXIOMS), subject.name


def test_noise_on_the_input_does_not_keep_completeness():
    case = make_case("cubic")
    explain = eg.smooth(eg.integrated_gradients(case.score, steps=8), noise=0.1, samples=4)
    (baseline,) = case.refs(("baseline",))
    assert eg.axioms.completeness(explain, case.score)(case.x, baseline, key=0).abs() > 0.1


# -- explanations inside a loss: their own derivatives -----------------------------------------------------------


BASELINE, BASELINES = make_case("softplus").refs(("baseline", "baselines"))


def _explanations(score: Score) -> dict[str, Callable[[Tensor], Tensor]]:
    baseline, many = BASELINE, BASELINES
    ig = eg.integrated_gradients(score, steps=4)
    return {
        "ig": lambda x: ig(x, baseline),
        "smooth(ig)": lambda x: eg.smooth(ig, noise=0.2, samples=3)(x, baseline, key=1),
        "expected_gradients": lambda x: eg.expected_gradients(score, samples=5)(x, many, key=1),
        "idgi": lambda x: eg.idgi(score, steps=4)(x, baseline),
        "blur": lambda x: eg.blur_integrated_gradients(score, steps=4, sigma=2.0)(x),
        "over_baselines(ig)": lambda x: eg.over_baselines(ig)(x, many),
    }


WHICH = sorted(_explanations(lambda x: x.sum()))


def _network(case: Case) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Softplus(), nn.Conv2d(3, 2, 1)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(case.draw(f"p{i}", *p.shape) / 2)
    return net.eval()


def _central(fn: Callable[[float], Tensor], h: float = 1e-4) -> float:
    return float((fn(h) - fn(-h)) / (2 * h))


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("entry", ["plain function", "from_module"])
def test_the_gradient_of_a_prior_with_respect_to_the_input(which, entry):
    case = make_case("softplus")
    network = eg.reducers.class_sum(eg.from_module(_network(case)), 1)
    score = network if entry == "from_module" else case.score
    explain = _explanations(score)[which]
    prior = lambda x: explain(x).square().sum()
    x, v = case.x, case.draw("direction", *case.shape)
    expected = _central(lambda h: prior(x + h * v))
    by_func = torch.func.grad(prior)(x)
    assert float((by_func * v).sum()) == pytest.approx(expected, rel=1e-5)
    z = x.clone().requires_grad_()
    prior(z).backward()
    assert torch.allclose(z.grad, by_func, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", WHICH)
def test_the_gradient_of_a_prior_with_respect_to_the_parameters(which):
    case = make_case("softplus")
    build, parameters = eg.models.parametrised(_network(case))
    x = case.x

    def prior(p):
        return _explanations(eg.reducers.class_sum(build(p), 1))[which](x).square().sum()

    v = {name: case.draw(name, *p.shape) for name, p in parameters.items()}
    expected = _central(lambda h: prior({name: p + h * v[name] for name, p in parameters.items()}))
    by_func = torch.func.grad(prior)(parameters)
    assert float(sum((by_func[name] * v[name]).sum() for name in v)) == pytest.approx(expected, rel=1e-5)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    prior(leaves).backward()
    for name, leaf in leaves.items():
        found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert torch.allclose(found, by_func[name], rtol=1e-10, atol=1e-12), name


def test_many_priors_at_once_equal_a_loop():
    case = make_case("softplus")
    prior = lambda x: _explanations(case.score)["ig"](x).square().sum()
    slope = torch.func.grad(prior)
    loop = torch.stack([slope(x) for x in case.xs])
    assert torch.allclose(torch.func.vmap(slope)(case.xs), loop, rtol=1e-10)
    assert torch.allclose(eg.batched(slope)(case.xs), loop, rtol=1e-10)
