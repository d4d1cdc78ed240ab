"""Captum 0.9.0 agrees where it is right; where it is wrong, the difference is shown to be its own.

The comparison on the real network takes minutes: ``pytest -m peers -s tests/test_peers.py``. The environment
variable ``ESEGETA_PEERS_SIZE`` cuts a smaller cube out of the head to try it out (64, for example).
"""

import os
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import esegeta as eg
from esegeta import zoo

captum = pytest.importorskip("captum")

RULES = {
    "gauss-legendre": "gausslegendre",
    "left": "riemann_left",
    "right": "riemann_right",
    "midpoint": "riemann_middle",
}


@pytest.fixture(autouse=True)
def the_same_numpy_numbers_in_every_run():
    np.random.seed(0)


class Case(NamedTuple):
    score: eg._types.Score
    forward: object  # the same score of a batch, as captum wants it
    x: Tensor
    baseline: Tensor


def drawn(shape, dtype, key=0):
    return eg.random.normal(key, shape, dtype=dtype)


def unet_case(ndim, dtype):
    net = zoo.small_unet(ndim).to(dtype)
    x = drawn((1, *(8, 6, 10)[:ndim]), dtype)
    return Case(
        eg.reducers.class_sum(eg.from_module(net), 1),
        lambda batch: net(batch)[:, 1].flatten(1).sum(1),
        x,
        0.1 * drawn(x.shape, dtype, key=1),
    )


def classifier_case(ndim, dtype):
    net = zoo.small_classifier(ndim, channels=2).to(dtype)
    x = drawn((2, *(8, 6, 10)[:ndim]), dtype)
    return Case(
        eg.reducers.logit(eg.from_module(net), 2),
        lambda batch: net(batch)[:, 2],
        x,
        torch.zeros_like(x),
    )


@pytest.fixture(params=["unet 1-D", "unet 2-D", "unet 3-D", "classifier 2-D", "classifier 3-D"])
def build(request):
    kind, ndim = request.param.split()
    return lambda dtype: {"unet": unet_case, "classifier": classifier_case}[kind](int(ndim[0]), dtype)


def watched(x):
    """A batch of one as captum wants it: it warns if the input does not require a gradient."""
    return x[None].clone().requires_grad_()


def assert_agree(ours, theirs, tolerance):
    assert ours.shape == theirs[0].shape
    assert ours.dtype == theirs.dtype
    scale = theirs.abs().max()
    assert scale > 0
    assert ((ours - theirs[0]).abs().max() / scale).item() <= tolerance


# --- Where captum is right --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("absolute", [True, False])
def test_saliency(build, dtype, tolerance, absolute):
    from captum.attr import Saliency

    case = build(dtype)
    ours = (eg.saliency if absolute else eg.gradient)(case.score)(case.x)
    assert_agree(ours, Saliency(case.forward).attribute(watched(case.x), abs=absolute), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_input_x_gradient(build, dtype, tolerance):
    from captum.attr import InputXGradient

    case = build(dtype)
    ours = eg.input_x_gradient(case.score)(case.x)
    assert_agree(ours, InputXGradient(case.forward).attribute(watched(case.x)).detach(), tolerance)


@pytest.mark.parametrize("rule", RULES)
def test_integrated_gradients(build, rule):
    """Captum rounds its weights, and the nodes of the Riemann rules, to float32: hence 1e-6."""
    from captum.attr import IntegratedGradients

    case = build(torch.float64)
    ours = eg.integrated_gradients(case.score, steps=12, rule=rule)(case.x, case.baseline)
    theirs = IntegratedGradients(case.forward).attribute(
        watched(case.x), case.baseline[None], n_steps=12, method=RULES[rule]
    )
    assert_agree(ours, theirs.detach(), 1e-6)


def with_noise(monkeypatch, key):
    """Captum with the noise that ``smooth`` draws from a key."""
    from captum.attr import NoiseTunnel

    def add(batch, stdev, count):
        (x,) = batch
        noise = eg.noise.absolute(stdev)
        return torch.stack([x + noise(x, eg.random.fold_in(key, i)) for i in range(count)])

    monkeypatch.setattr(NoiseTunnel, "_add_noise_to_input", staticmethod(add))


@pytest.mark.parametrize(
    ("transform", "kind"),
    [(eg.smooth, "smoothgrad"), (eg.smooth_squared, "smoothgrad_sq"), (eg.variance, "vargrad")],
)
def test_the_noise_tunnel_with_the_same_noise(build, transform, kind, monkeypatch):
    from captum.attr import NoiseTunnel, Saliency

    with_noise(monkeypatch, key=5)
    case = build(torch.float64)
    explain = transform(eg.gradient(case.score), noise=eg.noise.absolute(0.3), samples=7)
    theirs = NoiseTunnel(Saliency(case.forward)).attribute(
        watched(case.x), nt_type=kind, nt_samples=7, stdevs=0.3, abs=False
    )
    assert_agree(explain(case.x, key=5), theirs.detach(), 1e-10)


def test_the_noise_tunnel_around_integrated_gradients(monkeypatch):
    from captum.attr import IntegratedGradients, NoiseTunnel

    with_noise(monkeypatch, key=5)
    case = unet_case(2, torch.float64)
    ig = eg.integrated_gradients(case.score, steps=6)
    ours = eg.smooth(ig, noise=eg.noise.absolute(0.3), samples=4)(case.x, case.baseline, key=5)
    theirs = NoiseTunnel(IntegratedGradients(case.forward)).attribute(
        watched(case.x), baselines=case.baseline[None], nt_samples=4, stdevs=0.3, n_steps=6
    )
    assert_agree(ours, theirs.detach(), 1e-6)


def standard_errors_apart(first, second):
    """The largest difference of two means over runs, in standard errors."""
    difference = first.mean(0) - second.mean(0)
    error = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    return (difference.abs() / error).max().item()


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_gradient_shap_in_distribution(sigma):
    from captum.attr import GradientShap

    case = unet_case(2, torch.float64)
    baselines = torch.stack([case.baseline, case.baseline + 1, -case.x])
    runs, samples = 30, 40
    peer = GradientShap(case.forward)
    theirs = torch.cat(
        [
            peer.attribute(watched(case.x), baselines, n_samples=samples, stdevs=sigma).detach()
            for _ in range(runs)
        ]
    )
    explain = eg.gradient_shap(case.score, samples=samples, noise=eg.noise.absolute(sigma))
    ours = torch.stack([explain(case.x, baselines, key=k) for k in range(runs)])
    assert standard_errors_apart(ours, theirs) < 5

    # The comparison is sharp enough to notice one wrong baseline of three.
    wrong = torch.stack([explain(case.x, baselines[[0, 1, 1]], key=k) for k in range(runs)])
    assert standard_errors_apart(wrong, theirs) > 10


# --- Where captum is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5, 50])
def test_captums_trapezoid_loses_one_nth(n):
    """Its weights sum to (n - 1) / n, so even a linear score is not attributed completely."""
    from captum.attr import IntegratedGradients

    weights, x = drawn((1, 4, 5), torch.float64), drawn((1, 4, 5), torch.float64, key=1)
    baseline = drawn((1, 4, 5), torch.float64, key=2)
    score = lambda x: (weights * x).sum()
    difference = score(x) - score(baseline)

    theirs = IntegratedGradients(lambda batch: (weights * batch).flatten(1).sum(1)).attribute(
        watched(x), baseline[None], n_steps=n, method="riemann_trapezoid"
    )
    assert theirs.sum().item() == pytest.approx((n - 1) / n * difference.item(), rel=1e-6)

    ours = eg.integrated_gradients(score, steps=n, rule="trapezoid")(x, baseline)
    assert ours.sum().item() == pytest.approx(difference.item(), rel=1e-12)


def test_captums_vargrad_cancels(monkeypatch):
    """It subtracts the square of the mean from the mean of the squares: negative variances in float32."""
    from captum.attr import NoiseTunnel, Saliency

    with_noise(monkeypatch, key=3)
    x = drawn((1, 8, 8), torch.float32)
    slope, sigma, samples = 1e4, 0.5, 20
    score = lambda x: (slope * x + x.square() / 2).sum()  # the gradient is slope + x
    noise = eg.noise.absolute(sigma)
    draws = torch.stack([noise(x, eg.random.fold_in(3, i)) for i in range(samples)])
    truth = (x + draws).double().var(0, correction=0)

    theirs = NoiseTunnel(Saliency(lambda b: (slope * b + b.square() / 2).flatten(1).sum(1))).attribute(
        watched(x), nt_type="vargrad", nt_samples=samples, stdevs=sigma
    )[0]
    assert theirs.min() < 0
    assert (theirs - truth).abs().max() > truth.max()

    ours = eg.variance(eg.gradient(score), noise=noise, samples=samples)(x, key=3)
    assert ours.min() >= 0
    # What is left is the rounding of the gradients themselves, whose last place is worth 2^-10.
    assert (ours - truth).abs().max() < 2e-2 * truth.max()


def test_captums_noise_depends_on_the_chunk_and_moves_the_global_generator():
    from captum.attr import NoiseTunnel, Saliency

    case = unet_case(2, torch.float32)
    tunnel = NoiseTunnel(Saliency(case.forward))

    def theirs(together):
        torch.manual_seed(0)
        return tunnel.attribute(
            watched(case.x[:, :6]), nt_samples=6, stdevs=0.3, nt_samples_batch_size=together
        )

    before = torch.get_rng_state()
    one, three = theirs(1), theirs(3)
    assert not torch.equal(torch.get_rng_state(), before)
    assert (one - three).abs().max() > 1e-3 * one.abs().max()

    explain = eg.smooth(eg.saliency(case.score), noise=eg.noise.absolute(0.3), samples=6)
    before = torch.get_rng_state()
    with eg.execution(chunk=1):
        one = explain(case.x, key=0)
    with eg.execution(chunk=3):
        three = explain(case.x, key=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (one - three).abs().max() <= 1e-5 * one.abs().max()


# --- The real network -------------------------------------------------------------------------------------


class Real(NamedTuple):
    score: eg._types.Score
    forward: object
    x: Tensor
    baseline: Tensor
    difference: float

    def residual(self, attribution):
        """What is left unexplained, as a fraction of the difference."""
        return abs(attribution.double().sum().item() - self.difference) / abs(self.difference)

    def captum(self, steps):
        from captum.attr import IntegratedGradients

        return (
            IntegratedGradients(self.forward)
            .attribute(
                watched(self.x),
                self.baseline[None],
                n_steps=steps,
                method="gausslegendre",
                internal_batch_size=2,
            )[0]
            .detach()
        )


@pytest.fixture(scope="module")
def real():
    net, x = zoo.brain_extraction_unet(), zoo.head().data
    cube = int(os.environ.get("ESEGETA_PEERS_SIZE", "128"))
    start = (128 - cube) // 2
    x = x[:, start : start + cube, start : start + cube, start : start + cube].contiguous()
    with torch.no_grad():
        mask = net(x[None])[0] > 0
        baseline = torch.zeros_like(x)
        total = lambda batch: torch.where(mask, net(batch), 0).flatten(1).sum(1)
        difference = (total(x[None]) - total(baseline[None])).item()
    score = eg.reducers.predicted_class_sum(eg.from_module(net), 1, at=x)
    return Real(score, total, x, baseline, difference)


@pytest.fixture(scope="module")
def captums_default(real):
    """Its default of 50 steps, two at a time: all at once would need tens of gigabytes."""
    return real.captum(50)


@pytest.mark.peers
def test_the_scores_are_the_same(real):
    ours = (real.score(real.x) - real.score(real.baseline)).item()
    assert ours == pytest.approx(real.difference, rel=1e-5)


@pytest.fixture(scope="module")
def captums_32(real):
    return real.captum(32)


def apart(ours, theirs):
    """Of the largest value: the largest and the root mean square difference; and how many differ by 1e-4."""
    d = (ours - theirs).abs() / theirs.abs().max()
    return d.max().item(), d.square().mean().sqrt().item(), (d > 1e-4).double().mean().item()


@pytest.mark.peers
def test_integrated_gradients_of_the_real_network(real, captums_32):
    """In captum's memory layout both run the same kernels, and little but captum's float32 weights differs."""
    with eg.execution(layout="contiguous", chunk=2):
        ours = eg.integrated_gradients(real.score, steps=32)(real.x, real.baseline)
    largest, _, _ = apart(ours, captums_32)
    print(
        f"\n32 steps on {tuple(real.x.shape)}, contiguous: residual {100 * real.residual(ours):.3f} % (esegeta), "
        f"{100 * real.residual(captums_32):.3f} % (captum); at most {largest:.1e} of the largest value apart"
    )
    assert largest <= 1e-4
    assert real.residual(ours) == pytest.approx(real.residual(captums_32), abs=1e-4)


@pytest.mark.peers
def test_the_faster_layout_differs_only_where_rounding_decides(real, captums_32):
    """A ReLU or a max-pool close to a tie may fall to the other side: there the gradient jumps in float32.

    One such flip deep in the network reaches many voxels, each a little. So here only nearly all agree.
    """
    ours = eg.integrated_gradients(real.score, steps=32)(real.x, real.baseline)
    largest, typical, share = apart(ours, captums_32)
    print(
        f"\n32 steps, channels last: residual {100 * real.residual(ours):.3f} %; at most {largest:.1e} of the "
        f"largest value apart, {typical:.1e} typically, {100 * share:.2f} % of the voxels by more than 1e-4"
    )
    assert largest <= 1e-2
    assert typical <= 1e-4
    assert share <= 0.02


@pytest.mark.peers
def test_a_tolerance_takes_fewer_gradients_than_captums_default(real, captums_default):
    done = eg.adaptive_report(real.score, tolerance=0.01)(real.x, real.baseline)
    ours, theirs = real.residual(done.attribution), real.residual(captums_default)
    print(
        f"\nresidual {100 * ours:.3f} % with {int(done.evaluations)} gradients (esegeta, tolerance 1 %), "
        f"{100 * theirs:.3f} % with 50 (captum's default)"
    )
    assert ours <= 0.01 + 1e-4
    assert done.residual.item() / real.difference == pytest.approx(
        (done.attribution.double().sum().item() - real.difference) / real.difference, abs=1e-4
    )
    assert int(done.evaluations) < 50
    assert ours < theirs
