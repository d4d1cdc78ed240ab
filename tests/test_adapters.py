"""Methods of other libraries as subjects: they give what the library gives, and leave nothing behind."""

import random as python_random
import sys

import numpy as np
import pytest
import torch
from rounding import assert_alike
from torch import nn

import esegeta as eg
from esegeta._facts import facts_of
from esegeta.conformance import adapters, contract
from esegeta.conformance.adapters import peers
from esegeta.conformance.adapters.peers import Peer

captum = pytest.importorskip("captum.attr")

CAPTUM = sorted(n for n in adapters.names() if n.startswith("captum:"))
OTHERS = sorted(n for n in adapters.names() if not n.startswith("captum:"))
# They shuffle features, or solve for them, at random: slow, and each with a test of its own.
SLOW = ("Lime", "KernelShap", "ShapleyValueSampling", "KernelExplainer", "PermutationExplainer")


class Net(nn.Module):
    """A classifier with a bottleneck beside a skip."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(2, 3, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.bottom = nn.Conv2d(3, 3, 3, padding=1)
        self.relu_bottom = nn.ReLU()
        self.up = nn.Upsample(scale_factor=2)
        self.out = nn.Conv2d(3, 1, 1)

    def forward(self, x):
        a = self.relu(self.wide(x))
        return self.out(a + self.up(self.relu_bottom(self.bottom(self.pool(a))))).flatten(1).sum(1)


class Straight(nn.Module):
    """One that every rule of propagation knows."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(12, 1)

    def forward(self, x):
        return self.head(self.pool(self.relu(self.conv(x))).flatten(1))[:, 0]


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return (self.weight * x).flatten(1).sum(1)


class Score:
    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return self.module(x[None])[0]


def drawn(*shape, key=0):
    return eg.random.normal(key, shape, dtype=torch.float64)


def scored(make, key=50):
    net = make().double().eval()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(drawn(*p.shape, key=key + i) / max(1, p[0].numel()) ** 0.5)
    return Score(net)


X, BASELINE, BASELINES = drawn(2, 4, 4), 0.3 * drawn(2, 4, 4, key=1), 0.3 * drawn(3, 2, 4, 4, key=2)
REFS = {"baseline": BASELINE, "baselines": BASELINES}


def refs_of(subject):
    return [REFS[kind] for kind in subject.refs]


def score_for(name):
    return scored(Straight if "LRP" in name or "FullGrad" in name else Net)


def explained(name, score=None, x=X, key=3):
    subject = adapters.find(name)
    explain = subject.build(score_for(name) if score is None else score)
    return explain(x, *refs_of(subject), **subject.extra(key))


# --- Names ------------------------------------------------------------------------------------------------


def test_names_are_different_and_each_is_found():
    names = adapters.names()
    assert len(set(names)) == len(names) > 60
    assert {n.partition(":")[0] for n in names} == set(adapters.LIBRARIES)
    for name in CAPTUM:
        assert adapters.find(name).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("captum:DeepLIFT", "Nearest: captum:DeepLift"),
        ("torch:Saliency", "captum, zennit, shap, monai, grad_cam"),
        ("captum:IntegratedGradients(steps=3)", "Nearest: n_steps"),
        ("captum:IntegratedGradients(3)", "library:Method"),
        ("captum:IntegratedGradients(n_steps=open('x'))", "literals"),
        ("captum:IntegratedGradients(**{'n_steps': 3})", "library:Method"),
        ("captum:", "library:Method"),
    ],
)
def test_what_is_no_name_is_refused(text, message):
    with pytest.raises(ValueError, match=r"expected .*, got .*\. .*\.") as refusal:
        adapters.find(text)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["captum:DeepLift", "shap:DeepExplainer", "monai:GradCAM", "zennit:Gradient"]
)
def test_a_missing_package_names_the_extra(monkeypatch, name):
    library = name.partition(":")[0]
    for module in [m for m in sys.modules if m.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"the package {library} to be installed.*esegeta\[test\]"):
        adapters.find(name)


def test_options_reach_the_constructor_and_the_call():
    mean = "captum:IntegratedGradients(multiply_by_inputs=False, n_steps=4, method='riemann_middle')"
    expected = captum.IntegratedGradients(score_for("").module, multiply_by_inputs=False).attribute(
        X[None].clone().requires_grad_(), BASELINE[None], n_steps=4, method="riemann_middle"
    )
    assert_alike(explained(mean), expected[0].detach())
    assert adapters.find("captum:IntegratedGradients").nodes == 50
    assert adapters.find("captum:IntegratedGradients(n_steps=4)").nodes == 4
    assert adapters.find(mean).nodes is None


# --- What they give ---------------------------------------------------------------------------------------

BY_HAND = {
    "Saliency": lambda net, x: captum.Saliency(net).attribute(x),
    "IntegratedGradients": lambda net, x: captum.IntegratedGradients(net).attribute(x, BASELINE[None]),
    "DeepLift": lambda net, x: captum.DeepLift(net).attribute(x, BASELINE[None]),
    "DeepLiftShap": lambda net, x: captum.DeepLiftShap(net).attribute(x, BASELINES),
    "GuidedBackprop": lambda net, x: captum.GuidedBackprop(net).attribute(x),
    "LRP": lambda net, x: captum.LRP(net).attribute(x),
    "LayerConductance": lambda net, x: captum.LayerConductance(net, net.bottom).attribute(x, BASELINE[None]),
    "LayerGradCam": lambda net, x: captum.LayerGradCam(net, net.bottom).attribute(x),
    "LayerGradCam(layer='wide')": lambda net, x: captum.LayerGradCam(net, net.wide).attribute(x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BY_HAND)
def test_they_give_what_captum_gives(name):
    score = score_for(name)
    expected = BY_HAND[name](score.module, X[None].clone().requires_grad_())
    assert_alike(explained(f"captum:{name}"), expected[0].detach())


@pytest.mark.parametrize("name", [n for n in CAPTUM if not n.endswith(SLOW)])
def test_they_leave_everything_as_it_was(name):
    subject, score = adapters.find(name), score_for(name)
    state = {k: v.clone() for k, v in score.module.state_dict().items()}
    attributes = {n: sorted(vars(m)) for n, m in score.module.named_modules()}
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), python_random.getstate()
    explain, x, refs = subject.build(score), X.clone(), refs_of(subject)
    first = explain(x, *refs, **subject.extra(3))

    assert torch.equal(explain(x, *refs, **subject.extra(3)), first)
    assert torch.equal(x, X)
    assert first.dtype == X.dtype
    assert not first.requires_grad
    assert first.isfinite().all()
    if "Layer" not in name and name != "captum:InternalInfluence":
        assert first.shape == X.shape
    elif subject.one_channel:
        assert len(first) == 1
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert python_random.getstate() == before[2]
    assert all(torch.equal(v, state[k]) for k, v in score.module.state_dict().items())
    assert {n: sorted(vars(m)) for n, m in score.module.named_modules()} == attributes
    assert not any(m._forward_hooks or m._backward_hooks for m in score.module.modules())


@pytest.mark.parametrize("name", ["captum:GradientShap", "captum:NoiseTunnel", "captum:LayerGradientShap"])
def test_a_key_decides_what_is_drawn(name):
    assert torch.equal(explained(name, key=5), explained(name, key=torch.tensor(5)))
    assert not torch.equal(explained(name, key=5), explained(name, key=6))


@pytest.mark.parametrize("name", ["captum:Saliency", "captum:IntegratedGradients", "captum:DeepLift"])
def test_a_batch_of_examples_goes_to_the_library_as_one(name):
    subject, score = adapters.find(name), score_for(name)
    explain, xs = subject.build(score), torch.stack([X, X.flip(1), 2 * X])
    stacked = [torch.stack([r, 0.5 * r, r]) for r in refs_of(subject)]
    alone = torch.stack([explain(*ts) for ts in zip(xs, *stacked, strict=True)])
    assert torch.allclose(facts_of(explain).batched(xs, *stacked), alone, rtol=1e-12, atol=1e-14)


def test_a_plain_function_is_enough_where_no_module_is_hooked():
    score = lambda x: (x**3).sum() + x.prod()
    found = explained("captum:IntegratedGradients", score)
    assert torch.allclose(found, eg.integrated_gradients(score, steps=50)(X, BASELINE), rtol=1e-6)
    with pytest.raises(TypeError, match="a score with a network of modules as its attribute module"):
        explained("captum:DeepLift", score)


@pytest.mark.parametrize("name", ["KernelShap", "ShapleyValueSampling", "FeatureAblation", "Occlusion"])
def test_a_linear_score_has_one_answer(name):
    if name == "KernelShap":
        pytest.importorskip("sklearn")
    weight = drawn(2, 4, 4, key=9)
    found = explained(f"captum:{name}", Score(Linear(weight)))
    expected = weight * (X - BASELINE)
    if name == "Occlusion":  # a window of several voxels credits all of them with what they do together
        windows = nn.functional.unfold(expected[:, None], 2).sum(1)
        counts = nn.functional.fold(torch.ones(2, 4, 9), (4, 4), 2)
        expected = nn.functional.fold(windows[:, None].expand(2, 4, 9), (4, 4), 2) / counts.double()
        expected = expected[:, 0]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6) == (name != "KernelShap")
    if name == "KernelShap":  # 25 samples cannot determine 32 values, but their sum is right
        assert found.sum().item() == pytest.approx(expected.sum().item(), rel=1e-6)


# --- Layers -----------------------------------------------------------------------------------------------


def test_the_deepest_convolution():
    assert peers.place("it", scored(Net).module, "deepest", X[None])[1] == "bottom"
    straight = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.ConvTranspose1d(2, 2, 1), nn.Conv1d(2, 1, 1))
    assert peers.place("it", straight, "deepest", torch.ones(1, 1, 5))[1] == "2"
    assert not any(m._forward_hooks for m in straight.modules())


def test_a_layer_that_is_a_copy_of_the_input():
    _, name = peers.place("it", Score(Linear(drawn(2, 4, 4))).module, "input", X[None])
    assert name == "copy"
    found = explained("captum:LayerGradientXActivation(layer='input')", Score(Linear(drawn(2, 4, 4))))
    assert torch.allclose(found, drawn(2, 4, 4) * X)


@pytest.mark.parametrize(
    ("layer", "message"), [("'botom'", "Nearest: bottom"), ("'deepest'", "a network with a convolution")]
)
def test_a_layer_that_is_not_there(layer, message):
    score = scored(Net) if "botom" in layer else Score(Linear(drawn(2, 4, 4)))
    with pytest.raises(ValueError, match=message):
        explained(f"captum:LayerGradCam(layer={layer})", score)


# --- The other libraries ----------------------------------------------------------------------------------


def other(name):
    pytest.importorskip({"grad_cam": "cv2"}.get(name.partition(":")[0], name.partition(":")[0]))
    return adapters.find(name)


# Refused here: 2^32 evaluations.
REFUSED = ("shap:ExactExplainer",)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in OTHERS if n not in REFUSED and not n.endswith(SLOW)])
def test_the_others_leave_everything_as_it_was(name):
    subject, score = other(name), score_for(name)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), python_random.getstate()
    explain, refs = subject.build(score), refs_of(subject)
    first = explain(X, *refs, **subject.extra(3))
    assert torch.equal(explain(X, *refs, **subject.extra(3)), first)
    assert first.shape == ((1, 4, 4) if subject.one_channel else X.shape)
    assert first.dtype == X.dtype
    assert first.isfinite().all()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert python_random.getstate() == before[2]
    assert torch.get_default_dtype() == torch.float32


WEIGHT = drawn(2, 4, 4, key=9)
DIFFERENCE, AVERAGE = WEIGHT * (X - BASELINE), WEIGHT * (X - BASELINES.mean(0))
CLOSED_FORMS = {
    "zennit:Gradient": WEIGHT,
    "zennit:SmoothGrad": WEIGHT,
    "zennit:IntegratedGradients": DIFFERENCE,
    "shap:KernelExplainer(l1_reg=False)": AVERAGE,
    "shap:PermutationExplainer": AVERAGE,
    "monai:VanillaGrad": WEIGHT,
    "monai:SmoothGrad(magnitude=False)": WEIGHT,
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_others_on_a_linear_score(name):
    other(name)
    found = explained(name, Score(Linear(WEIGHT)))
    assert torch.allclose(found, CLOSED_FORMS[name], rtol=1e-5, atol=1e-6)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_shaps_exact_values_are_ours():
    """It takes few features: four here, of which three vary."""
    subject = other("shap:ExactExplainer")
    score = lambda x: x[0].prod() + (x[0] ** 2).sum()
    x, baselines = (
        torch.tensor([[1.0, 2.0, -1.0, 0.5]]).double(),
        torch.tensor([[[0.0, 1.0, 1.0, 0.5]]]).double(),
    )
    found = subject.build(score)(x, baselines)
    ours = eg.exact_shapley(score)(x, baselines[0])
    assert torch.allclose(found, ours, rtol=1e-10)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["zennit:GuidedBackprop", "monai:GuidedBackpropGrad", "grad_cam:GuidedBackpropReLUModel"]
)
def test_guided_backpropagation_is_the_same_everywhere(name):
    other(name)
    assert torch.allclose(explained(name), explained("captum:GuidedBackprop"), rtol=1e-5, atol=1e-8)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_grad_cam_is_the_same_but_for_its_scale():
    """captum gives the sum over channels; the others resize it and scale it to [0, 1], MONAI upside down."""
    layer = "(layer='wide')"
    score = scored(Net, key=60)
    raw = explained(f"captum:LayerGradCam{layer}", score).clamp(min=0)
    scaled = (raw - raw.min()) / (raw.max() - raw.min())
    assert 0 < scaled.mean() < 1
    for name, expected in {"grad_cam:GradCAM": scaled, "monai:GradCAM": 1 - scaled}.items():
        other(name)
        assert torch.allclose(explained(f"{name}{layer}", score), expected, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["captum:DeepLift", "captum:DeepLiftShap", "captum:GradientShap", "captum:Saliency"]
)
def test_a_library_is_put_to_the_contract_with_batches_of_its_own(name):
    subject = adapters.find(name)
    for check in contract.CHECKS:
        if not contract.inapplicable(check, subject):
            contract.check(check, subject)
    assert contract.inapplicable("chunk_free", subject) == "vmap does not map over it"
    assert bool(contract.inapplicable("batched_equals_loop", subject)) == subject.key


def test_a_library_that_mixes_the_examples_of_a_batch_breaks_the_contract():
    mixing = Peer(lambda: lambda _, xs: xs - xs.mean(0))
    with pytest.raises(AssertionError, match="its own batch: differs by"):
        contract.check("batched_equals_loop", peers.subject("mixing", mixing, {}))


# -- what was found in them ----------------------------------------------------------------------------------------


def test_the_page_answers_every_question():
    """The table is written by a command, by hand; what is asked, and what is known to be violated, it has to say."""
    from esegeta.conformance.adapters.__main__ import PAGE, QUESTIONS

    found = PAGE.read_text().partition("<!-- found -->\n")[2].partition("<!-- end of found -->")[0]
    rows = [[cell.strip(" `") for cell in line.split(" | ")] for line in found.splitlines()[2:]]
    names = {name.replace("grad-cam", "grad_cam") for name in adapters.LIBRARIES}
    asked = [(*method.split(":", 1), axiom) for method, axioms in QUESTIONS for axiom in axioms]
    assert [(row[0].strip("| ").split()[0], row[1], row[2]) for row in rows] == asked
    assert {library for library, _, _ in asked} <= names
    verdicts = {(row[1], row[2]): row[3] for row in rows}
    assert set(verdicts.values()) <= {"holds", "violated"}
    assert verdicts["GuidedBackprop", "implementation_invariance"] == "violated"
    assert verdicts["DeepLift", "completeness"] == "violated"
